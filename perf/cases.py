"""What ``python -m perf`` measures: every case as data, with the origin of its shapes and its bytes or flops counted aloud.

A case is the text of a call over named tensors and named sizes::

    case("softmax", "aten._softmax.default", "torch.softmax(x, -1)", sized(M=16384, N=4096), x=T("M N"), bytes="x + out", ...)

``bytes`` and ``flops`` are texts too: a tensor's name stands for the bytes of the elements that are touched, ``out``
for those of all results, a size for itself, ``size`` for the bytes of one element. What counts is what a perfect kernel
would have to move: each input once, each result once.

On a machine without a GPU sizes shrink (:func:`shrunk`) until no tensor has more than a few thousand elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
          "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "bool": torch.bool, "c64": torch.complex64}

TINY_ELEMENTS = 8192
"""Elements that the largest tensor of a case may have on a machine without a GPU."""


@dataclass(frozen=True)
class T:
    """One input tensor.

    Attributes:
        dims: its sizes, names or numbers: ``"M N"``, ``"M 1"``.
        fill: ``"normal"``, ``"uniform"`` (0.05 to 1), ``"bool"`` (one in four true), ``"index:N"`` (0 to N - 1),
            ``"permutation:N"`` (a permutation along the last dimension).
        layout: ``""`` (contiguous) or ``"t"``: the last two dimensions are stored the other way round.
        dtype: its dtype's short name; None for the case's.
        grad: whether it requires a gradient.
    """

    dims: str
    fill: str = "normal"
    layout: str = ""
    dtype: str | None = None
    grad: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(int(d) if d.isdigit() else sizes[d] for d in self.dims.split())

    def make(self, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        """The tensor, of random values; the same ones for the same state of ``generator``."""
        shape = self.shape(sizes)
        if self.layout == "t":
            shape = (*shape[:-2], shape[-1], shape[-2])
        own = DTYPES[self.dtype] if self.dtype else dtype
        kind, _, bound = self.fill.partition(":")
        limit = (int(bound) if bound.isdigit() else sizes[bound]) if bound else 0
        if kind == "index":
            made = torch.randint(0, limit, shape, dtype=own, device=device, generator=generator)
        elif kind == "permutation":
            made = torch.rand(shape, device=device, generator=generator).argsort(-1).to(own)
        elif kind == "bool":
            made = torch.rand(shape, device=device, generator=generator) < 0.25
        elif not own.is_floating_point and not own.is_complex:
            made = torch.randint(0, 100, shape, dtype=own, device=device, generator=generator)
        elif kind == "uniform":
            made = torch.rand(shape, device=device, generator=generator).mul_(0.95).add_(0.05).to(own)
        else:
            made = torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(own)
        if self.layout == "t":
            made = made.transpose(-1, -2)
        return made.requires_grad_() if self.grad else made


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        label: a short name; with sizes and dtype it names the case.
        op: the aten overload that is meant to be intercepted.
        group: ``pointwise``, ``reduction``, ``matmul``, ``attention``, ``movement``, ``indexing``, ``random``,
            ``sorting``, ``vision``, ``optimizer``, ``tiny`` (host time), ``growing`` (host time of new sizes), ``start`` (import
            and first call, in processes of their own) or ``model`` (wall time of whole models).
        dtype: short name of the dtype.
        call: the text of what is timed.
        sizes: the named sizes.
        inputs: the tensors by name.
        origin: where these sizes come from.
        bytes: the bytes that have to move, as text; "" if the case is bound by arithmetic.
        flops: the operations to be done, as text; "" if the case is bound by memory.
        setup: further names, each the text of an expression, made once before timing, natively, with gradients on.
        check: ``"float64"`` (error against the same call on float64 inputs), ``"equal"`` (against PyTorch's own
            result), ``"none"`` (random results, state that changes).
        rows: if not 0, the reference takes only the first ``rows`` rows of every tensor in ``inputs``, and so of the result.
        goal: the ratio of eager's time to gemsmode's that the project wants to reach on an H200.
        pinned: sizes that do not shrink.
        tiny: sizes on a machine without a GPU, where shrinking by itself would not do.
        liger: the same in ``liger_kernel.transformers.functional`` (as ``liger``), where it has it.
        at_most: what figures of a provider must not exceed, as ``{"gemsmode.host_us": 5.0}``.
        needs: packages without which the case is left out.
        memory: GiB of device memory without which it is left out.
    """

    label: str
    op: str
    group: str
    dtype: str
    call: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, T]
    origin: str
    bytes: str = ""
    flops: str = ""
    setup: Mapping[str, str] = field(default_factory=dict)
    check: str = "float64"
    rows: int = 0
    goal: float | None = None
    pinned: tuple[str, ...] = ()
    tiny: Mapping[str, int] = field(default_factory=dict)
    liger: str = ""
    at_most: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    memory: float = 0.0

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes.values()))

    @property
    def name(self) -> str:
        return f"{self.label} {self.shape} {self.dtype}"

    def matches(self, pattern: str) -> bool:
        """Whether ``pattern``, a glob, is this case's label, name or op, with or without ``aten.`` and overload."""
        short = self.op.removeprefix("aten.")
        return any(fnmatchcase(text, pattern) for text in (self.label, self.name, self.op, short, short.split(".")[0]))


def shrunk(case: Case, limit: int = TINY_ELEMENTS) -> dict[str, int]:
    """The case's sizes, halved from the largest down until no input has more than ``limit`` elements."""
    sizes = {**case.sizes, **case.tiny}
    while True:
        too_large = [t for t in case.inputs.values() if math.prod(t.shape(sizes)) > limit]
        free = {d for t in too_large for d in t.dims.split() if not d.isdigit() and d not in case.pinned and sizes[d] > 2}
        if not free:
            return sizes
        largest = max(sorted(free), key=lambda d: sizes[d])
        sizes[largest] //= 2


_cases: list[Case] = []


def sized(**sizes: int) -> dict[str, int]:
    """Named sizes."""
    return sizes


def case(label: str, op: str, call: str, sizes: Mapping[str, int], *, group: str, origin: str, dtypes: Sequence[str] = ("bf16",),
         bytes: str = "", flops: str = "", setup: Mapping[str, str] | None = None, check: str = "float64", rows: int = 0,
         goal: float | Mapping[str, float] | None = None, pinned: Sequence[str] = (), tiny: Mapping[str, int] | None = None,
         liger: str = "", at_most: Mapping[str, float] | None = None, needs: Sequence[str] = (), memory: float = 0.0, **inputs: T) -> None:
    """Declare one case a dtype; ``goal`` may depend on the dtype. See :class:`Case`."""
    for dtype in dtypes:
        wanted = goal.get(dtype) if isinstance(goal, Mapping) else goal
        _cases.append(Case(label, op, group, dtype, call, dict(sizes), inputs, origin, bytes, flops, dict(setup or {}), check,
                           rows, wanted, tuple(pinned), dict(tiny or {}), liger, dict(at_most or {}), tuple(needs), memory))


# -- pointwise ---------------------------------------------------------------------------------------------------------

