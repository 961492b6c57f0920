"""Fused ops: results and gradients against PyTorch's own ops in float64, registration, tracing, modes, and the kernels at GPU sizes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from gpu_sizes import compile_calls, on_gpu

import gemsmode
from gemsmode import GemsMode, registry
from gemsmode.handlers import Policy
from gemsmode.native import REFERENCES
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta
from gemsmode.target import Target

gemsmode.load_ops()

from gemsmode.ops import cross_entropy, fused, gates, linear, rotary, row_linear, skip_norm  # noqa: E402  (they need what load_ops arranges)
from gemsmode.ops import topk_softmax as experts  # noqa: E402

BF16, F16, F32, F64, I64 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64
DTYPES = (F64, BF16, F32, F16) if harness.OPTIONS.full or harness.OPTIONS.device == "cuda" else (F64, BF16)
TOLERANCE = {F32: 2e-6, F64: 1e-13, BF16: 8e-3, F16: 1e-3}
"""Of the largest value of a result: a few units in the last place."""


def names(value: Any) -> str:
    return str(value).removeprefix("torch.")


def numbers(*shape: int, dtype: torch.dtype = F32, device: str = "cpu", grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=F32).to(dtype).requires_grad_(grad)


def tensors(values: Any) -> list[torch.Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().to("cpu", F64).requires_grad_(value.requires_grad)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def close(got: torch.Tensor, expected: torch.Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    assert got.shape == expected.shape, what
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=0, atol=TOLERANCE[dtype or got.dtype] * max(scale, 1e-3) * 2,
                               equal_nan=True, msg=lambda text: f"{what}: {text}")


def check(function: Callable[..., Any], exact: Callable[..., Any], *args: Any, rules: tuple[str, ...] = ()) -> None:
    """``function`` agrees with ``exact`` in float64, gradients too, and under a mode its ops are served by ``rules``."""
    wide = [widened(a) for a in args]
    with GemsMode(trace=True, strict=True) as gems:
        results = tensors(function(*args))
        inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        outputs = [r for r in results if r.requires_grad]
        seeds = [torch.randn_like(r) for r in outputs]
        gradients = torch.autograd.grad(outputs, inputs, seeds) if inputs else ()
    expected = tensors(exact(*wide))
    assert len(results) == len(expected)
    for i, (mine, theirs) in enumerate(zip(results, expected)):
        close(mine, theirs.detach(), f"result {i}")
    if inputs:
        leaves = [w for w in wide if isinstance(w, torch.Tensor) and w.requires_grad]
        wanted = torch.autograd.grad([e for e in expected if e.requires_grad], leaves, [widened(s) for s in seeds])
        for i, (mine, theirs) in enumerate(zip(gradients, wanted)):
            close(mine, theirs, f"gradient {i}")
    served = decisions(gems)
    for rule in rules:
        assert served.get(f"gemsmode.{rule}") == "rule", served
    for mine, again in zip(results, tensors(function(*args))):
        close(again, widened(mine).detach(), "outside of the mode")


def decisions(gems: GemsMode) -> dict[str, str]:
    """What a tracing mode decided, by op."""
    return {record.overload.removesuffix(".default"): record.decision for record in gems.report.records}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


# -- norms -------------------------------------------------------------------------------------------------------------


def rms(x: torch.Tensor, shape: list[int], weight: Any, eps: Any) -> torch.Tensor:
    return F.rms_norm(x, shape, weight, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_norms(dtype: torch.dtype, device: str) -> None:
    make = functools.partial(numbers, dtype=dtype, device=device)
    x, r, w, b = make(3, 5, 24), make(3, 5, 24), make(24), make(24)
    check(lambda x, w: fused.rms_norm(x, (24,), w, 1e-5), lambda x, w: rms(x, [24], w, 1e-5), x, w, rules=("rms_norm", "norm_backward"))
    check(lambda x, r, w: fused.skip_rms_norm(x, r, 24, w, 1e-5), lambda x, r, w: (rms(x + r, [24], w, 1e-5), x + r), x, r, w,
          rules=("skip_rms_norm", "norm_backward"))
    check(lambda x, r, w, b: fused.skip_layer_norm(x, r, (24,), w, b, 1e-5), lambda x, r, w, b: F.layer_norm(x + r, (24,), w, b, 1e-5),
          x, r, w, b, rules=("skip_layer_norm", "norm_backward"))
    check(lambda x, r, w, b: fused.add_layer_norm(x, r, (24,), w, b), lambda x, r, w, b: (F.layer_norm(x + r, (24,), w, b), x + r),
          x, r, w, b, rules=("skip_layer_norm",))


def test_norms_of_several_dimensions_and_layouts(device: str) -> None:
    x, r = numbers(4, 3, 5, device=device).transpose(0, 1), numbers(3, 4, 1, device=device).expand(3, 4, 5)
    w = numbers(4, 5, device=device)
    check(lambda x, r, w: fused.skip_rms_norm(x, r, (4, 5), w, 1e-5), lambda x, r, w: (rms(x + r, [4, 5], w, 1e-5), x + r),
          x.detach().requires_grad_(), r.detach().requires_grad_(), w)
    check(lambda x: fused.rms_norm(x, (5,)), lambda x: F.rms_norm(x, (5,), None, torch.finfo(F32).eps), numbers(2, 5, device=device))
    assert fused.rms_norm(numbers(0, 5, device=device), 5).shape == (0, 5)


def test_norms_of_two_dtypes(device: str) -> None:
    """A float32 weight beside 16 bits, and a 16-bit addend of a float32 residual: the result has the sum's dtype."""
    x, r, w = numbers(4, 24, dtype=BF16, device=device), numbers(4, 24, device=device), numbers(24, device=device)
    y = fused.rms_norm(x, 24, w, 1e-5)
    assert y.dtype == BF16
    close(y, rms(widened(x), [24], widened(w), 1e-5), "rms_norm")
    y, total = fused.skip_rms_norm(x, r, 24, w, 1e-5)
    assert y.dtype == total.dtype == F32
    close(y, rms(widened(x) + widened(r), [24], widened(w), 1e-5), "skip_rms_norm")
    grads = torch.autograd.grad(y.sum(), (x, r, w))
    assert [g.dtype for g in grads] == [BF16, F32, F32]


