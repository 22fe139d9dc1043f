"""The gate on kernels/router_numba_cpu.py; as `refimpl.ops.router`.

Where some groups are left out, the selection is the reference's.
"""

from __future__ import annotations

import numpy as np

from ...array import Array, expect, expect_ids
from ...ops.choices import GroupScore, MaskedGroups, Ranking, Score
from ...ops.router import RouterOutput, RouterSaved, check_router, check_selection, select_experts
from .compile import kernel
from .host import empty, expect_real, ready, rows_of, run_products

__all__ = ["router_backward", "router_forward"]


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
    """As `refimpl.ops.router_forward`, by kernels of Numba."""
    dtype = expect_real(x=x, w=w)
    scale, epsilon = float(scale), float(epsilon)
    check_router(x, w, bias, score, ranking, scale, epsilon)
    logits, scores = (empty((*x.shape[:-1], w.shape[0]), x) for _ in range(2))
    run_products((rows_of(x), w.T, rows_of(logits)))  # (router.1)
    kernel("router", f"{score}_scores", dtype)(rows_of(scores), rows_of(logits))
    if routes is None:
        ranked = scores if ranking == "scores" else logits
        biased = ranked if bias is None else ranked + bias  # (router.4)
        indices = _select(biased, top_k, groups, keep_groups, group_score, masked_groups)
    else:
        expect("routes", routes, "(…, K)", (*x.shape[:-1], top_k))
        indices = expect_ids("routes", routes, w.shape[0])
    weights, chosen = empty(indices.shape, x), ready(rows_of(indices))
    weigh = kernel("router", "weigh", dtype)
    weigh(rows_of(weights), rows_of(scores), chosen, scale, int(normalise), epsilon)
    saved = RouterSaved(x, w, scores, indices, score, normalise, scale, epsilon)
    return RouterOutput(weights, scores, indices), saved


def router_backward(dy: tuple[Array, Array | None], saved: RouterSaved) -> tuple[Array, Array]:
    """As `refimpl.ops.router_backward`, by kernels of Numba."""
    dweights, dscores = dy
    x, w, scores, indices = saved[:4]
    dtype = expect_real(x=x, dweights=dweights, dscores=dscores)
    expect("dweights", dweights, "(…, K)", tuple(indices.shape))
    if dscores is not None:
        expect("dscores", dscores, "(…, E)", tuple(scores.shape))
    dlogits = empty(scores.shape, x)
    given = np.zeros_like(scores) if dscores is None else dscores
    arrays = [ready(rows_of(array)) for array in (given, dweights, scores, indices)]
    rows, rule = rows_of(dlogits), (saved.scale, int(saved.normalise), saved.epsilon)
    kernel("router", "gate_backward", dtype)(rows, *arrays, *rule, int(saved.score == "softmax"))
    dx, dw = empty(x.shape, x), empty(w.shape, x)
    run_products((rows, w, rows_of(dx)), (rows.T, rows_of(x), dw))  # (router.11)
    return dx, dw


def _select(
    biased: Array,
    top_k: int,
    groups: int,
    keep_groups: int,
    group_score: GroupScore,
    masked_groups: MaskedGroups,
) -> Array:
    check_selection(biased.shape[-1], top_k, groups, keep_groups, group_score, masked_groups)
    if keep_groups < groups:
        return select_experts(biased, top_k, groups, keep_groups, group_score, masked_groups)
    indices = np.empty((*biased.shape[:-1], top_k), np.int64)
    kernel("router", "select", biased.dtype)(rows_of(indices), ready(rows_of(biased)))
    return indices
