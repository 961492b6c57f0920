"""``GemsMode(prefer="fastest")``: of a rule and PyTorch's own implementation the one that is faster here, by signature.

**What is compared.** On the first call of a signature that a rule serves, the rule and the native op are each run a few
times, in turns, on that call's own arguments, and two figures are taken of each: *device time*, between two events on
the current stream, with the L2 cache written over before each run and the queue kept filled so that no host time is
seen; and *host time*, until the call returns. A call's cost is ``max(device time, host time)``: host and device work
side by side, and the slower of the two is what a program waits for. What interception itself costs is left out, as it is
the same for both. The rule is taken unless native is more than 1% faster. Small calls, which the host bounds, therefore
go native where the native call costs the host less. On the CPU (Triton's interpreter) both figures are wall time.

**What a program notices.** The first call of a signature takes some milliseconds longer. Calls that write (in-place,
``out=``) are timed on copies, so memory is needed for them, and the peak of allocated memory may rise; if it does not
suffice, the rule runs. Generators are put back, so that the timing draws no random numbers of the program's; which of
the two implementations then draws them is part of the choice.

**When nothing is timed.** During CUDA-graph capture, under a profiler and while memory is being traced
(``torch.cuda.memory._record_memory_history``) a kept choice holds, or the rule runs and the signature is timed later.
With ``torch.use_deterministic_algorithms(True)`` rules run whatever was measured: a choice by time may be another one
in the next process. Once :data:`PER_CLASS` signatures that differ in sizes by less than a fifth (and agree in which are
divisible by 16) were timed, more of them take the choice that was best over those: a growing cache is not timed at
every token.

**Where choices are kept.** One JSON file for each GPU, driver, torch, triton and gemsmode version, in ``$GEMSMODE_CACHE``, or
``$XDG_CACHE_HOME/gemsmode``, or ``~/.cache/gemsmode``. An entry holds while the source of the rule's kernels is what it
was. Files are replaced whole; several processes merge theirs under a lock. A file that cannot be read as JSON is set
aside with a warning. Each process chooses for itself until it has seen what another one wrote, so that the ranks of a
distributed program may run different implementations of an op.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import json
import logging
import math
import os
import platform
import re
import statistics
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import triton
from torch._C._autograd import _profiler_enabled
from torch._ops import OpOverload
from torch.utils._dtype_abbrs import dtype_abbrs

from gemsmode.native import native_in_order
from gemsmode.signature import NUMBERS, Parameter, TensorMeta, describe, parameters
from gemsmode.target import Target, current

if TYPE_CHECKING:
    from gemsmode.handlers import Decided, OpHandler
    from gemsmode.registry import Rule

log = logging.getLogger("gemsmode")

MARGIN = 1.01
"""How many times the native cost the rule's may be before native is taken: less is noise."""

PER_CLASS = 4
"""Signatures of one class of sizes that are timed; later ones take the choice that was best over these."""

MAX_KEPT = 20_000
"""Choices kept in one file; the oldest go first."""

LISTED = 16
"""Items of a list that a signature's text names one by one; of longer lists it has a hash."""

FORMAT = 1


# -- what was measured -------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """What one call costs, in microseconds."""

    device_us: float
    host_us: float

    @property
    def cost(self) -> float:
        """What a program waits for: the slower of device and host."""
        return max(self.device_us, self.host_us)


def _us(value: float) -> str:
    return f"{value:.1f} us" if value < 100 else f"{value:,.0f} us"


def _mean(timings: Sequence[Timing]) -> Timing:
    """The geometric mean."""
    return Timing(*(math.exp(statistics.fmean(math.log(max(v, 1e-3)) for v in column)) for column in zip(*timings)))