SQUARE = sized(M=8192, N=8192)
_SQUARE_ORIGIN = "8192 tokens by 8192 features: far beyond the L2 cache, so that bandwidth decides"
_BOTH = ("bf16", "f32")


def _dense(label: str, op: str, call: str, dtypes: Sequence[str] = _BOTH, fill: str = "normal", **more: Any) -> None:
    """A dense pointwise case on x, and on y and z if the call names them; it must not be slower than eager."""
    words = set("".join(c if c.isalnum() or c == "_" else " " for c in call).split())
    inputs: dict[str, Any] = {n: T("M N", fill) for n in ("x", "y", "z") if n in words}
    if "mask" in words:
        inputs["mask"] = T("M N", "bool")
    counted = " + ".join((*inputs, "out"))
    settings = {"bytes": counted, "goal": 0.97, **more}
    case(label, op, call, SQUARE, group="pointwise", origin=_SQUARE_ORIGIN, dtypes=dtypes, **inputs, **settings)


for _name in ("abs", "neg", "exp", "exp2", "expm1", "sin", "cos", "tanh", "sigmoid", "erf", "floor", "ceil", "round", "trunc", "sign",
              "isnan", "isfinite", "logical_not", "relu"):
    _dense(_name, f"aten.{_name}.default" if _name != "isfinite" else "aten.ne.Scalar", f"torch.{_name}(x)")
for _name in ("log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal"):
    _dense(_name, f"aten.{_name}.default", f"torch.{_name}(x)", fill="uniform")
_dense("silu", "aten.silu.default", "F.silu(x)")
_dense("gelu", "aten.gelu.default", "F.gelu(x)")
_dense("gelu_tanh", "aten.gelu.default", "F.gelu(x, approximate='tanh')")
_dense("mish", "aten.mish.default", "F.mish(x)")
_dense("softplus", "aten.softplus.default", "F.softplus(x)")
_dense("elu", "aten.elu.default", "F.elu(x)")
_dense("leaky_relu", "aten.leaky_relu.default", "F.leaky_relu(x)")
_dense("hardtanh", "aten.hardtanh.default", "F.hardtanh(x)")
_dense("hardswish", "aten.hardswish.default", "F.hardswish(x)")
_dense("hardsigmoid", "aten.hardsigmoid.default", "F.hardsigmoid(x)")
_dense("log_sigmoid", "aten.log_sigmoid_forward.default", "torch.ops.aten.log_sigmoid_forward(x)[0]")
_dense("silu_backward", "aten.silu_backward.default", "torch.ops.aten.silu_backward(x, y)")
_dense("gelu_backward", "aten.gelu_backward.default", "torch.ops.aten.gelu_backward(x, y)")
_dense("tanh_backward", "aten.tanh_backward.default", "torch.ops.aten.tanh_backward(x, y)")
_dense("sigmoid_backward", "aten.sigmoid_backward.default", "torch.ops.aten.sigmoid_backward(x, y)")
_dense("threshold_backward", "aten.threshold_backward.default", "torch.ops.aten.threshold_backward(x, y, 0)")
_dense("add", "aten.add.Tensor", "torch.add(x, y)")
_dense("add_alpha", "aten.add.Tensor", "torch.add(x, y, alpha=0.5)")
_dense("add_", "aten.add_.Tensor", "x.add_(y)", bytes="2 * x + y")
_dense("add_number", "aten.add.Tensor", "x + 2.5")
_dense("sub", "aten.sub.Tensor", "torch.sub(x, y)")
_dense("mul", "aten.mul.Tensor", "torch.mul(x, y)")
_dense("mul_number", "aten.mul.Tensor", "x * 0.5")
_dense("div", "aten.div.Tensor", "torch.div(x, y)", fill="uniform")
_dense("maximum", "aten.maximum.default", "torch.maximum(x, y)")
_dense("minimum", "aten.minimum.default", "torch.minimum(x, y)")
_dense("atan2", "aten.atan2.default", "torch.atan2(x, y)")
_dense("pow_number", "aten.pow.Tensor_Scalar", "x ** 2")
_dense("pow", "aten.pow.Tensor_Tensor", "torch.pow(x, y)", fill="uniform")
_dense("eq", "aten.eq.Tensor", "torch.eq(x, y)")
_dense("lt_number", "aten.lt.Scalar", "x < 0.5")
_dense("where", "aten.where.self", "torch.where(mask, x, y)")
_dense("clamp", "aten.clamp.default", "torch.clamp(x, -0.5, 0.5)")
_dense("lerp", "aten.lerp.Scalar", "torch.lerp(x, y, 0.25)")
_dense("addcmul", "aten.addcmul.default", "torch.addcmul(x, y, z, value=0.5)")
_dense("addcdiv", "aten.addcdiv.default", "torch.addcdiv(x, y, z, value=0.5)", fill="uniform")
_dense("nan_to_num", "aten.nan_to_num.default", "torch.nan_to_num(x)")
_dense("bitwise_and", "aten.bitwise_and.Tensor", "torch.bitwise_and(x, y)", ("i32",), check="equal")
_dense("to_f32", "aten._to_copy.default", "x.to(torch.float32)", ("bf16",), check="equal")
_dense("to_bf16", "aten._to_copy.default", "x.to(torch.bfloat16)", ("f32",), check="equal")
_dense("clone", "aten.clone.default", "x.clone()", check="equal")
_dense("fill_", "aten.fill_.Scalar", "x.fill_(1.5)", bytes="x", check="equal")
_dense("masked_fill", "aten.masked_fill.Scalar", "x.masked_fill(mask, 0.5)", ("bf16",), goal=1.7)

case("mul_row", "aten.mul.Tensor", "x * row", SQUARE, group="pointwise", origin="a gain over the features", dtypes=_BOTH,
     bytes="x + row + out", goal={"bf16": 2.2, "f32": 0.97}, x=T("M N"), row=T("N"))
case("mul_column", "aten.mul.Tensor", "x * column", SQUARE, group="pointwise", origin="a scale for each token", dtypes=_BOTH,
     bytes="x + column + out", goal={"bf16": 2.2, "f32": 0.97}, x=T("M N"), column=T("M 1"))
case("add_transposed", "aten.add.Tensor", "x + x.t()", SQUARE, group="pointwise", origin="making a square matrix symmetric",
     dtypes=_BOTH, bytes="2 * x + out", goal={"bf16": 4.0}, x=T("M M"))
case("rotary_mul", "aten.mul.Tensor", "q.transpose(1, 2) * cos", sized(B=1, S=2048, H=32, D=128), group="pointwise",
     origin="rotary embedding of Llama-2-7b, prefill of 2048 tokens: transposed queries by broadcast cosines",
     bytes="q + cos + out", goal=0.97, q=T("B S H D"), cos=T("B 1 S D"))


# -- reductions, scans, softmax, normalization, losses -----------------------------------------------------------------


def _reduction(label: str, op: str, call: str, sizes: Mapping[str, int], dtype: str, goal: float, origin: str, **more: Any) -> None:
    settings = {"bytes": "x + out", "group": "reduction", **more}
    settings.setdefault("x", T(" ".join(sizes)))
    case(label, op, call, sizes, dtypes=(dtype,), goal=goal, origin=origin, **settings)


