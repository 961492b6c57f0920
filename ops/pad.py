"""Reflection and replication pads over one to three dimensions, and their backward.

Reflection: ``out[o] = in[r(o - before)]`` with ``r(j) = |j|``, reflected at ``size - 1`` too; replication clamps
``o - before`` to the input. The backward of either sums, for each input, the outputs that are copies of it: at most
three under a reflection, a run at either edge under a replication. Source: the PyTorch documentation of
``ReflectionPad2d`` and ``ReplicationPad2d``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from gemsmode.ops.promotion import FLOAT
from gemsmode.ops.window import Dim, gather_kernel, gather_plan, like_suggested, result, sum_plan, window_sum_kernel
from gemsmode.plan import Arg, Decline, Plan, Size
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

# -- taps of one dimension: parameters are (input size, padding before, output size) -----------------------------------


@triton.jit
def _reflect(o, parameters):
    i = tl.abs(o - parameters[1])
    last = parameters[0] - 1
    return last - tl.abs(last - i)


@triton.jit
def reflection_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    i = _reflect(o, parameters)
    return i, 1.0, i >= 0


@triton.jit
def reflection_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """The copies of input i: itself, and its images before and behind."""
    last = parameters[0] - 1
    if t == 0:
        o = parameters[1] + i
        ok = o >= 0
    elif t == 1:
        o = parameters[1] - i
        ok = (o >= 0) & (i > 0)
    else:
        o = parameters[1] + 2 * last - i
        ok = (i < last) & (o >= 0)
    return o, 1.0, ok & (o < parameters[2])


@triton.jit
def replication_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    i = tl.minimum(tl.maximum(o - parameters[1], 0), parameters[0] - 1)
    return i, 1.0, i >= 0


@triton.jit
def replication_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """The copies of input i: one inside, a run that begins or ends at the output's edge for the first and last input."""
    own = i + parameters[1]
    first = tl.where(i == 0, tl.minimum(own, 0), own)
    end = tl.where(i == parameters[0] - 1, parameters[2], own + 1)
    o = first + t
    return o, 1.0, (o >= 0) & (o < end) & (o < parameters[2])


# -- rules -------------------------------------------------------------------------------------------------------------


def _channels_last(call: Call, x: TensorMeta, rank: int) -> bool:
    """CPU kernels keep the format of images and volumes; CUDA's write contiguous results."""
    return call.target.device_type == "cpu" and rank > 1 and like_suggested(x)


def _padded(call: Call, x: TensorMeta, pad: tuple[int, ...], rank: int, reflects: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The output's spatial sizes, and the padding (before, behind) of each spatial dimension.

    Raises:
        Decline: PyTorch rejects the call.
    """
    if len(pad) != 2 * rank or x.ndim not in (rank + 1, rank + 2) or 0 in x.shape[x.ndim - rank - 1:]:
        raise Decline("PyTorch rejects it: the number of dimensions, or an empty one other than the batch")
    pads = [(pad[2 * (rank - 1 - d)], pad[2 * (rank - 1 - d) + 1]) for d in range(rank)]
    sizes = x.shape[x.ndim - rank:]
    output = tuple([n + a + b for n, (a, b) in zip(sizes, pads)])
    if any(o < 1 for o in output):
        raise Decline("PyTorch rejects it: nothing is left of the input")
    if reflects and any(max(p) >= n for n, p in zip(sizes, pads)):
        raise Decline("PyTorch rejects it: a reflection that is larger than the input")
    if any(-min(p) >= n for n, p in zip(sizes, pads)):
        raise Decline("a crop of a whole dimension")
    return output, pads


def _pad(call: Call, rank: int, tap: Any) -> Plan:
    x, pad = call.args
    output, pads = _padded(call, x, pad, rank, tap is reflection_tap)
    lead = x.shape[:x.ndim - rank]
    dims = [Dim(1, (Size(n), Size(p[0]))) for n, p in zip(x.shape[x.ndim - rank:], pads)]
    return gather_plan(call, (Arg(0), x), result((*lead, *output), x.dtype, _channels_last(call, x, rank)), dims, tap, ())


def _pad_backward(call: Call, rank: int, tap: Any) -> Plan:
    grad, x, pad = call.args
    output, pads = _padded(call, x, pad, rank, tap is reflection_cover)
    if grad.shape != x.shape[:x.ndim - rank] + output or grad.dtype != x.dtype:
        raise Decline("PyTorch rejects it: the gradient does not fit the input")
    reflects = tap is reflection_cover
    dims = [Dim(3 if reflects else 1 + max(p[0], 0) + max(p[1], 0), (Size(n), Size(p[0]), Size(o)))
            for n, p, o in zip(x.shape[x.ndim - rank:], pads, output)]
    return sum_plan(call, (Arg(0), grad), result(x.shape, x.dtype, _channels_last(call, x, rank)), dims, tap, (), fixed=reflects)


_FLOATING = dtype(*FLOAT)


@planned("aten.reflection_pad1d.default", _FLOATING, family="padding", kernel=gather_kernel)
def reflection_pad1d(call: Call) -> Plan:
    return _pad(call, 1, reflection_tap)


@planned("aten.reflection_pad2d.default", _FLOATING, family="padding", kernel=gather_kernel)
def reflection_pad2d(call: Call) -> Plan:
    return _pad(call, 2, reflection_tap)


@planned("aten.reflection_pad3d.default", _FLOATING, family="padding", kernel=gather_kernel)
def reflection_pad3d(call: Call) -> Plan:
    return _pad(call, 3, reflection_tap)


@planned("aten.replication_pad1d.default", _FLOATING, family="padding", kernel=gather_kernel)
def replication_pad1d(call: Call) -> Plan:
    return _pad(call, 1, replication_tap)


@planned("aten.replication_pad2d.default", _FLOATING, family="padding", kernel=gather_kernel)
def replication_pad2d(call: Call) -> Plan:
    return _pad(call, 2, replication_tap)


@planned("aten.replication_pad3d.default", _FLOATING, family="padding", kernel=gather_kernel)
def replication_pad3d(call: Call) -> Plan:
    return _pad(call, 3, replication_tap)


@planned("aten.reflection_pad1d_backward.default", _FLOATING, family="padding", kernel=window_sum_kernel)
def reflection_pad1d_backward(call: Call) -> Plan:
    return _pad_backward(call, 1, reflection_cover)


@planned("aten.reflection_pad2d_backward.default", _FLOATING, family="padding", kernel=window_sum_kernel)
def reflection_pad2d_backward(call: Call) -> Plan:
    return _pad_backward(call, 2, reflection_cover)


@planned("aten.reflection_pad3d_backward.default", _FLOATING, family="padding", kernel=window_sum_kernel)
def reflection_pad3d_backward(call: Call) -> Plan:
    return _pad_backward(call, 3, reflection_cover)


@planned("aten.replication_pad1d_backward.default", _FLOATING, family="padding", kernel=window_sum_kernel)
def replication_pad1d_backward(call: Call) -> Plan:
    return _pad_backward(call, 1, replication_cover)


@planned("aten.replication_pad2d_backward.default", _FLOATING, family="padding", kernel=window_sum_kernel)
def replication_pad2d_backward(call: Call) -> Plan:
    return _pad_backward(call, 2, replication_cover)


@planned("aten.replication_pad3d_backward.default", _FLOATING, family="padding", kernel=window_sum_kernel)
def replication_pad3d_backward(call: Call) -> Plan:
    return _pad_backward(call, 3, replication_cover)
