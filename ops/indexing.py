"""Indexing: embedding and its backward, index_select, gather.

Every index is checked on the device (``tl.device_assert``, as PyTorch's kernels do): an index out of range stops the
program instead of reading or writing elsewhere.

Source: ``torch.nn.functional.embedding``, ``torch.index_select``, ``torch.gather``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.movement import choose_rows, wrap_dim
from gemsmode.ops.pointwise import power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, opmath
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

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
