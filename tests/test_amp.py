"""Gradient scaling: unscaling, the next scale, fused steps that do both, and a training loop with ``GradScaler``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from torch import nn

from gemsmode import GemsMode

aten = torch.ops.aten
SHAPES = [(5, 7), (0,), (1,), (3000,), (2, 3, 4), *[(i,) for i in range(1, 22)]]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def served(mode: GemsMode, *names: str) -> None:
    """``mode`` ran rules for every call of these ops, and there was one of each."""
    for name in names:
        decisions = {(r.decision, r.reason) for r in mode.report.records if r.overload.split(".")[1] == name}
        assert decisions == {("rule", None)}, (name, decisions)


def gradients(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [1.0, 1 / 65536])
def test_gradients_are_unscaled_and_what_is_not_finite_is_found(dtype: torch.dtype, inverse: float, device: str) -> None:
    for bad in (None, float("-inf"), float("nan")):
        results = []
        for mode in (None, GemsMode(strict=True, trace=True)):
            given, found = gradients(dtype, device), torch.zeros((), device=device)
            if bad is not None:
                given[3][2999] = bad
            scale = torch.full((), inverse, device=device)
            if mode is None and dtype == torch.bfloat16 and device == "cuda":  # which PyTorch has no kernel for
                given = [(g.float() * inverse).to(dtype) for g in given]
                found.fill_(not all(g.isfinite().all() for g in given))
            elif mode is None:
                aten._amp_foreach_non_finite_check_and_unscale_(given, found, scale)
            else:
                with mode:
                    aten._amp_foreach_non_finite_check_and_unscale_(given, found, scale)
                served(mode, "_amp_foreach_non_finite_check_and_unscale_")
            assert found.item() == (bad is not None)
            results.append(given)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def test_the_scale_grows_and_backs_off(device: str) -> None:
    for found, tracker, scale, growth in itertools.product((0.0, 1.0), (0, 1, 3), (2.0**16, 3e38, 1e-45), (2.0, 1.5)):
        results = []
        for mode in (None, GemsMode(strict=True, trace=True)):
            given = torch.full((), scale, device=device), torch.full((), tracker, dtype=torch.int32, device=device)
            flag = torch.full((), found, device=device)
            if mode is None:
                aten._amp_update_scale_(*given, flag, growth, 0.3, 2)
            else:
                with mode:
                    assert aten._amp_update_scale_(*given, flag, growth, 0.3, 2) is given[0]
                served(mode, "_amp_update_scale_")
            results.append([t.item() for t in given])
        assert results[0] == results[1], (found, tracker, scale, growth)


FUSED: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, amsgrad=True, weight_decay=0.1),
    "Adam, lr a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2, device=p[0].device), fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True, momentum=0.9, nesterov=True),
    "SGD, lr a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(1e-2, device=p[0].device), fused=True),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_steps_unscale_and_skip(name: str, dtype: torch.dtype, device: str) -> None:
    results = []
    for mode in (None, GemsMode(strict=True, trace=True)):
        parameters = [nn.Parameter(g) for g in gradients(dtype, device)]
        optimizer = FUSED[name](parameters)
        for found in (0.0, 1.0, 0.0):
            for p, g in zip(parameters, gradients(dtype, device)):
                p.grad = g * 1024
            optimizer.grad_scale = torch.full((), 1024.0, device=device)
            optimizer.found_inf = torch.full((), found, device=device)
            if mode is None:
                optimizer.step()
            else:
                with mode:
                    optimizer.step()
        if mode is not None:
            served(mode, "_fused_sgd_" if "SGD" in name else "_fused_adamw_" if "AdamW" in name else "_fused_adam_")
        state = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        results.append([*(p.detach() for p in parameters), *(p.grad for p in parameters), *state])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", [False, True])
def test_training_with_a_scaler(fused: bool, device: str) -> None:
    inputs = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).to(device)
    inputs[3] = float("inf")  # a step that is not to be taken

    def train(mode: GemsMode | None) -> tuple[list[torch.Tensor], list[float]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
        scales = []
        for x in inputs:
            with mode or torch.enable_grad():
                scaler.scale(net(x).square().mean()).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return [p.detach() for p in net.parameters()], scales

    expected, scales = train(None)
    mode = GemsMode(strict=True, trace=True)
    got, under_mode = train(mode)
    assert scales == under_mode and scales[3] == scales[2] / 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    served(mode, "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_")


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """Calls of optimizers to compile for GPUs, with everything that is optional."""
    one, count = on_gpu((), torch.float32), on_gpu((), torch.int32)
    calls: list[tuple[str, tuple[Any, ...]]] = [("_amp_update_scale_.default", (one, count, one, 2.0, 0.5, 2000))]
    for dtype in (torch.float16, torch.float32):
        some = tuple(on_gpu((4096, n), dtype) for n in (4096, 11008, 1))
        steps = tuple(one for _ in some)
        calls += [
            ("_amp_foreach_non_finite_check_and_unscale_.default", (some, one, one)),
            ("_fused_adam_.tensor_lr", (some, some, some, some, some, steps, one, 0.9, 0.999, 0.01, 1e-8, True, False, one, one)),
            ("_fused_sgd_.tensor_lr", (some, some, some, 0.01, 0.9, one, 0.1, True, True, False, one, one)),
            ("_foreach_norm.Scalar", (some, 2, None)),
            ("_foreach_norm.Scalar", (some, float("inf"), None)),
            ("_foreach_copy_.default", (tuple(on_gpu(m.shape, torch.bfloat16) for m in some), some, False)),
        ]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_for_gpus(target: str, device: str, tmp_path: Path) -> None:
    if device == "cuda":
        pytest.skip("compiled by running them")
    assert compile_calls(gpu_calls(), target, tmp_path) == 17
