"""Softmax over a vocabulary for a CPU, on rows of logits in the cache.

`statistics` gives a row's largest logit and its sum of exponentials, in two passes; `gradient`
makes what follows from them in one, elsewhere or in place. The reference has the logits, the
shifted ones, their exponentials and probabilities, a mask and two products, each written to memory
and read again.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .common_numba_cpu import (
    LANES,
    Ids1,
    In1,
    In2,
    Int,
    Out1,
    Out2,
    Real,
    exp_or_zero,
    largest_of,
    product,
    whole_vectors,
)


def divide(z: Out2, first: Int, last: Int, temperature: Real) -> None:
    for row in range(z.shape[0]):
        own = z[row, first:last]
        for i in range(own.size):
            own[i] /= temperature  # (log_prob.1)


def statistics(largest: Out1, total: Out1, z: In2, first: Int, last: Int) -> None:
    """Of the entries first … last of each row."""
    whole_vectors()
    real = z.dtype.type
    for row in range(z.shape[0]):
        own = z[row, first:last]
        highest = largest_of(own)
        shift = highest if highest > -np.inf else real(0)
        summed = 0.0
        for start in range(0, own.size, LANES):  # a long sum in one type would lose its end
            part, some = real(0), own[start : start + LANES]
            for i in range(some.size):
                part += exp_or_zero(some[i] - shift)
            summed += part
        largest[row], total[row] = highest, summed  # (log_prob.2)


@njit(inline="always")
def row_gradient(out, own, shift, total, counted, weight, target):
    """``out`` may be ``own`` itself, which the compiler must see: two arrays of which it can't tell
    whether they overlap it would go through number by number."""
    real = own.dtype.type
    if counted == 0:
        out[:] = 0
        return
    hit = 0 <= target < own.size
    p = exp_or_zero(own[target] - shift) / total if hit else real(0)
    factor = weight / total
    for i in range(own.size):
        # by `product`: reordered, each number would be divided by the total
        out[i] = product(factor, exp_or_zero(own[i] - shift))  # (log_prob.6)
    if hit:
        out[target] = weight * (p - real(1))  # (cross_entropy.3)


def gradient(
    dz: Out2, z: In2, shift: In1, total: In1, counted: In1, weight: In1, targets: Ids1
) -> None:
    """dz = weight (e^(z − shift) / total − one-hot(target)) of each row. A row whose ``counted`` is
    0 gets 0, whatever its logits."""
    whole_vectors()
    for row in range(z.shape[0]):
        own, out = z[row], dz[row]
        row_gradient(out, own, shift[row], total[row], counted[row], weight[row], targets[row])


def gradient_in_place(
    z: Out2, shift: In1, counted: In1, weight: In1, targets: Ids1, first: Int, last: Int
) -> None:
    """The same in the place of the entries first … last of each row, with a total of 1."""
    whole_vectors()
    one = z.dtype.type(1)
    for row in range(z.shape[0]):
        own = z[row, first:last]
        row_gradient(own, own, shift[row], one, counted[row], weight[row], targets[row] - first)
