"""Attention on kernels/flash_attention.cu: as `refimpl.ops.flash_attention`, and in the place of
`refimpl.ops.attention`; for bfloat16 too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..array import Array, expect, library
from ..ops import REFERENCE, AnyOp, Op
from ..ops.attention import AttentionSaved, check_attention
from ..ops.choices import BlindQuery
from .host import Kernels, Numbers, cover, numbers, ready
from .launch import Launch, NumbaLaunch

__all__ = [
    "COMPILED_AHEAD",
    "FlashAttentionSaved",
    "Sizes",
    "Tiles",
    "attention",
    "flash_attention",
    "tiles",
]

WIDEST = 256  # keys and values: a warp's sums of 16 rows lie in registers
OWN = 16  # rows of a warp, as in the kernel
SHARED = 99 << 10  # bytes of a block on every target: other tiles would add in another order
ROW_THREADS = 128  # of a block of flash_attention_row_sum, a warp per row


class FlashAttentionSaved(NamedTuple):
    """What the forward of `attention` keeps for its backward."""

    q: Array  # [B, T, H, X]
    k: Array  # [B, S, H or 1, X]
    v: Array  # [B, S, H or 1, V]
    o: Array  # [B, T, H, V]
    lse: Array  # [B, H, T], in float32 for bfloat16
    scale: float
    causal: bool
    key_mask: Array  # [B, S] uint8, or one element that nobody reads
    segments: Array  # [B, S] int64, or one element that nobody reads
    masked: bool


class Sizes(NamedTuple):
    """Warps of a block, and rows of a tile of the other side: the best first."""

    forward: tuple[tuple[int, int], ...] = ((4, 64), (4, 32), (2, 32), (2, 16), (1, 16), (1, 8))
    backward: tuple[tuple[int, int], ...] = ((4, 32), (2, 32), (2, 16), (1, 16), (1, 8))


class Tiles(NamedTuple):
    """How the kernels of some widths and a storage type are compiled and launched."""

    key_width: int  # of the kernel, a multiple of 16
    value_width: int
    forward: tuple[int, int]  # warps, rows of the other side's tiles
    backward: tuple[int, int]
    forward_shared: int  # bytes
    backward_shared: int

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        return (
            ("KEY_WIDTH", self.key_width),
            ("VALUE_WIDTH", self.value_width),
            ("FORWARD_WARPS", self.forward[0]),
            ("FORWARD_KEYS", self.forward[1]),
            ("BACKWARD_WARPS", self.backward[0]),
            ("BACKWARD_ROWS", self.backward[1]),
        )


SIZES = Sizes()
COMPILED_AHEAD = ((192, 128), (128, 128), (256, 256), (16, 16), (32, 16))
"""Widths of keys and values: V3's, those of models without rotated parts, GLM-4.7-Flash's, those of
the presets tiny and mini. Others are compiled when they are met."""


def tiles(storage: str, key_width: int, value_width: int, sizes: Sizes = SIZES) -> Tiles:
    """The first tiles whose rows have room in the shared memory that every GPU has; ValueError for
    a width above 256."""
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[storage]
    for name, width in (("q", key_width), ("v", value_width)):
        if width > WIDEST:
            raise ValueError(f"{name} must be at most {WIDEST} wide, got {width}")
    x, v = (OWN * cover(max(width, 1), OWN) for width in (key_width, value_width))
    key_row, value_row = x * size + 16, v * size + 16

    def forward_bytes(warps: int, rows: int) -> int:
        return OWN * warps * key_row + rows * (key_row + value_row)

    def backward_bytes(warps: int, rows: int) -> int:
        return (OWN * warps + rows) * (key_row + value_row)

    least = OWN if storage == "bfloat16" else 1  # rows of one product on tensor cores
    forward = next(t for t in sizes.forward if t[1] >= least and forward_bytes(*t) <= SHARED)
    backward = next(t for t in sizes.backward if t[1] >= least and backward_bytes(*t) <= SHARED)
    return Tiles(x, v, forward, backward, forward_bytes(*forward), backward_bytes(*backward))


def flash_attention(launch: Launch, sizes: Sizes = SIZES) -> AnyOp:
    """The op on ``launch``."""
    kernels = Kernels(launch, "flash_attention")

    def tile(n: Numbers, q: Array, v: Array) -> Tiles:
        return tiles(n.storage, q.shape[3], v.shape[3], sizes)

    def flash_attention_forward(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float,
        causal: bool = True,
        key_mask: Array | None = None,
        segments: Array | None = None,
        block: int = 128,
    ) -> tuple[Array, FlashAttentionSaved]:
        n = numbers(q=q, k=k, v=v)
        check_attention(q, k, v, causal, key_mask, segments)
        if block < 1:  # the kernel's tiles are its own
            raise ValueError(f"block must be at least 1, got {block}")
        shape = tile(n, q, v)
        q = ready(q)
        k = ready(k)
        v = ready(v)
        (b, t, h, _), width = q.shape, v.shape[3]
        o = kernels.empty((b, t, h, width), q.dtype, q)
        lse = kernels.empty((b, h, t), n.real, q)
        masks = _masks(q, k, key_mask, segments)
        saved = FlashAttentionSaved(q, k, v, o, lse, float(scale), bool(causal), *masks)
        start = partial(_start, kernels, n, saved, shape)
        start("flash_attention_forward", b * h, t, o, lse, q, k, v)
        return o, saved

    def flash_attention_backward(
        do: Array, saved: FlashAttentionSaved
    ) -> tuple[Array, Array, Array]:
        q, k, v, o, lse, *_ = saved
        n = numbers(q=q, do=do)
        expect("do", do, "(B, T, H, V)", tuple(o.shape))
        do, shape = ready(do), tile(n, q, v)
        b, t, h, width = o.shape
        row_sum = kernels.empty(lse.shape, n.real, q)
        rows, at_once = b * t * h, ROW_THREADS // 32
        kernels(
            "flash_attention_row_sum",
            n.storage,
            cover(rows, at_once),
            ROW_THREADS,
            row_sum,
            do,
            o,
            np.int64(rows),
            t,
            h,
            width,
            defines=shape.defines,
        )
        dq, dk, dv = (kernels.empty(x.shape, x.dtype, x) for x in (q, k, v))
        given = do, q, k, v, lse, row_sum
        start = partial(_start, kernels, n, saved, shape)
        alone = k.shape[2] == v.shape[2] == h  # else a block adds up over the heads of queries
        start("flash_attention_backward_keys", b * h if alone else b, k.shape[1], dk, dv, *given)
        start("flash_attention_backward_queries", b * h, t, dq, *given)
        return dq, dk, dv

    return Op(flash_attention_forward, flash_attention_backward)


def attention(launch: Launch, sizes: Sizes = SIZES) -> AnyOp:
    """`flash_attention` with the arguments of the op `attention`; the mean of all values for a
    query that sees nothing, and wider heads, are left to that."""
    flash, reference = flash_attention(launch, sizes), REFERENCE["attention"]

    def attention_forward(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float,
        causal: bool = True,
        key_mask: Array | None = None,
        segments: Array | None = None,
        blind: BlindQuery = "zero",
    ) -> tuple[Array, Any]:
        arguments: dict[str, Any] = {
            "scale": scale,
            "causal": causal,
            "key_mask": key_mask,
            "segments": segments,
        }
        if blind == "zero" and max(q.shape[-1], v.shape[-1]) <= WIDEST:
            o, saved = flash.forward(q, k, v, **arguments)
        else:
            o, saved = reference.forward(q, k, v, **arguments, blind=blind)
        return o, saved

    def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
        pair = reference if isinstance(saved, AttentionSaved) else flash
        dq, dk, dv = pair.backward(do, saved)
        return dq, dk, dv

    return Op(attention_forward, attention_backward)


def _masks(
    q: Array, k: Array, key_mask: Array | None, segments: Array | None
) -> tuple[Array, Array, bool]:
    """Both masks as the kernels read them, and whether they do."""
    xp, shape = library(q), k.shape[:2]
    masked = key_mask is not None or segments is not None
    if not masked:
        return xp.zeros(1, dtype=xp.uint8), xp.zeros(1, dtype=xp.int64), False
    shown = xp.ones(shape, dtype=xp.uint8) if key_mask is None else ready(key_mask, xp.uint8)
    owner = xp.zeros(shape, dtype=xp.int64) if segments is None else ready(segments, xp.int64)
    return shown, owner, True


def _settings(n: Numbers, saved: FlashAttentionSaved) -> Iterator[Any]:
    """The arguments behind the arrays."""
    q, k, v, *_ = saved
    yield from (saved.key_mask, saved.segments, q.shape[1], k.shape[1], q.shape[2])
    yield from (k.shape[2], v.shape[2], q.shape[3], v.shape[3])
    yield from (n.scalar(saved.scale), int(saved.causal), int(saved.masked))


def _start(
    kernels: Kernels,
    n: Numbers,
    saved: FlashAttentionSaved,
    shape: Tiles,
    kernel: str,
    heads: int,
    rows: int,
    *arrays: Array,
) -> None:
    """Blocks for so many heads of so many rows. A block takes a tile of rows; in Numba CUDA one of
    them, a thread per column."""
    given = *arrays, *_settings(n, saved)
    if isinstance(kernels.launch, NumbaLaunch):
        widest = max(shape.key_width, shape.value_width)
        kernels(kernel, n.storage, heads * rows, 32 * cover(widest, 32), *given)
        return
    forward = kernel.endswith("forward")
    warps, _ = shape.forward if forward else shape.backward
    kernels(
        kernel,
        n.storage,
        (heads, cover(rows, OWN * warps)),
        32 * warps,
        *given,
        shared=shape.forward_shared if forward else shape.backward_shared,
        defines=shape.defines,
    )
