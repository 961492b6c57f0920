"""New sizes of calls that are known otherwise: what a tape computes is what deciding in full computes, and what runs is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_gpu import TARGET, FakeGpu

from gemsmode import handlers, load_ops, numel, plan, registry
from gemsmode.handlers import OpHandler, Policy
from gemsmode.ops import layout, rows
from gemsmode.plan import contiguous_strides
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta
from gemsmode.sizes import Tape, Traced, Untraceable

load_ops()

pytestmark = pytest.mark.usefixtures("only_interpreted")

HERE = torch.device("cuda", 0)


@pytest.fixture
def only_interpreted(device: str) -> None:
    if device != "cpu":
        pytest.skip("the GPU that these tests imagine runs its kernels in the interpreter")


# -- calls -------------------------------------------------------------------------------------------------------------


class Described:
    """A tensor of which only the metadata is there, of any size."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.device, self._stride = dtype, torch.Size(shape), HERE, stride

    def stride(self) -> tuple[int, ...]:
        return self._stride

    def is_neg(self) -> bool:
        return False

    _is_zerotensor = is_neg


def describe(arg: Any) -> Any:
    """As :func:`gemsmode.signature.describe`, of tensors that are taken to be on the GPU."""
    if isinstance(arg, (Described, torch.Tensor)):
        return TensorMeta(arg.dtype, tuple(arg.shape), arg.stride(), HERE)
    return tuple([describe(a) for a in arg]) if isinstance(arg, (list, tuple)) else arg


BORDERS = (0, 1, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 112, 128, 129, 256, 1000, 1008, 1023, 1024, 1025, 4096, 8192, 8193)
LARGE = (2**15, 2**16 + 1, 2**20, 2**24, 2**30, 2**31 - 2**17 - 1, 2**31 - 2**17, 2**31 - 1, 2**31)


