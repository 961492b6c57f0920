"""Random numbers: uniform, normal, exponential, Cauchy, Bernoulli, integers, dropout.

Each call draws one 63-bit key from PyTorch's generator (``torch.manual_seed`` reproduces it, ``generator=`` is honoured, a
replayed CUDA graph draws a new one) and numbers its elements with Philox-4x32-7 under that key. The streams are
therefore not those of PyTorch's own kernels, whose layout depends on the GPU.

The four words of a counter stay with the thread that made them: joined they are four neighbouring elements, one vector
store, and nothing passes through shared memory.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), whose Philox-4x32 passes the Crush tests from
seven rounds on; the distributions as the PyTorch documentation of ``torch.Tensor.uniform_`` and its neighbours states them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.creation import _like_strides, _plain, _same_device
from gemsmode.ops.layout import channels_last_strides, is_dense, preserved_strides
from gemsmode.ops.movement import suggests_channels_last
from gemsmode.ops.pointwise import Operand, as_operand, build, convert, power_of_2
from gemsmode.ops.promotion import FLOAT, INT, TRITON, opmath
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent
from gemsmode.predicates import Predicate, dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

# -- random words ------------------------------------------------------------------------------------------------------


@triton.jit
def philox(seed, counter, stream):
    """Four blocks of 32 random bits for each of ``counter``, under the key ``seed``; ``stream`` numbers draws of one counter."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream
    if counter.dtype.primitive_bitwidth > 32:
        c1 = (counter >> 32).to(tl.uint32)
    else:
        c1 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(7):
        # Products of 64 bits: one instruction gives both halves.
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (b & 0xFFFFFFFF).to(tl.uint32)
        c3 = (a & 0xFFFFFFFF).to(tl.uint32)
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    """A float32 in [0, 1) from a 32-bit word, on a grid of 2^-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def positive_unit(word):
    """A float32 in (0, 1] from a 32-bit word: (word + 1/2) / 2^32, rounded."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def unit_double(high, low):
    """A float64 in [0, 1) from two 32-bit words, on a grid of 2^-53."""
    bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def log_unit(u):
    """The logarithm of a normal positive float32, to 2e-7 of it: no zeros, infinities or NaN to look for.

    u = 2^k m with m in [sqrt(1/2), sqrt(2)), and a polynomial fitted to log(m).
    """
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) & -0x800000
    r = (bits - power).to(tl.float32, bitcast=True) - 1.0
    p = -0.1008230605175836 * r + 0.16180448702316416
    p = p * r - 0.17243227133909753
    p = p * r + 0.19906890172729844
    p = p * r - 0.24971228923086888
    p = p * r + 0.3333471467948174
    p = p * r - 0.5000032342574954
    return power.to(tl.float32) * (0.6931471805599453 / 8388608) + (p * (r * r) + r)


@triton.jit
def direction(word):
    """Cosine and sine of an angle uniform over the circle: one within an eighth of a turn, exchanged and negated by the word's
    first three bits. ``tl.cos`` and ``tl.sin`` carry the reduction of huge angles, which costs more than the random bits."""
    t = (word & 0x1FFFFFFF).to(tl.float32) * 1.862645149230957e-09 + 9.313225746154785e-10
    t2 = t * t
    s = t * (0.7853981525442109 + t2 * (-0.08074536728034783 + t2 * (0.002489871984522403 + t2 * -3.587726725501741e-05)))
    c = 1.0 + t2 * (-0.3084244885334759 + t2 * (0.015850397735658855 + t2 * -0.0003191602376379245))
    swap = (word & 0x20000000) != 0
    x = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ (word & 0x80000000)
    y = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ ((word << 1) & 0x80000000)
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


# -- distributions: two values from two random words, or from two float64 of [0, 1) ------------------------------------


@triton.jit
def uniform(u, v, low, high):
    if u.dtype == tl.float64:
        return u * (high - low) + low, v * (high - low) + low
    else:
        return unit(u) * (high - low) + low, unit(v) * (high - low) + low


