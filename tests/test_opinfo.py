"""Every op that a rule serves, on PyTorch's own sample inputs: forward, backward, in-place, ``out=`` and every overload.

Each test asserts that a rule ran: one whose samples all passed through to PyTorch would prove nothing.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import Case, Failures, cases, compare, dtypes_of, quietly, samples, served, tally, under_mode
from torch._ops import OpOverload

from gemsmode.registry import short_name

UNREACHED: dict[str, str] = {
    "_is_a*_true": "test_reduction", "_cum*_helper": "test_scan", "_logcumsumexp*": "test_scan",
    "_scaled_dot_product_*": "test_attention", "detach_copy*": "test_movement", "randint_like*": "test_random",
}
"""Overloads for which no call can be made from any OpInfo or from the schema, and the tests that call them by another name
than their own (:func:`named_in` finds those that use it)."""


@functools.cache
def named_in(op: OpOverload) -> str | None:
    """The test file that names ``op``, of those that are not generated."""
    name = re.compile(rf"\b{re.escape(op._schema.name.partition('::')[2])}\b")
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name not in ("test_opinfo.py", "test_standing_samples.py", "test_compile.py") and name.search(path.read_text()):
            return path.stem
    return None


NEVER_INTERCEPTED: dict[str, str] = {
}
"""Overloads that a rule may serve by the schema but that no sample here can make it serve, and why."""


def is_foreach(case: Case) -> bool:
    """Their in-place variants return nothing and Python has no ``out=`` for them: test_overload calls them."""
    return case.info.name.startswith("_foreach")


def describe_sample(sample: Any) -> str:
    parts = [sample.input, *sample.args, *(f"{k}={v}" for k, v in sample.kwargs.items())]
    return ", ".join(str(harness.gemsmode.TensorMeta.of(p)) if isinstance(p, torch.Tensor) else str(p)[:60] for p in parts)


def comparable(info: Any) -> bool:
    """Whether the results are values that two runs share."""
    ops = harness.reach()[info_name(info)]
    drawn = any(isinstance(op, OpOverload) and harness.is_random(op) and op in served() for op in ops.forward | ops.inference)
    return not drawn and info.name.rpartition(".")[2] not in harness.VALUES_NOT_COMPARED


def info_name(info: Any) -> str:
    return next(name for name, other in harness.opinfos().items() if other is info)


def unless_brief(items: Any) -> list[Any]:
    """What a brief run leaves out, since :func:`test_overload` calls the same overloads."""
    return [] if harness.OPTIONS.brief else list(items)


def few(dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """The dtypes in which a default run tests variants."""
    return dtypes if harness.OPTIONS.full else [d for d in dtypes if d in (torch.float32, torch.bfloat16, torch.int64, torch.bool)]


def kind_for(case: Case) -> str:
    own = [op for op in harness.reach()[case.name].forward if isinstance(op, OpOverload)]
    kinds = {harness.kind_of(op) for op in case.targets}
    return kinds.pop() if len(own) <= 1 and len(kinds) == 1 else "reduction"


PASSING: dict[str, str] = {
    "as_strided_copy": "its samples give an offset into the storage, which no rule serves; test_overload calls it without",
    "as_strided_scatter": "as as_strided_copy",
    "_foreach_norm": "its samples ask for orders and dtypes of the result that no rule serves; test_overload has those that are served",
    **{f"nn_functional_conv{kind}": "transposed convolutions, and those of volumes, are cuDNN's"
       for kind in ("3d", "_transpose1d", "_transpose2d", "_transpose3d")},
    "nn_functional_conv2d": "its windows overlap, which is cuDNN's; test_convolution has those that are served",
}
"""OpInfos none of whose samples a rule serves, and why."""


def finish(case: Case, failures: Failures, intercepted: int, met: set[str]) -> None:
    """The end of a test; ``met``: why calls of its ops passed through (nothing, if none was called at all)."""
    failures.done()
    if case.name in PASSING and not intercepted:
        pytest.skip(PASSING[case.name])
    if not intercepted and harness.OPTIONS.brief:
        pytest.skip("the rules leave the few samples of this run to PyTorch; test_overload looks for others")
    if not intercepted and all("complex" in reason for reason in met):
        pytest.skip("the samples of this run reach these ops with complex tensors, or not at all; test_overload calls them")
    assert intercepted, f"no sample was intercepted:\n  {harness.reasons(case.targets)}"


def run_forward(case: Case, context: Any = torch.no_grad) -> None:
    info, failures, intercepted, met = case.info, Failures(), 0, set()
    kind, values = kind_for(case), comparable(info)
    for dtype in dtypes_of(info):
        for sample in samples(info, dtype):
            def call(tree: Any) -> Any:
                given, args, kwargs = tree
                with context():
                    return info(given, *args, **kwargs)

            tree = (sample.input, sample.args, sample.kwargs)
            try:
                expected = quietly(call, harness.own_memory(tree))
            except Exception:
                continue  # PyTorch has no implementation of this sample here

            def check(tree: Any = tree, expected: Any = expected) -> None:
                nonlocal intercepted
                outcome = under_mode(call, harness.own_memory(tree))
                intercepted += outcome.intercepted(case.targets)
                met.update(d.reason or d.kind for op, d in outcome.calls if op in case.targets and d.kind != "rule")
                tally(outcome.calls)
                exact = harness.reference(call, tree) if values else None
                if info.name in harness.TIES and isinstance(expected, tuple):
                    mine, theirs = outcome.result[0], expected[0]
                    if info.name == "mode":
                        compare("values", mine, theirs, None, kind, values=False)
                        given, args, kwargs = tree
                        dim = args[0] if args else kwargs.get("dim", -1)
                        mine, theirs = (harness.how_often(given, dim, v) for v in (mine, theirs))
                    compare("values", mine, theirs, None, kind)
                    compare("indices", outcome.result[1], expected[1], None, kind, values=False)  # test_overload follows them
                else:
                    compare("result", outcome.result, expected, exact, kind, values=values)

            failures.check(f"{info.name}({describe_sample(sample)})", check)
    finish(case, failures, intercepted, met)


@pytest.mark.parametrize("case", cases("forward"), ids=str)
def test_forward(case: Case) -> None:
    run_forward(case)


@pytest.mark.parametrize("case", cases("inference"), ids=str)
def test_inference_mode(case: Case) -> None:
    run_forward(case, torch.inference_mode)


@pytest.mark.parametrize("case", cases("backward"), ids=str)
def test_backward(case: Case) -> None:
    """Gradients through autograd, forward and backward under the mode."""
    info, failures, intercepted, met = case.info, Failures(), 0, set()
    values, kind = comparable(info), "amplified" if info.name in harness.AMPLIFIED else "reduction"
    for dtype in dtypes_of(info, grad=True):
        for sample in samples(info, dtype, grad=True, cap=None if harness.OPTIONS.full else 3):
            def gradients(tree: Any, process: Any = sample.output_process_fn_grad) -> Any:
                given, args, kwargs = tree
                out = process(info(given, *args, **kwargs))
                return harness.gradients(out, harness.differentiable(tree))

            tree = (sample.input, sample.args, sample.kwargs)
            if not harness.differentiable(tree):
                continue
            try:
                # Under any dispatch mode autograd sums gradients into new tensors, whose strides may be others.
                with harness.Names():
                    expected = quietly(gradients, harness.own_memory(tree))
            except Exception:
                continue

            def check(tree: Any = tree, expected: Any = expected, gradients: Any = gradients) -> None:
                nonlocal intercepted
                outcome = under_mode(gradients, harness.own_memory(tree))
                intercepted += outcome.intercepted(case.targets)
                met.update(d.reason or d.kind for op, d in outcome.calls if op in case.targets and d.kind != "rule")
                tally(outcome.calls)
                if info.name in (*harness.TIES, "msort"):  # which of equal values a gradient goes to is open
                    compare("gradient", outcome.result, expected, None, kind, values=False)
                    compare("gradients in order", in_order(outcome.result), in_order(expected), None, kind)
                    return
                exact = harness.reference(gradients, tree) if values else None
                compare("gradient", outcome.result, expected, exact, kind, values=values)

            failures.check(f"{info.name}({describe_sample(sample)})", check)
    finish(case, failures, intercepted, met)


def in_order(tree: Any) -> list[Any]:
    """The values of each tensor, sorted."""
    return [t.detach().flatten().sort().values for t in harness.tree_leaves(tree) if isinstance(t, torch.Tensor)]


IN_PLACE = unless_brief(c for c in cases("forward") if c.info.inplace_variant is not None and not is_foreach(c))


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_inplace(case: Case) -> None:
    """``x.op_(...)``: the same object comes back, with PyTorch's values; what PyTorch rejects stays rejected."""
    info, failures, ran = case.info, Failures(), 0
    variant, kind, values = info.inplace_variant, kind_for(case), comparable(info)
    for dtype in few(dtypes_of(info)):
        for sample in samples(info, dtype, cap=None if harness.OPTIONS.full else 3):
            def call(tree: Any) -> Any:
                given, args, kwargs = tree
                with torch.no_grad():
                    return variant(given, *args, **kwargs)

            tree = (sample.input, sample.args, sample.kwargs)
            error: Exception | None = None
            expected: Any = None
            theirs = harness.own_memory(tree)
            try:
                expected = quietly(call, theirs)
            except Exception as raised:
                error = raised
            ran += 1
            wrote = theirs[0]._version

            def check(tree: Any = tree, expected: Any = expected, error: Exception | None = error, wrote: int = wrote) -> None:
                mine = harness.own_memory(tree)
                if error is not None:
                    with pytest.raises(type(error)):
                        under_mode(call, mine)
                    return
                outcome = under_mode(call, mine)
                tally(outcome.calls)
                assert outcome.result is mine[0], "another tensor came back"
                assert bool(mine[0]._version) == bool(wrote), f"the version counter is at {mine[0]._version}, PyTorch's at {wrote}"
                exact = harness.reference(call, tree) if values else None
                compare("result", outcome.result, expected, exact, kind, values=values)

            failures.check(f"{info.name}_({describe_sample(sample)})", check)
    failures.done()
    if not ran:
        pytest.skip("no samples")


