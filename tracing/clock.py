"""Device time without waiting: pairs of events from a pool, read when they have happened."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

import torch

from gemsmode.target import Target
from gemsmode.tracing.timeline import Timeline

HARVEST_AT = 4096
"""Pairs of events under way, per thread, before finished ones are read (by a query, which does not wait)."""


class Mark(NamedTuple):
    """The start of one call on a device; ``event`` is None while a graph is being captured, when nothing is timed."""

    event: Any
    device: int


class Pending(NamedTuple):
    """A call whose events have been recorded and not been read yet."""

    mark: Mark
    end: Any
    row: Any
    place: int


class DeviceClock:
    """Measures calls by events on the current stream.

    Nothing here synchronizes except :meth:`finish`. A call takes two events; they come from a pool per device and
    go back to it once read. Under graph capture no event is recorded, queried or waited for. The time between two
    events includes waiting for the host when the device has nothing else to do.

    Args:
        module: ``torch.cuda`` or ``torch.xpu``.
        timeline: told when each call ran.
    """

    def __init__(self, module: Any, timeline: Timeline) -> None:
        self._module, self._timeline = module, timeline
        self._capturing = getattr(module, "is_current_stream_capturing", lambda: False)
        self._pools: dict[int, list[Any]] = {}
        self._origins: dict[int, tuple[Any, int]] = {}
        self._lock = threading.Lock()

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
        module = self._module
        if not module.is_initialized():
            return None
        device = module.current_device()
        if self._capturing():
            return Mark(None, device)
        if device not in self._origins:
            origin = self._event(device)
            origin.record()
            self._origins[device] = origin, time.perf_counter_ns()
        event = self._event(device)
        event.record()
        return Mark(event, device)

    def stop(self, mark: Mark, pending: deque[Pending], row: Any, index: int) -> None:
        """Record an event after the call; its time goes to ``row`` and to place ``index`` of the timeline later."""
        if mark.event is None:
            row.captured += 1
            return
        if self._capturing():  # the call itself began the capture
            self.give_back(mark)
            return
        end = self._event(mark.device)
        end.record()
        pending.append(Pending(mark, end, row, index))
        if len(pending) >= HARVEST_AT:
            self.harvest(pending)

    def give_back(self, mark: Mark) -> None:
        """Put the event of a call that is not to be timed back into the pool."""
        if mark.event is not None:
            self._pools.setdefault(mark.device, []).append(mark.event)

    def harvest(self, pending: deque[Pending], wait: bool = False) -> None:
        """Read the pairs that have happened; all of them if ``wait``, for which the device must be done."""
        with self._lock:
            while pending:
                mark, end, row, index = pending[0]
                if not wait and not end.query():
                    return
                pending.popleft()
                length = int(mark.event.elapsed_time(end) * 1e6)
                row.device_ns += length
                row.device_calls += 1
                if index >= 0:
                    origin, at = self._origins[mark.device]
                    self._timeline.on_device(index, at + int(origin.elapsed_time(mark.event) * 1e6), length)
                self._pools.setdefault(mark.device, []).extend((mark.event, end))

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
        return True
