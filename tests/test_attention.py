"""Attention, forward and backward, against float64, over masks, grouped queries, lengths and layouts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gemsmode import GemsMode
from gemsmode.target import current

aten = torch.ops.aten
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# batch, heads, key heads, queries, keys, head dimension
SIZES = {
    "grouped": (2, 4, 2, 33, 40, 16),
    "square": (1, 2, 2, 64, 64, 64),
    "decode, split over keys": (1, 2, 1, 1, 1100, 24),
    "few queries": (1, 2, 1, 7, 200, 80),
    "more queries than keys": (1, 1, 1, 150, 130, 32),
}


def reference(q, k, v, causal, mask, scale):
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1),
                                        attn_mask=None if mask is None else mask.double(), is_causal=causal, scale=scale)


@pytest.fixture(autouse=True)
def every_class_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is left to PyTorch for its speed."""
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")


def served(function, *args, **kwargs):
    with GemsMode(strict=True, trace=True) as mode:
        result = function(*args, **kwargs)
    (row,) = [r for r in mode.report.to_dict()["ops"] if r["decision"] != "view"]
    assert row["decision"] == "rule", row
    return result


@pytest.mark.skipif(torch.cuda.is_available() and current().device_type == "cuda", reason="the CPU's op")
@pytest.mark.parametrize("mask", ["none", "causal", "additive", "row"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_forward_and_backward(name: str, dtype: torch.dtype, mask: str) -> None:
    batch, heads, groups, m, n, d = SIZES[name]
    q = torch.randn(batch, m, heads, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, groups, n, d).to(dtype)
    v = torch.randn(batch, n, groups, d).to(dtype).transpose(1, 2)
    bias = None
    if mask == "additive":
        bias = torch.randn(batch, 1, m, n).to(dtype)
        bias[..., :n // 2] = float("-inf")
    elif mask == "row":
        bias = torch.randn(n).expand(m, n).to(dtype)
    causal, scale = mask == "causal", 0.3 if bias is not None else None
    options = {"attn_mask": bias, "scale": scale}
    native = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, **options)
    out, lse = served(aten._scaled_dot_product_flash_attention_for_cpu, q, k, v, 0.0, causal, **options)
    assert out.stride() == native[0].stride() and lse.stride() == native[1].stride() and out.dtype == dtype
    expected = reference(q, k, v, causal, bias, scale)
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype]
    torch.testing.assert_close(lse, native[1], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2 if dtype != torch.float32 else 1e-5)

    grad = torch.randn(batch, m, heads, d).to(dtype).transpose(1, 2)
    # A native forward goes with this backward.
    native_grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, *native, 0.0, causal, **options)
    grads = served(aten._scaled_dot_product_flash_attention_for_cpu_backward, grad, q, k, v, *native, 0.0, causal, **options)
    inputs = [t.double().detach().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(reference(*inputs, causal, bias, scale), inputs, grad.double())
    for got, other, value in zip(grads, native_grads, exact):
        assert got.stride() == other.stride() and got.dtype == other.dtype
        allowed = max(1.5 * (other.double() - value).abs().max().item(), 10 * TOLERANCE[dtype])
        assert (got.double() - value).abs().max().item() <= allowed


@pytest.mark.skipif(torch.cuda.is_available() and current().device_type == "cuda", reason="the CPU's op")
def test_a_row_without_keys_is_zero() -> None:
    q = torch.randn(1, 1, 20, 16)
    mask = torch.zeros(20, 20)
    mask[3] = float("-inf")
    native = aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, attn_mask=mask)
    out, lse = served(aten._scaled_dot_product_flash_attention_for_cpu, q, q, q, attn_mask=mask)
    assert torch.equal(out[0, 0, 3], torch.zeros(16)) and torch.isfinite(out).all()
    torch.testing.assert_close(lse, native[1])


def test_a_scale_of_zero_weighs_keys_alike(device: str) -> None:
    q, k, v, _ = inputs(1, 1, 1, 20, 20, 16, dtype=torch.float16, device=device)
    out = served(aten._scaled_dot_product_cudnn_attention, q, k, v, None, True, 0.0, True, scale=0.0)[0]
    close(out, exact(q, k, v, causal=True, scale=0.0)[0], torch.float16)


def test_what_is_not_served_says_why() -> None:
    q = torch.randn(1, 2, 4, 16, dtype=torch.float64, device=current().device_type)
    with GemsMode(strict=True, trace=True) as mode:
        scaled_dot_product_attention(q, q, q)
    rows = [r for r in mode.report.to_dict()["ops"] if "attention" in r["overload"]]
    assert bool(rows) != q.is_cuda  # where PyTorch has no op of its own for float64, but takes products and a softmax
    assert all(r["decision"] == "pass" and "float64" in r["reason"] for r in rows)