OUT_OF_PYTORCH: dict[str, str] = {
    "linalg_matrix_rank": "under any dispatch mode PyTorch leaves its out= unwritten",
    "narrow_copy": "PyTorch's CPU kernel writes to a strided out= as if it were contiguous",
}
"""OpInfos whose ``out=`` is no reference, and why."""


WITH_OUT = unless_brief(c for c in cases("forward") if c.info.supports_out and not is_foreach(c))


@pytest.mark.parametrize("case", WITH_OUT, ids=str)
def test_out(case: Case) -> None:
    """``out=``: of the right layout, empty (PyTorch resizes it), with other strides, and of another dtype."""
    if case.name in OUT_OF_PYTORCH:
        pytest.skip(OUT_OF_PYTORCH[case.name])
    info, failures, ran = case.info, Failures(), 0
    kind, values = kind_for(case), comparable(info)
    for dtype in few(dtypes_of(info)):
        for number, sample in enumerate(samples(info, dtype, cap=None if harness.OPTIONS.full else 2)):
            tree = (sample.input, sample.args, sample.kwargs)

            def plain(tree: Any) -> Any:
                given, args, kwargs = tree
                with torch.no_grad():
                    return info(given, *args, **kwargs)

            try:
                results = quietly(plain, harness.own_memory(tree))
            except Exception:
                continue
            several = isinstance(results, tuple) and all(isinstance(r, torch.Tensor) for r in results)
            if not isinstance(results, torch.Tensor) and not several:
                continue
            for way in WAYS if harness.OPTIONS.full else (WAYS[0], WAYS[1 + number % (len(WAYS) - 1)]):
                def call(tree: Any, way: Any = way, results: Any = results) -> Any:
                    given, args, kwargs = tree
                    out = way(results) if isinstance(results, torch.Tensor) else tuple(way(r) for r in results)
                    with torch.no_grad():
                        returned = info(given, *args, **kwargs, out=out)
                    return returned, out

                error: Exception | None = None
                expected: Any = None
                try:
                    expected = quietly(call, harness.own_memory(tree))
                except Exception as raised:
                    error = raised
                ran += 1

                def check(tree: Any = tree, call: Any = call, expected: Any = expected, error: Any = error,
                          results: Any = results, plain: Any = plain) -> None:
                    if error is not None and not (harness.OPTIONS.device == "cuda" and info.name in OUT_REFUSED_ON_GPU):
                        with pytest.raises(type(error)):
                            under_mode(call, harness.own_memory(tree))
                        return
                    if error is not None:
                        try:
                            outcome = under_mode(call, harness.own_memory(tree))
                        except type(error):
                            return
                        tally(outcome.calls)
                        for got, wanted in zip(harness.tree_leaves(outcome.result[1]), harness.tree_leaves(results), strict=True):
                            low = wanted.to(got.dtype)
                            compare("out", got.contiguous(), low.contiguous(), None, kind)
                        return
                    outcome = under_mode(call, harness.own_memory(tree))
                    tally(outcome.calls)
                    # A wider out= may show more of the result than its own dtype has; that is no error.
                    narrow = [r.dtype for r in harness.tree_leaves(results)]
                    exact = harness.reference(plain, tree) if values and isinstance(results, torch.Tensor) else None
                    for part, got, wanted in zip(("result", "out"), outcome.result, expected):
                        for a, b, dtype in zip(harness.tree_leaves(got), harness.tree_leaves(wanted), narrow):
                            open_ties = info.name in harness.TIES and dtype == torch.int64 and b is harness.tree_leaves(wanted)[-1]
                            compare_out(part, a, b, dtype, kind, values and not open_ties, exact)

                failures.check(f"{info.name}({describe_sample(sample)}, out={way.__name__})", check)
    failures.done()
    if not ran:
        pytest.skip("no samples")


