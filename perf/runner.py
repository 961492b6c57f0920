"""Running cases: inputs, providers, checks, and the rows that are kept after each case.

Eager and gemsmode always run in one process on the same inputs, in turns. A case that fails gives a row with its error.
A failure that leaves the device unusable ends the process's use of it: :class:`DeviceLost` is raised once the row is
kept, and ``python -m perf`` goes on in a fresh process with the cases that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import gemsmode
from gemsmode import launch
from gemsmode.handlers import Decision
from gemsmode.registry import short_name
from gemsmode.target import current
from gemsmode.tracing.report import APART
from perf import models, start
from perf.cases import DTYPES, GROWING, Case, llama_parameters, shrunk
from perf.measure import Context, Runnable, Stopwatch, Times

OF_MODELS = ("patch", "patch+fastest", "capture", "fastest+capture", "patch+capture", "patch+fastest+capture")
"""Providers that run whole models only."""

PROVIDERS = ("eager", "gemsmode", "fastest", "fuse", *OF_MODELS, "compile", "flag_gems", "liger_kernel")
"""Who may run a case; ``fastest`` is ``GemsMode(prefer="fastest")`` and ``fuse`` is ``GemsMode(fuse=True)``; of whole models ``patch``
is ``gemsmode.patch`` under the mode and ``capture`` is ``gemsmode.capture``; ``compile`` is ``torch.compile``."""

Row = dict[str, Any]


class DeviceLost(Exception):
    """The device takes no more calls; a fresh process has to go on."""


class CaseTimeout(Exception):
    """One case took longer than its limit."""


# -- where it runs -----------------------------------------------------------------------------------------------------


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


_environment: dict[str, Any] = {}


def default_device() -> torch.device:
    """The device on which gemsmode runs in this process: the GPU, or the CPU for Triton's interpreter."""
    return torch.device(current().device_type)


def environment(commit: str | None = None) -> dict[str, Any]:
    """What a row has to say about the machine and the versions; found once, ``commit`` overrides what git says."""
    if not _environment:
        _environment.update(_look_around(commit))
    return _environment


