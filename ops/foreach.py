"""Optimizers: the ``_foreach_*`` ops and the fused AdamW and SGD steps, each a few launches for a whole list of tensors.

A launch takes up to ``MAX_TENSORS`` tensors of a list; a program finds its tensor by its number. The functions are
those of the pointwise ops. Tensors must be floating point, of one dtype, dense, and laid out alike across the lists, as
PyTorch's own fast path wants them; anything else passes through. A second list may be of scalars on the device, one for each
tensor of the first, which is what optimizers with ``capturable=True`` divide by, and which PyTorch takes tensor by tensor.

Source: ``torch.optim.AdamW`` and ``torch.optim.SGD`` (documentation) for the fused steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops import binary, ternary, unary
from gemsmode.ops.layout import is_dense
from gemsmode.ops.pointwise import _apply, _how, _store, choose_flat
from gemsmode.ops.promotion import ALL, FLOAT, TRITON, opmath
from gemsmode.plan import Alloc, Arg, Decline, Launch, Num, Out, Plan, Size, contiguous_strides, extent
from gemsmode.predicates import dtype_name
from gemsmode.registry import aten_overloads, planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

MAX_TENSORS = 24
"""Tensors of one launch: a program looks for its own among them, and the kernel is compiled for their number."""


@triton.jit
def foreach_kernel(outs, ins, strides, first, counts, FN: tl.constexpr, HOW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """``outs[k] = FN(*ins[k])`` for each tensor k; programs ``first[k]`` to ``first[k + 1]`` take tensor k."""
    i_program = tl.program_id(0)
    for k in tl.static_range(len(outs)):
        if (i_program >= first[k]) & (i_program < first[k + 1]):
            i_block = i_program - first[k]
            if WIDE:
                i_block = i_block.to(tl.int64)
            o = i_block * BLOCK + tl.arange(0, BLOCK)
            m = o < counts[k]
            _store(outs[k], (o,), (), _apply(FN, ins[k], (o,), strides, m, HOW), m)


def _lists(call: Call, indices: Sequence[int], dtypes: Sequence[torch.dtype] = FLOAT) -> tuple[torch.dtype, list[TensorMeta]]:
    """The dtype of the lists ``indices`` and the first list's tensors, if all are laid out alike."""
    first = call.args[indices[0]]
    if not first:
        raise Decline("an empty list")
    dtype = first[0].dtype
    if dtype not in dtypes:
        raise Decline(f"{dtype_name(dtype)} is not handled" if dtypes is ALL else f"{dtype_name(dtype)} is not floating point")
    for index in indices:
        if len(call.args[index]) != len(first):
            raise Decline("PyTorch rejects it: lists of different lengths")
        for own, other in zip(first, call.args[index]):
            if other.dtype != dtype:
                raise Decline("tensors of several dtypes")
            if other.shape != own.shape or other.stride != own.stride or other.device != own.device:
                raise Decline("tensors of different layouts across the lists")
    for meta in first:
        if not is_dense(meta.shape, meta.stride):
            raise Decline("a tensor that is not dense")
    return dtype, list(first)


