"""Rows as text: a line while a run goes on, tables in plain text, Markdown and CSV, and the comparison of two results."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

CPU_NOTE = ("No GPU: sizes are scaled down, kernels run in an interpreter and times are wall times. "
            "These figures show that the cases run; they say nothing about speed.")

COLUMNS = ("case", "eager us", "gemsmode us", "spread", "ratio", "goal", "GB/s", "% copy", "TFLOP/s", "% peak", "error eager",
           "error gemsmode",
           "first s", "peak MB", "intercepted")


def number(value: Any, form: str = "{:.3g}") -> str:
    """``value`` in ``form``; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return form.format(value)


def _time(entry: Mapping[str, Any]) -> Any:
    for key in ("device_us", "wall_us", "host_us", "extra_us"):
        if key in entry:
            return entry[key]
    return None


def cells(row: Row) -> list[str]:
    """A row's cells under :data:`COLUMNS`."""
    eager, gems = row["providers"].get("eager", {}), row["providers"].get("gemsmode", {})
    shown = gems if gems and "error" not in gems else eager
    verdict = row.get("intercepted", "-")
    if verdict in ("no", "partly"):
        reasons = [f"{d['overload']}: {d['reason']}" for d in row["decisions"] if d["kind"] != "rule"]
        verdict += f" ({'; '.join(reasons)[:70]})"
    broken = [f"{limit['figure']} {number(limit['value'])} > {number(limit['limit'])}" for limit in row.get("at_most") or ()
              if not limit["kept"]]
    if broken:
        verdict += f" ({'; '.join(broken)})"
    error = row.get("error") or gems.get("error")
    if error:
        verdict = f"ERROR {error[:90]}"
    if row.get("skipped"):
        verdict = f"left out: {row['skipped']}"
    spread = gems.get("spread")
    peak = shown.get("peak_bytes")
    return [row["case"], number(_time(eager), "{:.4g}"), number(_time(gems), "{:.4g}"), number(spread, "{:.1%}"),
            number(row.get("ratio"), "{:.2f}"), number(row.get("goal"), "{:.2f}"), number(shown.get("gb_s"), "{:.0f}"),
            number(shown.get("of_copy"), "{:.0%}"), number(shown.get("tflop_s"), "{:.1f}"), number(shown.get("of_peak"), "{:.0%}"),
            number(eager.get("error_vs_reference"), "{:.1e}"), number(gems.get("error_vs_reference"), "{:.1e}"),
            number(gems.get("first_s"), "{:.2f}"), number(None if peak is None else peak / 1e6, "{:.0f}"), verdict]


def others_of(rows: Sequence[Row]) -> list[str]:
    """The providers in ``rows`` beside eager and gemsmode."""
    return [p for p in dict.fromkeys(p for r in rows for p in r["providers"]) if p not in ("eager", "gemsmode")]


def _other_cells(row: Row, others: Sequence[str]) -> list[str]:
    found = []
    for p in others:
        entry = row["providers"].get(p, {})
        found += [number(_time(entry), "{:.4g}"), number((row.get("ratios") or {}).get(p), "{:.2f}")]
    return found


def progress_line(row: Row) -> str:
    """One line while a run goes on."""
    if row["group"] == "start" and not row.get("error"):
        figures = "  ".join(f"{k} {number(v)}" for k, v in row["providers"]["gemsmode"].items())
        return f"{row['case']:<44} {figures}"
    values = dict(zip(COLUMNS, cells(row)))
    others = "".join(f"  {p} {number(value, '{:.2f}')}" for p, value in (row.get("ratios") or {}).items() if p != "gemsmode")
    return (f"{values['case']:<44} eager {values['eager us']:>8} us  gemsmode {values['gemsmode us']:>8} us  ratio {values['ratio']:>5}"
            f"{others}  {values['% copy']:>5} copy  {values['% peak']:>5} peak  {values['intercepted']}")


