"""Unary maths: rounding, exponentials, logarithms, trigonometric, hyperbolic and special functions, tests of values.

Float32 is computed in float32 and float64 in float64, to a few units in the last place; what Triton's own functions
lack for that is in :mod:`gemsmode.ops.maths`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops import maths
from gemsmode.ops.pointwise import ALWAYS_BOOL, INT_TO_FLOAT, Operand, as_operand, build, like_input, pointwise
from gemsmode.ops.promotion import ALL, BOOL, FLOAT, INT, NUMERIC, opmath
from gemsmode.plan import Arg, Decline, Plan
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call

_WIDE_FLOAT = (torch.float32, torch.float64)

# -- signs and rounding ------------------------------------------------------------------------------------------------


@pointwise("aten.abs.default", name="abs")
@triton.jit
def absolute(self):
    if self.dtype == tl.int1:
        return self
    else:
        return tl.abs(self)


@pointwise("aten.neg.default", dtypes=NUMERIC)
@triton.jit
def neg(self):
    if self.dtype.is_floating():
        return maths.negate(self)
    else:
        return 0 - self


# Of real numbers sgn is sign; both give 0 for NaN.
@pointwise("aten.sgn.default", name="sgn")
@pointwise("aten.sign.default")
@triton.jit
def sign(self):
    if self.dtype == tl.int1:
        return self
    else:
        return (self > 0).to(self.dtype) - (self < 0).to(self.dtype)


@pointwise("aten.signbit.default", kind=ALWAYS_BOOL)
@triton.jit
def signbit(self):
    if self.dtype == tl.float64:
        return self.to(tl.int64, bitcast=True) < 0
    elif self.dtype == tl.float32:
        return self.to(tl.int32, bitcast=True) < 0
    elif self.dtype == tl.int1:
        return self != self
    else:
        return self < 0


@pointwise("aten.angle.default", kind=INT_TO_FLOAT)
@triton.jit
def angle(self):
    return tl.where(self < 0, 3.141592653589793 + 0 * tl.where(self < 0, 0.0, self), tl.where(self == self, 0.0, self))


@pointwise("aten.floor.default", dtypes=NUMERIC)
@triton.jit
def floor(self):
    if self.dtype.is_floating():
        return maths.floor(self)
    else:
        return self


@pointwise("aten.ceil.default", dtypes=NUMERIC)
@triton.jit
def ceil(self):
    if self.dtype.is_floating():
        return maths.ceil(self)
    else:
        return self


@pointwise("aten.trunc.default", dtypes=NUMERIC)
@triton.jit
def trunc(self):
    if self.dtype.is_floating():
        return maths.trunc(self)
    else:
        return self


@pointwise("aten.frac.default", dtypes=FLOAT)
@triton.jit
def frac(self):
    return self - maths.trunc(self)


@pointwise("aten.round.default", dtypes=NUMERIC, name="round")
@triton.jit
def round_half_to_even(self):
    if self.dtype.is_floating():
        return maths.round_even(self)
    else:
        return self


def _exact_power_of_ten(call: Call, common: torch.dtype) -> None:
    limit = 22 if common == torch.float64 else 10
    if abs(call["decimals"]) > limit:
        raise Decline(f"decimals={call['decimals']}: 10**decimals is not exact in the dtype that is computed in beyond {limit}")


@pointwise("aten.round.decimals", dtypes=FLOAT, check=_exact_power_of_ten)
@triton.jit
def round_decimals(self, decimals):
    n = tl.abs(decimals)
    power = decimals * 0 + 1
    for i in tl.static_range(22):
        power = tl.where(n > i, power * 10, power)
    power = tl.broadcast_to(power, self.shape)
    left = maths.round_even(maths.divide(self, power)) * power
    right = maths.divide(maths.round_even(self * power), power)
    return tl.where(decimals < 0, left, tl.where(decimals == 0, maths.round_even(self), right))


@pointwise("aten.frexp.Tensor", dtypes=FLOAT, outputs=(None, torch.int32), out_stride=like_input)
@triton.jit
def frexp(self):
    """Mantissa in [0.5, 1) and exponent; zero, infinities and NaN have exponent 0."""
    if self.dtype == tl.float64:
        subnormal = tl.abs(self) < 2.2250738585072014e-308
        bits = tl.where(subnormal, self * 18014398509481984.0, self).to(tl.int64, bitcast=True)
        exponent = (((bits >> 52) & 0x7FF) - tl.where(subnormal, 1076, 1022)).to(tl.int32)
        mantissa = ((bits & -0x7FF0000000000001) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    else:
        subnormal = tl.abs(self) < 1.1754943508222875e-38
        bits = tl.where(subnormal, self * 33554432.0, self).to(tl.int32, bitcast=True)
        exponent = ((bits >> 23) & 0xFF) - tl.where(subnormal, 151, 126)
        mantissa = ((bits & -0x7F800001) | 0x3F000000).to(tl.float32, bitcast=True)
    special = (self == 0) | (self != self) | (tl.abs(self) == float("inf"))
    return tl.where(special, self, mantissa), tl.where(special, 0, exponent)


# -- tests of values ---------------------------------------------------------------------------------------------------


@pointwise("aten.isnan.default", kind=ALWAYS_BOOL)
@triton.jit
def isnan(self):
    return self != self


@pointwise("aten.isinf.default", kind=ALWAYS_BOOL)
@triton.jit
def isinf(self):
    if self.dtype.is_floating():
        return tl.abs(self) == float("inf")
    else:
        return self != self


# Composite: arrives whole under torch.inference_mode() only, and saves three kernels there.
@pointwise("aten.isfinite.default", kind=ALWAYS_BOOL)
@triton.jit
def isfinite(self):
    if self.dtype.is_floating():
        return tl.abs(self) < float("inf")
    else:
        return self == self


@pointwise("aten.isposinf.default", kind=ALWAYS_BOOL)
@triton.jit
def isposinf(self):
    if self.dtype.is_floating():
        return self == float("inf")
    else:
        return self != self


@pointwise("aten.isneginf.default", kind=ALWAYS_BOOL)
@triton.jit
def isneginf(self):
    if self.dtype.is_floating():
        return self == float("-inf")
    else:
        return self != self


@pointwise("aten.logical_not.default", kind=ALWAYS_BOOL)
@triton.jit
def logical_not(self):
    return self == 0


@pointwise("aten.bitwise_not.default", dtypes=INT + BOOL)
@triton.jit
def bitwise_not(self):
    if self.dtype == tl.int1:
        return self == 0
    elif self.dtype == tl.uint8:  # the interpreter has no -1 of it
        return self ^ 0xFF
    else:
        return ~self


@triton.jit
def _same(self):
    return self


@triton.jit
def _replace_non_finite(self, nan, posinf, neginf):
    y = tl.where(self == float("inf"), posinf, tl.where(self == float("-inf"), neginf, self))
    return tl.where(self != self, nan, y)


@triton.jit
def _float64_max(like):
    return tl.full(like.shape, 0x7FEFFFFFFFFFFFFF, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _replace_non_finite_64(self, nan):
    return _replace_non_finite(self, nan, _float64_max(self), -_float64_max(self))


@triton.jit
def _replace_non_finite_64_with_posinf(self, nan, posinf):
    return _replace_non_finite(self, nan, posinf, -_float64_max(self))


@triton.jit
def _replace_non_finite_64_with_neginf(self, nan, neginf):
    return _replace_non_finite(self, nan, _float64_max(self), neginf)


@planned("aten.nan_to_num.default", dtype(*ALL), family="pointwise", kernel=_replace_non_finite, writes_out=True)
def nan_to_num(call: Call) -> Plan:
    """Replacements that are not given are 0 and the dtype's largest finite numbers."""
    meta, _, posinf, neginf = call.args
    common = meta.dtype
    if not common.is_floating_point:
        return build(call, _same, [as_operand(call, 0, common)], [common], out_stride=like_input(call))
    compute = opmath(common)
    limit = torch.finfo(common).max

    def operand(index: int, default: float) -> Operand:
        if call.args[index] is not None:
            return as_operand(call, index, common)
        return Operand(default, None, compute, compute)  # type: ignore[arg-type]  # a number that the plan knows

    operands = [Operand(Arg(0), meta, common, compute), operand(1, 0.0), operand(2, limit), operand(3, -limit)]
    function = _replace_non_finite
    if common == torch.float64:  # whose limits do not fit the float32 that plans pass
        if posinf is None:
            function = _replace_non_finite_64 if neginf is None else _replace_non_finite_64_with_neginf
        elif neginf is None:
            function = _replace_non_finite_64_with_posinf
        operands = [o for o, given in zip(operands, (True, True, posinf is not None, neginf is not None)) if given]
    return build(call, function, operands, [common], out_stride=like_input(call))


