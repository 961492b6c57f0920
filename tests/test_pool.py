"""Pools: windows and layouts, ties and NaN, the formats of results, composites, backward by gathering, errors."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from gpu_sizes import compile_calls, on_gpu
from vision import check, layouts, randn, refuse

from gemsmode.registry import find_op

aten = torch.ops.aten

BF16, F32, F64, I64 = torch.bfloat16, torch.float32, torch.float64, torch.int64

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = ((3, 2, 1, 1, False), (2, 2, 0, 1, True), ((3, 2), (1, 3), (1, 0), (2, 1), True), (7, 3, 3, 1, False))


def two(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool2d(window: tuple[Any, ...]) -> None:
    kernel, stride, padding, dilation, ceil_mode = window
    for name, x in layouts(randn(2, 3, 13, 17).round()):
        args = (two(kernel), two(stride), two(padding), two(dilation), ceil_mode)
        out, index = check("max_pool2d_with_indices", x, *args)
        grad = randn(*out.shape)
        check("max_pool2d_with_indices_backward", grad if name != "sliced" else grad.mT.contiguous().mT, x, *args, index)


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_max_pool2d_dtypes(dtype: torch.dtype) -> None:
    x = randn(2, 3, 9, 11, dtype=dtype)
    out, index = check("max_pool2d_with_indices", x, (3, 3), (2, 2), (1, 1))
    check("max_pool2d_with_indices_backward", randn(*out.shape, dtype=dtype), x, (3, 3), (2, 2), (1, 1), (1, 1), False, index)


def test_max_pool_of_nan_ties_and_infinities() -> None:
    x = randn(2, 3, 9, 10).round()
    x.view(-1)[::7] = float("nan")
    x[0, 0] = float("-inf")
    x[0, 1] = 2.0
    x[0, 2, 3] = float("inf")
    for given in (x, x.to(BF16), x.contiguous(memory_format=torch.channels_last)):
        if given.is_cuda and given is not x and given.dtype == x.dtype:
            given[0, 0] = 1.0  # of windows of -inf PyTorch's kernel for channels-last images says that their place is 0
        check("max_pool2d_with_indices", given, (3, 3), (2, 2), (1, 1))
        check("max_pool2d_with_indices", given, (7, 7), (2, 2), (3, 3))
        check("adaptive_max_pool2d", given, (4, 3))


def test_unbatched_and_empty_batches() -> None:
    check("max_pool2d_with_indices", randn(3, 9, 9), (3, 3))
    check("avg_pool2d", randn(3, 9, 9), (3, 3))
    check("max_pool2d_with_indices", randn(0, 3, 9, 9), (3, 3))
    check("avg_pool2d_backward", randn(0, 3, 3, 3), randn(0, 3, 9, 9), (3, 3), (3, 3), (0, 0), False, True, None)


def test_composites_in_every_mode() -> None:
    """Under inference mode the composite itself arrives, and its indices are not made."""
    x = randn(2, 3, 8, 8)

    def pooled(x: torch.Tensor, grad: Any) -> torch.Tensor:
        with grad():
            return F.max_pool2d(x, 3, 2, 1)

    for grad in (torch.no_grad, torch.enable_grad):
        check("max_pool2d_with_indices", x, grad, function=pooled)
    check("max_pool2d", x, torch.inference_mode, function=pooled)

    def inferred(function: Any) -> Any:
        def run(x: torch.Tensor) -> Any:
            with torch.inference_mode():
                return function(x)

        return run

    check("max_pool1d", x[0], function=inferred(lambda x: F.max_pool1d(x, 3, 2, 1)))
    check("max_pool3d", x, function=inferred(lambda x: F.max_pool3d(x, 2)))
    check("avg_pool2d", x[0], function=lambda x: F.avg_pool1d(x, 3))
    check("_adaptive_avg_pool2d", x[0], function=lambda x: F.adaptive_avg_pool1d(x, 3))
    check("adaptive_max_pool2d", x[0], function=lambda x: F.adaptive_max_pool1d(x, 3))


# kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
AVERAGES = ((3, 2, 1, False, True, None), (3, 2, 1, True, False, None), ((3, 2), (1, 3), (1, 0), True, True, None),
            (5, 3, 2, True, True, 7), (2, 2, 0, False, True, None), (7, 2, 3, True, False, None))


@pytest.mark.parametrize("window", AVERAGES, ids=str)
def test_avg_pool2d(window: tuple[Any, ...]) -> None:
    kernel, stride, padding, *rest = window
    for name, x in layouts(randn(2, 3, 13, 17)):
        args = (two(kernel), two(stride), two(padding), *rest)
        out = check("avg_pool2d", x, *args)
        if name in ("contiguous", "channels_last"):
            check("avg_pool2d_backward", randn(*out.shape), x, *args)


def test_averages_of_equal_elements_are_exact() -> None:
    x = torch.full((1, 1, 9, 9), 0.1, device=harness.OPTIONS.device)
    assert torch.equal(check("avg_pool2d", x, (3, 3)), torch.full_like(x[..., :3, :3], 0.1))


@pytest.mark.parametrize("size", [(3, 4), (1, 5), (20, 30)], ids=str)
def test_adaptive_pools(size: tuple[int, int]) -> None:
    for name, x in layouts(randn(2, 3, 13, 10)):
        out = check("_adaptive_avg_pool2d", x, size)
        largest, index = check("adaptive_max_pool2d", x, size)
        if name in ("contiguous", "channels_last"):
            check("_adaptive_avg_pool2d_backward", randn(*out.shape), x)
            check("adaptive_max_pool2d_backward", randn(*largest.shape), x, index)


def test_pools_over_volumes() -> None:
    for name, x in layouts(randn(2, 3, 5, 6, 7)):
        if name in ("sliced", "transposed") and not harness.OPTIONS.full:
            continue
        args = ((3, 2, 1), (1, 3, 2), (1, 0, 0), (2, 1, 1), True)
        out, index = check("max_pool3d_with_indices", x, *args)
        check("max_pool3d_with_indices_backward", randn(*out.shape), x, *args, index)
        args = ((3, 2, 3), (2, 1, 3), (1, 0, 1), True, False, None)
        out = check("avg_pool3d", x, *args)
        check("avg_pool3d_backward", randn(*out.shape), x, *args)
        out = check("_adaptive_avg_pool3d", x, (3, 4, 2))
        check("_adaptive_avg_pool3d_backward", randn(*out.shape), x)
        out, index = check("adaptive_max_pool3d", x, (3, 4, 2))
        check("adaptive_max_pool3d_backward", randn(*out.shape), x, index)


def test_recomputed_backward() -> None:
    """``max_pool2d_backward`` has no kernel of PyTorch's on CPU and CUDA: it equals the one with indices."""
    x, grad = randn(2, 3, 9, 9), randn(2, 3, 5, 5)
    _, index = aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])
    expected = aten.max_pool2d_with_indices_backward(grad, x, [3, 3], [2, 2], [1, 1], [1, 1], False, index)
    outcome = harness.under_mode(aten.max_pool2d_backward.default, grad, x, [3, 3], [2, 2], [1, 1])
    assert outcome.intercepted([find_op("max_pool2d_backward")])
    harness.compare("max_pool2d_backward", outcome.result, expected)


