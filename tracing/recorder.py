"""The recorder of a traced mode: told of each call, it adds to a row of totals and never keeps a tensor.

A row stands for all calls of one op with one decision, one set of argument shapes and dtypes, in one module and
phase. Each thread has its own rows, so that autograd's threads need no lock; :meth:`Recorder.report` puts them
together.
"""

from __future__ import annotations

import itertools
import platform
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import _get_sequence_nr
from torch.utils._dtype_abbrs import dtype_abbrs

from gemsmode.handlers import Decision
from gemsmode.native import numbers_of_host
from gemsmode.target import Target
from gemsmode.tracing.clock import Begun, DeviceClock, OfThread
from gemsmode.tracing.modules import ModuleTracker, Place
from gemsmode.tracing.report import COMPUTE, Record, Report
from gemsmode.tracing.sections import seconds
from gemsmode.tracing.timeline import Timeline

if TYPE_CHECKING:
    from gemsmode.dryrun import DryRun
    from gemsmode.verify import Verifier

MAX_ROWS = 20_000
"""Rows kept per thread; beyond it, calls of new shapes share one row per op, decision and module."""

FEW, HOST_BOUND = 100, 1.25
"""Calls from which on it is said that the host is the limit, and how much longer than the device's its time must be: a host that
is ahead waits for the device to take more, which counts as its time."""

LISTED = 8
"""Tensors of a list argument (``cat``, ``_foreach_add``) whose shapes are part of a row's key."""

_APART_BECAUSE = {"view": "a view, an allocation or metadata", "comm": "communication between processes",
                  "host": "0-dim CPU tensors alone: numbers that PyTorch keeps on the host"}

Token = tuple["_Buffer", Any, Begun | None, "_Totals | None", str, str, int]
_current_graph_task_id = torch._C._current_graph_task_id


class _Totals:
    """A row: what its calls have in common, and their totals."""

    __slots__ = ("calls", "captured", "decision", "device_calls", "device_ns", "foreign", "host_ns", "module", "number",
                 "op", "phase", "shapes", "touched")

    def __init__(self, number: int, op: Any, decision: Decision, shapes: tuple[Any, ...] | None, module: str, phase: str,
                 touched: int) -> None:
        self.number, self.op, self.decision, self.shapes, self.module, self.phase = number, op, decision, shapes, module, phase
        self.touched = touched
        self.foreign = getattr(op, "namespace", "aten") != "aten"
        self.calls = self.host_ns = self.device_ns = self.device_calls = self.captured = 0


class _Buffer(OfThread):
    """What one thread has recorded."""

    __slots__ = ("known", "place", "rows", "thread")

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.rows: dict[Any, _Totals] = {}
        self.known: dict[Any, tuple[object, _Totals, int | None]] = {}
        """The rows and devices of calls, by the identity of their signature, module and phase; an entry keeps its signature alive."""
        self.place = place
        self.thread = threading.get_ident()


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dtype and shape of each tensor argument; of the first few and the number of them for lists."""
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append((arg.dtype, arg.shape))
        elif arg.__class__ in (list, tuple) and arg and (isinstance(arg[0], torch.Tensor) or isinstance(arg[-1], torch.Tensor)):
            found.append((len(arg), *[None if t is None else (t.dtype, t.shape) for t in arg[:LISTED]]))
    return tuple(found)


def _device(args: tuple[Any, ...]) -> int | None:
    """The index of the device of the first tensor that is on one, else -1 for the CPU; None without a tensor."""
    found = None
    for arg in args:
        for t in arg if arg.__class__ in (list, tuple) else (arg,):
            if isinstance(t, torch.Tensor):
                found = t.get_device()
                if found >= 0:
                    return found
    return found


def _touched(args: tuple[Any, ...]) -> int:
    """Bytes of the tensor arguments."""
    total = 0
    for arg in args:
        for t in arg if arg.__class__ in (list, tuple) else (arg,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_nested:
                total += t.numel() * t.element_size()
    return total


def _text(shapes: tuple[Any, ...] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A row's arguments in words, and their dtypes."""
    if shapes is None:
        return ("(various)",), ()
    texts, dtypes = [], []
    for item in shapes:
        listed = item.__class__ is tuple and item[0].__class__ is int
        parts = []
        for part in item[1:] if listed else (item,):
            if part is None:
                parts.append("None")
                continue
            dtype, shape = part
            dtypes.append(str(dtype).removeprefix("torch."))
            parts.append(f"{dtype_abbrs.get(dtype, dtypes[-1])}[{','.join(map(str, shape))}]")
        if listed:
            more = ",..." if item[0] > len(parts) else ""
            texts.append(f"[{','.join(parts)}{more}]" + (f"x{item[0]}" if more else ""))
        else:
            texts += parts
    return tuple(texts), tuple(dict.fromkeys(dtypes))


