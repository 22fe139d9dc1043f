"""Exact match and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.generate import generate
from refimpl.train import evaluate
from refimpl.train.evaluate import answers, evaluation, interval, measured
from refimpl.train.tasks import make, sloppy

from small_stage import CONFIG, MACHINE, begin


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval(right: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998 (Statistics in Medicine 17, 857–872), table I, method 3."""
    assert interval(right, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = (1 - high, 1 - low)
    assert interval(count - right, count) == pytest.approx(mirrored, abs=5e-5)


def test_no_problem_tells_nothing() -> None:
    assert interval(0, 0) == (0.0, 1.0)


def told(prompts: Sequence[str], temperature: float = 1.0, **options: Any) -> list[Any]:
    start = begin()
    return answers(
        start.params,
        start.config,
        start.vocabulary,
        MACHINE,
        prompts,
        **{"temperature": temperature, "max_tokens": 4, "seed": 7} | options,
    )


def test_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the main model to each prompt, the same however many are read at a time."""
    prompts = ["1+1=", "2+10=", "3+7=", "4+4=", "5+5="]
    start = begin()
    wanted = [
        generate(
            start.params,
            CONFIG,
            [start.vocabulary.encode(prompt)],
            max_tokens=4,
            temperature=1.0,
            seed=7 + row,
            stop=[start.vocabulary.end],
        )[0]
        for row, prompt in enumerate(prompts)
    ]
    found = told(prompts)
    assert [x[0] for x in found] == [start.vocabulary.decode(x.tokens) for x in wanted]
    assert [x[1] for x in found] == [x.finish == "stop" for x in wanted]
    assert [x[2] for x in found] == [len(x.tokens) for x in wanted]
    monkeypatch.setattr(evaluate, "AT_A_TIME", 2)
    assert told(prompts) == found


def test_no_room() -> None:
    with pytest.raises(CouldNotRun, match="max_tokens must leave room for a prompt of 4 tokens in"):
        told(["1+1="], max_tokens=61)
    assert told(["1+1="], max_tokens=60)


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One right, one right without the form, one cut off at its end, one wrong."""
    problems = [make("add2", n) for n in (1234, 5678, 4711, 17)]
    texts = [problems[0].solution, sloppy(problems[1]), problems[2].solution, problems[0].solution]
    given = list(zip(texts, (True, True, False, True), (20, 18, 19, 20), strict=True))
    monkeypatch.setattr(evaluate, "answers", lambda *args, **options: given)
    start = begin()
    found = measured(start.params, CONFIG, start.vocabulary, MACHINE, problems)
    assert (found.problems, found.accuracy, found.format, found.tokens) == (4, 0.75, 0.5, 19.25)
    assert (found.low, found.high) == interval(3, 4)
    assert found.samples == [(x.prompt, text) for x, text in zip(problems, texts, strict=True)][:3]


def test_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind, greedy and sampled; the same problems and draws each time."""
    asked = []

    def pretended(*given: Any, temperature: float, seed: int, **options: Any) -> Any:
        asked.append((given[4], temperature, seed))
        return [("<answer>5</answer>", True, 3)] * len(given[4])

    monkeypatch.setattr(evaluate, "answers", pretended)
    start = begin()
    options: Any = {"kinds": ("add2", "sort4"), "seed": 3, "problems": 6, "max_tokens": 8}
    found = evaluation(start.params, CONFIG, start.vocabulary, MACHINE, **options)
    names = [
        f"{what}{how}{kind}"
        for kind in ("", "_sort4")
        for how in ("greedy", "sampled")
        for what in ("", "format_", "samples_")
    ]
    assert sorted(found) == sorted(names)
    assert found["greedy"] == 0.0
    assert [len(x[0]) for x in asked] == [6] * 4
    assert [x[1] for x in asked] == [0.0, 1.0] * 2
    first = list(asked)
    evaluation(start.params, CONFIG, start.vocabulary, MACHINE, **options)
    assert asked[4:] == first
