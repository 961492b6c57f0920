"""``python -m perf``: the cases, the measures, the rows, and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import gemsmode
from gemsmode import GemsMode, choice
from gemsmode.registry import find_op
from perf import __main__ as command
from perf import host, models, plot, readme, results, start
from perf.cases import DTYPES, TINY_ELEMENTS, Case, T, all_cases, shrunk
from perf.measure import Runnable, Stopwatch, Times
from perf.runner import (
    Prepared,
    Results,
    Runner,
    Settings,
    decisions,
    default_device,
    intercepted,
    merged,
    relative_error,
    run_all,
    summary,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def named(name: str) -> Case:
    return next(c for c in all_cases() if c.name == name)


@pytest.fixture
def runner() -> Runner:
    return Runner(Settings(seconds=0.001, tiny=True), CPU)


@pytest.fixture
def serving(device: str) -> Runner:
    """A runner on the device that the mode works on."""
    return Runner(Settings(seconds=0.001, tiny=True), torch.device(device))


# -- cases -------------------------------------------------------------------------------------------------------------

NAMED = """
    add 8192x8192 bf16|mul 8192x8192 f32|silu 8192x8192 bf16|mul_row 8192x8192 bf16|mul_column 8192x8192 bf16|add_transposed 8192x8192 bf16
    softmax 16384x4096 bf16|softmax 4096x32000 bf16|softmax 262144x128 bf16|log_softmax 2048x32000 f32|layer_norm 16384x4096 bf16
    layer_norm 65536x768 f32|layer_norm_backward 16384x4096 bf16|rms_norm 16384x4096 bf16|group_norm 16x320x64x64 bf16
    sum_last 8192x8192 bf16|mean_last 8192x8192 bf16|sum_first 8192x8192 bf16|mean_first 8192x8192 bf16|amax_last 8192x8192 bf16
    argmax 1024x32000 bf16|max_first 8192x8192 f32|var_mean 8192x8192 f32|cumsum 4096x8192 f32|cumsum 16777216 f32|sum_all 8192x8192 f32
    vector_norm 8192x8192 f32|cross_entropy 8192x32000 bf16|cross_entropy_backward 8192x32000 bf16|softmax_backward 16384x4096 bf16
    mm 8192x8192x8192 bf16|mm_nt 4096x4096x4096 bf16|mm 4096x4096x4096 f16|mm_nt 2048x11008x4096 bf16|addmm 4096x3072x768 bf16
    mm_nt 16x4096x4096 bf16|mm_nt 1x32000x4096 bf16|bmm 128x1024x1024x64 bf16|mv 32768x8192 bf16|mm 2048x2048x2048 f32
    attention_causal 4x32x4096x128 bf16|attention 16x16x1024x64 bf16|attention_gqa 2x32x8x8192x128 bf16
    attention_backward 4x32x2048x128 bf16
    transpose_copy 4x2048x32x128 bf16|cat_rows 4096x8192 bf16|masked_fill 8192x8192 bf16|triu 8192x8192 bf16|embedding 8192x32000x4096 bf16
    embedding_backward 8192x32000x4096 bf16|index_select 8192x32000x4096 bf16|gather 8192x8192 f32|dropout 8192x8192 bf16
    randn 8192x8192 f32|sort 1024x8192 f32|topk 256x32000x50 bf16|max_pool2d 32x128x112x112 bf16|adamw 7x4096x11008x32000 bf16
