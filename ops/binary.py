"""Arithmetic, comparison, logical and bitwise ops of two operands.

Formulas and special cases are those of PyTorch's documentation of each function. Integers wrap around; division and
shifts of integers are written over magnitudes, because ``//``, ``%`` and ``>>`` of negative numbers mean other things to
the compiler than to the interpreter. The result of an integer division by zero, which PyTorch leaves open on GPUs, is
all ones (a quotient) or 0 (a remainder).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from gemsmode.ops import maths
from gemsmode.ops.layout import output_strides
from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import ALWAYS_BOOL, INT_TO_FLOAT, as_operand, build, pointwise
from gemsmode.ops.promotion import BOOL, FLOAT, INT, NUMERIC, opmath, result_type
from gemsmode.plan import Decline, Plan, contiguous_strides
from gemsmode.predicates import dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target, current

INTERPRETED = tl.constexpr(current().interpreted)

# -- what PyTorch rejects ----------------------------------------------------------------------------------------------


def require_fits(value: Any, dtype: torch.dtype) -> None:
    """Decline a Python number that PyTorch refuses to convert to ``dtype`` (it then raises its own error).

    Infinities and NaN fit floating-point dtypes, negative numbers wrap in unsigned ones, everything fits bool.
    """
    if isinstance(value, complex):
        raise Decline("a complex number")
    if dtype == torch.bool or value is None:
        return
    if dtype.is_floating_point:
        fits = value != value or abs(value) == float("inf") or abs(value) <= torch.finfo(dtype).max
    elif dtype.is_complex:
        raise Decline("complex is not handled yet")
    else:
        limits = torch.iinfo(dtype)
        low = -limits.max if limits.min == 0 else limits.min
        fits = value == value and (isinstance(value, int) or limits.min <= value) and low <= value <= limits.max
    if not fits:
        raise Decline(f"PyTorch rejects it: {value} cannot be converted to {dtype_name(dtype)} without overflow")


def require_tensors(call: Call, common: torch.dtype) -> None:
    """Decline numbers, where a rule of their own looks at their value."""
    if any(a is not None and a.__class__ is not TensorMeta for a in call.args):
        raise Decline("a number in the place of a tensor")


def check_alpha(call: Call, common: torch.dtype) -> None:
    """Decline the types of ``alpha`` that PyTorch rejects."""
    alpha = call["alpha"]
    if isinstance(alpha, bool) and common != torch.bool:
        raise Decline("PyTorch rejects it: boolean alpha is for boolean results")
    if isinstance(alpha, complex) or (isinstance(alpha, float) and not common.is_floating_point):
        raise Decline("PyTorch rejects it: alpha does not suit the dtype of the result")


def _check_subtraction(call: Call, common: torch.dtype) -> None:
    for operand in call.args[:2]:
        if operand.__class__ is bool or (operand.__class__ is TensorMeta and operand.dtype == torch.bool):
            raise Decline("PyTorch rejects it: subtraction of bools")
    check_alpha(call, common)


# -- sums and products -------------------------------------------------------------------------------------------------


@pointwise("aten.add.Tensor", ranged={"alpha": 1}, check=check_alpha)
@triton.jit
def add(self, other, alpha):
    if self.dtype == tl.int1:
        return self | (other & alpha)
    else:
        return self + other * alpha


@pointwise("aten.sub.Tensor", dtypes=NUMERIC, ranged={"alpha": -1}, check=_check_subtraction)
@triton.jit
def sub(self, other, alpha):
    return self - other * alpha


@pointwise("aten.rsub.Tensor", dtypes=NUMERIC, ranged={"alpha": -1}, check=_check_subtraction)
@triton.jit
def rsub(other, self, alpha):  # in this order, which decides on the strides of the result
    return other - self * alpha


@pointwise("aten.mul.Tensor")
@triton.jit
def mul(self, other):
    if self.dtype == tl.int1:
        return self & other
    else:
        return self * other


def _check_add_relu(call: Call, common: torch.dtype) -> None:
    check_alpha(call, common)
    if any(t.dtype != common for t in call.tensors):
        raise Decline("several dtypes")


@pointwise("aten._add_relu.Tensor", dtypes=(torch.float32, torch.float64, torch.int8, torch.int32, torch.int64), ranged={"alpha": 1},
           check=_check_add_relu)
@triton.jit
def add_relu(self, other, alpha):
    total = self + other * alpha
    if total.dtype == tl.float32:  # PyTorch clamps to the range of finite numbers
        total = tl.where(total > 3.4028234663852886e38, 3.4028234663852886e38, total)
    elif total.dtype == tl.float64:
        total = tl.where(total > 1.7976931348623157e308, 1.7976931348623157e308, total)
    return tl.where(total < 0, 0, total)


# -- division of integers ----------------------------------------------------------------------------------------------


@triton.jit
def magnitude(x):
    """abs(x) as an unsigned integer, in which that of the smallest number fits too."""
    if x.dtype == tl.uint8:
        return x.to(tl.uint32)
    elif x.dtype == tl.int64:
        return tl.where(x < 0, -x, x).to(tl.uint64)
    else:
        wide = x.to(tl.int32)
        return tl.where(wide < 0, -wide, wide).to(tl.uint32)


@triton.jit
def int_trunc(a, b):
    d = magnitude(b)
    zero = d == 0
    q = (magnitude(a) // (d + zero.to(d.dtype))).to(a.dtype)
    if a.dtype != tl.uint8:
        q = tl.where((a < 0) != (b < 0), -q, q)
    return q | (-zero.to(a.dtype))


@triton.jit
def int_floor(a, b):
    if a.dtype == tl.uint8:
        return int_trunc(a, b)
    else:
        d = magnitude(b)
        zero = d == 0
        d = d + zero.to(d.dtype)
        n = magnitude(a)
        q = n // d
        below = ((a < 0) != (b < 0)) & (n - q * d != 0)
        q = q.to(a.dtype)
        q = tl.where((a < 0) != (b < 0), -q, q) - below.to(a.dtype)
        return q | (-zero.to(a.dtype))


@triton.jit
def int_fmod(a, b):
    d = magnitude(b)
    r = (magnitude(a) % (d + (d == 0).to(d.dtype))).to(a.dtype)
    if a.dtype == tl.uint8:
        return r
    else:
        return tl.where(a < 0, -r, r)


@triton.jit
def int_remainder(a, b):
    r = int_fmod(a, b)
    if a.dtype == tl.uint8:
        return r
    else:
        return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


# -- division of floats ------------------------------------------------------------------------------------------------


@triton.jit
def float_fmod(x, y):
    """x - trunc(x / y) * y, exactly: long division of the mantissas, as many bits a step as 64-bit integers hold."""
    if x.dtype == tl.float64:
        BITS: tl.constexpr = 52
        BIAS: tl.constexpr = 1075
        i_x = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        i_y = y.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        BITS: tl.constexpr = 23
        BIAS: tl.constexpr = 150
        i_x = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
        i_y = (y.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    STEP: tl.constexpr = 62 - BITS
    e_x = i_x >> BITS
    e_y = i_y >> BITS
    HIDDEN: tl.constexpr = 1 << BITS
    n = (i_x & (HIDDEN - 1)) + tl.where(e_x > 0, HIDDEN, 0)
    d = (i_y & (HIDDEN - 1)) + tl.where(e_y > 0, HIDDEN, 0)
    e_x = tl.where(e_x > 0, e_x, 1)
    e_y = tl.where(e_y > 0, e_y, 1)
    inf = float("inf")
    defined = (tl.abs(x) < inf) & (y != 0) & (y == y)
    smaller = tl.abs(x) < tl.abs(y)
    d = tl.where(d > 0, d, 1)
    r = n % d
    left = tl.where(defined & (e_x > e_y), e_x - e_y, 0)
    while tl.max(left) > 0:
        step = tl.where(left > STEP, STEP, left)
        r = (r << step) % d
        left = left - step
    scale = (e_y - BIAS).to(tl.int32)
    half = scale >> 1
    result = r.to(x.dtype) * maths.power_of_two(half, x) * maths.power_of_two(scale - half, x)
    return tl.where(defined, tl.where(smaller, x, maths.copysign(result, x)), float("nan"))


@triton.jit
def float_floor(a, b):
    """floor(a / b) of the exact quotient, which the rounded one may exceed."""
    mod = float_fmod(a, b)
    q = maths.divide(a - mod, b)
    q = tl.where((mod != 0) & ((b < 0) != (mod < 0)), q - 1, q)
    whole = maths.floor(q)
    whole = tl.where(q - whole > 0.5, whole + 1, whole)
    rounded = maths.divide(a, b)
    whole = tl.where(q != 0, whole, maths.copysign(tl.zeros_like(rounded), rounded))
    return tl.where(b == 0, rounded, whole)


@pointwise("aten.div.Tensor", kind=INT_TO_FLOAT)
@triton.jit
def div(self, other):
    return maths.divide(self, other)


@triton.jit
def div_trunc(self, other):
    if self.dtype.is_floating():
        return maths.trunc(maths.divide(self, other))
    else:
        return int_trunc(self, other)


@triton.jit
def _div_trunc_half(self, other):
    return maths.trunc(maths.divide(self, other).to(tl.float16).to(tl.float32))


@triton.jit
def _div_trunc_bfloat(self, other):
    return maths.trunc(maths.divide(self, other).to(tl.bfloat16).to(tl.float32))


_TRUNC = {torch.float16: _div_trunc_half, torch.bfloat16: _div_trunc_bfloat}
"""PyTorch rounds the quotient of two 16-bit tensors before it cuts it off, and that of a tensor and a number after."""


@pointwise("aten.floor_divide.default", dtypes=NUMERIC)
@triton.jit
def floor_divide(self, other):
    if self.dtype.is_floating():
        return float_floor(self, other)
    else:
        return int_floor(self, other)


@planned("aten.div.Tensor_mode", family="pointwise", kernel=floor_divide, name="div_mode", numbers=True, writes_out=True,
         state=(torch.get_default_dtype,))
def div_mode(call: Call) -> Plan:
    """True division for ``rounding_mode=None``, else the quotient rounded towards zero or down."""
    mode = call.args[2]
    common = result_type(call.args[:2])
    if mode is None:
        function = div
        if not common.is_floating_point and not common.is_complex:
            common = torch.get_default_dtype()
    elif mode == "trunc":
        function = div_trunc if call.args[1].__class__ is not TensorMeta else _TRUNC.get(common, div_trunc)
    elif mode == "floor":
        function = floor_divide
    else:
        raise Decline(f"PyTorch rejects it: rounding_mode={mode!r}")
    if common not in NUMERIC:
        raise Decline(f"{dtype_name(common)} is not handled")
    return _binary(call, function, common)


def _binary(call: Call, function: Any, common: torch.dtype, indices: Sequence[int] = (0, 1)) -> Plan:
    operands = [as_operand(call, i, common) for i in indices]
    if all(o.meta is None for o in operands):
        raise Decline("no tensor on the mode's device")
    return build(call, function, operands, [common])


@pointwise("aten.fmod.Tensor", dtypes=NUMERIC, round_numbers=True)
@triton.jit
def fmod(self, other):
    if self.dtype.is_floating():
        return float_fmod(self, other)
    else:
        return int_fmod(self, other)


@pointwise("aten.remainder.Tensor", dtypes=NUMERIC, round_numbers=True)
@triton.jit
def remainder(self, other):
    if self.dtype.is_floating():
        mod = float_fmod(self, other)
        return tl.where((mod != 0) & ((other < 0) != (mod < 0)), mod + other, mod)
    else:
        return int_remainder(self, other)


@triton.jit
def _gcd(a, b):
    """Of unsigned integers; Euclid's algorithm."""
    while tl.max((b != 0).to(tl.int32)) > 0:
        zero = b == 0
        r = a % (b + zero.to(b.dtype))
        a = tl.where(zero, a, b)
        b = tl.where(zero, b, r)
    return a


