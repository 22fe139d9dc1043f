"""Output head and masked cross-entropy in one: the training loss, without the [tokens, vocabulary]
logits.

Derivation: derivations/head_cross_entropy.md. Letters: D model, W vocabulary; ``…`` any leading
dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, expect, expect_some, last, namespace, number
from .cross_entropy import token_weights
from .leaves import LEAVES, Leaves, expect_table

__all__ = ["HeadCrossEntropySaved", "head_cross_entropy_backward", "head_cross_entropy_forward"]


class HeadCrossEntropySaved(NamedTuple):
    """What `head_cross_entropy_forward` keeps for `head_cross_entropy_backward`."""

    log_prob: Any
    weight: Array  # […]: mask / normaliser
    ops: Leaves


def head_cross_entropy_forward(
    h: Array,
    w: Array,
    *,
    targets: Array,
    mask: Array | None = None,
    normaliser: float | None = None,
    block: tuple[int, int] = (256, 4096),
    ops: Leaves = LEAVES,
) -> tuple[Array, HeadCrossEntropySaved]:
    """The scalar loss of ``targets`` […] for hidden states ``h`` […, D] and the head ``w`` [W, D].

    Equal to `cross_entropy_forward` of the logits h wᵀ; ``mask`` […] and normaliser as there, block
    as in `log_prob_forward`.
    """
    xp = namespace(moved=True, h=h, w=w)
    expect_table(ops, Leaves)
    expect_some("w", w, "(W, D)")
    last(h, "h")
    expect("targets", targets, "(…)", tuple(h.shape[:-1]))
    counts = None if mask is None else xp.astype(mask, xp.bool)
    log_p, saved = ops.log_prob.forward(h, w, targets=targets, mask=counts, block=block)
    _, weight = token_weights(log_p, targets, mask, normaliser, w.shape[0])
    loss = -xp.sum(weight * log_p)  # (head_cross_entropy.1)
    return loss, HeadCrossEntropySaved(saved, weight, ops)


def head_cross_entropy_backward(dloss: Array, saved: HeadCrossEntropySaved) -> tuple[Array, Array]:
    """Gradients (dh […, D], dw [W, D]) from the scalar ``dloss``."""
    dlog_p = -number(dloss, saved.weight) * saved.weight  # (head_cross_entropy.2)
    return saved.ops.log_prob.backward(dlog_p, saved.log_prob)  # (head_cross_entropy.3)
