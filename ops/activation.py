"""Activations and their backward; each backward stands beside its forward.

16-bit results of the exponential kind take faster forms (``select``): their errors vanish in the rounding to 16 bits,
and the exact ones would cost more time than reading and writing the memory does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops import maths
from gemsmode.ops.layout import broadcast_shape, preserved_strides
from gemsmode.ops.pointwise import INT_TO_FLOAT, Operand, as_operand, build, like_input, pointwise
from gemsmode.ops.promotion import FLOAT, NUMERIC, opmath
from gemsmode.plan import Alloc, Arg, At, Decline, Into, Out, Plan, contiguous_strides
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

_SIGNED = (*FLOAT, torch.int8, torch.int16, torch.int32, torch.int64)


def _by_width(narrow: Any, wide: Any) -> Callable[[Call], Any]:
    """``narrow`` for 16-bit floats, ``wide`` for others."""
    return lambda call: narrow if call.args[0].dtype in (torch.float16, torch.bfloat16) else wide


# -- pieces of straight lines ------------------------------------------------------------------------------------------


@pointwise("aten.relu.default", dtypes=NUMERIC)
@triton.jit
def relu(self):
    return tl.where(self <= 0, 0, self).to(self.dtype)


@pointwise("aten.threshold.default", dtypes=NUMERIC, ranged={"threshold": 1, "value": 1})
@triton.jit
def threshold(self, threshold, value):
    return tl.where(self <= threshold, value, self)


@pointwise("aten.threshold_backward.default", dtypes=NUMERIC)
@triton.jit
def threshold_backward(self, grad_output, threshold):  # in this order, which decides on the strides of the result
    return tl.where(self <= threshold, 0, grad_output).to(grad_output.dtype)


@pointwise("aten.leaky_relu.default", dtypes=FLOAT)
@triton.jit
def leaky_relu(self, negative_slope):
    return tl.where(self > 0, self, self * negative_slope)


@pointwise("aten.leaky_relu_backward.default", dtypes=FLOAT)
@triton.jit
def leaky_relu_backward(self, grad_output, negative_slope):  # in this order, as threshold_backward
    # The sign of a result is that of the input, since PyTorch admits self_is_result only for slopes of at least 0.
    return tl.where(self > 0, grad_output, grad_output * negative_slope)


def _prelu_strides(call: Call) -> tuple[int, ...] | None:
    """Those of ``empty_like(self)``, unless ``weight`` broadcasts it."""
    x, weight = call.args
    return preserved_strides(x) if broadcast_shape([x.shape, weight.shape]) == x.shape else None


@pointwise("aten._prelu_kernel.default", dtypes=FLOAT, out_stride=_prelu_strides)
@triton.jit
def prelu_kernel(self, weight):
    return tl.where(self > 0, self, self * weight)


@pointwise("aten._prelu_kernel_backward.default", dtypes=FLOAT, outputs=(None, None))
@triton.jit
def prelu_kernel_backward(self, weight, grad_output):  # in this order, as threshold_backward
    positive = self > 0
    return tl.where(positive, grad_output, grad_output * weight), tl.where(positive, 0.0, grad_output * self)


@triton.jit
def _times_noise(noise, grad_output):
    return noise * grad_output


@triton.jit
def _mean_slope(self, grad_output, lower, upper):
    return tl.where(self > 0, grad_output, grad_output * ((lower + upper) / 2))


def _in_training(call: Call) -> Any:
    return _times_noise if call["training"] and call["upper"] - call["lower"] > 1e-6 else _mean_slope


@pointwise("aten.rrelu_with_noise_backward.default", dtypes=FLOAT, select=_in_training, by_value=("lower", "upper"))
@triton.jit
def rrelu_with_noise_backward(grad_output, self, noise, lower, upper):
    return _mean_slope(self, grad_output, lower, upper)


@pointwise("aten.hardtanh.default", dtypes=_SIGNED, out_stride=like_input)
@triton.jit
def hardtanh(self, min_val, max_val):
    return maths.clip(self, min_val, max_val)


@pointwise("aten.hardtanh_backward.default", dtypes=FLOAT)
@triton.jit
def hardtanh_backward(grad_output, self, min_val, max_val):
    return tl.where((self <= min_val) | (self >= max_val), 0.0, grad_output)


@pointwise("aten.hardshrink.default", dtypes=FLOAT)
@triton.jit
def hardshrink(self, lambd):
    return tl.where((self >= 0 - lambd) & (self <= lambd), 0.0, self)


@pointwise("aten.hardshrink_backward.default", dtypes=FLOAT)
@triton.jit
def hardshrink_backward(grad_out, self, lambd):
    return tl.where((self >= 0 - lambd) & (self <= lambd), 0.0, grad_out)


@pointwise("aten.softshrink.default", dtypes=FLOAT)
@triton.jit
def softshrink(self, lambd):
    return tl.where(self > lambd, self - lambd, tl.where(self < 0 - lambd, self + lambd, self * 0))


@pointwise("aten.softshrink_backward.default", dtypes=FLOAT)
@triton.jit
def softshrink_backward(grad_output, self, lambd):
    return tl.where((self >= 0 - lambd) & (self <= lambd), 0.0, grad_output)


@pointwise("aten.hardsigmoid.default", dtypes=FLOAT)
@triton.jit
def hardsigmoid(self):
    return maths.clip(self + 3, 0.0, 6.0) * 0.16666666666666666667


@pointwise("aten.hardsigmoid_backward.default", dtypes=FLOAT)
@triton.jit
def hardsigmoid_backward(grad_output, self):
    return tl.where((self > -3) & (self < 3), grad_output * 0.16666666666666666667, 0.0)


@pointwise("aten.hardswish.default", dtypes=FLOAT)
@triton.jit
def hardswish(self):
    return self * maths.clip(self + 3, 0.0, 6.0) * 0.16666666666666666667


@pointwise("aten.hardswish_backward.default", dtypes=FLOAT)
@triton.jit
def hardswish_backward(grad_output, self):
    # A quotient, which is -1/2 at -3/2: the product with 1/3 would not be.
    middle = grad_output * (maths.divide(self, tl.zeros_like(self) + 3) + 0.5)
    return tl.where(self <= -3, 0.0, tl.where(self < 3, middle, grad_output))


# -- exponentials ------------------------------------------------------------------------------------------------------


@triton.jit
def _fast_sigmoid(self):
    return maths.fast_sigmoid(self)


@triton.jit
def _sigmoid(self):
    return maths.sigmoid(self)


@pointwise("aten.sigmoid.default", kind=INT_TO_FLOAT, select=_by_width(_fast_sigmoid, _sigmoid), flops=4)
@triton.jit
def sigmoid(self):
    return maths.sigmoid(self)


@pointwise("aten.sigmoid_backward.default", dtypes=FLOAT, flops=3)
@triton.jit
def sigmoid_backward(grad_output, output):
    return grad_output * (1 - output) * output


@triton.jit
def _fast_tanh(self):
    return maths.fast_tanh(self)


@triton.jit
def _tanh(self):
    return maths.tanh(self)


@pointwise("aten.tanh.default", kind=INT_TO_FLOAT, select=_by_width(_fast_tanh, _tanh), flops=6)
@triton.jit
def tanh(self):
    return maths.tanh(self)


@pointwise("aten.tanh_backward.default", dtypes=FLOAT, flops=3)
@triton.jit
def tanh_backward(grad_output, output):
    return grad_output * (1 - output * output)


@triton.jit
def _fast_silu(self):
    return self / (1 + tl.exp(-self))


@triton.jit
def _silu(self):
    return maths.divide(self, 1 + maths.exp(-self))


@pointwise("aten.silu.default", dtypes=FLOAT, select=_by_width(_fast_silu, _silu), flops=5)
@triton.jit
def silu(self):
    return _silu(self)


@triton.jit
def _fast_silu_backward(grad_output, self):
    s = maths.fast_sigmoid(self)
    return grad_output * s * (1 + self * (1 - s))


@triton.jit
def _silu_backward(grad_output, self):
    s = maths.sigmoid(self)
    return grad_output * s * (1 + self * (1 - s))


@pointwise("aten.silu_backward.default", dtypes=FLOAT, select=_by_width(_fast_silu_backward, _silu_backward), flops=9)
@triton.jit
def silu_backward(grad_output, self):
    return _silu_backward(grad_output, self)


@pointwise("aten.elu.default", dtypes=FLOAT, flops=5)
@triton.jit
def elu(self, alpha, scale, input_scale):
    return tl.where(self > 0, self * scale, maths.expm1(self * input_scale) * (alpha * scale))


@triton.jit
def _elu_backward_of_input(grad_output, alpha, scale, input_scale, self_or_result):
    below = grad_output * (input_scale * alpha * scale) * maths.exp(self_or_result * input_scale)
    return tl.where(self_or_result <= 0, below, grad_output * scale)


@triton.jit
def _elu_backward_of_result(grad_output, alpha, scale, input_scale, self_or_result):
    below = grad_output * input_scale * (self_or_result + alpha * scale)
    return tl.where(self_or_result <= 0, below, grad_output * scale)


def _of_what(call: Call) -> Any:
    return _elu_backward_of_result if call["is_result"] else _elu_backward_of_input


def _alpha_not_negative(call: Call, common: torch.dtype) -> None:
    if call["is_result"] and call["alpha"] < 0:
        raise Decline("PyTorch rejects it: in-place elu has no backward for a negative alpha")


@pointwise("aten.elu_backward.default", dtypes=FLOAT, select=_of_what, by_value=("alpha",), check=_alpha_not_negative, flops=6)
@triton.jit
def elu_backward(grad_output, alpha, scale, input_scale, self_or_result):
    return _elu_backward_of_input(grad_output, alpha, scale, input_scale, self_or_result)


def _alpha_not_zero(call: Call, common: torch.dtype) -> None:
    if call["alpha"] == 0:
        raise Decline("PyTorch rejects it: alpha must not be 0")


@pointwise("aten.celu.default", dtypes=FLOAT, by_value=("alpha",), check=_alpha_not_zero, flops=4)
@triton.jit
def celu(self, alpha):
    return tl.where(self > 0, self, maths.expm1(self * (1 / alpha)) * alpha)


@triton.jit
def _fast_softplus(self, beta, threshold):
    t = self * beta
    rest, _ = maths.fast_log1p_exp_negative(t)
    return tl.where(t > threshold, self, (tl.maximum(t, 0.0) + rest) * (1 / beta))


@triton.jit
def _softplus(self, beta, threshold):
    t = self * beta
    rest, _ = maths.log1p_exp_negative(t)
    return tl.where(t > threshold, self, (tl.maximum(t, 0.0) + rest) * (1 / beta))


@pointwise("aten.softplus.default", dtypes=FLOAT, select=_by_width(_fast_softplus, _softplus), flops=5)
@triton.jit
def softplus(self, beta, threshold):
    return _softplus(self, beta, threshold)


@pointwise("aten.softplus_backward.default", dtypes=FLOAT, flops=5)
@triton.jit
def softplus_backward(grad_output, self, beta, threshold):
    t = self * beta
    return tl.where(t > threshold, grad_output, grad_output * maths.sigmoid(t))


@triton.jit
def _mish_ratio(self):
    """e (e + 2) and with it tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), for e = exp(self); 1 from 40 on."""
    e = maths.exp(tl.where(self > 40, 40.0, self))
    n = e * (e + 2)
    return e, n, maths.divide(n, n + 2)


@pointwise("aten.mish.default", dtypes=FLOAT, flops=7)
@triton.jit
def mish(self):
    _, _, t = _mish_ratio(self)
    return self * t


@pointwise("aten.mish_backward.default", dtypes=FLOAT, flops=13)
@triton.jit
def mish_backward(grad_output, self):
    e, n, t = _mish_ratio(self)
    # 1 - t**2 = 4 (n + 1) / (n + 2)**2, and the sigmoid is e / (1 + e)
    slope = tl.where(self > 40, 0.0, maths.divide(e, 1 + e) * (4 * maths.divide(maths.divide(n + 1, n + 2), n + 2)))
    return grad_output * (t + self * slope)


# tl.minimum drops a NaN, which the rest brings back.
@triton.jit
def _log_sigmoid(self):
    rest, _ = maths.log1p_exp_negative(self)
    return tl.minimum(self, 0.0) - rest


@triton.jit
def _fast_log_sigmoid(self):
    rest, _ = maths.fast_log1p_exp_negative(self)
    return tl.minimum(self, 0.0) - rest


@triton.jit
def _log_sigmoid_and_buffer(self):
    rest, z = maths.log1p_exp_negative(self)
    return tl.minimum(self, 0.0) - rest, z


@planned("aten.log_sigmoid_forward.default", dtype(*FLOAT), family="pointwise", kernel=_log_sigmoid)
def log_sigmoid_forward(call: Call) -> Plan:
    """(log(sigmoid(self)), buffer): on the CPU both are contiguous, and PyTorch's buffer is exp(-\\|self\\|); on GPUs it is empty."""
    meta = call.args[0]
    operands = [as_operand(call, 0, meta.dtype)]
    if call.target.device_type == "cpu":
        return build(call, _log_sigmoid_and_buffer, operands, [meta.dtype, meta.dtype], out_stride=contiguous_strides(meta.shape), flops=6)
    function = _by_width(_fast_log_sigmoid, _log_sigmoid)(call)
    plan = build(call, function, operands, [meta.dtype], flops=6)
    return plan._replace(allocs=(*plan.allocs, Alloc((0,), (1,), meta.dtype)), returns=(Out(0), Out(1)))


