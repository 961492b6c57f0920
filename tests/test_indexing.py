"""Indexing: values, layouts, out-of-range indices; embedding's gradient against float64."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from gpu_sizes import compile_calls, on_gpu

from gemsmode import GemsMode, load_ops
from gemsmode.target import Target, current

load_ops()

from gemsmode.ops import mask  # noqa: E402
from gemsmode.ops.indexing import Staged, choose_staged  # noqa: E402
from gemsmode.ops.scatter import EXCHANGES_ON_HIP, WholeRows, choose_whole_rows  # noqa: E402

aten = torch.ops.aten


def served(function, *args):
    """The result under the mode, which must have come from a rule."""
    with GemsMode(strict=True, trace=True) as mode:
        result = function(*args)
    rows = mode.report.to_dict()["ops"]
    assert [r for r in rows if r["decision"] == "rule"] and not [r for r in rows if r["decision"] == "pass"], rows
    return result


def exactly(function, *args) -> None:
    expected, got = function(*args), served(function, *args)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 5, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embedding(dtype: torch.dtype, width: int) -> None:
    device = current().device_type
    weight, indices = torch.randn(50, width, device=device).to(dtype), torch.randint(0, 50, (3, 70), device=device)
    exactly(aten.embedding, weight, indices)
    exactly(aten.embedding, weight, indices.t())
    exactly(aten.embedding, weight.t().contiguous().t(), indices.int())
    exactly(aten.embedding, weight, indices[0, 0])


@pytest.mark.parametrize("padding", [-1, 3])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embedding_backward(dtype: torch.dtype, scale: bool, padding: int) -> None:
    device = current().device_type
    grad, indices = torch.randn(3, 70, 40, device=device).to(dtype), torch.randint(0, 50, (3, 70), device=device)
    expected = aten.embedding_dense_backward(grad.cpu().double(), indices.cpu(), 50, padding, scale)
    got = served(aten.embedding_dense_backward, grad, indices, 50, padding, scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(got, served(aten.embedding_dense_backward, grad, indices, 50, padding, scale)), "not the same at every run"


@pytest.mark.parametrize("scale", [False, True])
def test_embedding_backward_reads_by_strides(scale: bool) -> None:
    """Positions are expanded over the batch, and the gradient of a sum is one number."""
    device = current().device_type
    many, grads = torch.randint(0, 50, (4, 35), device=device), torch.randn(4, 35, 2 * 24, device=device)
    for indices in (many[:1].expand(4, 35), many[:, :1].expand(4, 35), many[0, 0].expand(4, 35),
                    many.t().contiguous().t(), torch.stack((many, many), -1)[..., 0]):
        for grad in (grads[..., :24], grads[..., ::2], grads[:1, :1, :24].expand(4, 35, 24), grads[0, 0, 0].expand(4, 35, 24),
                     grads[:, :, :24].transpose(0, 1).contiguous().transpose(0, 1), grads[:1, :, :24].expand(4, 35, 24)):
            expected = aten.embedding_dense_backward(grad.cpu().double(), indices.cpu(), 50, 3, scale)
            got = served(aten.embedding_dense_backward, grad, indices, 50, 3, scale)
            torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    deep = torch.randint(0, 50, (2, 3, 5), device=device).transpose(0, 1).transpose(1, 2)[:, ::2]
    grad = torch.ones(*deep.shape, 8, device=device)
    with GemsMode(trace=True) as mode:
        aten.embedding_dense_backward(grad, deep, 50, -1, False)
    assert not [r for r in mode.report.compute if r.decision == "rule"]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_index_select_and_gather(dim: int) -> None:
    device = current().device_type
    x = torch.randn(6, 7, 8, device=device)
    for t in (x, x.transpose(0, 2), x[:, ::2], x[:1].expand(6, 7, 8)):
        n = t.shape[dim]
        exactly(aten.index_select, t, dim, torch.randint(0, n, (11,), device=device))
        shape = list(t.shape)
        shape[dim] = 9
        index = torch.randint(0, n, shape, device=device)
        exactly(aten.gather, t, dim, index)
        exactly(aten.gather, t, dim, index[:2, :3])
        exactly(aten.gather, t, dim, torch.randint(0, n, shape[::-1], device=device).permute(2, 1, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends the CUDA context")
def test_out_of_range_raises_pytorch_error() -> None:
    weight = torch.randn(50, 4)
    with GemsMode(strict=True):
        for call in (lambda: aten.embedding(weight, torch.tensor([60])), lambda: aten.index_select(weight, 0, torch.tensor([-51])),
                     lambda: aten.gather(weight, 0, torch.tensor([[50]]))):
            with pytest.raises((IndexError, RuntimeError), match=r"range|bound"):
                call()


def in_place(function, x: torch.Tensor, *args) -> None:
    """``function`` writes into its first argument, through a view of a larger tensor that must not change otherwise."""
    whole = torch.full((x.shape[0] + 2, *x.shape[1:]), 7, dtype=x.dtype, device=x.device)
    whole[1:-1] = x
    expected = whole.clone()
    function(expected[1:-1], *args)
    with GemsMode(strict=True, trace=True) as mode:
        view = whole[1:-1]
        assert function(view, *args) is view
    assert not [r for r in mode.report.to_dict()["ops"] if r["decision"] == "pass"], mode.report.to_dict()["ops"]
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_scatters(dtype: torch.dtype) -> None:
    device = current().device_type
    x, src = torch.randn(6, 7, device=device).mul(9).to(dtype), torch.randn(9, 9, device=device).mul(9).to(dtype)
    unique = torch.stack([torch.randperm(6, device=device) for _ in range(7)], 1)
    repeated = torch.randint(0, 6, (8, 7), device=device)
    in_place(lambda t, i, s: t.scatter_(0, i, s), x, unique, src)
    in_place(lambda t, i: t.scatter_(0, i, 3), x, repeated)
    in_place(lambda t, i, s: t.scatter_add_(0, i, s), x, repeated, src)
    in_place(lambda t, i, s: t.scatter_(0, i, s, reduce="add"), x, repeated, src)
    in_place(lambda t, i, s: t.index_add_(0, i, s[:5, :7], alpha=2), x, torch.tensor([0, 3, 3, 5, 0], device=device), src)
    exactly(torch.scatter, x, 0, unique, src)
    exactly(lambda t, i, s: t.index_add(0, i, s[:2, :7]), x.t().contiguous().t(), torch.tensor([0, 3], device=device), src)
    exactly(lambda t, i, v: aten.index_put(t, i, v), x.t().contiguous().t(), (torch.tensor([0, 3], device=device),), src[:2, :7])
    exactly(torch.scatter, x.t().contiguous().t(), 1, torch.randint(0, 7, (6, 1), device=device), src)


def test_index_and_index_put() -> None:
    device = current().device_type
    x = torch.randn(5, 6, 7, device=device)
    rows, columns = torch.tensor([[0, 2], [-1, 3]], device=device), torch.tensor([1, 5], device=device)
    for indices in ((rows,), (rows, columns), (None, columns), (rows, None, columns), (None, rows, columns)):
        exactly(aten.index, x, indices)
        values = torch.randn_like(aten.index(x, indices))
        in_place(lambda t, i, v: aten.index_put_(t, i, v), x, indices, values)
        in_place(lambda t, i, v: aten.index_put_(t, i, v, True), x, indices, values)
    in_place(lambda t, i, v: aten.index_put_(t, i, v, True), x, (torch.zeros(50, dtype=torch.int64, device=device),),
             torch.randn(6, 7, device=device))


def test_atomics_yield_to_deterministic_algorithms() -> None:
    device = current().device_type
    x, index = torch.zeros(4, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        with GemsMode(strict=True, trace=True) as mode:
            x.scatter_add(0, index, torch.ones(3, device=device))
    finally:
        torch.use_deterministic_algorithms(False)
    (row,) = [r for r in mode.report.to_dict()["ops"] if "scatter_add" in r["overload"]]
    assert row["decision"] == "pass" and "deterministic" in row["reason"]


# -- advanced indexing, whatever the layout ----------------------------------------------------------------------------


def test_index_layouts_are_pytorchs() -> None:
    device = current().device_type
    x = torch.randn(4, 5, 6, 3, device=device)
    a, b = torch.tensor([[0, 2], [-1, 3]], device=device), torch.tensor([1, 2], device=device)
    for t in (x, x.permute(3, 1, 0, 2), x.contiguous(memory_format=torch.channels_last), x[:, ::2], x[:1].expand(4, 5, 6, 3),
              x.permute(2, 0, 1, 3)):
        for indices in ((None, b), (a % 3, None, b), (None, None, a % 3, b), (None, b, b), (b, None, None, b)):
            exactly(aten.index, t, indices)
    exactly(aten.take, x.permute(3, 1, 0, 2), torch.tensor([[0, -1], [359, -360]], device=device))
    exactly(aten.index_select, x[0, 0, 0, 0], 0, torch.tensor([0], device=device))


def test_clamped_and_masked_indexing() -> None:
    device = current().device_type
    x = torch.randn(5, 4, device=device)
    indices, mask = [torch.tensor([-9, -1, 2, 40], device=device)], torch.tensor([[True], [True], [False], [True]], device=device)
    exactly(aten._unsafe_masked_index, x, mask, indices, -3)
    # Two rows go to one place, in an order that is the GPU's to choose: whole numbers have the same sum in any.
    whole = [torch.randint(-9, 9, s, device=device).float() for s in ((5, 4), (4, 4))]
    exactly(aten._unsafe_masked_index_put_accumulate, whole[0], mask.expand(4, 4), indices, whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_reductions_at_indices(reduce: str, dtype: torch.dtype) -> None:
    device = current().device_type
    x, src = (torch.randn(s, device=device).mul(3).to(dtype) for s in ((7, 9), (6, 9)))
    index = torch.randint(0, 7, (6, 9), device=device)
    if dtype.is_floating_point and reduce in ("amax", "amin"):
        src[0, 0], x[3, 3] = float("nan"), float("-inf")
    for include_self in (True, False):
        expected = x.cpu().double().scatter_reduce(0, index.cpu(), src.cpu().double(), reduce, include_self=include_self)
        got = served(lambda inc: x.scatter_reduce(0, index, src, reduce, include_self=inc), include_self)
        if dtype.is_floating_point:
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(got, x.scatter_reduce(0, index, src, reduce, include_self=include_self))
        if reduce != "sum":
            rows = index[:, 0]
            in_place(lambda t, i, s, inc=include_self: t.index_reduce_(0, i, s, reduce, include_self=inc), torch.ones_like(x),
                     rows, torch.ones_like(src))


def test_short_dtypes_are_summed_in_wider_ones() -> None:
    device = current().device_type
    x, index = torch.zeros(3, device=device, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64, device=device)
    assert served(lambda: x.scatter_add(0, index, torch.ones(1000, device=device, dtype=torch.bfloat16)))[0] == 1000
    bytes_ = torch.zeros(3, device=device, dtype=torch.uint8)
    assert served(lambda: bytes_.index_add(0, index, torch.ones(1000, device=device, dtype=torch.uint8)))[0] == 1000 % 256


def test_slices_by_index() -> None:
    device = current().device_type
    x, rows = torch.randn(6, 7, device=device), torch.tensor([4, 0], device=device)
    for t in (x, x.t().contiguous().t()):
        exactly(lambda t: t.index_copy(0, rows, torch.ones(2, 7, device=device)), t)
        exactly(lambda t: t.index_fill(1, torch.tensor([-1, 2], device=device), 5), t)
        exactly(lambda t: t.index_fill(1, rows, torch.tensor(2.0, device=device)), t)
    in_place(lambda t: t.put_(torch.tensor([-1, 3], device=device), torch.tensor([8.0, 9.0], device=device)), x)
    in_place(lambda t: t.put_(torch.tensor([3, 3], device=device), torch.tensor([8.0, 9.0], device=device), accumulate=True), x)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5000,), (37, 41), (3, 4, 5), (), (0, 3), (2, 1)])
def test_nonzero(shape: tuple[int, ...]) -> None:
    device = current().device_type
    for x in (torch.randint(-1, 2, shape, device=device), torch.rand(shape, device=device) < 0.2, torch.zeros(shape, device=device)):
        exactly(aten.nonzero, x)
        exactly(lambda t: aten.nonzero_static(t, size=7, fill_value=-5), x)
    if len(shape) == 2:
        exactly(aten.nonzero, torch.randint(-1, 2, shape, device=device).t())


@pytest.mark.skipif(not current().interpreted, reason="tiles take several steps on a GPU as it is")
def test_masks_in_tiles_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "tile_of", lambda n, target: (256, 4))
    monkeypatch.setattr(mask, "step_of", lambda tile, warps, target: 64)
    x, flags = torch.randn(29, 43), torch.rand(29, 43) < 0.3
    exactly(aten.nonzero, flags)
    exactly(aten.masked_select, x, flags)
    exactly(aten.masked_scatter, x, flags, torch.randn(1300))
    exactly(aten.masked_scatter_backward, x, flags, [1300])


def test_masked_select_and_scatter() -> None:
    device = current().device_type
    x, mask = torch.randn(37, 41, device=device), torch.rand(37, 41, device=device) < 0.3
    for t, m in ((x, mask), (x.t(), mask.t()), (x, mask[:, :1]), (x[:1], mask), (x, torch.zeros_like(mask))):
        exactly(aten.masked_select, t, m)
        exactly(aten.masked_scatter, t, m, torch.randn(40, 40, device=device))
    in_place(lambda t, m: t.masked_scatter_(m, torch.arange(2000.0, device=device)), x, mask)
    exactly(aten.masked_scatter_backward, x, mask, [60, 30])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends the CUDA context")
def test_too_short_a_source_raises_pytorchs_error() -> None:
    with GemsMode(strict=True), pytest.raises(RuntimeError, match=r"source|elements"):
        torch.zeros(4).masked_scatter(torch.ones(4, dtype=torch.bool), torch.zeros(2))


def test_boolean_indices() -> None:
    device = current().device_type
    x = torch.randn(6, 5, 4, device=device)
    rows, both, last = (torch.rand(s, device=device) < 0.5 for s in ((6,), (6, 5), (4,)))
    chosen = torch.randint(0, 4, (int(rows.sum()),), device=device)
    for indices in ((rows,), (both,), (None, None, last), (rows, None, chosen), (torch.zeros_like(rows),), (x > 0,)):
        for t in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
            exactly(aten.index, t, indices)
        values = torch.randn_like(aten.index(x, indices))
        in_place(lambda t, i, v: aten.index_put_(t, i, v), x[:, :, :], indices, values)
        in_place(lambda t, i, v: aten.index_put_(t, i, v, True), x, indices, values)
        in_place(lambda t, i: aten.index_put_(t, i, torch.tensor(3.0, device=device)), x, indices)
        exactly(lambda t, i: aten.index_put(t, i, torch.tensor([3.0], device=device)), x.to(torch.float64).float(), indices)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_repeat_interleave(dtype: torch.dtype) -> None:
    device = current().device_type
    repeats = torch.randint(0, 5, (3000,), device=device, dtype=dtype)
    exactly(aten.repeat_interleave.Tensor, repeats)
    exactly(lambda r: torch.repeat_interleave(r, output_size=int(repeats.sum())), repeats)
    exactly(aten.repeat_interleave.Tensor, torch.zeros(4, device=device, dtype=dtype))
    x = torch.randn(3, 4, device=device)
    exactly(lambda r: torch.repeat_interleave(x, r, dim=0), torch.tensor([2, 0, 5], device=device))


# -- launch choice and GPU sizes ---------------------------------------------------------------------------------------

H200 = Target("cuda", "cuda", 90, present=False)


def test_launch_choice() -> None:
    assert choose_staged(8192, 8192, 8192, 4, H200) == Staged(1, 8192, 8192, 16)
    assert choose_staged(65536, 64, 64, 4, H200) == Staged(32, 64, 64, 4)
    assert choose_staged(8192, 4, 8192, 4, H200) is None, "few reads of a long row"
    assert choose_staged(100, 50000, 50000, 4, H200) is None, "a row that does not fit"
    assert choose_whole_rows(4096, 8192, 8192, 4, H200) == WholeRows(1, 4096, 8)
    assert choose_whole_rows(64, 8192, 8192, 4, H200) is None, "too few rows to fill the device"


def gpu_calls() -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    i64 = torch.int64

    def m(dtype: torch.dtype, *shape: int) -> Any:
        return on_gpu(shape, dtype)

    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64):
        square, rows = m(dtype, 4096, 8192), m(dtype, 32000, 4096)
        calls += [("gather", (m(dtype, 8192, 8192), 1, m(i64, 8192, 8192), False)), ("gather", (square, 0, m(i64, 4096, 8192), False)),
                  ("gather", (m(dtype, 65536, 64), 1, m(torch.int32, 65536, 64), False)), ("index.Tensor", (rows, (m(i64, 8192),))),
                  ("index.Tensor", (m(dtype, 64, 64, 64), (None, m(i64, 50, 1), m(i64, 60)))),
                  ("index.Tensor", (square, (m(torch.bool, 4096, 8192),))), ("index.Tensor", (square, (m(torch.bool, 4096),))),
                  ("scatter.src", (square, 1, m(i64, 4096, 8192), square)), ("scatter_.src", (square, 0, m(i64, 4096, 8192), square)),
                  ("scatter_add", (square, 1, m(i64, 4096, 8192), square)), ("index_add", (rows, 0, m(i64, 8192), m(dtype, 8192, 4096), 1)),
                  ("index_put_", (square, (m(torch.bool, 4096, 8192),), m(dtype), False)), ("nonzero", (square,)),
                  ("masked_select", (square, m(torch.bool, 4096, 8192))), ("masked_scatter", (square, m(torch.bool, 4096, 8192), square)),
                  ("index_reduce_", (square, 0, m(i64, 100), m(dtype, 100, 8192), "prod", True))]
        calls += [("scatter_reduce.two", (square, 1, m(i64, 4096, 8192), square, how, False)) for how in ("mean", "amax")]
    return [*calls, ("repeat_interleave.Tensor", (m(i64, 100000), None)), ("nonzero", (m(torch.bool, 4096, 4096),))]


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_compile_at_gpu_sizes(target: str, tmp_path: Any) -> None:
    calls = gpu_calls() if harness.OPTIONS.full else gpu_calls()[18:36:3]
    if target.startswith("hip") and not EXCHANGES_ON_HIP:
        calls = [(name, args) for name, args in calls if "prod" not in args]
    assert compile_calls(calls, target, tmp_path) >= len(calls)
