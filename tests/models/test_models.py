"""BERT-base-uncased and Llama-2-7b: forward, backward and generation against PyTorch's own ops in higher precision.

By default small models of these configurations run in the interpreter, in float32 against float64. With ``--device cuda`` they
have their full size and random weights, in the dtypes that they are used in (BERT float16, Llama bfloat16), against float32;
``GEMSMODE_BERT`` and ``GEMSMODE_LLAMA`` name folders (or names of the Hugging Face cache) with real weights.

What is asked of a mode, with and without ``gemsmode.patch``: errors no larger than 1.5 times those of PyTorch's own ops in the
same dtype (beside rounding that both have), and in float32 the same greedy tokens.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gemsmode
from gemsmode import GemsMode

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Case:
    """A model, its full size and a small one, and what is fed to it."""

    name: str
    model: str
    config: Callable[[bool], Any]
    dtype: torch.dtype
    tokens: tuple[int, int]
    watched: tuple[str, ...]
    variable: str


def bert_config(full: bool) -> Any:
    if full:
        return transformers.BertConfig()  # its defaults are BERT-base-uncased's
    return transformers.BertConfig(vocab_size=211, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
                                   max_position_embeddings=64)


def llama_config(full: bool) -> Any:
    # Llama-2-7b's: the defaults of LlamaConfig but for these.
    size = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    if not full:
        size |= {"vocab_size": 211, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(**size)


CASES = {
    "bert": Case("bert", "BertForMaskedLM", bert_config, torch.float16, (4, 128), (
        "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.1.output.LayerNorm.bias"), "GEMSMODE_BERT"),
    "llama": Case("llama", "LlamaForCausalLM", llama_config, torch.bfloat16, (1, 512), (
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.post_attention_layernorm.weight", "model.norm.weight", "lm_head.weight"), "GEMSMODE_LLAMA"),
}


def build(case: Case, full: bool, device: str) -> Any:
    """The model in float32, without dropout."""
    torch.manual_seed(0)
    kind = getattr(transformers, case.model)
    path = os.environ.get(case.variable)
    if path:
        return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(device).eval()
    with torch.device(device):
        return kind(case.config(full)).eval()


def inputs(case: Case, model: Any, full: bool, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = case.tokens if full else (2, 11)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    labels = ids.clone()
    labels[:, ::3] = -100
    mask = torch.ones_like(ids)
    if case.name == "bert":
        mask[0, -3:] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


Outcome = dict[str, torch.Tensor]


def run(case: Case, model: Any, given: dict[str, torch.Tensor]) -> Outcome:
    """Logits, loss and the gradients that are watched, on the CPU in float64."""
    model.zero_grad()
    result = model(**given)
    result.loss.backward()
    parameters = dict(model.named_parameters())
    found = {"logits": result.logits, "loss": result.loss, **{n: parameters[n].grad for n in case.watched}}
    kept = {n: t.detach().to("cpu", torch.float64, copy=True) for n, t in found.items()}
    model.zero_grad()
    return kept


def loss_of(case: Case, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss in the precision of ``logits``: transformers' own is computed in float32, whatever the model's dtype."""
    labels = labels.to(logits.device)
    if case.name == "llama":
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def errors(got: Outcome, exact: Outcome) -> dict[str, float]:
    """The error of each result, by its norm."""
    return {n: ((got[n] - exact[n]).norm() / exact[n].norm().clamp_min(1e-30)).item() for n in exact}


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, device: str) -> None:
    case, full = CASES[name], device == "cuda"
    dtype, higher = (case.dtype, torch.float32) if full else (torch.float32, torch.float64)
    # Beside errors that PyTorch's own ops have too, half a unit in the last place.
    slack = torch.finfo(dtype).eps
    model = build(case, full, device)
    given = inputs(case, model, full, device)
    with exact_products():
        exact = run(case, model.to(higher), given)
    exact["loss"] = loss_of(case, exact["logits"], given["labels"])
    model = model.to(dtype)
    own = errors(run(case, model, given), exact)
    for patched in (False, True):
        if patched:
            report = gemsmode.patch(model)
            assert report.changes and not report.left
        with GemsMode(trace=True, strict=True) as gems:
            got = run(case, model, given)
        how = "patched" if patched else "not patched"
        for what, error in errors(got, exact).items():
            assert error <= 1.5 * own[what] + slack, f"{what}, {how}: off by {error:.2e}, PyTorch's own ops by {own[what]:.2e}"
        report_text = str(gems.report)
        decided = {r.overload: r.decision for r in gems.report.records}
        assert "error" not in decided.values(), report_text
        replaced = sum(r.calls for r in gems.report.records if r.decision == "rule")
        passed = sum(r.calls for r in gems.report.records if r.decision == "pass")
        assert replaced > 9 * passed, report_text
        assert any(o.startswith("gemsmode.") for o in decided) == patched


def test_generation(device: str) -> None:
    """Greedy tokens in float32 are those of PyTorch's own ops; with a cache that grows, patched and not."""
    case, full = CASES["llama"], device == "cuda"
    model = build(case, full, device)
    ids = inputs(case, model, full, device)["input_ids"][:, :32]
    count = 32 if full else 4

    def tokens() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)

    with exact_products():
        expected = tokens()
        for patched in (False, True):
            if patched:
                gemsmode.patch(model)
            with GemsMode(strict=True):
                assert torch.equal(tokens(), expected), "patched" if patched else "not patched"
        assert torch.equal(tokens(), expected)  # patched, outside of the mode
    assert expected.shape == (ids.shape[0], ids.shape[1] + count)


@pytest.mark.parametrize("name", CASES)
def test_inference_mode(name: str, device: str) -> None:
    """Under ``torch.inference_mode()`` composite ops arrive whole; results are those of ``no_grad``."""
    case, full = CASES[name], device == "cuda"
    model = build(case, full, device).to(case.dtype if full else torch.float32)
    gemsmode.patch(model)
    given = {k: v for k, v in inputs(case, model, full, device).items() if k != "labels"}
    with torch.no_grad():
        expected = model(**given).logits
    with GemsMode(strict=True), torch.inference_mode():
        got = model(**given).logits
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(got.clone(), expected, rtol=0, atol=scale * 40 * torch.finfo(expected.dtype).eps)
