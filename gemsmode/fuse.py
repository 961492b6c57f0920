"""``GemsMode(fuse=True)``, experimental: neighbouring elementwise calls, and the row reductions between them, run as one kernel.

A call whose rule is one elementwise kernel, or a reduction over the last dimension with ``keepdim``, is *deferred*: its
output is allocated and given back unwritten, and the call joins a group of calls that read each other's results. A group
is written, as one generated kernel, as soon as something outside it needs a value or would change one that it still reads:

- any other aten call on one of its tensors or on a view of one; an in-place call on what it reads;
- the end of the block, another ``GemsMode`` block, a change of stream, a CUDA graph that begins, ends or replays, an event
  that is recorded, a synchronization;
- whatever asks a tensor for its memory from Python: ``data_ptr()`` (a Triton launch does), ``numpy()``, ``tolist()``, DLPack,
  ``untyped_storage()``, printing, copying and pickling, and code that Inductor compiled. These functions are wrapped while a
  block lasts.

What nobody holds any more by then is not written at all, nor read back; its memory was allocated, and is free again as soon
as its last holder lets go.

Results equal those of the single calls bit for bit, but for the order in which a reduction adds: the generated kernel calls
the scalar functions of the rules themselves, rounds each intermediate to its dtype, and hides each float32 and float64
intermediate from the compiler, which would otherwise contract a product and a sum of two calls to one operation.

Not seen, and so not guarded: C++ code that takes a tensor's memory without the dispatcher (an extension that is no
registered op, a consumer of PyTorch's C exchange of DLPack tensors), code that excludes the Python dispatch key, and other
threads that run under no mode.

A group that cannot be generated or compiled is run call by call, in order, by the ordinary way.
"""

from __future__ import annotations

import functools
import linecache
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch._ops import OpOverload

from gemsmode import launch as launch_module
from gemsmode import plan as plan_module
from gemsmode.handlers import OpHandler, Policy, _exotic, _map_refs
from gemsmode.native import communicates
from gemsmode.ops import pointwise as pointwise_module
from gemsmode.ops.layout import broadcast_strides, merge
from gemsmode.ops.pointwise import (
    MAX_DIMS,
    choose_flat,
    choose_tile,
    convert,
    flat_kernel,
    indexed_kernel,
    offset,
    power_of_2,
    tiled_kernel,
)
from gemsmode.ops.reduction import reduce_kernel, tree
from gemsmode.plan import Alloc, Arg, Launch, Num, Out, Plan, Size, extent, specs, stride
from gemsmode.signature import TensorMeta, describe, make_functions
from gemsmode.target import current

log = logging.getLogger("gemsmode")

MAX_ROOM = 64
"""Calls in one group, and what they read, together; what comes after them begins another."""

MAX_GROUPS = 16
"""Groups that wait at one time, in all threads: each holds the memory of what it reads."""

MAX_ROW = 16384
"""Elements of a row that one program reduces."""

_POINTWISE = (flat_kernel, tiled_kernel, indexed_kernel)
_storage_of = torch._C.TensorBase.untyped_storage
_data_ptr = torch._C.TensorBase.data_ptr
_revive = torch.UntypedStorage._new_with_weak_ptr
_free_weak_ref = torch.UntypedStorage._free_weak_ref

_NEEDS_NO_VALUE = frozenset(f"aten.{name}" for name in (
    "empty.memory_format", "empty_like.default", "empty_strided.default", "new_empty.default", "new_empty_strided.default",
    "empty_permuted.default", "_unsafe_view.default", "_reshape_alias.default", "is_same_size.default", "sym_size.int",
    "sym_size.default", "sym_stride.int", "sym_stride.default", "sym_numel.default", "sym_storage_offset.default"))
"""Ops besides views that look at a tensor's metadata alone."""


# -- what a call of one signature does ---------------------------------------------------------------------------------

_meta_numbers: dict[tuple[Any, ...], int] = {}
"""A number for each dtype, shape and strides met, which is cheaper to compare."""


def _meta_number(meta: TensorMeta) -> int:
    return _meta_numbers.setdefault((meta.dtype, meta.shape, meta.stride), len(_meta_numbers))


