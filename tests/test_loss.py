"""Losses: reductions, layouts, extreme values, ignored and invalid targets, and the kernels at GPU sizes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from support import check_results, in_order, reason, run

import gemsmode
from gemsmode.registry import find_op
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import loss  # noqa: E402  (it needs what load_ops arranges)

aten = torch.ops.aten
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BF16, F16, F32, F64, I64 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64
NAN, INF = math.nan, math.inf
REDUCTIONS = (loss.NONE, loss.MEAN, loss.SUM)
ELEMENTWISE = {"mse_loss": (), "smooth_l1_loss": (0.7,), "huber_loss": (0.7,), "soft_margin_loss": ()}
"""Losses of an input and a target, with their number."""


def check(name: str, *args: Any, intercepted: bool = True) -> None:
    """The call is intercepted, and right by PyTorch's result or a float64 reference; where PyTorch raises, it raises the same."""
    op = find_op(name)
    assert harness.check_call(op, in_order(op, args, {}), "reduction") == intercepted, harness.label(op, args)


# -- elementwise losses ------------------------------------------------------------------------------------------------


def reversed_layout(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its dimensions laid out in memory the other way round."""
    order = list(range(x.ndim - 1, -1, -1))
    return x.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (), (2, 3, 4, 5), (130, 70)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_elementwise(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x, target, probability, likelihood = (torch.rand(shape, device=device).to(dtype) for _ in range(4))
    x = 3 * x - 1
    weight = torch.rand(shape[-1:], device=device).to(dtype)
    for reduction in REDUCTIONS:
        g = torch.randn(shape if reduction == loss.NONE else (), device=device).to(dtype)
        for transposed in (False, True):
            if transposed:
                x, probability = reversed_layout(x), reversed_layout(probability)
            for name, numbers in ELEMENTWISE.items():
                check(f"aten.{name}.default", x, target, reduction, *numbers)
                check(f"aten.{name}_backward.default", g, x, target, reduction, *numbers)
            for w in (None, weight):
                check("aten.binary_cross_entropy.default", probability, likelihood, w, reduction)
                check("aten.binary_cross_entropy_backward.default", g, probability, likelihood, w, reduction)
                for positive in (None, weight):
                    check("aten.binary_cross_entropy_with_logits.default", x, likelihood, w, positive, reduction)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_values(dtype: torch.dtype, device: str) -> None:
    big = torch.tensor([1e4, -1e4, INF, -INF, NAN, 0, 1e-6], device=device).to(dtype)
    zero = torch.zeros_like(big)
    for t in (zero, zero + 1):
        check("aten.binary_cross_entropy_with_logits.default", big, t, None, None, loss.NONE)
    for other in (zero, big, -big):
        check("aten.mse_loss.default", big, other, loss.NONE)
        check("aten.huber_loss.default", big, other, loss.NONE, 1.0)
        check("aten.smooth_l1_loss.default", big, other, loss.NONE, 1.0)
        check("aten.smooth_l1_loss_backward.default", zero + 1, big, other, loss.NONE, 1.0)
        check("aten.huber_loss_backward.default", zero + 1, big, other, loss.NONE, 1.0)
    check("aten.mse_loss.default", big, zero, loss.SUM)
    edges = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device).to(dtype)
    check("aten.binary_cross_entropy.default", edges, edges.roll(1), None, loss.NONE)
    breaks = torch.tensor([0.5, -0.5, 0.0, -0.0, 0.25], device=device).to(dtype)
    for name in ("smooth_l1_loss", "huber_loss"):
        check(f"aten.{name}.default", breaks, breaks * 0, loss.NONE, 0.5)
        check(f"aten.{name}_backward.default", breaks * 0 + 1, breaks, breaks * 0, loss.NONE, 0.5)


def test_several_dtypes_and_broadcast(device: str) -> None:
    x, y = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    for other in (y.double(), y[0].to(torch.bfloat16), y[:, :1]):
        for reduction in REDUCTIONS:
            check("aten.mse_loss.default", x, other, reduction)
            check("aten.smooth_l1_loss.default", x, other, reduction, 0.5)
    check("aten.mse_loss_backward.default", torch.randn((), device=device).double(), x, y.double(), loss.MEAN, intercepted=False)
    assert "several dtypes" in reason("aten.huber_loss.default", x, y.double(), 1, 1.0)
    assert "larger" in reason("aten.huber_loss.default", x[0], y, 1, 1.0)
    assert "negative" in reason("aten.smooth_l1_loss.default", x, y, 1, -1.0)
    assert "positive" in reason("aten.huber_loss.default", x, y, 1, 0.0)


def test_out_variants(device: str) -> None:
    x, y = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    for name, reduction in itertools.product(("mse_loss", "smooth_l1_loss", "huber_loss"), (loss.NONE, loss.MEAN)):
        op = getattr(aten, name).out
        shape = (3, 4) if reduction == loss.NONE else ()
        expected, got = torch.empty(shape, device=device), torch.empty(shape, device=device)
        op(x, y, reduction, out=expected)
        outcome = harness.under_mode(lambda op=op, reduction=reduction, got=got: op(x, y, reduction, out=got))
        assert outcome.intercepted() and outcome.result is got
        torch.testing.assert_close(got, expected)


def test_sums_of_many_elements(device: str) -> None:
    x = torch.ones(1 << 20, device=device, dtype=torch.float16)
    assert run("aten.mse_loss.default", x, x * 0, loss.MEAN).item() == 1
    y = torch.randn(1 << 20, device=device)
    got = run("aten.mse_loss.default", y, y * 0, loss.SUM)
    torch.testing.assert_close(got.double(), (y.double() ** 2).sum(), rtol=1e-6, atol=0)
    assert torch.equal(got, run("aten.mse_loss.default", y, y * 0, loss.SUM))


def test_probabilities_outside_their_range_raise(device: str) -> None:
    if device != "cpu":
        pytest.skip("a failed assertion on a GPU ends the process")
    p = torch.rand(3, 4)
    check("aten.binary_cross_entropy.default", p + 1, p, None, loss.MEAN, intercepted=False)
    check("aten.binary_cross_entropy.default", p, p - 1, None, loss.NONE, intercepted=False)


# -- negative log likelihood -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c"), [(5, 7), (300, 11), (1, 1), (0, 3), (70_000, 2)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nll_loss(dtype: torch.dtype, n: int, c: int, device: str) -> None:
    w = torch.rand(c, device=device).to(dtype)
    target = torch.randint(0, c, (n,), device=device)
    for x in (torch.randn(n, c, device=device).to(dtype), torch.randn(c, n, device=device).to(dtype).t()):
        for reduction, weight, ignore in itertools.product(REDUCTIONS, (None, w), (-100, 0)):
            check("aten.nll_loss_forward.default", x, target, weight, reduction, ignore)
            total = aten.nll_loss_forward(x, target, weight, reduction, ignore)[1]
            g = torch.randn((n,) if reduction == loss.NONE else (), device=device).to(dtype)
            check("aten.nll_loss_backward.default", g, x, target, weight, reduction, ignore, total)
        check("aten.nll_loss_forward.default", x, target.to(torch.uint8), w, loss.MEAN, -100)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nll_loss_of_one_row(dtype: torch.dtype, device: str) -> None:
    x, w, target = torch.randn(7, device=device).to(dtype), torch.rand(7, device=device).to(dtype), torch.tensor(3, device=device)
    g = torch.randn((), device=device).to(dtype)
    for reduction, ignore in itertools.product(REDUCTIONS, (-100, 3)):
        check("aten.nll_loss_forward.default", x, target, w, reduction, ignore)
        check("aten.nll_loss_forward.default", x, target.view(1), w, reduction, ignore)
        check("aten.nll_loss_backward.default", g, x, target, w, reduction, ignore, g.abs())


@pytest.mark.parametrize("shape", [(3, 4, 8, 2), (2, 3, 1, 50), (0, 3, 4, 5), (2, 5, 40, 30)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nll_loss2d(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x, w = torch.randn(shape, device=device).to(dtype), torch.rand(shape[1], device=device).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)
    for reduction in REDUCTIONS:
        for args in ((x, target, w, reduction, 1), (x.transpose(2, 3), target.transpose(1, 2), None, reduction, -100),
                     (x.contiguous(memory_format=torch.channels_last), target, None, reduction, -100)):
            if device == "cpu" or reduction != loss.NONE:
                check("aten.nll_loss2d_forward.default", *args)
            else:  # where PyTorch leaves the total weight unwritten
                check_results("aten.nll_loss2d_forward.default", args, (True, False))
        total = aten.nll_loss2d_forward(x, target, w, reduction, 1)[1]
        g = torch.randn(target.shape if reduction == loss.NONE else (), device=device).to(dtype)
        check("aten.nll_loss2d_backward.default", g, x, target, w, reduction, 1, total)


def test_invalid_targets_raise(device: str) -> None:
    if device != "cpu":
        pytest.skip("a failed assertion on a GPU ends the process")
    x, total = torch.randn(4, 3), torch.ones(())
    for bad in (3, -1, 2**40):
        target = torch.tensor([0, 1, bad, 2])
        check("aten.nll_loss_forward.default", x, target, None, loss.MEAN, -100, intercepted=False)
        check("aten.nll_loss_backward.default", total, x, target, None, loss.MEAN, -100, total, intercepted=False)


def test_rejected_calls_pass_through(device: str) -> None:
    x, target = torch.randn(4, 3, device=device), torch.tensor([0, 1, 2, 0], device=device)
    assert "int32" in reason("aten.nll_loss_forward.default", x, target.int(), None, 1, -100)
    assert "sizes" in reason("aten.nll_loss_forward.default", x, target[:3], None, 1, -100)
    assert "dtype" in reason("aten.nll_loss_forward.default", x, target, torch.ones(3, device=device).double(), 1, -100)
    one, two = torch.ones((), device=device), torch.ones(2, device=device)
    assert "fit" in reason("aten.nll_loss_backward.default", two, x, target, None, 0, -100, one)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignore_index": 2}], ids=str)
def test_cross_entropy(options: dict[str, Any], device: str) -> None:
    function = torch.nn.functional.cross_entropy
    for shape in ((6, 5), (2, 5, 4, 3), (2, 5, 2, 2, 2)):
        x = torch.randn(shape, device=device, requires_grad=True)
        target = torch.randint(0, 5, (shape[0], *shape[2:]), device=device)
        reference = x.detach().double().requires_grad_()
        expected = function(reference, target, **options)
        expected.backward()

        def step(x: torch.Tensor = x, target: torch.Tensor = target) -> torch.Tensor:
            result = function(x, target, **options)
            result.backward()
            return result

        outcome = harness.under_mode(step)
        served = {decision.rule for _, decision in outcome.calls if decision.kind == "rule"}
        assert served & {"nll_loss", "nll_loss2d"} and served & {"nll_loss_backward", "nll_loss2d_backward"}, served
        torch.testing.assert_close(outcome.result.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


# -- launch choice and GPU sizes ---------------------------------------------------------------------------------------

H200 = Target("cuda", "cuda", 90, present=False)


def test_launch_choice() -> None:
    assert loss.choose_sum(4096, H200).programs == 1
    assert loss.choose_sum(1 << 24, H200).programs == 8 * H200.multiprocessors
    assert loss.choose_sum(0, H200).steps == 0
    assert loss.choose_classes(8192, 8192, 32000, True, H200) == loss.ClassTile(1, 4096, True)
    assert not loss.choose_classes(512 * 512, 8 * 512 * 512, 21, False, H200).gather


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (BF16, F64):
        zero = on_gpu((), dtype)
        for n, c in ((8192, 32000), (64, 10)):
            x, target, w = on_gpu((n, c), dtype), on_gpu((n,), I64), on_gpu((c,), dtype)
            for reduction in REDUCTIONS:
                g = on_gpu((n,), dtype) if reduction == loss.NONE else zero
                calls += [("nll_loss_forward", (x, target, w, reduction, -100)),
                          ("nll_loss_backward", (g, x, target, w, reduction, -100, zero))]
        for shape in ((8, 21, 512, 512), (4, 5, 1, 3)):
            x, target = on_gpu(shape, dtype), on_gpu((shape[0], *shape[2:]), I64)
            calls += [("nll_loss2d_forward", (x, target, None, 1, -100)), ("nll_loss2d_backward", (zero, x, target, None, 1, -100, zero))]
        for shape in ((4096, 4096), (60,)):
            x, w = on_gpu(shape, dtype), on_gpu(shape[-1:], dtype)
            for name, numbers in ELEMENTWISE.items():
                calls += [(name, (x, x, loss.MEAN, *numbers)), (name + "_backward", (zero, x, x, loss.MEAN, *numbers))]
            calls += [("binary_cross_entropy", (x, x, w, reduction)) for reduction in (loss.NONE, loss.MEAN)]
            calls += [("binary_cross_entropy_backward", (zero, x, x, w, loss.MEAN)),
                      ("binary_cross_entropy_with_logits", (x, x, w, w, loss.MEAN)),
                      ("binary_cross_entropy_with_logits", (x, x, None, None, 0))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    assert compile_calls(gpu_calls(), target, tmp_path) >= 40
