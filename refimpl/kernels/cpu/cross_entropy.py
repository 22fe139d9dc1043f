"""Cross-entropy of given logits on kernels/cross_entropy_numba_cpu.py; as
`refimpl.ops.cross_entropy`.

Saved are the logits and one number per row, not the probabilities.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, last, number
from ...ops.cross_entropy import token_weights
from .compile import kernel
from .host import ONE_TASK, empty, expect_real, ready, rows_of
from .pool import blocks_of, run

__all__ = ["CrossEntropySaved", "cross_entropy_backward", "cross_entropy_forward"]


class CrossEntropySaved(NamedTuple):
    logits: Array  # […, W]: probabilities are recomputed from them
    lse: Array  # [rows]: log Σ e^z
    targets: Array  # [rows]
    weight: Array  # [rows]: mask / normaliser


def cross_entropy_forward(
    logits: Array, *, targets: Array, mask: Array | None = None, normaliser: float | None = None
) -> tuple[Array, CrossEntropySaved]:
    dtype = expect_real(logits=logits)
    vocabulary = last(logits, "logits")
    expect("targets", targets, "(…)", tuple(logits.shape[:-1]))
    targets, weight = token_weights(logits, targets, mask, normaliser, vocabulary)
    targets, weight, z = targets.reshape(-1), weight.reshape(-1), ready(rows_of(logits))
    largest, total = empty(weight.shape, z), empty(weight.shape, z)
    statistics = kernel("cross_entropy", "statistics", dtype)
    run([partial(statistics, largest[i], total[i], z[i], 0, vocabulary) for i in _blocks(z)])
    lse = largest + np.log(total)
    log_p = np.where(weight != 0, z[np.arange(targets.size), targets] - lse, 0)  # (cross_entropy.1)
    loss = -np.sum(weight * log_p)  # (cross_entropy.2)
    return loss, CrossEntropySaved(logits, lse, targets, weight)


def cross_entropy_backward(dloss: Array, saved: CrossEntropySaved) -> Array:
    logits, lse, targets, weight = saved
    z, dz = ready(rows_of(logits)), empty(logits.shape, logits)
    weight, out = number(dloss, weight) * weight, rows_of(dz)
    gradient = kernel("cross_entropy", "gradient", z.dtype)
    run(
        [
            partial(gradient, out[i], z[i], lse[i], weight[i], targets[i], 0, z.shape[1])
            for i in _blocks(z)
        ]
    )
    return dz


def _blocks(z: Array) -> list[slice]:
    return blocks_of(z.shape[0], max(1, ONE_TASK // z.shape[1]))
