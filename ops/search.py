"""Searching and counting: ``searchsorted``, ``bucketize``, ``isin``, ``histc``, ``bincount``.

* A binary search for each element, all in step: log2 of the sequence's length loads an element, the first ones of which
  hit the same few places.
* ``isin`` compares with each of a few test elements, or sorts them first and searches.
* Counts of up to 256 bins are taken in registers and summed up in a second launch. More bins are counted by integer
  atomics, on several copies so that few meet at one place; the order in which integers are added does not matter.
  Weights are added by atomics of floats, which repeat exactly only where sums are exact.

Source: the documentation of each op in PyTorch; NaN, edges of bins and dtypes as measured against its results.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import convert, power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, INT, NUMERIC, TRITON, opmath, result_type
from gemsmode.ops.reduction import merge_dims, offset_of, precise_div
from gemsmode.ops.sort import Sorting, flat_rows, flattened, keys
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _number(number, shape: tl.constexpr, COMMON: tl.constexpr, COMPUTE: tl.constexpr):
    """A number, rounded as a tensor's element would be. As a block, because the interpreter mistypes comparisons of scalars."""
    return convert(tl.broadcast_to(tl.cast(number, COMPUTE), shape), COMMON).to(COMPUTE)


@triton.jit
def _wanted(p_values, number, i, m, sizes, steps, COMMON: tl.constexpr, COMPUTE: tl.constexpr):
    """The values to look for: elements of a tensor or, without one, the same number everywhere."""
    if len(p_values) == 0:
        return _number(number, i.shape, COMMON, COMPUTE)
    else:
        return convert(tl.load(p_values[0] + offset_of(i, sizes, steps), mask=m, other=0), COMMON).to(COMPUTE)


