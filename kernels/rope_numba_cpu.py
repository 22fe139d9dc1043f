"""RoPE for a CPU: each pair is turned where it stands.

The reference makes the four products, their sum and difference, and puts the pairs together again.
"""

from __future__ import annotations

from .common_numba_cpu import In2, Int, Out3


def turn(
    x: Out3, cos: In2, sin: In2, start: Int, first: Int, interleaved: Int, backward: Int
) -> None:
    """Turn the last numbers of each head in place, those from ``start`` on. Row r of ``x`` [rows,
    H, …] turns by the angles [R/2] of row first + r, which begin again after the last."""
    half = cos.shape[1]
    for row in range(x.shape[0]):
        at = (first + row) % cos.shape[0]
        c, s = cos[at], sin[at]
        for head in range(x.shape[1]):
            own = x[row, head, start:]
            for i in range(half):
                j = 2 * i if interleaved else i
                k = j + 1 if interleaved else half + i
                sine = -s[i] if backward else s[i]  # (rope.6)
                a, b = own[j], own[k]
                own[j] = a * c[i] - b * sine  # (rope.5)
                own[k] = a * sine + b * c[i]
