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

_AT_ONCE = 2.8
"""A call that begins so many times as late after the one before it as recording an end takes (the least of a block), or sooner,
has the end of that one as its start. On hosts of an H200, as fast or slow as they were, it took 2.2 times as long to come from
one call to the next (2.5 times in one of ten), and 3.4 times or longer to launch something between that the mode does not
see, such as another library's kernel, whose time would be counted with the call's."""

_AT_ONCE_NS = 7_000
"""How soon that is until it has been measured."""

_AT_ONCE_MOST_NS = 12_000
"""How soon it is at most."""


_Pending = tuple[Any, Any, bool, Any, int, int, int]
"""A call whose events have been recorded and not been read yet: its start and end, whether the device went to it from the call
before, of this lane, without a pause, its row, when it began (ns of ``time.perf_counter_ns``), its host time in ns, and how
long recording its end took, in ns."""


class _Events(NamedTuple):
    """What is done with a device's events.

    ``make`` makes one of a device; ``record`` puts one on a stream, or gives something true, when ``record_else`` must put it on
    its device's current stream; ``lengths`` gives the milliseconds from start to end of each call.
    """

    make: Callable[[int], Any]
    record: Callable[[Any, int | None], Any]
    record_else: Callable[[Any, int], None]
    query: Callable[[Any], bool]
    lengths: Callable[[Sequence[Sequence[Any]]], list[float]]


class _Runtime(NamedTuple):
    """The functions of a device's runtime that every call needs, with nothing around them that need not be.

    ``stream`` gives the number of a device's current stream, None where streams are not told apart.
    """

    device: Callable[[], int]
    stream: Callable[[int], int | None]
    capturing: Callable[[], bool]
    events: _Events


def _runtime(module: Any) -> _Runtime:
    """The runtime behind ``torch.cuda`` or ``torch.xpu``."""
    if module is not torch.cuda or not torch.cuda.is_available():
        capturing = getattr(module, "is_current_stream_capturing", lambda: False)
        return _Runtime(module.current_device, lambda device: None, capturing, _events(module))
    # The public functions ask each time whether CUDA has been initialized.
    ask = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream, torch._C._cuda_isCurrentStreamCapturing
    try:
        # Recording waits while a stream's queue is full, and must let other threads run meanwhile; reading does not wait.
        record, elapsed = ctypes.CDLL("libcuda.so.1").cuEventRecord, ctypes.PyDLL("libcuda.so.1").cuEventElapsedTime
    except (OSError, AttributeError):
        return _Runtime(*ask, _events(module))
    return _Runtime(*ask, _events_by_driver(module, record, elapsed))


def _events(module: Any) -> _Events:
    """Events as PyTorch knows them."""
    return _Events(lambda device: module.Event(enable_timing=True), lambda event, stream: True,
                   lambda event, device: event.record(module.current_stream(device)), lambda event: event.query(),
                   lambda calls: [call[0].elapsed_time(call[1]) for call in calls])


def _events_by_driver(module: Any, record: Any, elapsed: Any) -> _Events:
    """Events as CUDA's driver knows them, which are numbers.

    ``torch.cuda.Event`` takes 1.2 times as long to record and to read one: it asks for the current stream and device, and
    whether both events have happened. The events are PyTorch's all the same, which does it where the driver refuses: a
    default stream is always that of the current device.
    """
    record.argtypes, elapsed.argtypes = (ctypes.c_void_p,) * 2, (ctypes.c_void_p,) * 3
    events: dict[int, Any] = {}
    value = ctypes.c_float()
    place = ctypes.addressof(value)

    def make(device: int) -> int:
        made = module.Event(enable_timing=True)
        made.record(module.current_stream(device))  # an event has no number before, nor a new thread a context
        number: int = made.cuda_event
        events[number] = made
        return number

    def lengths(calls: Sequence[Sequence[Any]]) -> list[float]:
        return [events[call[0]].elapsed_time(events[call[1]]) if elapsed(place, call[0], call[1]) else value.value for call in calls]

    return _Events(make, record, lambda event, device: events[event].record(module.current_stream(device)),
                   lambda event: events[event].query(), lengths)


class OfThread:
    """What a clock keeps of a thread: the lane of its last call."""

    __slots__ = ("lane",)

    def __init__(self) -> None:
        self.lane: _Lane | None = None


