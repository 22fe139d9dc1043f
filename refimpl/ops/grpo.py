"""The GRPO loss and its family, from the log-probabilities of sampled tokens.

For every token of an output, with the ratio ρ of the policy to the one that sampled it and the
output's advantage A: j = min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) − β KL; the loss is −Σ weight
j. Advantages, old and reference log-probabilities are constants. The defaults are DeepSeekMath's;
`GRPO_PRESETS` names the others. Sources: DeepSeekMath (2402.03300) eq. 3, 4 and 21; DeepSeek-R1
(2501.12948) eq. 1–3; DAPO (2503.14476); Dr. GRPO (2503.20783); GSPO (2507.18071); DeepSeek-V3.2
(2512.02556). Derivation: derivations/grpo.md. Letters, of this op alone: N outputs (of all groups),
T position in an output, Q questions, G outputs of a question.
"""

from __future__ import annotations

from math import isfinite, isnan
from typing import Any, NamedTuple

from ..array import (
    Array,
    cast,
    expect,
    expect_mask,
    expect_some,
    expect_that,
    fill,
    finite,
    library,
    namespace,
    number,
    real,
)
from .choices import Average, Empty, Estimator, Level, Ratio, expect_choice

__all__ = [
    "GRPO_PRESETS",
    "GRPOOutput",
    "GRPOSaved",
    "grpo_backward",
    "grpo_forward",
    "group_advantages",
]

# settings of `grpo_forward` by the paper that prints them
GRPO_PRESETS: dict[str, dict[str, Any]] = {
    "deepseekmath": {},
    "r1_print": {
        "ratio": "sequence",
        "kl_level": "sequence",
    },  # V3 and R1 print ratios of whole outputs
    "dapo": {
        "average": "token",
        "clip": (0.2, 0.28),
        "kl_weight": 0.0,
    },  # over the batch; the paper: each group
    "dr_grpo": {
        "average": "constant",
        "kl_weight": 0.0,
    },  # length: the longest allowed; advantages: scale=False
    "gspo": {"ratio": "sequence_mean", "clip": (3e-4, 4e-4), "kl_weight": 0.0},
    "v3.2": {"kl": "unbiased"},  # and off_policy: its threshold δ
}


class GRPOOutput(NamedTuple):
    """What `grpo_forward` returns beside `GRPOSaved`: the loss and the choices that it made."""

    loss: Array  # scalar
    # [N, T] bool: where ρ counts as it is; a clip fraction is counted under the mask
    unclipped: Array
    kept: Array  # [N] bool: False for outputs that the off-policy mask drops


class GRPOSaved(NamedTuple):
    """What `grpo_forward` keeps for `grpo_backward`."""

    dz: Array  # [N, T]: ∂loss/∂log-ratio to the old policy, at the ratio's level
    du: Array | None  # [N, T]: in the log-ratio of the reference to the policy; None without KL
    mask: Array  # [N, T]
    count: Array  # [N, 1]: length of each output, at least 1
    ratio: Ratio
    kl_level: Level