class _Recipe:
    """A call that can be deferred.

    Attributes:
        handler: the op's.
        device: the index of the device that it runs on.
        shape: what it runs over: the result's shape, the input's of a reduction.
        reduces: whether it reduces rows of ``shape`` to one element.
        result: the result's dtype, shape and strides.
        result_meta: the same as a number.
        tensors: for each tensor it reads: position among the arguments, metadata, its number.
        numbers: for each Python number it reads: position, whether it becomes a float, and else the limits of its value.
        kinds: the dtypes of the kernel's parameters for them.
        operands: for each parameter of ``function``: whether it is a tensor, the position in ``tensors`` or ``numbers``, and
            the names of the dtypes that it is converted to and computed in.
        inplace: the position of the argument that it writes, or None.
        function: the scalar function; for a reduction None.
        reduction: of a reduction its functions and what a masked element reads as.
        launch: the launch of the call by itself.
        sizes: of a new result shape, strides and dtype.
        template: the arguments that are the same for every call of this signature; None elsewhere.
    """

    __slots__ = ("device", "empty", "function", "handler", "inplace", "kinds", "launch", "numbers", "operands", "reduces", "reduction",
                 "result", "result_meta", "shape", "sizes", "stream", "target", "template", "tensors")

    def __init__(self, handler: OpHandler, plan: Plan, args: Sequence[Any], device: int) -> None:
        self.handler, self.device = handler, device
        self.target = handler.policy.target
        device_type = self.target.device_type
        self.empty = _empty_for(device_type)
        self.stream = _no_stream
        if device_type == "cuda" and _current_stream is not None:
            self.stream = _current_stream if torch.cuda.device_count() == 1 else _stream_here
        step = plan.launches[0]
        self.launch = step
        constants = dict(step.constants)
        self.reduces = step.kernel is reduce_kernel
        self.inplace = plan.returns.index if plan.returns.__class__ is Arg else None
        sources = step.args[1]
        self.tensors: list[tuple[int, TensorMeta, int]] = []
        self.numbers: list[tuple[int, bool, int, int]] = []
        self.kinds: list[str] = []
        self.operands: list[tuple[bool, int, str, str]] = []
        hows = [(0, *how) for how in constants["HOW"]] if self.reduces else constants["HOW"]
        for source, (_, common, compute) in zip(sources, hows):
            if source.__class__ is Arg:
                meta = plan.metas[source]
                self.operands.append((True, len(self.tensors), _name_of(common), _name_of(compute)))
                self.tensors.append((source.index, meta, _meta_number(meta)))
            else:
                self.operands.append((False, len(self.numbers), _name_of(common), _name_of(compute)))
                least, most = source.limits or (-2**63, 2**63 - 1)
                self.numbers.append((source.index, source.dtype[0] == "f", least, most))
                self.kinds.append(source.dtype)
        self.function = None if self.reduces else constants["FN"]
        self.reduction = (constants["LANE"], constants["BLOCK"], constants["MERGE"], constants["POST"], constants["OTHER"][0]
                          ) if self.reduces else None
        self.result = plan.metas[plan.returns] if self.inplace is not None else plan.allocs[0].meta
        self.result_meta = _meta_number(self.result)
        self.shape = self.tensors[0][1].shape if self.reduces else self.result.shape
        self.sizes = (self.result.shape, self.result.stride, self.result.dtype)
        varying = {i for i, _, _ in self.tensors} | {n[0] for n in self.numbers} | ({self.inplace} - {None})
        self.template = [None if i in varying else a for i, a in enumerate(args)]

    def enqueue(self, *args: Any) -> Any:
        """Let a call wait and give back its result, unwritten; :func:`_straight` is a faster way for most calls."""
        numbers: list[float | int] = []
        for index, is_float, least, most in self.numbers:
            if is_float:
                numbers.append(float(args[index]))
            else:
                number = int(args[index])
                if not least <= number <= most:
                    raise OverflowError(number)
                numbers.append(number)
        with _lock:
            stream = self.stream(self.device)
            thread = _identify()
            home: _Group | None = None
            found = []
            for index, meta, number in self.tensors:
                tensor = args[index]
                storage = _storage_of(tensor)
                pointer = _data_ptr(tensor)
                value = _pending.get(storage._cdata)
                if value is not None:
                    group = value.group
                    if value.pointer != pointer or value.meta != number or group.stream != stream or group.thread != thread:
                        group.flush()
                        value = None
                    elif home is None:
                        home = group
                    elif group is not home:
                        if home.can_absorb(group):
                            home.absorb(group)
                        else:
                            group.flush()
                            value = None
                found.append((value, storage, pointer, meta, number))
            if self.inplace is not None:
                return self._enqueue_inplace(args[self.inplace], found, home, stream, thread, numbers)
            if home is not None and (home.done or not home.accepts(self)):
                home.flush()
                home = None
            if home is None:
                home = _Group(self, stream, thread)
            made = self.empty(*self.sizes)
            self._append(home, found, None, numbers)
            storage = _storage_of(made)
            _pending[storage._cdata] = value = _Value(home, storage._weak_ref(), _data_ptr(made), self.result_meta, None)
            home.values.append(value)
            return made

    def _append(self, home: _Group, found: list[Any], target: int | None, numbers: list[float | int]) -> None:
        sources = []
        for value, storage, pointer, meta, number in found:
            if value is not None and value.group is home:
                sources.append(value.index)
            else:
                at = home.slot_at.get((pointer, number))
                sources.append(~(home.slot(storage, pointer, meta, number) if at is None else at))
        home.steps.append((self, tuple(sources), target))
        home.room -= len(sources) + 1
        if numbers:
            home.numbers += numbers

    def _enqueue_inplace(self, target: torch.Tensor, found: list[Any], home: _Group | None, stream: int, thread: int,
                         numbers: list[float | int]) -> Any:
        own = _storage_of(target)
        address, pointer, number = own._cdata, _data_ptr(target), self.result_meta
        if any(s._cdata == address and (p != pointer or n != number) for _, s, p, _, n in found):
            raise ValueError("it reads what it writes elsewhere")
        before = _pending.get(address)
        if before is not None and (before.group is not home or before.pointer != pointer or before.meta != number):
            before.group.flush()
            before = None
        for group in list(_readers.get(address, ())):
            if group is not home or any(s.storage._cdata == address and (s.pointer != pointer or s.number != number) for s in group.slots):
                group.flush()
        if home is not None and (home.done or not home.accepts(self)):
            home.flush()
            home = None
        if home is None:
            home = _Group(self, stream, thread)
        if before is not None and before.group is home:
            before.is_last = False
            slot = before.slot
            self._append(home, found, before.index if slot is None else ~slot, numbers)
        else:
            slot = home.slot(own, pointer, self.result, number)
            self._append(home, found, ~slot, numbers)
        _pending[address] = value = _Value(home, address, pointer, number, slot)
        home.values.append(value)
        return target

    @property
    def name(self) -> str:
        return self.handler.op._schema.name.partition("::")[2]


_DTYPE_NAMES = {getattr(tl, n): f"tl.{n}" for n in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
                                                    "uint16", "uint32", "uint64", "int1")}


def _name_of(dtype: Any) -> str:
    return _DTYPE_NAMES[dtype]


def _triton_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES[pointwise_module.TRITON[dtype]]


def _deferrable(op: OpOverload, plan: Plan | None) -> bool:
    """Whether ``plan`` is one elementwise kernel of one result, or reduces rows, and can be part of another kernel."""
    if plan is None or not plan.launches or plan.then is not None or plan.aligned:
        return False
    written = plan.returns.__class__ is Arg
    # A plan that writes to a fresh tensor what an in-place call then copies is not told apart otherwise.
    if written != op._schema.is_mutable or (not written and plan.returns.__class__ is not Out):
        return False
    first = plan.launches[0]
    if len(first.args[0]) != 1 and first.kernel in _POINTWISE:
        return False
    if any(ref.item is not None for ref in plan.metas) or any(m.dtype not in pointwise_module.TRITON for m in plan.metas.values()):
        return False
    if first.kernel is reduce_kernel:
        if written or len(first.args[1]) != 1 or first.args[-1] != () or first.args[1][0].__class__ is not Arg:
            return False
        shape, result = plan.metas[first.args[1][0]].shape, plan.allocs[0].shape
        returned = sum(1 for a in plan.allocs if a.shape == result)
        return bool(shape) and 1 < shape[-1] <= MAX_ROW and result == (*shape[:-1], 1) and returned >= 1 and plan.returns == Out(0)
    if first.kernel not in _POINTWISE or len(plan.launches) != 1 or len(plan.allocs) != (0 if written else 1) or not plan.elementwise:
        return False
    for source in first.args[1]:
        if source.__class__ is not Arg and (source.__class__ is not Num or source.from_tensor or source.item is not None):
            return False
    return any(source.__class__ is Arg for source in first.args[1]) or written


# -- groups of calls that wait -----------------------------------------------------------------------------------------

_lock = launch_module.interpreter_lock if current().interpreted else threading.RLock()
"""Guards all that follows. Where kernels are interpreted it is their lock: whoever holds one of two would wait for the other."""