OUT_REFUSED_ON_GPU = {"native_batch_norm": "PyTorch's CUDA kernel (2.11) refuses some out= that its other kernels convert to"}
"""Ops whose rule may fill an out= on a GPU where PyTorch raises: what it fills in is compared with the call without out=."""


def compare_out(part: str, got: Any, native: Any, dtype: torch.dtype, kind: str, values: bool, exact: Any) -> None:
    if native is None:  # what ops of a list of results return where out= is given
        assert got is None, f"{part}: {got!r}, PyTorch None"
        return
    compare(part, got, native, None, kind, values=False)
    if values and native.dtype == torch.float64 and dtype.is_floating_point:
        compare(part, got.to(dtype), native.to(dtype), exact, kind)
    elif values:
        compare(part, got, native, exact, kind)


def same(result: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device).fill_(1)


def empty(result: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=result.dtype, device=result.device)


def gapped(result: torch.Tensor) -> torch.Tensor:
    return torch.zeros((*result.shape, 3), dtype=result.dtype, device=result.device)[..., 1]


def wider(result: torch.Tensor) -> torch.Tensor:
    return torch.zeros(result.shape, dtype=torch.promote_types(result.dtype, torch.float64), device=result.device)


def narrower(result: torch.Tensor) -> torch.Tensor:
    return torch.zeros(result.shape, dtype=torch.int32, device=result.device)


