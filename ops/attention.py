"""Scaled dot-product attention, forward and backward, in whichever op PyTorch breaks it up into.

    out = softmax(scale q kT + bias) v        lse = log sum exp of each row of scores

q [B, H, M, D], k and v [B, G, N, D] with H a multiple of G (grouped queries), bias broadcastable to [B, H, M, N]. Scores
are never stored: a program holds a block of queries and goes over the keys with a running maximum and sum. The
backward recomputes the probabilities from lse, which is in PyTorch's layout, so that a native forward goes with this
backward and the reverse. One query row against many keys is split over the keys and joined by a second kernel.

Source: Dao, "FlashAttention-2" (2023); ``torch.nn.functional.scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import broadcast_strides, preserved_strides
from gemsmode.ops.pointwise import power_of_2
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import Predicate, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# -- forward -----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(p, rows, columns, row_stride, column_stride, m_rows, m_columns):
    """A [rows, columns] block of a matrix; zeros outside."""
    return tl.load(p + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=m_rows[:, None] & m_columns[None, :], other=0.0)


@triton.jit
def _scores(q, k, bias, p_bias, bias_strides, o_m, o_n, m_m, m_n, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2, -inf where a key does not count. q [M, D], k [N, D] -> [M, N]."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if len(bias) == 1:
        b = tl.load(p_bias + o_m[:, None] * bias_strides[2] + o_n[None, :] * bias_strides[3], mask=m_m[:, None] & m_n[None, :], other=0.0)
        s += b.to(tl.float32) * LOG2E
    counts = m_m[:, None] & m_n[None, :]
    if CAUSAL:
        counts = counts & (o_n[None, :] <= o_m[:, None])
    return tl.where(counts, s, float("-inf"))


@triton.jit
def forward_kernel(p_q, p_k, p_v, bias, p_out, p_lse, heads, group, m_size, n_size, d_size, split_size, scale, q_strides, k_strides,
                   v_strides, bias_strides, out_strides, lse_strides, CAUSAL: tl.constexpr, EMPTY: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One block of queries of one head against one split of the keys. Grid: (query blocks, batch x heads, splits).

    The last of out_strides and lse_strides is that of splits. EMPTY is the lse of a row for which no key counts.
    """
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_split = tl.program_id(2)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_g = i_h // group
    p_q += i_b * q_strides[0] + i_h * q_strides[1]
    p_k += i_b * k_strides[0] + i_g * k_strides[1]
    p_v += i_b * v_strides[0] + i_g * v_strides[1]
    p_out += i_b * out_strides[0] + i_h * out_strides[1] + i_split * out_strides[4]
    p_lse += i_b * lse_strides[0] + i_h * lse_strides[1] + i_split * lse_strides[3]
    if len(bias) == 1:
        p_bias = bias[0] + i_b * bias_strides[0] + i_h * bias_strides[1]
    else:
        p_bias = p_q
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < m_size
    m_d = o_d < d_size
    q = _tile(p_q, o_m, o_d, q_strides[2], q_strides[3], m_m, m_d)  # [BLOCK_M, BLOCK_D]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = i_split * split_size
    last = tl.minimum(n_size, first + split_size)
    if CAUSAL:
        last = tl.minimum(last, (i_m + 1) * BLOCK_M)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        k = _tile(p_k, o_n, o_d, k_strides[2], k_strides[3], m_n, m_d)  # [BLOCK_N, BLOCK_D]
        s = _scores(q, k, bias, p_bias, bias_strides, o_m, o_n, m_m, m_n, scale, CAUSAL, PRECISION)
        new_top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe[:, None])
        rescale = tl.exp2(top - safe)
        total = total * rescale + tl.sum(p, 1)
        v = _tile(p_v, o_n, o_d, v_strides[2], v_strides[3], m_n, m_d)  # [BLOCK_N, BLOCK_D]
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, EMPTY, (tl.where(top == float("-inf"), 0.0, top) + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(p_out + o_m[:, None] * out_strides[2] + o_d[None, :] * out_strides[3], acc.to(p_out.dtype.element_ty),
             mask=m_m[:, None] & m_d[None, :])
    tl.store(p_lse + o_m * lse_strides[2], lse, mask=m_m)


@triton.jit
def join_kernel(p_parts, p_lses, p_out, p_lse, heads, m_size, d_size, splits, out_strides, lse_strides, EMPTY: tl.constexpr,
                BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Joins the splits of one row: parts [B, H, M, splits, D] and lses [B, H, M, splits]. Grid: (M, batch x heads)."""
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    row = (i_bh.to(tl.int64) * m_size + i_m) * splits
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    lses = tl.load(p_lses + row + o_s, mask=o_s < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(lses - safe)
    total = tl.sum(weights, 0)
    m = (o_s < splits)[:, None] & (o_d < d_size)[None, :]
    parts = tl.load(p_parts + (row + o_s[:, None]) * d_size + o_d[None, :], mask=m, other=0.0)  # [BLOCK_S, BLOCK_D]
    empty = total == 0
    out = tl.sum(parts * weights[:, None], 0) / tl.where(empty, 1.0, total)
    p_out += i_b * out_strides[0] + i_h * out_strides[1] + i_m * out_strides[2]
    tl.store(p_out + o_d * out_strides[3], out.to(p_out.dtype.element_ty), mask=o_d < d_size)
    lse = tl.where(empty, EMPTY, safe + tl.log(tl.where(empty, 1.0, total)))
    tl.store(p_lse + i_b * lse_strides[0] + i_h * lse_strides[1] + i_m * lse_strides[2], lse)


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit
def delta_kernel(p_grad, p_out, p_delta, heads, m_size, d_size, grad_strides, out_strides, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """delta[b, h, m] = sum over d of grad * out. Grid: (query blocks, batch x heads)."""
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < m_size
    m_d = o_d < d_size
    grad = _tile(p_grad + i_b * grad_strides[0] + i_h * grad_strides[1], o_m, o_d, grad_strides[2], grad_strides[3], m_m, m_d)
    out = _tile(p_out + i_b * out_strides[0] + i_h * out_strides[1], o_m, o_d, out_strides[2], out_strides[3], m_m, m_d)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(p_delta + i_bh.to(tl.int64) * m_size + o_m, delta, mask=m_m)


@triton.jit
def _probabilities(q, k, bias, p_bias, bias_strides, o_m, o_n, m_m, m_n, lse, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    s = _scores(q, k, bias, p_bias, bias_strides, o_m, o_n, m_m, m_n, scale, CAUSAL, PRECISION)
    return tl.where(s == float("-inf"), 0.0, tl.exp2(s - (lse * LOG2E)[:, None]))


@triton.jit
def grad_key_value_kernel(p_q, p_k, p_v, bias, p_grad, p_lse, p_delta, p_dk, p_dv, heads, group, m_size, n_size, d_size, scale, q_strides,
                          k_strides, v_strides, bias_strides, grad_strides, lse_strides, dk_strides, dv_strides, CAUSAL: tl.constexpr,
                          PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradients of one block of keys and values, from all queries of the heads that use them. Grid: (key blocks, batch x key heads)."""
    i_n = tl.program_id(0)
    i_bg = tl.program_id(1)
    key_heads = heads // group
    i_b = (i_bg // key_heads).to(tl.int64)
    i_g = (i_bg % key_heads).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < n_size
    m_d = o_d < d_size
    k = _tile(p_k + i_b * k_strides[0] + i_g * k_strides[1], o_n, o_d, k_strides[2], k_strides[3], m_n, m_d)
    v = _tile(p_v + i_b * v_strides[0] + i_g * v_strides[1], o_n, o_d, v_strides[2], v_strides[3], m_n, m_d)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = 0
    if CAUSAL:
        first = (i_n * BLOCK_N) // BLOCK_M * BLOCK_M
    for member in range(0, group):
        i_h = i_g * group + member
        p_q_head = p_q + i_b * q_strides[0] + i_h * q_strides[1]
        p_grad_head = p_grad + i_b * grad_strides[0] + i_h * grad_strides[1]
        p_lse_head = p_lse + i_b * lse_strides[0] + i_h * lse_strides[1]
        p_delta_head = p_delta + (i_b * heads + i_h) * m_size
        if len(bias) == 1:
            p_bias = bias[0] + i_b * bias_strides[0] + i_h * bias_strides[1]
        else:
            p_bias = p_q_head
        for start in range(first, m_size, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < m_size
            q = _tile(p_q_head, o_m, o_d, q_strides[2], q_strides[3], m_m, m_d)
            grad = _tile(p_grad_head, o_m, o_d, grad_strides[2], grad_strides[3], m_m, m_d)
            lse = tl.load(p_lse_head + o_m * lse_strides[2], mask=m_m, other=0.0)
            delta = tl.load(p_delta_head + o_m, mask=m_m, other=0.0)
            p = _probabilities(q, k, bias, p_bias, bias_strides, o_m, o_n, m_m, m_n, lse, scale, CAUSAL, PRECISION)
            dv += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None]) * scale
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    m = m_n[:, None] & m_d[None, :]
    p_dk += i_b * dk_strides[0] + i_g * dk_strides[1]
    p_dv += i_b * dv_strides[0] + i_g * dv_strides[1]
    tl.store(p_dk + o_n[:, None] * dk_strides[2] + o_d[None, :] * dk_strides[3], dk.to(p_dk.dtype.element_ty), mask=m)
    tl.store(p_dv + o_n[:, None] * dv_strides[2] + o_d[None, :] * dv_strides[3], dv.to(p_dv.dtype.element_ty), mask=m)


@triton.jit
def grad_query_kernel(p_q, p_k, p_v, bias, p_grad, p_lse, p_delta, p_dq, heads, group, m_size, n_size, d_size, scale, q_strides, k_strides,
                      v_strides, bias_strides, grad_strides, lse_strides, dq_strides, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of one block of queries. Grid: (query blocks, batch x heads)."""
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_g = i_h // group
    p_k += i_b * k_strides[0] + i_g * k_strides[1]
    p_v += i_b * v_strides[0] + i_g * v_strides[1]
    if len(bias) == 1:
        p_bias = bias[0] + i_b * bias_strides[0] + i_h * bias_strides[1]
    else:
        p_bias = p_q
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < m_size
    m_d = o_d < d_size
    q = _tile(p_q + i_b * q_strides[0] + i_h * q_strides[1], o_m, o_d, q_strides[2], q_strides[3], m_m, m_d)
    grad = _tile(p_grad + i_b * grad_strides[0] + i_h * grad_strides[1], o_m, o_d, grad_strides[2], grad_strides[3], m_m, m_d)
    lse = tl.load(p_lse + i_b * lse_strides[0] + i_h * lse_strides[1] + o_m * lse_strides[2], mask=m_m, other=0.0)
    delta = tl.load(p_delta + i_bh.to(tl.int64) * m_size + o_m, mask=m_m, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = n_size
    if CAUSAL:
        last = tl.minimum(n_size, (i_m + 1) * BLOCK_M)
    for start in range(0, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < n_size
        k = _tile(p_k, o_n, o_d, k_strides[2], k_strides[3], m_n, m_d)
        v = _tile(p_v, o_n, o_d, v_strides[2], v_strides[3], m_n, m_d)
        p = _probabilities(q, k, bias, p_bias, bias_strides, o_m, o_n, m_m, m_n, lse, scale, CAUSAL, PRECISION)
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]) * scale
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    p_dq += i_b * dq_strides[0] + i_h * dq_strides[1]
    m = m_m[:, None] & m_d[None, :]
    tl.store(p_dq + o_m[:, None] * dq_strides[2] + o_d[None, :] * dq_strides[3], dq.to(p_dq.dtype.element_ty), mask=m)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a program's step, its warps and pipeline depth."""

    m: int
    n: int
    warps: int
    stages: int


# (largest padded head dimension, blocks) for 16-bit inputs; float32 takes half the queries and keys.
_FORWARD = ((64, Blocks(128, 64, 4, 3)), (128, Blocks(128, 64, 8, 3)), (256, Blocks(64, 32, 8, 2)))
_BACKWARD = ((64, Blocks(64, 64, 4, 2)), (128, Blocks(64, 64, 8, 2)), (256, Blocks(32, 32, 8, 1)))


def choose_blocks(ladder: Sequence[tuple[int, Blocks]], d: int, m: int, itemsize: int, target: Target) -> Blocks:
    """The blocks for head dimension ``d`` (a power of two); few queries take a block of 16."""
    if target.interpreted:
        return Blocks(max(min(power_of_2(m), 128), 16), 128, 4, 1)
    blocks = next(b for limit, b in ladder if d <= limit)
    if itemsize == 4:
        blocks = Blocks(max(blocks.m // 2, 16), max(blocks.n // 2, 16), blocks.warps, min(blocks.stages, 2))
    if m <= 16:
        blocks = Blocks(16, blocks.n, 4, blocks.stages)
    return blocks


MAX_SPLITS = 64


def choose_splits(programs: int, n: int, target: Target) -> int:
    """Splits of the keys: enough to fill the device when the queries alone do not, each of at least 256 keys."""
    if target.interpreted:
        return 2 if programs <= 2 and n >= 512 else 1
    return max(1, min(target.multiprocessors * 2 // max(programs, 1), n // 256, MAX_SPLITS))


# -- plans -------------------------------------------------------------------------------------------------------------


def _tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


def _admits(call: Call) -> tuple[bool, str]:
    q, k, v = (call[n] for n in ("query", "key", "value"))
    for meta in (q, k, v):
        if meta.dtype not in (torch.float16, torch.bfloat16, torch.float32) or meta.dtype != q.dtype:
            return False, f"{dtype_name(meta.dtype)} is not in {{float16, bfloat16, float32}}, or the dtypes differ"
        if meta.ndim != 4:
            return False, f"{meta.ndim} dimensions, not 4"
        if meta.stride[3] != 1 and meta.shape[3] > 1:
            return False, "a head dimension that is not dense"
    if q.shape[3] != v.shape[3] or q.shape[3] > 256:
        return False, f"head dimensions {q.shape[3]} and {v.shape[3]}; they must be equal and at most 256"
    if q.shape[1] % max(k.shape[1], 1) or k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        return False, "batch sizes or heads that do not fit"
    return True, ""


_WHEN = [Predicate("one dtype in {float16, bfloat16, float32}, 4 dimensions, head dimension <= 256", _admits)]
_OPTIONS: dict[str, Any] = {"family": "attention", "by_value": ("dropout_p",), "state": (_tf32,)}


def _index(call: Call, name: str) -> int:
    from gemsmode.signature import parameters

    return next(i for i, p in enumerate(parameters(call.op)) if p.name == name)


def _scale(call: Call) -> Any:
    given = call["scale"]
    return 1.0 / math.sqrt(call["query"].shape[3]) if given is None else Num(_index(call, "scale"), "fp32")


def _bias(call: Call, name: str) -> tuple[tuple[Arg, ...], tuple[Any, ...], dict[Arg, TensorMeta]]:
    """The additive mask as a kernel takes it: its pointer in a tuple, its strides over [B, H, M, N], its metadata."""
    q, k = call["query"], call["key"]
    meta = call[name] if name else None
    if meta is None:
        return (), (), {}
    if not meta.dtype.is_floating_point:
        raise Decline(f"a mask of {dtype_name(meta.dtype)}")
    shape = (*q.shape[:3], k.shape[2])
    if meta.ndim > 4 or any(m not in (1, s) for m, s in zip(meta.shape[::-1], shape[::-1])):
        raise Decline("PyTorch rejects it: the mask does not broadcast to the scores")
    ref = Arg(_index(call, name))
    return (ref,), tuple(stride(s) for s in broadcast_strides(meta, shape)), {ref: meta}


def _strides(meta: Any) -> tuple[Any, ...]:
    return (*[stride(s) for s in meta.stride[:3]], 1)


def _no_dropout(call: Call) -> None:
    if call["dropout_p"] != 0.0:
        raise Decline("dropout inside the attention")


def forward_plan(call: Call, out: Alloc, lse: Alloc, lse_strides: Sequence[int], empty: float, causal: bool, bias_name: str) -> Plan:
    """A plan that computes ``out`` and ``lse`` (allocations 0 and 1); ``lse_strides`` are over [B, H, M]."""
    _no_dropout(call)
    q, k, v = (call[n] for n in ("query", "key", "value"))
    batch, heads, m, d = q.shape
    n = k.shape[2]
    bias, bias_strides, metas = _bias(call, bias_name)
    metas |= {Arg(_index(call, name)): meta for name, meta in (("query", q), ("key", k), ("value", v))}
    if q.numel == 0 or n == 0:
        raise Decline("an empty input")
    block_d = max(power_of_2(d), 16)
    blocks = choose_blocks(_FORWARD, block_d, m, q.dtype.itemsize, call.target)
    query_blocks = -(-m // blocks.m)
    splits = choose_splits(query_blocks * batch * heads, n, call.target) if m <= 16 else 1
    split_size = -(-n // splits)
    split_size += -split_size % blocks.n
    splits = -(-n // split_size)
    precision = "tf32" if _tf32() and q.dtype == torch.float32 else "ieee"
    pointers = tuple(Arg(_index(call, name)) for name in ("query", "key", "value"))
    constants = (("CAUSAL", causal), ("PRECISION", precision), ("BLOCK_M", blocks.m), ("BLOCK_N", blocks.n), ("BLOCK_D", block_d))
    allocs: tuple[Alloc, ...] = (out, lse)
    if splits == 1:
        written, sums = Out(0), Out(1)
        out_strides: tuple[Any, ...] = (*_strides(out), 0)
        sum_strides: tuple[Any, ...] = (*[stride(s) for s in lse_strides], 0)
    else:
        allocs += (Alloc((batch, heads, m, splits, d), contiguous_strides((batch, heads, m, splits, d)), torch.float32),
                   Alloc((batch, heads, m, splits), contiguous_strides((batch, heads, m, splits)), torch.float32))
        written, sums = Out(2), Out(3)
        out_strides = (*[Size(s) for s in (heads * m * splits * d, m * splits * d, splits * d)], 1, stride(d))
        sum_strides = (*[Size(s) for s in (heads * m * splits, m * splits, splits)], 1)
    launches = [Launch(forward_kernel, (query_blocks, batch * heads, splits),
                       (*pointers, bias, written, sums, Size(heads), Size(heads // k.shape[1]), Size(m), Size(n), extent(d),
                        Size(split_size), _scale(call), _strides(q), _strides(k), _strides(v), bias_strides, out_strides, sum_strides),
                       Constants((*constants, ("EMPTY", empty if splits == 1 else float("-inf")))), blocks.warps, blocks.stages)]
    if splits > 1:
        launches.append(Launch(join_kernel, (m, batch * heads, 1),
                               (Out(2), Out(3), Out(0), Out(1), Size(heads), Size(m), extent(d), Size(splits), _strides(out),
                                tuple(stride(s) for s in lse_strides)),
                               Constants((("EMPTY", empty), ("BLOCK_S", power_of_2(splits)), ("BLOCK_D", block_d)))))
    moved = (2 * q.numel + k.numel + v.numel) * q.dtype.itemsize
    flops = 4 * batch * heads * m * n * d // (2 if causal else 1)
    return Plan(allocs, tuple(launches), (Out(0), Out(1)), metas, bytes=moved, flops=flops)


def backward_plan(call: Call, grad_name: str, allocs: Sequence[Alloc], lse_strides: Sequence[int], causal: bool, bias_name: str) -> Plan:
    """A plan of the gradients of query, key and value, allocations 0 to 2."""
    _no_dropout(call)
    q, k, v, out, grad = (call[n] for n in ("query", "key", "value", "out", grad_name))
    batch, heads, m, d = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    if q.numel == 0 or n == 0:
        raise Decline("an empty input")
    for meta in (out, grad):
        if meta.stride[3] != 1 and d > 1:
            raise Decline("a gradient or output whose head dimension is not dense")
    bias, bias_strides, metas = _bias(call, bias_name)
    names = ("query", "key", "value", "out", "logsumexp", grad_name)
    refs = {name: Arg(_index(call, name)) for name in names}
    metas |= {refs[name]: call[name] for name in names}
    block_d = max(power_of_2(d), 16)
    blocks = choose_blocks(_BACKWARD, block_d, max(m, 17), q.dtype.itemsize, call.target)
    precision = "tf32" if _tf32() and q.dtype == torch.float32 else "ieee"
    delta = Alloc((batch, heads, m), contiguous_strides((batch, heads, m)), torch.float32)
    constants = Constants((("CAUSAL", causal), ("PRECISION", precision), ("BLOCK_M", blocks.m), ("BLOCK_N", blocks.n),
                           ("BLOCK_D", block_d)))
    sizes = (Size(heads), Size(group), Size(m), Size(n), extent(d), _scale(call))
    lse_steps = tuple(stride(s) for s in lse_strides)
    common = (refs["query"], refs["key"], refs["value"], bias, refs[grad_name], refs["logsumexp"], Out(3))
    strides = (_strides(q), _strides(k), _strides(v), bias_strides, _strides(grad), lse_steps)
    launches = (
        Launch(delta_kernel, (-(-m // blocks.m), batch * heads, 1),
               (refs[grad_name], refs["out"], Out(3), Size(heads), Size(m), extent(d), _strides(grad), _strides(out)),
               Constants((("BLOCK_M", blocks.m), ("BLOCK_D", block_d)))),
        Launch(grad_key_value_kernel, (-(-n // blocks.n), batch * k.shape[1], 1),
               (*common, Out(1), Out(2), *sizes, *strides, _strides(allocs[1]), _strides(allocs[2])), constants,
               blocks.warps, blocks.stages),
        Launch(grad_query_kernel, (-(-m // blocks.m), batch * heads, 1),
               (*common, Out(0), *sizes, *strides, _strides(allocs[0])), constants, blocks.warps, blocks.stages),
    )
    moved = 4 * (q.numel + k.numel) * q.dtype.itemsize
    flops = 10 * batch * heads * m * n * d // (2 if causal else 1)
    return Plan((*allocs, delta), launches, (Out(0), Out(1), Out(2)), metas, bytes=moved, flops=flops)


def _like(meta: TensorMeta) -> Alloc:
    return Alloc(meta.shape, preserved_strides(meta), meta.dtype)


def _heads_last(meta: TensorMeta) -> Alloc:
    """[B, H, M, D] laid out as [B, M, H, D]."""
    _, heads, rows, d = meta.shape
    return Alloc(meta.shape, (rows * heads * d, d, heads * d, 1), meta.dtype)


# -- the ops -----------------------------------------------------------------------------------------------------------


@planned("aten._scaled_dot_product_flash_attention_for_cpu.default", _WHEN, kernel=forward_kernel, **_OPTIONS)
def attention_for_cpu(call: Call) -> Plan:
    """The CPU's op, which the interpreter serves. A row without keys has an lse of 0 there."""
    q = call["query"]
    batch, heads, m, _ = q.shape
    steps = (m * heads, 1, heads)
    lse = Alloc((batch, heads, m), steps, torch.float32)
    return forward_plan(call, _like(q), lse, steps, 0.0, call["is_causal"], "attn_mask")


@planned("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", _WHEN, kernel=grad_key_value_kernel, **_OPTIONS)
def attention_for_cpu_backward(call: Call) -> Plan:
    allocs = [_heads_last(call[n]) for n in ("query", "key", "value")]
    return backward_plan(call, "grad_out", allocs, call["logsumexp"].stride, call["is_causal"], "attn_mask")


@planned("aten._scaled_dot_product_efficient_attention.default", _WHEN, kernel=forward_kernel, **_OPTIONS)
def efficient_attention(call: Call) -> Plan:
    """CUDA's memory-efficient op: lse is padded to a multiple of 32 queries, the output is laid out as [B, M, H, D]."""
    q = call["query"]
    batch, heads, m, _ = q.shape
    rows = m + -m % 32
    lse = Alloc((batch, heads, rows), contiguous_strides((batch, heads, rows)), torch.float32)
    plan = forward_plan(call, _heads_last(q), lse, lse.stride, float("inf"), call["is_causal"], "attn_bias")
    philox = Alloc((), (), torch.int64, zero=True)
    none = Alloc((batch, heads, 0), contiguous_strides((batch, heads, 0)), torch.float32)
    count = len(plan.allocs)
    return plan._replace(allocs=(*plan.allocs, philox, philox, none),
                         returns=(Out(0), Out(1) if call["compute_log_sumexp"] else Out(count + 2), Out(count), Out(count + 1)))


@planned("aten._scaled_dot_product_flash_attention_backward.default", _WHEN, kernel=grad_key_value_kernel, **_OPTIONS)
def flash_attention_backward(call: Call) -> Plan:
    """CUDA's flash op, backward; goes with PyTorch's own forward."""
    q, k = call["query"], call["key"]
    if call["is_causal"] and q.shape[2] != k.shape[2]:
        raise Decline("a causal mask over different numbers of queries and keys")
    allocs = [_heads_last(call[n]) for n in ("query", "key", "value")]
    return backward_plan(call, "grad_out", allocs, call["logsumexp"].stride, call["is_causal"], "")
