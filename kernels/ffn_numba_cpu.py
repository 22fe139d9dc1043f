"""A feed-forward network for a CPU, from rows to rows: between its products everything stays in
the cache.

The rows of a block are the columns of panels (products_numba_cpu.py), so a weight is read where it
lies, and what one product makes is the next one's factor. ``gate`` and ``up`` are kept as panels
[P, F, WIDTH]; the hidden state is made again in the backward. An expert is a network whose rows
are gathered (`order`, as in moe_numba_cpu.py) and whose output is multiplied by a weight per row.

P panels of WIDTH rows hold a network's n rows; other letters as in `refimpl.ops.ffn`. A kernel gets
all of E networks, and a table of `Ids2` that says what of them is its part: in a row each the
network, its rows begin … end, and their panels begin … end.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .common_numba_cpu import (
    SAME,
    Ids1,
    Ids2,
    In1,
    In2,
    In3,
    Int,
    Out1,
    Out2,
    Out3,
    Out4,
    sigmoid,
    whole_vectors,
)
from .products_numba_cpu import (
    empty_panels,
    factor,
    multiply_far,
    multiply_transposed,
    outer_products,
    pack_columns,
    pack_rows,
    put_turned,
    unpack_rows,
    width_of,
)


@njit(**SAME)
def part_of(row):
    """The network of a table's row, its rows, and their panels."""
    return row[0], slice(row[1], row[2]), slice(row[3], row[4])


def networks_forward(
    y: Out2,
    gate: Out3,
    up: Out3,
    x: In2,
    order: Ids1,
    per_token: Int,
    w_gate: In3,
    w_up: In3,
    w_down: In3,
    table: Ids2,
) -> None:
    """``y`` [rows, D] of the rows order // per_token of ``x``; ``w_gate`` and ``w_up`` [E, F, D],
    ``w_down`` [E, D, F]."""
    for i in range(table.shape[0]):
        e, rows, panels = part_of(table[i])
        own = y[rows], gate[panels], up[panels]
        network_forward(*own, x, order[rows], per_token, w_gate[e], w_up[e], w_down[e])


@njit(**SAME)
def network_forward(y, gate, up, x, order, per_token, w_gate, w_up, w_down):
    """One network's."""
    whole_vectors()
    one = gate.dtype.type(1)
    rows = empty_panels(gate.shape[0], x.shape[1], x)
    pack_rows(rows, x, order, per_token)
    multiply_far(gate, factor(w_gate), rows, False)  # (ffn.1)
    multiply_far(up, factor(w_up), rows, False)
    hidden = empty_panels(gate.shape[0], gate.shape[1], x)
    h, g = hidden.reshape(-1), gate.reshape(-1)
    u = up.reshape(-1)
    for i in range(h.size):
        h[i] = g[i] * sigmoid(g[i], one) * u[i]  # (swiglu.1)
    multiply_far(rows, factor(w_down), hidden, False)  # (ffn.3)
    unpack_rows(y, rows)


def networks_backward(
    dx: Out2,
    dgate: Out3,
    dup: Out3,
    dy_panels: Out3,
    hidden: Out3,
    columns: Out3,
    dweights: Out1,
    dy: In2,
    x: In2,
    order: Ids1,
    per_token: Int,
    gate: In3,
    up: In3,
    weights: In1,
    w_gate: In3,
    w_up: In3,
    w_down: In3,
    gate_turned: Out4,
    up_turned: Out4,
    down_turned: Out4,
    table: Ids2,
) -> None:
    """Writes ``dx`` [rows, D], ``dgate`` and ``dup`` [P, F, WIDTH], ``dy_panels`` [P, D, WIDTH],
    the rows of ``dy``, ``hidden`` times the row's weight, in panels of its units
    [⌈F / WIDTH⌉, rows, WIDTH], ``columns`` [⌈D / WIDTH⌉, rows, WIDTH], the rows of ``x`` in panels
    of its columns, and ``dweights`` [rows].

    ``dy`` is the gradient of Σ weight · output, so dweights = Σ_f hidden_f dhidden_f with
    dhidden = w_downᵀ dy: the output is not needed. The weights' transposes are those of
    `put_weights` where one network's were made for all blocks; else they are empty. They are only
    read: a product is compiled anew for arrays that can't be written to.
    """
    for i in range(table.shape[0]):
        e, rows, panels = part_of(table[i])
        network_backward(
            dx[rows],
            dgate[panels],
            dup[panels],
            dy_panels[panels],
            hidden[:, rows],
            dweights[rows],
            dy,
            order[rows],
            per_token,
            gate[panels],
            up[panels],
            weights[rows],
            w_gate[e],
            w_up[e],
            w_down[e],
            gate_turned,
            up_turned,
            down_turned,
        )
        pack_columns(columns, x, order, per_token, table[i, 1], table[i, 2])


