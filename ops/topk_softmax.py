"""The k largest probabilities of a softmax over experts, and their indices: the gate of a mixture of experts.

    p = softmax(x) over the last dimension; weights, indices = the k largest of p; divided by their sum if `renormalize`

Forward: one read of x, which stays in registers while the maxima are taken in turn (of equal values the first).
Backward: ``dx = p * (G - sum(g * w))`` with G the gradient g scattered to the chosen experts; with ``renormalize`` the
weights are a softmax over the chosen experts alone, and take the place of p.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.custom import custom_op
from gemsmode.ops.promotion import FLOAT, TRITON, opmath
from gemsmode.ops.rows import INTERPRETED_BLOCK, is_wide, ladder, power_of_2, sizes_argument, split_rows, unravel, warps
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

MAX_EXPERTS = 4096

# -- references and fakes ----------------------------------------------------------------------------------------------


def _topk_softmax(input: Any, k: int, renormalize: bool = False) -> Any:
    weights, indices = input.to(opmath(input.dtype)).softmax(-1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, indices


def _backward(grad: Any, input: Any, weights: Any, indices: Any, renormalize: bool) -> Any:
    p = input.to(weights.dtype).softmax(-1)
    scattered = torch.zeros_like(p).scatter(-1, indices, grad)
    if renormalize:
        p = torch.zeros_like(p).scatter(-1, indices, weights)
    return (p * (scattered - (grad * weights).sum(-1, keepdim=True))).to(input.dtype)


def _fake(input: Any, k: int, renormalize: bool = False) -> Any:
    shape = (*input.shape[:-1], k)
    return input.new_empty(shape, dtype=opmath(input.dtype)), input.new_empty(shape, dtype=torch.int64)


def _fake_backward(grad: Any, input: Any, weights: Any, indices: Any, renormalize: bool) -> Any:
    return input.new_empty(input.shape)


topk_softmax = custom_op("topk_softmax(Tensor input, int k, bool renormalize=False) -> (Tensor, Tensor)",
                         reference=_topk_softmax, fake=_fake)
topk_softmax_backward = custom_op(
    "topk_softmax_backward(Tensor grad, Tensor input, Tensor weights, Tensor indices, bool renormalize) -> Tensor",
    reference=_backward, fake=_fake_backward)

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _probabilities(p_x, o_row, m_row, o_column, n, sizes, x_rows, x_column, ACC: tl.constexpr):
    m_column = (o_column < n)[None, :]
    # [BLOCK_R, BLOCK_N]
    x = tl.load(p_x + unravel(o_row, sizes, x_rows)[:, None] + (o_column * x_column)[None, :], mask=m_row[:, None] & m_column, other=0.0)
    x = tl.where(m_column, x.to(ACC), float("-inf"))
    e = tl.where(m_column, tl.exp(x - tl.max(x, axis=1)[:, None]), 0.0)
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def topk_softmax_kernel(p_weights, p_indices, p_x, n_rows, n, k, sizes, x_rows, x_column, RENORMALIZE: tl.constexpr, ACC: tl.constexpr,
                        WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid: blocks of rows."""
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if WIDE:
        o_row = o_row.to(tl.int64)
    m_row = o_row < n_rows
    o_column = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p = _probabilities(p_x, o_row, m_row, o_column, n, sizes, x_rows, x_column, ACC)
    # One NaN makes all of a row NaN, and maxima drop NaN.
    is_nan = tl.max((p != p).to(tl.int32), axis=1) > 0
    left = tl.where((o_column < n)[None, :], p, -1.0)
    weights = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    indices = tl.zeros([BLOCK_R, BLOCK_K], tl.int32)
    for j in range(0, k):
        best = tl.max(left, axis=1)
        index = tl.min(tl.where(left == best[:, None], o_column[None, :], BLOCK_N), axis=1)
        index = tl.where(index < n, index, 0)
        here = (o_k == j)[None, :]
        weights = tl.where(here, best[:, None], weights)
        indices = tl.where(here, index[:, None], indices)
        left = tl.where(o_column[None, :] == index[:, None], -1.0, left)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    weights = tl.where(is_nan[:, None], float("nan"), weights)
    o_out = (o_row * k)[:, None] + o_k[None, :]
    mask = m_row[:, None] & (o_k < k)[None, :]
    tl.store(p_weights + o_out, weights, mask=mask)
    tl.store(p_indices + o_out, indices.to(tl.int64), mask=mask)


