"""Elements of images in another order: unfolding and folding, pixel and channel shuffles, and grids of affine maps.

``im2col`` copies each window into a column; ``col2im`` and ``unfold_backward`` sum what windows copied, by gathering (a
pixel asks each element of the kernel which window read it there). The shuffles are permuted copies of views. Source: the
PyTorch documentation of ``Unfold``, ``Fold``, ``PixelShuffle``, ``ChannelShuffle`` and ``affine_grid``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import channels_last_strides
from gemsmode.ops.measured import check_measured
from gemsmode.ops.movement import read, same, wrap_dim
from gemsmode.ops.pointwise import build, convert, power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, TRITON
from gemsmode.ops.window import Dim, choose_tile, divide, like_suggested, result, sum_plan, window_sum_kernel
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

_ANY = dtype(*ALL)
_FLOATING = dtype(*FLOAT)

# -- windows as columns ------------------------------------------------------------------------------------------------


@triton.jit
def im2col_kernel(p_out, p_in, n_rows, out_w, sizes, in_h, in_w, strides, KIND: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Rows are (image, channel, kernel row, kernel column, window row), columns the windows of a row. Grid: (rows, columns).

    KIND: (kernel, stride, padding, dilation) of columns and of rows; sizes: (window rows, channels).
    """
    i_y = tl.program_id(0)
    i_x = tl.program_id(1)
    if WIDE:
        i_y = i_y.to(tl.int64)
        i_x = i_x.to(tl.int64)
    y = (i_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    m = (y < n_rows) & (x < out_w)
    o_h = y % sizes[0]
    rest = y // sizes[0]
    k_w = rest % KIND[0][0]
    rest = rest // KIND[0][0]
    k_h = rest % KIND[1][0]
    rest = rest // KIND[1][0]
    h = o_h * KIND[1][1] - KIND[1][2] + k_h * KIND[1][3]
    w = x * KIND[0][1] - KIND[0][2] + k_w * KIND[0][3]
    ok = m & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
    o = (rest // sizes[1]) * strides[3] + (rest % sizes[1]) * strides[2] + h * strides[1] + w * strides[0]
    tl.store(p_out + (y * out_w + x), tl.load(p_in + o, mask=ok, other=0), mask=m)


@triton.jit
def fold_tap(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """The window that read element i with element t of its kernel, if one did. parameters: (number of windows,)."""
    past = i + KIND[D][2] - t * KIND[D][3]
    o = past // KIND[D][1]
    return o, 1.0, (past >= 0) & (past % KIND[D][1] == 0) & (o < parameters[0])


def _windows(sizes: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
             step: Sequence[int]) -> tuple[list[int], tuple[tuple[int, int, int, int], ...]]:
    """How many windows there are in each dimension, and (kernel, stride, padding, dilation), last dimension first."""
    if any(len(v) != 2 for v in (sizes, kernel, dilation, padding, step)):
        raise Decline("PyTorch rejects it: two dimensions are expected")
    if min(*kernel, *dilation, *step) < 1 or min(padding) < 0 or min(sizes) < 1:
        raise Decline("PyTorch rejects it: sizes must be positive")
    counts = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in zip(sizes, kernel, dilation, padding, step)]
    if min(counts) < 1:
        raise Decline("PyTorch rejects it: no window fits")
    return counts, tuple(zip(reversed(kernel), reversed(step), reversed(padding), reversed(dilation)))


@planned("aten.im2col.default", dtype(*FLOAT, torch.bool), family="fold", kernel=im2col_kernel)
def im2col(call: Call) -> Plan:
    x, kernel, dilation, padding, step = call.args
    if x.ndim not in (3, 4) or 0 in x.shape[x.ndim - 3:]:
        raise Decline("PyTorch rejects it: three or four dimensions are expected, none but the batch empty")
    counts, kind = _windows(x.shape[-2:], kernel, dilation, padding, step)
    images, channels = x.shape[0] if x.ndim == 4 else 1, x.shape[-3]
    shape = (*x.shape[:-3], channels * kernel[0] * kernel[1], counts[0] * counts[1])
    out = result(shape, x.dtype, False)
    n = out.meta.numel
    if n == 0:
        return Plan((out,), (), Out(0), {Arg(0): x}, bytes=0)
    rows = n // counts[1]
    tile = choose_tile(rows, counts[1], 1, call.target)
    strides = (x.stride[-1], stride(x.stride[-2]), stride(x.stride[-3]), stride(x.stride[0] if x.ndim == 4 else 0))
    args = (Out(0), Arg(0), Size(rows), extent(counts[1]), (Size(counts[0]), Size(channels)), Size(x.shape[-2]), Size(x.shape[-1]), strides)
    constants = (("KIND", kind), ("WIDE", max(n, x.extent) >= 2**31 - 2**17), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    launch = Launch(im2col_kernel, (-(-rows // tile.rows), -(-counts[1] // tile.columns), 1), args, Constants(constants), tile.warps)
    return Plan((out,), (launch,), Out(0), {Arg(0): x}, bytes=(n + images * x.numel // max(images, 1)) * x.dtype.itemsize)


@planned("aten.col2im.default", _FLOATING, family="fold", kernel=window_sum_kernel)
def col2im(call: Call) -> Plan:
    x, size, kernel, dilation, padding, step = call.args
    if x.ndim not in (2, 3) or 0 in x.shape[-2:]:
        raise Decline("PyTorch rejects it: two or three dimensions are expected, none but the batch empty")
    counts, kind = _windows(size, kernel, dilation, padding, step)
    area = kernel[0] * kernel[1]
    if x.shape[-2] % area or x.shape[-1] != counts[0] * counts[1]:
        raise Decline("PyTorch rejects it: the columns do not fit the sizes")
    if x.extent >= 2**31 - 2**17:
        raise Decline("columns of more than 2**31 elements")
    channels = x.shape[-2] // area
    out = result((*x.shape[:-2], channels, *size), x.dtype, False)
    view = TensorMeta(x.dtype, (*x.shape[:-2], channels, *counts),
                      (*x.stride[:-2], x.stride[-2] * area, x.stride[-1] * counts[1], x.stride[-1]), x.device)
    dims = [Dim(kernel[0], (Size(counts[0]),), x.stride[-2] * kernel[1]), Dim(kernel[1], (Size(counts[1]),), x.stride[-2])]
    return sum_plan(call, (Arg(0), view), out, dims, fold_tap, kind)._replace(metas={Arg(0): x})


def _merged(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of dimensions after those that are one run are merged."""
    found: list[tuple[int, int]] = []
    for size, step in zip(shape, strides):
        if size == 1:
            continue
        if found and found[-1][1] == step * size:
            found[-1] = (found[-1][0] * size, step)
        else:
            found.append((size, step))
    return found


@planned("aten.unfold_backward.default", _FLOATING, family="fold", kernel=window_sum_kernel)
def unfold_backward(call: Call) -> Plan:
    grad, sizes, dim, size, step = call.args
    if not sizes or step < 1:
        raise Decline("a 0-dim input, or a step that PyTorch rejects")
    dim = wrap_dim(dim, len(sizes))
    count = (sizes[dim] - size) // step + 1
    if size < 1 or size > sizes[dim] or grad.shape != (*sizes[:dim], count, *sizes[dim + 1:], size):
        raise Decline("the gradient is not that of an unfolded tensor")
    out = result(tuple(sizes), grad.dtype, False)
    if out.meta.numel == 0:
        return Plan((out,), (), Out(0), {Arg(0): grad}, bytes=0)
    if grad.extent >= 2**31 - 2**17:
        raise Decline("a gradient of more than 2**31 elements")
    outer, inner = _merged(sizes[:dim], grad.stride[:dim]), _merged(sizes[dim + 1:], grad.stride[dim + 1:-1])
    if len(outer) > 2 or len(inner) > 2:
        raise Decline("more than two dimensions before or behind the unfolded one that cannot be merged")
    dims = [*outer, (count, grad.stride[dim]), *inner]
    view = TensorMeta(grad.dtype, tuple([n for n, _ in dims]), tuple([s for _, s in dims]), grad.device)
    shape = (*[n for n, _ in outer], sizes[dim], *[n for n, _ in inner])
    taps = [Dim(size, (Size(count),), grad.stride[-1]), *[Dim(1, (Size(n),)) for n, _ in inner]]
    kind = (*[(1, 1, 0, 1)] * len(inner), (size, step, 0, 1))
    # Windows may be long here, and kernels are not made for each length.
    plan = sum_plan(call, (Arg(0), view), Alloc(shape, contiguous_strides(shape), grad.dtype), taps, fold_tap, kind, unrolled=16)
    return plan._replace(allocs=(out,), metas={Arg(0): grad})


# -- shuffles ----------------------------------------------------------------------------------------------------------


def _permuted(call: Call, shape: tuple[int, ...], channels_last: bool, inner: Sequence[int], inner_in: Sequence[int],
              inner_out: Sequence[tuple[int, int]]) -> Plan:
    """A copy whose output of ``shape`` is looked at as the sizes ``inner``: read with the strides ``inner_in``, written with
    ``inner_out``, pairs of a dimension of ``shape`` and a factor of its stride."""
    x = call.args[0]
    last = channels_last_strides(shape) if channels_last else None
    strides = last or contiguous_strides(shape)
    view = TensorMeta(x.dtype, tuple(inner), tuple(inner_in), x.device)
    plan = build(call, same, [read(call, 0, view)], [x.dtype], tuple(inner), tuple([strides[d] * f for d, f in inner_out]))
    return plan._replace(allocs=(Alloc(shape, strides, x.dtype),), metas={Arg(0): x}, elementwise=False)


def _on_cpu(call: Call) -> bool:
    """Only the CPU's kernels keep the format of images here."""
    return call.target.device_type == "cpu" and like_suggested(call.args[0], 4)


@planned("aten.pixel_shuffle.default", _ANY, family="fold", kernel=same)
def pixel_shuffle(call: Call) -> Plan:
    """``out[c, h * r + i, w * r + j] = in[(c * r + i) * r + j, h, w]``."""
    x, r = call.args
    if x.ndim < 3 or r < 1 or x.shape[-3] % (r * r):
        raise Decline("PyTorch rejects it: the channels do not divide")
    check_measured("shuffle", call.target, factor=r, itemsize=x.dtype.itemsize)
    *lead, channels, height, width = x.shape
    shape = (*lead, channels // (r * r), height * r, width * r)
    c, h, w = x.ndim - 3, x.ndim - 2, x.ndim - 1
    batch = [(d, 1) for d in range(len(lead))]
    return _permuted(call, shape, _on_cpu(call), (*lead, channels // (r * r), height, r, width, r),
                     (*x.stride[:c], x.stride[c] * r * r, x.stride[h], x.stride[c] * r, x.stride[w], x.stride[c]),
                     [*batch, (c, 1), (h, r), (h, 1), (w, r), (w, 1)])


@planned("aten.pixel_unshuffle.default", _ANY, family="fold", kernel=same)
def pixel_unshuffle(call: Call) -> Plan:
    """``out[(c * r + i) * r + j, h, w] = in[c, h * r + i, w * r + j]``."""
    x, r = call.args
    if x.ndim < 3 or r < 1 or x.shape[-2] % r or x.shape[-1] % r:
        raise Decline("PyTorch rejects it: the image does not divide")
    if r == 1:
        raise Decline("PyTorch returns the input itself")
    *lead, channels, height, width = x.shape
    shape = (*lead, channels * r * r, height // r, width // r)
    c, h, w = x.ndim - 3, x.ndim - 2, x.ndim - 1
    batch = [(d, 1) for d in range(len(lead))]
    return _permuted(call, shape, _on_cpu(call), (*lead, channels, r, r, height // r, width // r),
                     (*x.stride[:c], x.stride[c], x.stride[h], x.stride[w], x.stride[h] * r, x.stride[w] * r),
                     [*batch, (c, r * r), (c, r), (c, 1), (h, 1), (w, 1)])


@planned(["aten.channel_shuffle.default", "aten.native_channel_shuffle.default"], _ANY, family="fold", kernel=same)
def channel_shuffle(call: Call) -> Plan:
    """``out[j * groups + g] = in[g * (C / groups) + j]`` along the channels."""
    x, groups = call.args
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        raise Decline("PyTorch rejects it: the channels do not divide")
    if x.numel == 0:
        raise Decline("an empty tensor, which PyTorch returns itself")
    each = x.shape[1] // groups
    rest = range(2, x.ndim)
    spatial = [(n, step) for n, step in zip(x.shape[2:], x.stride[2:]) if n != 1]
    if call.target.device_type != "cpu" and any(step != below * n for (_, step), (n, below) in itertools.pairwise(spatial)):
        raise Decline("PyTorch's composite rejects it: the dimensions behind the channels are not one in memory")
    return _permuted(call, x.shape, _on_cpu(call), (x.shape[0], each, groups, *x.shape[2:]),
                     (x.stride[0], x.stride[1], x.stride[1] * each, *x.stride[2:]), [(0, 1), (1, groups), (1, 1), *[(d, 1) for d in rest]])


# -- grids of affine maps ----------------------------------------------------------------------------------------------


@triton.jit
def _ticks(i, n, ALIGNED: tl.constexpr, ACC: tl.constexpr):
    """The i-th of n places between -1 and 1: at the ends too if aligned, else in the middles of n cells; 0 if n is 1."""
    many = tl.maximum(n - 1, 1).to(ACC)
    step = divide(tl.full([1], 2.0, ACC), tl.broadcast_to(many, [1]))
    v = tl.where(i < n // 2, step * i.to(ACC) - 1.0, 1.0 - step * (n - 1 - i).to(ACC))
    if not ALIGNED:
        v = v * divide(tl.broadcast_to((n - 1).to(ACC), [1]), tl.broadcast_to(n.to(ACC), [1]))
    return tl.where(n == 1, 0.0, v)


@triton.jit
def affine_grid_kernel(p_out, p_theta, n, sizes, strides, ALIGNED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
                       BLOCK: tl.constexpr):
    """Each element of [N, (D,) H, W, 2 or 3] is a row of theta times (x, y, (z,) 1). Grid: programs over n elements."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    j = o % len(sizes)
    rest = o // len(sizes)
    at = rest
    for d in tl.static_range(len(sizes)):
        at = at // sizes[d]
    p_row = p_theta + (at * strides[0] + j * strides[1])
    total = tl.load(p_row + len(sizes) * strides[2], mask=m, other=0).to(ACC)
    for d in tl.static_range(len(sizes)):
        total += tl.load(p_row + d * strides[2], mask=m, other=0).to(ACC) * _ticks((rest % sizes[d]).to(tl.int32), sizes[d], ALIGNED, ACC)
        rest = rest // sizes[d]
    tl.store(p_out + o, convert(total, p_out.dtype.element_ty), mask=m)


@planned("aten.affine_grid_generator.default", _FLOATING, family="fold", kernel=affine_grid_kernel)
def affine_grid_generator(call: Call) -> Plan:
    theta, size, aligned = call.args
    rank = len(size) - 2
    if rank not in (2, 3) or theta.shape != (size[0], rank, rank + 1) or any(s < 1 for s in size):
        raise Decline("PyTorch rejects it: sizes of a batch of images or volumes, and a matrix for each, are expected")
    if theta.dtype not in TRITON:
        raise Decline(f"{theta.dtype} is not handled")
    shape = (size[0], *size[2:], rank)
    out = Alloc(shape, contiguous_strides(shape), theta.dtype)
    n = out.meta.numel
    block = min(power_of_2(n), 1 << 16) if call.target.interpreted else 512
    args = (Out(0), Arg(0), extent(n), tuple([Size(s) for s in reversed(size[2:])]), tuple([Size(s) for s in theta.stride]))
    constants = (("ALIGNED", bool(aligned)), ("ACC", tl.float64 if theta.dtype == torch.float64 else tl.float32),
                 ("WIDE", n >= 2**31 - 2**17), ("BLOCK", block))
    return Plan((out,), (Launch(affine_grid_kernel, (-(-n // block), 1, 1), args, Constants(constants)),), Out(0), {Arg(0): theta},
                bytes=n * theta.dtype.itemsize, flops=n * 2 * rank)
