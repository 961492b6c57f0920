"""The mode beside the rest of PyTorch: tensor subclasses, fake and functorch tensors, exotic layouts and devices,
`torch.compile`, checkpointing, gradcheck, copying and saving, other modes, autocast, processes, streams, graphs, GPUs."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import Counting, Spy, decision, skip_without_cuda, stack
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gemsmode
from gemsmode import GemsMode, Registry, rule


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.linspace(-2, 2, 12, device=device).reshape(3, 4)


@pytest.fixture
def spy() -> Spy:
    return Spy("aten.exp.default", "aten.add.Tensor", "aten.mul.Tensor")


@pytest.fixture
def mode() -> GemsMode:
    return GemsMode(strict=True)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    yield
    assert stack() == []


def calls_of(gems: GemsMode) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in gems.report.to_dict()["ops"]:
        if row["decision"] == "rule":
            counts[row["overload"]] = counts.get(row["overload"], 0) + row["calls"]
    return counts


# -- tensor subclasses -------------------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A wrapper subclass: its calls are made on the plain tensor inside."""

    inner: torch.Tensor
    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
                                                   requires_grad=inner.requires_grad)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Wrapper({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Wrapper.seen.append(str(func))
        unwrapped = tree_map(lambda t: t.inner if isinstance(t, Wrapper) else t, (args, kwargs or {}))
        result = tree_map(lambda t: Wrapper(t) if isinstance(t, torch.Tensor) else t, func(*unwrapped[0], **unwrapped[1]))
        return return_and_correct_aliasing(func, args, kwargs or {}, result)


def test_a_wrapper_subclass_hands_its_inner_tensors_to_the_mode(x: torch.Tensor) -> None:
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        Wrapper.seen.clear()
        w = Wrapper(x.clone())
        with context(), GemsMode(trace=True) as gems:
            y = torch.exp(w + w)
            y.add_(1)
            z = torch.nn.functional.linear(w, torch.ones(2, 4, device=x.device))
        assert type(y) is type(z) is Wrapper
        torch.testing.assert_close(y.inner, torch.exp(x + x) + 1)
        assert {"aten.add.Tensor", "aten.exp.default", "aten.add_.Tensor"} <= set(Wrapper.seen)
        counts = calls_of(gems)
        assert (counts["aten.add.Tensor"], counts["aten.exp.default"], counts["aten.add_.Tensor"]) == (1, 1, 1)


def test_a_wrapper_subclass_trains(x: torch.Tensor) -> None:
    def gradient() -> torch.Tensor:
        w = Wrapper(x.clone()).requires_grad_()
        (torch.exp(w) + w).sum().backward()
        return w.grad.inner  # type: ignore[union-attr]

    expected = gradient()
    with GemsMode(strict=True):
        got = gradient()
    torch.testing.assert_close(got, expected)


class Named(torch.Tensor):
    """A subclass that only has `__torch_function__`; below it is a plain tensor."""

    functions = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Named.functions += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_with_torch_function_alone_is_plain_below(x: torch.Tensor, spy: Spy) -> None:
    def run() -> tuple[torch.Tensor, int]:
        Named.functions = 0
        n = x.clone().as_subclass(Named)
        m = n.t().exp() + n.view(4, 3)
        n.add_(1)
        return m, Named.functions

    expected, functions = run()
    with GemsMode(registry=spy.registry, strict=True):
        got, seen = run()
    assert type(got) is Named and seen == functions
    assert spy.take() == ["aten.exp.default", "aten.add.Tensor", "aten.add.Tensor"]
    with GemsMode(strict=True):
        got, seen = run()
    assert type(got) is Named and seen == functions
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_torch_function_modes_see_what_they_saw(x: torch.Tensor) -> None:
    class Functions(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    def run(functions: Functions) -> None:
        with functions:
            leaf = x.clone().requires_grad_()
            (leaf.t().exp() @ leaf).sum().backward()

    native, under, registry = Functions(), Functions(), Registry("none")
    run(native)
    with GemsMode(registry=registry):
        run(under)
    assert under.names == native.names
    with torch.device("meta"), GemsMode():
        assert torch.zeros(3).exp().device.type == "meta"


def test_parameters_and_buffers_are_plain(x: torch.Tensor) -> None:
    parameter = nn.Parameter(x.clone())
    with GemsMode(trace=True) as gems:
        loss = torch.exp(parameter).sum()
        loss.backward()
    assert calls_of(gems)["aten.exp.default"] == 1
    torch.testing.assert_close(parameter.grad, x.exp())


@pytest.fixture
def one_rank(tmp_path: Any, device: str) -> Iterator[Any]:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,)) if device == "cpu" else dist.device_mesh.init_device_mesh(device, (1,))
    finally:
        dist.destroy_process_group()


def test_dtensor(x: torch.Tensor, one_rank: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    for context in (torch.enable_grad, torch.inference_mode):
        for placement in (Shard(0), Replicate()):
            with context(), GemsMode(trace=True) as gems:
                d = distribute_tensor(x, one_rank, [placement])
                y = torch.exp(d + d)
                z = nn.functional.linear(y, distribute_tensor(torch.ones(2, 4, device=x.device), one_rank, [Replicate()]))
            assert type(y) is type(z) is DTensor
            torch.testing.assert_close(y.full_tensor(), torch.exp(x + x))
            counts = calls_of(gems)
            assert counts["aten.exp.default"] == counts["aten.add.Tensor"] == 1
    leaf = distribute_tensor(x, one_rank, [Shard(0)]).requires_grad_()
    with GemsMode(strict=True):
        (leaf.exp() + leaf).sum().backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), x.exp() + 1)


