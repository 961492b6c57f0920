"""Plans: binding and running them, on a GPU that is not there, through each convention of Triton's launcher, and in the
interpreter; alignment, hooks, devices, streams, shared memory; what new sizes cost; threads."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fake_gpu import TARGET, FakeGpu

from gemsmode import Call, GemsMode, Registry, launch, load_ops, plan, registry
from gemsmode.handlers import Policy
from gemsmode.plan import Alloc, Arg, At, Decline, Disjoint, Launch, Num, Out, Plan, Size, contiguous_strides
from gemsmode.registry import find_op, planned
from gemsmode.signature import TensorMeta

load_ops()

pytestmark = pytest.mark.usefixtures("only_interpreted")


@pytest.fixture
def only_interpreted(device: str) -> None:
    if device != "cpu":
        pytest.skip("the GPU that these tests imagine runs its kernels in the interpreter")


@pytest.fixture(params=["flat", "nested", "public"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch, request.param)


def make(convention: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeGpu:
    return FakeGpu(monkeypatch, convention, **options)


X = torch.linspace(-3, 3, 48)

CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "dense": ("add.Tensor", (X, X.flip(0), 1)),
    "number": ("add.Tensor", (X, 2, 1)),
    "float number and alpha": ("add.Tensor", (X, 2.5, 3)),
    "0-dim operand": ("add.Tensor", (X, X[3].clone(), 1)),
    "broadcast row": ("add.Tensor", (X.view(6, 8), X[:8].clone(), 1)),
    "broadcast column": ("add.Tensor", (X.view(6, 8), X[:6].clone().view(6, 1), 1)),
    "transposed": ("add.Tensor", (X.view(6, 8), X.view(8, 6).t(), 1)),
    "strided": ("add.Tensor", (X.view(6, 8)[:, ::2], X.view(6, 8)[:, 4:], 1)),
    "three dimensions": ("add.Tensor", (X.view(2, 4, 6).permute(2, 0, 1), X.view(6, 2, 4)[:, :1], 1)),
    "one element": ("exp", (X[16:17].clone(),)),
    "0-dim": ("exp", (X[5].clone(),)),
    "empty": ("exp", (X[:0],)),
    "half": ("silu", (X.half(),)),
    "int": ("add.Tensor", (X.int(), 3, 2)),
    "bool": ("eq.Tensor", (X.bool(), X.bool())),
    "int64 beside float": ("add.Tensor", (X, X.long(), 1)),
    "scalar overload": ("eq.Scalar", (X.round(), 1)),
    "negated": ("neg", (X.view(4, 12).t(),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_passed_to_the_launcher(gpu: FakeGpu, name: str) -> None:
    op, args = CALLS[name]
    expected = find_op(op)(*args[:2], **({"alpha": args[2]} if len(args) > 2 else {}))
    for _ in range(2):
        got = gpu.call(op, *args)
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
        torch.testing.assert_close(got, expected)
    launched = 0 if not expected.numel() else 2
    assert (len(gpu.launches), gpu.public) == ((launched, 0) if gpu.convention != "public" else (0, launched))


def test_in_place_and_out(gpu: FakeGpu) -> None:
    x = X.clone()
    assert gpu.call("exp_", x) is x
    torch.testing.assert_close(x, X.exp())
    out = torch.zeros(48)
    assert gpu.call("add.out", X, X, 1, out) is out
    torch.testing.assert_close(out, X + X)
    out = torch.zeros(8, 6).t()
    gpu.call("exp.out", X.view(6, 8), out)
    torch.testing.assert_close(out, X.view(6, 8).exp())
    wide = torch.zeros(48, dtype=torch.float64)
    gpu.call("exp.out", X, wide)
    torch.testing.assert_close(wide, X.exp().double())
    with pytest.warns(UserWarning, match="resized"):
        small = torch.zeros(3)
        gpu.call("exp.out", X, small)
    torch.testing.assert_close(small, X.exp())
    x = X.clone()
    gpu.call("add_.Tensor", x, x, 2)
    torch.testing.assert_close(x, X * 3)


def test_shared_memory_is_left_to_pytorch(gpu: FakeGpu) -> None:
    memory = X.clone()
    decided = gpu.decide("exp.out", memory[16:], memory[:32])
    assert decided.decision.kind == "rule"
    before = len(gpu.launches) + gpu.public
    with pytest.raises(Exception, match="single memory location"):
        gpu.run(decided, memory[16:], memory[:32])
    assert len(gpu.launches) + gpu.public == before
    assert torch.equal(memory, X)
    gpu.run(decided, X[16:].clone(), memory[:32])
    torch.testing.assert_close(memory[:32], X[16:].exp())


def test_unaligned_tensors(gpu: FakeGpu) -> None:
    storage = torch.zeros(60)
    for offset in (0, 1, 3, 4, 5):
        x = storage[offset:offset + 48].copy_(X)
        torch.testing.assert_close(gpu.call("exp", x), X.exp())
        torch.testing.assert_close(gpu.call("add.Tensor", X, x, 1), X + X)
    x = storage[1:49].copy_(X)
    gpu.call("exp_", x)
    torch.testing.assert_close(x, X.exp())
    assert any("*fp32D" in launch.flat_types(s.types) for s, _ in gpu.compiled)
    assert any("*fp32D" not in launch.flat_types(s.types)[1:] for s, _ in gpu.compiled)


def test_the_decision_holds_for_aligned_and_unaligned(gpu: FakeGpu) -> None:
    decided = gpu.decide("exp", X)
    storage = torch.zeros(60)
    for offset in (0, 1, 0, 2, 4):
        torch.testing.assert_close(gpu.run(decided, storage[offset:offset + 48].copy_(X)), X.exp())


def test_launch_hooks_see_every_launch(gpu: FakeGpu) -> None:
    if not hasattr(triton.knobs.runtime.launch_enter_hook, "calls"):
        pytest.skip("this Triton has one hook and not a list of them")
    decided = gpu.decide("exp", X)
    gpu.run(decided, X)
    before = gpu.public

    def hook(metadata: Any) -> None:
        raise AssertionError("the launcher that stands in for Triton's calls no hooks")

    for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            torch.testing.assert_close(gpu.run(decided, X), X.exp())
        finally:
            chain.remove(hook)
    assert gpu.public == before + 2  # through Triton's own way, which calls them
    gpu.run(decided, X)
    assert gpu.public == (before + 2 if gpu.convention != "public" else before + 3)


@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
def test_several_devices(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make(convention, monkeypatch, devices=2)
    first, second = gpu.decide("exp", X, device=0), gpu.decide("exp", X, device=1)
    direct = 0
    for current in (0, 1):
        gpu.current_device = current
        for device, decided in enumerate((first, second)):
            torch.testing.assert_close(gpu.run(decided, X), X.exp())  # the launcher checks the stream's device
            assert gpu.current_device == current
            direct += device == current
    assert {device for _, device in gpu.compiled} == {0, 1}
    if convention != "public":
        assert len(gpu.launches) == direct == 2 and gpu.public == 2
        assert {device for _, device, _ in gpu.launches} == {0, 1}


def test_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make("flat", monkeypatch)
    decided = gpu.decide("exp", X)
    gpu.run(decided, X)
    streams: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: streams.append(device) or 42)
    monkeypatch.setattr(gpu, "stream", lambda device: 42)
    another = make("flat", monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: streams.append(device) or 42)
    monkeypatch.setattr(another, "stream", lambda device: 42)
    another.call("exp", X)
    assert streams == [0] and len(another.launches) == 1  # asked for on each call


@pytest.mark.parametrize("convention", ["flat", "nested"])
def test_scratch_memory_for_all_programs_is_passed(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make(convention, monkeypatch)
    gpu.scratch = 384
    torch.testing.assert_close(gpu.call("exp", X), X.exp())
    assert len(gpu.launches) == 1 and not gpu.public


@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
def test_integers_and_none_among_the_results(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Registry("integers")
    served = registry.default.candidates(find_op("exp"))[0].rule.implementation

    @planned("aten.exp.default", family="test", registry=mine)
    def exp(call: Call) -> Plan:
        made = served(call)
        return made._replace(returns=(Out(0), Size(call.args[0].shape[0]), None, Size(-7)))

    gpu = FakeGpu(monkeypatch, convention, mine)
    for x in (X, torch.randn(5)):
        result, rows, nothing, number = gpu.call("exp", x)
        torch.testing.assert_close(result, x.exp())
        assert (rows, nothing, number) == (len(x), None, -7)


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
def test_what_the_host_reads_is_on_the_gpu_only_during_capture(convention: str, capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Registry("host")
    served = registry.default.candidates(find_op("exp"))[0].rule.implementation

    @planned("aten.exp.default", family="test", registry=mine)
    def exp(call: Call) -> Plan:
        made = served(call)
        return made._replace(allocs=(*made.allocs, Alloc((), (), torch.int64, host=True)), returns=(Out(0), Out(len(made.allocs))))

    gpu = FakeGpu(monkeypatch, convention, mine)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    on_host = torch.tensor(7)
    make_empty = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: on_host if k.get("device") == "cpu" else make_empty(*a, **k))
    result, state = gpu.call("exp", X)
    torch.testing.assert_close(result, X.exp())
    assert state.item() == (113 if capturing else 7)  # what the tests' allocator of the GPU fills integers with


def test_a_launcher_with_profiler_scratch_memory_takes_the_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for attribute in ("profile_scratch_size", "launch_cooperative_grid"):
        gpu = make("nested", monkeypatch)
        launcher = gpu.launcher(launch.Spec(None, (), ()))
        monkeypatch.setattr(type(launcher), attribute, 1, raising=False)
        compiled = type("Compiled", (), {"run": launcher, "function": 1, "packed_metadata": ()})()
        assert launch.entry(compiled, launch.Spec(None, (), ())) is None


def test_a_launcher_of_unknown_looks_takes_the_public_way(caplog: pytest.LogCaptureFixture) -> None:
    launcher = type("CudaLauncher", (), {"__module__": "triton.backends.nvidia.driver", "global_scratch_size": 0})()
    compiled = type("Compiled", (), {"run": launcher, "function": 1, "packed_metadata": ()})()
    assert launch.entry(compiled, launch.Spec(None, (), ())) is None
    assert "not as expected" in caplog.text
    other = type("Compiled", (), {"run": object(), "function": 1})()
    assert launch.entry(other, launch.Spec(None, (), ())) is None


# -- plans with every kind of argument ---------------------------------------------------------------------------------


@triton.jit
def every_kind_kernel(p_sum, ins, optional, scale, count, shift, n, one, sizes, p_second, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(ins)):
        total += tl.load(ins[i] + o, mask=m, other=0).to(tl.float32)
    if len(optional) == 1:
        total += tl.load(optional[0] + o, mask=m, other=0).to(tl.float32)
    total = total * scale + count + shift + sizes[0] * 1000 + sizes[1][0] * 100 + one
    tl.store(p_sum + o, total * SIGN, mask=m)
    tl.store(p_second + o, total, mask=m)


@triton.jit
def add_one_kernel(p, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p + o, tl.load(p + o, mask=o < n, other=0) + 1, mask=o < n)


def every_kind(returns: Any, sign: int = -1) -> Registry:
    """A rule for `addcmul(self, tensor1, tensor2, value)`; its plan has two launches and an allocation that nobody gets."""
    rules = Registry("every kind")

    @planned("aten.addcmul.default", family="test", registry=rules)
    def every(call: Call) -> Plan:
        a, b, c, _ = call.args
        n = a.numel
        flat = Alloc((n,), (1,), torch.float32)
        second = Alloc((n + 4,), (1,), torch.float32, zero=True)
        args = (Out(0), (Arg(0), Arg(1)), (Arg(2),) if c.numel == n else (), Num(3, "fp32"), 7, 0.5, n, 1, (Size(2), (16,)), At(Out(1), 4))
        steps = (Launch(every_kind_kernel, (triton.cdiv(n, 32), 1, 1), args, (("SIGN", sign), ("BLOCK", 32))),
                 Launch(add_one_kernel, (triton.cdiv(n, 64), 1, 1), (Out(0), Size(n)), (("BLOCK", 64),), 8))
        metas = {Arg(0): a, Arg(1): b, Arg(2): c}
        return Plan((flat, second), steps, returns, metas)

    return rules


@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
@pytest.mark.parametrize("optional", [True, False])
def test_every_kind_of_argument(convention: str, optional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make(convention, monkeypatch, registry=every_kind((Out(0), Out(1))))
    a, b, c = X[:40].clone(), X[4:44].clone(), X[8:48].clone() if optional else X[:1].clone()
    for value in (2.0, 3, True):
        first, second = gpu.call("addcmul", a, b, c, value)
        total = (a + b + (c if optional else 0)) * float(value) + 7 + 0.5 + 2000 + 1600 + 1
        torch.testing.assert_close(first, -total + 1)
        torch.testing.assert_close(second[4:], total)
        assert second[:4].tolist() == [0] * 4
    assert {(s.num_warps, s.num_stages) for s, _ in gpu.compiled} == {(4, 2), (8, 2)}


@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
@pytest.mark.parametrize(("returns", "kind"), [
    (Out(0), torch.Tensor), ((Out(0), Out(1)), tuple), ((Out(0),), tuple), ([Out(0), Out(1)], list), (Arg(1), torch.Tensor),
    (None, type(None)), ((Out(0), Arg(0), Out(1)), tuple)])
def test_what_is_returned(convention: str, returns: Any, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make(convention, monkeypatch, registry=every_kind(returns))
    a, b, c = X[:40].clone(), X[4:44].clone(), X[8:48].clone()
    got = gpu.call("addcmul", a, b, c, 2.0)
    assert type(got) is kind
    if returns == Arg(1):
        assert got is b
    if kind in (tuple, list):
        assert [t.shape[0] for t in got] == [{Out(0): 40, Out(1): 44, Arg(0): 40}[r] for r in returns]


def test_structures_that_differ_do_not_share_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans alike in all but one thing: what is returned, a constant, a list for a tuple, an optional argument."""
    a, b, c, one = X[:40].clone(), X[4:44].clone(), X[8:48].clone(), X[:1].clone()
    gpu = make("flat", monkeypatch)
    results = []
    for rules in (every_kind(Out(0)), every_kind((Out(0),)), every_kind([Out(0)]), every_kind(Out(0), sign=1)):
        gpu.policy = Policy(rules, target=TARGET)
        results += [gpu.call("addcmul", a, b, c, 2.0), gpu.call("addcmul", a, b, one, 2.0)]
    plain, plain_one, pair, _, many, _, positive, _ = results
    assert type(pair) is tuple and type(many) is list
    torch.testing.assert_close(pair[0], plain)
    torch.testing.assert_close(many[0], plain)
    torch.testing.assert_close(positive - 1, 1 - plain)
    assert not torch.allclose(plain, plain_one)


