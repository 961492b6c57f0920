"""Upsampling (and downsampling): nearest, linear, cubic and antialiased interpolation over one to three dimensions.

With ``scale`` input elements for one output element (``I / O``, one over the scale factor that the caller gave, or
``(I - 1) / (O - 1)`` with aligned corners), output ``o`` reads around ``s = scale * (o + 0.5) - 0.5`` (``scale * o`` with
aligned corners):

- nearest: ``floor(scale * o)``, exact nearest: ``floor(scale * (o + 0.5))``;
- linear: ``floor(s)`` and the next, ``s`` taken as 0 where it is negative;
- cubic: the four around ``s`` with the convolution of A = -0.75, repeated at the edges;
- antialiased: all within ``support * max(scale, 1)`` of ``scale * (o + 0.5)``, with a triangle, a cubic (A = -0.5) or a
  Lanczos window of three lobes stretched by ``max(scale, 1)``, divided by the sum of the weights.

A backward sums, for each input, the outputs that read it with the weights of the forward: the first of them is found
from the inverse of the scale and corrected by the forward's own arithmetic, so the two agree to the last output.
Antialiased weights are normalized by sums that a small kernel writes to a table first. Source: the PyTorch
documentation of ``torch.nn.functional.interpolate`` and ``torch/_decomp``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import power_of_2
from gemsmode.ops.promotion import FLOAT
from gemsmode.ops.window import Dim, divide, gather_kernel, gather_plan, like_suggested, number, result, sum_plan, window_sum_kernel
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

# -- taps of one dimension ---------------------------------------------------------------------------------------------
#
# Parameters: (input size, output size, scale in parts, its inverse in parts, table of sums). KIND is (dtype to compute
# in, aligned corners, filter of an antialiased kind).


@triton.jit
def _source(o, parameters, KIND: tl.constexpr):
    """Where output o lies among the inputs."""
    scale = number(parameters[2], KIND[0])
    if KIND[1]:
        return scale * o.to(KIND[0])
    else:
        return scale * (o.to(KIND[0]) + 0.5) - 0.5


@triton.jit
def _nearest(o, parameters, KIND: tl.constexpr):
    i = tl.floor((o.to(tl.float32) + KIND[1]) * number(parameters[2], tl.float32)).to(o.dtype)
    return tl.minimum(i, parameters[0] - 1)


@triton.jit
def nearest_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    """KIND[1] is what is added to the output's index: 0, or 0.5 for the exact kind."""
    i = _nearest(o, parameters, KIND)
    return i, 1.0, i >= 0


@triton.jit
def _linear_place(o, parameters, KIND: tl.constexpr):
    return tl.maximum(_source(o, parameters, KIND), 0.0)


@triton.jit
def _linear(o, parameters, KIND: tl.constexpr):
    """The two inputs of output o, and the weight of the second."""
    s = _linear_place(o, parameters, KIND)
    i = tl.minimum(s.to(o.dtype), parameters[0] - 1)
    return i, tl.minimum(i + 1, parameters[0] - 1), s - i.to(KIND[0])


@triton.jit
def linear_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    first, second, weight = _linear(o, parameters, KIND)
    if t == 0:
        return first, 1.0 - weight, first >= 0
    else:
        return second, weight, second >= 0