# -- fake tensors and tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake_first", [True, False])
def test_fake_tensors(x: torch.Tensor, spy: Spy, fake_first: bool) -> None:
    fake, mode = FakeTensorMode(), GemsMode(registry=spy.registry)
    with fake if fake_first else mode, mode if fake_first else fake:
        a = torch.empty(3, 4, device=x.device)
        b = torch.zeros(4, device=x.device)
        c = (a + b).exp()
        d = nn.functional.linear(c, torch.empty(5, 4, device=x.device))
        with torch.inference_mode():
            e = nn.functional.layer_norm(c, (4,))
    for t in (a, b, c, d, e):
        assert type(t).__name__ == "FakeTensor"
    assert c.shape == (3, 4) and d.shape == (3, 5) and c.device.type == x.device.type
    assert spy.take() == []


def test_fake_tensors_after_their_mode(x: torch.Tensor, spy: Spy) -> None:
    with FakeTensorMode() as fake:
        a = torch.empty(3, 4, device=x.device)
    b = fake.from_tensor(x)
    with GemsMode(registry=spy.registry):
        c = a + b
        torch.exp(x)  # plain tensors beside them are still served
        a.add_(1)
    assert type(c).__name__ == "FakeTensor"
    assert spy.take() == ["aten.exp.default"]


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(x: torch.Tensor, tracing_mode: str) -> None:
    def function(t: torch.Tensor) -> torch.Tensor:
        return (t + 1).exp()

    def targets(graph: Any) -> list[Any]:
        return [n.target for n in graph.graph.nodes if n.op == "call_function"]

    expected = targets(make_fx(function, tracing_mode=tracing_mode)(x))
    with GemsMode():
        inside = make_fx(function, tracing_mode=tracing_mode)(x)
        traced = inside(x)
    assert targets(inside) == expected
    assert targets(make_fx(GemsMode()(function), tracing_mode=tracing_mode)(x)) == expected  # the mode inside the traced function
    torch.testing.assert_close(traced, function(x))


# -- functorch ---------------------------------------------------------------------------------------------------------


def silu_sum(t: torch.Tensor) -> torch.Tensor:
    return (nn.functional.silu(t) + t.exp() + 2).sum()