def test_long_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for rows longer than a block, on short ones."""
    from gemsmode.ops import norm, rows

    monkeypatch.setattr(norm, "choose_tile", lambda *_: rows.Tile(2, 16, 4, True))
    monkeypatch.setattr(norm, "choose_runs", lambda r, *_: norm.Runs(4, 16, 4, 8, -(-r.n_rows // 8), fused=False))
    x, r, w, b = numbers(7, 75, device=device), numbers(7, 75, device=device), numbers(75, device=device), numbers(75, device=device)
    check(lambda x, r, w: fused.skip_rms_norm(x, r, 75, w, 1e-5), lambda x, r, w: (rms(x + r, [75], w, 1e-5), x + r), x, r, w)
    check(lambda x, r, w, b: fused.add_layer_norm(x, r, 75, w, b), lambda x, r, w, b: (F.layer_norm(x + r, (75,), w, b), x + r), x, r, w, b)
    y, total = x.detach().clone(), r.detach().clone()
    fused.fused_add_rms_norm(y, total, 75, w.detach(), 1e-5)
    close(y, rms(widened(x) + widened(r), [75], widened(w), 1e-5).detach(), "fused_add_rms_norm")
    close(total, (widened(x) + widened(r)).detach(), "the sum")


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_fused_add_rms_norm_writes_both(strided: bool, device: str) -> None:
    base = numbers(2, 4, 48, device=device, grad=False)
    x, r = (base[0, :, ::2], base[1, :, ::2]) if strided else (base[0, :, :24].contiguous(), base[1, :, :24].contiguous())
    w = numbers(24, device=device, grad=False)
    total = widened(x) + widened(r)
    between = base[:, :, 1::2].clone()
    a, b = fused.fused_add_rms_norm(x, r, (24,), w, 1e-5)
    assert a is x and b is r
    close(x, rms(total, [24], widened(w), 1e-5), "x")
    close(r, total, "residual")
    assert torch.equal(base[:, :, 1::2], between)


def test_fused_add_rms_norm_with_gradients(device: str) -> None:
    x, r, w = numbers(3, 8, device=device), numbers(3, 8, device=device), numbers(8, device=device)
    y, total = fused.fused_add_rms_norm(x * 1, r * 1, 8, w, 1e-5)
    got = torch.autograd.grad((y * 2 + total).sum(), (x, r, w))
    wide = [widened(t) for t in (x, r, w)]
    s = wide[0] + wide[1]
    expected = torch.autograd.grad((rms(s, [8], wide[2], 1e-5) * 2 + s).sum(), wide)
    for mine, theirs in zip(got, expected):
        close(mine, theirs, "gradient")


def test_fused_add_rms_norm_of_one_memory(device: str) -> None:
    """Both arguments in one place: as the separate ops do it."""
    x, w = numbers(3, 8, device=device, grad=False), numbers(8, device=device, grad=False)
    both, expected = x.clone(), x.clone()
    skip_norm.fused_add_rms_norm.op(both, both, [8], w, 1e-5)
    skip_norm.fused_add_rms_norm.reference(expected, expected, [8], w, 1e-5)
    torch.testing.assert_close(both, expected)


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_gates(dtype: torch.dtype, device: str) -> None:
    a, b = 3 * numbers(4, 33, dtype=dtype, device=device), numbers(4, 33, dtype=dtype, device=device)
    a = a.detach().requires_grad_()
    bias = numbers(33, dtype=dtype, device=device)
    check(fused.silu_and_mul, lambda a, b: F.silu(a) * b, a, b, rules=("silu_and_mul", "silu_and_mul_backward"))
    for form in ("none", "tanh"):
        check(lambda a, b, form=form: fused.gelu_and_mul(a, b, form), lambda a, b, form=form: F.gelu(a, approximate=form) * b, a, b,
              rules=("gelu_and_mul", "gelu_and_mul_backward"))
        check(lambda a, b, form=form: fused.add_bias_gelu(a, b, form), lambda a, b, form=form: F.gelu(a + b, approximate=form), a, bias,
              rules=("add_bias_gelu", "add_bias_gelu_backward"))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_linear_layers(dtype: torch.dtype, device: str) -> None:
    """In one kernel without a gradient, by two ops with one; the op itself is differentiable, too."""
    make = functools.partial(numbers, dtype=dtype, device=device)
    x, w, b = make(2, 5, 24), make(33, 24), make(33)
    for form, bias in itertools.product(("none", "tanh"), (b, None)):
        exact = functools.partial(linear.linear_gelu.reference, approximate=form)
        check(lambda *args, form=form: fused.linear_gelu(*args, approximate=form), exact, x.detach(), w.detach(),
              *([bias.detach()] if bias is not None else []), rules=("linear_gelu",))
        check(fused.linear, F.linear, x.detach(), w.detach(), *([bias.detach()] if bias is not None else []), rules=("linear",))
    with GemsMode(trace=True, strict=True) as gems:
        (fused.linear_gelu(x, w, b).sum() + fused.linear(x, w, b).sum()).backward()
    assert not {"gemsmode.linear_gelu", "gemsmode.linear"} & decisions(gems).keys() and decisions(gems)["aten.gelu"] == "rule"
    if dtype in (F32, F64):
        check(linear.linear.op, F.linear, x, w, b, rules=("linear",))
        check(linear.linear_gelu.op, linear.linear_gelu.reference, x, w, b, rules=("linear_gelu",))


def test_gates_of_halves_and_broadcasts(device: str) -> None:
    """The two halves of one product, and an operand that is broadcast."""
    both = numbers(5, 16, device=device)
    check(lambda t: fused.silu_and_mul(*t.chunk(2, -1)), lambda t: F.silu(t[:, :8]) * t[:, 8:], both)
    check(fused.silu_and_mul, lambda a, b: F.silu(a) * b, numbers(5, 8, device=device), numbers(1, 8, device=device))
    extremes = torch.tensor([float("nan"), 1e30, -1e30, 0.0], device=device)
    ours, own = fused.gelu_and_mul(extremes, torch.ones_like(extremes)), F.gelu(extremes)
    torch.testing.assert_close(ours, own, equal_nan=True)


def test_an_unknown_approximation_raises_what_pytorch_raises(device: str) -> None:
    with pytest.raises(RuntimeError, match="approximate"):
        fused.gelu_and_mul(numbers(2, device=device, grad=False), numbers(2, device=device, grad=False), "sigmoid")


# -- rotary embedding --------------------------------------------------------------------------------------------------


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [batch, tokens, heads, size] and cos [batch or 1, tokens, pairs]: complex multiplication."""
    pairs = cos.shape[-1]
    head, tail = x[..., :2 * pairs], x[..., 2 * pairs:]
    if interleaved:
        z = torch.view_as_complex(head.unflatten(-1, (pairs, 2)).contiguous())
    else:
        z = torch.complex(head[..., :pairs], head[..., pairs:])
    z = z * torch.complex(cos, sin).unsqueeze(2)
    flat = torch.view_as_real(z).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((flat, tail), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary(interleaved: bool, dtype: torch.dtype, device: str) -> None:
    q, k = numbers(2, 5, 4, 20, dtype=dtype, device=device), numbers(2, 5, 2, 20, dtype=dtype, device=device)
    positions = torch.randint(0, 11, (2, 5), device=device)
    for pairs, given in itertools.product((10, 6), (None, positions)):
        cos, sin = (numbers(11, pairs, dtype=dtype, device=device, grad=False) for _ in range(2))

        def exact(q: Any, k: Any, cos: Any, sin: Any, given: Any = given) -> Any:
            at = torch.arange(5).expand(2, 5) if given is None else given.cpu()
            return turned(q, cos[at], sin[at], interleaved), turned(k, cos[at], sin[at], interleaved)

        check(lambda q, k, c, s, given=given: fused.apply_rotary_pos_emb(q, k, c, s, given, interleaved), exact, q, k, cos, sin,
              rules=("rotary_embedding",))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_of_transformers(interleaved: bool, device: str) -> None:
    """Heads before tokens, transposed memory, a value for every element: results are laid out as the inputs are."""
    q, k = (numbers(2, 5, h, 8, device=device, grad=False).transpose(1, 2) for h in (4, 2))
    cos, sin = numbers(2, 5, 8, device=device, grad=False), numbers(2, 5, 8, device=device, grad=False)

    def exact(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        def one(x: Any) -> Any:
            half = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) if interleaved else torch.cat((-x[..., 4:], x[..., :4]), -1)
            return x * cos.unsqueeze(1) + half * sin.unsqueeze(1)

        return one(q), one(k)

    def ours(*args: Any) -> Any:
        return fused.turn(*args, None, interleaved, True, True)

    check(ours, exact, q.requires_grad_(), k.requires_grad_(), cos, sin, rules=("rotary_embedding",))
    assert [t.stride() for t in ours(q, k, cos, sin)] == [q.stride(), k.stride()]


def test_rotary_of_tokens_without_a_batch_and_with_more(device: str) -> None:
    cos, sin = numbers(9, 3, device=device, grad=False), numbers(9, 3, device=device, grad=False)
    q, k = numbers(2, 3, 5, 4, 8, device=device, grad=False), numbers(2, 3, 5, 1, 8, device=device, grad=False)
    at = torch.randint(0, 9, (2, 3, 5), device=device)
    full = fused.apply_rotary_pos_emb(q, k, cos, sin, at)
    alone = fused.apply_rotary_pos_emb(q[1, 2], k[1, 2], cos, sin, at[1, 2])
    for all_of_it, part in zip(full, alone):
        torch.testing.assert_close(all_of_it[1, 2], part)
    assert full[1].shape == k.shape


def test_rotary_with_gradients_of_the_angles(device: str) -> None:
    q, k = numbers(1, 3, 2, 4, device=device), numbers(1, 3, 2, 4, device=device)
    cos, sin = numbers(3, 2, device=device), numbers(3, 2, device=device)
    got = torch.autograd.grad(fused.apply_rotary_pos_emb(q, k, cos, sin)[0].sum(), (q, cos, sin))
    wide = [widened(t) for t in (q, k, cos, sin)]
    expected = torch.autograd.grad(turned(wide[0], wide[2][None], wide[3][None], False).sum(), (wide[0], wide[2], wide[3]))
    for mine, theirs in zip(got, expected):
        close(mine, theirs, "gradient")


# -- cross-entropy -----------------------------------------------------------------------------------------------------

SHAPES = {"rows": ((9, 37), (9,)), "one row": ((37,), ()), "images": ((2, 37, 3, 4), (2, 3, 4))}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape: str, dtype: torch.dtype, device: str) -> None:
    sizes, rows = SHAPES[shape]
    x = (4 * numbers(*sizes, dtype=dtype, device=device)).detach().requires_grad_()
    target = torch.randint(0, 37, rows, device=device)
    if rows:
        target.view(-1)[1] = -100
    weight = torch.rand(37, device=device).to(dtype)
    reductions = ("none", "mean", "sum") if dtype == F64 else ("mean",)
    for reduction, w, smoothing in itertools.product(reductions, (None, weight), (0.0, 0.1)):
        def ours(x: Any, w: Any, reduction: str = reduction, smoothing: float = smoothing) -> Any:
            return fused.cross_entropy_loss(x, target, w, reduction, -100, smoothing)

        def exact(x: Any, w: Any, reduction: str = reduction, smoothing: float = smoothing) -> Any:
            return F.cross_entropy(x, target.cpu(), w, reduction=reduction, label_smoothing=smoothing)

        check(ours, exact, x, w, rules=() if w is not None and smoothing else ("cross_entropy", "cross_entropy_backward"))


