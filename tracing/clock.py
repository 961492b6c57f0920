"""Device time without waiting: pairs of events from a pool, read when they have happened."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gemsmode.target import Target
from gemsmode.tracing.timeline import Timeline

HARVEST_AT = 256
"""Pairs of events under way, per thread, before finished ones are read (by a query, which does not wait). Few, since
making an event costs several times what using one again does."""

_BLOCK = 32
"""Pairs that are read together, when the last has happened; also calls after which the place of one on the timeline is read,
and not taken to be where the call before it ended: reading two events costs more than recording one."""

_EMPTY_NS = 640
"""For how long a kernel that does nothing runs, which only a profiler can see: 0.64 us on an H200."""

_PAIRS = 24
"""Pairs of events around kernels that do nothing, by which is measured what a pair adds."""

_AHEAD = 32
"""Calls by which the host must be ahead of the device, so that no call's events wait for its launch."""

_AHEAD_CYCLES = 3_500_000
"""For how long a device without work is kept busy while the host gets ahead of it: about two milliseconds."""


_AT_ONCE_NS = 8_000
"""A call that begins so soon after the one before it has that call's end as its start: less than it takes to come from one
to the other and to launch something between that the mode does not see, such as another library's kernel, whose time would
be counted with the call's."""


class Mark(NamedTuple):
    """The start of one call on a device; ``event`` is None while a graph is being captured, when nothing is timed."""

    event: Any
    device: int
    stream: Any = None
    paused: bool = True
    """Whether the device may have had nothing to do before."""
    after: Pending | None = None
    """The call whose end ``event`` is."""


class _Runtime(NamedTuple):
    """The functions of a device's runtime that every call needs, with nothing around them that need not be."""

    device: Callable[[], int]
    stream: Callable[[int], Any]
    capturing: Callable[[], bool]
    record: Callable[[Any, Any], None]
    query: Callable[[Any], bool]
    elapsed: Callable[[Any, Any], float]


def _runtime(module: Any) -> _Runtime:
    """The runtime behind ``torch.cuda`` or ``torch.xpu``.

    The public functions of ``torch.cuda`` ask each time whether CUDA has been initialized and make a new object for the
    current stream, which costs more than recording the event; here both are done once.
    """
    capturing = getattr(module, "is_current_stream_capturing", lambda: False)
    if module is not torch.cuda or not torch.cuda.is_available():
        return _Runtime(module.current_device, lambda device: None, capturing, lambda event, stream: event.record(),
                        lambda event: event.query(), lambda start, end: start.elapsed_time(end))
    raw_stream, streams = torch._C._cuda_getCurrentRawStream, dict[tuple[int, int], Any]()

    def stream(device: int) -> Any:
        key = device, raw_stream(device)
        found = streams.get(key)
        if found is None:
            found = streams[key] = torch.cuda.current_stream(device)
        return found

    event = torch._C._CudaEventBase
    return _Runtime(torch._C._cuda_getDevice, stream, torch._C._cuda_isCurrentStreamCapturing, event.record, event.query,
                    event.elapsed_time if torch.version.hip else _elapsed_by_driver(event.elapsed_time))


def _elapsed_by_driver(otherwise: Callable[[Any, Any], float]) -> Callable[[Any, Any], float]:
    """What ``Event.elapsed_time`` gives, asked of CUDA's driver, which needs one call where PyTorch makes three: it asks first
    whether each event has happened. ``otherwise`` where there is no such function, or it fails."""
    try:
        function = ctypes.PyDLL("libcuda.so.1").cuEventElapsedTime
    except (OSError, AttributeError):
        return otherwise
    function.argtypes = (ctypes.c_void_p,) * 3
    value = ctypes.c_float()
    place = ctypes.addressof(value)

    def elapsed(start: Any, end: Any) -> float:
        return otherwise(start, end) if function(place, start.cuda_event, end.cuda_event) else value.value

    return elapsed


