"""One compact entry per call, for traces and for the order of things: 48 bytes each, and no more than a fixed number."""

from __future__ import annotations

import threading
from array import array
from typing import NamedTuple

MAX_CALLS = 1_000_000
"""Calls kept; later ones count in the tables and are missing from the timeline."""


class Entry(NamedTuple):
    """One call. Times are ns of ``time.perf_counter_ns``; ``device_ns`` is 0 where the device was not timed."""

    row: int
    start: int
    host_ns: int
    thread: int
    device_start: int
    device_ns: int


class Timeline:
    """Row, start, length and thread of each call, as columns."""

    def __init__(self, limit: int = MAX_CALLS) -> None:
        self._columns = tuple(array("q") for _ in Entry._fields)
        self._limit = limit
        self._lock = threading.Lock()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, row: int, start: int, host_ns: int, thread: int) -> int:
        """Append a call; its index, or -1 if the timeline is full."""
        rows, starts, lengths, threads, device_starts, device_lengths = self._columns
        with self._lock:
            index = len(rows)
            if index >= self._limit:
                self.dropped += 1
                return -1
            rows.append(row)
            starts.append(start)
            lengths.append(host_ns)
            threads.append(thread)
            device_starts.append(0)
            device_lengths.append(0)
        return index

    def on_device(self, index: int, start: int, ns: int) -> None:
        """Say when call number ``index`` ran on the device."""
        if index >= 0:
            self._columns[4][index], self._columns[5][index] = start, ns

    def entries(self, count: int | None = None) -> list[Entry]:
        """The calls (the first ``count`` to have ended) in order of their start."""
        with self._lock:
            columns = [column[:count] for column in self._columns]
        return sorted(map(Entry, *columns), key=lambda entry: (entry.start, -entry.host_ns))
