"""Searching, counting, selecting and unique elements: dtypes, layouts, NaN and ties, staged results, errors, GPU sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from torch.utils._pytree import tree_leaves

import gemsmode
from gemsmode import registry
from gemsmode.handlers import Policy
from gemsmode.registry import find_op
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import search, select, sort, unique  # noqa: E402  (they need what load_ops arranges)

NAN, INF = math.nan, math.inf
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NUMBERS = (*FLOATS, *INTS)
GPU = Target("cuda", "cuda", 90, present=False)
A = torch.ops.aten


@pytest.fixture(autouse=True)
def every_class_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is left to PyTorch for its speed."""
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def served(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call of which a rule serves some op."""
    with gemsmode.GemsMode(strict=True, trace=True) as gems:
        result = function(*args, **kwargs)
    rows = gems.report.to_dict()["ops"]
    assert any(row["decision"] == "rule" for row in rows), [(row["overload"], row["reason"]) for row in rows]
    assert not any(row["decision"] == "pass" for row in rows), [(row["overload"], row["reason"]) for row in rows]
    return result


def equal(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    assert torch.equal(mine.double().nan_to_num(12345.0), theirs.double().nan_to_num(12345.0)), f"{mine}\n{theirs}"


def check(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Every result is PyTorch's."""
    native = function(*args, **kwargs)
    for mine, theirs in zip(tree_leaves(served(function, *args, **kwargs)), tree_leaves(native), strict=True):
        equal(mine, theirs)


def check_selected(function: Callable[..., Any], x: torch.Tensor, *args: Any, dim: int, keepdim: bool = False) -> None:
    """Values are PyTorch's; indices lead to them. Of equally frequent values a mode is the least, as it is on the CPU."""
    native = function(x.cpu() if function is torch.mode else x, *args, dim=dim, keepdim=keepdim)
    values, indices = served(function, x, *args, dim=dim, keepdim=keepdim)
    equal(values, native.values.to(x.device))
    assert (indices.dtype, indices.shape, indices.stride()) == (torch.int64, values.shape, values.stride())
    if x.ndim and values.numel():
        at = indices if keepdim else indices.unsqueeze(dim)
        there = x.gather(dim, at)
        equal((there if keepdim else there.squeeze(dim)).contiguous(), values)


def whole(shape: tuple[int, ...], high: int, d: torch.dtype = torch.int64, seed: int = 0) -> torch.Tensor:
    """Whole numbers from 0 to below ``high``."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(torch.get_default_device(), d)


def rejected(name: str, *args: Any, **kwargs: Any) -> None:
    """PyTorch raises; so does a call under the mode, in PyTorch's words."""
    op = find_op(name)
    with pytest.raises((RuntimeError, IndexError, TypeError)) as theirs:
        op(*args, **kwargs)
    with gemsmode.GemsMode(strict=True), pytest.raises(type(theirs.value)) as mine:
        op(*args, **kwargs)
    assert str(mine.value).splitlines()[0] == str(theirs.value).splitlines()[0]


# -- searchsorted, bucketize -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", NUMBERS, ids=str)
def test_searches(d: torch.dtype) -> None:
    sequence, values = whole((13,), 40, d).sort().values, whole((5, 7), 45, d, 1)
    if d.is_floating_point:
        sequence[-1], values[1, 1], values[2, 2], values[3, 3] = NAN, NAN, INF, -INF
    for right, out_int32 in itertools.product((False, True), (False, True)):
        check(torch.searchsorted, sequence, values, right=right, out_int32=out_int32)
        check(torch.bucketize, values.t(), sequence, right=right, out_int32=out_int32)
    for number in (7, 7.5, -3, 7.3):
        check(torch.searchsorted, sequence, number)
        if d.is_floating_point:
            check(torch.searchsorted, sequence / 10, number / 10)
        check(torch.bucketize, number, sequence, right=True)


def test_searches_of_several_sequences_and_with_a_sorter() -> None:
    sequences, values = whole((2, 5, 11), 40).sort(-1).values, whole((2, 5, 3), 45, seed=1)
    check(torch.searchsorted, sequences, values, side="right")
    check(torch.searchsorted, sequences.transpose(0, 1), values.transpose(0, 1), right=True)
    unsorted = whole((5, 11), 40, torch.float32)
    order = unsorted.argsort(-1)
    check(torch.searchsorted, unsorted, values[0].float(), sorter=order)
    check(torch.searchsorted, unsorted.t().contiguous().t(), values[0].float(), sorter=order.t().contiguous().t())
    check(torch.searchsorted, sequences[0, 0], torch.tensor(7))
    check(torch.searchsorted, sequences[0, 0], torch.tensor([2.5, 30.0]))  # promoted to float32
    check(torch.searchsorted, torch.empty(0), torch.ones(3))
    check(torch.searchsorted, torch.ones(3)[::2], torch.ones(0))


def test_rejected_searches() -> None:
    three, one = torch.tensor([1, 3, 5]), torch.tensor([3])
    rejected("aten.searchsorted.Tensor", three, one, right=True, side="left")
    rejected("aten.searchsorted.Tensor", three, one, side="middle")
    rejected("aten.searchsorted.Tensor", three, one, sorter=torch.tensor([0, 1, 2], dtype=torch.int32))
    rejected("aten.searchsorted.Tensor", torch.ones(2, 3), torch.ones(3, 1))
    rejected("aten.searchsorted.Tensor", torch.tensor(3), one)
    rejected("aten.bucketize.Tensor", one, torch.ones(2, 2))
    rejected("aten.searchsorted.Tensor", three > 2, one > 2)


def test_a_sorter_out_of_range_is_refused(device: str) -> None:
    if device == "cuda":
        pytest.skip("a device assert would end the process")
    rejected("aten.searchsorted.Tensor", torch.tensor([1, 3]), torch.tensor([3]), sorter=torch.tensor([0, 9]))


# -- isin --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", NUMBERS, ids=str)
def test_isin(d: torch.dtype) -> None:
    x, few, many = whole((2, 5, 3), 45, d), whole((5, 4), 40, d, 1), whole((20, 20), 40, d, 2)
    if d.is_floating_point:
        x[0, 0, 0], few[0, 0], many[3, 3], x[1, 1, 1], many[5, 5] = NAN, NAN, NAN, -0.0, 0.0
    for tests in (few, few.t(), many, many.t(), many[:, ::2]):
        check(torch.isin, x, tests)
        check(torch.isin, x.transpose(0, 2), tests, invert=True)
    check(torch.isin, x, 3)
    check(torch.isin, 3, x)
    if d.is_floating_point:
        check(torch.isin, x / 10, 0.3)
    check(torch.isin, x, torch.empty(0, dtype=d))
    check(torch.isin, x[:0], few)
    check(torch.isin, x, whole((60,), 40, torch.float32) / 2)


# -- histc, bincount ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", FLOATS, ids=str)
def test_histc(d: torch.dtype) -> None:
    """Of eighths, so that no bin's edge depends on the precision computed in (the CPU computes 16-bit floats in 16 bits)."""
    x = (whole((300,), 65, torch.float32) / 8 - 4).to(d)

    def counted(x: torch.Tensor, *args: Any) -> None:
        if x.is_cuda and d in (torch.float16, torch.bfloat16):  # which PyTorch does not count there
            equal(served(torch.histc, x, *args), torch.histc(x.double(), *args).to(d))
        else:
            check(torch.histc, x, *args)

    for bins, low, high in ((8, -2, 2), (16, -4, 4), (512, -4.0, 4.0), (4, 2, 3)):
        counted(x, bins, low, high)
    counted(x.reshape(10, 30).t(), 4, -1, 1)
    counted(x, 16)
    counted(x.reshape(10, 30).t(), 4)
    counted(torch.full((5,), 3.0, dtype=d), 4)
    counted(torch.tensor([1.0, 2.0, 3.0, NAN, INF], dtype=d), 4, 1, 5)
    counted(x[:0], 4)
    rejected("aten.histc.default", x, 4, 3, -3)
    rejected("aten.histc.default", x, 4, 0, INF)
    rejected("aten.histc.default", x, 0)
    rejected("aten.histc.default", torch.tensor([1.0, NAN], dtype=d), 4)


@pytest.mark.parametrize("d", INTS, ids=str)
def test_bincount(d: torch.dtype) -> None:
    x, weights = whole((3000,), 100, d), whole((3000,), 10, seed=1)
    for least in (0, 50, 1000):
        check(torch.bincount, x, minlength=least)
    check(torch.bincount, x[::3], weights[::3].half())
    for w in (weights.float(), weights, weights.double()):
        check(torch.bincount, x, w, 500)
    if d != torch.uint8:
        rejected("aten.bincount.default", x - 1)
    rejected("aten.bincount.default", x, weights[1:])
    check(torch.bincount, whole((5000,), 100, d) * (1 if d in (torch.uint8, torch.int8) else 300))


def test_weights_are_left_to_pytorch_where_sums_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    x = whole((100,), 10)
    op = find_op("aten.bincount.default")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    decided = Policy(registry.default).handler(op).lookup((x, x.float(), 0)).decision
    counted = Policy(registry.default).handler(op).lookup((x, None, 0)).decision
    assert decided.kind == "pass" and "deterministic" in (decided.reason or "") and counted.kind == "rule"


# -- kthvalue, medians, modes ------------------------------------------------------------------------------------------


def numbers(shape: tuple[int, ...], d: torch.dtype) -> torch.Tensor:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3), device="cpu") * 5).round().to(torch.get_default_device())
    if not d.is_floating_point:
        return (x.abs() if d == torch.uint8 else x).to(d)
    x = (x / 2).to(d)
    x.view(-1)[3::11], x.view(-1)[5::13] = -0.0, INF
    return x


