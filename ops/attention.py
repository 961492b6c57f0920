"""Scaled dot-product attention, forward and backward, in whichever op PyTorch breaks it up into.

    out = softmax(scale q kT + bias) v        lse = log sum exp of each row of scores

q [B, H, M, D], k [B, G, N, D] and v [B, G, N, V] with H a multiple of G (grouped queries), bias broadcastable to
[B, H, M, N]; with a causal mask query i sees keys up to i + shift. Scores are never stored: a program holds a block of
queries and goes over the keys with a running maximum and sum, first over the blocks that need no mask, then over the
rest. The backward recomputes the probabilities from lse, which is in the layout of the op at hand, so that a native
forward goes with this backward and the reverse. One query against many keys: the queries of a group are the rows of one
block, the keys are split, and a second kernel joins the splits.

Results do not depend on the order in which programs run: nothing is added up with atomics.

Source: Dao, "FlashAttention-2" (2023); ``torch.nn.functional.scaled_dot_product_attention``; the shapes, dtypes and
strides of results are those of ``torch/_meta_registrations.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import broadcast_strides, preserved_strides
from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import power_of_2
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# -- blocks ------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(p, rows, columns, row_stride, m_rows, m_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A [rows, columns] block of a matrix whose columns are neighbours; zeros outside."""
    pointers = p + rows[:, None] * row_stride + columns[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=m_rows[:, None] & m_columns[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=m_rows[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=m_columns[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _source(p, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """What :func:`_fetch` reads blocks of ROWS rows of a matrix from: a tensor descriptor if TMA, else the pointer."""
    if TMA:
        return tl.make_tensor_descriptor(p, [rows, columns], [row_stride, 1], [ROWS, COLUMNS])
    else:
        return p


@triton.jit
def _fetch(source, start, rows, columns, row_stride, m_rows, m_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
           TMA: tl.constexpr):
    """The rows from `start` on; zeros outside (with TMA whatever the masks say)."""
    if TMA:
        return source.load([start, 0])
    else:
        return _load(source + tl.cast(start, tl.int64) * row_stride, rows, columns, row_stride, m_rows, m_columns, MASK_ROWS, MASK_COLUMNS)


@triton.jit
def _store(p, values, rows, columns, row_stride, m_rows, m_columns, MASK_COLUMNS: tl.constexpr):
    pointers = p + rows[:, None] * row_stride + columns[None, :]
    if MASK_COLUMNS:
        tl.store(pointers, values.to(p.dtype.element_ty), mask=m_rows[:, None] & m_columns[None, :])
    else:
        tl.store(pointers, values.to(p.dtype.element_ty), mask=m_rows[:, None])


@triton.jit
def _bias_source(bias, p_none, strides, i_b, i_h, m_size, n_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr,
                 TMA: tl.constexpr):
    """What :func:`_bias` reads one head's bias from; without a bias p_none, which is not read."""
    if len(bias) == 1:
        p = bias[0] + i_b * strides[0] + i_h * strides[1]
        if TMA and not ROW:
            return tl.make_tensor_descriptor(p, [m_size, n_size], [strides[2], 1], [ROWS, COLUMNS])
        else:
            return p
    else:
        return p_none


@triton.jit
def _bias(source, strides, first_m, first_n, m_size, n_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr,
          TMA: tl.constexpr):
    """A block of the bias in base 2, [ROWS, COLUMNS]; [1, COLUMNS] if ROW, when it is the same for all queries."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    if ROW:
        b = tl.load(source + (first_n + columns) * strides[3], mask=first_n + columns < n_size, other=0.0)[None, :]
    elif TMA:
        b = source.load([first_m, first_n])
    else:
        p = source + tl.cast(first_m, tl.int64) * strides[2] + tl.cast(first_n, tl.int64) * strides[3]
        inside = (first_m + rows < m_size)[:, None] & (first_n + columns < n_size)[None, :]
        b = tl.load(p + rows[:, None] * strides[2] + columns[None, :] * strides[3], mask=inside, other=0.0)
    return b.to(tl.float32) * LOG2E


# -- forward -----------------------------------------------------------------------------------------------------------


@triton.jit
def _weights(s, top, total, bias, biases, bias_strides, o_n, first_n, n_end, o_m, first_m, m_size, shift, scale, CAUSAL: tl.constexpr,
             MASKED: tl.constexpr, SAFE: tl.constexpr, BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """Of the products s [M, N]: the weights, what earlier sums are to be multiplied by, and the new maximum and sum of each row."""
    if len(bias) == 1:
        s = s * scale + _bias(biases, bias_strides, first_m, first_n, m_size, n_end, o_m.shape[0], o_n.shape[0], BIAS_ROW, TMA)
    if MASKED:
        if CAUSAL:
            s = tl.where((o_n - first_n)[None, :] <= (tl.minimum(o_m + shift, n_end - 1) - first_n)[:, None], s, float("-inf"))
        else:
            s = tl.where((o_n < n_end)[None, :], s, float("-inf"))
    if len(bias) == 1:
        new_top = tl.maximum(top, tl.max(s, 1))
    else:
        new_top = tl.maximum(top, tl.max(s, 1) * scale)  # a scale is positive
    safe = new_top
    if SAFE:
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    if len(bias) == 1:
        p = tl.exp2(s - safe[:, None])
    else:
        p = tl.exp2(s * scale - safe[:, None])
    rescale = tl.exp2(top - safe)
    return p, rescale, new_top, total * rescale + tl.sum(p, 1)


@triton.jit
def _over_keys(acc, top, total, q, keys, values, bias, biases, bias_strides, k_row, v_row, first, last, n_end, o_m, first_m, m_size,
               d_size, v_size, shift, scale, CAUSAL: tl.constexpr, MASKED: tl.constexpr, SAFE: tl.constexpr, PRECISION: tl.constexpr,
               MASK_D: tl.constexpr, MASK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
               BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """The keys from `first` to `last` taken into acc [M, V] and the maximum and sum of each row. MASKED: not all of them count."""
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        o_n = start + rows
        m_n = o_n < n_end
        k = _fetch(keys, start, rows, o_d, k_row, m_n, o_d < d_size, MASKED, MASK_D, TMA)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p, rescale, top, total = _weights(s, top, total, bias, biases, bias_strides, o_n, start, n_end, o_m, first_m, m_size, shift, scale,
                                          CAUSAL, MASKED, SAFE, BIAS_ROW, TMA)
        v = _fetch(values, start, rows, o_v, v_row, m_n, o_v < v_size, MASKED, MASK_V, TMA)  # [BLOCK_N, BLOCK_V]
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def forward_kernel(p_q, p_k, p_v, bias, p_out, lse, heads, group, m_size, n_size, d_size, v_size, lse_rows, split_size, shift, scale,
                   q_strides, k_strides, v_strides, bias_strides, out_strides, lse_strides, CAUSAL: tl.constexpr, SAFE: tl.constexpr,
                   EMPTY: tl.constexpr, PRECISION: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """One block of queries of one head against one split of the keys. Grid: (query blocks of all heads, splits).

    Strides are over batch, head, row (bias_strides: batch, head, row, key); the last of out_strides and lse_strides is
    that of splits. `lse` is () or a pointer, with lse_rows rows: those without a query are infinite. EMPTY is the lse of
    a row for which no key counts; SAFE: there may be such rows, or splits without keys for a row.
    """
    blocks = tl.cdiv(tl.maximum(m_size, lse_rows), BLOCK_M)
    i_bh = tl.program_id(0) // blocks
    i_m = tl.program_id(0) % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest rows first
    i_split = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_g = i_h // group
    row = (i_m * BLOCK_M).to(tl.int64)
    p_q += i_b * q_strides[0] + i_h * q_strides[1] + row * q_strides[2]
    p_k += i_b * k_strides[0] + i_g * k_strides[1]
    p_v += i_b * v_strides[0] + i_g * v_strides[1]
    p_out += i_b * out_strides[0] + i_h * out_strides[1] + row * out_strides[2] + i_split * out_strides[3]
    rows = tl.arange(0, BLOCK_M)
    o_m = i_m * BLOCK_M + rows
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_m = o_m < m_size
    q = _load(p_q, rows, o_d, q_strides[2], m_m, o_d < d_size, True, MASK_D)  # [BLOCK_M, BLOCK_D]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    scale2 = scale * LOG2E
    first = i_split * split_size
    n_end = tl.minimum(n_size, first + split_size)
    last = n_end
    whole = n_end
    if CAUSAL:
        last = tl.minimum(n_end, tl.maximum((i_m + 1) * BLOCK_M + shift, 0))
        whole = tl.minimum(n_end, tl.maximum(i_m * BLOCK_M + shift + 1, 0))
    whole = first + tl.maximum(whole - first, 0) // BLOCK_N * BLOCK_N
    keys = _source(p_k, n_size, d_size, k_strides[2], BLOCK_N, BLOCK_D, TMA)
    values = _source(p_v, n_size, v_size, v_strides[2], BLOCK_N, BLOCK_V, TMA)
    biases = _bias_source(bias, p_q, bias_strides, i_b, i_h, m_size, n_size, BLOCK_M, BLOCK_N, BIAS_ROW, TMA)
    acc, top, total = _over_keys(acc, top, total, q, keys, values, bias, biases, bias_strides, k_strides[2], v_strides[2], first, whole,
                                 n_end, o_m, i_m * BLOCK_M, m_size, d_size, v_size, shift, scale2, CAUSAL, False, SAFE, PRECISION,
                                 MASK_D, MASK_V, BLOCK_N, BLOCK_D, BLOCK_V, BIAS_ROW, TMA)
    acc, top, total = _over_keys(acc, top, total, q, keys, values, bias, biases, bias_strides, k_strides[2], v_strides[2], whole, last,
                                 n_end, o_m, i_m * BLOCK_M, m_size, d_size, v_size, shift, scale2, CAUSAL, True, SAFE, PRECISION,
                                 MASK_D, MASK_V, BLOCK_N, BLOCK_D, BLOCK_V, BIAS_ROW, TMA)
    if SAFE:
        empty = total == 0
        total = tl.where(empty, 1.0, total)
        top = tl.where(empty, 0.0, top)
    if len(lse) == 1:
        sums = top * LN2 + tl.log(total)  # not the sum in base 2, which is larger, and would be rounded twice
        if SAFE:
            sums = tl.where(empty, EMPTY, sums)
        p_lse = lse[0] + i_b * lse_strides[0] + i_h * lse_strides[1] + i_split * lse_strides[3]
        tl.store(p_lse + o_m * lse_strides[2], tl.where(m_m, sums, float("inf")), mask=o_m < tl.maximum(m_size, lse_rows))
    _store(p_out, acc / total[:, None], rows, o_v, out_strides[2], m_m, o_v < v_size, MASK_V)


@triton.jit
def join_kernel(p_parts, p_lses, p_out, lse, heads, m_size, v_size, lse_rows, splits, out_strides, lse_strides, EMPTY: tl.constexpr,
                BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr):
    """Joins the splits of one row: parts [B, H, M, splits, V] and lses [B, H, M, splits]. Grid: (rows of all heads)."""
    rows = tl.maximum(m_size, lse_rows)
    i_m = tl.program_id(0) % rows
    i_bh = tl.program_id(0) // rows
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    row = (i_bh.to(tl.int64) * m_size + i_m) * splits
    o_s = tl.arange(0, BLOCK_S)
    o_v = tl.arange(0, BLOCK_V)
    m_s = (o_s < splits) & (i_m < m_size)
    lses = tl.load(p_lses + row + o_s, mask=m_s, other=float("-inf"))
    top = tl.max(lses, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(lses - safe)
    total = tl.sum(weights, 0)
    parts = tl.load(p_parts + (row + o_s[:, None]) * v_size + o_v[None, :], mask=m_s[:, None] & (o_v < v_size)[None, :], other=0.0)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    out = tl.sum(parts * weights[:, None], 0) / total
    p_out += i_b * out_strides[0] + i_h * out_strides[1] + i_m * out_strides[2]
    tl.store(p_out + o_v, out.to(p_out.dtype.element_ty), mask=(o_v < v_size) & (i_m < m_size))
    if len(lse) == 1:
        sums = tl.where(empty, EMPTY, safe + tl.log(total))
        sums = tl.where(i_m < m_size, sums, float("inf"))
        tl.store(lse[0] + i_b * lse_strides[0] + i_h * lse_strides[1] + i_m * lse_strides[2], sums)


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit
def delta_kernel(p_grad, p_out, p_delta, heads, m_size, v_size, grad_strides, out_strides, MASK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_V: tl.constexpr):
    """delta[b, h, m] = sum over the head dimension of grad * out. Grid: (query blocks of all heads)."""
    blocks = tl.cdiv(m_size, BLOCK_M)
    i_bh = tl.program_id(0) // blocks
    i_m = tl.program_id(0) % blocks
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    row = (i_m * BLOCK_M).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    o_v = tl.arange(0, BLOCK_V)
    m_m = i_m * BLOCK_M + rows < m_size
    p_grad += i_b * grad_strides[0] + i_h * grad_strides[1] + row * grad_strides[2]
    p_out += i_b * out_strides[0] + i_h * out_strides[1] + row * out_strides[2]
    grad = _load(p_grad, rows, o_v, grad_strides[2], m_m, o_v < v_size, True, MASK_V)
    out = _load(p_out, rows, o_v, out_strides[2], m_m, o_v < v_size, True, MASK_V)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(p_delta + i_bh.to(tl.int64) * m_size + row + rows, delta, mask=m_m)


@triton.jit
def _over_queries(dk, dv, k, v, queries, grads, p_lse, p_delta, bias, biases, bias_strides, q_row, grad_row, lse_row, first, last, o_n,
                  first_n, m_size, n_size, d_size, v_size, shift, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                  MASK_D: tl.constexpr, MASK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                  BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """The queries from `first` to `last` taken into dk [N, D] and dv [N, V].

    Scores are held transposed, [N, M], so that they are left operands as they are. Rows after the last query are zeros,
    and so is what they add. A causal mask is applied to every block: a loop of its own for those without would cost more
    in registers than the comparison costs.
    """
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_M)
    for start in range(first, last, BLOCK_M):
        o_m = start + rows
        m_m = o_m < m_size
        at = tl.cast(start, tl.int64)
        q = _fetch(queries, start, rows, o_d, q_row, m_m, o_d < d_size, True, MASK_D, TMA)  # [BLOCK_M, BLOCK_D]
        sums = tl.load(p_lse + at * lse_row + rows * lse_row, mask=m_m, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if len(bias) == 1:
            b = _bias(biases, bias_strides, start, first_n, m_size, n_size, BLOCK_M, k.shape[0], BIAS_ROW, TMA)
            s = s * scale + tl.trans(b)
            p = tl.where(s == float("-inf"), 0.0, tl.exp2(s - (sums * LOG2E)[None, :]))
        else:
            p = tl.exp2(s * scale - (sums * LOG2E)[None, :])
        if CAUSAL:
            p = tl.where(o_n[:, None] <= o_m[None, :] + shift, p, 0.0)
        grad = _fetch(grads, start, rows, o_v, grad_row, m_m, o_v < v_size, True, MASK_V, TMA)  # [BLOCK_M, BLOCK_V]
        delta = tl.load(p_delta + start + rows, mask=m_m, other=0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def grad_key_value_kernel(p_q, p_k, p_v, bias, p_grad, p_lse, p_delta, p_dk, p_dv, heads, group, m_size, n_size, d_size, v_size, shift,
                          scale, q_strides, k_strides, v_strides, bias_strides, grad_strides, lse_strides, dk_strides, dv_strides,
                          CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                          BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """The gradients of one block of keys and values, from all queries of the heads that use them. Grid: (key blocks of all key heads)."""
    blocks = tl.cdiv(n_size, BLOCK_N)
    i_bg = tl.program_id(0) // blocks
    i_n = tl.program_id(0) % blocks  # with a causal mask the first keys have the most queries
    key_heads = heads // group
    i_b = (i_bg // key_heads).to(tl.int64)
    i_g = (i_bg % key_heads).to(tl.int64)
    row = (i_n * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    o_n = i_n * BLOCK_N + rows
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_n = o_n < n_size
    p_k += i_b * k_strides[0] + i_g * k_strides[1] + row * k_strides[2]
    p_v += i_b * v_strides[0] + i_g * v_strides[1] + row * v_strides[2]
    k = _load(p_k, rows, o_d, k_strides[2], m_n, o_d < d_size, True, MASK_D)  # [BLOCK_N, BLOCK_D]
    v = _load(p_v, rows, o_v, v_strides[2], m_n, o_v < v_size, True, MASK_V)  # [BLOCK_N, BLOCK_V]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(i_n * BLOCK_N - shift, 0) // BLOCK_M * BLOCK_M
    for member in range(0, group):
        i_h = i_g * group + member
        p_q_head = p_q + i_b * q_strides[0] + i_h * q_strides[1]
        p_grad_head = p_grad + i_b * grad_strides[0] + i_h * grad_strides[1]
        p_lse_head = p_lse + i_b * lse_strides[0] + i_h * lse_strides[1]
        p_delta_head = p_delta + (i_b * heads + i_h) * m_size
        queries = _source(p_q_head, m_size, d_size, q_strides[2], BLOCK_M, BLOCK_D, TMA)
        grads = _source(p_grad_head, m_size, v_size, grad_strides[2], BLOCK_M, BLOCK_V, TMA)
        biases = _bias_source(bias, p_q, bias_strides, i_b, i_h, m_size, n_size, BLOCK_M, BLOCK_N, BIAS_ROW, TMA)
        dk, dv = _over_queries(dk, dv, k, v, queries, grads, p_lse_head, p_delta_head, bias, biases, bias_strides, q_strides[2],
                               grad_strides[2], lse_strides[2], first, m_size, o_n, i_n * BLOCK_N, m_size, n_size, d_size, v_size,
                               shift, scale * LOG2E, CAUSAL, PRECISION, MASK_D, MASK_V, BLOCK_M, BLOCK_D, BLOCK_V, BIAS_ROW, TMA)
    p_dk += i_b * dk_strides[0] + i_g * dk_strides[1] + row * dk_strides[2]
    p_dv += i_b * dv_strides[0] + i_g * dv_strides[1] + row * dv_strides[2]
    _store(p_dk, dk * scale, rows, o_d, dk_strides[2], m_n, o_d < d_size, MASK_D)
    _store(p_dv, dv, rows, o_v, dv_strides[2], m_n, o_v < v_size, MASK_V)


@triton.jit
def _grad_over_keys(dq, q, grad, sums, delta, keys, values, bias, biases, bias_strides, dbias, p_dbias, dbias_strides, k_row, v_row, first,
                    last, n_size, o_m, first_m, m_size, d_size, v_size, shift, scale, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
                    PRECISION: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_V: tl.constexpr, BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """The keys from `first` to `last` taken into dq [M, D]; sums [M] is the lse in base 2."""
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        o_n = start + rows
        m_n = o_n < n_size
        k = _fetch(keys, start, rows, o_d, k_row, m_n, o_d < d_size, MASKED, MASK_D, TMA)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if len(bias) == 1:
            s = s * scale + _bias(biases, bias_strides, first_m, start, m_size, n_size, q.shape[0], BLOCK_N, BIAS_ROW, TMA)
            p = tl.where(s == float("-inf"), 0.0, tl.exp2(s - sums[:, None]))
        else:
            p = tl.exp2(s * scale - sums[:, None])
        if MASKED:
            counts = m_n[None, :]
            if CAUSAL:
                counts = counts & (o_n[None, :] <= o_m[:, None] + shift)
            p = tl.where(counts, p, 0.0)
        v = _fetch(values, start, rows, o_v, v_row, m_n, o_v < v_size, MASKED, MASK_V, TMA)  # [BLOCK_N, BLOCK_V]
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if len(dbias) == 1:
            o_dbias = tl.arange(0, o_m.shape[0])[:, None] * dbias_strides[2] + rows[None, :]
            tl.store(p_dbias + start + o_dbias, ds.to(p_dbias.dtype.element_ty), mask=(o_m < m_size)[:, None] & m_n[None, :])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def grad_query_kernel(p_q, p_k, p_v, bias, p_grad, p_lse, p_delta, p_dq, dbias, heads, group, m_size, n_size, d_size, v_size, shift, scale,
                      q_strides, k_strides, v_strides, bias_strides, grad_strides, lse_strides, dq_strides, dbias_strides,
                      CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BIAS_ROW: tl.constexpr, TMA: tl.constexpr):
    """The gradient of one block of queries, and of the bias if `dbias` is a pointer. Grid: (query blocks of all heads)."""
    blocks = tl.cdiv(m_size, BLOCK_M)
    i_bh = tl.program_id(0) // blocks
    i_m = tl.program_id(0) % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_g = i_h // group
    row = (i_m * BLOCK_M).to(tl.int64)
    p_k += i_b * k_strides[0] + i_g * k_strides[1]
    p_v += i_b * v_strides[0] + i_g * v_strides[1]
    p_q += i_b * q_strides[0] + i_h * q_strides[1] + row * q_strides[2]
    p_grad += i_b * grad_strides[0] + i_h * grad_strides[1] + row * grad_strides[2]
    p_lse += i_b * lse_strides[0] + i_h * lse_strides[1] + row * lse_strides[2]
    p_dbias = p_dq
    if len(dbias) == 1:
        p_dbias = dbias[0] + i_b * dbias_strides[0] + i_h * dbias_strides[1] + row * dbias_strides[2]
    rows = tl.arange(0, BLOCK_M)
    o_m = i_m * BLOCK_M + rows
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_m = o_m < m_size
    q = _load(p_q, rows, o_d, q_strides[2], m_m, o_d < d_size, True, MASK_D)  # [BLOCK_M, BLOCK_D]
    grad = _load(p_grad, rows, o_v, grad_strides[2], m_m, o_v < v_size, True, MASK_V)  # [BLOCK_M, BLOCK_V]
    sums = tl.load(p_lse + rows * lse_strides[2], mask=m_m, other=0.0) * LOG2E
    delta = tl.load(p_delta + i_bh.to(tl.int64) * m_size + row + rows, mask=m_m, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale2 = scale * LOG2E
    last = n_size
    whole = n_size
    if CAUSAL:
        last = tl.minimum(n_size, tl.maximum((i_m + 1) * BLOCK_M + shift, 0))
        whole = tl.minimum(n_size, tl.maximum(i_m * BLOCK_M + shift + 1, 0))
    whole = whole // BLOCK_N * BLOCK_N
    if len(dbias) == 1:
        last = n_size  # the bias of keys that do not count has a gradient of 0, which is to be written
    keys = _source(p_k, n_size, d_size, k_strides[2], BLOCK_N, BLOCK_D, TMA)
    values = _source(p_v, n_size, v_size, v_strides[2], BLOCK_N, BLOCK_V, TMA)
    biases = _bias_source(bias, p_q, bias_strides, i_b, i_h, m_size, n_size, BLOCK_M, BLOCK_N, BIAS_ROW, TMA)
    dq = _grad_over_keys(dq, q, grad, sums, delta, keys, values, bias, biases, bias_strides, dbias, p_dbias, dbias_strides,
                         k_strides[2], v_strides[2], 0, whole, n_size, o_m, i_m * BLOCK_M, m_size, d_size, v_size, shift, scale2,
                         CAUSAL, False, PRECISION, MASK_D, MASK_V, BLOCK_N, BLOCK_D, BLOCK_V, BIAS_ROW, TMA)
    dq = _grad_over_keys(dq, q, grad, sums, delta, keys, values, bias, biases, bias_strides, dbias, p_dbias, dbias_strides,
                         k_strides[2], v_strides[2], whole, last, n_size, o_m, i_m * BLOCK_M, m_size, d_size, v_size, shift, scale2,
                         CAUSAL, True, PRECISION, MASK_D, MASK_V, BLOCK_N, BLOCK_D, BLOCK_V, BIAS_ROW, TMA)
    p_dq += i_b * dq_strides[0] + i_h * dq_strides[1] + row * dq_strides[2]
    _store(p_dq, dq * scale, rows, o_d, dq_strides[2], m_m, o_d < d_size, MASK_D)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a program's step, its warps and pipeline depth."""

    m: int
    n: int
    warps: int
    stages: int


Ladder = Sequence[tuple[int, Blocks]]

# By (largest padded head dimension, blocks), for 16-bit inputs: none spills on sm_90, and of these the fastest on an H200
# where it was measured. A program of 128 queries has two warp groups of 64 rows.
FORWARD: Ladder = ((64, Blocks(128, 64, 8, 3)), (128, Blocks(128, 64, 8, 3)), (256, Blocks(128, 32, 8, 2)))
FORWARD_TMA: Ladder = ((64, Blocks(128, 64, 8, 3)), (128, Blocks(128, 64, 8, 3)), (256, Blocks(128, 64, 8, 2)))
"""Read through tensor descriptors, which leave registers for more keys at a time."""
FORWARD_BIASED: Ladder = ((64, Blocks(64, 64, 4, 2)), (128, Blocks(128, 64, 8, 2)), (256, Blocks(128, 32, 8, 2)))
"""With a bias read through a descriptor: four programs share a multiprocessor, so that some compute while others wait for it."""
FORWARD_FEW: Ladder = ((128, Blocks(64, 64, 4, 3)), (256, Blocks(64, 32, 8, 2)))
"""For at most 64 queries."""
DECODE: Ladder = ((128, Blocks(16, 64, 4, 3)), (256, Blocks(16, 32, 4, 3)))
"""For at most 16 queries: keys and values are read once, and bandwidth decides."""
DECODE_ONE: Ladder = ((64, Blocks(16, 64, 4, 3)), (128, Blocks(16, 128, 4, 2)), (256, Blocks(16, 32, 4, 3)))
"""For one query, of a head that shares its keys with no other."""
GRAD_KEY_VALUE: Ladder = ((64, Blocks(64, 128, 8, 2)), (128, Blocks(32, 128, 8, 2)), (256, Blocks(32, 32, 8, 1)))
GRAD_QUERY: Ladder = ((64, Blocks(128, 64, 8, 2)), (128, Blocks(128, 64, 8, 2)), (256, Blocks(32, 32, 8, 1)))

# The same for float32: operands are split in registers, and sums take a register each.
FORWARD_FLOAT: Ladder = ((32, Blocks(64, 32, 4, 2)), (64, Blocks(64, 32, 8, 2)), (128, Blocks(32, 32, 8, 1)), (256, Blocks(16, 16, 8, 1)))
BACKWARD_FLOAT: Ladder = ((32, Blocks(32, 32, 4, 1)), (64, Blocks(32, 32, 8, 1)), (256, Blocks(16, 16, 8, 1)))


def _rung(ladder: Ladder, d: int) -> Blocks:
    return next(blocks for limit, blocks in ladder if d <= limit)


def choose_blocks(kind: str, d: int, m: int, itemsize: int, tma: bool, biased: bool, target: Target) -> Blocks:
    """The blocks of ``kind`` (``forward``, ``key_value`` or ``query``) for ``m`` queries and padded head dimension ``d``.

    ``tma`` and ``biased``: whether blocks are read through descriptors, and whether there is a bias.
    """
    if target.interpreted:
        queries = max(min(power_of_2(m), 128), 16)
        return Blocks(queries, 128, 4, 1)
    if itemsize == 4:
        blocks = _rung(FORWARD_FLOAT if kind == "forward" else BACKWARD_FLOAT, d)
        return Blocks(16, blocks.n, blocks.warps, blocks.stages) if kind == "forward" and m <= 16 else blocks
    if kind != "forward":
        ladder = GRAD_KEY_VALUE if kind == "key_value" else GRAD_QUERY
    elif m <= 16:
        ladder = DECODE_ONE if m == 1 and target.has_wgmma else DECODE
    elif m <= 64:
        ladder = FORWARD_FEW
    elif not tma:
        ladder = FORWARD
    else:
        ladder = FORWARD_BIASED if biased else FORWARD_TMA
    blocks = _rung(ladder, d)
    if target.backend == "hip" and kind != "forward" and d > 64:
        blocks = Blocks(32, 32, 4, 1) if d <= 128 else Blocks(16, 16, 4, 1)
    elif not target.has_wgmma and m > 16:
        # Operands of the tensor cores are held in registers there, so that blocks for two warp groups do not fit.
        keys = min(blocks.n, 64 if kind == "key_value" else 32)
        blocks = Blocks(min(blocks.m, 64), keys, blocks.warps if d > 64 else 4, 1 if d > 128 else 2)
    if biased and not tma and m > 16:  # pointers to a block of the bias take two registers each
        blocks = Blocks(min(blocks.m, 32 if kind == "key_value" else 64), min(blocks.n, 32), 8 if d > 64 else 4, min(blocks.stages, 2))
    elif biased and d > 64 and kind == "query":
        blocks = Blocks(blocks.m, max(blocks.n // 2, 16), blocks.warps, blocks.stages)
    held, step = (blocks.n, blocks.m) if kind == "key_value" else (blocks.m, blocks.n)
    held_rows = held if kind == "forward" else 2 * held  # the queries; or keys and values, or queries and gradients
    stages = blocks.stages
    while stages > 1 and d * itemsize * (held_rows + stages * 2 * step) > target.shared_memory:
        stages -= 1
    return Blocks(blocks.m, blocks.n, blocks.warps, stages)


MAX_SPLITS = 64
TINY = 2.0**-120
"""A scale of zero as the forward has it: products that do not count are infinite before they are scaled."""


def choose_splits(programs: int, n: int, target: Target) -> int:
    """Splits of the keys: enough to fill the device when the queries alone do not, each of at least 256 keys."""
    if target.interpreted:
        return 2 if programs <= 2 and n >= 512 else 1
    return max(1, min(target.multiprocessors * 2 // max(programs, 1), n // 256, MAX_SPLITS))


# -- plans -------------------------------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """A tensor argument, with its metadata over batch, heads, rows and head dimension."""

    ref: Arg
    meta: TensorMeta

    @property
    def steps(self) -> tuple[Any, ...]:
        return tuple(stride(s) for s in self.meta.stride[:3])


class Attention(NamedTuple):
    """A call as the kernels see it, whichever op it came in.

    Attributes:
        q, k, v: queries, keys and values.
        bias: what is added to the scores, broadcast to [B, H, M, N] by strides of 0.
        causal: whether query i sees keys up to i + shift only.
        shift: see there.
        scale: what the products are multiplied by.
        metas: of the arguments referred to, as they are.
    """

    q: Operand
    k: Operand
    v: Operand
    bias: Operand | None
    causal: bool
    shift: int
    scale: float
    metas: dict[Arg, TensorMeta]

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """(batch, heads, queries, keys, head dimension of queries and keys, that of values)."""
        batch, heads, m, d = self.q.meta.shape
        return batch, heads, m, self.k.meta.shape[2], d, self.v.meta.shape[3]

    @property
    def bias_is_row(self) -> bool:
        """Whether the bias is the same for all queries."""
        return self.bias is not None and (self.bias.meta.stride[2] == 0 or self.sizes[2] == 1)

    @property
    def bias_arguments(self) -> tuple[tuple[Arg, ...], tuple[Any, ...]]:
        if self.bias is None:
            return (), ()
        *outer, last = self.bias.meta.stride
        return (self.bias.ref,), (*[stride(s) for s in outer], 1 if last == 1 else stride(last))


_OPTIONS: dict[str, Any] = {"family": "attention", "by_value": ("dropout_p", "scale")}


def _index(call: Call, name: str) -> int:
    return next(i for i, p in enumerate(parameters(call.op)) if p.name == name)


def _has(call: Call, name: str) -> bool:
    return any(p.name == name for p in parameters(call.op))


def _swapped(meta: TensorMeta) -> TensorMeta:
    """With rows and heads exchanged: [B, M, H, D] as [B, H, M, D] and the reverse."""
    (b, x, y, d), (sb, sx, sy, sd) = meta.shape, meta.stride
    return meta._replace(shape=(b, y, x, d), stride=(sb, sy, sx, sd))


def _operand(call: Call, name: str, rows_first: bool) -> Operand:
    meta = call[name]
    if meta.ndim != 4:
        raise Decline(f"{meta.ndim} dimensions, not 4")
    return Operand(Arg(_index(call, name)), _swapped(meta) if rows_first else meta)


def _attention(call: Call, causal: bool, bias_name: str = "", rows_first: bool = False, aligned_right: bool = False) -> Attention:
    """``call`` as an :class:`Attention`.

    Args:
        call: the call, whose tensors are ``query``, ``key`` and ``value``.
        causal: whether the mask is causal.
        bias_name: the argument that is added to the scores.
        rows_first: tensors are [B, M, H, D] rather than [B, H, M, D].
        aligned_right: the last query sees all keys under a causal mask; otherwise the first one sees one key.
    """
    metas = [call[name] for name in ("query", "key", "value")]
    for meta in metas:
        if meta.dtype not in (torch.float16, torch.bfloat16, torch.float32) or meta.dtype != metas[0].dtype:
            raise Decline(f"{dtype_name(meta.dtype)} is not in {{float16, bfloat16, float32}}, or the dtypes differ")
    q, k, v = (_operand(call, name, rows_first) for name in ("query", "key", "value"))
    for operand in (q, k, v):
        if operand.meta.stride[3] != 1 and operand.meta.shape[3] > 1:
            raise Decline("a head dimension that is not dense")
    (batch, heads, m, d), (key_batch, groups, n, key_d), (*value_shape, value_d) = (x.meta.shape for x in (q, k, v))
    if max(d, value_d) > 256:
        raise Decline(f"head dimensions {d} and {value_d}; they must be at most 256")
    if d != key_d or heads % max(groups, 1) or value_shape != [key_batch, groups, n] or key_batch != batch:
        raise Decline("batch sizes, heads or head dimensions that do not fit")
    if 0 in (batch, heads, m, n, d, value_d):
        raise Decline("an empty input")
    if max(d, value_d) > 128 and metas[0].dtype == torch.float32 and call.get("compute_log_sumexp"):
        raise Decline(f"float32 head dimensions {d} and {value_d} with gradients to come; they must be at most 128: beyond it "
                      "the backward is PyTorch's, whose rounding errors are larger with another kernel's results")
    if call["dropout_p"] != 0.0:
        raise Decline("dropout inside the attention: its mask would not be the one that PyTorch's kernels draw")
    scale = call["scale"]
    if scale is None:
        scale = 1.0 / math.sqrt(d)
    elif not scale >= 0:
        raise Decline(f"a scale of {scale}")
    known = {x.ref: call.args[x.ref.index] for x in (q, k, v)}
    bias = None
    meta = call[bias_name] if bias_name else None
    if meta is not None:
        if not meta.dtype.is_floating_point:
            raise Decline(f"a mask of {dtype_name(meta.dtype)}")
        shape = (batch, heads, m, n)
        if meta.ndim > 4 or any(own not in (1, size) for own, size in zip(meta.shape[::-1], shape[::-1])):
            raise Decline("PyTorch rejects it: the mask does not broadcast to the scores")
        ref = Arg(_index(call, bias_name))
        known[ref] = meta
        bias = Operand(ref, meta._replace(shape=shape, stride=broadcast_strides(meta, shape)))
    if causal and aligned_right and m == 1:
        causal = False
    return Attention(q, k, v, bias, causal, n - m if aligned_right else 0, float(scale), known)


def _grouped(a: Attention, rows_of: Sequence[tuple[int, ...]]) -> tuple[Attention, list[tuple[int, ...]]]:
    """For one query a head: the heads of a group as the rows of one head, so that keys and values are read once.

    ``rows_of`` are strides over [B, H, M] of results; they are returned for the new arrangement.
    """
    batch, heads, m, n, d, _ = a.sizes
    groups = a.k.meta.shape[1]
    group = heads // groups
    if m != 1 or a.causal or group == 1:
        return a, list(rows_of)

    def rearranged(strides: tuple[int, ...]) -> tuple[int, ...]:
        return strides[0], group * strides[1], strides[1], *strides[3:]

    q = a.q._replace(meta=a.q.meta._replace(shape=(batch, groups, group, d), stride=rearranged(a.q.meta.stride)))
    bias = a.bias
    if bias is not None:
        bias = bias._replace(meta=bias.meta._replace(shape=(batch, groups, group, n), stride=rearranged(bias.meta.stride)))
    return a._replace(q=q, bias=bias), [rearranged(s) for s in rows_of]


IN_INTERPRETER = False
"""Whether the interpreter reads through tensor descriptors: for tests."""
POINTERS = 64
"""The largest padded head dimension of which a forward without a bias reads through pointers: 1.1 times as fast on an H200."""


def _described(a: Attention, target: Target, *read: Operand) -> bool:
    """Whether the blocks of ``read`` that loops go over are read through tensor descriptors (TMA)."""
    if target.interpreted:
        if not IN_INTERPRETER:
            return False
    elif not (target.has_tma and target.has_wgmma and a.q.meta.dtype.itemsize == 2 and a.sizes[2] > 16):
        return False
    if a.bias is not None and not a.bias_is_row:
        read = (*read, a.bias)
        if a.bias.meta.stride[3] != 1:
            return False
    return all(s * x.meta.dtype.itemsize % 16 == 0 for x in read for s in x.meta.stride[:3]) and min(a.sizes[4:]) % 8 == 0


def _precision(a: Attention, target: Target) -> str:
    """float32 products take three of TF32 where there are such, as PyTorch's own attention does, whatever is allowed for products."""
    return "tf32x3" if a.q.meta.dtype == torch.float32 and target.has_tf32x3 else "ieee"


def _head_constants(d: int, value_d: int) -> tuple[tuple[str, Any], ...]:
    block_d, block_v = max(power_of_2(d), 16), max(power_of_2(value_d), 16)
    return ("MASK_D", block_d != d), ("MASK_V", block_v != value_d), ("BLOCK_D", block_d), ("BLOCK_V", block_v)


def forward_plan(call: Call, a: Attention, out: Alloc, out_strides: Sequence[int], lse: Alloc | None, lse_strides: Sequence[int],
                 empty: float, lse_rows: int = 0) -> Plan:
    """A plan that computes ``out`` (allocation 0) and, unless None, ``lse`` (allocation 1).

    ``out_strides`` and ``lse_strides`` are over [B, H, M]. ``lse_rows``: rows of lse in memory, padding included.
    """
    _, _, m, n, d, value_d = a.sizes
    check_measured("attention", call.target, m=m, n=n, d=d, itemsize=a.q.meta.dtype.itemsize, biased=a.bias is not None,
                   backward=False)
    moved = sum(meta.numel for meta in a.metas.values()) + a.q.meta.numel // d * value_d
    pairs = a.q.meta.numel // d * n // (2 if a.causal else 1)
    flops = 2 * pairs * (d + value_d)
    lse_rows = lse_rows if lse is not None else 0
    if lse_rows <= m:
        a, (out_strides, lse_strides) = _grouped(a, (tuple(out_strides), tuple(lse_strides)))
    batch, heads, m, n, d, value_d = a.sizes
    rows = max(m, lse_rows)
    head = _head_constants(d, value_d)
    block_d = max(dict(head)["BLOCK_D"], dict(head)["BLOCK_V"])
    tma = _described(a, call.target, a.k, a.v) and (a.bias is not None or block_d > POINTERS or call.target.interpreted)
    blocks = choose_blocks("forward", block_d, m, a.q.meta.dtype.itemsize, tma, a.bias is not None, call.target)
    programs = -(-rows // blocks.m) * batch * heads
    splits = choose_splits(programs, n, call.target) if m <= 16 else 1
    split_size = -(-n // splits)
    split_size += -split_size % blocks.n
    splits = -(-n // split_size)
    if programs >= 2**31:
        raise Decline(f"{programs} blocks of queries: more than a grid can have")
    bias, bias_strides = a.bias_arguments
    allocs: tuple[Alloc, ...] = (out,) if lse is None else (out, lse)
    given: tuple[Any, ...] = () if lse is None else (Out(1),)
    written, sums, written_rows = Out(0), given, lse_rows
    out_steps: tuple[Any, ...] = (*[stride(s) for s in out_strides], 0)
    lse_steps: tuple[Any, ...] = (*[stride(s) for s in lse_strides], 0)
    final = (tuple(out_steps[:3]), tuple(lse_steps[:3]))
    if splits > 1:
        shape = (batch, heads, m, splits)
        allocs += (Alloc((*shape, value_d), contiguous_strides((*shape, value_d)), torch.float32),
                   Alloc(shape, contiguous_strides(shape), torch.float32))
        written, sums, written_rows = Out(len(allocs) - 2), (Out(len(allocs) - 1),), 0
        out_steps = (*[stride(s * value_d) for s in (heads * m * splits, m * splits, splits)], stride(value_d))
        lse_steps = (*[Size(s) for s in (heads * m * splits, m * splits, splits)], 1)
    safe = a.bias is not None or (a.causal and (a.shift < 0 or splits > 1))
    constants = Constants((("TMA", tma), ("BIAS_ROW", a.bias_is_row), ("CAUSAL", a.causal), ("SAFE", safe),
                           ("EMPTY", empty if splits == 1 else float("-inf")), ("PRECISION", _precision(a, call.target)), *head,
                           ("BLOCK_M", blocks.m), ("BLOCK_N", blocks.n)))
    launches = [Launch(forward_kernel, (programs, splits, 1),
                       (a.q.ref, a.k.ref, a.v.ref, bias, written, sums, Size(heads), Size(heads // a.k.meta.shape[1]), Size(m), Size(n),
                        extent(d), extent(value_d), Size(written_rows), Size(split_size), Size(a.shift), a.scale or TINY, a.q.steps,
                        a.k.steps, a.v.steps, bias_strides, out_steps, lse_steps), constants, blocks.warps, blocks.stages)]
    if splits > 1:
        launches.append(Launch(join_kernel, (rows * batch * heads, 1, 1),
                               (Out(len(allocs) - 2), Out(len(allocs) - 1), Out(0), given, Size(heads), Size(m), extent(value_d),
                                Size(lse_rows), Size(splits), *final),
                               Constants((("EMPTY", empty), ("BLOCK_S", power_of_2(splits)), ("BLOCK_V", dict(head)["BLOCK_V"])))))
    return Plan(allocs, tuple(launches), (Out(0), Out(1) if lse is not None else None), a.metas,
                bytes=moved * a.q.meta.dtype.itemsize, flops=flops, aligned=tma)


def backward_plan(call: Call, a: Attention, grad_name: str, allocs: Sequence[Alloc], steps: Sequence[Sequence[int]],
                  rows_first: bool = False, grad_bias: Alloc | None = None) -> Plan:
    """A plan of the gradients of query, key and value, allocations 0 to 2, and of the bias, allocation 3, if one is given.

    ``steps`` are the strides of the three gradients over [B, H, M].
    """
    batch, heads, m, n, d, value_d = a.sizes
    check_measured("attention", call.target, m=m, n=n, d=d, itemsize=a.q.meta.dtype.itemsize, biased=a.bias is not None,
                   backward=True)
    out, grad = _operand(call, "out", rows_first), _operand(call, grad_name, rows_first)
    for operand in (out, grad):
        if operand.meta.stride[3] != 1 and value_d > 1:
            raise Decline("a gradient or output whose head dimension is not dense")
        if operand.meta.shape != (batch, heads, m, value_d) or operand.meta.dtype != a.q.meta.dtype:
            raise Decline("PyTorch rejects it: a gradient or output of another shape or dtype")
    lse: TensorMeta = call["logsumexp"]
    if lse.dtype != torch.float32 or lse.shape[:2] != (batch, heads) or lse.ndim < 3 or lse.shape[2] < m:
        raise Decline(f"a log-sum-exp that is {lse}")
    if max(d, value_d) > 128 and a.q.meta.dtype.itemsize == 4 and not call.target.interpreted:
        raise Decline(f"float32 gradients of head dimensions {d} and {value_d}: more than the registers hold")
    group = heads // a.k.meta.shape[1]
    refs = {name: Arg(_index(call, name)) for name in ("out", "logsumexp", grad_name)}
    metas = a.metas | {ref: call.args[ref.index] for ref in refs.values()}
    bias, bias_strides = a.bias_arguments
    head = _head_constants(d, value_d)
    block_d = max(dict(head)["BLOCK_D"], dict(head)["BLOCK_V"])
    itemsize = a.q.meta.dtype.itemsize
    tma = _described(a, call.target, a.q, a.k, a.v, grad)
    for_keys = choose_blocks("key_value", block_d, m, itemsize, tma, a.bias is not None, call.target)
    for_queries = choose_blocks("query", block_d, m, itemsize, tma, a.bias is not None, call.target)
    common = (("TMA", tma), ("BIAS_ROW", a.bias_is_row), ("CAUSAL", a.causal), ("PRECISION", _precision(a, call.target)), *head)
    delta = Out(len(allocs) + (grad_bias is not None))
    sizes = (Size(heads), Size(group), Size(m), Size(n), extent(d), extent(value_d), Size(a.shift), a.scale)
    lse_steps = tuple(stride(s) for s in lse.stride[:3])
    tensors = (a.q.ref, a.k.ref, a.v.ref, bias, refs[grad_name], refs["logsumexp"], delta)
    strides = (a.q.steps, a.k.steps, a.v.steps, bias_strides, grad.steps, lse_steps)
    written = [tuple(stride(s) for s in given) for given in steps]
    delta_rows = 128 if call.target.interpreted else max(4096 // block_d, 16)
    dbias: tuple[Any, ...] = () if grad_bias is None else (Out(3),)
    dbias_strides = () if grad_bias is None else tuple(stride(s) for s in grad_bias.stride[:3])
    launches = (
        Launch(delta_kernel, (-(-m // delta_rows) * batch * heads, 1, 1),
               (refs[grad_name], refs["out"], delta, Size(heads), Size(m), extent(value_d), grad.steps, out.steps),
               Constants((("MASK_V", dict(head)["MASK_V"]), ("BLOCK_M", delta_rows), ("BLOCK_V", dict(head)["BLOCK_V"])))),
        Launch(grad_key_value_kernel, (-(-n // for_keys.n) * batch * (heads // group), 1, 1),
               (*tensors, Out(1), Out(2), *sizes, *strides, written[1], written[2]),
               Constants((*common, ("BLOCK_M", for_keys.m), ("BLOCK_N", for_keys.n))), for_keys.warps, for_keys.stages),
        Launch(grad_query_kernel, (-(-m // for_queries.m) * batch * heads, 1, 1),
               (*tensors, Out(0), dbias, *sizes, *strides, written[0], dbias_strides),
               Constants((*common, ("BLOCK_M", for_queries.m), ("BLOCK_N", for_queries.n))), for_queries.warps, for_queries.stages),
    )
    if max(step.grid[0] for step in launches) >= 2**31:
        raise Decline("more blocks than a grid can have")
    rows = Alloc((batch, heads, m), contiguous_strides((batch, heads, m)), torch.float32)
    moved = sum(meta.numel for meta in metas.values()) + a.q.meta.numel + a.k.meta.numel + a.v.meta.numel
    flops = batch * heads * m * n * (6 * d + 4 * value_d) // (2 if a.causal else 1)
    made = (*allocs, rows) if grad_bias is None else (*allocs, grad_bias, rows)
    return Plan(made, launches, (Out(0), Out(1), Out(2)), metas, bytes=moved * itemsize, flops=flops, aligned=tma)


# -- layouts of results ------------------------------------------------------------------------------------------------


def _like(meta: TensorMeta) -> Alloc:
    return Alloc(meta.shape, preserved_strides(meta), meta.dtype)


def _swapped_strides(strides: Sequence[int]) -> tuple[int, ...]:
    return strides[0], strides[2], strides[1], *strides[3:]


def _like_swapped(meta: TensorMeta) -> Alloc:
    """``empty_like`` of the tensor with rows and heads exchanged, exchanged back."""
    return Alloc(meta.shape, _swapped_strides(preserved_strides(_swapped(meta))), meta.dtype)


def _heads_last(shape: Sequence[int], dtype: torch.dtype) -> Alloc:
    """[B, H, M, D] laid out as [B, M, H, D]."""
    batch, heads, rows, d = shape
    return Alloc((batch, heads, rows, d), (rows * heads * d, d, heads * d, 1), dtype)


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Alloc:
    return Alloc(shape, contiguous_strides(shape), dtype)


def _matching(q: TensorMeta, shape: tuple[int, ...]) -> Alloc:
    """``shape`` laid out in the order of the query's dimensions."""
    if q.shape == shape:
        return _like(q)
    order = sorted(range(len(shape)), key=lambda i: q.stride[i], reverse=True)
    strides, step = [0] * len(shape), 1
    for i in reversed(order):
        strides[i] = step
        step *= shape[i]
    return Alloc(shape, tuple(strides), q.dtype)


def _sums(a: Attention, *padding: int) -> Alloc:
    """The log-sum-exp of each row, [B, H, M, *padding]."""
    return _contiguous((*a.q.meta.shape[:3], *padding), torch.float32)


def _with_philox(plan: Plan, *shapes_and_dtypes: tuple[tuple[int, ...], torch.dtype], host: bool = False) -> tuple[Plan, list[Out]]:
    """``plan`` with tensors beside it that say how dropout was drawn: without dropout nothing reads or writes them."""
    extra = tuple(_contiguous(shape, dtype)._replace(host=host) for shape, dtype in shapes_and_dtypes)
    count = len(plan.allocs)
    return plan._replace(allocs=plan.allocs + extra), [Out(count + i) for i in range(len(extra))]


_INT = ((), torch.int64)
_FLASH_STATE = (((2,), torch.uint64), ((), torch.uint64))


# -- the CPU's ops, which the interpreter serves -------------------------------------------------------------------------


@planned("aten._scaled_dot_product_flash_attention_for_cpu.default", kernel=forward_kernel, **_OPTIONS)
def attention_for_cpu(call: Call) -> Plan:
    """lse is laid out as [B, M, H]; a row without keys has an lse of 0."""
    a = _attention(call, call["is_causal"], "attn_mask")
    batch, heads, m, *_ = a.sizes
    lse = Alloc((batch, heads, m), (m * heads, 1, heads), torch.float32)
    if a.v.meta.shape[3] != a.q.meta.shape[3]:
        raise Decline("PyTorch rejects it: values of another head dimension")
    out = _like(a.q.meta)
    return forward_plan(call, a, out, out.stride[:3], lse, lse.stride, 0.0)


@planned("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", kernel=grad_key_value_kernel, **_OPTIONS)
def attention_for_cpu_backward(call: Call) -> Plan:
    a = _attention(call, call["is_causal"], "attn_mask")
    allocs = [_heads_last(x.meta.shape, x.meta.dtype) for x in (a.q, a.k, a.v)]
    return backward_plan(call, a, "grad_out", allocs, [x.stride[:3] for x in allocs])


# -- cuDNN's ops -------------------------------------------------------------------------------------------------------


def _no_sequences(call: Call, *names: str) -> None:
    for name in names:
        if _has(call, name) and call[name] is not None:
            raise Decline(f"{name}: sequences packed one after the other")


def _like_cudnn(call: Call, lse_padding: tuple[int, ...], wants_lse: bool) -> Plan:
    a = _attention(call, call["is_causal"], "attn_bias")
    _, _, m, n, _, value_d = a.sizes
    out = _matching(a.q.meta, (*a.q.meta.shape[:3], value_d))
    lse = _sums(a, *lse_padding) if wants_lse else None
    plan = forward_plan(call, a, out, out.stride[:3], lse, (0, 0, 0) if lse is None else lse.stride[:3], float("-inf"))
    plan, (seed, offset) = _with_philox(plan, _INT, _INT)
    return plan._replace(returns=(Out(0), Out(1) if wants_lse else None, None, None, Size(m), Size(n), seed, offset, None))


@planned(["aten._scaled_dot_product_cudnn_attention.default", "aten._cudnn_attention_forward.default"], kernel=forward_kernel,
         name="cudnn_attention", **_OPTIONS)
def cudnn_attention(call: Call) -> Plan:
    """lse is [B, H, M, 1], and None unless asked for; the output has the query's order of dimensions."""
    _no_sequences(call, "cum_seq_q", "cum_seq_k")
    return _like_cudnn(call, (1,), call["compute_log_sumexp"])


@planned(["aten._scaled_dot_product_cudnn_attention_backward.default", "aten._cudnn_attention_backward.default"],
         kernel=grad_key_value_kernel, name="cudnn_attention_backward", **_OPTIONS)
def cudnn_attention_backward(call: Call) -> Plan:
    """The gradients are laid out as query, key and value are."""
    _no_sequences(call, "cum_seq_q", "cum_seq_k")
    a = _attention(call, call["is_causal"], "attn_bias")
    allocs = [_like(x.meta) for x in (a.q, a.k, a.v)]
    return backward_plan(call, a, "grad_out", allocs, [x.stride[:3] for x in allocs])


@planned("aten._scaled_dot_product_fused_attention_overrideable.default", kernel=forward_kernel, **_OPTIONS)
def overrideable_attention(call: Call) -> Plan:
    """The op of devices without one of their own: as cuDNN's, with an lse of [B, H, M] that is always there."""
    return _like_cudnn(call, (), True)


@planned("aten._scaled_dot_product_fused_attention_overrideable_backward.default", kernel=grad_key_value_kernel, **_OPTIONS)
def overrideable_attention_backward(call: Call) -> Plan:
    """All gradients are computed, whatever the mask of wanted ones says; the bias's has the bias's shape."""
    _no_sequences(call, "cum_seq_q", "cum_seq_k")
    a = _attention(call, call["is_causal"], "attn_bias")
    allocs = [_like(x.meta) for x in (a.q, a.k, a.v)]
    grad_bias = None
    if a.bias is not None:
        given = call["attn_bias"]
        if given.shape != a.bias.meta.shape:
            raise Decline("the gradient of a bias that is broadcast")
        grad_bias = _like(given)
        if grad_bias.stride[3] != 1:
            raise Decline("a bias whose keys are not neighbours")
    plan = backward_plan(call, a, "grad_out", allocs, [x.stride[:3] for x in allocs], grad_bias=grad_bias)
    return plan._replace(returns=(*plan.returns, Out(3) if grad_bias else None))


# -- the memory-efficient ops ------------------------------------------------------------------------------------------


def _efficient_forward(call: Call, a: Attention, out: Alloc, out_strides: Sequence[int], wants_lse: bool) -> tuple[Plan, list[Any]]:
    batch, heads, m, *_ = a.sizes
    rows = m if call.target.backend == "hip" else m + -m % 32
    lse = _contiguous((batch, heads, rows), torch.float32) if wants_lse else None
    plan = forward_plan(call, a, out, out_strides, lse, (0, 0, 0) if lse is None else lse.stride, float("inf"), rows)
    plan, philox = _with_philox(plan, _INT, _INT, host=True)
    if wants_lse:
        return plan, [Out(0), Out(1), *philox]
    plan, (none,) = _with_philox(plan, ((batch, heads, 0), torch.float32))
    return plan, [Out(0), none, *philox]


@planned("aten._scaled_dot_product_efficient_attention.default", kernel=forward_kernel, **_OPTIONS)
def efficient_attention(call: Call) -> Plan:
    """lse is padded to a multiple of 32 queries (with infinities), the output is laid out as [B, M, H, D]."""
    a = _attention(call, call["is_causal"], "attn_bias")
    out = _heads_last((*a.q.meta.shape[:3], a.v.meta.shape[3]), a.q.meta.dtype)
    plan, results = _efficient_forward(call, a, out, out.stride[:3], call["compute_log_sumexp"])
    return plan._replace(returns=tuple(results))


_MASKS = ("none", "top left", "bottom right")


def _mask_type(call: Call) -> tuple[bool, bool]:
    """Whether the mask is causal, and if so whether it is aligned to the last key."""
    kind = call["custom_mask_type"]
    if kind not in (0, 1, 2):
        raise Decline(f"PyTorch rejects it: a mask type of {kind}, where 0 to 2 mean {', '.join(_MASKS)}")
    return kind != 0, kind == 2


def _no_extras(call: Call, *names: str) -> None:
    for name in names:
        if _has(call, name) and call[name] not in (None, False):
            raise Decline(f"{name} is not served")


@planned("aten._efficient_attention_forward.default", kernel=forward_kernel, **_OPTIONS)
def efficient_attention_forward(call: Call) -> Plan:
    """Tensors are [B, M, H, D]; otherwise as ``_scaled_dot_product_efficient_attention``."""
    _no_sequences(call, "cu_seqlens_q", "cu_seqlens_k", "seqlen_k")
    _no_extras(call, "window_size", "causal_diagonal")
    causal, right = _mask_type(call)
    a = _attention(call, causal, "bias", rows_first=True, aligned_right=right)
    batch, heads, m, n, _, value_d = a.sizes
    out = _contiguous((batch, m, heads, value_d), a.q.meta.dtype)
    plan, results = _efficient_forward(call, a, out, _swapped_strides(out.stride)[:3], call["compute_log_sumexp"])
    longest = call["max_seqlen_k"]
    return plan._replace(returns=(*results, Size(m), Size(n if longest is None else longest)))


def _padded_bias(a: Attention) -> Alloc:
    """The gradient of the bias: rows of a multiple of 16 elements, of which the first N are seen."""
    assert a.bias is not None
    n = a.sizes[3]
    shape = a.bias.meta.shape
    return Alloc(shape, contiguous_strides((*shape[:3], n + -n % 16)), a.bias.meta.dtype)


def _efficient_backward(call: Call, a: Attention, allocs: list[Alloc], steps: list[tuple[int, ...]], rows_first: bool, wants_bias: bool,
                        bias_name: str) -> Plan:
    grad_bias = None
    if wants_bias and a.bias is not None:
        if call[bias_name].shape != a.bias.meta.shape:
            raise Decline("the gradient of a bias that is broadcast")
        grad_bias = _padded_bias(a)
    plan = backward_plan(call, a, "grad_out_", allocs, steps, rows_first, grad_bias)
    return plan._replace(returns=(*plan.returns, Out(3) if grad_bias else None))


@planned("aten._scaled_dot_product_efficient_attention_backward.default", kernel=grad_key_value_kernel, **_OPTIONS)
def efficient_attention_backward(call: Call) -> Plan:
    """The gradients are laid out as [B, M, H, D]."""
    a = _attention(call, call["is_causal"], "attn_bias")
    allocs = [_heads_last(x.meta.shape, x.meta.dtype) for x in (a.q, a.k, a.v)]
    return _efficient_backward(call, a, allocs, [x.stride[:3] for x in allocs], False, call["grad_input_mask"][3], "attn_bias")


@planned("aten._efficient_attention_backward.default", kernel=grad_key_value_kernel, name="efficient_attention_backward_rows_first",
         **_OPTIONS)
def efficient_attention_backward_rows_first(call: Call) -> Plan:
    """Tensors are [B, M, H, D]; the gradients are contiguous."""
    _no_sequences(call, "cu_seqlens_q", "cu_seqlens_k")
    _no_extras(call, "window_size", "shared_storage_dqdkdv")
    causal, right = _mask_type(call)
    a = _attention(call, causal, "bias", rows_first=True, aligned_right=right)
    allocs = [_contiguous(call[name].shape, call[name].dtype) for name in ("query", "key", "value")]
    steps = [_swapped_strides(x.stride)[:3] for x in allocs]
    return _efficient_backward(call, a, allocs, steps, True, call["bias_requires_grad"], "bias")


# -- the flash ops -----------------------------------------------------------------------------------------------------


def _flash(call: Call, rows_first: bool) -> Attention:
    _no_sequences(call, "cum_seq_q", "cum_seq_k", "seqused_k", "alibi_slopes", "block_table")
    _no_extras(call, "return_debug_mask")
    for name in ("window_size_left", "window_size_right"):
        if _has(call, name) and call[name] not in (None, -1):
            raise Decline(f"{name}: a sliding window")
    a = _attention(call, call["is_causal"], "", rows_first, aligned_right=True)
    d, value_d = a.q.meta.shape[3], a.v.meta.shape[3]
    if a.q.meta.dtype == torch.float32:
        raise Decline("PyTorch rejects it: float32 where 16-bit floats are wanted")
    if d % 8 or d != value_d:
        raise Decline(f"head dimensions {d} and {value_d}; they must be equal and multiples of 8")
    return a


def _flash_results(plan: Plan, *between: Any) -> Plan:
    plan, (state, unused) = _with_philox(plan, *_FLASH_STATE)
    plan, (mask,) = _with_philox(plan, ((0,), plan.allocs[0].dtype))
    return plan._replace(returns=(Out(0), Out(1), *between, state, unused, mask))


@planned("aten._scaled_dot_product_flash_attention.default", kernel=forward_kernel, **_OPTIONS)
def flash_attention(call: Call) -> Plan:
    """lse is [B, H, M]; a causal mask is aligned to the last query and key."""
    a = _flash(call, False)
    out, lse = _like_swapped(a.q.meta), _sums(a)
    plan = forward_plan(call, a, out, out.stride[:3], lse, lse.stride, float("inf"))
    return _flash_results(plan, None, None, Size(a.sizes[2]), Size(a.sizes[3]))


@planned("aten._flash_attention_forward.default", kernel=forward_kernel, **_OPTIONS)
def flash_attention_forward(call: Call) -> Plan:
    """Tensors are [B, M, H, D]; otherwise as ``_scaled_dot_product_flash_attention``."""
    a = _flash(call, True)
    out, lse = _like(call["query"]), _sums(a)
    plan = forward_plan(call, a, out, _swapped_strides(out.stride)[:3], lse, lse.stride, float("inf"))
    return _flash_results(plan)


@planned("aten._scaled_dot_product_flash_attention_backward.default", kernel=grad_key_value_kernel, **_OPTIONS)
def flash_attention_backward(call: Call) -> Plan:
    """The gradients are laid out as query, key and value are."""
    a = _flash(call, False)
    allocs = [_like_swapped(x.meta) for x in (a.q, a.k, a.v)]
    return backward_plan(call, a, "grad_out", allocs, [x.stride[:3] for x in allocs])


@planned("aten._flash_attention_backward.default", kernel=grad_key_value_kernel, name="flash_attention_backward_rows_first", **_OPTIONS)
def flash_attention_backward_rows_first(call: Call) -> Plan:
    """Tensors are [B, M, H, D], the gradients too."""
    a = _flash(call, True)
    allocs = [_like(call[name]) for name in ("query", "key", "value")]
    return backward_plan(call, a, "grad_out", allocs, [_swapped_strides(x.stride)[:3] for x in allocs], True)
