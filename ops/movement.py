"""Data movement: cat, stack, repeat, flip, roll, triangles, pads, and the backward of views.

Three shapes of kernel:

- what is a view read in another order (``flip``, ``repeat``, ``tril``) is a plan of the pointwise engine;
- ``window_kernel`` fills a tensor from a window of it, ``out[i] = src[(i - low) / step]`` inside and another tensor or a
  constant outside (``constant_pad_nd``, ``slice_backward``, ``slice_scatter``...), in one pass over the output;
- ``cat_kernel`` copies many inputs side by side in one launch.

Source: the PyTorch documentation of each op and ``torch/_refs``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import channels_last_strides, preserved_strides
from gemsmode.ops.pointwise import LIMITS, Operand, build, convert, index_operand, power_of_2
from gemsmode.ops.promotion import ALL, result_type
from gemsmode.plan import Alloc, Arg, At, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

_SUPPORTED = dtype(*ALL)


def wrap_dim(dim: int, ndim: int) -> int:
    """``dim`` counted from the front.

    Raises:
        Decline: it is out of range (PyTorch raises).
    """
    ndim = max(ndim, 1)
    if not -ndim <= dim < ndim:
        raise Decline(f"PyTorch rejects it: dim {dim} is out of range for {ndim} dimensions")
    return dim % ndim


# -- views read in another order ---------------------------------------------------------------------------------------


@triton.jit
def same(self):
    return self


def read(call: Call, index: int, meta: TensorMeta | None = None, elements: int = 0) -> Operand:
    """The tensor argument ``index`` as an operand, through a view of it (``meta``, starting ``elements`` in)."""
    own = meta if meta is not None else call.args[index]
    return Operand(At(Arg(index), elements) if elements else Arg(index), own, own.dtype, own.dtype)


@planned("aten.flip.default", _SUPPORTED, family="movement", kernel=same)
def flip(call: Call) -> Plan:
    """Read with negative strides from the last element of each flipped dimension."""
    x, dims = call.args
    wrapped = [wrap_dim(d, x.ndim) for d in dims]
    if len(set(wrapped)) != len(wrapped):
        raise Decline("PyTorch rejects it: a dim appears twice")
    strides, start = list(x.stride), 0
    if x.shape:
        for d in wrapped:
            start += max(x.shape[d] - 1, 0) * strides[d]
            strides[d] = -strides[d]
    view = x._replace(stride=tuple(strides))
    return build(call, same, [read(call, 0, view, start)], [x.dtype], x.shape, preserved_strides(x))


@planned("aten.repeat.default", _SUPPORTED, family="movement", kernel=same)
def repeat(call: Call) -> Plan:
    """Read with a zero stride along the repetitions: the output is looked at as [r0, n0, r1, n1, ...]."""
    x, repeats = call.args
    if len(repeats) < x.ndim or any(r < 0 for r in repeats):
        raise Decline("PyTorch rejects it: fewer repeats than dimensions, or a negative one")
    lead = len(repeats) - x.ndim
    sizes = (1,) * lead + x.shape
    strides = (0,) * lead + x.stride
    shape = tuple(r * n for r, n in zip(repeats, sizes))
    inner_shape = tuple(v for pair in zip(repeats, sizes) for v in pair)
    inner_stride = tuple(v for s in strides for v in (0, s))
    plan = build(call, same, [read(call, 0, TensorMeta(x.dtype, inner_shape, inner_stride, x.device))], [x.dtype],
                 inner_shape, contiguous_strides(inner_shape))
    return plan._replace(allocs=(Alloc(shape, contiguous_strides(shape), x.dtype),), elementwise=False)


@triton.jit
def lower_triangle(self, row, column, diagonal):
    return tl.where(column <= row + diagonal, self, tl.zeros_like(self))


@triton.jit
def upper_triangle(self, row, column, diagonal):
    return tl.where(column >= row + diagonal, self, tl.zeros_like(self))


def _triangle(call: Call, function: object) -> Plan:
    x, _ = call.args
    if x.ndim < 2:
        raise Decline("PyTorch rejects it: it needs at least two dimensions")
    lead = (0,) * (x.ndim - 2)
    row, column = (index_operand(x.shape, (*lead, *w), torch.int32) for w in ((1, 0), (0, 1)))
    diagonal = Operand(Num(1, "i64"), None, torch.int64, torch.int64)
    return build(call, function, [read(call, 0), row, column, diagonal], [x.dtype], x.shape, contiguous_strides(x.shape))


@planned("aten.tril.default", _SUPPORTED, family="movement", kernel=lower_triangle)
def tril(call: Call) -> Plan:
    return _triangle(call, lower_triangle)


@planned("aten.triu.default", _SUPPORTED, family="movement", kernel=upper_triangle)
def triu(call: Call) -> Plan:
    return _triangle(call, upper_triangle)


# -- windows -----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A program's share of a tensor looked at as rows of its innermost dimension."""

    rows: int
    columns: int
    warps: int = 4


