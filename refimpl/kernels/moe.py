"""The mixture of experts on kernels/moe.cu and kernels/grouped_linear.cu; as `refimpl.ops.moe`, and
for bfloat16 with float32 weights.

Nothing is copied to the host, and the number of launches does not depend on the experts. So an
index that no expert has raises no error here: the output of its token is NaN, and so are its
gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..array import Array, argsort, expect, library
from ..ops import AnyOp, Op
from ..ops.moe import NETWORKS, Networks, check_shapes
from .grouped_linear import (
    TILINGS,
    Groups,
    Tilings,
    grouped_forward,
    grouped_input,
    grouped_weight,
    make_groups,
)
from .host import Kernels, cover, numbers, place, ready
from .launch import Launch
from .swiglu import swiglu

__all__ = ["MoESaved", "combine", "combine_backward", "moe", "permute", "sort_slots"]

THREADS = 128


class MoESaved(NamedTuple):
    """What the forward of `moe` keeps for its backward."""

    weights: Array  # [M, K], in float32 for bfloat16
    known: Array  # [M, K], in the same type: 1, and NaN for an index of no expert
    place: Array  # [M·K]: the row of each slot of [M, K] in the experts' order
    groups: Groups
    w: tuple[Array, Array, Array]  # gate, up, down
    rows: Array  # [M·K, D]: x, sorted by expert
    hidden: Array  # [M·K, F]: what the down maps multiply
    of_swiglu: Any
    outputs: Array  # [M·K, D]: of the experts, before their weights
    shared: Any  # of the shared network, or None
    x_shape: tuple[int, ...]
    ops: Networks


def permute(launch: Launch, x: Array, where: Array, top_k: int) -> Array:
    """rows [M·K, D]: rows[where[m K + k]] = x[m] for each token m of ``x`` [M, D] and choice k."""
    kernels, n = Kernels(launch, "moe"), numbers(x=x)
    tokens, d = x.shape
    rows = kernels.empty((tokens * top_k, d), x.dtype, x)
    grid = tokens, cover(d, THREADS * n.vector)
    kernels("moe_permute", n.storage, grid, THREADS, rows, x, where, top_k, d)
    return rows


def combine(launch: Launch, rows: Array, where: Array, weights: Array) -> Array:
    """y[m] = Σ_k weights[m, k] rows[where[m K + k]] [M, D]."""
    kernels, n = Kernels(launch, "moe"), numbers(rows=rows)
    (tokens, top_k), d = weights.shape, rows.shape[1]
    y = kernels.empty((tokens, d), rows.dtype, rows)
    kernels(
        "moe_combine",
        n.storage,
        (tokens, cover(d, THREADS * n.vector)),
        THREADS,
        y,
        rows,
        where,
        weights,
        top_k,
        d,
    )
    return y


def combine_backward(
    launch: Launch, dy: Array, rows: Array, where: Array, weights: Array
) -> tuple[Array, Array]:
    """(drows [M·K, D], dweights [M, K], float32 for bfloat16) of `combine` from ``dy`` [M, D].

    Args:
        rows, where, weights: [M·K, D], [M·K], [M, K], as they were given to `combine`.
    """
    kernels, n = Kernels(launch, "moe"), numbers(dy=dy, rows=rows)
    (tokens, top_k), d = weights.shape, dy.shape[1]
    drows, warps = kernels.empty(rows.shape, rows.dtype, rows), min(top_k, 8)
    dweights = kernels.empty((tokens, top_k), n.real, dy)
    kernels(
        "moe_combine_backward",
        n.storage,
        (tokens, cover(top_k, warps)),
        32 * warps,
        drows,
        dweights,
        dy,
        rows,
        where,
        weights,
        top_k,
        d,
    )
    return drows, dweights


def sort_slots(chosen: Array, experts: int) -> tuple[Array, Array]:
    """(start, where) from the experts ``chosen`` [M·K] by the slots: the first row of each expert
    and the end of the last [E + 1], and the row of each slot [M·K]."""
    xp = library(chosen)
    order = ready(argsort(chosen), np.int64)  # (moe.1)
    start = xp.searchsorted(chosen[order], xp.arange(experts + 1))
    return ready(start, np.int64), place(order)


def moe(launch: Launch, tilings: Tilings = TILINGS) -> AnyOp:
    """The op on ``launch``."""
    gated = swiglu(launch)

    def moe_forward(
        x: Array,
        weights: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        w_shared_gate: Array | None,
        w_shared_up: Array | None,
        w_shared_down: Array | None,
        *,
        indices: Array,
        ops: Networks = NETWORKS,
    ) -> tuple[Array, MoESaved]:
        n = numbers(
            x=x,
            w_gate=w_gate,
            w_up=w_up,
            w_down=w_down,
            w_shared_gate=w_shared_gate,
            w_shared_up=w_shared_up,
            w_shared_down=w_shared_down,
        )
        check_shapes(
            x, weights, indices, w_gate, w_up, w_down, w_shared_gate, w_shared_up, w_shared_down
        )
        if indices.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        tokens, top_k = ready(x).reshape(-1, x.shape[-1]), indices.shape[-1]
        chosen = ready(indices, np.int64).reshape(-1, top_k)
        known = (chosen >= 0) & (chosen < w_gate.shape[0])
        known = ready(n.xp.where(known, n.scalar(1), n.scalar(np.nan)), n.real)
        weights = ready(weights.reshape(-1, top_k) * known, n.real)
        start, where = sort_slots(chosen.reshape(-1), w_gate.shape[0])
        groups = make_groups(start, where.shape[0], n.storage, tilings)
        w = ready(w_gate), ready(w_up), ready(w_down)
        rows = permute(launch, tokens, where, top_k)
        gate, up = (grouped_forward(launch, rows, matrix, groups) for matrix in w[:2])
        hidden, of_swiglu = gated.forward(gate, up)
        outputs = grouped_forward(launch, hidden, w[2], groups)
        y, shared = combine(launch, outputs, where, weights), None
        if w_shared_gate is not None:
            shared_weights = w_shared_gate, w_shared_up, w_shared_down
            shared_y, shared = ops.ffn.forward(tokens, *shared_weights, ops=ops)
            y = y + shared_y
        kept = rows, hidden, of_swiglu, outputs
        saved = MoESaved(weights, known, where, groups, w, *kept, shared, tuple(x.shape), ops)
        return y.reshape(x.shape), saved

    def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
        weights, known, where, groups, (w_gate, w_up, w_down), rows, hidden, of_swiglu, *_ = saved
        numbers(rows=saved.outputs, dy=dy)
        expect("dy", dy, "(…, D)", saved.x_shape)
        dtokens = ready(dy).reshape(-1, saved.x_shape[-1])
        dout, dweights = combine_backward(launch, dtokens, saved.outputs, where, weights)
        dw_down = grouped_weight(launch, dout, hidden, groups)
        dgate, dup = gated.backward(grouped_input(launch, dout, w_down, groups), of_swiglu)
        dw_gate, dw_up = (grouped_weight(launch, x, rows, groups) for x in (dgate, dup))
        drows = grouped_input(launch, dgate, w_gate, groups, (dup, w_up))
        # In rows of no expert stands what the device's memory held before
        dx = combine(launch, drows, where, known)
        dshared: list[Array | None] = [None, None, None]
        if saved.shared is not None:
            dx_shared, *dshared = saved.ops.ffn.backward(dtokens, saved.shared)
            dx = dx + dx_shared
        dweights = (dweights * known).reshape(*saved.x_shape[:-1], -1)
        return dx.reshape(saved.x_shape), dweights, dw_gate, dw_up, dw_down, *dshared

    return Op(moe_forward, moe_backward)
