"""Cases of `linear`: any widths, 1 among them."""

from __future__ import annotations

from .draw import Case, Draw, activations, flags, weight

__all__ = ["REGIMES", "case"]

REGIMES = {"narrow", "wide"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `linear`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    i = draw.integer(1, 7)
    o = draw.integer(1, 6)
    inputs = (activations(draw, b, t, i), weight(draw, o, i))
    return Case(inputs, {}, flags(narrow=i == 1 or o == 1, wide=i > 1 and o > 1))