def grpo_forward(
    log_prob: Array,
    *,
    advantages: Array,
    mask: Array,
    old_log_prob: Array | None = None,
    reference_log_prob: Array | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    ratio: Ratio = "token",
    average: Average = "sequence",
    length: int | None = None,
    empty: Empty = "counted",
    normaliser: float | None = None,
    kl_weight: float = 0.04,
    kl: Estimator = "k3",
    kl_level: Level = "token",
    kl_bounds: tuple[float, float] | None = None,
    off_policy: float | None = None,
    unclipped: Array | None = None,
    kept: Array | None = None,
) -> tuple[GRPOOutput, GRPOSaved]:
    """The loss of outputs whose tokens have ``log_prob`` [N, T] (from `log_prob_forward`).

    Args:
        advantages: [N], from `group_advantages`.
        mask: [N, T] bool, True for the output's tokens; what stands at the others, NaN included,
            does not count.
        old_log_prob: [N, T], of the policy that sampled; None: this very policy (ρ = 1, and its
            gradient is A's).
        reference_log_prob: [N, T], for the KL; needed unless kl_weight is 0.
        clip: (ε_low, ε_high); R1's first stage has (10, 10), of which only the upper one acts. On a
            bound is within.
        dual_clip: a bound of ρ from above where A < 0.
        ratio: token, sequence (product over the output; V3's and R1's print), sequence_mean (its
            |o|-th root; GSPO).
        average: sequence (mean over outputs of the mean over tokens), token (mean over all tokens;
            DAPO), constant (sum over tokens by N·length; Dr. GRPO).
        length: what average='constant' divides by, the longest output allowed for instance; the
            other averages ignore it.
        empty: an output without tokens is counted in N, or left_out of it.
        normaliser: of the whole batch, if these outputs are a part of it, how many tokens
            (average='token') or outputs there are; by default those of ``mask``.
        kl_weight: β.
        kl: the estimate: k1, k2, k3, or unbiased (ρ·k3, V3.2).
        kl_level: of the KL's log-ratio, token or sequence.
        kl_bounds: of |ln π_ref/π| and of |k|, which stop there, and with them the gradient.
        off_policy: V3.2's δ: the ratio term of an output with A < 0 and mean ln(π_old/π) > δ is
            dropped.
        unclipped: [N, T] bool, the clip's choices of an earlier run, to replay.
        kept: [N] bool, the off-policy mask's.

    Returns (loss, unclipped, kept). An output without tokens adds 0; A = 0 gives the ratio term no
    gradient.
    """
    xp = namespace(log_prob=log_prob)
    check_shapes(log_prob, advantages, mask, unclipped, kept)
    check_settings(
        clip,
        dual_clip,
        ratio,
        average,
        length,
        empty,
        normaliser,
        kl_weight,
        kl,
        kl_level,
        kl_bounds,
        off_policy,
        reference_log_prob,
    )
    count, weight = _weights(log_prob, mask, average, length, empty, normaliser)
    a = cast(library(advantages).where(library(mask).any(mask, axis=1), advantages, 0.0), log_prob)
    a, kl_weight = a[:, None], float(kl_weight)
    log_ratio = _difference(log_prob, old_log_prob, mask, "old_log_prob")
    z = _to_level(log_ratio, mask, count, ratio)  # (grpo.2)
    rho = xp.exp(z)
    bound, unclipped_now = _clip(real(rho), real(a), clip, dual_clip)
    unclipped = unclipped_now if unclipped is None else unclipped
    if kept is None:
        drift = -xp.sum(real(log_ratio), axis=1) / real(count)[:, 0]  # mean ln(π_old/π)
        most = float("inf") if off_policy is None else float(off_policy)
        kept = (real(a)[:, 0] >= 0) | ~(drift > most)
    keep = cast(xp.astype(kept, xp.float64), log_prob)[:, None]
    flows = unclipped & (real(a) != 0) & kept[:, None]  # 0 · ρ must be 0 even if ρ overflows
    objective = keep * a * xp.where(flows, rho, cast(bound, rho))  # (grpo.4)
    dz = -weight * keep * a * fill(flows, rho, 0.0)  # (grpo.5)
    du = None
    if kl_weight:
        away = -_difference(log_prob, reference_log_prob, mask, "reference_log_prob")
        u = _to_level(away, mask, count, kl_level)
        k, slope = _estimator(xp, u, kl, kl_bounds or (float("inf"), float("inf")))
        if kl == "unbiased":
            objective = objective - kl_weight * rho * k
            dz = dz + weight * kl_weight * rho * k  # (grpo.8)
            du = weight * kl_weight * rho * slope  # (grpo.8)
        else:
            objective = objective - kl_weight * k
            du = weight * kl_weight * slope  # (grpo.7)
    loss = -xp.sum(weight * objective)  # (grpo.9)
    saved = GRPOSaved(dz, du, mask, count, ratio, kl_level)
    return GRPOOutput(loss, unclipped, kept), saved


def grpo_backward(dy: Array | tuple[Array], saved: GRPOSaved) -> Array:
    """Gradient dlog_prob [N, T], 0 where the mask is False, from the scalar ``dy``, dloss; or from
    (dloss,), the cotangents of an output that is a tuple."""
    dz, du, mask, count, ratio, kl_level = saved
    dlog_prob = _from_level(dz, mask, count, ratio)  # (grpo.10)
    if du is not None:
        dlog_prob = dlog_prob - _from_level(du, mask, count, kl_level)  # (grpo.11)
    return number(loss_cotangent(dy), dz) * dlog_prob


def loss_cotangent(dy: Array | tuple[Array]) -> Array:
    """dloss, given as it is or in a tuple."""
    return dy[0] if isinstance(dy, tuple) else dy


