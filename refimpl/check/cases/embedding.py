"""Cases of `embedding`: ids that come twice, and rows that no id asks for."""

from __future__ import annotations

from .draw import Case, Draw, flags

__all__ = ["REGIMES", "case"]

REGIMES = {"repeated", "unused"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `embedding`, with the regimes that it meets."""
    w = draw.integer(3, 9)
    d = draw.integer(1, 5)
    ids = draw.tokens((draw.integer(1, 3), draw.integer(2, 6)), w)
    used = len(set(ids.flat))
    regimes = flags(repeated=used < ids.size, unused=used < w)
    return Case((draw.rng.normal(size=(w, d)),), {"ids": ids}, regimes)
