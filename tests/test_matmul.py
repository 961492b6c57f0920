"""Matrix products: sizes, layouts, special values, alpha and beta, variants, launch choices, and what is left to PyTorch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import support
import torch
import triton
import triton.language as tl

import gemsmode
from gemsmode import GemsMode, explain, registry
from gemsmode.handlers import Policy
from gemsmode.signature import TensorMeta, describe

aten = torch.ops.aten
PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "linear", "mul"])
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODE = GemsMode(strict=True)


@pytest.fixture(autouse=True)
def every_class_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is left to PyTorch for its speed."""
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")


def rule_of(op: Any, *args: Any) -> str | None:
    handler = MODE.policy.handler(op)
    assert handler.functions is not None
    return handler.lookup(handler.functions.bind(*args)).decision.rule


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


def check(function: Callable[..., Any], *args: Any, slack: float = 1.3, k: int = 0) -> torch.Tensor:
    """``function`` under the mode: intercepted, of PyTorch's metadata, and at most ``slack`` times as wrong as PyTorch's.

    ``k``: the length of the sums, where they may have the error of sums in order: PyTorch's own may add in more parts.
    """
    native = function(*args)
    got, calls = harness.under_mode(function, *args)
    products = [(str(op), d) for op, d in calls if op._schema.name.partition("::")[2].rstrip("_") in PRODUCTS]
    assert products and all(d.kind == "rule" for _, d in products), calls
    assert (got.dtype, got.shape, got.stride()) == (native.dtype, native.shape, native.stride())
    exact = function(*in_float64(args))
    if got.numel():
        finite = exact.isfinite()
        assert torch.equal(got.double().isnan(), exact.isnan())
        assert torch.equal(got.double()[~finite].nan_to_num(0.0), exact[~finite].nan_to_num(0.0))
        if finite.any():
            # The root of the mean square, since the largest of a few dozen errors is chance. Two roundings of the largest
            # result are granted: PyTorch's own may be exact by chance; and float64 is compared with another order of
            # summation, not with something more exact.
            mine, own = ((r.double() - exact)[finite].square().mean().sqrt().item() for r in (got, native))
            rounding = exact[finite].abs().max().item() * torch.finfo(got.dtype).eps
            # Step j of a sum of products of variance 1 rounds a value of sqrt(j), with an error of at most eps / 2 of it and
            # of eps / sqrt(24) in the mean (0.29 eps where it is worst): over k steps that is eps * k * 0.2, of sqrt(k).
            accumulated = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
            # The squares' products have that size too where all results are one number, and that number is near zero.
            squares = function(*(a.square() for a in in_float64(args)))[finite] if k else exact.new_zeros(1)
            in_order = squares.mean().sqrt().item() * accumulated * k**0.5 * 0.25
            assert mine <= max(slack * own, rounding * (64 if got.dtype == torch.float64 else 2), in_order), (mine, own, rounding, in_order)
    return got


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return support.normal(*shape, seed=seed + sum(shape), dtype=dtype)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


# -- sizes, dtypes, layouts --------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (7, 1, 127), (1, 7, 127), (7, 127, 1), (127, 7, 33), (16, 200, 70), (200, 16, 70), (65, 130, 257), (3, 5, 3000),
         (1, 2, 9000)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_mm(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(torch.mm, normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, seed=1), k=k)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_size_just_below_a_power_of_two(dtype: torch.dtype) -> None:
    check(torch.mm, normal(2, 8191, dtype=dtype), normal(8191, 3, dtype=dtype), k=8191)
    check(torch.mm, normal(8191, 2, dtype=dtype), normal(2, 3, dtype=dtype))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x, "transposed": transposed, "sliced": sliced,
    "column expanded": lambda x: x[..., :1].expand_as(x), "row expanded": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize(("left", "right"), list(itertools.product(LAYOUTS, repeat=2)))
