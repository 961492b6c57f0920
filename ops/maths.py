"""Functions of loaded blocks: the maths that Triton's own functions lack, or have only approximately.

Every function takes float32 or float64 blocks, computes in that dtype and runs in the interpreter as well as compiled,
so none of them needs a GPU's library of maths. Errors are a few units in the last place (``tests/test_unary_accuracy.py``
states them); NaN, infinities and the sign of zero come out as in PyTorch.

What Triton compiles for float32 on NVIDIA GPUs, and hence what is used here for what:

* ``tl.log``, ``tl.log2``, ``tl.sin``, ``tl.cos``, ``tl.erf``: accurate library code;
* ``tl.exp``: ``ex2.approx(x * log2(e))``, whose error grows with ``|x|`` (40 ulp at 80): :func:`exp` splits the exponent
  off first; ``tl.exp`` itself is right for arguments near 0 and where 16 bits come out in the end;
* ``/``: ``div.full``, 2 ulp and 0 for divisors above 2**126: :func:`divide` rounds correctly;
* ``tl.sqrt``, ``tl.rsqrt``, ``tl.exp2``, ``tl.floor``: flush subnormal numbers to zero.

The polynomials were made for this file: Chebyshev interpolation in 45 digits of the function named above each, the
highest power first, once for either dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

# -- pieces ------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _count(values):
    return len(values)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """Horner's scheme; the highest power first."""
    y = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, _count(COEFFICIENTS)):
        y = y * x + COEFFICIENTS[i]
    return y


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; both of one dtype."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x); subnormal arguments included."""
    if x.dtype == tl.float64:
        return 1 / tl.sqrt(x)
    else:
        small = x < 1.1754943508222875e-38
        return tl.rsqrt(tl.where(small, x * 16777216.0, x)) * tl.where(small, 4096.0, 1.0)


@triton.jit
def fast_reciprocal(x):
    """1 / x of a positive normal float32 number to about 21 bits: two instructions, where ``1 / x`` takes five."""
    y = tl.rsqrt(x)
    return y * y


@triton.jit
def copysign(x, sign):
    """The magnitude of x with the sign of `sign`."""
    if x.dtype == tl.float64:
        bits = (x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) | (sign.to(tl.int64, bitcast=True) & -0x8000000000000000)
        return bits.to(tl.float64, bitcast=True)
    else:
        bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (sign.to(tl.int32, bitcast=True) & -0x80000000)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def negate(x):
    """-x with the sign of zero turned too, which 0 - x does not do."""
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) ^ -0x8000000000000000).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) ^ -0x80000000).to(tl.float32, bitcast=True)


@triton.jit
def clip(x, low, high):
    """min(max(x, low), high); NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def power_of_two(n, x):
    """2**n in the dtype of x, for int32 n in the range of normal numbers."""
    if x.dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


# -- rounding ----------------------------------------------------------------------------------------------------------


@triton.jit
def floor(x):
    y = tl.floor(x)
    return tl.where(y > x, y - 1, y)  # negative subnormals


@triton.jit
def ceil(x):
    y = tl.ceil(x)
    return tl.where(y < x, y + 1, y)  # positive subnormals


@triton.jit
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    """To the nearest integer, halves to even: adding 2**23 (2**52) leaves no bits for a fraction."""
    a = tl.abs(x)
    if x.dtype == tl.float64:
        y = tl.where(a < 4503599627370496.0, (a + 4503599627370496.0) - 4503599627370496.0, a)
    else:
        y = tl.where(a < 8388608.0, (a + 8388608.0) - 8388608.0, a)
    return copysign(y, x)


# -- exponentials ------------------------------------------------------------------------------------------------------

# (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2
EXPM1_32 = tl.constexpr((
    0.0001989098087, 0.001393364103, 0.008333310934, 0.04166646501, 0.1666666668, 0.5000000013,
))
EXPM1_64 = tl.constexpr((
    2.0914679376583935e-09, 2.510520637395701e-08, 2.7557273661348637e-07, 2.7557255425746435e-06, 2.4801587325533363e-05,
    0.00019841269874800493, 0.0013888888888883752, 0.008333333333326141, 0.04166666666666667, 0.1666666666666667, 0.5,
))

@triton.jit
def split_exponent(x):
    """n, r with x = n ln(2) + r, n an integer. The leading part of ln(2) is short, so that its product with n is exact."""
    if x.dtype == tl.float64:
        n = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
        r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    else:
        n = (x * 1.4426950408889634 + 12582912.0) - 12582912.0
        r = (x - n * 0.693359375) - n * -2.12194440054690583e-4
    return n, r


@triton.jit
def exp(x):
    """e**x; subnormal results included."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        n, r = split_exponent(clip(x, -110.0, 90.0))
        n = n.to(tl.int32)
        half = n >> 1
        return tl.exp(r) * power_of_two(half, x) * power_of_two(n - half, x)


