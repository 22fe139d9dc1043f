"""Cases of `rope`: positions of any sign, in order or not, one list for all rows or one per row;
both layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ops import Yarn, rope_frequencies
from .draw import Case, Draw, flags

__all__ = ["REGIMES", "case"]

REGIMES = {"interleaved", "halves", "by_row", "shared"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `rope`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    h = draw.integer(1, 3)
    r = 2 * draw.integer(1, 4)
    kwargs = rotation(draw, b, t, r)
    axes = kwargs["positions"].ndim
    regimes = {kwargs["layout"]} | flags(by_row=axes == 2, shared=axes == 1)
    return Case((draw.rng.normal(size=(b, t, h, r)),), kwargs, regimes)


def rotation(draw: Draw, b: int, t: int, r: int) -> dict[str, Any]:
    """The arguments of a rotation of width ``r``."""
    yarn = draw.choice([None, Yarn(4.0, 16, 4.0, 1.0), Yarn(10.0, 64, 8.0, 2.0)])
    start = draw.rng.integers(-30, 50, (b, 1))
    return {
        "positions": draw.choice(
            [np.arange(t) + 3, start + np.arange(t), draw.rng.integers(-90, 90, (b, t))]
        ),
        "inv_freq": rope_frequencies(r, draw.choice([30.0, 1e4]), yarn),
        "layout": draw.choice(["interleaved", "halves"]),
        "factor": draw.choice([0.8, 1.25]),
    }