def test_layouts(left: str, right: str) -> None:
    a, b = LAYOUTS[left](normal(33, 40)), LAYOUTS[right](normal(40, 70, seed=1))
    # Of expanded operands all results are one number, whose error is one draw.
    k = 40 if "expanded" in left and "expanded" in right else 0
    check(torch.mm, a, b, k=k)
    check(torch.mm, a[:5], b, k=k)
    check(torch.mv, a, b[:, 3])
    check(torch.bmm, torch.stack((a, a + 1)).transpose(0, 1)[:3].transpose(-1, -2), LAYOUTS[right](normal(3, 2, 9)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batches(dtype: torch.dtype) -> None:
    a, b = normal(5, 7, 33, dtype=dtype), normal(5, 33, 20, dtype=dtype)
    check(torch.bmm, a, b)
    check(torch.bmm, a, normal(5, 20, 33, dtype=dtype).transpose(1, 2))
    check(torch.bmm, a[:1].expand(5, 7, 33), b)
    check(torch.bmm, a[:, :1], b)
    check(torch.bmm, a, b[:, :, :1])
    for added in (normal(5, 7, 20, dtype=dtype), normal(20, dtype=dtype), normal(7, 1, dtype=dtype), normal(5, 1, 20, dtype=dtype)):
        check(lambda c, x, y: torch.baddbmm(c, x, y, beta=0.5, alpha=2), added, a, b)
    check(lambda c, x, y: torch.addbmm(c, x, y, beta=0.5, alpha=2), normal(7, 20, dtype=dtype), a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_vectors(dtype: torch.dtype) -> None:
    a, v, c = normal(70, 129, dtype=dtype), normal(129, dtype=dtype), normal(70, dtype=dtype)
    check(torch.mv, a, v)
    check(torch.mv, normal(129, 70, dtype=dtype).t(), v)
    check(lambda *x: torch.addmv(*x, beta=0.25, alpha=-1.5), c, a, v)
    check(lambda *x: torch.addmv(*x), c[:1], a, v)
    check(torch.dot, v, v.flip(0))
    check(torch.vdot, v[::2], v[::2])
    check(torch.dot, normal(20000, dtype=dtype, seed=2), normal(20000, dtype=dtype, seed=3))
    check(lambda *x: torch.addr(*x, beta=0.5, alpha=3), normal(70, 129, dtype=dtype), c, v)
    check(torch.addr, normal(129, dtype=dtype), c, v)


def test_empty() -> None:
    for m, n, k in ((3, 4, 0), (0, 4, 3), (3, 0, 4), (0, 0, 0), (1, 4, 0), (4, 1, 0)):
        a, b = torch.empty(m, k), torch.empty(k, n)
        assert check(torch.mm, a, b).abs().sum() == 0
        check(lambda c, x, y: torch.addmm(c, x, y, beta=2), normal(m, n), a, b)
        check(torch.bmm, torch.empty(2, m, k), torch.empty(2, k, n))
        check(torch.bmm, torch.empty(0, m, k), torch.empty(0, k, n))
        check(lambda c, x, y: torch.addbmm(c, x, y, beta=2), normal(m, n), torch.empty(2, m, k), torch.empty(2, k, n))
        check(lambda c, x, y: torch.addbmm(c, x, y, beta=2), normal(m, n), torch.empty(0, m, k), torch.empty(0, k, n))
    check(torch.dot, torch.empty(0), torch.empty(0))
    check(torch.mv, torch.empty(3, 0), torch.empty(0))
    check(torch.addmv, normal(3), torch.empty(3, 0), torch.empty(0))


# -- alpha, beta, special values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 1), (0.3, 2), (-1, 0.7), (2, 0), (0, 0)])
def test_alpha_and_beta(beta: float, alpha: float, dtype: torch.dtype) -> None:
    a, b = normal(9, 33, dtype=dtype), normal(33, 20, dtype=dtype)
    for c in (normal(9, 20, dtype=dtype), normal(20, dtype=dtype), normal(9, 1, dtype=dtype), transposed(normal(9, 20, dtype=dtype))):
        check(lambda c, x, y: torch.addmm(c, x, y, beta=beta, alpha=alpha), c, a, b)
    check(lambda c, x, y: torch.addmv(c, x, y, beta=beta, alpha=alpha), normal(9, dtype=dtype), a, b[:, 0])


def test_a_beta_of_zero_ignores_what_is_added() -> None:
    bad = torch.tensor([float("nan"), float("inf")]).repeat(10)
    a, b = normal(9, 33), normal(33, 20)
    for k in (33, 0, 3000):
        x, y = normal(9, k), normal(k, 20)
        assert check(lambda c, x, y: torch.addmm(c, x, y, beta=0), bad, x, y).isfinite().all()
    assert check(lambda c, x, y: torch.addmm(c, x, y, beta=0.0, alpha=2), bad.expand(9, 20), a, b).isfinite().all()
    assert check(lambda c, x, y: torch.addmv(c, x, y, beta=0), bad[:9], a, b[:, 0].clone()[:33]).isfinite().all()
    assert check(lambda c, x, y: torch.baddbmm(c, x, y, beta=0), bad, a[None], b[None]).isfinite().all()
    assert check(lambda c, x, y: torch.addr(c, x, y, beta=0), bad, normal(3), normal(20)).isfinite().all()


@pytest.mark.parametrize("size", [(5, 6, 7), (1, 6, 300), (6, 1, 300), (40, 70, 150)])
def test_nan_and_infinity_reach_only_their_row_or_column(size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = normal(m, k), normal(k, n)
    a[m // 2, k - 1], b[0, n // 2] = float("nan"), float("inf")
    check(torch.mm, a, b)
    a[m // 2, k - 1] = float("-inf")
    check(torch.mm, a, b)


def test_accumulates_in_float32() -> None:
    ones = torch.ones(1, 5000, dtype=torch.float16)
    with MODE:
        assert torch.mm(ones, ones.t()).item() == 5000
        assert torch.dot(ones[0], ones[0]).item() == 5000
        assert torch.mm(ones.expand(20, 5000), ones.t().expand(5000, 30)).unique().tolist() == [5000]
        big = torch.full((1, 64), 100.0, dtype=torch.float16)
        assert torch.mm(big, big.t()).item() == float("inf")
        assert torch.addmm(torch.zeros(1, 1, dtype=torch.float16), big, big.t(), alpha=0.01).item() == 6400


# -- variants ----------------------------------------------------------------------------------------------------------


def test_out_and_in_place() -> None:
    a, b, c = normal(9, 33), normal(33, 20), normal(9, 20)
    out = torch.full((9, 20), 7.0)
    check(lambda x, y: torch.mm(x, y, out=torch.empty(9, 20, dtype=x.dtype)), a, b)
    with MODE:
        assert torch.mm(a, b, out=out) is out
        strided = torch.zeros(20, 9).t()
        torch.mm(a, b, out=strided)
        torch.testing.assert_close(strided, out)
        view = torch.zeros(30, 20)
        view[:9].addmm_(a, b, beta=0, alpha=2)
    torch.testing.assert_close(out, torch.mm(a, b))
    torch.testing.assert_close(view[:9], 2 * torch.mm(a, b))
    assert view[9:].abs().sum() == 0
    check(lambda c, x, y: c.clone().addmm_(x, y, beta=0.5), c, a, b)
    check(lambda c, x, y: c.clone().addmv_(x, y, alpha=0.5), c[:, 0], a, b[:, 0])
    check(lambda c, x, y: c.clone().baddbmm_(x, y, alpha=0.5), c[None], a[None], b[None])
    check(lambda c, x, y: c.clone().addbmm_(x, y, alpha=0.5), c, a[None].expand(3, 9, 33), b[None].expand(3, 33, 20))
    check(lambda c, x, y: c.clone().addr_(x, y, beta=0.5), c, a[:, 0], b[0])
    assert rule_of(aten.addmm_.default, c, a, b) == "addmm"
    assert explain("aten.mm.out", a, b, out=out).decision.rule == "mm"  # type: ignore[union-attr]


def test_results_of_another_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        a, b, c = normal(9, 33, dtype=dtype), normal(33, 20, dtype=dtype), normal(20)
        exact = a.double() @ b.double()
        with MODE:
            wide = aten.mm.dtype(a, b, torch.float32)
            batched = aten.bmm.dtype(a[None], b[None], torch.float32)
            added = aten.addmm.dtype(c, a, b, torch.float32, beta=2)
            same = aten.mm.dtype(a, b, dtype)
        assert wide.dtype == batched.dtype == added.dtype == torch.float32 and same.dtype == dtype
        torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batched[0], wide)
        torch.testing.assert_close(added.double(), exact + 2 * c.double(), rtol=1e-5, atol=1e-5)
        assert rule_of(aten.mm.dtype, a, b, torch.float32) == "mm_to_dtype"
        assert rule_of(aten.mm.dtype, a, b, torch.float64) is None


def test_linear_under_inference_mode() -> None:
    linear = torch.nn.functional.linear
    weight, bias = normal(20, 33), normal(20)
    with torch.inference_mode():
        for x in (normal(9, 33), normal(2, 5, 33), normal(5, 2, 33).transpose(0, 1), normal(33), normal(0, 33), normal(2, 3, 4, 33),
                  normal(1, 7, 33)):
            check(linear, x, weight, bias)
            check(linear, x, weight)
        assert rule_of(aten.linear.default, normal(2, 5, 33), weight, bias) == "linear"
        x = normal(4, 3, 2, 33).permute(2, 1, 0, 3)
        assert rule_of(aten.linear.default, x, weight, bias) is None
        check(linear, x, weight, bias)
        check(torch.matmul, normal(2, 3, 5, 8), normal(2, 3, 8, 4))
        check(torch.outer, normal(5), normal(6))


def test_gradients() -> None:
    a, b, c = (normal(*s).double().requires_grad_() for s in ((3, 4), (4, 2), (2,)))
    with MODE:
        assert torch.autograd.gradcheck(lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (c, a, b))
        assert torch.autograd.gradcheck(torch.bmm, (a[None].detach().requires_grad_(), b[None].detach().requires_grad_()))
        assert torch.autograd.gradcheck(torch.mv, (a, b[:, 0].detach().requires_grad_()))


# -- what is left to PyTorch -------------------------------------------------------------------------------------------


def test_integers_and_complex_pass_through_with_their_reason() -> None:
    meta = torch.empty(4, 4, device="meta", dtype=torch.int64)
    decision = explain("mm", meta, meta).decision
    assert decision is not None and decision.kind == "pass" and "int64: an integer product is left to PyTorch" in str(decision.reason)
    x, whole = torch.randn(4, 4, dtype=torch.complex64), torch.ones(4, 4, dtype=torch.int64)
    with MODE:
        if whole.is_cuda:
            with pytest.raises(NotImplementedError, match="'Long'"):
                torch.mm(whole, whole)
        else:
            torch.testing.assert_close(torch.mm(whole, whole), torch.full((4, 4), 4))
        torch.testing.assert_close(torch.mm(x, x), x @ x)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: torch.mm(torch.ones(2, 3), torch.ones(2, 3)), "shapes cannot be multiplied"),
    (lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float64)), "dtype|type"),
    (lambda: torch.mm(torch.ones(2, 3, 1), torch.ones(3, 2)), "matrix|2D"),
    (lambda: torch.addmm(torch.ones(5), torch.ones(2, 3), torch.ones(3, 4)), "expand|size"),
    (lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(3, 4, 3)), "batch|size"),
    (lambda: torch.dot(torch.ones(3), torch.ones(4)), "size|consistent"),
    (lambda: torch.mv(torch.ones(2, 3), torch.ones(2)), "size|mismatch"),
])
def test_wrong_calls_raise_pytorchs_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message), MODE:
        call()