class _Value:
    """The result of a call that waits.

    Attributes:
        group: the group that it is of.
        index: its number there.
        address: the address of its storage; the group holds a weak reference to it.
        pointer: the address of its first element.
        meta: its dtype, shape and strides, as a number.
        slot: the group's tensor that it is written to, of an in-place call on a tensor from outside the group; else None.
        is_last: False once an in-place call of the group has written over it.
    """

    __slots__ = ("address", "group", "index", "is_last", "meta", "pointer", "slot")

    def __init__(self, group: _Group, address: int, pointer: int, meta: int, slot: int | None) -> None:
        self.group, self.address, self.pointer, self.meta, self.slot = group, address, pointer, meta, slot
        self.index = len(group.values)
        self.is_last = True


class _Slot(NamedTuple):
    """A tensor that a group reads (or writes in place), and that no call of the group makes."""

    storage: Any
    pointer: int
    meta: TensorMeta
    number: int
    readers: list[_Group]


_Step = tuple[_Recipe, tuple[int, ...], "int | None"]
"""A call of a group: what it does; for each tensor it reads a value's number, or ``~slot``; and, in the same way, what an
in-place call writes over."""


def _straight(recipe: _Recipe, arity: int) -> Callable[..., Any]:
    """What a call of ``recipe`` runs: ``recipe.enqueue`` for calls that are not in-place and have no decision to make."""
    if recipe.inplace is not None:
        return recipe.enqueue
    given = ", ".join(f"a{i}" for i in range(arity))
    scope: dict[str, Any] = {"slow": recipe.enqueue, "recipe": recipe, "lock": _lock, "storage_of": _storage_of, "data_ptr": _data_ptr,
                             "waiting": _pending.get, "pending": _pending, "stream_of": recipe.stream, "identify": _identify,
                             "Group": _Group, "Value": _Value, "empty": recipe.empty}
    numbers = []
    lines = []
    for i, (index, is_float, least, most) in enumerate(recipe.numbers):
        numbers.append(f"n{i}")
        lines.append(f"n{i} = {'float' if is_float else 'int'}(a{index})")
        if not is_float:
            lines.append(f"if not {least} <= n{i} <= {most}: raise OverflowError(n{i})")
    lines.append("with lock:")
    count = len(recipe.tensors)
    for i, (index, meta, number) in enumerate(recipe.tensors):
        scope[f"meta{i}"] = meta
        lines += [f"    s{i} = storage_of(a{index}); p{i} = data_ptr(a{index}); v{i} = waiting(s{i}._cdata)",
                  f"    if v{i} is not None and (v{i}.pointer != p{i} or v{i}.meta != {number}): return slow({given})"]
    lines.append("    home = None")
    for i in range(count):
        lines += [f"    if v{i} is not None:",
                  f"        if home is None: home = v{i}.group" if i else "        home = v0.group"]
        if i:
            lines.append(f"        elif home is not v{i}.group: return slow({given})")
    scope |= {"shape": recipe.shape, "allocated": recipe.sizes[0], "strides": recipe.sizes[1], "dtype": recipe.sizes[2]}
    at_once = f"home.shape != shape or home.room < {count + 1} or " if not recipe.reduces else ""
    accepts = "not home.accepts(recipe) or " if recipe.reduces else ""
    lines += [f"    if home is None: home = Group(recipe, stream_of({recipe.device}), identify())",
              f"    elif {at_once}home.stream != stream_of({recipe.device}) or home.thread != identify() or "
              f"{accepts}home.device != {recipe.device}: return slow({given})",
              "    made = empty(allocated, strides, dtype)"]
    for i, (_, _, number) in enumerate(recipe.tensors):
        lines.append(f"    i{i} = ~home.slot(s{i}, p{i}, meta{i}, {number}) if v{i} is None else v{i}.index")
    lines += [f"    home.steps.append((recipe, ({''.join(f'i{i}, ' for i in range(count))}), None))",
              f"    home.room -= {count + 1}",
              f"    home.numbers += ({', '.join(numbers)},)" if numbers else "",
              "    storage = storage_of(made)",
              "    address = storage._weak_ref()",
              f"    pending[address] = value = Value(home, address, data_ptr(made), {recipe.result_meta}, None)",
              "    home.values.append(value)",
              "    return made"]
    text = f"def enqueue({given}):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(text, "<gemsmode fuse call>", "exec"), scope)
    return scope["enqueue"]


_pending: dict[int, _Value] = {}
"""By the address of its storage, the value that is to be written there."""

_readers: dict[int, list[_Group]] = {}
"""By the address of its storage, the groups that are still to read a tensor."""

_groups: dict[_Group, None] = {}
"""All groups that wait, oldest first."""


