"""Sorting along one dimension: networks in registers, then merges; the smallest or greatest of a row by the same means.

An element becomes an *item*, an unsigned integer whose order is the wanted one: its value, mapped to an unsigned key that
keeps the order (NaN greatest, -0.0 equal to 0.0, all bits flipped for a descending order), and below the key its index.
No two items are equal, so every way of sorting them is the stable one, and the index costs no second array. Keys of
64 bits leave no room, so that their items are pairs of key and index.

* A bitonic network sorts tiles in registers: whole rows, several of them in a program if they are short, or tiles of a row.
* Sorted runs are merged two by two. A program finds, by a search in both runs, the part of each that makes one tile of the
  result; the one ascending and the other descending they are a bitonic sequence, which half a network's last stage sorts.
* Where few elements of a row are wanted, a tile keeps only as many, and the next launch sorts what all tiles have kept.
  Before its network a tile drops what cannot be among them.

A radix sort would need a stable rank in every tile and pass: four bits of a key at a time that is 370 instructions an
element in compiled code, as much as sixteen of the network's 55 steps for 1024 elements take together.

Sources: K. E. Batcher, "Sorting networks and their applications" (1968); S. Odeh, O. Green, Z. Mwassi, O. Shmueli,
Y. Birk, "Merge path" (2012). Order, ties, strides and dtypes as measured against PyTorch's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.ops.copy import same
from gemsmode.ops.layout import preserved_strides
from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import Operand, build, power_of_2
from gemsmode.ops.promotion import ALL
from gemsmode.ops.reduction import INTERPRETED, canonical_dims, merge_dims, offset_of
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- items -------------------------------------------------------------------------------------------------------------
#
# `Keys` below says how a dtype is mapped: KIND ("float", "signed" or "unsigned"), BITS of the dtype, bits of the
# mantissa of a float (for its NaNs), the bits below the key that hold the index, and whether the order is descending.
# Items are tuples of blocks: one, or key and index.


@triton.jit
def to_key(x, HOW: tl.constexpr):
    """The unsigned integer, 32 or 64 bits wide, that orders as ``x`` does."""
    KIND: tl.constexpr = HOW[0]
    BITS: tl.constexpr = HOW[1]
    WIDE: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL_ONES: tl.constexpr = (1 << BITS) - 1
    if KIND == "float":
        SAME: tl.constexpr = tl.uint64 if BITS == 64 else (tl.uint32 if BITS == 32 else tl.uint16)
        INFINITY: tl.constexpr = ((1 << (BITS - 1 - HOW[2])) - 1) << HOW[2]
        b = x.to(SAME, bitcast=True).to(WIDE)
        magnitude = b & (SIGN - 1)
        b = tl.where(magnitude == 0, magnitude, b)
        key = tl.where((b & SIGN) != 0, b ^ ALL_ONES, b | SIGN)
        key = tl.where(magnitude > INFINITY, ALL_ONES, key).to(WIDE)
    elif KIND == "signed":
        SIGNED: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
        key = (x.to(SIGNED).to(WIDE, bitcast=True) ^ SIGN) & ALL_ONES
    else:
        key = x.to(WIDE)
    if HOW[4]:
        key = key ^ ALL_ONES
    return key


@triton.jit
def to_item(x, i, HOW: tl.constexpr):
    """The item of the value ``x`` at index ``i``."""
    key = to_key(x, HOW)
    if HOW[3] == 0:
        return key, i.to(tl.uint32)
    elif HOW[3] + HOW[1] > 32:
        return ((key.to(tl.uint64) << HOW[3]) | i.to(tl.uint64),)
    else:
        return ((key << HOW[3]) | i.to(tl.uint32),)


@triton.jit
def key_of(item, HOW: tl.constexpr):
    if HOW[3] == 0:
        return item[0]
    else:
        return (item[0] >> HOW[3]).to(tl.uint32)


@triton.jit
def index_of(item, HOW: tl.constexpr):
    if HOW[3] == 0:
        return item[1]
    else:
        return item[0] & ((1 << HOW[3]) - 1)


@triton.jit
def value_of(item, p_row, in_stride, m, HOW: tl.constexpr):
    """The value of an item of the row at ``p_row``; only what several values share a key of is read again."""
    KIND: tl.constexpr = HOW[0]
    BITS: tl.constexpr = HOW[1]
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL_ONES: tl.constexpr = (1 << BITS) - 1
    key = key_of(item, HOW)
    if HOW[4]:
        key = key ^ ALL_ONES
    if KIND == "float":
        SAME: tl.constexpr = tl.uint64 if BITS == 64 else (tl.uint32 if BITS == 32 else tl.uint16)
        shared = (key == SIGN) | (key == ALL_ONES)  # a zero, or a NaN
        bits = tl.where((key & SIGN) != 0, key ^ SIGN, key ^ ALL_ONES)
        x = bits.to(SAME).to(p_row.dtype.element_ty, bitcast=True)
        again = tl.load(p_row + index_of(item, HOW).to(tl.int64) * in_stride, mask=m & shared, other=0)
        return tl.where(shared, again, x)
    elif KIND == "signed":
        SIGNED: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
        return (key ^ SIGN).to(SIGNED, bitcast=True).to(p_row.dtype.element_ty)
    elif BITS == 1:
        return key != 0
    else:
        return key.to(p_row.dtype.element_ty)


@triton.jit
def load_items(p_items, o, m):
    b0 = tl.load(p_items[0] + o, mask=m, other=0)
    if len(p_items) == 1:
        return (b0,)
    else:
        return b0, tl.load(p_items[1] + o, mask=m, other=0)


@triton.jit
def store_items(p_items, o, item, m):
    for i in tl.static_range(len(p_items)):
        tl.store(p_items[i] + o, item[i], mask=m)


# -- networks ----------------------------------------------------------------------------------------------------------


@triton.jit
def _partner(x, BIT: tl.constexpr):
    """``x`` [A, N] at each column with one bit of its number flipped."""
    A: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if INTERPRETED:
        columns = tl.broadcast_to(tl.arange(0, N)[None, :] ^ (1 << BIT), [A, N])
        return tl.gather(x, columns, 1)
    else:
        h = tl.reshape(x, [A, N // (2 << BIT), 2, 1 << BIT])
        return tl.reshape(h ^ tl.xor_sum(h, axis=2, keep_dims=True), [A, N])


@triton.jit
def _partners(item, BIT: tl.constexpr):
    if len(item) == 1:
        return (_partner(item[0], BIT),)
    else:
        return _partner(item[0], BIT), _partner(item[1], BIT)


@triton.jit
def _greater(a, b):
    if len(a) == 1:
        return a[0] > b[0]
    else:
        return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] > b[1]))


@triton.jit
def _exchange(item, descends, BIT: tl.constexpr):
    """Sort each pair of columns whose numbers differ in BIT, in the direction that ``descends`` gives."""
    N: tl.constexpr = item[0].shape[1]
    right = ((tl.arange(0, N) >> BIT) & 1)[None, :] != 0
    other = _partners(item, BIT)
    take = _greater(item, other) != (right != descends)
    if len(item) == 1:
        return (tl.where(take, other[0], item[0]),)
    else:
        return tl.where(take, other[0], item[0]), tl.where(take, other[1], item[1])


@triton.jit
def _merge(item, STAGE: tl.constexpr, LAST: tl.constexpr):
    """Sort bitonic runs of 2^STAGE columns, every other one descending unless this is the LAST stage."""
    N: tl.constexpr = item[0].shape[1]
    if LAST:
        descends = (tl.arange(0, N) < 0)[None, :]
    else:
        descends = ((tl.arange(0, N) >> STAGE) & 1)[None, :] != 0
    for i in tl.static_range(STAGE):
        item = _exchange(item, descends, STAGE - 1 - i)
    return item


@triton.jit
def _least_halves(item, BIT: tl.constexpr):
    """Of each two runs of 2^BIT columns, one ascending and one descending, the smaller half, which is bitonic."""
    A: tl.constexpr = item[0].shape[0]
    N: tl.constexpr = item[0].shape[1]
    if len(item) == 1:
        least = tl.min(tl.reshape(item[0], [A, N // (2 << BIT), 2, 1 << BIT]), axis=2)
        return (tl.reshape(least, [A, N // 2]),)
    else:
        other = _partners(item, BIT)
        take = _greater(item, other)
        left = ((tl.arange(0, N) >> BIT) & 1)[None, :] == 0
        k = tl.where(left, tl.where(take, other[0], item[0]), 0).to(item[0].dtype)
        i = tl.where(left, tl.where(take, other[1], item[1]), 0).to(item[1].dtype)
        k = tl.sum(tl.reshape(k, [A, N // (2 << BIT), 2, 1 << BIT]), axis=2, dtype=k.dtype)
        i = tl.sum(tl.reshape(i, [A, N // (2 << BIT), 2, 1 << BIT]), axis=2, dtype=i.dtype)
        return tl.reshape(k, [A, N // 2]), tl.reshape(i, [A, N // 2])


@triton.jit
def network(item, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The 2^LOG_K smallest items of each row of [A, 2^LOG_N], in order."""
    for stage in tl.static_range(1, LOG_K + 1):
        item = _merge(item, stage, stage == LOG_N)
    for stage in tl.static_range(LOG_K + 1, LOG_N + 1):
        item = _least_halves(item, LOG_K)
        item = _merge(item, LOG_K, stage == LOG_N)
    return item


