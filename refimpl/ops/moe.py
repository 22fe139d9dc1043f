"""Mixture of experts: send each token to its experts, run them, and add up what comes back; shared experts on top.

Tokens are sorted by expert, so each expert works on one contiguous block of rows: exactly T·K rows in all, no masks
over tokens × experts × capacity, and nothing is dropped. An expert without tokens gets zero gradients.
Source: DeepSeek-V3 (2412.19437) eq. 12. Derivation: derivations/moe.md.
Letters: D model, E experts, K top-k, F hidden width of an expert; ``…`` any leading dimensions, M their product
(tokens), and M·K the rows that are dispatched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, argsort, expect, expect_ids, namespace, take_rows, zeros
from .ffn import ffn_backward, ffn_forward
from .router import expert_load
from .table import LEAVES, Ops

__all__ = ["MoESaved", "moe_backward", "moe_forward"]


class MoESaved(NamedTuple):
    weights: Array  # [M, K]
    outputs: Array  # [M, K, D]: each chosen expert's output, whose product with dy is the weight's gradient
    order: Array  # [M·K]: dispatched row r holds token order[r] // K
    experts: list[tuple[int, slice, Any]]  # (expert, its rows, its saved), for experts with tokens
    shared: Any  # saved of the shared experts, None without
    shapes: tuple[tuple[int, ...], ...]  # of x, w_gate, w_up, w_down


def moe_forward(
    x: Array, weights: Array, w_gate: Array, w_up: Array, w_down: Array,
    w_shared_gate: Array | None, w_shared_up: Array | None, w_shared_down: Array | None,
    *, indices: Array, ops: Ops = LEAVES,
) -> tuple[Array, MoESaved]:  # fmt: skip
    """y = Σ_k weights_k · expert_{indices_k}(x) + shared(x), for each row of ``x`` […, D]; returns y […, D].

    Args:
        weights, indices: […, K], from `router_forward`.
        w_gate, w_up: [E, F, D]; w_down: [E, D, F]: the routed experts, stacked.
        w_shared_*: one network as wide as all shared experts together, or None for none; added unscaled.
    """
    xp, (experts, f, d), top_k = namespace(x=x, weights=weights, w_gate=w_gate), w_gate.shape, indices.shape[-1]
    expect("weights", weights, "(…, K)", (*x.shape[:-1], top_k))
    expect("indices", indices, "(…, K)", (*x.shape[:-1], top_k))
    expect("w_gate", w_gate, "(E, F, D)", (experts, f, x.shape[-1]))
    expect("w_up", w_up, "(E, F, D)", (experts, f, d))
    expect("w_down", w_down, "(E, D, F)", (experts, d, f))
    if len({w is None for w in (w_shared_gate, w_shared_up, w_shared_down)}) > 1:
        raise ValueError("w_shared_gate, w_shared_up and w_shared_down must all be given, or all be None")
    expect_ids("indices", indices, experts)
    rows = xp.reshape(x, (-1, d))
    if rows.shape[0] == 0:
        raise ValueError(f"x must have at least one row, got shape {tuple(x.shape)}")
    order = argsort(xp.reshape(indices, (-1,)))  # (moe.1)
    dispatched = take_rows(rows, order // top_k)  # (moe.2)
    blocks, kept, start = [], [], 0
    for expert, count in enumerate(map(int, expert_load(indices, experts))):
        block = slice(start, start := start + count)
        if count:
            w = w_gate[expert, ...], w_up[expert, ...], w_down[expert, ...]
            out, saved = ffn_forward(dispatched[block, :], *w, ops=ops)  # (moe.3)
            blocks.append(out)
            kept.append((expert, block, saved))
    outputs = xp.reshape(take_rows(xp.concat(blocks, axis=0), argsort(order)), (-1, top_k, d))  # (moe.4)
    weights = xp.reshape(weights, (-1, top_k))
    y = xp.sum(weights[..., None] * outputs, axis=1)  # (moe.5)
    shared = None
    if w_shared_gate is not None:
        shared_y, shared = ffn_forward(rows, w_shared_gate, w_shared_up, w_shared_down, ops=ops)
        y = y + shared_y  # (moe.6)
    shapes = (x.shape, w_gate.shape, w_up.shape, w_down.shape)
    return xp.reshape(y, x.shape), MoESaved(weights, outputs, order, kept, shared, shapes)


def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
    """Gradients (dx, dweights, dw_gate, dw_up, dw_down, dw_shared_gate, dw_shared_up, dw_shared_down) from ``dy``."""
    weights, outputs, order, experts, shared, (x_shape, *w_shapes) = saved
    xp, top_k = namespace(dy=dy, weights=weights), weights.shape[1]
    rows = xp.reshape(dy, (-1, x_shape[-1]))
    dweights = xp.sum(rows[:, None, :] * outputs, axis=-1)  # (moe.7)
    doutputs = xp.reshape(weights[..., None] * rows[:, None, :], (-1, x_shape[-1]))  # (moe.8)
    dout = take_rows(doutputs, order)  # (moe.9)
    dw = [zeros(shape, rows) for shape in w_shapes]
    blocks = []
    for expert, block, ffn_saved in experts:
        dx_block, *dw_expert = ffn_backward(dout[block, :], ffn_saved)  # (moe.10)
        blocks.append(dx_block)
        for total, part in zip(dw, dw_expert, strict=True):
            total[expert, ...] = part
    dslots = xp.reshape(take_rows(xp.concat(blocks, axis=0), argsort(order)), (-1, top_k, x_shape[-1]))
    dx = xp.sum(dslots, axis=1)  # (moe.11)
    dshared: list[Array | None] = [None, None, None]
    if shared is not None:
        dx_shared, *dshared = ffn_backward(rows, shared)
        dx = dx + dx_shared  # (moe.12)
    return xp.reshape(dx, x_shape), xp.reshape(dweights, (*x_shape[:-1], top_k)), *dw, *dshared
