"""What a report shows, section by section, before it becomes a rich table, Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gemsmode.tracing.report import APART, Check, Difference, Report, Row

NUMBERS = frozenset({"calls", "time", "share", "replaced", "shapes", "rate", "host", "bytes", "flops", "compared", "failed", "eps",
                     "relative", "of tolerance", "by rule", "by native"})
"""Columns that stand to the right."""

FOLDED = frozenset({"arguments", "dtypes", "why", "module", "error", "decision", "worst at"})
"""Columns that may take several lines."""


@dataclass
class Section:
    """A heading, a sentence and a table, each of which may be empty.

    Attributes:
        heading: what it is about.
        tone: ``"good"``, ``"open"``, ``"bad"`` or ``""``; what colour it may have.
        text: what follows the heading.
        columns, rows: the table, as text.
        left_out: rows that a limit cut off.
    """

    heading: str = ""
    tone: str = ""
    text: str = ""
    columns: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    left_out: int = 0


# -- words -------------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """``1.23 s``, ``45.6 ms``, ``7.8 us``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value / 1e-6:.3g} us" if value else "0"


def scaled(value: float, unit: str) -> str:
    """``1.23 GB``, ``45.6 TFLOP``."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def short(overload: str) -> str:
    """``add.Tensor`` for ``aten.add.Tensor``, ``mm`` for ``aten.mm.default``."""
    return overload.removeprefix("aten.").removesuffix(".default")


def clip(text: str, length: int = 48) -> str:
    """``text``, cut to ``length``."""
    return text if len(text) <= length else text[:length - 1] + "…"


def rate(row: Row) -> str:
    """GB/s and TFLOP/s, where stated."""
    parts = []
    if (moved := row.gb_per_s) is not None:
        parts.append(f"{moved:.3g} GB/s")
    if (worked := row.tflop_per_s) is not None:
        parts.append(f"{worked:.3g} TFLOP/s")
    return ", ".join(parts)


def is_dry(report: Report) -> bool:
    """Whether the calls were not run, and so have no time."""
    return report.environment.get("timing") == "none"


def _dry_headline(report: Report, compute: int) -> list[str]:
    environment, c = report.environment, report.coverage
    lines = [f"{count(report.calls, 'call')}, {compute:,} of them compute, in a dry run for {environment.get('device', '')}, "
             f"torch {environment.get('torch', '')}"]
    flops = sum((r.flops or 0) * r.calls for r in report.compute)
    replaced = sum((r.flops or 0) * r.calls for r in report.compute if r.decision == "rule")
    share = f", {percent(replaced / flops)} of {scaled(flops, 'FLOP')}" if flops else ""
    lines.append(f"coverage of compute: {percent(c.calls)} of calls, {percent(c.bytes)} of bytes{share}" if compute else
                 "no call that computes was seen: is the model run inside the block?")
    if environment.get("peak_bytes"):
        lines.append(f"tensors at their peak: {scaled(environment['peak_bytes'], 'B')}")
    return lines


def headline(report: Report) -> list[str]:
    """What was seen, and the coverage, in two lines."""
    compute = sum(r.calls for r in report.compute)
    environment = report.environment
    if is_dry(report):
        return _dry_headline(report, compute)
    where = f" on {environment['device']}, torch {environment['torch']}" if "device" in environment and "torch" in environment else ""
    lines = [f"{count(report.calls, 'call')}, {compute:,} of them compute, in {seconds(report.wall_s)}{where}"]
    c = report.coverage
    if not compute:
        lines.append("no call that computes was seen: is the model run inside the block?")
    elif environment.get("interpreter"):
        # Time in the interpreter measures the interpreter.
        lines.append(f"coverage of compute: {percent(c.calls)} of calls, {percent(c.bytes)} of bytes")
    else:
        kind = "device time" if environment.get("timing") == "device" else "time"
        lines.append(f"coverage of compute: {percent(c.calls)} of calls, {percent(c.time)} of {kind}, {percent(c.bytes)} of bytes")
    return lines


def _sum(report: Report, rows: Sequence[Row]) -> str:
    cost = scaled(sum(r.touched for r in rows), "B") if is_dry(report) else seconds(sum(r.time_s for r in rows))
    return f"{count(len({r.label[0] for r in rows}), 'overload')}, {count(sum(r.calls for r in rows), 'call')}, {cost}"


@dataclass(frozen=True)
class _Cost:
    """What calls cost: time and its share; where none was run, the bytes of their arguments, their share, and operations."""

    dry: bool
    total: float

    @classmethod
    def of(cls, report: Report) -> _Cost:
        dry = is_dry(report)
        return cls(dry, sum((r.touched * r.calls if dry else r.time_s) for r in report.compute) or 1.0)

    @property
    def columns(self) -> list[str]:
        return ["bytes", "share", "flops"] if self.dry else ["time", "share"]

    def cells(self, row: Row) -> list[str]:
        if not self.dry:
            return [seconds(row.time_s), percent(row.time_s / self.total)]
        flops = sum((r.flops or 0) * r.calls for r in row.records)
        return [scaled(row.touched, "B"), percent(row.touched / self.total), scaled(flops, "FLOP") if flops else ""]


# -- sections ----------------------------------------------------------------------------------------------------------


def sections(report: Report, by: str = "overload", limit: int | None = 20) -> list[Section]:
    """The sections of a report, those that would be empty left out.

    Args:
        report: the report.
        by: what the rows of the replaced and passed-through tables stand for: ``"overload"``, ``"op"``, ``"shape"``;
            ``"module"`` gives the module table in full.
        limit: rows of each table; None for all.
    """
    cost = _Cost.of(report)
    rows_by = "overload" if by == "module" else by
    found = [_verified(report, limit), measured(report, limit), _replaced(report, rows_by, limit, cost), _failed(report, limit),
             _passed(report, rows_by, limit, cost), *(_apart(report, kind, heading) for kind, heading in APART.items()),
             _modules(report, None if by == "module" else limit, None if by == "module" else 3, cost)]
    return [section for section in found if section is not None]


def _cut(rows: Sequence[Row], limit: int | None) -> tuple[Sequence[Row], int]:
    return (rows, 0) if limit is None else (rows[:limit], max(len(rows) - limit, 0))


def _words(row: Row, field: str) -> str:
    return "; ".join(dict.fromkeys(str(getattr(r, field) or "") for r in row.records))


def _verified(report: Report, limit: int | None) -> Section | None:
    if not report.checks:
        return None
    failed = [c for c in report.checks if c.failed]
    text = f"{count(sum(c.compared for c in report.checks), 'call')} compared with PyTorch's own, on copies of their inputs; "
    text += "all agree" if not failed else f"{sum(c.failed for c in failed):,} do not, of {count(len(failed), 'overload')}"
    if failed:
        text += f". The first: {failed[0].first}" if len(failed) == 1 else ". The first of each:\n" + "\n".join(c.first for c in failed[:5])
    shown = report.checks[:limit]
    rows = [[short(c.overload), c.rule, f"{c.compared:,}", f"{c.failed:,}" if c.failed else "", f"{c.error_eps:.3g}", f"{c.error:.1e}",
             f"{c.allowed:.2g}", _worst_at(c)] for c in shown]
    columns = ("overload", "rule", "compared", "failed", "eps", "relative", "of tolerance", "worst at")
    return Section("Verified", "bad" if failed else "good", text, columns, rows, len(report.checks) - len(shown))


def measured(report: Report, limit: int | None) -> Section | None:
    """What ``prefer="fastest"`` chose, where it matters most first."""
    rows = [row for row in report.rows("shape", ["rule", "pass", "error"]) if row.records[0].rule_us is not None]
    if not rows:
        return None
    origins = {name: sum(row.records[0].timed == name for row in rows) for name in ("measured", "kept", "similar")}
    words = {"measured": "measured now", "kept": "kept from before", "similar": "as at nearly their sizes"}
    native = sum(row.records[0].decision == "pass" for row in rows)
    text = (f"rule or PyTorch's own, whichever was faster: the rule for {len(rows) - native:,} of {count(len(rows), 'signature')}; "
            + ", ".join(f"{n:,} {words[name]}" for name, n in origins.items() if n))
    shown, left_out = _cut(rows, limit)
    table = []
    for row in shown:
        r = row.records[0]
        table.append([short(row.label[0]), row.label[1], f"{row.calls:,}", seconds((r.rule_us or 0.0) * 1e-6),
                      seconds((r.native_us or 0.0) * 1e-6), "native" if r.decision == "pass" else "rule"])
    return Section("Measured", "", text, ("overload", "arguments", "calls", "by rule", "by native", "taken"), table, left_out)


def _worst_at(check: Check) -> str:
    """``Net.layers.0 forward, train.py:12``."""
    if not check.compared:
        return f"not compared: {check.why}"
    file = check.site.partition(" in ")[0].replace("\\", "/").rpartition("/")[2]
    return f"{check.module or '(no module)'} {check.phase}" + (f", {file}" if file else "")


def _replaced(report: Report, by: str, limit: int | None, cost: _Cost) -> Section | None:
    rows = report.rows(by, ["rule"])
    if not rows:
        return Section("Replaced", "good", "nothing") if report.compute else None
    rated = not report.environment.get("interpreter") and not cost.dry and any(rate(row) for row in rows)
    shapes = by == "shape"
    host = report.environment.get("timing") == "device"
    columns = ["op" if by == "op" else "overload", *(["arguments"] if shapes else []), "rule", "calls", *cost.columns,
               *(["host"] if host else []), *(["rate"] if rated else []), *([] if shapes else ["dtypes"])]
    shown, left_out = _cut(rows, limit)
    table = [[short(row.label[0]), *([row.label[1]] if shapes else []), _words(row, "rule"), f"{row.calls:,}",
              *cost.cells(row), *([seconds(row.host_s)] if host else []), *([rate(row)] if rated else []),
              *([] if shapes else [", ".join(row.dtypes)])] for row in shown]
    return Section("Replaced", "good", f"{_sum(report, rows)}, by Triton kernels", columns, table, left_out)


def _failed(report: Report, limit: int | None) -> Section | None:
    rows = report.rows("overload", ["error"])
    if not rows:
        return None
    shown, left_out = _cut(rows, limit)
    table = [[short(row.label[0]), _words(row, "rule"), f"{row.calls:,}", clip(_words(row, "reason"), 200)] for row in shown]
    text = f"{_sum(report, rows)}, PyTorch's own ran instead"
    return Section("Failed", "bad", text, ("overload", "rule", "calls", "error"), table, left_out)


def _passed(report: Report, by: str, limit: int | None, cost: _Cost) -> Section | None:
    # Where a rule was timed and native was faster, a kernel is there: `measured` shows it.
    rows = [row for row in report.rows(by, ["pass"]) if row.records[0].rule_us is None]
    if not rows:
        return None
    shapes = by == "shape"
    host = report.environment.get("timing") == "device"
    columns = ["op" if by == "op" else "overload", *(["arguments"] if shapes else []), "calls", *cost.columns,
               *(["host"] if host else []), "why", *([] if shapes else ["shapes", "most often"])]
    shown, left_out = _cut(rows, limit)
    table = [[short(row.label[0]), *([row.label[1]] if shapes else []), f"{row.calls:,}", *cost.cells(row),
              *([seconds(row.host_s)] if host else []), _words(row, "reason"),
              *([] if shapes else [str(len(row.shapes)), clip(row.usual_shapes[0])])] for row in shown]
    return Section("What to write next", "open", f"{_sum(report, rows)}, passed through to PyTorch", columns, table, left_out)


def _apart(report: Report, kind: str, heading: str) -> Section | None:
    rows = sorted(report.rows("overload", [kind]), key=lambda row: (-row.calls, row.label))
    if not rows:
        return None
    names = ", ".join(f"{short(row.label[0])} {row.calls}" for row in rows[:6]) + (", ..." if len(rows) > 6 else "")
    calls, host_s = sum(r.calls for r in rows), sum(r.host_s for r in rows)
    cost = "" if is_dry(report) else f"{seconds(host_s)} of host time, "
    return Section(heading, "", f"{count(calls, 'call')}, {cost}not in the figures above: {names}")


def _modules(report: Report, limit: int | None, depth: int | None, cost: _Cost) -> Section | None:
    rows = report.modules(depth)
    if all(row.label[0] == "(no module)" for row in rows):
        return None
    shown, left_out = _cut(rows, limit)
    table = [[row.label[0], row.label[1], f"{row.calls:,}", percent(row.replaced / row.calls), *cost.cells(row)] for row in shown]
    return Section("Modules", "", "compute in each, with everything below it",
                   ("module", "phase", "calls", "replaced", *cost.columns), table, left_out)


def difference(diff: Difference, limit: int | None = 20) -> tuple[list[str], Section]:
    """The two reports in a line each, and what changed."""
    lines = []
    for name, report in (("before", diff.before), ("after", diff.after)):
        coverage, e = report.coverage, report.environment
        where = ", ".join([str(e["device"])] * ("device" in e) + [f"{k} {e[k]}" for k in ("torch", "gemsmode") if k in e])
        lines.append(f"{name}: {count(report.calls, 'call')}, compute {seconds(sum(r.time_s for r in report.compute))}, "
                     f"coverage {percent(coverage.calls)} of calls, {percent(coverage.time)} of time" + (f" ({where})" if where else ""))
    changed = [c for c in diff.changes
               if (c.calls_before, c.decision_before, c.time_before) != (c.calls_after, c.decision_after, c.time_after)]
    if not changed:
        return lines, Section("No difference")
    rows = []
    for c in changed[:limit]:
        decision = _step(c.decision_before or "absent", c.decision_after or "absent")
        calls = _step(f"{c.calls_before:,}", f"{c.calls_after:,}")
        delta = c.time_after - c.time_before
        change = f"{'-' if delta < 0 else '+'}{seconds(abs(delta))}"
        if c.time_before and c.time_after:
            change += f" ({c.time_after / c.time_before:.2f}x)"
        rows.append([short(c.overload), decision, calls, f"{seconds(c.time_before)} -> {seconds(c.time_after)}", change])
    columns = ("overload", "decision", "calls", "time", "change")
    return lines, Section("Changed", "", count(len(changed), "overload"), columns, rows, len(changed) - len(rows))


def _step(before: str, after: str) -> str:
    return after if before == after else f"{before} -> {after}"
