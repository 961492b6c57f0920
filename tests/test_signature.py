"""The signatures that a call recognizes without building a key, and that it recognizes no others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gemsmode.registry import find_op
from gemsmode.signature import _AtHand, _never, make_functions


class Calls:
    """The functions of an op, with plans that tell the key they were made for."""

    def __init__(self, name: str, **options: Any) -> None:
        self.plans: dict[tuple, Any] = {}
        self.missed: list[tuple] = []
        self.functions = make_functions(find_op(name), self.plans, self.miss, self.failed, **options)

    def miss(self, args: tuple[Any, ...], key: tuple | None) -> Any:
        assert key is not None
        self.missed.append(key)
        self.plans[key] = lambda *_: key
        return self.plans[key]

    def failed(self, error: Exception, *_: Any) -> Any:
        raise error

    def right(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call runs what its key stands for."""
        return self.functions.call(*args, **kwargs) == self.functions.key(*args, **kwargs)


def variants() -> list[torch.Tensor]:
    x = torch.randn(4, 6)
    return [x, torch.randn(6, 4).t(), torch.randn(4, 7), x.double(), torch.randn(4, 6, 1), torch.randn(1, 6).expand(4, 6),
            torch.zeros(0, 6), torch.randn(4, 6, requires_grad=True), torch.nn.Parameter(torch.randn(4, 6)),
            torch.randn(4, 6, device="meta"), x[:, ::2], torch.tensor(2.0),
            torch._neg_view(x), x.to(torch.complex64), x.to(torch.complex64).conj()]


def test_signatures_at_hand_are_told_apart() -> None:
    calls = Calls("aten.add.Tensor")
    tensors = variants()
    for _ in range(6):
        for a, b in itertools.product(tensors, [*tensors, 2, 2.0, True]):
            for _ in range(3):  # so that one call of them is recognized
                assert calls.right(a, b)
            assert calls.right(a, b, alpha=2) and calls.right(a, b, alpha=2.0)
    assert len(calls.missed) == len(set(calls.missed)), "a signature was decided twice"


def test_optional_tensors_and_values_are_told_apart() -> None:
    calls = Calls("aten.native_layer_norm.default")
    x, w = torch.randn(4, 6), torch.randn(6)
    for _ in range(40):
        for args in ((x, [6], w, w, 1e-5), (x, [6], None, w, 1e-5), (x, [6], w, None, 1e-5), (x, [4, 6], None, None, 1e-5)):
            for _ in range(3):
                assert calls.right(*args)
    assert len(calls.missed) == 4


def test_global_settings_are_told_apart() -> None:
    setting = [1]
    calls = Calls("aten.mm.default", state=(lambda: setting[0],))
    x = torch.randn(3, 3)
    for _ in range(100):
        assert calls.right(x, x)
    setting[0] = 2
    assert calls.functions.call(x, x)[-1] == 2


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", ["aten.mm.default", "aten.add.Tensor"])
def test_what_comes_often_needs_no_key(name: str, same: bool) -> None:
    calls = Calls(name)
    x = torch.randn(3, 3)
    y = x if same else torch.randn(3, 3)
    for _ in range(_AtHand.PERIOD + 1):
        calls.functions.call(x, y)
    calls.plans.clear()
    assert calls.right(x, y) and len(calls.missed) == 1
    calls.functions.forget()
    assert calls.right(x, y) and len(calls.missed) == 2, "what was forgotten was still at hand"


def test_guards_of_another_kind_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise TypeError("other arguments in this version")

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", refuse)
    calls = Calls("aten.mm.default")
    x = torch.randn(3, 3)
    for _ in range(100):
        assert calls.right(x, x)
    assert len(calls.missed) == 1 and not _never(x, x)


def test_lists_of_tensors_are_keyed() -> None:
    calls = Calls("aten.cat.default")
    x = torch.randn(3, 3)
    for _ in range(50):
        assert calls.right([x, x]) and calls.right([x]) and calls.right([x, x], 1)
    assert len(calls.missed) == 3
