"""Rotary position embedding on kernels/rope.cu; as `refimpl.ops.rope`, and for bfloat16."""

from __future__ import annotations

import numpy as np

from ..array import Array, expect
from ..ops import AnyOp, Op
from ..ops.choices import Layout
from ..ops.rope import RoPESaved, check_rope
from .host import Kernels, cover, numbers, ready
from .launch import Launch

__all__ = ["rope"]

THREADS = 128
MOST = 2**32 - THREADS  # threads, counted in 32 bits; each has 32 bytes of x, or fewer


def rope(launch: Launch) -> AnyOp:
    """The op on ``launch``. Saved: cos and sin [B·T or T, R/2], in float32 for bfloat16."""
    kernels = Kernels(launch, "rope")

    def rotate(x: Array, saved: RoPESaved, sign: int) -> Array:
        n, (b, t, heads, width) = numbers(x=x), saved.shape
        if n.real != saved.cos.dtype:  # only dy's can differ
            raise TypeError(
                f"dy must be of the forward's x, whose arithmetic is {saved.cos.dtype}, got "
                f"{x.dtype}"
            )
        half, tokens = width // 2, b * t
        threads = tokens * heads * cover(half, n.vector)
        if threads > MOST:
            raise ValueError(f"x must be turned by at most {MOST} threads, got {threads}")
        blocks = cover(threads, THREADS)
        y = kernels.empty(x.shape, x.dtype, x)
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
        layout: Layout = "interleaved",
        factor: float = 1.0,
    ) -> tuple[Array, RoPESaved]:
        n = numbers(x=x)
        check_rope(x, positions, inv_freq, layout)
        turns = n.xp.reshape(positions, (-1, 1)).astype(n.xp.float64)
        angle = turns * n.xp.asarray(inv_freq, dtype=n.xp.float64)
        cos, sin = ((f(angle) * factor).astype(n.real) for f in (n.xp.cos, n.xp.sin))
        saved = RoPESaved(tuple(x.shape), cos, sin, layout)
        return rotate(x, saved, 1), saved

    def rope_backward(dy: Array, saved: RoPESaved) -> Array:
        expect("dy", dy, "(B, T, H, R)", tuple(saved.shape))
        return rotate(dy, saved, -1)

    return Op(rope_forward, rope_backward)
