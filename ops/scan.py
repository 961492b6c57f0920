"""Scans along one dimension: cumulative sums, products, extremes with their index, and log-sum-exps.

::

    out[k, r] = post(merge over r' <= r of lane(in[k, r']))

in the terms of :mod:`gemsmode.ops.reduction`, whose states these are. A program scans a tile of neighbouring rows and
carries their last state to the next tile. Where there are too few programs to fill the device, rows are cut into
chunks: a first launch reduces each chunk to one state, and in the second every program merges the states before its
chunk and starts from there. Where a state is one float32, a single launch does both: programs publish the states of
their chunks and wait for those before. Either way states are merged in their order, so results repeat exactly.

NaN, ties (the last index wins) and dtypes as measured against PyTorch's results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.pointwise import power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, TRITON, opmath
from gemsmode.ops.reduction import (
    INTERPRETED,
    Reduction,
    _halves,
    _shift,
    _store_all,
    accumulator,
    canonical_dims,
    comparable,
    highest,
    lane_indexed,
    lane_value,
    lowest,
    merge_dims,
    merge_logsumexp,
    merge_prod,
    merge_sum,
    offset_of,
    post_logsumexp,
    post_state,
    reduce_kernel,
    tree,
)
from gemsmode.plan import Alloc, Arg, Decline, Into, Launch, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- states ------------------------------------------------------------------------------------------------------------
#
# `scan(*a, *b)` merges two states of which b comes later; the reduction's `merge` finds the order from the indices.


@triton.jit
def scan_max(a, i, b, j):
    """The last NaN, else the last greatest."""
    take = (b >= a) | (b != b)
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def merge_last_max(a, i, b, j):
    greater = ((b > a) | (b != b)) & (a == a)
    same = (a == b) | ((a != a) & (b != b))
    take = greater | (same & (j > i))
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def scan_min(a, i, b, j):
    take = (b <= a) | (b != b)
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def merge_last_min(a, i, b, j):
    less = ((b < a) | (b != b)) & (a == a)
    same = (a == b) | ((a != a) & (b != b))
    take = less | (same & (j > i))
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def lane_logsumexp(x, r, params):
    return x, tl.exp(x - _shift(x))


# -- kernel ------------------------------------------------------------------------------------------------------------


@tl.core.builtin
def scan_with(state: Any, axis: Any, merge: Any, _semantic: Any = None, _generator: Any = None) -> Any:
    """``tl.associative_scan`` of a tuple by a function that is a kernel's parameter, which it does not unwrap itself."""
    result = tl.associative_scan(state, axis, getattr(merge, "value", merge), _semantic=_semantic, _generator=_generator)
    return tl.tuple(list(result))


@triton.jit
def _scan_halves(state, carry, MERGE: tl.constexpr):
    """The scan of [A, B] blocks along their last axis, after the state `carry` [A, 1] (for the interpreter).

    States are merged in pairs up a tree, and what precedes each node goes down again.
    """
    evens = []
    while state[0].shape[1] > 1:
        even, odd = _halves(state)
        evens.append(even)
        state = MERGE(*even, *odd)
    before = carry
    for even in evens[::-1]:
        after = MERGE(*before, *even)
        wider = ()
        for b, a in zip(before, after):
            wider = (*wider, tl.reshape(tl.join(b, a), [b.shape[0], 2 * b.shape[1]]))
        before = wider
    return before


@triton.jit
def scan_tile(state, carry, MERGE: tl.constexpr, AXIS: tl.constexpr):
    """The inclusive scan of a tile along AXIS, after the states `carry` (of the tile's shape less AXIS)."""
    if INTERPRETED:
        if AXIS == 0:
            flipped = ()
            for s in state:
                flipped = (*flipped, tl.trans(s))
        else:
            flipped = state
        start = ()
        for c in carry:
            start = (*start, tl.expand_dims(c, 1))
        before = _scan_halves(flipped, start, MERGE)
        if AXIS == 0:
            flipped = ()
            for b in before:
                flipped = (*flipped, tl.trans(b))
            before = flipped
        return MERGE(*before, *state)
    else:
        scanned = scan_with(state, AXIS, MERGE)
        if len(state) == 1:
            return MERGE(tl.expand_dims(carry[0], AXIS), scanned[0])
        else:
            return MERGE(tl.expand_dims(carry[0], AXIS), tl.expand_dims(carry[1], AXIS), scanned[0], scanned[1])


