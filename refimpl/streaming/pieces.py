"""Parameters and gradients a piece at a time: the ops `embedding` and `moe` of the table, which
read rows and experts when they need them, and what takes the gradients that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..array import argsort, blocks, expect_ids, scatter_add
from ..checkpoint.source import Source
from ..config import ModelConfig
from ..model import Gradients
from ..ops import AnyOp, Op, Ops, expert_load
from ..parameters import parameter_shapes

EMBEDDING = "model.embed_tokens.weight"
ROWS = 4096  # of a table of the vocabulary's length, summed and written at a time


class Pieces:
    """A parameter that is read a piece at a time; an array to those who look at its type and shape
    alone."""

    device = "cpu"

    def __init__(self, source: Source, name: str, shape: tuple[int, ...]) -> None:
        self.source, self.name, self.shape, self.dtype = source, name, shape, source.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.source.piece(self.name, index)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return np


class LazyParameters(Mapping[str, Any]):
    """The parameters that a block asks for, read when it does and kept by nobody but it."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.source, self.shapes = source, parameter_shapes(config)

    def __getitem__(self, name: str) -> Any:
        shape = self.shapes[name]
        if name == EMBEDDING or ".experts." in name:
            return Pieces(self.source, name, shape)
        return self.source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Rows(NamedTuple):
    """The gradient of a lookup: as much as was looked up, not as much as the table."""

    ids: np.ndarray  # [M]
    values: np.ndarray  # [M, D]

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop of the table's gradient."""
        inside = (self.ids >= start) & (self.ids < stop)
        return scatter_add(self.ids[inside] - start, self.values[inside], stop - start)  # type: ignore[no-any-return]


def embedding_forward(w: Pieces, *, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`ops.embedding_forward`, reading the rows that are looked up."""
    ids = expect_ids("ids", ids, w.shape[0])
    distinct, place = np.unique(ids, return_inverse=True)
    return w[distinct][place.reshape(ids.shape)], ids


def embedding_backward(dy: np.ndarray, ids: np.ndarray) -> Rows:
    return Rows(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))


class MoESaved(NamedTuple):
    x: np.ndarray  # [B, T, D]
    weights: np.ndarray  # [B, T, K]
    stacks: tuple[Pieces, ...]  # gate, up and down of the experts
    shared: tuple[np.ndarray | None, ...]
    indices: np.ndarray  # [B, T, K]
    ops: Ops


def moe_op(
    sink: Callable[[str, np.ndarray | None], None] = lambda name, gradient: None,
    *,
    output: bool = True,
) -> AnyOp:
    """`ops.moe` with one expert's weights in memory at a time; the same numbers.

    The backward runs each expert again and gives the gradient of its weights to ``sink`` (name,
    gradient or None for zeros), so that the layer's are never together. ``output``: False for a
    forward whose output nobody reads, since only the backward is wanted: it is 0, and no expert is
    run for it.
    """

    def forward(
        x: np.ndarray,
        weights: np.ndarray,
        w_gate: Pieces,
        w_up: Pieces,
        w_down: Pieces,
        *shared: np.ndarray | None,
        indices: np.ndarray,
        ops: Ops,
    ) -> tuple[np.ndarray, MoESaved]:
        saved = MoESaved(x, weights, (w_gate, w_up, w_down), shared, indices, ops)
        if not output:
            return np.zeros_like(x), saved
        rows, top_k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
        outputs = np.empty((indices.size, x.shape[-1]), x.dtype)
        for expert, slots in dispatch(indices, w_gate.shape[0]):
            if slots.size:
                outputs[slots] = ops.ffn.forward(
                    rows[slots // top_k], *experts(saved, expert), ops=ops
                )[0]
        y = np.sum(weights.reshape(-1, top_k, 1) * outputs.reshape(-1, top_k, x.shape[-1]), axis=1)
        if shared[0] is not None:
            y = y + ops.ffn.forward(rows, *shared, ops=ops)[0]
        return y.reshape(x.shape), saved

    def backward(dy: np.ndarray, saved: MoESaved) -> tuple[np.ndarray | None, ...]:
        x, weights, stacks, shared, indices, ops = saved
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        top_k, flat = indices.shape[-1], weights.reshape(-1, 1)
        dweights, dslots = (
            np.empty(indices.size, x.dtype),
            np.empty((indices.size, x.shape[-1]), x.dtype),
        )
        for expert, slots in dispatch(indices, stacks[0].shape[0]):
            dw: list[np.ndarray | None] = [None, None, None]
            if slots.size:
                token = slots // top_k
                y, ffn_saved = ops.ffn.forward(rows[token], *experts(saved, expert), ops=ops)
                dweights[slots] = np.sum(dy_rows[token] * y, axis=-1)
                dslots[slots], *dw = ops.ffn.backward(flat[slots] * dy_rows[token], ffn_saved)
            for stack, gradient in zip(stacks, dw, strict=True):
                sink(stack.name.replace(".experts.", f".experts.{expert}."), gradient)
        dx = np.sum(dslots.reshape(-1, top_k, x.shape[-1]), axis=1)
        dshared: list[np.ndarray | None] = [None, None, None]
        if shared[0] is not None:
            dx_shared, *dshared = ops.ffn.backward(
                dy_rows, ops.ffn.forward(rows, *shared, ops=ops)[1]
            )
            dx = dx + dx_shared
        return dx.reshape(x.shape), dweights.reshape(weights.shape), None, None, None, *dshared

    return Op(forward, backward)


def dispatch(indices: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each expert, and the slots (token · K + k) that chose it, in their order."""
    order, stop = argsort(indices.reshape(-1)), np.cumsum(expert_load(indices, count))
    for expert in range(count):
        yield expert, order[stop[expert - 1] if expert else 0 : stop[expert]]


def experts(saved: MoESaved, expert: int) -> list[np.ndarray]:
    return [stack[expert] for stack in saved.stacks]


class Sink(Gradients):
    """Where a backward adds its gradients: straight into a file; those of shared tensors are
    kept."""

    def __init__(self, write: Callable[[str, np.ndarray | None], None]) -> None:
        super().__init__({})
        self.write, self.shared = write, list[tuple[str, Any]]()

    def add(self, name: str, gradient: Any) -> None:
        if name in (EMBEDDING, "lm_head.weight"):
            self.shared.append((name, gradient))
        elif gradient is not None:
            self.write(name, gradient)


def summed(parts: list[Any], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """The sum of gradients of one tensor, some rows at a time and in the order of ``parts``."""
    for start, stop in blocks(length, ROWS):
        total: Any = None
        for part in parts:
            block = part.block(start, stop) if isinstance(part, Rows) else part[start:stop]
            total = block if total is None else total + block
        yield start, total
