"""Each example runs, on the CPU, and does what its first lines say."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemsmode import load_ops, registry

EXAMPLES = Path(__file__).parent.parent / "examples"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs an example as ``python examples/NAME.py ARGS`` does, in an empty folder: its exit code, and what it printed."""
    load_ops()
    before = set(map(id, registry.default.rules))

    def run_example(name: str, *args: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *args])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    yield run_example
    for rule in [r for r in registry.default.rules if id(r) not in before]:
        registry.default.remove(rule.name)


def test_generation_gives_the_same_tokens(run: Run) -> None:
    pytest.importorskip("transformers")
    code, printed = run("generate.py", "--tokens", "3")
    assert code == 0 and "3 tokens under the mode" in printed and "the same tokens as without it" in printed
    assert "coverage of compute: 100.0% of calls" in printed


@pytest.mark.parametrize("wrong", [False, True])
def test_a_rule_of_ones_own_is_hit_and_verified(run: Run, wrong: bool) -> None:
    code, printed = run("custom_rule.py", *["--wrong"] * wrong)
    assert code == wrong and "-> rule 'my_silu' runs" in printed and "-> rule 'silu' runs" in printed
    assert "2 calls compared" in printed and ("all agree" in printed) != wrong
    assert ("in Sequential.1 (forward)" in " ".join(printed.split())) == wrong


def test_training_with_amp(run: Run) -> None:
    code, printed = run("amp_training.py", "--steps", "2", "--width", "16")
    losses = [line.split() for line in printed.splitlines() if line.startswith("step ")]
    assert code == 0 and len(losses) == 2
    for words in losses:
        assert float(words[3]) == pytest.approx(float(words[5]), rel=1e-3)
    kernels = printed.partition("own kernels:")[2]
    for name in ("_amp_foreach_non_finite_check_and_unscale_ -> unscale, 2 calls", "_fused_adamw_"):
        assert name in kernels


def test_bringing_up_a_model(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code, printed = run("bring_up.py", "--layers", "2", "--target", "hip:gfx942")
    assert code == 0 and "Qwen2ForCausalLM" in printed and "coverage on hip:gfx942" in printed and "to write next" in printed
    assert "gemsmode report" in (tmp_path / "bring_up.html").read_text(encoding="utf-8")


def test_a_trainer(run: Run) -> None:
    pytest.importorskip("transformers")
    code, printed = run("trainer.py", "--steps", "1")
    if importlib.util.find_spec("accelerate") is None:
        assert code == 2 and "pip install accelerate" in printed
        pytest.skip("accelerate is not installed; the example says so")
    assert code == 0 and "step 1: loss" in printed and "BertForSequenceClassification" in printed


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(names) >= 5 and all(f'"{name}"' in source for name in names)
