"""The report: what happened to each call, what it cost, what is missing.

``print(report)`` shows (here of a small encoder, forward and backward, cut to two rows a table)::

    gemsmode report
    178 calls, 67 of them compute, in 716 ms on x86_64 (Triton's interpreter), torch 2.13.0+cpu
    coverage of compute: 50.7% of calls, 39.3% of bytes

    Replaced: 16 overloads, 34 calls, 548 ms, by Triton kernels
    overload                    rule                 calls     time  share  dtypes
    add.Tensor                  add                      8  80.5 ms  12.0%  float32
    sum.dim_IntList             sum                      6  77.9 ms  11.7%  float32
    ... and 14 more

    What to write next: 10 overloads, 33 calls, 121 ms, passed through to PyTorch
    overload           calls     time  share  why              shapes  most often
    mm                    11  84.4 ms  12.6%  denied by deny=       7  f32[256,64] f32[64,64]
    addmm                  4  20.3 ms   3.0%  denied by deny=       3  f32[256] f32[64,64] f32[64,256]
    ... and 8 more

    Views, allocations, metadata: 111 calls, 1.19 ms of host time, not in the figures above: view 33, t 25, ...

    Modules: compute in each, with everything below it
    module             phase     calls  replaced     time  share
    Encoder            forward      25     52.0%   308 ms  46.0%
    Encoder            backward     41     48.8%   358 ms  53.6%
    ... and 11 more

Everything is derived from :attr:`Report.records`, one per op, decision, argument shapes, module and phase.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemsmode.tracing.files import MARKER, write
from gemsmode.tracing.timeline import Timeline

COMPUTE = ("rule", "pass", "error")
"""Decisions about calls that compute; what no kernel of a GPU could replace is counted apart: see :data:`APART`."""

APART = {
    "view": "Views, allocations, metadata",
    "comm": "Communication between processes",
    "host": "Numbers on the host",
}
"""The other decisions: PyTorch's own ran, and coverage is not of them."""

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """All calls of one op with one decision, one set of argument shapes, in one module and phase.

    Attributes:
        overload: ``aten.add.Tensor``.
        decision: ``"rule"``, ``"pass"`` or ``"error"``; ``"view"``, ``"comm"`` or ``"host"`` for what is counted apart.
        rule: the rule's name for ``"rule"`` and ``"error"``.
        reason: why no rule ran.
        inputs: the tensor arguments, as ``gemsmode explain`` takes them: ``f32[2,3]``; a list is ``[f32[2],...]x300``.
        dtypes: their dtypes, each once.
        module: path of the ``nn.Module``, or the optimizer (``AdamW``); empty outside modules.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        calls: how many.
        host_s: seconds from the call's start to its return.
        device_s: seconds between device events around the calls; None if none was timed so.
        device_calls: calls timed by device events.
        captured: calls captured into a CUDA graph, which are not timed.
        bytes: bytes that one call must move, where the rule states it.
        flops: floating-point operations of one call, where the rule states it.
        touched: bytes of the tensor arguments of one call.
        rule_us, native_us: what one call costs by the rule and by PyTorch's own, where ``prefer="fastest"`` chose between them.
        timed: how these are known: ``"measured"`` in this process, ``"kept"`` from before, or ``"similar"`` (at nearly these sizes).
    """

    overload: str
    decision: str
    rule: str | None = None
    reason: str | None = None
    inputs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    module: str = ""
    phase: str = "forward"
    calls: int = 0
    host_s: float = 0.0
    device_s: float | None = None
    device_calls: int = 0
    captured: int = 0
    bytes: int | None = None
    flops: int | None = None
    touched: int = 0
    rule_us: float | None = None
    native_us: float | None = None
    timed: str = ""

    @property
    def time_s(self) -> float:
        """Device time where it was measured, else host time."""
        return self.host_s if self.device_s is None else self.device_s


