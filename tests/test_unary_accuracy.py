"""Errors of unary maths and activations in units in the last place, against references in 40 digits or float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from support import decision

from gemsmode import GemsMode
from gemsmode.registry import find_op


def _both(low: float, high: float, n: int = 40) -> np.ndarray:
    """Magnitudes from ``low`` to ``high``, of either sign."""
    points = np.geomspace(low, high, n)
    return np.concatenate([points, -points])


def _line(low: float, high: float, n: int = 80) -> np.ndarray:
    return np.linspace(low, high, n)


_SPREAD = np.concatenate([_line(-12, 12, 121), _both(1e-8, 1), _both(1, 87)])
_UNIT = np.concatenate([_line(-0.9999, 0.9999), _both(1e-8, 0.9), 1 - np.geomspace(1e-7, 0.3, 40)])
_POSITIVE = np.concatenate([np.geomspace(1e-6, 1e6, 80), _line(0.01, 12.01, 97), 1 + _both(1e-6, 0.1), 2 + _both(1e-6, 0.1)])


class Case(NamedTuple):
    """An op, its exact value, where it is looked at, and the largest error allowed in float32 and in float64."""

    op: str
    exact: Callable[[Any], Any]
    points: np.ndarray
    ulp32: float = 4.0
    ulp64: float = 4.0


CASES = [
    Case("aten.exp.default", mpmath.exp, np.concatenate([_SPREAD, _both(87, 103)])),
    Case("aten.exp2.default", lambda x: mpmath.mpf(2) ** x, np.concatenate([_SPREAD, _line(-148, 127.9)])),
    Case("aten.expm1.default", mpmath.expm1, _SPREAD),
    Case("aten.log.default", mpmath.log, _POSITIVE),
    Case("aten.log2.default", lambda x: mpmath.log(x, 2), _POSITIVE),
    Case("aten.log10.default", mpmath.log10, _POSITIVE),
    Case("aten.log1p.default", mpmath.log1p, np.concatenate([_line(-0.9999, 10), _both(1e-9, 0.5), np.geomspace(1, 1e30, 30)])),
    Case("aten.rsqrt.default", lambda x: 1 / mpmath.sqrt(x), np.concatenate([_POSITIVE, [1e-40, 1e-38]])),
    Case("aten.sqrt.default", mpmath.sqrt, _POSITIVE, 0.5, 0.5),
    Case("aten.reciprocal.default", lambda x: 1 / x, _both(1e-30, 1e30), 0.5, 0.5),
    Case("aten.sin.default", mpmath.sin, _SPREAD),
    Case("aten.cos.default", mpmath.cos, _SPREAD),
    Case("aten.tan.default", mpmath.tan, _SPREAD, 6, 6),
    Case("aten.asin.default", mpmath.asin, _UNIT),
    Case("aten.acos.default", mpmath.acos, _UNIT),
    Case("aten.atan.default", mpmath.atan, np.concatenate([_SPREAD, _both(1e-6, 1e9)])),
    Case("aten.sinh.default", mpmath.sinh, _SPREAD, 6),
    Case("aten.cosh.default", mpmath.cosh, _SPREAD, 6),
    Case("aten.tanh.default", mpmath.tanh, _SPREAD),
    Case("aten.asinh.default", mpmath.asinh, np.concatenate([_SPREAD, _both(1e2, 1e30)])),
    Case("aten.acosh.default", mpmath.acosh, np.concatenate([1 + np.geomspace(1e-6, 1e3, 80), np.geomspace(1, 1e30, 30)])),
    Case("aten.atanh.default", mpmath.atanh, _UNIT),
    Case("aten.sigmoid.default", lambda x: 1 / (1 + mpmath.exp(-x)), _SPREAD),
    Case("aten.silu.default", lambda x: x / (1 + mpmath.exp(-x)), _SPREAD, 5),
    Case("aten.erfc.default", mpmath.erfc, np.concatenate([_line(-6, 9), _both(1e-6, 1)]), 6),
    Case("aten.special_erfcx.default", lambda x: mpmath.exp(x * x) * mpmath.erfc(x), np.concatenate([_line(-9, 20), _both(1e-6, 1)]), 6),
    Case("aten.erfinv.default", mpmath.erfinv, _UNIT[np.abs(_UNIT) < 1], 6, 6),
    Case("aten.i0.default", lambda x: mpmath.besseli(0, x), _SPREAD, 8),
    Case("aten.special_i0e.default", lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(0, x), _SPREAD),
    Case("aten.special_i1.default", lambda x: mpmath.besseli(1, x), _SPREAD, 8),
    Case("aten.special_i1e.default", lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(1, x), _SPREAD),
    Case("aten.lgamma.default", lambda x: mpmath.log(mpmath.gamma(x)), _POSITIVE, 8, 8),
    # The zero at 1.4616 costs digits, as it does PyTorch's.
    Case("aten.digamma.default", lambda x: mpmath.psi(0, x), np.concatenate([np.geomspace(1e-5, 1.2, 40), _line(1.8, 20)]), 16, 16),
]


def _device_of(device: str) -> torch.device:
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def _run(name: str, device: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The op's result under the mode, on the CPU; it must have been intercepted."""
    mode = GemsMode(strict=True)
    moved = [a.to(_device_of(device)) if isinstance(a, torch.Tensor) else a for a in args]
    assert decision(mode, name, *moved, **kwargs).kind == "rule"
    with mode:
        return find_op(name)(*moved, **kwargs).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=[c.op.split(".")[1] for c in CASES])