class Recorder:
    """Records calls; safe to use from any thread.

    Args:
        target: what kernels run on; on a present GPU calls are timed by device events, elsewhere by wall time.
        dry: the dry run whose calls these are; they are not timed.
        verifier: who compares the calls; its findings become part of the report.
    """

    def __init__(self, target: Target, dry: DryRun | None = None, verifier: Verifier | None = None) -> None:
        self.target = target if dry is None else dry.target
        self._dry, self._verifier = dry, verifier
        self._has_host = self._dry is None and self.target.device_type != "cpu"
        self.timeline = Timeline()
        self.modules = ModuleTracker()
        self._clock = DeviceClock.of(self.target, self.timeline)
        self._local = threading.local()
        self._buffers: list[_Buffer] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._entered = 0
        self._since = self._wall_ns = 0
        self._graphs_built = False
        self._exception: str | None = None

    # -- the block -----------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """The mode was entered on this thread."""
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._since = time.perf_counter_ns()
                self.modules.install()
                if self._dry is not None:
                    self._dry.install()
        starts = self._local.__dict__.setdefault("entered_at", [])
        starts.append(_get_sequence_nr())

    def leave(self, exception: BaseException | None) -> None:
        """The mode was left on this thread, by ``exception`` if there is one."""
        starts = self._local.__dict__.get("entered_at")
        if starts and _get_sequence_nr() > starts.pop():
            self._graphs_built = True
        if exception is not None:
            text = str(exception).strip().splitlines()
            self._exception = f"{type(exception).__name__}" + (f": {text[0]}" if text else "")
        with self._lock:
            if self._entered:
                self._entered -= 1
                if not self._entered:
                    self._stop()

    def close(self) -> None:
        """The mode is over on every thread, including those that have not left it."""
        with self._lock:
            if self._entered:
                self._entered = 0
                self._stop()

    def _stop(self) -> None:
        self._wall_ns += time.perf_counter_ns() - self._since
        self.modules.remove()
        if self._dry is not None:
            self._dry.remove()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def begin(self, op: Any, decision: Decision, args: tuple[Any, ...] = (), signature: object = None) -> Token:
        """A call is about to run; give what this returns to :meth:`end`. Only metadata of ``args`` is read.

        Args:
            signature: the same object for all calls of the same op, decision and metadata, whose row is then known by it.
        """
        try:
            buffer = self._local.buffer
        except AttributeError:
            buffer = self._new_buffer()
        span = None
        if _profiler_enabled():
            # Nests under the profiler's own ranges, so that its trace shows what each call became.
            span = _RecordFunctionFast(f"gems::{op} [{decision.rule or decision.kind}]")
            span.__enter__()
        place = buffer.place
        if _current_graph_task_id() == -1:  # as `_place` has it, which is asked where time does not count
            module, phase = place.module, place.phase
        else:
            module, phase = self.modules.backward_module(place), "backward"
        known = buffer.known.get((id(signature), module, phase)) if signature is not None else None
        clock, timed = self._clock, None
        if clock is not None and decision.kind != "view":  # a view runs nothing on the device
            device = _device(args) if known is None else known[2]
            if device != -1:
                timed = clock.start(buffer, device)
        return buffer, span, timed, None if known is None else known[1], module, phase, time.perf_counter_ns()

    def end(self, token: Token, op: Any, decision: Decision, args: tuple[Any, ...], signature: object = None) -> None:
        """The call has run, or raised. The arguments are those of :meth:`begin`, or a new decision and no signature."""
        now = time.perf_counter_ns()
        buffer, span, timed, row, module, phase, began = token
        if span is not None:
            span.__exit__(None, None, None)
        if row is None or signature is None:
            row = self._row(buffer, op, decision, args, module, phase)
            if signature is not None:
                if len(buffer.known) >= MAX_ROWS:
                    buffer.known.clear()
                buffer.known[id(signature), module, phase] = signature, row, _device(args)
        row.calls += 1
        if self._dry is not None:
            return
        host_ns = now - began
        row.host_ns += host_ns
        if timed is None or self._clock is None or not self._clock.stop(timed, row, began, host_ns):
            self.timeline.add(row.number, began, host_ns, buffer.thread)

    def _row(self, buffer: _Buffer, op: Any, decision: Decision, args: tuple[Any, ...], module: str, phase: str) -> _Totals:
        """The row of a call, a new one if there is none."""
        if decision.kind == "pass" and self._has_host and numbers_of_host(args):
            decision = Decision("host")
        try:
            shapes: Any = _shapes(args)
            key: Any = (id(op), decision.kind, decision.rule, decision.reason, decision.bytes, decision.flops, shapes, module, phase)
            row = buffer.rows.get(key)
        except Exception:  # nested tensors and the like have no shape
            key = (id(op), decision.kind, decision.rule, decision.reason, None, None, None, module, phase)
            shapes, row = None, buffer.rows.get(key)
        return row or self._new_row(buffer, key, op, decision, shapes, module, phase, args)

    def _place(self, place: Place) -> tuple[str, str]:
        if _current_graph_task_id() == -1:
            return place.module, place.phase
        return self.modules.backward_module(place), "backward"

    def place(self) -> tuple[str, str]:
        """The module and phase in which this thread is."""
        return self._place(self.modules.here())

    def _new_buffer(self) -> _Buffer:
        buffer = self._local.buffer = _Buffer(self.modules.here())
        with self._lock:
            self._buffers.append(buffer)
        return buffer

    def _new_row(self, buffer: _Buffer, key: Any, op: Any, decision: Decision, shapes: Any, module: str, phase: str,
                 args: tuple[Any, ...]) -> _Totals:
        if shapes is not None and len(buffer.rows) >= MAX_ROWS:
            key = (*key[:4], None, None, None, module, phase)
            shapes = None
            if (found := buffer.rows.get(key)) is not None:
                return found
        if shapes is None:
            decision = Decision(decision.kind, decision.rule, decision.reason)
        row = buffer.rows[key] = _Totals(next(self._numbers), op, decision, shapes, module, phase, _touched(args) if shapes else 0)
        return row

    # -- the report ----------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What was recorded so far. Waits for the device, to read the time of calls that are still under way."""
        with self._lock:
            running = self._entered > 0
            wall_ns = self._wall_ns + (time.perf_counter_ns() - self._since if running else 0)
        timed = self._clock is None or self._clock.finish()
        seen = len(self.timeline)
        with self._lock:
            buffers = list(self._buffers)
        merged: dict[Any, list[_Totals]] = {}
        for buffer in buffers:
            for key, totals in list(buffer.rows.items()):
                merged.setdefault(key, []).append(totals)
        records: list[Record] = []
        numbers: dict[int, int] = {}
        for rows in merged.values():
            numbers.update((row.number, len(records)) for row in rows)
            records.append(self._record(rows))
        return Report(tuple(records), self._environment(), tuple(self._notes(records, timed)), wall_ns / 1e9,
                      self.timeline if self._dry is None else None, seen, numbers,
                      () if self._verifier is None else tuple(self._verifier.checks()))

    def _record(self, rows: list[_Totals]) -> Record:
        first = rows[0]
        gap_ns = (self._clock.gap_ns if self._clock is not None else 0) or 0
        decision = first.decision
        choice = decision.choice
        inputs, dtypes = _text(first.shapes)
        device_calls = sum(r.device_calls for r in rows)
        return Record(
            overload=str(first.op), decision=decision.kind, rule=decision.rule,
            reason=_APART_BECAUSE.get(decision.kind, decision.reason),
            inputs=inputs, dtypes=dtypes, module=first.module, phase=first.phase,
            calls=sum(r.calls for r in rows), host_s=sum(r.host_ns for r in rows) / 1e9,
            device_s=max(0, sum(r.device_ns for r in rows) - device_calls * gap_ns) / 1e9 if device_calls else None,
            device_calls=device_calls,
            captured=sum(r.captured for r in rows), bytes=decision.bytes, flops=decision.flops, touched=first.touched,
            rule_us=choice and choice.rule_us, native_us=choice and choice.native_us, timed=choice.origin if choice else "")

    def _environment(self) -> dict[str, Any]:
        import gemsmode

        target = self.target
        device = platform.processor() or platform.machine()
        if target.interpreted:
            device = f"{device} (Triton's interpreter)"
        elif target.present and target.device_type == "cuda":
            device = torch.cuda.get_device_name()
        elif target.present and target.device_type == "xpu":
            device = torch.xpu.get_device_name()
        about = {"gemsmode": gemsmode.__version__, "torch": torch.__version__, "triton": triton.__version__,
                 "python": platform.python_version(), "device": device, "interpreter": target.interpreted,
                 "timing": "wall" if self._clock is None else "device"}
        if self._clock is not None and self._clock.gap_ns:
            about["event_gap_us"] = self._clock.gap_ns / 1e3
        if self._dry is not None:
            about.update(device=self._dry.name, interpreter=False, timing="none", dry_run=True, peak_bytes=self._dry.memory.peak)
        return about

    def _notes(self, records: list[Record], timed: bool) -> list[str]:
        notes = []
        if self._exception is not None:
            notes.append(f"the block was left by an exception ({self._exception}); this is what ran until then")
        starts = self._local.__dict__.get("entered_at") or []
        built = self._graphs_built or bool(starts and _get_sequence_nr() > starts[-1])
        computed = any(r.decision in COMPUTE for r in records)
        if built and computed and not any(r.phase == "backward" for r in records):
            notes.append("a forward that wants gradients was seen and no backward: a backward() after the block is not covered "
                         "(gemsmode.enable() covers both)")
        if self.modules.saw_compiled or _compiled_graphs():
            notes.append("torch.compile was used in this process: what runs inside compiled regions is not seen")
        if captured := sum(r.captured for r in records):
            notes.append(f"{captured} calls were captured into a CUDA graph: counted once, not timed; its replays run no Python")
        if not timed:
            notes.append("a graph is being captured: calls still under way on the device are not timed in this report")
        timed_records = [r for r in records if r.device_s is not None and r.decision in COMPUTE]
        device_s = sum(r.device_s or 0.0 for r in timed_records)
        clock = self._clock
        if clock is not None and clock.kept_busy:
            notes.append(f"the device had nothing to do {clock.kept_busy} times and was kept busy for about two milliseconds each, so that "
                         "what it waits for the host is not taken for a call's time: the block took longer by it")
        if device_s and clock is not None and clock.counts_waiting and sum(r.host_s for r in timed_records) > 0.8 * device_s:
            notes.append("the host is about as slow as the device here: device time is taken between two events around each call, and "
                         "includes what the device waited for the launch")
        calls = sum(r.calls - r.captured for r in records)
        host_s = calls * self.timeline.typical_host_ns() / 1e9 if device_s and calls >= FEW else 0.0
        if host_s > HOST_BOUND * device_s:
            notes.append(f"the host is the limit here: {calls:,} calls at {host_s / calls * 1e6:.0f} us take it about {seconds(host_s)}, "
                         f"without the code between them, and the device computes for {seconds(device_s)}. gemsmode.capture replays them "
                         "without the host, gemsmode.patch makes them fewer")
        if any(r.inputs == ("(various)",) for r in records):
            notes.append(f"more than {MAX_ROWS} different calls: later shapes are gathered as (various)")
        if self.timeline.dropped:
            notes.append(f"the timeline holds the first {len(self.timeline)} calls; {self.timeline.dropped} later ones are only counted")
        if self._dry is not None:
            notes += self._dry.notes()
        elif self.target.interpreted:
            notes.append("kernels ran in Triton's interpreter, which is for checking: their times say nothing about a GPU")
        return notes


def _compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; 0 where it was never imported."""
    utils = sys.modules.get("torch._dynamo.utils")
    counters = getattr(utils, "counters", None)
    return counters["stats"]["unique_graphs"] if counters and "stats" in counters else 0
