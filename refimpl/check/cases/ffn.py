"""Cases of `ffn`: any widths, 1 among them."""

from __future__ import annotations

from .draw import Case, Draw, activations, flags, weight

__all__ = ["REGIMES", "case"]

REGIMES = {"narrow", "wide"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `ffn`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    d = draw.integer(1, 6)
    f = draw.integer(1, 7)
    x = activations(draw, b, t, d)
    inputs = (x, weight(draw, f, d), weight(draw, f, d), weight(draw, d, f))
    return Case(inputs, {}, flags(narrow=d == 1 or f == 1, wide=d > 1 and f > 1))