def test_error(case: Case, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor(case.points, dtype=dtype)
    result = _run(case.op, device, x)
    kind = np.float32 if dtype == torch.float32 else np.float64
    limits = np.finfo(kind)
    worst, where = 0.0, math.nan
    compared = 0
    with mpmath.workdps(40):
        for point, value in zip(x.tolist(), result.tolist()):
            exact = mpmath.re(case.exact(mpmath.mpf(point)))
            if not mpmath.isfinite(exact) or not limits.smallest_subnormal < abs(exact) < float(limits.max):
                continue
            compared += 1
            error = float(abs(mpmath.mpf(value) - exact) / float(np.spacing(kind(abs(float(exact)))))) if math.isfinite(value) else math.inf
            if error > worst:
                worst, where = error, point
    allowed = case.ulp32 if dtype == torch.float32 else case.ulp64
    assert compared > 20
    assert worst <= allowed, f"{worst:.2f} ulp at {where!r}; {allowed} are allowed"


EXTREMES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-45, -1e-45, 88.0, -88.0, 1e30, -1e30]


@pytest.mark.parametrize("op", sorted({c.op for c in CASES} | {
    "aten.neg.default", "aten.sign.default", "aten.signbit.default", "aten.floor.default", "aten.ceil.default", "aten.trunc.default",
    "aten.round.default", "aten.frac.default", "aten.relu.default", "aten.hardswish.default", "aten.hardsigmoid.default",
    "aten.mish.default", "aten.sinc.default", "aten.logit.default", "aten.special_entr.default", "aten.nan_to_num.default",
    "aten.isnan.default", "aten.isinf.default", "aten.isfinite.default", "aten.isposinf.default", "aten.isneginf.default",
    "aten.angle.default", "aten.erf.default", "aten.special_log_ndtr.default"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_extremes_are_pytorchs(op: str, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor(EXTREMES, dtype=dtype)
    if op in ("aten.sin.default", "aten.cos.default", "aten.tan.default", "aten.sinc.default"):
        x = x[x.abs().nan_to_num(posinf=math.inf) != 1e30]  # reduced by other means in NumPy, PyTorch and on GPUs
    result, expected = _run(op, device, x), find_op(op)(x)
    torch.testing.assert_close(result, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12,
                               atol=torch.finfo(dtype).eps if op == "aten.sinc.default" else 1e-30, equal_nan=True)
    if dtype.is_floating_point and op in ("aten.neg.default", "aten.floor.default", "aten.ceil.default", "aten.trunc.default",
                                          "aten.round.default", "aten.tanh.default", "aten.asinh.default", "aten.expm1.default"):
        zeros = expected == 0
        assert torch.equal(torch.signbit(result[zeros]), torch.signbit(expected[zeros]))


NARROW = {
    "aten.sigmoid.default": lambda x: torch.sigmoid(x),
    "aten.tanh.default": lambda x: torch.tanh(x),
    "aten.silu.default": lambda x: torch.nn.functional.silu(x),
    # Not (1 + tanh(u)) / 2, which cancels.
    "aten.gelu.default": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("op", sorted(NARROW))
def test_faster_forms_round_like_exact_ones(op: str, dtype: torch.dtype, device: str) -> None:
    """Over every 16-bit number that is not subnormal: at most one unit of the result's dtype off the exact value rounded."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.abs() >= torch.finfo(dtype).tiny) & (x.abs() < 80)]
    kwargs = {"approximate": "tanh"} if op == "aten.gelu.default" else {}
    result = _run(op, device, x, **kwargs)
    exact = NARROW[op](x.double())
    expected = exact.to(dtype)
    step = torch.maximum((torch.nextafter(expected.abs(), torch.tensor(math.inf, dtype=dtype)) - expected.abs()).double(),
                         torch.tensor(max(torch.finfo(dtype).tiny, 1e-37), dtype=torch.float64))
    error = (result.double() - exact).abs() / step
    assert error.max() <= 1.0, f"{error.max():.3f} units at {x[error.argmax()].item()}"
    assert (error > 0.52).double().mean() < 0.001


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_backward_is_the_derivative(approximate: str, device: str) -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    result = _run("aten.gelu_backward.default", device, torch.ones_like(x), x, approximate=approximate)
    with mpmath.workdps(40):
        if approximate == "none":
            def value(t: Any) -> Any:
                return t * mpmath.ncdf(t)
        else:
            def value(t: Any) -> Any:
                return t / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (t + mpmath.mpf("0.044715") * t**3)))
        expected = torch.tensor([float(mpmath.diff(value, mpmath.mpf(t))) for t in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("decimals", [0, 1, 3, -2])
def test_round_decimals(decimals: int, device: str) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.25, 1.2345, 1234.5678, -1250.0, 1e15, math.inf, math.nan], dtype=torch.float64)
    result = _run("aten.round.decimals", device, x, decimals=decimals)
    torch.testing.assert_close(result, torch.round(x, decimals=decimals), rtol=0, atol=0, equal_nan=True)
