"""Softmax over a vocabulary for a CPU, on rows of logits in the cache.

`statistics` gives a row's largest logit and its sum of exponentials, in two passes; `gradient`
makes what follows from them in one. The reference has the logits, the shifted ones, their
exponentials and probabilities, a mask and two products, each written to memory and read again.
"""

from __future__ import annotations

import numpy as np

from .common_numba_cpu import Ids1, In1, In2, Int, Out1, Out2, Real, exp, largest_of


def divide(z: Out2, first: Int, last: Int, temperature: Real) -> None:
    for row in range(z.shape[0]):
        own = z[row, first:last]
        for i in range(own.size):
            own[i] /= temperature  # (log_prob.1)


def statistics(largest: Out1, total: Out1, z: In2, first: Int, last: Int) -> None:
    """Of the entries first … last of each row."""
    real = z.dtype.type
    for row in range(z.shape[0]):
        own = z[row, first:last]
        highest = largest_of(own)
        shift = highest if highest > -np.inf else real(0)
        summed = real(0)
        for i in range(own.size):
            summed += exp(own[i] - shift)
        largest[row], total[row] = highest, summed  # (log_prob.2)


def gradient(
    z: Out2, shift: In1, total: In1, weight: In1, targets: Ids1, first: Int, last: Int
) -> None:
    """z becomes weight (e^(z − shift) / total − one-hot(target)) at the entries first … last of
    each row. A row of weight 0 gets 0, whatever its logits."""
    real = z.dtype.type
    for row in range(z.shape[0]):
        own, less = z[row, first:last], shift[row]
        if weight[row] == 0:
            own[:] = 0
            continue
        factor, target = weight[row] / total[row], targets[row] - first
        hit = 0 <= target < own.size
        p = exp(own[target] - less) / total[row] if hit else real(0)
        for i in range(own.size):
            own[i] = factor * exp(own[i] - less)  # (log_prob.6)
        if hit:
            own[target] = weight[row] * (p - real(1))  # (cross_entropy.3)
