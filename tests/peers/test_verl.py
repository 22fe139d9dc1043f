"""What refimpl.conventions says of verl: its own losses run here, beside ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.ops import group_advantages, grpo_backward, grpo_forward

from peers.rollouts import ADVANTAGES, LOG_PROB, MASK, OLD, REFERENCE_LOG_PROB

WHY = "verl's losses need the extra peers: make peers"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("verl", reason=WHY)
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=WHY)


class Actor(dict[str, Any]):
    """As much of verl's ActorConfig as the loss reads."""

    clip_ratio = clip_ratio_low = 0.2
    clip_ratio_high = 0.28
    global_batch_info: dict[str, Any] = {}  # noqa: RUF012


def theirs(
    mode: str,
    mask: np.ndarray = MASK,
    log_prob: np.ndarray = LOG_PROB,
    old: np.ndarray = OLD,
    rows: slice = slice(None),
    **of_all: float,
) -> tuple[float, np.ndarray]:
    """`compute_policy_loss_vanilla` with the upper clip 0.28, and its gradient; of some ``rows``,
    with what its engines say ``of_all``."""
    mask, log_prob, old = (x[rows] for x in (mask, log_prob, old))
    actor = Actor(clip_ratio_c=3.0)
    actor.global_batch_info = of_all
    leaf = torch.tensor(log_prob, requires_grad=True)
    loss, _ = core_algos.compute_policy_loss_vanilla(
        torch.tensor(old),
        leaf,
        torch.tensor(np.repeat(ADVANTAGES[rows, None], mask.shape[1], axis=1)),
        torch.tensor(mask.astype(np.float64)),
        mode,
        actor,
    )
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def ours(
    mask: np.ndarray = MASK, log_prob: np.ndarray = LOG_PROB, old: np.ndarray = OLD, **how: Any
) -> tuple[float, np.ndarray]:
    settings: dict[str, Any] = {"clip": (0.2, 0.28), "dual_clip": 3.0, "kl_weight": 0.0}
    output, saved = grpo_forward(
        log_prob, advantages=ADVANTAGES, mask=mask, old_log_prob=old, **(settings | how)
    )
    return float(output.loss), grpo_backward((1.0,), saved)


def assert_same(a: tuple[float, np.ndarray], b: tuple[float, np.ndarray]) -> None:
    """But for the 1e-8 in some of verl's divisors."""
    np.testing.assert_allclose(a[0], b[0], rtol=2e-8)
    np.testing.assert_allclose(a[1], b[1], rtol=2e-8, atol=1e-16)


MODES: dict[str, dict[str, Any]] = {
    "token-mean": {"average": "token"},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum": {"average": "constant", "length": 1},
    "seq-mean-token-sum-norm": {"average": "constant", "length": MASK.shape[1]},
}


@pytest.mark.parametrize("mode", MODES)
def test_loss_modes(mode: str) -> None:
    """Rows 16 and 19: each mode in our words, with the dual clip at 3; log-ratios stop at ±20."""
    assert_same(theirs(mode), ours(**MODES[mode]))
    old = np.where(MASK, LOG_PROB - 25.0, OLD)
    assert float(np.abs(theirs(mode, old=old)[1]).max()) == 0
    assert float(np.abs(ours(old=old, dual_clip=None, **MODES[mode])[1]).max()) > 1e8


@pytest.mark.parametrize("mode", MODES)
def test_empty_outputs(mode: str) -> None:
    """Row 25: an output without a token is left out of the mean over outputs."""
    mask = MASK & (np.arange(len(MASK)) != 1)[:, None]
    assert_same(theirs(mode, mask), ours(mask, empty="left_out", **MODES[mode]))
    if mode != "token-mean":
        counted = ours(mask, **MODES[mode])[0]
        assert abs(theirs(mode, mask)[0] - counted) > 1e-3 * abs(counted)


def test_kl() -> None:
    """Row 18: k3 of log-ratios within ±20, stopped at 10; no gradient beyond."""
    reference = REFERENCE_LOG_PROB + np.where(np.arange(LOG_PROB.shape[1]) == 0, 3.0, 0.0)
    leaf = torch.tensor(LOG_PROB, requires_grad=True)
    k = core_algos.kl_penalty_forward(leaf, torch.tensor(reference), "low_var_kl")
    (k * torch.tensor(MASK)).sum().backward()
    output, saved = grpo_forward(
        LOG_PROB,
        advantages=0 * ADVANTAGES,
        mask=MASK,
        reference_log_prob=reference,
        kl_weight=1.0,
        kl_bounds=(20.0, 10.0),
        average="constant",
        length=1,
    )
    n = len(MASK)
    np.testing.assert_allclose(
        n * float(output.loss), float((k * torch.tensor(MASK)).sum().detach()), rtol=1e-13
    )
    np.testing.assert_allclose(
        n * grpo_backward((1.0,), saved), leaf.grad.numpy(), rtol=1e-12, atol=1e-14
    )
    assert float(k.detach().max()) == 10


def test_advantages() -> None:
    """Row 17: G − 1 and ε 1e-6; a group of one has mean 0 and deviation 1, in float32 there."""
    rewards = np.array([[1.0, 0.0, 0.5, 0.25]])
    groups = ((rewards, np.zeros(4, int), 1e-13), (rewards.T, np.arange(4), 2.0**-23))
    for given, index, rtol in groups:
        found, _ = core_algos.compute_grpo_outcome_advantage(
            torch.tensor(given.reshape(-1, 1)), torch.ones(4, 1), index
        )
        expected = group_advantages(given, epsilon=1e-6, alone=1 / (1 + 1e-6))
        np.testing.assert_allclose(found.numpy()[:, 0], expected, rtol=rtol)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches(mode: str) -> None:
    """Row 33: one output, then three, one of them empty. With the counts of all their sum is the
    whole's, empty outputs counted; without, it is the sum of the means."""
    mask = MASK & (np.arange(len(MASK)) != 1)[:, None]
    parts = (slice(0, 1), slice(1, 4))
    counts = {"dp_size": 1, "batch_num_tokens": mask.sum(), "global_batch_size": len(mask)}

    def accumulated(**of_all: float) -> tuple[float, np.ndarray]:
        each = [theirs(mode, mask, rows=rows, **of_all) for rows in parts]
        return sum(x for x, _ in each), np.concatenate([g for _, g in each])

    assert_same(accumulated(**counts), ours(mask, **MODES[mode]))
    whole = theirs(mode, mask)[0]
    alone = [theirs(mode, mask, rows=rows)[0] for rows in parts]
    assert accumulated()[0] == sum(alone)
    assert abs(sum(alone) - whole) > 0.1 * abs(whole)
