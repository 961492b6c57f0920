"""A GPU that is not there: plans for it are bound, launched and run, on CPU tensors.

The C function of Triton's launcher is replaced by :meth:`FakeGpu.launch_flat` or :meth:`FakeGpu.launch_nested`, which
take what the real one takes (integers for pointers), check it against what the kernel was compiled for, and run the
kernel in the interpreter on the memory that the pointers mean. So what the assembled functions pass is tested without
a GPU, for both calling conventions of Triton's launcher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from gemsmode import handlers, launch, plan
from gemsmode.registry import Registry, default, find_op
from gemsmode.signature import TensorMeta, describe
from gemsmode.target import Target

TARGET = Target("cuda", "cuda", 90)


class KernelArg(SimpleNamespace):
    """Stands for the C object that tells Triton's launcher how to flatten an argument."""


CONSTEXPR, KERNEL, TUPLE = 0, 1, 2


class Compiled:
    """Stands for Triton's ``CompiledKernel``."""

    def __init__(self, gpu: FakeGpu, spec: launch.Spec, device: int) -> None:
        self.gpu, self.spec, self.device = gpu, spec, device
        self.function, self.packed_metadata = ("function", spec, device), ("packed metadata",)
        self.run = gpu.launcher(spec)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def runner(*args: Any) -> None:
            self.gpu.public += 1
            assert self.gpu.current_device == self.device, "the public launcher takes the current device's stream"
            runtime = triton.knobs.runtime
            with self.gpu.launching(grid):
                self.run(*grid, self.gpu.stream(self.gpu.current_device), self.function, self.packed_metadata, "launch metadata",
                         runtime.launch_enter_hook, runtime.launch_exit_hook, *args)

        return runner


