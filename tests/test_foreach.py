"""Optimizer steps under the mode equal native ones, and every list op is served."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemsmode import GemsMode
from gemsmode.target import current

SHAPES = [(5, 7), (3,), (64, 33), (2, 3, 4), (1,), (0, 4), *[(i,) for i in range(1, 40)]]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW fused, maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, maximize=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, weight_decay=0.1),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-2, foreach=True, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True, momentum=0.9, nesterov=True),
    "SGD fused, plain": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True, weight_decay=0.1),
}


def train(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, mode: GemsMode | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(current().device_type, dtype)

    parameters = [torch.nn.Parameter(values(s)) for s in SHAPES] + [torch.nn.Parameter(values((6, 5)).t())]
    optimizer = make(parameters)
    for _ in range(3):
        for p in parameters:
            p.grad = values(tuple(p.shape)) if p.is_contiguous() else values(tuple(p.t().shape)).t()
        if mode is None:
            optimizer.step()
        else:
            with mode:
                optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(name: str, dtype: torch.dtype) -> None:
    mode = GemsMode(strict=True, trace=True)
    expected, got = train(OPTIMIZERS[name], dtype, None), train(OPTIMIZERS[name], dtype, mode)
    rows = [r for r in mode.report.to_dict()["ops"] if "_foreach" in r["overload"] or "_fused" in r["overload"]]
    # Step counts stay on the CPU, which is another device than the mode's on a GPU.
    assert rows and {r["decision"] for r in rows} <= ({"rule"} if current().device_type == "cpu" else {"rule", "host"}), rows
    for a, b in zip(expected, got):
        torch.testing.assert_close(b, a, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_lists_of_integers_pass_through_with_the_reason() -> None:
    with GemsMode(strict=True, trace=True) as mode:
        result = torch._foreach_add([torch.ones(3, dtype=torch.int64, device=current().device_type)], 1)
    assert result[0].tolist() == [2, 2, 2]
    (row,) = [r for r in mode.report.to_dict()["ops"] if "_foreach" in r["overload"]]
    assert row["decision"] == "pass" and "int64 is not floating point" in row["reason"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", [2, 1, float("inf")])
def test_norms_of_a_list(dtype: torch.dtype, order: float) -> None:
    shapes = [s for s in SHAPES[:30] if 0 not in s or order == 2] + [(70, 1000)]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=generator, dtype=torch.float64).to(current().device_type, dtype) for s in shapes]
    given[2][3, 4], given[1][0] = float("inf"), float("nan")
    with GemsMode(strict=True, trace=True) as mode:
        got = torch._foreach_norm(given, order)
    assert [r.decision for r in mode.report.compute] == ["rule"]
    expected = [torch.linalg.vector_norm(g.double(), order).to(dtype) for g in given]
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(list(got), expected, rtol=tolerance, atol=0, equal_nan=True)


def test_clipping_gradients() -> None:
    def clipped(mode: Any) -> tuple[torch.Tensor, list[Any]]:
        parameters = [torch.nn.Parameter(torch.zeros(s, device=current().device_type)) for s in SHAPES]
        generator = torch.Generator().manual_seed(3)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        with mode:
            return torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True), [p.grad for p in parameters]

    norm, expected = clipped(contextlib.nullcontext())
    under_mode, got = clipped(GemsMode(strict=True))
    torch.testing.assert_close(under_mode, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("op", [torch._foreach_div_, torch._foreach_mul, torch._foreach_add_, torch._foreach_sub], ids=lambda f: f.__name__)
def test_a_scalar_on_the_device_for_each_tensor(op: Callable[..., Any], of: torch.dtype, dtype: torch.dtype) -> None:
    """As in ``Adam(capturable=True)``, whose corrections are computed from step counts on the device."""
    device = current().device_type
    generator = torch.Generator().manual_seed(0)
    shapes = [s for s in SHAPES if s]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    scalars = [(torch.rand((), generator=generator, dtype=torch.float64) + 0.5).to(device, of) for _ in shapes]
    plain = [g.clone() for g in given]
    # As PyTorch's kernels for GPUs do; those for CPUs round only some scalars to the dtype of the tensors first.
    expected = op(plain, scalars if device != "cpu" else [s.to(dtype) for s in scalars]) or plain
    with GemsMode(strict=True, trace=True) as mode:
        got = op(given, scalars) or given
    assert [r.decision for r in mode.report.compute] == ["rule"]
    assert all(g.dtype == dtype for g in got)
    torch.testing.assert_close(list(got), list(expected), rtol=0 if dtype != torch.float64 else 1e-15, atol=0)


def test_scalars_that_change_the_dtype_or_are_elsewhere_pass() -> None:
    device = current().device_type
    tensors = [torch.ones(3, dtype=torch.bfloat16, device=device), torch.ones((), dtype=torch.bfloat16, device=device)]
    scalars = [torch.full((), 2.0, device=device) for _ in tensors]
    with GemsMode(strict=True, trace=True) as mode:
        result = torch._foreach_mul(tensors, scalars)
        torch._foreach_mul(tensors[:1], [torch.ones(1, device=device)])
    foreach = [r for r in mode.report.compute if "_foreach" in r.overload]
    assert [r.dtype for r in result] == [torch.bfloat16, torch.float32]
    assert [r.decision for r in foreach] == ["pass", "pass"], foreach


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_capturable_steps(dtype: torch.dtype) -> None:
    if current().device_type != "cuda":
        pytest.skip("PyTorch keeps step counts on the device only of a GPU")
    mode = GemsMode(strict=True, trace=True)

    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=1e-2, foreach=True, capturable=True)

    expected, got = train(make, dtype, None), train(make, dtype, mode)
    passed = {r.overload for r in mode.report.compute if r.decision == "pass"}
    assert not passed, passed
    # Step counts and what is computed from them are float32, whatever the parameters are: a unit in the last place of 0.999**1 is
    # 6e-5 of 1 - 0.999**1, and half of that of the first step.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("to", "source"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16),
                                            (torch.float64, torch.float64)])
def test_copies_of_a_list(to: torch.dtype, source: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=generator).to(current().device_type, source) for s in SHAPES[:30]]
    flat = torch.empty(sum(g.numel() for g in given), dtype=to, device=current().device_type)
    views = [v.view(g.shape) for v, g in zip(flat.split([g.numel() for g in given]), given)]  # as FSDP copies into one buffer
    with GemsMode(strict=True, trace=True) as mode:
        torch._foreach_copy_(views, given)
    assert [r.decision for r in mode.report.compute] == ["rule"]
    assert torch.equal(flat, torch.cat([g.to(to).flatten() for g in given]))
