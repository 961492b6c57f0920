"""A report as rich tables, and as plain text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gemsmode.tracing.report import Difference, Report, Row

LIMIT = 20
"""Rows shown of each table, unless told otherwise."""


def seconds(value: float) -> str:
    """``1.23 s``, ``45.6 ms``, ``7.8 us``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value / 1e-6:.3g} us" if value else "0"


def short(overload: str) -> str:
    """``add.Tensor`` for ``aten.add.Tensor``, ``mm`` for ``aten.mm.default``."""
    return overload.removeprefix("aten.").removesuffix(".default")


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def rate(row: Row) -> str:
    """GB/s and TFLOP/s, where stated."""
    parts = []
    if (moved := row.gb_per_s) is not None:
        parts.append(f"{moved:.3g} GB/s")
    if (worked := row.tflop_per_s) is not None:
        parts.append(f"{worked:.3g} TFLOP/s")
    return ", ".join(parts)


def plain(renderable: Any, width: int | None = None) -> str:
    """Text without colours; as wide as the terminal, or 120 columns."""
    width = width or shutil.get_terminal_size((120, 40)).columns
    console = Console(file=io.StringIO(), width=max(width, 60), color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def clip(text: str, length: int = 48) -> str:
    """``text``, cut to ``length``."""
    return text if len(text) <= length else text[:length - 1] + "…"


def _table(*columns: str, wide: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in columns:
        number = name in ("calls", "time", "share", "replaced", "shapes")
        table.add_column(name, justify="right" if number else "left", no_wrap=name not in wide, overflow="ellipsis" if name not in wide else "fold")
    return table


def _more(rows: Sequence[Any], limit: int) -> list[Text]:
    return [Text(f"... and {len(rows) - limit} more", style="dim")] if len(rows) > limit else []


def _sum(rows: Sequence[Row]) -> str:
    calls = sum(r.calls for r in rows)
    return f"{_count(len({r.label[0] for r in rows}), 'overload')}, {_count(calls, 'call')}, {seconds(sum(r.time_s for r in rows))}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def headline(report: Report) -> list[str]:
    """What was seen, and the coverage, in two lines."""
    compute = sum(r.calls for r in report.compute)
    environment = report.environment
    where = f" on {environment['device']}, torch {environment['torch']}" if "device" in environment and "torch" in environment else ""
    lines = [f"{_count(report.calls, 'call')}, {compute:,} of them compute, in {seconds(report.wall_s)}{where}"]
    if compute and environment.get("interpreter"):
        c = report.coverage
        lines.append(f"coverage of compute: {percent(c.calls)} of calls, {percent(c.bytes)} of bytes")
    elif compute:
        c = report.coverage
        kind = "device time" if environment.get("timing") == "device" else "time"
        lines.append(f"coverage of compute: {percent(c.calls)} of calls, {percent(c.time)} of {kind}, {percent(c.bytes)} of bytes")
    else:
        lines.append("no call that computes was seen: is the model run inside the block?")
    return lines


def render(report: Report, by: str = "overload", limit: int = LIMIT) -> Any:
    """The report as something rich can print.

    Args:
        by: what the rows of the replaced and passed-through tables stand for: ``"overload"``, ``"op"``, ``"shape"``;
            ``"module"`` shows the module table in full.
        limit: rows of each table.
    """
    parts: list[Any] = [Text("gemsmode report", style="bold")]
    parts += [Text(line) for line in headline(report)]
    total = sum(r.time_s for r in report.compute) or 1.0
    rows_by = "overload" if by == "module" else by
    for build in (_replaced, _failed, _passed):
        parts += build(report, rows_by, limit, total)
    views = report.rows("overload", ["view"])
    if views:
        names = ", ".join(f"{short(row.label[0])} {row.calls}"
                          for row in sorted(views, key=lambda r: (-r.calls, r.label))[:6])
        calls = sum(r.calls for r in views)
        parts += [Text(), Text.assemble(("Views, allocations, metadata", "bold"),
                                        f" (not in the figures above): {_count(calls, 'call')}, "
                                        f"{seconds(sum(r.host_s for r in views))} of host time: {names}"
                                        + (", ..." if len(views) > 6 else ""))]
    parts += _module_part(report, limit if by != "module" else 10**9, None if by == "module" else 3, total)
    for note in report.notes:
        parts += [Text(), Text.assemble(("note: ", "bold yellow"), note)]
    return Group(*parts)


def _named(row: Row, by: str) -> list[str]:
    return [short(row.label[0]), row.label[1]] if by == "shape" else [short(row.label[0])]


def _replaced(report: Report, by: str, limit: int, total: float) -> list[Any]:
    rows = report.rows(by, ["rule"])
    if not rows:
        return [Text(), Text.assemble(("Replaced", "bold green"), ": nothing")] if report.compute else []
    names = ["op" if by == "op" else "overload", *(["arguments"] if by == "shape" else [])]
    rated = not report.environment.get("interpreter") and any(rate(row) for row in rows)
    table = _table(*names, "rule", "calls", "time", "share", *(["rate"] if rated else []), "dtypes", wide=("arguments", "dtypes"))
    for row in rows[:limit]:
        rules = ", ".join(dict.fromkeys(r.rule or "" for r in row.records))
        table.add_row(*_named(row, by), rules, f"{row.calls:,}", seconds(row.time_s), percent(row.time_s / total),
                      *([rate(row)] if rated else []), ", ".join(row.dtypes))
    return [Text(), Text.assemble(("Replaced", "bold green"), f" by Triton kernels: {_sum(rows)}"), table, *_more(rows, limit)]


def _passed(report: Report, by: str, limit: int, total: float) -> list[Any]:
    rows = report.rows(by, ["pass"])
    if not rows:
        return []
    table = _table("op" if by == "op" else "overload", "calls", "time", "share", "why", "shapes", "most often", wide=("why",))
    for row in rows[:limit]:
        reasons = "; ".join(dict.fromkeys(r.reason or "" for r in row.records))
        often = row.label[1] if by == "shape" else row.usual_shapes[0]
        table.add_row(short(row.label[0]), f"{row.calls:,}", seconds(row.time_s), percent(row.time_s / total), reasons,
                      str(len(row.shapes)), clip(often))
    return [Text(), Text.assemble(("What to write next", "bold yellow"), f": passed through to PyTorch, {_sum(rows)}"), table, *_more(rows, limit)]


def _failed(report: Report, by: str, limit: int, total: float) -> list[Any]:
    rows = report.rows(by, ["error"])
    if not rows:
        return []
    table = _table("overload", "rule", "calls", "error", wide=("error",))
    for row in rows[:limit]:
        table.add_row(short(row.label[0]), ", ".join(dict.fromkeys(r.rule or "" for r in row.records)), f"{row.calls:,}",
                      "; ".join(dict.fromkeys(r.reason or "" for r in row.records)))
    return [Text(), Text.assemble(("Failed", "bold red"), f", PyTorch's own ran instead: {_sum(rows)}"), table, *_more(rows, limit)]


def _module_part(report: Report, limit: int, depth: int | None, total: float) -> list[Any]:
    rows = report.modules(depth)
    if not any(row.label[0] != "(no module)" for row in rows):
        return []
    table = _table("module", "phase", "calls", "replaced", "time", "share", wide=("module",))
    for row in rows[:limit]:
        table.add_row(row.label[0], row.label[1], f"{row.calls:,}", percent(row.replaced / row.calls), seconds(row.time_s), percent(row.time_s / total))
    return [Text(), Text.assemble(("Modules", "bold"), ": compute in each, with everything below it"), table, *_more(rows, limit)]


def difference(diff: Difference, limit: int = LIMIT) -> Any:
    """A :class:`~gemsmode.tracing.report.Difference` as something rich can print."""
    parts: list[Any] = [Text("gemsmode report: difference", style="bold")]
    for name, report in (("before", diff.before), ("after", diff.after)):
        c, e = report.coverage, report.environment
        time = sum(r.time_s for r in report.compute)
        where = ", ".join(str(e[k]) for k in ("device", "torch", "gemsmode") if k in e)
        parts.append(Text(f"{name}: {_count(report.calls, 'call')}, compute {seconds(time)}, "
                          f"coverage {percent(c.calls)} of calls, {percent(c.time)} of time ({where})"))
    changed = [c for c in diff.changes if c.calls_before != c.calls_after or c.decision_before != c.decision_after or c.time_before != c.time_after]
    if not changed:
        return Group(*parts, Text(), Text("no difference"))
    table = _table("overload", "decision", "calls", "time", "change", wide=("decision",))
    for c in changed[:limit]:
        decision = f"{c.decision_before or 'absent'} -> {c.decision_after or 'absent'}" if c.decision_before != c.decision_after else c.decision_after or ""
        calls = f"{c.calls_before:,} -> {c.calls_after:,}" if c.calls_before != c.calls_after else f"{c.calls_after:,}"
        delta = c.time_after - c.time_before
        change = f"{'+' if delta >= 0 else '-'}{seconds(abs(delta))}"
        if c.time_before and c.time_after:
            change += f" ({c.time_after / c.time_before:.2f}x)"
        table.add_row(short(c.overload), decision, calls, f"{seconds(c.time_before)} -> {seconds(c.time_after)}", change)
    return Group(*parts, Text(), table, *_more(changed, limit))
