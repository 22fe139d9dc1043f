"""Each claim holds up to its bound and not beyond, and is left out where its jobs have not run."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import nan
from typing import Any

import pytest

from refimpl.train.claims import Claim, judge, number

from train.recipe_results import example

Change = Callable[[Any], None]


def put(*path: str, value: float, last: bool = False) -> Change:
    """A change of one number of the jobs; ``last``: of the last of a list."""

    def change(results: Any) -> None:
        place = results["jobs"]
        for key in path[:-1]:
            place = place[key]
        if last:
            place[path[-1]][-1] = value
        else:
            place[path[-1]] = value

    return change


def right(job: str, how: str, value: float, key: str = "accuracy", kind: str = "add2") -> Change:
    return put(job, "held_out", kind, how, key, value=value)


def whole(key: str, value: float) -> Change:
    def change(results: Any) -> None:
        results[key] = value

    return change


def first_phase(results: Any) -> None:
    results["jobs"]["long"]["phases"][0]["evaluations"]["ratio"][-1] = 1.06


def first_phase_plain(results: Any) -> None:
    results["jobs"]["long"]["phases"][0]["evaluations"]["ratio_plain"][0] = 1.19


# what is changed, the claim that then fails, and only it; the first value of each pair still holds
CHANGES: list[tuple[Change, Change, str]] = [
    (whole("bigram", 1.981), whole("bigram", 1.979), "held-out loss in nats"),
    (
        put("base", "end", "violation", value=0.7 / 3.01),
        put("base", "end", "violation", value=0.7 / 2.99),
        "max violation",
    ),
    (
        put("base", "evaluations", "held_out", value=1.49 * 1.009, last=True),
        put("base", "evaluations", "held_out", value=1.49 * 1.011, last=True),
        "held-out loss with bias balancing",
    ),
    (
        put("long", "evaluations", "ratio", value=1.05, last=True),
        put("long", "evaluations", "ratio", value=1.051, last=True),
        "loss beyond the original length",
    ),
    (lambda results: None, first_phase, "loss beyond the original length"),
    (lambda results: None, first_phase_plain, "the same of the pre-trained model"),
    (right("grpo-1", "greedy", 0.7501), right("grpo-1", "greedy", 0.749), "greedy accuracy from"),
    (right("grpo-2", "sampled", 0.601), right("grpo-2", "sampled", 0.599), "sampled accuracy from"),
    (
        right("sft", "sampled", 0.899, "format"),
        right("sft", "sampled", 0.9, "format"),
        "sampled answers in the format",
    ),
    (
        right("grpo-0", "sampled", 0.99, "format"),
        right("grpo-0", "sampled", 0.989, "format"),
        "sampled answers in the format",
    ),
    (
        right("permuted", "greedy", 0.63),
        right("permuted", "greedy", 0.631),
        "greedy accuracy by GRPO with permuted rewards",
    ),
    (
        right("permuted", "sampled", 0.48),
        right("permuted", "sampled", 0.481),
        "sampled accuracy by GRPO with permuted rewards",
    ),
    (
        right("grpo-hard", "sampled", 0.551, kind="add3"),
        right("grpo-hard", "sampled", 0.549, kind="add3"),
        "sampled accuracy on add3",
    ),
    (
        put("reward-model", "evaluations", "ordered", value=0.9, last=True),
        put("reward-model", "evaluations", "ordered", value=0.89, last=True),
        "held-out pairs",
    ),
    (
        put("last", "begin", "model", value=0.899),
        put("last", "begin", "model", value=0.9),
        "the model's reward",
    ),
    (right("last", "greedy", 0.77), right("last", "greedy", 0.769), "greedy accuracy over the"),
    (right("last", "sampled", 0.67), right("last", "sampled", 0.669), "sampled accuracy over the"),
    (
        right("distilled", "greedy", 0.361, "low"),
        right("distilled", "greedy", 0.359, "low"),
        "greedy accuracy of the student",
    ),
    (
        right("student-grpo", "sampled", 0.469, "high"),
        right("student-grpo", "sampled", 0.471, "high"),
        "sampled accuracy of the student",
    ),
    (whole("seconds", 900.0), whole("seconds", 900.1), "seconds in all"),
]


@pytest.mark.parametrize(("inside", "beyond", "name"), CHANGES)
def test_bounds(inside: Change, beyond: Change, name: str) -> None:
    for change, wanted in ((inside, set()), (beyond, {name})):
        results = example()
        change(results)
        failed = {x.name for x in judge(results) if x.holds is False}
        assert len(failed) == len(wanted)
        assert all(x.startswith(name) for x in failed)


NAN = [
    put("long", "evaluations", "ratio", value=nan, last=True),
    right("grpo-2", "greedy", nan),
    right("grpo-1", "sampled", nan, "format"),
    right("student-grpo", "greedy", nan, "high"),
]


@pytest.mark.parametrize("change", NAN)
def test_no_number_holds_no_claim(change: Change) -> None:
    results = example()
    change(results)
    assert [x.name for x in judge(results) if x.holds is False]


def test_every_claim_with_a_bound_is_changed_above() -> None:
    bounded = [x.name for x in judge(example()) if x.holds is not None]
    names = {name for _, _, name in CHANGES}
    assert len(bounded) == 18
    assert all(any(x.startswith(name) for name in names) for x in bounded)
    assert [x.name for x in judge(example()) if x.holds is None] == [
        "greedy accuracy by continued SFT, beside GRPO",
        "sampled accuracy by continued SFT, beside GRPO",
        "greedy accuracy by GRPO with one update a step, beside four",
        "sampled accuracy by GRPO with one update a step, beside four",
        "greedy accuracy on add3",
    ]


def test_numbers_that_are_shown() -> None:
    """Those that the issue asks to be printed beside their claims."""
    claims = {x.name: x for x in judge(example())}
    fall = claims["greedy accuracy by GRPO with permuted rewards"].values["fall"]
    assert fall == pytest.approx(0.5)
    assert claims["greedy accuracy of the student"].values["gold solutions"] == 0.69
    beside = claims["sampled accuracy by continued SFT, beside GRPO"].values
    assert beside["GRPO, mean"] == pytest.approx((0.70 + 0.61 + 0.75) / 3)
    assert Claim("x", {"a": 1234.5, "b": 0.12345}, "", True).numbers == "a 1,234, b 0.123"
    assert (number(99.9), number(-0.5)) == ("99.900", "-0.500")
    assert [Claim("x", {}, "", holds).verdict for holds in (True, False, None)] == [
        "holds",
        "FAILS",
        "–",
    ]


@pytest.mark.parametrize("gone", [*example()["jobs"]])
def test_what_has_not_run_is_left_out(gone: str) -> None:
    """Without an error, and without a claim that names it; the time is that of all."""
    results = deepcopy(example())
    del results["jobs"][gone]
    found = {x.name for x in judge(results)}
    assert found < {x.name for x in judge(example())}
    assert "seconds in all" not in found  # a part of the jobs takes less
    assert judge({**results, "jobs": {}}) == []
