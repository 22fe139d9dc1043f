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
from .compile import kernel, panel_width, turned_shape
from .host import MOST, ONE_PRODUCT, ONE_TASK, empty, expect_real, ready, rows_of
from .pool import Task, blocks_of, run_kernels, thread_count

__all__ = ["FFNSaved", "Routed", "backward_tasks", "ffn_backward", "ffn_forward", "forward_tasks"]

MOST_ROWS = 256  # of one task: the more, the less often a weight is fetched
SHARED = 2**20  # numbers of a weight, over the blocks: as many, and it is turned once for all
LEAST_ROWS = 32  # of a part of a weight's gradient: a task has its own time to begin
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
    run_kernels(tasks)
    return y, FFNSaved(x, w, gate, up)


def ffn_backward(dy: Array, saved: FFNSaved) -> tuple[Array, Array, Array, Array]:
    """As `refimpl.ops.ffn_backward`, a block of rows per task."""
    x = saved.x
    expect_real(x=x, dy=dy)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    dx = empty(x.shape, x)
    before, first, then, dw = whole_backward(ready(rows_of(dy)), saved, rows_of(dx))
    run_kernels(before)
    run_kernels(first)
    run_kernels(then)
    return dx, *(part[0] for part in dw)


def whole_backward(
    dy: Array, saved: FFNSaved, dx: Array
) -> tuple[list[Task], list[Task], list[Task], tuple[Array, ...]]:
    """The tasks of one network: what must be done before the others, those of `backward_tasks`, and
    the gradients that they fill."""
    x, w, gate, up = saved
    dw = tuple(empty(part.shape, x) for part in w)
    ones, unused = np.ones(len(dy), x.dtype), empty(dy.shape[:1], x)
    before, turned = turned_weights(w, len(dy))
    tasks = backward_tasks(all_rows(x), w, dy, gate, up, ones, dx, unused, dw, turned)
    return before, *tasks, dw


def turned_weights(w: Matrices, rows: int) -> tuple[list[Task], tuple[Array, ...] | None]:
    """Tasks that fill the transposes of one network's weights, and those: where so many
    blocks of ``rows`` would each turn the weights that once for all takes less. Else none."""
    _, f, d = w[0].shape
    if rows // MOST_ROWS * f * d < SHARED:
        return [], None
    turned = tuple(empty(turned_shape(*part.shape[1:]), part) for part in w)
    parts = min(MOST, max(1, 3 * f * d // ONE_TASK))
    put = kernel("ffn", "put_weights", w[0].dtype)
    matrices = [ready(part) for part in w]
    return [partial(put, *turned, *matrices, part, parts) for part in range(parts)], turned


def all_rows(x: Array) -> Routed:
    """Every row of ``x`` […, D], for one network."""
    rows = ready(rows_of(x))
    return Routed(rows, np.arange(len(rows)), 1, [0, len(rows)])


def networks(start: list[int], width: int) -> list[list[int]]:
    """The table of all rows of each network, as kernels read it; its panels follow those of the
    one before."""
    found, panel = [], 0
    for e, (begin, end) in enumerate(pairwise(start)):
        stop = panel - (begin - end) // width
        found.append([e, begin, end, panel, stop])
        panel = stop
    return found


def blocks(start: list[int], width: int) -> list[list[int]]:
    """The same of some rows of a network each, the longest first: as many that each thread gets
    four blocks or more. A row's result depends on no other row, so not on the number of threads."""
    rows = min(MOST_ROWS, max(MOST_ROWS // 2, start[-1] // (4 * thread_count())))
    found = []
    for e, begin, end, panel, stop in networks(start, width):
        for some in blocks_of(stop - panel, max(1, rows // width)) if end > begin else ():
            first, last = begin + some.start * width, min(begin + some.stop * width, end)
            found.append([e, first, last, panel + some.start, panel + some.stop])
    return sorted(found, key=lambda block: block[1] - block[2])


def in_tasks(table: list[list[int]], work: int) -> list[Array]:
    """The table in parts, each for a task of `ONE_PRODUCT` multiplications or more, where a row of
    a network takes ``work``, and one of several parts of it as much less."""
    found: list[Array] = []
    first, count = 0, 0
    for i, (_, begin, end, _, _, *part) in enumerate(table, 1):
        count += (end - begin) * work // (part[1] if part else 1)
        if count >= ONE_PRODUCT or i == len(table):
            found.append(np.array(table[first:i]))
            first, count = i, 0
    return found


def forward_tasks(routed: Routed, w: Matrices, y: Array) -> tuple[list[Task], Array, Array]:
    """Tasks that fill ``y`` [rows, D], and the gate and up [P, F, WIDTH] that they fill too."""
    x, order, per_token, start = routed
    width, matrices = panel_width(x.dtype), [ready(part) for part in w]
    _, f, d = w[0].shape
    shape = networks(start, width)[-1][-1], f, width
    gate, up = empty(shape, x), empty(shape, x)
    forward = kernel("ffn", "networks_forward", x.dtype)
    tables = in_tasks(blocks(start, width), 3 * f * d)
    arrays = y, gate, up, x, order, per_token, *matrices
    return [partial(forward, *arrays, table) for table in tables], gate, up


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
    turned: tuple[Array, ...] | None = None,
) -> tuple[list[Task], list[Task]]:
    """Tasks that fill ``dx`` [rows, D] and ``dweights`` [rows], and those that after them fill
    ``dw``, [E, F, D] twice and [E, D, F].

    ``dy`` [M, D] is of the outputs times ``weights`` [rows]; ``gate`` and ``up`` [P, F, WIDTH]
    are the forward's, ``turned`` those of `turned_weights`; without them each block turns the
    weights for itself.
    """
    x, order, per_token, start = routed
    (_, f, width), d = gate.shape, x.shape[1]
    dy_panels = empty((gate.shape[0], d, width), x)
    dgate, dup = empty(gate.shape, x), empty(gate.shape, x)
    hidden, columns = (empty((-(-n // width), order.size, width), x) for n in (f, d))
    written = dgate, dup, dy_panels, hidden, columns
    matrices = [ready(part) for part in w]
    matrices += turned or [np.empty((0, 0, 1, 1), x.dtype)] * 3
    arrays = dx, *written, dweights, dy, x, order, per_token, gate, up, weights, *matrices
    backward = kernel("ffn", "networks_backward", x.dtype)
    tables = in_tasks(blocks(start, width), 3 * f * d)
    first: list[Task] = [partial(backward, *arrays, table) for table in tables]
    of_weights = *dw, *written
    gradients = kernel("ffn", "weight_gradients", x.dtype)
    tables = in_tasks(weight_parts(start, width, min(f, d)), 3 * f * d)
    return first, [partial(gradients, *of_weights, table) for table in tables]


def weight_parts(start: list[int], width: int, length: int) -> list[list[int]]:
    """The table of all networks for the weights' gradients, with two more columns: which part of
    the ``length`` rows of a weight, and of how many. A network is cut where it would take a thread
    long. How often is no matter for the numbers."""
    threads = thread_count()
    most, some = min(length // LEAST_ROWS, 4 * threads), max(1, start[-1] // (16 * threads))
    found = []
    for row in networks(start, width):
        parts = max(1, min((row[2] - row[1]) // some, most))
        found += [[*row, part, parts] for part in range(parts)]
    return found
