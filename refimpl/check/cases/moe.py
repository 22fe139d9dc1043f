"""Cases of `moe`: always an expert without tokens; with and without shared experts."""

from __future__ import annotations

import numpy as np

from .draw import Case, Draw, activations, flags, weight

__all__ = ["REGIMES", "case"]

# that the cases of a run must meet
REGIMES = {"all_but_one_hit", "some_empty", "shared", "only_routed", "one_token", "one_choice"}


def case(draw: Draw) -> Case:
    """A drawn case of `moe`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    d = draw.integer(1, 5)
    f = draw.integer(1, 5)
    e = draw.integer(3, 6)
    k = draw.integer(1, e - 1)
    shared = draw.choice([0, draw.integer(1, 6)])
    empty = draw.integer(0, e - 1)  # at least this expert gets no token
    used = np.array([i for i in range(e) if i != empty])
    indices = used[np.argsort(draw.rng.random((b, t, e - 1)), axis=-1)[..., :k]]
    weights = draw.rng.uniform(0.2, 1.5, (b, t, k))
    experts = [
        weight(draw, e, f, d),
        weight(draw, e, f, d),
        weight(draw, e, d, f),
        weight(draw, shared, d) if shared else None,
        weight(draw, shared, d) if shared else None,
        weight(draw, d, shared) if shared else None,
    ]
    hit = len(set(indices.flat)) == e - 1
    regimes = flags(
        all_but_one_hit=hit,
        some_empty=not hit,
        shared=shared,
        only_routed=not shared,
        one_token=b * t == 1,
        one_choice=k == 1,
    )
    inputs = (activations(draw, b, t, d), weights, *experts)
    return Case(inputs, {"indices": indices}, regimes)
