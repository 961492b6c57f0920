"""Creation: points between bounds, ranges and windows against PyTorch's; rearrangements that make new tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemsmode import GemsMode
from gemsmode.target import current

aten = torch.ops.aten


def device() -> str:
    return current().device_type


def served(function: Callable[..., Any], *args: Any) -> Any:
    """The result under the mode; every call that computes must have come from a rule."""
    with GemsMode(strict=True, trace=True) as mode:
        result = function(*args)
    rows = mode.report.to_dict()["ops"]
    assert [r for r in rows if r["decision"] == "rule"] and not [r for r in rows if r["decision"] in ("pass", "error")], rows
    return result


def same(function: Callable[..., Any], *args: Any, tolerance: float = 0.0) -> None:
    expected, got = function(*args), served(function, *args)
    assert got.stride() == expected.stride() and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_points_and_ranges(dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 0 if dtype == torch.int64 else 1e-12
    for steps in (0, 1, 2, 5, 50, 1001):
        same(lambda n: torch.linspace(-3, 10, n, dtype=dtype, device=device()), steps, tolerance=tolerance)
        if dtype.is_floating_point:
            same(lambda n: torch.logspace(-3, 2, n, base=3.0, dtype=dtype, device=device()), steps, tolerance=1e-5)
    x = served(lambda: torch.linspace(0, 1, 7, dtype=dtype, device=device()))
    assert x[0] == 0 and x[-1] == 1
    with pytest.warns(UserWarning, match=r"torch\.range"):
        same(lambda: torch.range(-3, 9, 2, dtype=dtype, device=device()))


@pytest.mark.parametrize("window", [torch.hann_window, torch.hamming_window, torch.blackman_window, torch.bartlett_window])
def test_windows(window: Callable[..., torch.Tensor]) -> None:
    for n in (0, 1, 2, 9, 100):
        for periodic in (True, False):
            for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
                same(lambda n, p, d=dtype: window(n, p, dtype=d, device=device()), n, periodic, tolerance=tolerance)
    same(lambda: torch.hamming_window(9, True, 0.6, 0.3, device=device()), tolerance=1e-6)


def test_rearrangements() -> None:
    x = torch.randn(4, 5, 6, device=device())
    for t in (x, x.transpose(0, 2), x[:, ::2], x[:0]):
        for k in range(-1, 4):
            same(lambda t, k: torch.rot90(t, k, (0, 2)), t, k)
    for t in (x, x.transpose(0, 2)):
        for offset in (0, 2, -1, 9):
            same(lambda t, o: torch.diagonal_scatter(t, torch.zeros_like(torch.diagonal(t, o, 0, 2)), o, 0, 2), t, offset)
        same(lambda t: torch.as_strided_scatter(t, torch.zeros(2, 3, device=device()), (2, 3), (1, 2)), t)
    for got, expected in zip(served(lambda: torch.split_with_sizes_copy(x, [1, 0, 4], 1)), x.split([1, 0, 4], 1)):
        assert torch.equal(got, expected) and got.is_contiguous()


def test_blocks_and_chunks() -> None:
    a, b, c = torch.randn(2, 3, device=device()), torch.arange(4, device=device(), dtype=torch.int32), torch.tensor(2.0, device=device())
    same(lambda: torch.block_diag(a, b, c, torch.zeros(3, 0, device=device())))
    same(lambda: torch._chunk_cat([torch.arange(15.0, device=device()).reshape(5, 3), a], 0, 4))
    same(lambda: torch._chunk_cat([torch.arange(30.0, device=device()).reshape(2, 5, 3).transpose(1, 2), a], 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_cross_products(dtype: torch.dtype) -> None:
    x, y = (torch.randn(3, 5, 3, device=device()).mul(4).to(dtype) for _ in range(2))
    tolerance = 0 if dtype == torch.int64 else 1e-5
    for dim in (0, 2):
        same(lambda d: torch.linalg.cross(x, y, dim=d), dim, tolerance=tolerance)
        same(lambda d: torch.linalg.cross(x, y[:1, :1] if d == 2 else y[:, :1, :1], dim=d), dim, tolerance=tolerance)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_renorm(p: float) -> None:
    x = torch.randn(4, 5, 6, device=device())
    for dim in (0, 1, -1):
        same(lambda d: torch.renorm(x, p, d, 3.0), dim, tolerance=1e-5)
        same(lambda d: torch.renorm(x.transpose(0, 2), p, d, 3.0), dim, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_parts(dtype: torch.dtype) -> None:
    length, angle = torch.rand(4, 5, dtype=dtype, device=device()), torch.randn(4, 5, dtype=dtype, device=device()) * 3
    for a, b in ((length, angle), (length.t(), angle.t()), (length.t(), angle[0, :4]), (length[:, :1], angle), (length[:0], angle[:0])):
        same(torch.polar, a, b, tolerance=1e-6)
    z = torch.complex(length, angle)
    for t in (z, z.t(), z[:, ::2]):
        same(aten._conj_copy, t)


def test_assertions() -> None:
    one = torch.ones((), device=device())
    assert served(lambda: aten._assert_async(one)) is None
    served(lambda: aten._assert_async.msg(one, "never"))
    token = torch.tensor([math.pi], device=device())
    assert torch.equal(served(lambda: aten._functional_assert_async.msg(one, "never", token)), token)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends the CUDA context")
def test_a_failed_assertion_raises_pytorchs_error() -> None:
    with GemsMode(strict=True), pytest.raises(RuntimeError, match="told you"):
        aten._assert_async.msg(torch.zeros(1), "told you")
