"""Choosing ops by name, overload, glob or family: what ``allow=`` and ``deny=`` take."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch._ops import OpOverload, OpOverloadPacket

from gemsmode.errors import UnknownOpError
from gemsmode.native import REFERENCES
from gemsmode.predicates import Predicate
from gemsmode.registry import Registry, Rule, aten_overloads, functional_name, plain_name

Selection: TypeAlias = Iterable[Any] | Mapping[Any, Any] | str | OpOverload | OpOverloadPacket | None


def as_names(selection: Selection) -> Mapping[Any, Any] | tuple[Any, ...] | None:
    """``selection`` as a mapping or a tuple; None stays None."""
    if selection is None or isinstance(selection, Mapping):
        return selection
    return (selection,) if isinstance(selection, (str, OpOverload, OpOverloadPacket)) else tuple(selection)


class Selector:
    """A compiled ``allow`` or ``deny``.

    - ``"mm"``: every overload of ``mm``, its in-place form and the internal op that implements it (``"softmax"`` means
      ``_softmax`` too, ``"layer_norm"`` means ``native_layer_norm``); ``"add_"`` the in-place form alone;
    - ``"add.Tensor"``: one overload;
    - ``"*_backward"``: a glob over these names, or over ``name.overload`` if it holds a dot;
    - ``"reduction"``: every rule of that family (``"family:norm"`` where an op has the same name, which is then what
      ``"norm"`` means);
    - a mapping from any of these to a predicate (or ``...`` for no condition).

    Raises:
        UnknownOpError: a name that selects nothing; the message lists the nearest names.
    """

    def __init__(self, selection: Selection, registry: Registry) -> None:
        names = as_names(selection) or ()
        items = names.items() if isinstance(names, Mapping) else ((name, ...) for name in names)
        self._families: dict[str, Predicate | None] = {}
        self._names: dict[str, Predicate | None] = {}
        self._overloads: dict[str, Predicate | None] = {}
        self._globs: list[tuple[str, Predicate | None]] = []
        families = {rule.family for rule in registry.all_rules()}
        for name, condition in items:
            if condition is not ... and condition is not None and not isinstance(condition, Predicate):
                raise TypeError(f"the condition for {name!r} must be a predicate such as gemsmode.dtype(torch.float16), or ..., "
                                f"not {condition!r}")
            self._add(plain_name(str(name)), condition if isinstance(condition, Predicate) else None, families)

    def _add(self, name: str, condition: Predicate | None, families: set[str]) -> None:
        table = aten_overloads()
        packet, _, overload = name.partition(".")
        if any(c in name for c in "*?["):
            candidates = (f"{p}.{o}" for p, os in table.items() for o in os) if "." in name else iter(known_names())
            if not any(fnmatch.fnmatchcase(c, name) for c in candidates):
                raise UnknownOpError(name, [*known_names(), *families], "op, family or pattern")
            self._globs.append((name, condition))
        elif overload and overload in table.get(packet, ()):
            self._overloads[name] = condition
        elif overload and packet in table:
            raise UnknownOpError(name, (f"{packet}.{o}" for o in table[packet]), "overload")
        elif name in known_names():
            self._names[name] = condition
        elif name.removeprefix("family:") in families:
            self._families[name.removeprefix("family:")] = condition
        else:
            raise UnknownOpError(name, [*known_names(), *families], "op, family or pattern")

    def match(self, op: OpOverload, rule: Rule | None) -> tuple[bool, Predicate | None]:
        """Whether ``op`` (served by ``rule``, if any) is selected, and under which condition; the most exact entry decides."""
        packet = op._schema.name.partition("::")[2]
        overload = f"{packet}.{op._overloadname}"
        if overload in self._overloads:
            return True, self._overloads[overload]
        for name in names_of(packet):
            if name in self._names:
                return True, self._names[name]
        for pattern, condition in self._globs:
            if any(fnmatch.fnmatchcase(n, pattern) for n in ([overload] if "." in pattern else names_of(packet))):
                return True, condition
        if rule is not None and rule.family in self._families:
            return True, self._families[rule.family]
        return False, None


@functools.cache
def known_names() -> frozenset[str]:
    """Every name by which some aten op, or one of gemsmode's own, may be meant."""
    own = [name.split(".")[1] for name in REFERENCES]
    return frozenset(name for packet in (*aten_overloads(), *own) for name in names_of(packet))


@functools.cache
def names_of(packet: str) -> tuple[str, ...]:
    """The names by which a user may mean the op ``packet``, most exact first."""
    names = [packet, functional_name(packet)]
    for name in list(names):
        for prefix in ("native_", "_"):
            if name.startswith(prefix) and not name.startswith("__"):
                names.append(name.removeprefix(prefix))
                if name.endswith("_data"):
                    names.append(name.removeprefix(prefix).removesuffix("_data"))
    return tuple(dict.fromkeys(names))
