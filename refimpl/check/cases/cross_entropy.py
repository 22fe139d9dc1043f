"""Cases of `cross_entropy`: targets that count in full, in part or not at all; both normalisers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .draw import Case, Draw, flags, random_mask

__all__ = ["REGIMES", "case"]

# that the cases of a run must meet
REGIMES = {"masked", "whole", "weighted", "own_mean", "given_normaliser"}


def case(draw: Draw) -> Case:
    """A drawn case of `cross_entropy`, with the regimes that it meets."""
    b = draw.integer(2, 3)
    t = draw.integer(1, 4)
    w = draw.integer(2, 9)
    kwargs, regimes = targets(draw, b, t, w)
    normaliser = draw.choice([None, 3.7])
    kwargs["normaliser"] = normaliser
    regimes |= flags(own_mean=normaliser is None, given_normaliser=normaliser is not None)
    return Case((draw.rng.normal(size=(b, t, w)) * draw.choice([0.5, 2.0]),), kwargs, regimes)


def targets(draw: Draw, b: int, t: int, vocabulary: int) -> tuple[dict[str, Any], set[str]]:
    """Targets with their mask or weights; −100 stands where a target does not count."""
    ids = draw.tokens((b, t), vocabulary)
    kind = draw.choice(["whole", "masked", "weighted"])
    mask = None if kind == "whole" else random_mask(draw, b, t)
    if kind == "weighted" and mask is not None:
        mask = mask * draw.rng.uniform(0.3, 2.0, mask.shape)
    if mask is not None:
        ids = np.where(mask != 0, ids, -100)
    return {"targets": ids, "mask": mask}, {kind}
