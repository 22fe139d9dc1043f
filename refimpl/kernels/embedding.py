"""Token embedding on kernels/embedding.cu; as `refimpl.ops.embedding`, and for bfloat16 (dw is
float32 then)."""

from __future__ import annotations

import numpy as np

from ..array import Array, argsort, expect, expect_ids
from ..ops import AnyOp, Op
from ..ops.embedding import EmbeddingSaved
from .host import Kernels, cover, numbers, ready
from .launch import Launch

__all__ = ["embedding"]

THREADS = 128
LANES = 4  # as in the kernel


def embedding(launch: Launch) -> AnyOp:
    """The op on ``launch``."""
    kernels = Kernels(launch, "embedding")

    def embedding_forward(w: Array, *, ids: Array) -> tuple[Array, EmbeddingSaved]:
        n = numbers(w=w)
        expect("w", w, "(W, D)", (None, None))
        ids = ready(expect_ids("ids", ids, w.shape[0]))
        d, w = w.shape[1], ready(w)
        y = kernels.empty((*ids.shape, d), w.dtype, w)
        blocks = cover(ids.size * cover(d, n.vector), THREADS)
        kernels("embedding_gather", n.storage, blocks, THREADS, y, w, ids, np.int64(ids.size), d)
        return y, EmbeddingSaved(ids, tuple(w.shape))

    def embedding_backward(dy: Array, saved: EmbeddingSaved) -> Array:
        n, (vocabulary, d) = numbers(dy=dy), saved.shape
        expect("dy", dy, "(…, D)", (*saved.ids.shape, d))
        dy, order = ready(dy), ready(argsort(saved.ids.reshape(-1)), np.int64)
        ids = ready(saved.ids.reshape(-1)[order], np.int64)
        start = ready(
            n.xp.flatnonzero(n.xp.diff(ids, prepend=-1)), np.int64
        )  # where another id begins
        run = 1 << (ids.size.bit_length() // 2)  # about √rows
        runs, columns = ids.size // run, cover(d, 32 * n.vector)
        dw, part = n.xp.zeros((vocabulary, d), dtype=n.real), kernels.empty((runs, d), n.real, dy)
        kernels(
            "embedding_runs", n.storage, runs * columns, (32, LANES), part, dy, order, ids, run, d
        )
        kernels(
            "embedding_backward",
            n.storage,
            start.size * columns,
            (32, LANES),
            dw,
            part,
            dy,
            order,
            ids,
            start,
            np.int64(ids.size),
            np.int64(start.size),
            run,
            d,
        )
        return dw

    return Op(embedding_forward, embedding_backward)
