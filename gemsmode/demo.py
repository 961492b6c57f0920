"""``gemsmode demo``: two small models on the bytes of a real text, natively and under the mode.

A decoder in Llama's style predicts the next byte, an encoder made of ``torch.nn`` layers fills in masked bytes; each
runs forward and backward, first natively, then under :class:`~gemsmode.GemsMode`, on the same weights and bytes.
What is shown: how far results and gradients are apart, what was replaced, and how long it took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gemsmode.mode import GemsMode
from gemsmode.target import current
from gemsmode.tracing import Report

TEXT = Path(__file__).parent / "data" / "gettysburg.txt"
"""Lincoln's Gettysburg Address (the Bliss copy), in the public domain."""

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Size:
    """How large the demo's models and inputs are."""

    width: int
    layers: int
    heads: int
    batch: int
    length: int
    repeats: int


SIZES = {
    "tiny": Size(width=64, layers=1, heads=2, batch=2, length=32, repeats=1),  # for the interpreter
    "small": Size(width=512, layers=4, heads=8, batch=8, length=256, repeats=10),
    "large": Size(width=2048, layers=8, heads=16, batch=8, length=1024, repeats=10),
}


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, written out as most models have it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x``, [batch, heads, length, depth]."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class DecoderLayer(nn.Module):
    """Causal attention and a gated feed-forward, each behind an RMSNorm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = RMSNorm(size.width), RMSNorm(size.width)
        self.q, self.k, self.v, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.width, 3 * size.width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * size.width, size.width, bias=False)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotary(q), rotary(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), -1)
        return self.o((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A decoder in Llama's style over bytes: predicts each next one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


class Encoder(nn.Module):
    """An encoder of ``torch.nn`` layers over bytes: fills in every fifth one, which it does not see."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.position = nn.Embedding(size.length, size.width)
        layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = places % 5 == 4
        x = self.embedding(tokens.masked_fill(hidden, 0)) + self.position(places)
        logits = self.head(self.layers(x))
        return logits, F.cross_entropy(logits[:, hidden].reshape(-1, VOCABULARY), tokens[:, hidden].reshape(-1))


@dataclass(frozen=True)
class Outcome:
    """One model natively and under the mode.

    Attributes:
        name: ``"decoder"`` or ``"encoder"``.
        parameters: how many the model has.
        loss_native, loss_gems: the loss of each.
        logits: largest difference of a logit, relative to the largest logit.
        gradients: largest difference of a gradient, relative to the largest entry of its tensor.
        worst: the parameter where that was.
        native_s, gems_s: seconds of a forward and backward, the median; device time is waited for.
    """

    name: str
    parameters: int
    loss_native: float
    loss_gems: float
    logits: float
    gradients: float
    worst: str
    native_s: float
    gems_s: float


def read_bytes(path: Path, size: Size, device: torch.device) -> torch.Tensor:
    """``[batch, length]`` bytes of a file, from places spread over it; a short file is repeated.

    Raises:
        ValueError: the file is empty.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty; the demo needs a text to read")
    data = data * (1 + size.length // len(data))
    last = len(data) - size.length
    starts = [last * i // max(size.batch - 1, 1) for i in range(size.batch)]
    return torch.stack([torch.frombuffer(bytearray(data[s:s + size.length]), dtype=torch.uint8) for s in starts]).to(device, torch.int64)


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.abs().max().item()
    return (got.double() - expected.double()).abs().max().item() / (scale or 1.0)


def _step(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    logits, loss = model(tokens)
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _median_time(run: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> float:
    times = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def run_model(name: str, size: Size, tokens: torch.Tensor, dtype: torch.dtype, traced: GemsMode, seed: int = 0,
              **options: Any) -> Outcome:
    """Run one of the demo's models natively and under the mode.

    Args:
        name: ``"decoder"`` or ``"encoder"``.
        size: how large.
        tokens: its input, ``[batch, length]`` of int64.
        dtype: of the weights.
        traced: the mode that records.
        seed: of the weights.
        options: of the mode without a trace that is timed.
    """
    torch.manual_seed(seed)
    model = (Decoder(size) if name == "decoder" else Encoder(size)).to(tokens.device, dtype)
    synchronize: Callable[[], None] = (lambda: torch.accelerator.synchronize()) if tokens.device.type != "cpu" else (lambda: None)
    logits, loss, gradients = _step(model, tokens)  # also warms up
    native_s = _median_time(lambda: _step(model, tokens), max(size.repeats, 3), synchronize)
    if size.repeats > 1:
        untraced = GemsMode(**options)
        with untraced:
            _step(model, tokens)  # compiles
            gems_s = _median_time(lambda: _step(model, tokens), size.repeats, synchronize)
    with traced:
        synchronize()
        began = time.perf_counter()
        got_logits, got_loss, got_gradients = _step(model, tokens)
        synchronize()
        traced_s = time.perf_counter() - began
    if size.repeats == 1:
        gems_s = traced_s
    apart = {n: _relative(got_gradients[n], g) for n, g in gradients.items()}
    worst = max(apart, key=lambda n: apart[n])
    return Outcome(name, sum(p.numel() for p in model.parameters()), loss.item(), got_loss.item(), _relative(got_logits, logits),
                   apart[worst], worst, native_s, gems_s)


def run(size: str | None = None, text: Path = TEXT, dtype: torch.dtype | None = None, models: tuple[str, ...] = ("decoder", "encoder"),
        **options: Any) -> tuple[list[Outcome], Report]:
    """The demo: each model on the bytes of ``text``, and what the mode did to both.

    Args:
        size: one of :data:`SIZES`; ``"tiny"`` in the interpreter, else ``"small"``.
        text: any file.
        dtype: of the weights; float32 in the interpreter, else bfloat16.
        models: which.
        options: of the mode (``allow``, ``deny``, ``strict``).

    Raises:
        ValueError: ``text`` is empty.
        OSError: it cannot be read.
    """
    target = current()
    device = torch.device(target.device_type)
    chosen = SIZES[size or ("tiny" if target.interpreted else "small")]
    dtype = dtype or (torch.float32 if target.interpreted else torch.bfloat16)
    tokens = read_bytes(text, chosen, device)
    traced = GemsMode(trace=True, **options)
    outcomes = [run_model(name, chosen, tokens, dtype, traced, **options) for name in models]
    return outcomes, traced.report


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-6}
"""How far apart, relative to the largest entry, a logit or a gradient may be before the demo fails (the rotary angles are
float32 whatever the weights are)."""
