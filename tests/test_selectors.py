"""Choosing ops by name, overload, glob or family."""

from __future__ import annotations

import pytest
import torch

from gemsmode import Registry, UnknownOpError, dtype, rule
from gemsmode.registry import find_op
from gemsmode.selectors import Selector, names_of


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry("selectors")
    for op, family in (("aten.mm.default", "products"), ("aten._softmax.default", "softmax"), ("aten._log_softmax.default", "softmax"),
                       ("aten.sum.dim_IntList", "reduction"), ("aten.norm.Scalar", "norm"), ("aten.native_layer_norm.default", "norm")):
        rule(op, name=op, family=family, registry=registry)(lambda *args: None)
    return registry


def selects(selection: object, op: str, registry: Registry) -> bool:
    found = find_op(op)
    served = [c.rule for c in registry.candidates(found)]
    return Selector(selection, registry).match(found, served[0] if served else None)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("selection", "chosen", "not_chosen"), [
    ("mm", ["mm", "mm.out"], ["bmm", "addmm"]),
    ("add", ["add.Tensor", "add.Scalar", "add.out", "add_.Tensor"], ["addmm", "_foreach_add.List", "sub.Tensor"]),
    ("add_", ["add_.Tensor", "add_.Scalar"], ["add.Tensor"]),
    ("add.Tensor", ["add.Tensor"], ["add.Scalar", "add_.Tensor", "add.out"]),
    ("aten.add.Tensor", ["add.Tensor"], ["add.Scalar"]),
    ("aten::add", ["add.Tensor"], ["sub.Tensor"]),
    ("torch.ops.aten.add", ["add.Tensor"], ["sub.Tensor"]),
    ("mm.default", ["mm"], ["mm.out"]),
    ("softmax", ["_softmax", "_softmax.out", "softmax.int"], ["_log_softmax", "_softmax_backward_data"]),
    ("log_softmax", ["_log_softmax"], ["_softmax"]),
    ("layer_norm", ["native_layer_norm", "layer_norm"], ["native_layer_norm_backward", "native_group_norm"]),
    ("softmax*", ["_softmax", "_softmax_backward_data"], ["_log_softmax"]),
    ("softmax_backward", ["_softmax_backward_data"], ["_softmax"]),
    ("*_backward", ["silu_backward", "native_layer_norm_backward", "_softmax_backward_data"], ["silu", "_softmax"]),
    ("add*", ["add.Tensor", "addmm", "add_.Tensor"], ["_foreach_add.List"]),
    ("*.out", ["add.out", "mm.out"], ["add.Tensor"]),
    ("[am]*m", ["addmm", "mm"], ["bmm"]),
    ("?m", ["mm"], ["bmm", "addmm"]),
    ("__or__", ["__or__.Tensor", "__ior__.Tensor"], ["bitwise_or.Tensor"]),
    ("reduction", ["sum.dim_IntList", "sum.IntList_out"], ["mm", "mean"]),
    ("products", ["mm", "mm.out"], ["bmm"]),
    ("norm", ["norm.Scalar"], ["native_layer_norm"]),
    ("family:norm", ["norm.Scalar", "native_layer_norm"], ["mm", "renorm"]),
    (["mm", "bmm"], ["mm", "bmm"], ["addmm"]),
    ({"mm", "products"}, ["mm"], ["bmm"]),
    (torch.ops.aten.add.Tensor, ["add.Tensor"], ["add.Scalar"]),
    (torch.ops.aten.add, ["add.Tensor", "add.Scalar"], ["sub.Tensor"]),
    ([], [], ["mm"]),
])
def test_what_a_selection_chooses(selection: object, chosen: list[str], not_chosen: list[str], registry: Registry) -> None:
    assert [op for op in chosen if not selects(selection, op, registry)] == []
    assert [op for op in not_chosen if selects(selection, op, registry)] == []


def test_the_most_exact_entry_decides_the_condition(registry: Registry) -> None:
    exact, named, glob, family = (dtype(d) for d in (torch.float16, torch.float32, torch.float64, torch.int32))
    selector = Selector({"*": glob, "products": family, "mm": named, "mm.out": exact, "bmm": ...}, registry)

    def condition(op: str) -> object:
        served = [c.rule for c in registry.candidates(find_op(op))]
        selected, found = selector.match(find_op(op), served[0] if served else None)
        assert selected
        return found

    assert condition("mm.out") is exact
    assert condition("mm") is named
    assert condition("bmm") is None
    assert condition("sum.dim_IntList") is glob


@pytest.mark.parametrize(("selection", "message"), [
    ("sotfmax", "'sotfmax' is not a known op, family or pattern; did you mean 'softmax'"),
    ("reductoin", "did you mean.*'reduction'"),
    ("mm.outt", "'mm.outt' is not a known overload; did you mean 'mm.out'"),
    ("mm.nothing", "'mm.nothing' is not a known overload"),
    ("zzz_*", r"'zzz_\*' is not a known op, family or pattern"),
    ("family:nothing", "is not a known"),
    ("xyzzyxyzzy", "gemsmode ops` lists what is registered"),
    (["mm", "madeup_op_name"], "'madeup_op_name'"),
])
def test_unknown_names_list_the_nearest(selection: object, message: str, registry: Registry) -> None:
    with pytest.raises(UnknownOpError, match=message):
        Selector(selection, registry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):  # it is a ValueError too
        Selector(selection, registry)  # type: ignore[arg-type]


def test_conditions_must_be_predicates(registry: Registry) -> None:
    with pytest.raises(TypeError, match=r"the condition for 'mm' must be a predicate such as gemsmode.dtype\(torch.float16\)"):
        Selector({"mm": torch.float16}, registry)
    Selector({"mm": None, "bmm": ...}, registry)


@pytest.mark.parametrize(("packet", "names"), [
    ("add", ["add"]),
    ("add_", ["add_", "add"]),
    ("_softmax", ["_softmax", "softmax"]),
    ("_softmax_backward_data", ["_softmax_backward_data", "softmax_backward_data", "softmax_backward"]),
    ("native_layer_norm", ["native_layer_norm", "layer_norm"]),
    ("__ior__", ["__ior__", "__or__"]),
    ("_foreach_add_", ["_foreach_add_", "_foreach_add", "foreach_add_", "foreach_add"]),
])
def test_names_by_which_an_op_is_meant(packet: str, names: list[str]) -> None:
    assert list(names_of(packet)) == names
