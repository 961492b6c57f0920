"""A result as a picture: a roofline and the speed-up of each case as bars, in one SVG that needs no library.

In the roofline each case is a point: operations for each byte that has to move, against operations a second. Where a case
states no operations, one for each element that has to move is counted. The slope is the measured copy bandwidth, the levels
are the measured matrix peaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from perf.cases import DTYPES
from perf.results import OF_HOST, Row, geometric_mean, heading

WIDTH, LEFT, RIGHT, ROW = 960, 300, 70, 15
ROOF_HEIGHT = 420
COLOURS = {"pointwise": "#4477aa", "reduction": "#228833", "matmul": "#cc3311", "attention": "#ee7733", "movement": "#66ccee",
           "indexing": "#aa3377", "random": "#999933", "sorting": "#882255", "vision": "#44aa99", "optimizer": "#555555",
           "model": "#000000", "tiny": "#bbbbbb"}


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#999999", more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


class _Log:
    """A logarithmic scale from whole powers of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.high += self.high == self.low
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        return [10.0**n for n in range(self.low, self.high + 1)]


def points(rows: Sequence[Row]) -> list[tuple[Row, float, float]]:
    """For each row with a device time: the row, operations a byte, and operations a second under gemsmode."""
    found = []
    for row in rows:
        us = row["providers"].get("gemsmode", {}).get("device_us")
        moved, work = row.get("bytes") or row.get("touched"), row.get("flops")
        if us and moved:
            work = work or moved / DTYPES[row["dtype"]].itemsize
            found.append((row, work / moved, work / us * 1e6))
    return found


def _roofline(rows: Sequence[Row], peaks: Mapping[str, float], top: float) -> list[str]:
    shown = points(rows)
    if not shown or not peaks.get("copy"):
        return [_text(20, top + 20, "no case with a device time and counted bytes")]
    bandwidth = peaks["copy"]
    levels = {name: value for name, value in peaks.items() if name != "copy"}
    x = _Log([p[1] for p in shown] + [value / bandwidth for value in levels.values()], 70, WIDTH - RIGHT)
    y = _Log([p[2] for p in shown] + list(levels.values()) + [10**x.low * bandwidth], top + ROOF_HEIGHT - 40, top + 20)
    parts = [_text(70, top + 8, "Roofline: operations a second (up) over operations a byte (right); a point is a case under gemsmode",
                   size=12)]
    for tick in x.ticks:
        parts += [_line(x(tick), y.start, x(tick), y.end, "#eeeeee"), _text(x(tick), y.start + 14, f"{tick:g}", "middle")]
    for tick in y.ticks:
        parts += [_line(x.start, y(tick), x.end, y(tick), "#eeeeee"), _text(x.start - 6, y(tick) + 4, f"{tick / 1e12:g} T", "end")]
    reach = max(levels.values(), default=10**y.high)
    least, most = max(10.0**x.low, 10.0**y.low / bandwidth), min(10.0**x.high, reach / bandwidth)
    parts.append(_line(x(least), y(least * bandwidth), x(most), y(most * bandwidth), "#444444", ' stroke-width="1.5"'))
    parts.append(_text(x(least) + 8, y(least * bandwidth) - 24, f"copy {bandwidth / 1e12:.2f} TB/s"))
    at = -math.inf
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        at = min(y(value) - 4, at - 12) if at > -math.inf else y(value) - 4
        knee = min(max(value / bandwidth, 10.0**x.low), 10.0**x.high)
        parts += [_line(x(knee), y(value), x.end, y(value), "#444444", ' stroke-width="1.5"'),
                  _text(x.end, at, f"{name} {value / 1e12:.0f} TFLOP/s", "end")]
    for row, intensity, rate in shown:
        title = escape(f"{row['case']}: {rate / 1e12:.3g} TFLOP/s at {intensity:.3g} operations a byte")
        parts.append(f'<circle cx="{x(intensity):.1f}" cy="{y(rate):.1f}" r="3.5" fill="{COLOURS.get(row["group"], "#777777")}" '
                     f'fill-opacity="0.7"><title>{title}</title></circle>')
    return parts


def _bars(rows: Sequence[Row], top: float) -> tuple[list[str], float]:
    shown = [r for r in rows if r.get("ratio") and r["group"] != "growing"]
    if not shown:
        return [_text(20, top + 20, "no case with a ratio")], top + 40
    most = max(2.0, *(min(max(r["ratio"], *(r.get("ratios") or {"": 0.0}).values()), 10.0) for r in shown))

    def x(ratio: float) -> float:
        return LEFT + min(ratio, most) / most * (WIDTH - RIGHT - LEFT)

    parts = [_text(20, top, "Speed-up over eager; a tick marks the goal, a ring prefer=\"fastest\"", size=12)]
    y = top + 10
    bottom = y + sum(ROW for _ in shown) + 24 * len({r["group"] for r in shown})
    for ratio in range(0, int(most) + 1):
        colour = "#333333" if ratio == 1 else "#dddddd"
        parts += [_line(x(ratio), y, x(ratio), bottom, colour), _text(x(ratio), y, f"{ratio}x", "middle", 9)]
    for group in dict.fromkeys(r["group"] for r in shown):
        mine = sorted((r for r in shown if r["group"] == group), key=lambda r: -r["ratio"])
        mean = geometric_mean([r["ratio"] for r in mine]) or 0.0
        y += 20
        kind = "host time" if group in OF_HOST else "wall time" if group == "model" else "device time"
        parts.append(_text(20, y, f"{group}: geometric mean {mean:.2f}x in {kind}", size=11, more=' font-weight="bold"'))
        y += 4
        for row in mine:
            colour = COLOURS.get(group, "#777777")
            title = escape(f"{row['case']}: {row['ratio']:.2f}x")
            faint = ' fill-opacity="0.45"' if row["ratio"] < 1 else ""
            parts += [_text(LEFT - 6, y + 11, row["case"], "end", 10),
                      f'<rect x="{LEFT}" y="{y + 2:.1f}" width="{x(row["ratio"]) - LEFT:.1f}" height="{ROW - 4}" fill="{colour}"{faint}>'
                      f"<title>{title}</title></rect>", _text(x(row["ratio"]) + 4, y + 11, f"{row['ratio']:.2f}", size=9)]
            if row.get("goal"):
                parts.append(_line(x(row["goal"]), y + 1, x(row["goal"]), y + ROW - 1, "#000000", ' stroke-width="2"'))
            if (fastest := (row.get("ratios") or {}).get("fastest")) is not None:
                parts.append(f'<circle cx="{x(fastest):.1f}" cy="{y + ROW / 2:.1f}" r="3.5" fill="none" stroke="#000000"/>')
            y += ROW
    return parts, y + 20


def svg(result: Mapping[str, Any]) -> str:
    """The picture of a result."""
    rows = [r for r in result["rows"] if not r.get("error")]
    lines = heading(result["environment"], result["peaks"]).splitlines()
    parts = [_text(20, 20 + 15 * i, line, size=12) for i, line in enumerate(lines)]
    top = 20 + 15 * len(lines) + 10
    parts += _roofline(rows, result["peaks"], top)
    y = top + ROOF_HEIGHT + 10
    x = 70.0
    for group in dict.fromkeys(r["group"] for r, _, _ in points(rows)):
        parts += [f'<circle cx="{x:.1f}" cy="{y - 14:.1f}" r="4" fill="{COLOURS.get(group, "#777777")}"/>', _text(x + 8, y - 10, group)]
        x += 20 + 7 * len(group)
    bars, height = _bars(rows, y + 20)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join([*parts, *bars]) + "\n</svg>\n")