@dataclass(frozen=True)
class Check:
    """What ``GemsMode(verify=True)`` found of one rule on one overload.

    Attributes:
        overload: ``aten.add.Tensor``.
        rule: the rule's name.
        compared: calls compared with PyTorch's own.
        failed: of these, calls whose results are too far from PyTorch's.
        skipped: calls that could not be compared; ``why`` says so of the last one.
        error_eps: the largest error, relative to the reference's element and in units of the result dtype's epsilon.
        error: the largest error relative to the reference's largest element.
        allowed: the largest error as a multiple of what is tolerated of that element.
        inputs, module, phase, site: of the call with the largest ``allowed``; ``site`` is ``file:line in function``.
        first: the first call that was too far off, in words.
    """

    overload: str
    rule: str
    compared: int = 0
    failed: int = 0
    skipped: int = 0
    why: str = ""
    error_eps: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    inputs: tuple[str, ...] = ()
    module: str = ""
    phase: str = ""
    site: str = ""
    first: str = ""


class Coverage(NamedTuple):
    """The share of compute that rules served, each from 0 to 1; 0 if there was none."""

    calls: float
    time: float
    bytes: float


@dataclass
class Row:
    """Records added up under one label.

    Attributes:
        label: what they have in common, by the columns asked for.
        moved_s, worked_s: time of the calls whose bytes, or operations, are stated; what the rates are based on.
    """

    label: tuple[str, ...]
    calls: int = 0
    replaced: int = 0
    time_s: float = 0.0
    host_s: float = 0.0
    device_s: float | None = None
    bytes: int = 0
    flops: int = 0
    touched: int = 0
    moved_s: float = 0.0
    worked_s: float = 0.0
    dtypes: list[str] = field(default_factory=list)
    shapes: dict[str, int] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.calls += record.calls
        self.replaced += record.calls if record.decision == "rule" else 0
        self.time_s += record.time_s
        self.host_s += record.host_s
        if record.device_s is not None:
            self.device_s = (self.device_s or 0.0) + record.device_s
        self.touched += record.touched * record.calls
        timed = record.calls if record.device_s is None else record.device_calls
        if record.bytes is not None:
            self.bytes += record.bytes * timed
            self.moved_s += record.time_s
        if record.flops is not None:
            self.flops += record.flops * timed
            self.worked_s += record.time_s
        self.dtypes += [d for d in record.dtypes if d not in self.dtypes]
        shape = " ".join(record.inputs)
        self.shapes[shape] = self.shapes.get(shape, 0) + record.calls
        self.records.append(record)

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.moved_s / 1e9 if self.bytes and self.moved_s else None

    @property
    def tflop_per_s(self) -> float | None:
        return self.flops / self.worked_s / 1e12 if self.flops and self.worked_s else None

    @property
    def usual_shapes(self) -> list[str]:
        """Argument shapes, the most frequent first."""
        return [shape for shape, _ in sorted(self.shapes.items(), key=lambda item: (-item[1], item[0]))]


_COLUMNS: dict[str, Callable[[Record], str]] = {
    "op": lambda r: r.overload.rpartition(".")[0] or r.overload,
    "overload": lambda r: r.overload,
    "shapes": lambda r: " ".join(r.inputs),
    "module": lambda r: r.module,
    "phase": lambda r: r.phase,
    "decision": lambda r: r.decision,
    "rule": lambda r: r.rule or "",
    "reason": lambda r: r.reason or "",
}

GROUPINGS: dict[str, tuple[str, ...]] = {
    "op": ("op",),
    "overload": ("overload", "decision", "rule", "reason"),
    "shape": ("overload", "shapes", "decision", "rule", "reason"),
    "module": ("module", "phase"),
}
"""What ``by=`` takes, and the columns that rows of it have in common."""


@dataclass(frozen=True)
class Change:
    """One overload in two reports; the first report's figures are ``before``."""

    overload: str
    decision_before: str | None
    decision_after: str | None
    calls_before: int
    calls_after: int
    time_before: float
    time_after: float


@dataclass(frozen=True)
class Difference:
    """What changed between two reports: :meth:`Report.diff`."""

    before: Report
    after: Report
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        from gemsmode.tracing.table import difference, plain

        return plain(difference(self))

    def __rich__(self) -> Any:
        from gemsmode.tracing.table import difference

        return difference(self)


