"""RMSNorm on kernels/rms_norm.cu; as `refimpl.ops.rms_norm`, and for bfloat16."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from ..array import Array, expect
from ..ops import AnyOp, Op
from ..ops.rms_norm import check_rms_norm
from .host import Kernels, Numbers, cover, numbers, ready
from .launch import Launch

__all__ = ["RMSNormSaved", "rms_norm"]

HELD = {
    "float64": 14,
    "float32": 24,
    "bfloat16": 24,
}  # elements of a row that a thread holds, as in the kernel
MOST_THREADS = 512
LANES = 8  # threads that share a column of dw, as in the kernel
PARTS = 256  # partial sums of dw, at most; a constant, so that every GPU adds in the same order


class RMSNormSaved(NamedTuple):
    """What the forward of `rms_norm` keeps for its backward."""

    x: Array  # […, D]
    w: Array  # [D]
    r: Array  # [rows]: 1 / rms, in float32 for bfloat16


def rms_norm(launch: Launch) -> AnyOp:
    """The op on ``launch``."""
    kernels = Kernels(launch, "rms_norm")

    def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, RMSNormSaved]:
        n = numbers(x=x, w=w)
        check_rms_norm(x, w, float(eps))
        d, rows = x.shape[-1], prod(x.shape[:-1])
        x, w = ready(x), ready(w)
        y, r = kernels.empty(x.shape, x.dtype, x), kernels.empty((rows,), n.real, x)
        kernels("rms_norm_forward", n.storage, rows, _threads(d, n), y, r, x, w, d, n.scalar(eps))
        return y, RMSNormSaved(x, w, r)

    def rms_norm_backward(dy: Array, saved: RMSNormSaved) -> tuple[Array, Array]:
        x, w, r = saved
        n = numbers(x=x, dy=dy)
        expect("dy", dy, "(…, D)", tuple(x.shape))
        d, rows = x.shape[-1], r.shape[0]
        parts = min(rows, PARTS)
        dx, dw = kernels.empty(x.shape, x.dtype, x), kernels.empty((d,), n.real, x)
        part = kernels.empty((parts, d), n.real, x)
        kernels(
            "rms_norm_backward",
            n.storage,
            parts,
            _threads(d, n),
            dx,
            part,
            ready(dy),
            x,
            w,
            r,
            np.int64(rows),
            d,
        )
        kernels("rms_norm_weight", n.storage, cover(d, 32), (32, LANES), dw, part, parts, d)
        return dx, dw

    return Op(rms_norm_forward, rms_norm_backward)


def _threads(width: int, n: Numbers) -> int:
    """A whole number of warps that hold a row; ValueError if no block can."""
    threads = 32 * max(cover(width, 32 * HELD[n.storage]), 1)
    if threads > MOST_THREADS:
        raise ValueError(
            f"x must be at most {MOST_THREADS * HELD[n.storage]} wide in {n.storage}, got {width}"
        )
    return threads
