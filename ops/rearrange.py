"""Rearranging: rotations, scatters into views, pieces and blocks; cross products, renorm, complex parts, assertions.

What is one view copied into another is a plan of the pointwise engine's strided kernel, one launch a piece.

Source: the PyTorch documentation of each op; ``torch._chunk_cat`` as FSDP uses it: each tensor is padded with zeros to a
multiple of the number of chunks and split, and the pieces of one number stand side by side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.indexing import contiguous, copied
from gemsmode.ops.layout import broadcast_shape, broadcast_strides, is_dense, output_strides, preserved_strides
from gemsmode.ops.movement import read, same, wrap_dim
from gemsmode.ops.pointwise import _strided, build, convert, power_of_2
from gemsmode.ops.promotion import ALL, FLOAT, NUMERIC, TRITON, opmath
from gemsmode.plan import Alloc, Arg, At, Decline, Launch, Num, Out, Plan, Size, contiguous_strides
from gemsmode.predicates import dtype, dtype_name, where
from gemsmode.registry import planned, rule
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import current

_SUPPORTED = dtype(*ALL)


@planned("aten.rot90.default", _SUPPORTED, family="movement", kernel=same)
def rot90(call: Call) -> Plan:
    """A flip of one dimension or both, read through negative strides, and exchanged dimensions."""
    x, k, dims = call.args
    if len(dims) != 2 or x.ndim < 2:
        raise Decline("PyTorch rejects it: two dimensions are needed")
    a, b = (wrap_dim(d, x.ndim) for d in dims)
    if a == b:
        raise Decline("PyTorch rejects it: the dimensions are one")
    turns = k % 4
    strides, start = list(x.stride), 0
    for d in {0: (), 1: (b,), 2: (a, b), 3: (a,)}[turns]:
        start += max(x.shape[d] - 1, 0) * strides[d]
        strides[d] = -strides[d]
    shape, out_stride = list(x.shape), list(contiguous_strides(x.shape) if turns == 0 else preserved_strides(x))
    if turns % 2:
        for values in (strides, shape, out_stride):
            values[a], values[b] = values[b], values[a]
    view = TensorMeta(x.dtype, tuple(shape), tuple(strides), x.device)
    plan = build(call, same, [read(call, 0, view, start)], [x.dtype], tuple(shape), tuple(out_stride))
    return plan._replace(elementwise=False)


# -- scatters into views -----------------------------------------------------------------------------------------------


def _into_view(call: Call, shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> Plan:
    """A copy of self with the source written to the view of ``shape`` that begins ``start`` elements in."""
    x, src = call.args[:2]
    if src.shape != shape:
        raise Decline("PyTorch rejects it, or broadcasts: the source's shape is not that of the view")
    if src.dtype != x.dtype:
        raise Decline(f"a source of {dtype_name(src.dtype)}")
    if not is_dense(x.shape, x.stride):
        raise Decline("a tensor with gaps or overlaps, whose whole memory PyTorch copies")
    launches = (*copied(call.target, Arg(0), x, Out(0), x.stride, itemsize=x.dtype.itemsize),
                *copied(call.target, Arg(1), src, At(Out(0), start) if start else Out(0), strides, itemsize=x.dtype.itemsize))
    return Plan((Alloc(x.shape, x.stride, x.dtype),), launches, Out(0), {Arg(0): x, Arg(1): src},
                bytes=2 * (x.numel + src.numel) * x.dtype.itemsize)


@planned("aten.diagonal_scatter.default", _SUPPORTED, family="movement", kernel=same)
def diagonal_scatter(call: Call) -> Plan:
    """self, src, offset, dim1, dim2: the source becomes a diagonal, which is the last dimension of src."""
    x, _, offset, first, second = call.args
    if x.ndim < 2:
        raise Decline("PyTorch rejects it: two dimensions are needed")
    a, b = wrap_dim(first, x.ndim), wrap_dim(second, x.ndim)
    if a == b:
        raise Decline("PyTorch rejects it: the dimensions are one")
    length = max(min(x.shape[a] + min(offset, 0), x.shape[b] - max(offset, 0)), 0)
    rest = [d for d in range(x.ndim) if d not in (a, b)]
    shape = (*[x.shape[d] for d in rest], length)
    strides = (*[x.stride[d] for d in rest], x.stride[a] + x.stride[b])
    start = (max(offset, 0) * x.stride[b] + max(-offset, 0) * x.stride[a]) if length else 0
    return _into_view(call, shape, strides, start)


@planned("aten.as_strided_scatter.default", _SUPPORTED, family="movement", kernel=same)
def as_strided_scatter(call: Call) -> Plan:
    """self, src, size, stride: the source becomes a view of self's memory."""
    x, _, size, strides, offset = call.args
    if offset is not None:
        raise Decline("an offset within the storage, of which self's own is not known")
    view = TensorMeta(x.dtype, tuple(size), tuple(strides), x.device)
    if len(size) != len(strides) or any(s < 0 for s in (*size, *strides)) or view.extent > x.extent:
        raise Decline("PyTorch rejects it, or a view that reaches beyond self")
    if view.may_overlap_itself:
        raise Decline("a view that overlaps itself")
    return _into_view(call, view.shape, view.stride, 0)


