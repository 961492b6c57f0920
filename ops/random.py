"""Random numbers: uniform, normal, exponential, Bernoulli, integers, dropout.

Each call draws one 63-bit key from PyTorch's generator (``torch.manual_seed`` reproduces it, ``generator=`` is honoured, a
replayed CUDA graph draws a new one) and numbers its elements with Philox-4x32-10 under that key. The streams are
therefore not those of PyTorch's own kernels, whose layout depends on the GPU.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), through ``triton.language.randint4x``; the
distributions as the PyTorch documentation of ``torch.Tensor.uniform_`` and its neighbours states them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.creation import _like_strides, _plain, _same_device
from gemsmode.ops.layout import is_dense, preserved_strides
from gemsmode.ops.pointwise import Operand, as_operand, build, convert, power_of_2
from gemsmode.ops.promotion import FLOAT, INT, opmath
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, contiguous_strides, extent
from gemsmode.predicates import Predicate, dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

# -- distributions: two values from random words -----------------------------------------------------------------------


@triton.jit
def unit(word):
    """A float32 in [0, 1) from a 32-bit word, on a grid of 2^-24."""
    return (word.to(tl.uint32) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def unit_double(high, low):
    """A float64 in [0, 1) from two 32-bit words, on a grid of 2^-53."""
    bits = (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def uniform(u, v, low, high):
    return u * (high - low) + low, v * (high - low) + low


@triton.jit
def turn(v):
    """Cosine and sine of 2 pi v for v in [0, 1), in float32 to 3e-9: Taylor's series within an eighth of the nearest
    quarter turn. ``tl.cos`` and ``tl.sin`` carry the reduction of huge angles, which costs more than the random bits."""
    quarter = tl.floor(v * 4.0 + 0.5)
    f = (v - quarter * 0.25) * 6.283185307179586
    f2 = f * f
    s = f * (1.0 + f2 * (-0.16666666666666666 + f2 * (0.008333333333333333 + f2 * (-0.0001984126984126984 + f2 * 2.7557319223985893e-06))))
    c = 1.0 + f2 * (-0.5 + f2 * (0.041666666666666664 + f2 * (-0.001388888888888889 + f2 * 2.48015873015873e-05)))
    odd = (quarter == 1.0) | (quarter == 3.0)
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return (tl.where((quarter == 1.0) | (quarter == 2.0), -cosine, cosine), tl.where((quarter == 2.0) | (quarter == 3.0), -sine, sine))


@triton.jit
def normal(u, v, mean, std):
    """Box and Muller's transform; 1 - u is never 0."""
    radius = tl.sqrt(-2.0 * tl.log(1.0 - u)) * std
    if u.dtype == tl.float64:
        angle = 6.283185307179586 * v
        return radius * tl.cos(angle) + mean, radius * tl.sin(angle) + mean
    else:
        cosine, sine = turn(v)
        return radius * cosine + mean, radius * sine + mean


@triton.jit
def exponential(u, v, rate, unused):
    return -tl.log(1.0 - u) / rate, -tl.log(1.0 - v) / rate


@triton.jit
def bernoulli(u, v, p, unused):
    return (u < p).to(u.dtype), (v < p).to(v.dtype)


# -- the kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _put(p_out, o, n, value, low, high, BOUNDED: tl.constexpr):
    rounded = convert(value, p_out.dtype.element_ty)
    if BOUNDED:
        # Rounding may reach the upper end of the half-open interval.
        rounded = tl.where(rounded.to(value.dtype) >= high, convert(value * 0 + low, p_out.dtype.element_ty), rounded)
    tl.store(p_out + o, rounded, mask=o < n)


