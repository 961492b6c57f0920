"""Special functions: Bessel and Airy functions, orthogonal polynomials, the derivatives of log(gamma), incomplete gamma functions.

Each has the domain and the special values of PyTorch's function of its name. Float32 is computed in float32 and float64 in
float64 (16-bit floats, where PyTorch takes them, in float32); integers count as the default dtype.

Formulas are numbered as in the Digital Library of Mathematical Functions (https://dlmf.nist.gov). The polynomials were
made for this file, as those of :mod:`gemsmode.ops.maths`: Chebyshev interpolation in 45 digits of the function named
above each, the highest power first, once for either dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops import maths
from gemsmode.ops.binary import _pow as power
from gemsmode.ops.pointwise import INT_TO_FLOAT, pointwise
from gemsmode.ops.promotion import ALL, BOOL, INT, NUMERIC
from gemsmode.plan import Decline, contiguous_strides
from gemsmode.signature import Call

_WIDE_FLOAT = (torch.float32, torch.float64)
_DTYPES = (*_WIDE_FLOAT, *INT, *BOOL)


@triton.jit
def by_width(x, COEFFICIENTS_32: tl.constexpr, COEFFICIENTS_64: tl.constexpr):
    """The polynomial for the dtype of x."""
    if x.dtype == tl.float64:
        return maths.polynomial(x, COEFFICIENTS_64)
    else:
        return maths.polynomial(x, COEFFICIENTS_32)


# -- Bessel functions --------------------------------------------------------------------------------------------------

# With z = x**2 for x <= 5: J0(x) / ((z - a**2) (z - b**2)) by its first zeros a and b, J1(x) / x likewise, and
# Y0(x) - 2 / pi log(x) J0(x), (Y1(x) - 2 / pi (log(x) J1(x) - 1 / x)) / x; in z / 12.5 - 1
J0_32 = tl.constexpr((
    2.434954742e-08, -4.723428101e-07, 6.854915257e-06, -7.121619527e-05, 0.0004876827257, -0.001921087151, 0.00318735563,
))
J0_64 = tl.constexpr((
    -3.52449113008727e-16, 1.8688672744978886e-14, -8.404184719394778e-13, 3.163723989196272e-11, -9.781438946726354e-10,
    2.428622038025423e-08, -4.70629166457061e-07, 6.854954847199373e-06, -7.121705240575853e-05, 0.00048768271776558413,
    -0.0019210870437164043, 0.0031873556303932387,
))
J1_32 = tl.constexpr((
    1.303096444e-09, -2.819454999e-08, 4.625961682e-07, -5.515452908e-06, 4.421868842e-05, -0.0002093267273, 0.0004323698734,
))
J1_64 = tl.constexpr((
    -1.2377862900889621e-17, 7.050885612374614e-16, -3.425082917113122e-14, 1.4012939606655873e-12, -4.742877795752643e-11,
    1.3002918729585578e-09, -2.8111472529722005e-08, 4.625979215164964e-07, -5.515494459601969e-06, 4.42186880710148e-05,
    -0.00020932672214860176, 0.0004323698734106474,
))
Y0_32 = tl.constexpr((
    -7.009831718e-06, 0.0001306029034, -0.001802788373, 0.0176348527, -0.1115168294, 0.3885165365, -0.4705763646, -0.4326558326,
    0.4837248578,
))
Y0_64 = tl.constexpr((
    1.166603953074689e-13, -6.04993694723965e-12, 2.6539975248625817e-10, -9.7209552080454e-09, 2.9142206889637085e-07,
    -6.985504374077061e-06, 0.0001299462909208217, -0.0018028096665503853, 0.01763534538933876, -0.11151682184328655, 0.38851639956570944,
    -0.47057636552972876, -0.4326558222855125, 0.4837248578102995,
))
Y1_32 = tl.constexpr((
    -4.125291223e-07, 8.767537709e-06, -0.0001414173503, 0.001668777293, -0.0134334341, 0.06634696073, -0.1631202035, 0.09108650785,
    0.1397493903,
))
Y1_64 = tl.constexpr((
    -2.397782341669183e-13, 1.1462847037754036e-11, -4.6013010745475043e-10, 1.528888444673751e-08, -4.1137780795312436e-07,
    8.733098315276175e-06, -0.00014141835794484212, 0.0016688031328605528, -0.013433433740818165, 0.06634695354779145,
    -0.16312020358118715, 0.09108650838448443, 0.13974939033568806,
))
# For x >= 5 (10.18 (iii)): Jn = sqrt(2 / (pi x)) (P cos(c) - Q sin(c)) and Yn = sqrt(2 / (pi x)) (P sin(c) + Q cos(c)) with
# c = x - (2 n + 1) pi / 4; P and Q / w with w = 5 / x, in 2 w**2 - 1
P0_32 = tl.constexpr((
    3.15906047e-07, -2.527746847e-06, 3.491020498e-05, -0.001327475811, 0.9986347663,
))
P0_64 = tl.constexpr((
    -2.235391154912044e-12, 3.6143863492486003e-12, 3.415311542572876e-12, -3.743592980512026e-12, -1.3637307914439566e-11,
    2.4823644443773408e-11, -3.538662922896775e-11, 9.7250551457765e-11, -2.851794579729694e-10, 8.562292591841693e-10,
    -2.8705436149232575e-09, 1.1058301818592053e-08, -5.08643230838394e-08, 2.9759010201737064e-07, -2.459963321484891e-06,
    3.491730581077085e-05, -0.0013274931272004003, 0.9986347659091991,
))
Q0_32 = tl.constexpr((
    -2.038926359e-07, 1.298967456e-06, -1.267130385e-05, 0.0002628296554, -0.02472299305,
))
Q0_64 = tl.constexpr((
    -2.501615291395301e-12, 3.771949261203603e-12, 5.3707262196534954e-12, -6.490291074791086e-12, -1.3683158981502063e-11,
    2.081601403866406e-11, -1.3714117166072298e-11, 4.013333293888739e-11, -1.208587658169092e-10, 3.0870637809336323e-10,
    -8.578708630413884e-10, 2.658540550429232e-09, -9.279754837211533e-09, 3.774069895577806e-08, -1.8819749133923565e-07,
    1.2478226277673438e-06, -1.267743088547866e-05, 0.0002628427945821562, -0.02472299270522373,
))
P1_32 = tl.constexpr((
    -3.671748186e-07, 3.055672693e-06, -4.577486291e-05, 0.002241443541, 1.002290646,
))
P1_64 = tl.constexpr((
    2.368522528186767e-12, -3.837516448159508e-12, -3.5906738400843512e-12, 3.919356832784674e-12, 1.4551592853265448e-11,
    -2.6622329676450118e-11, 3.8451893184433864e-11, -1.0595089749231098e-10, 3.117737074105936e-10, -9.422147494996673e-10,
    3.1849577586739448e-09, -1.2402701962004368e-08, 5.7916678422140156e-08, -3.466719151341159e-07, 2.9786211051441743e-06,
    -4.5782806529390985e-05, 0.002241463213917191, 1.0022906462560661,
))
Q1_32 = tl.constexpr((
    2.334106417e-07, -1.531522271e-06, 1.578938717e-05, -0.0003729551519, 0.07460948702,
))
Q1_64 = tl.constexpr((
    2.641228616170863e-12, -3.989366461831646e-12, -5.647778324751311e-12, 6.823648986663079e-12, 1.4495069669122676e-11,
    -2.2138167297790813e-11, 1.492417659731609e-11, -4.353565372217167e-11, 1.3090041597593387e-10, -3.36053217134984e-10,
    9.394983413860598e-10, -2.932029064719341e-09, 1.0328489178678967e-08, -4.253359083631327e-08, 2.1597706285591964e-07,
    -1.4739855830598546e-06, 1.5796188356370898e-05, -0.000372969924368375, 0.07460948663481604,
))


@triton.jit
def _wave(x, ORDER: tl.constexpr):
    """P, Q, and sqrt(2) times cosine and sine of c, for x >= 5. The phase is not subtracted, which would round, but turned."""
    w = maths.divide(5.0, x)
    t = 2 * w * w - 1
    s = tl.sin(x)
    c = tl.cos(x)
    if ORDER == 0:
        return by_width(t, P0_32, P0_64), w * by_width(t, Q0_32, Q0_64), c + s, s - c
    else:
        return by_width(t, P1_32, P1_64), w * by_width(t, Q1_32, Q1_64), s - c, 0 - (s + c)


@triton.jit
def _j_small(x, ORDER: tl.constexpr):
    """J0(x) or J1(x) for 0 <= x <= 5. A zero's square is split, so that the difference has the digits that x has."""
    z = x * x
    t = z * 0.08 - 1
    if x.dtype == tl.float64:
        if ORDER == 0:
            return (z - 5.783185962946784) * (z - 30.4712623436620864) * maths.polynomial(t, J0_64)
        else:
            return x * ((z - 14.681970642123893) * (z - 49.2184563216946037) * maths.polynomial(t, J1_64))
    else:
        if ORDER == 0:
            return (z - 5.78318596294678452) * (z - 30.4712623436620864) * maths.polynomial(t, J0_32)
        else:
            return x * ((z - 14.6819706421238933) * (z - 49.2184563216946037) * maths.polynomial(t, J1_32))


