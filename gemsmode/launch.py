"""Compiling Triton kernels for the arguments that a plan passes, and launching them with little host time.

``kernel[grid](...)`` costs 11 to 14 us of host time a launch, most of it spent on deciding again what a plan has
decided once: the type and specialization of each argument. Here a kernel is compiled for a stated :class:`Spec` and
launched through the C entry point of Triton's own launcher, with integers for pointers.

What ``JITFunction.run`` would do and this must not forget: integer classes (1, multiple of 16, other) and pointer
alignment (both in the spec; a plan checks alignment on each call), the current stream and device, scratch memory and
launch hooks (a profiler's). Where the installed Triton does not look as expected, :func:`entry` says so and the
launch goes through the compiled kernel's public ``compiled[grid](...)``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from gemsmode.target import Target

log = logging.getLogger("gemsmode")

interpreter_lock = threading.RLock()
"""Triton's interpreter keeps its grid position in a global, so interpreted launches take turns."""

POINTER = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.uint16: "*u16", torch.uint32: "*u32", torch.uint64: "*u64", torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}
"""Triton's pointer type for each dtype that kernels can read; complex has none."""

_CAPTURED_ALIGNMENT = [["tt.divisibility", 16]]


class Constants(tuple):
    """Pairs of constexpr parameter and value whose hash is computed once: plans of new sizes look kernels up by it."""

    _hash: int

    def __new__(cls, pairs: Iterable[tuple[str, Any]]) -> Constants:
        self = super().__new__(cls, pairs)
        self._hash = tuple.__hash__(self)
        return self

    def __hash__(self) -> int:
        return self._hash


class Spec(NamedTuple):
    """A kernel and all that its machine code depends on.

    Attributes:
        kernel: the ``@triton.jit`` function.
        types: for each parameter that is no constexpr, in order, its type in Triton's notation; a tuple of types for a
            parameter that is a tuple; ``"1"`` for an integer known to be 1; a trailing ``"D"`` for a pointer or
            integer divisible by 16.
        constants: pairs of parameter name and value for the constexpr parameters.
        num_warps: warps a program.
        num_stages: software pipelining depth.
        asserts: whether ``tl.device_assert`` in the kernel is compiled in.
    """

    kernel: Any
    types: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 2
    asserts: bool = False


def integer_type(value: int, specialize: bool = True) -> str:
    """The type, with its class, of an integer argument known when the plan is made."""
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    if not specialize:
        return kind
    if value == 1:
        return "1"
    return kind + "D" if value % 16 == 0 else kind


