"""The pointwise engine: one kernel for every elementwise op, with the scalar function as its parameter.

An op is one declaration: its aten name, how its types promote, and a function of loaded blocks whose parameters carry
the names of the op's own arguments::

    @pointwise("aten.sigmoid.default", kind=INT_TO_FLOAT)
    @triton.jit
    def sigmoid(self):
        return 1 / (1 + tl.exp(-self))

Any argument may be a tensor or a Python number; in-place, ``out=`` and scalar overloads are derived. The plan sorts
and merges dimensions as PyTorch's ``TensorIterator`` does and picks the flat kernel (all operands dense in one order),
the tiled one (broadcast and transposed operands, coalesced both ways through a two-dimensional tile) or the indexed
one (short inner dimensions).

Every function computes in float32 for 16-bit floats (``compute="result"`` keeps the dtype).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gemsmode.launch import Constants
from gemsmode.ops.layout import Loops, broadcast_shape, broadcast_strides, is_dense, merge, output_strides
from gemsmode.ops.promotion import ALL, TRITON, opmath, result_type
from gemsmode.plan import Alloc, Arg, At, Decline, Into, Launch, Num, Out, Plan, Size, contiguous_strides, extent, stride
from gemsmode.predicates import Predicate, dtype_name
from gemsmode.registry import find_op, planned
from gemsmode.signature import Call, TensorMeta, parameters
from gemsmode.target import Target

# -- the kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def offset(where, strides):
    """Offsets of an operand: `where` holds block indices per dimension; no strides means dense."""
    if len(strides) == 0:
        return where[0]
    else:
        o = where[0] * strides[0]
        for d in tl.static_range(1, len(strides)):
            o = o + where[d] * strides[d]
        return o


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """``x`` in DTYPE. Integers and float64 reach bfloat16 by way of float32, as in PyTorch; the interpreter knows no direct way."""
    if DTYPE == tl.bfloat16 and (not x.dtype.is_floating() or x.dtype == tl.float64):
        return x.to(tl.float32).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def _operand(p, where, strides, mask, HOW: tl.constexpr, I: tl.constexpr):
    """A block of operand I, in the dtype that the function computes in. HOW[I]: (kind, common, compute dtype)."""
    if HOW[I][0] == 1:  # a number; as a block, because the interpreter mistypes comparisons of scalars
        return tl.broadcast_to(tl.cast(p, HOW[I][1]).to(HOW[I][2]), mask.shape)
    elif HOW[I][0] == 2:  # an index
        return offset(where, strides).to(HOW[I][2])
    else:
        return convert(tl.load(p + offset(where, strides), mask=mask), HOW[I][1]).to(HOW[I][2])


@triton.jit
def _apply(FN: tl.constexpr, ins, where, strides, mask, HOW: tl.constexpr):
    b0 = _operand(ins[0], where, strides[0], mask, HOW, 0)
    if len(ins) == 1:
        return FN(b0)
    else:
        b1 = _operand(ins[1], where, strides[1], mask, HOW, 1)
        if len(ins) == 2:
            return FN(b0, b1)
        else:
            b2 = _operand(ins[2], where, strides[2], mask, HOW, 2)
            if len(ins) == 3:
                return FN(b0, b1, b2)
            else:
                b3 = _operand(ins[3], where, strides[3], mask, HOW, 3)
                if len(ins) == 4:
                    return FN(b0, b1, b2, b3)
                else:
                    b4 = _operand(ins[4], where, strides[4], mask, HOW, 4)
                    if len(ins) == 5:
                        return FN(b0, b1, b2, b3, b4)
                    else:
                        b5 = _operand(ins[5], where, strides[5], mask, HOW, 5)
                        return FN(b0, b1, b2, b3, b4, b5)


@triton.jit
def _store(p, where, strides, value, mask):
    o = offset(where, strides)
    tl.store(p + o, convert(tl.broadcast_to(value, mask.shape), p.dtype.element_ty), mask=mask)


@triton.jit
def _finish(outs, where, strides, result, mask):
    if len(outs) == 1:
        _store(outs[0], where, strides[0], result, mask)
    else:
        for i in tl.static_range(len(outs)):
            _store(outs[i], where, strides[i], result[i], mask)


@triton.jit
def flat_kernel(outs, ins, n, no_strides, FN: tl.constexpr, HOW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """All operands dense in one order. Grid: programs over n elements."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    _finish(outs, (o,), no_strides, _apply(FN, ins, (o,), no_strides, m, HOW), m)


