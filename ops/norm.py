"""Normalization over rows: layer norm, RMS norm and weight norm, forward and backward.

layer norm: ``y = (x - mean) * rstd * w + b`` with ``rstd = 1 / sqrt(var + eps)`` over the last dimensions of a row;
RMS norm: ``y = x * rstd * w`` with ``rstd = 1 / sqrt(mean(x^2) + eps)``. With ``h = (x - mean) * rstd`` and ``v = g * w``,
backward is ``dx = rstd * (v - mean(v) - h * mean(v * h))`` (RMS norm: without ``mean(v)``), ``dw = sum over rows of g * h``
and ``db = sum over rows of g``.

weight norm: ``w = v * g / |v|`` over all dimensions but one; backward ``dg = sum(dw * v) / |v|`` and
``dv = g / |v| * (dw - v * sum(dw * v) / |v|^2)``.

A row that fits in a block is read and written once; its variance is that of the centred values, centred twice. A longer one is read
twice; each lane then keeps a running mean and sum of squares (Welford) of the differences from the row's first value,
which are combined at the end of the row.

A residual that is added first (the fused ops of ``fused.py``) is read beside the row; their sum is rounded to the result's
dtype, normalized, and written if it is wanted. Its own gradient is added to ``dx`` where that is written.

The gradients of weights are sums over rows. Each program of the backward kernel walks through a run of rows, keeps
their sum in registers and leaves it in a workspace; a second launch adds these up. Nothing is atomic, and the order of
the additions depends on the shape alone.

Group and batch norm, whose statistics span several dimensions, are in ``channel_norm.py``.

Source: Welford, "Note on a method for calculating corrected sums of squares and products" (1962), and Chan, Golub and
LeVeque (1979) for the combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.layout import channels_last_strides
from gemsmode.ops.promotion import FLOAT, TRITON, opmath
from gemsmode.ops.rows import (
    INTERPRETED_BLOCK,
    LONGEST,
    LOOP_STEP,
    WARPS,
    Rows,
    Tile,
    choose_tile,
    column_range,
    is_wide,
    ladder,
    locate,
    power_of_2,
    row_offsets,
    sizes_argument,
    split_rows,
    unravel,
    warps,
)
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- functions of loaded blocks ----------------------------------------------------------------------------------------


@triton.jit
def welford(count, mean, square, x, mask):
    """The running count, mean and sum of squared deviations after the values `x`, lane by lane where `mask` holds."""
    count = count + mask.to(count.dtype)
    # An infinite mean stays so: the difference from it would make it NaN.
    delta = tl.where(mask, tl.where(tl.abs(mean) == float("inf"), x, x - mean), 0.0)
    mean = mean + delta / tl.maximum(count, 1.0)
    return count, mean, square + delta * (x - mean)


@triton.jit
def combine(count, mean, square, axis: tl.constexpr):
    """Count, mean and sum of squared deviations of all lanes along `axis` together."""
    total = tl.sum(count, axis=axis)
    some = tl.maximum(total, 1.0)
    centre = tl.sum(count * mean, axis=axis) / some
    # A mean far from zero was rounded in that sum; the mean of what is left is exact.
    delta = mean - tl.expand_dims(centre, axis)
    rest = tl.sum(count * delta, axis=axis) / some
    rest = tl.where(tl.abs(centre) < float("inf"), rest, 0.0)
    return total, centre + rest, tl.sum(square + count * delta * delta, axis=axis) - total * rest * rest


@triton.jit
def finite(shift):
    """`shift`, or 0 where it is not finite. A row's first value, subtracted from all, keeps a mean far from zero exact."""
    return tl.where(tl.abs(shift) < float("inf"), shift, 0.0)


@triton.jit
def affine(h, weight, bias, o_weight, o_bias, mask):
    """`h * w + b`, with columns of whichever of the two there are."""
    if len(weight) == 1:
        h = h * tl.load(weight[0] + o_weight, mask=mask, other=0.0).to(h.dtype)[None, :]
    if len(bias) == 1:
        h = h + tl.load(bias[0] + o_bias, mask=mask, other=0.0).to(h.dtype)[None, :]
    return h


@triton.jit
def residual_added(x, skip, o_skip, mask, DTYPE: tl.constexpr):
    """`x` plus the block of `skip` (unless that is empty) as rounded to DTYPE."""
    if len(skip) == 1:
        x = (x + tl.load(skip[0] + o_skip, mask=mask, other=0.0).to(x.dtype)).to(DTYPE).to(x.dtype)
    return x


# -- layer norm and RMS norm: kernels ----------------------------------------------------------------------------------


