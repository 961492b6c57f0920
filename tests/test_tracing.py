"""Recording and reporting: nothing is missed, nothing is counted twice, and what is printed is what happened."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import gc
import html
import io
import json
import re
import shutil
import subprocess
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import skip_in_company, skip_without_cuda
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gemsmode
from gemsmode import GemsMode, Registry, demo, rule
from gemsmode import registry as registry_module
from gemsmode.handlers import Decision, Policy
from gemsmode.signature import describe
from gemsmode.target import INTERPRETER
from gemsmode.tracing import Gathered, NotAReportError, Record, Recorder, Report, clock, gather, merge
from gemsmode.tracing import recorder as recorder_module
from gemsmode.tracing.clock import HARVEST_AT, DeviceClock
from gemsmode.tracing.table import plain, render
from gemsmode.tracing.timeline import Timeline

SIZE = demo.Size(width=16, layers=1, heads=2, batch=2, length=8, repeats=1)


class Counting(TorchDispatchMode):
    """The independent count: every call that reaches a plain mode, by overload."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.out = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x)) * 2


def traced(**options: Any) -> GemsMode:
    """A traced mode that replaces nothing, for tests of the record alone: quick in the interpreter."""
    return GemsMode(allow=options.pop("allow", []), trace=True, **options)


def calls_by_overload(report: Report) -> Counter[str]:
    found: Counter[str] = Counter()
    for record in report.records:
        found[record.overload] += record.calls
    return found


F32 = ("float32",)
RECORDS = (
    Record("aten.add.Tensor", "rule", "add", None, ("f32[8,8]", "f32[8]"), F32, "Net.a", calls=6, host_s=0.003, bytes=512, flops=64,
           touched=288),
    Record("aten.add.Tensor", "rule", "add", None, ("f32[4]", "f32[4]"), F32, "Net.b", "backward", 2, 0.001, bytes=48, flops=4, touched=32),
    Record("aten.add.Tensor", "pass", None, "complex64 is complex", ("c64[4]", "c64[4]"), ("complex64",), "Net.b", calls=1, host_s=0.0005,
           touched=64),
    Record("aten.mm.default", "pass", None, "no rule", ("f32[8,8]", "f32[8,8]"), F32, "Net.a", calls=3, host_s=0.0125, touched=512),
    Record("aten.exp.default", "error", "exp", "OutOfResources: shared memory", ("f32[8]",), F32, calls=1, host_s=0.001, touched=32),
    Record("aten.view.default", "view", None, "a view, an allocation or metadata", ("f32[8,8]",), F32, "Net.a", calls=7, host_s=0.0002,
           touched=256),
)
ENVIRONMENT = {"gemsmode": "0.1.0", "torch": "2.13.0", "triton": "3.7.0", "python": "3.11", "device": "a GPU", "interpreter": False,
               "timing": "wall"}
REPORT = Report(RECORDS, ENVIRONMENT, ("something to know",), 0.5)


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow", [[], None], ids=["nothing replaced", "every rule"])
def test_calls_equal_an_independent_count(allow: Any, device: str) -> None:
    tokens = demo.read_bytes(demo.TEXT, SIZE, torch.device(device))

    def run(mode: Any) -> None:
        torch.manual_seed(0)
        model = demo.Decoder(SIZE).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        with mode:
            demo._step(model, tokens)
            optimizer.step()

    run(counting := Counting())
    run(mode := GemsMode(allow=allow, trace=True))
    report = mode.report
    assert calls_by_overload(report) == counting.calls
    assert report.calls == sum(counting.calls.values()) == sum(op["calls"] for op in report.to_dict()["ops"])
    assert (report.coverage.calls > 0.3) == (allow is None)
    assert {r.phase for r in report.records} == {"forward", "backward", "optimizer"}


def test_a_call_that_raises_is_counted() -> None:
    with traced() as mode, pytest.raises(RuntimeError, match="must match"):
        torch.ones(3) + torch.ones(4)
    assert calls_by_overload(mode.report)["aten.add.Tensor"] == 1


def test_calls_of_an_inner_mode_are_counted_once() -> None:
    x = torch.ones(4)
    with traced() as outer:
        x.exp()
        with traced() as inner:
            x.exp()
        x.exp()
    assert (outer.report.calls, inner.report.calls) == (2, 1)


def test_every_thread_is_counted() -> None:
    x = torch.ones(4)
    mode = gemsmode.enable(allow=[], trace=True)

    def work() -> None:
        for _ in range(200):
            x.exp()

    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gemsmode.disable()
    (record,) = mode.report.records
    assert (record.overload, record.calls) == ("aten.exp.default", 1600)
    assert len(mode.recorder.timeline) == 1600


def test_views_and_allocations_are_kept_apart() -> None:
    with traced() as mode:
        torch.empty(4, 4).t().unsqueeze(0).detach()
        torch.ones(4).exp()
    decisions = {r.overload: r.decision for r in mode.report.records}
    assert decisions["aten.t.default"] == decisions["aten.empty.memory_format"] == decisions["aten.detach.default"] == "view"
    assert decisions["aten.exp.default"] == "pass"
    assert sum(r.calls for r in mode.report.compute) == 2  # ones and exp


def test_numbers_on_the_host_are_no_hole_in_the_coverage() -> None:
    gpu = gemsmode.target.Target("cuda", "cuda", 90, present=False)
    step, row = torch.ones(()), torch.ones(3)
    recorder, passed = Recorder(gpu), Decision("pass", None, "no rule")
    for op, args in ((torch.ops.aten.exp.default, (step,)), (torch.ops.aten.exp.default, (row,)),
                     (torch.ops.aten._foreach_add_.Scalar, ([step, step], 1)), (torch.ops.aten._foreach_add_.List, ([step], [row]))):
        recorder.end(recorder.begin(op, passed), op, passed, args)
    report = recorder.report()
    assert [(r.overload, r.decision) for r in report.records] == [
        ("aten.exp.default", "host"), ("aten.exp.default", "pass"), ("aten._foreach_add_.Scalar", "host"),
        ("aten._foreach_add_.List", "pass")]
    assert sum(r.calls for r in report.compute) == 2
    assert "Numbers on the host: 2 calls" in str(report) and "0-dim CPU tensors alone" in report.to_csv()
    gemsmode.load_ops()
    policy = Policy(registry_module.default, target=gpu)
    kinds = [policy.handler(op).decide(tuple(describe(a) for a in args), bind=False).decision.kind for op, args in (
        (torch.ops.aten._foreach_add_.Scalar, ([step, step], 1)), (torch.ops.aten.exp.default, (row,)))]
    assert kinds == ["host", "pass"]


