"""The balance loss for a CPU, a sequence at a time, one pass over its scores each way.

The reference makes some forty small arrays: an op of NumPy takes longer to begin than to compute
them. Letters: B sequences, T positions, E experts, n choices of a sequence.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .common_numba_cpu import SAME, Bools2, Float64, Ids2, In2, In3, Int, Out1, Out2, Out3, Real


@njit(**SAME)
def of_token(scores, f):
    """A token's Σ scores and its mean of ``f`` by scores; NaN where the sum overflows."""
    real = scores.dtype.type
    total, weighted = real(0), real(0)
    for e in range(scores.size):
        total += scores[e]
        weighted += f[e] * scores[e]
    total = total if math.isfinite(total) else real(np.nan)
    return total, weighted / total


def balance_loss_forward(
    loss: Out1,
    f: Out2,
    weight: Out2,
    scores: In3,
    counted: Ids2,
    valid: Bools2,
    alpha: Float64,
    top_k: Int,
    sequences: Float64,
) -> None:
    """Writes each sequence's ``loss`` [B], ``f`` [B, E] and ``weight`` [B, T]; ``counted`` [B, n]
    are choices, as many of each token as of another."""
    real = scores.dtype.type
    tokens, experts = scores.shape[1:]
    per_token = counted.shape[1] // tokens
    for b in range(scores.shape[0]):
        counts, length = np.zeros(experts), 0
        for t in range(tokens):
            if valid[b, t]:
                length += 1
                for k in range(t * per_token, (t + 1) * per_token):
                    counts[counted[b, k]] += 1
        length = max(length, 1)
        for e in range(experts):
            f[b, e] = counts[e] * experts / (top_k * length)  # (balance_loss.2)
        own, total = real(alpha / (sequences * length)), 0.0
        for t in range(tokens):
            weight[b, t] = own if valid[b, t] else real(0)
            _, mean_f = of_token(scores[b, t], f[b])
            total += weight[b, t] * mean_f  # (balance_loss.4)
        loss[b] = total


def balance_loss_backward(dscores: Out3, scores: In3, f: In2, weight: In2, dloss: Real) -> None:
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            total, mean_f = of_token(scores[b, t], f[b])
            factor = dloss * weight[b, t] / total
            for e in range(scores.shape[2]):
                dscores[b, t, e] = factor * (f[b, e] - mean_f)  # (balance_loss.5)
