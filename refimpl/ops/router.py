"""The mixture-of-experts gate: scores, biased and group-limited selection, normalised weights; and
its bias update.

The selection is not differentiable: indices are constants of the backward, and the bias gets no
gradient; it is moved by `bias_update` instead. Sources: DeepSeek-V3 (2412.19437) eq. 12–16;
DeepSeek-V2 (2405.04434) section 2.2 for the groups. Derivation: derivations/router.md. Letters: D
model, E experts, K top-k, G groups; ``…`` any leading dimensions.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from ..array import (
    Array,
    argsort,
    expect,
    expect_ids,
    expect_mask,
    expect_some,
    expect_that,
    last,
    library,
    namespace,
    real,
    sigmoid,
    zeros,
)
from .choices import GroupScore, MaskedGroups, Ranking, Score, expect_choice

__all__ = [
    "RouterOutput",
    "RouterSaved",
    "bias_update",
    "check_selection",
    "expert_load",
    "router_backward",
    "router_forward",
    "scores_backward",
    "select_experts",
    "summed_scores",
]


class RouterOutput(NamedTuple):
    """What `router_forward` returns beside `RouterSaved`."""

    weights: Array  # […, K]: what the chosen experts' outputs are multiplied with
    scores: Array  # […, E]: unbiased, for the balance loss
    indices: Array  # […, K] integers: the chosen experts, best first


class RouterSaved(NamedTuple):
    """What `router_forward` keeps for `router_backward`."""

    x: Array  # […, D]
    w: Array  # [E, D]
    scores: Array  # […, E]: the derivative of sigmoid and softmax is made of their values
    indices: Array  # […, K]
    score: Score
    normalise: bool
    scale: float
    epsilon: float


def router_forward(
    x: Array,
    w: Array,
    *,
    top_k: int,
    bias: Array | None = None,
    groups: int = 1,
    keep_groups: int = 1,
    group_score: GroupScore = "top2",
    score: Score = "sigmoid",
    normalise: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    masked_groups: MaskedGroups = "-inf",
    ranking: Ranking = "scores",
    routes: Array | None = None,
) -> tuple[RouterOutput, RouterSaved]:
    """Choose ``top_k`` of E experts for each row of ``x`` […, D] with the gate ``w`` [E, D].

    Args:
        bias: [E], added to the scores for the selection alone.
        groups, keep_groups, group_score, masked_groups: as in `select_experts`.
        score: ``sigmoid`` (V3) or ``softmax`` (V2).
        normalise: divide the chosen scores by their sum + ``epsilon`` (V3); V2 does not.
        scale: multiplies the weights (routed_scaling_factor).
        ranking: what the selection ranks, and the bias is added to: ``scores`` or ``logits``. The
            order of a row's experts is the same; sums over groups, and those with a bias, are not.
        routes: […, K] integers to use instead of a selection: replay of another run's or
            implementation's choice.

    Returns RouterOutput(weights […, K], scores […, E], indices […, K]).
    """
    xp = namespace(x=x, w=w)
    scale, epsilon = float(scale), float(epsilon)
    check_router(x, w, bias, score, ranking, scale, epsilon)
    logits = xp.matmul(x, xp.matrix_transpose(w))  # (router.1)
    if score == "sigmoid":
        scores = sigmoid(logits)  # (router.2)
    else:
        e = xp.exp(logits - xp.max(real(logits), axis=-1, keepdims=True))
        scores = e / xp.sum(e, axis=-1, keepdims=True)  # (router.3)
    if routes is None:
        ranked = real(scores if ranking == "scores" else logits)
        biased = ranked if bias is None else ranked + bias  # (router.4)
        indices = select_experts(biased, top_k, groups, keep_groups, group_score, masked_groups)
    else:
        expect("routes", routes, "(…, K)", (*x.shape[:-1], top_k))
        indices = expect_ids("routes", routes, w.shape[0])
    chosen = xp.take_along_axis(scores, indices, axis=-1)
    total = xp.sum(chosen, axis=-1, keepdims=True) + epsilon if normalise else 1
    weights = scale * chosen / total  # (router.6)
    saved = RouterSaved(x, w, scores, indices, score, normalise, scale, epsilon)
    return RouterOutput(weights, scores, indices), saved


def router_backward(dy: tuple[Array, Array | None], saved: RouterSaved) -> tuple[Array, Array]:
    """Gradients (dx […, D], dw [E, D]) from (dweights […, K], dscores […, E] or None)."""
    x, w, s = saved[:3]
    xp = namespace(dweights=dy[0], x=x)
    ds = scores_backward(dy, saved)
    if saved.score == "sigmoid":
        dlogits = ds * s * (1 - s)  # (router.9)
    else:
        dlogits = s * (ds - xp.sum(ds * s, axis=-1, keepdims=True))  # (router.10)
    rows = xp.reshape(dlogits, (-1, s.shape[-1]))
    dx = xp.matmul(dlogits, w)  # (router.11)
    dw = xp.matmul(xp.matrix_transpose(rows), xp.reshape(x, (-1, x.shape[-1])))  # (router.11)
    return dx, dw


def scores_backward(dy: tuple[Array, Array | None], saved: RouterSaved) -> Array:
    """The scores' whole gradient […, E], by way of the weights and their own: from the same as
    `router_backward`."""
    dweights, dscores = dy
    s, indices = saved.scores, saved.indices
    xp = namespace(dweights=dweights, scores=s)
    expect("dweights", dweights, "(…, K)", tuple(indices.shape))
    if dscores is not None:
        expect("dscores", dscores, "(…, E)", tuple(s.shape))
    dchosen = saved.scale * dweights
    if saved.normalise:
        chosen = xp.take_along_axis(s, indices, axis=-1)
        total = xp.sum(chosen, axis=-1, keepdims=True) + saved.epsilon
        mean = xp.sum(dchosen * chosen, axis=-1, keepdims=True) / total
        dchosen = (dchosen - mean) / total  # (router.7)
    ds = zeros(s.shape, s) if dscores is None else dscores
    expert = xp.arange(s.shape[-1], device=s.device)
    for k in range(indices.shape[-1]):  # a row's indices differ, so each adds to its own place
        is_chosen = expert == indices[..., k : k + 1]
        ds = xp.where(is_chosen, ds + dchosen[..., k : k + 1], ds)  # (router.8)
    return ds


def check_router(
    x: Array,
    w: Array,
    bias: Array | None,
    score: Score,
    ranking: Ranking,
    scale: float,
    epsilon: float,
) -> None:
    """ValueError unless what `router_forward` is given fits together."""
    expect("w", w, "(E, D)", (None, last(x, "x")))
    expect_some("w", w, "(E, D)")
    expect_that(
        isfinite(scale) and isfinite(epsilon) and epsilon >= 0,
        f"scale must be a finite number and epsilon one of at least 0, got {scale} and {epsilon}",
    )
    expect_choice("score", score, Score)
    expect_choice("ranking", ranking, Ranking)
    if bias is not None:
        expect("bias", bias, "(E,)", (w.shape[0],))


def select_experts(
    biased: Array,
    top_k: int,
    groups: int = 1,
    keep_groups: int = 1,
    group_score: GroupScore = "top2",
    masked_groups: MaskedGroups = "-inf",
) -> Array:
    """Indices […, K] of the ``top_k`` best experts, best first; equal scores go to the lower index.

    Args:
        biased: […, E] real scores, with the bias.
        groups, keep_groups: experts form ``groups`` equal groups in order; only the best
            ``keep_groups`` take part.
        group_score: the sum of a group's best: ``top2`` two (V3's code), ``share`` K / keep_groups
            of them (V3's paper), ``max`` one (V2).
        masked_groups: ``-inf`` hides the other groups; ``zero`` sets their scores to 0: an expert
            with a negative biased score then loses to a hidden one.
    """
    xp, experts = namespace(biased=biased), biased.shape[-1]
    check_selection(experts, top_k, groups, keep_groups, group_score, masked_groups)
    if keep_groups < groups:
        grouped = xp.reshape(biased, (*biased.shape[:-1], groups, experts // groups))
        best = -xp.sort(-grouped, axis=-1)[..., : summed_scores(group_score, top_k, keep_groups)]
        kept = argsort(-xp.sum(best, axis=-1))[..., :keep_groups]
        group = xp.arange(groups, device=biased.device)[:, None]
        is_kept = xp.any(group == kept[..., None, :], axis=-1)
        hidden = -xp.inf if masked_groups == "-inf" else 0.0
        masked = xp.where(is_kept[..., None], grouped, hidden)  # (router.5)
        biased = xp.reshape(masked, biased.shape)
    return argsort(-biased)[..., :top_k]


def summed_scores(group_score: GroupScore, top_k: int, keep_groups: int) -> int:
    """How many of a group's best scores are summed to the group's own."""
    return {"top2": 2, "share": top_k // keep_groups, "max": 1}[group_score]


def check_selection(
    experts: int,
    top_k: int,
    groups: int,
    keep_groups: int,
    group_score: GroupScore,
    masked_groups: MaskedGroups,
) -> None:
    """ValueError for settings of `select_experts` without a meaning."""
    expect_that(
        groups >= 1 and experts % groups == 0 and 1 <= keep_groups <= groups,
        f"groups must divide E={experts}, keep_groups lie in 1…groups, got {groups}, {keep_groups}",
    )
    expect_choice("group_score", group_score, GroupScore)
    expect_choice("masked_groups", masked_groups, MaskedGroups)
    available = experts // groups * keep_groups
    expect_that(
        1 <= top_k <= available, f"top_k must lie in 1…{available} (kept experts), got {top_k}"
    )
    expect_that(
        summed_scores(group_score, top_k, keep_groups) >= 1,
        f"top_k must be at least keep_groups={keep_groups} for group_score='share', got {top_k}",
    )


def expert_load(indices: Array, experts: int, mask: Array | None = None) -> Array:
    """How many tokens chose each of the ``experts``: integers [E] from ``indices`` […, K]; ``mask``
    […] False drops a token."""
    xp = library(indices, "indices")
    indices = expect_ids("indices", indices, experts)
    if mask is not None:
        expect_mask("mask", mask, "(…)", tuple(indices.shape[:-1]))
        indices = xp.where(mask[..., None], indices, experts)
    expert = xp.arange(experts, device=indices.device)
    in_order = xp.sort(xp.reshape(indices, (-1,)))
    stop = xp.searchsorted(in_order, expert, side="right")
    return stop - xp.searchsorted(in_order, expert, side="left")


def bias_update(bias: Array, load: Array, gamma: float, *, centre: bool = False) -> Array:
    """The ``bias`` [E] after a step: up by ``gamma`` for experts below the mean load, down above
    (V3 section 2.1.2).

    ``load`` [E] counts the whole batch, once (a recomputed forward must not count twice).
    ``centre`` subtracts the mean change.

    >>> import numpy as np
    >>> bias_update(np.zeros(3), np.array([4, 2, 0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    xp = namespace(bias=bias)
    expect("load", load, "(E,)", tuple(bias.shape))
    load = xp.astype(load, bias.dtype)
    change = float(gamma) * xp.sign(xp.mean(load) - load)  # (router.12)
    return bias + (change - xp.mean(change) if centre else change)