# -- launch choices ----------------------------------------------------------------------------------------------------


def test_repeated_calls_give_the_same_bits() -> None:
    a, b = normal(3, 5000), normal(5000, 4)
    with MODE:
        assert all(torch.equal(torch.mm(a, b), torch.mm(a, b)) for _ in range(3))


def test_long_sums_of_few_results_are_split_and_still_exact() -> None:
    from gemsmode.ops import matmul
    from gemsmode.target import current

    tile, blocks = matmul.choose_tile(3, 4, 5000, 1, "ieee", 4, current())
    assert blocks * tile.k < 5000
    strip, k_blocks = matmul.choose_strip(1, 1 << 24, 1, False, 4, current())
    assert k_blocks * strip.k < 1 << 24
    a, b = torch.ones(3, 5000), torch.ones(5000, 4)
    check(lambda c, x, y: torch.addmm(c, x, y, beta=2, alpha=0.5), normal(4), a, b)


WORKER = """
import json, sys, types
import torch
import triton
import triton.language as tl
from gemsmode import handlers, launch, plan, registry, target
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta
from compile_worker import resources
import gemsmode
gemsmode.load_ops()
policy = handlers.Policy(registry.default)
device = torch.device("cuda", 0)
rows, seen = [], set()

def meta(shape, dtype, transposed=False):
    stride = plan.contiguous_strides(shape)
    if transposed:
        stride = (*stride[:-2], 1, shape[-2])
    return TensorMeta(dtype, tuple(shape), stride, device)

for op, dtype, precision, args in json.loads(sys.argv[1]):
    torch.set_float32_matmul_precision(precision)
    given = tuple(meta(a[0], getattr(torch, dtype), a[1]) if isinstance(a, list) else a for a in args)
    decided = policy.handler(find_op(op)).decide(given, bind=False)
    assert decided.decision.kind == "rule", (op, decided.decision)
    for spec in plan.specs(decided.plan):
        choice = (spec.kernel.__name__, spec.constants, spec.num_warps, spec.num_stages, spec.types[0], spec.types[3])
        if choice in seen:
            continue
        seen.add(choice)
        compiled = launch.compile(spec, target.current())
        blocks = {n: v for n, v in spec.constants if n.startswith("BLOCK")}
        text = compiled.asm.get("ptx", "")
        rows.append([op, dtype, spec.kernel.__name__, blocks, compiled.metadata.shared, resources(compiled, target.current().backend)[1],
                     "wgmma.mma_async" in text, "cp.async" in text, "cp.async.bulk.tensor" in text])
print(json.dumps(rows))
"""


