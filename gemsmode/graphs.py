"""``capture``: a callable runs under the mode once, is captured as a CUDA graph, and is replayed from then on.

::

    step = gemsmode.capture(model)                 # or a function, or as a decorator
    with torch.no_grad():
        for token in tokens:
            logits = step(token, past_key_values=cache).logits

A replay launches the whole graph at once: no Python of the callable runs, no op is dispatched, and host time is that of
copying the inputs in.

**Calls of one signature share a graph.** The signature is each tensor's shape, strides, dtype and device, the value of each
number, string and the like, and the identity of every other object (a cache, a configuration), with the states of
autograd, inference mode, autocast and ``module.training``. Numbers that change from call to call must be tensors, or
each value gets a graph of its own. At most ``max_graphs`` are kept, the least recently used goes first; they share one
memory pool.

**The first call of a signature** runs the callable as it is, under the mode; its result is the call's. Then the callable
runs once more while it is captured, which computes nothing. So its work is done once, and its Python twice; side effects
of that Python (a counter, a list that grows) happen at these two runs and at no replay.

**Inputs** are copied into buffers of the graph's. A tensor that the callable writes to is copied back after each replay.
Tensors of the arguments named in ``by_reference``, tensors inside other objects (a ``StaticCache``), parameters and whatever
else the callable reaches are used where they are: they must keep their memory.

**Results are the graph's own memory**, overwritten by the next call of the same :class:`Captured`, or of another that
shares its pool. Copy what is to stay, or ask for ``clone=True``. (The first call's results are new tensors.) Calls made on
several streams must be ordered by the caller.

**Random ops stay random**: each replay draws afresh from PyTorch's generators, and ``torch.manual_seed`` reproduces it.

**Masks of attention** are converted once, not in each layer, or left out where they are known to mask nothing but what is
causal: see :class:`Masks`.

**What cannot be captured** raises :class:`~gemsmode.errors.CaptureError`, which says what and where: tensors on the CPU or on
several GPUs among the arguments, a value that is read on the host (``.item()``, ``if x > 0:``, ``nonzero``), a copy between CPU and
GPU, a result that needs autograd. A read is no obstacle where the code leaves it out while a stream captures, as transformers' masks
do: a function that asks ``torch.cuda.is_current_stream_capturing()``, itself or by a helper, is given the chance. Without a GPU the
callable runs under the mode as it is, with one warning.

The backward of a captured forward is not captured; a function that does forward, backward and optimizer step itself is
captured whole (with ``capturable=True`` where the optimizer has it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gemsmode import choice
from gemsmode.errors import CaptureError
from gemsmode.folding import ConstantFolder
from gemsmode.mode import GemsMode
from gemsmode.signature import TensorMeta
from gemsmode.verify import call_site, is_callers

log = logging.getLogger("gemsmode")

# -- what captures -----------------------------------------------------------------------------------------------------


class Backend(Protocol):
    """Whose graphs are captured; :class:`CudaGraphs`, or a stand-in in tests."""

    device_type: str

    def available(self) -> bool:
        """Whether graphs can be captured on this machine."""
        ...

    def capturing(self) -> bool:
        """Whether a capture is under way already."""
        ...

    def pool(self) -> Any:
        """A new memory pool for graphs."""
        ...

    def warm_up(self, call: Callable[[], Any], device: int | None) -> Any:
        """Run ``call`` as the capture will: on a stream of its own; its result, ready for the current stream."""
        ...

    def record(self, call: Callable[[], Any], device: int | None, pool: Any, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        """Capture ``call``: what has a ``replay()``, and the call's result."""
        ...


