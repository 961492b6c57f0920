"""Sorting and the smallest or greatest elements: order, ties, NaN, layouts, tiles and merges, ``out=``, limits, GPU sizes.

``sort`` here is always stable, so that its indices are compared with those of PyTorch's stable sort, and those of ``topk``
with the first ones of it. Values are compared bit by bit: signed zeros and NaN keep their places and signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_sizes import compile_calls, on_gpu
from support import in_order

import gemsmode
from gemsmode import registry
from gemsmode.handlers import Decided, Policy
from gemsmode.registry import find_op
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import sort  # noqa: E402  (it needs what load_ops arranges)

NAN, INF = math.nan, math.inf
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SORTABLE = (*FLOATS, *INTS, torch.bool)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GPU = Target("cuda", "cuda", 90, present=False)


@pytest.fixture(autouse=True)
def every_class_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is left to PyTorch for its speed."""
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 items, so that short rows take several of them, merges, and searches of several rounds."""
    monkeypatch.setattr(sort, "_INTERPRETED_TILE", 5)
    monkeypatch.setattr(sort, "_TILE", {1: 5, 2: 5})
    monkeypatch.setattr(sort, "_WAYS", 4)


def decide(name: str, *args: Any, **kwargs: Any) -> tuple[Decided, tuple[Any, ...]]:
    op = find_op(name)
    given = in_order(op, args, kwargs)
    return Policy(registry.default, strict=True).handler(op).lookup(given), given


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of a call, which must be a rule's."""
    decided, given = decide(name, *args, **kwargs)
    assert decided.decision.kind == "rule", f"{name}: {decided.decision.reason}"
    return decided.run(*given)


def plan_on_gpu(name: str, *args: Any) -> Any:
    decided = Policy(registry.default, target=GPU).handler(find_op(name)).decide(args, bind=False)
    assert decided.decision.kind == "rule", decided.decision.reason
    return decided.plan


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(BITS[x.dtype.itemsize]) if x.dtype != torch.bool else x


def same(values: torch.Tensor, indices: torch.Tensor, native: Any, strides: Any) -> None:
    assert (values.dtype, indices.dtype) == (native[0].dtype, torch.int64)
    assert values.shape == native[0].shape and values.stride() == indices.stride() == strides
    assert torch.equal(indices, native[1])
    assert torch.equal(bits(values), bits(native[0]))


