"""The pairwise preference loss of a reward model: −mean ln σ(reward(chosen) − reward(rejected)),
with its linear head.

The Bradley–Terry model of R1's helpfulness reward (DeepSeek-R1, 2501.12948, the second stage): the
reward of an answer is one number read off its last hidden state, and the better answer should have
the higher one. Derivation: derivations/preference_loss.md. Letters: N pairs, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import Array, expect, expect_some, fill, finite, namespace, number, real, sigmoid

__all__ = ["PreferenceLossSaved", "preference_loss_backward", "preference_loss_forward"]


class PreferenceLossSaved(NamedTuple):
    """What `preference_loss_forward` keeps for `preference_loss_backward`."""

    h_chosen: Array  # [N, D]
    h_rejected: Array  # [N, D]
    w: Array  # [1, D]
    margin: Array  # [N, 1]: how much higher the chosen answer's reward is


def preference_loss_forward(
    h_chosen: Array, h_rejected: Array, w: Array
) -> tuple[Array, PreferenceLossSaved]:
    """The scalar loss of pairs whose last hidden states are ``h_chosen`` and ``h_rejected`` [N, D],
    head ``w`` [1, D].

    Rewards are h wᵀ; a bias would cancel in their difference. ln σ is taken without overflow on
    either side.
    """
    xp = namespace(h_chosen=h_chosen, h_rejected=h_rejected, w=w)
    expect("h_chosen", h_chosen, "(N, D)", (None, None))
    expect("h_rejected", h_rejected, "(N, D)", tuple(h_chosen.shape))
    expect("w", w, "(1, D)", (1, h_chosen.shape[1]))
    expect_some("h_chosen", h_chosen, "(N, D)")
    margin = finite(xp.matmul(h_chosen - h_rejected, xp.matrix_transpose(w)))  # (preference_loss.1)
    negative = fill(real(margin) < 0, margin, 0.0)
    size = xp.where(real(margin) < 0, -margin, margin)
    loss = xp.log1p(xp.exp(-size)) - negative  # (preference_loss.2)
    return xp.sum(loss) / h_chosen.shape[0], PreferenceLossSaved(h_chosen, h_rejected, w, margin)


def preference_loss_backward(
    dloss: Array, saved: PreferenceLossSaved
) -> tuple[Array, Array, Array]:
    """Gradients (dh_chosen [N, D], dh_rejected [N, D], dw [1, D]) from the scalar ``dloss``."""
    h_chosen, h_rejected, w, margin = saved
    xp = namespace(margin=margin)
    dmargin = -number(dloss, margin) * sigmoid(-margin) / margin.shape[0]  # (preference_loss.3)
    dh = dmargin * w  # (preference_loss.4)
    dw = xp.matmul(xp.matrix_transpose(dmargin), h_chosen - h_rejected)  # (preference_loss.5)
    return dh, -dh, dw  # (preference_loss.4)
