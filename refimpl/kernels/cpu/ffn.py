"""Feed-forward network on kernels/swiglu_numba_cpu.py; as `refimpl.ops.ffn`, but that the table's
``linear`` and ``swiglu`` are not looked up.

A block of rows goes through the whole network on one thread, its hidden state in the cache. Saved
are gate and up; the hidden state is made again in the backward.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, expect_some, last
from ...ops.leaves import LEAVES, Leaves, expect_table
from .compile import kernel
from .host import empty, expect_real, products, rows_of
from .pool import Task, blocks_of, run

__all__ = ["FFNSaved", "backward_rows", "ffn_backward", "ffn_forward", "forward_rows"]

ROWS = 256  # of one task


class FFNSaved(NamedTuple):
    """What `ffn_forward` keeps for `ffn_backward`."""

    x: Array  # […, D]
    w_gate: Array  # [F, D]
    w_up: Array  # [F, D]
    w_down: Array  # [D, F]
    gate: Array  # [rows, F]
    up: Array  # [rows, F]


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
    y = empty(x.shape, x)
    tasks, saved = forward_tasks(x, w_gate, w_up, w_down, rows_of(y))
    run(tasks)
    return y, saved


def ffn_backward(dy: Array, saved: FFNSaved) -> tuple[Array, Array, Array, Array]:
    """As `refimpl.ops.ffn_backward`, a block of rows per task."""
    x, w_gate, w_up, w_down, *_ = saved
    expect_real(x=x, dy=dy)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    dx = empty(x.shape, x)
    dw = empty(w_gate.shape, x), empty(w_up.shape, x), empty(w_down.shape, x)
    first, then = backward_tasks(rows_of(dy), saved, rows_of(dx), dw)
    run(first)
    run(then)
    return dx, *dw


def forward_tasks(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, y: Array
) -> tuple[list[Task], FFNSaved]:
    """Tasks that fill ``y`` [rows, D] and what is saved."""
    rows = rows_of(x)
    gate, up = (empty((rows.shape[0], w_gate.shape[0]), x) for _ in range(2))
    weights = w_gate, w_up, w_down
    tasks: list[Task] = [
        partial(forward_rows, y[i], gate[i], up[i], rows[i], *weights)
        for i in blocks_of(rows.shape[0], ROWS)
    ]
    return tasks, FFNSaved(x, *weights, gate, up)


def backward_tasks(
    dy: Array, saved: FFNSaved, dx: Array, dw: tuple[Array, Array, Array]
) -> tuple[list[Task], list[Task]]:
    """Tasks that fill ``dx`` [rows, D], and those that after them fill ``dw``."""
    x, w_gate, w_up, w_down, gate, up = saved
    dgate, dup, hidden = (empty(gate.shape, x) for _ in range(3))
    ones, unused = np.ones(gate.shape[0], x.dtype), empty(gate.shape[:1], x)
    weights = w_gate, w_up, w_down
    first: list[Task] = [
        partial(
            backward_rows,
            dx[i],
            dgate[i],
            dup[i],
            hidden[i],
            unused[i],
            dy[i],
            gate[i],
            up[i],
            ones[i],
            *weights,
        )
        for i in blocks_of(dy.shape[0], ROWS)
    ]
    rows = rows_of(x)
    then = products(dgate.T, rows, dw[0]) + products(dup.T, rows, dw[1])
    return first, then + products(dy.T, hidden, dw[2])


def forward_rows(
    y: Array, gate: Array, up: Array, x: Array, w_gate: Array, w_up: Array, w_down: Array
) -> None:
    """``y`` [n, D], ``gate`` and ``up`` [n, F] of ``x`` [n, D]; ``w_gate`` and ``w_up`` are [F, D],
    ``w_down`` is [D, F]."""
    np.matmul(x, w_gate.T, out=gate)  # (ffn.1)
    np.matmul(x, w_up.T, out=up)
    hidden = np.empty_like(gate)
    kernel("swiglu", "swiglu_forward", gate.dtype)(hidden.ravel(), gate.ravel(), up.ravel())
    np.matmul(hidden, w_down.T, out=y)  # (ffn.3)


def backward_rows(
    dx: Array,
    dgate: Array,
    dup: Array,
    hidden: Array,
    dweights: Array,
    dy: Array,
    gate: Array,
    up: Array,
    weights: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
) -> None:
    """The first five arrays are written, of a network whose output is multiplied by ``weights``
    [n]: ``dx`` [n, D], ``dgate``, ``dup`` and ``hidden`` [n, F], ``dweights`` [n].

    They come from ``dy`` [n, D], ``gate`` and ``up`` [n, F], ``w_gate`` and ``w_up`` [F, D], and
    ``w_down`` [D, F].
    """
    dhidden = dy @ w_down  # (ffn.4)
    backward = kernel("swiglu", "network_backward", gate.dtype)
    backward(dgate, dup, hidden, dweights, dhidden, gate, up, weights)
    np.matmul(dgate, w_gate, out=dx)
    dx += dup @ w_up  # (ffn.6)