@triton.jit
def random_kernel(p_out, p_seed, n, a, b, DIST: tl.constexpr, DOUBLE: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK: tl.constexpr):
    """n values of a distribution; four (in float64 two) of each Philox counter. Grid: blocks of counters."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    seed = tl.load(p_seed)
    lane = tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.randint4x(seed, i_block * BLOCK + lane)
    if DOUBLE:
        x0, x1 = DIST(unit_double(r0, r1), unit_double(r2, r3), a, b)
        o = i_block * (2 * BLOCK) + lane
        _put(p_out, o, n, x0, a, b, BOUNDED)
        _put(p_out, o + BLOCK, n, x1, a, b, BOUNDED)
    else:
        x0, x1 = DIST(unit(r0), unit(r1), a, b)
        x2, x3 = DIST(unit(r2), unit(r3), a, b)
        o = i_block * (4 * BLOCK) + lane
        _put(p_out, o, n, x0, a, b, BOUNDED)
        _put(p_out, o + BLOCK, n, x1, a, b, BOUNDED)
        _put(p_out, o + 2 * BLOCK, n, x2, a, b, BOUNDED)
        _put(p_out, o + 3 * BLOCK, n, x3, a, b, BOUNDED)


@triton.jit
def integer_kernel(p_out, p_seed, n, low, span, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """n integers in [low, low + span): 64 random bits modulo span (0: all 2^64), two of each Philox counter."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    seed = tl.load(p_seed)
    lane = tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.randint4x(seed, i_block * BLOCK + lane)
    o = i_block * (2 * BLOCK) + lane
    x0 = (r0.to(tl.uint32).to(tl.uint64) << 32) | r1.to(tl.uint32).to(tl.uint64)
    x1 = (r2.to(tl.uint32).to(tl.uint64) << 32) | r3.to(tl.uint32).to(tl.uint64)
    modulus = tl.cast(span, tl.uint64)
    tl.store(p_out + o, convert((x0 % modulus).to(tl.int64) + low, p_out.dtype.element_ty), mask=o < n)
    tl.store(p_out + o + BLOCK, convert((x1 % modulus).to(tl.int64) + low, p_out.dtype.element_ty), mask=o + BLOCK < n)


@triton.jit
def _drop(p_x, p_out, p_mask, o, n, u, p, scale):
    m = o < n
    keep = u >= p
    b = tl.load(p_x + o, mask=m)
    tl.store(p_out + o, tl.where(keep, b.to(scale.dtype) * scale, 0.0).to(p_out.dtype.element_ty), mask=m)
    tl.store(p_mask + o, keep, mask=m)