def test_cross_entropy_in_float32_of_16_bits(device: str) -> None:
    x, target = numbers(6, 50, dtype=BF16, device=device), torch.randint(0, 50, (6,), device=device)
    loss = fused.cross_entropy_loss(x, target, float32=True)
    assert loss.dtype == F32
    close(loss, F.cross_entropy(widened(x), target.cpu()).detach(), "loss")
    assert torch.autograd.grad(loss, x)[0].dtype == BF16


def test_cross_entropy_of_ignored_rows_of_infinities_and_of_class_probabilities(device: str) -> None:
    x, none = numbers(3, 7, device=device), torch.full((3,), -100, device=device)
    for reduction in ("none", "mean", "sum"):
        mine, theirs = fused.cross_entropy_loss(x, none, reduction=reduction), F.cross_entropy(x, none, reduction=reduction)
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert torch.autograd.grad(fused.cross_entropy_loss(x, none, reduction="sum"), x)[0].count_nonzero() == 0
    extreme = x.detach().clone()
    extreme[0, 1:], extreme[1, 2], extreme[2, 3] = float("-inf"), float("inf"), float("nan")
    target = torch.tensor([0, 2, 1], device=device)
    mine, theirs = fused.cross_entropy_loss(extreme, target, reduction="none"), F.cross_entropy(extreme, target, reduction="none")
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    probabilities = torch.rand(3, 7, device=device).softmax(-1)
    torch.testing.assert_close(fused.cross_entropy_loss(x, probabilities), F.cross_entropy(x, probabilities))
    with pytest.raises(ValueError, match="average"):
        fused.cross_entropy_loss(x, none, reduction="average")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(reduction: str, device: str) -> None:
    x, w, b = numbers(3, 5, 8, device=device), numbers(29, 8, device=device), numbers(29, device=device)
    target = torch.randint(0, 29, (3, 5), device=device)
    target[0, 2] = -100
    weight = torch.rand(29, device=device)
    for bias, classes, smoothing, chunk in ((b, None, 0.0, 4), (None, weight, 0.0, 4), (b, None, 0.2, 0)):
        def ours(x: Any, w: Any, *more: Any, classes: Any = classes, smoothing: float = smoothing, chunk: int = chunk) -> Any:
            return fused.linear_cross_entropy(x, w, target, *(more or (None,)), classes, reduction, -100, smoothing, chunk)

        def exact(x: Any, w: Any, *more: Any, classes: Any = classes, smoothing: float = smoothing) -> Any:
            logits = F.linear(x, w, *more).flatten(0, 1)
            loss = F.cross_entropy(logits, target.cpu().flatten(), None if classes is None else widened(classes), reduction=reduction,
                                   label_smoothing=smoothing)
            return loss.view(3, 5) if reduction == "none" else loss

        check(ours, exact, x, w, *([] if bias is None else [bias]), rules=("cross_entropy", "cross_entropy_backward"))


