"""Cases of `balance_loss`: counts of a router and of the best scores; sequences without a token;
whole batches and parts of them."""

from __future__ import annotations

import numpy as np

from .draw import Case, Draw, flags, random_mask

__all__ = ["REGIMES", "case"]

# that the cases of a run must meet
REGIMES = {"masked", "unmasked", "empty_sequence", "routed", "best", "part", "cut"}


def case(draw: Draw) -> Case:
    """A drawn case of `balance_loss`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 5)
    e = draw.integer(3, 7)
    k = draw.integer(2, e - 1)
    scores = draw.rng.uniform(0.05, 0.95, (b, t, e))
    given = draw.choice([True, False])
    order = draw.rng.random((b, t, e)) if given else -scores
    counted = np.argsort(order, axis=-1, kind="stable")[..., :k]
    mask = draw.choice([None, random_mask(draw, b, t)])
    one_hot = (counted[..., None] == np.arange(e)).sum(axis=2)
    counts = (one_hot * (1 if mask is None else mask[..., None])).sum(axis=1)
    if np.ptp(counts, axis=-1).max() == 0:  # all counts equal: the gradient is exactly 0
        counted = np.broadcast_to(counted[:, :1], counted.shape)
    sequences = draw.choice([None, 1.5 * b])
    cut = None
    if draw.choice([True, False]):
        whole = counts + draw.rng.integers(0, 4, counts.shape)
        whole[:, 0] += np.ptp(whole, axis=-1) == 0  # equal counts: no gradient
        cut = whole, draw.rng.integers(t, 2 * t + 2, b)
    regimes = flags(
        masked=mask is not None,
        unmasked=mask is None,
        empty_sequence=mask is not None and not mask.any(axis=1).all(),
        routed=given,
        best=not given,
        part=sequences is not None,
        cut=cut is not None,
    )
    kwargs = {"alpha": draw.choice([0.02, 0.7]), "top_k": k, "counted": counted, "mask": mask}
    kwargs |= {"sequences": sequences, "cut": cut}
    return Case((scores,), kwargs, regimes)
