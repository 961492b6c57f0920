"""The bindings that stand in for PyTorch's own ops: same overload, same arguments, same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import in_order
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gemsmode import GemsMode, Registry
from gemsmode.native import BINDINGS, computes, is_composite, native, native_in_order
from gemsmode.registry import find_op

X = torch.linspace(-2, 2, 24).reshape(4, 6)
ROW, INDEX, MASK = X[0].clone(), torch.tensor([0, 1]), X > 0
B, C = X.reshape(2, 2, 6), torch.linspace(0, 1, 24).reshape(2, 6, 2)

PATTERNS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "view.default": [((X, [24]), {}), ((X, (2, 12)), {}), ((X, [-1, 2]), {}), ((X[0, 0], []), {}), ((X[:0], [0]), {})],
    "t.default": [((X,), {}), ((ROW,), {}), ((X[0, 0],), {})],
    "transpose.int": [((X, 0, 1), {}), ((X, -1, 0), {}), ((B, 1, 2), {})],
    "permute.default": [((X, [1, 0]), {}), ((B, (2, 0, 1)), {}), ((X[0, 0], []), {})],
    "unsqueeze.default": [((X, 0), {}), ((X, -1), {})],
    "squeeze.default": [((X,), {}), ((X[:1],), {})],
    "squeeze.dim": [((X, 0), {}), ((X[:1], -2), {})],
    "squeeze.dims": [((X[:1], [0, 1]), {}), ((X, []), {}), ((X[:1], (0,)), {})],
    "expand.default": [((X, [2, 4, 6]), {}), ((X[:1], [-1, 6]), {}), ((X[:1], (3, 6)), {"implicit": True}),
                       ((X, [4, 6]), {"implicit": False})],
    "detach.default": [((X,), {})],
    "select.int": [((X, 0, 1), {}), ((X, 1, -1), {})],
    "split.Tensor": [((X, 2), {}), ((X, 4, 1), {}), ((X, 3, -1), {})],
    "split_with_sizes.default": [((X, [1, 3]), {}), ((X, (2, 4), 1), {})],
    "unbind.int": [((X,), {}), ((X, 1), {}), ((X, -1), {})],
    "as_strided.default": [((X, [2, 2], [1, 2]), {}), ((X, (2, 2), (1, 2), 3), {}), ((X, [2], [1], None), {})],
    "unfold.default": [((X, 0, 2, 1), {})],
    "diagonal.default": [((X,), {}), ((X, 1), {}), ((B, 0, 1, 2), {})],
    "mm.default": [((X, X.t()), {})],
    "bmm.default": [((B, C), {})],
    "addmm.default": [((ROW[:4], X, X.t()), {}), ((X[:, :4], X, X.t()), {"beta": 2, "alpha": 0.5}), ((ROW[:4], X, X.t()), {"beta": 0})],
    "baddbmm.default": [((ROW[:2], B, C), {}), ((ROW[:2], B, C), {"beta": 2, "alpha": 0.5})],
    "mv.default": [((X, ROW), {})],
    "dot.default": [((ROW, ROW), {})],
    "convolution.default": [((B, torch.ones(3, 2, 2), None, [1], [0], [1], False, [0], 1), {}),
                            ((B, torch.ones(2, 3, 2), ROW[:3], [2], [1], [1], True, [1], 1), {})],
    "cat.default": [(([X, X],), {}), (([X, X], 1), {}), (((X,), -1), {}), (([X, X[:0]],), {})],
    "stack.default": [(([X, X],), {}), (([X, X], -1), {})],
    "clone.default": [((X,), {}), ((X.t(),), {"memory_format": torch.contiguous_format}),
                      ((X.t(),), {"memory_format": torch.preserve_format})],
    "copy_.default": [((X, X + 1), {}), ((X, ROW, True), {}), ((X, INDEX[:1], False), {})],
    "fill_.Scalar": [((X, 2), {}), ((X, 0.5), {}), ((X, True), {})],
    "zero_.default": [((X,), {})],
    "embedding.default": [((X, INDEX), {}), ((X, INDEX, -1, False, False), {}), ((X, INDEX, 1, True), {})],
    "index_select.default": [((X, 0, INDEX), {}), ((X, -1, INDEX), {})],
    "gather.default": [((X, 0, INDEX[None]), {}), ((X, 1, INDEX[None]), {"sparse_grad": False})],
    "add.Tensor": [((X, X), {}), ((X, 2), {}), ((X, 2.5), {"alpha": 2}), ((X, ROW), {"alpha": -1}), ((INDEX, 1), {"alpha": 1}),
                   ((X, True), {})],
    "sub.Tensor": [((X, X), {}), ((X, 2), {}), ((X, ROW), {"alpha": 0.5})],
    "mul.Tensor": [((X, X), {}), ((X, 2), {}), ((X, -0.5), {}), ((INDEX, True), {})],
    "div.Tensor": [((X, X), {}), ((X, 2), {}), ((INDEX, 2.0), {})],
    "add_.Tensor": [((X, X), {}), ((X, 2), {}), ((X, ROW), {"alpha": 0.5})],
    "mul_.Tensor": [((X, X), {}), ((X, 2), {}), ((X, 0.5), {})],
    "pow.Tensor_Scalar": [((X, 2), {}), ((X, 3.0), {}), ((INDEX, 2), {})],
    "where.self": [((MASK, X, X + 1), {}), ((MASK, X, ROW), {})],
    "masked_fill.Scalar": [((X, MASK, 1.0), {}), ((X, MASK[0], float("-inf")), {}), ((X, MASK, 1), {})],
    "gelu.default": [((X,), {}), ((X,), {"approximate": "tanh"})],
    "sum.default": [((X,), {}), ((X,), {"dtype": torch.float64})],
    "sum.dim_IntList": [((X, [1]), {}), ((X, (0, -1), True), {}), ((X, None), {}), ((X, [0]), {"dtype": torch.float64}), ((X, []), {})],
    "mean.dim": [((X, [1]), {}), ((X, (0, -1), True), {}), ((X, None), {}), ((X, [0], False), {"dtype": torch.float64})],
    "_softmax.default": [((X, 1, False), {}), ((X, -1, False), {})],
    "_log_softmax.default": [((X, 1, False), {}), ((X, -1, False), {})],
    "_softmax_backward_data.default": [((X, X, 1, torch.float32), {})],
    "native_layer_norm.default": [((X, [6], ROW, ROW, 1e-5), {}), ((X, (6,), None, None, 1e-6), {}), ((X, [4, 6], X, None, 0.1), {})],
} | {f"{name}.default": [((X.abs() + 0.5,), {}), ((X[:0],), {}), ((X[0, 0],), {}), ((X.t(),), {})]
     for name in ("neg", "exp", "sqrt", "rsqrt", "cos", "sin", "tanh", "sigmoid", "relu", "silu")}


class Recording(TorchDispatchMode):
    """Writes down the calls it sees, arguments in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, in_order(func, args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def record(context: Any, function: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
    with context(), Recording() as recording:
        result = function(*args, **kwargs)
    # What was written in place is kept as it is now; views are compared as views.
    return tree_map(lambda t: t.clone() if any(t is a for a in args) else t, result), recording.calls


def plain(value: Any) -> Any:
    """Arguments made comparable: tensors by identity, lists as tuples, numbers with their type."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return type(value), value


def test_every_binding_has_patterns() -> None:
    assert {f"aten.{name}" for name in PATTERNS} == set(BINDINGS)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("how", ["as called", "in order"])
def test_a_binding_dispatches_to_its_overload(name: str, context: Any, how: str) -> None:
    op = find_op(name)
    writes = op._schema.is_mutable
    for args, kwargs in PATTERNS[name]:
        if writes:
            args = (args[0].clone(), *args[1:])

        assert native(op) is BINDINGS[str(op)]
        before = args[0].clone() if writes else None
        if how == "as called":
            got, calls = record(context, native(op), args, kwargs)
        else:
            got, calls = record(context, native_in_order(op), in_order(op, args, kwargs), {})
        if writes:
            args[0].copy_(before)
        expected, expected_calls = record(context, op, args, kwargs)
        assert [c[0] for c in calls] == [op], f"{name}{args}{kwargs}"
        assert [plain(a) for a in calls[0][1]] == [plain(a) for a in expected_calls[0][1]], f"{name}{args}{kwargs}"
        for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            torch.testing.assert_close(a, b, equal_nan=True)
        assert isinstance(got, torch.Tensor) == isinstance(expected, torch.Tensor)


def test_views_are_views_and_autograd_knows_them(device: str) -> None:
    base = torch.ones(4, 6, device=device).requires_grad_()
    with GemsMode(registry=Registry("none")):
        x = base * 1
        views = [x.view(24), x.t(), x.unsqueeze(0), x.expand(2, 4, 6), x[1], x[:, 1:3], x.split(2)[0], x.unbind(1)[0], x.permute(1, 0),
                 x.diagonal(), x.as_strided((2, 2), (1, 2)), x.squeeze(), x.unfold(0, 2, 1), x.detach(), x.split([1, 3])[1]]
        for view in views:
            assert view._is_view() or not view.requires_grad
            assert view.data_ptr() - x.data_ptr() < 96
        views[0].mul_(2)
        assert views[1]._version == x._version == 1
        views[0].sum().backward()
    assert base.grad is not None and base.grad.eq(2).all()


def test_errors_are_pytorchs_own(device: str) -> None:
    x = torch.ones(4, 6, device=device)
    for function in (lambda: x.view(5, 5), lambda: x.transpose(0, 5), lambda: torch.mm(x, x), lambda: torch.cat([x, x[0]]),
                     lambda: x.expand(3, 3), lambda: x.split(-1), lambda: torch.bmm(x, x), lambda: x.select(0, 9)):
        texts = []
        for registry in (None, Registry("none")):
            with pytest.raises((RuntimeError, IndexError)) as raised:
                if registry is None:
                    function()
                else:
                    with GemsMode(registry=registry):
                        function()
            texts.append((type(raised.value), str(raised.value).splitlines()[0]))
        assert texts[0] == texts[1]


def test_what_computes_and_what_does_not() -> None:
    for name in ("mm", "add.Tensor", "copy_", "clone", "cat", "zeros_like", "fill_.Scalar", "_to_copy", "arange"):
        assert computes(find_op(name)), name
    for name in ("view", "t", "slice.Tensor", "detach", "detach_", "empty.memory_format", "empty_like", "_local_scalar_dense", "alias",
                 "as_strided", "unbind.int", "squeeze_.dim", "new_empty", "resize_", "lift_fresh", "is_pinned", "_unsafe_view"):
        assert not computes(find_op(name)), name
    assert computes(torch.ops.higher_order.cond)


def test_composites() -> None:
    for name in ("linear", "matmul", "softmax.int", "layer_norm", "dropout", "scaled_dot_product_attention", "to.dtype", "reshape",
                 "contiguous", "cross_entropy_loss", "chunk", "einsum", "conv2d"):
        assert is_composite(find_op(name)), name
    for name in ("mm", "add.Tensor", "_softmax", "native_layer_norm", "view", "ones_like", "_to_copy"):
        assert not is_composite(find_op(name)), name
