"""Predicates: conditions on a call's metadata that can say in words why they said no.

A predicate is called with a :class:`~gemsmode.signature.Call` and answers ``(ok, reason)``. Predicates combine with
``&``, ``|`` and ``~``::

    dtype(torch.float16, torch.bfloat16) & ndim(2, 3)
    ~contiguous | numel(at_least=4096)

Each looks at every tensor argument unless ``arg="name"`` picks one by its name in the op's schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gemsmode.signature import Call, TensorMeta

Answer = tuple[bool, str]


def dtype_name(value: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(value).removeprefix("torch.")


class Predicate:
    """A named condition on a call.

    Args:
        text: what the predicate asks for, for listings: ``dtype in {float16, bfloat16}``.
        test: takes a call; answers whether it holds and, in words, why not.
    """

    def __init__(self, text: str, test: Callable[[Call], Answer]) -> None:
        self.text, self._test = text, test

    def __call__(self, call: Call) -> Answer:
        return self._test(call)

    def __and__(self, other: Predicate) -> Predicate:
        def test(call: Call) -> Answer:
            ok, reason = self(call)
            return other(call) if ok else (False, reason)

        return Predicate(f"{self.text} and {other.text}", test)

    def __or__(self, other: Predicate) -> Predicate:
        def test(call: Call) -> Answer:
            ok, first = self(call)
            if ok:
                return True, ""
            ok, second = other(call)
            return ok, "" if ok else f"{first}, and {second}"

        return Predicate(f"({self.text} or {other.text})", test)

    def __invert__(self) -> Predicate:
        def test(call: Call) -> Answer:
            ok, _ = self(call)
            return not ok, f"{self.text} holds, which the rule excludes" if ok else ""

        return Predicate(f"not ({self.text})", test)

    def __repr__(self) -> str:
        return f"<predicate {self.text}>"


def where(text: str, function: Callable[[Call], bool]) -> Predicate:
    """A predicate from a plain function of the call; ``text`` says what it asks for."""
    return Predicate(text, lambda call: (True, "") if function(call) else (False, f"not so: {text}"))


def _tensors(call: Call, arg: str | None) -> Iterable[TensorMeta]:
    if arg is None:
        return call.tensors
    value = call[arg]
    return [value] if isinstance(value, TensorMeta) else []


def per_tensor(text: str, accept: Callable[[TensorMeta], bool], why: Callable[[TensorMeta], str], arg: str | None) -> Predicate:
    """A predicate that holds if ``accept`` does for each tensor (or the one named ``arg``)."""

    def test(call: Call) -> Answer:
        for meta in _tensors(call, arg):
            if not accept(meta):
                return False, why(meta)
        return True, ""

    return Predicate(text if arg is None else f"{arg}: {text}", test)


def dtype(*dtypes: torch.dtype, arg: str | None = None) -> Predicate:
    """Every tensor's dtype is one of ``dtypes``."""
    allowed = frozenset(dtypes)
    names = "{" + ", ".join(dtype_name(d) for d in dtypes) + "}"
    found = per_tensor(f"dtype in {names}", lambda m: m.dtype in allowed, lambda m: f"{dtype_name(m.dtype)} is not in {names}", arg)
    if arg is not None:
        return found

    def test(call: Call) -> Answer:
        for value in call.args:
            if value.__class__ is TensorMeta:
                if value.dtype not in allowed:
                    return found(call)
            elif value.__class__ in (list, tuple) and not all([v.__class__ is not TensorMeta or v.dtype in allowed for v in value]):
                return found(call)
        return True, ""

    return Predicate(found.text, test)


def ndim(*dims: int, arg: str | None = None) -> Predicate:
    """Every tensor's number of dimensions is one of ``dims``."""
    names = "{" + ", ".join(map(str, dims)) + "}"
    return per_tensor(f"ndim in {names}", lambda m: m.ndim in dims, lambda m: f"{m.ndim} dimensions, not in {names}", arg)


def device(*types: str, arg: str | None = None) -> Predicate:
    """Every tensor's device type is one of ``types``."""
    names = "{" + ", ".join(types) + "}"
    return per_tensor(f"device in {names}", lambda m: m.device.type in types, lambda m: f"device {m.device} is not in {names}", arg)


def numel(at_least: int = 0, at_most: int | None = None, arg: str | None = None) -> Predicate:
    """Every tensor has between ``at_least`` and ``at_most`` elements."""
    text = f"numel >= {at_least}" + ("" if at_most is None else f" and <= {at_most}")
    return per_tensor(text, lambda m: m.numel >= at_least and (at_most is None or m.numel <= at_most),
                      lambda m: f"{m.numel} elements, not {text}", arg)


def value(arg: str, *values: Any) -> Predicate:
    """The argument named ``arg`` equals one of ``values``."""
    names = ", ".join(map(repr, values))

    def test(call: Call) -> Answer:
        given = call[arg]
        return (True, "") if given in values else (False, f"{arg}={given!r} is not one of {names}")

    return Predicate(f"{arg} in {{{names}}}", test)


contiguous = per_tensor("contiguous", lambda m: m.is_contiguous, lambda m: f"{m} is not contiguous", None)
floating = per_tensor("floating point", lambda m: m.dtype.is_floating_point, lambda m: f"{dtype_name(m.dtype)} is not floating point", None)
not_complex = per_tensor("not complex", lambda m: not m.dtype.is_complex, lambda m: f"{dtype_name(m.dtype)} is complex", None)
on_gpu = per_tensor("on the mode's device", lambda m: True, lambda m: "", None)
"""Always true: only the mode's own device type ever reaches a rule. Kept so that a rule can say so."""
anything = Predicate("always", lambda call: (True, ""))
