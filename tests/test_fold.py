"""Unfold and fold, shuffles, and affine grids: layouts, dtypes, the formats of results, errors."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from gpu_sizes import compile_calls, on_gpu
from vision import check, layouts, passes, randn, refuse

aten = torch.ops.aten

# kernel, dilation, padding, stride
WINDOWS = (((3, 3), (1, 1), (1, 1), (2, 2)), ((2, 3), (2, 1), (0, 1), (1, 3)), ((2, 2), (1, 1), (0, 0), (2, 2)))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_columns(window: tuple[Any, ...]) -> None:
    for _, x in layouts(randn(2, 3, 9, 11)):
        out = check("im2col", x, *window)
        check("col2im", randn(*out.shape), (9, 11), *window)
    check("im2col", x[0], *window)
    check("col2im", out.mT.contiguous().mT, (9, 11), *window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_columns_in_other_dtypes(dtype: torch.dtype) -> None:
    out = check("im2col", randn(2, 3, 9, 11, dtype=dtype), *WINDOWS[0])
    check("col2im", randn(*out.shape, dtype=dtype), (9, 11), *WINDOWS[0])


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_unfold_backward(dim: int) -> None:
    shape = (3, 4, 9, 5)
    for size, step in ((3, 1), (2, 3), (1, 1)):
        grad = randn(*randn(*shape).unfold(dim, size, step).shape)
        check("unfold_backward", grad, shape, dim, size, step)
        check("unfold_backward", grad.mT.contiguous().mT, shape, dim, size, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_shuffles(dtype: torch.dtype) -> None:
    for shape in ((2, 8, 6, 4), (8, 6, 4)):
        for layout, x in layouts((randn(*shape) * 4).to(dtype)):
            check("pixel_shuffle", x, 2)
            check("pixel_unshuffle", x, 2)
            if len(shape) == 4:
                if x.device.type == "cpu":
                    check("native_channel_shuffle", x, 4)
                elif layout != "transposed":
                    check("channel_shuffle", x, 4)
                else:  # of which PyTorch has no view there
                    refuse(lambda x=x: aten.channel_shuffle(x, 4))


def test_shuffles_of_many_dimensions() -> None:
    check("pixel_shuffle", randn(2, 3, 8, 6, 4), 2)
    passes("pixel_shuffle", randn(3, 2, 8, 6, 4).transpose(0, 1), 2, reason="dimensions are left after merging")


@pytest.mark.parametrize("aligned", [False, True])
def test_affine_grids(aligned: bool) -> None:
    for size in ((2, 3, 5, 7), (2, 3, 1, 4), (2, 3, 4, 5, 6)):
        rank = len(size) - 2
        for theta in (randn(2, rank, rank + 1), randn(2, rank + 1, rank).mT, randn(2, rank, rank + 1, dtype=torch.float64)):
            check("affine_grid_generator", theta, size, aligned)


def test_pytorch_rejects() -> None:
    x = randn(2, 8, 4, 4)
    refuse(lambda: F.unfold(x, 9))
    refuse(lambda: F.fold(x[0, 0], (5, 5), 2))
    refuse(lambda: aten.pixel_shuffle(x, 3))
    refuse(lambda: aten.pixel_unshuffle(x, 3))


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, window = on_gpu((32, 64, 56, 56), dtype), ((3, 3), (1, 1), (1, 1), (1, 1))
        calls += [("im2col", (x, *window)), ("col2im", (on_gpu((32, 576, 3136), dtype), (56, 56), *window)), ("pixel_shuffle", (x, 2)),
                  ("affine_grid_generator", (on_gpu((32, 2, 3), dtype), (32, 3, 224, 224), False)), ("pixel_unshuffle", (x, 2)),
                  ("channel_shuffle", (x, 4)), ("unfold_backward", (on_gpu((32, 61, 1000, 4), dtype), (32, 64, 1000), 1, 4, 1))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    if target != "cuda:90" and not harness.OPTIONS.full:
        pytest.skip("compiled for every GPU with --full")
    assert compile_calls(gpu_calls() if harness.OPTIONS.full else gpu_calls()[:2], target, tmp_path) >= 2
