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
    "normal.float_float": (lambda d: torch.normal(1.0, 2.0, (N,), dtype=d, device=device()), lambda x: normal_cdf((x - 1) / 2)),
    "normal.Tensor_Tensor": (lambda d: torch.normal(torch.ones(N, dtype=d, device=device()),
                                                    torch.full((1,), 2.0, dtype=d, device=device())), lambda x: normal_cdf((x - 1) / 2)),
    "normal.Tensor_float": (lambda d: torch.normal(torch.ones(N, dtype=d, device=device()), 2.0), lambda x: normal_cdf((x - 1) / 2)),
    "normal.float_Tensor": (lambda d: torch.normal(1.0, torch.full((N,), 2.0, dtype=d, device=device())),
                            lambda x: normal_cdf((x - 1) / 2)),
    "log_normal_": (lambda d: torch.empty(N, dtype=d, device=device()).log_normal_(0.5, 2), lambda x: normal_cdf((x.log() - 0.5) / 2)),
    "cauchy_": (lambda d: torch.empty(N, dtype=d, device=device()).cauchy_(1, 2), lambda x: 0.5 + torch.atan((x - 1) / 2) / math.pi),
    "exponential_": (lambda d: torch.empty(N, dtype=d, device=device()).exponential_(2.0), lambda x: 1 - torch.exp(-2 * x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_distribution(name: str, dtype: torch.dtype) -> None:
    function, cdf = CONTINUOUS[name]
    x = draw(lambda: function(dtype))
    assert x.dtype == dtype and torch.isfinite(x).all()
    assert kolmogorov_smirnov(x, cdf) < KS_LIMIT


@pytest.mark.parametrize("name", ["rand", "randn", "cauchy_", "normal.Tensor_Tensor", "log_normal_"])
def test_manual_seed_reproduces_and_calls_differ(name: str) -> None:
    function, _ = CONTINUOUS[name]
    first, again, other = (draw(lambda: function(torch.float32), seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    two = draw(lambda: torch.stack([function(torch.float32), function(torch.float32)]))
    for a, b in ((first, other), (two[0], two[1]), (first[1:], first[:-1])):
        # Ranks, since not every distribution has a variance.
        pair = torch.stack([a, b]).cpu().double().argsort(1).argsort(1).double()
        assert torch.corrcoef(pair)[0, 1].abs().item() < 4.5 / math.sqrt(N)


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


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over its number of degrees of freedom, in standard deviations from 1; cells expected below 8 are one."""
    expected = probabilities.double() * counts.sum()
    few = expected < 8
    seen = torch.cat([counts.double()[~few], counts.double()[few].sum()[None]])
    wanted = torch.cat([expected[~few], expected[few].sum().clamp_min(1e-9)[None]])
    if wanted[-1] < 1:
        seen, wanted = seen[:-1], wanted[:-1]
    freedom = seen.numel() - 1
    return (((seen - wanted) ** 2 / wanted).sum().item() - freedom) / math.sqrt(2 * freedom)


def test_random_fills_the_range() -> None:
    for dtype, least, most in ((torch.int8, 0, 127), (torch.uint8, 0, 255), (torch.bool, 0, 1), (torch.float16, 0, 2048)):
        x = draw(lambda d=dtype: torch.empty(N, dtype=d, device=device()).random_()).double()
        assert x.min() == least and x.max() == most and abs(x.mean().item() / ((least + most) / 2) - 1) < 0.02
    x = draw(lambda: torch.empty(N, dtype=torch.int64, device=device()).random_())
    assert x.min() >= 0 and abs(x.double().mean().item() / 2**62 - 1) < 0.02
    x = draw(lambda: torch.empty(N, dtype=torch.int64, device=device()).random_(-2**63, None))
    assert abs((x < 0).double().mean().item() - 0.5) < 0.01
    x = draw(lambda: torch.randint(-5, 2**40, (N,), device=device())).double()
    assert x.min() >= -5 and x.max() < 2**40 and kolmogorov_smirnov(x, lambda v: (v + 5) / (2**40 + 5)) < KS_LIMIT


def test_geometric() -> None:
    x = draw(lambda: torch.empty(N, device=device()).geometric_(0.3)).cpu().long()
    k = torch.arange(60)
    assert x.min() == 1 and abs(chi_square(torch.bincount(x, minlength=60)[:60], 0.3 * 0.7 ** (k - 1.0) * (k > 0))) < 4


@pytest.mark.parametrize("rate", [0.3, 7.5, 10.0, 45.0])
def test_poisson(rate: float) -> None:
    x = draw(lambda: torch.poisson(torch.full((N,), rate, device=device()))).cpu().long()
    k = torch.arange(150, dtype=torch.float64)
    probabilities = torch.exp(k * math.log(rate) - rate - torch.lgamma(k + 1))
    assert abs(chi_square(torch.bincount(x, minlength=150), probabilities)) < 4


def test_poisson_of_extreme_rates() -> None:
    assert (draw(lambda: torch.poisson(torch.zeros(100, device=device()))) == 0).all()
    x = draw(lambda: torch.poisson(torch.full((N,), 1e6, dtype=torch.float64, device=device())))
    assert kolmogorov_smirnov(x, lambda v: normal_cdf((v - 1e6) / 1e3)) < KS_LIMIT + 0.1  # integers a thousandth apart


def test_bernoulli_of_probabilities() -> None:
    p = torch.tensor([0.0, 0.25, 0.9, 1.0], device=device()).repeat_interleave(N)
    x = draw(lambda: torch.bernoulli(p)).cpu().reshape(4, N).double().mean(1)
    assert x[0] == 0 and x[3] == 1
    assert abs(x[1].item() - 0.25) < 4 * math.sqrt(0.1875 / N) and abs(x[2].item() - 0.9) < 4 * math.sqrt(0.09 / N)
    filled = draw(lambda: torch.empty(N, dtype=torch.bool, device=device()).bernoulli_(torch.tensor(0.3, device=device())))
    assert abs(filled.double().mean().item() - 0.3) < 4 * math.sqrt(0.21 / N)


def test_multinomial() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 7.0], device=device())
    x = draw(lambda: torch.multinomial(weights, N, replacement=True)).cpu()
    assert abs(chi_square(torch.bincount(x, minlength=4)[[0, 2, 3]], torch.tensor([0.1, 0.2, 0.7]))) < 4 and not (x == 1).any()
    rows = weights.expand(150, 4)
    for count in (1, 3):
        x = draw(lambda c=count: torch.multinomial(rows, c)).cpu()
        assert x.shape == (150, count) and not (x == 1).any()
        assert abs(chi_square(torch.bincount(x[:, 0], minlength=4)[[0, 2, 3]], torch.tensor([0.1, 0.2, 0.7]))) < 4
    assert torch.equal(x.sort(1).values, torch.tensor([0, 2, 3]).expand(150, 3))
    # The second of two is drawn by the weights that are left.
    second = torch.tensor([0.2 / 0.8 + 0.7 / 0.3, 2 * (0.1 / 0.9 + 0.7 / 0.3), 7 * (0.1 / 0.9 + 0.2 / 0.8)], dtype=torch.float64) / 10
    assert abs(chi_square(torch.bincount(x[:, 1], minlength=4)[[0, 2, 3]], second)) < 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends the CUDA context")
@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_bad_weights_raise_as_in_pytorch(weights: list[float]) -> None:
    for replacement in (True, False):
        with GemsMode(strict=True), pytest.raises(RuntimeError, match=r"probability|multinomial"):
            torch.multinomial(torch.tensor(weights), 2, replacement=replacement)


@pytest.mark.parametrize("n", [0, 1, 2, 17, 2048, 5000])
def test_permutations(n: int) -> None:
    x = draw(lambda: torch.randperm(n, device=device()))
    assert x.dtype == torch.int64 and torch.equal(x.cpu().sort().values, torch.arange(n))
    if n > 1000:
        position = torch.arange(n, dtype=torch.float64)
        for pair in (torch.stack([position, x.cpu().double()]), torch.stack([x[1:], x[:-1]]).cpu().double()):
            assert abs(torch.corrcoef(pair)[0, 1].item()) < 4.5 / math.sqrt(n)
        assert (x.cpu() == torch.arange(n)).sum() < 10
        assert torch.equal(draw(lambda: torch.randperm(n, dtype=torch.int32, device=device())), x.int())


def test_permutations_of_few_are_all_as_likely() -> None:
    with GemsMode(strict=True):
        drawn = torch.stack([torch.randperm(3, device=device()) for _ in range(240)]).cpu()
    code = drawn[:, 0] * 2 + (drawn[:, 1] > drawn[:, 2])
    assert abs(chi_square(torch.bincount(code, minlength=6), torch.full((6,), 1 / 6))) < 4


def test_long_permutations_spread_evenly() -> None:
    x = draw(lambda: torch.randperm(1 << 14, device=device())).cpu()
    # Where each of 32 runs of inputs goes among 32 runs of outputs.
    cells = torch.bincount((torch.arange(1 << 14) >> 9) * 32 + (x >> 9), minlength=1024)
    assert abs(chi_square(cells, torch.full((1024,), 1 / 1024))) < 4


def test_rrelu_draws_slopes_for_negative_elements() -> None:
    x = torch.randn(N, device=device())
    out, noise = draw(lambda: torch.ops.aten.rrelu_with_noise_functional(x, torch.zeros_like(x), 0.1, 0.3, True))
    assert (noise[x > 0] == 1).all() and torch.equal(out, x * noise)
    assert kolmogorov_smirnov(noise[x <= 0], lambda v: (v - 0.1) / 0.2) < KS_LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropped_elements_are_independent(dtype: torch.dtype) -> None:
    p = 0.3
    _, mask = draw(lambda: torch.native_dropout(torch.ones(1 << 18, dtype=dtype, device=device()), p, True))
    kept = mask.cpu().double().reshape(-1, 8)
    assert abs(kept.mean().item() - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / kept.numel())
    # Neighbours share a random word; a counter makes eight.
    off = torch.corrcoef(kept.t()) - torch.eye(8, dtype=torch.float64)
    assert off.abs().max().item() < 4.5 / math.sqrt(len(kept))


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
        for call in (lambda x: x.uniform_(3, 1), lambda x: x.normal_(0, -1), lambda x: x.exponential_(-1.0), lambda x: x.bernoulli_(1.5),
                     lambda x: x.cauchy_(0, -1), lambda x: x.log_normal_(0, 0), lambda x: x.geometric_(1.5)):
            with pytest.raises(RuntimeError):
                call(torch.empty(4, device=device()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends the CUDA context")
def test_bad_tensors_of_parameters_raise_as_in_pytorch() -> None:
    with GemsMode(strict=True):
        for call in (lambda x: torch.bernoulli(x.fill_(2)), lambda x: torch.normal(x, x.fill_(-1.0)),
                     lambda x: torch.poisson(x.fill_(-1.0))):
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
