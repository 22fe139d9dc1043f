"""GRPO's loss in the place of the cross-entropy: the model's own gradients from the op's, settings,
what can't be computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint.source import MemorySource
from refimpl.config import ModelConfig
from refimpl.grads import GRPO, Request
from refimpl.model import Route, backward, forward
from refimpl.ops import (
    GRPO_PRESETS,
    grpo_backward,
    grpo_forward,
    log_prob_backward,
    log_prob_forward,
)
from refimpl.parameters import head_name

from grads.examples import TINY, TOKENS, read, stream
from random_parameters import random_parameters

RNG = np.random.default_rng(4)
MASK = (np.arange(12) >= [[3], [6]]) & (np.arange(12) < 11)
ARRAYS: dict[str, Any] = {
    "mask": MASK,
    "advantages": np.array([1.3, -0.7]),
    "old_log_prob": np.where(MASK, -5.5 + RNG.normal(size=TOKENS.shape), np.nan),
    "reference_log_prob": np.where(MASK, -5.5 + RNG.normal(size=TOKENS.shape), np.nan),
}
TARGETS = np.concatenate((TOKENS[:, 1:], TOKENS[:, -1:]), axis=1)


def policy(
    config: ModelConfig, params: dict[str, np.ndarray], given: GRPO, routes: Any = None
) -> tuple[Any, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The op's output, every gradient, and the log-probabilities and their gradient, of the ops
    that a trainer calls one after another."""
    output, saved = forward(params, TOKENS, config, with_loss=False, routes=routes)
    head = head_name(config)
    log_prob, log_prob_saved = log_prob_forward(
        output.hidden, params[head], targets=TARGETS, mask=MASK, temperature=given.temperature
    )
    found, grpo_saved = grpo_forward(log_prob, **given.arguments(log_prob.dtype))
    dlog_prob = grpo_backward(1.0, grpo_saved)
    dhidden, dw = log_prob_backward(dlog_prob, log_prob_saved)
    gradients = backward(saved, dhidden=dhidden)
    gradients[head] = dw + gradients[head]
    return found, gradients, log_prob, dlog_prob


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradients_are_the_ops(tied: bool, tmp_path: Path) -> None:
    """Bit for bit; log-probabilities are those of the next tokens."""
    config = replace(TINY, mtp_depth=0, tied=tied)
    params = random_parameters(config)
    given = GRPO.of(ARRAYS, {"temperature": 0.9, "clip": [0.1, 0.3], "kl_weight": 0.05})
    output, gradients, log_prob, dlog_prob = policy(config, params, given)
    result = stream(params, config, tmp_path / "out", grpo=given)
    found = read(tmp_path / "out")
    assert result.loss == found["out/loss"] == output.loss
    assert np.array_equal(found["act/log_prob"], log_prob)
    assert np.array_equal(found["cot/log_prob"], dlog_prob)
    assert 0 < output.unclipped[MASK].mean() < 1
    assert np.array_equal(found["aux/unclipped"], output.unclipped)
    assert np.array_equal(found["aux/kept"], output.kept)
    for name, x in gradients.items():
        if ".experts." not in name:
            assert np.array_equal(found[f"grad/{name}"], x), name
    for name in ("old_log_prob", "reference_log_prob"):
        assert np.array_equal(found[f"in/{name}"], np.where(MASK, ARRAYS[name], 0))
    assert {name for name in found if name.startswith("in/")} == {
        "in/tokens",
        "in/targets",
        "in/grpo_mask",
        *(f"in/{name}" for name in ARRAYS if name != "mask"),
    }
    assert "out/loss_per_token" not in found