def _calls(full: bool) -> list[Any]:
    """Calls that reach every class of the launch choice."""
    calls: list[Any] = []
    sizes = [(8192, 8192, 8192), (2048, 2048, 4096), (256, 4096, 4096), (256, 256, 256), (64, 32768, 4096), (48, 4096, 4096),
             (32, 32768, 4096),
             (30, 4096, 4096), (16, 32768, 4096), (16, 4096, 4096), (1, 4096, 4096), (4096, 1, 4096)]
    kinds = [("bfloat16", "highest"), ("float32", "highest"), ("float32", "high"), ("float64", "highest")]
    for dtype, precision in [*kinds, *([("float16", "highest")] if full else [])]:
        for m, n, k in sizes if full or dtype == "bfloat16" else sizes[::3]:
            calls.append(["aten.addmm.default", dtype, precision, [[[n], False], [[m, k], False], [[k, n], True], 1, 1]])
    # Persistent programs: both layouts of both operands, a short K, a last round that is split.
    for a, b in itertools.product((False, True), repeat=2) if full else ((False, False), (True, False)):
        calls.append(["aten.mm.default", "bfloat16", "highest", [[[4096, 4096], a], [[4096, 4096], b]]])
    # float32: operands exchanged, and neither along K; lengths and rows that are no whole vectors.
    calls.append(["aten.mm.default", "float32", "highest", [[[200, 250], False], [[250, 200], False]]])
    for a, size in ((False, 2048), (False, 512), (True, 512)):
        calls.append(["aten.mm.default", "float32", "highest", [[[size, size], a], [[size, size], False]]])
    calls += [["aten.mm.default", "float16", "highest", [[[2048, 4096], False], [[4096, 11008], True]]],
              ["aten.addmm.default", "bfloat16", "highest", [[[4096, 3072], False], [[4096, 768], False], [[768, 3072], True], 1, 1]],
              ["aten.bmm.default", "bfloat16", "highest", [[[128, 1024, 64], False], [[128, 64, 1024], True]]]]
    calls += [["aten.mv.default", "bfloat16", "highest", [[[4096, 8192], True], [[8192], False]]],
              ["aten.dot.default", "float32", "highest", [[[2**26], False], [[2**26], False]]],
              ["aten.addbmm.default", "bfloat16", "highest", [[[64, 64], False], [[12, 64, 64], False], [[12, 64, 64], False], 1, 1]],
              ["aten.linear.default", "bfloat16", "highest", [[[4, 512, 768], False], [[3072, 768], False], [[3072], False]]]]
    return calls


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_every_class_of_launch_compiles_without_spills(target: str, request: pytest.FixtureRequest) -> None:
    support.skip_compiling_for_a_gpu_that_is_present()
    full = request.config.getoption("--full")
    if target != "cuda:90" and not full:
        pytest.skip("only with --full")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    environment.update(GEMSMODE_TARGET=target, PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", WORKER, json.dumps(_calls(full))], env=environment, capture_output=True, text=True,
                          check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    persistent = {"tile_kernel", "finish_kernel"} if target in ("cuda:90", "cuda:100") else set()
    turning = {"turn_kernel"} if target == "cuda:90" else set()
    assert len(rows) >= 20 and {r[2] for r in rows} == {"gemm_kernel", "matvec_kernel", "combine_kernel"} | persistent | turning
    # Triton 3.9 keeps up to 24 bytes of stack in float32 tiles, where the versions before it need none.
    newer = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)
    spilling = [r for r in rows if r[5] > (24 if newer and r[1] == "float32" else 0)]
    assert not spilling, "spills"
    limit = {"cuda:90": 227, "cuda:80": 163, "cuda:100": 227, "hip:gfx942": 64}[target] * 1024
    assert not [r for r in rows if r[4] > limit], "more shared memory than there is"
    if target == "cuda:90":
        tiles = [r for r in rows if r[2] == "gemm_kernel"]
        assert all(r[7] for r in tiles), "loads that are not pipelined"
        assert all(r[6] for r in tiles if r[1] == "bfloat16" and r[3]["BLOCK_M"] >= 64), "without the tensor cores' own instruction"
        tiles = [r for r in rows if r[2] == "tile_kernel"]
        assert len(tiles) >= 5 and all(r[6] and r[8] for r in tiles), "without the tensor cores' own instruction, or descriptors"


