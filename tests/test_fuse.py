"""``GemsMode(fuse=True)``: what runs as one kernel, what is written, and that no value is ever read before it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_gpu import TARGET, FakeGpu

import gemsmode
from gemsmode import GemsMode, fuse
from gemsmode.registry import find_op
from support import in_order


@pytest.fixture
def flushed() -> Iterator[list[fuse.Flushed]]:
    """What was run, group by group; nothing waits when the test ends."""
    fuse.counts = []
    yield fuse.counts
    fuse.counts = None
    assert not fuse._groups
    assert not fuse._pending
    assert not fuse._readers


# -- launches on a GPU that is not there -------------------------------------------------------------------------------


class Deferred:
    """Calls that wait for a :class:`FakeGpu`, whose tensors are CPU tensors."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        op = find_op(name)
        given = in_order(op, args, kwargs)
        self.gpu._live += [a for a in given if isinstance(a, torch.Tensor)]
        there = tuple([fuse.TensorMeta.of(a)._replace(device=torch.device("cuda", 0)) if isinstance(a, torch.Tensor) else a for a in given])
        recipe = fuse._recipe_for(self.gpu.policy.handler(op), there)
        assert recipe is not None
        return recipe.enqueue(*given)


@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
def test_launch_conventions(monkeypatch: pytest.MonkeyPatch, convention: str, flushed: list[fuse.Flushed]) -> None:
    gpu = FakeGpu(monkeypatch, convention)
    monkeypatch.setattr(fuse, "_current_stream", gpu.stream)
    monkeypatch.setattr(fuse, "_programs", {})
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: gpu.device(0))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: stream)
    assert gpu.policy.target is TARGET
    call = Deferred(gpu)
    x = torch.randn(6, 40)
    y = call("aten.mul.Tensor", call("aten.add.Tensor", x, 1.5), x)
    m = call("aten.mean.dim", y, [-1], True)
    z = call("aten.sub.Tensor", y, m)
    fuse.flush_all()
    wanted = (x + 1.5) * x
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(z, wanted - wanted.mean(-1, keepdim=True))
    call("aten.mul_.Tensor", x, 2.0)
    t = call("aten.add.Tensor", call("aten.neg.default", x.t()), x.t()[:, :1])
    fuse.flush_all()
    torch.testing.assert_close(t, -x.t() + x.t()[:, :1])
    assert [f.calls for f in flushed] == [("add", "mul", "mean", "sub"), ("mul_",), ("neg", "add")]
    assert all(f.fused for f in flushed)
    assert len(gpu.launches) + gpu.public == 3
    assert gpu.public == (3 if convention == "public" else 0)