class Draw:
    """Random arguments at the borders of everything that decisions depend on, and often of the same sizes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.often = (1, 16, 48, 1000, 1024)

    def size(self) -> int:
        if self.random.random() < 0.5:
            return self.random.choice(self.often)
        return self.random.choice(LARGE if self.random.random() < 0.03 else BORDERS)

    def shape(self, *ndim: int) -> tuple[int, ...]:
        return tuple([self.size() for _ in range(self.random.choice(ndim or (0, 1, 2, 2, 3, 4)))])

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Described:
        order, how = list(range(len(shape))), self.random.random()
        if not shape or how < 0.5:
            return Described(dtype, shape, contiguous_strides(shape))
        if how < 0.7:
            self.random.shuffle(order)
            dense = contiguous_strides(tuple([shape[d] for d in order]))
            return Described(dtype, shape, tuple([dense[order.index(d)] for d in range(len(shape))]))
        if how < 0.8 and len(shape) == 4:
            return Described(dtype, shape, layout.channels_last_strides(shape) or ())
        if how < 0.9:
            gap = self.random.choice((1, 2, 16))
            return Described(dtype, shape, contiguous_strides(tuple([s + gap for s in shape])))
        strides = list(contiguous_strides(shape))
        strides[self.random.choice(order)] = 0
        return Described(dtype, shape, tuple(strides))

    def pair(self) -> tuple[Described, Described]:
        shape = other = self.shape()
        if self.random.random() < 0.4:
            other = tuple([1 if self.random.random() < 0.2 else s for s in shape])[self.random.choice((0, 0, 1)):]
        kinds = (torch.bfloat16, torch.bfloat16, torch.float32, torch.int64, torch.bool)
        return self.tensor(shape, self.random.choice(kinds[:3])), self.tensor(other, self.random.choice(kinds))

    def reduced(self) -> tuple[Described, list[int], bool]:
        shape = self.shape()
        dims = [len(shape) - 1] if shape else []
        if self.random.random() < 0.3:
            dims = self.random.sample(range(len(shape)), self.random.randint(0, len(shape)))
        return self.tensor(shape), dims, self.random.random() < 0.5

    def parts(self) -> tuple[list[Described], int]:
        shape = self.shape(1, 2, 3, 4)
        dim = self.random.randrange(len(shape))
        return [self.tensor((*shape[:dim], self.size(), *shape[dim + 1:])) for _ in range(self.random.choice((1, 2, 2, 3)))], dim

    def matrices(self, *batch: int) -> tuple[Described, Described]:
        m, n, k = self.size(), self.size(), self.size()
        return self.tensor((*batch, m, k)), self.tensor((*batch, k, n))

    def attention(self) -> tuple[Described, Described, Described]:
        b, h, q, k = self.size(), self.size(), self.random.choice((1, self.size())), self.size()
        return self.tensor((b, h, q, 64)), self.tensor((b, h, k, 64)), self.tensor((b, h, k, 64))


def _like(a: Described, draw: Draw) -> Described:
    return draw.tensor(tuple(a.shape), a.dtype)


def _added_into(draw: Draw) -> tuple[Any, ...]:
    a, b = draw.pair()
    return a, b, 1, _like(a, draw)


def _normalized(draw: Draw) -> tuple[Any, ...]:
    shape = draw.shape(3)
    return draw.tensor(shape), [shape[-1]], draw.tensor(shape[-1:]), draw.tensor(shape[-1:]), 1e-5


OPS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "add.Tensor": lambda draw: (*draw.pair(), 1),
    "add_.Tensor": lambda draw: (*draw.pair(), 1),
    "add.out": _added_into,
    "mul.Tensor": Draw.pair,
    "copy_": lambda draw: (*draw.pair(), False),
    "silu": lambda draw: (draw.tensor(draw.shape()),),
    "masked_fill.Scalar": lambda draw: (draw.tensor(s := draw.shape()), draw.tensor(s, torch.bool), 0),
    "sum.dim_IntList": lambda draw: (*draw.reduced(), None),
    "amax": Draw.reduced,
    "argmax": lambda draw: (draw.tensor(draw.shape()), -1, False),
    "var.correction": lambda draw: (draw.tensor(draw.shape()), None, 1, False),
    "_softmax": lambda draw: (draw.tensor(draw.shape()), draw.random.choice((-1, -1, 0)), False),
    "_softmax_backward_data": lambda draw: (a := draw.tensor(draw.shape()), _like(a, draw), -1, a.dtype),
    "native_layer_norm": _normalized,
    "cat": Draw.parts,
    "stack": lambda draw: ([a := draw.tensor(draw.shape()), _like(a, draw)], 0),
    "flip": lambda draw: (draw.tensor(draw.shape(2)), [0]),
    "index.Tensor": lambda draw: (draw.tensor(draw.shape(2)), [draw.tensor(draw.shape(1), torch.int64)]),
    "embedding": lambda draw: (draw.tensor(draw.shape(2)), draw.tensor(draw.shape(2), torch.int64), -1, False, False),
    "mm": Draw.matrices,
    "bmm": lambda draw: draw.matrices(draw.size()),
    "_scaled_dot_product_efficient_attention": lambda draw: (*draw.attention(), None, False, 0.0, False, None),
}


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would be bound is returned in place of a function: a plan decided in full, or structure and values found the short way."""
    monkeypatch.setattr(handlers, "describe", describe)
    monkeypatch.setattr(plan, "bind", lambda made, *_: made)
    monkeypatch.setattr(plan, "binder", lambda key, *_: lambda values: (key, values))
    monkeypatch.setattr(handlers.Kind, "FEW", 1)
    monkeypatch.setattr(handlers.Kind, "MOST", 40)
    yield


def unwrapped(run: Any) -> tuple[Any, Any]:
    """What is bound, and the positions that its results are copied to, if they are."""
    return (run.args[1], run.args[0]) if hasattr(run, "args") else (run, None)