def test_tensors_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Registry("lists")

    @planned("aten._foreach_add.Scalar", family="test", registry=rules)
    def each(call: Call) -> Plan:
        tensors, _ = call.args
        allocs = tuple(Alloc(t.shape, contiguous_strides(t.shape), t.dtype) for t in tensors)
        steps = tuple(Launch(every_kind_kernel, (triton.cdiv(t.numel, 64), 1, 1),
                             (Out(i), (Arg(0, i),), (), 1.0, Num(1, "i64"), 0.0, t.numel, 1, (Size(0), (0,)), At(Out(i), 0)),
                             (("SIGN", 1), ("BLOCK", 64))) for i, t in enumerate(tensors))
        return Plan(allocs, steps, [Out(i) for i in range(len(tensors))], {Arg(0, i): t for i, t in enumerate(tensors)})

    for convention in ("flat", "nested", "public"):
        with monkeypatch.context() as patch:
            gpu = make(convention, patch, registry=rules)
            got = gpu.call("_foreach_add.Scalar", [X, X[:5].clone(), X[1:34]], 3)
            assert type(got) is list
            for result, x in zip(got, (X, X[:5], X[1:34]), strict=True):
                torch.testing.assert_close(result, x + 3 + 1)


def test_shared_memory_between_results(monkeypatch: pytest.MonkeyPatch) -> None:
    metas = {Arg(0): TensorMeta.of(X), Arg(1): TensorMeta.of(X)}
    apart = Disjoint(Arg(0), Arg(1), 192, 192, False)
    starts = Disjoint(Arg(0), Arg(1), 192, 192, True)
    memory = torch.zeros(200)
    for rule, expected in ((apart, "nnrnn"), (starts, "rnrnn")):
        made = Plan((), (), None, metas, disjoint=(rule,))
        for convention in ("flat", "interpreter"):
            with monkeypatch.context() as patch:
                target = make("flat", patch).policy.target if convention == "flat" else GemsMode().policy.target
                run = plan.bind(made, target, 2, lambda a, b: "n")
                written = memory[48:96]
                found = [run(written, memory[o:o + 48]) or "r" for o in (48, 52, 96, 8, 92)]
                assert "".join(found) == expected, convention