def test_new_sizes_share_their_kernels() -> None:
    """A growing size changes kernels only by Triton's classes of integers."""
    script = """
import torch, gemsmode
from gemsmode import handlers, plan, registry
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta
gemsmode.load_ops()
policy = handlers.Policy(registry.default)
def meta(*shape):
    return TensorMeta(torch.bfloat16, shape, plan.contiguous_strides(shape), torch.device("cuda", 0))
specs = set()
for s in range(1025, 2024):
    decided = policy.handler(find_op("aten.bmm.default")).decide((meta(32, s, 128), meta(32, 128, 512)), bind=False)
    specs |= set(plan.specs(decided.plan))
print(len(specs))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    environment["GEMSMODE_TARGET"] = "cuda:90"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) <= 3  # products of multiples of 128 rows, of 16, and others


def test_float32_follows_the_allowed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemsmode.ops import matmul
    from gemsmode.target import Target

    gpu = Target("cuda", "cuda", 90, present=False)
    x = TensorMeta(torch.float32, (256, 256), (256, 1), torch.device("cuda", 0))
    precisions = {}
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        try:
            plan = matmul.mm(gemsmode.Call(aten.mm.default, (x, x), gpu))
        finally:
            torch.set_float32_matmul_precision("highest")
        precisions[setting] = dict(plan.launches[0].constants)["PRECISION"]
    assert precisions == {"highest": "tf32x3", "high": "tf32"}


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_operands_are_exchanged_and_turned_around(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where float32 products are made on tensor cores, which read the right operand along K."""
    from gemsmode.ops import matmul

    monkeypatch.setattr(matmul, "_kind", lambda dtype, target: "tf32x3")
    monkeypatch.setattr(matmul, "TURNED", 65)
    policy = Policy(registry.default)  # decides anew, by the settings of this test
    for batch, m, n, k in (((), 80, 100, 64), ((), 100, 80, 2048), ((3,), 72, 96, 32), ((), 66, 68, 160)):
        a = normal(*batch, m, k) if layout[0] == "n" else normal(*batch, k, m).mT
        b = normal(*batch, k, n, seed=1) if layout[1] == "n" else normal(*batch, n, k, seed=1).mT
        c = normal(n, seed=2)
        op = aten.baddbmm.default if batch else aten.addmm.default
        args, handler = (c, a, b, 0.5, 2.0), policy.handler(op)
        metas = tuple(describe(x) for x in args)
        decided, plan = handler.decide(metas), handler.decide(metas, bind=False).plan
        turned = layout == "tn" and (m % 4, n % 4) == (0, 0)
        assert plan is not None and (plan.launches[0].kernel is matmul.turn_kernel) == turned
        expected = 0.5 * c.double() + 2 * (a.double() @ b.double())
        torch.testing.assert_close(decided.run(*args).double(), expected, rtol=1e-5, atol=1e-3)


