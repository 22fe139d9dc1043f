"""Multi-token prediction: what goes into an MTP module, h' = M [RMSNorm(embedding);
RMSNorm(hidden)].

Module k joins the previous depth's hidden state at position i with the embedding of token i + k; a
transformer block, a norm of its own and the shared head then predict token i + k + 1. `model` makes
that chain; `mtp_pairs` says which positions and tokens meet. Source: DeepSeek-V3 (2412.19437) eq.
21–25, which print [hidden; embedding]: the released weights expect the embedding first. Derivation:
derivations/mtp.md. Letters: D model; ``…`` any leading dimensions, B batch, T position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, expect, expect_mask, expect_that, last, namespace
from .choices import MTPOrder, expect_choice
from .leaves import LEAVES, Leaves, expect_table

__all__ = ["MTPSaved", "mtp_backward", "mtp_forward", "mtp_pairs"]


class MTPSaved(NamedTuple):
    """What `mtp_forward` keeps for `mtp_backward`."""

    hnorm: Any
    enorm: Any
    proj: Any
    order: MTPOrder
    ops: Leaves


def mtp_forward(
    hidden: Array,
    embedding: Array,
    w_hnorm: Array,
    w_enorm: Array,
    w_proj: Array,
    *,
    eps: float,
    order: MTPOrder = "embedding_hidden",
    ops: Leaves = LEAVES,
) -> tuple[Array, MTPSaved]:
    """h' […, D] from ``hidden`` and ``embedding`` […, D], ``w_hnorm`` and ``w_enorm`` [D],
    ``w_proj`` [D, 2D].

    ``order``: which comes first in front of the projection, ``embedding_hidden`` (the released
    weights) or ``hidden_embedding`` (the paper's eq. 21). ``eps``: of both norms.
    """
    xp, d = namespace(moved=True, hidden=hidden, embedding=embedding), last(hidden, "hidden")
    expect_table(ops, Leaves)
    expect("embedding", embedding, "hidden.shape", tuple(hidden.shape))
    expect("w_proj", w_proj, "(D, 2D)", (d, 2 * d))
    expect_choice("order", order, MTPOrder)
    h, h_saved = ops.rms_norm.forward(hidden, w_hnorm, eps=eps)
    e, e_saved = ops.rms_norm.forward(embedding, w_enorm, eps=eps)
    joined = xp.concat((e, h) if order == "embedding_hidden" else (h, e), axis=-1)  # (mtp.1)
    y, proj_saved = ops.linear.forward(joined, w_proj)  # (mtp.2)
    return y, MTPSaved(h_saved, e_saved, proj_saved, order, ops)


def mtp_backward(dy: Array, saved: MTPSaved) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients (dhidden, dembedding, dw_hnorm, dw_enorm, dw_proj) from ``dy`` […, D]."""
    ops, d = saved.ops, last(dy, "dy")
    djoined, dw_proj = ops.linear.backward(dy, saved.proj)  # (mtp.7)
    first, second = djoined[..., :d], djoined[..., d:]  # (mtp.3)
    de, dh = (first, second) if saved.order == "embedding_hidden" else (second, first)
    dhidden, dw_hnorm = ops.rms_norm.backward(dh, saved.hnorm)  # (mtp.8)
    dembedding, dw_enorm = ops.rms_norm.backward(de, saved.enorm)  # (mtp.8)
    return dhidden, dembedding, dw_hnorm, dw_enorm, dw_proj


def mtp_pairs(
    tokens: Array,
    targets: Array,
    mask: Array,
    depth: int,
    segments: Array | None = None,
    key_mask: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """What module ``depth`` reads and predicts at positions 0 … T−depth−1, from tokens, targets and
    mask [B, T] (bool).

    Returns (tokens, targets, mask, takes part), each [B, T − depth]: at position i token i + depth,
    its target, whether that counts, and whether the position takes part at all: with ``segments``
    [B, T] only if it and token i + depth lie in one document, with ``key_mask`` [B, T] only if
    neither is padding. None: all take part.

    >>> import numpy as np
    >>> tokens, targets = np.array([[5, 6, 7]]), np.array([[6, 7, 8]])
    >>> read, predicted, *_ = mtp_pairs(tokens, targets, np.ones((1, 3), bool), 1)
    >>> read.tolist(), predicted.tolist()
    ([[6, 7]], [[7, 8]])
    """
    length = tokens.shape[1] - depth
    expect_that(
        depth >= 1 and length >= 1, f"depth must lie in 1…T−1={tokens.shape[1] - 1}, got {depth}"
    )
    expect("targets", targets, "(B, T)", tuple(tokens.shape))
    expect_mask("mask", mask, "(B, T)", tuple(tokens.shape))
    if segments is not None:
        expect("segments", segments, "(B, T)", tuple(tokens.shape))
    takes_part = None
    if key_mask is not None:
        expect_mask("key_mask", key_mask, "(B, T)", tuple(tokens.shape))
        takes_part = key_mask[:, :length] & key_mask[:, depth:]
    if segments is not None:
        one_document = segments[:, :length] == segments[:, depth:]
        takes_part = one_document if takes_part is None else takes_part & one_document
    later = mask[:, depth:] if takes_part is None else mask[:, depth:] & takes_part
    return tokens[:, depth:], targets[:, depth:], later, takes_part  # (mtp.4)