FUNCTORCH: dict[str, Any] = {
    "vmap": lambda x: torch.func.vmap(lambda t: (t + 1).exp() + t)(x),
    "vmap over columns": lambda x: torch.func.vmap(lambda t: t + t.exp(), in_dims=1, out_dims=1)(x),
    "nested vmap": lambda x: torch.func.vmap(torch.func.vmap(lambda t: t.exp() + 1))(x),
    "vmap in-place": lambda x: torch.func.vmap(lambda t: t.clone().add_(1).exp_())(x),
    "grad": lambda x: torch.func.grad(silu_sum)(x),
    "per-sample grad": lambda x: torch.func.vmap(torch.func.grad(silu_sum))(x),
    "vjp": lambda x: torch.func.vjp(lambda t: nn.functional.silu(t) + t, x)[1](x)[0],
    "jvp": lambda x: torch.func.jvp(lambda t: nn.functional.silu(t) + t.exp(), (x,), (torch.ones_like(x),)),
    "jacrev": lambda x: torch.func.jacrev(lambda t: t.exp() + t)(x[0]),
    "jacfwd": lambda x: torch.func.jacfwd(lambda t: t.exp() + t)(x[0]),
    "hessian": lambda x: torch.func.hessian(silu_sum)(x[0]),
    "functionalize": lambda x: torch.func.functionalize(lambda t: t.clone().add_(1).exp())(x),
    "forward AD": lambda x: forward_ad(x),
    "double backward": lambda x: double_backward(x),
}


def forward_ad(x: torch.Tensor) -> torch.Tensor:
    import torch.autograd.forward_ad as fwad

    with fwad.dual_level():
        dual = fwad.make_dual(x, torch.ones_like(x))
        return fwad.unpack_dual(dual.exp() + dual).tangent.clone()


def double_backward(x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(leaf.exp().sum(), leaf, create_graph=True)
    return torch.autograd.grad((first * first).sum(), leaf)[0]


@pytest.mark.parametrize("name", FUNCTORCH)
def test_functorch(x: torch.Tensor, mode: GemsMode, name: str) -> None:
    expected = FUNCTORCH[name](x)
    with mode:
        got = FUNCTORCH[name](x)
    torch.testing.assert_close(got, expected)


def test_kernels_serve_what_functorch_calls(x: torch.Tensor, spy: Spy) -> None:
    with GemsMode(registry=spy.registry, strict=True):
        torch.func.vmap(torch.func.grad(lambda t: t.exp().sum()))(x)
    assert "aten.exp.default" in spy.take()


def test_a_mode_inside_a_transformed_function(x: torch.Tensor) -> None:
    """Wrapped tensors that reach the mode are no business of kernels."""
    with GemsMode() as outer:
        pass

    def inside(t: torch.Tensor) -> torch.Tensor:
        with outer:
            return (t + 1).exp().sum()

    for _ in range(2):
        torch.testing.assert_close(torch.func.vmap(inside)(x), (x + 1).exp().sum(1))
        torch.testing.assert_close(torch.func.grad(inside)(x), (x + 1).exp())
        with outer:
            torch.testing.assert_close(torch.func.vmap(inside)(x), (x + 1).exp().sum(1))


def test_functional_call_and_stateless_models(x: torch.Tensor, mode: GemsMode) -> None:
    layer = nn.Linear(4, 2).to(x.device)
    other = {name: p.detach() + 1 for name, p in layer.named_parameters()}
    expected = torch.func.functional_call(layer, other, (x,))
    with mode:
        got = torch.func.functional_call(layer, other, (x,))
        ensemble = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))({k: torch.stack([v, v]) for k, v in other.items()})
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ensemble[1], expected)


# -- layouts, devices, lazy bits ---------------------------------------------------------------------------------------


def quietly(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


EXOTIC: dict[str, Any] = {
    "sparse coo": lambda d: torch.eye(3, device=d).to_sparse(),
    "sparse csr": lambda d: torch.eye(3, device=d).to_sparse_csr(),
    "quantized": lambda d: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8).to(d),
    "nested": lambda d: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], device=d),
    "jagged": lambda d: torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)], layout=torch.jagged, device=d),
    "mkldnn": lambda d: torch.eye(3).to_mkldnn(),
    "meta": lambda d: torch.empty(3, device="meta"),
    "complex": lambda d: torch.ones(3, dtype=torch.complex64, device=d),
    "conjugated": lambda d: torch.full((3,), 1 + 2j, device=d).conj(),
    "negated": lambda d: torch.full((3,), 1 + 2j, device=d).conj().imag,
    "zero tensor": lambda d: torch._efficientzerotensor((3,), device=d),
    "float8": lambda d: torch.ones(4, device=d).to(torch.float8_e4m3fn),
}


