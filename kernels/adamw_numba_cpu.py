"""AdamW for a CPU: each number of parameter, moments and gradient is read once and written once.

The reference's steps are 15 passes over a tensor, each of up to three arrays in memory.
"""

from __future__ import annotations

import math

from .common_numba_cpu import In1, Out1, Real


def adamw_update(
    p: Out1,
    m: Out1,
    v: Out1,
    g: In1,
    less1: Real,
    less2: Real,
    correct1: Real,
    correct2: Real,
    epsilon: Real,
    decay: Real,
    rate: Real,
) -> None:
    """``less1``, ``less2``: 1 − β; ``correct1``, ``correct2``: 1 − βᵗ."""
    for i in range(p.size):
        m[i] += less1 * (g[i] - m[i])
        v[i] += less2 * (g[i] * g[i] - v[i])
        second = v[i] + (v[i] - v[i])  # NaN where g² overflows: m̂ / ∞ would be no step, unseen
        step = (m[i] / correct1) / (math.sqrt(second / correct2) + epsilon)
        p[i] -= rate * (step + decay * p[i])
