"""A decision made ready to run: what to allocate, which kernels to launch on what, what to return.

A rule's planner turns a call's metadata into a :class:`Plan`; :func:`bind` turns a plan into the function that runs
it. On a GPU that function is assembled once per structure (how many outputs, which arguments in which slot) and then
only closed over the sizes of each new plan, so that a new size costs little.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gemsmode import launch
from gemsmode.launch import POINTER, Spec, integer_type
from gemsmode.signature import TensorMeta
from gemsmode.sizes import Traced, TracedSize
from gemsmode.target import Target

log = logging.getLogger("gemsmode")


class Arg(NamedTuple):
    """The op's argument number ``index`` (item ``item`` of it, if it is a list), a tensor."""

    index: int  # type: ignore[assignment]
    item: int | None = None


class Out(NamedTuple):
    """The plan's allocation number ``index``."""

    index: int  # type: ignore[assignment]


class At(NamedTuple):
    """The memory of ``ref`` from ``elements`` elements after its first."""

    ref: Any
    elements: int


class Into(NamedTuple):
    """The tensor number ``index`` of ``call.outs``: where a planner that writes to given tensors writes."""

    index: int  # type: ignore[assignment]


class Num(NamedTuple):
    """The op's argument number ``index``, a Python number passed to the kernel at run time.

    ``dtype`` is what the kernel sees: ``"fp32"``, ``"fp64"``, ``"i32"`` or ``"i64"``. ``from_tensor``: the argument is
    a 0-dim CPU tensor, read on the host, or a float that is cut off to an integer. ``limits``: the least and the largest
    number that PyTorch takes here on every device; calls with others are made natively, which raises or does not.
    """

    index: int  # type: ignore[assignment]
    dtype: str
    item: int | None = None
    from_tensor: bool = False
    limits: tuple[int, int] | None = None


class Size(int):
    """An integer known to the plan that must not split kernels into classes (a batch stride, a length that grows)."""

    __slots__ = ()

    def __new__(cls, value: Any) -> Any:
        return value.as_size() if value.__class__ is Traced else int.__new__(cls, value)

    @property
    def value(self) -> int:
        return int(self)


def extent(value: int) -> int | Size:
    """A size as an argument: divisibility by 16 lets masked accesses be vectors; a size of 1 is not worth a kernel."""
    return Size(value) if value == 1 else value


def stride(value: int) -> int | Size:
    """A stride of an outer dimension as an argument: only divisibility by 16 is worth a kernel of its own."""
    return value if value % 16 == 0 else Size(value)


class Alloc(NamedTuple):
    """A tensor to allocate.

    Attributes:
        shape: its sizes.
        stride: its strides.
        dtype: its dtype.
        zero: whether it is filled with zeros first.
        seed: if not None, one random int64 from PyTorch's generator: the op's argument of that number, or the device's
            default generator if that argument is None or the number negative. PyTorch draws it on the device, so that
            it is drawn afresh at each replay of a CUDA graph.
        host: whether the host reads it, so that it is on the CPU; while a CUDA graph is being captured it is on the GPU,
            because replays run without the host. No kernel has it as an argument.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zero: bool = False
    seed: int | None = None
    host: bool = False

    @property
    def meta(self) -> TensorMeta:
        return TensorMeta(self.dtype, self.shape, self.stride, torch.device("meta"))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of ``shape``, as PyTorch gives them (sizes of 0 count as 1)."""
    strides, step = [], 1
    for size in shape[::-1]:
        strides.append(step)
        if size:
            step *= size
    return tuple(strides[::-1])


class Disjoint(NamedTuple):
    """A written and a read argument that must not share memory (unless they start at one place, if ``same``)."""

    written: Arg
    read: Arg
    written_bytes: int
    read_bytes: int
    same: bool


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs in each of three dimensions.
        args: run-time arguments in the order of the kernel's parameters: :class:`Arg`, :class:`Out`, :class:`Num`,
            :class:`Size`, an int (which is specialized as Triton does: 1, divisible by 16, other), a float, or a tuple
            of these for a parameter that is a tuple.
        constants: pairs of constexpr parameter and value.
        num_warps: warps a program.
        num_stages: software pipelining depth.
        asserts: whether the kernel's ``tl.device_assert`` are to hold (Triton leaves them out otherwise).
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 2
    asserts: bool = False


