"""Reading by index: embedding and its backward, index_select, gather, index, take.

Every index is checked on the device (``tl.device_assert``, as PyTorch's kernels do): an index out of range stops the
program instead of reading elsewhere. Writing by index is in ``scatter.py``, masks in ``select.py``.

What limits these kernels is the number of 32-byte sectors that they ask of the L2 cache:

- ``index_kernel`` takes programs in the order in which they revisit memory. Where the index chooses within rows, all
  columns of a row come first; where it chooses rows, all rows of a strip of columns.
- ``gather_kernel``, where the index chooses within rows that fit in shared memory, reads each row once, in order, and
  picks from there.

Source: ``torch.nn.functional.embedding``, ``torch.index_select``, ``torch.gather``; NumPy's advanced indexing, which
``Tensor.__getitem__`` follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import broadcast_shape, broadcast_strides, output_strides
from gemsmode.ops.movement import Rows, choose_rows, same, wrap_dim
from gemsmode.ops.pointwise import _strided, power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, opmath
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

INDEX = (torch.int32, torch.int64)
WIDE = 2**31 - 2**17

CHECK, WRAP, CLAMP = 0, 1, 2
"""What is done with an index outside of [0, size): a device assertion; the same after counting negative ones from the end;
negative ones count from the end and what is still outside is moved to the nearest place."""

# -- offsets -----------------------------------------------------------------------------------------------------------


@triton.jit
def row_offset(y, sizes, strides):
    """The offset of row y, taken apart into all dimensions but the innermost."""
    o = tl.zeros_like(y)
    rest = y
    for d in tl.static_range(1, len(sizes)):
        o += (rest % sizes[d]) * strides[d]
        rest = rest // sizes[d]
    return o


@triton.jit
def offsets(y, x, sizes, strides):
    return row_offset(y, sizes, strides)[:, None] + (x * strides[0])[None, :]  # [BLOCK_Y, BLOCK_X]


@triton.jit
def block(n_rows, sizes, tiles, COLUMNS_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Rows, columns and mask of this program. ``tiles``: blocks along a row (COLUMNS_FIRST) or along a column."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    if COLUMNS_FIRST:
        i_y, i_x = i // tiles, i % tiles
    else:
        i_y, i_x = i % tiles, i // tiles
    y = i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    return y, x, y < n_rows, x < sizes[0]


@triton.jit
def chosen(p_index, o, m, limit, OUTSIDE: tl.constexpr, WIDE: tl.constexpr):
    """The indices at ``o``, checked, in the integer type that offsets have."""
    b = tl.load(p_index + o, mask=m, other=0)
    if OUTSIDE != 0:
        b = tl.where(b < 0, b + limit, b)
    if OUTSIDE == 2:
        b = tl.minimum(tl.maximum(b, 0), limit - 1)
    else:
        tl.device_assert((m & ((b < 0) | (b >= limit))) == 0, "index out of bounds")
    return b.to(tl.int64) if WIDE else b.to(tl.int32)


@triton.jit
def indexed(o_y, x, x_stride, m_y, m, y, sizes, indices, limits, steps, index_strides, INNER: tl.constexpr, OUTSIDE: tl.constexpr,
            WIDE: tl.constexpr):
    """Offsets of a block: ``o_y`` of its rows, ``x * x_stride`` of its columns, and what the indices choose. INNER: which of
    them vary along a row; the others are read once a row, and neighbouring columns stay neighbours."""
    for j in tl.static_range(len(indices)):
        if not INNER[j]:
            o_y += chosen(indices[j], row_offset(y, sizes, index_strides[j]), m_y, limits[j], OUTSIDE, WIDE) * steps[j]
    o = o_y[:, None] + (x * x_stride)[None, :]
    for j in tl.static_range(len(indices)):
        if INNER[j]:
            o += chosen(indices[j], offsets(y, x, sizes, index_strides[j]), m, limits[j], OUTSIDE, WIDE) * steps[j]
    return o


class Loop(NamedTuple):
    """The dimensions that an indexed op goes over, and the strides of each operand along them, outermost first.

    Attributes:
        shape: their sizes.
        operands: strides of the operands; those of the indices come last.
    """

    shape: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...]


class Merged(NamedTuple):
    """A loop after merging dimensions: sizes and each operand's strides, innermost first."""

    sizes: list[int]
    operands: list[list[int]]

    @property
    def rows(self) -> int:
        n = 1
        for size in self.sizes[1:]:
            n *= size
        return n

    def arguments(self) -> tuple[tuple[Any, ...], list[tuple[Any, ...]]]:
        """Sizes and strides as kernel arguments."""
        return ((extent(self.sizes[0]), *[Size(s) for s in self.sizes[1:]]),
                [(column[0], *[stride(s) for s in column[1:]]) for column in self.operands])


