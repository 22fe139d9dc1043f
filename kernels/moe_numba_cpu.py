"""The mixture of experts for a CPU: who goes where, and what comes back added up.

The reference sorts, copies all rows to the experts' order, back, multiplies, and adds. Here tokens
are counted and placed in one pass. ffn_numba_cpu.py takes an expert's rows from where they are
(moe.2), and each token adds up its K rows in its own order, so the sum never depends on threads.
"""

from __future__ import annotations

from .common_numba_cpu import Ids1, Ids2, In2, Int, Out2, OutIds1


def dispatch(order: OutIds1, place: OutIds1, start: OutIds1, indices: Ids1) -> None:
    """``order``: the slots [M·K] by expert, in each in their own order; ``place``: its inverse;
    ``start`` [E + 1]: where each expert's slots begin."""
    start[:] = 0
    for slot in range(indices.size):
        start[indices[slot] + 1] += 1
    for expert in range(start.size - 1):
        start[expert + 1] += start[expert]
    for slot in range(indices.size):  # start[e] is where the next slot of e goes, …
        at = start[indices[slot]]
        order[at], place[slot] = slot, at  # (moe.1)
        start[indices[slot]] = at + 1
    for expert in range(start.size - 1, 0, -1):  # … so in the end the beginning of the one after e
        start[expert] = start[expert - 1]
    start[0] = 0


def combine(y: Out2, rows: In2, place: Ids2, weights: In2, weighted: Int) -> None:
    """Add to each token's ``y`` Σ_k weights_k · rows[place_k], or without weights the sum."""
    for token in range(y.shape[0]):
        out = y[token]
        for k in range(place.shape[1]):
            row = rows[place[token, k]]
            if weighted:
                weight = weights[token, k]
                for i in range(out.size):
                    out[i] += weight * row[i]  # (moe.5)
            else:
                for i in range(out.size):
                    out[i] += row[i]  # (moe.11)
