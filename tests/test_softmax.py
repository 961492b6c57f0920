"""Softmax and log-softmax: dimensions, strides, extreme values, long rows, each scheme, and the kernels at GPU sizes."""

from __future__ import annotations

import math
from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from support import in_order, reason, run

import gemsmode
from gemsmode import registry
from gemsmode.handlers import Policy
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import rows, softmax  # noqa: E402  (they need what load_ops arranges)

aten = torch.ops.aten
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAN, INF = math.nan, math.inf
FORWARD = ("aten._softmax.default", "aten._log_softmax.default")
BACKWARD = ("aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default")


def check(name: str, *args: Any) -> None:
    """The call is intercepted, and right by PyTorch's result or a float64 reference."""
    op = find_op(name)
    assert harness.check_call(op, in_order(op, args, {}), "reduction"), harness.label(op, args)


LAYOUTS = {
    "last": (lambda d: torch.randn(5, 7, device=d), 1),
    "first": (lambda d: torch.randn(5, 7, device=d), 0),
    "middle": (lambda d: torch.randn(3, 40, 6, device=d), 1),
    "middle of short rows": (lambda d: torch.randn(30, 4, 2, device=d), 1),
    "negative dim": (lambda d: torch.randn(2, 3, 5, device=d), -2),
    "transposed": (lambda d: torch.randn(9, 20, device=d).t(), 0),
    "permuted": (lambda d: torch.randn(4, 3, 50, device=d).permute(2, 0, 1), 1),
    "five dimensions": (lambda d: torch.randn(2, 3, 4, 5, 6, device=d).transpose(1, 3), 2),
    "gaps": (lambda d: torch.randn(6, 20, device=d)[::2, 1::3], 1),
    "expanded rows": (lambda d: torch.randn(1, 9, device=d).expand(4, 9), 1),
    "expanded columns": (lambda d: torch.randn(4, 1, device=d).expand(4, 9), 1),
    "one column": (lambda d: torch.randn(6, 1, device=d), 1),
    "0-dim": (lambda d: torch.randn((), device=d), 0),
    "empty rows": (lambda d: torch.randn(3, 0, device=d), 1),
    "no rows": (lambda d: torch.randn(0, 3, device=d), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts(dtype: torch.dtype, layout: str, device: str) -> None:
    make, dim = LAYOUTS[layout]
    x = make(device).to(dtype)
    for forward, backward in zip(FORWARD, BACKWARD):
        check(forward, x, dim, False)
        y = torch.ops.aten._softmax(x, dim, False) if "log" not in forward else torch.ops.aten._log_softmax(x, dim, False)
        check(backward, torch.randn(x.shape, device=device).to(dtype), y, dim, dtype)
        if x.ndim:
            check(backward, torch.ones((), device=device, dtype=dtype).expand(x.shape), y, dim, dtype)
    check("aten._safe_softmax.default", x, dim, None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_values(dtype: torch.dtype, device: str) -> None:
    rows_of = torch.tensor([
        [1e4, -1e4, 0, 1], [-1e4, -1e4, -1e4, -1e4], [-INF, -INF, -INF, -INF], [-INF, 2, -INF, 2], [INF, 0, 1, 2],
        [NAN, 0, 1, 2], [-INF, NAN, -INF, -INF], [0, 0, 0, 0], [NAN, NAN, NAN, NAN], [INF, -INF, NAN, 0],
    ], device=device).to(dtype)
    for x, dim in ((rows_of, 1), (rows_of.t().contiguous(), 0)):
        for name in FORWARD:
            check(name, x, dim, False)
        check("aten._safe_softmax.default", x, dim, None)
    assert run("aten._softmax.default", rows_of[2], 0, False).isnan().all()
    assert (run("aten._safe_softmax.default", rows_of[2], 0, None) == 0).all()
    assert run("aten._safe_softmax.default", rows_of[6], 0, None).isnan().all()
    assert run("aten._softmax.default", rows_of[0], 0, False).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("n", [100_000, 262_144])
def test_long_rows(n: int, device: str) -> None:
    """One row is split over programs, several are read twice."""
    for shape in ((1, n), (6, n)):
        x = torch.randn(shape, device=device) * 5
        x[0, 1000:5000] = -INF
        exact = x.double()
        for name, reference in zip(FORWARD, (torch.softmax, torch.log_softmax)):
            got = run(name, x, 1, False)
            torch.testing.assert_close(got.double(), reference(exact, 1), rtol=1e-5, atol=1e-7)
        y = torch.softmax(x, 1)
        g = torch.randn_like(x)
        expected = y.double() * (g.double() - (g.double() * y.double()).sum(1, keepdim=True))
        torch.testing.assert_close(run(BACKWARD[0], g, y, 1, torch.float32).double(), expected, rtol=1e-4, atol=1e-8)
        y = torch.log_softmax(x, 1)
        expected = g.double() - y.double().exp() * g.double().sum(1, keepdim=True)
        torch.testing.assert_close(run(BACKWARD[1], g, y, 1, torch.float32).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(9,), (3, 3)], ids=["rows", "strided rows"])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rows_that_fill_the_registers(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """Each program takes several rows, the last ones fewer; the rows lie in two dimensions that do not merge."""
    width = 40_000 if device == "cpu" else 20_000  # a row fills the interpreter's block, and a GPU's registers
    x = torch.randn(*shape, width, device=device) * 3
    x.view(-1, width)[0] = -INF
    x.view(-1, width)[1, 7] = 1e4
    if device == "cuda":
        x = x.repeat(torch.cuda.get_device_properties(0).multi_processor_count, *[1] * (x.ndim - 1))
    x = torch.cat([x, x], 0).to(dtype)[::2] if len(shape) == 2 else x.to(dtype)
    planned = Policy(registry.default).handler(find_op(FORWARD[0])).decide((TensorMeta.of(x), x.ndim - 1, False), bind=False).plan
    assert planned is not None and [step.kernel for step in planned.launches] == [softmax.softmax_rows_kernel]
    for name in FORWARD:
        check(name, x, x.ndim - 1, False)
    check("aten._safe_softmax.default", x, x.ndim - 1, None)


@pytest.mark.parametrize("scheme", ["loop", "split", "loop along rows"])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_schemes(dtype: torch.dtype, scheme: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schemes for long rows, on short ones: rows of only -inf, steps without a value, a last step that is not full."""
    tiles = {"loop": rows.Tile(4, 16, 4, True), "split": rows.Tile(1, 16, 4, True, 3),
             "loop along rows": rows.Tile(8, 16, 4, True, 0, False)}
    monkeypatch.setattr(softmax, "choose_tile", lambda *_: tiles[scheme])
    x = torch.randn(6, 600, device=device)
    x[0] = -INF
    x[1, :400] = -INF
    x[2, 5] = NAN
    x[3, -1] = 1e4
    x[4, 500:] = -INF
    x = x.to(dtype)
    if scheme == "loop along rows":
        x = x.t().contiguous()
    dim = 0 if scheme == "loop along rows" else 1
    for name in FORWARD:
        check(name, x, dim, False)
    check("aten._safe_softmax.default", x, dim, None)
    y, g = torch.softmax(x.nan_to_num(0, neginf=-50), dim), torch.randn(x.shape, device=device).to(dtype)
    check(BACKWARD[0], g, y, dim, dtype)
    check(BACKWARD[1], g, y.float().clamp(1e-30).log().to(dtype), dim, dtype)


def test_safe_softmax_dtype(device: str) -> None:
    x = torch.randn(3, 5, device=device).to(torch.bfloat16)
    x[1] = -INF
    check("aten._safe_softmax.default", x, 1, torch.float32)
    check("aten._safe_softmax.default", x, 1, torch.float64)
    assert "narrows" in reason("aten._safe_softmax.default", x.double(), 1, torch.float32)


def test_out_variants(device: str) -> None:
    x = torch.randn(4, 6, device=device)
    y = torch.softmax(x, 1)
    for name, args in (("aten._softmax.out", (x, 1, False)), ("aten._log_softmax.out", (x, 1, False)),
                       ("aten._softmax_backward_data.out", (x, y, 1, torch.float32)),
                       ("aten._log_softmax_backward_data.out", (x, y, 1, torch.float32))):
        check(name, *args, torch.empty(4, 6, device=device))
        # PyTorch's own CPU kernels write a strided result in the wrong order.
        out = torch.empty(6, 4, device=device).t()
        run(name, *args, out)
        torch.testing.assert_close(out, getattr(aten, name.split(".")[1]).default(*args))


def test_what_pytorch_rejects_passes_through(device: str) -> None:
    x = torch.randn(3, 4, device=device)
    assert "out of range" in reason("aten._softmax.default", x, 5, False)
    assert "int64 is not in" in reason("aten._softmax.default", x.long(), 1, False)
    assert "differ" in reason(BACKWARD[0], x, x[:2], 1, torch.float32)
    if device == "cpu":
        assert "half_to_float" in reason("aten._softmax.default", x.half(), 1, True)
        with pytest.raises(RuntimeError, match="half to float"), gemsmode.GemsMode():
            torch.ops.aten._softmax(x.half(), 1, True)


def test_two_runs_agree(device: str) -> None:
    x = torch.randn(3, 100_000, device=device)
    for name in FORWARD:
        assert torch.equal(run(name, x, 1, False), run(name, x, 1, False))


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "softmin", "cross_entropy"])
def test_functional_forward_and_backward(function: str, device: str) -> None:
    x = torch.randn(6, 10, device=device, requires_grad=True)
    args = (torch.randint(0, 10, (6,), device=device),) if function == "cross_entropy" else (1,)
    reference = x.detach().double().requires_grad_()
    (getattr(torch.nn.functional, function)(reference, *args) ** 2).sum().backward()
    outcome = harness.under_mode(lambda: (getattr(torch.nn.functional, function)(x, *args) ** 2).sum().backward())
    names = {str(op) for op, decision in outcome.calls if decision.kind == "rule"}
    assert names & set(FORWARD) and names & set(BACKWARD), names
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


# -- launch choice and GPU sizes ---------------------------------------------------------------------------------------

H200 = Target("cuda", "cuda", 90, present=False)


def tile(shape: tuple[int, ...], dim: int, itemsize: int = 4, stride: tuple[int, ...] | None = None) -> rows.Tile:
    contiguous = torch.empty(shape, device="meta").stride()
    return rows.choose_tile(rows.split_rows(shape, (dim,), [contiguous, stride or contiguous]), itemsize, H200)


def test_launch_choice() -> None:
    assert tile((16384, 4096), 1) == rows.Tile(1, 4096, 8)
    assert tile((4096, 32000), 1) == rows.Tile(1, 32768, 32)
    assert tile((262144, 128), 1) == rows.Tile(16, 128, 4)
    assert tile((4096, 50257), 1).loops and not tile((4096, 50257), 1).chunks
    assert tile((1, 262144), 1).chunks > 1
    assert not tile((8, 1000, 56, 56), 1).gather
    assert tile((1000, 3, 4), 1).gather


def test_gather_and_wide_rows() -> None:
    split = rows.split_rows((4, 6, 8), (1,), [(48, 8, 1), (1, 4, 24)])
    assert split.n_rows == 32 and split.n_columns == 6
    assert split.row_sizes == (8, 4) and split.column_strides == ((8,), (4,))
    assert rows.is_wide(on_gpu((70000, 70000), torch.float16)) and not rows.is_wide(on_gpu((7, 7), torch.float16))


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for dtype, shapes in ((BF16, [(16384, 4096), (4096, 32000), (262144, 128), (64, 64), (4096, 100000), (1, 262144)]),
                          (F32, [(2048, 32000)]), (F64, [(2048, 32000), (64, 100)])):
        for shape in shapes:
            x = on_gpu(shape, dtype)
            calls += [("_softmax", (x, 1, False)), ("_log_softmax_backward_data", (x, x, 1, dtype))]
    x = on_gpu((4096, 100000), BF16)
    calls += [("_log_softmax", (x, 1, False)), ("_safe_softmax", (x, 1, None)), ("_softmax_backward_data", (x, x, 1, BF16))]
    for shape in ((8, 1000, 56, 56), (8, 21, 512, 512), (1000, 3, 4), (8, 20000, 8)):
        x = on_gpu(shape, BF16)
        calls += [("_softmax", (x, 1, False)), ("_softmax_backward_data", (x, x, 1, BF16))]
    x, wide = on_gpu((64, 64), F32), on_gpu((70000, 70000), BF16)
    calls += [("_softmax", (on_gpu((64, 64), F16), 1, True)), ("_softmax_backward_data", (x, x, 1, F16)), ("_softmax", (wide, 1, False)),
              ("_softmax", (on_gpu((64, 32, 128), BF16, (128, 8192, 1)), 2, False))]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    assert compile_calls(gpu_calls(), target, tmp_path) >= 25
