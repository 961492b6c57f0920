"""Type promotion as PyTorch does it, from dtypes alone, and the dtypes that kernels compute in.

Source: PyTorch's documentation, "Tensor attributes: type promotion", and ``torch.promote_types``. The tests compare
with ``torch.result_type``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from gemsmode.signature import TensorMeta

FLOAT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BOOL = (torch.bool,)
NUMERIC = FLOAT + INT
ALL = FLOAT + INT + BOOL

TRITON = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
    torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
    torch.uint8: tl.uint8, torch.uint16: tl.uint16, torch.uint32: tl.uint32, torch.uint64: tl.uint64,
    torch.bool: tl.int1,
}
"""Triton's dtype for each of PyTorch's that kernels handle."""

OPMATH = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtype to compute in, where it is not the dtype itself."""

Item = tuple[Any, int]
"""What promotion needs of an operand: its dtype or number class, and its rank of 2 (tensor), 1 (0-dim) or 0 (number)."""


def item(operand: Any) -> Item:
    """The promotion item of a :class:`TensorMeta` or a Python number."""
    if operand.__class__ is TensorMeta:
        return operand.dtype, 2 if operand.shape else 1
    return operand.__class__, 0


def _number_dtype(cls: type, default: torch.dtype) -> torch.dtype:
    complex_default = torch.complex128 if default == torch.float64 else torch.complex64
    return {bool: torch.bool, int: torch.int64, float: default}.get(cls, complex_default)


# PyTorch 2.14 has complex numbers of two bfloat16.
_COMPLEX_OF_16 = {torch.float16: torch.complex32, torch.bfloat16: getattr(torch, "bcomplex32", torch.complex64)}


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return higher or lower
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return torch.promote_types(higher, _COMPLEX_OF_16.get(higher, torch.complex64)) if lower.is_complex else higher
    if higher == torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher


@functools.cache
def _result(items: tuple[Item, ...], default: torch.dtype) -> torch.dtype:
    ranks: list[torch.dtype | None] = [None, None, None]
    for kind, rank in items:
        dtype = kind if rank else _number_dtype(kind, default)
        ranks[rank] = dtype if ranks[rank] is None else torch.promote_types(ranks[rank], dtype)
    result = _combine(ranks[2], _combine(ranks[1], ranks[0]))
    assert result is not None, "promotion of no operands"
    return result


def result_type(operands: Sequence[Any]) -> torch.dtype:
    """``torch.result_type`` of metadata and Python numbers."""
    return _result(tuple([item(o) for o in operands]), torch.get_default_dtype())


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are computed with: float32 for the 16-bit floats."""
    return OPMATH.get(dtype, dtype)
