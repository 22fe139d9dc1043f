"""Cases of `swiglu`: gates of both signs, and gates so large that the sigmoid saturates."""

from __future__ import annotations

from .draw import Case, Draw, activations, flags

__all__ = ["REGIMES", "case"]

REGIMES = {"negative", "positive", "saturated"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `swiglu`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    d = draw.integer(1, 7)
    scale = draw.choice([0.5, 2.0, 8.0])
    gate = activations(draw, b, t, d, scale)
    up = activations(draw, b, t, d)
    regimes = flags(negative=(gate < 0).any(), positive=(gate > 0).any(), saturated=scale > 2)
    return Case((gate, up), {}, regimes)
