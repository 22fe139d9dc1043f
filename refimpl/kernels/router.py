"""The mixture of experts' gate on kernels/router.cu; as `refimpl.ops.router`, and for bfloat16.

The logits are a product of float32 or wider, and weights and scores have that type: which experts
are best is decided before anything is rounded to bfloat16, as in DeepSeek's code.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..array import Array, expect, expect_ids
from ..ops import AnyOp, Op
from ..ops.choices import GroupScore, MaskedGroups, Ranking, Score
from ..ops.router import (
    RouterOutput,
    RouterSaved,
    check_router,
    check_selection,
    select_experts,
    summed_scores,
)
from .host import Kernels, cover, numbers, product, ready
from .launch import Launch

__all__ = ["router"]

WARPS, WARP = 2, 32  # rows of a block, lanes of a row
MOST_SLOTS = 1024  # for scores, of all lanes
PAIRS = 8  # so many numbers NumPy adds in pairs, the kernel one by one


def router(launch: Launch) -> AnyOp:
    """The op on ``launch``, for at most 1024 experts, 32 groups and 32 choices."""
    kernels = Kernels(launch, "router")

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
        n, experts = numbers(x=x, w=w), w.shape[0]
        check_router(x, w, bias, score, ranking, scale, epsilon)
        best = 0
        if routes is None:
            selection = (int(top_k), groups, keep_groups, group_score, masked_groups)
            check_selection(experts, *selection)
            best = summed_scores(group_score, top_k, keep_groups)
            # the kernel ranks scores; rounded, or in another order, they would choose others
            if ranking == "logits" or best >= PAIRS or _is_wider(bias, n.real):
                ranked = (
                    product(x, w.T, n.real)
                    if ranking == "logits"
                    else router_forward(x, w, top_k=top_k, score=score)[0].scores
                )
                routes = select_experts(ranked if bias is None else ranked + bias, *selection)
        indices = kernels.empty((*x.shape[:-1], top_k), n.xp.int64, x)
        if routes is not None:
            expect("routes", routes, "(…, K)", tuple(indices.shape))
            indices = ready(expect_ids("routes", routes, experts))
        # Where nothing is hidden there is one group, with routes as without: a lane's experts, and
        # so the bits of softmax's sum, are the same.
        if not 1 <= keep_groups < groups or experts % groups:
            groups = keep_groups = 1
        slots = _slots(experts, groups, top_k)
        rows = prod(x.shape[:-1])
        x, w = ready(x), ready(w)
        logits = ready(product(x.reshape(-1, x.shape[-1]), w.T, n.real))
        scores = kernels.empty((*x.shape[:-1], experts), n.real, x)
        weights = kernels.empty((*x.shape[:-1], top_k), n.real, x)
        place = n.xp.zeros((experts,), dtype=n.real) if bias is None else ready(bias, n.real)
        kernels(
            "router_forward",
            n.storage,
            cover(rows, WARPS),
            WARP * WARPS,
            scores,
            weights,
            indices,
            logits,
            place,
            np.int64(rows),
            experts,
            top_k,
            groups,
            keep_groups,
            min(best, experts // groups),
            n.scalar(-np.inf if masked_groups == "-inf" else 0),
            int(score == "softmax"),
            int(bool(normalise)),
            n.scalar(scale),
            n.scalar(epsilon),
            int(routes is not None),
            shared=WARPS * (2 * slots + groups) * n.real.itemsize,
        )
        saved = RouterSaved(
            x, w, scores, indices, score, bool(normalise), float(scale), float(epsilon)
        )
        return RouterOutput(weights, scores, indices), saved

    def router_backward(dy: tuple[Array, Array | None], saved: RouterSaved) -> tuple[Array, Array]:
        dweights, dscores = dy
        x, w, s, indices, score, normalise, scale, epsilon = saved
        n = numbers(x=x)
        expect("dweights", dweights, "(…, K)", tuple(indices.shape))
        if dscores is not None:
            expect("dscores", dscores, "(…, E)", tuple(s.shape))
        rows = prod(x.shape[:-1])
        experts, top_k = s.shape[-1], indices.shape[-1]
        dlogits: Any = kernels.empty((rows, experts), n.real, x)
        kernels(
            "router_backward",
            n.storage,
            cover(rows, WARPS),
            WARP * WARPS,
            dlogits,
            ready(dweights, n.real),
            s if dscores is None else ready(dscores, n.real),
            s,
            indices,
            np.int64(rows),
            experts,
            top_k,
            int(score == "softmax"),
            int(normalise),
            n.scalar(scale),
            n.scalar(epsilon),
            int(dscores is not None),
        )
        dx = product(dlogits, w, n.real).astype(x.dtype, copy=False).reshape(x.shape)
        dw = product(dlogits.T, x.reshape(-1, x.shape[-1]), n.real)
        return dx, dw

    return Op(router_forward, router_backward)


def _is_wider(bias: Array | None, real: Any) -> bool:
    """Whether a bias would be rounded, were it added in the type of the scores."""
    return bias is not None and np.result_type(bias.dtype, real) != real


def _slots(experts: int, groups: int, top_k: int) -> int:
    """Slots for a row's scores: as many in each lane, a group in lanes of its own. ValueError if
    that is more than a warp has."""
    lanes = WARP >> (groups - 1).bit_length()  # of a group
    slots = WARP * cover(experts // groups, lanes) if lanes else experts
    if lanes == 0 or slots > MOST_SLOTS or top_k > WARP:
        raise ValueError(
            f"top_k and groups must be at most {WARP}, experts {MOST_SLOTS} (less if groups is not "
            f"a power of two), got {top_k}, {groups} and {experts}"
        )
    return slots
