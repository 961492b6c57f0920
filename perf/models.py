"""Whole models for the benchmark, from ``transformers``' configurations with random weights; each is a callable of no argument.

Without a GPU sequences are short, and the models are then small ones of the same architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SHORT = 64
"""Sequences shorter than this are a small model's."""

CACHE = 1024
"""Tokens that the static cache holds."""


@contextmanager
def _made_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Parameters are made on ``device`` in ``dtype``, the same ones each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def _tokens(batch: int, length: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, vocabulary, (batch, length), device=device, generator=generator)


class Bert:
    """A forward of BERT-base; gives the last hidden state."""

    def __init__(self, batch: int, length: int, dtype: torch.dtype, device: torch.device, low: torch.dtype) -> None:
        import transformers

        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
        config = transformers.BertConfig(**small if length < SHORT else {})
        with _made_as(low, device):
            model = transformers.BertModel(config, add_pooling_layer=False)
        # A reference in a wider dtype has the same weights.
        self.model = model.to(dtype).eval()
        self.tokens = _tokens(batch, length, config.vocab_size, device)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.tokens).last_hidden_state


def bert(batch: int, length: int, dtype: torch.dtype, device: torch.device, low: torch.dtype) -> Bert:
    """BERT-base with weights that ``low`` can hold, computing in ``dtype``."""
    return Bert(batch, length, dtype, device, low)


def _llama(length: int, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Any:
    import transformers

    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100, "num_hidden_layers": 2}
    settings: dict[str, Any] = small if length < SHORT else {"num_hidden_layers": layers or 32}  # the defaults are Llama-2-7b's
    config = transformers.LlamaConfig(max_position_embeddings=4096, **settings)
    with _made_as(dtype, device):
        return transformers.LlamaForCausalLM(config)


class Prefill:
    """A forward of a whole prompt, without a cache; gives the logits of the last token."""

    def __init__(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model = _llama(length, dtype, device).eval()
        self.tokens = _tokens(batch, length, self.model.config.vocab_size, device)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.tokens, use_cache=False, logits_to_keep=1).logits


def llama_prefill(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Prefill:
    """Llama-2-7b on a prompt."""
    return Prefill(batch, length, dtype, device)


class Decode:
    """One token after a prompt, again and again at the same position; gives its logits."""

    def __init__(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        self.model = _llama(length, dtype, device).eval()
        self.cache = transformers.StaticCache(config=self.model.config, max_cache_len=CACHE if length >= SHORT else 2 * length)
        tokens = _tokens(batch, length + 1, self.model.config.vocab_size, device)
        with torch.no_grad():
            self.model(tokens[:, :length], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = tokens[:, length:].contiguous()
        self.position = torch.full((1, 1), length, dtype=torch.int64, device=device)
        self.length = length
        # The cache counts its tokens on the device: one tensor for all layers, so that it is set back by one kernel.
        layers = [layer for layer in self.cache.layers if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor)]
        self.counts = torch.full((len(layers),), length, dtype=torch.int64, device=device)
        for layer, count in zip(layers, self.counts.unbind()):
            layer.cumulative_length = count

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            self.counts.fill_(self.length)
            # Earlier versions of transformers are told the place in the cache; later ones ignore it.
            return self.model(self.token, past_key_values=self.cache, position_ids=self.position, cache_position=self.position[0],
                              use_cache=True).logits


def llama_decode(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Decode:
    """Llama-2-7b after a prompt of ``length`` tokens."""
    return Decode(batch, length, dtype, device)


class Training:
    """Forward, loss, backward and AdamW; gives the loss."""

    def __init__(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model = _llama(length, dtype, device, layers=4).train()
        self.optimizer = self._adamw()
        self.tokens = _tokens(batch, length, self.model.config.vocab_size, device)

    def _adamw(self, **more: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, foreach=True, **more)

    def __call__(self) -> torch.Tensor:
        return self._step(self.optimizer)

    def to_capture(self) -> Callable[[], torch.Tensor]:
        """The same step with an optimizer of its own that counts its steps on the device, as a graph needs."""
        return functools.partial(self._step, self._adamw(capturable=True))

    def _step(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        with torch.enable_grad():
            loss = self.model(self.tokens, labels=self.tokens, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()


def llama_training(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Training:
    """A Llama-2 of 4 layers in training."""
    return Training(batch, length, dtype, device)