@triton.jit
def _cubic_weight(x, A: tl.constexpr):
    """The cubic convolution at the distance x >= 0 (0 beyond 2)."""
    near = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    far = ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    return tl.where(x <= 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _cubic(o, parameters, KIND: tl.constexpr):
    """The second of the four inputs of output o (which may lie outside), and how far behind it o is."""
    s = _source(o, parameters, KIND)
    floor = tl.floor(s)
    return floor.to(o.dtype), s - floor


@triton.jit
def cubic_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    second, after = _cubic(o, parameters, KIND)
    i = tl.minimum(tl.maximum(second - 1 + t, 0), parameters[0] - 1)
    return i, _cubic_weight(tl.abs(after + 1.0 - t), -0.75), i >= 0


@triton.jit
def _sinc(x):
    y = x * 3.141592653589793
    return tl.where(x == 0.0, 1.0, divide(tl.sin(y), tl.where(x == 0.0, 1.0, y)))


@triton.jit
def _filter(x, FILTER: tl.constexpr):
    """The window of an antialiased kind at the distance x from its middle. FILTER: support of 1, 2 or 3."""
    x = tl.abs(x)
    if FILTER == 1:
        return tl.maximum(1.0 - x, 0.0)
    elif FILTER == 2:
        return _cubic_weight(x, -0.5)
    else:
        return tl.where(x < 3.0, _sinc(x) * _sinc(x * (1.0 / 3.0)), 0.0)


@triton.jit
def _reach(o, parameters, KIND: tl.constexpr):
    """Of an antialiased output: the first input, the end, the middle, and the inverse of the window's stretching."""
    scale = number(parameters[2], KIND[0])
    stretch = tl.maximum(scale, 1.0)
    middle = scale * (o.to(KIND[0]) + 0.5)
    support = stretch * KIND[2]
    first = tl.maximum(middle - support + 0.5, 0.0).to(o.dtype)
    end = tl.minimum((middle + support + 0.5).to(o.dtype), parameters[0])
    return first, end, middle, tl.where(scale > 1.0, number(parameters[3], KIND[0]), tl.cast(1.0, KIND[0]))


@triton.jit
def smooth_tap(o, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    first, end, middle, squeeze = _reach(o, parameters, KIND)
    i = first + t
    inside = (o >= 0) & (o < parameters[1])
    total = tl.load(parameters[4] + o, mask=inside, other=1.0)
    return i, divide(_filter((i.to(KIND[0]) - middle + 0.5) * squeeze, KIND[2]), total), i < end


# -- the other way round: outputs that read input i --------------------------------------------------------------------


@triton.jit
def _guess(i, reach, parameters, KIND: tl.constexpr, SHIFT: tl.constexpr):
    """The first output whose place is behind i - reach, or one or two before it; SHIFT: places are those of middles."""
    inverse = number(parameters[3], KIND[0])
    if SHIFT:
        o = (i.to(KIND[0]) - reach + 0.5) * inverse - 0.5
    else:
        o = (i.to(KIND[0]) - reach) * inverse
    return tl.maximum(tl.floor(o), 0.0).to(i.dtype)


@triton.jit
def nearest_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    o = tl.maximum(tl.floor(i.to(tl.float32) * number(parameters[3], tl.float32) - KIND[1]) - 1.0, 0.0).to(i.dtype)
    o += (_nearest(o, parameters, KIND) < i).to(i.dtype)
    o += (_nearest(o, parameters, KIND) < i).to(i.dtype)
    o += (_nearest(o, parameters, KIND) < i).to(i.dtype)
    o += t
    return o, 1.0, (o < parameters[1]) & (_nearest(o, parameters, KIND) == i)


@triton.jit
def linear_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    # An output at i - 1 has a weight of 0 for i; before the first input there may be several.
    before = (i - 1).to(KIND[0])
    o = _guess(i, 1.0, parameters, KIND, not KIND[1])
    o += (_linear_place(o, parameters, KIND) <= before).to(i.dtype)
    o += (_linear_place(o, parameters, KIND) <= before).to(i.dtype) + t
    first, second, weight = _linear(o, parameters, KIND)
    total = tl.where(first == i, 1.0 - weight, 0.0) + tl.where(second == i, weight, 0.0)
    return o, total, (o < parameters[1]) & ((first == i) | (second == i))


@triton.jit
def cubic_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    last = parameters[0] - 1
    o = _guess(i, 2.0, parameters, KIND, not KIND[1])
    second, _ = _cubic(o, parameters, KIND)
    o += (tl.minimum(second + 2, last) < i).to(i.dtype)
    second, _ = _cubic(o, parameters, KIND)
    o += (tl.minimum(second + 2, last) < i).to(i.dtype) + t
    second, after = _cubic(o, parameters, KIND)
    total = tl.zeros_like(after)
    for k in tl.static_range(4):
        read = tl.minimum(tl.maximum(second - 1 + k, 0), last)
        total += tl.where(read == i, _cubic_weight(tl.abs(after + 1.0 - k), -0.75), 0.0)
    return o, total, (o < parameters[1]) & (tl.maximum(second - 1, 0) <= i) & (i <= tl.minimum(tl.maximum(second + 2, 0), last))


@triton.jit
def smooth_cover(i, t, parameters, KIND: tl.constexpr, D: tl.constexpr):
    stretch = tl.maximum(number(parameters[2], KIND[0]), 1.0)
    o = _guess(i, stretch * KIND[2] + 0.5, parameters, KIND, True)
    _, end, _, _ = _reach(o, parameters, KIND)
    o += (end <= i).to(i.dtype)
    _, end, _, _ = _reach(o, parameters, KIND)
    o += (end <= i).to(i.dtype) + t
    first, end, middle, squeeze = _reach(o, parameters, KIND)
    total = tl.load(parameters[4] + o, mask=o < parameters[1], other=1.0)
    weight = divide(_filter((i.to(KIND[0]) - middle + 0.5) * squeeze, KIND[2]), total)
    return o, weight, (o < parameters[1]) & (first <= i) & (i < end)


@triton.jit
def weight_sums_kernel(tables, dims, taps, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of each output's weights, for each dimension. Grid: (blocks of outputs, dimensions)."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for d in tl.static_range(len(tables)):
        if tl.program_id(1) == d:
            first, end, middle, squeeze = _reach(o, dims[d], KIND)
            total = tl.zeros([BLOCK], KIND[0])
            for t in range(taps[d]):
                i = first + t
                total += tl.where(i < end, _filter((i.to(KIND[0]) - middle + 0.5) * squeeze, KIND[2]), 0.0)
            tl.store(tables[d] + o, total, mask=o < dims[d][1])


# -- scales ------------------------------------------------------------------------------------------------------------


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _parts(value: float, wide: bool) -> tuple[float, ...]:
    """``value`` as float32 numbers that add up to it: to its nearest float32, or to all of its 53 bits."""
    high = _float32(value)
    if not wide:
        return (high,)
    middle = _float32(value - high)
    return high, middle, value - high - middle


class Scale(NamedTuple):
    """How one dimension is resampled.

    Attributes:
        size: of the input.
        output: size of the output.
        value: input elements for an output element, as precise as the kernel has it.
    """

    size: int
    output: int
    value: float

    @property
    def inverse(self) -> float:
        return 1.0 / self.value if self.value > 0 else 0.0

    def parameters(self, wide: bool, *more: Any) -> tuple[Any, ...]:
        return (Size(self.size), Size(self.output), _parts(self.value, wide), _parts(self.inverse, wide), *more)

    def readers(self, reach: float) -> int:
        """The most outputs whose place is within ``reach`` before and behind an input."""
        if self.value <= 0:
            return self.output
        n = 2 * reach / self.value
        # Places are rounded unless the scale is a power of two: then one more may fall into the range.
        exact = math.frexp(self.value)[0] == 0.5
        return min(max(math.ceil(n) + (0 if exact else 1), 1), self.output)


def scales(x_shape: Sequence[int], output: Sequence[int], factors: Sequence[float | None], aligned: bool, wide: bool) -> list[Scale]:
    """The scale of each spatial dimension."""
    found = []
    for n, o, factor in zip(x_shape[2:], output, factors):
        if aligned:
            value = (n - 1) / (o - 1) if o > 1 else 0.0
        else:
            value = 1.0 / factor if factor is not None and factor > 0 else n / o
        found.append(Scale(n, o, value if wide else _float32(value)))
    return found


def _checked(shape: Sequence[int], output: Sequence[int], rank: int) -> tuple[int, ...]:
    """The whole output's shape.

    Raises:
        Decline: PyTorch rejects the sizes.
    """
    if len(shape) != rank + 2 or len(output) != rank:
        raise Decline("PyTorch rejects it: the number of dimensions")
    if any(n < 1 for n in (*shape[1:], *output)):
        raise Decline("PyTorch rejects it: sizes must be positive")
    return (*shape[:2], *output)


def _forward(call: Call, aligned: bool, factors: Sequence[float | None], wide: bool) -> tuple[TensorMeta, list[Scale], Alloc]:
    """The input, a scale for each of ``factors`` (one a spatial dimension of the op) and the result."""
    x, output = call.args[:2]
    shape = _checked(x.shape, output, len(factors))
    return x, scales(x.shape, output, factors, aligned, wide), result(shape, x.dtype, like_suggested(x))


def _backward(call: Call, aligned: bool, factors: Sequence[float | None], wide: bool,
              channels_last: bool) -> tuple[TensorMeta, list[Scale], Alloc]:
    grad, output, size = call.args[:3]
    shape = _checked(size, output, len(factors))
    if grad.shape != shape:
        raise Decline("PyTorch rejects it: the gradient is not of the output's shape")
    found = scales(size, output, factors, aligned, wide)
    for s in found:
        # Outputs behind the last input all read it, more of them than the scale says.
        if not aligned and s.output > 1 and s.value * (s.output - 0.5) > s.size + 0.5:
            raise Decline("a scale factor that does not fit the sizes")
    return grad, found, result(tuple(size), grad.dtype, channels_last and like_suggested(grad))


def _compute(x: torch.dtype) -> Any:
    return tl.float64 if x == torch.float64 else tl.float32


# -- nearest -----------------------------------------------------------------------------------------------------------

_COPIED = dtype(*FLOAT, torch.uint8)
_FLOATING = dtype(*FLOAT)


def _nearest_plan(call: Call, offset: float) -> Plan:
    x, found, out = _forward(call, False, call.args[2:], False)
    dims = [Dim(1, s.parameters(False)) for s in found]
    return gather_plan(call, (Arg(0), x), out, dims, nearest_tap, (tl.float32, offset))


def _nearest_backward(call: Call, offset: float) -> Plan:
    factors = call.args[3:]
    # Of the volumes' results only the two-dimensional ones keep the gradient's format.
    grad, found, out = _backward(call, False, factors, False, len(factors) == 2)
    dims = [Dim(s.readers(0.5), s.parameters(False)) for s in found]
    return sum_plan(call, (Arg(0), grad), out, dims, nearest_cover, (tl.float32, offset))


_SCALES = ("scales", "scales_d", "scales_h", "scales_w")


@planned(["aten.upsample_nearest1d.default", "aten.upsample_nearest2d.default", "aten.upsample_nearest3d.default"], _COPIED,
         family="upsample", kernel=gather_kernel, by_value=_SCALES)
def upsample_nearest(call: Call) -> Plan:
    return _nearest_plan(call, 0.0)


@planned(["aten._upsample_nearest_exact1d.default", "aten._upsample_nearest_exact2d.default", "aten._upsample_nearest_exact3d.default"],
         _COPIED, family="upsample", kernel=gather_kernel, by_value=_SCALES)
def upsample_nearest_exact(call: Call) -> Plan:
    return _nearest_plan(call, 0.5)


@planned(["aten.upsample_nearest1d_backward.default", "aten.upsample_nearest2d_backward.default",
          "aten.upsample_nearest3d_backward.default"], _FLOATING, family="upsample", kernel=window_sum_kernel, by_value=_SCALES)
def upsample_nearest_backward(call: Call) -> Plan:
    return _nearest_backward(call, 0.0)


@planned(["aten._upsample_nearest_exact1d_backward.default", "aten._upsample_nearest_exact2d_backward.default",
          "aten._upsample_nearest_exact3d_backward.default"], _FLOATING, family="upsample", kernel=window_sum_kernel, by_value=_SCALES)
def upsample_nearest_exact_backward(call: Call) -> Plan:
    return _nearest_backward(call, 0.5)


# -- linear and cubic --------------------------------------------------------------------------------------------------


def _interpolate(call: Call, tap: Any, taps: int) -> Plan:
    aligned = bool(call.args[2])
    wide = call.args[0].dtype == torch.float64
    x, found, out = _forward(call, aligned, call.args[3:], wide)
    dims = [Dim(taps, s.parameters(wide)) for s in found]
    return sum_plan(call, (Arg(0), x), out, dims, tap, (_compute(x.dtype), aligned))


def _interpolate_backward(call: Call, cover: Any, reach: float, channels_last: bool = True) -> Plan:
    aligned = bool(call.args[3])
    wide = call.args[0].dtype == torch.float64
    grad, found, out = _backward(call, aligned, call.args[4:], wide, channels_last)
    dims = [Dim(s.readers(reach), s.parameters(wide)) for s in found]
    return sum_plan(call, (Arg(0), grad), out, dims, cover, (_compute(grad.dtype), aligned))


@planned(["aten.upsample_linear1d.default", "aten.upsample_bilinear2d.default", "aten.upsample_trilinear3d.default"], _FLOATING,
         family="upsample", kernel=window_sum_kernel, by_value=_SCALES)
def upsample_linear(call: Call) -> Plan:
    return _interpolate(call, linear_tap, 2)


@planned("aten.upsample_bicubic2d.default", _FLOATING, family="upsample", kernel=window_sum_kernel, by_value=_SCALES)
def upsample_bicubic(call: Call) -> Plan:
    return _interpolate(call, cubic_tap, 4)


@planned(["aten.upsample_linear1d_backward.default", "aten.upsample_bilinear2d_backward.default",
          "aten.upsample_trilinear3d_backward.default"], _FLOATING, family="upsample", kernel=window_sum_kernel, by_value=_SCALES)
def upsample_linear_backward(call: Call) -> Plan:
    return _interpolate_backward(call, linear_cover, 1.0)


@planned("aten.upsample_bicubic2d_backward.default", _FLOATING, family="upsample", kernel=window_sum_kernel, by_value=_SCALES)
def upsample_bicubic_backward(call: Call) -> Plan:
    return _interpolate_backward(call, cubic_cover, 2.0, False)


# -- antialiased -------------------------------------------------------------------------------------------------------


def _with_sums(call: Call, plan: Plan, found: Sequence[Scale], tables: Sequence[Alloc], wide: bool, kind: tuple[Any, ...]) -> Plan:
    """``plan``, whose allocations 1 and on are ``tables``, after a launch that fills them."""
    if not plan.launches:
        return plan
    support = kind[2]
    longest = max(s.output for s in found)
    block = min(power_of_2(longest), 4096 if call.target.interpreted else 128)
    taps = tuple([Size(math.ceil(support * max(s.value, 1.0)) * 2 + 1) for s in reversed(found)])
    launch = Launch(weight_sums_kernel, (-(-longest // block), len(found), 1),
                    (tuple([Out(len(found) - d) for d in range(len(found))]), tuple([s.parameters(wide) for s in reversed(found)]), taps),
                    Constants((("KIND", kind), ("BLOCK", block))))
    return plan._replace(allocs=(*plan.allocs, *tables), launches=(launch, *plan.launches))


def _tables(found: Sequence[Scale], wide: bool) -> list[Alloc]:
    return [Alloc((s.output,), (1,), torch.float64 if wide else torch.float32) for s in found]


def _smooth(call: Call, support: int) -> Plan:
    aligned = bool(call.args[2])
    wide = call.args[0].dtype == torch.float64
    x, found, out = _forward(call, aligned, call.args[3:], wide)
    kind = (_compute(x.dtype), aligned, support)
    dims = [Dim(math.ceil(support * max(s.value, 1.0)) * 2 + 1, s.parameters(wide, Out(1 + d))) for d, s in enumerate(found)]
    check_measured("upsample", call.target, taps=math.prod(d.taps for d in dims), itemsize=x.dtype.itemsize)
    plan = sum_plan(call, (Arg(0), x), out, dims, smooth_tap, kind, fixed=False)
    return _with_sums(call, plan, found, _tables(found, wide), wide, kind)


def _smooth_backward(call: Call, support: int, channels_last: bool) -> Plan:
    aligned = bool(call.args[3])
    wide = call.args[0].dtype == torch.float64
    grad, found, out = _backward(call, aligned, call.args[4:], wide, channels_last)
    kind = (_compute(grad.dtype), aligned, support)
    dims = [Dim(s.readers(support * max(s.value, 1.0) + 0.5), s.parameters(wide, Out(1 + d))) for d, s in enumerate(found)]
    plan = sum_plan(call, (Arg(0), grad), out, dims, smooth_cover, kind, fixed=False)
    return _with_sums(call, plan, found, _tables(found, wide), wide, kind)


@planned("aten._upsample_bilinear2d_aa.default", _FLOATING, family="upsample", kernel=smooth_tap, by_value=_SCALES)
def upsample_bilinear2d_aa(call: Call) -> Plan:
    return _smooth(call, 1)


@planned("aten._upsample_bicubic2d_aa.default", _FLOATING, family="upsample", kernel=smooth_tap, by_value=_SCALES)
def upsample_bicubic2d_aa(call: Call) -> Plan:
    return _smooth(call, 2)


@planned("aten._upsample_bilinear2d_aa_backward.default", _FLOATING, family="upsample", kernel=smooth_cover, by_value=_SCALES)
def upsample_bilinear2d_aa_backward(call: Call) -> Plan:
    return _smooth_backward(call, 1, True)


@planned("aten._upsample_bicubic2d_aa_backward.default", _FLOATING, family="upsample", kernel=smooth_cover, by_value=_SCALES)
def upsample_bicubic2d_aa_backward(call: Call) -> Plan:
    return _smooth_backward(call, 2, False)


if hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):  # PyTorch 2.13 and later

    @planned("aten._upsample_lanczos2d_aa.default", _FLOATING, family="upsample", kernel=smooth_tap, by_value=_SCALES)
    def upsample_lanczos2d_aa(call: Call) -> Plan:
        return _smooth(call, 3)

    @planned("aten._upsample_lanczos2d_aa_backward.default", _FLOATING, family="upsample", kernel=smooth_cover,
             by_value=_SCALES)
    def upsample_lanczos2d_aa_backward(call: Call) -> Plan:
        return _smooth_backward(call, 3, False)
