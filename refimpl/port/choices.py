"""Whether rounding can explain that a port's tokens went to other experts than the truth's."""

from __future__ import annotations

import numpy as np

from ..config import ModelConfig
from ..ops.router import summed_scores

__all__ = ["explained"]


def explained(
    ranked: np.ndarray, routes: np.ndarray, slack: float, config: ModelConfig
) -> np.ndarray:
    """Whether scores that differ by at most ``slack`` can choose ``routes`` […, K]; […] bool.

    ``ranked`` […, E]: what the truth's selection ranks, with the bias. Each comparison that the
    choice rests on is given the benefit of the doubt alone, so a False is sure and a True is not.
    """
    chosen = np.zeros(ranked.shape, bool)
    np.put_along_axis(chosen, routes, True, axis=-1)
    every = (*ranked.shape[:-1], config.groups, config.experts // config.groups)
    grouped, mine = ranked.reshape(every), chosen.reshape(every)
    entered = np.asarray(mine.any(axis=-1))  # […, G]
    rivals = np.where(mine | ~entered[..., None], -np.inf, grouped)
    least = np.where(mine, grouped, np.inf).min(axis=(-1, -2))
    within = least + slack >= rivals.max(axis=(-1, -2)) - slack
    if config.keep_groups == config.groups:
        return np.asarray(within)
    if config.conventions.masked_groups == "zero" or config.ranking != "scores":
        return np.ones(within.shape, bool)  # a choice by other rules: nothing is said of it
    terms = summed_scores(config.group_score, config.top_k, config.keep_groups)
    best = -np.sort(-grouped, axis=-1)[..., :terms].sum(axis=-1)  # […, G]
    worst = np.where(entered, best, np.inf).min(axis=-1) + slack * terms
    ahead = (~entered & (best - slack * terms > worst[..., None])).sum(axis=-1)
    return np.asarray(within & (ahead + entered.sum(axis=-1) <= config.keep_groups))
