"""Linear layers as one op, alone and with the GELU that follows them: ``gelu(input @ weight.T + bias)``.

PyTorch takes ``linear`` apart (a transpose, views, a product) before a mode sees it, and each part costs the host time; as an
op of its own it is one call. The kernels are those of the products, which apply an activation to each tile before it is
written: the layer's own output is then never stored, and values are rounded once. A gradient needs that output, which the
formula computes again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gemsmode.custom import custom_op
from gemsmode.ops import activation
from gemsmode.ops.matmul import STATE, gemm_kernel, plan_linear
from gemsmode.plan import Decline, Plan
from gemsmode.registry import planned
from gemsmode.signature import Call


def _linear_gelu(input: Any, weight: Any, bias: Any = None, approximate: str = "none") -> Any:
    return F.gelu(F.linear(input, weight, bias), approximate=approximate)


def _fake(input: Any, weight: Any, bias: Any = None, approximate: str = "none") -> Any:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return F.linear(input, weight, bias)


linear = custom_op("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", reference=_linear, fake=_fake)
linear_gelu = custom_op("linear_gelu(Tensor input, Tensor weight, Tensor? bias=None, str approximate='none') -> Tensor",
                        reference=_linear_gelu, fake=_fake)


@planned("gemsmode.linear.default", family="fused", kernel=gemm_kernel, name="linear_layer", state=STATE)
def plan_layer(call: Call) -> Plan:
    """``input [..., K] @ weight [N, K]^T + bias [N]``."""
    return plan_linear(call)


@planned("gemsmode.linear_gelu.default", family="fused", kernel=gemm_kernel, state=STATE)
def plan(call: Call) -> Plan:
    """``gelu(input [..., K] @ weight [N, K]^T + bias [N])``."""
    if call["approximate"] not in ("none", "tanh"):
        raise Decline(f"PyTorch rejects it: approximate={call['approximate']!r}")
    if call["weight"].ndim != 2:
        raise Decline("a weight that is no matrix")
    narrow = call["input"].dtype.itemsize == 2
    if call["approximate"] == "none":
        return plan_linear(call, activation._fast_gelu if narrow else activation._gelu)
    return plan_linear(call, activation._fast_gelu_tanh if narrow else activation._gelu_tanh)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.approximate = inputs[3] if len(inputs) > 3 else None


def _gradient(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, bias = ctx.saved_tensors
    if ctx.approximate is not None:
        grad = torch.ops.aten.gelu_backward(grad, F.linear(x, weight, bias), approximate=ctx.approximate)
    rows = grad.reshape(-1, grad.shape[-1])
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    gradients = (grad @ weight if need_x else None, rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
                 rows.sum(0) if need_bias else None)
    return gradients if ctx.approximate is None else (*gradients, None)


linear.differentiate(_save, _gradient)
linear_gelu.differentiate(_save, _gradient)
