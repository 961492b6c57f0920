"""Unique elements: of sorted elements, or of neighbours as they are, the first of each run of equals.

How many there are decides the results' sizes, so that plans have two stages. The first one sorts (:mod:`gemsmode.ops.sort`)
and counts the beginnings of runs in each tile, and a scan of these counts gives each tile's first place and the total,
which the host reads. The second one writes each beginning to its place; an inverse is the place of each element's run, and
counts are the differences of neighbouring beginnings.

Source: the documentation of ``torch.unique`` and ``torch.unique_consecutive``; NaN (different from itself), signed zeros
(equal, the first one stays) and shapes of what is not asked for (``[0]``) as measured against PyTorch's results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.ops.measured import check_measured
from gemsmode.ops.pointwise import power_of_2
from gemsmode.ops.promotion import ALL
from gemsmode.ops.reduction import canonical_dims
from gemsmode.ops.select import comparable
from gemsmode.ops.sort import Sorting, flat_rows, flattened, keys
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _beginnings(p_x, i, n):
    """Which elements differ from the one before them, and their values."""
    m = i < n
    x = tl.load(p_x + i, mask=m, other=0)
    before = tl.load(p_x + tl.maximum(i - 1, 0), mask=m, other=0)
    return x, m & ((i == 0) | (comparable(x) != comparable(before))), m


@triton.jit
def count_kernel(p_counts, p_x, n, BLOCK: tl.constexpr):
    """The number of beginnings of runs in each tile."""
    i_tile = tl.program_id(0).to(tl.int64)
    _, begins, _ = _beginnings(p_x, i_tile * BLOCK + tl.arange(0, BLOCK), n)
    tl.store(p_counts + i_tile, tl.sum(begins.to(tl.int64), 0))


@triton.jit
def starts_kernel(p_total, p_counts, n, BLOCK: tl.constexpr):
    """Replace each of ``n`` counts by the sum of those before it; the sum of all goes to ``p_total``. Grid: one program."""
    before = tl.zeros([], tl.int64)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.load(p_counts + i, mask=i < n, other=0)
        tl.store(p_counts + i, tl.cumsum(count, 0) - count + before, mask=i < n)
        before += tl.sum(count, 0)
    tl.store(p_total, before)


@triton.jit
def write_kernel(p_unique, p_inverse, p_begins, p_x, p_order, p_starts, n, BLOCK: tl.constexpr):
    """Write the first element of each run to its place; for each element, the place of its run; where each run begins."""
    i_tile = tl.program_id(0).to(tl.int64)
    i = i_tile * BLOCK + tl.arange(0, BLOCK)
    x, begins, m = _beginnings(p_x, i, n)
    place = tl.load(p_starts + i_tile) + tl.cumsum(begins.to(tl.int64), 0) - 1
    tl.store(p_unique + place, x, mask=begins)
    if len(p_begins) > 0:
        tl.store(p_begins[0] + place, i, mask=begins)
    if len(p_inverse) > 0:
        if len(p_order) > 0:
            tl.store(p_inverse[0] + tl.load(p_order[0] + i, mask=m, other=0), place, mask=m)
        else:
            tl.store(p_inverse[0] + i, place, mask=m)


@triton.jit
def lengths_kernel(p_lengths, p_begins, runs, n, BLOCK: tl.constexpr):
    """How long each of the runs is that begin at ``p_begins``, in ``n`` elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < runs
    begin = tl.load(p_begins + i, mask=m, other=0)
    end = tl.load(p_begins + i + 1, mask=i + 1 < runs, other=0)
    tl.store(p_lengths + i, tl.where(i + 1 < runs, end, n) - begin, mask=m)


# -- plans -------------------------------------------------------------------------------------------------------------


def _block(n: int, target: Target) -> int:
    return min(power_of_2(n), 1 << 15 if target.interpreted else 1024)


def _empty(shape: tuple[int, ...], d: torch.dtype = torch.int64) -> Alloc:
    return Alloc(shape, contiguous_strides(shape), d)


