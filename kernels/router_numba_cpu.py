"""The gate for a CPU: scores, the K best of a row, their weights, and the gradient of the logits, a
row at a time.

The reference sorts all experts of a row and passes over scores × experts K times in the backward.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .common_numba_cpu import SAME, Ids2, In2, Int, Out2, OutIds2, Real, exp, largest_of, sigmoid


def sigmoid_scores(scores: Out2, logits: In2) -> None:
    one = logits.dtype.type(1)
    for row in range(logits.shape[0]):
        own, out = logits[row], scores[row]
        for i in range(own.size):
            out[i] = sigmoid(own[i], one)  # (router.2)


def softmax_scores(scores: Out2, logits: In2) -> None:
    real = logits.dtype.type
    for row in range(logits.shape[0]):
        own, out = logits[row], scores[row]
        largest, total = largest_of(own), real(0)
        for i in range(own.size):
            e = exp(own[i] - largest)
            out[i] = e
            total += e
        for i in range(own.size):
            out[i] /= total  # (router.3)


def select(indices: OutIds2, ranked: In2) -> None:
    """The best of each row, best first, of equal ones the first first; NaN last."""
    taken = np.empty(ranked.shape[1], np.bool_)
    for row in range(ranked.shape[0]):
        taken[:] = False
        for k in range(indices.shape[1]):
            best = -1
            for i in range(ranked.shape[1]):
                x = ranked[row, i]
                if taken[i]:
                    continue
                if best < 0 or x > ranked[row, best] or (x == x and np.isnan(ranked[row, best])):
                    best = i
            taken[best] = True
            indices[row, k] = best


def weigh(
    weights: Out2, scores: In2, indices: Ids2, scale: Real, normalise: Int, epsilon: Real
) -> None:
    real = scores.dtype.type
    for row in range(scores.shape[0]):
        total = total_of(scores[row], indices[row]) + epsilon if normalise else real(1)
        for k in range(indices.shape[1]):
            weights[row, k] = scale * scores[row, indices[row, k]] / total  # (router.6)


@njit(**SAME)
def total_of(scores, indices):
    """The sum of the chosen scores."""
    total = scores.dtype.type(0)
    for k in range(indices.size):
        total += scores[indices[k]]
    return total


def gate_backward(
    dlogits: Out2,
    dscores: In2,
    dweights: In2,
    scores: In2,
    indices: Ids2,
    scale: Real,
    normalise: Int,
    epsilon: Real,
    softmaxed: Int,
) -> None:
    """From the gradient of all scores, and that of the weights."""
    real = scores.dtype.type
    dchosen = np.empty(indices.shape[1], scores.dtype)
    for row in range(scores.shape[0]):
        ds, s = dlogits[row], scores[row]
        chosen = indices[row]
        for k in range(chosen.size):
            dchosen[k] = scale * dweights[row, k]
        if normalise:
            total, mean = total_of(s, chosen) + epsilon, real(0)
            for k in range(chosen.size):
                mean += dchosen[k] * s[chosen[k]]
            mean /= total
            for k in range(chosen.size):
                dchosen[k] = (dchosen[k] - mean) / total  # (router.7)
        for i in range(s.size):
            ds[i] = dscores[row, i]
        for k in range(chosen.size):
            ds[chosen[k]] += dchosen[k]  # (router.8)
        if softmaxed:
            along = real(0)
            for i in range(s.size):
                along += ds[i] * s[i]
            for i in range(s.size):
                ds[i] = s[i] * (ds[i] - along)  # (router.10)
        else:
            for i in range(s.size):
                ds[i] = ds[i] * s[i] * (real(1) - s[i])  # (router.9)
