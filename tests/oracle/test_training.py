"""A hundred steps of training and ten of GRPO, beside a whole implementation in torch that shares
no code with ours: the same losses and parameters, and gate biases to the bit. Needs the extra
`oracle`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import cos, pi
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra `oracle` is not installed")

from refimpl.config import ModelConfig, preset
from refimpl.ops import REFERENCE, Op, Ops
from refimpl.optimizer import AdamW, Moments
from refimpl.parameters import head_name, is_buffer, module_name, mtp_layers
from refimpl.text import load_text
from refimpl.train import policy
from refimpl.train.machine import open_machine
from refimpl.train.policy import grpo_gradients
from refimpl.train.step import State, apply_gradients, train_step

from oracle.torch_model import Batch, Sample, Trained, train, train_grpo
from random_parameters import random_parameters

TINY = preset("tiny")
MACHINE = open_machine("numpy", "reference", "float64")
STEPS, GRPO_STEPS = 100, 10
ROWS, LENGTH = 4, 24
MOST, GRPO_MOST = 1.0, 3.0  # norm of the gradients: some are above, some below
DECAY = 0.1
GAMMA = 2e-3  # of the gates' biases
CLIP, BETA = 0.2, 0.04
# Measured: 2e-14 for a loss, 6e-14 for a norm, 1e-14 for a tensor, in a hundred steps; one unit of
# rounding in one parameter makes as much. A division in float32 made 3e-8.
BOUND = 1e-10


def rates(steps: int) -> list[float]:
    """Ten steps of warm-up, then a cosine."""
    return [
        0.01 * min((step + 1) / 10, 1) * (1 + cos(pi * step / steps)) / 2 for step in range(steps)
    ]


def batches() -> list[Batch]:
    """Windows of real text: whole; padded on the right, on the left and throughout; documents
    packed, the last one padded."""
    rng, text = np.random.default_rng(0), np.frombuffer(load_text().data, np.uint8)
    place, found = np.arange(LENGTH), []
    for step in range(STEPS):
        starts = rng.integers(0, len(text) - LENGTH, (ROWS, 1))
        real, document = np.ones((ROWS, LENGTH), bool), np.zeros((ROWS, LENGTH), np.int64)
        cut = rng.integers(4, LENGTH - 4, ROWS)
        if step % 3 == 1:
            real[1], real[2] = place < cut[1], place >= cut[2]
            real[3] = False
        if step % 3 == 2:
            document += (place >= cut[:, None]).astype(np.int64) + (place >= LENGTH - 3)
            real[1:] = place < LENGTH - 3
        tokens = text[starts + place].astype(np.int64)
        found.append(Batch(np.where(real, tokens, 0), real, document))
    return found


def samples() -> list[Sample]:
    """Each set of outputs is used for two steps. What the policy that sampled gave, and the
    reference, is drawn about what a model without knowledge gives: ratios of e^±1, so that many are
    clipped, on either side."""
    rng, text = np.random.default_rng(1), np.frombuffer(load_text().data, np.uint8)
    place, found = np.arange(LENGTH), []
    for _ in range(GRPO_STEPS // 2):
        starts = rng.integers(0, len(text) - LENGTH, (ROWS, 1))
        prompt, end = rng.integers(3, 9, (ROWS, 1)), rng.integers(12, LENGTH + 1, (ROWS, 1))
        real, counts = place < end, (place >= prompt - 1) & (place < end - 1)
        tokens = np.where(real, text[starts + place], 0).astype(np.int64)
        old, reference = rng.normal(-5.8, 0.7, (2, ROWS, LENGTH))
        found += 2 * [Sample(tokens, real, counts, rng.normal(size=ROWS), old, reference)]
    return found


def ours(
    config: ModelConfig, params: dict[str, np.ndarray], batches: Sequence[Batch], gamma: float
) -> Trained:
    optimizer, told = AdamW(weight_decay=DECAY), []
    state = State(params, Moments())
    for (tokens, real, document), rate in zip(batches, rates(len(batches)), strict=True):
        arrays = {"tokens": tokens, "key_mask": real, "segments": document}
        state, step = train_step(
            state,
            arrays,
            config,
            MACHINE,
            optimizer,
            learning_rate=rate,
            max_norm=MOST,
            gamma=gamma,
            rows=3,  # at a time: three and one
        )
        told.append((step.loss, step.norm))
    losses, norms = zip(*told, strict=True)
    return losses, norms, state.params


def ours_grpo(
    config: ModelConfig,
    params: dict[str, np.ndarray],
    samples: Sequence[Sample],
    ops: Ops = REFERENCE,
) -> Trained:
    optimizer, moments = AdamW(weight_decay=DECAY), Moments()
    told = []
    for sample, rate in zip(samples, rates(len(samples)), strict=True):
        step, grads = grpo_gradients(
            params,
            config,
            sample.tokens,
            key_mask=sample.real,
            mask=sample.counts,
            advantages=sample.advantages,
            old_log_prob=sample.old,
            reference_log_prob=sample.reference,
            settings={"clip": (CLIP, CLIP), "kl_weight": BETA},
            ops=ops,
        )
        moments, norm = apply_gradients(params, grads, moments, optimizer, rate, GRPO_MOST)
        told.append((float(step.loss), norm))
    losses, norms = zip(*told, strict=True)
    return losses, norms, params


def start() -> dict[str, np.ndarray]:
    return random_parameters(TINY)


def theirs(batches: Sequence[Batch]) -> Trained:
    return train(TINY, start(), batches, rates(len(batches)), most=MOST, decay=DECAY, gamma=GAMMA)


def theirs_grpo(samples: Sequence[Sample]) -> Trained:
    return train_grpo(
        TINY,
        start(),
        samples,
        rates(len(samples)),
        most=GRPO_MOST,
        decay=DECAY,
        clip=CLIP,
        beta=BETA,
    )


def differences(found: Trained, wanted: Trained) -> Iterator[tuple[str, float]]:
    """Of each step's loss and norm, and of each tensor the norm of the difference, relative to what
    is wanted; of a gate's bias 0 if it is the same to the bit, else infinity."""
    for what, numbers, others in zip(("loss", "norm"), found[:2], wanted[:2], strict=False):
        for step, (x, y) in enumerate(zip(numbers, others, strict=True)):
            yield f"{what} of step {step}", abs(x - y) / abs(y)
    assert found[2].keys() == wanted[2].keys()
    for name, y in wanted[2].items():
        x = found[2][name]
        if is_buffer(name):
            yield name, 0.0 if np.array_equal(x, y) else np.inf
        else:
            yield name, float(np.linalg.norm(x - y) / np.linalg.norm(y))


