"""Output head and cross-entropy in one; as `refimpl.ops.head_cross_entropy`, but that the table's
``log_prob`` is not looked up.

The gradients are linear in the scalar ``dloss``, so the forward makes them for dloss = 1 from the
logits that it has, a chunk of tokens at a time, and the backward multiplies: three products where
making the logits again takes four. A forward whose backward is never called does two too many.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, number
from ...ops.leaves import LEAVES, Leaves, expect_table
from ...ops.log_prob import check_log_prob
from .host import empty, expect_real, some_rows
from .log_prob import Chunk, counted_rows
from .pool import run_kernels

__all__ = ["HeadCrossEntropySaved", "head_cross_entropy_backward", "head_cross_entropy_forward"]


class HeadCrossEntropySaved(NamedTuple):
    """What `head_cross_entropy_forward` keeps for `head_cross_entropy_backward`."""

    dh: Array  # […, D], for dloss = 1
    dw: Array  # [W, D], likewise


def head_cross_entropy_forward(
    h: Array,
    w: Array,
    *,
    targets: Array,
    mask: Array | None = None,
    normaliser: float | None = None,
    block: tuple[int, int] = (256, 4096),
    ops: Leaves = LEAVES,
) -> tuple[Array, HeadCrossEntropySaved]:
    """As `refimpl.ops.head_cross_entropy_forward`, by kernels of Numba."""
    expect_table(ops, Leaves)
    expect_real(h=h, w=w)
    check_log_prob(h, w, targets, 1.0, block)
    rows, targets, weight = counted_rows(h, targets, mask, normaliser, w)
    dh, dw = empty(rows.shape, h), empty(w.shape, h)
    log_p, lse = empty(weight.shape, h), empty(weight.shape, h)
    for chunk in Chunk.all(rows, w, 1.0, block):
        i = chunk.rows
        lse[i] = chunk.lse()
        log_p[i] = chunk.of_targets(targets[i]) - lse[i]
        chunk.gradient((lse, weight, targets), dh[i], dw)
    loss = -np.sum(weight * log_p)  # (head_cross_entropy.1)
    return loss, HeadCrossEntropySaved(dh.reshape(h.shape), dw)


def head_cross_entropy_backward(dloss: Array, saved: HeadCrossEntropySaved) -> tuple[Array, Array]:
    """As `refimpl.ops.head_cross_entropy_backward`, by kernels of Numba."""
    factor = number(dloss, saved.dw)  # (head_cross_entropy.2)
    dh, dw = (empty(x.shape, x) for x in saved)
    tasks = []
    for x, out in zip(saved, (dh, dw), strict=True):
        flat, scaled = x.reshape(-1), out.reshape(-1)
        parts = some_rows(flat.size)
        tasks += [partial(np.multiply, flat[i], factor, out=scaled[i]) for i in parts]
    run_kernels(tasks)
    return dh, dw