class _Group:
    """Calls that wait to be run as one kernel.

    Attributes:
        shape: what the kernel runs over.
        by_rows: whether it runs over rows, because a reduction is among the calls; some values are then of :attr:`row_shape`.
        done: whether it was run.
    """

    __slots__ = ("by_rows", "device", "done", "numbers", "room", "shape", "slot_at", "slots", "steps", "stream", "target",
                 "thread", "values")

    def __init__(self, recipe: _Recipe, stream: int, thread: int) -> None:
        self.stream, self.thread, self.device, self.target = stream, thread, recipe.device, recipe.target
        self.shape, self.by_rows, self.done, self.room = recipe.shape, recipe.reduces, False, MAX_ROOM
        self.steps: list[_Step] = []
        self.values: list[_Value] = []
        self.slots: list[_Slot] = []
        self.slot_at: dict[tuple[int, int], int] = {}
        self.numbers: list[float | int] = []
        if len(_groups) >= MAX_GROUPS:
            next(iter(_groups)).flush()
        if not _watch.knows_inductor:
            _watch.look_for_inductor()
        _groups[self] = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], 1)

    def accepts(self, recipe: _Recipe) -> bool:
        """Whether a call that reads a value of this group can join it; makes room for it."""
        if self.room <= len(recipe.tensors) or recipe.device != self.device:
            return False
        shape = recipe.shape
        if shape == self.shape:
            self.by_rows = self.by_rows or recipe.reduces
            return True
        if recipe.reduces or not shape:
            return False
        if self.by_rows:
            return shape == self.row_shape
        if self.shape == (*shape[:-1], 1) and 1 < shape[-1] <= MAX_ROW:
            self.shape, self.by_rows = shape, True
            return True
        return False

    def can_absorb(self, other: _Group) -> bool:
        return other.shape == self.shape and self.room + other.room > MAX_ROOM and other.device == self.device

    def absorb(self, other: _Group) -> None:
        """Take over all calls of ``other``, which then is no more."""
        first = len(self.values)
        slots = [self.slot(s.storage, s.pointer, s.meta, s.number) for s in other.slots]
        for recipe, sources, target in other.steps:
            self.steps.append((recipe, tuple([first + s if s >= 0 else ~slots[~s] for s in sources]),
                               None if target is None else first + target if target >= 0 else ~slots[~target]))
        for value in other.values:
            value.group, value.index = self, first + value.index
            value.slot = None if value.slot is None else slots[value.slot]
        self.values += other.values
        self.numbers += other.numbers
        self.by_rows = self.by_rows or other.by_rows
        self.room -= MAX_ROOM - other.room
        other.done = True
        del _groups[other]
        other._leave_readers()
        other.values, other.slots = [], []

    def slot(self, storage: Any, pointer: int, meta: TensorMeta, number: int) -> int:
        at = self.slot_at.get((pointer, number))
        if at is None:
            at = self.slot_at[pointer, number] = len(self.slots)
            readers = _readers.setdefault(storage._cdata, [])
            self.slots.append(_Slot(storage, pointer, meta, number, readers))
            if self not in readers:
                readers.append(self)
        return at

    def _leave_readers(self) -> None:
        for storage, _, _, _, readers in self.slots:
            if self in readers:
                readers.remove(self)
                if not readers:
                    del _readers[storage._cdata]

    def flush(self) -> None:
        """Run the calls, unless that was done."""
        with _lock:
            if self.done:
                return
            self.done = True
            del _groups[self]
            held: list[Any] = []
            for value in self.values:
                if not value.is_last:
                    held.append(None)
                    continue
                address = value.address
                del _pending[address]
                if value.slot is None:
                    held.append(_revive(address))
                    _free_weak_ref(address)
                else:
                    held.append(self.slots[value.slot].storage)
            self._leave_readers()
            live = tuple([storage is not None for storage in held])
            try:
                if True in live:
                    self._run(held, live)
            finally:
                # Values and their group refer to each other: what the group holds must not wait for the garbage collector.
                self.values, self.slots, self.steps = [], [], []

    def _run(self, held: list[Any], live: tuple[bool, ...]) -> None:
        bits = 0
        for slot in self.slots:
            bits |= slot.pointer
        aligned = not bits & 15
        key = (tuple(self.steps), live, aligned)
        fused = True
        try:
            program = _programs.get(key)
            if program is None:
                while len(_programs) >= _MAX_PROGRAMS:
                    _programs.pop(next(iter(_programs)))
                program = _programs[key] = _make_program(self, live, aligned)
            program(self, held)
        except Exception as error:
            fused = False
            _warn_once(self, error)
            _programs[key] = _one_by_one
            _one_by_one(self, held)
        if counts is not None:
            counts.append(Flushed(tuple([recipe.name for recipe, _, _ in self.steps]), sum(live), fused))
        if self.target.device_type == "cuda" and self.thread != _identify():
            _wait_for(self.stream, self.device)


class Flushed(NamedTuple):
    """A group that was run: its calls, how many of their results were written, and whether by one kernel."""

    calls: tuple[str, ...]
    written: int
    fused: bool = True


counts: list[Flushed] | None = None
"""If it is a list, each group that is run is noted in it."""

_warned: set[str] = set()


def _warn_once(group: _Group, error: Exception) -> None:
    names = ", ".join(recipe.name for recipe, _, _ in group.steps)
    if names not in _warned:
        _warned.add(names)
        log.warning("fuse: %s run call by call, as their kernel failed: %s: %s", names, type(error).__name__, error)


def _stream(number: int, device: int) -> Any:
    """The stream of that number; 0 is the default one, for which there is no other way."""
    return torch.cuda.ExternalStream(number, device=device) if number else torch.cuda.default_stream(device)


def _wait_for(stream: int, device: int) -> None:
    """What this thread does next on its stream comes after what was just run on ``stream``."""
    here = torch.cuda.current_stream(device)
    if here.cuda_stream != stream and not torch.cuda.is_current_stream_capturing():
        here.wait_stream(_stream(stream, device))


def flush_all() -> None:
    """Run all that waits, of every thread.

    Raises:
        Whatever a group raises that fails call by call, too (out of memory, say), once all others were run.
    """
    if not _groups:
        return
    first: Exception | None = None
    with _lock:
        for group in list(_groups):
            try:
                group.flush()
            except Exception as error:
                first = first or error
    if first is not None:
        raise first


def _touch(tensor: torch.Tensor, written: bool = True) -> None:
    """Run what ``tensor`` is to get its value from and, if it may be ``written``, what is still to read it."""
    try:
        storage = _storage_of(tensor)._cdata
    except Exception:  # no storage of its own: a sparse tensor, a wrapper of a transform
        flush_all()
        return
    value = _pending.get(storage)
    if value is not None:
        value.group.flush()
    if written and storage in _readers:
        with _lock:
            for group in list(_readers.get(storage, ())):
                group.flush()


def _touch_all(values: Iterable[Any], written: bool) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            _touch(value, written)
        elif value.__class__ in (list, tuple):
            _touch_all(value, written)


# -- from calls to groups ----------------------------------------------------------------------------------------------

_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_identify = threading.get_ident


def _no_stream(device: int) -> int:
    return 0


def _stream_here(device: int) -> int:
    """The current stream of ``device``.

    Raises:
        RuntimeError: another device is current, on which memory would be allocated.
    """
    if torch._C._cuda_getDevice() != device:
        raise RuntimeError("another device is current")
    return _current_stream(device)  # type: ignore[misc]


def _empty_for(device_type: str) -> Callable[..., torch.Tensor]:
    empty = plan_module._allocator(device_type)
    return plan_module._poisoned_empty(empty) if plan_module._poisoned else empty


class _Inside(threading.local):
    """Whether this thread runs an op: its tensors were seen to before, and what the rules ask of them is nothing new."""

    depth = 0


_inside = _Inside()


class Deferring:
    """What a mode with ``fuse=True`` calls for each op, in place of the handlers' own functions."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def function(self, op: Any) -> Callable[..., Any]:
        handler = self.policy.handler(op)
        call = handler.call
        if not isinstance(op, OpOverload) or communicates(op):
            return _after_all(call)
        # A composite's calls come one by one. Ops such as `contiguous` are views by their schema, and copy all the same.
        if handler.functions is None and (op.is_view or handler.composite or str(op) in _NEEDS_NO_VALUE):
            return call
        if handler.functions is None or handler.composite:
            return _guarded(call, op._schema.is_mutable)
        return _deferring(handler)


def _after_all(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        flush_all()
        return call(*args, **kwargs)

    return run


def _guarded(call: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    """``call``, once its tensors have their values and, if it ``writes``, nothing waits to read them."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not _groups:
            return call(*args, **kwargs)
        _touch_all(args, writes)
        if kwargs:
            _touch_all(kwargs.values(), writes)
        _inside.depth += 1
        try:
            return call(*args, **kwargs)
        finally:
            _inside.depth -= 1

    return guarded


