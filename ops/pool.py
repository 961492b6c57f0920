"""Pooling: max, average, adaptive and fractional pools over one to three dimensions, their backward, and unpooling.

Average pools are sums over windows (:mod:`gemsmode.ops.window`). Max pools walk the same windows and keep the largest
value and its position in the plane; the first of equals wins, and a NaN wins over everything, the last of several. A
backward gathers: each input asks the windows that cover it whether it was their maximum, so it needs no atomics.

Output sizes: ``floor((size + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1``, or its ceiling (less one if the
last window would start in the padding behind the input). Adaptive pools: window ``o`` is ``floor(o * I / O)`` to
``ceil((o + 1) * I / O)``. Source: the PyTorch documentation of ``max_pool2d``, ``avg_pool2d``, ``adaptive_avg_pool2d``,
``FractionalMaxPool2d`` and ``max_unpool2d``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.pointwise import convert
from gemsmode.ops.promotion import FLOAT
from gemsmode.ops.window import (
    UNROLLED,
    Dim,
    base,
    choose_tile,
    like_suggested,
    one,
    place,
    result,
    spatial,
    spatial_strides,
    sum_plan,
    walk,
)
from gemsmode.plan import Arg, Decline, Launch, Out, Plan, Size
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

_FLOATING = dtype(*FLOAT)
_FLOATING_INPUT = dtype(*FLOAT, arg="self")  # indices are int64

# -- windows of one dimension ------------------------------------------------------------------------------------------
#
# Of fixed windows KIND[D] is (kernel, stride, padding, dilation, count_include_pad), last dimension first, and the
# parameters are (input size, output size); of adaptive ones only the parameters matter.


@triton.jit
def fixed_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """Element t of window o."""
    i = o * KIND[D][1] - KIND[D][2] + t * KIND[D][3]
    return i, 1.0, (i >= 0) & (i < parameters[0])


@triton.jit
def fixed_start(o, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """The first element of window o that is inside the input."""
    i = o * KIND[D][1] - KIND[D][2]
    return i + tl.maximum((KIND[D][3] - 1 - i) // KIND[D][3], 0) * KIND[D][3]


@triton.jit
def fixed_count(o, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """By how many elements an average over window o divides; padding counts if KIND says so, what is behind it never.

    A window of no elements sums to 0, divided by 1.
    """
    first = o * KIND[D][1] - KIND[D][2]
    if KIND[D][4]:
        return tl.maximum(tl.minimum(first + KIND[D][0], parameters[0] + KIND[D][2]) - first, 1)
    else:
        return tl.maximum(tl.minimum(first + KIND[D][0], parameters[0]) - tl.maximum(first, 0), 1)


@triton.jit
def fixed_first(i, KIND: tl.constexpr, D: tl.constexpr):
    """The first window that reaches input i."""
    return (tl.maximum(i + KIND[D][2] - (KIND[D][0] - 1) * KIND[D][3], 0) + KIND[D][1] - 1) // KIND[D][1]


@triton.jit
def fixed_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """Window t of those that span input i (with dilation, not all of them read it)."""
    o = fixed_first(i, KIND, D) + t
    return o, 1.0, (o * KIND[D][1] <= i + KIND[D][2]) & (o < parameters[1])


@triton.jit
def fixed_cover_mean(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """As fixed_cover, weighted with one over the window's count."""
    o, _, ok = fixed_cover(i, t, parameters, KIND, D)
    return o, 1.0 / fixed_count(o, parameters, KIND, D).to(tl.float32), ok