WAYS = (same, gapped, empty, wider, narrower)


TEMPLATE_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.float16, torch.int32, torch.uint8)


@pytest.mark.parametrize("op", sorted(served(), key=str), ids=short_name)
def test_overload(op: OpOverload) -> None:
    """Each overload called by itself: those that OpInfos reach and those that are derived from them."""
    if (why := harness.NATIVE_CRASHES.get(short_name(op))) is not None and harness.OPTIONS.device == "cuda":
        pytest.skip(why)
    failures, intercepted, ran = Failures(), 0, 0
    brief, served_dtypes = harness.OPTIONS.brief, 0
    dtypes = TEMPLATE_DTYPES if harness.OPTIONS.full else TEMPLATE_DTYPES[:4]
    for dtype in harness.some(dtypes, short_name(op), len(dtypes)):
        if brief and served_dtypes == 2:
            break
        before = intercepted
        for template in harness.thin(harness.templates(op, dtype), 12 if brief else 2, lambda t: harness.elements(t.args)):
            if brief and intercepted > before:
                break
            ran += 1

            def check(template: Any = template) -> None:
                nonlocal intercepted
                intercepted += harness.check_call(op, template.args)

            failures.check(template.origin, check)
        served_dtypes += intercepted > before
    failures.done()
    name = short_name(op)
    if not ran:
        where = next((place for pattern, place in UNREACHED.items() if fnmatch.fnmatchcase(name, pattern)), None) or named_in(op)
        if where is None and brief:
            pytest.skip("no call could be made: `pytest --generated` fails here until UNREACHED says where else it is called")
        assert where is not None, "no OpInfo reaches this overload and none could be made from its schema"
        pytest.skip(f"called in {where}")
    if brief and not intercepted and (where := named_in(op)) is not None:
        pytest.skip(f"the rules leave the few calls of this run to PyTorch; {where} makes others")
    if name not in NEVER_INTERCEPTED:
        assert intercepted, f"no call was intercepted:\n  {harness.reasons([op])}"