# -- powers and roots --------------------------------------------------------------------------------------------------


@pointwise("aten.reciprocal.default", kind=INT_TO_FLOAT)
@triton.jit
def reciprocal(self):
    return maths.divide(1.0, self)


@pointwise("aten.sqrt.default", kind=INT_TO_FLOAT)
@triton.jit
def sqrt(self):
    return maths.sqrt(self)


@pointwise("aten.rsqrt.default", kind=INT_TO_FLOAT)
@triton.jit
def rsqrt(self):
    return maths.rsqrt(self)


# -- exponentials and logarithms ---------------------------------------------------------------------------------------


@pointwise("aten.exp.default", kind=INT_TO_FLOAT)
@triton.jit
def exp(self):
    return maths.exp(self)


@pointwise("aten.exp2.default", kind=INT_TO_FLOAT)
@triton.jit
def exp2(self):
    return maths.exp2(self)


@pointwise("aten.expm1.default", kind=INT_TO_FLOAT)
@triton.jit
def expm1(self):
    return maths.expm1(self)


@pointwise("aten.log.default", kind=INT_TO_FLOAT)
@triton.jit
def log(self):
    return tl.log(self)


@pointwise("aten.log2.default", kind=INT_TO_FLOAT)
@triton.jit
def log2(self):
    return tl.log2(self)