@pointwise("aten.gcd.default", dtypes=INT)
@triton.jit
def gcd(self, other):
    return _gcd(magnitude(self), magnitude(other))


@pointwise("aten.lcm.default", dtypes=INT)
@triton.jit
def lcm(self, other):
    a = magnitude(self)
    b = magnitude(other)
    g = _gcd(a, b)
    product = a // (g + (g == 0).to(g.dtype)) * b
    if self.dtype == tl.int64:
        return tl.abs(product.to(tl.int64))
    else:
        return tl.abs(product.to(tl.int32))


# -- powers ------------------------------------------------------------------------------------------------------------


@triton.jit
def int_pow(a, n):
    """By squaring. A negative exponent leaves what truncation does of a fraction: 0, unless a is 1 or -1."""
    a = a + tl.zeros_like(n)
    n = n + tl.zeros_like(a)
    one = tl.zeros_like(a) + 1
    result = one
    power = a
    left = tl.where(n > 0, n, 0).to(n.dtype)
    while tl.max(left.to(tl.int64)) > 0:
        result = tl.where((left & 1) != 0, result * power, result).to(a.dtype)
        power = (power * power).to(a.dtype)
        left = (left >> 1).to(n.dtype)
    if a.dtype != tl.uint8:
        sign = tl.where((a == -1) & ((n & 1) != 0), -one, one)
        result = tl.where(n < 0, tl.where((a == 1) | (a == -1), sign, 0), result)
    return result


