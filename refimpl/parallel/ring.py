"""Attention over sequences that are cut into pieces, one on each rank of a ring.

Blocks of keys and values travel around the ring; at each stop a rank's queries attend to the block
that is there, and the parts are put together by their log-sum-exps, as `flash_attention` puts its
blocks together. The backward sends the blocks around again, and with each its gradient, which is
whole when it comes home. No rank ever holds all keys. Derivation: derivations/parallel.md. Letters
as in attention.py; T are this rank's positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, library, zeros
from ..ops import Op, Ops, flash_attention_backward, flash_attention_forward
from ..ops.flash_attention import FlashAttentionSaved
from ..splits import counting_together
from .group import Group

__all__ = ["ring", "together"]


class Block(NamedTuple):
    """The keys and values of a rank, on their way."""

    k: Array  # [B, S, H or 1, X]
    v: Array  # [B, S, H or 1, V]
    key_mask: Array | None  # [B, S]
    segments: Array | None  # [B, S]


class Saved(NamedTuple):
    own: Block
    whole: FlashAttentionSaved  # of this rank's block, with the output and log-sum-exp of all


def ring(ops: Ops, group: Group) -> Ops:
    """The table for one piece of every sequence, the ``group.rank``-th: attention sees the pieces
    before it, and the balance loss counts whole sequences."""
    seen = group.rank + 1  # at the first stops: a query sees no later piece

    def attention_forward(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float,
        key_mask: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, Saved]:
        own = block = Block(k, v, key_mask, segments)
        parts, log_sums = [], []
        for stop in range(group.size):
            if stop < seen:
                keys, values, told = _at_stop(q, block, own)
                _, part = flash_attention_forward(q, keys, values, scale=scale, **told)
                parts.append(part)
                log_sums.append(_where_seen(part.lse, q, keys, told))
            if stop < group.size - 1:
                block = group.rotate(block)
        o, lse = together([part.o for part in parts], log_sums)
        return o, Saved(own, parts[0]._replace(o=o, lse=lse))

    def attention_backward(do: Array, saved: Saved) -> tuple[Array, Array, Array]:
        own, whole = saved
        q, block = whole.q, own
        dq, dk, dv = (zeros(x.shape, q) for x in (q, own.k, own.v))
        for stop in range(group.size):
            if stop < seen:
                keys, values, told = _at_stop(q, block, own)
                at_stop = whole._replace(k=keys, v=values, **told)
                dq_stop, dk_stop, dv_stop = flash_attention_backward(do, at_stop)
                length = block.k.shape[1]
                dq = dq + dq_stop
                dk, dv = dk + dk_stop[:, :length], dv + dv_stop[:, :length]  # (parallel.5)
            block, dk, dv = group.rotate((block, dk, dv))
        return dq, dk, dv

    return counting_together(ops, group) | {"attention": Op(attention_forward, attention_backward)}


def _at_stop(q: Array, block: Block, own: Block) -> tuple[Array, Array, dict[str, Any]]:
    """Keys, values and settings of `flash_attention` for the queries of one piece and a block:
    their own, or an earlier one.

    `flash_attention` reads the documents of the queries from the last T keys. So with documents the
    rank's own keys stand behind an earlier block, hidden.
    """
    k, v, key_mask, segments = block
    if block is own:
        return k, v, {"causal": True, "key_mask": key_mask, "segments": segments}
    if own.segments is None:
        return k, v, {"causal": False, "key_mask": key_mask, "segments": None}
    xp = library(q)
    shown = xp.ones(k.shape[:2], dtype=xp.bool, device=q.device) if key_mask is None else key_mask
    hidden = xp.zeros(own.k.shape[:2], dtype=xp.bool, device=q.device)
    pairs = ((k, own.k), (v, own.v), (shown, hidden), (segments, own.segments))
    k, v, mask, documents = (xp.concat(pair, axis=1) for pair in pairs)
    return k, v, {"causal": False, "key_mask": mask, "segments": documents}


def _where_seen(lse: Array, q: Array, k: Array, told: dict[str, Any]) -> Array:
    """The log-sum-exps, −∞ for queries that see no key of the block: those to whom equal scores
    over values of 1 do not give 1."""
    xp = library(q)
    ones = xp.ones_like(k[:, :, :1, :1])
    seen, _ = flash_attention_forward(q[:, :, :1, :1], k[:, :, :1, :1], ones, scale=0.0, **told)
    return xp.where(xp.permute_dims(seen > 0.5, (0, 2, 1, 3)), lse, -xp.inf)


def together(outs: list[Array], log_sums: list[Array]) -> tuple[Array, Array]:
    """The outputs [B, T, H, V] over all blocks, from those over each and their log-sum-exps
    [B, H, T, 1], −∞ where a query sees nothing; and the log-sum-exp of all. A query that sees no
    key at all has 0 and 0."""
    xp, lse = library(outs[0]), log_sums[0]
    for one in log_sums[1:]:
        lse = xp.logaddexp(lse, one)  # (parallel.3)
    lse = xp.where(xp.isfinite(lse), lse, 0.0)
    o = zeros(outs[0].shape, outs[0])
    for out, one in zip(outs, log_sums, strict=True):
        share = xp.permute_dims(xp.exp(one - lse), (0, 2, 1, 3))
        o = o + share * out  # (parallel.4)
    return o, lse
