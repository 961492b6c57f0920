"""Data movement over layouts that OpInfo does not reach: each result equals PyTorch's bit for bit, strides included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gemsmode import GemsMode
from gemsmode.target import current

aten = torch.ops.aten


def layouts() -> dict[str, torch.Tensor]:
    x = torch.randn(6, 7, 8, device=current().device_type)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": x[:, ::2],
        "expanded": x[:1].expand(6, 7, 8),
        "offset": x.flatten()[5:].narrow(0, 0, 2 * 7 * 8).view(2, 7, 8),
    }


def same_as_native(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> None:
    expected = function(*args)
    with GemsMode(strict=True, trace=True) as mode:
        got = function(*args)
    decisions = {r["decision"] for r in mode.report.to_dict()["ops"]}
    assert "rule" in decisions and not decisions & {"pass", "error"}, mode.report.to_dict()["ops"]
    assert got.dtype == expected.dtype and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def shape_with(t: torch.Tensor, dim: int, size: int) -> list[int]:
    shape = list(t.shape)
    shape[dim] = size
    return shape


def shape_before(t: torch.Tensor, dim: int, size: int) -> list[int]:
    shape = list(t.shape)
    shape.insert(dim if dim >= 0 else t.ndim + 1 + dim, size)
    return shape


PER_DIM: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "cat": lambda t, d: torch.cat([t, t, t.narrow(d, 0, 1)], d),
    "stack": lambda t, d: torch.stack([t, t], d),
    "roll": lambda t, d: torch.roll(t, 2, d),
    "roll back": lambda t, d: torch.roll(t, -1, d),
    "flip": lambda t, d: torch.flip(t, [d]),
    "slice_backward": lambda t, d: aten.slice_backward(t.narrow(d, 1, 1), list(t.shape), d, 1, 2, 1),
    "slice_backward with a step": lambda t, d: aten.slice_backward(t, shape_with(t, d, 2 * t.shape[d] + 1), d, 1, 2 * t.shape[d] + 1, 2),
    "select_backward": lambda t, d: aten.select_backward(t, shape_before(t, d, 5), d, 3),
    "select_backward from the end": lambda t, d: aten.select_backward(t, shape_before(t, d, 5), d, -1),
}

WHOLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pad": lambda t: torch.nn.functional.pad(t, (1, 2, 3, -1)),
    "pad with a value": lambda t: torch.nn.functional.pad(t, (1, 2, 0, 0, 1, 1), value=3.5),
    "tril": lambda t: t.tril(-1),
    "triu": lambda t: t.triu(2),
    "diagonal_backward": lambda t: aten.diagonal_backward(t.diagonal(1, 1, 2), list(t.shape), 1, 1, 2),
    "diag_embed": lambda t: torch.diag_embed(t, -1),
    "repeat": lambda t: t.repeat(2, 1, 3),
    "roll flat": lambda t: torch.roll(t.contiguous(), 3),
}


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "offset"])
@pytest.mark.parametrize("name", [*PER_DIM, *WHOLE])
def test_layouts(name: str, layout: str) -> None:
    x = layouts()[layout]
    if name in WHOLE:
        if name == "roll flat" and layout != "contiguous":
            x = x.clone(memory_format=torch.contiguous_format)
        same_as_native(WHOLE[name], x)
        return
    for dim in (0, 1, 2, -1):
        same_as_native(lambda t, d=dim: PER_DIM[name](t, d), x)


def test_cat_of_several_dtypes_and_of_many() -> None:
    device = current().device_type
    same_as_native(lambda *a: torch.cat(a), *[torch.randn(3, 5, device=device).to(d) for d in (torch.float32, torch.int32, torch.bfloat16)])
    same_as_native(lambda *a: torch.cat(a), *[torch.randn(i, 5, device=device) for i in range(1, 40)])


def test_cat_keeps_channels_last() -> None:
    parts = [torch.randn(2, 3, 4, 4, device=current().device_type).to(memory_format=torch.channels_last) for _ in range(3)]
    same_as_native(lambda *a: torch.cat(a, 1), *parts)


def test_bad_input_gets_pytorch_errors() -> None:
    device = current().device_type
    bad = (lambda: torch.cat([torch.ones(2, 3, device=device), torch.ones(3, 4, device=device)], 1),
           lambda: torch.flip(torch.ones(3, device=device), [0, 0]),
           lambda: torch.stack([torch.ones(2, device=device), torch.ones(3, device=device)]),
           lambda: torch.ones(2, 2, device=device).repeat(2))
    for call in bad:
        with pytest.raises((RuntimeError, IndexError)) as expected:
            call()
        with GemsMode(strict=True), pytest.raises(type(expected.value)) as got:
            call()
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.int8, torch.uint8))
def test_a_float_fills_integers_as_pytorch_fills_them(dtype: torch.dtype, device: str) -> None:
    """``torch.nn.functional.pad`` hands its fill on as a float: labels are padded with -100.0."""
    x = torch.arange(6, device=device).to(dtype)
    for value in (100.0, 2.7, -100.0, -2.7, 3e9, float("inf"), float("nan")):
        try:
            expected = aten.constant_pad_nd(x, (1, 2), value)
        except RuntimeError:
            with GemsMode(), pytest.raises(RuntimeError, match="overflow"):
                aten.constant_pad_nd(x, (1, 2), value)
            continue
        with GemsMode(trace=True, strict=True) as gems:
            got = aten.constant_pad_nd(x, (1, 2), value)
        assert torch.equal(got, expected)
        assert [row["decision"] for row in gems.report.to_dict()["ops"]] == ["rule"]
