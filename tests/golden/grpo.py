"""GRPO and its family, as DeepSeekMath, TRL and verl write it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from golden.case import SMALLEST_GAP, Case


class Batch(NamedTuple):
    """Outputs of a policy: what each of the three formulas of the GRPO loss reads. Padding holds
    any numbers."""

    log_prob: Tensor
    old: Tensor | None
    reference: Tensor | None
    advantages: Tensor
    mask: Tensor


class Flow(NamedTuple):
    """Choices of deepseekmath(): where the ratio has a gradient (never at padding or A = 0), which
    outputs count."""

    unclipped: Tensor
    kept: Tensor


def surrogate(rho: Tensor, a: float, low: float, high: float, top: float | None) -> Tensor:
    """PPO's pessimistic choice; for A < 0 not below top · A (Ye et al., 1912.09729)."""
    worse = torch.minimum(rho * a, torch.clamp(rho, low, high) * a)
    return worse if top is None or a >= 0 else torch.maximum(worse, torch.tensor(top * a))


def deepseekmath(
    batch: Batch,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    top: float | None = None,
    ratio: str = "token",
    average: str = "sequence",
    length: int = 0,
    empty: str = "counted",
    beta: float = 0.04,
    kl: str = "k3",
    kl_level: str = "token",
    kl_bounds: tuple[float, float] = (math.inf, math.inf),
    delta: float | None = None,
) -> tuple[Tensor, Flow]:
    """DeepSeekMath (2402.03300) eq. 3 and 4 with the sign of a loss: loops over outputs i and their
    tokens t.

    The other settings change a line each: the ratio of whole outputs (R1, 2501.12948 eq. 1; GSPO,
    2507.18071), the divisor (DAPO, 2503.14476; Dr. GRPO, 2503.20783), the estimator of the KL
    divergence (k1, k2, k3; V3.2, 2512.02556, for the unbiased one) and V3.2's mask of outputs that
    the policy has left (eq. 9).
    """
    n, width = batch.log_prob.shape
    rows = [[t for t in range(width) if bool(batch.mask[i, t])] for i in range(n)]
    tokens = sum(map(len, rows))
    counted = n if empty == "counted" else sum(map(bool, rows))
    unclipped, kept = torch.zeros(n, width, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    loss = (0 * batch.log_prob).sum()
    for i, row in enumerate(rows):
        if not row:
            continue
        a = float(batch.advantages[i])
        now = [batch.log_prob[i, t] for t in row]
        then = [p.detach() for p in now] if batch.old is None else [batch.old[i, t] for t in row]
        moved = [p - q for p, q in zip(now, then, strict=True)]
        if delta is not None and a < 0:
            kept[i] = -sum(float(m.detach()) for m in moved) / len(row) <= delta
        divisor = {"sequence": counted * len(row), "token": tokens, "constant": counted * length}[
            average
        ]
        for k, t in enumerate(row):
            rho = {
                "token": moved[k],
                "sequence": sum(moved),
                "sequence_mean": sum(moved) / len(row),
            }[ratio].exp()
            term = surrogate(rho, a, 1 - clip[0], 1 + clip[1], top) if kept[i] else torch.zeros(())
            alone = rho.detach().requires_grad_()
            (slope,) = torch.autograd.grad(
                surrogate(alone, a, 1 - clip[0], 1 + clip[1], top), alone
            )
            unclipped[i, t] = slope != 0
            if beta:
                gaps = [batch.reference[i, s] - p for s, p in zip(row, now, strict=True)]
                u = gaps[k] if kl_level == "token" else sum(gaps)
                u = u.clamp(-kl_bounds[0], kl_bounds[0])
                k3 = (torch.exp(u) - u - 1).clamp(-kl_bounds[1], kl_bounds[1])
                term = term - beta * {"k1": -u, "k2": u**2 / 2, "k3": k3, "unbiased": rho * k3}[kl]
            loss = loss - term / divisor
    return loss, Flow(unclipped, kept)


def trl(
    batch: Batch,
    *,
    loss_type: str,
    beta: float,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    max_completion_length: int = 0,
    use_bias_correction_kl: bool = False,
    off_policy_mask_threshold: float | None = None,
) -> Tensor:
    """The loss of TRL's GRPOTrainer under its own names, on whole tensors.

    Its sequence level is GSPO's mean of log-ratios. delta bounds the ratio of the unclipped product
    alone. The mask of V3.2 falls on the policy's term before the divergence is added. In dapo the
    divisor counts the tokens of the whole batch, which here is all there is.
    """
    real = batch.mask.to(torch.float64)
    lengths = real.sum(1).clamp(min=1)
    now = torch.where(batch.mask, batch.log_prob, 0.0)
    then = now.detach() if batch.old is None else torch.where(batch.mask, batch.old, 0.0)
    a = batch.advantages[:, None]
    log_weight = now - then
    if importance_sampling_level == "sequence":
        log_weight = ((log_weight * real).sum(1) / lengths)[:, None]
    weight = log_weight.exp()
    bounded = weight.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    free = weight if delta is None else weight.clamp(max=delta)
    per_token = -torch.min(free * a, bounded * a)
    if off_policy_mask_threshold is not None:
        drift = ((then - now.detach()) * real).sum(1, keepdim=True) / lengths[:, None]
        per_token = per_token * ((a >= 0) | (drift <= off_policy_mask_threshold))
    if beta:
        gap = torch.where(batch.mask, batch.reference, 0.0) - now
        divergence = gap.exp() - gap - 1
        per_token = per_token + beta * (
            divergence * weight if use_bias_correction_kl else divergence
        )
    per_token = per_token * real
    if loss_type == "grpo":
        return (per_token.sum(1) / lengths).mean()
    if loss_type == "dr_grpo":
        return per_token.sum() / (len(real) * max_completion_length)
    return per_token.sum() / {"bnpo": real.sum().clamp(min=1), "dapo": real.sum()}[loss_type]


def verl(
    batch: Batch,
    *,
    loss_agg_mode: str,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    kl_loss_coef: float = 0.0,
    clamped: bool = False,
) -> Tensor:
    """verl's compute_policy_loss, plus its low_var_kl times a coefficient, each aggregated by
    itself.

    It writes costs, so the pessimistic choice is a maximum; the dual clip bounds the cost of a
    negative advantage, and outputs with all tokens masked are left out of the mean over outputs.
    ``clamped``: its bounds of ±20 on log-ratios and ±10 on the estimator. Left out: the 1e-8 in its
    divisors.
    """
    real = batch.mask.to(torch.float64)
    now, then = (torch.where(batch.mask, p, 0.0) for p in (batch.log_prob, batch.old))
    a = batch.advantages[:, None].expand_as(now)

    def bound(x: Tensor, at: float) -> Tensor:
        return x.clamp(-at, at) if clamped else x

    def aggregate(costs: Tensor) -> Tensor:
        sums = (costs * real).sum(-1)
        if loss_agg_mode == "token-mean":
            return sums.sum() / real.sum()
        if loss_agg_mode == "seq-mean-token-mean":
            sums = torch.where(batch.mask.any(-1), sums / real.sum(-1).clamp(min=1), 0.0)
        return sums.sum() / batch.mask.any(-1).sum()

    rho = torch.exp(bound(now - then, 20.0))
    cost = torch.maximum(-a * rho, -a * torch.clamp(rho, 1 - clip_ratio_low, 1 + clip_ratio_high))
    cost = torch.where(a < 0, torch.minimum(cost, -a * clip_ratio_c), cost)
    loss = aggregate(cost)
    if kl_loss_coef:
        gap = bound(torch.where(batch.mask, batch.reference, 0.0) - now, 20.0)
        loss = loss + kl_loss_coef * aggregate(bound(torch.expm1(gap) - gap, 10.0))
    return loss


ADVANTAGES = np.array([0.9, 0.5, -0.8, -0.45, 1.3, -1.1, -0.2, 0.0])  # two groups of four
TOKENS = np.array(
    [[1, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]]
)
REGIONS = (0, 1, 0, 1, 2, 2, 1, 2)  # below, within, above; each with either sign of the advantage


def rollouts(
    case: Case,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    top: float | None = None,
    level: str = "token",
    old: bool = True,
    reference: float = 0.5,
    advantages: Any = ADVANTAGES,
    mask: Any = TOKENS,
) -> Batch:
    """Log-probabilities whose ratios, at the level, fall on both sides of every bound, and absurd
    ones at padding.

    ``reference``: the spread of its log-ratio, 0 for no reference.
    """
    mask = np.asarray(mask, bool)
    n, width = mask.shape
    rng, spread = case.rng, math.log1p(clip[1])
    targets = [1.7 * math.log1p(-clip[0]) if clip[0] < 1 else -1.2, 0.3 * spread, 1.6 * spread]
    if top is not None:
        targets.append(1.3 * math.log(top))
    moved = np.zeros((n, width))
    for i in range(n):
        row = np.flatnonzero(mask[i])
        if level == "token":
            for t in row:
                moved[i, t] = targets[(i + t) % len(targets)] * (1 + 0.2 * rng.random())
        elif row.size:
            target = targets[3 if top is not None and i == 5 else REGIONS[i % len(REGIONS)]]
            noise = rng.standard_normal(row.size) * abs(target)
            count = row.size if level == "sequence" else 1
            moved[i, row] = noise - noise.mean() + target / count
    now = -0.1 - 2 * rng.random((n, width))
    now = np.where(mask, now, 77.0 + rng.random((n, width)))
    log_prob = case.input("log_prob", values=now)
    given = {}
    if old:
        given["old"] = case.aux(
            "old_log_prob", np.where(mask, now - moved, 1e3 * rng.standard_normal((n, width)))
        )
    if reference:
        gap = reference * rng.standard_normal((n, width))
        far = -1e3 * rng.random((n, width))
        given["reference"] = case.aux("reference_log_prob", np.where(mask, now + gap, far))
    return Batch(
        log_prob,
        given.get("old"),
        given.get("reference"),
        case.aux("advantages", np.asarray(advantages, np.float64)),
        case.aux("mask", mask),
    )


def finish_grpo(
    case: Case, batch: Batch, loss: Tensor | None, beta: float = 0.0, **settings: Any
) -> Case:
    """Finish with a source's loss, once the loops over outputs and tokens give the same value and
    gradient."""
    looped, flow = deepseekmath(batch, beta=beta, **settings)
    if loss is None:
        loss = looped
    pair = [
        (x, torch.autograd.grad(x, batch.log_prob, retain_graph=True)[0]) for x in (loss, looped)
    ]
    for ours, theirs in zip(*pair, strict=True):
        if float((ours - theirs).detach().abs().max()) > 1e-14 * max(
            1.0, float(theirs.detach().abs().max())
        ):
            raise ValueError(f"{case.name}: two formulas differ, {ours} and {theirs}")
    return case.finish(loss=loss, unclipped=flow.unclipped, kept=flow.kept)


def regimes(batch: Batch, clip: tuple[float, float], level: str) -> set[tuple[bool, int]]:
    """The pairs of (A > 0, ratio below, within or above its bounds) that occur, A = 0 left out."""
    found = set()
    for i in range(len(batch.mask)):
        row = [t for t in range(batch.mask.shape[1]) if bool(batch.mask[i, t])]
        moved = [float(batch.log_prob[i, t].detach() - batch.old[i, t]) for t in row]
        if level != "token" and row:
            moved = [sum(moved) / (len(row) if level == "sequence_mean" else 1)]
        for z in moved:
            gaps = [abs(math.exp(z) - bound) for bound in (1 - clip[0], 1 + clip[1])]
            if min(gaps) < SMALLEST_GAP:
                raise ValueError(f"a ratio {math.exp(z)} is too near to a bound")
            if batch.advantages[i] != 0:
                where = int(math.exp(z) > 1 - clip[0]) + int(math.exp(z) > 1 + clip[1])
                found.add((bool(batch.advantages[i] > 0), where))
    return found


def grpo_case(
    name: str, ours: dict[str, Any], source: str, theirs: dict[str, Any], **values: Any
) -> Case:
    """One case: ``ours`` are grpo's settings, ``theirs`` the source's own, ``values`` what
    rollouts() is told."""
    case = Case(f"grpo/{name}", source=source, **ours)
    looped = values.pop("looped")
    clip, level = looped.get("clip", (0.2, 0.2)), looped.get("ratio", "token")
    batch = rollouts(case, clip=clip, top=looped.get("top"), level=level, **values)
    if (
        batch.old is not None
        and batch.mask.sum() > 1
        and clip[0] < 1
        and regimes(batch, clip, level) != SIX
    ):
        raise ValueError(f"{case.name} lacks a regime")
    loss = (
        {"trl": trl, "verl": verl}[source](batch, **theirs) if source in ("trl", "verl") else None
    )
    return finish_grpo(case, batch, loss, **looped)


SIX = {(positive, where) for positive in (False, True) for where in range(3)}


def cases() -> Iterable[Case]:
    yield from group_advantage_cases()
    # name, our settings, whose formula, its settings, the loops' settings, and what the values are
    # like
    high, gspo = (0.2, 0.28), (3e-4, 4e-4)
    no_kl: dict[str, Any] = {"reference": 0.0}
    narrow: dict[str, Any] = {
        "beta": 0.0,
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "importance_sampling_level": "sequence",
    }
    settings: tuple[
        tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any], dict[str, Any]], ...
    ] = (
        # every preset
        ("deepseekmath", {"preset": "deepseekmath"}, "deepseekmath", {}, {"beta": 0.04}, {}),
        (
            "r1_print",
            {"preset": "r1_print"},
            "deepseekmath",
            {},
            {"ratio": "sequence", "kl_level": "sequence", "beta": 0.04},
            {},
        ),
        (
            "dapo",
            {"preset": "dapo"},
            "trl",
            {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
            {"clip": high, "average": "token"},
            no_kl,
        ),
        (
            "dr_grpo",
            {"preset": "dr_grpo", "length": 7},
            "trl",
            {"loss_type": "dr_grpo", "beta": 0.0, "max_completion_length": 7},
            {"average": "constant", "length": 7},
            no_kl,
        ),
        (
            "gspo",
            {"preset": "gspo"},
            "trl",
            {"loss_type": "grpo"} | narrow,
            {"ratio": "sequence_mean", "clip": gspo},
            no_kl,
        ),
        (
            "v3.2",
            {"preset": "v3.2", "off_policy": 0.03},
            "trl",
            {
                "loss_type": "grpo",
                "beta": 0.04,
                "use_bias_correction_kl": True,
                "off_policy_mask_threshold": 0.03,
            },
            {"beta": 0.04, "kl": "unbiased", "delta": 0.03},
            {},
        ),
        # DeepSeek's on-policy update, and R1's ε = 10 (a lower bound under 0 is no bound)
        ("on_policy", {}, "deepseekmath", {}, {"beta": 0.04}, {"old": False}),
        (
            "on_policy_sequence",
            {"ratio": "sequence", "kl_weight": 0.0},
            "deepseekmath",
            {},
            {"ratio": "sequence"},
            {"old": False, "advantages": [1.2, -0.7], "mask": [[1, 1, 1], [1, 0, 1]]} | no_kl,
        ),
        (
            "r1_clip",
            {"clip": (1.0, 10.0), "kl_weight": 0.001},
            "deepseekmath",
            {},
            {"clip": (1.0, 10.0), "beta": 0.001},
            {},
        ),
        # TRL
        (
            "trl_bnpo",
            {"average": "token", "kl_weight": 0.3},
            "trl",
            {"loss_type": "bnpo", "beta": 0.3},
            {"average": "token", "beta": 0.3},
            {},
        ),
        (
            "trl_delta",
            {"clip": high, "dual_clip": 1.9, "kl_weight": 0.0, "ratio": "sequence_mean"},
            "trl",
            {
                "loss_type": "grpo",
                "beta": 0.0,
                "epsilon_high": 0.28,
                "delta": 1.9,
                "importance_sampling_level": "sequence",
            },
            {"clip": high, "top": 1.9, "ratio": "sequence_mean"},
            no_kl,
        ),
        (
            "trl_unbiased",
            {"ratio": "sequence_mean", "average": "token", "kl": "unbiased", "kl_weight": 0.5},
            "trl",
            {
                "loss_type": "dapo",
                "beta": 0.5,
                "use_bias_correction_kl": True,
                "importance_sampling_level": "sequence",
            },
            {"ratio": "sequence_mean", "average": "token", "kl": "unbiased", "beta": 0.5},
            {},
        ),
        (
            "trl_on_policy",
            {"kl": "unbiased", "average": "constant", "length": 5},
            "trl",
            {
                "loss_type": "dr_grpo",
                "beta": 0.04,
                "use_bias_correction_kl": True,
                "max_completion_length": 5,
            },
            {"beta": 0.04, "kl": "unbiased", "average": "constant", "length": 5},
            {"old": False},
        ),
        # verl
        (
            "verl_token_mean",
            {"average": "token", "dual_clip": 3.0, "clip": high, "kl_weight": 0.07},
            "verl",
            {"loss_agg_mode": "token-mean", "clip_ratio_high": 0.28, "kl_loss_coef": 0.07},
            {"average": "token", "top": 3.0, "clip": high, "beta": 0.07},
            {},
        ),
        (
            "verl_token_sum",
            {
                "empty": "left_out",
                "average": "constant",
                "length": 1,
                "dual_clip": 1.5,
                "kl_weight": 0.0,
            },
            "verl",
            {"loss_agg_mode": "seq-mean-token-sum", "clip_ratio_c": 1.5},
            {"empty": "left_out", "average": "constant", "length": 1, "top": 1.5},
            no_kl,
        ),
        (
            "verl_in_range",
            {"empty": "left_out", "dual_clip": 3.0, "kl_weight": 0.2},
            "verl",
            {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_coef": 0.2, "clamped": True},
            {"empty": "left_out", "top": 3.0, "beta": 0.2},
            {},
        ),
        (
            "verl_out_of_range",
            {"empty": "left_out", "dual_clip": 3.0, "kl_weight": 0.2},
            "verl",
            {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_coef": 0.2},
            {"empty": "left_out", "top": 3.0, "beta": 0.2},
            {"reference": 6.0},
        ),
        (
            "verl_clamped",
            {"empty": "left_out", "dual_clip": 3.0, "kl_weight": 0.2, "kl_bounds": (20.0, 10.0)},
            "verl",
            {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_coef": 0.2, "clamped": True},
            {"empty": "left_out", "top": 3.0, "beta": 0.2, "kl_bounds": (20.0, 10.0)},
            {"reference": 12.0},
        ),
        # combinations without a counterpart: the loops alone
        *(
            (
                f"{kl}_{level}",
                {"kl": kl, "kl_level": level, "kl_weight": 0.3, "average": average},
                "loops",
                {},
                {"kl": kl, "kl_level": level, "beta": 0.3, "average": average},
                {"advantages": ADVANTAGES[1:5], "mask": TOKENS[1:5]},
            )
            for kl, level, average in (
                ("k1", "token", "sequence"),
                ("k1", "sequence", "token"),
                ("k2", "token", "token"),
                ("k2", "sequence", "sequence"),
                ("k3", "sequence", "token"),
            )
        ),
        *(
            (
                f"unbiased_sequence_{ratio}",
                {"kl": "unbiased", "kl_level": "sequence", "kl_weight": 0.3, "ratio": ratio},
                "loops",
                {},
                {"kl": "unbiased", "kl_level": "sequence", "beta": 0.3, "ratio": ratio},
                {},
            )
            for ratio in ("token", "sequence")
        ),
        (
            "sequence_dual_clip",
            {
                "ratio": "sequence",
                "average": "token",
                "dual_clip": 2.5,
                "clip": (0.3, 0.1),
                "kl_weight": 0.0,
                "off_policy": 0.05,
            },
            "loops",
            {},
            {
                "ratio": "sequence",
                "average": "token",
                "top": 2.5,
                "clip": (0.3, 0.1),
                "delta": 0.05,
            },
            no_kl,
        ),
        # the edges
        (
            "constant_reward",
            {},
            "deepseekmath",
            {},
            {"beta": 0.04},
            {"advantages": np.zeros(3), "mask": [[1, 1], [1, 0], [0, 0]], "old": False},
        ),
        (
            "constant_reward_no_kl",
            {"kl_weight": 0.0},
            "deepseekmath",
            {},
            {},
            {
                "advantages": np.zeros(3),
                "mask": [[1, 1], [1, 0], [0, 0]],
                "old": False,
                "reference": 0.0,
            },
        ),
        (
            "no_tokens",
            {"average": "token"},
            "loops",
            {},
            {"beta": 0.04, "average": "token"},
            {"advantages": [1.0, -1.0], "mask": np.zeros((2, 2)), "old": False},
        ),
        (
            "one_token",
            {},
            "deepseekmath",
            {},
            {"beta": 0.04},
            {"advantages": [-0.7], "mask": [[1]]},
        ),
    )
    for name, ours, source, theirs, looped, values in settings:
        yield grpo_case(name, ours, source, theirs, looped=looped, **values)

    # ratios of exactly 1, which is a bound: within it, so that the whole gradient flows
    for name, clip in (
        ("on_both_bounds", (0.0, 0.0)),
        ("on_lower_bound", (0.0, 0.3)),
        ("on_upper_bound", (0.3, 0.0)),
    ):
        case = Case(f"grpo/{name}", source="trl", clip=clip, kl_weight=0.0)
        now = case.input("log_prob", values=-case.rng.random((2, 4)) - 0.1)
        moved = np.array([[0.0, 0.0, 0.2, -0.2], [0.0, 0.2, 0.0, -0.2]])
        old = case.aux("old_log_prob", case.tensors["in/log_prob"] - moved)
        a, mask = case.aux("advantages", [0.6, -0.9]), case.aux("mask", np.ones((2, 4), bool))
        batch = Batch(now, old, None, a, mask)
        loss = trl(batch, loss_type="grpo", beta=0.0, epsilon=clip[0], epsilon_high=clip[1])
        yield finish_grpo(case, batch, loss, clip=clip)


def advantages_one_by_one(
    rewards: Tensor, ddof: int | None, epsilon: float, alone: float
) -> Tensor:
    """A = (R - mean) / (std + epsilon) of a question's outputs; exactly 0 if all rewards are the
    same."""
    result = []
    for group in rewards.tolist():
        mean = math.fsum(group) / len(group)
        if len(group) == 1:
            result.append(alone * group[0])
            continue
        for r in group:
            deviation = 1.0
            if ddof is not None:
                variance = math.fsum((x - mean) ** 2 for x in group) / (len(group) - ddof)
                deviation = math.sqrt(variance) + epsilon
            result.append(0.0 if len(set(group)) == 1 else (r - mean) / deviation)
    return torch.tensor(result)


def advantages_by_torch(rewards: Tensor, epsilon: float) -> Tensor:
    """What TRL, verl and OpenRLHF do, each with its own epsilon: torch's mean and its std of ddof
    1."""
    by_group = rewards - rewards.mean(1, keepdim=True)
    return (by_group / (rewards.std(1, keepdim=True) + epsilon)).flatten()


def advantages_by_verl(rewards: Tensor) -> Tensor:
    """verl takes a mean of 0 and a deviation of 1 for a group of one."""
    return torch.stack([r / (torch.ones(()) + 1e-6) for r in rewards.flatten()])


def group_advantage_cases() -> Iterable[Case]:
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.5, 2.25, -1.0, 0.125], [3.0, 3.0, 3.0, 3.0]]
    for name, epsilon in (("trl", 1e-4), ("verl", 1e-6), ("openrlhf", 1e-9)):
        case = Case(f"grpo/advantages_{name}", scale=True, ddof=1, epsilon=epsilon, alone=0.0)
        yield case.finish(advantages=advantages_by_torch(case.aux("rewards", rewards), epsilon))
    for name, values, ddof, epsilon, alone in (
        ("ddof_0", rewards, 0, 0.0, 0.0),
        ("ddof_1", rewards, 1, 0.0, 0.0),
        ("centred", rewards, None, 0.0, 0.0),
        ("pair", [[1.0, 0.0]], 1, 0.0, 0.0),
        ("alone", [[0.7], [-2.0]], 1, 1e-4, 0.0),
        ("alone_1", [[0.7], [-2.0]], 1, 0.0, 1.0),
        ("alone_ddof_0", [[0.7], [-2.0]], 0, 0.0, 0.0),
        # sums that round: their mean is no member
        ("same", [[0.1] * 3, [-0.7] * 3, [1e9 / 3] * 3], 1, 0.0, 0.0),
        ("same_ddof_0", [[0.1] * 3, [-0.7] * 3, [1e9 / 3] * 3], 0, 1e-4, 0.0),
        ("same_centred", [[0.1] * 3, [-0.7] * 3, [1e9 / 3] * 3], None, 0.0, 0.0),
        ("nearly_same", [[1.0, 1.0, 1.0 + 2.0**-20], [0.0, 0.0, 1e-8]], 1, 0.0, 0.0),
        ("tiny", [[1e-200, 3e-200, 0.0]], 1, 1e-6, 0.0),
    ):  # fmt: skip
        scale = {"scale": ddof is not None, "ddof": 1 if ddof is None else ddof}
        case = Case(f"grpo/advantages_{name}", **scale, epsilon=epsilon, alone=alone)
        yield case.finish(
            advantages=advantages_one_by_one(case.aux("rewards", values), ddof, epsilon, alone)
        )
    case = Case(
        "grpo/advantages_alone_verl", scale=True, ddof=1, epsilon=1e-6, alone=1 / (1 + 1e-6)
    )
    yield case.finish(advantages=advantages_by_verl(case.aux("rewards", [[0.7], [-2.0]])))