# -- the ops of CUDA, in the interpreter on CPU tensors ------------------------------------------------------------------


def exact(q, k, v, causal=False, mask=None, scale=None, right=False):
    """(output, log-sum-exp) in float64; a row without keys is 0."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()
    m, n = scores.shape[-2:]
    if causal:
        seen = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m if right else 0)
        scores = scores.masked_fill(~seen, -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return weights @ v.repeat_interleave(group, 1), torch.logsumexp(scores, -1)


def inputs(batch, heads, groups, m, n, d, value_d=None, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(m + n + d)
    q = torch.randn(batch, m, heads, d, generator=generator).to(device, dtype).transpose(1, 2)
    k = torch.randn(batch, groups, n, d, generator=generator).to(device, dtype)
    v = torch.randn(batch, n, groups, value_d or d, generator=generator).to(device, dtype).transpose(1, 2)
    grad = torch.randn(batch, m, heads, value_d or d, generator=generator).to(device, dtype).transpose(1, 2)
    return q, k, v, grad


def close(got, expected, dtype, factor=1.0):
    assert (got.double() - expected).abs().max().item() <= factor * TOLERANCE[dtype]


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """How blocks are read: in the interpreter by pointers, unless asked for what a GPU that has descriptors takes."""
    from gemsmode.ops import attention

    monkeypatch.setattr(attention, "IN_INTERPRETER", request.param)
    return request.param


CUDA_SIZES = {
    "grouped, other head dimension of values": (2, 4, 2, 40, 48, 16, 24),
    "decode of a group": (1, 4, 1, 1, 600, 24, 24),
    "two blocks": (1, 1, 1, 130, 136, 32, 32),
}


def gradients(q, k, v, grad, **options):
    values = [t.double().detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(exact(*values, **options)[0], values, grad.double())


@pytest.mark.parametrize("mask", ["causal", "bias", "row of bias", "causal and bias"])
@pytest.mark.parametrize("name", CUDA_SIZES)
def test_cudnn_and_efficient_ops(name: str, mask: str, reading: bool, device: str) -> None:
    if reading and (name != "two blocks" or "row" in mask):
        pytest.skip("one size read through descriptors is enough")
    if reading and device == "cuda":
        pytest.skip("the GPU's choice is the first case")
    batch, heads, groups, m, n, d, value_d = CUDA_SIZES[name]
    dtype = torch.bfloat16 if len(mask) % 2 else torch.float16
    if device == "cuda" and (groups != heads or d != value_d):
        pytest.skip("not among what these ops take")
    q, k, v, grad = inputs(batch, heads, groups, m, n, d, value_d, dtype, device)
    causal, bias = "causal" in mask, None
    if "row" in mask:
        bias = torch.randn(n, device=device).to(dtype).expand(batch, 1, m, n)
    elif "bias" in mask:
        bias = torch.randn(batch, 1, m, n, device=device).to(dtype)
        bias[..., :1, :] = -torch.inf
        bias = bias.expand(batch, heads, m, n)
    out, sums = exact(q, k, v, causal, bias, 0.3)
    finite = sums.isfinite()
    expected = gradients(q, k, v, grad, causal=causal, mask=bias, scale=0.3)

    got = served(aten._scaled_dot_product_cudnn_attention, q, k, v, bias, True, 0.0, causal, scale=0.3)
    close(got[0], out, dtype)
    assert got[1].shape == (batch, heads, m, 1) and got[1].is_contiguous() and got[1].dtype == torch.float32
    torch.testing.assert_close(got[1][..., 0].double()[finite], sums[finite], rtol=1e-2, atol=1e-2)
    assert got[0].transpose(1, 2).is_contiguous() and got[2:4] == (None, None) and got[4:6] == (m, n) and got[8] is None
    assert got[6].shape == got[7].shape == () and got[6].dtype == torch.int64
    assert served(aten._scaled_dot_product_cudnn_attention, q, k, v, bias, False, 0.0, causal)[1] is None
    grads = served(aten._scaled_dot_product_cudnn_attention_backward, grad, q, k, v, got[0], got[1], got[6], got[7], bias, None, None, m, n,
                   0.0, causal, scale=0.3)
    for mine, value, like in zip(grads, expected, (q, k, v)):
        close(mine, value, dtype, 5)
        assert mine.stride() == torch.empty_like(like).stride() and mine.dtype == dtype
    again = served(aten._cudnn_attention_forward, q, k, v, bias, None, None, m, n, True, 0.0, causal, scale=0.3)
    assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])
    same = served(aten._cudnn_attention_backward, grad, q, k, v, got[0], got[1], got[6], got[7], bias, None, None, m, n, 0.0, causal,
                  scale=0.3)
    for mine, theirs in zip(same, grads, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)

    got = served(aten._scaled_dot_product_efficient_attention, q, k, v, bias, True, 0.0, causal, scale=0.3)
    close(got[0], out, dtype)
    assert got[1].shape == (batch, heads, -(-m // 32) * 32) and (got[1][..., m:] == torch.inf).all()
    torch.testing.assert_close(got[1][..., :m].double()[finite], sums[finite], rtol=1e-2, atol=1e-2)
    assert served(aten._scaled_dot_product_efficient_attention, q, k, v, bias, False, 0.0, causal)[1].shape == (batch, heads, 0)
    wanted = [True, True, True, mask in ("bias", "causal and bias")]
    *grads, grad_bias = served(aten._scaled_dot_product_efficient_attention_backward, grad, q, k, v, bias, got[0], got[1], got[2], got[3],
                               0.0, wanted, causal, scale=0.3)
    for mine, value in zip(grads, expected):
        close(mine, value, dtype, 5)
        assert mine.transpose(1, 2).is_contiguous()
    if not wanted[3]:
        assert grad_bias is None
    else:
        variable = bias.double().detach().requires_grad_()
        (value,) = torch.autograd.grad(exact(q, k, v, causal, variable, 0.3)[0], variable, grad.double())
        close(grad_bias, value, dtype, 5)
        assert grad_bias.shape == bias.shape and grad_bias.stride()[2:] == (-(-n // 16) * 16, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(2, 4, 2, 40, 48, 16), (1, 2, 1, 1, 600, 24), (1, 2, 2, 1, 300, 128), (1, 1, 1, 150, 130, 64),
                                  (1, 2, 1, 130, 150, 128)], ids=str)
def test_flash_ops(size: tuple[int, ...], causal: bool, reading: bool, device: str) -> None:
    """The causal mask is aligned to the last query and key; what is [B, M, H, D] gives the same."""
    if reading and (size[-1] != 64 or device == "cuda"):
        pytest.skip("one size read through descriptors is enough")
    q, k, v, grad = inputs(*size, dtype=torch.float16, device=device)
    batch, heads, _, m, n, _ = size
    out, sums = exact(q, k, v, causal, right=True)
    got = served(aten._scaled_dot_product_flash_attention, q, k, v, 0.0, causal)
    close(got[0], out, torch.float16)
    finite = sums.isfinite()
    torch.testing.assert_close(got[1].double()[finite], sums[finite], rtol=1e-2, atol=1e-2)
    assert (got[1][~finite] == torch.inf).all() and (got[0].abs().sum(-1)[~finite] == 0).all()
    assert got[0].stride() == q.stride() and got[1].shape == (batch, heads, m) and got[2:4] == (None, None) and got[4:6] == (m, n)
    assert (got[6].shape, got[7].shape, got[8].shape) == ((2,), (), (0,)) and got[6].dtype == torch.uint64 and got[8].dtype == q.dtype
    grads = served(aten._scaled_dot_product_flash_attention_backward, grad, q, k, v, got[0], got[1], None, None, m, n, 0.0, causal, got[6],
                   got[7])
    for mine, value, like in zip(grads, gradients(q, k, v, grad, causal=causal, right=True), (q, k, v)):
        close(mine, value, torch.float16, 5)
        assert mine.stride() == like.stride()

    rows_first = [t.transpose(1, 2) for t in (q, k, v)]
    again = served(aten._flash_attention_forward, *rows_first, None, None, m, n, 0.0, causal, False)
    assert torch.equal(again[0].transpose(1, 2), got[0]) and torch.equal(again[1], got[1]) and len(again) == 5
    others = served(aten._flash_attention_backward, grad.transpose(1, 2), *rows_first, again[0], again[1], None, None, m, n, 0.0, causal,
                    again[2], again[3])
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(others, grads))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_efficient_ops_with_rows_first(kind: int, device: str) -> None:
    q, k, v, grad = inputs(1, 2, 2, 40, 56, 32, dtype=torch.float16, device=device)
    options = {"causal": kind != 0, "right": kind == 2}
    out, _ = exact(q, k, v, **options)
    rows_first = [t.transpose(1, 2) for t in (q, k, v)]
    got = served(aten._efficient_attention_forward, *rows_first, None, None, None, None, None, 0.0, kind, True)
    close(got[0].transpose(1, 2), out, torch.float16)
    assert got[0].is_contiguous() and got[4:] == (40, 56)
    grads = served(aten._efficient_attention_backward, grad.transpose(1, 2), *rows_first, None, got[0], None, None, 40, 56, got[1], 0.0,
                   got[2], got[3], kind, False)
    assert grads[3] is None
    for mine, value in zip(grads, gradients(q, k, v, grad, **options)):
        close(mine.transpose(1, 2), value, torch.float16, 5)
        assert mine.is_contiguous()


def test_overrideable_ops(device: str) -> None:
    q, k, v, grad = inputs(1, 2, 2, 40, 56, 32, device=device)
    bias = torch.randn(1, 2, 40, 56, dtype=torch.bfloat16, device=device)
    got = served(aten._scaled_dot_product_fused_attention_overrideable, q, k, v, bias)
    close(got[0], exact(q, k, v, mask=bias)[0], torch.bfloat16)
    assert got[1].shape == (1, 2, 40) and got[4:6] == (40, 56)
    grads = served(aten._scaled_dot_product_fused_attention_overrideable_backward, grad, q, k, v, bias, [True] * 4, got[0], got[1], None,
                   None, 40, 56, 0.0, False, got[6], got[7])
    for mine, value in zip(grads, gradients(q, k, v, grad, mask=bias)):
        close(mine, value, torch.bfloat16, 5)
    assert grads[3].stride() == bias.stride()


def test_gradients_through_the_ops_of_cuda(device: str) -> None:
    """Autograd calls the backward op with what the forward op returned."""
    q, k, v, grad = (t.detach() for t in inputs(1, 2, 2, 40, 56, 32, device=device))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with GemsMode(strict=True, trace=True) as mode:
        out = aten._scaled_dot_product_cudnn_attention(*leaves, None, True, 0.0, True)[0]
        grads = torch.autograd.grad(out, leaves, grad)
    rows = [r["decision"] for r in mode.report.to_dict()["ops"] if "cudnn_attention" in r["overload"]]
    assert rows == ["rule", "rule"]
    for mine, value in zip(grads, gradients(q, k, v, grad, causal=True)):
        close(mine, value, torch.bfloat16, 5)


@pytest.mark.parametrize(("reason", "options"), [
    ("dropout", {"dropout_p": 0.1}), ("a scale of -1.0", {"scale": -1.0}),
])
def test_reasons(reason: str, options: dict[str, float], device: str) -> None:
    from support import decision

    q = torch.randn(1, 2, 40, 32, dtype=torch.bfloat16, device=device)
    made = decision(GemsMode(), "_scaled_dot_product_cudnn_attention", q, q, q, None, True, **options)
    assert made.kind == "pass" and reason in str(made.reason)


SERVED_ON_AN_H200 = {
    "a bias": {"biased": True}, "one query": {"m": 1}, "64 queries": {"m": 64}, "one query in float32": {"m": 1, "itemsize": 4},
}
LEFT_ON_AN_H200 = {
    "forward": {}, "backward": {"backward": True}, "float32": {"itemsize": 4},
    "the gradients of float32": {"itemsize": 4, "backward": True},
}


@pytest.mark.parametrize("what", [*LEFT_ON_AN_H200, *SERVED_ON_AN_H200])
def test_what_is_left_to_pytorch_on_an_h200(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions of plans, by the table of what was measured; elsewhere, and if asked to, all of it is served."""
    from gemsmode.ops import attention
    from gemsmode.plan import Decline, contiguous_strides
    from gemsmode.registry import find_op
    from gemsmode.signature import Call, TensorMeta
    from gemsmode.target import Target

    monkeypatch.delenv("GEMSMODE_SLOWER")
    facts = {"m": 2048, "biased": False, "itemsize": 2, "backward": False} | (SERVED_ON_AN_H200 | LEFT_ON_AN_H200)[what]
    dtype = torch.bfloat16 if facts["itemsize"] == 2 else torch.float32

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> TensorMeta:
        return TensorMeta(dtype, shape, contiguous_strides(shape), torch.device("cuda", 0))

    m = facts["m"]
    q, k, bias = tensor(4, 32, m, 128), tensor(4, 32, 2048, 128), tensor(4, 32, m, 2048) if facts["biased"] else None
    number = tensor(dtype=torch.int64)
    if facts["backward"]:
        op, planner = "aten._scaled_dot_product_cudnn_attention_backward.default", attention.cudnn_attention_backward
        args = (q, q, k, k, q, tensor(4, 32, m, 1, dtype=torch.float32), number, number, bias, None, None, m, 2048, 0.0, False, None)
    else:
        op, planner = "aten._scaled_dot_product_cudnn_attention.default", attention.cudnn_attention
        args = (q, k, k, bias, False, 0.0, False, False, None)

    def launches(arch: int) -> int:
        return len(planner(Call(find_op(op), args, Target("cuda", "cuda", arch, present=False))).launches)

    if what in SERVED_ON_AN_H200:
        assert launches(90) >= 1
    else:
        with pytest.raises(Decline, match=r"PyTorch's own is faster for attention.*0\.\d\dx"):
            launches(90)
    assert launches(80) >= 1
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")
    assert launches(90) >= 1


