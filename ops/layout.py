"""Dimension order, broadcasting and merging for elementwise kernels, as PyTorch's ``TensorIterator`` does it.

Source: the behaviour of ``at::TensorIterator`` (reordering by strides, output layout, coalescing), restated here and
checked against PyTorch's results by property tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gemsmode.plan import Decline, contiguous_strides
from gemsmode.signature import TensorMeta


def broadcast_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The broadcast of ``shapes``.

    Raises:
        Decline: they do not broadcast (PyTorch then raises its own error).
    """
    if not shapes:
        return ()
    longest = max(shapes, key=len)
    if all([s == longest[len(longest) - len(s):] for s in shapes]):
        return longest
    result: list[int] = []
    for i in range(1, max(len(s) for s in shapes) + 1):
        size = 1
        for s in shapes:
            if i <= len(s) and s[-i] != 1:
                if size not in (1, s[-i]):
                    raise Decline("PyTorch rejects it: the shapes do not broadcast")
                size = s[-i]
        result.append(size)
    return tuple(reversed(result))


def broadcast_strides(meta: TensorMeta, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of ``meta`` expanded to ``shape``: 0 where it is broadcast."""
    if meta.shape == shape:
        return meta.stride
    lead = len(shape) - len(meta.shape)
    here = shape[lead:]
    if here == meta.shape:
        return (0,) * lead + meta.stride
    return (0,) * lead + tuple([0 if own == 1 and size != 1 else stride for own, size, stride in zip(meta.shape, here, meta.stride)])


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill a range of memory without gaps or overlap, in any order of dimensions."""
    step = 1
    for stride, size in sorted([(st, si) for st, si in zip(strides, shape) if si != 1]):
        if stride != step:
            return False
        step *= size
    return True


def channels_last_strides(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a ``channels_last`` (4-d) or ``channels_last_3d`` (5-d) tensor of ``shape``; None for other ranks."""
    if len(shape) not in (4, 5):
        return None
    order = (1, *range(len(shape) - 1, 1, -1), 0)
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def _matches(shape: tuple[int, ...], strides: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return all(size == 1 or s == e for size, s, e in zip(shape, strides, expected))


def _descends(strides: tuple[int, ...]) -> bool:
    """Whether the strides that are not 0 fall strictly from the first dimension to the last: already in order."""
    last = 0
    for stride in reversed(strides):
        if stride:
            if stride <= last:
                return False
            last = stride
    return True


def stride_order(shape: tuple[int, ...], operands: Sequence[tuple[int, ...]]) -> list[int]:
    """Dimensions from fastest to slowest, as ``TensorIterator`` sorts them by the operands' strides."""
    order = list(range(len(shape) - 1, -1, -1))
    if all([_descends(strides) for strides in operands]):
        return order

    def compare(a: int, b: int) -> int:
        for strides in operands:
            if strides[a] == 0 or strides[b] == 0:
                continue
            if strides[a] != strides[b]:
                return -1 if strides[a] < strides[b] else 1
            if shape[a] > shape[b]:
                return 1
        return 0

    for i in range(1, len(order)):
        j = i
        for k in range(i - 1, -1, -1):
            verdict = compare(order[k], order[j])
            if verdict > 0:
                order[k], order[j] = order[j], order[k]
                j = k
            elif verdict < 0:
                break
    return order


def output_strides(shape: tuple[int, ...], inputs: Sequence[TensorMeta], has_number: bool = False,
                   expanded: Sequence[tuple[int, ...]] | None = None) -> tuple[int, ...]:
    """The strides PyTorch gives a new result of ``shape`` of an elementwise op on ``inputs``.

    ``has_number``: a Python number is among the operands; it counts as a 0-dim tensor. ``expanded``: the inputs' strides,
    broadcast to ``shape``, if they are known.
    """
    dense = contiguous_strides(shape)
    if all([m.shape == shape for m in inputs]) and (not has_number or not shape):
        first = inputs[0].stride if inputs else ()
        if all([m.is_contiguous for m in inputs]):
            return dense
        last = channels_last_strides(shape)
        if last is not None and all(_matches(shape, m.stride, last) for m in inputs):
            return last
        if all(m.stride == first for m in inputs) and is_dense(shape, first):
            return first
    if expanded is None:
        expanded = [broadcast_strides(m, shape) for m in inputs]
    expanded = [strides for strides, m in zip(expanded, inputs) if m.shape]
    if len(expanded) == 1 and expanded[0] == dense and 0 not in shape:
        return dense
    if all([_descends(strides) for strides in expanded]):
        return dense
    order = stride_order(shape, expanded)
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = step
        step *= shape[d]
    return dense if order == list(range(len(shape) - 1, -1, -1)) else tuple(strides)


def preserved_strides(meta: TensorMeta) -> tuple[int, ...]:
    """The strides of ``torch.empty_like``: the tensor's own if it is dense, else those of an elementwise result."""
    return meta.stride if is_dense(meta.shape, meta.stride) else output_strides(meta.shape, [meta])


class Loops(NamedTuple):
    """Dimensions to loop over, fastest first, and each operand's strides along them (outputs come first)."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def is_flat(self) -> bool:
        """One dimension along which every operand is dense."""
        return len(self.sizes) == 1 and all([s == (1,) for s in self.strides])


def merge(shape: tuple[int, ...], operands: Sequence[tuple[int, ...]]) -> Loops:
    """Sort the dimensions by the operands' strides, the first operand's (an output's) first, and merge what is one run."""
    if len(shape) == 1 and shape[0] != 1:
        return Loops(shape, tuple(operands))
    by_dimension = list(zip(*operands))
    sizes: list[int] = []
    columns: list[tuple[int, ...]] = []
    for d in stride_order(shape, operands):
        size = shape[d]
        if size == 1:
            continue
        column = by_dimension[d]
        if sizes and column[0] == columns[-1][0] * sizes[-1] and column == tuple([step * sizes[-1] for step in columns[-1]]):
            sizes[-1] *= size
        else:
            sizes.append(size)
            columns.append(column)
    if not sizes:
        sizes, columns = [1], [(1,) * len(operands)]
    return Loops(tuple(sizes), tuple(zip(*columns)))