def test_linear_cross_entropy_never_has_all_logits(device: str) -> None:
    """The largest tensor that any op of forward and backward gives is smaller than the logits."""
    rows, classes, width = 32, 160, 8
    x, w = numbers(rows, width, device=device), numbers(classes, width, device=device)
    target = torch.randint(0, classes, (rows,), device=device)
    largest = 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *[t.numel() for t in tensors(result)]])
            return result

    with GemsMode(), Watching():
        reference = cross_entropy.linear_cross_entropy.reference  # what a mode sees of the op
        with torch.no_grad():
            loss, lse, total = reference(x, w, target, None, None, 1, -100, 0.0, 8)
            backward = cross_entropy.linear_cross_entropy_backward.reference
            backward(torch.ones_like(loss), x, w, target, lse, total, None, None, 1, -100, 0.0, 8, (True, True, True))
    assert 8 * classes <= largest < rows * classes


# -- layers of one row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_layers_of_one_row(dtype: torch.dtype, device: str) -> None:
    """Odd sizes, slices of wider weights, any number of dimensions; more rows are layers of their own."""
    make = functools.partial(numbers, device=device, dtype=dtype, grad=False)
    for lead, width, features in (((), 7, 1), ((1,), 127, 33), ((1, 1), 64, 130), ((1, 1, 1), 1, 5)):
        x = make(*lead, 2 * width)[..., ::2]
        gate, up, k = make(features, width + 3)[:, :width], make(features, width), make(2, width)
        bias = make(4)[::2]
        for name, function in (("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", functools.partial(F.gelu, approximate="tanh"))):
            check(functools.partial(fused.gated_linear, activation=name), lambda x, a, b, f=function: f(F.linear(x, a)) * F.linear(x, b),
                  x, gate, up, rules=("gated_linear",))
        check(lambda *args: fused.qkv_linear(*args[:4], None, args[4]),
              lambda x, q, k, v, b: (F.linear(x, q), F.linear(x, k, b), F.linear(x, v)), x, gate, k, up, bias, rules=("qkv_linear",))
    rows, weight = make(3, 64), make(6, 64)
    with GemsMode(trace=True, strict=True) as gems:
        fused.gated_linear(rows, weight, weight)
        fused.qkv_linear(rows, weight, weight, weight)
    assert {r.overload: r.calls for r in gems.report.records} == {"gemsmode.linear.default": 5, "gemsmode.silu_and_mul.default": 1}
    with pytest.raises(ValueError, match="expected one of 'silu', 'gelu', 'gelu_tanh'"):
        fused.gated_linear(rows, rows, rows, "relu")