# The buffer is not read: exp(-|self|) costs less than its memory traffic, and it is empty on GPUs.
@pointwise("aten.log_sigmoid_backward.default", dtypes=FLOAT, flops=5)
@triton.jit
def log_sigmoid_backward(grad_output, self):
    z = maths.exp(-tl.abs(self))
    part = maths.divide(z, 1 + z)
    return grad_output * tl.where(self < 0, 1 - part, part)


@triton.jit
def _logit_backward(grad_output, self):
    slope = maths.divide(grad_output, self * (1 - self))
    return tl.where((self < 0) | (self > 1), float("nan"), slope)


@triton.jit
def _logit_backward_clamped(grad_output, self, eps):
    inside = (self >= eps) & (self <= 1 - eps)
    clamped = tl.where(inside, maths.divide(grad_output, self * (1 - self)), 0.0)
    return tl.where(eps < 0, _logit_backward(grad_output, self), clamped)


def _by_eps(call: Call) -> Any:
    return _logit_backward if call["eps"] is None else _logit_backward_clamped


@pointwise("aten.logit_backward.default", dtypes=FLOAT, select=_by_eps, flops=4)
@triton.jit
def logit_backward(grad_output, self, eps):
    return _logit_backward_clamped(grad_output, self, eps)


# -- GELU --------------------------------------------------------------------------------------------------------------
#
# x Phi(x) with Phi the normal distribution function; "tanh" approximates Phi(x) by (1 + tanh(u)) / 2 = sigmoid(2 u),
# u = sqrt(2 / pi) (x + 0.044715 x**3).


