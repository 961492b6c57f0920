"""What of a call a decision may depend on, derived from the op's schema.

For each tensor its dtype, shape, strides and device; for ``int``, ``int[]``, ``bool``, ``str``, ``dtype`` and the like
their value; for ``Scalar`` and ``float`` arguments only their Python type, because their value goes to the kernel at
run time. A rule may ask for more (``by_value``, ``state``).

The key of a call is built by a function made for the op, since this runs on every intercepted call.
"""

from __future__ import annotations

import functools
import itertools
import keyword
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from gemsmode.target import Target

NUMBERS = frozenset({int, float, bool, complex, type(None)})
"""Classes that may stand where a schema says ``Tensor`` or ``Tensor?``: ``x + 2`` reaches a mode as ``add.Tensor(x, 2)``."""


class TensorMeta(NamedTuple):
    """A tensor's metadata: all that a decision may look at.

    Attributes:
        dtype: its ``torch.dtype``.
        shape: its sizes.
        stride: its strides, in elements.
        device: its ``torch.device``.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMeta:
        return tuple.__new__(cls, (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(self.shape[::-1], self.stride[::-1]):
            if size != 1:
                if stride != expected:
                    return self.numel == 0
                expected *= size
        return True

    @property
    def extent(self) -> int:
        """Elements of memory from the first to the last one that the tensor touches (strides are never negative)."""
        last = 0
        for size, stride in zip(self.shape, self.stride):
            if size == 0:
                return 0
            last += (size - 1) * stride
        return last + 1

    @property
    def may_overlap_itself(self) -> bool:
        """Whether two indices can mean one element of memory (False is certain, True is not)."""
        covered = 1
        for stride, size in sorted((st, si) for st, si in zip(self.stride, self.shape) if si > 1):
            if stride < covered:
                return True
            covered = stride * (size - 1) + covered
        return False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        layout = "" if self.is_contiguous else f", strides {list(self.stride)}"
        return f"{name}{list(self.shape)}{layout}"


@dataclass(frozen=True)
class Parameter:
    """One argument of an op, as its schema states it."""

    name: str
    type: str
    kwarg_only: bool
    has_default: bool
    default: Any
    is_out: bool
    is_written: bool

    @property
    def is_tensor(self) -> bool:
        return self.type in ("Tensor", "Optional[Tensor]")

    @property
    def is_tensor_list(self) -> bool:
        return self.type in ("List[Tensor]", "List[Optional[Tensor]]")

    @property
    def is_number(self) -> bool:
        return self.type in ("number", "Optional[number]", "float", "Optional[float]")


@functools.cache
def parameters(op: OpOverload) -> tuple[Parameter, ...]:
    """The arguments of ``op`` in the order of its schema."""
    result = []
    for argument in op._schema.arguments:
        result.append(Parameter(
            name=argument.name,
            type=str(argument.type),
            kwarg_only=argument.kwarg_only,
            has_default=argument.has_default_value(),
            default=argument.default_value if argument.has_default_value() else None,
            is_out=argument.is_out,
            is_written=argument.alias_info is not None and argument.alias_info.is_write,
        ))
    return tuple(result)


@functools.cache
def _places(op: OpOverload) -> dict[str, int]:
    """The place of each argument of ``op`` by its name."""
    return {p.name: i for i, p in enumerate(parameters(op))}


class Call:
    """One call as a rule sees it: metadata only, every argument of the schema in its place, defaults filled in.

    Attributes:
        op: the overload whose arguments these are (the functional one, when a variant was derived from it).
        args: per schema argument a :class:`TensorMeta`, a list of them, or the plain value.
        outs: the tensors to be written when the call is an in-place or ``out=`` variant, else None.
        inplace: True if ``outs`` are also inputs.
        target: what the plan will run on.
        noted: what a rule's predicate has worked out for its planner.
    """

    __slots__ = ("args", "inplace", "noted", "op", "outs", "target")

    def __init__(self, op: OpOverload, args: Sequence[Any], target: Target,
                 outs: tuple[TensorMeta, ...] | None = None, inplace: bool = False) -> None:
        self.op, self.args, self.target, self.outs, self.inplace = op, tuple(args), target, outs, inplace
        self.noted: Any = None

    @property
    def tensors(self) -> Iterator[TensorMeta]:
        """The tensor arguments, those in lists included."""
        for arg in self.args:
            if arg.__class__ is TensorMeta:
                yield arg
            elif arg.__class__ in (list, tuple):
                for item in arg:
                    if item.__class__ is TensorMeta:
                        yield item

    def __getitem__(self, name: str) -> Any:
        place = _places(self.op).get(name)
        if place is None:
            raise KeyError(f"{self.op} has no argument {name!r}; it has {[p.name for p in parameters(self.op)]}")
        return self.args[place]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument called ``name``, or ``default`` if the op has none."""
        place = _places(self.op).get(name)
        return default if place is None else self.args[place]

    def __str__(self) -> str:
        inner = ", ".join("[" + ", ".join(map(str, a)) + "]" if a.__class__ in (list, tuple) else str(a) for a in self.args)
        return f"{self.op}({inner})"