class FakeGpu:
    """See the module.

    Args:
        convention: ``"flat"`` (Triton 3.7), ``"nested"`` (earlier ones) or ``"public"`` (a launcher of unknown looks).

    Attributes:
        compiled: what was compiled: spec and device.
        launches: grid, device and values of each launch through the C function.
        public: launches through the public way.
        current_device: as ``torch.cuda.current_device()``.
        runs_kernels: set it to False where only what is passed matters.
        scratch: bytes of scratch memory that each program of a kernel compiled from now on asks for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, convention: str, registry: Registry = default, devices: int = 1) -> None:
        self.convention = convention
        self.compiled: list[tuple[launch.Spec, int]] = []
        self.launches: list[tuple[tuple[int, int, int], int, tuple[Any, ...]]] = []
        self.public = self.current_device = 0
        self.runs_kernels = True
        self.scratch = 0
        self._live: list[torch.Tensor] = []
        self._kernels: dict[Any, Compiled] = {}
        patch = monkeypatch.setattr
        patch(launch, "compile", self.compile)
        patch(plan, "_ready", {})
        patch(plan, "_allocator", lambda device_type: self.empty)
        patch(torch._C, "_cuda_getCurrentRawStream", self.stream, raising=False)
        patch(torch._C, "_cuda_getDevice", lambda: self.current_device, raising=False)
        patch(torch.cuda, "device_count", lambda: devices)
        patch(torch.cuda, "current_device", lambda: self.current_device)
        patch(torch.cuda, "device", self.device)
        if convention == "flat":
            from triton.backends.nvidia import driver

            if not hasattr(driver, "PyKernelArg"):
                pytest.skip("this Triton's launcher takes nested arguments")
            for name, value in (("PyKernelArg", KernelArg), ("ARG_CONSTEXPR", CONSTEXPR), ("ARG_KERNEL", KERNEL), ("ARG_TUPLE", TUPLE)):
                patch(driver, name, value)
            utils = SimpleNamespace(launch=self.launch_flat, build_signature_metadata=tuple)
            patch(triton.runtime.driver, "_active", SimpleNamespace(utils=utils), raising=False)
        self.policy = handlers.Policy(registry, target=TARGET)

    # -- what torch and triton would do --------------------------------------------------------------------------------

    def stream(self, device: int) -> int:
        return 7000 + device

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current_device = self.current_device, index
        try:
            yield
        finally:
            self.current_device = before

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        assert type(shape) is tuple and type(stride) is tuple  # the C function that this stands for wants that
        tensor = torch.empty_strided(shape, stride, dtype=dtype)
        tensor = tensor.fill_(float("nan")) if dtype.is_floating_point else tensor.fill_(1)
        self._live.append(tensor)
        return tensor

    def compile(self, spec: launch.Spec, target: Target, device: int = 0) -> Compiled:
        assert target is TARGET
        key = (spec, device)
        if key not in self._kernels:
            self.compiled.append(key)
            self._kernels[key] = Compiled(self, spec, device)
        return self._kernels[key]

    # -- launchers -----------------------------------------------------------------------------------------------------

    def launcher(self, spec: launch.Spec) -> Any:
        metadata = SimpleNamespace(num_ctas=1, global_scratch_size=self.scratch, global_scratch_align=128, profile_scratch_size=0,
                                   profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False)
        if self.convention == "flat":
            from triton.backends.nvidia.driver import CudaLauncher

            return CudaLauncher(launch.source(spec), metadata)

        def call(self: Any, x: int, y: int, z: int, stream: int, function: Any, *args: Any) -> None:
            self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *args)

        name = "CudaLauncher" if self.convention == "nested" else "OtherLauncher"
        return type(name, (), {"__module__": "triton.backends.nvidia.driver", "__call__": call, "launch": staticmethod(self.launch_nested),
                               **vars(metadata)})()

    @contextlib.contextmanager
    def launching(self, grid: tuple[int, int, int]) -> Iterator[None]:
        self._public = True
        try:
            yield
        finally:
            self._public = False

    _public = False

    def launch_flat(self, x: int, y: int, z: int, stream: int, function: Any, cooperative: bool, pdl: bool, kernel_metadata: Any,
                    launch_metadata: Any, enter: Any, leave: Any, global_scratch: Any, profile_scratch: Any, annotations: list[KernelArg],
                    signature: tuple[str, ...], args: tuple[Any, ...]) -> None:
        """The C function of Triton 3.7: ``args`` are flattened as ``annotations`` say, and read as ``signature`` says."""

        def flatten(args: Any, annotations: list[KernelArg]) -> Iterator[Any]:
            assert len(args) == len(annotations)
            for arg, annotation in zip(args, annotations):
                if annotation.type == TUPLE:
                    yield from flatten(arg, annotation.nested_tuple)
                elif annotation.type == KERNEL:
                    yield arg

        values = tuple(flatten(args, annotations))
        assert list(signature) == [t.removesuffix("D") for t in launch.flat_types(function[1].types) if t != "1"]
        self._run((x, y, z), stream, function, (cooperative, pdl, kernel_metadata), (launch_metadata, enter, leave),
                  (global_scratch, profile_scratch), values)

    def launch_nested(self, x: int, y: int, z: int, stream: int, function: Any, cooperative: bool, pdl: bool, global_scratch: Any,
                      profile_scratch: Any, kernel_metadata: Any, launch_metadata: Any, enter: Any, leave: Any, *args: Any) -> None:
        """The C function of earlier Tritons: one argument for each parameter of the kernel, constexprs included."""
        spec = function[1]
        names, constexprs = spec.kernel.arg_names, launch.split_parameters(spec.kernel)[1]
        assert len(args) == len(names)
        given = [a for n, a in zip(names, args) if n not in constexprs]

        def flatten(args: Any, types: Any) -> Iterator[Any]:
            assert len(args) == len(types)
            for arg, kind in zip(args, types):
                if isinstance(kind, tuple):
                    yield from flatten(arg, kind)
                elif kind != "1":
                    yield arg

        self._run((x, y, z), stream, function, (cooperative, pdl, kernel_metadata), (launch_metadata, enter, leave),
                  (global_scratch, profile_scratch), tuple(flatten(given, spec.types)))

    def _run(self, grid: tuple[int, int, int], stream: int, function: Any, head: Any, hooks: Any, scratch: Any,
             values: tuple[Any, ...]) -> None:
        _, spec, device = function
        assert head == (False, False, ("packed metadata",))
        assert scratch[1] is None
        if self.scratch and not self._public:
            self._memory(scratch[0] + grid[0] * grid[1] * grid[2] * self.scratch - 1, "*u8")
            assert scratch[0] % 16 == 0
        else:
            assert scratch[0] is None
        assert stream == self.stream(device)
        if self._public:
            assert hooks[0] == "launch metadata"
        else:
            assert hooks == (None, None, None)
            assert all(type(v) in (int, float, bool) for v in values), values
            self.launches.append((grid, device, values))
        remaining = iter(values)

        def place(kind: Any) -> Any:
            if isinstance(kind, tuple):
                return tuple(place(k) for k in kind)
            if kind == "1":
                return 1
            value = next(remaining)
            if kind.startswith("*"):
                pointer = value.data_ptr() if isinstance(value, torch.Tensor) else value
                assert not kind.endswith("D") or pointer % 16 == 0
                return self._memory(pointer, kind.removesuffix("D"))
            if kind.startswith("i"):
                assert isinstance(value, int) and (not kind.endswith("D") or value % 16 == 0)
                assert kind.startswith("i64") or -(2**31) <= value < 2**31
                return int(value)
            return float(value)  # as C reads it, from an int too

        arguments = tuple(place(kind) for kind in spec.types)
        assert next(remaining, None) is None, "more values than the kernel has parameters"
        if self.runs_kernels:
            launch.interpreted_launch(spec, grid, arguments)

    def _memory(self, pointer: int, kind: str) -> torch.Tensor:
        """The memory from ``pointer`` on, as the kernel sees it."""
        dtype = next(d for d, k in launch.POINTER.items() if k == kind)
        for tensor in self._live:
            storage = tensor.untyped_storage()
            offset = pointer - storage.data_ptr()
            if 0 <= offset < max(storage.nbytes(), 1):
                assert offset % dtype.itemsize == 0
                count = (storage.nbytes() - offset) // dtype.itemsize
                return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, (count,), (1,))  # type: ignore[call-overload]
        raise AssertionError(f"pointer {pointer:#x} belongs to no tensor")

    # -- calls ---------------------------------------------------------------------------------------------------------

    def decide(self, name: str, *args: Any, device: int = 0) -> handlers.Decided:
        """The decision for a call whose (CPU) tensors stand for tensors on GPU number ``device``; arguments in order."""

        def there(value: Any) -> Any:
            if isinstance(value, TensorMeta):
                return value._replace(device=torch.device("cuda", device))
            return tuple(there(v) for v in value) if isinstance(value, tuple) else value

        return self.policy.handler(find_op(name)).decide(tuple(there(describe(a)) for a in args))

    def call(self, name: str, *args: Any, device: int = 0) -> Any:
        """Decide and run; the decision must be a rule's."""
        decided = self.decide(name, *args, device=device)
        assert decided.decision.kind == "rule", decided.decision
        return self.run(decided, *args)

    def run(self, decided: handlers.Decided, *args: Any) -> Any:
        for arg in args:
            self._live += [t for t in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(t, torch.Tensor)]
        return decided.run(*args)
