"""Arithmetic, comparison, logical and bitwise ops of two operands."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (the interpreter wants to see it)

from gemsmode.ops.pointwise import ALWAYS_BOOL, pointwise


@pointwise("aten.add.Tensor")
@triton.jit
def add(self, other, alpha):
    return self + other * alpha


@pointwise("aten.eq.Tensor", kind=ALWAYS_BOOL)
@triton.jit
def eq(self, other):
    return self == other
