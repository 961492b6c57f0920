"""Pointwise ops of three operands: selection, clamping, interpolation, fused products."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops import maths
from gemsmode.ops.binary import require_fits, require_tensors
from gemsmode.ops.layout import broadcast_shape
from gemsmode.ops.pointwise import Operand, build, pointwise
from gemsmode.ops.promotion import ALL, FLOAT, NUMERIC
from gemsmode.plan import Arg, Decline, Num, Plan, contiguous_strides
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call

# -- conversion --------------------------------------------------------------------------------------------------------


def via(source: torch.dtype, to: torch.dtype) -> torch.dtype:
    """The dtype between ``source`` and ``to`` on the way that PyTorch's conversions take (see ``ops/copy.py``)."""
    if source.is_floating_point and to in (torch.uint8, torch.int8, torch.int16):
        return torch.int64 if to == torch.uint8 else torch.int32
    if to in (torch.float16, torch.bfloat16) and source != to:
        return torch.float32
    return to if to == torch.bool or source == torch.bool else source


def number_as(index: int, to: torch.dtype, is_tensor: bool = False) -> Operand:
    """The number argument ``index`` converted to ``to`` as PyTorch converts a scalar: cut off for integers, ``!= 0`` for bool."""
    if to == torch.bool:
        return Operand(Num(index, "fp64", None, is_tensor), None, to, to)
    kind = "fp64" if to == torch.float64 else "fp32" if to.is_floating_point else "i64"
    return Operand(Num(index, kind, None, is_tensor), None, to, to)


def value_as(call: Call, index: int, to: torch.dtype) -> Operand:
    """The tensor argument ``index`` converted to ``to``; a 0-dim CPU tensor beside GPU tensors is read."""
    value = call.args[index]
    if value.device.type == call.target.device_type:
        return Operand(Arg(index), value, via(value.dtype, to), to)
    if value.dtype.is_floating_point and not to.is_floating_point and to != torch.bool:
        raise Decline("a CPU tensor of floats for a tensor of integers")
    return number_as(index, to, True)


# -- selection ---------------------------------------------------------------------------------------------------------


def _check_condition(call: Call, common: torch.dtype) -> None:
    if call.args[0].dtype not in (torch.bool, torch.uint8):
        raise Decline("PyTorch rejects it: the condition is neither bool nor uint8")


@pointwise("aten.where.self", keep=("condition",), compute="result", check=_check_condition)
@triton.jit
def where(condition, self, other):
    return tl.where(condition != 0, self, other)


@triton.jit
def masked_fill(self, mask, value):
    return tl.where(mask, value, self)


def _masked_fill(call: Call, value: Operand) -> Plan:
    x, mask = call.args[:2]
    if x.dtype not in ALL or mask.dtype != torch.bool:
        raise Decline("PyTorch rejects it: the mask is not bool" if x.dtype in ALL else f"{x.dtype} is not handled")
    if mask.device.type != call.target.device_type or x.device.type != call.target.device_type:
        raise Decline("a CPU tensor among the arguments")
    shape = broadcast_shape([x.shape, mask.shape])
    operands = [Operand(Arg(0), x, x.dtype, x.dtype), Operand(Arg(1), mask, torch.bool, torch.bool), value]
    # PyTorch clones contiguously and fills.
    return build(call, masked_fill, operands, [x.dtype], shape, contiguous_strides(shape))


@planned("aten.masked_fill.Scalar", family="pointwise", kernel=masked_fill, name="masked_fill", by_value=("value",), writes_out=True)
def masked_fill_number(call: Call) -> Plan:
    """``value`` where ``mask`` holds; self and mask broadcast."""
    require_fits(call.args[2], call.args[0].dtype)
    return _masked_fill(call, number_as(2, call.args[0].dtype))