def test_gradients_of_layers_of_one_row(device: str) -> None:
    """The functions take them apart; the ops have formulas of their own."""
    x, gate, up, bias = numbers(1, 8, device=device), numbers(6, 8, device=device), numbers(6, 8, device=device), numbers(6, device=device)
    for gated, qkv in ((row_linear.gated_linear.op, row_linear.qkv_linear.op), (fused.gated_linear, fused.qkv_linear)):
        check(gated, lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b), x, gate, up)
        check(lambda x, a, b, c, qkv=qkv: qkv(x, a, b, a.detach(), None, c),
              lambda x, a, b, c: (F.linear(x, a), F.linear(x, b, c), F.linear(x, a.detach())), x, gate, up, bias)


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
def test_topk_softmax(renormalize: bool, dtype: torch.dtype, device: str) -> None:
    x = torch.stack([torch.randperm(24) for _ in range(10)]).view(2, 5, 24).to(device, dtype).div(4).requires_grad_()

    def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, indices = x.softmax(-1).topk(3)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights, indices

    with GemsMode(strict=True):
        weights, indices = fused.topk_softmax(x, 3, renormalize)
        seed = torch.randn_like(weights)
        gradient = torch.autograd.grad(weights, x, seed)[0]
    wide = widened(x)
    expected, where = exact(wide)
    assert weights.dtype == (F64 if dtype == F64 else F32) and torch.equal(indices.cpu(), where)
    close(weights, expected.detach(), "weights")
    close(gradient, torch.autograd.grad(expected, wide, widened(seed))[0], "gradient")


def test_topk_softmax_of_equal_values_and_nan(device: str) -> None:
    weights, indices = fused.topk_softmax(torch.zeros(2, 5, device=device), 2)
    assert indices.tolist() == [[0, 1], [0, 1]] and torch.allclose(weights.cpu(), torch.full((2, 2), 0.2))
    weights, indices = fused.topk_softmax(torch.full((1, 5), float("nan"), device=device), 2)
    assert weights.isnan().all() and ((indices >= 0) & (indices < 5)).all()


# -- registration, tracing, modes --------------------------------------------------------------------------------------


def samples(device: str) -> dict[str, tuple[Any, ...]]:
    """A call of every op, by name."""
    make = functools.partial(numbers, device=device)
    x, r, w, b, g = make(3, 8), make(3, 8), make(8), make(8), make(3, 8, grad=False)
    stats = torch.rand(3, 1, device=device)
    q, k, c, s = make(1, 3, 2, 8), make(1, 3, 1, 8), make(5, 4, grad=False), make(5, 4, grad=False)
    target = torch.tensor([1, -100, 4], device=device)
    loss, lse, total = (t.detach() for t in cross_entropy.cross_entropy.op(x, target))
    head = make(6, 8)
    weights, indices = (t.detach() for t in experts.topk_softmax.op(x, 2))
    return {
        "rms_norm": (x, [8], w, 1e-5), "skip_rms_norm": (x, r, [8], w, 1e-5), "skip_layer_norm": (x, r, [8], w, b, 1e-5, False),
        "fused_add_rms_norm": (x.detach().clone(), r.detach().clone(), [8], w.detach(), 1e-5),
        "norm_backward": (g, x.detach(), [8], stats, stats, w.detach(), g, [True, True, False]),
        "silu_and_mul": (x, r), "gelu_and_mul": (x, r, "tanh"), "add_bias_gelu": (x, b),
        "linear": (x, head, make(6)), "linear_gelu": (x, head, make(6)),
        "gated_linear": (make(1, 8), head, make(6, 8), "gelu_tanh"),
        "qkv_linear": (make(1, 8), head, make(3, 8), make(5, 8), None, make(3)),
        "silu_and_mul_backward": (g, x.detach(), r.detach()), "gelu_and_mul_backward": (g, x.detach(), r.detach()),
        "add_bias_gelu_backward": (g, x.detach(), b.detach(), "tanh"),
        "rotary_embedding": (q, k, c, s, torch.tensor([[1, 0, 4]], device=device), True),
        "cross_entropy": (x, target, None, 1, -100, 0.1),
        "cross_entropy_backward": (loss, x.detach(), target, lse, total, None, 1, -100, 0.1),
        "linear_cross_entropy": (x, head, torch.tensor([1, -100, 4], device=device), None, None, 1, -100, 0.0, 2),
        "linear_cross_entropy_backward": (loss, x.detach(), head.detach(), target, lse, total, None, None, 1, -100, 0.0, 2,
                                          [True, True, False]),
        "topk_softmax": (x, 2, True), "topk_softmax_backward": (weights, x.detach(), weights, indices, False),
    }


