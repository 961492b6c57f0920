"""Custom ops of gemsmode's own, registered with PyTorch in the namespace ``gemsmode``.

An op is declared by its schema, a *reference* (the same in PyTorch's own ops, differentiable) and a *fake* function
(shapes, dtypes and strides of the results, for tracing)::

    silu_and_mul = custom_op("silu_and_mul(Tensor a, Tensor b) -> Tensor", reference=_reference, fake=_fake)

    @planned("gemsmode.silu_and_mul.default", ...)      # its kernel: a rule like any other
    def plan(call): ...

    silu_and_mul.differentiate(setup_context, backward)

Its rules are found in the registry, by a mode where one is in force and by the op itself otherwise, so that the op runs
its kernel in both cases, with a plan kept for each signature. Where no rule serves a call, the reference runs; under a
mode, as ops that come back to the mode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _get_dispatch_stack_at, _len_torch_dispatch_stack, _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch._ops import OpOverload

from gemsmode import registry as registry_module
from gemsmode.handlers import Policy
from gemsmode.mode import GemsMode
from gemsmode.native import REFERENCES
from gemsmode.signature import parameters

NAMESPACE = "gemsmode"

library = torch.library.Library(NAMESPACE, "DEF")

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
_any_requires_grad = torch._C._any_requires_grad
_transforms = torch._C._functorch.peek_interpreter_stack


class _Standing:
    """Decisions for ops that are called outside every mode: those of the default registry, without options."""

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._lock = threading.Lock()
        self._calls: dict[OpOverload, Callable[..., Any]] = {}
        registry_module.default.watch(self)

    def rules_changed(self) -> None:
        self._policy = None
        self._calls.clear()

    def function(self, op: OpOverload) -> Callable[..., Any]:
        """What runs ``op`` by the rules of this moment."""
        found = self._calls.get(op)
        if found is None:
            with self._lock:
                if self._policy is None:
                    self._policy = Policy(registry_module.default)
                found = self._calls[op] = self._policy.handler(op).call
        return found


_standing = _Standing()


class CustomOp:
    """An op of gemsmode's own. Calling it is calling the op, by a shorter way where nothing else wants to see the call.

    Args:
        schema: as ``torch.library.define`` takes it, without the namespace: ``"f(Tensor x) -> Tensor"``.
        reference: the same in PyTorch's own ops; takes every argument by position. It must be differentiable for ops that
            tensor subclasses (``DTensor``) or ``torch.func`` transforms may reach, for which it stands in.
        fake: makes results of the right metadata from arguments that have no data.
        composite: the op runs other ops that have rules: a mode always takes it apart. It has no rule.
    """

    def __init__(self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any], composite: bool = False) -> None:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.reference = reference
        REFERENCES[str(self.op)] = reference
        library.impl(name, reference if composite else self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        self._composite = composite
        self._function: Any = None
        """The same with its gradient, as autograd takes it from Python: it costs less host time than the registered formula."""

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return _standing.function(self.op)(*args, **kwargs)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        for arg in args:
            if arg.__class__ not in _PLAIN and isinstance(arg, torch.Tensor):
                return self.op(*args) if _is_traced(arg) else self.reference(*args)
        if _transforms() is not None:
            return self.reference(*args)
        modes = _len_torch_dispatch_stack()
        if modes > 1 or self._composite or (modes and not isinstance(_get_dispatch_stack_at(0), GemsMode)):
            return self.op(*args)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return self.op(*args) if self._function is None else self._function.apply(*args)
        return self._direct(*args)

    def _direct(self, *args: Any) -> Any:
        """What PyTorch would do with the call, without its dispatcher, where at most one mode wants to see it: a ``GemsMode``."""
        if not _len_torch_dispatch_stack():
            return _standing.function(self.op)(*args)
        mode = _pop_torch_dispatch_stack(None)
        try:
            return mode._table[self.op](*args)
        finally:
            _push_on_torch_dispatch_stack(mode)

    def differentiate(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Register the formula of the gradient (see ``torch.library.register_autograd``)."""
        direct = self._direct
        defaults = [p.default for p in parameters(self.op)]

        def forward(ctx: Any, *args: Any) -> Any:
            result = direct(*args)
            setup_context(ctx, (*args, *defaults[len(args):]), result)
            return result

        self._function = type(f"{self.op._opname}_function", (torch.autograd.Function,),
                              {"forward": staticmethod(forward), "backward": staticmethod(backward)})
        torch.library.register_autograd(f"{NAMESPACE}::{self.op._opname}", backward, setup_context=setup_context, lib=library)

    def not_differentiable(self) -> None:
        """Raise when a gradient through this op is asked for: it is itself a gradient."""
        name = self.op._opname

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"gemsmode::{name} has no derivative: second derivatives through fused ops are not available. "
                                      "Use the unfused form (gemsmode.unpatch) where they are needed.")

        self.differentiate(lambda ctx, inputs, output: None, backward)

    def __repr__(self) -> str:
        return f"<custom op {self.op}>"


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether a subclass of Tensor is one that PyTorch traces with: the op itself must be seen then."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def custom_op(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], composite: bool = False) -> CustomOp:
    """Declare a custom op; see :class:`CustomOp`."""
    return CustomOp(schema, reference, fake, composite)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on ``tensors`` will be recorded by autograd."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def shape_of(normalized_shape: int | Sequence[int]) -> list[int]:
    """``normalized_shape`` as a list: an int means one dimension."""
    return [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)


def wanted(ctx: Any, *arguments: int) -> tuple[bool, ...]:
    """Whether the gradients of these arguments are wanted. PyTorch leaves out trailing arguments that have their default."""
    needs = ctx.needs_input_grad
    return tuple([i < len(needs) and bool(needs[i]) for i in arguments])
