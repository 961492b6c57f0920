"""Indexing: embedding and its backward, index_select, gather, index, index_put, scatter, index_add.

Every index is checked on the device (``tl.device_assert``, as PyTorch's kernels do): an index out of range stops the
program instead of reading or writing elsewhere.

Source: ``torch.nn.functional.embedding``, ``torch.index_select``, ``torch.gather``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import broadcast_shape, broadcast_strides, preserved_strides
from gemsmode.ops.movement import choose_rows, same, wrap_dim
from gemsmode.ops.pointwise import Operand, build, power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, TRITON, opmath
from gemsmode.plan import Alloc, Arg, Decline, Disjoint, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype, dtype_name
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta, parameters

_INDEX = (torch.int32, torch.int64)
_WIDE = 2**31 - 2**17

# -- reading by index --------------------------------------------------------------------------------------------------


@triton.jit
def take_kernel(outs, p_x, p_index, limit, n_rows, sizes, out_strides, x_strides, index_strides, x_step, AT: tl.constexpr,
                WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[c] = x[c with coordinate AT replaced by index[c]]``; dimensions innermost first.

    ``x_strides[AT]`` is 0 and ``x_step`` the stride of x along it; the index has a stride of 0 along each dimension that it
    does not depend on. Rows are all dimensions but the innermost together. Grid: (row blocks, column blocks).
    """
    i_y = tl.program_id(0)
    i_x = tl.program_id(1)
    if WIDE:
        i_y = i_y.to(tl.int64)
        i_x = i_x.to(tl.int64)
    y = i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    o_out = tl.zeros_like(y)
    o_x = tl.zeros_like(y)
    o_index = tl.zeros_like(y)
    rest = y
    for d in tl.static_range(1, len(sizes)):
        i = rest % sizes[d]
        rest = rest // sizes[d]
        o_out += i * out_strides[d]
        o_x += i * x_strides[d]
        o_index += i * index_strides[d]
    m_y = y < n_rows
    m = m_y[:, None] & (x < sizes[0])[None, :]  # [BLOCK_Y, BLOCK_X]
    if AT == 0:
        # The index varies along a row.
        b_index = tl.load(p_index + (o_index[:, None] + (x * index_strides[0])[None, :]), mask=m, other=0)
        wrong = m & ((b_index < 0) | (b_index >= limit))
        tl.device_assert(wrong == 0, "index out of bounds")
        b_index = tl.where(wrong, 0, b_index)
        b = tl.load(p_x + (o_x[:, None] + (x * x_strides[0])[None, :]) + b_index * x_step, mask=m)
    else:
        b_index = tl.load(p_index + o_index, mask=m_y, other=0)  # [BLOCK_Y]
        wrong = m_y & ((b_index < 0) | (b_index >= limit))
        tl.device_assert(wrong == 0, "index out of bounds")
        b_index = tl.where(wrong, 0, b_index)
        b = tl.load(p_x + ((o_x + b_index * x_step)[:, None] + (x * x_strides[0])[None, :]), mask=m)
    tl.store(outs[0] + (o_out[:, None] + (x * out_strides[0])[None, :]), b, mask=m)


