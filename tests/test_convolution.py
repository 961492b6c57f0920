"""Convolutions: depthwise and patches are right in every layout; the rest passes through and says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from vision import check, layouts, passes, randn, refuse

from gemsmode import registry
from gemsmode.handlers import Policy
from gemsmode.target import Target

aten = torch.ops.aten

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def tf32(allowed: bool) -> AbstractContextManager[None]:
    """A block where float32 convolutions may take TF32, or may not; PyTorch's own tests allow no other way to set it."""
    return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=allowed)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Rules follow PyTorch's setting, which allows TF32; PyTorch's own kernels take it or do not."""
    with tf32(False):
        yield


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any,
             groups: int) -> None:
    check("convolution", x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


# kernel, stride, padding, dilation
DEPTHWISE = (((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 5), (1, 2), (0, 2), (3, 1)), ((7, 7), (1, 1), (3, 3), (1, 1)))


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("window", DEPTHWISE, ids=str)
def test_depthwise(window: tuple[Any, ...], multiple: int) -> None:
    if multiple > 1 and window[0] == (7, 7) and not harness.OPTIONS.full:
        pytest.skip("with --full")
    for name, x in layouts(randn(2, 6, 7, 8)):
        if name not in ("contiguous", "channels_last") and window[0] != (3, 3) and not harness.OPTIONS.full:
            continue
        convolve(x, randn(6 * multiple, 1, *window[0]), randn(6 * multiple), *window[1:], groups=6)


def test_depthwise_signals_dtypes_and_the_op_of_its_own() -> None:
    convolve(randn(2, 6, 13), randn(6, 1, 3), None, (1,), (1,), (1,), 6)
    for dtype in (BF16, F64):
        convolve(randn(2, 6, 9, 9, dtype=dtype), randn(6, 1, 3, 3, dtype=dtype), randn(6, dtype=dtype), (2, 2), (1, 1), (1, 1), 6)
    x, weight = randn(2, 6, 9, 9), randn(6, 1, 3, 3)
    out = harness.under_mode(aten._conv_depthwise2d.default, x, weight, [3, 3], None, [1, 1], [1, 1], [1, 1])  # PyTorch's is CUDA's alone
    assert out.intercepted()
    harness.compare("_conv_depthwise2d", out.result, aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 6))


@pytest.mark.parametrize("kernel", [(4, 4), (2, 3), (5, 1)], ids=str)
def test_patches(kernel: tuple[int, int]) -> None:
    weight = randn(20, 6, *kernel)
    for _, x in layouts(randn(2, 6, 13, 11)):
        convolve(x, weight, randn(20), kernel, (0, 0), (1, 1), 1)
    convolve(randn(2, 6, 13, 11), weight.contiguous(memory_format=torch.channels_last), None, kernel, (0, 0), (1, 1), 1)
    convolve(randn(2, 6, 13, 11, dtype=BF16), weight.to(BF16), randn(20, dtype=BF16), kernel, (0, 0), (1, 1), 1)


def test_patches_of_signals() -> None:
    convolve(randn(2, 6, 13), randn(5, 6, 4), randn(5), (4,), (0,), (1,), 1)


@pytest.mark.parametrize(("weight", "stride", "padding", "transposed", "groups", "reason"), [
    ((6, 6, 3, 3), 1, 1, False, 1, "windows that overlap"),
    ((6, 6, 2, 2), 3, 0, False, 1, "leave gaps"),
    ((6, 6, 1, 1), 1, 0, False, 1, "1x1"),
    ((6, 3, 3, 3), 1, 1, False, 2, "2 groups of several channels"),
    ((6, 6, 2, 2), 2, 0, True, 1, "transposed"),
], ids=lambda value: str(value) if isinstance(value, str) else "")
def test_the_rest_says_why(weight: tuple[int, ...], stride: int, padding: int, transposed: bool, groups: int, reason: str) -> None:
    passes("convolution", randn(2, 6, 8, 8), randn(*weight), None, [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], groups,
           reason=reason)


def test_pytorch_rejects() -> None:
    x = randn(2, 6, 8, 8)
    refuse(lambda: aten.convolution(x, randn(6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 6))
    refuse(lambda: aten.convolution(x, randn(6, 1, 9, 9), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 6))


@pytest.mark.parametrize(("target", "precision"), [("cuda", "tf32x3"), ("hip", "ieee")])
def test_float32_stays_float32(target: str, precision: str) -> None:
    """Whatever PyTorch allows: products of TF32 are taken three at a time."""
    call = (on_gpu((64, 3, 224, 224), F32), on_gpu((768, 3, 16, 16), F32), None, (16, 16), (0, 0), (1, 1), False, (0, 0), 1)
    for allowed in (False, True):
        with tf32(allowed):
            arch = Target("cuda", target, 90 if target == "cuda" else "gfx942", present=False)
            plan = Policy(registry.default, target=arch).handler(aten.convolution.default).decide(call, bind=False).plan
        assert plan is not None and dict(plan.launches[-1].constants)["PRECISION"] == precision


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (BF16, F32):
        for last in (False, True):
            x = on_gpu((256, 3, 224, 224), dtype, (3 * 224 * 224, 1, 3 * 224, 3) if last else None)
            for size, channels in ((16, 768), (14, 1024)):
                calls.append(("convolution", (x, on_gpu((channels, 3, size, size), dtype), on_gpu((channels,), dtype), (size, size), (0, 0),
                                              (1, 1), False, (0, 0), 1)))
            y = on_gpu((32, 384, 56, 56), dtype, (384 * 56 * 56, 1, 384 * 56, 384) if last else None)
            for size in (7, 3):
                calls.append(("convolution", (y, on_gpu((384, 1, size, size), dtype), None, (1, 1), (size // 2, size // 2), (1, 1), False,
                                              (0, 0), 384)))
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    if target != "cuda:90" and not harness.OPTIONS.full:
        pytest.skip("compiled for every GPU with --full")
    assert compile_calls(gpu_calls() if harness.OPTIONS.full else gpu_calls()[:4:3], target, tmp_path) >= 2
