"""Fractional max pools, and the unpooling of max pools.

A fractional pool's windows of ``k`` elements begin at ``floor((o + u) * a) - floor(u * a)`` with ``a = (I - k) / (O - 1)``
and a random ``u`` for each plane and dimension (the last one ends with the input). Whatever ``u`` is, a window begins less
than one element from ``o * a``, so the backward knows without it which windows may hold an input, and their indices say
which did. Unpooling scatters: where indices repeat, PyTorch leaves open which value stays. Source: the PyTorch
documentation of ``FractionalMaxPool2d`` and ``MaxUnpool2d``; B. Graham, Fractional Max-Pooling (2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.pointwise import convert
from gemsmode.ops.pool import Pool, max_backward_plan, max_pool_backward_kernel
from gemsmode.ops.promotion import ALL, FLOAT
from gemsmode.ops.window import base, choose_tile, divide, like_suggested, place, result, spatial, spatial_strides, walk
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

_FLOATING_INPUT = dtype(*FLOAT, arg="self")

# -- fractional pools --------------------------------------------------------------------------------------------------


@triton.jit
def _begin(o, p_sample, m, size, output, kernel, DTYPE: tl.constexpr):
    """Where window o begins."""
    u = tl.load(p_sample, mask=m, other=0).to(DTYPE)
    a = divide((size - kernel).to(DTYPE), tl.maximum(output - 1, 1).to(DTYPE))
    begin = ((o.to(DTYPE) + u) * a).to(tl.int32) - (u * a).to(tl.int32)
    return tl.where(o == output - 1, size - kernel, begin)


@triton.jit
def fractional_kernel(p_out, p_index, p_in, p_sample, n_rows, n_columns, sizes, batch, out_steps, out_strides, in_steps, in_strides,
                      sample_steps, sample_offsets, in_sizes, kernels, ACC: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
                      BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """The largest element of each window and its position, over three dimensions. Grid: (row blocks, column blocks)."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    p_u = p_sample + base(rest, x, batch, sample_steps, CHANNELS)
    m_rows = rest >= 0
    w0 = _begin(at[0], p_u + sample_offsets[0], m_rows & m, in_sizes[0], sizes[0], kernels[0], ACC)
    h0 = _begin(at[1], p_u + sample_offsets[1], m_rows & m, in_sizes[1], sizes[1], kernels[1], ACC)
    d0 = _begin(at[2], p_u + sample_offsets[2], m_rows & m, in_sizes[2], sizes[2], kernels[2], ACC)
    o_in = base(rest, x, batch, in_steps, CHANNELS)
    best = tl.full(m.shape, float("-inf"), ACC)
    where = tl.broadcast_to((d0 * in_sizes[1] + h0) * in_sizes[0] + w0, m.shape)
    for kd in range(kernels[2]):
        for kh in range(kernels[1]):
            for kw in range(kernels[0]):
                o = o_in + (d0 + kd) * in_strides[2] + (h0 + kh) * in_strides[1] + (w0 + kw) * in_strides[0]
                b = tl.load(p_in + o, mask=m, other=float("-inf")).to(ACC)
                take = (b > best) | (b != b)
                best = tl.where(take, b, best)
                where = tl.where(take, ((d0 + kd) * in_sizes[1] + (h0 + kh)) * in_sizes[0] + w0 + kw, where)
    o_out = base(rest, x, batch, out_steps, CHANNELS) + spatial(at, out_strides)
    tl.store(p_out + o_out, convert(best, p_out.dtype.element_ty), mask=m)
    tl.store(p_index + o_out, where.to(tl.int64), mask=m)


@triton.jit
def fractional_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """Window t of those that may hold input i: they begin at i - k or behind, so o * a is i - k at least."""
    first = (tl.maximum(i - parameters[2], 0) * (parameters[1] - 1)) // tl.maximum(parameters[0] - parameters[2], 1)
    return first + t, 1.0, first + t < parameters[1]


def _fractional_sizes(x: TensorMeta, kernel: Sequence[int], output: Sequence[int], rank: int) -> None:
    sizes = x.shape[x.ndim - rank:]
    if x.ndim not in (rank + 1, rank + 2) or len(kernel) != rank or len(output) != rank:
        raise Decline("PyTorch rejects it: the number of dimensions")
    if any(n < 1 for n in (*x.shape[x.ndim - rank - 1:], *kernel, *output)):
        raise Decline("PyTorch rejects it: sizes must be positive")
    spare = 1 if rank == 3 else 0  # volumes need one element more than images
    if any(o + k - 1 + spare > n for n, k, o in zip(sizes, kernel, output)):
        raise Decline("PyTorch rejects it: kernels are too large for the input")
    if any(n * (o + 1) >= 2**31 for n, o in zip(sizes, output)):
        raise Decline("sizes whose product does not fit in 32 bits")