_ATTENTION_ROWS = "attention scores with keys of 4096"
_VOCABULARY_ROWS = "logits over Llama's vocabulary of 32000"
_NORM = "hidden size 4096 of Llama-2-7b, 16384 tokens"

_reduction("softmax", "aten._softmax.default", "torch.softmax(x, -1)", sized(M=16384, N=4096), "bf16", 2.8, _ATTENTION_ROWS,
           liger="liger.liger_softmax(x)")
_reduction("softmax", "aten._softmax.default", "torch.softmax(x, -1)", sized(M=4096, N=32000), "bf16", 2.1, _VOCABULARY_ROWS,
           liger="liger.liger_softmax(x)")
_reduction("softmax", "aten._softmax.default", "torch.softmax(x, -1)", sized(M=262144, N=128), "bf16", 1.7, "scores of short windows")
_reduction("log_softmax", "aten._log_softmax.default", "torch.log_softmax(x, -1)", sized(M=2048, N=32000), "f32", 1.5, _VOCABULARY_ROWS)
_reduction("softmax_backward", "aten._softmax_backward_data.default",
           "torch.ops.aten._softmax_backward_data(g, y, -1, y.dtype)", sized(M=16384, N=4096), "bf16", 1.8, _ATTENTION_ROWS,
           x=T("M N"), g=T("M N"), setup={"y": "torch.softmax(x, -1)"}, bytes="2 * x + out")
_reduction("log_softmax_backward", "aten._log_softmax_backward_data.default",
           "torch.ops.aten._log_softmax_backward_data(g, y, -1, y.dtype)", sized(M=2048, N=32000), "f32", 0.97, _VOCABULARY_ROWS,
           x=T("M N"), g=T("M N"), setup={"y": "torch.log_softmax(x, -1)"}, bytes="2 * x + out")
_reduction("layer_norm", "aten.native_layer_norm.default", "F.layer_norm(x, (N,), w, b)", sized(M=16384, N=4096), "bf16", 1.5, _NORM,
           w=T("N"), b=T("N"), bytes="x + w + b + out", liger="liger.liger_layer_norm(x, w, b, 1e-5)")
_reduction("layer_norm", "aten.native_layer_norm.default", "F.layer_norm(x, (N,), w, b)", sized(M=65536, N=768), "f32", 1.7,
           "hidden size 768 of BERT-base, 128 sequences of 512", w=T("N"), b=T("N"), bytes="x + w + b + out")
_reduction("layer_norm_backward", "aten.native_layer_norm_backward.default", "torch.autograd.grad(y, (x, w, b), g, retain_graph=True)",
           sized(M=16384, N=4096), "bf16", 1.8, _NORM, x=T("M N", grad=True), w=T("N", grad=True), b=T("N", grad=True), g=T("M N"),
           setup={"y": "F.layer_norm(x, (N,), w, b)"}, bytes="x + g + w + out")
_reduction("rms_norm", "aten._fused_rms_norm.default", "F.rms_norm(x, (N,), w)", sized(M=16384, N=4096), "bf16", 1.2, _NORM,
           w=T("N"), bytes="x + w + out", liger="liger.liger_rms_norm(x, w, 1e-6)")
_reduction("rms_norm_backward", "aten._fused_rms_norm_backward.default", "torch.autograd.grad(y, (x, w), g, retain_graph=True)",
           sized(M=16384, N=4096), "bf16", 0.97, _NORM, x=T("M N", grad=True), w=T("N", grad=True), g=T("M N"),
           setup={"y": "F.rms_norm(x, (N,), w)"}, bytes="x + g + w + out")
_reduction("group_norm", "aten.native_group_norm.default", "F.group_norm(x, 32, w, b)", sized(B=16, C=320, H=64, W=64), "bf16", 3.0,
           "first block of Stable Diffusion's U-Net", w=T("C"), b=T("C"), bytes="x + w + b + out", pinned=("C",), tiny=sized(C=64))
for _name, _goal in (("sum", 1.6), ("mean", 1.6), ("amax", 2.2)):
    _overload = {"sum": "sum.dim_IntList", "mean": "mean.dim", "amax": "amax.default"}[_name]
    _reduction(f"{_name}_last", f"aten.{_overload}", f"torch.{_name}(x, -1)", SQUARE, "bf16", _goal, _SQUARE_ORIGIN)
    _reduction(f"{_name}_first", f"aten.{_overload}", f"torch.{_name}(x, 0)", SQUARE, "bf16", 2.2 if _name == "amax" else 1.4,
               _SQUARE_ORIGIN)
_reduction("argmax", "aten.argmax.default", "torch.argmax(x, -1)", sized(M=1024, N=32000), "bf16", 2.2, "greedy choice of a token")
_reduction("max_first", "aten.max.dim", "torch.max(x, 0)", SQUARE, "f32", 1.7, _SQUARE_ORIGIN)
_reduction("var_mean", "aten.var_mean.correction", "torch.var_mean(x, -1)", SQUARE, "f32", 1.9, _SQUARE_ORIGIN)
_reduction("cumsum", "aten.cumsum.default", "torch.cumsum(x, -1)", sized(M=4096, N=8192), "f32", 3.0, "many long rows")
_reduction("cumsum", "aten.cumsum.default", "torch.cumsum(x, -1)", sized(N=2**24), "f32", 1.3, "one very long row")
_reduction("sum_all", "aten.sum.default", "torch.sum(x)", SQUARE, "f32", 1.12, _SQUARE_ORIGIN)
_reduction("vector_norm", "aten.linalg_vector_norm.default", "torch.linalg.vector_norm(x)", SQUARE, "f32", 1.12, "the norm of a gradient")
_reduction("logsumexp", "aten.logsumexp.default", "torch.logsumexp(x, -1)", sized(M=2048, N=32000), "f32", 0.97, _VOCABULARY_ROWS)
_reduction("cross_entropy", "aten._log_softmax.default", "F.cross_entropy(x, target)", sized(M=8192, N=32000), "bf16", 1.8,
           _VOCABULARY_ROWS, target=T("M", "index:N", dtype="i64"), liger="liger.liger_cross_entropy(x, target)")
_reduction("cross_entropy_backward", "aten._log_softmax_backward_data.default", "torch.autograd.grad(loss, x, retain_graph=True)",
           sized(M=8192, N=32000), "bf16", 1.25, _VOCABULARY_ROWS, x=T("M N", grad=True), target=T("M", "index:N", dtype="i64"),
           setup={"loss": "F.cross_entropy(x, target)"})
_reduction("mse_loss", "aten.mse_loss.default", "F.mse_loss(x, y)", SQUARE, "f32", 0.97, _SQUARE_ORIGIN, x=T("M N"), y=T("M N"),
           bytes="x + y + out")


# -- matrix products and attention -------------------------------------------------------------------------------------


def _matmul(label: str, op: str, call: str, sizes: Mapping[str, int], dtype: str, goal: float, origin: str, flops: str = "2 * M * N * K",
            **more: Any) -> None:
    case(label, op, call, sizes, group="matmul", dtypes=(dtype,), goal=goal, origin=origin, flops=flops, **more)