@functools.cache
def _parameter_names(kernel: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    names = tuple(kernel.arg_names)
    annotations = kernel.fn.__annotations__
    constexprs = frozenset(n for n in names if "constexpr" in str(annotations.get(n, "")))
    return names, constexprs


def split_parameters(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a kernel's run-time parameters and of its constexpr parameters, in order."""
    names, constexprs = _parameter_names(kernel)
    return tuple(n for n in names if n not in constexprs), tuple(n for n in names if n in constexprs)


def source(spec: Spec) -> ASTSource:
    """The Triton source object of ``spec``: types, constants and attributes as ``JITFunction.run`` would find them."""
    names, constexprs = _parameter_names(spec.kernel)
    constants = dict(spec.constants)
    types = iter(spec.types)
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def place(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(place(k, (*path, i)) for i, k in enumerate(kind))
        if kind == "1":
            values[path] = 1
            return "constexpr"
        if kind.endswith("D"):
            attributes[path] = _CAPTURED_ALIGNMENT
            return kind[:-1]
        return kind

    for i, name in enumerate(names):
        if name in constexprs:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
        else:
            signature[name] = place(next(types), (i,))
    return ASTSource(spec.kernel, signature, values, attributes)


_compiled: dict[tuple[Spec, Any, int], Any] = {}
_compile_lock = threading.Lock()


def compile(spec: Spec, target: Target, device: int = 0) -> Any:
    """The compiled kernel for ``spec`` on device number ``device`` of ``target`` (Triton's disk cache is used).

    Raises:
        Whatever Triton raises: a compile error, or out of resources.
    """
    key = (spec, target, device)
    compiled = _compiled.get(key)
    if compiled is None:
        with _compile_lock:
            compiled = _compiled.get(key)
            if compiled is None:
                options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
                if spec.asserts:
                    options |= {"debug": True, "sanitize_overflow": False}
                compiled = triton.compile(source(spec), target=target.triton, options=options)
                if target.present:
                    with torch.cuda.device(device) if target.device_type == "cuda" else torch.xpu.device(device):
                        compiled._init_handles()
                _compiled[key] = compiled
                log.debug("compiled %s%s for %s:%s", spec.kernel.__name__, spec.types, target.backend, target.arch)
    return compiled


def flat_types(types: tuple[Any, ...]) -> list[str]:
    """The types in ``types`` in the order in which a flattened argument list has them."""
    result: list[str] = []
    for kind in types:
        if isinstance(kind, tuple):
            result += flat_types(kind)
        else:
            result.append(kind)
    return result


class Entry(NamedTuple):
    """How to launch one compiled kernel straight through Triton's C launcher.

    Attributes:
        function: the C function.
        before: the arguments after grid, stream and before the kernel's own.
        nested: True if the kernel's own arguments follow one by one, in the nesting of the kernel's parameters and
            with a placeholder for each constexpr; False if they are one flat tuple of run-time values.
        scratch: bytes of device memory that each program needs (for tensor descriptors made on the device); its address
            stands where ``before`` has :data:`SCRATCH`.
    """

    function: Callable[..., Any]
    before: tuple[Any, ...]
    nested: bool
    scratch: int = 0


SCRATCH = object()
"""Stands for the address of a launch's scratch memory."""


def entry(compiled: Any, spec: Spec) -> Entry | None:
    """The C entry point for ``compiled``, or None if this Triton or this kernel needs the public launcher."""
    launcher = compiled.run
    if type(launcher).__name__ != "CudaLauncher" or not type(launcher).__module__.startswith("triton.backends.nvidia"):
        return None
    try:
        if launcher.profile_scratch_size or launcher.launch_cooperative_grid:
            return None
        scratch = launcher.global_scratch_size * launcher.num_ctas
        if scratch and launcher.global_scratch_align > SCRATCH_ALIGNMENT:
            return None
        place = SCRATCH if scratch else None
        if getattr(launcher, "gsan_enabled", False):
            return None
        head = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
        if hasattr(launcher, "kernel_signature"):
            from triton.backends.nvidia import driver

            types = [t.removesuffix("D") for t in flat_types(spec.types) if t != "1"]
            tail = (compiled.packed_metadata, None, None, None, place, None,
                    driver.annotate_arguments(types), driver.make_kernel_signature(types))
            return Entry(launcher.launch, head + tail, False, scratch)
        return Entry(launcher.launch, (*head, place, None, compiled.packed_metadata, None, None, None), True, scratch)
    except (AttributeError, TypeError) as error:
        log.warning("this Triton's launcher is not as expected (%s): launches take the slower public way", error)
        return None


def hook_lists() -> tuple[Any, Any]:
    """The enter and exit hooks' lists, empty unless a profiler wants to see launches; plans look at them on each call."""
    runtime = triton.knobs.runtime
    return getattr(runtime.launch_enter_hook, "calls", ()), getattr(runtime.launch_exit_hook, "calls", ())


SCRATCH_ALIGNMENT = 512
"""What PyTorch's caching allocators align memory to."""


def _scratch_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=torch.accelerator.current_accelerator())


def public_launch(compiled: Any, spec: Spec, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    """Launch through ``compiled[grid]`` (hooks, scratch memory and all)."""
    names, constexprs = _parameter_names(spec.kernel)
    constants = dict(spec.constants)
    given = iter(arguments)
    values = [constants[n] if n in constexprs else next(given) for n in names]
    if not getattr(compiled.run, "global_scratch_size", 0):
        compiled[grid](*values)
        return
    # Triton asks an allocator that the program may have set for itself.
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    triton.set_allocator(_scratch_memory)
    try:
        compiled[grid](*values)
    finally:
        triton.set_allocator(before)


def interpreted_launch(spec: Spec, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    """Run a kernel in Triton's interpreter on CPU tensors."""
    runtime_names, _ = split_parameters(spec.kernel)
    given = tuple(_interpreted_number(a, t) for a, t in zip(arguments, spec.types))
    import numpy
    from triton.runtime.interpreter import interpreter_builder

    # Lanes outside the mask compute on whatever is there; a GPU does not warn of it either.
    with interpreter_lock, numpy.errstate(all="ignore"):
        options = interpreter_builder.options
        if spec.asserts:
            interpreter_builder.options = dataclasses.replace(options, debug=True, sanitize_overflow=False)
        try:
            spec.kernel[grid](**dict(zip(runtime_names, given)), **dict(spec.constants))
        finally:
            interpreter_builder.options = options


def _interpreted_number(argument: Any, kind: Any) -> Any:
    """``argument`` as the interpreter must be given it: by itself it would take a Python float for a float32, and -0.0 for 0."""
    if isinstance(argument, tuple):
        return tuple(_interpreted_number(a, k) for a, k in zip(argument, kind))
    if kind in ("fp32", "fp64") and isinstance(argument, float):
        import numpy
        from triton.runtime.interpreter import TensorHandle

        dtype = tl.float64 if kind == "fp64" else tl.float32
        return tl.tensor(TensorHandle(numpy.array([argument], dtype=numpy.dtype(dtype.name.replace("fp", "float"))), dtype), dtype)
    return argument
