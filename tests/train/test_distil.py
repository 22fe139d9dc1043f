"""Solutions that a teacher gives and the rules accept."""

from __future__ import annotations

from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.train import distil
from refimpl.train.distil import DistilSettings, sample_solutions
from refimpl.train.sft import in_turn
from refimpl.train.tasks import Problem, sloppy

from small_stage import MACHINE, begin


def sampled(
    monkeypatch: pytest.MonkeyPatch, of: Any, **changed: Any
) -> tuple[list[Problem], tuple[list[tuple[str, str]], int]]:
    """Let a teacher say what ``of`` says to the i-th problem: (text, ended)."""
    settings = DistilSettings(**{"sampled": 6, "kinds": ("add2", "sort4")} | changed)
    problems = in_turn(settings.kinds, settings.seed, distil.TEACHING, settings.sampled)

    def answers(params: Any, config: Any, vocabulary: Any, machine: Any, prompts: Any, **_: Any):
        assert prompts == [problem.prompt for problem in problems]
        return [(*of(i, problem), 9) for i, problem in enumerate(problems)]

    monkeypatch.setattr(distil, "answers", answers)
    monkeypatch.setattr(distil, "begin_from", lambda *given, **options: begin())
    return problems, sample_solutions(settings, MACHINE)


def test_only_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right without the format, in the format and wrong, cut off: none of them is kept."""

    def of(i: int, problem: Problem) -> tuple[str, bool]:
        wrong = f"<think></think><answer>{problem.answer}0</answer>"
        texts = [problem.solution, sloppy(problem), wrong, problem.solution, problem.untidy, ""]
        return texts[i], i != 3

    problems, (pairs, accepted) = sampled(monkeypatch, of)
    assert [x.kind for x in problems[:2]] == ["add2", "sort4"]
    wanted = [(problems[0].prompt, problems[0].solution), (problems[4].prompt, problems[4].untidy)]
    assert (pairs, accepted) == (wanted, 2)


def test_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems come twice among so many; a solution is learnt once."""
    problems, (pairs, accepted) = sampled(
        monkeypatch, lambda i, problem: (problem.solution, True), sampled=4000
    )
    assert accepted == 4000
    assert len(pairs) == len(set(pairs)) == len({x.prompt for x in problems}) < 4000


def test_none_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CouldNotRun, match="the teacher has no right solution to 6 problems"):
        sampled(monkeypatch, lambda i, problem: ("", True))


def test_the_teachers_solutions_are_learnt() -> None:
    """Settings that choose others are refused."""
    for name, x in {"solutions": "answers", "distinct": 3, "untidy": 0.1, "sloppy": 0.1}.items():
        with pytest.raises(CouldNotRun, match=f"{name} must be left out"):
            DistilSettings(**{name: x})  # type: ignore[arg-type]
    with pytest.raises(CouldNotRun, match="sampled must be at least 1, got 0"):
        DistilSettings(sampled=0)
