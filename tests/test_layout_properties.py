"""Output strides, broadcasting and merging of dimensions against what ``torch.add`` does, on random layouts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemsmode
from gemsmode.plan import Decline, contiguous_strides
from gemsmode.signature import TensorMeta

gemsmode.load_ops()

from gemsmode.ops.layout import broadcast_shape, broadcast_strides, is_dense, merge, output_strides  # noqa: E402

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)

sizes = st.sampled_from([0, 1, 1, 2, 3, 4, 5])


@st.composite
def shapes(draw: st.DrawFn, ndim: int | None = None) -> tuple[int, ...]:
    ndim = draw(st.integers(0, 5)) if ndim is None else ndim
    return tuple(draw(st.lists(sizes, min_size=ndim, max_size=ndim)))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of ``shape`` in a random layout: permuted, sliced, expanded, with odd strides where a size is 1."""
    ndim = len(shape)
    order = draw(st.permutations(range(ndim)))
    step = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    expanded = [draw(st.integers(0, 7)) == 0 for _ in shape]
    base = [1 if expanded[d] and shape[d] > 0 else shape[d] * step[d] for d in order]
    x = torch.zeros(base).permute([order.index(d) for d in range(ndim)])
    x = x[tuple(slice(None, None, 1 if expanded[d] else step[d]) for d in range(ndim))].expand(shape) if ndim else x
    if draw(st.booleans()) and any(s == 1 for s in shape):
        strides = [draw(st.sampled_from([st_, 1, 7, 0])) if s == 1 else st_ for s, st_ in zip(shape, x.stride())]
        x = x.as_strided(shape, strides)
    return x


def smaller(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to ``shape``."""
    lead = draw(st.integers(0, len(shape))) if draw(st.booleans()) else 0
    return tuple(1 if draw(st.integers(0, 4)) == 0 else s for s in shape[lead:])


@st.composite
def operands(draw: st.DrawFn) -> list[torch.Tensor]:
    shape = draw(shapes())
    return [draw(layouts(smaller(draw, shape))) for _ in range(draw(st.integers(2, 3)))]


def native(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One elementwise call on all of ``tensors``."""
    return torch.addcmul(*tensors) if len(tensors) == 3 else torch.add(*tensors)


@SETTINGS
@given(operands())
def test_output_strides_are_pytorchs(tensors: list[torch.Tensor]) -> None:
    result = native(tensors)
    metas = [TensorMeta.of(t) for t in tensors]
    shape = broadcast_shape([m.shape for m in metas])
    assert shape == tuple(result.shape)
    assert output_strides(shape, metas) == result.stride(), [str(m) for m in metas]


@SETTINGS
@given(st.data())
def test_output_strides_with_a_number(data: st.DataObject) -> None:
    x = data.draw(layouts(data.draw(shapes())))
    meta = TensorMeta.of(x)
    assert output_strides(meta.shape, [meta], has_number=True) == (x + 2).stride(), str(meta)
    assert output_strides(meta.shape, [meta]) == torch.neg(x).stride(), str(meta)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 3, 0, 4)])
@pytest.mark.parametrize("other", ["same", "channel", "contiguous", "number"])
def test_output_strides_of_channels_last(shape: tuple[int, ...], other: str) -> None:
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    y = {"same": torch.zeros_like(x), "channel": torch.zeros(1, shape[1], 1, 1), "contiguous": torch.zeros(shape),
         "number": torch.zeros(())}[other]
    result = x + y
    metas = [TensorMeta.of(x), TensorMeta.of(y)]
    assert output_strides(tuple(result.shape), metas) == result.stride()


@SETTINGS
@given(st.data())
def test_shapes_that_do_not_broadcast_are_declined(data: st.DataObject) -> None:
    a, b = data.draw(shapes()), data.draw(shapes())
    try:
        expected = torch.broadcast_shapes(a, b)
    except RuntimeError:
        with pytest.raises(Decline, match="do not broadcast"):
            broadcast_shape([a, b])
        return
    assert broadcast_shape([a, b]) == tuple(expected)


@SETTINGS
@given(st.data())
def test_broadcast_strides_are_those_of_expand(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x = data.draw(layouts(smaller(data.draw, shape)))
    expanded = x.expand(shape)
    mine = broadcast_strides(TensorMeta.of(x), shape)
    for size, own, theirs in zip(shape, mine, expanded.stride()):
        assert size <= 1 or own == theirs


def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    return [sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, shape))]


@SETTINGS
@given(operands())
def test_merged_loops_visit_the_same_elements(tensors: list[torch.Tensor]) -> None:
    """Merging changes the order of the elements, never which elements of the operands meet."""
    result = native(tensors)
    shape = tuple(result.shape)
    strides = [result.stride(), *(broadcast_strides(TensorMeta.of(t), shape) for t in tensors)]
    if not math.prod(shape):
        return
    loops = merge(shape, strides)
    assert math.prod(loops.sizes) == math.prod(shape)
    assert len(loops.sizes) <= max(len(shape), 1)
    assert all(size > 1 for size in loops.sizes) or loops.sizes == (1,)
    plain = sorted(zip(*(offsets(shape, s) for s in strides)))
    merged = sorted(zip(*(offsets(loops.sizes, s) for s in loops.strides)))
    assert merged == plain


@SETTINGS
@given(st.data())
def test_dense_operands_of_one_layout_merge_to_one_loop(data: st.DataObject) -> None:
    shape = tuple(max(s, 1) for s in data.draw(shapes()))
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.zeros([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    assert is_dense(shape, x.stride())
    loops = merge(shape, [x.stride(), x.stride()])
    assert loops.is_flat


@SETTINGS
@given(st.data())
def test_is_dense_means_no_gaps_and_no_overlap(data: st.DataObject) -> None:
    x = data.draw(layouts(data.draw(shapes())))
    if not x.numel():
        return
    touched = offsets(tuple(x.shape), x.stride())
    assert is_dense(tuple(x.shape), x.stride()) == (sorted(touched) == list(range(x.numel())))


@SETTINGS
@given(st.data())
def test_metadata_of_tensors(data: st.DataObject) -> None:
    x = data.draw(layouts(data.draw(shapes())))
    meta = TensorMeta.of(x)
    touched = offsets(tuple(x.shape), x.stride())
    assert meta.is_contiguous == x.is_contiguous()
    assert meta.numel == x.numel()
    assert meta.extent == (max(touched) + 1 if touched else 0)
    if not meta.may_overlap_itself:
        assert len(set(touched)) == len(touched)
    assert contiguous_strides(meta.shape) == torch.empty(meta.shape).stride()