@pytest.mark.parametrize("rank", [2, 3])
def test_fractional_pools(rank: int) -> None:
    for name, x in layouts(randn(2, 3, *(7, 8, 9)[-rank:])):
        if rank == 3 and name != "contiguous" and not harness.OPTIONS.full:
            continue
        samples = torch.rand(2, 3, rank, device=x.device)
        for kernel, size in ((2, (3, 5, 4)), (3, (4, 1, 5))):
            args = ((kernel,) * rank, size[-rank:], samples)
            out, index = check(f"fractional_max_pool{rank}d", x, *args)
            check(f"fractional_max_pool{rank}d_backward", randn(*out.shape), x, *args[:2], index)


def test_unpooling() -> None:
    for _, x in layouts(randn(2, 3, 8, 6)):
        out, index = aten.max_pool2d_with_indices(x, [2, 2])
        check("max_unpool2d", out, index, (8, 6))
    out, index = aten.max_pool3d_with_indices(randn(2, 3, 4, 6, 4), [2, 2, 2])
    check("max_unpool3d", out, index, (4, 6, 4), (2, 2, 2), (0, 0, 0))
    if harness.OPTIONS.device == "cpu":  # an assertion of the device ends a process on a GPU
        index.view(-1)[3] = 10**6
        refuse(lambda: aten.max_unpool3d(out, index, [4, 6, 4], [2, 2, 2], [0, 0, 0]))


