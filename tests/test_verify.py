"""Verification finds planted errors, with their place, and no others."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gemsmode
from gemsmode import GemsMode, MismatchError, MismatchWarning, Registry, demo, rule
from gemsmode.cli import main
from gemsmode.registry import find_op
from gemsmode.target import current
from gemsmode.tracing import Report, merge
from gemsmode.verify import Copies, Mismatch, Verifier

SIZE = demo.Size(width=16, layers=1, heads=2, batch=2, length=8, repeats=1)


def local(name: str, function: Any, **options: Any) -> Registry:
    """A registry with one simple rule, ``planted``."""
    registry = Registry("local")
    rule(name, name="planted", registry=registry, numbers=True, **options)(function)
    return registry


def verified(registry: Registry, **options: Any) -> GemsMode:
    return GemsMode(verify=True, registry=registry, **options)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_planted_error_is_found_with_its_module_and_site(device: str) -> None:
    registry = local("aten.silu.default", lambda x: (x / (1 + (-x).exp())) * torch.where(x > 1.5, 1.001, 1.0))
    found: list[Mismatch] = []
    model, quiet = Block().to(device), torch.full((2, 8), -1.0, device=device)
    with torch.no_grad():
        model.second[0].weight.copy_(torch.eye(8))
        model.second[0].bias.zero_()
        model.first.weight.copy_(torch.eye(8))
        model.first.bias.zero_()
    with verified(registry, on_mismatch=found.append) as mode:
        model(quiet)
        model(quiet)
        assert not found
        model(quiet.index_fill(0, torch.tensor([1], device=device), 3.0)).sum().backward()
    (mismatch,) = found
    assert (mismatch.overload, mismatch.rule) == ("aten.silu.default", "planted")
    assert (mismatch.module, mismatch.phase) == ("Block.second.1", "forward")
    assert mismatch.number == 3 and mismatch.inputs == ("f32[2,8]",)
    assert "test_verify.py" in mismatch.site and mismatch.site.endswith(" in forward")
    assert "8 of 16 elements are too far off" in mismatch.problem and "[1, " in mismatch.problem
    assert mismatch.error == pytest.approx(1e-3, rel=0.01)
    assert mismatch.error_eps == pytest.approx(1e-3 / torch.finfo(torch.float32).eps, rel=0.01)
    (check,) = mode.report.checks
    assert (check.compared, check.failed, check.module) == (3, 1, "Block.second.1") and check.first == str(mismatch)


def test_a_backward_is_attributed_to_its_module(device: str) -> None:
    registry = local("aten.silu_backward.default", lambda g, x: torch.ops.aten.silu_backward(g, x) + 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with verified(registry) as mode:
            model = Block().to(device)
            for _ in range(3):
                model(torch.ones(2, 8, device=device)).sum().backward()
    (check,) = mode.report.checks
    assert (check.failed, check.module, check.phase) == (3, "Block.second.1", "backward")
    assert sum(w.category is MismatchWarning for w in seen) == 1  # one is enough for each rule


def test_gemsmodes_own_rules_agree_through_a_training_step(device: str) -> None:
    torch.manual_seed(0)
    model = demo.Decoder(SIZE).to(device)
    tokens = demo.read_bytes(demo.TEXT, SIZE, torch.device(device))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with GemsMode(verify=True, on_mismatch="raise") as mode:
        model(tokens)[1].backward()
        optimizer.step()
    checks = mode.report.checks
    assert len(checks) > 20 and not any(c.failed for c in checks)
    assert sum(c.compared for c in checks) == sum(r.calls for r in mode.report.records if r.decision == "rule")
    assert max(c.allowed for c in checks) < 1
    assert "all agree" in str(mode.report)


F = nn.functional
CALLS = {
    "half": lambda x: x.half() @ x.half().t(),
    "bfloat16 softmax": lambda x: x.bfloat16().softmax(-1),
    "a sum that cancels": lambda x: torch.cat([x, -x]).sum(),
    "in place through a view": lambda x: x[:, 3:9].mul_(2),
    "in place from a view of itself": lambda x: x[0].add_(x[1]),
    "an out= that is resized": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "an out= in place of a view": lambda x: torch.exp(x[:4], out=torch.zeros(8, 16, device=x.device)[::2, :]),
    "infinities": lambda x: (x / 0).log(),
    "overflow": lambda x: (x.half() * 60000) * 4,
    "a dtype": lambda x: x.to(torch.float16),
    "integers": lambda x: x.int() * 3,
    "floor division": lambda x: x // 0.3,
    "comparison": lambda x: x > 0,
    "index of the largest": lambda x: (x > 0).int().argmax(1),
    "dropout": lambda x: torch.ops.aten.native_dropout(x.repeat(8, 8), 0.3, True),
    "random": lambda x: torch.rand(4000, device=x.device),
    "in place random": lambda x: x.repeat(8, 8).normal_(),
    "running statistics": lambda x: F.batch_norm(x, torch.zeros(16, device=x.device), torch.ones(16, device=x.device), training=True),
    "empty": lambda x: x[:0].exp() + x[:0],
    "lists": lambda x: torch._foreach_mul([x, x[0]], 2.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_false_alarm(name: str, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16).to(device)
    with GemsMode(verify=True, on_mismatch="raise") as mode:
        CALLS[name](x)
    assert not any(c.skipped or c.failed for c in mode.report.checks)
    if name not in ("empty",):
        assert sum(c.compared for c in mode.report.checks) >= 1


def _out_of_bounds(x: torch.Tensor) -> torch.Tensor:
    x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(7)
    return x.exp()


def _writes_input(x: torch.Tensor) -> torch.Tensor:
    result = x.exp()
    x.flatten()[0] = 5
    return result


PLANTED = {
    "strides": ("aten.exp.default", lambda x: x.exp().t().contiguous().t(), lambda x: x.exp(), "strides"),
    "dtype": ("aten.exp.default", lambda x: x.exp().double(), lambda x: x.exp(), "dtype torch.float64 where PyTorch gives torch.float32"),
    "shape": ("aten.exp.default", lambda x: x.exp()[:1], lambda x: x.exp(), r"shape \(1, 16\) where"),
    "NaN": ("aten.exp.default", lambda x: x.exp().where(x < 1e9, torch.nan), lambda x: (x * 0 + 2e9).exp(), "nan where"),
    "writes an input": ("aten.exp.default", _writes_input, lambda x: x.exp(), "outside of what is to be written"),
    "out of bounds": ("aten.exp.default", _out_of_bounds, lambda x: x[:4].exp(), "outside of what is to be written"),
    "integers": ("aten.bitwise_and.Tensor", lambda a, b: (a & b) + (a == 3), lambda x: torch.arange(8, device=x.device) & 7,
                 "1 of 8 elements differ"),
    "running statistics": ("aten.native_batch_norm.default", lambda *args: torch.native_batch_norm(*args[:6], 0.2, args[7]),
                           lambda x: F.batch_norm(x, torch.zeros(16, device=x.device), torch.ones(16, device=x.device), training=True),
                           "far off"),
    "in place": ("aten.exp_.default", lambda x: x.copy_(x.exp() * 1.01), lambda x: x[2:4].exp_(), "too far off"),
    "not random enough": ("aten.rand.default", lambda size, **o: torch.full(size, 0.5, **o), lambda x: torch.rand(1000, device=x.device),
                          "spread"),
    "wrong dropout": ("aten.native_dropout.default", lambda x, p, t: (x * 1.0, x > 0),
                      lambda x: torch.ops.aten.native_dropout(x, 0.5, True), "far off"),
    "16 bits": ("aten.add.Tensor", lambda a, b, **o: (a.float() + b.float() * 1.02).to(a.dtype),
                lambda x: x.bfloat16() + x.bfloat16(), "far off"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_is_said(name: str, device: str) -> None:
    op, function, program, problem = PLANTED[name]
    with pytest.raises(MismatchError, match=problem) as caught, verified(local(op, function), on_mismatch="raise") as mode:
        torch.manual_seed(0)
        program(torch.randn(8, 16).to(device))
    assert caught.value.mismatch.rule == "planted"
    report = mode.report
    assert report.checks[0].failed == 1 and "Verified" in str(report) and "do not" in str(report)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """``x`` with TF32's mantissa of 10 bits."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