@triton.jit
def normal(u, v, mean, std):
    """Box and Muller's transform."""
    if u.dtype == tl.float64:
        radius = tl.sqrt(-2.0 * tl.log(1.0 - u)) * std
        angle = 6.283185307179586 * v
        return radius * tl.cos(angle) + mean, radius * tl.sin(angle) + mean
    else:
        # The logarithm of what rounds to 1 may come out a little above 0.
        radius = tl.sqrt(tl.maximum(-2.0 * log_unit(positive_unit(u)), 0.0)) * std
        x, y = direction(v)
        return radius * x + mean, radius * y + mean


@triton.jit
def _waiting(u):
    """An exponential variable of rate 1, never 0 (half the spacing of numbers at 1 at least)."""
    if u.dtype == tl.float64:
        return tl.maximum(-tl.log(1.0 - u), 1.1102230246251565e-16)
    else:
        return tl.maximum(-log_unit(positive_unit(u)), 5.9604644775390625e-08)


@triton.jit
def exponential(u, v, rate, unused):
    return _waiting(u) / rate, _waiting(v) / rate


@triton.jit
def _quotient(u):
    """A standard Cauchy variable: the tangent of an angle uniform in (-pi / 2, pi / 2)."""
    if u.dtype == tl.float64:
        angle = 3.141592653589793 * (u + 5.551115123125783e-17)
        return -tl.cos(angle) / tl.sin(angle)
    else:
        x, y = direction(u)
        return y / x


@triton.jit
def cauchy(u, v, median, sigma):
    return _quotient(u) * sigma + median, _quotient(v) * sigma + median


@triton.jit
def log_normal(u, v, mean, std):
    x, y = normal(u, v, mean, std)
    return tl.exp(x), tl.exp(y)


@triton.jit
def geometric(u, v, log_q, unused):
    """The number of trials up to the first success, at least 1; ``log_q`` is the logarithm of a failure's probability."""
    return tl.maximum(tl.ceil(-_waiting(u) / log_q), 1.0), tl.maximum(tl.ceil(-_waiting(v) / log_q), 1.0)


@triton.jit
def bernoulli(u, v, p, unused):
    if u.dtype == tl.float64:
        return (u < p).to(tl.float64), (v < p).to(tl.float64)
    else:
        return (unit(u) < p).to(tl.float32), (unit(v) < p).to(tl.float32)


# -- the kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def four(a, b, c, d, BLOCK: tl.constexpr):
    """Blocks of BLOCK values as one of 4 BLOCK: the four of a place become neighbours."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * BLOCK,))


@triton.jit
def draw(DIST: tl.constexpr, seed, counter, a, b, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of 4 BLOCK values (DOUBLE: of 2 BLOCK, in float64) of a distribution of parameters a and b."""
    r0, r1, r2, r3 = philox(seed, counter, 0)
    if DOUBLE:
        x0, x1 = DIST(unit_double(r0, r1), unit_double(r2, r3), a, b)
        return tl.reshape(tl.join(x0, x1), (2 * BLOCK,))
    else:
        x0, x1 = DIST(r0, r1, a, b)
        x2, x3 = DIST(r2, r3, a, b)
        return four(x0, x1, x2, x3, BLOCK)


@triton.jit
def random_kernel(p_out, p_seed, n, a, b, DIST: tl.constexpr, DOUBLE: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """n values of a distribution; four (in float64 two) of each Philox counter. Grid: programs of SLICES blocks of counters."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    seed = tl.load(p_seed)
    VALUES: tl.constexpr = 2 * BLOCK if DOUBLE else 4 * BLOCK
    for i in tl.static_range(SLICES):
        block = i_block * SLICES + i
        value = draw(DIST, seed, block * BLOCK + tl.arange(0, BLOCK), a, b, DOUBLE, BLOCK)
        rounded = convert(value, p_out.dtype.element_ty)
        if BOUNDED:
            # Rounding may reach the upper end of the half-open interval.
            rounded = tl.where(rounded.to(value.dtype) >= b, convert(value * 0 + a, p_out.dtype.element_ty), rounded)
        o = block * VALUES + tl.arange(0, VALUES)
        tl.store(p_out + o, rounded, mask=o < n)


@triton.jit
def _within(high, low, span, SMALL: tl.constexpr):
    """64 random bits as an integer below span: their product's upper half for spans of 32 bits, else the remainder."""
    if SMALL:
        factor = tl.cast(span, tl.uint64)
        return ((high.to(tl.uint64) * factor + ((low.to(tl.uint64) * factor) >> 32)) >> 32).to(tl.int64)
    else:
        return (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) % tl.cast(span, tl.uint64)).to(tl.int64)