@triton.jit
def _gelu(self):
    return 0.5 * self * (1 + tl.erf(self * 0.70710678118654752440))


@triton.jit
def _fast_gelu(self):
    # The normal distribution's tail beyond |x|, by its logarithm: the relative error is small, which that of erf is not near -1, and
    # of the slow instructions there is one, which decides after a matrix product.
    tail = tl.exp2(maths.polynomial(tl.abs(self), maths.LOG2_NORMAL_TAIL_16))
    return self * tl.where(self < 0, tail, 1 - tail)


@triton.jit
def _gelu_tanh(self):
    u = self * (1.5957691216057307118 + 0.071354816272600248776 * self * self)  # 2 u
    return maths.divide(self, 1 + maths.exp(-u))


@triton.jit
def _fast_gelu_tanh(self):
    u = self * (1.5957691216057307118 + 0.071354816272600248776 * self * self)
    return self / (1 + tl.exp(-u))


def _forward(call: Call) -> Any:
    return (_by_width(_fast_gelu, _gelu) if call["approximate"] == "none" else _by_width(_fast_gelu_tanh, _gelu_tanh))(call)


def _known_approximation(call: Call, common: torch.dtype) -> None:
    if call["approximate"] not in ("none", "tanh"):
        raise Decline(f"PyTorch rejects it: approximate={call['approximate']!r}")


