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
    "more queries than keys": (2, 2, 2, 150, 130, 32),
}


def reference(q, k, v, causal, mask, scale):
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1),
                                        attn_mask=None if mask is None else mask.double(), is_causal=causal, scale=scale)


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


def test_what_is_not_served_says_why() -> None:
    q = torch.randn(1, 2, 4, 16, dtype=torch.float64, device=current().device_type)
    with GemsMode(strict=True, trace=True) as mode:
        scaled_dot_product_attention(q, q, q)
    rows = [r for r in mode.report.to_dict()["ops"] if "attention" in r["overload"]]
    assert rows and all(r["decision"] == "pass" and "float64" in r["reason"] for r in rows)