@triton.jit
def integer_kernel(p_out, p_seed, n, low, span, BITS: tl.constexpr, SMALL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
                   SLICES: tl.constexpr):
    """n integers in [low, low + span) (BITS: so many random bits), two of each Philox counter. Grid: programs of SLICES blocks."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    seed = tl.load(p_seed)
    for i in tl.static_range(SLICES):
        block = i_block * SLICES + i
        r0, r1, r2, r3 = philox(seed, block * BLOCK + tl.arange(0, BLOCK), 0)
        if BITS:
            x0 = (((r0.to(tl.uint64) << 32) | r1.to(tl.uint64)) >> (64 - BITS)).to(tl.int64, bitcast=True)
            x1 = (((r2.to(tl.uint64) << 32) | r3.to(tl.uint64)) >> (64 - BITS)).to(tl.int64, bitcast=True)
        else:
            x0, x1 = _within(r0, r1, span, SMALL) + low, _within(r2, r3, span, SMALL) + low
        o = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        tl.store(p_out + o, convert(tl.reshape(tl.join(x0, x1), (2 * BLOCK,)), p_out.dtype.element_ty), mask=o < n)


@triton.jit
def _kept(seed, counter, threshold, EIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the next 4 (EIGHT: 8) elements of each counter are kept: where a random word is not below the threshold.

    Of eight, four are decided by the words and four by the words with their halves exchanged: each has 32 bits, and two
    of one word depend on each other only where a half equals the threshold's, once in 65536.
    """
    r0, r1, r2, r3 = philox(seed, counter, 0)
    k0, k1, k2, k3 = r0 >= threshold, r1 >= threshold, r2 >= threshold, r3 >= threshold
    if EIGHT:
        k4, k5 = ((r0 << 16) | (r0 >> 16)) >= threshold, ((r1 << 16) | (r1 >> 16)) >= threshold
        k6, k7 = ((r2 << 16) | (r2 >> 16)) >= threshold, ((r3 << 16) | (r3 >> 16)) >= threshold
        return tl.reshape(tl.join(tl.join(tl.join(k0, k1), tl.join(k2, k3)), tl.join(tl.join(k4, k5), tl.join(k6, k7))), (8 * BLOCK,))
    else:
        return four(k0, k1, k2, k3, BLOCK)


@triton.jit
def dropout_kernel(p_x, p_out, p_mask, p_seed, n, p, COMPUTE: tl.constexpr, EIGHT: tl.constexpr, WIDE: tl.constexpr,
                   BLOCK: tl.constexpr):
    """Each element is kept with probability 1 - p and scaled by 1 / (1 - p). Grid: pairs of blocks of Philox counters."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    VALUES: tl.constexpr = 8 * BLOCK if EIGHT else 4 * BLOCK
    o = i_block * (2 * VALUES) + tl.arange(0, VALUES)
    o_next = o + VALUES
    # Both loads come before any store, which they could not pass: two 16-byte accesses of a thread are in flight.
    b = tl.load(p_x + o, mask=o < n)
    b_next = tl.load(p_x + o_next, mask=o_next < n)
    seed = tl.load(p_seed)
    scale = (1.0 / (1.0 - tl.cast(p, COMPUTE))).to(COMPUTE)
    threshold = (tl.cast(p, tl.float64) * 4294967296.0).to(tl.uint32)
    counter = i_block * (2 * BLOCK) + tl.arange(0, BLOCK)
    keep = _kept(seed, counter, threshold, EIGHT, BLOCK)
    keep_next = _kept(seed, counter + BLOCK, threshold, EIGHT, BLOCK)
    tl.store(p_out + o, convert(tl.where(keep, b.to(COMPUTE) * scale, 0.0), p_out.dtype.element_ty), mask=o < n)
    tl.store(p_mask + o, keep, mask=o < n)
    tl.store(p_out + o_next, convert(tl.where(keep_next, b_next.to(COMPUTE) * scale, 0.0), p_out.dtype.element_ty), mask=o_next < n)
    tl.store(p_mask + o_next, keep_next, mask=o_next < n)


# -- plans -------------------------------------------------------------------------------------------------------------


def counters(n: int, values: int, target: Target, slices: int = 4) -> tuple[int, int]:
    """Philox counters of a block, one a thread of four warps so that its values are neighbours, and blocks of a program."""
    if target.interpreted:
        return min(power_of_2(-(-n // values)), 1 << 15), 1
    block = 4 * target.warp_size
    # Fewer blocks a program while the device would not be filled twice over.
    return block, slices if n >= block * values * slices * target.multiprocessors * 2 else 1


def drawn(call: Call, out: Any) -> tuple[Any, tuple[Alloc, ...], int]:
    """The reference to write to (``out`` is an :class:`Alloc` or an :class:`Arg`), the allocations, and the number of the seed's."""
    generator = next((i for i, p in enumerate(parameters(call.op)) if p.name == "generator"), -1)
    seed = Alloc((1,), (1,), torch.int64, seed=generator)
    if isinstance(out, Alloc):
        return Out(0), (out, seed), 1
    return out, (seed,), 0


