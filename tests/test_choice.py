"""``prefer="fastest"``: what is timed and when, what is chosen, how choices are kept, and how they are shown."""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import Spy, decision, skip_without_cuda

import gemsmode
from gemsmode import GemsMode, choice, cli, doctor
from gemsmode.choice import Choice, Chooser, DeviceTimer, Entry, Store, Timing, WallTimer, signature
from gemsmode.handlers import OpHandler
from gemsmode.registry import find_op
from gemsmode.signature import describe
from gemsmode.tracing import Report


class FakeTimer:
    """Runs both calls a few times and then says that they cost what it was told.

    Attributes:
        seen: how often it was asked.
        results: what the calls returned the last time.
    """

    def __init__(self, rule: float = 5.0, native: float = 10.0, runs: int = 2, host: float = 1.0) -> None:
        self.rule, self.native, self.runs, self.host = rule, native, runs, host
        self.seen = 0
        self.results: list[Any] = []

    def compare(self, rule: Callable[[], Any], native: Callable[[], Any], device: int) -> tuple[Timing, Timing]:
        self.seen += 1
        self.results = [call() for _ in range(self.runs) for call in (rule, native)]
        return Timing(self.rule, self.host), Timing(self.native, self.host)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("GEMSMODE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    gemsmode.disable()


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.linspace(-2, 2, 12, device=device).reshape(3, 4)


@pytest.fixture
def spy() -> Spy:
    return Spy("aten.exp.default", "aten.add.Tensor", "aten.mul.Tensor")


def mode_with(timer: FakeTimer, spy: Spy | None = None, **options: Any) -> GemsMode:
    return GemsMode(prefer=Chooser(timer=timer), registry=spy.registry if spy else None, **options)


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_the_faster_one_runs(x: torch.Tensor, spy: Spy) -> None:
    slow = FakeTimer(9.8, 7.1, runs=0)
    with mode_with(slow, spy, trace=True) as mode:
        results = [torch.exp(x) for _ in range(3)]
    assert all(torch.equal(r, x.exp()) for r in results)
    assert spy.take() == [] and slow.seen == 1
    (record,) = mode.report.records
    assert (record.decision, record.reason, record.calls) == ("pass", "native is faster: 7.1 us against 9.8 us", 3)
    assert (record.rule_us, record.native_us, record.timed) == (9.8, 7.1, "measured")
    fast = FakeTimer(5.0, 7.1, runs=0)
    with GemsMode(prefer=Chooser(None, fast), registry=spy.registry) as mode:
        torch.exp(x)
        torch.exp(x)
    assert spy.take() == ["aten.exp.default"] * 2 and fast.seen == 1
    decided = decision(mode, "exp", x)
    assert decided.kind == "rule" and decided.choice is not None
    assert decided.choice.reason == "the rule is faster: 5.0 us against 7.1 us"


def test_what_is_compared() -> None:
    # Host and device work side by side: the slower of the two counts.
    assert not Choice(Timing(2.0, 9.0), Timing(2.5, 5.0)).rule_wins
    assert Choice(Timing(2.0, 9.0), Timing(2.5, 5.0)).reason == "native is faster: 5.0 us against 9.0 us of host time"
    assert Choice(Timing(70.0, 9.0), Timing(165.0, 5.0)).rule_wins
    assert Choice(Timing(70.0, 9.0), Timing(1650.0, 5.0)).reason == "the rule is faster: 70.0 us against 1,650 us"
    assert not Choice(Timing(3.0, 9.0), Timing(8.0, 5.0)).rule_wins  # 9 of host against 8 of device
    # In a graph the host has no part.
    both = Timing(2.0, 9.0), Timing(2.5, 5.0)
    assert Choice(*both, by="device").rule_wins and Choice(*both, by="device").reason == "the rule is faster: 2.0 us against 2.5 us"
    assert not Choice(*both).rule_wins
    # Noise is no reason to give up a kernel.
    assert Choice(Timing(100.5, 1.0), Timing(100.0, 1.0)).rule_wins
    assert Choice(Timing(100.5, 1.0), Timing(100.0, 1.0)).reason == "the rule is as fast: 100 us against 100 us"
    assert not Choice(Timing(102.0, 1.0), Timing(100.0, 1.0)).rule_wins


def test_numbers_share_a_timing_and_shapes_do_not(x: torch.Tensor) -> None:
    timer = FakeTimer(runs=0)
    with mode_with(timer):
        for n in (1, 2, 3):
            x + n
        assert timer.seen == 1
        x + 1.5
        x.t() + 1
        x.double() + 1
        assert timer.seen == 5  # the conversion too
        torch.sum(x, 0), torch.sum(x, 1)
        assert timer.seen == 7


def test_calls_that_write_are_timed_on_copies(device: str) -> None:
    timer = FakeTimer(runs=5)
    x, base = torch.ones(4, 4, device=device), torch.zeros(8, 4, device=device)
    out = base[2:6]
    with mode_with(timer, strict=True) as mode:
        x.add_(1)
        torch.add(x, 1, out=out)
        x[1:3].mul_(x[1:3])
    assert timer.seen >= 3 and decision(mode, "add_.Tensor", x, 1).kind == "rule"
    expected = torch.full((4, 4), 2.0, device=device)
    assert torch.equal(out, expected + 1) and torch.equal(base[:2], torch.zeros(2, 4, device=device))
    expected[1:3].mul_(expected[1:3])
    assert torch.equal(x, expected)


def test_resizing_out_warns_once_and_leaves_the_right_result(x: torch.Tensor) -> None:
    timer = FakeTimer()
    out = torch.empty(2, device=x.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mode_with(timer):
            torch.add(x, 1, out=out)
    assert torch.equal(out, x + 1)
    assert len([w for w in caught if "resized" in str(w.message)]) == 1


def test_timing_draws_no_random_numbers_of_the_programs(device: str) -> None:
    for rule, native in ((1.0, 2.0), (2.0, 1.0)):
        torch.manual_seed(7)
        with GemsMode(prefer=Chooser(None, FakeTimer(rule, native, runs=0))):
            expected = [torch.rand(5, device=device), torch.rand(5, device=device)]
        timer = FakeTimer(rule, native, runs=3)
        torch.manual_seed(7)
        with GemsMode(prefer=Chooser(None, timer)):
            got = [torch.rand(5, device=device), torch.rand(5, device=device)]
        assert timer.seen == 1 and not torch.equal(timer.results[0], timer.results[2])
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
    generator = torch.Generator(device).manual_seed(3)
    state = generator.get_state()
    timer = FakeTimer(2.0, 1.0)
    with GemsMode(prefer=Chooser(None, timer)):
        got = torch.empty(6, device=device).uniform_(generator=generator)
    generator.set_state(state)
    assert timer.seen and torch.equal(got, torch.empty(6, device=device).uniform_(generator=generator))


def test_failures_while_timing(x: torch.Tensor, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory(FakeTimer):
        def compare(self, rule: Any, native: Any, device: int) -> Any:
            self.seen += 1
            raise torch.OutOfMemoryError("no memory for a copy")

    timer = NoMemory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mode_with(timer, spy):
            torch.exp(x)
            torch.exp(x)
    assert spy.take() == ["aten.exp.default"] * 2 and timer.seen == 1
    # What PyTorch rejects raises PyTorch's error, from the call itself.
    with mode_with(FakeTimer()), pytest.raises(RuntimeError, match="must match the size"):
        x + torch.ones(5, device=x.device)
    # A rule that fails is fallen back from, as ever.
    broken = gemsmode.Registry("broken")

    @gemsmode.rule("aten.exp.default", registry=broken)
    def bad_exp(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a kernel's fault")

    with GemsMode(prefer=Chooser(None, FakeTimer()), registry=broken), pytest.warns(RuntimeWarning, match="a kernel's fault"):
        assert torch.equal(torch.exp(x), torch.ops.aten.exp.default(x))


# -- when nothing is timed ---------------------------------------------------------------------------------------------


def test_not_under_capture_but_later(x: torch.Tensor, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer(2.0, 1.0)
    mode = mode_with(timer, spy)
    monkeypatch.setattr(choice, "_untimed", lambda target: "a CUDA graph is being captured")
    with mode:
        torch.exp(x)
        torch.exp(x)
    assert timer.seen == 0 and spy.take() == ["aten.exp.default"] * 2
    monkeypatch.undo()
    with mode:
        torch.exp(x)
    assert timer.seen == 1
    spy.take()
    monkeypatch.setattr(choice, "_untimed", lambda target: "a CUDA graph is being captured")
    with mode:
        torch.exp(x)  # a choice that is known holds
    assert timer.seen == 1 and spy.take() == []


def test_a_call_that_waits_to_be_timed_is_planned_once(x: torch.Tensor, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, decide = [], OpHandler.decide

    def counted(handler: OpHandler, *args: Any, **kwargs: Any) -> Any:
        planned.append(str(handler.op))
        return decide(handler, *args, **kwargs)

    monkeypatch.setattr(OpHandler, "decide", counted)
    monkeypatch.setattr(choice, "_untimed", lambda target: "a CUDA graph is being captured")
    with mode_with(FakeTimer(2.0, 1.0), spy):
        for _ in range(3):
            torch.exp(x)
    assert spy.take() == ["aten.exp.default"] * 3 and planned == ["aten.exp.default"]


def test_not_under_a_profiler_nor_while_memory_is_traced(x: torch.Tensor, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer(2.0, 1.0, runs=0)
    with mode_with(timer, spy):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            torch.exp(x)
        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: True, raising=False)
        initialized = torch.cuda.is_initialized
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        torch.exp(x)
        assert timer.seen == 0 and spy.take() == ["aten.exp.default"] * 2
        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: False, raising=False)
        monkeypatch.setattr(torch.cuda, "is_initialized", initialized)
        torch.exp(x)
    assert timer.seen == 1 and spy.take() == []


def test_deterministic_algorithms_leave_nothing_to_measurement(x: torch.Tensor, spy: Spy) -> None:
    timer = FakeTimer(2.0, 1.0, runs=0)
    with mode_with(timer, spy):
        try:
            torch.use_deterministic_algorithms(True)
            torch.exp(x)
            assert timer.seen == 0 and spy.take() == ["aten.exp.default"]
            torch.use_deterministic_algorithms(False)
            torch.exp(x)
            assert timer.seen == 1 and spy.take() == []
            torch.use_deterministic_algorithms(True)
            torch.exp(x)
            assert spy.take() == ["aten.exp.default"]
        finally:
            torch.use_deterministic_algorithms(False)


# -- classes of sizes --------------------------------------------------------------------------------------------------


def texts(name: str, *args: Any) -> tuple[str, str]:
    return signature(find_op(name), tuple(describe(a) for a in args))


def test_signatures_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "current", lambda: SimpleNamespace(device_type="cpu"))  # tensors elsewhere than kernels run are marked so
    x = torch.empty(64, 100)
    assert texts("add.Tensor", x, 2, 1)[0] == "aten.add.Tensor(f32[64,100], int)"
    assert texts("add.Tensor", x, x, 2)[0] == "aten.add.Tensor(f32[64,100], f32[64,100], int)"
    assert texts("sum.dim_IntList", x, [1], False, None)[0] == "aten.sum.dim_IntList(f32[64,100], [1])"
    assert texts("clone", x.t())[0] == "aten.clone.default(f32[100,64]:1,100)"
    assert texts("cat", [x, x], 1)[0] == "aten.cat.default([f32[64,100],f32[64,100]], 1)"
    value, _ = signature(find_op("pow.Tensor_Scalar"), (describe(x), 2), by_value=("exponent",), state=("highest", False))
    assert value == "aten.pow.Tensor_Scalar(f32[64,100], 2) {highest}"
    many = texts("_foreach_add.Scalar", [torch.empty(n) for n in range(40)], 1)[0]
    assert many.startswith("aten._foreach_add.Scalar([f32[0],f32[1],... 40 #") and len(many) < 90
    assert many != texts("_foreach_add.Scalar", [torch.empty(n + 1) for n in range(40)], 1)[0]
    # Classes: sizes a few percent apart, equally divisible, are one; small sizes and other layouts are not.
    one, other = texts("exp", torch.empty(2, 1040)), texts("exp", torch.empty(2, 1072))
    assert one[0] != other[0] and one[1] == other[1]
    assert texts("exp", torch.empty(2, 1041))[1] != one[1] != texts("exp", torch.empty(3, 1040))[1]
    assert texts("exp", torch.empty(2, 1300))[1] != texts("exp", torch.empty(2, 1041))[1]
    assert texts("exp", torch.empty(1040, 2).t())[1] != one[1]
    assert texts("exp", torch.empty(2, 1).expand(2, 1040))[1] != one[1]


def test_a_growing_cache_is_not_timed_at_every_token(device: str, spy: Spy) -> None:
    timer = FakeTimer(2.0, 1.0, runs=0)
    with mode_with(timer, spy, trace=True) as mode:
        for n in range(1041, 1071, 2):  # all odd
            torch.exp(torch.empty(n, device=device))
    assert timer.seen == choice.PER_CLASS and spy.take() == []
    origins = [r.timed for r in mode.report.records if r.overload == "aten.exp.default"]
    assert origins.count("measured") == choice.PER_CLASS and origins.count("similar") == 15 - choice.PER_CLASS
    assert "native is faster: 1.0 us against 2.0 us, at nearly these sizes" in {r.reason for r in mode.report.records}


# -- keeping -----------------------------------------------------------------------------------------------------------


def entry(rule: float = 1.0, native: float = 2.0, name: str = "add", source: str | None = "s", size_class: str = "c") -> Entry:
    return Entry(name, source, Choice(Timing(rule, 0.5), Timing(native, 0.5)), size_class)


ABOUT = {"gpu": "NVIDIA H200", "driver": "580", "torch": "2.13", "triton": "3.7", "gemsmode": "0.1"}


def test_choices_are_kept_for_the_next_process(x: torch.Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeTimer(2.0, 1.0, runs=0), FakeTimer(1.0, 2.0, runs=0)
    with mode_with(first):
        torch.exp(x)
    (file,) = cache.glob("choices-*.json")
    data = json.loads(file.read_text())
    assert data["environment"]["torch"] == torch.__version__ and data["environment"]["gemsmode"] == gemsmode.__version__
    assert [e["rule"] for e in data["choices"].values()] == ["exp"]
    with mode_with(second, trace=True) as mode:  # a chooser of its own, as another process has
        torch.exp(x)
    (record,) = mode.report.records
    assert second.seen == 0 and (record.decision, record.timed) == ("pass", "kept")
    again = FakeTimer(1.0, 2.0, runs=0)
    chooser = Chooser(timer=again, again=True)
    with GemsMode(prefer=chooser):
        torch.exp(x)
        torch.exp(x)
    assert again.seen == 1
    # Another version, another driver, another kernel source: measured anew.
    for name, value in (("environment", lambda target, device=0: {**ABOUT, "driver": "581"}), ("source_hash", lambda rule: "other")):
        timer = FakeTimer(runs=0)
        with monkeypatch.context() as patch:
            patch.setattr(choice, name, value)
            with mode_with(timer):
                torch.exp(x)
        assert timer.seen == 1, name


def test_a_rule_whose_source_cannot_be_read_is_kept_in_memory_only(x: torch.Tensor, cache: Path) -> None:
    registry, scope = gemsmode.Registry("typed"), {"torch": torch}
    exec(compile("def my_exp(x):\n    return torch.ops.aten.exp.default(x)", "<typed>", "exec"), scope)
    gemsmode.rule("aten.exp.default", registry=registry)(scope["my_exp"])
    timer = FakeTimer(runs=0)
    chooser = Chooser(timer=timer)
    for _ in range(2):
        with GemsMode(prefer=chooser, registry=registry, trace=True):
            torch.exp(x)
    assert timer.seen == 1 and not list(cache.glob("*.json"))


def test_the_source_of_a_rule_is_its_kernels_files_and_what_they_use() -> None:
    gemsmode.load_ops()
    by_name = {r.name: r for r in gemsmode.registry.default.rules}
    add, mul, softmax = (choice.source_hash(by_name[n]) for n in ("add", "mul", "softmax"))
    assert add == mul and add != softmax and add and len(add) == 16


def test_many_processes_merge(tmp_path: Path) -> None:
    def work(i: int) -> None:
        store = Store(tmp_path, ABOUT)
        for j in range(20):
            store.put(f"{i}-{j}", entry(size_class=f"{i}"))
            store.save()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]  # a lock among open files, as among processes
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    store = Store(tmp_path, ABOUT)
    assert len(store) == 120 and [f.suffix for f in sorted(tmp_path.iterdir())] == [".json", ".lock"]
    assert store.path is not None and json.loads(store.path.read_text())["environment"] == ABOUT
    # What another process writes is seen without asking for it.
    other = Store(tmp_path, ABOUT)
    other.put("new", entry())
    other.save()
    assert store.get("new", "add", "s") is not None and store.get("new", "add", "t") is None and store.get("new", "mul", "s") is None
    assert len(Store(tmp_path, {**ABOUT, "triton": "3.8"})) == 0


@pytest.mark.parametrize("content", [
    "garbage", "", "[]", '{"format": 1}', '{"format": 99, "choices": {}}', '{"format": 1, "choices": {"a": {"rule": "add"}}}',
    '{"format": 1, "choices": {"a": {"rule": "add", "source": "s", "class": "c", "rule_us": ["x", 1], "native_us": [1, 1]}}}',
    '{"format": 1, "choices": {"a": {"rule": "add", "source": "s", "class": "c", "rule_us": [NaN, 1], "native_us": [1, 1]}}}',
    '{"format": 1, "choices": {"a": {"rule": 1, "source": "s", "class": "c", "rule_us": [1, 1], "native_us": [1, 1]}}}', "\x80\x04N."])
def test_a_corrupt_file_is_set_aside(content: str, tmp_path: Path) -> None:
    store = Store(tmp_path, ABOUT)
    assert store.path is not None
    store.path.write_bytes(content.encode("latin1"))
    with pytest.warns(RuntimeWarning, match="cannot be read .*set aside"):
        assert len(store) == 0
    (aside,) = tmp_path.glob("*.corrupt-*")
    assert aside.read_bytes() == content.encode("latin1")
    store.put("a", entry())
    store.save()
    assert len(Store(tmp_path, ABOUT)) == 1


def test_an_unwritable_folder_is_said_once_and_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "below", ABOUT)
    with caplog.at_level(logging.WARNING, "gemsmode"):
        for i in range(3):
            store.put(str(i), entry())
            store.save()
    assert len(store) == 3 and [r.message for r in caplog.records if "are not kept" in r.message] == [caplog.records[0].message]


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MAX_KEPT", 10)
    store = Store(tmp_path, ABOUT)
    for i in range(25):
        store.put(str(i), entry())
    store.save()
    assert [text for text, _ in Store(tmp_path, ABOUT).items()] == [str(i) for i in range(15, 25)]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.cache_folder().name == "cache"
    monkeypatch.delenv("GEMSMODE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert choice.cache_folder() == Path("/there/gemsmode")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert choice.cache_folder() == Path("/home/someone/.cache/gemsmode")


# -- timers ------------------------------------------------------------------------------------------------------------


class FakeDevice:
    """A device with a queue: kernels begin when the one before is done and the host has launched them."""

    __name__ = "torch.cpu"

    def __init__(self) -> None:
        self.host = self.done = 0.0
        self.flushes = 0

    def now(self) -> float:
        return self.host * 1e-6

    def launch(self, host_us: float, device_us: float) -> None:
        self.host += host_us
        self.done = max(self.done, self.host) + device_us

    def call(self, host_us: float, device_us: float) -> Callable[[], None]:
        return lambda: self.launch(host_us, device_us)

    def _sleep(self, cycles: int) -> None:
        self.launch(1.0, cycles / 2000)

    def current_stream(self, device: int = 0) -> Any:
        return self

    def synchronize(self) -> None:
        self.host = max(self.host, self.done)

    def device(self, index: int) -> Any:
        return warnings.catch_warnings()

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(L2_cache_size=1 << 20)

    def Event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                device.host += 0.5
                self.at = max(device.done, device.host)

            def synchronize(self) -> None:
                device.synchronize()

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e-3

        return Event()


class _Timer(DeviceTimer):
    def _flusher(self, device: int) -> Callable[[], Any]:
        real = super()._flusher(device)
        assert real().numel() == 1 << 20  # the size of the cache, written over

        def flush() -> None:
            self._module.flushes += 1
            self._module.launch(4.0, 15.0)

        return flush


@pytest.mark.parametrize(("rule", "native"), [((9.0, 2.0), (5.0, 2.5)), ((9.0, 70.0), (5.0, 165.0)), ((30.0, 8.0), (5.0, 9.0)),
                                              ((9.0, 20_000.0), (5.0, 20_100.0))])
def test_the_device_timer_tells_host_from_device(rule: tuple[float, float], native: tuple[float, float]) -> None:
    device = FakeDevice()
    timings = _Timer(device, device.now).compare(device.call(*rule), device.call(*native), 0)
    for timing, (host_us, device_us) in zip(timings, (rule, native)):
        # The first kernel of a round may still wait for the host: medians are over rounds.
        assert timing.device_us == pytest.approx(device_us, abs=1.0)
        assert timing.host_us == pytest.approx(host_us, abs=1.0)
    assert device.flushes >= 6


def test_the_wall_timer_takes_turns_and_ends_soon_where_it_is_clear() -> None:
    clock = FakeDevice()
    log: list[str] = []

    def call(name: str, us: float) -> Callable[[], None]:
        return lambda: (log.append(name), clock.launch(us, 0.0))[1]

    assert WallTimer(clock.now).compare(call("r", 5000.0), call("n", 10.0), 0) == (
        pytest.approx(Timing(5000.0, 5000.0)), pytest.approx(Timing(10.0, 10.0)))
    assert "".join(log) == "nrnn"
    log.clear()
    WallTimer(clock.now).compare(call("r", 12.0), call("n", 10.0), 0)
    assert "".join(log) == "nrnn" * 3


def test_real_timing_in_the_interpreter(device: str) -> None:
    if device == "cuda":
        pytest.skip("the interpreter's own")
    x = torch.randn(64, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for threads on a busy machine can take longer than the interpreter
    try:
        with GemsMode(prefer="fastest", trace=True) as mode:
            y = torch.softmax(x + 1, -1)
            x.mul_(2)
    finally:
        torch.set_num_threads(threads)
    for record in mode.report.compute:
        assert record.decision == "pass" and record.native_us is not None and record.rule_us is not None
        assert record.native_us < record.rule_us and "native is faster" in (record.reason or "")
    assert torch.allclose(y.sum(-1), torch.ones(64))
    text = str(mode.report)
    assert "Measured: rule or PyTorch's own" in text and "by rule" in text and "3 measured now" in text and "write next" not in text
    start = time.perf_counter()
    with GemsMode(prefer="fastest"):
        for _ in range(20):
            torch.softmax(x, -1)
    assert time.perf_counter() - start < 2.0


def test_real_timing_on_a_gpu(device: str) -> None:
    skip_without_cuda(device)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    row = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    with GemsMode(prefer="fastest", trace=True) as mode:
        for _ in range(3):
            torch.softmax(x * row, -1)
        torch.add(x[:64, :64], 1)
    for record in mode.report.compute:
        assert record.rule_us and record.native_us and 0.5 < record.native_us < 1e5
    by_op = {r.overload: r for r in mode.report.compute}
    assert by_op["aten.mul.Tensor"].decision == "rule"  # a broadcast, more than twice as fast
    graph = torch.cuda.CUDAGraph()
    with GemsMode(prefer=Chooser(None)) as unknown, torch.cuda.graph(graph):
        z = torch.exp(row)
    graph.replay()
    torch.testing.assert_close(z, torch.exp(row))
    assert decision(unknown, "exp", row).choice is not None  # timed now that nothing is captured


# -- how it is asked for and shown -------------------------------------------------------------------------------------


def test_options(x: torch.Tensor, spy: Spy) -> None:
    with pytest.raises(ValueError, match=r"prefer is 'rules' .* not 'fast'"):
        GemsMode(prefer="fast")
    with pytest.raises(ValueError, match="dry run"):
        GemsMode(prefer="fastest", dry_run="cuda:90")
    with GemsMode(prefer="rules", registry=spy.registry):
        torch.exp(x)
    assert spy.take() == ["aten.exp.default"]
    timer = FakeTimer(2.0, 1.0, runs=0)
    gemsmode.enable(prefer=Chooser(None, timer), registry=spy.registry)
    torch.exp(x)
    gemsmode.disable()
    assert timer.seen == 1 and spy.take() == []
    with pytest.raises(ValueError, match="'cost' or 'device'"):
        Chooser(by="host")
    assert GemsMode(prefer="fastest").policy is GemsMode(prefer="fastest").policy
    assert GemsMode(prefer="fastest").policy is not GemsMode().policy


def test_with_verification_the_chosen_rules_are_compared(x: torch.Tensor) -> None:
    with GemsMode(verify=True, on_mismatch="raise", prefer=Chooser(None, FakeTimer(1.0, 2.0))) as mode:
        torch.exp(x)
    assert [(c.overload, c.compared, c.failed) for c in mode.report.checks] == [("aten.exp.default", 1, 0)]
    with GemsMode(verify=True, prefer=Chooser(None, FakeTimer(2.0, 1.0))) as mode:
        torch.exp(x)
    assert not mode.report.checks


def test_reports_show_it_in_every_format(x: torch.Tensor) -> None:
    with GemsMode(trace=True, prefer=Chooser(None, FakeTimer(9.8, 7.1))) as mode:
        torch.exp(x)
    report = mode.report
    for text in (report.to_markdown(), report.to_html(), report.to_csv(), str(Report.from_dict(report.to_dict()))):
        assert "9.8" in text and "7.1" in text
    assert json.loads(report.to_json())["records"][0]["native_us"] == 7.1


def test_several_threads_time_one_at_a_time(x: torch.Tensor, spy: Spy) -> None:
    busy: list[int] = []

    class Watched(FakeTimer):
        def compare(self, rule: Any, native: Any, device: int) -> Any:
            assert not busy
            busy.append(1)
            time.sleep(0.01)
            busy.pop()
            return super().compare(rule, native, device)

    timer = Watched(runs=0)
    chooser = Chooser(None, timer)

    def work(op: Any) -> None:
        with GemsMode(prefer=chooser, registry=spy.registry):
            op(x)

    threads = [threading.Thread(target=work, args=(op,)) for op in (torch.exp, lambda t: t + 1, lambda t: t * 2, torch.exp)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert timer.seen == 3


def test_explain_shows_a_kept_choice(x: torch.Tensor) -> None:
    assert gemsmode.explain("exp", x).choice is None
    with GemsMode(prefer=Chooser(timer=FakeTimer(9.8, 7.1, runs=0))):
        torch.exp(x)
    told = gemsmode.explain("exp", x)
    assert told.decision is not None and told.decision.kind == "rule"  # what a mode does that prefers rules
    assert "prefer='fastest' takes native: native is faster: 7.1 us against 9.8 us" in str(told)
    told = gemsmode.explain("exp", x, mode=GemsMode(prefer="fastest"))
    assert told.decision is not None and told.decision.kind == "pass" and "native is faster" in str(told)


SCRIPT = """
import sys, torch
x = torch.ones(8, 8, device=sys.argv[1])
print("sum", float((x + 1).sum()))
"""


def test_tune(tmp_path: Path, capsys: Any, device: str, cache: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert cli.main(["tune", str(script), device]) == 0
    out, err = capsys.readouterr()
    assert "sum 128.0" in out and "Measured: " in out and "add.Tensor" in out and "measured now" in out and err == ""
    (file,) = cache.glob("choices-*.json")
    assert f"choices are kept in {file}" in out
    assert cli.main(["tune", "--quiet", str(script), device]) == 0
    assert capsys.readouterr().out == "sum 128.0\n"
    assert cli.main(["tune", str(script), device]) == 0
    assert "kept from before" in capsys.readouterr().out
    assert cli.main(["tune", "--again", str(script), device]) == 0
    assert "measured now" in capsys.readouterr().out
    assert cli.main(["tune", "--list"]) == 0
    assert "add.Tensor(f32[8,8], int)" in capsys.readouterr().out
    assert f"for this GPU and these versions, in {file}" in doctor._choices()[0].text
    assert cli.main(["explain", "add.Tensor", "f32[8,8]", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"]["taken"] in ("rule", "native")
    assert cli.main(["report", "--prefer", "fastest", str(script), device]) == 0
    assert "kept from before" in capsys.readouterr().out
    assert cli.main(["report", "--prefer", "fastest", "--dry-run", str(script), device]) == 2
    assert cli.main(["tune"]) == 2
    script.write_text("print(1)")
    assert cli.main(["tune", str(script)]) == 1
    assert "nothing was timed" in capsys.readouterr().err