class Plan(NamedTuple):
    """What a call does, for every call of its signature.

    Attributes:
        allocs: tensors to allocate, outputs and workspace.
        launches: kernels in order; none for an empty result.
        returns: one reference (:class:`Out` or :class:`Arg`) or a tuple of references for several results; a
            :class:`Size` returns that integer, None returns None.
        metas: the metadata of every tensor argument referred to, by reference.
        disjoint: pairs of arguments that must not share memory, checked on each call.
        elementwise: each output element depends on the input elements of the same index only, so that an output may
            be an input.
        bytes: bytes that the call must move, if stated.
        flops: floating-point operations of the call, if stated.
        aligned: the kernels need tensors that start at multiples of 16 bytes; calls with others run natively.
        then: for results whose sizes depend on values: plans the rest once the host has read ``returns``, one int64
            tensor, from the list of its values. In that second plan ``Arg(i)`` is the call's argument as before, and
            ``Arg(arity + j)`` (``arity`` arguments in the op's schema) the first plan's allocation number ``j``. The
            second plan says what is returned. Kept for the last few lists of values.
        example: a list of values to call ``then`` with, for those who look at plans without running them.
    """

    allocs: tuple[Alloc, ...]
    launches: tuple[Launch, ...]
    returns: Any
    metas: dict[Arg, TensorMeta]
    elementwise: bool = False
    disjoint: tuple[Disjoint, ...] = ()
    bytes: int | None = None
    flops: int | None = None
    aligned: bool = False
    then: Callable[[list[int]], Plan] | None = None
    example: tuple[int, ...] = ()


class OutOfLimits(OverflowError):
    """A number that a call was made with is outside of its :attr:`Num.limits`: PyTorch itself says what becomes of the call."""


class Decline(Exception):
    """Raised by a planner that cannot serve a call; the text is the reason that the report shows."""


# -- types of arguments ------------------------------------------------------------------------------------------------


def _ref_dtype(plan: Plan, ref: Arg | Out) -> torch.dtype:
    return plan.metas[ref].dtype if ref.__class__ is Arg else plan.allocs[ref.index].dtype


def _pointer_type(plan: Plan, at: At, aligned: bool) -> str:
    dtype = _ref_dtype(plan, at.ref)
    divisible = (aligned or at.ref.__class__ is Out) and at.elements * dtype.itemsize % 16 == 0
    return POINTER[dtype] + ("D" if divisible else "")


def _types(plan: Plan, args: tuple[Any, ...], aligned: bool) -> tuple[Any, ...]:
    kinds: list[Any] = []
    for value in args:
        cls = value.__class__
        if cls is Arg:
            kinds.append(POINTER[plan.metas[value].dtype] + ("D" if aligned else ""))
        elif cls is Out:
            kinds.append(POINTER[plan.allocs[value.index].dtype] + "D")
        elif cls is int:
            kinds.append(integer_type(value))
        elif cls is Num:
            kinds.append(value.dtype)
        elif cls is Size:
            kinds.append(integer_type(value.value, specialize=False))
        elif cls is float:
            kinds.append("fp32")
        elif cls is At:
            kinds.append(_pointer_type(plan, value, aligned))
        else:
            kinds.append(_types(plan, value, aligned))
    return tuple(kinds)


def specs(plan: Plan, aligned: bool = True) -> list[Spec]:
    """What each launch of ``plan`` has to be compiled for; of a plan in two stages, with the second for its example."""
    found = [Spec(step.kernel, _types(plan, step.args, aligned), step.constants, step.num_warps, step.num_stages, step.asserts)
             for step in plan.launches]
    return found if plan.then is None else found + specs(plan.then(list(plan.example)), aligned)


# -- running -----------------------------------------------------------------------------------------------------------

_poisoned = False


def poison(on: bool) -> None:
    """For tests: fill every allocation of plans bound from now on with NaN (or a large integer) first."""
    global _poisoned
    _poisoned = on


def _poisoned_empty(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        tensor = empty(shape, stride, dtype)
        if dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if dtype == torch.bool else 113)

    return allocate


