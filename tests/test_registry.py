"""Rules and the registry: declaring, refusing, deriving variants, priorities, parents, explaining."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import gemsmode
from gemsmode import (
    DuplicateRuleError,
    GemsMode,
    Registry,
    RuleDeclarationError,
    TensorMeta,
    UnknownOpError,
    contiguous,
    dtype,
    explain,
    floating,
    load_ops,
    registry,
    rule,
)
from gemsmode.plan import Decline, Plan
from gemsmode.registry import aten_overloads, find_op, functional_name, planned, short_name
from gemsmode.signature import NUMBERS, parameters, variant_of

load_ops()


@pytest.fixture
def own() -> Registry:
    return Registry("own")


# -- a user's kernel in five lines -------------------------------------------------------------------------------------


@triton.jit
def cube_kernel(p_out, p_in, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_in + o, mask=o < n)
    tl.store(p_out + o, b * b * b, mask=o < n)


@pytest.fixture
def cube(own: Registry) -> Any:
    @rule("aten.silu.default", when=[dtype(torch.float32), contiguous], registry=own)
    def cube(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        cube_kernel[(triton.cdiv(x.numel(), 1024),)](out, x, x.numel(), BLOCK=1024)
        return out

    return cube


def test_a_users_kernel(own: Registry, cube: Any, device: str) -> None:
    x = torch.linspace(-2, 2, 3000, device=device)
    with GemsMode(registry=own, strict=True):
        got = torch.nn.functional.silu(x)
        torch.nn.functional.silu(y := x.clone(), inplace=True)
        z = torch.ops.aten.silu.out(x, out=torch.empty_like(x))
        passed = torch.nn.functional.silu(x.double())
    for result in (got, y, z):
        torch.testing.assert_close(result, x**3)
    torch.testing.assert_close(passed, torch.nn.functional.silu(x.double()))


def test_the_decorated_function_stays_what_it_was(cube: Any, device: str) -> None:
    assert cube.__name__ == "cube"
    torch.testing.assert_close(cube(torch.full((3,), 2.0, device=device)).cpu(), torch.full((3,), 8.0))


def test_a_users_rule_beats_gemsmodes_own(device: str) -> None:
    x = torch.ones(3, device=device)
    mine = Registry("mine", parent=registry.default)

    @rule(["aten.exp.default", "aten.add.Tensor"], name="my rule", registry=mine)
    def always_seven(x: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full_like(x, 7)

    mode = GemsMode(registry=mine, strict=True)
    with mode:
        results = torch.exp(x), x + x, torch.add(x, x, out=torch.empty_like(x)), x.clone().exp_(), torch.neg(x)
    assert [r[0].item() for r in results] == [7, 7, 7, 7, -1]
    for op in ("exp", "exp_", "exp.out", "add.Tensor", "add_.Tensor", "add.out"):
        assert mine.candidates(find_op(op))[0].rule.name == "my rule"
    assert mine.candidates(find_op("neg"))[0].rule.name == "neg"


def test_a_users_rule_in_the_default_registry(device: str) -> None:
    x = torch.ones(3, device=device)

    @rule("aten.exp.default", when=dtype(torch.float64))
    def fours(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 4)

    try:
        with GemsMode(strict=True):
            assert torch.exp(x.double())[0].item() == 4
            assert torch.exp(x)[0].item() == pytest.approx(2.7182817)
    finally:
        registry.default.remove("fours")
    with GemsMode(strict=True):
        assert torch.exp(x.double())[0].item() == pytest.approx(2.718281828459)


def test_a_rule_beats_what_is_more_directly_declared_but_of_lower_priority(own: Registry) -> None:
    rule("aten.add_.Tensor", name="in-place", priority=-100, registry=own)(lambda *a: None)
    rule("aten.add.Tensor", name="functional", priority=0, registry=own)(lambda *a: None)
    rule("aten.add.Tensor", name="narrow", priority=5, registry=own)(lambda *a: None)
    assert [c.rule.name for c in own.candidates(find_op("add_.Tensor"))] == ["narrow", "functional", "in-place"]
    rule("aten.add_.Tensor", name="equal", priority=0, registry=own)(lambda *a: None)
    assert [c.rule.name for c in own.candidates(find_op("add_.Tensor"))] == ["narrow", "equal", "functional", "in-place"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_duplicates_are_refused_naming_both_places(own: Registry) -> None:
    rule("aten.mm.default", name="first", registry=own)(lambda a, b: None)
    line = inspect.currentframe().f_lineno  # type: ignore[union-attr]
    with pytest.raises(DuplicateRuleError) as raised:
        rule("aten.mm.default", name="first", priority=1, registry=own)(lambda a, b: None)
    text = str(raised.value)
    assert "mm has a rule with name 'first' already" in text
    assert f"{__file__}:{line - 1}" in text and f"{__file__}:{line + 2}" in text
    with pytest.raises(DuplicateRuleError, match=r"priority 0 already: first at .*the new one is second at .*higher is tried first"):
        rule(["aten.bmm.default", "aten.mm.default"], name="second", registry=own)(lambda a, b: None)
    rule("aten.mm.default", name="second", priority=1, registry=own)(lambda a, b: None)
    rule("aten.bmm.default", name="first", registry=own)(lambda a, b: None)
    assert [r.name for r in own.rules] == ["first", "second", "first"]  # a refused rule is registered nowhere


def test_one_op_twice_in_one_rule(own: Registry) -> None:
    rule(["aten.mm.default", "mm"], name="twice", registry=own)(lambda a, b: None)
    assert [c.rule.name for c in own.candidates(find_op("mm"))] == ["twice"]


@pytest.mark.parametrize(("name", "message"), [
    ("aten.mmm.default", "'aten.mmm.default' is not a known op; did you mean.*'mm'"),
    ("aten.add.Tenso", "'aten.add.Tenso' is not a known overload; did you mean 'add.Tensor'"),
    ("add", "'add' is not a known overload; did you mean.*'add.Tensor'"),
    ("nothing::at_all", "is not a known op"),
])
def test_unknown_ops_are_refused_at_declaration(own: Registry, name: str, message: str) -> None:
    with pytest.raises(UnknownOpError, match=message):
        rule(name, registry=own)
    with pytest.raises(UnknownOpError):
        planned(name, family="test", registry=own)
    with pytest.raises(UnknownOpError):
        explain(name)


def test_conditions_must_be_predicates(own: Registry) -> None:
    with pytest.raises(RuleDeclarationError, match=r"when= takes predicates \(gemsmode.dtype"):
        rule("aten.mm.default", when=[torch.float16], registry=own)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        rule("aten.mm.default", when=lambda call: True, registry=own)  # type: ignore[arg-type]


def test_removing(own: Registry) -> None:
    rule(["aten.mm.default", "aten.bmm.default"], name="a", registry=own)(lambda a, b: None)
    rule("aten.mm.default", name="b", priority=1, registry=own)(lambda a, b: None)
    own.remove("a")
    assert [r.name for r in own.rules] == ["b"]
    assert own.candidates(find_op("bmm")) == ()
    assert [c.rule.name for c in own.candidates(find_op("mm.out"))] == ["b"]
    with pytest.raises(UnknownOpError, match="'a' is not a known rule"):
        own.remove("a")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aten.add.Tensor", "add.Tensor", "aten::add.Tensor", "torch.ops.aten.add.Tensor",
                                  torch.ops.aten.add.Tensor])
def test_the_ways_to_name_an_overload(name: Any) -> None:
    assert find_op(name) is torch.ops.aten.add.Tensor


def test_names() -> None:
    assert find_op("mm") is find_op("aten.mm.default") is torch.ops.aten.mm.default
    assert find_op("aten.__or__.Tensor") is torch.ops.aten.__or__.Tensor
    assert find_op("aten._softmax.default") is torch.ops.aten._softmax.default
    assert short_name(torch.ops.aten.mm.default) == "mm"
    assert short_name(torch.ops.aten.add.Tensor) == "add.Tensor"
    assert [functional_name(n) for n in ("add", "add_", "__ior__", "__or__")] == ["add", "add", "__or__", "__or__"]
    assert functional_name("_foreach_add_") == "_foreach_add"
    table = aten_overloads()
    assert "Tensor" in table["add"] and "default" in table["mm"]


def test_every_overload_of_aten_can_be_found() -> None:
    missing = []
    for name, overloads in aten_overloads().items():
        for overload in overloads:
            try:
                op = find_op(f"aten.{name}.{overload}")
                parameters(op)
            except Exception as error:
                missing.append((name, overload, str(error)))
    assert len(missing) <= 5, missing  # TorchScript's own builtins


@pytest.fixture
def library() -> Iterator[Any]:
    with torch.library._scoped_library("gemstest", "DEF") as lib:
        lib.define("triple(Tensor x, float by=3.0) -> Tensor")
        lib.define("fused(Tensor x) -> Tensor")
        lib.impl("triple", lambda x, by=3.0: x * by, "CompositeExplicitAutograd")
        lib.impl("fused", lambda x: torch.exp(x) + 1, "CompositeImplicitAutograd")
        yield lib


def test_ops_of_other_libraries(library: Any, own: Registry, device: str) -> None:
    @rule("gemstest.triple.default", registry=own)
    def triple(x: torch.Tensor, by: float = 3.0) -> torch.Tensor:
        return x * by + 100

    @rule("aten.exp.default", registry=own)
    def exp(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 5)

    x = torch.ones(2, device=device)
    assert short_name(find_op("gemstest::triple")) == "gemstest.triple"
    with GemsMode(registry=own, strict=True):
        assert torch.ops.gemstest.triple(x).tolist() == [103, 103]
        assert torch.ops.gemstest.triple(x, 2.0).tolist() == [102, 102]
        assert torch.ops.gemstest.fused(x).tolist() == [6, 6]
        with torch.inference_mode():
            assert torch.ops.gemstest.fused(x).tolist() == [6, 6]


# -- derived variants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "op", "expected"), [
    ("add.Tensor", "add_.Tensor", (True, (0,), (), (0, 1, 2))),
    ("add.Tensor", "add.out", (False, (3,), (), (0, 1, 2))),
    ("add.Tensor", "add.Scalar", (False, (), (1,), (0, 1, 2))),
    ("add.Tensor", "add_.Scalar", (True, (0,), (1,), (0, 1, 2))),
    ("eq.Tensor", "eq.Scalar_out", (False, (2,), (1,), (0, 1))),
    ("pow.Tensor_Tensor", "pow.Scalar", (False, (), (0,), (0, 1))),
    ("sum.dim_IntList", "sum.IntList_out", (False, (4,), (), (0, 1, 2, 3))),
    ("frexp.Tensor", "frexp.Tensor_out", (False, (1, 2), (), (0,))),
    ("clamp.Tensor", "clamp", (False, (), (1, 2), (0, 1, 2))),
    ("where.self", "where.ScalarOther", (False, (), (2,), (0, 1, 2))),
])
def test_how_variants_derive(base: str, op: str, expected: tuple[Any, ...]) -> None:
    variant = variant_of(find_op(op), find_op(base))
    assert variant is not None
    assert (variant.inplace, variant.outs, variant.numbers, variant.order) == expected
    assert variant.base is find_op(base)


@pytest.mark.parametrize(("base", "op"), [
    ("add_.Tensor", "add.Tensor"), ("add.out", "add.Tensor"), ("sum.dim_IntList", "sum"), ("add.Tensor", "sub.Tensor"), ("mm", "addmm"),
    ("max.dim", "max.other"), ("div.Tensor", "div.Tensor_mode"), ("mean.dim", "mean"),
])
def test_what_does_not_derive(base: str, op: str) -> None:
    functional, other = find_op(base), find_op(op)
    variant = variant_of(other, functional)
    if variant is not None:  # by its schema alone; the registry looks at ops of one name
        assert functional_name(functional._schema.name) != functional_name(other._schema.name)


def test_numbers_are_given_only_to_rules_that_take_them(own: Registry) -> None:
    rule("aten.eq.Tensor", name="tensors", registry=own)(lambda a, b: None)
    assert own.candidates(find_op("eq.Scalar")) == ()
    rule("aten.eq.Tensor", name="numbers", priority=1, numbers=True, registry=own)(lambda a, b: None)
    assert [c.rule.name for c in own.candidates(find_op("eq.Scalar"))] == ["numbers"]
    assert [c.rule.name for c in own.candidates(find_op("eq.Tensor"))] == ["numbers", "tensors"]
    assert [c.rule.name for c in own.candidates(find_op("eq_.Tensor"))] == ["numbers", "tensors"]


def test_overloads_lists_what_can_be_served(own: Registry) -> None:
    rule("aten.add.Tensor", name="add", numbers=True, registry=own)(lambda *a: None)
    rule("aten.__or__.Tensor", name="or", registry=own)(lambda *a: None)
    names = {short_name(op) for op in own.overloads()}
    assert names == {"add.Tensor", "add.Scalar", "add.out", "add_.Tensor", "add_.Scalar", "add.Scalar_out", "__or__.Tensor",
                     "__ior__.Tensor"}
    child = Registry("child", parent=Registry("middle", parent=own))
    assert {short_name(op) for op in child.overloads()} == names


def test_no_rule_is_listed_that_cannot_be_keyed() -> None:
    """Every overload that `overloads` lists can be decided for: its arguments have types that a key can hold."""
    mode = GemsMode()
    unkeyable = [str(op) for op in registry.default.overloads() if mode.policy.handler(op).functions is None]
    assert unkeyable == []


# -- registries --------------------------------------------------------------------------------------------------------


def test_a_child_registry_sees_its_parents_rules_come_and_go() -> None:
    top = Registry("top")
    middle = Registry("middle", parent=top)
    bottom = Registry("bottom", parent=middle)
    op = find_op("mm")
    before = bottom.state()
    rule("aten.mm.default", name="of top", registry=top)(lambda a, b: None)
    assert bottom.state() != before
    rule("aten.mm.default", name="of bottom", registry=bottom)(lambda a, b: None)
    rule("aten.mm.default", name="of middle", priority=50, registry=middle)(lambda a, b: None)
    assert [c.rule.name for c in bottom.candidates(op)] == ["of bottom", "of middle", "of top"]  # the nearer registry first
    assert [c.rule.name for c in middle.candidates(op)] == ["of middle", "of top"]
    assert [r.name for r in bottom.all_rules()] == ["of bottom", "of middle", "of top"]
    top.remove("of top")
    assert [c.rule.name for c in bottom.candidates(op)] == ["of bottom", "of middle"]


def test_rules_may_be_added_from_several_threads(own: Registry) -> None:
    failures: list[BaseException] = []

    def add(n: int) -> None:
        try:
            for i in range(20):
                rule("aten.mm.default", name=f"{n} {i}", priority=n * 100 + i, registry=own)(lambda a, b: None)
                own.candidates(find_op("mm.out"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    priorities = [c.rule.priority for c in own.candidates(find_op("mm.out"))]
    assert len(priorities) == 80 and priorities == sorted(priorities, reverse=True)


def test_the_rules_of_gemsmode_leave_room_for_a_users() -> None:
    assert registry.default.rules
    for r in registry.default.rules:
        assert r.priority < 0, r
        assert r.file and r.line > 0, r
        assert r.family != "user", r


def test_rules_say_where_their_kernel_is() -> None:
    found = next(r for r in registry.default.rules if r.name == "silu")
    with open(found.file) as file:
        lines = file.read().splitlines()
    assert any("def silu" in line for line in lines[found.line - 1:found.line + 4])
    assert "silu" in repr(found) and found.where in repr(found)
    assert found.condition.startswith("dtype in {")


# -- planned rules -----------------------------------------------------------------------------------------------------


def test_planners_see_metadata_and_decline_in_words(own: Registry, device: str) -> None:
    seen: list[gemsmode.Call] = []

    @planned("aten.addmm.default", when=floating, family="test", registry=own)
    def plan(call: gemsmode.Call) -> Plan:
        seen.append(call)
        raise Decline("only on Sundays")

    a = torch.ones(2, 2, device=device)
    with GemsMode(registry=own, trace=True) as gems:
        torch.addmm(a, a, a.t(), beta=2)
    (call,) = seen
    assert [type(x) for x in call.args] == [TensorMeta] * 3 + [int, int]
    assert (call["beta"], call["alpha"]) == (2, 1)
    assert call["mat2"].stride == (1, 2)
    assert call.target.device_type == device and call.outs is None
    row = next(r for r in gems.report.to_dict()["ops"] if r["overload"] == "aten.addmm.default")
    assert (row["decision"], row["reason"]) == ("pass", "only on Sundays")


def test_by_value_and_state_are_part_of_the_decision(own: Registry, device: str) -> None:
    setting, planned_for = [1], []

    @planned("aten.leaky_relu.default", family="test", by_value=["negative_slope"], state=[lambda: setting[0]], registry=own)
    def plan(call: gemsmode.Call) -> Plan:
        planned_for.append((call["negative_slope"], setting[0]))
        raise Decline("no")

    x = torch.ones(2, device=device)
    with GemsMode(registry=own):
        for slope in (0.1, 0.2, 0.1, 0, 0.0, True):
            torch.ops.aten.leaky_relu(x, slope)
        setting[0] = 2
        torch.ops.aten.leaky_relu(x, 0.1)
    assert planned_for == [(0.1, 1), (0.2, 1), (0, 1), (0.0, 1), (True, 1), (0.1, 2)]
    assert [type(v) for v, _ in planned_for] == [float, float, int, float, bool, float]


def test_types_of_numbers_are_part_of_the_decision(own: Registry, device: str) -> None:
    planned_for: list[Any] = []

    @planned("aten.add.Tensor", family="test", numbers=True, registry=own)
    def plan(call: gemsmode.Call) -> Plan:
        planned_for.append(call["other"].__class__)
        raise Decline("no")

    x = torch.ones(2, device=device)
    with GemsMode(registry=own):
        for other in (1, 2, 1.0, 2.0, True, x, x[0], 1):
            x + other
    assert planned_for == [int, float, bool, TensorMeta, TensorMeta]
    assert {int, float, bool} <= NUMBERS


# -- explaining --------------------------------------------------------------------------------------------------------


def test_explain(own: Registry, cube: Any, device: str) -> None:
    x = torch.empty(3, 4, device="meta")
    taken = explain("silu", x, registry=own)
    assert taken.decision is not None and taken.decision.rule == "cube"
    text = str(taken)
    assert "aten.silu.default(float32[3, 4])\n  -> rule 'cube' runs" in text
    assert "when: dtype in {float32} and contiguous" in text
    assert f"at:   {__file__}:" in text and "here: taken" in text
    passed = explain("silu_", x.t(), registry=own)
    assert passed.decision is not None and passed.decision.kind == "pass"
    assert "float32[4, 3], strides [1, 4] is not contiguous" in str(passed)
    assert "cube, derived from silu" in str(passed)
    assert "no rule is registered for it" in str(explain("mm", registry=own))
    assert explain("silu", registry=own).decision is None
    real = explain("silu", torch.ones(2, dtype=torch.float64, device=device), registry=own)
    assert real.decision is not None and real.decision.reason == "float64 is not in {float32}"
    described = explain("silu", TensorMeta(torch.float32, (2,), (1,), torch.device(device, 0 if device == "cuda" else None)), registry=own)
    assert described.decision is not None and described.decision.rule == "cube"


def test_explain_with_a_modes_options(own: Registry, cube: Any) -> None:
    x = torch.empty(3, 4, device="meta")
    denied = explain("silu", x, mode=GemsMode(registry=own, deny="silu"))
    assert denied.decision is not None and denied.decision.reason == "denied by deny="
    assert "here: denied by deny=" in str(denied)
    allowed = explain("silu", x, mode=GemsMode(registry=own, allow="silu"))
    assert allowed.decision is not None and allowed.decision.kind == "rule"


def test_explain_counts_arguments() -> None:
    x = torch.empty(2, 2, device="meta")
    with pytest.raises(TypeError, match="needs mat2"):
        explain("mm", x)
    with pytest.raises(TypeError, match="takes 2 arguments, 3 were given"):
        explain("mm", x, x, x)
    with pytest.raises(TypeError, match="has no argument 'beta' left"):
        explain("mm", x, x, beta=1)
    assert "alpha=2" in str(explain("add.Tensor", x, x, alpha=2))
