"""Optimizer steps under the mode equal native ones, and every list op is served."""

from __future__ import annotations

from collections.abc import Callable

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