@triton.jit
def topk_softmax_backward_kernel(p_dx, p_g, p_x, p_weights, p_indices, n_rows, n, k, sizes, x_rows, x_column, RENORMALIZE: tl.constexpr,
                                 ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid: blocks of rows."""
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if WIDE:
        o_row = o_row.to(tl.int64)
    m_row = o_row < n_rows
    o_column = tl.arange(0, BLOCK_N)
    scattered = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    chosen = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    total = tl.zeros([BLOCK_R], ACC)
    for j in range(0, k):
        g = tl.load(p_g + o_row * k + j, mask=m_row, other=0.0).to(ACC)
        w = tl.load(p_weights + o_row * k + j, mask=m_row, other=0.0)
        here = o_column[None, :] == tl.load(p_indices + o_row * k + j, mask=m_row, other=0)[:, None]
        scattered += tl.where(here, g[:, None], 0.0)
        chosen += tl.where(here, w[:, None], 0.0)
        total += g * w
    if not RENORMALIZE:
        chosen = _probabilities(p_x, o_row, m_row, o_column, n, sizes, x_rows, x_column, ACC)
    result = (chosen * (scattered - total[:, None])).to(p_dx.dtype.element_ty)
    tl.store(p_dx + (o_row * n)[:, None] + o_column[None, :], result, mask=m_row[:, None] & (o_column < n)[None, :])


# -- rules -------------------------------------------------------------------------------------------------------------

_WARPS = ((1024, 4), (2048, 8), (1 << 30, 16))


def _block_rows(n_rows: int, columns: int, target: Target) -> int:
    budget = INTERPRETED_BLOCK if target.interpreted else 1024
    return max(min(budget // columns, power_of_2(n_rows)), 1)


def _check(x: TensorMeta, k: int) -> tuple[Any, int, int]:
    """The rows of ``x``, their number and length."""
    if x.ndim == 0 or not 0 < k <= x.shape[-1]:
        raise Decline("k is not between 1 and the number of experts")
    if x.shape[-1] > MAX_EXPERTS or k > 64:
        raise Decline(f"more than {MAX_EXPERTS} experts, or more than 64 chosen")
    rows = split_rows(x.shape, (x.ndim - 1,), [contiguous_strides(x.shape), x.stride])
    return rows, rows.n_rows, x.shape[-1]


@planned("gemsmode.topk_softmax.default", dtype(*FLOAT), family="fused", kernel=topk_softmax_kernel, name="topk_softmax")
def plan_topk_softmax(call: Call) -> Plan:
    x, k, renormalize = call.args
    rows, n_rows, n = _check(x, k)
    shape = (*x.shape[:-1], k)
    acc = opmath(x.dtype)
    allocs = (Alloc(shape, contiguous_strides(shape), acc), Alloc(shape, contiguous_strides(shape), torch.int64))
    if x.numel == 0:
        return Plan(allocs, (), (Out(0), Out(1)), {Arg(0): x}, bytes=0, flops=0)
    columns = power_of_2(n)
    block_r = _block_rows(n_rows, max(columns, power_of_2(k)), call.target)
    step = Launch(topk_softmax_kernel, (-(-n_rows // block_r), 1, 1),
                  (Out(0), Out(1), Arg(0), Size(n_rows), n, Size(k), sizes_argument(rows.row_sizes), rows.row_strides[1],
                   rows.column_strides[1][0]),
                  (("RENORMALIZE", renormalize), ("ACC", TRITON[acc]), ("WIDE", is_wide(x, allocs[1].meta)), ("BLOCK_R", block_r),
                   ("BLOCK_N", columns), ("BLOCK_K", power_of_2(k))), warps(ladder(_WARPS, block_r * columns), call.target))
    return Plan(allocs, (step,), (Out(0), Out(1)), {Arg(0): x}, bytes=x.numel * x.dtype.itemsize + n_rows * k * (acc.itemsize + 8),
                flops=x.numel * (5 + 3 * k))


@planned("gemsmode.topk_softmax_backward.default", dtype(*FLOAT, arg="input"), family="fused", kernel=topk_softmax_backward_kernel,
         name="topk_softmax_backward")
def plan_topk_softmax_backward(call: Call) -> Plan:
    g, x, weights, indices, renormalize = call.args
    k = weights.shape[-1]
    rows, n_rows, n = _check(x, k)
    if not (g.is_contiguous and weights.is_contiguous and indices.is_contiguous) or weights.dtype != opmath(x.dtype):
        raise Decline("a gradient, weights or indices that are not contiguous, or weights of another dtype than forward gives")
    out = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    metas = {Arg(i): t for i, t in enumerate((g, x, weights, indices))}
    if x.numel == 0:
        return Plan((out,), (), Out(0), metas, bytes=0, flops=0)
    columns = power_of_2(n)
    block_r = _block_rows(n_rows, columns, call.target)
    step = Launch(topk_softmax_backward_kernel, (-(-n_rows // block_r), 1, 1),
                  (Out(0), Arg(0), Arg(1), Arg(2), Arg(3), Size(n_rows), n, Size(k), sizes_argument(rows.row_sizes), rows.row_strides[1],
                   rows.column_strides[1][0]),
                  (("RENORMALIZE", renormalize), ("ACC", TRITON[opmath(x.dtype)]), ("WIDE", is_wide(x)), ("BLOCK_R", block_r),
                   ("BLOCK_N", columns)), warps(ladder(_WARPS, block_r * columns), call.target))
    return Plan((out,), (step,), Out(0), metas, bytes=2 * x.numel * x.dtype.itemsize, flops=x.numel * (5 + 3 * k))


# -- gradient ----------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)
    ctx.renormalize = bool(len(inputs) > 2 and inputs[2])


def _gradient(ctx: Any, grad: Any, _: Any) -> Any:
    return topk_softmax_backward(grad.contiguous(), *ctx.saved_tensors, ctx.renormalize), None, None


topk_softmax.differentiate(_setup, _gradient)
topk_softmax_backward.not_differentiable()
