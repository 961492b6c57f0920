"""Rotary position embedding of queries and keys in one launch: half and interleaved layouts, partial, with position ids.

Each head's first ``2 R`` elements are R pairs (a, b), which are elements (i, i + R) in the half layout and (2 i, 2 i + 1) in
the interleaved one; the others are copied. With c and s the cosine and sine of the token's position:

    a' = a c_a - b s_a        b' = b c_b + a s_b

    q [batch, tokens, heads, D], k [batch, tokens, heads of k, D], or with heads before tokens
    cos, sin [positions, W] or [batch or 1, tokens, W]; W is R (c_a = c_b), or 2 R where they are given for every element

The gradient is the transposed rotation, which is the same kernel with ``inverse``.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gemsmode.custom import custom_op
from gemsmode.ops.layout import preserved_strides
from gemsmode.ops.promotion import FLOAT, TRITON, opmath
from gemsmode.ops.rows import INTERPRETED_BLOCK, is_wide, power_of_2, warps
from gemsmode.plan import Alloc, Arg, Decline, Launch, Out, Plan, Size, stride
from gemsmode.predicates import dtype
from gemsmode.registry import planned
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import Target

# -- reference ---------------------------------------------------------------------------------------------------------


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, full: bool, inverse: bool) -> torch.Tensor:
    rotary = cos.shape[-1] * (1 if full else 2)
    turned, rest = x[..., :rotary].to(cos.dtype), x[..., rotary:]
    if interleaved:
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, rotary // 2), slice(rotary // 2, rotary)
    a, b = turned[..., first], turned[..., second]
    ca, cb, sa, sb = (t[..., s] for t in (cos, sin) for s in (first, second)) if full else (cos, cos, sin, sin)
    if inverse:
        a, b = a * ca + b * sb, b * cb - a * sa
    else:
        a, b = a * ca - b * sa, b * cb + a * sb
    both = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((both.to(x.dtype), rest), -1)


def _reference(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, interleaved: bool = False, full_width: bool = False,
               heads_first: bool = False, inverse: bool = False) -> Any:
    tokens = q.shape[2 if heads_first else 1]
    acc = opmath(q.dtype)

    def table(t: torch.Tensor) -> torch.Tensor:
        if position_ids is not None:
            t = t[position_ids]
        elif t.ndim == 2:
            t = t[:tokens]
        t = t if t.ndim == 3 else t.unsqueeze(0)
        return t.to(acc).unsqueeze(1 if heads_first else 2)

    c, s = table(cos), table(sin)
    results = [_rotated(x, c, s, interleaved, full_width, inverse) for x in (q, k)]
    # In the memory order of the inputs, as the kernel writes them.
    return tuple(torch.empty_like(x).copy_(r) if x.stride() != r.stride() and not r.requires_grad else r for x, r in zip((q, k), results))


def _fake(q: Any, k: Any, cos: Any, sin: Any, *args: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k)


rotary_embedding = custom_op(
    "rotary_embedding(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids=None, bool interleaved=False, "
    "bool full_width=False, bool heads_first=False, bool inverse=False) -> (Tensor, Tensor)", reference=_reference, fake=_fake)
"""q and k, rotated. ``full_width``: cos and sin have a value for every element. Not differentiable in cos and sin."""

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(p_out, p_x, ca, cb, sa, sb, i_batch, i_token, m_token, i_head, heads, pairs, size, s_out, s_x, INTERLEAVED: tl.constexpr,
            INVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """Rotate BLOCK_H heads of the tokens; strides are (batch, token, head, element)."""
    o_head = (i_head * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    o_pair = tl.arange(0, BLOCK_R)[None, None, :]
    m_head = m_token[:, None, None] & (o_head < heads)
    mask = m_head & (o_pair < pairs)
    p_xs = p_x + (i_batch * s_x[0] + i_token * s_x[1])[:, None, None] + o_head * s_x[2]
    p_outs = p_out + (i_batch * s_out[0] + i_token * s_out[1])[:, None, None] + o_head * s_out[2]
    if INTERLEAVED:
        o_a = 2 * o_pair
        o_b = o_a + 1
    else:
        o_a = o_pair
        o_b = o_pair + pairs
    # [BLOCK_T, BLOCK_H, BLOCK_R]
    a = tl.load(p_xs + o_a * s_x[3], mask=mask, other=0.0).to(ACC)
    b = tl.load(p_xs + o_b * s_x[3], mask=mask, other=0.0).to(ACC)
    if INVERSE:
        turned_a = a * ca + b * sb
        turned_b = b * cb - a * sa
    else:
        turned_a = a * ca - b * sa
        turned_b = b * cb + a * sb
    tl.store(p_outs + o_a * s_out[3], turned_a.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_outs + o_b * s_out[3], turned_b.to(p_out.dtype.element_ty), mask=mask)
    if BLOCK_TAIL > 0:
        o_tail = 2 * pairs + tl.arange(0, BLOCK_TAIL)[None, None, :]
        m_tail = m_head & (o_tail < size)
        tl.store(p_outs + o_tail * s_out[3], tl.load(p_xs + o_tail * s_x[3], mask=m_tail), mask=m_tail)


@triton.jit
def rotary_kernel(p_oq, p_ok, p_q, p_k, p_cos, p_sin, positions, n_tokens, tokens, q_heads, k_heads, pairs, size, s_oq, s_ok, s_q, s_k,
                  s_cos, s_sin, s_positions, INTERLEAVED: tl.constexpr, FULL: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
                  WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """Grid: blocks of tokens, blocks of heads (those of q first). `positions` is () or one pointer."""
    o_token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_head = tl.program_id(1)
    m_token = o_token < n_tokens
    if WIDE:
        o_token = o_token.to(tl.int64)
    i_batch = o_token // tokens
    i_token = o_token % tokens
    i_position = i_token
    if len(positions) == 1:
        i_position = tl.load(positions[0] + i_batch * s_positions[0] + i_token * s_positions[1], mask=m_token, other=0)
    o_pair = tl.arange(0, BLOCK_R)[None, None, :]
    m_table = m_token[:, None, None] & (o_pair < pairs)
    p_coses = p_cos + (i_batch * s_cos[0] + i_position * s_cos[1])[:, None, None]
    p_sines = p_sin + (i_batch * s_sin[0] + i_position * s_sin[1])[:, None, None]
    if FULL and INTERLEAVED:
        o_a = 2 * o_pair
        o_b = o_a + 1
    elif FULL:
        o_a = o_pair
        o_b = o_pair + pairs
    else:
        o_a = o_pair
        o_b = o_pair
    # [BLOCK_T, 1, BLOCK_R]
    ca = tl.load(p_coses + o_a * s_cos[2], mask=m_table, other=0.0).to(ACC)
    sa = tl.load(p_sines + o_a * s_sin[2], mask=m_table, other=0.0).to(ACC)
    cb = ca
    sb = sa
    if FULL:
        cb = tl.load(p_coses + o_b * s_cos[2], mask=m_table, other=0.0).to(ACC)
        sb = tl.load(p_sines + o_b * s_sin[2], mask=m_table, other=0.0).to(ACC)
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    if i_head < q_blocks:
        _rotate(p_oq, p_q, ca, cb, sa, sb, i_batch, i_token, m_token, i_head, q_heads, pairs, size, s_oq, s_q, INTERLEAVED, INVERSE, ACC,
                BLOCK_H, BLOCK_R, BLOCK_TAIL)
    else:
        _rotate(p_ok, p_k, ca, cb, sa, sb, i_batch, i_token, m_token, i_head - q_blocks, k_heads, pairs, size, s_ok, s_k, INTERLEAVED,
                INVERSE, ACC, BLOCK_H, BLOCK_R, BLOCK_TAIL)


# -- launch choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A program's share: tokens by heads."""

    tokens: int
    heads: int