def _take(call: Call, x: tuple[int, TensorMeta], index: tuple[int, TensorMeta], shape: tuple[int, ...], x_strides: Sequence[int],
          index_strides: Sequence[int], limit: int, x_step: int) -> Plan:
    """A plan of ``take_kernel`` with a result of ``shape``; the strides are per dimension of it, outermost first."""
    x_at, x_meta = x
    index_at, index_meta = index
    alloc = Alloc(shape, contiguous_strides(shape), x_meta.dtype)
    metas = {Arg(x_at): x_meta, Arg(index_at): index_meta}
    n = alloc.meta.numel
    moved = 2 * n * x_meta.dtype.itemsize + index_meta.numel * index_meta.dtype.itemsize
    if n == 0:
        return Plan((alloc,), (), Out(0), metas, bytes=0)
    sizes: list[int] = []
    table: list[tuple[int, int, int]] = []
    for d in reversed(range(len(shape))):
        if shape[d] == 1:
            continue
        column = (alloc.stride[d], x_strides[d], index_strides[d])
        if sizes and all(a * sizes[-1] == b for a, b in zip(table[-1], column)):
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            table.append(column)
    if not sizes:
        sizes, table = [1], [(1, 0, 0)]
    rows = n // sizes[0]
    tile = choose_rows(rows, sizes[0], x_meta.dtype.itemsize, call.target)
    in_row = table[0][2] != 0 or len(sizes) == 1
    wide = max(n, x_meta.extent, index_meta.extent) >= _WIDE
    args = ((Out(0),), Arg(x_at), Arg(index_at), Size(limit), Size(rows), (extent(sizes[0]), *[Size(s) for s in sizes[1:]]),
            *[(table[0][k], *[stride(c[k]) for c in table[1:]]) for k in range(3)], stride(x_step))
    constants = Constants((("AT", 0 if in_row else 1), ("WIDE", wide), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns)))
    launch = Launch(take_kernel, (-(-rows // tile.rows), -(-sizes[0] // tile.columns), 1), args, constants, tile.warps, asserts=True)
    return Plan((alloc,), (launch,), Out(0), metas, bytes=moved)


@planned("aten.embedding.default", [dtype(*ALL, arg="weight"), dtype(*_INDEX, arg="indices")], family="indexing", kernel=take_kernel)
def embedding(call: Call) -> Plan:
    """weight [V, D], indices [...] -> [..., D]."""
    weight, indices = call.args[:2]
    if weight.ndim != 2:
        raise Decline("PyTorch rejects it: the weight must have two dimensions")
    shape = (*indices.shape, weight.shape[1])
    lead = (0,) * indices.ndim
    return _take(call, (0, weight), (1, indices), shape, (*lead, weight.stride[1]), (*indices.stride, 0), weight.shape[0], weight.stride[0])


@planned("aten.index_select.default", [dtype(*ALL, arg="self"), dtype(*_INDEX, arg="index")], family="indexing", kernel=take_kernel)
def index_select(call: Call) -> Plan:
    """self [..., N, ...], dim, index [K] -> [..., K, ...]."""
    x, dim, index = call.args
    if x.ndim == 0 or index.ndim > 1:
        raise Decline("a 0-dim tensor, or an index of several dimensions")
    dim = wrap_dim(dim, x.ndim)
    shape = (*x.shape[:dim], index.numel, *x.shape[dim + 1:])
    own = [0 if d == dim else s for d, s in enumerate(x.stride)]
    along = [(index.stride[0] if index.ndim else 0) if d == dim else 0 for d in range(x.ndim)]
    return _take(call, (0, x), (2, index), shape, own, along, x.shape[dim], x.stride[dim])


@planned("aten.gather.default", [dtype(*ALL, arg="self"), dtype(*_INDEX, arg="index")], family="indexing", kernel=take_kernel)
def gather(call: Call) -> Plan:
    """self and index of one rank -> the shape of index."""
    x, dim, index, _ = call.args
    if x.ndim != index.ndim or x.ndim == 0:
        raise Decline("a 0-dim tensor, or ranks that differ")
    dim = wrap_dim(dim, x.ndim)
    if any(i > n for d, (i, n) in enumerate(zip(index.shape, x.shape)) if d != dim):
        raise Decline("PyTorch rejects it: the index is larger than the tensor in another dimension than dim")
    own = [0 if d == dim else s for d, s in enumerate(x.stride)]
    return _take(call, (0, x), (2, index), index.shape, own, index.stride, x.shape[dim], x.stride[dim])


# -- embedding backward ------------------------------------------------------------------------------------------------
#
# The rows of the gradient that belong to one row of the weight are found by a stable counting sort of the indices, so
# each row is written once, in float32, in a fixed order: no atomics on values, the same result at every run.

MAX_RANKED = 1 << 15
"""Indices ranked against each other; the work is quadratic, about 20 us of an H200 at this many."""


@triton.jit
def rank_kernel(p_index, p_rank, p_count, n, limit, padding, BLOCK: tl.constexpr, INNER: tl.constexpr):
    """rank[i] = how many j < i have index[j] == index[i]; count[v] = how many there are in all. Grid: blocks of n."""
    i_block = tl.program_id(0)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_index = tl.load(p_index + o, mask=m, other=0)
    wrong = m & ((b_index < 0) | (b_index >= limit))
    tl.device_assert(wrong == 0, "index out of bounds")
    m = m & (wrong == 0) & (b_index != padding)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.minimum(i_block * BLOCK + BLOCK, n), INNER):
        o_other = start + tl.arange(0, INNER)
        b_other = tl.load(p_index + o_other, mask=o_other < n, other=-1)
        same = (b_index[:, None] == b_other[None, :]) & (o_other[None, :] < o[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    tl.store(p_rank + o, rank, mask=o < n)
    tl.atomic_add(p_count + b_index, tl.full((BLOCK,), 1, tl.int32), mask=m, sem="relaxed")


@triton.jit
def starts_kernel(p_count, p_start, limit, BLOCK: tl.constexpr):
    """start[v] = the sum of count[:v]. Grid: one program."""
    before = tl.zeros((), tl.int32)
    for first in range(0, limit, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b = tl.load(p_count + o, mask=o < limit, other=0)
        tl.store(p_start + o, before + tl.cumsum(b, 0) - b, mask=o < limit)
        before += tl.sum(b, 0)


@triton.jit
def order_kernel(p_index, p_rank, p_start, p_order, n, limit, padding, BLOCK: tl.constexpr):
    """order[start[index[i]] + rank[i]] = i. Grid: blocks of n."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_index = tl.load(p_index + o, mask=m, other=0)
    m = m & (b_index >= 0) & (b_index < limit) & (b_index != padding)
    place = tl.load(p_start + b_index, mask=m, other=0) + tl.load(p_rank + o, mask=m, other=0)
    tl.store(p_order + place, o, mask=m)


@triton.jit
def sum_rows_kernel(p_grad, p_count, p_start, p_order, p_out, limit, width, grad_stride, COMPUTE: tl.constexpr, SCALE: tl.constexpr,
                    WIDE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_X: tl.constexpr):
    """out[v, :] = the sum of grad[i, :] over the i of order[start[v] : start[v] + count[v]]. Grid: (blocks of v, of columns)."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_v = v < limit
    m_x = x < width
    count = tl.load(p_count + v, mask=m_v, other=0)
    start = tl.load(p_start + v, mask=m_v, other=0)
    acc = tl.zeros((BLOCK_V, BLOCK_X), COMPUTE)
    for k in range(0, tl.max(count, 0)):
        m_k = k < count
        row = tl.load(p_order + start + k, mask=m_k, other=0)
        if WIDE:
            row = row.to(tl.int64)
        acc += tl.load(p_grad + (row * grad_stride)[:, None] + x[None, :], mask=m_k[:, None] & m_x[None, :], other=0).to(COMPUTE)
    if SCALE:
        acc = acc / tl.maximum(count, 1).to(COMPUTE)[:, None]
    o_v = v
    if WIDE:
        o_v = v.to(tl.int64)
    tl.store(p_out + (o_v * width)[:, None] + x[None, :], acc.to(p_out.dtype.element_ty), mask=m_v[:, None] & m_x[None, :])


@planned("aten.embedding_dense_backward.default", [dtype(*FLOAT, arg="grad_output"), dtype(*_INDEX, arg="indices")],
         family="indexing", kernel=sum_rows_kernel)
def embedding_dense_backward(call: Call) -> Plan:
    """grad_output [..., D], indices [...] -> [num_weights, D]."""
    grad, indices, limit, padding, scale = call.args
    width, n = grad.shape[-1], indices.numel
    if grad.shape[:-1] != indices.shape:
        raise Decline("the gradient's shape is not that of the indices and a row")
    if not grad.is_contiguous or not indices.is_contiguous:
        raise Decline("a gradient or indices that are not contiguous")
    if n > MAX_RANKED:
        raise Decline(f"{n} indices; at most {MAX_RANKED} are ranked against each other")
    shape = (limit, width)
    alloc = Alloc(shape, contiguous_strides(shape), grad.dtype)
    metas = {Arg(0): grad, Arg(1): indices}
    if limit * width == 0 or n == 0:
        return Plan((alloc._replace(zero=True),), (), Out(0), {}, bytes=0)
    interpreted = call.target.interpreted
    count, start = (Alloc((limit,), (1,), torch.int32, zero=z) for z in (True, False))
    rank, order = (Alloc((n,), (1,), torch.int32) for _ in range(2))
    block, inner = (min(power_of_2(n), 1024),) * 2 if interpreted else (64, 128)
    scan = min(power_of_2(limit), 1 << 16) if interpreted else min(power_of_2(limit), 4096)
    columns = min(power_of_2(width), 1024 if interpreted else 128 * max(16 // grad.dtype.itemsize, 1))
    rows = min(power_of_2(limit), max((1 << 16) // columns, 1)) if interpreted else 1
    compute = tl.float64 if opmath(grad.dtype) == torch.float64 else tl.float32
    wide = max(limit * width, grad.numel) >= _WIDE
    launches = (
        Launch(rank_kernel, (-(-n // block), 1, 1), (Arg(1), Out(3), Out(1), Size(n), Size(limit), Size(padding)),
               Constants((("BLOCK", block), ("INNER", inner))), asserts=True),
        Launch(starts_kernel, (1, 1, 1), (Out(1), Out(2), Size(limit)), Constants((("BLOCK", scan),)), 8),
        Launch(order_kernel, (-(-n // block), 1, 1), (Arg(1), Out(3), Out(2), Out(4), Size(n), Size(limit), Size(padding)),
               Constants((("BLOCK", block),))),
        Launch(sum_rows_kernel, (-(-limit // rows), -(-width // columns), 1),
               (Arg(0), Out(1), Out(2), Out(4), Out(0), Size(limit), extent(width), extent(width)),
               Constants((("COMPUTE", compute), ("SCALE", bool(scale)), ("WIDE", wide), ("BLOCK_V", rows), ("BLOCK_X", columns)))),
    )
    moved = (limit * width + grad.numel) * grad.dtype.itemsize + n * indices.dtype.itemsize
    return Plan((alloc, count, start, rank, order), launches, Out(0), metas, bytes=moved)


# -- reading and writing by several indices ----------------------------------------------------------------------------


@triton.jit
def _row_offset(y, sizes, strides):
    """The offset of row y, taken apart into all dimensions but the innermost."""
    o = tl.zeros_like(y)
    rest = y
    for d in tl.static_range(1, len(sizes)):
        o += (rest % sizes[d]) * strides[d]
        rest = rest // sizes[d]
    return o


@triton.jit
def _offsets(y, x, sizes, strides):
    return _row_offset(y, sizes, strides)[:, None] + (x * strides[0])[None, :]  # [BLOCK_Y, BLOCK_X]


@triton.jit
def _indexed(indices, limits, steps, index_strides, y, x, m, sizes, WRAP: tl.constexpr):
    """The part of an address that the indices choose. WRAP: negative indices count from the end."""
    o = tl.zeros(m.shape, tl.int64)
    for j in tl.static_range(len(indices)):
        b = tl.load(indices[j] + _offsets(y, x, sizes, index_strides[j]), mask=m, other=0).to(tl.int64)
        if WRAP:
            b = tl.where(b < 0, b + limits[j], b)
        wrong = m & ((b < 0) | (b >= limits[j]))
        tl.device_assert(wrong == 0, "index out of bounds")
        o += tl.where(wrong, 0, b) * steps[j]
    return o


@triton.jit
def _block(n_rows, sizes, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    i_y = tl.program_id(0)
    i_x = tl.program_id(1)
    if WIDE:
        i_y = i_y.to(tl.int64)
        i_x = i_x.to(tl.int64)
    y = i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    return y, x, (y < n_rows)[:, None] & (x < sizes[0])[None, :]


@triton.jit
def index_kernel(outs, p_x, indices, limits, steps, n_rows, sizes, out_strides, x_strides, index_strides, WIDE: tl.constexpr,
                 BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[c] = x[c, with the indexed coordinates read from the indices]``. Grid: (row blocks, column blocks)."""
    y, x, m = _block(n_rows, sizes, WIDE, BLOCK_Y, BLOCK_X)
    o = _indexed(indices, limits, steps, index_strides, y, x, m, sizes, True)
    b = tl.load(p_x + o + _offsets(y, x, sizes, x_strides), mask=m)
    tl.store(outs[0] + _offsets(y, x, sizes, out_strides), b, mask=m)


@triton.jit
def put_kernel(outs, values, number, indices, limits, steps, n_rows, sizes, out_strides, value_strides, index_strides, ADD: tl.constexpr,
               WRAP: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """``out[c, indexed] = values[c]``, or ``+= number * values[c]`` if ADD; without values, ``number``."""
    y, x, m = _block(n_rows, sizes, WIDE, BLOCK_Y, BLOCK_X)
    o = _indexed(indices, limits, steps, index_strides, y, x, m, sizes, WRAP) + _offsets(y, x, sizes, out_strides)
    if len(values) == 1:
        b = tl.load(values[0] + _offsets(y, x, sizes, value_strides), mask=m)
        if ADD:
            b = b.to(COMPUTE) * tl.cast(number, COMPUTE)
    else:
        b = tl.broadcast_to(tl.cast(number, COMPUTE), m.shape)
    b = b.to(outs[0].dtype.element_ty)
    if ADD:
        tl.atomic_add(outs[0] + o, b, mask=m, sem="relaxed")
    else:
        tl.store(outs[0] + o, b, mask=m)


class Loop(NamedTuple):
    """The dimensions that an indexed op goes over, and the strides of each operand along them, outermost first.

    Attributes:
        shape: their sizes.
        operands: strides of the operands; those of the indices come last.
    """

    shape: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...]


def _loop(call: Call, loop: Loop, itemsize: int, wide: bool) -> tuple[Any, Any, Any, Any, Any]:
    """Rows, grid, sizes and strides as kernel arguments, and the constants of the block, after merging dimensions."""
    sizes: list[int] = []
    table: list[list[int]] = []
    for d in reversed(range(len(loop.shape))):
        if loop.shape[d] == 1:
            continue
        column = [s[d] for s in loop.operands]
        if sizes and all(a * sizes[-1] == b for a, b in zip(table[-1], column)):
            sizes[-1] *= loop.shape[d]
        else:
            sizes.append(loop.shape[d])
            table.append(column)
    if not sizes:
        sizes, table = [1], [[0] * len(loop.operands)]
    rows = 1
    for s in sizes[1:]:
        rows *= s
    tile = choose_rows(rows, sizes[0], itemsize, call.target)
    grid = (-(-rows // tile.rows), -(-sizes[0] // tile.columns), 1)
    steps = [(table[0][k], *[stride(c[k]) for c in table[1:]]) for k in range(len(loop.operands))]
    constants = (("WIDE", wide), ("BLOCK_Y", tile.rows), ("BLOCK_X", tile.columns))
    return Size(rows), grid, (extent(sizes[0]), *[Size(s) for s in sizes[1:]]), steps, constants


Chosen = tuple[Arg, TensorMeta, int, tuple[int, ...]]
"""An index: its reference, metadata, the dimension that it chooses in, and its strides over the result."""


def _advanced(x: TensorMeta, indices: Sequence[Any], first: int) -> tuple[tuple[int, ...], tuple[int, ...], list[Chosen]]:
    """Indexing of ``x`` with tensors (None: the whole dimension): the result's shape, the strides of x over it (0 along what the
    indices choose), and the indices. ``first``: the number of the argument that holds the list."""
    if len(indices) > x.ndim:
        raise Decline("PyTorch rejects it: too many indices")
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if not given:
        raise Decline("no index")
    for _, index in given:
        if index.dtype not in _INDEX:
            raise Decline(f"an index of {dtype_name(index.dtype)}")
        if index.device != x.device:
            raise Decline("indices on another device")
    shape = broadcast_shape([i.shape for _, i in given])
    dims = [d for d, _ in given]
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    whole = [d for d in range(x.ndim) if d not in dims]
    before = [d for d in whole if d < dims[0]] if adjacent else []
    after = [d for d in whole if d not in before]
    result = (*[x.shape[d] for d in before], *shape, *[x.shape[d] for d in after])
    own = (*[x.stride[d] for d in before], *(0,) * len(shape), *[x.stride[d] for d in after])
    refs = [(Arg(first, d), i, d, (*(0,) * len(before), *broadcast_strides(i, shape), *(0,) * len(after))) for d, i in given]
    return result, own, refs


@planned("aten.index.Tensor", dtype(*ALL, arg="self"), family="indexing", kernel=index_kernel)
def index(call: Call) -> Plan:
    """``self[indices]`` with integer indices. Source: NumPy's advanced indexing, which PyTorch follows."""
    x, indices = call.args
    shape, own, refs = _advanced(x, indices, 1)
    if not x.is_contiguous:
        raise Decline("a tensor that is not contiguous, whose layout the result follows")
    alloc = Alloc(shape, contiguous_strides(shape), x.dtype)
    metas = {Arg(0): x, **{ref: meta for ref, meta, _, _ in refs}}
    n = alloc.meta.numel
    if n == 0:
        raise Decline("an empty result")
    loop = Loop(shape, (alloc.stride, own, *[s for *_, s in refs]))
    wide = max(n, x.extent) >= _WIDE
    rows, grid, sizes, steps, constants = _loop(call, loop, x.dtype.itemsize, wide)
    args = ((Out(0),), Arg(0), tuple(ref for ref, *_ in refs), tuple(Size(x.shape[d]) for _, _, d, _ in refs),
            tuple(stride(x.stride[d]) for _, _, d, _ in refs), rows, sizes, steps[0], steps[1], tuple(steps[2:]))
    moved = 2 * n * x.dtype.itemsize + sum(meta.numel * meta.dtype.itemsize for _, meta, *_ in refs)
    return Plan((alloc,), (Launch(index_kernel, grid, args, Constants(constants), asserts=True),), Out(0), metas, bytes=moved)


_ADDABLE = (torch.float32, torch.float64, torch.int32, torch.int64)
"""Dtypes that are added to by atomics; 16-bit floats would be rounded at every addition."""


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _written(call: Call, preserve: bool) -> TensorMeta:
    """The tensor that is written: the first argument in place, else a copy, laid out alike or contiguous."""
    x = call.args[0]
    if parameters(call.op)[0].is_written:
        return x
    return x._replace(stride=preserved_strides(x) if preserve else contiguous_strides(x.shape))


def _put(call: Call, out: TensorMeta, loop: Loop, refs: Sequence[tuple[Arg, TensorMeta, int]], value: Any, number: Any, add: bool,
         wrap: bool) -> Plan:
    """A plan that writes at indices into ``out``, the first argument or a copy of it. ``loop.operands`` are the strides of
    ``out``, of the values (zeros without) and of the indices; ``refs`` hold each index and its dimension."""
    x = call.args[0]
    if add and x.dtype not in _ADDABLE:
        raise Decline(f"{dtype_name(x.dtype)} is not added to by atomics")
    if add and _deterministic():
        raise Decline("atomics, while deterministic algorithms are asked for")
    inplace = parameters(call.op)[0].is_written
    metas = {Arg(0): x, **{ref: meta for ref, meta, _ in refs}}
    if isinstance(value, Arg):
        meta = call.args[value.index]
        if meta.dtype != x.dtype:
            raise Decline(f"values of {dtype_name(meta.dtype)} for a tensor of {dtype_name(x.dtype)}")
        metas[value] = meta
    if out.may_overlap_itself:
        raise Decline("a tensor that overlaps itself")
    n = 1
    for s in loop.shape:
        n *= s
    launches: tuple[Launch, ...] = ()
    allocs: tuple[Alloc, ...] = ()
    written: Any = Arg(0)
    if not inplace:
        copied = build(call, same, [Operand(Arg(0), x, x.dtype, x.dtype)], [x.dtype], x.shape, out.stride)
        allocs, launches, written = copied.allocs, copied.launches, Out(0)
    if n:
        wide = max(n, x.extent) >= _WIDE
        rows, grid, sizes, steps, constants = _loop(call, loop, x.dtype.itemsize, wide)
        args = ((written,), (value,) if isinstance(value, Arg) else (), number, tuple(ref for ref, *_ in refs),
                tuple(Size(x.shape[d]) for *_, d in refs), tuple(stride(out.stride[d]) for *_, d in refs), rows, sizes, steps[0], steps[1],
                tuple(steps[2:]))
        given = Constants((("ADD", add), ("WRAP", wrap), ("COMPUTE", TRITON[opmath(x.dtype)]), *constants))
        launches += (Launch(put_kernel, grid, args, given, asserts=True),)
    disjoint = tuple(Disjoint(Arg(0), ref, x.extent * x.dtype.itemsize, m.extent * m.dtype.itemsize, False)
                     for ref, m in metas.items() if inplace and ref != Arg(0))
    moved = n * x.dtype.itemsize * 2 + (0 if inplace else 2 * x.numel * x.dtype.itemsize)
    return Plan(allocs, launches, written, metas, disjoint=disjoint, bytes=moved)


def _number(call: Call, index: int, x: TensorMeta) -> Num:
    return Num(index, "fp64" if x.dtype == torch.float64 else "fp32" if x.dtype.is_floating_point else "i64")


@planned(["aten.index_put.default", "aten.index_put_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(_deterministic,))
def index_put(call: Call) -> Plan:
    """``self[indices] = values`` or ``+= values``."""
    x, indices, values, accumulate = call.args
    out = _written(call, True)
    shape, own, refs = _advanced(out, indices, 1)
    if values.numel and broadcast_shape([shape, values.shape]) != shape:
        raise Decline("PyTorch rejects it: the values do not broadcast to the indices")
    loop = Loop(shape, (own, broadcast_strides(values, shape), *[s for *_, s in refs]))
    return _put(call, out, loop, [(r, m, d) for r, m, d, _ in refs], Arg(2), 1.0 if x.dtype.is_floating_point else 1, accumulate, True)


def _along(call: Call) -> tuple[TensorMeta, int, TensorMeta]:
    """self, dim and index of a scatter, checked."""
    x, dim, chosen = call.args[:3]
    if chosen.dtype not in _INDEX:
        raise Decline(f"an index of {dtype_name(chosen.dtype)}")
    if x.ndim != chosen.ndim or x.ndim == 0:
        raise Decline("a 0-dim tensor, or ranks that differ")
    dim = wrap_dim(dim, x.ndim)
    if any(i > n for d, (i, n) in enumerate(zip(chosen.shape, x.shape)) if d != dim):
        raise Decline("PyTorch rejects it: the index is larger than the tensor in another dimension than dim")
    return x, dim, chosen


def _scatter(call: Call, source: int | None, number: Any, add: bool) -> Plan:
    x, dim, chosen = _along(call)
    out = _written(call, False)
    own = tuple(0 if d == dim else s for d, s in enumerate(out.stride))
    zeros = (0,) * x.ndim
    if source is not None:
        src = call.args[source]
        if src.ndim != x.ndim or any(i > n for i, n in zip(chosen.shape, src.shape)):
            raise Decline("PyTorch rejects it: the index is larger than the source")
    loop = Loop(chosen.shape, (own, zeros if source is None else call.args[source].stride, chosen.stride))
    return _put(call, out, loop, [(Arg(2), chosen, dim)], None if source is None else Arg(source), number, add, False)


def _one(x: TensorMeta) -> float | int:
    return 1.0 if x.dtype.is_floating_point else 1


@planned(["aten.scatter.src", "aten.scatter_.src"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel, state=(_deterministic,))
def scatter_src(call: Call) -> Plan:
    """self, dim, index, src: ``self[index] = src`` along dim."""
    if _deterministic():
        raise Decline("which of several writes to one place wins is not determined")
    return _scatter(call, 3, _one(call.args[0]), False)


@planned(["aten.scatter.value", "aten.scatter_.value"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel)
def scatter_value(call: Call) -> Plan:
    """self, dim, index, value."""
    if not call.args[0].dtype.is_floating_point and not isinstance(call.args[3], (int, bool)):
        raise Decline("a fractional value for an integer tensor")
    return _scatter(call, None, _number(call, 3, call.args[0]), False)


@planned(["aten.scatter_add.default", "aten.scatter_add_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(_deterministic,))
def scatter_add(call: Call) -> Plan:
    """self, dim, index, src: ``self[index] += src`` along dim, by atomics."""
    return _scatter(call, 3, _one(call.args[0]), True)


@planned(["aten.scatter.reduce", "aten.scatter_.reduce"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(_deterministic,))
def scatter_reduce(call: Call) -> Plan:
    """``scatter_add`` under another name; products are left to PyTorch."""
    if call["reduce"] != "add":
        raise Decline(f"reduce={call['reduce']!r}")
    return _scatter(call, 3, _one(call.args[0]), True)


@planned(["aten.index_add.default", "aten.index_add_.default"], dtype(*ALL, arg="self"), family="indexing", kernel=put_kernel,
         state=(_deterministic,))
def index_add(call: Call) -> Plan:
    """self, dim, index, source, alpha: ``self[..., index, ...] += alpha * source``."""
    x, dim, chosen, source, _ = call.args
    if x.ndim == 0 or chosen.ndim > 1 or chosen.dtype not in _INDEX:
        raise Decline("a 0-dim tensor, or an index that is no vector of integers")
    dim = wrap_dim(dim, x.ndim)
    if source.ndim != x.ndim or any((chosen.numel if d == dim else n) != s for d, (n, s) in enumerate(zip(x.shape, source.shape))):
        raise Decline("PyTorch rejects it, or the source is 0-dim: its shape is not the tensor's with the index's length")
    out = _written(call, False)
    own = tuple(0 if d == dim else s for d, s in enumerate(out.stride))
    along = tuple((chosen.stride[0] if chosen.ndim else 0) if d == dim else 0 for d in range(x.ndim))
    loop = Loop(source.shape, (own, source.stride, along))
    return _put(call, out, loop, [(Arg(2), chosen, dim)], Arg(3), _number(call, 4, x), True, False)
