"""A report as one self-contained page, and as what a notebook shows.

The page holds the report's own JSON (between ``<script id="report">``), so that :meth:`Report.from_dict` could read
it; its script builds the treemap and the tables, and loads nothing.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from gemsmode.tracing import sections as content
from gemsmode.tracing.files import MARKER
from gemsmode.tracing.report import Report, Row
from gemsmode.tracing.sections import NUMBERS

_TEMPLATE = Path(__file__).parent / "page.html"


def _table(columns: Any, rows: Any) -> str:
    def cells(tag: str, values: Any) -> str:
        sides = ("right" if c in NUMBERS else "left" for c in columns)
        return "".join(f'<{tag} style="text-align:{side}">{escape(value)}</{tag}>' for side, value in zip(sides, values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"


def fragment(report: Report, limit: int = 10) -> str:
    """HTML without scripts, for a notebook's output."""
    parts = ["<div><b>gemsmode report</b>", *(f"<div>{escape(line)}</div>" for line in content.headline(report))]
    for section in content.sections(report, limit=limit):
        parts.append(f"<p><b>{escape(section.heading)}</b>{': ' + escape(section.text) if section.text else ''}</p>")
        if section.columns:
            parts.append(_table(section.columns, section.rows))
        if section.left_out:
            parts.append(f"<div>... and {section.left_out} more</div>")
    parts += [f"<p><i>note: {escape(note)}</i></p>" for note in report.notes]
    return "".join([*parts, "</div>"])


def _row(row: Row, **labels: str) -> dict[str, Any]:
    flops = sum((r.flops or 0) * r.calls for r in row.records)
    return {**labels, "calls": row.calls, "time": row.time_s, "host": row.host_s, "bytes": row.touched, "flops": flops}


def _data(report: Report) -> dict[str, Any]:
    """What the page's script needs: rows of each table, and the leaves of the treemap."""
    overloads, shapes = [], []
    dry = content.is_dry(report)

    def rate(row: Row) -> str:
        return "" if report.environment.get("interpreter") else content.rate(row)

    for row in report.rows("overload"):
        overload, decision, rule, reason = row.label
        overloads.append(_row(row, overload=overload, decision=decision, rule=rule, why=reason, dtypes=", ".join(row.dtypes),
                              shapes=str(len(row.shapes)), often=row.usual_shapes[0], rate=rate(row)))
    for row in report.rows("shape"):
        overload, inputs, decision, rule, reason = row.label
        shapes.append(_row(row, overload=overload, arguments=inputs, decision=decision, rule=rule, why=reason, rate=rate(row)))
    modules = [_row(row, module=row.label[0], phase=row.label[1], replaced=f"{row.replaced / row.calls:.1%}") for row in report.modules()]
    leaves: dict[tuple[str, ...], list[float]] = {}
    for record in report.compute:
        path = record.phase, record.module or "(no module)", content.short(record.overload), record.decision
        total = leaves.setdefault(path, [0.0, 0.0])
        total[0] += record.touched * record.calls if dry else record.time_s
        total[1] += record.calls
    # What a call costs: its time, or the bytes of its arguments where none was run.
    return {"overloads": overloads, "shapes": shapes, "modules": modules, "cost": "bytes" if dry else "time",
            "host": report.environment.get("timing") == "device",
            "leaves": [[*path, cost, calls] for path, (cost, calls) in leaves.items()]}


def _embedded(value: Any) -> str:
    # "</script>" and "<!--" inside a string must not end or hide the script element.
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def page(report: Report) -> str:
    """The whole page."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in content.headline(report))
    for section in content.sections(report, limit=None):
        if section.heading == "Verified":
            lines += f"<h2>Verified</h2><p>{escape(section.text)}</p><div class=\"scroll\">{_table(section.columns, section.rows)}</div>"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    about = escape(", ".join(f"{key} {value}" for key, value in report.environment.items()))
    what = "bytes go" if content.is_dry(report) else "time goes"
    parts = {"WHAT": what, "MARKER": MARKER, "HEAD": lines, "NOTES": notes, "ABOUT": about,
             "REPORT": _embedded(report.to_dict()), "DATA": _embedded(_data(report))}
    # In one pass, so that a report's own text is never taken for a place to fill.
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], _TEMPLATE.read_text(encoding="utf-8"))
