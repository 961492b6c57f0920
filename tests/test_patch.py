"""``gemsmode.patch``: models of transformers and plain ones, before and after; what is not recognised; taking it back."""

from __future__ import annotations

import copy
import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gemsmode
from gemsmode import GemsMode, patching

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def decoder(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**GROUPED, **TOKENS, **config}))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                                                loss_type="ForCausalLM", **TOKENS))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8))


ONE_LAYER = {"causal_lm_loss": 1, "residual_norm": 1, "rotary": 1, "gated_mlp": 1, "rms_norm": 3}
LLAMA = {"causal_lm_loss": 1, "residual_norm": 2, "rotary": 2, "gated_mlp": 2, "rms_norm": 5}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "Llama": (decoder("Llama"), LLAMA),
    "Mistral": (decoder("Mistral", num_hidden_layers=1), ONE_LAYER),
    "Qwen2": (decoder("Qwen2", num_hidden_layers=1), ONE_LAYER),
    "Qwen3": (decoder("Qwen3", head_dim=8), {**LLAMA, "rms_norm": 9}),
    "Gemma": (decoder("Gemma", head_dim=8, num_hidden_layers=1), ONE_LAYER),
    "Phi": (decoder("Phi", num_key_value_heads=4), {"causal_lm_loss": 1, "rotary": 2, "gelu": 2, "linear_gelu": 2}),
    "GPT-2": (gpt2, {"causal_lm_loss": 1, "residual_norm": 2, "gelu": 2}),
    "BERT": (bert, {"skip_layer_norm": 4, "linear_gelu": 2}),
    "ViT": (vit, {"residual_norm": 2, "linear_gelu": 2}),  # whose projections have other names in some versions
}
"""A small model of each kind with random weights, and how often each pattern is found in it."""


def inputs(name: str, device: str) -> dict[str, torch.Tensor]:
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, device=device), "labels": torch.tensor([0, 1], device=device)}
    ids = torch.randint(3, 97, (2, 7), device=device)
    if name == "BERT":
        return {"input_ids": ids, "labels": torch.tensor([0, 1], device=device)}
    labels = ids.clone()
    labels[0, :2] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, logits and gradients."""
    model.zero_grad()
    result = model(**given)
    result.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result.loss.detach(), result.logits.detach(), gradients


def generated(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=5, do_sample=False)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    # What is compared is float32: cuDNN's convolutions may take TF32, which the mode's rules then do in another order.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_models_before_and_after(name: str, device: str) -> None:
    """Outputs, loss, gradients and greedy tokens agree in float32; taken back, the model gives what it gave, to the bit."""
    make, patterns = MODELS[name]
    model = make().to(device).eval()
    names, given = list(model.state_dict()), inputs(name, device)
    before = step(model, given)
    tokens = generated(model, given["input_ids"]) if "causal_lm_loss" in patterns else None
    report = gemsmode.patch(model)
    linear = sum(type(m) is nn.Linear for m in model.modules())
    qkv = 3 * sum(hasattr(m, "q_proj") for m in model.modules())
    expected = {**patterns, "qkv": qkv, "linear": linear - qkv}
    assert Counter(c.pattern for c in report.changes) == Counter(expected) and not report.left, str(report)
    assert list(model.state_dict()) == names
    for under_mode in (False, True):
        if under_mode:
            with GemsMode(trace=True, strict=True) as gems:
                after = step(model, given)
            fused = {r.overload for r in gems.report.records if r.overload.startswith("gemsmode.")}
            assert fused and all(r.decision == "rule" for r in gems.report.records if r.overload in fused)
        else:
            after = step(model, given)
        torch.testing.assert_close(after[0], before[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=2e-6)
        assert after[2].keys() == before[2].keys()
        for key, gradient in after[2].items():
            torch.testing.assert_close(gradient, before[2][key], rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    if tokens is not None:
        assert torch.equal(generated(model, given["input_ids"]), tokens)
    undone = gemsmode.unpatch(model)
    assert undone == report.changes and not list(patching.patched(model))
    again = step(model, given)
    assert torch.equal(again[0], before[0]) and torch.equal(again[1], before[1])


def test_the_report_says_what_was_changed() -> None:
    report = gemsmode.patch(MODELS["Qwen3"][0]())
    assert str(report) == """\