# What PyTorch makes of float32 attention that needs gradients differs by device.
ATTENTION = f"aten._scaled_dot_product_{'flash_attention_for_cpu' if current().device_type == 'cpu' else 'efficient_attention'}"
ATTENTION_BACKWARD = f"{ATTENTION}_backward.default"


def _attention_backward() -> None:
    g, q, k, v = torch.randn(4, 2, 2, 40, 16)
    if current().device_type == "cpu":
        out, lse = find_op(f"{ATTENTION}.default")(q, k, v)
        find_op(ATTENTION_BACKWARD)(g, q, k, v, out, lse, 0.0, False)
    else:
        out, *saved = find_op(f"{ATTENTION}.default")(q, k, v, None, True)
        find_op(ATTENTION_BACKWARD)(g, q, k, v, None, out, *saved, 0.0, [True, True, True, False])


TF32 = {
    "mm": ("aten.mm.default", lambda a, b: _rounded(a) @ _rounded(b), lambda: torch.randn(16, 200) @ torch.randn(200, 16)),
    "convolution": ("aten.convolution.default", lambda x, w, *rest: torch.convolution(_rounded(x), _rounded(w), *rest),
                    lambda: F.conv2d(torch.randn(2, 16, 8, 8), torch.randn(4, 16, 3, 3))),
    "convolution backward": ("aten.convolution_backward.default",
                             lambda g, x, w, *rest: torch.ops.aten.convolution_backward(_rounded(g), _rounded(x), _rounded(w), *rest),
                             lambda: (F.conv2d(torch.randn(2, 16, 8, 8), torch.randn(4, 16, 3, 3, requires_grad=True))
                                      * torch.randn(2, 4, 6, 6)).sum().backward()),
    "attention backward": (ATTENTION_BACKWARD,
                           lambda g, q, k, v, *rest, **o: find_op(ATTENTION_BACKWARD)(
                               _rounded(g), _rounded(q), _rounded(k), _rounded(v), *rest, **o),
                           _attention_backward),
}