def plainly(t: Any) -> Any:
    if not isinstance(t, torch.Tensor) or t.device.type == "meta":
        return (t.shape, t.dtype) if isinstance(t, torch.Tensor) else t
    if t.is_nested:
        return [u.clone() for u in t.unbind()]
    if t.is_quantized:
        return t.dequantize()
    if t.layout != torch.strided:
        return t.to_dense()
    return t.resolve_conj().resolve_neg().clone() if t.dtype != torch.float8_e4m3fn else t.float()


@pytest.mark.parametrize("kind", EXOTIC)
def test_exotic_tensors_pass_through(kind: str, device: str) -> None:
    functions = (lambda t: t + t, lambda t: t.clone(), lambda t: t.add(1), lambda t: t.neg(), lambda t: t == t, lambda t: t.exp(),
                 lambda t: t * 2, lambda t: t.clone().add_(1), lambda t: t.to(torch.float64), lambda t: t.sum(),
                 lambda t: nn.functional.silu(t))

    def result(function: Any) -> Any:
        t = EXOTIC[kind](device)
        try:
            return plainly(function(t))
        except (RuntimeError, TypeError) as error:
            return type(error), str(error).splitlines()[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in functions:
            expected = result(function)
            with GemsMode(strict=True):
                if kind in ("negated", "zero tensor", "conjugated"):
                    # A plain tensor of the same metadata has been here before, often enough to be recognized without a key.
                    for _ in range(9):
                        function(torch.ones(3, device=device, dtype=EXOTIC[kind](device).dtype))
                got = result(function)
            if isinstance(expected, tuple):
                assert got == expected
            else:
                torch.testing.assert_close(got, expected)


def test_plain_tensors_of_the_same_metadata_are_still_served(device: str, spy: Spy) -> None:
    negated = torch.full((3,), 1 + 2j, device=device).conj().imag
    with GemsMode(registry=spy.registry):
        torch.exp(negated)
        torch.exp(torch.ones(3, device=device))
    assert "aten.exp.default" in spy.take()


def test_the_reasons_of_what_passes_through(x: torch.Tensor) -> None:
    mode = GemsMode()
    assert "layout sparse_coo" in str(decision(mode, "exp", x.to_sparse()).reason)
    assert "device meta; the mode works on" in str(decision(mode, "exp", x.to("meta")).reason)
    assert "complex" in str(decision(mode, "exp", x.to(torch.complex64)).reason)
    quantized = quietly(lambda: torch.quantize_per_tensor(x.cpu(), 0.1, 0, torch.quint8))
    assert "quantized tensor" in str(decision(mode, "neg", quantized).reason)
    nested = quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], device=x.device))
    assert decision(mode, "exp", nested).kind == "pass"


def test_other_devices_pass_through(device: str, x: torch.Tensor) -> None:
    mode = GemsMode(strict=True)
    with mode:
        meta = torch.ones(3, device="meta") + 1
        assert meta.device.type == "meta"
        if device == "cuda":
            assert torch.equal(torch.ones(3) + 1, torch.full((3,), 2.0))
            with pytest.raises(RuntimeError, match="same device"):
                x + torch.ones(4)


# -- torch.compile -----------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler")


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    dynamo.reset()
    yield dynamo
    dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_function_inside_the_mode(x: torch.Tensor, dynamo: Any, backend: str) -> None:
    def function(t: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(t + 1) * 2

    before = dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(function, backend=backend)
    with GemsMode(strict=True):
        for _ in range(2):
            got = compiled(x)
        around = torch.exp(got)
    torch.testing.assert_close(got, function(x))
    torch.testing.assert_close(around, function(x).exp())
    assert dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    torch.testing.assert_close(compiled(x), function(x))


def test_compiled_training_inside_the_mode(x: torch.Tensor, dynamo: Any, mode: GemsMode) -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.SiLU()).to(x.device)

    def gradients(model: Any) -> list[torch.Tensor]:
        layer.zero_grad()
        model(x).sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    expected = gradients(layer)
    with mode:
        got = gradients(torch.compile(layer, backend="aot_eager"))
    torch.testing.assert_close(got, expected)