@njit(**SAME)
def network_backward(
    dx,
    dgate,
    dup,
    dy_panels,
    hidden,
    dweights,
    dy,
    order,
    per_token,
    gate,
    up,
    weights,
    w_gate,
    w_up,
    w_down,
    gate_turned,
    up_turned,
    down_turned,
):
    """One network's."""
    whole_vectors()
    one = gate.dtype.type(1)
    pack_rows(dy_panels, dy, order, per_token)
    dhidden = empty_panels(gate.shape[0], gate.shape[1], dy)
    multiply_transposed(dhidden, w_down, down_turned, dy_panels, False, w_gate)  # (ffn.4)
    width = width_of(gate)
    for panel in range(gate.shape[0]):
        first = panel * width
        count = min(width, order.size - first)
        weight, total = np.zeros(width, gate.dtype), np.zeros(width)  # a long sum: in float64
        for r in range(count):
            weight[r] = weights[first + r]
        for f in range(gate.shape[1]):
            g, u = gate[panel, f], up[panel, f]
            dg, du = dgate[panel, f], dup[panel, f]
            dh = dhidden[panel, f]
            for r in range(width):
                s = sigmoid(g[r], one)
                h = g[r] * s * u[r]
                total[r] += h * dh[r]
                d = dh[r] * weight[r]
                dg[r] = d * u[r] * (s + g[r] * s * (one - s))  # (swiglu.2)
                du[r] = d * g[r] * s  # (swiglu.3)
                dh[r] = h * weight[r]  # dhidden is used up: its place takes the hidden state
        for r in range(count):
            dweights[first + r] = total[r]
    _put_units(hidden, dhidden)
    rows = empty_panels(dy_panels.shape[0], dy_panels.shape[1], dy)
    multiply_transposed(rows, w_gate, gate_turned, dgate, False, w_up)
    multiply_transposed(rows, w_up, up_turned, dup, True, w_up[:0])  # (ffn.6)
    unpack_rows(dx, rows)


def put_weights(
    gate_turned: Out4,
    up_turned: Out4,
    down_turned: Out4,
    w_gate: In3,
    w_up: In3,
    w_down: In3,
    part: Int,
    parts: Int,
) -> None:
    """A part of the transposes of one network's weights."""
    put_turned(gate_turned, w_gate[0], part, parts)
    put_turned(up_turned, w_up[0], part, parts)
    put_turned(down_turned, w_down[0], part, parts)


@njit(**SAME)
def _put_units(hidden, panels):
    """``hidden`` [⌈F / WIDTH⌉, rows, WIDTH], a row's units beside each other, from ``panels``
    [P, F, WIDTH], a unit's rows beside each other. Zeros beyond."""
    width = width_of(hidden)
    for i in range(hidden.shape[0]):
        some = panels[:, i * width : (i + 1) * width]
        unpack_rows(hidden[i, :, : some.shape[1]], some)
        if some.shape[1] < width:
            hidden[i, :, some.shape[1] :] = 0


def weight_gradients(
    dw_gate: Out3,
    dw_up: Out3,
    dw_down: Out3,
    dgate: In3,
    dup: In3,
    dy_panels: In3,
    hidden: Out3,
    columns: Out3,
    table: Ids2,
) -> None:
    """The weights' gradients, a part of their rows: the table has two more columns, which part and
    of how many. The arrays are those of `networks_backward`; ``hidden`` and ``columns`` too are
    only read."""
    _, f, d = dw_gate.shape
    for i in range(table.shape[0]):
        e, rows, panels = part_of(table[i])
        part, parts = table[i, 5], table[i, 6]
        some = slice(f * part // parts, f * (part + 1) // parts)
        outer_products(dw_gate[e, some], dgate[panels, some], columns[:, rows], False)
        outer_products(dw_up[e, some], dup[panels, some], columns[:, rows], False)
        some = slice(d * part // parts, d * (part + 1) // parts)
        outer_products(dw_down[e, some], dy_panels[panels, some], hidden[:, rows], False)