class CudaGraphs:
    """CUDA graphs of PyTorch."""

    device_type = "cuda"

    def available(self) -> bool:
        return torch.cuda.is_available()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], Any], device: int | None) -> Any:
        with torch.cuda.device(device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                result = call()
            here.wait_stream(side)
            for tensor in _tensors(result):
                if tensor.device.type == "cuda":
                    tensor.record_stream(here)
        return result

    def record(self, call: Callable[[], Any], device: int | None, pool: Any, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # Other threads (a data loader's that pins memory) may go on calling CUDA.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = call()
        return graph, result


# -- what a graph cannot hold ------------------------------------------------------------------------------------------

_A = torch.ops.aten
_HOST_READS = {
    _A._local_scalar_dense.default: "reads a value on the host (.item(), float(x), `if x > 0:`)",
    _A.nonzero.default: "has a result whose size the host must read",
    _A.masked_select.default: "has a result whose size the host must read",
    _A._unique2.default: "has a result whose size the host must read",
    _A.unique_consecutive.default: "has a result whose size the host must read",
    _A.unique_dim.default: "has a result whose size the host must read",
    _A.equal.default: "reads a value on the host",
}
_MASKED = {_A.index.Tensor, _A.index_put.default, _A.index_put_.default, _A._unsafe_index.Tensor}


class Problem(NamedTuple):
    """A call that a graph cannot hold, or may not be able to."""

    text: str
    certain: bool


class Onlooker(TorchDispatchMode):
    """Looks for calls that cannot be captured while the callable runs.

    Args:
        device_type: of the graphs.
        capturing: the run is the one that is captured: the first call that a graph cannot hold is refused, before it is made.
    """

    def __init__(self, device_type: str, capturing: bool = False) -> None:
        super().__init__()
        self._device_type, self._capturing = device_type, capturing
        self.problems: list[Problem] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = problem_of(func, args, kwargs, self._device_type) if self._capturing or len(self.problems) < 3 else None
        if found is not None:
            text = f"{func} at {call_site() or 'an unknown place'} {found.text}"
            if self._capturing and found.certain:
                raise _impossible([text])
            self.problems.append(Problem(text, found.certain and not asks_whether_capturing()))
        return func(*args, **kwargs)


def _impossible(texts: Sequence[str]) -> CaptureError:
    return CaptureError(f"a graph cannot hold this call: {'; '.join(texts)}. Keep such calls outside of what is captured.")


def problem_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device_type: str) -> Problem | None:
    """What of one call a graph cannot hold; None if it can."""
    tensors = list(_tensors(list(args)))
    device = kwargs.get("device")
    to = None if device is None else torch.device(device).type
    if to != device_type and not any(t.device.type == device_type for t in tensors):
        return None
    if func in _HOST_READS:
        return Problem(_HOST_READS[func], True)
    if func in _MASKED:
        indices = args[1] if len(args) > 1 else ()
        if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return Problem("selects by a mask, for whose count the host is asked", False)
        return None
    if func in (_A.copy_.default, _A._to_copy.default) and tensors:
        source = tensors[-1]
        if func is _A.copy_.default:
            to = tensors[0].device.type
        if to not in (None, source.device.type):
            if to == device_type:
                pinned = source.device.type == "cpu" and source.is_pinned()
                return None if pinned else Problem("copies from the CPU to the GPU", True)
            return Problem("copies from the GPU to the CPU", True)
    tags = getattr(func, "tags", ())
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return Problem("may read a value on the host", False)
    return None


_QUESTION = "is_current_stream_capturing"
_FRAMES = 3
"""Of a read: a helper that does it (such as ``fast_all``), the function that decides, and one between them."""


def asks_whether_capturing() -> bool:
    """Whether the caller's code asks if a stream captures, so that it may do otherwise than now in a capture.

    What counts is the code of the innermost functions outside PyTorch and gemsmode, and of the functions that they name, two deep.
    """
    frame: types.FrameType | None = sys._getframe(1)
    seen = 0
    while frame is not None and seen < _FRAMES and frame.f_code is not Captured._first.__code__:
        if is_callers(frame):
            if _names_question(frame.f_code, frame.f_globals, 2):
                return True
            seen += 1
        frame = frame.f_back
    return False


def _names_question(code: types.CodeType, names: Mapping[str, Any], deep: int) -> bool:
    if _QUESTION in code.co_names:
        return True
    helpers = (names.get(name) for name in code.co_names) if deep else ()
    return any(_names_question(h.__code__, h.__globals__, deep - 1) for h in helpers if isinstance(h, types.FunctionType))


# -- masks of attention ------------------------------------------------------------------------------------------------


class Masks(TorchFunctionMode):
    """Gives attention its masks as the kernels take them, made once where a model has one mask for all its layers.

    PyTorch's ``scaled_dot_product_attention`` makes of a boolean mask, in every layer, one that is added to the scores, by three
    kernels. And a mask that is the same for all keys it gives to its slowest implementation, though such a mask says no more than
    which rows of the result are zero. While a stream captures transformers may not look whether its masks mask anything, and makes
    them where it else leaves them out; a mask that is a constant of the callable is left out again, and a causal one is
    ``is_causal=True``.

    Args:
        constants: those of the block.
    """

    def __init__(self, constants: ConstantFolder) -> None:
        super().__init__()
        self._constants = constants
        self._made: dict[tuple[Any, ...], tuple[torch.Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            given = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            mask = given.get("attn_mask")
            if len(args) <= 4 and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.ndim >= 2:
                known = None if given.get("is_causal") else self._once(mask, "known", lambda: self._known(mask))
                if known is not None:
                    return func(**{**given, "attn_mask": None, "is_causal": known == "causal"})
                if mask.stride(-1) == 0 and mask.shape[-1] > 1:
                    masked = self._once(mask, "rows", lambda: ~mask[..., :1])
                    result = func(**{**given, "attn_mask": None})
                    # In place, which keeps the layout, unless autograd has seen the result.
                    return (torch.Tensor.masked_fill if result.requires_grad else torch.Tensor.masked_fill_)(result, masked, 0.0)
                dtype = given["query"].dtype
                return func(**{**given, "attn_mask": self._once(mask, dtype, lambda: _added(mask, dtype))})
        return func(*args, **kwargs)

    def _known(self, mask: torch.Tensor) -> str | None:
        """``"all"`` or ``"causal"`` if the mask is a constant that says so."""
        value = self._constants.value(mask)
        if value is None:
            return None
        with _disable_current_modes():
            if value.all():
                return "all"
            once = _once(value)
            compact = value if once is None else value[once]
            causal = torch.ones(value.shape[-2:], dtype=torch.bool).tril_()
            return "causal" if compact.shape[-2:] == causal.shape and bool((compact == causal).all()) else None

    def _once(self, mask: torch.Tensor, what: Any, make: Callable[[], Any]) -> Any:
        if mask.is_inference():  # whether it is still what it was cannot be known
            return make()
        key = id(mask), mask._version, what
        if key not in self._made:
            self._made[key] = mask, make()
        return self._made[key][1]


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as it is added to scores; dimensions that are expanded stay so."""
    once = _once(mask)
    compact = mask if once is None else mask[once]
    return torch.zeros(compact.shape, dtype=dtype, device=mask.device).masked_fill_(~compact, float("-inf")).expand(mask.shape)


# -- trees of arguments and results ------------------------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a result or an argument, those in containers too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None))


def _rebuilt(value: Any, to: Callable[[torch.Tensor], Any]) -> Any:
    """``value`` with its tensors replaced and its containers new; other objects are the same."""
    if isinstance(value, torch.Tensor):
        return to(value)
    cls = value.__class__
    if cls is list:
        return [_rebuilt(v, to) for v in value]
    if isinstance(value, tuple):
        items = [_rebuilt(v, to) for v in value]
        return cls(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        if dataclasses.is_dataclass(value):  # such as the outputs of transformers
            return cls(**{k: _rebuilt(v, to) for k, v in value.items()})
        if cls in (dict, OrderedDict):
            return cls((k, _rebuilt(v, to)) for k, v in value.items())
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and all(f.init for f in dataclasses.fields(value)):
        return cls(**{f.name: _rebuilt(getattr(value, f.name), to) for f in dataclasses.fields(value)})
    return value


_VALUES = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout, type(None), type(...))


class _Leaf(NamedTuple):
    """A tensor argument: where it stands, and whether it is used where it is."""

    path: str
    tensor: torch.Tensor
    by_reference: bool


class _Arguments:
    """The arguments of a call taken apart: tensors, and the rest as a key."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], by_reference: frozenset[int | str]) -> None:
        self.leaves: list[_Leaf] = []
        self.held: list[Any] = []
        self.generators: list[torch.Generator] = []
        self._first_of: dict[int, int] = {}
        parts = [self._part(a, f"argument {i}", i in by_reference) for i, a in enumerate(args)]
        named = [(k, self._part(v, k, k in by_reference)) for k, v in kwargs.items()]
        self.key = tuple(parts), tuple(named)

    def _part(self, value: Any, path: str, by_reference: bool) -> Any:
        if isinstance(value, torch.Tensor):
            # One tensor given twice is one buffer: which of the arguments are one belongs to the key.
            first = self._first_of.setdefault(id(value), len(self.leaves))
            self.leaves.append(_Leaf(path, value, by_reference))
            if value.layout != torch.strided:
                return value.layout
            key = value.shape, value.stride(), value.dtype, value.device, value.requires_grad, first
            return (key, value.data_ptr()) if by_reference else key
        cls = value.__class__
        if cls in (list, tuple) or isinstance(value, tuple):
            return cls, tuple([self._part(v, f"{path}[{i}]", by_reference) for i, v in enumerate(value)])
        if cls in (dict, OrderedDict):
            return cls, tuple([(k, self._part(v, f"{path}[{k!r}]", by_reference)) for k, v in value.items()])
        if isinstance(value, _VALUES):
            return cls, str(value) if cls is float else value  # 0.0 and -0.0 are two values
        if cls is slice:
            return cls, tuple([self._part(v, path, by_reference) for v in (value.start, value.stop, value.step)])
        if isinstance(value, torch.Generator):
            self.generators.append(value)
        self.held.append(value)
        return cls, id(value)


# -- captured callables ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Graph:
    """One captured graph; ``graph`` is None where calls of the signature run as they are."""

    graph: Any
    buffers: list[torch.Tensor | None]
    once: list[tuple[slice, ...] | None]
    result: Any
    written: list[int]
    aliased: bool
    held: list[Any]
    replays: int = 0


class Captured:
    """A callable that is replayed as a CUDA graph; made by :func:`capture`.

    Attributes:
        function: the callable itself.
        mode: the mode that it runs and is captured under.
        pool: the memory pool of its graphs, once there is one.
        captures: graphs captured so far.
        replays: calls served by a replay.
    """

    def __init__(self, function: Callable[..., Any], mode: GemsMode | None, max_graphs: int, clone: bool,
                 by_reference: Sequence[int | str], uncapturable: str, without_gpu: str, pool: Any, backend: Backend) -> None:
        if not callable(function):
            raise TypeError(f"capture takes a callable, not {type(function).__name__}")
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, not {max_graphs}")
        for name, value in (("uncapturable", uncapturable), ("without_gpu", without_gpu)):
            if value not in ("raise", "eager"):
                raise ValueError(f"{name} is 'raise' or 'eager', not {value!r}")
        self.function = function
        self.mode = mode if mode is not None else GemsMode()
        self.captures = self.replays = 0
        self._max_graphs, self._clone, self._uncapturable, self._without_gpu = max_graphs, clone, uncapturable, without_gpu
        self._by_reference = frozenset(by_reference)
        self.pool: Any = pool.pool if isinstance(pool, Captured) else pool
        self._pool_of = pool if isinstance(pool, Captured) else None
        self._backend = backend
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._wasted = 0
        self._warned: set[str] = set()
        self._lock = threading.RLock()
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        self._module = owner if isinstance(owner, nn.Module) else None
        functools.update_wrapper(self, function, updated=())

    def __repr__(self) -> str:
        return f"<captured {getattr(self.function, '__name__', type(self.function).__name__)}: {len(self)} graphs, {self.replays} replays>"

    def __len__(self) -> int:
        """The number of graphs kept."""
        return sum(g.graph is not None for g in self._graphs.values())

    def reset(self) -> None:
        """Forget every graph and give its memory back; the next call captures anew."""
        with self._lock:
            self._graphs.clear()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the callable, or replay what it did for arguments of this signature.

        Raises:
            CaptureError: the call cannot be captured (with ``uncapturable="raise"``), or there is no GPU (with
                ``without_gpu="raise"``).
        """
        backend = self._backend
        if not backend.available():
            text = "there is no CUDA GPU, so nothing is captured: the callable runs under the mode as it is"
            if self._without_gpu == "raise":
                raise CaptureError("there is no CUDA GPU to capture on; without_gpu='eager' runs the callable as it is")
            self._warn_once("no GPU", text)
            return self._as_it_is(args, kwargs)
        if backend.capturing():
            return self._as_it_is(args, kwargs)  # part of a larger graph
        with self._lock:
            given = _Arguments(args, kwargs, self._by_reference)
            key = (given.key, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self._autocast(),
                   self._module is not None and self._module.training)
            found = self._graphs.get(key)
            if found is None:
                return self._first(key, given, args, kwargs)
            self._graphs.move_to_end(key)
            if found.graph is None:
                return self._as_it_is(args, kwargs)
            return self._replay(found, given)

    def _as_it_is(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.mode:
            return self.function(*args, **kwargs)

    def _autocast(self) -> Any:
        kind = self._backend.device_type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _replay(self, found: _Graph, given: _Arguments) -> Any:
        for leaf, buffer, once in zip(given.leaves, found.buffers, found.once):
            if buffer is not None and leaf.tensor is not buffer:
                if once is None:
                    buffer.copy_(leaf.tensor, non_blocking=True)
                else:
                    buffer[once].copy_(leaf.tensor[once], non_blocking=True)
        found.graph.replay()
        found.replays += 1
        self.replays += 1
        for i in found.written:
            buffer = found.buffers[i]
            if buffer is not None and given.leaves[i].tensor is not buffer:
                given.leaves[i].tensor.copy_(buffer)
        if not self._clone and not found.aliased:
            return found.result if isinstance(found.result, torch.Tensor) else _rebuilt(found.result, lambda t: t)
        own = {id(b): leaf.tensor for b, leaf in zip(found.buffers, given.leaves) if b is not None}
        # A result that is one of the inputs is the caller's tensor.
        return _rebuilt(found.result, lambda t: own[id(t)] if id(t) in own else t.clone() if self._clone else t)

    # -- the first call ------------------------------------------------------------------------------------------------

    def _first(self, key: Any, given: _Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            device = self._check(given)
        except CaptureError as error:
            return self._refused(key, given, error, lambda: self._as_it_is(args, kwargs))
        onlooker = Onlooker(self._backend.device_type)

        def run(a: tuple[Any, ...], k: dict[str, Any], onlooker: Onlooker) -> Any:
            with self.mode, self._without_autocast_cache(), ConstantFolder() as constants, Masks(constants), onlooker:
                return self.function(*a, **k)

        result = self._backend.warm_up(lambda: run(args, kwargs, onlooker), device)
        certain = [p.text for p in onlooker.problems if p.certain]
        if certain:
            return self._refused(key, given, _impossible(certain), lambda: result)
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(result)):
            return self._refused(key, given, CaptureError(
                "the result requires a gradient, and a replay records nothing for autograd: call it under torch.no_grad(), or "
                "capture a function that does the backward, too, and returns detached tensors"), lambda: result)
        try:
            self._capture(key, given, args, kwargs, run, device)
        except CaptureError as error:
            hints = "; ".join(p.text for p in onlooker.problems if p.text not in str(error))
            return self._refused(key, given, CaptureError(f"{error}" + (f" Perhaps because {hints}." if hints else "")), lambda: result,
                                 error.__cause__)
        return result

    def _check(self, given: _Arguments) -> int | None:
        """The index of the device that all tensors share; None if there is none among the arguments.

        Raises:
            CaptureError: there is none.
        """
        kind = self._backend.device_type
        devices: dict[torch.device, str] = {}
        for leaf in given.leaves:
            t = leaf.tensor
            if type(t) not in (torch.Tensor, nn.Parameter) or t.layout != torch.strided or t.is_quantized:
                raise CaptureError(f"{leaf.path} is a {type(t).__name__} of layout {str(t.layout).removeprefix('torch.')}; plain strided "
                                   "tensors can be captured")
            if t.device.type != kind:
                advice = (f"Move it to the GPU (.to({kind!r})), or pass a Python number, each of which has a graph of its own"
                          if t.device.type == "cpu" else "Leave it out")
                raise CaptureError(f"{leaf.path} is a tensor on {t.device}, whose value a graph cannot read at a replay. {advice}.")
            if torch.is_grad_enabled() and t.requires_grad and not leaf.by_reference:
                raise CaptureError(f"{leaf.path} requires a gradient, and a replay records nothing for autograd: call it under "
                                   "torch.no_grad(), or detach it")
            devices.setdefault(t.device, leaf.path)
        if len(devices) > 1:
            raise CaptureError("the arguments are on several devices, and a graph runs on one: "
                               + ", ".join(f"{path} on {device}" for device, path in devices.items()))
        return next((d.index for d in devices), None)

    def _capture(self, key: Any, given: _Arguments, args: tuple[Any, ...], kwargs: dict[str, Any],
                 run: Callable[[tuple[Any, ...], dict[str, Any], Onlooker], Any], device: int | None) -> None:
        buffers: list[torch.Tensor | None] = []
        stand_in: dict[int, torch.Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for leaf in given.leaves:
                buffer = None
                if not leaf.by_reference:
                    buffer = stand_in.get(id(leaf.tensor))
                    if buffer is None:
                        buffer = stand_in[id(leaf.tensor)] = _buffer_like(leaf.tensor)
                buffers.append(buffer)
        inputs = list(stand_in.values())
        versions = [b._version for b in inputs]
        remaining = iter(buffers)

        def replaced(t: torch.Tensor) -> torch.Tensor:
            buffer = next(remaining)
            return t if buffer is None else buffer

        own_args, own_kwargs = tuple(_replaced(a, replaced) for a in args), {k: _replaced(v, replaced) for k, v in kwargs.items()}
        if self.pool is None:
            source = self._pool_of
            if source is not None and source.pool is None:
                source.pool = self._backend.pool()
            self.pool = self._backend.pool() if source is None else source.pool
        try:
            onlooker = Onlooker(self._backend.device_type, capturing=True)
            graph, result = self._backend.record(lambda: run(own_args, own_kwargs, onlooker), device, self.pool, given.generators)
        except CaptureError:
            raise
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise CaptureError(f"capturing failed: {type(error).__name__}: {first}.") from error
        changed = {id(b) for b, v in zip(inputs, versions) if b._version != v}
        written = [i for i, b in enumerate(buffers) if b is not None and id(b) in changed]
        aliased = any(id(t) in {id(b) for b in inputs} for t in _tensors(result))
        self._make_room()
        held = [*given.held, *(leaf.tensor for leaf in given.leaves if leaf.by_reference)]
        once = [None if b is None else _once(b) for b in buffers]
        self._graphs[key] = _Graph(graph, buffers, once, result, written, aliased, held)
        self.captures += 1
        log.debug("captured %r with %d inputs", self, len(inputs))

    def _make_room(self) -> None:
        while len(self._graphs) >= self._max_graphs:
            _, oldest = self._graphs.popitem(last=False)
            if oldest.graph is not None and not oldest.replays:
                self._wasted += 1
        if self._wasted >= self._max_graphs:
            self._warn_once("wasted", f"{self._wasted} graphs were captured and given up before a single replay: the calls differ each "
                                      "time. Pass numbers that change as tensors, pad shapes, or raise max_graphs")

    def _refused(self, key: Any, given: _Arguments, error: CaptureError, eager: Callable[[], Any],
                 cause: BaseException | None = None) -> Any:
        if self._uncapturable == "raise":
            raise error from cause
        self._warn_once(str(error), f"{error} The callable runs under the mode as it is.")
        self._make_room()
        self._graphs[key] = _Graph(None, [], [], None, [], False, list(given.held))
        return eager()

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"gemsmode.capture: {text}", RuntimeWarning, stacklevel=4)

    @contextlib.contextmanager
    def _without_autocast_cache(self) -> Iterator[None]:
        """A weight that autocast converted and keeps until its block ends must not become part of a graph."""
        dtype = self._autocast()
        if dtype is None:
            yield
            return
        with torch.autocast(self._backend.device_type, dtype=dtype, cache_enabled=False):
            yield


def _replaced(value: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with the tensors replaced that :class:`_Arguments` found in it, in the same order."""
    if isinstance(value, torch.Tensor):
        return to(value)
    cls = value.__class__
    if cls in (list, tuple) or isinstance(value, tuple):
        items = [_replaced(v, to) for v in value]
        return cls(*items) if hasattr(value, "_fields") else cls(items)
    if cls in (dict, OrderedDict):
        return cls((k, _replaced(v, to)) for k, v in value.items())
    return value


def _once(tensor: torch.Tensor) -> tuple[slice, ...] | None:
    """An index that takes each element of an expanded tensor once; None where that is the whole tensor."""
    if not any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return None
    return tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None) for size, stride in zip(tensor.shape, tensor.stride()))


def _buffer_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout and values; a compact one where elements share memory otherwise than by expansion."""
    source = tensor.detach()
    once = _once(source)
    if once is not None:
        return _buffer_like(source[once]).expand(source.shape)
    if TensorMeta.of(source).may_overlap_itself:
        return source.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=source.device).copy_(source)


def capture(function: Callable[..., Any], *, mode: GemsMode | None = None, prefer: str | None = None, max_graphs: int = 8,
            clone: bool = False, by_reference: Sequence[int | str] = (), uncapturable: str = "raise", without_gpu: str = "eager",
            pool: Any = None, backend: Backend | None = None) -> Captured:
    """Run ``function`` under the mode as a CUDA graph; see :mod:`gemsmode.graphs` for what that means.

    Args:
        function: a module, a function, a method. Its results are tensors, or containers of tensors and other objects.
        mode: the mode to run and capture under; ``GemsMode(prefer=prefer)`` by default.
        prefer: ``"rules"``, or ``"fastest"``: of each rule and PyTorch's own the one with less device time, which is what a replay
            consists of; see :mod:`gemsmode.choice`. Not together with ``mode``.
        max_graphs: graphs kept at a time, one a signature.
        clone: return copies of the results, which no later call overwrites.
        by_reference: positions and names of arguments whose tensors are used where they are, not copied: large caches. They
            must keep their memory; each other memory has a graph of its own.
        uncapturable: ``"raise"``, or ``"eager"``: run what cannot be captured under the mode as it is, with one warning.
        without_gpu: ``"eager"``: run under the mode as it is, with one warning; or ``"raise"``.
        pool: share the memory pool of another :class:`Captured` (or ``torch.cuda.graph_pool_handle()``): their replays
            must not overlap in time, and each overwrites the other's results.
        backend: for tests.

    Returns:
        A callable with the arguments of ``function``.

    Raises:
        TypeError, ValueError: unusable options.
    """
    if prefer is not None:
        if mode is not None:
            raise ValueError("give either a mode, which has its own prefer=, or prefer")
        mode = GemsMode(prefer=choice.default(by="device") if prefer == "fastest" else prefer)
    return Captured(function, mode, max_graphs, clone, by_reference, uncapturable, without_gpu, pool, backend or CudaGraphs())