def test_dynamo_does_not_compile_the_mode(x: torch.Tensor, dynamo: Any, mode: GemsMode) -> None:
    """Between compiled regions the mode runs in frames that `torch.compile` watches."""
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph

    def function(t: torch.Tensor) -> torch.Tensor:
        y = t + 1
        dynamo.graph_break()
        total = y.exp().sum().item()
        return y * total

    before = dynamo.utils.counters["frames"]["total"]
    torch.compile(function, backend=backend)(x)
    native_frames, native_graphs = dynamo.utils.counters["frames"]["total"] - before, len(graphs)
    dynamo.reset()
    graphs.clear()
    before = dynamo.utils.counters["frames"]["total"]
    with mode:
        got = torch.compile(function, backend=backend)(x)
    assert len(graphs) == native_graphs
    assert dynamo.utils.counters["frames"]["total"] - before == native_frames
    torch.testing.assert_close(got, function(x))


def test_a_mode_inside_compiled_code(x: torch.Tensor, dynamo: Any, spy: Spy) -> None:
    """`torch.compile` does not trace through dispatch modes of users: it breaks the graph there, and the mode works."""
    mode = GemsMode(registry=spy.registry)

    def function(t: torch.Tensor) -> torch.Tensor:
        y = t + 1
        with mode:
            y = torch.exp(y)
        return y * 2

    torch.testing.assert_close(torch.compile(function, backend="eager")(x), (x + 1).exp() * 2)
    assert stack() == []
    assert spy.take() == ["aten.exp.default"]


def test_export_and_jit_trace_inside_the_mode(x: torch.Tensor, mode: GemsMode) -> None:
    class Model(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return (t + 1).exp()

    model = Model()
    with mode:
        exported = torch.export.export(model, (x,))
        traced = quietly(lambda: torch.jit.trace(model, (x,)))
        results = exported.module()(x), traced(x)
    for result in results:
        torch.testing.assert_close(result, (x + 1).exp())
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [torch.ops.aten.add.Tensor, torch.ops.aten.exp.default]


def test_numbers_of_a_trace_are_compared_natively() -> None:
    """A traced module keeps a number as a tensor that modes are given as the number: for both operands of one call."""
    traced = quietly(lambda: torch.jit.trace(nn.Sequential(Plus()), (torch.ones(2),)))
    graph = traced.inlined_graph
    (number,) = [n.t("value") for n in graph.nodes() if n.kind() == "prim::Constant" and n.kindOf("value") == "t"]
    with GemsMode(deny=["eq"]):
        assert torch.eq(number, number).item() is True


class Plus(nn.Module):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return t + 7


# -- autograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(x: torch.Tensor, spy: Spy, use_reentrant: bool) -> None:
    leaf = x.clone().requires_grad_()
    with GemsMode(registry=spy.registry, strict=True):
        y = checkpoint(lambda t: torch.exp(t + 1), leaf, use_reentrant=use_reentrant)
        forward = spy.take()
        y.sum().backward()
        backward = spy.take()
    torch.testing.assert_close(leaf.grad, (x + 1).exp())
    assert forward == ["aten.add.Tensor", "aten.exp.default"]
    assert backward[:2] == forward and "aten.mul.Tensor" in backward  # recomputed under the mode, too


def test_selective_checkpointing(x: torch.Tensor, mode: GemsMode) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.exp.default else CheckpointPolicy.PREFER_RECOMPUTE

    leaf = x.clone().requires_grad_()
    with mode:
        y = checkpoint(lambda t: torch.exp(t + 1) * t, leaf, use_reentrant=False,
                       context_fn=lambda: create_selective_checkpoint_contexts(policy))
        y.sum().backward()
    torch.testing.assert_close(leaf.grad, (x + 1).exp() * (1 + x))


def test_gradcheck(x: torch.Tensor, mode: GemsMode) -> None:
    leaf = x.double()[:2, :2].clone().requires_grad_()
    with mode:
        assert torch.autograd.gradcheck(lambda t: nn.functional.silu(t) + t.exp(), leaf)
        assert torch.autograd.gradgradcheck(lambda t: t.exp() + t, leaf)


def test_hooks_saved_tensors_and_custom_functions(x: torch.Tensor, spy: Spy) -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(t)
            return t * t * t

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (t,) = ctx.saved_tensors
            return g * 3 * t * t

    leaf = x.clone().requires_grad_()
    packed: list[Any] = []
    with (GemsMode(registry=spy.registry, strict=True),
          torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)):
        y = Cube.apply(leaf).exp()
        y.register_hook(lambda g: g + 1)
        y.sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * (x**3).exp() * 3 * x**2)
    assert packed and spy.take().count("aten.mul.Tensor") == 6
    with torch.autograd.graph.save_on_cpu(), GemsMode(strict=True):
        leaf.exp().sum().backward()
    with torch.autograd.set_multithreading_enabled(False), GemsMode(strict=True):
        leaf.exp().sum().backward()
    with torch.autograd.detect_anomaly(check_nan=True), GemsMode(strict=True):
        quietly(lambda: leaf.exp().sum().backward())


