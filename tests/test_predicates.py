"""Predicates: what they test, what they say, how they combine; and the metadata that they look at."""

from __future__ import annotations

import pytest
import torch

import gemsmode
from gemsmode import Call, Predicate, TensorMeta, contiguous, device, dtype, floating, ndim, not_complex, numel, value, where
from gemsmode.predicates import anything, on_gpu
from gemsmode.registry import find_op
from gemsmode.target import INTERPRETER


def meta(*shape: int, dtype: torch.dtype = torch.float32, stride: tuple[int, ...] | None = None, on: str = "cpu") -> TensorMeta:
    stride = stride if stride is not None else torch.empty(shape, device="meta").stride()
    return TensorMeta(dtype, shape, stride, torch.device(on))


def call(op: str, *args: object) -> Call:
    return Call(find_op(op), args, INTERPRETER)


add = call("aten.add.Tensor", meta(2, 3), meta(3), 1)
half = call("aten.add.Tensor", meta(2, 3, dtype=torch.float16), 2, 1)
cat = call("aten.cat.default", (meta(2, 3), meta(4, 3, dtype=torch.int64)), 0)


@pytest.mark.parametrize(("predicate", "given", "reason"), [
    (dtype(torch.float32), add, ""),
    (dtype(torch.float16, torch.bfloat16), add, "float32 is not in {float16, bfloat16}"),
    (dtype(torch.float32), cat, "int64 is not in {float32}"),
    (dtype(torch.float16, arg="self"), half, ""),
    (dtype(torch.float32, arg="other"), half, ""),  # a number there is no tensor
    (ndim(1, 2), add, ""),
    (ndim(2), add, "1 dimensions, not in {2}"),
    (ndim(2, arg="self"), add, ""),
    (device("cpu"), add, ""),
    (device("cuda", "xpu"), add, "device cpu is not in {cuda, xpu}"),
    (numel(at_least=3), add, ""),
    (numel(at_least=4), add, "3 elements, not numel >= 4"),
    (numel(at_most=3), add, "6 elements, not numel >= 0 and <= 3"),
    (value("alpha", 1, 2), add, ""),
    (value("alpha", 3), add, "alpha=1 is not one of 3"),
    (contiguous, add, ""),
    (contiguous, call("aten.exp.default", meta(3, 3, stride=(1, 3))), "float32[3, 3], strides [1, 3] is not contiguous"),
    (floating, add, ""),
    (floating, cat, "int64 is not floating point"),
    (not_complex, add, ""),
    (not_complex, call("aten.exp.default", meta(3, dtype=torch.complex64)), "complex64 is complex"),
    (on_gpu, add, ""),
    (anything, add, ""),
    (where("two rows", lambda c: c["self"].shape[0] == 2), add, ""),
    (where("three rows", lambda c: c["self"].shape[0] == 3), add, "not so: three rows"),
])
def test_answers_and_reasons(predicate: Predicate, given: Call, reason: str) -> None:
    assert predicate(given) == (not reason, reason)


def test_and() -> None:
    both = dtype(torch.float32) & ndim(2)
    assert both.text == "dtype in {float32} and ndim in {2}"
    assert both(add) == (False, "1 dimensions, not in {2}")
    assert both(half) == (False, "float16 is not in {float32}")
    assert (dtype(torch.float32) & ndim(1, 2))(add) == (True, "")


def test_or() -> None:
    either = dtype(torch.float16) | ndim(1, 2)
    assert either.text == "(dtype in {float16} or ndim in {1, 2})"
    assert either(add) == (True, "")
    assert (dtype(torch.float16) | ndim(2))(add) == (False, "float32 is not in {float16}, and 1 dimensions, not in {2}")


def test_not() -> None:
    other = ~dtype(torch.float16)
    assert other.text == "not (dtype in {float16})"
    assert other(add) == (True, "")
    assert other(half) == (False, "dtype in {float16} holds, which the rule excludes")
    assert (~other)(half) == (True, "")
    assert (~(dtype(torch.float16) & ndim(2)) | numel(at_least=100))(half)[0] is False