def describe(arg: Any) -> Any:
    """``arg`` with each tensor in it replaced by its metadata."""
    if isinstance(arg, torch.Tensor):
        return TensorMeta.of(arg)
    if arg.__class__ in (list, tuple):
        return tuple([describe(item) for item in arg])
    return arg


_KEY_BY_TYPE = {
    "Tensor": "({n}.__class__ if {n}.__class__ in NUMBERS else ({n}.dtype, {n}.shape, {n}.stride(), {n}.device))",
    "List[Tensor]": "tuple([(t.dtype, t.shape, t.stride(), t.device) for t in {n}])",
    "List[Optional[Tensor]]": "tuple([None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in {n}])",
    "number": "{n}.__class__",
    "float": "{n}.__class__",
    "List[number]": "tuple([s.__class__ for s in {n}])",
    "List[float]": "tuple([s.__class__ for s in {n}])",
    "Generator": "({n} is None)",
}
_KIND_BY_TYPE = {
    "Tensor": "(({n}[0], len({n}[1]), {n}[3]) if {n}.__class__ is tuple else {n})",
    "List[Tensor]": "tuple([(t[0], len(t[1]), t[3]) for t in {n}])",
    "List[Optional[Tensor]]": "tuple([None if t is None else (t[0], len(t[1]), t[3]) for t in {n}])",
}
"""What is left of the part ``{n}`` of a key without sizes and strides."""
_BY_VALUE = {"int", "bool", "str", "Device", "ScalarType", "Layout", "MemoryFormat", "SymInt"}
_LISTS_BY_VALUE = {"List[int]", "List[bool]", "List[SymInt]"}


def _plain_type(parameter: Parameter) -> str:
    return parameter.type.removeprefix("Optional[").removesuffix("]") if parameter.type.startswith("Optional[") else parameter.type


def _key_expression(parameter: Parameter, name: str, by_value: frozenset[str], first: bool) -> str | None:
    kind = _plain_type(parameter)
    optional = kind != parameter.type
    if parameter.is_number and parameter.name in by_value:
        return f"({name}.__class__, {name})"
    if kind == "Tensor" and first and not optional:
        return f"({name}.dtype, {name}.shape, {name}.stride(), {name}.device)"
    if kind in _KEY_BY_TYPE:
        text = _KEY_BY_TYPE[kind].format(n=name)
        return f"({name} if {name} is None else {text})" if optional and kind.startswith("List") else text
    if kind in _BY_VALUE:
        return name
    if kind in _LISTS_BY_VALUE:
        return f"(tuple({name}) if {name}.__class__ is not int and {name} is not None else {name})"
    return None


class Unkeyable(Exception):
    """An argument of this op's schema is of a type that no decision can be keyed on."""


class SignatureFunctions(NamedTuple):
    """Functions made for one op; ``key``, ``call`` and ``bind`` take the op's arguments as its schema states them.

    ``kind`` takes a key and leaves out the sizes and strides of tensors, but not how many they are.
    ``forget`` must be called when an entry of ``plans`` is replaced: ``call`` keeps the signatures met most at hand.
    """

    key: Callable[..., tuple]
    kind: Callable[[tuple], tuple]
    call: Callable[..., Any]
    bind: Callable[..., tuple]
    forget: Callable[[], None]


def _never(*_: Any) -> bool:
    return False


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    guards = torch._C._dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=[list(t.shape) for t in tensors], dynamic_dims_strides=[list(t.stride()) for t in tensors])
    if not guards.check(*tensors):
        raise ValueError("guards that do not recognize what they were made of")
    return guards


