"""Attention in memory linear in the sequence: blocks, an online softmax, probabilities recomputed
in the backward.

The same function as `attention`, argument for argument. The forward keeps one number per row, the
logarithm of the softmax's denominator; the backward turns it into probabilities again, a block at a
time. Source: Dao et al., FlashAttention (2205.14135) algorithms 1 and 4; Dao, FlashAttention-2
(2307.08691). Derivation: derivations/flash_attention.md. Letters as in attention.py; t and s are
positions within a block.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import (
    Array,
    add_to,
    blocks,
    cast,
    einsum,
    expect,
    expect_that,
    fill,
    finite,
    namespace,
    put,
    real,
    zeros,
)
from .attention import all_heads, check_attention, positions, sum_heads, visible

__all__ = ["FlashAttentionSaved", "flash_attention_backward", "flash_attention_forward"]


class FlashAttentionSaved(NamedTuple):
    """What `flash_attention_forward` keeps for `flash_attention_backward`."""

    q: Array  # [B, T, H, X]
    k: Array  # [B, S, H or 1, X]
    v: Array  # [B, S, H or 1, V]
    o: Array  # [B, T, H, V]: gives the row sums of p ∘ dp without p
    lse: Array  # [B, H, T, 1]: log-sum-exp of each row's scores, all that is needed to get p back
    scale: float
    causal: bool
    key_mask: Array | None  # [B, S]
    segments: Array | None  # [B, S]
    block: int


def flash_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool = True,
    key_mask: Array | None = None,
    segments: Array | None = None,
    block: int = 128,
) -> tuple[Array, FlashAttentionSaved]:
    """o [B, T, H, V], with arguments as `refimpl.ops.attention_forward`; ``block`` is the length of
    a block of queries or keys."""
    xp, scale = namespace(q=q, k=k, v=v), float(scale)
    check_attention(q, k, v, causal, key_mask, segments)
    expect_that(block >= 1, f"block must be at least 1, got {block}")
    (b, t, h, _), width = q.shape, v.shape[3]
    keys, values = all_heads(k, h), all_heads(v, h)
    o, lse = zeros((b, t, h, width), q), zeros((b, h, t, 1), q)
    for t0, t1 in blocks(t, block):
        queries = positions(t0, t1)
        numerator, total = zeros((b, h, t1 - t0, width), q), zeros((b, h, t1 - t0, 1), q)
        largest = real(total) - xp.inf
        sighted = xp.zeros((1, 1, t1 - t0, 1), dtype=xp.bool, device=q.device)
        for s0, s1 in blocks(k.shape[1], block, t1 + k.shape[1] - t if causal else None):
            seen = positions(s0, s1)
            mask = visible((t0, t1), (s0, s1), q, k, causal, key_mask, segments)
            sighted = sighted | xp.any(mask, axis=-1, keepdims=True)
            scores = scale * einsum("bthx,bshx->bhts", q[queries], keys[seen])
            scores = fill(mask, scores, -xp.inf)
            larger = xp.maximum(largest, xp.max(real(scores), axis=-1, keepdims=True))
            shift = xp.where(xp.isfinite(larger), larger, 0.0)
            e = xp.exp(scores - cast(shift, q))
            decay = xp.exp(cast(largest, q) - cast(shift, q))  # (flash_attention.1)
            total = total * decay + xp.sum(e, axis=-1, keepdims=True)  # (flash_attention.2)
            mixed = einsum("bhts,bshv->bhtv", e, values[seen])
            numerator = numerator * decay + mixed  # (flash_attention.3)
            largest = larger
        total = fill(sighted, finite(total), 1.0)
        o = put(o, queries, xp.permute_dims(numerator / total, (0, 2, 1, 3)))
        log_sum = cast(xp.where(sighted, largest, 0.0), q) + xp.log(total)  # (flash_attention.4)
        lse = put(lse, (slice(None), *queries), log_sum)
    return o, FlashAttentionSaved(q, k, v, o, lse, scale, causal, key_mask, segments, block)


def flash_attention_backward(do: Array, saved: FlashAttentionSaved) -> tuple[Array, Array, Array]:
    """Gradients (dq, dk, dv), shaped like q, k and v, from ``do`` [B, T, H, V]."""
    q, k, v, o, lse, scale, causal, key_mask, segments, block = saved
    xp = namespace(do=do, q=q)
    expect("do", do, "(B, T, H, V)", tuple(o.shape))
    t, s = q.shape[1], k.shape[1]
    keys, values = all_heads(k, q.shape[2]), all_heads(v, q.shape[2])
    dq = zeros(q.shape, q)
    dk, dv = zeros(k.shape, q), zeros(v.shape, q)
    row_sum = xp.sum(do * o, axis=-1, keepdims=True)  # (flash_attention.5)
    row_sum = xp.permute_dims(row_sum, (0, 2, 1, 3))
    for t0, t1 in blocks(t, block):
        queries = positions(t0, t1)
        for s0, s1 in blocks(s, block, t1 + s - t if causal else None):
            seen = positions(s0, s1)
            mask = visible((t0, t1), (s0, s1), q, k, causal, key_mask, segments)
            scores = scale * einsum("bthx,bshx->bhts", q[queries], keys[seen])
            p = xp.exp(fill(mask, scores, -xp.inf) - lse[:, :, t0:t1, :])  # (flash_attention.6)
            dp = einsum("bthv,bshv->bhts", do[queries], values[seen])
            ds = scale * p * (dp - row_sum[:, :, t0:t1, :])  # (flash_attention.7)
            # (flash_attention.8)
            dq = add_to(dq, queries, einsum("bhts,bshx->bthx", ds, keys[seen]))
            # (flash_attention.9)
            dk = add_to(dk, seen, sum_heads(einsum("bhts,bthx->bshx", ds, q[queries]), k))
            # (flash_attention.9)
            dv = add_to(dv, seen, sum_heads(einsum("bhts,bthv->bshv", p, do[queries]), v))
    return dq, dk, dv
