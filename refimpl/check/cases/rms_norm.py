"""Cases of `rms_norm`: width 1, an eps that counts and one that does not."""

from __future__ import annotations

from .draw import Case, Draw, activations, flags, norm_weight

__all__ = ["REGIMES", "case"]

REGIMES = {"one", "many", "small_eps", "one_row"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `rms_norm`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    d = draw.integer(1, 9)
    scale = draw.choice([0.3, 1.0, 3.0])
    x = activations(draw, b, t, d, scale)
    # at D = 1 a small eps leaves no gradient
    eps = draw.choice([0.05, 0.2, 0.7, 1e-6 if d > 1 else 0.05])
    regimes = flags(one=d == 1, many=d > 1, small_eps=eps < 1e-3, one_row=b == 1)
    return Case((x, norm_weight(draw, d)), {"eps": eps}, regimes)