WIDE = 2**31 - 2**17


def _plan(call: Call, out: Any, meta: TensorMeta, distribution: Any, a: Any, b: Any, bounded: bool = False) -> Plan:
    """Fill ``out`` (an :class:`Alloc`, or an :class:`Arg` that is dense) from a distribution of parameters a and b, each an
    argument's number or a float."""
    if meta.dtype not in FLOAT and distribution not in (bernoulli, geometric):
        raise Decline(f"{dtype_name(meta.dtype)} is not floating point")
    n = meta.numel
    ref, allocs, seed = drawn(call, out)
    refs = {} if isinstance(out, Alloc) else {out: meta}
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    double = meta.dtype == torch.float64
    kind = "fp64" if double else "fp32"
    values = 2 if double else 4
    block, slices = counters(n, values, call.target)
    numbers = [Num(v, kind) if isinstance(v, int) else float(v) for v in (a, b)]
    constants = Constants((("DIST", distribution), ("DOUBLE", double), ("BOUNDED", bounded), ("WIDE", n >= WIDE),
                           ("BLOCK", block), ("SLICES", slices)))
    launch = Launch(random_kernel, (-(-n // (block * values * slices)), 1, 1), (ref, Out(seed), extent(n), *numbers), constants)
    return Plan(allocs, (launch,), ref, refs, bytes=n * meta.dtype.itemsize)


def _inplace(call: Call, distribution: Any, a: Any, b: Any, bounded: bool = False) -> Plan:
    x = call.args[0]
    if not parameters(call.op)[0].is_written:
        alloc = Alloc(x.shape, preserved_strides(x), x.dtype)
        return _plan(call, alloc, alloc.meta, distribution, a, b, bounded)
    if not is_dense(x.shape, x.stride):
        raise Decline("a tensor that is not dense")
    return _plan(call, Arg(0), x, distribution, a, b, bounded)


def _factory(call: Call, shape: Sequence[int], stride: tuple[int, ...], kind: torch.dtype, distribution: Any) -> Plan:
    if any(s < 0 for s in shape):
        raise Decline("PyTorch rejects it: a negative size")
    alloc = Alloc(tuple(shape), stride, kind)
    return _plan(call, alloc, alloc.meta, distribution, 0.0, 1.0, distribution is uniform)


_PLAIN = Predicate("strided, not pinned", _plain)
_STATE = (torch.get_default_dtype,)


@planned(["aten.rand.default", "aten.rand.generator"], _PLAIN, family="random", kernel=random_kernel, state=_STATE)
def rand(call: Call) -> Plan:
    size = tuple(call["size"])
    return _factory(call, size, contiguous_strides(size), call["dtype"] or torch.get_default_dtype(), uniform)


@planned(["aten.randn.default", "aten.randn.generator"], _PLAIN, family="random", kernel=random_kernel, state=_STATE)
def randn(call: Call) -> Plan:
    size = tuple(call["size"])
    return _factory(call, size, contiguous_strides(size), call["dtype"] or torch.get_default_dtype(), normal)


@planned(["aten.rand_like.default", "aten.rand_like.generator"], _PLAIN, family="random", kernel=random_kernel)
def rand_like(call: Call) -> Plan:
    _same_device(call)
    x = call.args[0]
    return _factory(call, x.shape, _like_strides(call, x), call["dtype"] or x.dtype, uniform)


@planned(["aten.randn_like.default", "aten.randn_like.generator"], _PLAIN, family="random", kernel=random_kernel)
def randn_like(call: Call) -> Plan:
    _same_device(call)
    x = call.args[0]
    return _factory(call, x.shape, _like_strides(call, x), call["dtype"] or x.dtype, normal)


@planned(["aten.uniform_.default", "aten.uniform.default"], dtype(*FLOAT, arg="self"), family="random", kernel=random_kernel,
         by_value=("from", "to"))
def uniform_(call: Call) -> Plan:
    low, high = call.args[1:3]
    if not low <= high or high - low > torch.finfo(call.args[0].dtype).max:
        raise Decline("PyTorch rejects it: the bounds are not an interval of the dtype")
    return _inplace(call, uniform, 1, 2, bounded=low < high)


def _spread(call: Call, index: int) -> None:
    if not call.args[index] >= 0:
        raise Decline("PyTorch rejects it: a negative standard deviation")


@planned(["aten.normal_.default", "aten.normal_functional.default"], dtype(*FLOAT, arg="self"), family="random", kernel=random_kernel,
         by_value=("std",))
def normal_(call: Call) -> Plan:
    _spread(call, 2)
    return _inplace(call, normal, 1, 2)


@planned("aten.normal.float_float", _PLAIN, family="random", kernel=random_kernel, by_value=("std",), state=_STATE)
def normal_of(call: Call) -> Plan:
    """mean, std, size: a new tensor of normal values."""
    _spread(call, 1)
    size = tuple(call["size"])
    if any(s < 0 for s in size):
        raise Decline("PyTorch rejects it: a negative size")
    alloc = Alloc(size, contiguous_strides(size), call["dtype"] or torch.get_default_dtype())
    return _plan(call, alloc, alloc.meta, normal, 0, 1)


@planned(["aten.log_normal_.default", "aten.log_normal.default"], dtype(*FLOAT, arg="self"), family="random", kernel=random_kernel,
         by_value=("std",))
def log_normal_(call: Call) -> Plan:
    """The exponential of a normal variable of this mean and standard deviation."""
    if not call.args[2] > 0:
        raise Decline("PyTorch rejects it: the standard deviation must be positive")
    return _inplace(call, log_normal, 1, 2)


@planned(["aten.cauchy_.default", "aten.cauchy.default"], dtype(*FLOAT, arg="self"), family="random", kernel=random_kernel,
         by_value=("sigma",))
def cauchy_(call: Call) -> Plan:
    if not call.args[2] > 0:
        raise Decline("PyTorch rejects it: sigma must be positive")
    return _inplace(call, cauchy, 1, 2)


@planned(["aten.exponential_.default", "aten.exponential.default"], dtype(*FLOAT, arg="self"), family="random", kernel=random_kernel,
         by_value=("lambd",))
def exponential_(call: Call) -> Plan:
    if not call.args[1] > 0:
        raise Decline("PyTorch rejects it: the rate must be positive")
    return _inplace(call, exponential, 1, 0.0)


@planned(["aten.geometric_.default", "aten.geometric.default"], dtype(*FLOAT, *INT, arg="self"), family="random", kernel=random_kernel,
         by_value=("p",))
def geometric_(call: Call) -> Plan:
    """Trials up to the first success, of probability p."""
    p = call.args[1]
    if not 0 < p < 1:
        raise Decline("PyTorch rejects it, or success is certain: p is not between 0 and 1")
    return _inplace(call, geometric, math.log1p(-p), 0.0)


def _probability(call: Call) -> None:
    if not 0 <= call.args[1] <= 1:
        raise Decline("PyTorch rejects it: p is no probability")


@planned("aten.bernoulli_.float", dtype(*FLOAT, *INT, torch.bool, arg="self"), family="random", kernel=random_kernel, by_value=("p",))
def bernoulli_float(call: Call) -> Plan:
    _probability(call)
    return _inplace(call, bernoulli, 1, 0.0)


@planned("aten.bernoulli.p", dtype(*FLOAT, *INT, torch.bool, arg="self"), family="random", kernel=random_kernel, by_value=("p",))
def bernoulli_p(call: Call) -> Plan:
    _probability(call)
    x = call.args[0]
    alloc = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    return _plan(call, alloc, alloc.meta, bernoulli, 1, 0.0)


# -- integers ----------------------------------------------------------------------------------------------------------


def _integers(call: Call, out: Any, meta: TensorMeta, low: int, high: int) -> Plan:
    if meta.dtype not in (*FLOAT, *INT, torch.bool):
        raise Decline(f"{dtype_name(meta.dtype)} is not served")
    if high <= low:
        raise Decline("PyTorch rejects it: an empty range")
    if meta.dtype == torch.bool:
        fits = 0 <= low and high <= 2
    elif meta.dtype.is_floating_point:
        exact = 2 ** {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}.get(meta.dtype, 53)
        fits = -exact <= low and high - 1 <= exact
    else:
        limit = torch.iinfo(meta.dtype)
        fits = limit.min <= low and high - 1 <= limit.max
    span = high - low
    bits = {2**64: 64, 2**63: 63}.get(span, 0)
    if not fits or (span >= 2**63 and not bits):
        raise Decline("a range that the dtype does not hold")
    n = meta.numel
    ref, allocs, seed = drawn(call, out)
    refs = {} if isinstance(out, Alloc) else {out: meta}
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    block, slices = counters(n, 2, call.target)
    launch = Launch(integer_kernel, (-(-n // (2 * block * slices)), 1, 1),
                    (ref, Out(seed), extent(n), Size(low), Size(0 if bits else span)),
                    Constants((("BITS", bits), ("SMALL", span < 2**32), ("WIDE", n >= WIDE), ("BLOCK", block), ("SLICES", slices))))
    return Plan(allocs, (launch,), ref, refs, bytes=n * meta.dtype.itemsize)


def _randint(call: Call, low: int, high: int) -> Plan:
    size = tuple(call["size"])
    kind = call["dtype"]
    # The schema's default arrives as the number of the dtype.
    alloc = Alloc(size, contiguous_strides(size), kind if isinstance(kind, torch.dtype) else torch.int64)
    return _integers(call, alloc, alloc.meta, low, high)


@planned(["aten.randint.default", "aten.randint.generator"], _PLAIN, family="random", kernel=integer_kernel)
def randint(call: Call) -> Plan:
    return _randint(call, 0, call["high"])


@planned(["aten.randint.low", "aten.randint.low_generator"], _PLAIN, family="random", kernel=integer_kernel)
def randint_low(call: Call) -> Plan:
    return _randint(call, call["low"], call["high"])


@planned(["aten.randint_like.default", "aten.randint_like.generator"], _PLAIN, family="random", kernel=integer_kernel)
def randint_like(call: Call) -> Plan:
    return _randint_like(call, 0, call["high"])


@planned(["aten.randint_like.low_dtype", "aten.randint_like.low_generator_dtype"], _PLAIN, family="random", kernel=integer_kernel)
def randint_like_low(call: Call) -> Plan:
    return _randint_like(call, call["low"], call["high"])


def _randint_like(call: Call, low: int, high: int) -> Plan:
    _same_device(call)
    x = call.args[0]
    alloc = Alloc(x.shape, _like_strides(call, x), call["dtype"] or x.dtype)
    return _integers(call, alloc, alloc.meta, low, high)


_INTEGERS = dtype(*FLOAT, *INT, torch.bool, arg="self")


def _random(call: Call, low: int, high: int) -> Plan:
    x = call.args[0]
    if not parameters(call.op)[0].is_written:
        alloc = Alloc(x.shape, preserved_strides(x), x.dtype)
        return _integers(call, alloc, alloc.meta, low, high)
    if not is_dense(x.shape, x.stride):
        raise Decline("a tensor that is not dense")
    return _integers(call, Arg(0), x, low, high)


def _last_integer(kind: torch.dtype) -> int:
    """The largest integer that ``random_`` draws without a bound."""
    if kind == torch.bool:
        return 1
    if kind.is_floating_point:
        return 2 ** {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}.get(kind, 53)
    return torch.iinfo(kind).max


@planned(["aten.random_.default", "aten.random.default"], _INTEGERS, family="random", kernel=integer_kernel)
def random_(call: Call) -> Plan:
    """Integers from 0 to the largest that the dtype holds; of floats, up to 2 to the power of their digits."""
    return _random(call, 0, _last_integer(call.args[0].dtype) + 1)


@planned(["aten.random_.to", "aten.random.to"], _INTEGERS, family="random", kernel=integer_kernel)
def random_to(call: Call) -> Plan:
    return _random(call, 0, call.args[1])


@planned(["aten.random_.from", "aten.random.from"], _INTEGERS, family="random", kernel=integer_kernel)
def random_from(call: Call) -> Plan:
    low, high = call.args[1:3]
    return _random(call, low, _last_integer(call.args[0].dtype) + 1 if high is None else high)


# -- dropout -----------------------------------------------------------------------------------------------------------


@triton.jit
def masked_scale(grad_output, mask, scale):
    return grad_output * (mask.to(grad_output.dtype) * scale)  # NaN stays where it was dropped, as in PyTorch


@planned("aten.native_dropout.default", dtype(*FLOAT), family="random", kernel=dropout_kernel, by_value=("p",))
def native_dropout(call: Call) -> Plan:
    """input, p, train -> (output, mask of what was kept). Source: ``torch.nn.functional.dropout``."""
    x, p, train = call.args
    if train is False or not 0 < p < 1:
        raise Decline("nothing is dropped, or everything")
    strides = preserved_strides(x)
    if x.stride != strides and x.numel:
        raise Decline("an input that is not dense")
    n = x.numel
    allocs = (Alloc(x.shape, strides, x.dtype), Alloc(x.shape, strides, torch.bool), Alloc((1,), (1,), torch.int64, seed=-1))
    returns = (Out(0), Out(1))
    if n == 0:
        return Plan(allocs[:2], (), returns, {}, bytes=0)
    # As many values of a counter as fill a 16-byte access.
    eight = x.dtype.itemsize == 2
    values = 8 if eight else 4
    block, _ = counters(n, 2 * values, call.target)
    launch = Launch(dropout_kernel, (-(-n // (2 * values * block)), 1, 1), (Arg(0), Out(0), Out(1), Out(2), extent(n), Num(1, "fp64")),
                    Constants((("COMPUTE", TRITON[opmath(x.dtype)]), ("EIGHT", eight), ("WIDE", n >= WIDE), ("BLOCK", block))))
    return Plan(allocs, (launch,), returns, {Arg(0): x}, bytes=n * (2 * x.dtype.itemsize + 1))


@planned("aten.native_dropout_backward.default", dtype(*FLOAT, arg="grad_output"), family="random", kernel=masked_scale)
def native_dropout_backward(call: Call) -> Plan:
    grad, mask, _ = call.args
    if mask.dtype != torch.bool:
        raise Decline(f"a mask of {dtype_name(mask.dtype)}")
    inner = opmath(grad.dtype)
    operands = [as_operand(call, 0, grad.dtype), Operand(Arg(1), mask, torch.bool, torch.bool), as_operand(call, 2, grad.dtype, inner)]
    strides = None
    if grad.device.type != "cpu":  # PyTorch's CUDA kernel fills an ``empty_like`` of the format that the gradient suggests
        last = channels_last_strides(grad.shape) if suggests_channels_last(grad) else None
        strides = last if last is not None else contiguous_strides(grad.shape)
    return build(call, masked_scale, operands, [grad.dtype], out_stride=strides)