def test_combinations_stop_at_the_answer() -> None:
    never = where("never asked", lambda c: pytest.fail("asked"))
    assert (dtype(torch.float16) & never)(add)[0] is False
    assert (dtype(torch.float32) | never)(add)[0] is True
    assert repr(dtype(torch.float16)) == "<predicate dtype in {float16}>"


def test_an_argument_that_the_op_has_not() -> None:
    with pytest.raises(KeyError, match=r"no argument 'weight'; it has \['self', 'other', 'alpha'\]"):
        dtype(torch.float32, arg="weight")(add)


# -- metadata ----------------------------------------------------------------------------------------------------------

LAYOUTS = [
    torch.empty(2, 3, 4),
    torch.empty(2, 3, 4).permute(2, 0, 1),
    torch.empty(4, 6)[:, ::2],
    torch.empty(4, 6)[1:3, 1:3],
    torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    torch.empty(9).as_strided((2, 2, 2), (4, 2, 1)),
    torch.empty(1, 3).expand(4, 3),
    torch.empty(()),
    torch.empty(0, 3),
    torch.empty(3, 0),
    torch.empty(1, 5)[:, :1],
    torch.empty(5).as_strided((3, 3), (1, 1)),
    torch.empty(20).as_strided((3, 4), (2, 5)),
]


@pytest.mark.parametrize("tensor", LAYOUTS, ids=lambda t: f"{list(t.shape)}x{list(t.stride())}")
def test_tensor_meta_says_what_the_tensor_says(tensor: torch.Tensor) -> None:
    m = TensorMeta.of(tensor)
    assert (m.dtype, m.shape, m.stride, m.device) == (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
    assert (m.ndim, m.numel, m.is_contiguous) == (tensor.dim(), tensor.numel(), tensor.is_contiguous())
    offsets = {sum(i * s for i, s in zip(index, m.stride)) for index in torch.cartesian_prod(
        *[torch.arange(n) for n in m.shape]).reshape(-1, m.ndim).tolist()} if m.numel and m.ndim else set()
    if offsets:
        assert m.extent == max(offsets) + 1
        if len(offsets) < m.numel:
            assert m.may_overlap_itself
    elif m.ndim == 0:
        assert m.extent == 1
    else:
        assert m.extent == 0


def test_what_certainly_does_not_overlap_itself() -> None:
    for tensor in LAYOUTS[:6]:
        assert not TensorMeta.of(tensor).may_overlap_itself


def test_descriptions() -> None:
    assert str(meta(2, 3)) == "float32[2, 3]"
    assert str(meta(2, 3, dtype=torch.bfloat16, stride=(1, 2))) == "bfloat16[2, 3], strides [1, 2]"
    assert str(cat) == "aten.cat.default([float32[2, 3], int64[4, 3]], 0)"
    assert [str(m) for m in cat.tensors] == ["float32[2, 3]", "int64[4, 3]"]
    assert add["alpha"] == 1 and add["self"].shape == (2, 3)


def test_a_users_predicate_reaches_the_report(device: str) -> None:
    registry = gemsmode.Registry("predicates")

    @gemsmode.rule("aten.exp.default", when=[dtype(torch.float32, torch.float16), numel(at_least=8) | ndim(1)], registry=registry)
    def big_exp(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    x = torch.ones(2, 3, device=device)
    with gemsmode.GemsMode(registry=registry, trace=True) as gems:
        torch.exp(x)
        torch.exp(x[0])
        torch.exp(x.double())
    found = {(row["decision"], row["reason"]) for row in gems.report.to_dict()["ops"] if row["overload"] == "aten.exp.default"}
    assert found == {("rule", None), ("pass", "6 elements, not numel >= 8, and 2 dimensions, not in {1}"),
                     ("pass", "float64 is not in {float32, float16}")}
