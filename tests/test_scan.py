"""Scans: tiles, loops and chunks, any dimension and layout, dtypes, NaN and ties, in place and ``out=``, and their limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support import in_order, normal

import gemsmode
from gemsmode import registry
from gemsmode.handlers import Decided, Policy
from gemsmode.plan import Plan
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import reduction, scan  # noqa: E402  (they need what load_ops arranges)

NAN, INF = math.nan, math.inf
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SCANS = ("aten.cumsum.default", "aten.cumprod.default", "aten.cummax.default", "aten.cummin.default", "aten.logcumsumexp.default")
GPU = Target("cuda", "cuda", 90, present=False)


def decide(name: str, *args: Any, **kwargs: Any) -> tuple[Decided, tuple[Any, ...]]:
    op = find_op(name)
    given = in_order(op, args, kwargs)
    return Policy(registry.default, strict=True).handler(op).lookup(given), given


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of a call, which must be a rule's."""
    decided, given = decide(name, *args, **kwargs)
    assert decided.decision.kind == "rule", f"{name}: {decided.decision.reason}"
    return decided.run(*given)


def check(name: str, x: torch.Tensor, dim: int, **kwargs: Any) -> None:
    """A rule's result has PyTorch's metadata; values are PyTorch's in float64, indices PyTorch's."""
    native = find_op(name)(x, dim, **kwargs)
    truth = find_op(name)(x.double() if x.is_floating_point() else x, dim)
    got = run(name, x, dim, **kwargs)
    as_tuple = (lambda v: v) if isinstance(native, tuple) else (lambda v: (v,))
    for mine, theirs, right in zip(as_tuple(got), as_tuple(native), as_tuple(truth), strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs), name
        else:
            rtol, atol = {torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1e-2), torch.float32: (1e-5, 1e-5)}.get(
                mine.dtype, (1e-11, 1e-11))
            scale = max(1.0, float(right[right.isfinite()].abs().max())) if right.isfinite().any() else 1.0
            torch.testing.assert_close(mine.double(), right.to(mine.dtype).double(), rtol=rtol, atol=atol * scale, equal_nan=True)


def layouts() -> dict[str, torch.Tensor]:
    return {
        "contiguous": normal(3, 5, 4, 7), "permuted": normal(7, 3, 4, 5).permute(1, 3, 2, 0),
        "channels_last": normal(3, 5, 4, 7).to(memory_format=torch.channels_last), "strided": normal(6, 10, 4, 14)[::2, ::2, :, ::2],
        "expanded": normal(3, 1, 4, 1).expand(3, 5, 4, 7), "offset": normal(4, 5, 4, 7)[1:],
    }


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("layout", layouts())
def test_each_dimension_of_any_layout(name: str, layout: str) -> None:
    for dim in (0, 1, 2, 3, -1):
        check(name, layouts()[layout], dim)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("tile", [(1, 4, 1), (8, 4, 1), (4, 4, 3), (2, 2, 8)], ids=str)