@pytest.mark.parametrize("mode_first", [True, False])
def test_autocast(x: torch.Tensor, mode_first: bool, device: str) -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.LayerNorm(4)).to(x.device)
    autocast = torch.autocast(device, dtype=torch.bfloat16)
    with autocast:
        expected = layer(x) + 1
    mode = GemsMode(strict=True)
    with mode if mode_first else autocast, autocast if mode_first else mode:
        hidden = layer[0](x)
        got = layer(x) + 1
    assert hidden.dtype == torch.bfloat16 and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


# -- copying and saving ------------------------------------------------------------------------------------------------


def test_copying_and_saving(x: torch.Tensor, mode: GemsMode) -> None:
    layer = nn.Linear(4, 2).to(x.device)
    view = x[1:, ::2]
    with mode:
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        file = io.BytesIO()
        torch.save({"model": layer.state_dict(), "view": view}, file)
        file.seek(0)
        loaded = torch.load(file)
        tensors = copy.copy(x), copy.deepcopy(view), pickle.loads(pickle.dumps(view)), loaded["view"]
        layer.load_state_dict(loaded["model"])
    for other in copies:
        torch.testing.assert_close(other.weight, layer.weight)
    for t, expected in zip(tensors, (x, view, view, view)):
        assert torch.equal(t, expected)
        assert t.stride() == expected.stride()


def test_a_model_that_holds_a_decorated_forward_is_copied(x: torch.Tensor) -> None:
    class Model(nn.Module):
        forward = GemsMode()(lambda self, t: torch.exp(t))

    torch.testing.assert_close(copy.deepcopy(Model())(x), x.exp())


# -- other modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode_first", [True, False])
def test_flop_counting(x: torch.Tensor, mode: GemsMode, mode_first: bool) -> None:
    flops = FlopCounterMode(display=False)
    with mode if mode_first else flops, flops if mode_first else mode:
        x @ x.t()
        with torch.inference_mode():
            x @ x.t()
    assert flops.get_total_flops() == 2 * 2 * 3 * 4 * 3


def test_a_mode_that_computes_inside_its_dispatch(x: torch.Tensor, spy: Spy) -> None:
    class Doubling(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return result + result if func is torch.ops.aten.exp.default else result

    with GemsMode(registry=spy.registry), Doubling():
        got = torch.exp(x)
    assert spy.take() == ["aten.exp.default", "aten.add.Tensor"]
    torch.testing.assert_close(got, 2 * x.exp())


def test_the_mode_changes_nothing_that_other_modes_see(x: torch.Tensor) -> None:
    def step(model: nn.Module) -> None:
        model(x).sum().backward()

    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.LayerNorm(4)).to(x.device)
    native, under = Counting(), Counting()
    with native:
        step(copy.deepcopy(model))
    with GemsMode(), under:
        step(copy.deepcopy(model))
    assert under.counts == native.counts


def test_the_profiler_sees_the_mode(x: torch.Tensor) -> None:
    with torch.profiler.profile() as profile, GemsMode():
        torch.exp(x)
    assert any("exp" in event.key for event in profile.key_averages()) or x.device.type == "cpu"


# -- processes ---------------------------------------------------------------------------------------------------------


def work_in_child(queue: Any) -> None:
    with GemsMode(strict=True) as mode:
        y = torch.ones(3) + 1
    queue.put((y.tolist(), decision(mode, "add.Tensor", torch.ones(3), 1).kind, len(stack())))


def data_under_the_process_mode(queue: Any) -> None:
    queue.put((torch.exp(torch.zeros(3)).tolist(), len(stack())))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this platform cannot fork")