def heading(environment: Mapping[str, Any], peaks: Mapping[str, float]) -> str:
    """What the rows were measured on, in a line or two."""
    where = environment.get("gpu") or "CPU only"
    text = (f"{where}, driver {environment.get('driver') or '-'}, torch {environment['torch']}, triton {environment['triton']}, "
            f"gemsmode {environment['commit']}, {environment['date']}")
    if peaks:
        text += "\n" + ", ".join(f"{n}: {v / 1e12:.2f} {'TB/s' if n == 'copy' else 'TFLOP/s'}" for n, v in peaks.items())
    return text if environment.get("gpu") else f"{text}\n{CPU_NOTE}"


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


OF_HOST = ("tiny", "growing", "start")
"""Groups whose figures are host time; in the others (but ``model``) it is device time."""

FASTEST = 0.98
"""What ``prefer="fastest"`` is to keep of eager's speed in every case, in device time."""


def closing(rows: Sequence[Row]) -> str:
    """How many cases were intercepted, reached their goal or failed, and the mean ratio by group and of each provider."""
    lines = []
    for group in dict.fromkeys(r["group"] for r in rows):
        mine = [r for r in rows if r["group"] == group]
        ruled = [r for r in mine if r.get("intercepted") == "yes" and r.get("ratio")]
        mean = number(geometric_mean([r["ratio"] for r in ruled]), "{:.2f}")
        reached = sum(r["ratio"] >= r["goal"] for r in ruled if r.get("goal"))
        failed = sum(bool(r.get("error") or r["providers"].get("gemsmode", {}).get("error")) for r in mine)
        lines.append(f"{group:<12} {len(mine):>4} cases, {len(ruled):>4} intercepted with a ratio, geometric mean {mean}, "
                     f"{reached} of {sum(bool(r.get('goal')) for r in ruled)} goals reached, {failed} failed")
        left_out = sum(bool(r.get("skipped")) for r in mine)
        if left_out:
            lines[-1] += f", {left_out} left out"
    ops = [r for r in rows if r["group"] not in (*OF_HOST, "model") and not r.get("scaled_down")]
    for provider in ["gemsmode", *others_of(rows)]:
        ratios = {r["case"]: _ratios(r)[provider] for r in ops if _ratios(r).get(provider)}
        if not ratios:
            continue
        below = [f"{name} ({ratio:.2f})" for name, ratio in sorted(ratios.items(), key=lambda item: item[1]) if ratio < FASTEST]
        named = ": " + ", ".join(below[:8]) + (", ..." if len(below) > 8 else "") if below else ""
        lines.append(f"{provider}: geometric mean of {len(ratios)} op cases {number(geometric_mean(list(ratios.values())), '{:.3f}')}, "
                     f"{len(below)} below {FASTEST}{named}")
    limits = [limit for r in rows for limit in r.get("at_most") or ()]
    if limits:
        lines.append(f"{sum(limit['kept'] for limit in limits)} of {len(limits)} limits kept")
    return "\n".join(lines)


def _ratios(row: Row) -> dict[str, float]:
    """Eager's time by each provider's own; of results from before there were others, gemsmode's."""
    return row.get("ratios") or ({"gemsmode": row["ratio"]} if row.get("ratio") else {})