def group_advantages(
    rewards: Array, *, scale: bool = True, ddof: int = 1, epsilon: float = 0.0, alone: float = 0.0
) -> Array:
    """A = (R − mean) / (std + epsilon) within each row of ``rewards`` [Q, G]; flat [Q·G].

    Args:
        scale: divide by the standard deviation (Dr. GRPO does not).
        ddof: 0 or 1: the deviation divides by G − ddof; the paper does not say which.
        epsilon: added to the deviation; the paper does not say what.
        alone: what a group of one gets is ``alone`` · R. Equal rewards get 0, never NaN, and equal
            but for rounding are equal: a spread of at most 8 units of the largest counts as 0.

    ValueError if a reward is not finite, or no group or no output is there.

    >>> import numpy as np
    >>> group_advantages(np.array([[1.0, 1.0, 0.0, 0.0]]), ddof=0).tolist()
    [1.0, 1.0, -1.0, -1.0]
    """
    xp = namespace(rewards=rewards)
    expect("rewards", rewards, "(Q, G)", (None, None))
    expect_some("rewards", rewards, "(Q, G)")
    g = rewards.shape[1]
    expect_that(
        not (ddof not in (0, 1) or not (isfinite(epsilon) and epsilon >= 0)),
        f"ddof must be 0 or 1 and epsilon a finite number of at least 0, got {ddof} and {epsilon}",
    )
    broken = ~xp.all(xp.isfinite(rewards), axis=1)
    if bool(xp.any(broken)):
        group = int(xp.argmax(xp.astype(broken, xp.int64)))
        got = [float(r) for r in rewards[group, ...]]
        raise ValueError(f"rewards must be finite, got {got} in group {group}")
    if g == 1:
        return float(alone) * xp.reshape(rewards, (-1,))
    centred = rewards - xp.sum(rewards, axis=1, keepdims=True) / g
    most, least = xp.max(rewards, axis=1, keepdims=True), xp.min(rewards, axis=1, keepdims=True)
    size = xp.maximum(most, -least)  # max |R|
    equal = most - least <= 8 * float(xp.finfo(rewards.dtype).eps) * size
    centred = xp.where(equal, 0.0, centred)
    if scale:
        std = xp.sqrt(xp.sum(centred * centred, axis=1, keepdims=True) / (g - ddof))
        centred = centred / xp.where(equal, 1.0, finite(std + epsilon))  # (grpo.12)
    return xp.reshape(centred, (-1,))


def loss_divisor(
    mask: Array,
    count: Array | int,
    average: Average,
    length: int | None,
    empty: Empty,
    normaliser: float | None = None,
) -> Array | float:
    """What the loss divides an output's tokens by. ``count``: the length of each output [N, 1], or
    1 for the divisor without it."""
    xp = library(mask, "mask")
    if average == "token":
        return normaliser or float(xp.sum(xp.astype(mask, xp.float64))) or 1.0  # (splits.4)
    some = mask.shape[0] if empty == "counted" else xp.count_nonzero(xp.any(mask, axis=1))
    n = normaliser or float(some) or 1.0  # (splits.4)
    return n * count if average == "sequence" else n * float(length or 1)


def _weights(
    log_prob: Array,
    mask: Array,
    average: Average,
    length: int | None,
    empty: Empty,
    normaliser: float | None,
) -> tuple[Array, Array]:
    """Each output's length [N, 1], at least 1, and each token's share [N, T] in the loss."""
    xp = namespace(log_prob=log_prob)
    size = xp.sum(xp.astype(mask, xp.float64), axis=1, keepdims=True)
    count = xp.where(size > 0, size, 1.0)
    total = loss_divisor(mask, count, average, length, empty, normaliser)
    weight = cast(xp.astype(mask, xp.float64) / total, log_prob)  # (grpo.1)
    return cast(count, log_prob), weight


def _clip(
    rho: Array, a: Array, clip: tuple[float, float], dual_clip: float | None
) -> tuple[Array, Array]:
    """What a clipped ratio stops at [N, T], and where ρ [N, T] counts as it is, for advantages
    ``a`` [N, 1]; both real."""
    xp = namespace(rho=rho)
    low, high = 1 - float(clip[0]), 1 + float(clip[1])
    top = float("inf") if dual_clip is None else float(dual_clip)
    clipped = xp.where(a > 0, rho > high, (rho < low) | (rho > top))  # (grpo.3)
    below = xp.full(rho.shape, low, dtype=xp.float64, device=rho.device)
    bound = xp.where(a > 0, high, below)
    if dual_clip is not None:
        bound = xp.where((a <= 0) & (rho > 1), top, bound)
    return bound, ~clipped | (a == 0)  # NaN stays visible


def _difference(log_prob: Array, other: Array | None, mask: Array, name: str) -> Array:
    """log_prob − other where the mask is True, else 0; None stands for log_prob's own value."""
    other = real(log_prob) if other is None else other
    expect(name, other, "(N, T)", tuple(log_prob.shape))
    hidden = library(other).where(mask, other, 0.0)
    return fill(mask, fill(mask, log_prob, 0.0) - cast(hidden, log_prob), 0.0)


