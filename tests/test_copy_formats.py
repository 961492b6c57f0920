"""Copies: strides and memory formats exactly as PyTorch's, conversions between all dtypes, fills through views."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import decision

from gemsmode import GemsMode
from gemsmode.registry import find_op

FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool)


@pytest.fixture(scope="module")
def mode() -> GemsMode:
    return GemsMode(strict=True)


def check(mode: GemsMode, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run ``name`` by a rule and by PyTorch; values and metadata must be the same."""
    found = decision(mode, name, *args, **kwargs)
    assert found.kind == "rule", f"{name}: {found.reason}"
    expected = find_op(name)(*args, **kwargs)
    with mode:
        got = find_op(name)(*args, **kwargs)
    assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    return got


def tensors(device: str) -> dict[str, torch.Tensor]:
    """One tensor for each kind of layout."""
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32, device=device).reshape(2, 3, 4, 5)
    y = torch.arange(2 * 3 * 4 * 5 * 2, dtype=torch.float32, device=device).reshape(2, 3, 4, 5, 2)
    return {
        "contiguous": x,
        "0-dim": x[0, 0, 0, 3],
        "one element": x[:1, :1, :1, :1],
        "empty": x[:, :0],
        "empty, permuted": x[:, :0].permute(3, 1, 0, 2),
        "transposed": x.transpose(1, 2),
        "permuted": x.permute(3, 1, 0, 2),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "channels last, sliced": x.contiguous(memory_format=torch.channels_last)[:, :, ::2],
        "channels last, channel sliced": x.contiguous(memory_format=torch.channels_last)[:, 1:],
        "one channel": x[:, :1],
        "5-d": y,
        "channels last 3d": y.contiguous(memory_format=torch.channels_last_3d),
        "channels last 3d, sliced": y.contiguous(memory_format=torch.channels_last_3d)[:, :, 1:],
        "strided": x[:, ::2, :, 1::2],
        "strided, transposed": x[:, ::2].transpose(0, 3),
        "expanded": x[:, :1].expand(2, 3, 4, 5),
        "expanded from one": x[0, 0, 0, :1].expand(3, 4, 5),
        "expanded, transposed": x[:, :1].expand(2, 3, 4, 5).transpose(1, 3),
        "overlapping": x.flatten().as_strided((4, 5), (2, 1)),
        "unaligned": x.flatten()[1:].reshape(-1)[:118].reshape(2, 59),
        "ones in the strides": x[:, :, :1].transpose(2, 3),
    }