gemsmode.patch(Qwen3ForCausalLM): 31 parts changed
pattern         class              parts  first
causal_lm_loss  Qwen3ForCausalLM       1  (the model)
residual_norm   Qwen3DecoderLayer      2  model.layers.0
rotary          Qwen3Attention         2  model.layers.0.self_attn
qkv             Linear                 6  model.layers.0.self_attn.q_proj
linear          Linear                 9  model.layers.0.self_attn.o_proj
rms_norm        Qwen3RMSNorm           9  model.layers.0.self_attn.q_norm
gated_mlp       Qwen3MLP               2  model.layers.0.mlp"""


# -- plain modules, and those that only look so ------------------------------------------------------------------------


class Norm(nn.Module):
    """An RMS norm, or something like one."""

    def __init__(self, form: str = "") -> None:
        super().__init__()
        self.weight, self.eps, self.form = nn.Parameter(torch.rand(8)), 1e-6, form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        power = x.square().mean(-1, keepdim=True)
        if self.form == "no mean":
            power = x.square().sum(-1, keepdim=True)
        if self.form == "two":
            x = x + x
        if self.form == "training" and self.training:
            x = x * 1.5
        if self.form == "tuple":
            return x, power  # type: ignore[return-value]
        return x * torch.rsqrt(power + (0.01 if self.form == "eps" else self.eps)) * self.weight


class Gate(nn.Module):
    def __init__(self, act: Any = F.silu, order: str = "") -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.act, self.order = act, order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order == "swapped":
            return self.w2(self.w1(x) * self.act(self.w3(x)))
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, norm: str = "") -> None:
        super().__init__()
        self.norm, self.gate = Norm(norm), Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate(self.norm(x))


def test_plain_models(device: str) -> None:
    model, x = nn.Sequential(Block(), Block()).to(device), torch.randn(3, 8, device=device, requires_grad=True)
    expected = model(x)
    gradient = torch.autograd.grad(expected.sum(), x)[0]
    report = gemsmode.patch(model)
    assert Counter(c.pattern for c in report.changes) == {"rms_norm": 2, "gated_mlp": 2, "linear": 6}
    with GemsMode(trace=True) as gems:
        got = model(x)
    assert {r.overload for r in gems.report.records} >= {"gemsmode.rms_norm.default", "gemsmode.silu_and_mul.default"}
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["no mean", "two", "training", "eps", "tuple"])
def test_what_only_looks_like_a_norm_is_left(form: str) -> None:
    model = Block(form)
    x = torch.randn(3, 8)
    report = gemsmode.patch(model.norm)
    (left,) = report.left
    assert not report.changes and left.pattern == "rms_norm" and left.kind == "Norm"
    assert ("does not give one tensor" if form == "tuple" else "does not compute an RMS norm") in left.reason
    assert "Left as they are: 1 parts" in str(report) and left.reason[:30] in str(report)
    assert "forward" not in model.norm.__dict__ and model.norm(x) is not None


@pytest.mark.parametrize(("gate", "reason"), [
    (Gate(F.relu), "neither SiLU nor GELU"), (Gate(F.silu, "swapped"), "does not compute a gated MLP"),
    (Gate(None), "activation is not found")])
def test_what_only_looks_like_a_gate_is_left(gate: Gate, reason: str) -> None:
    report = gemsmode.patch(gate, skip="linear")
    assert not report.changes and reason in report.left[0].reason


def test_an_attention_with_another_rotary_embedding_is_left() -> None:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return q * cos.unsqueeze(unsqueeze_dim), k * sin.unsqueeze(unsqueeze_dim)

    def with_function(function: Any) -> nn.Module:
        scope = {"nn": nn, "apply_rotary_pos_emb": function}
        exec("class Attention(nn.Module):\n    def forward(self, q, k, c, s):\n        return apply_rotary_pos_emb(q, k, c, s)", scope)
        return scope["Attention"]()  # type: ignore[operator]

    for function, reason in ((apply_rotary_pos_emb, "does not compute a rotary embedding"), (lambda q, k: (q, k), "takes other arguments"),
                             (print, "not a plain function")):
        report = gemsmode.patch(with_function(function))
        assert reason in report.left[0].reason and not report.changes


def renames(old: str, new: str) -> Callable[[Any], Any]:
    """A decorator as transformers has them for arguments with new names."""
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed

    return decorate


class Counted:
    """A decorator that keeps its function as an attribute."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)


