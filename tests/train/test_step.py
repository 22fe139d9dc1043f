"""One training step: parts of a batch are the batch, biases move once, and a step that is not taken
changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.config import ModelConfig, preset
from refimpl.model import backward, forward
from refimpl.ops import bias_update
from refimpl.optimizer import Moments, clip_global_norm
from refimpl.parameters import GATE_BIAS, is_buffer, layer_name
from refimpl.train import step
from refimpl.train.machine import open_machine
from refimpl.train.packing import pack
from refimpl.train.step import (
    NotTaken,
    State,
    Told,
    add_gradients,
    apply_gradients,
    copied,
    loss_gradients,
    max_violation,
    part_size,
    train_step,
)

from random_parameters import random_parameters

MACHINE = open_machine("numpy", "reference", "float64")
OPTIMIZER = MACHINE.optimizer()
TINY = preset("tiny")
ROWS, LENGTH = 7, 6
Arrays = dict[str, np.ndarray]


def batch(config: ModelConfig, kind: str) -> Arrays:
    """Seven rows: plain; with targets that don't count, unevenly; padded; documents packed."""
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(0, config.vocabulary, (2, ROWS, LENGTH))
    arrays = {"tokens": tokens, "targets": targets}
    if kind == "mask":
        mask = rng.random((ROWS, LENGTH)) < 0.5
        mask[2] = False  # a row, and with rows=1 a part, without a target
        return arrays | {"mask": mask}
    if kind == "padded":
        return {"tokens": tokens, "key_mask": np.arange(LENGTH) < rng.integers(1, 7, (ROWS, 1))}
    if kind == "packed":
        pairs = [
            (rng.integers(0, config.vocabulary, n).tolist(), (rng.random(n) < 0.7).tolist())
            for n in rng.integers(2, LENGTH + 1, 14)
        ]
        return pack(pairs, LENGTH).arrays()
    return arrays


def start(config: ModelConfig) -> State:
    """A state in the middle of a run, whose moments are not zero."""
    params = random_parameters(config)
    arrays = batch(config, "plain")
    grads = loss_gradients(params, arrays, config, MACHINE)[1]
    moments = OPTIMIZER.update(params, grads, Moments(), 1e-3)
    return State(params, moments, 1, 42, 7)


def everything(state: State) -> dict[str, bytes]:
    """The bytes of every tensor."""
    parts = (state.params, state.moments.first, state.moments.second)
    return {f"{i} {name}": x.tobytes() for i, part in enumerate(parts) for name, x in part.items()}


def close(found: Any, expected: Any) -> None:
    """Sums of the same numbers in another order."""
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", ["plain", "mask", "padded", "packed"])
def test_parts(kind: str, depth: int) -> None:
    """Whatever the split, losses and gradients are those of one forward of the whole batch."""
    config = replace(TINY, mtp_depth=depth)
    params, arrays = random_parameters(config), batch(config, kind)
    output, saved = forward(params, config=config, ops=MACHINE.ops, **arrays)
    expected = backward(saved)
    for rows in (1, 3, 100):
        told, grads = loss_gradients(params, arrays, config, MACHINE, rows=rows)
        close(told.loss, output.loss)
        close(told.main, output.main)
        close(told.mtp, output.mtp)
        close(told.balance, sum(output.balance.values()))
        assert len(told.mtp) == depth
        assert grads.keys() == expected.keys()
        for name, g in expected.items():
            np.testing.assert_allclose(grads[name], g, rtol=1e-12, atol=1e-12 * np.abs(g).max())
        for layer, load in output.loads.items():
            np.testing.assert_array_equal(told.loads[layer], load)


def test_size_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``rows`` a forward reads a bounded number of tokens, at least a row."""
    assert [part_size(rows, 6) for rows in (5, 10**6, 0, None)] == [5, 10**6, 5461, 5461]
    assert part_size(0, 10**6) == 1
    read = []

    def watched(params: Any, tokens: np.ndarray, **options: Any) -> Any:
        read.append(len(tokens))
        return forward(params, tokens, **options)

    monkeypatch.setattr(step, "forward", watched)
    monkeypatch.setattr(step, "PART", 3 * LENGTH)
    loss_gradients(random_parameters(TINY), batch(TINY, "plain"), TINY, MACHINE)
    assert read == [3, 3, 1]


def test_step() -> None:
    """A step in parts is the step by hand: clip, AdamW, then each gate's bias once, by the load of
    the whole batch, MTP modules' too."""
    state, arrays = start(TINY), batch(TINY, "plain")
    by_hand = copied(state)
    after, told = train_step(
        state, arrays, TINY, MACHINE, OPTIMIZER, learning_rate=1e-2, max_norm=0.5, gamma=0.1, rows=3
    )
    output, saved = forward(by_hand.params, config=TINY, ops=MACHINE.ops, **arrays)
    grads = backward(saved)
    norm = clip_global_norm(grads, 0.5)
    moments = OPTIMIZER.update(by_hand.params, grads, by_hand.moments, 1e-2)
    assert norm > 0.5
    close(told.norm, norm)
    close(told.loss, output.loss)
    gates = [layer_name(layer, GATE_BIAS) for layer in output.loads]
    assert len(gates) == TINY.layers - TINY.dense_layers + TINY.mtp_depth
    for name, x in by_hand.params.items():
        if name in gates:
            load = output.loads[list(output.loads)[gates.index(name)]]
            x = bias_update(x, load, 0.1)
            np.testing.assert_array_equal(after.params[name], x)
        np.testing.assert_allclose(after.params[name], x, rtol=1e-9, atol=1e-12)
    for found, expected in zip(after.moments[1:3], moments[1:3], strict=True):
        assert found.keys() == expected.keys() == {x for x in state.params if not is_buffer(x)}
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-9, atol=1e-12)
    assert after.moments.step == moments.step == 2
    assert (after.step, after.tokens, after.position) == (2, 42 + ROWS * LENGTH, 7 + ROWS)