@pytest.mark.parametrize("name", TF32)
def test_tf32_is_tolerated_where_it_is_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, function, program = TF32[name]
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")
    # The CPU stands for the GPU: the same question, of another device.
    asked = gemsmode.verify.may_be_tf32
    monkeypatch.setattr(gemsmode.verify, "may_be_tf32", lambda name, dtype, _: asked(name, dtype, "cuda"))
    monkeypatch.setattr(gemsmode.verify, "_float32_precision", lambda kind: "tf32")
    torch.manual_seed(0)
    with verified(local(op, function), on_mismatch="raise") as mode:
        program()
    (check,) = mode.report.checks
    assert check.compared == 1 and 0.001 < check.allowed < 1
    monkeypatch.setattr(gemsmode.verify, "_float32_precision", lambda kind: "ieee")
    torch.manual_seed(0)
    with pytest.raises(MismatchError, match="too far off"), verified(local(op, function), on_mismatch="raise"):
        program()


def test_what_tf32_does_not_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gemsmode.verify.may_be_tf32
    monkeypatch.setattr(gemsmode.verify, "may_be_tf32", lambda name, dtype, _: asked(name, dtype, "cuda"))
    monkeypatch.setattr(gemsmode.verify, "_float32_precision", lambda kind: "tf32")
    planted = local("aten.mm.default", lambda a, b: a @ b * 1.2)
    with pytest.raises(MismatchError, match="too far off"), verified(planted, on_mismatch="raise"):
        torch.rand(16, 200) @ torch.rand(200, 16)


@pytest.mark.parametrize("allowed", ["conv", "matmul"])
def test_who_may_use_tf32(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemsmode.verify, "_float32_precision", lambda kind: "tf32" if kind == allowed else "ieee")
    may = gemsmode.verify.may_be_tf32
    names = "convolution", "convolution_backward", "addmm", "linear", "_scaled_dot_product_efficient_attention_backward", "sum", "cumsum"
    found = [name for name in names if may(name, torch.float32, "cuda")]
    assert found == list(names[:2] if allowed == "conv" else names[2:5])
    assert not any(may(name, torch.float64, "cuda") or may(name, torch.float32, "cpu") for name in names)