_PAIRS = 1024  # a program of four warps: eight pairs a thread


def choose_tile(n_tokens: int, q_heads: int, k_heads: int, block: int, target: Target) -> Tile:
    """The tile for heads whose pairs, or the rest of which, fit in ``block``."""
    if target.interpreted:
        heads = power_of_2(max(q_heads, k_heads))
        return Tile(max(min(power_of_2(n_tokens), INTERPRETED_BLOCK // (block * heads)), 1), heads)
    heads = max(min(power_of_2(min(q_heads, k_heads)), _PAIRS // block), 1)
    return Tile(max(min(_PAIRS // (block * heads), power_of_2(n_tokens)), 1), heads)


# -- rule --------------------------------------------------------------------------------------------------------------


_INDICES = (torch.int32, torch.int64)


def _table_strides(meta: TensorMeta, batch: int) -> tuple[int, int, int]:
    if meta.ndim == 2:
        return 0, *meta.stride  # type: ignore[return-value]
    return 0 if meta.shape[0] == 1 and batch != 1 else meta.stride[0], meta.stride[1], meta.stride[2]


@planned("gemsmode.rotary_embedding.default", family="fused", kernel=rotary_kernel, name="rotary_embedding",
         when=[dtype(*FLOAT, arg=name) for name in ("q", "k", "cos", "sin")])
def plan_rotary(call: Call) -> Plan:
    q, k, cos, sin, positions, interleaved, full, heads_first, inverse = call.args
    if q.ndim != 4 or k.ndim != 4:
        raise Decline("q and k of other than four dimensions")
    order = (0, 2, 1, 3) if heads_first else (0, 1, 2, 3)
    batch, tokens, q_heads, size = (q.shape[d] for d in order)
    if tuple([k.shape[d] for d in order if d != order[2]]) != (batch, tokens, size):
        raise Decline("q and k differ in more than the number of heads")
    if len({opmath(t.dtype) for t in (q, k, cos, sin)}) != 1:
        raise Decline("float64 beside other dtypes")
    width = cos.shape[-1]
    pairs = width // 2 if full else width
    if cos.shape != sin.shape or cos.ndim not in (2, 3) or 2 * pairs > size or (full and width % 2):
        raise Decline("cos and sin that do not fit the heads")
    if cos.ndim == 3 and (positions is not None or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens):
        raise Decline("cos and sin that do not fit the tokens")
    if positions is None and cos.shape[-2] < tokens:
        raise Decline("fewer positions than tokens")
    if positions is not None and (positions.shape not in ((batch, tokens), (1, tokens)) or positions.dtype not in _INDICES):
        raise Decline("position_ids that do not fit the tokens")
    allocs = tuple([Alloc(t.shape, preserved_strides(t), t.dtype) for t in (q, k)])
    metas = {Arg(i): t for i, t in enumerate((q, k, cos, sin, positions)) if t is not None}
    k_heads = k.shape[order[2]]
    if q.numel == 0 or k.numel == 0:
        if q.numel or k.numel or pairs == 0:
            raise Decline("no keys or no queries")
        return Plan(allocs, (), (Out(0), Out(1)), metas, bytes=0, flops=0)
    block, tail = power_of_2(max(pairs, 1)), size - 2 * pairs
    block_tail = power_of_2(tail) if tail else 0
    tile = choose_tile(batch * tokens, q_heads, k_heads, max(block, block_tail), call.target)

    def steps(meta: Any) -> tuple[Any, ...]:
        return (*[stride(meta.stride[d]) for d in order[:3]], meta.stride[3])

    tables = [(stride(b), stride(s), element) for b, s, element in (_table_strides(t, batch) for t in (cos, sin))]
    place: tuple[Any, ...] = ()
    if positions is not None:
        place = (Size(0 if positions.shape[0] == 1 else positions.stride[0]), Size(positions.stride[1]))
    constants = (("INTERLEAVED", interleaved), ("FULL", full), ("INVERSE", inverse), ("ACC", TRITON[opmath(q.dtype)]),
                 ("WIDE", is_wide(*metas.values(), *(a.meta for a in allocs))), ("BLOCK_T", tile.tokens), ("BLOCK_H", tile.heads),
                 ("BLOCK_R", block), ("BLOCK_TAIL", block_tail))
    step = Launch(
        rotary_kernel, (-(-batch * tokens // tile.tokens), -(-q_heads // tile.heads) + -(-k_heads // tile.heads), 1),
        (Out(0), Out(1), Arg(0), Arg(1), Arg(2), Arg(3), () if positions is None else (Arg(4),), Size(batch * tokens), Size(tokens),
         Size(q_heads), Size(k_heads), pairs, size, steps(allocs[0]), steps(allocs[1]), steps(q), steps(k), *tables, place),
        constants, warps(4, call.target))
    elements = q.numel + k.numel
    return Plan(allocs, (step,), (Out(0), Out(1)), metas, bytes=2 * elements * q.dtype.itemsize, flops=3 * elements)


# -- gradient ----------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    positions, *flags = [*inputs[4:]] + [None, False, False, False, False][len(inputs) - 4:]
    ctx.save_for_backward(inputs[2], inputs[3], positions)
    ctx.flags = flags


def _gradient(ctx: Any, grad_q: Any, grad_k: Any) -> Any:
    cos, sin, positions = ctx.saved_tensors
    interleaved, full, heads_first, inverse = ctx.flags
    if any(ctx.needs_input_grad[2:4]):
        raise NotImplementedError("gemsmode::rotary_embedding is not differentiable in cos and sin")
    dq, dk = rotary_embedding(grad_q, grad_k, cos, sin, positions, interleaved, full, heads_first, not inverse)
    return dq, dk, *[None] * 7


rotary_embedding.differentiate(_setup, _gradient)
