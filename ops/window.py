"""Windows over images: each result is a sum over a small box of inputs, whose weights are products over dimensions.

``out[o_h, o_w] = sum over (t_h, t_w) of  weight_h(o_h, t_h) * weight_w(o_w, t_w) * in[index_h(o_h, t_h), index_w(o_w, t_w)]``

Average pools, every kind of upsampling, pads, ``col2im``, and the backward of each of them are of this shape: an op is a
*tap*, a function of one dimension ``(o, t) -> (index, weight, whether it exists)``. A backward is the same sum the other
way round: a tap then lists the outputs that read an input, so that nothing needs atomics and every result is the same in
each run. ``gather_kernel`` is the case of one tap that copies, for any dtype.

Tensors are looked at as ``batch dimensions x spatial dimensions`` (one to three, the last one first in every tuple here).
A program takes a tile of rows and columns: columns run along the dimension that is innermost in memory, which is the
last spatial one, or the channels of a ``channels_last`` tensor; rows are all other dimensions. Row and column
coordinates stay vectors ([BLOCK_Y, 1] and [1, BLOCK_X]), and so do the indices and weights that taps make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import channels_last_strides
from gemsmode.ops.movement import suggests_channels_last
from gemsmode.ops.pointwise import convert, power_of_2
from gemsmode.ops.promotion import TRITON
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- coordinates -------------------------------------------------------------------------------------------------------


@triton.jit
def place(n_rows, n_columns, sizes, CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """This program's tile: (mask [BLOCK_Y, BLOCK_X], spatial coordinates, index of the batch, columns)."""
    i_y = tl.program_id(0)
    i_x = tl.program_id(1)
    if WIDE:
        i_y = i_y.to(tl.int64)
        i_x = i_x.to(tl.int64)
    y = (i_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    m = (y < n_rows) & (x < n_columns)
    if CHANNELS:
        w = y % sizes[0]
        rest = y // sizes[0]
    else:
        w = x
        rest = y
    if len(sizes) == 1:
        return m, (w,), rest, x
    elif len(sizes) == 2:
        return m, (w, rest % sizes[1]), rest // sizes[1], x
    else:
        below = rest // sizes[1]
        return m, (w, rest % sizes[1], below % sizes[2]), below // sizes[2], x


@triton.jit
def base(rest, x, batch, steps, CHANNELS: tl.constexpr):
    """Offsets of the tile's batch index and, if columns are channels, of its channels. steps: (column, batch...)."""
    if len(batch) == 2:
        o = (rest % batch[0]) * steps[1] + (rest // batch[0]) * steps[2]
    else:
        o = rest * steps[1]
    if CHANNELS:
        o = o + x * steps[0]
    return o


@triton.jit
def spatial(at, steps):
    """The offset of spatial coordinates."""
    o = at[0] * steps[0]
    for d in tl.static_range(1, len(at)):
        o = o + at[d] * steps[d]
    return o


@triton.jit
def number(parts, DTYPE: tl.constexpr):
    """A float that the plan passed in float32 parts: one is enough for float32, three for float64."""
    v = tl.cast(parts[0], DTYPE)
    for k in tl.static_range(1, len(parts)):
        v += tl.cast(parts[k], DTYPE)
    return v


@triton.jit
def divide(a, b):
    """The quotient, correctly rounded."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


# -- sums over taps ----------------------------------------------------------------------------------------------------
#
# dims[d]: (stride of the input, stride of a tap, number of taps, parameters of the tap), for each spatial dimension.
# COUNTS[d] > 0: so many taps, unrolled; 0: dims[d][2] taps in a loop. KIND is what TAP wants to know at compile time.


@triton.jit
def _read(p, o, m, i, t, dim):
    return tl.load(p + (o + (i * dim[0] + t * dim[1])), mask=m, other=0)


@triton.jit
def _sum_1(p, o, m, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr):
    total = tl.zeros(m.shape, ACC)
    N: tl.constexpr = COUNTS[0]
    if N > 0:
        for t in tl.static_range(N):
            i, weight, ok = TAP(at[0], t, dims[0][3], KIND, 0)
            total += _read(p, o, m & ok, i, t, dims[0]).to(ACC) * weight
    else:
        for t in range(dims[0][2]):
            i, weight, ok = TAP(at[0], t, dims[0][3], KIND, 0)
            total += _read(p, o, m & ok, i, t, dims[0]).to(ACC) * weight
    return total


@triton.jit
def _sum_2(p, o, m, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr):
    if len(dims) == 1:
        return _sum_1(p, o, m, at, dims, TAP, KIND, COUNTS, ACC)
    else:
        total = tl.zeros(m.shape, ACC)
        N: tl.constexpr = COUNTS[1]
        if N > 0:
            for t in tl.static_range(N):
                i, weight, ok = TAP(at[1], t, dims[1][3], KIND, 1)
                inner = _sum_1(p, o + (i * dims[1][0] + t * dims[1][1]), m & ok, at, dims, TAP, KIND, COUNTS, ACC)
                total += inner * weight
        else:
            for t in range(dims[1][2]):
                i, weight, ok = TAP(at[1], t, dims[1][3], KIND, 1)
                inner = _sum_1(p, o + (i * dims[1][0] + t * dims[1][1]), m & ok, at, dims, TAP, KIND, COUNTS, ACC)
                total += inner * weight
        return total


@triton.jit
def _sum_3(p, o, m, at, dims, TAP: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr):
    if len(dims) < 3:
        return _sum_2(p, o, m, at, dims, TAP, KIND, COUNTS, ACC)
    else:
        total = tl.zeros(m.shape, ACC)
        N: tl.constexpr = COUNTS[2]
        if N > 0:
            for t in tl.static_range(N):
                i, weight, ok = TAP(at[2], t, dims[2][3], KIND, 2)
                inner = _sum_2(p, o + (i * dims[2][0] + t * dims[2][1]), m & ok, at, dims, TAP, KIND, COUNTS, ACC)
                total += inner * weight
        else:
            for t in range(dims[2][2]):
                i, weight, ok = TAP(at[2], t, dims[2][3], KIND, 2)
                inner = _sum_2(p, o + (i * dims[2][0] + t * dims[2][1]), m & ok, at, dims, TAP, KIND, COUNTS, ACC)
                total += inner * weight
        return total


@triton.jit
def one(o, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """The divisor of sums that are not divided."""
    return 1


@triton.jit
def window_sum_kernel(p_out, p_in, n_rows, n_columns, sizes, batch, out_steps, out_strides, in_steps, dims, divisor,
                      TAP: tl.constexpr, DIVISOR: tl.constexpr, KIND: tl.constexpr, COUNTS: tl.constexpr, DIVIDED: tl.constexpr,
                      ACC: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Sums over taps, divided by `divisor` and by DIVISOR of each dimension. Grid: (row blocks, column blocks)."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    o_in = base(rest, x, batch, in_steps, CHANNELS)
    total = _sum_3(p_in, o_in, m, at, dims, TAP, KIND, COUNTS, ACC)
    if DIVIDED:
        by = DIVISOR(at[0], dims[0][3], KIND, 0) * divisor
        for d in tl.static_range(1, len(dims)):
            by = by * DIVISOR(at[d], dims[d][3], KIND, d)
        total = divide(total, tl.broadcast_to(tl.cast(by, ACC), total.shape))
    o_out = base(rest, x, batch, out_steps, CHANNELS) + spatial(at, out_strides)
    tl.store(p_out + o_out, convert(total, p_out.dtype.element_ty), mask=m)


@triton.jit
def gather_kernel(p_out, p_in, n_rows, n_columns, sizes, batch, out_steps, out_strides, in_steps, dims,
                  TAP: tl.constexpr, KIND: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Each result is a copy of one input, or 0 where the tap says that there is none. Grid: (row blocks, column blocks)."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    o_in = base(rest, x, batch, in_steps, CHANNELS)
    ok = m
    for d in tl.static_range(len(dims)):
        i, _, valid = TAP(at[d], 0, dims[d][3], KIND, d)
        o_in = o_in + i * dims[d][0]
        ok = ok & valid
    o_out = base(rest, x, batch, out_steps, CHANNELS) + spatial(at, out_strides)
    tl.store(p_out + o_out, tl.load(p_in + o_in, mask=ok, other=0), mask=m)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A program's share: rows by columns, and its warps."""

    rows: int
    columns: int
    warps: int = 4


ELEMENTS = ((2, 1024), (8, 512))
"""(loads a result, results a program): a ladder from few loads a result to many, whose addresses take registers."""

_MANY_LOADS = 256  # two results a thread: the loads of a 3x3 window are in flight together, and int64 stores are 16 bytes
_INTERPRETED = 1 << 16


def choose_tile(rows: int, columns: int, loads: int, target: Target) -> Tile:
    """Columns as wide as waste allows, rows to fill the block."""
    if target.interpreted:
        x = min(power_of_2(columns), 4096)
        return Tile(max(min(power_of_2(rows), _INTERPRETED // x), 1), x)
    block = next((elements for limit, elements in ELEMENTS if loads <= limit), _MANY_LOADS)
    if columns <= 32:
        x = power_of_2(columns)
    else:
        # The width, of these, that leaves the fewest lanes idle at the end of a row; the widest of equals.
        x = min((128, 64, 32), key=lambda width: -(-columns // width) * width)
    return Tile(max(block // x, 1), x)


# -- plans -------------------------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """How a tensor of results is walked.

    Attributes:
        channels: whether columns are channels.
        rows: rows in all.
        columns: columns in all.
        sizes: spatial sizes, last dimension first.
        batch: sizes of what is left, fastest first; one or two.
        outer: the numbers of those dimensions of the tensor.
        merged: whether the two outer dimensions are walked as one.
        wide: whether offsets need 64 bits.
    """

    channels: bool
    rows: int
    columns: int
    sizes: tuple[int, ...]
    batch: tuple[int, ...]
    outer: tuple[int, ...]
    merged: bool
    wide: bool

    def steps(self, strides: Sequence[int], rank: int) -> tuple[Any, ...]:
        """The column and batch strides of an operand, as a kernel's argument."""
        lead = len(strides) - rank
        column = strides[lead - 1] if self.channels else 0
        outer = [strides[d] for d in self.outer]
        if self.merged:
            outer = outer[:1]
        return (column, *[stride(s) for s in outer or [0]])

    def head(self) -> tuple[Any, ...]:
        """The arguments that every kernel here begins with, after its pointers."""
        return (Size(self.rows), extent(self.columns), tuple([Size(s) for s in self.sizes]), tuple([Size(b) for b in self.batch]))

    def grid(self, tile: Tile) -> tuple[int, int, int]:
        return -(-self.rows // tile.rows), -(-self.columns // tile.columns), 1


def spatial_strides(strides: Sequence[int], rank: int) -> tuple[Any, ...]:
    """The spatial strides of an operand, last dimension first, as a kernel's argument."""
    return (strides[-1], *[stride(s) for s in reversed(strides[len(strides) - rank:len(strides) - 1])])


def walk(out: Alloc, rank: int, operands: Sequence[TensorMeta]) -> Walk:
    """How to walk ``out``, whose last ``rank`` dimensions are spatial; operands have as many dimensions.

    At most two dimensions come before the spatial ones (batch and channels).
    """
    lead = len(out.shape) - rank
    assert 0 <= lead <= 2
    sizes = tuple(reversed(out.shape[lead:]))
    tensors = [out.meta, *operands]
    wide = max([out.meta.numel, *[m.extent for m in tensors]]) >= 2**31 - 2**17
    channels = lead == 2 and out.shape[1] > 1 and out.stride[1] == 1 and out.stride[-1] != 1
    outer = ((0,) if channels else tuple(range(lead - 1, -1, -1)))
    batch = [out.shape[d] for d in outer] or [1]
    merged = False
    if len(batch) == 2 and (batch[1] == 1 or all(m.stride[0] == m.stride[1] * batch[0] for m in tensors)):
        batch, merged = [batch[0] * batch[1]], True
    rows = 1
    for size in (*batch, *sizes):
        rows *= size
    columns = out.shape[1] if channels else sizes[0]
    rows = rows if channels else rows // columns
    if -(-columns // 32) > 65535:
        raise Decline("rows of more than two million elements")
    return Walk(channels, rows, columns, sizes, tuple(batch), outer, merged, wide)


class Dim(NamedTuple):
    """What a tap needs in one spatial dimension: how many taps, its parameters, and the input's stride for a tap."""

    taps: int
    parameters: tuple[Any, ...] = ()
    tap_stride: int = 0


UNROLLED = 36
"""Taps of all dimensions together that are unrolled."""


def sum_plan(call: Call, source: tuple[Arg | Out, TensorMeta], out: Alloc, dims: Sequence[Dim], tap: Any, kind: tuple[Any, ...],
             divisor_function: Any = one, divisor: int = 1, fixed: bool = True, unrolled: int = UNROLLED) -> Plan:
    """A plan of ``window_sum_kernel``: ``out`` from ``source``.

    Args:
        dims: one for each spatial dimension, first dimension first.
        tap: the ``@triton.jit`` function ``(o, t, parameters, KIND, D) -> (index, weight, ok)``.
        kind: what ``tap`` and ``divisor_function`` know at compile time.
        divisor_function: ``(o, parameters, KIND, D)``, a divisor for each dimension.
        divisor: a divisor of everything.
        fixed: whether the number of taps follows from ``kind`` (else kernels would be compiled for each number).
        unrolled: taps that may be unrolled.
    """
    ref, meta = source
    rank = len(dims)
    metas = {ref: meta} if isinstance(ref, Arg) else {}
    n = out.meta.numel
    if n == 0:
        return Plan((out,), (), Out(0), metas, bytes=0)
    view = walk(out, rank, [meta])
    count = 1
    for d in dims:
        count *= d.taps
    unroll = fixed and count <= unrolled
    tile = choose_tile(view.rows, view.columns, count, call.target)
    strides = spatial_strides(meta.stride, rank)
    given = tuple([(s, stride(d.tap_stride), 0 if unroll else Size(d.taps), d.parameters) for s, d in zip(strides, reversed(dims))])
    accumulator = tl.float64 if meta.dtype == torch.float64 else tl.float32
    constants = (("TAP", tap), ("DIVISOR", divisor_function), ("KIND", kind),
                 ("COUNTS", tuple([d.taps if unroll else 0 for d in reversed(dims)])),
                 ("DIVIDED", divisor_function is not one or divisor != 1), ("ACC", accumulator), ("CHANNELS", view.channels),
                 ("WIDE", view.wide), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    args = (Out(0), ref, *view.head(), view.steps(out.stride, rank), spatial_strides(out.stride, rank), view.steps(meta.stride, rank),
            given, Size(divisor))
    moved = n * out.dtype.itemsize + meta.numel * meta.dtype.itemsize
    return Plan((out,), (Launch(window_sum_kernel, view.grid(tile), args, Constants(constants), tile.warps),), Out(0), metas,
                bytes=moved, flops=2 * n * count)


def gather_plan(call: Call, source: tuple[Arg | Out, TensorMeta], out: Alloc, dims: Sequence[Dim], tap: Any, kind: tuple[Any, ...]) -> Plan:
    """A plan of ``gather_kernel``: each element of ``out`` is a copy of one of ``source``, or 0."""
    ref, meta = source
    if meta.dtype not in TRITON:
        raise Decline(f"{meta.dtype} is not handled")
    rank = len(dims)
    metas = {ref: meta} if isinstance(ref, Arg) else {}
    n = out.meta.numel
    if n == 0:
        return Plan((out,), (), Out(0), metas, bytes=0)
    view = walk(out, rank, [meta])
    tile = choose_tile(view.rows, view.columns, 1, call.target)
    given = tuple([(s, 0, 0, d.parameters) for s, d in zip(spatial_strides(meta.stride, rank), reversed(dims))])
    constants = (("TAP", tap), ("KIND", kind), ("CHANNELS", view.channels), ("WIDE", view.wide),
                 ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    args = (Out(0), ref, *view.head(), view.steps(out.stride, rank), spatial_strides(out.stride, rank),
            view.steps(meta.stride, rank), given)
    moved = (n + min(n, meta.numel)) * out.dtype.itemsize
    return Plan((out,), (Launch(gather_kernel, view.grid(tile), args, Constants(constants), tile.warps),), Out(0), metas, bytes=moved)


def result(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Alloc:
    """A result in PyTorch's contiguous or channels-last format; a channels-last signal is an image of one row."""
    if channels_last and len(shape) == 3:
        batch, channel, _, step = channels_last_strides((*shape[:2], 1, shape[2])) or ()
        return Alloc(shape, (batch, channel, step), dtype)
    last = channels_last_strides(shape) if channels_last else None
    return Alloc(shape, last or contiguous_strides(shape), dtype)


def like_suggested(meta: TensorMeta, ndim: int | None = None) -> bool:
    """Whether PyTorch makes a result channels-last because ``meta`` is (only tensors of ``ndim`` dimensions, if given)."""
    return (ndim is None or meta.ndim == ndim) and suggests_channels_last(meta)