def test_out_variants() -> None:
    x = randn(2, 3, 8, 8)
    expected, positions = aten.max_pool2d_with_indices(x, [2, 2])
    out, index = torch.empty_like(expected), torch.empty_like(positions)
    outcome = harness.under_mode(lambda: aten.max_pool2d_with_indices.out(x, [2, 2], out=out, indices=index))
    assert outcome.intercepted() and outcome.result[0] is out and torch.equal(out, expected) and torch.equal(index, positions)
    grad, into = torch.ones_like(expected), torch.empty_like(x)
    outcome = harness.under_mode(lambda: aten.avg_pool2d_backward.grad_input(grad, x, [2, 2], [2, 2], [0, 0], False, True, None,
                                                                              grad_input=into))
    assert outcome.intercepted() and outcome.result is into and torch.equal(into, torch.full_like(x, 0.25))


def test_pytorch_rejects() -> None:
    x = randn(2, 3, 8, 8)
    refuse(lambda: F.max_pool2d(x, 3, 1, 2))
    refuse(lambda: F.max_pool2d(x, 9))
    refuse(lambda: F.avg_pool2d(x, 3, divisor_override=0))
    refuse(lambda: F.max_pool2d(x[:, :0], 2))
    refuse(lambda: aten.adaptive_max_pool2d(x[:, :, :0], (1, 2)))
    refuse(lambda: F.max_pool2d(x[0, 0], 2))


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (BF16, F32, F64):
        x, out, index = on_gpu((32, 128, 112, 112), dtype), on_gpu((32, 128, 56, 56), dtype), on_gpu((32, 128, 56, 56), I64)
        last = on_gpu((32, 128, 112, 112), dtype, (128 * 112 * 112, 1, 128 * 112, 128))
        window = ((3, 3), (2, 2), (1, 1))
        calls += [("max_pool2d_with_indices", (x, *window, (1, 1), False)), ("max_pool2d_with_indices", (last, *window, (1, 1), False)),
                  ("max_pool2d", (x, *window, (1, 1), False)), ("adaptive_max_pool2d", (x, (9, 9))),
                  ("max_pool2d_with_indices", (x, (7, 7), (1, 1), (3, 3), (1, 1), False)),
                  ("max_pool2d_with_indices_backward", (out, x, *window, (1, 1), False, index)),
                  ("adaptive_max_pool2d_backward", (on_gpu((32, 128, 9, 9), dtype), x, on_gpu((32, 128, 9, 9), I64))),
                  ("avg_pool2d", (x, (2, 2), (), (0,), False, True, None)), ("avg_pool2d", (x, (7, 7), (1, 1), (3, 3), False, False, None)),
                  ("avg_pool2d_backward", (out, x, *window, False, False, None)), ("_adaptive_avg_pool2d", (x, (9, 9))),
                  ("_adaptive_avg_pool2d_backward", (on_gpu((32, 128, 9, 9), dtype), x)),
                  ("fractional_max_pool2d", (out, (2, 2), (28, 28), on_gpu((32, 128, 2), dtype))),
                  ("max_unpool2d", (out, index, (112, 112)))]
        volume, window3 = on_gpu((4, 32, 16, 56, 56), dtype), ((3, 3, 3), (2, 2, 2), (1, 1, 1))
        calls += [("max_pool3d_with_indices", (volume, *window3, (1, 1, 1), False)),
                  ("max_pool3d_with_indices_backward", (on_gpu((4, 32, 8, 28, 28), dtype), volume, *window3, (1, 1, 1), False,
                                                        on_gpu((4, 32, 8, 28, 28), I64))),
                  ("avg_pool3d", (volume, *window3, False, True, None))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    if target != "cuda:90" and not harness.OPTIONS.full:
        pytest.skip("compiled for every GPU with --full")
    assert compile_calls(gpu_calls() if harness.OPTIONS.full else gpu_calls()[:6:2], target, tmp_path) >= 3
