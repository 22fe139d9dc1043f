"""Rotary position embedding on kernels/rope_numba_cpu.py; as `refimpl.ops.rope`."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np

from ...array import Array, expect
from ...ops.choices import Layout
from ...ops.rope import RoPESaved, check_rope
from .compile import kernel
from .host import expect_real, some_rows
from .pool import run_kernels

__all__ = ["angles", "rope_backward", "rope_forward"]


def rope_forward(
    x: Array,
    *,
    positions: Array,
    inv_freq: Array,
    layout: Layout = "interleaved",
    factor: float = 1.0,
) -> tuple[Array, RoPESaved]:
    """As `refimpl.ops.rope_forward`. Saved: cos and sin [B·T or T, R/2]."""
    expect_real(x=x)
    check_rope(x, positions, inv_freq, layout)
    cos, sin = angles(positions, inv_freq, factor, x.dtype)
    saved = RoPESaved(tuple(x.shape), cos, sin, layout)
    return _rotate(x, saved, backward=False), saved


def rope_backward(dy: Array, saved: RoPESaved) -> Array:
    """As `refimpl.ops.rope_backward`, by kernels of Numba."""
    expect("dy", dy, "(B, T, H, R)", tuple(saved.shape))
    expect_real(x=saved.cos, dy=dy)
    return _rotate(dy, saved, backward=True)


def angles(positions: Array, inv_freq: Array, factor: float, dtype: Any) -> tuple[Array, Array]:
    """cos and sin of the angles of ``positions`` [B, T] or [T] at ``inv_freq`` [R/2], made in
    float64, times the factor; read-only [B·T or T, R/2].

    The last few are kept: all layers of a model turn by the same.
    """
    turns = np.ascontiguousarray(positions, np.float64).tobytes()
    frequencies = np.ascontiguousarray(inv_freq, np.float64).tobytes()
    return _angles(turns, frequencies, float(factor), np.dtype(dtype))


@lru_cache(maxsize=4)
def _angles(
    positions: bytes, inv_freq: bytes, factor: float, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    angle = np.frombuffer(positions)[:, None] * np.frombuffer(inv_freq)
    found = (np.cos(angle) * factor).astype(dtype), (np.sin(angle) * factor).astype(dtype)
    for x in found:
        x.flags.writeable = False
    return found


def _rotate(x: Array, saved: RoPESaved, *, backward: bool) -> Array:
    """``x`` [B, T, H, R], each pair turned; a fresh array."""
    y = np.array(x, order="C")
    rows = y.reshape(-1, *x.shape[2:])
    turn, interleaved = kernel("rope", "turn", x.dtype), saved.layout == "interleaved"
    angle = saved.cos, saved.sin
    blocks = some_rows(rows.shape[0], rows.shape[1] * rows.shape[2])
    run_kernels([partial(turn, rows[i], *angle, 0, i.start, interleaved, backward) for i in blocks])
    return y
