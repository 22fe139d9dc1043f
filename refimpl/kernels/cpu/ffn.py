"""Feed-forward network on kernels/ffn_numba_cpu.py; as `refimpl.ops.ffn`, but that the table's
``linear`` and ``swiglu`` are not looked up.

A block of rows goes through a whole network in one kernel. Several networks, each with rows of its
own, are the experts of moe.py. Saved are gate and up, in panels; the hidden state is made again in
the backward.

P panels of WIDTH rows (`panel_width`) hold the networks' rows.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, expect_some, last
from ...ops.leaves import LEAVES, Leaves, expect_table
from .compile import kernel, panel_width
from .host import LEAST, ONE_PRODUCT, empty, expect_real, ready, rows_of
from .pool import Task, blocks_of, run

__all__ = ["FFNSaved", "Routed", "backward_tasks", "ffn_backward", "ffn_forward", "forward_tasks"]

ROWS = 128  # of one task
Matrices = tuple[Array, Array, Array]  # of E networks: w_gate and w_up [E, F, D], w_down [E, D, F]


class Routed(NamedTuple):
    """The rows of each network, network after network; rows start[e] … start[e + 1] are e's."""

    x: Array  # [M, D]
    order: Array  # [rows]: row r is that of token order[r] // per_token
    per_token: int
    start: list[int]  # [E + 1]


class FFNSaved(NamedTuple):
    """What `ffn_forward` keeps for `ffn_backward`."""

    x: Array  # […, D]
    w: Matrices
    gate: Array  # [P, F, WIDTH]
    up: Array  # [P, F, WIDTH]


class Block(NamedTuple):
    """What one task handles, of one network."""

    network: int
    rows: slice
    panels: slice


def ffn_forward(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, *, ops: Leaves = LEAVES
) -> tuple[Array, FFNSaved]:
    """As `refimpl.ops.ffn_forward`, a block of rows per task."""
    expect_table(ops, Leaves)
    expect_real(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    expect("w_gate", w_gate, "(F, D)", (None, last(x, "x")))
    expect_some("w_gate", w_gate, "(F, D)")
    expect("w_up", w_up, "(F, D)", tuple(w_gate.shape))
    expect("w_down", w_down, "(D, F)", (x.shape[-1], w_gate.shape[0]))
    y, w = empty(x.shape, x), (w_gate[None], w_up[None], w_down[None])
    tasks, gate, up = forward_tasks(all_rows(x), w, rows_of(y))
    run(tasks)
    return y, FFNSaved(x, w, gate, up)


def ffn_backward(dy: Array, saved: FFNSaved) -> tuple[Array, Array, Array, Array]:
    """As `refimpl.ops.ffn_backward`, a block of rows per task."""
    x = saved.x
    expect_real(x=x, dy=dy)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    dx = empty(x.shape, x)
    first, then, dw = whole_backward(ready(rows_of(dy)), saved, rows_of(dx))
    run(first)
    run(then)
    return dx, *(part[0] for part in dw)


def whole_backward(
    dy: Array, saved: FFNSaved, dx: Array
) -> tuple[list[Task], list[Task], tuple[Array, ...]]:
    """The tasks of one network, as of `backward_tasks`, and the gradients that they fill."""
    x, w, gate, up = saved
    dw = tuple(empty(part.shape, x) for part in w)
    ones, unused = np.ones(len(dy), x.dtype), empty(dy.shape[:1], x)
    return *backward_tasks(all_rows(x), w, dy, gate, up, ones, dx, unused, dw), dw


def all_rows(x: Array) -> Routed:
    """Every row of ``x`` […, D], for one network."""
    rows = ready(rows_of(x))
    return Routed(rows, np.arange(len(rows)), 1, [0, len(rows)])


def networks(start: list[int], width: int) -> list[Block]:
    """All rows of each network; its panels follow those of the one before."""
    found, panel = [], 0
    for e, (begin, end) in enumerate(pairwise(start)):
        panels = slice(panel, panel + -(-(end - begin) // width))
        found.append(Block(e, slice(begin, end), panels))
        panel = panels.stop
    return found


def blocks(start: list[int], width: int) -> list[Block]:
    """At most `ROWS` rows of a network each, the longest first."""
    found = []
    for e, rows, panels in networks(start, width):
        count = panels.stop - panels.start
        for some in blocks_of(count, max(1, ROWS // width)) if count else ():
            begin = rows.start + some.start * width
            i = slice(begin, min(rows.start + some.stop * width, rows.stop))
            found.append(Block(e, i, slice(panels.start + some.start, panels.start + some.stop)))
    return sorted(found, key=lambda block: block.rows.start - block.rows.stop)


def forward_tasks(routed: Routed, w: Matrices, y: Array) -> tuple[list[Task], Array, Array]:
    """Tasks that fill ``y`` [rows, D], and the gate and up [P, F, WIDTH] that they fill too."""
    x, order, per_token, start = routed
    width, matrices = panel_width(x.dtype), [ready(part) for part in w]
    shape = networks(start, width)[-1].panels.stop, w[0].shape[1], width
    gate, up = empty(shape, x), empty(shape, x)
    forward = kernel("ffn", "network_forward", x.dtype)
    tasks: list[Task] = [
        partial(
            forward, y[i], gate[p], up[p], x, order[i], per_token, *(part[e] for part in matrices)
        )
        for e, i, p in blocks(start, width)
    ]
    return tasks, gate, up


def backward_tasks(
    routed: Routed,
    w: Matrices,
    dy: Array,
    gate: Array,
    up: Array,
    weights: Array,
    dx: Array,
    dweights: Array,
    dw: tuple[Array, ...],
) -> tuple[list[Task], list[Task]]:
    """Tasks that fill ``dx`` [rows, D] and ``dweights`` [rows], and those that after them fill
    ``dw``, [E, F, D] twice and [E, D, F].

    ``dy`` [M, D] is of the outputs times ``weights`` [rows]; ``gate`` and ``up`` [P, F, WIDTH]
    are the forward's.
    """
    x, order, per_token, start = routed
    (_, f, width), d = gate.shape, x.shape[1]
    dy_panels = empty((gate.shape[0], d, width), x)
    dgate, dup = empty(gate.shape, x), empty(gate.shape, x)
    hidden = empty((order.size, f), x)
    backward = kernel("ffn", "network_backward", x.dtype)
    gradients = kernel("ffn", "weight_gradients", x.dtype)
    matrices = [ready(part) for part in w]
    first: list[Task] = []
    for e, i, p in blocks(start, width):
        written = dx[i], dgate[p], dup[p], dy_panels[p], hidden[i], dweights[i]
        read = dy, order[i], per_token, gate[p], up[p], weights[i]
        first.append(partial(backward, *written, *read, *(part[e] for part in matrices)))
    identity = np.arange(order.size)
    then: list[Task] = []
    for e, i, p in networks(start, width):
        n = i.stop - i.start
        parts = max(1, min(n * d * f // ONE_PRODUCT, min(d, f) // LEAST))
        arrays = dgate[p], dup[p], dy_panels[p], hidden[i], x, order[i], identity[:n]
        dw_here = [part[e] for part in dw]
        then += [partial(gradients, *dw_here, *arrays, per_token, k, parts) for k in range(parts)]
    return first, then
