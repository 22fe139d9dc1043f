"""Attention on kernels/attention_numba_cpu.py; as `refimpl.ops.attention`, in memory linear in the
sequence.

A task of the forward is a block of queries of one head, with all the keys that the block may see; a
task of the backward is one head. One key and value head for all queries, as in absorbed MLA, is one
head with H queries per position.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...array import Array, expect
from ...ops.attention import attention_backward as reference_backward
from ...ops.attention import attention_forward as reference_forward
from ...ops.attention import check_attention, sum_heads
from ...ops.choices import BlindQuery
from .compile import kernel
from .host import empty, expect_real, ready
from .pool import blocks_of, run_kernels

__all__ = ["AttentionSaved", "attention_backward", "attention_forward"]

BLOCK = 512  # queries of one task of the forward, which copies keys and values once


class AttentionSaved(NamedTuple):
    """What `attention_forward` keeps for `attention_backward`."""

    q: Array  # [B, T, H, X]
    k: Array  # [B, S, H or 1, X]
    v: Array  # [B, S, H or 1, V]
    o: Array  # [B, T, H, V]
    lse: Array  # [B, heads, rows]: log-sum-exp of each row's scores
    scale: float
    causal: bool
    key_mask: Array | None  # [B, S]
    segments: Array | None  # [B, S]


class Heads(NamedTuple):
    """The arrays with one head each for keys and queries, and who sees what."""

    q: Array  # [B, rows, heads, X]: row r is of position r // per_position
    k: Array  # [B, S, heads, X]
    v: Array  # [B, S, heads, V]
    per_position: int  # rows per position
    behind: int  # S − T, or if not causal so many that every row sees all keys
    key_mask: Array  # bool [B, S]
    segments: Array  # int [B, S]
    masked: bool  # by these two

    def settings(self, b: int) -> tuple[Any, ...]:
        """The kernels' last arguments."""
        masks = int(self.masked), self.key_mask[b], self.segments[b]
        return self.per_position, self.behind, *masks


def heads_of(saved: Any) -> Heads:
    q, k, v = (_rows_without_gaps(x) for x in saved[:3])
    b, t, h, _ = q.shape
    s = k.shape[1]
    behind = s - t if saved.causal else s
    masks = saved.key_mask, saved.segments
    seen = np.ones((b, s), bool) if masks[0] is None else ready(masks[0])
    segments = np.zeros((b, s), np.int64) if masks[1] is None else numbered(masks[1])
    who = behind, seen, segments, any(x is not None for x in masks)
    if k.shape[2] == v.shape[2] == 1:
        return Heads(q.reshape(b, t * h, 1, -1), k, v, h, *who)
    k, v = (np.broadcast_to(x, (*x.shape[:2], h, x.shape[3])) for x in (k, v))
    return Heads(q, k, v, 1, *who)


def numbered(segments: Array) -> Array:
    """``segments`` [B, S] as int64, equal where they are."""
    if segments.dtype.kind not in "iub":
        _, segments = np.unique(segments, return_inverse=True)
    return ready(segments.astype(np.int64))


def _rows_without_gaps(x: Array) -> Array:
    """``x`` […, n], a copy if a row of it has gaps."""
    return x if x.strides[-1] == x.itemsize else ready(x)


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
) -> tuple[Array, Any]:
    """As `refimpl.ops.attention_forward`, by kernels of Numba."""
    if blind != "zero":
        return reference_forward(
            q, k, v, scale=scale, causal=causal, key_mask=key_mask, segments=segments, blind=blind
        )
    expect_real(q=q, k=k, v=v)
    check_attention(q, k, v, causal, key_mask, segments)
    o = empty((*q.shape[:3], v.shape[3]), q)
    saved = AttentionSaved(q, k, v, o, empty((0,), q), float(scale), causal, key_mask, segments)
    heads = heads_of(saved)
    b, rows, h, _ = heads.q.shape
    lse, out = empty((b, h, rows), q), o.reshape(b, rows, h, -1)
    forward, real = kernel("attention", "attention_forward", q.dtype), q.dtype.type(scale)
    blocks = blocks_of(rows, BLOCK)
    tasks = [
        partial(
            forward,
            out[i, :, j],
            lse[i, j],
            *(x[i, :, j] for x in heads[:3]),
            real,
            block.start,
            block.stop,
            *heads.settings(i),
        )
        for block in reversed(blocks)  # the last, which sees most, first
        for i in range(b)
        for j in range(h)
    ]
    run_kernels(tasks)
    return o, saved._replace(lse=lse)


def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
    """As `refimpl.ops.attention_backward`, by kernels of Numba."""
    if not isinstance(saved, AttentionSaved):
        return reference_backward(do, saved)
    q, k, v, o = saved[:4]
    expect_real(q=q, do=do)
    expect("do", do, "(B, T, H, V)", tuple(o.shape))
    heads = heads_of(saved)
    b, rows, h, _ = heads.q.shape
    dq = empty(q.shape, q)
    dk, dv = empty(heads.k.shape, q), empty(heads.v.shape, q)
    do, out, dq_rows = (_rows_without_gaps(x).reshape(b, rows, h, -1) for x in (do, o, dq))
    backward, scale = kernel("attention", "attention_backward", q.dtype), q.dtype.type(saved.scale)
    run_kernels(
        [
            partial(
                backward,
                *(x[i, :, j] for x in (dq_rows, dk, dv, do, out)),
                saved.lse[i, j],
                *(x[i, :, j] for x in heads[:3]),
                scale,
                *heads.settings(i),
            )
            for i in range(b)
            for j in range(h)
        ]
    )
    return dq, sum_heads(dk, k), sum_heads(dv, v)
