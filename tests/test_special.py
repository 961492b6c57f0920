"""Special functions against values in 40 digits, and PyTorch's own values at the ends of their domains.

PyTorch computes some of them to fewer digits than float64 has (Bessel and Airy functions to 6, trigamma and the incomplete
gamma functions to 9), so that it is no reference there.
"""

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

DTYPES = [torch.float32, torch.float64]


def _run(name: str, device: str, *args: Any) -> torch.Tensor:
    """The op's result under the mode, on the CPU; it must have been intercepted."""
    mode = GemsMode(strict=True)
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    if device == "cuda":
        moved = [a.to("cuda:0") if isinstance(a, torch.Tensor) else a for a in args]
    assert decision(mode, name, *moved).kind == "rule"
    with mode:
        return find_op(name)(*moved).cpu()


class Case(NamedTuple):
    """An op, its exact value and where it is looked at."""

    op: str
    exact: Callable[..., Any]
    points: np.ndarray
    before: tuple[Any, ...] = ()


_LINE = np.concatenate([np.geomspace(1e-6, 5, 20), np.linspace(5.01, 60, 20)])
_EITHER = np.concatenate([_LINE, -_LINE])
CASES = [
    Case("aten.special_bessel_j0.default", lambda x: mpmath.besselj(0, x), _EITHER),
    Case("aten.special_bessel_j1.default", lambda x: mpmath.besselj(1, x), _EITHER),
    Case("aten.special_bessel_y0.default", lambda x: mpmath.bessely(0, x), _LINE),
    Case("aten.special_bessel_y1.default", lambda x: mpmath.bessely(1, x), _LINE),
    Case("aten.special_modified_bessel_i0.default", lambda x: mpmath.besseli(0, x), _EITHER),
    Case("aten.special_modified_bessel_i1.default", lambda x: mpmath.besseli(1, x), _EITHER),
    Case("aten.special_modified_bessel_k0.default", lambda x: mpmath.besselk(0, x), _LINE),
    Case("aten.special_modified_bessel_k1.default", lambda x: mpmath.besselk(1, x), _LINE),
    Case("aten.special_scaled_modified_bessel_k0.default", lambda x: mpmath.exp(x) * mpmath.besselk(0, x), _LINE),
    Case("aten.special_scaled_modified_bessel_k1.default", lambda x: mpmath.exp(x) * mpmath.besselk(1, x), _LINE),
    Case("aten.special_spherical_bessel_j0.default", lambda x: mpmath.sin(x) / x, _EITHER),
    Case("aten.special_airy_ai.default", mpmath.airyai, np.linspace(-20, 10, 61)),
    Case("aten.polygamma.default", lambda x: mpmath.psi(1, x), np.concatenate([_LINE, np.linspace(-9.87, -0.13, 20)]), (1,)),
    Case("aten.polygamma.default", lambda x: mpmath.psi(4, x), np.geomspace(0.02, 60, 30), (4,)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op.split(".")[1] + "".join(map(str, c.before)))
def test_error(case: Case, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor(case.points, dtype=dtype)
    result = _run(case.op, device, *case.before, x)
    with mpmath.workdps(40):
        exact = torch.tensor([float(case.exact(mpmath.mpf(v))) for v in x.tolist()], dtype=torch.float64)
    relative, absolute = (4e-6, 4e-6) if dtype == torch.float32 else (2e-14, 2e-14)
    torch.testing.assert_close(result.double(), exact, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
def test_incomplete_gamma(upper: bool, dtype: torch.dtype, device: str) -> None:
    a = torch.tensor([1e-3, 0.3, 1, 4.5, 12, 60, 199, 201, 3000], dtype=dtype)[:, None]
    x = a * torch.tensor([1e-3, 0.4, 0.8, 0.99, 1, 1.01, 1.25, 1.5, 3], dtype=dtype)
    result = _run("aten.igammac.default" if upper else "aten.igamma.default", device, a, x)
    with mpmath.workdps(40):
        def exact(s: float, t: float) -> float:
            lower = mpmath.gammainc(s, 0, t, regularized=True)
            return float(1 - lower if upper else lower)

        rows = [[exact(s, t) for t in row] for (s,), row in zip(a.tolist(), x.tolist())]
    torch.testing.assert_close(result.double(), torch.tensor(rows, dtype=torch.float64), rtol=2e-5 if dtype == torch.float32 else 1e-12,
                               atol=1e-6 if dtype == torch.float32 else 1e-14)


POLYNOMIALS = ["chebyshev_polynomial_t", "chebyshev_polynomial_u", "chebyshev_polynomial_v", "chebyshev_polynomial_w",
               "shifted_chebyshev_polynomial_t", "shifted_chebyshev_polynomial_u", "shifted_chebyshev_polynomial_v",
               "shifted_chebyshev_polynomial_w", "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l",
               "legendre_polynomial_p"]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials(name: str, dtype: torch.dtype, device: str) -> None:
    """Degrees vary within a block; negative ones give 0, and NaN goes through from degree 1 on."""
    x = torch.tensor([-1.5, -1, -0.75, -0.0, 0.25, 0.5, 0.9375, 1, 1.25, 2, 1e3, math.nan], dtype=dtype)[:, None]
    n = torch.tensor([-2, -0.5, 0, 1, 2, 3.7, 5, 6, 7, 9, 12, 200], dtype=dtype)
    op = f"aten.special_{name}.default"
    result = _run(op, device, x, n)
    expected = find_op(op)(x, n)
    torch.testing.assert_close(result, expected, rtol=1e-4 if dtype == torch.float32 else 1e-11,
                               atol=1e-3 if dtype == torch.float32 else 1e-11, equal_nan=True)


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, -2.5, math.nan, math.inf, -math.inf, 110.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("op", sorted({c.op for c in CASES if not c.before}))
def test_special_values_are_pytorchs(op: str, dtype: torch.dtype, device: str) -> None:
    x = SPECIAL.to(dtype)
    torch.testing.assert_close(_run(op, device, x), find_op(op)(x), rtol=1e-5, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("op", ["aten.igamma.default", "aten.igammac.default", "aten.special_zeta.default"])
def test_special_values_of_two_arguments(op: str, device: str) -> None:
    x = SPECIAL.double()[:, None]
    torch.testing.assert_close(_run(op, device, x, SPECIAL.double()), find_op(op)(x, SPECIAL.double()), rtol=1e-8, atol=1e-12,
                               equal_nan=True)


@pytest.mark.parametrize("p", [1, 3])
def test_mvlgamma(p: int, device: str) -> None:
    x = torch.linspace(1.6, 30, 50, dtype=torch.float64)
    torch.testing.assert_close(_run("aten.mvlgamma.default", device, x, p), torch.mvlgamma(x, p), rtol=1e-12, atol=1e-12)