@triton.jit
def rounding_kernel(p_x, p_out, n, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, ROUND(tl.load(p_x + o, mask=o < n)), mask=o < n)


def test_rounding_to_tf32(device: str) -> None:
    from gemsmode.ops import matmul

    ulp = 2.0**-10
    given = [1.0, 1 + ulp / 2, 1 + ulp / 2 - 2.0**-23, 1 + ulp * 1.5, -1 - ulp / 2, -1 - ulp / 4, 2 - 2.0**-23, 0.0, -0.0,
             float("inf"), float("-inf"), 2.0**-130, 3.4028234663852886e38]
    wanted = [1.0, 1 + ulp, 1.0, 1 + 2 * ulp, -1 - ulp, -1.0, 2.0, 0.0, -0.0, float("inf"), float("-inf"), 2.0**-130, float("inf")]
    x = torch.tensor([*given, float("nan")], device=device)
    out = torch.empty_like(x)
    rounding_kernel[(1,)](x, out, x.numel(), ROUND=matmul.rounded_to_tf32, BLOCK=16)
    assert out[:-1].tolist() == wanted and out[-1].isnan()
    assert torch.signbit(out[8]) and not torch.signbit(out[7])


@pytest.mark.parametrize("sizes", [(16, 64, 2048), (129, 65, 2047), (70, 70, 4096)])
def test_float32_sums_are_not_one_chain(sizes: tuple[int, int, int], device: str) -> None:
    m, n, k = sizes
    generator = torch.Generator("cpu").manual_seed(3)
    a, b = torch.randn(m, k, generator=generator, device="cpu").to(device), torch.randn(k, n, generator=generator, device="cpu").to(device)
    exact = a.double() @ b.double()
    with GemsMode(strict=True):
        result = a @ b
    error = (result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # Of a chain of k sums it is about 2.5e-8 * sqrt(k / 2), measured on a GPU: 8e-7 and more.
    assert error < 3e-7


def test_float32_products_are_summed_by_blocks_on_a_gpu() -> None:
    from gemsmode.ops import matmul
    from gemsmode.target import Target

    gpu = Target("cuda", "cuda", 80, present=False)
    for dtype, blocks in ((torch.float32, True), (torch.float64, False), (torch.bfloat16, False)):
        x = TensorMeta(dtype, (64, 64), (64, 1), torch.device("cuda", 0))
        assert dict(matmul.mm(gemsmode.Call(aten.mm.default, (x, x), gpu)).launches[0].constants)["BY_BLOCK"] is blocks


@pytest.mark.parametrize("n", [77, 12345, 2**16, 2**20])
def test_dot_is_as_precise_as_a_tree(n: int, device: str) -> None:
    if n > 2**16 and device == "cpu":
        pytest.skip("the interpreter's blocks are smaller, so that its chains of sums are longer than a GPU's")
    generator = torch.Generator("cpu").manual_seed(4)
    x, y = torch.randn(2, 16, n, generator=generator, device="cpu").to(device)
    with GemsMode(strict=True):
        results = [torch.dot(a, b) for a, b in zip(x, y)]
    wrong = torch.stack([r.double() - a.double() @ b.double() for r, a, b in zip(results, x, y)])
    assert wrong.square().mean().sqrt() < 2.0**-23 * n**0.5


# -- persistent programs -----------------------------------------------------------------------------------------------


@pytest.fixture
def persistent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of persistent programs, which the interpreter takes too, on small tiles."""
    from gemsmode.ops import persistent

    monkeypatch.setattr(persistent, "IN_INTERPRETER", True)
    return persistent


def kernels_of(op: Any, *args: Any) -> list[str]:
    """The kernels that a call's plan launches."""
    decided = GemsMode(strict=True).policy.handler(op).decide(tuple(TensorMeta.of(a) if isinstance(a, torch.Tensor) else a for a in args),
                                                              bind=False)
    assert decided.plan is not None, decided.decision
    return [step.kernel.__name__ for step in decided.plan.launches]


def check_tiles(function: Callable[..., Any], *args: Any) -> torch.Tensor:
    """As :func:`check`, in a mode that has not seen the call."""
    native = function(*args)
    with GemsMode(strict=True):
        got = function(*args)
    assert (got.dtype, got.shape, got.stride()) == (native.dtype, native.shape, native.stride())
    exact = function(*in_float64(args))
    mine, own = ((r.double() - exact).square().mean().sqrt().item() for r in (got, native))
    assert mine <= max(1.3 * own, 2 * exact.abs().max().item() * torch.finfo(got.dtype).eps)
    return got


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("left", "right"), list(itertools.product(("contiguous", "transposed"), repeat=2)))
def test_persistent_programs(left: str, right: str, dtype: torch.dtype, persistent: Any, device: str) -> None:
    m, n, k = (136, 200, 104) if device == "cpu" else (4104, 4200, 1032)
    a, b = LAYOUTS[left](normal(m, k, dtype=dtype)), LAYOUTS[right](normal(k, n, dtype=dtype, seed=1))
    if device == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10):
        assert kernels_of(aten.mm.default, a, b)[0] == "tile_kernel"
    check_tiles(torch.mm, a, b)
    for added in (normal(n, dtype=dtype), normal(m, n, dtype=dtype), normal(m, 1, dtype=dtype)):
        check_tiles(lambda c, x, y: torch.addmm(c, x, y, beta=0.5, alpha=-2), added, a, b)
    check_tiles(torch.addmm, normal(n, dtype=dtype), a, b)
    bad = torch.full((n,), float("nan"), dtype=dtype)
    with GemsMode(strict=True):
        assert torch.addmm(bad, a, b, beta=0).isfinite().all()