@triton.jit
def search_kernel(p_out, p_sequence, p_values, number, p_sorter, total, n, each, rounds, sizes, steps, row_sizes, row_steps, along,
                  sorter_steps, sorter_along, COMMON: tl.constexpr, COMPUTE: tl.constexpr, RIGHT: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK: tl.constexpr):
    """The place of each value in its sequence of ``n`` elements; each sequence serves ``each`` values."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * BLOCK + tl.arange(0, BLOCK)
    m = i < total
    wanted = _wanted(p_values, number, i, m, sizes, steps, COMMON, COMPUTE)
    p_row = p_sequence + offset_of(i // each, row_sizes, row_steps)
    if len(p_sorter) > 0:
        p_sorter_row = p_sorter[0] + offset_of(i // each, row_sizes, sorter_steps)
    low = tl.zeros([BLOCK], tl.int64 if WIDE else tl.int32)
    high = low + n
    for _ in range(rounds):
        searching = m & (low < high)
        middle = (low + high) >> 1
        place = middle
        if len(p_sorter) > 0:
            place = tl.load(p_sorter_row + middle * sorter_along, mask=searching, other=0)
            tl.device_assert((searching & ((place < 0) | (place >= n))) == 0, "sorter index out of range")
        x = convert(tl.load(p_row + place * along, mask=searching, other=0), COMMON).to(COMPUTE)
        # Not the opposite comparison: past a NaN that is looked for nothing is greater.
        if RIGHT:
            after = (x > wanted) == 0
        else:
            after = (x >= wanted) == 0
        low = tl.where(searching & after, middle + 1, low)
        high = tl.where(searching & (after == 0), middle, high)
    tl.store(p_out + i, low.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def isin_kernel(p_out, p_values, number, p_tests, test, total, n, rounds, sizes, steps, test_sizes, test_steps, COMMON: tl.constexpr,
                COMPUTE: tl.constexpr, INVERT: tl.constexpr, SORTED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether each value is among ``n`` test elements, which are SORTED or compared with one by one."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * BLOCK + tl.arange(0, BLOCK)
    m = i < total
    wanted = _wanted(p_values, number, i, m, sizes, steps, COMMON, COMPUTE)
    if len(p_tests) == 0:
        found = wanted == _number(test, wanted.shape, COMMON, COMPUTE)
    elif SORTED:
        low = tl.zeros([BLOCK], tl.int32)
        high = low + n
        for _ in range(rounds):
            searching = m & (low < high)
            middle = (low + high) >> 1
            x = convert(tl.load(p_tests[0] + middle, mask=searching, other=0), COMMON).to(COMPUTE)
            less = x < wanted  # false for the NaNs, which come last
            low = tl.where(searching & less, middle + 1, low)
            high = tl.where(searching & (less == 0), middle, high)
        inside = m & (low < n)
        x = convert(tl.load(p_tests[0] + low, mask=inside, other=0), COMMON).to(COMPUTE)
        found = inside & (x == wanted)
    else:
        found = (i < 0) & m
        for j in range(n):
            o = offset_of(j + tl.zeros([1], tl.int32), test_sizes, test_steps)
            found = found | (convert(tl.load(p_tests[0] + o), COMMON).to(COMPUTE) == wanted)
    if INVERT:
        found = found == 0
    tl.store(p_out + i, found, mask=m)


@triton.jit
def extremes_kernel(p_out, p_x, n, in_step, tiles, FLOATS: tl.constexpr, BLOCK: tl.constexpr):
    """For integers: ``p_out`` [2] (zeros before) gets the greatest element + 1, and 1 if one is negative.

    FLOATS: it gets the bits of the least and the greatest element in float64, for each program; NaN if there is one.
    """
    i_0 = tl.program_id(0).to(tl.int64)
    if FLOATS:
        least = tl.full([BLOCK], float("inf"), tl.float64)
        greatest = tl.full([BLOCK], float("-inf"), tl.float64)
    else:
        greatest = tl.zeros([BLOCK], tl.int64)
        least = tl.zeros([BLOCK], tl.int64)
    for tile in range(tiles):
        i = (i_0 * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        m = i < n
        x = tl.load(p_x + i * in_step, mask=m, other=0)
        if FLOATS:
            x = x.to(tl.float32).to(tl.float64) if x.dtype != tl.float64 else x
            least = tl.minimum(least, tl.where(m, x, float("inf")), propagate_nan=tl.PropagateNan.ALL)
            greatest = tl.maximum(greatest, tl.where(m, x, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
        else:
            x = x.to(tl.int64)
            greatest = tl.maximum(greatest, tl.where(m, x + 1, 0))
            least = tl.minimum(least, tl.where(m, x, 0))
    if FLOATS:
        nan = tl.max((least != least).to(tl.int32), 0) > 0
        least = tl.where(nan, float("nan"), tl.min(least, 0)).to(tl.float64)
        greatest = tl.where(nan, float("nan"), tl.max(greatest, 0)).to(tl.float64)
        tl.store(p_out + 2 * i_0, least.to(tl.int64, bitcast=True))
        tl.store(p_out + 2 * i_0 + 1, greatest.to(tl.int64, bitcast=True))
    else:
        tl.atomic_max(p_out, tl.max(greatest, 0), sem="relaxed")
        tl.atomic_max(p_out + 1, (tl.min(least, 0) < 0).to(tl.int64), sem="relaxed")


@triton.jit
def _bin(x, low, high, bins, m, COMPUTE: tl.constexpr):
    """The bin of each element, and which elements have one: all (RANGE is empty), or those from low to high."""
    if COMPUTE is None:
        return x.to(tl.int32), m
    else:
        # The limits come as the bits of float64 numbers.
        low = low.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        high = high.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
        x = x.to(COMPUTE)
        inside = m & (x >= low) & (x <= high)
        place = precise_div((tl.where(inside, x, low) - low) * bins.to(COMPUTE), high - low).to(tl.int32)
        return tl.minimum(place, bins - 1), inside


@triton.jit
def count_kernel(p_counts, p_x, p_weights, n, in_step, weight_step, bins, low, high, tiles, copies, COMPUTE: tl.constexpr,
                 BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Count elements by bin into ``p_counts`` [copies, bins].

    With BINS (a power of two) a program keeps its counts in registers and has a copy of its own, else it adds to one by
    atomics; with weights these are added.
    """
    i_0 = tl.program_id(0).to(tl.int64)
    if BINS > 0:
        counts = tl.zeros([BINS], tl.int32)
    p_own = p_counts + (i_0 % copies) * bins
    for tile in range(tiles):
        i = (i_0 * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        m = i < n
        place, m = _bin(tl.load(p_x + i * in_step, mask=m, other=0), low, high, bins, m, COMPUTE)
        if BINS > 0:
            counts += tl.histogram(tl.where(m, place, 0), BINS, mask=m)
        elif len(p_weights) > 0:
            weight = convert(tl.load(p_weights[0] + i * weight_step, mask=m, other=0), p_counts.dtype.element_ty)
            tl.atomic_add(p_own + place, weight, mask=m, sem="relaxed")
        else:
            tl.atomic_add(p_own + place, tl.full([BLOCK], 1, tl.int32), mask=m, sem="relaxed")
    if BINS > 0:
        b = tl.arange(0, BINS)
        tl.store(p_own + b, counts, mask=b < bins)


@triton.jit
def total_kernel(p_out, p_counts, bins, copies, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sum of ``p_counts`` [copies, bins] over the copies."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_B], tl.int32)
    for first in range(0, copies, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[:, None]
        total += tl.load(p_counts + c.to(tl.int64) * bins + b, mask=(c < copies) & (b < bins), other=0)
    out = convert(tl.expand_dims(tl.sum(total, 0), 0), p_out.dtype.element_ty)
    tl.store(p_out + b, out, mask=b < bins)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting:
    """How elements are counted: elements of a tile, tiles of a program, programs, and copies of the counts."""

    block: int
    tiles: int
    programs: int
    copies: int
    in_registers: bool


_BLOCK = 1024  # elements of a program that searches: eight independent searches in each of 128 threads
_INTERPRETED_BLOCK = 1 << 15
_BINS_IN_REGISTERS = 256
_MOST_COUNTS = 1 << 19  # in all copies together: 2 MB, well within the caches
_FEW_TESTS = 48  # a search of sorted elements has about as many instructions as so many comparisons


def choose_counting(n: int, bins: int, weighted: bool, target: Target) -> Counting:
    """How to count ``n`` elements in ``bins`` bins."""
    block = _INTERPRETED_BLOCK if target.interpreted else 2048
    most = 2 if target.interpreted else 4 * target.multiprocessors
    blocks = -(-n // block)
    tiles = -(-blocks // most)
    programs = -(-blocks // tiles)
    in_registers = bins <= _BINS_IN_REGISTERS and not weighted
    copies = programs if in_registers else 1 if weighted else max(min(programs, 16, _MOST_COUNTS // bins), 1)
    return Counting(block, tiles, programs, copies, in_registers)


def _block(target: Target) -> int:
    return _INTERPRETED_BLOCK if target.interpreted else _BLOCK


# -- plans -------------------------------------------------------------------------------------------------------------


def _step(step: int) -> int | Size:
    return step if step == 1 else stride(step)


def _layout(meta: TensorMeta) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Sizes (without the slowest) and strides of a tensor's merged dimensions, in the order of its elements."""
    dims = merge_dims([(size, (step,)) for size, step in zip(meta.shape, meta.stride)], True)
    steps = dims.strides[0] if dims.strides else ()
    return tuple([Size(s) for s in dims.sizes[:-1]]), tuple([_step(s) for s in steps])


def _given(call: Call, index: int, compute: torch.dtype) -> Num:
    if compute.is_floating_point:
        return Num(index, "fp64" if compute == torch.float64 else "fp32")
    return Num(index, "i64")


def _promoted(a: Any, b: Any) -> torch.dtype:
    common = result_type([a, b])
    if common not in NUMERIC:
        raise Decline(f"{dtype_name(common)} is not handled by searches")
    return common


def _wide(*metas: Any) -> bool:
    return any(max(m.numel, m.extent) >= 2**31 - 2**16 for m in metas if m.__class__ is TensorMeta)


def _search(call: Call, sequence: int, values: int, sorter: int | None) -> Plan:
    """The plan of one search; arguments by number."""
    seq, wanted = call.args[sequence], call.args[values]
    order = call.args[sorter] if sorter is not None else None
    right = call["right"]
    side = call["side"] if sorter is not None else None
    if side is not None:
        if side not in ("left", "right") or (right and side == "left"):
            raise Decline("PyTorch rejects it: side")
        right = side == "right"
    is_tensor = wanted.__class__ is TensorMeta
    if not is_tensor and wanted.__class__ is complex:
        raise Decline("a complex number")
    shape: tuple[int, ...] = wanted.shape if is_tensor else ()
    common = _promoted(seq, wanted)
    if seq.ndim == 0 or (seq.ndim > 1 and (not shape or shape[:-1] != seq.shape[:-1])):
        raise Decline("PyTorch rejects it: the sequence's leading dimensions are not the values'")
    if order is not None and (order.dtype != torch.int64 or order.shape != seq.shape):
        raise Decline("PyTorch rejects it: the sorter is no int64 tensor of the sequence's shape")
    for meta in (seq, wanted, order):
        if meta.__class__ is TensorMeta and meta.dtype not in NUMERIC:
            raise Decline(f"{dtype_name(meta.dtype)} is not handled by searches")
    if seq.shape[-1] >= 2**31 and call["out_int32"]:
        raise Decline("PyTorch rejects it: the result does not fit int32")
    alloc = Alloc(shape, contiguous_strides(shape), torch.int32 if call["out_int32"] else torch.int64)
    total, n = alloc.meta.numel, seq.shape[-1]
    check_measured("search", call.target, boundaries=n)
    metas = {Arg(sequence): seq}
    if is_tensor:
        metas[Arg(values)] = wanted
    sorters: tuple[Arg, ...] = ()
    if sorter is not None and order is not None:
        sorters = (Arg(sorter),)
        metas[sorters[0]] = order
    moved = sum(m.numel * m.dtype.itemsize for m in metas.values()) + total * alloc.dtype.itemsize
    if total == 0:
        return Plan((alloc,), (), Out(0), metas, bytes=moved)
    compute = opmath(common)
    columns = [(size, (seq.stride[d], order.stride[d] if order is not None else 0)) for d, size in enumerate(seq.shape[:-1])]
    rows = merge_dims(columns, True)
    row_steps, order_steps = rows.strides if rows.strides else ((), ())
    sizes, steps = _layout(wanted) if is_tensor else ((), ())
    wide, block = _wide(seq, wanted, order), _block(call.target)
    launch = Launch(
        search_kernel, (-(-total // block), 1, 1),
        (Out(0), Arg(sequence), (Arg(values),) if is_tensor else (), 0 if is_tensor else _given(call, values, compute),
         sorters, extent(total), Size(n), Size(shape[-1] if seq.ndim > 1 else total),
         Size(n.bit_length()), sizes, steps, tuple([Size(s) for s in rows.sizes[:-1]]), tuple([stride(s) for s in row_steps]),
         _step(seq.stride[-1]), tuple([stride(s) for s in order_steps]), _step(order.stride[-1] if order is not None else 1)),
        (("COMMON", TRITON[common]), ("COMPUTE", TRITON[compute]), ("RIGHT", right), ("WIDE", wide), ("BLOCK", block)),
        asserts=order is not None)
    return Plan((alloc,), (launch,), Out(0), metas, bytes=moved)


def _isin(call: Call, values: int, tests: int) -> Plan:
    x, test = call.args[values], call.args[tests]
    common = _promoted(x, test)
    compute = opmath(common)
    invert = call["invert"]
    shape = x.shape if x.__class__ is TensorMeta else ()
    allocs = [Alloc(shape, contiguous_strides(shape), torch.bool)]
    metas = {Arg(i): call.args[i] for i in (values, tests) if call.args[i].__class__ is TensorMeta}
    for meta in metas.values():
        if meta.dtype not in NUMERIC:
            raise Decline(f"{dtype_name(meta.dtype)} is not handled by searches")
    total = allocs[0].meta.numel
    moved = sum(m.numel * m.dtype.itemsize for m in metas.values()) + total
    if total == 0:
        return Plan(tuple(allocs), (), Out(0), metas, bytes=moved)
    n = test.numel if test.__class__ is TensorMeta else 1
    launches: list[Launch] = []
    given: tuple[Any, ...] = (Arg(tests),) if test.__class__ is TensorMeta else ()
    layout: tuple[Any, Any] = _layout(test) if given else ((), ())
    ordered = bool(given) and n > _FEW_TESTS and total > 1
    if ordered:
        source, launches = flattened(call, tests, allocs)
        given = (Out(len(allocs)),)
        allocs.append(Alloc((n,), (1,), test.dtype))
        sorting = Sorting(call.target, source, given, (), allocs, launches)
        sorting.smallest(flat_rows(test), keys(test.dtype, n, False), n)
        launches = sorting.launches
    sizes, steps = _layout(x) if x.__class__ is TensorMeta else ((), ())
    block = _block(call.target)
    launches.append(Launch(
        isin_kernel, (-(-total // block), 1, 1),
        (Out(0), (Arg(values),) if x.__class__ is TensorMeta else (), 0 if x.__class__ is TensorMeta else _given(call, values, compute),
         given, 0 if given else _given(call, tests, compute), extent(total), Size(n), Size(n.bit_length()), sizes, steps, *layout),
        (("COMMON", TRITON[common]), ("COMPUTE", TRITON[compute]), ("INVERT", invert), ("SORTED", ordered),
         ("WIDE", _wide(x, test)), ("BLOCK", block))))
    return Plan(tuple(allocs), tuple(launches), Out(0), metas, bytes=moved)


def _counts(call: Call, source: Any, x: TensorMeta, out: Any, bins: int, limits: tuple[float, float] | None, weights: Arg | None,
            allocs: list[Alloc]) -> list[Launch]:
    """The launches that count ``x`` (found at ``source``) into ``out``."""
    n = x.numel
    how = choose_counting(n, bins, weights is not None, call.target)
    low, high = (_bits(v) for v in limits) if limits is not None else (Size(0), Size(0))
    counts = out
    if weights is None:
        counts = Out(len(allocs))
        allocs.append(Alloc((how.copies * bins,), (1,), torch.int32, zero=not how.in_registers))
    compute = None if limits is None else TRITON[opmath(x.dtype)]
    weight_step = _flat_step(call.args[weights.index]) if weights is not None else 1
    launches = [Launch(
        count_kernel, (how.programs, 1, 1),
        (counts, source, (weights,) if weights is not None else (), extent(n), _flat_step(x), weight_step, Size(bins), low, high,
         Size(how.tiles), Size(how.copies)),
        (("COMPUTE", compute), ("BINS", max(power_of_2(bins), 2) if how.in_registers else 0), ("BLOCK", how.block)))]
    if weights is None:
        block_b = min(power_of_2(bins), 64 if not call.target.interpreted else 1 << 12)
        block_c = min(power_of_2(how.copies), 32)
        launches.append(Launch(total_kernel, (-(-bins // block_b), 1, 1), (out, counts, Size(bins), Size(how.copies)),
                               (("BLOCK_C", block_c), ("BLOCK_B", block_b))))
    return launches


def _flat_step(meta: TensorMeta) -> int | Size:
    return _step(meta.stride[0]) if meta.ndim == 1 else 1


def _bits(value: float) -> Size:
    """A float64 number as the integer of its bits, which kernels take without rounding it."""
    return Size(struct.unpack("<q", struct.pack("<d", value))[0])


def _number_of(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


# -- rules -------------------------------------------------------------------------------------------------------------


@planned(["aten.searchsorted.Tensor", "aten.searchsorted.Scalar"], family="sorting", kernel=search_kernel)
def searchsorted(call: Call) -> Plan:
    """sorted_sequence, self, out_int32, right, side, sorter: a contiguous result of self's shape."""
    return _search(call, 0, 1, 5)


@planned(["aten.bucketize.Tensor", "aten.bucketize.Scalar"], family="sorting", kernel=search_kernel)
def bucketize(call: Call) -> Plan:
    """self, boundaries, out_int32, right: ``searchsorted`` with one sequence for all."""
    if call.args[1].ndim != 1:
        raise Decline("PyTorch rejects it: boundaries are a vector")
    return _search(call, 1, 0, None)


@planned(["aten.isin.Tensor_Tensor", "aten.isin.Tensor_Scalar", "aten.isin.Scalar_Tensor"], family="sorting", kernel=isin_kernel)
def isin(call: Call) -> Plan:
    """elements, test_elements, assume_unique, invert: what is unique makes no difference here."""
    return _isin(call, 0, 1)


@planned(["aten.histc.default"], dtype(*FLOAT, arg="self"), family="sorting", kernel=count_kernel, by_value=("min", "max"))
def histc(call: Call) -> Plan:
    """self, bins, min, max: counts in self's dtype of ``bins`` equal parts of [min, max], by default the range of self."""
    x, bins, low, high = call.args
    if bins <= 0 or low.__class__ is complex or high.__class__ is complex or not (low <= high and math.isfinite(high - low)):
        raise Decline("PyTorch rejects it: no bins, or no finite range")
    if x.numel >= 2**31:
        raise Decline("counts of 2**31 elements or more")
    out = Alloc((bins,), (1,), x.dtype)
    moved = x.numel * x.dtype.itemsize + bins * x.dtype.itemsize
    if x.numel == 0:
        return Plan((out._replace(zero=True),), (), Out(0), {Arg(0): x}, bytes=moved)

    def counted(bottom: float, top: float) -> Plan:
        allocs = [out]
        source, launches = flattened(call, 0, allocs)
        launches += _counts(call, source, x._replace(shape=(x.numel,), stride=(1,)), Out(0), bins, (bottom, top), None, allocs)
        return Plan(tuple(allocs), tuple(launches), Out(0), {Arg(0): x}, bytes=moved)

    if low < high:
        return counted(float(low), float(high))

    allocs: list[Alloc] = []
    source, launches = flattened(call, 0, allocs)
    block = _INTERPRETED_BLOCK if call.target.interpreted else 2048
    tiles = -(-x.numel // (block * 128))
    programs = -(-x.numel // (block * tiles))
    ends = Out(len(allocs))
    allocs.append(Alloc((2 * programs,), (1,), torch.int64))
    launches.append(Launch(extremes_kernel, (programs, 1, 1), (ends, source, extent(x.numel), 1, Size(tiles)),
                           (("FLOATS", True), ("BLOCK", block))))

    def then(values: list[int]) -> Plan:
        numbers = [_number_of(v) for v in values]
        bottom, top = min(numbers[::2]), max(numbers[1::2])
        if not all(map(math.isfinite, numbers)):
            raise Decline("PyTorch rejects it: the range is not finite")
        return counted(bottom, top) if bottom < top else counted(bottom - 1, top + 1)

    return Plan(tuple(allocs), tuple(launches), ends, {Arg(0): x}, bytes=moved, then=then, example=(0,) * programs + (1,) * programs)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


@planned(["aten.bincount.default"], dtype(*INT, arg="self"), family="sorting", kernel=count_kernel, state=(_deterministic,))
def bincount(call: Call) -> Plan:
    """self, weights, minlength: as many counts as the greatest element asks for, or sums of weights."""
    x, weights, least = call.args
    if x.ndim != 1 or least < 0 or (weights is not None and weights.shape != x.shape):
        raise Decline("PyTorch rejects it: self is no vector, weights have another shape, or minlength is negative")
    if weights is not None and weights.dtype not in ALL:
        raise Decline(f"weights of {dtype_name(weights.dtype)}")
    if x.numel == 0 or x.numel >= 2**31:
        raise Decline("no elements, or 2**31 or more")
    if weights is not None and _deterministic():
        raise Decline("atomics, while deterministic algorithms are asked for")
    result = torch.int64 if weights is None else torch.float32 if weights.dtype == torch.float32 else torch.float64
    metas = {Arg(0): x} if weights is None else {Arg(0): x, Arg(1): weights}
    how = choose_counting(x.numel, 1, False, call.target)
    first = Launch(extremes_kernel, (how.programs, 1, 1), (Out(0), Arg(0), extent(x.numel), _flat_step(x), Size(how.tiles)),
                   (("FLOATS", False), ("BLOCK", how.block)))

    def then(values: list[int]) -> Plan:
        size, negative = max(values[0], least), values[1]
        if negative or size >= 2**31:
            raise Decline("PyTorch rejects it: a negative element, or too many bins")
        allocs = [Alloc((size,), (1,), result, zero=weights is not None)]
        launches = _counts(call, Arg(0), x, Out(0), size, None, None if weights is None else Arg(1), allocs)
        return Plan(tuple(allocs), tuple(launches), Out(0), metas)

    return Plan((Alloc((2,), (1,), torch.int64, zero=True),), (first,), Out(0), {Arg(0): x}, then=then, example=(1000, 0),
                bytes=x.numel * x.dtype.itemsize)