def merged(loop: Loop, keep_innermost: bool = False) -> Merged:
    """``loop`` with dimensions merged along which every operand runs on; with its innermost dimension alone, if asked."""
    sizes: list[int] = []
    table: list[list[int]] = []
    last = len(loop.shape) - 1
    for d in range(last, -1, -1):
        if loop.shape[d] == 1 and not (keep_innermost and d == last):
            continue
        column = [s[d] for s in loop.operands]
        fits = sizes and all(a * sizes[-1] == b for a, b in zip(table[-1], column))
        if fits and not (keep_innermost and len(sizes) == 1):
            sizes[-1] *= loop.shape[d]
        else:
            sizes.append(loop.shape[d])
            table.append(column)
    if not sizes:
        sizes, table = [1], [[0] * len(loop.operands)]
    return Merged(sizes, [list(column) for column in zip(*table)])


def is_wide(*metas: Any) -> bool:
    """Whether the elements of one of these reach past 32-bit offsets."""
    return any(m.extent >= WIDE for m in metas)


class Grid(NamedTuple):
    """How programs share a merged loop: the launch grid, the argument ``tiles`` and the constants of :func:`block`."""

    programs: tuple[int, int, int]
    tiles: Size
    constants: tuple[tuple[str, Any], ...]
    warps: int


STRIP = 256
"""Columns of a block whose elements are each in a row of their own choice: so many columns of a large matrix stay in the L2
cache, where the neighbours of a 32-byte sector find it again."""


