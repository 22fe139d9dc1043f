"""Cases of `log_prob`: masks, weights, two temperatures, one block or several."""

from __future__ import annotations

from .cross_entropy import targets
from .draw import Case, Draw, activations, flags, weight

__all__ = ["REGIMES", "case"]

# that the cases of a run must meet
REGIMES = {"masked", "whole", "weighted", "one_block", "blocks"}


def case(draw: Draw) -> Case:
    """A drawn case of `log_prob`, with the regimes that it meets."""
    b = draw.integer(2, 3)
    t = draw.integer(1, 4)
    w = draw.integer(2, 9)
    d = draw.integer(1, 5)
    kwargs, regimes = targets(draw, b, t, w)
    kwargs["temperature"] = draw.choice([0.6, 1.7])
    kwargs["block"] = draw.choice([(1, 1), (2, 3), (256, 4096)])
    regimes |= flags(one_block=kwargs["block"][0] > t * b, blocks=kwargs["block"][1] < w)
    return Case((activations(draw, b, t, d, 0.5), weight(draw, w, d)), kwargs, regimes)
