"""In-place, ``out=`` and scalar calls of functional rules have PyTorch's semantics.

:func:`same` runs a piece of code natively and under a strict mode on copies of its tensors, and compares the results,
the tensors afterwards with all the memory around them, and the version counters; or the errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support import decision, skip_without_cuda
from torch.utils._pytree import tree_leaves

from gemsmode import Call, GemsMode, Registry, rule
from gemsmode.plan import Alloc, Arg, Decline, Into, Launch, Out, Plan, contiguous_strides
from gemsmode.registry import planned

# -- rules for these tests: kinds of plans that the pointwise family has not -------------------------------------------


@triton.jit
def running_sum_kernel(p_out, p_in, n, stride, BLOCK: tl.constexpr):
    i_row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    total = tl.cumsum(tl.load(p_in + i_row * stride + o, mask=o < n, other=0).to(tl.float32))
    tl.store(p_out + i_row * n + o, total.to(p_out.dtype.element_ty), mask=o < n)


@triton.jit
def two_results_kernel(p_half, p_exponent, p_in, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_in + o, mask=o < n, other=0)
    tl.store(p_half + o, x * 0.5, mask=o < n)
    tl.store(p_exponent + o, tl.full([BLOCK], 1, tl.int32), mask=o < n)


local = Registry("variants")


@planned("aten.cumsum.default", family="test", registry=local)
def running_sum(call: Call) -> Plan:
    """A sum along the last of two dimensions: what it writes depends on more than one element it reads."""
    x, dim, as_dtype = call.args
    if x.ndim != 2 or dim not in (1, -1) or x.stride[1] != 1:
        raise Decline("not along the rows of a matrix")
    dtype = as_dtype or (x.dtype if x.dtype.is_floating_point else torch.int64)
    rows, n = x.shape
    launch = Launch(running_sum_kernel, (rows, 1, 1), (Out(0), Arg(0), n, x.stride[0]), (("BLOCK", max(triton.next_power_of_2(n), 2)),))
    return Plan((Alloc(x.shape, contiguous_strides(x.shape), dtype),), (launch,) if rows * n else (), Out(0), {Arg(0): x})


@planned("aten.frexp.Tensor", family="test", registry=local)
def halves(call: Call) -> Plan:
    """Two results. The mantissas are those of numbers from 1 to 2 only."""
    (x,) = call.args
    if not x.is_contiguous:
        raise Decline("not contiguous")
    launch = Launch(two_results_kernel, (triton.cdiv(x.numel, 256), 1, 1), (Out(0), Out(1), Arg(0), x.numel), (("BLOCK", 256),))
    return Plan((Alloc(x.shape, x.stride, x.dtype), Alloc(x.shape, x.stride, torch.int32)), (launch,), (Out(0), Out(1)), {Arg(0): x},
                elementwise=True)


simple = Registry("simple")


@rule("aten.add.Tensor", registry=simple, numbers=True)
def simple_add(a: torch.Tensor, b: Any, alpha: float = 1) -> torch.Tensor:
    return torch.add(a, b, alpha=alpha)


@rule("aten.exp.default", registry=simple)
def simple_exp(a: torch.Tensor) -> torch.Tensor:
    return torch.exp(a)


@rule("aten.cumsum.default", registry=simple)
def simple_cumsum(a: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.cumsum(a, dim, dtype=dtype)


@rule("aten.frexp.Tensor", registry=simple)
def simple_frexp(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.frexp(a)


MODES = {"planned": lambda: GemsMode(strict=True), "simple": lambda: GemsMode(strict=True, registry=simple)}


# -- the comparison ----------------------------------------------------------------------------------------------------


def bases(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Copies that share memory as the tensors do: one copy of each storage, the same views of it."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies = []
    for t in tensors:
        storage = t.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        copies.append(torch.empty(0, dtype=t.dtype, device=t.device).set_(
            storages[storage._cdata], t.storage_offset(), t.shape, t.stride()))  # type: ignore[call-overload]
    return copies


def attempt(function: Callable[..., Any], tensors: list[torch.Tensor]) -> tuple[Any, Exception | None, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return function(*tensors), None, [str(w.message) for w in caught]
        except Exception as error:
            return None, error, [str(w.message) for w in caught]


def same(function: Callable[..., Any], *tensors: torch.Tensor, mode: GemsMode | None = None) -> Any:
    """Run ``function`` on copies of ``tensors`` natively and under ``mode``: all that can be seen of it must be the same."""
    mine, theirs = bases(tensors), bases(tensors)
    expected, error, warned = attempt(function, theirs)
    with mode or GemsMode(strict=True):
        got, my_error, my_warned = attempt(function, mine)
    if error is not None:
        assert type(my_error) is type(error), f"PyTorch: {error!r}, here: {my_error!r}"
        assert str(my_error).splitlines()[0] == str(error).splitlines()[0]
    elif my_error is not None:
        raise my_error
    assert len(my_warned) == len(warned), (my_warned, warned)
    for mine_text, their_text in zip(my_warned, warned):
        assert mine_text[:60] == their_text[:60]
    results = [[t for t in tree_leaves(r) if isinstance(t, torch.Tensor)] for r in (got, expected)]
    for a, b in zip(*results, strict=True):
        assert (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())
        torch.testing.assert_close(a, b, equal_nan=True)
        assert [a is t for t in mine] == [b is t for t in theirs], "not the tensor that PyTorch returns"
    for a, b in zip(mine, theirs):
        assert (a.shape, a.stride(), a._version) == (b.shape, b.stride(), b._version)
        raw_a, raw_b = (t.untyped_storage().cpu() for t in (a, b))
        assert raw_a.nbytes() == raw_b.nbytes()
        memory = [torch.empty(0, dtype=a.dtype).set_(raw) for raw in (raw_a, raw_b)]  # type: ignore[call-overload]
        torch.testing.assert_close(*memory, equal_nan=True)
    return error


@pytest.fixture(params=["planned", "simple"])
def mode(request: pytest.FixtureRequest) -> GemsMode:
    return MODES[request.param]()


@pytest.fixture
def matrix(device: str) -> torch.Tensor:
    """A matrix inside a larger one: the memory around it must not change."""
    return torch.linspace(-2, 2, 80, device=device).reshape(8, 10)[1:7, 2:8]


def grid(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n = 1
    for size in shape:
        n *= size
    return torch.linspace(-3, 3, n, device=device).reshape(shape).to(dtype)


# -- in-place ----------------------------------------------------------------------------------------------------------

IN_PLACE: dict[str, Callable[..., Any]] = {
    "exp_": lambda a, b: a.exp_(),
    "neg_": lambda a, b: a.neg_(),
    "silu_": lambda a, b: torch.nn.functional.silu(a, inplace=True),
    "add_": lambda a, b: a.add_(b),
    "add_ number": lambda a, b: a.add_(2),
    "add_ float": lambda a, b: a.add_(0.5),
    "add_ alpha": lambda a, b: a.add_(b, alpha=2.5),
    "add_.Scalar": lambda a, b: torch.ops.aten.add_.Scalar(a, 2, 3),
    "iadd": lambda a, b: a.__iadd__(b),
    "eq_": lambda a, b: a.eq_(b),
    "eq_ number": lambda a, b: a.eq_(2),
    "itself": lambda a, b: a.add_(a),
    "view": lambda a, b: a[1:3].add_(b[1:3]),
    "column": lambda a, b: a[:, 1].exp_(),
    "transposed": lambda a, b: a.t().add_(b.t()),
    "transposed both ways": lambda a, b: a.t().add_(b[:, :6].reshape(6, 6)),
    "strided": lambda a, b: a[::2, 1::2].neg_(),
    "rows of itself": lambda a, b: a[::2].add_(a[1::2]),
    "broadcast": lambda a, b: a.add_(b[0]),
    "broadcast column": lambda a, b: a.add_(b[:, :1]),
    "setitem": lambda a, b: a.__setitem__(slice(2), a[:2] + b[:2]),
    "empty": lambda a, b: a[:0].add_(b[:0]),
    "element": lambda a, b: a[0, 0].exp_(),
    "twice": lambda a, b: a.exp_().add_(b),
    "int operand": lambda a, b: a.add_(b.to(torch.int64)),
    "half operand": lambda a, b: a.add_(b.half()),
    "0-dim operand of higher type": lambda a, b: a.add_(b[0, 0].double()),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(mode: GemsMode, matrix: torch.Tensor, device: str, name: str) -> None:
    assert same(IN_PLACE[name], matrix, grid(6, 6, device=device), mode=mode) is None


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_half(matrix: torch.Tensor, device: str, name: str) -> None:
    assert same(IN_PLACE[name], matrix.half(), grid(6, 6, device=device).half()) is None


def test_in_place_calls_are_intercepted(matrix: torch.Tensor) -> None:
    for make in MODES.values():
        mode = make()
        assert decision(mode, "exp_", matrix).kind == "rule"
        assert decision(mode, "add_.Tensor", matrix, matrix[0]).kind == "rule"
        assert decision(mode, "add_.Tensor", matrix, 2).kind == "rule"
        assert decision(mode, "add_.Scalar", matrix, 2, 3).kind == "rule"
    for op, args in (("eq_.Scalar", (2,)), ("eq_.Tensor", (matrix,)), ("neg_", ()), ("silu_", ())):
        assert decision(GemsMode(), op, matrix, *args).kind == "rule"


def test_in_place_widens_and_narrows(mode: GemsMode, device: str) -> None:
    for mine in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8):
        for other in (torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool):
            a = torch.arange(1, 7, device=device).to(mine)
            b = torch.arange(6, device=device).to(other)
            same(lambda a, b: a.add_(b), a, b, mode=mode)
            same(lambda a, b: a.add_(b, alpha=2), a, b, mode=mode)


REFUSED: dict[str, Callable[..., Any]] = {
    "float into int": lambda a, b: a.int().add_(2.5),
    "float tensor into int": lambda a, b: a.long().add_(b),
    "int into bool": lambda a, b: a.bool().add_(2),
    "too large": lambda a, b: a[0].add_(b),
    "shapes": lambda a, b: a.add_(b[:, :4]),
    "shifted": lambda a, b: b[1:].add_(b[:-1]),
    "transposed itself": lambda a, b: b.add_(b.t()),
    "expanded": lambda a, b: a[:1].expand(6, 6).add_(1),
    "expanded exp_": lambda a, b: a[0, 0].expand(3).exp_(),
    "exp_ of ints": lambda a, b: a.int().exp_(),
    "float alpha": lambda a, b: a.int().add_(b.int(), alpha=0.5),
    "bool alpha": lambda a, b: a.add_(b, alpha=True),
}


SHARED: dict[str, Callable[..., Any]] = {
    "shifted": lambda a, b: a[1:].add_(a[:-1]),
    "shifted rows": lambda a, b: a[::2, 1:].add_(a[::2, :-1]),
    "transposed itself": lambda a, b: a.add_(a.t()),
    "shifted out": lambda a, b: torch.exp(a[1:], out=a[:-1]),
    "transposed out": lambda a, b: torch.exp(a, out=a.t()),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory_that_pytorch_does_not_refuse(mode: GemsMode, matrix: torch.Tensor, device: str, name: str) -> None:
    """It looks for overlap among dense tensors only; what it computes elsewhere is its own affair, and it computes it."""
    assert same(SHARED[name], matrix, grid(6, 6, device=device), mode=mode) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_in_place(mode: GemsMode, matrix: torch.Tensor, device: str, name: str) -> None:
    assert same(REFUSED[name], matrix, grid(6, 6, device=device), mode=mode) is not None


def test_inference_tensors(matrix: torch.Tensor) -> None:
    with torch.inference_mode():
        inference = matrix.clone()
    with GemsMode(strict=True):
        with torch.inference_mode():
            got = inference.clone().exp_()
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            inference.exp_()
    torch.testing.assert_close(got.clone(), matrix.exp())


# -- versions and autograd ---------------------------------------------------------------------------------------------


def test_version_counters(mode: GemsMode, matrix: torch.Tensor) -> None:
    a, out = matrix.clone(), torch.empty_like(matrix)
    view = a[1:3]
    with mode:
        a.add_(1)
        assert (a._version, view._version) == (1, 1)
        view.exp_()
        assert (a._version, view._version) == (2, 2)
        a.add(1)
        assert a._version == 2
        torch.exp(a, out=out)
        assert (a._version, out._version) == (2, 1)
        with torch.no_grad():
            a.exp_()
        assert a._version == 3


def test_autograd_sees_what_was_written(mode: GemsMode, matrix: torch.Tensor) -> None:
    x = matrix.clone().requires_grad_()
    with mode:
        y = x.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        y = x * 2
        y[:, 0].add_(x[:, 1])
        y[1:3].exp_()
        y.sum().backward()
    got = x.grad.clone()
    x.grad = None
    y = x * 2
    y[:, 0].add_(x[:, 1])
    y[1:3].exp_()
    y.sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_leaves_may_not_be_written(mode: GemsMode, matrix: torch.Tensor) -> None:
    x = matrix.clone().requires_grad_()
    with mode:
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            x.exp_()
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            torch.exp(x, out=torch.empty_like(x))
        with torch.no_grad():
            x.exp_()
    torch.testing.assert_close(x.detach(), matrix.exp())


def test_copy_on_write(mode: GemsMode, matrix: torch.Tensor) -> None:
    first = matrix.clone()
    second = torch._lazy_clone(first)
    with mode:
        second.add_(1)
    torch.testing.assert_close(first, matrix)
    torch.testing.assert_close(second, matrix + 1)
    third = torch._lazy_clone(first)
    with mode:
        first.exp_()
    torch.testing.assert_close(third, matrix)


# -- out= --------------------------------------------------------------------------------------------------------------

OUT: dict[str, Callable[..., Any]] = {
    "fits": lambda a, b, o: torch.exp(a, out=o),
    "add": lambda a, b, o: torch.add(a, b, out=o),
    "add number": lambda a, b, o: torch.add(a, 2, out=o),
    "add alpha": lambda a, b, o: torch.add(a, b, alpha=2.5, out=o),
    "view": lambda a, b, o: torch.exp(a[:3], out=o[1:4]),
    "column": lambda a, b, o: torch.exp(a[:, 0], out=o[:, 3]),
    "transposed": lambda a, b, o: torch.add(a, b, out=o.t()),
    "an operand": lambda a, b, o: torch.add(a, b, out=b),
    "itself": lambda a, b, o: torch.exp(a, out=a),
    "new": lambda a, b, o: torch.exp(a, out=a.new_empty(0)),
    "new of broadcast": lambda a, b, o: torch.add(a[:1], b[:, :1], out=a.new_empty(0)),
    "new of transposed": lambda a, b, o: torch.add(a.t(), b.t(), out=a.new_empty(0)),
    "wider": lambda a, b, o: torch.exp(a, out=o.double()),
    "narrower": lambda a, b, o: torch.add(a, b, out=o.half()),
    "int result": lambda a, b, o: torch.add(a.int(), b.int(), out=o),
    "bool result": lambda a, b, o: torch.eq(a, b, out=o),
    "new and wider": lambda a, b, o: torch.exp(a, out=torch.empty(0, dtype=torch.float64, device=a.device)),
    "resized": lambda a, b, o: torch.exp(a[:2], out=o.clone()),
    "resized to more": lambda a, b, o: torch.add(a, b, out=o[0].clone()),
    "resized view": lambda a, b, o: torch.exp(a[:2, :3], out=o),
    "resized of transposed": lambda a, b, o: torch.exp(a.t()[:4], out=o.clone()),
    "dimensions of one": lambda a, b, o: torch.exp(a[:, :1], out=o[:, 0].clone()),
    "empty": lambda a, b, o: torch.exp(a[:0], out=o[:0]),
    "empty into full": lambda a, b, o: torch.exp(a[:0], out=o.clone()),
    "overload": lambda a, b, o: torch.ops.aten.add.out(a, b, alpha=3, out=o),
    "eq.Scalar_out": lambda a, b, o: torch.eq(a, 2, out=o),
}


@pytest.mark.parametrize("name", OUT)
def test_out(mode: GemsMode, matrix: torch.Tensor, device: str, name: str) -> None:
    assert same(OUT[name], matrix, grid(6, 6, device=device), grid(6, 6, device=device), mode=mode) is None


def test_out_calls_are_intercepted(mode: GemsMode, matrix: torch.Tensor) -> None:
    for out in (torch.empty_like(matrix), matrix.new_empty(0), matrix.new_empty(2, 2), matrix.t().double().contiguous().t()):
        assert decision(mode, "exp.out", matrix, out=out).kind == "rule"
        assert decision(mode, "add.out", matrix, matrix, out=out).kind == "rule"
    assert decision(GemsMode(), "eq.Scalar_out", matrix, 2, out=matrix.clone()).kind == "rule"
    assert decision(GemsMode(), "eq.Tensor_out", matrix, matrix, out=matrix.clone()).kind == "rule"


def test_out_keeps_the_memory_format_that_it_has(mode: GemsMode, device: str) -> None:
    a = grid(2, 3, 4, 5, device=device)
    last = a.contiguous(memory_format=torch.channels_last)
    for x, out in ((a, last), (last, a), (last, torch.empty(0, device=device)), (last, last[:1])):
        assert same(lambda x, o: torch.exp(x, out=o), x, out.clone(), mode=mode) is None
        assert same(lambda x, o: torch.add(x, x, out=o), x, out.clone(), mode=mode) is None


REFUSED_OUT: dict[str, Callable[..., Any]] = {
    "float into int": lambda a, b, o: torch.exp(a, out=o.int()),
    "float into bool": lambda a, b, o: torch.add(a, b, out=o.bool()),
    "int into bool": lambda a, b, o: torch.add(a.int(), b.int(), out=o.bool()),
    "shifted": lambda a, b, o: torch.exp(b[1:], out=b[:-1]),
    "shifted operand": lambda a, b, o: torch.add(a[1:], b[1:], out=b[:-1]),
    "transposed": lambda a, b, o: torch.exp(b, out=b.t()),
    "expanded": lambda a, b, o: torch.exp(a, out=o[:1].expand(6, 6)),
    "shapes": lambda a, b, o: torch.add(a, b[:, :4], out=o),
    "another device": lambda a, b, o: torch.exp(a, out=torch.empty(6, 6, device="meta")),
}


@pytest.mark.parametrize("name", REFUSED_OUT)
def test_what_pytorch_refuses_of_out(mode: GemsMode, matrix: torch.Tensor, device: str, name: str) -> None:
    assert same(REFUSED_OUT[name], matrix, grid(6, 6, device=device), grid(6, 6, device=device), mode=mode) is not None


def test_overlapping_memory_of_another_dtype(mode: GemsMode, device: str) -> None:
    """The result is copied into ``out`` then, and memory that is shared must still not go unnoticed."""
    a = torch.zeros(8, dtype=torch.int32, device=device)
    same(lambda a: torch.add(a[:6], 1, out=a[2:].view(torch.float32)), a, mode=mode)
    same(lambda a: a[2:].view(torch.float32).add_(a[:6]), a, mode=mode)
    same(lambda a: a.view(torch.float32).add_(a), a, mode=mode)


# -- scalars -----------------------------------------------------------------------------------------------------------

SCALARS: dict[str, Callable[..., Any]] = {
    "add.Scalar": lambda a: torch.ops.aten.add.Scalar(a, 2, 3),
    "add.Tensor": lambda a: a + 2,
    "radd": lambda a: 2.5 + a,
    "eq.Scalar": lambda a: a == 1,
    "eq.Scalar float": lambda a: a == 1.5,
    "eq.Scalar bool": lambda a: a == True,  # noqa: E712
    "0-dim tensor": lambda a: a + torch.tensor(2.5, dtype=torch.float64),
    "0-dim tensor first": lambda a: torch.tensor(3) + a,
    "nan": lambda a: a + float("nan"),
    "inf": lambda a: a == float("inf"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("name", SCALARS)
def test_scalars(device: str, name: str, dtype: torch.dtype) -> None:
    assert same(SCALARS[name], grid(3, 5, device=device, dtype=dtype)) is None


def test_scalar_overloads_are_intercepted(matrix: torch.Tensor) -> None:
    mode = GemsMode()
    assert decision(mode, "add.Scalar", matrix, 2, 3).kind == "rule"
    assert decision(mode, "eq.Scalar", matrix, 1).kind == "rule"
    one = torch.tensor(1.0)
    assert decision(mode, "add.Tensor", matrix, one).kind == "rule"


def test_numbers_are_arguments_of_the_run_not_of_the_decision(matrix: torch.Tensor) -> None:
    mode = GemsMode(strict=True)
    handler = mode.policy.handler(torch.ops.aten.add.Tensor)
    before = len(handler.decided)
    with mode:
        results = [matrix + n for n in (1, 2, 16, 10**6, -3)]
        results += [matrix + float(n) for n in (1, 2, 16, 10**6, -3)]
    assert len(handler.decided) - before <= 2
    for got, n in zip(results, (1, 2, 16, 10**6, -3) * 2):
        torch.testing.assert_close(got, matrix + n)


# -- plans that are not elementwise, and several results ---------------------------------------------------------------


@pytest.fixture(params=["planned", "simple"])
def other_mode(request: pytest.FixtureRequest) -> GemsMode:
    return GemsMode(strict=True, registry=local if request.param == "planned" else simple)


CUMSUM: dict[str, Callable[..., Any]] = {
    "functional": lambda a, o: torch.cumsum(a, 1),
    "in-place": lambda a, o: a.cumsum_(1),
    "in-place through a view": lambda a, o: a[1:3].cumsum_(1),
    "out": lambda a, o: torch.cumsum(a, 1, out=o),
    "out of other strides": lambda a, o: torch.cumsum(a, 1, out=o.t()),
    "out of another dtype": lambda a, o: torch.cumsum(a, 1, dtype=torch.float64, out=o.double()),
    "new out": lambda a, o: torch.cumsum(a, 1, out=a.new_empty(0)),
    "resized out": lambda a, o: torch.cumsum(a, 1, out=o[0].clone()),
    "empty": lambda a, o: torch.cumsum(a[:0], 1, out=o[:0]),
}


@pytest.mark.parametrize("name", CUMSUM)
def test_running_sum(other_mode: GemsMode, device: str, name: str) -> None:
    assert same(CUMSUM[name], grid(4, 4, device=device), grid(4, 4, device=device), mode=other_mode) is None


def test_running_sum_out_of_shared_memory(other_mode: GemsMode, device: str) -> None:
    same(lambda a: torch.cumsum(a, 1, out=a), grid(4, 4, device=device), mode=other_mode)
    a = grid(4, 4, device=device)
    assert decision(other_mode, "cumsum.out", a, 1, out=a).kind == "rule"
    assert decision(other_mode, "cumsum_", a, 1).kind == "rule"


FREXP: dict[str, Callable[..., Any]] = {
    "functional": lambda a, m, e: torch.frexp(a),
    "out": lambda a, m, e: torch.frexp(a, out=(m, e)),
    "one transposed": lambda a, m, e: torch.frexp(a, out=(m.t(), e)),
    "one is the operand": lambda a, m, e: torch.frexp(a, out=(a, e)),
    "new": lambda a, m, e: torch.frexp(a, out=(m.new_empty(0), e.new_empty(0))),
    "one resized": lambda a, m, e: torch.frexp(a, out=(m, e[0].clone())),
}


@pytest.mark.parametrize("name", FREXP)
def test_several_results(other_mode: GemsMode, device: str, name: str) -> None:
    a = 1 + torch.rand(4, 4, device=device) * 0.9
    outs = torch.zeros(4, 4, device=device), torch.zeros(4, 4, dtype=torch.int32, device=device)
    assert same(FREXP[name], a, *outs, mode=other_mode) is None
    assert decision(other_mode, "frexp.Tensor_out", a, mantissa=outs[0], exponent=outs[1]).kind == "rule"


def test_two_results_in_one_memory(other_mode: GemsMode, device: str) -> None:
    """PyTorch looks at each result's memory against the operands, and so do we; two results in one place are its own affair."""
    memory = torch.zeros(16, device=device)
    a = 1 + torch.rand(4, 4, device=device) * 0.9
    mine = memory.clone()
    with other_mode:
        torch.frexp(a, out=(mine.view(4, 4), mine.view(torch.int32).view(4, 4)))
    theirs = memory.clone()
    torch.frexp(a, out=(theirs.view(4, 4), theirs.view(torch.int32).view(4, 4)))
    assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


