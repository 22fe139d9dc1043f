"""Problems: right by arithmetic of their own, held out by what makes them the same."""

from __future__ import annotations

import hashlib
import re

import pytest

from refimpl.train.rewards import score, tidiness
from refimpl.train.tasks import KINDS, Problem, draw, held_out, is_held_out, make, sloppy

RIGHT = {"accuracy": 1.0, "format": 1.0}
SUM = re.compile(r"(\d)\+(\d)(\+1)?=(\d+)")


def answer_of(prompt: str) -> str:
    """The answer, worked out from the prompt alone."""
    if prompt.startswith("sort "):
        return "".join(sorted(prompt.removeprefix("sort ").removesuffix("=")))
    a, b = prompt.removesuffix("=").split("+")
    return str(int(a) + int(b))


def steps_hold(problem: Problem) -> bool:
    """Whether each step of the solution is true, and follows from the prompt and the one before."""
    steps = problem.solution.split("</think>")[0].removeprefix("<think>").split(" ")
    if problem.kind.startswith("sort"):
        given = problem.prompt[5:-1]
        return steps == ["".join(sorted(given[: n + 1])) for n in range(len(given))]
    carry = 0
    a, b = problem.prompt[:-1].split("+")
    for step, x, y in zip(steps, reversed(a), reversed(b), strict=True):
        if not (found := SUM.fullmatch(step)):
            return False
        said = (found[1], found[2], bool(found[3]), int(found[4]))
        if said != (x, y, bool(carry), int(x) + int(y) + carry):
            return False
        carry = int(found[4]) // 10
    return True


def test_examples() -> None:
    assert make("add2", 8563) == Problem(
        "add2",
        "85+63=",
        "<think>5+3=8 8+6=14</think><answer>148</answer>",
        "148",
        make("add2", 8563).untidy,
    )
    assert make("add2", 8877).solution == "<think>8+7=15 8+7+1=16</think><answer>165</answer>"
    assert make("add3", 999001).prompt == "999+001="
    assert make("add3", 5).answer == "5"
    wanted = "<think>5 25 258 1258</think><answer>1258</answer>"
    assert make("sort4", 5281)[1:3] == ("sort 5281=", wanted)
    assert sloppy(make("add2", 8563)) == "5+3=8 8+6=14<answer>148</answer>"


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_right(kind: str) -> None:
    """All sums of two digits and every 97th other problem: both solutions by the rules, the second
    one longer; the sloppy one without format."""
    for number in range(0, KINDS[kind].total, 1 if kind == "add2" else 97):
        problem = make(kind, number)
        assert problem.answer == answer_of(problem.prompt)
        assert steps_hold(problem)
        for solution in (problem.solution, problem.untidy):
            assert score(solution, problem.answer) == RIGHT
        assert tidiness(problem.untidy) < tidiness(problem.solution)
        assert score(sloppy(problem), problem.answer) == {"accuracy": 1.0, "format": 0.0}


def test_untidy_ways() -> None:
    """A step said twice, or a remark: each way is taken."""
    ways = {make("add2", n).untidy.count("=") for n in range(100)}
    assert ways == {2, 3}
    said = " ".join(make("add2", n).untidy for n in range(100))
    assert all(f" {remark} " in said for remark in ("hm", "so", "well"))


@pytest.mark.parametrize("kind", ["add2", "sort4", "sort5"])
def test_no_problem_is_shared(kind: str) -> None:
    """All of them enumerated: an eighth is held out, at least 1,000; b + a and other orders of the
    same digits stand on its side. The order of `held_out` leaves none out and mixes them."""
    prompts = {problem.prompt for problem in held_out(kind)}
    count = KINDS[kind].total
    assert len(prompts) >= 1000
    assert 0.1 < len(prompts) / count < 0.15
    assert prompts == {make(kind, n).prompt for n in range(count) if is_held_out(kind, n)}
    same = [set(), set()]  # type: ignore[var-annotated]
    for number in range(count):
        prompt = make(kind, number).prompt
        digits = re.findall(r"\d+", prompt)
        what = frozenset(digits) if len(digits) == 2 else "".join(sorted(digits[0]))
        same[prompt in prompts].add(what)
    assert not same[0] & same[1]
    first = [problem.prompt for problem in held_out(kind, 200)]
    assert first == [problem.prompt for problem in held_out(kind)][:200]
    leading = {re.search(r"\d", prompt)[0] for prompt in first}  # type: ignore[index]
    assert leading == set("0123456789")


def test_draws() -> None:
    """From the arguments alone, none held out; all of a kind are reached. Pinned, as is what is
    held out: both must be the same everywhere."""
    for kind in KINDS:
        problems = draw(kind, 3, 7, 200)
        assert problems == draw(kind, 3, 7, 300)[:200]
        assert len({problem.prompt for problem in problems}) > 150
        assert problems != draw(kind, 3, 8, 200)
        assert problems != draw(kind, 4, 7, 200)
    seen = {problem.prompt for number in range(100) for problem in draw("add2", 0, number, 200)}
    held = {problem.prompt for problem in held_out("add2")}
    assert not seen & held
    assert len(seen) > 0.85 * (10**4 - len(held))
    shown = "\n".join(
        p.prompt for kind in KINDS for p in [*held_out(kind, 50), *draw(kind, 0, 0, 9)]
    )
    assert hashlib.sha256(shown.encode()).hexdigest()[:16] == "e09519173b6b3181"


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="kind must be one of add2, add3, sort4, sort5, got add4"):
        make("add4", 0)
    with pytest.raises(ValueError, match="number must lie in 0 … 9999, got 10000"):
        make("add2", 10**4)
    with pytest.raises(ValueError, match=r"count must be at most \d+ for add2, got 9999"):
        held_out("add2", 9999)