def choose_rows(rows: int, columns: int, itemsize: int, target: Target) -> Rows:
    """Blocks of about 32 bytes a thread; short rows share a program."""
    budget = 1 << 16 if target.interpreted else 128 * max(32 // itemsize, 1)
    x = min(power_of_2(columns), budget)
    return Rows(min(power_of_2(rows), max(budget // x, 1)), x)


@triton.jit
def window_kernel(outs, p_src, others, fill, n_rows, sizes, low, high, step, out_strides, src_strides, other_strides,
                  HAS_STEP: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[i] = src[(i - low) / step]`` for low <= i < high on the step in every dimension; else ``other[i]`` or ``fill``.

    sizes are the output's, innermost first; rows are all other dimensions together. Grid: (row blocks, column blocks).
    """
    i_y = tl.program_id(0)
    i_x = tl.program_id(1)
    if WIDE:
        i_y = i_y.to(tl.int64)
        i_x = i_x.to(tl.int64)
    y = i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    inside_x = (x >= low[0]) & (x < high[0])
    if HAS_STEP:
        inside_x = inside_x & ((x - low[0]) % step[0] == 0)
        o_src_x = ((x - low[0]) // step[0]) * src_strides[0]
    else:
        o_src_x = (x - low[0]) * src_strides[0]
    o_out_y = tl.zeros_like(y)
    o_src_y = tl.zeros_like(y)
    o_other_y = tl.zeros_like(y)
    inside_y = y < n_rows
    rest = y
    for d in tl.static_range(1, len(sizes)):
        i = rest % sizes[d]
        rest = rest // sizes[d]
        o_out_y += i * out_strides[d]
        inside_y = inside_y & (i >= low[d]) & (i < high[d])
        if HAS_STEP:
            inside_y = inside_y & ((i - low[d]) % step[d] == 0)
            o_src_y += ((i - low[d]) // step[d]) * src_strides[d]
        else:
            o_src_y += (i - low[d]) * src_strides[d]
        if len(others) == 1:
            o_other_y += i * other_strides[d]
    m = (y < n_rows)[:, None] & (x < sizes[0])[None, :]  # [BLOCK_Y, BLOCK_X]
    m_in = m & inside_y[:, None] & inside_x[None, :]
    b = tl.load(p_src + (o_src_y[:, None] + o_src_x[None, :]), mask=m_in)
    if len(others) == 1:
        b_other = tl.load(others[0] + (o_other_y[:, None] + (x * other_strides[0])[None, :]), mask=m & (m_in == 0))
    else:
        b_other = tl.cast(fill, b.dtype)
    tl.store(outs[0] + (o_out_y[:, None] + (x * out_strides[0])[None, :]), tl.where(m_in, b, b_other), mask=m)


def window(call: Call, source: Operand, shape: tuple[int, ...], out_stride: tuple[int, ...], low: Sequence[int],
           high: Sequence[int], step: Sequence[int], other: Operand | None = None, fill: Num | int = 0) -> Plan:
    """A plan of ``window_kernel``; ``source.meta`` has one stride for each dimension of ``shape``.

    low, high (exclusive) and step are in indices of the output, a number for each dimension.
    """
    assert source.meta is not None
    dtype = source.meta.dtype
    alloc = Alloc(shape, out_stride, dtype)
    n = alloc.meta.numel
    metas = {o.ref.ref if isinstance(o.ref, At) else o.ref: o.meta for o in (source, other) if o is not None}
    moved = n * dtype.itemsize * 2
    if n == 0:
        return Plan((alloc,), (), Out(0), metas, bytes=0)  # type: ignore[arg-type]
    sizes: list[int] = []
    table: list[list[int]] = []
    others = other.meta.stride if other is not None and other.meta is not None else (0,) * len(shape)
    for d in reversed(range(len(shape))):
        column = [low[d], high[d], step[d], out_stride[d], source.meta.stride[d], others[d]]
        whole = column[0] == 0 and column[1] == shape[d] and column[2] == 1
        if table and whole and table[-1][6] and all(table[-1][k] * sizes[-1] == column[k] for k in (3, 4, 5)):
            sizes[-1] *= shape[d]
            table[-1][1] = sizes[-1]
        else:
            sizes.append(shape[d])
            table.append([*column, int(whole)])
    if not sizes:
        sizes, table = [1], [[low[0] if low else 0, high[0] if high else 1, 1, 1, 1, 1, 1]]
    rows = n // sizes[0]
    tile = choose_rows(rows, sizes[0], dtype.itemsize, call.target)
    columns = list(zip(*table))

    def fields(k: int) -> tuple[int | Size, ...]:
        return (extent(columns[k][0]), *[Size(v) for v in columns[k][1:]])

    def strides(k: int) -> tuple[int | Size, ...]:
        return (columns[k][0], *[stride(v) for v in columns[k][1:]])

    has_step = any(s != 1 for s in columns[2])
    wide = max(n, source.meta.extent) >= 2**31 - 2**17
    args = ((Out(0),), source.ref, () if other is None else (other.ref,), fill, Size(rows),
            (extent(sizes[0]), *[Size(s) for s in sizes[1:]]), fields(0), fields(1), fields(2), strides(3), strides(4), strides(5))
    launch = Launch(window_kernel, (-(-rows // tile.rows), -(-sizes[0] // tile.columns), 1), args,
                    Constants((("HAS_STEP", has_step), ("WIDE", wide), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))), tile.warps)
    return Plan((alloc,), (launch,), Out(0), metas, bytes=moved)  # type: ignore[arg-type]


@planned("aten.constant_pad_nd.default", _SUPPORTED, family="movement", kernel=window_kernel)
def constant_pad_nd(call: Call) -> Plan:
    x, pad, value = call.args
    if len(pad) % 2 or len(pad) // 2 > x.ndim:
        raise Decline("PyTorch rejects it: the pad's length must be even and at most twice the number of dimensions")
    low = [0] * x.ndim
    shape = list(x.shape)
    for k in range(len(pad) // 2):
        d = x.ndim - 1 - k
        low[d] = pad[2 * k]
        shape[d] += pad[2 * k] + pad[2 * k + 1]
        if shape[d] < 0 or (shape[d] == 0 and x.shape[d] != 0):
            raise Decline("PyTorch rejects it, or the result is empty")
    if any(s == 0 for s in x.shape):
        raise Decline("an empty input")
    final = tuple(shape)
    last = channels_last_strides(final)
    if all(p <= 0 for p in pad):  # PyTorch copies what is left of the input, in its order of dimensions
        out_stride = preserved_strides(x._replace(shape=final))
    else:
        out_stride = last if last is not None and suggests_channels_last(x) else contiguous_strides(final)
    kind = "fp64" if x.dtype == torch.float64 else "fp32" if x.dtype.is_floating_point else "i64"
    fill = Num(2, kind, limits=LIMITS.get(x.dtype))
    if isinstance(value, float) and not x.dtype.is_floating_point and x.dtype != torch.bool:
        # torch.nn.functional.pad makes a float of any number: of -100 too, which pads labels.
        limits = torch.iinfo(x.dtype)
        fill = fill._replace(from_tensor=True, limits=(limits.min, limits.max))
    elif isinstance(value, complex) or (isinstance(value, float) and x.dtype == torch.bool):
        raise Decline("a fractional or complex fill")
    high = [lo + n for lo, n in zip(low, x.shape)]
    return window(call, read(call, 0), final, out_stride, low, high, [1] * x.ndim, fill=fill)


def suggests_channels_last(meta: TensorMeta) -> bool:
    """Whether PyTorch takes a tensor for ``channels_last`` by its strides (``Tensor.suggest_memory_format``)."""
    if len(meta.shape) not in (4, 5) or meta.stride[1] == 0:
        return False
    least = 0
    for d in (1, *range(meta.ndim - 1, 1, -1), 0):
        if meta.shape[d] == 0 or meta.stride[d] < least or (d == 0 and least == meta.stride[1]):
            return False
        least = meta.stride[d] * max(meta.shape[d], 1)
    return True


def _slice_bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    low = 0 if start is None else start + size if start < 0 else start
    high = size if end is None else end + size if end < 0 else end
    low = min(max(low, 0), size)
    return low, min(max(high, low), size)


def _from_slice(call: Call, index: int, shape: tuple[int, ...], dim: int, low: int, high: int, step: int,
                other: Operand | None = None, out_stride: tuple[int, ...] | None = None, keep_dim: bool = True) -> Plan:
    grad = call.args[index]
    lows, highs, steps = [0] * len(shape), list(shape), [1] * len(shape)
    lows[dim], highs[dim], steps[dim] = low, high, step
    own = grad.stride if keep_dim else grad.stride[:dim] + (0,) + grad.stride[dim:]
    expected = list(shape)
    expected[dim] = max(-(-(high - low) // step), 0)
    if grad.shape != tuple(expected if keep_dim else expected[:dim] + expected[dim + 1:]):
        raise Decline("PyTorch rejects it: the source's shape is not that of the slice")
    source = Operand(Arg(index), TensorMeta(grad.dtype, shape, own, grad.device), grad.dtype, grad.dtype)
    plan = window(call, source, shape, out_stride or contiguous_strides(shape), lows, highs, steps, other)
    return plan._replace(metas={**plan.metas, Arg(index): grad})


@planned("aten.slice_backward.default", _SUPPORTED, family="movement", kernel=window_kernel)
def slice_backward(call: Call) -> Plan:
    _, sizes, dim, start, end, step = call.args
    dim = wrap_dim(dim, len(sizes))
    low, high = _slice_bounds(sizes[dim], start, end)
    return _from_slice(call, 0, tuple(sizes), dim, low, high, step)


@planned("aten.select_backward.default", _SUPPORTED, family="movement", kernel=window_kernel)
def select_backward(call: Call) -> Plan:
    _, sizes, dim, index = call.args
    dim = wrap_dim(dim, len(sizes))
    index = index + sizes[dim] if index < 0 else index
    return _from_slice(call, 0, tuple(sizes), dim, index, index + 1, 1, keep_dim=False)


@planned("aten.slice_scatter.default", _SUPPORTED, family="movement", kernel=window_kernel)
def slice_scatter(call: Call) -> Plan:
    x, src, dim, start, end, step = call.args
    dim = wrap_dim(dim, x.ndim)
    if src.dtype != x.dtype:
        raise Decline(f"the source is {src.dtype}, the tensor {x.dtype}")
    low, high = _slice_bounds(x.shape[dim], start, end)
    return _from_slice(call, 1, x.shape, dim, low, high, step, read(call, 0), _scatter_strides(x))


@planned("aten.select_scatter.default", _SUPPORTED, family="movement", kernel=window_kernel)
def select_scatter(call: Call) -> Plan:
    x, src, dim, index = call.args
    if x.ndim == 0:
        raise Decline("PyTorch rejects it: a 0-dim tensor has nothing to select from")
    dim = wrap_dim(dim, x.ndim)
    if src.dtype != x.dtype:
        raise Decline(f"the source is {src.dtype}, the tensor {x.dtype}")
    if not -x.shape[dim] <= index < x.shape[dim]:
        raise Decline("PyTorch rejects it: the index is out of range")
    index %= x.shape[dim]
    return _from_slice(call, 1, x.shape, dim, index, index + 1, 1, read(call, 0), _scatter_strides(x), keep_dim=False)


def _scatter_strides(x: TensorMeta) -> tuple[int, ...]:
    """The strides of the clone that PyTorch writes the slice into: those of ``x``, if it may be copied as it lies."""
    if x.may_overlap_itself:
        return contiguous_strides(x.shape)
    if not x.is_contiguous and x.extent != x.numel:
        raise Decline("the tensor has gaps in memory, which PyTorch's result keeps")
    return x.stride


# -- cat ---------------------------------------------------------------------------------------------------------------


MAX_PARTS = 16
"""Inputs of one launch of ``cat_kernel``; longer lists take several."""


@triton.jit
def _copy_part(p_out, p_in, i_program, size_x, n_rows, sizes, in_strides, out_strides, WIDE: tl.constexpr,
               BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    tiles_x = tl.cdiv(size_x, BLOCK_X)
    i_y = i_program // tiles_x
    i_x = i_program % tiles_x
    if WIDE:
        i_y = i_y.to(tl.int64)
        i_x = i_x.to(tl.int64)
    y = i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    o_in = tl.zeros_like(y)
    o_out = tl.zeros_like(y)
    rest = y
    for d in tl.static_range(len(sizes)):
        i = rest % sizes[d]
        rest = rest // sizes[d]
        o_in += i * in_strides[d + 1]
        o_out += i * out_strides[d + 1]
    m = (y < n_rows)[:, None] & (x < size_x)[None, :]  # [BLOCK_Y, BLOCK_X]
    b = tl.load(p_in + (o_in[:, None] + (x * in_strides[0])[None, :]), mask=m)
    tl.store(p_out + (o_out[:, None] + (x * out_strides[0])[None, :]), convert(b, p_out.dtype.element_ty), mask=m)


@triton.jit
def cat_kernel(outs, ins, first, sizes_x, rows, sizes, in_strides, out_strides, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr,
               BLOCK_X: tl.constexpr):
    """Copies each of ``ins`` to its place ``outs``; programs ``first[k]`` to ``first[k + 1]`` take input k."""
    i_program = tl.program_id(0)
    for k in tl.static_range(len(ins)):
        if (i_program >= first[k]) & (i_program < first[k + 1]):
            _copy_part(outs[k], ins[k], i_program - first[k], sizes_x[k], rows[k], sizes[k], in_strides[k], out_strides[k],
                       WIDE, BLOCK_Y, BLOCK_X)


def _parts_plan(call: Call, parts: Sequence[tuple[Arg, TensorMeta]], alloc: Alloc, starts: Sequence[int]) -> Plan:
    """Copy each of ``parts`` to the window of ``alloc`` that begins ``starts`` elements in; shapes are the windows'."""
    target = call.target
    launches = []
    merged = []
    for (ref, meta), start in zip(parts, starts):
        # Dimensions innermost first; runs that lie alike in both are one dimension.
        sizes: list[int] = []
        from_strides: list[int] = []
        to_strides: list[int] = []
        for size, here, there in zip(meta.shape[::-1], meta.stride[::-1], alloc.stride[::-1]):
            if size == 1:
                continue
            if sizes and here == from_strides[-1] * sizes[-1] and there == to_strides[-1] * sizes[-1]:
                sizes[-1] *= size
            else:
                sizes.append(size)
                from_strides.append(here)
                to_strides.append(there)
        if not sizes:
            sizes, from_strides, to_strides = [1], [1], [1]
        x, *rest = sizes
        merged.append(Part(ref, start, x, rest, math.prod(rest), _outer(from_strides), _outer(to_strides)))
    out_itemsize = itemsize = alloc.dtype.itemsize
    moved, largest = 0, math.prod(alloc.shape)
    for _, meta in parts:
        itemsize = max(itemsize, meta.dtype.itemsize)
        moved += meta.numel * (meta.dtype.itemsize + out_itemsize)
        largest = max(largest, meta.extent)
    wide = largest >= 2**31 - 2**17
    for at in range(0, len(merged), MAX_PARTS):
        group = merged[at:at + MAX_PARTS]
        tile = choose_rows(max([p.rows for p in group]), max([p.x for p in group]), itemsize, target)
        programs = 0
        first = [Size(0)]
        for p in group:
            programs += -(-p.rows // tile.rows) * -(-p.x // tile.columns)
            first.append(Size(programs))
        args = (tuple([At(Out(0), p.start) if p.start else Out(0) for p in group]), tuple([p.ref for p in group]),
                tuple(first), tuple([extent(p.x) for p in group]),
                tuple([Size(p.rows) for p in group]), tuple([tuple([Size(s) for s in p.sizes]) for p in group]),
                tuple([p.from_strides for p in group]), tuple([p.to_strides for p in group]))
        launches.append(Launch(cat_kernel, (programs, 1, 1), args, _cat_constants(wide, tile.rows, tile.columns), tile.warps))
    return Plan((alloc,), tuple(launches), Out(0), dict(parts), bytes=moved)


class Part(NamedTuple):
    """An input of ``cat_kernel``: where it goes, its merged dimensions (x is the innermost) and their strides here and there."""

    ref: Arg
    start: int
    x: int
    sizes: list[int]
    rows: int
    from_strides: tuple[int | Size, ...]
    to_strides: tuple[int | Size, ...]


def _outer(strides: list[int]) -> tuple[int | Size, ...]:
    """Strides as an argument, of which the innermost is specialized as any integer."""
    return (strides[0], *[stride(s) for s in strides[1:]])


@functools.cache
def _cat_constants(wide: bool, rows: int, columns: int) -> Constants:
    return Constants((("WIDE", wide), ("BLOCK_Y", rows), ("BLOCK_X", columns)))


@planned("aten.cat.default", _SUPPORTED, family="movement", kernel=cat_kernel)
def cat(call: Call) -> Plan:
    """All inputs in one launch. Source: ``torch.cat``."""
    tensors, dim = call.args
    # A one-dimensional empty tensor is skipped whatever the others' shapes, as PyTorch does.
    given = [(Arg(0, i), t) for i, t in enumerate(tensors) if t.shape != (0,)]
    if not given:
        raise Decline("only empty tensors, or none")
    ndim = given[0][1].ndim
    if ndim == 0:
        raise Decline("PyTorch rejects it: 0-dim tensors cannot be concatenated")
    dim = wrap_dim(dim, ndim)
    first = given[0][1].shape
    before, after = first[:dim], first[dim + 1:]
    length = 0
    for _, t in given:
        if len(t.shape) != ndim or t.shape[:dim] != before or t.shape[dim + 1:] != after:
            raise Decline("PyTorch rejects it: the shapes differ in another dimension than dim")
        length += t.shape[dim]
    out_dtype = result_type(tensors)
    shape = (*before, length, *after)
    last = channels_last_strides(shape) if all(suggests_channels_last(t) for _, t in given) else None
    strides = contiguous_strides(shape) if last is None else last
    alloc = Alloc(shape, strides, out_dtype)
    parts, starts, start = [], [], 0
    for ref, t in given:
        if t.numel:
            parts.append((ref, t))
            starts.append(start * strides[dim])
        start += t.shape[dim]
    if not parts:
        return Plan((alloc,), (), Out(0), {}, bytes=0)
    return _parts_plan(call, parts, alloc, starts)


@planned("aten.stack.default", _SUPPORTED, family="movement", kernel=cat_kernel)
def stack(call: Call) -> Plan:
    """As ``cat`` of the inputs with a new dimension. Source: ``torch.stack``."""
    tensors, dim = call.args
    if not tensors:
        raise Decline("PyTorch rejects it: no tensors")
    first = tensors[0]
    if any(t.shape != first.shape for t in tensors):
        raise Decline("PyTorch rejects it: the shapes differ")
    dim = wrap_dim(dim, first.ndim + 1)
    shape = first.shape[:dim] + (len(tensors),) + first.shape[dim:]
    strides = contiguous_strides(shape)
    if dim < first.ndim and first.numel and all(suggests_channels_last(t) for t in tensors):
        # PyTorch views what its cat along dim returns.
        whole = first.shape[:dim] + (len(tensors) * first.shape[dim],) + first.shape[dim + 1:]
        last = channels_last_strides(whole)
        if last is not None:
            strides = torch.empty_strided(whole, last, device="meta").view(shape).stride()
    alloc = Alloc(shape, strides, result_type(tensors))
    parts = [(Arg(0, i), t._replace(shape=t.shape[:dim] + (1,) + t.shape[dim:], stride=t.stride[:dim] + (0,) + t.stride[dim:]))
             for i, t in enumerate(tensors)]
    if alloc.meta.numel == 0:
        return Plan((alloc,), (), Out(0), {}, bytes=0)
    return _parts_plan(call, parts, alloc, [i * alloc.stride[dim] for i in range(len(tensors))])


@planned("aten.roll.default", _SUPPORTED, family="movement", kernel=cat_kernel)
def roll(call: Call) -> Plan:
    """Along one dimension a roll is a ``cat`` of the two halves. Source: ``torch.roll``."""
    x, shifts, dims = call.args
    if len(shifts) != 1 or len(dims) > 1:
        raise Decline("rolls along several dimensions at once")
    if not dims and x.ndim != 1 and not x.is_contiguous:
        raise Decline("a flattened roll of a tensor that is not contiguous")
    alloc = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    if x.numel == 0:
        return Plan((alloc,), (), Out(0), {}, bytes=0)
    view = x if dims else TensorMeta(x.dtype, (x.numel,), x.stride if x.ndim == 1 else (1,), x.device)
    if view.ndim == 0:
        raise Decline("a 0-dim tensor")
    dim = wrap_dim(dims[0], x.ndim) if dims else 0
    n = view.shape[dim]
    shift = shifts[0] % n
    target = Alloc(view.shape, contiguous_strides(view.shape), x.dtype)
    # The first n - shift elements go behind the last shift ones; both parts are views of the one input.
    pieces = [(size, source, place) for size, source, place in ((n - shift, 0, shift), (shift, n - shift, 0)) if size]
    metas = [view._replace(shape=view.shape[:dim] + (size,) + view.shape[dim + 1:]) for size, _, _ in pieces]
    plan = _parts_plan(call, [(Arg(0), m) for m in metas], target, [place * target.stride[dim] for _, _, place in pieces])
    step = plan.launches[0]
    ins = tuple([At(Arg(0), source * view.stride[dim]) if source else Arg(0) for _, source, _ in pieces])
    return plan._replace(allocs=(alloc,), metas={Arg(0): x}, launches=(step._replace(args=(step.args[0], ins, *step.args[2:])),))


# -- diagonals ---------------------------------------------------------------------------------------------------------


def _onto_diagonal(call: Call, shape: tuple[int, ...], offset: int, dim1: int, dim2: int) -> Plan:
    """``shape`` filled with zeros but for its diagonal, which is the first argument (its last dimension runs along it)."""
    x = call.args[0]
    alloc = Alloc(shape, contiguous_strides(shape), x.dtype, zero=True)
    row, column = max(-offset, 0), max(offset, 0)
    length = max(min(shape[dim1] - row, shape[dim2] - column), 0)
    outer = [d for d in range(len(shape)) if d not in (dim1, dim2)]
    if x.shape != (*[shape[d] for d in outer], length):
        raise Decline("PyTorch rejects it: the source's shape is not that of the diagonal")
    if x.numel == 0:
        return Plan((alloc,), (), Out(0), {}, bytes=0)
    along = (*[alloc.stride[d] for d in outer], alloc.stride[dim1] + alloc.stride[dim2])
    plan = _parts_plan(call, [(Arg(0), x)], Alloc(x.shape, along, x.dtype), [row * alloc.stride[dim1] + column * alloc.stride[dim2]])
    return plan._replace(allocs=(alloc,))


@planned("aten.diagonal_backward.default", _SUPPORTED, family="movement", kernel=cat_kernel)
def diagonal_backward(call: Call) -> Plan:
    _, sizes, offset, dim1, dim2 = call.args
    return _onto_diagonal(call, tuple(sizes), offset, wrap_dim(dim1, len(sizes)), wrap_dim(dim2, len(sizes)))


@planned("aten.diag_embed.default", _SUPPORTED, family="movement", kernel=cat_kernel)
def diag_embed(call: Call) -> Plan:
    """Source: ``torch.diag_embed``."""
    x, offset, dim1, dim2 = call.args
    if x.ndim == 0:
        raise Decline("PyTorch rejects it: a 0-dim tensor")
    dim1, dim2 = wrap_dim(dim1, x.ndim + 1), wrap_dim(dim2, x.ndim + 1)
    if dim1 == dim2:
        raise Decline("PyTorch rejects it: the two dimensions are the same")
    side = x.shape[-1] + abs(offset)
    shape = list(x.shape[:-1])
    for d in sorted((dim1, dim2)):
        shape.insert(d, side)
    # Native allocates the result with its diagonal dimensions last and hands out a view of it.
    if (dim1, dim2) != (x.ndim - 1, x.ndim):
        raise Decline("diagonal dimensions other than the last two")
    return _onto_diagonal(call, tuple(shape), offset, dim1, dim2)