@planned("aten.masked_fill.Tensor", dtype(*ALL), family="pointwise", kernel=masked_fill, name="masked_fill_tensor", writes_out=True)
def masked_fill_tensor(call: Call) -> Plan:
    """As with a number; ``value`` is a 0-dim tensor."""
    x, _, value = call.args
    if value.shape:
        raise Decline("PyTorch rejects it: the value is no 0-dim tensor")
    return _masked_fill(call, value_as(call, 2, x.dtype))


# -- clamping ----------------------------------------------------------------------------------------------------------


@triton.jit
def clamp_min(self, min):
    """The larger of the two; NaN if either is."""
    return tl.where((self < min) | (min != min), min, self)


@triton.jit
def clamp_max(self, max):
    return tl.where((self > max) | (max != max), max, self)


@triton.jit
def clamp(self, min, max):
    return clamp_max(clamp_min(self, min), max)


def _which_clamp(call: Call) -> Any:
    low, high = call.args[1:3]
    return clamp_max if low is None else clamp_min if high is None else clamp


def _check_clamp(call: Call, common: torch.dtype) -> None:
    if all(limit is None for limit in call.args[1:]):
        raise Decline("PyTorch rejects it: neither min nor max")
    for limit in call.args[1:]:
        require_fits(limit, common)
        if common == torch.uint8 and limit is not None and limit < 0:
            raise Decline("a negative limit of unsigned integers, which wraps around before PyTorch 2.15 and limits nothing since")


def _check_clamp_tensor(call: Call, common: torch.dtype) -> None:
    require_tensors(call, common)
    if all(limit is None for limit in call.args[1:]):
        raise Decline("PyTorch rejects it: neither min nor max")
    if common == torch.bool and len(call.args) == 3 and None not in call.args:
        raise Decline("PyTorch rejects it: bool between two limits")


pointwise("aten.clamp.default", dtypes=NUMERIC, promote=("self", "min", "max"), by_value=("min", "max"), round_numbers=True,
          select=_which_clamp, check=_check_clamp)(clamp)
pointwise("aten.clamp.Tensor", promote=("self", "min", "max"), select=_which_clamp, check=_check_clamp_tensor, name="clamp_tensor")(clamp)
pointwise("aten.clamp_min.default", dtypes=NUMERIC, promote=("self", "min"), by_value=("min",), round_numbers=True,
          check=_check_clamp)(clamp_min)
pointwise("aten.clamp_min.Tensor", check=_check_clamp_tensor, name="clamp_min_tensor")(clamp_min)
pointwise("aten.clamp_max.default", dtypes=NUMERIC, promote=("self", "max"), by_value=("max",), round_numbers=True,
          check=_check_clamp)(clamp_max)
pointwise("aten.clamp_max.Tensor", check=_check_clamp_tensor, name="clamp_max_tensor")(clamp_max)


# -- interpolation and products ----------------------------------------------------------------------------------------


def _check_lerp(call: Call, common: torch.dtype) -> None:
    if any(t.dtype != common for t in call.tensors):
        raise Decline("several dtypes")


@pointwise("aten.lerp.Tensor", dtypes=FLOAT, check=_check_lerp)
@pointwise("aten.lerp.Scalar", dtypes=FLOAT, check=_check_lerp, name="lerp_number")
@triton.jit
def lerp(self, end, weight):
    """self + weight (end - self), from the nearer end so that both ends are met exactly."""
    distance = end - self
    return tl.where(tl.abs(weight) < 0.5, self + weight * distance, end - distance * (1 - weight))


def _check_value(call: Call, common: torch.dtype) -> None:
    value = call["value"]
    if isinstance(value, complex) or (isinstance(value, float) and not common.is_floating_point):
        raise Decline("a value of another kind than the tensors")


@pointwise("aten.addcmul.default", dtypes=NUMERIC, ranged={"value": 1}, check=_check_value, flops=3)
@triton.jit
def addcmul(self, tensor1, tensor2, value):
    return self + value * tensor1 * tensor2


@pointwise("aten.addcdiv.default", dtypes=FLOAT, check=_check_value, flops=3)
@triton.jit
def addcdiv(self, tensor1, tensor2, value):
    return self + maths.divide(value * tensor1, tensor2)