def _fractional(call: Call, rank: int) -> Plan:
    x, kernel, output, samples = call.args
    _fractional_sizes(x, kernel, output, rank)
    lead = x.ndim - rank
    images = x.shape[0] if lead == 2 else 1
    if samples.dtype != x.dtype or samples.ndim != 3 or samples.shape[0] < images or samples.shape[1:] != (x.shape[lead - 1], rank):
        raise Decline("PyTorch rejects it: the random samples do not fit the input")
    out = result((*x.shape[:lead], *output), x.dtype, False)
    allocs = (out, out._replace(dtype=torch.int64))
    metas = {Arg(0): x, Arg(3): samples}
    n = out.meta.numel
    if n == 0:
        return Plan(allocs, (), (Out(0), Out(1)), metas, bytes=0)
    # Images are volumes of depth 1; the first sample is that of the last dimension for images, of the first for volumes.
    flat = rank == 2

    def volume(shape: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return (*shape[:lead], fill, *shape[lead:]) if flat else shape

    volumes = Alloc(volume(out.shape, 1), volume(out.stride, 0), x.dtype)
    source = x._replace(shape=volume(x.shape, 1), stride=volume(x.stride, 0))
    planes = TensorMeta(x.dtype, (*x.shape[:lead], 1, 1, 1), (*samples.stride[2 - lead:2], 0, 0, 0), x.device)
    view = walk(volumes, 3, [source, planes])
    tile = choose_tile(view.rows, view.columns, 9, call.target)
    step = samples.stride[2]
    offsets = tuple([Size(d * step) for d in ((0, 1, 0) if flat else (2, 1, 0))])
    args = (Out(0), Out(1), Arg(0), Arg(3), *view.head(), view.steps(volumes.stride, 3), spatial_strides(volumes.stride, 3),
            view.steps(source.stride, 3), spatial_strides(source.stride, 3), view.steps(planes.stride, 3), offsets,
            tuple([Size(s) for s in reversed(source.shape[lead:])]),
            tuple([Size(k) for k in reversed(volume((*x.shape[:lead], *kernel), 1)[lead:])]))
    constants = (("ACC", tl.float64 if x.dtype == torch.float64 else tl.float32), ("CHANNELS", view.channels), ("WIDE", view.wide),
                 ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    return Plan(allocs, (Launch(fractional_kernel, view.grid(tile), args, Constants(constants), tile.warps),), (Out(0), Out(1)), metas,
                bytes=x.numel * x.dtype.itemsize + n * (x.dtype.itemsize + 8))


def _fractional_backward(call: Call, rank: int) -> Plan:
    grad, x, kernel, output, index = call.args
    _fractional_sizes(x, kernel, output, rank)
    sizes = x.shape[x.ndim - rank:]
    covers = tuple([1 if o == 1 else (k + 1) * (o - 1) // (n - k) + 2 for n, k, o in zip(sizes, kernel, output)])
    pool = Pool(None, None, None, fractional_cover, None, None, (), tuple(kernel), covers, False, None,
                tuple([(Size(n), Size(o), Size(k)) for n, k, o in zip(sizes, kernel, output)]), tuple(output))
    return max_backward_plan(call, (Arg(0), grad), (Arg(4), index), x, pool, False)


@planned("aten.fractional_max_pool2d.default", _FLOATING_INPUT, family="pool", kernel=fractional_kernel)
def fractional_max_pool2d(call: Call) -> Plan:
    return _fractional(call, 2)


@planned("aten.fractional_max_pool3d.default", _FLOATING_INPUT, family="pool", kernel=fractional_kernel)
def fractional_max_pool3d(call: Call) -> Plan:
    return _fractional(call, 3)


@planned("aten.fractional_max_pool2d_backward.default", _FLOATING_INPUT, family="pool", kernel=max_pool_backward_kernel)
def fractional_max_pool2d_backward(call: Call) -> Plan:
    return _fractional_backward(call, 2)


@planned("aten.fractional_max_pool3d_backward.default", _FLOATING_INPUT, family="pool", kernel=max_pool_backward_kernel)
def fractional_max_pool3d_backward(call: Call) -> Plan:
    return _fractional_backward(call, 3)


# -- unpooling ---------------------------------------------------------------------------------------------------------


@triton.jit
def unpool_kernel(p_out, p_in, p_index, n_rows, n_columns, sizes, batch, in_steps, in_strides, index_steps, index_strides, out_steps,
                  out_step, out_size, CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Each input goes to its index in the output's plane. Grid: (row blocks, column blocks) of the input."""
    m, at, rest, x = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
    index = tl.load(p_index + (base(rest, x, batch, index_steps, CHANNELS) + spatial(at, index_strides)), mask=m, other=0)
    tl.device_assert((index >= 0) & (index < out_size), "max_unpool: index out of range", mask=m)
    b = tl.load(p_in + (base(rest, x, batch, in_steps, CHANNELS) + spatial(at, in_strides)), mask=m)
    o_out = base(rest, x, batch, out_steps, CHANNELS)
    tl.store(p_out + (o_out + index * out_step), b, mask=m & (index >= 0) & (index < out_size))


def _unpool(call: Call, rank: int) -> Plan:
    if torch.are_deterministic_algorithms_enabled():
        raise Decline("torch.use_deterministic_algorithms: repeated indices have no order")
    x, index, output = call.args[:3]
    lead = x.ndim - rank
    if lead not in (1, 2) or len(output) != rank or index.shape != x.shape or index.dtype != torch.int64:
        raise Decline("PyTorch rejects it: the number of dimensions, or the indices")
    if any(n == 0 for n in x.shape[1:]) or any(o < 1 for o in output):
        raise Decline("an empty dimension")
    if rank == 3 and (len(call.args[3]) != 3 or len(call.args[4]) != 3 or any(s < 1 for s in call.args[3])):
        raise Decline("PyTorch rejects it: strides and paddings are three positive numbers")
    if rank == 3:
        stride, padding = call.args[3], call.args[4]
        for n, o, s, p in zip(x.shape[lead:], output, stride, padding):
            if not (n - 1) * s - 2 * p - s < o < (n + 1) * s - 2 * p + s:
                raise Decline("sizes of the output that do not follow from stride and padding")
    # As in pads, only CPU kernels keep the format of images.
    channels_last = call.target.device_type == "cpu" and rank == 2 and like_suggested(x, 4)
    out = result((*x.shape[:lead], *output), x.dtype, channels_last)._replace(zero=True)
    metas = {Arg(0): x, Arg(1): index}
    if x.numel == 0:
        return Plan((out,), (), Out(0), metas, bytes=0)
    size = 1
    for o in output:
        size *= o
    # The input is what is walked; the output's planes are operands like others.
    walked = Alloc(x.shape, x.stride, x.dtype)
    planes = TensorMeta(x.dtype, x.shape, (*out.stride[:lead], *(0,) * rank), x.device)
    view = walk(walked, rank, [index, planes])
    view = view._replace(wide=view.wide or out.meta.numel >= 2**31 - 2**17)
    tile = choose_tile(view.rows, view.columns, 2, call.target)
    args = (Out(0), Arg(0), Arg(1), *view.head(), view.steps(x.stride, rank), spatial_strides(x.stride, rank),
            view.steps(index.stride, rank), spatial_strides(index.stride, rank), view.steps(planes.stride, rank),
            Size(out.stride[-1]), Size(size))
    constants = (("CHANNELS", view.channels), ("WIDE", view.wide), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    launch = Launch(unpool_kernel, view.grid(tile), args, Constants(constants), tile.warps, asserts=True)
    return Plan((out,), (launch,), Out(0), metas, bytes=x.numel * (8 + x.dtype.itemsize) + 2 * out.meta.numel * x.dtype.itemsize)


_ANY_INPUT = dtype(*[d for d in ALL if d != torch.bool], arg="self")
_STATE = (torch.are_deterministic_algorithms_enabled,)


@planned("aten.max_unpool2d.default", _ANY_INPUT, family="pool", kernel=unpool_kernel, state=_STATE)
def max_unpool2d(call: Call) -> Plan:
    return _unpool(call, 2)


@planned("aten.max_unpool3d.default", _ANY_INPUT, family="pool", kernel=unpool_kernel, state=_STATE)
def max_unpool3d(call: Call) -> Plan:
    return _unpool(call, 3)