def _look_around(commit: str | None) -> dict[str, Any]:
    on_gpu = default_device().type == "cuda"
    if commit is None:
        commit = _output_of("git", "rev-parse", "--short=12", "HEAD")
        if commit and _output_of("git", "status", "--porcelain", "--untracked-files=no"):
            commit += "+changes"
    drivers = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines() if on_gpu else []
    found = {
        "gpu": torch.cuda.get_device_name() if on_gpu else None, "driver": drivers[0] if drivers else None,
        "torch": torch.__version__, "triton": triton.__version__, "gemsmode": gemsmode.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip, "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    for package in ("flag_gems", "liger_kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# -- what a mode did with a case ---------------------------------------------------------------------------------------


class _Onlooker(TorchDispatchMode):
    """Sees each aten call, asks what a ``GemsMode`` decides for it, and lets PyTorch run it."""

    def __init__(self, mode: gemsmode.GemsMode | None) -> None:
        super().__init__()
        self.policy = (gemsmode.GemsMode() if mode is None else mode).policy
        self.calls: list[tuple[Any, Decision, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = self.policy.handler(func)
        in_order = (*args, *kwargs.values()) if handler.functions is None else handler.functions.bind(*args, **kwargs)
        self.calls.append((func, handler.lookup(in_order).decision, in_order))
        return func(*args, **kwargs)


def decisions(call: Callable[[], Any], mode: gemsmode.GemsMode | None = None) -> list[tuple[Any, Decision, tuple[Any, ...]]]:
    """Each aten call that ``call`` makes, with what ``mode`` (a ``GemsMode()``) decides for it and the arguments in order."""
    with _Onlooker(mode) as seen:
        call()
    return seen.calls


def summary(calls: Sequence[tuple[Any, Decision, tuple[Any, ...]]]) -> list[Row]:
    """The decisions over ``calls`` that compute on the device, equal ones counted together."""
    rows: dict[tuple[str, str, str | None, str | None], int] = {}
    for op, decision, _ in calls:
        if decision.kind not in APART:
            key = short_name(op), decision.kind, decision.rule, decision.reason
            rows[key] = rows.get(key, 0) + 1
    return [{"overload": o, "kind": k, "rule": r, "reason": why, "calls": n} for (o, k, r, why), n in rows.items()]


def choices(calls: Sequence[tuple[Any, Decision, tuple[Any, ...]]]) -> list[Row]:
    """What ``prefer="fastest"`` chose over ``calls``, each choice once."""
    found: dict[tuple[str, Any], Row] = {}
    for op, decision, _ in calls:
        if (c := decision.choice) is not None:
            found[short_name(op), c] = {"overload": short_name(op), "taken": "rule" if c.rule_wins else "native", "rule_us": list(c.rule),
                                        "native_us": list(c.native), "reason": c.reason}
    return list(found.values())


def intercepted(decided: Sequence[Row]) -> str:
    """``yes`` if every compute call of a case ran a rule, ``partly``, ``no``, or ``view`` if there was none."""
    if not decided:
        return "view"
    ruled = [d["kind"] == "rule" for d in decided]
    return "yes" if all(ruled) else "partly" if any(ruled) else "no"


# -- errors ------------------------------------------------------------------------------------------------------------


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors in a result, nested ones too."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for item in result for t in tensors_of(item)]
    return []


def relative_error(result: Any, reference: Any, rows: int = 0) -> float:
    """The largest error over all tensors of ``result``, each by the largest finite magnitude of its reference.

    For integers and bool the share of elements that differ. Equal infinities and NaN in the same places count as equal.
    """
    worst = 0.0
    pairs = list(zip(tensors_of(result), tensors_of(reference), strict=True))
    for got, want in pairs:
        got = got[:rows] if rows else got
        if not want.numel():
            continue
        if not want.dtype.is_floating_point or not got.dtype.is_floating_point:
            worst = max(worst, (got != want).double().mean().item())
            continue
        got, want = got.detach().double(), want.detach().double()
        difference = (got - want).abs()
        difference[(got == want) | (got.isnan() & want.isnan())] = 0
        scale = want.abs().nan_to_num(nan=0.0, posinf=0.0).max().item() or 1.0
        error = difference.max().item() / scale
        worst = error if error != error else max(worst, error)
        if worst != worst:
            break
    return worst


# -- a case made ready -------------------------------------------------------------------------------------------------


class Prepared:
    """A case's inputs on the device, and its calls."""

    def __init__(self, case: Case, device: torch.device, sizes: Mapping[str, int]) -> None:
        self.case, self.device, self.sizes = case, device, dict(sizes)
        self.dtype = DTYPES[case.dtype]
        self.inputs = self._inputs()
        self._scope = self._scope_of(self.inputs, self.dtype)
        self.call = self._compiled(case.call, self._scope)

    def _inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.case.name.encode()))
        return {name: t.make(self.sizes, self.dtype, self.device, generator) for name, t in self.case.inputs.items()}

    def _scope_of(self, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
        scope = {"torch": torch, "F": F, "dtype": dtype, "low": self.dtype, "device": self.device, "models": models,
                 "llama_parameters": llama_parameters, **self.sizes, **inputs}
        for name, text in self.case.setup.items():
            with torch.enable_grad():
                scope[name] = eval(text, scope)
        return scope

    @staticmethod
    def _compiled(text: str, scope: dict[str, Any]) -> Callable[[], Any]:
        return eval(f"lambda: {text}", scope)

    @property
    def model(self) -> Any:
        """What the case's set-up calls ``model``."""
        return self._scope["model"]

    def liger(self) -> Callable[[], Any] | None:
        """The case's call in Liger's functional API; None where it has none."""
        if not self.case.liger:
            return None
        import liger_kernel.transformers.functional as liger

        return self._compiled(self.case.liger, {**self._scope, "liger": liger})

    def fresh(self) -> Callable[[], Any]:
        """The call on new inputs of the same values, for calls that write to them."""
        return self._compiled(self.case.call, self._scope_of(self._inputs(), self.dtype))

    def reference(self) -> Any:
        """The result of the case's call, natively, on the same values in float64 (or as they are, for ``check="equal"``)."""
        exact = self.case.check == "float64"
        inputs = {}
        for name, tensor in self._inputs().items():
            value = tensor.detach()
            value = value[:self.case.rows] if self.case.rows else value
            value = value.double() if exact and value.dtype.is_floating_point else value
            inputs[name] = value.requires_grad_() if tensor.requires_grad else value
        return self._compiled(self.case.call, self._scope_of(inputs, torch.float64 if exact else self.dtype))()

    def count(self, text: str, result: Any) -> int | None:
        """The number that ``text`` (a case's ``bytes`` or ``flops``) means for these sizes; None for an empty text."""
        if not text:
            return None
        known: dict[str, Any] = {**self.sizes, "size": self.dtype.itemsize,
                                 "out": sum(t.numel() * t.element_size() for t in tensors_of(result))}
        known.update({name: t.numel() * t.element_size() for name, t in self.inputs.items()})
        return int(eval(text, {"__builtins__": {}}, known))


# -- the runner --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """How a run is made; the options of the command line.

    Attributes:
        providers: who runs each case; eager and gemsmode belong to every ratio.
        seconds: device time spent on each provider of a case, roughly.
        case_limit: seconds after which a case is given up.
        budget: seconds after which no further case is begun; None for no limit.
        tiny: shrink sizes, as a machine without a GPU needs it.
        check: compute errors.
        growing: how many growing sizes are tried.
        clean: leave nothing in the L2 cache that is still to be written to memory when a run begins.
    """

    providers: tuple[str, ...] = ("eager", "gemsmode")
    seconds: float = 0.1
    case_limit: float = 90.0
    budget: float | None = None
    tiny: bool = False
    check: bool = True
    growing: int = len(GROWING)
    clean: bool = False


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise CaseTimeout(f"gave up after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _limits(case: Case, row: Row) -> list[Row]:
    """The figures that the case limits, where they were measured."""
    found = []
    for name, limit in case.at_most.items():
        provider, _, figure = name.partition(".")
        value = row["providers"].get(provider, {}).get(figure)
        if value is not None:
            found.append({"figure": name, "limit": limit, "value": value, "kept": value <= limit})
    return found


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _patched(model: torch.nn.Module, around: Context) -> Iterator[Any]:
    """``model`` is patched meanwhile."""
    gemsmode.patch(model)
    try:
        with around() as entered:
            yield entered
    finally:
        gemsmode.unpatch(model)


def _written(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` with its result written while it is held: what nobody holds any more is not computed with ``fuse=True``."""
    from gemsmode.fuse import flush_all

    def run() -> Any:
        result = call()
        flush_all()
        return result

    return run


class Runner:
    """Runs cases on one device and gives their rows."""

    def __init__(self, settings: Settings, device: torch.device | None = None) -> None:
        self.settings = settings
        self.device = device or default_device()
        self.watch = Stopwatch(self.device, settings.seconds, settings.clean)
        self._peaks: dict[str, float] = {}
        self._around: dict[str, Context] = {}
        self.unavailable: dict[str, str] = {}
        for name in settings.providers:
            try:
                self._around[name] = self._provider(name)
            except Exception as error:
                self.unavailable[name] = _describe(error)

    def _provider(self, name: str) -> Context:
        if name in ("eager", "compile"):
            return contextlib.nullcontext
        if name in OF_MODELS:
            if "capture" in name.split("+") and self.device.type != "cuda":
                raise RuntimeError("no GPU to capture graphs on")
            return contextlib.nullcontext
        if name == "gemsmode":
            mode = gemsmode.GemsMode()
            return lambda: mode
        if name == "fastest":
            fastest = gemsmode.GemsMode(prefer="fastest")
            return lambda: fastest
        if name == "fuse":
            fusing = gemsmode.GemsMode(fuse=True)
            return lambda: fusing
        if name == "flag_gems":
            import flag_gems

            return flag_gems.use_gems
        if name == "liger_kernel":
            if importlib.util.find_spec("liger_kernel") is None:
                raise ModuleNotFoundError("liger_kernel is not installed")
            return contextlib.nullcontext
        raise ValueError(f"no provider {name!r}; there are {', '.join(PROVIDERS)}")

    # -- peaks ---------------------------------------------------------------------------------------------------------

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy on the device, measured once."""
        if "copy" not in self._peaks:
            self._peaks["copy"] = self.watch.copy_bandwidth()
            self.watch.release()
        return self._peaks["copy"]

    def peak(self, dtype: str) -> float:
        """Operations a second of the library's largest matrix product in ``dtype``, measured once."""
        if dtype not in self._peaks:
            self._peaks[dtype] = self.watch.matmul_peak(DTYPES[dtype])
            self.watch.release()
        return self._peaks[dtype]

    @property
    def peaks(self) -> dict[str, float]:
        """The peaks measured so far: ``copy`` in bytes a second, dtypes in operations a second."""
        return dict(self._peaks)

    # -- one case ------------------------------------------------------------------------------------------------------

    def run(self, case: Case) -> Row:
        """The row of ``case``.

        Raises:
            DeviceLost: the device takes no more calls; the row is the exception's argument.
        """
        row: Row = {"case": case.name, "label": case.label, "op": case.op, "group": case.group, "dtype": case.dtype, "call": case.call,
                    "sizes": dict(case.sizes),
                    "inputs": {name: f"{t.dims}{' transposed' if t.layout else ''}" for name, t in case.inputs.items()},
                    "origin": case.origin, "goal": case.goal, "bytes_counted": case.bytes, "flops_counted": case.flops,
                    "scaled_down": self.settings.tiny, "clean_cache": self.settings.clean, "device": str(self.device), "error": None,
                    "skipped": None, "providers": {}}
        row.update({k: v for k, v in environment().items() if k in ("gpu", "torch", "triton", "driver", "gemsmode", "commit")})
        row["at"] = time.time()
        start = time.perf_counter()
        if why := self._left_out(case):
            row["skipped"], row["seconds"] = why, 0.0
            return row
        try:
            # A model is built, and perhaps compiled, several times over.
            with _limit(self.settings.case_limit * (4 if case.group == "model" else 1)):
                self._fill(case, row)
        except Exception as error:
            row["error"] = _describe(error)
        row["seconds"] = round(time.perf_counter() - start, 3)
        try:
            self.watch.release()
            self.watch.synchronize()
        except Exception as error:
            row["error"] = row["error"] or _describe(error)
            raise DeviceLost(row) from error
        return row

    def once(self, case: Case, provider: str) -> list[str]:
        """Call ``case`` twice, the second time between the markers of a profiler; what was decided for its ops.

        Raises:
            RuntimeError: the provider or the case cannot be had here.
        """
        if why := self.unavailable.get(provider) or self._left_out(case):
            raise RuntimeError(why)
        if case.group in ("growing", "start"):
            raise RuntimeError(f"cases of group {case.group} are many calls")
        prepared = Prepared(case, self.device, shrunk(case) if self.settings.tiny else case.sizes)
        with torch.no_grad():
            runnable = self._runnable(provider, prepared)
            self.watch.first(runnable)
            mark = self.device.type == "cuda"
            if mark:
                torch.cuda.nvtx.range_push(f"{case.name} by {provider}")
                torch.cuda.profiler.start()
            self.watch.first(runnable)
            if mark:
                torch.cuda.profiler.stop()
                torch.cuda.nvtx.range_pop()
            if provider not in ("gemsmode", "fastest"):
                return []
            decided = decisions(prepared.call, self._around[provider]())  # type: ignore[arg-type]
        return [f"{short_name(op)}: {d.kind} {d.rule or d.reason or ''}".strip() for op, d, _ in decided if d.kind not in APART]

    def _left_out(self, case: Case) -> str:
        """Why ``case`` cannot be run on this machine; empty if it can."""
        missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed"
        if case.memory and self.device.type == "cuda" and not self.settings.tiny:
            self.watch.release()
            free = torch.cuda.mem_get_info(self.device)[0] / 2**30
            if free < case.memory:
                return f"needs {case.memory:.0f} GiB of device memory, {free:.0f} are free"
        return ""

    def _fill(self, case: Case, row: Row) -> None:
        sizes = shrunk(case) if self.settings.tiny else dict(case.sizes)
        row["measured_sizes"] = sizes
        if case.group == "growing":
            self._growing(case, row)
            return
        if case.group == "start":
            row["providers"]["gemsmode"] = start.measure(self.device)
            row["intercepted"] = "yes"
            row["at_most"] = _limits(case, row)
            return
        prepared = Prepared(case, self.device, sizes)
        runnables: dict[str, Runnable] = {}
        result = None
        with torch.no_grad():
            for name in self.settings.providers:
                entry: Row = {}
                row["providers"][name] = entry
                try:
                    if name in self.unavailable:
                        raise RuntimeError(self.unavailable[name])
                    runnable = self._runnable(name, prepared)
                    result, entry["first_s"] = self.watch.first(runnable)
                    runnables[name] = runnable
                except CaseTimeout:
                    raise
                except Exception as error:
                    entry["error"] = _describe(error)
                    self.watch.synchronize()
            if not runnables:
                row["error"] = "no provider ran: " + "; ".join(dict.fromkeys(e["error"] for e in row["providers"].values()))
                return
            row["bytes"], row["flops"] = prepared.count(case.bytes, result), prepared.count(case.flops, result)
            row["touched"] = prepared.count(" + ".join(("out", *case.inputs)), result)
            del result
            if "gemsmode" in runnables:
                row["decisions"] = summary(decisions(prepared.call))
                row["intercepted"] = intercepted(row["decisions"])
            if "fastest" in runnables:
                row["choices"] = choices(decisions(prepared.call, self._around["fastest"]()))  # type: ignore[arg-type]
            # Errors are found before the times are taken, which writes to the inputs of in-place calls.
            if self.settings.check and case.check != "none":
                self._errors(prepared, runnables, row)
            for name, runnable in runnables.items():
                row["providers"][name]["peak_bytes"] = self.watch.peak_memory(runnable)
            if case.group == "tiny":
                times = self.watch.host_times(runnables, *((3, 3) if self.settings.tiny else ()))
                for name, t in times.items():
                    row["providers"][name].update(host_us=t.median, host_low_us=t.low, host_high_us=t.high)
                    if "eager" in times:
                        row["providers"][name]["over_eager_us"] = t.median - times["eager"].median
                self._compare(case, row, times)
                return
            if case.group == "model":
                times = self.watch.wall_times(runnables, 2 if self.settings.tiny else 5)
                for name, t in times.items():
                    row["providers"][name].update(wall_us=t.median, low_us=t.low, high_us=t.high, spread=t.spread, runs=t.runs)
                    row["providers"][name]["kernel_us"] = self.watch.kernel_time(runnables[name])
                self._compare(case, row, times)
                return
            times = self.watch.device_times(runnables)
        for name, t in times.items():
            entry = row["providers"][name]
            entry.update(device_us=t.median, low_us=t.low, high_us=t.high, spread=t.spread, runs=t.runs)
            if row["bytes"]:
                entry["gb_s"] = row["bytes"] / t.median * 1e-3
                entry["of_copy"] = entry["gb_s"] * 1e9 / self.bandwidth
            if row["flops"]:
                entry["tflop_s"] = row["flops"] / t.median * 1e-6
                entry["of_peak"] = entry["tflop_s"] * 1e12 / self.peak(case.dtype)
        self._compare(case, row, times)

    @staticmethod
    def _compare(case: Case, row: Row, times: Mapping[str, Times]) -> None:
        """Put eager's time by each provider's own into the row, and whether limits are kept."""
        if "eager" in times:
            row["ratios"] = {name: times["eager"].median / t.median for name, t in times.items() if name != "eager"}
        row["ratio"] = row.get("ratios", {}).get("gemsmode")
        row["at_most"] = _limits(case, row)

    def _runnable(self, name: str, prepared: Prepared) -> Runnable:
        call = prepared.call
        if name == "compile":
            torch._dynamo.reset()
            call = torch.compile(call, dynamic=False)
        elif name in OF_MODELS:
            if prepared.case.group != "model":
                raise NotImplementedError("only of whole models")
            words = name.split("+")
            prefer = "fastest" if "fastest" in words else None
            around: Context = functools.partial(gemsmode.GemsMode, prefer=prefer)
            if "capture" in words:
                own = getattr(prepared.model, "to_capture", None)
                call, around = gemsmode.capture(own() if own else call, prefer=prefer), contextlib.nullcontext
            return Runnable(call, (lambda: _patched(prepared.model.model, around)) if "patch" in words else around)
        elif name == "liger_kernel":
            own = prepared.liger()
            if own is None:
                raise NotImplementedError("Liger has no counterpart")
            call = own
        elif name == "fuse":
            call = _written(call)
        return Runnable(call, self._around[name])

    def _errors(self, prepared: Prepared, runnables: Mapping[str, Runnable], row: Row) -> None:
        reference = prepared.reference()
        row["check"] = prepared.case.check
        for name, runnable in runnables.items():
            try:
                again = name in ("eager", "gemsmode", "fastest", "fuse") and prepared.case.group != "model"
                fresh = prepared.fresh() if again else runnable.call
                with runnable.around():
                    result = fresh()
                row["providers"][name]["error_vs_reference"] = relative_error(result, reference, prepared.case.rows)
            except CaseTimeout:
                raise
            except Exception as error:
                row["providers"][name]["error"] = _describe(error)

    def _growing(self, case: Case, row: Row) -> None:
        """Host time of calls with new sizes, and of the same calls again."""
        count = min(self.settings.growing, 6 if self.settings.tiny else len(GROWING))
        first = GROWING.start if not self.settings.tiny else 40
        warm = 17  # every class of integers (odd, even, multiple of 16) is met before
        with torch.no_grad():
            prepared = [Prepared(case, self.device, {**case.sizes, "S": first - warm + i}) for i in range(warm + count)]
            calls = [p.call for p in prepared]
            for name in self.settings.providers:
                entry: Row = {}
                row["providers"][name] = entry
                if name in self.unavailable or name not in ("eager", "gemsmode", "fastest"):
                    entry["error"] = self.unavailable.get(name, "host time is measured of eager and gemsmode")
                    continue
                with self._around[name]():
                    for call in calls[:warm] * 2:
                        call()
                    compiled = len(launch._compiled)
                    new = self.watch.each(calls[warm:])
                    entry["compiled"] = len(launch._compiled) - compiled
                    again = [min(a, b) for a, b in zip(self.watch.each(calls[warm:]), self.watch.each(calls[warm:]))]
                extra = Times.of([n - a for n, a in zip(new, again)])
                entry.update(new_us=Times.of(new).median, again_us=Times.of(again).median, extra_us=extra.median,
                             extra_high_us=extra.high, extra_max_us=max(n - a for n, a in zip(new, again)), sizes=count)
                if name == "gemsmode":
                    row["decisions"] = summary(decisions(calls[-1]))
                    row["intercepted"] = intercepted(row["decisions"])


# -- results -----------------------------------------------------------------------------------------------------------


class Results:
    """Rows and what they were measured on, written to a file after each row.

    Args:
        path: where to keep them; None keeps them in memory only.
        resume: take up the rows that the file has already; their cases are done.
        commit: what to call the commit, where git does not tell.
        merge: take up the file's rows, and replace those of the cases that are run.
        since: with ``merge``: rows measured after this time are done, too.

    Attributes:
        done: cases that need not be run.
    """

    def __init__(self, path: Path | None, resume: bool = False, commit: str | None = None, merge: bool = False,
                 since: float | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.peaks: dict[str, float] = {}
        self.environment = environment(commit)
        if (resume or merge) and path is not None and path.exists():
            kept = json.loads(path.read_text())
            self.rows, self.peaks = kept["rows"], kept.get("peaks", {})
        self.done = {r["case"] for r in self.rows if not merge or (since is not None and r.get("at", 0.0) >= since)}

    def add(self, row: Row, peaks: Mapping[str, float]) -> None:
        place = next((i for i, r in enumerate(self.rows) if r["case"] == row["case"]), None)
        if place is None:
            self.rows.append(row)
        else:
            self.rows[place] = row
        self.done.add(row["case"])
        self.peaks.update(peaks)
        self.write()

    def to_dict(self) -> dict[str, Any]:
        return {"environment": self.environment, "peaks": self.peaks, "rows": self.rows}

    def write(self) -> None:
        if self.path is None:
            return
        part = self.path.with_name(self.path.name + f".{os.getpid()}.part")
        part.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(part, self.path)


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one: of each case the row measured last, in the order of the first result that has it."""
    rows: dict[str, Row] = {}
    peaks: dict[str, float] = {}
    for result in results:
        peaks.update(result["peaks"])
        for row in result["rows"]:
            rows[row["case"]] = row
    return {"environment": results[-1]["environment"], "peaks": peaks, "rows": list(rows.values())}


def run_all(cases: Sequence[Case], runner: Runner, results: Results, progress: Callable[[Row], None] = lambda row: None,
            started: float | None = None) -> bool:
    """Run ``cases``, those with a row excepted, and keep each row; False if the budget ended before the cases did.

    Raises:
        DeviceLost: as :meth:`Runner.run`, after the row was kept.
    """
    started = time.time() if started is None else started
    for case in cases:
        if case.name in results.done:
            continue
        if runner.settings.budget is not None and time.time() - started > runner.settings.budget:
            return False
        try:
            row = runner.run(case)
        except DeviceLost as lost:
            results.add(lost.args[0], runner.peaks)
            progress(lost.args[0])
            raise
        results.add(row, runner.peaks)
        progress(row)
        sys.stdout.flush()
    return True
