"""Cross-entropy of logits and class indices in one read, forward and backward, and of a linear layer without its logits.

    lse = log(sum(exp(x)))    nll = lse - x[target]    smooth = lse - mean(x)
    loss = w[target] * ((1 - e) * nll) + e * smooth        (e: label smoothing; w only without it)
    dx   = g * w[target] * (exp(x) / exp(lse) - (1 - e) * [j = target] - e / C)

Forward reads the logits once and keeps one number a row (``lse``), in float32 for 16-bit logits; nothing of the size of the
logits is stored. Backward reads them once more and writes the gradient. Rows whose target is ``ignore_index`` are not
read at all. The sum over rows is taken in a second launch, in an order that depends on the shape alone.

``linear_cross_entropy`` computes the logits of a run of rows at a time, and again in backward, so that logits of all rows
never exist together.

Source: the formulas in the documentation of ``torch.nn.CrossEntropyLoss``; the running pair of maximum and sum is that
of ``softmax.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gemsmode.custom import custom_op, wanted
from gemsmode.ops.loss import MEAN, NONE, SUM, _targets, nll_finish_kernel
from gemsmode.ops.promotion import FLOAT, TRITON, opmath
from gemsmode.ops.rows import (
    INTERPRETED_BLOCK,
    column_range,
    is_wide,
    ladder,
    power_of_2,
    sizes_argument,
    split_rows,
    unravel,
    warps,
)
from gemsmode.ops.softmax import finite_or_zero, online
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

_REDUCTIONS = {NONE: "none", MEAN: "mean", SUM: "sum"}

# -- references and fakes ----------------------------------------------------------------------------------------------


def _class_dim(x: Any) -> int:
    return 1 if x.ndim > 1 else 0


def _kept_shape(x: Any) -> tuple[int, ...]:
    axis = _class_dim(x)
    return (*x.shape[:axis], *x.shape[axis + 1:])


def _cross_entropy(input: Any, target: Any, weight: Any = None, reduction: int = MEAN, ignore_index: int = -100,
                   label_smoothing: float = 0.0, float32: bool = False) -> Any:
    wide = input.to(opmath(input.dtype))
    loss = F.cross_entropy(wide, target, None if weight is None else weight.to(wide.dtype), reduction=_REDUCTIONS[reduction],
                           ignore_index=ignore_index, label_smoothing=label_smoothing)
    counts = target != ignore_index
    if weight is not None:
        counts = torch.where(counts, weight.to(wide.dtype)[torch.where(counts, target, 0)], 0.0)
    lse = wide.logsumexp(_class_dim(wide)).detach()
    return loss if float32 else loss.to(input.dtype), torch.where(target != ignore_index, lse, 0.0), counts.sum(dtype=wide.dtype).detach()


def _cross_entropy_backward(grad: Any, input: Any, target: Any, lse: Any, total: Any, weight: Any, reduction: int, ignore_index: int,
                            label_smoothing: float) -> Any:
    axis = _class_dim(input)
    classes = input.shape[axis]
    counts = target != ignore_index
    index = torch.where(counts, target, 0)
    scale = grad.to(lse.dtype) * (counts if weight is None else torch.where(counts, weight.to(lse.dtype)[index], 0.0))
    if reduction == MEAN:
        scale = scale / total
    p = (input.to(lse.dtype) - lse.unsqueeze(axis)).exp()
    hit = torch.zeros_like(p).scatter(axis, index.unsqueeze(axis), 1.0 - label_smoothing)
    result = torch.where(counts.unsqueeze(axis), (p - hit - label_smoothing / classes) * scale.unsqueeze(axis), 0.0)
    return result.to(input.dtype)


def _fake(input: Any, target: Any, weight: Any = None, reduction: int = MEAN, ignore_index: int = -100, label_smoothing: float = 0.0,
          float32: bool = False) -> Any:
    acc = opmath(input.dtype)
    kept = _kept_shape(input)
    return (input.new_empty(kept if reduction == NONE else (), dtype=acc if float32 else input.dtype), input.new_empty(kept, dtype=acc),
            input.new_empty((), dtype=acc))


def _fake_backward(grad: Any, input: Any, *args: Any) -> Any:
    return input.new_empty(input.shape)


cross_entropy = custom_op(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, float label_smoothing=0.0, "
    "bool float32=False) -> (Tensor, Tensor, Tensor)", reference=_cross_entropy, fake=_fake)
"""(loss, log-sum-exp of each row or 0 where it is ignored, sum of the targets' weights). ``float32``: 16-bit logits give a
float32 loss."""

cross_entropy_backward = custom_op(
    "cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor lse, Tensor total, Tensor? weight, int reduction, "
    "int ignore_index, float label_smoothing) -> Tensor", reference=_cross_entropy_backward, fake=_fake_backward)

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def cross_entropy_kernel(p_loss, p_lse, weights, p_x, p_target, weight, smoothing, n_rows, n, ignore, sizes, x_rows, target_rows, x_class,
                         w_class, SMOOTH: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_N: tl.constexpr):
    """Loss and log-sum-exp of each row, and the weight of its target if `weights` is not empty. Grid: blocks of rows."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    target, m_counts = _targets(p_target, unravel(o_row, sizes, target_rows), m_row, ignore, n)
    p_in = p_x + unravel(o_row, sizes, x_rows)[:, None]
    lane_m = tl.full([BLOCK_R, BLOCK_N], float("-inf"), ACC)
    lane_s = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    lane_x = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    # Rows that are ignored are not read.
    end = tl.where(tl.max(m_counts.to(tl.int32), axis=0) == 0, 0, n)
    for start in range(0, end, BLOCK_N):
        o_class = column_range(start, BLOCK_N, WIDE)
        mask = m_counts[:, None] & (o_class < n)[None, :]
        x = tl.load(p_in + (o_class * x_class)[None, :], mask=mask, other=float("-inf")).to(ACC)
        lane_m, lane_s = online(lane_m, lane_s, x)
        if SMOOTH:
            lane_x += tl.where(mask, x, 0.0)
    m = tl.max(lane_m, axis=1)
    lse = m + tl.log(tl.sum(lane_s * tl.exp(lane_m - finite_or_zero(m)[:, None]), axis=1))
    # [BLOCK_R]
    x_target = tl.load(p_x + unravel(o_row, sizes, x_rows) + target * x_class, mask=m_counts, other=0.0).to(ACC)
    loss = lse - x_target
    if SMOOTH:
        e = tl.cast(smoothing, ACC)
        loss = (1 - e) * loss + e * (lse - tl.sum(lane_x, axis=1) / n)
    w = m_counts.to(ACC)
    if len(weight) == 1:
        w = tl.load(weight[0] + target * w_class, mask=m_counts, other=0.0).to(ACC)
        loss = loss * w
    tl.store(p_loss + o_row, tl.where(m_counts, loss, 0.0).to(p_loss.dtype.element_ty), mask=m_row)
    tl.store(p_lse + o_row, tl.where(m_counts, lse, 0.0), mask=m_row)
    if len(weights) == 1:
        tl.store(weights[0] + o_row, w, mask=m_row)


@triton.jit
def cross_entropy_backward_kernel(p_dx, p_g, p_x, p_target, p_lse, p_total, weight, smoothing, n_rows, n, ignore, sizes, dx_rows, g_rows,
                                  x_rows, target_rows, dx_class, x_class, w_class, MEAN: tl.constexpr, ACC: tl.constexpr,
                                  WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """The gradient, zeros in rows that are ignored. Grid: blocks of rows, blocks of classes."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    target, m_counts = _targets(p_target, unravel(o_row, sizes, target_rows), m_row, ignore, n)
    g = tl.load(p_g + unravel(o_row, sizes, g_rows), mask=m_counts, other=0.0).to(ACC)
    if len(weight) == 1:
        g = g * tl.load(weight[0] + target * w_class, mask=m_counts, other=0.0).to(ACC)
    if MEAN:
        g = g / tl.load(p_total).to(ACC)
    lse = tl.load(p_lse + o_row, mask=m_counts, other=0.0)
    e = tl.cast(smoothing, ACC)
    o_class = column_range(tl.program_id(1) * BLOCK_N, BLOCK_N, WIDE)
    m_class = (o_class < n)[None, :]
    # [BLOCK_R, BLOCK_N]
    x = tl.load(p_x + unravel(o_row, sizes, x_rows)[:, None] + (o_class * x_class)[None, :], mask=m_counts[:, None] & m_class, other=0.0)
    p = tl.exp(x.to(ACC) - lse[:, None])
    slope = p - tl.where(target[:, None] == o_class[None, :], 1 - e, 0.0) - e / n
    dx = tl.where(m_counts[:, None], slope * g[:, None], 0.0).to(p_dx.dtype.element_ty)
    tl.store(p_dx + unravel(o_row, sizes, dx_rows)[:, None] + (o_class * dx_class)[None, :], dx, mask=m_row[:, None] & m_class)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A program's share: rows by classes a step, and its warps."""

    rows: int
    classes: int
    warps: int


_WARPS = ((2048, 4), (4096, 8), (1 << 30, 16))


def choose_tile(n_rows: int, classes: int, classes_fast: bool, itemsize: int, target: Target) -> Tile:
    """The tile for rows of ``classes`` logits that are computed with in ``itemsize`` bytes; ``classes_fast``: they are adjacent."""
    if target.interpreted:
        columns = min(power_of_2(classes), INTERPRETED_BLOCK)
        return Tile(max(min(INTERPRETED_BLOCK // columns, power_of_2(n_rows)), 1), columns, 4)
    budget = 4096 * 4 // itemsize
    if not classes_fast:
        # The rows are adjacent: 64 of them keep accesses coalesced.
        rows = min(64, power_of_2(n_rows))
        columns = min(power_of_2(classes), budget // 2 // rows)
        return Tile(rows, columns, ladder(_WARPS, rows * columns * itemsize // 4))
    columns = min(power_of_2(classes), budget)
    rows = max(min(budget // 2 // columns, power_of_2(n_rows)), 1)
    return Tile(rows, columns, ladder(_WARPS, rows * columns * itemsize // 4))


# -- rules -------------------------------------------------------------------------------------------------------------


def _check(x: TensorMeta, target: TensorMeta, weight: TensorMeta | None, reduction: int) -> tuple[int, int, tuple[int, ...]]:
    """The class dimension, the number of classes and the shape of the rows.

    Raises:
        Decline: what the kernels do not take (class probabilities as targets), or PyTorch rejects.
    """
    axis = 1 if x.ndim > 1 else 0
    if x.ndim == 0 or x.shape[axis] == 0:
        raise Decline("no classes")
    kept = (*x.shape[:axis], *x.shape[axis + 1:])
    if target.dtype.is_floating_point:
        raise Decline("targets that are class probabilities")
    if target.dtype not in (torch.int64, torch.uint8) or target.shape != kept:
        raise Decline("PyTorch rejects it: targets that are no class indices of the input's rows")
    if weight is not None and weight.shape != (x.shape[axis],):
        raise Decline("PyTorch rejects it: weights that are not one a class")
    if weight is not None and opmath(weight.dtype) != opmath(x.dtype):
        raise Decline("an input and weights of which one alone is float64")
    if reduction not in _REDUCTIONS:
        raise Decline(f"PyTorch rejects it: reduction {reduction}")
    return axis, x.shape[axis], kept


def _expanded(strides: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Strides of a tensor of the rows' shape over all of the input."""
    return (*strides[:axis], 0, *strides[axis:])


def _weights(call: Call, index: int, metas: dict[Arg, TensorMeta]) -> tuple[tuple[Arg, ...], int]:
    """The kernel's arguments for optional class weights: the tensor and its stride."""
    weight = call.args[index]
    if weight is None:
        return (), 1
    metas[Arg(index)] = weight
    return (Arg(index),), weight.stride[0]


@planned("gemsmode.cross_entropy.default", dtype(*FLOAT, arg="input"), family="fused", kernel=cross_entropy_kernel, name="cross_entropy",
         by_value=("label_smoothing",))
def plan_cross_entropy(call: Call) -> Plan:
    x, target, weight, reduction, ignore, smoothing, float32 = call.args
    axis, classes, kept = _check(x, target, weight, reduction)
    if not 0 <= smoothing <= 1 or (smoothing and weight is not None):
        raise Decline("label smoothing together with class weights, or outside 0 to 1")
    acc = opmath(x.dtype)
    own = contiguous_strides(kept)
    result = acc if float32 else x.dtype
    metas: dict[Arg, TensorMeta] = {Arg(0): x, Arg(1): target}
    allocs = [Alloc(kept if reduction == NONE else (), own if reduction == NONE else (), result), Alloc(kept, own, acc), Alloc((), (), acc)]
    n_rows = x.numel // classes
    if n_rows == 0:
        raise Decline("no rows")
    rows = split_rows(x.shape, (axis,), [_expanded(own, axis), x.stride, _expanded(target.stride, axis)])
    tile = choose_tile(n_rows, classes, x.stride[axis] == 1 or classes == 1, acc.itemsize, call.target)
    spaces: list[Out] = []
    for _ in range(1 if reduction == NONE else 2):
        spaces.append(Out(len(allocs)))
        allocs.append(Alloc((n_rows,), (1,), acc))
    losses, weights = (Out(0), spaces[0]) if reduction == NONE else spaces
    class_weights, w_class = _weights(call, 2, metas)
    number = Num(5, "fp64" if acc == torch.float64 else "fp32")
    launches = [Launch(
        cross_entropy_kernel, (-(-n_rows // tile.rows), 1, 1),
        (losses, Out(1), (weights,), Arg(0), Arg(1), class_weights, number, Size(n_rows), classes, Size(ignore),
         sizes_argument(rows.row_sizes), *rows.row_strides[1:], x.stride[axis] if classes > 1 else 1, w_class),
        (("SMOOTH", smoothing != 0), ("ACC", TRITON[acc]), ("WIDE", is_wide(x, target)), ("BLOCK_R", tile.rows), ("BLOCK_N", tile.classes)),
        warps(tile.warps, call.target), asserts=True)]
    # Without a reduction the sum of the losses goes nowhere: it takes the place of a spare number.
    into = Out(0)
    if reduction == NONE:
        into = Out(len(allocs))
        allocs.append(Alloc((), (), acc))
    block = 1024 if n_rows <= 4096 else 4096
    launches.append(Launch(nll_finish_kernel, (1, 1, 1), (into, Out(2), losses, weights, Size(n_rows)),
                           (("MEAN", reduction == MEAN), ("ACC", TRITON[acc]), ("BLOCK", block)),
                           warps(4 if block == 1024 else 8, call.target)))
    return Plan(tuple(allocs), tuple(launches), (Out(0), Out(1), Out(2)), metas, bytes=x.numel * x.dtype.itemsize, flops=4 * x.numel)


@planned("gemsmode.cross_entropy_backward.default", dtype(*FLOAT, arg="input"), family="fused", kernel=cross_entropy_backward_kernel,
         name="cross_entropy_backward")
def plan_cross_entropy_backward(call: Call) -> Plan:
    g, x, target, lse, total, weight, reduction, ignore, _ = call.args
    axis, classes, kept = _check(x, target, weight, reduction)
    acc = opmath(x.dtype)
    if lse.dtype != acc or total.dtype != acc or lse.shape != kept or not lse.is_contiguous or total.numel != 1:
        raise Decline("saved values of another dtype or shape than forward gives")
    if g.shape != (kept if reduction == NONE else ()) or opmath(g.dtype) != acc:
        raise Decline("a gradient that does not fit the reduction")
    out = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    metas: dict[Arg, TensorMeta] = {Arg(0): g, Arg(1): x, Arg(2): target, Arg(3): lse, Arg(4): total}
    n_rows = x.numel // classes
    if n_rows == 0:
        return Plan((out,), (), Out(0), metas, bytes=0, flops=0)
    g_strides = _expanded(g.stride, axis) if reduction == NONE else (0,) * x.ndim
    # Rows are counted as forward counts them, in the order of the saved values.
    rows = split_rows(x.shape, (axis,), [_expanded(contiguous_strides(kept), axis), out.stride, g_strides, x.stride,
                                         _expanded(target.stride, axis)])
    tile = choose_tile(n_rows, classes, x.stride[axis] == 1 or classes == 1, acc.itemsize, call.target)
    class_blocks = -(-classes // tile.classes)
    if class_blocks > 65535:
        raise Decline("too many classes for one launch")
    class_weights, w_class = _weights(call, 5, metas)
    step = Launch(
        cross_entropy_backward_kernel, (-(-n_rows // tile.rows), class_blocks, 1),
        (Out(0), Arg(0), Arg(1), Arg(2), Arg(3), Arg(4), class_weights, Num(8, "fp64" if acc == torch.float64 else "fp32"), Size(n_rows),
         classes, Size(ignore), sizes_argument(rows.row_sizes), *rows.row_strides[1:], out.stride[axis] if classes > 1 else 1,
         x.stride[axis] if classes > 1 else 1, w_class),
        (("MEAN", reduction == MEAN), ("ACC", TRITON[acc]), ("WIDE", is_wide(x, target, out.meta)), ("BLOCK_R", tile.rows),
         ("BLOCK_N", tile.classes)), warps(tile.warps, call.target), asserts=True)
    return Plan((out,), (step,), Out(0), metas, bytes=2 * x.numel * x.dtype.itemsize, flops=6 * x.numel)


# -- gradient ----------------------------------------------------------------------------------------------------------

_DEFAULTS = (None, MEAN, -100, 0.0, False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, *options = [*inputs[2:]] + [*_DEFAULTS[len(inputs) - 2:]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2], weight)
    ctx.options = options[:3]


def _gradient(ctx: Any, grad: Any, *_: Any) -> Any:
    x, target, lse, total, weight = ctx.saved_tensors
    if any(wanted(ctx, 2)):
        raise NotImplementedError("gemsmode::cross_entropy is not differentiable in the class weights")
    dx = None if grad is None else cross_entropy_backward(grad, x, target, lse, total, weight, *ctx.options)
    return dx, *[None] * 6


cross_entropy.differentiate(_setup, _gradient)
cross_entropy_backward.not_differentiable()

# -- the loss of a linear layer ----------------------------------------------------------------------------------------


def _run_of_rows(n_rows: int, classes: int, width: int) -> int:
    """Rows whose logits are as many numbers as the whole input, and enough to keep a matrix product busy."""
    return max(min(n_rows, max(1 << (max(n_rows * width // max(classes, 1), 1)).bit_length(), 1024)), 1)


def _chunks(n_rows: int, classes: int, width: int, chunk: int) -> Iterator[slice]:
    step = chunk or _run_of_rows(n_rows, classes, width)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _linear_cross_entropy(input: Any, linear_weight: Any, target: Any, bias: Any = None, weight: Any = None, reduction: int = MEAN,
                          ignore_index: int = -100, label_smoothing: float = 0.0, chunk: int = 0) -> Any:
    losses, lses, totals = [], [], []
    for rows in _chunks(input.shape[0], linear_weight.shape[0], input.shape[1], chunk):
        logits = F.linear(input[rows], linear_weight, bias)
        loss, lse, total = cross_entropy(logits, target[rows], weight, NONE, ignore_index, label_smoothing, True)
        losses.append(loss)
        lses.append(lse)
        totals.append(total)
    loss, lse, total = torch.cat(losses), torch.cat(lses), torch.stack(totals).sum()
    if reduction != NONE:
        loss = loss.sum() / total if reduction == MEAN else loss.sum()
    return loss, lse, total


def _linear_cross_entropy_backward(grad: Any, input: Any, linear_weight: Any, target: Any, lse: Any, total: Any, bias: Any, weight: Any,
                                   reduction: int, ignore_index: int, label_smoothing: float, chunk: int, output_mask: Any) -> Any:
    wants_input, wants_weight, wants_bias = output_mask
    runs = list(_chunks(input.shape[0], linear_weight.shape[0], input.shape[1], chunk))
    # Sums over several runs are kept in float32.
    several = opmath(linear_weight.dtype) if len(runs) > 1 else linear_weight.dtype
    d_input = torch.empty_like(input) if wants_input else input.new_empty(0)
    d_weight = torch.zeros_like(linear_weight, dtype=several) if wants_weight else input.new_empty(0)
    d_bias = input.new_zeros(linear_weight.shape[0], dtype=several) if wants_bias else input.new_empty(0)
    for rows in runs:
        logits = F.linear(input[rows], linear_weight, bias)
        g = grad[rows] if reduction == NONE else grad
        d_logits = cross_entropy_backward(g, logits, target[rows], lse[rows], total, weight, reduction, ignore_index, label_smoothing)
        if wants_input:
            d_input[rows] = d_logits @ linear_weight
        if wants_weight:
            d_weight += d_logits.t() @ input[rows]
        if wants_bias:
            d_bias += d_logits.sum(0)
    return d_input, d_weight.to(linear_weight.dtype), d_bias.to(linear_weight.dtype)


def _fake_linear(input: Any, linear_weight: Any, target: Any, bias: Any = None, weight: Any = None, reduction: int = MEAN,
                 ignore_index: int = -100, label_smoothing: float = 0.0, chunk: int = 0) -> Any:
    acc = opmath(input.dtype)
    rows = input.shape[0]
    return (input.new_empty((rows,) if reduction == NONE else (), dtype=acc), input.new_empty((rows,), dtype=acc),
            input.new_empty((), dtype=acc))


def _fake_linear_backward(grad: Any, input: Any, linear_weight: Any, target: Any, lse: Any, total: Any, bias: Any, weight: Any,
                          reduction: int, ignore_index: int, label_smoothing: float, chunk: int, output_mask: Any) -> Any:
    a, b, c = output_mask
    return (torch.empty_like(input) if a else input.new_empty(0),
            torch.empty_like(linear_weight) if b else linear_weight.new_empty(0),
            linear_weight.new_empty(linear_weight.shape[0] if c else 0))


linear_cross_entropy = custom_op(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? bias=None, Tensor? weight=None, int reduction=1, "
    "int ignore_index=-100, float label_smoothing=0.0, int chunk=0) -> (Tensor, Tensor, Tensor)",
    reference=_linear_cross_entropy, fake=_fake_linear, composite=True)
"""Cross-entropy of ``input @ linear_weight.T + bias``, [rows, width] and [classes, width], ``chunk`` rows of logits at a time (0:
chosen). Results are those of :data:`cross_entropy`, in float32 for 16 bits."""

linear_cross_entropy_backward = custom_op(
    "linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, Tensor lse, Tensor total, "
    "Tensor? bias, Tensor? weight, int reduction, int ignore_index, float label_smoothing, int chunk, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)", reference=_linear_cross_entropy_backward, fake=_fake_linear_backward, composite=True)


_LINEAR_DEFAULTS = (None, None, MEAN, -100, 0.0, 0)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    bias, weight, *options = [*inputs[3:]] + [*_LINEAR_DEFAULTS[len(inputs) - 3:]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[1], output[2], bias, weight)
    ctx.options = options


def _linear_gradient(ctx: Any, grad: Any, *_: Any) -> Any:
    if grad is None:
        return (None,) * 9
    if any(wanted(ctx, 4)):
        raise NotImplementedError("gemsmode::linear_cross_entropy is not differentiable in the class weights")
    mask = list(wanted(ctx, 0, 1, 3))
    dx, dw, db = linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, mask)
    return dx if mask[0] else None, dw if mask[1] else None, None, db if mask[2] else None, *[None] * 5


linear_cross_entropy.differentiate(_setup_linear, _linear_gradient)
linear_cross_entropy_backward.not_differentiable()
