"""Tensors that are the same at each run of a callable: integers and booleans that no argument, weight or random number went into.

Masks of attention are often such: made of ``arange`` and comparisons, for sizes that are fixed. Under CUDA-graph capture nothing
can be read from the device; but what a constant holds can be worked out on the CPU, from the calls that made it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gemsmode.signature import parameters

_DTYPES = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_MAX_NUMEL = 1 << 26
"""Elements of the largest tensors that are followed, since following keeps a tensor's memory: a mask of 8192 by 8192."""

_A = torch.ops.aten
_UNSET = frozenset({_A.empty.memory_format, _A.empty_strided.default, _A.empty_permuted.default, _A.empty_like.default,
                    _A.new_empty.default, _A.new_empty_strided.default})


class _Made(NamedTuple):
    """How a constant was made: by which call, of which other constants."""

    tensor: torch.Tensor  # held, so that its memory is not another's
    func: Any
    args: tuple[Any, ...]  # with a _Made for each tensor
    kwargs: dict[str, Any]
    computed: bool  # its memory holds results, not what a factory filled it with
    version: int

    def is_unchanged(self) -> bool:
        """Whether code that dispatches no calls, such as a compiled function's, has not said that it wrote to it."""
        return self.version == _version(self.tensor)


class ConstantFolder(TorchDispatchMode):
    """Follows the calls of a block; afterwards, or within, :meth:`value` tells what a constant holds.

    Only calls all of whose tensors are constants, or that take none, make constants: of integers and booleans, one result, at
    most 2**26 elements. What is written to is no constant any more. Memory that a factory filled (``zeros``, ``arange``) is
    followed, but not told of: kernels that PyTorch does not see take such memory for their results.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int | None, dict[tuple[Any, ...], _Made]] = {}
        self._values: dict[int, tuple[_Made, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for i, parameter in enumerate(parameters(func)):
                if parameter.is_written:
                    written = args[i] if i < len(args) else kwargs.get(parameter.name)
                    for tensor in written if isinstance(written, (list, tuple)) else (written,):
                        if tensor is not None:
                            self._made.pop(_memory(tensor), None)
        elif (isinstance(result, torch.Tensor) and result.dtype in _DTYPES and result.numel() <= _MAX_NUMEL and func not in _UNSET
              and torch.Tag.nondeterministic_seeded not in func.tags and type(result) is torch.Tensor and _memory(result) is not None):
            sources: list[_Made] = []
            try:
                own_args, own_kwargs = self._of_constants(args, sources), self._of_constants(kwargs, sources)
            except LookupError:
                return result
            shared = [s for s in sources if _memory(s.tensor) == _memory(result)]
            computed = all(s.computed for s in shared) if shared else bool(sources)
            made = _Made(result, func, own_args, own_kwargs, computed, _version(result))
            self._made.setdefault(_memory(result), {})[_place(result)] = made
        return result

    def _of_constants(self, value: Any, sources: list[_Made]) -> Any:
        """``value`` with each tensor replaced by how it was made, which goes to ``sources``, too.

        Raises:
            LookupError: one is no constant.
        """
        if isinstance(value, torch.Tensor):
            made = self._made[_memory(value)][_place(value)]
            if not made.is_unchanged():
                raise LookupError("written to")
            sources.append(made)
            return made
        if isinstance(value, (list, tuple)):
            return type(value)([self._of_constants(v, sources) for v in value])
        if isinstance(value, dict):
            return {k: self._of_constants(v, sources) for k, v in value.items()}
        if isinstance(value, torch.Generator):
            raise LookupError("draws random numbers")
        return value

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a constant holds, on the CPU; None if the tensor is not known to be one."""
        made = self._made.get(_memory(tensor), {}).get(_place(tensor))
        if made is None or not made.computed or not made.is_unchanged():
            return None
        if id(made) not in self._values:
            with _disable_current_modes(), torch.no_grad():
                self._values[id(made)] = made, _again(made, {})
        return self._values[id(made)][1]


def _memory(tensor: torch.Tensor) -> int | None:
    """What tells a tensor's memory from others'; None of layouts that have no one memory, such as sparse ones."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Which of its memory a tensor is. (Autograd makes new objects of views, so that identity would not tell.)"""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _again(made: _Made, done: dict[int, torch.Tensor]) -> torch.Tensor:
    """Make a constant once more, on the CPU."""
    key = id(made.tensor)
    if key not in done:
        def given(value: Any) -> Any:
            if isinstance(value, _Made):
                return _again(value, done)
            if isinstance(value, (list, tuple)):
                return type(value)([given(v) for v in value])
            return torch.device("cpu") if isinstance(value, torch.device) else value

        kwargs = {k: given(v) for k, v in made.kwargs.items() if k != "pin_memory"}
        done[key] = made.func(*given(made.args), **kwargs)
    return done[key]