OWN = sorted(name.split(".")[1] for name in REFERENCES)


@pytest.mark.parametrize("name", OWN)
def test_registration(name: str, device: str, request: pytest.FixtureRequest) -> None:
    """PyTorch's own checks of a custom op: schema, autograd, fake results and tracing with dynamic shapes."""
    full = request.config.getoption("--full")
    op, args = getattr(torch.ops.gemsmode, name).default, samples(device)[name]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    traced = full or name == "skip_rms_norm"
    found = torch.library.opcheck(op, args, test_utils=(*utilities, "test_aot_dispatch_dynamic") if traced else utilities)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OWN)
def test_references_stand_in(name: str, device: str) -> None:
    """An op whose rule is denied gives what its kernel gives, by ops that come back to the mode."""
    op, args = getattr(torch.ops.gemsmode, name).default, samples(device)[name]
    with torch.no_grad():
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        expected = tensors(op(*own)) or own[:2]
        other = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with GemsMode(deny=["fused"], trace=True) as gems:
            got = tensors(op(*other)) or other[:2]
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    seen = [name for name, kind in decisions(gems).items() if kind != "view"]
    assert seen and not any(n.startswith("gemsmode.") for n in seen)


def test_the_report_counts_fused_ops_as_replaced(device: str) -> None:
    x = numbers(4, 8, device=device, grad=False)
    with GemsMode(trace=True) as gems:
        fused.rms_norm(x, 8)
        fused.silu_and_mul(x, x)
    assert decisions(gems) == {"gemsmode.rms_norm": "rule", "gemsmode.silu_and_mul": "rule"}
    assert "gemsmode.silu_and_mul" in str(gems.report) and "100.0% of calls" in str(gems.report)


def test_selection_by_name_and_family(device: str) -> None:
    x = numbers(4, 8, device=device, grad=False)
    for options, expected in (({"allow": ["silu_and_mul"]}, True), ({"allow": ["fused"]}, True), ({"deny": ["silu_and_mul"]}, False)):
        with GemsMode(trace=True, **options) as gems:
            fused.silu_and_mul(x, x)
        assert ("gemsmode.silu_and_mul" in decisions(gems)) == expected


def test_names_shared_with_aten_are_not_mixed_up() -> None:
    """``gemsmode.rms_norm`` is no variant of ``aten.rms_norm``, nor the other way round."""
    rules = {c.rule.family for c in registry.default.candidates(find_op("aten.rms_norm.default"))}
    assert rules == {"norm"}
    assert [c.rule.name for c in registry.default.candidates(find_op("gemsmode.rms_norm.default"))] == ["rms_norm"]


def test_a_users_rule_serves_a_fused_op_outside_of_modes(device: str) -> None:
    x = numbers(4, 8, device=device, grad=False)
    seen = []

    @gemsmode.rule("gemsmode.silu_and_mul.default", name="mine")
    def mine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(a.shape)
        return F.silu(a) * b

    try:
        fused.silu_and_mul(x, x)
    finally:
        registry.default.remove("mine")
    assert seen == [x.shape]
    fused.silu_and_mul(x, x)
    assert len(seen) == 1