def test_communication_is_counted_apart() -> None:
    record = Record("_c10d_functional.all_reduce.default", "comm", None, "communication between processes", calls=2, host_s=0.5)
    report = Report((*RECORDS, record), ENVIRONMENT)
    assert report.coverage == REPORT.coverage and report.calls == REPORT.calls + 2
    assert "Communication between processes: 2 calls, 500 ms of host time, not in the figures above" in str(report)


def test_coverage_is_of_compute() -> None:
    coverage = REPORT.coverage
    assert coverage.calls == pytest.approx(8 / 13)
    assert coverage.time == pytest.approx(0.004 / 0.018)
    assert coverage.bytes == pytest.approx((6 * 288 + 2 * 32) / (6 * 288 + 2 * 32 + 64 + 3 * 512 + 32))
    assert Report((RECORDS[-1],)).coverage == (0, 0, 0)


def test_shapes_of_arguments_and_lists() -> None:
    x = torch.ones(2, 3)
    with traced() as mode:
        torch.cat([x, x, x[:1]])
        torch._foreach_add([torch.ones(2) for _ in range(20)], 1)
        x[:, torch.tensor([0])]
    inputs = {r.overload: r.inputs for r in mode.report.records}
    assert inputs["aten.cat.default"] == ("[f32[2,3],f32[2,3],f32[1,3]]",)
    assert inputs["aten._foreach_add.Scalar"] == ("[" + ",".join(["f32[2]"] * 8) + ",...]x20",)
    assert inputs["aten.index.Tensor"] == ("f32[2,3]", "[None,i64[1]]")
    touched = {r.overload: r.touched for r in mode.report.records}
    assert touched["aten.cat.default"] == 4 * 15 and touched["aten._foreach_add.Scalar"] == 4 * 40


def test_no_tensor_is_kept() -> None:
    x = torch.ones(4)
    with traced() as mode:
        y = x.exp()
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None and mode.report.calls == 1


def test_many_shapes_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_ROWS", 10)
    with traced() as mode:
        for n in range(50):
            torch.empty(n)
            torch.ones(3).expand(n + 1, 3).exp()
    report = mode.report
    assert report.calls == 50 * 4
    assert len(report.records) < 20
    assert any("gathered as (various)" in note for note in report.notes)


def test_a_hundred_thousand_calls_are_cheap_and_small() -> None:
    recorder = Recorder(INTERPRETER)
    decision = Decision("rule", "add", bytes=64, flops=4)
    op = torch.ops.aten.add.Tensor
    args = [(torch.ones(2, n), torch.ones(n)) for n in range(1, 101)]

    def record(n: int) -> None:
        for i in range(n):
            token = recorder.begin(op, decision)
            recorder.end(token, op, decision, args[i % 100])

    record(100)
    costs = []
    for _ in range(5):
        began = time.process_time()
        record(2000)
        costs.append((time.process_time() - began) / 2000)
    assert min(costs) < 15e-6
    tracemalloc.start()
    record(100_000)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 100e6
    assert recorder.report().calls == 100 + 10_000 + 100_000


def test_tracing_adds_little_to_a_call(device: str) -> None:
    """End to end, under modules: host time of a traced call beyond that of an untraced one."""
    skip_in_company(device)
    registry = Registry("cheap")
    x, result = torch.ones(8, 8, device=device), torch.zeros(8, 8, device=device)
    rule("aten.relu.default", registry=registry)(lambda x: result)
    model = nn.Sequential(nn.Sequential(nn.ReLU()))

    def host_time(mode: GemsMode) -> float:
        with mode, torch.no_grad():
            model(x)
            costs = []
            for _ in range(7):
                began = time.process_time()
                for _ in range(1000):
                    torch.relu(x)
                    torch.relu(x)
                costs.append((time.process_time() - began) / 2000)
        return min(costs)

    traced_s, plain_s = host_time(GemsMode(registry=registry, trace=True)), host_time(GemsMode(registry=registry))
    print(f"a call under the mode: {plain_s * 1e6:.1f} us, traced {traced_s * 1e6:.1f} us")
    assert traced_s - plain_s < 15e-6


def test_the_timeline_ends_and_says_so() -> None:
    timeline = Timeline(limit=3)
    assert [timeline.add(0, i, 1, 7) for i in range(5)] == [0, 1, 2, -1, -1]
    assert (len(timeline), timeline.dropped) == (3, 2)
    assert [e.start for e in timeline.entries()] == [0, 1, 2]
    several = Timeline(limit=3)
    several.add(9, 0, 1, 7)
    several.extend([n for start in (1, 2, 3, 4) for n in (9, start, 1, 7, 10 * start, 5)])
    assert (len(several), several.dropped) == (3, 2)
    assert [(e.start, e.device_start, e.device_ns) for e in several.entries()] == [(0, 0, 0), (1, 10, 5), (2, 20, 5)]


# -- modules -----------------------------------------------------------------------------------------------------------


def modules_of(report: Report, overload: str) -> dict[tuple[str, str], int]:
    found: Counter[tuple[str, str]] = Counter()
    for record in report.records:
        if record.overload == overload:
            found[record.module, record.phase] += record.calls
    return dict(found)


