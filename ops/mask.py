"""Masks: nonzero, masked_select, masked_scatter, boolean indices, repeat_interleave.

Three passes and no atomics, so that the order is that of the elements: how many are true in each tile
(``count_kernel``), where each tile's start (``starts_kernel``, one program), and a pass in which each tile scans itself and
writes. Where the result's size is the count, the host reads it before the last pass (``Plan.then``).

Source: the PyTorch documentation of ``torch.nonzero``, ``torch.masked_select``, ``torch.Tensor.masked_scatter_``,
``torch.repeat_interleave``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.indexing import CHECK, INDEX, WIDE, Given, advanced, contiguous, read_advanced
from gemsmode.ops.layout import broadcast_shape
from gemsmode.ops.pointwise import power_of_2
from gemsmode.ops.promotion import ALL
from gemsmode.ops.scatter import Values, Writes, deterministic, one_of, put, put_kernel, written, written_advanced
from gemsmode.plan import Alloc, Arg, At, Decline, Launch, Out, Plan, Size, contiguous_strides, extent
from gemsmode.predicates import Predicate, dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

# -- counting ----------------------------------------------------------------------------------------------------------


@triton.jit
def truth(b):
    return (b != 0).to(tl.int32)


@triton.jit
def amount(b):
    return b.to(tl.int64)


@triton.jit
def count_kernel(p, p_count, n, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    """count[i] = the sum of VALUE over tile i. Grid: tiles."""
    i = tl.program_id(0).to(tl.int64)
    o = i * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p + o, mask=o < n, other=0)
    tl.store(p_count + i, tl.sum(VALUE(b), 0))


@triton.jit
def starts_kernel(p_count, p_start, p_total, n, BLOCK: tl.constexpr):
    """start[i] = the sum of count[:i], and the sum of all. Grid: one program."""
    before = tl.zeros((), tl.int64)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b = tl.load(p_count + o, mask=o < n, other=0).to(tl.int64)
        tl.store(p_start + o, before + tl.cumsum(b, 0) - b, mask=o < n)
        before += tl.sum(b, 0)
    tl.store(p_total, before)


@triton.jit
def _tile(p_start, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's first element, and how many true ones come before it."""
    i = tl.program_id(0)
    before = tl.load(p_start + i)
    if WIDE:
        return i.to(tl.int64) * BLOCK, before
    else:
        return i * BLOCK, before.to(tl.int32)


@triton.jit
def _places(p_mask, first, before, n, STEP: tl.constexpr, SPARSE: tl.constexpr):
    """Of STEP elements: their numbers, which are in range, which are true, how many true ones come before each, and before the next
    step. SPARSE: what is written is what is true alone; then neighbours are given to neighbouring threads, for what they write to
    lie together, and loads are narrow (else the scan would be done in the order of the loads and again in that of the stores)."""
    o = first + tl.arange(0, STEP)
    if SPARSE:
        o = tl.max_contiguous(o, 1)
    m = o < n
    true = truth(tl.load(p_mask + o, mask=m, other=0))
    count = tl.cumsum(true, 0)
    return o, m, m & (true != 0), before + count - true, before + tl.sum(true, 0)


