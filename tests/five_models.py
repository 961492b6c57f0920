"""Five models of ``transformers`` that between them call most of what models call: random weights, sizes to order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Scale:
    """How large the five are made."""

    width: int = 32
    inner: int = 64
    layers: int = 1
    heads: int = 2
    batch: int = 2
    length: int = 8
    image: int = 32
    vocabulary: int = 64


SMALL = Scale()
"""For the interpreter."""

BASE = Scale(768, 3072, 12, 12, 8, 512, 224, 30000)
"""As BERT-base and its kin are."""


def _bert(s: Scale) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=s.heads, intermediate_size=s.inner,
        max_position_embeddings=max(s.length, 16)))


def _gpt2(s: Scale) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=s.vocabulary, n_embd=s.width, n_layer=s.layers, n_head=s.heads, n_positions=max(s.length, 16), bos_token_id=0,
        eos_token_id=1))


def _llama(s: Scale) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.inner, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=max(s.heads // 2, 1), max_position_embeddings=max(s.length, 16)))


def _vit(s: Scale) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=s.heads, intermediate_size=s.inner, image_size=s.image,
        patch_size=16, num_labels=4))


def _resnet(s: Scale) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(
        embedding_size=max(s.width // 4, 8), hidden_sizes=[s.width, 2 * s.width], depths=[s.layers, s.layers], layer_type="basic",
        num_labels=4))


MODELS: dict[str, Callable[[Scale], nn.Module]] = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "vit": _vit, "resnet": _resnet}


def model_and_inputs(name: str, scale: Scale = SMALL, device: str = "cpu", dtype: torch.dtype = torch.float32
                     ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with random weights, the same at every call, and a batch with its labels; on the meta device their shapes alone."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name](scale).to(dtype)
    generator = torch.Generator().manual_seed(1)

    def made(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta") if device == "meta" else tensor.to(device)

    if name in ("vit", "resnet"):
        pixels = torch.randn(scale.batch, 3, scale.image, scale.image, generator=generator).to(dtype)
        return model, {"pixel_values": made(pixels), "labels": made(torch.arange(scale.batch) % 4)}
    tokens = torch.randint(0, scale.vocabulary, (scale.batch, scale.length), generator=generator)
    labels = torch.arange(scale.batch) % 2 if name == "bert" else tokens
    return model, {"input_ids": made(tokens), "labels": made(labels)}


def train_step(model: nn.Module, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> Any:
    """Forward, backward and optimizer; the loss."""
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