# -- simple rules ------------------------------------------------------------------------------------------------------


def test_a_simple_rule_is_called_as_people_call_the_op(device: str) -> None:
    registry, seen = Registry("calls"), []

    @rule(["aten.add.Tensor", "aten.sum.dim_IntList", "aten.cumsum.default"], registry=registry, numbers=True)
    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((tuple(a if not isinstance(a, torch.Tensor) else "tensor" for a in args), kwargs))
        return torch.zeros(3, device=device)

    x = torch.ones(3, device=device)
    with GemsMode(registry=registry, strict=True):
        x + x
        x + 2
        torch.add(x, x, alpha=2)
        torch.sum(x, 0)
        torch.sum(x, 0, keepdim=True, dtype=torch.float64)
        torch.cumsum(x, 0, dtype=torch.float32)
        x.add_(1, alpha=3)
    assert seen == [(("tensor", "tensor"), {}), (("tensor", 2), {}), (("tensor", "tensor"), {"alpha": 2}), (("tensor", [0]), {}),
                    (("tensor", [0], True), {"dtype": torch.float64}), (("tensor", 0), {"dtype": torch.float32}),
                    (("tensor", 1), {"alpha": 3})]
    assert torch.equal(x, torch.zeros(3, device=device))


def test_a_simple_rule_is_not_given_numbers_for_tensors_unless_it_asks(device: str) -> None:
    registry = Registry("tensors only")

    @rule("aten.add.Tensor", registry=registry)
    def add(a: torch.Tensor, b: torch.Tensor, *, alpha: float = 1) -> torch.Tensor:
        assert isinstance(b, torch.Tensor)
        return a - b

    x = torch.ones(3, device=device)
    mode = GemsMode(registry=registry, strict=True)
    with mode:
        results = x + x, x + 2
    assert [r[0].item() for r in results] == [0, 3]
    assert decision(mode, "add.Tensor", x, 2).reason == "a Python number in a tensor's place; a rule made with numbers=True takes it"


