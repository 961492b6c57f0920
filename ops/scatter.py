"""Writing by index: scatter, index_put, index_add, index_copy, index_fill, put, and their reductions.

Every index is checked on the device, as in ``indexing.py``. Where several writes meet in one place

- plain writes leave one of them, as PyTorch's do;
- sums, products, minima and maxima are made by atomics, in float32 for 16-bit floats (one rounding at the end) and in
  32 bits for shorter integers. Minima and maxima of floats are those of integers in the same order. Under
  ``torch.use_deterministic_algorithms`` such calls pass through.

A scatter along contiguous rows is one pass: each program copies its rows, waits for them, and then writes into them while
they are in the L2 cache (``scatter_rows_kernel``).

Source: the PyTorch documentation of ``torch.Tensor.scatter_reduce_``, ``index_reduce_`` and their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.indexing import (
    CHECK,
    CLAMP,
    INDEX,
    WRAP,
    Chosen,
    Given,
    Loop,
    advanced,
    block,
    chosen,
    copied,
    given_indices,
    indexed,
    is_wide,
    merged,
    offsets,
    row_offset,
    share,
)
from gemsmode.ops.layout import broadcast_shape, broadcast_strides, preserved_strides
from gemsmode.ops.movement import same, wrap_dim
from gemsmode.ops.pointwise import LIMITS, _strided, power_of_2
from gemsmode.ops.promotion import ALL, NUMERIC, TRITON, opmath
from gemsmode.plan import Alloc, Arg, Decline, Disjoint, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

SET, ADD, MULTIPLY, LARGEST, SMALLEST = range(5)

EXCHANGES_ON_HIP = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)
"""Triton 3.6 makes code of ``atomic_cas`` on blocks for AMD GPUs that LLVM rejects."""
"""What a write does to what is there."""

# -- writing -----------------------------------------------------------------------------------------------------------


@triton.jit
def ordered(x, LARGEST: tl.constexpr):
    """Integers in the order of floats, NaN beyond all: the greatest of them if LARGEST, else the least."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        return tl.where(x != x, 0x7FFFFFFFFFFFFFFF if LARGEST else -0x8000000000000000, key)
    else:
        word = x.to(tl.int32, bitcast=True)
        short = word ^ ((word >> 31) & 0x7FFFFFFF)
        return tl.where(x != x, 0x7FFFFFFF if LARGEST else -0x80000000, short).to(tl.int32)


@triton.jit
def largest_key(x):
    return ordered(x, True)


@triton.jit
def smallest_key(x):
    return ordered(x, False)


@triton.jit
def unordered(key):
    """The float that :func:`ordered` made ``key`` of."""
    if key.dtype == tl.int64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(p, b, m, ORIGIN):
    """``*p *= b`` by comparing and exchanging. Lanes that are through, or masked out, exchange a value for itself."""
    if b.dtype.primitive_bitwidth == 64:
        WORD: tl.constexpr = tl.int64
    else:
        WORD: tl.constexpr = tl.int32
    p = tl.where(m, p, ORIGIN)
    words = p.to(tl.pointer_type(WORD), bitcast=True)
    seen = tl.load(p)
    waiting = m
    while tl.max(waiting.to(tl.int32)) > 0:
        product = tl.where(waiting, seen * b, seen)
        was = seen.to(WORD, bitcast=True)
        now = tl.atomic_cas(words, was, product.to(WORD, bitcast=True), sem="relaxed")
        waiting = waiting & (now != was)
        seen = now.to(b.dtype, bitcast=True)


@triton.jit
def _write(p_out, o, b, m, MODE: tl.constexpr):
    if MODE == 0:
        tl.store(p_out + o, b, mask=m)
    elif MODE == 1:
        tl.atomic_add(p_out + o, b, mask=m, sem="relaxed")
    elif MODE == 2:
        _multiply(p_out + o, b, m, p_out)
    elif MODE == 3:
        tl.atomic_max(p_out + o, b, mask=m, sem="relaxed")
    else:
        tl.atomic_min(p_out + o, b, mask=m, sem="relaxed")