def _cube(n: int) -> dict[str, int]:
    return sized(M=n, N=n, K=n)


_A, _B, _BT = T("M K"), T("K N"), T("K N", layout="t")
_matmul("mm", "aten.mm.default", "torch.mm(a, b)", _cube(8192), "bf16", 0.97, "the matrix peak", a=_A, b=_B)
_matmul("mm_nt", "aten.mm.default", "torch.mm(a, b)", _cube(4096), "bf16", 1.0, "output projection of Llama-2-7b, 4096 tokens", a=_A, b=_BT)
_matmul("mm", "aten.mm.default", "torch.mm(a, b)", _cube(4096), "f16", 0.97, "output projection's backward", a=_A, b=_B)
_matmul("mm_nt", "aten.mm.default", "torch.mm(a, b)", sized(M=2048, N=11008, K=4096), "bf16", 0.97, "gate of Llama-2-7b's MLP, 2048 tokens",
        a=_A, b=_BT)
_matmul("addmm", "aten.addmm.default", "torch.addmm(c, a, b)", sized(M=4096, N=3072, K=768), "bf16", 1.0, "BERT-base's intermediate layer",
        a=_A, b=_BT, c=T("N"))
_matmul("mm_nt", "aten.mm.default", "torch.mm(a, b)", sized(M=16, N=4096, K=4096), "bf16", 1.3, "decoding 16 sequences", a=_A, b=_BT,
        bytes="a + b + out", pinned=("M",))
_matmul("mm_nt", "aten.mm.default", "torch.mm(a, b)", sized(M=1, N=32000, K=4096), "bf16", 1.15, "Llama-2-7b's logits of one token", a=_A,
        b=_BT, bytes="a + b + out", pinned=("M",))
_matmul("bmm", "aten.bmm.default", "torch.bmm(a, b)", sized(B=128, M=1024, N=1024, K=64), "bf16", 1.1, "attention scores, head size 64",
        "2 * B * M * N * K", a=T("B M K"), b=T("B K N", layout="t"))
_matmul("mv", "aten.mv.default", "torch.mv(a, v)", sized(M=32768, K=8192), "bf16", 1.03, "one vector through a large matrix", "2 * M * K",
        a=_A, v=T("K"), bytes="a + v + out")
_matmul("mm", "aten.mm.default", "torch.mm(a, b)", _cube(2048), "f32", 1.0, "IEEE float32", a=_A, b=_B)
_matmul("addmv", "aten.addmv.default", "torch.addmv(c, a, v)", sized(M=32768, K=8192), "bf16", 0.97, "one vector, with a bias", "2 * M * K",
        a=_A, v=T("K"), c=T("M"), bytes="a + v + c + out")
_matmul("baddbmm", "aten.baddbmm.default", "torch.baddbmm(c, a, b)", sized(B=128, M=1024, N=1024, K=64), "bf16", 0.97,
        "attention scores with an additive mask", "2 * B * M * N * K", a=T("B M K"), b=T("B K N", layout="t"), c=T("B M N"))
_matmul("dot", "aten.dot.default", "torch.dot(x, y)", sized(N=2**26), "f32", 0.97, "two long vectors", "2 * N", x=T("N"), y=T("N"),
        bytes="x + y")
_matmul("outer", "aten.mul.Tensor", "torch.outer(x, y)", sized(M=8192, N=8192), "bf16", 0.97, "rank-1 matrix", "M * N", x=T("M"), y=T("N"),
        bytes="x + y + out", tiny=sized(M=64, N=64))


def _attention(label: str, sizes: Mapping[str, int], goal: float, origin: str, arguments: str, flops: str, backward: bool = False,
               **more: Any) -> None:
    attention = f"F.scaled_dot_product_attention(q, k, v{arguments})"
    kv = "B G S D" if "G" in sizes else "B H S D"
    gradient: dict[str, Any] = {"g": T("B H S D")} if backward else {}
    # The op that PyTorch breaks the call up into depends on the GPU and on cuDNN: on an H200 it is cuDNN's.
    case(label, f"aten._scaled_dot_product_cudnn_attention{'_backward' if backward else ''}.default",
         "torch.autograd.grad(y, (q, k, v), g, retain_graph=True)" if backward else attention,
         sizes, group="attention", goal=goal, origin=origin, flops=flops, rows=1, setup={"y": attention} if backward else {},
         pinned=("D", "H", "G") if "G" in sizes else ("D", "H"), tiny=sized(B=1, H=4, S=64) | (sized(G=2) if "G" in sizes else {}),
         q=T("B H S D", grad=backward), k=T(kv, grad=backward), v=T(kv, grad=backward), **gradient, **more)


_attention("attention_causal", sized(B=4, H=32, S=4096, D=128), 0.9, "Llama-2-7b, 4 prompts of 4096", ", is_causal=True",
           "2 * B * H * S * S * D")
_attention("attention", sized(B=16, H=16, S=1024, D=64), 0.95, "an encoder with 16 heads of 64", "", "4 * B * H * S * S * D")
_attention("attention_gqa", sized(B=2, H=32, G=8, S=8192, D=128), 0.9, "Llama-3-8b, 2 prompts of 8192", ", is_causal=True, enable_gqa=True",
           "2 * B * H * S * S * D")
_attention("attention_backward", sized(B=4, H=32, S=2048, D=128), 0.9, "Llama-2-7b, training on 4 sequences of 2048", ", is_causal=True",
           "5 * B * H * S * S * D", backward=True)
_attention("attention_masked", sized(B=32, H=12, S=512, D=64), 1.0, "BERT-base, 32 padded sequences of 512", ", attn_mask=mask",
           "4 * B * H * S * S * D", mask=T("B H S S"))
for _label, _sizes, _goal, _origin in (
        ("attention_decode", sized(B=16, H=32, S=4096, D=128), 1.0, "Llama-2-7b, one token for 16 sequences of 4096"),
        ("attention_decode_gqa", sized(B=4, H=32, G=8, S=8192, D=128), 1.0, "Llama-3-8b, one token for 4 sequences of 8192")):
    _kv = "B G S D" if "G" in _sizes else "B H S D"
    case(_label, "aten._scaled_dot_product_cudnn_attention.default",
         "F.scaled_dot_product_attention(q, k, v" + (", enable_gqa=True)" if "G" in _sizes else ")"), _sizes, group="attention", goal=_goal,
         origin=_origin, bytes="q + k + v + out", flops="4 * B * H * S * D", rows=1,
         pinned=("D", "H", "G") if "G" in _sizes else ("D", "H"),
         tiny=sized(B=1, H=4, S=64) | (sized(G=2) if "G" in _sizes else {}), q=T("B H 1 D"), k=T(_kv), v=T(_kv))


# -- data movement, indexing, random numbers, sorting, pooling, optimizers ---------------------------------------------

case("transpose_copy", "aten.clone.default", "x.transpose(1, 2).contiguous()", sized(B=4, S=2048, H=32, D=128), group="movement",
     origin="Llama-2-7b's heads before attention", goal=2.0, bytes="x + out", check="equal", x=T("B S H D"))