def spoilt(state: State, arrays: Arrays) -> None:
    state.params["model.layers.1.mlp.gate.weight"][1, 2] = np.nan


def infinite(state: State, arrays: Arrays) -> None:
    state.params["model.norm.weight"][0] = np.inf


def overflow(state: State, arrays: Arrays) -> None:
    """Every gradient is finite, but not the sum of their squares."""
    state.params["model.norm.weight"] *= 1e-160
    state.params["lm_head.weight"] *= 1e160


FAULTS: dict[str, tuple[Callable[[State, Arrays], None], str]] = {
    "parameter": (spoilt, "the loss is nan, and model.layers.1.mlp.gate.weight is not finite"),
    "infinite": (infinite, "the loss is nan, and model.norm.weight is not finite"),
    "overflow": (overflow, r"the loss is \d\S*, and the norm of the gradients inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_not_taken(fault: str) -> None:
    """The step names the first tensor that is not finite and changes none, bit for bit."""
    spoil, line = FAULTS[fault]
    state, arrays = start(TINY), batch(TINY, "plain")
    spoil(state, arrays)
    before = everything(state)
    with np.errstate(all="ignore"), pytest.raises(NotTaken, match=f"^{line}$"):
        train_step(state, arrays, TINY, MACHINE, OPTIMIZER, learning_rate=1e-2)
    assert everything(state) == before


def test_gradient_not_finite() -> None:
    """Parameters are finite: the message names the gradient."""
    params = {"a": np.ones(2), "b": np.ones(3)}
    grads = {"a": np.ones(2), "b": np.array([1.0, np.nan, 2.0])}
    for loss, said in ((2.0, "2"), (np.inf, "inf")):
        line = f"^the loss is {said}, and the gradient of b is not finite$"
        with pytest.raises(NotTaken, match=line):
            apply_gradients(params, grads, Moments(), OPTIMIZER, 1e-2, 1.0, loss=loss)
    with pytest.raises(NotTaken, match=r"^the loss is nan, and the norm of the gradients 1\.414$"):
        apply_gradients(
            {"a": params["a"]}, {"a": grads["a"]}, Moments(), OPTIMIZER, 1e-2, 1.0, loss=np.nan
        )
    assert all((x == 1).all() for x in params.values())


def test_expected() -> None:
    """The caller, who is told the loss first, may refuse it."""
    state, arrays = start(TINY), batch(TINY, "plain")
    before = everything(state)
    losses = []

    def expect(loss: float) -> None:
        losses.append(loss)
        raise NotTaken("the loss jumps")

    with pytest.raises(NotTaken, match="the loss jumps"):
        train_step(state, arrays, TINY, MACHINE, OPTIMIZER, learning_rate=1e-2, expect=expect)
    assert everything(state) == before
    _, told = train_step(state, arrays, TINY, MACHINE, OPTIMIZER, learning_rate=1e-2)
    assert losses == [told.loss]


def test_copied() -> None:
    """A step on the copy does not reach the state, nor the other way round."""
    state, arrays = start(TINY), batch(TINY, "plain")
    before = everything(state)
    other = copied(state)
    assert everything(other) == before
    train_step(other, arrays, TINY, MACHINE, OPTIMIZER, learning_rate=1e-2)
    assert everything(state) == before
    assert other.moments.step == state.moments.step


def test_added() -> None:
    """A tensor that only one part has a gradient for keeps it."""
    sums = add_gradients({"a": np.ones(1)}, {"b": np.ones(1)})
    assert add_gradients(sums, {"b": np.ones(1)}) == {"a": np.ones(1), "b": 2 * np.ones(1)}


def test_violation() -> None:
    """How far the fullest expert lies above the mean; nothing was counted: 0."""
    assert max_violation(np.array([4, 4, 4, 4])) == 0
    assert max_violation(np.array([16, 0, 0, 0])) == 3
    assert max_violation(np.array([5, 3, 4, 4])) == 0.25
    assert max_violation(np.zeros(4)) == 0
    assert Told(1.0, 1.0, [], 0.0, {}).norm == 0
