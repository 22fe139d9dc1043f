"""Outputs of a policy for the losses of peers: both signs of the advantage, ratios on both sides of
every bound, two lengths."""

from __future__ import annotations

import numpy as np

RNG = np.random.default_rng(7)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
ADVANTAGES = np.array([0.9, -0.8, 1.3, -0.5])
LOG_PROB = -RNG.uniform(0.2, 2.0, MASK.shape)
# ρ: below, within and above the clip, and above a dual clip of 3
RATIO = np.array(
    [[0.5, 1.1, 1.6, 0.9], [0.5, 3.5, 1, 1], [1.15, 0.6, 1.4, 1], [1.1, 0.7, 3.2, 1.5]]
)
OLD = LOG_PROB - np.log(RATIO)
REFERENCE_LOG_PROB = LOG_PROB + 0.5 * RNG.normal(size=MASK.shape)