@triton.jit
def fixed_cover_mean_64(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    o, _, ok = fixed_cover(i, t, parameters, KIND, D)
    return o, 1.0 / fixed_count(o, parameters, KIND, D).to(tl.float64), ok


@triton.jit
def adaptive_start(o, parameters, KIND: tl.constexpr, D: tl.constexpr):
    return (o * parameters[0]) // parameters[1]


@triton.jit
def adaptive_count(o, parameters, KIND: tl.constexpr, D: tl.constexpr):
    return ((o + 1) * parameters[0] + parameters[1] - 1) // parameters[1] - adaptive_start(o, parameters, KIND, D)


@triton.jit
def adaptive_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    return adaptive_start(o, parameters, KIND, D) + t, 1.0, t < adaptive_count(o, parameters, KIND, D)


@triton.jit
def adaptive_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """Window t of those that hold input i: floor(i * O / I) is the first, ceil((i + 1) * O / I) the end."""
    o = (i * parameters[1]) // parameters[0] + t
    return o, 1.0, o < ((i + 1) * parameters[1] + parameters[0] - 1) // parameters[0]


@triton.jit
def adaptive_cover_mean(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    o, _, ok = adaptive_cover(i, t, parameters, KIND, D)
    return o, 1.0 / adaptive_count(o, parameters, KIND, D).to(tl.float32), ok


@triton.jit
def adaptive_cover_mean_64(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    o, _, ok = adaptive_cover(i, t, parameters, KIND, D)
    return o, 1.0 / adaptive_count(o, parameters, KIND, D).to(tl.float64), ok


# -- the largest of a window -------------------------------------------------------------------------------------------
#
# dims[d]: (stride, number of taps, parameters); as in window.py, COUNTS[d] > 0 unrolls.


# What lies outside reads as -inf, which is never larger.


@triton.jit
def _larger(b, position, best, where):
    take = (b > best) | (b != b)
    return tl.where(take, b, best), tl.where(take, position, where)


@triton.jit
def _max_1(p, o, m, position, best, where, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr):
    N: tl.constexpr = COUNTS[0]
    if N > 0:
        for t in tl.static_range(N):
            i, _, ok = TAP(at[0], t, dims[0][2], KIND, 0)
            b = tl.load(p + (o + i * dims[0][0]), mask=m & ok, other=float("-inf")).to(best.dtype)
            best, where = _larger(b, position + i, best, where)
    else:
        for t in range(dims[0][1]):
            i, _, ok = TAP(at[0], t, dims[0][2], KIND, 0)
            b = tl.load(p + (o + i * dims[0][0]), mask=m & ok, other=float("-inf")).to(best.dtype)
            best, where = _larger(b, position + i, best, where)
    return best, where


@triton.jit
def _max_2(p, o, m, position, best, where, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr):
    if len(dims) == 1:
        return _max_1(p, o, m, position, best, where, at, dims, TAP, KIND, COUNTS)
    else:
        N: tl.constexpr = COUNTS[1]
        if N > 0:
            for t in tl.static_range(N):
                i, _, ok = TAP(at[1], t, dims[1][2], KIND, 1)
                best, where = _max_1(p, o + i * dims[1][0], m & ok, (position + i) * dims[0][2][0], best, where, at, dims, TAP, KIND,
                                     COUNTS)
        else:
            for t in range(dims[1][1]):
                i, _, ok = TAP(at[1], t, dims[1][2], KIND, 1)
                best, where = _max_1(p, o + i * dims[1][0], m & ok, (position + i) * dims[0][2][0], best, where, at, dims, TAP, KIND,
                                     COUNTS)
        return best, where


@triton.jit
def _max_3(p, o, m, best, where, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr):
    if len(dims) < 3:
        return _max_2(p, o, m, 0, best, where, at, dims, TAP, KIND, COUNTS)
    else:
        N: tl.constexpr = COUNTS[2]
        if N > 0:
            for t in tl.static_range(N):
                i, _, ok = TAP(at[2], t, dims[2][2], KIND, 2)
                best, where = _max_2(p, o + i * dims[2][0], m & ok, i * dims[1][2][0], best, where, at, dims, TAP, KIND, COUNTS)
        else:
            for t in range(dims[2][1]):
                i, _, ok = TAP(at[2], t, dims[2][2], KIND, 2)
                best, where = _max_2(p, o + i * dims[2][0], m & ok, i * dims[1][2][0], best, where, at, dims, TAP, KIND, COUNTS)
        return best, where


@triton.jit
def max_pool_kernel(p_out, indices, p_in, n_rows, n_columns, sizes, batch, out_steps, out_strides, in_steps, dims,
                    TAP: tl.constexpr, START: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr,
                    CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """The largest value of each window and, if `indices` is given, its position in the plane. Grid: (rows, columns)."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    first = START(at[len(dims) - 1], dims[len(dims) - 1][2], KIND, len(dims) - 1)
    for d in tl.static_range(1, len(dims)):
        first = first * dims[len(dims) - 1 - d][2][0] + START(at[len(dims) - 1 - d], dims[len(dims) - 1 - d][2], KIND, len(dims) - 1 - d)
    where = tl.broadcast_to(first, m.shape)
    best = tl.full(m.shape, float("-inf"), ACC)
    o_in = base(rest, x, batch, in_steps, CHANNELS)
    best, where = _max_3(p_in, o_in, m, best, where, at, dims, TAP, KIND, COUNTS)
    o_out = base(rest, x, batch, out_steps, CHANNELS) + spatial(at, out_strides)
    tl.store(p_out + o_out, convert(best, p_out.dtype.element_ty), mask=m)
    if len(indices) == 1:
        tl.store(indices[0] + o_out, where.to(tl.int64), mask=m)


# Small fixed windows: the taps of a row lie at constant distances from one pointer, and what is kept of the largest is
# the number of its tap, a constant, from which its position is worked out once. Instructions, not bytes, are what a 3x3
# window could be short of: this takes half of the general kernel's.


@triton.jit
def _inside(i, size):
    return i.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def _window_1(p, m, best, where, at, dims, KIND: tl.constexpr, TAP: tl.constexpr):
    N: tl.constexpr = KIND[0][0]
    for t in tl.static_range(N):
        ok = _inside((at[0] * KIND[0][1] - KIND[0][2] + t * KIND[0][3]).to(tl.int32), dims[0][1][0])
        b = tl.load(p + t * (KIND[0][3] * dims[0][0]), mask=m & ok, other=float("-inf")).to(best.dtype)
        best, where = _larger(b, TAP + t, best, where)
    return best, where


@triton.jit
def _window_2(p, m, best, where, at, dims, KIND: tl.constexpr, TAP: tl.constexpr):
    if len(dims) == 1:
        return _window_1(p, m, best, where, at, dims, KIND, TAP)
    else:
        N: tl.constexpr = KIND[1][0]
        for t in tl.static_range(N):
            ok = _inside((at[1] * KIND[1][1] - KIND[1][2] + t * KIND[1][3]).to(tl.int32), dims[1][1][0])
            best, where = _window_1(p + t * (KIND[1][3] * dims[1][0]), m & ok, best, where, at, dims, KIND, TAP + t * KIND[0][0])
        return best, where


@triton.jit
def max_window_kernel(p_out, indices, p_in, n_rows, n_columns, sizes, batch, out_steps, out_strides, in_steps, dims,
                      KIND: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
                      BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """As max_pool_kernel, for small fixed windows. dims[d]: (stride, parameters)."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    o_in = base(rest, x, batch, in_steps, CHANNELS)
    for d in tl.static_range(len(dims)):
        o_in = o_in + (at[d] * KIND[d][1] - KIND[d][2]) * dims[d][0]
    p = p_in + tl.broadcast_to(o_in, m.shape)
    best = tl.full(m.shape, float("-inf"), ACC)
    where = tl.full(m.shape, -1, tl.int32)
    if len(dims) < 3:
        best, where = _window_2(p, m, best, where, at, dims, KIND, 0)
    else:
        N: tl.constexpr = KIND[2][0]
        for t in tl.static_range(N):
            ok = _inside((at[2] * KIND[2][1] - KIND[2][2] + t * KIND[2][3]).to(tl.int32), dims[2][1][0])
            best, where = _window_2(p + t * (KIND[2][3] * dims[2][0]), m & ok, best, where, at, dims, KIND, t * KIND[1][0] * KIND[0][0])
    o_out = base(rest, x, batch, out_steps, CHANNELS) + spatial(at, out_strides)
    tl.store(p_out + o_out, convert(best, p_out.dtype.element_ty), mask=m)
    if len(indices) == 1:
        # Nothing larger than -inf: the window's first element inside.
        last: tl.constexpr = len(dims) - 1
        first = fixed_start(at[last], dims[last][1], KIND, last)
        i = where
        for d in tl.static_range(len(dims) - 1):
            i = i // KIND[d][0]
        position = at[last] * KIND[last][1] - KIND[last][2] + i * KIND[last][3]
        for d in tl.static_range(1, len(dims)):
            first = first * dims[len(dims) - 1 - d][1][0] + fixed_start(at[len(dims) - 1 - d], dims[len(dims) - 1 - d][1], KIND,
                                                                        len(dims) - 1 - d)
            i = where
            for e in tl.static_range(len(dims) - 1 - d):
                i = i // KIND[e][0]
            i = at[len(dims) - 1 - d] * KIND[len(dims) - 1 - d][1] - KIND[len(dims) - 1 - d][2] + (
                i % KIND[len(dims) - 1 - d][0]) * KIND[len(dims) - 1 - d][3]
            position = position * dims[len(dims) - 1 - d][1][0] + i
        tl.store(indices[0] + o_out, tl.where(where < 0, first, position).to(tl.int64), mask=m)


# -- its backward ------------------------------------------------------------------------------------------------------
#
# dims[d]: (stride of the gradient, stride of the indices, number of windows, parameters).


@triton.jit
def _take(total, p_grad, p_index, o_grad, o_index, m, own):
    hit = tl.load(p_index + o_index, mask=m, other=-1) == own
    return total + tl.where(hit, tl.load(p_grad + o_grad, mask=m, other=0).to(total.dtype), 0)


@triton.jit
def _hits_1(p_grad, p_index, o_grad, o_index, m, own, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr,
            ACC: tl.constexpr):
    total = tl.zeros(m.shape, ACC)
    N: tl.constexpr = COUNTS[0]
    if N > 0:
        for t in tl.static_range(N):
            o, _, ok = TAP(at[0], t, dims[0][3], KIND, 0)
            total = _take(total, p_grad, p_index, o_grad + o * dims[0][0], o_index + o * dims[0][1], m & ok, own)
    else:
        for t in range(dims[0][2]):
            o, _, ok = TAP(at[0], t, dims[0][3], KIND, 0)
            total = _take(total, p_grad, p_index, o_grad + o * dims[0][0], o_index + o * dims[0][1], m & ok, own)
    return total


@triton.jit
def _hits_2(p_grad, p_index, o_grad, o_index, m, own, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr,
            ACC: tl.constexpr):
    if len(dims) == 1:
        return _hits_1(p_grad, p_index, o_grad, o_index, m, own, at, dims, TAP, KIND, COUNTS, ACC)
    else:
        total = tl.zeros(m.shape, ACC)
        N: tl.constexpr = COUNTS[1]
        if N > 0:
            for t in tl.static_range(N):
                o, _, ok = TAP(at[1], t, dims[1][3], KIND, 1)
                total += _hits_1(p_grad, p_index, o_grad + o * dims[1][0], o_index + o * dims[1][1], m & ok, own, at, dims, TAP, KIND,
                                 COUNTS, ACC)
        else:
            for t in range(dims[1][2]):
                o, _, ok = TAP(at[1], t, dims[1][3], KIND, 1)
                total += _hits_1(p_grad, p_index, o_grad + o * dims[1][0], o_index + o * dims[1][1], m & ok, own, at, dims, TAP, KIND,
                                 COUNTS, ACC)
        return total


@triton.jit
def _hits_3(p_grad, p_index, o_grad, o_index, m, own, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr,
            ACC: tl.constexpr):
    if len(dims) < 3:
        return _hits_2(p_grad, p_index, o_grad, o_index, m, own, at, dims, TAP, KIND, COUNTS, ACC)
    else:
        total = tl.zeros(m.shape, ACC)
        N: tl.constexpr = COUNTS[2]
        if N > 0:
            for t in tl.static_range(N):
                o, _, ok = TAP(at[2], t, dims[2][3], KIND, 2)
                total += _hits_2(p_grad, p_index, o_grad + o * dims[2][0], o_index + o * dims[2][1], m & ok, own, at, dims, TAP, KIND,
                                 COUNTS, ACC)
        else:
            for t in range(dims[2][2]):
                o, _, ok = TAP(at[2], t, dims[2][3], KIND, 2)
                total += _hits_2(p_grad, p_index, o_grad + o * dims[2][0], o_index + o * dims[2][1], m & ok, own, at, dims, TAP, KIND,
                                 COUNTS, ACC)
        return total


@triton.jit
def max_pool_backward_kernel(p_out, p_grad, p_index, n_rows, n_columns, sizes, batch, out_steps, out_strides, grad_steps, index_steps,
                             dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr,
                             CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """The sum of the gradients of the windows whose maximum an input was. Grid: (row blocks, column blocks) of the input."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    own = at[len(dims) - 1]
    for d in tl.static_range(1, len(dims)):
        own = own * sizes[len(dims) - 1 - d] + at[len(dims) - 1 - d]
    total = _hits_3(p_grad, p_index, base(rest, x, batch, grad_steps, CHANNELS), base(rest, x, batch, index_steps, CHANNELS), m, own,
                    at, dims, TAP, KIND, COUNTS, ACC)
    o_out = base(rest, x, batch, out_steps, CHANNELS) + spatial(at, out_strides)
    tl.store(p_out + o_out, convert(total, p_out.dtype.element_ty), mask=m)


# -- windows of a call -------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A fixed window in one dimension."""

    kernel: int
    stride: int
    padding: int
    dilation: int = 1
    count_padding: bool = True

    def output(self, size: int, ceil_mode: bool) -> int:
        n = (size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1 + (self.stride - 1 if ceil_mode else 0)) // self.stride + 1
        if ceil_mode and (n - 1) * self.stride >= size + self.padding:
            n -= 1
        return n

    @property
    def covers(self) -> int:
        """How many windows span one input, at most."""
        return -(-((self.kernel - 1) * self.dilation + 1) // self.stride)

    def uniform(self, size: int, n: int) -> bool:
        """Whether every window counts ``kernel`` elements."""
        end = size + (self.padding if self.count_padding else 0)
        return (self.padding == 0 or self.count_padding) and (n - 1) * self.stride - self.padding + self.kernel <= end


def _spread(values: Sequence[int], rank: int, what: str) -> tuple[int, ...]:
    if len(values) == 1:
        return (values[0],) * rank
    if len(values) != rank:
        raise Decline(f"PyTorch rejects it: {what} needs 1 or {rank} values")
    return tuple(values)


def windows(x: TensorMeta, rank: int, kernel: Sequence[int], step: Sequence[int], padding: Sequence[int],
            dilation: Sequence[int] = (1,), ceil_mode: bool = False,
            count_padding: bool = True) -> tuple[tuple[Window, ...], tuple[int, ...]]:
    """The windows of a pool over the last ``rank`` dimensions of ``x``, and the spatial sizes of its result.

    Raises:
        Decline: PyTorch rejects the call.
    """
    if x.ndim not in (rank + 1, rank + 2):
        raise Decline(f"PyTorch rejects it: {x.ndim} dimensions")
    if any(n == 0 for n in x.shape[x.ndim - rank - 1:]):
        raise Decline("PyTorch rejects it: an empty dimension other than the batch")
    sizes = _spread(kernel, rank, "kernel_size")
    found = tuple([Window(*v, count_padding) for v in zip(sizes, _spread(step, rank, "stride") if step else sizes,
                                                          _spread(padding, rank, "padding"), _spread(dilation, rank, "dilation"))])
    for w in found:
        if min(w.kernel, w.stride, w.dilation) < 1 or w.padding < 0 or 2 * w.padding > w.kernel:
            raise Decline("PyTorch rejects it: sizes, strides and dilations must be positive and padding at most half a kernel")
    spatial_sizes = tuple([w.output(n, ceil_mode) for w, n in zip(found, x.shape[x.ndim - rank:])])
    if min(spatial_sizes) < 1:
        raise Decline("PyTorch rejects it: the output is too small")
    return found, spatial_sizes


def adaptive_sizes(x: TensorMeta, rank: int, output_size: Sequence[int], empty_batch: bool = True) -> tuple[int, ...]:
    """The spatial sizes of an adaptive pool's result.

    Raises:
        Decline: PyTorch rejects the call.
    """
    if x.ndim not in (rank + 1, rank + 2) or len(output_size) != rank:
        raise Decline("PyTorch rejects it: the number of dimensions")
    if any(n == 0 for n in x.shape[1:]) or any(n < 0 for n in output_size):
        raise Decline("PyTorch rejects it: an empty dimension other than the first, or a negative size")
    if any((n + 1) * (o + 1) >= 2**31 for n, o in zip(x.shape[x.ndim - rank:], output_size)):
        raise Decline("sizes whose product does not fit in 32 bits")
    return tuple(output_size)


class Pool(NamedTuple):
    """The windows of a pool, fixed or adaptive, as kernels take them; all tuples are in the tensor's order of dimensions.

    Attributes:
        tap, start, count, cover, cover_mean, cover_mean_64: functions of one dimension, as above.
        kind: the constants of each dimension, last dimension first.
        taps: elements of the largest window in each dimension.
        covers: the most windows that an element is in, in each dimension.
        fixed: whether these numbers follow from ``kind``.
        uniform: the number of elements of every window, None if it differs.
        parameters: input and output size of each dimension.
        output: spatial sizes of the result.
    """

    tap: Any
    start: Any
    count: Any
    cover: Any
    cover_mean: Any
    cover_mean_64: Any
    kind: tuple[Any, ...]
    taps: tuple[int, ...]
    covers: tuple[int, ...]
    fixed: bool
    uniform: int | None
    parameters: tuple[tuple[Any, ...], ...]
    output: tuple[int, ...]


def _product(sizes: Sequence[int]) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n


def fixed_pool(x: TensorMeta, found: Sequence[Window], output: tuple[int, ...]) -> Pool:
    """The pool of fixed windows over ``x``."""
    sizes = x.shape[x.ndim - len(found):]
    uniform = all(w.uniform(n, o) for w, n, o in zip(found, sizes, output))
    return Pool(fixed_tap, fixed_start, fixed_count, fixed_cover, fixed_cover_mean, fixed_cover_mean_64, tuple(map(tuple, reversed(found))),
                tuple([w.kernel for w in found]), tuple([w.covers for w in found]), True,
                _product([w.kernel for w in found]) if uniform else None,
                tuple([(Size(n), Size(o)) for n, o in zip(sizes, output)]), output)


def adaptive_pool(x: TensorMeta, output: tuple[int, ...]) -> Pool:
    """The adaptive pool over ``x``; with windows all alike where the sizes divide."""
    sizes = x.shape[x.ndim - len(output):]
    if 0 not in output and all(n % o == 0 for n, o in zip(sizes, output)) and _product([n // o for n, o in zip(sizes, output)]) <= UNROLLED:
        return fixed_pool(x, [Window(n // o, n // o, 0) for n, o in zip(sizes, output)], output)
    # Windows differ by one element at most: between I / O, rounded up, and one more.
    taps = tuple([1 if o == 0 else n // o if n % o == 0 else -(-n // o) + 1 for n, o in zip(sizes, output)])
    covers = tuple([o // n if o % n == 0 else -(-o // n) + 1 for n, o in zip(sizes, output)])
    return Pool(adaptive_tap, adaptive_start, adaptive_count, adaptive_cover, adaptive_cover_mean, adaptive_cover_mean_64, (), taps, covers,
                False, None, tuple([(Size(n), Size(o)) for n, o in zip(sizes, output)]), output)


_ROW_OF_TAPS = 8  # of a small window only a row's loads are in flight: four results a thread share the work on rows


def _accumulator(x: torch.dtype) -> Any:
    return tl.float64 if x == torch.float64 else tl.float32


def max_plan(call: Call, x: TensorMeta, pool: Pool, channels_last: bool, with_indices: bool = True) -> Plan:
    """Values and, if asked for, positions of the largest element of each window; ``x`` is the call's first argument."""
    rank = len(pool.output)
    shape = x.shape[:x.ndim - rank] + pool.output
    out = result(shape, x.dtype, channels_last)
    allocs = (out, out._replace(dtype=torch.int64)) if with_indices else (out,)
    returns = (Out(0), Out(1)) if with_indices else Out(0)
    n = out.meta.numel
    if n == 0:
        return Plan(allocs, (), returns, {Arg(0): x}, bytes=0)
    if _product(x.shape[x.ndim - rank:]) >= 2**31:
        raise Decline("a plane of more than 2**31 elements")
    view = walk(out, rank, [x])
    count = _product(pool.taps)
    strides = spatial_strides(x.stride, rank)
    common = (Out(0), (Out(1),) if with_indices else (), Arg(0), *view.head(), view.steps(out.stride, rank),
              spatial_strides(out.stride, rank), view.steps(x.stride, rank))
    dims: tuple[Any, ...]
    if pool.fixed and count <= UNROLLED:
        kernel = max_window_kernel
        tile = choose_tile(view.rows, view.columns, _ROW_OF_TAPS if rank < 3 else count, call.target)
        dims = tuple(zip(strides, reversed(pool.parameters)))
        constants: tuple[tuple[str, Any], ...] = (("KIND", pool.kind),)
    else:
        kernel = max_pool_kernel
        tile = choose_tile(view.rows, view.columns, count, call.target)
        dims = tuple([(s, Size(t), p) for s, t, p in zip(strides, reversed(pool.taps), reversed(pool.parameters))])
        constants = (("TAP", pool.tap), ("START", pool.start), ("KIND", pool.kind), ("COUNTS", (0,) * rank))
    constants += (("ACC", _accumulator(x.dtype)), ("CHANNELS", view.channels), ("WIDE", view.wide), ("BLOCK_Y", tile.rows),
                  ("BLOCK_X", tile.columns))
    moved = x.numel * x.dtype.itemsize + n * (x.dtype.itemsize + (8 if with_indices else 0))
    return Plan(allocs, (Launch(kernel, view.grid(tile), (*common, dims), Constants(constants), tile.warps),), returns, {Arg(0): x},
                bytes=moved, flops=n * count)


def max_backward_plan(call: Call, grad: tuple[Arg, TensorMeta], index: tuple[Arg | Out, TensorMeta], x: TensorMeta, pool: Pool,
                      channels_last: bool) -> Plan:
    """The gradient of ``x`` from the gradient of a max pool's values and the positions that the pool returned."""
    rank = len(pool.output)
    shape = x.shape[:x.ndim - rank] + pool.output
    if grad[1].shape != shape or index[1].shape != shape or grad[1].dtype != x.dtype or index[1].dtype != torch.int64:
        raise Decline("PyTorch rejects it: the gradient or the indices do not fit the input")
    out = result(x.shape, x.dtype, channels_last)
    metas = {ref: meta for ref, meta in (grad, index) if isinstance(ref, Arg)}
    n = out.meta.numel
    if n == 0:
        return Plan((out,), (), Out(0), metas, bytes=0)
    view = walk(out, rank, [grad[1], index[1]])
    count = _product(pool.covers)
    unroll = pool.fixed and count <= UNROLLED // 2
    tile = choose_tile(view.rows, view.columns, 2 * count, call.target)
    dims = tuple([(s, i, 0 if unroll else Size(t), p) for s, i, t, p in zip(
        spatial_strides(grad[1].stride, rank), spatial_strides(index[1].stride, rank), reversed(pool.covers), reversed(pool.parameters))])
    args = (Out(0), grad[0], index[0], *view.head(), view.steps(out.stride, rank), spatial_strides(out.stride, rank),
            view.steps(grad[1].stride, rank), view.steps(index[1].stride, rank), dims)
    constants = (("TAP", pool.cover), ("KIND", pool.kind), ("COUNTS", tuple(reversed(pool.covers)) if unroll else (0,) * rank),
                 ("ACC", _accumulator(x.dtype)), ("CHANNELS", view.channels), ("WIDE", view.wide),
                 ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    moved = n * x.dtype.itemsize + grad[1].numel * (x.dtype.itemsize + 8)
    return Plan((out,), (Launch(max_pool_backward_kernel, view.grid(tile), args, Constants(constants), tile.warps),), Out(0), metas,
                bytes=moved, flops=n * count)


# -- max pools ---------------------------------------------------------------------------------------------------------


def _max_pool(call: Call, rank: int, with_indices: bool) -> Plan:
    x, kernel, step, padding, dilation, ceil_mode = call.args
    found, output = windows(x, rank, kernel, step, padding, dilation, ceil_mode)
    return max_plan(call, x, fixed_pool(x, found, output), like_suggested(x, rank + 2), with_indices)


@planned("aten.max_pool2d_with_indices.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def max_pool2d_with_indices(call: Call) -> Plan:
    return _max_pool(call, 2, True)


@planned("aten.max_pool3d_with_indices.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def max_pool3d_with_indices(call: Call) -> Plan:
    return _max_pool(call, 3, True)


# Under inference mode the composites arrive, and nobody asks for the indices.
@planned("aten.max_pool1d.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def max_pool1d(call: Call) -> Plan:
    """On a GPU the signal is an image of one row to PyTorch, whose format the result has."""
    x, kernel, step, padding, dilation, ceil_mode = call.args
    found, output = windows(x, 1, kernel, step, padding, dilation, ceil_mode)
    image = x.ndim == 3 and x._replace(shape=(*x.shape[:2], 1, x.shape[2]), stride=(*x.stride[:2], x.shape[2] * x.stride[2], x.stride[2]))
    channels_last = call.target.device_type != "cpu" and isinstance(image, TensorMeta) and like_suggested(image)
    return max_plan(call, x, fixed_pool(x, found, output), channels_last, False)


@planned("aten.max_pool2d.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def max_pool2d(call: Call) -> Plan:
    return _max_pool(call, 2, False)


@planned("aten.max_pool3d.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def max_pool3d(call: Call) -> Plan:
    return _max_pool(call, 3, False)


def _max_pool_backward(call: Call, rank: int) -> Plan:
    grad, x, kernel, step, padding, dilation, ceil_mode, index = call.args
    found, output = windows(x, rank, kernel, step, padding, dilation, ceil_mode)
    return max_backward_plan(call, (Arg(0), grad), (Arg(7), index), x, fixed_pool(x, found, output), like_suggested(x, rank + 2))


@planned("aten.max_pool2d_with_indices_backward.default", _FLOATING_INPUT, family="pool", kernel=max_pool_backward_kernel)
def max_pool2d_with_indices_backward(call: Call) -> Plan:
    return _max_pool_backward(call, 2)


@planned("aten.max_pool3d_with_indices_backward.default", _FLOATING_INPUT, family="pool", kernel=max_pool_backward_kernel)
def max_pool3d_with_indices_backward(call: Call) -> Plan:
    return _max_pool_backward(call, 3)


@planned("aten.max_pool2d_backward.default", _FLOATING, family="pool", kernel=max_pool_backward_kernel)
def max_pool2d_backward(call: Call) -> Plan:
    """Without indices: the pool is done again to find them."""
    grad, x, kernel, step, padding, dilation, ceil_mode = call.args
    found, output = windows(x, 2, kernel, step, padding, dilation, ceil_mode)
    pool = fixed_pool(x, found, output)
    channels_last = like_suggested(x, 4)
    forward = max_plan(call, x, pool, channels_last)
    backward = max_backward_plan(call, (Arg(0), grad), (Out(2), forward.allocs[1].meta), x, pool, channels_last)
    steps = []
    for step_ in forward.launches:
        out, _, _, *others = step_.args
        steps.append(step_._replace(args=(Out(1), (Out(2),), Arg(1), *others)))
        assert out == Out(0)
    return backward._replace(allocs=(*backward.allocs, *forward.allocs), launches=(*steps, *backward.launches),
                             metas={Arg(0): grad, Arg(1): x}, bytes=(backward.bytes or 0) + (forward.bytes or 0))


# -- average pools -----------------------------------------------------------------------------------------------------


def _average(call: Call, rank: int, channels_last: bool) -> Plan:
    x, kernel, step, padding, ceil_mode, count_padding, override = call.args
    found, output = windows(x, rank, kernel, step, padding, (1,), ceil_mode, count_padding)
    if override == 0:
        raise Decline("PyTorch rejects it: the divisor is zero")
    if rank == 3 and any(n < w.kernel for w, n in zip(found, x.shape[-3:])):
        raise Decline("PyTorch rejects it: the input is smaller than the kernel")
    pool = fixed_pool(x, found, output)
    return mean_plan(call, x, pool, channels_last, override)


def mean_plan(call: Call, x: TensorMeta, pool: Pool, channels_last: bool, override: int | None = None) -> Plan:
    """Averages over windows of the call's first argument."""
    shape = x.shape[:x.ndim - len(pool.output)] + pool.output
    divisor = pool.uniform if override is None else override
    return sum_plan(call, (Arg(0), x), result(shape, x.dtype, channels_last), [Dim(t, p) for t, p in zip(pool.taps, pool.parameters)],
                    pool.tap, pool.kind, pool.count if divisor is None else one, divisor or 1, pool.fixed)


def mean_backward_plan(call: Call, grad: TensorMeta, x: TensorMeta, pool: Pool, channels_last: bool, override: int | None = None) -> Plan:
    """The gradient of ``x``: each element sums the windows that hold it, each divided by its count."""
    shape = x.shape[:x.ndim - len(pool.output)] + pool.output
    if grad.shape != shape or grad.dtype != x.dtype:
        raise Decline("PyTorch rejects it: the gradient does not fit the input")
    divisor = pool.uniform if override is None else override
    tap = pool.cover if divisor is not None else pool.cover_mean_64 if x.dtype == torch.float64 else pool.cover_mean
    dims = [Dim(t, p) for t, p in zip(pool.covers, pool.parameters)]
    return sum_plan(call, (Arg(0), grad), result(x.shape, x.dtype, channels_last), dims, tap, pool.kind, one, divisor or 1,
                    pool.fixed)


@planned("aten.avg_pool2d.default", _FLOATING, family="pool", kernel=fixed_tap)
def avg_pool2d(call: Call) -> Plan:
    return _average(call, 2, like_suggested(call.args[0], 4))


@planned("aten.avg_pool3d.default", _FLOATING, family="pool", kernel=fixed_tap)
def avg_pool3d(call: Call) -> Plan:
    return _average(call, 3, False)


def _average_backward(call: Call, rank: int, channels_last: bool) -> Plan:
    grad, x, kernel, step, padding, ceil_mode, count_padding, override = call.args
    found, output = windows(x, rank, kernel, step, padding, (1,), ceil_mode, count_padding)
    if override == 0:
        raise Decline("PyTorch rejects it: the divisor is zero")
    return mean_backward_plan(call, grad, x, fixed_pool(x, found, output), channels_last, override)


@planned("aten.avg_pool2d_backward.default", _FLOATING, family="pool", kernel=fixed_cover)
def avg_pool2d_backward(call: Call) -> Plan:
    return _average_backward(call, 2, like_suggested(call.args[1], 4))


@planned("aten.avg_pool3d_backward.default", _FLOATING, family="pool", kernel=fixed_cover)
def avg_pool3d_backward(call: Call) -> Plan:
    return _average_backward(call, 3, False)


# -- adaptive pools ----------------------------------------------------------------------------------------------------


@planned("aten._adaptive_avg_pool2d.default", _FLOATING, family="pool", kernel=adaptive_tap)
def adaptive_avg_pool2d(call: Call) -> Plan:
    x, output_size = call.args
    return mean_plan(call, x, adaptive_pool(x, adaptive_sizes(x, 2, output_size)), like_suggested(x, 4))


@planned("aten._adaptive_avg_pool3d.default", _FLOATING, family="pool", kernel=adaptive_tap)
def adaptive_avg_pool3d(call: Call) -> Plan:
    x, output_size = call.args
    return mean_plan(call, x, adaptive_pool(x, adaptive_sizes(x, 3, output_size)), False)


def _adaptive_backward(call: Call, rank: int) -> tuple[TensorMeta, TensorMeta, Pool]:
    grad, x = call.args[:2]
    if grad.ndim != x.ndim or any(n == 0 for n in grad.shape[1:]):
        raise Decline("PyTorch rejects it: the gradient does not fit the input, or is empty")
    return grad, x, adaptive_pool(x, adaptive_sizes(x, rank, grad.shape[grad.ndim - rank:]))


@planned("aten._adaptive_avg_pool2d_backward.default", _FLOATING, family="pool", kernel=adaptive_cover)
def adaptive_avg_pool2d_backward(call: Call) -> Plan:
    return mean_backward_plan(call, *_adaptive_backward(call, 2), like_suggested(call.args[1], 4))


@planned("aten._adaptive_avg_pool3d_backward.default", _FLOATING, family="pool", kernel=adaptive_cover)
def adaptive_avg_pool3d_backward(call: Call) -> Plan:
    return mean_backward_plan(call, *_adaptive_backward(call, 3), False)


@planned("aten.adaptive_max_pool2d.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def adaptive_max_pool2d(call: Call) -> Plan:
    x, output_size = call.args
    return max_plan(call, x, adaptive_pool(x, adaptive_sizes(x, 2, output_size)), like_suggested(x, 4))


@planned("aten.adaptive_max_pool3d.default", _FLOATING, family="pool", kernel=max_pool_kernel)
def adaptive_max_pool3d(call: Call) -> Plan:
    x, output_size = call.args
    return max_plan(call, x, adaptive_pool(x, adaptive_sizes(x, 3, output_size)), False)


@planned("aten.adaptive_max_pool2d_backward.default", _FLOATING_INPUT, family="pool", kernel=max_pool_backward_kernel)
def adaptive_max_pool2d_backward(call: Call) -> Plan:
    grad, x, pool = _adaptive_backward(call, 2)
    return max_backward_plan(call, (Arg(0), grad), (Arg(2), call.args[2]), x, pool, like_suggested(x, 4))


@planned("aten.adaptive_max_pool3d_backward.default", _FLOATING_INPUT, family="pool", kernel=max_pool_backward_kernel)
def adaptive_max_pool3d_backward(call: Call) -> Plan:
    grad, x, pool = _adaptive_backward(call, 3)
    return max_backward_plan(call, (Arg(0), grad), (Arg(2), call.args[2]), x, pool, False)
