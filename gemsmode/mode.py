"""``GemsMode``: sees every aten call, runs the rule that serves it or lets it pass, and can tell what happened.

The options of a mode are turned into one handler per op when it is made; ``__torch_dispatch__`` is a look-up and a call.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch._C import _len_torch_dispatch_stack, _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from gemsmode import registry as registry_module
from gemsmode.handlers import OpHandler, Policy
from gemsmode.native import native
from gemsmode.registry import Registry
from gemsmode.selectors import Selection
from gemsmode.target import current

if TYPE_CHECKING:
    from gemsmode.tracing import Recorder, Report

F = TypeVar("F", bound=Callable[..., Any])


def load_ops() -> None:
    """Import the kernels of ``gemsmode.ops``, which registers their rules; done by the first mode."""
    current()
    importlib.import_module("gemsmode.ops")


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


def _options_key(registry: Registry, allow: Selection, deny: Selection, strict: bool) -> Any:
    def normal(selection: Selection) -> Any:
        if selection is None or isinstance(selection, str):
            return selection
        if isinstance(selection, Mapping):
            return tuple(selection.items())
        return tuple(selection) if isinstance(selection, (list, tuple, set, frozenset)) else selection

    return registry.name, id(registry), registry.state(), normal(allow), normal(deny), strict, current()


def _shared_policy(registry: Registry, allow: Selection, deny: Selection, strict: bool) -> tuple[Policy, _Table]:
    """The policy and table of these options; equal options share them, with all that was decided."""
    key = _options_key(registry, allow, deny, strict)
    found = _shared.get(key)
    if found is None:
        policy = Policy(registry, allow, deny, strict)
        found = policy, _Table(lambda op: policy.handler(op).call)
        while len(_shared) >= _MAX_SHARED:
            _shared.pop(next(iter(_shared)))
        _shared[key] = found
    return found


class GemsMode(TorchDispatchMode):
    """Run Triton kernels in place of aten ops, in an unchanged program.

    A context manager, re-usable and nestable (an inner mode's choice wins), and a decorator::

        with GemsMode():
            loss = model(x).sum()
            loss.backward()

        with GemsMode(trace=True) as gems:
            model(x)
        print(gems.report)

    Args:
        allow: only these may be replaced: names (``"mm"``: every overload), overloads (``"add.Tensor"``), globs
            (``"*_backward"``), families (``"pointwise"``), or a mapping from these to a predicate
            (``{"mm": dtype(torch.float16), "softmax": ...}``).
        deny: these are never replaced.
        trace: record every call, for :attr:`report`.
        strict: raise :class:`~gemsmode.errors.RuleFailedError` when a rule fails, instead of falling back to PyTorch's
            own implementation with a warning.
        registry: the rules to consult; defaults to those of ``gemsmode.ops`` and the user's own.

    Raises:
        UnknownOpError: a name in ``allow`` or ``deny`` that selects nothing; the message lists the nearest names.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The wrapper that PyTorch puts around `__torch_dispatch__` otherwise costs 0.7 us a call.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Compiled code runs as compiled; the calls around it are seen.
        return True

    def __init__(self, allow: Selection = None, deny: Selection = None, trace: bool = False, strict: bool = False,
                 registry: Registry | None = None) -> None:
        super().__init__()
        load_ops()
        if not isinstance(allow, (Mapping, str, type(None))):
            allow = tuple(allow)
        if not isinstance(deny, (Mapping, str, type(None))):
            deny = tuple(deny)
        self._options = (registry if registry is not None else registry_module.default, allow, deny, strict)
        self.recorder: Recorder | None = None
        if trace:
            from gemsmode.tracing import Recorder

            self.recorder = Recorder(current())
        self._set_aside = threading.local()
        self._prepare()

    def _prepare(self) -> None:
        """Turn the options into handlers (again, if rules have come or gone since)."""
        if self.recorder is None:
            self.policy, self._table = _shared_policy(*self._options)
            if self.policy.reentry is None:
                self.policy.reentry = self
        else:
            self.policy = Policy(*self._options)
            self.policy.reentry = self
            self._table = _Table(self._recording)

    # -- the hot path --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types or _len_torch_dispatch_stack():
            return self._among_others(func, types, args, kwargs or {})
        if kwargs:
            return self._table[func](*args, **kwargs)
        return self._table[func](*args)

    # ------------------------------------------------------------------------------------------------------------------

    def _among_others(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A call with tensor subclasses in it, or with other modes below this one."""
        if any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack()):
            # Fake, functional or proxy tensors are being made or traced: not for kernels.
            return func(*args, **kwargs)
        if types:
            # The subclass handles it; the calls it makes on plain tensors come back here.
            return NotImplemented
        return self._table[func](*args, **kwargs)

    def _recording(self, op: Any) -> Callable[..., Any]:
        """What a traced mode calls for ``op``: the same decisions, with each call told to the recorder."""
        handler: OpHandler = self.policy.handler(op)
        recorder = self.recorder
        assert recorder is not None
        if handler.fixed is not None:
            decision, run = handler.fixed.decision, handler.fixed.run
            if decision.kind == "composite":
                return run

            def fixed(*args: Any, **kwargs: Any) -> Any:
                token = recorder.begin()
                try:
                    return run(*args, **kwargs)
                finally:
                    recorder.end(token, op, decision, (*args, *kwargs.values()))

            return fixed
        functions = handler.functions
        assert functions is not None

        def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = functions.bind(*args, **kwargs)
            decided = handler.lookup(bound)
            if decided.decision.kind == "composite":
                return decided.run(*bound)
            token = recorder.begin()
            try:
                return decided.run(*bound)
            except Exception as error:
                result = handler._failed(error, decided.run, bound)
                decided = handler.lookup(bound)
                return result
            finally:
                recorder.end(token, op, decided.decision, bound)

        return recorded

    @property
    def report(self) -> Report:
        """What happened to each call so far.

        Raises:
            RuntimeError: the mode was made without ``trace=True``.
        """
        if self.recorder is None:
            raise RuntimeError("this mode records nothing; make it with GemsMode(trace=True)")
        return self.recorder.report()

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def __enter__(self) -> GemsMode:
        if not self.policy.is_current:
            self._prepare()
        # An inner mode's choice wins and nothing is counted twice: the outer one is off the stack meanwhile.
        entries = self._set_aside.__dict__.setdefault("entries", [])
        entries.append(_take_off_stack())
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        _put_back(self._set_aside.entries.pop())

    def __call__(self, function: F) -> F:
        """Use the mode as a decorator: ``function`` runs under it."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast(F, wrapped)


def _take_off_stack() -> tuple[int, GemsMode] | None:
    """Take the ``GemsMode`` of this thread, of which there is at most one, off the stack; its place above infra modes."""
    stack = _get_current_dispatch_mode_stack()
    for position, mode in enumerate(stack):
        if isinstance(mode, GemsMode):
            above = [_pop_torch_dispatch_stack(None) for _ in range(len(stack) - position)]
            for other in reversed(above[:-1]):
                _push_on_torch_dispatch_stack(other)
            return len(above) - 1, mode
    return None


def _put_back(entry: tuple[int, GemsMode] | None) -> None:
    if entry is None:
        return
    above = [_pop_torch_dispatch_stack(None) for _ in range(min(entry[0], _len_torch_dispatch_stack()))]
    _push_on_torch_dispatch_stack(entry[1])
    for other in reversed(above):
        _push_on_torch_dispatch_stack(other)


# -- a whole process ---------------------------------------------------------------------------------------------------


class _ProcessMode(GemsMode):
    """The mode of :func:`enable`. One stays on each thread's stack; `disable` turns it into a plain pass-through."""

    def turn_off(self) -> None:
        self._table = _Table(native)


_process: _ProcessMode | None = None
_process_lock = threading.Lock()
_thread_start: Callable[..., Any] = threading.Thread.start


def enable(allow: Selection = None, deny: Selection = None, trace: bool = False, strict: bool = False,
           registry: Registry | None = None) -> GemsMode:
    """Put a mode in force for the whole process: this thread, autograd's, and every ``threading.Thread`` started later.

    A second call replaces the first. Arguments are those of :class:`GemsMode`; the mode is returned (for its
    ``report``). Threads that were started before, or with ``_thread.start_new_thread``, are not covered.
    """
    global _process
    with _process_lock:
        mode = _ProcessMode(allow, deny, trace, strict, registry)
        previous, _process = _process, mode
        if previous is not None:
            _leave(previous)
        mode.__enter__()
        threading.Thread.start = _start_under_mode  # type: ignore[method-assign]
    return mode


def disable() -> None:
    """End what :func:`enable` began, in every thread. Does nothing if it is not in force."""
    global _process
    with _process_lock:
        previous, _process = _process, None
        if previous is not None:
            threading.Thread.start = _thread_start  # type: ignore[method-assign]
            _leave(previous)


def _leave(mode: _ProcessMode) -> None:
    mode.turn_off()
    if any(m is mode for m in _get_current_dispatch_mode_stack()):
        mode.__exit__(None, None, None)


def _start_under_mode(thread: threading.Thread) -> None:
    mode = _process
    if mode is not None:
        run = thread.run

        def run_under_mode() -> None:
            if _process is mode:
                with mode:
                    run()
            elif _process is not None:
                with _process:
                    run()
            else:
                run()

        thread.run = run_under_mode  # type: ignore[method-assign]
    _thread_start(thread)