@functools.cache
def _allocator(device_type: str) -> Callable[..., torch.Tensor]:
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}", None)
    if fast is not None:
        return fast

    def allocate(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device_type)

    return allocate


def bind(plan: Plan, target: Target, arity: int, native: Callable[..., Any], device: int = 0) -> Callable[..., Any]:
    """The function that runs ``plan`` on the op's ``arity`` arguments, given in order.

    Compiles what is not compiled yet, before anything is written. ``native`` is called instead when tensors that must
    not share memory do (PyTorch then raises or copes as it always does).

    Raises:
        Whatever Triton raises when a kernel does not compile or load.
    """
    if plan.then is not None:
        return _bind_staged(plan, plan.then, target, arity, native, device)
    empty = _allocator(target.device_type)
    if _poisoned:
        empty = _poisoned_empty(empty)
    if target.interpreted:
        run = _bind_generic(plan, target.device_type, empty, native, [functools.partial(launch.interpreted_launch, s, step.grid)
                                                   for s, step in zip(specs(plan), plan.launches)])
        return _bind_checked(plan, run, native) if plan.aligned else run
    key, values = structure(plan, target, arity, device)
    ready = _ready.get(key)
    if ready is None:
        ready = _ready[key] = _make_ready(plan, target, arity, device, empty)
    factory, fixed, _, _ = ready
    public = _Public(plan, target, device, empty, native)
    if factory is None:
        return _bind_checked(plan, functools.partial(public, True), native if plan.aligned else functools.partial(public, False))
    return factory(public, native, *launch.hook_lists(), *fixed, *values)


def structure(plan: Plan, target: Target, arity: int, device: int) -> tuple[tuple[Any, ...], list[Any]]:
    """All of ``plan`` that kernels and the assembled function depend on, and the values that the function is closed over."""
    returned: list[Any] = []
    flat: list[Any] = [arity, device, id(target), plan.aligned, _poisoned, _walk_returns(plan.returns, returned)]
    values: list[Any] = []
    for rule in plan.disjoint:
        flat.append(rule[:2] + rule[4:])
        values += rule[2:4]
    for alloc in plan.allocs:
        flat.append(alloc[2:])
        values += alloc[:3]
    for ref, meta in plan.metas.items():
        flat += (ref, meta.dtype)
    for step in plan.launches:
        kernel, grid, args, *rest = step
        flat += (id(kernel), *rest)
        values += grid
        _walk(plan, args, flat, values)
    values += returned
    return tuple(flat), values


def binder(key: tuple[Any, ...], plan_of: Callable[[tuple[Any, ...]], Plan], target: Target, native: Callable[..., Any],
           device: int) -> Callable[[list[Any]], Callable[..., Any]] | None:
    """:func:`bind` for plans of one :func:`structure`, ``key``, from their values alone; None if nothing was assembled for it.

    ``plan_of`` makes the plan from a call's arguments, for calls that take the public way.
    """
    factory, fixed, _, _ = _ready[key]
    if factory is None:
        return None
    empty = fixed[0]
    return lambda values: factory(_Public(plan_of, target, device, empty, native), native, *launch.hook_lists(), *fixed, *values)


_MAX_SECOND_STAGES = 32


def _bind_staged(plan: Plan, then: Callable[[list[int]], Plan], target: Target, arity: int, native: Callable[..., Any],
                 device: int) -> Callable[..., Any]:
    """Run ``plan``, read its result on the host, and run what ``then`` plans for the values read."""
    assert plan.returns.__class__ is Out and not plan.disjoint
    read = plan.returns.index
    first = bind(plan._replace(returns=tuple([Out(j) for j in range(len(plan.allocs))]), then=None), target, arity, native, device)
    stages: dict[tuple[int, ...], Callable[..., Any]] = {}

    def native_second(*args: Any) -> Any:
        return native(*args[:arity])

    def run(*args: Any) -> Any:
        made = first(*args)
        values = made[read].tolist()
        key = tuple(values)
        second = stages.get(key)
        if second is None:
            second = bind(then(values), target, arity + len(made), native_second, device)
            if len(stages) >= _MAX_SECOND_STAGES:
                stages.pop(next(iter(stages)), None)
            stages[key] = second
        return second(*args, *made)

    return run


