"""Reflection and replication pads: every rank, negative pads, layouts, backward, the formats of results, errors."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from vision import check, layouts, randn, refuse

aten = torch.ops.aten

PADS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((2, 1), (0, 3), (-1, 2)),
    2: ((1, 2, 3, 4), (-2, 3, 0, 0), (4, 4, 5, 5)),
    3: ((1, 2, 0, 1, 2, 1), (-1, 1, 1, -1, 0, 0)),
}


@pytest.mark.parametrize("kind", ["reflection", "replication"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_pads(rank: int, kind: str) -> None:
    shape = (2, 3, *(4, 6, 5)[-rank:])
    for pad in PADS[rank]:
        if kind == "reflection" and max(pad) >= min(shape[2:]):
            continue
        for name, x in layouts(randn(*shape)):
            out = check(f"{kind}_pad{rank}d", x, pad)
            if name in ("contiguous", "channels_last"):
                check(f"{kind}_pad{rank}d_backward", randn(*out.shape), x, pad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = randn(3, 6, 5, dtype=dtype)
    for kind in ("reflection", "replication"):
        check(f"{kind}_pad2d", x, (1, 2, 3, 2))
        check(f"{kind}_pad2d_backward", randn(3, 11, 8, dtype=dtype), x, (1, 2, 3, 2))


def test_one_element_is_both_edges() -> None:
    x = randn(1, 2, 1, 3)
    out = check("replication_pad2d", x, (0, 0, 2, 3))
    check("replication_pad2d_backward", randn(*out.shape), x, (0, 0, 2, 3))


def test_empty_batch_and_out_variant() -> None:
    check("reflection_pad2d", randn(0, 3, 6, 5), (1, 1, 1, 1))
    x = randn(2, 3, 6, 5)
    grad, into = randn(2, 3, 8, 7), torch.empty(0, device=x.device)
    outcome = harness.under_mode(lambda: aten.replication_pad2d_backward.grad_input(grad, x, [1, 1, 1, 1], grad_input=into))
    assert outcome.intercepted() and outcome.result is into
    harness.compare("grad_input", into, aten.replication_pad2d_backward(grad, x, [1, 1, 1, 1]))


def test_pytorch_rejects() -> None:
    x = randn(1, 2, 1, 3)
    refuse(lambda: aten.reflection_pad2d(x, (3, 1, 0, 0)))
    refuse(lambda: aten.reflection_pad2d(x[:, :, :0], (1, 1, 0, 0)))


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        image, volume = on_gpu((32, 64, 112, 112), dtype), on_gpu((4, 32, 16, 56, 56), dtype)
        for kind in ("reflection", "replication"):
            calls += [(f"{kind}_pad2d", (image, (1, 1, 1, 1))), (f"{kind}_pad3d", (volume, (1,) * 6)),
                      (f"{kind}_pad2d_backward", (on_gpu((32, 64, 114, 114), dtype), image, (1, 1, 1, 1))),
                      (f"{kind}_pad3d_backward", (on_gpu((4, 32, 18, 58, 58), dtype), volume, (1,) * 6))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    if target != "cuda:90" and not harness.OPTIONS.full:
        pytest.skip("compiled for every GPU with --full")
    assert compile_calls(gpu_calls() if harness.OPTIONS.full else gpu_calls()[:2], target, tmp_path) >= 2