@pytest.mark.parametrize("kind", ["functions", "an object"])
def test_an_attention_with_decorators(kind: str) -> None:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned = [torch.cat((-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]), -1) for x in (q, k)]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    source = """
def forward(self, x, cos, sin, *, scale=1.0):
    q, k = apply_rotary_pos_emb(x, x, cos, sin)
    return scale * (q + k)
"""
    names: dict[str, Any] = {"apply_rotary_pos_emb": apply_rotary_pos_emb}
    exec(source, names)
    decorated = renames("factor", "scale")(renames("x_first", "x")(names["forward"])) if kind == "functions" else Counted(names["forward"])
    attention = type("Attention", (nn.Module,), {"forward": decorated})()
    x, cos, sin = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    expected = attention(x, cos, sin, scale=2.0)
    report = gemsmode.patch(attention)
    if kind == "an object":
        assert not report.changes and "decorated in a way that cannot be copied" in report.left[0].reason
        return
    assert [c.pattern for c in report.changes] == ["rotary"]
    with GemsMode(trace=True) as gems, torch.no_grad():
        got = attention(x_first=x, cos=cos, sin=sin, factor=2.0)
    torch.testing.assert_close(got, expected)
    assert any("rotary" in r.overload for r in gems.report.records), [r.overload for r in gems.report.records]
    gemsmode.unpatch(attention)
    torch.testing.assert_close(attention(x, cos=cos, sin=sin, factor=2.0), expected)


def test_a_forward_that_was_replaced_already_is_left() -> None:
    """A hook of another library in the place of ``forward`` stays there."""
    norm = Norm()
    own = norm.forward
    norm.forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    report = gemsmode.patch(norm)
    assert "replaced by something else" in report.left[0].reason
    x = torch.randn(2, 8)
    assert torch.equal(norm(x), own(x) * 2)
    assert gemsmode.unpatch(norm) == [] and torch.equal(norm(x), own(x) * 2)


# -- layers that are computed together ---------------------------------------------------------------------------------


class Projections(nn.Module):
    """An attention's projections, called in some order, with something done in between."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n, bias=bias) for n in (8, 4, 4))
        self.order, self.between = "qkv", lambda x: x

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        results = {}
        for name in self.order:
            results[name] = self._modules[f"{name}_proj"](x)  # type: ignore[misc]
            x = self.between(x)
        return results


def calls(gems: GemsMode) -> Counter[str]:
    """How often rules served each of gemsmode's own ops."""
    found: Counter[str] = Counter()
    for r in gems.report.records:
        if r.overload.startswith("gemsmode.") and r.decision == "rule":
            found[r.overload.split(".")[1]] += r.calls
    return found


def served(model: nn.Module, x: torch.Tensor) -> tuple[Any, Counter[str]]:
    """What ``model`` gives, and how often its layers were computed, alone or together."""
    with torch.no_grad(), GemsMode(trace=True, strict=True) as gems:
        result = model(x)
    return result, calls(gems)


def test_projections_of_one_row_are_one_launch(device: str) -> None:
    for bias in (False, True):
        model, x = Projections(bias).to(device), torch.randn(1, 1, 8, device=device)
        expected = model(x)
        report = gemsmode.patch(model)
        assert [(c.path, c.pattern) for c in report.changes] == [("q_proj", "qkv"), ("k_proj", "qkv"), ("v_proj", "qkv")]
        assert not gemsmode.patch(model).changes
        for one in (model, copy.deepcopy(model)):
            got, seen = served(one, x)
            assert seen == {"qkv_linear": 1}
            for name in "qkv":
                torch.testing.assert_close(got[name], expected[name])
        assert served(model, x.expand(2, 3, 8))[1] == {"linear": 3}
        with GemsMode(trace=True) as gems:
            model(x)["k"].sum().backward()
        assert not [r for r in gems.report.records if r.overload.startswith("gemsmode.")] and model.k_proj.weight.grad is not None
        assert [c.path for c in gemsmode.unpatch(model)] == ["q_proj", "k_proj", "v_proj"]
        assert not any(n.startswith("_gemsmode") for m in model.modules() for n in m.__dict__)