# -- pieces and blocks -------------------------------------------------------------------------------------------------


@planned("aten.split_with_sizes_copy.default", _SUPPORTED, family="movement", kernel=same)
def split_with_sizes_copy(call: Call) -> Plan:
    """self, split_sizes, dim -> contiguous copies of the pieces."""
    x, sizes, dim = call.args
    if x.ndim == 0:
        raise Decline("PyTorch rejects it: a 0-dim tensor has no pieces")
    dim = wrap_dim(dim, x.ndim)
    if sum(sizes) != x.shape[dim] or any(s < 0 for s in sizes):
        raise Decline("PyTorch rejects it: the sizes do not add up")
    allocs: list[Alloc] = []
    launches: list[Launch] = []
    start = 0
    for i, size in enumerate(sizes):
        shape = (*x.shape[:dim], size, *x.shape[dim + 1:])
        allocs.append(Alloc(shape, contiguous_strides(shape), x.dtype))
        piece = TensorMeta(x.dtype, shape, x.stride, x.device)
        launches += copied(call.target, At(Arg(0), start * x.stride[dim]) if start else Arg(0), piece, Out(i), allocs[-1].stride,
                           itemsize=x.dtype.itemsize)
        start += size
    return Plan(tuple(allocs), tuple(launches), [Out(i) for i in range(len(sizes))], {Arg(0): x}, bytes=2 * x.numel * x.dtype.itemsize)


@planned("aten.block_diag.default", _SUPPORTED, family="movement", kernel=same)
def block_diag(call: Call) -> Plan:
    """Matrices (vectors are rows, 0-dim tensors single elements) along the diagonal of a matrix of zeros."""
    tensors = call.args[0]
    if not tensors or any(t.ndim > 2 for t in tensors) or len(tensors) > 64:
        raise Decline("PyTorch rejects it, or more than 64 blocks")
    kind = tensors[0].dtype
    for t in tensors:
        kind = torch.promote_types(kind, t.dtype)
    blocks = [TensorMeta(t.dtype, (*(1,) * (2 - t.ndim), *t.shape), (*(0,) * (2 - t.ndim), *t.stride), t.device) for t in tensors]
    shape = (sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks))
    out = Alloc(shape, contiguous_strides(shape), kind, zero=True)
    launches: tuple[Launch, ...] = ()
    row = column = 0
    for i, piece in enumerate(blocks):
        at = row * shape[1] + column
        launches += copied(call.target, Arg(0, i), piece, At(Out(0), at) if at else Out(0), out.stride)
        row, column = row + piece.shape[0], column + piece.shape[1]
    return Plan((out,), launches, Out(0), {Arg(0, i): t for i, t in enumerate(tensors)},
                bytes=out.meta.numel * kind.itemsize + sum(2 * t.numel * t.dtype.itemsize for t in tensors))


