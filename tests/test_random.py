"""Random ops: distributions, reproducibility, independence of calls, generators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gemsmode import GemsMode

N = 60_001  # odd: the last block is partial
KS_LIMIT = 1.95  # exceeded once in a thousand draws; the seeds below are fixed


def device() -> str:
    from gemsmode.target import current

    return current().device_type


def draw(function: Callable[[], torch.Tensor], seed: int = 0) -> torch.Tensor:
    """The result of ``function`` under the mode from a fixed seed; every compute call must have been served by a rule."""
    torch.manual_seed(seed)
    with GemsMode(strict=True, trace=True) as mode:
        result = function()
    rows = mode.report.to_dict()["ops"]
    assert [r for r in rows if r["decision"] == "rule"]
    assert not [r for r in rows if r["decision"] in ("pass", "error")], rows
    return result


def kolmogorov_smirnov(x: torch.Tensor, cdf: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The Kolmogorov-Smirnov statistic, times the square root of the sample's size."""
    x = x.double().cpu().flatten().sort().values
    n, c = x.numel(), cdf(x)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return max((i / n - c).max().item(), (c - (i - 1) / n).max().item()) * math.sqrt(n)


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


CONTINUOUS = {
    "rand": (lambda d: torch.rand(N, dtype=d, device=device()), lambda x: x),
    "randn": (lambda d: torch.randn(N, dtype=d, device=device()), normal_cdf),
    "rand_like": (lambda d: torch.rand_like(torch.empty(N, dtype=d, device=device())), lambda x: x),
    "randn_like": (lambda d: torch.randn_like(torch.empty(N, dtype=d, device=device())), normal_cdf),
    "uniform_": (lambda d: torch.empty(N, dtype=d, device=device()).uniform_(-2, 3), lambda x: (x + 2) / 5),
    "normal_": (lambda d: torch.empty(N, dtype=d, device=device()).normal_(1, 2), lambda x: normal_cdf((x - 1) / 2)),
    "exponential_": (lambda d: torch.empty(N, dtype=d, device=device()).exponential_(2.0), lambda x: 1 - torch.exp(-2 * x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_distribution(name: str, dtype: torch.dtype) -> None:
    function, cdf = CONTINUOUS[name]
    x = draw(lambda: function(dtype))
    assert x.dtype == dtype and torch.isfinite(x).all()
    assert kolmogorov_smirnov(x, cdf) < KS_LIMIT


@pytest.mark.parametrize("name", CONTINUOUS)
def test_manual_seed_reproduces_and_calls_differ(name: str) -> None:
    function, _ = CONTINUOUS[name]
    first, again, other = (draw(lambda: function(torch.float32), seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    correlation = torch.corrcoef(torch.stack([first, other]).cpu())[0, 1].abs().item()
    assert correlation < 4.5 / math.sqrt(N)
    two = draw(lambda: torch.stack([function(torch.float32), function(torch.float32)]))
    assert torch.corrcoef(two.cpu())[0, 1].abs().item() < 4.5 / math.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_in_the_interval(dtype: torch.dtype) -> None:
    x = draw(lambda: torch.rand(N, dtype=dtype, device=device()))
    assert (x >= 0).all() and (x < 1).all()
    assert abs(x.float().mean().item() - 0.5) < 0.01


def test_integers_are_uniform() -> None:
    x = draw(lambda: torch.randint(-5, 20, (N,), device=device()))
    counts = torch.bincount(x.cpu() + 5, minlength=25).double()
    assert counts.numel() == 25
    chi_square = ((counts - N / 25) ** 2 / (N / 25)).sum().item()
    assert chi_square < 51.2  # the 0.999 quantile at 24 degrees of freedom


def test_bernoulli_and_dropout() -> None:
    x = draw(lambda: torch.empty(N, dtype=torch.bool, device=device()).bernoulli_(0.3))
    assert abs(x.double().mean().item() - 0.3) < 4 * math.sqrt(0.21 / N)
    values = torch.randn(N, device=device())
    out, mask = draw(lambda: torch.native_dropout(values, 0.25, True))
    assert abs(mask.double().mean().item() - 0.75) < 4 * math.sqrt(0.1875 / N)
    torch.testing.assert_close(out, torch.where(mask, values / 0.75, torch.zeros_like(values)))


def test_dropout_backward_uses_the_mask() -> None:
    grad, mask = torch.randn(300, 7, device=device()), torch.rand(300, 7, device=device()) < 0.5
    got = draw(lambda: torch.ops.aten.native_dropout_backward(grad, mask, 2.0))
    torch.testing.assert_close(got, torch.where(mask, grad * 2, torch.zeros_like(grad)))


def test_generator_is_honoured() -> None:
    generator = torch.Generator(device=device()).manual_seed(3)
    a = draw(lambda: torch.rand(10, generator=generator, device=device()))
    b = draw(lambda: torch.rand(10, generator=generator, device=device()))
    generator.manual_seed(3)
    c = draw(lambda: torch.rand(10, generator=generator, device=device()))
    assert torch.equal(a, c) and not torch.equal(a, b)


def test_bad_parameters_raise_as_in_pytorch() -> None:
    with GemsMode(strict=True):
        for call in (lambda x: x.uniform_(3, 1), lambda x: x.normal_(0, -1), lambda x: x.exponential_(-1.0), lambda x: x.bernoulli_(1.5)):
            with pytest.raises(RuntimeError):
                call(torch.empty(4, device=device()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_graph_replay_draws_fresh_numbers() -> None:
    out = torch.empty(N, device="cuda")
    with GemsMode(strict=True):
        out.uniform_()  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out.uniform_()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
