"""Balance loss on kernels/balance_loss_numba_cpu.py; as `refimpl.ops.balance_loss`.

What is not the usual call, errors among them, is left to the reference, which saves the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ...array import Array
from ...ops.balance_loss import BalanceLossSaved
from ...ops.leaves import LEAVES
from .compile import kernel
from .host import empty, expect_real, ready, some_rows
from .pool import run_kernels

__all__ = ["balance_loss_backward", "balance_loss_forward"]


def balance_loss_forward(
    scores: Array,
    *,
    alpha: float,
    top_k: int,
    counted: Array | None = None,
    mask: Array | None = None,
    sequences: float | None = None,
    cut: tuple[Array, Array] | None = None,
) -> tuple[Array, BalanceLossSaved]:
    """As `refimpl.ops.balance_loss_forward`, by kernels of Numba."""
    dtype = expect_real(scores=scores)
    if cut is not None or not _usual(scores, top_k, counted, mask):
        return LEAVES.balance_loss.forward(
            scores,
            alpha=alpha,
            top_k=top_k,
            counted=counted,
            mask=mask,
            sequences=sequences,
            cut=cut,
        )
    b, t, e = scores.shape
    valid = np.ones((b, t), bool)
    if mask is not None:
        valid, scores = ready(mask), np.where(mask[:, :, None], scores, scores.dtype.type(1))
    scores, counted = ready(scores), ready(np.reshape(counted, (b, -1)))  # type: ignore[arg-type]
    loss, f = empty((b,), scores), empty((b, e), scores)
    weight = empty((b, t), scores)
    forward = kernel("balance_loss", "balance_loss_forward", dtype)
    by_sequence = loss, f, weight, scores, counted, valid
    settings = float(alpha), top_k, float(sequences or b)
    blocks = some_rows(b, t * e)
    run_kernels([partial(forward, *(x[i] for x in by_sequence), *settings) for i in blocks])
    return np.sum(loss), BalanceLossSaved(scores, f[:, None, :], weight[:, :, None])


def balance_loss_backward(dloss: Array, saved: BalanceLossSaved) -> Array:
    """As `refimpl.ops.balance_loss_backward`, by kernels of Numba."""
    scores, f, weight = saved
    backward = kernel("balance_loss", "balance_loss_backward", expect_real(scores=scores))
    dscores = empty(scores.shape, scores)
    by_sequence = dscores, ready(scores), ready(f[:, 0]), ready(weight[:, :, 0])
    factor = scores.dtype.type(dloss)
    blocks = some_rows(len(scores), scores[0].size)
    run_kernels([partial(backward, *(x[i] for x in by_sequence), factor) for i in blocks])
    return dscores


def _usual(scores: Array, top_k: int, counted: Any, mask: Any) -> bool:
    """Whether arguments are what the model gives, and right."""
    b, t, e = scores.shape if scores.ndim == 3 else (0, 0, 0)
    masked = isinstance(mask, np.ndarray) and mask.shape == (b, t) and mask.dtype == bool
    return (
        scores.size > 0
        and 1 <= top_k <= e
        and (mask is None or masked)
        and isinstance(counted, np.ndarray)
        and counted.dtype == np.int64
        and counted.shape[:-1] == (b, t)
        and counted.size > 0
        and counted.min() >= 0
        and counted.max() < e
    )
