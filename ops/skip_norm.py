"""RMS norm and layer norm as ops of gemsmode's own, alone or after adding a residual, forward and backward.

With ``s = x + r`` (``s = x`` without a residual), rounded to the result's dtype as an unfused addition would be:

    rms_norm:       y = s / sqrt(mean(s^2) + eps) * w
    layer norm:     y = (s - mean(s)) / sqrt(var(s) + eps) * w + b

over the last dimensions. x and r are read once, y and s written once; the gradient of s is added to that of the norm
in the pass that writes it. The kernels, and the formulas of backward, are those of ``norm.py``.

Parameters may be wider than the input (float32 beside 16 bits); results have the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl  # noqa: F401  (kernels of this module's rules run in its interpreter)

from gemsmode.custom import custom_op, wanted
from gemsmode.ops.norm import eps_argument, norm_backward_kernel, norm_kernel, plan_norm, plan_norm_backward
from gemsmode.ops.promotion import FLOAT, opmath
from gemsmode.plan import Alloc, Arg, Decline, Disjoint, Out, Plan
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

# -- references --------------------------------------------------------------------------------------------------------


def _statistics_shape(x: torch.Tensor, normalized_shape: Sequence[int]) -> list[int]:
    return [*x.shape[:x.ndim - len(normalized_shape)], *[1] * len(normalized_shape)]


def _normalize(x: torch.Tensor, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float | None, rms: bool) -> tuple[Any, ...]:
    """(y, mean, rstd) by PyTorch's own ops; differentiable."""
    if not normalized_shape or list(x.shape[x.ndim - len(normalized_shape):]) != list(normalized_shape):
        raise RuntimeError(f"the input's shape {list(x.shape)} does not end in normalized_shape {list(normalized_shape)}")
    acc = opmath(x.dtype)
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    wide = x.to(acc)
    mean = wide.mean(dims, keepdim=True)
    centred = wide if rms else wide - mean
    rstd = ((centred * centred).mean(dims, keepdim=True) + (torch.finfo(acc).eps if eps is None else eps)).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    y, _, rstd = _normalize(input, normalized_shape, weight, None, eps, True)
    return y, rstd


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """What stands for a result that was not asked for."""
    return like.new_empty(0)


def _skip_rms_norm(input: Any, residual: Any, normalized_shape: Any, weight: Any = None, eps: Any = None, keep_sum: bool = True) -> Any:
    total = input + residual
    y, _, rstd = _normalize(total, normalized_shape, weight, None, eps, True)
    return y, total if keep_sum else _nothing(total), rstd


def _skip_layer_norm(input: Any, residual: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
                     keep_sum: bool = True) -> Any:
    total = input + residual
    y, mean, rstd = _normalize(total, normalized_shape, weight, bias, eps, False)
    return y, total if keep_sum else _nothing(total), mean, rstd