@triton.jit
def put_kernel(p_out, values, number, masks, indices, limits, steps, tiles, n_rows, sizes, out_strides, value_strides, mask_strides,
               index_strides, MODE: tl.constexpr, KEY: tl.constexpr, COMPUTE: tl.constexpr, INNER: tl.constexpr, OUTSIDE: tl.constexpr,
               COLUMNS_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[c, indexed] = values[c]``, or ``+= number * values[c]``, or another of the modes; without values, ``number``.

    KEY: 1 or 2 if ``out`` holds keys of :func:`ordered` (2: NaN the greatest). Grid: blocks of rows and columns.
    """
    y, x, m_y, m_x = block(n_rows, sizes, tiles, COLUMNS_FIRST, WIDE, BLOCK_Y, BLOCK_X)
    m = m_y[:, None] & m_x[None, :]  # [BLOCK_Y, BLOCK_X]
    o = indexed(row_offset(y, sizes, out_strides), x, out_strides[0], m_y, m, y, sizes, indices, limits, steps, index_strides, INNER,
                OUTSIDE, WIDE)
    if len(masks) == 1:
        m = m & (tl.load(masks[0] + offsets(y, x, sizes, mask_strides), mask=m, other=0) != 0)
    if len(values) == 1:
        b = tl.load(values[0] + offsets(y, x, sizes, value_strides), mask=m)
        if MODE != 0:
            b = b.to(COMPUTE)
        if MODE == 1:
            b = b * tl.cast(number, COMPUTE)
    else:
        b = tl.broadcast_to(tl.cast(number, COMPUTE), m.shape)
    if KEY != 0:
        b = ordered(b, KEY == 2)
    _write(p_out, o, b.to(p_out.dtype.element_ty), m, MODE)


@triton.jit
def scatter_rows_kernel(p_out, p_x, values, number, p_index, limit, n_rows, sizes, out_strides, x_strides, value_strides, index_strides,
                        ADD: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[r] = x[r]``, then ``out[r, index[r, c]] = values[r, c]`` (ADD: ``+= number * values[r, c]``; without values, ``number``).

    ``sizes`` are those of the index, its row first; rows of x have ``limit`` elements. Grid: blocks of whole rows.
    """
    i_y = tl.program_id(0)
    if WIDE:
        i_y = i_y.to(tl.int64)
    y = i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    m_y = (y < n_rows)[:, None]
    o_out = row_offset(y, sizes, out_strides)[:, None]
    o_x = row_offset(y, sizes, x_strides)[:, None]
    o_value = row_offset(y, sizes, value_strides)[:, None]
    o_index = row_offset(y, sizes, index_strides)[:, None]
    for start in range(0, limit, BLOCK_X):
        c = (start + tl.arange(0, BLOCK_X))[None, :]
        m_c = m_y & (c < limit)
        tl.store(p_out + o_out + c, tl.load(p_x + o_x + c * x_strides[0], mask=m_c), mask=m_c)
    # The writes by index must come after those of other threads.
    tl.debug_barrier()
    for start in range(0, sizes[0], BLOCK_X):
        c = (start + tl.arange(0, BLOCK_X))[None, :]
        m = m_y & (c < sizes[0])
        place = chosen(p_index, o_index + c * index_strides[0], m, limit, 0, WIDE)
        if len(values) == 1:
            b = tl.load(values[0] + o_value + c * value_strides[0], mask=m)
            if ADD:
                b = (b.to(COMPUTE) * tl.cast(number, COMPUTE)).to(p_out.dtype.element_ty)
        else:
            b = tl.broadcast_to(tl.cast(number, COMPUTE), m.shape).to(p_out.dtype.element_ty)
        if ADD:
            tl.atomic_add(p_out + o_out + place, b, mask=m, sem="relaxed")
        else:
            tl.store(p_out + o_out + place, b, mask=m)


@dataclass(frozen=True)
class WholeRows:
    """Rows and columns at a time of a program of ``scatter_rows_kernel``, and its warps."""

    rows: int
    columns: int
    warps: int


def choose_whole_rows(rows: int, length: int, columns: int, itemsize: int, target: Target) -> WholeRows | None:
    """The launch choice, or None where whole rows would leave multiprocessors idle or a program would be long at work."""
    x = min(power_of_2(max(length, columns)), 4096)
    if target.interpreted:
        x = min(power_of_2(max(length, columns)), 1 << 16)
        return WholeRows(min(power_of_2(rows), max((1 << 16) // x, 1)), x, 4)
    if target.backend != "cuda":
        return None  # A barrier of AMD's GPUs does not wait for the writes before it.
    y = min(power_of_2(rows), max(1024 // x, 1))
    if -(-rows // y) < 2 * target.multiprocessors or max(length, columns) > 1 << 16:
        return None
    return WholeRows(y, x, 4 if x * y <= 1024 else 8 if x * y <= 4096 else 512 // target.warp_size)


# -- plans -------------------------------------------------------------------------------------------------------------


def deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


ATOMIC = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64,
    torch.int8: torch.int32, torch.uint8: torch.int32, torch.int16: torch.int32, torch.int32: torch.int32, torch.int64: torch.int64,
    torch.bool: torch.int32,
}
"""The dtype in which sums and products of values of a dtype are made by atomics."""

KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The integers whose order is that of floats."""


@triton.jit
def nonzero(self):
    return self != 0


class Values(NamedTuple):
    """What is written: a tensor (with its strides over the loop) times a number, or a number alone."""

    ref: Any
    meta: TensorMeta | None
    strides: tuple[int, ...]
    number: Any


class Writes(NamedTuple):
    """Writes at indices into the first argument: where, by which indices, and what.

    Attributes:
        shape: what the writes go over.
        own: strides of the written tensor over it, 0 along what only indices choose.
        refs: the indices.
        limits: sizes of the dimensions that they choose in.
        steps: strides of the written tensor along these.
        values: what is written.
        outside: what is done with indices that are outside.
        mask: a reference, metadata and strides: where something is written.
    """

    shape: tuple[int, ...]
    own: tuple[int, ...]
    refs: list[Chosen]
    limits: list[int]
    steps: list[int]
    values: Values
    outside: int
    mask: tuple[Any, TensorMeta, tuple[int, ...]] | None = None


def _launch(call: Call, writes: Writes, out: Any, out_meta: TensorMeta, mode: int, compute: torch.dtype,
            key: int = 0) -> tuple[Launch, ...]:
    """The launch of ``put_kernel`` that makes the writes into ``out``."""
    shape, own, refs, limits, steps, values, outside, mask = writes
    if 0 in shape:
        return ()
    zeros = (0,) * len(shape)
    loop = merged(Loop(shape, (own, values.strides, zeros if mask is None else mask[2], *[s for *_, s in refs])))
    sizes, strides = loop.arguments()
    inner = tuple(bool(column[0]) for column in loop.operands[3:])
    metas = [m for m in (values.meta, mask and mask[1]) if m]
    wide = is_wide(out_meta, *[m for _, m, *_ in refs], *metas, TensorMeta(torch.int8, shape, contiguous_strides(shape), out_meta.device))
    columns_first = not inner or (any(inner) and min(steps) <= max(loop.operands[0][0], 1))
    grid = share(loop.rows, loop.sizes[0], out_meta.dtype.itemsize, call.target, columns_first, wide, any(inner) and not columns_first)
    args = (out, () if values.ref is None else (values.ref,), values.number, () if mask is None else (mask[0],), tuple(r for r, *_ in refs),
            tuple(Size(v) for v in limits), tuple(stride(s) for s in steps), grid.tiles, Size(loop.rows), sizes, *strides[:3],
            tuple(strides[3:]))
    constants = Constants((("MODE", mode), ("KEY", key), ("COMPUTE", TRITON[compute]), ("INNER", inner), ("OUTSIDE", outside),
                           *grid.constants))
    return (Launch(put_kernel, grid.programs, args, constants, grid.warps, asserts=True),)


def _refs(call: Call, writes: Writes) -> dict[Any, TensorMeta]:
    metas: dict[Any, TensorMeta] = {Arg(0): call.args[0]}
    for ref, meta in [(r, m) for r, m, *_ in writes.refs] + [(writes.values.ref, writes.values.meta)] + ([writes.mask[:2]] if writes.mask
                                                                                                        else []):
        if isinstance(ref, Arg) and meta is not None:
            metas[ref] = meta
    return metas


def is_inplace(call: Call) -> bool:
    return parameters(call.op)[0].is_written


def written(call: Call, preserve: bool) -> TensorMeta:
    """The tensor that is written: the first argument in place, else a copy, laid out alike or contiguous."""
    x = call.args[0]
    if is_inplace(call):
        return x
    return x._replace(stride=preserved_strides(x) if preserve else contiguous_strides(x.shape))


def _rows_at_once(call: Call, out: TensorMeta, writes: Writes, mode: int, compute: torch.dtype) -> tuple[Launch, ...] | None:
    """One pass that copies and writes, into allocation 0, where the index chooses within contiguous rows of a new tensor and
    has a row for each; else None."""
    x, shape = call.args[0], writes.shape
    if mode > ADD or len(writes.refs) != 1 or writes.steps[0] != 1 or writes.mask is not None or 0 in shape or writes.outside != CHECK:
        return None
    if not shape or len(shape) != x.ndim or shape[:-1] != x.shape[:-1] or writes.own[-1] != 0 or x.numel == 0:
        return None
    loop = merged(Loop(shape, (out.stride, x.stride, writes.values.strides, writes.refs[0][3])), keep_innermost=True)
    tile = choose_whole_rows(loop.rows, x.shape[-1], shape[-1], x.dtype.itemsize, call.target)
    if tile is None:
        return None
    sizes, strides = loop.arguments()
    values = writes.values
    wide = is_wide(out, x, writes.refs[0][1], *([values.meta] if values.meta else []))
    args = (Out(0), Arg(0), () if values.ref is None else (values.ref,), values.number, writes.refs[0][0], extent(x.shape[-1]),
            Size(loop.rows), sizes, *strides)
    constants = Constants((("ADD", mode == ADD), ("COMPUTE", TRITON[compute]), ("WIDE", wide), ("BLOCK_Y", tile.rows),
                           ("BLOCK_X", tile.columns)))
    return (Launch(scatter_rows_kernel, (-(-loop.rows // tile.rows), 1, 1), args, constants, tile.warps, asserts=True),)


Make = Callable[[tuple[int, ...]], Writes]
"""What makes the writes for a written tensor of given strides."""


def put(call: Call, out: TensorMeta, make: Make, mode: int) -> Plan:
    """The plan of writes (SET or ADD) into the first argument, or into a copy of it laid out like ``out``."""
    x = call.args[0]
    writes = make(out.stride)
    if writes.values.meta is not None and writes.values.meta.dtype != x.dtype:
        raise Decline(f"values of {dtype_name(writes.values.meta.dtype)} for a tensor of {dtype_name(x.dtype)}")
    if out.may_overlap_itself:
        raise Decline("a tensor that overlaps itself")
    metas, disjoint = _refs(call, writes), _disjoint(call, writes)
    inplace, compute = is_inplace(call), opmath(x.dtype)
    moved = math.prod(writes.shape) * x.dtype.itemsize * 2 + (0 if inplace else 2 * x.numel * x.dtype.itemsize)
    if mode == ADD:
        if deterministic():
            raise Decline("atomics, while deterministic algorithms are asked for")
        inner = ATOMIC[x.dtype]
        if inner != x.dtype:
            # In a wider copy, rounded once at the end.
            allocs, result, at, wider = _aside(call, out, inner)
            function = nonzero if x.dtype == torch.bool else same
            launches = (*copied(call.target, Arg(0), x, at, wider.stride, compute=inner),
                        *_launch(call, make(wider.stride), at, wider, ADD, inner),
                        *copied(call.target, at, wider, result, out.stride, function))
            return Plan(allocs, launches, result, metas, disjoint=disjoint, bytes=moved)
    if inplace:
        return Plan((), _launch(call, writes, Arg(0), x, mode, compute), Arg(0), metas, disjoint=disjoint, bytes=moved)
    launches = _rows_at_once(call, out, writes, mode, compute) or (
        *copied(call.target, Arg(0), x, Out(0), out.stride), *_launch(call, writes, Out(0), out, mode, compute))
    return Plan((Alloc(x.shape, out.stride, x.dtype),), launches, Out(0), metas, disjoint=disjoint, bytes=moved)


def _disjoint(call: Call, writes: Writes) -> tuple[Disjoint, ...]:
    x = call.args[0]
    if not is_inplace(call):
        return ()
    return tuple(Disjoint(Arg(0), ref, x.extent * x.dtype.itemsize, m.extent * m.dtype.itemsize, False)
                 for ref, m in _refs(call, writes).items() if ref != Arg(0) and ref.index < len(call.args))


def _aside(call: Call, out: TensorMeta, inner: torch.dtype) -> tuple[tuple[Alloc, ...], Any, Any, TensorMeta]:
    """Allocations, the reference of the result, and reference and metadata of a contiguous tensor of dtype ``inner`` beside it."""
    x = call.args[0]
    wider = Alloc(x.shape, contiguous_strides(x.shape), inner)
    meta = wider.meta._replace(device=x.device)
    if is_inplace(call):
        return (wider,), Arg(0), Out(0), meta
    return (Alloc(x.shape, out.stride, x.dtype), wider), Out(0), Out(1), meta


def own_strides(strides: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Strides of the written tensor over the loop: 0 along the dimension that the index chooses in."""
    return tuple(0 if d == dim else s for d, s in enumerate(strides))


def _number(call: Call, index: int, x: TensorMeta) -> Num:
    value = call.args[index]
    if isinstance(value, complex) or (isinstance(value, float) and not x.dtype.is_floating_point):
        raise Decline("a fractional value for an integer tensor")
    return Num(index, "fp64" if x.dtype == torch.float64 else "fp32" if x.dtype.is_floating_point else "i64", limits=LIMITS.get(x.dtype))


def one_of(x: TensorMeta) -> float | int:
    return 1.0 if x.dtype.is_floating_point else 1


# -- index_put ---------------------------------------------------------------------------------------------------------


def written_advanced(call: Call, given: Sequence[Given], value: int, accumulate: bool, outside: int = WRAP,
                     mask: int | None = None) -> Plan:
    """``self[given] = values``, or ``+=``, of the argument number ``value``; only where the argument ``mask`` is true, if given."""
    x, values = call.args[0], call.args[value]
    out = written(call, True)

    def make(strides: tuple[int, ...]) -> Writes:
        shape, own, refs, _ = advanced(x._replace(stride=strides), given)
        if values.numel and broadcast_shape([shape, values.shape]) != shape:
            raise Decline("PyTorch rejects it: the values do not broadcast to the indices")
        masks = None if mask is None else (Arg(mask), call.args[mask], broadcast_strides(call.args[mask], shape))
        return Writes(shape, own, refs, [x.shape[d] for _, _, d, _ in refs], [strides[d] for _, _, d, _ in refs],
                      Values(Arg(value), values, broadcast_strides(values, shape), one_of(x)), outside, masks)

    return put(call, out, make, ADD if accumulate else SET)


@planned(["aten.index_put.default", "aten.index_put_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def index_put(call: Call) -> Plan:
    """``self[indices] = values`` or ``+= values``."""
    return written_advanced(call, given_indices(call.args[0], call.args[1], 1), 2, call.args[3])


@planned("aten._index_put_impl_.default", dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel, state=(deterministic,))
def index_put_impl(call: Call) -> Plan:
    """``index_put_`` with a promise, not relied on, that indices are in range."""
    return written_advanced(call, given_indices(call.args[0], call.args[1], 1), 2, call.args[3])


@planned("aten._unsafe_index_put.default", dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel, state=(deterministic,))
def unsafe_index_put(call: Call) -> Plan:
    """``index_put`` by another name."""
    return written_advanced(call, given_indices(call.args[0], call.args[1], 1), 2, call.args[3])


@planned("aten._unsafe_masked_index_put_accumulate.default", [dtype(*ALL, arg="self"), dtype(torch.bool, arg="mask")], family="indexing",
         kernel=put_kernel, state=(deterministic,))
def unsafe_masked_index_put_accumulate(call: Call) -> Plan:
    """``self[indices] += values`` where ``mask`` is true; indices outside are moved to the nearest place."""
    return written_advanced(call, given_indices(call.args[0], call.args[2], 2), 3, True, CLAMP, 1)


@planned(["aten.put.default", "aten.put_.default"], [dtype(*ALL, arg="self"), dtype(torch.int64, arg="index")], family="indexing",
         kernel=put_kernel, state=(deterministic,))
def put_flat(call: Call) -> Plan:
    """Elements of self, counted as if it were flat, become (or, accumulating, grow by) those of the source."""
    x, index, source, accumulate = call.args
    if index.numel != source.numel:
        raise Decline("PyTorch rejects it: an index and a source of different lengths")
    if not x.is_contiguous or (index.stride != source.stride and not (index.is_contiguous and source.is_contiguous)):
        raise Decline("a tensor, an index or a source that is not contiguous")
    if not accumulate and deterministic():
        raise Decline("which of several writes to one place wins is not determined")
    n = index.numel
    flat = (Arg(1), TensorMeta(index.dtype, (n,), (1,), index.device), 0, (1,))
    if not index.is_contiguous:
        flat = (Arg(1), index, 0, index.stride)
    shape = flat[1].shape
    values = Values(Arg(2), TensorMeta(source.dtype, shape, flat[3], source.device), flat[3], one_of(x))
    return put(call, written(call, False), lambda strides: Writes(shape, (0,) * len(shape), [flat], [x.numel], [1], values, WRAP),
               ADD if accumulate else SET)


# -- scatter -----------------------------------------------------------------------------------------------------------


def _along(call: Call) -> tuple[TensorMeta, int, TensorMeta]:
    """self, dim and index of a scatter, checked; 0-dim ones as vectors of one element."""
    x, dim, index = call.args[:3]
    if index.dtype not in INDEX:
        raise Decline(f"an index of {dtype_name(index.dtype)}")
    dim = wrap_dim(dim, x.ndim)
    x, index = _vector(x), _vector(index)
    if x.ndim != index.ndim:
        raise Decline("PyTorch rejects it: ranks that differ")
    if any(i > n for d, (i, n) in enumerate(zip(index.shape, x.shape)) if d != dim):
        raise Decline("PyTorch rejects it: the index is larger than the tensor in another dimension than dim")
    return x, dim, index


def _vector(meta: TensorMeta) -> TensorMeta:
    return meta if meta.shape else TensorMeta(meta.dtype, (1,), (1,), meta.device)


def _scatter_writes(call: Call, source: int | None, number: Any) -> Make:
    x, dim, index = _along(call)
    zeros = (0,) * x.ndim
    values = Values(None, None, zeros, number)
    if source is not None:
        src = _vector(call.args[source])
        if src.ndim != x.ndim or any(i > n for i, n in zip(index.shape, src.shape)):
            raise Decline("PyTorch rejects it: the index is larger than the source")
        values = Values(Arg(source), src, src.stride, number)
    return lambda strides: Writes(index.shape, own_strides(strides or (1,), dim), [(Arg(2), index, dim, index.stride)], [x.shape[dim]],
                                  [(strides or (1,))[dim]], values, CHECK)


@planned(["aten.scatter.src", "aten.scatter_.src"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel, state=(deterministic,))
def scatter_src(call: Call) -> Plan:
    """self, dim, index, src: ``self[index] = src`` along dim."""
    if deterministic():
        raise Decline("which of several writes to one place wins is not determined")
    return put(call, written(call, False), _scatter_writes(call, 3, one_of(call.args[0])), SET)


@planned(["aten.scatter.value", "aten.scatter_.value"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel)
def scatter_value(call: Call) -> Plan:
    """self, dim, index, value."""
    return put(call, written(call, False), _scatter_writes(call, None, _number(call, 3, call.args[0])), SET)


@planned(["aten.scatter_add.default", "aten.scatter_add_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def scatter_add(call: Call) -> Plan:
    """self, dim, index, src: ``self[index] += src`` along dim, by atomics."""
    return put(call, written(call, False), _scatter_writes(call, 3, one_of(call.args[0])), ADD)


@planned(["aten.scatter.reduce", "aten.scatter_.reduce"], dtype(*NUMERIC, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def scatter_reduce(call: Call) -> Plan:
    """``scatter_add`` under another name, or products."""
    if call["reduce"] == "add":
        return put(call, written(call, False), _scatter_writes(call, 3, one_of(call.args[0])), ADD)
    return _reduced(call, _scatter_writes(call, 3, one_of(call.args[0])), "prod", True)


@planned(["aten.scatter.value_reduce", "aten.scatter_.value_reduce"], dtype(*NUMERIC, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def scatter_value_reduce(call: Call) -> Plan:
    """``self[index] += value`` or ``*= value`` along dim."""
    make = _scatter_writes(call, None, _number(call, 3, call.args[0]))
    if call["reduce"] == "add":
        return put(call, written(call, False), make, ADD)
    return _reduced(call, make, "prod", True)


@planned(["aten.scatter_reduce.two", "aten.scatter_reduce_.two"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def scatter_reduce_two(call: Call) -> Plan:
    """self, dim, index, src, reduce (sum, prod, mean, amax, amin), include_self."""
    return _reduced(call, _scatter_writes(call, 3, one_of(call.args[0])), call["reduce"], call["include_self"])


# -- whole slices by a vector of indices -------------------------------------------------------------------------------


def _slices(call: Call, source: int | None, number: Any) -> Make:
    """Writes of ``self[..., index, ...]``: of the slices of the argument ``source``, or of a number or 0-dim tensor."""
    x, dim, index = call.args[:3]
    if index.ndim > 1 or index.dtype not in INDEX:
        raise Decline("PyTorch rejects it: an index that is no vector of integers")
    dim = wrap_dim(dim, x.ndim)
    x, index = _vector(x), _vector(index)
    shape = tuple(index.numel if d == dim else n for d, n in enumerate(x.shape))
    values = Values(None, None, (0,) * x.ndim, number)
    if source is not None:
        src = call.args[source]
        own = src.stride if src.ndim == x.ndim else (0,) * x.ndim
        if (src.shape or (1,)) != shape:
            raise Decline("PyTorch rejects it: the source's shape is not the tensor's with the index's length")
        values = Values(Arg(source), src, own, number)
    along = tuple(index.stride[0] if d == dim else 0 for d in range(x.ndim))
    return lambda strides: Writes(shape, own_strides(strides or (1,), dim), [(Arg(2), index, dim, along)], [x.shape[dim]],
                                  [(strides or (1,))[dim]], values, WRAP if source is None else CHECK)


@planned(["aten.index_add.default", "aten.index_add_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def index_add(call: Call) -> Plan:
    """self, dim, index, source, alpha: ``self[..., index, ...] += alpha * source``."""
    x = call.args[0]
    return put(call, written(call, False), _slices(call, 3, _number(call, 4, x)), ADD)


@planned(["aten.index_copy.default", "aten.index_copy_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def index_copy(call: Call) -> Plan:
    """self, dim, index, source: ``self[..., index, ...] = source``."""
    if deterministic():
        raise Decline("which of several writes to one place wins is not determined")
    return put(call, written(call, False), _slices(call, 3, one_of(call.args[0])), SET)


@planned(["aten.index_fill.int_Scalar", "aten.index_fill_.int_Scalar"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel)
def index_fill(call: Call) -> Plan:
    """self, dim, index, value: ``self[..., index, ...] = value``; negative indices count from the end."""
    return put(call, written(call, True), _slices(call, None, _number(call, 3, call.args[0])), SET)


@planned(["aten.index_fill.int_Tensor", "aten.index_fill_.int_Tensor"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel)
def index_fill_tensor(call: Call) -> Plan:
    """``index_fill`` by a 0-dim tensor."""
    x, value = call.args[0], call.args[3]
    if value.ndim:
        raise Decline("PyTorch rejects it: a value that is no 0-dim tensor")
    if value.device != x.device or value.dtype != x.dtype:
        raise Decline("a value on another device or of another dtype")
    fill = _slices(call, None, one_of(x))

    def make(strides: tuple[int, ...]) -> Writes:
        writes = fill(strides)
        return writes._replace(values=Values(Arg(3), value, (0,) * len(writes.shape), one_of(x)))

    return put(call, written(call, True), make, SET)


@planned(["aten.index_reduce.default", "aten.index_reduce_.default"], dtype(*NUMERIC, arg="self"), family="indexing", kernel=put_kernel,
         state=(deterministic,))
def index_reduce(call: Call) -> Plan:
    """self, dim, index, source, reduce (prod, mean, amax, amin), include_self."""
    return _reduced(call, _slices(call, 3, one_of(call.args[0])), call["reduce"], call["include_self"])


# -- reductions --------------------------------------------------------------------------------------------------------


@triton.jit
def mean_of(self, count):
    return self / tl.maximum(count, 1).to(self.dtype)


@triton.jit
def floor_mean_of(self, count):
    """Integers are divided towards minus infinity; ``//`` is C's in compiled kernels and Python's in the interpreter."""
    n = tl.maximum(count.to(self.dtype), 1)
    quotient = self // n
    return quotient - ((self - quotient * n) < 0).to(self.dtype)


def _reduced(call: Call, make: Make, reduce: str, include_self: bool) -> Plan:
    """The plan of a reduction at indices: in a contiguous tensor of the dtype that atomics need, then brought back."""
    x, target = call.args[0], call.target
    out = written(call, False)
    modes = {"sum": ADD, "mean": ADD, "prod": MULTIPLY, "multiply": MULTIPLY, "amax": LARGEST, "amin": SMALLEST}
    if reduce not in modes:
        raise Decline(f"PyTorch rejects it: reduce={reduce!r}")
    if deterministic():
        raise Decline("atomics, while deterministic algorithms are asked for")
    if out.may_overlap_itself:
        raise Decline("a tensor that overlaps itself")
    if x.dtype == torch.bool:
        raise Decline("bool")
    mode = modes[reduce]
    if mode == MULTIPLY and target.backend == "hip" and not EXCHANGES_ON_HIP:
        raise Decline("products on an AMD GPU, for which Triton before 3.7 does not compile the exchange of a block")
    compute = ATOMIC[x.dtype]
    inner = KEYS.get(compute, compute) if mode in (LARGEST, SMALLEST) else compute
    keyed = inner != compute
    writes = make(contiguous_strides(x.shape))
    if writes.values.meta is not None and writes.values.meta.dtype != x.dtype:
        raise Decline(f"values of {dtype_name(writes.values.meta.dtype)} for a tensor of {dtype_name(x.dtype)}")
    metas, disjoint = _refs(call, writes), _disjoint(call, writes)
    allocs, result, at, aside = _aside(call, out, inner)
    key = (2 if mode == LARGEST else 1) if keyed else 0
    into = (largest_key if mode == LARGEST else smallest_key) if keyed else same
    launches = copied(target, Arg(0), x, at, aside.stride, into, compute)
    nothing = (0,) * len(writes.shape)
    if not include_self:
        identity = Values(None, None, nothing, _identity(mode, compute, inner))
        launches += _launch(call, writes._replace(values=identity), at, aside, SET, inner)
    launches += _launch(call, writes, at, aside, mode, compute, key)
    if reduce != "mean":
        launches += copied(target, at, aside, result, out.stride, unordered if keyed else same)
        return Plan(allocs, launches, result, metas, disjoint=disjoint)
    # How many values met in each place: one more where self counts.
    tally = Alloc(x.shape, aside.stride, torch.int32)
    counts = Out(len(allocs))
    start = (one if include_self else zero)
    launches += copied(target, at, aside, counts, tally.stride, start)
    launches += _launch(call, writes._replace(values=Values(None, None, nothing, 1)), counts, tally.meta._replace(device=x.device), ADD,
                        torch.int32)
    if x.numel:
        kinds = ((0, inner, inner), (0, torch.int32, torch.int32))
        launches += (_strided(target, mean_of if x.dtype.is_floating_point else floor_mean_of, kinds, (result,), (at, counts), [out.stride],
                              [aside, tally.meta], x.shape, x.numel, 8),)
    return Plan((*allocs, tally), launches, result, metas, disjoint=disjoint)


@triton.jit
def zero(self):
    return tl.zeros_like(self).to(tl.int32)


@triton.jit
def one(self):
    return tl.zeros_like(self).to(tl.int32) + 1


def _identity(mode: int, compute: torch.dtype, inner: torch.dtype) -> Any:
    """What a reduction leaves as it is, as a number of dtype ``inner``."""
    if mode in (ADD, MULTIPLY):
        return float(mode == MULTIPLY) if compute.is_floating_point else int(mode == MULTIPLY)
    # Of keys too: the outermost are no float's, but one value at least follows.
    limit = torch.iinfo(inner)
    return Size(limit.min if mode == LARGEST else limit.max)