def _programs(metas: Sequence[TensorMeta], block: int) -> list[int]:
    first = [0]
    for meta in metas:
        first.append(first[-1] + -(-meta.numel // block))
    return first


def _are_scalars(first: Sequence[TensorMeta], others: Sequence[TensorMeta]) -> bool:
    """Whether each of ``others`` is a number on the device for a tensor of ``first``, whose dtype the result then has."""
    return (len(first) == len(others) and all(o.shape == () and o.dtype in FLOAT for o in others)
            and all(f.shape and f.device == o.device for f, o in zip(first, others)))


def _plan(call: Call, function: Any, roles: Sequence[tuple[str, Any]], dtypes: Sequence[torch.dtype] = FLOAT) -> Plan:
    """One list op: ``roles`` says for each parameter of the function what it is, ``("list", index)``, ``("tensor", index)``,
    ``("number", index)``, ``("numbers", index)`` or ``("constant", value)``; a list may turn out to be one of ``"scalars"``."""
    main = next(index for role, index in roles if role == "list")
    roles = [("scalars", index) if role == "list" and index != main and _are_scalars(call.args[main], call.args[index])
             else (role, index) for role, index in roles]
    lists = [index for role, index in roles if role == "list"]
    dtype, metas = _lists(call, lists, dtypes)
    compute = opmath(dtype)
    kind = "fp64" if compute == torch.float64 else "fp32"
    kinds: list[tuple[int, torch.dtype, torch.dtype]] = []
    of_lists = ("list", "scalars")
    strides: list[tuple[int, ...]] = []
    refs: dict[Arg, TensorMeta] = {}
    for role, index in roles:
        is_tensor = role == "tensor" and call.args[index].device.type == call.target.device_type
        if is_tensor and (call.args[index].shape or call.args[index].dtype not in FLOAT):
            raise Decline("a tensor operand that is not a floating-point scalar")
        if role == "numbers" and len(call.args[index]) != len(metas):
            raise Decline("PyTorch rejects it: as many numbers as tensors are needed")
        kinds.append((0 if role in of_lists or is_tensor else 1, dtype, compute))
        strides.append((0,) if is_tensor or role == "scalars" else ())
        if is_tensor:
            refs[Arg(index)] = call.args[index]

    def operand(role: str, index: Any, k: int) -> Any:
        if role in of_lists:
            refs[Arg(index, k)] = call.args[index][k]
            return Arg(index, k)
        if role == "tensor" and Arg(index) in refs:
            return Arg(index)
        if role == "tensor":
            return Num(index, kind, None, True)
        if role == "constant":
            return float(index)
        return Num(index, kind, k if role == "numbers" else None)

    inplace = parameters(call.op)[0].is_written
    allocs = () if inplace else tuple(Alloc(m.shape, m.stride, dtype) for m in metas)
    live = [k for k, m in enumerate(metas) if m.numel]
    launches = []
    for at in range(0, len(live), MAX_TENSORS):
        group = live[at:at + MAX_TENSORS]
        tile = choose_flat(sum(metas[k].numel for k in group), dtype.itemsize, call.target)
        first = _programs([metas[k] for k in group], tile.x)
        args = (tuple(Arg(0, k) if inplace else Out(k) for k in group),
                tuple(tuple(operand(role, index, k) for role, index in roles) for k in group), tuple(strides),
                tuple(Size(f) for f in first), tuple(extent(metas[k].numel) for k in group))
        wide = any(metas[k].numel >= 2**31 - 2**17 for k in group)
        constants = Constants((("FN", function), ("HOW", _how(tuple(kinds))), ("WIDE", wide), ("BLOCK", tile.x)))
        launches.append(Launch(foreach_kernel, (first[-1], 1, 1), args, constants, tile.warps))
    if inplace:
        for k in live:
            refs.setdefault(Arg(0, k), metas[k])
    moved = (len(lists) + 1) * sum(m.numel for m in metas) * dtype.itemsize
    returns: Any = None if inplace else [Out(k) for k in range(len(metas))]
    return Plan(allocs, tuple(launches), returns, refs, bytes=moved)


_ROLE = {"List[Tensor]": "list", "Tensor": "tensor", "number": "number", "List[number]": "numbers"}


def _declare(name: str, function: Any, overloads: Sequence[str], select: Callable[[Target], Any] | None = None,
             **constants: float) -> None:
    """Rules for ``name`` and its in-place form; the function's parameters are the op's in order, then ``constants``. Where it
    depends on the target what is computed by, ``select`` says so."""
    for packet in (name, f"{name}_"):
        for overload in overloads:
            if overload not in aten_overloads().get(packet, ()):
                continue

            @planned(f"aten.{packet}.{overload}", family="optimizer", kernel=function, name=packet.strip("_"))
            def plan(call: Call) -> Plan:
                given = [(_ROLE[p.type], i) for i, p in enumerate(parameters(call.op))]
                if function is binary.sub and any(bool in map(type, a if isinstance(a, tuple) else (a,)) for a in call.args[1:]):
                    raise Decline("PyTorch rejects it: subtraction of bools")
                if given[0][0] == "number" and any(m.stride != contiguous_strides(m.shape) for m in call.args[1]):
                    raise Decline("a result that PyTorch lays out otherwise than the list")
                missing = function.arg_names[len(given):]
                return _plan(call, select(call.target) if select else function, [*given, *[("constant", constants[n]) for n in missing]])


_NUMBERED = ("Scalar", "List", "ScalarList", "Tensor")

_declare("_foreach_add", binary.add, _NUMBERED, alpha=1.0)
_declare("_foreach_sub", binary.sub, _NUMBERED, alpha=1.0)
_declare("_foreach_mul", binary.mul, _NUMBERED)
_declare("_foreach_div", binary.div, _NUMBERED)
_declare("_foreach_pow", binary.pow, ("Scalar", "List", "ScalarList", "ScalarAndTensor"), select=binary.power_on)
_declare("_foreach_maximum", binary.maximum, _NUMBERED)
_declare("_foreach_minimum", binary.minimum, _NUMBERED)
_declare("_foreach_clamp_min", binary.maximum, _NUMBERED)
_declare("_foreach_clamp_max", binary.minimum, _NUMBERED)
_declare("_foreach_lerp", ternary.lerp, ("Scalar", "List", "ScalarList"))
_declare("_foreach_addcmul", ternary.addcmul, ("Scalar", "ScalarList"))
_declare("_foreach_addcdiv", ternary.addcdiv, ("Scalar", "ScalarList"))
_declare("_foreach_sqrt", unary.sqrt, ("default",))
_declare("_foreach_rsqrt", unary.rsqrt, ("default",))
_declare("_foreach_reciprocal", unary.reciprocal, ("default",))
_declare("_foreach_neg", unary.neg, ("default",))
_declare("_foreach_abs", unary.absolute, ("default",))
_declare("_foreach_exp", unary.exp, ("default",))


@triton.jit
def _fill_zero(self):
    return tl.zeros_like(self)


@planned("aten._foreach_zero_.default", family="optimizer", kernel=_fill_zero)
def foreach_zero(call: Call) -> Plan:
    return _plan(call, _fill_zero, [("list", 0)], ALL)


@triton.jit
def _same(src):
    return src


@planned("aten._foreach_copy_.default", family="optimizer", kernel=_same)
def foreach_copy(call: Call) -> Plan:
    """self, src, non_blocking; the lists may be of different floating-point dtypes, as mixed precision has them."""
    dtype, metas = _lists(call, [0])
    source, sources = _lists(call, [1])
    if [(m.shape, m.stride, m.device) for m in metas] != [(m.shape, m.stride, m.device) for m in sources]:
        raise Decline("tensors of different layouts across the lists")
    refs = {Arg(i, k): m for i, group in enumerate((metas, sources)) for k, m in enumerate(group)}
    live = [k for k, m in enumerate(metas) if m.numel]
    launches = []
    for at in range(0, len(live), MAX_TENSORS):
        group = live[at:at + MAX_TENSORS]
        tile = choose_flat(sum(metas[k].numel for k in group), max(dtype.itemsize, source.itemsize), call.target)
        first = _programs([metas[k] for k in group], tile.x)
        args = (tuple(Arg(0, k) for k in group), tuple((Arg(1, k),) for k in group), ((),), tuple(Size(f) for f in first),
                tuple(extent(metas[k].numel) for k in group))
        wide = any(metas[k].numel >= 2**31 - 2**17 for k in group)
        constants = Constants((("FN", _same), ("HOW", _how(((0, source, opmath(source)),))), ("WIDE", wide), ("BLOCK", tile.x)))
        launches.append(Launch(foreach_kernel, (first[-1], 1, 1), args, constants, tile.warps))
    return Plan((), tuple(launches), None, refs, bytes=sum(m.numel for m in metas) * (dtype.itemsize + source.itemsize))


# -- norms -------------------------------------------------------------------------------------------------------------


@triton.jit
def _largest(x):
    """The largest of a block, NaN if there is one: a reduction by itself drops NaN."""
    found = tl.max((x != x).to(tl.int32), axis=0)
    return tl.where(found != 0, float("nan"), tl.max(x, axis=0))


@triton.jit
def norm_parts_kernel(ins, p_parts, first, counts, ORDER: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
                      STEPS: tl.constexpr):
    """For each program, the sum of squares (ORDER 2) or magnitudes (1), or the largest magnitude (0), of its part of a tensor."""
    i_program = tl.program_id(0)
    for k in tl.static_range(len(ins)):
        if (i_program >= first[k]) & (i_program < first[k + 1]):
            i_part = i_program - first[k]
            if WIDE:
                i_part = i_part.to(tl.int64)
            b_sum = tl.zeros([BLOCK], COMPUTE)
            for step in range(STEPS):
                o = (i_part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
                # [BLOCK]
                b_x = tl.load(ins[k] + o, mask=o < counts[k], other=0.0).to(COMPUTE)
                if ORDER == 2:
                    b_sum += b_x * b_x
                elif ORDER == 1:
                    b_sum += tl.abs(b_x)
                else:
                    b_sum = tl.maximum(b_sum, tl.abs(b_x), propagate_nan=tl.PropagateNan.ALL)
            if ORDER == 0:
                tl.store(p_parts + i_program, _largest(b_sum))
            else:
                tl.store(p_parts + i_program, tl.sum(b_sum, axis=0))


@triton.jit
def norm_kernel(outs, p_parts, first, ORDER: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """The norm of each tensor k, of the parts ``first[k]`` to ``first[k + 1]``."""
    i_program = tl.program_id(0)
    for k in tl.static_range(len(outs)):
        if i_program == k:
            b_sum = tl.zeros([BLOCK], COMPUTE)
            for start in range(first[k], first[k + 1], BLOCK):
                o = start + tl.arange(0, BLOCK)
                b_part = tl.load(p_parts + o, mask=o < first[k + 1], other=0.0)
                if ORDER == 0:
                    b_sum = tl.maximum(b_sum, b_part, propagate_nan=tl.PropagateNan.ALL)
                else:
                    b_sum += b_part
            if ORDER == 0:
                norm = _largest(b_sum)
            elif ORDER == 1:
                norm = tl.sum(b_sum, axis=0)
            else:
                norm = tl.sqrt(tl.sum(b_sum, axis=0))
            tl.store(outs[k], norm.to(outs[k].dtype.element_ty))


_ORDERS = {2: 2, 1: 1, float("inf"): 0}
_PART = 16
"""Blocks that a program of :func:`norm_parts_kernel` takes in turn: fewer parts to add up than a program a block has."""


@planned("aten._foreach_norm.Scalar", family="optimizer", kernel=norm_parts_kernel, by_value=("ord",))
def foreach_norm(call: Call) -> Plan:
    """self, ord, dtype -> a 0-dim tensor for each: what ``clip_grad_norm_`` asks for."""
    dtype, metas = _lists(call, [0])
    order = _ORDERS.get(call["ord"])
    if order is None:
        raise Decline(f"a norm of order {call['ord']}")
    if call["dtype"] not in (None, dtype):
        raise Decline("a result of another dtype")
    if not order and any(not m.numel for m in metas):
        raise Decline("PyTorch rejects it: the largest magnitude of no elements")
    compute = opmath(dtype)
    outs = [Alloc((), (), dtype) for _ in metas]
    allocs, launches = list(outs), []
    for at in range(0, len(metas), MAX_TENSORS):
        group = range(at, min(at + MAX_TENSORS, len(metas)))
        tile = choose_flat(sum(metas[k].numel for k in group), dtype.itemsize, call.target)
        steps = 1 if call.target.interpreted else _PART
        first = _programs([metas[k] for k in group], tile.x * steps)
        places, parts = tuple(Size(f) for f in first), Out(len(allocs))
        allocs.append(Alloc((max(first[-1], 1),), (1,), compute))
        wide = any(metas[k].numel >= 2**31 - 2**22 for k in group)
        constants = (("ORDER", order), ("COMPUTE", TRITON[compute]))
        if first[-1]:
            launches.append(Launch(
                norm_parts_kernel, (first[-1], 1, 1),
                (tuple(Arg(0, k) for k in group), parts, places, tuple(extent(metas[k].numel) for k in group)),
                Constants((*constants, ("WIDE", wide), ("BLOCK", tile.x), ("STEPS", steps))), tile.warps))
        launches.append(Launch(norm_kernel, (len(group), 1, 1), (tuple(Out(k) for k in group), parts, places),
                               Constants((*constants, ("BLOCK", 1024))), 4))
    refs = {Arg(0, k): m for k, m in enumerate(metas)}
    return Plan(tuple(allocs), tuple(launches), [Out(k) for k in range(len(outs))], refs,
                bytes=sum(m.numel for m in metas) * dtype.itemsize)


# -- fused steps -------------------------------------------------------------------------------------------------------


@triton.jit
def _scaling(scales, found, COMPUTE: tl.constexpr):
    """What gradients are to be divided by, and whether the step is taken: not if something was not finite."""
    scale = tl.full((), 1.0, COMPUTE)
    if len(scales) > 0:
        scale = tl.load(scales[0]).to(COMPUTE)
    taken = tl.full((), 1, tl.int32)
    if len(found) > 0:
        taken = (tl.load(found[0]) != 1.0).to(tl.int32)
    return scale, taken


@triton.jit
def adamw_kernel(params, grads, averages, squares, largest, steps, scales, found, first, counts, rates, beta1, beta2, decay, eps,
                 MAXIMIZE: tl.constexpr, DECOUPLED: tl.constexpr, LOADED: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
                 BLOCK: tl.constexpr):
    """One Adam (DECOUPLED: AdamW) step of each tensor k, everything read and written once."""
    i_program = tl.program_id(0)
    scale, taken = _scaling(scales, found, COMPUTE)
    rate = _rate(rates, LOADED)
    for k in tl.static_range(len(params)):
        if (i_program >= first[k]) & (i_program < first[k + 1]):
            i_block = i_program - first[k]
            if WIDE:
                i_block = i_block.to(tl.int64)
            o = i_block * BLOCK + tl.arange(0, BLOCK)
            m = (o < counts[k]) & (taken != 0)
            p = tl.load(params[k] + o, mask=m).to(COMPUTE)
            g = tl.load(grads[k] + o, mask=m).to(COMPUTE)
            if len(scales) > 0:
                g = g / scale
                tl.store(grads[k] + o, g.to(grads[k].dtype.element_ty), mask=m)
            a = tl.load(averages[k] + o, mask=m).to(COMPUTE)
            s = tl.load(squares[k] + o, mask=m).to(COMPUTE)
            step = tl.load(steps[k]).to(tl.float64)
            # The corrections are differences of near numbers for the first steps: in float64.
            correction1 = 1.0 - tl.exp(step * tl.log(beta1))
            correction2 = 1.0 - tl.exp(step * tl.log(beta2))
            if MAXIMIZE:
                g = -g
            if DECOUPLED:
                p = p - (rate * decay).to(COMPUTE) * p
            else:
                g = g + decay.to(COMPUTE) * p
            a = a + (1.0 - beta1).to(COMPUTE) * (g - a)
            s = beta2.to(COMPUTE) * s + (1.0 - beta2).to(COMPUTE) * g * g
            size = (rate / correction1).to(COMPUTE)
            root = tl.sqrt(s)
            if len(largest) > 0:
                b = tl.load(largest[k] + o, mask=m).to(COMPUTE)
                b = tl.maximum(b, s, propagate_nan=tl.PropagateNan.ALL)
                tl.store(largest[k] + o, b.to(largest[k].dtype.element_ty), mask=m)
                root = tl.sqrt(b)
            p = p - size * a / (root / tl.sqrt(correction2).to(COMPUTE) + eps.to(COMPUTE))
            tl.store(params[k] + o, p.to(params[k].dtype.element_ty), mask=m)
            tl.store(averages[k] + o, a.to(averages[k].dtype.element_ty), mask=m)
            tl.store(squares[k] + o, s.to(squares[k].dtype.element_ty), mask=m)


@triton.jit
def _rate(rates, LOADED: tl.constexpr):
    """The learning rate: a number, or one element in the device's memory."""
    if LOADED:
        return tl.load(rates[0]).to(tl.float64)
    else:
        return rates[0]


@triton.jit
def sgd_kernel(params, grads, buffers, scales, found, first, counts, decay, momentum, rates, dampening, MAXIMIZE: tl.constexpr,
               NESTEROV: tl.constexpr, FIRST: tl.constexpr, LOADED: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
               BLOCK: tl.constexpr):
    """One SGD step of each tensor k."""
    i_program = tl.program_id(0)
    scale, taken = _scaling(scales, found, COMPUTE)
    rate = _rate(rates, LOADED)
    for k in tl.static_range(len(params)):
        if (i_program >= first[k]) & (i_program < first[k + 1]):
            i_block = i_program - first[k]
            if WIDE:
                i_block = i_block.to(tl.int64)
            o = i_block * BLOCK + tl.arange(0, BLOCK)
            m = (o < counts[k]) & (taken != 0)
            p = tl.load(params[k] + o, mask=m).to(COMPUTE)
            g = tl.load(grads[k] + o, mask=m).to(COMPUTE)
            if len(scales) > 0:
                g = g / scale
                tl.store(grads[k] + o, g.to(grads[k].dtype.element_ty), mask=m)
            if MAXIMIZE:
                g = -g
            g = g + decay.to(COMPUTE) * p
            if len(buffers) > 0:
                if FIRST:
                    b = g
                else:
                    b = momentum.to(COMPUTE) * tl.load(buffers[k] + o, mask=m).to(COMPUTE) + (1.0 - dampening).to(COMPUTE) * g
                tl.store(buffers[k] + o, b.to(buffers[k].dtype.element_ty), mask=m)
                if NESTEROV:
                    g = g + momentum.to(COMPUTE) * b
                else:
                    g = b
            p = p - rate.to(COMPUTE) * g
            tl.store(params[k] + o, p.to(params[k].dtype.element_ty), mask=m)


def _fused(call: Call, kernel: Any, lists: Sequence[int], scalars: Sequence[int], steps: int | None,
           constants: Sequence[tuple[str, Any]]) -> Plan:
    """A fused step over ``lists`` (an empty list is left out), with ``scalars`` as run-time numbers in float64."""
    dtype, metas = _lists(call, [i for i in lists if call.args[i]])
    refs: dict[Arg, TensorMeta] = {Arg(i, k): m for i in lists if call.args[i] for k, m in enumerate(metas)}
    if steps is not None:
        for k, step in enumerate(call.args[steps]):
            if step.device.type != call.target.device_type or step.numel != 1 or step.dtype != torch.float32:
                raise Decline("step counts that are not float32 scalars on the device")
            refs[Arg(steps, k)] = step
    scaling = []
    for i in _index(call, "grad_scale", "found_inf"):
        meta = call.args[i]
        if meta is not None and (meta.device.type != call.target.device_type or meta.numel != 1 or meta.dtype != torch.float32):
            raise Decline("a scale that is not one float32 on the device")
        refs |= {} if meta is None else {Arg(i): meta}
        scaling.append(() if meta is None else (Arg(i),))
    rate, = _index(call, "lr")
    loaded = call.args[rate].__class__ is TensorMeta and call.args[rate].device.type == call.target.device_type
    numbers: list[Any] = []
    for i in scalars:
        number: Any = Num(i, "fp64", None, call.args[i].__class__ is TensorMeta)
        if i == rate and loaded:
            if call.args[i].dtype not in FLOAT or call.args[i].numel != 1:
                raise Decline("a learning rate that is not one floating-point number")
            number, refs[Arg(i)] = Arg(i), call.args[i]
        numbers.append((number,) if i == rate else number)
    live = [k for k, m in enumerate(metas) if m.numel]
    launches = []
    for at in range(0, len(live), MAX_TENSORS):
        group = live[at:at + MAX_TENSORS]
        tile = choose_flat(sum(metas[k].numel for k in group), dtype.itemsize, call.target)
        first = _programs([metas[k] for k in group], tile.x)
        per_list = [tuple(Arg(i, k) for k in group) if call.args[i] else () for i in (*lists, *([steps] if steps is not None else []))]
        rest = Constants((*constants, ("LOADED", loaded), ("COMPUTE", TRITON[opmath(dtype)]),
                          ("WIDE", any(metas[k].numel >= 2**31 - 2**17 for k in group)), ("BLOCK", tile.x)))
        launches.append(Launch(kernel, (first[-1], 1, 1), (*per_list, *scaling, tuple(Size(f) for f in first),
                                                           tuple(extent(metas[k].numel) for k in group), *numbers), rest, tile.warps))
    # Of the lists only the gradients are not written, but where they are unscaled.
    used = sum(1 for i in lists if call.args[i])
    moved = (2 * used - (not scaling[0])) * sum(m.numel for m in metas) * dtype.itemsize
    return Plan((), tuple(launches), None, refs, bytes=moved)


def _index(call: Call, *names: str) -> list[int]:
    at = {p.name: i for i, p in enumerate(parameters(call.op))}
    return [at[n] for n in names]


def _adam(call: Call, decoupled: bool) -> Plan:
    if not call["amsgrad"]:
        call = Call(call.op, (*call.args[:4], (), *call.args[5:]), call.target)
    elif not call.args[4]:
        raise Decline("amsgrad without what it keeps")
    return _fused(call, adamw_kernel, (0, 1, 2, 3, 4), _index(call, "lr", "beta1", "beta2", "weight_decay", "eps"), 5,
                  (("MAXIMIZE", bool(call["maximize"])), ("DECOUPLED", decoupled)))


@planned(["aten._fused_adamw_.default", "aten._fused_adamw_.tensor_lr"], family="optimizer", kernel=adamw_kernel)
def fused_adamw(call: Call) -> Plan:
    return _adam(call, True)


@planned(["aten._fused_adam_.default", "aten._fused_adam_.tensor_lr"], family="optimizer", kernel=adamw_kernel)
def fused_adam(call: Call) -> Plan:
    return _adam(call, False)


@planned(["aten._fused_sgd_.default", "aten._fused_sgd_.tensor_lr"], family="optimizer", kernel=sgd_kernel, by_value=("momentum",))
def fused_sgd(call: Call) -> Plan:
    if not call["momentum"]:
        call = Call(call.op, (*call.args[:2], (), *call.args[3:]), call.target)
    elif not call.args[2]:
        raise Decline("momentum without buffers")
    return _fused(call, sgd_kernel, (0, 1, 2), _index(call, "weight_decay", "momentum", "lr", "dampening"), None,
                  (("MAXIMIZE", bool(call["maximize"])), ("NESTEROV", bool(call["nesterov"])), ("FIRST", bool(call["is_first_step"]))))

