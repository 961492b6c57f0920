"""Reductions: one engine for sums, extremes with and without indices, moments, norms and the like.

A reduction maps each loaded element to a *state* (one or more blocks: a sum; a value and its index; mean, squared
deviations and count), merges states, and maps the last one to results::

    out[k] = post(merge over r of lane(in[k, r]))

``k`` runs over the kept dimensions and ``r`` over the reduced ones, each sorted by stride and merged where memory is
one run, so any set of dimensions and any strides are the same problem and nothing is copied first. Lanes of a tile
accumulate separately (``fold``) and meet in a tree at the end (``merge``), so that the result is the same from run to
run. Reductions whose states are dear to merge (variance, logsumexp) reduce each tile at once instead (``block``).

The scheme follows from the shape:

* inner: ``r`` is the faster one in memory. A program takes one long row in a loop, or many short rows at once.
* outer: ``k`` is the faster one. A program takes a tile of neighbouring ``k`` and loops down ``r``.
* split: there are too few programs to fill the device. Each takes a share of ``r`` and leaves its state in a
  workspace; a second launch merges them (no atomics).

Source: the documentation of each op in PyTorch; NaN, ties, dtypes and empty inputs as measured against its results.
Variance follows Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import broadcast_shape, broadcast_strides
from gemsmode.ops.pointwise import ALWAYS_BOOL, power_of_2
from gemsmode.ops.pointwise import pointwise as declare_pointwise
from gemsmode.ops.promotion import ALL, FLOAT, INT, TRITON, opmath
from gemsmode.plan import Alloc, Arg, Decline, Into, Launch, Num, Out, Plan, Size, bind, contiguous_strides
from gemsmode.predicates import Predicate, dtype, dtype_name, where
from gemsmode.registry import find_op, planned, rule
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target, current

INTERPRETED = tl.constexpr(current().interpreted)
"""Whether kernels run in Triton's interpreter, which merges tuples of blocks one element at a time unless helped."""


# -- states: from an element, merged, to results -----------------------------------------------------------------------
#
# `lane(x..., r, params)` maps loaded blocks and their index along r to a state; `merge(*a, *b)` merges two states;
# `fold` is the same where b is known to come after a; `post(state, n, params)` maps a state of n elements to results.


@triton.jit
def precise_div(a, b):
    """a / b, rounded to nearest (a plain f32 division is approximate on GPUs)."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def precise_sqrt(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def lane_value(x, r, params):
    return (x,)


@triton.jit
def post_state(state, n, params):
    return state


@triton.jit
def merge_sum(a, b):
    return (a + b,)


@triton.jit
def post_mean(state, n, params):
    return (precise_div(state[0], n.to(state[0].dtype)),)


@triton.jit
def lane_nansum(x, r, params):
    return (tl.where(x != x, 0.0, x).to(x.dtype),)


@triton.jit
def merge_prod(a, b):
    return (a * b,)


@triton.jit
def merge_max(a, b):
    return (tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL),)


@triton.jit
def merge_min(a, b):
    return (tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL),)


@triton.jit
def lane_pair(a, b, r, params):
    return a, b


@triton.jit
def merge_min_max(a, c, b, d):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL), tl.maximum(c, d, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lane_indexed(x, r, params):
    return x, tl.broadcast_to(r, x.shape)


@triton.jit
def fold_argmax(a, i, b, j):
    """The first NaN, else the first greatest: j comes after i, so only what is greater takes its place."""
    take = ((b > a) | (b != b)) & (a == a)
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def merge_argmax(a, i, b, j):
    greater = ((b > a) | (b != b)) & (a == a)
    same = (a == b) | ((a != a) & (b != b))
    take = greater | (same & (j < i))
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def fold_argmin(a, i, b, j):
    take = ((b < a) | (b != b)) & (a == a)
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def merge_argmin(a, i, b, j):
    less = ((b < a) | (b != b)) & (a == a)
    same = (a == b) | ((a != a) & (b != b))
    take = less | (same & (j < i))
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def post_index(state, n, params):
    return (state[1],)


@triton.jit
def lane_nonzero(x, r, params):
    return ((x != 0).to(tl.int32),)


@triton.jit
def lane_count(x, r, params):
    return ((x != 0).to(tl.int64),)


@triton.jit
def merge_and(a, b):
    return (a & b,)


@triton.jit
def merge_or(a, b):
    return (a | b,)


# Norms: sum of |x|^p, then its p-th root.


@triton.jit
def lane_norm_0(x, r, params):
    return ((x != 0).to(x.dtype),)


@triton.jit
def lane_norm_1(x, r, params):
    return (tl.abs(x),)


@triton.jit
def lane_norm_2(x, r, params):
    return (x * x,)


@triton.jit
def lane_norm_p(x, r, params):
    p = tl.cast(params[0], x.dtype)
    magnitude = tl.abs(x)
    # exp2(p * log2(inf)) is NaN-free for both signs of p; 1 to any power is exact.
    return (tl.where(magnitude == 1, 1.0, tl.exp2(p * tl.log2(magnitude))).to(x.dtype),)


@triton.jit
def post_root_2(state, n, params):
    return (precise_sqrt(state[0]),)


@triton.jit
def post_root_p(state, n, params):
    total = state[0].to(tl.float64)  # one value a result: float64 costs nothing and keeps the root's digits
    return (tl.exp2(tl.log2(total) / tl.cast(params[0], tl.float64)).to(state[0].dtype),)


@triton.jit
def lane_dist_0(a, b, r, params):
    return lane_norm_0(a - b, r, params)


@triton.jit
def lane_dist_1(a, b, r, params):
    return lane_norm_1(a - b, r, params)


@triton.jit
def lane_dist_2(a, b, r, params):
    return lane_norm_2(a - b, r, params)


@triton.jit
def lane_dist_p(a, b, r, params):
    return lane_norm_p(a - b, r, params)


# Moments: (mean, its rounding error, sum of squared deviations, count). Keeping the mean in two parts makes the merge's
# difference of means exact, so that 1e6 + noise has the variance of the noise.


@triton.jit
def block_moments(x, m, AXIS: tl.constexpr):
    n = tl.sum(m.to(x.dtype), AXIS)
    at_least_1 = tl.maximum(n, 1.0)
    mean = precise_div(tl.sum(x, AXIS), at_least_1)
    d = tl.where(m, x - tl.expand_dims(mean, AXIS), 0.0).to(x.dtype)
    error = tl.sum(d, AXIS)
    low = precise_div(error, at_least_1)
    return mean, low, tl.maximum(tl.sum(d * d, AXIS) - error * low, 0.0, propagate_nan=tl.PropagateNan.ALL), n


@triton.jit
def merge_moments(mean_a, low_a, m2_a, n_a, mean_b, low_b, m2_b, n_b):
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    d = (mean_b - mean_a) + (low_b - low_a)
    empty = n_a == 0
    mean = tl.where(empty, mean_b, mean_a)
    low = tl.where(empty, low_b, low_a + d * share)
    m2 = tl.where(empty, m2_b, m2_a + m2_b + d * d * n_a * share)
    return mean, low, m2, n


@triton.jit
def _variance(state, n, params):
    m2 = state[2]
    degrees = n.to(m2.dtype) - tl.cast(params[0], m2.dtype)
    return precise_div(m2, tl.maximum(degrees, 0.0))


@triton.jit
def post_var(state, n, params):
    return (_variance(state, n, params),)


@triton.jit
def post_std(state, n, params):
    return (precise_sqrt(_variance(state, n, params)),)


@triton.jit
def post_var_mean(state, n, params):
    return _variance(state, n, params), state[0] + state[1]


@triton.jit
def post_std_mean(state, n, params):
    return precise_sqrt(_variance(state, n, params)), state[0] + state[1]


# logsumexp: (greatest, sum of exp(x - greatest)).


@triton.jit
def _shift(m):
    """What to subtract before exp: the greatest, or 0 where that would make inf - inf."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m).to(m.dtype)


