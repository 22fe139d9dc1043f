"""Cases of `mla`: with and without query compression, prefill and decoding with a cache."""

from __future__ import annotations

from .attention import masks
from .draw import Case, Draw, activations, flags, norm_weight, weight
from .rope import rotation

__all__ = ["REGIMES", "case"]

REGIMES = {  # that the cases of a run must meet
    "padding",
    "documents",
    "unmasked",
    "compressed",
    "uncompressed",
    "cached",
    "prefill",
    "decode",
    "value_is_nope",
    "value_differs",
    "many_heads",
}


def case(draw: Draw) -> Case:
    """A drawn case of `mla`, with the regimes that it meets."""
    b = draw.integer(2, 3)
    t = draw.integer(1, 4)
    past = draw.integer(0, 3)
    d = draw.integer(2, 7)
    h = draw.integer(1, 3)
    past = max(past, 2 - t)
    n = draw.integer(1, 4)
    r = 2 * draw.integer(1, 2)
    v = draw.integer(1, 4)
    c = draw.integer(2, 5)
    a = draw.integer(2, 5)
    compressed = draw.choice([True, False])
    x = activations(draw, b, t, d)
    cache = draw.rng.normal(size=(b, past, c + r)) if past else None
    masked, regimes = masks(draw, b, t, t + past, True)
    inputs = (
        x,
        cache,
        weight(draw, a, d) if compressed else None,
        norm_weight(draw, a) if compressed else None,
        weight(draw, h * (n + r), a if compressed else d),
        weight(draw, c + r, d),
        norm_weight(draw, c),
        weight(draw, h * (n + v), c),
        weight(draw, d, h * v),
    )
    kwargs = {
        "heads": h,
        "scale": draw.choice([0.3, 0.6]),
        "eps": draw.choice([0.1, 0.5]),
        **rotation(draw, b, t, r),
        **masked,
    }
    regimes |= flags(
        compressed=compressed,
        uncompressed=not compressed,
        cached=past,
        prefill=not past,
        decode=t == 1,
        value_is_nope=v == n,
        value_differs=v != n,
        many_heads=h > 1,
    )
    return Case(inputs, kwargs, regimes)
