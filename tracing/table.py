"""A report as rich tables, and as plain text."""

from __future__ import annotations

import io
import shutil
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gemsmode.tracing import sections as content
from gemsmode.tracing.report import Difference, Report
from gemsmode.tracing.sections import FOLDED, NUMBERS, Section

LIMIT = 20
"""Rows shown of each table, unless told otherwise."""

_STYLES = {"good": "bold green", "open": "bold yellow", "bad": "bold red", "": "bold"}


def plain(renderable: Any, width: int | None = None) -> str:
    """Text without colours; as wide as the terminal, or 120 columns."""
    width = width or shutil.get_terminal_size((120, 40)).columns
    console = Console(file=io.StringIO(), width=max(width, 60), color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def _section(section: Section) -> list[Any]:
    heading = Text(section.heading, style=_STYLES[section.tone])
    parts: list[Any] = [Text(), Text.assemble(heading, f": {section.text}" if section.text else "")]
    if section.columns:
        table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
        for i, name in enumerate(section.columns):
            # A number that is cut is another number: names give way first.
            least = max(map(len, (name, *(row[i] for row in section.rows)))) if name in NUMBERS else None
            table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=name not in FOLDED, min_width=least,
                             overflow="fold" if name in FOLDED else "ellipsis")
        for row in section.rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    if section.left_out:
        parts.append(Text(f"... and {section.left_out} more", style="dim"))
    return parts


def render_section(section: Section) -> Any:
    """One section as something rich can print."""
    return Group(*_section(section)[1:])


def render(report: Report, by: str = "overload", limit: int | None = LIMIT) -> Any:
    """The report as something rich can print; see :func:`gemsmode.tracing.sections.sections` for the arguments."""
    parts: list[Any] = [Text("gemsmode report", style="bold"), *map(Text, content.headline(report))]
    for section in content.sections(report, by, limit):
        parts += _section(section)
    for note in report.notes:
        parts += [Text(), Text.assemble(("note: ", "bold yellow"), note)]
    return Group(*parts)


def difference(diff: Difference, limit: int | None = LIMIT) -> Any:
    """A difference of two reports as something rich can print."""
    lines, section = content.difference(diff, limit)
    return Group(Text("gemsmode report: difference", style="bold"), *map(Text, lines), *_section(section))
