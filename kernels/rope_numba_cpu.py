"""RoPE for a CPU: each pair is read once and written once, turned by its angle.

The reference makes the four products, their sum and difference, and puts the pairs together again.
"""

from __future__ import annotations

from .common_numba_cpu import In2, In3, Int, Out3


def rope(y: Out3, x: In3, cos: In2, sin: In2, first: Int, interleaved: Int) -> None:
    """x [rows, H, R]; row r is turned by the angles [R/2] of row (first + r) of ``cos`` and
    ``sin``, again from their beginning after the last."""
    half = cos.shape[1]
    for row in range(x.shape[0]):
        at = (first + row) % cos.shape[0]
        c, s = cos[at], sin[at]
        for head in range(x.shape[1]):
            own, out = x[row, head], y[row, head]
            if interleaved:
                for i in range(half):
                    a, b = own[2 * i], own[2 * i + 1]
                    out[2 * i] = a * c[i] - b * s[i]  # (rope.5)
                    out[2 * i + 1] = a * s[i] + b * c[i]
            else:
                for i in range(half):
                    a, b = own[i], own[half + i]
                    out[i] = a * c[i] - b * s[i]  # (rope.5)
                    out[half + i] = a * s[i] + b * c[i]
