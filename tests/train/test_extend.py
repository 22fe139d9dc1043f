"""Context extension: YaRN's settings, and the loss inside and beyond the original context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.config import Yarn
from refimpl.errors import CouldNotRun
from refimpl.train.extend import Extend, ExtendSettings
from refimpl.train.losses import position_losses
from refimpl.train.run import Guard

from small_stage import COMMON, MACHINE, begin

SMALL: dict[str, Any] = COMMON | {
    "factors": (2, 4),
    "batches": (3, 2),
    "steps": 2,
    "measured": 4,
    "beta_fast": 3.0,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("the cat sat on the mat, the rat on the hat\n" * 60)
    return str(file)


def stage(text: str, phase: int, **changed: Any) -> Extend:
    settings = ExtendSettings(**SMALL | {"text": text} | changed)
    first = begin(max_positions=8)
    if phase:  # as the first phase left it
        yarn = Yarn(2.0, 8, 3.0, 1.0)
        first = replace(first, config=replace(first.config, max_positions=16, yarn=yarn))
    return Extend(settings, MACHINE, first, phase)


@pytest.mark.parametrize("phase", [0, 1])
def test_phases(phase: int, text: str) -> None:
    """Factors are of the original length, in the second phase too; rows are as long as the new
    context."""
    made = stage(text, phase)
    factor = (2, 4)[phase]
    assert made.config.max_positions == 8 * factor
    assert made.config.yarn == Yarn(float(factor), 8, 3.0, 1.0)
    assert made.config.mtp_weight == 0.1
    examples = made.train.batch(0, made.size, 0)
    assert examples.tokens.shape == ((3, 2)[phase], 8 * factor)
    before = made.start()
    kept = {name: x.copy() for name, x in before.params.items()}
    state, told = made.step(before, Guard(9.0, []))
    assert made.progress(state, {}) == 0.5
    assert (state.tokens, state.position) == (examples.tokens.size, made.size)
    assert told["loss"] > 0
    assert all(not np.array_equal(x, kept[name]) for name, x in state.params.items())


def test_inside_and_beyond(text: str) -> None:
    """The second half of the original positions; all later ones up to this phase's length."""
    assert stage(text, 0).inside_and_beyond(np.arange(32.0)) == (5.5, 11.5)
    assert stage(text, 1).inside_and_beyond(np.arange(32.0)) == (5.5, 19.5)


def test_evaluation(text: str) -> None:
    """With YaRN and, of the same weights, without: rows of the last phase's length."""
    made = stage(text, 0)
    state = made.start()
    found = made.evaluate(state)
    assert made.test.tokens.shape == (4, 32)
    plain = position_losses(
        state.params, made.test, replace(made.config, yarn=None), MACHINE
    ).tolist()
    own = position_losses(state.params, made.test, made.config, MACHINE).tolist()
    assert (found["by_position"], found["by_position_plain"]) == (own, plain)
    assert own != plain
    inside, beyond = made.inside_and_beyond(np.array(own))
    assert (found["inside"], found["ratio"]) == (inside, beyond / inside)
    inside, beyond = made.inside_and_beyond(np.array(plain))
    assert (found["inside_plain"], found["ratio_plain"]) == (inside, beyond / inside)


def test_a_model_with_yarn_already(text: str) -> None:
    """It is never made shorter, and its temperatures stay."""
    first = begin(max_positions=8)
    yarn = Yarn(2.0, 8, 3.0, 1.0, 0.7, 0.9)
    first = replace(first, config=replace(first.config, max_positions=16, yarn=yarn))
    given = SMALL | {"text": text}
    with pytest.raises(CouldNotRun, match=r"factors must be above 2, by which .*, got 2$"):
        Extend(ExtendSettings(**given), MACHINE, first, 0)
    made = Extend(ExtendSettings(**given | {"factors": (4, 6)}), MACHINE, first, 0)
    assert made.config.yarn == Yarn(4.0, 8, 3.0, 1.0, 0.7, 0.9)
    assert made.config.max_positions == 32


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"factors": (4, 2)}, "factors must be integers above 1 that rise"),
        ({"factors": ()}, "factors must be integers above 1 that rise"),
        ({"factors": (1, 4)}, "factors must be integers above 1 that rise"),
        ({"batches": (3,)}, "batches must have an integer of at least 1 per factor"),
        ({"measured": 0}, "measured must be at least 1, got 0"),
        ({"batches": (1, 10**6)}, "batches must be at most 32,768, so that .*, got 1000000"),
        ({"factors": (2, 400)}, "length must be below "),
    ],
)
def test_settings_that_cannot_be(text: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CouldNotRun, match=said):
        stage(text, 0, **changed)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"text .*can't be read"):
        stage(str(tmp_path / "none"), 0)