def test_forward_and_backward_belong_to_modules() -> None:
    model = Block()
    with traced() as mode:
        (model(torch.ones(2, 4)).exp()).sum().backward()
    report = mode.report
    assert modules_of(report, "aten.addmm.default") == {("Block.inner.0", "forward"): 1}
    assert modules_of(report, "aten.relu.default") == {("Block.inner.1", "forward"): 1}
    assert modules_of(report, "aten.threshold_backward.default") == {("Block.inner.1", "backward"): 1}
    # Weight gradients of both products, and the input's of the second alone.
    assert modules_of(report, "aten.mm.default") == {
        ("Block.out", "forward"): 1, ("Block.out", "backward"): 2, ("Block.inner.0", "backward"): 1}
    assert modules_of(report, "aten.mul.Tensor") == {("Block", "forward"): 1, ("Block", "backward"): 1, ("", "backward"): 1}
    totals = {row.label: row.calls for row in report.modules()}
    assert totals["Block", "forward"] == 4 and totals["Block.inner", "forward"] == 2


def test_accumulated_gradients_belong_to_their_parameter() -> None:
    model = Block()
    with traced() as mode:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
    assert modules_of(mode.report, "aten.add_.Tensor") == {("Block.inner.0", "backward"): 2, ("Block.out", "backward"): 1}


def test_two_models_of_one_class_and_a_module_used_alone() -> None:
    first, second = Block(), Block()
    with traced() as mode, torch.no_grad():
        first(torch.ones(2, 4))
        second(torch.ones(2, 4))
        second.out(torch.ones(2, 4))
    assert modules_of(mode.report, "aten.mm.default") == {("Block.out", "forward"): 1, ("Block#2.out", "forward"): 2}


def test_checkpointed_forwards_run_again_in_the_backward() -> None:
    model = Block()
    with traced() as mode:
        checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert modules_of(mode.report, "aten.relu.default") == {("Block.inner.1", "forward"): 1, ("Block.inner.1", "backward"): 1}


def test_a_backward_in_another_thread_finds_the_forward() -> None:
    first, second = Block(), Block()
    mode = gemsmode.enable(allow=[], trace=True)
    try:
        x = checkpoint(second, first(torch.ones(2, 4)), use_reentrant=False)
        thread = threading.Thread(target=lambda: x.sum().backward())
        thread.start()
        thread.join()
    finally:
        gemsmode.disable()
    assert modules_of(mode.report, "aten.threshold_backward.default") == {
        ("Block.inner.1", "backward"): 1, ("Block#2.inner.1", "backward"): 1}
    assert modules_of(mode.report, "aten.relu.default") == {
        ("Block.inner.1", "forward"): 1, ("Block#2.inner.1", "forward"): 1, ("Block#2.inner.1", "backward"): 1}


def test_losses_made_at_every_step_share_a_name() -> None:
    class Odd(nn.Module):
        """Defines equality, and so has no hash."""

        def __eq__(self, other: object) -> bool:
            return True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp()

    with traced() as mode:
        for _ in range(3):
            nn.MSELoss()(torch.ones(2), torch.zeros(2))
        Odd()(torch.ones(2))
    assert modules_of(mode.report, "aten.mse_loss.default") == {("MSELoss", "forward"): 3}
    assert modules_of(mode.report, "aten.exp.default") == {("Odd", "forward"): 1}


def test_an_exception_in_a_module_leaves_it() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with traced() as mode:
        with pytest.raises(ValueError):
            nn.Sequential(nn.ReLU(), Failing())(torch.ones(2))
        torch.ones(2).exp()
    assert modules_of(mode.report, "aten.exp.default") == {("", "forward"): 1}


def test_optimizer_steps_are_their_own_phase() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    with traced() as mode:
        optimizer.step()
    assert {(r.module, r.phase) for r in mode.report.compute} == {("SGD", "optimizer")}


def test_hooks_are_gone_after_the_block() -> None:
    before = len(nn_module._global_forward_hooks), len(nn_module._global_forward_pre_hooks)
    mode = traced()
    with mode:
        assert len(nn_module._global_forward_hooks) == before[0] + 1
    assert (len(nn_module._global_forward_hooks), len(nn_module._global_forward_pre_hooks)) == before
    gemsmode.enable(allow=[], trace=True)
    gemsmode.disable()
    assert (len(nn_module._global_forward_hooks), len(nn_module._global_forward_pre_hooks)) == before
    with GemsMode(allow=[]):
        assert len(nn_module._global_forward_hooks) == before[0]


# -- notes -------------------------------------------------------------------------------------------------------------


def has_note(report: Report, text: str) -> bool:
    return any(text in note for note in report.notes)


def test_a_forward_without_backward_is_noted() -> None:
    model = Block()
    mode = traced()
    with mode:
        loss = model(torch.ones(2, 4)).sum()
        assert has_note(mode.report, "no backward")
    assert has_note(mode.report, "no backward")
    loss.backward()
    with mode:
        model(torch.ones(2, 4)).sum().backward()
    assert not has_note(mode.report, "no backward")
    with traced() as quiet, torch.no_grad():
        model(torch.ones(2, 4))
    assert not has_note(quiet.report, "no backward")


def test_a_report_survives_an_exception() -> None:
    mode = traced()
    with pytest.raises(ZeroDivisionError), mode:
        torch.ones(2).exp()
        1 / 0  # noqa: B018
    report = mode.report
    assert calls_by_overload(report)["aten.exp.default"] == 1
    assert has_note(report, "left by an exception (ZeroDivisionError: division by zero)")


def test_compiled_regions_are_noted() -> None:
    model = Block()
    compiled = torch.compile(lambda x: model(x) + 1, backend="aot_eager", fullgraph=True)
    x = torch.ones(2, 4)
    with traced() as mode, torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x) + 1)
    assert has_note(mode.report, "compiled regions")
    torch._dynamo.reset()


# -- device time -------------------------------------------------------------------------------------------------------


def at_once(monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    """Let calls begin at once after each other always or never, however slow this machine is."""
    for name in ("_AT_ONCE", "_AT_ONCE_NS", "_AT_ONCE_MOST_NS"):
        monkeypatch.setattr(clock, name, 10**12 if always else -1)


class FakeDevice:
    """Stands for ``torch.cuda``: a clock that moves 1 ms per recorded event, and says when somebody waits."""

    def __init__(self) -> None:
        self.now, self.made, self.waits, self.capturing, self.busy = 0.0, 0, 0, False, False
        self.step, self.naps = 1.0, list[float]()
        self._sleep: Any = None
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                device.made += 1

            def record(self, stream: Any) -> None:
                assert not device.capturing
                device.now += device.step
                self.at = device.now

            def query(self) -> bool:
                assert not device.capturing
                return not device.busy

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        self.Event = Event

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: int) -> str:
        return f"of {device}"

    def device(self, index: int) -> Any:
        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def synchronize(self, device: int) -> None:
        assert not self.capturing
        self.waits += 1


