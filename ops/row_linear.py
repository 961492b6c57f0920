"""Linear layers of one row that read the same row, in one launch: what generation of a token at a time consists of.

    gated_linear    activation(x @ gate.T) * (x @ up.T)
    qkv_linear      x @ q.T + q_bias, x @ k.T + k_bias, x @ v.T + v_bias

For one row every weight is read once and used once, so that bandwidth decides: launches that follow each other leave the
memory idle at their ends and beginnings, and one launch over all the weights does so once. Programs take blocks of rows of
the weights, as :func:`gemsmode.ops.matmul.matvec_kernel` does; of a gate and its partner the same rows, so that their
product is all that is written. Values are rounded once.

More rows than one are products for the tensor cores, where nothing is gained: they are taken apart into linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gemsmode.custom import custom_op
from gemsmode.launch import Constants
from gemsmode.ops import activation
from gemsmode.ops.linear import linear
from gemsmode.ops.matmul import choose_strip, row_products
from gemsmode.ops.promotion import FLOAT, TRITON
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, contiguous_strides
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta

# -- references and fakes ----------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _gated_linear(input: Any, gate: Any, up: Any, activation: str = "silu") -> Any:
    return _ACTIVATIONS[activation](linear(input, gate, None)) * linear(input, up, None)


def _qkv_linear(input: Any, q: Any, k: Any, v: Any, q_bias: Any = None, k_bias: Any = None, v_bias: Any = None) -> Any:
    return linear(input, q, q_bias), linear(input, k, k_bias), linear(input, v, v_bias)


def _fake_gated(input: Any, gate: Any, up: Any, activation: str = "silu") -> Any:
    return input.new_empty((*input.shape[:-1], gate.shape[0]))


def _fake_qkv(input: Any, q: Any, k: Any, v: Any, q_bias: Any = None, k_bias: Any = None, v_bias: Any = None) -> Any:
    return tuple(input.new_empty((*input.shape[:-1], w.shape[0])) for w in (q, k, v))


gated_linear = custom_op("gated_linear(Tensor input, Tensor gate, Tensor up, str activation='silu') -> Tensor",
                         reference=_gated_linear, fake=_fake_gated)
qkv_linear = custom_op("qkv_linear(Tensor input, Tensor q, Tensor k, Tensor v, Tensor? q_bias=None, Tensor? k_bias=None, "
                       "Tensor? v_bias=None) -> (Tensor, Tensor, Tensor)", reference=_qkv_linear, fake=_fake_qkv)

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _layer(p_out, p_x, p_w, bias, i_block, n, k, s_x, s_w, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_K: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr, SUM: tl.constexpr):
    """Block number `i_block` of the features of one layer; `bias` is () or a pointer and its stride."""
    o_n = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < n
    if WIDE:
        o_n = o_n.to(tl.int64)
    b_acc = row_products(p_w + o_n * s_w[0], m_n, p_x, s_w[1], s_x, 0, k, ACC, WIDE, BLOCK_M, BLOCK_K, EVICT, STAGES)
    b_sum = tl.sum(b_acc.to(SUM), axis=1)
    if len(bias) == 2:
        b_sum += tl.load(bias[0] + o_n * bias[1], mask=m_n, other=0.0).to(SUM)
    tl.store(p_out + o_n, b_sum.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def qkv_kernel(outs, p_x, weights, biases, sizes, k, s_x, strides, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_K: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr, SUM: tl.constexpr):
    """Three layers one after the other. Grid: (blocks of their features). Tuples: of each layer one.

    A thread's sums are of dtype ACC, the sum of them all of dtype SUM.
    """
    i_block = tl.program_id(0)
    q_end = tl.cdiv(sizes[0], BLOCK_M)
    k_end = q_end + tl.cdiv(sizes[1], BLOCK_M)
    if i_block < q_end:
        _layer(outs[0], p_x, weights[0], biases[0], i_block, sizes[0], k, s_x, strides[0], ACC, WIDE, BLOCK_M, BLOCK_K, EVICT, STAGES,
               SUM)
    elif i_block < k_end:
        _layer(outs[1], p_x, weights[1], biases[1], i_block - q_end, sizes[1], k, s_x, strides[1], ACC, WIDE, BLOCK_M, BLOCK_K, EVICT,
               STAGES, SUM)
    else:
        _layer(outs[2], p_x, weights[2], biases[2], i_block - k_end, sizes[2], k, s_x, strides[2], ACC, WIDE, BLOCK_M, BLOCK_K, EVICT,
               STAGES, SUM)


@triton.jit
def gated_kernel(p_out, p_x, p_gate, p_up, n, k, s_x, s_gate, s_up, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_K: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr, SUM: tl.constexpr, ACTIVATION: tl.constexpr):
    """BLOCK_M features: ACTIVATION(x . gate) * (x . up). Grid: (blocks of features)."""
    o_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < n
    if WIDE:
        o_n = o_n.to(tl.int64)
    p_gates = p_gate + o_n * s_gate[0]
    p_ups = p_up + o_n * s_up[0]
    b_gate = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    b_up = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for k_start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        o_k = k_start + tl.arange(0, BLOCK_K)
        m_k = o_k < k
        mask = m_n[:, None] & m_k[None, :]
        if WIDE:
            o_k = o_k.to(tl.int64)
        # [BLOCK_K], [BLOCK_M, BLOCK_K] and [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_x + o_k * s_x, mask=m_k, other=0.0).to(ACC)[None, :]
        b_gate += tl.load(p_gates[:, None] + o_k[None, :] * s_gate[1], mask=mask, other=0.0, eviction_policy=EVICT).to(ACC) * b_x
        b_up += tl.load(p_ups[:, None] + o_k[None, :] * s_up[1], mask=mask, other=0.0, eviction_policy=EVICT).to(ACC) * b_x
    b_out = ACTIVATION(tl.sum(b_gate.to(SUM), axis=1)) * tl.sum(b_up.to(SUM), axis=1)
    tl.store(p_out + o_n, b_out.to(p_out.dtype.element_ty), mask=m_n)


# -- rules -------------------------------------------------------------------------------------------------------------


def _row(call: Call, *weights: TensorMeta) -> TensorMeta:
    """The call's input, which is one row that fits the weights.

    Raises:
        Decline: it is not, or they do not.
    """
    x: TensorMeta = call["input"]
    if x.ndim == 0 or x.numel != x.shape[-1]:
        raise Decline(f"{x.numel // max(x.shape[-1], 1) if x.ndim else 0} rows: products for the tensor cores, one for each layer")
    if x.numel == 0:
        raise Decline("an empty row")
    for w in weights:
        if w.ndim != 2 or w.dtype != x.dtype or w.shape[1] != x.shape[-1] or w.shape[0] == 0:
            raise Decline(f"a weight that is {w}")
        if w.stride[1] != 1:
            raise Decline("weights whose rows are not contiguous")
    return x


def _common(call: Call, x: TensorMeta, features: int, at_once: int, *weights: TensorMeta) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The strip for ``features`` rows of weights, of which a program takes ``at_once`` matrices, and the kernels' constants."""
    strip, _ = choose_strip(features, x.shape[-1], 1, False, x.dtype.itemsize, call.target)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.float32 if x.dtype.itemsize == 2 else torch.float64  # as matvec_kernel's
    wide = any([w.extent >= 2**31 - 2**20 for w in weights])
    return strip, (("ACC", TRITON[acc]), ("WIDE", wide), ("BLOCK_M", max(strip.m // at_once, 1)), ("BLOCK_K", strip.k),
                   ("EVICT", strip.evict), ("STAGES", strip.stages), ("SUM", TRITON[total]))


def _moved(*metas: TensorMeta) -> int:
    return sum([m.numel * m.dtype.itemsize for m in metas])


@planned("gemsmode.gated_linear.default", family="fused", kernel=gated_kernel, name="gated_linear", when=dtype(*FLOAT))
def plan_gated(call: Call) -> Plan:
    """``activation(input [..., K] @ gate [N, K]^T) * (input @ up [N, K]^T)`` of one row."""
    gate, up, name = call["gate"], call["up"], call["activation"]
    x = _row(call, gate, up)
    if gate.shape != up.shape:
        raise Decline(f"weights of shapes {list(gate.shape)} and {list(up.shape)}")
    functions = {"silu": activation._silu, "gelu": activation._gelu, "gelu_tanh": activation._gelu_tanh}
    if name not in functions:
        raise Decline(f"activation={name!r}: expected one of {', '.join(functions)}")
    n, k = gate.shape
    out = Alloc((*x.shape[:-1], n), contiguous_strides((*x.shape[:-1], n)), x.dtype)
    strip, constants = _common(call, x, 2 * n, 2, gate, up)
    step = Launch(gated_kernel, (-(-n // dict(constants)["BLOCK_M"]), 1, 1),
                  (Out(0), Arg(0), Arg(1), Arg(2), n, k, x.stride[-1], gate.stride, up.stride),
                  Constants((*constants, ("ACTIVATION", functions[name]))), strip.warps)
    return Plan((out,), (step,), Out(0), {Arg(0): x, Arg(1): gate, Arg(2): up}, bytes=_moved(x, gate, up, out.meta), flops=4 * n * k)


@planned("gemsmode.qkv_linear.default", family="fused", kernel=qkv_kernel, name="qkv_linear", when=dtype(*FLOAT))
def plan_qkv(call: Call) -> Plan:
    """Three linear layers of one row."""
    weights, biases = call.args[1:4], call.args[4:7]
    x = _row(call, *weights)
    for w, b in zip(weights, biases):
        if b is not None and (b.shape != w.shape[:1] or b.dtype != x.dtype):
            raise Decline(f"a bias that is {b}")
    sizes = tuple([w.shape[0] for w in weights])
    k = x.shape[-1]
    outs = tuple([Alloc((*x.shape[:-1], n), contiguous_strides((*x.shape[:-1], n)), x.dtype) for n in sizes])
    strip, constants = _common(call, x, sum(sizes), 1, *weights)
    added = tuple([() if b is None else (Arg(4 + i), b.stride[0]) for i, b in enumerate(biases)])
    rows = dict(constants)["BLOCK_M"]
    step = Launch(qkv_kernel, (sum([-(-n // rows) for n in sizes]), 1, 1),
                  (tuple(map(Out, range(3))), Arg(0), tuple([Arg(1 + i) for i in range(3)]), added, sizes, k, x.stride[-1],
                   tuple([w.stride for w in weights])), Constants(constants), strip.warps)
    metas = {Arg(i): m for i, m in enumerate(call.args) if m is not None}
    return Plan(outs, (step,), tuple(map(Out, range(3))), metas, bytes=_moved(*metas.values(), *[out.meta for out in outs]),
                flops=2 * sum(sizes) * k)


# -- gradients ---------------------------------------------------------------------------------------------------------
# Generation wants none; they are those of the layers, computed again.


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.values = [None if isinstance(a, torch.Tensor) else a for a in inputs]
    ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in inputs))


def _gradient(reference: Any) -> Any:
    def formula(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad
        with torch.enable_grad():
            given = [v if t is None else t.detach().requires_grad_(i < len(needed) and needed[i])
                     for i, (t, v) in enumerate(zip(ctx.saved_tensors, ctx.values))]
            results = reference(*given)
        asked = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        found = iter(torch.autograd.grad(results, asked, grads))
        return tuple([next(found) if is_needed else None for is_needed in needed])

    return formula


gated_linear.differentiate(_save, _gradient(_gated_linear))
qkv_linear.differentiate(_save, _gradient(_qkv_linear))