def largest(found: Trained, wanted: Trained, kind: str = "") -> tuple[float, str]:
    """The largest difference, and of what; of names that begin with ``kind``."""
    return max((x, name) for name, x in differences(found, wanted) if name.startswith(kind))


def test_a_hundred_steps() -> None:
    """And they are steps worth comparing: the loss falls, some gradients are clipped and some not,
    every tensor moves."""
    given = batches()
    found, wanted = ours(TINY, start(), given, GAMMA), theirs(given)
    assert largest(found, wanted)[0] <= BOUND, largest(found, wanted)
    losses, norms, params = found
    assert np.mean(losses[-9:]) < 0.8 * np.mean(losses[:9])
    assert min(norms) < MOST < max(norms)
    for name, x in start().items():
        assert np.linalg.norm(params[name] - x) > 0.01 * np.linalg.norm(x), name


def test_ten_steps_of_grpo() -> None:
    """The gates' biases and the MTP modules stay, to the bit; every other tensor moves."""
    given = samples()
    found, wanted = ours_grpo(TINY, start(), given), theirs_grpo(given)
    assert largest(found, wanted)[0] <= BOUND, largest(found, wanted)
    assert min(found[1]) < GRPO_MOST < max(found[1])
    modules = tuple(f"{module_name(layer)}." for layer in mtp_layers(TINY))
    for name, x in start().items():
        stays = is_buffer(name) or name.startswith(modules)
        assert np.array_equal(found[2][name], x) == stays, name


def without_dhead(dy: Any, saved: Any) -> Any:
    dhidden, dhead = REFERENCE.log_prob.backward(dy, saved)
    return dhidden, 0 * dhead


def grpo_with(**changed: Any) -> Ops:
    def grpo(log_prob: Any, **given: Any) -> Any:
        return REFERENCE.grpo.forward(log_prob, **given | changed)

    return REFERENCE | {"grpo": Op(grpo, REFERENCE.grpo.backward)}


def test_mistakes_in_training_are_seen() -> None:
    """Planted in ours, in six steps: λ off by 1 %, the bias's sign, documents joined in one."""
    given = batches()[:6]
    wanted = theirs(given)
    assert largest(ours(TINY, start(), given, GAMMA), wanted)[0] <= BOUND
    heavier = replace(TINY, mtp_weight=1.01 * TINY.mtp_weight)
    found = ours(heavier, start(), given, GAMMA)
    assert largest(found, wanted, "loss")[0] > 1e-4
    assert largest(found, wanted, "model")[0] > 1e-4
    found = ours(TINY, start(), given, -GAMMA)
    assert largest(found, wanted) == (np.inf, max(name for name in wanted[2] if is_buffer(name)))
    joined = [*given[:5], given[5]._replace(document=np.zeros_like(given[5].document))]
    found = ours(TINY, start(), joined, GAMMA)
    assert largest(found, wanted, "loss of step 5")[0] > 1e-4
    assert largest(found, wanted, "loss of step 4")[0] <= BOUND


def test_mistakes_in_grpo_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in ours: the head's own gradient forgotten; MTP modules with a gradient of zeros,
    which AdamW's decay shrinks; β off by 1 %; either bound of the ratio."""
    given = samples()[:2]
    wanted = theirs_grpo(given)
    assert largest(ours_grpo(TINY, start(), given), wanted)[0] <= BOUND
    forgotten = REFERENCE | {"log_prob": Op(REFERENCE.log_prob.forward, without_dhead)}
    found = ours_grpo(TINY, start(), given, forgotten)
    assert largest(found, wanted, head_name(TINY))[0] > 1e-4
    backward = policy.log_probs_backward

    def with_zeros(*given: Any) -> Any:
        zeros = {name: np.zeros_like(x) for name, x in start().items() if not is_buffer(name)}
        return zeros | backward(*given)

    monkeypatch.setattr(policy, "log_probs_backward", with_zeros)
    found = ours_grpo(TINY, start(), given)
    assert largest(found, wanted, module_name(TINY.layers))[0] > 1e-5
    assert largest(found, wanted, head_name(TINY))[0] <= BOUND
    monkeypatch.undo()
    for ops in (
        grpo_with(kl_weight=1.01 * BETA),
        grpo_with(clip=(1.01 * CLIP, CLIP)),
        grpo_with(clip=(CLIP, 1.01 * CLIP)),
    ):
        found = ours_grpo(TINY, start(), given, ops)
        assert largest(found, wanted, "loss")[0] > 1e-5
