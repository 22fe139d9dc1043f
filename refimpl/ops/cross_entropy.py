"""Masked cross-entropy of given logits: −Σ_t mask_t log softmax(logits_t)[target_t] / normaliser.

For training, `head_cross_entropy` does the same from the hidden states without ever holding all
logits. Derivation: derivations/cross_entropy.md. Letters: W vocabulary; ``…`` any leading
dimensions.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from ..array import (
    Array,
    cast,
    expect,
    expect_ids,
    expect_that,
    fill,
    last,
    namespace,
    number,
    real,
)

__all__ = ["CrossEntropySaved", "cross_entropy_backward", "cross_entropy_forward"]


class CrossEntropySaved(NamedTuple):
    """What `cross_entropy_forward` keeps for `cross_entropy_backward`."""

    p: Array  # […, W]: probabilities, 1/W for a token that is left out
    targets: Array  # […] integers
    weight: Array  # […]: mask / normaliser


def cross_entropy_forward(
    logits: Array, *, targets: Array, mask: Array | None = None, normaliser: float | None = None
) -> tuple[Array, CrossEntropySaved]:
    """The scalar mean negative log-likelihood of ``targets`` […] under ``logits`` […, W].

    Args:
        mask: […] bool or finite weights; 0 leaves a token out (its target may then be anything,
            −100 included, and so may its logits, NaN included).
        normaliser: what the sum is divided by, finite and not 0; by default Σ mask, and the loss is
            0 if nothing counts.
    """
    xp = namespace(logits=logits)
    vocabulary = last(logits, "logits")
    expect("targets", targets, "(…)", tuple(logits.shape[:-1]))
    targets, weight = token_weights(logits, targets, mask, normaliser, vocabulary)
    shifted = logits - cast(xp.max(real(logits), axis=-1, keepdims=True), logits)
    shifted = fill((real(weight) != 0)[..., None], shifted, 0.0)  # masked: absent, NaN included
    e = xp.exp(shifted)
    total = xp.sum(e, axis=-1, keepdims=True)
    target = xp.take_along_axis(shifted, targets[..., None], axis=-1)
    log_p = (target - xp.log(total))[..., 0]  # (cross_entropy.1)
    loss = -xp.sum(weight * log_p)  # (cross_entropy.2)
    return loss, CrossEntropySaved(e / total, targets, weight)


def cross_entropy_backward(dloss: Array, saved: CrossEntropySaved) -> Array:
    """Gradient dlogits […, W] from the scalar ``dloss``."""
    p, targets, weight = saved
    xp = namespace(p=p)
    chosen = xp.arange(p.shape[-1], device=p.device) == targets[..., None]
    return number(dloss, p) * weight[..., None] * (p - cast(chosen, p))  # (cross_entropy.3)


def token_weights(
    like: Array, targets: Array, mask: Array | None, normaliser: float | None, vocabulary: int
) -> tuple[Array, Array]:
    """Targets with 0 where the mask is 0, and mask / normaliser in the number type of ``like``."""
    xp = namespace(like=like)
    weight = xp.ones(targets.shape, dtype=xp.float64, device=like.device)
    if mask is not None:
        expect("mask", mask, "(…)", tuple(targets.shape))
        weight = xp.astype(mask, xp.float64)
    total = float(xp.sum(weight))
    expect_that(isfinite(total), f"mask must be finite, got a sum of {total}")
    targets = xp.where(weight != 0, targets, 0)
    targets = expect_ids("targets", targets, vocabulary)
    count = total if normaliser is None else float(normaliser)
    expect_that(isfinite(count), f"normaliser must be finite, got {count}")
    expect_that(
        count != 0 or (normaliser is None and not bool(xp.any(weight != 0))),
        "normaliser, or the sum of a mask that is not all 0, must not be 0, got 0",
    )
    return targets, cast(weight, like) / (count or 1.0)
