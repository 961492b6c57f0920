"""Calling PyTorch's own implementation of an op, as cheaply as Python can.

``op(*args)`` converts its arguments through the op's schema; the generated Python binding of the same op does so in
less than half the time. :data:`BINDINGS` names the ops whose binding takes the same arguments in the same order and
dispatches to the same overload for every call (the tests check each entry).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from gemsmode.signature import parameters

_T = torch._C.TensorBase
_F = torch._C._VariableFunctions

BINDINGS: dict[str, Callable[..., Any]] = {
    "aten.view.default": _T.view,
    "aten.t.default": _T.t,
    "aten.transpose.int": _T.transpose,
    "aten.permute.default": _T.permute,
    "aten.unsqueeze.default": _T.unsqueeze,
    "aten.squeeze.dim": _T.squeeze,
    "aten.expand.default": _T.expand,
    "aten.detach.default": _T.detach,
    "aten.select.int": _T.select,
    "aten.split.Tensor": _T.split,
    "aten.mm.default": _F.mm,
    "aten.bmm.default": _F.bmm,
    "aten.addmm.default": _F.addmm,
    "aten.cat.default": _F.cat,
    "aten.clone.default": _T.clone,
    "aten.add.Tensor": _F.add,
    "aten.mul.Tensor": _F.mul,
}


def native(op: Any) -> Callable[..., Any]:
    """The cheapest callable for ``op``, called as the op itself is."""
    return BINDINGS.get(str(op)) or getattr(op, "_op", op)


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


@functools.cache
def is_composite(op: Any) -> bool:
    """Whether PyTorch implements ``op`` by other ops alone, so that it can be taken apart below autograd."""
    if not isinstance(op, OpOverload):
        return False
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(op.name(), "CompositeImplicitAutograd") and not any(has(op.name(), key) for key in ("CPU", "CUDA"))
