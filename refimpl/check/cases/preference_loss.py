"""Cases of `preference_loss`: pairs in the right and in the wrong order."""

from __future__ import annotations

from .draw import Case, Draw, flags, weight

__all__ = ["REGIMES", "case"]

REGIMES = {"wrong_order", "right_order", "narrow"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `preference_loss`, with the regimes that it meets."""
    n = draw.integer(2, 4)
    d = draw.integer(1, 5)
    scale = draw.choice([0.5, 2.0])
    chosen = draw.rng.normal(size=(n, d))
    rejected = draw.rng.normal(size=(n, d))
    w = scale * weight(draw, 1, d)
    wrong = ((chosen - rejected) @ w.T < 0).any()
    regimes = flags(wrong_order=wrong, right_order=not wrong, narrow=d == 1)
    return Case((chosen, rejected, w), {}, regimes)