case("cat_rows", "aten.cat.default", "torch.cat((x, y))", sized(M=4096, N=8192), group="movement", origin="two halves of a batch",
     goal=1.05, bytes="x + y + out", check="equal", x=T("M N"), y=T("M N"))
case("cat_last", "aten.cat.default", "torch.cat((x, y), -1)", sized(B=1, H=32, S=2048, D=64), group="movement",
     origin="rotate_half of Llama-2-7b, prefill of 2048", goal=1.05, bytes="x + y + out", check="equal", x=T("B H S D"), y=T("B H S D"))
case("cat_cache", "aten.cat.default", "torch.cat((x, y), 2)", sized(B=1, H=32, S=4096, D=128), group="movement",
     origin="one token appended to Llama-2-7b's cache", goal=1.05, bytes="x + y + out", check="equal", x=T("B H S D"), y=T("B H 1 D"))
case("triu", "aten.triu.default", "torch.triu(x)", SQUARE, group="movement", origin="a causal mask's upper half", goal=2.0,
     bytes="x / 2 + out", check="equal", x=T("M N"))
case("tril", "aten.tril.default", "torch.tril(x)", SQUARE, group="movement", origin="a causal mask's lower half", goal=0.97,
     bytes="x / 2 + out", check="equal", x=T("M N"))
case("flip", "aten.flip.default", "torch.flip(x, (-1,))", SQUARE, group="movement", origin=_SQUARE_ORIGIN, goal=0.97, bytes="x + out",
     check="equal", x=T("M N"))
case("roll", "aten.roll.default", "torch.roll(x, 1, -1)", SQUARE, group="movement", origin=_SQUARE_ORIGIN, goal=0.97, bytes="x + out",
     check="equal", x=T("M N"))
case("repeat", "aten.repeat.default", "x.repeat(1, 4)", sized(M=8192, N=2048), group="movement", origin="grouped heads spread out",
     goal=0.97, bytes="x + out", check="equal", x=T("M N"))
case("pad", "aten.constant_pad_nd.default", "F.pad(x, (1, 1, 1, 1))", sized(B=32, C=64, H=112, W=112), group="movement",
     origin="an image's border before a convolution", goal=0.97, bytes="x + out", check="equal", x=T("B C H W"))
case("arange", "aten.arange.start_step", "torch.arange(0, N, 1, dtype=dtype, device=device)", sized(N=2**26), group="movement",
     dtypes=("i64",), origin="positions", goal=0.97, bytes="out", check="equal", tiny=sized(N=4096))
case("zeros", "aten.zeros.default", "torch.zeros(M, N, dtype=dtype, device=device)", SQUARE, group="movement", origin=_SQUARE_ORIGIN,
     goal=0.97, bytes="out", check="equal", tiny=sized(M=64, N=64))

_TOKENS = "8192 tokens, Llama's vocabulary of 32000, hidden size 4096"
case("embedding", "aten.embedding.default", "F.embedding(i, w)", sized(M=8192, V=32000, N=4096), group="indexing", origin=_TOKENS,
     goal=1.05, bytes="i + 2 * out", check="equal", i=T("M", "index:V", dtype="i64"), w=T("V N"))
case("embedding_backward", "aten.embedding_dense_backward.default", "torch.ops.aten.embedding_dense_backward(g, i, V, -1, False)",
     sized(M=8192, V=32000, N=4096), group="indexing", origin=_TOKENS, goal=3.0, bytes="i + g + out", i=T("M", "index:V", dtype="i64"),
     g=T("M N"))
case("index_select", "aten.index_select.default", "torch.index_select(x, 0, i)", sized(M=8192, V=32000, N=4096), group="indexing",
     origin=_TOKENS, goal=1.05, bytes="i + 2 * out", check="equal", i=T("M", "index:V", dtype="i64"), x=T("V N"))
case("index", "aten.index.Tensor", "x[i]", sized(M=8192, V=32000, N=4096), group="indexing", origin=_TOKENS, goal=0.97, bytes="i + 2 * out",
     check="equal", i=T("M", "index:V", dtype="i64"), x=T("V N"))
case("gather", "aten.gather.default", "torch.gather(x, 1, i)", SQUARE, group="indexing", dtypes=("f32",), origin=_SQUARE_ORIGIN, goal=1.2,
     bytes="x + i + out", check="equal", x=T("M N"), i=T("M N", "index:N", dtype="i64"))
case("scatter", "aten.scatter.src", "torch.scatter(x, 1, i, y)", sized(M=4096, N=8192), group="indexing", dtypes=("f32",),
     origin="a permutation of each row", goal=0.97, bytes="x + i + y + out", check="equal", x=T("M N"), i=T("M N", "permutation:N",
                                                                                                            dtype="i64"), y=T("M N"))
case("index_add", "aten.index_add.default", "torch.index_add(x, 0, i, y)", sized(M=8192, V=32000, N=1024), group="indexing",
     dtypes=("f32",),
     origin="gradients of 8192 rows", goal=0.97, bytes="x + i + y + out", x=T("V N"), i=T("M", "index:V", dtype="i64"), y=T("M N"))
case("masked_select", "aten.masked_select.default", "torch.masked_select(x, mask)", sized(M=4096, N=4096), group="indexing",
     dtypes=("f32",),
     origin="one value in four is kept", goal=0.97, bytes="x + mask + out", check="equal", x=T("M N"), mask=T("M N", "bool"))
case("nonzero", "aten.nonzero.default", "torch.nonzero(mask)", sized(M=4096, N=4096), group="indexing", origin="one value in four is true",
     goal=0.97, bytes="mask + out", check="equal", dtypes=("bool",), mask=T("M N", "bool"))

case("masked_scatter", "aten.masked_scatter.default", "x.masked_scatter(mask, y)", sized(M=4096, N=4096), group="indexing",
     dtypes=("bf16",), origin="image features put in their places of a prompt", goal=0.97, bytes="x + mask + y / 4 + out", check="equal",
     x=T("M N"), mask=T("M N", "bool"), y=T("M N"))
case("index_mask", "aten.index.Tensor", "x[mask]", sized(M=8192, N=4096), group="indexing", origin="the tokens that are not padding",
     goal=0.97, bytes="mask + 2 * out", check="equal", x=T("M N"), mask=T("M", "bool"))
case("index_put_mask", "aten.index_put_.default", "x.index_put_((mask,), y)", SQUARE, group="indexing", origin="x[mask] = value", goal=0.97,
     bytes="mask + x / 4", check="none", x=T("M N"), mask=T("M N", "bool"), y=T("1"))
case("gather_rows", "aten.gather.default", "torch.gather(x, 0, i)", SQUARE, group="indexing", dtypes=("f32",), origin=_SQUARE_ORIGIN,
     goal=0.97, bytes="x + i + out", check="equal", x=T("M N"), i=T("M N", "index:M", dtype="i64"))
case("scatter_add", "aten.scatter_add.default", "torch.scatter_add(x, 1, i, y)", sized(M=4096, N=8192), group="indexing", dtypes=("f32",),
     origin="counts and sums by class", goal=0.97, bytes="x + i + y + out", x=T("M N"), i=T("M N", "index:N", dtype="i64"), y=T("M N"))
