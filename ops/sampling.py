"""Sampling with a parameter for each element: normal, bernoulli, poisson, rrelu; multinomial and random permutations.

The random words are those of ``random.py``: one key a call, Philox counters by element.

Source: the PyTorch documentation of each op. Poisson: inversion for rates below 10 and Hörmann's transformed rejection
(PTRS, "The transformed rejection method for generating Poisson random variables", 1993) above. ``multinomial`` without
replacement: the race of exponential clocks (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
``randperm`` of many: a Feistel cipher whose blocks are the positions, walked until it stays inside (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.creation import _plain
from gemsmode.ops.indexing import contiguous
from gemsmode.ops.layout import broadcast_shape, preserved_strides
from gemsmode.ops.pointwise import convert, power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, INT, TRITON, opmath
from gemsmode.ops.random import WIDE, counters, draw, drawn, normal, philox, positive_unit, uniform, unit_double
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import Predicate, dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

# -- one parameter or two for each element -----------------------------------------------------------------------------


@triton.jit
def _given(p, o, m, TENSOR: tl.constexpr, COMPUTE: tl.constexpr):
    """A parameter of each element: from a tensor, or one number for all."""
    if TENSOR:
        return tl.load(p + o, mask=m, other=0.0).to(COMPUTE)
    else:
        return tl.broadcast_to(tl.cast(p, COMPUTE), o.shape)


@triton.jit
def scaled_normal(z, mean, std):
    return mean + std * z


@triton.jit
def below(u, p, unused):
    return (u < p).to(u.dtype)


@triton.jit
def parameter_kernel(p_out, p_seed, n, a, b, DIST: tl.constexpr, FINISH: tl.constexpr, TENSORS: tl.constexpr, CHECK: tl.constexpr,
                     COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """n values of FINISH(a standard variable, a, b), with parameters of each element. Grid: blocks of counters."""
    DOUBLE: tl.constexpr = COMPUTE == tl.float64
    VALUES: tl.constexpr = 2 * BLOCK if DOUBLE else 4 * BLOCK
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * VALUES + tl.arange(0, VALUES)
    m = o < n
    b_a = _given(a, o, m, TENSORS[0], COMPUTE)
    b_b = _given(b, o, m, TENSORS[1], COMPUTE)
    if CHECK == 1:
        inside = (b_a >= 0.0) & (b_a <= 1.0)
        tl.device_assert((m & (inside == 0)) == 0, "probabilities must be between 0 and 1")
    elif CHECK == 2:
        positive = b_b >= 0.0
        tl.device_assert((m & (positive == 0)) == 0, "standard deviations must not be negative")
    value = draw(DIST, tl.load(p_seed), i_block * BLOCK + tl.arange(0, BLOCK), 0.0, 1.0, DOUBLE, BLOCK)
    tl.store(p_out + o, convert(FINISH(value, b_a, b_b), p_out.dtype.element_ty), mask=m)


def _each(call: Call, out: Alloc | Arg, meta: TensorMeta, a: int | None, b: int | None, distribution: Any, finish: Any, check: int,
          compute: torch.dtype) -> Plan:
    """The plan of ``parameter_kernel`` into a contiguous tensor; a and b: numbers of arguments, tensors or numbers."""
    n = meta.numel
    ref, allocs, seed = drawn(call, out)
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    metas: dict[Any, TensorMeta] = {} if isinstance(out, Alloc) else {out: meta}
    launches: tuple[Launch, ...] = ()
    given: list[Any] = []
    tensors = tuple(i is not None and isinstance(call.args[i], TensorMeta) for i in (a, b))
    kind = "fp64" if compute == torch.float64 else "fp32"
    for index in (a, b):
        if index is None:
            given.append(0.0)
        elif isinstance(call.args[index], TensorMeta):
            source, copies, copying = contiguous(call, index, len(allocs), meta.shape)
            allocs, launches, metas[Arg(index)] = (*allocs, *copies), (*launches, *copying), call.args[index]
            given.append(source)
        else:
            given.append(Num(index, kind))
    values = 2 if compute == torch.float64 else 4
    block, _ = counters(n, values, call.target)
    launch = Launch(parameter_kernel, (-(-n // (values * block)), 1, 1), (ref, Out(seed), extent(n), *given),
                    Constants((("DIST", distribution), ("FINISH", finish), ("TENSORS", tensors), ("CHECK", check),
                               ("COMPUTE", TRITON[compute]), ("WIDE", n >= WIDE), ("BLOCK", block))), asserts=check != 0)
    return Plan(allocs, (*launches, launch), ref, metas, bytes=2 * n * meta.dtype.itemsize)


def _new(call: Call, shape: tuple[int, ...], kind: torch.dtype, strides: tuple[int, ...] | None = None) -> tuple[Alloc, TensorMeta]:
    alloc = Alloc(shape, contiguous_strides(shape) if strides is None else strides, kind)
    return alloc, alloc.meta


def _floats(call: Call, *indices: int) -> torch.dtype:
    kinds = {call.args[i].dtype for i in indices}
    if len(kinds) > 1 or not kinds <= set(FLOAT):
        raise Decline("parameters of different dtypes, or not of real floats")
    return kinds.pop()


@planned("aten.normal.Tensor_Tensor", family="random", kernel=parameter_kernel)
def normal_tensors(call: Call) -> Plan:
    """mean and std, broadcast together."""
    kind = _floats(call, 0, 1)
    out, meta = _new(call, broadcast_shape([call.args[0].shape, call.args[1].shape]), kind)
    return _each(call, out, meta, 0, 1, normal, scaled_normal, 2, opmath(kind))


@planned("aten.normal.Tensor_float", family="random", kernel=parameter_kernel, by_value=("std",))
def normal_tensor_float(call: Call) -> Plan:
    if not call.args[1] >= 0:
        raise Decline("PyTorch rejects it: a negative standard deviation")
    kind = _floats(call, 0)
    out, meta = _new(call, call.args[0].shape, kind)
    return _each(call, out, meta, 0, 1, normal, scaled_normal, 0, opmath(kind))


@planned("aten.normal.float_Tensor", family="random", kernel=parameter_kernel)
def normal_float_tensor(call: Call) -> Plan:
    kind = _floats(call, 1)
    out, meta = _new(call, call.args[1].shape, kind)
    return _each(call, out, meta, 0, 1, normal, scaled_normal, 2, opmath(kind))


@planned("aten.bernoulli.default", dtype(*FLOAT), family="random", kernel=parameter_kernel)
def bernoulli(call: Call) -> Plan:
    """self holds the probability of each element."""
    x = call.args[0]
    if not x.is_contiguous:
        raise Decline("probabilities that are not contiguous, whose layout the result follows")
    out, meta = _new(call, x.shape, x.dtype)
    return _each(call, out, meta, 0, None, uniform, below, 1, opmath(x.dtype))


def _bernoulli_of(call: Call) -> Plan:
    x, p = call.args[:2]
    if p.dtype not in FLOAT or broadcast_shape([x.shape, p.shape]) != x.shape:
        raise Decline("probabilities that are not floats, or of a larger shape")
    if not x.is_contiguous:
        raise Decline("a tensor that is not contiguous")
    if parameters(call.op)[0].is_written:
        return _each(call, Arg(0), x, 1, None, uniform, below, 1, opmath(p.dtype))
    out, meta = _new(call, x.shape, x.dtype)
    return _each(call, out, meta, 1, None, uniform, below, 1, opmath(p.dtype))


@planned(["aten.bernoulli_.Tensor", "aten.bernoulli.Tensor"], dtype(*FLOAT, *INT, torch.bool, arg="self"), family="random",
         kernel=parameter_kernel)
def bernoulli_tensor(call: Call) -> Plan:
    """self is filled by the probabilities ``p``."""
    return _bernoulli_of(call)


# -- rrelu -------------------------------------------------------------------------------------------------------------


@triton.jit
def rrelu_kernel(p_out, p_noise, p_x, p_seed, n, low, high, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Negative elements times a random slope in [low, high); the slopes (1 for the others) are the noise. Grid: blocks of counters."""
    DOUBLE: tl.constexpr = COMPUTE == tl.float64
    VALUES: tl.constexpr = 2 * BLOCK if DOUBLE else 4 * BLOCK
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * VALUES + tl.arange(0, VALUES)
    m = o < n
    b = tl.load(p_x + o, mask=m).to(COMPUTE)
    counter = i_block * BLOCK + tl.arange(0, BLOCK)
    slope = draw(uniform, tl.load(p_seed), counter, tl.cast(low, COMPUTE), tl.cast(high, COMPUTE), DOUBLE, BLOCK)
    slope = tl.where(b <= 0, slope, 1.0)
    tl.store(p_out + o, convert(b * slope, p_out.dtype.element_ty), mask=m)
    tl.store(p_noise + o, convert(slope, p_noise.dtype.element_ty), mask=m)