@triton.jit
def tiled_kernel(outs, ins, nx, ny, batch, out_strides, in_strides, FN: tl.constexpr, HOW: tl.constexpr,
                 WIDE: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Two-dimensional tiles over the dimensions x and y; each program takes one tile of one batch index."""
    i_rest = tl.program_id(0)
    tiles_x = tl.cdiv(nx, BLOCK_X)
    tiles_y = tl.cdiv(ny, BLOCK_Y)
    i_x = i_rest % tiles_x
    i_rest = i_rest // tiles_x
    i_y = i_rest % tiles_y
    i_rest = i_rest // tiles_y
    if WIDE:
        i_x = i_x.to(tl.int64)
        i_y = i_y.to(tl.int64)
        i_rest = i_rest.to(tl.int64)
    x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    y = (i_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    m = (x < nx) & (y < ny)  # [BLOCK_Y, BLOCK_X]
    if len(batch) == 0:
        where = (x, y)
    elif len(batch) == 1:
        where = (x, y, i_rest)
    elif len(batch) == 2:
        where = (x, y, i_rest % batch[0], i_rest // batch[0])
    elif len(batch) == 3:
        i_2 = i_rest // batch[0]
        where = (x, y, i_rest % batch[0], i_2 % batch[1], i_2 // batch[1])
    else:
        i_2 = i_rest // batch[0]
        i_3 = i_2 // batch[1]
        where = (x, y, i_rest % batch[0], i_2 % batch[1], i_3 % batch[2], i_3 // batch[2])
    _finish(outs, where, out_strides, _apply(FN, ins, where, in_strides, m, HOW), m)


@triton.jit
def indexed_kernel(outs, ins, n, sizes, out_strides, in_strides, FN: tl.constexpr, HOW: tl.constexpr,
                   WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Each element's index is taken apart into dimensions. Grid: programs over n elements."""
    i_block = tl.program_id(0)
    if WIDE:
        i_block = i_block.to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    if len(sizes) == 1:
        where = (o,)
    elif len(sizes) == 2:
        where = (o % sizes[0], o // sizes[0])
    elif len(sizes) == 3:
        o_1 = o // sizes[0]
        where = (o % sizes[0], o_1 % sizes[1], o_1 // sizes[1])
    elif len(sizes) == 4:
        o_1 = o // sizes[0]
        o_2 = o_1 // sizes[1]
        where = (o % sizes[0], o_1 % sizes[1], o_2 % sizes[2], o_2 // sizes[2])
    elif len(sizes) == 5:
        o_1 = o // sizes[0]
        o_2 = o_1 // sizes[1]
        o_3 = o_2 // sizes[2]
        where = (o % sizes[0], o_1 % sizes[1], o_2 % sizes[2], o_3 % sizes[3], o_3 // sizes[3])
    else:
        o_1 = o // sizes[0]
        o_2 = o_1 // sizes[1]
        o_3 = o_2 // sizes[2]
        o_4 = o_3 // sizes[3]
        where = (o % sizes[0], o_1 % sizes[1], o_2 % sizes[2], o_3 % sizes[3], o_4 % sizes[4], o_4 // sizes[4])
    _finish(outs, where, out_strides, _apply(FN, ins, where, in_strides, m, HOW), m)


MAX_DIMS = 6
"""Dimensions left after merging that the kernels can take."""


# -- launch choice -----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A program's share: ``x`` by ``y`` elements (``y`` is 1 for the one-dimensional kernels), and its warps."""

    x: int
    y: int = 1
    warps: int = 4


_INTERPRETED_BLOCK = 1 << 16  # a program costs 0.3 ms in the interpreter, whatever its size
_SQUARE = 64 * 64
_BYTES_PER_THREAD = 32  # of the widest operand: two 16-byte accesses in flight


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def choose_flat(n: int, itemsize: int, target: Target) -> Tile:
    """The block of the one-dimensional kernels for ``n`` elements, the widest of ``itemsize`` bytes."""
    if target.interpreted:
        return Tile(min(power_of_2(n), _INTERPRETED_BLOCK))
    block = 128 * max(_BYTES_PER_THREAD // itemsize, 1)
    # Smaller blocks while the device would not be filled twice over.
    if n < block * target.multiprocessors * 2:
        block //= 4
    return Tile(block)


def choose_tile(nx: int, ny: int, transposed: bool, itemsize: int, target: Target) -> Tile:
    """The tile of the two-dimensional kernel. Transposed operands want it square: 64 by 64 keeps both ways coalesced; a side
    that is short by itself leaves its elements to the other."""
    if target.interpreted:
        x = min(power_of_2(nx), 1024)
        return Tile(x, min(power_of_2(ny), _INTERPRETED_BLOCK // x))
    if transposed:
        x, y = min(64, power_of_2(nx)), min(64, power_of_2(ny))
        x, y = min(power_of_2(nx), _SQUARE // y), min(power_of_2(ny), _SQUARE // x)
        return Tile(x, y, 8 if x * y == _SQUARE else 4)
    budget = 128 * max(_BYTES_PER_THREAD // itemsize, 1)
    x = min(power_of_2(nx), budget)
    return Tile(x, max(min(power_of_2(ny), budget // x), 1))


# -- plans -------------------------------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """One argument of the scalar function.

    Attributes:
        ref: where it comes from; None for an index.
        meta: a tensor's metadata (of a view of it, if the op reads it through one); None for a number. For an index,
            the shape is the results' and the value at an element is the sum of its indices times ``meta.stride``.
        common: the dtype it is converted to first, as promotion says.
            (``compute``, for a number that keeps its precision).
        compute: the dtype in which the function sees it.
    """

    ref: Arg | At | Num | None
    meta: TensorMeta | None
    common: torch.dtype
    compute: torch.dtype

    @property
    def kind(self) -> int:
        return 1 if self.meta is None else 2 if self.ref is None else 0


def index_operand(shape: tuple[int, ...], weights: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Operand:
    """An operand whose value is each element's own position: the sum over dimensions of index times weight."""
    return Operand(None, TensorMeta(dtype, shape, weights, torch.device("meta")), dtype, dtype)


def as_operand(call: Call, index: int, common: torch.dtype, compute: torch.dtype | None = None, round_number: bool = False) -> Operand:
    """The op's argument number ``index`` as an operand; a 0-dim CPU tensor beside GPU tensors is read as a number.

    A number keeps the precision of ``compute``, unless ``round_number`` says that PyTorch converts it to ``common`` first.
    """
    compute = opmath(common) if compute is None else compute
    value = call.args[index]
    is_tensor = value.__class__ is TensorMeta
    if is_tensor and (value.device.type == call.target.device_type or value.shape):
        return Operand(Arg(index), value, common, compute)
    if compute.is_floating_point:
        kind = "fp64" if compute == torch.float64 else "fp32"
    else:
        kind = "i64"
    # A fractional number among integers is cut off, as PyTorch casts it.
    to_read = is_tensor or (value.__class__ is float and kind == "i64")
    return Operand(Num(index, kind, None, to_read), None, common if round_number else compute, compute)


LIMITS = {d: (-torch.iinfo(d).max if d == torch.uint8 else torch.iinfo(d).min, torch.iinfo(d).max)
           for d in (torch.uint8, torch.int8, torch.int16, torch.int32)}
"""What PyTorch lets an integer be that it converts to a narrow dtype; negative numbers wrap in uint8."""


def _within_limits(operand: Operand, dtype: torch.dtype, sign: int) -> Operand:
    assert isinstance(operand.ref, Num)
    least, most = LIMITS[dtype]
    return operand._replace(ref=operand.ref._replace(limits=(least, most) if sign > 0 else (-most, -least)))


@functools.cache
def _how(kinds: tuple[tuple[int, torch.dtype, torch.dtype], ...]) -> tuple[Any, ...]:
    return tuple((kind, TRITON[common], TRITON[compute]) for kind, common, compute in kinds)


_made: dict[tuple[Any, ...], Constants] = {}


def _constants(function: Any, kinds: tuple[tuple[int, torch.dtype, torch.dtype], ...],
               rest: tuple[tuple[str, Any], ...]) -> Constants:
    # By its id, which stays its own as long as the constants are kept: Triton hashes a function by its source.
    key = id(function), kinds, rest
    constants = _made.get(key)
    if constants is None:
        constants = _made[key] = Constants((("FN", function), ("HOW", _how(kinds)), *rest))
    return constants


def like_input(call: Call) -> tuple[int, ...] | None:
    """For ``out_stride`` of ops whose result is made by ``empty_like`` of the first argument: its strides, if it is dense."""
    meta = call.args[0]
    return meta.stride if is_dense(meta.shape, meta.stride) or meta.numel == 0 else None


def build(call: Call, function: Any, operands: Sequence[Operand], out_dtypes: Sequence[torch.dtype],
          shape: tuple[int, ...] | None = None, out_stride: tuple[int, ...] | None = None, flops: int = 1,
          has_number: bool | None = None) -> Plan:
    """The plan of one elementwise kernel.

    Args:
        function: the ``@triton.jit`` scalar function, called with one block an operand.
        operands: its arguments in order, at most six.
        out_dtypes: a dtype for each result.
        shape: the results' shape; defaults to the broadcast of the operands'.
        out_stride: strides for new results; defaults to PyTorch's choice for elementwise ops.
        flops: floating-point operations an element, for reports.
        has_number: a number stands among the operands of PyTorch's ``TensorIterator`` (``x + 2``; not the ``alpha`` of
            ``add``), which has a say in the results' strides; by default, if any operand is a number.
    """
    tensors = [o.meta for o in operands if o.meta is not None]
    if has_number is None:
        has_number = len(tensors) < len(operands)
    return _build(call, _typed(function, operands, out_dtypes, flops), tensors, shape, out_stride, has_number)


class Typed(NamedTuple):
    """What of a plan depends on dtypes alone.

    Attributes:
        function: the scalar function.
        kinds: of each operand its kind, the dtype that it is converted to, and the one computed in.
        ins: the operands as the kernel's argument.
        refs: of each operand that is no number the argument that it is; None for an index.
        out_dtypes: a dtype for each new result.
        flops: floating-point operations an element.
    """

    function: Any
    kinds: tuple[tuple[int, torch.dtype, torch.dtype], ...]
    ins: tuple[Any, ...]
    refs: tuple[Arg | None, ...]
    out_dtypes: tuple[torch.dtype, ...]
    flops: int


def _typed(function: Any, operands: Sequence[Operand], out_dtypes: Sequence[torch.dtype], flops: int) -> Typed:
    refs: list[Any] = []
    for o in operands:
        if o.meta is not None:
            if o.meta.dtype not in TRITON:
                raise Decline(f"{dtype_name(o.meta.dtype)} is not handled by pointwise kernels")
            refs.append(o.ref.ref if o.ref.__class__ is At else o.ref)
    return Typed(function, tuple([(o.kind, o.common, o.compute) for o in operands]),
                 tuple([() if o.ref is None else o.ref for o in operands]), tuple(refs), tuple(out_dtypes), flops)


def _build(call: Call, typed: Typed, tensors: Sequence[TensorMeta], shape: tuple[int, ...] | None,
           out_stride: tuple[int, ...] | None, has_number: bool) -> Plan:
    """:func:`build` for ``tensors``, the operands that are no numbers."""
    alike = bool(tensors)
    if alike:
        _, own_shape, own_stride, _ = first = tensors[0]
        for meta in tensors:
            if meta.shape != own_shape or meta.stride != own_stride:
                alike = False
                break
    if shape is None:
        shape = own_shape if alike else broadcast_shape([m.shape for m in tensors])
    elif alike:
        alike = shape == own_shape
    expanded = [own_stride] * len(tensors) if alike else [broadcast_strides(m, shape) for m in tensors]
    n = 1
    for size in shape:
        n *= size
    flat = False
    if call.outs is not None:
        allocs: tuple[Alloc, ...] = ()
        outs: tuple[Any, ...] = tuple([Into(i) for i in range(len(call.outs))])
        out_metas: Sequence[Any] = call.outs
        if alike or not tensors:
            own = own_stride if alike else out_metas[0].stride
            flat = all([m.stride == own and m.shape == shape for m in out_metas]) and is_dense(shape, own)
    else:
        if out_stride is None:
            dense = contiguous_strides(shape)
            if alike and (shape or not has_number) and (own_stride == dense or first.is_contiguous):
                out_stride, flat = dense, True
            else:
                out_stride = output_strides(shape, tensors, has_number, expanded)
        allocs = tuple([Alloc(shape, out_stride, d) for d in typed.out_dtypes])
        outs = tuple([Out(i) for i in range(len(allocs))])
        out_metas = allocs
        flat = flat or ((own_stride == out_stride if alike else not tensors) and is_dense(shape, out_stride))
    moved, itemsize = 0, 1
    for out in out_metas:
        size = out.dtype.itemsize
        itemsize = max(itemsize, size)
        moved += n * size
    metas: dict[Any, TensorMeta] = {}
    for ref, meta in zip(typed.refs, tensors):
        if ref is not None:
            size = meta.dtype.itemsize
            itemsize = max(itemsize, size)
            moved += (n if alike else meta.numel) * size
            metas[ref] = meta
    launches: tuple[Launch, ...] = ()
    if n:
        function, kinds, ins = typed.function, typed.kinds, typed.ins
        if flat:
            launches = (_flat(call.target, function, kinds, outs, ins, n, itemsize),)
        else:
            steps = [*[m.stride for m in out_metas], *expanded]
            launches = (_merged(call.target, function, kinds, outs, ins, steps, shape, n, itemsize),)
    return Plan(allocs, launches, outs[0] if len(outs) == 1 else outs, metas, True, (), moved, n * typed.flops)


def _flat(target: Target, function: Any, kinds: Any, outs: tuple[Any, ...], ins: tuple[Any, ...], n: int, itemsize: int) -> Launch:
    tile = choose_flat(n, itemsize, target)
    no_strides = ((),) * max(len(ins), len(outs))
    rest = (("WIDE", n >= _WIDE), ("BLOCK", tile.x))
    return Launch(flat_kernel, (-(-n // tile.x), 1, 1), (outs, ins, extent(n), no_strides),
                  _constants(function, kinds, rest), tile.warps)


_WIDE = 2**31 - 2**17  # the last block of a 32-bit range may reach past it


def _last(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The offset of the last element."""
    return sum([(size - 1) * step for size, step in zip(shape, strides)])


def _strided(target: Target, function: Any, kinds: Any, outs: tuple[Any, ...], ins: tuple[Any, ...],
             out_strides: list[tuple[int, ...]], tensors: Sequence[TensorMeta], shape: tuple[int, ...], n: int, itemsize: int) -> Launch:
    expanded = out_strides + [broadcast_strides(m, shape) for m in tensors]
    return _merged(target, function, kinds, outs, ins, expanded, shape, n, itemsize)


def _merged(target: Target, function: Any, kinds: Any, outs: tuple[Any, ...], ins: tuple[Any, ...],
            expanded: list[tuple[int, ...]], shape: tuple[int, ...], n: int, itemsize: int) -> Launch:
    loops = merge(shape, expanded)
    if loops.is_flat:
        return _flat(target, function, kinds, outs, ins, n, itemsize)
    sizes = loops.sizes
    wide = n >= _WIDE or any([_last(sizes, s) >= _WIDE for s in loops.strides])
    if len(sizes) > MAX_DIMS:
        raise Decline(f"{len(sizes)} dimensions are left after merging; at most {MAX_DIMS} are handled")
    count = len(outs)
    y = _other_axis(loops)
    transposed = any([s[y] == 1 and s[0] > 1 for s in loops.strides]) if y else False
    if y and (sizes[0] >= 16 or transposed):
        tile = choose_tile(sizes[0], sizes[y], transposed, itemsize, target)
        rest = [d for d in range(1, len(sizes)) if d != y]
        programs = -(-sizes[0] // tile.x) * -(-sizes[y] // tile.y)
        for d in rest:
            programs *= sizes[d]
        # Two short sides make programs of too few elements. In the interpreter the number of programs is all that counts.
        large_enough = tile.x * tile.y >= min(1024, n)
        if (large_enough or not transposed) and programs < 2**31 and not (target.interpreted and programs > -(-n // _INTERPRETED_BLOCK)):
            steps = [(s[0], s[y], *[stride(s[d]) for d in rest]) for s in loops.strides]
            return Launch(tiled_kernel, (programs, 1, 1),
                          (outs, ins, extent(sizes[0]), extent(sizes[y]) if transposed else Size(sizes[y]),
                           tuple([Size(sizes[d]) for d in rest]), tuple(steps[:count]), _spread(steps[count:], kinds)),
                          _constants(function, kinds, (("WIDE", wide), ("BLOCK_X", tile.x), ("BLOCK_Y", tile.y))), tile.warps)
    tile = choose_flat(n, itemsize, target)
    steps = [(s[0], *[stride(v) for v in s[1:]]) for s in loops.strides]
    return Launch(indexed_kernel, (-(-n // tile.x), 1, 1),
                  (outs, ins, extent(n), tuple([Size(s) for s in sizes]), tuple(steps[:count]), _spread(steps[count:], kinds)),
                  _constants(function, kinds, (("WIDE", wide), ("BLOCK", tile.x))), tile.warps)


def _spread(strides: Sequence[tuple[Any, ...]], kinds: Any) -> tuple[tuple[Any, ...], ...]:
    """The tensors' strides, in the places of all operands; numbers have none."""
    given = iter(strides)
    return tuple([() if kind == 1 else next(given) for kind, _, _ in kinds])


def _other_axis(loops: Loops) -> int:
    """The second dimension of a tile: one along which some operand is dense, else the second fastest; 0 for none."""
    if len(loops.sizes) < 2:
        return 0
    for strides in loops.strides:
        if strides[0] not in (0, 1):
            for d in range(1, len(strides)):
                if strides[d] == 1:
                    return d
    return 1


# -- declarations ------------------------------------------------------------------------------------------------------

DEFAULT = "default"
"""The result has the promoted dtype."""
INT_TO_FLOAT = "int_to_float"
"""As DEFAULT, and integers become the default float dtype."""
ALWAYS_BOOL = "always_bool"
"""The operands are promoted; the result is bool."""
BOOL_TO_LONG = "bool_to_long"
"""As DEFAULT, and bool becomes int64."""


@dataclass(frozen=True)
class Declaration:
    """What :func:`pointwise` was told of an op; the tests and listings read it."""

    op: str
    functions: tuple[Any, ...]
    kind: str
    dtypes: tuple[torch.dtype, ...]


declarations: list[Declaration] = []


def pointwise(op: str, *, kind: str = DEFAULT, dtypes: Sequence[torch.dtype] = ALL, promote: Sequence[str] | None = None,
              keep: Sequence[str] = (), compute: str | Callable[[torch.dtype], torch.dtype] = "opmath", round_numbers: bool = False,
              outputs: Sequence[torch.dtype | None] = (None,), select: Callable[[Call], Any] | None = None,
              by_value: Sequence[str] = (), ranged: Mapping[str, int] = {}, check: Callable[[Call, torch.dtype], None] | None = None,
              out_stride: Callable[[Call], tuple[int, ...] | None] | None = None, flops: int = 1,
              name: str | None = None, family: str = "pointwise") -> Callable[[Any], Any]:
    """Declare a pointwise op.

    Args:
        op: the functional overload's full literal name.
        kind: ``DEFAULT``, ``INT_TO_FLOAT``, ``ALWAYS_BOOL`` or ``BOOL_TO_LONG``.
        dtypes: the promoted dtypes that PyTorch accepts on this op; others pass through (and raise there).
        promote: names of the arguments that take part in promotion; defaults to the tensor arguments among the
            function's parameters, less ``keep``.
        keep: names of tensor arguments that keep their own dtype (a mask).
        compute: ``"opmath"`` (float32 for the 16-bit floats), ``"result"`` (the promoted dtype itself) or a function of
            the promoted dtype.
        round_numbers: numbers are converted to the promoted dtype before they are computed with (PyTorch does so in
            comparisons, say, and not in sums).
        outputs: a dtype for each result, None for the dtype that ``kind`` gives.
        select: picks the scalar function for a call (by a mode string, say) instead of the decorated one.
        by_value: names of number arguments whose value ``select`` or ``check`` looks at.
        ranged: number arguments that PyTorch rejects if the promoted integer dtype cannot hold them (others wrap): their
            names, with -1 where it is the negative number that must fit, else 1.
        check: raises :class:`~gemsmode.plan.Decline` for calls not served; given the call and the promoted dtype.
        out_stride: the strides of a new result where they are not ``TensorIterator``'s choice (:func:`like_input`).
        flops: operations an element, for reports.
        family: the name by which users select the rule along with others.
    """

    def decorate(function: Any) -> Any:
        overload = find_op(op)
        declared = parameters(overload)
        index = {p.name: i for i, p in enumerate(declared)}
        names = tuple(function.arg_names)
        unknown = [n for n in names if n not in index]
        if unknown:
            raise TypeError(f"{op} has no argument {', '.join(unknown)}; "
                            f"a pointwise function's parameters are named as in {overload._schema}")
        promoted = tuple(promote) if promote is not None else tuple(
            n for n in names if declared[index[n]].is_tensor and n not in keep)
        allowed = frozenset(dtypes)
        allowed_names = "{" + ", ".join(dtype_name(d) for d in dtypes) + "}"

        commons: dict[tuple[Any, ...], torch.dtype] = {}
        ready: dict[tuple[Any, ...], tuple[Typed, tuple[int, ...], bool]] = {}

        def note(call: Call) -> tuple[tuple[Any, ...], torch.dtype]:
            """All of ``call`` that types depend on, and the promoted dtype; for the planner too."""
            here = call.target.device_type
            # A tensor's dtype, whether it has dimensions, and if not, whether it is there; the class of anything else.
            kinds = torch.get_default_dtype(), *[
                (v.dtype, 2 if v.shape else v.device.type == here) if v.__class__ is TensorMeta else v.__class__ for v in call.args]
            common = commons.get(kinds)
            if common is None:
                common = commons[kinds] = result_type([call.args[index[n]] for n in promoted if call.args[index[n]] is not None])
            call.noted = kinds, common
            return call.noted

        def admits(call: Call) -> tuple[bool, str]:
            _, common = note(call)
            if common in allowed:
                return True, ""
            return False, f"{dtype_name(common)} is not in {allowed_names}" + (": complex is not handled yet" if common.is_complex else "")

        def make_ready(call: Call, common: torch.dtype, chosen: Any) -> tuple[Typed, tuple[int, ...], bool]:
            """What of the plan depends on dtypes alone, the places of the tensors among the arguments, and whether numbers are promoted."""
            if kind == INT_TO_FLOAT and not common.is_floating_point:
                common = torch.get_default_dtype()
            elif kind == BOOL_TO_LONG and common == torch.bool:
                common = torch.int64
            result = torch.bool if kind == ALWAYS_BOOL else common
            inner = opmath(common) if compute == "opmath" else common if isinstance(compute, str) else compute(common)
            operands = []
            for n in chosen.arg_names:
                i = index[n]
                value = call.args[i]
                if n in keep and value.__class__ is TensorMeta:
                    operands.append(as_operand(call, i, value.dtype, value.dtype))
                elif n in ranged and common in LIMITS and value.__class__ is not TensorMeta:
                    operands.append(_within_limits(as_operand(call, i, common, inner, round_numbers), common, ranged[n]))
                else:
                    operands.append(as_operand(call, i, common, inner, round_numbers))
            places = tuple([index[n] for n, o in zip(chosen.arg_names, operands) if o.meta is not None])
            if not places:
                raise Decline("no tensor on the mode's device")
            has_number = any(call.args[index[n]].__class__ is not TensorMeta for n in promoted)
            return _typed(chosen, operands, [d or result for d in outputs], flops), places, has_number

        if overload.namespace == "aten":
            declarations.append(Declaration(op, (function,), kind, tuple(dtypes)))
        state = (torch.get_default_dtype,) if kind == INT_TO_FLOAT else ()

        @planned(op, Predicate(f"dtype in {allowed_names}", admits), family=family, kernel=function,
                 name=name or function.fn.__name__, numbers=True, by_value=by_value, state=state, writes_out=True)
        def plan(call: Call) -> Plan:
            args = call.args
            kinds, common = call.noted or note(call)
            if check is not None:
                check(call, common)
            chosen = function if select is None else select(call)
            key = kinds, id(chosen)
            found = ready.get(key)
            if found is None:
                found = ready[key] = make_ready(call, common, chosen)
            typed, places, has_number = found
            stride = None if out_stride is None else out_stride(call)
            return _build(call, typed, [args[i] for i in places], None, stride, has_number)

        return function

    return decorate