case("scatter_amax", "aten.scatter_reduce.two", "torch.scatter_reduce(x, 1, i, y, 'amax')", sized(M=4096, N=8192), group="indexing",
     dtypes=("f32",), origin="the greatest by class", goal=0.97, bytes="x + i + y + out", check="equal", x=T("M N"),
     i=T("M N", "index:N", dtype="i64"), y=T("M N"))
case("repeat_interleave", "aten.repeat_interleave.Tensor", "torch.repeat_interleave(r)", sized(M=2**18), group="indexing", dtypes=("i64",),
     origin="the lengths of packed sequences", goal=0.97, bytes="r + out", check="equal", r=T("M", "index:8", dtype="i64"))

case("dropout", "aten.native_dropout.default", "torch.native_dropout(x, 0.1, True)", SQUARE, group="random", origin=_SQUARE_ORIGIN,
     goal=1.25, bytes="x + out", check="none", x=T("M N"))
case("randn", "aten.randn.default", "torch.randn(M, N, dtype=dtype, device=device)", SQUARE, group="random", dtypes=("f32",),
     origin=_SQUARE_ORIGIN, goal=1.5, bytes="out", check="none", tiny=sized(M=64, N=64))
case("rand", "aten.rand.default", "torch.rand(M, N, dtype=dtype, device=device)", SQUARE, group="random", dtypes=("f32",),
     origin=_SQUARE_ORIGIN, goal=0.97, bytes="out", check="none", tiny=sized(M=64, N=64))

case("randint", "aten.randint.low", "torch.randint(0, N, (M, N), device=device)", SQUARE, group="random", dtypes=("i64",),
     origin="random tokens", goal=0.97, bytes="out", check="none", tiny=sized(M=64, N=64))
case("bernoulli", "aten.bernoulli_.float", "x.bernoulli_(0.1)", SQUARE, group="random", origin="a mask of what is dropped", goal=0.97,
     bytes="out", check="none", x=T("M N"))
case("exponential", "aten.exponential_.default", "x.exponential_()", SQUARE, group="random", dtypes=("f32",),
     origin="the noise of sampling without a synchronisation", goal=0.97, bytes="out", check="none", x=T("M N"))
case("randperm", "aten.randperm.default", "torch.randperm(N, device=device)", sized(N=2**20), group="random", dtypes=("i64",),
     origin="shuffling a million samples", goal=0.97, bytes="out", check="none", tiny=sized(N=1000))
case("multinomial", "aten.multinomial.default", "torch.multinomial(x, 1)", sized(M=256, N=32000), group="random", dtypes=("f32",),
     origin="a token of each of 256 sequences from Llama's vocabulary", goal=0.97, bytes="x + out", check="none", x=T("M N", "uniform"))

case("sort", "aten.sort.default", "torch.sort(x, -1)", sized(M=1024, N=8192), group="sorting", dtypes=("f32",), origin="rows of 8192",
     goal=1.0, bytes="x + out", check="equal", x=T("M N"))
case("topk", "aten.topk.default", "torch.topk(x, K)[0]", sized(M=256, N=32000, K=50), group="sorting",
     origin="top-50 sampling of Llama's logits", goal=1.5, bytes="x + out", check="equal", x=T("M N"))
case("sort", "aten.sort.default", "torch.sort(x, -1)[0]", sized(M=8192, N=1024), group="sorting", origin="rows of one tile", goal=0.97,
     bytes="x + out", check="equal", x=T("M N"))
case("sort", "aten.sort.default", "torch.sort(x, -1)[0]", sized(N=2**24), group="sorting", dtypes=("f32", "i64"),
     origin="one very long row", goal=0.97, bytes="x + out", check="equal", x=T("N"))
case("topk", "aten.topk.default", "torch.topk(x, K)[0]", sized(M=1, N=2**22, K=64), group="sorting", dtypes=("f32",),
     origin="the greatest of one long row", goal=1.0, bytes="x + out", check="equal", x=T("M N"), tiny=sized(M=1, N=4096, K=64))
case("topk", "aten.topk.default", "torch.topk(x, K)[0]", sized(M=8192, N=64, K=8), group="sorting", dtypes=("f32",),
     origin="8 experts of 64 for 8192 tokens", goal=1.0, bytes="x + out", check="equal", x=T("M N"), pinned=("N", "K"))
case("kthvalue", "aten.kthvalue.default", "torch.kthvalue(x, 100, -1)[0]", sized(M=1024, N=8192), group="sorting", dtypes=("f32",),
     origin="rows of 8192", goal=0.97, bytes="x", check="equal", x=T("M N"), tiny=sized(M=16, N=512))
case("median", "aten.median.dim", "torch.median(x, -1)[0]", sized(M=1024, N=8192), group="sorting", origin="rows of 8192", goal=0.97,
     bytes="x", check="equal", x=T("M N"), tiny=sized(M=16, N=512))
case("searchsorted", "aten.searchsorted.Tensor", "torch.searchsorted(s, x)", sized(N=2**24, M=100_000), group="sorting", dtypes=("f32",),
     origin="16 M values in 100,000 sorted ones", goal=1.0, bytes="x + out", check="equal", x=T("N"), b=T("M"),
     setup={"s": "b.sort().values"})
case("bucketize", "aten.bucketize.Tensor", "torch.bucketize(x, s)", sized(N=2**24, M=100), group="sorting", dtypes=("f32",),
     origin="16 M values in 101 buckets", goal=1.0, bytes="x + out", check="equal", x=T("N"), b=T("M"), setup={"s": "b.sort().values"})
case("isin", "aten.isin.Tensor_Tensor", "torch.isin(x, t)", sized(N=2**24, M=1000, V=100_000), group="sorting", dtypes=("i64",),
     origin="16 M tokens, 1000 of which are wanted", goal=0.97, bytes="x + out", check="equal", x=T("N", "index:V"), t=T("M", "index:V"))
case("bincount", "aten.bincount.default", "torch.bincount(x, minlength=V)", sized(N=2**24, V=256), group="sorting", dtypes=("i64",),
     origin="16 M bytes", goal=1.0, bytes="2 * x", check="equal", x=T("N", "index:V"))
case("bincount", "aten.bincount.default", "torch.bincount(x, minlength=V)", sized(N=2**24, V=32000), group="sorting", dtypes=("i64",),
     origin="16 M tokens of Llama's vocabulary", goal=1.0, bytes="2 * x", check="equal", x=T("N", "index:V"))
case("histc", "aten.histc.default", "torch.histc(x, 100, -4, 4)", sized(N=2**24), group="sorting", dtypes=("f32",),
     origin="a histogram of activations", goal=0.97, bytes="x", check="equal", x=T("N"))
case("unique", "aten._unique2.default", "torch._unique2(x, True, True, True)", sized(N=2**22, V=32000), group="sorting", dtypes=("i64",),
     origin="4 M tokens of Llama's vocabulary, with inverse and counts", goal=0.97, bytes="x + out", check="equal", x=T("N", "index:V"))