@triton.jit
def norm_kernel(p_y, means, rstds, totals, p_x, skip, weight, bias, eps, n_rows, n, sizes, x_rows, skip_rows, columns,
                x_columns, skip_columns, w_columns, b_columns, RMS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows that fit in a block, read and written once. `skip` is added first, and the sum left in `totals`.

    A program takes every so many-th block of rows and loads the next one while it computes. Grid: programs.
    """
    o_column = column_range(0, BLOCK_N, WIDE)
    m_column = o_column < n
    o_x = unravel(o_column, columns, x_columns)[None, :]
    if len(skip) == 1:
        o_skip = unravel(o_column, columns, skip_columns)[None, :]
    blocks = tl.cdiv(n_rows, BLOCK_R)
    i_first = tl.program_id(0)
    if WIDE:
        i_first = i_first.to(tl.int64)
    o_row = i_first * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (o_row < n_rows)[:, None] & m_column[None, :]
    # [BLOCK_R, BLOCK_N]
    b_x = tl.load(p_x + unravel(o_row, sizes, x_rows)[:, None] + o_x, mask=mask, other=0.0)
    if len(skip) == 1:
        b_skip = tl.load(skip[0] + unravel(o_row, sizes, skip_rows)[:, None] + o_skip, mask=mask, other=0.0)
    for i_block in range(i_first, blocks, tl.num_programs(0)):
        x = b_x.to(ACC)
        if len(skip) == 1:
            x = (x + b_skip.to(ACC)).to(p_y.dtype.element_ty).to(ACC)
        o_next = (i_block + tl.num_programs(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_next = (o_next < n_rows)[:, None] & m_column[None, :]
        b_x = tl.load(p_x + unravel(o_next, sizes, x_rows)[:, None] + o_x, mask=m_next, other=0.0)
        if len(skip) == 1:
            b_skip = tl.load(skip[0] + unravel(o_next, sizes, skip_rows)[:, None] + o_skip, mask=m_next, other=0.0)
        o_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = o_row < n_rows
        mask = m_row[:, None] & m_column[None, :]
        o_y = (o_row * n)[:, None] + o_column[None, :]
        if len(totals) == 1:
            tl.store(totals[0] + o_y, x.to(totals[0].dtype.element_ty), mask=mask)
        if not RMS:
            mean = tl.sum(x, axis=1) / n
            x = tl.where(mask, x - mean[:, None], 0.0)
            # A mean far from zero was rounded in its sum; the mean of the centred values is not.
            rest = tl.sum(x, axis=1) / n
            variance = tl.sum(x * x, axis=1) / n - rest * rest
            x = x - rest[:, None]
            if len(means) == 1:
                tl.store(means[0] + o_row, (mean + rest).to(means[0].dtype.element_ty), mask=m_row)
        else:
            variance = tl.sum(x * x, axis=1) / n
        rstd = tl.rsqrt(variance + tl.cast(eps, ACC))
        if len(rstds) == 1:
            tl.store(rstds[0] + o_row, rstd.to(rstds[0].dtype.element_ty), mask=m_row)
        # From the first cache again for each block of rows: registers are dearer.
        y = affine(x * rstd[:, None], weight, bias, unravel(o_column, columns, w_columns), unravel(o_column, columns, b_columns), m_column)
        tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def norm_loop_kernel(p_y, means, rstds, totals, p_x, skip, weight, bias, eps, n_rows, n, sizes, x_rows, skip_rows, columns,
                     x_columns, skip_columns, w_columns, b_columns, RMS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
                     BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows longer than a block, read twice. `skip` is added first, and the sum left in `totals`. Grid: blocks of rows."""
    o_row, _, m_row = locate(sizes, n_rows, BLOCK_R, True, WIDE)
    p_in = p_x + unravel(o_row, sizes, x_rows)[:, None]
    o_skips = tl.zeros([BLOCK_R, 1], tl.int32)
    if len(skip) == 1:
        o_skips = unravel(o_row, sizes, skip_rows)[:, None]
    shift = tl.zeros([BLOCK_R, 1], ACC)
    if not RMS:
        shift = tl.load(p_in, mask=m_row[:, None], other=0.0).to(ACC)
        shift = finite(residual_added(shift, skip, o_skips, m_row[:, None], p_y.dtype.element_ty))
    count = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    lane_mean = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    lane_square = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        x = tl.load(p_in + unravel(o_column, columns, x_columns)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        if len(skip) == 1:
            x = residual_added(x, skip, o_skips + unravel(o_column, columns, skip_columns)[None, :], mask, p_y.dtype.element_ty)
        if RMS:
            lane_square += x * x
        else:
            count, lane_mean, lane_square = welford(count, lane_mean, lane_square, x - shift, mask)
    if RMS:
        mean = tl.zeros([BLOCK_R], ACC)
        square = tl.sum(lane_square, axis=1)
    else:
        _, mean, square = combine(count, lane_mean, lane_square, 1)
        if len(means) == 1:
            tl.store(means[0] + o_row, (mean + tl.sum(shift, axis=1)).to(means[0].dtype.element_ty), mask=m_row)
    rstd = tl.rsqrt(square / n + tl.cast(eps, ACC))
    if len(rstds) == 1:
        tl.store(rstds[0] + o_row, rstd.to(rstds[0].dtype.element_ty), mask=m_row)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        m_column = o_column < n
        mask = m_row[:, None] & m_column[None, :]
        x = tl.load(p_in + unravel(o_column, columns, x_columns)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        if len(skip) == 1:
            x = residual_added(x, skip, o_skips + unravel(o_column, columns, skip_columns)[None, :], mask, p_y.dtype.element_ty)
            if len(totals) == 1:
                tl.store(totals[0] + (o_row * n)[:, None] + o_column[None, :], x.to(totals[0].dtype.element_ty), mask=mask)
        h = (x - shift - mean[:, None]) * rstd[:, None]
        y = affine(h, weight, bias, unravel(o_column, columns, w_columns), unravel(o_column, columns, b_columns), m_column)
        tl.store(p_y + (o_row * n)[:, None] + o_column[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _normalized(x, means, p_rstd, o_row, m_row, ACC: tl.constexpr):
    """`h` of the rows of block `x` from their saved statistics, and `rstd` [BLOCK_R, 1]."""
    rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0).to(ACC)[:, None]
    if len(means) == 1:
        x = x - tl.load(means[0] + o_row, mask=m_row, other=0.0).to(ACC)[:, None]
    return x * rstd, rstd


@triton.jit
def norm_backward_kernel(dx, dw, db, p_g, p_x, added, means, p_rstd, weight, n_rows, n, run, sizes, g_rows, x_rows, added_rows,
                         columns, g_columns, x_columns, added_columns, w_columns, ACC: tl.constexpr, WIDE: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """A run of rows that fit in a block: dx, and the sums of g * h and g over the run, whichever are wanted.

    The next rows are loaded before the present ones are computed with. Grid: runs of `run` rows. `means` is empty for
    RMS norm. `added` is a gradient that is added to dx. dw and db are workspaces [runs, n].
    """
    i_run = tl.program_id(0)
    if WIDE:
        i_run = i_run.to(tl.int64)
    o_column = column_range(0, BLOCK_N, WIDE)
    m_column = o_column < n
    o_g = unravel(o_column, columns, g_columns)[None, :]
    o_x = unravel(o_column, columns, x_columns)[None, :]
    if len(weight) == 1:
        w = tl.load(weight[0] + unravel(o_column, columns, w_columns), mask=m_column, other=0.0).to(ACC)[None, :]
    sum_w = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    sum_b = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    end = tl.minimum((i_run + 1) * run, n_rows)
    o_row = i_run * run + tl.arange(0, BLOCK_R)
    mask = (o_row < end)[:, None] & m_column[None, :]
    # [BLOCK_R, BLOCK_N]
    b_g = tl.load(p_g + unravel(o_row, sizes, g_rows)[:, None] + o_g, mask=mask, other=0.0)
    b_x = tl.load(p_x + unravel(o_row, sizes, x_rows)[:, None] + o_x, mask=mask, other=0.0)
    for start in range(i_run * run, end, BLOCK_R):
        g = b_g.to(ACC)
        x = b_x.to(ACC)
        o_row = start + tl.arange(0, BLOCK_R)
        m_row = o_row < end
        o_next = o_row + BLOCK_R
        m_next = (o_next < end)[:, None] & m_column[None, :]
        b_g = tl.load(p_g + unravel(o_next, sizes, g_rows)[:, None] + o_g, mask=m_next, other=0.0)
        b_x = tl.load(p_x + unravel(o_next, sizes, x_rows)[:, None] + o_x, mask=m_next, other=0.0)
        mask = m_row[:, None] & m_column[None, :]
        h, rstd = _normalized(x, means, p_rstd, o_row, m_row, ACC)
        h = tl.where(mask, h, 0.0)
        if len(dw) == 1:
            sum_w += g * h
        if len(db) == 1:
            sum_b += g
        if len(dx) == 1:
            v = g
            if len(weight) == 1:
                v = g * w
            result = v - h * (tl.sum(v * h, axis=1) / n)[:, None]
            if len(means) == 1:
                result = result - (tl.sum(v, axis=1) / n)[:, None]
            result = result * rstd
            if len(added) == 1:
                o_added = unravel(o_row, sizes, added_rows)[:, None] + unravel(o_column, columns, added_columns)[None, :]
                result += tl.load(added[0] + o_added, mask=mask, other=0.0).to(ACC)
            p_dx = dx[0] + (o_row * n)[:, None] + o_column[None, :]
            tl.store(p_dx, result.to(dx[0].dtype.element_ty), mask=mask)
    if len(dw) == 1:
        tl.store(dw[0] + i_run * n + o_column, tl.sum(sum_w, axis=0), mask=m_column)
    if len(db) == 1:
        tl.store(db[0] + i_run * n + o_column, tl.sum(sum_b, axis=0), mask=m_column)


@triton.jit
def norm_backward_loop_kernel(dx, p_g, p_x, added, means, p_rstd, weight, n_rows, n, sizes, g_rows, x_rows, added_rows, columns,
                              g_columns, x_columns, added_columns, w_columns, ACC: tl.constexpr, WIDE: tl.constexpr,
                              BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """dx of rows longer than a block, read twice. Grid: blocks of rows."""
    o_row, _, m_row = locate(sizes, n_rows, BLOCK_R, True, WIDE)
    p_gi = p_g + unravel(o_row, sizes, g_rows)[:, None]
    p_xi = p_x + unravel(o_row, sizes, x_rows)[:, None]
    sum_v = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    sum_vh = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        m_column = o_column < n
        mask = m_row[:, None] & m_column[None, :]
        v = tl.load(p_gi + unravel(o_column, columns, g_columns)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        x = tl.load(p_xi + unravel(o_column, columns, x_columns)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        h, rstd = _normalized(x, means, p_rstd, o_row, m_row, ACC)
        if len(weight) == 1:
            v = v * tl.load(weight[0] + unravel(o_column, columns, w_columns), mask=m_column, other=0.0).to(ACC)[None, :]
        sum_v += v
        sum_vh += v * tl.where(mask, h, 0.0)
    mean_v = (tl.sum(sum_v, axis=1) / n)[:, None]
    mean_vh = (tl.sum(sum_vh, axis=1) / n)[:, None]
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        m_column = o_column < n
        mask = m_row[:, None] & m_column[None, :]
        v = tl.load(p_gi + unravel(o_column, columns, g_columns)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(p_xi + unravel(o_column, columns, x_columns)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        h, rstd = _normalized(x, means, p_rstd, o_row, m_row, ACC)
        if len(weight) == 1:
            v = v * tl.load(weight[0] + unravel(o_column, columns, w_columns), mask=m_column, other=0.0).to(ACC)[None, :]
        result = v - h * mean_vh
        if len(means) == 1:
            result = result - mean_v
        result = result * rstd
        if len(added) == 1:
            o_added = unravel(o_row, sizes, added_rows)[:, None] + unravel(o_column, columns, added_columns)[None, :]
            result += tl.load(added[0] + o_added, mask=mask, other=0.0).to(ACC)
        p_dx = dx[0] + (o_row * n)[:, None] + o_column[None, :]
        tl.store(p_dx, result.to(dx[0].dtype.element_ty), mask=mask)


@triton.jit
def norm_weights_kernel(dw, db, p_g, p_x, means, p_rstd, n_rows, n, run, sizes, g_rows, x_rows, columns, g_columns, x_columns,
                        ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of g * h and g over runs of rows, for rows longer than a block. Grid: blocks of columns, runs of `run` rows."""
    i_block = tl.program_id(0)
    i_run = tl.program_id(1)
    if WIDE:
        i_block = i_block.to(tl.int64)
        i_run = i_run.to(tl.int64)
    o_column = column_range(i_block * BLOCK_N, BLOCK_N, WIDE)
    m_column = o_column < n
    o_g = unravel(o_column, columns, g_columns)[None, :]
    o_x = unravel(o_column, columns, x_columns)[None, :]
    sum_w = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    sum_b = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    end = tl.minimum((i_run + 1) * run, n_rows)
    for start in range(i_run * run, end, BLOCK_R):
        o_row = start + tl.arange(0, BLOCK_R)
        m_row = o_row < end
        mask = m_row[:, None] & m_column[None, :]
        g = tl.load(p_g + unravel(o_row, sizes, g_rows)[:, None] + o_g, mask=mask, other=0.0).to(ACC)
        if len(dw) == 1:
            x = tl.load(p_x + unravel(o_row, sizes, x_rows)[:, None] + o_x, mask=mask, other=0.0).to(ACC)
            h, _ = _normalized(x, means, p_rstd, o_row, m_row, ACC)
            sum_w += g * tl.where(mask, h, 0.0)
        sum_b += g
    if len(dw) == 1:
        tl.store(dw[0] + i_run * n + o_column, tl.sum(sum_w, axis=0), mask=m_column)
    if len(db) == 1:
        tl.store(db[0] + i_run * n + o_column, tl.sum(sum_b, axis=0), mask=m_column)


@triton.jit
def sum_runs_kernel(outs, workspaces, n_runs, n, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add up workspaces [n_runs, n] over the runs. Grid: blocks of columns."""
    o_column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < n
    for i in tl.static_range(len(outs)):
        total = tl.zeros([BLOCK_R, BLOCK_N], ACC)
        for start in range(0, n_runs, BLOCK_R):
            o_run = start + tl.arange(0, BLOCK_R)
            mask = (o_run < n_runs)[:, None] & m_column[None, :]
            total += tl.load(workspaces[i] + o_run.to(tl.int64)[:, None] * n + o_column[None, :], mask=mask, other=0.0)
        tl.store(outs[i] + o_column, tl.sum(total, axis=0).to(outs[i].dtype.element_ty), mask=m_column)


# -- layer norm and RMS norm: launch choice ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """How the rows are shared out in backward.

    Attributes:
        rows: rows a step.
        columns: columns a step.
        warps: warps a program, of 32 threads.
        run: rows a program.
        count: programs.
        fused: whether one kernel computes dx and the sums.
    """

    rows: int
    columns: int
    warps: int
    run: int
    count: int
    fused: bool = True


_LONGEST_BACKWARD = 8192  # with two sums, a weight and two operands a lane, longer rows of 4 bytes an element spill
_WARPS_BACKWARD = ((2048, 4), (4096, 8), (1 << 30, 16))
_WARPS_A_MULTIPROCESSOR = 16
_RUN = 4  # blocks of rows that a program takes at most, where there are more than the device holds
_WARPS_FORWARD = ((2048, 4), (4096, 8), (16384, 16), (1 << 30, 32))  # 16 elements a thread, of two blocks of rows at once
_ALONE = 1024  # elements of a row that a program takes by itself
_LIGHT = 4096  # elements of a row of which rms_norm is faster with a program of four warps for each


def choose_runs(rows: Rows, itemsize: int, sums: bool, target: Target) -> Runs:
    """Runs of rows for the backward kernels; ``sums``: whether gradients of weights are wanted."""
    n, n_rows = rows.n_columns, rows.n_rows
    block_n = power_of_2(n)
    scale = itemsize // 4
    # A float64 takes two registers, and so do the intermediate values of its reciprocal: a quarter of the row fits.
    longest = INTERPRETED_BLOCK if target.interpreted else _LONGEST_BACKWARD // scale**2
    if block_n > longest:
        columns, block_r = (1024, 64) if target.interpreted else (128, 16)
        programs = 2 if target.interpreted else max(target.multiprocessors * 4 // -(-n // columns), 1)
        steps = -(-n_rows // block_r)
        count = min(programs, steps)
        run = -(-steps // count) * block_r
        return Runs(block_r, columns, 4, run, -(-n_rows // run), fused=False)
    budget = INTERPRETED_BLOCK if target.interpreted else 2048 // scale
    block_r = max(min(budget // block_n, power_of_2(n_rows)), 1)
    width = ladder(_WARPS_BACKWARD, block_r * block_n * scale)
    steps = -(-n_rows // block_r)
    programs = 2 if target.interpreted else target.multiprocessors * max(_WARPS_A_MULTIPROCESSOR // width, 1)
    count = min(programs, steps) if sums else steps
    run = -(-steps // count) * block_r
    return Runs(block_r, block_n, width, run, -(-n_rows // run))


def sum_runs(outs: tuple[Any, ...], spaces: tuple[Any, ...], n_runs: int, n: int, acc: torch.dtype, target: Target) -> Launch:
    """The launch that adds up workspaces [n_runs, n] into ``outs`` [n]."""
    if target.interpreted:
        block_n = min(power_of_2(n), 4096)
        block_r = min(power_of_2(n_runs), INTERPRETED_BLOCK // block_n)
    else:
        # Narrow blocks while the device is not filled; 32 columns of 4 bytes are a cache line.
        block_n = 128 if n >= 128 * target.multiprocessors else 32
        block_r = min(power_of_2(n_runs), 2048 // block_n)
    return Launch(sum_runs_kernel, (-(-n // block_n), 1, 1), (outs, spaces, Size(n_runs), n),
                  (("ACC", TRITON[acc]), ("BLOCK_R", block_r), ("BLOCK_N", block_n)), warps(4, target))


# -- layer norm and RMS norm: plans ------------------------------------------------------------------------------------


def looks_channels_last(meta: TensorMeta) -> bool:
    """Whether PyTorch takes ``meta`` for a channels_last (or channels_last_3d) tensor, by its strides alone."""
    if meta.ndim not in (4, 5) or meta.stride[1] == 0:
        return False
    smallest = 0
    for d in (1, *range(meta.ndim - 1, 1, -1), 0):
        if meta.shape[d] == 0 or meta.stride[d] < smallest or (d == 0 and smallest == meta.stride[1]):
            return False
        smallest = meta.stride[d] * max(meta.shape[d], 1)
    return True


def suggested_strides(meta: TensorMeta) -> tuple[int, ...]:
    """The strides of a new tensor in the memory format that PyTorch suggests for ``meta``."""
    last = channels_last_strides(meta.shape) if looks_channels_last(meta) else None
    return last if last is not None else contiguous_strides(meta.shape)


def _axis(call: Call, x: TensorMeta) -> int:
    """The number of leading dimensions that are not normalized."""
    normalized = tuple(call["normalized_shape"])
    if not normalized or x.shape[x.ndim - len(normalized):] != normalized or len(normalized) > x.ndim:
        raise Decline("PyTorch rejects it: the input does not end in normalized_shape")
    return x.ndim - len(normalized)


def parameter_dtype(x: TensorMeta, parameters: Sequence[TensorMeta | None], target: Target) -> torch.dtype:
    """The dtype of the parameters of a norm of ``x``: its own, or float32 beside a 16-bit ``x``.

    Raises:
        Decline: other combinations, which PyTorch rejects.
    """
    given = {p.dtype for p in parameters if p is not None}
    if not given or given == {x.dtype}:
        return x.dtype
    if given == {torch.float32} and x.dtype.itemsize == 2 and target.device_type == "cpu":
        return torch.float32
    names = ", ".join(sorted(dtype_name(d) for d in given))
    raise Decline(f"parameters of {names} with an input of {dtype_name(x.dtype)}")


def optional(meta: TensorMeta | None, ref: Arg, metas: dict[Arg, TensorMeta]) -> tuple[Arg, ...]:
    """The kernel argument for an optional tensor: empty if it is not there."""
    if meta is None:
        return ()
    metas[ref] = meta
    return (ref,)


def _expanded(meta: TensorMeta | None, x: TensorMeta, axis: int) -> tuple[int, ...]:
    """The strides of a weight of shape ``x.shape[axis:]`` over all of ``x``."""
    if meta is None:
        return (0,) * x.ndim
    if meta.shape != x.shape[axis:]:
        raise Decline("PyTorch rejects it: the weight does not have normalized_shape")
    return (0,) * axis + meta.stride


def plan_norm(call: Call, eps: Any, outs: tuple[torch.dtype | None, ...], weight: int | None, bias: int | None, rms: bool,
              skip: int | None = None, total: bool = False) -> Plan:
    """Forward. ``outs``: dtypes of y, mean and rstd (None: not wanted); ``weight``, ``bias``, ``skip``: their positions.

    ``skip`` is a residual of the input's shape that is added first; ``total``: the sum is wanted, as the last result.
    """
    x: TensorMeta = call["input"]
    axis = _axis(call, x)
    w, b = (None if i is None else call.args[i] for i in (weight, bias))
    statistics = (*x.shape[:axis], *(1,) * (x.ndim - axis))
    residual = None if skip is None else call.args[skip]
    if residual is not None and residual.shape != x.shape:
        raise Decline("a residual of another shape than the input's")
    shapes = (x.shape, statistics, statistics, x.shape)
    wanted = (*outs, outs[0] if total else None)
    allocs = [Alloc(s, contiguous_strides(s), d) for s, d in zip(shapes, wanted) if d is not None]
    returns: Any = tuple([Out(i) for i in range(len(allocs))]) if len(allocs) > 1 else Out(0)
    metas: dict[Arg, TensorMeta] = {Arg(0): x}
    if x.numel == 0:
        if any(a.shape and 0 not in a.shape for a in allocs):
            raise Decline("rows of no elements")
        return Plan(tuple(allocs), (), returns, metas, bytes=0, flops=0)
    acc = opmath(x.dtype)
    y = contiguous_strides(x.shape)
    skips = () if skip is None else optional(residual, Arg(skip), metas)
    more = [residual.stride] if residual is not None else []
    rows = split_rows(x.shape, range(axis, x.ndim), [y, x.stride, _expanded(w, x, axis), _expanded(b, x, axis), *more])
    tile = _whole_rows(choose_tile(rows, acc.itemsize, call.target), rows, acc.itemsize, call.target)
    if rows.inner and tile.columns >= _ALONE and not tile.loops and not call.target.interpreted:
        tile = tile._replace(rows=1)
    means = (Out(1),) if outs[1] is not None else ()
    rstds = (Out(1 + len(means)),) if outs[2] is not None else ()
    totals = (Out(len(allocs) - 1),) if total else ()
    skip_rows, skip_columns = (rows.row_strides[4], rows.column_strides[4]) if skips else ((), ())
    args = (Out(0), means, rstds, totals, Arg(0), skips, optional(w, Arg(weight or 0), metas), optional(b, Arg(bias or 0), metas), eps,
            Size(rows.n_rows), rows.n_columns, sizes_argument(rows.row_sizes), rows.row_strides[1], skip_rows,
            sizes_argument(rows.column_sizes), rows.column_strides[1], skip_columns, *rows.column_strides[2:4])
    constants = (("RMS", rms), ("ACC", TRITON[acc]), ("WIDE", is_wide(*metas.values(), allocs[0].meta)), ("BLOCK_R", tile.rows),
                 ("BLOCK_N", tile.columns))
    programs, width = -(-rows.n_rows // tile.rows), tile.warps
    if not tile.loops:
        size = tile.rows * tile.columns * acc.itemsize // 4
        width = ladder(_WARPS_FORWARD, size)
        # As many as the device holds, and more of long inputs: multiprocessors differ in how fast memory serves them.
        held = 2 if call.target.interpreted else call.target.multiprocessors * max(32 // width, 1)
        if programs > held:
            if rms and not skips and size == _LIGHT and not call.target.interpreted:
                width = 4
            else:
                programs = held if call.target.interpreted else max(held, -(-programs // _RUN))
    step = Launch(norm_loop_kernel if tile.loops else norm_kernel, (programs, 1, 1), args, constants, warps(width, call.target))
    return Plan(tuple(allocs), (step,), returns, metas, bytes=(2 + len(skips) + total) * x.numel * x.dtype.itemsize, flops=x.numel * 8)


def _whole_rows(tile: Tile, rows: Rows, itemsize: int, target: Target) -> Tile:
    """``tile`` without what the norms do not use: rows split over programs."""
    if not tile.chunks:
        return tile
    scale = itemsize // 4
    fits = power_of_2(rows.n_columns) <= (INTERPRETED_BLOCK if target.interpreted else LONGEST // 2 // scale)
    columns = power_of_2(rows.n_columns) if fits else LOOP_STEP // scale
    return Tile(1, columns, ladder(WARPS, columns * scale), not fits)


def eps_argument(call: Call, index: int, x: TensorMeta) -> Any:
    eps = call.args[index]
    if eps is None:
        return torch.finfo(opmath(x.dtype)).eps
    return Num(index, "fp64" if x.dtype == torch.float64 else "fp32")


@planned("aten.native_layer_norm.default", dtype(*FLOAT), family="norm", kernel=norm_kernel)
def layer_norm(call: Call) -> Plan:
    x = call["input"]
    parameter = parameter_dtype(x, (call["weight"], call["bias"]), call.target)
    statistics = parameter if call.target.device_type == "cpu" else opmath(x.dtype)
    return plan_norm(call, eps_argument(call, 4, x), (x.dtype, statistics, statistics), 2, 3, rms=False)


@planned("aten._fused_rms_norm.default", dtype(*FLOAT), family="norm", kernel=norm_kernel)
def fused_rms_norm(call: Call) -> Plan:
    x = call["input"]
    if call["weight"] is not None and call["weight"].dtype != x.dtype:
        raise Decline("the weight's dtype is not the input's")
    if looks_channels_last(x):
        raise Decline("a channels_last input")
    return plan_norm(call, eps_argument(call, 3, x), (x.dtype, None, opmath(x.dtype)), 2, None, rms=True)


@planned("aten.rms_norm.default", dtype(*FLOAT), family="norm", kernel=norm_kernel)
def rms_norm(call: Call) -> Plan:
    """The composite op, which reaches the mode under ``torch.inference_mode()``."""
    x, weight = call["input"], call["weight"]
    if weight is not None and weight.dtype != x.dtype and torch.float64 in (x.dtype, weight.dtype):
        raise Decline("the weight's dtype is not the input's, and one is float64")
    if looks_channels_last(x) or x.numel == 0:
        raise Decline("a channels_last input, or an empty one")
    return plan_norm(call, eps_argument(call, 3, x), (x.dtype, None, None), 2, None, rms=True)


def plan_norm_backward(call: Call, mean: int | None, rstd: int, weight: int, mask: tuple[bool, bool, bool], parameter: torch.dtype,
                       arity: int, added: int | None = None) -> Plan:
    """Backward; ``mean``, ``rstd``, ``weight`` and ``added`` are positions; ``mask``: which of dx, dw and db are wanted.

    ``added``: a gradient of the input's shape and dtype that is added to dx.
    """
    g, x, w = call["grad_out"], call["input"], call.args[weight]
    axis = _axis(call, x)
    if g.shape != x.shape or g.dtype != x.dtype:
        raise Decline("grad_out and input differ in shape or dtype")
    more = None if added is None else call.args[added]
    if more is not None and (more.shape != x.shape or more.dtype != x.dtype):
        raise Decline("the gradient of the sum and the input differ in shape or dtype")
    wants_dx, wants_dw, wants_db = mask
    n = 1
    for size in x.shape[axis:]:
        n *= size
    statistics = [call.args[i] for i in (mean, rstd) if i is not None]
    if any(s.numel * n != x.numel or not s.is_contiguous for s in statistics):
        raise Decline("saved statistics that are not one contiguous value a row")
    allocs: list[Alloc] = []
    results: list[Out | None] = []
    sums_only = x.numel == 0
    for wanted, shape, kind in ((wants_dx, x.shape, x.dtype), (wants_dw, x.shape[axis:], parameter), (wants_db, x.shape[axis:], parameter)):
        results.append(Out(len(allocs)) if wanted else None)
        if wanted:
            allocs.append(Alloc(shape, contiguous_strides(shape), kind, zero=sums_only))
    returns = tuple(results[:arity])
    metas: dict[Arg, TensorMeta] = {Arg(0): g, Arg(1): x}
    if x.numel == 0 or not allocs:
        return Plan(tuple(allocs), (), returns, metas, bytes=0, flops=0)
    acc = opmath(x.dtype)
    out = contiguous_strides(x.shape)
    rows = split_rows(x.shape, range(axis, x.ndim),
                      [out, g.stride, x.stride, _expanded(w, x, axis), *([] if more is None else [more.stride])])
    added_rows, added_columns = ((), ()) if more is None else (rows.row_strides[4], rows.column_strides[4])
    runs = choose_runs(rows, acc.itemsize, wants_dw or wants_db, call.target)
    means = () if mean is None else (Arg(mean),)
    for i in (mean, rstd):
        if i is not None:
            metas[Arg(i)] = call.args[i]
    weights = optional(w, Arg(weight), metas)
    extra = () if added is None else optional(more, Arg(added), metas)
    spaces: list[Out | None] = [None, None]
    if wants_dw or wants_db:
        for i, wanted in enumerate((wants_dw, wants_db)):
            if wanted:
                spaces[i] = Out(len(allocs))
                allocs.append(Alloc((runs.count * n,), (1,), acc))
    some_dx, some_dw, some_db = (() if r is None else (r,) for r in (results[0], *spaces))
    wide = is_wide(g, x, *([] if more is None else [more]), *(a.meta for a in allocs))
    sizes, columns = sizes_argument(rows.row_sizes), sizes_argument(rows.column_sizes)
    constants = (("ACC", TRITON[acc]), ("WIDE", wide))
    launches: list[Launch] = []
    if runs.fused:
        launches.append(Launch(
            norm_backward_kernel, (runs.count, 1, 1),
            (some_dx, some_dw, some_db, Arg(0), Arg(1), extra, means, Arg(rstd), weights, Size(rows.n_rows), n, Size(runs.run), sizes,
             *rows.row_strides[1:3], added_rows, columns, *rows.column_strides[1:3], added_columns, rows.column_strides[3]),
            (*constants, ("BLOCK_R", runs.rows), ("BLOCK_N", runs.columns)), warps(runs.warps, call.target)))
    else:
        if wants_dx:
            tile = _whole_rows(choose_tile(rows, acc.itemsize, call.target), rows, acc.itemsize, call.target)
            step = min(tile.columns, power_of_2(n), LOOP_STEP * 4 // acc.itemsize)
            block_r = max(tile.rows, 1) if tile.loops else 1
            launches.append(Launch(
                norm_backward_loop_kernel, (-(-rows.n_rows // block_r), 1, 1),
                (some_dx, Arg(0), Arg(1), extra, means, Arg(rstd), weights, Size(rows.n_rows), n, sizes, *rows.row_strides[1:3], added_rows,
                 columns, *rows.column_strides[1:3], added_columns, rows.column_strides[3]),
                (*constants, ("BLOCK_R", block_r), ("BLOCK_N", step)), warps(ladder(WARPS, block_r * step), call.target)))
        if wants_dw or wants_db:
            launches.append(Launch(
                norm_weights_kernel, (-(-n // runs.columns), runs.count, 1),
                (some_dw, some_db, Arg(0), Arg(1), means, Arg(rstd), Size(rows.n_rows), n, Size(runs.run), sizes, *rows.row_strides[1:3],
                 columns, *rows.column_strides[1:3]),
                (*constants, ("BLOCK_R", runs.rows), ("BLOCK_N", runs.columns)), warps(runs.warps, call.target)))
    if wants_dw or wants_db:
        launches.append(sum_runs(tuple([r for r in results[1:] if r is not None]), some_dw + some_db, runs.count, n, acc, call.target))
    return Plan(tuple(allocs), tuple(launches), returns, metas, bytes=x.numel * x.dtype.itemsize * (2 + wants_dx), flops=x.numel * 12)


@planned("aten.native_layer_norm_backward.default", dtype(*FLOAT), family="norm", kernel=norm_backward_kernel)
def layer_norm_backward(call: Call) -> Plan:
    x, weight = call["input"], call["weight"]
    mask = tuple(call["output_mask"])
    if (mask[1] and weight is None) or (mask[2] and call["bias"] is None):
        raise Decline("PyTorch rejects it: the gradient of a parameter that is not given")
    parameter = parameter_dtype(x, (weight,), call.target)
    statistics = parameter if call.target.device_type == "cpu" else opmath(x.dtype)
    if call["mean"].dtype != statistics or call["rstd"].dtype != statistics:
        raise Decline("PyTorch rejects it: saved statistics of another dtype than forward gives")
    return plan_norm_backward(call, 3, 4, 5, mask, parameter, 3)


@planned("aten._fused_rms_norm_backward.default", dtype(*FLOAT), family="norm", kernel=norm_backward_kernel)
def fused_rms_norm_backward(call: Call) -> Plan:
    x, weight = call["input"], call["weight"]
    wants_dx, wants_dw = call["output_mask"]
    if weight is not None and weight.dtype != x.dtype:
        raise Decline("the weight's dtype is not the input's")
    if call["rstd"].dtype != opmath(x.dtype):
        raise Decline("saved statistics of another dtype than forward gives")
    return plan_norm_backward(call, None, 3, 4, (wants_dx, wants_dw and weight is not None, False), x.dtype, 2)


# -- weight norm -------------------------------------------------------------------------------------------------------


@triton.jit
def weight_norm_kernel(p_w, p_norm, p_v, p_g, n_rows, n, sizes, w_rows, v_rows, w_column, v_column, ACC: tl.constexpr,
                       GATHER: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """w = v * g / |v| of each row, and |v|. Grid: blocks of rows."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    p_in = p_v + row_offsets(o_row, i_outer, sizes, v_rows, GATHER)[:, None]
    p_to = p_w + row_offsets(o_row, i_outer, sizes, w_rows, GATHER)[:, None]
    lanes = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        v = tl.load(p_in + (o_column * v_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        lanes += v * v
    norm = tl.sqrt(tl.sum(lanes, axis=1))
    tl.store(p_norm + o_row, norm.to(p_norm.dtype.element_ty), mask=m_row)
    factor = (tl.load(p_g + o_row, mask=m_row, other=0.0).to(ACC) / norm)[:, None]
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        v = tl.load(p_in + (o_column * v_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        tl.store(p_to + (o_column * w_column)[None, :], (v * factor).to(p_w.dtype.element_ty), mask=mask)


@triton.jit
def weight_norm_backward_kernel(p_dv, p_dg, p_dw, p_v, p_g, p_norm, n_rows, n, sizes, dv_rows, dw_rows, v_rows, dv_column, dw_column,
                                v_column, ACC: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
                                BLOCK_N: tl.constexpr):
    """dv and dg of each row. Grid: blocks of rows."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    p_to = p_dv + row_offsets(o_row, i_outer, sizes, dv_rows, GATHER)[:, None]
    p_dwi = p_dw + row_offsets(o_row, i_outer, sizes, dw_rows, GATHER)[:, None]
    p_vi = p_v + row_offsets(o_row, i_outer, sizes, v_rows, GATHER)[:, None]
    lanes = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        dw = tl.load(p_dwi + (o_column * dw_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        lanes += dw * tl.load(p_vi + (o_column * v_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
    total = tl.sum(lanes, axis=1)
    inverse = 1.0 / tl.load(p_norm + o_row, mask=m_row, other=1.0).to(ACC)
    tl.store(p_dg + o_row, (total * inverse).to(p_dg.dtype.element_ty), mask=m_row)
    scale = (tl.load(p_g + o_row, mask=m_row, other=0.0).to(ACC) * inverse)[:, None]
    slope = (total * inverse * inverse)[:, None]
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        dw = tl.load(p_dwi + (o_column * dw_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        v = tl.load(p_vi + (o_column * v_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        tl.store(p_to + (o_column * dv_column)[None, :], (scale * (dw - v * slope)).to(p_dv.dtype.element_ty), mask=mask)


def _weight_rows(call: Call, v: TensorMeta, g: TensorMeta, operands: Sequence[tuple[int, ...]]) -> tuple[Rows, Tile]:
    dim: int = call["dim"]
    if dim not in (0, v.ndim - 1):
        raise Decline("PyTorch rejects it: a dimension that is neither the first nor the last")
    if g.numel != v.shape[dim] or not g.is_contiguous or v.numel == 0:
        raise Decline("g is not one contiguous value a row, or there are no elements")
    rows = split_rows(v.shape, [d for d in range(v.ndim) if d != dim], operands)
    if len(rows.column_sizes) != 1:
        raise Decline("strides that do not merge into rows of one stride")
    itemsize = opmath(v.dtype).itemsize
    return rows, _whole_rows(choose_tile(rows, itemsize, call.target), rows, itemsize, call.target)


def _row_constants(v: TensorMeta, tile: Tile, wide: bool) -> tuple[tuple[str, Any], ...]:
    return (("ACC", TRITON[opmath(v.dtype)]), ("GATHER", tile.gather), ("WIDE", wide), ("BLOCK_R", tile.rows), ("BLOCK_N", tile.columns))


@planned("aten._weight_norm_interface.default", dtype(*FLOAT), family="norm", kernel=weight_norm_kernel)
def weight_norm(call: Call) -> Plan:
    v, g = call["v"], call["g"]
    if v.dtype != g.dtype:
        raise Decline("PyTorch rejects it: v and g of two dtypes")
    out = contiguous_strides(v.shape)
    rows, tile = _weight_rows(call, v, g, [out, v.stride])
    allocs = (Alloc(v.shape, out, v.dtype), Alloc(g.shape, g.stride, opmath(v.dtype)))
    step = Launch(weight_norm_kernel, (-(-rows.n_rows // tile.rows), 1, 1),
                  (Out(0), Out(1), Arg(0), Arg(1), Size(rows.n_rows), rows.n_columns, sizes_argument(rows.row_sizes, not tile.gather),
                   *rows.row_strides, *[s[0] for s in rows.column_strides]),
                  _row_constants(v, tile, is_wide(v)), warps(tile.warps, call.target))
    return Plan(allocs, (step,), (Out(0), Out(1)), {Arg(0): v, Arg(1): g}, bytes=2 * v.numel * v.dtype.itemsize, flops=v.numel * 3)


@planned("aten._weight_norm_interface_backward.default", dtype(*FLOAT), family="norm", kernel=weight_norm_backward_kernel)
def weight_norm_backward(call: Call) -> Plan:
    dw, v, g, norms = call.args[:4]
    if not dw.dtype == v.dtype == g.dtype or norms.dtype != opmath(v.dtype):
        raise Decline("PyTorch rejects it: operands of several dtypes")
    if dw.shape != v.shape or norms.shape != g.shape or not norms.is_contiguous:
        raise Decline("operands of several shapes, or norms that are not contiguous")
    out = contiguous_strides(v.shape)
    rows, tile = _weight_rows(call, v, g, [out, dw.stride, v.stride])
    allocs = (Alloc(v.shape, out, v.dtype), Alloc(g.shape, g.stride, g.dtype))
    step = Launch(weight_norm_backward_kernel, (-(-rows.n_rows // tile.rows), 1, 1),
                  (Out(0), Out(1), Arg(0), Arg(1), Arg(2), Arg(3), Size(rows.n_rows), rows.n_columns,
                   sizes_argument(rows.row_sizes, not tile.gather), *rows.row_strides, *[s[0] for s in rows.column_strides]),
                  _row_constants(v, tile, is_wide(v, dw)), warps(tile.warps, call.target))
    metas = {Arg(0): dw, Arg(1): v, Arg(2): g, Arg(3): norms}
    return Plan(allocs, (step,), (Out(0), Out(1)), metas, bytes=3 * v.numel * v.dtype.itemsize, flops=v.numel * 6)
