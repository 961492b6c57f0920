"""Calling PyTorch's own implementation of an op, as cheaply as Python can.

``op(*args)`` converts its arguments through the op's schema; the generated Python binding of the same op does so in
less than half the time. :data:`BINDINGS` names the ops whose binding takes the same arguments in the same order and
dispatches to the same overload for every call (the tests check each entry).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._ops import OpOverload

from gemsmode.signature import parameters

_T = torch._C.TensorBase
_F = torch._C._VariableFunctions

_N = torch._C._nn


def _view(self: torch.Tensor, size: Any) -> torch.Tensor:
    # A list as one argument is first tried as a dtype, and costs half as much again as its numbers one by one.
    return _T.view(self, *size) if size else _T.view(self, size)


def _permute(self: torch.Tensor, dims: Any) -> torch.Tensor:
    return _T.permute(self, *dims) if dims else _T.permute(self, dims)


BINDINGS: dict[str, Callable[..., Any]] = {
    # views
    "aten.view.default": _view,
    "aten.t.default": _T.t,
    "aten.transpose.int": _T.transpose,
    "aten.permute.default": _permute,
    "aten.unsqueeze.default": _T.unsqueeze,
    "aten.squeeze.default": _T.squeeze,
    "aten.squeeze.dim": _T.squeeze,
    "aten.squeeze.dims": _T.squeeze,
    "aten.expand.default": _T.expand,
    "aten.detach.default": _T.detach,
    "aten.select.int": _T.select,
    "aten.split.Tensor": _T.split,
    "aten.split_with_sizes.default": _T.split_with_sizes,
    "aten.unbind.int": _T.unbind,
    "aten.as_strided.default": _T.as_strided,
    "aten.unfold.default": _T.unfold,
    "aten.diagonal.default": _T.diagonal,
    # products
    "aten.mm.default": _F.mm,
    "aten.bmm.default": _F.bmm,
    "aten.addmm.default": _F.addmm,
    "aten.baddbmm.default": _F.baddbmm,
    "aten.mv.default": _F.mv,
    "aten.dot.default": _F.dot,
    "aten.convolution.default": _F.convolution,
    # movement
    "aten.cat.default": _F.cat,
    "aten.stack.default": _F.stack,
    "aten.clone.default": _T.clone,
    "aten.copy_.default": _T.copy_,
    "aten.fill_.Scalar": _T.fill_,
    "aten.zero_.default": _T.zero_,
    "aten.embedding.default": _F.embedding,
    "aten.index_select.default": _F.index_select,
    "aten.gather.default": _F.gather,
    # pointwise
    "aten.add.Tensor": _F.add,
    "aten.sub.Tensor": _F.sub,
    "aten.mul.Tensor": _F.mul,
    "aten.div.Tensor": _F.div,
    "aten.add_.Tensor": _T.add_,
    "aten.mul_.Tensor": _T.mul_,
    "aten.pow.Tensor_Scalar": _F.pow,
    "aten.where.self": _F.where,
    "aten.masked_fill.Scalar": _F.masked_fill,
    "aten.neg.default": _F.neg,
    "aten.exp.default": _F.exp,
    "aten.sqrt.default": _F.sqrt,
    "aten.rsqrt.default": _F.rsqrt,
    "aten.cos.default": _F.cos,
    "aten.sin.default": _F.sin,
    "aten.tanh.default": _F.tanh,
    "aten.sigmoid.default": _F.sigmoid,
    "aten.relu.default": _F.relu,
    "aten.silu.default": _N.silu,
    "aten.gelu.default": _N.gelu,
    # reductions and norms
    "aten.sum.default": _F.sum,
    "aten.sum.dim_IntList": _F.sum,
    "aten.mean.dim": _F.mean,
    "aten._softmax.default": _F._softmax,
    "aten._log_softmax.default": _F._log_softmax,
    "aten._softmax_backward_data.default": _F._softmax_backward_data,
    "aten.native_layer_norm.default": _F.native_layer_norm,
}
"""``slice.Tensor``, ``alias`` and ``_unsafe_view`` have no binding of their own."""

REFERENCES: dict[str, Callable[..., Any]] = {}
"""By name, what an op of gemsmode's own (:mod:`gemsmode.custom`) does without a kernel: a function of other ops."""