def _unique(call: Call, ordered: bool, inverse: bool, counts: bool | None, inverse_shape: tuple[int, ...]) -> Plan:
    """The plan for all elements of the first argument in one sequence, sorted first if ``ordered``.

    ``counts`` is None where the op has no such result.
    """
    x: TensorMeta = call.args[0]
    n, arity = x.numel, len(parameters(call.op))
    metas = {Arg(0): x}
    inverse = inverse or (n == 0 and call.target.device_type != "cpu")  # which shows in the shape of what is empty anyway

    def results(total: int) -> list[Alloc]:
        made = [_empty((total,), x.dtype), _empty(inverse_shape if inverse else (0,))]
        return made if counts is None else [*made, _empty((total if counts else 0,))]

    returns: Any = tuple([Out(i) for i in range(2 if counts is None else 3)])
    if n == 0:
        return Plan(tuple(results(0)), (), returns, metas)
    allocs: list[Alloc] = []
    source, launches = flattened(call, 0, allocs)
    order: tuple[Any, ...] = ()
    if ordered:
        values = Out(len(allocs))
        allocs.append(_empty((n,), x.dtype))
        if inverse:
            order = (Out(len(allocs)),)
            allocs.append(_empty((n,)))
        sorting = Sorting(call.target, source, (values,), order, allocs, launches)
        sorting.smallest(flat_rows(x), keys(x.dtype, n, False), n)
        source, launches = values, sorting.launches
    block = _block(n, call.target)
    tiles = -(-n // block)
    starts, total = Out(len(allocs)), Out(len(allocs) + 1)
    allocs += [_empty((tiles,)), _empty((1,))]
    launches.append(Launch(count_kernel, (tiles, 1, 1), (starts, source, extent(n)), (("BLOCK", block),)))
    launches.append(Launch(starts_kernel, (1, 1, 1), (total, starts, Size(tiles)), (("BLOCK", _block(tiles, call.target)),), 4, 1))

    def then(read: list[int]) -> Plan:
        made = results(read[0])
        known = dict(metas)

        def earlier(ref: Any) -> Any:
            """A reference of the first stage in the second one's terms."""
            if ref.__class__ is not Out:
                return ref
            moved = Arg(arity + ref.index)
            known[moved] = allocs[ref.index].meta
            return moved

        begins: tuple[Any, ...] = ()
        if counts:
            begins = (Out(len(made)),)
            made.append(_empty((read[0],)))
        steps = [Launch(write_kernel, (tiles, 1, 1),
                        (Out(0), (Out(1),) if inverse else (), begins, earlier(source), tuple([earlier(o) for o in order]), earlier(starts),
                         extent(n)), (("BLOCK", block),))]
        if counts:
            steps.append(Launch(lengths_kernel, (-(-read[0] // block), 1, 1), (Out(2), *begins, Size(read[0]), Size(n)),
                                (("BLOCK", block),)))
        return Plan(tuple(made), tuple(steps), returns, known)

    return Plan(tuple(allocs), tuple(launches), total, metas, then=then, example=(max(n // 2, 1),), bytes=n * x.dtype.itemsize)


# -- rules -------------------------------------------------------------------------------------------------------------

_NUMBERS = dtype(*ALL, arg="self")


def _vector(call: Call, dim: int) -> None:
    """Decline unless slices along ``dim`` are single elements of a vector."""
    meta = call.args[0]
    canonical_dims(dim, meta.ndim)
    if meta.ndim != 1:
        raise Decline("slices of a tensor, ordered one element after the other")


def _asked(call: Call, result: bool) -> bool:
    """Whether the overloads with a dimension give this result: on the CPU, asked for or not."""
    return result or call.target.device_type == "cpu"


@planned(["aten._unique2.default"], _NUMBERS, family="sorting", kernel=write_kernel)
def unique2(call: Call) -> Plan:
    """self, sorted, return_inverse, return_counts: the unique elements are sorted, asked for or not."""
    check_measured("unique", call.target, n=call.args[0].numel)
    return _unique(call, True, call.args[2], call.args[3], call.args[0].shape)


@planned(["aten._unique.default"], _NUMBERS, family="sorting", kernel=write_kernel)
def unique(call: Call) -> Plan:
    """self, sorted, return_inverse."""
    check_measured("unique", call.target, n=call.args[0].numel)
    return _unique(call, True, call.args[2], None, call.args[0].shape)


@planned(["aten.unique_dim.default"], _NUMBERS, family="sorting", kernel=write_kernel)
def unique_dim(call: Call) -> Plan:
    """self, dim, sorted, return_inverse, return_counts: of vectors."""
    _vector(call, call.args[1])
    return _unique(call, True, _asked(call, call.args[3]), _asked(call, call.args[4]), call.args[0].shape)


@planned(["aten.unique_consecutive.default"], _NUMBERS, family="sorting", kernel=write_kernel)
def unique_consecutive(call: Call) -> Plan:
    """self, return_inverse, return_counts, dim: of all elements in order, or of a vector."""
    inverse, counts, dim = call.args[1:]
    if dim is not None:
        _vector(call, dim)
        inverse, counts = _asked(call, inverse), _asked(call, counts)
    return _unique(call, False, inverse, counts, call.args[0].shape)


@planned(["aten.unique_dim_consecutive.default"], _NUMBERS, family="sorting", kernel=write_kernel)
def unique_dim_consecutive(call: Call) -> Plan:
    """self, dim, return_inverse, return_counts: of vectors."""
    _vector(call, call.args[1])
    return _unique(call, False, _asked(call, call.args[2]), _asked(call, call.args[3]), call.args[0].shape)
