"""A report as CSV, Markdown and a Chrome trace."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

from gemsmode.tracing import sections as content
from gemsmode.tracing.files import MARKER
from gemsmode.tracing.report import Record, Report
from gemsmode.tracing.sections import NUMBERS

CSV_COLUMNS = tuple(f.name for f in dataclasses.fields(Record))


def csv_text(report: Report) -> str:
    """One line per record, with the columns of :class:`~gemsmode.tracing.report.Record`; lists are joined by spaces."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for record in report.records:
        values = (getattr(record, name) for name in CSV_COLUMNS)
        writer.writerow(["" if v is None else " ".join(v) if isinstance(v, tuple) else v for v in values])
    return out.getvalue()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_text(report: Report) -> str:
    """The tables that ``print`` shows."""
    lines = [f"<!-- {MARKER} -->", "## gemsmode report", ""]
    lines += [line + "  " for line in content.headline(report)]
    for section in content.sections(report):
        lines += ["", f"**{section.heading}**" + (f": {section.text}" if section.text else "")]
        if section.columns:
            lines += ["", "| " + " | ".join(section.columns) + " |",
                      "|" + "|".join("---:" if c in NUMBERS else "---" for c in section.columns) + "|"]
            for row in section.rows:
                cells = [f"`{_cell(v)}`" if c in ("op", "overload", "arguments", "most often", "module") and v else _cell(v)
                         for c, v in zip(section.columns, row)]
                lines.append("| " + " | ".join(cells) + " |")
        if section.left_out:
            lines += ["", f"... and {section.left_out} more"]
    lines += [line for note in report.notes for line in ("", f"> note: {note}")]
    return "\n".join(lines) + "\n"


# -- Chrome trace ------------------------------------------------------------------------------------------------------

_HOST, _DEVICE = 1, 2  # the trace's "processes": one row of threads for each


def _slice(name: str, category: str, start: float, length: float, process: int, thread: int, arguments: str = "{}") -> str:
    """One event, as JSON; ``arguments`` is JSON already."""
    return (f'{{"name": {json.dumps(name)}, "cat": "{category}", "ph": "X", "ts": {start:.3f}, "dur": {length:.3f}, '
            f'"pid": {process}, "tid": {thread}, "args": {arguments}}}')


class _Nest:
    """The slices of phase and modules that are open on one thread, from the path of each call in turn.

    Modules are known by their calls only: two runs of one module with nothing between them are one slice.
    """

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.open: list[tuple[str, float]] = []
        self.end = 0.0

    def move(self, path: list[str], at: float) -> list[str]:
        """Close and open what leads from the last call's path to ``path``; the slices that ended."""
        common = 0
        while common < min(len(path), len(self.open)) and self.open[common][0] == path[common]:
            common += 1
        closed = self.close(common)
        self.open += [(name, at) for name in path[common:]]
        return closed

    def close(self, depth: int = 0) -> list[str]:
        closed = [_slice(name, "module", start, max(self.end - start, 0), _HOST, self.thread) for name, start in self.open[depth:]]
        del self.open[depth:]
        return closed


def chrome_text(report: Report) -> str:
    """The timeline in the Trace Event Format, which Perfetto and ``chrome://tracing`` open; times are in us."""
    if report._timeline is None:
        raise ValueError("this report has no timeline: a report read from a file has none (write the trace from the report "
                         "of the run itself), nor has one of a dry run")
    entries = report._timeline.entries(report._seen)
    origin = entries[0].start if entries else 0
    threads: dict[int, int] = {}
    nests: dict[int, _Nest] = {}
    arguments: dict[int, str] = {}
    events: list[str] = []
    has_device = False
    for entry in entries:
        number = report._numbers.get(entry.row)
        if number is None:  # begun since the report was made
            continue
        record = report.records[number]
        if number not in arguments:
            about = {"decision": record.decision, "rule": record.rule, "reason": record.reason, "inputs": " ".join(record.inputs),
                     "module": record.module}
            arguments[number] = json.dumps({key: value for key, value in about.items() if value})
        name = content.short(record.overload)
        thread = threads.setdefault(entry.thread, len(threads))
        nest = nests.setdefault(thread, _Nest(thread))
        start, length = (entry.start - origin) / 1e3, entry.host_ns / 1e3
        events += nest.move([record.phase, *(record.module.split(".") if record.module else ())], start)
        nest.end = max(nest.end, start + length)
        events.append(_slice(name, record.decision, start, length, _HOST, thread, arguments[number]))
        if entry.device_ns:
            has_device = True
            events.append(_slice(name, record.decision, (entry.device_start - origin) / 1e3, entry.device_ns / 1e3, _DEVICE, thread,
                                 arguments[number]))
    for nest in nests.values():
        events += nest.close()
    for process, name in ((_HOST, "host"), *([(_DEVICE, "device")] if has_device else [])):
        events.append(json.dumps({"name": "process_name", "ph": "M", "pid": process, "args": {"name": f"gemsmode: {name}"}}))
    head = json.dumps({"format": MARKER, **report.environment})
    return f'{{"otherData": {head}, "displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(events) + "\n]}\n"
