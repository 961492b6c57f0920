"""What a decision computes from sizes, written down once as a function, so that a new size need not be decided afresh.

Deciding (predicates, the planner, what kernels depend on of its plan) is Python that computes with a call's sizes and
strides. Run on :class:`Traced` numbers it takes the path of one call, and leaves on a :class:`Tape` what it computed and how
its comparisons came out. Where they come out the same for other sizes it would take the same path, so that its results are
what the tape computes. ``torch.compile`` guards what it traced in the same way. That of ``exp`` of a vector::

    def numbers(key):
        ((_, (n0, ), (n1, ), _), _, ) = key
        if not n0 != 0: return None
        if not n1 == 1: return None
        x0 = n0 * 4
        x1 = x0 + x0
        if not n0 < 270336: return None
        x2 = 0 - n0
        x3 = x2 // 256
        x4 = 0 - x3
        if n0 == 1: return None
        x5 = n0 & 15
        if x5 == 0: return None
        return (x1, n0, [(n0, ), (1, ), c0, x4, 1, 1, n0, ], )
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gemsmode.signature import TensorMeta


class Untraceable(BaseException):
    """A size was used in a way that no tape can hold. No ``Exception``, so that nobody takes it for a planner's own."""


class Traced:
    """A number that depends on sizes.

    Attributes:
        tape: what it is written to.
        name: what the tape calls it.
        now: its value in the call that is traced.
    """

    __slots__ = ("name", "now", "tape")

    def __init__(self, tape: Tape, name: str, now: Any) -> None:
        self.tape, self.name, self.now = tape, name, now

    def __neg__(self) -> Any:
        return self.tape.compute(0, "-", self)

    def __bool__(self) -> bool:
        return self.tape.follow(self, "!=", 0)

    def bit_length(self) -> int:
        """A plain number: what it is computed for, a block's size, is part of the kernel."""
        bits = self.now.bit_length()
        return bits if self >= (1 << bits) >> 1 and self < 1 << bits else self.known().bit_length()

    def as_size(self) -> TracedSize:
        """What stands for :class:`~gemsmode.plan.Size` of this number."""
        return TracedSize(self.tape, self.name, self.now)

    def __hash__(self) -> int:
        raise Untraceable  # a dictionary or cache would keep it

    def __int__(self) -> int:
        return int(self.known())

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.known())

    def known(self) -> Any:
        """The plain number; calls with another are not followed any further."""
        if not self == self.now:
            raise Untraceable  # it is no number
        return self.now

    def __repr__(self) -> str:
        return f"<{self.name}>"  # a reason with it is not the one that was given without tracing


class TracedSize(Traced):
    """Stands for a :class:`~gemsmode.plan.Size`."""

    __slots__ = ()

    @property
    def value(self) -> Traced:
        return Traced(self.tape, self.name, self.now)

    real = value


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "&": operator.and_, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}


def _define(symbol: str, method: str) -> None:
    if _OPERATORS[symbol](1, 1).__class__ is bool:
        setattr(Traced, f"__{method}__", lambda self, other: self.tape.follow(self, symbol, other))
    else:
        setattr(Traced, f"__{method}__", lambda self, other: self.tape.compute(self, symbol, other))
        setattr(Traced, f"__r{method}__", lambda self, other: self.tape.compute(other, symbol, self))


for _symbol, _function in _OPERATORS.items():
    _define(_symbol, _function.__name__.strip("_"))


_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}

LARGEST = 2**63 - 1
"""The largest size or stride that PyTorch's tensors can have; none is negative."""

_ANY = -float("inf"), float("inf")
_NUMBERS = (int, float, Traced)


def _now(value: Any) -> int:
    return value.now if isinstance(value, Traced) else value


