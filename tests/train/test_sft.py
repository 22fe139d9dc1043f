"""Fine-tuning: the loss counts completions and their ends alone, and learning them works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.train.policy import log_probs
from refimpl.train.rewards import accuracy, formatted
from refimpl.train.run import Guard
from refimpl.train.schedule import decayed
from refimpl.train.sft import (
    SFT,
    SFTSettings,
    begin_sft,
    completion,
    in_turn,
    read_solutions,
    tokens_of,
    write_solutions,
)
from refimpl.train.step import State, loss_gradients
from refimpl.train.tasks import draw, make, sloppy
from refimpl.train.vocabulary import END, Vocabulary, make_vocabulary

from small_stage import COMMON, CONFIG, MACHINE, MODEL, begin

SMALL: dict[str, Any] = COMMON | {"batch": 5, "problems": 4, "max_tokens": 8}


def stage(**changed: Any) -> SFT:
    return SFT(SFTSettings(**SMALL | changed), MACHINE, begin())


def at(sft: SFT, step: int, position: int = 0) -> State:
    return sft.start()._replace(step=step, position=position)


@pytest.mark.parametrize("rows", [0, 1])
def test_loss_counts_completions(rows: int) -> None:
    """The mean over the completions' tokens and ends, from each pair alone, unpacked: packing lets
    nothing of another document in, and no token of a prompt counts."""
    sft = stage(untidy=0.5, rows=rows)
    start = at(sft, 3)
    examples = sft.examples(start)
    assert len(examples.tokens) < 5  # packed
    losses = []
    for prompt, text in sft.solved(3, 5):
        before, after = sft.vocabulary.encode(prompt), [*sft.vocabulary.encode(text), END]
        found, _ = log_probs(start.params, CONFIG, np.array([before + after]))
        losses += (-found[0, len(before) - 1 : -1]).tolist()
        assert len(before + after) - len(before) == len(found[0, len(before) - 1 : -1])
    told, _ = loss_gradients(start.params, examples.arrays(), CONFIG, MACHINE, rows=rows or None)
    assert abs(told.main - np.mean(losses)) <= 1e-13 * told.main
    _, metrics = sft.step(start, Guard(3.0, []))
    assert metrics["main"] == told.main


def test_completions_follow_their_prompt() -> None:
    """A tokenizer that begins every text with a token does not put one between them."""

    class Begins:
        def encode(self, text: str) -> list[int]:
            return [300, *text.encode()]

        def decode(self, tokens: Any) -> str:
            return ""

    foreign = Vocabulary(Begins(), 301, 299, (300,))
    tokens, counted = tokens_of(foreign, "1=", "2")
    assert tokens == [300, *b"1=", *b"2", 299]
    assert counted == [False] * 3 + [True] * 2
    own = make_vocabulary()
    assert tokens_of(own, "1=", "<think>") == ([49, 61, 257, END], [False] * 2 + [True] * 2)


def test_kinds_of_solutions() -> None:
    """Each with its share; answers alone have the format and no thought."""
    settings, problem = SFTSettings(untidy=0.3, sloppy=0.2), make("add2", 1234)
    drawn = [completion(problem, settings, u) for u in np.arange(0.005, 1, 0.01)]
    assert drawn.count(sloppy(problem)) == 20
    assert drawn.count(problem.untidy) == 30
    assert drawn.count(problem.solution) == 50
    bare = completion(problem, SFTSettings(solutions="answers"), 0.5)
    assert bare == "<think></think><answer>46</answer>"
    assert (accuracy(bare, problem.answer), formatted(bare)) == (1.0, 1.0)


def test_kinds_in_turn() -> None:
    found = in_turn(("add2", "sort4"), 0, 3, 5)
    assert [x.kind for x in found] == ["add2", "sort4", "add2", "sort4", "add2"]
    assert found[::2] == draw("add2", 0, 3, 3)


def test_what_a_step_sees() -> None:
    """New problems at each step; of distinct ones epochs in another order, from the position."""
    fresh = stage()
    assert fresh.solved(0, 5) != fresh.solved(1, 5)
    few = stage(distinct=5)
    assert few.given == few.solved(0, 5)
    epochs = [few.examples(at(few, 0, position)) for position in (0, 5, 0)]
    assert [np.sort(x.tokens, axis=None).tolist() for x in epochs[:2]] == [
        np.sort(epochs[0].tokens, axis=None).tolist()
    ] * 2
    assert not np.array_equal(epochs[0].tokens, epochs[1].tokens)
    assert np.array_equal(epochs[0].tokens, epochs[2].tokens)
    state, _ = few.step(at(few, 0), Guard(3.0, []))
    assert (state.step, state.position) == (1, 5)


def test_it_learns() -> None:
    """Three solutions by heart: the loss falls from ln 261 = 5.6 below 1, on the decayed rate; the
    MTP modules and the gates' biases learn too."""
    sft = stage(distinct=3, batch=3, steps=20, learning_rate=0.03)
    state, guard = sft.start(), Guard(3.0, [])
    told = []
    before = {name: x.copy() for name, x in state.params.items()}
    for step in range(20):
        state, metrics = sft.step(state, guard)
        told.append(metrics["main"])
        assert metrics["learning_rate"] == decayed(step, 20, 0.03, warmup=10, end=0.1)
    assert told[0] > 5
    assert told[-1] < 1
    assert all(not np.array_equal(x, before[name]) for name, x in state.params.items())


