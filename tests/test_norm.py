"""Layer, RMS, weight, group and batch norm: layouts, dtypes, missing parameters, masks of gradients, statistics far from zero."""

from __future__ import annotations

import itertools
from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from support import check_results, in_order, reason, run
from torch._decomp import decomposition_table

import gemsmode
from gemsmode import registry
from gemsmode.handlers import Policy
from gemsmode.registry import find_op
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import channel_norm, norm, rows  # noqa: E402  (they need what load_ops arranges)

aten = torch.ops.aten
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = ((F32, F32), (F64, F64), (BF16, BF16), (F16, F32))
"""Dtypes of input and parameters."""


def names(dtypes: Any) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes) if isinstance(dtypes, tuple) else str(dtypes)


def check(name: str, *args: Any) -> None:
    """The call is intercepted, and right by PyTorch's result or a float64 reference."""
    op = find_op(name)
    assert harness.check_call(op, in_order(op, args, {}), "reduction"), harness.label(op, args)


def skip_mixed(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    if dtypes[0] != dtypes[1] and device != "cpu":
        pytest.skip("PyTorch takes float32 parameters beside a 16-bit input on CPU only")


# -- layer norm and RMS norm -------------------------------------------------------------------------------------------

ROWS = {
    "two dimensions": (lambda d: torch.randn(5, 7, device=d), 1),
    "two normalized": (lambda d: torch.randn(3, 4, 5, device=d), 2),
    "all normalized": (lambda d: torch.randn(7, device=d), 1),
    "transposed rows": (lambda d: torch.randn(4, 3, 5, device=d).transpose(0, 1), 1),
    "transposed columns": (lambda d: torch.randn(3, 4, 5, device=d).transpose(1, 2), 2),
    "rows fast": (lambda d: torch.randn(3, 4, 5, device=d).transpose(0, 2), 1),
    "expanded": (lambda d: torch.randn(9, 1, device=d).expand(9, 6), 1),
    "many rows": (lambda d: torch.randn(300, 33, device=d), 1),
    "no rows": (lambda d: torch.randn(0, 4, device=d), 1),
}


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
def test_layer_norm(dtypes: tuple[torch.dtype, torch.dtype], layout: str, device: str) -> None:
    skip_mixed(dtypes, device)
    make, k = ROWS[layout]
    x = make(device).to(dtypes[0])
    shape = list(x.shape[x.ndim - k:])
    w, b = (torch.randn(shape, device=device).to(dtypes[1]) for _ in range(2))
    g = torch.randn(x.shape, device=device).to(dtypes[0])
    for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
        check("aten.native_layer_norm.default", x, shape, weight, bias, 1e-5)
        if weight is not None or dtypes[0] == dtypes[1]:
            _, mean, rstd = aten.native_layer_norm(x, shape, weight, bias, 1e-5)
            mask = [True, weight is not None, bias is not None]
            check("aten.native_layer_norm_backward.default", g, x, shape, mean, rstd, weight, bias, mask)
    _, mean, rstd = aten.native_layer_norm(x, shape, w, b, 1e-5)
    for mask in itertools.product((True, False), repeat=3):
        check("aten.native_layer_norm_backward.default", g, x, shape, mean, rstd, w, b, list(mask))


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=str)
def test_rms_norm(dtype: torch.dtype, layout: str, device: str) -> None:
    make, k = ROWS[layout]
    x = make(device).to(dtype)
    shape = list(x.shape[x.ndim - k:])
    w, g = torch.randn(shape, device=device).to(dtype), torch.randn(x.shape, device=device).to(dtype)
    with torch.inference_mode():  # otherwise the op is taken apart before the mode sees it, on CPU
        for weight, eps in ((w, None), (None, 1e-3)):
            check("aten._fused_rms_norm.default", x, shape, weight, eps)
            if x.numel():
                check("aten.rms_norm.default", x, shape, weight, eps)
    rstd = run("aten._fused_rms_norm.default", x, shape, w, None)[1]
    for weight, mask in itertools.product((w, None), ([True, True], [True, False], [False, True])):
        got = run("aten._fused_rms_norm_backward.default", g, x, shape, rstd, weight, mask)
        exact = decomposition_table[aten._fused_rms_norm_backward.default](
            g.double(), x.double(), shape, rstd.double(), None if weight is None else weight.double(), mask)
        for i, (mine, theirs) in enumerate(zip(got, exact)):
            assert (mine is None) == (not mask[i] or (i == 1 and weight is None))
            if mine is not None:
                harness.compare("rms_norm backward", mine, theirs.to(dtype), theirs)


