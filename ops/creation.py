"""Creation of tensors: constants, ranges, the identity.

Only calls that name the mode's own device are served; strides, dtypes and defaults are PyTorch's. Source: the PyTorch
documentation of ``torch.zeros``, ``torch.full``, ``torch.arange`` and ``torch.eye``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl  # noqa: F401  (the interpreter wants to see it)

from gemsmode.ops.layout import channels_last_strides, preserved_strides
from gemsmode.ops.pointwise import Operand, build, index_operand
from gemsmode.ops.promotion import ALL, opmath
from gemsmode.plan import Decline, Num, Plan, contiguous_strides
from gemsmode.predicates import Predicate, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta


def _plain(call: Call) -> tuple[bool, str]:
    layout, pinned = call["layout"], call["pin_memory"]
    if layout not in (None, torch.strided):
        return False, f"layout {layout}"
    return (False, "pinned memory") if pinned else (True, "")


_PLAIN = Predicate("strided, not pinned", _plain)
_STATE = (torch.get_default_dtype,)


@triton.jit
def fill(value):
    return value


@triton.jit
def ramp(index, start, step):
    return start + index * step


@triton.jit
def diagonal_one(row, column):
    return row == column


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in ALL:
        raise Decline(f"{dtype_name(dtype)} is not handled")
    return dtype


def _number_dtype(value: Any) -> torch.dtype:
    if isinstance(value, complex):
        raise Decline("a complex fill value")
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.get_default_dtype()


def _scalar_kind(dtype: torch.dtype) -> str:
    return "fp64" if dtype == torch.float64 else "fp32" if dtype.is_floating_point else "i64"


def _filled(call: Call, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, value: int | None, index: int = -1) -> Plan:
    """A tensor full of ``value``, or of the number argument ``index``."""
    if any(s < 0 for s in shape):
        raise Decline("PyTorch rejects it: a negative size")
    if value is not None:
        # A constant becomes a zero-weighted index: no argument to pass.
        position = index_operand(shape, (0,) * len(shape), torch.int32)
        return build(call, zero if value == 0 else one, [position], [_checked(dtype)], shape, stride)
    compute = torch.float64 if dtype == torch.float64 else torch.float32 if dtype.is_floating_point else torch.int64
    number = Operand(Num(index, _scalar_kind(dtype)), None, compute, compute)
    return build(call, fill, [number], [_checked(dtype)], shape, stride)


@triton.jit
def zero(index):
    return index


@triton.jit
def one(index):
    return index + 1


def _fits(value: Any, dtype: torch.dtype) -> None:
    _checked(dtype)
    if not isinstance(value, (int, float)):
        raise Decline(f"a fill value of type {type(value).__name__}")
    if not dtype.is_floating_point and dtype != torch.bool:
        info = torch.iinfo(dtype)
        if not math.isfinite(value) or not info.min <= value <= info.max:
            raise Decline("PyTorch rejects it: the fill value is out of range")


@planned("aten.zeros.default", _PLAIN, family="creation", kernel=fill, state=_STATE)
def zeros(call: Call) -> Plan:
    shape = tuple(call["size"])
    return _filled(call, shape, contiguous_strides(shape), call["dtype"] or torch.get_default_dtype(), 0)


@planned("aten.ones.default", _PLAIN, family="creation", kernel=fill, state=_STATE)
def ones(call: Call) -> Plan:
    shape = tuple(call["size"])
    return _filled(call, shape, contiguous_strides(shape), call["dtype"] or torch.get_default_dtype(), 1)


@planned("aten.full.default", _PLAIN, family="creation", kernel=fill, state=_STATE, by_value=("fill_value",))
def full(call: Call) -> Plan:
    shape, value = tuple(call["size"]), call["fill_value"]
    dtype = call["dtype"] or _number_dtype(value)
    _fits(value, dtype)
    return _filled(call, shape, contiguous_strides(shape), dtype, None, 1)


@planned("aten.scalar_tensor.default", _PLAIN, family="creation", kernel=fill, state=_STATE, by_value=("s",))
def scalar_tensor(call: Call) -> Plan:
    dtype = call["dtype"] or torch.get_default_dtype()
    _fits(call["s"], dtype)
    return _filled(call, (), (), dtype, None, 0)


def _like_strides(call: Call, x: TensorMeta) -> tuple[int, ...]:
    wanted = call["memory_format"]
    if wanted in (None, torch.preserve_format):
        return preserved_strides(x)
    if wanted == torch.contiguous_format:
        return contiguous_strides(x.shape)
    last = channels_last_strides(x.shape)
    if last is None or (wanted == torch.channels_last) != (x.ndim == 4):
        raise Decline("PyTorch rejects it: the memory format does not fit the number of dimensions")
    return last


def _same_device(call: Call) -> None:
    device = call["device"]
    if device is not None and torch.device(device).type != call.args[0].device.type:
        raise Decline(f"the result is for device {device}")


@planned("aten.zeros_like.default", _PLAIN, family="creation", kernel=fill)
def zeros_like(call: Call) -> Plan:
    _same_device(call)
    x = call.args[0]
    return _filled(call, x.shape, _like_strides(call, x), call["dtype"] or x.dtype, 0)


@planned("aten.ones_like.default", _PLAIN, family="creation", kernel=fill)
def ones_like(call: Call) -> Plan:
    _same_device(call)
    x = call.args[0]
    return _filled(call, x.shape, _like_strides(call, x), call["dtype"] or x.dtype, 1)


@planned("aten.full_like.default", _PLAIN, family="creation", kernel=fill, by_value=("fill_value",))
def full_like(call: Call) -> Plan:
    _same_device(call)
    x, value = call.args[:2]
    dtype = call["dtype"] or x.dtype
    _fits(value, dtype)
    return _filled(call, x.shape, _like_strides(call, x), dtype, None, 1)


@planned("aten.new_zeros.default", _PLAIN, family="creation", kernel=fill)
def new_zeros(call: Call) -> Plan:
    _same_device(call)
    shape = tuple(call["size"])
    return _filled(call, shape, contiguous_strides(shape), call["dtype"] or call.args[0].dtype, 0)


@planned("aten.new_ones.default", _PLAIN, family="creation", kernel=fill)
def new_ones(call: Call) -> Plan:
    _same_device(call)
    shape = tuple(call["size"])
    return _filled(call, shape, contiguous_strides(shape), call["dtype"] or call.args[0].dtype, 1)


@planned("aten.new_full.default", _PLAIN, family="creation", kernel=fill, by_value=("fill_value",))
def new_full(call: Call) -> Plan:
    _same_device(call)
    shape, value = tuple(call["size"]), call["fill_value"]
    dtype = call["dtype"] or call.args[0].dtype
    _fits(value, dtype)
    return _filled(call, shape, contiguous_strides(shape), dtype, None, 2)


# -- ranges ------------------------------------------------------------------------------------------------------------


def _arange(call: Call, start: Any, end: Any, step: Any, positions: tuple[int | None, int | None]) -> Plan:
    """``positions``: which arguments hold start and step (None: 0 and 1)."""
    if any(isinstance(v, complex) for v in (start, end, step)) or step == 0 or (end - start) * step < 0:
        raise Decline("PyTorch rejects it: the bounds and the step disagree")
    integral = all(isinstance(v, int) for v in (start, end, step))
    dtype = call["dtype"] or (torch.int64 if integral else torch.get_default_dtype())
    if dtype == torch.bool:
        raise Decline("a range of bools")
    n = -(-(end - start) // step) if integral else math.ceil((end - start) / step)
    compute = opmath(dtype)
    if compute.is_floating_point and compute != torch.float64 and n >= 2**24:
        raise Decline("a float range longer than float32 counts exactly")
    if not dtype.is_floating_point and not integral:
        raise Decline("an integer range with fractional bounds")
    shape = (int(n),)
    index = index_operand(shape, (1,), torch.int64)._replace(compute=compute)
    kind = _scalar_kind(compute)
    if positions == (None, None):
        return build(call, fill, [index], [_checked(dtype)], shape, (1,))
    numbers = [Operand(Num(p, kind), None, compute, compute) for p in positions if p is not None]
    return build(call, ramp if len(numbers) == 2 else unit_ramp, [index, *numbers], [_checked(dtype)], shape, (1,))


@triton.jit
def unit_ramp(index, start):
    return start + index


@planned("aten.arange.default", _PLAIN, family="creation", kernel=ramp, state=_STATE, by_value=("end",))
def arange(call: Call) -> Plan:
    return _arange(call, 0, call["end"], 1, (None, None))


@planned("aten.arange.start", _PLAIN, family="creation", kernel=ramp, state=_STATE, by_value=("start", "end"))
def arange_start(call: Call) -> Plan:
    return _arange(call, call["start"], call["end"], 1, (0, None))


@planned("aten.arange.start_step", _PLAIN, family="creation", kernel=ramp, state=_STATE, by_value=("start", "end", "step"))
def arange_start_step(call: Call) -> Plan:
    return _arange(call, call["start"], call["end"], call["step"], (0, 2))


@planned("aten.eye.default", _PLAIN, family="creation", kernel=diagonal_one, state=_STATE)
def eye(call: Call) -> Plan:
    return _eye(call, call["n"], call["n"])


@planned("aten.eye.m", _PLAIN, family="creation", kernel=diagonal_one, state=_STATE)
def eye_m(call: Call) -> Plan:
    return _eye(call, call["n"], call["m"])


def _eye(call: Call, n: int, m: int) -> Plan:
    if n < 0 or m < 0:
        raise Decline("PyTorch rejects it: a negative size")
    dtype = _checked(call["dtype"] or torch.get_default_dtype())
    row, column = (index_operand((n, m), w, torch.int32) for w in ((1, 0), (0, 1)))
    return build(call, diagonal_one, [row, column], [dtype], (n, m), contiguous_strides((n, m)))