class Choice(NamedTuple):
    """A measured decision between a rule and the native op.

    Attributes:
        rule: what the rule costs.
        native: what PyTorch's own implementation costs.
        origin: ``"measured"`` now, ``"kept"`` from before, or ``"similar"``: of calls of nearly these sizes.
        by: what is compared: ``"cost"``, or ``"device"`` time alone.
    """

    rule: Timing
    native: Timing
    origin: str = "measured"
    by: str = "cost"

    @property
    def rule_us(self) -> float:
        """The figure of the rule that is compared."""
        return self.rule.device_us if self.by == "device" else self.rule.cost

    @property
    def native_us(self) -> float:
        """The figure of the native op that is compared."""
        return self.native.device_us if self.by == "device" else self.native.cost

    @property
    def rule_wins(self) -> bool:
        return self.rule_us <= MARGIN * self.native_us

    @property
    def reason(self) -> str:
        """``native is faster: 7.1 us against 9.8 us``; says so where it is host time that decides."""
        names = ("the rule", "native") if self.rule_wins else ("native", "the rule")
        first, second = (self.rule_us, self.native_us) if self.rule_wins else (self.native_us, self.rule_us)
        verdict = f"{names[0]} is faster" if first < second else f"{names[0]} is as fast"
        on_host = self.by == "cost" and all(t.host_us > t.device_us for t in (self.rule, self.native))
        return (f"{verdict}: {_us(first)} against {_us(second)}" + (" of host time" if on_host else "")
                + (", at nearly these sizes" if self.origin == "similar" else ""))


class Timer(Protocol):
    """Measures two calls in one go, so that both meet the same conditions."""

    def compare(self, rule: Callable[[], Any], native: Callable[[], Any], device: int) -> tuple[Timing, Timing]:
        """What ``rule()`` and ``native()`` cost on the device of that number."""
        ...


