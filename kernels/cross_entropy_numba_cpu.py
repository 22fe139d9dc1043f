"""Softmax over a vocabulary for a CPU, on rows of logits in the cache.

`statistics` gives a row's largest logit and its sum of exponentials, in two passes; `gradient`
makes what follows from them in one. The reference has the logits, the shifted ones, their
exponentials and probabilities, a mask and two products, each written to memory and read again.
"""

from __future__ import annotations

import numpy as np

from .common_numba_cpu import (
    LANES,
    Ids1,
    In1,
    In2,
    Out1,
    Out2,
    exp_or_zero,
    largest_of,
    product,
    whole_vectors,
)


def statistics(largest: Out1, total: Out1, z: In2) -> None:
    """Of each row."""
    whole_vectors()
    real = z.dtype.type
    for row in range(z.shape[0]):
        own = z[row]
        highest = largest_of(own)
        shift = highest if highest > -np.inf else real(0)
        summed = 0.0
        for start in range(0, own.size, LANES):  # a long sum in one type would lose its end
            part, some = real(0), own[start : start + LANES]
            for i in range(some.size):
                part += exp_or_zero(some[i] - shift)
            summed += part
        largest[row], total[row] = highest, summed  # (log_prob.2)


def gradient(
    dz: Out2, z: In2, shift: In1, total: In1, counted: In1, weight: In1, targets: Ids1
) -> None:
    """dz = weight (e^(z − shift) / total − one-hot(target)) of each row. A row whose ``counted`` is
    0 gets 0, whatever its logits."""
    whole_vectors()
    one = z.dtype.type(1)
    for row in range(z.shape[0]):
        own, out = z[row], dz[row]
        target = targets[row]
        if counted[row] == 0:
            out[:] = 0
            continue
        factor = weight[row] / total[row]
        for i in range(own.size):
            # by `product`: reordered, each number would be divided by the total
            out[i] = product(factor, exp_or_zero(own[i] - shift[row]))  # (log_prob.6)
        if 0 <= target < own.size:
            p = exp_or_zero(own[target] - shift[row]) / total[row]
            out[target] = weight[row] * (p - one)  # (cross_entropy.3)