@triton.jit
def _float_pow(x, y, power):
    """x**y from power = abs(x)**y: the sign, and what IEEE 754 says of special operands."""
    inf = float("inf")
    a = tl.abs(x)
    whole = (tl.floor(y) == y) & (y == y)
    odd = whole & (tl.floor(y * 0.5) * 2 != y)
    power = tl.where((a == 1) & (tl.abs(y) == inf), 1.0, power)
    power = tl.where(odd, maths.copysign(power, x), power)
    power = tl.where((x < 0) & (a < inf) & (y == y) & (whole == 0), float("nan"), power)
    return tl.where((y == 0) | (x == 1), 1.0, power)


@triton.jit
def _pow_fast(self, exponent):
    """For results of 16 bits."""
    return _float_pow(self, exponent, tl.exp2(exponent * tl.log2(tl.abs(self))))


@triton.jit
def _positive_pow(x, y):
    """x**y of float64, x not negative: x = 2**e m, and y e is split into an exact part and a small one, because an error
    of the logarithm of the result is one of the result itself."""
    rough = y * tl.log2(x)
    small = x < 2.2250738585072014e-308
    bits = tl.where(small, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)
    e = (bits >> 52) - tl.where(small, 1077, 1023)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    upper = m > 1.4142135623730951
    m = tl.where(upper, m * 0.5, m)
    e = tl.where(upper, e + 1, e).to(tl.float64)
    defined = tl.abs(rough) < 1100
    y = tl.where(defined, y, 0.0)
    y_high = (y.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
    n = tl.floor(tl.where(defined, rough, 0.0) + 0.5)
    rest = (y_high * e - n) + ((y - y_high) * e + y * tl.log2(m))
    n = n.to(tl.int32)
    half = n >> 1
    power = tl.exp2(rest) * maths.power_of_two(half, m) * maths.power_of_two(n - half, m)
    return tl.where(defined, power, tl.exp2(rough))


# log2((1 + s) / (1 - s)) / s with z = s**2, for 1 / sqrt(2) <= (1 + s) / (1 - s) <= sqrt(2), to 45 bits
_LOG2 = tl.constexpr((
    0.28288502340748234, 0.31990680380701336, 0.41220922406110433, 0.5770779426603044, 0.9617966941122649, 2.885390081777851,
))
# 2**f for -1 / 2 <= f <= 1 / 2, to 28 bits
_EXP2 = tl.constexpr((
    0.0001546144469856913, 0.0013400428177615838, 0.009618056678524637, 0.05550327226670302, 0.24022650922288757, 0.6931472067028326,
    1.0,
))


@triton.jit
def _pow_32_by_64(x, y):
    """x**y of float32 within 0.6 ulp, what IEEE 754 says of special operands included: in float64, as y multiplies the error of
    the logarithm. As few instructions as may be, since it is they that limit it; conversions from and to float64 are slow ones."""
    infinity = float("inf")
    a = tl.abs(x)
    small = a < 1.1754943508222875e-38
    # a = 2**e m with 1 / sqrt(2) <= m < sqrt(2)
    bits = tl.where(small, a * 16777216.0, a).to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (bits >> 23).to(tl.float32) - tl.where(small, 24.0, 0.0)
    e = tl.where(a == 0, -infinity, tl.where(a < infinity, e, a))
    m = (bits & 0x7FFFFF) + 0x3F3504F3
    inverse = maths.fast_reciprocal(m.to(tl.float32, bitcast=True) + 1).to(tl.float64)
    m = ((m.to(tl.int64) << 29) + 0x3800000000000000).to(tl.float64, bitcast=True)
    inverse = inverse * (2 - (m + 1) * inverse)
    s = (m - 1) * inverse
    log2 = e.to(tl.float64) + s * maths.polynomial(s * s, _LOG2)
    # No larger exponent makes a difference; and no infinite one, of 1, a NaN.
    limit = 1099511627776.0
    w = tl.minimum(tl.maximum(y, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL).to(tl.float64)
    t = w * log2
    unit = 6755399441055744.0  # 1.5 * 2**52: a sum with it has no bits for a fraction, and the integer in the lowest
    rounded = t + unit
    n = rounded.to(tl.int64, bitcast=True).to(tl.int32)
    power = maths.polynomial(t - (rounded - unit), _EXP2)
    power = (power * maths.power_of_two(n, power)).to(tl.float32)
    power = tl.where(t >= 128, infinity, tl.where(t < -151, 0.0, power))
    rounded = w + unit
    whole = rounded - unit == w
    odd = tl.where(whole, rounded.to(tl.int64, bitcast=True).to(tl.int32) << 31, 0)
    power = (power.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & odd)).to(tl.float32, bitcast=True)
    power = tl.where((x < 0) & (a < infinity) & (whole == 0), float("nan"), power)
    return tl.where((y == 0) | (x == 1), 1.0, power)


@triton.jit
def _float_pow_32(x, y):
    """x**y of float32: the GPU library's own, to 5 ulp; the interpreter has none."""
    if INTERPRETED:
        return _pow_32_by_64(x, y)
    else:
        # The library takes its smallest numbers for others: those are scaled into the range of the normal ones first.
        small = tl.abs(x) < 1.1754943508222875e-38
        power = libdevice.pow(tl.where(small, x * 16777216.0, x), y)
        return tl.where(small, power * tl.exp2(-24 * y), power)


@triton.jit
def _pow(self, exponent):
    if self.dtype == tl.float64:
        return _float_pow(self, exponent, _positive_pow(tl.abs(self), exponent))
    elif self.dtype.is_floating():
        return _float_pow_32(self, exponent)
    else:
        return int_pow(self, exponent)


@triton.jit
def _pow_by_64(self, exponent):
    """For GPUs that are fast in float64."""
    if self.dtype == tl.float32:
        return _pow_32_by_64(self, exponent)
    else:
        return _pow(self, exponent)


def power_on(target: Target) -> Any:
    """The function for powers."""
    return _pow_by_64 if target.is_fast_in_float64 else _pow


@triton.jit
def _square(self):
    return self * self


@triton.jit
def _cube(self):
    return self * self * self


@triton.jit
def _sqrt(self):
    return maths.sqrt(self)


@triton.jit
def _rsqrt(self):
    return maths.divide(1.0, maths.sqrt(self))


@triton.jit
def _reciprocal(self):
    return maths.divide(1.0, self)


@triton.jit
def _reciprocal_square(self):
    return maths.divide(1.0, self * self)


_POWERS = {2.0: _square, 3.0: _cube, 0.5: _sqrt, -0.5: _rsqrt, -1.0: _reciprocal, -2.0: _reciprocal_square}
"""What takes the place of a power with a constant exponent; the first two serve integers as well."""


def _general_power(call: Call) -> Any:
    return _pow_fast if result_type(call.args[:2]) in (torch.float16, torch.bfloat16) else power_on(call.target)


def _constant_power(call: Call) -> Any:
    return _POWERS.get(call.args[1]) or _general_power(call)


def _check_power(call: Call, common: torch.dtype) -> None:
    require_tensors(call, common)
    check_measured("power", call.target, dtype=common)


def _check_exponent(call: Call, common: torch.dtype) -> None:
    exponent = call.args[1]
    require_fits(exponent, common)
    if not common.is_floating_point and exponent < 0:
        raise Decline("PyTorch rejects it: integers to negative integer powers")


def _base_strides(call: Call) -> tuple[int, ...]:
    """A constant exponent is no operand of PyTorch's ``TensorIterator``, unlike other numbers."""
    return output_strides(call.args[0].shape, [call.args[0]])


def _contiguous_exponent(call: Call) -> tuple[int, ...]:
    return contiguous_strides(call.args[1].shape)


@pointwise("aten.pow.Tensor_Scalar", dtypes=NUMERIC, promote=("self", "exponent"), by_value=("exponent",), select=_constant_power,
           check=_check_exponent, round_numbers=True, out_stride=_base_strides, name="pow_constant")
@pointwise("aten.pow.Scalar", dtypes=NUMERIC, promote=("self", "exponent"), select=_general_power, round_numbers=True,
           out_stride=_contiguous_exponent, name="pow_of_number")
@pointwise("aten.pow.Tensor_Tensor", dtypes=NUMERIC, select=_general_power, check=_check_power, round_numbers=True)
@triton.jit
def pow(self, exponent):
    return _pow(self, exponent)


# -- maths -------------------------------------------------------------------------------------------------------------


@triton.jit
def _fast_atan2(self, other):
    """For results of 16 bits."""
    return maths.atan2_by(self, other, maths.ATAN_UNIT_16)


@triton.jit
def _atan2_32(self, other):
    return maths.atan2_by(self, other, maths.ATAN_UNIT_32)


@triton.jit
def _atan2_64(self, other):
    y = tl.abs(self)
    x = tl.abs(other)
    inf = float("inf")
    q = maths.divide(y, x)
    q = tl.where((y == 0) & (x == 0), 0.0, tl.where((y == inf) & (x == inf), 1.0, q))
    angle = maths.atan(q)
    left = maths.copysign(tl.zeros_like(other) + 1, other) < 0  # -0 is to the left too
    return maths.copysign(tl.where(left, 3.141592653589793 - angle, angle), self)


def _atan2_by_width(call: Call) -> Any:
    common = result_type(call.args[:2])
    if common == torch.float64:
        return _atan2_64
    return _fast_atan2 if common in (torch.float16, torch.bfloat16) else _atan2_32


@pointwise("aten.atan2.default", kind=INT_TO_FLOAT, select=_atan2_by_width)
@triton.jit
def atan2(self, other):
    return _atan2_32(self, other)


@pointwise("aten.hypot.default", dtypes=FLOAT)
@triton.jit
def hypot(self, other):
    """The larger times sqrt(1 + ratio**2), which does not overflow before the result does."""
    a = tl.abs(self)
    b = tl.abs(other)
    inf = float("inf")
    large = tl.where(a > b, a, b)
    small = tl.where(a > b, b, a)
    ratio = maths.divide(small, tl.where(large == 0, 1.0, large))
    return tl.where((a == inf) | (b == inf), inf, large * maths.sqrt(1 + ratio * ratio))


@triton.jit
def _minus_distance(a, b):
    """-abs(a - b); 0 for equal infinities."""
    return tl.where(a == b, 0.0, -tl.abs(a - b))


@pointwise("aten.logaddexp.default", dtypes=FLOAT)
@triton.jit
def logaddexp(self, other):
    return maximum(self, other) + maths.log1p(maths.exp(_minus_distance(self, other)))


@pointwise("aten.logaddexp2.default", dtypes=FLOAT)
@triton.jit
def logaddexp2(self, other):
    return maximum(self, other) + maths.log1p(maths.exp2(_minus_distance(self, other))) * 1.4426950408889634


@pointwise("aten.xlogy.Tensor", kind=INT_TO_FLOAT, round_numbers=True)
@triton.jit
def xlogy(self, other):
    """self * log(other); 0 where self is 0, NaN where other is."""
    return tl.where(other != other, other, tl.where(self == 0, 0.0, self * tl.log(other)))


@pointwise("aten.special_xlog1py.default", kind=INT_TO_FLOAT, round_numbers=True)
@triton.jit
def xlog1py(self, other):
    return tl.where(other != other, other, tl.where(self == 0, 0.0, self * maths.log1p(other)))


@pointwise("aten.copysign.Tensor", kind=INT_TO_FLOAT, round_numbers=True)
@triton.jit
def copysign(self, other):
    return maths.copysign(self, other)


@triton.jit
def _step(x, y, INTEGER: tl.constexpr, below, same):
    """The neighbour of x towards y, by its bits: one more away from zero, one less towards it."""
    one = tl.full(x.shape, 1, INTEGER)
    bits = x.to(INTEGER, bitcast=True)
    from_zero = one | (y.to(INTEGER, bitcast=True) & ~tl.full(x.shape, (1 << (INTEGER.primitive_bitwidth - 1)) - 1, INTEGER))
    zero = (bits & tl.full(x.shape, (1 << (INTEGER.primitive_bitwidth - 1)) - 1, INTEGER)) == 0
    bits = tl.where(zero, from_zero, tl.where(below == (bits >= 0), bits + one, bits - one))
    return tl.where(same, y, bits.to(x.dtype, bitcast=True))


@pointwise("aten.nextafter.default", dtypes=FLOAT, compute="result")
@triton.jit
def nextafter(self, other):
    x, y = tl.broadcast(self, other)
    if x.dtype == tl.float64:
        result = _step(x, y, tl.int64, x < y, x == y)
        return tl.where((x != x) | (y != y), float("nan"), result)
    elif x.dtype == tl.float32:
        result = _step(x, y, tl.int32, x < y, x == y)
        return tl.where((x != x) | (y != y), float("nan"), result)
    else:
        u = x.to(tl.float32)
        v = y.to(tl.float32)
        result = _step(x, y, tl.int16, u < v, u == v)
        return tl.where((u != u) | (v != v), float("nan"), result.to(tl.float32))


def _check_one_dtype(call: Call, common: torch.dtype) -> None:
    if any(t.dtype != common for t in call.tensors):
        raise Decline("PyTorch rejects it: tensors of different dtypes")


@pointwise("aten.heaviside.default", check=_check_one_dtype)
@triton.jit
def heaviside(self, values):
    if self.dtype == tl.int1:
        return self | values
    else:
        return tl.where(self == 0, values, tl.where(self > 0, 1, 0).to(values.dtype))


# -- the larger and the smaller ----------------------------------------------------------------------------------------


@pointwise("aten.maximum.default")
@triton.jit
def maximum(self, other):
    if self.dtype.is_floating():
        return tl.maximum(self, other, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where(self > other, self, other)


@pointwise("aten.minimum.default")
@triton.jit
def minimum(self, other):
    if self.dtype.is_floating():
        return tl.minimum(self, other, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where(self < other, self, other)


@pointwise("aten.fmax.default")
@triton.jit
def fmax(self, other):
    return tl.where((self >= other) | (other != other), self, other)


@pointwise("aten.fmin.default")
@triton.jit
def fmin(self, other):
    return tl.where((self <= other) | (other != other), self, other)


# -- comparison --------------------------------------------------------------------------------------------------------
#
# A tensor of integers and a number are compared as int64: a number out of the dtype's range is larger or smaller than
# every element. PyTorch lets negative numbers wrap in unsigned dtypes first, as far as their magnitude fits.


def _compare_dtype(common: torch.dtype) -> torch.dtype:
    return opmath(common) if common.is_floating_point else torch.int64


@triton.jit
def _wrap(other):
    return tl.where((other < 0) & (other > -256), other + 256, other)


@triton.jit
def _eq_byte(self, other):
    return self == _wrap(other)


@triton.jit
def _ne_byte(self, other):
    return self != _wrap(other)


@triton.jit
def _lt_byte(self, other):
    return self < _wrap(other)


@triton.jit
def _le_byte(self, other):
    return self <= _wrap(other)


@triton.jit
def _gt_byte(self, other):
    return self > _wrap(other)


@triton.jit
def _ge_byte(self, other):
    return self >= _wrap(other)


def compare_number(op: str, for_bytes: Any) -> Any:
    """Declare the comparison of a tensor with a number; ``for_bytes`` serves uint8."""

    def decorate(function: Any) -> Any:
        def choose(call: Call) -> Any:
            return for_bytes if result_type(call.args) == torch.uint8 else function

        return pointwise(op, kind=ALWAYS_BOOL, promote=("self", "other"), compute=_compare_dtype, round_numbers=True, select=choose,
                         name=function.fn.__name__ + "_number")(function)

    return decorate


@compare_number("aten.eq.Scalar", _eq_byte)
@pointwise("aten.eq.Tensor", kind=ALWAYS_BOOL, round_numbers=True)
@triton.jit
def eq(self, other):
    return self == other


@compare_number("aten.ne.Scalar", _ne_byte)
@pointwise("aten.ne.Tensor", kind=ALWAYS_BOOL, round_numbers=True)
@triton.jit
def ne(self, other):
    return self != other


@compare_number("aten.lt.Scalar", _lt_byte)
@pointwise("aten.lt.Tensor", kind=ALWAYS_BOOL, round_numbers=True)
@triton.jit
def lt(self, other):
    return self < other


@compare_number("aten.le.Scalar", _le_byte)
@pointwise("aten.le.Tensor", kind=ALWAYS_BOOL, round_numbers=True)
@triton.jit
def le(self, other):
    return self <= other


@compare_number("aten.gt.Scalar", _gt_byte)
@pointwise("aten.gt.Tensor", kind=ALWAYS_BOOL, round_numbers=True)
@triton.jit
def gt(self, other):
    return self > other


@compare_number("aten.ge.Scalar", _ge_byte)
@pointwise("aten.ge.Tensor", kind=ALWAYS_BOOL, round_numbers=True)
@triton.jit
def ge(self, other):
    return self >= other


# -- logic and bits ----------------------------------------------------------------------------------------------------


@pointwise("aten.logical_and.default", kind=ALWAYS_BOOL)
@triton.jit
def logical_and(self, other):
    return self.to(tl.int1) & other.to(tl.int1)


@pointwise("aten.logical_or.default", kind=ALWAYS_BOOL)
@triton.jit
def logical_or(self, other):
    return self.to(tl.int1) | other.to(tl.int1)


@pointwise("aten.logical_xor.default", kind=ALWAYS_BOOL)
@triton.jit
def logical_xor(self, other):
    return self.to(tl.int1) ^ other.to(tl.int1)


@pointwise("aten.bitwise_and.Tensor", dtypes=INT + BOOL)
@triton.jit
def bitwise_and(self, other):
    return self & other


@pointwise("aten.bitwise_or.Tensor", dtypes=INT + BOOL)
@triton.jit
def bitwise_or(self, other):
    return self | other


@pointwise("aten.bitwise_xor.Tensor", dtypes=INT + BOOL)
@triton.jit
def bitwise_xor(self, other):
    return self ^ other


@pointwise("aten.__lshift__.Tensor", dtypes=INT, name="lshift")
@pointwise("aten.bitwise_left_shift.Tensor", dtypes=INT)
@triton.jit
def left_shift(self, other):
    """0 for shifts that are negative or as wide as the type."""
    sound = (other >= 0) & (other < self.dtype.primitive_bitwidth)
    return tl.where(sound, self << tl.where(sound, other, 0).to(self.dtype), 0)


@pointwise("aten.__rshift__.Tensor", dtypes=INT, name="rshift")
@pointwise("aten.bitwise_right_shift.Tensor", dtypes=INT)
@triton.jit
def right_shift(self, other):
    """Copies of the sign for shifts that are negative or as wide as the type."""
    WIDTH: tl.constexpr = self.dtype.primitive_bitwidth
    sound = (other >= 0) & (other < WIDTH)
    if self.dtype == tl.uint8:
        return tl.where(sound, self >> tl.where(sound, other, 0).to(self.dtype), 0)
    else:
        return self >> tl.where(sound, other, WIDTH - 1).to(self.dtype)
