"""bfloat16 without an op that computes in it: every op rounds what it returns, forward and
backward; inside, and what it saves, is float32.

Rounded to the nearest, two runs with sums in other orders are nearly the same run: their float32
sums differ by less than a rounding step. `rounded` by chance makes runs that are independent draws
of rounding, as two implementations are that round in other places.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ..ops import AnyOp, Op

__all__ = ["nudged", "round_bfloat16", "rounded", "rounded_by_chance"]


def on_arrays(to: Callable[[np.ndarray], np.ndarray], x: Any) -> Any:
    """``to`` of the floating arrays in ``x``, a tuple or an array; all else as it is."""
    if isinstance(x, tuple):
        parts = [on_arrays(to, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, np.ndarray | np.floating) and x.dtype.kind == "f":
        return to(np.asanyarray(x))
    return x


def with_results(op: AnyOp, to: Callable[[Any], Any]) -> AnyOp:
    """``op``, of whose outputs and gradients ``to`` is taken; what it saves is as it was."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        return to(y), saved

    def backward(dy: Any, saved: Any) -> Any:
        return to(op.backward(dy, saved))

    return Op(forward, backward)


def round_bfloat16(x: Any) -> Any:
    """The floating arrays in ``x``, a tuple or an array, rounded to bfloat16's values and stored as
    they were; all else as it is."""
    return on_arrays(lambda part: part.astype(ml_dtypes.bfloat16).astype(part.dtype), x)


def rounded_by_chance(x: Any, seed: int) -> Any:
    """As `round_bfloat16`, but up or down with a chance that makes the mean right. It is the same
    for the same numbers and seed, whatever was rounded before."""

    def by_chance(part: np.ndarray) -> np.ndarray:
        single = np.array(part, np.float32)
        bits = single.view(np.uint32)
        up = bits + drawn(single, seed).integers(0, 2**16, bits.shape, np.uint32)
        found = (up & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(single), found, single).astype(part.dtype)

    return on_arrays(by_chance, x)


def drawn(x: np.ndarray, seed: int) -> np.random.Generator:
    """A generator that depends on the numbers of ``x`` and the seed alone."""
    return np.random.default_rng([seed, zlib.crc32(x.tobytes())])


def rounded(op: AnyOp, seed: int | None = None) -> AnyOp:
    """``op``, whose outputs and gradients are rounded, with a ``seed`` by chance; what it saves is
    not."""
    return with_results(
        op, round_bfloat16 if seed is None else partial(rounded_by_chance, seed=seed)
    )


def nudged(op: AnyOp, seed: int, steps: int = 1) -> AnyOp:
    """``op``, each number of whose float32 outputs and gradients is, by chance, so many steps of
    float32 larger or smaller, or as it was: as sums in another order make it."""

    def to_next(x: np.ndarray) -> np.ndarray:
        if x.dtype != np.float32:
            return x
        way = drawn(x, seed).integers(-1, 2, x.shape)
        return np.asarray(x + (steps * way).astype(np.float32) * np.spacing(np.abs(x)))

    return with_results(op, partial(on_arrays, to_next))