def test_the_loss_is_what_the_gradients_are_of(tmp_path: Path) -> None:
    """Along a direction of every parameter, with a balance loss: against differences."""
    config = replace(TINY, mtp_depth=0)
    params = random_parameters(config)
    given = GRPO.of(ARRAYS, {"preset": "dapo", "kl_weight": 0.1})
    first = stream(params, config, tmp_path / "first", grpo=given, balance_alpha=0.02)
    found = read(tmp_path / "first")
    routes = {
        layer: Route(found[f"aux/routes.{layer}"], found[f"aux/counted.{layer}"])
        for layer in (1, 2)
    }
    given = replace(given, unclipped=found["aux/unclipped"], kept=found["aux/kept"])
    direction = {
        name: 0 * p if name.endswith("bias") else RNG.normal(size=p.shape)
        for name, p in params.items()
    }
    losses = []
    for number, step in enumerate((1e-4, -1e-4, 2e-4, -2e-4)):
        moved = {name: p + step * direction[name] for name, p in params.items()}
        out = tmp_path / str(number)
        options: dict[str, Any] = {"routes": routes, "logits": False, "only": "model.norm*"}
        losses.append(
            stream(moved, config, out, grpo=given, balance_alpha=0.02, **options).loss or 0.0
        )
    slope = (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / 12e-4
    terms = []
    for name, x in direction.items():
        parts = {f"grad/{name}": x}
        if ".experts." in name:
            parts = {
                f"grad/{name.replace('.experts.', f'.experts.{e}.')}": p for e, p in enumerate(x)
            }
        terms += [np.sum(found[part] * p) for part, p in parts.items() if part in found]
    assert first.balance
    np.testing.assert_allclose(sum(terms), slope, rtol=0, atol=1e-8 * sum(map(abs, terms)))


def test_settings() -> None:
    """A preset's, unless they are given; JSON's lists are pairs."""
    told = GRPO.of(ARRAYS, {"preset": "gspo", "clip": [0.1, 0.2], "temperature": 0.5}).told
    assert told == {
        "temperature": 0.5,
        "clip": (0.1, 0.2),
        "dual_clip": None,
        "ratio": "sequence_mean",
        "average": "sequence",
        "length": None,
        "empty": "counted",
        "kl_weight": 0.0,
        "kl": "k3",
        "kl_level": "token",
        "kl_bounds": None,
        "off_policy": None,
    }
    for preset, settings in GRPO_PRESETS.items():
        assert GRPO.of(ARRAYS, {"preset": preset}).settings == settings


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"clip": [0.1]}, "tuple index out of range"),
    ({}, {"clip": "no"}, "'>=' not supported"),
    ({}, {"ratio": "word"}, "ratio must be one of"),
    ({}, {"temperature": 0}, "temperature must be above 0 and finite, got 0"),
    ({}, {"temperature": "hot"}, "temperature must be above 0 and finite, got hot"),
    ({}, {"preset": "dr_grpo"}, "length must be positive and finite"),
    ({"reference_log_prob": None}, {}, "reference_log_prob must be given unless kl_weight is 0"),
    ({"advantages": np.ones(3)}, {}, r"advantages must have shape \(B,\)=\(2,\), got \(3,\)"),
    ({"advantages": np.array([1, np.nan])}, {}, "advantages must be finite"),
    ({"old_log_prob": np.full(TOKENS.shape, np.inf)}, {}, "old_log_prob must be finite"),
    ({"mask": MASK[:, 1:]}, {}, r"mask must have shape \(B, T\)"),
    ({"old_log_prob": MASK[:1] + 0.0}, {}, r"old_log_prob must have shape \(B, T\)"),
]


@pytest.mark.parametrize(("arrays", "settings", "message"), WRONG, ids=range(len(WRONG)))
def test_what_can_not_be_computed(
    arrays: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    request = Request(TOKENS, grpo=GRPO.of(ARRAYS | arrays, settings))
    with pytest.raises(ValueError, match=f"^grpo can't be computed: {message}"):
        request.check(MemorySource(random_parameters(TINY), TINY))


def test_what_does_not_go_together() -> None:
    source = MemorySource(random_parameters(TINY), TINY)
    given = GRPO.of(ARRAYS, {})
    for other in ({"mtp": True}, {"mask": MASK}, {"dlogits": np.zeros((2, 12, 256))}):
        with pytest.raises(ValueError, match=r"^grpo has its own loss and mask"):
            Request(TOKENS, grpo=given, **other).check(source)  # type: ignore[arg-type]
    everywhere = GRPO(np.ones_like(MASK), ARRAYS["advantages"], settings={"kl_weight": 0.0})
    with pytest.raises(ValueError, match=r"^mask must be False where no target can count"):
        Request(TOKENS, grpo=everywhere).check(source)
    with pytest.raises(ValueError, match=r"^grpo must leave at least one target that counts"):
        Request(TOKENS, grpo=GRPO.of(ARRAYS | {"mask": 0 * MASK == 1}, {})).check(source)
