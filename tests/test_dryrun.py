"""Dry runs: the decisions of a real run, on tensors that have no memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import skip_without_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gemsmode
from gemsmode import DryRunError, GemsMode, demo
from gemsmode.cli import main
from gemsmode.dryrun import Memory, OnMeta, target_of
from gemsmode.target import INTERPRETER, Target
from gemsmode.tracing import Report

SIZE = demo.Size(width=16, layers=1, heads=2, batch=2, length=8, repeats=1)
H200 = "cuda:90"


def decisions(report: Report, compute_only: bool = True) -> Counter[Any]:
    """Calls by op, rule or reason, shapes and module."""
    found: Counter[Any] = Counter()
    for r in report.compute if compute_only else report.records:
        found[r.overload, r.decision, r.rule, r.inputs, r.module, r.phase] += r.calls
    return found


def step(mode: GemsMode, model: nn.Module, tokens: torch.Tensor) -> Report:
    with mode:
        model(tokens)[1].backward()
    return mode.report


class Layer(nn.Module):
    """An encoder's layer, with what the CPU takes apart in its own way, and a loss."""

    def __init__(self, size: demo.Size) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, size.width), nn.Linear(size.width, 256)
        self.layer = nn.TransformerEncoderLayer(size.width, size.heads, 32, dropout=0.0, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.layer(self.embedding(tokens)))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize(("kind", "standing"), [(demo.Decoder, "meta"), (demo.Decoder, "fake"), (Layer, "fake")])
def test_decisions_agree_with_a_real_run(kind: Any, standing: str, device: str) -> None:
    if device == "cuda" and standing == "fake":
        pytest.skip("fake tensors on a GPU keep their own device; the meta device is compared there")
    with torch.device(device):
        real = step(GemsMode(trace=True), kind(SIZE), torch.zeros(2, 8, dtype=torch.long))
    where: Any = "cpu" if device == "cpu" else True
    if standing == "meta":
        with torch.device("meta"):
            dry = step(GemsMode(dry_run=where), kind(SIZE), torch.zeros(2, 8, dtype=torch.long))
    else:
        with FakeTensorMode():
            dry = step(GemsMode(dry_run=where), kind(SIZE), torch.zeros(2, 8, dtype=torch.long))
    assert decisions(dry) == decisions(real)
    assert dry.coverage.calls == real.coverage.calls > 0.5
    assert dry.environment["timing"] == "none" and not any(r.time_s for r in dry.records)