@triton.jit
def network_end(item, LOG_N: tl.constexpr):
    """A bitonic row of [A, 2^LOG_N] items, in order."""
    return _merge(item, LOG_N, True)


@triton.jit
def _or_greatest(x, m):
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    return tl.where(m, x, tl.full([1, 1], (1 << BITS) - 1, x.dtype))


@triton.jit
def _padded(item, m):
    """Items with the greatest ones where ``m`` is not: of equal keys the index decides, so that they come last."""
    if len(item) == 1:
        return (_or_greatest(item[0], m),)
    else:
        return _or_greatest(item[0], m), _or_greatest(item[1], m)


@triton.jit
def store_results(p_values, p_indices, o_out, item, p_row, in_stride, m, HOW: tl.constexpr):
    if len(p_values) > 0:
        tl.store(p_values[0] + o_out, value_of(item, p_row, in_stride, m, HOW), mask=m)
    if len(p_indices) > 0:
        tl.store(p_indices[0] + o_out, index_of(item, HOW).to(tl.int64), mask=m)


@triton.jit
def tile_items(p_row, p_from, i_a, m_a, first, n, in_stride, HOW: tl.constexpr, LOG_N: tl.constexpr):
    """Items [A, 2^LOG_N] of each row from ``first`` on: of ``p_row`` or, if given, of ``p_from``, where rows have n items."""
    column = first + tl.arange(0, 1 << LOG_N)[None, :]
    m = m_a & (column < n)
    if len(p_from) == 0:
        x = tl.load(p_row + column.to(tl.int64) * in_stride, mask=m, other=0)
        return _padded(to_item(x, tl.broadcast_to(column, x.shape), HOW), m)
    else:
        return _padded(load_items(p_from, i_a * n + column, m), m)