def test_an_in_place_rule_need_not_return_what_it_wrote(device: str) -> None:
    registry = Registry("in-place")

    @rule("aten.exp_.default", registry=registry)
    def exp_(x: torch.Tensor) -> None:
        x.fill_(7)

    x = torch.ones(3, device=device)
    with GemsMode(registry=registry, strict=True):
        assert x.exp_() is x
    assert x.tolist() == [7, 7, 7]


# -- planners that write to what they are given ------------------------------------------------------------------------


def test_writes_out_gives_the_planner_the_tensors_to_write(device: str) -> None:
    registry, seen = Registry("writes out"), []

    @triton.jit
    def fill_kernel(p_out, n, step, BLOCK: tl.constexpr):
        o = tl.arange(0, BLOCK)
        tl.store(p_out + o * step, tl.full([BLOCK], 5.0, tl.float32), mask=o < n)

    @planned("aten.exp.default", family="test", writes_out=True, registry=registry)
    def fives(call: Call) -> Plan:
        (x,) = call.args
        seen.append((call.outs, call.inplace))
        if call.outs is None:
            out, allocs, step = Out(0), (Alloc(x.shape, contiguous_strides(x.shape), x.dtype),), 1
        else:
            out, allocs, step = Into(0), (), call.outs[0].stride[0]
        launch = Launch(fill_kernel, (1, 1, 1), (out, x.numel, step), (("BLOCK", 16),))
        return Plan(allocs, (launch,), out, {Arg(0): x}, elementwise=True)

    x = torch.zeros(5, device=device)
    out = torch.zeros(10, device=device)
    with GemsMode(registry=registry, strict=True):
        torch.exp(x, out=out[::2])
    assert out.tolist() == [5, 0] * 5
    assert [s[0] is None for s in seen] == [True, False] and seen[1][0][0].stride == (2,) and not seen[1][1]


# -- a CPU scalar beside GPU tensors -----------------------------------------------------------------------------------


def test_cpu_scalars_beside_gpu_tensors(device: str) -> None:
    skip_without_cuda(device)
    x, one = torch.ones(4, device="cuda"), torch.tensor(1.0)
    for function in (lambda x, one: x + one, lambda x, one: one + x, lambda x, one: x.add_(one), lambda x, one: one == x,
                     lambda x, one: torch.add(x, one, out=torch.empty_like(x)), lambda x, one: one.add_(x), lambda x, one: one + one,
                     lambda x, one: torch.add(x, x, out=one), lambda x, one: x + one.double()):
        same(function, x, one)
