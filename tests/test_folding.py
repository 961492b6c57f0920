"""``gemsmode.folding``: what is known of tensors that no input went into, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemsmode.folding import ConstantFolder


def causal(n: int, device: str) -> torch.Tensor:
    rows = torch.arange(n, device=device)
    return rows[:, None] >= rows


KNOWN: dict[str, Callable[[str], torch.Tensor]] = {
    "comparison": lambda d: causal(5, d),
    "tril": lambda d: torch.ones(4, 6, dtype=torch.bool, device=d).tril(),
    "views of a result": lambda d: causal(5, d)[None, None].expand(2, 3, 5, 5)[..., 1:, ::2],
    "several together": lambda d: torch.cat([causal(3, d), ~causal(3, d)]) & torch.full((3,), True, device=d),
    "a list of factories' together": lambda d: torch.cat([torch.ones(2, dtype=torch.int32, device=d), torch.arange(3, device=d).int()]),
    "indexed by a constant": lambda d: causal(5, d)[torch.arange(3, device=d)],
    "of numbers": lambda d: torch.arange(9, device=d).view(3, 3).cumsum(-1) * 2 - 1,
    "device as a string": lambda d: torch.zeros(3, dtype=torch.int32, device=torch.device(d)).add(3).to(torch.uint8),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_known(name: str, around: Callable[[], Any], device: str) -> None:
    with around(), ConstantFolder() as constants:
        tensor = KNOWN[name](device)
        value = constants.value(tensor)
    assert value is not None and value.device.type == "cpu" and torch.equal(value, tensor.cpu())


class Written:
    """Ways to write to a mask, each of which ends its being a constant."""

    @staticmethod
    def itself(mask: torch.Tensor) -> None:
        mask.fill_(True)

    @staticmethod
    def a_view(mask: torch.Tensor) -> None:
        mask[1:, 0] = True

    @staticmethod
    def as_out(mask: torch.Tensor) -> None:
        torch.logical_not(mask, out=mask)


@pytest.mark.parametrize("write", [Written.itself, Written.a_view, Written.as_out])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_what_is_written_to_is_not_known(write: Callable[[torch.Tensor], None], around: Callable[[], Any], device: str) -> None:
    with around(), ConstantFolder() as constants:
        mask = causal(4, device)
        before, view = ~mask, mask.t()
        write(mask)
        later = ~mask
        assert constants.value(mask) is None and constants.value(view) is None and constants.value(later) is None
        known = constants.value(before)
        assert known is not None and torch.equal(known, before.cpu())


def test_what_compiled_code_says_it_wrote_to_is_not_known(device: str) -> None:
    with ConstantFolder() as constants:
        mask = causal(4, device)
        torch.autograd.graph.increment_version(mask)
        later = ~mask
        assert constants.value(mask) is None and constants.value(mask.t()) is None and constants.value(later) is None


@pytest.mark.parametrize("around", [torch.enable_grad, torch.inference_mode])
def test_what_is_not_known(around: Callable[[], Any], device: str) -> None:
    given = torch.ones(4, dtype=torch.bool, device=device)
    with around(), ConstantFolder() as constants:
        unknown = {
            "an input": given, "of an input": given & causal(4, device),
            "in a list with an input": torch.cat([causal(4, device), given[None]]),
            "a factory's, which kernels may have written to": torch.ones(4, dtype=torch.bool, device=device),
            "a view of a factory's": torch.ones(4, dtype=torch.bool, device=device)[1:],
            "a factory's, as it was": torch.ones(4, dtype=torch.bool, device=device).to(device).contiguous().reshape(4),
            "random": torch.randint(0, 2, (4,), device=device) > 0, "of floating-point numbers": torch.rand(4, device=device) > 0.5,
            "with a generator": torch.randint(0, 2, (4,), device=device, generator=torch.Generator(device)) + 1,
            "not set": torch.empty(4, dtype=torch.bool, device=device) & True,
            "large": torch.arange((1 << 26) + 1, dtype=torch.int8, device=device).ne(0),
        }
        for what, tensor in unknown.items():
            assert constants.value(tensor) is None, what


def test_tensors_that_are_not_strided_do_no_harm(device: str) -> None:
    with ConstantFolder() as constants:
        sparse = torch.eye(3, dtype=torch.int64, device=device).to_sparse()
        sparse.mul_(2)
        made = sparse.to_dense() + 1
        assert constants.value(made) is None and constants.value(sparse) is None
    assert made.tolist() == [[3, 1, 1], [1, 3, 1], [1, 1, 3]]


def test_memory_that_is_used_again_is_not_taken_for_the_old(device: str) -> None:
    with ConstantFolder() as constants:
        for n in range(40):
            known = constants.value(torch.arange(8, device=device) > n)
            assert known is not None and torch.equal(known, torch.arange(8) > n)
            assert constants.value(torch.rand(8, device=device) > 0.5) is None