def test_attention_norms_dropout_and_optimizers_are_taken_apart_as_on_a_gpu() -> None:
    with torch.device("meta"):
        q = torch.empty(1, 4, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(64, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(1, 1, 16, 16, dtype=torch.bool)
    f = nn.functional

    def ops(where: str, function: Any) -> set[str]:
        with GemsMode(dry_run=where) as mode:
            function()
        return {r.overload.removeprefix("aten.").removesuffix(".default") for r in mode.report.compute}

    def attend(**options: Any) -> None:
        f.scaled_dot_product_attention(q, q, q, **options).sum().backward()

    assert "_scaled_dot_product_cudnn_attention" in ops("cuda:90", attend)
    flash = ops("cuda:80", attend)
    assert {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"} <= flash and "bmm" not in flash
    assert "_scaled_dot_product_efficient_attention_backward" in ops("cuda:80", lambda: attend(attn_mask=mask))
    assert "bmm" in ops("cuda:90", lambda: f.scaled_dot_product_attention(q.double(), q.double(), q.double()))
    assert {"native_dropout", "native_dropout_backward"} <= ops(H200, lambda: f.dropout(q, 0.5).sum().backward())
    norm = ops(H200, lambda: f.rms_norm(q, (64,), weight).sum().backward())
    assert {"_fused_rms_norm", "_fused_rms_norm_backward"} <= norm and "rsqrt" not in norm
    with torch.device("meta"):
        images, batch_norm = torch.empty(2, 8, 4, 4), nn.BatchNorm2d(8)
    assert {"cudnn_batch_norm", "cudnn_batch_norm_backward"} <= ops(H200, lambda: batch_norm(images).sum().backward())
    half = ops(H200, lambda: batch_norm.to(torch.bfloat16)(images.bfloat16()).sum().backward())
    assert "native_batch_norm" in half and "cudnn_batch_norm" not in half
    weight.grad = torch.empty_like(weight)
    assert any(name.startswith("_foreach_") for name in ops(H200, torch.optim.AdamW([weight]).step))
    with torch.inference_mode():
        inference = torch.empty(1, 4, 16, 64, dtype=torch.bfloat16, device="meta")
        seen = ops("cuda:80", lambda: f.scaled_dot_product_attention(inference, inference, inference))
    assert seen & {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention"} and "bmm" not in seen
    assert "_scaled_dot_product_flash_attention_for_cpu" in ops("cpu", lambda: f.scaled_dot_product_attention(q, q, q))
    # Afterwards the meta device is itself again.
    with GemsMode(allow=[], trace=True) as mode:
        f.scaled_dot_product_attention(q, q, q)
    assert "_scaled_dot_product" not in str(mode.report)
    assert "_scaled_dot_product_flash_attention" not in ops("cpu", lambda: f.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(("where", "dtype", "kind"), [
    (H200, torch.float32, "_safe_softmax"), (H200, torch.bfloat16, "_scaled_dot_product_cudnn_attention"),
    ("cuda:80", torch.float16, "_scaled_dot_product_flash_attention")])
def test_heads_that_share_keys(where: str, dtype: torch.dtype, kind: str) -> None:
    """Memory-efficient attention does not know of them: in float32 they go through the math."""
    with torch.device("meta"):
        q, k = (torch.empty(2, heads, 8, 16, dtype=dtype, requires_grad=True) for heads in (4, 2))
    for gradients in (False, True):
        with GemsMode(dry_run=where) as mode, torch.set_grad_enabled(gradients):
            result = nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
            if gradients:
                result.sum().backward()
        seen = {r.overload.removeprefix("aten.").removesuffix(".default") for r in mode.report.compute}
        assert kind in seen and "_scaled_dot_product_efficient_attention" not in seen
        assert ("bmm" in seen) == (dtype == torch.float32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_convolutions_are_laid_out_by_input_and_weight(layout: torch.memory_format) -> None:
    """Whatever the layout of the gradient that comes in: autograd keeps the weight's gradient as it is then."""
    with torch.device("meta"):
        images, convolution = torch.empty(2, 3, 8, 8).to(memory_format=layout), nn.Conv2d(3, 6, 2).to(memory_format=layout)
        gradients = [torch.empty(2, 6, 7, 7).to(memory_format=m) for m in (torch.contiguous_format, torch.channels_last)]
    for gradient in gradients:
        convolution.zero_grad()
        with GemsMode(dry_run=H200) as mode:
            convolution(images).backward(gradient)
        assert [r.overload for r in mode.report.compute if r.phase == "backward"] == ["aten.convolution_backward.default"]
        assert convolution.weight.grad is not None and convolution.weight.grad.stride() == convolution.weight.stride()


def test_no_kernel_runs_and_no_real_memory_is_taken() -> None:
    def never(*args: Any) -> torch.Tensor:
        raise AssertionError("ran")

    registry = gemsmode.Registry("local")
    gemsmode.rule("aten.exp.default", name="never", registry=registry)(never)
    x = torch.empty(2**40, device="meta")
    with GemsMode(dry_run=H200, registry=registry) as mode:
        y = x.exp()
    assert y.is_meta and y.shape == x.shape
    (record,) = mode.report.compute
    assert (record.decision, record.rule, record.time_s) == ("rule", "never", 0.0)


def test_a_boolean_mask_selects_everything_and_the_setting_is_put_back() -> None:
    from torch.fx.experimental import _config

    with GemsMode(dry_run=H200):
        x = torch.empty(3, 4, device="meta")
        assert x[x > 0].shape == (12,)
    assert not _config.meta_nonzero_assume_all_nonzero


def test_real_tensors_beside_meta_tensors() -> None:
    table = torch.empty(10, 4, device="meta")
    with GemsMode(dry_run=H200) as mode:
        rows = nn.functional.embedding(torch.tensor([1, 2, 3]), table)
        scaled = rows * torch.tensor(2.0)
        moved = scaled.cpu()
    assert rows.is_meta and scaled.shape == (3, 4) and moved.is_meta
    assert {r.decision for r in mode.report.compute if r.overload in ("aten.embedding.default", "aten.mul.Tensor")} == {"rule"}


def test_values_that_are_read_are_one_and_counted() -> None:
    with GemsMode(dry_run=H200) as mode:
        x = torch.zeros(3, device="meta")
        assert (x.sum().item(), bool((x > 0).any()), int(x.argmax())) == (1.0, True, 1)
    assert any(note.startswith("3 values were read") for note in mode.report.notes)


def test_a_fake_cuda_tensor_with_gradients_is_refused_where_it_would_end_the_process() -> None:
    if torch.backends.cuda.is_built():
        pytest.skip("this PyTorch has CUDA's device guard")
    with FakeTensorMode():
        x = torch.empty(32, 32, device="cuda", requires_grad=True)
        with GemsMode(dry_run=H200) as mode:
            with torch.no_grad():
                y = x @ x
            with pytest.raises(DryRunError, match="meta"):
                x @ x
    assert y.device.type == "cuda"
    assert [r.rule for r in mode.report.compute] == ["mm"]


def test_targets() -> None:
    assert target_of("cpu") is INTERPRETER
    assert target_of("hip:gfx942").backend == "hip" and target_of("cuda:100").arch == 100
    assert target_of(Target("cuda", "cuda", 80, multiprocessors=108)).multiprocessors == 108
    assert not target_of(True).present
    with pytest.raises(ValueError, match="cuda:90"):
        GemsMode(dry_run="H200")
    with pytest.raises(ValueError, match="one of the two"):
        GemsMode(dry_run=True, verify=True)


def test_memory_counts_each_storage_once_and_while_it_lives() -> None:
    memory = Memory()
    a = torch.empty(100, device="meta")
    memory.see(a)
    memory.see(a[10:])
    assert (memory.bytes, memory.peak) == (400, 400)
    b = torch.empty(50, device="meta")
    memory.see(b)
    del a
    memory.see(torch.empty(1, device="meta"))
    assert (memory.bytes, memory.peak) == (200, 600)


def test_reports_of_dry_runs_are_written_and_read(tmp_path: Path) -> None:
    with GemsMode(dry_run=H200) as mode:
        x = torch.empty(8, 8, device="meta")
        x @ x
    report = mode.report
    again = Report.from_dict(report.to_dict())
    assert str(again) == str(report)
    assert "timing none" in report.to_html() and "| bytes |" in report.to_markdown()
    with pytest.raises(ValueError, match="dry run"):
        report.to_chrome_trace()


SCRIPT = """
import sys, numpy, torch
from torch import nn
device = sys.argv[1]
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(device)
optimizer = torch.optim.AdamW(model.parameters())
data = torch.from_numpy(numpy.ones((4, 64))).to(torch.get_default_dtype()).to(device)
loss = model(data).sum()
loss.backward()
optimizer.step()
print(loss.item(), loss.dtype)
"""


def test_the_command_takes_an_unchanged_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for device in ("cpu", "cuda"):
        code = main(["report", "--dry-run", "--target", H200, "--dtype", "bf16", str(script), device])
        out, err = capsys.readouterr()
        assert code == 0, f"on {device}: {err}"
        assert "1.0 torch.bfloat16" in out and "in a dry run for cuda:90" in out and "_foreach_" in out
    assert torch.get_default_dtype() == torch.float32
    assert main(["report", "--target", H200, str(script)]) == 2 and "--dry-run" in capsys.readouterr().err
    assert main(["report", "--dry-run", "--target", "H200", str(script)]) == 2 and "cuda:90" in capsys.readouterr().err
    assert main(["report", "--dry-run", "--dtype", "i64", str(script)]) == 2


def test_numbers_that_fake_tensors_know_end_when_they_are_written() -> None:
    """An optimizer's steps start as 0, are counted up in a list, and are divided by."""
    with FakeTensorMode(), GemsMode(dry_run=H200):
        known, counted = torch.tensor(3.0), torch.tensor(0.0)
        torch._foreach_add_([counted], 1)
        assert known.item() == 3 and counted.item() != 0


@pytest.mark.parametrize("wrap", [FakeTensorMode, OnMeta])
@pytest.mark.parametrize("spelling", ["add_", "add_ tensor", "add.out", "foreach scalar", "foreach tensor", "foreach meta", "list"])
def test_steps_are_not_zero_however_they_are_counted(wrap: Any, spelling: str) -> None:
    with wrap(), GemsMode(dry_run=H200):
        step = torch.tensor(0.0)
        count: dict[str, Any] = {
            "add_": lambda: step.add_(1), "add_ tensor": lambda: step.add_(torch.tensor(1.0, device="cpu")),
            "add.out": lambda: torch.add(step, 1, out=step), "foreach scalar": lambda: torch._foreach_add_([step], 1),
            "foreach tensor": lambda: torch._foreach_add_([step], torch.tensor(1.0, device="cpu"), alpha=1.0),
            "foreach meta": lambda: torch._foreach_add_([step], torch.ones((), device="cpu"), alpha=1.0),
            "list": lambda: torch._foreach_add_([step], [torch.tensor(1.0)])}
        count[spelling]()
        assert step.item() == 1 and 1 - 0.9**step.item() > 0


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizers_steps(kind: Any, options: dict[str, Any]) -> None:
    with OnMeta(), GemsMode(dry_run=H200) as mode:
        weight = nn.Parameter(torch.ones(4, 4))
        weight.grad = torch.ones(4, 4)
        optimizer = kind([weight], **options)
        for _ in range(2):
            optimizer.step()
    assert mode.report.compute


def test_the_gpu_agrees_with_its_dry_run(device: str) -> None:
    skip_without_cuda(device)
    f = nn.functional

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm, self.out = nn.Linear(64, 192), nn.RMSNorm(64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.view(2, 16, 4, 16).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            x = f.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 16, 64)
            return self.out(f.dropout(x, 0.1))

    def run(where: str, mode: GemsMode) -> Counter[Any]:
        with torch.device(where):
            net, x = Net().to(torch.bfloat16), torch.ones(2, 16, 64, dtype=torch.bfloat16)
        with mode:
            net(x).sum().backward()
        return decisions(mode.report)

    assert run("meta", GemsMode(dry_run=True)) == run("cuda", GemsMode(trace=True))
