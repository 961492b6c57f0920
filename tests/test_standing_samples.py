"""Shapes, layouts and values that break kernels, for every op that a rule serves.

Elementwise ops are called on shapes of their own; the calls of other ops are OpInfo's, laid out anew in memory: what a
call means stays the same, so every family is tested without a line of its own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import torch
from harness import Failures, Template, check_call, parameters, served, tensor
from torch._ops import OpOverload

from gemsmode.registry import short_name

POINTWISE = sorted(harness.pointwise_bases(), key=str)
EVERY = sorted(harness.bases(), key=str)
OTHERS = [op for op in EVERY if op not in harness.pointwise_bases()]
INPLACE = [op for op in sorted(served(), key=str) if op._schema.is_mutable and not any(p.is_out for p in parameters(op))
           and any(c.variant is not None and c.variant.inplace and c.variant.base in harness.pointwise_bases() for c in served()[op])]

DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)

NOT_INTERCEPTED: dict[str, str] = {
    "convolution": "the windows of its samples overlap, which is cuDNN's; test_convolution has those that are served",
    "_foreach_norm.Scalar": "its samples of float32 ask for norms in float64; test_foreach has those that are served",
}
"""Ops of which no call here can be served, and why."""


def dtypes_for(op: OpOverload) -> list[torch.dtype]:
    """float32 and, unless all are asked for, another that depends on the op's name only."""
    if harness.OPTIONS.full:
        return [torch.float32, *DTYPES]
    other = DTYPES[zlib.crc32(str(op).encode()) % len(DTYPES)]
    if harness.OPTIONS.brief:
        taken = [d for d in (torch.float32, torch.int64, *DTYPES) if d in harness.promoted_dtypes(op)]
        return list(dict.fromkeys((taken[0], taken[zlib.crc32(str(op).encode()) % len(taken)])))
    return [torch.float32, torch.bfloat16 if other == torch.float16 else other, torch.int64]


def template_for(op: OpOverload, dtype: torch.dtype) -> Template | None:
    """A call of ``op`` whose arguments other than tensors are worth keeping."""
    return next((t for t in harness.templates(op, dtype)), None)


