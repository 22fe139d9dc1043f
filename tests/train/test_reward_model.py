"""The reward model: pairs, gradients in parts, learning, and what GRPO opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.parameters import HEAD as VOCABULARY_HEAD
from refimpl.parameters import module_name
from refimpl.train.evaluate import EVALUATION
from refimpl.train.policy import main_model, preference_gradients
from refimpl.train.reward_model import (
    FILE,
    HEAD,
    RewardModel,
    RewardModelSettings,
    RewardModelStage,
    open_reward_model,
)
from refimpl.train.run import Guard
from refimpl.train.save import RunFolder
from refimpl.train.tasks import Problem, draw, held_out
from refimpl.train.vocabulary import END, make_vocabulary, train_bpe, write_vocabulary

from small_stage import COMMON, CONFIG, MACHINE, begin, far, same

SMALL: dict[str, Any] = COMMON | {"batch": 5, "problems": 6}


def stage(**changed: Any) -> RewardModelStage:
    return RewardModelStage(RewardModelSettings(**SMALL | changed), MACHINE, begin())


def test_pairs() -> None:
    """Prompt, solution, end: tidy ones are chosen; padding behind the end."""
    made, problems = stage(), draw("add2", 0, 0, 4)
    pairs = made.pairs(problems)
    for i, problem in enumerate(problems):
        for tokens, mask, text in (
            (pairs.chosen[i], pairs.chosen_key_mask[i], problem.solution),
            (pairs.rejected[i], pairs.rejected_key_mask[i], problem.untidy),
        ):
            row = tokens[mask].tolist()
            assert row == [*made.vocabulary.encode(problem.prompt + text), END]
            assert np.all(np.diff(mask.astype(int)) <= 0)
    turned = [x._replace(solution=x.untidy, untidy=x.solution) for x in problems]
    for found, wanted in zip(made.pairs(turned), pairs, strict=True):
        assert np.array_equal(found, wanted)  # the rule orders them, not their place


def test_gradients_in_parts() -> None:
    """Two rows to a pair, any number at a time: the whole batch's loss and gradients."""
    whole, start = stage(), stage().start()
    pairs = whole.pairs(draw("add2", 0, 0, 5))
    told, grads, dw = preference_gradients(
        start.params,
        whole.config,
        pairs.chosen,
        pairs.rejected,
        start.extra[HEAD],
        chosen_key_mask=pairs.chosen_key_mask,
        rejected_key_mask=pairs.rejected_key_mask,
    )
    for rows in (0, 1, 4, 6, 100):
        found, sums = stage(rows=rows).gradients(start, pairs)
        assert far(sums, grads | {HEAD: dw}) <= 1e-12
        assert abs(found["loss"] - float(told.loss)) <= 1e-13
        assert abs(found["ordered"] - float(told.accuracy)) <= 1e-13


def test_it_learns() -> None:
    """Held-out pairs are ordered as the rule does, from a loss of about ln 2; the head of the
    vocabulary and the gates' biases stay, MTP modules are left out."""
    made = stage(steps=30, learning_rate=0.01, batch=8, problems=40)
    state, guard = made.start(), Guard(3.0, [])
    losses = []
    before = {name: x.copy() for name, x in state.params.items()}
    assert not any(name.startswith(module_name(CONFIG.layers)) for name in before)
    for _ in range(30):
        state, told = made.step(state, guard)
        losses.append(told["loss"])
    assert np.mean(losses[-5:]) < 0.3 < 0.5 < losses[0]
    assert made.evaluate(state)["ordered"] >= 0.9
    stays = {name for name, x in before.items() if np.array_equal(x, state.params[name])}
    assert stays == {VOCABULARY_HEAD} | {n for n in before if n.endswith("bias")}
    assert (state.step, state.position) == (30, 240)


def written(folder: Path) -> tuple[RewardModelStage, Any]:
    made = stage()
    state = made.start()
    run = RunFolder(folder, MACHINE, "")
    run.open(resume=False)
    run.finish(state, made.config, {}, lambda path: made.add_to_checkpoint(state, path))
    return made, state


def test_opened_again(tmp_path: Path) -> None:
    """Rewards in units of their spread over pairs for training, around their mean: a later stage
    is told nothing of the problems held out."""
    made, state = written(tmp_path / "rm")
    judge = open_reward_model(str(tmp_path / "rm"), MACHINE, make_vocabulary())
    assert same(dict(judge.params), state.params)

    def both(problems: list[Problem]) -> np.ndarray:
        pairs = made.pairs(problems)
        chosen = judge.rewards(pairs.chosen, pairs.chosen_key_mask)
        return np.concatenate([chosen, judge.rewards(pairs.rejected, pairs.rejected_key_mask)])

    units = both(draw("add2", made.settings.seed, EVALUATION, 6))
    assert abs(units.mean()) <= 1e-12
    assert abs(units.std() - 1) <= 1e-12
    held = both(held_out("add2", 6))
    assert abs(held.mean()) > 1e-3
    told = made.evaluate(state)
    assert told["ordered"] == np.mean(held[:6] > held[6:])
    assert abs(told["mean"] - (judge.mean + judge.spread * held.mean())) <= 1e-12
    assert abs(told["spread"] - judge.spread * held.std()) <= 1e-12


def test_a_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    params, config = main_model(begin().params, CONFIG)
    judge = RewardModel(params, config, stage().start().extra[HEAD], MACHINE)
    pairs = stage().pairs(draw("add2", 0, 0, 5))
    whole = judge.raw(pairs.chosen, pairs.chosen_key_mask)
    monkeypatch.setattr("refimpl.train.reward_model.AT_A_TIME", 2)
    assert np.max(np.abs(judge.raw(pairs.chosen, pairs.chosen_key_mask) - whole)) <= 1e-13


def test_models_that_cannot_judge(tmp_path: Path) -> None:
    """One without a reward head, and one that reads other tokens."""
    written(tmp_path / "rm")
    pytest.importorskip("tokenizers")
    other = tmp_path / "other"
    other.mkdir()
    write_vocabulary(other, train_bpe(["a text"], 261))
    read = make_vocabulary()
    read = read._replace(files={"tokenizer.json": (other / "tokenizer.json").read_text()})
    with pytest.raises(CouldNotRun, match="has another tokenizer than the policy"):
        open_reward_model(str(tmp_path / "rm"), MACHINE, read)
    (tmp_path / "rm" / "checkpoint" / FILE).unlink()
    with pytest.raises(CouldNotRun, match=r"reward_model .*is not a reward model: it has no"):
        open_reward_model(str(tmp_path / "rm"), MACHINE, make_vocabulary())


def test_too_many_pairs() -> None:
    with pytest.raises(
        CouldNotRun, match="problems: count must be at most 1215 for add2, got 5000"
    ):
        stage(problems=5000)


def test_a_batch_that_no_memory_holds() -> None:
    with pytest.raises(CouldNotRun, match=r"batch must be at most 10,922, so that .*, got 20000"):
        stage(batch=20000)
