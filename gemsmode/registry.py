"""Rules, and the registry that holds them.

A *simple* rule is an ordinary function of the op's own arguments that launches Triton itself::

    @rule("aten.silu.default", when=dtype(torch.float16))
    def my_silu(x):
        out = torch.empty_like(x)
        my_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel())
        return out

A *planned* rule (:func:`planned`), the kind that ``gemsmode.ops`` uses, is a function from a call's metadata to a
:class:`~gemsmode.plan.Plan`, and costs less host time a call.

In-place, ``out=`` and scalar overloads are derived from the functional rule and the op's schema.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from gemsmode.errors import DuplicateRuleError, RuleDeclarationError, UnknownOpError
from gemsmode.plan import Plan
from gemsmode.predicates import Predicate
from gemsmode.signature import Call, Variant, functional_name, variant_of

log = logging.getLogger("gemsmode")


# -- names of ops ------------------------------------------------------------------------------------------------------


@functools.cache
def aten_overloads() -> dict[str, tuple[str, ...]]:
    """Every aten op with its overloads, by name: ``{"add": ("Tensor", "Scalar", ...)}``."""
    table: dict[str, list[str]] = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = qualified.partition("::")
        if namespace == "aten":
            name, _, overload = rest.partition(".")
            table.setdefault(name, []).append(overload or "default")
    return {name: tuple(sorted(overloads)) for name, overloads in sorted(table.items())}


def plain_name(name: str) -> str:
    """``aten.mm.default``, ``aten::mm`` and ``mm`` without their namespace."""
    return name.removeprefix("torch.ops.").replace("aten::", "").removeprefix("aten.")


def find_op(name: str | OpOverload) -> OpOverload:
    """The overload called ``name`` (``"aten.add.Tensor"``, ``"add.Tensor"``, ``"mm"`` for ``mm.default``).

    Raises:
        UnknownOpError: there is none; the message lists the nearest names.
    """
    if isinstance(name, OpOverload):
        return name
    known = aten_overloads()
    parts = name.removeprefix("torch.ops.").replace("::", ".").split(".")
    namespace = "aten" if parts[0] in known else parts.pop(0)
    packet, overload = parts[0] if parts else namespace, parts[1] if len(parts) > 1 else "default"
    if namespace == "aten" and packet in known and overload not in known[packet]:
        near = f"{packet}." + (overload if len(parts) > 1 else "")
        raise UnknownOpError(name, (f"{packet}.{o}" for o in known[packet]), "overload", near=near)
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError):
        raise UnknownOpError(name, known, near=packet) from None


def short_name(op: OpOverload) -> str:
    """``add.Tensor`` for ``aten.add.Tensor``; ``mm`` for ``aten.mm.default``; other namespaces keep theirs."""
    text = str(op).removeprefix("aten.")
    return text.removesuffix(".default")


# -- rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rule:
    """What may run instead of an op, and when.

    Attributes:
        name: unique among the rules of each of its ops.
        ops: the overloads it serves by itself; variants are derived.
        when: conditions, tried in order.
        implementation: of a simple rule, the function to call; of a planned one, the planner.
        is_planned: which of the two it is.
        priority: higher is tried first; give narrower rules the higher one.
        family: ``"pointwise"``, ``"reduction"``...; a name to select rules by.
        numbers: whether it copes with a Python number in a tensor's place.
        by_value: names of ``Scalar`` or ``float`` arguments whose value the planner looks at.
        state: functions of no argument: global settings that the planner looks at.
        tensor_bits: whether negative-bit and zero tensors reach this op unresolved and must be told apart.
        writes_out: whether the planner writes to ``call.outs`` itself.
        exact_out: whether PyTorch takes only ``out=`` of the results' own dtypes on a GPU, and its metadata functions do
            not say so.
        file: where the kernel is.
        line: its line there.
    """

    name: str
    ops: tuple[OpOverload, ...]
    when: tuple[Predicate, ...]
    implementation: Callable[..., Any]
    is_planned: bool = False
    priority: int = 0
    family: str = "user"
    numbers: bool = False
    by_value: frozenset[str] = frozenset()
    state: tuple[Callable[[], Any], ...] = ()
    tensor_bits: bool = False
    writes_out: bool = False
    exact_out: bool = False
    file: str = ""
    line: int = 0

    @property
    def condition(self) -> str:
        return " and ".join(p.text for p in self.when) or "always"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def admits(self, call: Call) -> tuple[bool, str]:
        """Whether every predicate holds for ``call``, and if not, the reason of the first that does not."""
        for predicate in self.when:
            ok, reason = predicate(call)
            if not ok:
                return False, reason
        return True, ""

    def __repr__(self) -> str:
        return f"<rule {self.name} for {', '.join(short_name(op) for op in self.ops)} at {self.where}>"


@dataclass(frozen=True)
class Candidate:
    """A rule that may serve an op, and how the op is a variant of the rule's own (None: it is the rule's own)."""

    rule: Rule
    variant: Variant | None


def _source_of(function: Any) -> tuple[str, int]:
    plain = inspect.unwrap(getattr(function, "fn", function))
    code = getattr(plain, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code is not None else ("<unknown>", 0)


@dataclass
class Registry:
    """A set of rules. ``gemsmode.registry.default`` is the one that modes use unless told otherwise."""

    name: str = "registry"
    parent: Registry | None = None
    rules: list[Rule] = field(default_factory=list)
    version: int = 0

    def __post_init__(self) -> None:
        self._by_op: dict[OpOverload, list[Rule]] = {}
        self._by_packet: dict[str, dict[OpOverload, None]] = {}
        self._candidates: dict[OpOverload, tuple[Candidate, ...]] = {}
        self._watchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.RLock()

    def add(self, rule: Rule) -> Rule:
        """Register ``rule``.

        Raises:
            DuplicateRuleError: another rule for one of its ops has the same name or priority.
        """
        with self._lock:
            for op in rule.ops:
                for other in self._by_op.get(op, ()):
                    for what in ("name", "priority"):
                        if getattr(other, what) == getattr(rule, what):
                            raise DuplicateRuleError(
                                f"{short_name(op)} has a rule with {what} {getattr(rule, what)!r} already: {other.name} at "
                                f"{other.where}; the new one is {rule.name} at {rule.where}. Give it another {what}"
                                + (" (higher is tried first, narrower rules should be higher)." if what == "priority" else "."))
            self.rules.append(rule)
            for op in rule.ops:
                served = self._by_op.setdefault(op, [])
                served.append(rule)
                served.sort(key=lambda r: -r.priority)
                packet = op._schema.name.partition("::")[2]
                self._by_packet.setdefault(packet, {})[op] = None
            self._changed()
        return rule

    def remove(self, name: str) -> None:
        """Take the rules called ``name`` out again.

        Raises:
            UnknownOpError: there is none.
        """
        with self._lock:
            if not any(r.name == name for r in self.rules):
                raise UnknownOpError(name, (r.name for r in self.rules), "rule")
            self.replace([r for r in self.rules if r.name != name])

    def replace(self, rules: Sequence[Rule]) -> None:
        """Hold exactly ``rules``."""
        with self._lock:
            self.rules.clear()
            self._by_op.clear()
            self._by_packet.clear()
            for rule in rules:
                self.add(rule)
            self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._candidates.clear()
        for watcher in list(self._watchers):
            watcher.rules_changed()

    def watch(self, watcher: Any) -> None:
        """Call ``watcher.rules_changed()`` whenever a rule is added or removed, here or in a parent, while it lives."""
        with self._lock:
            self._watchers.add(watcher)
        if self.parent is not None:
            self.parent.watch(watcher)

    def state(self) -> tuple[int, ...]:
        """A value that changes whenever a rule is added or removed, here or in a parent."""
        return (self.version, *(self.parent.state() if self.parent else ()))

    def all_rules(self) -> Iterator[Rule]:
        """This registry's rules, then its parent's."""
        return itertools.chain(self.rules, self.parent.all_rules() if self.parent else ())

    def _own_candidates(self, op: OpOverload) -> list[Candidate]:
        found = [(-rule.priority, 0, Candidate(rule, None)) for rule in self._by_op.get(op, ())]
        packet = functional_name(op._schema.name.partition("::")[2])
        for base in self._by_packet.get(packet, ()):
            variant = variant_of(op, base) if base is not op and base.namespace == op.namespace else None
            if variant is None:
                continue
            found += [(-rule.priority, 1 + len(variant.numbers), Candidate(rule, variant))
                      for rule in self._by_op[base] if rule.numbers or not variant.numbers]
        # By priority first, so that a user's functional rule is tried before gemsmode's own for the variant.
        found.sort(key=lambda item: item[:2])
        return [candidate for _, _, candidate in found]

    def candidates(self, op: OpOverload) -> tuple[Candidate, ...]:
        """The rules that may serve ``op``, in the order in which they are tried."""
        found = self._candidates.get(op)
        if found is None:
            mine = self._own_candidates(op)
            if self.parent is not None:
                mine += self.parent.candidates(op)
            found = tuple(mine)
            if self.parent is None:
                self._candidates[op] = found
        return found

    def overloads(self) -> dict[OpOverload, tuple[Candidate, ...]]:
        """Every overload that a rule may serve, derived ones included."""
        result = {}
        packets = {op._schema.name.partition("::")[2] for rule in self.all_rules() for op in rule.ops}
        table = aten_overloads()
        for packet in sorted(packets):
            dunder = packet.startswith("__")
            for name in (packet, f"__i{packet[2:]}" if dunder else f"{packet}_"):
                for overload in table.get(name, ()):
                    op = find_op(f"{name}.{overload}")
                    found = self.candidates(op)
                    if found:
                        result[op] = found
        for rule in self.all_rules():
            for op in rule.ops:
                result.setdefault(op, self.candidates(op))
        return result


default = Registry("gemsmode")
"""The rules of ``gemsmode.ops`` and those that users add with ``@rule``."""


def _declare(ops: Any, when: Any) -> tuple[tuple[OpOverload, ...], tuple[Predicate, ...]]:
    names: Sequence[Any] = ops if isinstance(ops, (list, tuple)) else [ops]
    conditions: Sequence[Any] = when if isinstance(when, (list, tuple)) else [when]
    for condition in conditions:
        if not isinstance(condition, Predicate):
            raise RuleDeclarationError("when= takes predicates (gemsmode.dtype(...), gemsmode.contiguous, gemsmode.where(...)), "
                                       f"not {condition!r}")
    return tuple(dict.fromkeys(find_op(name) for name in names)), tuple(conditions)


def rule(ops: str | OpOverload | Sequence[str | OpOverload], when: Predicate | Iterable[Predicate] = (), *,
         name: str | None = None, priority: int = 0, family: str = "user", numbers: bool = False,
         registry: Registry | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the implementation of ops: the simple kind of rule.

    The function is called with the op's own arguments and returns what the op returns. What ``when`` does not admit
    passes through, so it need not be complete. For in-place and ``out=`` variants it is run and its result copied.

    Args:
        ops: full literal names (``"aten.silu.default"``) or overload objects.
        when: predicates, all of which must hold.
        name: defaults to the function's name.
        priority: higher is tried first; the rules of ``gemsmode.ops`` have negative ones, so a user's rule wins.
        family: a name to select rules by.
        numbers: call it also with a Python number where the op takes a tensor (``x + 2`` is ``add.Tensor(x, 2)``), and
            for scalar overloads, or with a 0-dim CPU tensor beside those of a GPU. Without it such calls are not for this rule.
        registry: defaults to the one that every mode uses.

    Raises:
        UnknownOpError: no such op.
        DuplicateRuleError: same name or priority as another rule of the op.
    """
    found, conditions = _declare(ops, list(when) if not isinstance(when, Predicate) else when)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        file, line = _source_of(function)
        (registry or default).add(Rule(name or function.__name__, found, conditions, function, priority=priority,
                                       family=family, numbers=numbers, file=file, line=line))
        return function

    return decorate