@pointwise("aten.gelu.default", dtypes=FLOAT, select=_forward, check=_known_approximation, flops=8)
@triton.jit
def gelu(self):
    return _gelu(self)


@triton.jit
def _gelu_backward(grad_output, self):
    # The slope at -a, a = |x|, is exp(-a**2 / 2) (erfcx(a / sqrt(2)) / 2 - a / sqrt(2 pi)), and that at a is 1 less it: the sum
    # of erf and of x times the density would cancel in the tail.
    a = tl.abs(self)
    below = 0.5 * maths.erfcx_positive(a * 0.70710678118654752440) - 0.39894228040143267794 * a
    below = maths.exp_square(tl.where(a > 40, 40.0, a), -0.5) * below
    return grad_output * tl.where(self < 0, below, 1 - below)


@triton.jit
def _fast_gelu_backward(grad_output, self):
    # With E = exp(-a**2 / 2) and E Q the normal distribution's tail beyond a = |x|: the slope at -a is E (Q - a / sqrt(2 pi)),
    # and the slope at a is 1 less that.
    a = tl.abs(self)
    q = maths.polynomial(maths.fast_reciprocal(1 + 0.4 * a), maths.NORMAL_TAIL_16)
    below = tl.exp2(-0.72134752044448170368 * a * a) * (q - 0.39894228040143267794 * a)
    return grad_output * tl.where(self < 0, below, 1 - below)


