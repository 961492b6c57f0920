"""The command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemsmode import cli, demo
from gemsmode.signature import TensorMeta
from gemsmode.target import current
from gemsmode.tracing import Report


def gemsmode(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, standard output, standard error."""
    code = cli.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """A function that writes a script and gives its path."""

    def write(text: str, name: str = "script.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


# -- demo --------------------------------------------------------------------------------------------------------------


def test_the_demo(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    code, out, err = gemsmode(capsys, "demo", "--size", "tiny", "--json", str(path))
    assert code == 0, out + err
    assert "decoder" in out and "encoder" in out and "coverage of compute" in out
    report = Report.load(path)
    assert {r.module.split(".")[0] for r in report.compute} >= {"Decoder", "Encoder"}
    assert {r.phase for r in report.records} == {"forward", "backward"}
    assert report.coverage.calls > 0.3


def test_the_demo_fails_when_results_are_apart(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TOLERANCE", dict.fromkeys(demo.TOLERANCE, -1.0))
    code, out, _ = gemsmode(capsys, "demo", "--size", "tiny", "--quiet", "--allow", "silu")
    assert code == 1 and "too far apart" in out


def test_the_demo_reads_any_file(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"\xff\x00ab")
    tokens = demo.read_bytes(path, demo.SIZES["tiny"], torch.device("cpu"))
    assert tokens.shape == (2, 32) and tokens[0, :4].tolist() == [255, 0, 97, 98]
    path.write_bytes(b"")
    assert gemsmode(capsys, "demo", "--text", str(path))[::2] == (2, f"gemsmode: {path} is empty; the demo needs a text to read\n")
    code, _, err = gemsmode(capsys, "demo", "--text", str(tmp_path / "none"))
    assert code == 2 and "there is no file" in err
    code, _, err = gemsmode(capsys, "demo", "--dtype", "int8")
    assert code == 2 and "--dtype takes float32, bfloat16" in err


# -- report ------------------------------------------------------------------------------------------------------------


def test_report_runs_a_script_as_python_would(capsys: Any, script: Any, tmp_path: Path) -> None:
    script("VALUE = 3\n", "beside.py")
    path = script("import sys, torch, beside\n"
                  "if __name__ == '__main__':\n"
                  "    print(sys.argv[1:], beside.VALUE, __file__)\n"
                  "    (torch.ones(4, requires_grad=True) + 1).sum().backward()\n")
    argv, modules = list(sys.argv), list(sys.path)
    code, out, err = gemsmode(capsys, "report", "--json", str(tmp_path / "r.json"), path, "--json", "x", "-v")
    assert code == 0, err
    assert out.startswith(f"['--json', 'x', '-v'] 3 {path}\ngemsmode report\n")
    assert (sys.argv, sys.path) == (argv, modules)
    calls = {r.overload: r.calls for r in Report.load(tmp_path / "r.json").records}
    assert calls["aten.add.Tensor"] == 1 and calls["aten.sum.default"] == 1


@pytest.mark.parametrize(("text", "code", "expected"), [
    ("raise SystemExit(7)", 7, ""),
    ("import sys; sys.exit('bad day')", 1, "bad day"),
    ("def f():\n    1 / 0\nf()", 1, "ZeroDivisionError"),
    ("raise KeyboardInterrupt", 130, ""),
])
def test_report_survives_how_a_script_ends(capsys: Any, script: Any, text: str, code: int, expected: str) -> None:
    path = script(f"import torch\ntorch.ones(4).exp()\n{text}\n")
    got, out, err = gemsmode(capsys, "report", path)
    assert got == code
    assert expected in err and "1 of them" not in err
    assert "exp" in out and "coverage of compute" in out
    if "1 / 0" in text:
        assert "left by an exception (ZeroDivisionError: division by zero)" in out
        assert "runpy" not in err and "cli.py" not in err and f'File "{path}", line 5' in err


def test_report_runs_a_module(capsys: Any, script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script("import sys, torch\nprint(__name__, sys.argv[1:])\ntorch.ones(3).exp()\n", "a_module.py")
    monkeypatch.chdir(tmp_path)
    code, out, err = gemsmode(capsys, "report", "--by", "op", "-m", "a_module", "--by", "1")
    assert code == 0, err
    assert out.startswith("__main__ ['--by', '1']\n") and "aten.exp" in out.replace("exp ", "aten.exp ")
    code, _, err = gemsmode(capsys, "report", "-m", "no_such_module_here")
    assert code == 2 and "there is no module no_such_module_here" in err
    script("import no_such_dependency_here\n", "b_module.py")
    code, _, err = gemsmode(capsys, "report", "-m", "b_module")
    assert code == 1 and "Traceback" in err and "no_such_dependency_here" in err


def test_report_says_what_is_wrong(capsys: Any, script: Any, tmp_path: Path) -> None:
    path = script("print('ran')")
    for arguments, expected in [
        (["report"], "give a script to run"),
        (["report", "-m"], "give a script to run"),
        (["report", "nowhere.py"], "there is no file nowhere.py to run"),
        (["report", "nowhere"], "to run a module, write -m nowhere"),
        (["report", "--limit", "x", path], "invalid int value: 'x'"),
        (["report", "--allow", "sofmax", path], "did you mean"),
        (["report", "--json", path, path], "exists and is not a gemsmode report"),
        (["report", "--html", str(tmp_path / "no" / "r.html"), path], "there is no folder"),
        (["raport", path], "invalid choice: 'raport'"),
    ]:
        code, out, err = gemsmode(capsys, *arguments)
        assert (code, "ran" in out) == (2, False), arguments
        assert expected in err and "Traceback" not in err, arguments


def test_report_writes_every_format(capsys: Any, script: Any, tmp_path: Path) -> None:
    path = script("import torch\ntorch.ones(4).exp()\n")
    names = ("json", "csv", "html", "markdown", "chrome-trace")
    outputs = [word for name in names for word in (f"--{name}", str(tmp_path / f"report.{name}"))]
    code, out, err = gemsmode(capsys, "report", "--quiet", *outputs, path)
    assert (code, out) == (0, "")
    for name in names:
        assert "exp" in (tmp_path / f"report.{name}").read_text()
        assert f"wrote {tmp_path / f'report.{name}'}" in err


def test_threads_of_a_script_are_covered(capsys: Any, script: Any, tmp_path: Path) -> None:
    path = script("import threading, torch\nx = torch.ones(4)\n"
                  "t = threading.Thread(target=lambda: [x.exp() for _ in range(5)])\nt.start()\nt.join()\n")
    code, _, err = gemsmode(capsys, "report", "--json", str(tmp_path / "r.json"), path)
    assert code == 0, err
    assert {r.overload: r.calls for r in Report.load(tmp_path / "r.json").records}["aten.exp.default"] == 5


def test_ranks_write_their_own_files(capsys: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script("import torch\ntorch.ones(4).exp()\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        code, out, _ = gemsmode(capsys, "report", "--json", str(tmp_path / "r.json"), path)
        assert (code, "gemsmode report" in out) == (0, prints)
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["r.rank0.json", "r.rank1.json"]


def test_diff(capsys: Any, script: Any, tmp_path: Path, device: str) -> None:
    path = script(f"import torch\ntorch.ones(4, device='{device}').exp()\n")
    for name, options in (("a", []), ("b", ["--deny", "exp"])):
        gemsmode(capsys, "report", "--json", str(tmp_path / name), *options, path)
    code, out, _ = gemsmode(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 0 and "rule -> pass" in out
    code, _, err = gemsmode(capsys, "diff", str(tmp_path / "a"), path)
    assert code == 2 and "expected a gemsmode report" in err


TRAIN = """
import torch
from transformers import {name}Config, {model}
model = {model}({name}Config(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=16)).to("{device}")
with torch.no_grad():
    for p in model.parameters():  # not at random: a rule draws other numbers than PyTorch's CPU code does
        p.copy_((torch.arange(p.numel(), dtype=torch.float64, device="{device}") * 1.3).sin().mul(0.2).reshape(p.shape) + (p.dim() == 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.arange(16, device="{device}").reshape(2, 8)
losses = []
for _ in range(2):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(round(loss.item(), 3))
print(losses)
"""


@pytest.mark.parametrize(("name", "model"), [("Bert", "BertForMaskedLM"), ("Llama", "LlamaForCausalLM")])
def test_report_on_transformers(capsys: Any, script: Any, tmp_path: Path, device: str, name: str, model: str) -> None:
    pytest.importorskip("transformers")
    no_dropout = "BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, "
    path = script(TRAIN.format(name=name, model=model, device=device).replace("BertConfig(", no_dropout))
    native = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True).stdout
    code, out, err = gemsmode(capsys, "report", "--json", str(tmp_path / "r.json"), path)
    assert code == 0, err
    printed = json.loads(out.splitlines()[0])
    assert printed == pytest.approx(json.loads(native), abs=2e-3) and printed[1] < printed[0]
    report = Report.load(tmp_path / "r.json")
    phases = {(r.phase, r.decision) for r in report.compute}
    assert phases >= {("forward", "rule"), ("backward", "rule"), ("optimizer", "rule")}
    assert any(r.module.startswith(f"{model}.") and r.phase == "backward" for r in report.records)
    assert not any(r.decision == "error" for r in report.records), [r for r in report.records if r.decision == "error"]


# -- ops and explain ---------------------------------------------------------------------------------------------------


def test_ops_as_json(capsys: Any) -> None:
    code, out, _ = gemsmode(capsys, "ops", "--json", "add*")
    rows = {row["overload"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["add.Tensor"]["derived_from"] is None
    assert rows["add_.Tensor"]["derived_from"] == "add.Tensor" and rows["add.out"]["derived_from"] == "add.Tensor"
    (rule,) = rows["add.Tensor"]["rules"]
    assert set(rule) == {"name", "when", "file", "line"} and rule["name"] == "add" and "float16" in rule["when"]
    lines = Path(rule["file"]).read_text().splitlines()
    assert "def add" in "\n".join(lines[rule["line"] - 1:rule["line"] + 4])


def test_ops_by_pattern(capsys: Any) -> None:
    code, out, _ = gemsmode(capsys, "ops", "--json", "pointwise")
    assert code == 0 and {"exp", "add.Tensor"} <= {row["overload"] for row in json.loads(out)}
    assert [row["overload"] for row in json.loads(gemsmode(capsys, "ops", "--json", "aten.exp.default")[1])] == ["exp"]
    code, out, _ = gemsmode(capsys, "ops", "exp")
    assert code == 0 and "exp.out (from exp)" in out and "unary.py:" in out
    code, out, _ = gemsmode(capsys, "ops", "no_such*")
    assert code == 1 and "no registered overload matches 'no_such*'" in out
    assert gemsmode(capsys, "ops", "--json", "no_such*")[:2] == (1, "[]\n")


def meta(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], device: str = "meta") -> TensorMeta:
    return TensorMeta(dtype, shape, stride, torch.device(device))


@pytest.mark.parametrize(("text", "expected"), [
    ("f32[2,3]", meta(torch.float32, (2, 3), (3, 1))),
    ("bfloat16[2, 3]", meta(torch.bfloat16, (2, 3), (3, 1))),
    ("bool[]", meta(torch.bool, (), ())),
    ("b8[4]", meta(torch.bool, (4,), (1,))),
    ("i64[2,3]:1,2", meta(torch.int64, (2, 3), (1, 2))),
    ("half[2]@cuda:1", meta(torch.float16, (2,), (1,), "cuda:1")),
    ("[f32[2],f32[2,2]]", [meta(torch.float32, (2,), (1,)), meta(torch.float32, (2, 2), (2, 1))]),
    ("[0,-1]", [0, -1]), ("[]", []), ("2", 2), ("-2.5", -2.5), ("1e3", 1000.0), ("true", True), ("None", None),
    ("bf16", torch.bfloat16), ("mean", "mean"),
])
def test_arguments_as_text(text: str, expected: Any) -> None:
    got = cli.parse_argument(text)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(("text", "message"), [
    ("f31[2]", "'f31' in 'f31[2]' is no dtype"), ("f32[2,3]:1", "2 sizes and 1 strides"), ("[1,2", "list without its end"),
    ("f32[2", "is not a tensor"), ("f32[-1]", "is not a tensor"),
])
def test_arguments_that_are_none(text: str, message: str) -> None:
    with pytest.raises(cli.UsageError) as error:
        cli.parse_argument(text)
    assert message in str(error.value)


def test_explain(capsys: Any) -> None:
    code, out, _ = gemsmode(capsys, "explain", "add.Tensor", "f32[64,64]", "f32[64]", "alpha=2")
    assert code == 0 and "aten.add.Tensor(float32[64, 64], float32[64], alpha=2)" in out and "-> rule 'add' runs" in out
    code, out, _ = gemsmode(capsys, "explain", "silu", "i32[4]")
    assert code == 0 and "passes through: int32 is not in" in out
    code, out, _ = gemsmode(capsys, "explain", "--deny", "add", "add.Tensor", "f32[4]", "2")
    assert code == 0 and "denied by deny=" in out
    code, out, _ = gemsmode(capsys, "explain", "exp")
    assert code == 0 and "->" not in out and "unary.py:" in out
    code, out, _ = gemsmode(capsys, "explain", "--json", "exp", "f32[4]@xla")
    data = json.loads(out)
    assert data["decision"]["kind"] == "pass" and f"the mode works on {current().device_type}" in data["decision"]["reason"]


def test_explain_takes_what_reports_show(capsys: Any, script: Any, tmp_path: Path) -> None:
    path = script("import torch\nx = torch.ones(2, 3)\ntorch.cat([x, x], 1)\ntorch.stack([x, x])\nx.double().mul_(x)\n")
    gemsmode(capsys, "report", "--json", str(tmp_path / "r.json"), path)
    report = Report.load(tmp_path / "r.json")
    record = next(r for r in report.records if r.overload == "aten.cat.default")
    code, out, _ = gemsmode(capsys, "explain", record.overload, *record.inputs)
    assert code == 0 and ("->" in out)


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_explain_for_hardware_that_is_not_there(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """What a rule would do on a GPU, and what is left to PyTorch there, told on any machine."""
    monkeypatch.delenv("GEMSMODE_SLOWER", raising=False)  # with which nothing is left to PyTorch for its speed

    def explained(*arguments: str) -> str:
        run = subprocess.run([sys.executable, "-m", "gemsmode", "explain", *arguments], capture_output=True, text=True,
                             env={**os.environ, "GEMSMODE_TARGET": target})
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert "-> rule 'add' runs" in explained("add.Tensor", "bf16[8,8]", "bf16[8,8]")
    sort = explained("sort", "f32[1024,8192]", "-1", "False")
    assert ("faster for sorts of rows of more than 1024" in sort) == (target == "cuda:90")


def test_explain_says_what_is_wrong(capsys: Any) -> None:
    for arguments, expected in [
        (["nosuch"], "is not a known op; did you mean"),
        (["add.Tenso", "f32[2]", "1"], "'add.Tensor'"),
        (["add.Tensor", "f32[2]"], "needs other"),
        (["add.Tensor", "f32[2]", "1", "2", "3"], "takes 3 arguments"),
        (["add.Tensor", "f32[2]", "1", "beta=2"], "has no argument 'beta'"),
        (["add.Tensor", "f32[2]", "alpha=1", "2"], "stands after an argument given by name"),
        (["exp", "f31[2]"], "is no dtype"),
        ([], "the following arguments are required: OP"),
    ]:
        code, _, err = gemsmode(capsys, "explain", *arguments)
        assert code == 2 and expected in err and "Traceback" not in err, (arguments, err)


# -- doctor, help ------------------------------------------------------------------------------------------------------


def test_doctor(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = gemsmode(capsys, "doctor", "--json")
    data = json.loads(out)
    states = {check["name"]: check["state"] for check in data["checks"]}
    assert (code, data["ok"]) == (0, True)
    assert states["torch"] == states["triton"] == states["rules"] == states["cache folder"] == "ok"
    assert states["a kernel runs"] == ("ok" if current().present else "note")
    monkeypatch.setattr(torch, "__version__", "2.4.0+cu121")
    code, out, _ = gemsmode(capsys, "doctor")
    assert code == 1 and "FAIL  torch" in out and "pip install 'torch>=2.11'" in out


@pytest.mark.parametrize("command", ["demo", "report", "diff", "ops", "explain", "doctor"])
def test_help_has_examples(capsys: Any, command: str) -> None:
    code, out, _ = gemsmode(capsys, command, "--help")
    assert code == 0 and f"\n  gemsmode {command}" in out and "example" in out


def test_no_command(capsys: Any) -> None:
    code, out, _ = gemsmode(capsys)
    assert code == 2 and "gemsmode doctor" in out
    code, out, _ = gemsmode(capsys, "--version")
    assert code == 0 and out.startswith("gemsmode 0.")


def test_as_a_process() -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-m", "gemsmode", "explain", "exp", "f32[4]"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "-> rule 'exp' runs" in done.stdout and not done.stderr
    done = subprocess.run([sys.executable, "-m", "gemsmode", "explain", "nosuch"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not done.stdout and done.stderr.startswith("gemsmode: ")