class Pending:
    """A call whose events have been recorded and not been read yet.

    Attributes:
        follows: whether the device went from the call before, of this thread, to this one without a pause.
        shared: whether ``end`` is the start of the call after it, too, which then puts it back into the pool.
        read: whether it has been read.
    """

    __slots__ = ("end", "follows", "mark", "place", "read", "row", "shared")

    def __init__(self, mark: Mark, end: Any, row: Any, place: int, follows: bool) -> None:
        self.mark, self.end, self.row, self.place, self.follows = mark, end, row, place, follows
        self.shared = self.read = False


class DeviceClock:
    """Measures calls by events on the current stream.

    Nothing here synchronizes except :meth:`finish`. A call takes two events, or one if it begins as soon as the one before it
    has ended; they come from a pool per device and go back to it once read. Under graph capture no event is recorded, queried
    or waited for.

    Between the events of a call on a device that has nothing else to do lies what the host needs to launch it, which can be
    many times the device's own time. A device found without work is therefore kept busy for about two milliseconds, in which
    the host gets some eighty calls ahead, and again when the host is no more than a few calls ahead: nothing waits for it
    but the device, which would have waited anyway, and a host that asks for a value soon after. Where there is no such
    kernel (``torch.xpu``) the waiting is part of the time.

    Args:
        module: ``torch.cuda`` or ``torch.xpu``.
        timeline: told when each call ran.

    Attributes:
        kept_busy: how often the device was.
        gap_ns: what a pair of events adds to the kernel between them on a busy device, which every measured length has too
            much; known after :meth:`finish`, 0 where it cannot be measured.
    """

    def __init__(self, module: Any, timeline: Timeline) -> None:
        self._module, self._timeline = module, timeline
        self._device, self._stream, self._capturing, self._record, self._query, self._elapsed = _runtime(module)
        self._keep_busy: Callable[[int], None] | None = getattr(module, "_sleep", None)
        self._ahead: dict[int, deque[Any]] = {}
        self._initialized = False
        self.kept_busy = 0
        self.gap_ns: int | None = None
        self._pools: dict[int, list[Any]] = {}
        self._origins: dict[int, tuple[Any, int]] = {}
        self._begun: Mark | None = None
        self._last: tuple[Pending, int, int] | None = None
        self._lock = threading.Lock()

    @property
    def counts_waiting(self) -> bool:
        """Whether what a device without work waits for the host is part of the time of calls."""
        return self._keep_busy is None

    @classmethod
    def of(cls, target: Target, timeline: Timeline) -> DeviceClock | None:
        """The clock of a target, or None where wall time is the time (CPU, or a device that is not present)."""
        if not target.present or target.device_type not in ("cuda", "xpu"):
            return None
        return cls(torch.cuda if target.device_type == "cuda" else torch.xpu, timeline)

    def _event(self, device: int) -> Any:
        try:
            return self._pools[device].pop()
        except (KeyError, IndexError):
            return self._module.Event(enable_timing=True)

    def start(self) -> Mark | None:
        """Record an event before a call; None if the device has not been used yet."""
        now = time.perf_counter_ns()
        if not self._initialized:
            if not self._module.is_initialized():
                return None
            self._initialized = True
        device = self._device()
        if self._capturing():
            return Mark(None, device)
        stream = self._stream(device)
        if device not in self._origins:
            origin = self._event(device)
            self._record(origin, stream)
            self._origins[device] = origin, time.perf_counter_ns()
        if self._keep_busy is None or self._nap(device):
            event, paused, after = self._event(device), True, None
        else:
            after = self._just_ended(stream, now)
            event, paused = self._event(device) if after is None else after.end, False
        if after is None:
            self._record(event, stream)
        if self._keep_busy is not None:
            self._ahead[device].append(event)
        mark = self._begun = Mark(event, device, stream, paused, after)
        return mark

    def _just_ended(self, stream: Any, now: int) -> Pending | None:
        """The call before, whose end is to be the start of the one that begins, if nothing can have come between."""
        if self._last is None:
            return None
        last, thread, ended = self._last
        if (last.mark is not self._begun or last.mark.stream is not stream or thread != threading.get_ident()
                or now - ended > _AT_ONCE_NS):
            return None
        with self._lock:
            if last.read:
                return None
            last.shared = True
        return last

    def _nap(self, device: int) -> bool:
        """Give the device something to do if the host is not far enough ahead of it."""
        ahead = self._ahead.get(device)
        if ahead is None:
            ahead = self._ahead[device] = deque(maxlen=_AHEAD)
        # The oldest of the last few calls, or, just after the device was kept busy, the newest: a value may have been asked for.
        if not ahead or self._query(ahead[0] if len(ahead) == _AHEAD else ahead[-1]):
            assert self._keep_busy is not None
            self._keep_busy(_AHEAD_CYCLES)
            self.kept_busy += 1
            ahead.clear()
            return True
        return False

    def stop(self, mark: Mark, pending: deque[Pending], row: Any, index: int) -> None:
        """Record an event after the call; its time goes to ``row`` and to place ``index`` of the timeline later."""
        if mark.event is None:
            row.captured += 1
            return
        # PyTorch's own ops cannot begin a capture; what a library of ops does inside is not known.
        if row.op.namespace != "aten" and self._capturing():
            self.give_back(mark)
            return
        end = self._event(mark.device)
        self._record(end, mark.stream)
        # No other call began within this one, and none of another thread came between.
        thread = threading.get_ident()
        follows = not mark.paused and self._begun is mark and self._last is not None and self._last[1] == thread
        last = Pending(mark, end, row, index, follows)
        pending.append(last)
        if len(pending) >= HARVEST_AT:
            self.harvest(pending)
        self._last = last, thread, time.perf_counter_ns()

    def give_back(self, mark: Mark) -> None:
        """Put the event of a call that is not to be timed back into the pool."""
        if mark.event is None:
            return
        with self._lock:
            if mark.after is not None and not mark.after.read:
                mark.after.shared = False
            else:
                self._pools.setdefault(mark.device, []).append(mark.event)

    def harvest(self, pending: deque[Pending], wait: bool = False) -> None:
        """Read the pairs that have happened, some at once; all of them if ``wait``, for which the device must be done."""
        with self._lock:
            while pending:
                # Of one stream, the last that has happened answers for all before it.
                last = pending[min(_BLOCK, len(pending)) - 1]
                if not wait and not self._query(last.end):
                    return
                block = list(itertools.islice(pending, _BLOCK))
                if not wait and not all((p.mark.stream is last.mark.stream is not None) or self._query(p.end) for p in block):
                    return
                self._read(block)
                for _ in block:
                    pending.popleft()

    def _read(self, block: list[Pending]) -> None:
        at: int | None = None
        for call in block:
            mark, row = call.mark, call.row
            length = int(self._elapsed(mark.event, call.end) * 1e6)
            row.device_ns += length
            row.device_calls += 1
            if call.place >= 0:
                if at is None or not call.follows:
                    origin, then = self._origins[mark.device]
                    at = then + int(self._elapsed(origin, mark.event) * 1e6)
                self._timeline.on_device(call.place, at, length)
                at += length
            call.read = True
            self._pools.setdefault(mark.device, []).extend((mark.event,) if call.shared else (mark.event, call.end))

    def finish(self, queues: list[deque[Pending]]) -> bool:
        """Wait for the device and read everything; False, with nothing read, while a graph is being captured."""
        if not any(queues):
            return True
        if self._capturing():
            return False
        for device in {entry.mark.device for queue in queues for entry in list(queue)}:
            self._module.synchronize(device)
        for queue in queues:
            self.harvest(queue, wait=True)
        if self.gap_ns is None:
            self.gap_ns = self._gap()
        return True

    def _gap(self) -> int:
        """What a pair of events adds to the kernel between them, in ns: what it takes around a kernel that does nothing,
        but for that kernel's own time. The device has other work to do first, so that nothing waits for the host."""
        if self._keep_busy is None:
            return 0
        device = self._device()
        stream = self._stream(device)
        pairs = [(self._event(device), self._event(device)) for _ in range(_PAIRS)]
        self._keep_busy(_AHEAD_CYCLES)
        for start, end in pairs:
            self._record(start, stream)
            self._keep_busy(0)
            self._record(end, stream)
        self._module.synchronize(device)
        with self._lock:
            length = sorted(self._elapsed(start, end) for start, end in pairs)[_PAIRS // 2]
        self._pools.setdefault(device, []).extend(event for pair in pairs for event in pair)
        return max(0, int(length * 1e6) - _EMPTY_NS)