@pointwise("aten.log10.default", kind=INT_TO_FLOAT)
@triton.jit
def log10(self):
    return tl.log(self) * 0.43429448190325182765


@triton.jit
def _log1p(self):
    return maths.log1p(self)


@triton.jit
def _fast_log1p(self):
    return maths.fast_log1p(self)


def _log1p_by_width(call: Call) -> Any:
    return _fast_log1p if call.args[0].dtype in (torch.float16, torch.bfloat16) else _log1p


@pointwise("aten.log1p.default", kind=INT_TO_FLOAT, select=_log1p_by_width)
@triton.jit
def log1p(self):
    return maths.log1p(self)


@triton.jit
def _logit(self):
    return tl.log(maths.divide(self, 1 - self))


@triton.jit
def _logit_clamped(self, eps):
    high = 1 - eps
    inner = tl.where(self < eps, eps, tl.where(self > high, high, self))
    return _logit(tl.where(eps < 0, self, inner))


def _by_eps(call: Call) -> Any:
    return _logit if call["eps"] is None else _logit_clamped


@pointwise("aten.logit.default", kind=INT_TO_FLOAT, select=_by_eps)
@triton.jit
def logit(self, eps):
    return _logit_clamped(self, eps)


@pointwise("aten.special_entr.default", kind=INT_TO_FLOAT)
@triton.jit
def special_entr(self):
    y = tl.where(self > 0, maths.negate(self) * tl.log(self), float("-inf"))
    return tl.where(self == 0, 0.0, tl.where(self == self, y, self))


# -- trigonometric and hyperbolic functions ----------------------------------------------------------------------------


@pointwise("aten.sin.default", kind=INT_TO_FLOAT)
@triton.jit
def sin(self):
    return tl.sin(self)


@pointwise("aten.cos.default", kind=INT_TO_FLOAT)
@triton.jit
def cos(self):
    return tl.cos(self)


@pointwise("aten.tan.default", kind=INT_TO_FLOAT)
@triton.jit
def tan(self):
    return maths.divide(tl.sin(self), tl.cos(self))


