"""Attention of decoding on kernels/mla_decode.cu, in the place of `refimpl.ops.attention`, and for
bfloat16: all heads share one key and one value per cached token, both in its row of the latent
cache.

Letters: B sequences, T new tokens, S cached ones, H heads, X and V the widths of keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, library
from ..ops import REFERENCE, AnyOp, Op
from ..ops.attention import check_attention
from ..ops.choices import BlindQuery
from .flash_attention import attention
from .host import Kernels, cover, numbers, ready
from .launch import Launch

__all__ = [
    "COMPILED_AHEAD",
    "SHARED",
    "SIZES",
    "MLADecodeSaved",
    "Tiles",
    "mla_decode",
    "splits",
    "tiles",
    "tiles_ahead",
]

OWN = 16  # rows of one product, as in the kernel
SHARED = (163 << 10, 99 << 10)
"""Bytes of shared memory per block that tiles are made for: what data-centre GPUs have from sm_80
on, and what every GPU has. A GPU with more leaves the rest unused: other tiles would add in another
order."""
SIZES = ((64, 32), (32, 16), (16, 16), (16, 8))  # rows of a block, keys of a tile: the best first
MULTIPROCESSORS = 132  # keys are split for so many, one block each, whatever the GPU has
MOST_THREADS = 256  # of a block of mla_decode_combine, a thread per column
COMPILED_AHEAD = ((576, 512), (48, 32), (11, 7))
"""Widths of cache rows and values: V3's (and V2's, Kimi-K2's, GLM-4.7-Flash's), those of the
presets mini and tiny."""


class MLADecodeSaved(NamedTuple):
    """The arguments of a step of decoding."""

    q: Array  # [B, T, H, X]
    k: Array  # [B, S, 1, X]
    v: Array  # [B, S, 1, V], in the memory of k
    settings: dict[str, Any]  # of `attention_forward`


class Tiles(NamedTuple):
    """How the kernels are compiled and launched for given widths and a storage type."""

    key_width: int  # of the kernel, a multiple of 32
    value_width: int
    warps: int
    rows: int  # of a block: heads of queries
    keys: int  # of a tile
    shared: int  # bytes

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        names = "KEY_WIDTH", "VALUE_WIDTH", "WARPS", "ROWS", "KEYS"
        return tuple(zip(names, self[:5], strict=True))


def tiles(
    storage: str,
    key_width: int,
    value_width: int,
    shared: int = SHARED[0],
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> Tiles | None:
    """The first of ``sizes`` that fits into ``shared`` bytes per block, or None."""
    size, real = {"float64": (8, 8), "float32": (4, 4), "bfloat16": (2, 4)}[storage]
    most = cover(value_width, OWN)
    warps = next(n for n in (8, 4, 2, 1) if n <= most)
    v = OWN * warps * cover(most, warps)
    x = 32 * cover(max(key_width, v), 32)
    least = OWN if storage == "bfloat16" else 1  # keys of one product on tensor cores
    for rows, keys in sizes:
        needed = (rows + 2 * keys) * (x * size + 16) + rows * (keys * real + 16 + real)
        if rows <= 32 * warps and keys >= least and needed <= shared:
            return Tiles(x, v, warps, rows, keys, needed)
    return None


def tiles_ahead(storage: str) -> list[Tiles]:
    """Those of `COMPILED_AHEAD`, for both sizes of shared memory."""
    found = [tiles(storage, *widths, shared) for widths in COMPILED_AHEAD for shared in SHARED]
    return [*dict.fromkeys(shape for shape in found if shape is not None)]


def splits(shape: Tiles, batch: int, rows: int, keys: int, most: int) -> tuple[int, int]:
    """(tiles of keys per split, number of splits), from shapes alone: at most ``most`` blocks run,
    or one per block of rows if that is more."""
    count = cover(keys, shape.keys)
    each = cover(count, max(most // (batch * cover(rows, shape.rows)), 1))
    return each, cover(count, each)


def mla_decode(
    launch: Launch,
    shared: int | None = None,
    *,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    multiprocessors: int = MULTIPROCESSORS,
) -> AnyOp:
    """The op on ``launch``. If keys and values are not in one cache, or all tiles are too large, it
    is `flash_attention.attention`, which leaves wide heads to the reference.

    Args:
        shared: bytes of shared memory per block; by default the most of `SHARED` that the device of
            ``launch`` has.
        sizes, multiprocessors: for tests, which want several tiles and splits in small examples.
    """
    kernels, other = Kernels(launch, "mla_decode"), attention(launch)
    if shared is None:
        shared = next((size for size in SHARED if size <= launch.most_shared), SHARED[-1])

    def mla_decode_forward(
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
        settings = {
            "scale": float(scale),
            "causal": causal,
            "key_mask": key_mask,
            "segments": segments,
        }
        n = numbers(q=q, k=k, v=v)
        check_attention(q, k, v, causal, key_mask, segments)
        shape = tiles(n.storage, k.shape[3], v.shape[3], shared, sizes)
        if blind != "zero" or shape is None or not begins_with(k, v):
            o, left = other.forward(q, k, v, **settings, blind=blind)
            return o, left
        q, cache = ready(q), ready(k)
        b, t, h, x = q.shape
        s, width = k.shape[1], v.shape[3]
        each, parts = splits(shape, b, t * h, s, multiprocessors)
        numerators = kernels.empty((b * t * h, parts, width), n.real, q)
        totals = kernels.empty((b * t * h, parts, 2), n.real, q)
        o = kernels.empty((b, t, h, width), q.dtype, q)
        xp = n.xp
        hidden = xp.zeros(1, dtype=xp.uint8) if key_mask is None else ready(key_mask, xp.uint8)
        owners = xp.zeros(1, dtype=xp.int64) if segments is None else ready(segments, xp.int64)
        kernels(
            "mla_decode_split",
            n.storage,
            (b * cover(t * h, shape.rows), parts),
            32 * shape.warps,
            *(numerators, totals, q, cache, hidden, owners),
            *(t, h, s, x, width, each, n.scalar(scale), int(causal)),
            *(int(key_mask is not None), int(segments is not None)),
            shared=shape.shared,
            defines=shape.defines,
        )
        kernels(
            "mla_decode_combine",
            n.storage,
            b * t * h,
            min(32 * cover(width, 32), MOST_THREADS),
            *(o, numerators, totals, parts, width),
            defines=shape.defines,
        )
        return o, MLADecodeSaved(q, k, v, settings)

    def mla_decode_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
        """The reference's backward, after its forward: decoding asks for no gradients."""
        if not isinstance(saved, MLADecodeSaved):
            dq, dk, dv = other.backward(do, saved)
            return dq, dk, dv
        q, k, v, settings = saved
        _, kept = REFERENCE.attention.forward(q, k, v, **settings)
        dq, dk, dv = REFERENCE.attention.backward(do, kept)
        return dq, dk, dv

    return Op(mla_decode_forward, mla_decode_backward)


def begins_with(k: Array, v: Array) -> bool:
    """Whether ``v`` [B, S, 1, V] is a view of the first V columns of ``k`` [B, S, 1, X]. False if
    either has several heads."""
    if (k.shape[2], v.shape[2]) != (1, 1) or v.shape[3] > k.shape[3]:
        return False
    on_device = library(k).__name__ == "cupy"
    addresses = {x.data.ptr if on_device else x.ctypes.data for x in (k, v)}
    # An axis of length 1 may have any stride
    steps = [x.strides[i] for i in (0, 1) if k.shape[i] > 1 for x in (k, v)]
    rows = steps[::2] == steps[1::2] and k.strides[3] == v.strides[3]
    return len(addresses) == 1 and rows
