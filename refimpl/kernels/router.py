"""The mixture of experts' gate on kernels/router.cu; as `refimpl.ops.router`, and for bfloat16.

The logits are a product of float32 or wider, and weights and scores have that type: which experts
are best is decided before anything is rounded to bfloat16, as in DeepSeek's code.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..array import Array, expect, expect_ids, last
from ..ops.router import RouterOutput, RouterSaved, select_experts
from ..ops.table import Op
from .host import Kernels, cover, numbers, product, ready
from .launch import Launch

__all__ = ["router"]

WARPS, WARP = 2, 32  # rows of a block, lanes of a row
MOST_SLOTS = 1024  # for scores, of all lanes
PAIRS = 8  # so many numbers NumPy adds in pairs, the kernel one by one


def router(launch: Launch) -> Op:
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
        group_score: str = "top2",
        score: str = "sigmoid",
        normalise: bool = True,
        scale: float = 1.0,
        epsilon: float = 0.0,
        masked_groups: str = "-inf",
        routes: Array | None = None,
    ) -> tuple[RouterOutput, RouterSaved]:
        n, (experts, top_k) = numbers(x=x, w=w), (w.shape[0], int(top_k))
        expect("w", w, "(E, D)", (None, last(x, "x")))
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f"score must be 'sigmoid' or 'softmax', got {score!r}")
        if bias is not None:
            expect("bias", bias, "(E,)", (experts,))
        best = {"top2": 2, "share": top_k // max(keep_groups, 1), "max": 1}.get(group_score, 0)
        wider = bias is not None and np.result_type(bias.dtype, n.real) != n.real
        if routes is None and (
            wider or best >= PAIRS
        ):  # a bias rounded, scores added otherwise could choose others
            biased = router_forward(x, w, top_k=top_k, score=score)[0].scores + (
                0 if bias is None else bias
            )
            routes = select_experts(biased, top_k, groups, keep_groups, group_score, masked_groups)
        if routes is None:  # on no rows at all: raises for a setting without a meaning
            select_experts(
                np.zeros((0, experts)), top_k, groups, keep_groups, group_score, masked_groups
            )
            indices = kernels.empty((*x.shape[:-1], top_k), n.xp.int64, x)
        else:
            expect("routes", routes, "(…, K)", (*x.shape[:-1], top_k))
            indices = ready(expect_ids("routes", routes, experts))
        if (
            not 1 <= keep_groups < groups or experts % groups
        ):  # nothing is hidden (or, with routes, it doesn't matter)
            groups = keep_groups = (
                1  # else a lane's experts are as without routes, and softmax's sum the same bits
            )
        size, lanes = experts // groups, WARP >> (groups - 1).bit_length()  # of a group
        slots = WARP * cover(size, lanes) if lanes else experts
        if lanes == 0 or slots > MOST_SLOTS or top_k > WARP:
            raise ValueError(
                f"top_k and groups must be at most {WARP}, experts {MOST_SLOTS} (less if "
                f"groups is not a power of two), got {top_k}, {groups} and {experts}"
            )
        rows, x, w = prod(x.shape[:-1]), ready(x), ready(w)
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
            min(best, size),
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
        (dweights, dscores), (x, w, s, indices, score, normalise, scale, epsilon) = dy, saved
        n = numbers(x=x)
        expect("dweights", dweights, "(…, K)", tuple(indices.shape))
        if dscores is not None:
            expect("dscores", dscores, "(…, E)", tuple(s.shape))
        rows, (top_k, experts) = prod(x.shape[:-1]), (indices.shape[-1], s.shape[-1])
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
