"""The tables of the README, made from a kept result: ``python -m perf --table perf/results/h200.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf.results import OF_HOST, Row, geometric_mean, others_of

BEGIN, END = "<!-- begin of what `python -m perf --table` writes -->", "<!-- end of what `python -m perf --table` writes -->"

SHOWN = {
    "mul_row 8192x8192 bf16": "`x * row` 8192x8192 bf16",
    "add_transposed 8192x8192 bf16": "`x + x.t()` 8192x8192 bf16",
    "softmax 16384x4096 bf16": "softmax 16384x4096 bf16",
    "layer_norm_backward 16384x4096 bf16": "layer_norm backward 16384x4096 bf16",
    "rms_norm 16384x4096 bf16": "rms_norm 16384x4096 bf16",
    "cross_entropy 8192x32000 bf16": "cross_entropy 8192x32000 bf16",
    "cumsum 4096x8192 f32": "cumsum 4096x8192 f32",
    "transpose_copy 4x2048x32x128 bf16": "transposed copy 4x2048x32x128 bf16",
    "embedding_backward 8192x32000x4096 bf16": "embedding backward, 8192 tokens x 32000x4096 bf16",
    "mm 8192x8192x8192 bf16": "matrix product 8192x8192x8192 bf16",
    "mm 2048x2048x2048 f32": "matrix product 2048x2048x2048 f32, without TF32",
    "attention_causal 4x32x4096x128 bf16": "causal attention 4x32x4096x128 bf16",
    "adamw 7x4096x11008x32000 bf16": "AdamW step, parameters of a 7-layer Llama",
    "tiny_add 64x64 bf16": "host time of a call, `add` 64x64 bf16",
    "bert_base 32x512 f16": "BERT-base fp16, forward of 32x512",
    "llama2_7b_prefill 1x2048 bf16": "Llama-2-7b bf16, prefill of 2048",
    "llama2_7b_decode 1x512 bf16": "Llama-2-7b bf16, one token",
    "llama_training_step 2x2048 bf16": "4-layer Llama bf16, training step 2x2048",
}
"""The cases that the README names, and what it calls them."""

NAMES = {"fuse": "`fuse=True`", "fastest": '`prefer="fastest"`', "patch": "`patch`", "patch+capture": "`patch` and `capture`",
         "patch+fastest": '`patch` and `prefer="fastest"`', "patch+fastest+capture": '`patch` and `capture(prefer="fastest")`',
         "fastest+capture": '`capture(prefer="fastest")`',
         "capture": "`capture`", "compile": "torch.compile", "flag_gems": "flag_gems",
         "liger_kernel": "liger_kernel"}


def _us(entry: Mapping[str, Any]) -> float | None:
    return next((entry[k] for k in ("device_us", "wall_us", "host_us") if entry.get(k) is not None), None)


def _time(us: float | None) -> str:
    if us is None:
        return ""
    return f"{us / 1e3:.1f} ms" if us >= 10_000 else f"{us:.0f} us" if us >= 20 else f"{us:.1f} us"


def tables(result: Mapping[str, Any]) -> str:
    """The README's account of a result, in Markdown."""
    e, rows = result["environment"], [r for r in result["rows"] if not r.get("error") and not r.get("skipped")]
    commits = list(dict.fromkeys(r.get("commit", e["commit"]) for r in rows))
    lines = [f"One {e['gpu']}, driver {e['driver']}, torch {e['torch']}, triton {e['triton']}, gemsmode at {', '.join(commits)}; device "
             f"time (of models wall time), median, L2 flushed{' and clean' * any(r.get('clean_cache') for r in rows)}, eager in the "
             "same run."]
    by_name = {r["case"]: r for r in rows}
    shown = [(by_name[name], text) for name, text in SHOWN.items()
             if name in by_name and by_name[name].get("ratio") and by_name[name].get("intercepted") != "no"]
    for of_models in (False, True):
        chosen = [(row, text) for row, text in shown if (row["group"] == "model") == of_models]
        others = [p for p in others_of(rows) if any(_us(row["providers"].get(p, {})) is not None for row, _ in chosen)]
        if not chosen:
            continue
        head = ["model" if of_models else "case", "eager", "gemsmode", "ratio", *(NAMES.get(p, p) for p in others)]
        lines += ["", "| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        for row, text in chosen:
            times = [_time(_us(row["providers"].get(p, {}))) for p in ("eager", "gemsmode")]
            more = [_time(_us(row["providers"].get(p, {}))) for p in others]
            lines.append("| " + " | ".join([text, *times, f"{row['ratio']:.2f}x", *more]) + " |")
    rows = [r for r in rows if r["group"] not in (*OF_HOST, "model") and r.get("ratio") and r.get("intercepted") == "yes"]
    others = [p for p in others_of(rows) if any((r.get("ratios") or {}).get(p) for r in rows)]
    head = ["family", "cases", "geometric mean", "slowest", *(NAMES.get(p, p) for p in others)]
    lines += ["", "| " + " | ".join(head) + " |", "|---" + "|---:" * 2 + "|---" + "|---:" * len(others) + "|"]
    lines += [_family(g, [r for r in rows if r["group"] == g], others) for g in dict.fromkeys(r["group"] for r in rows)]
    if rows:
        lines.append(_family("all", rows, others))
    return "\n".join(lines)


def _family(name: str, rows: list[Row], others: list[str]) -> str:
    slowest = min(rows, key=lambda r: r["ratio"])
    cells = [name, str(len(rows)), f"{geometric_mean([r['ratio'] for r in rows]):.2f}x",
             f"{slowest['label']} {slowest['dtype']} {slowest['ratio']:.2f}x"]
    for provider in others:
        ratios = [r["ratios"][provider] for r in rows if (r.get("ratios") or {}).get(provider)]
        cells.append(f"{geometric_mean(ratios):.2f}x" if ratios else "")
    return "| " + " | ".join(cells) + " |"


def written(text: str, result: Mapping[str, Any]) -> str:
    """``text``, a README, with what is between its marks replaced.

    Raises:
        ValueError: it has no marks.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"there must be one line {BEGIN!r} and, below it, one line {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables(result)}\n{END}{rest.partition(END)[2]}"


def update(path: Path, result: Mapping[str, Any]) -> bool:
    """Write the tables into the README at ``path``; whether that changed it.

    Raises:
        ValueError: it has no marks.
    """
    before = path.read_text(encoding="utf-8")
    after = written(before, result)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before
