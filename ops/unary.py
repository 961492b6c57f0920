"""Unary maths."""

from __future__ import annotations

import triton
import triton.language as tl

from gemsmode.ops.pointwise import INT_TO_FLOAT, pointwise
from gemsmode.ops.promotion import FLOAT, NUMERIC


@pointwise("aten.exp.default", kind=INT_TO_FLOAT)
@triton.jit
def exp(self):
    return tl.exp(self)


@pointwise("aten.silu.default", dtypes=FLOAT)
@triton.jit
def silu(self):
    return self * tl.sigmoid(self)


@pointwise("aten.neg.default", dtypes=NUMERIC)
@triton.jit
def neg(self):
    return -self