def native(op: Any) -> Callable[..., Any]:
    """The cheapest callable for ``op``, called as the op itself is."""
    name = str(op)
    return BINDINGS.get(name) or REFERENCES.get(name) or getattr(op, "_op", op)


@functools.cache
def native_in_order(op: OpOverload) -> Callable[..., Any]:
    """:func:`native` for a call that gives every argument of the schema, in order and by position."""
    function = native(op)
    given, passed = [], []
    for i, parameter in enumerate(parameters(op)):
        given.append(f"a{i}")
        passed.append(f"{parameter.name}=a{i}" if parameter.kwarg_only else f"a{i}")
    if not any(p.kwarg_only for p in parameters(op)):
        return function
    scope: dict[str, Any] = {"function": function}
    exec(f"def native({', '.join(given)}):\n    return function({', '.join(passed)})", scope)
    return scope["native"]


# Ops that compute nothing: views, allocations, metadata, reading one value back. Reports keep them apart.
_METADATA_NAMES = frozenset([
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "_unsafe_view",
    "_reshape_alias", "alias", "detach", "lift", "lift_fresh", "is_same_size", "sym_size", "sym_stride", "sym_numel",
    "sym_storage_offset", "is_pinned", "_pin_memory", "_local_scalar_dense", "resize_", "set_", "record_stream",
    "_has_compatible_shallow_copy_type", "is_nonzero", "result_type", "_version", "_is_zerotensor", "is_coalesced",
    "sparse_dim", "dense_dim", "size", "stride", "numel", "dim", "is_contiguous", "_nested_tensor_size",
    "unsafe_split", "unsafe_chunk", "as_strided_", "retain_grad", "_fw_primal", "_make_dual", "_unpack_dual",
    "resolve_conj", "resolve_neg",
    "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "requires_grad_", "rename_", "resize_as_",
])


@functools.cache
def computes(op: Any) -> bool:
    """False for views, allocations and metadata calls."""
    if not isinstance(op, OpOverload):
        return True
    name = op._schema.name.partition("::")[2]
    return not (op.is_view or name in _METADATA_NAMES or op.namespace in ("prim", "prims", "profiler"))


_COMMUNICATION = frozenset({"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "symm_mem"})


@functools.cache
def communicates(op: Any) -> bool:
    """Whether ``op`` exchanges tensors between processes."""
    return isinstance(op, OpOverload) and op.namespace in _COMMUNICATION


def numbers_of_host(args: Iterable[Any]) -> bool:
    """Whether every tensor among ``args`` (tensors, or what describes them) is a 0-dim CPU tensor: numbers that PyTorch keeps in tensors.

    An optimizer's step counts are: on a GPU their ``_foreach_add_`` runs on the host, and is nothing that a kernel could replace.
    """
    found = False
    for arg in args:
        for item in arg if arg.__class__ in (list, tuple) else (arg,):
            ndim = getattr(item, "ndim", None)
            if ndim is not None:
                if ndim or item.device.type != "cpu":
                    return False
                found = True
    return found


@functools.cache
def key_of_parts(op: OpOverload, device_type: str) -> torch._C.DispatchKey:
    """The dispatch key under which the implementation of a composite ``op`` by other ops is registered."""
    return getattr(torch._C.DispatchKey, device_type.upper() if op.namespace == "fsdp" else "CompositeImplicitAutograd")


@functools.cache
def is_composite(op: Any) -> bool:
    """Whether ``op`` is implemented by other ops alone, so that it can be taken apart below autograd."""
    if not isinstance(op, OpOverload):
        return False
    if str(op) in REFERENCES:
        return True
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        if op.namespace == "fsdp":  # whose copies are written in Python, once for each device; what is written in C++ is not
            return all(has(op.name(), key) for key in ("CPU", "CUDA", "Meta"))
        return has(op.name(), "CompositeImplicitAutograd") and not any(has(op.name(), key) for key in ("CPU", "CUDA"))
    except RuntimeError:  # an op of TorchScript alone, such as prim.device, which the dispatcher does not know
        return False
