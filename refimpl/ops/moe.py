"""Mixture of experts: send each token to its experts, run them, and add up what comes back; shared
experts on top.

Tokens are sorted by expert, so each expert works on one contiguous block of rows: exactly T·K rows
in all, no masks over tokens × experts × capacity, and nothing is dropped. An expert without tokens
gets zero gradients. Source: DeepSeek-V3 (2412.19437) eq. 12. Derivation: derivations/moe.md.
Letters: D model, E experts, K top-k, F hidden width of an expert; ``…`` any leading dimensions, M
their product (tokens), and M·K the rows that are dispatched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..array import (
    Array,
    argsort,
    expect,
    expect_some,
    expect_that,
    integers,
    last,
    library,
    namespace,
    put,
    take_rows,
    zeros,
)
from .ffn import ffn_backward, ffn_forward
from .leaves import Leaves, Op, expect_table
from .router import expert_load

__all__ = [
    "Expert",
    "MoESaved",
    "Networks",
    "expert_rows",
    "experts_backward",
    "experts_forward",
    "moe_backward",
    "moe_forward",
]


class Networks(Leaves):
    """The leaves, and the network that every expert is."""

    label = "NETWORKS"
    ffn = Op(ffn_forward, ffn_backward)


NETWORKS = Networks()


class Expert(NamedTuple):
    """One expert that has tokens."""

    expert: int
    rows: slice  # of the dispatched rows
    saved: Any  # of its network


class MoESaved(NamedTuple):
    """What `moe_forward` keeps for `moe_backward`."""

    weights: Array  # [M, K]
    outputs: Array  # [M, K, D]: each chosen expert's output; times dy, the weight's gradient
    order: Array  # [M·K]: dispatched row r holds token order[r] // K
    experts: list[Expert]
    shared: Any  # saved of the shared experts, None without
    shapes: tuple[tuple[int, ...], ...]  # of x, w_gate, w_up, w_down
    ops: Networks


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
    """y = Σ_k weights_k · expert_{indices_k}(x) + shared(x), for each row of ``x`` […, D]; returns
    y […, D].

    Args:
        weights, indices: […, K], from `router_forward`.
        w_gate, w_up, w_down: [E, F, D], [E, F, D], [E, D, F]: the routed experts, stacked.
        w_shared_gate, w_shared_up, w_shared_down: [Fs, D], [Fs, D], [D, Fs]: one network as wide as
            all shared experts together, added unscaled; None without shared experts.
    """
    xp = namespace(x=x, weights=weights, w_gate=w_gate)
    expect_table(ops, Networks)
    check_shapes(
        x, weights, indices, w_gate, w_up, w_down, w_shared_gate, w_shared_up, w_shared_down
    )
    d, top_k = x.shape[-1], indices.shape[-1]
    rows = xp.reshape(x, (-1, d))
    order = argsort(xp.reshape(indices, (-1,)))  # (moe.1)
    dispatched = take_rows(rows, order // top_k)  # (moe.2)
    load = expert_load(indices, w_gate.shape[0])
    out, experts = experts_forward(dispatched, load, w_gate, w_up, w_down, ops)
    outputs = xp.reshape(take_rows(out, argsort(order)), (-1, top_k, d))  # (moe.4)
    weights = xp.reshape(weights, (-1, top_k))
    y = xp.sum(weights[..., None] * outputs, axis=1)  # (moe.5)
    shared = None
    if w_shared_gate is not None:
        shared_y, shared = ops.ffn.forward(rows, w_shared_gate, w_shared_up, w_shared_down, ops=ops)
        y = y + shared_y  # (moe.6)
    shapes = (x.shape, w_gate.shape, w_up.shape, w_down.shape)
    return xp.reshape(y, x.shape), MoESaved(weights, outputs, order, experts, shared, shapes, ops)


def moe_backward(dy: Array, saved: MoESaved) -> tuple[Array | None, ...]:
    """Gradients (dx, dweights, dw_gate, dw_up, dw_down, dw_shared_gate, dw_shared_up,
    dw_shared_down) from ``dy`` […, D]."""
    weights, outputs, order, experts, shared, (x_shape, *w_shapes), ops = saved
    xp = namespace(dy=dy, weights=weights)
    expect("dy", dy, "(…, D)", tuple(x_shape))
    d, top_k = x_shape[-1], weights.shape[1]
    rows = xp.reshape(dy, (-1, d))
    dweights = xp.sum(rows[:, None, :] * outputs, axis=-1)  # (moe.7)
    doutputs = xp.reshape(weights[..., None] * rows[:, None, :], (-1, d))  # (moe.8)
    dout = take_rows(doutputs, order)  # (moe.9)
    dx_dispatched, dw = experts_backward(
        dout, experts, [zeros(shape, rows) for shape in w_shapes], ops
    )
    dslots = xp.reshape(take_rows(dx_dispatched, argsort(order)), (-1, top_k, d))
    dx = xp.sum(dslots, axis=1)  # (moe.11)
    dshared: Sequence[Array | None] = [None, None, None]
    if shared is not None:
        dx_shared, *dshared = ops.ffn.backward(rows, shared)
        dx = dx + dx_shared  # (moe.12)
    # (moe.10), (moe.12)
    return xp.reshape(dx, x_shape), xp.reshape(dweights, (*x_shape[:-1], top_k)), *dw, *dshared


def expert_rows(load: Array) -> Iterator[tuple[int, slice]]:
    """Each expert that has tokens, by ``load`` [E], and its block of the dispatched rows."""
    start = 0
    for expert, count in enumerate(integers(load)):
        if count:
            yield expert, slice(start, start + count)
        start += count


def experts_forward(
    dispatched: Array, load: Array, w_gate: Array, w_up: Array, w_down: Array, ops: Networks
) -> tuple[Array, list[Expert]]:
    """The output of each row of ``dispatched`` [M·K, D], and what each expert's backward needs.

    ``load`` [E] says how many rows each expert has, in order; ``w_gate`` and ``w_up`` are
    [E, F, D], ``w_down`` is [E, D, F].
    """
    outputs, experts = [], []
    for expert, rows in expert_rows(load):
        w = w_gate[expert, ...], w_up[expert, ...], w_down[expert, ...]
        out, saved = ops.ffn.forward(dispatched[rows, :], *w, ops=ops)  # (moe.3)
        outputs.append(out)
        experts.append(Expert(expert, rows, saved))
    return library(dispatched).concat(outputs, axis=0), experts


def experts_backward(
    dout: Array, experts: Sequence[Expert], dw: Sequence[Array], ops: Networks
) -> tuple[Array, list[Array]]:
    """The gradient of each dispatched row [M·K, D] from that of its output, ``dout`` [M·K, D], and
    ``dw`` (zeros, stacked as the weights) with each expert's gradients put in their place."""
    drows, dw = [], list(dw)
    for expert, rows, saved in experts:
        dx, *dw_expert = ops.ffn.backward(dout[rows, :], saved)  # (moe.10)
        drows.append(dx)
        dw = [put(total, (expert, ...), part) for total, part in zip(dw, dw_expert, strict=True)]
    return library(dout).concat(drows, axis=0), dw