def test_compiled(device: str) -> None:
    """Dynamo and AOT trace the functions as single ops, without a break in the graph."""
    ops = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        ops.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    def block(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y, total = fused.skip_rms_norm(x, r, 8, w, 1e-5)
        y = fused.silu_and_mul(y, total) + fused.rms_norm(total, 8, w, 1e-5)
        return fused.linear_cross_entropy(y, head, target)

    args = (numbers(3, 8, device=device), numbers(3, 8, device=device), numbers(8, device=device), numbers(6, 8, device=device),
            torch.tensor([1, 2, 5], device=device))
    loss = torch.compile(block, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(loss, block(*args))
    assert {o for o in ops if o.startswith("gemsmode")} == {f"gemsmode.{n}.default" for n in (
        "skip_rms_norm", "silu_and_mul", "rms_norm", "linear_cross_entropy")}
    traced = torch.compile(block, backend="aot_eager", fullgraph=True)(*args)
    for mine, theirs in zip(torch.autograd.grad(traced, args[:4]), torch.autograd.grad(block(*args), args[:4])):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


def test_transforms_and_subclasses(device: str) -> None:
    """``torch.func`` and tensor subclasses get PyTorch's own ops."""
    x, w = numbers(4, 8, device=device, grad=False), numbers(8, device=device, grad=False)
    got = torch.func.grad(lambda t: fused.rms_norm(t, 8, w, 1e-5).square().sum())(x)
    wide = widened(x).requires_grad_()
    close(got, torch.autograd.grad(rms(wide, [8], widened(w), 1e-5).square().sum(), wide)[0], "torch.func.grad")
    mapped = torch.func.vmap(lambda t: fused.silu_and_mul(t, t))(x)
    close(mapped, widened(F.silu(x) * x), "torch.func.vmap")

    class Sub(torch.Tensor):
        pass

    assert torch.equal(fused.silu_and_mul(x.as_subclass(Sub), x).as_subclass(torch.Tensor), F.silu(x) * x)


def test_tensors_without_data() -> None:
    """Fake and meta tensors give results of the right metadata."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y, total = fused.skip_rms_norm(torch.empty(3, 8, dtype=BF16), torch.empty(3, 8), 8, torch.empty(8))
        assert y.dtype == total.dtype == F32 and y.shape == (3, 8)
    with GemsMode():  # the tensors are fake, their mode has ended
        assert fused.silu_and_mul(y, total).shape == (3, 8)
    q = torch.empty(1, 3, 2, 8, device="meta").transpose(1, 2)
    angles = torch.empty(1, 3, 8, device="meta")
    assert fused.turn(q, q, angles, angles, None, False, True, True)[0].stride() == q.stride()


def test_dry_run() -> None:
    x = torch.empty(4, 4096, dtype=BF16, device="meta")
    with GemsMode(dry_run="cuda:90") as gems:
        fused.rms_norm(x, 4096)
    assert decisions(gems) == {"gemsmode.rms_norm": "rule"}


def test_second_derivatives_raise(device: str) -> None:
    x = numbers(2, 8, device=device)
    gradient = torch.autograd.grad(fused.rms_norm(x, 8).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="norm_backward has no derivative"):
        gradient.sum().backward()


def test_what_is_declined_says_why(device: str) -> None:
    """The reasons that reports show; PyTorch's own ops then serve the call."""
    x = numbers(4, 8, device=device, grad=False)
    policy = Policy(registry.default)

    def reason(custom: Any, *args: Any) -> str | None:
        schema = custom.op._schema.arguments
        rest = tuple(a.default_value for a in schema[len(args):])
        return policy.handler(custom.op).lookup((*args, *rest)).decision.reason

    assert "alone is float64" in (reason(skip_norm.skip_rms_norm, x, x.double(), [8]) or "")
    assert "not contiguous" in (reason(skip_norm.fused_add_rms_norm, x.t(), x.t(), [4]) or "")
    assert "four dimensions" in (reason(rotary.rotary_embedding, x, x, x, x) or "")
    assert "class probabilities" in (reason(cross_entropy.cross_entropy, x, x) or "")
    assert "class weights" in (reason(cross_entropy.cross_entropy, x, torch.zeros(4, dtype=I64, device=device), x[0], 1, -100, 0.5) or "")
    assert "between 1" in (reason(experts.topk_softmax, x, 9) or "")
    assert "several shapes" in (reason(gates.silu_and_mul_backward, x, x, x[0]) or "")


# -- drop-in modules ---------------------------------------------------------------------------------------------------


def test_modules_take_the_state_of_what_they_replace(device: str) -> None:
    nn = gemsmode.nn
    x, r = numbers(2, 3, 8, device=device), numbers(2, 3, 8, device=device)
    own = torch.nn.RMSNorm(8, eps=1e-6, device=device)
    ours = nn.RMSNorm(8, device=device)
    own.weight.data.normal_()
    ours.load_state_dict(own.state_dict())
    torch.testing.assert_close(ours(x), own(x))
    norm = torch.nn.LayerNorm(8, device=device)
    skip = nn.SkipLayerNorm(8, device=device, return_sum=True)
    skip.load_state_dict(norm.state_dict())
    torch.testing.assert_close(skip(x, r), (norm(x + r), x + r))
    offset = nn.SkipRMSNorm(8, unit_offset=True, device=device)
    torch.testing.assert_close(offset(x, r)[0], F.rms_norm(x + r, (8,), None, 1e-6))
    logits, target = numbers(5, 7, device=device), torch.tensor([0, 6, -100, 2, 3], device=device)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target), expected)
    head = torch.nn.Linear(8, 7, device=device)
    loss = nn.LinearCrossEntropyLoss(8, 7, bias=True, device=device)
    loss.load_state_dict(head.state_dict())
    hidden = numbers(5, 8, device=device)
    torch.testing.assert_close(loss(hidden, target), F.cross_entropy(head(hidden), target))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp(activation: str, device: str) -> None:
    mlp = gemsmode.nn.GatedMLP(8, 12, activation, device=device)
    assert set(mlp.state_dict()) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}[activation]
    x = numbers(3, 8, device=device)
    torch.testing.assert_close(mlp(x), mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x)))
    with pytest.raises(ValueError, match="relu"):
        gemsmode.nn.GatedMLP(8, 12, "relu")


@pytest.mark.parametrize("heads_first", [False, True])
def test_rotary_module(heads_first: bool, device: str) -> None:
    rope = gemsmode.nn.RotaryEmbedding(6, heads_first=heads_first, device=device)
    assert not rope.state_dict()
    q, k = numbers(2, 5, 4, 8, device=device), numbers(2, 5, 2, 8, device=device)
    at = torch.tensor([[3, 4, 5, 6, 7]], device=device)
    angles = at.unsqueeze(-1).double().cpu() * rope.inv_freq.double().cpu()
    expected = [turned(widened(t), angles.cos(), angles.sin(), False) for t in (q, k)]
    got = rope(*((q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)), at)
    for mine, theirs in zip(got, expected):
        close(mine.transpose(1, 2) if heads_first else mine, theirs.detach(), "rotated")


# -- the kernels at GPU sizes ------------------------------------------------------------------------------------------


