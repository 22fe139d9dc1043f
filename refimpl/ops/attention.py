"""Attention, the quadratic truth on one page: o = softmax(scale · q kᵀ + mask) v.

The whole probability matrix is kept; `flash_attention` computes the same in linear memory. Some
queries at a time, so that under a causal mask the keys behind them all are not computed. Keys and
values may have another width, and one head where the queries have many (the absorbed form of MLA).
The queries are the last T of the S key positions, so T = S is training or prefill, T < S decoding
with a cache; T > S, where no position is before another, a block of keys out of many. Source:
Vaswani et al., Attention Is All You Need (1706.03762) eq. 1. Derivation: derivations/attention.md.
Letters: B batch, T query position, S key position, H heads, X query/key width, V value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import (
    Array,
    add_to,
    blocks,
    cast,
    einsum,
    expect,
    expect_mask,
    expect_some,
    expect_that,
    fill,
    finite,
    namespace,
    put,
    real,
    zeros,
)
from .choices import BlindQuery, expect_choice

__all__ = ["AttentionSaved", "attention_backward", "attention_forward", "visible"]

QUERIES = 128  # at a time


class AttentionSaved(NamedTuple):
    """What `attention_forward` keeps for `attention_backward`."""

    q: Array  # [B, T, H, X]
    k: Array  # [B, S, H or 1, X]
    v: Array  # [B, S, H or 1, V]
    p: Array  # [B, H, T, S]: probabilities; quadratic, which flash_attention avoids
    scale: float
    ordered: bool  # no query sees a key behind it


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool = True,
    key_mask: Array | None = None,
    segments: Array | None = None,
    blind: BlindQuery = "zero",
) -> tuple[Array, AttentionSaved]:
    """o [B, T, H, V] for ``q`` [B, T, H, X], ``k`` [B, S, H or 1, X], ``v`` [B, S, H or 1, V].

    Args:
        scale: multiplies q·k, (nope + rope)^−½ times YaRN's correction in MLA.
        causal: query t sees keys up to its own position S − T + t; T ≤ S.
        key_mask: [B, S] bool, False for padding, which nobody sees.
        segments: [B, S] integers, the document of each position; a query sees its own document
            alone; T ≤ S.
        blind: what a query that sees no key gives: 0, and its gradient is 0, or the mean of all
            values, hidden ones too, as where a large finite number is added to hidden scores and
            swallows them (transformers, eager). The backward is then its autograd's, which knows
            nothing of the rounding: that of a softmax over equal scores.

    Hidden keys and values must be finite: 0 · NaN is NaN.
    """
    xp, scale = namespace(q=q, k=k, v=v), float(scale)
    check_attention(q, k, v, causal, key_mask, segments)
    expect_choice("blind", blind, BlindQuery)
    (b, t, h, _), s = q.shape, k.shape[1]
    keys, values = all_heads(k, h), all_heads(v, h)
    o, p = zeros((b, t, h, v.shape[3]), q), zeros((b, h, t, s), q)
    scaled, ordered = scale * q, causal and blind == "zero"
    for t0, t1 in blocks(t, QUERIES):
        s1 = s - t + t1 if ordered else s
        queries, seen = positions(t0, t1), positions(0, s1)
        scores = einsum("bthx,bshx->bhts", scaled[queries], keys[seen])  # (attention.1)
        mask = visible((t0, t1), (0, s1), q, k, causal, key_mask, segments)
        scores = fill(mask, scores, -xp.inf)
        sighted = xp.any(mask, axis=-1, keepdims=True)
        if blind == "mean":
            scores = fill(sighted, scores, 0.0)  # (attention.11)
            sighted = xp.ones_like(sighted)
        largest = xp.max(real(scores), axis=-1, keepdims=True)
        e = xp.exp(scores - cast(xp.where(xp.isfinite(largest), largest, 0.0), q))
        total = fill(sighted, finite(xp.sum(e, axis=-1, keepdims=True)), 1.0)
        part = e / total  # (attention.2); NaN where scores overflow, −∞ in all
        o = put(o, queries, einsum("bhts,bshv->bthv", part, values[seen]))  # (attention.3)
        p = put(p, (..., slice(t0, t1), slice(0, s1)), part)
    return o, AttentionSaved(q, k, v, p, scale, ordered)


def attention_backward(do: Array, saved: AttentionSaved) -> tuple[Array, Array, Array]:
    """Gradients (dq, dk, dv), shaped like q, k and v, from ``do`` [B, T, H, V]."""
    q, k, v, p, scale, ordered = saved
    xp = namespace(do=do, q=q)
    expect("do", do, "(B, T, H, V)", (*q.shape[:3], v.shape[3]))
    (_, t, h, _), s = q.shape, k.shape[1]
    keys, values = all_heads(k, h), all_heads(v, h)
    dq, scaled = zeros(q.shape, q), scale * q
    dk, dv = zeros(keys.shape, q), zeros(values.shape, q)
    for t0, t1 in blocks(t, QUERIES):
        s1 = s - t + t1 if ordered else s
        queries, seen = positions(t0, t1), positions(0, s1)
        part = p[..., t0:t1, :s1]
        dv = add_to(dv, seen, einsum("bhts,bthv->bshv", part, do[queries]))  # (attention.4)
        dp = einsum("bthv,bshv->bhts", do[queries], values[seen])  # (attention.5)
        ds = part * (dp - xp.sum(part * dp, axis=-1, keepdims=True))  # (attention.6)
        dq = put(dq, queries, scale * einsum("bhts,bshx->bthx", ds, keys[seen]))  # (attention.7)
        dk = add_to(dk, seen, einsum("bhts,bthx->bshx", ds, scaled[queries]))  # (attention.8)
    return dq, sum_heads(dk, k), sum_heads(dv, v)


def positions(start: int, stop: int) -> tuple[Any, ...]:
    """The index of positions start … stop in an array [B, position, …]."""
    return slice(None), slice(start, stop), ...


def visible(
    queries: tuple[int, int],
    keys: tuple[int, int],
    q: Array,
    k: Array,
    causal: bool,
    key_mask: Array | None,
    segments: Array | None,
) -> Array:
    """Which keys each query may see: bool [B or 1, 1, t, s]. The ranges ``queries`` and ``keys``,
    (start, stop), cut a block out of all T × S.

    Args:
        q, k: [B, T, H, X] and [B, S, H or 1, X], of which the shapes alone are read.
        key_mask, segments: [B, S], as in `attention_forward`.
    """
    xp = namespace(q=q, k=k)
    offset = k.shape[1] - q.shape[1]
    t = xp.arange(queries[0] + offset, queries[1] + offset, device=q.device)[:, None]
    s = xp.arange(*keys, device=q.device)[None, :]
    mask = ((s <= t) | (not causal))[None, None, :, :]  # (attention.9)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, keys[0] : keys[1]]
    if segments is not None:
        own = segments[:, queries[0] + offset : queries[1] + offset]
        mask = mask & (own[:, None, :, None] == segments[:, None, None, keys[0] : keys[1]])
    return mask


def check_attention(
    q: Array, k: Array, v: Array, causal: bool, key_mask: Array | None, segments: Array | None
) -> None:
    """ValueError unless shapes agree: one batch, one query/key width, 1 or H key and value heads,
    and T ≤ S if the order of positions, or ``segments``, says who sees whom."""
    expect_that(len(q.shape) == 4, f"q must have shape (B, T, H, X), got {tuple(q.shape)}")
    b, t, h, x = q.shape
    s = k.shape[1] if len(k.shape) == 4 else None
    expect("k", k, "(B, S, H or 1, X)", (b, None, 1 if k.shape[-2:-1] == (1,) else h, x))
    expect("v", v, "(B, S, H or 1, V)", (b, s, 1 if v.shape[-2:-1] == (1,) else h, None))
    ordered = causal or segments is not None
    expect_that(
        s is None or (t >= 1 and (t <= s or not ordered)),
        "q must have at least one position and, if causal or with segments, at most as many as "
        f"k, S={s}, got T={t}",
    )
    if key_mask is not None:
        expect_mask("key_mask", key_mask, "(B, S)", (b, s))
    if segments is not None:
        expect("segments", segments, "(B, S)", (b, s))
    expect_some("q", q, "(B, T, H, X)")
    expect_some("v", v, "(B, S, H or 1, V)")


def all_heads(x: Array, heads: int) -> Array:
    """One shared key or value head, seen by every query head."""
    return namespace(x=x).broadcast_to(x, (*x.shape[:2], heads, x.shape[3]))


def sum_heads(dx: Array, x: Array) -> Array:
    """The adjoint of sharing one head: the sum over the heads that used it."""
    if x.shape[2] == dx.shape[2]:
        return dx
    return namespace(dx=dx).sum(dx, axis=2, keepdims=True)  # (attention.10)
