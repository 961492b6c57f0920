"""Modules made of gemsmode's fused ops, as drop-in replacements: parameters have the names and shapes of what they replace,
so that a ``state_dict`` fits both ways.

    RMSNorm, SkipRMSNorm          torch.nn.RMSNorm, transformers' LlamaRMSNorm and its kin (``unit_offset``: Gemma's)
    SkipLayerNorm                 torch.nn.LayerNorm after an addition
    GatedMLP                      transformers' LlamaMLP and its kin
    RotaryEmbedding               rotary embedding of queries and keys, angles included
    CrossEntropyLoss              torch.nn.CrossEntropyLoss
    LinearCrossEntropyLoss        torch.nn.Linear (an ``lm_head``) followed by it, without the logits

They work inside and outside of ``GemsMode``. Reached as ``gemsmode.nn``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gemsmode.ops import fused

__all__ = ["CrossEntropyLoss", "GatedMLP", "LinearCrossEntropyLoss", "RMSNorm", "RotaryEmbedding", "SkipLayerNorm", "SkipRMSNorm"]


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimensions.

    Args:
        normalized_shape: their sizes; an int for one.
        eps: added to the mean square; None for the machine epsilon of the dtype that is computed in.
        unit_offset: multiply by ``1 + weight``, and start from a weight of zeros.
    """

    def __init__(self, normalized_shape: int | Sequence[int], eps: float | None = 1e-6, unit_offset: bool = False,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.unit_offset = eps, unit_offset
        start = torch.zeros if unit_offset else torch.ones
        self.weight = torch.nn.Parameter(start(self.normalized_shape, device=device, dtype=dtype))

    @property
    def scale(self) -> torch.Tensor:
        """What the normalized values are multiplied by."""
        return 1.0 + self.weight.float() if self.unit_offset else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, self.normalized_shape, self.scale, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}" + (", unit_offset=True" if self.unit_offset else "")


class SkipRMSNorm(RMSNorm):
    """``(rms_norm(x + residual), x + residual)``."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return fused.skip_rms_norm(x, residual, self.normalized_shape, self.scale, self.eps)


class SkipLayerNorm(torch.nn.LayerNorm):
    """``layer_norm(x + residual)``, and with ``return_sum=True`` also ``x + residual``. Other arguments are ``LayerNorm``'s."""

    def __init__(self, *args: Any, return_sum: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.return_sum = return_sum

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        function: Callable[..., Any] = fused.add_layer_norm if self.return_sum else fused.skip_layer_norm
        return function(x, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class GatedMLP(torch.nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``.

    Args:
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Raises:
        ValueError: another activation.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu", bias: bool = False,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if activation not in ("silu", "gelu", "gelu_tanh"):
            raise ValueError(f"activation={activation!r}: expected 'silu', 'gelu' or 'gelu_tanh'")
        self.activation = activation
        self.gate_proj, self.up_proj = (torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype) for _ in range(2))
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(fused.silu_and_mul(gate, up))
        return self.down_proj(fused.gelu_and_mul(gate, up, "none" if self.activation == "gelu" else "tanh"))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding with angles ``position / base^(2 i / dim)``, in float32.

    Args:
        dim: elements of a head that are turned; the others are copied.
        base: of the geometric series of frequencies.
        interleaved: pairs are elements (2 i, 2 i + 1); otherwise (i, i + dim / 2).
        heads_first: queries and keys are [batch, heads, tokens, head size]; otherwise [batch, tokens, heads, head size].
    """

    inv_freq: torch.Tensor

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False, heads_first: bool = False, device: Any = None) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.heads_first = dim, base, interleaved, heads_first
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.register_buffer("inv_freq", 1.0 / base**powers, persistent=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k turned by the angles of ``position_ids`` [batch or 1, tokens] (default: 0, 1, 2...)."""
        if position_ids is None:
            position_ids = torch.arange(q.shape[2 if self.heads_first else 1], device=q.device).unsqueeze(0)
        with torch.no_grad():
            angles = position_ids.unsqueeze(-1).float() * self.inv_freq.float()
            cos, sin = angles.cos(), angles.sin()
            if q.dtype == torch.float64:
                cos, sin = cos.double(), sin.double()
        return fused.turn(q, k, cos, sin, None, self.interleaved, False, self.heads_first)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}, heads_first={self.heads_first}"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` in one read of the logits."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return fused.cross_entropy_loss(input, target, self.weight, self.reduction, self.ignore_index, self.label_smoothing)


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of a linear layer of its input, whose logits never exist all at once.

    ``weight`` and ``bias`` are those of a ``torch.nn.Linear(in_features, num_classes)``: a language model's ``lm_head`` loads
    into it, and its weight may be tied (``loss.weight = lm_head.weight``).

    Args:
        in_features: width of the input.
        num_classes: classes (the vocabulary).
        bias: whether the layer has one.
        reduction, ignore_index, label_smoothing: as of ``torch.nn.CrossEntropyLoss``.
        chunk: rows of logits at a time; 0: chosen by size.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = False, reduction: str = "mean", ignore_index: int = -100,
                 label_smoothing: float = 0.0, chunk: int = 0, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.reduction, self.ignore_index, self.label_smoothing, self.chunk = reduction, ignore_index, label_smoothing, chunk

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of ``input`` [..., in_features] and class indices ``target`` [...]."""
        return fused.linear_cross_entropy(input, self.weight, target, self.bias, None, self.reduction, self.ignore_index,
                                          self.label_smoothing, self.chunk)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, num_classes={self.weight.shape[0]}, bias={self.bias is not None}"