def share(rows: int, columns: int, itemsize: int, target: Target, columns_first: bool, wide: bool, strips: bool = False) -> Grid:
    tile = choose_rows(rows, columns, itemsize, target)
    if strips and tile.columns > STRIP and not target.interpreted:
        tile = Rows(min(power_of_2(rows), tile.columns // STRIP), STRIP, tile.warps)
    along, down = -(-columns // tile.columns), -(-rows // tile.rows)
    constants = (("COLUMNS_FIRST", columns_first), ("WIDE", wide), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    return Grid((along * down, 1, 1), Size(along if columns_first else down), constants, tile.warps)


Chosen = tuple[Any, TensorMeta, int, tuple[int, ...]]
"""An index: its reference, metadata, the dimension that it chooses in, and its strides over the loop."""


def copied(target: Target, source: Any, meta: TensorMeta, dest: Any, dest_stride: tuple[int, ...], function: Any = same,
           compute: torch.dtype | None = None, itemsize: int = 8) -> tuple[Launch, ...]:
    """A launch that writes ``function`` of a tensor (itself, by default) to ``dest``, converted to its dtype; none if empty."""
    if meta.numel == 0:
        return ()
    kinds = ((0, meta.dtype, compute or meta.dtype),)
    return (_strided(target, function, kinds, (dest,), (source,), [dest_stride], [meta], meta.shape, meta.numel, itemsize),)


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def index_kernel(p_out, p_x, masks, fill, indices, limits, steps, tiles, n_rows, sizes, out_strides, x_strides, mask_strides, index_strides,
                 INNER: tl.constexpr, OUTSIDE: tl.constexpr, COLUMNS_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr,
                 BLOCK_X: tl.constexpr):
    """``out[c] = x[c, with the indexed coordinates read from the indices]``, where a mask (if given) is true; else ``fill``.

    Rows are all dimensions but the innermost together. Grid: blocks of rows and columns.
    """
    y, x, m_y, m_x = block(n_rows, sizes, tiles, COLUMNS_FIRST, WIDE, BLOCK_Y, BLOCK_X)
    m = m_y[:, None] & m_x[None, :]  # [BLOCK_Y, BLOCK_X]
    o = indexed(row_offset(y, sizes, x_strides), x, x_strides[0], m_y, m, y, sizes, indices, limits, steps, index_strides, INNER,
                OUTSIDE, WIDE)
    if len(masks) == 1:
        m_in = m & (tl.load(masks[0] + offsets(y, x, sizes, mask_strides), mask=m, other=0) != 0)
        b = tl.load(p_x + o, mask=m_in)
        b = tl.where(m_in, b, tl.cast(fill, b.dtype))
    else:
        b = tl.load(p_x + o, mask=m)
    tl.store(p_out + offsets(y, x, sizes, out_strides), b, mask=m)


@triton.jit
def gather_kernel(p_out, p_x, p_index, limit, tiles, n_rows, sizes, out_strides, x_strides, index_strides, WIDE: tl.constexpr,
                  BLOCK_Y: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[r, c] = x[r, index[r, c]]`` with a whole row of x at hand. Grid: blocks of rows by blocks of columns."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    y = (i // tiles) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = (i % tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    c = tl.arange(0, BLOCK_L)
    m_y = y < n_rows
    m = m_y[:, None] & (x < sizes[0])[None, :]  # [BLOCK_Y, BLOCK_X]
    b_index = tl.load(p_index + offsets(y, x, sizes, index_strides), mask=m, other=0)
    tl.device_assert((m & ((b_index < 0) | (b_index >= limit))) == 0, "index out of bounds")
    # Read after the indices are checked and short: the registers of both at once would leave room for half as many programs.
    row = tl.load(p_x + (row_offset(y, sizes, x_strides)[:, None] + c[None, :]), mask=m_y[:, None] & (c < limit)[None, :])
    # As vectors: Triton gathers from these through shared memory, from matrices by exchanges within a warp.
    place = b_index.to(tl.int32) + (tl.arange(0, BLOCK_Y) * BLOCK_L)[:, None]
    b = tl.gather(tl.reshape(row, (BLOCK_Y * BLOCK_L,)), tl.reshape(place, (BLOCK_Y * BLOCK_X,)), 0)
    tl.store(p_out + offsets(y, x, sizes, out_strides), tl.reshape(b, (BLOCK_Y, BLOCK_X)), mask=m)


@dataclass(frozen=True)
class Staged:
    """Rows and columns of a program of ``gather_kernel``, the length that its rows are padded to, and its warps."""

    rows: int
    columns: int
    length: int
    warps: int


STAGED_ELEMENTS = 16384
"""The longest row that a program holds; at this length a thread of 1024 holds 16 values and 16 indices."""
STAGED_BYTES = 1 << 16
"""Shared memory for rows; every GPU has it, and an H100 has room for three such programs a multiprocessor."""


def choose_staged(rows: int, columns: int, length: int, itemsize: int, target: Target) -> Staged | None:
    """The launch choice of ``gather_kernel``, or None where rows are too long or too few of their elements are read.

    A read by index moves a sector of 32 bytes; a row is worth reading whole once its sectors are about as many as the reads.
    """
    padded = power_of_2(length)
    if padded * itemsize > STAGED_BYTES or padded > STAGED_ELEMENTS or length * itemsize > 32 * columns or padded < 32:
        return None
    if target.interpreted:
        x = min(power_of_2(columns), 1 << 16)
        return Staged(min(power_of_2(rows), max((1 << 16) // max(x, padded), 1)), x, padded, 4)
    x = min(power_of_2(columns), max(padded, 1024))
    y = min(power_of_2(rows), max(2048 // max(x, padded), 1))
    widest = y * max(x, padded)
    return Staged(y, x, padded, 4 if widest <= 2048 else 8 if widest <= 4096 else 1024 // target.warp_size if widest > 8192 else
                  512 // target.warp_size)


def read_by_index(call: Call, x: tuple[Any, TensorMeta], shape: tuple[int, ...], out_stride: tuple[int, ...], own: Sequence[int],
                  refs: Sequence[Chosen], limits: Sequence[int], steps: Sequence[int], outside: int,
                  mask: tuple[Any, TensorMeta, tuple[int, ...]] | None = None, fill: Any = 0,
                  out: int = 0) -> tuple[Alloc, tuple[Launch, ...]]:
    """The allocation, number ``out`` of the plan, and the launches of a result of ``shape`` read from ``x`` (a reference and
    its metadata). ``own``: strides of x over the result, 0 along what only indices choose."""
    ref, meta = x
    alloc = Alloc(shape, out_stride, meta.dtype)
    n = alloc.meta.numel
    if n == 0:
        return alloc, ()
    masks = () if mask is None else (mask[0],)
    wide = is_wide(meta, alloc.meta, *[m for _, m, *_ in refs], *([] if mask is None else [mask[1]]))
    if len(refs) == 1 and steps[0] == 1 and outside == CHECK and mask is None and refs[0][3] and refs[0][3][-1] != 0:
        plain = merged(Loop(shape, (out_stride, tuple(own), refs[0][3])), keep_innermost=True)
        staged = choose_staged(plain.rows, plain.sizes[0], limits[0], meta.dtype.itemsize, call.target)
        # The row that is held must be the same for all columns.
        if staged is not None and plain.operands[1][0] == 0:
            sizes, strides = plain.arguments()
            tiles = -(-plain.sizes[0] // staged.columns)
            constants = Constants((("WIDE", wide), ("BLOCK_Y", staged.rows), ("BLOCK_L", staged.length), ("BLOCK_X", staged.columns)))
            return alloc, (Launch(gather_kernel, (-(-plain.rows // staged.rows) * tiles, 1, 1),
                                  (Out(out), ref, refs[0][0], extent(limits[0]), Size(tiles), Size(plain.rows), sizes, *strides),
                                  constants, staged.warps, asserts=True),)
    operands = (out_stride, tuple(own), tuple(mask[2]) if mask else (0,) * len(shape), *[s for *_, s in refs])
    loop = merged(Loop(shape, operands))
    sizes, strides = loop.arguments()
    inner = tuple(bool(column[0]) for column in loop.operands[3:])
    columns_first = any(inner) and min(steps) <= max(loop.operands[1][0], 1)
    grid = share(loop.rows, loop.sizes[0], meta.dtype.itemsize, call.target, columns_first, wide, any(inner) and not columns_first)
    args = (Out(out), ref, masks, fill, tuple(r for r, *_ in refs), tuple(Size(v) for v in limits), tuple(stride(s) for s in steps),
            grid.tiles, Size(loop.rows), sizes, *strides[:3], tuple(strides[3:]))
    constants = Constants((("INNER", inner), ("OUTSIDE", outside), *grid.constants))
    return alloc, (Launch(index_kernel, grid.programs, args, constants, grid.warps, asserts=True),)


def _plan(call: Call, x: tuple[int, TensorMeta], shape: tuple[int, ...], out_stride: tuple[int, ...], own: Sequence[int],
          refs: Sequence[Chosen], limits: Sequence[int], steps: Sequence[int], outside: int) -> Plan:
    at, meta = x
    alloc, launches = read_by_index(call, (Arg(at), meta), shape, out_stride, own, refs, limits, steps, outside)
    metas = {Arg(at): meta, **{ref: m for ref, m, *_ in refs}}
    moved = 2 * alloc.meta.numel * meta.dtype.itemsize + sum(m.numel * m.dtype.itemsize for _, m, *_ in refs)
    return Plan((alloc,), launches, Out(0), metas, bytes=moved)


@planned("aten.embedding.default", [dtype(*ALL, arg="weight"), dtype(*INDEX, arg="indices")], family="indexing", kernel=index_kernel)
def embedding(call: Call) -> Plan:
    """weight [V, D], indices [...] -> [..., D]."""
    weight, indices = call.args[:2]
    if weight.ndim != 2:
        raise Decline("PyTorch rejects it: the weight must have two dimensions")
    shape = (*indices.shape, weight.shape[1])
    return _plan(call, (0, weight), shape, contiguous_strides(shape), (*(0,) * indices.ndim, weight.stride[1]),
                 [(Arg(1), indices, 0, (*indices.stride, 0))], [weight.shape[0]], [weight.stride[0]], CHECK)


@planned("aten.index_select.default", [dtype(*ALL, arg="self"), dtype(*INDEX, arg="index")], family="indexing", kernel=index_kernel)
def index_select(call: Call) -> Plan:
    """self [..., N, ...], dim, index [K] -> [..., K, ...]; a 0-dim self counts as one element, and stays 0-dim."""
    x, dim, index = call.args
    if index.ndim > 1:
        raise Decline("PyTorch rejects it: an index of several dimensions")
    dim = wrap_dim(dim, x.ndim)
    if x.ndim == 0:
        if index.numel != 1:
            raise Decline("PyTorch rejects it: several elements of a 0-dim tensor")
        return _plan(call, (0, x), (), (), (), [(Arg(2), index, 0, ())], [1], [1], CHECK)
    shape = (*x.shape[:dim], index.numel, *x.shape[dim + 1:])
    own = [0 if d == dim else s for d, s in enumerate(x.stride)]
    along = tuple((index.stride[0] if index.ndim else 0) if d == dim else 0 for d in range(x.ndim))
    return _plan(call, (0, x), shape, contiguous_strides(shape), own, [(Arg(2), index, dim, along)], [x.shape[dim]], [x.stride[dim]], CHECK)


@planned("aten.gather.default", [dtype(*ALL, arg="self"), dtype(*INDEX, arg="index")], family="indexing", kernel=gather_kernel)
def gather(call: Call) -> Plan:
    """self and index of one rank -> the shape of index."""
    x, dim, index, _ = call.args
    dim = wrap_dim(dim, x.ndim)
    if x.ndim == 0 and index.numel <= 1 and index.ndim <= 1:
        return _plan(call, (0, x), index.shape, contiguous_strides(index.shape), (0,) * index.ndim, [(Arg(2), index, 0, index.stride)], [1],
                     [1], CHECK)
    if x.ndim != index.ndim:
        raise Decline("PyTorch rejects it, or one of the tensors is 0-dim: ranks that differ")
    if any(i > n for d, (i, n) in enumerate(zip(index.shape, x.shape)) if d != dim):
        raise Decline("PyTorch rejects it: the index is larger than the tensor in another dimension than dim")
    own = [0 if d == dim else s for d, s in enumerate(x.stride)]
    return _plan(call, (0, x), index.shape, contiguous_strides(index.shape), own, [(Arg(2), index, dim, index.stride)], [x.shape[dim]],
                 [x.stride[dim]], CHECK)


@planned("aten.take.default", [dtype(*ALL, arg="self"), dtype(torch.int64, arg="index")], family="indexing", kernel=index_kernel)
def take(call: Call) -> Plan:
    """Elements of self, counted as if it were flat, at ``index``; negative ones count from the end."""
    x, index = call.args
    if x.numel == 0 and index.numel:
        raise Decline("PyTorch rejects it: an empty tensor has no elements to take")
    source, allocs, launches = contiguous(call, 0, 1)
    flat = TensorMeta(x.dtype, (x.numel,), (1,), x.device)
    alloc, reading = read_by_index(call, (source, flat), index.shape, contiguous_strides(index.shape), (0,) * index.ndim,
                                   [(Arg(1), index, 0, index.stride)], [x.numel], [1], WRAP)
    moved = 2 * index.numel * x.dtype.itemsize + index.numel * 8
    return Plan((alloc, *allocs), launches + reading, Out(0), {Arg(0): x, Arg(1): index}, bytes=moved)


def contiguous(call: Call, arg: int | Arg, out: int,
               shape: tuple[int, ...] | None = None) -> tuple[Any, tuple[Alloc, ...], tuple[Launch, ...]]:
    """A reference to the elements of an argument (its number, or an item of a list), expanded to ``shape``, in order and without
    gaps: to itself, or to a copy of it as the plan's allocation number ``out``, with the launch that makes it."""
    ref = arg if isinstance(arg, Arg) else Arg(arg)
    x = call.args[ref.index] if ref.item is None else call.args[ref.index][ref.item]
    wanted = x.shape if shape is None else shape
    seen = TensorMeta(x.dtype, wanted, broadcast_strides(x, wanted), x.device)
    if seen.is_contiguous:
        return ref, (), ()
    alloc = Alloc(wanted, contiguous_strides(wanted), x.dtype)
    return Out(out), (alloc,), copied(call.target, ref, seen, Out(out), alloc.stride, itemsize=x.dtype.itemsize)


# -- indexing with several tensors -------------------------------------------------------------------------------------


class Given(NamedTuple):
    """An index as a tensor of integers: what it chooses in, where it is, and its metadata."""

    dim: int
    ref: Any
    meta: TensorMeta


def given_indices(x: TensorMeta, indices: Sequence[Any], first: int) -> list[Given]:
    """The integer indices of the list that is argument number ``first``.

    Raises:
        Decline: there are too many, or none, or of a kind that is not handled here.
    """
    if len(indices) > x.ndim:
        raise Decline("PyTorch rejects it: too many indices")
    found = [Given(d, Arg(first, d), i) for d, i in enumerate(indices) if i is not None]
    if not found:
        raise Decline("no index")
    for _, _, index in found:
        if index.dtype not in INDEX:
            raise Decline(f"an index of {dtype_name(index.dtype)}")
        if index.device != x.device:
            raise Decline("indices on another device")
    return found


class Advanced(NamedTuple):
    """Indexing with tensors: the result's shape, the strides of x over it (0 along what the indices choose), the indices, and
    which dimensions of the result are theirs."""

    shape: tuple[int, ...]
    own: tuple[int, ...]
    refs: list[Chosen]
    theirs: range


def advanced(x: TensorMeta, given: Sequence[Given]) -> Advanced:
    """What indexing ``x`` with ``given`` goes over; where the indexed dimensions are not neighbours, the indices' come first."""
    shape = broadcast_shape([g.meta.shape for g in given])
    dims = [g.dim for g in given]
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    whole = [d for d in range(x.ndim) if d not in dims]
    before = [d for d in whole if d < dims[0]] if adjacent else []
    after = [d for d in whole if d not in before]
    result = (*[x.shape[d] for d in before], *shape, *[x.shape[d] for d in after])
    own = (*[x.stride[d] for d in before], *(0,) * len(shape), *[x.stride[d] for d in after])
    refs = [(g.ref, g.meta, g.dim, (*(0,) * len(before), *broadcast_strides(g.meta, shape), *(0,) * len(after))) for g in given]
    return Advanced(result, own, refs, range(len(before), len(before) + len(shape)))


def read_advanced(call: Call, given: Sequence[Given], outside: int = WRAP, mask: tuple[Any, TensorMeta] | None = None,
                  fill: Any = 0) -> Plan:
    """``self[given]``; where ``mask`` is false, ``fill``."""
    x = call.args[0]
    shape, own, refs, theirs = advanced(x, given)
    if any(x.shape[d] == 0 for _, _, d, _ in refs) and 0 not in shape:
        raise Decline("PyTorch rejects it: an index into a dimension of size 0")
    out_stride = contiguous_strides(shape)
    if not x.is_contiguous:
        # PyTorch makes the result by TensorIterator, with what the indices choose as broadcast dimensions of self.
        short = tuple(size if d in theirs else 1 for d, size in enumerate(shape))
        seen = [TensorMeta(x.dtype, shape, own, x.device), *[TensorMeta(m.dtype, short, s, x.device) for _, m, _, s in refs]]
        out_stride = output_strides(shape, seen)
    masks = None if mask is None else (*mask, broadcast_strides(mask[1], shape))
    alloc, launches = read_by_index(call, (Arg(0), x), shape, out_stride, own, refs, [x.shape[d] for _, _, d, _ in refs],
                                    [x.stride[d] for _, _, d, _ in refs], outside, masks, fill)
    metas = {Arg(0): x, **{ref: meta for ref, meta, _, _ in refs if isinstance(ref, Arg)}}
    moved = 2 * alloc.meta.numel * x.dtype.itemsize + sum(meta.numel * meta.dtype.itemsize for _, meta, *_ in refs)
    return Plan((alloc,), launches, Out(0), metas, bytes=moved)


@planned("aten.index.Tensor", dtype(*ALL, arg="self"), family="indexing", kernel=index_kernel)
def index(call: Call) -> Plan:
    """``self[indices]`` with integer indices. Source: NumPy's advanced indexing, which PyTorch follows."""
    x, indices = call.args
    return read_advanced(call, given_indices(x, indices, 1))


@planned("aten._unsafe_index.Tensor", dtype(*ALL, arg="self"), family="indexing", kernel=index_kernel)
def unsafe_index(call: Call) -> Plan:
    """``index`` by another name, whose indices may be taken to be in range; they are checked all the same."""
    x, indices = call.args
    return read_advanced(call, given_indices(x, indices, 1))


@planned("aten._unsafe_masked_index.default", [dtype(*ALL, arg="self"), dtype(torch.bool, arg="mask")], family="indexing",
         kernel=index_kernel)
def unsafe_masked_index(call: Call) -> Plan:
    """``self[indices]`` where ``mask`` is true, else ``fill``; indices outside are moved to the nearest place."""
    x, mask, indices, fill = call.args
    if isinstance(fill, complex) or (isinstance(fill, float) and not x.dtype.is_floating_point):
        raise Decline("a fractional fill for an integer tensor")
    given = given_indices(x, indices, 2)
    shape = advanced(x, given).shape
    if broadcast_shape([shape, mask.shape]) != shape:
        raise Decline("a mask larger than the result")
    kind = "fp64" if x.dtype == torch.float64 else "fp32" if x.dtype.is_floating_point else "i64"
    plan = read_advanced(call, given, CLAMP, (Arg(1), mask), Num(3, kind))
    return plan._replace(metas={**plan.metas, Arg(1): mask})


# -- embedding backward ------------------------------------------------------------------------------------------------
#
# The rows of the gradient that belong to one row of the weight are found by a stable counting sort of the indices, so
# each row is written once, in float32, in a fixed order: no atomics on values, the same result at every run.

MAX_RANKED = 1 << 15
"""Indices ranked against each other; the work is quadratic, about 20 us of an H200 at this many."""


@triton.jit
def place_of(o, inner, outer_stride, inner_stride, FLAT: tl.constexpr):
    """Where element ``o`` of a tensor of two dimensions, the last of size ``inner``, is; FLAT: of one."""
    if FLAT:
        place = o * inner_stride
    else:
        place = (o // inner) * outer_stride + (o % inner) * inner_stride
    return place


@triton.jit
def rank_kernel(p_index, p_rank, p_count, n, limit, padding, inner, outer_stride, inner_stride, FLAT: tl.constexpr, BLOCK: tl.constexpr,
                INNER: tl.constexpr):
    """rank[i] = how many j < i have index[j] == index[i]; count[v] = how many there are in all. Grid: blocks of n."""
    i_block = tl.program_id(0)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_index = tl.load(p_index + place_of(o, inner, outer_stride, inner_stride, FLAT), mask=m, other=0)
    wrong = m & ((b_index < 0) | (b_index >= limit))
    tl.device_assert(wrong == 0, "index out of bounds")
    m = m & (wrong == 0) & (b_index != padding)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.minimum(i_block * BLOCK + BLOCK, n), INNER):
        o_other = start + tl.arange(0, INNER)
        b_other = tl.load(p_index + place_of(o_other, inner, outer_stride, inner_stride, FLAT), mask=o_other < n, other=-1)
        same = (b_index[:, None] == b_other[None, :]) & (o_other[None, :] < o[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    tl.store(p_rank + o, rank, mask=o < n)
    tl.atomic_add(p_count + b_index, tl.full((BLOCK,), 1, tl.int32), mask=m, sem="relaxed")


@triton.jit
def starts_kernel(p_count, p_start, limit, BLOCK: tl.constexpr):
    """start[v] = the sum of count[:v]. Grid: one program."""
    before = tl.zeros((), tl.int32)
    for first in range(0, limit, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b = tl.load(p_count + o, mask=o < limit, other=0)
        tl.store(p_start + o, before + tl.cumsum(b, 0) - b, mask=o < limit)
        before += tl.sum(b, 0)


@triton.jit
def order_kernel(p_index, p_rank, p_start, p_order, n, limit, padding, inner, outer_stride, inner_stride, FLAT: tl.constexpr,
                 BLOCK: tl.constexpr):
    """order[start[index[i]] + rank[i]] = i. Grid: blocks of n."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_index = tl.load(p_index + place_of(o, inner, outer_stride, inner_stride, FLAT), mask=m, other=0)
    m = m & (b_index >= 0) & (b_index < limit) & (b_index != padding)
    place = tl.load(p_start + b_index, mask=m, other=0) + tl.load(p_rank + o, mask=m, other=0)
    tl.store(p_order + place, o, mask=m)


@triton.jit
def sum_rows_kernel(p_grad, p_count, p_start, p_order, p_out, limit, width, inner, outer_stride, inner_stride, column_stride,
                    FLAT: tl.constexpr, COMPUTE: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr, BLOCK_V: tl.constexpr,
                    BLOCK_X: tl.constexpr):
    """out[v, :] = the sum of grad[i, :] over the i of order[start[v] : start[v] + count[v]]. Grid: (blocks of v, of columns)."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_v = v < limit
    m_x = x < width
    o_x = x * column_stride
    if WIDE:
        o_x = x.to(tl.int64) * column_stride
    count = tl.load(p_count + v, mask=m_v, other=0)
    start = tl.load(p_start + v, mask=m_v, other=0)
    acc = tl.zeros((BLOCK_V, BLOCK_X), COMPUTE)
    for k in range(0, tl.max(count, 0)):
        m_k = k < count
        row = tl.load(p_order + start + k, mask=m_k, other=0)
        if WIDE:
            row = row.to(tl.int64)
        o_row = place_of(row, inner, outer_stride, inner_stride, FLAT)
        acc += tl.load(p_grad + o_row[:, None] + o_x[None, :], mask=m_k[:, None] & m_x[None, :], other=0).to(COMPUTE)
    if SCALE:
        acc = acc / tl.maximum(count, 1).to(COMPUTE)[:, None]
    o_v = v
    if WIDE:
        o_v = v.to(tl.int64)
    tl.store(p_out + (o_v * width)[:, None] + x[None, :], acc.to(p_out.dtype.element_ty), mask=m_v[:, None] & m_x[None, :])


MANY_FOR_A_ROW = 128
"""Indices for each row of an embedding, on average, above which a row's gradients are too many for one program in turn."""


def _two_dimensions(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, bool]:
    """Two dimensions that are walked as ``shape`` is: the last one's size, both strides, and whether one is enough.

    Raises:
        Decline: it takes three.
    """
    found: list[tuple[int, int]] = []
    for size, step in zip(shape, strides):
        if size == 1:
            continue
        if found and found[-1][1] == size * step:
            found[-1] = found[-1][0] * size, step
        else:
            found.append((size, step))
    if len(found) > 2:
        raise Decline("strides of more than two dimensions")
    inner, along = found[-1] if found else (1, 1)
    return inner, found[0][1] if len(found) == 2 else 0, along, len(found) < 2


def reach(x: TensorMeta) -> int:
    """How far from the first element of ``x`` its last one is."""
    return sum((size - 1) * step for size, step in zip(x.shape, x.stride))


@planned("aten.embedding_dense_backward.default", [dtype(*FLOAT, arg="grad_output"), dtype(*INDEX, arg="indices")],
         family="indexing", kernel=sum_rows_kernel)
def embedding_dense_backward(call: Call) -> Plan:
    """grad_output [..., D], indices [...] -> [num_weights, D]."""
    grad, indices, limit, padding, scale = call.args
    width, n = grad.shape[-1], indices.numel
    if grad.shape[:-1] != indices.shape:
        raise Decline("the gradient's shape is not that of the indices and a row")
    rows_of, index_of = _two_dimensions(grad.shape[:-1], grad.stride[:-1]), _two_dimensions(indices.shape, indices.stride)
    if reach(indices) >= WIDE:
        raise Decline("indices so far apart that their places take 64 bits")
    if n > MAX_RANKED:
        raise Decline(f"{n} indices; at most {MAX_RANKED} are ranked against each other")
    if n > MANY_FOR_A_ROW * limit:
        raise Decline(f"{n} indices of {limit} rows: one program would add up all of a row's")
    shape = (limit, width)
    alloc = Alloc(shape, contiguous_strides(shape), grad.dtype)
    metas = {Arg(0): grad, Arg(1): indices}
    if limit * width == 0 or n == 0:
        return Plan((alloc._replace(zero=True),), (), Out(0), {}, bytes=0)
    interpreted = call.target.interpreted
    count, start = (Alloc((limit,), (1,), torch.int32, zero=z) for z in (True, False))
    rank, order = (Alloc((n,), (1,), torch.int32) for _ in range(2))
    block, inner = (min(power_of_2(n), 1024),) * 2 if interpreted else (64, 128)
    scan = min(power_of_2(limit), 1 << 16) if interpreted else min(power_of_2(limit), 4096)
    columns = min(power_of_2(width), 1024 if interpreted else 128 * max(16 // grad.dtype.itemsize, 1))
    rows = min(power_of_2(limit), max((1 << 16) // columns, 1)) if interpreted else 1
    compute = tl.float64 if opmath(grad.dtype) == torch.float64 else tl.float32
    wide = max(limit * width, grad.numel, reach(grad)) >= WIDE
    by_index, by_row = ((extent(inner), stride(outer), stride(along)) for inner, outer, along, _ in (index_of, rows_of))
    flat_index, flat_rows = (("FLAT", found[3]) for found in (index_of, rows_of))
    launches = (
        Launch(rank_kernel, (-(-n // block), 1, 1), (Arg(1), Out(3), Out(1), Size(n), Size(limit), Size(padding), *by_index),
               Constants((flat_index, ("BLOCK", block), ("INNER", inner))), asserts=True),
        Launch(starts_kernel, (1, 1, 1), (Out(1), Out(2), Size(limit)), Constants((("BLOCK", scan),)), 8),
        Launch(order_kernel, (-(-n // block), 1, 1), (Arg(1), Out(3), Out(2), Out(4), Size(n), Size(limit), Size(padding), *by_index),
               Constants((flat_index, ("BLOCK", block)))),
        Launch(sum_rows_kernel, (-(-limit // rows), -(-width // columns), 1),
               (Arg(0), Out(1), Out(2), Out(4), Out(0), Size(limit), extent(width), *by_row, stride(grad.stride[-1])),
               Constants((flat_rows, ("COMPUTE", compute), ("SCALE", bool(scale)), ("WIDE", wide), ("BLOCK_V", rows),
                          ("BLOCK_X", columns)))),
    )
    moved = (limit * width + grad.numel) * grad.dtype.itemsize + n * indices.dtype.itemsize
    return Plan((alloc, count, start, rank, order), launches, Out(0), metas, bytes=moved)
