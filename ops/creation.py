"""Creation of tensors: constants, ranges, points between bounds, windows, the identity.

Only calls that name the mode's own device are served; strides, dtypes and defaults are PyTorch's. Source: the PyTorch
documentation of ``torch.zeros``, ``torch.full``, ``torch.arange`` and ``torch.eye``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.layout import channels_last_strides, preserved_strides
from gemsmode.ops.pointwise import Operand, build, index_operand
from gemsmode.ops.promotion import ALL, opmath
from gemsmode.plan import Decline, Num, Plan, contiguous_strides
from gemsmode.predicates import Predicate, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters


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


# -- points between bounds ---------------------------------------------------------------------------------------------


@triton.jit
def spaced(index, start, end, last):
    """Point number ``index`` of 0 .. last, counted from the nearer end so that both ends are met."""
    step = (end - start) / last
    return tl.where(2.0 * index < last, start + step * index, end - step * (last - index))


def _number(value: float, compute: torch.dtype) -> Operand:
    """A number known to the plan; the kernel sees a float32."""
    return Operand(float(value), None, compute, compute)  # type: ignore[arg-type]


def _spaced(call: Call, function: Any, compute: torch.dtype, dtype: torch.dtype, *more: Operand) -> Plan:
    start, end, steps = call.args[:3]
    if any(isinstance(v, complex) for v in (start, end)) or steps < 0:
        raise Decline("PyTorch rejects it, or complex bounds")
    if steps >= 2**24:
        raise Decline("more points than float32 counts exactly")
    if not dtype.is_floating_point and (dtype == torch.bool or any(isinstance(v, float) and not v.is_integer() for v in (start, end))):
        raise Decline("bool, or fractional bounds of integer points")
    shape = (steps,)
    index = index_operand(shape, (1,), torch.int32)._replace(compute=compute)
    kind = _scalar_kind(compute)
    ends = [Operand(Num(i, kind), None, compute, compute) for i in (0, 1)]
    if steps == 1:
        return build(call, fill if function is spaced else power_of, [ends[0], *more], [_checked(dtype)], shape, (1,))
    return build(call, function, [index, *ends, _number(steps - 1, compute), *more], [_checked(dtype)], shape, (1,))


@planned("aten.linspace.default", _PLAIN, family="creation", kernel=spaced, state=_STATE, by_value=("start", "end"))
def linspace(call: Call) -> Plan:
    """start, end, steps -> so many points at equal distances, both ends among them."""
    dtype = call["dtype"] or torch.get_default_dtype()
    return _spaced(call, spaced, opmath(dtype) if dtype.is_floating_point else torch.float64, dtype)


@triton.jit
def powers_of(index, start, end, last, base):
    return tl.exp(spaced(index, start, end, last) * tl.log(base))


@triton.jit
def power_of(start, base):
    return tl.exp(start * tl.log(base))


@planned("aten.logspace.default", _PLAIN, family="creation", kernel=powers_of, state=_STATE, by_value=("start", "end", "base"))
def logspace(call: Call) -> Plan:
    """start, end, steps, base -> the base to the power of each point of ``linspace``; in float64."""
    dtype = call["dtype"] or torch.get_default_dtype()
    if not dtype.is_floating_point or not call["base"] > 0:
        raise Decline("integer points, or a base that is not positive")
    return _spaced(call, powers_of, torch.float64, dtype, Operand(Num(3, "fp64"), None, torch.float64, torch.float64))


def _range(call: Call, step: Any, positions: tuple[int, int | None]) -> Plan:
    start, end = call["start"], call["end"]
    if any(isinstance(v, complex) or not math.isfinite(v) for v in (start, end, step)) or step == 0 or (end - start) * step < 0:
        raise Decline("PyTorch rejects it: the bounds and the step disagree")
    dtype = call["dtype"] or torch.get_default_dtype()
    if dtype == torch.bool or (not dtype.is_floating_point and any(isinstance(v, float) for v in (start, end, step))):
        raise Decline("bool, or fractional bounds of integers")
    n = math.floor((end - start) / step) + 1
    if n >= 2**24:
        raise Decline("more points than float32 counts exactly")
    compute = opmath(dtype)
    index = index_operand((n,), (1,), torch.int64)._replace(compute=compute)
    numbers = [Operand(Num(p, _scalar_kind(compute)), None, compute, compute) for p in positions if p is not None]
    return build(call, ramp if len(numbers) == 2 else unit_ramp, [index, *numbers], [_checked(dtype)], (n,), (1,))


@planned("aten.range.default", _PLAIN, family="creation", kernel=ramp, state=_STATE, by_value=("start", "end"))
def range_(call: Call) -> Plan:
    """start, end: like ``arange``, with the end."""
    return _range(call, 1, (0, None))


@planned("aten.range.step", _PLAIN, family="creation", kernel=ramp, state=_STATE, by_value=("start", "end", "step"))
def range_step(call: Call) -> Plan:
    return _range(call, call["step"], (0, 2))


# -- windows -----------------------------------------------------------------------------------------------------------


@triton.jit
def hann(index, last):
    return 0.5 - 0.5 * tl.cos(6.283185307179586 * index / last)


@triton.jit
def hamming(index, last):
    return 0.54 - 0.46 * tl.cos(6.283185307179586 * index / last)


@triton.jit
def cosine_window(index, last, alpha, beta):
    return alpha - beta * tl.cos(6.283185307179586 * index / last)


@triton.jit
def blackman(index, last):
    angle = 6.283185307179586 * index / last
    return 0.42 - 0.5 * tl.cos(angle) + 0.08 * tl.cos(2.0 * angle)


@triton.jit
def bartlett(index, last):
    return 1.0 - tl.abs(2.0 * index / last - 1.0)


def _window(call: Call, function: Any, *numbers: int) -> Plan:
    """A window of ``function``; a periodic one (the overloads that do not say are) stops before the point at which it would close."""
    n = call["window_length"]
    periodic = call["periodic"] if any(p.name == "periodic" for p in parameters(call.op)) else True
    dtype = call["dtype"] or torch.get_default_dtype()
    if n < 0 or not dtype.is_floating_point or n >= 2**24:
        raise Decline("PyTorch rejects it: a negative length or a dtype that is not floating")
    shape = (n,)
    if n <= 1:
        return _filled(call, shape, (1,), dtype, 1)
    compute = opmath(dtype)
    index = index_operand(shape, (1,), torch.int32)._replace(compute=compute)
    more = [Operand(Num(i, _scalar_kind(compute)), None, compute, compute) for i in numbers]
    return build(call, function, [index, _number(n if periodic else n - 1, compute), *more], [_checked(dtype)], shape, (1,))


@planned(["aten.hann_window.default", "aten.hann_window.periodic"], _PLAIN, family="creation", kernel=hann, state=_STATE)
def hann_window(call: Call) -> Plan:
    return _window(call, hann)


@planned(["aten.hamming_window.default", "aten.hamming_window.periodic"], _PLAIN, family="creation", kernel=hamming, state=_STATE)
def hamming_window(call: Call) -> Plan:
    return _window(call, hamming)


@planned("aten.hamming_window.periodic_alpha_beta", _PLAIN, family="creation", kernel=cosine_window, state=_STATE)
def hamming_window_alpha_beta(call: Call) -> Plan:
    return _window(call, cosine_window, 2, 3)


@planned(["aten.blackman_window.default", "aten.blackman_window.periodic"], _PLAIN, family="creation", kernel=blackman, state=_STATE)
def blackman_window(call: Call) -> Plan:
    return _window(call, blackman)


@planned(["aten.bartlett_window.default", "aten.bartlett_window.periodic"], _PLAIN, family="creation", kernel=bartlett, state=_STATE)
def bartlett_window(call: Call) -> Plan:
    return _window(call, bartlett)
