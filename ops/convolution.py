"""Convolutions of two kinds: depthwise ones, and those whose windows tile the input (patch embeddings).

- Depthwise (``groups`` is the number of input channels): a few multiplications for each byte read. The kernel reads each
  window's elements from the cache, tile by tile of an image plane, the weights of the plane's channel as scalars; or, in
  ``channels_last``, tiles of pixels by channels.
- Patches (``kernel == stride``, no padding, no dilation, one group): a matrix product of the weights with the input read
  through an index, since the place of an input element is a sum of a part for the patch and a part for the position in it.

Every other convolution passes through: windows that overlap make cuDNN's implicit product read each element from shared
memory many times, which these kernels do not. Source: the PyTorch documentation of ``torch.nn.Conv2d``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import channels_last_strides
from gemsmode.ops.measured import check_measured
from gemsmode.ops.movement import suggests_channels_last
from gemsmode.ops.pointwise import convert, power_of_2
from gemsmode.ops.promotion import FLOAT
from gemsmode.ops.window import place
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- depthwise ---------------------------------------------------------------------------------------------------------


@triton.jit
def _taps_of_row(total, p, p_weight, m, m_weight, w, in_w, stride_w, step_w, KIND: tl.constexpr):
    K: tl.constexpr = KIND[0][0]
    for t in tl.static_range(K):
        i = w * KIND[0][1] - KIND[0][2] + t * KIND[0][3]
        b = tl.load(p + t * (KIND[0][3] * stride_w), mask=m & (i >= 0) & (i < in_w), other=0).to(total.dtype)
        total += b * tl.load(p_weight + t * step_w, mask=m_weight, other=0).to(total.dtype)
    return total


@triton.jit
def depthwise_kernel(p_out, p_in, p_weight, biases, n_rows, n_columns, sizes, channels, out_steps, out_strides, in_steps, in_strides,
                     in_sizes, weight_steps, bias_step, KIND: tl.constexpr, MULTIPLE: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
                     CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """out[n, c, h, w] = bias[c] + sum of weight[c, k] * in[n, c // MULTIPLE, h * stride - padding + k * dilation].

    CHANNELS: grid (pixel blocks, channel blocks); else (tiles of all planes). KIND: (kernel, stride, padding, dilation) of
    columns and rows; steps: (channel, image); weight_steps: (column, row, channel).
    """
    if CHANNELS:
        m, at, n, c = place(n_rows, n_columns, sizes, CHANNELS, WIDE, BLOCK_Y, BLOCK_X)
        w = at[0]
        h = at[1]
        m_weight = c < channels
    else:
        i_program = tl.program_id(0)
        if WIDE:
            i_program = i_program.to(tl.int64)
        tiles_x = tl.cdiv(sizes[0], BLOCK_X)
        tiles = tiles_x * tl.cdiv(sizes[1], BLOCK_Y)
        i_tile = i_program % tiles
        i_plane = i_program // tiles
        c = i_plane % channels
        n = i_plane // channels
        h = ((i_tile // tiles_x) * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
        w = ((i_tile % tiles_x) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
        m = (h < sizes[1]) & (w < sizes[0])
        m_weight = c >= 0
    o = n * in_steps[1] + (c // MULTIPLE) * in_steps[0] + (h * KIND[1][1] - KIND[1][2]) * in_strides[1] + (
        w * KIND[0][1] - KIND[0][2]) * in_strides[0]
    p = p_in + tl.broadcast_to(o, m.shape)
    p_w = p_weight + c * weight_steps[2]
    total = tl.zeros(m.shape, ACC)
    K: tl.constexpr = KIND[1][0]
    if UNROLL:
        for t in tl.static_range(K):
            i = h * KIND[1][1] - KIND[1][2] + t * KIND[1][3]
            total = _taps_of_row(total, p + t * (KIND[1][3] * in_strides[1]), p_w + t * weight_steps[1], m & (i >= 0) & (i < in_sizes[1]),
                                 m_weight, w, in_sizes[0], in_strides[0], weight_steps[0], KIND)
    else:
        for t in range(K):
            i = h * KIND[1][1] - KIND[1][2] + t * KIND[1][3]
            total = _taps_of_row(total, p + t * (KIND[1][3] * in_strides[1]), p_w + t * weight_steps[1], m & (i >= 0) & (i < in_sizes[1]),
                                 m_weight, w, in_sizes[0], in_strides[0], weight_steps[0], KIND)
    if len(biases) == 1:
        total += tl.load(biases[0] + c * bias_step, mask=m_weight, other=0).to(ACC)
    o_out = n * out_steps[1] + c * out_steps[0] + h * out_strides[1] + w * out_strides[0]
    tl.store(p_out + o_out, convert(total, p_out.dtype.element_ty), mask=m)


# -- patches -----------------------------------------------------------------------------------------------------------


@triton.jit
def patch_kernel(p_out, p_in, p_weight, biases, n_patches, n_out, n_inner, sizes, out_steps, out_strides, in_steps, in_strides,
                 weight_steps, bias_step, KERNEL: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
                 BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[patch, channel] = bias[channel] + sum over k of in[patch, k] * weight[channel, k].

    k runs over (input channel, kernel row, kernel column), patches over (image, row, column). Grid: (tiles of patches,
    tiles of output channels). KERNEL: columns and rows of a patch; FLAT: weights are contiguous along k.
    """
    i_l = tl.program_id(0)
    i_n = tl.program_id(1)
    if WIDE:
        i_l = i_l.to(tl.int64)
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w = o_l % sizes[0]
    rest = o_l // sizes[0]
    h = rest % sizes[1]
    image = rest // sizes[1]
    o_patch = image * in_steps[1] + h * (KERNEL[1] * in_strides[1]) + w * (KERNEL[0] * in_strides[0])
    m_l = o_l < n_patches
    m_n = o_n < n_out
    acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    for k0 in range(0, n_inner, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        m_k = k < n_inner
        k_w = k % KERNEL[0]
        k_h = (k // KERNEL[0]) % KERNEL[1]
        c = k // (KERNEL[0] * KERNEL[1])
        o_k = c * in_steps[0] + k_h * in_strides[1] + k_w * in_strides[0]
        if FLAT:
            o_w = k
        else:
            o_w = c * weight_steps[2] + k_h * weight_steps[1] + k_w * weight_steps[0]
        # [BLOCK_L, BLOCK_K] and [BLOCK_K, BLOCK_N]
        b_in = tl.load(p_in + (o_patch[:, None] + o_k[None, :]), mask=m_l[:, None] & m_k[None, :], other=0)
        b_weight = tl.load(p_weight + (o_w[:, None] + (o_n * weight_steps[3])[None, :]), mask=m_k[:, None] & m_n[None, :], other=0)
        acc = tl.dot(b_in, b_weight, acc, input_precision=PRECISION)
    if len(biases) == 1:
        acc += tl.load(biases[0] + o_n * bias_step, mask=m_n, other=0).to(tl.float32)[None, :]
    o_out = (image * out_steps[1] + h * out_strides[1] + w * out_strides[0])[:, None] + (o_n * out_steps[0])[None, :]
    tl.store(p_out + o_out, convert(acc, p_out.dtype.element_ty), mask=m_l[:, None] & m_n[None, :])


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchTile:
    """Patches by output channels by elements of a patch, and the launch's warps and stages."""

    patches: int
    channels: int
    inner: int
    warps: int
    stages: int


PATCH_TILES = {
    "half": (PatchTile(128, 64, 64, 8, 3), PatchTile(64, 64, 64, 4, 4)),
    "tf32x3": (PatchTile(128, 64, 32, 8, 3), PatchTile(64, 64, 32, 4, 3)),
    "ieee": (PatchTile(64, 64, 16, 4, 2), PatchTile(64, 32, 16, 4, 2)),
}
"""By kind of product: the tile for many patches, and the one for when that would leave multiprocessors idle. Offsets of
patches and of results take registers: tiles of 128x128 (or of 128x64 with four warps) spill."""


WIDE_PATCH_TILE = PatchTile(64, 64, 32, 8, 3)
"""For float32 with offsets of 64 bits, which take registers beside the split operands."""


def choose_patch_tile(patches: int, channels: int, kind: str, wide: bool, target: Target) -> PatchTile:
    """The largest tile that still gives every multiprocessor one."""
    if target.interpreted:
        return PatchTile(max(16, min(power_of_2(patches), 512)), max(16, min(power_of_2(channels), 256)), 64, 4, 2)
    if wide and kind == "tf32x3":
        return WIDE_PATCH_TILE
    large, small = PATCH_TILES[kind]
    full = -(-patches // large.patches) * -(-channels // large.channels) >= target.multiprocessors
    return large if full else small


@dataclass(frozen=True)
class PlaneTile:
    """Rows by columns (pixels by channels in channels_last), and warps."""

    rows: int
    columns: int
    warps: int


def choose_plane_tile(rows: int, columns: int, target: Target) -> PlaneTile:
    """About four results a thread; a small plane gets fewer warps, not a larger tile."""
    if target.interpreted:
        x = min(power_of_2(columns), 512)
        return PlaneTile(min(power_of_2(rows), (1 << 15) // x), x, 4)
    x = min((64, 32), key=lambda width: -(-columns // width) * width) if columns > 32 else power_of_2(columns)
    y = min(power_of_2(rows), max(512 // x, 1))
    return PlaneTile(y, x, max(1, min(4, x * y // 128)))


# -- rules -------------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[int], rank: int) -> tuple[int, ...]:
    if len(values) not in (1, rank):
        raise Decline(f"PyTorch rejects it: 1 or {rank} values are expected for each dimension")
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _channels_last(x: TensorMeta, weight: TensorMeta, target: Target) -> bool:
    """Whether PyTorch writes images as channels_last: if the input or the weights are; cuDNN never in float64."""
    served = x.ndim == 4 and (x.dtype != torch.float64 or target.device_type == "cpu")
    return served and (suggests_channels_last(x) or suggests_channels_last(weight))


class _Images:
    """A convolution's tensors looked at as images: of signals, the rows are one."""

    def __init__(self, x: TensorMeta, weight: TensorMeta, out: Alloc) -> None:
        one = x.ndim == 3
        self.sizes = (out.shape[-1], 1 if one else out.shape[-2])
        self.in_sizes = (x.shape[-1], 1 if one else x.shape[-2])
        self.in_strides = (x.stride[-1], 0 if one else stride(x.stride[-2]))
        self.out_strides = (out.stride[-1], 0 if one else stride(out.stride[-2]))
        self.in_steps = (stride(x.stride[1]) if x.stride[1] != 1 else 1, stride(x.stride[0]))
        self.out_steps = (stride(out.stride[1]) if out.stride[1] != 1 else 1, stride(out.stride[0]))
        self.weight_steps = (weight.stride[-1], 0 if one else Size(weight.stride[-2]))


def _depthwise(call: Call, operands: tuple[Arg, Arg, Arg], x: TensorMeta, weight: TensorMeta, bias: TensorMeta | None, out: Alloc,
               kind: tuple[tuple[int, int, int, int], ...]) -> Plan:
    view = _Images(x, weight, out)
    channels, images = out.shape[1], out.shape[0]
    in_channels_last = out.stride[1] == 1 and channels > 1 and out.stride[-1] != 1
    wide = max(x.extent, out.meta.numel) >= 2**31 - 2**17
    area = view.sizes[0] * view.sizes[1]
    if in_channels_last:
        tile = choose_plane_tile(images * area, channels, call.target)
        grid = (-(-images * area // tile.rows), -(-channels // tile.columns), 1)
    else:
        tile = choose_plane_tile(view.sizes[1], view.sizes[0], call.target)
        grid = (images * channels * -(-view.sizes[1] // tile.rows) * -(-view.sizes[0] // tile.columns), 1, 1)
    if grid[0] >= 2**31:
        raise Decline("more planes than programs")
    args = (Out(0), operands[0], operands[1], () if bias is None else (operands[2],), Size(images * area), extent(channels),
            tuple([Size(s) for s in view.sizes]), extent(channels), view.out_steps, view.out_strides, view.in_steps, view.in_strides,
            tuple([Size(s) for s in view.in_sizes]), (*view.weight_steps, Size(weight.stride[0])),
            Size(1 if bias is None else bias.stride[0]))
    taps = kind[0][0] * kind[1][0]
    constants = (("KIND", kind), ("MULTIPLE", channels // x.shape[1]), ("UNROLL", taps <= 25),
                 ("ACC", tl.float64 if x.dtype == torch.float64 else tl.float32), ("CHANNELS", in_channels_last), ("WIDE", wide),
                 ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    metas = {operands[0]: x, operands[1]: weight} | ({} if bias is None else {operands[2]: bias})
    n = out.meta.numel
    return Plan((out,), (Launch(depthwise_kernel, grid, args, Constants(constants), tile.warps),), Out(0), metas,
                bytes=(x.numel + weight.numel + n) * x.dtype.itemsize, flops=2 * n * taps)


def _patches(call: Call, x: TensorMeta, weight: TensorMeta, bias: TensorMeta | None, out: Alloc, kernel: tuple[int, ...]) -> Plan:
    view = _Images(x, weight, out)
    patches = out.shape[0] * view.sizes[0] * view.sizes[1]
    channels = out.shape[1]
    inner = weight.numel // channels
    # Three products of TF32 are as close as float32: whether cuDNN takes one where that is allowed depends on the shape.
    kind = "half" if x.dtype.itemsize == 2 else "tf32x3" if call.target.has_tf32x3 else "ieee"
    wide = max(x.extent, out.meta.numel) >= 2**31 - 2**17
    tile = choose_patch_tile(patches, channels, kind, wide, call.target)
    check_measured("patches", call.target, itemsize=x.dtype.itemsize, width=kernel[-1],
                   programs=-(-patches // tile.patches) * -(-channels // tile.channels))
    columns, rows = kernel[-1], kernel[-2] if len(kernel) == 2 else 1
    flat = weight.is_contiguous
    args = (Out(0), Arg(0), Arg(1), () if bias is None else (Arg(2),), Size(patches), Size(channels), stride(inner),
            tuple([Size(s) for s in view.sizes]), view.out_steps, view.out_strides, view.in_steps, view.in_strides,
            (*view.weight_steps, Size(weight.stride[1]), stride(weight.stride[0])), Size(1 if bias is None else bias.stride[0]))
    constants = (("KERNEL", (columns, rows)), ("FLAT", flat), ("PRECISION", "ieee" if kind == "half" else kind),
                 ("WIDE", wide), ("BLOCK_L", tile.patches), ("BLOCK_N", tile.channels),
                 ("BLOCK_K", tile.inner))
    launch = Launch(patch_kernel, (-(-patches // tile.patches), -(-channels // tile.channels), 1), args, Constants(constants),
                    tile.warps, tile.stages)
    metas = {Arg(0): x, Arg(1): weight} | ({} if bias is None else {Arg(2): bias})
    return Plan((out,), (launch,), Out(0), metas, bytes=(x.numel + weight.numel + out.meta.numel) * x.dtype.itemsize,
                flops=2 * out.meta.numel * inner)


def _output(x: TensorMeta, weight: TensorMeta, bias: TensorMeta | None, kind: Sequence[tuple[int, int, int, int]],
            groups: int) -> tuple[int, ...]:
    """The output's shape; kind is (kernel, stride, padding, dilation) of each dimension.

    Raises:
        Decline: PyTorch rejects the call, or the result is empty.
    """
    if weight.ndim != x.ndim or weight.dtype != x.dtype or groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise Decline("PyTorch rejects it: the weights do not fit the input")
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype != x.dtype):
        raise Decline("PyTorch rejects it: the bias does not fit the weights")
    if any(min(k, s, d) < 1 or p < 0 for k, s, p, d in kind):
        raise Decline("PyTorch rejects it: strides and dilations must be positive, paddings not negative")
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, (k, s, p, d) in zip(x.shape[2:], kind)]
    if 0 in x.shape or 0 in weight.shape or min(sizes) < 1:
        raise Decline("an empty result, or windows larger than the input")
    return (x.shape[0], weight.shape[0], *sizes)


@planned("aten.convolution.default", dtype(*FLOAT), family="conv", kernel=depthwise_kernel)
def convolution(call: Call) -> Plan:
    x, weight, bias, steps, padding, dilation, transposed, _, groups = call.args
    rank = x.ndim - 2
    if rank not in (1, 2):
        raise Decline("only signals and images are served; volumes are cuDNN's")
    if transposed:
        raise Decline("transposed: cuDNN's")
    kind = tuple(zip(weight.shape[2:], _spread(steps, rank), _spread(padding, rank), _spread(dilation, rank)))
    shape = _output(x, weight, bias, kind, groups)
    last = channels_last_strides(shape) if _channels_last(x, weight, call.target) else None
    out = Alloc(shape, last or contiguous_strides(shape), x.dtype)
    if groups == x.shape[1] and groups > 1:
        if max(k for k, *_ in kind) > 31:
            raise Decline("depthwise with a kernel of more than 31 elements in one dimension")
        images = kind if rank == 2 else ((1, 1, 0, 1), *kind)
        return _depthwise(call, (Arg(0), Arg(1), Arg(2)), x, weight, bias, out, tuple(reversed(images)))
    if groups > 1:
        raise Decline(f"{groups} groups of several channels: cuDNN's")
    if any(k != s or p or (d != 1 and k > 1) for k, s, p, d in kind):
        raise Decline("dense, with windows that overlap or leave gaps: cuDNN's implicit product reuses them in shared memory")
    if all(k == 1 for k, *_ in kind):
        raise Decline("1x1: a plain matrix product, which cuDNN has")
    if x.dtype == torch.float64:
        raise Decline("dense in float64: cuDNN's")
    return _patches(call, x, weight, bias, out, tuple(k for k, *_ in kind))


@planned("aten._conv_depthwise2d.default", dtype(*FLOAT), family="conv", kernel=depthwise_kernel)
def conv_depthwise2d(call: Call) -> Plan:
    x, weight, kernel, bias, steps, padding, dilation = call.args
    if x.ndim != 4 or weight.ndim != 4 or tuple(weight.shape[2:]) != _spread(kernel, 2) or weight.shape[1] != 1:
        raise Decline("PyTorch rejects it: images, and weights of the kernel's size, are expected")
    kind = tuple(zip(weight.shape[2:], _spread(steps, 2), _spread(padding, 2), _spread(dilation, 2)))
    shape = _output(x, weight, bias, kind, x.shape[1])
    if max(k for k, *_ in kind) > 31:
        raise Decline("a kernel of more than 31 elements in one dimension")
    out = Alloc(shape, contiguous_strides(shape), x.dtype)
    return _depthwise(call, (Arg(0), Arg(1), Arg(3)), x, weight, bias, out, tuple(reversed(kind)))
