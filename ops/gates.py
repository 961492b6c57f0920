"""Gated activations and the activation of a biased product: silu(a) * b, gelu(a) * b, gelu(x + bias), and their gradients.

Each is one pointwise kernel: operands are read once, the results written once, and values are rounded once.
``approximate="tanh"`` is PyTorch's tanh form of GELU. The activations are those of ``activation.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it)

from gemsmode.custom import custom_op
from gemsmode.ops import activation, maths
from gemsmode.ops.layout import broadcast_shape
from gemsmode.ops.pointwise import pointwise
from gemsmode.ops.promotion import FLOAT
from gemsmode.plan import Decline
from gemsmode.signature import Call

# -- references and fakes ----------------------------------------------------------------------------------------------


def _silu_and_mul(a: Any, b: Any) -> Any:
    return F.silu(a) * b


def _gelu_and_mul(a: Any, b: Any, approximate: str = "none") -> Any:
    return F.gelu(a, approximate=approximate) * b


def _add_bias_gelu(input: Any, bias: Any, approximate: str = "none") -> Any:
    return F.gelu(input + bias, approximate=approximate)


def _silu_and_mul_backward(grad: Any, a: Any, b: Any) -> Any:
    return torch.ops.aten.silu_backward(grad * b, a), grad * F.silu(a)


def _gelu_and_mul_backward(grad: Any, a: Any, b: Any, approximate: str = "none") -> Any:
    return torch.ops.aten.gelu_backward(grad * b, a, approximate=approximate), grad * F.gelu(a, approximate=approximate)


def _add_bias_gelu_backward(grad: Any, input: Any, bias: Any, approximate: str = "none") -> Any:
    return torch.ops.aten.gelu_backward(grad, input + bias, approximate=approximate)


def _fake(a: Any, b: Any, approximate: str = "none") -> Any:
    return a + b


def _fake_pair(grad: Any, a: Any, b: Any, approximate: str = "none") -> Any:
    return grad + a + b, grad + a + b


def _fake_one(grad: Any, input: Any, bias: Any, approximate: str = "none") -> Any:
    return grad + input + bias


silu_and_mul = custom_op("silu_and_mul(Tensor a, Tensor b) -> Tensor", reference=_silu_and_mul, fake=_fake)
gelu_and_mul = custom_op("gelu_and_mul(Tensor a, Tensor b, str approximate='none') -> Tensor", reference=_gelu_and_mul, fake=_fake)
add_bias_gelu = custom_op("add_bias_gelu(Tensor input, Tensor bias, str approximate='none') -> Tensor",
                          reference=_add_bias_gelu, fake=_fake)

silu_and_mul_backward = custom_op("silu_and_mul_backward(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
                                  reference=_silu_and_mul_backward, fake=_fake_pair)
gelu_and_mul_backward = custom_op("gelu_and_mul_backward(Tensor grad, Tensor a, Tensor b, str approximate='none') -> (Tensor, Tensor)",
                                  reference=_gelu_and_mul_backward, fake=_fake_pair)
add_bias_gelu_backward = custom_op("add_bias_gelu_backward(Tensor grad, Tensor input, Tensor bias, str approximate='none') -> Tensor",
                                   reference=_add_bias_gelu_backward, fake=_fake_one)

# -- functions of loaded blocks ----------------------------------------------------------------------------------------


@triton.jit
def _silu_gate(a, b):
    return activation._silu(a) * b


@triton.jit
def _fast_silu_gate(a, b):
    return activation._fast_silu(a) * b


@triton.jit
def _silu_gate_backward(grad, a, b):
    return activation._silu_backward(grad * b, a), grad * activation._silu(a)


@triton.jit
def _fast_silu_gate_backward(grad, a, b):
    s = maths.fast_sigmoid(a)
    return grad * b * s * (1 + a * (1 - s)), grad * (a * s)


@triton.jit
def _gelu_gate(a, b):
    return activation._gelu(a) * b


@triton.jit
def _fast_gelu_gate(a, b):
    return activation._fast_gelu(a) * b


@triton.jit
def _tanh_gate(a, b):
    return activation._gelu_tanh(a) * b


@triton.jit
def _fast_tanh_gate(a, b):
    return activation._fast_gelu_tanh(a) * b


@triton.jit
def _gelu_gate_backward(grad, a, b):
    return activation._gelu_backward(grad * b, a), grad * activation._gelu(a)


@triton.jit
def _fast_gelu_gate_backward(grad, a, b):
    return activation._fast_gelu_backward(grad * b, a), grad * activation._fast_gelu(a)


@triton.jit
def _tanh_gate_backward(grad, a, b):
    return activation._gelu_tanh_backward(grad * b, a), grad * activation._gelu_tanh(a)


@triton.jit
def _fast_tanh_gate_backward(grad, a, b):
    return activation._fast_gelu_tanh_backward(grad * b, a), grad * activation._fast_gelu_tanh(a)


@triton.jit
def _biased_gelu(input, bias):
    return activation._gelu(input + bias)


@triton.jit
def _fast_biased_gelu(input, bias):
    return activation._fast_gelu(input + bias)


@triton.jit
def _biased_tanh(input, bias):
    return activation._gelu_tanh(input + bias)


@triton.jit
def _fast_biased_tanh(input, bias):
    return activation._fast_gelu_tanh(input + bias)


@triton.jit
def _biased_gelu_backward(grad, input, bias):
    return activation._gelu_backward(grad, input + bias)


@triton.jit
def _fast_biased_gelu_backward(grad, input, bias):
    return activation._fast_gelu_backward(grad, input + bias)


@triton.jit
def _biased_tanh_backward(grad, input, bias):
    return activation._gelu_tanh_backward(grad, input + bias)


@triton.jit
def _fast_biased_tanh_backward(grad, input, bias):
    return activation._fast_gelu_tanh_backward(grad, input + bias)


# -- rules -------------------------------------------------------------------------------------------------------------


def _pick(call: Call, none: tuple[Any, Any], tanh: tuple[Any, Any]) -> Any:
    """The function for the call's ``approximate``: of each pair the first is for 16-bit floats."""
    narrow = all(t.dtype.itemsize == 2 for t in call.tensors)
    return (none if call["approximate"] == "none" else tanh)[0 if narrow else 1]


