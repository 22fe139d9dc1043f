"""Cross-entropy of given logits on kernels/cross_entropy_numba_cpu.py; as
`refimpl.ops.cross_entropy`.

Saved are the logits and two numbers per row, not the probabilities.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, last, number
from ...ops.cross_entropy import token_weights
from .compile import kernel
from .host import empty, expect_real, ready, rows_of, some_rows
from .pool import run_kernels

__all__ = ["CrossEntropySaved", "cross_entropy_backward", "cross_entropy_forward"]


class CrossEntropySaved(NamedTuple):
    """What `cross_entropy_forward` keeps for `cross_entropy_backward`."""

    logits: Array  # […, W]: probabilities are recomputed from them
    largest: Array  # [rows]
    total: Array  # [rows]: Σ e^(z − largest)
    targets: Array  # [rows]
    weight: Array  # [rows]: mask / normaliser


def cross_entropy_forward(
    logits: Array, *, targets: Array, mask: Array | None = None, normaliser: float | None = None
) -> tuple[Array, CrossEntropySaved]:
    """As `refimpl.ops.cross_entropy_forward`, by kernels of Numba."""
    dtype = expect_real(logits=logits)
    vocabulary = last(logits, "logits")
    expect("targets", targets, "(…)", tuple(logits.shape[:-1]))
    targets, weight = token_weights(logits, targets, mask, normaliser, vocabulary)
    targets, weight = targets.reshape(-1), weight.reshape(-1)
    z = ready(rows_of(logits))
    largest, total = empty(weight.shape, z), empty(weight.shape, z)
    statistics = kernel("cross_entropy", "statistics", dtype)
    run_kernels([partial(statistics, largest[i], total[i], z[i]) for i in some_rows(*z.shape)])
    log_p = z[np.arange(targets.size), targets] - largest - np.log(total)  # (cross_entropy.1)
    log_p = np.where(weight != 0, log_p, 0)
    loss = -np.sum(weight * log_p)  # (cross_entropy.2)
    return loss, CrossEntropySaved(logits, largest, total, targets, weight)


def cross_entropy_backward(dloss: Array, saved: CrossEntropySaved) -> Array:
    """As `refimpl.ops.cross_entropy_backward`, by kernels of Numba."""
    logits, largest, total, targets, weight = saved
    z, dz = ready(rows_of(logits)), empty(logits.shape, logits)
    by_row = rows_of(dz), z, largest, total, weight, number(dloss, weight) * weight, targets
    gradient = kernel("cross_entropy", "gradient", z.dtype)
    run_kernels([partial(gradient, *(x[i] for x in by_row)) for i in some_rows(*z.shape)])
    return dz