@triton.jit
def bessel_j(x, ORDER: tl.constexpr):
    """Jn(x) of order 0 or 1."""
    a = tl.abs(x)
    near = a <= 5
    b = tl.where(near, 5.0, a)
    p, q, c, s = _wave(b, ORDER)
    far = maths.divide(0.5641895835477563 * (p * c - q * s), maths.sqrt(b))
    y = tl.where(near, _j_small(tl.where(near, a, 0.0), ORDER), far)
    return y if ORDER == 0 else tl.where(x < 0, maths.negate(y), y)


@triton.jit
def bessel_y(x, ORDER: tl.constexpr):
    """Yn(x) of order 0 or 1; minus infinity at 0, NaN below."""
    near = x <= 5
    b = tl.where(near, 5.0, x)
    p, q, c, s = _wave(b, ORDER)
    far = maths.divide(0.5641895835477563 * (p * s + q * c), maths.sqrt(b))
    a = tl.where(near & (x > 0), x, 1.0)
    t = a * a * 0.08 - 1
    log_j = tl.log(a) * _j_small(a, ORDER)
    if ORDER == 0:
        y = by_width(t, Y0_32, Y0_64) + 0.6366197723675814 * log_j
    else:
        y = a * by_width(t, Y1_32, Y1_64) + 0.6366197723675814 * (log_j - maths.divide(1.0, a))
    y = tl.where(near, y, far)
    return tl.where(x < 0, float("nan"), tl.where(x == 0, float("-inf"), y))


# K0(x) + log(x / 2) I0(x), (K1(x) - log(x / 2) I1(x) - 1 / x) / x for x <= 2 in x**2 / 2 - 1; exp(x) sqrt(x) Kn(x) beyond in 4 / x - 1
K0_32 = tl.constexpr((
    4.055665726e-06, 0.0001828969682, 0.005053392064, 0.07177697606, 0.3404973211, -0.303620771,
))
K0_64 = tl.constexpr((
    3.518631515854722e-14, 5.452564662772586e-12, 6.623013272794453e-10, 6.093361894172114e-08, 4.054506619949891e-06,
    0.0001828055582791554, 0.005053392643196092, 0.07177701034240509, 0.3404973210133806, -0.30362077291575545,
))
K1_32 = tl.constexpr((
    -3.496571044e-07, -1.911647345e-05, -0.0006724746239, -0.01325464043, -0.1086646215, -0.05745585628,
))
K1_64 = tl.constexpr((
    -1.7896636751980973e-15, -3.0892180791024413e-13, -4.2354774875777465e-11, -4.473708980740444e-09, -3.4958297951001923e-07,
    -1.910976234234459e-05, -0.0006724746609653153, -0.013254642948920608, -0.10866462148495122, -0.057455856135205326,
))
K0_BIG_32 = tl.constexpr((
    -2.982713535e-06, 8.853803646e-06, -2.408833968e-05, 9.831780428e-05, -0.0004799567472, 0.003033149526, -0.03107144737, 1.21859533,
))
K0_BIG_64 = tl.constexpr((
    1.0926983537268735e-10, -1.7597528809195706e-10, -3.119936129682105e-10, 4.3927260002107633e-10, 8.133913205464114e-10,
    -1.2366923277096287e-09, 4.757544705776374e-11, -6.643878631843235e-10, 3.808399859919043e-09, -8.025205604904476e-09,
    1.7047535884249698e-08, -4.1056738724915364e-08, 1.02954317593912e-07, -2.689759865539584e-07, 7.427801232190096e-07,
    -2.1911673837417864e-06, 7.002245645755651e-06, -2.473520542848972e-05, 9.95605474202942e-05, -0.0004797690567328844,
    0.0030328918102753206, -0.031071461824889898, 1.2185953385133905,
))
K1_BIG_32 = tl.constexpr((
    3.67429384e-06, -1.120627393e-05, 3.207374494e-05, -0.000138086427, 0.000735947382, -0.00556704141, 0.1033497206, 1.3631519,
))
K1_BIG_64 = tl.constexpr((
    -1.1931668393112158e-10, 1.9273808087540517e-10, 3.3867804167808003e-10, -4.77441121785095e-10, -8.908596710923906e-10,
    1.3615859404460648e-09, -8.336227195991456e-11, 7.966242798504094e-10, -4.331939985658629e-09, 9.213894020289533e-09,
    -1.9817577141591116e-08, 4.815434679085478e-08, -1.2203186351938403e-07, 3.230567198853934e-07, -9.067087633371393e-07,
    2.7300301043527215e-06, -8.961207387750025e-06, 3.2843866502355955e-05, -0.00013959021956272223, 0.0007357241548718385,
    -0.005566729880074588, 0.10334973775386565, 1.363151890371342,
))


