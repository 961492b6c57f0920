"""Indexing: values, layouts, out-of-range indices; embedding's gradient against float64."""

from __future__ import annotations

import pytest
import torch

from gemsmode import GemsMode
from gemsmode.target import current

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
