"""Plans whose second stage depends on values that the first one computed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gemsmode import GemsMode
from gemsmode.plan import Alloc, Arg, Launch, Out, Plan, Size, contiguous_strides, specs
from gemsmode.registry import Registry, find_op, planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import current


def metas(*tensors: torch.Tensor) -> tuple[TensorMeta, ...]:
    return tuple(map(TensorMeta.of, tensors))


@triton.jit
def count_kernel(p_mask, p_places, p_total, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_mask = tl.load(p_mask + o, mask=o < n, other=0).to(tl.int64)
    b_places = tl.cumsum(b_mask, 0)
    tl.store(p_places + o, tl.where(b_mask != 0, b_places - 1, -1), mask=o < n)
    tl.store(p_total, tl.sum(b_mask, 0))


@triton.jit
def place_kernel(p_x, p_places, p_y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_place = tl.load(p_places + o, mask=o < n, other=-1)
    tl.store(p_y + b_place, tl.load(p_x + o, mask=o < n), mask=b_place >= 0)


@pytest.fixture
def staged() -> tuple[Registry, list[int]]:
    """A registry that serves ``masked_select`` of contiguous vectors in two stages, and the counts it was asked to plan for."""
    registry, asked = Registry("staged"), []

    @planned("aten.masked_select.default", family="test", name="select", registry=registry)
    def select(call: Call) -> Plan:
        x, mask = call.args
        block = triton.next_power_of_2(max(x.numel, 1))

        def then(values: list[int]) -> Plan:
            asked.append(values[0])
            out = Alloc((values[0],), (1,), x.dtype)
            launch = Launch(place_kernel, (1, 1, 1), (Arg(0), Arg(2), Out(0), Size(x.numel)), (("BLOCK", block),))
            places = first.allocs[0].meta
            return Plan((out,), (launch,) if values[0] else (), Out(0), {Arg(0): x, Arg(2): places} if values[0] else {})

        places = Alloc(x.shape, contiguous_strides(x.shape), torch.int64)
        launch = Launch(count_kernel, (1, 1, 1), (Arg(1), Out(0), Out(1), Size(x.numel)), (("BLOCK", block),))
        first = Plan((places, Alloc((1,), (1,), torch.int64)), (launch,), Out(1), {Arg(1): mask}, then=then, example=(3,))
        return first

    return registry, asked


def test_sizes_come_from_values(staged: tuple[Registry, list[int]]) -> None:
    registry, asked = staged
    device = current().device_type
    x = torch.arange(10.0, device=device)
    with GemsMode(registry=registry, strict=True, trace=True) as gems:
        for mask in (x > 6, x > 3, x > 6, x < 0, x >= 0):
            assert torch.equal(torch.masked_select(x, mask), x.cpu()[mask.cpu()].to(device))
    row, = [r for r in gems.report.to_dict()["ops"] if r["overload"] == "aten.masked_select.default"]
    assert row["decision"] == "rule" and row["calls"] == 5
    assert asked == [3, 6, 0, 10]  # 3 was planned for once


def test_given_tensors_take_the_size_found(staged: tuple[Registry, list[int]]) -> None:
    registry, _ = staged
    x = torch.arange(10.0, device=current().device_type)
    out, wrong = torch.empty(0, device=x.device), torch.empty(0, dtype=torch.float64, device=x.device)
    handler = GemsMode(registry=registry).policy.handler(find_op("aten.masked_select.out"))
    assert handler.decide(metas(x, x > 6, out), bind=False).decision.kind == "rule"
    with GemsMode(registry=registry, strict=True):
        assert torch.masked_select(x, x > 6, out=out) is out
        assert out.tolist() == [7.0, 8.0, 9.0]
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            torch.masked_select(x, x > 6, out=wrong)


def test_both_stages_are_listed_for_compilation(staged: tuple[Registry, list[int]]) -> None:
    registry, _ = staged
    x = torch.arange(10.0, device=current().device_type)
    decided = GemsMode(registry=registry).policy.handler(find_op("aten.masked_select.default")).decide(metas(x, x > 6), bind=False)
    assert decided.plan is not None
    assert [s.kernel for s in specs(decided.plan)] == [count_kernel, place_kernel]