def test_forked_processes(device: str) -> None:
    if device == "cuda":
        pytest.skip("CUDA cannot be used in a forked process")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(target: Any) -> Any:
        process = context.Process(target=target, args=(queue,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        return queue.get()

    with GemsMode(strict=True):
        torch.ones(3) + 1
    assert run(work_in_child) == ([2, 2, 2], "rule", 0)
    gemsmode.enable()
    try:
        assert run(data_under_the_process_mode) == ([1, 1, 1], 1)  # the fork carries the mode along
    finally:
        gemsmode.disable()


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((2,), float(i)).exp()


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loaders(workers: int, device: str) -> None:
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=3, num_workers=workers,
                                         multiprocessing_context="fork" if workers and os.name == "posix" and device == "cpu" else None)
    expected = torch.stack([torch.full((2,), float(i)).exp() for i in range(6)])
    with GemsMode():
        torch.testing.assert_close(torch.cat(list(loader)), expected)
    gemsmode.enable()
    try:
        torch.testing.assert_close(torch.cat(list(loader)), expected)
    finally:
        gemsmode.disable()


# -- optimizers and models ---------------------------------------------------------------------------------------------


def test_training_gives_the_same_weights(x: torch.Tensor) -> None:
    def train(under: GemsMode | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 1)).to(x.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            def step() -> None:
                optimizer.zero_grad()
                model(x).pow(2).mean().backward()
                optimizer.step()

            if under is None:
                step()
            else:
                with under:
                    step()
        return [p.detach() for p in model.parameters()]

    torch.testing.assert_close(train(GemsMode()), train(None), rtol=1e-4, atol=1e-5)


# -- a GPU -------------------------------------------------------------------------------------------------------------


def test_streams(device: str, mode: GemsMode) -> None:
    """A kernel runs on the stream that is current: it waits for what that stream is doing, and the default one does not."""
    skip_without_cuda(device)
    side = torch.cuda.Stream()
    x = torch.zeros(1 << 20, device="cuda")
    with mode:
        x.fill_(2) + 1  # compiled before the clock runs
    torch.cuda.synchronize()
    with mode, torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.fill_(3)
        y = x + 1
        done = side.record_event()
    assert not done.query()
    assert torch.cuda.default_stream().query()
    side.synchronize()
    assert y.eq(4).all()


def test_cuda_graphs(device: str, mode: GemsMode) -> None:
    skip_without_cuda(device)
    x = torch.zeros(1000, device="cuda")
    with mode:
        for _ in range(3):
            nn.functional.silu(x + 1).add_(x[:1])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nn.functional.silu(x + 1).add_(x[:1])
            z = torch.exp(torch.zeros_like(x[:7]) + x[:7])  # new sizes are planned while capturing
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(y, nn.functional.silu(x + 1) + value)
        torch.testing.assert_close(z, x[:7].exp())


def test_several_gpus(device: str, mode: GemsMode) -> None:
    skip_without_cuda(device, gpus=2)
    tensors = [torch.full((1000,), float(i), device=f"cuda:{i}") for i in range(2)]
    with mode:
        for current in range(2):
            with torch.cuda.device(current):
                for i, t in enumerate(tensors):
                    for _ in range(2):
                        y = torch.exp(t + 1)
                    assert y.device == t.device and torch.cuda.current_device() == current
                    torch.testing.assert_close(y, torch.full_like(t, float(i + 1)).exp())
                assert torch.zeros(3, device="cuda").device.index == current
                assert torch.arange(3, device="cuda").device.index == current
        with pytest.raises(RuntimeError, match="same device"):
            tensors[0] + tensors[1]
        moved = tensors[0].to("cuda:1") + tensors[1]
    torch.testing.assert_close(moved, torch.ones_like(moved))


def test_backward_on_a_gpu_runs_in_autograds_thread(device: str) -> None:
    skip_without_cuda(device)
    spy = Spy("aten.mul.Tensor")
    leaf = torch.ones(3, device="cuda", requires_grad=True)
    with GemsMode(registry=spy.registry):
        leaf.exp().sum().backward()
    import threading

    assert spy.threads and threading.get_ident() not in spy.threads


def test_a_users_triton_kernel_on_another_stream_and_device(device: str) -> None:
    skip_without_cuda(device, gpus=2)
    registry = Registry("user")

    @rule("aten.exp.default", registry=registry)
    def ones(t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    with GemsMode(registry=registry, strict=True):
        assert torch.exp(torch.zeros(3, device="cuda:1")).device.index == 1