@pytest.mark.filterwarnings("ignore:gemsmode. rule")
@pytest.mark.parametrize("name", OPS)
def test_what_follows_from_sizes_is_what_is_decided_in_full(bound: None, name: str) -> None:
    handler, draw, short = Policy(registry.default, target=TARGET).handler(find_op(name)), Draw(7), 0
    for _ in range(250):
        args = tuple(OPS[name](draw))
        got = handler._decide_new(handler._key(args), args)
        full = handler.decide(describe(args), bind=False)
        assert got.decision == full.decision, describe(args)
        made, copied = unwrapped(got.run)
        if made.__class__ is tuple and full.plan is not None:
            assert made == plan.structure(full.plan, TARGET, len(args), 0), describe(args)
            assert copied == (full.finish.args[0] if full.finish else None)
            assert all(v.__class__ in (int, tuple, torch.dtype, float) for v in made[1])
            short += 1
    assert short, "no call was served the short way"


def test_declined_calls_stay_declined(bound: None) -> None:
    handler = Policy(registry.default, target=TARGET).handler(find_op("mm"))

    def kind(m: int, k: int, same_k: int) -> str:
        args = tuple([Described(torch.bfloat16, s, contiguous_strides(s)) for s in ((m, k), (same_k, 64))])
        return handler._decide_new(handler._key(args), args).decision.kind

    assert [kind(m, 64, 64) for m in range(33, 60)] == ["rule"] * 27
    assert [kind(m, 64, 65) for m in range(33, 60)] == ["pass"] * 27


def test_conditions_of_users_are_asked_for_every_size(bound: None) -> None:
    handler = Policy(registry.default, {"exp": numel(at_least=100)}, target=TARGET).handler(find_op("exp"))
    for n in range(90, 110):
        args = (Described(torch.float32, (n,), (1,)),)
        assert handler._decide_new(handler._key(args), args).decision.kind == ("rule" if n >= 100 else "pass")
    assert all(not kind.ways for kind in handler._kinds.values())


# -- running -----------------------------------------------------------------------------------------------------------


class Calls:
    """Calls of one op whose CPU tensors stand for the GPU's, decided as a mode decides them."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.handler = gpu, gpu.policy.handler(find_op(name))

    def decide(self, *args: Any) -> handlers.Decided:
        def there(part: Any) -> Any:
            return HERE if isinstance(part, torch.device) else tuple(map(there, part)) if part.__class__ is tuple else part

        return self.handler._decide(there(self.handler._key(args)), args)

    def __call__(self, *args: Any) -> Any:
        return self.gpu.run(self.decide(*args), *args)


@pytest.fixture(params=["flat", "nested"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(handlers, "describe", describe)
    return FakeGpu(monkeypatch, request.param)


def decided_in_full(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of every call that is decided in full from now on."""
    calls: list[Any] = []
    decide = OpHandler.decide
    monkeypatch.setattr(OpHandler, "decide", lambda self, args, *rest, **how: (calls.append(args), decide(self, args, *rest, **how))[1])
    return calls