@triton.jit
def select_kernel(p_out, p_x, p_mask, p_start, n, limit, WIDE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of x where the mask is true, one after the other, ``limit`` at most. Grid: tiles."""
    first, before = _tile(p_start, WIDE, BLOCK)
    for step in range(0, BLOCK, STEP):
        o, _, kept, place, before = _places(p_mask, first + step, before, n, STEP, True)
        kept = kept & (place < limit)
        tl.store(p_out + place, tl.load(p_x + o, mask=kept), mask=kept)


@triton.jit
def fill_kernel(p_out, p_x, p_mask, p_source, p_start, n, limit, WIDE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """x, and where the mask is true the elements of the source one after the other. Grid: tiles."""
    first, before = _tile(p_start, WIDE, BLOCK)
    for step in range(0, BLOCK, STEP):
        o, m, kept, place, before = _places(p_mask, first + step, before, n, STEP, False)
        tl.device_assert((kept & (place >= limit)) == 0, "fewer elements in the source than true ones in the mask")
        b = tl.load(p_x + o, mask=m)
        tl.store(p_out + o, tl.where(kept, tl.load(p_source + place, mask=kept), b), mask=m)


@triton.jit
def coordinates_kernel(p_out, p_mask, p_start, n, limit, sizes, step, dim_step, WIDE: tl.constexpr, STEP: tl.constexpr,
                       BLOCK: tl.constexpr):
    """Coordinates of the elements that are true, ``limit`` at most: the j-th one's along dimension d, counted from the last,
    at ``j * step - d * dim_step``. Grid: tiles."""
    first, before = _tile(p_start, WIDE, BLOCK)
    for start in range(0, BLOCK, STEP):
        o, _, kept, place, before = _places(p_mask, first + start, before, n, STEP, True)
        kept = kept & (place < limit)
        rest = o
        for d in tl.static_range(len(sizes)):
            if d == len(sizes) - 1:
                i = rest
            else:
                i = rest % sizes[d]
                rest = rest // sizes[d]
            tl.store(p_out + (place * step - d * dim_step), i.to(tl.int64), mask=kept)


@triton.jit
def rest_kernel(p_out, p_total, n, width, rows, fill, BLOCK: tl.constexpr):
    """``fill`` in the rows from ``total`` on; of n elements, the o-th is of row ``o // width % rows``. Grid: blocks."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.zeros((BLOCK,), tl.int64) + fill
    tl.store(p_out + o, b, mask=(o < n) & ((o // width) % rows >= tl.load(p_total)))


def tile_of(n: int, target: Target) -> tuple[int, int]:
    """Elements of a tile, and warps: 16 elements a thread; smaller tiles while the device would not be filled."""
    if target.interpreted:
        return min(power_of_2(n), 1 << 16), 4
    tile = 4096
    while tile > 1024 and n < tile * target.multiprocessors * 2:
        tile //= 2
    return tile, max(tile // (16 * target.warp_size), 1)


_STEP = 4  # elements a thread that are placed together: few, for many programs to share a multiprocessor


def step_of(tile: int, warps: int, target: Target) -> int:
    """Elements of a tile that are placed together."""
    return tile if target.interpreted else warps * target.warp_size * _STEP


class Counted(NamedTuple):
    """The first two passes over a mask.

    Attributes:
        allocs: counts, starts.
        launches: the passes.
        start: the number of the allocation with the starts.
        grid: of the pass that follows.
        constants: of the pass that follows.
        warps: of the pass that follows.
    """

    allocs: tuple[Alloc, ...]
    launches: tuple[Launch, ...]
    start: int
    grid: tuple[int, int, int]
    constants: Constants
    warps: int


def counted(call: Call, flags: Any, n: int, first: int, total: Any, value: Any = truth) -> Counted:
    """Count what is true among the ``n`` elements at ``flags`` into the one int64 at ``total``. ``first``: the number that the
    first allocation made here gets."""
    tile, warps = tile_of(n, call.target)
    tiles = -(-n // tile)
    count = Alloc((tiles,), (1,), torch.int32 if value is truth else torch.int64)
    start = Alloc((tiles,), (1,), torch.int64)
    scan = min(power_of_2(tiles), 1 << 16 if call.target.interpreted else 4096)
    launches = (Launch(count_kernel, (tiles, 1, 1), (flags, Out(first), extent(n)), Constants((("VALUE", value), ("BLOCK", tile))), warps),
                Launch(starts_kernel, (1, 1, 1), (Out(first), Out(first + 1), total, Size(tiles)), Constants((("BLOCK", scan),)), 8))
    wide = n * max((m.ndim for m in call.tensors), default=1) >= WIDE
    constants = Constants((("WIDE", wide), ("STEP", step_of(tile, warps, call.target)), ("BLOCK", tile)))
    return Counted((count, start), launches, first + 1, (tiles, 1, 1), constants, warps)


_TOTAL = Alloc((1,), (1,), torch.int64)


def _later(call: Call, number: int, alloc: Alloc) -> tuple[Arg, dict[Any, TensorMeta]]:
    """The first plan's allocation ``number`` as the second plan refers to it, and its metadata."""
    ref = Arg(len(parameters(call.op)) + number)
    return ref, {ref: alloc.meta._replace(device=next(iter(call.tensors)).device)}


# -- nonzero -----------------------------------------------------------------------------------------------------------


@planned("aten.nonzero.default", dtype(*ALL), family="indexing", kernel=coordinates_kernel)
def nonzero(call: Call) -> Plan:
    """self -> the coordinates of its elements that are not zero, int64 [count, dimensions], stored by columns."""
    x = call.args[0]
    n, ndim = x.numel, x.ndim
    least = int(call.target.device_type != "cpu")  # the stride of columns that are empty
    if n == 0:
        return Plan((Alloc((0, ndim), (1, least), torch.int64),), (), Out(0), {}, bytes=0)
    flags, copies, copying = contiguous(call, 0, 1)
    scan = counted(call, flags, n, 1 + len(copies), Out(0))
    allocs = (_TOTAL, *copies, *scan.allocs)

    def then(values: list[int]) -> Plan:
        (count,) = values
        out = Alloc((count, ndim), (1, max(count, least)), torch.int64)
        metas: dict[Any, TensorMeta] = {Arg(0): x}
        start, meta = _later(call, scan.start, allocs[scan.start])
        metas |= meta
        source: Any = Arg(0)
        if copies:
            source, meta = _later(call, 1, copies[0])
            metas |= meta
        if count == 0 or ndim == 0:
            return Plan((out,), (), Out(0), metas)
        args = (At(Out(0), (ndim - 1) * count), source, start, extent(n), Size(count), tuple(Size(s) for s in reversed(x.shape)), 1,
                Size(count))
        launch = Launch(coordinates_kernel, scan.grid, args, scan.constants, scan.warps)
        return Plan((out,), (launch,), Out(0), metas, bytes=n * x.dtype.itemsize + count * ndim * 8)

    return Plan(allocs, (*copying, *scan.launches), Out(0), {Arg(0): x}, then=then, example=(max(n // 2, 1),),
                bytes=n * x.dtype.itemsize)


@planned("aten.nonzero_static.default", dtype(*ALL), family="indexing", kernel=coordinates_kernel)
def nonzero_static(call: Call) -> Plan:
    """self, size, fill_value: the first ``size`` rows of ``nonzero``, filled up with ``fill_value``; by columns on a GPU only."""
    x, size, fill = call.args
    n, ndim = x.numel, x.ndim
    if size < 0:
        raise Decline("PyTorch rejects it: a negative size")
    rows, columns = contiguous_strides((size, ndim)), (1, max(size, 1))
    out = Alloc((size, ndim), rows if call.target.device_type == "cpu" else columns, torch.int64)
    if size * ndim == 0:
        return Plan((out,), (), Out(0), {}, bytes=0)
    block = min(power_of_2(size * ndim), 1 << 16 if call.target.interpreted else 1024)
    filling = Launch(rest_kernel, (-(-size * ndim // block), 1, 1),
                     (Out(0), Out(1), Size(size * ndim), Size(out.stride[0]), Size(size), Size(fill)),
                     Constants((("BLOCK", block),)))
    if n == 0:
        return Plan((out, _TOTAL._replace(zero=True)), (filling,), Out(0), {})
    flags, copies, copying = contiguous(call, 0, 2)
    scan = counted(call, flags, n, 2 + len(copies), Out(1))
    args = (At(Out(0), (ndim - 1) * out.stride[1]), flags, Out(scan.start), extent(n), Size(size),
            tuple(Size(s) for s in reversed(x.shape)), Size(out.stride[0]), Size(out.stride[1]))
    writing = Launch(coordinates_kernel, scan.grid, args, scan.constants, scan.warps)
    return Plan((out, _TOTAL, *copies, *scan.allocs), (*copying, *scan.launches, writing, filling), Out(0), {Arg(0): x},
                bytes=n * x.dtype.itemsize + size * ndim * 8)


# -- masked_select, masked_scatter -------------------------------------------------------------------------------------


def _selected(call: Call, x_at: int, mask_at: Any, mask: TensorMeta, shape: tuple[int, ...]) -> Plan:
    """The elements of argument ``x_at`` expanded to ``shape`` where the mask (expanded too) is true, as a vector."""
    x = call.args[x_at]
    n = math.prod(shape)
    if n == 0:
        return Plan((Alloc((0,), (1,), x.dtype),), (), Out(0), {}, bytes=0)
    source, kept, keeping = contiguous(call, x_at, 1, shape)
    flags, copies, copying = contiguous(call, mask_at, 1 + len(kept), shape)
    scan = counted(call, flags, n, 1 + len(kept) + len(copies), Out(0))
    allocs = (_TOTAL, *kept, *copies, *scan.allocs)
    metas: dict[Any, TensorMeta] = {Arg(x_at): x, as_arg(mask_at): mask}

    def then(values: list[int]) -> Plan:
        (count,) = values
        start, known = _later(call, scan.start, allocs[scan.start])
        refs = []
        for ref in (source, flags):
            if isinstance(ref, Out):
                ref, meta = _later(call, ref.index, allocs[ref.index])
                known |= meta
            refs.append(ref)
        launch = Launch(select_kernel, scan.grid, (Out(0), *refs, start, extent(n), Size(count)), scan.constants,
                        scan.warps)
        return Plan((Alloc((count,), (1,), x.dtype),), (launch,) if count else (), Out(0), metas | known,
                    bytes=n * mask.dtype.itemsize + 2 * count * x.dtype.itemsize)

    return Plan(allocs, (*keeping, *copying, *scan.launches), Out(0), metas, then=then, example=(max(n // 2, 1),), bytes=n)


def as_arg(at: int | Arg) -> Arg:
    return at if isinstance(at, Arg) else Arg(at)


_MASK = dtype(torch.bool, arg="mask")


@planned("aten.masked_select.default", [dtype(*ALL, arg="self"), _MASK], family="indexing", kernel=select_kernel)
def masked_select(call: Call) -> Plan:
    """self, mask (broadcast together) -> the elements where the mask is true, a vector."""
    x, mask = call.args
    return _selected(call, 0, 1, mask, broadcast_shape([x.shape, mask.shape]))


@planned("aten.masked_scatter.default", [dtype(*ALL, arg="self"), _MASK], family="indexing", kernel=fill_kernel)
def masked_scatter(call: Call) -> Plan:
    """self, mask (broadcast together), source -> self, and where the mask is true the source's elements in order."""
    x, mask, source = call.args
    if source.dtype != x.dtype:
        raise Decline(f"PyTorch rejects it: a source of {dtype_name(source.dtype)}")
    shape = broadcast_shape([x.shape, mask.shape])
    n = math.prod(shape)
    out = Alloc(shape, contiguous_strides(shape), x.dtype)
    metas: dict[Any, TensorMeta] = {Arg(0): x, Arg(1): mask, Arg(2): source}
    if n == 0:
        return Plan((out,), (), Out(0), {}, bytes=0)
    if source.numel == 0:
        raise Decline("an empty source")
    allocs: tuple[Alloc, ...] = (out, _TOTAL)
    launches: tuple[Launch, ...] = ()
    refs = []
    for at, wanted in ((0, shape), (1, shape), (2, None)):
        ref, copies, copying = contiguous(call, at, len(allocs), wanted)
        allocs, launches = (*allocs, *copies), (*launches, *copying)
        refs.append(ref)
    scan = counted(call, refs[1], n, len(allocs), Out(1))
    # What is false is written too, in loads and stores of 16 bytes: the tile is placed at once.
    wide, _, block = scan.constants
    writing = Launch(fill_kernel, scan.grid, (Out(0), *refs, Out(scan.start), extent(n), Size(source.numel)),
                     Constants((wide, ("STEP", block[1]), block)), scan.warps, asserts=True)
    return Plan((*allocs, *scan.allocs), (*launches, *scan.launches, writing), Out(0), metas, bytes=n * (1 + 2 * x.dtype.itemsize))


@planned("aten.masked_scatter_backward.default", [dtype(*ALL, arg="grad_output"), _MASK], family="indexing", kernel=select_kernel)
def masked_scatter_backward(call: Call) -> Plan:
    """grad_output, mask, sizes of the source -> the gradient's elements where the mask is true, and zeros after them."""
    grad, mask, sizes = call.args
    sizes = tuple(sizes)
    if broadcast_shape([grad.shape, mask.shape]) != grad.shape:
        raise Decline("a mask larger than the gradient")
    out = Alloc(sizes, contiguous_strides(sizes), grad.dtype, zero=True)
    n = grad.numel
    if n == 0 or math.prod(sizes) == 0:
        return Plan((out,), (), Out(0), {}, bytes=0)
    source, kept, keeping = contiguous(call, 0, 2)
    flags, copies, copying = contiguous(call, 1, 2 + len(kept), grad.shape)
    scan = counted(call, flags, n, 2 + len(kept) + len(copies), Out(1))
    writing = Launch(select_kernel, scan.grid, (Out(0), source, flags, Out(scan.start), extent(n), Size(math.prod(sizes))),
                     scan.constants, scan.warps)
    return Plan((out, _TOTAL, *kept, *copies, *scan.allocs), (*keeping, *copying, *scan.launches, writing), Out(0),
                {Arg(0): grad, Arg(1): mask}, bytes=n * (1 + grad.dtype.itemsize))


# -- boolean indices ---------------------------------------------------------------------------------------------------


def _list_of(call: Call) -> int:
    return next(i for i, p in enumerate(parameters(call.op)) if p.name == "indices")


def _has_mask(call: Call) -> tuple[bool, str]:
    given = call.args[_list_of(call)]
    return any(i is not None and i.dtype == torch.bool for i in given), "no index of bool"


has_mask = Predicate("an index is a mask", _has_mask)


class Index(NamedTuple):
    """One of the indices given: the dimension of self where it begins, its place in the list, and its metadata."""

    dim: int
    item: int
    meta: TensorMeta


def _placed(call: Call) -> list[Index]:
    """The indices with the dimensions that they begin at: a mask takes as many as it has.

    Raises:
        Decline: PyTorch rejects them, or their dtype is not handled.
    """
    x, first = call.args[0], _list_of(call)
    found, dim = [], 0
    for item, meta in enumerate(call.args[first]):
        if meta is None:
            dim += 1
            continue
        if meta.dtype not in (*INDEX, torch.bool):
            raise Decline(f"an index of {dtype_name(meta.dtype)}")
        if meta.device != x.device:
            raise Decline("indices on another device")
        width = meta.ndim if meta.dtype == torch.bool else 1
        if meta.dtype == torch.bool and (meta.ndim == 0 or meta.shape != x.shape[dim:dim + width]):
            raise Decline("PyTorch rejects it, or a 0-dim mask: a mask's shape is not that of the dimensions it indexes")
        found.append(Index(dim, item, meta))
        dim += width
    if dim > x.ndim:
        raise Decline("PyTorch rejects it: too many indices")
    return found


def _by_masks(call: Call, placed: Sequence[Index], finish: Callable[[list[Given]], Plan], values: TensorMeta | None = None) -> Plan:
    """A plan in two stages: masks are counted, then become coordinates, and ``finish`` plans what is done with integer indices.

    ``values``: what is written there, whose shape says how many elements a mask can have chosen.
    """
    x, first = call.args[0], _list_of(call)
    masks = [p for p in placed if p.meta.dtype == torch.bool]
    if any(m.meta.numel == 0 for m in masks):
        raise Decline("an empty mask")
    allocs: tuple[Alloc, ...] = (Alloc((len(masks),), (1,), torch.int64),)
    launches: tuple[Launch, ...] = ()
    scans = []
    for j, mask in enumerate(masks):
        flags, copies, copying = contiguous(call, Arg(first, mask.item), len(allocs))
        scan = counted(call, flags, mask.meta.numel, len(allocs) + len(copies), At(Out(0), j))
        scans.append((flags, scan))
        allocs, launches = (*allocs, *copies, *scan.allocs), (*launches, *copying, *scan.launches)
    metas: dict[Any, TensorMeta] = {Arg(first, p.item): p.meta for p in placed}

    def indices(values: list[int], base: int) -> tuple[list[Given], list[Alloc]]:
        """The indices as integers; of a mask, the columns of a table of coordinates, allocated from number ``base`` on."""
        given: list[Given] = []
        made: list[Alloc] = []
        counts = iter(values)
        for index in placed:
            if index.meta.dtype != torch.bool:
                given.append(Given(index.dim, Arg(first, index.item), index.meta))
                continue
            count = next(counts)
            table, column = Out(base + len(made)), TensorMeta(torch.int64, (count,), (1,), x.device)
            made.append(Alloc((index.meta.ndim, count), (count, 1), torch.int64))
            given += [Given(index.dim + d, At(table, d * count), column) for d in range(index.meta.ndim)]
        return given, made

    def then(values: list[int]) -> Plan:
        # The tables come after what the rest allocates, however much that is.
        base = len(finish(indices(values, 0)[0]).allocs)
        given, made = indices(values, base)
        plan = finish(given)
        writing: list[Launch] = []
        known: dict[Any, TensorMeta] = dict(metas)
        for j, (mask, (flags, scan), count) in enumerate(zip(masks, scans, values)):
            if count == 0:
                continue
            start, meta = _later(call, scan.start, allocs[scan.start])
            known |= meta
            if isinstance(flags, Out):
                flags, meta = _later(call, flags.index, allocs[flags.index])
                known |= meta
            args = (At(Out(base + j), (mask.meta.ndim - 1) * count), flags, start, extent(mask.meta.numel), Size(count),
                    tuple(Size(s) for s in reversed(mask.meta.shape)), 1, Size(count))
            writing.append(Launch(coordinates_kernel, scan.grid, args, scan.constants, scan.warps))
        return plan._replace(allocs=(*plan.allocs, *made), launches=(*writing, *plan.launches), metas=known | plan.metas)

    def fits(count: int) -> bool:
        try:
            shape = advanced(x, indices([count] * len(masks), 0)[0])[0]
            return values is None or not values.numel or broadcast_shape([shape, values.shape]) == shape
        except Decline:
            return False

    # Half of a mask, unless what goes with it is of a size of its own.
    most = min(m.meta.numel for m in masks)
    half = max(most // 2, 1)
    others = [p.meta.shape for p in placed if p.meta.dtype != torch.bool] + ([] if values is None else [values.shape])
    sizes = dict.fromkeys((half, *[size for shape in others for size in shape if 0 < size <= most]))
    return Plan(allocs, launches, Out(0), metas, then=then, example=(next(filter(fits, sizes), half),) * len(masks))


@planned("aten.index.Tensor", [dtype(*ALL, arg="self"), has_mask], family="indexing", kernel=select_kernel, name="index_by_mask",
         priority=-99)
def index_by_mask(call: Call) -> Plan:
    """``self[indices]`` where masks are among the indices."""
    x = call.args[0]
    placed = _placed(call)
    if len(placed) == 1 and placed[0].dim == 0 and placed[0].meta.shape == x.shape and x.is_contiguous:
        return _selected(call, 0, Arg(1, placed[0].item), placed[0].meta, x.shape)
    return _by_masks(call, placed, lambda given: read_advanced(call, given))


def _put_by_mask(call: Call) -> Plan:
    placed = _placed(call)
    x, values, accumulate = call.args[0], call.args[2], call.args[3]
    if values.dtype != x.dtype:
        raise Decline(f"values of {dtype_name(values.dtype)} for a tensor of {dtype_name(x.dtype)}")
    if len(placed) == 1 and values.numel == 1 and not accumulate and values.device == x.device:
        # One value wherever the mask is true: nothing to count.
        mask = placed[0]
        seen = (*(0,) * mask.dim, *mask.meta.stride, *(0,) * (x.ndim - mask.dim - mask.meta.ndim))

        def make(strides: tuple[int, ...]) -> Writes:
            return Writes(x.shape, strides, [], [], [], Values(Arg(2), values, (0,) * x.ndim, one_of(x)), CHECK,
                          (Arg(1, mask.item), mask.meta, seen))

        return put(call, written(call, True), make, 0)
    return _by_masks(call, placed, lambda given: written_advanced(call, given, 2, accumulate), values)


_PUT = [dtype(*ALL, arg="self"), has_mask]


@planned(["aten.index_put.default", "aten.index_put_.default"], _PUT, family="indexing", kernel=put_kernel, name="index_put_by_mask",
         priority=-99, state=(deterministic,))
def index_put_by_mask(call: Call) -> Plan:
    """``self[indices] = values`` or ``+= values`` where masks are among the indices."""
    return _put_by_mask(call)


@planned("aten._index_put_impl_.default", _PUT, family="indexing", kernel=put_kernel, name="index_put_impl_by_mask", priority=-99,
         state=(deterministic,))
def index_put_impl_by_mask(call: Call) -> Plan:
    return _put_by_mask(call)


# -- repeat_interleave -------------------------------------------------------------------------------------------------


@triton.jit
def ends_kernel(p, p_start, p_end, n, BLOCK: tl.constexpr):
    """end[i] = the sum of the first i + 1 repeats. Grid: tiles."""
    i = tl.program_id(0).to(tl.int64)
    o = i * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p + o, mask=o < n, other=0).to(tl.int64)
    tl.device_assert(b >= 0, "repeats can not be negative")
    tl.store(p_end + o, tl.load(p_start + i) + tl.cumsum(b, 0), mask=o < n)


@triton.jit
def repeat_kernel(p_out, p_end, p_total, n, size, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """out[j] = the first i with end[i] > j, by bisection. Grid: blocks of the result."""
    tl.device_assert(tl.load(p_total) == size, "output_size is not the sum of the repeats")
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + n
    for _ in range(STEPS):
        middle = (low + high) // 2
        after = tl.load(p_end + middle, mask=m & (middle < high), other=0) <= o
        moves = middle < high
        low = tl.where(moves & after, middle + 1, low)
        high = tl.where(moves & (after == 0), middle, high)
    tl.store(p_out + o, low.to(p_out.dtype.element_ty), mask=m)


@planned("aten.repeat_interleave.Tensor", dtype(*INDEX), family="indexing", kernel=repeat_kernel)
def repeat_interleave(call: Call) -> Plan:
    """repeats [n] -> 0 repeats[0] times, 1 repeats[1] times, ...; ``output_size``, if given, is their sum."""
    repeats, size = call.args
    if repeats.ndim != 1:
        raise Decline("PyTorch rejects it: repeats must be a vector")
    n = repeats.numel
    if n == 0:
        return Plan((Alloc((0,), (1,), repeats.dtype),), (), Out(0), {}, bytes=0)
    flags, copies, copying = contiguous(call, 0, 2)
    scan = counted(call, flags, n, 2 + len(copies), Out(0), amount)
    allocs = (_TOTAL, Alloc((n,), (1,), torch.int64), *copies, *scan.allocs)
    ends = Launch(ends_kernel, scan.grid, (flags, Out(scan.start), Out(1), extent(n)), scan.constants[-1:], scan.warps, asserts=True)
    launches = (*copying, *scan.launches, ends)

    def spread(out: Any, end: Any, total: Any, count: int) -> tuple[Launch, ...]:
        if count == 0:
            return ()
        block = min(power_of_2(count), 1 << 16 if call.target.interpreted else 512)
        constants = Constants((("STEPS", n.bit_length()), ("BLOCK", block)))
        return (Launch(repeat_kernel, (-(-count // block), 1, 1), (out, end, total, Size(n), Size(count)), constants, asserts=True),)

    if size is not None:
        out = Out(len(allocs))
        return Plan((*allocs, Alloc((size,), (1,), repeats.dtype)), (*launches, *spread(out, Out(1), Out(0), size)), out, {Arg(0): repeats})

    def then(values: list[int]) -> Plan:
        (count,) = values
        end, metas = _later(call, 1, allocs[1])
        total, more = _later(call, 0, allocs[0])
        return Plan((Alloc((count,), (1,), repeats.dtype),), spread(Out(0), end, total, count), Out(0), metas | more)

    return Plan(allocs, launches, Out(0), {Arg(0): repeats}, then=then, example=(2 * n,))
