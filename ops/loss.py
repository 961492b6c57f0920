"""Losses: elementwise ones with their reductions, and negative log likelihood.

An elementwise loss is a function of one element of each operand. Without a reduction it is a pointwise op; with one,
programs leave partial sums in a workspace and a second launch adds these up (a small input takes one launch), so the
sum is the same from run to run. Its backward is pointwise.

Negative log likelihood picks ``-x[n, target[n]] * w[target[n]]``; the mean divides by the sum of the weights.
Its backward writes each element of the gradient once, zeros included. Targets are checked on the device
(``tl.device_assert``), as PyTorch's kernels do.

Source: the formulas in the documentation of ``torch.nn.MSELoss``, ``SmoothL1Loss``, ``HuberLoss``, ``SoftMarginLoss``,
``BCELoss``, ``BCEWithLogitsLoss`` and ``NLLLoss``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.layout import broadcast_shape, broadcast_strides, is_dense, merge, output_strides
from gemsmode.ops.maths import divide, exp, log1p
from gemsmode.ops.pointwise import Operand, as_operand, build
from gemsmode.ops.promotion import FLOAT, TRITON, opmath, result_type
from gemsmode.ops.rows import (
    INTERPRETED_BLOCK,
    is_wide,
    locate,
    power_of_2,
    row_offsets,
    sizes_argument,
    split_rows,
    unravel,
    warps,
)
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

NONE, MEAN, SUM = 0, 1, 2
"""PyTorch's numbers of the reductions."""

# -- functions of loaded blocks ----------------------------------------------------------------------------------------


@triton.jit
def mse(self, target):
    d = self - target
    return d * d


@triton.jit
def mse_gradient(grad_output, self, target, count):
    return divide(2 * (self - target) * grad_output, count)


@triton.jit
def smooth_l1(self, target, beta):
    d = tl.abs(self - target)
    return tl.where(d < beta, divide(0.5 * d * d, beta), d - 0.5 * beta)


@triton.jit
def smooth_l1_gradient(grad_output, self, target, beta, count):
    d = self - target
    inside = divide(d, tl.where(beta == 0, 1.0, beta))
    slope = tl.where(d <= -beta, -1.0, tl.where(d >= beta, 1.0, inside))
    return divide(slope * grad_output, count)


@triton.jit
def huber(self, target, delta):
    d = tl.abs(self - target)
    return tl.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))


@triton.jit
def huber_gradient(grad_output, self, target, delta, count):
    d = self - target
    slope = tl.where(d <= -delta, -delta, tl.where(d >= delta, delta, d))
    return divide(slope * grad_output, count)


@triton.jit
def soft_margin(self, target):
    return log1p(exp(-target * self))


@triton.jit
def soft_margin_gradient(grad_output, self, target, count):
    z = exp(-target * self)
    return divide(divide(-target * z, z + 1) * grad_output, count)


@triton.jit
def cross_entropy(self, target):
    """Logarithms are cut off at -100; NaN is not."""
    tl.device_assert((self >= 0) & (self <= 1), "all elements of input should be between 0 and 1")
    tl.device_assert((target >= 0) & (target <= 1), "all elements of target should be between 0 and 1")
    low = tl.maximum(log1p(-self), -100.0, propagate_nan=tl.PropagateNan.ALL)
    high = tl.maximum(tl.log(self), -100.0, propagate_nan=tl.PropagateNan.ALL)
    return (target - 1) * low - target * high


@triton.jit
def weighted_cross_entropy(self, target, weight):
    return cross_entropy(self, target) * weight


@triton.jit
def cross_entropy_gradient(grad_output, self, target, count):
    slope = divide(self - target, tl.maximum((1 - self) * self, 1e-12, propagate_nan=tl.PropagateNan.ALL))
    return divide(slope * grad_output, count)


@triton.jit
def weighted_cross_entropy_gradient(grad_output, self, target, weight, count):
    return cross_entropy_gradient(grad_output, self, target, count) * weight


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - log1p(exp(-tl.abs(x)))


@triton.jit
def logits(self, target):
    return (1 - target) * self - log_sigmoid(self)