def test_a_result_computed_ahead_is_used_only_for_what_it_was_computed_from(device: str) -> None:
    model, x = Projections().to(device), torch.randn(1, 8, device=device)
    gemsmode.patch(model)

    def written(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    def weight_replaced(x: torch.Tensor) -> torch.Tensor:
        model.k_proj.weight = nn.Parameter(model.k_proj.weight + 1)
        return x

    for order, between, layers in (("kqv", lambda x: x, 1), ("qqkv", lambda x: x, 0), ("qkk", lambda x: x, 1), ("qkv", written, 2),
                                   ("qkv", lambda x: x.clone(), 2), ("qk", weight_replaced, 1)):
        model.order, model.between = order, between
        wanted, given = {}, x.clone()
        for name in order:
            weight = model._modules[f"{name}_proj"].weight  # type: ignore[union-attr]
            wanted[name] = F.linear(given, weight + 1 if between is weight_replaced and name == "k" else weight)
            given = given if between is weight_replaced else between(given)
        got, seen = served(model, x.clone())
        assert seen["linear"] == layers and seen["qkv_linear"] == order.count("q"), order
        for name in order:
            torch.testing.assert_close(got[name], wanted[name], msg=lambda text, order=order, name=name: f"{order}, {name}: {text}")
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.tensor(1.0, device=device))  # PyTorch's own error
    with torch.inference_mode():
        model.order, model.between = "qkv", lambda x: x
        inference = torch.randn(1, 8, device=device)
        with GemsMode(trace=True) as gems:
            model(inference)
    assert "gemsmode.qkv_linear.default" not in {r.overload for r in gems.report.records}


def test_weights_that_hooks_bring_are_not_used_without_them(device: str) -> None:
    """As where weights are gathered, or moved to the device, when a layer is called."""
    x = torch.randn(1, 8, device=device)
    for name in ("k_proj", "v_proj"):
        model = Projections().to(device)
        gemsmode.patch(model)
        layer = model._modules[name]
        assert isinstance(layer, nn.Linear)
        expected, weight = F.linear(x, layer.weight), layer.weight
        layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
        handle = layer.register_forward_pre_hook(lambda module, args, weight=weight: setattr(module, "weight", weight))
        got, seen = served(model, x)
        assert seen == {"linear": 3}
        torch.testing.assert_close(got[name[0]], expected)
        handle.remove()
        assert served(model, x)[1] == {"qkv_linear": 1}
        layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
        model.order = "q"
        assert served(model, x)[1] == {"linear": 1}


def test_generation_of_a_patched_model_runs_layers_of_one_row(device: str) -> None:
    model = MODELS["Llama"][0]().to(device).eval()
    ids = torch.randint(3, 97, (1, 7), device=device)
    tokens = generated(model, ids)
    gemsmode.patch(model)
    with GemsMode(trace=True, strict=True) as gems:
        assert torch.equal(generated(model, ids), tokens)
    # Two layers, and a token for each after the first, which is the prompt's.
    assert calls(gems)["qkv_linear"] == calls(gems)["gated_linear"] == 2 * (tokens.shape[1] - 8) > 0


# -- what patching keeps -----------------------------------------------------------------------------------------------