def device_recorder(keeps_busy: bool = False) -> tuple[Recorder, FakeDevice]:
    fake, recorder = FakeDevice(), Recorder(INTERPRETER)
    if keeps_busy:
        fake._sleep = lambda cycles: fake.naps.append(fake.now)
    recorder._clock = DeviceClock(fake, recorder.timeline)
    return recorder, fake


def call(recorder: Recorder, n: int = 1, args: tuple[Any, ...] = ()) -> None:
    op, decision = torch.ops.aten.add.Tensor, Decision("rule", "add", bytes=10)
    for _ in range(n):
        recorder.end(recorder.begin(op, decision, args), op, decision, args)


def test_device_events_are_pooled_and_read_at_the_end() -> None:
    recorder, fake = device_recorder()
    call(recorder, 3 * HARVEST_AT + 10)
    assert fake.waits == 0
    # Two a call, one for the place of all, and two more since the next call might have begun with the end of the last.
    assert fake.made == 2 * HARVEST_AT + 3
    (record,) = recorder.report().records
    assert fake.waits == 1
    assert (record.calls, record.device_calls) == (3 * HARVEST_AT + 10,) * 2
    assert record.device_s == pytest.approx((3 * HARVEST_AT + 10) * 1e-3)
    assert record.time_s == record.device_s
    entries = recorder.timeline.entries()
    assert all(e.device_ns == 1_000_000 for e in entries)
    assert entries[1].device_start - entries[0].device_start == 2_000_000


def test_what_lies_between_empty_events_is_taken_off() -> None:
    recorder, fake = device_recorder(keeps_busy=True)
    call(recorder, 10)
    fake.step = 0.25  # what empty pairs take; a call took 1 ms
    (record,) = recorder.report().records
    added = 0.25e-3 - 0.64e-6  # but for the time of the kernel between them
    assert record.device_s == pytest.approx(10 * (1e-3 - added)) and record.device_calls == 10
    fake.step = 1.0
    call(recorder, 10)
    (record,) = recorder.report().records
    assert record.device_s == pytest.approx(20 * (1e-3 - added))


def test_a_device_without_work_is_kept_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemsmode.tracing.clock._SURELY_BUSY_NS", 0)
    monkeypatch.setattr("gemsmode.tracing.clock._STILL_BUSY_NS", 0)
    recorder, fake = device_recorder(keeps_busy=True)
    call(recorder)
    assert len(fake.naps) == 1
    fake.busy = True  # with the nap, and what was launched meanwhile
    call(recorder, 40)
    assert len(fake.naps) == 1
    fake.busy = False
    monkeypatch.setattr("gemsmode.tracing.clock._SURELY_BUSY_NS", 10**12)
    call(recorder)
    assert len(fake.naps) == 2 and fake.waits == 0
    call(recorder, 40)  # in that time nobody asks whether there is work
    assert len(fake.naps) == 2
    fake.capturing = True
    call(recorder, 3)
    assert len(fake.naps) == 2
    fake.capturing = False
    assert has_note(recorder.report(), "kept busy")
    without, fake = device_recorder()
    call(without, 3)
    assert not has_note(without.report(), "kept busy")


def test_it_is_said_that_the_host_is_the_limit() -> None:
    for calls, step_ms, told in ((400, 1e-6, True), (50, 1e-6, False), (400, 1.0, False)):
        recorder, fake = device_recorder()
        fake.step = step_ms
        call(recorder, calls)
        report = recorder.report()
        assert has_note(report, "the host is the limit here: 400 calls at") == told, (calls, step_ms)
        assert has_note(report, "gemsmode.capture replays them") == told
    untimed = Recorder(INTERPRETER)
    call(untimed, 400)
    assert not has_note(untimed.report(), "the host is the limit")


def test_the_typical_host_time_leaves_out_first_calls() -> None:
    timeline = Timeline(limit=10_000)
    assert timeline.typical_host_ns() == 0
    for i in range(1000):
        timeline.add(0, i, 10**9 if i % 10 == 0 else 1 if i % 2 else 5, 7)
    assert timeline.typical_host_ns() == 3 and timeline.typical_host_ns(most=77) == pytest.approx(3, rel=0.2)


def test_calls_that_follow_each_other_are_placed_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, always=False)
    recorder, fake = device_recorder(keeps_busy=True)
    call(recorder)
    fake.busy = True
    call(recorder, 2 * HARVEST_AT)
    fake.busy = False
    recorder.report()
    entries = recorder.timeline.entries()
    ends = [e.device_start + e.device_ns for e in entries]
    starts = [e.device_start for e in entries]
    assert all(e.device_ns == 1_000_000 for e in entries)
    assert all(start >= end for end, start in zip(ends, starts[1:]))
    # The pauses of 1 ms between the fake's calls are made up for at least once in so many calls.
    assert all(0 <= (2 * i * 1_000_000 + starts[0]) - start < 33_000_000 for i, start in enumerate(starts))
    assert starts[-1] - starts[0] > 2 * HARVEST_AT * 2 * 1_000_000 - 33_000_000


