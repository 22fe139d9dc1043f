"""Mixture of experts on kernels/moe_numba_cpu.py; as `refimpl.ops.moe`, but that the table's
``ffn`` is not looked up.

A task is a block of at most `ROWS` rows of one expert, with all that is done to them, or of the
shared experts: so one hot expert is as many tasks as all experts with a few rows each. Saved are
gate and up of each row; neither the dispatched rows nor the outputs, since dy · output is the sum
over hidden ∘ (dy W_down).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, expect_ids, expect_some
from ...ops.leaves import expect_table
from ...ops.moe import NETWORKS, Networks, check_shapes
from .compile import kernel
from .ffn import ROWS, FFNSaved, backward_rows, backward_tasks, forward_rows, forward_tasks
from .host import empty, expect_real, ready, rows_of, some_rows
from .pool import Task, blocks_of, run

__all__ = ["MoESaved", "moe_backward", "moe_forward"]


class MoESaved(NamedTuple):
    """What `moe_forward` keeps for `moe_backward`."""

    x: Array  # […, D]
    weights: Array  # [M, K]
    w: tuple[Array, Array, Array]  # [E, F, D] twice, [E, D, F]
    gate: Array  # [M·K, F], in the order of experts
    up: Array  # [M·K, F]
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
    shared_weights = w_shared_gate, w_shared_up, w_shared_down
    check_shapes(x, weights, indices, w_gate, w_up, w_down, *shared_weights)
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
    (d, top_k), f = (x.shape[-1], indices.shape[-1]), w_gate.shape[1]
    rows, w = ready(rows_of(x)), (w_gate, w_up, w_down)
    order, place, start = _dispatch(indices, w_gate.shape[0])
    gate, up = empty((order.size, f), x), empty((order.size, f), x)
    out, y = empty((order.size, d), x), empty(x.shape, x)
    tasks: list[Task] = [
        partial(_forward_block, out[i], gate[i], up[i], rows, order[i], top_k, *_of(w, e))
        for e, i in _blocks(start)
    ]
    shared = None
    if w_shared_gate is None:
        y[...] = 0
    else:
        more, shared = forward_tasks(rows, w_shared_gate, w_shared_up, w_shared_down, rows_of(y))
        tasks += more
    run(tasks)
    weights = ready(rows_of(weights))
    _combine(rows_of(y), out, place, weights)
    return y, MoESaved(x, weights, w, gate, up, order, place, start, shared)


def _forward_block(
    out: Array, gate: Array, up: Array, x: Array, order: Array, top_k: int, *w: Array
) -> None:
    rows = empty(out.shape, out)
    kernel("moe", "gather", x.dtype)(rows, x, order, top_k)
    forward_rows(out, gate, up, rows, *w)  # (moe.3)


def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
    """As `refimpl.ops.moe_backward`, by kernels of Numba."""
    x, weights, w, gate, up, order, place, start, shared = saved
    expect_real(x=x, dy=dy)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    top_k = weights.shape[1]
    rows, given = ready(rows_of(x)), ready(rows_of(dy))
    drows, dx = empty((order.size, x.shape[-1]), x), empty(x.shape, x)
    dgate, dup, hidden = (empty(gate.shape, x) for _ in range(3))
    by_slot, dweights = weights.reshape(-1)[order], empty((order.size,), x)
    dw = [empty(part.shape, x) for part in w]
    by_row = drows, dgate, dup, hidden, dweights, order, gate, up, by_slot
    first: list[Task] = []
    then: list[Task] = []
    for e, i in _blocks(start):
        parts = tuple(array[i] for array in by_row)
        whole = i == slice(start[e], start[e + 1])
        dw_here = _of(dw, e) if whole else None
        first.append(partial(_backward_block, parts, rows, given, top_k, _of(w, e), dw_here))
    for e, (a, b) in enumerate(pairwise(start)):
        if not 0 < b - a <= ROWS:  # of several blocks, or none
            i = slice(a, b)
            arrays = dgate[i], dup[i], hidden[i], rows, given, order[i]
            then.append(partial(_weight_gradients, _of(dw, e), arrays, top_k))
    dshared: tuple[Array | None, ...] = None, None, None
    if shared is None:
        dx[...] = 0
    else:
        dshared = tuple(empty(part.shape, x) for part in shared[1:4])
        more, after = backward_tasks(given, shared, rows_of(dx), dshared)  # type: ignore[arg-type]
        first, then = more + first, after + then
    run(first)
    run(then)
    _combine(rows_of(dx), drows, place, None)
    dweights = dweights[place.reshape(-1)].reshape(*x.shape[:-1], top_k)
    return dx, dweights, *dw, *dshared


def _backward_block(
    parts: tuple[Array, ...],
    x: Array,
    dy: Array,
    top_k: int,
    w: tuple[Array, ...],
    dw: tuple[Array, ...] | None,
) -> None:
    """Rows of one expert: the first five of ``parts`` are written; if they are all its rows, ``dw``
    too."""
    drows, dgate, dup, hidden, dweights, order, *saved = parts
    given = empty(drows.shape, dy)
    kernel("moe", "gather", dy.dtype)(given, dy, order, top_k)
    backward_rows(drows, dgate, dup, hidden, dweights, given, *saved, *w)  # (moe.10)
    if dw is not None:
        np.matmul(given.T, hidden, out=dw[2])
        kernel("moe", "gather", x.dtype)(given, x, order, top_k)
        np.matmul(dgate.T, given, out=dw[0])
        np.matmul(dup.T, given, out=dw[1])


def _weight_gradients(dw: tuple[Array, ...], arrays: tuple[Array, ...], top_k: int) -> None:
    """``dw`` (of gate, up and down) of one expert, zeros if it has no rows."""
    dgate, dup, hidden, x, dy, order = arrays
    gather = kernel("moe", "gather", x.dtype)
    rows = empty((order.size, x.shape[1]), x)
    gather(rows, x, order, top_k)
    np.matmul(dgate.T, rows, out=dw[0])
    np.matmul(dup.T, rows, out=dw[1])
    gather(rows, dy, order, top_k)
    np.matmul(rows.T, hidden, out=dw[2])


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


def _blocks(start: list[int]) -> list[tuple[int, slice]]:
    """(expert, rows) of each task, the longest first."""
    found = [
        (e, slice(a + i.start, a + i.stop))
        for e, (a, b) in enumerate(pairwise(start))
        if b > a
        for i in blocks_of(b - a, ROWS)
    ]
    return sorted(found, key=lambda part: part[1].start - part[1].stop)


def _of(w: tuple[Array, ...] | list[Array], expert: int) -> tuple[Array, ...]:
    return tuple(part[expert] for part in w)


def _combine(y: Array, rows: Array, place: Array, weights: Array | None) -> None:
    add = kernel("moe", "combine", y.dtype)
    factor = np.empty((1, 1), y.dtype) if weights is None else weights
    run(
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