class _AtHand:
    """Two signatures that ``call`` recognizes without building a key, which costs more than all else it does.

    PyTorch's guards compare the metadata of tensors with what it was, in C++. They look at more than a key does (class,
    autograd's flags), so what they recognize has the same key, and what they do not may still be found by its key.

    Attributes:
        slots: pairs of a function that recognizes the arguments, and what then runs.
    """

    PERIOD = 8  # look-ups by key between two replacements, doubled each time: what comes often is met here first

    def __init__(self, op: OpOverload, names: Sequence[str], conditions: Sequence[str | None], scope: dict[str, Any],
                 states: Sequence[str]) -> None:
        self.slots: list[tuple[Callable[..., Any], Any]] = [(_never, None), (_never, None)]
        self._parameters = parameters(op)
        self._names, self._conditions, self._scope, self._states = names, conditions, scope, states
        self._period = self._left = 1

    def forget(self) -> None:
        self.slots[:] = [(_never, None), (_never, None)]

    def notice(self, args: tuple[Any, ...], run: Callable[..., Any]) -> None:
        """Perhaps keep the signature of ``args``, which ``run`` serves, in place of the one kept longest."""
        self._left -= 1
        if self._left > 0:
            return
        self._period = self._left = min(2 * self._period, 1 << 12)
        try:
            match = self._matcher(args)
        except Exception:  # an odd tensor, or a version of PyTorch with other guards: keys serve as well
            self._left = 1 << 30
            return
        self.slots[1] = self.slots[0]
        self.slots[0] = (match, run)

    def _matcher(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        tensors, given, conditions, values = [], [], [], {}
        for i, (parameter, name, arg) in enumerate(zip(self._parameters, self._names, args)):
            if parameter.is_tensor:
                if isinstance(arg, torch.Tensor):
                    tensors.append(arg)
                    given.append(name)
                else:
                    conditions.append(f"{name}.__class__ is class_{i}")
                    values[f"class_{i}"] = arg.__class__
            if self._conditions[i] is not None:
                conditions.append(f"{self._conditions[i]} == value_{i}")
                values[f"value_{i}"] = eval(self._conditions[i] or "", self._scope, {name: arg})
        for state in self._states:
            conditions.append(f"{state} == now_{state[:-2]}")
            values[f"now_{state[:-2]}"] = eval(state, self._scope)
        if not tensors:
            raise ValueError("no tensor to guard")
        scope = {**self._scope, **values}
        # Guards ask for sizes first, which ends the process on a nested tensor.
        conditions += [f"not {name}.is_nested" for name in given]
        if len({id(t) for t in tensors}) == len(tensors):
            scope["check"] = _guards(tensors).check
            conditions.append(f"check({', '.join(given)})")
        else:  # guards of several tensors do not recognize one that comes twice
            for i, (tensor, name) in enumerate(zip(tensors, given)):
                scope[f"check_{i}"] = _guards([tensor]).check
                conditions.append(f"check_{i}({name})")
        exec(f"""
def match({', '.join(self._names)}):
    try:
        return {' and '.join(conditions)}
    except AttributeError:  # a number where there was a tensor
        return False
""", scope)
        return scope["match"]


def make_functions(op: OpOverload, plans: dict[tuple, Callable[..., Any]], miss: Callable[..., Any],
                   failed: Callable[..., Any], by_value: frozenset[str] = frozenset(),
                   state: Sequence[Callable[[], Any]] = (), tensor_bits: bool = False) -> SignatureFunctions:
    """Generate the functions that key, bind and run calls of ``op``.

    ``call`` looks the call's key up in ``plans`` and runs what it finds there with all arguments in order; ``miss`` is
    asked for it on the first call of a signature, and ``failed(error, run, args)`` when running it raises.

    Args:
        by_value: names of ``Scalar`` or ``float`` arguments whose value, not only type, is part of the key.
        state: functions of no argument whose results (global settings) are part of the key.
        tensor_bits: include each tensor's negative and zero-tensor bits, for ops that PyTorch hands over unresolved.

    Raises:
        Unkeyable: an argument's type cannot be part of a key.
    """
    declared, names = [], []
    keys: list[str] = []
    kinds: dict[int, str] = {}
    conditions: list[str | None] = []
    scope: dict[str, Any] = {"NUMBERS": NUMBERS, "plans": plans, "miss": miss, "failed": failed}
    star = False
    first = True
    for i, parameter in enumerate(parameters(op)):
        name = parameter.name if not keyword.iskeyword(parameter.name) else f"arg_{parameter.name}"
        names.append(name)
        if parameter.kwarg_only and not star:
            declared.append("*")
            star = True
        if parameter.has_default:
            scope[f"default_{i}"] = parameter.default
            declared.append(f"{name}=default_{i}")
        else:
            declared.append(name)
        expression = _key_expression(parameter, name, by_value, first)
        if expression is None:
            raise Unkeyable(f"argument {parameter.name!r} of {op} has type {parameter.type}")
        if (kind := _KIND_BY_TYPE.get(_plain_type(parameter))) is not None:
            kinds[len(keys)] = kind
        keys.append(expression)
        conditions.append(None if parameter.is_tensor else expression)
        if tensor_bits and parameter.type == "Tensor":
            keys.append(f"({name}.__class__ in NUMBERS or {name}.is_neg() or {name}._is_zerotensor())")
            conditions[-1] = keys[-1]
        first = False
    for i, function in enumerate(state):
        scope[f"state_{i}"] = function
        keys.append(f"state_{i}()")
    arguments, key, given = ", ".join(declared), "(" + ", ".join(keys) + ",)", ", ".join(names)
    parts = [f"k{i}" for i in range(len(keys))]
    kind = "".join([kinds.get(i, "{n}").format(n=part) + ", " for i, part in enumerate(parts)])
    at_hand = _AtHand(op, names, conditions, dict(scope), [f"state_{i}()" for i in range(len(state))])
    scope |= {"slots": at_hand.slots, "notice": at_hand.notice, "count": itertools.count(1).__next__}
    # Sparse, nested and other exotic tensors raise while their key is built: `miss` sorts them out.
    find = f"""
try:
    run = plans[{key}]
except KeyError as missing:
    run = miss(({given},), missing.args[0])
except Exception:
    run = miss(({given},), None)
"""
    if any(p.is_tensor for p in parameters(op)) and not any(p.is_tensor_list for p in parameters(op)):
        find = f"""
match, run = slots[0]
if not match({given}):
    match, run = slots[1]
    if not match({given}):
{textwrap.indent(find.strip(), 8 * " ")}
        else:
            if not count() % {_AtHand.PERIOD}:
                notice(({given},), run)
"""
    source = f"""
def key({arguments}):
    return {key}

def kind(key):
    {', '.join(parts)}, = key
    return ({kind})

def bind({arguments}):
    return ({given},)

def call({arguments}):
{textwrap.indent(find.strip(), 4 * " ")}
    try:
        return run({given})
    except Exception as error:
        return failed(error, run, ({given},))
"""
    exec(compile(source, f"<gemsmode signature of {op}>", "exec"), scope)
    return SignatureFunctions(scope["key"], scope["kind"], scope["call"], scope["bind"], at_hand.forget)


# -- variants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How one overload is a variant of another: in-place, ``out=``, numbers for tensors, or several of these.

    Attributes:
        base: the functional overload.
        inplace: whether the first argument is written.
        outs: positions of the arguments that are written.
        numbers: positions where the variant takes a number and the base a tensor.
        order: for each argument of the base the position of the same argument in the variant.
    """

    base: OpOverload
    inplace: bool
    outs: tuple[int, ...]
    numbers: tuple[int, ...]
    order: tuple[int, ...]


_NUMBER_FOR_TENSOR = {"number": "Tensor", "Optional[number]": "Optional[Tensor]"}


def variant_of(op: OpOverload, base: OpOverload) -> Variant | None:
    """How ``op`` derives from the functional overload ``base``, or None if it does not."""
    mine, theirs = parameters(op), parameters(base)
    if any(p.is_written or p.is_out for p in theirs):
        return None
    inputs = [(i, p) for i, p in enumerate(mine) if not p.is_out]
    if len(inputs) != len(theirs):
        return None
    position = {p.name: i for i, p in inputs}
    if len(position) != len(inputs) or set(position) != {p.name for p in theirs}:
        return None
    numbers, order = [], []
    for p in theirs:
        i = position[p.name]
        order.append(i)
        if mine[i].type != p.type:
            if _NUMBER_FOR_TENSOR.get(mine[i].type) != p.type:
                return None
            numbers.append(i)
    outs = tuple(i for i, p in enumerate(mine) if p.is_out)
    written = tuple(i for i, p in enumerate(mine) if p.is_written and not p.is_out)
    if (outs and written) or any(mine[i].is_tensor_list for i in (*outs, *written)):
        return None
    returns = len(base._schema.returns)
    if written:
        if len(written) != 1 or returns != 1:
            return None
        return Variant(base, True, written, tuple(numbers), tuple(order))
    if outs and len(outs) != returns:
        return None
    return Variant(base, False, outs, tuple(numbers), tuple(order))


def functional_name(name: str) -> str:
    """The name of the functional op for the name of an op: ``add_`` -> ``add``, ``__ior__`` -> ``__or__``."""
    if name.startswith("__i") and name.endswith("__"):
        return "__" + name[3:]
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1]
    return name
