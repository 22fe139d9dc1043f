"""The two ops that read a `LazyTensor` a piece at a time: `embedding` by the row, `moe` by the
expert.

They take the place of the ops of that name in a table, and give the same numbers. Letters: B batch,
T position, D model, W vocabulary, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..array import argsort, blocks, expect_ids, scatter_add
from ..checkpoint.lazy import LazyTensor
from ..checkpoint.names import stored_names
from ..ops import Ops, expert_load
from ..ops.moe import expert_rows

__all__ = [
    "Rows",
    "embedding_backward",
    "embedding_forward",
    "moe_backward",
    "moe_forward",
    "moe_postponed",
    "sum_in_blocks",
]

ROWS = 4096  # of a table of the vocabulary's length, summed and written at a time

Write = Callable[[str, np.ndarray | None], None]


# The embedding


class Rows(NamedTuple):
    """The gradient of an embedding table, of which only the rows of ``ids`` are not 0."""

    ids: np.ndarray  # [M]
    values: np.ndarray  # [M, D]: added where an id occurs again

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the whole gradient."""
        inside = (self.ids >= start) & (self.ids < stop)
        return scatter_add(self.ids[inside] - start, self.values[inside], stop - start)  # type: ignore[no-any-return]


def embedding_forward(w: LazyTensor, *, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows ``ids`` [B, T] of ``w`` [W, D], each read once."""
    ids = expect_ids("ids", ids, w.shape[0])
    distinct, place = np.unique(ids, return_inverse=True)
    return w[distinct][place.reshape(ids.shape)], ids


def embedding_backward(dy: np.ndarray, ids: np.ndarray) -> Rows:
    """The gradient of the table, from ``dy`` [B, T, D] and ``ids`` [B, T]."""
    return Rows(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))


def sum_in_blocks(
    parts: Sequence[np.ndarray | Rows], length: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The sum of gradients of one tensor of ``length`` rows, added in their order: the first row of
    each block, and the block."""
    for start, stop in blocks(length, ROWS):
        total: Any = None
        for part in parts:
            block = part.block(start, stop) if isinstance(part, Rows) else part[start:stop]
            total = block if total is None else total + block
        yield start, total


# The mixture of experts


class MoESaved(NamedTuple):
    x: np.ndarray  # [B, T, D]
    weights: np.ndarray  # [B, T, K]
    stacks: tuple[LazyTensor, ...]  # gate, up and down of the experts, each [E, …]
    shared: tuple[np.ndarray | None, ...]  # gate, up and down of the shared experts
    indices: np.ndarray  # [B, T, K]
    ops: Ops

    def expert(self, expert: int) -> list[np.ndarray]:
        """One expert's weights, read now."""
        return [np.asarray(stack[expert]) for stack in self.stacks]

    def slots(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each expert that has tokens, and the places among the [B·T·K] choices that are its
        own."""
        order = argsort(self.indices.reshape(-1))
        for expert, rows in expert_rows(expert_load(self.indices, self.stacks[0].shape[0])):
            yield expert, order[rows]


def moe_postponed(
    x: np.ndarray,
    weights: np.ndarray,
    w_gate: LazyTensor,
    w_up: LazyTensor,
    w_down: LazyTensor,
    *shared: np.ndarray | None,
    indices: np.ndarray,
    ops: Ops,
) -> tuple[np.ndarray, MoESaved]:
    """As `moe_forward`, for a step that needs the backward alone: no expert is run, and y is 0."""
    saved = MoESaved(x, weights, (w_gate, w_up, w_down), shared, indices, ops)
    return np.zeros_like(x), saved


def moe_forward(*args: Any, **kwargs: Any) -> tuple[np.ndarray, MoESaved]:
    """`refimpl.ops.moe_forward`, with one expert's weights in memory at a time."""
    _, saved = moe_postponed(*args, **kwargs)
    x, weights, _, shared, indices, ops = saved
    rows = x.reshape(-1, x.shape[-1])
    top_k = indices.shape[-1]
    outputs = np.empty((indices.size, x.shape[-1]), x.dtype)
    for expert, slots in saved.slots():
        tokens = rows[slots // top_k]
        outputs[slots] = ops.ffn.forward(tokens, *saved.expert(expert), ops=ops)[0]
    y = np.sum(weights.reshape(-1, top_k, 1) * outputs.reshape(-1, top_k, x.shape[-1]), axis=1)
    if shared[0] is not None:
        y = y + ops.ffn.forward(rows, *shared, ops=ops)[0]
    return y.reshape(x.shape), saved


def moe_backward(dy: np.ndarray, saved: MoESaved, *, write: Write) -> tuple[np.ndarray | None, ...]:
    """As `refimpl.ops.moe_backward`, but it runs each expert again. The gradients of its weights go
    to ``write`` under the checkpoint's names, None where it has no tokens and they are 0; in the
    result they are None."""
    x, weights, stacks, shared, indices, ops = saved
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    top_k, flat = indices.shape[-1], weights.reshape(-1, 1)
    dweights = np.empty(indices.size, x.dtype)
    dslots = np.empty((indices.size, x.shape[-1]), x.dtype)
    # by expert, the names of its three weights
    idle = dict(enumerate(zip(*(stored_names(w.name, w.shape) for w in stacks), strict=True)))
    for expert, slots in saved.slots():
        tokens = slots // top_k
        y, ffn_saved = ops.ffn.forward(rows[tokens], *saved.expert(expert), ops=ops)
        dweights[slots] = np.sum(dy_rows[tokens] * y, axis=-1)
        dslots[slots], *dw = ops.ffn.backward(flat[slots] * dy_rows[tokens], ffn_saved)
        for name, gradient in zip(idle.pop(expert), dw, strict=True):
            write(name, gradient)
    for names in idle.values():
        for name in names:
            write(name, None)
    dx = np.sum(dslots.reshape(-1, top_k, x.shape[-1]), axis=1)
    dshared: list[np.ndarray | None] = [None, None, None]
    if shared[0] is not None:
        shared_saved = ops.ffn.forward(rows, *shared, ops=ops)[1]
        dx_shared, *dshared = ops.ffn.backward(dy_rows, shared_saved)
        dx = dx + dx_shared
    return dx.reshape(x.shape), dweights.reshape(weights.shape), None, None, None, *dshared
