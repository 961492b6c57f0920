"""Device time without waiting: pairs of events from a pool, read when they have happened."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gemsmode.target import Target
from gemsmode.tracing.timeline import Timeline

HARVEST_AT = 256
"""Pairs of events under way, per thread and stream, before finished ones are read (by a query, which does not wait). Few, since
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

_SURELY_BUSY_NS = 1_000_000
"""For how long it is busy then at any clock rate up to 3.5 GHz, and need not be asked."""

_STILL_BUSY_NS = _AHEAD * 1_000
"""For how long a device is busy that has so many calls before it, and need not be asked: events alone take it 1 us a call."""

_AT_ONCE_NS = 8_000
"""A call that begins so soon after the one before it has that call's end as its start: less than it takes to come from one
to the other and to launch something between that the mode does not see, such as another library's kernel, whose time would
be counted with the call's."""


_Pairs = Sequence[tuple[Any, Any]]


class _Runtime(NamedTuple):
    """The functions of a device's runtime that every call needs, with nothing around them that need not be.

    ``stream`` gives the number of a device's current stream: None where streams are not told apart. ``lengths`` gives the
    milliseconds between the events of each pair.
    """

    device: Callable[[], int]
    stream: Callable[[int], int | None]
    capturing: Callable[[], bool]
    record: Callable[[Any, Any], None]
    query: Callable[[Any], bool]
    lengths: Callable[[_Pairs], list[float]]


def _runtime(module: Any) -> _Runtime:
    """The runtime behind ``torch.cuda`` or ``torch.xpu``.

    The public functions of ``torch.cuda`` ask each time whether CUDA has been initialized and make a new object for the
    current stream, which costs more than recording the event; here both are done once.
    """
    if module is not torch.cuda or not torch.cuda.is_available():
        capturing = getattr(module, "is_current_stream_capturing", lambda: False)
        return _Runtime(module.current_device, lambda device: None, capturing, lambda event, stream: event.record(),
                        lambda event: event.query(), lambda pairs: [start.elapsed_time(end) for start, end in pairs])
    event = torch._C._CudaEventBase

    def lengths(pairs: _Pairs) -> list[float]:
        return [event.elapsed_time(start, end) for start, end in pairs]

    return _Runtime(torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream, torch._C._cuda_isCurrentStreamCapturing, event.record,
                    event.query, lengths if torch.version.hip else _lengths_by_driver(lengths))


def _lengths_by_driver(otherwise: Callable[[_Pairs], list[float]]) -> Callable[[_Pairs], list[float]]:
    """What ``Event.elapsed_time`` gives, asked of CUDA's driver, which needs one call where PyTorch makes three: it asks first
    whether each event has happened. ``otherwise`` where there is no such function, or it fails."""
    try:
        function = ctypes.PyDLL("libcuda.so.1").cuEventElapsedTime
    except (OSError, AttributeError):
        return otherwise
    function.argtypes = (ctypes.c_void_p,) * 3
    value = ctypes.c_float()
    place = ctypes.addressof(value)

    def lengths(pairs: _Pairs) -> list[float]:
        return [otherwise([(start, end)])[0] if function(place, start.cuda_event, end.cuda_event) else value.value for start, end in pairs]

    return lengths


class OfThread:
    """What a clock keeps of a thread: the lane of its last call."""

    __slots__ = ("lane",)

    def __init__(self) -> None:
        self.lane: _Lane | None = None


class _Lane:
    """The calls of one thread on one stream.

    Attributes:
        number, stream: the current stream, as :class:`_Runtime` gives it and as events are recorded on it; None where streams
            are not told apart.
        pool: events that can be used again.
        pending: calls whose events have been recorded and not been read yet, oldest first.
        ahead: starts of the last few calls on the device, of every lane.
        busy_until: until when the stream surely has work, in ns of ``time.perf_counter_ns``.
        harvest_at: how many calls are pending when those that have happened are read next.
    """

    __slots__ = ("ahead", "busy_until", "device", "harvest_at", "number", "pending", "pool", "stream", "thread")

    def __init__(self, device: int, number: int | None = None, stream: Any = None, ahead: deque[Any] | None = None) -> None:
        self.device, self.number, self.stream, self.thread = device, number, stream, threading.get_ident()
        self.ahead: deque[Any] = deque() if ahead is None else ahead
        self.pool: list[Any] = []
        self.pending: list[Timed] = []
        self.busy_until, self.harvest_at = 0, HARVEST_AT