def test_every_scheme_gives_the_same_answers(name: str, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the rows: loops with a carry, chunks with totals, masks at every edge, inner and outer."""
    monkeypatch.setattr(scan, "choose", lambda *args: scan.Schedule(*tile))
    x = normal(6, 13)
    x[1, 6] = NAN
    x[2, 3:5] = INF
    x[3, :7] = -INF
    x[4] = x[4].round()
    for y in (x, x.t().contiguous().t()):
        check(name, y, 1)
        check(name, y, 0)


@pytest.mark.parametrize("tile", [(1, 4, 2), (1, 16, 3)])
@pytest.mark.parametrize("d", FLOATS, ids=str)
def test_chunks_that_wait_for_each_other(d: torch.dtype, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several groups of chunks, whose states are handed on from group to group."""
    monkeypatch.setattr(scan, "choose", lambda *args: scan.Schedule(*tile))
    x = normal(3, 61)
    x[1, 50] = NAN
    x[2, 20], x[2, 40] = INF, -INF
    for y in (x.to(d), normal(2, 61, 2).to(d)[..., 0], normal(61).to(d)):
        check("cumsum", y, -1)
        check("cumprod", y, -1)
    whole = normal(97).to(d)
    with gemsmode.GemsMode(strict=True):
        first, again = whole.cumsum(0), whole.clone().cumsum_(0)
    assert torch.equal(first, again)


def kernels_on_a_gpu(shape: tuple[int, ...], dim: int, d: torch.dtype = torch.float32) -> Plan:
    meta = TensorMeta(d, shape, torch.empty(shape, device="meta").stride(), torch.device("cuda", 0))
    decided = Policy(registry.default, target=GPU).handler(find_op("aten.cumsum.default")).decide((meta, dim, None), bind=False)
    assert decided.decision.kind == "rule" and decided.plan is not None
    return decided.plan


@pytest.mark.parametrize("shape, dim", [((1 << 24,), 0), ((64, 100_000), 1), ((2, 1 << 27), 1)])
def test_long_rows_are_read_once_on_a_gpu(shape: tuple[int, ...], dim: int) -> None:
    """The chunks' words are the only workspace, and zeros at first; a state of more than 32 bits takes two launches."""
    plan = kernels_on_a_gpu(shape, dim)
    assert [s.kernel for s in plan.launches] == [scan.chained_kernel]
    words = plan.allocs[1]
    last = dict(plan.launches[0].constants)
    assert words.zero and words.dtype == torch.int64
    assert plan.launches[0].grid[0] == math.prod(shape[:-1]) * -(-shape[-1] // last["BLOCK_N"])
    assert words.meta.numel > plan.launches[0].grid[0]
    assert len(kernels_on_a_gpu(shape, dim, torch.float64).launches) == 2


@pytest.mark.parametrize("shape, dim, inner, launches", [
    ((4096, 8192), 1, True, 1), ((4096, 8192), 0, False, 2), ((262144, 65), 1, True, 1), ((1024, 32000), 1, True, 1),
    ((16, 8192, 64), 1, False, 2)])
def test_scheme_on_a_gpu(shape: tuple[int, ...], dim: int, inner: bool, launches: int) -> None:
    """One program a row where rows are many; else chunks, whose totals are the only workspace."""
    plan = kernels_on_a_gpu(shape, dim)
    assert [s.kernel for s in plan.launches] == [reduction.reduce_kernel, scan.scan_kernel][-launches:]
    last = dict(plan.launches[-1].constants)
    assert last["INNER"] is inner and last["SPLIT"] is (launches == 2)
    assert len(plan.allocs) == launches and math.prod(plan.launches[-1].grid) >= 250
    assert last["BLOCK_S"] * last["BLOCK_K"] <= 4096 or launches == 1


@pytest.mark.parametrize("d", (*FLOATS, *INTS, torch.bool), ids=str)
def test_dtypes(d: torch.dtype) -> None:
    x = (normal(9, 37) * 3).to(d) if d != torch.bool else normal(9, 37) > 0
    for name, dim in itertools.product(SCANS, (0, 1)):
        try:
            find_op(name)(x, dim)
        except RuntimeError:
            assert decide(name, x, dim)[0].decision.kind == "pass"
        else:
            check(name, x / 2 if name == "aten.cumprod.default" and d.is_floating_point else x, dim)


@pytest.mark.parametrize("source, result", [
    (torch.float32, torch.float64), (torch.float16, torch.float32), (torch.int32, torch.float32), (torch.bool, torch.int32),
    (torch.float32, torch.int64), (torch.int64, torch.int8)], ids=str)
def test_dtype_argument(source: torch.dtype, result: torch.dtype) -> None:
    x = (torch.rand(5, 30) * 3).to(source)
    for name in SCANS[:2]:
        got, native = run(name, x, 1, dtype=result), find_op(name)(x, 1, dtype=result)
        assert got.dtype == result
        torch.testing.assert_close(got, native, rtol=1e-3, atol=0)


def test_the_last_of_equals_and_of_nans() -> None:
    for values in ([1.0, NAN, 3.0, NAN, 1.0], [1.0, 1.0, 0.0, 2.0, 2.0], [0.0, -0.0, 0.0], [-INF, -INF, INF, INF], [NAN, 1.0]):
        x = torch.tensor(values)
        for name in ("aten.cummax.default", "aten.cummin.default"):
            for y in (x, x.repeat(3, 1), x.double(), x.half()):
                check(name, y, -1)
    check("aten.cummax.default", torch.tensor([False, True, True, False]), 0)
    check("aten.cummin.default", torch.tensor([2, 2, -(2**63), 5, -(2**63)]), 0)
    check("aten.cummax.default", torch.full((9,), -(2**63)), 0)


def test_log_sum_exp_of_extremes() -> None:
    x = torch.tensor([[-INF, -INF, 0.0, 1e4, -1e4], [1.0, INF, 2.0, NAN, 3.0], [NAN, 1.0, 2.0, 3.0, 4.0], [88.0, 88.0, 89.0, -88.0, 88.0]])
    for y in (x, x.double(), x.clamp(-1e3, 1e3).half()):
        check("aten.logcumsumexp.default", y, 1)
        check("aten.logcumsumexp.default", y, 0)


@pytest.mark.parametrize("name", SCANS)
def test_long_rows(name: str) -> None:
    x = normal(2, 140_001)
    if name == "aten.cumprod.default":
        x = 1 + x.double() * 1e-4  # in float32 the roundings of 140,000 factors show, in whichever order they are multiplied
    check(name, x, 1)
    check(name, x.t().contiguous(), 0)
    check(name, x[0], 0)


def test_long_sums_are_exact() -> None:
    x = torch.ones(1 << 18, dtype=torch.float16)
    assert torch.equal(run("aten.cumsum.default", x, 0, dtype=torch.float32), torch.arange(1, (1 << 18) + 1).float())
    assert torch.equal(run("aten.cumsum.default", torch.ones(200_000, dtype=torch.bool), 0), torch.arange(1, 200_001))


def test_runs_repeat_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "choose", lambda *args: scan.Schedule(1, 1024, 8))
    x = normal(20_000)
    first = run("aten.cumsum.default", x, 0)
    assert all(torch.equal(run("aten.cumsum.default", x, 0), first) for _ in range(2))


def test_edges() -> None:
    for name in SCANS:
        for x in (torch.tensor(2.5), torch.empty(0), torch.empty(3, 0), torch.empty(0, 3), torch.ones(1, 1)):
            check(name, x, 0)
            check(name, x, -1)


@pytest.mark.parametrize("name, x, dim, kwargs", [
    ("aten.cumsum.default", torch.ones(3), 1, {}), ("aten.cummax.default", torch.ones(3), -2, {}),
    ("aten.logcumsumexp.default", torch.ones(3, dtype=torch.int32), 0, {}),
    ("aten.cumsum.default", torch.ones(3), 0, {"dtype": torch.bool})])
def test_what_pytorch_rejects(name: str, x: torch.Tensor, dim: int, kwargs: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        find_op(name)(x, dim, **kwargs)
    decided, given = decide(name, x, dim, **kwargs)
    assert decided.decision.kind == "pass" and decided.decision.reason
    with pytest.raises(type(theirs.value)):
        decided.run(*given)


@pytest.mark.parametrize("tile", [(2, 4, 1), (1, 4, 3)], ids=str)
def test_in_place(tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The input is the result, also through a view whose neighbours must stay as they are."""
    monkeypatch.setattr(scan, "choose", lambda *args: scan.Schedule(*tile))
    for name, d in itertools.product(("aten.cumsum_.default", "aten.cumprod_.default"), (torch.float32, torch.int32, torch.float16)):
        mine = (normal(6, 22) * 2).to(d)
        for dim in (0, 1):
            # Of what is there, in the precision that float16 cannot hold: PyTorch's own float16 scans are as far from it.
            expected = mine.clone() if d == torch.int32 else mine.double()
            find_op(name)(expected[::2, 1::3], dim)
            view = mine[::2, 1::3]
            assert run(name, view, dim) is view
            torch.testing.assert_close(mine.to(expected.dtype), expected,
                                       **({"rtol": 2e-3, "atol": 2e-3} if d == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}))


def test_out_is_written_where_it_is() -> None:
    x = normal(4, 9)
    base = torch.full((9, 8), 7.0)
    out = base[:, ::2].t()
    assert run("aten.cumsum.out", x, 1, out=out) is out
    torch.testing.assert_close(out, x.cumsum(1))
    assert (base[:, 1::2] == 7).all()
    wide = torch.empty(4, 9)
    run("aten.cumsum.out", x.half(), 1, out=wide)
    torch.testing.assert_close(wide, torch.cumsum(x.half(), 1, out=torch.empty(4, 9)))
    values, indices = torch.empty(4, 9), torch.empty(4, 9, dtype=torch.int64)
    run("aten.cummax.out", x, 1, values=values, indices=indices)
    assert torch.equal(values, x.cummax(1).values) and torch.equal(indices, x.cummax(1).indices)
    assert decide("aten.cummax.out", x, 1, values=values, indices=torch.empty(4, 9, dtype=torch.int32))[0].decision.kind == "pass"


@pytest.mark.parametrize("name", ["cummax", "cummin"])
def test_helpers_write_what_they_are_given(name: str) -> None:
    x = normal(4, 9)
    values, indices = torch.full((4, 9), NAN), torch.full((4, 9), -1)
    assert run(f"aten._{name}_helper.default", x, values, indices, 1) is None
    expected = getattr(torch, name)(x, 1)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)


def test_under_a_mode() -> None:
    x = normal(3, 40).requires_grad_()
    with gemsmode.GemsMode(strict=True, trace=True) as gems:
        y = x.cumsum(1).sum() + torch.cummax(x, 1).values.sum() + torch.logcumsumexp(x, 1).sum()
    text = str(gems.report)
    assert all(op in text for op in ("cumsum", "cummax", "logcumsumexp"))
    expected = x.cumsum(1).sum() + torch.cummax(x, 1).values.sum() + torch.logcumsumexp(x, 1).sum()
    torch.testing.assert_close(y, expected)
    for got, right in zip(torch.autograd.grad(y, x), torch.autograd.grad(expected, x)):
        torch.testing.assert_close(got, right)