"""


def test_the_cases_that_the_project_set_goals_for_are_declared() -> None:
    names = {c.name: c for c in all_cases()}
    wanted = [name.strip() for line in NAMED.strip().splitlines() for name in line.split("|")]
    assert not [name for name in wanted if name not in names]
    assert not [name for name in wanted if names[name].goal is None]
    tiny = {c.label.removeprefix("tiny_") for c in all_cases() if c.group == "tiny"}
    assert tiny == {"add", "mul", "silu", "gelu", "sum", "softmax", "layer_norm", "mm", "addmm", "embedding", "cat", "add_", "view", "t",
                    "pass"}
    model = {c.label: c.goal for c in all_cases() if c.group == "model"}
    assert model == {"bert_base": 1.15, "llama2_7b_prefill": 1.25, "llama2_7b_decode": None, "llama_training_step": 1.2}
    limits = {name: limit for c in all_cases() for name, limit in c.at_most.items() if c.label not in ("tiny_view", "tiny_t")}
    assert limits == {"gemsmode.over_eager_us": 2.5, "gemsmode.import_s": 1.0, "gemsmode.first_call_s": 0.3, "gemsmode.compiled_again": 0.0,
                      "capture.wall_us": 4500.0, "patch+capture.wall_us": 4500.0}


def test_every_case_names_an_op_a_dtype_and_an_origin_and_can_shrink() -> None:
    for c in all_cases():
        find_op(c.op)
        assert c.dtype in DTYPES and c.origin, c.name
        assert c.bytes or c.flops or c.group in ("tiny", "growing", "start", "model"), c.name
        sizes = shrunk(c)
        for name in c.pinned:
            assert sizes[name] == {**c.sizes, **c.tiny}[name]
        for t in c.inputs.values():
            assert math.prod(t.shape(sizes)) <= max(TINY_ELEMENTS, math.prod(c.sizes[d] for d in c.pinned)) or c.pinned, c.name


def test_inputs_are_random_repeatable_and_laid_out_as_declared() -> None:
    c = named("mm_nt 4096x4096x4096 bf16")
    first, second = (Prepared(c, CPU, shrunk(c)).inputs for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["b"].stride(0) == 1 and first["a"].stride(1) == 1
    assert all(t.float().std() > 0.5 for t in first.values())
    index = T("M", "index:N", dtype="i64").make({"M": 500, "N": 7}, torch.float32, CPU, torch.Generator().manual_seed(0))
    assert index.dtype == torch.int64 and set(index.tolist()) == set(range(7))


def test_bytes_and_flops_are_counted_as_stated() -> None:
    c = named("add 8192x8192 bf16")
    prepared = Prepared(c, CPU, {"M": 3, "N": 5})
    assert prepared.count(c.bytes, prepared.call()) == 3 * 15 * 2
    c = named("mm 4096x4096x4096 f16")
    assert Prepared(c, CPU, {"M": 3, "N": 5, "K": 7}).count(c.flops, None) == 2 * 3 * 5 * 7
    c = named("embedding 8192x32000x4096 bf16")
    prepared = Prepared(c, CPU, {"M": 6, "V": 10, "N": 4})
    assert prepared.count(c.bytes, prepared.call()) == 6 * 8 + 2 * 6 * 4 * 2


# -- errors ------------------------------------------------------------------------------------------------------------


def test_relative_error() -> None:
    ref = torch.tensor([1.0, -4.0, float("inf"), float("nan")], dtype=torch.float64)
    assert relative_error(ref.float(), ref) == 0
    assert relative_error(torch.tensor([1.0, -3.0, float("inf"), float("nan")]), ref) == pytest.approx(0.25)
    assert math.isnan(relative_error(torch.tensor([1.0, -4.0, 1.0, float("nan")]), ref)) or \
        relative_error(torch.tensor([1.0, -4.0, 1.0, float("nan")]), ref) == math.inf
    assert math.isnan(relative_error(torch.tensor([float("nan"), -4.0, float("inf"), float("nan")]), ref))
    assert relative_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])) == 0.5
    assert relative_error((torch.zeros(2), [torch.ones(2)]), (torch.zeros(2), [torch.ones(2)])) == 0
    assert relative_error(torch.ones(4, 2), torch.ones(2, 2), rows=2) == 0


@pytest.mark.parametrize("name", ["layer_norm_backward 16384x4096 bf16", "cross_entropy 8192x32000 bf16", "add_ 8192x8192 f32"])
def test_the_reference_is_the_same_call_in_float64(name: str) -> None:
    prepared = Prepared(named(name), CPU, shrunk(named(name)))
    with torch.no_grad():
        reference = prepared.reference()
        error = relative_error(prepared.fresh()(), reference)
    leaves = reference if isinstance(reference, tuple) else (reference,)
    assert all(t.dtype == torch.float64 for t in leaves)
    assert 0 < error < 0.05


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_times() -> None:
    times = Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (times.median, times.low, times.high, times.runs) == (3.5, 2.0, 5.0, 6)
    assert times.spread == pytest.approx(3 / 3.5)


def test_the_stopwatch_calls_inside_the_context_and_takes_turns() -> None:
    log: list[str] = []

    class Around:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(f"+{self.name}")

        def __exit__(self, *error: object) -> None:
            log.append(f"-{self.name}")

    watch = Stopwatch(CPU, seconds=0.0)
    both = {n: Runnable(lambda n=n: log.append(n), lambda n=n: Around(n)) for n in "ab"}
    times = watch.device_times(both, rounds=2)
    assert log == ["+a", "a", "-a", "+b", "b", "-b"] + ["+a", "a", "-a", "+b", "b", "-b"] * 2
    assert times["a"].runs == 2
    log.clear()
    watch.host_times(both, rounds=1, number=2)
    assert log == ["+a", "a", "a", "-a", "+b", "b", "b", "-b"] * 2
    assert len(watch.each([lambda: None] * 70)) == 70


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_has_times_errors_decisions_and_versions(serving: Runner, device: str) -> None:
    row = serving.run(named("add 8192x8192 f32"))
    assert row["error"] is None and row["ratio"] > 0 and row["intercepted"] == "yes"
    assert [(d["overload"], d["kind"], d["calls"]) for d in row["decisions"]] == [("add.Tensor", "rule", 1)]
    for provider in ("eager", "gemsmode"):
        entry = row["providers"][provider]
        assert entry["device_us"] > 0 and entry["gb_s"] > 0 and entry["error_vs_reference"] < 1e-6 and entry["first_s"] > 0
    assert row["torch"] == torch.__version__ and row["scaled_down"] and row["commit"]
    assert row["gpu"] == (torch.cuda.get_device_name() if device == "cuda" else None)
    json.dumps(row)


def test_what_passes_through_is_told_from_what_is_replaced(device: str) -> None:
    x = torch.randn(4, 4, device=device)
    decided = summary(decisions(lambda: torch.add(x, x).view(16)))
    assert intercepted(decided) == "yes"
    assert intercepted(summary(decisions(lambda: torch.linalg.qr(x)))) == "no"
    assert intercepted(summary(decisions(lambda: torch.linalg.qr(torch.add(x, x))))) == "partly"
    assert intercepted(summary(decisions(lambda: x.view(16)))) == "view"


def test_a_failing_case_gives_a_row_and_the_run_goes_on(runner: Runner, tmp_path: Path) -> None:
    good = named("add 8192x8192 f32")
    broken = dataclasses.replace(good, label="broken", call="torch.add(x, torch.ones(3, 3, 3, 7))")
    unknown = dataclasses.replace(good, label="unknown", call="torch.no_such_function(x)")
    slow = dataclasses.replace(good, label="slow", call="[torch.add(x, y) for _ in iter(int, 1)]")
    runner.run(good)  # loads what a first case loads
    runner.settings.case_limit = 2.0
    kept = Results(tmp_path / "r.json")
    assert run_all([broken, unknown, slow, good], runner, kept)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [r["label"] for r in rows] == ["broken", "unknown", "slow", "add"]
    assert "RuntimeError" in rows[0]["error"] and "AttributeError" in rows[1]["error"] and "gave up after" in rows[2]["error"]
    assert rows[3]["error"] is None and rows[3]["ratio"]
    text = results.table(rows)
    assert text.count("ERROR") == 3


def test_rows_are_kept_one_by_one_and_taken_up_again(runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    cases = [named("add 8192x8192 f32"), named("exp 8192x8192 f32")]
    runner.settings.budget = 0.0
    assert not run_all(cases, runner, Results(path), started=0.0)
    runner.settings.budget = None
    seen: list[int] = []
    assert run_all(cases[:1], runner, Results(path), lambda row: seen.append(len(json.loads(path.read_text())["rows"])))
    assert seen == [1]
    again = Results(path, resume=True)
    ran: list[str] = []
    assert run_all(cases, runner, again, lambda row: ran.append(row["case"]))
    assert ran == ["exp 8192x8192 f32"] and [r["case"] for r in again.rows] == [c.name for c in cases]


def test_rows_of_several_runs_make_one_result(runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    add, exp, mul = (named(f"{n} 8192x8192 f32") for n in ("add", "exp", "mul"))
    run_all([add, exp], runner, Results(path))
    before = {r["case"]: r["at"] for r in json.loads(path.read_text())["rows"]}
    ran: list[str] = []
    start = time.time()
    assert run_all([exp, mul], runner, Results(path, merge=True), lambda row: ran.append(row["case"]))
    rows = json.loads(path.read_text())["rows"]
    assert ran == [exp.name, mul.name] and [r["case"] for r in rows] == [add.name, exp.name, mul.name]
    assert rows[0]["at"] == before[add.name] and rows[1]["at"] >= start
    # A run that goes on in a fresh process does not begin again.
    ran.clear()
    assert run_all([add, exp, mul], runner, Results(path, merge=True, since=start), lambda row: ran.append(row["case"]))
    assert ran == [add.name]
    old, new = _result(100.0), _result(50.0)
    old["rows"].append({**old["rows"][0], "case": "other"})
    one = merged([old, new])
    assert [(r["case"], r["ratio"]) for r in one["rows"]] == [("add 8x8 bf16", 2.0), ("other", 1.0)]


def test_the_provider_that_takes_the_faster_one(device: str) -> None:
    runner = Runner(Settings(("eager", "gemsmode", "fastest"), seconds=0.001, tiny=True), torch.device(device))
    row = runner.run(named("exp 8192x8192 f32"))
    assert row["error"] is None and set(row["ratios"]) == {"gemsmode", "fastest"} and row["ratio"] == row["ratios"]["gemsmode"]
    (chosen,) = row["choices"]
    rule, native = max(chosen["rule_us"]), max(chosen["native_us"])  # of device and host what a program waits for
    assert chosen["overload"] == "exp" and ("is faster" in chosen["reason"] or "is as fast" in chosen["reason"])
    assert chosen["taken"] == ("rule" if rule <= choice.MARGIN * native else "native")
    text = results.table([row])
    assert "fastest us" in text.splitlines()[0]
    assert "fastest" in results.progress_line(row)


def test_limits_and_what_is_left_out(runner: Runner) -> None:
    row = runner.run(named("tiny_pass 64x64 c64"))
    (limit,) = row["at_most"]
    assert row["intercepted"] == "no" and limit["figure"] == "gemsmode.over_eager_us" and limit["value"] > 0
    entry = row["providers"]["gemsmode"]
    assert entry["over_eager_us"] == pytest.approx(entry["host_us"] - row["providers"]["eager"]["host_us"])
    row["at_most"][0].update(value=9.5, kept=False)
    assert "over_eager_us 9.5 > 2.5" in results.table([row])
    needy = dataclasses.replace(named("exp 8192x8192 f32"), needs=("no_such_package",))
    row = runner.run(needy)
    assert row["skipped"] == "no_such_package is not installed" and row["error"] is None
    assert "left out: no_such_package" in results.table([row]) and "1 left out" in results.closing([row])


def test_starting_is_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    seen: list[Path] = []

    def fake(device: torch.device, cache: Path) -> dict[str, float]:
        seen.append(cache)
        (cache / f"kernel {len(seen)}").write_text("")
        return {"import_s": 0.5, "first_call_s": 0.2}

    monkeypatch.setattr(start, "_run", fake)
    row = runner.run(named("start 64x64 bf16"))
    entry = row["providers"]["gemsmode"]
    assert row["error"] is None and seen[0] == seen[1]
    assert (entry["compiled"], entry["compiled_again"], entry["again_import_s"]) == (1, 1, 0.5)
    assert [limit["kept"] for limit in row["at_most"]] == [True, True, False]
    assert "import_s 0.5" in results.progress_line(row)


def test_starting(device: str, tmp_path: Path) -> None:
    found = start._run(torch.device(device), tmp_path)
    assert 0 < found["import_s"] < 60 and found["first_call_s"] > found["next_call_s"] / 10


def test_models(runner: Runner) -> None:
    pytest.importorskip("transformers")
    runner = Runner(Settings(("eager",), seconds=0.0, tiny=True, check=False), CPU)
    for c in all_cases():
        if c.group == "model":
            row = runner.run(c)
            assert row["error"] is None and row["skipped"] is None and "error" not in row["providers"]["eager"], row
            assert row["providers"]["eager"]["wall_us"] > 0
    # The weights are those that the case's dtype can hold, whatever the dtype of the reference.
    half, double = (models.bert(1, 8, d, CPU, torch.float16) for d in (torch.float16, torch.float64))
    assert all(torch.equal(a.double(), b) for a, b in zip(half.model.parameters(), double.model.parameters()))
    assert relative_error(half(), double()) < 0.01
    decode = models.llama_decode(1, 8, torch.float32, CPU)
    torch.testing.assert_close(decode(), decode())  # at the same place in the cache


def test_providers_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    runner = Runner(Settings(("capture", "patch"), seconds=0.0, tiny=True), CPU)
    log: list[tuple[str, str]] = []
    for name in ("patch", "unpatch"):
        monkeypatch.setattr(gemsmode, name, lambda model, name=name: log.append((name, type(model).__name__)), raising=False)
    assert "no GPU" in runner.unavailable["capture"] and "patch" not in runner.unavailable
    case = named("llama2_7b_decode 1x512 bf16")
    runnable = runner._runnable("patch", Prepared(case, CPU, shrunk(case)))
    with runnable.around() as mode:
        assert log == [("patch", "LlamaForCausalLM")] and isinstance(mode, GemsMode)
    assert log[1:] == [("unpatch", "LlamaForCausalLM")]
    assert "whole models" in runner.run(named("exp 8192x8192 f32"))["providers"]["patch"]["error"]


def test_one_call_for_a_profiler(serving: Runner) -> None:
    assert serving.once(named("exp 8192x8192 f32"), "gemsmode") == ["exp: rule exp"]
    assert serving.once(named("exp 8192x8192 f32"), "eager") == []
    with pytest.raises(RuntimeError, match="many calls"):
        serving.once(named("growing_add 2024 bf16"), "gemsmode")


def test_host_time_cases(serving: Runner) -> None:
    row = serving.run(named("tiny_add 64x64 bf16"))
    assert row["error"] is None and row["intercepted"] == "yes" and row["providers"]["gemsmode"]["host_us"] > 0
    growing = serving.run(named("growing_add 2024 bf16"))
    assert growing["error"] is None and growing["intercepted"] == "yes"
    entry = growing["providers"]["gemsmode"]
    assert entry["sizes"] == 6 and entry["new_us"] > 0 and entry["compiled"] == 0


def test_an_unavailable_provider_is_said_to_be_so() -> None:
    runner = Runner(Settings(("eager", "gemsmode", "flag_gems"), seconds=0.001, tiny=True), CPU)
    if "flag_gems" not in runner.unavailable:
        pytest.skip("flag_gems is installed")
    row = runner.run(named("exp 8192x8192 f32"))
    assert "flag_gems" in row["providers"]["flag_gems"]["error"] and row["ratio"]


def test_the_compile_provider(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: lambda: call() * 1)
    runner = Runner(Settings(("eager", "compile"), seconds=0.001, tiny=True), CPU)
    row = runner.run(named("exp 8192x8192 f32"))
    assert row["providers"]["compile"]["device_us"] > 0 and "ratio" in row and row["ratio"] is None


# -- results as text ---------------------------------------------------------------------------------------------------


def _result(us: float, eager: float = 100.0, spread: float = 0.01) -> dict:
    row = {"case": "add 8x8 bf16", "label": "add", "group": "pointwise", "op": "aten.add.Tensor", "dtype": "bf16", "goal": 0.97,
           "error": None,
           "ratio": eager / us, "intercepted": "yes", "bytes": 6, "flops": None, "call": "x + y", "origin": "here",
           "providers": {"eager": {"device_us": eager, "spread": spread}, "gemsmode": {"device_us": us, "spread": spread, "gb_s": 3000.0}}}
    return {"environment": {"gpu": "GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "now"},
            "peaks": {"copy": 4.2e12}, "rows": [row]}


def test_compare_marks_what_is_beyond_the_noise() -> None:
    assert "FASTER" in results.compare(_result(100.0), _result(50.0))
    assert "SLOWER" in results.compare(_result(50.0), _result(100.0))
    same = results.compare(_result(100.0), _result(101.0))
    assert "FASTER" not in same and "SLOWER" not in same and "geometric mean 0.990" in same
    # The whole machine was twice as slow: eager says so.
    slow = results.compare(_result(50.0, 100.0), _result(100.0, 200.0))
    assert "SLOWER" not in slow and "geometric mean 1.000" in slow
    gone, new = _result(50.0), _result(50.0)
    new["rows"][0] = {**new["rows"][0], "case": "other"}
    assert "new case" in results.compare(gone, new) and "gone" in results.compare(gone, new)


def test_markdown_and_csv() -> None:
    text = results.markdown(_result(50.0))
    assert "### pointwise" in text and "| add 8x8 bf16 | 100 | 50 |" in text and "copy: 4.20 TB/s" in text
    assert "1 of 1 goals reached" in text and results.CPU_NOTE not in text
    lines = results.to_csv(_result(50.0)).splitlines()
    assert len(lines) == 3 and lines[0].startswith("case,group,op") and "gemsmode,2.0,50.0" in lines[2]


def test_the_picture_is_xml_with_a_point_and_a_bar_for_each_case() -> None:
    made = _result(50.0)
    made["peaks"]["bf16"] = 7e14
    product = {**made["rows"][0], "case": "mm <&> 8x8", "group": "matmul", "bytes": None, "touched": 384, "flops": 1024, "ratio": 0.9,
               "ratios": {"gemsmode": 0.9, "fastest": 1.0}}
    made["rows"] += [product, {**product, "case": "failed", "error": "it did"}, {**product, "case": "host", "group": "growing"}]
    tree = ElementTree.fromstring(plot.svg(made))
    space = "{http://www.w3.org/2000/svg}"
    titles = [t.text for t in tree.iter(f"{space}title")]
    assert [t for t in titles if t and t.startswith("mm <&>")] == [
        "mm <&> 8x8: 2.05e-05 TFLOP/s at 2.67 operations a byte", "mm <&> 8x8: 0.90x"]
    assert len(list(tree.iter(f"{space}rect"))) == 3 and not any(t and "failed" in t for t in titles)
    assert plot.points(made["rows"][:1])[0][1:] == (0.5, 3 / 50.0 * 1e6)
    ElementTree.fromstring(plot.svg({**made, "rows": [], "peaks": {}}))


def test_the_readme_shows_the_committed_result() -> None:
    result = json.loads((ROOT / "perf" / "results" / "h200.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert readme.written(text, result) == text, "run python -m perf --table perf/results/h200.json"
    assert "| softmax 16384x4096 bf16 | " in text


def test_tables_for_the_readme(tmp_path: Path) -> None:
    made = _result(50.0)
    made["rows"][0].update(case="softmax 16384x4096 bf16", ratios={"gemsmode": 2.0, "fastest": 1.9})
    made["rows"][0]["providers"]["fastest"] = {"device_us": 52.6}
    text = readme.tables(made)
    assert "| softmax 16384x4096 bf16 | 100 us | 50 us | 2.00x | 53 us |" in text and "| case | eager | gemsmode | ratio | `prefer=" in text
    assert "| pointwise | 1 | 2.00x | add bf16 2.00x | 1.90x |" in text and "gemsmode at abc" in text
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.update(path, made) and not readme.update(path, made)
    assert path.read_text() == f"before\n{readme.BEGIN}\n{text}\n{readme.END}\nafter\n"
    with pytest.raises(ValueError, match="there must be one line"):
        readme.written("no marks", made)


# -- the command line --------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if default_device() != CPU:
        pytest.skip("full sizes on a GPU")
    path = tmp_path / "new.json"
    code = command.main(["--ops", "add", "--dtype", "f32", "--json", str(path), "--csv", str(tmp_path / "new.csv"), "--markdown",
                         str(tmp_path / "new.md"), "--quick"])
    shown = capsys.readouterr().out
    assert code == 0 and results.CPU_NOTE in shown
    rows = json.loads(path.read_text())["rows"]
    assert {r["dtype"] for r in rows} == {"f32"} and {"add", "add_number"} <= {r["label"] for r in rows}
    assert (tmp_path / "new.csv").exists() and "### pointwise" in (tmp_path / "new.md").read_text()
    again = ["--ops", "add", "--dtype", "f32", "--quick", "--merge", "--json", str(path), "--plot", str(tmp_path / "new.svg")]
    assert command.main(again) == 0
    assert len(json.loads(path.read_text())["rows"]) == len(rows) and (tmp_path / "new.svg").read_text().startswith("<svg")
    assert command.main(["merge", str(path), str(path), "--json", str(tmp_path / "merged.json")]) == 0
    assert len(json.loads((tmp_path / "merged.json").read_text())["rows"]) == len(rows)
    table = tmp_path / "README.md"
    table.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert command.main(["--table", str(path), "--readme", str(table)]) == 0 and "| pointwise |" in table.read_text()
    capsys.readouterr()
    assert command.main(["once", "--ops", "exp", "--dtype", "f32"]) == 0
    assert "exp 8192x8192 f32 by gemsmode: exp: rule exp" in capsys.readouterr().out
    assert command.main(["compare", str(path), str(path)]) == 0
    assert "times as fast" in capsys.readouterr().out
    assert command.main(["show", str(path)]) == 0
    assert command.main(["--ops", "exp", "--budget", "0", "--started", "1"]) == 3
    assert command.main(["list", "--group", "matmul"]) == 0
    assert "aten.mm.default" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--ops", "no_such_op"], "no case matches"), (["--providers", "egaer"], "no provider egaer"), (["compare", "one"],
                                                                                                    "takes 2 result files"),
    (["show", "no_such_file"], "no such file"), (["--merge", "--ops", "exp"], "the file that --json names"),
    (["merge", "one", "--json", "x"], "two or more"), (["--table", "no_such_file"], "no such file"),
])
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_quick_run_without_a_gpu_takes_a_sample() -> None:
    chosen = command.sample(all_cases())
    assert {c.group for c in chosen} == {c.group for c in all_cases()} and len(chosen) < 45
    assert len({c.name for c in chosen}) == len(chosen)


def test_host_profile(device: str) -> None:
    cases = [named("tiny_add 64x64 bf16"), named("tiny_view 64x64 bf16")]
    text, rows = host.table(cases, Stopwatch(torch.device(device)), tiny=True)
    add, view = rows
    assert "error" not in add and "error" not in view, text
    assert add["decided"] == ["aten.add.Tensor: rule add"]
    assert all(add[step] is not None for step in ("eager", "gemsmode", "interception", "key", "allocation", "launch", "plan"))
    assert view["native"] is not None and view["launch"] is None
    assert "tiny_view" in text and "interception" in text