@triton.jit
def _pick(values, where, AXIS: tl.constexpr):
    """The one value along AXIS that `where` marks."""
    return tl.sum(tl.where(where, values, 0).to(values.dtype), AXIS).to(values.dtype)


@triton.jit
def scan_kernel(outs, p_in, totals, nk, n, steps, splits, k_sizes, in_steps, out_steps, in_stride, out_stride, params,
                LANE: tl.constexpr, SCAN: tl.constexpr, MERGE: tl.constexpr, POST: tl.constexpr, OTHER: tl.constexpr,
                HOW: tl.constexpr, IDENTITY: tl.constexpr, STATES: tl.constexpr, INNER: tl.constexpr, LOOP: tl.constexpr,
                SPLIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Scan [nk, n] along n. Grid: blocks of k, then chunks of `steps` tiles, whose totals [splits, nk] are
    given (SPLIT).

    INNER tiles are [BLOCK_K, BLOCK_N], outer ones [BLOCK_N, BLOCK_K].
    """
    i_k = tl.program_id(0)
    # The last chunks first: the launch that made the totals has just read them.
    i_s = splits - 1 - tl.program_id(1)
    if WIDE:
        i_k = i_k.to(tl.int64)
        i_s = i_s.to(tl.int64)
    k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_N)
    if WIDE:
        lane = lane.to(tl.int64)
    if INNER:
        AXIS: tl.constexpr = 1
        k_tile = k[:, None]
        r_tile = lane[None, :]
    else:
        AXIS: tl.constexpr = 0
        k_tile = k[None, :]
        r_tile = lane[:, None]
    m_k = k_tile < nk
    p_row = p_in + offset_of(k_tile, k_sizes, in_steps)
    o_row = offset_of(k_tile, k_sizes, out_steps)
    if SPLIT:
        s = tl.arange(0, BLOCK_S)[:, None]
        m_s = (s < i_s) & (k < nk)[None, :]  # [BLOCK_S, BLOCK_K]
        o_s = s * nk + k[None, :]
        b0 = tl.load(totals[0] + o_s, mask=m_s, other=IDENTITY[0])
        if len(STATES) == 1:
            carry = tree((b0,), MERGE, 0)
        else:
            b1 = tl.load(totals[1] + o_s, mask=m_s, other=IDENTITY[1])
            carry = tree((b0, b1), MERGE, 0)
    else:
        c0 = tl.full([BLOCK_K], IDENTITY[0], STATES[0])
        if len(STATES) == 1:
            carry = (c0,)
        else:
            carry = (c0, tl.full([BLOCK_K], IDENTITY[1], STATES[1]))
    first = i_s * steps
    if LOOP:
        last = tl.minimum(first + steps, tl.cdiv(n, BLOCK_N))
        r = first * BLOCK_N + r_tile
        ahead = tl.load(p_row + r * in_stride, mask=m_k & (r < n), other=OTHER)
        for step in range(first, last):
            x = ahead.to(HOW[0]).to(HOW[1])
            # The next tile is on its way while this one is scanned.
            r = (step + 1) * BLOCK_N + r_tile
            ahead = tl.load(p_row + r * in_stride, mask=m_k & (r < n) & (step + 1 < last), other=OTHER)
            r = step * BLOCK_N + r_tile
            m = m_k & (r < n)
            state = scan_tile(LANE(x, r, params), carry, SCAN, AXIS)
            _store_all(outs, o_row + r * out_stride, POST(state, n, params), m)
            if len(STATES) == 1:
                carry = (_pick(state[0], r_tile == BLOCK_N - 1, AXIS),)
            else:
                carry = (_pick(state[0], r_tile == BLOCK_N - 1, AXIS), _pick(state[1], r_tile == BLOCK_N - 1, AXIS))
    else:
        r = first * BLOCK_N + r_tile
        m = m_k & (r < n)
        x = tl.load(p_row + r * in_stride, mask=m, other=OTHER).to(HOW[0]).to(HOW[1])
        state = scan_tile(LANE(x, r, params), carry, SCAN, AXIS)
        _store_all(outs, o_row + r * out_stride, POST(state, n, params), m)


@triton.jit
def _packed(total):
    """A word of a float32 in the upper half and 1 in the lower one, so that whoever sees the 1 sees the value."""
    return (total.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 1


@triton.jit
def chained_kernel(p_out, p_in, p_words, n, chunks, k_sizes, in_steps, out_steps, in_stride, out_stride, params, LANE: tl.constexpr,
                   SCAN: tl.constexpr, MERGE: tl.constexpr, POST: tl.constexpr, OTHER: tl.constexpr, HOW: tl.constexpr,
                   IDENTITY: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Scan long rows of a float32 state, read once: a program publishes its chunk's total and waits for those before it.

    `p_words`, zeros at first: a counter, from which programs take their chunks so that all that one waits for have
    begun; then for each group of BLOCK_S - 1 chunks of a row the state before it, which the group before publishes, and
    the totals of its chunks. What a program finds there is merged in this order, whenever it came. Grid: rows * chunks.
    """
    LENGTH: tl.constexpr = BLOCK_S - 1
    ticket = tl.atomic_add(p_words, 1, sem="relaxed")
    i_k = ticket // chunks
    i_s = ticket - i_k * chunks
    if not WIDE:
        i_k = i_k.to(tl.int32)
        i_s = i_s.to(tl.int32)
    r = i_s * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m = r < n
    x = tl.load(p_in + offset_of(i_k, k_sizes, in_steps) + r * in_stride, mask=m, other=OTHER).to(HOW[0]).to(HOW[1])  # [1, BLOCK_N]
    state = LANE(x, r, params)
    total = tree(state, MERGE, 1)  # [1]
    i_group = i_s // LENGTH
    place = i_s - i_group * LENGTH
    p_group = p_words + 1 + (i_k * tl.cdiv(chunks, LENGTH) + i_group) * BLOCK_S
    tl.atomic_xchg(p_group + 1 + place, _packed(tl.sum(total[0], 0)), sem="relaxed")
    scanned = scan_tile(state, (tl.full([1], IDENTITY[0], HOW[1]),), SCAN, 1)  # while the totals before this one arrive
    o_word = tl.arange(0, BLOCK_S)[:, None]
    m_word = (o_word <= place) & ((o_word > 0) | (i_group > 0))
    words = tl.load(p_group + o_word, mask=m_word, other=1, volatile=True)
    while tl.sum(tl.sum(1 - (words & 1).to(tl.int32), 1), 0) > 0:
        words = tl.load(p_group + o_word, mask=m_word, other=1, volatile=True)
    before = tl.where(m_word, (words >> 32).to(tl.int32).to(HOW[1], bitcast=True), IDENTITY[0]).to(HOW[1])
    carry = tree((before,), MERGE, 0)
    if (place == LENGTH - 1) & (i_s + 1 < chunks):
        tl.atomic_xchg(p_group + BLOCK_S, _packed(tl.sum(MERGE(carry[0], total[0])[0], 0)), sem="relaxed")
    result = MERGE(tl.expand_dims(carry[0], 1), scanned[0])
    tl.store(p_out + offset_of(i_k, k_sizes, out_steps) + r * out_stride, POST(result, n, params)[0].to(p_out.dtype.element_ty), mask=m)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How a scan of [nk, n] is shared out: tile, chunks of a row, and warps a program."""

    block_k: int
    block_n: int
    splits: int = 1
    warps: int = 4


_INTERPRETED_TILE = 1 << 15
_LONGEST_ROW = 8192  # elements scanned at once
_LONGEST_TILE = 4096  # elements of a tile in a loop
_MOST_TOTALS = 4096  # chunk totals that a program merges at once
_WARPS = ((1024, 2), (2048, 4), (1 << 30, 8))  # (elements of a tile at most, warps)


@dataclass(frozen=True)
class Chain:
    """How a long row is shared out among programs that wait for each other: elements and warps of each, chunks of a group + 1."""

    block_n: int
    warps: int
    block_s: int


# 16 KB and 32 elements a thread, so that several programs share a multiprocessor: some wait while others load.
CHAIN = Chain(4096, 4, 512)


def choose(nk: int, n: int, inner: bool, itemsize: int, states: int, target: Target) -> Schedule:
    """The schedule for ``nk`` rows of ``n`` elements of ``itemsize`` bytes, with ``states`` blocks of state."""
    if target.interpreted:
        block_n = min(power_of_2(n), _INTERPRETED_TILE)
        block_k = min(power_of_2(nk), _INTERPRETED_TILE // block_n)
        return Schedule(block_k, block_n, min(-(-n // block_n), 4) if nk == 1 else 1)
    busy = 2 * target.multiprocessors
    if inner:
        longest = _LONGEST_ROW // states // (2 if itemsize == 8 else 1)
        block_n = power_of_2(n) if n <= longest else _LONGEST_TILE // states
        block_k = max(min(_LONGEST_TILE // 2 // block_n, power_of_2(nk)), 1)
        while block_k > 1 and -(-nk // block_k) < busy:
            block_k //= 2
    else:
        # 256 bytes of a row, as 16-byte loads; the scan itself crosses warps.
        block_k = min(power_of_2(nk), max(256 // itemsize, 32))
        block_n = min(_LONGEST_TILE // 2 // states // block_k, power_of_2(n))
    warps = next(w for limit, w in _WARPS if block_k * block_n <= limit)
    programs, steps = -(-nk // block_k), -(-n // block_n)
    splits = 1
    if programs < busy and steps >= 8:
        splits = max(min(steps, target.multiprocessors * (32 // warps) // programs, _MOST_TOTALS // block_k), 1)
    return Schedule(block_k, block_n, splits, warps)


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What the engine needs to know of one scan.

    Attributes:
        reduction: its states, and the reduction that makes a chunk's total.
        lane: from a loaded block to a state.
        scan: merges two states of which the second comes later.
        post: from a state to results.
        identity: values of an empty state, given the dtype computed in.
    """

    reduction: Reduction
    lane: Any
    scan: Any
    post: Any
    identity: Callable[[torch.dtype], tuple[Any, ...]]


def scan_plan(call: Call, how: Scan, dim: int, common: torch.dtype, compute: torch.dtype, results: tuple[torch.dtype, ...],
              into: tuple[tuple[Any, TensorMeta], ...] = (), flops: int = 1) -> Plan:
    """The plan of one scan of the op's first argument along ``dim``.

    Args:
        common: the dtype that elements are converted to.
        compute: the dtype that states are kept in.
        results: a dtype for each result; results are contiguous, as PyTorch's are.
        into: what to write to instead of new results: a reference and its metadata for each.
        flops: operations an element, for reports.
    """
    meta, target = call.args[0], call.target
    if meta.dtype not in TRITON:
        raise Decline(f"{dtype_name(meta.dtype)} is not handled by scans")
    wrapped = canonical_dims(dim, meta.ndim)
    shape, stride = meta.shape or (1,), meta.stride or (1,)
    axis = wrapped[0] if wrapped else 0
    allocs: list[Alloc] = []
    if into:
        outs: tuple[Any, ...] = tuple([ref for ref, _ in into])
        out_stride = into[0][1].stride or (1,)
        if any((m.stride or (1,)) != out_stride or (m.shape or (1,)) != shape for _, m in into):
            raise Decline("the tensors to be written have different layouts")
    else:
        allocs = [Alloc(meta.shape, contiguous_strides(meta.shape), d) for d in results]
        outs = tuple([Out(i) for i in range(len(allocs))])
        out_stride = contiguous_strides(shape)
    returns = outs[0] if len(outs) == 1 else outs
    metas = {Arg(0): meta}
    moved = meta.numel * (meta.dtype.itemsize + sum(d.itemsize for d in results))
    if meta.numel == 0:
        return Plan(tuple(allocs), (), returns, metas, elementwise=True, bytes=moved)
    n = shape[axis]
    kept = merge_dims([(size, (stride[d], out_stride[d])) for d, size in enumerate(shape) if d != axis], False)
    nk = kept.count
    in_steps, out_steps = kept.strides if kept.strides else ((), ())
    inner = nk == 1 or stride[axis] < min((s for s in in_steps if s), default=1 << 62)
    wide = meta.numel >= 2**31 - 2**17 or meta.extent >= 2**31 or any(m.extent >= 2**31 for _, m in into)
    index = torch.int64 if wide else torch.int32
    state_dtypes = [index if d == "index" else d for d in how.reduction.states(compute)]
    schedule = choose(nk, n, inner, meta.dtype.itemsize, len(state_dtypes), target)
    steps = -(-n // schedule.block_n)
    each = -(-steps // min(schedule.splits, steps))
    splits = -(-steps // each)
    k_sizes = tuple([Size(s) for s in kept.sizes[:-1]])
    function = how.reduction.other
    assert not isinstance(function, tuple)
    other, loaded = function(meta.dtype), (TRITON[common], TRITON[compute])
    grid_k = -(-nk // schedule.block_k)
    if splits > 1 and inner and schedule.block_k == 1 and state_dtypes == [torch.float32] and target.backend != "hip":
        chain = Chain(schedule.block_n, 4, 4) if target.interpreted else CHAIN
        chunks = -(-n // chain.block_n)
        words = -(-chunks // (chain.block_s - 1)) * chain.block_s
        allocs.append(Alloc((1 + nk * words,), (1,), torch.int64, zero=True))
        launches = [Launch(
            chained_kernel, (nk * chunks, 1, 1),
            (*outs, Arg(0), Out(len(allocs) - 1), n, Size(chunks), k_sizes, in_steps, out_steps, stride[axis], out_stride[axis], ()),
            (("LANE", how.lane), ("SCAN", how.scan), ("MERGE", how.reduction.merge), ("POST", how.post), ("OTHER", other), ("HOW", loaded),
             ("IDENTITY", how.identity(compute)), ("WIDE", wide), ("BLOCK_N", chain.block_n), ("BLOCK_S", chain.block_s)), chain.warps)]
        return Plan(tuple(allocs), tuple(launches), returns, metas, elementwise=True, bytes=moved, flops=meta.numel * flops)
    launches = []
    totals: tuple[Any, ...] = ()
    if splits > 1:
        totals = tuple([Out(len(allocs) + i) for i in range(len(state_dtypes))])
        allocs += [Alloc((splits, nk), (nk, 1), d) for d in state_dtypes]
        launches.append(Launch(
            reduce_kernel, (grid_k, splits, 1),
            (totals, (Arg(0),), nk, n, Size(n), Size(steps), Size(each), k_sizes, (), (), (in_steps,), ((stride[axis],),), ()),
            (("LANE", how.lane), ("FOLD", how.scan), ("MERGE", how.reduction.merge), ("BLOCK", None), ("POST", how.post),
             ("OTHER", (other,)), ("HOW", (loaded,)), ("INNER", inner), ("STEPPED", False), ("LOOP", each > 1), ("SPLIT", True),
             ("WIDE", wide), ("EVICT", ""), ("BLOCK_K", schedule.block_k), ("BLOCK_R", schedule.block_n), ("GROUP", 1)), schedule.warps))
    launches.append(Launch(
        scan_kernel, (grid_k, splits, 1),
        (outs, Arg(0), totals, nk, n, Size(each), Size(splits), k_sizes, in_steps, out_steps, stride[axis],
         out_stride[axis], ()),
        (("LANE", how.lane), ("SCAN", how.scan), ("MERGE", how.reduction.merge), ("POST", how.post), ("OTHER", other), ("HOW", loaded),
         ("IDENTITY", how.identity(compute)), ("STATES", tuple([TRITON[d] for d in state_dtypes])), ("INNER", inner),
         ("LOOP", each > 1), ("SPLIT", splits > 1), ("WIDE", wide), ("BLOCK_K", schedule.block_k), ("BLOCK_N", schedule.block_n),
         ("BLOCK_S", power_of_2(splits))), schedule.warps))
    # Every element is read before the same program writes there, so that the result may be the input.
    return Plan(tuple(allocs), tuple(launches), returns, metas, elementwise=True, bytes=moved, flops=meta.numel * flops)


# -- rules -------------------------------------------------------------------------------------------------------------


def _zero(d: torch.dtype) -> Any:
    return 0.0 if d.is_floating_point else 0


def _unit(d: torch.dtype) -> Any:
    return 1.0 if d.is_floating_point else 1


def _total(merge: Any, other: Callable[[torch.dtype], Any], states: Callable[[torch.dtype], tuple[Any, ...]]) -> Reduction:
    return Reduction(None, merge, None, other, states, lambda d: ())


SUM = Scan(_total(merge_sum, _zero, lambda d: (d,)), lane_value, merge_sum, post_state, lambda d: (_zero(d),))
PROD = Scan(_total(merge_prod, _unit, lambda d: (d,)), lane_value, merge_prod, post_state, lambda d: (_unit(d),))
MAX = Scan(_total(merge_last_max, lowest, lambda d: (d, "index")), lane_indexed, scan_max, post_state, lambda d: (lowest(d), 0))
MIN = Scan(_total(merge_last_min, highest, lambda d: (d, "index")), lane_indexed, scan_min, post_state, lambda d: (highest(d), 0))
LOGSUMEXP = Scan(_total(merge_logsumexp, lowest, lambda d: (d, d)), lane_logsumexp, merge_logsumexp, post_logsumexp,
                 lambda d: (-math.inf, 0.0))

_NUMBERS = dtype(*ALL)


def _given_outs(call: Call) -> tuple[tuple[Any, TensorMeta], ...]:
    return tuple([(Into(i), m) for i, m in enumerate(call.outs or ())])


def _accumulate(call: Call, how: Scan) -> Plan:
    given = call["dtype"]
    if given is None and call.outs is not None:
        given = call.outs[0].dtype
    if given is None:
        given = call.args[0].dtype if call.args[0].dtype.is_floating_point else torch.int64
    if given == torch.bool or given not in TRITON:
        raise Decline(f"a result of {dtype_name(given)} is not handled")
    if call.outs is not None and call.outs[0].dtype != given:
        raise Decline("PyTorch rejects it: dtype= and the dtype of out= differ")
    return scan_plan(call, how, call["dim"], given, accumulator(given), (given,), _given_outs(call))


@planned(["aten.cumsum.default"], _NUMBERS, family="scan", kernel=scan_kernel, name="cumsum", writes_out=True)
def _cumsum(call: Call) -> Plan:
    return _accumulate(call, SUM)


@planned(["aten.cumprod.default"], _NUMBERS, family="scan", kernel=scan_kernel, name="cumprod", writes_out=True)
def _cumprod(call: Call) -> Plan:
    return _accumulate(call, PROD)


def _extreme(call: Call, how: Scan, into: tuple[tuple[Any, TensorMeta], ...]) -> Plan:
    d = call.args[0].dtype
    if into and [m.dtype for _, m in into] != [d, torch.int64]:
        raise Decline("PyTorch rejects it: the results are of the input's dtype and int64")
    return scan_plan(call, how, call["dim"], d, comparable(d), (d, torch.int64), into)


@planned(["aten.cummax.default"], _NUMBERS, family="scan", kernel=scan_kernel, name="cummax", writes_out=True)
def _cummax(call: Call) -> Plan:
    return _extreme(call, MAX, _given_outs(call))


@planned(["aten.cummin.default"], _NUMBERS, family="scan", kernel=scan_kernel, name="cummin", writes_out=True)
def _cummin(call: Call) -> Plan:
    return _extreme(call, MIN, _given_outs(call))


def _helper(call: Call, how: Scan) -> Plan:
    """The op underneath cummax and cummin, which writes to tensors that it is given and returns nothing."""
    source, values, indices = call.args[:3]
    if values.shape != source.shape or indices.shape != source.shape:
        raise Decline("the tensors to be written are not of the input's shape")
    plan = _extreme(call, how, ((Arg(1), values), (Arg(2), indices)))
    return plan._replace(returns=None, metas={Arg(0): source, Arg(1): values, Arg(2): indices})


@planned(["aten._cummax_helper.default"], _NUMBERS, family="scan", kernel=scan_kernel, name="cummax_helper")
def _cummax_helper(call: Call) -> Plan:
    return _helper(call, MAX)


@planned(["aten._cummin_helper.default"], _NUMBERS, family="scan", kernel=scan_kernel, name="cummin_helper")
def _cummin_helper(call: Call) -> Plan:
    return _helper(call, MIN)


@planned(["aten.logcumsumexp.default", "aten._logcumsumexp.default"], dtype(*FLOAT), family="scan", kernel=scan_kernel,
         name="logcumsumexp", writes_out=True)
def _logcumsumexp(call: Call) -> Plan:
    d = call.args[0].dtype
    if call.outs is not None and call.outs[0].dtype != d:
        raise Decline("PyTorch rejects it: the dtype of out= is not the input's")
    return scan_plan(call, LOGSUMEXP, call["dim"], d, opmath(d), (d,), _given_outs(call), flops=4)