def test_growing_sizes(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    ops: dict[str, Callable[[int], tuple[tuple[Any, ...], torch.Tensor]]] = {
        "add.Tensor": lambda n: ((a := torch.randn(n, 4), b := torch.randn(4), 1), a + b),
        "_softmax": lambda n: ((a := torch.randn(3, n), -1, False), a.softmax(-1)),
        "sum.dim_IntList": lambda n: ((a := torch.randn(3, n), [-1], False, None), a.sum(-1)),
        "cat": lambda n: (([a := torch.randn(2, n, 4), b := torch.randn(2, 1, 4)], 1), torch.cat([a, b], 1)),
        "mul_.Tensor": lambda n: ((a := torch.randn(n), b := torch.randn(n)), a * b),
        "exp.out": lambda n: ((a := torch.randn(n), torch.empty(n)), a.exp()),
    }
    for name, make in ops.items():
        calls = Calls(gpu, name)
        for n in range(40, 62):
            args, expected = make(n)
            torch.testing.assert_close(calls(*args), expected)
        compiled, full = len(gpu.compiled), decided_in_full(monkeypatch)
        for n in (62, 63, 61, 57):
            args, expected = make(n)
            torch.testing.assert_close(calls(*args), expected)
            decision = calls.decide(*args).decision
            assert decision.kind == "rule" and decision.bytes
        assert (len(gpu.compiled), full) == (compiled, []), name


def test_what_is_checked_at_each_call(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    exp, written = Calls(gpu, "exp"), Calls(gpu, "exp.out")
    for n in range(40, 62):
        exp(torch.randn(n))
        written(torch.randn(n), torch.empty(n))
    full, public = decided_in_full(monkeypatch), gpu.public
    x = torch.randn(63)
    torch.testing.assert_close(exp(x), x.exp())
    assert not full and gpu.public == public
    unaligned = torch.randn(64)[1:]
    torch.testing.assert_close(exp(unaligned), unaligned.exp())
    assert len(full) == 1 and gpu.public == public + 1, "a plan is made for the public way when a call takes it"
    memory = torch.zeros(80)
    with pytest.raises(Exception, match="single memory location"):
        written(memory[4:67], memory[:63])


def test_what_is_kept_is_bounded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "MAX_PLANS", 6)
    gpu.runs_kernels = False
    calls = Calls(gpu, "sum.dim_IntList")
    for ndim in range(1, 10):
        for n in range(2, 12):
            calls(torch.zeros((n,) * min(ndim, 3) + (1,) * max(ndim - 3, 0)), [0], False, None)
            assert len(calls.handler._kinds) <= 6 and len(calls.handler.decided) <= 6
    tried = Calls(gpu, "exp")
    for n in range(2, 200):
        tried(torch.zeros(n))
    (kind,) = tried.handler._kinds.values()
    assert 1 <= len(kind.ways) <= kind.sought <= kind.MOST


# -- tapes -------------------------------------------------------------------------------------------------------------


def _key(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple([(torch.float32, torch.Size(s), contiguous_strides(s), HERE) for s in shapes])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "numel": lambda a, b: (a.numel, a.extent, b.extent),
    "layout": lambda a, b: (a.is_contiguous, a.may_overlap_itself, layout.is_dense(b.shape, a.stride)),
    "merge": lambda a, b: tuple(layout.merge(a.shape, [a.stride, b.stride])),
    "output": lambda a, b: layout.output_strides(a.shape, [a, b]),
    "tile": lambda a, b: tuple(rows.choose_tile(rows.split_rows(a.shape, (1,), [a.stride]), 4, TARGET)) if a.shape[0] else None,
    "blocks": lambda a, b: (-(-a.shape[0] // max(b.shape[0] % 8, 1)), min(a.shape[0], 1 + b.shape[1]), 7 - a.shape[0], a.shape[1] & 24),
    "floats": lambda a, b: (1 - 1 / max(a.shape[0], 1)) * b.shape[0] < 0.75 * b.shape[1],
    "fixed": lambda a, b: ([0] * min(a.shape[0], 3), float(min(b.shape[0], 2)), list(range(min(a.shape[1], 2)))),
    "sorted": lambda a, b: tuple(sorted((*a.shape, *b.shape))) if 0 not in (*a.shape, b.shape[0]) else None,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tape_computes_what_python_computes(name: str) -> None:
    function, draw, followed = FUNCTIONS[name], Draw(3), 0
    tapes: list[Callable[[Any], Any]] = []
    for _ in range(300):
        a = draw.shape(2)
        key = _key(a, a if draw.random.random() < 0.5 else draw.shape(2))
        metas = [TensorMeta(d, tuple(s), t, dev) for d, s, t, dev in key]
        expected = function(*metas)
        for numbers in tapes:
            got = numbers(key)
            if got is not None:
                assert got == (expected,), key
                followed += 1
        if len(tapes) < 60:
            tape = Tape(key)
            tapes.append(tape.function((function(*tape.described(tuple(metas))),)))
            assert tapes[-1](key) == (expected,)
    assert followed > 100


def test_sizes_that_no_tape_can_hold() -> None:
    tape = Tape(_key((6, 4)))
    (meta,) = tape.described((TensorMeta(torch.float32, (6, 4), (4, 1), HERE),))
    n = meta.shape[0]
    assert n.__class__ is Traced
    with pytest.raises(Untraceable):
        hash(meta)
    with pytest.raises(TypeError):
        n + "a"
    assert n != None and n not in (None, "6")  # noqa: E711
    assert "6" not in f"{n} {meta.shape}"
