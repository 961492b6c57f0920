"""``explain``: which rule would run for a call, or why none, rule by rule, and where the kernels are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from gemsmode.choice import Choice, taken
from gemsmode.choice import default as default_chooser
from gemsmode.handlers import Decision, Policy
from gemsmode.mode import GemsMode, load_ops
from gemsmode.registry import Registry, default, find_op, short_name
from gemsmode.signature import TensorMeta, describe, parameters
from gemsmode.target import current


@dataclass(frozen=True)
class Explanation:
    """An answer of :func:`explain`; ``print`` it, or read its fields.

    Attributes:
        op: the overload.
        decision: what would happen, or None if no arguments were given.
        rules: per rule its name, condition, place and the overload it was derived from (None: its own).
        call: the arguments, as described.
        choice: what ``prefer="fastest"`` has measured of this call, if it has; None if not.
    """

    op: OpOverload
    decision: Decision | None
    rules: tuple[tuple[str, str, str, str | None], ...]
    call: str = ""
    choice: Choice | None = None

    def __str__(self) -> str:
        lines = [f"{self.op}" + (f"({self.call})" if self.call else "")]
        if self.decision is not None:
            d = self.decision
            verdict = {"rule": f"rule {d.rule!r} runs", "pass": f"passes through: {d.reason}",
                       "view": f"passes through (computes nothing): {d.reason}",
                       "comm": f"passes through (communication): {d.reason}", "host": f"passes through (numbers on the host): {d.reason}",
                       "composite": f"is taken apart into other ops: {d.reason}", "error": f"rule {d.rule!r} fails: {d.reason}"}[d.kind]
            lines.append(f"  -> {verdict}")
            if self.choice is not None:
                lines.append(f"     prefer='fastest' takes {'the rule' if self.choice.rule_wins else 'native'}: {self.choice.reason}")
        said = {c.rule: c.reason for c in self.decision.considered} if self.decision else {}
        for name, condition, where, base in self.rules:
            derived = f", derived from {base}" if base else ""
            lines.append(f"  {name}{derived}")
            lines.append(f"    when: {condition}")
            lines.append(f"    at:   {where}")
            if name in said:
                lines.append(f"    here: {said[name] or 'taken'}")
        if not self.rules:
            lines.append("  no rule is registered for it")
        return "\n".join(lines)


def explain(op: str | OpOverload, *args: Any, registry: Registry | None = None, mode: GemsMode | None = None,
            **kwargs: Any) -> Explanation:
    """Say which rule would run for ``op(*args, **kwargs)``, or why not.

    Args:
        op: a name such as ``"aten.mm.default"``, ``"mm"`` or ``"add.Tensor"``, or an overload.
        args: the call's arguments; tensors may be real, on the ``meta`` device, or
            :class:`~gemsmode.signature.TensorMeta`. Meta tensors stand for tensors on the mode's device. With no
            arguments only the rules are listed.
        registry: defaults to the one every mode uses.
        mode: explain under this mode's options (allow, deny...).

    Raises:
        UnknownOpError: there is no such op.
    """
    load_ops()
    found = find_op(op)
    policy = mode.policy if mode is not None else Policy(registry if registry is not None else default)
    rules = tuple((c.rule.name, c.rule.condition, c.rule.where, short_name(c.variant.base) if c.variant else None)
                  for c in policy.registry.candidates(found))
    if not args and not kwargs:
        return Explanation(found, None, rules)
    handler = policy.handler(found)
    bound = _bind(found, args, kwargs)
    here = torch.device(current().device_type)

    def stand_in(value: Any) -> Any:
        if isinstance(value, TensorMeta):
            return value._replace(device=here) if value.device.type == "meta" else value
        return tuple(stand_in(v) for v in value) if isinstance(value, tuple) else value

    metas = tuple(stand_in(describe(a)) for a in bound)
    decided = handler.decide(metas, bind=False)
    choice = None
    if decided.decision.kind == "rule" and policy.target.present:  # nothing was timed on hardware that is not there
        choice = (policy.chooser or default_chooser()).known(handler, metas, decided)
        if choice is not None and policy.chooser is not None:
            decided = taken(handler, decided, choice)
    text = ", ".join(f"{p.name}={a}" if p.kwarg_only else str(a) for p, a in zip(parameters(found), metas)
                     if not (p.has_default and a == p.default))
    return Explanation(found, decided.decision, rules, text, choice)


def _bind(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    declared = parameters(op)
    if len(args) > len(declared):
        raise TypeError(f"{op} takes {len(declared)} arguments, {len(args)} were given: {op._schema}")
    given = dict(zip((p.name for p in declared), args))
    for name, value in kwargs.items():
        if name not in {p.name for p in declared} or name in given:
            raise TypeError(f"{op} has no argument {name!r} left to give: {op._schema}")
        given[name] = value
    missing = [p.name for p in declared if p.name not in given and not p.has_default]
    if missing:
        raise TypeError(f"{op} needs {', '.join(missing)}: {op._schema}")
    return tuple(given.get(p.name, p.default) for p in declared)
