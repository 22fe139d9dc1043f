"""The mixture of experts on kernels/moe.cu; as `refimpl.ops.moe`, and for bfloat16 with float32
weights.

Rows are sent to the experts and added up by kernels; each expert is the table's ``ffn``, made of
cuBLAS's products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..array import Array, argsort, expect
from ..ops.ffn import ffn_backward, ffn_forward
from ..ops.moe import check_shapes
from ..ops.router import expert_load
from ..ops.table import LEAVES, Op, Ops
from .host import Kernels, cover, numbers, place, ready
from .launch import Launch

__all__ = ["MoESaved", "combine", "moe", "permute", "weight_gradient"]

THREADS = 128
FFN = Op(ffn_forward, ffn_backward)


class MoESaved(NamedTuple):
    weights: Array  # [M, K], in float32 for bfloat16
    rows: Array  # [M·K, D]: the experts' outputs, in the experts' order
    order: Array  # [M·K]: dispatched row r belongs to slot order[r] of [M, K]
    place: Array  # [M·K]: its inverse
    ffn: Op
    experts: list[tuple[int, slice, Any]]  # (expert, its rows, its saved), for experts with tokens
    shared: Any
    shapes: tuple[tuple[int, ...], ...]  # of x, w_gate, w_up, w_down


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


def moe(launch: Launch) -> Op:
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
        ops: Ops = LEAVES,
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
        (experts, _, d), top_k = w_gate.shape, indices.shape[-1]
        load, slots = expert_load(indices, experts), ready(indices, np.int64).reshape(-1)
        rows, weights = ready(x).reshape(-1, d), ready(weights, n.real).reshape(-1, top_k)
        order = ready(argsort(slots), np.int64)
        where = place(order)
        dispatched = permute(launch, rows, order, top_k)
        ffn, blocks, kept, start = ops.get("ffn", FFN), [], [], 0
        for expert, count in enumerate(map(int, load)):
            block = slice(start, start := start + count)
            if count:
                w = w_gate[expert], w_up[expert], w_down[expert]
                out, saved = ffn.forward(dispatched[block], *w, ops=ops)
                blocks.append(out)
                kept.append((expert, block, saved))
        outputs = ready(n.xp.concat(blocks, axis=0))
        y, shared = combine(launch, outputs, where, top_k, weights), None
        if w_shared_gate is not None:
            shared_y, shared = ffn.forward(rows, w_shared_gate, w_shared_up, w_shared_down, ops=ops)
            y = y + shared_y
        shapes = (tuple(x.shape), w_gate.shape, w_up.shape, w_down.shape)
        return y.reshape(x.shape), MoESaved(
            weights, outputs, order, where, ffn, kept, shared, shapes
        )

    def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
        weights, outputs, order, where, ffn, experts, shared, (x_shape, *w_shapes) = saved
        n, top_k, d = numbers(rows=outputs, dy=dy), weights.shape[1], x_shape[-1]
        expect("dy", dy, "(…, D)", x_shape)
        rows = ready(dy).reshape(-1, d)
        dweights = weight_gradient(launch, rows, outputs, where, top_k)
        dout = permute(launch, rows, order, top_k, weights)
        dw = [n.xp.zeros(shape, dtype=n.real) for shape in w_shapes]
        blocks = []
        for expert, block, ffn_saved in experts:
            dx_block, *dw_expert = ffn.backward(dout[block], ffn_saved)
            blocks.append(dx_block)
            for total, part in zip(dw, dw_expert, strict=True):
                total[expert] = part
        dx = combine(launch, ready(n.xp.concat(blocks, axis=0)), where, top_k)
        dshared: list[Array | None] = [None, None, None]
        if shared is not None:
            dx_shared, *dshared = ffn.backward(rows, shared)
            dx = dx + dx_shared
        return dx.reshape(x_shape), dweights.reshape(*x_shape[:-1], top_k), *dw, *dshared

    return Op(moe_forward, moe_backward)
