"""Rows of a tensor: the dimensions that an op reduces (columns) and those that it keeps (rows), at any strides.

Softmax, the norms and ``weight_norm`` all see a tensor as a matrix of rows. A row's elements are found through a
:class:`Rows`, which merges dimensions as far as the operands' strides allow; what is left is passed to the kernels as
tuples of sizes and strides, fastest dimension first, and taken apart by the functions below.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from gemsmode.ops.layout import merge
from gemsmode.plan import Size
from gemsmode.signature import TensorMeta
from gemsmode.target import Target

# -- functions of loaded blocks ----------------------------------------------------------------------------------------


@triton.jit
def unravel(o, sizes, strides):
    """Offsets of the linear indices `o` into dimensions of `sizes`, fastest first."""
    if len(sizes) == 1:
        return o * strides[0]
    else:
        result = (o % sizes[0]) * strides[0]
        rest = o // sizes[0]
        for d in tl.static_range(1, len(sizes) - 1):
            result += (rest % sizes[d]) * strides[d]
            rest = rest // sizes[d]
        return result + rest * strides[len(sizes) - 1]


@triton.jit
def locate(sizes, n_rows, BLOCK_R: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr):
    """This program's rows: (indices [BLOCK_R], index of the other row dimensions, mask [BLOCK_R]).

    GATHER: the indices are linear, over all row dimensions. Otherwise they run along the fastest row dimension, so
    that accesses along it stay coalesced, and the other dimensions are a scalar.
    """
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    if GATHER:
        o_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        return o_row, i_block, o_row < n_rows
    else:
        tiles = tl.cdiv(sizes[0], BLOCK_R)
        o_row = (i_block % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        return o_row, i_block // tiles, o_row < sizes[0]


@triton.jit
def row_offsets(o_row, i_outer, sizes, strides, GATHER: tl.constexpr):
    """Offsets [BLOCK_R] of the rows that `locate` found, in an operand of `strides`."""
    if GATHER:
        return unravel(o_row, sizes, strides)
    else:
        result = o_row * strides[0]
        rest = i_outer
        for d in tl.static_range(1, len(sizes)):
            if d == len(sizes) - 1:
                result += rest * strides[d]
            else:
                result += (rest % sizes[d]) * strides[d]
                rest = rest // sizes[d]
        return result


@triton.jit
def column_range(start, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Column indices [BLOCK_N] from `start`."""
    if WIDE:
        return start + tl.arange(0, BLOCK_N).to(tl.int64)
    else:
        return start + tl.arange(0, BLOCK_N)


# -- plans -------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A tensor's dimensions, split into rows and columns and merged; fastest first.

    Attributes:
        row_sizes: sizes of the row dimensions.
        row_strides: per operand its strides along them.
        column_sizes: sizes of the column dimensions.
        column_strides: per operand its strides along them.
    """

    row_sizes: tuple[int, ...]
    row_strides: tuple[tuple[int, ...], ...]
    column_sizes: tuple[int, ...]
    column_strides: tuple[tuple[int, ...], ...]

    @property
    def n_rows(self) -> int:
        n = 1
        for size in self.row_sizes:
            n *= size
        return n

    @property
    def n_columns(self) -> int:
        n = 1
        for size in self.column_sizes:
            n *= size
        return n

    @property
    def inner(self) -> bool:
        """Whether the columns are the fast dimension for every operand that has them."""
        return len(self.column_sizes) == 1 and (self.column_sizes == (1,) or all([s[0] in (0, 1) for s in self.column_strides]))


def split_rows(shape: Sequence[int], columns: Collection[int], operands: Sequence[Sequence[int]]) -> Rows:
    """Split the dimensions of ``shape`` into rows and ``columns``; the first operand's strides give the order."""
    last = len(shape) - 1
    if len(columns) == 1 and last in columns:
        return Rows(*merge(tuple(shape[:-1]), [tuple(s[:-1]) for s in operands]),
                    *merge(tuple(shape[-1:]), [tuple(s[-1:]) for s in operands]))
    kept = [d for d in range(len(shape)) if d not in columns]
    reduced = [d for d in range(len(shape)) if d in columns]
    return Rows(*merge(tuple([shape[d] for d in kept]), [tuple([s[d] for d in kept]) for s in operands]),
                *merge(tuple([shape[d] for d in reduced]), [tuple([s[d] for d in reduced]) for s in operands]))


