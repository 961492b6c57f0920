"""Copies: clones, conversions of dtype and memory format, fills.

Conversions are PyTorch's: floats are cut off towards zero on their way to integers (by way of int64, so that small
negative values wrap in uint8), anything but zero is True, and the 16-bit floats are reached through float32. Values that
an integer dtype cannot hold are as undefined as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl  # noqa: F401  (the interpreter wants to see it)

from gemsmode.ops.binary import require_fits
from gemsmode.ops.layout import broadcast_shape, channels_last_strides, is_dense, output_strides
from gemsmode.ops.pointwise import Operand, build, index_operand
from gemsmode.ops.promotion import ALL, TRITON
from gemsmode.ops.ternary import number_as, value_as, via
from gemsmode.plan import Alloc, Arg, At, Decline, Plan, contiguous_strides
from gemsmode.predicates import dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta


@triton.jit
def same(src):
    return src


@triton.jit
def zeros(index):
    return index


# -- layout ------------------------------------------------------------------------------------------------------------


def _is_packed(meta: TensorMeta) -> bool:
    """``is_non_overlapping_and_dense`` as PyTorch has it: true of everything without elements."""
    return meta.numel == 0 or is_dense(meta.shape, meta.stride)


def _format_strides(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    if memory_format == torch.contiguous_format:
        return contiguous_strides(shape)
    strides = channels_last_strides(shape) if len(shape) == (4 if memory_format == torch.channels_last else 5) else None
    if strides is None:
        raise Decline(f"PyTorch rejects it: {memory_format} of {len(shape)} dimensions")
    if 0 in shape:  # here PyTorch does not count sizes of 0 as 1
        step, exact = 1, list(strides)
        for d in (1, *range(len(shape) - 1, 1, -1), 0):
            exact[d] = step
            step *= shape[d]
        return tuple(exact)
    return strides


def clone_strides(x: TensorMeta, memory_format: torch.memory_format | None) -> tuple[int, ...]:
    """The strides of ``clone``, ``_to_copy`` and ``empty_like``: preserved, or in the same order without gaps."""
    if memory_format is not None and memory_format != torch.preserve_format:
        return _format_strides(x.shape, memory_format)
    return x.stride if _is_packed(x) else output_strides(x.shape, [x])


# -- conversion --------------------------------------------------------------------------------------------------------


def _require(*dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        if dtype not in TRITON:
            raise Decline(f"{dtype_name(dtype)} is not handled")


def copied(call: Call, index: int, to: torch.dtype, shape: tuple[int, ...] | None = None,
           stride: tuple[int, ...] | None = None, view: TensorMeta | None = None, offset: int = 0) -> Plan:
    """The plan that copies the tensor argument ``index``, or a view of it, converting it to ``to``."""
    x = view if view is not None else call.args[index]
    _require(x.dtype, to)
    if view is None:
        source = value_as(call, index, to)
    else:
        source = Operand(At(Arg(index), offset) if offset else Arg(index), x, via(x.dtype, to), to)
    return build(call, same, [source], [to], x.shape if shape is None else shape, stride, flops=0)


@planned("aten.clone.default", family="copy", kernel=same, tensor_bits=True, writes_out=True)
def clone(call: Call) -> Plan:
    x, memory_format = call.args
    return copied(call, 0, x.dtype, stride=clone_strides(x, memory_format))


@planned("aten._to_copy.default", family="copy", kernel=same, name="to_copy", tensor_bits=True, writes_out=True)
def to_copy(call: Call) -> Plan:
    """Conversion on one device."""
    x, to, layout, device, pinned, _, memory_format = call.args
    if layout not in (None, torch.strided):
        raise Decline(f"layout {layout}")
    if pinned:
        raise Decline("pinned memory")
    if device is not None and torch.device(device) != x.device:
        raise Decline(f"from {x.device} to {device}")
    return copied(call, 0, x.dtype if to is None else to, stride=clone_strides(x, memory_format))


@planned("aten.copy.default", family="copy", kernel=same, name="copy", tensor_bits=True, writes_out=True)
def copy(call: Call) -> Plan:
    """What ``copy_`` writes: ``src`` broadcast to the shape of ``self`` and converted to its dtype."""
    x, src = call.args[:2]
    if x.device.type != call.target.device_type:
        raise Decline(f"to device {x.device}")
    if broadcast_shape([x.shape, src.shape]) != x.shape:
        raise Decline("PyTorch rejects it: src does not broadcast to self")
    if x.may_overlap_itself and call.outs is None:
        return copied(call, 1, x.dtype, x.shape, output_strides(x.shape, [x]))
    # Gaps stay: PyTorch copies the memory of `self` before it writes to it.
    return copied(call, 1, x.dtype, x.shape, x.stride)


# -- copies of views ---------------------------------------------------------------------------------------------------


def _declare_view_copy(op: str, view: str) -> None:
    overload = getattr(getattr(torch.ops.aten, view.split(".")[1]), view.split(".")[2])

    @planned(op, family="copy", kernel=same, name=op.split(".")[1] + ("" if op.endswith("default") else "_" + op.split(".")[2]))
    def plan(call: Call) -> Plan:
        x = call.args[0]
        _require(x.dtype)
        # What the view is, PyTorch itself says, on a tensor without memory.
        stand_in = torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")
        try:
            seen = overload(stand_in, *call.args[1:])
        except (RuntimeError, IndexError, TypeError) as error:
            raise Decline(f"PyTorch rejects it: {str(error).splitlines()[0]}") from None
        meta = TensorMeta(x.dtype, tuple(seen.shape), tuple(seen.stride()), x.device)
        return copied(call, 0, x.dtype, stride=contiguous_strides(meta.shape), view=meta, offset=seen.storage_offset())


_declare_view_copy("aten.alias_copy.default", "aten.alias.default")
_declare_view_copy("aten.detach_copy.default", "aten.detach.default")
_declare_view_copy("aten.t_copy.default", "aten.t.default")
_declare_view_copy("aten.transpose_copy.int", "aten.transpose.int")
_declare_view_copy("aten.permute_copy.default", "aten.permute.default")
_declare_view_copy("aten.squeeze_copy.default", "aten.squeeze.default")
_declare_view_copy("aten.squeeze_copy.dim", "aten.squeeze.dim")
_declare_view_copy("aten.squeeze_copy.dims", "aten.squeeze.dims")
_declare_view_copy("aten.unsqueeze_copy.default", "aten.unsqueeze.default")
_declare_view_copy("aten.diagonal_copy.default", "aten.diagonal.default")
_declare_view_copy("aten.select_copy.int", "aten.select.int")
_declare_view_copy("aten.slice_copy.Tensor", "aten.slice.Tensor")
_declare_view_copy("aten.narrow_copy.default", "aten.narrow.default")
_declare_view_copy("aten.unfold_copy.default", "aten.unfold.default")


@planned("aten.view_copy.default", family="copy", kernel=same, name="view_copy")
def view_copy(call: Call) -> Plan:
    """As ``reshape``, so that any tensor will do: the result is written in the shape of ``self``."""
    x, size = call.args
    _require(x.dtype)
    try:
        shape = tuple(torch.empty(x.shape, device="meta").view(size).shape)
    except RuntimeError as error:
        raise Decline(f"PyTorch rejects it: {str(error).splitlines()[0]}") from None
    plan = copied(call, 0, x.dtype, stride=contiguous_strides(x.shape))
    return plan._replace(allocs=(Alloc(shape, contiguous_strides(shape), x.dtype),), elementwise=False)


@planned("aten.expand_copy.default", family="copy", kernel=same, name="expand_copy")
def expand_copy(call: Call) -> Plan:
    x, size = call.args[:2]
    shape = expanded_shape(x.shape, size)
    return copied(call, 0, x.dtype, shape, contiguous_strides(shape))


def expanded_shape(shape: tuple[int, ...], size: Sequence[int]) -> tuple[int, ...]:
    """What ``Tensor.expand(size)`` makes of ``shape``; -1 keeps a size.

    Raises:
        Decline: PyTorch raises.
    """
    lead = len(size) - len(shape)
    if lead < 0 or any(s < 0 for s in size[:lead]):
        raise Decline("PyTorch rejects it: the sizes do not expand")
    result = tuple(size[:lead]) + tuple(own if new == -1 else new for own, new in zip(shape, size[lead:]))
    if any(own not in (1, new) for own, new in zip(shape, result[lead:])):
        raise Decline("PyTorch rejects it: the sizes do not expand")
    return result


@planned("aten.as_strided_copy.default", family="copy", kernel=same, name="as_strided_copy")
def as_strided_copy(call: Call) -> Plan:
    x, size, strides, offset = call.args
    if offset is not None:
        raise Decline("an offset into the storage, of which a decision knows nothing")
    view = TensorMeta(x.dtype, tuple(size), tuple(strides), x.device)
    if len(size) != len(strides) or min((*size, *strides), default=0) < 0 or view.extent > x.extent:
        raise Decline("it reaches beyond the elements of self")
    return copied(call, 0, x.dtype, stride=contiguous_strides(view.shape), view=view)


@planned("aten.lift_fresh_copy.default", family="copy", kernel=same, name="lift_fresh_copy")
def lift_fresh_copy(call: Call) -> Plan:
    x = call.args[0]
    return copied(call, 0, x.dtype, stride=contiguous_strides(x.shape))


# -- fills -------------------------------------------------------------------------------------------------------------


def _own_place(call: Call) -> TensorMeta:
    x = call.args[0]
    if x.device.type != call.target.device_type:
        raise Decline(f"device {x.device}")
    if x.dtype not in ALL:
        raise Decline(f"{dtype_name(x.dtype)} is not handled")
    return x


@planned("aten.fill.Scalar", family="copy", kernel=same, name="fill", by_value=("value",), writes_out=True)
def fill(call: Call) -> Plan:
    x = _own_place(call)
    require_fits(call.args[1], x.dtype)
    return build(call, same, [number_as(1, x.dtype)], [x.dtype], x.shape, clone_strides(x, None), flops=0)


@planned("aten.fill.Tensor", family="copy", kernel=same, name="fill_tensor", writes_out=True)
def fill_tensor(call: Call) -> Plan:
    """``value`` is a 0-dim tensor."""
    x, value = _own_place(call), call.args[1]
    if value.shape:
        raise Decline("PyTorch rejects it: the value is no 0-dim tensor")
    return copied(call, 1, x.dtype, x.shape, clone_strides(x, None))


@planned("aten.zero.default", family="copy", kernel=zeros, name="zero", writes_out=True)
def zero(call: Call) -> Plan:
    x = _own_place(call)
    nothing = index_operand(x.shape, (0,) * x.ndim, torch.int32)
    return build(call, zeros, [nothing], [x.dtype], x.shape, clone_strides(x, None), flops=0)
