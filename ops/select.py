"""The k-th smallest element of each row, medians, and the most frequent element.

Short rows, several in a program, go through the network of :mod:`gemsmode.ops.sort`. Of longer ones a program takes each. It
counts the elements by the highest eight bits of their keys, finds the bits of the wanted one, counts those of the same
beginning by the next eight bits, and so on; the last pass looks for the first element that has the key. Nothing is sorted
and nothing but the row is read, four or so times, from caches. Where there are too few long rows for that, a whole sort is
quicker, whose result a second launch looks up. Modes sort always, and find the longest run.

Source: D. E. Knuth, "The Art of Computer Programming", volume 3, 5.3.3. NaN (greatest for the k-th, wins a median, is left
out of a nanmedian, and is different from itself in a mode) as measured against PyTorch's results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops import sort
from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import power_of_2
from gemsmode.ops.promotion import ALL, NUMERIC
from gemsmode.ops.reduction import canonical_dims, offset_of, reduced_shape
from gemsmode.ops.sort import Keys, Rows, Sorting, flat_rows, flattened, key_of, keys, network, rows_of, store_results, tile_items, to_key
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def comparable(x):
    """Floats of 16 bits in float32: the interpreter compares bfloat16 as integers."""
    if x.dtype.is_floating() and x.dtype.primitive_bitwidth == 16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _rank(n, nans, k, MEDIAN: tl.constexpr):
    """Which of ``n`` elements in order, ``nans`` of them NaN, is wanted: number k, the median, or the one of the others."""
    if MEDIAN == "median":
        return tl.where(nans > 0, n - nans, (n - 1) // 2)
    elif MEDIAN == "nanmedian":
        return tl.maximum(n - nans - 1, 0) // 2
    else:
        return k + nans * 0


@triton.jit
def _store(p_values, p_indices, o_out, p_row, in_stride, index):
    tl.store(p_values + o_out, tl.load(p_row + index * in_stride))
    if len(p_indices) > 0:
        tl.store(p_indices[0] + o_out, index)


@triton.jit
def _at(x, there):
    """The element of each row of [A, N] that ``there`` marks: [A, 1]."""
    return tl.expand_dims(tl.sum(tl.where(there, x, 0).to(x.dtype), 1, dtype=x.dtype), 1)


@triton.jit
def short_kernel(p_values, p_indices, p_x, rows, n, k, k_sizes, in_steps, out_steps, in_stride, HOW: tl.constexpr, MEDIAN: tl.constexpr,
                 BLOCK_A: tl.constexpr, LOG_N: tl.constexpr):
    """Select from rows of at most 2^LOG_N elements by sorting them. Grid: blocks of rows."""
    i_a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    m_a = i_a < rows
    p_row = p_x + offset_of(i_a, k_sizes, in_steps)
    item = network(tile_items(p_row, (), i_a, m_a, 0, n, in_stride, HOW, LOG_N), LOG_N, LOG_N)
    j = tl.arange(0, 1 << LOG_N)[None, :]
    if HOW[0] == "float" and MEDIAN is not None:
        nan = m_a & (j < n) & (key_of(item, HOW) == (1 << HOW[1]) - 1)
        nans = tl.expand_dims(tl.sum(nan.to(tl.int32), 1), 1)
    else:
        nans = tl.zeros([BLOCK_A, 1], tl.int32)
    there = j == _rank(n, nans, k, MEDIAN)
    if len(item) == 1:
        found = (_at(item[0], there),)
    else:
        found = (_at(item[0], there), _at(item[1], there))
    store_results((p_values,), p_indices, offset_of(i_a, k_sizes, out_steps), found, p_row, in_stride, m_a, HOW)


@triton.jit
def select_kernel(p_values, p_indices, p_x, n, k, k_sizes, in_steps, out_steps, in_stride, HOW: tl.constexpr, MEDIAN: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Select from rows of ``n`` elements. Grid: rows."""
    BITS: tl.constexpr = 8 if HOW[1] == 1 else HOW[1]
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_x + offset_of(i_row, k_sizes, in_steps)
    j = tl.arange(0, BLOCK)
    nans = tl.zeros([], tl.int32)
    if HOW[0] == "float" and MEDIAN is not None:
        count = tl.zeros([BLOCK], tl.int32)
        for first in range(0, n, BLOCK):
            m = first + j < n
            x = comparable(tl.load(p_row + (first + j).to(tl.int64) * in_stride, mask=m, other=0))
            count += (m & (x != x)).to(tl.int32)
        nans = tl.sum(count, 0)
    rank = _rank(n, nans, k, MEDIAN)
    digits = tl.arange(0, 256)
    found = tl.zeros([1], KEY)  # the highest bits of the wanted key
    for step in tl.static_range(BITS // 8):
        counts = tl.zeros([256], tl.int32)
        for first in range(0, n, BLOCK):
            m = first + j < n
            key = to_key(tl.load(p_row + (first + j).to(tl.int64) * in_stride, mask=m, other=0), HOW)
            if step > 0:
                m = m & ((key >> (BITS - 8 * step)) == found)
            digit = ((key >> (BITS - 8 * step - 8)) & 255).to(tl.int32)
            counts += tl.histogram(tl.where(m, digit, 0), 256, mask=m)
        upto = tl.cumsum(counts, 0)
        right = tl.sum((upto <= rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(digits < right, counts, 0), 0)
        found = (found << 8) | right.to(KEY)
    least = tl.full([BLOCK], 2147483647, tl.int32)
    for first in range(0, n, BLOCK):
        m = first + j < n
        key = to_key(tl.load(p_row + (first + j).to(tl.int64) * in_stride, mask=m, other=0), HOW)
        least = tl.minimum(least, tl.where(m & (key == found), first + j, 2147483647))
    _store(p_values, p_indices, offset_of(i_row, k_sizes, out_steps), p_row, in_stride, tl.min(least, 0).to(tl.int64))


@triton.jit
def pick_kernel(p_values, p_indices, p_x, p_sorted, p_order, n, k, rounds, k_sizes, in_steps, out_steps, in_stride, MEDIAN: tl.constexpr):
    """Select from rows that are sorted already: ``p_sorted`` and where each element came from, [rows, n]. Grid: rows."""
    i_row = tl.program_id(0).to(tl.int64)
    low = tl.zeros([], tl.int32)
    if MEDIAN is not None:
        high = low + n
        for _ in range(rounds):  # the first NaN
            middle = (low + high) >> 1
            x = comparable(tl.load(p_sorted + i_row * n + tl.minimum(middle, n - 1)))
            searching = low < high
            low, high = (tl.where(searching & (x == x), middle + 1, low), tl.where(searching & (x != x), middle, high))
        nans = n - low
    else:
        nans = low
    index = tl.load(p_order + i_row * n + _rank(n, nans, k, MEDIAN))
    _store(p_values, p_indices, offset_of(i_row, k_sizes, out_steps), p_x + offset_of(i_row, k_sizes, in_steps), in_stride, index)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def mode_kernel(p_values, p_indices, p_x, p_sorted, p_order, n, k_sizes, in_steps, out_steps, in_stride, BLOCK: tl.constexpr):
    """The first longest run of each sorted row, [rows, n], and the last of its elements. Grid: rows."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_sorted + i_row * n
    begun = tl.zeros([], tl.int32)  # where the run began that reaches the end of the last block
    longest = tl.zeros([BLOCK], tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        m = i < n
        x = comparable(tl.load(p_row + i, mask=m, other=0))
        before = comparable(tl.load(p_row + tl.maximum(i - 1, 0), mask=m, other=0))
        start = tl.where((i > 0) & (x != before), i, begun)
        start = tl.associative_scan(start, 0, _later)
        length = tl.where(m, i - start + 1, 0)
        longer = length > longest
        longest = tl.where(longer, length, longest)
        place = tl.where(longer, i, place)
        begun = tl.max(start, 0)
    most = tl.max(longest, 0)
    last = tl.min(tl.where(longest == most, place, 2147483647), 0)
    _store(p_values, p_indices, offset_of(i_row, k_sizes, out_steps), p_x + offset_of(i_row, k_sizes, in_steps), in_stride,
           tl.load(p_order + i_row * n + last))


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """How to select.

    Attributes:
        scheme: ``"short"``, ``"count"`` or ``"sort"``: which kernel does.
        block: elements of a tile of the latter two.
        warps: their warps.
    """

    scheme: str
    block: int
    warps: int


_INTERPRETED_BLOCK = 1 << 15
_LONGEST_BLOCK = 2048
_WARPS = ((512, 2), (1 << 30, 4))  # (elements of a tile at most, warps)
_SHORT_ROW = 1 << 14  # a program passes over such a row in the time of a few launches


def choose(rows: int, n: int, parts: int, target: Target) -> Selection:
    """How to select from ``rows`` rows of ``n`` elements whose items have ``parts`` integers."""
    block = min(power_of_2(n), _INTERPRETED_BLOCK if target.interpreted else _LONGEST_BLOCK)
    block = max(block, 32)
    few = n > _SHORT_ROW and (rows < target.multiprocessors // 2 or n > _SHORT_ROW * 64)
    short = n <= 1 << sort.choose(rows, n, parts, target).log_tile
    scheme = "short" if short else "sort" if few else "count"
    return Selection(scheme, block, next(w for limit, w in _WARPS if block <= limit))


# -- plans -------------------------------------------------------------------------------------------------------------


def _sorted(call: Call, source: Any, rows: Rows, how: Keys, allocs: list[Alloc], launches: list[Launch]) -> tuple[Out, Out, list[Launch]]:
    """Sort rows into workspace, one after the other: values, indices, and the launches so far."""
    values, order = Out(len(allocs)), Out(len(allocs) + 1)
    allocs += [Alloc((rows.count * rows.n,), (1,), d) for d in (rows.meta.dtype, torch.int64)]
    steps: list[Any] = []
    step = rows.n
    for size in rows.sizes:
        steps.append(Size(step))
        step *= size.value
    dense = (*steps, Size(step)) if rows.count > 1 else ()
    sorting = Sorting(call.target, source, (values,), (order,), allocs, launches)
    sorting.smallest(Rows(rows.meta, rows.count, rows.n, rows.sizes, rows.steps, dense, rows.stride, 1), how, rows.n)
    return values, order, sorting.launches


def _select(call: Call, dim: int | None, keepdim: bool, k: int, median: str | None) -> Plan:
    """The plan of one selection along ``dim``, or among all elements."""
    meta: TensorMeta = call.args[0]
    allocs: list[Alloc] = []
    source: Any = Arg(0)
    launches: list[Launch] = []
    if dim is None:
        if meta.numel == 0:
            raise Decline("no elements")
        check_measured("median", call.target, n=meta.numel)
        allocs.append(Alloc((), (), meta.dtype))
        source, launches = flattened(call, 0, allocs)
        rows = flat_rows(meta)
    else:
        dims = canonical_dims(dim, meta.ndim)
        axis = dims[0] if dims else 0
        n = meta.shape[axis] if dims else 1
        if n == 0:
            raise Decline("PyTorch rejects it: rows without elements")
        if not 0 <= k < n:
            raise Decline("PyTorch rejects it: k is not in the range of the dimension")
        if median is None:
            check_measured("kthvalue", call.target, rows=meta.numel // n, n=n)
        shape = reduced_shape(meta.shape, dims, keepdim)
        kept = reduced_shape(meta.shape, dims, True)
        allocs += [Alloc(shape, contiguous_strides(shape), meta.dtype), Alloc(shape, contiguous_strides(shape), torch.int64)]
        rows = rows_of(meta, axis, contiguous_strides(kept)) if meta.numel else flat_rows(meta)
    returns: Any = (Out(0), Out(1)) if dim is not None else Out(0)
    moved = meta.numel * meta.dtype.itemsize + sum(a.meta.numel * a.dtype.itemsize for a in allocs[:2])
    if meta.numel == 0:
        return Plan(tuple(allocs), (), returns, {Arg(0): meta}, bytes=moved)
    indices = (Out(1),) if dim is not None else ()
    how = keys(meta.dtype, rows.n, False)
    chosen = choose(rows.count, rows.n, len(how.dtypes), call.target)
    nan = median if meta.dtype.is_floating_point else None
    rank = (rows.n - 1) // 2 if median else k
    if median == "mode":
        values, order, launches = _sorted(call, source, rows, how, allocs, launches)
        launches.append(Launch(
            mode_kernel, (rows.count, 1, 1),
            (Out(0), indices, source, values, order, Size(rows.n), rows.sizes, rows.steps, rows.out_steps, rows.stride),
            (("BLOCK", chosen.block),), chosen.warps))
    elif chosen.scheme == "short":
        tile = sort.choose(rows.count, rows.n, len(how.dtypes), call.target)
        launches.append(Launch(
            short_kernel, (-(-rows.count // tile.block_a), 1, 1),
            (Out(0), indices, source, Size(rows.count), extent(rows.n), Size(rank), rows.sizes, rows.steps, rows.out_steps, rows.stride),
            (("HOW", tuple(how)), ("MEDIAN", nan), ("BLOCK_A", tile.block_a), ("LOG_N", tile.log_tile)), tile.warps, 1))
    elif chosen.scheme == "sort":
        values, order, launches = _sorted(call, source, rows, how, allocs, launches)
        launches.append(Launch(
            pick_kernel, (rows.count, 1, 1),
            (Out(0), indices, source, values, order, Size(rows.n), Size(rank), Size(rows.n.bit_length()), rows.sizes, rows.steps,
             rows.out_steps, rows.stride),
            (("MEDIAN", nan),), 1))
    else:
        launches.append(Launch(
            select_kernel, (rows.count, 1, 1),
            (Out(0), indices, source, extent(rows.n), Size(rank), rows.sizes, rows.steps, rows.out_steps, rows.stride),
            (("HOW", tuple(how)), ("MEDIAN", nan), ("BLOCK", chosen.block)), chosen.warps, 1))
    return Plan(tuple(allocs), tuple(launches), returns, {Arg(0): meta}, bytes=moved)


# -- rules -------------------------------------------------------------------------------------------------------------

_NUMBERS = dtype(*NUMERIC, arg="self")


@planned(["aten.kthvalue.default"], _NUMBERS, family="sorting", kernel=select_kernel)
def kthvalue(call: Call) -> Plan:
    """self, k, dim, keepdim: the k-th smallest, counted from 1, and the first place where it is."""
    _, k, dim, keepdim = call.args
    return _select(call, dim, keepdim, k - 1, None)


@planned(["aten.median.default"], _NUMBERS, family="sorting", kernel=select_kernel)
def median(call: Call) -> Plan:
    """The lower median of all elements."""
    return _select(call, None, False, 0, "median")


@planned(["aten.median.dim"], _NUMBERS, family="sorting", kernel=select_kernel)
def median_dim(call: Call) -> Plan:
    """self, dim, keepdim: the lower median of each row, NaN where there is one."""
    return _select(call, call.args[1], call.args[2], 0, "median")


@planned(["aten.nanmedian.default"], _NUMBERS, family="sorting", kernel=select_kernel)
def nanmedian(call: Call) -> Plan:
    """The lower median of all elements that are not NaN."""
    return _select(call, None, False, 0, "nanmedian")


@planned(["aten.nanmedian.dim"], _NUMBERS, family="sorting", kernel=select_kernel)
def nanmedian_dim(call: Call) -> Plan:
    """self, dim, keepdim: the lower median of what is not NaN in each row."""
    return _select(call, call.args[1], call.args[2], 0, "nanmedian")


@planned(["aten.mode.default"], dtype(*ALL, arg="self"), family="sorting", kernel=mode_kernel)
def mode(call: Call) -> Plan:
    """self, dim, keepdim: the least of the most frequent elements of each row, and the last place where it is."""
    return _select(call, call.args[1], call.args[2], 0, "mode")