_MAX_RECIPES = 2048


def _deferring(handler: OpHandler) -> Callable[..., Any]:
    """Let a call wait if it can; else run it once its tensors have their values."""
    runs: dict[tuple, Callable[..., Any]] = {}
    deferred: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
    writes = handler.op._schema.is_mutable

    def ordinary(*args: Any) -> Any:
        if not _groups:
            return _ordinary(handler, args)
        _touch_all(args, writes)
        _inside.depth += 1
        try:
            return _ordinary(handler, args)
        finally:
            _inside.depth -= 1

    def miss(args: tuple[Any, ...], key: tuple | None) -> Callable[..., Any]:
        if key is None or _exotic(args):
            return ordinary
        if len(runs) >= _MAX_RECIPES:
            runs.pop(next(iter(runs)))
        recipe = _recipe_for(handler, args)
        if recipe is None:
            run = _guarded(handler.lookup(args).run, writes)
        else:
            run = _straight(recipe, len(args))
            deferred.add(run)
        runs[key] = run
        return run

    def failed(error: Exception, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if run in deferred:
            # A number that does not convert, no memory, a wrapper without memory: the ordinary way knows what to do.
            flush_all()
            return ordinary(*args)
        if run is ordinary:
            raise error
        runs.clear()  # what was decided may change now
        functions.forget()
        decided = handler.lookup(args)
        return handler._failed(error, decided.run, args)

    functions = make_functions(handler.op, runs, miss, failed, *handler.keyed_by)
    return functions.call


def _recipe_for(handler: OpHandler, args: tuple[Any, ...]) -> _Recipe | None:
    metas = tuple([describe(a) for a in args])
    try:
        if handler.policy.target.device_type not in ("cuda", "cpu"):
            return None  # what streams of others are is not known here
        decided = handler.decide(metas, bind=False)
        if decided.decision.kind != "rule" or decided.plan is None or not _deferrable(handler.op, decided.plan):
            return None
        return _Recipe(handler, decided.plan, args, handler._device(metas)[0])
    except Exception as error:
        log.debug("fuse: %s is not deferred", handler.op, exc_info=error)
        return None


# -- running a group ---------------------------------------------------------------------------------------------------

_Program = Callable[["_Group", "list[Any]"], None]
_programs: dict[Any, _Program] = {}
"""By the calls of a group, which of their values are written, and whether all tensors are aligned: what runs it."""

_MAX_PROGRAMS = 2048


@contextmanager
def _below_the_mode() -> Iterator[None]:
    """Ops called here are PyTorch's own, seen neither by modes nor by autograd, and pointers are asked for to run a group."""
    _inside.depth += 1
    try:
        with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
            yield
    finally:
        _inside.depth -= 1


def _tensor(storage: Any, pointer: int, meta: TensorMeta) -> torch.Tensor:
    made = torch.empty(0, dtype=meta.dtype, device=storage.device)
    return made.set_(storage, (pointer - storage.data_ptr()) // meta.dtype.itemsize, meta.shape, meta.stride)


def _one_by_one(group: _Group, held: list[Any]) -> None:
    """Run each call of a group in order, by the ordinary way."""
    with _below_the_mode():
        storages = {value.address: storage for value, storage in zip(group.values, held) if storage is not None}
        outside = [_tensor(s.storage, s.pointer, s.meta) for s in group.slots]
        inside: list[torch.Tensor] = []
        numbers = iter(group.numbers)
        for (recipe, sources, target), value in zip(group.steps, group.values):
            args = list(recipe.template)
            for (index, _, _), source in zip(recipe.tensors, sources):
                args[index] = inside[source] if source >= 0 else outside[~source]
            for index, *_ in recipe.numbers:
                args[index] = next(numbers)
            if target is not None:
                assert recipe.inplace is not None
                args[recipe.inplace] = inside[target] if target >= 0 else outside[~target]
            result = _ordinary(recipe.handler, tuple(args))
            if target is None and value.address in storages:
                own = _tensor(storages[value.address], value.pointer, recipe.result)
                result = own.copy_(result)
            inside.append(result)


def _ordinary(handler: OpHandler, args: tuple[Any, ...]) -> Any:
    decided = handler.lookup(args)
    try:
        return decided.run(*args)
    except Exception as error:
        return handler._failed(error, decided.run, args)


def _make_program(group: _Group, live: tuple[bool, ...], aligned: bool) -> _Program:
    """What runs groups of the same calls as ``group``."""
    if len(group.steps) == 1 and not group.steps[0][0].reduces:
        step = _alone(group)
    else:
        step = _Generator(group, live).launch()
    outs = [v for v, is_live in zip(group.values, live) if is_live and v.slot is None]
    results = [recipe.result for recipe, _, _ in group.steps]
    plan = Plan(tuple([Alloc(results[v.index].shape, results[v.index].stride, results[v.index].dtype) for v in outs]), (step,), None,
                {Arg(i): s.meta for i, s in enumerate(group.slots)})
    spec = specs(plan, aligned)[0]
    at = [v.index for v in outs]
    if group.target.interpreted:
        return _interpreted(spec, step, at, [results[i] for i in at])
    return _compiled(spec, step, at, group)


def _alone(group: _Group) -> Launch:
    """The launch of a group of one call: that of the call's own rule."""
    ((recipe, sources, target),) = group.steps
    tensors = {index: ~source for (index, _, _), source in zip(recipe.tensors, sources)}
    if target is not None:
        assert recipe.inplace is not None
        tensors[recipe.inplace] = ~target
    numbers = {index: i for i, (index, *_) in enumerate(recipe.numbers)}

    def to(ref: Any) -> Any:
        if ref.__class__ is Arg:
            return Arg(tensors[ref.index])
        return Num(numbers[ref.index], ref.dtype) if ref.__class__ is Num else ref

    return recipe.launch._replace(args=_map_refs(recipe.launch.args, to))


def _resolved(value: Any, ins: Sequence[Any], outs: Sequence[Any], numbers: Sequence[Any]) -> Any:
    cls = value.__class__
    if cls is Arg:
        return ins[value.index]
    if cls is Out:
        return outs[value.index]
    if cls is Num:
        return numbers[value.index]
    if cls is Size:
        return value.value
    if cls is tuple:
        return tuple([_resolved(v, ins, outs, numbers) for v in value])
    return value


def _interpreted(spec: launch_module.Spec, step: Launch, at: Sequence[int], metas: Sequence[TensorMeta]) -> _Program:
    def run(group: _Group, held: list[Any]) -> None:
        with _below_the_mode():
            ins = [_tensor(s.storage, s.pointer, s.meta) for s in group.slots]
            outs = [_tensor(held[i], group.values[i].pointer, m) for i, m in zip(at, metas)]
            launch_module.interpreted_launch(spec, step.grid, tuple([_resolved(a, ins, outs, group.numbers) for a in step.args]))

    return run


def _compiled(spec: launch_module.Spec, step: Launch, at: Sequence[int], group: _Group) -> _Program:
    target, device = group.target, group.device
    compiled = launch_module.compile(spec, target, device)
    found = launch_module.entry(compiled, spec)

    def public(group: _Group, held: list[Any]) -> None:
        outs = [group.values[i].pointer for i in at]
        arguments = tuple([_resolved(a, [s.pointer for s in group.slots], outs, group.numbers) for a in step.args])
        with torch.cuda.device(device), torch.cuda.stream(_stream(group.stream, device)):
            launch_module.public_launch(compiled, spec, step.grid, arguments)

    if found is None or found.scratch:
        return public
    if found.nested:
        runtime, _ = launch_module.split_parameters(spec.kernel)
        by_name = {n: _text_of(v, True) for n, v in zip(runtime, step.args)}
        arguments = "".join(by_name.get(n, "None, ") for n in spec.kernel.arg_names)
    else:
        arguments = f"({''.join(_text_of(v, False) for v in step.args)})"
    before = ", ".join(f"before[{i}]" for i in range(len(found.before)))
    for k, i in enumerate(at):
        arguments = arguments.replace(f"<{k}>", f"V[{i}].pointer")
    text = f"""
def run(group, held):
    if enter_hooks or exit_hooks or current_device() != device:
        return public(group, held)
    I, V, N = group.slots, group.values, group.numbers
    function({', '.join(map(str, step.grid))}, group.stream, {before}, {arguments})
"""
    enter_hooks, exit_hooks = launch_module.hook_lists()
    scope: dict[str, Any] = {"function": found.function, "before": found.before, "public": public, "device": device,
                             "enter_hooks": enter_hooks, "exit_hooks": exit_hooks, "current_device": torch._C._cuda_getDevice}
    exec(compile(text, "<gemsmode fuse launch>", "exec"), scope)
    return scope["run"]


def _text_of(value: Any, keep_ones: bool) -> str:
    cls = value.__class__
    if cls is Arg:
        return f"I[{value.index}].pointer, "
    if cls is Out:
        return f"<{value.index}>, "
    if cls is Num:
        return f"N[{value.index}], "
    if cls is tuple:
        inner = "".join(_text_of(v, keep_ones) for v in value)
        return f"({inner}), " if keep_ones else inner
    if cls is Size:
        return f"{value.value}, "
    return "" if cls is int and value == 1 and not keep_ones else f"{value!r}, "


# -- the kernel of a group ---------------------------------------------------------------------------------------------


@triton.jit
def as_read(x, zero):
    """``x`` as the next call sees it, which does not know where it comes from: ``zero`` is 0 at run time."""
    if x.dtype == tl.float32:
        return (x.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) ^ zero.to(tl.int64)).to(tl.float64, bitcast=True)
    elif x.dtype == tl.int1:
        return x != 0  # the interpreter may still hold the number that was converted to it
    else:
        return x


_FLAT = """
def {name}(outs, ins, numbers, zero, none, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
"""

_INDEXED = """
def {name}(outs, ins, numbers, zero, none, n, sizes, out_strides, in_strides, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o_0 = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o_0 < n
"""

_TILED = """
def {name}(outs, ins, numbers, zero, none, nx, ny, sizes, out_strides, in_strides, WIDE: tl.constexpr, BLOCK_X: tl.constexpr,
           BLOCK_Y: tl.constexpr):
    i_rest = tl.program_id(0)
    tiles_x = tl.cdiv(nx, BLOCK_X)
    tiles_y = tl.cdiv(ny, BLOCK_Y)
    i_x = i_rest % tiles_x
    i_rest = i_rest // tiles_x
    i_y = i_rest % tiles_y
    o_0 = i_rest // tiles_y
    if WIDE:
        i_x = i_x.to(tl.int64)
        i_y = i_y.to(tl.int64)
        o_0 = o_0.to(tl.int64)
    x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    y = (i_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    m = (x < nx) & (y < ny)
"""

_ROWS = """
def {name}(outs, ins, numbers, zero, none, rows, n, sizes, out_strides, in_strides, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr):
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o_0 = (i_block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    c = tl.arange(0, BLOCK_N)[None, :]
    if WIDE:
        c = c.to(tl.int64)
    m_row = o_0 < rows
    m_column = c < n
    m = m_row & m_column
"""


def _indices(first: str, count: int) -> tuple[list[str], list[str]]:
    """Lines that take the flat index ``o_0`` apart into ``count`` dimensions, and the names of the parts."""
    lines = [f"o_{d + 1} = o_{d} // sizes[{d}]" for d in range(count - 1)]
    parts = [f"o_{d} % sizes[{d}]" if d < count - 1 else f"o_{d}" for d in range(count)]
    return lines, parts


_kernels: dict[tuple[str, tuple[Any, ...]], Any] = {}
"""By text and the functions that it calls: the kernel."""


def _kernel(name: str, text: str, functions: Sequence[Any]) -> Any:
    """The ``@triton.jit`` function of ``text``, which calls ``functions`` as ``f0``, ``f1``..."""
    key = text, tuple([id(f) for f in functions])
    kernel = _kernels.get(key)
    if kernel is None:
        file = f"<gemsmode fuse {len(_kernels)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        scope: dict[str, Any] = {"tl": tl, "convert": convert, "as_read": as_read, "offset": offset, "tree": tree, "__name__": __name__}
        scope.update({f"f{i}": f for i, f in enumerate(functions)})
        exec(compile(text, file, "exec"), scope)
        kernel = _kernels[key] = triton.jit(scope[name])
    return kernel


class _Generator:
    """Writes the kernel of a group; ``live``: which of its values are written."""

    def __init__(self, group: _Group, live: tuple[bool, ...]) -> None:
        self.group = group
        self.lines: list[str] = []
        self.functions: list[Any] = []
        self.loaded: set[int] = set()
        self.read_inside = {s for _, sources, _ in group.steps for s in sources if s >= 0}
        self.results = [recipe.result for recipe, _, _ in group.steps]
        # What is written: values of their own, then tensors of others, each with the strides over the kernel's shape.
        self.fresh = [v for v, is_live in zip(group.values, live) if is_live and v.slot is None]
        self.into = [v for v, is_live in zip(group.values, live) if is_live and v.slot is not None]
        self.out_strides = [broadcast_strides(self.results[v.index], group.shape) for v in self.fresh]
        self.in_strides = [broadcast_strides(s.meta, group.shape) for s in group.slots]
        written = [self.results[v.index] for v in self.fresh]
        self.itemsize = max(m.dtype.itemsize for m in (*written, *[s.meta for s in group.slots]))

    # Whether a tensor is loaded as a block of all elements, of one for each row, or of one for each column.

    def _kind(self, strides: tuple[int, ...], is_row: bool) -> str:
        if not self.group.by_rows:
            return "all"
        if is_row or not strides[-1]:
            return "row"
        return "all" if any(strides[:-1]) else "column"

    def _function(self, function: Any) -> str:
        for i, known in enumerate(self.functions):
            if known is function:
                return f"f{i}"
        self.functions.append(function)
        return f"f{len(self.functions) - 1}"

    def _is_row(self, meta: TensorMeta) -> bool:
        return self.group.by_rows and (not meta.shape or meta.shape[-1] == 1)

    _MASKS = {"all": "m", "row": "m_row", "column": "m_column"}

    def _load(self, slot: int) -> str:
        if slot not in self.loaded:
            self.loaded.add(slot)
            kind = self._kind(self.in_strides[slot], self._is_row(self.group.slots[slot].meta))
            self.lines.append(f"x{slot} = tl.load(ins[{slot}] + {self._offset(f'in_strides[{slot}]', kind)}, mask={self._MASKS[kind]})")
        return f"x{slot}"

    def _offset(self, strides: str, kind: str) -> str:
        if self.form == "flat":
            return "o"
        if kind == "all":
            return f"offset(where, {strides})"
        return f"offset({'where_row' if kind == 'row' else 'where_column'}, {strides})"

    def _steps(self) -> None:
        taken = 0
        for index, (recipe, sources, _) in enumerate(self.group.steps):
            mask = "m_row" if self.group.by_rows and not recipe.reduces and self._is_row(recipe.result) else "m"
            given = []
            for is_tensor, at, common, compute in recipe.operands:
                if is_tensor:
                    source = sources[at]
                    name = self._load(~source) if source < 0 else f"w{source}"
                    value = f"convert({name}, {common}).to({compute})"
                else:
                    value = f"tl.cast(numbers[{taken + at}], {common}).to({compute})"
                given.append(value)
            dtype = _triton_name(recipe.result.dtype)
            if recipe.reduces:
                self._reduce(index, recipe, sources[0], dtype)
            else:
                blocks = ", ".join(f"tl.broadcast_to({g}, {mask}.shape)" for g in given)
                result = f"{self._function(recipe.function)}({blocks})"
                self.lines.append(f"v{index} = convert(tl.broadcast_to({result}, {mask}.shape), {dtype})")
            if index in self.read_inside:
                self.lines.append(f"w{index} = as_read(v{index}, zero)")
            taken += len(recipe.numbers)

    def _reduce(self, index: int, recipe: _Recipe, source: int, dtype: str) -> None:
        assert recipe.reduction is not None
        lane, block, merge_with, post, other = recipe.reduction
        name = self._load(~source) if source < 0 else f"w{source}"
        own = _triton_name(recipe.tensors[0][1].dtype)
        _, _, common, compute = recipe.operands[0]
        literal = repr(other) if isinstance(other, int) or abs(other) < float("inf") else f'float("{other}")'
        self.lines.append(f"r{index} = convert(tl.where(m, tl.broadcast_to({name}, m.shape), {literal}).to({own}), {common}).to({compute})")
        if block is None:
            self.lines.append(f"s{index} = tree({self._function(lane)}(r{index}, c, none), {self._function(merge_with)}, 1)")
        else:
            self.lines.append(f"s{index} = {self._function(block)}(r{index}, m, 1)")
        self.lines.append(f"t{index} = {self._function(post)}(s{index}, n, none)")
        self.lines.append(f"v{index} = convert(tl.expand_dims(t{index}[0], 1), {dtype})")

    def _stores(self) -> None:
        if self.into:
            # Whatever thread loads an element of a tensor that is written in place has it by now.
            self.lines.append("tl.debug_barrier()")
        for i, value in enumerate(self.fresh):
            kind = "row" if self._is_row(self.results[value.index]) else "all"
            self.lines.append(f"tl.store(outs[{i}] + {self._offset(f'out_strides[{i}]', kind)}, v{value.index}, mask={self._MASKS[kind]})")
        for value in self.into:
            kind = "row" if self._is_row(self.results[value.index]) else "all"
            at = self._offset(f"in_strides[{value.slot}]", kind)
            self.lines.append(f"tl.store(ins[{value.slot}] + {at}, v{value.index}, mask={self._MASKS[kind]})")

    def launch(self) -> Launch:
        """The kernel and how it is launched; ``Arg`` are the group's tensors, ``Out`` the values written, ``Num`` its numbers."""
        group = self.group
        n = 1
        for size in group.shape:
            n *= size
        every = self.out_strides + self.in_strides
        wide = n >= pointwise_module._WIDE or any(pointwise_module._last(group.shape, s) >= pointwise_module._WIDE for s in every)
        if group.by_rows:
            text, arguments, constants, grid, warps = self._by_rows(every, n, wide)
        else:
            text, arguments, constants, grid, warps = self._elementwise(every, n, wide)
        self._steps()
        self._stores()
        names = list(dict.fromkeys(recipe.name.strip("_") for recipe, _, _ in group.steps))
        name = "fused_" + "_".join(names)[:80]
        body = text.lstrip("\n").format(name=name) + "".join(f"    {line}\n" for line in self.lines)
        kinds = [kind for recipe, _, _ in group.steps for kind in recipe.kinds]
        given = (tuple([Out(i) for i in range(len(self.fresh))]), tuple([Arg(i) for i in range(len(group.slots))]),
                 tuple([Num(i, kind) for i, kind in enumerate(kinds)]), Size(0), (), *arguments)
        return Launch(_kernel(name, body, self.functions), (grid, 1, 1), given, constants, warps)

    def _elementwise(self, every: list[tuple[int, ...]], n: int, wide: bool) -> Any:
        group, target = self.group, self.group.target
        arguments: tuple[Any, ...]
        loops = merge(group.shape, every)
        count = len(self.out_strides)
        if loops.is_flat:
            self.form = "flat"
            tile = choose_flat(n, self.itemsize, target)
            return _FLAT, (extent(n),), (("WIDE", wide), ("BLOCK", tile.x)), -(-n // tile.x), tile.warps
        sizes = loops.sizes
        if len(sizes) > MAX_DIMS:
            raise ValueError(f"{len(sizes)} dimensions are left after merging")
        y = pointwise_module._other_axis(loops)
        transposed = any(s[y] == 1 and s[0] > 1 for s in loops.strides) if y else False
        self.form = "strided"
        if y and (sizes[0] >= 16 or transposed):
            tile = choose_tile(sizes[0], sizes[y], transposed, self.itemsize, target)
            rest = [d for d in range(1, len(sizes)) if d != y]
            programs = -(-sizes[0] // tile.x) * -(-sizes[y] // tile.y)
            for d in rest:
                programs *= sizes[d]
            if programs < 2**31 and not (target.interpreted and programs > -(-n // (1 << 16))):
                steps = tuple([(s[0], s[y], *[stride(s[d]) for d in rest]) for s in loops.strides])
                lines, parts = _indices("o_0", len(rest)) if rest else ([], [])
                self.lines += [*lines, f"where = ({', '.join(('x', 'y', *parts))})"]
                arguments = (extent(sizes[0]), extent(sizes[y]) if transposed else Size(sizes[y]), tuple([Size(sizes[d]) for d in rest]),
                             steps[:count], steps[count:])
                return _TILED, arguments, (("WIDE", wide), ("BLOCK_X", tile.x), ("BLOCK_Y", tile.y)), programs, tile.warps
        tile = choose_flat(n, self.itemsize, target)
        steps = tuple([(s[0], *[stride(v) for v in s[1:]]) for s in loops.strides])
        lines, parts = _indices("o_0", len(sizes))
        self.lines += [*lines, f"where = ({', '.join(parts)},)"]
        arguments = (extent(n), tuple([Size(s) for s in sizes]), steps[:count], steps[count:])
        return _INDEXED, arguments, (("WIDE", wide), ("BLOCK", tile.x)), -(-n // tile.x), tile.warps

    def _by_rows(self, every: list[tuple[int, ...]], n: int, wide: bool) -> Any:
        group, target = self.group, self.group.target
        self.form = "rows"
        columns = group.shape[-1]
        rows = n // columns
        loops = merge(group.shape[:-1], [s[:-1] for s in every])
        if len(loops.sizes) >= MAX_DIMS:
            raise ValueError(f"{len(loops.sizes)} dimensions besides the row's are left after merging")
        count = len(self.out_strides)
        steps = tuple([(s[-1], *[stride(v) for v in outer]) for s, outer in zip(every, loops.strides)])
        lines, parts = _indices("o_0", len(loops.sizes))
        joined = ", ".join(parts)
        zeros = ", ".join("0" for _ in parts)
        self.lines += [*lines, f"where = (c, {joined})", f"where_row = (0, {joined})", f"where_column = (c, {zeros})"]
        block = power_of_2(columns)
        if target.interpreted:
            tile, warps = max(min((1 << 16) // block, power_of_2(rows)), 1), 4
        else:
            tile = max(min(2048 // block, power_of_2(rows)), 1)
            while tile > 1 and -(-rows // tile) < 2 * target.multiprocessors:
                tile //= 2
            warps = 2 if tile * block <= 512 else 4 if tile * block <= 2048 else 8 if tile * block <= 8192 else 16
        arguments = (extent(rows), extent(columns), tuple([Size(s) for s in loops.sizes]), steps[:count], steps[count:])
        return _ROWS, arguments, (("WIDE", wide), ("BLOCK_M", tile), ("BLOCK_N", block)), -(-rows // tile), warps


# -- what passes the dispatcher by -------------------------------------------------------------------------------------


def _of_tensor(tensor: Any, *args: Any, **kwargs: Any) -> None:
    if _groups and not _inside.depth:
        if isinstance(tensor, torch.Tensor):
            _touch(tensor)
        else:
            flush_all()


def _of_all(*args: Any, **kwargs: Any) -> None:
    flush_all()


_TENSOR_METHODS = ("data_ptr", "const_data_ptr", "untyped_storage", "numpy", "tolist", "__repr__", "__array__", "__dlpack__",
                   "__reduce_ex__", "__deepcopy__", "share_memory_")
"""Methods of tensors that ask for memory without a call of an op."""


def _watched() -> Iterator[tuple[Any, str, Callable[..., None]]]:
    """Owners and names of functions, with what is to be done before them."""
    for name in _TENSOR_METHODS:
        yield torch.Tensor, name, _of_tensor
    yield torch.utils.dlpack, "to_dlpack", _of_tensor
    # Printing, for one, takes the modes off the stack first.
    yield torch.utils._python_dispatch, "_disable_current_modes", _of_all
    yield threading.Thread, "start", _of_all
    yield torch.accelerator, "synchronize", _of_all
    yield torch.cuda, "synchronize", _of_all
    for owner, names in ((torch.cuda.Stream, ("synchronize", "wait_stream", "wait_event", "record_event", "query")),
                         (torch.cuda.Event, ("record", "synchronize", "wait")),
                         (torch.cuda.CUDAGraph, ("capture_begin", "capture_end", "replay"))):
        for name in names:
            yield owner, name, _of_all


class _Watch:
    """Puts the functions of :func:`_watched` under guard while any block lasts."""

    def __init__(self) -> None:
        self.blocks = 0
        self.undo: list[Callable[[], None]] = []
        self.knows_inductor = False

    def begin(self) -> None:
        with _lock:
            self.blocks += 1
            if self.blocks == 1:
                for owner, name, before in _watched():
                    if hasattr(owner, name):
                        self._guard(owner, name, before)

    def look_for_inductor(self) -> None:
        """Inductor's code takes the memory of its arguments; it is imported when something is first compiled."""
        module = sys.modules.get("torch._inductor.output_code")
        if module is not None and self.blocks:
            with _lock:
                self.knows_inductor = True
                for kind in vars(module).values():
                    if isinstance(kind, type) and kind.__module__ == module.__name__ and "__call__" in vars(kind):
                        self._guard(kind, "__call__", _of_all)

    def end(self) -> None:
        with _lock:
            self.blocks -= 1
            if not self.blocks:
                self.knows_inductor = False
                while self.undo:
                    self.undo.pop()()

    def _guard(self, owner: Any, name: str, before: Callable[..., None]) -> None:
        original = getattr(owner, name)
        own = vars(owner).get(name)

        @functools.wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if _groups:
                before(*args, **kwargs)
            return original(*args, **kwargs)

        def restore() -> None:
            if vars(owner).get(name) is guarded:
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

        setattr(owner, name, guarded)
        self.undo.append(restore)


_watch = _Watch()


def enter() -> None:
    """A block with ``fuse=True`` begins."""
    _watch.begin()


def leave() -> None:
    """A block with ``fuse=True`` has ended."""
    try:
        flush_all()
    finally:
        _watch.end()
