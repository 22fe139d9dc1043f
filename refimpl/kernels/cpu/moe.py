"""Mixture of experts on kernels/moe_numba_cpu.py and ffn_numba_cpu.py; as `refimpl.ops.moe`, but
that the table's ``ffn`` is not looked up.

A task is one block of rows of one expert, or of the shared experts, through the whole network: so a
hot expert is many tasks. Neither the dispatched rows nor the outputs are saved.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, expect_ids, expect_some
from ...ops.leaves import expect_table
from ...ops.moe import NETWORKS, Networks, check_shapes
from .compile import kernel
from .ffn import FFNSaved, Matrices, Routed, all_rows, backward_tasks, forward_tasks, whole_backward
from .host import empty, expect_real, ready, rows_of, some_rows
from .pool import Task, run_kernels

__all__ = ["MoESaved", "moe_backward", "moe_forward"]


class MoESaved(NamedTuple):
    """What `moe_forward` keeps for `moe_backward`."""

    x: Array  # […, D]
    weights: Array  # [M, K]
    w: Matrices
    gate: Array  # [P, F, WIDTH], in the order of experts
    up: Array  # [P, F, WIDTH]
    order: Array  # [M·K]: row r holds slot order[r] of [M, K]
    place: Array  # [M, K]: its inverse
    start: list[int]  # [E + 1]: where each expert's rows begin
    shared: FFNSaved | None


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
    """As `refimpl.ops.moe_forward`, by kernels of Numba."""
    expect_table(ops, Networks)
    shared_matrices = w_shared_gate, w_shared_up, w_shared_down
    check_shapes(x, weights, indices, w_gate, w_up, w_down, *shared_matrices)
    expect_real(
        x=x,
        weights=weights,
        w_gate=w_gate,
        w_up=w_up,
        w_down=w_down,
        w_shared_gate=w_shared_gate,
        w_shared_up=w_shared_up,
        w_shared_down=w_shared_down,
    )
    if w_shared_gate is not None:
        expect_some("w_shared_gate", w_shared_gate, "(F, D)")
    w, top_k = (w_gate, w_up, w_down), indices.shape[-1]
    order, place, start = _dispatch(indices, w_gate.shape[0])
    routed = Routed(ready(rows_of(x)), order, top_k, start)
    out, y = empty((order.size, x.shape[-1]), x), empty(x.shape, x)
    tasks, gate, up = forward_tasks(routed, w, out)
    shared = None
    if w_shared_gate is None:
        y[...] = 0
    else:
        w_shared: Matrices = w_shared_gate[None], w_shared_up[None], w_shared_down[None]  # type: ignore[index]
        more, *kept = forward_tasks(all_rows(x), w_shared, rows_of(y))
        tasks, shared = more + tasks, FFNSaved(x, w_shared, *kept)
    run_kernels(tasks)  # (moe.3)
    weights = ready(rows_of(weights))
    _combine(rows_of(y), out, place, weights)
    return y, MoESaved(x, weights, w, gate, up, order, place, start, shared)


def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
    """As `refimpl.ops.moe_backward`, by kernels of Numba."""
    x, weights, w, gate, up, order, place, start, shared = saved
    expect_real(x=x, dy=dy)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    top_k, dy_rows = weights.shape[1], ready(rows_of(dy))
    routed = Routed(ready(rows_of(x)), order, top_k, start)
    drows, dx = empty((order.size, x.shape[-1]), x), empty(x.shape, x)
    by_slot, dweights = weights.reshape(-1)[order], empty((order.size,), x)
    dw = tuple(empty(part.shape, x) for part in w)
    before: list[Task] = []
    first, then = backward_tasks(
        routed, w, dy_rows, gate, up, by_slot, drows, dweights, dw
    )  # (moe.10)
    dshared: tuple[Array | None, ...] = None, None, None
    if shared is None:
        dx[...] = 0
    else:
        before, shared_first, shared_then, shared_dw = whole_backward(dy_rows, shared, rows_of(dx))
        first, then = shared_first + first, shared_then + then
        dshared = tuple(part[0] for part in shared_dw)
    run_kernels(before)
    run_kernels(first)
    run_kernels(then)
    _combine(rows_of(dx), drows, place, None)
    dweights = dweights[place.reshape(-1)].reshape(*x.shape[:-1], top_k)
    return dx, dweights, *dw, *dshared


def _dispatch(indices: Array, experts: int) -> tuple[Array, Array, list[int]]:
    """The slots by expert, the inverse of that order [M, K], and where each expert's begin."""
    ids = ready(rows_of(expect_ids("indices", indices, experts)))
    order, place, start = by_expert(ids.reshape(-1), experts)
    return order, place.reshape(ids.shape), start.tolist()


def by_expert(ids: Array, experts: int) -> tuple[Array, Array, Array]:
    """Of the slots with these ids [n]: their order by id, its inverse, and where each id's begin
    [E + 1]."""
    order, place = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
    start = np.empty(experts + 1, np.int64)
    kernel("moe", "dispatch", np.dtype(np.float32))(order, place, start, ids)
    return order, place, start


def _combine(y: Array, rows: Array, place: Array, weights: Array | None) -> None:
    add = kernel("moe", "combine", y.dtype)
    factor = np.empty((1, 1), y.dtype) if weights is None else weights
    run_kernels(
        [
            partial(
                add,
                y[i],
                rows,
                place[i],
                factor if weights is None else factor[i],
                int(weights is not None),
            )
            for i in some_rows(*y.shape)
        ]
    )