@triton.jit
def lane_logsumexp(x, r, params):
    """exp(x - x), and of infinities the limits."""
    return x, tl.where(tl.abs(x) == float("inf"), tl.where(x > 0, x, 0.0), 1.0).to(x.dtype)


@triton.jit
def fold_logsumexp(m_a, s_a, m_b, s_b):
    """The smaller one's sum is scaled to the greater one's: one exp an element."""
    e = tl.where(m_a == m_b, 1.0, tl.exp(-tl.abs(m_a - m_b))).to(s_a.dtype)
    greater = m_b > m_a
    return tl.maximum(m_a, m_b), tl.where(greater, s_b, s_a) + tl.where(greater, s_a, s_b) * e


@triton.jit
def block_logsumexp(x, m, AXIS: tl.constexpr):
    greatest = tl.max(tl.where(m, x, float("-inf")).to(x.dtype), AXIS)
    e = tl.where(m, tl.exp(x - tl.expand_dims(_shift(greatest), AXIS)), 0.0)
    return greatest, tl.sum(e.to(x.dtype), AXIS)


@triton.jit
def merge_logsumexp(m_a, s_a, m_b, s_b):
    m = tl.maximum(m_a, m_b)
    s = _shift(m)
    a = tl.where(m_a == float("-inf"), s_a, s_a * tl.exp(_shift(m_a) - s))
    b = tl.where(m_b == float("-inf"), s_b, s_b * tl.exp(_shift(m_b) - s))
    return m, (a + b).to(s_a.dtype)


@triton.jit
def post_logsumexp(state, n, params):
    return (tl.log(state[1]) + _shift(state[0]),)


# Comparisons of two tensors.


@triton.jit
def lane_equal(a, b, r, params):
    return ((a == b).to(tl.int32),)


@triton.jit
def close(a, b, rtol, atol):
    """Whether |a - b| <= atol + |rtol * b| and a - b is finite, or a == b."""
    gap = tl.abs(a - b)
    finite = gap < float("inf")
    return (a == b) | (finite & (gap <= atol + tl.abs(rtol * b)))


@triton.jit
def lane_close(a, b, r, params):
    return (close(a, b, tl.cast(params[0], a.dtype), tl.cast(params[1], a.dtype)).to(tl.int32),)


@triton.jit
def lane_close_nan(a, b, r, params):
    same = close(a, b, tl.cast(params[0], a.dtype), tl.cast(params[1], a.dtype))
    return ((same | ((a != a) & (b != b))).to(tl.int32),)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def offset_of(i, sizes, strides):
    """The offset of flat index `i` over dimensions, fastest first; `sizes` leaves out the last one's."""
    if len(strides) == 0:
        return i * 0
    else:
        o = i * 0
        for d in tl.static_range(len(sizes)):
            o += (i % sizes[d]) * strides[d]
            i = i // sizes[d]
        return o + i * strides[len(sizes)]


@tl.core.builtin
def reduce_with(state: Any, axis: Any, merge: Any, _semantic: Any = None, _generator: Any = None) -> Any:
    """``tl.reduce`` of a tuple by a function that is a kernel's parameter, which ``tl.reduce`` itself does not unwrap."""
    result = tl.reduce(state, axis, getattr(merge, "value", merge), _semantic=_semantic, _generator=_generator)
    return tl.tuple(list(result))