def check_shapes(
    x: Array,
    weights: Array,
    indices: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    *shared: Array | None,
) -> None:
    """ValueError unless what `moe_forward` is given fits together."""
    expect("w_gate", w_gate, "(E, F, D)", (None, None, last(x, "x")))
    expect_some("w_gate", w_gate, "(E, F, D)")
    experts, f, d = w_gate.shape
    slots = (*x.shape[:-1], last(indices, "indices"))
    expect("indices", indices, "(…, K)", slots)
    expect("weights", weights, "(…, K)", slots)
    expect("w_up", w_up, "(E, F, D)", (experts, f, d))
    expect("w_down", w_down, "(E, D, F)", (experts, d, f))
    expect_that(
        len({w is None for w in shared}) == 1,
        "w_shared_gate, w_shared_up and w_shared_down must all be given, or all be None",
    )
    if shared[0] is not None:
        expect("w_shared_gate", shared[0], "(F, D)", (None, d))
        expect("w_shared_up", shared[1], "(F, D)", tuple(shared[0].shape))
        expect("w_shared_down", shared[2], "(D, F)", (d, shared[0].shape[0]))
    expect_that(
        indices.size > 0,
        f"x and indices must have at least one row and one choice, got {x.shape} and "
        f"{indices.shape}",
    )
