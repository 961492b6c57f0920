"""Group norm and batch norm: norms with one weight a channel, forward and backward.

``y = (x - mean) * rstd * w[c] + b[c]``, with statistics over a group's channels and positions of one sample (group
norm, instance norm) or over all samples and positions of a channel (batch norm).

A group that fits in a tile is read once. A longer one is read twice by its program; where there are too few groups
to fill the device, and always in batch norm, the statistics of a group or channel are gathered by several programs:
each leaves count, mean and sum of squared deviations in a workspace, and the programs that write the result combine
these first. Backward does the same with ``sum g`` and ``sum g * (x - mean)``. Nothing is atomic, and the order of the
additions depends on the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.layout import output_strides
from gemsmode.ops.norm import combine, finite, looks_channels_last, optional, parameter_dtype, suggested_strides, sum_runs, welford
from gemsmode.ops.promotion import FLOAT, TRITON, opmath
from gemsmode.ops.rows import INTERPRETED_BLOCK, LONGEST, Rows, is_wide, ladder, power_of_2, sizes_argument, split_rows, unravel, warps
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- group norm: kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _group_tile(t, channels, spatial, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Channels [BLOCK_C] of the group, positions [BLOCK_S] and mask of tile number `t`."""
    tiles = tl.cdiv(spatial, BLOCK_S)
    o_channel = (t // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_spot = (t % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    return o_channel, o_spot, (o_channel < channels)[:, None] & (o_spot < spatial)[None, :]


@triton.jit
def _group_load(p_in, t, tiles, channels, spatial, c_stride, s_stride, EVICT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Tile number `t` as it lies in memory; zeros from number `tiles` on."""
    o_channel, o_spot, mask = _group_tile(t, channels, spatial, BLOCK_C, BLOCK_S)
    o = (o_channel * c_stride)[:, None] + (o_spot * s_stride)[None, :]
    return tl.load(p_in + o, mask=mask & (t < tiles), other=0.0, eviction_policy=EVICT)


@triton.jit
def _group_base(i_unit, groups, channels, c_stride, n_stride, WIDE: tl.constexpr):
    """Offset of a group's first element, and its first channel."""
    i_sample = i_unit // groups
    first = (i_unit % groups) * channels
    if WIDE:
        return i_sample.to(tl.int64) * n_stride + first.to(tl.int64) * c_stride, first
    else:
        return i_sample * n_stride + first * c_stride, first


@triton.jit
def _channel_affine(h, weight, bias, o_channel, m_channel):
    if len(weight) == 1:
        h = h * tl.load(weight[0] + o_channel, mask=m_channel, other=0.0).to(h.dtype)[:, None]
    if len(bias) == 1:
        h = h + tl.load(bias[0] + o_channel, mask=m_channel, other=0.0).to(h.dtype)[:, None]
    return h


@triton.jit
def _group_statistics(p_in, shift, i_split, splits, channels, spatial, c_stride, s_stride, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
                      BLOCK_S: tl.constexpr):
    """Count, mean and sum of squared deviations of every `splits`-th tile of a group; the mean is relative to `shift`.

    Sums of deviations from the first tile's mean: among T tiles its distance from the mean of all is at most sqrt(T) standard
    deviations, so that little cancels.
    """
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(spatial, BLOCK_S)
    # Each tile is on its way while the one before is worked on.
    ahead = _group_load(p_in, i_split, tiles, channels, spatial, c_stride, s_stride, "evict_last", BLOCK_C, BLOCK_S)
    _, _, mask = _group_tile(i_split, channels, spatial, BLOCK_C, BLOCK_S)
    filled = tl.sum(tl.sum(mask.to(tl.int32), axis=1), axis=0)
    centre = finite(tl.sum(tl.sum(tl.where(mask, ahead.to(ACC) - shift, 0.0), axis=1), axis=0) / filled)
    count = 0
    sums = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    squares = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for t in range(i_split, tiles, splits):
        x = ahead.to(ACC)
        ahead = _group_load(p_in, t + splits, tiles, channels, spatial, c_stride, s_stride, "evict_last", BLOCK_C, BLOCK_S)
        _, _, mask = _group_tile(t, channels, spatial, BLOCK_C, BLOCK_S)
        deviation = tl.where(mask, x - shift - centre, 0.0)
        sums += deviation
        squares += deviation * deviation
        in_row = tl.cdiv(spatial, BLOCK_S)
        count += tl.minimum(channels - (t // in_row) * BLOCK_C, BLOCK_C) * tl.minimum(spatial - (t % in_row) * BLOCK_S, BLOCK_S)
    n = tl.cast(count, ACC)
    total = tl.sum(tl.sum(sums, axis=1), axis=0)
    square = tl.sum(tl.sum(squares, axis=1), axis=0) - total * (total / n)
    return n, centre + total / n, tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_apply(p_to, p_in, weight, bias, shift, mean, rstd, first, i_split, splits, channels, spatial, c_stride, s_stride,
                 ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Write every `splits`-th tile of a group; its mean is `shift + mean`."""
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(spatial, BLOCK_S)
    ahead = _group_load(p_in, i_split, tiles, channels, spatial, c_stride, s_stride, "evict_first", BLOCK_C, BLOCK_S)
    for t in range(i_split, tiles, splits):
        x = ahead.to(ACC)
        ahead = _group_load(p_in, t + splits, tiles, channels, spatial, c_stride, s_stride, "evict_first", BLOCK_C, BLOCK_S)
        o_channel, o_spot, mask = _group_tile(t, channels, spatial, BLOCK_C, BLOCK_S)
        o = (o_channel * c_stride)[:, None] + (o_spot * s_stride)[None, :]
        y = _channel_affine((x - shift - mean) * rstd, weight, bias, first + o_channel, o_channel < channels)
        tl.store(p_to + o, y.to(p_to.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_kernel(p_y, p_mean, p_rstd, p_x, weight, bias, eps, groups, channels, spatial, n_stride, c_stride, s_stride,
                      ONE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """One program a group; ONE: the group is one tile, read once. Grid: samples * groups."""
    i_unit = tl.program_id(0)
    base, first = _group_base(i_unit, groups, channels, c_stride, n_stride, WIDE)
    if ONE:
        o_channel, o_spot, mask = _group_tile(0, channels, spatial, BLOCK_C, BLOCK_S)
        o = base + (o_channel * c_stride)[:, None] + (o_spot * s_stride)[None, :]
        # [BLOCK_C, BLOCK_S]
        x = tl.load(p_x + o, mask=mask, other=0.0).to(ACC)
        mean = tl.sum(tl.sum(x, axis=1), axis=0) / (channels * spatial)
        x = tl.where(mask, x - mean, 0.0)
        # A mean far from zero was rounded in its sum; the mean of the centred values is not.
        rest = tl.sum(tl.sum(x, axis=1), axis=0) / (channels * spatial)
        variance = tl.sum(tl.sum(x * x, axis=1), axis=0) / (channels * spatial) - rest * rest
        rstd = tl.rsqrt(variance + tl.cast(eps, ACC))
        y = _channel_affine((x - rest) * rstd, weight, bias, first + o_channel, o_channel < channels)
        tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=mask)
        mean = mean + rest
    else:
        shift = finite(tl.load(p_x + base).to(ACC))
        count, mean, square = _group_statistics(p_x + base, shift, 0, 1, channels, spatial, c_stride, s_stride, ACC, BLOCK_C, BLOCK_S)
        rstd = tl.rsqrt(square / count + tl.cast(eps, ACC))
        _group_apply(p_y + base, p_x + base, weight, bias, shift, mean, rstd, first, 0, 1, channels, spatial, c_stride, s_stride, ACC,
                     BLOCK_C, BLOCK_S)
        mean = mean + shift
    tl.store(p_mean + i_unit, mean.to(p_mean.dtype.element_ty))
    tl.store(p_rstd + i_unit, rstd.to(p_rstd.dtype.element_ty))


@triton.jit
def group_statistics_kernel(p_parts, p_x, groups, channels, spatial, n_stride, c_stride, s_stride, ACC: tl.constexpr,
                            WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Statistics of each program's share of a group. Grid: samples * groups, splits."""
    i_unit = tl.program_id(0)
    i_split = tl.program_id(1)
    splits = tl.num_programs(1)
    base, _ = _group_base(i_unit, groups, channels, c_stride, n_stride, WIDE)
    shift = finite(tl.load(p_x + base).to(ACC))
    count, mean, square = _group_statistics(p_x + base, shift, i_split, splits, channels, spatial, c_stride, s_stride, ACC,
                                            BLOCK_C, BLOCK_S)
    p_part = p_parts + (i_unit * splits + i_split) * 3
    tl.store(p_part, count)
    tl.store(p_part + 1, mean)
    tl.store(p_part + 2, square)


@triton.jit
def group_apply_kernel(p_y, p_mean, p_rstd, p_x, p_parts, weight, bias, eps, groups, channels, spatial, n_stride, c_stride, s_stride,
                       ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr):
    """Combine a group's statistics and write each program's share. Grid: samples * groups, splits."""
    i_unit = tl.program_id(0)
    i_split = tl.program_id(1)
    splits = tl.num_programs(1)
    base, first = _group_base(i_unit, groups, channels, c_stride, n_stride, WIDE)
    o_part = tl.arange(0, BLOCK_P)
    m_part = o_part < splits
    p_part = p_parts + (i_unit * splits + o_part) * 3
    count, mean, square = combine(tl.load(p_part, mask=m_part, other=0.0), tl.load(p_part + 1, mask=m_part, other=0.0),
                                  tl.load(p_part + 2, mask=m_part, other=0.0), 0)
    rstd = tl.rsqrt(square / count + tl.cast(eps, ACC))
    shift = finite(tl.load(p_x + base).to(ACC))
    if i_split == 0:
        tl.store(p_mean + i_unit, (mean + shift).to(p_mean.dtype.element_ty))
        tl.store(p_rstd + i_unit, rstd.to(p_rstd.dtype.element_ty))
    _group_apply(p_y + base, p_x + base, weight, bias, shift, mean, rstd, first, i_split, splits, channels, spatial, c_stride, s_stride,
                 ACC, BLOCK_C, BLOCK_S)


@triton.jit
def group_sums_kernel(p_sums, p_sums_h, p_g, p_x, p_mean, p_rstd, groups, channels, spatial, n_stride, c_stride, s_stride,
                      ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Per sample and channel the sums of g and of g * h over the positions. Grid: samples * groups, blocks of channels."""
    i_unit = tl.program_id(0)
    i_block = tl.program_id(1)
    base, _ = _group_base(i_unit, groups, channels, c_stride, n_stride, WIDE)
    mean = tl.load(p_mean + i_unit).to(ACC)
    rstd = tl.load(p_rstd + i_unit).to(ACC)
    o_channel = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    sums = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    sums_h = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for start in range(0, spatial, BLOCK_S):
        o_spot = start + tl.arange(0, BLOCK_S)
        mask = m_channel[:, None] & (o_spot < spatial)[None, :]
        o = base + (o_channel * c_stride)[:, None] + (o_spot * s_stride)[None, :]
        g = tl.load(p_g + o, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        x = tl.load(p_x + o, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        sums += g
        sums_h += g * tl.where(mask, (x - mean) * rstd, 0.0)
    o_out = i_unit * channels + o_channel
    tl.store(p_sums + o_out, tl.sum(sums, axis=1), mask=m_channel)
    tl.store(p_sums_h + o_out, tl.sum(sums_h, axis=1), mask=m_channel)


@triton.jit
def group_gradient_kernel(p_dx, p_sums, p_sums_h, p_g, p_x, p_mean, p_rstd, weight, groups, channels, spatial, n_stride, c_stride,
                          s_stride, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
                          BLOCK_P: tl.constexpr):
    """dx of each program's share of a group, from the sums. Grid: samples * groups, splits."""
    i_unit = tl.program_id(0)
    base, first = _group_base(i_unit, groups, channels, c_stride, n_stride, WIDE)
    mean = tl.load(p_mean + i_unit).to(ACC)
    rstd = tl.load(p_rstd + i_unit).to(ACC)
    lanes = tl.zeros([BLOCK_P], ACC)
    lanes_h = tl.zeros([BLOCK_P], ACC)
    for start in range(0, channels, BLOCK_P):
        o_channel = start + tl.arange(0, BLOCK_P)
        m_channel = o_channel < channels
        b_sum = tl.load(p_sums + i_unit * channels + o_channel, mask=m_channel, other=0.0)
        b_sum_h = tl.load(p_sums_h + i_unit * channels + o_channel, mask=m_channel, other=0.0)
        if len(weight) == 1:
            w = tl.load(weight[0] + first + o_channel, mask=m_channel, other=0.0).to(ACC)
            b_sum = b_sum * w
            b_sum_h = b_sum_h * w
        lanes += b_sum
        lanes_h += b_sum_h
    mean_v = tl.sum(lanes, axis=0) / (channels * spatial)
    mean_vh = tl.sum(lanes_h, axis=0) / (channels * spatial)
    for t in range(tl.program_id(1), tl.cdiv(channels, BLOCK_C) * tl.cdiv(spatial, BLOCK_S), tl.num_programs(1)):
        o_channel, o_spot, mask = _group_tile(t, channels, spatial, BLOCK_C, BLOCK_S)
        o = base + (o_channel * c_stride)[:, None] + (o_spot * s_stride)[None, :]
        v = tl.load(p_g + o, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(p_x + o, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        v = _channel_affine(v, weight, (), first + o_channel, o_channel < channels)
        dx = (v - mean_v - (x - mean) * rstd * mean_vh) * rstd
        tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=mask)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelTile:
    """A program's step: channels by positions, and its warps of 32 threads."""

    channels: int
    spots: int
    warps: int


_WARPS = ((2048, 4), (8192, 8), (16384, 16), (1 << 30, 32))
_GROUP_STEP = 8192  # elements of a step of group norm: 32 a thread
_SPLIT_STEP = 2048  # the same where programs share a group: 8 a thread, so that four programs share a multiprocessor
_STEP = 4096  # elements of a step where a group takes several: 16 a thread, each with three running values


def choose_channels(channels: int, spots: int, channels_fast: bool, step: int, itemsize: int, target: Target,
                    a_warp: int | None = None) -> ChannelTile:
    """The tile of at most ``step`` elements of 4 bytes, half of 8; the fast dimension is served first.

    ``a_warp``: elements for each warp, if not as many as for tiles that are taken whole.
    """
    scale = itemsize // 4
    most = INTERPRETED_BLOCK // 4 if target.interpreted else step // scale
    if channels_fast:
        c = min(power_of_2(channels), most if target.interpreted else 64)
        s = min(power_of_2(spots), most // c)
    else:
        s = min(power_of_2(spots), most)
        c = min(power_of_2(channels), most // s)
    return ChannelTile(c, s, max(c * s * scale // a_warp, 1) if a_warp and not target.interpreted else ladder(_WARPS, c * s * scale))


def _group_whole(channels: int, spatial: int, itemsize: int, target: Target) -> ChannelTile | None:
    """The tile of a whole group, if it fits."""
    c, s = power_of_2(channels), power_of_2(spatial)
    limit = INTERPRETED_BLOCK if target.interpreted else LONGEST * 4 // itemsize
    return ChannelTile(c, s, ladder(_WARPS, c * s * itemsize // 4)) if c * s <= limit else None


def _splits(units: int, tiles: int, target: Target) -> int:
    """Programs for each of ``units`` groups of ``tiles`` tiles, so that the device is filled twice over."""
    wanted = 2 if target.interpreted else -(-2 * target.multiprocessors // units)
    return max(min(wanted, tiles, 256), 1)


# -- group norm: plans -------------------------------------------------------------------------------------------------


def _group_shape(call: Call, x: TensorMeta) -> tuple[int, int, int, tuple[int, int, int]]:
    """Samples, channels a group, positions, and the strides of sample, channel and position.

    Raises:
        Decline: PyTorch rejects the call, or there is nothing to normalize.
    """
    samples, all_channels, spatial, groups = call["N"], call["C"], call["HxW"], call["group"]
    if groups <= 0 or all_channels % groups or x.numel != samples * all_channels * spatial:
        raise Decline("PyTorch rejects it: sizes that do not fit the input")
    channels = all_channels // groups
    if channels * spatial >= 2**31 - 2**17:
        raise Decline("a group of 2^31 or more elements")
    if call.target.device_type == "cpu" and looks_channels_last(x):
        if x.stride != suggested_strides(x) and not _dense_as(x, suggested_strides(x)):
            raise Decline("PyTorch rejects it: an input that is not contiguous")
        return samples, channels, spatial, (all_channels * spatial, 1, all_channels)
    if not x.is_contiguous:
        raise Decline("PyTorch rejects it: an input that is not contiguous")
    return samples, channels, spatial, (all_channels * spatial, spatial, 1)


def _dense_as(meta: TensorMeta, strides: tuple[int, ...]) -> bool:
    return all(size == 1 or s == e for size, s, e in zip(meta.shape, meta.stride, strides))


def _per_channel(meta: TensorMeta | None, count: int) -> None:
    if meta is not None and (meta.numel != count or not meta.is_contiguous):
        raise Decline("a parameter that is not one contiguous value a channel")


@planned("aten.native_group_norm.default", dtype(*FLOAT), family="norm", kernel=group_norm_kernel)
def group_norm(call: Call) -> Plan:
    x, w, b = call["input"], call["weight"], call["bias"]
    parameter = parameter_dtype(x, (w, b), call.target)
    samples, channels, spatial, strides = _group_shape(call, x)
    groups, target = call["group"], call.target
    _per_channel(w, channels * groups)
    _per_channel(b, channels * groups)
    y = suggested_strides(x) if target.device_type == "cpu" else contiguous_strides(x.shape)
    pair = (samples, groups)
    allocs = [Alloc(x.shape, y, x.dtype), *[Alloc(pair, contiguous_strides(pair), parameter)] * 2]
    metas: dict[Arg, TensorMeta] = {Arg(0): x}
    if x.numel == 0:
        if samples and groups:
            raise Decline("groups of no elements")
        return Plan(tuple(allocs), (), (Out(0), Out(1), Out(2)), metas, bytes=0, flops=0)
    acc = opmath(x.dtype)
    units = samples * groups
    weights, biases = optional(w, Arg(1), metas), optional(b, Arg(2), metas)
    eps = Num(7, "fp64" if x.dtype == torch.float64 else "fp32")
    sizes = (Size(groups), channels, spatial, *strides)
    constants = (("ACC", TRITON[acc]), ("WIDE", is_wide(x)))
    whole = _group_whole(channels, spatial, acc.itemsize, target)
    step = _GROUP_STEP if _splits(units, 2, target) == 1 else _SPLIT_STEP
    tile = whole or choose_channels(channels, spatial, strides[1] == 1 and spatial > 1, step, acc.itemsize, target, step // 8)
    blocks = (("BLOCK_C", tile.channels), ("BLOCK_S", tile.spots))
    tiles = -(-channels // tile.channels) * -(-spatial // tile.spots)
    splits = 1 if whole else _splits(units, tiles, target)
    if splits == 1:
        launches = [Launch(group_norm_kernel, (units, 1, 1), (Out(0), Out(1), Out(2), Arg(0), weights, biases, eps, *sizes),
                           (("ONE", whole is not None), *constants, *blocks), warps(tile.warps, target))]
    else:
        allocs.append(Alloc((units * splits * 3,), (1,), acc))
        launches = [
            Launch(group_statistics_kernel, (units, splits, 1), (Out(3), Arg(0), *sizes), (*constants, *blocks), warps(tile.warps, target)),
            Launch(group_apply_kernel, (units, splits, 1), (Out(0), Out(1), Out(2), Arg(0), Out(3), weights, biases, eps, *sizes),
                   (*constants, *blocks, ("BLOCK_P", power_of_2(splits))), warps(tile.warps, target))]
    return Plan(tuple(allocs), tuple(launches), (Out(0), Out(1), Out(2)), metas, bytes=2 * x.numel * x.dtype.itemsize, flops=x.numel * 8)


@planned("aten.native_group_norm_backward.default", dtype(*FLOAT), family="norm", kernel=group_gradient_kernel)
def group_norm_backward(call: Call) -> Plan:
    g, x, mean, rstd, w = call.args[:5]
    wants_dx, wants_dw, wants_db = call["output_mask"]
    if w is None and (wants_dw or wants_db):
        raise Decline("PyTorch rejects it: the gradient of a parameter that is not given")
    parameter = parameter_dtype(x, (w,), call.target)
    if g.dtype != x.dtype or g.shape != x.shape or not mean.dtype == rstd.dtype == parameter:
        raise Decline("operands of several dtypes or shapes")
    samples, channels, spatial, strides = _group_shape(call, x)
    if not _dense_as(g, x.stride):
        raise Decline("grad_out and input differ in strides")
    groups, target = call["group"], call.target
    count = channels * groups
    for meta in (mean, rstd):
        if meta.numel != samples * groups or not meta.is_contiguous:
            raise Decline("saved statistics that are not one contiguous value a group")
    _per_channel(w, count)
    y = suggested_strides(x) if target.device_type == "cpu" else contiguous_strides(x.shape)
    allocs: list[Alloc] = []
    results: list[Out | None] = []
    per_channel = ((count,), (1,), parameter)
    for wanted, (shape, stride, kind) in ((wants_dx, (x.shape, y, x.dtype)), (wants_dw, per_channel), (wants_db, per_channel)):
        results.append(Out(len(allocs)) if wanted else None)
        if wanted:
            allocs.append(Alloc(shape, stride, kind, zero=x.numel == 0))
    metas: dict[Arg, TensorMeta] = {Arg(0): g, Arg(1): x, Arg(2): mean, Arg(3): rstd}
    if x.numel == 0 or not allocs:
        return Plan(tuple(allocs), (), tuple(results), metas, bytes=0, flops=0)
    acc = opmath(x.dtype)
    units = samples * groups
    weights = optional(w, Arg(4), metas)
    sums, sums_h = Out(len(allocs)), Out(len(allocs) + 1)
    allocs += [Alloc((samples * count,), (1,), acc)] * 2
    sizes = (Size(groups), channels, spatial, *strides)
    constants = (("ACC", TRITON[acc]), ("WIDE", is_wide(x)))
    tile = choose_channels(channels, spatial, strides[1] == 1 and spatial > 1, _STEP, acc.itemsize, target)
    blocks = (("BLOCK_C", tile.channels), ("BLOCK_S", tile.spots))
    launches = [Launch(group_sums_kernel, (units, -(-channels // tile.channels), 1),
                       (sums, sums_h, Arg(0), Arg(1), Arg(2), Arg(3), *sizes), (*constants, *blocks), warps(tile.warps, target))]
    if results[0] is not None:
        tiles = -(-channels // tile.channels) * -(-spatial // tile.spots)
        launches.append(Launch(
            group_gradient_kernel, (units, _splits(units, tiles, target), 1),
            (results[0], sums, sums_h, Arg(0), Arg(1), Arg(2), Arg(3), weights, *sizes),
            (*constants, *blocks, ("BLOCK_P", min(power_of_2(channels), 1024))), warps(tile.warps, target)))
    wanted = [(r, s) for r, s in ((results[1], sums_h), (results[2], sums)) if r is not None]
    if wanted:
        launches.append(sum_runs(tuple([r for r, _ in wanted]), tuple([s for _, s in wanted]), samples, count, acc, target))
    return Plan(tuple(allocs), tuple(launches), tuple(results), metas, bytes=x.numel * x.dtype.itemsize * (2 + wants_dx),
                flops=x.numel * 12)


# -- batch norm: kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _spots(t, inner, outer, BLOCK_S: tl.constexpr):
    """Positions [BLOCK_S] along the inner dimension and the index of the outer ones, of tile number `t` of a channel."""
    tiles = tl.cdiv(inner, BLOCK_S)
    return (t % tiles) * BLOCK_S + tl.arange(0, BLOCK_S), t // tiles


@triton.jit
def _spot_offsets(o_spot, i_outer, outer, s_stride, strides, WIDE: tl.constexpr):
    if WIDE:
        o_spot = o_spot.to(tl.int64)
        i_outer = i_outer.to(tl.int64)
    if len(outer) == 0:
        return o_spot * s_stride
    else:
        return o_spot * s_stride + unravel(i_outer, outer, strides)


@triton.jit
def channel_statistics_kernel(p_parts, p_x, n_channels, tiles, inner, outer, c_stride, s_stride, strides, ACC: tl.constexpr,
                              WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Count, mean and sum of squared deviations of each program's share of its channels. Grid: blocks of channels, splits.

    p_parts: [splits, 3, channels]; means are relative to the channel's first value.
    """
    i_split = tl.program_id(1)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        o_channel = o_channel.to(tl.int64)
    m_channel = o_channel < n_channels
    p_in = p_x + (o_channel * c_stride)[:, None]
    shift = finite(tl.load(p_in, mask=m_channel[:, None], other=0.0).to(ACC))
    count = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    mean = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    square = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for t in range(i_split, tiles, tl.num_programs(1)):
        o_spot, i_outer = _spots(t, inner, outer, BLOCK_S)
        mask = m_channel[:, None] & (o_spot < inner)[None, :]
        x = tl.load(p_in + _spot_offsets(o_spot, i_outer, outer, s_stride, strides, WIDE)[None, :], mask=mask, other=0.0).to(ACC)
        count, mean, square = welford(count, mean, square, x - shift, mask)
    n, centre, deviation = combine(count, mean, square, 1)
    p_part = p_parts + i_split * 3 * n_channels + o_channel
    tl.store(p_part, n, mask=m_channel)
    tl.store(p_part + n_channels, centre, mask=m_channel)
    tl.store(p_part + 2 * n_channels, deviation, mask=m_channel)


@triton.jit
def batch_norm_kernel(p_y, saved, running, updated, p_x, parts, weight, bias, momentum, eps, n_channels, splits, tiles, inner, outer,
                      yc_stride, ys_stride, y_strides, c_stride, s_stride, strides, COPY: tl.constexpr, ACC: tl.constexpr,
                      WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr):
    """Normalize. Grid: blocks of channels, programs that share the tiles of a channel.

    With `parts` (training) the statistics are combined from them; without, they are the running ones. The first program
    of a channel writes the `saved` mean and 1 / std and the `updated` running mean and variance, where there are any.
    COPY: `updated` gets the running statistics as they are.
    """
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        o_channel = o_channel.to(tl.int64)
    m_channel = o_channel < n_channels
    if len(parts) == 1:
        o_part = tl.arange(0, BLOCK_P)
        m_part = (o_part < splits)[:, None] & m_channel[None, :]
        # [BLOCK_P, BLOCK_C]
        p_part = parts[0] + (o_part * 3 * n_channels)[:, None] + o_channel[None, :]
        count, mean, square = combine(tl.load(p_part, mask=m_part, other=0.0), tl.load(p_part + n_channels, mask=m_part, other=0.0),
                                      tl.load(p_part + 2 * n_channels, mask=m_part, other=0.0), 0)
        invstd = tl.rsqrt(square / count + tl.cast(eps, ACC))
        shift = finite(tl.load(p_x + o_channel * c_stride, mask=m_channel, other=0.0).to(ACC))
    else:
        shift = tl.zeros([BLOCK_C], ACC)
        mean = tl.load(running[0] + o_channel, mask=m_channel, other=0.0).to(ACC)
        invstd = tl.rsqrt(tl.load(running[1] + o_channel, mask=m_channel, other=1.0).to(ACC) + tl.cast(eps, ACC))
    if tl.program_id(1) == 0:
        if len(saved) == 2:
            tl.store(saved[0] + o_channel, (mean + shift).to(saved[0].dtype.element_ty), mask=m_channel)
            tl.store(saved[1] + o_channel, invstd.to(saved[1].dtype.element_ty), mask=m_channel)
        if len(updated) == 2:
            old_mean = tl.load(running[0] + o_channel, mask=m_channel, other=0.0).to(ACC)
            old_variance = tl.load(running[1] + o_channel, mask=m_channel, other=0.0).to(ACC)
            if not COPY:
                share = tl.cast(momentum, ACC)
                old_mean = old_mean * (1.0 - share) + (mean + shift) * share
                old_variance = old_variance * (1.0 - share) + square / (count - 1.0) * share
            tl.store(updated[0] + o_channel, old_mean.to(updated[0].dtype.element_ty), mask=m_channel)
            tl.store(updated[1] + o_channel, old_variance.to(updated[1].dtype.element_ty), mask=m_channel)
    p_in = p_x + (o_channel * c_stride)[:, None]
    p_to = p_y + (o_channel * yc_stride)[:, None]
    for t in range(tl.program_id(1), tiles, tl.num_programs(1)):
        o_spot, i_outer = _spots(t, inner, outer, BLOCK_S)
        mask = m_channel[:, None] & (o_spot < inner)[None, :]
        x = tl.load(p_in + _spot_offsets(o_spot, i_outer, outer, s_stride, strides, WIDE)[None, :], mask=mask, other=0.0).to(ACC)
        y = _channel_affine((x - shift[:, None] - mean[:, None]) * invstd[:, None], weight, bias, o_channel, m_channel)
        tl.store(p_to + _spot_offsets(o_spot, i_outer, outer, ys_stride, y_strides, WIDE)[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def channel_sums_kernel(p_parts, p_g, p_x, p_mean, n_channels, tiles, inner, outer, gc_stride, gs_stride, g_strides, c_stride, s_stride,
                        strides, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sums of g and g * (x - mean) of each program's share of its channels. Grid: blocks of channels, splits.

    p_parts: [splits, 2, channels].
    """
    i_split = tl.program_id(1)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        o_channel = o_channel.to(tl.int64)
    m_channel = o_channel < n_channels
    mean = tl.load(p_mean + o_channel, mask=m_channel, other=0.0).to(ACC)[:, None]
    sums = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    sums_x = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for t in range(i_split, tiles, tl.num_programs(1)):
        o_spot, i_outer = _spots(t, inner, outer, BLOCK_S)
        mask = m_channel[:, None] & (o_spot < inner)[None, :]
        o_g = (o_channel * gc_stride)[:, None] + _spot_offsets(o_spot, i_outer, outer, gs_stride, g_strides, WIDE)[None, :]
        o_x = (o_channel * c_stride)[:, None] + _spot_offsets(o_spot, i_outer, outer, s_stride, strides, WIDE)[None, :]
        g = tl.load(p_g + o_g, mask=mask, other=0.0).to(ACC)
        sums += g
        sums_x += g * tl.where(mask, tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC) - mean, 0.0)
    p_part = p_parts + i_split * 2 * n_channels + o_channel
    tl.store(p_part, tl.sum(sums, axis=1), mask=m_channel)
    tl.store(p_part + n_channels, tl.sum(sums_x, axis=1), mask=m_channel)


@triton.jit
def batch_norm_backward_kernel(dx, dw, db, p_g, p_x, p_mean, p_spread, parts, weight, eps, n_channels, splits, count, tiles, inner, outer,
                               dc_stride, ds_stride, d_strides, gc_stride, gs_stride, g_strides, c_stride, s_stride, strides,
                               TRAIN: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
                               BLOCK_P: tl.constexpr):
    """dx, dw and db, whichever are wanted. Grid: blocks of channels, programs that share the tiles of a channel.

    p_spread: saved 1 / std in training, else the running variance.
    """
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        o_channel = o_channel.to(tl.int64)
    m_channel = o_channel < n_channels
    invstd = tl.load(p_spread + o_channel, mask=m_channel, other=1.0).to(ACC)
    if not TRAIN:
        invstd = tl.rsqrt(invstd + tl.cast(eps, ACC))
    if len(parts) == 1:
        o_part = tl.arange(0, BLOCK_P)
        m_part = (o_part < splits)[:, None] & m_channel[None, :]
        # [BLOCK_P, BLOCK_C]
        p_part = parts[0] + (o_part * 2 * n_channels)[:, None] + o_channel[None, :]
        total = tl.sum(tl.load(p_part, mask=m_part, other=0.0), axis=0)
        total_x = tl.sum(tl.load(p_part + n_channels, mask=m_part, other=0.0), axis=0)
        if tl.program_id(1) == 0:
            if len(dw) == 1:
                tl.store(dw[0] + o_channel, (total_x * invstd).to(dw[0].dtype.element_ty), mask=m_channel)
            if len(db) == 1:
                tl.store(db[0] + o_channel, total.to(db[0].dtype.element_ty), mask=m_channel)
    if len(dx) == 1:
        scale = _channel_affine(invstd[:, None], weight, (), o_channel, m_channel)
        if TRAIN:
            mean = tl.load(p_mean + o_channel, mask=m_channel, other=0.0).to(ACC)[:, None]
            shift = (total / count)[:, None]
            slope = (total_x / count * invstd * invstd)[:, None]
        for t in range(tl.program_id(1), tiles, tl.num_programs(1)):
            o_spot, i_outer = _spots(t, inner, outer, BLOCK_S)
            mask = m_channel[:, None] & (o_spot < inner)[None, :]
            o_g = (o_channel * gc_stride)[:, None] + _spot_offsets(o_spot, i_outer, outer, gs_stride, g_strides, WIDE)[None, :]
            g = tl.load(p_g + o_g, mask=mask, other=0.0).to(ACC)
            if TRAIN:
                o_x = (o_channel * c_stride)[:, None] + _spot_offsets(o_spot, i_outer, outer, s_stride, strides, WIDE)[None, :]
                g = g - shift - (tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC) - mean) * slope
            o_dx = (o_channel * dc_stride)[:, None] + _spot_offsets(o_spot, i_outer, outer, ds_stride, d_strides, WIDE)[None, :]
            tl.store(dx[0] + o_dx, (g * scale).to(dx[0].dtype.element_ty), mask=mask)


# -- batch norm: plans -------------------------------------------------------------------------------------------------


def _new_strides(x: TensorMeta, target: Target) -> tuple[int, ...]:
    """Strides of a new result: PyTorch keeps the suggested memory format on CPU, the very strides on GPU."""
    return suggested_strides(x) if target.device_type == "cpu" else output_strides(x.shape, [x])


@dataclass(frozen=True)
class Channels:
    """A batch norm's input as channels by positions, and how programs share it.

    Attributes:
        rows: the merged dimensions; rows are channels, columns positions.
        channels: number of channels.
        tile: a program's step.
        tiles: steps of a block of channels.
        splits: programs that gather a channel's sums.
        writers: programs that write a channel.
    """

    rows: Rows
    channels: int
    tile: ChannelTile
    tiles: int
    splits: int
    writers: int

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.tile.channels)

    def strides(self, operand: int) -> tuple[Any, ...]:
        """The channel's, the inner and the outer positions' strides of an operand, as kernel arguments."""
        inner, *outer = self.rows.column_strides[operand]
        return self.rows.row_strides[operand][0], inner, tuple(outer)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Tiles, inner size and outer sizes, as kernel arguments."""
        return Size(self.tiles), self.rows.column_sizes[0], sizes_argument(self.rows.column_sizes[1:])


def _channels(x: TensorMeta, operands: list[tuple[int, ...]], target: Target) -> Channels:
    if x.ndim < 2 or x.numel == 0:
        raise Decline("fewer than two dimensions, or no elements")
    rows = split_rows(x.shape, [d for d in range(x.ndim) if d != 1], operands)
    channels, inner = x.shape[1], rows.column_sizes[0]
    fast = rows.row_strides[-1][0] == 1 and inner > 1 and rows.column_strides[-1][0] != 1
    tile = choose_channels(channels, inner, fast, 2048, opmath(x.dtype).itemsize, target)
    tiles = -(-inner // tile.spots) * (rows.n_columns // inner)
    blocks = -(-channels // tile.channels)
    if target.interpreted:
        return Channels(rows, channels, tile, tiles, min(tiles, 2), min(tiles, 2))
    splits = min(max(4 * target.multiprocessors // blocks, 1), tiles, max(4096 // tile.channels, 1), 256)
    return Channels(rows, channels, tile, tiles, splits, min(max(8 * target.multiprocessors // blocks, 1), tiles))


def _constants(shape: Channels, acc: torch.dtype, *metas: TensorMeta) -> tuple[tuple[str, Any], ...]:
    return ("ACC", TRITON[acc]), ("WIDE", is_wide(*metas)), ("BLOCK_C", shape.tile.channels), ("BLOCK_S", shape.tile.spots)


def _batch_norm(call: Call, training: bool, momentum: int | None, eps: int, saves: bool, functional: bool = False,
                reserve: bool = False, positions: tuple[int | None, int | None] = (3, 4)) -> Plan:
    """Forward.

    Args:
        momentum, eps: positions of the numbers; ``positions``: of the running mean and variance.
        saves: whether the statistics are returned (else two empty tensors, as PyTorch on CPU does in evaluation).
        functional: new running statistics are returned instead of written.
        reserve: an empty uint8 tensor is returned too.
    """
    x, w, b = call.args[:3]
    target = call.target
    running = [None if i is None else call.args[i] for i in positions]
    if (running[0] is None) != (running[1] is None) or (not training and running[0] is None):
        raise Decline("PyTorch rejects it: one of the running statistics is not given")
    parameter = _statistics_dtype(x, [w, b, *running], target)
    y = _new_strides(x, target)
    shape = _channels(x, [y, x.stride], target)
    for meta in (w, b, *running):
        _per_channel(meta, shape.channels)
    acc = opmath(x.dtype)
    count = shape.channels if saves else 0
    allocs = [Alloc(x.shape, y, x.dtype), *[Alloc((count,), (1,), parameter)] * 2]
    returns: list[Out] = [Out(0), Out(1), Out(2)]
    metas: dict[Arg, TensorMeta] = {Arg(0): x}
    old: tuple[Any, ...] = ()
    for i, meta in zip(positions, running):
        old += optional(meta, Arg(i or 0), metas)
    if reserve:
        returns.append(Out(len(allocs)))
        allocs.append(Alloc((0,), (1,), torch.uint8))
    updated = old if training else ()
    if functional:
        updated = (Out(len(allocs)), Out(len(allocs) + 1))
        returns += updated
        allocs += [Alloc(meta.shape, contiguous_strides(meta.shape), meta.dtype) for meta in running if meta is not None]
    constants = _constants(shape, acc, x, allocs[0].meta)
    launches: list[Launch] = []
    parts: tuple[Out, ...] = ()
    if training:
        parts = (Out(len(allocs)),)
        allocs.append(Alloc((shape.splits * 3 * shape.channels,), (1,), acc))
        launches.append(Launch(channel_statistics_kernel, (shape.blocks, shape.splits, 1),
                               (parts[0], Arg(0), shape.channels, *shape.sizes, *shape.strides(1)), constants,
                               warps(shape.tile.warps, target)))
    precision = "fp64" if x.dtype == torch.float64 else "fp32"
    share = 0.0 if momentum is None else Num(momentum, precision)
    launches.append(Launch(
        batch_norm_kernel, (shape.blocks, shape.writers, 1),
        (Out(0), (Out(1), Out(2)) if saves else (), old, updated, Arg(0), parts, optional(w, Arg(1), metas), optional(b, Arg(2), metas),
         share, Num(eps, precision), shape.channels, Size(shape.splits), *shape.sizes, *shape.strides(0), *shape.strides(1)),
        (("COPY", not training), *constants, ("BLOCK_P", power_of_2(shape.splits))), warps(shape.tile.warps, target)))
    return Plan(tuple(allocs), tuple(launches), tuple(returns), metas, bytes=(2 + training) * x.numel * x.dtype.itemsize, flops=x.numel * 8)


def _statistics_dtype(x: TensorMeta, parameters: list[TensorMeta | None], target: Target) -> torch.dtype:
    """The dtype of a batch norm's statistics: that of its parameters on CPU, float32 or float64 on GPU.

    Raises:
        Decline: a combination that PyTorch rejects.
    """
    if target.device_type == "cpu":
        return parameter_dtype(x, parameters, target)
    for meta in parameters:
        if meta is not None and meta.dtype not in (x.dtype, opmath(x.dtype)):
            raise Decline(f"parameters of {dtype_name(meta.dtype)} with an input of {dtype_name(x.dtype)}")
    return opmath(x.dtype)


@planned(["aten.native_batch_norm.default", "aten._native_batch_norm_legit.default"], dtype(*FLOAT), family="norm",
         kernel=batch_norm_kernel, exact_out=True)
def batch_norm(call: Call) -> Plan:
    """Updates the running statistics in place, as the op does."""
    training = call["training"]
    return _batch_norm(call, training, 6, 7, saves=training or call.target.device_type != "cpu")


@planned("aten._native_batch_norm_legit.no_stats", dtype(*FLOAT), family="norm", kernel=batch_norm_kernel, exact_out=True)
def batch_norm_no_stats(call: Call) -> Plan:
    if not call["training"]:
        raise Decline("evaluation without running statistics")
    return _batch_norm(call, True, None, 5, saves=True, positions=(None, None))


@planned("aten._native_batch_norm_legit_no_training.default", dtype(*FLOAT), family="norm", kernel=batch_norm_kernel, exact_out=True)
def batch_norm_no_training(call: Call) -> Plan:
    return _batch_norm(call, False, None, 6, saves=call.target.device_type != "cpu")


@planned("aten._native_batch_norm_legit_functional.default", dtype(*FLOAT), family="norm", kernel=batch_norm_kernel)
def batch_norm_functional(call: Call) -> Plan:
    training = call["training"]
    return _batch_norm(call, training, 6, 7, saves=training or call.target.device_type != "cpu", functional=True)


@planned("aten.cudnn_batch_norm.default", dtype(*FLOAT), family="norm", kernel=batch_norm_kernel, exact_out=True)
def cudnn_batch_norm(call: Call) -> Plan:
    """What ``torch.nn.functional.batch_norm`` mostly arrives as on an NVIDIA GPU."""
    if call["training"]:
        raise Decline("training: cuDNN's backward, should it run, needs a workspace that only cuDNN's forward can fill")
    x = call["input"]
    if not (x.is_contiguous or _dense_as(x, suggested_strides(x))):
        raise Decline("PyTorch rejects it: an input that is not contiguous")
    plan = _batch_norm(call, False, None, 7, saves=False, reserve=True)
    empty = [a._replace(dtype=call["weight"].dtype) if i in (1, 2) else a for i, a in enumerate(plan.allocs)]
    return plan._replace(allocs=tuple(empty))


def _batch_norm_backward(call: Call, g: int, x: int, w: int, mean: int, spread: int, eps: int, train: bool,
                         mask: tuple[bool, bool, bool], out: tuple[int, ...]) -> Plan:
    """Backward; all but the last three arguments are positions. ``spread``: 1 / std in training, else the running variance.
    ``out``: the strides of the input's gradient."""
    grad, given, weight, centre, width = (call.args[i] for i in (g, x, w, mean, spread))
    target = call.target
    if centre is None or width is None:
        raise Decline("statistics that are not given")
    if grad.dtype != given.dtype or grad.shape != given.shape:
        raise Decline("grad_out and input differ in shape or dtype")
    _statistics_dtype(given, [weight, centre, width], target)
    if target.device_type != "cpu" and weight is None and (mask[1] or mask[2]):
        raise Decline("the gradient of a parameter that is not given")
    if weight is not None:
        parameter = weight.dtype
    else:
        parameter = parameter_dtype(given, (centre,), target) if target.device_type == "cpu" else given.dtype
    shape = _channels(given, [out, grad.stride, given.stride], target)
    for meta in (weight, centre, width):
        _per_channel(meta, shape.channels)
    allocs: list[Alloc] = []
    results: list[Out | None] = []
    per_channel = ((shape.channels,), (1,), parameter)
    for wanted, (size, stride, kind) in zip(mask, ((given.shape, out, given.dtype), per_channel, per_channel)):
        results.append(Out(len(allocs)) if wanted else None)
        if wanted:
            allocs.append(Alloc(size, stride, kind))
    metas: dict[Arg, TensorMeta] = {Arg(g): grad, Arg(x): given, Arg(mean): centre, Arg(spread): width}
    if not allocs:
        return Plan((), (), tuple(results), metas, bytes=0, flops=0)
    acc = opmath(given.dtype)
    constants = _constants(shape, acc, grad, given)
    launches: list[Launch] = []
    parts: tuple[Out, ...] = ()
    if mask[1] or mask[2] or train:
        parts = (Out(len(allocs)),)
        allocs.append(Alloc((shape.splits * 2 * shape.channels,), (1,), acc))
        launches.append(Launch(channel_sums_kernel, (shape.blocks, shape.splits, 1),
                               (parts[0], Arg(g), Arg(x), Arg(mean), shape.channels, *shape.sizes, *shape.strides(1), *shape.strides(2)),
                               constants, warps(shape.tile.warps, target)))
    dx, dw, db = (() if r is None else (r,) for r in results)
    weights = () if weight is None else optional(weight, Arg(w), metas)
    launches.append(Launch(
        batch_norm_backward_kernel, (shape.blocks, shape.writers if mask[0] else 1, 1),
        (dx, dw, db, Arg(g), Arg(x), Arg(mean), Arg(spread), parts, weights, Num(eps, "fp64" if acc == torch.float64 else "fp32"),
         shape.channels, Size(shape.splits), Size(shape.rows.n_columns), *shape.sizes, *shape.strides(0), *shape.strides(1),
         *shape.strides(2)),
        (("TRAIN", train), *constants, ("BLOCK_P", power_of_2(shape.splits))), warps(shape.tile.warps, target)))
    return Plan(tuple(allocs), tuple(launches), tuple(results), metas, bytes=(3 + 2 * bool(parts)) * given.numel * given.dtype.itemsize,
                flops=given.numel * 10)


@planned("aten.native_batch_norm_backward.default", dtype(*FLOAT), family="norm", kernel=batch_norm_backward_kernel)
def batch_norm_backward(call: Call) -> Plan:
    """Of PyTorch's kernels for GPUs only those for training give a gradient in another than the contiguous format."""
    train, x = call["train"], call["input"]
    out = suggested_strides(x)
    if call.target.device_type != "cpu" and not (train and _dense_as(x, out)):
        out = contiguous_strides(x.shape)
    return _batch_norm_backward(call, 0, 1, 2, 5 if train else 3, 6 if train else 4, 8, train, tuple(call["output_mask"]), out)


@planned("aten.cudnn_batch_norm_backward.default", dtype(*FLOAT, arg="input"), family="norm", kernel=batch_norm_backward_kernel)
def cudnn_batch_norm_backward(call: Call) -> Plan:
    """Needs nothing of cuDNN's workspace: the saved mean and 1 / std are enough."""
    x = call["input"]
    if not (x.is_contiguous or _dense_as(x, suggested_strides(x))):
        raise Decline("PyTorch rejects it: an input that is not contiguous")
    return _batch_norm_backward(call, 1, 0, 2, 5, 6, 7, True, (True, True, True), _new_strides(x, call.target))