def is_wide(*metas: TensorMeta) -> bool:
    """Whether offsets into any of these need 64 bits (with room for a block's masked overhang)."""
    return any([m.extent >= 2**31 - 2**18 or m.numel >= 2**31 - 2**18 for m in metas])


def sizes_argument(sizes: Sequence[int], specialize_first: bool = False) -> tuple[int | Size, ...]:
    """Sizes as a kernel argument; only the first may matter to the kernel's memory accesses."""
    return (*sizes[:1], *map(Size, sizes[1:])) if specialize_first else tuple(map(Size, sizes))


# -- launch choice -----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A program's share.

    Attributes:
        rows: rows a program.
        columns: columns a step.
        warps: warps a program, of 32 threads.
        loops: whether a row takes several steps.
        chunks: programs a row, if rows are split; else 0.
        gather: whether row indices are linear over all row dimensions.
    """

    rows: int
    columns: int
    warps: int
    loops: bool = False
    chunks: int = 0
    gather: bool = True


WARPS = ((2048, 4), (8192, 8), (16384, 16), (1 << 30, 32))
"""Warps by elements of a tile: 16 to 32 elements a thread, which is two to four 16-byte loads of 16-bit values."""
LONGEST = 32768  # elements of 4 bytes that a program's registers hold beside what it computes
LOOP_STEP = 4096
SMALL_TILE = 2048
INTERPRETED_BLOCK = 1 << 16  # a program costs 0.3 ms in the interpreter, whatever its size


def ladder(limits: Sequence[tuple[int, int]], n: int) -> int:
    """The value of the first step ``(limit, value)`` whose limit is at least ``n``."""
    for limit, value in limits:
        if n <= limit:
            return value
    raise ValueError(f"{n} is above every limit")


def warps(count: int, target: Target) -> int:
    """As many warps of the target's size as have the threads of ``count`` warps of 32."""
    return max(count * 32 // target.warp_size, 1)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def choose_tile(rows: Rows, itemsize: int, target: Target) -> Tile:
    """The tile for ``rows`` of elements that are computed in ``itemsize`` bytes (4 or 8)."""
    n, n_rows = rows.n_columns, rows.n_rows
    block_n = power_of_2(n)
    first = rows.row_sizes[0]
    if target.interpreted:
        if n > INTERPRETED_BLOCK and n_rows <= 4:
            return Tile(1, INTERPRETED_BLOCK // 4, 4, True, 3)
        loops = n > INTERPRETED_BLOCK
        columns = min(block_n, INTERPRETED_BLOCK)
        gather = rows.inner or first < 16 or len(rows.row_sizes) == 1
        return Tile(max(min(power_of_2(n_rows if gather else first), INTERPRETED_BLOCK // columns), 1), columns, 4, loops, 0, gather)
    scale = 8 // itemsize  # 2 for 4-byte elements, 1 for 8-byte ones
    longest = LONGEST * scale // 2
    if rows.inner:
        if n > LOOP_STEP and n_rows * 2 <= target.multiprocessors:
            # Too few rows to fill the device with one program each.
            chunks = min(-(-2 * target.multiprocessors // n_rows), -(-n // LOOP_STEP))
            if chunks > 1:
                return Tile(1, LOOP_STEP * scale // 2, 8, True, chunks)
        if block_n > longest:
            return Tile(1, LOOP_STEP * scale, 16, True)
        budget = SMALL_TILE
        # Fewer rows a program while the device would not be filled four times over.
        while budget > 256 and n_rows * block_n < budget * target.multiprocessors * 4:
            budget //= 2
        block_r = max(min(budget // block_n, power_of_2(n_rows)), 1)
        return Tile(block_r, block_n, ladder(WARPS, block_r * block_n * itemsize // 4))
    # The rows are the fast dimension: 64 of them side by side keep accesses coalesced.
    if first < 16 and len(rows.row_sizes) > 1 and block_n <= SMALL_TILE:
        block_r = max(min(SMALL_TILE // block_n, power_of_2(n_rows)), 1)
        return Tile(block_r, block_n, ladder(WARPS, block_r * block_n * itemsize // 4))
    side = min(64, power_of_2(first))
    if side * block_n <= longest // 2:
        block_r = max(min(SMALL_TILE // block_n, power_of_2(first)), side)
        return Tile(block_r, block_n, ladder(WARPS, block_r * block_n * itemsize // 4), gather=False)
    return Tile(side, max(LOOP_STEP // side, 1), 8, True, gather=False)