def test_blocks_on_an_h200() -> None:
    """Those that were the fastest there."""
    from gemsmode.ops.attention import Blocks, choose_blocks
    from gemsmode.target import Target

    gpu = Target("cuda", "cuda", 90, present=False)
    assert choose_blocks("forward", 128, 1, 2, False, False, gpu) == Blocks(16, 128, 4, 2)
    assert choose_blocks("forward", 128, 4, 2, False, False, gpu) == Blocks(16, 64, 4, 3)  # the four heads of a group
    assert choose_blocks("forward", 64, 512, 2, True, True, gpu) == Blocks(64, 64, 4, 2)
    assert choose_blocks("forward", 64, 1024, 2, False, False, gpu) == Blocks(128, 64, 8, 3)
    assert choose_blocks("forward", 128, 4096, 2, True, False, gpu) == Blocks(128, 64, 8, 3)


# -- a model -----------------------------------------------------------------------------------------------------------


def test_llama_forward_loss_and_gradients(device: str) -> None:
    """Native and served calls mixed: the products and attention of a Llama, everything else PyTorch's own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device)
    tokens = torch.randint(0, 96, (2, 24), device=device)

    def step(**options):
        model.zero_grad()
        if options:
            with GemsMode(strict=True, trace=True, **options) as mode:
                result = model(tokens, labels=tokens)
                result.loss.backward()
            rows = mode.report.to_dict()["ops"]
            assert any(r["decision"] == "rule" and ("mm" in r["overload"] or "attention" in r["overload"]) for r in rows), rows
        else:
            result = model(tokens, labels=tokens)
            result.loss.backward()
        return result.logits.detach(), result.loss.detach(), [p.grad.clone() for p in model.parameters()]

    expected = step()
    for allow in (["mm", "bmm", "addmm", "*attention*"], ["mm", "*attention*_backward"]):
        logits, loss, grads = step(allow=allow)
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss, expected[1], rtol=1e-5, atol=1e-5)
        for mine, value in zip(grads, expected[2]):
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-5)


# -- GPU sizes, compiled without a GPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "cuda:100", "hip:gfx942"])
def test_every_choice_compiles_without_spills(target: str, tmp_path, request: pytest.FixtureRequest) -> None:
    from gpu_sizes import compile_calls, on_gpu

    full = request.config.getoption("--full")
    if target != "cuda:90" and not full:
        pytest.skip("only with --full")
    calls = []
    number = on_gpu((), torch.int64)
    for d in (32, 64, 80, 128, 256) if full else (128,):
        for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
            q, k = on_gpu((4, 32, 2048, d), dtype), on_gpu((4, 8, 2048, d), dtype)
            for causal in (False, True) if full else (True,):
                calls.append(("aten._scaled_dot_product_cudnn_attention.default", (q, k, k, None, True, 0.0, causal, False, None)))
            if dtype == torch.bfloat16 or d <= 128:
                lse = on_gpu((4, 32, 2048, 1), torch.float32)
                calls.append(("aten._scaled_dot_product_cudnn_attention_backward.default",
                              (q, q, k, k, q, lse, number, number, None, None, None, 2048, 2048, 0.0, True, None)))
            for m in (1, 50) if full else (1,):
                few = on_gpu((4, 32, m, d), dtype)
                calls.append(("aten._scaled_dot_product_cudnn_attention.default", (few, k, k, None, False, 0.0, False, False, None)))
            if full:
                for n in (2048, 2047):
                    bias = on_gpu((4, 32, n, n), dtype)
                    x = on_gpu((4, 32, n, d), dtype)
                    calls.append(("aten._scaled_dot_product_efficient_attention.default", (x, x, x, bias, True, 0.0, False, None)))
                    if dtype == torch.bfloat16 or d <= 128:
                        calls.append(("aten._scaled_dot_product_efficient_attention_backward.default",
                                      (x, x, x, x, bias, x, on_gpu((4, 32, 2048), torch.float32), number, number, 0.0, (True,) * 4, False,
                                       None)))
    assert compile_calls(calls, target, tmp_path) >= 6