def table(rows: Sequence[Row]) -> str:
    """An aligned plain table."""
    others = others_of(rows)
    columns = [*COLUMNS[:-1], *(name for p in others for name in (f"{p} us", "ratio")), COLUMNS[-1]]
    grid = [columns, *([*cells(r)[:-1], *_other_cells(r, others), cells(r)[-1]] for r in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    left = ("case", "intercepted")
    aligned = [[c.ljust(w) if name in left else c.rjust(w) for name, c, w in zip(columns, line, widths)] for line in grid]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as Markdown, a table a group."""
    parts = [heading(result["environment"], result["peaks"]).replace("\n", "  \n")]
    rows: list[Row] = result["rows"]
    for group in dict.fromkeys(r["group"] for r in rows):
        lines = [f"### {group}", "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in cells(r)) + " |" for r in rows if r["group"] == group]
        others = others_of([r for r in rows if r["group"] == group])
        if others:
            lines += ["", "| case | " + " | ".join(f"{p} us | ratio" for p in others) + " |", "|---" + "|---:" * 2 * len(others) + "|"]
            lines += [f"| {r['case']} | " + " | ".join(_other_cells(r, others)) + " |" for r in rows if r["group"] == group]
        parts.append("\n".join(lines))
    parts.append("```\n" + closing(rows) + "\n```")
    return "\n\n".join(parts) + "\n"


def to_csv(result: Mapping[str, Any]) -> str:
    """One line a case and provider, with everything that was measured."""
    own = ("case", "group", "op", "dtype", "call", "origin", "bytes", "flops", "goal", "intercepted", "error", "skipped", "gpu", "driver",
           "torch", "triton", "gemsmode", "commit", "at", "scaled_down")
    measured = ("device_us", "wall_us", "kernel_us", "low_us", "high_us", "runs", "host_us", "over_eager_us", "new_us", "again_us",
                "extra_us", "compiled", "gb_s", "of_copy", "tflop_s", "of_peak", "error_vs_reference", "first_s", "peak_bytes",
                "import_s", "load_s", "first_call_s", "again_first_call_s", "compiled_again")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*own, "provider", "ratio", *measured, "provider_error"))
    for row in result["rows"]:
        for provider, entry in row["providers"].items():
            writer.writerow((*(row.get(k) for k in own), provider, _ratios(row).get(provider), *(entry.get(k) for k in measured),
                             entry.get("error")))
    return text.getvalue()


def compare(base: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Case by case how gemsmode's time has changed from ``base`` to ``new``.

    The same GPU may be hotter or shared: next to the plain factor stands the one corrected by eager's own change. A
    change is marked when it is larger than both spreads together.
    """
    before = {r["case"]: r for r in base["rows"]}
    lines = [f"base: {heading(base['environment'], {})}", f"new:  {heading(new['environment'], {})}", "",
             f"{'case':<44} {'base us':>10} {'new us':>10} {'faster':>7} {'corrected':>9} {'ratio':>13}"]
    factors = []
    for row in new["rows"]:
        old = before.get(row["case"])
        if old is None:
            lines.append(f"{row['case']:<44} new case")
            continue
        was, now = (_time(r["providers"].get("gemsmode", {})) for r in (old, row))
        if not was or not now:
            lines.append(f"{row['case']:<44} not measured in {'both' if not was and not now else 'base' if not was else 'new'}")
            continue
        eager_was, eager_now = (_time(r["providers"].get("eager", {})) for r in (old, row))
        factor = was / now
        corrected = factor * eager_now / eager_was if eager_was and eager_now else None
        noise = sum(r["providers"]["gemsmode"].get("spread", 0.0) for r in (old, row)) + 0.02
        judged = corrected if corrected is not None else factor
        mark = "  FASTER" if judged > 1 + noise else "  SLOWER" if judged < 1 / (1 + noise) else ""
        factors.append(judged)
        ratios = f"{number(old.get('ratio'), '{:.2f}'):>6}->{number(row.get('ratio'), '{:.2f}')}"
        lines.append(f"{row['case']:<44} {was:>10.4g} {now:>10.4g} {factor:>7.2f} {number(corrected, '{:.2f}'):>9} {ratios}{mark}")
    gone = [name for name in before if name not in {r["case"] for r in new["rows"]}]
    lines += [f"{name:<44} gone" for name in gone]
    mean = number(geometric_mean(factors), "{:.3f}")
    lines += ["", f"{len(factors)} cases compared, geometric mean {mean} times as fast"]
    return "\n".join(lines)
