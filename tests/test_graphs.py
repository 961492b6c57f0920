"""``gemsmode.capture``: signatures, buffers, results, what is refused; on a GPU with graphs, elsewhere with a stand-in."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Spy, skip_without_cuda
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gemsmode
from gemsmode import CaptureError, GemsMode, graphs
from gemsmode.graphs import Captured, CudaGraphs, problem_of


class Tape(TorchDispatchMode):
    """What a graph is on a machine without a GPU: the aten calls of a run, repeated on the same tensors at a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((value, value.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def take_back(self) -> None:
        """Undo what recording wrote: a capture computes nothing."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor, before in reversed(self._before):
                tensor.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                if func._schema.is_mutable or func.is_view:
                    continue
                for old, new in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (result, again))):
                    if isinstance(old, torch.Tensor):
                        old.data.copy_(new)


class Tapes:
    """A backend of :func:`gemsmode.capture` that records tapes of CPU tensors."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.pools = self.warmed = 0
        self.recorded: list[Any] = []
        self.generators: list[Any] = []
        self.under_way = False

    def available(self) -> bool:
        return True

    def capturing(self) -> bool:
        return self.under_way

    def pool(self) -> Any:
        self.pools += 1
        return f"pool {self.pools}"

    def warm_up(self, call: Callable[[], Any], device: int | None) -> Any:
        self.warmed += 1
        return call()

    def record(self, call: Callable[[], Any], device: int | None, pool: Any, generators: Sequence[Any]) -> tuple[Any, Any]:
        tape = Tape()
        self.recorded.append(pool)
        self.generators += generators
        states = torch.get_rng_state()
        self.under_way = True
        try:
            with tape:
                result = call()
        finally:
            self.under_way = False
            torch.set_rng_state(states)
            tape.take_back()
        return tape, result


@pytest.fixture
def backend(device: str) -> Any:
    return CudaGraphs() if device == "cuda" else Tapes()


def runs(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """``function``, with a list that grows at each run of its Python."""
    log: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        log.append(1)
        return function(*args, **kwargs)

    return counted, log


# -- replays -----------------------------------------------------------------------------------------------------------


def test_the_first_call_captures_and_the_others_replay(device: str, backend: Any) -> None:
    spy = Spy("aten.exp.default", "aten.add.Tensor")
    function, log = runs(lambda x, y: torch.exp(x) + y)
    fast = gemsmode.capture(function, mode=GemsMode(registry=spy.registry), backend=backend)
    for i in range(4):
        x, y = torch.randn(3, 4, device=device), torch.randn(4, device=device)
        torch.testing.assert_close(fast(x, y), torch.exp(x) + y)
        assert len(log) == 2, i
    assert (fast.captures, fast.replays, len(fast)) == (1, 3, 1)
    assert spy.take().count("aten.exp.default") >= 2  # under the mode, when it ran and when it was captured
    torch.testing.assert_close(fast(x.double(), y.double()), torch.exp(x.double()) + y.double())
    x = torch.randn(4, 3, device=device).t()
    torch.testing.assert_close(fast(x, y), torch.exp(x) + y)
    assert fast.captures == 3 and repr(fast).startswith("<captured counted: 3 graphs, 3 replays")
    fast.reset()
    assert len(fast) == 0
    torch.testing.assert_close(fast(x, y), torch.exp(x) + y)


def test_signatures(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x, *args, **kwargs: x * 2, backend=backend, max_graphs=100)
    x = torch.ones(2, device=device)
    thing, part = object(), slice(0, 2)
    calls: list[tuple[Any, ...]] = [(x,), (x, 1), (x, 1.0), (x, True), (x, -0.0), (x, 0.0), (x, "a"), (x, None), (x, [1]), (x, (1,)),
                                    (x, {"a": 1}), (x, torch.float16), (x, thing), (x, part), (x, x), (x, x.clone())]
    for i, call in enumerate(calls):
        fast(*call)
        fast(*call)
        assert (fast.captures, fast.replays) == (i + 1, i + 1), call
    fast(x, slice(0, 2))
    fast(x, a=1)
    assert fast.captures == len(calls) + 1
    with torch.no_grad():
        fast(x)
    with torch.inference_mode():
        fast(x)
    assert fast.captures == len(calls) + 3
    layer = nn.Dropout(0.5).to(device)
    dropped = gemsmode.capture(layer, backend=backend)
    for _ in range(2):
        dropped(x)
    layer.eval()
    assert torch.equal(dropped(x), x) and torch.equal(dropped(x), x) and dropped.captures == 2


def test_one_tensor_given_twice_is_not_taken_for_two(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x, y: x - y, backend=backend)
    x, y = torch.ones(3, device=device), torch.zeros(3, device=device)
    for _ in range(2):
        assert torch.equal(fast(x, x), torch.zeros(3, device=device))
        assert torch.equal(fast(x, y), x)


def test_what_the_callable_writes_reaches_the_callers_tensors(device: str, backend: Any) -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return x

    fast = gemsmode.capture(step, backend=backend)
    for clone in (False, True):
        fast = gemsmode.capture(step, backend=backend, clone=clone)
        total, y = torch.zeros(3, device=device), torch.ones(3, device=device)
        for i in range(1, 5):
            got = fast(total, y)
            assert got is total and torch.equal(total, torch.full((3,), float(i), device=device))
    other = torch.full((3,), 10.0, device=device)
    fast(other, y)
    assert other[0] == 11 and total[0] == 4


def test_state_outside_of_the_arguments_is_used_where_it_is(device: str, backend: Any) -> None:
    box = SimpleNamespace(count=torch.zeros((), device=device), seen=torch.zeros(8, device=device))

    def step(x: torch.Tensor, box: Any) -> torch.Tensor:
        box.seen.index_copy_(0, box.count.long().reshape(1), x)
        box.count.add_(1)
        return box.seen * 1

    fast = gemsmode.capture(step, backend=backend)
    for i in range(8):
        out = fast(torch.full((1,), float(i), device=device), box)
    # The first call's work was done once, although its Python ran twice.
    assert torch.equal(out, torch.arange(8.0, device=device)) and box.count == 8 and fast.captures == 1


def test_arguments_by_reference(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x, caches, scale: caches[0].add_(x) * scale, by_reference=("caches", 1), backend=backend)
    cache, other = torch.zeros(3, device=device), torch.zeros(3, device=device)
    x = torch.ones(3, device=device)
    for i in range(1, 4):
        fast(x, [cache], 2)
        assert cache[0] == i
    assert fast.captures == 1
    fast(x, caches=[other], scale=2)
    fast(x, caches=[other], scale=2)
    assert other[0] == 2 and fast.captures == 2


def test_results_are_the_graphs_own_unless_cloned(device: str, backend: Any) -> None:
    x = torch.zeros(3, device=device)
    fast = gemsmode.capture(lambda x: x + 1, backend=backend)
    fast(x)
    first = fast(x)
    second = fast(x + 1)
    assert first is second and second[0] == 2
    fast = gemsmode.capture(lambda x: x + 1, clone=True, backend=backend)
    fast(x)
    first, second = fast(x), fast(x + 1)
    assert first[0] == 1 and second[0] == 2


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: Any = None


@pytest.mark.parametrize("clone", [False, True])
def test_structures_of_results(clone: bool, device: str, backend: Any) -> None:
    kept = object()

    def many(x: torch.Tensor) -> Any:
        y = x + 1
        return {"a": [y, (y, 3)], "pair": Pair(y, None), "out": Out(y, kept), "ordered": OrderedDict(z=y), "same": x}

    fast = gemsmode.capture(many, clone=clone, backend=backend)
    fast(torch.zeros(2, device=device))
    x = torch.ones(2, device=device)
    got = fast(x)
    got["a"].append("the caller's own list")
    got = fast(x)
    assert len(got["a"]) == 2 and got["a"][1][1] == 3 and isinstance(got["pair"], Pair) and isinstance(got["ordered"], OrderedDict)
    assert got["out"].extra is kept and got["same"] is x
    for t in (got["a"][0], got["a"][1][0], got["pair"].first, got["out"].logits, got["ordered"]["z"]):
        assert torch.equal(t, x + 1)


def test_strides_and_shared_elements(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x: x.sum(0), backend=backend)
    square = torch.randn(8, 8, device=device)
    for x in (torch.randn(6, 4, device=device).t(), torch.randn(1, 4, device=device).expand(3, 4), square[::2, 1:5]):
        for _ in range(2):
            torch.testing.assert_close(fast(x), x.sum(0))
    strides = gemsmode.capture(lambda x: (x * 1, x.stride()), backend=backend)
    for i in range(3):
        x = torch.full((1, 4), float(i), device=device).expand(3, 4)
        got, seen = strides(x)
        assert torch.equal(got, x) and seen == (0, 1) and strides.captures == 1


def test_random_numbers_stay_random(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x: torch.rand_like(x), clone=True, backend=backend)
    x = torch.zeros(100, device=device)
    torch.manual_seed(0)
    drawn = [fast(x) for _ in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    torch.manual_seed(0)
    again = [fast(x) for _ in range(3)]
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(again, [fast(x) for _ in range(3)]))
    generator = torch.Generator(device).manual_seed(1)
    own = gemsmode.capture(lambda x, g: torch.empty_like(x).normal_(generator=g), clone=True, backend=backend)
    drawn = [own(x, generator) for _ in range(3)]
    assert not torch.equal(drawn[1], drawn[2]) and own.captures == 1
    if device == "cpu":
        assert backend.generators == [generator]


def test_the_number_of_graphs_is_bounded_and_waste_is_told(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x, n: x * n, max_graphs=2, backend=backend)
    x = torch.ones(2, device=device)
    fast(x, 1), fast(x, 2), fast(x, 1)
    fast(x, 3)  # 2 goes, which was used least recently
    assert (len(fast), fast.captures) == (2, 3)
    fast(x, 1)
    assert fast.captures == 3
    with pytest.warns(RuntimeWarning, match="Pass numbers that change as tensors"):
        for n in range(4, 9):
            assert fast(x, n)[0] == n
    assert len(fast) == 2


def test_graphs_share_a_pool(device: str, backend: Any) -> None:
    first = gemsmode.capture(lambda x: x + 1, backend=backend)
    second = gemsmode.capture(lambda x: x + 2, pool=first, backend=backend)
    x = torch.zeros(4, device=device)
    for _ in range(2):
        assert second(x)[0] == 2
        assert first(x)[0] == 1
        assert first(x.double())[0] == 1
    assert first.pool == second.pool
    if device == "cpu":
        assert backend.pools == 1 and backend.recorded == ["pool 1"] * 3


def test_inside_another_capture_it_is_part_of_that(device: str, backend: Any) -> None:
    inner = gemsmode.capture(lambda x: x + 1, backend=backend)
    outer = gemsmode.capture(lambda x: inner(x) * 2, backend=backend)
    inner(torch.zeros(2, device=device))
    for i in range(3):
        assert outer(torch.full((2,), float(i), device=device))[0] == 2 * (i + 1)
    assert outer.captures == 1


def test_as_a_decorator_and_for_methods(device: str, backend: Any) -> None:
    @gemsmode.capture
    def documented(x: torch.Tensor) -> torch.Tensor:
        """What it does."""
        return x + 1

    assert documented.__doc__ == "What it does." and isinstance(documented, Captured)
    layer = nn.Linear(3, 2).to(device)
    fast = gemsmode.capture(layer.forward, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 3, device=device)
            torch.testing.assert_close(fast(x), layer(x))


def test_a_whole_training_step(device: str, backend: Any) -> None:
    torch.manual_seed(0)
    plain, captured = nn.Linear(4, 1).to(device), nn.Linear(4, 1).to(device)
    captured.load_state_dict(plain.state_dict())

    def step_of(layer: nn.Module) -> Callable[..., Any]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = (layer(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    for layer in (plain, captured):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
    ordinary, fast = step_of(plain), gemsmode.capture(step_of(captured), backend=backend)
    for i in range(4):
        x, y = torch.randn(8, 4, device=device), torch.randn(8, 1, device=device)
        if device == "cpu" and i:
            break  # a tape does not see what autograd's thread does
        torch.testing.assert_close(fast(x, y), ordinary(x, y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(captured.weight, plain.weight, rtol=1e-4, atol=1e-5)
    assert fast.captures == 1


def test_threads(device: str, backend: Any) -> None:
    fast = gemsmode.capture(lambda x: x * 3, clone=True, backend=backend)
    wrong: list[float] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = fast(torch.full((4,), float(i), device=device))
            if device == "cuda":
                torch.cuda.synchronize()
            if float(got[0]) != 3.0 * i:
                wrong.append(float(got[0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and fast.captures == 1


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_mask_is_converted_once(device: str, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boolean masks, expanded ones and those that are written to between two layers; results as without a capture."""
    q = torch.randn(2, 4, 5, 8, device=device)
    keys = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]], device=device)[:, None, None]
    full = (torch.rand(2, 1, 5, 5, device=device) > 0.3) | torch.eye(5, dtype=torch.bool, device=device)
    rows = torch.tensor([True, True, False, True, False], device=device)[:, None].expand(2, 1, 5, 5)
    everywhere = torch.ones((), dtype=torch.bool, device=device).expand(2, 1, 5, 5)
    bias = torch.randn(5, 5, device=device).t()

    def layers(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask) + F.scaled_dot_product_attention(x, x, x, mask)
        return x

    for mask, conversions in ((keys, 1), (full, 1), (rows, 0), (everywhere, 0), (bias, 0)):
        convert, converted = runs(graphs._added)
        monkeypatch.setattr(graphs, "_added", convert)
        step = gemsmode.capture(layers, backend=backend)
        with torch.no_grad():
            first = step(q, mask)
            # At the first call the callable runs twice: as it is, and to be captured.
            assert len(converted) == 2 * conversions, mask.shape
            for got in (first, step(q, mask)):
                torch.testing.assert_close(got, layers(q, mask), rtol=1e-4, atol=1e-4)

    def written(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.clone()
        x = F.scaled_dot_product_attention(x, x, x, mask)
        mask[..., 0] = True
        return F.scaled_dot_product_attention(x, x, x, mask)

    step = gemsmode.capture(written, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(step(q, full), written(q, full), rtol=1e-4, atol=1e-4)


class Attention(TorchFunctionMode):
    """Notes which masks ``scaled_dot_product_attention`` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype | None, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask")
            self.seen.append((None if mask is None else mask.dtype, kwargs.get("is_causal", False)))
        return func(*args, **kwargs)


MASKS: dict[str, tuple[Callable[[int, int, str], torch.Tensor], tuple[torch.dtype | None, bool]]] = {
    "causal": (lambda m, n, d: (torch.arange(m, device=d)[:, None] >= torch.arange(n, device=d)).expand(2, 1, m, n), (None, True)),
    "all": (lambda m, n, d: (torch.arange(m, device=d)[:, None] >= 0).expand(m, n), (None, False)),
    "of the last rows": (lambda m, n, d: torch.arange(m, device=d)[:, None] + 1 >= torch.arange(n, device=d), (torch.float32, False)),
    "a band": (lambda m, n, d: (torch.arange(m, device=d)[:, None] - torch.arange(n, device=d)).abs() < 2, (torch.float32, False)),
    "one for all rows": (lambda m, n, d: (torch.arange(n, device=d) < 3).expand(m, n), (torch.float32, False)),
}


@pytest.mark.parametrize("sizes", [(5, 5), (4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_constants(name: str, sizes: tuple[int, int], device: str, backend: Any) -> None:
    make, expected = MASKS[name]
    m, n = sizes

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mask = make(m, n, device)
        return F.scaled_dot_product_attention(q, k, k, mask) + F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    fast = gemsmode.capture(attend, backend=backend)
    with torch.no_grad():
        for i in range(2):
            q, k = torch.randn(2, 3, m, 8, device=device), torch.randn(2, 3, n, 8, device=device)
            with Attention() as given:
                got = fast(q, k)
            torch.testing.assert_close(got, attend(q, k), rtol=1e-4, atol=1e-4)
            assert given.seen == [expected] * (0 if i else 4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(backend: Any, function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        gemsmode.capture(function, backend=backend)(*args)
    return str(caught.value)


def test_refusals_say_what_and_where(device: str, backend: Any) -> None:
    x = torch.ones(4, device=device)
    elsewhere = torch.ones(4, device="meta" if device == "cpu" else "cpu")
    assert "x is a tensor on" in refused(backend, lambda x: x, elsewhere).replace("argument 0", "x")
    with pytest.raises(CaptureError, match="scale is a tensor on"):
        gemsmode.capture(lambda x, scale: x, backend=backend)(x, scale=elsewhere)
    text = refused(backend, lambda x: x * x.sum().item(), x)
    assert "_local_scalar_dense" in text and "reads a value on the host" in text and "test_graphs.py:" in text and "in <lambda>" in text
    assert "the host must read" in refused(backend, lambda x: torch.nonzero(x), x)
    weight = torch.ones(4, device=device, requires_grad=True)
    assert "argument 0 requires a gradient" in refused(backend, lambda w: w.detach(), weight)
    assert "the result requires a gradient" in refused(backend, lambda x: x * weight, x)
    assert "layout sparse_coo" in refused(backend, lambda x: x, x.to_sparse())
    with torch.no_grad():
        assert gemsmode.capture(lambda w: w * 2, backend=backend)(weight)[0] == 2


def test_a_capture_that_fails_names_its_suspects(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Tapes):
        def record(self, *args: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    if device == "cuda":
        pytest.skip("with a stand-in")
    x, mask = torch.ones(4), torch.tensor([True, False, True, False])
    fast = gemsmode.capture(lambda x: x[mask], backend=Failing())
    with pytest.raises(CaptureError, match=r"operation not permitted .*index.Tensor at .*selects by a mask") as caught:
        fast(x)
    assert isinstance(caught.value.__cause__, RuntimeError)
    # What the callable itself raises is the caller's to see.
    with pytest.raises(RuntimeError, match="must match the size"):
        gemsmode.capture(lambda x: x + torch.ones(3), backend=Tapes())(x)


def is_capturing() -> bool:
    """As libraries ask, through a helper of their own; for the stand-in see the fixture."""
    return torch.cuda.is_current_stream_capturing()


def all_positive(x: torch.Tensor) -> bool:
    return bool((x > 0).all())


def may_skip(x: torch.Tensor) -> bool:
    return not is_capturing() and all_positive(x)


def reads_unless_capturing(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if may_skip(x) else torch.where(x > 0, x * 2, -x)


def reads_whatever_it_asks(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if all_positive(x) and not is_capturing() else x * 3


@pytest.fixture
def asked(device: str, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: backend.under_way)


def test_a_read_that_is_left_out_while_a_stream_captures(device: str, backend: Any, asked: None) -> None:
    fast = gemsmode.capture(reads_unless_capturing, backend=backend)
    for x in (torch.ones(3, device=device), torch.tensor([1.0, -1.0, 3.0], device=device), torch.ones(3, device=device)):
        assert torch.equal(fast(x), x * 2 if (x > 0).all() else torch.where(x > 0, x * 2, -x))
    assert (fast.captures, fast.replays) == (1, 2)


def test_a_read_that_the_capture_meets_is_refused_before_it_is_made(device: str, backend: Any, asked: None) -> None:
    x = torch.ones(3, device=device)
    function, log = runs(reads_whatever_it_asks)
    text = refused(backend, function, x)
    assert "_local_scalar_dense" in text and "reads a value on the host" in text and "in all_positive" in text
    assert "Perhaps" not in text and len(log) == 2
    with pytest.warns(RuntimeWarning, match="reads a value on the host.* runs under the mode as it is"):
        fast = gemsmode.capture(function, backend=backend, uncapturable="eager")
        assert torch.equal(fast(x), x * 2) and len(log) == 4
    assert torch.equal(fast(x), x * 2) and len(log) == 5 and not fast.captures
    # Code that asks nothing is not run a second time.
    function, log = runs(lambda x: x * 2 if all_positive(x) else x)
    assert "in all_positive" in refused(backend, function, x) and len(log) == 1


def test_eager_where_it_cannot_be_captured(device: str, backend: Any) -> None:
    spy = Spy("aten.mul.Tensor")
    function, log = runs(lambda x: x * x.sum().item())
    fast = gemsmode.capture(function, uncapturable="eager", mode=GemsMode(registry=spy.registry), backend=backend)
    with pytest.warns(RuntimeWarning, match="reads a value on the host.* runs under the mode as it is"):
        assert fast(torch.ones(2, device=device))[0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast(torch.full((2,), 2.0, device=device))[0] == 8
    assert len(log) == 2 and spy.take() == ["aten.mul.Tensor"] * 2 and len(fast) == 0


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cuda":
        pytest.skip("with a GPU that PyTorch denies, the mode cannot run either")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spy = Spy("aten.add.Tensor")
    fast = gemsmode.capture(lambda x: x + 1, mode=GemsMode(registry=spy.registry))
    x = torch.zeros(2, device=device)
    with pytest.warns(RuntimeWarning, match="no CUDA GPU, so nothing is captured"):
        assert fast(x)[0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast(x)[0] == 1
    assert spy.take() == ["aten.add.Tensor"] * 2
    with pytest.raises(CaptureError, match="no CUDA GPU"):
        gemsmode.capture(lambda x: x, without_gpu="raise")(x)


def test_unusable_options() -> None:
    with pytest.raises(TypeError, match="takes a callable, not int"):
        gemsmode.capture(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either a mode"):
        gemsmode.capture(print, mode=GemsMode(), prefer="fastest")
    with pytest.raises(ValueError, match="prefer is 'rules'"):
        gemsmode.capture(print, prefer="slowest")
    chooser = gemsmode.capture(print, prefer="fastest").mode._chooser
    assert chooser is not None and chooser.by == "device"
    with pytest.raises(ValueError, match="max_graphs"):
        gemsmode.capture(print, max_graphs=0)
    with pytest.raises(ValueError, match="uncapturable is 'raise' or 'eager'"):
        gemsmode.capture(print, uncapturable="ignore")


def test_copies_between_host_and_device_are_told() -> None:
    aten = torch.ops.aten
    here, there = torch.ones(2), torch.ones(2, device="meta")  # "meta" stands for the GPU
    for device in ("meta", torch.device("meta")):
        to_gpu = problem_of(aten._to_copy.default, (here,), {"device": device}, "meta")
        assert to_gpu is not None and to_gpu.certain and "from the CPU to the GPU" in to_gpu.text
    for func, args, kwargs in ((aten.copy_.default, (here, there), {}), (aten._to_copy.default, (there,), {"device": "cpu"})):
        back = problem_of(func, args, kwargs, "meta")
        assert back is not None and "from the GPU to the CPU" in back.text
    assert problem_of(aten.copy_.default, (there, there), {}, "meta") is None
    assert problem_of(aten._to_copy.default, (there,), {"dtype": torch.int32}, "meta") is None
    assert problem_of(aten._to_copy.default, (here,), {"dtype": torch.int32}, "meta") is None
    assert problem_of(aten._local_scalar_dense.default, (here,), {}, "meta") is None  # of a CPU tensor
    assert problem_of(aten.index.Tensor, (there, [torch.ones(2, dtype=torch.int64, device="meta")]), {}, "meta") is None


def test_what_pytorch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls on ``torch.cuda``, on a machine that has none."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def register_generator_state(self, generator: Any) -> None:
            log.append("register generator")

        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def block(*args: Any, **kwargs: Any) -> Iterator[None]:
        what = ", ".join([*(getattr(a, "name", type(a).__name__ if isinstance(a, Graph) else str(a)) for a in args),
                          *(f"{k}={v}" for k, v in kwargs.items())])
        log.append(f"enter {what}")
        yield
        log.append(f"leave {what}")

    patches = {"is_available": lambda: True, "is_current_stream_capturing": lambda: False, "graph_pool_handle": lambda: "pool",
               "device": block, "stream": block, "current_stream": lambda: Stream("here"), "Stream": Stream, "CUDAGraph": Graph,
               "graph": block}
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    backend = CudaGraphs()
    assert backend.available() and not backend.capturing() and backend.pool() == "pool"
    assert backend.warm_up(lambda: log.append("call") or torch.ones(1), 1) == 1
    assert log == ["enter 1", "side waits for here", "enter side", "call", "leave side", "here waits for side", "leave 1"]
    log.clear()
    graph, _ = backend.record(lambda: log.append("call"), 1, "pool", [torch.default_generator])
    graph.replay()
    assert log == ["enter 1", "register generator", "enter Graph, pool=pool, capture_error_mode=thread_local", "call",
                   "leave Graph, pool=pool, capture_error_mode=thread_local", "leave 1", "replay"]


# -- models ------------------------------------------------------------------------------------------------------------


def small_llama(device: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=50, max_position_embeddings=64)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device)


def of_pointwise_kernels(device: str) -> GemsMode:
    """In the interpreter these are enough of the mode."""
    return GemsMode() if device == "cuda" else GemsMode(allow=["silu"])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_prompt_whose_mask_is_checked_on_the_host(around: Callable[[], Any], device: str, backend: Any, asked: None) -> None:
    """transformers looks whether several sequences were packed into one, unless a stream captures; then it makes a mask."""
    if device == "cpu" and around is torch.inference_mode:
        pytest.skip("a tape does not hold what composite ops do there")
    model = small_llama(device).eval()
    fast = gemsmode.capture(model, mode=of_pointwise_kernels(device), backend=backend)
    with around(), Attention() as given:
        for _ in range(3):
            tokens = torch.randint(0, 50, (2, 7), device=device)
            got = fast(tokens, use_cache=False).logits
            torch.testing.assert_close(got, model(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-4)
    assert fast.captures == 1 and fast.replays == 2 and given.seen == [(None, True)] * 10


def test_training_whose_mask_is_checked_on_the_host(device: str) -> None:
    skip_without_cuda(device)  # a tape does not see what autograd's thread does
    plain, captured = small_llama(device).train(), small_llama(device).train()

    def step_of(model: Any) -> Callable[..., Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True, capturable=True)

        def step(tokens: torch.Tensor) -> torch.Tensor:
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    ordinary, fast = step_of(plain), gemsmode.capture(step_of(captured))
    losses = []
    for _ in range(5):
        tokens = torch.randint(0, 50, (2, 7), device=device)
        losses.append((float(fast(tokens)), float(ordinary(tokens))))
        torch.testing.assert_close(*losses[-1], rtol=1e-3, atol=1e-3)
    assert fast.captures == 1 and fast.replays == 4
    for a, b in zip(captured.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_decoding_with_a_static_cache(device: str, backend: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_llama(device).eval()
    config = model.config
    prompt = torch.randint(0, 50, (1, 5), device=device)

    def generate(step: Callable[..., Any]) -> tuple[list[int], torch.Tensor]:
        cache = transformers.StaticCache(config=config, max_cache_len=16)
        tokens = []
        with torch.no_grad():
            out = model(prompt, past_key_values=cache, use_cache=True)
            for i in range(6):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(token))
                position = torch.full((1, 1), 5 + i, device=device)
                out = step(token, past_key_values=cache, position_ids=position, use_cache=True)
        return tokens, out.logits.clone()

    fast = gemsmode.capture(model, mode=of_pointwise_kernels(device), backend=backend)
    expected, logits = generate(model)
    tokens, got = generate(fast)
    assert tokens == expected and fast.captures == 1 and fast.replays == 5
    torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-4)


def test_autocast_weights_do_not_become_part_of_a_graph(device: str) -> None:
    skip_without_cuda(device)
    layer = nn.Linear(64, 64).to(device)
    fast = gemsmode.capture(layer)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(8, 64, device=device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                got, expected = fast(x), layer(x)
            torch.testing.assert_close(got, expected)
    assert got.dtype == torch.bfloat16 and fast.captures == 1
