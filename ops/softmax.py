"""Softmax and log-softmax over one dimension, forward and backward.

softmax: ``y = exp(x - m) / s`` and log-softmax: ``y = x - m - log(s)``, with ``m = max x`` and ``s = sum exp(x - m)``
along the dimension. Backward: ``dx = y * (g - sum(g * y))`` and ``dx = g - exp(y) * sum(g)``.

A row that fits in a block is read once. A longer one is read twice: `m` and `s` are found together while reading
(each lane keeps its own running pair, rescaled when its maximum grows; the lanes are combined at the end of the row),
then the row is written. Few long rows are split over many programs, which leave their pair in a workspace.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), for the running pair.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.promotion import FLOAT, TRITON, opmath
from gemsmode.ops.rows import (
    Rows,
    choose_tile,
    column_range,
    is_wide,
    locate,
    power_of_2,
    row_offsets,
    sizes_argument,
    split_rows,
    unravel,
    warps,
)
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))

# -- functions of loaded blocks ----------------------------------------------------------------------------------------


@triton.jit
def finite_or_zero(m):
    """`m` where it may be subtracted from values at most `m`: -inf - -inf would be NaN, exp(-inf - 0) is 0."""
    return tl.where(m == NEGATIVE_INFINITY, 0.0, m)


@triton.jit
def value(x, m, s, LOG: tl.constexpr):
    """Softmax or log-softmax of `x` in rows of maximum `m` and sum `s`. A row of only -inf gives NaN, as in PyTorch."""
    if LOG:
        return x - m - tl.log(s)
    else:
        return tl.exp(x - m) / s


@triton.jit
def online(m, s, x):
    """The running pair (m, s) after the values `x`, lane by lane; a masked value is -inf and adds nothing."""
    m_new = tl.maximum(m, x)
    m_safe = finite_or_zero(m_new)
    return m_new, s * tl.exp(m - m_safe) + tl.exp(x - m_safe)


@triton.jit
def gradient(g, y, total, LOG: tl.constexpr):
    """The gradient in rows whose sum of g * y (of g, for log-softmax) is `total`."""
    if LOG:
        return g - tl.exp(y) * total
    else:
        return y * (g - total)


@triton.jit
def addend(g, y, LOG: tl.constexpr):
    """What backward sums along a row."""
    if LOG:
        return g
    else:
        return g * y


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(p_out, p_x, sizes, n_rows, n, out_rows, x_rows, out_column, x_column, LOG: tl.constexpr,
                   SAFE: tl.constexpr, ACC: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows that fit in a block. Grid: blocks of rows. SAFE: a row of only -inf gives zeros instead of NaN."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    o_column = column_range(0, BLOCK_N, WIDE)
    mask = m_row[:, None] & (o_column < n)[None, :]
    o_x = row_offsets(o_row, i_outer, sizes, x_rows, GATHER)[:, None] + (o_column * x_column)[None, :]
    # [BLOCK_R, BLOCK_N]
    raw = tl.load(p_x + o_x, mask=mask, other=NEGATIVE_INFINITY)
    x = raw.to(ACC)
    m = tl.max(x, axis=1)[:, None]
    s = tl.sum(tl.where(mask, tl.exp(x - m), 0.0), axis=1)[:, None]
    result = value(x, m, s, LOG)
    if SAFE:
        some = tl.max((raw != NEGATIVE_INFINITY).to(tl.int32), axis=1)[:, None]
        result = tl.where(some == 0, 0.0, result)
    o_out = row_offsets(o_row, i_outer, sizes, out_rows, GATHER)[:, None] + (o_column * out_column)[None, :]
    tl.store(p_out + o_out, result.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_rows_kernel(p_out, p_x, sizes, n_rows, n, out_rows, x_rows, out_column, x_column, LOG: tl.constexpr,
                        SAFE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows that fill a multiprocessor's registers: a program takes many and loads the next while it computes. Grid: programs."""
    o_column = column_range(0, BLOCK_N, WIDE)
    mask = o_column < n
    i_first = tl.program_id(0)
    if WIDE:
        i_first = i_first.to(tl.int64)
    ahead = tl.load(p_x + unravel(i_first, sizes, x_rows) + o_column * x_column, mask=mask & (i_first < n_rows), other=NEGATIVE_INFINITY)
    for i_row in range(i_first, n_rows, tl.num_programs(0)):
        raw = ahead
        i_next = i_row + tl.num_programs(0)
        ahead = tl.load(p_x + unravel(i_next, sizes, x_rows) + o_column * x_column, mask=mask & (i_next < n_rows),
                        other=NEGATIVE_INFINITY)
        x = raw.to(ACC)
        m = tl.max(x, axis=0)
        s = tl.sum(tl.where(mask, tl.exp(x - m), 0.0), axis=0)
        result = value(x, m, s, LOG)
        if SAFE:
            some = tl.max((raw != NEGATIVE_INFINITY).to(tl.int32), axis=0)
            result = tl.where(some == 0, 0.0, result)
        tl.store(p_out + unravel(i_row, sizes, out_rows) + o_column * out_column, result.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_loop_kernel(p_out, p_x, sizes, n_rows, n, out_rows, x_rows, out_column, x_column, LOG: tl.constexpr,
                        SAFE: tl.constexpr, ACC: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr,
                        BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows longer than a block, read twice. Grid: blocks of rows."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    p_in = p_x + row_offsets(o_row, i_outer, sizes, x_rows, GATHER)[:, None]
    p_to = p_out + row_offsets(o_row, i_outer, sizes, out_rows, GATHER)[:, None]
    lane_m = tl.full([BLOCK_R, BLOCK_N], NEGATIVE_INFINITY, ACC)
    lane_s = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    some = tl.zeros([BLOCK_R, BLOCK_N], tl.int32)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        raw = tl.load(p_in + (o_column * x_column)[None, :], mask=mask, other=NEGATIVE_INFINITY, eviction_policy="evict_last")
        lane_m, lane_s = online(lane_m, lane_s, raw.to(ACC))
        if SAFE:
            some = some | (raw != NEGATIVE_INFINITY).to(tl.int32)
    m = tl.max(lane_m, axis=1)[:, None]
    s = tl.sum(lane_s * tl.exp(lane_m - finite_or_zero(m)), axis=1)[:, None]
    any_value = tl.max(some, axis=1)[:, None]
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        x = tl.load(p_in + (o_column * x_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        result = value(x, m, s, LOG)
        if SAFE:
            result = tl.where(any_value == 0, 0.0, result)
        tl.store(p_to + (o_column * out_column)[None, :], result.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_statistics_kernel(p_pairs, p_x, sizes, n_rows, n, chunk, x_rows, x_column, SAFE: tl.constexpr,
                              ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Maximum, sum (and whether all is -inf) of each chunk of each row. Grid: rows, chunks."""
    i_row = tl.program_id(0)
    i_chunk = tl.program_id(1)
    if WIDE:
        i_row = i_row.to(tl.int64)
        i_chunk = i_chunk.to(tl.int64)
    p_in = p_x + row_offsets(i_row, 0, sizes, x_rows, True)
    end = tl.minimum((i_chunk + 1) * chunk, n)
    lane_m = tl.full([BLOCK_N], NEGATIVE_INFINITY, ACC)
    lane_s = tl.zeros([BLOCK_N], ACC)
    some = tl.zeros([BLOCK_N], tl.int32)
    for start in range(i_chunk * chunk, end, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        raw = tl.load(p_in + o_column * x_column, mask=o_column < end, other=NEGATIVE_INFINITY, eviction_policy="evict_last")
        lane_m, lane_s = online(lane_m, lane_s, raw.to(ACC))
        if SAFE:
            some = some | (raw != NEGATIVE_INFINITY).to(tl.int32)
    m = tl.max(lane_m, axis=0)
    s = tl.sum(lane_s * tl.exp(lane_m - finite_or_zero(m)), axis=0)
    p_pair = p_pairs + (i_row * tl.num_programs(1) + i_chunk) * 3
    tl.store(p_pair, m)
    tl.store(p_pair + 1, s)
    tl.store(p_pair + 2, tl.max(some, axis=0).to(ACC))


@triton.jit
def softmax_finish_kernel(p_out, p_x, p_pairs, sizes, n_rows, n, chunk, out_rows, x_rows, out_column, x_column,
                          LOG: tl.constexpr, SAFE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write each chunk of each row, from the chunks' pairs. Grid: rows, chunks."""
    i_row = tl.program_id(0)
    i_chunk = tl.program_id(1)
    if WIDE:
        i_row = i_row.to(tl.int64)
        i_chunk = i_chunk.to(tl.int64)
    o_pair = tl.arange(0, BLOCK_C)
    m_pair = o_pair < tl.num_programs(1)
    p_pair = p_pairs + (i_row * tl.num_programs(1) + o_pair) * 3
    b_m = tl.load(p_pair, mask=m_pair, other=NEGATIVE_INFINITY)
    m = tl.max(b_m, axis=0)
    s = tl.sum(tl.load(p_pair + 1, mask=m_pair, other=0.0) * tl.exp(b_m - finite_or_zero(m)), axis=0)
    some = tl.max(tl.load(p_pair + 2, mask=m_pair, other=0.0), axis=0)
    p_in = p_x + row_offsets(i_row, 0, sizes, x_rows, True)
    p_to = p_out + row_offsets(i_row, 0, sizes, out_rows, True)
    end = tl.minimum((i_chunk + 1) * chunk, n)
    for start in range(i_chunk * chunk, end, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = o_column < end
        x = tl.load(p_in + o_column * x_column, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        result = value(x, m, s, LOG)
        if SAFE:
            result = tl.where(some == 0, 0.0, result)
        tl.store(p_to + o_column * out_column, result.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(p_out, p_g, p_y, sizes, n_rows, n, out_rows, g_rows, y_rows, out_column, g_column, y_column,
                    LOG: tl.constexpr, ACC: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Backward of rows that fit in a block. Grid: blocks of rows."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    o_column = column_range(0, BLOCK_N, WIDE)
    mask = m_row[:, None] & (o_column < n)[None, :]
    o_g = row_offsets(o_row, i_outer, sizes, g_rows, GATHER)[:, None] + (o_column * g_column)[None, :]
    o_y = row_offsets(o_row, i_outer, sizes, y_rows, GATHER)[:, None] + (o_column * y_column)[None, :]
    # [BLOCK_R, BLOCK_N]
    g = tl.load(p_g + o_g, mask=mask, other=0.0).to(ACC)
    y = tl.load(p_y + o_y, mask=mask, other=0.0).to(ACC)
    total = tl.sum(addend(g, y, LOG), axis=1)[:, None]
    o_out = row_offsets(o_row, i_outer, sizes, out_rows, GATHER)[:, None] + (o_column * out_column)[None, :]
    tl.store(p_out + o_out, gradient(g, y, total, LOG).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def backward_loop_kernel(p_out, p_g, p_y, sizes, n_rows, n, out_rows, g_rows, y_rows, out_column, g_column, y_column,
                         LOG: tl.constexpr, ACC: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Backward of rows longer than a block, read twice (log-softmax reads y only once). Grid: blocks of rows."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    p_gi = p_g + row_offsets(o_row, i_outer, sizes, g_rows, GATHER)[:, None]
    p_yi = p_y + row_offsets(o_row, i_outer, sizes, y_rows, GATHER)[:, None]
    p_to = p_out + row_offsets(o_row, i_outer, sizes, out_rows, GATHER)[:, None]
    lanes = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        g = tl.load(p_gi + (o_column * g_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        if LOG:
            lanes += g
        else:
            lanes += g * tl.load(p_yi + (o_column * y_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
    total = tl.sum(lanes, axis=1)[:, None]
    for start in range(0, n, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = m_row[:, None] & (o_column < n)[None, :]
        g = tl.load(p_gi + (o_column * g_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = tl.load(p_yi + (o_column * y_column)[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        tl.store(p_to + (o_column * out_column)[None, :], gradient(g, y, total, LOG).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def backward_total_kernel(p_totals, p_g, p_y, sizes, n_rows, n, chunk, g_rows, y_rows, g_column, y_column,
                          LOG: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of each chunk of each row. Grid: rows, chunks."""
    i_row = tl.program_id(0)
    i_chunk = tl.program_id(1)
    if WIDE:
        i_row = i_row.to(tl.int64)
        i_chunk = i_chunk.to(tl.int64)
    p_gi = p_g + row_offsets(i_row, 0, sizes, g_rows, True)
    p_yi = p_y + row_offsets(i_row, 0, sizes, y_rows, True)
    end = tl.minimum((i_chunk + 1) * chunk, n)
    lanes = tl.zeros([BLOCK_N], ACC)
    for start in range(i_chunk * chunk, end, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        g = tl.load(p_gi + o_column * g_column, mask=o_column < end, other=0.0, eviction_policy="evict_last").to(ACC)
        if LOG:
            lanes += g
        else:
            lanes += g * tl.load(p_yi + o_column * y_column, mask=o_column < end, other=0.0, eviction_policy="evict_last").to(ACC)
    tl.store(p_totals + i_row * tl.num_programs(1) + i_chunk, tl.sum(lanes, axis=0))


@triton.jit
def backward_finish_kernel(p_out, p_g, p_y, p_totals, sizes, n_rows, n, chunk, out_rows, g_rows, y_rows, out_column,
                           g_column, y_column, LOG: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write each chunk of each row's gradient, from the chunks' sums. Grid: rows, chunks."""
    i_row = tl.program_id(0)
    i_chunk = tl.program_id(1)
    if WIDE:
        i_row = i_row.to(tl.int64)
        i_chunk = i_chunk.to(tl.int64)
    o_total = tl.arange(0, BLOCK_C)
    b_total = tl.load(p_totals + i_row * tl.num_programs(1) + o_total, mask=o_total < tl.num_programs(1), other=0.0)
    total = tl.sum(b_total, axis=0)
    p_gi = p_g + row_offsets(i_row, 0, sizes, g_rows, True)
    p_yi = p_y + row_offsets(i_row, 0, sizes, y_rows, True)
    p_to = p_out + row_offsets(i_row, 0, sizes, out_rows, True)
    end = tl.minimum((i_chunk + 1) * chunk, n)
    for start in range(i_chunk * chunk, end, BLOCK_N):
        o_column = column_range(start, BLOCK_N, WIDE)
        mask = o_column < end
        g = tl.load(p_gi + o_column * g_column, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = tl.load(p_yi + o_column * y_column, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        tl.store(p_to + o_column * out_column, gradient(g, y, total, LOG).to(p_out.dtype.element_ty), mask=mask)


# -- plans -------------------------------------------------------------------------------------------------------------


def _dimension(meta: TensorMeta, dim: int) -> int:
    rank = max(meta.ndim, 1)
    if not -rank <= dim < rank:
        raise Decline("PyTorch rejects it: the dimension is out of range")
    return dim % rank


_FILLS_REGISTERS = 16384
"""Elements of a row of which a multiprocessor holds one at a time, computed in float32, while it has room for the next in 16 bits."""


@functools.cache
def _constants(flags: tuple[tuple[str, Any], ...], acc: torch.dtype, **rest: Any) -> Constants:
    return Constants((*flags, ("ACC", TRITON[acc]), *rest.items()))


def _launches(call: Call, forward: bool, rows: Rows, tensors: tuple[Any, ...], wide: bool, acc: torch.dtype,
              flags: tuple[tuple[str, Any], ...], workspace: int) -> tuple[tuple[Alloc, ...], tuple[Launch, ...]]:
    """Workspace and launches; ``tensors`` are the result and the operands, in the order of ``rows``' strides."""
    tile = choose_tile(rows, acc.itemsize, call.target)
    n, n_rows = rows.n_columns, rows.n_rows
    sizes = sizes_argument(rows.row_sizes, specialize_first=not tile.gather)
    per_row = rows.row_strides
    per_column = tuple([s[0] for s in rows.column_strides])
    if tile.chunks:
        # A multiple of a step, so that chunks start at aligned addresses.
        chunk = 1024 * (-(-n // (1024 * tile.chunks)))
        chunks = -(-n // chunk)
        words = 3 if forward else 1
        space = Alloc((n_rows * chunks * words,), (1,), acc)
        statistics = _constants(tuple([f for f in flags if f[0] != ("LOG" if forward else "SAFE")]), acc, WIDE=wide, BLOCK_N=tile.columns)
        first = Launch(softmax_statistics_kernel if forward else backward_total_kernel, (n_rows, chunks, 1),
                       (Out(workspace), *tensors[1:], sizes, Size(n_rows), n, chunk, *per_row[1:], *per_column[1:]),
                       statistics, warps(tile.warps, call.target))
        second = Launch(softmax_finish_kernel if forward else backward_finish_kernel, (n_rows, chunks, 1),
                        (*tensors, Out(workspace), sizes, Size(n_rows), n, chunk, *per_row, *per_column),
                        _constants(flags, acc, WIDE=wide, BLOCK_N=tile.columns, BLOCK_C=power_of_2(chunks)), warps(tile.warps, call.target))
        return (space,), (first, second)
    if tile.gather:
        programs = -(-n_rows // tile.rows)
    else:
        programs = -(-rows.row_sizes[0] // tile.rows) * (n_rows // rows.row_sizes[0])
    if programs >= 2**31:
        raise Decline("too many rows for one launch")
    at_once = 2 if call.target.interpreted else call.target.multiprocessors * max(32 // tile.warps, 1)
    fills = tile.rows == 1 and not tile.loops and tile.columns >= _FILLS_REGISTERS and call.args[0].dtype.itemsize == 2
    if forward and fills and tile.gather and n_rows >= 2 * at_once:
        constants = _constants(flags, acc, WIDE=wide, BLOCK_N=tile.columns)
        return (), (Launch(softmax_rows_kernel, (at_once, 1, 1), (*tensors, sizes, Size(n_rows), n, *per_row, *per_column), constants,
                           warps(tile.warps, call.target)),)
    kernels = (softmax_kernel, softmax_loop_kernel) if forward else (backward_kernel, backward_loop_kernel)
    constants = _constants(flags, acc, GATHER=tile.gather, WIDE=wide, BLOCK_R=tile.rows, BLOCK_N=tile.columns)
    step = Launch(kernels[tile.loops], (programs, 1, 1), (*tensors, sizes, Size(n_rows), n, *per_row, *per_column), constants,
                  warps(tile.warps, call.target))
    return (), (step,)


def _forward(call: Call, x: TensorMeta, dim: int, out_dtype: torch.dtype, log: bool, safe: bool = False) -> Plan:
    dim = _dimension(x, dim)
    out = Alloc(x.shape, contiguous_strides(x.shape), out_dtype)
    numel = x.numel
    if numel == 0:
        return Plan((out,), (), Out(0), {Arg(0): x}, bytes=0, flops=0)
    acc = torch.promote_types(opmath(x.dtype), opmath(out_dtype)) if safe else opmath(x.dtype)
    rows = split_rows(x.shape, (dim,) if x.ndim else (), [out.stride, x.stride])
    space, launches = _launches(call, True, rows, (Out(0), Arg(0)), is_wide(x), acc, (("LOG", log), ("SAFE", safe)), 1)
    return Plan((out, *space), launches, Out(0), {Arg(0): x},
                bytes=numel * (x.dtype.itemsize + out_dtype.itemsize), flops=numel * 5)


def _half_to_float(call: Call) -> torch.dtype:
    x, _, half_to_float = call.args
    if not half_to_float:
        return x.dtype
    if call.target.device_type == "cpu" or x.dtype != torch.float16:
        raise Decline(f"PyTorch rejects it: half_to_float of {dtype_name(x.dtype)} on {x.device.type}")
    return torch.float32


@planned("aten._softmax.default", dtype(*FLOAT), family="softmax", kernel=softmax_kernel)
def softmax(call: Call) -> Plan:
    return _forward(call, call.args[0], call.args[1], _half_to_float(call), log=False)


@planned("aten._log_softmax.default", dtype(*FLOAT), family="softmax", kernel=softmax_kernel)
def log_softmax(call: Call) -> Plan:
    return _forward(call, call.args[0], call.args[1], _half_to_float(call), log=True)


@planned("aten._safe_softmax.default", dtype(*FLOAT), family="softmax", kernel=softmax_kernel)
def safe_softmax(call: Call) -> Plan:
    out = call["dtype"] or call["self"].dtype
    if out not in FLOAT:
        raise Decline(f"PyTorch rejects it: a softmax in {dtype_name(out)}")
    if out.itemsize < call["self"].dtype.itemsize or {out, call["self"].dtype} == {torch.float16, torch.bfloat16}:
        raise Decline("dtype= narrows the input, which PyTorch rounds before the softmax")
    return _forward(call, call["self"], call["dim"], out, log=False, safe=True)


def _backward(call: Call, log: bool) -> Plan:
    g, y = call["grad_output"], call["output"]
    dim = _dimension(g, call["dim"])
    result: torch.dtype = call["input_dtype"]
    if g.shape != y.shape or g.dtype != y.dtype:
        raise Decline("PyTorch rejects it: grad_output and output differ in shape or dtype")
    if result != g.dtype and (call.target.device_type == "cpu" or (g.dtype, result) != (torch.float32, torch.float16)):
        raise Decline(f"PyTorch rejects it: a gradient of {dtype_name(g.dtype)} for an input of {dtype_name(result)}")
    out = Alloc(g.shape, contiguous_strides(g.shape), result)
    metas = {Arg(0): g, Arg(1): y}
    if g.numel == 0:
        return Plan((out,), (), Out(0), metas, bytes=0, flops=0)
    rows = split_rows(g.shape, (dim,) if g.ndim else (), [out.stride, g.stride, y.stride])
    space, launches = _launches(call, False, rows, (Out(0), Arg(0), Arg(1)), is_wide(g, y), opmath(g.dtype), (("LOG", log),), 1)
    return Plan((out, *space), launches, Out(0), metas,
                bytes=g.numel * (2 * g.dtype.itemsize + result.itemsize), flops=g.numel * 4)


@planned("aten._softmax_backward_data.default", dtype(*FLOAT), family="softmax", kernel=backward_kernel)
def softmax_backward(call: Call) -> Plan:
    return _backward(call, log=False)


@planned("aten._log_softmax_backward_data.default", dtype(*FLOAT), family="softmax", kernel=backward_kernel)
def log_softmax_backward(call: Call) -> Plan:
    return _backward(call, log=True)
