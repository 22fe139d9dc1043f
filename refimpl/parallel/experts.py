"""The mixture of experts whose experts lie on several ranks: rows travel to their expert and back.

Each rank routes its own tokens, and sends every dispatched row to the rank that holds its expert
(dispatch); there the rows run through the very op `moe`, with one choice of weight 1 each, and the
outputs return (combine), to be weighted and added up. Dispatch and combine are each other's
adjoint: the backward sends the outputs' gradients as the forward sent rows, and the rows' gradients
as it sent outputs. Weight gradients never travel: an expert's are summed where it lies, over the
tokens of the whole group. Derivation: derivations/parallel.md. Letters: D model, E experts, K
top-k; M tokens of this rank, Q rows that it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from ..array import Array, argsort, integers, library, take_rows, zeros
from ..config import ModelConfig
from ..ops import Op, Ops
from ..ops.router import expert_load
from ..parameters import is_stacked
from .group import Group

__all__ = ["OwnExperts", "held", "spread_experts"]


class OwnExperts:
    """Those experts of a stack that this rank holds; to `forward` it has the shape of the whole."""

    def __init__(self, own: Array, experts: int) -> None:
        self.own = own  # [those of this rank, …]
        self.shape = (experts, *own.shape[1:])
        self.dtype = own.dtype


def held(params: Mapping[str, Array], config: ModelConfig) -> dict[str, Any]:
    """Parameters whose stacks are this rank's rows alone, as `forward` takes them."""
    return {
        name: OwnExperts(x, config.experts) if is_stacked(name) else x for name, x in params.items()
    }


class Trip(NamedTuple):
    """How this rank's rows, sorted by expert, travel to the ranks of their experts, and back."""

    group: Group
    sent: list[int]  # rows that go to each rank, in order
    came: list[int]  # rows that come from each

    def there(self, rows: Array) -> Array:
        """[M·K, D] of this rank to [Q, D], the rows of all ranks for this rank's experts."""
        return self._exchanged(rows, self.sent)

    def back(self, rows: Array) -> Array:
        """[Q, D] to [M·K, D]: the adjoint of `there`."""
        return self._exchanged(rows, self.came)

    def _exchanged(self, rows: Array, sizes: list[int]) -> Array:
        pieces = [rows[a:b, :] for a, b in pairwise(accumulate(sizes, initial=0))]
        return library(rows).concat(self.group.swap(pieces), axis=0)


class Saved(NamedTuple):
    weights: Array  # [M, K]
    outputs: Array  # [M, K, D]: each chosen expert's output
    order: Array  # [M·K]: dispatched row r holds token order[r] // K
    trip: Trip
    experts: Any  # saved of `moe` on the Q rows; None without rows
    shapes: list[tuple[int, ...]]  # of x, and of the three stacks of this rank
    shared: Any  # saved of the shared experts, None without


def spread_experts(ops: Ops, group: Group, starts: list[int]) -> Ops:
    """The table whose `moe` takes `OwnExperts`: rank r of ``group`` holds the experts from
    ``starts[r]`` to ``starts[r + 1]``."""
    inner: Any = ops.moe  # for the experts of this rank
    ffn: Any = ops.ffn  # for the shared ones

    def moe_forward(
        x: Array,
        weights: Array,
        w_gate: OwnExperts,
        w_up: OwnExperts,
        w_down: OwnExperts,
        *w_shared: Array | None,
        indices: Array,
        ops: Ops,
    ) -> tuple[Array, Saved]:
        xp, own = library(x), [w.own for w in (w_gate, w_up, w_down)]
        d, top_k = x.shape[-1], indices.shape[-1]
        rows, weights = xp.reshape(x, (-1, d)), xp.reshape(weights, (-1, top_k))
        order = argsort(xp.reshape(indices, (-1,)))
        load = integers(expert_load(indices, starts[-1]))
        loads = [load[a:b] for a, b in pairwise(starts)]  # of each rank's experts
        wanted = group.swap(loads)
        trip = Trip(group, [sum(x) for x in loads], [sum(x) for x in wanted])
        out = trip.there(take_rows(rows, order // top_k))  # (parallel.1)
        experts = shared = None
        if out.shape[0]:
            one, chosen = xp.ones_like(out[:, :1]), _chosen(wanted, x)
            out, experts = inner.forward(out, one, *own, None, None, None, indices=chosen, ops=ops)
        outputs = take_rows(trip.back(out), argsort(order))  # (parallel.2)
        outputs = xp.reshape(outputs, (-1, top_k, d))
        y = xp.sum(weights[..., None] * outputs, axis=1)
        if w_shared[0] is not None:
            y_shared, shared = ffn.forward(rows, *w_shared, ops=ops)
            y = y + y_shared
        shapes = [x.shape, *(w.shape for w in own)]
        saved = Saved(weights, outputs, order, trip, experts, shapes, shared)
        return xp.reshape(y, x.shape), saved

    def moe_backward(dy: Array, saved: Saved) -> tuple[Array | None, ...]:
        weights, outputs, order, trip, experts, (x_shape, *w_shapes), shared = saved
        xp, (top_k, d) = library(dy), outputs.shape[1:]
        rows = xp.reshape(dy, (-1, d))
        dweights = xp.sum(rows[:, None, :] * outputs, axis=-1)
        doutputs = xp.reshape(weights[..., None] * rows[:, None, :], (-1, d))
        drows = trip.there(take_rows(doutputs, order))  # (parallel.2), backwards
        dw = [zeros(shape, rows) for shape in w_shapes]
        if experts is not None:
            drows, _, *dw = inner.backward(drows, experts)[:5]
        dslots = take_rows(trip.back(drows), argsort(order))  # (parallel.1), backwards
        dx = xp.sum(xp.reshape(dslots, (-1, top_k, d)), axis=1)
        dshared: list[Array | None] = [None, None, None]
        if shared is not None:
            dx_shared, *dshared = ffn.backward(rows, shared)
            dx = dx + dx_shared
        dweights = xp.reshape(dweights, (*x_shape[:-1], top_k))
        return xp.reshape(dx, x_shape), dweights, *dw, *dshared

    return ops | {"moe": Op(moe_forward, moe_backward)}


def _chosen(wanted: list[list[int]], like: Array) -> Array:
    """Which of this rank's experts each received row is for, [Q, 1]: of every rank a block, sorted
    by expert, ``wanted[r][e]`` rows for expert e."""
    xp = library(like)
    experts = [e for load in wanted for e, count in enumerate(load) for _ in range(count)]
    return xp.asarray(experts, dtype=xp.int64, device=like.device)[:, None]