# -- a 0-dim CPU tensor in a number's place ----------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["flat", "nested", "public"])
def test_cpu_scalars_are_read_on_the_host(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make(convention, monkeypatch)
    here = torch.device("cuda", 0)
    x = TensorMeta.of(X)._replace(device=here)
    one = TensorMeta.of(torch.tensor(1.0))
    out = torch.zeros(48)

    def decide(name: str, *args: Any) -> Any:
        decided = gpu.policy.handler(find_op(name)).decide(args)
        assert decided.decision.kind == "rule", decided.decision
        return decided

    for value in (2.5, -1.0):
        scalar = torch.tensor(value)
        torch.testing.assert_close(gpu.run(decide("add.Tensor", x, one, 1), X, scalar, 1), X + value)
        torch.testing.assert_close(gpu.run(decide("add.Tensor", one, x, 2), scalar, X, 2), value + 2 * X)
        torch.testing.assert_close(gpu.run(decide("add_.Tensor", x, one, 1), X.clone(), scalar, 1), X + value)
        torch.testing.assert_close(gpu.run(decide("add.out", x, one, 1, x), X, scalar, 1, out), X + value)
    handler = gpu.policy.handler(find_op("add_.Tensor"))
    assert handler.decide((one, x, 1)).decision.reason == "the tensor to be written is on the CPU"
    assert "device cpu" in str(gpu.policy.handler(find_op("add.Tensor")).decide((one, one, 1)).decision.reason)
    assert gpu.policy.handler(find_op("add.Tensor")).decide((TensorMeta.of(X), x, 1)).decision.kind == "pass"
    on_another = x._replace(device=torch.device("cuda", 1))
    assert gpu.policy.handler(find_op("add.Tensor")).decide((on_another, x, 1)).decision.reason == "tensors on several devices"


def test_a_cpu_scalar_never_becomes_a_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make("flat", monkeypatch, registry=every_kind(Out(0)))
    here = torch.device("cuda", 0)
    x, scalar = TensorMeta.of(X)._replace(device=here), TensorMeta.of(torch.tensor(1.0))
    decision = gpu.policy.handler(find_op("addcmul")).decide((x, x, scalar, 1.0)).decision
    assert decision.kind == "pass" and decision.reason.startswith("a CPU scalar tensor among the arguments")


# -- new sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["flat", "nested"])
def test_new_sizes_compile_nothing_new(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make(convention, monkeypatch)
    gpu.runs_kernels = False
    row = torch.ones(1, 64)
    for n in range(2, 60):
        x = torch.ones(n, 64)
        gpu.call("silu", x)
        gpu.call("add.Tensor", x, row, 1)
        gpu.call("add.Tensor", x[:, :33], x[:, 31:], 1)
    kernels = {(s.kernel, s.types, s.constants, s.num_warps) for s, _ in gpu.compiled}
    assert len(gpu.compiled) == len(kernels)
    compiled, functions = len(gpu.compiled), len(plan._factories)
    for n in range(60, 300):
        x = torch.ones(n, 64)
        gpu.call("silu", x)
        gpu.call("add.Tensor", x, row, 1)
    assert len(gpu.compiled) <= compiled + 2  # a block size or a class of integers that smaller sizes had not
    assert len(plan._factories) <= functions + 2


def test_a_new_size_of_a_known_kind_is_bound_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and no text is made."""
    gpu = make("flat", monkeypatch)
    gpu.decide("add.Tensor", torch.ones(20, 64), torch.ones(64), 1)
    gpu.decide("add.Tensor", torch.ones(21, 64), torch.ones(64), 1)
    monkeypatch.setattr(plan, "_text", lambda *args: pytest.fail("the text of the assembled function was made again"))
    monkeypatch.setattr(launch, "compile", lambda *args: pytest.fail("a kernel was compiled"))
    for n in range(22, 60):
        gpu.decide("add.Tensor", torch.ones(n, 64), torch.ones(64), 1)


def test_large_numbers_take_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of more than 2**31 elements are only described here."""
    gpu = make("flat", monkeypatch)
    here = torch.device("cuda", 0)

    def types(*shape: int, stride: tuple[int, ...] | None = None) -> tuple[list[str], dict[str, Any]]:
        meta = TensorMeta(torch.float32, shape, stride or contiguous_strides(shape), here)
        decided = gpu.policy.handler(find_op("exp")).decide((meta,), bind=False)
        (spec,) = plan.specs(decided.plan)
        return launch.flat_types(spec.types), dict(spec.constants)

    small, constants = types(2**20, 2**5)
    assert not any(t.startswith("i64") for t in small) and constants["WIDE"] is False
    large, constants = types(2**20, 2**12)
    assert any(t.startswith("i64") for t in large) and constants["WIDE"] is True
    spread, constants = types(4, 4, stride=(2**31, 2))
    assert any(t.startswith("i64") for t in spread) and constants["WIDE"] is True
    assert [launch.integer_type(n) for n in (1, 16, 17, 0, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1)] == [
        "1", "i32D", "i32", "i32D", "i32D", "i32", "i64D", "i32D", "i64"]
    assert launch.integer_type(1, specialize=False) == "i32" and launch.integer_type(2**40, specialize=False) == "i64"


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_kernel_that_does_not_compile_falls_back(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: launch.Spec, target: Any, device: int = 0) -> Any:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(launch, "compile", broken)
    with pytest.warns(RuntimeWarning, match=r"rule 'exp' failed on exp and PyTorch's own implementation is used: OutOfResources"):
        decided = gpu.decide("exp", X)
    assert decided.decision.kind == "error"
    torch.testing.assert_close(gpu.run(decided, X), X.exp())


def test_a_kernel_that_does_not_compile_unaligned_is_reported_when_it_is_met(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    decided = gpu.decide("exp", X)
    gpu.run(decided, X)

    def broken(spec: launch.Spec, target: Any, device: int = 0) -> Any:
        raise RuntimeError("no registers left")

    monkeypatch.setattr(launch, "compile", broken)
    with pytest.raises(RuntimeError, match="no registers left"):
        gpu.run(decided, torch.zeros(49)[1:])
    torch.testing.assert_close(gpu.run(decided, X), X.exp())


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_decide_and_run_together(gpu: FakeGpu) -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(6)

    def work(seed: int) -> None:
        try:
            barrier.wait()
            for n in range(1, 12):
                x = torch.full((n, 5), float(seed))
                torch.testing.assert_close(gpu.call("add.Tensor", x, 2, 1), x + 2)
                torch.testing.assert_close(gpu.call("exp", x[:, ::2]), x[:, ::2].exp())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_a_kernel_is_compiled_once_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []

    class Handle:
        def _init_handles(self) -> None:
            pass

    def slow(*args: Any, **kwargs: Any) -> Handle:
        times.append(1)
        threading.Event().wait(0.05)
        return Handle()

    monkeypatch.setattr(triton, "compile", slow)
    monkeypatch.setattr(launch, "source", lambda spec: None)
    monkeypatch.setattr(launch, "_compiled", {})
    absent = TARGET.__class__("cuda", "cuda", 90, present=False)
    spec = launch.Spec(add_one_kernel, ("*fp32D", "i32"), (("BLOCK", 64),))
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(launch.compile(spec, absent))) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(times) == 1 and len({id(r) for r in results}) == 1


# -- the interpreter ---------------------------------------------------------------------------------------------------


def test_the_same_plans_in_the_interpreter() -> None:
    mode = GemsMode(strict=True, registry=every_kind((Out(0), Out(1))))
    a, b, c = X[:40].clone(), X[4:44].clone(), X[8:48].clone()
    first, second = mode.policy.handler(find_op("addcmul")).lookup((a, b, c, 2.0)).run(a, b, c, 2.0)
    total = (a + b + c) * 2 + 7 + 0.5 + 2000 + 1600 + 1
    torch.testing.assert_close(first, -total + 1)
    torch.testing.assert_close(second[4:], total)


def test_poison_fills_what_a_kernel_leaves_unwritten(unpoisoned: None) -> None:
    made = Plan((Alloc((4,), (1,), torch.float32), Alloc((4,), (1,), torch.int64), Alloc((4,), (1,), torch.float32, zero=True)), (),
                (Out(0), Out(1), Out(2)), {})
    target = GemsMode().policy.target
    plan.poison(True)
    try:
        floats, ints, zeros = plan.bind(made, target, 0, lambda: None)()
    finally:
        plan.poison(False)
    assert floats.isnan().all() and ints.tolist() == [113] * 4 and zeros.tolist() == [0] * 4


def test_contiguous_strides() -> None:
    for shape in ((), (3,), (2, 3, 4), (1, 1), (0, 3), (3, 0), (2, 0, 4), (0, 0), (5, 1, 2)):
        assert contiguous_strides(shape) == torch.empty(shape).stride()


def test_decline_carries_its_reason() -> None:
    decision = GemsMode().policy.handler(find_op("exp")).decide((TensorMeta(torch.complex64, (2,), (1,), torch.device("cpu")),)).decision
    assert decision.kind == "pass" and "complex" in str(decision.reason)
    assert issubclass(Decline, Exception) and registry.default.rules


def test_a_plan_holds_no_tensor() -> None:
    x = torch.ones(37)
    mode = GemsMode()
    with mode:
        y = torch.exp(x)
    gone = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [r() for r in gone] == [None, None]