def test_random_numbers_of_the_program_are_not_used_up(device: str) -> None:
    def draw(mode: Any) -> torch.Tensor:
        torch.manual_seed(3)
        with mode:
            return torch.stack([torch.rand(200, device=device).sum() for _ in range(3)])

    assert torch.equal(draw(GemsMode()), draw(GemsMode(verify=True)))


def test_copies_share_memory_as_the_arguments_do() -> None:
    x = torch.arange(1000.0)
    a, b = x[500:510], x[505:515:2]
    copies = Copies((a, [b, None], 3))
    c, (d, none), three = copies.args
    assert torch.equal(a, c) and torch.equal(b, d) and none is None and three == 3
    c[5] = -1
    assert d[0] == -1 and x[505] == 505
    assert c.untyped_storage().nbytes() < 300  # not all of the storage that they are views of
    x[503] = 0
    assert copies.changed_outside([]) and not copies.changed_outside([a])


def test_what_pytorch_cannot_run_is_not_compared() -> None:
    def made_up(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    library = torch.library.Library("gemstest", "DEF")
    library.define("only_here(Tensor x) -> Tensor")
    op = torch.ops.gemstest.only_here.default
    registry = Registry("local")
    rule(op, name="planted", registry=registry)(made_up)
    with verified(registry) as mode:
        op(torch.ones(3))
    (check,) = mode.report.checks
    assert (check.compared, check.skipped) == (0, 1) and "raises" in check.why
    library._destroy()


def test_a_rule_that_fails_is_fallen_back_from_as_ever() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    with verified(local("aten.exp.default", fails)) as mode, pytest.warns(RuntimeWarning, match="PyTorch's own"):
        torch.zeros(3).exp()
    assert mode.report.checks == ()
    assert [r.decision for r in mode.report.compute if r.overload == "aten.exp.default"] == ["error"]


def test_on_mismatch_is_checked() -> None:
    with pytest.raises(ValueError, match="'warn', 'raise' or a function"):
        Verifier("explode")


def test_checks_are_part_of_every_format_and_merge() -> None:
    with verified(local("aten.exp.default", lambda x: x.exp() * 2), on_mismatch=lambda m: None) as mode:
        torch.ones(3).exp()
    report = mode.report
    assert Report.from_dict(report.to_dict()).checks == report.checks
    for text in (str(report), report.to_markdown(), report.to_html(), report._repr_html_()):
        assert "Verified" in text and "planted" in text
    (check,) = merge([report, report]).checks
    assert (check.compared, check.failed, check.error) == (2, 2, report.checks[0].error)


RULE = """
import torch
from gemsmode import rule

@rule("aten.silu.default", name="bad_silu")
def bad_silu(x):
    return torch.sigmoid(x) * x * 1.01
"""


def test_the_command_finds_an_error_and_writes_a_reproducer(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (tmp_path / "my_rule.py").write_text(RULE)
    script = tmp_path / "train.py"
    script.write_text("import my_rule, torch\nx = torch.randn(4, 40)[:, ::2]\ntorch.nn.functional.silu(x)\nprint('end')\n")
    try:
        with pytest.warns(MismatchWarning, match="bad_silu"):
            code = main(["verify", "--reproducers", str(tmp_path / "wrong"), str(script)])
    finally:
        gemsmode.registry.default.remove("bad_silu")
    out = capsys.readouterr().out
    assert code == 1 and "end" in out and "bad_silu" in out and "1 do not, of 1 overload" in out
    reproducer = tmp_path / "wrong" / "silu-bad_silu" / "reproduce.py"
    lines = reproducer.read_text().splitlines()
    assert len(lines) <= 12 and "import my_rule  # registers the rule" in lines
    saved = torch.load(reproducer.with_name("inputs.pt"), weights_only=False)
    assert saved["op"] == "aten.silu.default" and saved["args"][0].stride() == (40, 2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run([sys.executable, str(reproducer)], capture_output=True, text=True, timeout=120, check=False)
    assert "rule 'bad_silu': 80 of 80 elements are too far off" in done.stdout, done.stderr
    good = tmp_path / "good.py"
    good.write_text("import torch\ntorch.randn(3).exp()\n")
    assert main(["verify", str(good)]) == 0