def test_rms_norm_of_a_module(device: str) -> None:
    x, w = torch.randn(4, 6, 32, device=device), torch.randn(32, device=device)
    expected = torch.nn.functional.rms_norm(x.double(), (32,), w.double(), 1e-6)
    with torch.inference_mode():
        outcome = harness.under_mode(torch.nn.functional.rms_norm, x, (32,), w, 1e-6)
    assert any(d.kind == "rule" and "rms_norm" in str(op) for op, d in outcome.calls)
    torch.testing.assert_close(outcome.result.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [4096, 70_000])
def test_statistics_far_from_zero(n: int, device: str) -> None:
    """A mean of 1e6 beside a deviation of 1, of which float32 keeps four bits; the statistics must lose no more."""
    x = 1e6 + torch.randn(2, n, device=device)
    exact = x.double()
    y, mean, rstd = run("aten.native_layer_norm.default", x, [n], None, None, 1e-5)
    deviation = exact.var(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(rstd.double(), (deviation + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), exact.mean(1, keepdim=True), rtol=1e-7, atol=0)
    torch.testing.assert_close(y.double(), (exact - exact.mean(1, keepdim=True)) * (deviation + 1e-5).rsqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_rows_longer_than_a_block(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for long rows, on short ones."""
    monkeypatch.setattr(norm, "choose_tile", lambda *_: rows.Tile(2, 16, 4, True))
    monkeypatch.setattr(norm, "choose_runs", lambda r, *_: norm.Runs(4, 16, 4, 8, -(-r.n_rows // 8), fused=False))
    x, g = (torch.randn(21, 83, device=device).to(dtype) for _ in range(2))
    w, b = (torch.randn(83, device=device).to(dtype) for _ in range(2))
    check("aten.native_layer_norm.default", x, [83], w, b, 1e-5)
    check("aten.native_layer_norm.default", x.t().contiguous().t(), [83], w, None, 1e-5)
    _, mean, rstd = aten.native_layer_norm(x, [83], w, b, 1e-5)
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        check("aten.native_layer_norm_backward.default", g, x, [83], mean, rstd, w, b, mask)
    with torch.inference_mode():
        check("aten._fused_rms_norm.default", x, [83], w, None)


def test_rejected_norms_pass_through(device: str) -> None:
    x, w = torch.randn(3, 4, device=device), torch.randn(4, device=device)
    assert "normalized_shape" in reason("aten.native_layer_norm.default", x, [5], None, None, 1e-5)
    assert "float64" in reason("aten.native_layer_norm.default", x, [4], w.double(), None, 1e-5)
    assert "not given" in reason("aten.native_layer_norm_backward.default", x, x, [4], x[:, :1], x[:, :1], None, None, [True, True, True])
    last = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    decision = Policy(registry.default).handler(aten._fused_rms_norm.default).lookup((last, [5], None, None)).decision
    assert decision.kind in ("pass", "composite") and "channels_last" in (decision.reason or "")


# -- weight norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 5), 0), ((3, 4, 5), 2), ((3,), 0), ((500, 30), 1), ((1, 7), 0), ((2, 3000), 0)],
                         ids=str)
def test_weight_norm(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> None:
    v = torch.randn(shape, device=device).to(dtype)
    per_row = [1] * len(shape)
    per_row[dim] = shape[dim]
    g = torch.randn(per_row, device=device).to(dtype)
    check("aten._weight_norm_interface.default", v, g, dim)
    norms = aten._weight_norm_interface(v, g, dim)[1]
    check("aten._weight_norm_interface_backward.default", torch.randn(shape, device=device).to(dtype), v, g, norms, dim)


# -- group norm --------------------------------------------------------------------------------------------------------

GROUPS = {
    "4-d": (lambda d: torch.randn(3, 4, 8, 2, device=d), 2),
    "3-d": (lambda d: torch.randn(2, 6, 5, device=d), 3),
    "2-d": (lambda d: torch.randn(2, 6, device=d), 3),
    "one group": (lambda d: torch.randn(2, 3, 7, 5, device=d), 1),
    "split": (lambda d: torch.randn(1, 4, 300, 200, device=d) + 50, 2),
    "no samples": (lambda d: torch.randn(0, 4, 3, device=d), 2),
}


@pytest.mark.parametrize("layout", GROUPS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
def test_group_norm(dtypes: tuple[torch.dtype, torch.dtype], layout: str, device: str) -> None:
    skip_mixed(dtypes, device)
    make, groups = GROUPS[layout]
    inputs = [make(device).to(dtypes[0])]
    if inputs[0].ndim == 4 and device == "cpu":
        inputs.append(inputs[0].contiguous(memory_format=torch.channels_last))
    for x in inputs:
        n, c = x.shape[:2]
        s = x.shape[2:].numel()
        w, b = (torch.randn(c, device=device).to(dtypes[1]) for _ in range(2))
        g = torch.empty_like(x).normal_()
        for weight, bias in ((w, b), (None, None)):
            check("aten.native_group_norm.default", x, weight, bias, n, c, s, groups, 1e-5)
        _, mean, rstd = aten.native_group_norm(x, w, b, n, c, s, groups, 1e-5)
        check("aten.native_group_norm_backward.default", g, x, mean, rstd, w, n, c, s, groups, [True] * 3)
        # PyTorch's own is not safe to call with every mask, so the others are compared with the full result.
        native = aten.native_group_norm_backward(g, x, mean, rstd, w, n, c, s, groups, [True] * 3)
        exact = aten.native_group_norm_backward(*(t.double() for t in (g, x, mean, rstd, w)), n, c, s, groups, [True] * 3)
        for mask in ([True, False, False], [False, True, True], [False, False, True]):
            got = run("aten.native_group_norm_backward.default", g, x, mean, rstd, w, n, c, s, groups, mask)
            for wanted, mine, theirs, reference in zip(mask, got, native, exact):
                assert (mine is not None) == wanted
                if wanted:
                    harness.compare("group norm backward", mine, theirs, reference)


def test_group_norm_without_parameters(device: str) -> None:
    x, g = torch.randn(2, 4, 3, device=device), torch.randn(2, 4, 3, device=device)
    _, mean, rstd = run("aten.native_group_norm.default", x, None, None, 2, 4, 3, 2, 1e-5)
    got = run("aten.native_group_norm_backward.default", g, x, mean, rstd, None, 2, 4, 3, 2, [True, False, False])
    ones = torch.ones(4, device=device)
    expected = aten.native_group_norm_backward(g, x, mean, rstd, ones, 2, 4, 3, 2, [True] * 3)[0]
    torch.testing.assert_close(got[0], expected)
    assert got[1:] == (None, None)
    assert "not given" in reason("aten.native_group_norm_backward.default", g, x, mean, rstd, None, 2, 4, 3, 2, [True] * 3)


# -- batch norm --------------------------------------------------------------------------------------------------------

BATCHES = {
    "4-d": lambda d: torch.randn(3, 4, 8, 2, device=d),
    "channels_last": lambda d: torch.randn(3, 4, 8, 2, device=d).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda d: torch.randn(2, 3, 4, 5, 6, device=d).contiguous(memory_format=torch.channels_last_3d),
    "2-d": lambda d: torch.randn(6, 5, device=d),
    "3-d": lambda d: torch.randn(6, 5, 3, device=d),
    "transposed": lambda d: torch.randn(6, 3, 5, device=d).transpose(1, 2),
    "transposed spots": lambda d: torch.randn(2, 3, 4, 5, device=d).transpose(2, 3),
    "transposed samples": lambda d: torch.randn(2, 3, 4, 5, device=d).transpose(0, 1),
    "instance norm": lambda d: torch.randn(1, 12, 8, 2, device=d),
}
MASKS = ([True, True, True], [True, False, False], [False, True, True], [False, False, True])


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
def test_batch_norm(dtypes: tuple[torch.dtype, torch.dtype], layout: str, device: str) -> None:
    x = BATCHES[layout](device).to(dtypes[0])
    w, b, mean, variance = (torch.rand(x.shape[1], device=device).to(dtypes[1]) + 0.5 for _ in range(4))
    check("aten._native_batch_norm_legit.no_stats", x, w, None, True, 0.1, 1e-5)
    check("aten._native_batch_norm_legit_functional.default", x, None, b, mean, variance, True, 0.1, 1e-5)
    check("aten._native_batch_norm_legit_no_training.default", x, w, b, mean, variance, 0.1, 1e-5)
    for training in (True, False):
        check("aten._native_batch_norm_legit.default", x, w, b, mean, variance, training, 0.1, 1e-5)
        _, saved, inverse = aten._native_batch_norm_legit(x, w, b, mean.clone(), variance.clone(), training, 0.1, 1e-5)
        random = torch.empty_like(x).normal_()
        expanded = torch.randn((), device=device).to(x.dtype).expand(x.shape)
        for g, mask in [*((random, m) for m in MASKS), (expanded, MASKS[1])]:
            args = (g, x, w, mean, variance, saved, inverse, training, 1e-5, mask)
            if device == "cpu":
                check("aten.native_batch_norm_backward.default", *args)
            else:  # where PyTorch gives some results unasked
                check_results("aten.native_batch_norm_backward.default", args, mask)


def test_batch_norm_updates_running_statistics(device: str) -> None:
    x = torch.randn(5, 3, 4, device=device)
    w, b, mean, variance = (torch.rand(3, device=device) + 0.5 for _ in range(4))
    theirs, mine = [mean.clone(), variance.clone()], [mean.clone(), variance.clone()]
    expected = aten.native_batch_norm(x, w, b, *theirs, True, 0.3, 1e-5)
    got = run("aten.native_batch_norm.default", x, w, b, *mine, True, 0.3, 1e-5)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(got, expected)
    run("aten.native_batch_norm.default", x, w, b, *mine, False, 0.3, 1e-5)
    torch.testing.assert_close(mine, theirs)
    one = [torch.zeros(3, device=device), torch.ones(3, device=device)]
    run("aten.native_batch_norm.default", x[:1, :, :1], w, b, *one, True, 0.3, 1e-5)
    assert one[1].isnan().all()  # the unbiased variance of one value, as PyTorch has it


def test_batch_norm_far_from_zero(device: str) -> None:
    x = 1e5 + torch.randn(16, 2, 50, 50, device=device)
    exact = x.double().transpose(0, 1).flatten(1)
    _, mean, inverse = run("aten._native_batch_norm_legit.no_stats", x, None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(inverse.double(), (exact.var(1, unbiased=False) + 1e-5).rsqrt(), rtol=1e-4, atol=0)


def test_cudnn_backward_needs_no_reserve(device: str) -> None:
    """cuDNN's op on metadata and tensors of this device: the same numbers as ``native_batch_norm_backward``."""
    x, g = torch.randn(3, 4, 5, 6, device=device), torch.randn(3, 4, 5, 6, device=device)
    w, mean, variance = (torch.rand(4, device=device) + 0.5 for _ in range(3))
    _, saved, inverse = aten._native_batch_norm_legit.no_stats(x, w, None, True, 0.1, 1e-5)
    reserve = torch.empty(0, dtype=torch.uint8, device=device)
    got = run("aten.cudnn_batch_norm_backward.default", x, g, w, mean, variance, saved, inverse, 1e-5, reserve)
    expected = aten.native_batch_norm_backward(g, x, w, mean, variance, saved, inverse, True, 1e-5, [True] * 3)
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    got = run("aten.cudnn_batch_norm.default", x, w, w, mean, variance, False, 0.1, 1e-5)
    torch.testing.assert_close(got[0], aten._native_batch_norm_legit_no_training(x, w, w, mean, variance, 0.1, 1e-5)[0])
    assert [tuple(t.shape) for t in got[1:]] == [(0,), (0,), (0,)] and got[3].dtype == torch.uint8
    assert "workspace" in reason("aten.cudnn_batch_norm.default", x, w, w, mean, variance, True, 0.1, 1e-5)


def test_modules_forward_and_backward(device: str) -> None:
    modules = [torch.nn.LayerNorm(6), torch.nn.GroupNorm(2, 4), torch.nn.BatchNorm2d(4), torch.nn.InstanceNorm2d(4, affine=True),
               torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 3))]
    for module in modules:
        module = module.to(device)
        x = torch.randn(3, 4, 5, 6, device=device)

        def step(inputs: torch.Tensor, module: torch.nn.Module = module) -> list[torch.Tensor]:
            inputs = inputs.clone().requires_grad_()
            module.zero_grad()
            (module(inputs) ** 2).mean().backward()
            return [inputs.grad, *(p.grad.clone() for p in module.parameters())]

        expected = step(x)
        outcome = harness.under_mode(step, x)
        rules = {d.rule for _, d in outcome.calls if d.kind == "rule"}
        assert any("norm" in rule and "backward" in rule for rule in rules), (type(module).__name__, rules)
        for mine, theirs in zip(outcome.result, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_two_runs_agree(device: str) -> None:
    x, g, w = torch.randn(500, 64, device=device), torch.randn(500, 64, device=device), torch.randn(64, device=device)
    _, mean, rstd = aten.native_layer_norm(x, [64], w, w, 1e-5)
    first, second = (run("aten.native_layer_norm_backward.default", g, x, [64], mean, rstd, w, w, [True] * 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# -- launch choice and GPU sizes ---------------------------------------------------------------------------------------

H200 = Target("cuda", "cuda", 90, present=False)


def test_launch_choice() -> None:
    split = rows.split_rows((16384, 4096), (1,), [(4096, 1)])
    runs = norm.choose_runs(split, 4, True, H200)
    assert runs.fused and runs.columns == 4096 and runs.count <= 2 * H200.multiprocessors
    assert norm.choose_runs(split, 4, False, H200).count == 16384  # without sums each row is a program's
    assert not norm.choose_runs(rows.split_rows((512, 50000), (1,), [(50000, 1)]), 4, True, H200).fused
    assert channel_norm._group_whole(10, 64, 4, H200) is not None and channel_norm._group_whole(10, 4096, 4, H200) is None
    assert channel_norm._splits(512, 100, H200) == 1 and channel_norm._splits(32, 100, H200) > 4


@pytest.mark.parametrize("dtype", [F32, F64])
def test_out_of_another_dtype_is_left_to_pytorch_on_a_gpu(dtype: torch.dtype) -> None:
    """Batch norm's CUDA kernels raise for it; its metadata functions, which are asked otherwise, do not."""
    policy = Policy(registry.default, target=Target("cuda", "cuda", 90, 32, 132, False))
    x, channels = on_gpu((4, 3, 5), F32), on_gpu((3,), F32)
    args = (x, channels, channels, channels, channels, True, 0.1, 1e-5, x._replace(dtype=dtype), channels, channels)
    decision = policy.handler(find_op("aten.native_batch_norm.out")).decide(args, bind=False).decision
    assert (decision.kind, decision.rule) == ("rule", "batch_norm") if dtype == F32 else "another dtype" in (decision.reason or "")


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype, shapes in ((BF16, [(16384, 4096), (64, 64), (512, 50000), (1, 16384)]), (F32, [(65536, 768)]),
                          (F64, [(2048, 4096), (64, 20000)])):
        for shape in shapes:
            x, w, saved, n = on_gpu(shape, dtype), on_gpu(shape[1:], dtype), on_gpu((shape[0], 1), F64 if dtype == F64 else F32), [shape[1]]
            calls += [("native_layer_norm", (x, n, w, w, 1e-5)), ("_fused_rms_norm", (x, n, w, None)),
                      ("native_layer_norm_backward", (x, x, n, saved, saved, w, w, [True] * 3)),
                      ("native_layer_norm_backward", (x, x, n, saved, saved, None, None, [True, False, False])),
                      ("_fused_rms_norm_backward", (x, x, n, saved, w, [True, True]))]
    for dtype, (shape, dim) in itertools.product((BF16, F64), (((4096, 1024), 0), ((4096, 1024), 1), ((16, 100000), 0))):
        per_row = tuple(s if d == dim else 1 for d, s in enumerate(shape))
        v, g, norms = on_gpu(shape, dtype), on_gpu(per_row, dtype), on_gpu(per_row, F64 if dtype == F64 else F32)
        calls += [("_weight_norm_interface", (v, g, dim)), ("_weight_norm_interface_backward", (v, v, g, norms, dim))]
    for dtype, (shape, groups) in itertools.product((BF16, F64), (((16, 320, 64, 64), 32), ((1, 512, 64, 64), 32), ((16, 64, 7, 7), 32))):
        n, c, h, _ = shape
        x, w, saved = on_gpu(shape, dtype), on_gpu((c,), dtype), on_gpu((n, groups), dtype)
        calls += [("native_group_norm", (x, w, w, n, c, h * h, groups, 1e-5)),
                  ("native_group_norm_backward", (x, x, saved, saved, w, n, c, h * h, groups, [True] * 3))]
    last = (64 * 56 * 56, 1, 64 * 56, 64)
    for dtype, (shape, stride) in itertools.product((BF16, F64), (((64, 64, 56, 56), None), ((64, 64, 56, 56), last), ((4096, 1024), None),
                                                                   ((32, 512, 7, 7), None))):
        x, saved = on_gpu(shape, dtype, stride), on_gpu((shape[1],), F64 if dtype == F64 else F32)
        calls += [("_native_batch_norm_legit", (x, saved, saved, saved, saved, True, 0.1, 1e-5)),
                  ("native_batch_norm", (x, saved, saved, saved, saved, False, 0.1, 1e-5)),
                  ("native_batch_norm_backward", (x, x, saved, saved, saved, saved, saved, True, 1e-5, [True] * 3))]
    x, saved = on_gpu((64, 64, 56, 56), BF16), on_gpu((64,), F32)
    calls += [("cudnn_batch_norm", (x, saved, saved, saved, saved, False, 0.1, 1e-5)),
              ("cudnn_batch_norm_backward", (x, x, saved, saved, saved, saved, saved, 1e-5, on_gpu((0,), torch.uint8)))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    assert compile_calls(gpu_calls(), target, tmp_path) >= 60
