"""Fused ops as functions: what models write in several ops, in one kernel, forward and backward.

They work inside and outside of ``GemsMode``, under ``torch.compile``, on any device (PyTorch's own ops serve where the
kernels do not: another device, ``DTensor``, ``torch.func`` transforms), and are differentiable once. Each is a registered op,
``torch.ops.gemsmode.<name>``; in a mode's report they count as replaced. Values are rounded once, at the end, where the
unfused ops round after every step: 16-bit results differ from those in the last bit.

    ======================  ===================================================================================
    rms_norm                y = x / sqrt(mean(x^2) + eps) * w
    skip_rms_norm           (rms_norm(x + residual), x + residual)
    fused_add_rms_norm      the same, written into x and residual
    skip_layer_norm         layer_norm(x + residual)
    add_layer_norm          (layer_norm(x + residual), x + residual)
    silu_and_mul            silu(a) * b
    gelu_and_mul            gelu(a) * b
    add_bias_gelu           gelu(x + bias)
    linear                  x @ w.T + bias, as one op
    linear_gelu             gelu(x @ w.T + bias)
    gated_linear            silu(x @ gate.T) * (x @ up.T), for one row in one launch
    qkv_linear              three linear layers of x, for one row in one launch
    apply_rotary_pos_emb    q and k turned by their positions' angles
    cross_entropy_loss      F.cross_entropy, in one read of the logits
    linear_cross_entropy    F.cross_entropy(F.linear(x, w), target), without all of the logits at once
    topk_softmax            the k largest of softmax(x) and their indices
    ======================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from gemsmode.custom import shape_of, wants_gradient
from gemsmode.ops import cross_entropy as _cross_entropy
from gemsmode.ops import gates, rotary, skip_norm
from gemsmode.ops import linear as _linear
from gemsmode.ops import row_linear as _row_linear
from gemsmode.ops import topk_softmax as _topk_softmax

__all__ = ["add_bias_gelu", "add_layer_norm", "apply_rotary_pos_emb", "cross_entropy_loss", "fused_add_rms_norm", "gated_linear",
           "gelu_and_mul", "linear", "linear_cross_entropy", "linear_gelu", "qkv_linear", "rms_norm", "silu_and_mul",
           "skip_layer_norm", "skip_rms_norm", "topk_softmax"]

Shape = int | Sequence[int]


def rms_norm(x: torch.Tensor, normalized_shape: Shape, weight: torch.Tensor | None = None, eps: float | None = None) -> torch.Tensor:
    """RMS norm over the last dimensions.

    Args:
        x: [..., *normalized_shape], floating point.
        normalized_shape: the sizes of the dimensions that are normalized.
        weight: [*normalized_shape], of any float dtype; None for ones.
        eps: None for the machine epsilon of the dtype that is computed in.

    Returns:
        A tensor like ``x``.
    """
    return skip_norm.rms_norm(x, shape_of(normalized_shape), weight, eps)[0]


def skip_rms_norm(x: torch.Tensor, residual: torch.Tensor, normalized_shape: Shape, weight: torch.Tensor | None = None,
                  eps: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``: the norm before a block, and what the block's result is added to.

    Args as for :func:`rms_norm`; ``residual`` has the shape of ``x``. Results have the dtype of the sum.
    """
    return skip_norm.skip_rms_norm(x, residual, shape_of(normalized_shape), weight, eps, True)[:2]


def fused_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, normalized_shape: Shape, weight: torch.Tensor | None = None,
                       eps: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: ``residual`` becomes ``x + residual`` and ``x`` the RMS norm of it. Both are returned.

    Where gradients are recorded the results are computed beside and copied, which autograd follows.
    """
    shape = shape_of(normalized_shape)
    if wants_gradient(x, residual, weight):
        y, total = skip_rms_norm(x, residual, shape, weight, eps)
        return x.copy_(y), residual.copy_(total)
    skip_norm.fused_add_rms_norm(x, residual, shape, weight, eps)
    return x, residual


def skip_layer_norm(x: torch.Tensor, residual: torch.Tensor, normalized_shape: Shape, weight: torch.Tensor | None = None,
                    bias: torch.Tensor | None = None, eps: float = 1e-5) -> torch.Tensor:
    """``layer_norm(x + residual)``: the end of a block whose norm comes last (BERT).

    Args:
        x: [..., *normalized_shape], floating point.
        residual: as ``x``.
        normalized_shape: the sizes of the dimensions that are normalized.
        weight: [*normalized_shape], or None for ones.
        bias: [*normalized_shape], or None for zeros.
        eps: added to the variance.
    """
    keep = torch.is_grad_enabled() and wants_gradient(x, residual, weight, bias)
    return skip_norm.skip_layer_norm(x, residual, shape_of(normalized_shape), weight, bias, eps, keep)[0]


def add_layer_norm(x: torch.Tensor, residual: torch.Tensor, normalized_shape: Shape, weight: torch.Tensor | None = None,
                   bias: torch.Tensor | None = None, eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """``(layer_norm(x + residual), x + residual)``: :func:`skip_layer_norm` with the sum, for blocks whose norm comes first (GPT-2)."""
    return skip_norm.skip_layer_norm(x, residual, shape_of(normalized_shape), weight, bias, eps, True)[:2]


def silu_and_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``silu(a) * b``: the gate of Llama's MLP, of two tensors that broadcast."""
    return gates.silu_and_mul(a, b)


