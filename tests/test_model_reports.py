"""Reports of whole models: five of ``transformers``, forward, backward and optimizer, in every format, dry and verified."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections import Counter
from typing import Any

import pytest
import torch
from five_models import BASE, MODELS, model_and_inputs, train_step
from support import Counting, skip_in_company, skip_without_cuda
from torch import nn

from gemsmode import GemsMode, MismatchWarning, Registry, registry, rule
from gemsmode.mode import load_ops
from gemsmode.tracing import Report

pytest.importorskip("transformers")

each_model = pytest.mark.parametrize("name", MODELS)


def step_under(mode: Any, name: str, device: str, dropout: bool = True) -> None:
    """One training step of a model made anew."""
    model, inputs = model_and_inputs(name, device=device)
    model.train(dropout or name == "resnet")  # which has none, and whose batch norm is to be seen training
    optimizer = torch.optim.AdamW(model.parameters())
    with mode:
        train_step(model, inputs, optimizer)


def calls_by_overload(report: Report) -> Counter[str]:
    found: Counter[str] = Counter()
    for record in report.records:
        found[record.overload] += record.calls
    return found


def embedded(page: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match[1])


@each_model
def test_every_call_is_in_every_format(name: str, device: str) -> None:
    counting, mode = Counting(), GemsMode(trace=True)
    step_under(counting, name, device)
    step_under(mode, name, device)
    report, calls = mode.report, sum(counting.counts.values())
    # The table's calls equal an independent count, overload by overload.
    assert calls_by_overload(report) == counting.counts
    # On a GPU dense convolutions are left to cuDNN, which is no hole in the coverage.
    asked = [r for r in report.compute if not (r.decision == "pass" and r.overload.startswith("aten.convolution"))]
    assert sum(r.calls for r in asked if r.decision == "rule") > 0.85 * sum(r.calls for r in asked)
    assert not report.rows("overload", ["error"])
    assert {r.phase for r in report.records} == {"forward", "backward", "optimizer"}
    assert all(r.module for r in report.compute if r.phase == "optimizer")
    # Every grouping adds up to it, in calls and in time.
    compute = sum(r.calls for r in report.compute)
    time = sum(r.time_s for r in report.compute)
    for by in ("op", "overload", "shape", "module"):
        assert sum(row.calls for row in report.rows(by)) == calls
        assert sum(row.time_s for row in report.rows(by, ["rule", "pass", "error"])) == pytest.approx(time)
    tops = report.modules(depth=1)
    assert sum(row.calls for row in tops) == compute and sum(row.time_s for row in tops) == pytest.approx(time)
    # And so do the formats.
    data = json.loads(report.to_json())
    assert sum(op["calls"] for op in data["ops"]) == data["calls"] == calls
    assert sum(int(line["calls"]) for line in csv.DictReader(io.StringIO(report.to_csv()))) == calls
    page = report.to_html()
    assert sum(row["calls"] for row in embedded(page, "data")["overloads"]) == calls
    assert sum(leaf[5] for leaf in embedded(page, "data")["leaves"]) == compute
    assert Report.from_dict(embedded(page, "report")).calls == calls
    events = [e for e in json.loads(report.to_chrome_trace())["traceEvents"] if e["ph"] == "X" and e["cat"] != "module" and e["pid"] == 1]
    assert len(events) == calls
    shown = re.findall(r"^\| `([\w.]+)` \|.*?\| (\d[\d,]*) \|", report.to_markdown(), re.M)
    replaced = {row.label[0].removeprefix("aten.").removesuffix(".default"): row.calls for row in report.rows("overload", ["rule"])[:20]}
    assert len(shown) >= len(replaced) and all(f"| {n} |" in report.to_markdown() for n in replaced.values())
    assert f"{calls:,} calls, {compute:,} of them compute" in str(report)


@each_model
def test_a_dry_run_decides_as_a_real_run(name: str, device: str) -> None:
    def decisions(report: Report) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for r in report.compute:
            found[r.overload, r.decision, r.rule, r.inputs, r.module, r.phase] += r.calls
        return found

    real, dry = GemsMode(trace=True), GemsMode(dry_run="cpu" if device == "cpu" else True)
    step_under(real, name, device, dropout=False)
    step_under(dry, name, "meta", dropout=False)
    found, wanted = decisions(dry.report), decisions(real.report)
    differ = [f"only {which}: {n}x {' '.join(map(str, call))}" for which, more in (("dry", found - wanted), ("real", wanted - found))
              for call, n in sorted(more.items(), key=str)]
    assert not differ, "\n".join(differ)
    assert dry.report.environment["peak_bytes"] > 4 * sum(p.numel() for p in model_and_inputs(name, device="meta")[0].parameters())


def test_a_planted_error_is_found_in_a_llama(device: str) -> None:
    load_ops()
    planted = Registry("planted")
    planted.replace(registry.default.rules)

    @rule("aten.silu.default", name="nearly silu", registry=planted)
    def nearly_silu(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x) * x * 1.0001

    with pytest.warns(MismatchWarning, match="nearly silu"):
        mode = GemsMode(verify=True, registry=planted)
        step_under(mode, "llama", device)
    wrong = [c for c in mode.report.checks if c.failed]
    assert [(c.rule, c.module, c.phase) for c in wrong] == [("nearly silu", "LlamaForCausalLM.model.layers.0.mlp.act_fn", "forward")]
    assert "five_models.py" in wrong[0].first or "modeling_llama.py" in wrong[0].first or "activations.py" in wrong[0].first
    right = [c for c in mode.report.checks if not c.failed]
    assert sum(c.compared for c in right) > 100


@each_model
def test_verification_finds_nothing_wrong(name: str, device: str, request: pytest.FixtureRequest) -> None:
    if device == "cpu" and not request.config.getoption("--full"):
        pytest.skip("takes long in the interpreter: run with --full")
    mode = GemsMode(verify=True, on_mismatch="raise")
    step_under(mode, name, device)
    checks = mode.report.checks
    assert sum(c.compared for c in checks) > 50 and not any(c.failed for c in checks)


def computed(report: Report) -> tuple[float, int]:
    """Seconds on the device of all calls but views, and how many calls these were."""
    records = [r for r in report.records if r.decision != "view"]
    return sum(r.device_s or 0.0 for r in records), sum(r.device_calls for r in records)


@each_model
def test_device_time_is_the_profilers(name: str, device: str, monkeypatch: pytest.MonkeyPatch, unpoisoned: None) -> None:
    """On a GPU: the device time of a training step at full size is within 5% of what ``torch.profiler`` sums up.

    The profiler watches another step, since with it the host is slower than the device, which then waits between two events.
    Decisions are those of a user's run, with nothing served that PyTorch does faster; and so are the kernels, without those
    that fill what is allocated, and the optimizer's counts of steps, which on a GPU by default would each be waited for.
    """
    skip_without_cuda(device)
    skip_in_company(device)
    monkeypatch.delenv("GEMSMODE_SLOWER", raising=False)
    with torch.device("cpu"):
        _compare_with_the_profiler(name, device)


def _compare_with_the_profiler(name: str, device: str) -> None:
    from torch.autograd import DeviceType

    scale = dataclasses.replace(BASE, batch=64 if name == "vit" else 32)
    model, inputs = model_and_inputs(name, scale, device, torch.float16 if name in ("vit", "resnet") else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    mode = GemsMode(trace=True)
    with mode:  # compiles, and decides for every signature
        for _ in range(2):
            train_step(model, inputs, optimizer)
    before = computed(mode.report)
    with mode:
        for _ in range(3):
            train_step(model, inputs, optimizer)
    ours, calls = ((after - then) / 3 for after, then in zip(computed(mode.report), before, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, GemsMode():
        train_step(model, inputs, optimizer)
        torch.cuda.synchronize()
    kernels = sum(e.self_device_time_total for e in profile.events()
                  if e.device_type == DeviceType.CUDA and not e.is_user_annotation) / 1e6
    print(f"{name}: profiler {kernels * 1e3:.2f} ms, report {ours * 1e3:.2f} ms ({ours / kernels:.3f}x), {calls:.0f} calls; "
          f"two events add {mode.report.environment['event_gap_us']:.2f} us to a call")
    assert ours == pytest.approx(kernels, rel=0.05)


@pytest.mark.parametrize(("layers", "width", "inner", "heads", "kv_heads"), [(32, 4096, 11008, 32, 32), (80, 8192, 28672, 64, 8)],
                         ids=["7b", "70b"])
def test_llama_2_is_answered_in_under_a_minute(layers: int, width: int, inner: int, heads: int, kv_heads: int) -> None:
    import time

    from transformers import LlamaConfig, LlamaForCausalLM

    started = time.process_time()
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, vocab_size=32000)
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(1, 2048, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with GemsMode(dry_run="cuda:90") as mode:
        train_step(model, {"input_ids": tokens, "labels": tokens}, optimizer)
    report, weights = mode.report, 2 * sum(p.numel() for p in model.parameters())
    assert time.process_time() - started < 60
    assert report.coverage.calls > 0.9
    # Weights, gradients, AdamW's two averages and, in its step, the square roots of one of them.
    assert report.environment["peak_bytes"] == pytest.approx(5 * weights, rel=0.01)
    products = [r for r in report.records if r.overload == "aten.mm.default"]
    assert sum(r.calls for r in products) == 3 * (7 * layers + 1)
    assert sum((r.flops or 0) * r.calls for r in products) == pytest.approx(3 * weights * 2048, rel=0.03)
    text = str(report)
    assert "in a dry run for cuda:90" in text and "FLOP" in text
    assert f"tensors at their peak: {'67.4' if layers == 32 else '690'} GB" in text
    # The step counts of the optimizer are numbers on the host, and no hole in the coverage.
    assert {r.overload for r in report.records if r.decision == "host"} <= {"aten._foreach_add_.Tensor", "aten._foreach_add_.Scalar"}
    assert any(r.decision == "host" for r in report.records)
