"""How things are timed: device time by events with the L2 cache flushed, host time without waiting for the device.

Device time: for each run a buffer larger than the L2 cache is written, then the call is made between two events. What was
written has to leave the cache while the call runs, as what an earlier kernel of a program wrote has to; ``clean=True``
reads the buffer afterwards, so that a call is charged with its own traffic only. The queue is kept filled (by a sleep on
the device, where the host needs longer than the device), so that no host time is seen. Providers take turns in rounds, so
that a drift of clocks meets them all. Reported are the median and the distance from the 20th to the 80th percentile.

Host time: the wall time of many calls in a row without waiting for the device, by call; the median of several rounds.

On a machine without a GPU "device time" is wall time, for checking that things run and not for speed.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from gemsmode.choice import no_collection

Context = Callable[[], AbstractContextManager[Any]]
"""What a provider puts around calls: entering the mode, or nothing."""


@dataclass(frozen=True)
class Times:
    """Of many runs the median, the 20th and the 80th percentile, in microseconds."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, microseconds: list[float]) -> Times:
        ordered = sorted(microseconds)
        n = len(ordered)
        return cls(statistics.median(ordered), ordered[(n - 1) // 5], ordered[n - 1 - (n - 1) // 5], n)

    @property
    def spread(self) -> float:
        """The distance from the 20th to the 80th percentile as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Runnable:
    """A call to be timed, and what to enter around it."""

    call: Callable[[], Any]
    around: Context = contextlib.nullcontext


class Stopwatch:
    """Times calls on one device.

    Args:
        device: a GPU, or the CPU, where wall time is taken.
        seconds: roughly how long the runs of one provider may take for one case.
        clean: leave nothing in the cache that is still to be written to memory.
    """

    def __init__(self, device: torch.device, seconds: float = 0.1, clean: bool = False) -> None:
        self.device, self.seconds, self.clean = device, seconds, clean
        self.on_gpu = device.type != "cpu"
        self._module: Any = getattr(torch, device.type)
        if self.on_gpu:
            properties = self._module.get_device_properties(device)
            l2 = getattr(properties, "L2_cache_size", 0) or 64 << 20
            self._flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.uint8, device=device)
            self._flush_us = 0.0
            self._flush_us = self._estimate(self.flush)

    def synchronize(self) -> None:
        if self.on_gpu:
            self._module.synchronize(self.device)

    def flush(self) -> None:
        """Write a buffer larger than the L2 cache (and read it, if ``clean``), out of sight of any mode."""
        with torch._C._DisableTorchDispatch():
            self._flush.zero_()
            if self.clean:
                torch.sum(self._flush.view(torch.int64))

    def _estimate(self, call: Callable[[], Any]) -> float:
        """Microseconds that ``call`` takes on the device, roughly."""
        start, end = self._module.Event(enable_timing=True), self._module.Event(enable_timing=True)
        call()
        start.record()
        for _ in range(3):
            call()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) * 1e3 / 3

    def first(self, runnable: Runnable) -> tuple[Any, float]:
        """The result of a first call and the seconds until it was there."""
        self.synchronize()
        start = time.perf_counter()
        with runnable.around():
            result = runnable.call()
        self.synchronize()
        return result, time.perf_counter() - start

    def device_times(self, runnables: Mapping[str, Runnable], rounds: int = 2) -> dict[str, Times]:
        """Device time (wall time on the CPU) of each of ``runnables``, taking turns."""
        seen: dict[str, list[float]] = {name: [] for name in runnables}
        estimates = {}
        for name, runnable in runnables.items():
            with runnable.around():
                if self.on_gpu:
                    start = time.perf_counter()
                    runnable.call()
                    host_us = (time.perf_counter() - start) * 1e6
                    estimates[name] = self._estimate(runnable.call), host_us
                else:
                    start = time.perf_counter()
                    runnable.call()
                    estimates[name] = (time.perf_counter() - start) * 1e6, 0.0
        for _ in range(rounds):
            for name, runnable in runnables.items():
                device_us, host_us = estimates[name]
                each = device_us + (self._flush_us if self.on_gpu else 0.0)
                runs = round(min(max(self.seconds / rounds * 1e6 / max(each, 1.0), 5 if self.on_gpu else 1), 50))
                with runnable.around():
                    seen[name] += self._gpu_round(runnable.call, runs, host_us) if self.on_gpu else self._cpu_round(runnable.call, runs)
        return {name: Times.of(values) for name, values in seen.items()}

    def _cpu_round(self, call: Callable[[], Any], runs: int) -> list[float]:
        values = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            values.append((time.perf_counter() - start) * 1e6)
        return values

    def _gpu_round(self, call: Callable[[], Any], runs: int, host_us: float) -> list[float]:
        starts = [self._module.Event(enable_timing=True) for _ in range(runs)]
        ends = [self._module.Event(enable_timing=True) for _ in range(runs)]
        self.synchronize()
        sleep = getattr(self._module, "_sleep", None)
        if sleep is not None:
            # 2 cycles a nanosecond; the host's lead must last for all runs, or host time would be measured.
            behind_us = max(host_us + 20.0 - self._flush_us, 0.0) * runs
            sleep(int(min(200.0 + behind_us, 50e3) * 2e3))
        for start, end in zip(starts, ends):
            self.flush()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [s.elapsed_time(e) * 1e3 for s, e in zip(starts, ends)]

    def host_times(self, runnables: Mapping[str, Runnable], rounds: int = 11, number: int = 200) -> dict[str, Times]:
        """Host time by call of each of ``runnables``: ``number`` calls in a row, ``rounds`` times, taking turns."""
        seen: dict[str, list[float]] = {name: [] for name in runnables}
        with no_collection():
            for i in range(rounds + 1):
                for name, runnable in runnables.items():
                    call = runnable.call
                    self.synchronize()
                    with runnable.around():
                        start = time.perf_counter()
                        for _ in range(number):
                            call()
                        elapsed = time.perf_counter() - start
                    if i:  # the first round warms up
                        seen[name].append(elapsed * 1e6 / number)
        self.synchronize()
        return {name: Times.of(values) for name, values in seen.items()}

    def wall_times(self, runnables: Mapping[str, Runnable], rounds: int = 5) -> dict[str, Times]:
        """Wall time by call of each of ``runnables``, the device's work included: several calls in a row, taking turns."""
        seen: dict[str, list[float]] = {name: [] for name in runnables}
        number = {}
        for name, runnable in runnables.items():
            _, took = self.first(runnable)
            number[name] = round(min(max(2 * self.seconds / max(took, 1e-6), 1), 50))
        with no_collection():
            for _ in range(rounds):
                for name, runnable in runnables.items():
                    call = runnable.call
                    self.synchronize()
                    with runnable.around():
                        start = time.perf_counter()
                        for _ in range(number[name]):
                            call()
                        self.synchronize()
                        seen[name].append((time.perf_counter() - start) * 1e6 / number[name])
        return {name: Times.of(values) for name, values in seen.items()}

    def kernel_time(self, runnable: Runnable) -> float | None:
        """Microseconds that kernels ran during one call, as PyTorch's profiler has it; None without a GPU."""
        if not self.on_gpu:
            return None
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
                with runnable.around():
                    runnable.call()
                self.synchronize()
            return sum(e.self_device_time_total for e in profile.key_averages()) or None
        except RuntimeError:  # another profiler is at work, or CUPTI is not to be had
            return None

    def each(self, calls: list[Callable[[], Any]]) -> list[float]:
        """Host microseconds of each of ``calls`` alone, in their order."""
        values = []
        with no_collection():
            self.synchronize()
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                values.append((time.perf_counter() - start) * 1e6)
                if i % 64 == 63:
                    self.synchronize()  # before the queue is full and calls have to wait
        self.synchronize()
        return values

    def peak_memory(self, runnable: Runnable) -> int | None:
        """Bytes allocated at most during a call beyond those before it; None on the CPU."""
        if not self.on_gpu:
            return None
        self._module.reset_peak_memory_stats(self.device)
        before = self._module.memory_allocated(self.device)
        with runnable.around():
            runnable.call()
        self.synchronize()
        return int(self._module.max_memory_allocated(self.device) - before)

    def release(self) -> None:
        """Hand cached device memory back."""
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:
            dynamo.reset()  # compiled code holds the tensors that it closes over
        gc.collect()
        if self.on_gpu:
            self._module.empty_cache()

    def copy_bandwidth(self, size: int = 1 << 30) -> float:
        """Bytes a second that a copy on the device moves, reading and writing."""
        if not self.on_gpu:
            size = 1 << 22
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = self.device_times({"copy": Runnable(lambda: target.copy_(source))})["copy"]
        return 2 * size / (times.median * 1e-6)

    def matmul_peak(self, dtype: torch.dtype, size: int = 8192) -> float:
        """Operations a second of the library's square matrix product of random matrices."""
        if not self.on_gpu:
            size = 128
        elif dtype in (torch.float32, torch.float64):
            size //= 2
        a = torch.randn(size, size, device=self.device).to(dtype)
        b = torch.randn(size, size, device=self.device).to(dtype)
        times = self.device_times({"mm": Runnable(lambda: torch.mm(a, b))})["mm"]
        return 2 * size**3 / (times.median * 1e-6)