def gelu_and_mul(a: torch.Tensor, b: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``gelu(a) * b``: the gate of Gemma's MLP; ``approximate`` is ``"none"`` or ``"tanh"``."""
    return gates.gelu_and_mul(a, b, approximate)


def add_bias_gelu(x: torch.Tensor, bias: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``gelu(x + bias)`` for a bias that broadcasts to ``x``; ``approximate`` is ``"none"`` or ``"tanh"``."""
    return gates.add_bias_gelu(x, bias, approximate)


def _taken_apart(input: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether a linear layer has to be PyTorch's: for a gradient, for autocast, or for a compiler that does better."""
    return (torch.is_grad_enabled() and wants_gradient(input, *parameters)) or torch.is_autocast_enabled(input.device.type) \
        or torch.compiler.is_compiling()


def is_one_row(input: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether linear layers of ``input`` are products of one row, and computed as ops of their own."""
    return input.ndim > 0 and input.numel() == input.shape[-1] and not _taken_apart(input, *parameters)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` for inference, as one op where PyTorch makes a transpose, views and a product of it.

    Where a gradient is wanted, under autocast and in compiled code it is ``torch.nn.functional.linear``.

    Args:
        input: [..., width].
        weight: [features, width].
        bias: [features].

    Returns:
        [..., features].
    """
    return F.linear(input, weight, bias) if _taken_apart(input, weight, bias) else _linear.linear(input, weight, bias)


def linear_gelu(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """``gelu(linear(input, weight, bias))`` without storing what is between.

    A gradient needs that: where one is wanted (under autocast and in compiled code, too) the layer and its activation are
    two ops.

    Args:
        input: [..., width].
        weight: [features, width].
        bias: [features].
        approximate: ``"none"`` or ``"tanh"``.

    Returns:
        [..., features].
    """
    if _taken_apart(input, weight, bias):
        return F.gelu(F.linear(input, weight, bias), approximate=approximate)
    return _linear.linear_gelu(input, weight, bias, approximate)


def gated_linear(input: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``activation(linear(input, gate)) * linear(input, up)``: the first half of Llama's MLP.

    One row (a token in generation) is one launch, which reads both weights; more rows, and what :func:`linear` takes apart, are
    the layers and their gate.

    Args:
        input: [..., width].
        gate: [features, width].
        up: [features, width].
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        [..., features].

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in _GATES:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(map(repr, _GATES))}")
    if is_one_row(input, gate, up):
        return _row_linear.gated_linear(input, gate, up, activation)
    return _GATES[activation](linear(input, gate), linear(input, up))


def qkv_linear(input: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bias: torch.Tensor | None = None,
               k_bias: torch.Tensor | None = None, v_bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three linear layers of one input: the queries, keys and values of an attention.

    One row (a token in generation) is one launch, which reads all weights; more rows, and what :func:`linear` takes apart, are
    three layers.

    Args:
        input: [..., width].
        q, k, v: [features of each, width].
        q_bias, k_bias, v_bias: [features of each].

    Returns:
        Three tensors [..., features of each].
    """
    if is_one_row(input, q, k, v, q_bias, k_bias, v_bias):
        return _row_linear.qkv_linear(input, q, k, v, q_bias, k_bias, v_bias)
    return linear(input, q, q_bias), linear(input, k, k_bias), linear(input, v, v_bias)


def apply_rotary_pos_emb(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None,
                         rotary_interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of queries and keys.

    Args:
        q: [..., tokens, heads, head size].
        k: [..., tokens, heads of k, head size].
        cos: [positions, R]: of each position the cosines of R angles. The first 2 R elements of a head are turned, the
            others are copied (partial rotary embedding).
        sin: [positions, R].
        position_ids: [..., tokens] (integers): each token's position; by default 0, 1, 2...
        rotary_interleaved: pairs are elements (2 i, 2 i + 1) of a head; otherwise (i, i + R).

    Returns:
        q and k turned, in new tensors.
    """
    lead = q.shape[:-3]
    if len(lead) != 1:
        q4, k4 = (t.reshape(-1, *t.shape[-3:]) for t in (q, k))
    else:
        q4, k4 = q, k
    if position_ids is not None:
        position_ids = position_ids.reshape(-1, q.shape[-3])
    rotated = turn(q4, k4, cos, sin, position_ids, rotary_interleaved)
    return rotated if len(lead) == 1 else tuple([t.reshape(*lead, *t.shape[1:]) for t in rotated])


def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None,
         interleaved: bool = False, full_width: bool = False, heads_first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The op behind :func:`apply_rotary_pos_emb`, for four dimensions.

    Args:
        cos: also [batch or 1, tokens, R].
        full_width: cos and sin have 2 R values, one for each element that is turned.
        heads_first: q and k are [batch, heads, tokens, head size].
    """
    args = (q, k, cos, sin, position_ids, interleaved, full_width, heads_first)
    if wants_gradient(cos, sin):
        # The kernel gives no gradient of the angles.
        return rotary.rotary_embedding.reference(*args)
    return rotary.rotary_embedding(*args)


_GATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": silu_and_mul, "gelu": gelu_and_mul, "gelu_tanh": lambda a, b: gelu_and_mul(a, b, "tanh")}

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, 0: 0, 1: 1, 2: 2}


def _reduction(given: str | int) -> int:
    if given not in _REDUCTIONS:
        raise ValueError(f"reduction={given!r}: expected 'none', 'mean' or 'sum' (or PyTorch's numbers 0, 1 and 2 of them)")
    return _REDUCTIONS[given]


def cross_entropy_loss(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, reduction: str | int = "mean",
                       ignore_index: int = -100, label_smoothing: float = 0.0, *, float32: bool = False) -> torch.Tensor:
    """``torch.nn.functional.cross_entropy`` in one read of the logits, of which nothing is stored.

    Args:
        input: logits [rows, classes], [classes] or [batch, classes, ...].
        target: class indices in the input's shape without the classes (class probabilities go to PyTorch's own).
        weight: [classes]: of each class the weight. Together with label smoothing it goes to PyTorch's own.
        reduction: ``"none"``, ``"mean"``, ``"sum"``, or PyTorch's numbers 0, 1, 2 of them.
        ignore_index: rows with this target do not count.
        label_smoothing: between 0 and 1.
        float32: give a float32 loss for 16-bit logits.

    Raises:
        ValueError: an unknown reduction.
    """
    kind = _reduction(reduction)
    if target.is_floating_point() or wants_gradient(weight) or (weight is not None and label_smoothing) or target.numel() == 0:
        wide = input.float() if float32 and input.dtype.itemsize == 2 else input
        return F.cross_entropy(wide, target, weight, reduction=("none", "mean", "sum")[kind], ignore_index=ignore_index,
                               label_smoothing=label_smoothing)
    return _cross_entropy.cross_entropy(input, target, weight, kind, ignore_index, label_smoothing, float32)[0]


def linear_cross_entropy(input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None = None,
                         weight: torch.Tensor | None = None, reduction: str | int = "mean", ignore_index: int = -100,
                         label_smoothing: float = 0.0, chunk: int = 0) -> torch.Tensor:
    """``cross_entropy(linear(input, linear_weight, bias), target)`` whose logits never exist all at once.

    The logits of ``chunk`` rows are computed at a time, once in forward and once in backward: a third more matrix products
    for rows * classes numbers less of memory.

    Args:
        input: [..., width]; with ``target`` [...].
        linear_weight: [classes, width].
        target: class indices.
        bias: [classes].
        weight: [classes]: of each class the weight; not together with label smoothing.
        chunk: rows at a time; by default as many as make the logits as large as the input, and at least 1024.

    Returns:
        The loss, in float32 for 16-bit input.

    Raises:
        ValueError: an unknown reduction, or label smoothing with class weights.
    """
    kind = _reduction(reduction)
    if weight is not None and label_smoothing:
        raise ValueError("linear_cross_entropy takes label smoothing or class weights, not both")
    flat, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    if flat.shape[0] == 0:
        return cross_entropy_loss(F.linear(flat, linear_weight, bias), targets, weight, kind, ignore_index, label_smoothing, float32=True)
    loss = _cross_entropy.linear_cross_entropy(flat, linear_weight, targets, bias, weight, kind, ignore_index, label_smoothing, chunk)[0]
    return loss if kind else loss.reshape(target.shape)


def topk_softmax(gating_output: torch.Tensor, k: int, renormalize: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate of a mixture of experts: ``softmax(gating_output).topk(k)``.

    Args:
        gating_output: [..., experts].
        k: how many experts to choose.
        renormalize: divide the weights by their sum.

    Returns:
        Weights [..., k] in float32 (float64 for float64) and indices [..., k] in int64, largest first.
    """
    return _topk_softmax.topk_softmax(gating_output, k, renormalize)