@triton.jit
def exp2(x):
    """2**x; subnormal results included."""
    if x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        small = x < -125
        return tl.exp2(tl.where(small, x + 32, x)) * tl.where(small, 2.3283064365386963e-10, 1.0)


@triton.jit
def expm1(x):
    """e**x - 1 without cancellation."""
    if x.dtype == tl.float64:
        n, r = split_exponent(clip(x, -60.0, 710.0))
        p = polynomial(r, EXPM1_64)
    else:
        n, r = split_exponent(clip(x, -60.0, 89.0))
        p = polynomial(r, EXPM1_32)
    q = r + r * r * p
    s = power_of_two(n.to(tl.int32) - 1, x)  # half of it: 2**128 (2**1024) is not a number
    return tl.where(x == 0, x, 2 * (s * q + (s - 0.5)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x)"""
    return divide(1.0, 1 + exp(-x))


@triton.jit
def fast_sigmoid(x):
    """1 / (1 + e**-x) to about 20 bits relative to 1, for results of 16 bits."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    a = tl.abs(x)
    e = expm1(2 * tl.where(a > 22, 22.0, a))
    return copysign(divide(e, e + 2), x)


# Numerator and denominator of tanh(x) / x in x**2, for |x| <= 5: least squares of the relative error
TANH_16 = tl.constexpr((0.001639449874, 0.1166590967, 1.0))
TANH_DENOMINATOR_16 = tl.constexpr((6.460166344e-5, 0.01831848723, 0.4499802307, 1.0))

@triton.jit
def fast_tanh(x):
    """tanh of float32 to about 18 bits, for results of 16 bits, which are 1 from 5 on."""
    x = tl.minimum(tl.maximum(x, -5.0, propagate_nan=tl.PropagateNan.ALL), 5.0, propagate_nan=tl.PropagateNan.ALL)
    z = x * x
    return x * (polynomial(z, TANH_16) * fast_reciprocal(polynomial(z, TANH_DENOMINATOR_16)))


@triton.jit
def sinh(x):
    a = tl.abs(x)
    e = expm1(a)
    h = exp(0.5 * a)
    large = a > 40  # by halves, since e**a overflows before sinh does
    e = tl.where(large, 1.0, e)
    return copysign(tl.where(large, (0.5 * h) * h, 0.5 * (e + divide(e, e + 1))), x)


@triton.jit
def cosh(x):
    a = tl.abs(x)
    h = exp(0.5 * a)
    large = a > 40
    e = exp(tl.where(large, 1.0, a))
    return tl.where(large, (0.5 * h) * h, 0.5 * e + divide(0.5, e))


# -- logarithms --------------------------------------------------------------------------------------------------------


# (log(1 + f) - f) / f**2 for -1 / 4 <= f <= 1 / 2
LOG1P_16 = tl.constexpr((
    0.08806337466, -0.1696003114, 0.2053424621, -0.2502906166, 0.3332298697, -0.4999969959,
))
LOG1P_32 = tl.constexpr((
    -0.04738242484, 0.1062562921, -0.1312287691, 0.1443845675, -0.1664764409, 0.1999359251, -0.2500015388, 0.3333339545, -0.499999998,
))
# log(1 + z) / z for 0 <= z <= 1
LOG1P_UNIT_16 = tl.constexpr((
    -0.0234436558, 0.1001397327, -0.209079536, 0.3248495807, -0.4993146523, 0.999990592,
))
LOG1P_UNIT_32 = tl.constexpr((
    -0.003176057018, 0.01954252726, -0.05637361283, 0.105436238, -0.1526966707, 0.1966327426, -0.2495161626, 0.333297105,
    -0.4999989265, 0.9999999947,
))

@triton.jit
def log1p_by(x, COEFFICIENTS: tl.constexpr):
    """log(1 + x) of float32: 1 + x = 2**n (1 + f) with f = x 2**-n + (2**-n - 1), where only the sum rounds."""
    e = ((1 + x).to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000  # n << 23; it is 0 next to 0, where f = x
    f = (x.to(tl.int32, bitcast=True) - e).to(tl.float32, bitcast=True)
    f += 0.25 * (0x40800000 - e).to(tl.float32, bitcast=True) - 1
    y = e.to(tl.float32) * 8.262958405176314e-8 + (f + f * f * polynomial(f, COEFFICIENTS))  # ln(2) 2**-23
    y = tl.where(x > -1, y, tl.where(x == -1, float("-inf"), float("nan")))
    return tl.where((x == 0) | (x == float("inf")), x, y)


@triton.jit
def log1p(x):
    """log(1 + x)"""
    if x.dtype == tl.float64:  # the logarithm of the rounded sum, and what the rounding took away
        u = 1 + x
        lost = (x - (u - 1)) / u
        y = tl.log(u) + lost
        return tl.where(u == 1, x, tl.where((u == 0) | (u == float("inf")), tl.log(u), y))
    else:
        return log1p_by(x, LOG1P_32)


@triton.jit
def fast_log1p(x):
    """log(1 + x) of float32 to about 18 bits, for results of 16 bits."""
    return log1p_by(x, LOG1P_16)


@triton.jit
def log1p_exp_negative(x):
    """log(1 + e**-|x|), and e**-|x|."""
    z = exp(-tl.abs(x))
    if x.dtype == tl.float64:
        return log1p(z), z
    else:
        return z * polynomial(z, LOG1P_UNIT_32), z


@triton.jit
def fast_log1p_exp_negative(x):
    """log(1 + e**-|x|) of float32 to about 16 bits, and e**-|x|."""
    z = tl.exp(-tl.abs(x))
    return z * polynomial(z, LOG1P_UNIT_16), z


@triton.jit
def asinh(x):
    a = tl.abs(x)
    large = a > 1e8
    b = tl.where(large, 1.0, a)
    z = b * b
    y = log1p(b + divide(z, 1 + sqrt(z + 1)))
    return copysign(tl.where(large, tl.log(a) + 0.6931471805599453, y), x)


@triton.jit
def acosh(x):
    large = x > 1e8
    t = tl.where(large, 1.0, x - 1)
    y = log1p(t + sqrt(t * (t + 2)))
    return tl.where(x < 1, float("nan"), tl.where(large, tl.log(x) + 0.6931471805599453, y))


@triton.jit
def atanh(x):
    a = tl.abs(x)
    return copysign(0.5 * log1p(divide(2 * a, 1 - a)), x)


# -- inverse trigonometric functions -----------------------------------------------------------------------------------

# (atan(t) / t - 1) / z with z = t**2, for t <= tan(pi / 8)
ATAN_32 = tl.constexpr((
    -0.06451597259, 0.1074363163, -0.1426394636, 0.1999954022, -0.3333333176,
))
ATAN_64 = tl.constexpr((
    0.01628357235648259, -0.0345685906686069, 0.045515165635903104, -0.052304374642516874, 0.05878926715756726, -0.066664246872465,
    0.07692296363979952, -0.09090908753118594, 0.11111111105147764, -0.14285714285659748, 0.19999999999999804, -0.3333333333333333,
))
# (asin(t) / t - 1) / z with z = t**2, for t <= 1 / 2
ASIN_32 = tl.constexpr((
    0.0336908472, 0.01714923836, 0.03110066274, 0.04459940153, 0.07500094543, 0.1666666634,
))
ASIN_64 = tl.constexpr((
    0.030718768995191097, -0.024020544918554605, 0.022553563638202982, 0.000380853033290726, 0.00879500607648843, 0.008135829925501657,
    0.009792751320201996, 0.011549086612987425, 0.013965009932053607, 0.017352757477819787, 0.02237215927967998, 0.030381944441363808,
    0.0446428571428834, 0.07499999999999991, 0.16666666666666666,
))

@triton.jit
def atan(x):
    a = tl.abs(x)
    inverse = a > 1
    t = tl.where(inverse, divide(1.0, tl.where(inverse, a, 1.0)), a)
    upper = t > 0.41421356237309503
    t = tl.where(upper, divide(t - 1, t + 1), t)
    z = t * t
    if x.dtype == tl.float64:
        y = t + t * z * polynomial(z, ATAN_64)
    else:
        y = t + t * z * polynomial(z, ATAN_32)
    y = tl.where(upper, y + 0.7853981633974483, y)
    return copysign(tl.where(inverse, 1.5707963267948966 - y, y), x)


# (atan(t) / t - 1) / z with z = t**2, for t <= 1
ATAN_UNIT_16 = tl.constexpr((
    0.0105786698, -0.04486639147, 0.09229299577, -0.1389612574, 0.1996854976, -0.3333290167,
))
ATAN_UNIT_32 = tl.constexpr((
    0.001488691939, -0.009144629761, 0.02630500111, -0.04896051403, 0.0703191425, -0.08931826777, 0.1108826163, -0.1428400379,
    0.1999994932, -0.3333333308,
))

@triton.jit
def atan2_by(y, x, COEFFICIENTS: tl.constexpr):
    """atan2 of float32: the smaller magnitude by the larger one, and three reflections."""
    a = tl.abs(y)
    b = tl.abs(x)
    low = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    q = tl.where(low == high, tl.where(low == 0, 0.0, 1.0), low / high)  # 0 / 0 and inf / inf included
    z = q * q
    angle = q + q * z * polynomial(z, COEFFICIENTS)
    angle = tl.where(a > b, 1.5707963267948966 - angle, angle)
    left = x.to(tl.int32, bitcast=True) < 0  # -0 is to the left too
    return copysign(tl.where(left, 3.141592653589793 - angle, angle), y)


@triton.jit
def asin_small(t):
    """asin for 0 <= t <= 1 / 2"""
    z = t * t
    if t.dtype == tl.float64:
        return t + t * z * polynomial(z, ASIN_64)
    else:
        return t + t * z * polynomial(z, ASIN_32)


@triton.jit
def asin(x):
    a = tl.abs(x)
    upper = a > 0.5
    y = asin_small(tl.where(upper, sqrt(0.5 * (1 - a)), a))
    return copysign(tl.where(upper, 1.5707963267948966 - 2 * y, y), x)


@triton.jit
def acos(x):
    a = tl.abs(x)
    upper = a > 0.5
    y = asin_small(tl.where(upper, sqrt(0.5 * (1 - a)), a))
    if x.dtype == tl.float64:
        middle = 1.5707963267948966 - (copysign(y, x) - 6.123233995736766e-17)
        below = 3.141592653589793 - (2 * y - 1.2246467991473532e-16)
    else:
        middle = 1.57079637050628662 - (copysign(y, x) + 4.37113883e-8)
        below = 3.14159274101257324 - (2 * y + 8.74227766e-8)
    return tl.where(upper, tl.where(x < 0, below, 2 * y), middle)


# -- the error function ------------------------------------------------------------------------------------------------

# (1 + 2 x) exp(x**2) erfc(x) with t = (x - 4) / (x + 4), for -1 <= t <= 1
ERFCX_32 = tl.constexpr((
    0.0001166079966, -0.0002486322974, -0.0007163394719, 0.005082809154, -0.01622227456, 0.0371399169, -0.06632325954, 0.09374044379,
    -0.1010399508, 0.06809613205, 0.01537968365, -0.1396210843, 1.232995119,
))
ERFCX_64 = tl.constexpr((
    -2.764120233734578e-10, 9.297625263709659e-10, 3.2323973445082033e-09, -1.2338731403798444e-08, -2.0725802488181963e-08,
    1.0631817593818149e-07, 7.771943241086912e-08, -8.210647933297337e-07, 2.9173425573089733e-07, 5.70657829924074e-06,
    -1.1221135665965907e-05, -2.4397731143023292e-05, 0.00015062142608651945, -0.0001992571524726518, -0.0007577732435942576,
    0.005031970069102256, -0.01619773406293477, 0.037167515526338006, -0.06633036581186058, 0.09373283499911264, -0.10103906603631811,
    0.06809705425466839, 0.015379652102619974, -0.13962111684056228, 1.2329951186255526,
))
# exp(a**2 / 2) erfc(a / sqrt(2)) / 2 with t = 1 / (1 + 0.4 a), for a >= 0
NORMAL_TAIL_16 = tl.constexpr((
    0.05469452576, -0.2499617301, 0.3361734161, 0.0117602656, 0.1919157613, 0.1551803895, 0.0002372692833,
))
# log2(erfc(a / sqrt(2)) / 2) for 0 <= a <= 6.5, where its least absolute error is sought; beyond it falls on and on
LOG2_NORMAL_TAIL_16 = tl.constexpr((
    -1.75777698e-06, 5.993658803e-05, -0.000916362981, 0.008447385558, -0.05382450164, -0.4586157076, -1.151180166, -1.000003873,
))
# erfinv(x) / x, in w - 2.5 for w = -log(1 - x**2) <= 5, then in sqrt(w) - 3 up to 16, in sqrt(w) - 5 beyond
ERFINV_A_32 = tl.constexpr((
    -8.93192597e-9, 2.33359672e-8, 4.681313481e-7, -3.463985268e-6, -4.972419689e-6, 0.0002183493862, -0.001252726392, -0.004177392875,
    0.2466402791, 1.50140936,
))
ERFINV_B_32 = tl.constexpr((
    0.0001292417547, -0.0003199266729, -7.604790171e-5, 0.001497222509, -0.00358781577, 0.005682678522, -0.007639139034, 0.009445743821,
    1.001675066, 2.832976794,
))
ERFINV_C_32 = tl.constexpr((
    4.834088805e-6, -2.167873857e-5, 7.597560584e-5, -0.0002139636016, -0.0001387633321, 1.010300325, 4.849906405,
))

@triton.jit
def erfcx_positive(x):
    """exp(x**2) erfc(x) for x >= 0"""
    if x.dtype == tl.float64:
        p = polynomial(1 - divide(8.0, x + 4), ERFCX_64)
    else:
        p = polynomial(1 - divide(8.0, x + 4), ERFCX_32)
    return divide(p, 1 + 2 * x)


@triton.jit
def exp_square(x, SIGN: tl.constexpr):
    """exp(SIGN x**2): the square is taken apart into one that is exact and a small rest."""
    if x.dtype == tl.float64:
        h = (x.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
    else:
        h = (x.to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)
    return exp(SIGN * h * h) * tl.exp(SIGN * ((x - h) * (x + h)))


@triton.jit
def erfc(x):
    a = tl.abs(x)
    a = tl.where(a > 28, 28.0, a)
    y = exp_square(a, -1.0) * erfcx_positive(a)
    return tl.where(a < 0.5, 1 - tl.erf(x), tl.where(x < 0, 2 - y, y))


@triton.jit
def erfcx(x):
    """exp(x**2) erfc(x)"""
    a = tl.abs(x)
    y = erfcx_positive(a)
    b = tl.where((x < 0) & (a < 28), a, tl.where(x < 0, 28.0, 0.0))
    y = tl.where(x < 0, 2 * exp_square(b, 1.0) - y, y)
    return tl.where(a < 0.5, tl.exp(tl.where(a < 0.5, x * x, 0.0)) * (1 - tl.erf(x)), y)


@triton.jit
def erfinv(x):
    a = tl.abs(x)
    w = -tl.log((1 - a) * (1 + a))
    s = sqrt(w)
    p = tl.where(w <= 5, polynomial(w - 2.5, ERFINV_A_32),
                 tl.where(w <= 16, polynomial(s - 3, ERFINV_B_32), polynomial(s - 5, ERFINV_C_32)))
    y = p * a
    if x.dtype == tl.float64:
        # One step of Halley's method on erf(y) = a or, where that is exact, on erfc(y) = 1 - a.
        error = tl.where(a < 0.5, tl.erf(y) - a, (1 - a) - erfc(y))
        u = error * 0.8862269254527580 * exp_square(y, 1.0)
        y = y - u / (1 + y * u)
    return copysign(tl.where(a < 1, y, tl.where(a == 1, float("inf"), float("nan"))), x)


# -- Bessel functions --------------------------------------------------------------------------------------------------

# I0(x) and I1(x) / x in x**2 for x <= 8; sqrt(x) exp(-x) In(x) in 16 / x - 1 beyond
I0_32 = tl.constexpr((
    1.481667925e-19, 1.616619521e-17, 1.054368543e-14, 2.339176841e-12, 4.731728462e-10, 6.776729741e-8, 6.782369669e-6,
    0.0004340222585, 0.01562502273, 0.2499999635, 1.00000001,
))
I0_64 = tl.constexpr((
    5.396384706795462e-43, 4.049003585516793e-40, 5.4160930911965884e-37, 5.434698553934258e-34, 4.902653194701293e-31,
    3.842840540736517e-28, 2.597805810072757e-25, 1.4963342843679799e-22, 7.242258512143295e-20, 2.896903391381146e-17,
    9.38596699044486e-15, 2.402807549523021e-12, 4.709502797068029e-10, 6.78168402777777e-08, 6.781684027777778e-06,
    0.00043402777777777775, 0.015625, 0.25, 1.0,
))
I0_BIG_32 = tl.constexpr((
    3.363580224e-8, 1.091023294e-7, 3.038330909e-7, 1.475475636e-6, 1.114154219e-5, 0.0001362174078, 0.003360552031, 0.4021765094,
))
I0_BIG_64 = tl.constexpr((
    -2.4421972688131832e-11, 9.114760157514253e-11, 1.7698085539456536e-10, -6.494591114401118e-10, -6.327909921997027e-10,
    2.163681278413876e-09, 1.6084886155781772e-09, -4.5305710768621196e-09, -3.5862834111582305e-09, 6.522264862032271e-09,
    7.600254486433509e-09, -5.0175940345046716e-09, -1.3427511481900905e-08, -6.856484545962442e-09, 7.559364098665437e-09,
    2.156780676115673e-08, 3.932512321137824e-08, 8.872014585661555e-08, 2.9735992084667734e-07, 1.4838476780922646e-06,
    1.114303378845176e-05, 0.00013621607438951463, 0.0033605519836678913, 0.4021765094450081,
))
I1_32 = tl.constexpr((
    6.358902397e-21, 9.338660341e-19, 5.678116391e-16, 1.476321529e-13, 3.372802421e-11, 5.649427522e-9, 6.781957301e-7, 5.425325234e-5,
    0.002604167572, 0.06249999855, 0.5000000004,
))
I1_64 = tl.constexpr((
    1.3910891048358334e-44, 1.1418680293670395e-41, 1.588314322385468e-38, 1.6991125672551102e-35, 1.634131228017145e-32,
    1.3724500546744444e-29, 9.991556591787248e-27, 6.2347263768897656e-24, 3.2919356806661625e-21, 1.4484516958675592e-18,
    5.214426105767057e-16, 1.501754718452426e-13, 3.3639305693342465e-11, 5.6514033564814795e-09, 6.781684027777778e-07,
    5.425347222222222e-05, 0.0026041666666666665, 0.0625, 0.5,
))
I1_BIG_32 = tl.constexpr((
    -3.785602479e-8, -1.231841967e-7, -3.548195417e-7, -1.825006939e-6, -1.503704714e-5, -0.0002192373854, -0.009749577241,
    0.3893984591,
))
I1_BIG_64 = tl.constexpr((
    2.2421768596847442e-11, -9.491890392992048e-11, -1.6283264322621244e-10, 6.7727478454462e-10, 5.870664618471487e-10,
    -2.2624401109204446e-09, -1.5218214060680734e-09, 4.763780078020254e-09, 3.501765193290176e-09, -6.9444186339873875e-09,
    -7.687251308765992e-09, 5.5720183980930355e-09, 1.4051746928735543e-08, 6.84757829926934e-09, -8.432168972932417e-09,
    -2.3394122958362557e-08, -4.3128498031006734e-08, -1.0001075046243961e-07, -3.4838563464253135e-07, -1.8349102493990178e-06,
    -1.5038547198221758e-05, -0.00021923576383137776, -0.009749577193235765, 0.38939845902587233,
))

@triton.jit
def bessel_small(a, ORDER: tl.constexpr):
    """I0(a), or I1(a) / a, for 0 <= a <= 8"""
    z = a * a
    if ORDER == 0:
        return polynomial(z, I0_64) if a.dtype == tl.float64 else polynomial(z, I0_32)
    else:
        return a * (polynomial(z, I1_64) if a.dtype == tl.float64 else polynomial(z, I1_32))


@triton.jit
def bessel_large(a, ORDER: tl.constexpr):
    """exp(-a) In(a) for a >= 8"""
    t = divide(16.0, a) - 1
    if a.dtype == tl.float64:
        p = polynomial(t, I0_BIG_64) if ORDER == 0 else polynomial(t, I1_BIG_64)
    else:
        p = polynomial(t, I0_BIG_32) if ORDER == 0 else polynomial(t, I1_BIG_32)
    return divide(p, sqrt(a))


@triton.jit
def bessel_i(x, ORDER: tl.constexpr):
    """In(x), modified Bessel function of the first kind, of order 0 or 1."""
    a = tl.abs(x)
    near = a <= 8
    h = exp(0.5 * a)
    y = tl.where(near, bessel_small(tl.where(near, a, 0.0), ORDER), (h * bessel_large(tl.where(near, 8.0, a), ORDER)) * h)
    return y if ORDER == 0 else copysign(y, x)


@triton.jit
def bessel_ie(x, ORDER: tl.constexpr):
    """exp(-|x|) In(x)"""
    a = tl.abs(x)
    near = a <= 8
    b = tl.where(near, a, 0.0)
    y = tl.where(near, exp(-b) * bessel_small(b, ORDER), bessel_large(tl.where(near, 8.0, a), ORDER))
    return y if ORDER == 0 else copysign(y, x)


# -- the gamma function ------------------------------------------------------------------------------------------------

# lgamma(2 + e) / e for |e| <= 1 / 2
LGAMMA_32 = tl.constexpr((
    0.0001134728199, -0.0002538170957, 0.000506517143, -0.001185860034, 0.002890795322, -0.007386174156, 0.02058079947, -0.06735228147,
    0.3224670335, 0.422784335,
))
LGAMMA_64 = tl.constexpr((
    6.379047507619774e-08, -1.3412819758517287e-07, 2.0304806751615227e-07, -4.303558760359961e-07, 9.578663334114758e-07,
    -2.0449201467015115e-06, 4.374374916915131e-06, -9.438458716242811e-06, 2.050726741605779e-05, -4.4926351103833334e-05,
    9.945750909889392e-05, -0.00022315475074520367, 0.0005096695248853096, -0.0011927539120010226, 0.002890510330738737,
    -0.0073855510286681535, 0.02058080842778457, -0.06735230105319814, 0.3224670334241132, 0.42278433509846713,
))

@triton.jit
def sin_pi(x):
    """sin(pi x), 0 at every integer."""
    r = x - 2 * round_even(0.5 * x)
    return tl.sin(3.141592653589793 * tl.where(tl.abs(r) > 0.5, copysign(1 - tl.abs(r), r), r))


@triton.jit
def lgamma_upper(x):
    """log(gamma(x)) for x >= 1 / 2: brought to [1.5, 2.5] by steps of 1 below 8, Stirling's series from there."""
    near = x < 8
    y = tl.where(near, x, 2.0)
    one_below = y < 1.5
    above = y > 2.5
    product = tl.where(one_below, y, 1.0)
    for _ in tl.static_range(6):
        product = tl.where(y > 2.5, product * (y - 1), product)
        y = tl.where(y > 2.5, y - 1, y)
    e = tl.where(one_below, y - 1, y - 2)  # exact, so that the zeros at 1 and 2 keep their digits
    if x.dtype == tl.float64:
        p = e * polynomial(e, LGAMMA_64)
    else:
        p = e * polynomial(e, LGAMMA_32)
    log_product = tl.log(product)
    small = tl.where(above, p + log_product, p - log_product)
    b = tl.where(near, 8.0, x)
    u = divide(1.0, b)
    v = u * u
    series = -1.9175269175269175e-3 + v * (6.4102564102564103e-3 - v * 2.9550653594771242e-2)
    series = 8.3333333333333333e-2 + v * (-2.7777777777777778e-3 + v * (
        7.9365079365079365e-4 + v * (-5.9523809523809524e-4 + v * (8.4175084175084175e-4 + v * series))))
    large = (b - 0.5) * (tl.log(b) - 1) + (0.4189385332046727 + u * series)
    return tl.where(near, small, tl.where(x == float("inf"), x, large))


@triton.jit
def lgamma(x):
    """log|gamma(x)|"""
    a = tl.abs(x)
    y = lgamma_upper(tl.where(x < 0.5, 1 - tl.where(a == float("inf"), 0.0, x), x))
    s = tl.abs(sin_pi(tl.where(a < 4503599627370496.0, x, 0.0)))
    # pi x of a subnormal x has lost digits; lgamma(x) is -log|x| there.
    reflected = tl.where(a < 1e-20, -tl.log(a), tl.where(s == 0, float("inf"), 1.1447298858494002 - tl.log(s) - y))
    return tl.where(a == float("inf"), a, tl.where(x < 0.5, reflected, y))


@triton.jit
def digamma(x):
    """The derivative of log(gamma(x)): reflection below 0, steps of 1 up to 10, the asymptotic series from there."""
    negative = x < 0
    a = tl.where(negative, 1 - x, x)
    shift = tl.zeros_like(a)
    for _ in tl.static_range(10):
        below = a < 10
        shift = tl.where(below, shift - divide(1.0, tl.where(below, a, 1.0)), shift)
        a = tl.where(below, a + 1, a)
    u = divide(1.0, a)
    v = u * u
    series = 8.3333333333333333e-2 + v * (-8.3333333333333333e-3 + v * (3.9682539682539683e-3 + v * (
        -4.1666666666666667e-3 + v * (7.5757575757575758e-3 + v * (-2.1092796092796093e-2 + v * 8.3333333333333333e-2)))))
    y = (tl.log(a) - 0.5 * u) - v * series + shift
    r = x - round_even(x)
    angle = 3.141592653589793 * tl.where(negative, r, 0.25)
    y = tl.where(negative, y - divide(3.141592653589793 * tl.cos(angle), tl.sin(angle)), y)
    pole = negative & (r == 0)
    y = tl.where(pole | (x == float("-inf")), float("nan"), y)
    return tl.where(x == 0, copysign(tl.full(x.shape, float("inf"), x.dtype), negate(x)), y)
