"""Matrix products: ``out = beta * c + alpha * (a @ b)``, batched, with any strides and an optional third operand.

    a [B, M, K], b [B, K, N], c [B, M, N] (broadcast by strides of 0), out [B, M, N]

Four kernels here. :func:`gemm_kernel` computes tiles with ``tl.dot``, :func:`matvec_kernel` is for products with a
vector, where every element of the matrix is used once and bandwidth decides, and :func:`combine_kernel` adds up partial
results: where there are too few tiles to fill the device K is split, each part is written in float32 (float64), and the
parts are added in a fixed order, so that results are the same from run to run. Transposed operands are read in place, but that
tensor cores read the right operand of a float32 product along K only: operands are exchanged if that is how the left one lies,
and if neither does, :func:`turn_kernel` turns one around first.
Large products of 16-bit floats take the kernels of :mod:`gemsmode.ops.persistent` on GPUs that have what those need.

Sums are accumulated in float32 (float64 for float64) and rounded once, after alpha, beta and the bias. float32 products
follow ``torch.backends.cuda.matmul`` and ``torch.set_float32_matmul_precision``. Where TF32 is allowed, operands are rounded
to it as cuBLAS rounds them, since ``tl.dot`` cuts them off. Otherwise results are as close as IEEE arithmetic gives them: on
tensor cores each operand is the sum of two numbers of TF32, and of their products the three that count are added up
("3xTF32"; the error against float64 is 0.2 to 0.9 of cuBLAS's); without them one chain of sums over all of K would lose more
than PyTorch's kernels do, so that the sums of blocks of K are added up. The parts of a float32 dot product are added in float64.

Source: the definitions in PyTorch's documentation of ``torch.addmm``, ``torch.baddbmm``, ``torch.addmv``...; for 3xTF32 Ootomo
and Yokota, "Recovering single precision accuracy from Tensor Cores" (2022), and Triton's ``input_precision``; the order of
tiles is that of Triton's tutorial on matrix multiplication (groups of rows share columns of b in the L2 cache).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops import persistent
from gemsmode.ops.layout import output_strides
from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import as_operand, build, power_of_2
from gemsmode.ops.promotion import FLOAT, TRITON
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- blocks ------------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled(b_acc, c, o_c, mask, scale, ACTIVATION: tl.constexpr):
    """ACTIVATION(alpha * acc + beta * c); `scale` is () or (alpha, beta), `c` is () or one pointer. A beta of 0 does not read c."""
    if len(scale) == 2:
        b_acc = b_acc * tl.cast(scale[0], b_acc.dtype)
    if len(c) == 1:
        if len(scale) == 2:
            beta = tl.cast(scale[1], b_acc.dtype)
            if beta != 0:
                b_acc = b_acc + tl.load(c[0] + o_c, mask=mask, other=0.0).to(b_acc.dtype) * beta
        else:
            b_acc = b_acc + tl.load(c[0] + o_c, mask=mask, other=0.0).to(b_acc.dtype)
    return ACTIVATION(b_acc)


@triton.jit
def rounded_to_tf32(x):
    """float32 to the nearest number with a mantissa of 10 bits, halves away from zero; infinities and NaN as they are."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _added_product(b_a, b_b, b_acc, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BY_BLOCK: tl.constexpr):
    """b_acc + b_a @ b_b. BY_BLOCK: b_a @ b_b is a sum of its own, so that no chain of sums is as long as K."""
    if UPCAST:
        b_a = b_a.to(ACC)
        b_b = b_b.to(ACC)
    if PRECISION == "tf32":
        b_a = rounded_to_tf32(b_a)
        b_b = rounded_to_tf32(b_b)
    if BY_BLOCK:
        # Not `+`, which the compiler makes the product's accumulator.
        one = tl.full(b_acc.shape, 1.0, ACC)
        b_acc = tl.fma(tl.dot(b_a, b_b, input_precision=PRECISION, out_dtype=ACC), one, b_acc)
    else:
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def gemm_kernel(p_out, p_a, p_b, c, scale, m, n, k, k_blocks, s_out, s_a, s_b, s_c, ACC: tl.constexpr, PRECISION: tl.constexpr,
                WIDE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                GROUP: tl.constexpr, EVICT: tl.constexpr, ACTIVATION: tl.constexpr, BY_BLOCK: tl.constexpr):
    """One tile of one batch index over one part of K.

    Grid: (tiles * batch, parts of K). Strides: s_a (batch, m, k), s_b (batch, k, n), s_c (batch, m, n),
    s_out (batch, m, n, part); a part has k_blocks times BLOCK_K of K. UPCAST: for the interpreter, whose
    ``tl.dot`` takes bfloat16 for integers. EVICT: the eviction policy of b, where each of its elements is read once.
    BY_BLOCK: each block of K is summed on its own.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_tile = tl.program_id(0)
    i_batch = (i_tile // (tiles_m * tiles_n)).to(tl.int64)
    i_tile = i_tile % (tiles_m * tiles_n)
    i_part = tl.program_id(1)
    # GROUP rows of tiles go together through the columns.
    first_m = i_tile // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first_m, GROUP)
    i_m = first_m + i_tile % (GROUP * tiles_n) % rows
    i_n = i_tile % (GROUP * tiles_n) // rows

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_first = i_part * k_blocks * BLOCK_K
    o_k = k_first + tl.arange(0, BLOCK_K)
    m_m = (o_m < m)[:, None]
    m_n = (o_n < n)[None, :]
    if WIDE:
        o_m = o_m.to(tl.int64)
        o_n = o_n.to(tl.int64)
        o_k = o_k.to(tl.int64)
        step = tl.full((), BLOCK_K, tl.int64)
    else:
        step = BLOCK_K
    p_as = p_a + i_batch * s_a[0] + o_m[:, None] * s_a[1] + o_k[None, :] * s_a[2]
    p_bs = p_b + i_batch * s_b[0] + o_k[:, None] * s_b[1] + o_n[None, :] * s_b[2]
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    k_count = min(k - k_first, k_blocks * BLOCK_K)
    full = k_count // BLOCK_K
    for _ in range(0, full):
        b_a = tl.load(p_as, mask=m_m, other=0.0)  # [BLOCK_M, BLOCK_K]
        b_b = tl.load(p_bs, mask=m_n, other=0.0, eviction_policy=EVICT)  # [BLOCK_K, BLOCK_N]
        b_acc = _added_product(b_a, b_b, b_acc, ACC, PRECISION, UPCAST, BY_BLOCK)
        p_as += step * s_a[2]
        p_bs += step * s_b[1]
    left = k_count - full * BLOCK_K
    if left > 0:
        m_k = tl.arange(0, BLOCK_K) < left
        b_a = tl.load(p_as, mask=m_m & m_k[None, :], other=0.0)
        b_b = tl.load(p_bs, mask=m_n & m_k[:, None], other=0.0, eviction_policy=EVICT)
        b_acc = _added_product(b_a, b_b, b_acc, ACC, PRECISION, UPCAST, BY_BLOCK)

    mask = m_m & m_n
    o_c = i_batch * s_c[0] + o_m[:, None] * s_c[1] + o_n[None, :] * s_c[2]
    b_acc = _scaled(b_acc, c, o_c, mask, scale, ACTIVATION)
    o_out = i_batch * s_out[0] + i_part * s_out[3] + o_m[:, None] * s_out[1] + o_n[None, :] * s_out[2]
    tl.store(p_out + o_out, b_acc.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def row_products(p_rows, m_m, p_v, s_k, s_v, k_first, k_end, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_K: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr):
    """The products of BLOCK_M rows, which start at `p_rows`, with a vector, not yet summed over the BLOCK_K lanes."""
    b_acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for k_start in tl.range(k_first, k_end, BLOCK_K, num_stages=STAGES):
        o_k = k_start + tl.arange(0, BLOCK_K)
        m_k = o_k < k_end
        if WIDE:
            o_k = o_k.to(tl.int64)
        p_block = p_rows[:, None] + o_k[None, :] * s_k
        b_a = tl.load(p_block, mask=m_m[:, None] & m_k[None, :], other=0.0, eviction_policy=EVICT)  # [BLOCK_M, BLOCK_K]
        b_v = tl.load(p_v + o_k * s_v, mask=m_k, other=0.0)  # [BLOCK_K]
        b_acc += b_a.to(ACC) * b_v.to(ACC)[None, :]
    return b_acc


@triton.jit
def matvec_kernel(p_out, p_a, p_v, c, scale, m, k, k_blocks, s_out, s_a, s_v, s_c, ACC: tl.constexpr, SUM: tl.constexpr,
                  WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr,
                  ACTIVATION: tl.constexpr):
    """BLOCK_M rows of a matrix by a vector, over one part of K.

    Grid: (blocks of rows * batch, parts of K). Strides: s_a (batch, m, k), s_v (batch, k), s_c (batch, m),
    s_out (batch, m, part); a part has k_blocks times BLOCK_K of K. EVICT: the eviction policy of the matrix.
    A thread's sums are of dtype ACC, the sum of them all of dtype SUM.
    """
    blocks = tl.cdiv(m, BLOCK_M)
    i_block = tl.program_id(0)
    i_batch = (i_block // blocks).to(tl.int64)
    i_part = tl.program_id(1)
    o_m = i_block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    if WIDE:
        o_m = o_m.to(tl.int64)
    k_first = i_part * k_blocks * BLOCK_K
    b_acc = row_products(p_a + i_batch * s_a[0] + o_m * s_a[1], m_m, p_v + i_batch * s_v[0], s_a[2], s_v[1], k_first,
                         min(k, k_first + k_blocks * BLOCK_K), ACC, WIDE, BLOCK_M, BLOCK_K, EVICT, STAGES)
    b_sum = tl.sum(b_acc.to(SUM), axis=1)
    b_sum = _scaled(b_sum, c, i_batch * s_c[0] + o_m * s_c[1], m_m, scale, ACTIVATION)
    o_out = i_batch * s_out[0] + i_part * s_out[2] + o_m * s_out[1]
    tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_m)


@triton.jit
def combine_kernel(p_out, p_parts, c, scale, m, n, count, parts, s_c, ACC: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr,
                   ACTIVATION: tl.constexpr):
    """Add up `parts` partial results of `count` elements each. Grid: programs over the elements of out [B, m, n]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    o_part = tl.arange(0, BLOCK_PARTS).to(tl.int64)
    b_acc = tl.zeros((BLOCK_PARTS, BLOCK), dtype=ACC)
    for first in range(0, parts, BLOCK_PARTS):
        p = p_parts + (first + o_part)[:, None] * count + o[None, :]
        b_acc += tl.load(p, mask=(first + o_part < parts)[:, None] & mask[None, :], other=0.0)  # [BLOCK_PARTS, BLOCK]
    b_sum = tl.sum(b_acc, axis=0)
    rest = o // n
    o_c = rest // m * s_c[0] + rest % m * s_c[1] + o % n * s_c[2]
    b_sum = _scaled(b_sum, c, o_c, mask, scale, ACTIVATION)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def turn_kernel(p_out, p_in, rows, columns, s_batch, s_row, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Matrices [rows, columns], contiguous along columns, as [columns, rows]. Grid: (blocks of columns, blocks of rows, batch)."""
    i_batch = tl.program_id(2).to(tl.int64)
    o_row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    if WIDE:
        o_row = o_row.to(tl.int64)
        o_column = o_column.to(tl.int64)
    block = tl.load(p_in + i_batch * s_batch + o_row[:, None] * s_row + o_column[None, :], mask=mask)  # [BLOCK, BLOCK]
    p_outs = p_out + i_batch * rows * columns + o_column[:, None] * rows + o_row[None, :]
    tl.store(p_outs, tl.trans(block), mask=tl.trans(mask))


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A program of the tiled kernel: its block sizes, warps, pipelining depth, and the eviction policy of b.

    Copies that are pipelined (more than one stage) leave the policy aside.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    evict: str = ""

    @functools.cached_property
    def count(self) -> int:
        return self.m * self.n


TURNED = 256
"""With so many rows and columns a float32 product of operands neither of which lies along K is worth turning one of them around."""

FEW_ROWS = 64
"""Up to this many rows (or columns, by transposing) the ladder for few rows is used."""

ROWS: dict[str, tuple[tuple[int, tuple[Tile, ...]], ...]] = {
    # 16-bit floats: the tensor cores take 16 rows at least; long blocks of K keep enough bytes in flight.
    "half": ((16, (Tile(16, 64, 128, 4, 4), Tile(16, 32, 128, 4, 8), Tile(16, 16, 256, 2, 5))),
             (32, (Tile(32, 128, 64, 4, 4), Tile(32, 64, 128, 4, 4))),
             (64, (Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)))),
    "tf32": ((16, (Tile(16, 64, 64, 4, 4), Tile(16, 32, 128, 4, 4))),
             (32, (Tile(32, 64, 64, 4, 4),)),
             (64, (Tile(64, 128, 32, 4, 3),))),
    "tf32x3": ((16, (Tile(16, 64, 64, 4, 4),)),
               (32, (Tile(32, 64, 64, 4, 3),)),
               (64, (Tile(64, 64, 32, 4, 4), Tile(64, 32, 64, 4, 4)))),
    # float32 without tensor cores: a thread keeps rows * columns / threads sums in registers.
    "ieee": ((16, (Tile(16, 64, 64, 4, 3), Tile(16, 32, 64, 2, 3))),
             (32, (Tile(32, 64, 32, 4, 3),)),
             (64, (Tile(64, 64, 16, 4, 3),))),
    "f64": ((16, (Tile(16, 64, 16, 4, 4), Tile(16, 32, 16, 4, 4))),
            (32, (Tile(32, 32, 16, 4, 4),)),
            (64, (Tile(64, 64, 16, 4, 3),))),
}
"""By kind of arithmetic: (rows, tiles) for few rows; the first tile that gives every multiprocessor one is taken."""

LARGE: dict[str, tuple[Tile, ...]] = {
    "half": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 8, 3)),
    "tf32x3": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 32, 4, 4)),
    "ieee": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 16, 4, 3)),
    "f64": (Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 4)),
}
"""The same for more rows than :data:`FEW_ROWS`, largest tile first.

On an H200 2048x2048x2048 in float32 takes 225 us (cuBLAS 350), 1024x1024x1024 32 (58), 16x4096x4096 29 (49); blocks of 64 of K
have an error of 1.3 of cuBLAS's at 256x256x256, those of 32 of 0.9.
"""

TURN = 64
"""Rows and columns of a block that is turned around."""

GROUP = 8
"""Rows of tiles that go together through the columns of b."""

LEAST_K = 512
"""A part of K is not shorter than this."""

MOST_PARTS = 64


def _shared_memory(tile: Tile, itemsize: int, stages: int) -> int:
    return (tile.m + tile.n) * tile.k * itemsize * stages


def _fitted(tile: Tile, itemsize: int, target: Target) -> Tile:
    """``tile`` with as few stages as the target's shared memory asks for."""
    if target.backend == "hip":
        return replace(tile, stages=2)  # 64 KiB; one buffer for two stages
    if target.backend == "cuda" and int(target.arch) < 90 and tile.count >= 128 * 128:
        tile = replace(tile, warps=8)  # without wgmma operands take registers too: 4 warps spill
    stages = tile.stages
    while stages > 1 and _shared_memory(tile, itemsize, stages) > target.shared_memory:
        stages -= 1
    return tile if stages == tile.stages else replace(tile, stages=stages)


def _tiles(tile: Tile, m: int, n: int) -> int:
    return -(-m // tile.m) * -(-n // tile.n)


def choose_tile(m: int, n: int, k: int, batch: int, kind: str, itemsize: int, target: Target) -> tuple[Tile, int]:
    """The tile for a product of ``m`` rows and ``n >= m`` columns (or many of both), and the blocks of K in a part."""
    if target.interpreted:
        block_m, block_n, block_k = (max(min(power_of_2(size), 128), 16) for size in (m, n, k))
        tile = Tile(block_m, block_n, block_k, 4, 1)
        wanted = 3 if _tiles(tile, m, n) * batch == 1 and k >= 2 * LEAST_K else 1
    else:
        if m <= FEW_ROWS:
            ladder = next(tiles for rows, tiles in ROWS[kind] if m <= rows)
        else:
            ladder = LARGE[kind]
        for tile in ladder:
            if _tiles(tile, m, n) * batch >= target.multiprocessors:
                break
        tile = _fitted(tile, itemsize, target)
        wanted = target.multiprocessors // max(_tiles(tile, m, n) * batch, 1)
    parts = max(min(wanted, k // LEAST_K, MOST_PARTS), 1)
    return tile, max(-(-k // (parts * tile.k)), 1)


@dataclass(frozen=True)
class Strip:
    """A program of the matrix-vector kernel.

    Attributes:
        m: rows.
        k: elements of K at a time, of two bytes where copies are pipelined; larger ones are fewer.
        warps: warps.
        programs: K is split until a multiprocessor has so many programs...
        steps: ... as long as a part of K has so many times ``k``.
        evict: the eviction policy of the matrix, which is read once.
        stages: blocks of K whose copies to shared memory are under way at a time; 1 loads to registers.
    """

    m: int
    k: int
    warps: int
    programs: int
    steps: int
    evict: str
    stages: int = 1


STRIPS: dict[str, Strip] = {
    "rows": Strip(8, 512, 4, 3, 4, "evict_first", 4),
    "columns": Strip(128, 32, 4, 4, 4, ""),
    "dot": Strip(1, 8192, 8, 8, 4, "evict_first"),
}
"""For many rows whose elements are neighbours in memory; for columns that are; and for one row.

A thread of "columns" and "dot" has 32 elements: four or eight 16-byte loads in flight. On an H200, of launches in a row over
weights not in the cache (a graph), rows of 4096 in bfloat16 take 10.5 us for 4096 of them, 43.5 for 22016 and 62.0 for 32000,
97% of what a copy moves; 11.3, 46.3 and 65.1 with blocks of 4 by 512 loaded to registers. A dot product of 2^26 elements takes
134.8 us; half the programs take 161 us.
"""

MOST_STRIPS = 8192
"""Parts of K of the matrix-vector kernel; so many partial results of a dot product are added by one program at once."""


def choose_strip(m: int, k: int, batch: int, rows_adjacent: bool, itemsize: int, target: Target) -> tuple[Strip, int]:
    """The strip for ``m`` rows of ``k`` elements, and how often ``strip.k`` goes into a part of K."""
    if target.interpreted:
        strip = Strip(min(power_of_2(m), 128), min(power_of_2(k), 1024), 4, 1, 4, "")
        wanted = 3 if m * batch == 1 else 1
    else:
        strip = STRIPS["dot" if m == 1 else "columns" if rows_adjacent else "rows"]
        if strip.stages > 1:
            strip = replace(strip, k=strip.k * 2 // itemsize, stages=strip.stages if target.backend == "cuda" else 1)
        rows, elements, programs = min(power_of_2(m), strip.m), strip.m * strip.k, strip.programs * target.multiprocessors
        while not rows_adjacent and rows > 1 and -(-m // rows) * batch < programs:
            rows //= 2
        strip = replace(strip, m=rows, k=min(power_of_2(k), elements // rows))
        wanted = programs // max(-(-m // rows) * batch, 1)
    parts = max(min(wanted, k // (strip.steps * strip.k), MOST_STRIPS), 1)
    return strip, max(-(-k // (parts * strip.k)), 1)


# -- plans -------------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """An operand as the kernels see it: where it comes from, its metadata, and its three strides."""

    ref: Arg | Out
    meta: TensorMeta
    batch: int
    row: int
    column: int

    @property
    def transposed(self) -> Matrix:
        return Matrix(self.ref, self.meta, self.batch, self.column, self.row)


def float32_precision() -> str:
    """``"tf32"`` if PyTorch allows it for float32 products; anything else means IEEE."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul")


def _kind(dtype: torch.dtype, target: Target) -> str:
    if dtype == torch.float64:
        return "f64"
    if dtype == torch.float32:
        if float32_precision() == "tf32" and not target.interpreted:
            return "tf32"
        return "tf32x3" if target.has_tf32x3 else "ieee"
    return "half"


def _is_aligned(matrix: Matrix) -> bool:
    """Whether rows or columns are contiguous and start at multiples of 16 bytes."""
    inner, outer = sorted((matrix.row, matrix.column))
    return inner == 1 and outer * matrix.meta.dtype.itemsize % 16 == 0


_made: dict[tuple[Any, ...], Constants] = {}


def _constants(activation: Any, **rest: Any) -> Constants:
    """Constants by name; PyTorch's dtypes among them become Triton's."""
    # By its id, which stays its own as long as the constants are kept: Triton hashes a function by its source.
    key = id(activation), *rest, *rest.values()
    constants = _made.get(key)
    if constants is None:
        pairs = [(name, TRITON[value] if value.__class__ is torch.dtype else value) for name, value in rest.items()]
        constants = _made[key] = Constants((*pairs, ("ACTIVATION", activation)))
    return constants


class Product(NamedTuple):
    """A product to plan: sizes, operands, and what is done to the result.

    Attributes:
        sizes: (batch, m, n, k).
        a: [batch, m, k].
        b: [batch, k, n].
        shape: the result's shape, contiguous, of batch * m * n elements (m * n if ``summed``).
        dtype: the result's dtype.
        c: what is added: [batch, m, n].
        scale: () or (alpha, beta).
        summed: add up the products of the batch.
        activation: a ``@triton.jit`` function of what is to be written.
        alone: whether PyTorch's own does the same in one call.
    """

    sizes: tuple[int, int, int, int]
    a: Matrix
    b: Matrix
    shape: tuple[int, ...]
    dtype: torch.dtype
    c: Matrix | None = None
    scale: tuple[Any, ...] = ()
    summed: bool = False
    activation: Any = persistent.unchanged
    alone: bool = True


def plan_product(call: Call, product: Product) -> Plan:
    """The plan of ``product``."""
    batch, m, n, k = product.sizes
    a, b, c, shape, dtype = product.a, product.b, product.c, product.shape, product.dtype
    out = Alloc(shape, contiguous_strides(shape), dtype)
    metas: dict[Any, TensorMeta] = {x.ref: x.meta for x in (a, b, c) if x is not None}
    count = (1 if product.summed else batch) * m * n
    moved = sum([meta.numel * meta.dtype.itemsize for meta in metas.values()]) + count * dtype.itemsize
    if count == 0:
        return Plan((out,), (), Out(0), metas, bytes=moved, flops=0)
    accumulated = torch.float64 if a.meta.dtype == torch.float64 else torch.float32
    acc = accumulated
    wide = k >= 2**30 or count >= 2**31 or any([meta.extent >= 2**31 - 2**20 for meta in metas.values()])
    kind = _kind(a.meta.dtype, call.target)
    if kind == "tf32x3" and (k % 32 or not (_is_aligned(a) and _is_aligned(b))):
        kind = "ieee"  # whose loads need not be whole vectors, and of whose sums the last one may be short
    check_measured("product", call.target, m=m, n=n, k=k, batch=batch, kind=kind, alone=product.alone,
                   across=a.column != 1 and b.row != 1)
    tiled = _plan_tiles(call, product) if m > 1 and n > 1 else None
    if tiled is not None:
        return tiled
    at_once = persistent.unchanged if product.summed else product.activation
    turning: Matrix | None = None
    # One row (column) is a vector; a few columns are the few rows of the transposed product.
    if m == 1 or n == 1:
        rows, matrix, vector = (m, a, (b.batch, b.row)) if n == 1 else (n, b.transposed, (a.batch, a.column))
        strip, k_blocks = choose_strip(rows, k, batch, matrix.row == 1 and matrix.column != 1, dtype.itemsize, call.target)
        parts = max(-(-k // (k_blocks * strip.k)), 1)
        grid = (-(-rows // strip.m) * batch, parts, 1)
        if dtype == torch.float32:
            accumulated = torch.float64  # of the sums of a program's lanes and of the parts, since PyTorch's is a good tree
        constants = _constants(at_once if parts == 1 else persistent.unchanged, ACC=acc, SUM=accumulated, WIDE=wide, BLOCK_M=strip.m,
                               BLOCK_K=strip.k, EVICT=strip.evict, STAGES=strip.stages)
        warps, stages, kernel = strip.warps, 2, matvec_kernel
    else:
        swapped = n < m and n <= FEW_ROWS
        if kind == "tf32x3" and min(m, n) > FEW_ROWS:
            swapped = a.column == 1 and b.row != 1  # tensor cores read the right operand along K
        across = kind == "tf32x3" and a.column != 1 and b.row != 1 and min(m, n) >= TURNED and batch < 2**16
        if across:
            swapped = m < n  # so that the smaller one is turned around
        left, right = (b.transposed, a.transposed) if swapped else (a, b)
        rows, columns = (n, m) if swapped else (m, n)
        if across:
            turning = right
            right = Matrix(Out(1), right.meta, k * columns, 1, k)
        tile, k_blocks = choose_tile(rows, columns, k, batch, kind, a.meta.dtype.itemsize, call.target)
        parts = max(-(-k // (k_blocks * tile.k)), 1)
        grid = (_tiles(tile, rows, columns) * batch, parts, 1)
        precision = kind if kind.startswith("tf32") else "ieee"
        constants = _constants(at_once if parts == 1 else persistent.unchanged, ACC=acc, PRECISION=precision, WIDE=wide,
                               UPCAST=call.target.interpreted, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP,
                               EVICT=tile.evict, BY_BLOCK=kind == "ieee")
        warps, stages, kernel = tile.warps, tile.stages, gemm_kernel
    if grid[0] >= 2**31:
        raise Decline(f"{grid[0]} tiles: more than a grid can have")
    split = parts > 1 or product.summed
    allocs: tuple[Alloc, ...] = (out,)
    launches: tuple[Launch, ...] = ()
    if turning is not None:
        allocs += (Alloc((batch, columns, k), contiguous_strides((batch, columns, k)), dtype),)
        args_of_turn = (Out(1), turning.ref, k, columns, Size(turning.batch), turning.row)
        launches += (Launch(turn_kernel, (-(-columns // TURN), -(-k // TURN), batch), args_of_turn,
                            Constants((("WIDE", wide), ("BLOCK", TURN)))),)
    target = Out(0)
    if split:
        target = Out(len(allocs))
        allocs += (Alloc((parts * batch * m * n,), (1,), accumulated),)
    p_c: tuple[Any, ...] = () if c is None or split else (c.ref,)
    scale = () if split else product.scale
    s_batch, s_part = m * n, batch * m * n
    c_batch, c_row, c_column = (0, 0, 0) if c is None else (c.batch, c.row, c.column)
    # Strides are plain integers, so that the compiler knows which ones keep 16-byte accesses aligned.
    if kernel is matvec_kernel:
        args: tuple[Any, ...] = (target, matrix.ref, (b if n == 1 else a).ref, p_c, scale, rows, k, Size(k_blocks),
                                 (s_batch, 1, s_part), (matrix.batch, matrix.row, matrix.column), vector,
                                 (c_batch, c_row if n == 1 else c_column))
    else:
        s_row, s_column = (1, n) if swapped else (n, 1)
        s_c = (c_column, c_row) if swapped else (c_row, c_column)
        args = (target, left.ref, right.ref, p_c, scale, rows, columns, k, Size(k_blocks), (s_batch, s_row, s_column, s_part),
                (left.batch, left.row, left.column), (right.batch, right.row, right.column), (c_batch, *s_c))
    if grid[0]:
        launches += (Launch(kernel, grid, args, constants, warps, stages),)
    if split:
        launches += (_combine(call.target, product, target, count, parts * batch if product.summed else parts, accumulated),)
    return Plan(allocs, launches, Out(0), metas, bytes=moved, flops=2 * batch * m * n * k)


def _plan_tiles(call: Call, product: Product) -> Plan | None:
    """The plan with the kernels of :mod:`gemsmode.ops.persistent`, or None where they do not fit."""
    batch, m, n, k = product.sizes
    a, b, c, dtype = product.a, product.b, product.c, product.dtype
    if product.summed or k == 0 or dtype.itemsize != 2 or a.meta.dtype.itemsize != 2 or n % 8 or (c is not None and c.row != 0):
        return None
    shape = persistent.choose_shape(m, n, k, batch, call.target)
    if shape is None:
        return None
    a_by_rows, b_by_rows = persistent.by_rows(a.row, a.column, 2), persistent.by_rows(b.row, b.column, 2)
    if a_by_rows is None or b_by_rows is None:
        return None
    a_stride, b_stride = (a.row if a_by_rows else a.column), (b.row if b_by_rows else b.column)
    if not (persistent.collapses(batch, a.batch, m if a_by_rows else k, a_stride, shape.m if a_by_rows else shape.k)
            and persistent.collapses(batch, b.batch, k if b_by_rows else n, b_stride, shape.k if b_by_rows else shape.n)
            and persistent.collapses(batch, m * n, m, n, shape.m)):
        return None
    tiles = -(-m // shape.m) * -(-n // shape.n) * batch
    if max(tiles, batch * m, batch * n, batch * k) >= 2**31:
        return None
    split = persistent.choose_split(shape, tiles, k, batch, call.target)
    programs = call.target.multiprocessors * shape.resident if not call.target.interpreted else 3
    c_ref: tuple[Any, ...] = () if c is None else (c.ref,)
    s_c = (Size(0), Size(0)) if c is None else (Size(c.batch), c.column)
    blocks = {"BLOCK_M": shape.m, "BLOCK_N": shape.n, "GROUP": shape.group}
    common = {"A_BY_ROWS": a_by_rows, "B_BY_ROWS": b_by_rows, "BLOCK_K": shape.k, **blocks}
    sizes = (Size(batch), Size(m), n, Size(k))
    allocs: tuple[Alloc, ...] = (Alloc(product.shape, contiguous_strides(product.shape), dtype),)
    launches: tuple[Launch, ...] = ()
    if split.whole:
        launches += (Launch(persistent.tile_kernel, (min(programs, split.whole), 1, 1),
                            (Out(0), a.ref, b.ref, c_ref, product.scale, *sizes, Size(0), Size(split.whole), 1, Size(0), n, a_stride,
                             b_stride, s_c), _constants(product.activation, PARTIAL=False, SLICES=shape.slices, **common),
                            shape.warps, shape.stages),)
    if split.rest:
        units = split.rest * split.parts
        allocs += (Alloc((units * shape.m, shape.n), (shape.n, 1), torch.float32),)
        last = Size(split.whole + split.rest)
        constants = _constants(persistent.unchanged, PARTIAL=True, SLICES=4, **common)
        launches += (
            Launch(persistent.tile_kernel, (min(units, programs), 1, 1),
                   (Out(1), a.ref, b.ref, (), (), *sizes, Size(split.whole), last, Size(split.parts), Size(split.part_blocks), shape.n,
                    a_stride, b_stride, (Size(0), Size(0))), constants, shape.warps, shape.stages),
            Launch(persistent.finish_kernel, (split.rest, -(-shape.m // persistent.FINISH_ROWS), 1),
                   (Out(0), Out(1), c_ref, product.scale, Size(m), n, Size(split.whole), Size(split.parts), n, s_c),
                   _constants(product.activation, ROWS=persistent.FINISH_ROWS, **blocks)))
    metas: dict[Any, TensorMeta] = {x.ref: x.meta for x in (a, b, c) if x is not None}
    moved = sum([meta.numel * meta.dtype.itemsize for meta in metas.values()]) + batch * m * n * dtype.itemsize
    return Plan(allocs, launches, Out(0), metas, bytes=moved, flops=2 * batch * m * n * k, aligned=True)


def _combine(target: Target, product: Product, partial: Out, count: int, parts: int, acc: torch.dtype) -> Launch:
    _, m, n, _ = product.sizes
    c = product.c
    # Few results of many parts (a long dot product) are loaded all at once: a loop over them would wait for each load.
    block_parts = min(power_of_2(parts), max(16, MOST_STRIPS // power_of_2(count)))
    block = min(power_of_2(count), 4096 if target.interpreted else max(2048 // block_parts, 1))
    return Launch(combine_kernel, (-(-count // block), 1, 1),
                  (Out(0), partial, () if c is None else (c.ref,), product.scale, Size(m), Size(n), count, Size(parts),
                   (Size(0), Size(0), Size(0)) if c is None else (Size(c.batch), Size(c.row), Size(c.column))),
                  _constants(product.activation, ACC=acc, BLOCK_PARTS=block_parts, BLOCK=block))


def _expanded(ref: Arg, meta: TensorMeta, shape: tuple[int, int, int]) -> Matrix:
    """``meta`` broadcast to the three dimensions of ``shape``."""
    lead = len(shape) - meta.ndim
    strides = [0] * lead
    if lead < 0:
        raise Decline("PyTorch rejects it: the tensor to be added has too many dimensions")
    for own, stride, size in zip(meta.shape, meta.stride, shape[lead:]):
        if own not in (1, size):
            raise Decline("PyTorch rejects it: the tensor to be added does not broadcast")
        strides.append(0 if own == 1 else stride)
    return Matrix(ref, meta, *strides)


def _operands(call: Call, *indices: int) -> list[TensorMeta]:
    """The tensor arguments at ``indices``: floating point, of one dtype, on the mode's device."""
    metas = [call.args[i] for i in indices]
    for meta in metas:
        if meta.__class__ is not TensorMeta:
            raise Decline("a number in a matrix's place")
        if meta.device.type != call.target.device_type:
            raise Decline("a CPU scalar tensor among the arguments")
        if meta.dtype not in FLOAT:
            kind = "complex" if meta.dtype.is_complex else "an integer"
            raise Decline(f"{dtype_name(meta.dtype)}: {kind} product is left to PyTorch")
        if meta.dtype != metas[0].dtype:
            raise Decline(f"PyTorch rejects it: dtypes {dtype_name(metas[0].dtype)} and {dtype_name(meta.dtype)} in one product")
    return metas


def _scale(call: Call, dtype: torch.dtype) -> tuple[Num, Num]:
    """alpha and beta as the kernels want them."""
    result = []
    count = len(call.args)
    for index in (count - 1, count - 2):
        if isinstance(call.args[index], (bool, complex)):
            raise Decline(f"alpha or beta is {type(call.args[index]).__name__}")
        result.append(Num(index, "fp64" if dtype == torch.float64 else "fp32"))
    return result[0], result[1]


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise Decline(f"PyTorch rejects it: {text}")


def _shapes(a: TensorMeta, b: TensorMeta, ndim: int) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a product of two matrices or two batches of matrices."""
    if len(a.shape) != ndim or len(b.shape) != ndim:
        raise Decline(f"PyTorch rejects it: {a.ndim} and {b.ndim} dimensions where {ndim} are wanted")
    *batch, m, k = a.shape
    *same_batch, same_k, n = b.shape
    if k != same_k or batch != same_batch:
        raise Decline(f"PyTorch rejects it: shapes {list(a.shape)} and {list(b.shape)} do not fit")
    return batch[0] if batch else 1, m, n, k


def _matrix(index: int, meta: TensorMeta) -> Matrix:
    stride = meta.stride
    return Matrix(Arg(index), meta, stride[0] if len(stride) == 3 else 0, stride[-2], stride[-1])


def _wider(meta: TensorMeta, wanted: torch.dtype) -> torch.dtype:
    _expect(wanted == meta.dtype or (wanted == torch.float32 and meta.dtype in (torch.float16, torch.bfloat16)),
            f"a result of {dtype_name(wanted)} from {dtype_name(meta.dtype)}")
    return wanted


# -- rules -------------------------------------------------------------------------------------------------------------

STATE = (float32_precision,)


def _plain(call: Call, ndim: int, out: torch.dtype | None) -> Plan:
    a, b = _operands(call, 0, 1)
    batch, m, n, k = _shapes(a, b, ndim)
    shape = (batch, m, n) if ndim == 3 else (m, n)
    return plan_product(call, Product((batch, m, n, k), _matrix(0, a), _matrix(1, b), shape, _wider(a, out) if out else a.dtype))


@planned("aten.mm.default", family="matmul", kernel=gemm_kernel, state=STATE)
def mm(call: Call) -> Plan:
    """``self [M, K] @ mat2 [K, N]``."""
    return _plain(call, 2, None)


@planned("aten.mm.dtype", family="matmul", kernel=gemm_kernel, name="mm_to_dtype", state=STATE)
def mm_to_dtype(call: Call) -> Plan:
    """``mm`` of 16-bit floats into float32."""
    return _plain(call, 2, call["out_dtype"])


@planned("aten.bmm.default", family="matmul", kernel=gemm_kernel, state=STATE)
def bmm(call: Call) -> Plan:
    """``self [B, M, K] @ mat2 [B, K, N]``."""
    return _plain(call, 3, None)


@planned("aten.bmm.dtype", family="matmul", kernel=gemm_kernel, name="bmm_to_dtype", state=STATE)
def bmm_to_dtype(call: Call) -> Plan:
    """``bmm`` of 16-bit floats into float32."""
    return _plain(call, 3, call["out_dtype"])


def _added(call: Call, ndim: int, out: torch.dtype | None = None, summed: bool = False) -> Plan:
    a, b = _operands(call, 1, 2)
    c, = _operands(call, 0)
    result = _wider(a, out) if out else a.dtype
    _expect(c.dtype == result, f"{dtype_name(c.dtype)} added to a product of {dtype_name(result)}")
    batch, m, n, k = _shapes(a, b, ndim)
    shape = (batch, m, n) if ndim == 3 and not summed else (m, n)
    if len(shape) < c.ndim:
        raise Decline("PyTorch rejects it: the tensor to be added has too many dimensions")
    added = _expanded(Arg(0), c, (1 if summed else batch, m, n))
    return plan_product(call, Product((batch, m, n, k), _matrix(1, a), _matrix(2, b), shape, result, added, _scale(call, a.dtype), summed))


@planned("aten.addmm.default", family="matmul", kernel=gemm_kernel, state=STATE)
def addmm(call: Call) -> Plan:
    """``beta * self + alpha * (mat1 [M, K] @ mat2 [K, N])``; beta 0 ignores ``self``."""
    return _added(call, 2)


@planned("aten.addmm.dtype", family="matmul", kernel=gemm_kernel, name="addmm_to_dtype", state=STATE)
def addmm_to_dtype(call: Call) -> Plan:
    """``addmm`` of 16-bit floats into float32, the dtype of ``self``."""
    return _added(call, 2, call["out_dtype"])


@planned("aten.baddbmm.default", family="matmul", kernel=gemm_kernel, state=STATE)
def baddbmm(call: Call) -> Plan:
    """``beta * self + alpha * (batch1 [B, M, K] @ batch2 [B, K, N])``; beta 0 ignores ``self``."""
    return _added(call, 3)


@planned("aten.baddbmm.dtype", family="matmul", kernel=gemm_kernel, name="baddbmm_to_dtype", state=STATE)
def baddbmm_to_dtype(call: Call) -> Plan:
    """``baddbmm`` of 16-bit floats into float32, the dtype of ``self``."""
    return _added(call, 3, call["out_dtype"])


@planned("aten.addbmm.default", family="matmul", kernel=gemm_kernel, state=STATE)
def addbmm(call: Call) -> Plan:
    """``beta * self + alpha * sum_b (batch1[b] @ batch2[b])``; the products of the batch are the parts that are added up."""
    a, b = call.args[1], call.args[2]
    if a.__class__ is TensorMeta and b.__class__ is TensorMeta and a.ndim == 3 and b.ndim == 3:
        size = a.shape[0] * a.shape[1] * b.shape[2]
        if size > 2**28:
            raise Decline(f"{size} elements of partial results")
    return _added(call, 3, summed=True)


def _vector(index: int, meta: TensorMeta) -> Matrix:
    return Matrix(Arg(index), meta, 0, meta.stride[0], 1)


@planned("aten.mv.default", family="matmul", kernel=matvec_kernel, state=STATE)
def mv(call: Call) -> Plan:
    """``self [M, K] @ vec [K]``."""
    a, v = _operands(call, 0, 1)
    _expect(a.ndim == 2 and v.ndim == 1 and a.shape[1] == v.shape[0], f"shapes {list(a.shape)} and {list(v.shape)} do not fit")
    m, k = a.shape
    return plan_product(call, Product((1, m, 1, k), _matrix(0, a), _vector(1, v), (m,), a.dtype))


@planned("aten.addmv.default", family="matmul", kernel=matvec_kernel, state=STATE)
def addmv(call: Call) -> Plan:
    """``beta * self + alpha * (mat [M, K] @ vec [K])``; beta 0 ignores ``self``."""
    c, a, v = _operands(call, 0, 1, 2)
    _expect(a.ndim == 2 and v.ndim == 1 and a.shape[1] == v.shape[0], f"shapes {list(a.shape)} and {list(v.shape)} do not fit")
    m, k = a.shape
    _expect(c.ndim < 2 and c.numel in (1, m), f"shape {list(c.shape)} added to {m} elements")
    added = Matrix(Arg(0), c, 0, c.stride[0] if c.ndim and c.shape[0] != 1 else 0, 0)
    return plan_product(call, Product((1, m, 1, k), _matrix(1, a), _vector(2, v), (m,), a.dtype, added, _scale(call, a.dtype)))


@planned(["aten.dot.default", "aten.vdot.default"], family="matmul", kernel=matvec_kernel, name="dot", state=STATE)
def dot(call: Call) -> Plan:
    """The sum of products of two vectors (``vdot`` is the same for real ones)."""
    x, y = _operands(call, 0, 1)
    _expect(x.ndim == 1 and x.shape == y.shape, f"shapes {list(x.shape)} and {list(y.shape)} do not fit")
    row = Matrix(Arg(0), x, 0, 0, x.stride[0])
    return plan_product(call, Product((1, 1, 1, x.shape[0]), row, _vector(1, y), (), x.dtype))


@triton.jit
def _rank_one(self, vec1, vec2, beta, alpha):
    b_product = alpha * vec1 * vec2
    return tl.where(beta == 0, b_product, beta * self + b_product)


@planned("aten.addr.default", family="matmul", kernel=_rank_one)
def addr(call: Call) -> Plan:
    """``beta * self + alpha * outer(vec1 [M], vec2 [N])``; beta 0 ignores ``self``."""
    c, x, y = _operands(call, 0, 1, 2)
    _expect(x.ndim == 1 and y.ndim == 1, f"{x.ndim} and {y.ndim} dimensions where vectors are wanted")
    _scale(call, c.dtype)
    shape = (x.shape[0], y.shape[0])
    _expanded(Arg(0), c, (1, *shape))
    operands = [as_operand(call, i, c.dtype) for i in range(5)]
    operands[1] = operands[1]._replace(meta=x._replace(shape=(shape[0], 1), stride=(x.stride[0], 0)))
    operands[2] = operands[2]._replace(meta=y._replace(shape=(1, shape[1]), stride=(0, y.stride[0])))
    outer = TensorMeta(c.dtype, shape, contiguous_strides(shape), c.device)
    return build(call, _rank_one, operands, [c.dtype], shape, output_strides(shape, [c, outer]), flops=3)


def _rows(meta: TensorMeta) -> tuple[int, int, int, int] | None:
    """(batch, rows, batch stride, row stride) of all dimensions but the last, taken as at most two; None if they are more."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(meta.shape[:-1], meta.stride[:-1]):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = groups[-1][0] * size, stride
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return None
    (rows, s_row) = groups.pop() if groups else (1, 0)
    (batch, s_batch) = groups.pop() if groups else (1, 0)
    return batch, rows, s_batch, s_row


def plan_linear(call: Call, activation: Any = persistent.unchanged, alone: bool = False) -> Plan:
    """``activation(input [..., K] @ weight [N, K]^T + bias [N])`` of a call's first three arguments; the bias may be None."""
    x, w = _operands(call, 0, 1)
    _expect(x.ndim >= 1 and w.ndim in (1, 2) and x.shape[-1] == w.shape[-1], f"shapes {list(x.shape)} and {list(w.shape)} do not fit")
    if w.ndim == 1:
        raise Decline("a vector for the weight")
    n, k = w.shape
    taken = _rows(x)
    if taken is None:
        raise Decline(f"the rows of {x} are no two strides")
    batch, rows, s_batch, s_row = taken
    if 0 in x.shape[:-1]:
        batch = rows = 0
    added = None
    if call.args[2] is not None:
        bias, _ = _operands(call, 2, 0)
        if bias.shape != (n,):
            raise Decline(f"a bias of shape {list(bias.shape)}")
        added = Matrix(Arg(2), bias, 0, 0, bias.stride[0])
    left, right = Matrix(Arg(0), x, s_batch, s_row, x.stride[-1]), Matrix(Arg(1), w, 0, w.stride[1], w.stride[0])
    return plan_product(call, Product((batch, rows, n, k), left, right, (*x.shape[:-1], n), x.dtype, added, activation=activation,
                                      alone=alone))


@planned("aten.linear.default", family="matmul", kernel=gemm_kernel, state=STATE)
def linear(call: Call) -> Plan:
    """``input [..., K] @ weight [N, K]^T + bias [N]``, which reaches a mode under inference mode: the bias is added in the product."""
    return plan_linear(call, alone=True)