def _approximation(call: Call, common: torch.dtype) -> None:
    if call["approximate"] not in ("none", "tanh"):
        raise Decline(f"PyTorch rejects it: approximate={call['approximate']!r}")


def _alike(call: Call, common: torch.dtype) -> None:
    """Gradients have the shapes of the operands: no operand is broadcast."""
    grad, a, b = call.args[:3]
    if not grad.shape == a.shape == b.shape:
        raise Decline("operands of several shapes")


def _alike_and_approximation(call: Call, common: torch.dtype) -> None:
    _approximation(call, common)
    _alike(call, common)


def _as_input(call: Call, common: torch.dtype) -> None:
    _approximation(call, common)
    if call["grad"].shape != call["input"].shape or broadcast_shape([call["input"].shape, call["bias"].shape]) != call["input"].shape:
        raise Decline("a gradient that is not of the input's shape")


def _silu(fast: Any, wide: Any) -> Callable[[Call], Any]:
    return lambda call: fast if all(t.dtype.itemsize == 2 for t in call.tensors) else wide


pointwise("gemsmode.silu_and_mul.default", dtypes=FLOAT, select=_silu(_fast_silu_gate, _silu_gate), family="fused", flops=6,
          name="silu_and_mul")(_silu_gate)
pointwise("gemsmode.silu_and_mul_backward.default", dtypes=FLOAT, select=_silu(_fast_silu_gate_backward, _silu_gate_backward),
          outputs=(None, None), check=_alike, family="fused", flops=13, name="silu_and_mul_backward")(_silu_gate_backward)
pointwise("gemsmode.gelu_and_mul.default", dtypes=FLOAT, check=_approximation, family="fused", flops=9, name="gelu_and_mul",
          select=lambda call: _pick(call, (_fast_gelu_gate, _gelu_gate), (_fast_tanh_gate, _tanh_gate)))(_gelu_gate)
pointwise("gemsmode.gelu_and_mul_backward.default", dtypes=FLOAT, outputs=(None, None), check=_alike_and_approximation, family="fused",
          flops=18, name="gelu_and_mul_backward", select=lambda call: _pick(
              call, (_fast_gelu_gate_backward, _gelu_gate_backward), (_fast_tanh_gate_backward, _tanh_gate_backward)))(_gelu_gate_backward)
pointwise("gemsmode.add_bias_gelu.default", dtypes=FLOAT, check=_approximation, family="fused", flops=9, name="add_bias_gelu",
          select=lambda call: _pick(call, (_fast_biased_gelu, _biased_gelu), (_fast_biased_tanh, _biased_tanh)))(_biased_gelu)
pointwise("gemsmode.add_bias_gelu_backward.default", dtypes=FLOAT, check=_as_input, family="fused", flops=17, name="add_bias_gelu_backward",
          select=lambda call: _pick(call, (_fast_biased_gelu_backward, _biased_gelu_backward),
                                    (_fast_biased_tanh_backward, _biased_tanh_backward)))(_biased_gelu_backward)

# -- gradients ---------------------------------------------------------------------------------------------------------


def _save_two(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.approximate = inputs[2] if len(inputs) > 2 else None


def _summed_to(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``grad`` summed over the dimensions along which ``like`` was broadcast."""
    return grad if grad.shape == like.shape else grad.sum_to_size(like.shape)


def _gate_gradient(backward: Any) -> Callable[..., Any]:
    def formula(ctx: Any, grad: Any) -> Any:
        a, b = ctx.saved_tensors
        more = () if ctx.approximate is None else (ctx.approximate,)
        da, db = backward(grad, a, b, *more)
        return (_summed_to(da, a), _summed_to(db, b), *(None for _ in more))

    return formula


def _add_bias_gelu_gradient(ctx: Any, grad: Any) -> Any:
    x, bias = ctx.saved_tensors
    dx = add_bias_gelu_backward(grad, x, bias, ctx.approximate)
    return _summed_to(dx, x), _summed_to(dx, bias) if ctx.needs_input_grad[1] else None, None


silu_and_mul.differentiate(_save_two, _gate_gradient(silu_and_mul_backward))
gelu_and_mul.differentiate(_save_two, _gate_gradient(gelu_and_mul_backward))
add_bias_gelu.differentiate(_save_two, _add_bias_gelu_gradient)
for _backward in (silu_and_mul_backward, gelu_and_mul_backward, add_bias_gelu_backward):
    _backward.not_differentiable()