@triton.jit
def _gelu_tanh_slope(self, s):
    # The derivative of x s with s = sigmoid(2 u), where s' = 2 s (1 - s) u'
    return s + self * (s * (1 - s)) * (1.5957691216057307118 + 0.21406444881780074633 * self * self)


@triton.jit
def _gelu_tanh_backward(grad_output, self):
    s = maths.sigmoid(self * (1.5957691216057307118 + 0.071354816272600248776 * self * self))
    return grad_output * _gelu_tanh_slope(self, s)


@triton.jit
def _fast_gelu_tanh_backward(grad_output, self):
    s = maths.fast_sigmoid(self * (1.5957691216057307118 + 0.071354816272600248776 * self * self))
    return grad_output * _gelu_tanh_slope(self, s)


def _backward(call: Call) -> Any:
    if call["approximate"] == "none":
        return _by_width(_fast_gelu_backward, _gelu_backward)(call)
    return _by_width(_fast_gelu_tanh_backward, _gelu_tanh_backward)(call)


@pointwise("aten.gelu_backward.default", dtypes=FLOAT, select=_backward, check=_known_approximation, flops=16)
@triton.jit
def gelu_backward(grad_output, self):
    return _gelu_backward(grad_output, self)


# -- GLU: one half of the input times the sigmoid of the other ---------------------------------------------------------


@triton.jit
def _glu(a, b):
    return a * maths.sigmoid(b)


@triton.jit
def _glu_backward(grad, a, b):
    s = maths.sigmoid(b)
    return grad * s, grad * a * (s * (1 - s))


def _halves(meta: TensorMeta, dim: int) -> tuple[TensorMeta, int]:
    """The first half of ``meta`` along ``dim``, and how many elements of memory later the second one starts."""
    if not meta.shape:
        raise Decline("PyTorch rejects it: glu needs a dimension to halve")
    if not -len(meta.shape) <= dim < len(meta.shape):
        raise Decline(f"PyTorch rejects it: dimension {dim} of {len(meta.shape)}")
    size = meta.shape[dim]
    if size % 2:
        raise Decline(f"PyTorch rejects it: {size} elements cannot be halved")
    shape = list(meta.shape)
    shape[dim] = size // 2
    return meta._replace(shape=tuple(shape)), size // 2 * meta.stride[dim]


@planned("aten.glu.default", dtype(*FLOAT), family="pointwise", kernel=_glu)
def glu(call: Call) -> Plan:
    """a * sigmoid(b) for the halves a, b of ``self`` along ``dim``."""
    meta, dim = call.args
    half, step = _halves(meta, dim)
    compute = opmath(meta.dtype)
    operands = [Operand(Arg(0), half, meta.dtype, compute), Operand(At(Arg(0), step), half, meta.dtype, compute)]
    return build(call, _glu, operands, [meta.dtype], flops=6)


@planned("aten.glu_backward.default", dtype(*FLOAT), family="pointwise", kernel=_glu_backward)
def glu_backward(call: Call) -> Plan:
    """The gradient of both halves, written to the halves of a contiguous result."""
    grad, meta, dim = call.args
    half, step = _halves(meta, dim)
    if grad.shape != half.shape or grad.dtype != meta.dtype:
        raise Decline("PyTorch rejects it: grad_output is not of half the input's shape, or not of its dtype")
    compute = opmath(meta.dtype)
    strides = contiguous_strides(meta.shape)
    result, result_step = _halves(meta._replace(stride=strides), dim)
    operands = [Operand(Arg(0), grad, grad.dtype, compute), Operand(Arg(1), half, meta.dtype, compute),
                Operand(At(Arg(1), step), half, meta.dtype, compute)]
    plan = build(Call(call.op, call.args, call.target, (result, result)), _glu_backward, operands, [], flops=10)
    where = {Into(0): Out(0), Into(1): At(Out(0), result_step)}
    launches = tuple([x._replace(args=(tuple([where[o] for o in x.args[0]]), *x.args[1:])) for x in plan.launches])
    return plan._replace(allocs=(Alloc(meta.shape, strides, meta.dtype),), launches=launches, returns=Out(0))