case("max_pool2d", "aten.max_pool2d_with_indices.default", "F.max_pool2d(x, 3, 2, 1)", sized(B=32, C=128, H=112, W=112), group="vision",
     origin="ResNet's first pooling, twice the channels", goal=3.0, bytes="x + 5 * out", check="equal", pinned=("H", "W"),
     tiny=sized(B=1, C=2, H=28, W=28), x=T("B C H W"))
case("avg_pool2d", "aten.avg_pool2d.default", "F.avg_pool2d(x, 2)", sized(B=32, C=128, H=112, W=112), group="vision",
     origin="a halving pool", goal=0.97, bytes="x + out", pinned=("H", "W"), tiny=sized(B=1, C=2, H=28, W=28), x=T("B C H W"))
case("upsample_nearest", "aten.upsample_nearest2d.vec", "F.interpolate(x, scale_factor=2, mode='nearest')", sized(B=16, C=320, H=32, W=32),
     group="vision", origin="Stable Diffusion's U-Net", goal=0.97, bytes="x + out", check="equal", pinned=("H", "W"), tiny=sized(B=1, C=2),
     x=T("B C H W"))


def _vision(label: str, op: str, call: str, sizes: Mapping[str, int], origin: str, bytes: str = "x + out",
            tiny: Mapping[str, int] | None = None, **more: Any) -> None:
    """A case on images x, or on the gradients of y, what the setup makes of them; it must not be slower than eager."""
    settings = {"goal": 0.97, "x": T("B C H W", grad="setup" in more), **more}
    case(label, op, call, sizes, group="vision", origin=origin, bytes=bytes, pinned=("H", "W"), tiny=tiny or sized(B=1, C=2, H=28, W=28),
         **settings)


_HALVED, _DOUBLED = sized(B=32, C=128, H=112, W=112), sized(B=16, C=320, H=32, W=32)
_BACKWARD = "torch.autograd.grad(y, x, g, retain_graph=True)[0]"


def _backward_of(call: str) -> dict[str, str]:
    # The reference in float64 must have the same gradient, which is of low precision for it, too.
    return {"y": call,
            "g": "torch.randn(y.shape, generator=torch.Generator(device).manual_seed(1), device=device, dtype=low).to(dtype)"}


_vision("max_pool2d_backward", "aten.max_pool2d_with_indices_backward.default", _BACKWARD, _HALVED,
        "ResNet's first pooling, twice the channels", bytes="2.25 * x", setup=_backward_of("F.max_pool2d(x, 3, 2, 1)"))
_vision("max_pool2d 2x2", "aten.max_pool2d_with_indices.default", "F.max_pool2d(x, 2)", _HALVED, "VGG's pooling", bytes="x + 5 * out",
        check="equal")
_vision("avg_pool2d_backward", "aten.avg_pool2d_backward.default", _BACKWARD, _HALVED, "a halving pool", bytes="1.25 * x",
        setup=_backward_of("F.avg_pool2d(x, 2)"))
_vision("adaptive_avg_pool2d", "aten._adaptive_avg_pool2d.default", "F.adaptive_avg_pool2d(x, 7)", sized(B=64, C=512, H=28, W=28),
        "VGG's classifier")
_vision("upsample_bilinear2d", "aten.upsample_bilinear2d.vec", "F.interpolate(x, scale_factor=2, mode='bilinear')", _DOUBLED,
        "a decoder of segmentations", tiny=sized(B=1, C=2))
_vision("upsample_bilinear2d_backward", "aten.upsample_bilinear2d_backward.default", _BACKWARD, _DOUBLED, "a decoder of segmentations",
        bytes="5 * x", setup=_backward_of("F.interpolate(x, scale_factor=2, mode='bilinear')"), tiny=sized(B=1, C=2))
_vision("upsample_bicubic2d_aa", "aten._upsample_bicubic2d_aa.vec", "F.interpolate(x, (224, 224), mode='bicubic', antialias=True)",
        sized(B=32, C=3, H=512, W=512), "resizing photographs for a ViT", dtypes=("f32",), tiny=sized(B=1, C=1, H=256, W=256))
_vision("reflection_pad2d", "aten.reflection_pad2d.default", "F.pad(x, (1, 1, 1, 1), mode='reflect')", _HALVED, "style transfer",
        check="equal")
_vision("replication_pad2d", "aten.replication_pad2d.default", "F.pad(x, (1, 1, 1, 1), mode='replicate')", _HALVED, "a video decoder",
        check="equal")
_vision("pixel_shuffle", "aten.pixel_shuffle.default", "F.pixel_shuffle(x, 2)", sized(B=16, C=256, H=128, W=128), "super-resolution",
        check="equal", tiny=sized(B=1, C=4, H=16, W=16))
_vision("im2col", "aten.im2col.default", "F.unfold(x, 3, padding=1)", sized(B=32, C=64, H=56, W=56), "local attention", check="equal",
        tiny=sized(B=1, C=2, H=14, W=14))
_vision("col2im", "aten.col2im.default", "F.fold(columns, x.shape[-2:], 3, padding=1)", sized(B=32, C=64, H=56, W=56), "local attention",
        bytes="10 * x", setup={"columns": "F.unfold(x, 3, padding=1).detach()"}, tiny=sized(B=1, C=2))
case("patch embedding", "aten.convolution.default", "F.conv2d(x, w, b, 16)", sized(B=256, H=224, W=224, O=768), group="vision", goal=1.0,
     origin="ViT-B/16", bytes="x + w + out", flops="6 * B * O * H * W", pinned=("H", "W"), tiny=sized(B=1, H=32, W=32, O=16),
     x=T("B 3 H W"), w=T("O 3 16 16"), b=T("O"))
for _kernel, _origin in ((3, "MobileNet"), (7, "ConvNeXt")):
    case(f"depthwise {_kernel}x{_kernel}", "aten.convolution.default", f"F.conv2d(x, w, None, 1, {_kernel // 2}, 1, x.shape[1])",
         sized(B=64, C=384, H=28, W=28), group="vision", origin=_origin, goal=1.0, bytes="x + w + out", pinned=("H", "W", "C"),
         flops=f"2 * B * C * H * W * {_kernel * _kernel}", tiny=sized(B=1, C=4, H=14, W=14), x=T("B C H W"),
         w=T(f"C 1 {_kernel} {_kernel}"))

case("adamw", "aten._foreach_addcdiv_.ScalarList", "optimizer.step()", sized(L=7, H=4096, I=11008, V=32000), group="optimizer",
     origin="the parameters of a 7-layer Llama-2", goal=1.0, check="none", tiny=sized(L=1, H=16, I=32, V=64),
     bytes="7 * size * (2 * V * H + L * (4 * H * H + 3 * H * I))",
     setup={"parameters": "llama_parameters(L, H, I, V, dtype, device)",
            "optimizer": "torch.optim.AdamW(parameters, lr=1e-4, foreach=True)"})