def test_a_call_that_begins_at_once_has_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, always=True)
    recorder, fake = device_recorder(keeps_busy=True)
    call(recorder)
    fake.busy = True
    call(recorder, 2 * HARVEST_AT)
    assert fake.made == 2 * HARVEST_AT + 3 + 2  # one for the place of all, one start, and the ends; and two in reserve
    op, decision = torch.ops.aten.add.Tensor, Decision("rule", "add", bytes=10)
    call(recorder, args=(torch.empty(1),))  # on the CPU: not timed
    call(recorder, 3)
    outer = recorder.begin(op, decision)
    call(recorder, 2)
    recorder.end(outer, op, decision, ())
    call(recorder)
    fake.busy = False
    (first,), (second,) = ([r for r in recorder.report().records if bool(r.inputs) == on_cpu] for on_cpu in (False, True))
    # The outer one is not timed, as those within it are.
    assert (first.calls, first.device_calls) == (2 * HARVEST_AT + 8, 2 * HARVEST_AT + 7) and (second.calls, second.device_calls) == (1, 0)
    entries = [e for e in recorder.timeline.entries() if e.device_start >= 0]
    chained = entries[:2 * HARVEST_AT + 1]
    assert all(e.device_ns == 1_000_000 for e in chained)
    assert all(after.device_start == e.device_start + e.device_ns for e, after in pairwise(chained))
    (lane,) = recorder._clock._lanes.values()
    # Each event once, but for the one that all are placed by, and the end of the last call, which the next might have begun with.
    assert len(lane.pool) == len(set(map(id, lane.pool))) == fake.made - 2
    made = fake.made
    fake.busy = True
    call(recorder, HARVEST_AT - 1)
    fake.busy = False
    assert fake.made == made
    assert sum(r.device_calls for r in recorder.report().records) == 3 * HARVEST_AT + 6


class Ticks:
    """A clock that moves when it is looked at."""

    def __init__(self, tick_ns: int) -> None:
        self.now, self.tick_ns = 0, tick_ns

    def perf_counter_ns(self) -> int:
        self.now += self.tick_ns
        return self.now