NAMES = list(tensors("cpu"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_memory_formats(mode: GemsMode, device: str, name: str, memory_format: torch.memory_format) -> None:
    x = tensors(device)[name]
    wanted = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, x.ndim)
    for op, options in (("clone", {}), ("_to_copy", {}), ("_to_copy", {"dtype": torch.float16})):
        if x.ndim == wanted:
            check(mode, op, x, memory_format=memory_format, **options)
        else:
            assert decision(mode, op, x, memory_format=memory_format, **options).kind == "pass"
            with mode, pytest.raises(RuntimeError, match="required rank"):
                find_op(op)(x, memory_format=memory_format, **options)


@pytest.mark.parametrize("name", NAMES)
def test_other_results_in_the_layout_of_self(mode: GemsMode, device: str, name: str) -> None:
    x = tensors(device)[name]
    for op, args in (("clone", ()), ("_to_copy", ()), ("alias_copy", ()), ("lift_fresh_copy", ()), ("fill.Scalar", (3,)), ("zero", ()),
                     ("fill.Tensor", (x.new_tensor(2.0),)), ("masked_fill.Scalar", (x > 5, 1.5))):
        check(mode, op, x, *args)


@pytest.mark.parametrize("seed", range(4))
def test_strides_of_random_layouts(mode: GemsMode, device: str, seed: int) -> None:
    """Random permutations, slices and broadcasts of tensors of up to five dimensions."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        ndim = data.draw(st.integers(1, 5))
        shape = data.draw(st.lists(st.integers(0, 3), min_size=ndim, max_size=ndim))
        x = torch.arange(max(1, 4**ndim), dtype=torch.float32, device=device)[:4**ndim].reshape([4] * ndim)
        x = x.permute(data.draw(st.permutations(range(ndim))))
        x = x[tuple(slice(0, s, data.draw(st.integers(1, 2))) for s in shape)]
        spread = [data.draw(st.sampled_from([s, 2])) if s == 1 else s for s in x.shape]
        x = x.expand(spread).permute(data.draw(st.permutations(range(ndim))))
        check(mode, ["clone", "_to_copy", "fill.Scalar", "zero"][seed], x, *([1.0] if seed == 2 else []))

    run()


@pytest.mark.parametrize("source,to", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_conversions(mode: GemsMode, device: str, source: torch.dtype, to: torch.dtype) -> None:
    values = [0.0, -0.0, 1.0, 1.9, 2.5, 100.0, 0.25, 1e-7]
    if source.is_floating_point:
        if to.is_floating_point or to == torch.bool:
            values += [float("nan"), float("inf"), -float("inf"), -1.7, -3e4, 1 + 2**-8, 1 + 2**-8 + 2**-20, 65519.999, 3e38, 1e-40]
        elif to != torch.uint8:
            values += [-1.0, -1.9, -100.5]
        else:
            values += [-1.0, -1.9, 254.9]
        x = torch.tensor(values, dtype=torch.float64, device=device).to(source)
    elif source == torch.bool:
        x = torch.tensor([True, False], device=device)
    else:
        info = torch.iinfo(source)
        x = torch.tensor([0, 1, 2, 77, info.max, info.max - 1, info.min, info.min + 1], dtype=source, device=device)
    with torch.no_grad():
        check(mode, "_to_copy", x, dtype=to)
        out = torch.zeros(2, len(x), dtype=to, device=device)
        expected = out.clone()
        expected.copy_(x)
        assert decision(mode, "copy_", out, x).kind == "rule"
        with mode:
            assert out.copy_(x) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_wide_unsigned_dtypes_are_copied(mode: GemsMode, device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 7], [255, 256, torch.iinfo(dtype).max]], dtype=dtype, device=device)
    check(mode, "clone", x.t())
    check(mode, "_to_copy", x, dtype=torch.int64)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("expanded", "expanded from one", "expanded, transposed", "overlapping")])
def test_writes_go_through_views(mode: GemsMode, device: str, name: str) -> None:
    """Only the elements of the view change."""
    for op, args in (("copy_", (torch.tensor(7.5, device=device),)), ("fill_.Scalar", (-1,)), ("zero_", ()),
                     ("fill_.Tensor", (torch.tensor(4, device=device),)), ("masked_fill_.Scalar", (torch.tensor(True, device=device), 9))):
        ours, theirs = tensors(device)[name], tensors(device)[name]
        assert decision(mode, op, ours, *args).kind == "rule"
        find_op(op)(theirs, *args)
        with mode:
            assert find_op(op)(ours, *args) is ours
        whole, expected = (t if t._base is None else t._base for t in (ours, theirs))
        assert torch.equal(whole, expected)


def test_copies_between_layouts(mode: GemsMode, device: str) -> None:
    for (a, x), (b, y) in itertools.product(tensors(device).items(), tensors(device).items()):
        if x.shape != y.shape or "expanded" in b or b == "overlapping":
            continue
        target = y.clone(memory_format=torch.preserve_format)
        found = decision(mode, "copy_", target, x)
        assert found.kind == "rule", (a, b, found.reason)
        with mode:
            target.copy_(x)
        assert torch.equal(target, x), (a, b)


def test_overlapping_targets_are_left_to_pytorch(mode: GemsMode, device: str) -> None:
    x = torch.zeros(3, device=device).expand(2, 3)
    for op, args in (("copy_", (torch.ones(2, 3, device=device),)), ("fill_.Scalar", (1,)), ("masked_fill_.Scalar", (x > 0, 1))):
        assert decision(mode, op, x, *args).kind == "pass"
    # Source and target in one memory: PyTorch copes or raises.
    y = torch.arange(6.0, device=device)
    with mode, pytest.raises(RuntimeError, match=r"single memory location|overlap"):
        y[1:].copy_(y[:-1])
    assert torch.equal(y, torch.arange(6.0, device=device))


def test_what_is_no_copy_on_one_device_is_left_to_pytorch(mode: GemsMode, device: str) -> None:
    x = torch.randn(3, 4, device=device)
    assert decision(mode, "_to_copy", x, device=torch.device("meta")).kind == "pass"
    assert decision(mode, "_to_copy", x, layout=torch.sparse_coo).kind == "pass"
    assert decision(mode, "clone", x.to_sparse()).kind == "pass"
    assert decision(mode, "clone", x.to(torch.complex64)).kind == "pass"
    with mode:
        assert x.to("meta").is_meta
        assert torch.equal(x.to_sparse().clone().to_dense(), x)


def test_lazily_negated_tensors_are_resolved(mode: GemsMode, device: str) -> None:
    """Plain and negated tensors of one signature take turns."""
    z = torch.tensor([1 + 2j, -3 + 4j], device=device)
    negated, plain = z.conj().imag, z.imag.clone().repeat_interleave(2)[::2]
    assert negated.is_neg() and negated.stride() == plain.stride()
    with mode:
        for _ in range(2):
            assert torch.equal(plain.clone(), torch.tensor([2.0, 4.0], device=device))
            assert torch.equal(negated.clone(), torch.tensor([-2.0, -4.0], device=device))
            assert torch.equal(torch.zeros(2, device=device).copy_(negated), torch.tensor([-2.0, -4.0], device=device))
            assert torch.equal(negated.to(torch.float64), torch.tensor([-2.0, -4.0], device=device, dtype=torch.float64))


def test_copies_of_views(mode: GemsMode, device: str) -> None:
    x = torch.arange(24.0, device=device).reshape(2, 3, 4)
    for view in (x, x.transpose(0, 2), x[:, 1:], x[:, ::2]):
        check(mode, "permute_copy", view, [2, 0, 1])
        check(mode, "transpose_copy.int", view, 0, -1)
        check(mode, "t_copy", view[0])
        check(mode, "expand_copy", view[:, :1], [5, -1, 3, -1])
        check(mode, "squeeze_copy.dims", view[:, :1], [1])
        check(mode, "unsqueeze_copy", view, -1)
        check(mode, "diagonal_copy", view, 1, 0, 2)
        check(mode, "diagonal_copy", view, -1, 0, 1)
        check(mode, "select_copy.int", view, 1, -1)
        check(mode, "slice_copy.Tensor", view, 2, 1, None, 2)
        check(mode, "narrow_copy", view, 0, 1, 1)
        check(mode, "unfold_copy", view, 2, 2, 1)
        check(mode, "as_strided_copy", view, [2, 3], [1, 2])
        check(mode, "view_copy", view, [view.numel() // 2, -1])
        check(mode, "view_copy", view, [1, view.numel()])
    assert decision(mode, "view_copy", x, [7]).kind == "pass"
    assert decision(mode, "as_strided_copy", x, [2], [1], 3).kind == "pass"
