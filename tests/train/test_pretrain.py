"""Pre-training: V3's schedules on windows of a text, and what is evaluated."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.train.losses import bigram_loss, held_out_loss
from refimpl.train.machine import open_machine
from refimpl.train.pretrain import Pretrain, PretrainSettings, new_config, windows
from refimpl.train.run import Guard
from refimpl.train.schedule import scaled
from refimpl.train.step import train_step
from refimpl.train.vocabulary import make_vocabulary

from small_stage import COMMON, MACHINE, MODEL, same

SMALL: dict[str, Any] = COMMON | {
    "model": MODEL,
    "tokens": 20 * 64,
    "length": 8,
    "batch": 10,
    "warmup_steps": 3,
    "learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for n in range(8):
        (folder / f"{n}.txt").write_text(f"the cat {n} sat on the mat, the rat on the hat\n" * 8)
    return str(folder)


def stage(text: str, **changed: Any) -> Pretrain:
    return Pretrain(PretrainSettings(**SMALL | {"text": text} | changed), MACHINE)


def test_a_step(text: str) -> None:
    """`train_step` on the schedule's batch, learning rate, λ and γ, all read before it."""
    made = stage(text)
    state, guard = made.start(), Guard(3.0, [])
    schedule = scaled(1280, peak=0.02, batch=10, warmup_steps=3, bias_speed=1e-3)
    seen = set()
    while made.progress(state, {}) < 1:
        size, rate = schedule.batch(state.tokens), schedule.learning_rate(state.step, state.tokens)
        gamma, weight = (f(state.tokens) for f in (schedule.bias_update_speed, schedule.mtp_weight))
        mine = state._replace(
            params={name: x.copy() for name, x in state.params.items()},
            moments=state.moments._replace(
                first={name: x.copy() for name, x in state.moments.first.items()},
                second={name: x.copy() for name, x in state.moments.second.items()},
            ),
        )
        batch = made.train.batch(state.position, size, 0)
        config = replace(made.config, mtp_weight=weight)
        wanted, _ = train_step(
            mine, batch.arrays(), config, MACHINE, made.optimizer, learning_rate=rate, gamma=gamma
        )
        state, told = made.step(state, guard)
        assert same(state.params, wanted.params)
        assert (state.step, state.tokens, state.position) == wanted[2:5]
        assert told["learning_rate"] == rate
        seen.add((size, gamma, weight))
    assert {x[0] for x in seen} >= {2, 10}
    assert {x[2] for x in seen} == {0.3, 0.1}


def test_it_learns(text: str) -> None:
    """Below the bigram model of a text that says one thing, in 60 steps."""
    made = stage(text, tokens=60 * 80)
    state, guard = made.start(), Guard(3.0, [])
    begin = made.evaluate(state)
    while made.progress(state, {}) < 1:
        state, _ = made.step(state, guard)
    end = made.evaluate(state)
    assert begin["held_out"] > 5 > end["bigram"] > end["held_out"]
    assert end["accepted"] > 0.3 > begin["accepted"]


def test_evaluation(text: str) -> None:
    """Of the held-out documents, which are not trained on."""
    made = stage(text)
    state = made.start()
    found = made.evaluate(state)
    assert found["held_out"] == held_out_loss(state.params, made.test, made.config, MACHINE)
    assert found["bigram"] == bigram_loss(made.train, made.test, 261)
    train, test = (x.stream.tobytes() for x in (made.train, made.test))
    assert test
    assert test not in train
    plain = stage(text, model=MODEL | {"mtp_depth": 0})
    assert plain.evaluate(plain.start()).keys() == {"held_out", "bigram"}


def test_masked_documents(text: str) -> None:
    made = stage(text, masked=True, length=30)
    examples = made.train.batch(0, 20, 0)
    assert examples.segments is not None
    assert not np.all(examples.mask)
    assert stage(text).train.batch(0, 4, 0).segments is None


def test_new_config() -> None:
    """Without YaRN, what is given and then the fields that differ."""
    found = new_config("tiny", {"layers": 2, "width": 24}, vocabulary=261, max_positions=9)
    assert (found.layers, found.width, found.vocabulary) == (2, 24, 261)
    assert (found.max_positions, found.yarn) == (9, None)
    for model, said in (
        ({"foo": 1}, "model has no setting foo; there are width, layers, "),
        ({"vocabulary": 300}, "model has no setting vocabulary"),
        ({"width": "x"}, "model.width must be an integer, got 'x'"),
        ({"top_k": 100}, "impossible model: "),
    ):
        with pytest.raises(CouldNotRun, match=said):
            new_config("tiny", model)
    with pytest.raises(CouldNotRun, match="impossible model: preset must be one of tiny, "):
        new_config("huge", {})


def test_windows() -> None:
    found = windows(["abc", "de"], make_vocabulary(), 6)
    assert found.stream.tolist() == [97, 98, 99, 256, 100, 101, 256]
    with pytest.raises(CouldNotRun, match="length must be below 7, the tokens of the text's"):
        windows(["abc", "de"], make_vocabulary(), 7)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"vocabulary": 260}, "vocabulary must be at least 261, or 0 for bytes, got 260"),
        ({"vocabulary": -1}, "vocabulary must be at least 261, or 0 for bytes, got -1"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        ({"length": 10**6}, "length must be below "),
        ({"batch": 2**18 + 1, "length": 4}, "batch must be at most 262,144, .*, got 262145"),
    ],
)
def test_settings_that_cannot_be(text: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CouldNotRun, match=said):
        stage(text, **changed)


def test_bigram(tmp_path: Path) -> None:
    """Of the documents and windows of the training; by hand on a text of two letters."""
    text = tmp_path / "text.txt"
    text.write_text("ab" * 1000 + "\n" + "ab" * 70)
    machine = open_machine("numpy", "reference")
    found = Pretrain(PretrainSettings(text=str(text), length=45), machine).bigram
    # 1,000 times ab, 999 times ba, once b\n: add-one over 261 tokens; held out is ab … ab
    a, b = log((1000 + 1) / (1000 + 261)), log((999 + 1) / (1000 + 261))
    assert found == pytest.approx(-(68 * a + 67 * b) / 135)  # three windows
