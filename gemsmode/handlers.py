"""From a mode's options to one handler per op: what a call of each signature does, decided once.

:class:`Policy` is a mode's options made ready; modes with equal options share one, with all its decisions.
:class:`OpHandler` decides for one op: it tries the op's rules in order on a call's metadata, keeps what it decided,
and its ``call`` is what an untraced mode runs.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._C import _dispatch_keys, _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch._ops import OpOverload

from gemsmode import plan as plans_module
from gemsmode import sizes
from gemsmode.errors import RuleFailedError
from gemsmode.native import REFERENCES, communicates, computes, is_composite, key_of_parts, native, native_in_order, numbers_of_host
from gemsmode.plan import Arg, At, Decline, Disjoint, Into, Num, Out, Plan
from gemsmode.predicates import Predicate
from gemsmode.registry import Candidate, Registry, short_name
from gemsmode.selectors import Selection, Selector
from gemsmode.signature import NUMBERS, Call, TensorMeta, Unkeyable, Variant, describe, make_functions, parameters
from gemsmode.target import Target, current

if TYPE_CHECKING:
    from gemsmode.choice import Choice, Chooser

log = logging.getLogger("gemsmode")

MAX_PLANS = 2048
"""Decisions kept for each op; the oldest goes first, so that changing shapes cannot grow memory without bound."""


class Considered(NamedTuple):
    """One rule and why it was not taken (``reason`` is empty for the one that was)."""

    rule: str
    where: str
    reason: str


class Decision(NamedTuple):
    """What happens to the calls of one signature.

    Attributes:
        kind: ``"rule"``, ``"pass"`` (PyTorch's own), ``"view"`` (PyTorch's own, computes nothing), ``"comm"``
            (PyTorch's own, communication between processes), ``"host"`` (PyTorch's own, on 0-dim CPU tensors alone where kernels run
            on another device), ``"composite"`` (taken apart into other ops, which come back to the mode) or ``"error"`` (a rule
            failed; PyTorch's own runs).
        rule: the rule's name for ``"rule"`` and ``"error"``.
        reason: for the others, why, in words.
        considered: every rule looked at, in order.
        bytes: bytes that a call must move, where the rule states it.
        flops: floating-point operations of a call, where the rule states it.
        choice: what rule and native cost, where ``prefer="fastest"`` has chosen between them.
    """

    kind: str
    rule: str | None = None
    reason: str | None = None
    considered: tuple[Considered, ...] = ()
    bytes: int | None = None
    flops: int | None = None
    choice: Choice | None = None


Finish = Callable[[Callable[..., Any]], Callable[..., Any]]


class Decided:
    """A decision with the function that carries it out on the op's arguments, given in order."""

    __slots__ = ("decision", "finish", "plan", "provisional", "run")

    def __init__(self, decision: Decision, run: Callable[..., Any], plan: Plan | None = None, finish: Finish | None = None) -> None:
        self.decision, self.run = decision, run
        self.provisional = False
        """Whether the next call of the signature is to decide again (it could not be timed now)."""
        self.plan = plan
        """Kept only where it was not bound: a thousand plans would slow every garbage collection down."""
        self.finish = finish
        """Beside a plan that was not bound: what else than running it there is to do."""


class Way(NamedTuple):
    """How calls that differ only in sizes from one that was decided are served, where the same follows from their sizes.

    Attributes:
        numbers: from a call's key to ``bytes`` and ``flops`` of the decision and the values of its plan; None where it does not.
        decision: what is the same for all of them.
        bind: from the values to the function that runs the call.
        finish: what else there is to do.
    """

    numbers: Callable[[tuple], tuple[Any, Any, list[Any]] | None]
    decision: Decision
    bind: Callable[[list[Any]], Callable[..., Any]]
    finish: Finish | None


class Kind:
    """Calls that differ only in sizes, and the ways found to serve some of them.

    Attributes:
        ways: in the order in which they are tried.
        decided: calls decided in full since a way was looked for.
        sought: how often one was.
    """

    __slots__ = ("decided", "sought", "ways")

    FEW = 8  # decisions in full before a way is looked for, which costs as much as 20 of them
    MOST = 8  # times that one is looked for

    def __init__(self) -> None:
        self.ways: list[Way] = []
        self.decided = self.sought = 0


# -- plans of variants -------------------------------------------------------------------------------------------------


def _map_refs(value: Any, to: Callable[[Any], Any]) -> Any:
    if value.__class__ is tuple:
        return tuple(_map_refs(v, to) for v in value)
    if value.__class__ is list:
        return [_map_refs(v, to) for v in value]
    return to(value)


def _returned_outs(plan: Plan) -> list[int] | None:
    """The allocations that ``plan`` returns, in order; None if it returns anything else."""
    refs = plan.returns if isinstance(plan.returns, (tuple, list)) and plan.returns.__class__ is not Out else [plan.returns]
    return [r.index for r in refs] if all(r.__class__ is Out for r in refs) else None


def _rewrite(plan: Plan, order: Sequence[int], replaced: dict[int, Arg], into: Sequence[Arg], returns: Any,
             extra_metas: dict[Arg, TensorMeta], disjoint: tuple[Disjoint, ...]) -> Plan:
    """``plan`` in a variant's arguments, with some allocations replaced by tensors that are written."""
    renumber: dict[int, int] = {}
    for i in range(len(plan.allocs)):
        if i not in replaced:
            renumber[i] = len(renumber)

    def to(ref: Any) -> Any:
        cls = ref.__class__
        if cls is Arg:
            return Arg(order[ref.index], ref.item)
        if cls is Num:
            return ref._replace(index=order[ref.index])
        if cls is Out:
            return replaced[ref.index] if ref.index in replaced else Out(renumber[ref.index])
        if cls is Into:
            return into[ref.index]
        if cls is At:
            return At(to(ref.ref), ref.elements)
        return ref

    metas = {to(ref): meta for ref, meta in plan.metas.items()}
    metas.update(extra_metas)
    steps = tuple(s._replace(args=_map_refs(s.args, to)) for s in plan.launches)
    allocs = tuple(a for i, a in enumerate(plan.allocs) if i not in replaced)
    return plan._replace(allocs=allocs, launches=steps, metas=metas, disjoint=disjoint,
                         returns=_map_refs(plan.returns, to) if returns is None else returns)


def _rewrite_staged(plan: Plan, then: Callable[[list[int]], Plan], order: Sequence[int], arity: int) -> Plan:
    """Both stages of ``plan`` in the arguments of a variant that has ``arity`` of them."""

    def second(values: list[int]) -> Plan:
        return _rewrite(then(values), (*order, *range(arity, arity + len(plan.allocs))), {}, (), None, {}, ())

    return _rewrite(plan, order, {}, (), None, {}, ())._replace(then=second)


def _byte_extent(meta: TensorMeta) -> int:
    return meta.extent * meta.dtype.itemsize


# -- policies ----------------------------------------------------------------------------------------------------------


class Policy:
    """The options of a mode, and one handler for each op met so far.

    Args:
        registry: where the rules are.
        allow: if not None, only what it selects may be replaced.
        deny: what it selects is never replaced.
        strict: raise when a rule fails instead of falling back.
        target: what kernels run on; defaults to this process's.
        chooser: if not None, it decides between a rule and the native op.
    """

    def __init__(self, registry: Registry, allow: Selection | Selector = None, deny: Selection | Selector = None, strict: bool = False,
                 target: Target | None = None, chooser: Chooser | None = None) -> None:
        self.registry, self.strict, self.chooser = registry, strict, chooser
        self.target = target or current()
        self.allow = allow if allow is None or isinstance(allow, Selector) else Selector(allow, registry)
        self.deny = deny if deny is None or isinstance(deny, Selector) else Selector(deny, registry)
        self.reentry: Any = None
        """The mode to push while a composite op is taken apart; set by the mode."""
        self._handlers: dict[Any, OpHandler] = {}
        self._registry_state = registry.state()
        self._lock = threading.RLock()

    @property
    def is_current(self) -> bool:
        """False once rules were added or removed since this policy was made."""
        return self._registry_state == self.registry.state()

    def handler(self, op: Any) -> OpHandler:
        found = self._handlers.get(op)
        if found is None:
            with self._lock:
                found = self._handlers.get(op)
                if found is None:
                    found = self._handlers[op] = OpHandler(op, self)
        return found

    def permits(self, op: OpOverload, candidate: Candidate) -> tuple[bool, str, Predicate | None]:
        """Whether allow and deny let ``candidate`` serve ``op``; if not why; and a condition still to be tested."""
        if self.deny is not None:
            selected, condition = self.deny.match(op, candidate.rule)
            if selected and condition is None:
                return False, "denied by deny=", None
            if selected and condition is not None:
                denied = condition
                return True, "", Predicate(f"not {denied.text}", lambda call: (
                    (False, f"denied by deny= ({denied.text})") if denied(call)[0] else (True, "")))
        if self.allow is not None:
            selected, condition = self.allow.match(op, candidate.rule)
            if not selected:
                return False, "not in allow=", None
            return True, "", condition
        return True, "", None


class OpHandler:
    """Decides for one op under one policy."""

    def __init__(self, op: Any, policy: Policy) -> None:
        self.op, self.policy = op, policy
        self.decided: dict[tuple, Decided] = {}
        self._plans: dict[tuple, Callable[..., Any]] = {}
        self._kinds: dict[tuple, Kind] = {}
        # Where decisions are timed they are made one at a time: two would measure, or wait for, each other.
        self._lock = threading.RLock() if policy.chooser is None else policy.chooser.lock
        self.computes = computes(op)
        self._by_name = tuple(p.name for p in parameters(op) if p.kwarg_only) if isinstance(op, OpOverload) else ()
        candidates = policy.registry.candidates(op) if isinstance(op, OpOverload) else ()
        self._candidates: list[tuple[Candidate, Predicate | None, Considered]] = []
        self._refused: list[Considered] = []
        for candidate in candidates:
            ok, reason, condition = policy.permits(op, candidate)
            if ok:
                self._candidates.append((candidate, condition, Considered(candidate.rule.name, candidate.rule.where, "")))
            else:
                self._refused.append(Considered(candidate.rule.name, candidate.rule.where, reason))
        # Not where decisions are timed or nothing is assembled, nor through a user's own conditions, which may look at anything.
        self._traces = policy.chooser is None and not policy.target.interpreted and all(
            condition is None and candidate.rule.is_planned for candidate, condition, _ in self._candidates)
        self.composite = is_composite(op)
        self.functions = None
        self.keyed_by: tuple[frozenset[str], tuple[Callable[[], Any], ...], bool] = frozenset(), (), False
        """What else than metadata the key of a call holds, as :func:`make_functions` is told."""
        why = "no rule" if not candidates else "; ".join(dict.fromkeys(c.reason for c in self._refused))
        if self._candidates:
            rules = [c.rule for c, _, _ in self._candidates]
            chosen_by = () if policy.chooser is None else (torch.are_deterministic_algorithms_enabled,)
            state = dict.fromkeys((*(s for r in rules for s in r.state), *self._current_device(), *chosen_by))
            try:
                self.keyed_by = frozenset().union(*(r.by_value for r in rules)), tuple(state), any(r.tensor_bits for r in rules)
                self.functions = make_functions(op, self._plans, self._miss, self._failed, *self.keyed_by)
            except Unkeyable as error:
                why = str(error)
        if self.functions is not None:
            self.call: Callable[..., Any] = self.functions.call
        elif self.composite:
            self.call = self._decompose
        else:
            self.call = native(op)
        self.fixed = self._passing(why, in_order=False) if self.functions is None else None
        """The one decision for every call, if it does not depend on the call."""

    def _current_device(self) -> tuple[Callable[[], Any], ...]:
        """What a decision depends on where no tensor says which device is meant: the current one, as part of the key."""
        declared = parameters(self.op)
        makes = any(p.name == "device" for p in declared) and not any(p.is_tensor or p.is_tensor_list for p in declared)
        return (torch.cuda.current_device,) if makes and self.policy.target.device_type == "cuda" and self.policy.target.present else ()

    # -- decisions -----------------------------------------------------------------------------------------------------

    def _passing(self, reason: str, considered: Sequence[Considered] = (), in_order: bool = True) -> Decided:
        looked_at = (*self._refused, *considered)
        if self.composite:
            return Decided(Decision("composite", None, reason, looked_at), self._decompose)
        kind = "comm" if communicates(self.op) else "pass" if self.computes else "view"
        return Decided(Decision(kind, None, reason, looked_at), native_in_order(self.op) if in_order else native(self.op))

    def _decompose(self, *args: Any, **kwargs: Any) -> Any:
        if args and not kwargs and self.functions is not None:
            kwargs = {p.name: a for p, a in zip(parameters(self.op), args) if p.kwarg_only}
            args = args[:len(args) - len(kwargs)]
        if self.policy.reentry is None:
            return native(self.op)(*args, **kwargs)
        _push_on_torch_dispatch_stack(self.policy.reentry)
        try:
            reference = REFERENCES.get(str(self.op))
            if reference is not None:
                return reference(*args, **kwargs)
            # Not `decompose`, which prefers decompositions written for tracing to what the op itself does.
            return self.op._op_dk(key_of_parts(self.op, self.policy.target.device_type), *args, **kwargs)
        finally:
            _pop_torch_dispatch_stack(None)

    def lookup(self, args: tuple[Any, ...]) -> Decided:
        """The decision for a call whose arguments are given in order, all of them."""
        if self.fixed is not None:
            return self.fixed
        assert self.functions is not None
        try:
            key = self._key(args)
        except Exception:
            return self._passing(_exotic(args) or "its metadata cannot be read")
        found = self.decided.get(key)
        return found if found is not None and not found.provisional else self._decide(key, args)

    def _key(self, args: tuple[Any, ...]) -> tuple:
        assert self.functions is not None
        if not self._by_name:
            return self.functions.key(*args)
        first = len(args) - len(self._by_name)
        return self.functions.key(*args[:first], **dict(zip(self._by_name, args[first:])))

    def _miss(self, args: tuple[Any, ...], key: tuple | None) -> Callable[..., Any]:
        """What to run for a call whose key was not found (None: could not be built)."""
        if key is None:
            return self.lookup(args).run
        return self._decide(key, args).run

    def _decide(self, key: tuple, args: tuple[Any, ...]) -> Decided:
        with self._lock:
            if exotic := _exotic(args):
                # Not kept: a plain tensor of the same metadata has the same key.
                return self._passing(exotic)
            decided = self.decided.get(key)
            if decided is None:
                decided = self._decide_new(key, args)
            elif not decided.provisional:
                return decided  # another thread's, in the meantime
            if self.policy.chooser is not None and decided.decision.kind == "rule":
                decided.provisional = False
                decided = self.policy.chooser.choose(self, args, decided)
            if len(self.decided) >= MAX_PLANS:
                oldest = next(iter(self.decided))
                self._plans.pop(oldest, None)
                self.decided.pop(oldest, None)
            self.decided[key] = decided
            if not decided.provisional:
                self._plans[key] = decided.run
        if log.isEnabledFor(logging.DEBUG):
            d = decided.decision
            log.debug("%s(%s): %s", short_name(self.op), ", ".join(str(describe(a)) for a in args),
                      f"rule {d.rule}" if d.kind == "rule" else f"{d.kind}: {d.reason}")
        return decided

    def _decide_new(self, key: tuple, args: tuple[Any, ...]) -> Decided:
        """Decide for a signature that was not met before, the short way if only its sizes are new."""
        assert self.functions is not None
        name = self.functions.kind(key)
        kind = self._kinds.get(name)
        if kind is None:
            if len(self._kinds) >= MAX_PLANS:
                self._kinds.pop(next(iter(self._kinds)))
            kind = self._kinds[name] = Kind()
        ways = kind.ways
        for i, (numbers, decision, bind, finish) in enumerate(ways):
            found = numbers(key)
            if found is not None:
                if i:
                    ways.insert(0, ways.pop(i))
                moved, flops, values = found
                run = bind(values)
                return Decided(Decision(*decision[:4], moved, flops), finish(run) if finish else run)
        described = tuple([describe(a) for a in args])
        decided = self.decide(described)
        if self._traces and decided.decision.kind == "rule" and kind.sought < kind.MOST:
            kind.decided += 1
            if kind.decided >= kind.FEW:
                kind.decided, kind.sought = 0, kind.sought + 1
                if (way := self._way(key, described)) is not None:
                    ways.insert(0, way)
        return decided

    def _way(self, key: tuple, args: tuple[Any, ...]) -> Way | None:
        """How calls that differ only in sizes from the described ``args``, which a rule serves, are served; None if it cannot be said."""
        target, device = self.policy.target, self._device(args)[0]
        tape = sizes.Tape(key)
        try:
            traced = self.decide(tape.described(args), bind=False, falls_back=False)
            decided = self.decide(args, bind=False, falls_back=False)
            if traced.plan is None or decided.plan is None or traced.plan.then is not None:
                return None
            finish = traced.finish
            if finish is not None and getattr(finish, "func", None) != self._copying:
                return None
            structure, values = plans_module.structure(traced.plan, target, len(args), device)
            numbers = tape.function((*traced.decision[4:6], values))
            # What was traced must agree with what is decided without.
            same, expected = plans_module.structure(decided.plan, target, len(args), device)
            if structure != same or traced.decision[:4] != decided.decision[:4] or numbers(key) != (*decided.decision[4:6], expected):
                return None
            bind = plans_module.binder(structure, self._plan_of, target, self._refuse, device)
        except (sizes.Untraceable, Exception):
            return None
        return None if bind is None else Way(numbers, decided.decision, bind, finish)

    def _plan_of(self, args: tuple[Any, ...]) -> Plan:
        plan = self.decide(tuple([describe(a) for a in args]), bind=False).plan
        assert plan is not None
        return plan

    def decide(self, args: tuple[Any, ...], bind: bool = True, falls_back: bool = True) -> Decided:
        """Decide for a call described by metadata; ``bind=False`` makes the plan and does not compile it.

        ``falls_back=False`` lets an error of a rule's through.
        """
        if self.fixed is not None:
            return self.fixed
        device, reason = self._device(args)
        if reason:
            passing = self._passing(reason)
            if passing.decision.kind == "pass" and self.policy.target.device_type != "cpu" and numbers_of_host(args):
                passing.decision = passing.decision._replace(kind="host")
            return passing
        considered: list[Considered] = []
        for candidate, condition, taken in self._candidates:
            rule = candidate.rule
            try:
                return self._try(candidate, condition, args, device, bind, (*self._refused, *considered, taken))
            except Decline as refusal:
                considered.append(Considered(rule.name, rule.where, str(refusal)))
            except Exception as error:
                if not falls_back:
                    raise
                return self._fall_back(rule.name, error, considered)
        reasons = dict.fromkeys(c.reason for c in considered)
        return self._passing("; ".join(reasons), considered)

    def _device(self, args: tuple[Any, ...]) -> tuple[int, str]:
        """The device index that all tensors share, or why the call passes through."""
        wanted = self.policy.target.device_type
        index: int | None = None
        only = None
        for a in args:
            if a.__class__ is TensorMeta:
                if only is None:
                    only = a.device
                elif a.device != only:
                    break
            elif a.__class__ is tuple and a and a[0].__class__ is not int:
                break
        else:
            if only is not None and only.type == wanted and only.index is not None:
                return only.index, ""
        tensors = [t for a in args for t in (a if a.__class__ is tuple else (a,)) if t.__class__ is TensorMeta]
        here = False
        for meta in tensors:
            if meta.device.type != wanted:
                if meta.device.type == "cpu" and meta.ndim == 0 and len(tensors) > 1:
                    if any(p.is_written and a is meta for p, a in zip(parameters(self.op), args)):
                        return 0, "the tensor to be written is on the CPU"
                    continue
                return 0, f"device {meta.device}; the mode works on {wanted}"
            here = True
            if index is not None and meta.device.index != index:
                return 0, "tensors on several devices"
            index = meta.device.index
        if not tensors:
            named = next((a for p, a in zip(parameters(self.op), args) if p.name == "device"), None)
            device = torch.device(named) if named is not None else torch.device("cpu")
            if device.type != wanted:
                return 0, f"device {device}; the mode works on {wanted}"
            index = device.index
        elif not here:
            return 0, f"device {tensors[0].device}; the mode works on {wanted}"
        if index is None and wanted == "cuda" and self.policy.target.present:
            index = torch.cuda.current_device()
        return index or 0, ""

    def _try(self, candidate: Candidate, condition: Predicate | None, args: tuple[Any, ...], device: int, bind: bool,
             considered: tuple[Considered, ...]) -> Decided:
        rule, variant, target = candidate.rule, candidate.variant, self.policy.target
        base_args = args if variant is None else tuple(args[i] for i in variant.order)
        call = Call(self.op if variant is None else variant.base, base_args, target)
        if condition is not None:
            ok, reason = condition(call)
            if not ok:
                raise Decline(reason)
        ok, reason = rule.admits(call)
        if not ok:
            raise Decline(reason)
        if not rule.is_planned:
            if not rule.numbers and any(p.is_tensor and a.__class__ in NUMBERS and a is not None
                                        for p, a in zip(parameters(call.op), base_args)):
                raise Decline("a Python number in a tensor's place; a rule made with numbers=True takes it")
            if not rule.numbers and target.device_type != "cpu" and any(m.device.type == "cpu" for m in call.tensors):
                raise Decline("a CPU scalar tensor among the arguments; a rule made with numbers=True takes it")
            return Decided(Decision("rule", rule.name, None, considered), self._simple(rule.implementation, variant))
        plan = rule.implementation(call)
        if target.device_type != "cpu" and any([m.device.type == "cpu" for m in plan.metas.values()]):
            raise Decline("a CPU scalar tensor among the arguments")
        decision = Decision("rule", rule.name, None, considered, plan.bytes, plan.flops)
        finish: Finish | None = None
        if variant is not None:
            plan, finish = self._as_variant(plan, candidate, call, args)
        if not bind:
            return Decided(decision, native_in_order(self.op), plan, finish)
        run = plans_module.bind(plan, target, len(args), self._refuse, device)
        return Decided(decision, finish(run) if finish else run)

    # -- variants ------------------------------------------------------------------------------------------------------

    def _as_variant(self, plan: Plan, candidate: Candidate, call: Call, args: tuple[Any, ...]
                    ) -> tuple[Plan, Finish | None]:
        rule, variant = candidate.rule, candidate.variant
        assert variant is not None
        if plan.then is not None:
            staged = _rewrite_staged(plan, plan.then, variant.order, len(args))
            return staged, functools.partial(self._placing, variant) if variant.outs else None
        if not variant.outs:
            return _rewrite(plan, variant.order, {}, (), None, {}, plan.disjoint), None
        produced = _returned_outs(plan)
        if produced is None:
            raise Decline("the rule's result is not written to out=")
        results = [plan.allocs[i].meta for i in produced]
        outs = [args[i] for i in variant.outs]
        targets = [Arg(i) for i in variant.outs]
        for result, out in zip(results, outs):
            if out.may_overlap_itself:
                raise Decline("the tensor to be written overlaps itself")
            if not torch.can_cast(result.dtype, out.dtype):
                raise Decline(f"PyTorch rejects it: a result of {result.dtype} cannot be written to {out.dtype}")
        if not variant.inplace and any(result.dtype != out.dtype for result, out in zip(results, outs)):
            if rule.exact_out and self.policy.target.device_type != "cpu":
                raise Decline("PyTorch rejects it: out= of another dtype")
            _ask_native(self.op, args)
        if any(result.shape != out.shape for result, out in zip(results, outs)):
            if variant.inplace:
                raise Decline("PyTorch rejects it: the result's shape is not that of the tensor to be written")
            return plan._replace(allocs=(), launches=(), metas={}, returns=None), functools.partial(self._resizing, variant.outs, results)
        returns: Any = targets[0] if len(targets) == 1 else tuple(targets)
        # An allocation that is filled with zeros first stays a fresh tensor.
        fits = all(r.dtype == o.dtype and (r.stride == o.stride or r.numel == 0) for r, o in zip(results, outs)) and not any(
            plan.allocs[i].zero for i in produced)
        reads_written = variant.inplace and not plan.elementwise
        if (not fits or reads_written) and rule.writes_out:
            call.outs, call.inplace = tuple(outs), variant.inplace
            plan = rule.implementation(call)
            fits, reads_written, produced = True, False, []
        copies = not fits or reads_written
        extra = dict(zip(targets, outs))
        own = {Arg(variant.order[ref.index], ref.item): meta for ref, meta in plan.metas.items()}
        disjoint = []
        for i, (ref, out) in enumerate(extra.items()):
            for other, meta in (*own.items(), *list(extra.items())[:i]):
                # An in-place op that is not elementwise may read what it writes, from a fresh tensor.
                if other == ref or (reads_written and other in own):
                    continue
                same = plan.elementwise and (meta.shape, meta.stride, meta.dtype) == (out.shape, out.stride, out.dtype) and other in own
                disjoint.append(Disjoint(ref, other, _byte_extent(out), _byte_extent(meta), same))
        if copies:
            functional = _rewrite(plan, variant.order, {}, (), None, extra, tuple(disjoint))
            return functional, functools.partial(self._copying, variant.outs)
        replaced = dict(zip(produced, targets))
        return _rewrite(plan, variant.order, replaced, targets, returns, extra, tuple(disjoint)), None

    def _resizing(self, positions: tuple[int, ...], results: list[TensorMeta], run: Callable[..., Any]) -> Callable[..., Any]:
        """Resize ``out=`` as PyTorch does (with its warning, unless it is empty), then decide again."""

        def resize(*args: Any) -> Any:
            for position, result in zip(positions, results):
                out = args[position]
                if tuple(out.shape) != result.shape:
                    _resize_output(out, result.shape)
                    if tuple(out.stride()) != result.stride:
                        out.as_strided_(result.shape, result.stride)
            again = self.lookup(args)
            try:
                return again.run(*args)
            except Exception as error:
                return self._failed(error, again.run, args)

        return resize

    def _placing(self, variant: Variant, run: Callable[..., Any]) -> Callable[..., Any]:
        """Run into fresh tensors whose sizes are only then known, and copy the results where they belong."""

        def run_and_place(*args: Any) -> Any:
            results = run(*args)
            results = (results,) if isinstance(results, torch.Tensor) else results
            outs = [args[p] for p in variant.outs]
            if any(r.dtype != o.dtype or (variant.inplace and r.shape != o.shape) or TensorMeta.of(o).may_overlap_itself
                   for r, o in zip(results, outs)):
                return self._refuse(*args)
            for out, result in zip(outs, results):
                _put(out, result)
            return outs[0] if len(outs) == 1 else tuple(outs)

        return run_and_place

    def _copying(self, positions: tuple[int, ...], run: Callable[..., Any]) -> Callable[..., Any]:
        """Run into fresh tensors and copy the results where they belong."""

        def run_and_copy(*args: Any) -> Any:
            results = run(*args)
            if len(positions) == 1:
                out = args[positions[0]]
                # PyTorch's own implementation ran, and wrote it itself.
                return out if results is out else out.copy_(results)
            return tuple([args[p] if r is args[p] else args[p].copy_(r) for p, r in zip(positions, results)])

        return run_and_copy

    def _simple(self, function: Callable[..., Any], variant: Variant | None) -> Callable[..., Any]:
        """A simple rule's function, called as people call the op: defaults left out, keywords by name."""
        declared = parameters(self.op if variant is None else variant.base)
        order = range(len(declared)) if variant is None else variant.order
        writes_first = variant is None and bool(declared) and declared[0].is_written

        def call(args: tuple[Any, ...]) -> Any:
            given = [args[i] for i in order]
            keywords = {}
            while given and declared[len(given) - 1].kwarg_only:
                p, value = declared[len(given) - 1], given.pop()
                if not (p.has_default and _same(value, p.default)):
                    keywords[p.name] = value
            while given and declared[len(given) - 1].has_default and _same(given[-1], declared[len(given) - 1].default):
                given.pop()
            return function(*given, **keywords)

        def run(*args: Any) -> Any:
            result = call(args)
            return args[0] if result is None and writes_first else result

        return run if variant is None or not variant.outs else self._writing(call, variant)

    def _writing(self, call: Callable[[tuple[Any, ...]], Any], variant: Variant) -> Callable[..., Any]:
        """Run a simple functional rule and put its results where an in-place or ``out=`` call wants them."""

        def run(*args: Any) -> Any:
            outs = [args[i] for i in variant.outs]
            others = [t for i, a in enumerate(args) if i not in variant.outs
                      for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, torch.Tensor)]
            if any(TensorMeta.of(out).may_overlap_itself or any(_same_memory(out, t) for t in others) for out in outs):
                return self._refuse(*args)
            results = call(args)
            results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
            for out, result in zip(outs, results):
                if not torch.can_cast(result.dtype, out.dtype) or (variant.inplace and out.shape != result.shape):
                    return self._refuse(*args)
            for out, result in zip(outs, results):
                _put(out, result)
            return outs[0] if len(outs) == 1 else tuple(outs)

        return run

    # -- failures ------------------------------------------------------------------------------------------------------

    def _fall_back(self, rule: str, error: Exception, considered: Sequence[Considered] = ()) -> Decided:
        """The decision after ``rule`` raised ``error``: PyTorch's own implementation, with a warning; or raise."""
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__  # the interpreter wraps an error once for each function it went through
        text = f"{type(root).__name__}: {str(root).strip().splitlines()[0] if str(root).strip() else ''}"
        if self.policy.strict:
            raise RuleFailedError(f"rule {rule!r} failed on {short_name(self.op)}: {text}. "
                                  "Fix it, deny the op (deny=[...]) or drop strict=True to fall back to PyTorch's own.") from error
        message = f"gemsmode: rule {rule!r} failed on {short_name(self.op)} and PyTorch's own implementation is used: {text}"
        warnings.warn(message, RuntimeWarning, stacklevel=6)
        log.debug("%s", message, exc_info=error)
        return Decided(Decision("error", rule, text, (*self._refused, *considered)), native_in_order(self.op))

    def _refuse(self, *args: Any) -> Any:
        """PyTorch's own implementation, for a call that a rule must not serve; what it raises is the user's to see."""
        try:
            return native_in_order(self.op)(*args)
        except Exception as error:
            raise _FromPyTorch(error) from None

    def _is_invalid(self, args: tuple[Any, ...]) -> bool:
        """Whether PyTorch rejects the call: tried on copies, since it may write."""

        def copied(arg: Any) -> Any:
            return [copied(a) for a in arg] if arg.__class__ in (list, tuple) else arg.clone() if isinstance(arg, torch.Tensor) else arg

        try:
            native_in_order(self.op)(*map(copied, args))
        except Exception:
            return True
        return False

    def _failed(self, error: Exception, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``run`` raised ``error`` on ``args``: PyTorch's own errors go on; a rule's failure is fallen back from."""
        if isinstance(error, _FromPyTorch):
            raise error.error from None
        try:
            key = self._key(args)
        except Exception:
            raise error from None
        decided = self.decided.get(key)
        if decided is None or decided.run is not run or decided.decision.kind != "rule" or isinstance(error, RuleFailedError):
            raise error
        if exotic := _exotic(args):
            return self._passing(exotic).run(*args)
        if isinstance(error, (torch.OutOfMemoryError, plans_module.OutOfLimits)):
            return native_in_order(self.op)(*args)
        if self.policy.strict and self.op._schema.is_mutable and not self._is_invalid(args):
            self._fall_back(decided.decision.rule or "", error)  # raises, before anything is written
        # A call that PyTorch rejects too is no fault of the rule's: the user sees PyTorch's own error.
        result = native_in_order(self.op)(*args)
        fallen = self._fall_back(decided.decision.rule or "", error, decided.decision.considered)
        with self._lock:
            self.decided[key] = fallen
            self._plans[key] = fallen.run
            assert self.functions is not None
            self.functions.forget()
        return result


class _FromPyTorch(Exception):
    """Carries an error of PyTorch's own out of a rule's function, so that it is not taken for the rule's failure."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the ranges of memory that two tensors span meet."""
    a_first, b_first = a.data_ptr(), b.data_ptr()
    return (a_first < b_first + _byte_extent(TensorMeta.of(b)) and b_first < a_first + _byte_extent(TensorMeta.of(a))
            and a.device == b.device)


def _ask_native(op: OpOverload, args: tuple[Any, ...]) -> None:
    """Run PyTorch's own ``op`` on metadata alone: not every op takes an ``out=`` of another dtype.

    Raises:
        Decline: PyTorch rejects the call.
    """
    def stand_in(value: Any) -> Any:
        if value.__class__ is TensorMeta:
            return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
        return [stand_in(v) for v in value] if value.__class__ in (tuple, list) else value

    try:
        native_in_order(op)(*[stand_in(a) for a in args])
    except Exception as error:
        raise Decline(f"PyTorch rejects it: {error}") from None


def _resize_output(out: torch.Tensor, shape: Sequence[int]) -> None:
    from torch._prims_common.wrappers import _maybe_resize_out

    _maybe_resize_out(out, tuple(shape))


def _put(out: torch.Tensor, result: torch.Tensor) -> None:
    """Copy ``result`` to ``out``, resized as PyTorch does; in the result's layout where that leaves no gaps."""
    if out.shape != result.shape:
        _resize_output(out, result.shape)
        if out.stride() != result.stride() and TensorMeta.of(result).extent == result.numel():
            out.as_strided_(result.shape, result.stride())
    out.copy_(result)


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return value is default
    return value.__class__ is default.__class__ and value == default


_plain_keys: set[int] = set()
"""The dispatch keys of tensors found to be plain: the keys tell every exotic kind, so those seen need no second look."""


def _exotic(args: Sequence[Any]) -> str:
    """Why these arguments are not for kernels, whatever their metadata: sparse, quantized, functorch-wrapped..."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            keys = _dispatch_keys(arg).raw_repr()
            if keys not in _plain_keys:
                if reason := _why_exotic(arg):
                    return reason
                _plain_keys.add(keys)
        elif arg.__class__ in (list, tuple) and (reason := _exotic(arg)):
            return reason
    return ""


def _why_exotic(t: torch.Tensor) -> str:
    if t.layout != torch.strided:
        return f"layout {str(t.layout).removeprefix('torch.')}"
    if t.is_quantized:
        return "quantized tensor"
    if t.is_nested:
        return "nested tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return "functorch-wrapped tensor"
    if t.is_neg():
        return "lazily negated tensor"
    if t._is_zerotensor():
        return "zero tensor without storage"
    return "functional tensor" if torch._is_functional_tensor(t) else ""
