"""Rotary position embedding on kernels/rope.cu; as `refimpl.ops.rope`, and for bfloat16."""

from __future__ import annotations

import numpy as np

from ..array import Array, expect
from ..ops.rope import RoPESaved
from ..ops.table import Op
from .host import Kernels, cover, numbers, ready
from .launch import Launch

__all__ = ["rope"]

THREADS = 128


def rope(launch: Launch) -> Op:
    """The op on ``launch``. Saved: cos and sin [B·T or T, R/2], in float32 for bfloat16."""
    kernels = Kernels(launch, "rope")

    def rotate(x: Array, saved: RoPESaved, sign: int) -> Array:
        n, (b, t, heads, width) = numbers(x=x), saved.shape
        if n.real != saved.cos.dtype:  # only dy's can differ
            raise TypeError(
                f"dy must be of the forward's x, whose arithmetic is {saved.cos.dtype}, got "
                f"{x.dtype}"
            )
        y = kernels.empty(x.shape, x.dtype, x)
        half, tokens = width // 2, b * t
        blocks = cover(tokens * heads * cover(half, n.vector), THREADS)
        kernels(
            "rope_rotate",
            n.storage,
            blocks,
            THREADS,
            y,
            ready(x),
            saved.cos,
            saved.sin,
            np.int64(tokens),
            np.int64(saved.cos.shape[0]),
            heads,
            half,
            int(saved.layout == "interleaved"),
            sign,
        )
        return y

    def rope_forward(
        x: Array,
        *,
        positions: Array,
        inv_freq: Array,
        layout: str = "interleaved",
        factor: float = 1.0,
    ) -> tuple[Array, RoPESaved]:
        n = numbers(x=x)
        if len(x.shape) != 4 or x.shape[-1] != 2 * inv_freq.shape[0]:
            raise ValueError(
                "x must have shape (B, T, H, R) with "
                f"R=2·len(inv_freq)={2 * inv_freq.shape[0]}, got {x.shape}"
            )
        if positions.shape not in ((x.shape[1],), tuple(x.shape[:2])):
            raise ValueError(
                f"positions must have shape (T,) or (B, T) of x {tuple(x.shape[:2])}, got "
                f"{positions.shape}"
            )
        if layout not in ("interleaved", "halves"):
            raise ValueError(f"layout must be 'interleaved' or 'halves', got {layout!r}")
        angle = n.xp.reshape(positions, (-1, 1)).astype(n.xp.float64) * n.xp.asarray(
            inv_freq, dtype=n.xp.float64
        )
        cos, sin = ((f(angle) * factor).astype(n.real) for f in (n.xp.cos, n.xp.sin))
        saved = RoPESaved(tuple(x.shape), cos, sin, layout)
        return rotate(x, saved, 1), saved

    def rope_backward(dy: Array, saved: RoPESaved) -> Array:
        expect("dy", dy, "(B, T, H, R)", tuple(saved.shape))
        return rotate(dy, saved, -1)

    return Op(rope_forward, rope_backward)