_Ready = tuple["Callable[..., Callable[..., Any]] | None", tuple[Any, ...], Target, list[Spec]]

_ready: dict[tuple[Any, ...], _Ready] = {}
"""By all of a plan but its sizes: the factory of the assembled function (None: the public way), what all such plans give
it, and target and specs (target and kernels are in the key by their ids and so must stay alive)."""


def _walk(plan: Plan, args: tuple[Any, ...], flat: list[Any], values: list[Any]) -> None:
    """Append to ``flat`` what of the arguments kernels and text depend on, and to ``values`` what each plan differs in."""
    for value in args:
        cls = value.__class__
        if cls is int or cls is Traced:
            # The classes of `integer_type`, in short.
            flat.append(("1" if value == 1 else value & 15 == 0) if -0x80000000 <= value < 0x80000000 else integer_type(value))
            values.append(value)
        elif cls is Size or cls is TracedSize:
            flat.append("n" if -0x80000000 <= value < 0x80000000 else "N")
            values.append(value.real)
        elif cls is tuple:
            flat.append(~len(value))
            if value:
                _walk(plan, value, flat, values)
        elif cls is float:
            flat.append(float)
            values.append(value)
        elif cls is At:
            ref, elements = value
            start = elements * _ref_dtype(plan, ref).itemsize
            flat += (At, ref, start % 16 == 0)
            values.append(start)
        else:
            flat.append(value)


def _walk_returns(returns: Any, values: list[Any]) -> Any:
    """What of the results the text depends on; the integers among them go to ``values``."""
    cls = returns.__class__
    if cls is Size or cls is TracedSize:
        values.append(returns.value)
        return "n"
    if cls is list:
        return ("list", *[_walk_returns(r, values) for r in returns])
    return tuple([_walk_returns(r, values) for r in returns]) if cls is tuple else returns


def _make_ready(plan: Plan, target: Target, arity: int, device: int, empty: Callable[..., torch.Tensor]) -> _Ready:
    wanted = specs(plan)
    entries = [launch.entry(launch.compile(s, target, device), s) for s in wanted]
    known = [e for e in entries if e is not None]
    if len(known) < len(entries) or target.device_type != "cuda":
        return None, (), target, wanted
    text = _text(plan, wanted, entries, arity, torch.cuda.device_count() > 1)
    factory = _factories.get(text)
    if factory is None:
        scope: dict[str, Any] = {}
        exec(compile(text, "<gemsmode plan>", "exec"), scope)
        factory = _factories[text] = scope["make"]
    fixed = [empty, torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice, device, _number, _draw, _host, target.device_type,
             torch.uint8]
    for e in known:
        fixed += (e.function, *e.before)
    return factory, tuple(fixed), target, wanted