@dataclass(frozen=True, eq=False)
class Report:
    """What a traced mode saw. ``print`` it, or write it as JSON, CSV, HTML, Markdown or a Chrome trace.

    Attributes:
        records: the finest rows.
        environment: versions, device, how time was measured.
        notes: what a reader must know to read the figures right.
        wall_s: seconds that the mode was in force.
        checks: what verification found, the worst first; empty unless asked for.
    """

    records: tuple[Record, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    wall_s: float = 0.0
    _timeline: Timeline | None = field(default=None, repr=False)
    _seen: int = field(default=0, repr=False)
    _numbers: dict[int, int] = field(default_factory=dict, repr=False)
    checks: tuple[Check, ...] = ()

    # -- figures -------------------------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Calls of any kind."""
        return sum(r.calls for r in self.records)

    @property
    def compute(self) -> list[Record]:
        """The records of calls that compute."""
        return [r for r in self.records if r.decision in COMPUTE]

    @property
    def coverage(self) -> Coverage:
        """The share of compute that rules served: by calls, by time, and by the bytes of the calls' tensor arguments."""

        def share(weight: Callable[[Record], float]) -> float:
            total = sum(map(weight, self.compute))
            return sum(weight(r) for r in self.compute if r.decision == "rule") / total if total else 0.0

        return Coverage(share(lambda r: r.calls), share(lambda r: r.time_s), share(lambda r: r.touched * r.calls))

    def rows(self, by: str = "overload", decisions: Iterable[str] | None = None) -> list[Row]:
        """Records added up, the most time first.

        Args:
            by: ``"op"``, ``"overload"``, ``"shape"`` or ``"module"``.
            decisions: only these.

        Raises:
            ValueError: no such grouping.
        """
        if by not in GROUPINGS:
            raise ValueError(f"rows can be made by {', '.join(GROUPINGS)}, not by {by!r}")
        columns = [_COLUMNS[name] for name in GROUPINGS[by]]
        wanted = None if decisions is None else set(decisions)
        found: dict[tuple[str, ...], Row] = {}
        for record in self.records:
            if wanted is None or record.decision in wanted:
                label = tuple(column(record) for column in columns)
                found.setdefault(label, Row(label)).add(record)
        # Calls of a dry run have no time: the bytes of their arguments stand in for it.
        return sorted(found.values(), key=lambda row: (-row.time_s, -row.touched, row.label))

    def modules(self, depth: int | None = None) -> list[Row]:
        """Compute per module path and phase, each with everything below it; in the order of the paths.

        Args:
            depth: at most this many parts of a path.
        """
        found: dict[tuple[str, str], Row] = {}
        for record in self.compute:
            parts = record.module.split(".") if record.module else ["(no module)"]
            for i in range(1, len(parts[:depth]) + 1):
                label = ".".join(parts[:i]), record.phase
                found.setdefault(label, Row(label)).add(record)
        order = {"forward": 0, "backward": 1, "optimizer": 2}

        def key(row: Row) -> Any:
            path, phase = row.label
            return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")], order.get(phase, 3)

        return sorted(found.values(), key=key)

    def diff(self, other: Report) -> Difference:
        """What changed from this report to ``other``, overload by overload; the largest change of time first."""
        tables = [{row.label[0]: row for row in reversed(_by_overload(report))} for report in (self, other)]
        changes = []
        for overload in dict.fromkeys([*tables[0], *tables[1]]):
            rows = [table.get(overload) for table in tables]
            decisions = [None if row is None else "/".join(sorted({r.decision for r in row.records})) for row in rows]
            calls = [0 if row is None else row.calls for row in rows]
            times = [0.0 if row is None else row.time_s for row in rows]
            changes.append(Change(overload, decisions[0], decisions[1], calls[0], calls[1], times[0], times[1]))
        changes.sort(key=lambda c: (-abs(c.time_after - c.time_before), c.overload))
        return Difference(self, other, tuple(changes))

    # -- formats -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything but the timeline, as plain Python values; :meth:`from_dict` reads it again."""
        coverage = self.coverage
        ops = []
        for row in self.rows("overload"):
            overload, decision, rule, reason = row.label
            ops.append({
                "overload": overload, "decision": decision, "rule": rule or None, "reason": reason or None,
                "calls": row.calls, "time_s": row.time_s, "host_s": row.host_s, "device_s": row.device_s,
                "dtypes": row.dtypes, "bytes": row.bytes or None, "flops": row.flops or None,
                "gb_per_s": row.gb_per_s, "tflop_per_s": row.tflop_per_s,
                "shapes": [{"inputs": shape, "calls": row.shapes[shape]} for shape in row.usual_shapes]})
        return {
            "format": MARKER, "version": FORMAT_VERSION,
            "coverage": coverage._asdict(),
            "calls": self.calls, "compute_calls": sum(r.calls for r in self.compute), "wall_s": self.wall_s,
            "environment": self.environment, "notes": list(self.notes),
            "ops": ops,
            "modules": [{"module": row.label[0], "phase": row.label[1], "calls": row.calls, "replaced": row.replaced,
                         "time_s": row.time_s} for row in self.modules()],
            "records": [dataclasses.asdict(record) for record in self.records],
            **({"checks": [dataclasses.asdict(check) for check in self.checks]} if self.checks else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that :meth:`to_dict` was asked of.

        Raises:
            ValueError: it is none, or of a later version.
        """
        if not isinstance(data, dict) or data.get("format") != MARKER or data.get("version", 0) > FORMAT_VERSION:
            raise ValueError(f"expected a gemsmode report of version {FORMAT_VERSION} or earlier, as JSON; "
                             f"write one with report.to_json(path) or `gemsmode report --json PATH`")

        def read(kind: Any, items: Iterable[dict[str, Any]]) -> tuple[Any, ...]:
            known = {f.name for f in dataclasses.fields(kind)}
            return tuple(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in item.items() if k in known}) for item in items)

        return cls(read(Record, data["records"]), data.get("environment", {}), tuple(data.get("notes", ())), data.get("wall_s", 0.0),
                   checks=read(Check, data.get("checks", ())))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that was written as JSON.

        Raises:
            ValueError: the file is not one.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            data = {}
        return cls.from_dict(data)

    def to_json(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> str:
        """JSON of :meth:`to_dict`; written to ``path`` if given, which must not be a file of another kind."""
        return _written(json.dumps(self.to_dict(), indent=1) + "\n", path, overwrite)

    def to_csv(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> str:
        """The records, one a line."""
        from gemsmode.tracing.export import csv_text

        return _written(csv_text(self), path, overwrite)

    def to_markdown(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> str:
        """The tables that ``print`` shows, for an issue or a pull request."""
        from gemsmode.tracing.export import markdown_text

        return _written(markdown_text(self), path, overwrite)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> str:
        """One self-contained page: figures, a treemap of modules and ops, tables that sort and filter."""
        from gemsmode.tracing.html import page

        return _written(page(self), path, overwrite)

    def to_chrome_trace(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> str:
        """A timeline for Perfetto (ui.perfetto.dev) or ``chrome://tracing``: modules, calls in them, device time.

        Raises:
            ValueError: there is no timeline: the report was read from a file, or is of a dry run.
        """
        from gemsmode.tracing.export import chrome_text

        return _written(chrome_text(self), path, overwrite)

    def __str__(self) -> str:
        from gemsmode.tracing.table import plain, render

        return plain(render(self))

    def __rich__(self) -> Any:
        from gemsmode.tracing.table import render

        return render(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gemsmode.tracing.html import fragment

        return fragment(self)


def _by_overload(report: Report) -> list[Row]:
    found: dict[str, Row] = {}
    for record in report.records:
        found.setdefault(record.overload, Row((record.overload,))).add(record)
    return list(found.values())


def _written(text: str, path: str | os.PathLike[str] | None, overwrite: bool) -> str:
    if path is not None:
        write(path, text, overwrite)
    return text
