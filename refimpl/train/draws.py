"""Random numbers that depend only on a seed, a name and counters: a resumed run draws the same
numbers as one that was not stopped."""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["generator", "seed_of_rows"]


def generator(seed: int, what: str, *numbers: int) -> np.random.Generator:
    """A generator for what is drawn (as in "order"), the ``numbers``-th time (of the epoch, the
    step, …); seed and numbers are at least 0."""
    return np.random.default_rng([seed, zlib.crc32(what.encode()), *numbers])


def seed_of_rows(seed: int, what: str, *numbers: int) -> int:
    """A seed for `generate`, whose rows count up from it: so far from any other that the rows of
    two draws do not meet."""
    return int(generator(seed, what, *numbers).integers(2**62))