def gpu_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of a GPU's work, in the dtypes that models have and in float64."""
    scalar = functools.partial(on_gpu, ())
    for kind, acc in ((BF16, F32), (F32, F32), (F64, F64)):
        tokens = 2048
        for width in (128, 4096, 12288):
            x, w, stat = on_gpu((tokens, width), kind), on_gpu((width,), kind), on_gpu((tokens, 1), acc)
            yield "gemsmode.rms_norm.default", (x, (width,), w, 1e-6)
            yield "gemsmode.skip_rms_norm.default", (x, x, (width,), w, 1e-6, True)
            yield "gemsmode.skip_layer_norm.default", (x, x, (width,), w, w, 1e-6, False)
            yield "gemsmode.fused_add_rms_norm.default", (x, x, (width,), w, 1e-6)
            yield "gemsmode.norm_backward.default", (x, x, (width,), stat, stat, w, x, (True, True, True))
            yield "gemsmode.norm_backward.default", (x, x, (width,), None, stat, w, None, (True, True, False))
        gate = on_gpu((2048, 11008), kind)
        for form in ("none", "tanh"):
            yield "gemsmode.gelu_and_mul.default", (gate, gate, form)
            yield "gemsmode.gelu_and_mul_backward.default", (gate, gate, gate, form)
            yield "gemsmode.add_bias_gelu.default", (gate, on_gpu((11008,), kind), form)
            yield "gemsmode.add_bias_gelu_backward.default", (gate, gate, on_gpu((11008,), kind), form)
        yield "gemsmode.silu_and_mul.default", (gate, gate)
        yield "gemsmode.silu_and_mul_backward.default", (gate, gate, gate)
        row, square, narrow, wide = (on_gpu(shape, kind) for shape in ((1, 1, 4096), (4096, 4096), (1024, 4096), (14336, 4096)))
        yield "gemsmode.gated_linear.default", (row, wide, wide, "silu")
        yield "gemsmode.qkv_linear.default", (row, square, narrow, narrow, None, None, None)
        yield "gemsmode.qkv_linear.default", (row, square, square, square, *[on_gpu((4096,), kind)] * 3)
        q = TensorMeta(kind, (1, 32, 2048, 128), (32 * 2048 * 128, 128, 32 * 128, 1), torch.device("cuda", 0))
        k = TensorMeta(kind, (1, 8, 2048, 128), (8 * 2048 * 128, 128, 8 * 128, 1), torch.device("cuda", 0))
        full = on_gpu((1, 2048, 128), kind)
        yield "gemsmode.rotary_embedding.default", (q, k, full, full, None, False, True, True, False)
        yield "gemsmode.rotary_embedding.default", (q, k, full, full, None, True, True, True, True)
        table = on_gpu((4096, 40), kind)
        other = on_gpu((1, 2048, 32, 128), kind)
        yield "gemsmode.rotary_embedding.default", (other, other, table, table, on_gpu((1, 2048), I64), False, False, False, False)
        yield "gemsmode.rotary_embedding.default", (other, other, table, table, on_gpu((1, 2048), I64), True, False, False, True)
        for classes in (1000, 32000):
            logits, target, lse = on_gpu((4096, classes), kind), on_gpu((4096,), I64), on_gpu((4096,), acc)
            for smoothing in (0.0, 0.1):
                yield "gemsmode.cross_entropy.default", (logits, target, None, 1, -100, smoothing, True)
            yield "gemsmode.cross_entropy_backward.default", (scalar(acc), logits, target, lse, scalar(acc), None, 1, -100, 0.0)
        image, labels, weight = on_gpu((8, 21, 512, 512), kind), on_gpu((8, 512, 512), I64), on_gpu((21,), kind)
        yield "gemsmode.cross_entropy.default", (image, labels, weight, 0, -100, 0.0, False)
        of_rows = labels._replace(dtype=kind), image, labels, labels._replace(dtype=acc)
        yield "gemsmode.cross_entropy_backward.default", (*of_rows, scalar(acc), weight, 0, -100, 0.0)
        for n in (8, 128, 512):
            x, chosen = on_gpu((4096, n), kind), on_gpu((4096, 8), acc)
            yield "gemsmode.topk_softmax.default", (x, 8, True)
            yield "gemsmode.topk_softmax_backward.default", (chosen, x, chosen, on_gpu((4096, 8), I64), False)


_COMPILED = ("skip_rms_norm", "silu_and_mul", "gated_linear", "qkv_linear", "rotary_embedding", "cross_entropy", "topk_softmax")
"""Compiled by default; ``--full`` compiles all of them, for every target."""


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_kernels_at_gpu_sizes(target: str, tmp_path: Any, request: pytest.FixtureRequest) -> None:
    """They compile, and keep everything in registers. By default one call of each op in bfloat16, for one GPU."""
    every = request.config.getoption("--full")
    if not every and target != "cuda:90":
        pytest.skip("compiled with --full")
    found = list(gpu_calls())
    if not every:
        few = {name: (name, args) for name, args in found if BF16 in {a.dtype for a in args if isinstance(a, TensorMeta)}}
        found = [call for name, call in few.items() if name.split(".")[1] in _COMPILED]
    assert compile_calls(found, target, tmp_path) >= len(found)


def test_launch_choices() -> None:
    """Enough programs for an H200 at the sizes of models, and whole cache lines."""
    h200 = Target("cuda", "cuda", 90, 32, 132)
    tile = cross_entropy.choose_tile(4096, 32000, True, 4, h200)
    assert tile.rows == 1 and tile.classes == 4096
    assert rotary.choose_tile(2048, 32, 8, 64, h200) == rotary.Tile(2, 8)
    assert rotary.choose_tile(1, 32, 32, 64, h200).heads * 64 <= 1024
