"""Large products of 16-bit floats on GPUs with tensor memory access (TMA): persistent programs that write whole tiles.

    out [B, M, N] = beta * c [B, 1, N] + alpha * (a [B, M, K] @ b [B, K, N])

:func:`tile_kernel` runs on as many programs as fit the device at once, and each takes tile after tile. Tiles are read
and written through tensor descriptors, made by each program on the device, so that no registers hold addresses. The
loops over tiles and over K are flattened into one: the loads of the next tile are on their way while this one is
finished. A batch is taken as more rows of one matrix, for which tiles must not cross its borders. What is added is a row
(a bias): a matrix would be loaded ahead as the operands are, for which there is no shared memory.

The last round seldom has a tile for every program. Where that costs more than it does to write and read partial
results, its tiles are a second launch, in which K is split among the programs: each part is written in float32, and
:func:`finish_kernel` adds up the parts of a tile in a fixed order.

Source: Triton's tutorials on persistent matrix multiplication and on tensor descriptors; for splitting the last round,
Osama et al., "Stream-K: work-centric parallel decomposition for dense matrix-matrix multiplication on the GPU" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from gemsmode.target import Target

# -- blocks ------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Batch index, row and column of tile number `i_tile`: GROUP rows of tiles go together through the columns."""
    i_batch = i_tile // (tiles_m * tiles_n)
    i_tile = i_tile % (tiles_m * tiles_n)
    first_m = i_tile // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first_m, GROUP)
    return i_batch, first_m + i_tile % (GROUP * tiles_n) % rows, i_tile % (GROUP * tiles_n) // rows