def planned(ops: str | OpOverload | Sequence[str | OpOverload], when: Predicate | Sequence[Predicate] = (), *,
            family: str, kernel: Any = None, name: str | None = None, priority: int = -100, numbers: bool = False,
            by_value: Sequence[str] = (), state: Sequence[Callable[[], Any]] = (), tensor_bits: bool = False,
            writes_out: bool = False, exact_out: bool = False,
            registry: Registry | None = None) -> Callable[[Callable[[Call], Plan]], Callable[[Call], Plan]]:
    """Register a planner, a function from a :class:`~gemsmode.signature.Call` to a :class:`~gemsmode.plan.Plan`.

    The planner raises :class:`~gemsmode.plan.Decline` with a reason for what it does not serve. ``kernel`` is the
    function whose place is shown to someone who asks where the op's kernel is. The other arguments are those of
    :class:`Rule`.
    """
    found, conditions = _declare(ops, when)

    def decorate(planner: Callable[[Call], Plan]) -> Callable[[Call], Plan]:
        file, line = _source_of(kernel if kernel is not None else planner)
        (registry or default).add(Rule(name or planner.__name__, found, conditions, planner, True, priority, family, numbers,
                                       frozenset(by_value), tuple(state), tensor_bits, writes_out, exact_out,
                                       file, line))
        return planner

    return decorate