class Timed:
    """A call on a device; made without arguments, since one is made for each call.

    Attributes:
        lane: where it runs.
        start, end: its events; ``start`` is None while a graph is being captured, when nothing is timed.
        after: the call whose end ``start`` is, which began and ended just before.
        shared: whether ``end`` is the start of the call after it, too, which then puts it back into the pool.
        follows: whether the device went from the call before, of this lane, to this one without a pause.
        ended: when ``end`` had been recorded, in ns of ``time.perf_counter_ns``.
        row, began, host_ns: what the timeline is told of it, and whose ``device_ns`` is added to.
        place: its index on the timeline; None until it is there.
    """

    __slots__ = ("after", "began", "end", "ended", "follows", "host_ns", "lane", "place", "row", "shared", "start")

    after: Timed | None
    began: int
    end: Any
    ended: int
    follows: bool
    host_ns: int
    lane: _Lane
    place: int | None
    row: Any
    shared: bool
    start: Any


class DeviceClock:
    """Measures calls by events on the current stream.

    Nothing here synchronizes except :meth:`finish`. A call takes two events, or one if it begins as soon as the one before it
    has ended; they come from a pool per thread and stream and go back to it once read. Under graph capture no event is
    recorded, queried or waited for.

    Between the events of a call on a device that has nothing else to do lies what the host needs to launch it, which can be
    many times the device's own time. A device found without work is therefore kept busy for about two milliseconds, in which
    the host gets some eighty calls ahead, and again when the host is no more than a few calls ahead: nothing waits for it
    but the device, which would have waited anyway, and a host that asks for a value soon after. Where there is no such
    kernel (``torch.xpu``) the waiting is part of the time.

    :meth:`start` and :meth:`stop` are most of what tracing costs and take no lock: a lane is its thread's own. What other
    threads may do, reading its calls for a report, leaves the end of its last one alone, with which the next may just begin.

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
        self._device, self._stream, self._capturing, self._record, self._query, self._lengths = _runtime(module)
        self._keep_busy: Callable[[int], None] | None = getattr(module, "_sleep", None)
        self.kept_busy = 0
        self.gap_ns: int | None = None
        self._lanes: dict[tuple[int, int, int | None], _Lane] = {}
        self._ahead: dict[int, deque[Any]] = {}
        self._origins: dict[int, tuple[Any, int]] = {}
        self._begun: Timed | None = None
        self._last: Timed | None = None
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

    def _event(self) -> Any:
        return self._module.Event(enable_timing=True)

    def start(self, thread: OfThread) -> Timed | None:
        """Record an event before a call; None if the device has not been used yet."""
        now = time.perf_counter_ns()
        lane = thread.lane  # mostly the one of this call, too
        if lane is None and not self._module.is_initialized():
            return None
        device = self._device()
        number = self._stream(device)
        call = Timed()
        # The default stream, which is number 0, cannot be captured.
        if number != 0 and self._capturing():
            call.lane, call.start, call.after = _Lane(device), None, None
            return call
        if lane is None or lane.number != number or lane.device != device:
            lane = thread.lane = self._lane(device, number)
        call.lane = lane
        call.follows = now < lane.busy_until or not self._nap(lane, now)
        last = self._last
        if last is not None and last is self._begun and last.lane is lane and call.follows and now - last.ended <= _AT_ONCE_NS:
            # Nothing can have come between the last call and this one.
            last.shared = True
            call.after, start = last, last.end
        else:
            call.after, start = None, lane.pool.pop() if lane.pool else self._event()
            self._record(start, lane.stream)
        call.start = start
        lane.ahead.append(start)
        self._begun = call
        return call

    def _lane(self, device: int, number: int | None) -> _Lane:
        """This thread's lane on the current stream."""
        with self._lock:
            key = threading.get_ident(), device, number
            lane = self._lanes.get(key)
            if lane is None:
                stream = None if number is None else self._module.current_stream(device)
                ahead = self._ahead.setdefault(device, deque[Any](maxlen=_AHEAD))
                lane = self._lanes[key] = _Lane(device, number, stream, ahead)
            if device not in self._origins:
                origin = self._event()
                self._record(origin, lane.stream)
                self._origins[device] = origin, time.perf_counter_ns()
        return lane

    def _nap(self, lane: _Lane, now: int) -> bool:
        """Give the device something to do if the host is not far enough ahead of it; whether it may have had nothing to do."""
        ahead = lane.ahead
        # The oldest of the last few calls, or, just after the device was kept busy, the newest: a value may have been asked for.
        if self._keep_busy is not None and ahead and not self._query(ahead[0] if len(ahead) == _AHEAD else ahead[-1]):
            if len(ahead) == _AHEAD:
                lane.busy_until = now + _STILL_BUSY_NS
            return False
        if self._keep_busy is not None:
            self._keep_busy(_AHEAD_CYCLES)
            self.kept_busy += 1
            ahead.clear()
            lane.busy_until = time.perf_counter_ns() + _SURELY_BUSY_NS
        return True

    def stop(self, call: Timed, row: Any, began: int, host_ns: int) -> bool:
        """Record an event after the call, which goes to the timeline, and its time on the device to ``row``, once it has happened;
        False if it is not timed."""
        if call.start is None:
            row.captured += 1
            return False
        # PyTorch's own ops cannot begin a capture; what a library of ops does inside is not known.
        if row.foreign and self._capturing():
            self.give_back(call)
            return False
        lane = call.lane
        pool, pending = lane.pool, lane.pending
        end = call.end = pool.pop() if pool else self._event()
        self._record(end, lane.stream)
        call.row, call.began, call.host_ns, call.place, call.shared = row, began, host_ns, None, False
        last = self._last
        if self._begun is not call or last is None or last.lane is not lane:
            call.follows = False  # another call began within this one, or one of another lane came between
        pending.append(call)
        if len(pending) >= lane.harvest_at:
            self.harvest(lane)
        self._last = call
        call.ended = time.perf_counter_ns()
        return True

    def give_back(self, call: Timed) -> None:
        """Put the event of a call that is not to be timed back into the pool."""
        if call.after is not None:
            call.after.shared = False
        elif call.start is not None:
            call.lane.pool.append(call.start)

    def harvest(self, lane: _Lane, until: Timed | None = None) -> None:
        """Read the calls of a lane that have happened, some at once: those up to ``until``, which surely have, or all but the last."""
        with self._lock:
            pending = lane.pending
            left = len(pending) - 1 if until is None else pending.index(until) + 1 if until in pending else 0
            while left > 0:
                block = pending[:min(_BLOCK, left)]
                # Of one stream, the last that has happened answers for all before it.
                if until is None and not all(self._query(call.end) for call in (block if lane.stream is None else block[-1:])):
                    break
                self._read(lane, block)
                del pending[:len(block)]
                left -= len(block)
            lane.harvest_at = max(HARVEST_AT, len(pending) + _BLOCK)

    def _read(self, lane: _Lane, block: list[Timed]) -> None:
        lengths = self._lengths([(call.start, call.end) for call in block])
        at: int | None = None
        for call, ms in zip(block, lengths):
            row, length = call.row, int(ms * 1e6)
            row.device_ns += length
            row.device_calls += 1
            if at is None or not call.follows:
                origin, then = self._origins[lane.device]
                at = then + int(self._lengths([(origin, call.start)])[0] * 1e6)
            if call.place is None:
                self._timeline.add(row.number, call.began, call.host_ns, lane.thread, at, length)
            else:
                self._timeline.on_device(call.place, at, length)
            at += length
            call.after = None
            lane.pool.append(call.start)
            # Tested in this order: once there is a later call, it is settled whether that began with this one's end.
            if call is not lane.pending[-1] and not call.shared:
                lane.pool.append(call.end)

    def finish(self) -> bool:
        """Wait for the device and read everything; False, with nothing read, while a graph is being captured."""
        with self._lock:
            until = [(lane, lane.pending[-1]) for lane in self._lanes.values() if lane.pending]
        if not until:
            return True
        if self._capturing():
            self._place_pending()
            return False
        for device in {lane.device for lane, _ in until}:
            self._module.synchronize(device)
        for lane, call in until:
            self.harvest(lane, call)
        self._last = None  # whose end may have been read and is in no pool
        if self.gap_ns is None:
            self.gap_ns = self._gap()
        return True

    def _place_pending(self) -> None:
        """Put the calls on the timeline that cannot be read yet."""
        with self._lock:
            for lane in self._lanes.values():
                for call in lane.pending:
                    if call.place is None:
                        call.place = self._timeline.add(call.row.number, call.began, call.host_ns, lane.thread)

    def _gap(self) -> int:
        """What a pair of events adds to the kernel between them, in ns: what it takes around a kernel that does nothing,
        but for that kernel's own time. The device has other work to do first, so that nothing waits for the host."""
        if self._keep_busy is None:
            return 0
        device = self._device()
        lane = self._lane(device, self._stream(device))
        pairs = [(self._event(), self._event()) for _ in range(_PAIRS)]
        self._keep_busy(_AHEAD_CYCLES)
        for start, end in pairs:
            self._record(start, lane.stream)
            self._keep_busy(0)
            self._record(end, lane.stream)
        self._module.synchronize(device)
        with self._lock:
            length = sorted(self._lengths(pairs))[_PAIRS // 2]
        lane.pool.extend(event for pair in pairs for event in pair)
        return max(0, int(length * 1e6) - _EMPTY_NS)