@triton.jit
def weighted_logits(self, target, weight):
    return logits(self, target) * weight


@triton.jit
def positive_logits(self, target, pos_weight):
    return (1 - target) * self - ((pos_weight - 1) * target + 1) * log_sigmoid(self)


@triton.jit
def weighted_positive_logits(self, target, weight, pos_weight):
    return positive_logits(self, target, pos_weight) * weight


# -- sums of an elementwise loss: kernels ------------------------------------------------------------------------------


@triton.jit
def _operand(p, o, strides, sizes, mask, ACC: tl.constexpr, IS_NUMBER: tl.constexpr):
    if IS_NUMBER:
        return tl.cast(p, ACC)
    else:
        return tl.load(p + unravel(o, sizes, strides), mask=mask, other=0.0).to(ACC)


@triton.jit
def loss_sum_kernel(p_out, ins, n, steps, sizes, strides, FN: tl.constexpr, NUMBERS: tl.constexpr, FINAL: tl.constexpr,
                    MEAN: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums of a loss, one a program; FINAL: there is one program, and it writes the result. Grid: programs."""
    total = tl.zeros([BLOCK], ACC)
    for t in range(tl.program_id(0), steps, tl.num_programs(0)):
        o = tl.arange(0, BLOCK)
        if WIDE:
            o = o.to(tl.int64) + tl.cast(t, tl.int64) * BLOCK
        else:
            o = o + t * BLOCK
        m = o < n
        b0 = _operand(ins[0], o, strides[0], sizes, m, ACC, NUMBERS[0])
        b1 = _operand(ins[1], o, strides[1], sizes, m, ACC, NUMBERS[1])
        if len(ins) == 2:
            value = FN(b0, b1)
        else:
            b2 = _operand(ins[2], o, strides[2], sizes, m, ACC, NUMBERS[2])
            if len(ins) == 3:
                value = FN(b0, b1, b2)
            else:
                value = FN(b0, b1, b2, _operand(ins[3], o, strides[3], sizes, m, ACC, NUMBERS[3]))
        total += tl.where(m, value, 0.0)
    result = tl.sum(total, axis=0)
    if FINAL:
        if MEAN:
            result = result / n
        tl.store(p_out, result.to(p_out.dtype.element_ty))
    else:
        tl.store(p_out + tl.program_id(0), result)


@triton.jit
def loss_finish_kernel(p_out, p_parts, n_parts, n, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the partial sums. One program."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, n_parts, BLOCK):
        o = start + tl.arange(0, BLOCK)
        total += tl.load(p_parts + o, mask=o < n_parts, other=0.0)
    result = tl.sum(total, axis=0)
    if MEAN:
        result = result / n
    tl.store(p_out, result.to(p_out.dtype.element_ty))


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """How a sum over all elements is shared out: elements a step, steps, programs."""

    block: int
    steps: int
    programs: int


_ONE_PROGRAM = 4096  # elements: a second launch costs more than one program's few steps


def choose_sum(n: int, target: Target) -> Sum:
    """The shares of a sum of ``n`` elements."""
    if target.interpreted:
        block = min(power_of_2(n), INTERPRETED_BLOCK)
        steps = -(-n // block)
        return Sum(block, steps, min(steps, 3))
    block = 1024
    steps = -(-n // block)
    programs = 1 if n <= _ONE_PROGRAM else min(steps, target.multiprocessors * 8)
    return Sum(block, steps, programs)


# -- elementwise losses: plans -----------------------------------------------------------------------------------------


def _reduced(call: Call, function: Any, operands: Sequence[Operand], reduction: int, result: torch.dtype, shape: tuple[int, ...]) -> Plan:
    """The plan of a loss's sum or mean over ``shape``."""
    metas = {o.ref: o.meta for o in operands if o.meta is not None}
    n = 1
    for size in shape:
        n *= size
    acc = operands[0].compute
    if n:
        loops = merge(shape, [broadcast_strides(m, shape) for m in metas.values()])
    else:
        loops = merge((), [() for _ in metas])
    given = iter(loops.strides)
    strides = tuple([() if o.meta is None else next(given) for o in operands])
    share = choose_sum(n, call.target)
    out = Alloc((), (), result)
    final = share.programs <= 1
    allocs = (out,) if final else (out, Alloc((share.programs,), (1,), acc))
    common = (("MEAN", reduction == MEAN), ("ACC", TRITON[acc]))
    wide = n >= 2**31 - 2**18 or is_wide(*metas.values())
    sizes = sizes_argument(loops.sizes, specialize_first=loops.sizes[0] != 1)
    launches = [Launch(loss_sum_kernel, (max(share.programs, 1), 1, 1),
                       (Out(0) if final else Out(1), tuple([o.ref for o in operands]), extent(n), Size(share.steps), sizes, strides),
                       (("FN", function), ("NUMBERS", tuple([o.meta is None for o in operands])), ("FINAL", final), *common,
                        ("WIDE", wide), ("BLOCK", share.block)), warps(4, call.target), asserts=function in _CHECKED)]
    if not final:
        launches.append(Launch(loss_finish_kernel, (1, 1, 1), (Out(0), Out(1), Size(share.programs), Size(n)),
                               (*common, ("BLOCK", 1024)), warps(4, call.target)))
    moved = sum([m.numel * m.dtype.itemsize for m in metas.values()])
    return Plan(allocs, tuple(launches), Out(0), metas, bytes=moved, flops=n * 4)  # type: ignore[arg-type]


_CHECKED = (cross_entropy, weighted_cross_entropy)
"""Functions that assert what PyTorch asserts of their inputs."""


def _loss(call: Call, function: Any, names: Sequence[str], common: torch.dtype, stride: tuple[int, ...] | None) -> Plan:
    """A loss's forward; ``names``: the arguments that are ``function``'s; ``stride``: of a result without reduction."""
    index = {p.name: i for i, p in enumerate(parameters(call.op))}
    operands = [as_operand(call, index[n], common) for n in names]
    if any(o.meta is None for o, n in zip(operands, names) if n not in ("beta", "delta")):
        raise Decline("a CPU tensor among the operands")
    shape = broadcast_shape([o.meta.shape for o in operands if o.meta is not None])
    reduction = call["reduction"]
    if reduction == NONE:
        plan = build(call, function, operands, [common], shape=shape, out_stride=stride, flops=4, has_number=False)
        if function in _CHECKED:
            plan = plan._replace(launches=tuple([step._replace(asserts=True) for step in plan.launches]))
        # Without a reduction alone, a result may be written over an input.
        return plan
    if reduction not in (MEAN, SUM):
        raise Decline(f"PyTorch rejects it: reduction {reduction}")
    return _reduced(call, function, operands, reduction, common, shape)


def _loss_backward(call: Call, function: Any, names: Sequence[str], common: torch.dtype, stride: tuple[int, ...] | None) -> Plan:
    """A loss's backward; the last operand of ``function`` is the number of elements that a mean divides by."""
    self, target, grad = call["self"], call["target"], call["grad_output"]
    if self.shape != broadcast_shape([self.shape, target.shape]):
        raise Decline("a target larger than the input")
    if grad.shape and grad.shape != self.shape:
        raise Decline("a gradient that is neither of one element nor of the input's shape")
    index = {p.name: i for i, p in enumerate(parameters(call.op))}
    operands = [as_operand(call, index[n], common) for n in names]
    if any(o.meta is None for o, n in zip(operands, names) if n not in ("beta", "delta")):
        raise Decline("a CPU tensor among the operands")
    count = self.numel if call["reduction"] == MEAN else 1
    operands.append(Operand(Size(count), None, opmath(common), opmath(common)))
    return build(call, function, operands, [self.dtype], shape=self.shape, out_stride=stride, flops=6, has_number=False)


def _same_dtype(call: Call, *names: str) -> torch.dtype:
    given = {call[n].dtype for n in names if call[n] is not None}
    if len(given) != 1:
        raise Decline("operands of several dtypes: " + ", ".join(sorted(dtype_name(d) for d in given)))
    return given.pop()


def _not_larger(call: Call, *names: str) -> None:
    shape = call["self"].shape
    for name in names:
        if call[name] is not None and broadcast_shape([shape, call[name].shape]) != shape:
            raise Decline(f"a {name} larger than the input")


def _empty_like(meta: TensorMeta) -> tuple[int, ...]:
    """The strides of ``torch.empty_like``."""
    return meta.stride if meta.numel == 0 or is_dense(meta.shape, meta.stride) else output_strides(meta.shape, [meta])


@planned("aten.mse_loss.default", dtype(*FLOAT), family="loss", kernel=mse, writes_out=True)
def mse_loss(call: Call) -> Plan:
    return _only_pointwise_writes(call, lambda: _loss(call, mse, ("self", "target"), result_type([call["self"], call["target"]]), None))


def _only_pointwise_writes(call: Call, plan: Callable[[], Plan]) -> Plan:
    """``plan()``; a reduced loss is written to ``out=`` by a copy."""
    if call.outs is not None and call["reduction"] != NONE:
        raise Decline("out= of another dtype than the result")
    return plan()


@planned("aten.mse_loss_backward.default", dtype(*FLOAT), family="loss", kernel=mse_gradient)
def mse_loss_backward(call: Call) -> Plan:
    # Of several, versions of PyTorch and its kernels for CPUs and GPUs take different ones.
    common = _same_dtype(call, "grad_output", "self", "target")
    return _loss_backward(call, mse_gradient, ("grad_output", "self", "target"), common, contiguous_strides(call["self"].shape))


@planned("aten.smooth_l1_loss.default", dtype(*FLOAT), family="loss", kernel=smooth_l1, by_value=("beta",))
def smooth_l1_loss(call: Call) -> Plan:
    if call["beta"] < 0:
        raise Decline("PyTorch rejects it: a negative beta")
    if call["beta"] == 0:
        raise Decline("beta=0, where PyTorch computes l1_loss")
    return _loss(call, smooth_l1, ("self", "target", "beta"), result_type([call["self"], call["target"]]), None)


@planned("aten.smooth_l1_loss_backward.default", dtype(*FLOAT), family="loss", kernel=smooth_l1_gradient, by_value=("beta",))
def smooth_l1_loss_backward(call: Call) -> Plan:
    if call["beta"] < 0:
        raise Decline("PyTorch rejects it: a negative beta")
    common = result_type([call["grad_output"], call["self"], call["target"]])
    stride = contiguous_strides(call["self"].shape)
    return _loss_backward(call, smooth_l1_gradient, ("grad_output", "self", "target", "beta"), common, stride)


@planned("aten.huber_loss.default", dtype(*FLOAT), family="loss", kernel=huber, by_value=("delta",))
def huber_loss(call: Call) -> Plan:
    if not call["delta"] > 0:
        raise Decline("PyTorch rejects it: delta is not positive")
    _not_larger(call, "target")
    return _loss(call, huber, ("self", "target", "delta"), _same_dtype(call, "self", "target"), _empty_like(call["self"]))


@planned("aten.huber_loss_backward.default", dtype(*FLOAT), family="loss", kernel=huber_gradient)
def huber_loss_backward(call: Call) -> Plan:
    common = _same_dtype(call, "grad_output", "self", "target")
    return _loss_backward(call, huber_gradient, ("grad_output", "self", "target", "delta"), common, contiguous_strides(call["self"].shape))


@planned("aten.soft_margin_loss.default", dtype(*FLOAT), family="loss", kernel=soft_margin)
def soft_margin_loss(call: Call) -> Plan:
    _not_larger(call, "target")
    stride = output_strides(call["self"].shape, [call["self"]])
    return _loss(call, soft_margin, ("self", "target"), _same_dtype(call, "self", "target"), stride)


@planned("aten.soft_margin_loss_backward.default", dtype(*FLOAT), family="loss", kernel=soft_margin_gradient)
def soft_margin_loss_backward(call: Call) -> Plan:
    common = _same_dtype(call, "grad_output", "self", "target")
    return _loss_backward(call, soft_margin_gradient, ("grad_output", "self", "target"), common,
                          output_strides(call["self"].shape, [call["target"], call["self"]]))


@planned("aten.binary_cross_entropy.default", dtype(*FLOAT), family="loss", kernel=cross_entropy)
def binary_cross_entropy(call: Call) -> Plan:
    common = _same_dtype(call, "self", "target", "weight")
    if call["self"].shape != call["target"].shape:
        raise Decline("input and target differ in shape")
    _not_larger(call, "weight")
    names = ("self", "target") if call["weight"] is None else ("self", "target", "weight")
    return _loss(call, cross_entropy if len(names) == 2 else weighted_cross_entropy, names, common, _empty_like(call["self"]))


@planned("aten.binary_cross_entropy_backward.default", dtype(*FLOAT), family="loss", kernel=cross_entropy_gradient)
def binary_cross_entropy_backward(call: Call) -> Plan:
    common = _same_dtype(call, "grad_output", "self", "target", "weight")
    _not_larger(call, "weight")
    names = ("grad_output", "self", "target") + (() if call["weight"] is None else ("weight",))
    function = cross_entropy_gradient if len(names) == 3 else weighted_cross_entropy_gradient
    return _loss_backward(call, function, names, common, _empty_like(call["self"]))


@planned("aten.binary_cross_entropy_with_logits.default", dtype(*FLOAT), family="loss", kernel=logits)
def binary_cross_entropy_with_logits(call: Call) -> Plan:
    common = _same_dtype(call, "self", "target", "weight", "pos_weight")
    if call["self"].shape != call["target"].shape:
        raise Decline("input and target differ in shape")
    _not_larger(call, "weight", "pos_weight")
    functions = {(): logits, ("weight",): weighted_logits, ("pos_weight",): positive_logits,
                 ("weight", "pos_weight"): weighted_positive_logits}
    extra = tuple([n for n in ("weight", "pos_weight") if call[n] is not None])
    return _loss(call, functions[extra], ("self", "target", *extra), common, output_strides(call["self"].shape, [call["target"]]))


# -- negative log likelihood: kernels ----------------------------------------------------------------------------------


@triton.jit
def _targets(p_target, o_target, m_row, ignore, classes):
    """Targets (0 where there is none) and the mask of those that count."""
    target = tl.load(p_target + o_target, mask=m_row, other=0).to(tl.int64)
    m_counts = m_row & (target != ignore)
    wrong = m_counts & ((target < 0) | (target >= classes))
    tl.device_assert(wrong == 0, "target out of bounds")
    m_counts = m_counts & (target >= 0) & (target < classes)
    return tl.where(m_counts, target, 0), m_counts


@triton.jit
def nll_kernel(p_out, p_total, p_x, p_target, weight, n_rows, steps, classes, ignore, sizes, x_rows, target_rows, x_class, w_class,
               KIND: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Negative log likelihood of rows. Grid: programs that share the rows.

    KIND: "none" (p_out gets each row's loss, p_total 0), "one" (the same for a single row; p_total gets its weight),
    "parts" (each program's sums of loss and weight), "sum" and "mean" (one program: the results), "mean or 0" (a mean, but 0 of
    no row).
    """
    sum_loss = tl.zeros([BLOCK], ACC)
    sum_weight = tl.zeros([BLOCK], ACC)
    kept = tl.zeros([BLOCK], tl.int32)
    for t in range(tl.program_id(0), steps, tl.num_programs(0)):
        o_row = tl.arange(0, BLOCK)
        if WIDE:
            o_row = o_row.to(tl.int64) + tl.cast(t, tl.int64) * BLOCK
        else:
            o_row = o_row + t * BLOCK
        m_row = o_row < n_rows
        target, m_counts = _targets(p_target, unravel(o_row, sizes, target_rows), m_row, ignore, classes)
        x = tl.load(p_x + unravel(o_row, sizes, x_rows) + target * x_class, mask=m_counts, other=0.0).to(ACC)
        if len(weight) == 1:
            w = tl.load(weight[0] + target * w_class, mask=m_counts, other=0.0).to(ACC)
        else:
            w = m_counts.to(ACC)
        loss = tl.where(m_counts, -x * w, 0.0)
        sum_loss += loss
        sum_weight += w
        kept += m_counts.to(tl.int32)
        if KIND == "none" or KIND == "one":
            tl.store(p_out + o_row, loss.to(p_out.dtype.element_ty), mask=m_row)
    total_loss = tl.sum(sum_loss, axis=0)
    total_weight = tl.sum(sum_weight, axis=0)
    if KIND == "parts":
        tl.store(p_out + tl.program_id(0), total_loss)
        tl.store(p_total + tl.program_id(0), total_weight)
    elif KIND == "none":
        if tl.program_id(0) == 0:
            tl.store(p_total, 0.0)
    elif KIND == "one":
        tl.store(p_total, total_weight.to(p_total.dtype.element_ty))
    else:
        tl.store(p_total, total_weight.to(p_total.dtype.element_ty))
        if KIND == "mean":
            total_loss = total_loss / total_weight
        if KIND == "mean or 0":
            counted = tl.sum(kept, axis=0) > 0
            total_loss = tl.where(counted, total_loss / tl.where(counted, total_weight, 1.0), 0.0)
        tl.store(p_out, total_loss.to(p_out.dtype.element_ty))


@triton.jit
def nll_finish_kernel(p_out, p_total, p_losses, p_weights, n_parts, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the programs' sums. One program."""
    sum_loss = tl.zeros([BLOCK], ACC)
    sum_weight = tl.zeros([BLOCK], ACC)
    for start in range(0, n_parts, BLOCK):
        o = start + tl.arange(0, BLOCK)
        sum_loss += tl.load(p_losses + o, mask=o < n_parts, other=0.0)
        sum_weight += tl.load(p_weights + o, mask=o < n_parts, other=0.0)
    loss = tl.sum(sum_loss, axis=0)
    total = tl.sum(sum_weight, axis=0)
    tl.store(p_total, total.to(p_total.dtype.element_ty))
    if MEAN:
        loss = loss / total
    tl.store(p_out, loss.to(p_out.dtype.element_ty))


@triton.jit
def nll_backward_kernel(p_dx, p_g, p_target, p_total, weight, n_rows, classes, ignore, sizes, dx_rows, g_rows, target_rows, dx_class,
                        w_class, MEAN: tl.constexpr, ACC: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
                        BLOCK_N: tl.constexpr):
    """The gradient, zeros included. Grid: blocks of rows, blocks of classes."""
    o_row, i_outer, m_row = locate(sizes, n_rows, BLOCK_R, GATHER, WIDE)
    target, m_counts = _targets(p_target, row_offsets(o_row, i_outer, sizes, target_rows, GATHER), m_row, ignore, classes)
    g = tl.load(p_g + row_offsets(o_row, i_outer, sizes, g_rows, GATHER), mask=m_counts, other=0.0).to(ACC)
    if len(weight) == 1:
        g = g * tl.load(weight[0] + target * w_class, mask=m_counts, other=0.0).to(ACC)
    if MEAN:
        g = g / tl.load(p_total).to(ACC)
    o_class = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        o_class = o_class.to(tl.int64)
    hit = m_counts[:, None] & (target[:, None] == o_class[None, :])
    # [BLOCK_R, BLOCK_N]
    b_dx = tl.where(hit, -g[:, None], 0.0).to(p_dx.dtype.element_ty)
    o_dx = row_offsets(o_row, i_outer, sizes, dx_rows, GATHER)[:, None] + (o_class * dx_class)[None, :]
    tl.store(p_dx + o_dx, b_dx, mask=m_row[:, None] & (o_class < classes)[None, :])


# -- negative log likelihood: plans ------------------------------------------------------------------------------------

_FLOAT_SELF = dtype(*FLOAT, arg="self")


def _nll_check(call: Call, x: TensorMeta, two_d: bool) -> tuple[int, int]:
    """The dimension of the classes, and their number.

    Raises:
        Decline: PyTorch rejects the call.
    """
    target, weight = call["target"], call["weight"]
    if target.dtype not in ((torch.int64,) if two_d else (torch.int64, torch.uint8)):
        raise Decline(f"PyTorch rejects it: targets of {dtype_name(target.dtype)}")
    if two_d:
        axis, fits = 1, x.ndim == 4 and target.shape == (x.shape[0], *x.shape[2:])
    else:
        axis = x.ndim - 1
        fits = (x.ndim == 2 and target.shape == x.shape[:1]) or (x.ndim == 1 and target.shape in ((), (1,)))
    if not fits:
        raise Decline("PyTorch rejects it: sizes of input and target that do not fit")
    if weight is not None and (weight.shape != (x.shape[axis],) or weight.dtype != x.dtype):
        raise Decline("PyTorch rejects it: weights that are not one a class, of the input's dtype")
    if x.shape[axis] == 0:
        raise Decline("no classes")
    return axis, x.shape[axis]


def _without(meta: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return meta[:axis] + meta[axis + 1:]


def _over_rows(meta: TensorMeta, x: TensorMeta, axis: int) -> tuple[int, ...]:
    """Strides over all of ``x`` of a tensor that has its dimensions but ``axis``, or one element."""
    if meta.numel == 1 and meta.shape != _without(x.shape, axis):
        return (0,) * x.ndim
    return (*meta.stride[:axis], 0, *meta.stride[axis:])


def _nll(call: Call, two_d: bool) -> Plan:
    x, target, weight = call.args[:3]
    reduction, ignore = call["reduction"], call["ignore_index"]
    axis, classes = _nll_check(call, x, two_d)
    kept = _without(x.shape, axis)
    out = Alloc(kept if reduction == NONE else (), contiguous_strides(kept) if reduction == NONE else (), x.dtype)
    total = Alloc((), (), x.dtype)
    acc = opmath(x.dtype)
    n_rows = x.numel // classes
    metas: dict[Arg, TensorMeta] = {Arg(0): x, Arg(1): target}
    weights: tuple[Arg, ...] = ()
    if weight is not None:
        metas[Arg(2)] = weight
        weights = (Arg(2),)
    if n_rows:
        rows = split_rows(x.shape, (axis,), [_row_strides(kept, axis), x.stride, _over_rows(target, x, axis)])
        row_sizes, row_strides = rows.row_sizes, rows.row_strides
    else:
        row_sizes, row_strides = (1,), ((1,), (1,), (1,))
    share = choose_sum(n_rows, call.target)
    allocs = [out, total]
    programs, first, second = max(share.programs, 1), Out(0), Out(1)
    if reduction == NONE:
        kind = "one" if x.ndim == 1 else "none"
        programs = max(share.steps, 1)
    elif programs == 1:
        # Of one row that is ignored the CPU gives NaN, and a GPU 0.
        alone = x.ndim == 1 and call.target.device_type != "cpu"
        kind = "sum" if reduction != MEAN else "mean or 0" if alone else "mean"
    else:
        kind = "parts"
        first, second = Out(2), Out(3)
        allocs += [Alloc((programs,), (1,), acc)] * 2
    launches = [Launch(
        nll_kernel, (programs, 1, 1),
        (first, second, Arg(0), Arg(1), weights, Size(n_rows), Size(share.steps), Size(classes), Size(ignore), sizes_argument(row_sizes),
         row_strides[1], row_strides[2], x.stride[axis] if classes > 1 else 1, 1 if weight is None else weight.stride[0]),
        (("KIND", kind), ("ACC", TRITON[acc]), ("WIDE", is_wide(x, target)), ("BLOCK", share.block)), warps(4, call.target), asserts=True)]
    if kind == "parts":
        launches.append(Launch(nll_finish_kernel, (1, 1, 1), (Out(0), Out(1), first, second, Size(programs)),
                               (("MEAN", reduction == MEAN), ("ACC", TRITON[acc]), ("BLOCK", 1024)), warps(4, call.target)))
    return Plan(tuple(allocs), tuple(launches), (Out(0), Out(1)), metas, bytes=n_rows * (x.dtype.itemsize + target.dtype.itemsize),
                flops=n_rows * 2)


def _row_strides(kept: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Strides over the whole input of a contiguous tensor of the row dimensions: rows are counted in its order."""
    own = contiguous_strides(kept)
    return (*own[:axis], 0, *own[axis:])


def _nll_backward(call: Call, two_d: bool) -> Plan:
    g, x, target, weight = call.args[:4]
    reduction, total = call["reduction"], call["total_weight"]
    axis, classes = _nll_check(call, x, two_d)
    if x.ndim == 1 and target.shape:
        raise Decline("PyTorch rejects it: sizes of input and target that do not fit")
    if g.dtype != x.dtype or total.dtype != x.dtype or total.numel != 1:
        raise Decline("PyTorch rejects it: a gradient or total weight of another dtype, or a total weight of several elements")
    if g.shape != _without(x.shape, axis) if reduction == NONE else g.numel != 1 or g.ndim > 1:
        raise Decline("PyTorch rejects it: a gradient that does not fit the reduction")
    if two_d and not x.is_contiguous:
        raise Decline("PyTorch's own nll_loss2d_backward wants a contiguous input")
    out = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    metas: dict[Arg, TensorMeta] = {Arg(0): g, Arg(2): target, Arg(6): total}
    if x.numel == 0:
        return Plan((out,), (), Out(0), metas, bytes=0, flops=0)
    weights: tuple[Arg, ...] = ()
    if weight is not None:
        metas[Arg(3)] = weight
        weights = (Arg(3),)
    acc = opmath(x.dtype)
    rows = split_rows(x.shape, (axis,), [out.stride, _over_rows(g, x, axis), _over_rows(target, x, axis)])
    tile = choose_classes(rows.row_sizes[0], rows.n_rows, classes, rows.column_strides[0][0] == 1, call.target)
    blocks = -(-rows.n_rows // tile.rows) if tile.gather else -(-rows.row_sizes[0] // tile.rows) * (rows.n_rows // rows.row_sizes[0])
    class_blocks = -(-classes // tile.columns)
    if class_blocks > 65535:
        raise Decline("too many classes for one launch")
    step = Launch(
        nll_backward_kernel, (blocks, class_blocks, 1),
        (Out(0), Arg(0), Arg(2), Arg(6), weights, Size(rows.n_rows), classes, Size(call["ignore_index"]),
         sizes_argument(rows.row_sizes, not tile.gather), *rows.row_strides, rows.column_strides[0][0],
         1 if weight is None else weight.stride[0]),
        (("MEAN", reduction == MEAN), ("ACC", TRITON[acc]), ("GATHER", tile.gather), ("WIDE", is_wide(x, target, g)),
         ("BLOCK_R", tile.rows), ("BLOCK_N", tile.columns)), warps(4, call.target), asserts=True)
    return Plan((out,), (step,), Out(0), metas, bytes=x.numel * x.dtype.itemsize, flops=0)


@dataclass(frozen=True)
class ClassTile:
    """A program's share of a gradient: rows by classes; ``gather``: whether row indices run over all row dimensions."""

    rows: int
    columns: int
    gather: bool


def choose_classes(first: int, n_rows: int, classes: int, classes_fast: bool, target: Target) -> ClassTile:
    """The tile of the gradient; ``first``: size of the fastest row dimension."""
    most = INTERPRETED_BLOCK if target.interpreted else 4096
    if classes_fast:
        columns = min(power_of_2(classes), most)
        return ClassTile(max(min(most // columns, power_of_2(n_rows)), 1), columns, True)
    gather = first < 16
    rows = min(power_of_2(n_rows if gather else first), most if target.interpreted else 256)
    return ClassTile(rows, min(power_of_2(classes), most // rows), gather)


@planned("aten.nll_loss_forward.default", _FLOAT_SELF, family="loss", kernel=nll_kernel)
def nll_loss(call: Call) -> Plan:
    return _nll(call, two_d=False)


@planned("aten.nll_loss2d_forward.default", _FLOAT_SELF, family="loss", kernel=nll_kernel)
def nll_loss2d(call: Call) -> Plan:
    return _nll(call, two_d=True)


@planned("aten.nll_loss_backward.default", _FLOAT_SELF, family="loss", kernel=nll_backward_kernel)
def nll_loss_backward(call: Call) -> Plan:
    return _nll_backward(call, two_d=False)


@planned("aten.nll_loss2d_backward.default", _FLOAT_SELF, family="loss", kernel=nll_backward_kernel)
def nll_loss2d_backward(call: Call) -> Plan:
    return _nll_backward(call, two_d=True)