@pytest.mark.parametrize("k", (40, 600))
def test_the_last_round_is_split(k: int, persistent: Any, device: str) -> None:
    m, n, k = (64, 144, k) if device == "cpu" else (2048, 11008, 8 * k)
    a, b, c = normal(m, k, dtype=torch.bfloat16), normal(n, k, dtype=torch.bfloat16).t(), normal(n, dtype=torch.bfloat16)
    if device == "cpu":  # six tiles for three programs at a time are no remainder; four are
        assert kernels_of(aten.mm.default, a, b) == ["tile_kernel"]
        a = normal(32 * 5, k, dtype=torch.bfloat16)
        assert kernels_of(aten.mm.default, a[:32], b) == ["tile_kernel"]
        split = kernels_of(aten.mm.default, a, b[:, :72])
        assert split == ["tile_kernel", "tile_kernel", "finish_kernel"]
        b, c = b[:, :72], c[:72]
    check_tiles(torch.mm, a, b)
    check_tiles(lambda c, x, y: torch.addmm(c, x, y, beta=0.25, alpha=2), c, a, b)
    with GemsMode(strict=True):
        assert torch.equal(torch.mm(a, b), torch.mm(a, b))


def test_persistent_batches(persistent: Any, device: str) -> None:
    a, b = normal(3, 64, 64, dtype=torch.bfloat16), normal(3, 128, 64, dtype=torch.bfloat16).transpose(1, 2)
    if device == "cpu":
        assert kernels_of(aten.bmm.default, a, b) == ["tile_kernel"]
        assert kernels_of(aten.bmm.default, a[:, :40], b) == ["gemm_kernel"]  # tiles would reach into the next matrix
    check_tiles(torch.bmm, a, b)
    check_tiles(torch.bmm, a[:, :40], b)
    check_tiles(torch.bmm, normal(3, 96, 64, dtype=torch.bfloat16).transpose(1, 2), normal(3, 96, 128, dtype=torch.bfloat16))
    for added in (normal(3, 1, 128, dtype=torch.bfloat16), normal(3, 64, 128, dtype=torch.bfloat16)):
        check_tiles(lambda c, x, y: torch.baddbmm(c, x, y, beta=0.5), added, a, b)


def test_what_descriptors_cannot_read_takes_the_other_kernel(persistent: Any, device: str) -> None:
    m, n, k = (64, 72, 80) if device == "cpu" else (4104, 4168, 80)
    tiles = device == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10)
    first = "tile_kernel" if tiles else "gemm_kernel"
    a, b = normal(m, k, dtype=torch.bfloat16), normal(k, n, dtype=torch.bfloat16)
    assert kernels_of(aten.mm.default, a, b)[0] == first
    assert kernels_of(aten.mm.default, a[:, :63], b[:63])[0] == first
    check_tiles(torch.mm, a[:, :63], b[:63])
    others = [(normal(m, k + 1, dtype=torch.bfloat16)[:, :k], b), (sliced(a), b), (a, normal(k, n - 1, dtype=torch.bfloat16)),
              (a.float(), b.float())]
    for x, y in others:
        assert "tile_kernel" not in kernels_of(aten.mm.default, x, y)
        check_tiles(torch.mm, x, y)
    # Tensors that do not start at a multiple of 16 bytes are known only when the call is made.
    shifted = torch.cat((a.flatten()[:1], a.flatten()))[1:].view_as(a)
    assert shifted.data_ptr() % 16 and kernels_of(aten.mm.default, shifted, b)[0] == first
    check_tiles(torch.mm, shifted, b)