class _Lane:
    """The calls of one thread on one stream.

    Attributes:
        number: the current stream, as :class:`_Runtime` gives it; None where streams are not told apart.
        pool: events that can be used again.
        pending, read: calls that have not been read yet, oldest first; how many have.
        placed: the indices on the timeline of the first of them, of those that are there already.
        ahead: starts of the last few calls on the device, of every lane.
        busy_until: until when the stream surely has work, in ns of ``time.perf_counter_ns``.
        harvest_at: how many calls are pending when those that have happened are read next.
        begun: the call that began last.
        end, ended_at: the end of the one that ended last, and when it had been recorded.
        at_once: how soon after the end of a call another begins "at once", in ns.
        unclear: the end of the call that was read last: it goes back into the pool unless the next call begins with it.
    """

    __slots__ = ("ahead", "at_once", "begun", "busy_until", "device", "end", "ended_at", "harvest_at", "number", "pending", "placed",
                 "pool", "read", "thread", "unclear")

    def __init__(self, device: int, number: int | None = None, ahead: deque[Any] | None = None) -> None:
        self.device, self.number, self.thread = device, number, threading.get_ident()
        self.ahead: deque[Any] = deque() if ahead is None else ahead
        self.pool: list[Any] = []
        self.pending: list[_Pending] = []
        self.placed: list[int] = []
        self.busy_until, self.read, self.harvest_at, self.at_once = 0, 0, HARVEST_AT, _AT_ONCE_NS
        self.begun: Begun | None = None
        self.end, self.ended_at, self.unclear = None, 0, None


