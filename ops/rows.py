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
        return len(self.column_sizes) == 1 and (self.column_sizes == (1,) or all(s[0] in (0, 1) for s in self.column_strides))


def split_rows(shape: Sequence[int], columns: Collection[int], operands: Sequence[Sequence[int]]) -> Rows:
    """Split the dimensions of ``shape`` into rows and ``columns``; the first operand's strides give the order."""
    kept = [d for d in range(len(shape)) if d not in columns]
    reduced = [d for d in range(len(shape)) if d in columns]
    rows = merge(tuple([shape[d] for d in kept]), [tuple([s[d] for d in kept]) for s in operands])
    cols = merge(tuple([shape[d] for d in reduced]), [tuple([s[d] for d in reduced]) for s in operands])
    return Rows(rows.sizes, rows.strides, cols.sizes, cols.strides)


def is_wide(*metas: TensorMeta) -> bool:
    """Whether offsets into any of these need 64 bits (with room for a block's masked overhang)."""
    return any(m.extent >= 2**31 - 2**18 or m.numel >= 2**31 - 2**18 for m in metas)


def sizes_argument(sizes: Sequence[int], specialize_first: bool = False) -> tuple[int | Size, ...]:
    """Sizes as a kernel argument; only the first may matter to the kernel's memory accesses."""
    return tuple([n if i == 0 and specialize_first else Size(n) for i, n in enumerate(sizes)])


def ladder(limits: Sequence[tuple[int, int]], n: int) -> int:
    """The value of the first step ``(limit, value)`` whose limit is at least ``n``."""
    return next(value for limit, value in limits if n <= limit)


def warps(count: int, target: Target) -> int:
    """As many warps of the target's size as have the threads of ``count`` warps of 32."""
    return max(count * 32 // target.warp_size, 1)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
