"""Reductions: every scheme, dtypes, NaN and ties, empty inputs, exactness, ``out=``, and what is left to PyTorch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support import in_order, normal

import gemsmode
from gemsmode import handlers, registry
from gemsmode.handlers import Decided, Policy
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta, describe
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import reduction  # noqa: E402  (it needs what load_ops arranges)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NAN, INF = math.nan, math.inf
GPU = Target("cuda", "cuda", 90, present=False)


def decide(name: str, *args: Any, **kwargs: Any) -> tuple[Decided, tuple[Any, ...]]:
    """A fresh decision for a call, and its arguments in order."""
    op = find_op(name)
    given = in_order(op, args, kwargs)
    return Policy(registry.default, strict=True).handler(op).lookup(given), given


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of a call, which must be a rule's."""
    decided, given = decide(name, *args, **kwargs)
    assert decided.decision.kind == "rule", f"{name}: {decided.decision.reason}"
    return decided.run(*given)


def constants(name: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """The constants of each launch of a call's plan."""
    op = find_op(name)
    given = tuple(describe(a) for a in in_order(op, args, kwargs))
    decided = Policy(registry.default, strict=True).handler(op).decide(given, bind=False)
    assert decided.plan is not None, decided.decision.reason
    return [dict(step.constants) for step in decided.plan.launches]


def on_gpu(name: str, *args: Any, **kwargs: Any) -> Any:
    """The plan that a call would have on a GPU; tensors are given as (shape, dtype[, stride])."""

    def meta(arg: Any) -> Any:
        if not isinstance(arg, tuple):
            return arg
        stride = arg[2] if len(arg) > 2 else torch.empty(arg[0], device="meta").stride()
        return TensorMeta(arg[1], arg[0], stride, torch.device("cuda", 0))

    op = find_op(name)
    decided = Policy(registry.default, target=GPU).handler(op).decide(in_order(op, tuple(map(meta, args)), kwargs), bind=False)
    assert decided.decision.kind == "rule", decided.decision.reason
    return decided.plan


def results(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def check(name: str, *args: Any, exact: bool = False, **kwargs: Any) -> None:
    """A rule's result has PyTorch's metadata, and its values are PyTorch's in float64 (or exactly PyTorch's)."""
    native = find_op(name)(*args, **kwargs)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    truth = native if exact else find_op(name)(*wide, **{k: v for k, v in kwargs.items() if k != "dtype"})
    got = run(name, *args, **kwargs)
    for mine, theirs, right in zip(results(got), results(native), results(truth), strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
        if exact or not mine.is_floating_point():
            assert torch.equal(mine, theirs) or torch.allclose(mine.double(), theirs.double(), rtol=0, atol=0, equal_nan=True), name
        else:
            rtol, atol = {torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1e-2), torch.float32: (1e-5, 1e-5)}.get(
                mine.dtype, (1e-11, 1e-11))
            torch.testing.assert_close(mine.double(), right.to(mine.dtype).double(), rtol=rtol, atol=atol, equal_nan=True)


BY_DIMS = {
    "aten.sum.dim_IntList": (), "aten.mean.dim": (), "aten.amax.default": (), "aten.amin.default": (), "aten.all.dims": (),
    "aten.any.dims": (), "aten.var.correction": (), "aten.std.correction": (), "aten.var_mean.correction": (),
    "aten.std_mean.correction": (), "aten.logsumexp.default": (), "aten.nansum.default": (), "aten.count_nonzero.dim_IntList": (),
}
"""Ops that reduce a list of dimensions."""
BY_DIM = ("aten.max.dim", "aten.min.dim", "aten.argmax.default", "aten.argmin.default", "aten.prod.dim_int", "aten.count_nonzero.default",
          "aten.all.dim", "aten.any.dim")
"""Ops that reduce one dimension."""
ALL_OF_IT = ("aten.sum.default", "aten.mean.default", "aten.prod.default", "aten.max.default", "aten.min.default", "aten.all.default",
             "aten.any.default", "aten.argmax.default", "aten.argmin.default", "aten.aminmax.default", "aten._aminmax.default",
             "aten.count_nonzero.default", "aten.linalg_vector_norm.default", "aten.norm.Scalar")
"""Ops that reduce everything unless told otherwise."""


def layouts() -> dict[str, torch.Tensor]:
    return {
        "contiguous": normal(3, 5, 4, 7), "permuted": normal(7, 3, 4, 5).permute(1, 3, 2, 0),
        "channels_last": normal(3, 5, 4, 7).to(memory_format=torch.channels_last), "strided": normal(6, 10, 4, 14)[::2, ::2, :, ::2],
        "expanded": normal(3, 1, 4, 1).expand(3, 5, 4, 7), "offset": normal(4, 5, 4, 7)[1:],
    }


# -- layouts, dimensions, schemes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_DIMS)
@pytest.mark.parametrize("layout", layouts())
def test_any_dimensions_of_any_layout(name: str, layout: str) -> None:
    x = layouts()[layout]
    for dims in ([0], [1], [3], [-2], [0, 2], [1, 3], [0, 2, 3], [0, 1, 2, 3]):
        for extra in ({},) if name == "aten.count_nonzero.dim_IntList" else ({}, {"keepdim": True}):
            check(name, x, dims, **extra)


@pytest.mark.parametrize("name", BY_DIM)
@pytest.mark.parametrize("layout", layouts())
def test_each_dimension_of_any_layout(name: str, layout: str) -> None:
    x = layouts()[layout]
    for dim in (0, 1, 2, 3, -1):
        check(name, x, dim)


@pytest.mark.parametrize("name", ALL_OF_IT)
@pytest.mark.parametrize("layout", layouts())
def test_everything_of_any_layout(name: str, layout: str) -> None:
    check(name, layouts()[layout])


SMALL = {"loop": (8, 4, 1), "split": (8, 4, 3), "whole": (16, 64, 1)}


@pytest.mark.parametrize("forced", SMALL)
def test_every_scheme_gives_the_same_answers(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the problem: loops, splits and masks at every edge, inner and outer, one and several dimensions."""
    block_k, block_r, splits = SMALL[forced]
    monkeypatch.setattr(reduction, "choose", lambda *args: reduction.Schedule(block_k, block_r, splits))
    seen = set()
    for layout, dims in (("contiguous", [1]), ("permuted", [1, 3]), ("strided", [0, 2, 3])):
        x = layouts()[layout][:2, :, :3]
        for name in BY_DIMS:
            check(name, x, dims)
            seen |= {(c.get("INNER"), c.get("SPLIT")) for c in constants(name, x, dims)}
        for name, dim in itertools.product(("aten.max.dim", "aten.argmin.default", "aten.prod.dim_int"), (1, 3)):
            check(name, x, dim)
    for name in ALL_OF_IT:
        check(name, x)
    for order in (0, 1, 2, 3, -2, INF, -INF):
        check("aten.linalg_vector_norm.default", x, order, [0, 3])
    split = splits > 1
    assert {(True, split), (False, split)} <= seen


def test_steps_within_the_fastest_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several reduced dimensions that are no one run of memory, the fastest long: its steps do not cross its end."""
    monkeypatch.setattr(reduction, "_SHORTEST_STEP", 8)
    x = layouts()["contiguous"].repeat(1, 1, 1, 3)  # [3, 5, 4, 21]
    for block_r, splits in ((8, 1), (16, 4)):
        monkeypatch.setattr(reduction, "choose", lambda *args, b=block_r, s=splits: reduction.Schedule(4, b, s))
        for name in BY_DIMS:
            assert constants(name, x, [0, 2, 3])[0]["STEPPED"]
            check(name, x, [0, 2, 3])
        check("aten.argmax.default", x[:, ::2])


@pytest.mark.parametrize("shape, dim, inner, launches", [
    ((8192, 8192), 1, True, 1), ((8192, 8192), 0, False, 2), ((262144, 64), 1, True, 1), ((1 << 24,), 0, True, 2),
    ((64, 1 << 17), 1, True, 2), ((1000000, 3), 0, False, 2), ((32, 320, 4096), 1, False, 1), ((4, 1 << 20), 0, False, 1)])
def test_scheme_on_a_gpu(shape: tuple[int, ...], dim: int, inner: bool, launches: int) -> None:
    """The scheme follows from the shape, nothing is copied first, and only a split has a workspace."""
    plan = on_gpu("aten.sum.dim_IntList", (shape, torch.bfloat16), [dim])
    assert [step.kernel for step in plan.launches] == [reduction.reduce_kernel, reduction.merge_kernel][:launches]
    first = dict(plan.launches[0].constants)
    assert first["INNER"] is inner and first["SPLIT"] is (launches == 2)
    assert len(plan.allocs) == launches
    splits = plan.launches[0].grid[1]
    assert plan.launches[0].grid[0] * splits >= min(GPU.multiprocessors, 98)
    assert first["BLOCK_K"] * first["BLOCK_R"] <= 16384


def test_new_sizes_compile_nothing_new() -> None:
    from gemsmode.plan import specs

    first = specs(on_gpu("aten.sum.dim_IntList", ((4096, 6400), torch.float32), [1]))
    assert specs(on_gpu("aten.sum.dim_IntList", ((4160, 6464), torch.float32), [1])) == first


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", (*FLOATS, *INTS, torch.bool), ids=str)
def test_dtypes(d: torch.dtype) -> None:
    x = (torch.randn(9, 37) * 3).to(d) if d != torch.bool else torch.rand(9, 37) > 0.4
    for name in (*BY_DIMS, *BY_DIM):
        dims: Any = [1] if name in BY_DIMS else 1
        try:
            find_op(name)(x, dims)
        except RuntimeError as error:
            decided, given = decide(name, x, dims)
            assert decided.decision.kind == "pass", f"{name} is not PyTorch's"
            with pytest.raises(RuntimeError) as caught:
                decided.run(*given)
            assert str(caught.value) == str(error)
        else:
            check(name, x, dims)
    check("aten.aminmax.default", x, dim=0)


@pytest.mark.parametrize("source, result", [
    (torch.float32, torch.float64), (torch.float16, torch.float32), (torch.int32, torch.float32), (torch.bool, torch.float16),
    (torch.float32, torch.int64), (torch.int64, torch.int8), (torch.uint8, torch.int32)], ids=str)
def test_dtype_argument(source: torch.dtype, result: torch.dtype) -> None:
    x = (torch.rand(5, 300) * 3).to(source)
    for name, dims in (("aten.sum.dim_IntList", [1]), ("aten.prod.dim_int", 1), ("aten.sum.default", None)):
        args = (x,) if dims is None else (x, dims)
        got, native = run(name, *args, dtype=result), find_op(name)(*args, dtype=result)
        assert got.dtype == native.dtype == result
        torch.testing.assert_close(got, native, rtol=2e-3, atol=0, equal_nan=True)
    if result.is_floating_point:
        torch.testing.assert_close(run("aten.mean.dim", x, [0], dtype=result), torch.mean(x, 0, dtype=result), rtol=2e-3, atol=1e-6)


def test_integers_wrap_and_bools_count() -> None:
    assert run("aten.sum.default", torch.full((1000,), 200, dtype=torch.uint8)).item() == 200_000
    assert run("aten.sum.default", torch.full((4,), 2**62)).item() == 0
    assert run("aten.sum.default", torch.ones(70_000, dtype=torch.bool)).item() == 70_000
    assert run("aten.prod.default", torch.full((63,), 2)).item() == -(2**63)
    assert run("aten.amax.default", torch.tensor([-(2**63), -(2**63) + 1])).item() == -(2**63) + 1


# -- values ------------------------------------------------------------------------------------------------------------


def test_nan_goes_through_and_its_first_place_counts() -> None:
    x = torch.tensor([[1.0, NAN, 3.0, NAN], [4.0, 2.0, 4.0, 1.0], [-INF, -INF, -INF, -INF], [INF, 0.0, INF, -INF]])
    for y, dim in ((x, 1), (x.t().contiguous(), 0), (x.t(), 0)):
        for name in ("aten.max.dim", "aten.min.dim", "aten.argmax.default", "aten.argmin.default"):
            check(name, y, dim, exact=True)
        check("aten.amax.default", y, [dim], exact=True)
        check("aten.aminmax.default", y, dim=dim, exact=True)
        check("aten.logsumexp.default", y, [dim])
        check("aten.nansum.default", y[:, :] if dim else y, [dim])
        check("aten.all.dim", y, dim)
    check("aten.argmax.default", x, exact=True)
    check("aten.logsumexp.default", torch.tensor([1e4, 1e4 - 1, -1e4]), [0])
    check("aten.logsumexp.default", torch.full((3, 5), -INF), [1])


def test_first_of_equals_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for tile, splits in (((1, 8), 1), ((1, 8), 4), ((2, 16), 3)):
        monkeypatch.setattr(reduction, "choose", lambda *args, t=tile, s=splits: reduction.Schedule(*t, s))
        x = torch.zeros(2, 100)
        for name in ("aten.argmax.default", "aten.argmin.default"):
            assert run(name, x, 1).tolist() == [0, 0]
        x[0, 77:] = 5
        x[1, 33] = x[1, 90] = NAN
        assert run("aten.argmax.default", x, 1).tolist() == [77, 33]
        assert run("aten.max.dim", x.t(), 0)[1].tolist() == [77, 33]
        assert run("aten.argmax.default", torch.full((100,), -INF)).item() == 0
        assert run("aten.argmin.default", torch.full((100,), 127, dtype=torch.int8)).item() == 0


def test_index_of_everything_is_that_of_the_flattened_tensor() -> None:
    x = torch.randn(6, 5, 7)
    for y in (x, x.permute(2, 0, 1), x[:, ::2], x.expand(2, 6, 5, 7)):
        assert run("aten.argmax.default", y).item() == y.contiguous().view(-1).argmax().item()
        assert run("aten.argmin.default", y, None, True).tolist() == y.argmin(None, True).tolist()


def test_variance_of_noise_on_a_large_mean() -> None:
    """1e6 + noise, whose squares float32 cannot tell apart; against float64 of the very same numbers."""
    x = 1e6 + normal(4, 100_003)
    for y, dims in ((x, [1]), (x.t().contiguous(), [0]), (x, None), (x[0], [0])):
        var, mean = run("aten.var_mean.correction", y, dims)
        torch.testing.assert_close(var.double(), y.double().var(dims, correction=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(mean.double(), y.double().mean(dims), rtol=1e-7, atol=0)
        torch.testing.assert_close(run("aten.std.correction", y, dims).double(), y.double().std(dims, correction=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tile, splits", [((1, 64), 1), ((1, 64), 16), ((4, 1024), 7)])
def test_variance_over_many_tiles(tile: tuple[int, int], splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "choose", lambda *args: reduction.Schedule(*tile, splits))
    x = 1e6 + normal(3, 9001, seed=1)
    var, mean = run("aten.var_mean.correction", x, [1])
    torch.testing.assert_close(var.double(), x.double().var(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("correction", [0, 1, 2, 0.5, None])
def test_correction(correction: float | None) -> None:
    for d in (torch.float32, torch.float64):
        x = torch.randn(4, 50, dtype=d)
        for name in ("aten.var.correction", "aten.std.correction", "aten.var_mean.correction", "aten.std_mean.correction"):
            check(name, x, [1], correction=correction)
            check(name, x, None, correction=correction, keepdim=True)


def test_many_float16_ones() -> None:
    """2^24 ones in float16: the sum is kept in float32, in trees."""
    x = torch.ones(1, dtype=torch.float16).expand(1 << 24)
    assert run("aten.sum.default", x, dtype=torch.float32).item() == 1 << 24
    assert run("aten.mean.default", x).item() == 1.0
    assert run("aten.linalg_vector_norm.default", x).item() == 4096.0


@pytest.mark.parametrize("d", FLOATS, ids=str)
def test_long_rows(d: torch.dtype) -> None:
    x = normal(3, 131_073).to(d)
    for name in ("aten.sum.dim_IntList", "aten.amax.default", "aten.logsumexp.default", "aten.std.correction"):
        check(name, x, [1])
    check("aten.max.dim", x, 1, exact=True)
    check("aten.linalg_vector_norm.default", x, 2, [1])
    check("aten.argmin.default", x.t().contiguous(), 0, exact=True)


def test_runs_repeat_exactly() -> None:
    x = torch.randn(1 << 19)
    assert len(constants("aten.sum.default", x)) == 2
    assert len({run("aten.sum.default", x).item() for _ in range(3)}) == 1


@pytest.mark.parametrize("order", [0, 1, 2, 3, -1, -2, 0.5, 2.5, -1.5, INF, -INF, True])
def test_norms(order: float) -> None:
    for d in FLOATS:
        x = torch.randn(6, 33).to(d)
        x[0, 0] = 0 if order >= 0 else 1
        for dims in ([0], [1], None):
            check("aten.linalg_vector_norm.default", x, order, dims)
        check("aten.norm.ScalarOpt_dim", x, order, [1], True)
        check("aten.dist.default", x, x[:1] * 0.5 + 0.25, order)
    x = torch.tensor([[0.0, NAN], [INF, 1.0], [0.0, 0.0]])
    check("aten.linalg_vector_norm.default", x, order, [1])
    x = torch.randn(4, 40).half()
    got, native = run("aten.linalg_vector_norm.default", x, order, [1], dtype=torch.float32), torch.linalg.vector_norm(x.float(), order, 1)
    torch.testing.assert_close(got, native)


def test_norm_without_an_order() -> None:
    check("aten.norm.ScalarOpt_dim", torch.randn(4, 5), None, [0])
    x = torch.randn(4, 5)
    torch.testing.assert_close(run("aten.norm.ScalarOpt_dtype", x, None, dtype=torch.float64), x.double().norm())


def test_trace() -> None:
    for x in (torch.randn(5, 9), torch.randn(9, 5).t(), torch.randn(40, 40)[::2, ::3], torch.ones(0, 3), torch.arange(12).view(3, 4).int()):
        check("aten.trace.default", x)


# -- edges -------------------------------------------------------------------------------------------------------------


def test_empty_inputs() -> None:
    for shape, dims in (((3, 0, 2), [1]), ((0,), [0]), ((0, 4), [0]), ((3, 0, 2), [0]), ((2, 0), None)):
        x = torch.empty(shape)
        for name in ("aten.sum.dim_IntList", "aten.mean.dim", "aten.nansum.default", "aten.all.dims", "aten.any.dims"):
            check(name, x, dims)
        if dims is not None:
            check("aten.logsumexp.default", x, dims)
            check("aten.prod.dim_int", x, dims[0])
            check("aten.count_nonzero.dim_IntList", x, dims)
        for order in (0, 1, 2, 3):
            check("aten.linalg_vector_norm.default", x, order, dims)
    assert math.isnan(run("aten.mean.default", torch.empty(0)).item())
    check("aten.amax.default", torch.empty(3, 0, 2), [0])
    check("aten.max.dim", torch.empty(3, 0, 2), 2)


def test_zero_dimensions() -> None:
    x = torch.tensor(2.5)
    for name in ("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.logsumexp.default"):
        for dims in ([0], [-1], []):
            check(name, x, dims)
    for name in BY_DIM:
        check(name, x, 0)
        check(name, x, -1)
    for name in ALL_OF_IT:
        check(name, x)
    check("aten.var_mean.correction", x, [0], correction=0)


def test_an_empty_list_of_dimensions() -> None:
    x = torch.randn(3, 4)
    for name in ("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.var.correction", "aten.nansum.default",
                 "aten.all.dims", "aten.any.dims"):
        check(name, x, [])


@pytest.mark.parametrize("name, args, kwargs", [
    ("aten.amax.default", (torch.empty(3, 0), [1]), {}), ("aten.max.default", (torch.empty(0),), {}),
    ("aten.argmax.default", (torch.empty(0),), {}), ("aten.max.dim", (torch.empty(3, 0), 1), {}),
    ("aten.linalg_vector_norm.default", (torch.empty(3, 0), INF, [1]), {}),
    ("aten.linalg_vector_norm.default", (torch.empty(3, 0), -1, [1]), {}),
    ("aten.sum.dim_IntList", (torch.ones(3), [1]), {}), ("aten.sum.dim_IntList", (torch.ones(3, 3), [0, -2]), {}),
    ("aten.mean.default", (torch.ones(3, dtype=torch.int64),), {}), ("aten.argmax.default", (torch.ones(3, dtype=torch.bool),), {}),
    ("aten.trace.default", (torch.ones(3),), {}),
    ("aten.linalg_vector_norm.default", (torch.ones(3), 2, None, False), {"dtype": torch.float16}),
    ("aten.var.correction", (torch.ones(3, dtype=torch.int32),), {})])
def test_what_pytorch_rejects(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The call passes through, and the user sees PyTorch's own error."""
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        find_op(name)(*args, **kwargs)
    decided, given = decide(name, *args, **kwargs)
    assert decided.decision.kind == "pass" and decided.decision.reason
    with pytest.raises(type(theirs.value)) as mine:
        decided.run(*given)
    assert str(mine.value) == str(theirs.value)


def test_no_degrees_of_freedom_keep_the_warning() -> None:
    decided, given = decide("aten.var.correction", torch.ones(1))
    assert decided.decision.kind == "pass" and "degrees of freedom" in str(decided.decision.reason)
    assert decided.run(*given).isnan()


# -- out= --------------------------------------------------------------------------------------------------------------


def test_out_is_written_where_it_is() -> None:
    x = torch.randn(6, 40)
    base = torch.full((12, 2), 7.0)
    out = base[::2, 0]
    assert run("aten.sum.IntList_out", x, [1], out=out) is out
    torch.testing.assert_close(out, x.sum(1))
    assert (base[:, 1] == 7).all() and (base[1::2] == 7).all()
    values, indices = torch.empty(6), torch.empty(6, dtype=torch.int64)
    run("aten.max.dim_max", x, 1, max=values, max_values=indices)
    assert torch.equal(values, x.max(1).values) and torch.equal(indices, x.max(1).indices)
    run("aten.amax.out", x, [0], out=values.resize_(40))
    assert torch.equal(values, x.amax(0))


def test_the_dtype_of_out_is_that_of_the_result() -> None:
    """A sum into a float32 tensor is not rounded to float16 on the way; a sum into int32 wraps as such."""
    x = torch.full((2, 300), 1.0009765625, dtype=torch.float16)
    out = torch.empty(2)
    run("aten.sum.IntList_out", x, [1], out=out)
    assert torch.equal(out, torch.sum(x, 1, out=torch.empty(2)))
    run("aten.mean.out", x, [1], out=out)
    assert out.dtype == torch.float32
    run("aten.sum.IntList_out", torch.full((2, 3), 2**31 - 1), [1], out=(wrapped := torch.empty(2, dtype=torch.int32)))
    assert wrapped.tolist() == [2147483645] * 2
    flags = torch.empty(2, dtype=torch.uint8)
    try:
        find_op("aten.all.out")(torch.ones(2, 3, device="meta"), 1, out=flags.to("meta"))
    except RuntimeError:
        assert torch.__version__ >= (2, 15)
        return  # PyTorch 2.15 takes it on devices, and not on meta tensors, which decide what PyTorch takes
    run("aten.all.out", torch.ones(2, 3), 1, out=flags)
    assert flags.tolist() == [1, 1]


@pytest.mark.parametrize("name, args, out", [
    ("aten.amax.out", (torch.ones(2, 3).half(), [1]), torch.empty(2)), ("aten.all.out", (torch.ones(2, 3), 1), torch.empty(2)),
    ("aten.linalg_vector_norm.out", (torch.ones(2, 3).half(), 2, [1]), torch.empty(2)),
    ("aten.argmax.out", (torch.ones(2, 3), 1), torch.empty(2, dtype=torch.int32))])
def test_out_of_a_dtype_that_pytorch_rejects(name: str, args: tuple[Any, ...], out: torch.Tensor) -> None:
    with pytest.raises(RuntimeError):
        find_op(name)(*args, out=out.clone())
    decided, given = decide(name, *args, out=out)
    assert decided.decision.kind == "pass"
    with pytest.raises(RuntimeError):
        decided.run(*given)


def test_out_that_is_the_input_is_pytorch_s_to_judge() -> None:
    x = torch.randn(1, 8)
    decided, given = decide("aten.sum.IntList_out", x, [0], out=x.view(8))
    assert decided.decision.kind == "rule"
    native = x.clone()
    try:
        expected: Any = find_op("aten.sum.IntList_out")(native, [0], out=native.view(8))
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            decided.run(*given)
    else:
        assert torch.equal(decided.run(*given), expected)


# -- comparisons of two tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", (*FLOATS, *INTS, torch.bool), ids=str)
def test_equal(d: torch.dtype) -> None:
    x = (torch.rand(70, 90) * 4).to(d)
    y = x.clone()
    assert run("aten.equal.default", x, y) is True
    assert run("aten.equal.default", x.t(), y.t().contiguous()) is True
    y[69, 89] = y[69, 89] == 0
    assert run("aten.equal.default", x, y) is torch.equal(x, y)
    assert run("aten.equal.default", x[:0], y[:0]) is True
    assert decide("aten.equal.default", x, x[0])[0].decision.kind == "pass"


def test_equal_with_nan() -> None:
    x = torch.tensor([1.0, NAN])
    assert run("aten.equal.default", x, x.clone()) is False
    assert run("aten.equal.default", torch.tensor([0.0]), torch.tensor([-0.0])) is True


def test_isclose_and_allclose() -> None:
    a = torch.tensor([1.0, 1.0, 0.0, NAN, INF, INF, -INF, 1e-9, 100.0])
    b = torch.tensor([1.0 + 5e-6, 1.1, 1e-9, NAN, INF, -INF, 1.0, 0.0, 100.0005])
    for d, equal_nan in itertools.product((torch.float32, torch.float64), (False, True)):
        x, y = a.to(d), b.to(d)
        assert torch.equal(run("aten.isclose.default", x, y, 1e-5, 1e-8, equal_nan), torch.isclose(x, y, equal_nan=equal_nan))
        assert torch.equal(run("aten.isclose.default", x, y[0], 0.5, 0.0), torch.isclose(x, y[0], 0.5, 0.0))
        for i in range(len(a)):
            assert run("aten.allclose.default", x[i:], y[:1], 1e-5, 1e-8, equal_nan) is torch.allclose(x[i:], y[:1], equal_nan=equal_nan)
            assert run("aten.allclose.default", x[i:i + 1], y[i:i + 1], 1e-5, 1e-8, equal_nan) is torch.allclose(
                x[i:i + 1], y[i:i + 1], equal_nan=equal_nan)
    with pytest.raises(RuntimeError, match="rtol"):
        run("aten.allclose.default", a, b, -1.0)


def test_registered_once() -> None:
    """Every op above is served, and by this family."""
    for name in (*BY_DIMS, *BY_DIM, *ALL_OF_IT, "aten.trace.default", "aten.dist.default", "aten.equal.default", "aten.allclose.default"):
        families = {c.rule.family for c in registry.default.candidates(find_op(name))}
        assert families == {"reduction"}, name
    assert isinstance(handlers.Policy(registry.default).handler(find_op("aten.sum.default")), handlers.OpHandler)