Begun = tuple[_Lane, Any, bool, bool]
"""A call under way: its lane; its start, None while a graph is being captured, when nothing is timed; whether that is the end of
the call before; and whether the device went from that call, of this lane, to this one without a pause."""


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

    A call in which others of its thread begin is not timed, since they are.

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
        self._device, self._stream, self._capturing, events = _runtime(module)
        self._event, self._record, self._record_else, self._query, self._lengths = events
        self._keep_busy: Callable[[int], None] | None = getattr(module, "_sleep", None)
        self.kept_busy = 0
        self.gap_ns: int | None = None
        self._lanes: dict[tuple[int, int, int | None], _Lane] = {}
        self._ahead: dict[int, deque[Any]] = {}
        self._origins: dict[int, tuple[Any, int]] = {}
        self._begun: Begun | None = None
        self._ended: Begun | None = None
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

    def start(self, thread: OfThread, device: int | None) -> Begun | None:
        """Record an event before a call on a device, the current one by default; None if none has been used yet."""
        now = time.perf_counter_ns()
        lane = thread.lane  # mostly the one of this call, too
        if lane is None and not self._module.is_initialized():
            return None
        if device is None:
            device = self._device()
        number = self._stream(device)
        # The default stream, which is number 0, cannot be captured.
        if number != 0 and self._capturing():
            return _Lane(device), None, False, False
        if lane is None or lane.number != number or lane.device != device:
            lane = thread.lane = self._lane(device, number)
        pool = lane.pool
        if len(pool) < 2:
            pool += self._event(device), self._event(device)  # not after the start: making one may take the device time
        follows = now < lane.busy_until or not self._nap(lane, now)
        last = self._ended
        # With no other call between, and no time for anything else.
        at_once = follows and last is not None and last is self._begun and last[0] is lane and now - lane.ended_at <= lane.at_once
        if at_once:
            start = lane.end
        else:
            start = pool.pop()
            if self._record(start, number):
                self._record_else(start, device)
        lane.ahead.append(start)
        call = self._begun = lane.begun = lane, start, at_once, follows
        return call

    def _lane(self, device: int, number: int | None) -> _Lane:
        """This thread's lane on the current stream."""
        with self._lock:
            key = threading.get_ident(), device, number
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(device, number, self._ahead.setdefault(device, deque[Any](maxlen=_AHEAD)))
            if device not in self._origins:
                origin = self._event(device)
                self._put(origin, lane)
                self._origins[device] = origin, time.perf_counter_ns()
        return lane

    def _put(self, event: Any, lane: _Lane) -> None:
        """Record an event, where time does not count."""
        if self._record(event, lane.number):
            self._record_else(event, lane.device)

    def _nap(self, lane: _Lane, now: int) -> bool:
        """Give the device something to do if the host is not far enough ahead of it; whether it may have had nothing to do."""
        ahead = lane.ahead
        # The oldest of the last few calls, or, just after the device was kept busy, the newest: a value may have been asked for.
        if self._keep_busy is not None and ahead and not self._query(ahead[0] if len(ahead) == _AHEAD else ahead[-1]):
            if len(ahead) == _AHEAD:
                lane.busy_until = now + _STILL_BUSY_NS
            return False
        if self._keep_busy is not None:
            with self._module.device(lane.device):
                self._keep_busy(_AHEAD_CYCLES)
            self.kept_busy += 1
            ahead.clear()
            lane.busy_until = time.perf_counter_ns() + _SURELY_BUSY_NS
        return True

    def stop(self, call: Begun, row: Any, began: int, host_ns: int) -> bool:
        """Record an event after the call, which goes to the timeline, and its time on the device to ``row``, once it has happened;
        False if it is not timed."""
        lane, start, at_once, follows = call
        if start is None:
            row.captured += 1
            return False
        # PyTorch's own ops cannot begin a capture; what a library of ops does inside is not known.
        if lane.begun is not call or (row.foreign and self._capturing()):
            if not at_once:
                lane.pool.append(start)
            return False
        pending = lane.pending
        end = lane.pool.pop()
        if self._record(end, lane.number):
            self._record_else(end, lane.device)
        last = self._ended
        if self._begun is not call or last is None or last[0] is not lane:
            follows = False  # a call of another lane came between
        now = lane.ended_at = time.perf_counter_ns()
        pending.append((start, end, follows, row, began, host_ns, now - began - host_ns))
        lane.end = end
        self._ended = call
        if len(pending) >= lane.harvest_at:
            self.harvest(lane)
            lane.ended_at = time.perf_counter_ns()
        return True

    def harvest(self, lane: _Lane, until: int | None = None) -> None:
        """Read the calls of a lane that have happened, some at once: the first ``until`` of all there were, which surely have."""
        with self._lock:
            pending = lane.pending
            left = len(pending) if until is None else until - lane.read
            while left > 0:
                block = pending[:min(_BLOCK, left)]
                # Of one stream, the last that has happened answers for all before it.
                if until is None and not all(self._query(call[1]) for call in (block if lane.number is None else block[-1:])):
                    break
                self._read(lane, block)
                del pending[:len(block)]
                lane.read += len(block)
                left -= len(block)
            lane.harvest_at = max(HARVEST_AT, len(pending) + _BLOCK)

    def _read(self, lane: _Lane, block: list[_Pending]) -> None:
        pool, placed = lane.pool, lane.placed[:len(block)]
        del lane.placed[:len(block)]
        at: int | None = None
        new: list[int] = []
        for (start, end, follows, row, began, host_ns, _), ms in zip(block, self._lengths(block)):
            length = int(ms * 1e6)
            row.device_ns += length
            row.device_calls += 1
            if at is None or not follows:
                origin, then = self._origins[lane.device]
                at = then + int(self._lengths([(origin, start)])[0] * 1e6)
            if placed:
                self._timeline.on_device(placed.pop(0), at, length)
            else:
                new += row.number, began, host_ns, lane.thread, at, length
            at += length
            if lane.unclear is not None and lane.unclear != start:
                pool.append(lane.unclear)
            pool.append(start)
            lane.unclear = end
        self._timeline.extend(new)
        lane.at_once = min(int(_AT_ONCE * min([call[-1] for call in block])), _AT_ONCE_MOST_NS)

    def finish(self) -> bool:
        """Wait for the device and read everything; False, with nothing read, while a graph is being captured."""
        with self._lock:
            until = [(lane, lane.read + len(lane.pending)) for lane in self._lanes.values() if lane.pending]
        if not until:
            return True
        if self._capturing():
            self._place_pending()
            return False
        for device in {lane.device for lane, _ in until}:
            self._module.synchronize(device)
        for lane, calls in until:
            self.harvest(lane, calls)
        if self.gap_ns is None:
            self.gap_ns = self._gap()
        return True

    def _place_pending(self) -> None:
        """Put the calls on the timeline that cannot be read yet."""
        with self._lock:
            for lane in self._lanes.values():
                for _, _, _, row, began, host_ns, _ in lane.pending[len(lane.placed):]:
                    lane.placed.append(self._timeline.add(row.number, began, host_ns, lane.thread))

    def _gap(self) -> int:
        """What a pair of events adds to the kernel between them, in ns: what it takes around a kernel that does nothing,
        but for that kernel's own time. The device has other work to do first, so that nothing waits for the host."""
        if self._keep_busy is None:
            return 0
        device = self._device()
        lane = self._lane(device, self._stream(device))
        pairs = [(self._event(device), self._event(device)) for _ in range(_PAIRS)]
        self._keep_busy(_AHEAD_CYCLES)
        for start, end in pairs:
            self._put(start, lane)
            self._keep_busy(0)
            self._put(end, lane)
        self._module.synchronize(device)
        with self._lock:
            length = sorted(self._lengths(pairs))[_PAIRS // 2]
        lane.pool.extend(event for pair in pairs for event in pair)
        return max(0, int(length * 1e6) - _EMPTY_NS)
