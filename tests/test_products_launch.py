"""What the plans of persistent products and of attention pass to Triton's launcher, on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import FakeGpu

from gemsmode import load_ops

load_ops()


@pytest.fixture(params=["flat", "nested", "public"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> FakeGpu:
    if device != "cpu":
        pytest.skip("the GPU that these tests imagine runs its kernels in the interpreter")
    return FakeGpu(monkeypatch, request.param)


def test_attention(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMSMODE_SLOWER", "serve")
    k = torch.randn(1, 2, 600, 32).bfloat16()
    for queries, causal in ((100, True), (1, False)):
        q = torch.randn(1, 2, queries, 32).bfloat16()
        result = gpu.call("_scaled_dot_product_cudnn_attention", q, k, k, None, True, 0.0, causal, False, 0.2)
        expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), k.double(), is_causal=causal, scale=0.2)
        assert (result[0].double() - expected).abs().max() <= 3e-2
        assert result[2:6] == (None, None, queries, 600) and result[8] is None


def test_products(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemsmode.ops import persistent

    monkeypatch.setattr(persistent, "choose_shape", lambda *sizes: persistent.Shape(32, 64, 32, 2, 4, 1, 1))
    monkeypatch.setattr(persistent, "choose_split", lambda shape, tiles, k, *rest: persistent.Split(tiles - 2, 2, 2, 2))
    a, b, c = torch.randn(96, 104).bfloat16(), torch.randn(136, 104).bfloat16().t(), torch.randn(136).bfloat16()
    exact = a.double() @ b.double()
    assert (gpu.call("mm", a, b).double() - exact).abs().max() <= 0.3
    assert (gpu.call("addmm", c, a, b, 0.5, 2).double() - (0.5 * c.double() + 2 * exact)).abs().max() <= 0.5
    assert any(kernel.kernel.__name__ == "finish_kernel" for kernel, _ in gpu.compiled)