@triton.jit
def dropout_kernel(p_x, p_out, p_mask, p_seed, n, p, DOUBLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Each element is kept with probability 1 - p and scaled by 1 / (1 - p). Grid: blocks of Philox counters."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    seed = tl.load(p_seed)
    lane = tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.randint4x(seed, i_block * BLOCK + lane)
    o = i_block * (4 * BLOCK) + lane
    if DOUBLE:
        scale = 1.0 / (1.0 - tl.cast(p, tl.float64))
    else:
        scale = 1.0 / (1.0 - tl.cast(p, tl.float32))
    _drop(p_x, p_out, p_mask, o, n, unit(r0), p, scale)
    _drop(p_x, p_out, p_mask, o + BLOCK, n, unit(r1), p, scale)
    _drop(p_x, p_out, p_mask, o + 2 * BLOCK, n, unit(r2), p, scale)
    _drop(p_x, p_out, p_mask, o + 3 * BLOCK, n, unit(r3), p, scale)


# -- plans -------------------------------------------------------------------------------------------------------------


def _counters(n: int, values: int, itemsize: int, target: Target) -> int:
    """Philox counters of a program: as many a thread as fill a 16-byte store with each of their values."""
    return min(power_of_2(-(-n // values)), 1 << 15 if target.interpreted else 128 * max(min(16 // itemsize, 8), 2))


def _where(call: Call, out: Any, n: int) -> tuple[Any, tuple[Alloc, ...], int]:
    """The reference to write to, the allocations, and the number of the seed's."""
    generator = next((i for i, p in enumerate(parameters(call.op)) if p.name == "generator"), -1)
    seed = Alloc((1,), (1,), torch.int64, seed=generator)
    if isinstance(out, Alloc):
        return Out(0), (out, seed), 1
    return out, (seed,), 0


def _plan(call: Call, out: Any, meta: TensorMeta, distribution: Any, a: Any, b: Any, bounded: bool = False) -> Plan:
    """Fill ``out`` (an :class:`Alloc`, or an :class:`Arg` that is dense) from a distribution of parameters a and b, each an
    argument's number or a float."""
    if meta.dtype not in FLOAT and distribution is not bernoulli:
        raise Decline(f"{dtype_name(meta.dtype)} is not floating point")
    n = meta.numel
    ref, allocs, seed = _where(call, out, n)
    refs = {} if isinstance(out, Alloc) else {out: meta}
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    double = meta.dtype == torch.float64
    kind = "fp64" if double else "fp32"
    block = _counters(n, 2 if double else 4, meta.dtype.itemsize, call.target)
    numbers = [Num(v, kind) if isinstance(v, int) else float(v) for v in (a, b)]
    constants = Constants((("DIST", distribution), ("DOUBLE", double), ("BOUNDED", bounded), ("WIDE", n >= 2**31 - 2**17),
                           ("BLOCK", block)))
    launch = Launch(random_kernel, (-(-n // (block * (2 if double else 4))), 1, 1), (ref, Out(seed), extent(n), *numbers), constants)
    return Plan(allocs, (launch,), ref, refs, bytes=n * meta.dtype.itemsize)


def _inplace(call: Call, distribution: Any, a: Any, b: Any, bounded: bool = False) -> Plan:
    x = call.args[0]
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


@planned("aten.uniform_.default", dtype(*FLOAT), family="random", kernel=random_kernel, by_value=("from", "to"))
def uniform_(call: Call) -> Plan:
    low, high = call.args[1:3]
    if not low <= high or high - low > torch.finfo(call.args[0].dtype).max:
        raise Decline("PyTorch rejects it: the bounds are not an interval of the dtype")
    return _inplace(call, uniform, 1, 2, bounded=low < high)


@planned("aten.normal_.default", dtype(*FLOAT), family="random", kernel=random_kernel, by_value=("std",))
def normal_(call: Call) -> Plan:
    if not call.args[2] >= 0:
        raise Decline("PyTorch rejects it: a negative standard deviation")
    return _inplace(call, normal, 1, 2)


@planned("aten.exponential_.default", dtype(*FLOAT), family="random", kernel=random_kernel, by_value=("lambd",))
def exponential_(call: Call) -> Plan:
    if not call.args[1] > 0:
        raise Decline("PyTorch rejects it: the rate must be positive")
    return _inplace(call, exponential, 1, 0.0)


@planned("aten.bernoulli_.float", dtype(*FLOAT, *INT, torch.bool), family="random", kernel=random_kernel, by_value=("p",))
def bernoulli_float(call: Call) -> Plan:
    if not 0 <= call.args[1] <= 1:
        raise Decline("PyTorch rejects it: p is no probability")
    return _inplace(call, bernoulli, 1, 0.0)


@planned("aten.bernoulli.p", dtype(*FLOAT, *INT, torch.bool), family="random", kernel=random_kernel, by_value=("p",))
def bernoulli_p(call: Call) -> Plan:
    x = call.args[0]
    if not 0 <= call.args[1] <= 1:
        raise Decline("PyTorch rejects it: p is no probability")
    alloc = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    return _plan(call, alloc, alloc.meta, bernoulli, 1, 0.0)


# -- integers ----------------------------------------------------------------------------------------------------------


def _integers(call: Call, out: Any, meta: TensorMeta, low: int, high: int) -> Plan:
    if meta.dtype not in (*FLOAT, *INT):
        raise Decline(f"{dtype_name(meta.dtype)} is not served")
    if high <= low:
        raise Decline("PyTorch rejects it: an empty range")
    limit = torch.iinfo(meta.dtype) if not meta.dtype.is_floating_point else None
    exact = 2 ** {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}.get(meta.dtype, 63)
    if high - low >= 2**63 or (limit and not (limit.min <= low and high - 1 <= limit.max)) or (not limit and max(-low, high) > exact):
        raise Decline("a range that the dtype does not hold")
    n = meta.numel
    ref, allocs, seed = _where(call, out, n)
    refs = {} if isinstance(out, Alloc) else {out: meta}
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    block = _counters(n, 2, meta.dtype.itemsize, call.target)
    launch = Launch(integer_kernel, (-(-n // (2 * block)), 1, 1), (ref, Out(seed), extent(n), extent(low), extent(high - low)),
                    Constants((("WIDE", n >= 2**31 - 2**17), ("BLOCK", block))))
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


# -- dropout -----------------------------------------------------------------------------------------------------------


@triton.jit
def masked_scale(grad_output, mask, scale):
    return tl.where(mask, grad_output * scale, 0.0)


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
    block = _counters(n, 4, x.dtype.itemsize, call.target)
    double = x.dtype == torch.float64
    launch = Launch(dropout_kernel, (-(-n // (4 * block)), 1, 1),
                    (Arg(0), Out(0), Out(1), Out(2), extent(n), Num(1, "fp64" if double else "fp32")),
                    Constants((("DOUBLE", double), ("WIDE", n >= 2**31 - 2**17), ("BLOCK", block))))
    return Plan(allocs, (launch,), returns, {Arg(0): x}, bytes=n * (2 * x.dtype.itemsize + 1))


@planned("aten.native_dropout_backward.default", dtype(*FLOAT, arg="grad_output"), family="random", kernel=masked_scale)
def native_dropout_backward(call: Call) -> Plan:
    grad, mask, _ = call.args
    if mask.dtype != torch.bool:
        raise Decline(f"a mask of {dtype_name(mask.dtype)}")
    inner = opmath(grad.dtype)
    operands = [as_operand(call, 0, grad.dtype), Operand(Arg(1), mask, torch.bool, torch.bool), as_operand(call, 2, grad.dtype, inner)]
    return build(call, masked_scale, operands, [grad.dtype])
