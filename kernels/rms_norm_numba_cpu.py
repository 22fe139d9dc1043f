"""RMSNorm for a CPU: each row is read once, while it is in the cache, and written once.

The reference makes x², x r, x r w and, in the backward, five more arrays of x's size. The gradient
of w is a sum over all rows: each block of rows has its own, and the host adds them in order.
"""

from __future__ import annotations

import math

import numpy as np

from .common_numba_cpu import In1, In2, Out1, Out2, Real, product


def rms_norm_forward(y: Out2, r: Out1, x: In2, w: In1, eps: Real) -> None:
    real = x.dtype.type
    for row in range(x.shape[0]):
        own, out = x[row], y[row]
        squares = real(0)
        for i in range(own.size):
            squares += own[i] * own[i]
        mean = squares / real(own.size) + eps
        scale = real(1) / math.sqrt(mean) if mean < np.inf else real(np.nan)  # (rms_norm.1)
        for i in range(own.size):
            out[i] = own[i] * scale * w[i]  # (rms_norm.2)
        r[row] = scale


def rms_norm_backward(dx: Out2, dw: Out1, dy: In2, x: In2, w: In1, r: In1) -> None:
    real = x.dtype.type
    dw[:] = 0
    for row in range(x.shape[0]):
        own, scale = x[row], r[row]
        given, out = dy[row], dx[row]
        along = real(0)
        for i in range(own.size):
            n, dn = product(own[i], scale), product(given[i], w[i])  # (rms_norm.3)
            along += product(dn, n)
            dw[i] += given[i] * n  # (rms_norm.5)
        along /= real(own.size)
        for i in range(own.size):
            n, dn = product(own[i], scale), product(given[i], w[i])
            out[i] = scale * (dn - product(n, along))  # (rms_norm.4)
