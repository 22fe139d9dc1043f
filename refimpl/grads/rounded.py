"""bfloat16 without an op that computes in it: every op rounds what it returns, forward and
backward; inside, and what it saves, is float32.

Rounded to the nearest, two runs with sums in other orders are nearly the same run: their float32
sums differ by less than a rounding step. `rounded` by chance makes runs that are independent draws
of rounding, as two implementations are that round in other places.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ..ops import AnyOp, Op

__all__ = ["nudged", "round_bfloat16", "rounded", "rounded_by_chance"]


def round_bfloat16(x: Any) -> Any:
    """The floating arrays in ``x``, a tuple or an array, rounded to bfloat16's values and stored as
    they were; all else as it is."""
    if isinstance(x, tuple):
        parts = [round_bfloat16(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, np.ndarray | np.floating) and x.dtype.kind == "f":
        return np.asanyarray(x).astype(ml_dtypes.bfloat16).astype(x.dtype)
    return x


def rounded_by_chance(x: Any, seed: int) -> Any:
    """As `round_bfloat16`, but up or down with a chance that makes the mean right. It is the same
    for the same numbers and seed, whatever was rounded before."""
    if isinstance(x, tuple):
        parts = [rounded_by_chance(part, seed) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not (isinstance(x, np.ndarray | np.floating) and x.dtype.kind == "f"):
        return x
    single = np.array(x, np.float32)
    bits = single.view(np.uint32)
    rng = np.random.default_rng([seed, zlib.crc32(bits.tobytes())])
    up = bits + rng.integers(0, 2**16, bits.shape, np.uint32)
    found = (up & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(single), found, single).astype(x.dtype)


def rounded(op: AnyOp, seed: int | None = None) -> AnyOp:
    """``op``, whose outputs and gradients are rounded, with a ``seed`` by chance; what it saves is
    not."""
    to_type = round_bfloat16 if seed is None else partial(rounded_by_chance, seed=seed)

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        return to_type(y), saved

    def backward(dy: Any, saved: Any) -> Any:
        return to_type(op.backward(dy, saved))

    return Op(forward, backward)


def nudged(op: AnyOp, seed: int) -> AnyOp:
    """``op``, each number of whose float32 outputs and gradients is, by chance, the next larger or
    smaller one, or as it was: as sums in another order make it."""

    def to_next(x: Any) -> Any:
        if isinstance(x, tuple):
            parts = [to_next(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if not (isinstance(x, np.ndarray) and x.dtype == np.float32):
            return x
        rng = np.random.default_rng([seed, zlib.crc32(x.tobytes())])
        way = rng.integers(-1, 2, x.shape)
        towards = np.where(way > 0, np.float32(np.inf), np.float32(-np.inf))
        return np.where(way == 0, x, np.nextafter(x, towards))

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        return to_next(y), saved

    def backward(dy: Any, saved: Any) -> Any:
        return to_next(op.backward(dy, saved))

    return Op(forward, backward)
