"""``GemsMode``: sees every aten call, runs the rule that serves it or lets it pass, and can tell what happened.

The options of a mode are turned into one handler per op when it is made; ``__torch_dispatch__`` is a look-up and a call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch._C import _len_torch_dispatch_stack, _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from gemsmode import registry as registry_module
from gemsmode.choice import as_chooser
from gemsmode.handlers import MAX_PLANS, Decided, OpHandler, Policy
from gemsmode.native import REFERENCES, native
from gemsmode.registry import Registry
from gemsmode.selectors import Selection, Selector, as_names
from gemsmode.signature import make_functions, parameters
from gemsmode.target import current

if TYPE_CHECKING:
    import os

    from gemsmode.choice import Chooser
    from gemsmode.dryrun import DryRun
    from gemsmode.target import Target
    from gemsmode.tracing import Recorder, Report
    from gemsmode.verify import Mismatch, Verifier

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN = (torch.Tensor,)
_WRAPPED = {int: torch.int64, float: torch.float64, bool: torch.bool, complex: torch.complex128}
_NOT_OVERRIDDEN = torch.Tensor.__torch_dispatch__


def load_ops() -> None:
    """Import the kernels of ``gemsmode.ops``, which registers their rules; done by the first mode."""
    current()
    if "gemsmode.ops" in sys.modules:
        return
    before = list(registry_module.default.rules)
    try:
        importlib.import_module("gemsmode.ops")
    except BaseException:
        # So that the next try meets the same error, not rules that are registered already.
        for name in [n for n in sys.modules if n.partition(".ops")[0] == "gemsmode" and n != "gemsmode"]:
            del sys.modules[name]
        registry_module.default.replace(before)
        raise


class _Table(dict):
    """What to call for each op, found when the op is first met."""

    def __init__(self, build: Callable[[Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._build = build

    def __missing__(self, op: Any) -> Callable[..., Any]:
        found = self[op] = self._build(op)
        return found


_shared: dict[Any, tuple[Policy, _Table]] = {}
_MAX_SHARED = 32


def _options_key(registry: Registry, allow: Selection, deny: Selection, strict: bool, chooser: Chooser | None, fuse: bool) -> Any:
    def normal(selection: Selection) -> Any:
        return tuple(selection.items()) if isinstance(selection, Mapping) else selection

    return registry.name, id(registry), registry.state(), normal(allow), normal(deny), strict, chooser, fuse, current()


class GemsMode(TorchDispatchMode):
    """Run Triton kernels in place of aten ops, in an unchanged program.

    A context manager, re-usable and nestable (an inner mode's choice wins), and a decorator::

        with GemsMode():
            loss = model(x).sum()
            loss.backward()

        with GemsMode(trace=True) as gems:
            model(x)
        print(gems.report)

    Among other dispatch modes it is always the one nearest to the kernels, whichever was entered first: a
    ``FlopCounterMode`` around or inside it sees every call.

    Args:
        allow: only these may be replaced: names (``"mm"``: every overload), overloads (``"add.Tensor"``), globs
            (``"*_backward"``), families (``"pointwise"``), or a mapping from these to a predicate
            (``{"mm": dtype(torch.float16), "softmax": ...}``).
        deny: these are never replaced.
        trace: record every call, for :attr:`report`.
        strict: raise :class:`~gemsmode.errors.RuleFailedError` when a rule fails, instead of falling back to PyTorch's
            own implementation with a warning.
        registry: the rules to consult; defaults to those of ``gemsmode.ops`` and the user's own.
        dry_run: decide and count every call, and run none: for a model on the meta device or on fake tensors. What for:
            ``"cuda:90"``, ``"hip:gfx942"``..., ``"cpu"``; True is this machine's GPU, or ``"cuda:90"``. See
            :mod:`gemsmode.dryrun`.
        verify: run each replaced call natively too, on copies of its inputs, and compare. See :mod:`gemsmode.verify`.
        on_mismatch: with ``verify``: ``"warn"``, ``"raise"`` (:class:`~gemsmode.errors.MismatchError`) or a function that is
            given the :class:`~gemsmode.verify.Mismatch`.
        reproducers: with ``verify``: a folder to write each rule's first mismatch to, with a script that shows it.
        prefer: ``"rules"``: a rule runs wherever one serves; ``"fastest"``: the first call of each signature times the rule and
            PyTorch's own, and the faster one runs from then on, in later processes too. See :mod:`gemsmode.choice`, whose
            :class:`~gemsmode.choice.Chooser` may be given instead.
        fuse: experimental: let elementwise calls and row reductions wait, and run neighbouring ones as one kernel once something
            needs their values. See :mod:`gemsmode.fuse` for what is guarded and what is not. Not with ``trace``, ``verify``,
            ``dry_run`` or ``prefer="fastest"``, nor for a whole process.

    Raises:
        UnknownOpError: a name in ``allow`` or ``deny`` that selects nothing; the message lists the nearest names.
        ValueError: options that do not go together, or an unknown target or ``on_mismatch``.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The wrapper that PyTorch puts around `__torch_dispatch__` otherwise costs 0.7 us a call; `_skip_dynamo` below
        # does what it is for.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Compiled code runs as compiled; the calls around it are seen.
        return True

    def __init__(self, allow: Selection = None, deny: Selection = None, trace: bool = False, strict: bool = False,
                 registry: Registry | None = None, *, dry_run: bool | str | Target = False, verify: bool = False,
                 on_mismatch: str | Callable[[Mismatch], Any] = "warn", reproducers: str | os.PathLike[str] | None = None,
                 prefer: str | Chooser | None = None, fuse: bool = False) -> None:
        super().__init__()
        load_ops()
        self._chooser = as_chooser(prefer)
        self._registry = registry if registry is not None else registry_module.default
        allow, deny = as_names(allow), as_names(deny)
        if fuse:
            self._fuse = _fusing({"trace": trace, "dry_run": dry_run, "verify": verify, "prefer": self._chooser,
                                  "enable()": isinstance(self, _ProcessMode)})
        self._options = allow, deny, strict, self._chooser, fuse
        self._selectors = tuple(None if s is None else Selector(s, self._registry) for s in (allow, deny))
        self.recorder: Recorder | None = None
        if dry_run and verify:
            raise ValueError("a dry run has no results to verify; ask for one of the two")
        if dry_run and self._chooser is not None:
            raise ValueError("a dry run runs nothing that prefer='fastest' could time; ask for one of the two")
        if dry_run:
            from gemsmode.dryrun import DryRun

            self._dry = DryRun(dry_run)
        if verify:
            from gemsmode.verify import Verifier

            self._verifier = Verifier(on_mismatch, reproducers)
        if trace or dry_run or verify:
            from gemsmode.tracing import Recorder

            self.recorder = Recorder(current(), self._dry, self._verifier)
        self._prepare()
        self._registry.watch(self)

    def _prepare(self) -> None:
        """Turn the options into handlers (again, if rules have come or gone since)."""
        if self.recorder is not None:
            self._policy = self._new_policy()
            self._table = _Table(self._recording)
            self._policy.reentry = _Reentry(self._policy, self._table, self._dry)
            return
        key = _options_key(self._registry, *self._options)
        found = _shared.get(key)
        if found is None:
            policy = self._new_policy()
            fuse = self._fuse
            found = policy, _Table((lambda op: policy.handler(op).call) if fuse is None else fuse.Deferring(policy).function)
            policy.reentry = _Reentry(*found)
            while len(_shared) >= _MAX_SHARED:
                _shared.pop(next(iter(_shared)), None)
            _shared[key] = found
        self._policy, self._table = found

    def _new_policy(self) -> Policy:
        allow, deny = self._selectors
        return Policy(self._registry, allow, deny, self._options[2], None if self._dry is None else self._dry.target, self._chooser)

    def rules_changed(self) -> None:
        """A rule was added or removed: what was decided holds no more. The next call decides anew, inside a block too."""

        def renewed(op: Any) -> Callable[..., Any]:
            self._prepare()
            return self._table[op]

        self._table = _Table(renewed)

    @property
    def policy(self) -> Policy:
        """What the mode decides by, for the rules of this moment."""
        if not self._policy.is_current:
            self._prepare()
        return self._policy

    # -- the hot path --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            if types or _len_torch_dispatch_stack():
                return self._among_others(func, types, args, kwargs or {})
            if kwargs:
                return self._table[func](*args, **kwargs)
            return self._table[func](*args)
        except (TypeError, RuntimeError):
            if not args or args[0].__class__ not in _WRAPPED or not isinstance(func, OpOverload) or not parameters(func)[0].is_tensor:
                raise
        # PyTorch gives modes a number for a 0-dim tensor that it made of one, and takes none back in the first place.
        first = torch.tensor(args[0], dtype=_WRAPPED[args[0].__class__])
        rest = [torch.tensor(a, dtype=_WRAPPED[a.__class__]) if p.is_tensor and a.__class__ in _WRAPPED else a
                for p, a in zip(parameters(func)[1:], args[1:])]
        try:
            return self._table[func](first, *args[1:], **(kwargs or {}))
        except (TypeError, RuntimeError):
            if all(a is b for a, b in zip(rest, args[1:])):
                raise
        # Nor in the other places, but for arithmetic.
        return self._table[func](first, *rest, **(kwargs or {}))

    # ------------------------------------------------------------------------------------------------------------------

    _dry: DryRun | None = None
    _verifier: Verifier | None = None
    _chooser: Chooser | None = None
    _fuse: ModuleType | None = None
    """:mod:`gemsmode.fuse`, of a mode that fuses."""

    def _among_others(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A call with tensor subclasses in it, or with other modes below this one."""
        if self._dry is not None and self._dry.takes(func, types):
            return self._table[func](*args, **kwargs)
        if _len_torch_dispatch_stack() and any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack()):
            # Fake, functional or proxy tensors are being made or traced: not for kernels.
            return func(*args, **kwargs)
        # Autograd names plain tensors here too, when it detaches one that it saves.
        if types and types != _PLAIN and any(t.__torch_dispatch__ is not _NOT_OVERRIDDEN for t in types):
            # The subclass handles it; the calls it makes on plain tensors come back here.
            return NotImplemented
        return self._table[func](*args, **kwargs)

    def _recording(self, op: Any) -> Callable[..., Any]:
        """What a traced mode calls for ``op``: the same decisions, with each call told to the recorder."""
        handler: OpHandler = self._policy.handler(op)
        recorder = self.recorder
        assert recorder is not None
        if self._dry is not None:
            return self._dry.function(op, handler, recorder)
        if handler.fixed is not None:
            decision, run = handler.fixed.decision, handler.fixed.run
            if decision.kind == "composite":
                return run

            def fixed(*args: Any, **kwargs: Any) -> Any:
                given = (*args, *kwargs.values())
                token = recorder.begin(op, decision, given)
                try:
                    return run(*args, **kwargs)
                finally:
                    recorder.end(token, op, decision, given)

            return fixed
        # As an untraced call is found, by functions of this op's own, in whose plans each decision is told with the call.
        plans: dict[Any, Callable[..., Any]] = {}

        def served(decided: Decided, signature: object, *args: Any) -> Any:
            token = recorder.begin(op, decided.decision, args, signature)
            try:
                return decided.run(*args)
            except Exception as error:
                result = handler._failed(error, decided.run, args)
                decided, signature = handler.lookup(args), None
                plans.clear()
                found.forget()
                return result
            finally:
                recorder.end(token, op, decided.decision, args, signature)

        def miss(args: tuple[Any, ...], key: tuple | None) -> Callable[..., Any]:
            decided = handler.lookup(args)
            kept = key is not None and handler.decided.get(key) is decided and not decided.provisional
            run = decided.run if decided.decision.kind == "composite" else functools.partial(served, decided, object() if kept else None)
            if kept:
                if len(plans) >= MAX_PLANS:
                    plans.clear()
                plans[key] = run
            return run

        def failed(error: Exception, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            raise error  # what could be fallen back from, `served` has

        found = make_functions(op, plans, miss, failed, *handler.keyed_by)
        return found.call if self._verifier is None else self._verifier.function(op, handler, recorder, found.call)

    @property
    def report(self) -> Report:
        """What happened to each call so far.

        Raises:
            RuntimeError: the mode was made without ``trace=True``, ``verify=True`` or ``dry_run=...``.
        """
        if self.recorder is None:
            raise RuntimeError("this mode records nothing; make it with GemsMode(trace=True)")
        return self.recorder.report()

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def __enter__(self) -> GemsMode:
        # An inner mode's choice wins and nothing is counted twice: the outer one is off the stack meanwhile.
        outer = _take_off_stack()
        if outer is not None and outer._fuse is not None:
            outer._fuse.flush_all()
        if self._fuse is not None:
            self._fuse.enter()
        _blocks().append(_Block(self, outer))
        super().__enter__()
        _put_at_bottom(_take_off_stack())
        if self.recorder is not None:
            self.recorder.enter()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        blocks = _blocks()
        i = next((i for i in range(len(blocks) - 1, -1, -1) if blocks[i].mode is self), None)
        if i is None:
            raise RuntimeError("this thread has not entered the GemsMode that it leaves")
        outer = blocks.pop(i).outer
        if self.recorder is not None:
            self.recorder.leave(exc_value)
        if self._chooser is not None:
            self._chooser.save()
        if i < len(blocks):
            # Left out of order: the block entered next must not bring this mode back.
            blocks[i].outer = outer
            outer = _take_off_stack()
        else:
            _take_off_stack()
        _push_on_torch_dispatch_stack(self)
        super().__exit__(exc_type, exc_value, traceback)
        _put_at_bottom(outer)
        if self._fuse is not None:
            self._fuse.leave()

    def __call__(self, function: F) -> F:
        """Use the mode as a decorator: ``function`` runs under it.

        Raises:
            TypeError: ``function`` is a generator or a coroutine, whose body runs when the call has long returned.
        """
        if any(test(function) for test in (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
            raise TypeError(f"{getattr(function, '__name__', function)!r} is a generator or a coroutine: its body runs after the call has "
                            "returned. Put `with GemsMode():` inside it, around what does not yield or await.")

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast(F, wrapped)


def _fusing(options: Mapping[str, Any]) -> ModuleType:
    """:mod:`gemsmode.fuse`, if no other option is given that does not go with it.

    Raises:
        ValueError: one is.
    """
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"fuse=True does not go with {', '.join(given)}: a call that waits to be run with others has no time or result of "
                         "its own, and needs a block that ends")
    return importlib.import_module("gemsmode.fuse")


class _Reentry(GemsMode):
    """What is pushed while a composite op is taken apart: a mode's decisions without the mode."""

    def __init__(self, policy: Policy, table: _Table, dry: DryRun | None = None) -> None:
        TorchDispatchMode.__init__(self)
        self._policy, self._table, self._dry = policy, table, dry


def _skip_dynamo(function: Any) -> None:
    """Keep ``torch.compile`` from compiling ``function`` and what it calls when it runs between compiled regions."""
    frames = torch._C._dynamo.eval_frame
    set_strategy, strategy, action = (getattr(frames, n, None) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction"))
    if set_strategy is not None and strategy is not None and action is not None:
        set_strategy(function.__code__, strategy(action.SKIP, action.SKIP))


_skip_dynamo(GemsMode.__torch_dispatch__)


# -- the stack of modes ------------------------------------------------------------------------------------------------


class _Block:
    """A ``with`` block of this thread: its mode, and the one that was in force outside and comes back."""

    __slots__ = ("mode", "outer")

    def __init__(self, mode: GemsMode, outer: GemsMode | None) -> None:
        self.mode, self.outer = mode, outer


_thread = threading.local()


def _blocks() -> list[_Block]:
    """The blocks that this thread is in, outermost first."""
    return _thread.__dict__.setdefault("blocks", [])


def _take_off_stack() -> GemsMode | None:
    """Take the ``GemsMode`` of this thread, of which there is at most one, off the stack of modes."""
    stack = _get_current_dispatch_mode_stack()
    for position, mode in enumerate(stack):
        if isinstance(mode, GemsMode):
            above = [_pop_torch_dispatch_stack(None) for _ in range(len(stack) - position)][:-1]
            for other in reversed(above):
                _push_on_torch_dispatch_stack(other)
            return mode
    return None


def _put_at_bottom(mode: GemsMode | None) -> None:
    """Put ``mode`` below every other mode that is not PyTorch's own infrastructure (which PyTorch keeps at the bottom)."""
    if mode is None:
        return
    count = sum(not other.is_infra_mode() for other in _get_current_dispatch_mode_stack())
    above = [_pop_torch_dispatch_stack(None) for _ in range(count)]
    _push_on_torch_dispatch_stack(mode)
    for other in reversed(above):
        _push_on_torch_dispatch_stack(other)


# -- a whole process ---------------------------------------------------------------------------------------------------


class _ProcessMode(GemsMode):
    """The mode of :func:`enable`. It stays on the stacks of other threads when it ends: it then passes everything on."""

    _follows: GemsMode | None = None
    _is_off = False

    def follow(self, mode: GemsMode | None) -> None:
        """From now on do what ``mode`` does; None to let every call pass."""
        self._follows, self._is_off = mode, mode is None
        self._dry = None if mode is None else mode._dry
        self._prepare()
        if self.recorder is not None:
            self.recorder.close()

    def _prepare(self) -> None:
        if self._is_off:
            self._table = _Table(lambda op: op if str(op) in REFERENCES else native(op))
        elif self._follows is not None:
            followed = self._follows
            self._policy, self._table = followed.policy, _Table(lambda op: followed._table[op])
        else:
            super()._prepare()

    def rules_changed(self) -> None:
        super().rules_changed()
        for other in list(_process_modes):
            if other._follows is self:
                other._prepare()


_process: _ProcessMode | None = None
_process_modes: weakref.WeakSet[_ProcessMode] = weakref.WeakSet()
_process_lock = threading.Lock()
_thread_start: Callable[..., Any] = threading.Thread.start


def enable(allow: Selection = None, deny: Selection = None, trace: bool = False, strict: bool = False,
           registry: Registry | None = None, **options: Any) -> GemsMode:
    """Put a mode in force for the whole process: this thread, autograd's, and every ``threading.Thread`` started later.

    A second call replaces the first, in every thread. A ``with GemsMode(...)`` block wins while it lasts. Arguments
    are those of :class:`GemsMode`; the mode is returned (for its ``report``). Threads that were started before, or with
    ``_thread.start_new_thread``, are not covered.
    """
    global _process
    mode = _ProcessMode(allow, deny, trace, strict, registry, **options)
    with _process_lock:
        _process = mode
        for earlier in _process_modes:
            earlier.follow(mode)
        _process_modes.add(mode)
        _put_below(mode)
        if mode.recorder is not None:
            mode.recorder.enter()
        threading.Thread.start = _start_under_mode  # type: ignore[method-assign,assignment]
    return mode


def disable() -> None:
    """End what :func:`enable` began, in every thread. Does nothing if it is not in force."""
    global _process
    with _process_lock:
        _process = None
        threading.Thread.start = _thread_start  # type: ignore[method-assign]
        for mode in _process_modes:
            mode.follow(None)
        _put_below(None)


def _put_below(mode: _ProcessMode | None) -> None:
    """Put ``mode`` in this thread below what every block of this thread has put in force, in place of an earlier one."""
    blocks = _blocks()
    for block in blocks:
        if isinstance(block.outer, _ProcessMode):
            block.outer = mode
            return
    if blocks and not isinstance(blocks[0].mode, _ProcessMode):
        blocks[0].outer = mode
        return
    if blocks:
        # A thread that runs under the process's mode from its start: its own follows.
        return
    _take_off_stack()
    _put_at_bottom(mode)


def _start_under_mode(thread: threading.Thread) -> None:
    if _process is not None:
        run = thread.run

        def run_under_mode() -> None:
            mode = _process
            if mode is None:
                run()
            else:
                with mode:
                    run()

        thread.run = run_under_mode  # type: ignore[method-assign]
    _thread_start(thread)