@planned("aten.rrelu_with_noise_functional.default", dtype(*FLOAT), family="random", kernel=rrelu_kernel)
def rrelu_with_noise_functional(call: Call) -> Plan:
    """self, noise, lower, upper, training -> (output, noise)."""
    x, noise, _, _, training, _ = call.args
    if not training:
        raise Decline("no training: it is a leaky_relu")
    if noise.shape != x.shape or noise.dtype != x.dtype or not x.is_contiguous or not noise.is_contiguous:
        raise Decline("a tensor or noise that is not contiguous, or that differ in shape or dtype")
    n = x.numel
    out = Alloc(x.shape, preserved_strides(x), x.dtype)
    ref, allocs, seed = drawn(call, out)
    allocs = (*allocs, Alloc(noise.shape, preserved_strides(noise), noise.dtype))
    returns = (ref, Out(len(allocs) - 1))
    if n == 0:
        return Plan(allocs, (), returns, {}, bytes=0)
    compute = opmath(x.dtype)
    kind, values = ("fp64", 2) if compute == torch.float64 else ("fp32", 4)
    block, _ = counters(n, values, call.target)
    launch = Launch(rrelu_kernel, (-(-n // (values * block)), 1, 1),
                    (ref, returns[1], Arg(0), Out(seed), extent(n), Num(2, kind), Num(3, kind)),
                    Constants((("COMPUTE", TRITON[compute]), ("WIDE", n >= WIDE), ("BLOCK", block))))
    return Plan(allocs, (launch,), returns, {Arg(0): x}, bytes=3 * n * x.dtype.itemsize)


# -- poisson -----------------------------------------------------------------------------------------------------------


@triton.jit
def _log_factorial(k):
    """log(k!) in float64 for k >= 0: Stirling's series at k + 5, less the logarithm of the factors in between."""
    z = k + 5.0
    inverse = 1.0 / z
    i2 = inverse * inverse
    series = inverse * (0.08333333333333333 + i2 * (-0.002777777777777778 + i2 * (0.0007936507936507937 - i2 * 0.0005952380952380953)))
    between = (k + 1.0) * (k + 2.0) * (k + 3.0) * (k + 4.0)
    return (z - 0.5) * tl.log(z) - z + 0.9189385332046727 + series - tl.log(between)


@triton.jit
def poisson_kernel(p_out, p_rate, p_seed, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One value a Philox counter, of the rate of each element; further attempts draw from further streams. Grid: blocks."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    rate = tl.load(p_rate + o, mask=m, other=0.0).to(tl.float64)
    positive = rate >= 0.0
    tl.device_assert((m & (positive == 0)) == 0, "rates must not be negative")
    seed = tl.load(p_seed)
    small = rate < 10.0

    # Inversion: the first k at which the sum of probabilities passes a uniform variable.
    r0, r1, _r2, _r3 = philox(seed, o, 0)
    u = unit_double(r0, r1)
    term = tl.exp(-tl.where(small, rate, 0.0))
    total = term
    value = tl.zeros((BLOCK,), tl.float64)
    going = m & small & (u >= total)
    while tl.max(going.to(tl.int32)) > 0:
        value = tl.where(going, value + 1.0, value)
        term = tl.where(going, term * rate / tl.maximum(value, 1.0), term)
        total = tl.where(going, total + term, total)
        # What rounding leaves beyond the last probability that counts is given to it.
        going = going & (u >= total) & ((value < rate) | (term > 1e-18))

    # Rejection from a transformed uniform variable.
    large = tl.where(small, 10.0, rate)
    b = 0.931 + 2.53 * tl.sqrt(large)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    log_rate = tl.log(large)
    waiting = m & (small == 0)
    stream = 1
    while tl.max(waiting.to(tl.int32)) > 0:
        s0, s1, s2, s3 = philox(seed, o, stream)
        stream += 1
        x = unit_double(s0, s1) - 0.5
        v = unit_double(s2, s3) + 1.1102230246251565e-16
        distance = tl.maximum(0.5 - tl.abs(x), 1e-300)
        k = tl.floor((2.0 * a / distance + b) * x + large + 0.43)
        fast = (distance >= 0.07) & (v <= v_r)
        refused = (k < 0.0) | ((distance < 0.013) & (v > distance))
        at = tl.maximum(k, 0.0)
        fits = tl.log(v * inverse_alpha / (a / (distance * distance) + b)) <= at * log_rate - large - _log_factorial(at)
        taken = waiting & (fast | ((refused == 0) & fits))
        value = tl.where(taken, k, value)
        waiting = waiting & (taken == 0)
    tl.store(p_out + o, convert(value.to(tl.float32) if p_out.dtype.element_ty != tl.float64 else value, p_out.dtype.element_ty), mask=m)


@planned("aten.poisson.default", dtype(*FLOAT), family="random", kernel=poisson_kernel)
def poisson(call: Call) -> Plan:
    """self holds the rate of each element."""
    x = call.args[0]
    out = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    ref, allocs, seed = drawn(call, out)
    n = x.numel
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    source, copies, copying = contiguous(call, 0, len(allocs))
    block = min(power_of_2(n), 1 << 16) if call.target.interpreted else 256
    launch = Launch(poisson_kernel, (-(-n // block), 1, 1), (ref, source, Out(seed), extent(n)),
                    Constants((("WIDE", n >= WIDE), ("BLOCK", block))), asserts=True)
    return Plan((*allocs, *copies), (*copying, launch), ref, {Arg(0): x}, bytes=2 * n * x.dtype.itemsize)


# -- multinomial -------------------------------------------------------------------------------------------------------


@triton.jit
def _checked(b, m):
    """Probabilities as they are, if they are none below 0, infinite or NaN."""
    fine = (b >= 0.0) & (b < float("inf"))
    tl.device_assert((m & (fine == 0)) == 0, "probability tensor contains either inf, nan or element < 0")


@triton.jit
def race_kernel(p_key, p_x, p_seed, n_columns, row_stride, column_stride, BLOCK: tl.constexpr):
    """key[r, c] = x[r, c] over an exponential variable; -1 where x is 0, which never wins. Grid: (rows, blocks of columns)."""
    i_row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = c < n_columns
    b = tl.load(p_x + i_row * row_stride + c * column_stride, mask=m, other=0.0).to(tl.float32)
    _checked(b, m)
    r0, _r1, _r2, _r3 = philox(tl.load(p_seed), i_row * n_columns + c, 0)
    wait = tl.maximum(-tl.log(positive_unit(r0)), 5.9604644775390625e-08)
    tl.store(p_key + i_row * n_columns + c, tl.where(b > 0.0, b / wait, -1.0), mask=m)


@triton.jit
def winners_kernel(p_out, p_key, n_columns, count, BLOCK: tl.constexpr):
    """The columns of the ``count`` greatest keys of a row, greatest first, the lower column first among equals. Grid: rows."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_key + i_row * n_columns
    # Each round looks for the greatest that comes after the last one found.
    last = tl.full((), float("inf"), tl.float32)
    last_column = tl.full((), -1, tl.int32)
    for j in range(0, count):
        best = tl.full((BLOCK,), -2.0, tl.float32)
        where = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, n_columns, BLOCK):
            c = first + tl.arange(0, BLOCK)
            b = tl.load(p_row + c, mask=c < n_columns, other=-2.0)
            after = (b < last) | ((b == last) & (c > last_column))
            better = after & (b > best)
            where = tl.where(better, c, where)
            best = tl.where(better, b, best)
        last = tl.max(best, 0)
        last_column = tl.min(tl.where(best == last, where, n_columns), 0)
        # Beyond the first, columns of probability 0 fill what is missing, as in PyTorch.
        tl.device_assert((j > 0) | (last > 0.0), "invalid multinomial distribution (sum of probabilities <= 0)")
        tl.store(p_out + i_row * count + j, last_column.to(tl.int64))


@triton.jit
def totals_kernel(p_sum, p_x, n_columns, row_stride, column_stride, BLOCK: tl.constexpr):
    """sum[r, c] = x[r, 0] + ... + x[r, c] in float64. Grid: rows."""
    i_row = tl.program_id(0).to(tl.int64)
    before = tl.zeros((), tl.float64)
    for first in range(0, n_columns, BLOCK):
        c = first + tl.arange(0, BLOCK)
        m = c < n_columns
        b = tl.load(p_x + i_row * row_stride + c * column_stride, mask=m, other=0.0).to(tl.float64)
        _checked(b, m)
        tl.store(p_sum + i_row * n_columns + c, before + tl.cumsum(b, 0), mask=m)
        before += tl.sum(b, 0)
    tl.device_assert(before > 0.0, "invalid multinomial distribution (sum of probabilities <= 0)")


@triton.jit
def pick_kernel(p_out, p_sum, p_seed, n_columns, count, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """out[r, j] = the first column whose sum passes a uniform share of the row's. Grid: (rows, blocks of samples)."""
    i_row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = j < count
    p_row = p_sum + i_row * n_columns
    r0, r1, _r2, _r3 = philox(tl.load(p_seed), i_row * count + j, 0)
    wanted = unit_double(r0, r1) * tl.load(p_row + n_columns - 1)
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + (n_columns - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        passed = tl.load(p_row + middle, mask=m, other=0.0) > wanted
        low = tl.where((low < high) & (passed == 0), middle + 1, low)
        high = tl.where((low <= high) & passed, middle, high)
    tl.store(p_out + i_row * count + j, low.to(tl.int64), mask=m)


MAX_ROUNDS = 1024
"""Samples without replacement that are found one after the other."""


@planned("aten.multinomial.default", dtype(*FLOAT), family="random", kernel=pick_kernel)
def multinomial(call: Call) -> Plan:
    """self [..., C] of weights, num_samples, replacement -> columns, int64 [..., num_samples]."""
    x, count, replacement, _ = call.args
    if x.ndim not in (1, 2) or count <= 0 or 0 in x.shape or (not replacement and count > x.shape[-1]):
        raise Decline("PyTorch rejects it, or a result without elements")
    columns = x.shape[-1]
    rows = x.shape[0] if x.ndim == 2 else 1
    if columns >= 1 << 24:
        raise Decline("PyTorch rejects it: more than 2^24 categories")
    out = Alloc((*x.shape[:-1], count), contiguous_strides((*x.shape[:-1], count)), torch.int64)
    ref, allocs, seed = drawn(call, out)
    metas: dict[Any, TensorMeta] = {Arg(0): x}
    target: Target = call.target
    strides = (stride(x.stride[0]) if x.ndim == 2 else Size(0), x.stride[-1])
    block = min(power_of_2(columns), 1 << 16 if target.interpreted else 1024)
    aside = Out(len(allocs))
    if replacement and count > 1:
        samples = min(power_of_2(count), 1 << 16 if target.interpreted else 256)
        launches: tuple[Launch, ...] = (
            Launch(totals_kernel, (rows, 1, 1), (aside, Arg(0), Size(columns), *strides), Constants((("BLOCK", block),)), asserts=True),
            Launch(pick_kernel, (rows, -(-count // samples), 1), (ref, aside, Out(seed), Size(columns), Size(count)),
                   Constants((("STEPS", columns.bit_length()), ("BLOCK", samples)))))
        return Plan((*allocs, Alloc((rows, columns), (columns, 1), torch.float64)), launches, ref, metas)
    if count > MAX_ROUNDS:
        raise Decline(f"{count} samples without replacement; at most {MAX_ROUNDS} are found one after the other")
    wide = min(power_of_2(columns), 1 << 16 if target.interpreted else 4096)
    launches = (Launch(race_kernel, (rows, -(-columns // block), 1), (aside, Arg(0), Out(seed), Size(columns), *strides),
                       Constants((("BLOCK", block),)), asserts=True),
                Launch(winners_kernel, (rows, 1, 1), (ref, aside, Size(columns), Size(count)), Constants((("BLOCK", wide),)), 8,
                       asserts=True))
    return Plan((*allocs, Alloc((rows, columns), (columns, 1), torch.float32)), launches, ref, metas)


# -- permutations ------------------------------------------------------------------------------------------------------


@triton.jit
def _position_key(seed, o, n, BLOCK: tl.constexpr):
    """51 random bits for each position, and the position; what is beyond n comes last."""
    r0, r1, _r2, _r3 = philox(seed, o, 0)
    return tl.where(o < n, ((r0.to(tl.int64) << 19) | (r1 >> 13).to(tl.int64)) * BLOCK + o, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def ranked_kernel(p_out, p_seed, n, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """A permutation of a few: each position's rank among the random keys of all. Grid: blocks of SHARE positions."""
    seed = tl.load(p_seed)
    o = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    own = _position_key(seed, o, n, BLOCK)
    every = _position_key(seed, tl.arange(0, BLOCK), n, BLOCK)
    rank = tl.sum((every[None, :] < own[:, None]).to(tl.int32), 1)  # [SHARE]
    tl.store(p_out + o, convert(rank.to(tl.int64), p_out.dtype.element_ty), mask=o < n)


@triton.jit
def _mixed(x, key, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """One round of an unbalanced Feistel cipher on LEFT + RIGHT bits: the halves change places, one mixed with the other."""
    left = x >> RIGHT
    right = x & ((1 << RIGHT) - 1)
    h = (right.to(tl.uint64) ^ key.to(tl.uint64)) * 0xD2511F53
    h = ((h >> 32) ^ h).to(tl.uint32)
    h = (h ^ (h >> 15)).to(tl.uint64) * 0xCD9E8D57
    h = ((h >> 32) ^ h).to(tl.uint32)
    return (right << LEFT) | (left ^ (h & ((1 << LEFT) - 1)))


@triton.jit
def permuted_kernel(p_out, p_seed, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = a random permutation's value at i: a cipher of BITS-bit blocks, applied until the block is below n. Grid: blocks."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    seed = tl.load(p_seed)
    LEFT: tl.constexpr = BITS // 2
    RIGHT: tl.constexpr = BITS - LEFT
    x = tl.where(m, o, 0).to(tl.uint32)
    going = m
    while tl.max(going.to(tl.int32)) > 0:
        y = x
        for i in tl.static_range(6):
            # Four keys of a Philox counter make four rounds; after an even number the halves are in their places.
            k0, k1, k2, k3 = philox(seed, tl.full((1,), i, tl.int32), 0)
            y = _mixed(y, k0, LEFT, RIGHT)
            y = _mixed(y, k1, RIGHT, LEFT)
            y = _mixed(y, k2, LEFT, RIGHT)
            y = _mixed(y, k3, RIGHT, LEFT)
        x = tl.where(going, y, x)
        going = going & (x >= n)
    tl.store(p_out + o, convert(x.to(tl.int64), p_out.dtype.element_ty), mask=m)


RANKED = 2048
"""Positions that are ranked by random keys against each other."""


@planned(["aten.randperm.default", "aten.randperm.generator"], Predicate("strided, not pinned", _plain), family="random",
         kernel=permuted_kernel)
def randperm(call: Call) -> Plan:
    """n -> a random permutation of 0 .. n - 1."""
    n, kind = call["n"], call["dtype"]
    kind = kind if isinstance(kind, torch.dtype) else torch.int64
    exact = 2 ** {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[kind] if kind.is_floating_point else (
        torch.iinfo(kind).max if kind in INT else 0)
    if kind not in ALL or not 0 <= n <= exact or n > 2**30:
        raise Decline(f"PyTorch rejects it, or more than 2^30: {n} positions as {dtype_name(kind)}")
    out = Alloc((n,), (1,), kind)
    ref, allocs, seed = drawn(call, out)
    if n == 0:
        return Plan(allocs, (), ref, {}, bytes=0)
    if n <= RANKED:
        block = max(power_of_2(n), 16)
        share = min(block, (1 << 20) // block) if call.target.interpreted else min(block, 8)
        launch = Launch(ranked_kernel, (-(-n // share), 1, 1), (ref, Out(seed), Size(n)), Constants((("SHARE", share), ("BLOCK", block))))
    else:
        block = min(power_of_2(n), 1 << 16) if call.target.interpreted else 256
        launch = Launch(permuted_kernel, (-(-n // block), 1, 1), (ref, Out(seed), extent(n)),
                        Constants((("BITS", (n - 1).bit_length()), ("BLOCK", block))))
    return Plan(allocs, (launch,), ref, {}, bytes=n * kind.itemsize)

