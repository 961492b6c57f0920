"""Interpolation in every mode, both ways, over sizes and scale factors; results near float64's, strides PyTorch's."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from vision import check, layouts, passes, randn, refuse

aten = torch.ops.aten

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64

# output size of an input of 7 by 10, and the scale factors that a caller gave
SIZES = (((14, 20), (None, None)), ((5, 3), (None, None)), ((11, 23), (1.7, 2.3)), ((1, 10), (None, None)))
MORE = (((14, 20), (2.0, 2.0)), ((2, 4), (0.4, 0.4)), ((28, 5), (None, None)), ((7, 10), (None, None)))

NEAREST = ("upsample_nearest2d", "_upsample_nearest_exact2d")
SMOOTH = ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
          *(["_upsample_lanczos2d_aa"] if hasattr(aten, "_upsample_lanczos2d_aa") else []))


def sizes(op: str = "") -> tuple[Any, ...]:
    """All of them with --full; two for the antialiased ops, which take long in the interpreter."""
    if harness.OPTIONS.full:
        return SIZES + MORE
    return (((5, 8), (None, None)), SIZES[2]) if op.endswith("_aa") else SIZES


@pytest.mark.parametrize("op", NEAREST)
def test_nearest(op: str) -> None:
    for size, factors in sizes():
        for name, x in layouts(randn(2, 3, 7, 10)):
            if name in ("sliced", "transposed") and size != (14, 20):
                continue
            out = check(op, x, size, *factors)
            check(f"{op}_backward", randn(*out.shape).contiguous(memory_format=torch.channels_last) if name == "channels_last"
                  else randn(*out.shape), size, (2, 3, 7, 10), *factors)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("op", SMOOTH)
def test_smooth(op: str, aligned: bool) -> None:
    if aligned and op == "_upsample_lanczos2d_aa":
        pytest.skip("PyTorch has no aligned Lanczos window")
    for size, factors in sizes(op):
        if aligned:
            factors = (None, None)
        for name, x in layouts(randn(2, 3, 7, 10)):
            if name not in ("contiguous", "channels_last") and not harness.OPTIONS.full:
                continue
            if name == "channels_last" and (aligned or size[0] != 5) and not harness.OPTIONS.full:
                continue
            out = check(op, x, size, aligned, *factors)
            grad = randn(*out.shape)
            grad = grad.contiguous(memory_format=torch.channels_last) if name == "channels_last" else grad
            check(f"{op}_backward", grad, size, (2, 3, 7, 10), aligned, *factors)


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
@pytest.mark.parametrize("op", [*NEAREST, *SMOOTH])
def test_dtypes(op: str, dtype: torch.dtype) -> None:
    x = randn(1, 2, 5, 6, dtype=dtype)
    aligned = () if op in NEAREST else (False,)
    if dtype == BF16 and op.endswith("_aa") and x.device.type == "cpu":
        pytest.skip("PyTorch's own has no bfloat16 on the CPU")
    check(op, x, (9, 4), *aligned, None, None)
    check(f"{op}_backward", randn(1, 2, 9, 4, dtype=dtype), (9, 4), (1, 2, 5, 6), *aligned, None, None)


def test_bytes_of_images() -> None:
    x = (randn(2, 3, 7, 10) * 40 + 100).to(torch.uint8)
    check("upsample_nearest2d", x, (14, 20), None, None)
    passes("upsample_bilinear2d", x, (14, 20), False, None, None, reason="uint8 is not in") if x.device.type == "cpu" else None


def test_signals_and_volumes() -> None:
    for op, aligned in (("upsample_nearest1d", ()), ("_upsample_nearest_exact1d", ()), ("upsample_linear1d", (False,))):
        for size, factor in ((22, None), (5, None), (18, 1.7)):
            out = check(op, randn(2, 3, 11), (size,), *aligned, factor)
            check(f"{op}_backward", randn(*out.shape), (size,), (2, 3, 11), *aligned, factor)
    for op, aligned in (("upsample_nearest3d", ()), ("_upsample_nearest_exact3d", ()), ("upsample_trilinear3d", (False,))):
        for size in ((6, 8, 4), (2, 3, 9)) if harness.OPTIONS.full else ((5, 3, 7),):
            for name, x in list(layouts(randn(2, 3, 3, 4, 5)))[:2]:
                out = check(op, x, size, *aligned, None, None, None)
                grad = randn(*out.shape)
                grad = grad.contiguous(memory_format=torch.channels_last_3d) if name == "channels_last" else grad
                check(f"{op}_backward", grad, size, (2, 3, 3, 4, 5), *aligned, None, None, None)


def test_backward_is_the_adjoint() -> None:
    """<up(x), g> = <x, backward(g)> in float64, to its precision: forward and backward agree on every output."""
    for op in ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"):
        aligned = () if op in NEAREST else (False,)
        for size in ((2, 29), (7, 13)):
            x, g = randn(1, 1, 3, 9, dtype=F64), randn(1, 1, *size, dtype=F64)
            up = harness.under_mode(getattr(aten, op).default, x, size, *aligned, None, None).result
            back = harness.under_mode(getattr(aten, f"{op}_backward").default, g, size, (1, 1, 3, 9), *aligned, None, None).result
            torch.testing.assert_close((up * g).sum(), (x * back).sum(), rtol=1e-11, atol=1e-11)


def test_pytorch_rejects() -> None:
    x = randn(2, 3, 8, 8)
    refuse(lambda: aten.upsample_bilinear2d(x, [0, 2], False))
    refuse(lambda: aten.upsample_bilinear2d(x[0], [4, 2], False))
    refuse(lambda: aten.upsample_nearest2d_backward(x, [8, 9], [2, 3, 4, 4]))


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (BF16, F32, F64):
        small, large = on_gpu((32, 64, 56, 56), dtype), on_gpu((32, 64, 112, 112), dtype)
        for op in NEAREST[:1]:
            calls += [(op, (small, (112, 112), None, None)), (f"{op}_backward", (large, (112, 112), small.shape, None, None))]
        for op in SMOOTH:
            calls += [(op, (small, (112, 112), False, None, None)), (f"{op}_backward", (large, (112, 112), small.shape, False, None, None)),
                      (op, (large, (56, 56), False, None, None)), (f"{op}_backward", (small, (56, 56), large.shape, False, None, None))]
        volume = on_gpu((2, 32, 8, 28, 28), dtype)
        calls += [("upsample_trilinear3d", (volume, (16, 56, 56), False, None, None, None)),
                  ("upsample_trilinear3d_backward", (on_gpu((2, 32, 16, 56, 56), dtype), (16, 56, 56), volume.shape, False,
                                                     None, None, None))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    if target != "cuda:90" and not harness.OPTIONS.full:
        pytest.skip("compiled for every GPU with --full")
    assert compile_calls(gpu_calls() if harness.OPTIONS.full else gpu_calls()[:4], target, tmp_path) >= 4