def _bind_checked(plan: Plan, run: Callable[..., Any], unaligned: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``plan`` the public way, with kernels that fit the alignment of the tensors at hand."""
    pointers = tuple(plan.metas)

    def checked(*args: Any) -> Any:
        bits = 0
        for ref in pointers:
            bits |= _resolve(ref, args, []).data_ptr()
        return unaligned(*args) if bits & 15 else run(*args)

    return checked


class _Public:
    """Runs a plan the public way, with kernels for aligned tensors or for any; each is made when it is first called."""

    __slots__ = ("_given", "_made")

    def __init__(self, *given: Any) -> None:
        self._given = given
        self._made: dict[bool, Callable[..., Any]] | None = None

    def __call__(self, aligned: bool, *args: Any) -> Any:
        if self._made is None:
            self._made = {}
        run = self._made.get(aligned)
        if run is None:
            plan, *rest = self._given
            run = self._made[aligned] = _bind_public(plan if plan.__class__ is Plan else plan(args), *rest, aligned=aligned)
        return run(*args)


def _bind_public(plan: Plan, target: Target, device: int, empty: Callable[..., torch.Tensor],
                 native: Callable[..., Any], *, aligned: bool) -> Callable[..., Any]:
    """Run ``plan`` through Triton's public launcher, on ``device`` whichever device is current."""
    wanted = specs(plan, aligned)
    compiled = [launch.compile(s, target, device) for s in wanted]
    run = _bind_generic(plan, target.device_type, empty, native, [functools.partial(launch.public_launch, c, s, step.grid)
                                              for c, s, step in zip(compiled, wanted, plan.launches)])
    module = getattr(torch, target.device_type)

    def on_device(*args: Any) -> Any:
        with module.device(device):
            return run(*args)

    return on_device


def _resolve(value: Any, args: tuple[Any, ...], allocated: list[torch.Tensor]) -> Any:
    cls = value.__class__
    if cls is Arg:
        return args[value.index] if value.item is None else args[value.index][value.item]
    if cls is Out:
        return allocated[value.index]
    if cls is Num:
        number = args[value.index] if value.item is None else args[value.index][value.item]
        if isinstance(number, torch.Tensor):
            number = number.item()
        if value.limits is not None:
            number = _number(number, *value.limits)
        return float(number) if value.dtype.startswith("fp") else int(number)
    if cls is Size:
        return value.value
    if cls is At:
        tensor = _resolve(value.ref, args, allocated)
        return tensor.as_strided((1,), (1,), tensor.storage_offset() + value.elements)
    if cls is tuple:
        return tuple(_resolve(v, args, allocated) for v in value)
    return value


def _shares_memory(rule: Disjoint, args: tuple[Any, ...]) -> bool:
    written, read = _resolve(rule.written, args, []).data_ptr(), _resolve(rule.read, args, []).data_ptr()
    if rule.same and written == read:
        return False
    return written < read + rule.read_bytes and read < written + rule.written_bytes


def _bind_generic(plan: Plan, device_type: str, empty: Callable[..., torch.Tensor], native: Callable[..., Any],
                  launches: Sequence[Callable[[tuple[Any, ...]], None]]) -> Callable[..., Any]:
    """Run ``plan`` by walking it: for the interpreter, and where the assembled function cannot serve."""

    def run(*args: Any) -> Any:
        for rule in plan.disjoint:
            if _shares_memory(rule, args):
                return native(*args)
        allocated = []
        for alloc in plan.allocs:
            if alloc.seed is not None:
                allocated.append(_draw(device_type, args[alloc.seed] if alloc.seed >= 0 else None))
                continue
            if alloc.host:
                allocated.append(_host(alloc.shape, alloc.stride, alloc.dtype, empty))
                continue
            tensor = empty(alloc.shape, alloc.stride, alloc.dtype)
            allocated.append(tensor.zero_() if alloc.zero else tensor)
        for step, start in zip(plan.launches, launches):
            start(tuple([_resolve(v, args, allocated) for v in step.args]))
        if isinstance(plan.returns, list):
            return [_resolve(r, args, allocated) for r in plan.returns]
        return _resolve(plan.returns, args, allocated)

    return run


# -- the assembled function --------------------------------------------------------------------------------------------
#
# One text per structure of plan, closed over the values of each plan. `bind` collects the values in the order in which
# `_text` names them; the text is not made again for a new size of a known structure.


def _draw(device_type: str, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device_type, generator=generator)


def _host(shape: Any, stride: Any, dtype: torch.dtype, empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return empty(shape, stride, dtype)
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def _number(value: Any, least: int | None = None, most: int | None = None) -> Any:
    number = value.item() if isinstance(value, torch.Tensor) else value
    if least is not None and most is not None and not least <= number <= most:  # neither infinities nor NaN are
        raise OutOfLimits(f"{number} is not between {least} and {most}")
    return number if isinstance(value, torch.Tensor) else int(number)


class _Names:
    """Hands out the names of a plan's values in their order."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"v{self.count - 1}"


def _at(ref: Arg | Num) -> str:
    return f"a{ref.index}" if ref.item is None else f"a{ref.index}[{ref.item}]"


def _pointer(ref: Arg) -> str:
    return f"p{ref.index}" if ref.item is None else f"p{ref.index}_{ref.item}"


def _argument(value: Any, names: _Names, keep_ones: bool) -> str:
    cls = value.__class__
    if cls is Arg:
        return _pointer(value) + ", "
    if cls is Out:
        return f"q{value.index}, "
    if cls is Num:
        if value.limits is not None:
            return f"number({_at(value)}, {value.limits[0]}, {value.limits[1]}), "
        return f"number({_at(value)}), " if value.from_tensor else f"{_at(value)}, "
    if cls is At:
        return f"{_argument(value.ref, names, keep_ones)[:-2]} + {names()}, "
    if cls is tuple:
        inner = "".join(_argument(v, names, keep_ones) for v in value)
        return f"({inner}), " if keep_ones else inner
    name = names()
    # An integer that is 1 is a constant of the compiled kernel, which then has no parameter for it.
    return "" if cls is int and value == 1 and not keep_ones else name + ", "


def _returned(returns: Any, names: _Names) -> str:
    if isinstance(returns, list):
        return "[" + ", ".join(_returned(r, names) for r in returns) + "]"
    cls = returns.__class__
    if cls is Size:
        return names()
    if returns is None:
        return "None"
    if cls is Out:
        return f"out{returns.index}"
    if cls is Arg:
        return _at(returns)
    return "(" + "".join(f"{_returned(r, names)}, " for r in returns) + ")"


def _text(plan: Plan, wanted: Sequence[Spec], entries: Sequence[Any], arity: int, several_devices: bool) -> str:
    names = _Names()
    fixed: list[str] = []
    given = ", ".join(f"a{i}" for i in range(arity))
    lines = [f"def run({given}):"]
    lines += [f"    {_pointer(ref)} = {_at(ref)}.data_ptr()" for ref in plan.metas]
    away = " or current_device() != device" if several_devices else ""
    lines += [f"    if enter_hooks or exit_hooks{away}:", f"        return public(True, {given})"]
    if plan.metas:
        unaligned = f"native({given})" if plan.aligned else f"public(False, {given})"
        lines += [f"    if ({' | '.join(_pointer(ref) for ref in plan.metas)}) & 15:", f"        return {unaligned}"]
    for rule in plan.disjoint:
        w, r = _pointer(rule.written), _pointer(rule.read)
        differ = f"{w} != {r} and " if rule.same else ""
        written_bytes, read_bytes = names(), names()
        lines += [f"    if {differ}{w} < {r} + {read_bytes} and {r} < {w} + {written_bytes}:", f"        return native({given})"]
    for i, alloc in enumerate(plan.allocs):
        sizes = f"{names()}, {names()}, {names()}"
        if alloc.seed is not None:
            lines.append(f"    out{i} = draw(device_type, {f'a{alloc.seed}' if alloc.seed >= 0 else 'None'})")
        elif alloc.host:
            lines.append(f"    out{i} = host({sizes}, empty)")
        else:
            lines.append(f"    out{i} = empty({sizes}){'.zero_()' if alloc.zero else ''}")
        lines.append(f"    q{i} = out{i}.data_ptr()")
    if plan.launches:
        lines.append("    stream = stream_of(device)")
    for i, (step, spec, e) in enumerate(zip(plan.launches, wanted, entries)):
        grid = names(), names(), names()
        if e.scratch:
            lines.append(f"    scratch{i} = empty(({' * '.join(grid)} * {e.scratch},), (1,), uint8)")
        function, *before = [f"f{i}_{j}" for j in range(1 + len(e.before))]
        fixed += (function, *before)
        before = [f"scratch{i}.data_ptr()" if value is launch.SCRATCH else name for name, value in zip(before, e.before)]
        head = f"{function}({', '.join((*grid, 'stream', *before))}, "
        if e.nested:
            runtime, _ = launch.split_parameters(spec.kernel)
            by_name = {n: _argument(v, names, True) for n, v in zip(runtime, step.args)}
            lines.append(f"    {head}{''.join(by_name.get(n, 'None, ') for n in spec.kernel.arg_names)})")
        else:
            lines.append(f"    {head}({''.join(_argument(v, names, False) for v in step.args)}))")
    lines.append(f"    return {_returned(plan.returns, names)}")
    given = ", ".join(["public, native, enter_hooks, exit_hooks, empty, stream_of, current_device, device, number, draw, host",
                       "device_type, uint8", *fixed, *[f"v{i}" for i in range(names.count)]])
    return (f"def make({given}):\n"
            + "".join(f"    {line}\n" for line in lines) + "    return run\n")


_factories: dict[str, Callable[..., Callable[..., Any]]] = {}