def test_rounds_are_split_where_it_pays() -> None:
    from gemsmode.ops import persistent
    from gemsmode.target import Target

    gpu = Target("cuda", "cuda", 90, present=False)
    split = {}
    for m, n, k in ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 11008, 4096), (4096, 3072, 768)):
        shape = persistent.choose_shape(m, n, k, 1, gpu)
        assert shape == (persistent.LARGE if k > 1024 else persistent.PAIRED)
        tiles = -(-m // shape.m) * -(-n // shape.n)
        chosen = persistent.choose_split(shape, tiles, k, 1, gpu)
        assert chosen.whole + chosen.rest == tiles and chosen.rest * chosen.parts <= gpu.multiprocessors * shape.resident
        assert not chosen.rest or (chosen.whole % gpu.multiprocessors == 0 and chosen.parts * chosen.part_blocks * shape.k >= k)
        split[m, n, k] = chosen.parts
    assert split == {(8192, 8192, 8192): 1, (4096, 4096, 4096): 1, (2048, 11008, 4096): 4, (4096, 3072, 768): 1}
    flat = persistent.choose_shape(1024, 1024, 64, 128, gpu), persistent.choose_shape(1024, 128, 64, 128, gpu)
    assert [(s.m, s.n) for s in flat if s is not None] == [(64, 256), (128, 128)]
    assert persistent.choose_shape(64, 64, 64, 128, gpu) is None
    assert persistent.choose_shape(2048, 2048, 2048, 1, Target("cuda", "cuda", 80, present=False)) is None


def test_what_was_measured_to_be_slower_is_left_to_pytorch_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemsmode.ops import matmul, measured
    from gemsmode.plan import Decline
    from gemsmode.target import INTERPRETER, Target

    def mm(arch: int, dtype: torch.dtype, size: int, rows: int | None = None) -> str:
        target = Target("cuda", "cuda", arch, present=False) if arch else INTERPRETER
        device = torch.device("cuda", 0) if arch else torch.device("cpu")
        x, y = TensorMeta(dtype, (rows or size, size), (size, 1), device), TensorMeta(dtype, (size, size), (size, 1), device)
        try:
            matmul.mm(gemsmode.Call(aten.mm.default, (x, y), target))
        except Decline as reason:
            return str(reason)
        return ""

    monkeypatch.delenv("GEMSMODE_SLOWER")
    for size, rows, reason in ((2048, 4, "0.92x at 4x4096x4096"), (2047, None, "no multiple of 16 bytes"), (2048, 50, "33 to 64 rows"),
                               (127, None, "no multiple of 16 bytes")):
        assert reason in mm(90, torch.float32, size, rows)
    for arch, size, rows in ((90, 2048, None), (90, 2048, 16), (90, 2048, 1), (90, 127, 1), (80, 2047, None), (0, 2047, None)):
        assert not mm(arch, torch.float32, size, rows)
    assert not mm(90, torch.bfloat16, 2048) and not mm(90, torch.bfloat16, 2048, 4)
    torch.set_float32_matmul_precision("high")
    try:
        assert "with TF32 (operands rounded to nearest cost" in mm(90, torch.float32, 2048)
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")
    assert not mm(90, torch.float32, 2048) and measured.serves_slower()


def test_a_long_dot_product_adds_its_parts_at_once() -> None:
    from gemsmode.ops import matmul
    from gemsmode.target import Target

    x = TensorMeta(torch.float32, (2**26,), (1,), torch.device("cuda", 0))
    plan = matmul.dot(gemsmode.Call(aten.dot.default, (x, x), Target("cuda", "cuda", 90, present=False)))
    parts, combine = plan.launches[0].grid[1], dict(plan.launches[1].constants)
    assert combine["BLOCK_PARTS"] >= parts > 100


def test_launch_choices_are_read_from_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemsmode.ops import matmul, persistent
    from gemsmode.target import Target

    gpu = Target("cuda", "cuda", 90, present=False)
    monkeypatch.setitem(matmul.STRIPS, "dot", matmul.Strip(1, 2048, 8, 16, 2, "evict_first"))
    x = TensorMeta(torch.float32, (2**26,), (1,), torch.device("cuda", 0))
    first = matmul.dot(gemsmode.Call(aten.dot.default, (x, x), gpu)).launches[0]
    chosen = dict(first.constants)
    assert (chosen["BLOCK_K"], chosen["EVICT"], first.num_warps) == (2048, "evict_first", 8)
    assert 0.9 * 16 * gpu.multiprocessors < first.grid[1] <= 16 * gpu.multiprocessors
    other = persistent.Shape(256, 128, 64, 2, 8, 4, 1, group=4)
    monkeypatch.setattr(persistent, "SHAPES", ((512, (persistent.PAIRED,)), (2**31, (other, persistent.LARGE))))
    assert persistent.choose_shape(4096, 4096, 4096, 1, gpu) == other
    assert persistent.choose_shape(128, 2**16, 4096, 1, gpu) == persistent.LARGE
    assert persistent.choose_shape(4096, 4096, 512, 1, gpu) == persistent.PAIRED