class Tape:
    """What has been computed from the sizes in ``key``, the key of a call (:mod:`gemsmode.signature`)."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        self._lines: dict[str, None] = {}
        self._known: dict[str, Any] = {}
        self._ranges: dict[str, tuple[Any, Any]] = {}
        self._metas: list[TensorMeta] = []
        self._pattern = self._take(key)

    def _take(self, part: Any) -> str:
        """The text that unpacks ``part`` of the key into names for its sizes and strides."""
        if part.__class__ is not tuple:
            return "_"
        if len(part) == 4 and part[1].__class__ is torch.Size:
            dtype, shape, stride, device = part
            meta = TensorMeta(dtype, self._numbers(shape), self._numbers(stride), device)
            self._metas.append(meta)
            return f"(_, {self._unpacked(meta.shape)}, {self._unpacked(meta.stride)}, _)"
        return self._unpacked([self._take(p) for p in part]) if any(p.__class__ is tuple for p in part) else "_"

    def _numbers(self, values: Any) -> tuple[Any, ...]:
        names = [f"n{len(self._ranges) + i}" for i in range(len(values))]
        self._ranges.update(dict.fromkeys(names, (0, LARGEST)))
        return tuple([Traced(self, name, value) for name, value in zip(names, values)])

    def _unpacked(self, names: Any) -> str:
        return "(" + "".join([f"{n.name if isinstance(n, Traced) else n}, " for n in names]) + ")"

    def described(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The described arguments of the call that has the key, with traced sizes and strides."""
        metas: Iterator[TensorMeta] = iter(self._metas)

        def traced(arg: Any) -> Any:
            return next(metas) if arg.__class__ is TensorMeta else tuple([traced(a) for a in arg]) if arg.__class__ is tuple else arg

        return tuple([traced(a) for a in args])

    # -- writing -------------------------------------------------------------------------------------------------------

    def compute(self, a: Any, symbol: str, b: Any) -> Any:
        """The result of an operation."""
        if not (isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS)):
            return NotImplemented
        if symbol in ("/", "//", "%") and isinstance(b, Traced):
            self.follow(b, "!=", 0)  # what would raise is decided in full
        function = _OPERATORS[symbol]
        (low_a, high_a), (low_b, high_b) = self._range(a), self._range(b)
        known_a, known_b = (low if low == high else None for low, high in (self._range(a), self._range(b)))
        if known_a is not None and known_b is not None:
            return function(known_a, known_b)
        now = function(_now(a), _now(b))
        whole = now.__class__ is int
        if whole:  # what changes nothing needs no line
            if symbol == "*" and 0 in (known_a, known_b):
                return 0
            if (symbol, known_a) in (("*", 1), ("+", 0)):
                return b
            if (symbol, known_b) in (("*", 1), ("//", 1), ("+", 0), ("-", 0)):
                return a
        text = f"{self._text(a)} {symbol} {self._text(b)}"
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = Traced(self, f"x{len(self._known)}", now)
            self._lines[f"{found.name} = {text}"] = None
            if whole and (symbol in ("+", "-", "*") or (symbol == "//" and low_b > 0)):
                corners = [function(x, y) for x in (low_a, high_a) for y in (low_b, high_b)]
                self._ranges[found.name] = min(corners), max(corners)
            elif whole and symbol in ("%", "&") and low_b > 0:
                self._ranges[found.name] = 0, high_b
        return found

    def follow(self, a: Traced, symbol: str, b: Any) -> Any:
        """The outcome of a comparison, on which what follows depends."""
        if not isinstance(b, _NUMBERS):
            return NotImplemented
        outcome = _OPERATORS[symbol](a.now, _now(b))
        held = symbol if outcome else _OPPOSITE[symbol]
        if not self._follows(self._range(a), held, self._range(b)):
            self._lines[f"if {'not ' if outcome else ''}{self._text(a)} {symbol} {self._text(b)}: return None"] = None
            self._narrow(a, held, b)
        return outcome

    def _range(self, value: Any) -> tuple[Any, Any]:
        """The least and the largest that a number can be for calls that were followed up to here."""
        return self._ranges.get(value.name, _ANY) if isinstance(value, Traced) else (value, value)

    def _text(self, value: Any) -> str:
        low, high = self._range(value)
        return value.name if low != high else repr(low if low.__class__ is float else int(low))

    @staticmethod
    def _follows(a: tuple[Any, Any], symbol: str, b: tuple[Any, Any]) -> bool:
        """Whether a comparison holds for all numbers in the ranges ``a`` and ``b``."""
        if symbol == "==":
            return a[0] == a[1] == b[0] == b[1]
        if symbol == "!=":
            return a[1] < b[0] or b[1] < a[0]
        return _OPERATORS[symbol](a[1], b[0]) if symbol in ("<", "<=") else _OPERATORS[symbol](a[0], b[1])

    def _narrow(self, a: Traced, symbol: str, b: Any) -> None:
        """Note that a comparison with a known number holds."""
        (low, high), (number, same) = self._range(a), self._range(b)
        if number == same and isinstance(number, int) and isinstance(a.now, int):
            if symbol == "==":
                low = high = number
            elif symbol == "!=":
                low, high = low + (low == number), high - (high == number)
            elif symbol in (">", ">="):
                low = max(low, number + (symbol == ">"))
            else:
                high = min(high, number - (symbol == "<"))
            self._ranges[a.name] = low, high

    # -- reading -------------------------------------------------------------------------------------------------------

    def function(self, results: Any) -> Callable[[tuple[Any, ...]], Any]:
        """``results`` (numbers, None, dtypes, in tuples and lists) from a call's key; None where another path would be taken."""
        scope: dict[str, Any] = {}

        def source(value: Any) -> str:
            if isinstance(value, Traced):
                return self._text(value)
            if value.__class__ in (tuple, list):
                inner = "".join([source(v) + ", " for v in value])
                return f"({inner})" if value.__class__ is tuple else f"[{inner}]"
            if value is None or value.__class__ is int:
                return repr(value)
            scope[f"c{len(scope)}"] = value
            return f"c{len(scope) - 1}"

        lines = [f"{self._pattern} = key", *self._lines, f"return {source(results)}"]
        exec(compile("def numbers(key):\n" + "".join([f"    {line}\n" for line in lines]), "<gemsmode sizes>", "exec"), scope)
        return scope["numbers"]