@planned("aten._chunk_cat.default", _SUPPORTED, family="movement", kernel=same)
def chunk_cat(call: Call) -> Plan:
    """tensors, dim, num_chunks -> [*leading, num_chunks, what belongs to a chunk of each tensor, side by side]."""
    tensors, dim, chunks = call.args
    if not tensors or chunks < 1 or len(tensors) > 64:
        raise Decline("PyTorch rejects it, or more than 64 tensors")
    first = tensors[0]
    dim = wrap_dim(dim, first.ndim)
    if any(t.dtype != first.dtype or t.ndim <= dim or t.shape[:dim] != first.shape[:dim] or t.numel == 0 for t in tensors):
        raise Decline("PyTorch rejects it, or tensors that are empty")
    widths = [-(-t.shape[dim] // chunks) * math.prod(t.shape[dim + 1:]) for t in tensors]
    lead = first.shape[:dim]
    shape = (*lead, chunks, sum(widths))
    out = Alloc(shape, contiguous_strides(shape), first.dtype, zero=True)
    launches: tuple[Launch, ...] = ()
    begin = 0
    for i, (t, width) in enumerate(zip(tensors, widths)):
        each = -(-t.shape[dim] // chunks)
        full, rest = divmod(t.shape[dim], each)
        trail = t.shape[dim + 1:]
        inner = contiguous_strides(trail)
        row = math.prod(trail)
        for count, size, chunk in ((full, each, 0), (1, rest, full)):
            if count * size == 0:
                continue
            view = TensorMeta(t.dtype, (*lead, count, size, *trail), (*t.stride[:dim], each * t.stride[dim], *t.stride[dim:]), t.device)
            at, source = begin + chunk * shape[-1], chunk * each * t.stride[dim]
            launches += copied(call.target, At(Arg(0, i), source) if source else Arg(0, i), view, At(Out(0), at) if at else Out(0),
                               (*out.stride[:dim + 1], row, *inner))
        begin += width
    return Plan((out,), launches, Out(0), {Arg(0, i): t for i, t in enumerate(tensors)},
                bytes=out.meta.numel * first.dtype.itemsize * 2)


# -- arithmetic --------------------------------------------------------------------------------------------------------


@triton.jit
def cross_product(a0, a1, a2, b0, b1, b2):
    return a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


@planned("aten.linalg_cross.default", dtype(*NUMERIC), family="pointwise", kernel=cross_product)
def linalg_cross(call: Call) -> Plan:
    """self, other (broadcast together), dim of size 3 -> their cross product."""
    x, y, dim = call.args
    if x.ndim != y.ndim or x.dtype != y.dtype:
        raise Decline("PyTorch rejects it, or operands of two dtypes")
    shape = broadcast_shape([x.shape, y.shape])
    dim = wrap_dim(dim, len(shape))
    if not shape or x.shape[dim] != 3 or y.shape[dim] != 3:
        raise Decline("PyTorch rejects it: the dimension's size is not 3")
    out = Alloc(shape, contiguous_strides(shape), x.dtype)
    rest = shape[:dim] + shape[dim + 1:]
    n = math.prod(rest)
    metas = {Arg(0): x, Arg(1): y}
    if n == 0:
        return Plan((out,), (), Out(0), metas, bytes=0)
    ins, seen = [], []
    for i, t in enumerate((x, y)):
        strides = broadcast_strides(t, shape)
        view = TensorMeta(t.dtype, rest, strides[:dim] + strides[dim + 1:], t.device)
        for k in range(3):
            ins.append(At(Arg(i), k * strides[dim]) if k else Arg(i))
            seen.append(view)
    outs = tuple(At(Out(0), k * out.stride[dim]) if k else Out(0) for k in range(3))
    kinds = ((0, x.dtype, opmath(x.dtype)),) * 6
    launch = _strided(call.target, cross_product, kinds, outs, tuple(ins), [out.stride[:dim] + out.stride[dim + 1:]] * 3, seen, rest, n, 8)
    return Plan((out,), (launch,), Out(0), metas, bytes=9 * n * x.dtype.itemsize)


@triton.jit
def masked_scale(self, mask, scale):
    return self * mask * scale


@planned("aten._masked_scale.default", [dtype(*FLOAT, arg="self")], family="pointwise", kernel=masked_scale)
def masked_scale_(call: Call) -> Plan:
    """self * mask * scale, of a mask of bytes: the backward of a fused dropout."""
    x, mask, _ = call.args
    if mask.dtype not in (torch.uint8, torch.bool) or mask.shape != x.shape:
        raise Decline("a mask that is not of bytes or of another shape")
    inner = opmath(x.dtype)
    if not x.is_contiguous or not mask.is_contiguous:
        raise Decline("a tensor or mask that is not contiguous")
    kinds = ((0, x.dtype, inner), (0, mask.dtype, inner), (1, inner, inner))
    out = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    if x.numel == 0:
        return Plan((out,), (), Out(0), {}, bytes=0)
    number = Num(2, "fp64" if inner == torch.float64 else "fp32")
    launch = _strided(call.target, masked_scale, kinds, (Out(0),), (Arg(0), Arg(1), number), [out.stride], [x, mask], x.shape, x.numel, 8)
    return Plan((out,), (launch,), Out(0), {Arg(0): x, Arg(1): mask}, bytes=x.numel * (2 * x.dtype.itemsize + 1))


@triton.jit
def renorm_kernel(p_out, p_x, p, max_norm, n, width, outer_stride, NORM: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Slice i is ``width`` elements of each of n / width rows; it is scaled down to ``max_norm`` if its norm is greater. Grid: slices."""
    start = tl.program_id(0).to(tl.int64) * width
    total = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b = tl.abs(tl.load(p_x + start + (o // width).to(tl.int64) * outer_stride + o % width, mask=o < n, other=0.0).to(COMPUTE))
        if NORM == 1:
            total += b
        elif NORM == 2:
            total += b * b
        else:
            total += tl.where(b > 0, tl.exp(tl.log(tl.where(b > 0, b, 1.0)) * tl.cast(p, COMPUTE)), 0.0)
    norm = tl.sum(total, 0)
    if NORM == 2:
        norm = tl.sqrt(norm)
    elif NORM != 1:
        norm = tl.exp(tl.log(norm) / tl.cast(p, COMPUTE))
    limit = tl.cast(max_norm, COMPUTE)
    scale = tl.where(norm > limit, limit / (norm + 1e-7), 1.0)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        place = start + (o // width).to(tl.int64) * outer_stride + o % width
        b = tl.load(p_x + place, mask=o < n, other=0.0).to(COMPUTE)
        tl.store(p_out + place, convert(b * scale, p_out.dtype.element_ty), mask=o < n)


@planned("aten.renorm.default", dtype(*FLOAT), family="reduction", kernel=renorm_kernel, by_value=("p", "maxnorm"))
def renorm(call: Call) -> Plan:
    """self, p, dim, maxnorm: slices along dim whose p-norm is above maxnorm are scaled down to it."""
    x, p, dim, limit = call.args
    if x.ndim < 2 or isinstance(p, complex) or isinstance(limit, complex) or p <= 0 or limit < 0 or not math.isfinite(p):
        raise Decline("PyTorch rejects it, or a norm that is not finite and positive")
    dim = wrap_dim(dim, x.ndim)
    out = Alloc(x.shape, contiguous_strides(x.shape), x.dtype)
    if x.numel == 0:
        return Plan((out,), (), Out(0), {}, bytes=0)
    source, copies, copying = contiguous(call, 0, 1)
    width = math.prod(x.shape[dim + 1:])
    n = x.numel // x.shape[dim]
    compute = opmath(x.dtype)
    kind = "fp64" if compute == torch.float64 else "fp32"
    block = min(power_of_2(n), 1 << 16 if call.target.interpreted else 1024)
    constants = Constants((("NORM", p if p in (1, 2) else 0), ("COMPUTE", TRITON[compute]), ("BLOCK", block)))
    args = (Out(0), source, Num(1, kind), Num(3, kind), Size(n), Size(width), Size(width * x.shape[dim]))
    return Plan((out, *copies), (*copying, Launch(renorm_kernel, (x.shape[dim], 1, 1), args, constants)), Out(0), {Arg(0): x},
                bytes=3 * x.numel * x.dtype.itemsize)


# -- assertions --------------------------------------------------------------------------------------------------------


@triton.jit
def assert_kernel(p):
    """Grid: one program."""
    tl.device_assert(tl.load(p) != 0, "Expected Tensor with single nonzero value, but got zero")


def _asserted(x: TensorMeta) -> Launch:
    if x.numel != 1:
        raise Decline("PyTorch rejects it: not a single value")
    return Launch(assert_kernel, (1, 1, 1), (Arg(0),), Constants(()), 1, asserts=True)


@planned(["aten._assert_async.default", "aten._assert_async.msg"], _SUPPORTED, family="creation", kernel=assert_kernel)
def assert_async(call: Call) -> Plan:
    """The device stops if the single value is zero; ``assert_msg`` is not shown there."""
    return Plan((), (_asserted(call.args[0]),), None, {Arg(0): call.args[0]})


@planned("aten._functional_assert_async.msg", [dtype(*ALL, arg="self"), dtype(*ALL, arg="dep_token")], family="creation",
         kernel=assert_kernel)
def functional_assert_async(call: Call) -> Plan:
    """``_assert_async``, and a copy of ``dep_token``."""
    x, _, token = call.args
    strides = preserved_strides(token)
    return Plan((Alloc(token.shape, strides, token.dtype),), (_asserted(x), *copied(call.target, Arg(2), token, Out(0), strides)), Out(0),
                {Arg(0): x, Arg(2): token})


# -- complex results: kernels see their parts --------------------------------------------------------------------------


@triton.jit
def polar_kernel(p_out, p_length, p_angle, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = (length[i] cos angle[i], length[i] sin angle[i]). Grid: blocks."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    length, angle = tl.load(p_length + o, mask=m).to(COMPUTE), tl.load(p_angle + o, mask=m).to(COMPUTE)
    both = tl.interleave(length * tl.cos(angle), length * tl.sin(angle))
    o_out = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(p_out + o_out, both.to(p_out.dtype.element_ty), mask=o_out < 2 * n)


@triton.jit
def conjugate_kernel(p_out, p_x, n, BLOCK: tl.constexpr):
    """Pairs of numbers, the second of each negated; n numbers. Grid: blocks."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_x + o, mask=o < n)
    tl.store(p_out + o, tl.where(o % 2 == 1, -b, b), mask=o < n)


def _block(n: int) -> int:
    return min(power_of_2(n), 1 << 16 if current().interpreted else 1024)


_same_floats = where("abs and angle of one dtype, float32 or float64",
                     lambda call: call.args[0].dtype == call.args[1].dtype and call.args[0].dtype in (torch.float32, torch.float64))


@rule("aten.polar.default", _same_floats, family="pointwise", priority=-100)
def polar(abs: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Lengths and angles, broadcast together -> complex numbers."""
    shape = broadcast_shape([tuple(abs.shape), tuple(angle.shape)])
    strides = output_strides(shape, [TensorMeta.of(abs), TensorMeta.of(angle)])
    out = torch.empty_strided(shape, strides, dtype=torch.complex64 if abs.dtype == torch.float32 else torch.complex128, device=abs.device)
    n = out.numel()
    if n:
        def ordered(t: torch.Tensor) -> torch.Tensor:
            # In the order of the result's memory.
            return t if t.shape == out.shape and t.stride() == strides else torch.empty_strided(
                shape, strides, dtype=t.dtype, device=t.device).copy_(t.expand(shape))

        parts = [ordered(abs), ordered(angle)]
        block = _block(n)
        polar_kernel[(triton.cdiv(n, block),)](torch.view_as_real(out), *parts, n, COMPUTE=TRITON[abs.dtype], BLOCK=block)
    return out


@rule("aten._conj_copy.default", dtype(torch.complex64, torch.complex128), family="pointwise", priority=-100)
def conj_copy(self: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with negated imaginary parts."""
    out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
    n = 2 * out.numel()
    if n:
        parts = torch.view_as_real(self.resolve_conj().contiguous())
        conjugate_kernel[(triton.cdiv(n, _block(n)),)](torch.view_as_real(out), parts, n, BLOCK=_block(n))
    return out