@pytest.mark.parametrize("tick_ns", [500, 1000, 2000, 4000])
def test_at_once_means_what_this_host_can(tick_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, fake = device_recorder(keeps_busy=True)
    ticks = Ticks(tick_ns)
    monkeypatch.setattr(clock, "time", ticks)
    monkeypatch.setattr("gemsmode.tracing.recorder.time", ticks)
    call(recorder)
    fake.busy = True
    call(recorder, HARVEST_AT)
    fake.busy = False
    call(recorder, HARVEST_AT)  # the first are read, and with them how long recording takes
    fake.busy = True
    recorded = fake.now
    call(recorder, 100)
    assert fake.now - recorded == 100
    for _ in range(100):
        ticks.now += 3 * tick_ns  # as if something were launched between
        call(recorder)
    assert fake.now - recorded == 300


def test_what_the_mode_does_not_see_is_not_counted(device: str) -> None:
    if not device.startswith("cuda"):
        pytest.skip("needs a device that is timed by events")
    x = torch.ones(8, 8, device=device)
    with GemsMode():
        torch.relu(x)  # compiled before anything is timed
    with GemsMode(trace=True) as mode:
        for _ in range(1000):
            torch.relu(x)
            torch.cuda._sleep(50_000)
    report = mode.report
    (record,) = (r for r in report.records if "relu" in r.overload)
    assert record.calls == record.device_calls == 1000
    assert record.device_s is not None and record.device_s < 1000 * 5e-6  # of some 30 us that each sleep takes


class FakeCuda(FakeDevice):
    """Stands for ``torch.cuda`` with two devices, of which number 0 is current, and for the functions of its driver that take
    events, which refuse events of the other device on a default stream."""

    def __init__(self) -> None:
        super().__init__()
        self._sleep = lambda cycles: None
        self.recorded = Counter[str]()
        device, events = self, dict[int, Any]()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.cuda_event = 2**40 + len(events)
                events[self.cuda_event] = self

            def record(self, stream: str) -> None:
                device.now += device.step
                self.at, self.stream = device.now, stream
                device.recorded["by PyTorch"] += 1

            def query(self) -> bool:
                return True

            def elapsed_time(self, other: Event) -> float:
                assert self.stream == other.stream
                return other.at - self.at

        class Function:
            def __init__(self, run: Any) -> None:
                self.run, self.argtypes = run, tuple[Any, ...]()

            def __call__(self, *args: Any) -> int:
                assert len(args) == len(self.argtypes)
                return self.run(*args)

        def record(event: int, stream: int) -> int:
            if stream == 0 and events[event].stream != "of 0":
                return 400
            device.now += device.step
            events[event].at = device.now
            device.recorded["by the driver"] += 1
            return 0

        def elapsed(place: int, start: int, end: int) -> int:
            if events[start].stream != "of 0":
                return 400
            ctypes.c_float.from_address(place).value = events[end].at - events[start].at
            return 0

        self.Event = Event
        self.events = clock._events_by_driver(self, Function(record), Function(elapsed))


class OnDevice(torch.Tensor):
    """An empty tensor that says it is on a device."""

    index = 0

    def get_device(self) -> int:
        return self.index


@pytest.mark.parametrize("number", [0, 7])
def test_events_by_cudas_driver(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on several GPUs runs most of its layers while another device is the current one."""
    fake, recorder = FakeCuda(), Recorder(INTERPRETER)
    runtime = clock._Runtime(lambda: 0, lambda device: number, lambda: False, fake.events)
    monkeypatch.setattr(clock, "_runtime", lambda module: runtime)
    at_once(monkeypatch, always=False)
    recorder._clock = DeviceClock(fake, recorder.timeline)
    first, second = (torch.empty(n).as_subclass(OnDevice) for n in (2, 3))
    second.index = 1
    for args in ((first,), ([torch.empty(1), second],)):
        call(recorder, HARVEST_AT, args)
        fake.recorded.clear()
        call(recorder, HARVEST_AT, args)
        # Two were made, as the end of the last call that was read might have been the start of the next.
        refused = number == 0 and args != (first,)
        assert fake.recorded == ({"by PyTorch": 2 * HARVEST_AT + 2} if refused else {"by PyTorch": 2, "by the driver": 2 * HARVEST_AT})
    assert {lane.device for lane in recorder._clock._lanes.values()} == {0, 1}
    for record in recorder.report().records:
        assert record.device_calls == 2 * HARVEST_AT and record.device_s == pytest.approx(2 * HARVEST_AT * 1e-3)
    assert all(e.device_ns == 1_000_000 for e in recorder.timeline.entries())


def test_calls_on_two_gpus(device: str) -> None:
    skip_without_cuda(device, gpus=2)
    tensors = [torch.randn(n, device=f"cuda:{i}") for i, n in enumerate((2**26, 2**25))]
    with GemsMode():
        for x in tensors:
            torch.relu(x)
    with GemsMode(trace=True) as mode:
        for _ in range(300):
            results = [torch.relu(x) for x in tensors]  # the second on a device that is not the current one
    assert all(torch.equal(result, x.clamp(min=0)) for result, x in zip(results, tensors))
    first, second = sorted((r for r in mode.report.records if "relu" in r.overload), key=lambda r: -(r.bytes or 0))
    assert first.device_calls == second.device_calls == 300
    assert first.device_s is not None and second.device_s is not None
    assert 1.6 < first.device_s / second.device_s < 2.4


def test_a_busy_device_is_not_waited_for() -> None:
    recorder, fake = device_recorder()
    fake.busy = True
    call(recorder, HARVEST_AT + 10)
    assert fake.waits == 0 and fake.made == 2 * (HARVEST_AT + 10) + 1
    (record,) = recorder.report().records
    assert record.device_calls == HARVEST_AT + 10


def test_nothing_is_timed_under_capture() -> None:
    recorder, fake = device_recorder()
    call(recorder, 2)
    fake.capturing = True
    call(recorder, 5)
    during = recorder.report()
    assert has_note(during, "a graph is being captured") and during.calls == len(recorder.timeline) == 7
    fake.capturing = False
    report = recorder.report()
    assert [e.device_ns > 0 for e in recorder.timeline.entries()] == [True] * 2 + [False] * 5
    (record,) = report.records
    assert (record.calls, record.captured, record.device_calls) == (7, 5, 2)
    assert has_note(report, "5 calls were captured into a CUDA graph")


class FakeStreams(FakeDevice):
    """A device whose streams are told apart, and that counts what it is asked, as :class:`gemsmode.tracing.clock._Runtime` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.asked = 7, Counter[str]()

    def runtime(self, module: Any) -> clock._Runtime:
        def counted(name: str, function: Any) -> Any:
            def asked(*args: Any) -> Any:
                self.asked[name] += 1
                return function(*args)

            return asked

        return clock._Runtime(
            counted("device", self.current_device), counted("stream", lambda device: self.number),
            counted("capturing", self.is_current_stream_capturing),
            clock._Events(lambda device: self.Event(enable_timing=True), counted("record", lambda event, stream: event.record(stream)),
                          lambda event, device: event.record(device), counted("query", lambda event: event.query()),
                          lambda calls: [counted("length", call[0].elapsed_time)(call[1]) for call in calls]))


def streams_recorder(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, FakeStreams]:
    fake, recorder = FakeStreams(), Recorder(INTERPRETER)
    fake._sleep = lambda cycles: fake.naps.append(fake.now)
    monkeypatch.setattr(clock, "_runtime", fake.runtime)
    at_once(monkeypatch, always=True)
    recorder._clock = DeviceClock(fake, recorder.timeline)
    return recorder, fake


@pytest.mark.parametrize("number", [0, 7])
@pytest.mark.parametrize("busy_ns", [0, 10**12])
def test_a_call_asks_the_device_little(number: int, busy_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call costs on a GPU is mostly what is asked of CUDA: an event and its reading, and few questions of the host's own."""
    recorder, fake = streams_recorder(monkeypatch)
    monkeypatch.setattr(clock, "_SURELY_BUSY_NS", 0)
    monkeypatch.setattr(clock, "_STILL_BUSY_NS", busy_ns)
    fake.number = number
    call(recorder)
    fake.busy = True
    call(recorder, 8)
    fake.asked.clear()
    call(recorder, HARVEST_AT)
    each = ("device", "stream", "record") if number == 0 else ("device", "stream", "record", "capturing")
    # Until the host is 32 calls ahead it asks whether the device is busy still, and from then on where that is not clear.
    queries = HARVEST_AT + 1 if not busy_ns else clock._AHEAD - 9 + 2
    assert fake.asked == dict.fromkeys(each, HARVEST_AT) | {"query": queries}
    fake.busy = False
    fake.asked.clear()
    recorder.report()
    assert fake.asked["length"] <= 1.1 * (HARVEST_AT + 9) + clock._PAIRS and not fake.asked["query"]


def test_streams_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, fake = streams_recorder(monkeypatch)
    call(recorder)
    fake.busy = True
    for number in (7, 7, 8, 8, 7):
        fake.number = number
        call(recorder)
    assert fake.asked["record"] == 1 + 2 + 1 + 1 + 2 + 1 + 2  # an origin, and a start where the stream is another
    fake.busy = False
    (record,) = recorder.report().records
    assert record.device_calls == 6 and [e.device_ns for e in recorder.timeline.entries()] == [1_000_000] * 6


def test_reports_while_another_thread_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, _ = streams_recorder(monkeypatch)
    recorder._clock.gap_ns = 0  # measuring it would move the clock from this thread, too
    done, seen = threading.Event(), list[Report]()

    def work() -> None:
        call(recorder, 5000)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        seen.append(recorder.report())
    thread.join()
    (record,) = recorder.report().records
    assert (record.calls, record.device_calls) == (5000, 5000) and len(recorder.timeline) == 5000
    assert all(e.device_ns > 0 for e in recorder.timeline.entries())
    assert all(earlier.calls <= later.calls for earlier, later in pairwise(seen))
    for lane in recorder._clock._lanes.values():
        assert len(lane.pool) == len(set(map(id, lane.pool)))


def test_calls_on_the_cpu_take_host_time() -> None:
    recorder, fake = device_recorder()
    recorder.target = gemsmode.target.Target("cuda", "cuda", 90, present=False)
    call(recorder, 4, (torch.ones(2),))
    (record,) = recorder.report().records
    assert record.device_s is None and record.time_s == record.host_s > 0
    assert fake.made == 0


def test_rates_come_from_what_rules_state() -> None:
    record = Record("aten.mm.default", "rule", "mm", calls=4, captured=2, host_s=1.0, device_s=0.002, device_calls=2,
                    bytes=10**9, flops=3 * 10**12)
    (row,) = Report((record,)).rows()
    assert row.gb_per_s == pytest.approx(2 / 0.002)
    assert row.tflop_per_s == pytest.approx(6 / 0.002)


# -- tables and formats ------------------------------------------------------------------------------------------------

TABLE = """\
gemsmode report
20 calls, 13 of them compute, in 500 ms on a GPU, torch 2.13.0
coverage of compute: 61.5% of calls, 22.2% of time, 52.3% of bytes

Replaced: 1 overload, 8 calls, 4 ms, by Triton kernels
overload    rule  calls  time  share                            rate  dtypes
add.Tensor  add       8  4 ms  22.2%  0.000792 GB/s, 9.8e-08 TFLOP/s  float32

Failed: 1 overload, 1 call, 1 ms, PyTorch's own ran instead
overload  rule  calls  error
exp       exp       1  OutOfResources: shared memory

What to write next: 2 overloads, 4 calls, 13 ms, passed through to PyTorch
overload    calls     time  share  why                   shapes  most often
mm              3  12.5 ms  69.4%  no rule                    1  f32[8,8] f32[8,8]
add.Tensor      1   500 us   2.8%  complex64 is complex       1  c64[4] c64[4]

Views, allocations, metadata: 7 calls, 200 us of host time, not in the figures above: view 7

Modules: compute in each, with everything below it
module       phase     calls  replaced     time  share
(no module)  forward       1      0.0%     1 ms   5.6%
Net          forward      10     60.0%    16 ms  88.9%
Net          backward      2    100.0%     1 ms   5.6%
Net.a        forward       9     66.7%  15.5 ms  86.1%
Net.b        forward       1      0.0%   500 us   2.8%
Net.b        backward      2    100.0%     1 ms   5.6%

note: something to know"""


def test_the_table_as_text() -> None:
    assert plain(render(REPORT), 120) == TABLE


def test_rows_by_each_grouping() -> None:
    assert [(r.label, r.calls) for r in REPORT.rows("op")] == [
        (("aten.mm",), 3), (("aten.add",), 9), (("aten.exp",), 1), (("aten.view",), 7)]
    shapes = [r.label[:2] for r in REPORT.rows("shape", ["rule"])]
    assert shapes == [("aten.add.Tensor", "f32[8,8] f32[8]"), ("aten.add.Tensor", "f32[4] f32[4]")]
    modules = [(*r.label, r.calls) for r in REPORT.modules()]
    assert modules == [("(no module)", "forward", 1), ("Net", "forward", 10), ("Net", "backward", 2), ("Net.a", "forward", 9),
                       ("Net.b", "forward", 1), ("Net.b", "backward", 2)]
    assert [r.label for r in REPORT.modules(depth=1)] == [("(no module)", "forward"), ("Net", "forward"), ("Net", "backward")]
    with pytest.raises(ValueError, match="by op, overload, shape, module, not by 'colour'"):
        REPORT.rows("colour")


def test_json_has_the_stated_form_and_is_read_again() -> None:
    data = json.loads(REPORT.to_json())
    assert data["coverage"]["calls"] == pytest.approx(8 / 13) and data["coverage"]["time"] == pytest.approx(4 / 18)
    first = data["ops"][0]
    assert first["overload"] == "aten.mm.default"
    assert {k: first[k] for k in ("decision", "rule", "reason", "calls", "time_s", "dtypes")} == {
        "decision": "pass", "rule": None, "reason": "no rule", "calls": 3, "time_s": 0.0125, "dtypes": ["float32"]}
    added = next(op for op in data["ops"] if op["decision"] == "rule")
    assert (added["rule"], added["reason"], added["calls"]) == ("add", None, 8)
    assert added["shapes"] == [{"inputs": "f32[8,8] f32[8]", "calls": 6}, {"inputs": "f32[4] f32[4]", "calls": 2}]
    assert sum(op["calls"] for op in data["ops"]) == 20
    again = Report.from_dict(data)
    assert again.records == REPORT.records and again.to_dict() == REPORT.to_dict()
    with pytest.raises(ValueError, match="expected a gemsmode report"):
        Report.from_dict({"format": "something else"})


def test_csv_has_a_line_per_record() -> None:
    rows = list(csv.DictReader(io.StringIO(REPORT.to_csv())))
    assert len(rows) == len(RECORDS)
    assert rows[0]["inputs"] == "f32[8,8] f32[8]" and rows[0]["calls"] == "6" and rows[0]["device_s"] == ""


def test_markdown_tables() -> None:
    text = REPORT.to_markdown()
    assert "| `mm` | 3 | 12.5 ms | 69.4% | no rule | 1 | `f32[8,8] f32[8,8]` |" in text
    assert "**What to write next**: 2 overloads, 4 calls, 13 ms, passed through to PyTorch" in text
    assert "> note: something to know" in text


def embedded(page: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match[1])


def test_html_is_self_contained() -> None:
    nasty = Record("aten.add.Tensor", "pass", None, "</script><script>alert(1)</script>", calls=1, host_s=1.0)
    page = Report((*RECORDS, nasty), ENVIRONMENT).to_html()
    assert "alert(1)</script>" not in page
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", page)
    assert Report.from_dict(embedded(page, "report")).records[-1] == nasty
    data = embedded(page, "data")
    assert sum(row["calls"] for row in data["overloads"]) == 21
    assert sum(leaf[5] for leaf in data["leaves"]) == 14


_CLICKS = """<script>{
const row = () => document.querySelector("tbody td").textContent, rows = () => document.querySelectorAll("tbody tr").length;
const press = text => [...document.querySelectorAll("nav button")].find(b => b.textContent === text).click();
const head = text => [...document.querySelectorAll("th")].find(t => t.textContent.startsWith(text)).click();
const seen = [document.querySelectorAll("#map div").length > 5, rows(), row()];
head("overload"); seen.push(row());
const field = document.querySelector("input"); field.value = "pass mm"; field.oninput(); seen.push(rows());
field.value = ""; field.oninput(); press("By module"); seen.push(rows());
press("What to write next"); seen.push(rows(), row());
document.title = JSON.stringify(seen);
}</script>"""


def test_the_page_in_a_browser(tmp_path: Any, request: pytest.FixtureRequest) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not request.config.getoption("--full"):
        pytest.skip("needs chromium, and --full")
    page = tmp_path / "report.html"
    page.write_text(REPORT.to_html().replace("</body>", _CLICKS + "</body>"))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    assert json.loads(html.unescape(title[1])) == [
        True, 5, "aten.mm.default", "aten.add.Tensor", 1, 6, 3, "aten.mm.default"]


def test_a_notebook_shows_a_report_without_scripts() -> None:
    text = REPORT._repr_html_()
    assert "<script" not in text and "What to write next" in text and "<td" in text


def test_chrome_trace_nests(tmp_path: Any) -> None:
    model = Block()
    with traced() as mode:
        model(torch.ones(2, 4)).sum().backward()
    trace = json.loads(mode.report.to_chrome_trace(tmp_path / "trace.json"))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    # What ran on a device is shown once more there.
    assert sum(e["cat"] != "module" and e["pid"] == 1 for e in events) == mode.report.calls
    first = sorted(events, key=lambda e: e["ts"], reverse=True)
    slices = {e["name"]: e for e in first if e["cat"] == "module"}
    relu = next(e for e in events if e["name"] == "relu")
    assert relu["args"]["module"] == "Block.inner.1"

    def contains(outer: Any, inner: Any) -> bool:
        slack = 1e-3
        return outer["ts"] <= inner["ts"] + slack and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack

    assert contains(slices["1"], relu) and contains(slices["inner"], relu)
    assert contains(slices["inner"], slices["1"])
    earlier = mode.report
    with mode:
        torch.ones(2).relu()
    shown = json.loads(earlier.to_chrome_trace())["traceEvents"]
    assert sum(e.get("cat") not in (None, "module") and e["pid"] == 1 for e in shown) == earlier.calls
    assert mode.report.calls == earlier.calls + 2
    with pytest.raises(ValueError, match="no timeline"):
        Report.from_dict(mode.report.to_dict()).to_chrome_trace()


def test_ranges_for_the_profiler() -> None:
    with torch.profiler.profile() as profile, traced():
        torch.ones(2).exp()
    names = {event.name for event in profile.events()}
    assert "gems::aten.exp.default [pass]" in names


DIFFERENCE = """\
gemsmode report: difference
before: 20 calls, compute 18 ms, coverage 61.5% of calls, 22.2% of time (a GPU, torch 2.13.0, gemsmode 0.1.0)
after: 11 calls, compute 9 ms, coverage 81.8% of calls, 88.9% of time (a GPU, torch 2.13.0, gemsmode 0.1.0)

Changed: 5 overloads
overload    decision            calls             time  change
mm          pass -> rule            3  12.5 ms -> 5 ms  -7.5 ms (0.40x)
add.Tensor  pass/rule -> rule  9 -> 6   4.5 ms -> 3 ms  -1.5 ms (0.67x)
exp         error -> absent    1 -> 0        1 ms -> 0  -1 ms
sin         absent -> pass     0 -> 2        0 -> 1 ms  +1 ms
view        view -> absent     7 -> 0      200 us -> 0  -200 us"""


def test_difference_of_two_reports() -> None:
    after = Report((RECORDS[0], Record("aten.mm.default", "rule", "mm", None, ("f32[8,8]", "f32[8,8]"), F32, calls=3, host_s=0.005),
                    Record("aten.sin.default", "pass", None, "no rule", calls=2, host_s=0.001)), ENVIRONMENT)
    difference = REPORT.diff(after)
    assert [c.overload for c in difference.changes[:2]] == ["aten.mm.default", "aten.add.Tensor"]
    assert plain(difference, 120) == DIFFERENCE
    assert "No difference" in str(REPORT.diff(REPORT))


# -- files -------------------------------------------------------------------------------------------------------------

WRITERS = ["to_json", "to_csv", "to_markdown", "to_html", "to_chrome_trace"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_report_replaces_reports_only(tmp_path: Any, writer: str) -> None:
    with traced() as mode:
        torch.ones(2).exp()
    write = getattr(mode.report, writer)
    path = tmp_path / "report"
    text = write(path)
    assert path.read_text() == text
    write(path)  # over a report
    mode.report.to_json(path)  # over a report of another format
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(NotAReportError, match="not a gemsmode report"):
        write(precious)
    assert precious.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "thesis.txt"]
    write(precious, overwrite=True)
    assert precious.read_text() == write()


def test_a_folder_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        REPORT.to_json(tmp_path / "nowhere" / "report.json")
    with pytest.raises(IsADirectoryError):
        REPORT.to_json(tmp_path)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_merged_reports_add_up() -> None:
    sin = Record("aten.sin.default", "pass", calls=5, host_s=0.1, device_s=0.05, device_calls=5)
    other = Report((RECORDS[0], sin), ENVIRONMENT, ("mine",), 2.0)
    merged = merge([REPORT, other])
    assert merged.calls == REPORT.calls + other.calls and len(merged.records) == len(RECORDS) + 1
    assert (merged.records[0].calls, merged.records[0].host_s) == (12, 0.006)
    assert merged.records[-1].device_s == 0.05
    assert merged.notes == ("rank 0: something to know", "rank 1: mine") and merged.wall_s == 2.0
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    alone = gather(REPORT)
    assert alone.rank == 0 and alone.merged.calls == 20


def test_what_is_gathered_is_saved_with_the_rank_in_the_name(tmp_path: Any) -> None:
    gathered = Gathered((REPORT, REPORT), merge([REPORT, REPORT]), 1)
    for suffix in (".json", ".csv", ".html", ".md"):
        assert [p.name for p in gathered.save(tmp_path / f"r{suffix}")] == [f"r.rank1{suffix}"]
    assert [p.name for p in gather(REPORT).save(tmp_path / "s.json")] == ["s.rank0.json", "s.json"]
    with pytest.raises(ValueError, match="in which format"):
        gathered.save(tmp_path / "r.txt")


def test_what_each_rank_measures_does_not_keep_records_apart() -> None:
    records = [dataclasses.replace(RECORDS[0], rule_us=us, native_us=2.0, timed="measured") for us in (1.0, 1.5)]
    (record,) = merge([Report((r,)) for r in records]).records
    assert (record.calls, record.rule_us) == (12, 1.0)
