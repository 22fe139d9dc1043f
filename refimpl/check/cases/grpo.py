"""Cases of `grpo`: each sign of the advantage with each side of the clip, far from its edges; every
setting of the family; padding, empty and dropped outputs.

The branches of the clip and of the off-policy mask are replayed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .draw import Case, Draw, flags

__all__ = ["REGIMES", "case"]

REGIMES = {  # that the cases of a run must meet
    "up_inside",
    "up_above",
    "up_below",
    "down_inside",
    "down_above",
    "down_below",
    "zero_advantage",
    "padded",
    "empty",
    "left_out",
    "dropped",
    "dual_clipped",
    "ratio_token",
    "ratio_sequence",
    "ratio_sequence_mean",
    "average_sequence",
    "average_token",
    "average_constant",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_unbiased",
    "no_kl",
    "kl_of_outputs",
    "far_reference",
    "large_kl",
}
# ranges that the ratio ρ is drawn from, far from the clip's edges 0.8, 1.2, 1.28 and 2
PLACES = np.array([[0.45, 0.7], [0.85, 1.15], [1.35, 1.9], [2.2, 2.6]])


def case(draw: Draw) -> Case:
    """A drawn case of `grpo`, with the regimes that it meets."""
    n = draw.integer(2, 4)
    t = draw.integer(1, 5)
    ratio = draw.choice(["token", "sequence", "sequence_mean"])
    shortest = 0 if draw.choice([True, False, False]) else 1
    mask = np.arange(t) < draw.rng.integers(shortest, t + 1, (n, 1))
    mask[0] = True
    advantages = draw.rng.choice([-1, 1], n) * draw.rng.uniform(0.3, 2.5, n)
    advantages[draw.integer(0, n - 1)] *= draw.choice([0.0, 1.0, 1.0])
    log_ratio = _log_ratio(draw, mask, ratio)
    log_prob = -draw.rng.uniform(0.1, 3.0, (n, t))
    old = log_prob - log_ratio
    reference = log_prob - 0.5 * draw.rng.normal(size=(n, t))
    old[~mask] = reference[~mask] = np.nan  # what stands at padding never counts
    kl_weight = draw.choice([0.0, 0.04, 0.7])
    average = draw.choice(["sequence", "token", "constant"])
    kl = draw.choice(["k1", "k2", "k3", "unbiased"]) if kl_weight else "k3"
    off_policy = draw.choice([None, 0.03])
    dual_clip = draw.choice([None, 2.0])
    kl_level = draw.choice(["token", "sequence"])
    kl_bounds = None
    if kl in ("k3", "unbiased") and kl_level == "token" and draw.choice([True, False]):
        kl_bounds = draw.choice([(0.75, 10.0), (20.0, 0.18)])  # far from every |u| and k3(u)
        far = np.where(draw.rng.choice([True, False], (n, t)), [[1.0]], [[0.1]])
        far = far + draw.rng.uniform(0, 0.4, (n, t))
        reference = np.where(mask, log_prob + far * draw.rng.choice([-1, 1], (n, t)), np.nan)
    kwargs = {
        "advantages": advantages,
        "mask": mask,
        "old_log_prob": old,
        "clip": draw.choice([(0.2, 0.2), (0.2, 0.28)]),
        "reference_log_prob": reference if kl_weight else None,
        "dual_clip": dual_clip,
        "ratio": ratio,
        "average": average,
        "length": 7 if average == "constant" else None,
        "kl_weight": kl_weight,
        "kl": kl,
        "kl_level": kl_level,
        "kl_bounds": kl_bounds,
        "off_policy": off_policy,
        "empty": draw.choice(["counted", "left_out"]),
        "normaliser": draw.choice([None, None, 9.5]),
    }
    regimes = _regimes(log_ratio, **kwargs)
    return Case((log_prob,), kwargs, regimes, lambda y: {"unclipped": y.unclipped, "kept": y.kept})


def _log_ratio(draw: Draw, mask: np.ndarray, ratio: str) -> np.ndarray:
    """[N, T] logarithms of each token's ratio, whose outputs' ratios lie in `PLACES` too."""
    places = PLACES[draw.rng.integers(0, len(PLACES), mask.shape)]
    log_ratio: np.ndarray = np.log(draw.rng.uniform(places[..., 0], places[..., 1]))
    if ratio == "token":
        return log_ratio
    share = draw.rng.uniform(0.5, 1.5, mask.shape) * mask  # unevenly spread over the tokens
    share = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
    if ratio == "sequence_mean":
        share = share * _size(mask)
    return np.asarray(log_ratio[:, :1] * share)


def _size(mask: np.ndarray) -> np.ndarray:
    """[N, 1], how many tokens an output has, at least 1."""
    size: np.ndarray = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return size


def _regimes(
    log_ratio: np.ndarray,
    *,
    advantages: np.ndarray,
    mask: np.ndarray,
    clip: tuple[float, float],
    dual_clip: float | None,
    ratio: str,
    average: str,
    kl_weight: float,
    kl: str,
    kl_level: str,
    kl_bounds: tuple[float, float] | None,
    off_policy: float | None,
    empty: str,
    **_: Any,
) -> set[str]:
    """The regimes of `REGIMES` that a case with these arguments hits."""
    size = _size(mask)
    z = np.where(mask, log_ratio, 0)
    if ratio != "token":
        z = z.sum(axis=1, keepdims=True) / (size if ratio == "sequence_mean" else 1)
    rho = np.exp(z)
    region = np.where(rho < 0.8, "below", np.where(rho > 1 + clip[1], "above", "inside"))
    sign = np.where(advantages > 0, "up", np.where(advantages < 0, "down", "zero"))[:, None]
    hit = {f"{s}_{r}" for s, r, m in np.broadcast(sign, region, mask) if m and s != "zero"}
    hit |= {f"ratio_{ratio}", f"average_{average}", f"kl_{kl}" if kl_weight else "no_kl"}
    down = (advantages < 0)[:, None]
    drift = np.where(mask, -log_ratio, 0).sum(axis=1, keepdims=True) / size
    dropped = down & (drift > (np.inf if off_policy is None else off_policy))
    return hit | flags(
        zero_advantage=(advantages == 0).any(),
        padded=not mask.all(),
        empty=not mask.any(axis=1).all(),
        left_out=empty == "left_out" and average != "token" and not mask.any(axis=1).all(),
        dropped=(dropped & mask & (rho >= 0.8)).any(),
        dual_clipped=dual_clip is not None and (down & (rho > 2.0) & mask).any(),
        kl_of_outputs=kl_weight and kl_level == "sequence",
        far_reference=kl_weight and kl_bounds is not None and kl_bounds[0] < 1,
        large_kl=kl_weight and kl_bounds is not None and kl_bounds[1] < 1,
    )