@pytest.mark.parametrize("scheme", ("short", "count", "sort"))
@pytest.mark.parametrize("d", NUMBERS, ids=str)
def test_selections(d: torch.dtype, scheme: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """By a network, by counting digits in several tiles, and by looking a sorted row up."""
    if scheme != "short" and d not in (torch.float32, torch.bfloat16, torch.int8) and not request.config.getoption("--full"):
        pytest.skip("differs from other dtypes in how keys are made, which the network shows: run with --full")
    monkeypatch.setattr(select, "choose", lambda rows, n, parts, target: select.Selection(scheme, 32, 4))
    x = numbers((2, 37), d)
    for k in (1, 25):
        check_selected(torch.kthvalue, x, k, dim=1, keepdim=k == 1)
    check_selected(torch.mode, x, dim=1)
    for function in (torch.median, torch.nanmedian):
        check_selected(function, x, dim=1)
        check(function, x)
    if d.is_floating_point:
        x[1, 3:6] = NAN
        check_selected(torch.kthvalue, x, 37, dim=1)
        for function in (torch.median, torch.nanmedian):
            check_selected(function, x, dim=1)
            check(function, x)
            check_selected(function, torch.full((2, 3), NAN, dtype=d), dim=1)


def test_selections_along_other_dimensions() -> None:
    x = numbers((2, 5, 3), torch.float32)
    for y, dim in ((x, 0), (x, 1), (x.permute(2, 0, 1), -1), (x[:, ::2], 1)):
        check_selected(torch.median, y, dim=dim)
        check_selected(torch.kthvalue, y, 2, dim=dim, keepdim=True)
        check_selected(torch.mode, y, dim=dim)
    for x in (torch.tensor(2.0), torch.empty(0, 3), torch.ones(1, 1)):
        for function in (torch.median, torch.nanmedian, torch.mode):
            check_selected(function, x, dim=-1)
    check_selected(torch.mode, numbers((3, 9), torch.float32) > 0, dim=1)


def test_runs_across_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on in the next tile is counted on, and has its place from the tile where it begins."""
    monkeypatch.setattr(select, "choose", lambda rows, n, parts, target: select.Selection("sort", 32, 4))
    monkeypatch.setattr(unique, "_block", lambda n, target: 64)
    x = torch.cat([whole((150,), 3), torch.full((150,), 1)])
    check_selected(torch.mode, x, dim=0)
    check(A._unique2, x, True, True, True)
    check(A.unique_consecutive, x, True, True)


def test_rejected_selections() -> None:
    x = torch.ones(2, 3)
    rejected("aten.kthvalue.default", x, 4)
    rejected("aten.kthvalue.default", x, 0)
    rejected("aten.median.dim", x, 2)
    for name in ("aten.median.dim", "aten.nanmedian.dim", "aten.mode.default"):
        rejected(name, torch.empty(0, 3), 0)


# -- unique ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", (*NUMBERS, torch.bool), ids=str)
def test_unique(d: torch.dtype) -> None:
    x = whole((7, 11), 9, d)
    if d.is_floating_point:
        x[2, 3] = NAN  # one: PyTorch's sort on the CPU does not say in which order several come
        x[0] *= -1
    for inverse, counts in itertools.product((False, True), (False, True)):
        if d == torch.bool and x.is_cuda and not (inverse and counts):
            continue  # in place of what was not asked for PyTorch gives no tensor, or the counts nevertheless
        for y in (x, x.t()) if d in (torch.float32, torch.int64) else (x,):
            check(A._unique2, y, True, inverse, counts)
            check(A.unique_consecutive, y, inverse, counts)
    check(A.unique_consecutive, x[0], True, True, dim=0)
    check(A.unique_dim, x[0], 0, True, True, False)
    check(A.unique_dim_consecutive, x[0], 0, False, True)
    check(A._unique, x, True, True)


def test_unique_of_few_and_of_many() -> None:
    for x in (torch.empty(0), torch.empty(3, 0), torch.tensor(2.0), torch.full((9,), 4), torch.tensor([NAN, NAN, 1.0, NAN])):
        check(A._unique2, x, True, False, True)
        check(A.unique_consecutive, x, True, True)
    check(torch.unique, whole((2000,), 100), return_inverse=True, return_counts=True)


def test_results_of_other_sizes_are_planned_anew() -> None:
    """Calls of one signature whose results differ in size, and more of them than are kept."""
    with gemsmode.GemsMode(strict=True, trace=True) as gems:
        for n in range(1, 36):
            x = torch.arange(60) % n
            assert torch.bincount(x).shape == (n,)
            if n % 12 == 0:
                assert torch.equal(torch.unique(x), torch.arange(n))
    rows = [row for row in gems.report.to_dict()["ops"] if row["overload"] in ("aten._unique2.default", "aten.bincount.default")]
    assert sum(row["calls"] for row in rows if row["decision"] == "rule") == 37


def test_slices_are_left_to_pytorch() -> None:
    x = whole((5, 2), 2)
    decided = Policy(registry.default).handler(find_op("aten.unique_dim.default")).lookup((x, 0, True, True, True)).decision
    assert decided.kind == "pass" and "slices" in (decided.reason or "")


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def test_schemes_on_a_gpu() -> None:
    def steps(name: str, *args: Any) -> list[Any]:
        plan = Policy(registry.default, target=GPU).handler(find_op(name)).decide(args, bind=False).plan
        assert plan is not None
        return list(plan.launches)

    f32 = torch.float32
    assert [s.kernel for s in steps("aten.median.dim", on_gpu((1024, 8192), f32), 1, False)] == [select.select_kernel]
    assert steps("aten.median.default", on_gpu((1 << 24,), f32))[-1].kernel is select.pick_kernel
    compared = steps("aten.isin.Tensor_Tensor", on_gpu((1 << 20,), f32), on_gpu((10,), f32), True, False)
    assert [s.kernel for s in compared] == [search.isin_kernel]
    sorts = [s.kernel for s in steps("aten.isin.Tensor_Tensor", on_gpu((1 << 20,), f32), on_gpu((5000,), f32), True, False)]
    assert sorts[0] is sort.network_kernel and sorts[-1] is search.isin_kernel
    assert [s.kernel for s in steps("aten.median.dim", on_gpu((1 << 16, 64), f32), 1, False)] == [select.short_kernel]
    few = search.choose_counting(1 << 24, 100, False, GPU)
    many = search.choose_counting(1 << 24, 5000, False, GPU)
    assert few.in_registers and few.copies == few.programs <= 4 * GPU.multiprocessors
    assert not many.in_registers and many.copies * 5000 <= 1 << 19


def test_what_was_measured_to_be_slower_is_left_to_pytorch_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMSMODE_SLOWER")

    def declined(name: str, shape: tuple[int, ...], d: torch.dtype, *args: Any) -> bool:
        decision = Policy(registry.default, target=GPU).handler(find_op(name)).decide((on_gpu(shape, d), *args), bind=False).decision
        assert decision.kind == "rule" or "on an H200" in (decision.reason or "")
        return decision.kind == "pass"

    f32, i64 = torch.float32, torch.int64
    for name, args in (("aten._unique2.default", (True, True, True)), ("aten._unique.default", (True, True))):
        assert declined(name, (512, 512), i64, *args) and not declined(name, (1 << 17,), i64, *args)
    assert not declined("aten.unique_consecutive.default", (1 << 20,), i64, True, True, None)
    for name in ("aten.median.default", "aten.nanmedian.default"):
        assert declined(name, (128, 128), f32) and not declined(name, (100, 100), f32)
    assert not declined("aten.median.dim", (1024, 8192), f32, 1, False)
    assert declined("aten.kthvalue.default", (1 << 14,), f32, 5, 0, False)
    for shape in ((1 << 16,), (2048,), (1024, 8192)):
        assert not declined("aten.kthvalue.default", shape, f32, 5, -1, False)
    assert not declined("aten.mode.default", (1, 8192), f32, 1, False)


def gpu_calls(full: bool) -> list[tuple[str, tuple[Any, ...]]]:
    n = on_gpu((1 << 22,), torch.float32)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("aten.searchsorted.Tensor", (on_gpu((100_000,), torch.float32), n, False, False, None, None)),
        ("aten.bincount.default", (on_gpu((1 << 22,), torch.int64), None, 0)),
        ("aten.histc.default", (n, 100, 0, 0)),
        ("aten.kthvalue.default", (on_gpu((1024, 8192), torch.bfloat16), 5, 1, False)),
        ("aten.unique_consecutive.default", (on_gpu((1 << 22,), torch.int32), True, True, None))]
    if not full:
        return calls
    for d in NUMBERS:
        x, rows = on_gpu((1 << 20,), d), on_gpu((1024, 5000), d)
        sequences, sorter = on_gpu((64, 1000), d), on_gpu((64, 1000), torch.int64)
        calls += [("aten.searchsorted.Tensor", (sequences, on_gpu((64, 500), d), True, True, None, sorter)),
                  ("aten.bucketize.Tensor", (x, on_gpu((100,), d), False, False)),
                  ("aten.isin.Tensor_Tensor", (x, on_gpu((20,), d), False, False)),
                  ("aten.isin.Tensor_Tensor", (x, on_gpu((4000,), d), False, True)),
                  ("aten.median.dim", (rows, 1, False)), ("aten.nanmedian.dim", (on_gpu((1 << 16, 64), d), 1, False)),
                  ("aten.nanmedian.default", (x,)), ("aten.mode.default", (rows, 1, False)),
                  ("aten._unique2.default", (x, True, True, True))]
        if d.is_floating_point:
            calls += [("aten.histc.default", (x, bins, 0, 0)) for bins in (10, 256, 2000)]
        else:
            calls += [("aten.bincount.default", (x, weights, 0)) for weights in (None, on_gpu((1 << 20,), torch.float32), x)]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    if target != "cuda:90" and not full:
        pytest.skip("run with --full for every target")
    assert compile_calls(gpu_calls(full), target, tmp_path) >= (100 if full else 10)
