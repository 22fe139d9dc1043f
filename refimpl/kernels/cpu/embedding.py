"""Embedding whose gradient is added up by kernels/embedding_numba_cpu.py; as
`refimpl.ops.embedding`."""

from __future__ import annotations

from functools import partial

from ...array import Array, expect
from ...ops.embedding import EmbeddingSaved, embedding_forward
from .compile import kernel
from .host import empty, expect_real, ready, rows_of
from .moe import by_expert
from .pool import blocks_of, run_kernels

__all__ = ["embedding_backward", "embedding_forward"]

SOME = 256  # rows of one sum
ENTRIES = 2**20  # numbers of the gradient that one task writes: most are 0


def embedding_backward(dy: Array, saved: EmbeddingSaved) -> Array:
    """As `refimpl.ops.embedding_backward`, by kernels of Numba."""
    dtype = expect_real(dy=dy)
    expect("dy", dy, "(…, D)", (*saved.ids.shape, saved.shape[1]))
    dw, ids = empty(saved.shape, dy), ready(saved.ids.reshape(-1))
    order, _, start = by_expert(ids, saved.shape[0])  # a token's rows, as an expert's slots
    add, rows = kernel("embedding", "embedding_backward", dtype), ready(rows_of(dy))
    run_kernels(
        [
            partial(add, dw[i], rows, order, start[i.start : i.stop + 1], SOME)
            for i in blocks_of(saved.shape[0], max(1, ENTRIES // saved.shape[1]))
        ]
    )
    return dw