@triton.jit
def _halves(x):
    """The left and the right half of a block's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def unchanged(x):
    return x


@triton.jit
def _finished(b_acc, c, scale, s_c, i_batch, o_n, n, ACTIVATION: tl.constexpr):
    """ACTIVATION(alpha * acc + beta * c); `scale` is () or (alpha, beta), `c` is () or a pointer. A beta of 0 does not read c."""
    if len(scale) == 2:
        b_acc = b_acc * tl.cast(scale[0], b_acc.dtype)
    if len(c) == 1:
        beta = tl.cast(1.0, b_acc.dtype)
        if len(scale) == 2:
            beta = tl.cast(scale[1], b_acc.dtype)
        p_c = c[0] + i_batch.to(tl.int64) * s_c[0]
        if beta != 0:
            b_c = tl.load(p_c + o_n * s_c[1], mask=o_n < n, other=0.0)
            b_acc = b_acc + (b_c.to(b_acc.dtype) * beta)[None, :]
    return ACTIVATION(b_acc)


@triton.jit
def _write(d_out, b_acc, c, scale, s_c, i_batch, row, first_n, at, n, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """Finish a slice of columns and write it at row `row` and column `at`."""
    o_n = first_n + tl.arange(0, b_acc.shape[1])
    d_out.store([row, at], _finished(b_acc, c, scale, s_c, i_batch, o_n, n, ACTIVATION).to(dtype))


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_kernel(p_out, p_a, p_b, c, scale, batch, m, n, k, first_tile, last_tile, parts, part_blocks, s_out, s_a, s_b, s_c,
                A_BY_ROWS: tl.constexpr, B_BY_ROWS: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr):
    """The tiles from `first_tile` to `last_tile`, each over `parts` parts of K. Grid: any number of programs.

    s_a, s_b and s_out are the strides between rows of the matrices in memory: a by rows is [B * M, K], else [B * K, M];
    b by rows is [B * K, N], else [B * N, K]; out is [B * M, N]. PARTIAL: out is instead [tiles * parts * BLOCK_M,
    BLOCK_N], where each part of each tile is written as it is. A part has part_blocks times BLOCK_K of K.
    SLICES: a tile is written in so many slices of its columns, to need less shared memory. ACTIVATION: applied to what
    is written.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    blocks = tl.cdiv(k, BLOCK_K)
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    dtype: tl.constexpr = p_out.dtype.element_ty
    if A_BY_ROWS:
        d_a = tl.make_tensor_descriptor(p_a, [batch * m, k], [s_a, 1], [BLOCK_M, BLOCK_K])
    else:
        d_a = tl.make_tensor_descriptor(p_a, [batch * k, m], [s_a, 1], [BLOCK_K, BLOCK_M])
    if B_BY_ROWS:
        d_b = tl.make_tensor_descriptor(p_b, [batch * k, n], [s_b, 1], [BLOCK_K, BLOCK_N])
    else:
        d_b = tl.make_tensor_descriptor(p_b, [batch * n, k], [s_b, 1], [BLOCK_N, BLOCK_K])
    if PARTIAL:
        d_out = tl.make_tensor_descriptor(p_out, [(last_tile - first_tile) * parts * BLOCK_M, BLOCK_N], [s_out, 1], [BLOCK_M, WIDTH])
    else:
        d_out = tl.make_tensor_descriptor(p_out, [batch * m, n], [s_out, 1], [BLOCK_M, WIDTH])
    units = (last_tile - first_tile) * parts
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0), flatten=not PARTIAL):
        i_batch, i_m, i_n = _place(first_tile + unit // parts, tiles_m, tiles_n, GROUP)
        o_m = i_m * BLOCK_M
        o_n = i_n * BLOCK_N
        first = 0
        last = blocks
        if PARTIAL:
            first = unit % parts * part_blocks
            last = min(first + part_blocks, blocks)
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i_k in range(first, last):
            if A_BY_ROWS:
                b_a = d_a.load([i_batch * m + o_m, i_k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            else:
                b_a = tl.trans(d_a.load([i_batch * k + i_k * BLOCK_K, o_m]))
            if B_BY_ROWS:
                b_b = d_b.load([i_batch * k + i_k * BLOCK_K, o_n])  # [BLOCK_K, BLOCK_N]
            else:
                b_b = tl.trans(d_b.load([i_batch * n + o_n, i_k * BLOCK_K]))
            b_acc = tl.dot(b_a, b_b, b_acc)
        row = i_batch * m + o_m
        at = o_n
        if PARTIAL:
            row = unit * BLOCK_M
            at = 0
        if SLICES == 1:
            _write(d_out, b_acc, c, scale, s_c, i_batch, row, o_n, at, n, dtype, ACTIVATION)
        else:
            b_left, b_right = _halves(b_acc)
            if SLICES == 2:
                _write(d_out, b_left, c, scale, s_c, i_batch, row, o_n, at, n, dtype, ACTIVATION)
                _write(d_out, b_right, c, scale, s_c, i_batch, row, o_n + WIDTH, at + WIDTH, n, dtype, ACTIVATION)
            else:
                b_0, b_1 = _halves(b_left)
                _write(d_out, b_0, c, scale, s_c, i_batch, row, o_n, at, n, dtype, ACTIVATION)
                _write(d_out, b_1, c, scale, s_c, i_batch, row, o_n + WIDTH, at + WIDTH, n, dtype, ACTIVATION)
                b_2, b_3 = _halves(b_right)
                _write(d_out, b_2, c, scale, s_c, i_batch, row, o_n + 2 * WIDTH, at + 2 * WIDTH, n, dtype, ACTIVATION)
                _write(d_out, b_3, c, scale, s_c, i_batch, row, o_n + 3 * WIDTH, at + 3 * WIDTH, n, dtype, ACTIVATION)


@triton.jit
def finish_kernel(p_out, p_parts, c, scale, m, n, first_tile, parts, s_out, s_c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  ROWS: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr):
    """Add up the parts of tiles and finish them: parts [tiles, parts, BLOCK_M, BLOCK_N]. Grid: (tiles, BLOCK_M / ROWS)."""
    i_tile = tl.program_id(0)
    i_batch, i_m, i_n = _place(first_tile + i_tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    o_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, BLOCK_N)
    p = p_parts + i_tile.to(tl.int64) * parts * (BLOCK_M * BLOCK_N) + o_row[:, None] * BLOCK_N + o_column[None, :]
    b_acc = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for _ in range(0, parts):
        b_acc += tl.load(p)  # [ROWS, BLOCK_N]
        p += BLOCK_M * BLOCK_N
    o_m = i_m * BLOCK_M + o_row
    o_n = i_n * BLOCK_N + o_column
    b_out = _finished(b_acc, c, scale, s_c, i_batch, o_n, n, ACTIVATION)
    p_row = p_out + (i_batch.to(tl.int64) * m + o_m)[:, None] * s_out
    tl.store(p_row + o_n[None, :], b_out.to(p_out.dtype.element_ty), mask=(o_m < m)[:, None] & (o_n < n)[None, :])


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A program of :func:`tile_kernel`: block sizes, slices of columns, warps, pipelining depth, programs a multiprocessor.

    ``group``: rows of tiles that go together through the columns of b.
    """

    m: int
    n: int
    k: int
    slices: int
    warps: int
    stages: int
    resident: int
    group: int = 8


class Split(NamedTuple):
    """How the tiles are given out: ``whole`` of them to the first launch, the others in ``parts`` parts to the second."""

    whole: int
    rest: int
    parts: int
    part_blocks: int


LARGE = Shape(128, 256, 64, 2, 8, 4, 1)
"""229,408 bytes of the 232,448 of shared memory that a program can have on sm_90; 155 to 170 registers."""

PAIRED = Shape(128, 128, 64, 2, 4, 3, 2)
"""Two programs a multiprocessor: one writes while the other multiplies, which decides where K is short."""

SHAPES: tuple[tuple[int, tuple[Shape, ...]], ...] = (
    (128, (Shape(64, 256, 64, 2, 4, 2, 2), Shape(128, 128, 64, 1, 4, 2, 2))),  # writing takes longer than multiplying
    (1024, (PAIRED,)),
    (2**63, (LARGE, PAIRED)),
)
"""(Longest K, shapes): of the first row that K fits, the first shape that gives every multiprocessor its programs is taken.

Measured on an H200: 1024x1024x64 in a batch of 128 takes 88.3 us with the first shape, 89.8 with the second and 97.8 with
PAIRED; 4096x3072x768 takes 36.8 us with PAIRED and 39.2 with LARGE; 4096x4096x4096 takes 194 and 190.
"""

IN_INTERPRETER = False
"""Whether the interpreter takes these kernels, on small tiles: for tests."""

FINISH_ROWS = 8
"""Rows of a tile that a program of :func:`finish_kernel` adds up."""

TILE_US = 2 * 128 * 256 / 6.0e6
"""Microseconds that a multiprocessor needs for one step of K in a tile of 128 by 256 (790 TFLOP/s over 132, on an H200)."""

SPLIT_US = 10.0
"""What splitting the last round costs, in microseconds: a launch more, and partial results written and read (an estimate)."""


def choose_shape(m: int, n: int, k: int, batch: int, target: Target) -> Shape | None:
    """The shape of programs for a product, or None where a tile for each would leave multiprocessors idle."""
    if target.interpreted:
        return Shape(32, 64, 32, 2 if k > SHAPES[0][0] else 4, 4, 1, 1) if IN_INTERPRETER else None
    if not (target.has_tma and target.has_wgmma):
        return None
    for shape in next(shapes for longest, shapes in SHAPES if k <= longest):
        tiles = -(-m // shape.m) * -(-n // shape.n) * batch
        if tiles >= target.multiprocessors * shape.resident and m >= shape.m and n >= shape.n:
            return shape
    return None


def choose_split(shape: Shape, tiles: int, k: int, batch: int, target: Target) -> Split:
    """How the tiles are given out to ``programs`` programs at a time."""
    programs = 3 if target.interpreted else target.multiprocessors * shape.resident
    blocks = -(-k // shape.k)
    rest = tiles % programs
    parts = min(programs // rest, blocks // 8 if not target.interpreted else 2) if rest else 1
    saved = (1 - 1 / max(parts, 1)) * k * TILE_US * (shape.m * shape.n) / (128 * 256) * shape.resident
    if parts < 2 or batch > 1 or (saved < SPLIT_US and not target.interpreted):
        return Split(tiles, 0, 1, blocks)
    part_blocks = -(-blocks // parts)
    return Split(tiles - rest, rest, -(-blocks // part_blocks), part_blocks)


def by_rows(row: int, column: int, itemsize: int) -> bool | None:
    """Whether a matrix lies in memory by rows (True) or by columns, as a descriptor takes it; None if it does neither."""
    if column == 1 and row * itemsize % 16 == 0 and row > 0:
        return True
    if row == 1 and column * itemsize % 16 == 0 and column > 0:
        return False
    return None


def collapses(batch: int, batch_stride: int, rows: int, row_stride: int, block: int) -> bool:
    """Whether a batch of matrices is one matrix of more rows, at whose borders blocks of rows end."""
    return batch == 1 or (batch_stride == rows * row_stride and rows % block == 0)