@triton.jit
def network_kernel(p_values, p_indices, p_to, p_x, p_from, rows, n, tiles, k, k_sizes, in_steps, out_steps, in_stride, out_stride,
                   HOW: tl.constexpr, BLOCK_A: tl.constexpr, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The ``k`` smallest items of each row or, with ``p_to``, the 2^LOG_K smallest of each tile of a row, left as items.

    Rows are those of ``p_x`` or, with ``p_from``, n items each. Grid: blocks of rows, then tiles.
    """
    BLOCK_K: tl.constexpr = 1 << LOG_K
    i_a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    i_tile = tl.program_id(1)
    m_a = i_a < rows
    p_row = p_x + offset_of(i_a, k_sizes, in_steps)
    item = network(tile_items(p_row, p_from, i_a, m_a, i_tile << LOG_N, n, in_stride, HOW, LOG_N), LOG_N, LOG_K)
    j = tl.arange(0, BLOCK_K)[None, :]
    if len(p_to) > 0:
        store_items(p_to, (i_a * tiles + i_tile) * BLOCK_K + j, item, m_a & (j < BLOCK_K))
    else:
        store_results(p_values, p_indices, offset_of(i_a, k_sizes, out_steps) + j.to(tl.int64) * out_stride, item, p_row, in_stride,
                       m_a & (j < k), HOW)


@triton.jit
def _first(p_items, o, count, LOG_N: tl.constexpr):
    """A row [1, 2^LOG_N] of the ``count`` items from ``o`` on."""
    i = tl.arange(0, 1 << LOG_N)[None, :]
    return _padded(load_items(p_items, o + i, i < count), i < count)


@triton.jit
def filter_kernel(p_values, p_indices, p_to, p_own, p_x, p_from, n, tiles, k, k_sizes, in_steps, out_steps, in_stride, out_stride,
                  HOW: tl.constexpr, LOG_N: tl.constexpr, LOG_PART: tl.constexpr, LOG_K: tl.constexpr):
    """As ``network_kernel``, where tiles have far more than 2^LOG_K items: what cannot be among the smallest is left out.

    The tile is dealt out to 2^LOG_K hands, of each of which the smallest item is wanted or is greater than all that are:
    nothing above the greatest of these can be among the smallest. What is left, an eighth or so of a tile in any order, is
    put together by way of ``p_own`` and goes through a network. If it is more than 2^LOG_PART (a tile laid out to spoil
    the hands), parts of so many items go through networks one after the other. Grid: rows, then tiles.
    """
    BLOCK_N: tl.constexpr = 1 << LOG_N
    BLOCK_K: tl.constexpr = 1 << LOG_K
    PART: tl.constexpr = 1 << LOG_PART
    KEPT: tl.constexpr = LOG_N - LOG_PART + LOG_K
    SIZE: tl.constexpr = PART if LOG_PART > KEPT else 1 << KEPT
    i_a = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    i_tile = tl.program_id(1)
    m_a = i_a >= 0
    p_row = p_x + offset_of(i_a, k_sizes, in_steps)
    item = tile_items(p_row, p_from, i_a, m_a, i_tile << LOG_N, n, in_stride, HOW, LOG_N)[0]
    limit = tl.max(tl.min(tl.reshape(item, [BLOCK_N // BLOCK_K, BLOCK_K]), axis=0), axis=0)
    left = (item <= limit) & ((i_tile << LOG_N) + tl.arange(0, BLOCK_N)[None, :] < n)
    place = tl.cumsum(left.to(tl.int32), 1)
    count = tl.sum(tl.sum(left.to(tl.int32), 1), 0)
    o_own = (tl.program_id(0).to(tl.int64) * tiles + i_tile) * SIZE
    j = tl.arange(0, BLOCK_K)[None, :]
    if count <= PART:
        store_items(p_own, o_own + place - 1, (item,), left)
        tl.debug_barrier()
        kept = network(_first(p_own, o_own, count, LOG_PART), LOG_PART, LOG_K)[0]
    else:
        for part in range(BLOCK_N // PART):
            some = tile_items(p_row, p_from, i_a, m_a, (i_tile << LOG_N) + part * PART, n, in_stride, HOW, LOG_PART)
            store_items(p_own, o_own + part * BLOCK_K + j, network(some, LOG_PART, LOG_K), j < BLOCK_K)
        tl.debug_barrier()
        kept = network(_first(p_own, o_own, 1 << KEPT, KEPT), KEPT, LOG_K)[0]
    if len(p_to) > 0:
        store_items(p_to, (i_a * tiles + i_tile) * BLOCK_K + j, (kept,), j < BLOCK_K)
    else:
        store_results(p_values, p_indices, offset_of(i_a, k_sizes, out_steps) + j.to(tl.int64) * out_stride, (kept,), p_row, in_stride,
                       j < k, HOW)


# -- merges ------------------------------------------------------------------------------------------------------------


@triton.jit
def _split(p_from, o_a, o_b, n_a, n_b, d, rounds, WAYS: tl.constexpr):
    """How many of the first ``d`` items of two merged runs are the first run's, for a column of several ``d``.

    Each round looks at WAYS places at once: ``a[p] < b[d - 1 - p]`` holds up to the wanted place and not from there on.
    """
    low = tl.maximum(d - n_b, 0)
    high = tl.minimum(d, n_a)
    j = tl.arange(0, WAYS)[None, :]
    for _ in range(rounds):
        step = tl.maximum((high - low + WAYS - 1) // WAYS, 1)
        p = low + (j + 1) * step - 1
        m = p < high
        a = load_items(p_from, o_a + p, m)
        b = load_items(p_from, o_b + (d - 1 - p), m)
        passed = tl.expand_dims(tl.sum((m & _greater(b, a)).to(tl.int32), 1), 1)
        low += passed * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def merge_kernel(p_values, p_indices, p_to, p_x, p_from, n, row_from, row_to, run, run_to, tiles, rounds, k_sizes, in_steps, out_steps,
                 in_stride, out_stride, HOW: tl.constexpr, LOG_N: tl.constexpr, WAYS: tl.constexpr):
    """Merge neighbouring runs of ``run`` items, the last of which may be shorter, and keep the first ``run_to`` of each pair.

    Rows hold ``n`` items and are ``row_from`` and ``row_to`` items apart. The last merge of a row stores its results.
    Grid: pairs and ``tiles`` of each, then rows.
    """
    BLOCK: tl.constexpr = 1 << LOG_N
    i_row = tl.program_id(1).to(tl.int64)
    i_pair = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK  # of the merged pair
    start = i_pair * 2 * run
    n_a = tl.minimum(n - start, run)
    n_b = tl.minimum(tl.maximum(n - start - run, 0), run)
    o_a = i_row * row_from + start
    o_b = o_a + run
    last = tl.minimum(first + BLOCK, n_a + n_b)
    ends = tl.where(tl.arange(0, 2) == 0, tl.minimum(first, last), last)[:, None]
    split = tl.reshape(_split(p_from, o_a, o_b, n_a, n_b, ends, rounds, WAYS), [2])
    from_a = tl.sum(tl.where(tl.arange(0, 2) == 0, split, 0), 0)
    to_a = tl.sum(tl.where(tl.arange(0, 2) == 1, split, 0), 0)
    from_b = first - from_a
    j = tl.arange(0, BLOCK)[None, :]
    in_a = j < to_a - from_a
    in_b = j >= BLOCK - (last - to_a - from_b)
    item = load_items(p_from, tl.where(in_a, o_a + from_a + j, o_b + from_b + (BLOCK - 1 - j)), in_a | in_b)
    item = network_end(_padded(item, in_a | in_b), LOG_N)
    place = first + j
    m = (place < last) & (place < run_to)
    if len(p_to) > 0:
        store_items(p_to, i_row * row_to + i_pair * run_to + place, item, m)
    else:
        store_results(p_values, p_indices, offset_of(i_row, k_sizes, out_steps) + place.to(tl.int64) * out_stride, item,
                       p_x + offset_of(i_row, k_sizes, in_steps), in_stride, m, HOW)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How rows are sorted.

    Attributes:
        log_tile: log2 of the items that a network sorts at once.
        block_a: rows of a program, where a row is one tile.
        warps: warps of a network's program.
        log_merge: log2 of the items of a merge's program.
        merge_warps: its warps.
    """

    log_tile: int
    block_a: int
    warps: int
    log_merge: int = 11
    merge_warps: int = 4


_INTERPRETED_TILE = 14
# Compiled for sm_90, 2048 items of 64 bits in 4 warps take 94 registers (5 programs on a multiprocessor) and 490
# instructions an item. 8192 in 16 warps take 128 (one program), spill, and take 10 s to compile. A merge takes about 110.
_TILE = {1: 11, 2: 10}  # log2 of a tile, by integers of an item
_WARPS = ((256, 1), (512, 2), (1 << 30, 4))  # (items of a tile at most, warps)
_WAYS = 64


def choose(rows: int, n: int, parts: int, target: Target) -> Schedule:
    """The schedule for ``rows`` rows of ``n`` items of ``parts`` integers each."""
    longest = _INTERPRETED_TILE if target.interpreted else _TILE[parts]
    log_tile = min(power_of_2(n).bit_length() - 1, longest)
    block_a = 1
    if n <= 1 << log_tile:
        block_a = min((1 << longest) >> log_tile, power_of_2(rows))
        while not target.interpreted and block_a > 1 and -(-rows // block_a) < 4 * target.multiprocessors:
            block_a //= 2
    size = block_a << log_tile
    return Schedule(log_tile, block_a, next(w for limit, w in _WARPS if size <= limit), min(longest, 11 if parts == 1 else 10))


# A filter's program: 4096 items in 4 warps have 128 registers at most. Random items leave four times as many as are
# wanted, so that twice that many are a network's part.
_FILTER = 12  # log2 of a tile
_LEAST_PART = 8  # log2 of a part at least


def _log_part(log_k: int) -> int:
    return max(log_k + 3, _LEAST_PART)


def choose_filter(rows: int, n: int, log_k: int, parts: int, target: Target) -> int:
    """log2 of the tile in which a filter looks for the 2^log_k smallest of ``n`` items; 0 if a network alone is better."""
    least = _log_part(log_k) + 2
    if parts > 1 or n < 1 << least or least > _FILTER:
        return 0
    log_n = min(_FILTER, power_of_2(n).bit_length() - 1)
    while log_n > least and rows * -(-n // (1 << log_n)) < 2 * target.multiprocessors and not target.interpreted:
        log_n -= 1
    return log_n


# -- plans -------------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """How elements become items; the kernels' HOW.

    Attributes:
        kind: ``"float"``, ``"signed"`` or ``"unsigned"``.
        bits: of a key.
        mantissa: bits of a float's mantissa.
        index: bits below the key that hold the index; 0 if items are pairs.
        descending: whether keys are flipped.
    """

    kind: str
    bits: int
    mantissa: int
    index: int
    descending: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of an item's integers."""
        if self.index == 0:
            return torch.uint64, torch.uint32
        return (torch.uint64 if self.bits + self.index > 32 else torch.uint32,)


_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
_UNSIGNED = (torch.bool, torch.uint8)


def keys(d: torch.dtype, n: int, descending: bool) -> Keys:
    """The keys of rows of ``n`` elements of dtype ``d``."""
    if n >= 2**31:
        raise Decline("rows of 2**31 elements or more")
    bits = 1 if d == torch.bool else d.itemsize * 8
    index = 0 if bits == 64 else 32
    if bits <= 8 and n <= 1 << 24:
        index = 24
    elif bits == 16 and n <= 1 << 16:
        index = 16
    kind = "float" if d.is_floating_point else "unsigned" if d in _UNSIGNED else "signed"
    return Keys(kind, bits, _MANTISSA.get(d, 0), index, descending)


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor along one dimension: how many, how long, and where they are.

    Attributes:
        meta: the tensor.
        count: number of rows.
        n: elements of a row.
        sizes: sizes of the merged other dimensions, fastest first, without the last.
        steps: the tensor's strides along them.
        out_steps: the result's.
        stride: the tensor's stride along the row.
        out_stride: the result's.
    """

    meta: TensorMeta
    count: int
    n: int
    sizes: tuple[Any, ...]
    steps: tuple[Any, ...]
    out_steps: tuple[Any, ...]
    stride: Any
    out_stride: Any


def rows_of(meta: TensorMeta, axis: int, out_stride: tuple[int, ...]) -> Rows:
    """The rows of ``meta`` along ``axis``, with results of strides ``out_stride`` (one for each dimension)."""
    shape, strides, out_strides = meta.shape or (1,), meta.stride or (1,), out_stride or (1,)
    kept = merge_dims([(size, (strides[d], out_strides[d])) for d, size in enumerate(shape) if d != axis], False)
    steps, out_steps = kept.strides if kept.strides else ((), ())
    return Rows(meta, kept.count, shape[axis], tuple([Size(s) for s in kept.sizes[:-1]]), tuple([stride(s) for s in steps]),
                tuple([stride(s) for s in out_steps]), _along(strides[axis], shape[axis]), _along(out_strides[axis], shape[axis]))


def _along(step: int, size: int) -> int | Size:
    """A stride along rows: 1 is worth a kernel of its own."""
    return 1 if step == 1 or size == 1 else Size(step)


def flat_rows(meta: TensorMeta) -> Rows:
    """All elements of ``meta`` as one row, once they are in order in memory."""
    return Rows(meta, 1, meta.numel, (), (), (), 1, 1)


def flattened(call: Call, index: int, allocs: list[Alloc]) -> tuple[Any, list[Launch]]:
    """Where the elements of argument number ``index`` are in order in memory, and the launch that puts them there if need be."""
    meta = call.args[index]
    if meta.is_contiguous:
        return Arg(index), []
    operand = Operand(Arg(index), meta, meta.dtype, meta.dtype)
    copied = build(call, same, [operand], [meta.dtype], meta.shape, contiguous_strides(meta.shape))
    allocs.append(copied.allocs[0])
    moved = Out(len(allocs) - 1)
    return moved, [step._replace(args=_with(step.args, Out(0), moved)) for step in copied.launches]


def _with(args: tuple[Any, ...], old: Out, new: Out) -> tuple[Any, ...]:
    return tuple([_with(a, old, new) if a.__class__ is tuple else new if a.__class__ is Out and a == old else a for a in args])


class Sorting:
    """Collects the launches that sort rows and the allocations that they need.

    Args:
        target: what they run on.
        source: the tensor whose rows are sorted.
        values, indices: where results go, each a tuple of one reference or none.
        allocs: allocations made so far; workspace is added.
        launches: launches so far.
    """

    def __init__(self, target: Target, source: Any, values: tuple[Any, ...], indices: tuple[Any, ...], allocs: list[Alloc],
                 launches: Sequence[Launch] = ()) -> None:
        self.target, self.source, self.values, self.indices, self.allocs = target, source, values, indices, allocs
        self.launches = list(launches)

    def _workspace(self, how: Keys, count: int) -> tuple[Out, ...]:
        refs = tuple([Out(len(self.allocs) + i) for i in range(len(how.dtypes))])
        self.allocs += [Alloc((count,), (1,), d) for d in how.dtypes]
        return refs

    def _network(self, rows: Rows, how: Keys, schedule: Schedule, n: int, source: tuple[Out, ...], to: tuple[Out, ...], log_k: int,
                 k: int) -> None:
        tiles = -(-n // (1 << schedule.log_tile))
        self.launches.append(Launch(
            network_kernel, (-(-rows.count // schedule.block_a), tiles, 1),
            (self.values if not to else (), self.indices if not to else (), to, self.source, source, Size(rows.count), extent(n),
             Size(tiles), Size(k), rows.sizes, rows.steps, rows.out_steps, rows.stride, rows.out_stride),
            (("HOW", tuple(how)), ("BLOCK_A", schedule.block_a), ("LOG_N", schedule.log_tile), ("LOG_K", log_k)), schedule.warps, 1))

    def _filter(self, rows: Rows, how: Keys, log_n: int, n: int, source: tuple[Out, ...], to: tuple[Out, ...], log_k: int, k: int) -> None:
        tiles, log_part = -(-n // (1 << log_n)), _log_part(log_k)
        own = self._workspace(how, rows.count * tiles << max(log_part, log_n - log_part + log_k))
        self.launches.append(Launch(
            filter_kernel, (rows.count, tiles, 1),
            (self.values if not to else (), self.indices if not to else (), to, own, self.source, source, extent(n), Size(tiles), Size(k),
             rows.sizes, rows.steps, rows.out_steps, rows.stride, rows.out_stride),
            (("HOW", tuple(how)), ("LOG_N", log_n), ("LOG_PART", log_part), ("LOG_K", log_k)), 4, 1))

    def smallest(self, rows: Rows, how: Keys, k: int) -> None:
        """The ``k`` smallest items of each row, in order, to the results."""
        parts, n = len(how.dtypes), rows.n
        schedule = choose(rows.count, n, parts, self.target)
        log_k = power_of_2(k).bit_length() - 1
        source: tuple[Out, ...] = ()
        # Few elements of each tile: what all tiles keep is sorted again.
        while True:
            log_n = choose_filter(rows.count, n, log_k, parts, self.target)
            if log_n == 0 and (n <= 1 << schedule.log_tile or schedule.log_tile < log_k + 2):
                break
            tiles = -(-n // (1 << (log_n or schedule.log_tile)))
            to = self._workspace(how, rows.count * tiles << log_k) if tiles > 1 else ()
            if log_n:
                self._filter(rows, how, log_n, n, source, to, log_k, k)
                if not to:
                    return
            else:
                self._network(rows, how, schedule, n, source, to, log_k, k)
            source, n = to, tiles << log_k
            schedule = choose(rows.count, n, parts, self.target)
        tile, log_k = 1 << schedule.log_tile, min(log_k, schedule.log_tile)
        if n <= tile:
            self._network(rows, how, schedule, n, source, (), log_k, k)
            return
        tiles, run = -(-n // tile), 1 << log_k
        length = (tiles - 1) * run + min(run, n - (tiles - 1) * tile)
        to = self._workspace(how, rows.count * tiles * run)
        self._network(rows, how, schedule, n, source, to, log_k, k)
        self._merge(rows, how, schedule, to, tiles, run, length, k)

    def _merge(self, rows: Rows, how: Keys, schedule: Schedule, source: tuple[Out, ...], runs: int, run: int, length: int, k: int) -> None:
        """Merge ``runs`` runs of ``run`` items, the last of which may be shorter, until one is left."""
        block = 1 << schedule.log_merge
        stored = runs * run  # the network's rows have room for whole runs
        spare: tuple[Out, ...] = ()
        while runs > 1:
            run_to, pairs = min(2 * run, k), -(-runs // 2)
            last = length - (runs - 1) * run
            length_to = (pairs - 1) * run_to + min(run_to, run + last if runs % 2 == 0 else last)
            tiles = -(-run_to // block)
            to = (spare or self._workspace(how, rows.count * length_to)) if pairs > 1 else ()
            rounds, gap = 0, run
            while gap > 0:
                rounds, gap = rounds + 1, -(-gap // _WAYS) - 1
            self.launches.append(Launch(
                merge_kernel, (pairs * tiles, rows.count, 1),
                (self.values if not to else (), self.indices if not to else (), to, self.source, source, Size(length), Size(stored),
                 Size(length_to), Size(run), Size(run_to), Size(tiles), Size(rounds), rows.sizes, rows.steps, rows.out_steps,
                 rows.stride, rows.out_stride),
                (("HOW", tuple(how)), ("LOG_N", schedule.log_merge), ("WAYS", _WAYS)), schedule.merge_warps, 1))
            source, spare = to, source
            stored, runs, run, length = length_to, pairs, run_to, length_to


def smallest_plan(call: Call, dim: int, descending: bool, k: int | None, preserve: bool) -> Plan:
    """Values and indices of the ``k`` smallest (or greatest, if ``descending``) elements of each row; None: all of them.

    ``preserve``: results have the input's strides, where these are dense, instead of being contiguous.
    """
    meta = call.args[0]
    dims = canonical_dims(dim, meta.ndim)
    axis = dims[0] if dims else 0
    n = meta.shape[axis] if meta.shape else 1
    k = n if k is None or not meta.shape else k  # a tensor without dimensions has its one element, whatever k
    shape = tuple([k if d == axis else s for d, s in enumerate(meta.shape)])
    strides = preserved_strides(meta) if preserve else contiguous_strides(shape)
    allocs = [Alloc(shape, strides, meta.dtype), Alloc(shape, strides, torch.int64)]
    results = allocs[0].meta.numel
    moved = meta.numel * meta.dtype.itemsize + results * (meta.dtype.itemsize + 8)
    if results == 0:
        return Plan(tuple(allocs), (), (Out(0), Out(1)), {Arg(0): meta}, bytes=moved)
    sorting = Sorting(call.target, Arg(0), (Out(0),), (Out(1),), allocs)
    sorting.smallest(rows_of(meta, axis, strides), keys(meta.dtype, n, descending), k)
    return Plan(tuple(allocs), tuple(sorting.launches), (Out(0), Out(1)), {Arg(0): meta}, bytes=moved)


# -- rules -------------------------------------------------------------------------------------------------------------


@planned(["aten.sort.default", "aten.sort.stable"], dtype(*ALL, arg="self"), family="sorting", kernel=network_kernel)
def sort(call: Call) -> Plan:
    """``values, indices`` of the shape and strides of self; equals keep their order, asked for or not."""
    meta = call.args[0]
    dims = canonical_dims(call["dim"], meta.ndim)
    n = meta.shape[dims[0]] if dims else 1
    if meta.numel:
        check_measured("sort", call.target, rows=meta.numel // n, n=n, itemsize=meta.dtype.itemsize)
    return smallest_plan(call, call["dim"], call["descending"], None, True)


@planned(["aten.topk.default"], dtype(*ALL, arg="self"), family="sorting", kernel=network_kernel)
def topk(call: Call) -> Plan:
    """self, k, dim, largest, sorted: results are always sorted, and of equals the first ones are taken."""
    meta, k, dim, largest, _ = call.args
    dims = canonical_dims(dim, meta.ndim)
    if not 0 <= k <= (meta.shape[dims[0]] if dims else 1):
        raise Decline("PyTorch rejects it: k is not in the range of the dimension")
    return smallest_plan(call, dim, largest, k, False)
