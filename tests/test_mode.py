"""GemsMode itself: options, blocks, nesting, decorators, exceptions, a whole process, threads, composites."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import Counting, Spy, decision, stack
from torch import nn

import gemsmode
from gemsmode import GemsMode, Registry, RuleFailedError, UnknownOpError, dtype, handlers, rule


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.linspace(-2, 2, 12, device=device).reshape(3, 4)


@pytest.fixture
def spy() -> Spy:
    return Spy("aten.exp.default", "aten.add.Tensor", "aten.mul.Tensor")


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    assert stack() == []
    yield
    gemsmode.disable()
    left = stack()
    for _ in left:
        torch._C._pop_torch_dispatch_stack(None)
    assert left == []


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_a_block_replaces_and_its_end_restores(x: torch.Tensor, spy: Spy) -> None:
    mode = GemsMode(registry=spy.registry)
    torch.exp(x)
    assert spy.take() == []
    with mode:
        got = torch.exp(x) + 1
    torch.testing.assert_close(got, torch.exp(x) + 1)
    assert spy.take() == ["aten.exp.default", "aten.add.Tensor"]
    with mode:  # re-usable
        torch.exp(x)
    assert spy.take() == ["aten.exp.default"]


def test_the_kernels_of_gemsmode_run(x: torch.Tensor) -> None:
    mode = GemsMode(strict=True)
    with mode:
        got = torch.nn.functional.silu(x + 1)
    torch.testing.assert_close(got, torch.nn.functional.silu(x + 1))
    assert decision(mode, "silu", x).rule == "silu"
    assert decision(mode, "add.Tensor", x, 1).kind == "rule"


def test_an_exception_leaves_the_block_in_order(x: torch.Tensor, spy: Spy) -> None:
    mode = GemsMode(registry=spy.registry)
    with pytest.raises(ZeroDivisionError), mode, GemsMode(deny="exp", registry=spy.registry):
        raise ZeroDivisionError
    assert stack() == []
    with pytest.raises(RuntimeError, match="must match the size"), mode:
        x - torch.ones(5, device=x.device)
    assert stack() == []
    with pytest.raises(ZeroDivisionError), mode:
        try:
            with mode:
                raise ZeroDivisionError
        finally:
            assert stack() == [mode]
    assert stack() == []


def test_the_inner_mode_wins_and_nothing_is_counted_twice(x: torch.Tensor) -> None:
    outer, inner = Spy("aten.exp.default"), Spy("aten.exp.default")
    with GemsMode(registry=outer.registry) as a:
        torch.exp(x)
        with GemsMode(registry=inner.registry) as b:
            assert stack() == [b]
            torch.exp(x)
            torch.exp(x)
        assert stack() == [a]
        torch.exp(x)
    assert (len(outer.calls), len(inner.calls)) == (2, 2)


def test_an_inner_mode_without_the_rule_keeps_the_outer_one_out(x: torch.Tensor, spy: Spy) -> None:
    with GemsMode(registry=spy.registry), GemsMode(registry=spy.registry, deny=["exp"]):
        torch.exp(x)
    assert spy.take() == []


def test_the_same_mode_twice(x: torch.Tensor, spy: Spy) -> None:
    mode = GemsMode(registry=spy.registry)
    with mode, mode, mode:
        assert stack() == [mode]
        torch.exp(x)
    assert spy.take() == ["aten.exp.default"]
    assert stack() == []


def test_blocks_that_end_out_of_order(x: torch.Tensor) -> None:
    first, second = Spy("aten.exp.default"), Spy("aten.exp.default")
    a, b = GemsMode(registry=first.registry), GemsMode(registry=second.registry)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    torch.exp(x)
    b.__exit__(None, None, None)
    torch.exp(x)
    assert (len(first.calls), len(second.calls)) == (0, 1)
    with pytest.raises(RuntimeError, match="has not entered"):
        a.__exit__(None, None, None)


@pytest.mark.parametrize("gems_first", [True, False])
def test_other_modes_see_every_call_whichever_was_entered_first(x: torch.Tensor, spy: Spy, gems_first: bool) -> None:
    mode, other = GemsMode(registry=spy.registry), Counting()
    with mode if gems_first else other, other if gems_first else mode:
        assert stack() == [mode, other]
        torch.exp(x)
        with GemsMode(registry=spy.registry) as inner:
            assert stack() == [inner, other]
            torch.exp(x)
        assert stack() == [mode, other]
    assert stack() == []
    assert other.counts == {"aten.exp.default": 2}
    assert spy.take() == ["aten.exp.default"] * 2


def test_decorator(x: torch.Tensor, spy: Spy) -> None:
    @GemsMode(registry=spy.registry)
    def double(t: torch.Tensor, *, plus: int = 0) -> torch.Tensor:
        """Twice the exponential."""
        return torch.exp(t) * 2 + plus

    torch.testing.assert_close(double(x, plus=1), x.exp() * 2 + 1)
    assert double.__name__ == "double" and double.__doc__ == "Twice the exponential."
    assert spy.take() == ["aten.exp.default", "aten.mul.Tensor", "aten.add.Tensor"]

    class Model(nn.Module):
        @GemsMode(registry=spy.registry)
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return torch.exp(t) if t.ndim == 1 else torch.stack([self.forward(row) for row in t])

    Model()(x)
    assert spy.take() == ["aten.exp.default"] * 3
    assert stack() == []


def test_decorating_what_runs_later_is_refused() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None:
        pass

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match="generator or a coroutine"):
            GemsMode()(function)


def test_a_generator_that_leaves_its_block_late(x: torch.Tensor, spy: Spy) -> None:
    def results() -> Iterator[torch.Tensor]:
        with GemsMode(registry=spy.registry):
            yield torch.exp(x)

    made = results()
    next(made)
    torch.exp(x)  # still inside the generator's block
    made.close()
    torch.exp(x)
    assert len(spy.take()) == 2


# -- options -----------------------------------------------------------------------------------------------------------


def test_allow_and_deny(x: torch.Tensor, spy: Spy) -> None:
    def ran(**options: object) -> list[str]:
        with GemsMode(registry=spy.registry, **options):  # type: ignore[arg-type]
            torch.exp(x) + x * 2
        return [name.split(".")[1] for name in spy.take()]

    assert ran() == ["exp", "mul", "add"]
    assert ran(allow="exp") == ["exp"]
    assert ran(allow=["exp", "add.Tensor"]) == ["exp", "add"]
    assert ran(allow={"ex*", "mul"}) == ["exp", "mul"]
    assert ran(allow=(name for name in ["mul"])) == ["mul"]
    assert ran(allow=torch.ops.aten.add.Tensor) == ["add"]
    assert ran(allow=[torch.ops.aten.exp]) == ["exp"]
    assert ran(allow=[]) == []
    assert ran(deny=["exp"]) == ["mul", "add"]
    assert ran(deny="*") == []
    assert ran(allow=["exp", "mul"], deny="mul.Tensor") == ["exp"]
    assert ran(allow="user") == ["exp", "mul", "add"]
    assert ran(allow={"exp": dtype(torch.float16), "mul": ..., "add": dtype(torch.float32)}) == ["mul", "add"]
    assert ran(deny={"exp": dtype(torch.float32), "mul": dtype(torch.float16)}) == ["mul", "add"]


def test_the_reasons_of_allow_and_deny(x: torch.Tensor, spy: Spy) -> None:
    def why(**options: object) -> str | None:
        return decision(GemsMode(registry=spy.registry, **options), "exp", x).reason  # type: ignore[arg-type]

    assert why(allow="mul") == "not in allow="
    assert why(deny="exp") == "denied by deny="
    assert why(allow={"exp": dtype(torch.float16)}) == "float32 is not in {float16}"
    assert why(deny={"exp": dtype(torch.float32)}) == "denied by deny= (dtype in {float32})"


def test_unknown_names_are_refused_when_the_mode_is_made() -> None:
    with pytest.raises(UnknownOpError, match=r"'sofmax' is not a known op.*'softmax'"):
        GemsMode(allow=["sofmax"])
    with pytest.raises(UnknownOpError, match=r"'add.Tensr' is not a known overload.*'add.Tensor'"):
        GemsMode(deny="add.Tensr")
    with pytest.raises(UnknownOpError):
        GemsMode(allow={"*_forwardx": ...})
    with pytest.raises(TypeError, match="must be a predicate"):
        GemsMode(allow={"mm": torch.float16})


def test_a_mode_without_trace_has_no_report() -> None:
    with pytest.raises(RuntimeError, match="trace=True"):
        _ = GemsMode().report


def test_a_traced_mode_counts_what_an_ordinary_mode_counts(x: torch.Tensor) -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8)).to(x.device)

    def step() -> None:
        layer.zero_grad()
        layer(x.detach().requires_grad_()).sum().backward()

    with Counting() as counting:
        step()
    with GemsMode(trace=True) as gems:
        step()
    rows = gems.report.to_dict()["ops"]
    calls: dict[str, int] = {}
    for row in rows:
        calls[row["overload"]] = calls.get(row["overload"], 0) + row["calls"]
    assert calls == dict(counting.counts)
    assert any(row["decision"] == "rule" for row in rows)


def test_rules_that_come_and_go_are_seen_inside_a_block(x: torch.Tensor, spy: Spy) -> None:
    with GemsMode(registry=spy.registry) as mode:
        torch.neg(x)
        assert decision(mode, "neg", x).reason == "no rule"

        @rule("aten.neg.default", registry=spy.registry)
        def negated(t: torch.Tensor) -> torch.Tensor:
            spy.calls.append("mine")
            return torch.neg(t)

        torch.neg(x)
        assert spy.take() == ["mine"]
        spy.registry.remove("negated")
        torch.neg(x)
        torch.exp(x)
        assert spy.take() == ["aten.exp.default"]


def test_equal_options_share_their_decisions(x: torch.Tensor, spy: Spy) -> None:
    a, b = GemsMode(registry=spy.registry), GemsMode(registry=spy.registry)
    assert a.policy is b.policy
    assert GemsMode(registry=spy.registry, strict=True).policy is not a.policy
    assert GemsMode(registry=spy.registry, allow="exp").policy is not a.policy
    assert GemsMode(registry=Spy("aten.exp.default").registry).policy is not a.policy


def test_decisions_are_logged(x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    spy = Spy("aten.exp.default")

    @rule("aten.neg.default", when=dtype(torch.float16), registry=spy.registry)
    def half_neg(t: torch.Tensor) -> torch.Tensor:
        return torch.neg(t)

    with caplog.at_level(logging.DEBUG, logger="gemsmode"), GemsMode(registry=spy.registry):
        for _ in range(3):
            torch.exp(x)
            torch.neg(x)
    lines = [r.getMessage() for r in caplog.records]
    assert lines.count("exp(float32[3, 4]): rule spy aten.exp.default") == 1  # decided once
    assert lines.count("neg(float32[3, 4]): pass: float32 is not in {float16}") == 1


# -- failing rules -----------------------------------------------------------------------------------------------------


def failing_registry(times: list[int]) -> Registry:
    registry = Registry("failing")

    @rule("aten.exp.default", registry=registry)
    def broken_exp(t: torch.Tensor) -> torch.Tensor:
        times.append(1)
        raise ValueError("no such thing\nsecond line")

    return registry


def test_a_failing_rule_falls_back_once_per_signature(x: torch.Tensor) -> None:
    times: list[int] = []
    mode = GemsMode(registry=failing_registry(times))
    with mode:
        with pytest.warns(RuntimeWarning, match="'broken_exp' failed on exp and PyTorch's own implementation is used: ValueError: no such"):
            got = torch.exp(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.exp(x)
        with pytest.warns(RuntimeWarning):
            torch.exp(x[:2])
    torch.testing.assert_close(got, x.exp())
    assert len(times) == 2
    found = decision(mode, "exp", x)
    assert (found.kind, found.rule, found.reason) == ("error", "broken_exp", "ValueError: no such thing")


def test_a_failing_rule_is_in_the_report(x: torch.Tensor) -> None:
    with pytest.warns(RuntimeWarning), GemsMode(registry=failing_registry([]), trace=True) as gems:
        torch.exp(x)
        torch.exp(x)
    rows = [r for r in gems.report.to_dict()["ops"] if r["overload"] == "aten.exp.default"]
    assert sum(r["calls"] for r in rows) == 2
    assert {r["decision"] for r in rows} == {"error"}
    assert {r["rule"] for r in rows} == {"broken_exp"}


def test_strict_raises(x: torch.Tensor) -> None:
    with GemsMode(registry=failing_registry([]), strict=True):
        for _ in range(2):
            with pytest.raises(RuleFailedError, match=r"rule 'broken_exp' failed on exp: ValueError.*deny") as raised:
                torch.exp(x)
    assert isinstance(raised.value.__cause__, ValueError)


def test_pytorchs_errors_are_not_a_rules_failure(x: torch.Tensor) -> None:
    mode = GemsMode(strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mode:
            with pytest.raises(RuntimeError, match="The size of tensor a"):
                x + x[:, :3]
            base = torch.zeros(8, device=x.device)
            for _ in range(2):  # the rule is not given up after the first
                with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
                    torch.exp(base[:-1], out=base[1:])
            torch.exp(base[:4], out=base[4:])
    assert decision(mode, "exp.out", base[:4], out=base[4:]).kind == "rule"
    with GemsMode(trace=True, strict=True) as gems, pytest.raises(RuntimeError, match=r"single memory location|overlap"):
        torch.exp(base[:-1], out=base[1:])
    assert [r["calls"] for r in gems.report.to_dict()["ops"] if r["overload"] == "aten.exp.out"] == [1]


def test_running_out_of_memory_is_no_failure(x: torch.Tensor) -> None:
    registry = Registry("oom")
    times: list[int] = []

    @rule("aten.exp.default", registry=registry)
    def hungry(t: torch.Tensor) -> torch.Tensor:
        times.append(1)
        raise torch.OutOfMemoryError("too much")

    with GemsMode(registry=registry), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.exp(x)
        torch.exp(x)
    assert len(times) == 2
    torch.testing.assert_close(got, x.exp())


# -- composites --------------------------------------------------------------------------------------------------------

COMPOSITES = {
    "linear": lambda x: nn.functional.linear(x, torch.ones(5, 4, device=x.device), torch.ones(5, device=x.device)),
    "matmul": lambda x: x @ x.t(),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: nn.functional.layer_norm(x, (4,)),
    "rms_norm": lambda x: nn.functional.rms_norm(x, (4,)),
    "dropout": lambda x: nn.functional.dropout(x, 0.0, True),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True),
    "to": lambda x: x.to(torch.float64),
    "reshape": lambda x: x.t().reshape(-1),
    "contiguous": lambda x: x.t().contiguous(),
    "conv": lambda x: nn.functional.conv1d(x[None], torch.ones(2, 3, 2, device=x.device)),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "cross_entropy": lambda x: nn.functional.cross_entropy(x, torch.tensor([0, 1, 2], device=x.device)),
    "chunk": lambda x: x.chunk(2, 1)[1] + 1,
}


def without_bookkeeping(counts: dict[str, int]) -> dict[str, int]:
    """Calls that compute; autograd itself detaches what it saves, and views are taken differently."""
    from gemsmode.native import computes
    from gemsmode.registry import find_op

    return {name: n for name, n in counts.items() if computes(find_op(name))}


@pytest.mark.parametrize("name", COMPOSITES)
def test_coverage_is_the_same_in_grad_no_grad_and_inference(x: torch.Tensor, name: str) -> None:
    function, found, passed, results = COMPOSITES[name], [], [], []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for registry in (Registry("no rules"), None):
            with context(), GemsMode(trace=True, registry=registry) as gems:
                t = x.clone().requires_grad_(context is torch.enable_grad)
                results.append(function(t))
            rows = gems.report.to_dict()["ops"]
            if registry is None:
                passed.append({row["overload"] for row in rows if row["decision"] == "pass"})
                continue
            counts: dict[str, int] = {}
            for row in rows:
                assert row["decision"] != "composite"
                counts[row["overload"]] = counts.get(row["overload"], 0) + row["calls"]
            found.append(without_bookkeeping(counts))
    if name == "rms_norm" and not (2, 13) <= torch.__version__ < (2, 14) and "aten._fused_rms_norm.default" in found[2]:
        del found[2]  # PyTorch 2.11, 2.14 and 2.15 take it on a CPU, unless the call is taken apart above autograd
    assert all(f == found[0] for f in found)
    assert passed[0] == passed[1] >= passed[2]  # a composite may have a rule of its own
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_composites_are_taken_apart_under_each_mode(x: torch.Tensor) -> None:
    spy = Spy("aten.addmm.default")
    weight, bias = torch.ones(5, 4, device=x.device), torch.ones(5, device=x.device)
    with torch.inference_mode():
        with GemsMode(registry=spy.registry) as mode:
            nn.functional.linear(x, weight, bias)
            assert decision(mode, "linear", x, weight, bias).kind == "composite"
        with GemsMode(registry=spy.registry, deny="addmm"):
            nn.functional.linear(x, weight, bias)
        gemsmode.enable(registry=spy.registry)
        nn.functional.linear(x, weight, bias)
        gemsmode.disable()
        # Equal options as the process's mode had, which is now off.
        with GemsMode(registry=spy.registry):
            nn.functional.linear(x, weight, bias)
    assert len(spy.take()) == 3


def test_a_composite_with_a_rule_of_its_own(x: torch.Tensor) -> None:
    spy = Spy("aten.linear.default", "aten.addmm.default")
    weight, bias = torch.ones(5, 4, device=x.device), torch.ones(5, device=x.device)
    with torch.inference_mode(), GemsMode(registry=spy.registry):
        nn.functional.linear(x, weight, bias)
    with torch.inference_mode(), GemsMode(registry=spy.registry, deny="linear"):
        nn.functional.linear(x, weight, bias)
    assert spy.take() == ["aten.linear.default", "aten.addmm.default"]


def test_python_scalars_and_keyword_arguments_reach_rules(x: torch.Tensor) -> None:
    mode = GemsMode(strict=True)
    with mode:
        scaled, shifted = torch.add(x, x, alpha=3), torch.add(input=x, other=2, alpha=0.5)
    torch.testing.assert_close(scaled, 4 * x)
    torch.testing.assert_close(shifted, x + 1)
    assert decision(mode, "add.Tensor", x, x, alpha=3).kind == "rule"


# -- a whole process ---------------------------------------------------------------------------------------------------


def test_enable_and_disable(x: torch.Tensor, spy: Spy) -> None:
    mode = gemsmode.enable(registry=spy.registry)
    assert isinstance(mode, GemsMode)
    torch.exp(x)
    assert len(spy.take()) == 1
    gemsmode.disable()
    torch.exp(x)
    assert spy.take() == []
    gemsmode.disable()  # no harm
    assert stack() == []


def test_a_second_enable_replaces_the_first(x: torch.Tensor) -> None:
    first, second = Spy("aten.exp.default"), Spy("aten.exp.default")
    gemsmode.enable(registry=first.registry)
    gemsmode.enable(registry=second.registry)
    assert len(stack()) == 1
    torch.exp(x)
    gemsmode.disable()
    torch.exp(x)
    assert (len(first.calls), len(second.calls)) == (0, 1)


def test_enable_covers_threads_started_later(x: torch.Tensor, spy: Spy) -> None:
    def work() -> None:
        torch.exp(x)

    def run_threads() -> None:
        class Own(threading.Thread):
            def run(self) -> None:
                work()

        threads = [threading.Thread(target=work), Own(), threading.Timer(0, work)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: work(), range(3)))

    gemsmode.enable(registry=spy.registry)
    run_threads()
    gemsmode.disable()
    assert len(spy.calls) == 6
    assert threading.get_ident() not in spy.threads
    run_threads()
    assert len(spy.take()) == 6


def test_threads_that_live_through_enable_and_disable(x: torch.Tensor) -> None:
    first, second = Spy("aten.exp.default"), Spy("aten.exp.default")
    with ThreadPoolExecutor(1) as pool:
        def in_thread() -> None:
            pool.submit(torch.exp, x).result()

        gemsmode.enable(registry=first.registry)
        in_thread()
        gemsmode.enable(registry=second.registry)  # replaces in the thread too
        in_thread()
        gemsmode.disable()
        in_thread()
        assert (len(first.take()), len(second.take())) == (1, 1)
        gemsmode.enable(registry=first.registry)
        in_thread()
        gemsmode.disable()
        in_thread()
        assert (len(first.take()), len(second.take())) == (1, 0)


def test_enable_covers_backward_in_threads(x: torch.Tensor) -> None:
    spy = Spy("aten.mul.Tensor")
    leaf = x.clone().requires_grad_()

    def train() -> None:
        leaf.exp().sum().backward()

    gemsmode.enable(registry=spy.registry)
    train()
    t = threading.Thread(target=train)
    t.start()
    t.join()
    gemsmode.disable()
    assert spy.take() == ["aten.mul.Tensor"] * 2
    torch.testing.assert_close(leaf.grad, 2 * x.exp())


def test_a_backward_after_the_block_is_not_covered_and_after_enable_is(x: torch.Tensor) -> None:
    spy = Spy("aten.mul.Tensor")
    leaf = x.clone().requires_grad_()
    with GemsMode(registry=spy.registry):
        loss = leaf.exp().sum()
    loss.backward()
    assert spy.take() == []
    with GemsMode(registry=spy.registry):
        leaf.exp().sum().backward()
    assert len(spy.take()) == 1


def test_a_block_wins_over_enable(x: torch.Tensor) -> None:
    process, block = Spy("aten.exp.default"), Spy("aten.exp.default")
    gemsmode.enable(registry=process.registry)
    with GemsMode(registry=block.registry):
        torch.exp(x)
    torch.exp(x)
    gemsmode.disable()
    assert (len(process.take()), len(block.take())) == (1, 1)


def test_enable_and_disable_inside_blocks(x: torch.Tensor) -> None:
    process, block, other = Spy("aten.exp.default"), Spy("aten.exp.default"), Counting()
    with GemsMode(registry=block.registry) as mode:
        enabled = gemsmode.enable(registry=process.registry)
        torch.exp(x)  # the block's
        with GemsMode(registry=block.registry):
            torch.exp(x)
        assert stack() == [mode]
    assert stack() == [enabled]
    torch.exp(x)
    with GemsMode(registry=block.registry):
        gemsmode.disable()
        torch.exp(x)
    torch.exp(x)
    assert (len(process.take()), len(block.take())) == (1, 3)
    with other:
        enabled = gemsmode.enable(registry=process.registry)
        torch.exp(x)
    assert stack() == [enabled]
    with other:
        gemsmode.disable()
        assert stack() == [other]
        torch.exp(x)
    assert len(process.take()) == 1
    assert other.counts["aten.exp.default"] == 2


def test_enable_sees_rules_added_later(x: torch.Tensor) -> None:
    spy = Spy("aten.exp.default")
    first = gemsmode.enable(registry=spy.registry)
    torch.neg(x)

    @rule("aten.neg.default", registry=spy.registry)
    def later(t: torch.Tensor) -> torch.Tensor:
        spy.calls.append("later")
        return torch.neg(t)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.neg, x).result()
        assert spy.take() == ["later"]
        second = gemsmode.enable(registry=spy.registry, allow="neg")
        spy.registry.remove("later")
        pool.submit(torch.neg, x).result()
        torch.exp(x)
    assert spy.take() == []
    assert first is not second


def test_enable_with_trace_reports_every_thread(x: torch.Tensor) -> None:
    mode = gemsmode.enable(trace=True)
    torch.exp(x)
    t = threading.Thread(target=torch.exp, args=(x,))
    t.start()
    t.join()
    gemsmode.disable()
    torch.exp(x)
    assert sum(r["calls"] for r in mode.report.to_dict()["ops"] if r["overload"] == "aten.exp.default") == 2


def test_a_mode_in_one_thread_is_not_in_another(x: torch.Tensor, spy: Spy) -> None:
    with GemsMode(registry=spy.registry):
        t = threading.Thread(target=torch.exp, args=(x,))
        t.start()
        t.join()
    assert spy.take() == []


def test_one_mode_in_many_threads(x: torch.Tensor) -> None:
    mode = GemsMode(strict=True)
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(n: int) -> None:
        try:
            barrier.wait()
            for i in range(15):
                with mode:
                    t = torch.full((n + 1, i + 1), float(n), device=x.device)
                    got = torch.neg(t) + 1
                assert torch.equal(got, 1 - t)
                assert stack() == []
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


# -- bounded -----------------------------------------------------------------------------------------------------------


def test_the_cache_of_decisions_is_bounded(x: torch.Tensor, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "MAX_PLANS", 8)
    mode = GemsMode(registry=spy.registry)
    handler = mode.policy.handler(torch.ops.aten.exp.default)
    with mode:
        for n in range(30):
            torch.exp(torch.zeros(n + 1, device=x.device))
            assert len(handler.decided) <= 8
        torch.exp(torch.zeros(1, device=x.device))
    assert len(handler.decided) == len(handler._plans) == 8
    assert len(spy.take()) == 31
