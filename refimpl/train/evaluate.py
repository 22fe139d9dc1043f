"""The share of verifiable problems that a model answers exactly, by the rules of `rewards`, with
its 95 % interval (Wilson's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

from ..array import Array
from ..config import ModelConfig
from ..generate import generate
from .draws import seed_of_rows
from .machine import Machine
from .policy import main_model
from .rewards import score
from .rollout import expect_room
from .tasks import Problem, draw
from .vocabulary import Vocabulary

__all__ = ["Measured", "answers", "evaluation", "expect_answers", "interval", "measured"]

AT_A_TIME = 1024  # problems in one batch
EVALUATION = 10**6  # the number of the draw that evaluations take, which no step has
SHOWN = 3  # completions
MOST = 48  # tokens of a completion; the longest solution has 42
Z = 1.959964  # of a normal distribution, 95 %


def evaluation(
    params: Mapping[str, Array],
    config: ModelConfig,
    vocabulary: Vocabulary,
    machine: Machine,
    *,
    kinds: Sequence[str],
    seed: int,
    problems: int,
    max_tokens: int,
) -> dict[str, Any]:
    """A stage's own: accuracy and format on problems of the training split, greedy and sampled, and
    the first completions."""
    told: dict[str, Any] = {}
    for kind in kinds:
        suffix = "" if kind == kinds[0] else f"_{kind}"
        drawn = draw(kind, seed, EVALUATION, problems)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            found = measured(
                params,
                config,
                vocabulary,
                machine,
                drawn,
                temperature=temperature,
                max_tokens=max_tokens,
                seed=seed,
            )
            told |= {f"{name}{suffix}": found.accuracy, f"format_{name}{suffix}": found.format}
            told[f"samples_{name}{suffix}"] = found.samples
    return told


def expect_answers(
    config: ModelConfig,
    vocabulary: Vocabulary,
    *,
    kinds: Sequence[str],
    seed: int,
    problems: int,
    max_tokens: int,
) -> None:
    """CouldNotRun unless the context has room for the answers of an `evaluation`."""
    for kind in kinds:
        drawn = draw(kind, seed, EVALUATION, problems)
        expect_room(config, [vocabulary.encode(problem.prompt) for problem in drawn], max_tokens)


class Measured(NamedTuple):
    """What held-out problems say of a model."""

    problems: int
    accuracy: float
    low: float  # the 95 % interval
    high: float
    format: float
    tokens: float  # the mean length of a completion, with its end
    samples: list[tuple[str, str]]  # the first prompts and completions


def measured(
    params: Mapping[str, Array],
    config: ModelConfig,
    vocabulary: Vocabulary,
    machine: Machine,
    problems: Sequence[Problem],
    *,
    temperature: float = 0.0,
    max_tokens: int = MOST,
    seed: int = 0,
) -> Measured:
    """The shares of right answers and of right format over ``problems``, one completion each."""
    found = answers(
        params,
        config,
        vocabulary,
        machine,
        [problem.prompt for problem in problems],
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed_of_rows(seed, "evaluation"),
    )
    scores = [
        score(text, problem.answer, ended=ended)
        for (text, ended, _), problem in zip(found, problems, strict=True)
    ]
    count = len(problems)
    right = sum(x["accuracy"] for x in scores)
    low, high = interval(right, count)
    return Measured(
        count,
        right / count,
        low,
        high,
        sum(x["format"] for x in scores) / count,
        sum(tokens for *_, tokens in found) / count,
        [(x.prompt, text) for x, (text, *_) in zip(problems[:SHOWN], found, strict=False)],
    )


def answers(
    params: Mapping[str, Array],
    config: ModelConfig,
    vocabulary: Vocabulary,
    machine: Machine,
    prompts: Sequence[str],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[tuple[str, bool, int]]:
    """A completion per prompt: its text, whether it ended by itself, and how many tokens it has,
    with its end. CouldNotRun if the context has no room."""
    params, config = main_model(params, config)
    found = []
    for start in range(0, len(prompts), AT_A_TIME):
        some = [vocabulary.encode(prompt) for prompt in prompts[start : start + AT_A_TIME]]
        expect_room(config, some, max_tokens)
        found += generate(
            params,
            config,
            some,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + start,
            stop=[vocabulary.end],
            prefill=machine.prefill,
            decode=machine.decode,
        )
    return [(vocabulary.decode(x.tokens), x.finish == "stop", len(x.tokens)) for x in found]


def interval(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share ``right`` / ``count``."""
    if not count:
        return 0.0, 1.0
    p, n = right / count, float(count)
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)
