"""RMSNorm on kernels/rms_norm_numba_cpu.py; as `refimpl.ops.rms_norm`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect
from ...ops.rms_norm import check_rms_norm
from .compile import kernel
from .host import empty, expect_real, ready, rows_of, some_rows
from .pool import run_kernels

__all__ = ["RMSNormSaved", "rms_norm_backward", "rms_norm_forward"]


class RMSNormSaved(NamedTuple):
    """What `rms_norm_forward` keeps for `rms_norm_backward`."""

    x: Array  # […, D]
    w: Array  # [D]
    r: Array  # [rows]: 1 / rms


def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, RMSNormSaved]:
    """As `refimpl.ops.rms_norm_forward`, by kernels of Numba."""
    dtype, eps = expect_real(x=x, w=w), float(eps)
    check_rms_norm(x, w, eps)
    rows, w = rows_of(ready(x)), ready(w)
    y, r = empty(x.shape, x), empty(rows.shape[:1], x)
    out = rows_of(y)
    forward = kernel("rms_norm", "rms_norm_forward", dtype)
    run_kernels([partial(forward, out[i], r[i], rows[i], w, eps) for i in some_rows(*rows.shape)])
    return y, RMSNormSaved(x, w, r)


def rms_norm_backward(dy: Array, saved: RMSNormSaved) -> tuple[Array, Array]:
    """As `refimpl.ops.rms_norm_backward`, by kernels of Numba."""
    x, w, r = saved
    dtype = expect_real(x=x, dy=dy)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    rows, given = rows_of(ready(x)), rows_of(ready(dy))
    dx, blocks = empty(x.shape, x), some_rows(*rows.shape)
    out = rows_of(dx)
    parts = np.empty((len(blocks), x.shape[-1]), dtype)  # of dw, each over one block
    backward = kernel("rms_norm", "rms_norm_backward", dtype)
    run_kernels(
        [
            partial(backward, out[i], part, given[i], rows[i], w, r[i])
            for part, i in zip(parts, blocks, strict=True)
        ]
    )
    return dx, parts.sum(axis=0)
