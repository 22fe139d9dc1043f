"""Attention on kernels/attention_numba_cpu.py; as `refimpl.ops.attention`, in memory linear in the
sequence.

A task of the forward is a block of queries of one head, with all the keys that the block may see; a
task of the backward is one head, block by block of keys, so that dk and dv are done with each block
and dq alone is added up. One key and value head for all queries, as in absorbed MLA, is one head
with H queries per position: its products are H times as tall.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...array import Array, expect
from ...ops.attention import attention_backward as reference_backward
from ...ops.attention import attention_forward as reference_forward
from ...ops.attention import check_attention, sum_heads, visible
from ...ops.choices import BlindQuery
from .compile import kernel
from .host import empty, expect_real
from .pool import blocks_of, run

__all__ = ["AttentionSaved", "attention_backward", "attention_forward"]

BLOCK = 128  # queries, in the backward keys: enough for full speed of the products
KEYS = 4096  # whose values one product adds up: BLAS has running sums


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

    q: Array  # [B, rows, heads, X]: row r is of position r // each
    k: Array  # [B, S, heads, X]
    v: Array  # [B, S, heads, V]
    each: int  # rows per position
    behind: int  # S − T, or if not causal so many that every row sees all keys
    saved: Any  # whose masks hide keys

    def visible(self, b: int, rows: slice, keys: slice) -> Array | None:
        """bool [rows, keys], which rows see which keys, by the masks; None without masks."""
        s = self.saved
        if s.key_mask is None and s.segments is None:
            return None
        first, last = rows.start // self.each, rows.stop // self.each
        masks = [None if x is None else x[b : b + 1] for x in (s.key_mask, s.segments)]
        seen = visible((first, last), (keys.start, keys.stop), s.q, s.k, s.causal, *masks)[0, 0]
        return np.repeat(
            np.broadcast_to(seen, (last - first, keys.stop - keys.start)), self.each, 0
        )


def heads_of(saved: Any) -> Heads:
    q, k, v = saved[:3]
    b, t, h, _ = q.shape
    behind = k.shape[1] - t if saved.causal else k.shape[1]
    if k.shape[2] == v.shape[2] == 1:
        return Heads(q.reshape(b, t * h, 1, -1), k, v, h, behind, saved)
    k, v = (np.broadcast_to(x, (*x.shape[:2], h, x.shape[3])) for x in (k, v))
    return Heads(q, k, v, 1, behind, saved)


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
    lse = empty((b, h, rows), q)
    out = o.reshape(b, rows, h, -1)
    positions = blocks_of(q.shape[1], max(1, BLOCK // heads.each))
    tasks = [
        partial(_forward_block, heads, out, lse, i, j, block)
        for block in reversed(positions)  # the last, which sees most, first
        for i in range(b)
        for j in range(h)
    ]
    run(tasks)
    return o, saved._replace(lse=lse)


def _forward_block(heads: Heads, out: Array, lse: Array, b: int, h: int, positions: slice) -> None:
    softmax, each = kernel("attention", "softmax_forward", out.dtype), heads.each
    rows = slice(positions.start * each, positions.stop * each)
    keys = slice(0, min(heads.k.shape[1], heads.behind + positions.stop))
    scores = heads.q[b, rows, h] @ heads.k[b, keys, h].T
    scores *= heads.saved.scale
    seen = np.ones(scores.shape[0], bool)
    mask = heads.visible(b, rows, keys)
    if mask is not None:
        kernel("attention", "hide", out.dtype)(scores, mask)
        seen = mask.any(axis=1)
    total = np.empty(scores.shape[0], out.dtype)
    first = heads.behind + positions.start
    softmax(scores, total, lse[b, h, rows], seen, first, each)
    o = out[b, rows, h]
    v = heads.v[b, keys, h]
    begin, *others = blocks_of(v.shape[0], KEYS)
    np.matmul(scores[:, begin], v[begin], out=o)  # (flash_attention.3)
    for some in others:
        o += scores[:, some] @ v[some]
    np.divide(o, total[:, None], out=o)


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
    do, out, dq_rows = (x.reshape(b, rows, h, -1) for x in (do, o, dq))
    heads_and_gradients = heads, do, out, dq_rows, dk, dv
    run([partial(_backward_head, *heads_and_gradients, i, j) for i in range(b) for j in range(h)])
    return dq, sum_heads(dk, k), sum_heads(dv, v)


def _backward_head(
    heads: Heads, do: Array, o: Array, dq: Array, dk: Array, dv: Array, b: int, h: int
) -> None:
    saved, each = heads.saved, heads.each
    softmax = kernel("attention", "softmax_backward", dq.dtype)
    row_sum = np.einsum("tv,tv->t", do[b, :, h], o[b, :, h])  # (flash_attention.5)
    dq[b, :, h] = 0
    for keys in blocks_of(heads.k.shape[1], BLOCK):
        start = max(0, keys.start - heads.behind)  # the first position that sees one of them
        rows = slice(min(start * each, dq.shape[1]), dq.shape[1])
        q_rows, k_block = heads.q[b, rows, h], heads.k[b, keys, h]
        do_rows = do[b, rows, h]
        p = k_block @ q_rows.T
        p *= saved.scale
        dp = heads.v[b, keys, h] @ do_rows.T
        mask = heads.visible(b, rows, keys)
        if mask is not None:
            kernel("attention", "hide", dq.dtype)(p, np.ascontiguousarray(mask.T))
        first = keys.start - heads.behind - start
        softmax(p, dp, saved.lse[b, h, rows], row_sum[rows], first, each)
        np.matmul(p, do_rows, out=dv[b, keys, h])
        dp *= saved.scale
        np.matmul(dp, q_rows, out=dk[b, keys, h])
        dq[b, rows, h] += dp.T @ k_block  # (flash_attention.8)
