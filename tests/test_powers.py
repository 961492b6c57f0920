"""Powers of floating-point numbers: errors in units in the last place, and what IEEE 754 says of special operands."""

from __future__ import annotations

import math

import pytest
import torch

from gemsmode import GemsMode
from gemsmode.ops import binary
from gemsmode.target import Target, current

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 1e-45, 1e38, -1e38]
EXPONENTS = [*SPECIAL, 300.0, -300.0, 24.5, 16777215.0, -16777215.0, 1e9]


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    """Bases of all magnitudes with small exponents, and bases near 1 with large ones."""
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    base = torch.exp2((torch.rand(n, generator=generator, dtype=torch.float64) - 0.5) * 290).float()
    exponent = torch.randn(n, generator=generator) * torch.tensor([0.1, 1.0, 5.0])[torch.randint(3, (n,), generator=generator)]
    near = 1 + torch.randn(n, generator=generator) * torch.tensor([1e-6, 1e-2, 0.2])[torch.randint(3, (n,), generator=generator)]
    large = torch.randn(n, generator=generator) * 1000
    return torch.cat([base, near.abs()]), torch.cat([exponent, large])


def _units_off(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units in the last place of float32, of results that are neither subnormal nor infinite."""
    normal = (exact.abs() > 1.2e-38) & (exact.abs() < 3.4e38)
    assert normal.sum() > 1000
    unit = torch.exp2(torch.floor(torch.log2(exact[normal].abs())) - 23)
    return float(((result.cpu().double()[normal] - exact[normal]).abs() / unit).max())


def _allowed() -> float:
    return 0.6 if current().is_fast_in_float64 or current().interpreted else 5.0


def test_error_of_float32(device: str) -> None:
    base, exponent = _operands()
    with GemsMode(strict=True, trace=True) as mode:
        result = torch.pow(base.to(device), exponent.to(device))
    assert [r.decision for r in mode.report.compute if "pow" in r.overload] == ["rule"]
    exact = base.double() ** exponent.double()
    assert _units_off(result, exact) <= _allowed()
    subnormal = (exact < 1.1e-38) & (exact > 0)
    assert subnormal.sum() > 10
    torch.testing.assert_close(result.cpu()[subnormal].double(), exact[subnormal], rtol=0, atol=2 * 2.0**-149)


@pytest.mark.parametrize("number", [0.999, 0.9, 1.5])
def test_error_with_one_number(number: float, device: str) -> None:
    """A number as base or exponent, of a tensor and of a list as optimizers correct for their first steps by."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4000, generator=generator) * 80 + 0.25
    rounded = torch.tensor(number, dtype=torch.float32).double()
    given = values.to(device)
    with GemsMode(strict=True):
        base, exponent = torch.pow(number, given), torch.pow(given, number)
        listed = torch.cat(torch._foreach_pow(number, list(given.split(1000))))
    assert _units_off(base, rounded ** values.double()) <= _allowed()
    assert _units_off(exponent, values.double() ** rounded) <= _allowed()
    assert _units_off(listed, rounded ** values.double()) <= _allowed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_operands(dtype: torch.dtype, device: str) -> None:
    base, exponent = (t.contiguous() for t in torch.meshgrid(torch.tensor(SPECIAL, dtype=dtype), torch.tensor(EXPONENTS, dtype=dtype),
                                                           indexing="ij"))
    with GemsMode(strict=True):
        result = torch.pow(base.to(device), exponent.to(device)).cpu()
    expected = torch.pow(base.double(), exponent.double()).to(dtype)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-44, equal_nan=True)
    known = ~expected.isnan()
    assert torch.equal(torch.signbit(result[known]), torch.signbit(expected[known]))


def test_the_function_follows_the_gpu() -> None:
    fast, slow = Target("cuda", "cuda", 90), Target("cuda", "cuda", 89)
    assert binary.power_on(fast) is binary._pow_by_64 and binary.power_on(slow) is binary._pow
