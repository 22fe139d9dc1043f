"""The sequence-wise balance loss of DeepSeek-V3: α Σ_i f_i P_i for each sequence, averaged over the
batch.

f_i counts how often expert i is among a token's K best (a constant), P_i is the mean of its
normalised score. Source: DeepSeek-V3 (2412.19437) eq. 17–20 (our E is their N_r, K their K_r).
Derivation: derivations/balance_loss.md. Letters: B batch, T position, E experts, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import (
    Array,
    argsort,
    cast,
    expect,
    expect_ids,
    expect_mask,
    expect_some,
    expect_that,
    fill,
    finite,
    library,
    namespace,
    number,
    real,
)

__all__ = ["BalanceLossSaved", "balance_loss_backward", "balance_loss_forward", "count_choices"]


class BalanceLossSaved(NamedTuple):
    """What `balance_loss_forward` keeps for `balance_loss_backward`."""

    scores: Array  # [B, T, E], 1 at padding
    f: Array  # [B, 1, E]: E/(K T) times the counts, constant
    weight: Array  # [B, T, 1]: α / (B T) for each token that takes part, else 0


def balance_loss_forward(
    scores: Array,
    *,
    alpha: float,
    top_k: int,
    counted: Array | None = None,
    mask: Array | None = None,
    sequences: float | None = None,
    cut: tuple[Array, Array] | None = None,
) -> tuple[Array, BalanceLossSaved]:
    """The scalar loss for unbiased ``scores`` [B, T, E], positive in every row.

    Args:
        alpha, top_k: α (1e-4 in V3) and K.
        counted: [B, T, K'] integers in 0 … E − 1, the choices that f counts; by default, as the
            paper prints, the K best of the *unbiased and ungrouped* scores. Where the routed
            experts are counted, give those.
        mask: [B, T] bool, False for padding, whatever stands there, NaN included; a sequence of
            padding alone adds 0.
        sequences: how many the average is over, if these are a part of the batch; by default B.
        cut: if these are parts of sequences, of each whole one how often every expert is counted
            [B, E], and how many tokens take part [B]: the sums of `count_choices` over its parts.
    """
    xp = namespace(scores=scores)
    expect("scores", scores, "(B, T, E)", (None, None, None))
    expect_some("scores", scores, "(B, T, E)")
    b, t, e = scores.shape
    expect_that(1 <= top_k <= e, f"top_k must lie in 1…E={e}, got {top_k}")
    if mask is not None:
        expect_mask("mask", mask, "(B, T)", (b, t))
    if counted is not None:
        expect("counted", counted, "(B, T, K')", (b, t, None))
        counted = expect_ids("counted", counted, e)
    else:
        counted = argsort(-real(scores))[..., :top_k]  # (balance_loss.1)
    valid = xp.ones((b, t, 1), dtype=xp.bool, device=scores.device)
    if mask is not None:
        valid = mask[:, :, None]
        scores = fill(valid, scores, 1.0)  # what stands at padding, NaN included, does not count
    counts, length = count_choices(counted, e, valid) if cut is None else cut
    expect("cut", counts, "(B, E)", (b, e))
    expect("cut", length, "(B,)", (b,))
    counts, length = counts[:, None, :], xp.where(length > 0, length, 1.0)[:, None, None]
    f = cast(counts * e / (top_k * length), scores)  # (balance_loss.2)
    weight = cast(xp.where(valid, alpha / ((sequences or b) * length), 0.0), scores)
    total = finite(xp.sum(scores, axis=-1, keepdims=True))
    normalised = scores / total  # (balance_loss.3)
    return xp.sum(weight * f * normalised), BalanceLossSaved(scores, f, weight)  # (balance_loss.4)


def count_choices(counted: Array, experts: int, valid: Array) -> tuple[Array, Array]:
    """Of each sequence how often every expert is among ``counted`` [B, T, K'], and how many tokens
    are ``valid`` [B, T, 1] (bool): [B, E] and [B]."""
    xp, expert = library(valid), library(valid).arange(experts, device=valid.device)
    counts = 0
    for k in range(counted.shape[-1]):
        counts_k = (counted[..., k : k + 1] == expert) & valid
        counts = counts + xp.sum(xp.astype(counts_k, xp.float64), axis=1)
    return counts, xp.sum(xp.astype(valid[:, :, 0], xp.float64), axis=1)


def balance_loss_backward(dloss: Array, saved: BalanceLossSaved) -> Array:
    """Gradient dscores [B, T, E] from the scalar ``dloss``."""
    scores, f, weight = saved
    xp = namespace(scores=scores)
    total = finite(xp.sum(scores, axis=-1, keepdims=True))
    mean_f = xp.sum(f * scores, axis=-1, keepdims=True) / total
    return number(dloss, scores) * weight * (f - mean_f) / total  # (balance_loss.5)