@triton.jit
def _halves(state):
    """The even and the odd columns of [A, B] blocks (for the interpreter)."""
    even = ()
    odd = ()
    for s in state:
        a, b = tl.split(tl.reshape(s, [s.shape[0], s.shape[1] // 2, 2]))
        even = (*even, a)
        odd = (*odd, b)
    return even, odd


@triton.jit
def tree(state, MERGE: tl.constexpr, AXIS: tl.constexpr):
    """Merge a state's blocks [A, B] along AXIS in a tree, keeping the order: [B] or [A]."""
    if INTERPRETED:
        if AXIS == 0:
            flipped = ()
            for s in state:
                flipped = (*flipped, tl.trans(s))
            state = flipped
        while state[0].shape[1] > 1:
            even, odd = _halves(state)
            state = MERGE(*even, *odd)
        result = ()
        for s in state:
            result = (*result, tl.reshape(s, [s.shape[0]]))
        return result
    else:
        return reduce_with(state, AXIS, MERGE)


@triton.jit
def _place(step, last, o_tile, m_k, nr, r_sizes, STEPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Step number `step` down r: its elements' indices along r, and the mask, which is false from step `last` on.

    STEPPED: a step stays within the fastest reduced dimension, so that only scalars are divided.
    """
    if STEPPED:
        steps_a_row = tl.cdiv(r_sizes[0], BLOCK_R)
        r_in = (step % steps_a_row) * BLOCK_R + o_tile
        r = (step // steps_a_row) * r_sizes[0] + r_in
        m = m_k & (r_in < r_sizes[0])
    else:
        r = step * BLOCK_R + o_tile
        m = m_k & (r < nr)
    if BOUNDED:
        m = m & (step < last)
    return r, m


@triton.jit
def _fetch(ins, o_k, step, last, o_tile, m_k, nr, r_sizes, r_strides, OTHER: tl.constexpr, EVICT: tl.constexpr,
           STEPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The blocks of step number `step`, as they lie in memory."""
    r, m = _place(step, last, o_tile, m_k, nr, r_sizes, STEPPED, BOUNDED, BLOCK_R)
    if STEPPED:
        steps_a_row = tl.cdiv(r_sizes[0], BLOCK_R)
        i_outer = step // steps_a_row
        r_in = (step % steps_a_row) * BLOCK_R + o_tile
        o_0 = r_in * r_strides[0][0] + offset_of(i_outer, r_sizes[1:], r_strides[0][1:])
        if len(ins) == 2:
            o_r = (o_0, r_in * r_strides[1][0] + offset_of(i_outer, r_sizes[1:], r_strides[1][1:]))
        else:
            o_r = (o_0,)
    else:
        if len(ins) == 2:
            o_r = (offset_of(r, r_sizes, r_strides[0]), offset_of(r, r_sizes, r_strides[1]))
        else:
            o_r = (offset_of(r, r_sizes, r_strides[0]),)
    b0 = tl.load(ins[0] + (o_k[0] + o_r[0]), mask=m, other=OTHER[0], eviction_policy=EVICT)
    if len(ins) == 1:
        return (b0,)
    else:
        return b0, tl.load(ins[1] + (o_k[1] + o_r[1]), mask=m, other=OTHER[1], eviction_policy=EVICT)


@triton.jit
def _fetch_group(ins, o_k, step, last, o_tile, m_k, nr, r_sizes, r_strides, OTHER: tl.constexpr, EVICT: tl.constexpr,
                 STEPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr):
    """The blocks of GROUP steps from number `step` on."""
    group = ()
    for i in tl.static_range(GROUP):
        group = group + (_fetch(ins, o_k, step + i, last, o_tile, m_k, nr, r_sizes, r_strides, OTHER, EVICT, STEPPED, BOUNDED,
                                BLOCK_R),)
    return group


@triton.jit
def _convert(x, HOW: tl.constexpr):
    if len(x) == 1:
        return (x[0].to(HOW[0][0]).to(HOW[0][1]),)
    else:
        return x[0].to(HOW[0][0]).to(HOW[0][1]), x[1].to(HOW[1][0]).to(HOW[1][1])


@triton.jit
def _state_of(x, step, last, o_tile, m_k, nr, r_sizes, params, LANE: tl.constexpr, BLOCK: tl.constexpr, HOW: tl.constexpr,
              STEPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_R: tl.constexpr, AXIS: tl.constexpr):
    r, m = _place(step, last, o_tile, m_k, nr, r_sizes, STEPPED, BOUNDED, BLOCK_R)
    if BLOCK is None:
        return LANE(*_convert(x, HOW), r, params)
    else:
        return BLOCK(*_convert(x, HOW), m, AXIS)


@triton.jit
def _store_all(outs, o, values, m):
    for i in tl.static_range(len(outs)):
        tl.store(outs[i] + o, values[i].to(outs[i].dtype.element_ty), mask=m)


@triton.jit
def reduce_kernel(outs, ins, nk, nr, n, total, steps, k_sizes, r_sizes, out_strides, k_strides, r_strides, params,
                  LANE: tl.constexpr, FOLD: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr, POST: tl.constexpr,
                  OTHER: tl.constexpr, HOW: tl.constexpr, INNER: tl.constexpr, STEPPED: tl.constexpr,
                  LOOP: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, EVICT: tl.constexpr, BLOCK_K: tl.constexpr,
                  BLOCK_R: tl.constexpr, GROUP: tl.constexpr):
    """Reduce [nk, nr] along r. Grid: blocks of k, then shares of `steps` steps out of `total` (SPLIT: states are stored).

    INNER tiles are [BLOCK_K, BLOCK_R], outer ones [BLOCK_R, BLOCK_K]: the faster dimension of memory comes last.
    """
    i_k = tl.program_id(0)
    i_s = tl.program_id(1)
    if WIDE:
        i_k = i_k.to(tl.int64)
        i_s = i_s.to(tl.int64)
    k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_out = k < nk
    if INNER:
        AXIS: tl.constexpr = 1
        o_tile = tl.arange(0, BLOCK_R)[None, :]
        k_tile = k[:, None]
    else:
        AXIS: tl.constexpr = 0
        o_tile = tl.arange(0, BLOCK_R)[:, None]
        k_tile = k[None, :]
    if WIDE:
        o_tile = o_tile.to(tl.int64)
    m_k = k_tile < nk
    if len(ins) == 1:
        o_k = (offset_of(k_tile, k_sizes, k_strides[0]),)
    else:
        o_k = (offset_of(k_tile, k_sizes, k_strides[0]), offset_of(k_tile, k_sizes, k_strides[1]))
    first = i_s * steps
    last = tl.minimum(first + steps, total)
    BOUNDED: tl.constexpr = LOOP or GROUP > 1
    # A group of steps is loaded while the one before is merged: short of registers, a compiler would wait for each load.
    group = _fetch_group(ins, o_k, first, last, o_tile, m_k, nr, r_sizes, r_strides, OTHER, EVICT, STEPPED, BOUNDED, BLOCK_R, GROUP)
    if LOOP:
        ahead = _fetch_group(ins, o_k, first + GROUP, last, o_tile, m_k, nr, r_sizes, r_strides, OTHER, EVICT, STEPPED, BOUNDED,
                             BLOCK_R, GROUP)
    state = _state_of(group[0], first, last, o_tile, m_k, nr, r_sizes, params, LANE, BLOCK, HOW, STEPPED, BOUNDED, BLOCK_R, AXIS)
    for i in tl.static_range(1, GROUP):
        state = FOLD(*state, *_state_of(group[i], first + i, last, o_tile, m_k, nr, r_sizes, params, LANE, BLOCK, HOW, STEPPED, BOUNDED,
                                        BLOCK_R, AXIS))
    if LOOP:
        for step in range(first + GROUP, last, GROUP):
            group = ahead
            ahead = _fetch_group(ins, o_k, step + GROUP, last, o_tile, m_k, nr, r_sizes, r_strides, OTHER, EVICT, STEPPED, BOUNDED,
                             BLOCK_R, GROUP)
            for i in tl.static_range(GROUP):
                state = FOLD(*state, *_state_of(group[i], step + i, last, o_tile, m_k, nr, r_sizes, params, LANE, BLOCK, HOW, STEPPED,
                                                BOUNDED, BLOCK_R, AXIS))
    if BLOCK is None:
        state = tree(state, MERGE, AXIS)
    if SPLIT:
        _store_all(outs, i_s * nk + k, state, m_out)
    else:
        _store_all(outs, offset_of(k, k_sizes, out_strides), POST(state, n, params), m_out)


@triton.jit
def merge_kernel(outs, states, nk, splits, n, k_sizes, out_strides, params, MERGE: tl.constexpr, POST: tl.constexpr,
                 IDENTITY: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):
    """Merge the states [splits, nk] that a split launch left."""
    i_k = tl.program_id(0)
    if WIDE:
        i_k = i_k.to(tl.int64)
    k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)[:, None]
    m = (s < splits) & (k < nk)[None, :]  # [BLOCK_S, BLOCK_K]
    o = s * nk + k[None, :]
    b0 = tl.load(states[0] + o, mask=m, other=IDENTITY[0])
    if len(states) == 1:
        state = (b0,)
    else:
        b1 = tl.load(states[1] + o, mask=m, other=IDENTITY[1])
        if len(states) == 2:
            state = (b0, b1)
        else:
            b2 = tl.load(states[2] + o, mask=m, other=IDENTITY[2])
            b3 = tl.load(states[3] + o, mask=m, other=IDENTITY[3])
            state = (b0, b1, b2, b3)
    _store_all(outs, offset_of(k, k_sizes, out_strides), POST(tree(state, MERGE, 0), n, params), k < nk)


# -- launch choice -----------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """How a reduction of [nk, nr] is shared out: tile, programs along r, warps a program, and steps loaded together."""

    block_k: int
    block_r: int
    splits: int = 1
    warps: int = 4
    group: int = 1


_INTERPRETED_TILE = 1 << 16
_STEP_BYTES = 4096  # of input in a step of a loop: a 16-byte load in each of 256 threads
_GROUP = 4  # steps loaded together: 64 bytes in flight a thread
_SHARE = 4  # groups of steps that a program takes, if the reduced dimension is shared out: 64 KB
_MOST_SPLITS = 4096  # programs that share one result, at most
_TILE_BYTES = _STEP_BYTES * _GROUP  # what a program without a loop takes, if the reduced dimension is the slower one
_SHORTEST_STEP = 256  # elements of the fastest reduced dimension, if a step is not to cross it
_LONGEST_ROW = 8192  # elements that a program takes without a loop
_WARPS = ((1024, 2), (2048, 4), (4096, 8), (1 << 30, 16))  # (elements of a tile at most, warps)
_FLAT_TILE = 16384  # elements that a program takes of a whole tensor, without a loop


_STREAMED = 1 << 25  # bytes of input, of which a cache keeps too little for a second reader
_LINE_BYTES = 128


def eviction(moved: int, fastest_stride: int, run_bytes: int) -> str:
    """How inputs of ``moved`` bytes go through the cache.

    What is too large to be found there again is the first to go, so that it does not push out what other kernels left:
    that would have to be written to memory meanwhile. Only for whole cache lines, ``run_bytes`` in one piece.
    """
    return "evict_first" if moved >= _STREAMED and fastest_stride == 1 and run_bytes >= _LINE_BYTES else ""


def _ladder(steps: Sequence[tuple[int, int]], n: int) -> int:
    for limit, value in steps:
        if n <= limit:
            return value
    raise ValueError(f"{n} is above every limit")


def choose(nk: int, row: int, repeats: int, inner: bool, itemsize: int, states: int, target: Target) -> Schedule:
    """The schedule for ``nk`` results of ``repeats`` rows of ``row`` elements each.

    ``itemsize``: bytes of an element; ``states``: blocks of state that every lane of a tile keeps.
    """
    if target.interpreted:
        block_r = min(power_of_2(max(row, 1)), _INTERPRETED_TILE)
        block_k = min(power_of_2(nk), _INTERPRETED_TILE // block_r)
        steps = -(-row // block_r) * repeats
        return Schedule(block_k, block_r, min(steps, 4) if nk == 1 else 1)
    fitting = power_of_2(max(row, 1))
    busy = 2 * target.multiprocessors
    # Every lane of a step keeps its blocks of state in registers.
    step = max(_STEP_BYTES // itemsize, 256)
    if inner and states > 1:
        step = min(step, max(_STEP_BYTES // 2 // itemsize, 1024))
    tile = max(_TILE_BYTES // itemsize // min(states, 2), 1024)
    group = 1
    tiles = -(-row // _FLAT_TILE)
    if nk == repeats == states == 1 and itemsize <= 4 and busy <= tiles <= _MOST_SPLITS:
        return Schedule(1, _FLAT_TILE, tiles, 16)
    if inner:
        block_r = fitting if row <= _LONGEST_ROW // min(states, 2) else min(step, fitting)
        block_k = max(min(tile // 2 // block_r, power_of_2(nk)), 1)
        while block_k > 1 and -(-nk // block_k) < busy:
            block_k //= 2
    else:
        # 512 bytes of a row: whole sectors, one 16-byte load in each thread of a warp.
        block_k = min(power_of_2(nk), max(512 // itemsize, 32))
        block_r = min(max(tile // block_k, 1), fitting)
        while block_k > 32 and -(-nk // block_k) * -(-row // block_r) < target.multiprocessors:
            block_k //= 2
        # Few rows: the tile grows along k instead, while that leaves enough programs.
        while block_r * block_k < tile // 4 and -(-nk // (block_k * 2)) >= 2 * busy:
            block_k *= 2
        if -(-row // block_r) * repeats > 1:
            block_r = max(min(step // block_k, block_r), 1)
    steps = -(-row // block_r) * repeats
    warps = min(_ladder(_WARPS, block_k * block_r), 16 if inner else 8)
    if steps > 1:
        warps = min(max(block_k * block_r * itemsize // 512, 1), 8)
        group = min(_GROUP, power_of_2(steps))
    programs, groups = -(-nk // block_k), -(-steps // group)
    splits = 1
    if programs < busy and groups >= 8:
        # At least 32 warps on each multiprocessor.
        splits = min(groups, max(target.multiprocessors * (32 // warps) // programs, 1))
        if inner:
            # Of long rows several waves of programs: multiprocessors differ in how fast memory serves them, and with equal shares in
            # one wave all would wait for the slowest. Columns are better read in one wave, from few places at once.
            splits = min(groups, max(splits, min(groups // _SHARE, _MOST_SPLITS // min(block_k, 4))))
    return Schedule(block_k, block_r, splits, warps, group)


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reduction:
    """What the engine needs to know of one reduction.

    Attributes:
        lane: from loaded blocks to a state; None if ``block`` is given.
        merge: merges two states.
        post: from a state to results.
        other: what a masked element reads as, so that it does not count; given the input's dtype. One for all inputs, or
            one for each.
        states: dtypes of the state's blocks, given the dtype computed in.
        identity: values of an empty state, given the dtype computed in.
        fold: ``merge`` where the second state comes after the first; defaults to ``merge``.
        block: from a tile and its mask to the state of each row, for states that are dear to merge.
        indexed: whether states hold indices, so that the reduced dimensions must stay in order.
    """

    lane: Any
    merge: Any
    post: Any
    other: Callable[[torch.dtype], Any] | tuple[Callable[[torch.dtype], Any], ...]
    states: Callable[[torch.dtype], tuple[Any, ...]]
    identity: Callable[[torch.dtype], tuple[Any, ...]]
    fold: Any = None
    block: Any = None
    indexed: bool = False


class Source(NamedTuple):
    """One input: where it comes from, its layout, the dtype it is converted to, and the one computed in."""

    ref: Arg
    meta: TensorMeta
    common: torch.dtype
    compute: torch.dtype


class Dims(NamedTuple):
    """Merged dimensions, fastest first, and per operand the strides along them."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:  # type: ignore[override]
        return math.prod(self.sizes)


def merge_dims(columns: Sequence[tuple[int, tuple[int, ...]]], ordered: bool) -> Dims:
    """Merge dimensions given as (size, strides), slowest first; ``ordered`` keeps their order, else strides sort them."""
    if len(columns) == 1 and columns[0][0] != 1:
        size, strides = columns[0]
        return Dims((size,), tuple(zip(strides)))
    alive = [c for c in reversed(columns) if c[0] != 1]
    if not ordered:
        alive.sort(key=lambda c: (c[1][0] == 0, c[1][0]))
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    for size, strides in alive:
        if sizes and all([last * sizes[-1] == now for last, now in zip(steps[-1], strides)]):
            sizes[-1] *= size
        else:
            sizes.append(size)
            steps.append(strides)
    operands = len(columns[0][1]) if columns else 0
    return Dims(tuple(sizes), tuple(zip(*steps)) if steps else ((),) * operands)


def canonical_dims(dims: Any, ndim: int) -> tuple[int, ...]:
    """``dims`` (None, an int or a list; None and [] mean all) as sorted non-negative numbers.

    Raises:
        Decline: one is out of range or repeated (PyTorch raises its own error).
    """
    if dims is None or (dims.__class__ is not int and len(dims) == 0):
        return tuple(range(ndim))
    given = (dims,) if dims.__class__ is int else tuple(dims)
    rank = max(ndim, 1)
    if min(given) < -rank or max(given) >= rank:
        raise Decline("PyTorch rejects it: a dimension is out of range")
    wrapped = {d % rank for d in given}
    if len(wrapped) != len(given):
        raise Decline("PyTorch rejects it: a dimension appears twice")
    return tuple(sorted(wrapped)) if ndim else ()


def reduced_shape(shape: tuple[int, ...], dims: Sequence[int], keepdim: bool) -> tuple[int, ...]:
    """The result's shape."""
    if keepdim:
        return tuple([1 if d in dims else s for d, s in enumerate(shape)])
    return tuple([s for d, s in enumerate(shape) if d not in dims])


def _fastest(strides: tuple[int, ...]) -> int:
    """The least stride that is not 0; 0 if there is none."""
    return min([step for step in strides if step], default=0)


@functools.lru_cache(maxsize=4096)
def _constants(how: Reduction, types: tuple[tuple[torch.dtype, ...], ...], **rest: Any) -> Constants:
    """Constants of :func:`reduce_kernel` for inputs of ``types``: own dtype, the one converted to, and the one computed in."""
    others = how.other if isinstance(how.other, tuple) else (how.other,) * len(types)
    return Constants((("LANE", how.lane), ("FOLD", how.merge if how.fold is None else how.fold), ("MERGE", how.merge),
                      ("BLOCK", how.block), ("POST", how.post),
                      ("OTHER", tuple([function(own) for function, (own, _, _) in zip(others, types)])),
                      ("HOW", tuple([(TRITON[common], TRITON[compute]) for _, common, compute in types])), *rest.items()))


def reduce_plan(call: Call, how: Reduction, sources: Sequence[Source], dims: tuple[int, ...], keepdim: bool,
                results: Sequence[torch.dtype], params: tuple[Any, ...] = (), flops: int = 1) -> Plan:
    """The plan of one reduction.

    Args:
        how: the reduction.
        sources: the inputs, all of one shape (a broadcast one has strides of 0).
        dims: the reduced dimensions, as :func:`canonical_dims` gives them.
        keepdim: whether they stay, with size 1.
        results: a dtype for each result.
        params: numbers for ``lane`` and ``post``.
        flops: operations an element, for reports.

    Results are contiguous, as PyTorch's are.
    """
    target = call.target
    shape = sources[0].meta.shape
    for s in sources:
        if s.meta.dtype not in TRITON or s.compute not in TRITON:
            raise Decline(f"{dtype_name(s.meta.dtype)} is not handled by reductions")
    out_shape = reduced_shape(shape, dims, keepdim)
    if call.outs is not None:
        allocs: list[Alloc] = []
        outs: tuple[Any, ...] = tuple([Into(i) for i in range(len(call.outs))])
        out_stride = call.outs[0].stride
        if any(o.stride != out_stride for o in call.outs):
            raise Decline("the tensors to be written have different strides")
    else:
        out_stride = contiguous_strides(out_shape)
        allocs = [Alloc(out_shape, out_stride, d) for d in results]
        outs = tuple([Out(i) for i in range(len(allocs))])
    returns = outs[0] if len(outs) == 1 else outs
    metas = {s.ref: s.meta for s in sources}
    elements, out_elements = math.prod(shape), math.prod(out_shape)
    moved = elements * sum([s.meta.dtype.itemsize for s in sources]) + out_elements * sum([d.itemsize for d in results])
    flops *= elements
    if out_elements == 0:
        return Plan(tuple(allocs), (), returns, metas, bytes=moved, flops=flops)
    at_out = iter(out_stride)
    kept_columns, reduced_columns = [], []
    for d, (size, *steps_in) in enumerate(zip(shape, *[s.meta.stride for s in sources])):
        if d in dims:
            reduced_columns.append((size, tuple(steps_in)))
            if keepdim:
                next(at_out)
        else:
            kept_columns.append((size, (*steps_in, next(at_out))))
    kept = merge_dims(kept_columns, False)
    reduced = merge_dims(reduced_columns, how.indexed)
    nk, nr = kept.count, reduced.count
    out_steps = kept.strides[-1] if kept.strides else ()
    k_steps = kept.strides[:-1] if kept.strides else ((),) * len(sources)
    r_steps = reduced.strides or ((),) * len(sources)
    fastest, fastest_kept = _fastest(r_steps[0]), _fastest(k_steps[0])
    inner = nk == 1 or (0 < fastest and (fastest < fastest_kept or not fastest_kept))
    itemsize = max([s.meta.dtype.itemsize for s in sources])
    compute = sources[0].compute
    # Empty tensors may have any strides; what counts is the greatest offset.
    wide = nk * max(nr, 1) >= 2**31 - 2**17 or any([s.meta.extent >= 2**31 for s in sources])
    index = torch.int64 if wide else torch.int32
    state_dtypes = [index if d == "index" else d for d in how.states(compute)]
    # A step that stays within the fastest reduced dimension divides only scalars; short ones would waste its lanes.
    stepped = inner and len(reduced.sizes) > 1 and reduced.sizes[0] >= _SHORTEST_STEP
    row = reduced.sizes[0] if stepped else nr
    repeats = math.prod(reduced.sizes[1:]) if stepped else 1
    schedule = choose(nk, row, repeats, inner, itemsize, 1 if how.block is not None else len(state_dtypes), target)
    block_r = schedule.block_r
    total = -(-row // block_r) * repeats
    splits = max(min(schedule.splits, total), 1)
    steps = -(-max(total, 1) // (splits * schedule.group)) * schedule.group
    splits = -(-max(total, 1) // steps)
    run = min(row, block_r) if inner else min(nk, schedule.block_k)
    evict = eviction(moved, fastest if inner else fastest_kept, run * sources[0].meta.dtype.itemsize)
    k_sizes = tuple([Size(s) for s in kept.sizes[:-1]])
    # The fastest one bounds the mask of a step, so that its divisibility makes wide loads.
    r_sizes = tuple([s if d == 0 and stepped else Size(s) for d, s in enumerate(reduced.sizes[:-1])])
    types = tuple([(s.meta.dtype, s.common, s.compute) for s in sources])
    grid_k = -(-nk // schedule.block_k)
    if splits > 1:
        first = len(allocs)
        allocs += [Alloc((splits, nk), (nk, 1), d) for d in state_dtypes]
        into: tuple[Any, ...] = tuple([Out(first + i) for i in range(len(state_dtypes))])
    else:
        into = outs
    launches = [Launch(
        reduce_kernel, (grid_k, splits, 1),
        (into, tuple([s.ref for s in sources]), nk, nr, Size(nr), Size(total), Size(steps), k_sizes, r_sizes, out_steps, k_steps,
         r_steps, params),
        _constants(how, types, INNER=inner, STEPPED=stepped, LOOP=total > 1 and steps > schedule.group, SPLIT=splits > 1, WIDE=wide,
                   EVICT=evict, BLOCK_K=schedule.block_k, BLOCK_R=block_r, GROUP=schedule.group if total > 1 else 1), schedule.warps)]
    if splits > 1:
        block_s = power_of_2(splits)
        identity = tuple([torch.iinfo(index).max if d == "index" else v for d, v in zip(how.states(compute), how.identity(compute))])
        block_k = max(min(power_of_2(nk), (_INTERPRETED_TILE if target.interpreted else 2048) // block_s), 1)
        launches.append(Launch(
            merge_kernel, (-(-nk // block_k), 1, 1), (outs, into, nk, Size(splits), Size(nr), k_sizes, out_steps, params),
            (("MERGE", how.merge), ("POST", how.post), ("IDENTITY", identity), ("WIDE", wide),
             ("BLOCK_S", block_s), ("BLOCK_K", block_k)), _ladder(_WARPS, block_s * block_k)))
    return Plan(tuple(allocs), tuple(launches), returns, metas, bytes=moved, flops=flops)


# -- the reductions ----------------------------------------------------------------------------------------------------


def lowest(d: torch.dtype) -> Any:
    """The value that no maximum is below."""
    if d.is_floating_point:
        return float("-inf")
    return 0 if d == torch.bool else torch.iinfo(d).min


def highest(d: torch.dtype) -> Any:
    """The value that no minimum is above."""
    if d.is_floating_point:
        return float("inf")
    return 1 if d == torch.bool else torch.iinfo(d).max


_NO_INDEX = None  # the greatest index of the dtype that the plan picks


def _one(d: torch.dtype) -> tuple[Any, ...]:
    return (d,)


def _value_and_index(d: torch.dtype) -> tuple[Any, ...]:
    return d, "index"


def _flag(d: torch.dtype) -> tuple[Any, ...]:
    return (torch.int32,)


def _zero(d: torch.dtype) -> Any:
    return 0.0 if d.is_floating_point else 0


def _unit(d: torch.dtype) -> Any:
    return 1.0 if d.is_floating_point else 1


SUM = Reduction(lane_value, merge_sum, post_state, _zero, _one, lambda d: (_zero(d),))
MEAN = Reduction(lane_value, merge_sum, post_mean, _zero, _one, lambda d: (_zero(d),))
NANSUM = Reduction(lane_nansum, merge_sum, post_state, _zero, _one, lambda d: (_zero(d),))
PROD = Reduction(lane_value, merge_prod, post_state, _unit, _one, lambda d: (_unit(d),))
AMAX = Reduction(lane_value, merge_max, post_state, lowest, _one, lambda d: (lowest(d),))
AMIN = Reduction(lane_value, merge_min, post_state, highest, _one, lambda d: (highest(d),))
MAX_DIM = Reduction(lane_indexed, merge_argmax, post_state, lowest, _value_and_index, lambda d: (lowest(d), _NO_INDEX),
                    fold=fold_argmax, indexed=True)
MIN_DIM = Reduction(lane_indexed, merge_argmin, post_state, highest, _value_and_index, lambda d: (highest(d), _NO_INDEX),
                    fold=fold_argmin, indexed=True)
ARGMAX = Reduction(lane_indexed, merge_argmax, post_index, lowest, _value_and_index, lambda d: (lowest(d), _NO_INDEX),
                   fold=fold_argmax, indexed=True)
ARGMIN = Reduction(lane_indexed, merge_argmin, post_index, highest, _value_and_index, lambda d: (highest(d), _NO_INDEX),
                   fold=fold_argmin, indexed=True)
ALL_NONZERO = Reduction(lane_nonzero, merge_and, post_state, _unit, _flag, lambda d: (1,))
ANY_NONZERO = Reduction(lane_nonzero, merge_or, post_state, _zero, _flag, lambda d: (0,))
COUNT = Reduction(lane_count, merge_sum, post_state, _zero, lambda d: (torch.int64,), lambda d: (0,))
LOGSUMEXP = Reduction(lane_logsumexp, merge_logsumexp, post_logsumexp, lowest, lambda d: (d, d), lambda d: (float("-inf"), 0.0),
                      fold=fold_logsumexp)
# No integer reads as minus infinity where it is masked, so that a block is told what counts.
LOGSUMEXP_INTEGER = Reduction(None, merge_logsumexp, post_logsumexp, _zero, lambda d: (d, d), lambda d: (float("-inf"), 0.0),
                              block=block_logsumexp)


def _moments(post: Any) -> Reduction:
    return Reduction(None, merge_moments, post, _zero, lambda d: (d,) * 4, lambda d: (0.0,) * 4, block=block_moments)


VAR, STD, VAR_MEAN, STD_MEAN = map(_moments, (post_var, post_std, post_var_mean, post_std_mean))


# A masked element must count neither for the minimum nor for the maximum, which no single value does: the input is
# read twice, masked elements once as either. The second read hits the cache.
AMINMAX = Reduction(lane_pair, merge_min_max, post_state, (highest, lowest), lambda d: (d, d), lambda d: (highest(d), lowest(d)))
EQUAL = Reduction(lane_equal, merge_and, post_state, _zero, _flag, lambda d: (1,))
CLOSE = Reduction(lane_close, merge_and, post_state, _zero, _flag, lambda d: (1,))
CLOSE_NAN = Reduction(lane_close_nan, merge_and, post_state, _zero, _flag, lambda d: (1,))


def accumulator(d: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``d`` are kept."""
    return opmath(d) if d.is_floating_point else torch.int64


def comparable(d: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``d`` are compared."""
    if d.is_floating_point:
        return opmath(d)
    return torch.int64 if d == torch.int64 else torch.int32


def _source(call: Call, common: torch.dtype, compute: torch.dtype, index: int = 0) -> Source:
    return Source(Arg(index), call.args[index], common, compute)


def _dims(call: Call) -> tuple[tuple[int, ...], bool]:
    """The reduced dimensions, and keepdim, of a call whose op calls them so."""
    return canonical_dims(call.get("dim"), call.args[0].ndim), bool(call.get("keepdim", False))


def _written(call: Call, *allowed: torch.dtype) -> None:
    """Decline what PyTorch does not accept as ``out=``."""
    if call.outs is not None and any(o.dtype not in allowed for o in call.outs):
        raise Decline(f"PyTorch rejects it: out= must be one of {', '.join(map(dtype_name, allowed))}")


def _no_identity(call: Call, dims: Sequence[int]) -> None:
    meta = call.args[0]
    if any(meta.shape[d] == 0 for d in dims):
        raise Decline("PyTorch rejects it: a reduced dimension is empty and the op has no identity")


_NUMBERS = dtype(*ALL)
_FLOATS = dtype(*FLOAT)


def _sum_dtype(call: Call) -> torch.dtype:
    """The result's dtype: ``dtype=``, else that of ``out=``, else PyTorch's (int64 for integers)."""
    given = call.get("dtype")
    if given is None and call.outs is not None:
        given = call.outs[0].dtype
    own = call.args[0].dtype
    result = given if given is not None else own if own.is_floating_point else torch.int64
    if result == torch.bool or result not in TRITON:
        raise Decline(f"a result of {dtype_name(result)} is not handled")
    if call.outs is not None:
        _written(call, result)
    return result


@planned(["aten.sum.default", "aten.sum.dim_IntList"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="sum", writes_out=True)
def _sum(call: Call) -> Plan:
    result = _sum_dtype(call)
    dims, keepdim = _dims(call)
    return reduce_plan(call, SUM, [_source(call, result, accumulator(result))], dims, keepdim, [result])


@planned(["aten.nansum.default"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="nansum", writes_out=True)
def _nansum(call: Call) -> Plan:
    result = _sum_dtype(call)
    if call.args[0].dtype.is_floating_point and not result.is_floating_point:
        raise Decline("NaN has no integer value to be left out by")
    dims, keepdim = _dims(call)
    how = NANSUM if result.is_floating_point else SUM
    return reduce_plan(call, how, [_source(call, result, accumulator(result))], dims, keepdim, [result])


@planned(["aten.mean.default", "aten.mean.dim"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="mean", writes_out=True)
def _mean(call: Call) -> Plan:
    given = call.get("dtype")
    if given is None:
        given = call.args[0].dtype
    if given not in FLOAT:
        raise Decline("PyTorch rejects it: the mean of integers has no dtype")
    result = given
    if call.outs is not None:
        _written(call, *FLOAT)
    dims, keepdim = _dims(call)
    return reduce_plan(call, MEAN, [_source(call, result, accumulator(result))], dims, keepdim, [result])


@planned(["aten.prod.default", "aten.prod.dim_int"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="prod", writes_out=True)
def _prod(call: Call) -> Plan:
    result = _sum_dtype(call)
    dims, keepdim = _dims(call)
    return reduce_plan(call, PROD, [_source(call, result, accumulator(result))], dims, keepdim, [result])


@planned(["aten.trace.default"], dtype(*FLOAT, *INT), family="reduction", kernel=reduce_kernel, name="trace")
def _trace(call: Call) -> Plan:
    meta = call.args[0]
    if meta.ndim != 2:
        raise Decline("PyTorch rejects it: not a matrix")
    result = meta.dtype if meta.dtype.is_floating_point else torch.int64
    diagonal = TensorMeta(meta.dtype, (min(meta.shape),), (sum(meta.stride),), meta.device)
    plan = reduce_plan(call, SUM, [Source(Arg(0), diagonal, result, accumulator(result))], (0,), False, [result])
    return plan._replace(metas={Arg(0): meta})


def _extreme(call: Call, how: Reduction) -> Plan:
    d = call.args[0].dtype
    dims, keepdim = _dims(call)
    _no_identity(call, dims)
    _written(call, d)
    return reduce_plan(call, how, [_source(call, d, comparable(d))], dims, keepdim, [d])


@planned(["aten.amax.default", "aten.max.default"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="amax", writes_out=True)
def _amax(call: Call) -> Plan:
    return _extreme(call, AMAX)


@planned(["aten.amin.default", "aten.min.default"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="amin", writes_out=True)
def _amin(call: Call) -> Plan:
    return _extreme(call, AMIN)


def _extreme_at(call: Call, how: Reduction) -> Plan:
    d = call.args[0].dtype
    dims, keepdim = _dims(call)
    _no_identity(call, dims)
    if call.outs is not None and [o.dtype for o in call.outs] != [d, torch.int64]:
        raise Decline("PyTorch rejects it: out= must be of the input's dtype and int64")
    return reduce_plan(call, how, [_source(call, d, comparable(d))], dims, keepdim, [d, torch.int64])


@planned(["aten.max.dim"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="max_dim", writes_out=True)
def _max_dim(call: Call) -> Plan:
    return _extreme_at(call, MAX_DIM)


@planned(["aten.min.dim"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="min_dim", writes_out=True)
def _min_dim(call: Call) -> Plan:
    return _extreme_at(call, MIN_DIM)


def _index_of(call: Call, how: Reduction) -> Plan:
    d = call.args[0].dtype
    dims, keepdim = _dims(call)
    _no_identity(call, dims)
    _written(call, torch.int64)
    return reduce_plan(call, how, [_source(call, d, comparable(d))], dims, keepdim, [torch.int64])


@planned(["aten.argmax.default"], dtype(*FLOAT, *INT), family="reduction", kernel=reduce_kernel, name="argmax", writes_out=True)
def _argmax(call: Call) -> Plan:
    return _index_of(call, ARGMAX)


@planned(["aten.argmin.default"], dtype(*FLOAT, *INT), family="reduction", kernel=reduce_kernel, name="argmin", writes_out=True)
def _argmin(call: Call) -> Plan:
    return _index_of(call, ARGMIN)


@planned(["aten.aminmax.default", "aten._aminmax.default", "aten._aminmax.dim"], _NUMBERS, family="reduction", kernel=reduce_kernel,
         name="aminmax", writes_out=True)
def _aminmax(call: Call) -> Plan:
    d = call.args[0].dtype
    dims, keepdim = _dims(call)
    _no_identity(call, dims)
    _written(call, d)
    return reduce_plan(call, AMINMAX, [_source(call, d, comparable(d))] * 2, dims, keepdim, [d, d])


def _truth(call: Call, how: Reduction) -> Plan:
    meta = call.args[0]
    result = torch.uint8 if meta.dtype == torch.uint8 else torch.bool
    _written(call, torch.bool, torch.uint8)
    given = call.get("dim")
    if given is not None and given.__class__ is not int and len(given) == 0:
        # The one op whose empty list of dimensions reduces nothing; its result then keeps the input's layout.
        if not meta.is_contiguous:
            raise Decline("an empty list of dimensions of a tensor that is not contiguous")
        dims, keepdim = (), False
    else:
        dims, keepdim = _dims(call)
    compute = comparable(meta.dtype)
    return reduce_plan(call, how, [_source(call, meta.dtype, compute)], dims, keepdim, [result])


@planned(["aten.all.default", "aten.all.dim", "aten.all.dims"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="all",
         writes_out=True)
def _all(call: Call) -> Plan:
    return _truth(call, ALL_NONZERO)


@planned(["aten.any.default", "aten.any.dim", "aten.any.dims"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="any",
         writes_out=True)
def _any(call: Call) -> Plan:
    return _truth(call, ANY_NONZERO)


@planned(["aten._is_all_true.default"], dtype(torch.bool), family="reduction", kernel=reduce_kernel, name="is_all_true")
def _is_all_true(call: Call) -> Plan:
    return _truth(call, ALL_NONZERO)


@planned(["aten._is_any_true.default"], dtype(torch.bool), family="reduction", kernel=reduce_kernel, name="is_any_true")
def _is_any_true(call: Call) -> Plan:
    return _truth(call, ANY_NONZERO)


@planned(["aten.count_nonzero.default", "aten.count_nonzero.dim_IntList"], _NUMBERS, family="reduction", kernel=reduce_kernel,
         name="count_nonzero", writes_out=True)
def _count_nonzero(call: Call) -> Plan:
    d = call.args[0].dtype
    _written(call, torch.int64)
    dims, _ = _dims(call)
    return reduce_plan(call, COUNT, [_source(call, d, comparable(d))], dims, False, [torch.int64])


def _deviation(call: Call, how: Reduction, results: int) -> Plan:
    meta = call.args[0]
    dims, keepdim = _dims(call)
    n = math.prod(meta.shape[d] for d in dims)
    position, given = next((i, a) for i, (p, a) in enumerate(zip(parameters(call.op), call.args)) if p.name == "correction")
    correction = 1 if given is None else given
    if n - correction <= 0:
        raise Decline("no degrees of freedom are left, which PyTorch warns of")
    if call.outs is not None:
        _written(call, meta.dtype)
    # A whole number is exact as float32; any other is passed with all its digits.
    param: Any = float(correction) if float(correction).is_integer() else Num(position, "fp64")
    return reduce_plan(call, how, [_source(call, meta.dtype, opmath(meta.dtype))], dims, keepdim, [meta.dtype] * results, (param,), flops=4)


@planned(["aten.var.correction"], _FLOATS, family="reduction", kernel=reduce_kernel, name="var", by_value=["correction"], writes_out=True)
def _var(call: Call) -> Plan:
    return _deviation(call, VAR, 1)


@planned(["aten.std.correction"], _FLOATS, family="reduction", kernel=reduce_kernel, name="std", by_value=["correction"], writes_out=True)
def _std(call: Call) -> Plan:
    return _deviation(call, STD, 1)


@planned(["aten.var_mean.correction"], _FLOATS, family="reduction", kernel=reduce_kernel, name="var_mean", by_value=["correction"],
         writes_out=True)
def _var_mean(call: Call) -> Plan:
    return _deviation(call, VAR_MEAN, 2)


@planned(["aten.std_mean.correction"], _FLOATS, family="reduction", kernel=reduce_kernel, name="std_mean", by_value=["correction"],
         writes_out=True)
def _std_mean(call: Call) -> Plan:
    return _deviation(call, STD_MEAN, 2)


@planned(["aten.logsumexp.default"], _NUMBERS, family="reduction", kernel=reduce_kernel, name="logsumexp", state=[torch.get_default_dtype],
         writes_out=True)
def _logsumexp(call: Call) -> Plan:
    d = call.args[0].dtype
    result = d if d.is_floating_point else torch.get_default_dtype()
    if call.outs is not None:
        _written(call, result)
    dims, keepdim = _dims(call)
    how = LOGSUMEXP if d.is_floating_point else LOGSUMEXP_INTEGER
    return reduce_plan(call, how, [_source(call, result, opmath(result))], dims, keepdim, [result], flops=3)


# -- norms -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _norm_of(p: float, lanes: tuple[Any, ...]) -> tuple[Reduction, bool]:
    """The reduction for the norm of order ``p``, and whether it takes p as a parameter.

    ``lanes``: the lane functions for orders 0, 1 (and infinities), 2, and any other.
    """
    zero, one, two, general = lanes
    if p == math.inf:
        return Reduction(one, merge_max, post_state, _zero, _one, lambda d: (0.0,)), False
    if p == -math.inf:
        return Reduction(one, merge_min, post_state, _NOTHING, _one, lambda d: (math.inf,)), False
    if p == 0:
        return Reduction(zero, merge_sum, post_state, _zero, _one, lambda d: (0.0,)), False
    if p == 1:
        return Reduction(one, merge_sum, post_state, _zero, _one, lambda d: (0.0,)), False
    if p == 2:
        return Reduction(two, merge_sum, post_root_2, _zero, _one, lambda d: (0.0,)), False
    return Reduction(general, merge_sum, post_root_p, _zero if p > 0 else _NOTHING, _one, lambda d: (0.0,)), True


# Masked elements of a norm of negative order read as infinity; of two inputs one must be finite for the difference to be.
_NOTHING = (highest, _zero)
_VECTOR_LANES = (lane_norm_0, lane_norm_1, lane_norm_2, lane_norm_p)
_DIST_LANES = (lane_dist_0, lane_dist_1, lane_dist_2, lane_dist_p)


def _norm_plan(call: Call, sources: Sequence[Source], p: Any, position: int, lanes: Sequence[Any], dims: tuple[int, ...],
               keepdim: bool, result: torch.dtype) -> Plan:
    if p.__class__ not in (int, float, bool) or math.isnan(p):
        raise Decline(f"a norm of order {p}")
    p = float(p)
    how, takes_p = _norm_of(p, lanes)
    if p < 0 or p == math.inf:
        shape = sources[0].meta.shape
        if any(shape[d] == 0 for d in dims):
            raise Decline("PyTorch rejects it: a reduced dimension is empty and the norm has no identity")
    params = ((Num(position, "fp64" if result == torch.float64 else "fp32"),) if takes_p else ())
    return reduce_plan(call, how, sources, dims, keepdim, [result], params, flops=2)


def _norm_dtype(call: Call) -> torch.dtype:
    d = call.args[0].dtype
    given = call.get("dtype")
    if given is not None and (given not in FLOAT or torch.promote_types(d, given) != given):
        raise Decline("PyTorch rejects it: dtype= would narrow the input")
    result = d if given is None else given
    if call.outs is not None:
        _written(call, result)
    return result


@planned(["aten.linalg_vector_norm.default"], _FLOATS, family="reduction", kernel=reduce_kernel, name="vector_norm", by_value=["ord"],
         writes_out=True)
def _vector_norm(call: Call) -> Plan:
    result = _norm_dtype(call)
    dims, keepdim = _dims(call)
    return _norm_plan(call, [_source(call, result, opmath(result))], call["ord"], 1, _VECTOR_LANES, dims, keepdim, result)


@planned(["aten.norm.Scalar", "aten.norm.ScalarOpt_dim", "aten.norm.ScalarOpt_dtype", "aten.norm.ScalarOpt_dim_dtype"], _FLOATS,
         family="reduction", kernel=reduce_kernel, name="norm", by_value=["p"], writes_out=True)
def _norm(call: Call) -> Plan:
    result = _norm_dtype(call)
    dims, keepdim = _dims(call)
    p = call["p"]
    return _norm_plan(call, [_source(call, result, opmath(result))], 2 if p is None else p, 1, _VECTOR_LANES, dims, keepdim, result)


def _pair(call: Call, common: torch.dtype, compute: torch.dtype) -> list[Source]:
    """The first two arguments as inputs of one shape, broadcast to each other."""
    a, b = call.args[:2]
    shape = broadcast_shape([a.shape, b.shape])
    return [Source(Arg(i), m._replace(shape=shape, stride=broadcast_strides(m, shape)), common, compute) for i, m in enumerate((a, b))]


@planned(["aten.dist.default"], _FLOATS, family="reduction", kernel=reduce_kernel, name="dist", by_value=["p"], writes_out=True)
def _dist(call: Call) -> Plan:
    a, b = call.args[:2]
    if a.dtype != b.dtype:
        raise Decline("different dtypes")
    if call.outs is not None:
        _written(call, a.dtype)
    sources = _pair(call, a.dtype, opmath(a.dtype))
    return _norm_plan(call, sources, call["p"], 2, _DIST_LANES, tuple(range(sources[0].meta.ndim)), False, a.dtype)._replace(
        metas={Arg(0): a, Arg(1): b})


# -- comparisons -------------------------------------------------------------------------------------------------------
#
# `equal` and `allclose` answer with a Python bool, so they run their plan and read its result.


@functools.lru_cache(maxsize=256)
def _comparison(op: str, how: Reduction, metas: tuple[TensorMeta, TensorMeta], compute: torch.dtype, numbers: int) -> Callable[..., Any]:
    overload = find_op(op)
    target = current()
    call = Call(overload, (*metas, *(0.0,) * numbers), target)
    sources = [s._replace(common=m.dtype) for s, m in zip(_pair(call, compute, compute), metas)]
    plan = reduce_plan(call, how, sources, tuple(range(sources[0].meta.ndim)), False, [torch.bool],
                       tuple([Num(2 + i, "fp64" if compute == torch.float64 else "fp32") for i in range(numbers)]))
    plan = plan._replace(metas={Arg(0): metas[0], Arg(1): metas[1]})
    return bind(plan, target, 2 + numbers, _never, metas[0].device.index or 0)


def _never(*args: Any) -> Any:
    raise AssertionError("a comparison writes nothing that could overlap")


def _same(what: str, get: Callable[[TensorMeta], Any]) -> Predicate:
    return where(f"self and other have the same {what}", lambda call: get(call.args[0]) == get(call.args[1]))


_same_dtype = _same("dtype", lambda m: m.dtype)
_same_shape = _same("shape", lambda m: m.shape)


@rule("aten.equal.default", [_NUMBERS, _same_dtype, _same_shape], name="equal", family="reduction", priority=-100)
def equal(self: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, element by element."""
    metas = TensorMeta.of(self), TensorMeta.of(other)
    compute = comparable(self.dtype)
    return bool(_comparison("aten.equal.default", EQUAL, metas, compute, 0)(self, other).item())


def _tolerable(call: Call) -> bool:
    return call["rtol"] >= 0 and call["atol"] >= 0


def _close_dtype(d: torch.dtype) -> torch.dtype:
    return opmath(d) if d.is_floating_point else torch.float64


@rule("aten.allclose.default", [_FLOATS, _same_dtype], name="allclose", family="reduction", priority=-100)
def allclose(self: torch.Tensor, other: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """Whether |self - other| <= atol + rtol |other| everywhere."""
    if rtol < 0 or atol < 0:
        return torch.ops.aten.allclose.default(self, other, rtol, atol, equal_nan)  # raises PyTorch's own error
    metas = TensorMeta.of(self), TensorMeta.of(other)
    run = _comparison("aten.allclose.default", CLOSE_NAN if equal_nan else CLOSE, metas, _close_dtype(self.dtype), 2)
    return bool(run(self, other, rtol, atol).item())


@triton.jit
def isclose(self, other, rtol, atol):
    return close(self, other, rtol, atol)


@triton.jit
def isclose_nan(self, other, rtol, atol):
    return close(self, other, rtol, atol) | ((self != self) & (other != other))


def _check_isclose(call: Call, common: torch.dtype) -> None:
    if call.args[0].dtype != call.args[1].dtype:
        raise Decline("PyTorch rejects it: different dtypes")
    if not _tolerable(call):
        raise Decline("PyTorch rejects it: negative tolerance")


declare_pointwise("aten.isclose.default", kind=ALWAYS_BOOL, dtypes=FLOAT, promote=("self", "other"), by_value=("rtol", "atol"),
                  select=lambda call: isclose_nan if call["equal_nan"] else isclose, check=_check_isclose, flops=6)(isclose)
