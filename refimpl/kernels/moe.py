"""The mixture of experts on kernels/moe.cu; as `refimpl.ops.moe`, and for bfloat16 with float32
weights.

Rows are sent to the experts and added up by kernels; each expert is the table's ``ffn``, made of
cuBLAS's products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..array import Array, argsort, expect
from ..ops import AnyOp, Op
from ..ops.moe import NETWORKS, Expert, Networks, check_shapes, experts_backward, experts_forward
from ..ops.router import expert_load
from .host import Kernels, cover, numbers, place, ready
from .launch import Launch

__all__ = ["MoESaved", "combine", "moe", "permute", "weight_gradient"]

THREADS = 128


class MoESaved(NamedTuple):
    weights: Array  # [M, K], in float32 for bfloat16
    rows: Array  # [M·K, D]: the experts' outputs, in the experts' order
    order: Array  # [M·K]: dispatched row r belongs to slot order[r] of [M, K]
    place: Array  # [M·K]: its inverse
    experts: list[Expert]
    shared: Any
    shapes: tuple[tuple[int, ...], ...]  # of x, w_gate, w_up, w_down
    ops: Networks


def permute(
    launch: Launch, x: Array, order: Array, top_k: int, scale: Array | None = None
) -> Array:
    """rows [M·K, D] of ``x`` [M, D] in the order of slots ``order``; times scale[slot], if
    given."""
    kernels, n = Kernels(launch, "moe"), numbers(x=x)
    slots, d = order.shape[0], x.shape[-1]
    rows = kernels.empty((slots, d), x.dtype, x)
    factor = n.xp.zeros((1,), dtype=n.real) if scale is None else scale
    kernels(
        "moe_permute",
        n.storage,
        (slots, cover(d, THREADS * n.vector)),
        THREADS,
        rows,
        x,
        order,
        factor,
        top_k,
        d,
        int(scale is not None),
    )
    return rows


def combine(
    launch: Launch, rows: Array, where: Array, top_k: int, weights: Array | None = None
) -> Array:
    """y[m] = Σ_k weights[m, k] rows[where[m K + k]] [M, D]; weights 1 if None."""
    kernels, n = Kernels(launch, "moe"), numbers(rows=rows)
    tokens, d = where.shape[0] // top_k, rows.shape[-1]
    y = kernels.empty((tokens, d), rows.dtype, rows)
    factor = n.xp.zeros((1,), dtype=n.real) if weights is None else weights
    kernels(
        "moe_combine",
        n.storage,
        (tokens, cover(d, THREADS * n.vector)),
        THREADS,
        y,
        rows,
        where,
        factor,
        top_k,
        d,
        int(weights is not None),
    )
    return y


def weight_gradient(launch: Launch, dy: Array, rows: Array, where: Array, top_k: int) -> Array:
    """dweights [M, K], float32 for bfloat16: dy[m] · rows[where[m K + k]] of ``dy`` [M, D] and
    ``rows`` [M·K, D]."""
    kernels, n = Kernels(launch, "moe"), numbers(dy=dy, rows=rows)
    dweights, warps = kernels.empty((dy.shape[0], top_k), n.real, dy), min(top_k, 8)
    kernels(
        "moe_weight_gradient",
        n.storage,
        (dy.shape[0], cover(top_k, warps)),
        32 * warps,
        dweights,
        dy,
        rows,
        where,
        top_k,
        dy.shape[1],
    )
    return dweights


def moe(launch: Launch) -> AnyOp:
    """The op on ``launch``."""

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
        d, top_k = x.shape[-1], indices.shape[-1]
        rows, weights = ready(x).reshape(-1, d), ready(weights, n.real).reshape(-1, top_k)
        order = ready(argsort(ready(indices, np.int64).reshape(-1)), np.int64)
        where = place(order)
        dispatched = permute(launch, rows, order, top_k)
        load = expert_load(indices, w_gate.shape[0])
        out, experts = experts_forward(dispatched, load, w_gate, w_up, w_down, ops)
        outputs = ready(out)
        y, shared = combine(launch, outputs, where, top_k, weights), None
        if w_shared_gate is not None:
            shared_weights = w_shared_gate, w_shared_up, w_shared_down
            shared_y, shared = ops.ffn.forward(rows, *shared_weights, ops=ops)
            y = y + shared_y
        shapes = (tuple(x.shape), w_gate.shape, w_up.shape, w_down.shape)
        saved = MoESaved(weights, outputs, order, where, experts, shared, shapes, ops)
        return y.reshape(x.shape), saved

    def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
        weights, outputs, order, where, experts, shared, (x_shape, *w_shapes), ops = saved
        n = numbers(rows=outputs, dy=dy)
        expect("dy", dy, "(…, D)", x_shape)
        d, top_k = x_shape[-1], weights.shape[1]
        rows = ready(dy).reshape(-1, d)
        dweights = weight_gradient(launch, rows, outputs, where, top_k)
        dout = permute(launch, rows, order, top_k, weights)
        zero = [n.xp.zeros(shape, dtype=n.real) for shape in w_shapes]
        drows, dw = experts_backward(dout, experts, zero, ops)
        dx = combine(launch, ready(drows), where, top_k)
        dshared: list[Array | None] = [None, None, None]
        if shared is not None:
            dx_shared, *dshared = ops.ffn.backward(rows, shared)
            dx = dx + dx_shared
        return dx.reshape(x_shape), dweights.reshape(*x_shape[:-1], top_k), *dw, *dshared

    return Op(moe_forward, moe_backward)
