"""Cases of `attention`: training, prefill and decoding with a cache; own and shared heads; masks,
and queries that see nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ops.attention import visible
from .draw import Case, Draw, flags, random_mask

__all__ = ["REGIMES", "case"]

REGIMES = {  # that the cases of a run must meet
    "padding",
    "documents",
    "sees_nothing",
    "unmasked",
    "causal",
    "full",
    "cached",
    "square",
    "decode",
    "more_queries",
    "shared_key",
    "shared_value",
    "own_heads",
    "value_width_differs",
    "one_width",
}


def case(draw: Draw) -> Case:
    """A drawn case of `attention`, with the regimes that it meets."""
    b = draw.integer(2, 3)
    t = draw.integer(1, 5)
    h = draw.integer(1, 3)
    s = t + draw.integer(0 if t > 1 else 1, 3)
    causal = draw.choice([True, False])
    if t > 1 and not causal and draw.choice([True, False]):
        t, s = s, t  # a block of keys
    x = draw.integer(1, 6)
    v = draw.choice([x, draw.integer(1, 5)])
    k_heads = draw.choice([1, h])
    v_heads = draw.choice([1, h])
    kwargs, regimes = masks(draw, b, t, s, causal)
    regimes |= flags(
        causal=causal,
        full=not causal,
        cached=t < s,
        square=t == s,
        decode=t == 1,
        more_queries=t > s,
        shared_key=k_heads < h,
        shared_value=v_heads < h,
        own_heads=k_heads == h,
        value_width_differs=v != x,
        one_width=v == x,
    )
    inputs = (
        draw.rng.normal(size=(b, t, h, x)),
        draw.rng.normal(size=(b, s, k_heads, x)),
        draw.rng.normal(size=(b, s, v_heads, v)),
    )
    return Case(inputs, {"scale": draw.choice([0.3, 0.6]), "causal": causal, **kwargs}, regimes)


def masks(draw: Draw, b: int, t: int, s: int, causal: bool) -> tuple[dict[str, Any], set[str]]:
    """Key padding and document masks such that two queries see two keys or more: else little
    depends on q or k."""
    q = np.zeros((b, t, 1, 1))
    k = np.zeros((b, s, 1, 1))
    key_mask = draw.choice([None, random_mask(draw, b, s)])
    documents = np.sort(draw.rng.integers(0, 3, (b, s)), axis=1)
    segments = draw.choice([None, documents]) if t <= s else None
    seen = visible((0, t), (0, s), q, k, causal, key_mask, segments)
    if (np.broadcast_to(seen, (b, 1, t, s)).sum(axis=-1) >= 2).sum() < 2:
        key_mask = segments = None
        seen = visible((0, t), (0, s), q, k, causal, None, None)
    blind = (seen.sum(axis=-1) == 0).any()
    regimes = flags(
        padding=key_mask is not None,
        documents=segments is not None,
        sees_nothing=blind,
        unmasked=blind == 0,
    )
    return {"key_mask": key_mask, "segments": segments}, regimes