def test_it_stops() -> None:
    """At the first evaluation between the bounds, of this very step; else after its steps."""
    sft = stage(stop=(0.4, 0.55), steps=10)
    state = at(sft, 5)
    assert sft.progress(state, {"step": 5, "sampled": 0.4}) == 1
    assert sft.progress(state, {"step": 5, "sampled": 0.56}) == 0.5
    assert sft.progress(state, {"step": 4, "sampled": 0.5}) == 0.5
    assert sft.progress(state, {}) == 0.5
    assert stage(steps=10).progress(state, {"step": 5, "sampled": 0.5}) == 0.5


def test_evaluation() -> None:
    sft = stage(kinds=("add2", "sort4"))
    found = sft.evaluate(sft.start())
    assert {"greedy", "sampled", "greedy_sort4", "format_sampled_sort4"} <= found.keys()


def test_a_new_model() -> None:
    """Its context is a row's length; its vocabulary bytes and tags."""
    settings = SFTSettings(**SMALL, model=MODEL, length=48, mtp_weight=0.2)
    start = begin_sft(settings, MACHINE)
    assert (start.config.context, start.config.vocabulary) == (48, 261)
    assert (start.config.width, start.config.yarn, start.config.mtp_weight) == (20, None, 0.2)
    with pytest.raises(CouldNotRun, match=r"^model has no setting wid; there are width, "):
        begin_sft(replace(settings, model={"wid": 3}), MACHINE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"untidy": 0.6, "sloppy": 0.5}, "untidy must be at most 1 with sloppy together, got 1.1"),
        ({"end": 1.5}, "end must lie in 0…1, got 1.5"),
        ({"stop": (0.5,)}, "stop must be two accuracies that rise, or none"),
        ({"stop": (0.5, 0.4)}, "stop must be two accuracies that rise, or none"),
        ({"kinds": ()}, "kinds must be among add2"),
        ({"kinds": ("add9",)}, "kinds must be among add2"),
        ({"length": 65}, "length must be at most 64, the context of the model \\(.*\\), got 65"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 10**9}, "batch must be at most 16,384, so that .* 1,048,576 tokens, got 10"),
    ],
)
def test_settings_that_cannot_be(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CouldNotRun, match=said):
        stage(**changed)


def test_a_row_too_short() -> None:
    """For a solution: said before anything changes."""
    sft = stage(length=20)
    with pytest.raises(CouldNotRun, match="length must be at least 29, the tokens of a prompt wit"):
        sft.step(sft.start(), Guard(3.0, []))


def test_solutions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    lines = [{"prompt": f"{n}+1=", "completion": f"<answer>{n + 1}</answer>"} for n in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = [(x["prompt"], x["completion"]) for x in lines]
    assert read_solutions(file) == wanted
    write_solutions(tmp_path / "again", wanted)
    assert (tmp_path / "again").read_text() == file.read_text()
    sft = stage(solutions=str(file), batch=4)
    text = sft.vocabulary.decode(sft.examples(sft.start()).tokens.reshape(-1).tolist())
    assert all(prompt + answer in text for prompt, answer in wanted)
    file.write_text('{"prompt": "x"}\n')
    with pytest.raises(CouldNotRun, match=r"line 1: must be a JSON object with prompt and comple"):
        read_solutions(file)
    file.write_text("")
    with pytest.raises(CouldNotRun, match="must hold at least one line"):
        read_solutions(file)
