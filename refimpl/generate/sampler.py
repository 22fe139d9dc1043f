"""How tokens are chosen from logits, a whole batch at once.

Letters: B rows, W vocabulary.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import numpy as np

from ..array import Array, argsort, fill, library

__all__ = ["Choice", "Sampler", "to_numpy"]

AHEAD = 64  # uniform numbers that a row draws at a time
NOT_A_NUMBER, NOTHING = -1, -2  # in the place of a token


class Choice(NamedTuple):
    """The tokens that `choose` drew."""

    tokens: np.ndarray  # [B]
    log_probs: np.ndarray | None  # [B]: of these tokens; None unless asked for


class Sampler:
    """The largest logit at temperature 0, else a token drawn from the nucleus.

    p = softmax(logits / temperature) in float64. With top_p = 1 the running sum of p in the order
    of ids is what a uniform number picks from. Else p is sorted downwards, equal ones by the lower
    id first, and the nucleus is the shortest beginning whose sum is at least top_p (a sum of
    exactly top_p suffices). Row b draws its uniform numbers, one per token, from
    ``np.random.default_rng(seed + b)``: so it gets the same tokens whatever else is in the batch
    and is drafted.
    """

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, rows: int = 1
    ) -> None:
        if not (isfinite(temperature) and temperature >= 0):
            raise ValueError(
                f"temperature must be a finite number of at least 0, got {temperature}"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.temperature = temperature
        self.top_p = top_p
        self.streams = [np.random.default_rng(seed + row) for row in range(rows)]
        self.uniform = np.empty((rows, 0))
        self.drawn = 0  # of the columns of ``uniform``

    def choose(
        self, logits: Array, rows: np.ndarray | None = None, *, log_probs: bool = False
    ) -> Choice:
        """A token for each row of ``logits`` [B, W].

        ``rows`` [B] are the sampler's rows that these are, by default all. Each call draws one
        number for every row of the sampler. The log-probability of a token is that of the whole
        softmax, before top_p; at temperature 0 that of temperature 1.

        ValueError if a logit is not a number, or all of a row are −∞. +∞ is that token, or one of
        several.
        """
        xp = library(logits)
        z = xp.astype(logits, xp.float64)
        top = xp.max(z, axis=-1, keepdims=True)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            away = xp.where(z == top, 0.0, z - top) / (self.temperature or 1.0)
            if self.temperature == 0:
                tokens = xp.argmax(z, axis=-1, keepdims=True)
            else:
                tokens = self.draw(xp.exp(away), rows)
            found = None
            if log_probs:
                total = xp.sum(xp.exp(away), axis=-1, keepdims=True)
                found = to_numpy((xp.take_along_axis(away, tokens, axis=-1) - xp.log(total))[:, 0])
        tokens = xp.where(xp.isnan(top), NOT_A_NUMBER, tokens)
        tokens = xp.where(top == -xp.inf, NOTHING, tokens)
        chosen = to_numpy(tokens[:, 0])
        if (chosen == NOT_A_NUMBER).any():
            raise ValueError("logits must be numbers, got NaN: did the model overflow?")
        if (chosen == NOTHING).any():
            raise ValueError("logits must not all be −∞: there is nothing to choose")
        return Choice(chosen, found)

    def draw(self, p: Array, rows: np.ndarray | None = None) -> Array:
        """Tokens [B, 1] from probabilities ``p`` [B, W] times any factor, by the next number of
        each row."""
        xp = library(p)
        ids = None
        if self.top_p < 1:
            ids, p = self.nucleus(p / xp.sum(p, axis=-1, keepdims=True))
        total = running_sum(p)
        u = xp.asarray(self.next(rows)[:, None], device=p.device)
        # random() is at most 1 − 2⁻⁵³, so the product rounds below the whole
        above = (total > u * total[:, -1:]) & (p > 0)
        place = xp.argmax(xp.astype(above, xp.int8), axis=-1, keepdims=True)
        return place if ids is None else xp.take_along_axis(ids, place, axis=-1)

    def nucleus(self, p: Array) -> tuple[Array, Array]:
        """The tokens [B, W], most probable first, and their probabilities ``p`` [B, W], 0 behind
        the cut."""
        xp = library(p)
        ids = argsort(-p)
        p = xp.take_along_axis(p, ids, axis=-1)
        short = xp.astype(running_sum(p) < self.top_p, xp.int64)  # sums that do not suffice
        count = xp.sum(short, axis=-1, keepdims=True) + 1
        return ids, fill(xp.arange(p.shape[-1], device=p.device) < count, p, 0.0)

    def next(self, rows: np.ndarray | None) -> np.ndarray:
        """The next uniform number of each of these rows."""
        if self.drawn == self.uniform.shape[1]:
            self.uniform = np.stack([stream.random(AHEAD) for stream in self.streams])
            self.drawn = 0
        self.drawn += 1
        found = self.uniform[:, self.drawn - 1]
        return found if rows is None else found[rows]


def running_sum(x: Array) -> Array:
    """Sums of the first 1, 2, … entries along the last axis."""
    xp = library(x)
    return xp.cumsum(x, axis=-1) if hasattr(xp, "cumsum") else xp.cumulative_sum(x, axis=-1)


def to_numpy(x: Array) -> np.ndarray:
    """A host copy of ``x``, an array of any library and any shape."""
    return np.asarray(x.get() if hasattr(x, "get") else x)
