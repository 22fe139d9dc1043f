"""y = x Wᵀ for a CPU with W in bfloat16, as checkpoints store it: for a few rows, as in decoding.

A token's product with W uses each weight once, so what it costs is to move W: 2 bytes per weight
here; widened by NumPy first, 10 (2 read, 4 written, 4 read again). A bfloat16 number is the upper
half of a float32 number, so a shift widens it in a register, exactly; sums are in the type of x.
`widen` makes float32 or float64 of a block of W that stays in the cache, for NumPy's product with
many rows.
"""

from __future__ import annotations

import numpy as np

from .common_numba_cpu import Argument, In2, Out2

Bits2 = Argument(2, kind="uint16")  # bfloat16's bits, which Numba has no type for


def linear_forward(y: Out2, x: In2, w: Bits2) -> None:
    """y [O, rows], transposed, for x [rows, I] and w [O, I]."""
    zero = x.dtype.type(0)
    rows, width = x.shape
    for o in range(w.shape[0]):
        row = 0
        while row + 3 < rows:  # each weight is widened once for four rows
            a, b = zero, zero
            c, d = zero, zero
            for i in range(width):
                weight = np.uint32(w[o, i] << 16).view(np.float32)
                a += x[row, i] * weight  # (linear.1)
                b += x[row + 1, i] * weight
                c += x[row + 2, i] * weight
                d += x[row + 3, i] * weight
            y[o, row], y[o, row + 1] = a, b
            y[o, row + 2], y[o, row + 3] = c, d
            row += 4
        while row < rows:
            a = zero
            for i in range(width):
                a += x[row, i] * np.uint32(w[o, i] << 16).view(np.float32)
            y[o, row] = a
            row += 1


def widen(y: Out2, w: Bits2) -> None:
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            y[o, i] = np.uint32(w[o, i] << 16).view(np.float32)