def test_patching_twice_choosing_patterns_and_unknown_names() -> None:
    model = nn.Sequential(Block(), Block())
    assert {c.pattern for c in gemsmode.patch(model, only="rms_norm").changes} == {"rms_norm"}
    assert {c.pattern for c in gemsmode.patch(model, skip=["rms_norm", "linear"]).changes} == {"gated_mlp"}
    assert {c.pattern for c in gemsmode.patch(model).changes} == {"linear"}
    assert not gemsmode.patch(model).changes
    assert len(gemsmode.unpatch(model)) == 10 and gemsmode.unpatch(model) == []
    with pytest.raises(ValueError, match="no pattern is called 'norm'; there are rms_norm"):
        gemsmode.patch(model, only="norm")


def test_other_models_of_the_classes_are_not_touched() -> None:
    one, other = MODELS["Llama"][0](), MODELS["Llama"][0]()
    other.load_state_dict(one.state_dict())
    given = inputs("Llama", "cpu")
    gemsmode.patch(one)
    with GemsMode(trace=True) as gems, torch.no_grad():
        other(**given)
    assert not any(r.overload.startswith("gemsmode.") for r in gems.report.records)


def test_copies_of_a_patched_model_are_patched_and_independent() -> None:
    model = nn.Sequential(Block(), Block())
    gemsmode.patch(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone[0].norm.weight.zero_()
    x = torch.randn(2, 8)
    assert not torch.equal(clone(x), model(x))
    assert clone[0].norm.forward.__self__ is clone[0].norm
    assert len(gemsmode.unpatch(clone)) == 10 and len(list(patching.patched(model))) == 10


def test_hooks_of_the_parts_still_run() -> None:
    model = decoder("Llama", num_hidden_layers=1)().eval()
    gemsmode.patch(model)
    seen = []
    layer = model.model.layers[0]
    for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, layer.self_attn):
        part.register_forward_hook(lambda module, args, result: seen.append(type(module).__name__))
    with torch.no_grad():
        model(**inputs("Llama", "cpu"))
    assert sorted(seen) == ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "LlamaRMSNorm"]


@pytest.mark.parametrize("how", ["hook of the layer", "hook of the activation", "another forward"])
def test_a_linear_layer_that_does_more_is_called(how: str) -> None:
    """Before a GELU: what others hang on the layer or its activation, or put in its place, still runs."""
    model = bert().eval()
    part = model.bert.encoder.layer[0].intermediate
    x, seen = torch.randn(2, 3, part.dense.in_features), []
    own = part.dense.forward
    if how == "another forward":
        part.dense.forward = lambda x: own(x) + (seen.append(1) or 1)
    expected, _ = part(x), seen.clear()
    gemsmode.patch(model)
    if how == "hook of the layer":
        part.dense.register_forward_hook(lambda *_: seen.append(1))
    elif how == "hook of the activation":
        part.intermediate_act_fn.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        torch.testing.assert_close(part(x), expected.detach())
    assert seen


def test_parameters_of_another_dtype_run_the_parts_own_code() -> None:
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8)
    expected = norm(torch.ones(2, 8, dtype=torch.bfloat16))
    gemsmode.patch(norm)
    got = norm(torch.ones(2, 8, dtype=torch.bfloat16))
    assert got.dtype == expected.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_autocast_and_checkpoints(name: str, device: str) -> None:
    model = MODELS[name][0]().to(device).eval()
    given = inputs(name, device)
    if name == "Llama":
        model.gradient_checkpointing_enable()
        model.train()

    def run() -> tuple[Any, ...]:
        with torch.autocast(device, torch.bfloat16):
            return step(model, given)

    before = run()
    gemsmode.patch(model)
    after = run()
    assert [t.dtype for t in after[:2]] == [t.dtype for t in before[:2]]
    torch.testing.assert_close(after[0].float(), before[0].float(), rtol=2e-2, atol=2e-2)
    for key, gradient in after[2].items():
        torch.testing.assert_close(gradient, before[2][key], rtol=5e-2, atol=2e-2)


def test_compiled(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("half a minute: run with --full")
    model = MODELS["Llama"][0]().eval()
    given = inputs("Llama", "cpu")
    expected = step(model, given)
    gemsmode.patch(model)
    traced = step(torch.compile(model, backend="aot_eager", fullgraph=True), given)
    torch.testing.assert_close(traced[:2], expected[:2], rtol=1e-5, atol=2e-6)
    torch._dynamo.reset()
