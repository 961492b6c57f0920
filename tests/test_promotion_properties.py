"""Type promotion against ``torch.result_type``, on every pair of dtypes and ranks and on random lists of operands."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemsmode
from gemsmode.signature import TensorMeta

gemsmode.load_ops()

from gemsmode.ops.promotion import ALL, OPMATH, TRITON, opmath, result_type  # noqa: E402

DTYPES = (*ALL, torch.complex64, torch.complex128)
NUMBERS = (True, 3, 2.5, 1j)


def as_call_sees(value: Any) -> Any:
    return TensorMeta.of(value) if isinstance(value, torch.Tensor) else type(value)()


def tensor(dtype: torch.dtype, ndim: int) -> torch.Tensor:
    return torch.ones((2,) * ndim, dtype=dtype)


OPERANDS = [tensor(d, n) for d in DTYPES for n in (0, 2)] + list(NUMBERS)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_every_pair(default: torch.dtype) -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        wrong = []
        for a, b in itertools.product(OPERANDS, OPERANDS):
            if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
                continue
            mine, theirs = result_type([as_call_sees(a), as_call_sees(b)]), torch.result_type(a, b)
            if mine != theirs:
                wrong.append((a, b, mine, theirs))
        assert not wrong, f"{len(wrong)} pairs, the first {wrong[0]}"
    finally:
        torch.set_default_dtype(previous)


operands = st.lists(st.sampled_from(OPERANDS), min_size=2, max_size=4).filter(lambda xs: any(isinstance(x, torch.Tensor) for x in xs))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(operands)
def test_lists_of_operands(values: list[Any]) -> None:
    """Several operands promote by rank: those with dimensions, then 0-dim tensors, then numbers."""
    # `torch.where`, `addcmul`... promote all operands at once; PyTorch's utility for it is torch._prims_common's.
    import torch._prims_common as utils

    numbers = [v for v in values if not isinstance(v, torch.Tensor)]
    _, expected = utils.elementwise_dtypes(*values, type_promotion_kind=utils.ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)
    halves = (torch.float16, torch.bfloat16) if hasattr(torch, "bcomplex32") else (torch.float16,)
    if any(isinstance(n, complex) for n in numbers) and any(isinstance(v, torch.Tensor) and v.dtype in halves for v in values):
        return  # complex32 and bcomplex32, which the utility and the kernels of PyTorch treat differently
    assert result_type([as_call_sees(v) for v in values]) == expected


def test_real_additions_agree() -> None:
    """What ``torch.add`` itself returns, tensors and numbers mixed."""
    for a, b in itertools.product(OPERANDS, OPERANDS):
        if isinstance(a, torch.Tensor):
            try:
                expected = torch.add(a, b).dtype
            except NotImplementedError:
                # Of complex numbers of two bfloat16 PyTorch 2.14 adds none.
                expected = torch.result_type(a, b)
                assert expected == getattr(torch, "bcomplex32", None), (a, b)
            assert result_type([as_call_sees(a), as_call_sees(b)]) == expected, (a, b)


def test_every_dtype_has_a_triton_type_and_a_dtype_to_compute_in() -> None:
    for dtype in ALL:
        assert dtype in TRITON
        assert opmath(dtype) == (torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    assert set(OPMATH) == {torch.float16, torch.bfloat16}