def _to_level(x: Array, mask: Array, count: Array, level: Ratio) -> Array:
    """Log-ratios of tokens as those of whole outputs, seen by every token: the sum, or the mean."""
    if level == "token":
        return x
    xp = namespace(x=x)
    total = xp.sum(x, axis=1, keepdims=True) / (count if level == "sequence_mean" else 1)
    return fill(mask, xp.broadcast_to(total, x.shape), 0.0)


def _from_level(dx: Array, mask: Array, count: Array, level: Ratio) -> Array:
    """The adjoint of `_to_level`, and of the mask."""
    if level != "token":
        xp = namespace(dx=dx)
        total = xp.sum(dx, axis=1, keepdims=True) / (count if level == "sequence_mean" else 1)
        dx = xp.broadcast_to(total, dx.shape)
    return fill(mask, dx, 0.0)


def _estimator(
    xp: Any, u: Array, kl: Estimator, bounds: tuple[float, float]
) -> tuple[Array, Array]:
    """The KL estimate at the log-ratio u = ln π_ref − ln π, and its derivative in u."""
    u, inside = _bounded(xp, u, float(bounds[0]))
    if kl == "k1":
        k, slope = -u, 0 * u - 1  # (grpo.6)
    elif kl == "k2":
        k, slope = u * u / 2, u
    else:
        slope = xp.expm1(u)  # e^u − 1, which near u = 0 keeps the digits that k3 cancels
        k = slope - u
    k, flows = _bounded(xp, k, float(bounds[1]))
    return k, fill(inside & flows, slope, 0.0)


def _bounded(xp: Any, x: Array, most: float) -> tuple[Array, Array]:
    """x stopped at ±most, and where it is not; NaN stays visible."""
    above, below = real(x) > most, real(x) < -most  # (grpo.13)
    return fill(~above, fill(~below, x, -most), most), ~(above | below)


def check_shapes(
    log_prob: Array, advantages: Array, mask: Array, unclipped: Array | None, kept: Array | None
) -> None:
    """ValueError unless all fit ``log_prob`` [N, T]; TypeError unless masks and choices are
    bool."""
    expect("log_prob", log_prob, "(N, T)", (None, None))
    expect_some("log_prob", log_prob, "(N, T)")
    expect("advantages", advantages, "(N,)", log_prob.shape[:1])
    expect_mask("mask", mask, "(N, T)", log_prob.shape)
    if unclipped is not None:
        expect_mask("unclipped", unclipped, "(N, T)", log_prob.shape)
    if kept is not None:
        expect_mask("kept", kept, "(N,)", log_prob.shape[:1])


def check_settings(
    clip: tuple[float, float],
    dual_clip: float | None,
    ratio: Ratio,
    average: Average,
    length: int | None,
    empty: Empty,
    normaliser: float | None,
    kl_weight: float,
    kl: Estimator,
    kl_level: Level,
    kl_bounds: tuple[float, float] | None,
    off_policy: float | None,
    reference: Array | None,
) -> None:
    """ValueError for a setting without a meaning."""
    expect_that(
        clip[0] >= 0 and clip[1] >= 0 and (dual_clip is None or dual_clip > 1),
        f"clip must be two numbers of at least 0, dual_clip above 1 or None, got {clip} "
        f"and {dual_clip}",
    )
    expect_that(
        kl_bounds is None or (kl_bounds[0] > 0 and kl_bounds[1] > 0),
        f"kl_bounds must be two numbers above 0 or None, got {kl_bounds}",
    )
    expect_choice("ratio", ratio, Ratio)
    expect_choice("average", average, Average)
    expect_choice("empty", empty, Empty)
    expect_choice("kl", kl, Estimator)
    expect_choice("kl_level", kl_level, Level)
    expect_that(
        average != "constant" or bool(length and length > 0 and isfinite(length)),
        f"length must be positive and finite for average='constant', got {length}",
    )
    expect_that(
        normaliser is None or (normaliser > 0 and isfinite(normaliser)),
        f"normaliser must be positive and finite, or None, got {normaliser}",
    )
    expect_that(isfinite(kl_weight), f"kl_weight must be finite, got {kl_weight}")
    expect_that(
        off_policy is None or not isnan(off_policy),
        f"off_policy must be a number or None, got {off_policy}",
    )
    expect_that(
        not kl_weight or reference is not None,
        "reference_log_prob must be given unless kl_weight is 0, got None",
    )