for _label, _op, _call, _bytes, _setup in (
    ("adamw fused", "aten._fused_adamw_.default", "optimizer.step()", 7,
     {"optimizer": "torch.optim.AdamW(parameters, lr=1e-4, fused=True)"}),
    ("norms of gradients", "aten._foreach_norm.Scalar", "torch._foreach_norm(gradients, 2)", 1, {}),
    ("unscale", "aten._amp_foreach_non_finite_check_and_unscale_.default",
     "torch.ops.aten._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)", 2,
     {"found": "torch.zeros((), device=device)", "inverse": "torch.full((), 0.5, device=device)"}),
):
    # Gradients are scaled where they are float16; PyTorch has no kernel for bfloat16 ones.
    case(_label, _op, _call, sized(L=7, H=4096, I=11008, V=32000), group="optimizer", origin="the parameters of a 7-layer Llama-2",
         dtypes=("f16",) if _label == "unscale" else ("bf16",), goal=0.97, check="none", tiny=sized(L=1, H=16, I=32, V=64),
         bytes=f"{_bytes} * size * (2 * V * H + L * (4 * H * H + 3 * H * I))",
         setup={"parameters": "llama_parameters(L, H, I, V, dtype, device)", "gradients": "[p.grad for p in parameters]", **_setup})


def llama_parameters(layers: int, hidden: int, inner: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Parameters of a Llama with random values and gradients."""
    shapes = [(vocabulary, hidden), (vocabulary, hidden), (hidden,)]
    for _ in range(layers):
        shapes += [(hidden, hidden)] * 4 + [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    made = []
    for shape in shapes:
        parameter = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
        parameter.grad = torch.randn(shape, dtype=dtype, device=device)
        made.append(parameter)
    return made


# -- host time ---------------------------------------------------------------------------------------------------------

_TINY_ORIGIN = "64 by 64: the device is idle and host time decides"


def _tiny(label: str, op: str, call: str, goal: float | None = 1 / 1.4, **inputs: Any) -> None:
    case(f"tiny_{label}", op, call, sized(M=64, N=64), group="tiny", origin=_TINY_ORIGIN, goal=goal, check="none", **inputs)


_X, _Y = T("M N"), T("M N")
_tiny("add", "aten.add.Tensor", "torch.add(x, y)", x=_X, y=_Y)
_tiny("mul", "aten.mul.Tensor", "x * 2.0", x=_X)
_tiny("silu", "aten.silu.default", "F.silu(x)", x=_X)
_tiny("gelu", "aten.gelu.default", "F.gelu(x)", x=_X)
_tiny("sum", "aten.sum.dim_IntList", "torch.sum(x, -1)", x=_X)
_tiny("softmax", "aten._softmax.default", "torch.softmax(x, -1)", x=_X)
_tiny("layer_norm", "aten.native_layer_norm.default", "F.layer_norm(x, (64,), w, b)", x=_X, w=T("N"), b=T("N"))
_tiny("mm", "aten.mm.default", "torch.mm(x, y)", x=_X, y=_Y)
_tiny("addmm", "aten.addmm.default", "torch.addmm(b, x, y)", x=_X, y=_Y, b=T("N"))
_tiny("embedding", "aten.embedding.default", "F.embedding(i, x)", x=_X, i=T("64", "index:M", dtype="i64"))
_tiny("cat", "aten.cat.default", "torch.cat((x, y))", x=_X, y=_Y)
_tiny("add_", "aten.add_.Tensor", "x.add_(y)", x=_X, y=_Y)
case("tiny_pass", "aten.add.Tensor", "torch.add(x, y)", sized(M=64, N=64), group="tiny", dtypes=("c64",), check="none",
     origin="64 by 64, complex: a call that passes through", at_most={"gemsmode.over_eager_us": 2.5}, x=_X, y=_Y)
_tiny("view", "aten.view.default", "x.view(4096)", None, at_most={"gemsmode.over_eager_us": 3.0}, x=_X)
_tiny("t", "aten.t.default", "x.t()", None, at_most={"gemsmode.over_eager_us": 3.0}, x=_X)

GROWING = range(1024, 2024)
"""The sizes S of the cases of group ``growing``: one call with each, new every time."""


def _growing(label: str, op: str, call: str, **inputs: Any) -> None:
    case(f"growing_{label}", op, call, sized(S=GROWING.stop), group="growing", check="none",
         origin="1,000 sizes, each one larger, as a growing cache gives: what a new size costs", **inputs)


_growing("add", "aten.add.Tensor", "torch.add(x, y)", x=T("S 64"), y=T("S 64"))
_growing("mul_row", "aten.mul.Tensor", "x * y", x=T("64 S"), y=T("S"))
_growing("softmax", "aten._softmax.default", "torch.softmax(x, -1)", x=T("8 S"))
_growing("sum", "aten.sum.dim_IntList", "torch.sum(x, -1)", x=T("8 S"))
_growing("mm", "aten.mm.default", "torch.mm(x, y)", x=T("S 64"), y=T("64 64"))
_growing("cat", "aten.cat.default", "torch.cat((x, y), 2)", x=T("1 8 S 64"), y=T("1 8 1 64"))


# -- starting ----------------------------------------------------------------------------------------------------------

case("start", "aten.add.Tensor", "torch.add(x, x)", sized(M=64, N=64), group="start", check="none",
     origin="processes of their own: importing, the first call of a pointwise op with an empty cache, and the same once more",
     at_most={"gemsmode.import_s": 1.0, "gemsmode.first_call_s": 0.3, "gemsmode.compiled_again": 0.0}, x=T("M N"))

# -- whole models ------------------------------------------------------------------------------------------------------
#
# Random weights in the architectures' published sizes; `perf/models.py` builds them.


def _model(label: str, call: str, sizes: Mapping[str, int], dtype: str, goal: float | None, origin: str, memory: float, build: str,
           **more: Any) -> None:
    settings = {"check": "none", "tiny": sized(B=1, S=8), **more}
    case(label, "aten.mm.default", call, sizes, group="model", dtypes=(dtype,), goal=goal, origin=origin, memory=memory,
         needs=("transformers",), setup={"model": build}, **settings)


_model("bert_base", "model()", sized(B=32, S=512), "f16", 1.15, "BERT-base, forward of 32 sequences of 512", 8.0,
       "models.bert(B, S, dtype, device, low)", check="float64")
_model("llama2_7b_prefill", "model()", sized(B=1, S=2048), "bf16", 1.25, "Llama-2-7b, a prompt of 2048 tokens, without a cache", 24.0,
       "models.llama_prefill(B, S, dtype, device)")
_model("llama2_7b_decode", "model()", sized(B=1, S=512), "bf16", None,
       "Llama-2-7b, one token after 512, with transformers' static cache of 1024", 24.0, "models.llama_decode(B, S, dtype, device)",
       at_most={"capture.wall_us": 4500.0, "patch+capture.wall_us": 4500.0})
_model("llama_training_step", "model()", sized(B=2, S=2048), "bf16", 1.2,
       "Llama-2 of 4 layers: forward, loss, backward and AdamW(foreach=True) on 2 sequences of 2048", 48.0,
       "models.llama_training(B, S, dtype, device)")


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every declared case.

    Raises:
        ValueError: two cases have one name.
    """
    names: set[str] = set()
    for c in _cases:
        if c.name in names:
            raise ValueError(f"two cases are called {c.name!r}")
        names.add(c.name)
    return tuple(_cases)
