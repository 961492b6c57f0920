"""What the kernels run on: the one home of questions about hardware and of the choice between GPU and interpreter.

``TRITON_INTERPRET=1`` must be in force when ``@triton.jit`` runs. On a machine without an accelerator importing
gemsmode puts it in force (and converts Triton's own library functions if Triton was imported earlier), so that kernels
defined after ``import gemsmode`` run there too.

``GEMSMODE_TARGET`` (for example ``cuda:90``, ``cuda:100``, ``hip:gfx942``) plans for hardware that is not present:
kernels are then compiled for it and never launched. The tests build every kernel that way on machines without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton

from gemsmode import interpreter

log = logging.getLogger("gemsmode")


@dataclass(frozen=True)
class Target:
    """Where plans run.

    Attributes:
        device_type: ``"cuda"``, ``"xpu"`` or ``"cpu"``; tensors of other device types pass through.
        backend: Triton's name of the backend, or ``"interpreter"``.
        arch: compute capability as an int (``90``) for CUDA, the architecture's name for HIP, ``0`` in the interpreter.
        warp_size: threads a warp.
        multiprocessors: number of multiprocessors (compute units) of the device.
        present: False when plans are only made and compiled, never launched.
    """

    device_type: str
    backend: str
    arch: int | str
    warp_size: int = 32
    multiprocessors: int = 132
    present: bool = True

    @functools.cached_property
    def interpreted(self) -> bool:
        return self.backend == "interpreter"

    @property
    def triton(self) -> Any:
        """Triton's ``GPUTarget`` for this target."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)

    @functools.cached_property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program can have."""
        if self.backend == "cuda":
            return _SHARED_MEMORY.get(int(self.arch), 99) * 1024
        return 64 * 1024

    @functools.cached_property
    def has_tf32x3(self) -> bool:
        """Whether float32 products take three of TF32, where that was measured to be faster and as close (compute capability 9.0)."""
        return self.backend == "cuda" and int(self.arch) == 90

    @functools.cached_property
    def is_fast_in_float64(self) -> bool:
        """Whether float64 arithmetic takes twice the time of float32's, not 64 times."""
        return self.arch in (80, 90, 100, "gfx90a", "gfx942", "gfx950")

    @functools.cached_property
    def has_wgmma(self) -> bool:
        """Whether the tensor cores read their operands from shared memory (compute capability 9.0, and 10.x in its own way)."""
        return self.backend == "cuda" and 90 <= int(self.arch) < 120

    @functools.cached_property
    def has_tma(self) -> bool:
        """Whether the device has tensor-memory-access descriptors (compute capability 9.0 and later)."""
        return self.backend == "cuda" and int(self.arch) >= 90


_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
"""KiB by compute capability; 99 for the others (CUDA C++ Programming Guide, table of technical specifications)."""

INTERPRETER = Target("cpu", "interpreter", 0)


def _from_name(name: str) -> Target:
    backend, _, arch = name.partition(":")
    if backend == "cuda" and arch.isdigit():
        return Target("cuda", "cuda", int(arch), 32, present=False)
    if backend == "hip" and arch:
        return Target("cuda", "hip", arch, 64, 304, present=False)
    raise ValueError(f"GEMSMODE_TARGET must look like 'cuda:90' or 'hip:gfx942', not {name!r}")


@functools.cache
def _use_interpreter() -> Target:
    if importlib.util.find_spec("numpy") is None:
        raise ModuleNotFoundError("there is no GPU, so kernels run in Triton's interpreter, which needs numpy: pip install numpy",
                                  name="numpy")
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
    triton.knobs.runtime.interpret = True
    interpreter.install()
    return INTERPRETER


def choose_interpreter_early() -> None:
    """Choose now where there can be only the interpreter, so that kernels defined from here on are made for it.

    Does not touch a GPU: a process that is to fork, or to pick its devices, may do so after the import.
    """
    accelerator = torch.accelerator.current_accelerator()
    if os.environ.get("GEMSMODE_TARGET") or (accelerator is not None and (accelerator.type != "cuda" or torch.cuda.device_count())):
        return
    with contextlib.suppress(ModuleNotFoundError):  # who runs kernels is told that numpy is missing
        current()


@functools.cache
def current() -> Target:
    """The target of this process, chosen once.

    In order: ``GEMSMODE_TARGET``; the interpreter if ``TRITON_INTERPRET=1``; the accelerator that PyTorch sees; the
    interpreter, on CPU tensors, with one line in the log that says so.
    """
    if name := os.environ.get("GEMSMODE_TARGET"):
        return _from_name(name)
    if triton.knobs.runtime.interpret:
        return _use_interpreter()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if torch.version.hip:
            arch: int | str = properties.gcnArchName.split(":")[0]
            return Target("cuda", "hip", arch, properties.warp_size, properties.multi_processor_count)
        major, minor = torch.cuda.get_device_capability()
        return Target("cuda", "cuda", major * 10 + minor, 32, properties.multi_processor_count)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type == "xpu":
        properties = torch.xpu.get_device_properties()
        return Target("xpu", "xpu", properties.architecture, 32, properties.gpu_subslice_count)
    log.info("no accelerator: kernels run on CPU tensors in Triton's interpreter, for checking and not for speed")
    return _use_interpreter()
