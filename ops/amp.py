"""Gradient scaling of ``torch.amp.GradScaler``: gradients of a whole list of tensors are unscaled, and the scale is updated.

Shapes: lists of dense floating-point tensors of one dtype; the scale, its inverse, the flag and the count of steps are
tensors of one element, and stay on the device.

Source: ``torch.amp.GradScaler`` (documentation) and the schemas of the two ops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.foreach import MAX_TENSORS, _lists, _programs
from gemsmode.ops.pointwise import choose_flat
from gemsmode.ops.promotion import TRITON, opmath
from gemsmode.plan import Arg, Decline, Launch, Num, Plan, Size, extent
from gemsmode.predicates import dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta


@triton.jit
def unscale_kernel(grads, p_found, p_inverse, first, counts, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """``grads[k] *= inverse`` for each tensor k, and ``found = 1`` if one element was infinite or NaN before."""
    i_program = tl.program_id(0)
    inverse = tl.load(p_inverse)
    # As an integer: the interpreter broadcasts what a comparison of floating-point scalars gives as floating point.
    changes = (inverse != 1.0).to(tl.int32)
    for k in tl.static_range(len(grads)):
        if (i_program >= first[k]) & (i_program < first[k + 1]):
            i_block = i_program - first[k]
            if WIDE:
                i_block = i_block.to(tl.int64)
            o = i_block * BLOCK + tl.arange(0, BLOCK)
            m = o < counts[k]
            # [BLOCK]
            b_grad = tl.load(grads[k] + o, mask=m, other=0.0).to(COMPUTE)
            # Infinities and NaN are what is not 0 less itself. Every program that finds one writes the same.
            found = tl.max(((b_grad - b_grad) != 0.0).to(tl.int32), axis=0)
            tl.store(p_found, 1.0, mask=found != 0)
            tl.store(grads[k] + o, (b_grad * inverse.to(COMPUTE)).to(grads[k].dtype.element_ty), mask=m & (changes != 0))


@triton.jit
def update_scale_kernel(p_scale, p_tracker, p_found, growth, backoff, interval):
    """The next scale: backed off where something was not finite, grown after ``interval`` steps in a row that were."""
    scale = tl.load(p_scale)
    found = tl.load(p_found) != 0.0
    tracker = tl.load(p_tracker)
    due = tracker + 1 == interval
    grown = (scale.to(tl.float64) * growth).to(tl.float32)
    grown = tl.where((grown - grown) == 0.0, grown, scale)  # not beyond float32
    smaller = (scale.to(tl.float64) * backoff).to(tl.float32)
    tl.store(p_scale, tl.where(found, smaller, tl.where(due, grown, scale)))
    tl.store(p_tracker, tl.where(found | due, 0, tracker + 1))


def _single(call: Call, name: str, dtype: torch.dtype) -> TensorMeta:
    """The argument ``name``, which must be one element of ``dtype`` on the device."""
    meta: TensorMeta = call[name]
    if meta.numel != 1 or meta.dtype != dtype or meta.device.type != call.target.device_type:
        raise Decline(f"{name} is not one {dtype_name(dtype)} on the device")
    return meta


@planned("aten._amp_foreach_non_finite_check_and_unscale_.default", family="optimizer", kernel=unscale_kernel)
def unscale(call: Call) -> Plan:
    dtype, metas = _lists(call, [0])
    refs = {Arg(1): _single(call, "found_inf", torch.float32), Arg(2): _single(call, "inv_scale", torch.float32)}
    refs |= {Arg(0, k): m for k, m in enumerate(metas)}
    live = [k for k, m in enumerate(metas) if m.numel]
    launches = []
    for at in range(0, len(live), MAX_TENSORS):
        group = live[at:at + MAX_TENSORS]
        tile = choose_flat(sum(metas[k].numel for k in group), dtype.itemsize, call.target)
        first = _programs([metas[k] for k in group], tile.x)
        wide = any(metas[k].numel >= 2**31 - 2**17 for k in group)
        constants = Constants((("COMPUTE", TRITON[opmath(dtype)]), ("WIDE", wide), ("BLOCK", tile.x)))
        counts = tuple(extent(metas[k].numel) for k in group)
        args = (tuple(Arg(0, k) for k in group), Arg(1), Arg(2), tuple(Size(f) for f in first), counts)
        launches.append(Launch(unscale_kernel, (first[-1], 1, 1), args, constants, tile.warps))
    return Plan((), tuple(launches), None, refs, bytes=2 * sum(m.numel for m in metas) * dtype.itemsize)


@planned("aten._amp_update_scale_.default", family="optimizer", kernel=update_scale_kernel)
def update_scale(call: Call) -> Plan:
    refs = {Arg(0): _single(call, "self", torch.float32), Arg(1): _single(call, "growth_tracker", torch.int32),
            Arg(2): _single(call, "found_inf", torch.float32)}
    args = (Arg(0), Arg(1), Arg(2), Num(3, "fp64"), Num(4, "fp64"), Size(call["growth_interval"]))
    return Plan((), (Launch(update_scale_kernel, (1, 1, 1), args, Constants(()), 1),), Arg(0), refs, bytes=20)
