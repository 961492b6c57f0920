"""A report as one self-contained page, and as what a notebook shows.

The page holds the report's own JSON (between ``<script id="report">``), so that :meth:`Report.from_dict` could read
it; its script builds the treemap and the tables, and loads nothing.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from gemsmode.tracing import sections as content
from gemsmode.tracing.files import MARKER
from gemsmode.tracing.report import Report, Row
from gemsmode.tracing.sections import NUMBERS


def _table(columns: Any, rows: Any) -> str:
    def cells(tag: str, values: Any) -> str:
        return "".join(f'<{tag} style="text-align:{"right" if c in NUMBERS else "left"}">{escape(v)}</{tag}>' for c, v in zip(columns, values))

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
    return {**labels, "calls": row.calls, "time": row.time_s, "host": row.host_s, "rate": content.rate(row)}


def _data(report: Report) -> dict[str, Any]:
    """What the page's script needs: rows of each table, and the leaves of the treemap."""
    overloads, shapes = [], []
    for row in report.rows("overload"):
        overload, decision, rule, reason = row.label
        overloads.append(_row(row, overload=overload, decision=decision, rule=rule, why=reason, dtypes=", ".join(row.dtypes),
                              shapes=str(len(row.shapes)), often=row.usual_shapes[0]))
    for row in report.rows("shape"):
        overload, inputs, decision, rule, reason = row.label
        shapes.append(_row(row, overload=overload, arguments=inputs, decision=decision, rule=rule, why=reason))
    modules = [_row(row, module=row.label[0], phase=row.label[1], replaced=f"{row.replaced / row.calls:.1%}") for row in report.modules()]
    leaves: dict[tuple[str, ...], list[float]] = {}
    for record in report.compute:
        path = record.phase, record.module or "(no module)", content.short(record.overload), record.decision
        total = leaves.setdefault(path, [0.0, 0.0])
        total[0] += record.time_s
        total[1] += record.calls
    return {"overloads": overloads, "shapes": shapes, "modules": modules,
            "leaves": [[*path, time, calls] for path, (time, calls) in leaves.items()]}