def _fused_add_rms_norm(input: Any, residual: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> None:
    residual.add_(input)
    input.copy_(_normalize(residual, normalized_shape, weight, None, eps, True)[0])


def _norm_backward(grad_out: Any, input: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any, grad_sum: Any,
                   output_mask: Any) -> Any:
    acc = opmath(input.dtype)
    leading = list(range(input.ndim - len(normalized_shape)))
    dims = list(range(len(leading), input.ndim))
    g, h = grad_out.to(acc), input.to(acc)
    h = (h if mean is None else h - mean) * rstd
    v = g if weight is None else g * weight
    dx = v - h * (v * h).mean(dims, keepdim=True)
    if mean is not None:
        dx = dx - v.mean(dims, keepdim=True)
    dx = dx * rstd
    if grad_sum is not None:
        dx = dx + grad_sum
    kind = input.dtype if weight is None else weight.dtype
    sums = [t.sum(leading) if leading else t for t in (g * h, g)]
    return (dx.to(input.dtype) if output_mask[0] else _nothing(input),
            *[s.to(kind) if kept else _nothing(input).to(kind) for s, kept in zip(sums, output_mask[1:])])


# -- fakes -------------------------------------------------------------------------------------------------------------


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _statistic(x: torch.Tensor, normalized_shape: Sequence[int]) -> torch.Tensor:
    return x.new_empty(_statistics_shape(x, normalized_shape), dtype=opmath(x.dtype))


def _fake_rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    return _like(input), _statistic(input, normalized_shape)


def _fake_skip_rms_norm(input: Any, residual: Any, normalized_shape: Any, weight: Any = None, eps: Any = None,
                        keep_sum: bool = True) -> Any:
    y = _like(input, torch.promote_types(input.dtype, residual.dtype))
    return y, torch.empty_like(y) if keep_sum else _nothing(y), _statistic(y, normalized_shape)


def _fake_skip_layer_norm(input: Any, residual: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
                          keep_sum: bool = True) -> Any:
    y, total, rstd = _fake_skip_rms_norm(input, residual, normalized_shape, weight, eps, keep_sum)
    return y, total, torch.empty_like(rstd), rstd


def _fake_in_place(*args: Any) -> None:
    return None


def _fake_backward(grad_out: Any, input: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any, grad_sum: Any,
                   output_mask: Any) -> Any:
    kind = input.dtype if weight is None else weight.dtype
    return (_like(input) if output_mask[0] else _nothing(input),
            *[input.new_empty(normalized_shape if kept else 0, dtype=kind) for kept in output_mask[1:]])


# -- ops ---------------------------------------------------------------------------------------------------------------

rms_norm = custom_op(
    "rms_norm(Tensor input, int[] normalized_shape, Tensor? weight=None, float? eps=None) -> (Tensor, Tensor)",
    reference=_rms_norm, fake=_fake_rms_norm)
"""(y, rstd)"""

skip_rms_norm = custom_op(
    "skip_rms_norm(Tensor input, Tensor residual, int[] normalized_shape, Tensor? weight=None, float? eps=None, "
    "bool keep_sum=True) -> (Tensor, Tensor, Tensor)", reference=_skip_rms_norm, fake=_fake_skip_rms_norm)
"""(y, input + residual or an empty tensor, rstd)"""

skip_layer_norm = custom_op(
    "skip_layer_norm(Tensor input, Tensor residual, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    "bool keep_sum=True) -> (Tensor, Tensor, Tensor, Tensor)", reference=_skip_layer_norm, fake=_fake_skip_layer_norm)
"""(y, input + residual or an empty tensor, mean, rstd)"""

fused_add_rms_norm = custom_op(
    "fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, int[] normalized_shape, Tensor? weight=None, float? eps=None) -> ()",
    reference=_fused_add_rms_norm, fake=_fake_in_place)
"""residual += input; input = rms_norm(residual)"""

norm_backward = custom_op(
    "norm_backward(Tensor grad_out, Tensor input, int[] normalized_shape, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? grad_sum, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)", reference=_norm_backward, fake=_fake_backward)
"""Gradients of input (plus ``grad_sum``), weight and bias; empty ones where ``output_mask`` says so. ``mean`` is None for RMS norm."""

# -- rules -------------------------------------------------------------------------------------------------------------


def _result_dtype(call: Call) -> torch.dtype:
    """The dtype of a sum of input and residual.

    Raises:
        Decline: one is computed in float64 and the other is not.
    """
    x, r = call.args[0], call.args[1]
    if opmath(x.dtype) != opmath(r.dtype):
        raise Decline("an input and a residual of which one alone is float64")
    return torch.promote_types(x.dtype, r.dtype)


def _parameters(call: Call, *indices: int) -> None:
    x = call.args[0]
    for i in indices:
        if call.args[i] is not None and opmath(call.args[i].dtype) != opmath(x.dtype):
            raise Decline("a parameter and an input of which one alone is float64")


def _with_nothing(plan: Plan, results: Sequence[Any], kinds: Sequence[torch.dtype]) -> Plan:
    """``plan`` returning ``results``, an empty tensor of the dtype in ``kinds`` for each None."""
    allocs, returns = list(plan.allocs), []
    for result, kind in zip(results, kinds):
        if result is None:
            result = Out(len(allocs))
            allocs.append(Alloc((0,), (1,), kind))
        returns.append(result)
    return plan._replace(allocs=tuple(allocs), returns=tuple(returns))


@planned("gemsmode.rms_norm.default", dtype(*FLOAT), family="fused", kernel=norm_kernel, name="rms_norm")
def plan_rms_norm(call: Call) -> Plan:
    x = call["input"]
    _parameters(call, 2)
    return plan_norm(call, eps_argument(call, 3, x), (x.dtype, None, opmath(x.dtype)), 2, None, rms=True)


@planned("gemsmode.skip_rms_norm.default", dtype(*FLOAT), family="fused", kernel=norm_kernel, name="skip_rms_norm")
def plan_skip_rms_norm(call: Call) -> Plan:
    kind = _result_dtype(call)
    _parameters(call, 3)
    keep = call["keep_sum"]
    plan = plan_norm(call, eps_argument(call, 4, call["input"]), (kind, None, opmath(kind)), 3, None, rms=True, skip=1, total=keep)
    return _with_nothing(plan, (Out(0), Out(2) if keep else None, Out(1)), (kind,) * 3)


@planned("gemsmode.skip_layer_norm.default", dtype(*FLOAT), family="fused", kernel=norm_kernel, name="skip_layer_norm")
def plan_skip_layer_norm(call: Call) -> Plan:
    kind = _result_dtype(call)
    _parameters(call, 3, 4)
    keep = call["keep_sum"]
    statistics = opmath(kind)
    plan = plan_norm(call, eps_argument(call, 5, call["input"]), (kind, statistics, statistics), 3, 4, rms=False, skip=1, total=keep)
    return _with_nothing(plan, (Out(0), Out(3) if keep else None, Out(1), Out(2)), (kind,) * 4)


@planned("gemsmode.fused_add_rms_norm.default", dtype(*FLOAT), family="fused", kernel=norm_kernel, name="fused_add_rms_norm")
def plan_fused_add_rms_norm(call: Call) -> Plan:
    x, residual = call["input"], call["residual"]
    _parameters(call, 3)
    if x.dtype != residual.dtype or not (x.is_contiguous and residual.is_contiguous):
        raise Decline("an input and a residual that are not contiguous, or of two dtypes")
    plan = plan_norm(call, eps_argument(call, 4, x), (x.dtype, None, None), 3, None, rms=True, skip=1, total=True)
    into = {Out(0): Arg(0), Out(1): Arg(1)}

    def written(value: Any) -> Any:
        if value.__class__ is tuple:
            return tuple([written(v) for v in value])
        return into[value] if value.__class__ is Out else value

    def apart(a: int, b: int) -> Disjoint:
        one, other = call.args[a], call.args[b]
        return Disjoint(Arg(a), Arg(b), one.extent * one.dtype.itemsize, other.extent * other.dtype.itemsize, False)

    pairs = [(0, 1), *([(0, 3), (1, 3)] if call["weight"] is not None else [])]
    launches = tuple([step._replace(args=written(step.args)) for step in plan.launches])
    return plan._replace(allocs=(), launches=launches, returns=None, disjoint=tuple([apart(a, b) for a, b in pairs]))


@planned("gemsmode.norm_backward.default", dtype(*FLOAT), family="fused", kernel=norm_backward_kernel, name="norm_backward")
def plan_backward(call: Call) -> Plan:
    x: TensorMeta = call["input"]
    weight = call["weight"]
    _parameters(call, 5)
    kind = x.dtype if weight is None else weight.dtype
    for statistic in (call["mean"], call["rstd"]):
        if statistic is not None and statistic.dtype != opmath(x.dtype):
            raise Decline("saved statistics of another dtype than forward gives")
    mean = None if call["mean"] is None else 3
    added = None if call["grad_sum"] is None else 6
    plan = plan_norm_backward(call, mean, 4, 5, tuple(call["output_mask"]), kind, 3, added)
    return _with_nothing(plan, plan.returns, (x.dtype, kind, kind))


# -- gradients ---------------------------------------------------------------------------------------------------------


def _saved(ctx: Any, x: Any, normalized_shape: Any, weight: Any, mean: Any, rstd: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*x, weight, mean, rstd)
    ctx.normalized_shape = list(normalized_shape)


def _gradients(ctx: Any, grad_out: Any, grad_sum: Any, mask: Sequence[bool]) -> tuple[Any, Any, Any]:
    """Gradients of the normalized tensor, the weight and the bias."""
    *x, weight, mean, rstd = ctx.saved_tensors
    if grad_out is None:
        return grad_sum, None, None
    total = x[0] if len(x) == 1 else x[0] + x[1]
    found = norm_backward(grad_out, total, ctx.normalized_shape, mean, rstd, weight, grad_sum, list(mask))
    dx, dw, db = (g if is_wanted else None for g, is_wanted in zip(found, mask))
    return dx, dw, db


def _setup_rms_norm(ctx: Any, inputs: Any, output: Any) -> None:
    _saved(ctx, inputs[:1], inputs[1], inputs[2], None, output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradient(ctx: Any, grad_out: Any, _: Any) -> Any:
    dx, dw, _ = _gradients(ctx, grad_out, None, (*wanted(ctx, 0, 2), False))
    return dx, None, dw, None


def _setup_skip(ctx: Any, inputs: Any, output: Any) -> None:
    layer = len(output) == 4
    weight = inputs[3]
    # Without the sum both addends are kept, and added again.
    x = output[1:2] if inputs[-1] else inputs[:2]
    _saved(ctx, x, inputs[2], weight, output[2] if layer else None, output[-1])
    ctx.mark_non_differentiable(*output[2:], *([] if inputs[-1] else output[1:2]))
    ctx.is_layer_norm = layer


def _skip_gradient(ctx: Any, grad_out: Any, grad_sum: Any, *_: Any) -> Any:
    layer = ctx.is_layer_norm
    dx, dw, db = _gradients(ctx, grad_out, grad_sum, (any(wanted(ctx, 0, 1)), *wanted(ctx, 3), *(wanted(ctx, 4) if layer else (False,))))
    return (dx, dx, None, dw, db, None, None) if layer else (dx, dx, None, dw, None, None)


rms_norm.differentiate(_setup_rms_norm, _rms_norm_gradient)
skip_rms_norm.differentiate(_setup_skip, _skip_gradient)
skip_layer_norm.differentiate(_setup_skip, _skip_gradient)
norm_backward.not_differentiable()
