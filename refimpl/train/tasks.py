"""Problems that a rule can verify, and their solutions; training and held-out problems differ.

Kinds: addN adds two numbers of N digits, a digit at a time from the right, each carry said; sortN
sorts N digits by inserting one after the other. Both are made of steps that read the prompt and the
step before, and each decides one digit, which a model of 10⁵ parameters learns in a minute.
(Another base would need tables of quotients, learnt by heart.)

    85+63=       <think>5+3=8 8+6=14</think><answer>148</answer>
    sort 5281=   <think>5 25 258 1258</think><answer>1258</answer>

A kind's problems have numbers 0 … total − 1 and are made when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from math import gcd
from typing import NamedTuple

from .draws import generator
from .rewards import ANSWER, ANSWERED, THINK, THOUGHT

__all__ = ["KINDS", "Problem", "draw", "held_out", "is_held_out", "make", "sloppy"]

SHARE = 1 / 8  # of the problems is held out
REMARKS = ("hm", "so", "well")


class Problem(NamedTuple):
    """A problem with its solution."""

    kind: str
    prompt: str
    solution: str
    answer: str
    untidy: str  # a right solution with a step said twice, or an idle remark


class Kind(NamedTuple):
    total: int  # number of problems
    steps: Callable[[int], tuple[str, list[str], str]]  # number -> prompt, steps, answer
    same: Callable[[int], str]  # number -> what problems that are the same share


def _sum(digits: int, number: int) -> tuple[str, list[str], str]:
    a, b = divmod(number, 10**digits)
    steps, carry = [], 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(f"{x}+{y}{'+1' * carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return f"{a:0{digits}}+{b:0{digits}}=", steps, str(a + b)


def _same_sum(digits: int, number: int) -> str:
    """b + a is a + b."""
    return "+".join(map(str, sorted(divmod(number, 10**digits))))


def _sort(digits: int, number: int) -> tuple[str, list[str], str]:
    given = f"{number:0{digits}}"
    steps = ["".join(sorted(given[:n])) for n in range(1, digits + 1)]
    return f"sort {given}=", steps, steps[-1]


def _same_sort(digits: int, number: int) -> str:
    """All orders of the same digits."""
    return "".join(sorted(f"{number:0{digits}}"))


KINDS = {  # of problems, by name
    "add2": Kind(10**4, partial(_sum, 2), partial(_same_sum, 2)),
    "add3": Kind(10**6, partial(_sum, 3), partial(_same_sum, 3)),
    "sort4": Kind(10**4, partial(_sort, 4), partial(_same_sort, 4)),
    "sort5": Kind(10**5, partial(_sort, 5), partial(_same_sort, 5)),
}


def make(kind: str, number: int) -> Problem:
    """A kind's problem of this number; ValueError if there is none."""
    if not 0 <= number < _kind(kind).total:
        raise ValueError(f"number must lie in 0 … {_kind(kind).total - 1}, got {number}")
    prompt, steps, answer = _kind(kind).steps(number)
    ways = [steps[: i + 1] + steps[i:] for i in range(len(steps))]
    ways += [[*steps[:1], remark, *steps[1:]] for remark in REMARKS]
    untidy = ways[_hash(prompt) % len(ways)]
    return Problem(kind, prompt, _solution(steps, answer), answer, _solution(untidy, answer))


def sloppy(problem: Problem) -> str:
    """The solution without the tags of its think block."""
    return problem.solution.replace(THINK, "").replace(THOUGHT, "")


def is_held_out(kind: str, number: int) -> bool:
    """By a hash of what makes problems the same: on every machine the same."""
    return _hash(f"{kind} {_kind(kind).same(number)}") < SHARE * 2**64


def draw(kind: str, seed: int, number: int, count: int) -> list[Problem]:
    """``count`` training problems, the ``number``-th draw of ``seed``, from the arguments alone.
    Each is uniform, so one may come twice."""
    rng = generator(seed, f"draw {kind}", number)
    numbers = (int(rng.integers(_kind(kind).total)) for _ in iter(int, 1))
    return [make(kind, n) for n in islice((n for n in numbers if not is_held_out(kind, n)), count)]


def held_out(kind: str, count: int | None = None) -> list[Problem]:
    """The first ``count`` problems held out, by default all, in a fixed order that mixes them;
    ValueError if there are fewer."""
    found = [make(kind, n) for n in islice(_mixed(kind), count)]
    if count is not None and len(found) < count:
        raise ValueError(f"count must be at most {len(found)} for {kind}, got {count}")
    return found


def _mixed(kind: str) -> Iterator[int]:
    """The numbers of the problems held out; a stride of about 0.618 mixes small and large ones."""
    total = _kind(kind).total
    stride = next(n for n in range(total * 618 // 1000, total) if gcd(n, total) == 1)
    numbers = (step * stride % total for step in range(total))
    return (n for n in numbers if is_held_out(kind, n))


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind}")
    return KINDS[kind]


def _solution(steps: list[str], answer: str) -> str:
    return f"{THINK}{' '.join(steps)}{THOUGHT}{ANSWER}{answer}{ANSWERED}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
