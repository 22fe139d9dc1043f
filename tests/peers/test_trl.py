"""What refimpl.conventions says of TRL: its own loss runs here, beside ours."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refimpl.ops import grpo_backward, grpo_forward

from peers.rollouts import ADVANTAGES, LOG_PROB, MASK, OLD, REFERENCE_LOG_PROB

WHY = "TRL's loss needs the extra peers: make peers"
torch = pytest.importorskip("torch", reason=WHY)
trl = pytest.importorskip("trl", reason=WHY)

SETTINGS = {
    "loss_type": "grpo",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "aux_loss_enabled": False,
    "_entropy_bonus_enabled": False,
    "max_completion_length": 7,
    "current_gradient_accumulation_steps": 1,
}
OF_ARGS = {
    "delta": None,
    "use_bias_correction_kl": False,
    "steps_per_generation": 1,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


def theirs(
    mask: np.ndarray = MASK,
    log_prob: np.ndarray = LOG_PROB,
    old: np.ndarray = OLD,
    advantages: np.ndarray = ADVANTAGES,
    rows: slice = slice(None),
    items: float | None = None,
    **settings: Any,
) -> tuple[float, np.ndarray]:
    """GRPOTrainer's loss of these log-probabilities, and its gradient; of some ``rows``, where all
    have ``items`` tokens."""
    from trl import GRPOTrainer

    mask, log_prob, old, advantages = (x[rows] for x in (mask, log_prob, old, advantages))
    leaf = torch.tensor(log_prob, requires_grad=True)
    same = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    args = SimpleNamespace(**(OF_ARGS | {k: v for k, v in settings.items() if k in OF_ARGS}))
    of_trainer = SETTINGS | {k: v for k, v in settings.items() if k not in OF_ARGS}
    trainer = SimpleNamespace(
        **of_trainer,
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=same,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
    )
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": tokens[:, :1] + 1,
        "completion_ids": tokens,
        "completion_mask": torch.tensor(mask.astype(np.float64)),
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(REFERENCE_LOG_PROB[rows]),
        "num_items_in_batch": torch.tensor(float(items or mask.sum())),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def ours(
    mask: np.ndarray = MASK,
    log_prob: np.ndarray = LOG_PROB,
    old: np.ndarray = OLD,
    advantages: np.ndarray = ADVANTAGES,
    **settings: Any,
) -> tuple[float, np.ndarray]:
    how: dict[str, Any] = {"kl_weight": 0.0, "reference_log_prob": REFERENCE_LOG_PROB} | settings
    output, saved = grpo_forward(
        log_prob, advantages=advantages, mask=mask, old_log_prob=old, **how
    )
    return float(output.loss), grpo_backward((1.0,), saved)


def assert_same(a: tuple[float, np.ndarray], b: tuple[float, np.ndarray]) -> None:
    np.testing.assert_allclose(a[0], b[0], rtol=1e-13)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-12, atol=1e-16)


def test_loss_types() -> None:
    """Row 16: its loss types in our words; vespo weights by the product over the output; `delta` is
    our `dual_clip` for δ ≥ 1 + ε alone, since it bounds ρ where A > 0 too."""
    from trl import GRPOTrainer

    assert_same(theirs(loss_type="grpo"), ours())
    assert_same(theirs(loss_type="dapo"), ours(average="token"))
    assert_same(theirs(loss_type="dr_grpo"), ours(average="constant", length=7))
    assert_same(
        theirs(loss_type="grpo", importance_sampling_level="sequence"), ours(ratio="sequence_mean")
    )
    assert_same(theirs(delta=1.55), ours(dual_clip=1.55))  # on no ratio: exp may round either way
    assert abs(theirs(delta=1.1)[0] - ours(dual_clip=1.1)[0]) > 1e-3
    log_ratio = np.where(MASK, LOG_PROB - OLD, 0.0)
    weights = GRPOTrainer.get_gamma_weights(
        torch.tensor(np.abs(ADVANTAGES)[:, None]), torch.tensor(log_ratio), torch.tensor(MASK), None
    )
    product = np.exp(log_ratio.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        weights.numpy(), np.exp(3.0) * product**2 * np.exp(-3.0 * product), rtol=1e-12
    )


def test_empty_outputs() -> None:
    """Row 25: an output without a token counts in the mean over outputs."""
    mask = MASK & (np.arange(len(MASK)) != 1)[:, None]
    assert_same(theirs(mask), ours(mask))
    assert abs(theirs(mask)[0] - ours(mask, empty="left_out")[0]) > 1e-3


def test_kl() -> None:
    """Row 18: unclamped; times the ratio with `use_bias_correction_kl`, which is on by default."""
    from dataclasses import fields

    from trl import GRPOConfig

    assert_same(theirs(beta=0.3), ours(kl_weight=0.3))
    assert_same(theirs(beta=0.3, use_bias_correction_kl=True), ours(kl_weight=0.3, kl="unbiased"))
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    assert defaults["use_bias_correction_kl"] is True
    assert (defaults["loss_type"], defaults["beta"], defaults["epsilon"]) == ("dapo", 0.0, 0.2)


def test_micro_batches() -> None:
    """Row 33: two of two outputs, 6 tokens and 7. dapo's sum is the whole's mean, grpo's and
    dr_grpo's too, with equally many outputs; bnpo's is the mean of two means. A generation for two
    steps of one micro-batch: each is divided by the mean step's 6.5 tokens."""
    halves, items = (slice(0, 2), slice(2, 4)), float(MASK.sum())

    def accumulated(kind: str) -> tuple[float, np.ndarray]:
        how = {"current_gradient_accumulation_steps": 2, "steps_per_generation": 2, "items": items}
        parts = [theirs(loss_type=kind, rows=half, **how) for half in halves]
        return sum(x for x, _ in parts), np.concatenate([g for _, g in parts])

    assert_same(accumulated("dapo"), ours(average="token"))
    assert_same(accumulated("grpo"), ours())
    assert_same(accumulated("dr_grpo"), ours(average="constant", length=7))
    alone = [ours_of(half, average="token") for half in halves]
    means = np.mean([x for x, _ in alone]), np.concatenate([g / 2 for _, g in alone])
    assert_same(accumulated("bnpo"), means)
    assert abs(means[0] - ours(average="token")[0]) > 1e-3
    step = theirs(loss_type="dapo", rows=halves[0], items=items, steps_per_generation=2)
    assert_same(step, ours_of(halves[0], average="token", normaliser=6.5))


def ours_of(rows: slice, **how: Any) -> tuple[float, np.ndarray]:
    how |= {"reference_log_prob": REFERENCE_LOG_PROB[rows]}
    return ours(MASK[rows], LOG_PROB[rows], OLD[rows], ADVANTAGES[rows], **how)