@pointwise("aten.asin.default", kind=INT_TO_FLOAT)
@triton.jit
def asin(self):
    return maths.asin(self)


@pointwise("aten.acos.default", kind=INT_TO_FLOAT)
@triton.jit
def acos(self):
    return maths.acos(self)


@pointwise("aten.atan.default", kind=INT_TO_FLOAT)
@triton.jit
def atan(self):
    return maths.atan(self)


@pointwise("aten.sinh.default", kind=INT_TO_FLOAT)
@triton.jit
def sinh(self):
    return maths.sinh(self)


@pointwise("aten.cosh.default", kind=INT_TO_FLOAT)
@triton.jit
def cosh(self):
    return maths.cosh(self)


@pointwise("aten.asinh.default", kind=INT_TO_FLOAT)
@triton.jit
def asinh(self):
    return maths.asinh(self)


@pointwise("aten.acosh.default", kind=INT_TO_FLOAT)
@triton.jit
def acosh(self):
    return maths.acosh(self)


@pointwise("aten.atanh.default", kind=INT_TO_FLOAT)
@triton.jit
def atanh(self):
    return maths.atanh(self)


@pointwise("aten.sinc.default", kind=INT_TO_FLOAT)
@triton.jit
def sinc(self):
    # Next to 0 it is 1, and a subnormal number would be flushed to 0.
    near = tl.abs(self) < 1e-20
    x = tl.where(near, 1.0, self)
    return tl.where(near, 1.0, maths.divide(maths.sin_pi(x), 3.141592653589793 * x))


@pointwise("aten.deg2rad.default", kind=INT_TO_FLOAT)
@triton.jit
def deg2rad(self):
    return self * 0.017453292519943295


@pointwise("aten.rad2deg.default", kind=INT_TO_FLOAT)
@triton.jit
def rad2deg(self):
    return self * 57.29577951308232


# -- special functions -------------------------------------------------------------------------------------------------


@pointwise("aten.erf.default", kind=INT_TO_FLOAT)
@triton.jit
def erf(self):
    return tl.erf(self)


@pointwise("aten.erfc.default", kind=INT_TO_FLOAT)
@triton.jit
def erfc(self):
    return maths.erfc(self)


@pointwise("aten.special_erfcx.default", kind=INT_TO_FLOAT, dtypes=(*_WIDE_FLOAT, *INT, *BOOL))
@triton.jit
def special_erfcx(self):
    return maths.erfcx(self)


@pointwise("aten.erfinv.default", kind=INT_TO_FLOAT)
@triton.jit
def erfinv(self):
    return maths.erfinv(self)


@pointwise("aten.special_log_ndtr.default", kind=INT_TO_FLOAT, dtypes=(*_WIDE_FLOAT, *INT, *BOOL))
@triton.jit
def special_log_ndtr(self):
    """The logarithm of the normal distribution function."""
    t = self * 0.70710678118654752440
    tail = tl.log(0.5 * maths.erfcx_positive(tl.where(t < 0, maths.negate(t), 0.0))) - t * t
    return tl.where(self < -1, tail, maths.log1p(-0.5 * maths.erfc(tl.where(self < -1, 0.0, t))))


@pointwise("aten.i0.default", kind=INT_TO_FLOAT)
@triton.jit
def i0(self):
    return maths.bessel_i(self, 0)


@pointwise("aten.special_i0e.default", kind=INT_TO_FLOAT)
@triton.jit
def special_i0e(self):
    return maths.bessel_ie(self, 0)


@pointwise("aten.special_i1.default", kind=INT_TO_FLOAT)
@triton.jit
def special_i1(self):
    return maths.bessel_i(self, 1)


@pointwise("aten.special_i1e.default", kind=INT_TO_FLOAT)
@triton.jit
def special_i1e(self):
    return maths.bessel_ie(self, 1)


@pointwise("aten.lgamma.default", kind=INT_TO_FLOAT)
@triton.jit
def lgamma(self):
    return maths.lgamma(self)


@pointwise("aten.digamma.default", kind=INT_TO_FLOAT)
@triton.jit
def digamma(self):
    return maths.digamma(self)