def _embedded(value: Any) -> str:
    # "</script>" and "<!--" inside a string must not end or hide the script element.
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def page(report: Report) -> str:
    """The whole page."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in content.headline(report))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    about = escape(", ".join(f"{key} {value}" for key, value in report.environment.items()))
    return _PAGE.replace("@MARKER@", MARKER).replace("@HEAD@", lines).replace("@NOTES@", notes).replace("@ABOUT@", about) \
        .replace("@REPORT@", _embedded(report.to_dict())).replace("@DATA@", _embedded(_data(report)))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="@MARKER@">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>gemsmode report</title>
<style>
:root { --ink: #1c2024; --soft: #667078; --line: #dde1e5; --page: #fff; --band: #f5f7f8; --good: #2f8f5b; --open: #d98a1f; --bad: #c8402f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #98a1a9; --line: #353b41; --page: #16191c; --band: #1f2327; --good: #3aa56c; --open: #c98528; --bad: #d8604f; }
}
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; max-width: 1400px; padding: 1rem 1.5rem 3rem; }
h1 { font-size: 1.3rem; margin: .2rem 0 .4rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; } p { margin: .15rem 0; }
.note { color: var(--open); } .soft, footer { color: var(--soft); }
.key span { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
#map { position: relative; height: 420px; border: 1px solid var(--line); border-radius: 4px; overflow: hidden; }
#map div { position: absolute; overflow: hidden; box-sizing: border-box; border: 1px solid var(--page); color: #fff; font-size: 11px; line-height: 1.25;
  padding: 1px 3px; white-space: nowrap; cursor: default; }
#map div.group { cursor: zoom-in; background: var(--band); color: var(--ink); border-color: var(--line); }
.rule { background: var(--good); } .pass { background: var(--open); } .error { background: var(--bad); }
nav { display: flex; gap: .4rem; align-items: center; flex-wrap: wrap; margin: .4rem 0; }
button { font: inherit; color: inherit; background: var(--band); border: 1px solid var(--line); border-radius: 4px; padding: .2rem .7rem; cursor: pointer; }
button[aria-pressed=true] { border-color: var(--ink); font-weight: 600; }
input { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 4px; padding: .2rem .5rem; min-width: 16rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; cursor: pointer; user-select: none; white-space: nowrap; border-bottom: 2px solid var(--line); padding: .25rem .6rem .25rem 0; }
td { border-bottom: 1px solid var(--line); padding: .2rem .6rem .2rem 0; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; } td.code { font-family: ui-monospace, monospace; font-size: 12.5px; }
.tag { color: #fff; border-radius: 3px; padding: 0 .4em; font-size: 12px; } .tag.view { background: var(--soft); }
</style></head><body>
<h1>gemsmode report</h1>@HEAD@@NOTES@
<h2>Where the time goes</h2>
<p class="key"><span><i class="rule"></i>replaced by a Triton kernel</span><span><i class="pass"></i>passed through to PyTorch</span><span><i class="error"></i>a rule
failed</span> <span class="soft" id="crumbs"></span></p>
<div id="map" role="img" aria-label="Treemap of time by phase, module and op"></div>
<h2>Calls</h2>
<nav id="tabs"></nav><div class="scroll"><table id="table"></table></div>
<footer><p>@ABOUT@</p></footer>
<script type="application/json" id="report">@REPORT@</script>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const total = data.leaves.reduce((sum, leaf) => sum + leaf[4], 0) || 1;
const seconds = t => t >= 1 ? t.toPrecision(3) + " s" : t >= 1e-3 ? (t * 1e3).toPrecision(3) + " ms" : (t * 1e6).toPrecision(3) + " us";
const make = (tag, text, kind) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (kind) e.className = kind; return e; };

// -- treemap: phase, then the module's path, then the op
function tree() {
  const root = { name: "all", path: [], time: 0, calls: 0, children: new Map() };
  for (const [phase, module, op, decision, time, calls] of data.leaves) {
    let node = root; node.time += time; node.calls += calls;
    for (const part of [phase, ...module.split("."), op + " " + decision]) {
      if (!node.children.has(part)) node.children.set(part, { name: part, path: [...node.path, part], time: 0, calls: 0, children: new Map() });
      node = node.children.get(part); node.time += time; node.calls += calls;
    }
    node.name = op; node.decision = decision;
  }
  return root;
}
// Squarified: rows of rectangles along the shorter side, each row as long as its worst ratio improves.
function squarify(items, x, y, w, h, place) {
  let rest = items.filter(n => n.time > 0).sort((a, b) => b.time - a.time);
  let left = rest.reduce((s, n) => s + n.time, 0);
  while (rest.length && w > 0 && h > 0) {
    const side = Math.min(w, h), scale = w * h / left;
    let row = [], sum = 0, worst = Infinity;
    for (const n of rest) {
      const next = sum + n.time, least = Math.min(n.time, ...row.map(r => r.time)), most = Math.max(n.time, ...row.map(r => r.time));
      const thick = next * scale / side, ratio = Math.max(most * scale / thick / thick, thick * thick / (least * scale));
      if (row.length && ratio > worst) break;
      row.push(n); sum = next; worst = ratio;
    }
    const thick = sum * scale / side; let at = 0;
    for (const n of row) {
      const length = n.time * scale / thick;
      if (w >= h) place(n, x, y + at, thick, length); else place(n, x + at, y, length, thick);
      at += length;
    }
    if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
    rest = rest.slice(row.length); left -= sum;
  }
}
const map = document.getElementById("map"), root = tree();
let shown = root;
function draw(node, x, y, w, h) {
  if (w < 3 || h < 3) return;
  const box = make("div", w > 28 && h > 12 ? node.name : undefined, node.decision || "group");
  Object.assign(box.style, { left: x + "px", top: y + "px", width: w + "px", height: h + "px" });
  box.title = node.path.slice(0, node.decision ? -1 : undefined).join(" / ") + (node.decision ? " / " + node.name + " (" + node.decision + ")" : "") +
    "\\n" + seconds(node.time) + ", " + (100 * node.time / total).toFixed(1) + "%, " + node.calls + " calls";
  if (!node.decision) box.addEventListener("click", event => { event.stopPropagation(); shown = node; drawMap(); });
  map.append(box);
  if (node.children.size) squarify([...node.children.values()], x + 2, y + 16, w - 4, h - 18, draw);
}
function drawMap() {
  map.replaceChildren();
  while (shown.children.size === 1 && ![...shown.children.values()][0].decision) shown = [...shown.children.values()][0];
  draw(shown, 0, 0, map.clientWidth, map.clientHeight);
  const crumbs = document.getElementById("crumbs"); crumbs.replaceChildren(make("span", shown.path.join(" / ")));
  if (shown.path.length) { const up = make("button", "show all"); up.onclick = () => { shown = root; drawMap(); }; if (shown !== root) crumbs.append(up); }
}
drawMap(); addEventListener("resize", drawMap);

// -- tables
const share = row => row.time / total;
const columns = {
  overload: ["overload"], op: ["overload"], arguments: ["arguments"], often: ["most often"], module: ["module"], phase: ["phase"], decision: ["decision"],
  rule: ["rule"], why: ["why"], dtypes: ["dtypes"], shapes: ["shapes", r => +r.shapes], replaced: ["replaced", r => parseFloat(r.replaced)],
  calls: ["calls", r => r.calls], time: ["time", r => r.time, r => seconds(r.time)], host: ["host time", r => r.host, r => seconds(r.host)],
  share: ["share", share, r => r.decision === "view" ? "" : (100 * share(r)).toFixed(1) + "%"], rate: ["rate", r => parseFloat(r.rate) || 0, r => r.rate],
};
const tabs = {
  "By overload": [data.overloads, ["overload", "decision", "rule", "calls", "time", "share", "host", "rate", "why", "dtypes", "shapes", "often"]],
  "By shape": [data.shapes, ["overload", "arguments", "decision", "rule", "calls", "time", "share", "host", "rate", "why"]],
  "By module": [data.modules, ["module", "phase", "calls", "replaced", "time", "share", "host"]],
};
const state = { tab: "By overload", sort: "time", down: true, filter: "" };
const code = new Set(["overload", "arguments", "often", "module"]);
function drawTable() {
  const [rows, keys] = tabs[state.tab], table = document.getElementById("table");
  if (!keys.includes(state.sort)) state.sort = "time";
  const value = (row, key) => columns[key][1] ? columns[key][1](row) : row[key] ?? "";
  const words = state.filter.toLowerCase().split(" ").filter(w => w);
  const kept = rows.filter(r => { const text = keys.map(k => r[k] ?? "").join(" ").toLowerCase(); return words.every(w => text.includes(w)); });
  kept.sort((a, b) => {
    const p = value(a, state.sort), q = value(b, state.sort), order = p < q ? -1 : p > q ? 1 : 0;
    return state.down ? -order : order;
  });
  const head = make("tr");
  for (const key of keys) {
    const cell = make("th", columns[key][0] + (key === state.sort ? (state.down ? " \\u25be" : " \\u25b4") : ""), columns[key][1] ? "number" : "");
    cell.setAttribute("aria-sort", key !== state.sort ? "none" : state.down ? "descending" : "ascending");
    cell.onclick = () => { state.down = key === state.sort ? !state.down : !!columns[key][1]; state.sort = key; drawTable(); };
    head.append(cell);
  }
  const body = make("tbody");
  for (const row of kept) {
    const line = make("tr");
    for (const key of keys) {
      const text = columns[key][2] ? columns[key][2](row) : String(row[key] ?? "");
      const cell = make("td", key === "decision" ? undefined : text, columns[key][1] ? "number" : code.has(key) ? "code" : "");
      if (key === "decision") cell.append(make("span", text, "tag " + text));
      line.append(cell);
    }
    body.append(line);
  }
  const top = make("thead"); top.append(head); table.replaceChildren(top, body);
}
const nav = document.getElementById("tabs");
for (const name of Object.keys(tabs)) {
  const button = make("button", name);
  button.setAttribute("aria-pressed", name === state.tab);
  button.onclick = () => {
    state.tab = name; drawTable();
    for (const other of nav.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
  };
  nav.append(button);
}
const field = make("input"); field.type = "search"; field.placeholder = "filter: words, e.g. pass softmax"; field.setAttribute("aria-label", "filter rows");
field.oninput = () => { state.filter = field.value; drawTable(); };
nav.append(field); drawTable();
</script></body></html>
"""