def with_tensors(op: OpOverload, template: Template, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """``template``'s arguments with its tensors replaced, in order, by ``tensors`` (in its tensors' own dtypes)."""
    given = iter(tensors)

    def replaced(old: Any) -> Any:
        if not isinstance(old, torch.Tensor):
            return old
        new = next(given)
        return new if new.dtype == old.dtype else new.to(old.dtype)

    return tuple(replaced(a) for a in template.args)


def count_tensors(template: Template) -> int:
    return sum(isinstance(a, torch.Tensor) for a in template.args)


def only_plain_tensors(op: OpOverload) -> bool:
    return all(not p.is_tensor_list for p in parameters(op))


def without_zero_divisors(op: OpOverload, operands: list[torch.Tensor]) -> None:
    """On a GPU the result of an integer division by zero is whatever the kernel leaves: zeros among the divisors become ones,
    in the memory behind the views, whatever their layout."""
    if harness.OPTIONS.device != "cuda" or op._schema.name.partition("::")[2].strip("_") not in DIVISIONS:
        return
    for divisor in operands[1:]:
        if not divisor.is_floating_point():
            memory = divisor.as_strided((divisor.untyped_storage().nbytes() // divisor.element_size(),), (1,), 0)
            memory[memory == 0] = 1


def finish(op: OpOverload, failures: Failures, intercepted: int) -> None:
    failures.done()
    name = short_name(op)
    if name not in NOT_INTERCEPTED:
        assert intercepted, f"no call was intercepted:\n  {harness.reasons([op])}"


def skip_crashes(op: OpOverload) -> None:
    if (why := harness.NATIVE_CRASHES.get(short_name(op))) is not None and harness.OPTIONS.device == "cuda":
        pytest.skip(why)


# -- shapes ------------------------------------------------------------------------------------------------------------


def sliced(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    """Gaps between the elements and a storage offset that no vector load is aligned to."""
    x = tensor((*shape[:-1], shape[-1] * 2 + 1), dtype, start)
    return x[..., 1::2]


def permuted(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    order = [*range(1, len(shape), 2), *range(0, len(shape), 2)]
    x = tensor([shape[d] for d in order], dtype, start)
    return x.permute([order.index(d) for d in range(len(shape))])


def offset(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    n = math.prod(shape)
    return tensor((n + 1,), dtype, start)[1:].view(tuple(shape))


def expanded(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    return tensor((1, *shape[1:]), dtype, start).expand(tuple(shape))


def channels_last(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    return tensor(shape, dtype, start).contiguous(memory_format=torch.channels_last)


Make = Callable[[Sequence[int], torch.dtype, int], torch.Tensor]

SHAPES: dict[str, tuple[tuple[Make, tuple[int, ...]], ...]] = {
    # one maker and shape an operand; the last serves all further operands
    "empty": ((tensor, (0,)),),
    "empty in the middle": ((tensor, (3, 0, 5)), (tensor, (1, 5))),
    "0-dim": ((tensor, ()),),
    "0-dim beside 1-dim": ((tensor, ()), (tensor, (4,))),
    "1-dim beside 0-dim": ((tensor, (4,)), (tensor, ())),
    "one element": ((tensor, (1,)),),
    "one element of three dimensions": ((tensor, (1, 1, 1)), (tensor, (1,))),
    "odd": ((tensor, (3, 5, 7)),),
    "a prime": ((tensor, (1031,)),),
    "row": ((tensor, (33, 65)), (tensor, (65,))),
    "column": ((tensor, (33, 65)), (tensor, (33, 1))),
    "outer": ((tensor, (33, 1)), (tensor, (1, 65))),
    "outer of three dimensions": ((tensor, (3, 1, 5)), (tensor, (4, 1))),
    "transposed": ((permuted, (33, 65)),),
    "transposed beside dense": ((tensor, (33, 65)), (permuted, (33, 65))),
    "sliced": ((sliced, (33, 17)), (tensor, (33, 17))),
    "sliced on both sides": ((sliced, (9, 17)),),
    "unaligned": ((offset, (33, 64)),),
    "unaligned beside aligned": ((tensor, (33, 64)), (offset, (33, 64))),
    "expanded": ((tensor, (33, 17)), (expanded, (33, 17))),
    "expanded on both sides": ((expanded, (33, 17)),),
    "channels_last": ((channels_last, (2, 3, 5, 7)),),
    "channels_last beside contiguous": ((channels_last, (2, 3, 5, 7)), (tensor, (2, 3, 5, 7))),
    "channels_last and channels": ((channels_last, (2, 3, 5, 7)), (tensor, (3, 1, 1))),
    "five dimensions": ((permuted, (2, 3, 2, 3, 5)), (sliced, (2, 3, 2, 3, 5))),
    "six dimensions": ((permuted, (2, 3, 2, 3, 2, 3)), (sliced, (2, 3, 2, 3, 2, 3))),
    "six dimensions, broadcast": ((sliced, (2, 1, 2, 3, 1, 3)), (permuted, (2, 3, 1, 3, 2, 3))),
}


BRIEF = {"empty in the middle", "0-dim beside 1-dim", "transposed beside dense", "sliced", "channels_last and channels",
         "six dimensions, broadcast"}
"""What a brief run takes of the shapes: one for each way through the kernels, and the strides that need most thought."""


def is_wanted(position: int, name: str, dtype_number: int, op: OpOverload) -> bool:
    """All shapes in float32 and a quarter of them in other dtypes; in a brief run some in float32 and one in another."""
    if harness.OPTIONS.full:
        return True
    turn = position + dtype_number + zlib.crc32(str(op).encode())
    if harness.OPTIONS.brief:
        return turn % len(SHAPES) == 0 or (not dtype_number and name in BRIEF)
    return not dtype_number or turn % 4 == 0


@pytest.mark.parametrize("op", POINTWISE, ids=short_name)
def test_shapes(op: OpOverload) -> None:
    if (why := UNRELATED.get(op._schema.name.partition("::")[2])) is not None:
        pytest.skip(why)
    failures, intercepted = Failures(), 0
    for number, dtype in enumerate(dtypes_for(op)):
        template = template_for(op, dtype)
        if template is None or not only_plain_tensors(op):
            continue
        for position, (name, makers) in enumerate(SHAPES.items()):
            if not is_wanted(position, name, number, op):
                continue
            operands = [make(shape, dtype, 31 * i) for i, (make, shape) in
                        enumerate(makers[min(j, len(makers) - 1)] for j in range(count_tensors(template)))]
            without_zero_divisors(op, operands)
            args = with_tensors(op, template, operands)

            def check(args: tuple[Any, ...] = args) -> None:
                nonlocal intercepted
                intercepted += check_call(op, args)

            failures.check(name, check)
    finish(op, failures, intercepted)


# -- values ------------------------------------------------------------------------------------------------------------


def special(dtype: torch.dtype) -> torch.Tensor:
    """Extremes, infinities, NaN, zeros of both signs, the smallest numbers, halves and the places where maths has kinks."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.tensor([info.min, info.min + 1, -1 if info.min else 0, 0, 1, 2, 3, 7, info.max - 1, info.max], dtype=dtype)
    finfo = torch.finfo(dtype)
    values = [math.nan, math.inf, -math.inf, finfo.max, finfo.min, finfo.tiny, -finfo.tiny, finfo.smallest_normal / 4, finfo.eps,
              0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, 2.5, 3.0, -3.0, 6.0, 10.0, -10.0, 20.0, 88.0, -88.0, 90.0, -104.0, 1e4, -1e4]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


UNDEFINED: dict[str, str] = {
    "_to_copy": "C++ leaves the conversion of NaN and of out-of-range numbers to integers undefined",
    "copy_": "as _to_copy", "copy": "as _to_copy",
    "gcd": "the absolute value of the smallest integer overflows",
    "lcm": "the absolute value of the smallest integer overflows",
    "log_sigmoid_backward": "its buffer is the forward's on a CPU and ignored on a GPU",
    "special_airy_ai": "no digits are left of the phase", "special_bessel_j0": "as special_airy_ai",
    "special_bessel_j1": "as special_airy_ai",
    "special_bessel_y0": "as special_airy_ai", "special_bessel_y1": "as special_airy_ai",
    "igamma": "PyTorch's expansions overflow for the largest numbers", "igamma_": "as igamma",
    "igammac": "as igamma", "igammac_": "as igamma",
    **{f"special_{name}": "PyTorch returns a variable that it has not set, if x is NaN" for name in (
        *(f"{shift}chebyshev_polynomial_{kind}" for shift in ("", "shifted_") for kind in "tuvw"),
        "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p")},
}
"""Ops whose results for extremal values are not PyTorch's to promise, and why."""

ON_CPU_ONLY: dict[str, str] = {
    # PyTorch's vectorized CPU kernels differ from its GPU kernels, which the rules follow
    "softshrink_backward": "NaN counts as inside of the threshold on a CPU", "hardshrink_backward": "as softshrink_backward",
    "hardtanh_backward": "as softshrink_backward", "hardswish_backward": "blends instead of branching, so that 0 * inf is NaN",
    "mish_backward": "blends instead of branching", "elu_backward": "NaN counts as negative on a CPU",
    "_add_relu": "clamps to the largest finite number",
    "remainder": "the vectorized fmod of float64 is NaN for quotients beyond 2^53",
}
"""Ops whose extremal values are compared on a GPU only, and why."""

UNRELATED: dict[str, str] = {
    "log_sigmoid_backward": "its buffer is the forward's on a CPU",
}
"""Ops whose tensors cannot be chosen independently, and why."""

DIVISIONS = {"div", "true_divide", "floor_divide", "remainder", "fmod", "gcd", "lcm"}
"""Ops of integers where PyTorch's CPU kernels end the process on the smallest integer divided by -1, and where it leaves
open what a GPU makes of a division by 0."""


@pytest.mark.parametrize("op", POINTWISE, ids=short_name)
def test_extremal_values(op: OpOverload) -> None:
    """Every pair of special values meets."""
    name = op._schema.name.partition("::")[2]
    if name in UNDEFINED or (name in ON_CPU_ONLY and harness.OPTIONS.device == "cpu"):
        pytest.skip(UNDEFINED.get(name) or ON_CPU_ONLY[name])
    failures, intercepted = Failures(), 0
    for dtype in dtypes_for(op):
        template = template_for(op, dtype)
        if template is None or not only_plain_tensors(op):
            continue
        values = special(dtype).to(harness.OPTIONS.device)
        if not dtype.is_floating_point and op._schema.name.partition("::")[2].strip("_") in DIVISIONS:
            values = values[(values != -1) & (values != 0) & (values != values.min())]
        n = len(values)
        first = values[:, None].expand(n, n).contiguous()
        others = [values[None, :].expand(n, n).contiguous(), values.flip(0)[None, :].roll(n // 2).expand(n, n).contiguous()]
        count = count_tensors(template)
        operands = ([first] + others * 3)[:count] if count > 1 else [values]
        args = with_tensors(op, template, operands)

        def check(args: tuple[Any, ...] = args) -> None:
            nonlocal intercepted
            intercepted += check_call(op, args)

        failures.check(f"special values of {str(dtype).removeprefix('torch.')}", check)
    failures.done()
    if not intercepted:
        pytest.skip(f"PyTorch takes none of these calls, or a rule declines them:\n  {harness.reasons([op])}")


# -- layouts of any op's calls -----------------------------------------------------------------------------------------


def relaid_transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x


def relaid_sliced(x: torch.Tensor) -> torch.Tensor:
    if not x.ndim:
        return x
    room = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 1), 7, device=x.device).to(x.dtype)
    view = room[..., 1::2]
    view.copy_(x)
    return view


def relaid_offset(x: torch.Tensor) -> torch.Tensor:
    room = torch.full((x.numel() + 1,), 7, device=x.device).to(x.dtype)
    view = room[1:].view(x.shape)
    view.copy_(x)
    return view


def relaid_expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape) if x.ndim and x.shape[0] > 1 else x


def dense(x: Any) -> Any:
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x


def relaid_last(x: torch.Tensor) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


LAYOUTS = {"transposed": relaid_transposed, "sliced": relaid_sliced, "unaligned": relaid_offset, "expanded": relaid_expanded,
           "channels_last": relaid_last}

_EVERYWHERE, _ON_GPU, _ON_CPU = ("cpu", "cuda"), ("cuda",), ("cpu",)

OF_CONTIGUOUS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    # op: where, in which layouts, why
    "adaptive_max_pool3d_backward": (_EVERYWHERE, tuple(LAYOUTS), "PyTorch's kernels read the indices as if they were contiguous"),
    "fractional_max_pool2d_backward": (_ON_CPU, tuple(LAYOUTS), "as adaptive_max_pool3d_backward"),
    "fractional_max_pool3d_backward": (_ON_CPU, tuple(LAYOUTS), "as adaptive_max_pool3d_backward"),
    **{f"{name}attention_{way}": (_ON_GPU, ("unaligned",), "PyTorch's kernels load 16 bytes at once, wherever a tensor begins")
       for name in ("_efficient_", "_flash_", "_cudnn_") for way in ("forward", "backward")},
    **{f"_scaled_dot_product_{name}_attention{way}": (_ON_GPU, ("unaligned",), "as _efficient_attention_forward")
       for name in ("efficient", "flash", "cudnn") for way in ("", "_backward")},
}
"""Ops of which PyTorch's own results for contiguous copies of the tensors are what is expected, because its kernels are
wrong for other layouts or end in an error that the process does not survive."""

LEFT_OUT: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    # op and layout: where, why
    ("repeat_interleave.Tensor", "expanded"): (_ON_GPU, "output_size is no longer the sum of the repeats, which PyTorch asserts"),
    **{("_masked_scale", layout): (_ON_CPU, "PyTorch, to which the rule leaves it, has a kernel for GPUs only")
       for layout in ("transposed", "sliced", "expanded")},
    **{(f"masked_scatter{name}", "expanded"): (_ON_GPU, "the mask then asks for more elements than the source has, which PyTorch asserts")
       for name in ("", "_", ".out")},
    **{(f"index_copy{name}", "expanded"): (_ON_GPU, "several columns go to one place, and which of them stays is open")
       for name in ("", "_", ".out")},
}
"""Calls that mean something else in another layout, because values change with it, and that PyTorch leaves open or asserts."""


def wrong_on_gpu(op: OpOverload, layout: str, args: Sequence[Any]) -> bool:
    """Calls whose results by PyTorch's CUDA kernels are wrong.

    ``avg_pool2d_backward`` of channels_last tensors with a ``divisor_override`` (PyTorch 2.11): for windows of 3 at steps of 1
    around a gradient of [[1.25, 1], [1.25, 1]] in the corner and a divisor of 2 the corner's gradient is 4.5 / 2 = 2.25, also
    PyTorch's own for contiguous tensors; its channels_last kernel gives 1.25 / 2.
    """
    named = {p.name: a for p, a in zip(parameters(op), args)}
    return (harness.OPTIONS.device == "cuda" and short_name(op).startswith("avg_pool2d_backward") and layout == "channels_last"
            and named["divisor_override"] is not None)


@pytest.mark.parametrize("op", EVERY if harness.OPTIONS.full else OTHERS, ids=short_name)
def test_layouts(op: OpOverload) -> None:
    """OpInfo's calls with all tensors, and with only the first, laid out in other ways. (:data:`SHAPES` has those of
    elementwise ops.)"""
    skip_crashes(op)
    here, name_of_op = harness.OPTIONS.device, short_name(op)
    places, contiguous_for, _ = OF_CONTIGUOUS.get(name_of_op, ((), (), ""))
    failures, intercepted, ran = Failures(), 0, 0
    for dtype in (torch.float32, torch.int64, torch.bool):
        found = [t for t in harness.templates(op, dtype) if harness.elements(t.args) > 1]
        if not found or (intercepted and not harness.OPTIONS.full):
            continue
        found = harness.thin(sorted(found, key=lambda t: -max(a.ndim for a in harness.tree_leaves(t.args) if isinstance(a, torch.Tensor))),
                             12, lambda t: harness.elements(t.args))
        for number, template in enumerate(found):
            if intercepted and not harness.OPTIONS.full and (harness.OPTIONS.brief or number >= 2):
                break
            for name, relaid in LAYOUTS.items():
                if here in LEFT_OUT.get((name_of_op, name), ((), ""))[0] or wrong_on_gpu(op, name, template.args):
                    continue
                for which in ("all", "the first") if harness.OPTIONS.full or not (number or harness.OPTIONS.brief) else ("all",):
                    seen = False

                    def change(a: Any, relaid: Any = relaid, which: str = which) -> Any:
                        nonlocal seen
                        if not isinstance(a, torch.Tensor) or (which == "the first" and seen):
                            return a
                        seen = True
                        return relaid(a)

                    args = harness.tree_map(change, template.args)
                    if all(a is b for a, b in zip(harness.tree_leaves(args), harness.tree_leaves(template.args))):
                        continue
                    ran += 1
                    given = harness.tree_map(dense, args) if here in places and name in contiguous_for else None

                    def check(args: tuple[Any, ...] = args, given: tuple[Any, ...] | None = given) -> None:
                        nonlocal intercepted
                        intercepted += check_call(op, args, given=given)

                    failures.check(f"{which} {name}", check)
    if not ran:
        pytest.skip("no call of this op has a tensor of several elements")
    if harness.OPTIONS.brief and not intercepted:
        failures.done()
        pytest.skip("the rules leave the few calls of this run to PyTorch; test_overload looks for others")
    finish(op, failures, intercepted)


_PROBABILITIES = "PyTorch's GPU kernels assert that probabilities lie between 0 and 1"

ASSERTED_FINITE: dict[str, str] = {
    **dict.fromkeys(("bernoulli", "bernoulli.Tensor", "multinomial", "binary_cross_entropy"), _PROBABILITIES),
    "poisson": "PyTorch's GPU kernel asserts that rates are not negative, and does not end for an infinite one",
}
"""Ops whose first tensor must be finite on a GPU: an assertion in a kernel ends every later call of the process, too."""


INFINITE_ON_CPU_ONLY: dict[str, str] = {
    **dict.fromkeys(("_fused_rms_norm", "rms_norm"),
                    "PyTorch's CUDA kernel gives NaN for the whole row, its CPU kernel and the formula 0 for what is finite"),
    "native_layer_norm": "the mean of a row with an infinity is infinite or NaN in PyTorch's CUDA kernels, as the row's length decides",
    "native_group_norm_backward": "inf - inf: PyTorch's CUDA kernels add up in another order than ours, and get NaN elsewhere",
}
"""Ops whose results for infinities are compared on a CPU only, and why."""


@pytest.mark.parametrize("op", OTHERS, ids=short_name)
@pytest.mark.parametrize("value", [math.nan] if harness.OPTIONS.brief else [math.nan, math.inf, -math.inf], ids=str)
def test_non_finite_values(op: OpOverload, value: float) -> None:
    """OpInfo's calls with one non-finite number in the first floating-point tensor."""
    skip_crashes(op)
    if (why := ASSERTED_FINITE.get(short_name(op))) is not None and harness.OPTIONS.device == "cuda":
        pytest.skip(why)
    if (why := INFINITE_ON_CPU_ONLY.get(short_name(op))) is not None and math.isinf(value) and harness.OPTIONS.device == "cuda":
        pytest.skip(why)
    failures, ran = Failures(), 0
    dtypes, count = ((torch.float32,), 1) if harness.OPTIONS.brief else ((torch.float32, torch.bfloat16), 3)
    for dtype in dtypes:
        several = [t for t in harness.templates(op, dtype) if harness.elements(t.args) > 1]
        for template in harness.thin(several, count, lambda t: harness.elements(t.args)):
            args = harness.own_memory(template.args)
            tensors = [a for a in harness.tree_leaves(args) if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()]
            first = tensors[0] if tensors else None
            if first is None or harness.gemsmode.TensorMeta.of(first).may_overlap_itself:
                continue
            place = tuple(s // 2 for s in first.shape)
            first[place] = value
            if short_name(op) in ("max_unpool2d", "max_unpool3d"):
                # Of several elements with the same index any may be the one that is written: they must stay equal.
                first[args[1] == args[1][place]] = value
            ran += 1

            def check(args: tuple[Any, ...] = args) -> None:
                check_call(op, args)

            failures.check(str(value), check)
    failures.done()
    if not ran:
        pytest.skip("no call of this op has a floating-point tensor")


# -- in-place through views --------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x[:2], "columns": lambda x: x[:, ::2], "transposed": lambda x: x.t(), "inner": lambda x: x[1:-1, 3:-1],
    "one": lambda x: x[2:3, 4], "none": lambda x: x[:0],
}


@pytest.mark.parametrize("op", INPLACE, ids=short_name)
def test_inplace_through_views(op: OpOverload) -> None:
    """``a[:2] *= 3``: the view changes, the memory around it does not."""
    if op._schema.name == "aten::_add_relu_" and harness.OPTIONS.device == "cuda":
        pytest.skip("PyTorch's CUDA kernel gives a view that is not dense new memory instead of writing into it")
    failures, intercepted = Failures(), 0
    for dtype in dtypes_for(op):
        template = template_for(op, dtype)
        if template is None or not only_plain_tensors(op):
            continue
        for name, view in VIEWS.items():
            if harness.OPTIONS.brief and name not in ("columns", "inner"):
                continue
            written = view(tensor((6, 11), dtype))
            others = [tensor(written.shape, dtype, 100 + i) for i in range(count_tensors(template) - 1)]
            without_zero_divisors(op, [written, *others])
            args = with_tensors(op, template, [written, *others])

            def check(args: tuple[Any, ...] = args) -> None:
                nonlocal intercepted
                intercepted += check_call(op, args)

            failures.check(name, check)
    finish(op, failures, intercepted)