class WallTimer:
    """Wall time, for the CPU.

    Args:
        now: seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def compare(self, rule: Callable[[], Any], native: Callable[[], Any], device: int) -> tuple[Timing, Timing]:
        best = [math.inf, math.inf]
        for _ in range(3):
            for i, call in ((0, native), (1, rule), (0, native), (0, native)):
                start = self._now()
                call()
                best[i] = min(best[i], (self._now() - start) * 1e6)
            if best[1] > 20 * best[0]:
                break  # the interpreter: once is enough to know
        return Timing(best[1], best[1]), Timing(best[0], best[0])


class DeviceTimer:
    """Events and wall time, for a GPU.

    Args:
        module: ``torch.cuda`` or ``torch.xpu``.
        now: seconds.
    """

    ROUNDS, LEAST_ROUNDS = 9, 3
    ENOUGH_US = 30_000.0
    """Device time after which no further round is begun."""
    CLEAR = 1.5
    """Of two costs further apart than this no further round is needed."""
    HOST_MATTERS_US = 100.0
    """Device time up to which host time is measured on its own."""

    def __init__(self, module: Any, now: Callable[[], float] = time.perf_counter) -> None:
        self._module, self._now = module, now

    def compare(self, rule: Callable[[], Any], native: Callable[[], Any], device: int) -> tuple[Timing, Timing]:
        calls = (rule, native)
        with self._module.device(device), no_collection():
            for call in calls:  # compiles, makes handles and workspaces
                call()
            # The stream's own work only: another thread may be capturing a graph.
            self._module.current_stream(device).synchronize()
            flush = self._flusher(device)
            device_us: tuple[list[float], list[float]] = ([], [])
            host_us: tuple[list[float], list[float]] = ([], [])
            lead_us = 50.0
            for i in range(self.ROUNDS):
                self._round(calls, flush, lead_us, device_us, host_us)
                lead_us = min(50.0 + 2 * sum(h[-1] for h in host_us), 5000.0)
                found = [Timing(statistics.median(d), statistics.median(h)) for d, h in zip(device_us, host_us)]
                costs = [f.cost for f in found]
                if i + 1 >= self.LEAST_ROUNDS and (sum(map(sum, device_us)) > self.ENOUGH_US or max(costs) > self.CLEAR * min(costs)):
                    break
            if min(f.device_us for f in found) < self.HOST_MATTERS_US:
                found = [Timing(f.device_us, h) for f, h in zip(found, self._host(calls, device))]
        return found[0], found[1]

    def _flusher(self, device: int) -> Callable[[], Any]:
        """A function that writes over the L2 cache; one that does nothing where memory does not suffice."""
        size = getattr(self._module.get_device_properties(device), "L2_cache_size", 0) or 32 << 20
        try:
            return torch.empty(size, dtype=torch.uint8, device=torch.device(self._module.__name__.rpartition(".")[2], device)).zero_
        except torch.OutOfMemoryError:
            return lambda: None

    def _round(self, calls: Sequence[Callable[[], Any]], flush: Callable[[], Any], lead_us: float,
               device_us: Sequence[list[float]], host_us: Sequence[list[float]]) -> None:
        events = [(self._module.Event(enable_timing=True), self._module.Event(enable_timing=True)) for _ in calls]
        sleep = getattr(self._module, "_sleep", None)
        if sleep is not None:
            sleep(int(lead_us * 2000))  # about 2 cycles a nanosecond: the host must stay ahead, or its time would be measured
        for call, (begin, end), host in zip(calls, events, host_us):
            flush()
            begin.record()
            start = self._now()
            call()
            host.append((self._now() - start) * 1e6)
            end.record()
        end.synchronize()
        for (begin, end), times in zip(events, device_us):
            times.append(begin.elapsed_time(end) * 1e3)

    def _host(self, calls: Sequence[Callable[[], Any]], device: int, rounds: int = 7, number: int = 10) -> list[float]:
        seen: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, times in zip(calls, seen):
                self._module.current_stream(device).synchronize()
                start = self._now()
                for _ in range(number):
                    call()
                times.append((self._now() - start) * 1e6 / number)
        self._module.current_stream(device).synchronize()
        return [statistics.median(times) for times in seen]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from running, so that it is not timed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- signatures as text ------------------------------------------------------------------------------------------------


def _size_class(n: int) -> str:
    """Sizes that are within a fifth of each other and agree in being divisible by 16 have one text; small ones their own."""
    if n <= 32:
        return str(n)
    return f"~{round(2 ** (math.floor(4 * math.log2(n)) / 4))}" + ("" if n % 16 == 0 else "+")


def _tensor_text(meta: TensorMeta, size: Callable[[int], str], classes: bool) -> str:
    text = f"{dtype_abbrs.get(meta.dtype, str(meta.dtype))}[{','.join(map(size, meta.shape))}]"
    if not meta.is_contiguous:
        if classes:
            # Which dimension is the inner one, and which are broadcast: the rest follows from the sizes.
            order = sorted(range(meta.ndim), key=lambda i: (meta.stride[i], i))
            text += ":" + ",".join("0" if meta.stride[i] == 0 else f"d{i}" for i in order)
        else:
            text += ":" + ",".join(map(str, meta.stride))
    return text if meta.device.type != "cpu" or current().device_type == "cpu" else text + "@cpu"


def _by_type(parameter: Parameter) -> bool:
    """Whether of a Python number in this place only the type counts: its value goes to the kernel at run time."""
    return (parameter.is_number or parameter.is_tensor or parameter.is_tensor_list
            or parameter.type.removeprefix("Optional[").startswith(("List[number]", "List[float]")))


def signature(op: OpOverload, args: Sequence[Any], by_value: Iterable[str] = (), state: Iterable[Any] = ()) -> tuple[str, str]:
    """A call's signature as text, and the text of the class of sizes that it belongs to.

    Args:
        op: the overload.
        args: what :func:`~gemsmode.signature.describe` says of the arguments, all of them, in the order of the schema.
        by_value: names of number arguments whose value counts, not only the type.
        state: settings that decisions depend on.
    """
    valued = frozenset(by_value)

    def text(value: Any, keep: bool, classes: bool) -> str:
        size = _size_class if classes else str
        if value.__class__ is TensorMeta:
            return _tensor_text(value, size, classes)
        if value.__class__ in (tuple, list):
            items = [text(v, keep, classes) for v in value]
            if len(items) > LISTED:  # the parameters of a model
                digest = hashlib.sha256("\n".join(items).encode()).hexdigest()[:12]
                items = [*items[:2], f"... {len(items)} #{digest}"]
            return "[" + ",".join(items) + "]"
        if isinstance(value, torch.Generator):
            return "generator"
        if value.__class__ is int and keep:
            return size(value)
        if value.__class__ in NUMBERS and value is not None and not keep:
            return value.__class__.__name__
        return str(value)

    texts = []
    for classes in (False, True):
        parts = [text(a, p.name in valued or not _by_type(p), classes) for p, a in zip(parameters(op), args)
                 if not (p.has_default and a.__class__ is not TensorMeta and a == p.default)]
        settings = [str(s) for s in state if s not in (None, False)]
        texts.append(f"{op}({', '.join(parts)})" + (f" {{{', '.join(settings)}}}" if settings else ""))
    return texts[0], texts[1]


@functools.cache
def _source_hash(implementation: Any, file: str) -> str | None:
    """A hash of the source files that a rule's kernels come from; None if one cannot be read.

    Of gemsmode's own rules: the file of the kernel and of its planner, and the files of ``gemsmode.ops`` that these use.
    Of a user's: the file in which the rule is.
    """
    by_file = {getattr(m, "__file__", None): m for m in list(sys.modules.values())}
    waiting = [m for m in (by_file.get(file), sys.modules.get(getattr(implementation, "__module__", ""))) if m is not None]
    files, seen = {file}, set()
    while waiting:
        module = waiting.pop()
        if module.__name__ in seen or not getattr(module, "__file__", None):
            continue
        seen.add(module.__name__)
        files.add(str(module.__file__))
        if not module.__name__.startswith("gemsmode."):
            continue
        for value in list(vars(module).values()):
            name = value.__name__ if value.__class__ is type(sys) else getattr(value, "__module__", None)
            if isinstance(name, str) and name.startswith("gemsmode.ops.") and name in sys.modules:
                waiting.append(sys.modules[name])
    digest = hashlib.sha256()
    for name in sorted(files):
        try:
            digest.update(Path(name).read_bytes())
        except OSError:
            return None
    return digest.hexdigest()[:16]


def source_hash(rule: Rule) -> str | None:
    """What an entry for ``rule`` is tied to; None (nothing is kept on disk) where its source cannot be read."""
    return _source_hash(rule.implementation, rule.file)


# -- the kept choices --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's cache folder: ``$GEMSMODE_CACHE``, ``$XDG_CACHE_HOME/gemsmode`` or ``~/.cache/gemsmode``."""
    if own := os.environ.get("GEMSMODE_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "gemsmode"
    return Path(os.path.expanduser("~")) / ".cache" / "gemsmode"


@functools.cache
def _driver() -> str:
    """The version of the GPU's driver."""
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    except OSError:
        pass
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    try:
        return f"cuda {torch._C._cuda_getDriverVersion()}"
    except (AttributeError, RuntimeError):
        return "unknown"


def environment(target: Target, device: int = 0) -> dict[str, str]:
    """What measured times hold for: the device, its driver, and the versions."""
    import gemsmode

    if target.interpreted:
        gpu, driver = f"interpreter on {platform.machine()}", "none"
    else:
        gpu, driver = str(getattr(torch, target.device_type).get_device_name(device)), _driver()
    return {"gpu": gpu, "driver": driver, "torch": str(torch.__version__), "triton": str(triton.__version__),
            "gemsmode": gemsmode.__version__}


class Entry(NamedTuple):
    """A kept choice.

    Attributes:
        rule: the rule's name.
        source: the hash of its source; None: not for the file.
        choice: what was measured.
        size_class: the class of sizes that the signature belongs to.
    """

    rule: str
    source: str | None
    choice: Choice
    size_class: str


class Store:
    """The kept choices for one device and one set of versions: in memory, and in a file shared with other processes.

    Args:
        folder: where the file is; None keeps them in memory only.
        about: what they hold for; part of the file's name and content.
    """

    EVERY_S = 1.0

    def __init__(self, folder: Path | None, about: dict[str, str]) -> None:
        self.about = about
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        slug = re.sub(r"[^A-Za-z0-9]+", "-", about["gpu"]).strip("-").lower()
        self.path = None if folder is None else folder / f"choices-{slug}-{digest}.json"
        self._entries: dict[str, Entry] = {}
        self._classes: dict[str, dict[str, Entry]] = {}
        self._new: dict[str, Entry] = {}
        self._seen: tuple[int, int] | None = None
        self._saved_at = -math.inf
        self._lock = threading.RLock()
        self._usable = True

    def __len__(self) -> int:
        self._refresh()
        return len(self._entries)

    def items(self) -> list[tuple[str, Entry]]:
        """Every kept choice with its signature, the latest last."""
        self._refresh()
        return list(self._entries.items())

    def get(self, text: str, rule: str, source: str | None) -> Entry | None:
        """The kept choice of a signature, if it is of this rule with this source."""
        self._refresh()
        found = self._entries.get(text)
        return found if found is not None and (found.rule, found.source) == (rule, source) else None

    def alike(self, size_class: str, rule: str, source: str | None) -> list[Choice]:
        """What was measured of signatures of one class."""
        return [e.choice for e in list(self._classes.get(size_class, {}).values()) if (e.rule, e.source) == (rule, source)]

    def put(self, text: str, entry: Entry) -> None:
        """Keep a choice; the file is written at most once a second, and by :meth:`save`."""
        with self._lock:
            self._add(text, entry)
            if entry.source is not None:
                self._new[text] = entry
        if time.monotonic() - self._saved_at > self.EVERY_S:
            self.save()

    def _add(self, text: str, entry: Entry) -> None:
        old = self._entries.pop(text, None)
        if old is not None:
            self._classes.get(old.size_class, {}).pop(text, None)
        self._entries[text] = entry
        self._classes.setdefault(entry.size_class, {})[text] = entry

    # -- the file ------------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take up what other processes have written since the last look."""
        if self.path is None:
            return
        try:
            state = os.stat(self.path)
        except OSError:
            return
        stamp = state.st_mtime_ns, state.st_ino
        if stamp != self._seen:
            with self._lock:
                self._seen = stamp
                for text, entry in self._read().items():
                    if text not in self._new:
                        self._add(text, entry)

    def _read(self) -> dict[str, Entry]:
        """The file's entries; none, with the file set aside, if it is not what it should be."""
        assert self.path is not None
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, not {FORMAT}")
            return {str(text): _entry_from(item) for text, item in data["choices"].items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("kept choices in %s cannot be read: %s", self.path, error)
            return {}
        except Exception as error:  # whatever is in the file
            aside = self.path.with_name(f"{self.path.name}.corrupt-{os.getpid()}-{time.time_ns()}")
            try:
                os.replace(self.path, aside)
            except OSError:
                return {}
            warnings.warn(f"gemsmode: the kept choices in {self.path} cannot be read ({type(error).__name__}: {error}). They were set "
                          f"aside as {aside} and are measured anew.", RuntimeWarning, stacklevel=2)
            return {}

    def save(self) -> None:
        """Write what is new into the file, together with what other processes have put there."""
        with self._lock:
            self._saved_at = time.monotonic()
            if not self._new or self.path is None or not self._usable:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self.path.with_suffix(".lock")):
                    merged = self._read() if self.path.exists() else {}
                    for text, entry in self._new.items():
                        merged.pop(text, None)
                        merged[text] = entry
                    for text in list(merged)[:max(len(merged) - MAX_KEPT, 0)]:
                        del merged[text]
                    part = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.part")
                    try:
                        lines = ",\n".join(f"{json.dumps(t)}: {json.dumps(_entry_to(e))}" for t, e in merged.items())
                        part.write_text(f'{{"format": {FORMAT}, "environment": {json.dumps(self.about)},\n"choices": {{\n{lines}\n}}}}\n',
                                        encoding="utf-8")
                        os.replace(part, self.path)
                    finally:
                        part.unlink(missing_ok=True)
            except OSError as error:
                self._usable = False
                log.warning("measured choices are not kept: %s", error)
                return
            for text, entry in merged.items():
                if text not in self._entries:
                    self._add(text, entry)
            self._new.clear()


def _entry_from(item: Any) -> Entry:
    times = [Timing(*map(float, item[name])) for name in ("rule_us", "native_us")]
    if not all(math.isfinite(v) and v >= 0 for t in times for v in t):
        raise ValueError(f"times {times}")
    for name in ("rule", "source", "class"):
        if not isinstance(item[name], str):
            raise ValueError(f"{name} {item[name]!r}")
    return Entry(item["rule"], item["source"], Choice(times[0], times[1], "kept"), item["class"])


def _entry_to(entry: Entry) -> dict[str, Any]:
    return {"rule": entry.rule, "source": entry.source, "class": entry.size_class,
            "rule_us": [round(v, 3) for v in entry.choice.rule], "native_us": [round(v, 3) for v in entry.choice.native]}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path`` among processes; where the system has none, what another process wrote meanwhile may be lost."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # the lock ends with the file


# -- choosing ----------------------------------------------------------------------------------------------------------

class Chooser:
    """Decides between a rule and the native op by measuring both.

    Args:
        folder: where choices are kept: ``"default"`` is :func:`cache_folder`, None keeps them in memory only.
        timer: measures; defaults to events on a GPU and wall time on the CPU.
        again: measure what was kept before, too, once.
        by: ``"cost"`` compares the slower of device and host time; ``"device"`` device time alone, for what a CUDA graph
            replays (``gemsmode.capture(..., prefer="fastest")``). What is kept serves both.

    Attributes:
        on_measured: called with the text of each signature that was timed, and the choice.
        lock: held by who decides; one for all choosers, as two threads that time would measure each other.
    """

    lock = threading.RLock()

    def __init__(self, folder: Path | str | None = "default", timer: Timer | None = None, again: bool = False,
                 by: str = "cost") -> None:
        if by not in ("cost", "device"):
            raise ValueError(f"by is 'cost' or 'device', not {by!r}")
        self.folder = cache_folder() if folder == "default" else None if folder is None else Path(folder)
        self.again, self.by = again, by
        self.on_measured: Callable[[str, Choice], Any] | None = None
        self._timer = timer
        self._stores: dict[tuple[Target, int], Store] = {}
        self._lock = threading.Lock()
        _choosers.add(self)

    def store(self, target: Target, device: int = 0) -> Store:
        """The kept choices for a device."""
        found = self._stores.get((target, device))
        if found is None:
            with self._lock:
                about = environment(target, device)
                # GPUs of one name share a file and what is known of it.
                same = next((s for s in self._stores.values() if s.about == about), None)
                found = self._stores.setdefault((target, device), same or Store(self.folder, about))
        return found

    def stores(self) -> list[Store]:
        """The stores that were used so far."""
        return list(dict.fromkeys(self._stores.values()))

    def save(self) -> None:
        """Write new choices to the disk."""
        for store in list(self._stores.values()):
            store.save()

    def choose(self, handler: OpHandler, args: tuple[Any, ...], decided: Decided) -> Decided:
        """The decision for a call that ``decided``, a rule's decision, could serve.

        Args:
            handler: of the call's op.
            args: the call's arguments, all of them, in the order of the schema.
            decided: what the mode would do without measuring.
        """
        if torch.are_deterministic_algorithms_enabled():
            return decided
        metas = tuple(describe(a) for a in args)
        found = self.known(handler, metas, decided)
        if found is None:
            if why := _untimed(handler.policy.target):
                log.debug("%s is not timed: %s", handler.op, why)
                decided.provisional = True
                return decided
            found = self._measure(handler, args, metas, decided)
        return decided if found is None else taken(handler, decided, found)

    def known(self, handler: OpHandler, metas: tuple[Any, ...], decided: Decided) -> Choice | None:
        """The kept choice for a call described by metadata, if there is one."""
        rule = _rule_of(handler, decided)
        text, size_class = _texts(handler, metas)
        store = self.store(handler.policy.target, _device_of(metas))
        source = source_hash(rule)
        entry = store.get(text, rule.name, source)
        if entry is not None and not (self.again and entry.choice.origin == "kept"):
            return entry.choice._replace(by=self.by)
        alike = [c for c in store.alike(size_class, rule.name, source) if not (self.again and c.origin == "kept")]
        if len(alike) < PER_CLASS:
            return None
        return Choice(_mean([c.rule for c in alike]), _mean([c.native for c in alike]), "similar", self.by)

    def _measure(self, handler: OpHandler, args: tuple[Any, ...], metas: tuple[Any, ...], decided: Decided) -> Choice | None:
        """Time both; None if that cannot be done, and the rule has to do."""
        from gemsmode.verify import Copies

        target, device = handler.policy.target, _device_of(metas)
        native = native_in_order(handler.op)
        timer = self._timer or (WallTimer() if target.device_type == "cpu" else DeviceTimer(getattr(torch, target.device_type)))
        try:
            with self.lock, _generators_put_back(target, device, args), _quiet(handler.op):
                given = Copies(args).args if handler.op._schema.is_mutable else args
                rule_time, native_time = timer.compare(functools.partial(decided.run, *given), functools.partial(native, *given), device)
        except torch.OutOfMemoryError:
            log.debug("%s is not timed: out of memory; the rule runs", handler.op)
            return None
        except Exception as error:
            # PyTorch rejects the call, or the rule fails: the call itself will show it.
            log.debug("%s is not timed: %s: %s", handler.op, type(error).__name__, error)
            return None
        choice = Choice(rule_time, native_time, "measured", self.by)
        rule = _rule_of(handler, decided)
        text, size_class = _texts(handler, metas)
        self.store(target, device).put(text, Entry(rule.name, source_hash(rule), choice, size_class))
        if self.on_measured is not None:
            self.on_measured(text, choice)
        return choice


_choosers: weakref.WeakSet[Chooser] = weakref.WeakSet()


@atexit.register
def _save_all() -> None:
    for chooser in list(_choosers):
        chooser.save()


@functools.cache
def _chooser_in(folder: Path, by: str) -> Chooser:
    return Chooser(folder, by=by)


def default(by: str = "cost") -> Chooser:
    """The chooser that modes share, for the cache folder of this moment."""
    return _chooser_in(cache_folder(), by)


def as_chooser(prefer: str | Chooser | None) -> Chooser | None:
    """What ``GemsMode(prefer=...)`` means.

    Raises:
        ValueError: neither ``"rules"``, ``"fastest"``, None nor a :class:`Chooser`.
    """
    if isinstance(prefer, Chooser):
        return prefer
    if prefer in (None, "rules"):
        return None
    if prefer == "fastest":
        return default()
    raise ValueError(f"prefer is 'rules' (a rule runs wherever one serves) or 'fastest' (the faster of rule and PyTorch's own), "
                     f"not {prefer!r}")


def taken(handler: OpHandler, decided: Decided, choice: Choice) -> Decided:
    """``decided``, a rule's decision, after ``choice``."""
    from gemsmode.handlers import Decided

    decision = decided.decision
    if choice.rule_wins:
        decided.decision = decision._replace(choice=choice)
        return decided
    considered = (*decision.considered[:-1], *(c._replace(reason=choice.reason) for c in decision.considered[-1:]))
    return Decided(decision._replace(kind="pass", rule=None, reason=choice.reason, considered=considered, choice=choice),
                   native_in_order(handler.op))


def _rule_of(handler: OpHandler, decided: Decided) -> Rule:
    return next(c.rule for c, _, _ in handler._candidates if c.rule.name == decided.decision.rule)


def _texts(handler: OpHandler, metas: tuple[Any, ...]) -> tuple[str, str]:
    rules = [c.rule for c, _, _ in handler._candidates]
    state = dict.fromkeys(s for rule in rules for s in rule.state if s is not torch.are_deterministic_algorithms_enabled)
    return signature(handler.op, metas, frozenset().union(*(r.by_value for r in rules)), [s() for s in state])


def _device_of(metas: tuple[Any, ...]) -> int:
    for meta in metas:
        for m in meta if meta.__class__ is tuple else (meta,):
            if m.__class__ is TensorMeta and m.device.index is not None:
                return m.device.index
    named = next((m for m in metas if isinstance(m, torch.device)), None)
    if named is not None and named.index is not None:
        return named.index
    return torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else 0


def _untimed(target: Target) -> str:
    """Why nothing may be timed at this moment; empty if it may."""
    if target.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if _profiler_enabled():
        return "a profiler is looking"
    # Without a driver a PyTorch that was built for CUDA raises when it is asked.
    if torch.cuda.is_initialized() and getattr(torch._C, "_cuda_isHistoryEnabled", lambda: False)():
        return "memory is being traced"
    return ""


@contextlib.contextmanager
def _generators_put_back(target: Target, device: int, args: tuple[Any, ...]) -> Iterator[None]:
    generators = [a for a in args if isinstance(a, torch.Generator)]
    if target.device_type == "cpu":
        generators.append(torch.default_generator)
    else:
        generators.append(getattr(torch, target.device_type).default_generators[device])
    states = [(g, g.get_state()) for g in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextlib.contextmanager
def _quiet(op: OpOverload) -> Iterator[None]:
    """Without the warning of an ``out=`` that is resized, which the call itself gives."""
    if not any(p.is_out for p in parameters(op)):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