@triton.jit
def bessel_k(x, ORDER: tl.constexpr, SCALED: tl.constexpr):
    """Kn(x) of order 0 or 1, or exp(x) Kn(x); infinity at 0, NaN below."""
    near = x <= 2
    a = tl.where(near & (x > 0), x, 1.0)
    t = 0.5 * a * a - 1
    log_half = tl.log(0.5 * a)
    if ORDER == 0:
        small = by_width(t, K0_32, K0_64) - log_half * maths.bessel_small(a, 0)
    else:
        small = maths.divide(1.0, a) + (log_half * maths.bessel_small(a, 1) + a * by_width(t, K1_32, K1_64))
    b = tl.where(near, 2.0, x)
    t = maths.divide(4.0, b) - 1
    if ORDER == 0:
        large = by_width(t, K0_BIG_32, K0_BIG_64)
    else:
        large = by_width(t, K1_BIG_32, K1_BIG_64)
    large = maths.divide(large, maths.sqrt(b))
    if SCALED:
        small = small * maths.exp(a)
    else:
        large = large * maths.exp(0 - b)
    return tl.where(x < 0, float("nan"), tl.where(x == 0, float("inf"), tl.where(near, small, large)))


@pointwise("aten.special_bessel_j0.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_bessel_j0(self):
    return bessel_j(self, 0)


@pointwise("aten.special_bessel_j1.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_bessel_j1(self):
    return bessel_j(self, 1)


@pointwise("aten.special_bessel_y0.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_bessel_y0(self):
    return bessel_y(self, 0)


@pointwise("aten.special_bessel_y1.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_bessel_y1(self):
    return bessel_y(self, 1)


@pointwise("aten.special_modified_bessel_i0.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_modified_bessel_i0(self):
    return maths.bessel_i(self, 0)


@pointwise("aten.special_modified_bessel_i1.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_modified_bessel_i1(self):
    return maths.bessel_i(self, 1)


@pointwise("aten.special_modified_bessel_k0.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_modified_bessel_k0(self):
    return bessel_k(self, 0, False)


@pointwise("aten.special_modified_bessel_k1.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_modified_bessel_k1(self):
    return bessel_k(self, 1, False)


@pointwise("aten.special_scaled_modified_bessel_k0.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_scaled_modified_bessel_k0(x):
    return bessel_k(x, 0, True)


@pointwise("aten.special_scaled_modified_bessel_k1.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_scaled_modified_bessel_k1(x):
    return bessel_k(x, 1, True)


# (sin(x) / x - 1) / z with z = x**2 for x <= 1
SINC = tl.constexpr((
    2.8114572543455206e-15, -7.647163731819816e-13, 1.6059043836821613e-10, -2.505210838544172e-08, 2.7557319223985893e-06,
    -0.0001984126984126984, 0.008333333333333333, -0.16666666666666666,
))


@pointwise("aten.special_spherical_bessel_j0.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_spherical_bessel_j0(x):
    """sin(x) / x"""
    a = tl.abs(x)
    near = a < 1
    b = tl.where(near, 1.0, a)
    z = tl.where(near, a, 0.0)
    z = z * z
    y = tl.where(near, 1 + z * maths.polynomial(z, SINC), maths.divide(tl.sin(b), b))
    return tl.where(a == float("inf"), 0.0, y)


# -- the Airy function -------------------------------------------------------------------------------------------------

# Ai(x) in x / 2 for |x| <= 2, and in (x + 3.5) / 1.5 for -5 <= x <= -2
AIRY_32 = tl.constexpr((
    -3.196125738e-05, -0.0001813596653, 0.0008977025843, -0.0001750934443, -0.00588136134, 0.0141585071, 1.75557318e-05, -0.06578591992,
    0.1262278131, 1.129978608e-05, -0.345091998, 0.4733696951, -2.546533527e-08, -0.5176387797, 0.3550280541,
))
AIRY_64 = tl.constexpr((
    2.2176794887310157e-10, -2.792643717177832e-10, -4.0005342064267774e-09, 1.684122392631709e-08, -8.398037939736921e-11,
    -2.3472809240247527e-07, 8.467051834738179e-07, 1.0906582767684113e-09, -9.98782748615937e-06, 3.238206842903469e-05,
    3.718654191066453e-11, -0.0002996323151052496, 0.0008500484512774683, -1.020557541928476e-10, -0.005842836625824032,
    0.014025799680265419, -4.4711006245625165e-13, -0.06573191207691248, 0.12623219693793003, 1.7763995560889755e-13, -0.3450925383904109,
    0.4733707385170839, 3.244202432827393e-17, -0.5176388075856135, 0.3550280538878172,
))
AIRY_LEFT_32 = tl.constexpr((
    -7.111109818e-05, 0.0001776436899, 0.0006621216592, -0.003331295289, 9.489568898e-05, 0.02734435273, -0.04453127087, -0.1020828131,
    0.3450630948, 0.06646400682, -1.115264136, 0.4649164645, 1.478664448, -0.5151651497, -0.3755338233,
))
AIRY_LEFT_64 = tl.constexpr((
    6.228252143707372e-10, -2.3220928491377005e-09, -9.20137937233666e-09, 8.274344221032026e-08, -8.602221456967121e-08,
    -1.2776442731056926e-06, 5.388930614023721e-06, 4.824500134374754e-06, -9.169813038731602e-05, 0.00016921329127049452,
    0.0006950142017157337, -0.003323188947709355, 6.730986755795945e-05, 0.027339828576782046, -0.044518410887597656, -0.1020813612397955,
    0.34505983352402586, 0.06646375671593303, -1.1152637297672778, 0.46491648409616654, 1.4786644286154498, -0.5151651501810722,
    -0.37553382314043193,
))
# With zeta = 2 / 3 |x|**(3 / 2) (9.7): 2 sqrt(pi) x**(1 / 4) exp(zeta) Ai(x) for x >= 2, in 2 u - 1 with u = zeta(2) / zeta;
# F and G / u of Ai(x) = (sin(zeta + pi / 4) F - cos(zeta + pi / 4) G) / (sqrt(pi) |x|**(1 / 4)) for x <= -5, in 2 u**2 - 1
# with u = zeta(5) / zeta
AIRY_BIG_32 = tl.constexpr((
    -1.59316443e-06, 4.595921089e-06, -1.199152982e-05, 4.778425417e-05, -0.0002279577288, 0.001413342563, -0.01461345059, 0.9836792783,
))
AIRY_BIG_64 = tl.constexpr((
    8.420330221634052e-11, -1.3270601964142346e-10, -2.499121453926284e-10, 3.4705645407553154e-10, 6.200741512453467e-10,
    -9.131530574156334e-10, -7.598201853112061e-11, -2.816986226354107e-10, 2.417112863971864e-09, -4.916246190444235e-09,
    9.984700470064157e-09, -2.3598427188400136e-08, 5.8020341371436036e-08, -1.4817525815514658e-07, 3.9970880001578955e-07,
    -1.1510179227385573e-06, 3.5878329689095155e-06, -1.235439136947749e-05, 4.846334053382966e-05, -0.00022785221366479908,
    0.0014132014717029575, -0.014613458724023516, 0.983679282828043,
))
AIRY_F_32 = tl.constexpr((
    -1.556384695e-07, 4.139490312e-06, -0.0003254316273, 0.9996702718,
))
AIRY_F_64 = tl.constexpr((
    5.2727784242470915e-14, -1.5179090444882385e-13, 3.1998747979878037e-13, -1.2552086884253272e-12, 5.602889049196218e-12,
    -2.7051883478257475e-11, 1.5522262548635303e-10, -1.1119337986572293e-09, 1.067342663285596e-08, -1.542112034842239e-07,
    4.128666158294696e-06, -0.0003254319872640143, 0.9996702731603566,
))
AIRY_G_32 = tl.constexpr((
    1.058816937e-06, -4.361755185e-05, 0.009272258507,
))
AIRY_G_64 = tl.constexpr((
    5.646854060186472e-14, -1.5343503302239782e-13, 2.837356770001258e-13, -1.0516089198966563e-12, 4.4220018135370795e-12,
    -1.9445145895428923e-11, 9.971730438529559e-11, -6.220314998623385e-10, 4.99430422687433e-09, -5.656011547553991e-08,
    1.0537250018802304e-06, -4.3574731767854035e-05, 0.00927225914789848,
))


@pointwise("aten.special_airy_ai.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_airy_ai(x):
    """Ai(x); NaN at the infinities, as in PyTorch."""
    left = x < -5
    middle = x < -2
    near = (x <= 2) & (left == 0)
    t = tl.where(near, x, 0.0)
    y = tl.where(middle, by_width((t + 3.5) * 0.6666666666666666, AIRY_LEFT_32, AIRY_LEFT_64), by_width(t * 0.5, AIRY_32, AIRY_64))
    a = tl.where(near, 5.0, tl.abs(x))
    root = maths.sqrt(a)
    zeta = 0.6666666666666666 * a * root
    fourth = maths.sqrt(root)
    right = by_width(3.771236166328254 * maths.divide(1.0, zeta) - 1, AIRY_BIG_32, AIRY_BIG_64)
    right = maths.divide(0.28209479177387814 * right * maths.exp(0 - zeta), fourth)
    u = 7.453559924999299 * maths.divide(1.0, tl.where(left, zeta, 8.0))
    f = by_width(2 * u * u - 1, AIRY_F_32, AIRY_F_64)
    g = u * by_width(2 * u * u - 1, AIRY_G_32, AIRY_G_64)
    s = tl.sin(tl.where(left, zeta, 0.0))
    c = tl.cos(tl.where(left, zeta, 0.0))
    wave = maths.divide(0.3989422804014327 * ((s + c) * f - (c - s) * g), fourth)
    y = tl.where(near, y, tl.where(left, wave, right))
    return tl.where(tl.abs(x) == float("inf"), float("nan"), y)


# -- orthogonal polynomials --------------------------------------------------------------------------------------------

STEPS = tl.constexpr(8)  # of a recurrence between two looks at whether any element needs more of them


@triton.jit
def _degree(n):
    """n cut off to int32; -1 for what is negative or no number of steps."""
    n = tl.where((n > -1) & (n < 9223372036854775808.0), n, -1.0)
    return maths.clip(n, -1.0, 2147483520.0).to(tl.int32)


@triton.jit
def recurrence(x, n, first, decided, STEP: tl.constexpr):
    """Degree n from degrees 0 (which is 1) and 1 (``first``) by STEP(x, one less, the last, k) for degree k + 1.

    The block goes on until every element has its degree, is ``decided`` otherwise, or is NaN.
    """
    p = tl.full(x.shape, 1.0, x.dtype)
    q = first + tl.zeros_like(p)
    k = 1
    top = tl.max(tl.where(decided | (q != q), 0, n))
    while k < top:
        for _ in tl.static_range(STEPS):
            r = STEP(x, p, q, tl.cast(k, x.dtype))
            more = k < n
            p = tl.where(more, q, p)
            q = tl.where(more, r, q)
            k += 1
        top = tl.max(tl.where(decided | (q != q), 0, n))
    return tl.where(n < 1, tl.where(n < 0, 0.0, 1.0), q)


@triton.jit
def _chebyshev_step(x, p, q, k):
    return 2 * x * q - p


@triton.jit
def _hermite_h_step(x, p, q, k):
    return 2 * x * q - 2 * k * p


@triton.jit
def _hermite_he_step(x, p, q, k):
    return x * q - k * p


@triton.jit
def _laguerre_step(x, p, q, k):
    return maths.divide((2 * k + (1 - x)) * q - k * p, k + 1 + tl.zeros_like(q))


@triton.jit
def _legendre_step(x, p, q, k):
    return maths.divide((2 * k + 1) * x * q - k * p, k + 1 + tl.zeros_like(q))


@triton.jit
def chebyshev(x, n, KIND: tl.constexpr):
    """Polynomials of the first to the fourth kind, which PyTorch calls t, u, v and w (18.5 (i)): with x = cos(theta),
    cos(n theta), sin((n + 1) theta) / sin(theta), cos((n + 1/2) theta) / cos(theta / 2), sin((n + 1/2) theta) / sin(theta / 2)."""
    x = x + tl.zeros_like(n)
    n = _degree(n) + tl.zeros_like(x).to(tl.int32)
    inside = (tl.abs(x) < 1) & (n > 6)
    end = tl.abs(x) == 1
    theta = maths.acos(tl.where(inside, x, 0.5))
    m = n.to(x.dtype)
    sign = tl.where((n & 1) != 0, -1.0, 1.0).to(x.dtype)
    if KIND == 1:
        first = x
        trigonometric = tl.cos(m * theta)
        right = sign * sign
        left = sign
    elif KIND == 2:
        first = 2 * x
        trigonometric = maths.divide(tl.sin((m + 1) * theta), tl.sin(theta))
        right = m + 1
        left = sign * (m + 1)
    elif KIND == 3:
        first = 2 * x - 1
        trigonometric = maths.divide(tl.cos((m + 0.5) * theta), tl.cos(0.5 * theta))
        right = sign * sign
        left = sign * (2 * m + 1)
    else:
        first = 2 * x + 1
        trigonometric = maths.divide(tl.sin((m + 0.5) * theta), tl.sin(0.5 * theta))
        right = 2 * m + 1
        left = sign
    y = recurrence(x, n, first, inside | end, _chebyshev_step)
    y = tl.where(inside, trigonometric, tl.where(end & (n >= 0), tl.where(x > 0, right, left), y))
    return y


@pointwise("aten.special_chebyshev_polynomial_t.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_chebyshev_polynomial_t(x, n):
    return chebyshev(x, n, 1)


@pointwise("aten.special_chebyshev_polynomial_u.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_chebyshev_polynomial_u(x, n):
    return chebyshev(x, n, 2)


@pointwise("aten.special_chebyshev_polynomial_v.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_chebyshev_polynomial_v(x, n):
    return chebyshev(x, n, 3)


@pointwise("aten.special_chebyshev_polynomial_w.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_chebyshev_polynomial_w(x, n):
    return chebyshev(x, n, 4)


@pointwise("aten.special_shifted_chebyshev_polynomial_t.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_shifted_chebyshev_polynomial_t(x, n):
    return chebyshev(2 * x - 1, n, 1)


@pointwise("aten.special_shifted_chebyshev_polynomial_u.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_shifted_chebyshev_polynomial_u(x, n):
    return chebyshev(2 * x - 1, n, 2)


@pointwise("aten.special_shifted_chebyshev_polynomial_v.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_shifted_chebyshev_polynomial_v(x, n):
    return chebyshev(2 * x - 1, n, 3)


@pointwise("aten.special_shifted_chebyshev_polynomial_w.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_shifted_chebyshev_polynomial_w(x, n):
    return chebyshev(2 * x - 1, n, 4)


@triton.jit
def _hermite(x, n, first, STEP: tl.constexpr):
    """NaN from the degree on where PyTorch gives up, of which 0 is the only value that the dtype holds next to infinities."""
    LIMIT: tl.constexpr = 512 if x.dtype == tl.float64 else 128
    above = n > LIMIT
    y = recurrence(x, n, first, above, STEP)
    return tl.where(above, float("nan"), y)


@pointwise("aten.special_hermite_polynomial_h.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_hermite_polynomial_h(x, n):
    return _hermite(x, _degree(n), 2 * x, _hermite_h_step)


@pointwise("aten.special_hermite_polynomial_he.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_hermite_polynomial_he(x, n):
    return _hermite(x, _degree(n), x, _hermite_he_step)


@pointwise("aten.special_laguerre_polynomial_l.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_laguerre_polynomial_l(x, n):
    n = _degree(n)
    y = recurrence(x, n, 1 - x, x == 0, _laguerre_step)
    return tl.where((x == 0) & (n >= 0), 1.0, y)


@pointwise("aten.special_legendre_polynomial_p.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_legendre_polynomial_p(x, n):
    n = _degree(n)
    end = tl.abs(x) == 1
    y = recurrence(x, n, x, end, _legendre_step)
    return tl.where(end & (n >= 0), tl.where((x < 0) & ((n & 1) != 0), -1.0, 1.0), y)


# -- the zeta function and derivatives of log(gamma) -------------------------------------------------------------------

# B(2 k + 2) / (2 k + 2)! over B(2 k) / (2 k)! for k = 1, 2, ...
BERNOULLI_RATIOS = tl.constexpr((
    -0.016666666666666666, -0.023809523809523808, -0.025, -0.025252525252525252, -0.02531135531135531, -0.02532561505065123,
    -0.025329131652661065, -0.025330005504037488, -0.02533022338183393, -0.025330277786482922, -0.025330291380456796,
))
ZETA_TERMS = tl.constexpr(10)


@triton.jit
def _zeta_positive(x, q):
    """The sum of (q + k)**-x over k >= 0, for x > 1 and q > 0: ten terms, and Euler and Maclaurin's formula for the rest (25.11.5)."""
    total = tl.zeros_like(q)
    negative = 0 - x
    b = total
    for k in range(ZETA_TERMS + 1):
        b = power(q + k, negative)
        total += b
    w = q + ZETA_TERMS
    total += maths.divide(b * w, x - 1) - 0.5 * b
    # From some x on the terms above are all, and products with x would overflow.
    y = tl.where(x > 1000, 0.0, x)
    t = tl.where(x > 1000, 0.0, b) * maths.divide(y, 12 * w)
    v = maths.divide(tl.full(w.shape, 1.0, w.dtype), w * w)
    for i in tl.static_range(11):
        total += t
        t = t * ((y + (2 * i + 1)) * (y + (2 * i + 2)) * v) * BERNOULLI_RATIOS[i]
    return total + t


@triton.jit
def zeta(x, q):
    """Hurwitz's zeta function. Below 0, where x has to be an integer, with f = q - floor(q) (by sorting the sum's terms)
    zeta(x, f) + (-1)**x (zeta(x, 1 - f) - zeta(x, 1 - q))."""
    x = x + tl.zeros_like(q)
    q = q + tl.zeros_like(x)
    below = q <= 0
    pole = below & (maths.floor(q) == q)
    whole = maths.floor(x) == x
    odd = 2 * maths.floor(0.5 * x) != x
    reflect = below & (pole == 0) & whole & (x > 1) & (x < float("inf"))
    f = tl.where(reflect, q - maths.floor(q), q)
    s = tl.where(x > 1, x, 2.0)
    f = tl.where(below & (reflect == 0), 1.0, f)
    sign = tl.where(odd, -1.0, 1.0).to(x.dtype)
    y = tl.zeros_like(q)
    side = 0
    sides = tl.max(tl.where(reflect, 3, 1))
    while side < sides:
        r = _zeta_positive(s, tl.where((side > 0) & reflect, tl.where(side == 1, 1 - f, 1 - q), f))
        y += tl.where(side == 0, r, tl.where(reflect, tl.where(side == 1, r, 0 - r) * sign, 0.0))
        side += 1
    y = tl.where((y == 0) & (x > 1e15), float("nan"), y)  # not 0: as PyTorch, whose estimate of the rest is 0 times infinity
    y = tl.where(below & (whole == 0), float("nan"), y)
    y = tl.where(pole | (below & (x == float("inf"))), float("inf"), y)
    y = tl.where(x == x, y, tl.where(pole, y, x))
    return tl.where(x == 1, float("inf"), tl.where(x < 1, float("nan"), y))


@pointwise("aten.special_zeta.default", kind=INT_TO_FLOAT, dtypes=_DTYPES)
@triton.jit
def special_zeta(self, other):
    return zeta(self, other)


@triton.jit
def _digamma(self):
    return maths.digamma(self)


@triton.jit
def _trigamma(self):
    """The second derivative of log(gamma): reflection below 1 / 2 (5.15.6), steps of 1 up to 8, the asymptotic series from there."""
    reflect = self < 0.5
    a = tl.where(reflect, 1 - self, self)
    y = tl.zeros_like(a)
    for _ in tl.static_range(8):
        below = a < 8
        b = tl.where(below, a, 1.0)
        y = tl.where(below, y + maths.divide(tl.full(b.shape, 1.0, b.dtype), b * b), y)
        a = tl.where(below, a + 1, a)
    u = maths.divide(1.0, a)
    v = u * u
    series = -0.2531135531135531 + v * (1.1666666666666667 + v * (-7.092156862745098 + v * 54.971177944862156))
    series = 0.16666666666666666 + v * (-0.03333333333333333 + v * (0.023809523809523808 + v * (
        -0.03333333333333333 + v * (0.07575757575757576 + v * series))))
    y += u + v * (0.5 + u * series)
    s = maths.sin_pi(tl.where(reflect, self, 0.5))
    s = tl.where(tl.abs(self) < 1e-6, 3.141592653589793 * self, s)
    s = tl.where(reflect & (s == 0), tl.sin(3.141592653589793 * self), s)  # a pole: large, and not infinite, as in PyTorch
    r = 3.141592653589793 * maths.divide(1.0, s)
    return tl.where(reflect, r * r - y, y)


@triton.jit
def _polygamma(n, self):
    """(-1)**(n + 1) n! zeta(n + 1, x) (5.15 (ii)); n is the same for all elements."""
    top = tl.minimum(tl.max(n), 171)  # whose factorial is infinite in either dtype
    factorial = tl.full(self.shape, 1.0, self.dtype)
    k = 2
    while k <= top:
        factorial = factorial * k
        k += 1
    y = factorial * zeta(n + 1, self)
    return tl.where(maths.floor(0.5 * n) * 2 == n, maths.negate(y), y)


def _by_order(call: Call) -> Any:
    return (_digamma, _trigamma)[call["n"]] if call["n"] < 2 else _polygamma


def _check_order(call: Call, common: torch.dtype) -> None:
    if call["n"] < 0:
        raise Decline("PyTorch rejects it: polygamma of a negative order")


@pointwise("aten.polygamma.default", kind=INT_TO_FLOAT, dtypes=ALL, select=_by_order, check=_check_order, promote=("self",))
@triton.jit
def polygamma(n, self):
    return _polygamma(n, self)


def _check_dimension(call: Call, common: torch.dtype) -> None:
    if call["p"] < 1:
        raise Decline("PyTorch rejects it: p is less than 1")


def _contiguous(call: Call) -> tuple[int, ...]:
    return contiguous_strides(call.args[0].shape)


@pointwise("aten.mvlgamma.default", kind=INT_TO_FLOAT, dtypes=NUMERIC, check=_check_dimension, promote=("self",), out_stride=_contiguous)
@triton.jit
def mvlgamma(self, p):
    """p (p - 1) / 4 log(pi), and the sum of log(gamma(x - i / 2)) over 0 <= i < p (35.3.5)."""
    y = tl.zeros_like(self)
    top = tl.max(p)
    k = 0
    while k < top:
        y += maths.lgamma(self - tl.cast(k, self.dtype) * 0.5)
        k += 1
    return y + p * (p - 1) * 0.2861824714623501


# -- the incomplete gamma functions ------------------------------------------------------------------------------------

# The coefficients in eta, around 0, of a**-k in Temme's expansion (8.12.8 to 8.12.10)
TEMME_0_64 = tl.constexpr((
    -2.5514193994946248e-11, 9.14769958223679e-10, -4.382036018453353e-09, 1.0261809784240309e-08, 6.707853543401498e-09,
    -1.7665952736826078e-07, 8.296711340953087e-07, -1.85406221071516e-06, -2.185448510679992e-06, 3.919263178522438e-05,
    -0.0001787551440329218, 0.0003527336860670194, 0.0011574074074074073, -0.014814814814814815, 0.08333333333333333, -0.3333333333333333,
))
TEMME_1_64 = tl.constexpr((
    -1.7543241719747647e-11, 1.1951628599778148e-08, -5.752545603517705e-08, 1.378633446915721e-07, 4.647127802807434e-09,
    -1.6120900894563446e-06, 7.64916091608111e-06, -1.8098550334489977e-05, -4.018775720164609e-07, 0.00020576131687242798,
    -0.0009902263374485596, 0.0026455026455026454, -0.003472222222222222, -0.001851851851851852,
))
TEMME_2_64 = tl.constexpr((
    -2.0477098421990866e-10, 1.4280614206064242e-07, -6.298992138380055e-07, 1.3721957309062934e-06, 3.423578734096138e-08,
    -1.2760635188618728e-05, 5.2923448829120125e-05, -0.0001073665322636516, 2.0093878600823047e-06, 0.0007716049382716049,
    -0.0026813271604938273, 0.004133597883597883,
))
TEMME_3_64 = tl.constexpr((
    -2.7861080291528143e-11, 1.4230900732435883e-06, -5.6749528269915965e-06, 1.1082654115347302e-05, -2.396505113867297e-07,
    -7.561801671883977e-05, 0.00026772063206283885, -0.0004691894943952557, 0.00022947209362139917, 0.0006494341563786008,
))
TEMME_4_64 = tl.constexpr((
    2.507497226237533e-10, 1.1375726970678419e-05, -3.968365047179435e-05, 6.641498215465122e-05, -1.4638452578843418e-06,
    -0.0002990724803031902, 0.0007840392217200666, -0.0008618882909167117,
))
TEMME_5_64 = tl.constexpr((
    1.419062920643967e-07, 6.797780477937208e-05, -0.00019932570516188847, 0.0002772753244959392, -6.972813758365857e-05,
    -0.00033679855336635813,
))
TEMME_6_64 = tl.constexpr((
    7.902353232660328e-07, 0.0002708782096718045, -0.0005921664373536939, 0.0005313079364639922,
))
TEMME_7_64 = tl.constexpr((
    0.0002812695154763237, -0.00033493161081142234, 5.171790908260592e-05, 0.00034436760689237765,
))
TEMME_0_32 = tl.constexpr((
    3.919263179e-05, -0.000178755144, 0.0003527336861, 0.001157407407, -0.01481481481, 0.08333333333, -0.3333333333,
))
TEMME_1_32 = tl.constexpr((
    0.0002057613169, -0.0009902263374, 0.002645502646, -0.003472222222, -0.001851851852,
))
TEMME_2_32 = tl.constexpr((
    0.0007716049383, -0.00268132716, 0.004133597884,
))
# (atanh(s) / s - 1) / s**2 in s**2
ATANH_TAIL_32 = tl.constexpr(tuple([1 / (2 * k + 3) for k in range(8, -1, -1)]))
ATANH_TAIL_64 = tl.constexpr(tuple([1 / (2 * k + 3) for k in range(17, -1, -1)]))
LARGE = tl.constexpr(200.0)  # from which a on Temme's expansion serves, for x / a within NEAR of 1
NEAR = tl.constexpr(0.3)
GAMMA_STEPS = tl.constexpr(2)  # divisions of float64 are long


@triton.jit
def _less_log1p(m):
    """m - log(1 + m) without cancellation for |m| <= 1 / 2."""
    s = maths.divide(m, 2 + m)
    z = s * s
    return s * (m - 2 * z * by_width(z, ATANH_TAIL_32, ATANH_TAIL_64))


@triton.jit
def _lgamma1p(a):
    """log(gamma(1 + a)) for a >= 0, with the digits that a small a has."""
    near = a <= 0.5
    e = tl.where(near, a, 0.0)
    small = e * by_width(e, maths.LGAMMA_32, maths.LGAMMA_64) - maths.log1p(e)
    return tl.where(near, small, maths.lgamma_upper(1 + tl.where(near, 0.0, a)))


@triton.jit
def _gamma_density(a, x):
    """x**a exp(-x) / gamma(a + 1) for positive finite numbers. Stirling's series from 10 on, so that a log(x) - x is not
    the difference of large numbers."""
    large = a >= 10
    b = tl.where(large, a, 10.0)
    m = maths.divide(x - b, b)
    close = tl.abs(m) <= 0.5
    exponent = tl.where(close, _less_log1p(tl.where(close, m, 0.0)), m - tl.log(maths.divide(x, b)))
    u = maths.divide(1.0, b)
    v = u * u
    series = 7.9365079365079365e-4 + v * (-5.9523809523809524e-4 + v * (8.4175084175084175e-4 + v * (
        -1.9175269175269175e-3 + v * (6.4102564102564103e-3 - v * 2.9550653594771242e-2))))
    series = u * (8.3333333333333333e-2 + v * (-2.7777777777777778e-3 + v * series))
    stirling = maths.exp(0 - (b * exponent + series)) * (0.3989422804014327 * maths.divide(1.0, maths.sqrt(b)))
    c = tl.where(large, 1.0, a)
    return tl.where(large, stirling, maths.exp(c * tl.log(x) - tl.where(large, 0.0, x) - _lgamma1p(c)))


@triton.jit
def _lower_series(a, x, wanted):
    """gamma(a + 1) exp(x) x**-a P(a, x) = 1 + x / (a + 1) + x**2 / ((a + 1) (a + 2)) + ... (8.7.1)"""
    EPSILON: tl.constexpr = 1.1e-16 if x.dtype == tl.float64 else 6e-8
    total = tl.full(x.shape, 1.0, x.dtype)
    term = tl.where(wanted, total, 0.0)
    k = 0
    while tl.max((term > total * EPSILON).to(tl.int32)) > 0:
        for _ in tl.static_range(GAMMA_STEPS):
            k += 1
            term = term * maths.divide(x, a + tl.cast(k, x.dtype))
            total += term
    return total


@triton.jit
def _upper_fraction(a, x, wanted):
    """gamma(a) exp(x) x**-a Q(a, x) by its continued fraction (8.9.2) in Lentz's form."""
    EPSILON: tl.constexpr = 2.2e-16 if x.dtype == tl.float64 else 1.2e-7
    TINY: tl.constexpr = 1e-30
    b = x + 1 - a
    d = maths.divide(1.0, tl.where(tl.abs(b) < TINY, TINY, b))
    c = tl.full(x.shape, 1 / TINY, x.dtype)
    y = d
    change = tl.where(wanted, tl.full(x.shape, 1.0, x.dtype), 0.0)
    k = 0
    while tl.max((tl.abs(change) > EPSILON).to(tl.int32)) > 0:
        for _ in tl.static_range(GAMMA_STEPS):
            k += 1
            i = tl.cast(k, x.dtype)
            numerator = i * (a - i)
            b += 2
            d = numerator * d + b
            d = maths.divide(1.0, tl.where(tl.abs(d) < TINY, TINY, d))
            c = b + maths.divide(numerator, c)
            c = tl.where(tl.abs(c) < TINY, TINY, c)
            # Elements that have converged stay as they are: later steps only round.
            change = tl.where(tl.abs(change) > EPSILON, c * d - 1, 0.0)
            y = tl.where(change != 0, y * (1 + change), y)
    return y


@triton.jit
def _upper_small(a, x):
    """Q(a, x) for 0 < x <= 1 (8.7.3): 1 - x**a / gamma(1 + a) (1 + a (-x / (a + 1) + x**2 / (2 (a + 2)) - ...))."""
    exponent = a * tl.log(x) - _lgamma1p(a)
    total = tl.zeros_like(x)
    factor = tl.full(x.shape, 1.0, x.dtype)
    TERMS: tl.constexpr = 20 if x.dtype == tl.float64 else 12
    for k in range(1, TERMS):
        i = tl.zeros_like(x) + k
        factor = maths.divide(factor * (0 - x), i)
        total += maths.divide(factor, a + i)
    return (0 - maths.expm1(exponent)) - maths.exp(exponent) * a * total


@triton.jit
def _temme(a, x, UPPER: tl.constexpr):
    """P(a, x), or Q(a, x), for large a and x close to a (8.12.3, 8.12.4)."""
    m = maths.divide(x - a, a)
    half_square = _less_log1p(m)
    eta = maths.copysign(maths.sqrt(2 * half_square), m)
    u = maths.divide(1.0, a)
    if a.dtype == tl.float64:
        total = maths.polynomial(eta, TEMME_7_64)
        total = total * u + maths.polynomial(eta, TEMME_6_64)
        total = total * u + maths.polynomial(eta, TEMME_5_64)
        total = total * u + maths.polynomial(eta, TEMME_4_64)
        total = total * u + maths.polynomial(eta, TEMME_3_64)
        total = total * u + maths.polynomial(eta, TEMME_2_64)
        total = total * u + maths.polynomial(eta, TEMME_1_64)
        total = total * u + maths.polynomial(eta, TEMME_0_64)
    else:
        total = maths.polynomial(eta, TEMME_2_32)
        total = total * u + maths.polynomial(eta, TEMME_1_32)
        total = total * u + maths.polynomial(eta, TEMME_0_32)
    rest = maths.exp(0 - a * half_square) * (0.3989422804014327 * maths.divide(1.0, maths.sqrt(a))) * total
    z = eta * maths.sqrt(0.5 * a)
    if UPPER:
        return 0.5 * maths.erfc(z) + rest
    else:
        return 0.5 * maths.erfc(maths.negate(z)) - rest


@triton.jit
def _incomplete_gamma(a, x, UPPER: tl.constexpr):
    """The regularized P(a, x), or Q(a, x), of 8.2."""
    a = a + tl.zeros_like(x)
    x = x + tl.zeros_like(a)
    inf = float("inf")
    regular = (a > 0) & (a < inf) & (x > 0) & (x < inf)
    large = regular & (a >= LARGE) & (tl.abs(x - a) <= a * NEAR)
    regular = regular & (large == 0)
    # So far from a that the result is 0 or 1 in either dtype: neither series need be summed.
    s = tl.where(regular, a, 1.0)
    t = tl.where(regular, x, 1.0)
    density = _gamma_density(s, t)
    if UPPER:
        small = (t <= 1) & (s <= t * 1.1)
        small = small | ((t <= 0.5) & (s * tl.log(t) > -0.4))
    else:
        small = t != t
    series = regular & (small == 0) & ((t <= s) | (t <= 1)) & (density > 0)
    fraction = regular & (small == 0) & (t > s) & (t > 1) & (density > 0)
    by_series = density * _lower_series(s, t, series)
    by_series = tl.where(series, by_series, 0.0)
    by_fraction = density * s * _upper_fraction(tl.where(fraction, s, 1.0), tl.where(fraction, t, 2.0), fraction)
    by_fraction = tl.where(fraction, by_fraction, 0.0)
    lower_side = (t <= s) | (t <= 1)
    if UPPER:
        y = tl.where(lower_side, 1 - by_series, by_fraction)
        y = tl.where(small, _upper_small(tl.where(small, s, 0.5), tl.where(small, t, 0.5)), y)
    else:
        y = tl.where(lower_side, by_series, 1 - by_fraction)
    y = tl.where(large, _temme(tl.where(large, a, LARGE), tl.where(large, x, LARGE), UPPER), y)
    # The ends of either range.
    at_zero: tl.constexpr = 1.0 if UPPER else 0.0
    at_infinity: tl.constexpr = 0.0 if UPPER else 1.0
    y = tl.where(x == inf, at_infinity, y)
    y = tl.where(a == inf, tl.where(x == inf, float("nan"), at_zero), y)
    y = tl.where((x == 0) & (a != 0), at_zero, y)
    y = tl.where(a == 0, tl.where(x > 0, at_infinity, float("nan")), y)
    invalid = (a < 0) | (x < 0) | ((x != x) & (a < inf)) | ((a != a) & (x > 0) & (x < inf)) | ((a != a) & (x != x))
    return tl.where(invalid, float("nan"), y)


@pointwise("aten.igamma.default", dtypes=_WIDE_FLOAT)
@triton.jit
def igamma(self, other):
    return _incomplete_gamma(self, other, False)


@pointwise("aten.igammac.default", dtypes=_WIDE_FLOAT)
@triton.jit
def igammac(self, other):
    return _incomplete_gamma(self, other, True)
