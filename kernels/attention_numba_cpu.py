"""Attention's softmax for a CPU, on one block of scores that NumPy's products made and use next.

The reference keeps the scores of all heads, [B, H, T, S], and makes six such arrays on its way.
Here the scores of one head and a block of queries (in the backward, of keys) stay in the cache, and
each kernel changes them in place. What the order of positions hides is computed neither here nor,
but for the block on the diagonal, in the products. Memory is linear in the sequence.
"""

from __future__ import annotations

import math

import numpy as np

from .common_numba_cpu import LANES, Bools1, Bools2, In1, Int, Out1, Out2, exp, largest_of


def hide(scores: Out2, visible: Bools2) -> None:
    """−∞ where a row may not see a column."""
    for row in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            if not visible[row, i]:
                scores[row, i] = -np.inf


def softmax_forward(
    scores: Out2, total: Out1, lse: Out1, seen: Bools1, first: Int, each: Int
) -> None:
    """Scores [queries, keys] become e^(score − largest), not yet divided by their sum ``total``.
    Row r sees the keys up to first + r // each, and if not ``seen``, none."""
    real = scores.dtype.type
    for row in range(scores.shape[0]):
        end = min(scores.shape[1], first + row // each + 1)
        own = scores[row, :end]
        largest = largest_of(own)
        shift = largest if -np.inf < largest < np.inf else real(0)
        summed = 0.0
        for start in range(0, own.size, LANES):  # a long sum in one type would lose its end
            part, some = real(0), own[start : start + LANES]
            for i in range(some.size):
                e = exp(some[i] - shift)
                some[i] = e
                part += e
            summed += part  # (flash_attention.2)
        scores[row, end:] = 0
        if not seen[row]:
            total[row], lse[row] = 1, 0
        elif summed < np.inf:
            total[row], lse[row] = summed, shift + math.log(summed)  # (flash_attention.4)
        else:
            total[row], lse[row] = np.nan, np.nan


def softmax_backward(scores: Out2, dp: Out2, lse: In1, row_sum: In1, first: Int, each: Int) -> None:
    """Scores [keys, queries] become probabilities, and ``dp`` the gradient of scores. Row r is seen
    by the queries from (first + r) each on."""
    for row in range(scores.shape[0]):
        start = min(scores.shape[1], max(0, (first + row) * each))
        scores[row, :start] = 0
        dp[row, :start] = 0
        p, ds = scores[row, start:], dp[row, start:]
        shift, less = lse[start:], row_sum[start:]
        for i in range(p.size):
            p[i] = exp(p[i] - shift[i])  # (flash_attention.6)
            ds[i] = p[i] * (ds[i] - less[i])  # (flash_attention.7)