def in_order_of(x: torch.Tensor, dim: int, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a stable sort gives, from the CPU: PyTorch's sort of short rows on a GPU puts NaN with a sign before -inf."""
    values, indices = torch.sort(x.cpu(), dim=dim, descending=descending, stable=True)
    return values.to(x.device), indices.to(x.device)


def check(x: torch.Tensor, dim: int = -1, descending: bool = False, name: str = "aten.sort.stable") -> None:
    strides = torch.sort(x, dim=dim, descending=descending, stable=True)[0].stride()
    how = {"stable": True} if name == "aten.sort.stable" else {}
    values, indices = run(name, x, dim=dim, descending=descending, **how)
    same(values, indices, in_order_of(x, dim, descending), strides)


def check_topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> None:
    every = in_order_of(x, dim, largest)
    first = [t.narrow(dim, 0, k) if x.ndim else t[:k] if k else t for t in every]
    values, indices = run("aten.topk.default", x, k, dim, largest, ordered)
    same(values, indices, first, torch.empty(first[0].shape).stride())


def sample(shape: tuple[int, ...], d: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values with many ties; floats with signed zeros, infinities and NaN of both signs, integers with their extremes."""
    draw = torch.Generator("cpu").manual_seed(seed)
    n = math.prod(shape)
    if d == torch.bool:
        x = torch.rand(n, generator=draw, device="cpu") < 0.5
    elif d.is_floating_point:
        x = torch.randn(n, generator=draw, device="cpu").to(d)
        x[1::3] = x[1::3].round()
        for start, value in enumerate((0.0, -0.0, INF, -INF, NAN, -NAN)):
            x[start + 2::17] = value
    else:
        x = torch.randint(max(torch.iinfo(d).min, -20), 20, (n,), dtype=d, generator=draw, device="cpu")
        x[2::9], x[3::9] = torch.iinfo(d).min, torch.iinfo(d).max
    return x.reshape(shape).to(torch.get_default_device())


@pytest.mark.parametrize("d", SORTABLE, ids=str)
def test_dtypes_and_directions(d: torch.dtype) -> None:
    for descending, dim in itertools.product((False, True), (0, 1)):
        check(sample((7, 45), d), dim, descending)
        check(sample((7, 45), d, 1), dim, descending, "aten.sort.default")


LAYOUTS = {
    "contiguous": sample((3, 5, 4, 7), torch.float32), "permuted": sample((7, 3, 4, 5), torch.float32).permute(1, 3, 2, 0),
    "channels_last": sample((3, 5, 4, 7), torch.float32).to(memory_format=torch.channels_last),
    "strided": sample((6, 10, 4, 14), torch.float32)[::2, ::2, :, ::2], "expanded": sample((3, 1, 4, 1), torch.float32).expand(3, 5, 4, 7),
    "offset": sample((4, 5, 4, 7), torch.float32)[1:]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_dimension_of_any_layout(layout: str, device: str) -> None:
    x = LAYOUTS[layout]
    if device != "cpu":
        moved = torch.empty_strided(x.shape, x.stride()) if layout != "expanded" else x.to(device)
        x = moved.copy_(x) if layout != "expanded" else moved
    for dim in (0, 1, 2, 3, -1):
        check(x, dim)
        check_topk(x, 2, dim, largest=dim % 2 == 0)


@pytest.mark.parametrize("d", (torch.float32, torch.int64, torch.bfloat16), ids=str)
def test_merges(d: torch.dtype, small_tiles: None) -> None:
    """Runs that end anywhere, an odd number of them, and keys of one integer and of two."""
    for n, descending in ((101, False), (128, True), (33, True)):
        check(sample((1, n), d), 1, descending)
    check(sample((65, 2), d), 0)


@pytest.mark.parametrize("k", (1, 7, 8, 9, 40, 100))
def test_few_of_many(k: int, small_tiles: None) -> None:
    """Up to a quarter of a tile is kept by each tile; more is merged from runs that are cut off."""
    for d, largest, rows in ((torch.float32, True, 2), (torch.int64, False, 1)):
        check_topk(sample((rows, 101), d), k, 1, largest)


@pytest.mark.parametrize("d", (torch.float32, torch.uint8), ids=str)
@pytest.mark.parametrize("how", ("random", "equal", "ascending", "one hand"))
def test_filters(how: str, d: torch.dtype, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128, of whose 8 hands of 16 items few are left, none is above the limit, or all are: parts go one by one."""
    monkeypatch.setattr(sort, "_FILTER", 7)
    monkeypatch.setattr(sort, "_LEAST_PART", 4)
    monkeypatch.setattr(sort, "_log_part", lambda log_k: max(log_k + 2, 4))
    x = sample((2, 300), d)
    if how == "equal":
        x = torch.ones_like(x)
    elif how == "ascending":
        x = x.sort(1).values
    elif how == "one hand":  # that has nothing small
        x[:, 3::8] = 250 if d == torch.uint8 else 1000
        x[:, 4::8] = -0.0 if d.is_floating_point else 0
    for k, largest in ((7, False), (3, True), (1, False)):
        plan = Policy(registry.default, target=GPU).handler(find_op("aten.topk.default")).decide(
            (on_gpu((2, 300), d), k, 1, largest, True), bind=False).plan
        assert plan is not None and plan.launches[0].kernel is sort.filter_kernel
        check_topk(x, k, 1, largest)
    check_topk(x[:, :130], 5, 1)


@pytest.mark.parametrize("d", FLOATS + INTS, ids=str)
def test_topk_dtypes(d: torch.dtype) -> None:
    for k, largest, ordered in ((0, True, True), (1, False, True), (5, True, False), (12, False, True), (45, True, True)):
        check_topk(sample((3, 45), d), k, 1, largest, ordered)
    check_topk(sample((45, 3), d), 4, 0)


@pytest.mark.parametrize("values", ([0.0, -0.0, 0.0, -0.0], [NAN, -NAN, INF, NAN, -INF], [2.0] * 50, [-0.0, NAN, 0.0, -1e-45, 1e-45]),
                         ids=("zeros", "nans", "equal", "denormal"))
def test_equals_keep_their_order(values: list[float]) -> None:
    for d, descending in itertools.product((torch.float32, torch.float64), (False, True)):
        check(torch.tensor(values, dtype=d), 0, descending)
        check_topk(torch.tensor(values, dtype=d), 3, 0, descending)


def test_edges() -> None:
    for x in (torch.tensor(2.5), torch.empty(0), torch.empty(3, 0), torch.empty(0, 3), torch.ones(1, 1), torch.arange(5).expand(3, 5)):
        for dim in (0, -1):
            check(x, dim)
            if x.ndim and x.shape[dim]:
                check_topk(x, 1, dim)
    for k in (0, 1):  # of the one element of a tensor without dimensions
        values, indices = run("aten.topk.default", torch.tensor(2.5), k)
        assert (values.item(), indices.item(), values.shape) == (2.5, 0, ())


@pytest.mark.parametrize("n", (4097, pytest.param(100_003, id="100003")))
def test_long_rows(n: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements than a tile, and (in a full run) than the index bits below a key of 16 bits."""
    if n > 65536 and not request.config.getoption("--full"):
        pytest.skip("takes minutes in the interpreter: run with --full")
    monkeypatch.setattr(sort, "_INTERPRETED_TILE", 11)
    for d in (torch.float32, torch.bfloat16) if n < 65536 else SORTABLE:
        check(sample((1, n), d), 1, d == torch.bfloat16)
        if d != torch.bool:
            check_topk(sample((1, n), d), 50, 1)


def test_out_variants() -> None:
    x = sample((4, 9), torch.float32)
    native = in_order_of(x, 1, True)
    for strides in ((9, 1), (1, 4)):
        for name in ("aten.sort.values", "aten.sort.values_stable"):
            values = torch.empty_strided((4, 9), strides)
            indices = torch.empty_strided((4, 9), strides, dtype=torch.int64)
            how = {"stable": True} if name.endswith("stable") else {}
            got = run(name, x, dim=1, descending=True, values=values, indices=indices, **how)
            assert got[0] is values and got[1] is indices and values.stride() == strides
            assert torch.equal(bits(values), bits(native[0])) and torch.equal(indices, native[1])
    values, indices = torch.empty(4, 3), torch.empty(4, 3, dtype=torch.int64)
    run("aten.topk.values", x, 3, 1, values=values, indices=indices)
    assert torch.equal(bits(values), bits(native[0][:, :3])) and torch.equal(indices, native[1][:, :3])


@pytest.mark.parametrize("name, args", [
    ("aten.sort.default", (torch.ones(3), 1)), ("aten.topk.default", (torch.ones(3), 4)), ("aten.topk.default", (torch.ones(3), -1)),
    ("aten.topk.default", (torch.tensor(1.0), 2)), ("aten.topk.default", (torch.ones(3), 1, 2)),
    ("aten.sort.default", (torch.ones(3, dtype=torch.complex64),))])
def test_what_pytorch_rejects(name: str, args: tuple[Any, ...], device: str) -> None:
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    # PyTorch 2.15 has a TypeError for complex numbers.
    with pytest.raises((RuntimeError, IndexError, TypeError) if torch.__version__ >= (2, 15) else (RuntimeError, IndexError)) as theirs:
        find_op(name)(*args)
    decided, given = decide(name, *args)
    assert decided.decision.kind == "pass" and decided.decision.reason
    with pytest.raises(type(theirs.value)):
        decided.run(*given)


def test_under_a_mode() -> None:
    x = sample((3, 40), torch.float32).nan_to_num(0, 5, -5).requires_grad_()

    def total() -> torch.Tensor:
        return (torch.sort(x, 1).values * torch.arange(40)).sum() + torch.topk(x * 2, 3).values.sum()

    with gemsmode.GemsMode(strict=True, trace=True) as gems:
        y = total()
        grad, = torch.autograd.grad(y, x)
    rows = {row["overload"]: row["decision"] for row in gems.report.to_dict()["ops"]}
    assert rows["aten.sort.default"] == rows["aten.topk.default"] == "rule"
    assert torch.allclose(y, total())
    assert grad.shape == x.shape and bool(grad.isfinite().all())


def test_composites_in_inference_mode() -> None:
    x = sample((6, 9), torch.float32)
    with torch.inference_mode(), gemsmode.GemsMode(strict=True, trace=True) as gems:
        order, plain, columns = torch.argsort(x, dim=1, stable=True), torch.argsort(x, 0), torch.msort(x)
    assert torch.equal(order, in_order_of(x, 1, False)[1])
    assert torch.equal(bits(columns), bits(in_order_of(x, 0, False)[0]))
    assert torch.equal(bits(x.gather(0, plain)), bits(columns))
    assert {row["decision"] for row in gems.report.to_dict()["ops"] if "sort.default" in row["overload"]} <= {"rule", "composite"}
    assert any(row["overload"].startswith("aten.sort") and row["decision"] == "rule" for row in gems.report.to_dict()["ops"])


def test_schemes_on_a_gpu() -> None:
    """A row of a tile in one launch; merges double runs; few elements of a row need no merge."""
    def kernels(name: str, *args: Any) -> list[str]:
        return [step.kernel.__name__ for step in plan_on_gpu(name, *args).launches]

    f32 = torch.float32
    assert kernels("aten.sort.default", on_gpu((4096, 2048), f32), 1, False) == ["network_kernel"]
    assert kernels("aten.sort.default", on_gpu((1024, 8192), f32), 1, False) == ["network_kernel"] + ["merge_kernel"] * 2
    assert kernels("aten.sort.default", on_gpu((1 << 24,), f32), 0, False) == ["network_kernel"] + ["merge_kernel"] * 13
    assert kernels("aten.topk.default", on_gpu((256, 32000), torch.bfloat16), 50, 1, True, True) == ["filter_kernel", "network_kernel"]
    assert "merge_kernel" not in kernels("aten.topk.default", on_gpu((1, 1 << 22), f32), 64, 1, True, True)
    assert kernels("aten.topk.default", on_gpu((512, 4096), torch.int64), 64, 1, True, True) == ["network_kernel"] * 2
    assert "merge_kernel" in kernels("aten.topk.default", on_gpu((64, 32000), f32), 2000, 1, True, True)
    short = plan_on_gpu("aten.sort.default", on_gpu((1 << 16, 16), f32), 1, False)
    assert short.launches[0].grid[0] == (1 << 16) // dict(short.launches[0].constants)["BLOCK_A"] >= 4 * GPU.multiprocessors
    wide = plan_on_gpu("aten.sort.default", on_gpu((1, 1 << 17), torch.float16), 1, False)
    assert wide.allocs[2].dtype == torch.uint64  # 16 bits of key and 17 of index
    assert plan_on_gpu("aten.sort.default", on_gpu((1, 1 << 16), torch.float16), 1, False).allocs[2].dtype == torch.uint32


def test_what_was_measured_to_be_slower_is_left_to_pytorch_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMSMODE_SLOWER")

    def reason(shape: tuple[int, ...], d: torch.dtype, arch: int = 90, dim: int = -1) -> str:
        target = Target("cuda", "cuda", arch, present=False)
        decision = Policy(registry.default, target=target).handler(find_op("aten.sort.default")).decide(
            (on_gpu(shape, d), dim, False), bind=False).decision
        assert decision.kind == ("pass" if decision.reason else "rule")
        return decision.reason or ""

    f32, i64 = torch.float32, torch.int64
    assert "0.65x at 4096x2048" in reason((4096, 2048), f32) and "0.89x at 8192x1024" in reason((8192, 1024), f32)
    assert reason((1, 1 << 20), i64) and reason((2048, 3), f32, dim=0) and reason((1 << 18,), torch.float64)
    for shape, d in (((16384, 512), f32), ((8192, 1024), i64), ((8192, 1024), torch.bfloat16), ((1, 1 << 16), i64), ((), f32),
                     ((0, 4096), f32)):
        assert not reason(shape, d)
    assert not reason((4096, 2048), f32, arch=80)
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")
    assert not reason((4096, 2048), f32)


def gpu_calls(full: bool) -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("aten.sort.default", (on_gpu((4096, 500), torch.bfloat16), 1, False)),
        ("aten.topk.default", (on_gpu((256, 60), torch.float64), 8, 1, True, True))]
    if full:
        calls += [("aten.topk.default", (on_gpu((64, 32000), d), k, 1, False, True))
                  for d, k in itertools.product((torch.float32, torch.float16, torch.int8), (1, 128))]
        calls += [("aten.sort.default", (on_gpu((1024, 8192), torch.float32), 1, False)),
                  ("aten.topk.default", (on_gpu((256, 32000), torch.bfloat16), 50, 1, True, True))]
        for d, shape in itertools.product(SORTABLE, ((4096, 1000), (1 << 20,), (4096, 50))):
            calls += [("aten.sort.stable", (on_gpu(shape, d), True, 0, True))]
            if d != torch.bool:
                calls += [("aten.topk.default", (on_gpu(shape, d), 40, -1, True, True))]
        calls += [("aten.topk.default", (on_gpu((64, 100_000), torch.float32), k, 1, True, True)) for k in (1, 256, 5000)]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    if target != "cuda:90" and not full:
        pytest.skip("a network takes seconds to compile: run with --full for every target")
    assert compile_calls(gpu_calls(full), target, tmp_path) >= (40 if full else 2)
