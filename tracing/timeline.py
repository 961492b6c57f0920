"""One compact entry per call, for traces and for the order of things: 48 bytes each, and no more than a fixed number."""

from __future__ import annotations

import struct
import threading
from itertools import islice
from operator import length_hint
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


_ENTRY = struct.Struct("6q")
_ON_DEVICE = struct.Struct("2q")
_SIZE = _ENTRY.size
_GROWTH = bytes(1024 * _SIZE)


class Timeline:
    """Row, start, length and thread of each call, packed one after the other."""

    def __init__(self, limit: int = MAX_CALLS) -> None:
        self._bytes = bytearray()
        self._limit = limit
        # Gives each index to one thread only, without a lock, which would cost as much as all else here.
        self._indices = iter(range(limit))
        self._lock = threading.Lock()
        self.dropped = 0

    def __len__(self) -> int:
        return self._limit - length_hint(self._indices)

    def add(self, row: int, start: int, host_ns: int, thread: int, device_start: int = 0, device_ns: int = 0) -> int:
        """Append a call; its index, or -1 if the timeline is full."""
        index = next(self._indices, -1)
        place = index * _SIZE
        if not 0 <= place < len(self._bytes):
            if index < 0:
                self._drop(1)
                return -1
            self._reserve(index + 1)
        _ENTRY.pack_into(self._bytes, place, row, start, host_ns, thread, device_start, device_ns)
        return index

    def extend(self, fields: list[int]) -> None:
        """Append calls: the six fields of each, one after the other."""
        count = len(fields) // 6
        indices = list(islice(self._indices, count))  # in one step: no other thread comes between
        if len(indices) < count:
            self._drop(count - len(indices))
            del fields[6 * len(indices):]
        if indices:
            self._reserve(indices[-1] + 1)
            struct.pack_into(f"{len(fields)}q", self._bytes, indices[0] * _SIZE, *fields)

    def _drop(self, count: int) -> None:
        with self._lock:
            self.dropped += count

    def _reserve(self, count: int) -> None:
        """Make room for so many calls."""
        if count * _SIZE > len(self._bytes):
            with self._lock:
                while count * _SIZE > len(self._bytes):
                    self._bytes += _GROWTH

    def on_device(self, index: int, start: int, ns: int) -> None:
        """Say when call number ``index`` ran on the device."""
        if index >= 0:
            _ON_DEVICE.pack_into(self._bytes, (index + 1) * _SIZE - _ON_DEVICE.size, start, ns)

    def typical_host_ns(self, most: int = 10_000) -> float:
        """The mean host time of a call, with none taken for longer than three of four are: first calls compile. 0 without a call.

        Args:
            most: how many calls are looked at.
        """
        count = min(len(self), len(self._bytes) // _SIZE)  # another thread may have an index and not yet the room for it
        lengths = sorted(_ENTRY.unpack_from(self._bytes, i * _SIZE)[2] for i in range(0, count, max(1, -(-count // most))))
        return sum(min(length, lengths[len(lengths) * 3 // 4]) for length in lengths) / len(lengths) if lengths else 0.0

    def entries(self, count: int | None = None) -> list[Entry]:
        """The calls (the first ``count`` to have ended) in order of their start."""
        end = (len(self) if count is None else count) * _SIZE
        # A copy: bytes that somebody looks at cannot grow.
        return sorted(map(Entry._make, _ENTRY.iter_unpack(bytes(self._bytes[:end]))), key=lambda entry: (entry.start, -entry.host_ns))
