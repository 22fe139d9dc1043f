"""Supervised fine-tuning on solutions of verifiable problems.

Problems are packed into rows with the document mask; only the tokens of completions are targets.
If the solutions are another model's outputs, read from a file, this is the distillation of R1
(DeepSeek-R1, 2501.12948, section 2.4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CouldNotRun
from ..files import read_text, write_text
from ..optimizer import Moments
from .draws import generator
from .evaluate import MOST
from .machine import Machine
from .packing import Examples, chosen, pack
from .pretrain import new_config
from .rewards import ANSWER, ANSWERED, THINK, THOUGHT
from .run import Guard, Metrics
from .schedule import decayed
from .settings import expect_setting
from .stage import (
    AnsweringStage,
    BaseSettings,
    Begin,
    begin_from,
    expect_kinds,
    expect_size,
    told_metrics,
)
from .step import State, train_step
from .tasks import Problem, draw, sloppy
from .vocabulary import Vocabulary, make_vocabulary

__all__ = [
    "SFT",
    "SFTSettings",
    "begin_sft",
    "completion",
    "in_turn",
    "read_solutions",
    "tokens_of",
    "write_solutions",
]

OWN = ("worked", "answers")  # solutions that come from no file


@dataclass(frozen=True)
class SFTSettings(BaseSettings):
    """Settings of `refimpl sft`."""

    checkpoint: str = ""  # empty: a new model
    preset: str = "mini"  # preset, model and std: of a new model, as in pre-training
    model: Mapping[str, Any] = field(default_factory=dict)
    std: float = 0.06
    kinds: tuple[str, ...] = ("add2",)  # of problems, in turn within a batch
    solutions: str = "worked"  # or answers (the thought is empty), or a JSONL file
    distinct: int = 0  # draws with a solution, a few of them twice; 0: new ones at each step
    untidy: float = 0.0  # share of solutions with a needless step or word
    sloppy: float = 0.0  # share of solutions without the tags of the thought
    steps: int = 600
    batch: int = 64  # problems per step
    length: int = 64  # tokens of a packed row
    learning_rate: float = 6e-3
    warmup_steps: int = 10
    end: float = 0.1  # the last learning rate, as a share of the highest
    bias_speed: float = 1e-3  # γ of the gates' biases
    mtp_weight: float = 0.1  # λ
    stop: tuple[float, ...] = ()  # end once an evaluation's sampled accuracy is between these
    problems: int = 512  # in an evaluation, from the training split
    max_tokens: int = MOST  # of an answer in an evaluation
    evaluate_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "length", "warmup_steps", "problems", "max_tokens"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        expect_setting(self.problems <= 10**5, "problems", "be at most 100,000", self.problems)
        for name in ("untidy", "sloppy", "end"):
            expect_setting(0 <= getattr(self, name) <= 1, name, "lie in 0…1", getattr(self, name))
        expect_setting(self.std > 0, "std", "be positive", self.std)
        both = self.untidy + self.sloppy
        expect_setting(both <= 1, "untidy", "be at most 1 with sloppy together", both)
        expect_setting(self.distinct >= 0, "distinct", "be at least 0", self.distinct)
        expect_setting(
            self.stop == () or (len(self.stop) == 2 and self.stop[0] <= self.stop[1]),
            "stop",
            "be two accuracies that rise, or none",
            self.stop,
        )
        expect_size("batch", self.batch, self.length)
        expect_kinds(self.kinds)
        for name in ("bias_speed", "mtp_weight"):
            expect_setting(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))


def begin_sft(settings: SFTSettings, machine: Machine) -> Begin:
    """The checkpoint that it begins with, or a new model."""
    if settings.checkpoint:
        begin = begin_from(settings.checkpoint, machine)
        return replace(begin, config=replace(begin.config, mtp_weight=settings.mtp_weight))
    vocabulary = make_vocabulary()
    config = new_config(
        settings.preset,
        settings.model,
        vocabulary=vocabulary.size,
        mtp_weight=settings.mtp_weight,
        max_positions=settings.length,
    )
    params = machine.parameters(config, seed=settings.seed, std=settings.std)
    return Begin(params, config, vocabulary)


class SFT(AnsweringStage):
    """The stage of fine-tuning."""

    name = "sft"

    def __init__(self, settings: SFTSettings, machine: Machine, begin: Begin) -> None:
        super().__init__(settings, machine, begin)
        context = begin.config.context
        expect_setting(
            settings.length <= context,
            "length",
            f"be at most {context}, the context of the model (refimpl extend makes it longer)",
            settings.length,
        )
        self.settings = settings
        self.given: list[tuple[str, str]] | None = None  # prompts and completions; None: new ones
        if settings.solutions not in OWN:
            self.give(read_solutions(Path(settings.solutions)))
        elif settings.distinct:
            self.give(self.solved(0, settings.distinct))

    def give(self, pairs: list[tuple[str, str]]) -> None:
        """Learn these prompts and completions; CouldNotRun if one is too long."""
        self.tokens(pairs)
        self.given = pairs

    def start(self) -> State:
        return State(self.begin.params, Moments())

    def step(self, state: State, guard: Guard) -> tuple[State, Metrics]:
        settings = self.settings
        rate = decayed(
            state.step,
            settings.steps,
            settings.learning_rate,
            warmup=settings.warmup_steps,
            end=settings.end,
        )
        position = state.position + settings.batch
        state, told = train_step(
            state,
            self.examples(state).arrays(),
            self.config,
            self.machine,
            self.optimizer,
            learning_rate=rate,
            max_norm=settings.max_norm,
            gamma=settings.bias_speed,
            rows=settings.rows or None,
            expect=guard,
        )
        return state._replace(position=position), told_metrics(told, rate, self.config)

    def examples(self, state: State) -> Examples:
        """The step's prompts and completions, packed."""
        settings = self.settings
        if self.given is None:
            pairs = self.solved(state.step, settings.batch)
        else:
            places = chosen(state.position, settings.batch, len(self.given), settings.seed)
            pairs = [self.given[place] for place in places]
        return pack(self.tokens(pairs), settings.length)

    def tokens(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[bool]]]:
        """`tokens_of` each; CouldNotRun if one is longer than a row."""
        rows = [tokens_of(self.vocabulary, *pair) for pair in pairs]
        longest = max(len(tokens) for tokens, _ in rows)
        expect_setting(
            longest <= self.settings.length,
            "length",
            f"be at least {longest}, the tokens of a prompt with its solution",
            self.settings.length,
        )
        return rows

    def solved(self, number: int, count: int) -> list[tuple[str, str]]:
        """The number-th draw of problems: prompts and completions."""
        settings = self.settings
        problems = in_turn(settings.kinds, settings.seed, number, count)
        random = generator(settings.seed, "solutions", number).random(count)
        return [
            (problem.prompt, completion(problem, settings, float(u)))
            for problem, u in zip(problems, random, strict=True)
        ]

    def progress(self, state: State, evaluated: Metrics) -> float:
        if self.settings.stop and evaluated.get("step") == state.step:
            low, high = self.settings.stop
            if low <= evaluated["sampled"] <= high:
                return 1.0
        return state.step / self.settings.steps


def in_turn(kinds: Sequence[str], seed: int, number: int, count: int) -> list[Problem]:
    """``count`` training problems, the ``number``-th draw, of all kinds in turn."""
    drawn = [draw(kind, seed, number, -(-count // len(kinds))) for kind in kinds]
    return [problem for together in zip(*drawn, strict=True) for problem in together][:count]


def completion(problem: Problem, settings: SFTSettings, u: float) -> str:
    """A solution, of the kind that a number ``u`` in [0, 1) chooses by the settings' shares."""
    if settings.solutions == "answers":
        return f"{THINK}{THOUGHT}{ANSWER}{problem.answer}{ANSWERED}"
    if u < settings.sloppy:
        return sloppy(problem)
    return problem.untidy if u < settings.sloppy + settings.untidy else problem.solution


def tokens_of(vocabulary: Vocabulary, prompt: str, text: str) -> tuple[list[int], list[bool]]:
    """The tokens of a prompt, its completion and the end, and which are the completion's."""
    before, after = vocabulary.encode(prompt), [*vocabulary.encode_rest(text), vocabulary.end]
    return before + after, [False] * len(before) + [True] * len(after)


def write_solutions(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Prompts and completions as JSONL."""
    lines = (json.dumps({"prompt": prompt, "completion": text}) for prompt, text in pairs)
    write_text(path, "\n".join(lines) + "\n")


def read_solutions(path: Path) -> list[tuple[str, str]]:
    """Prompts and completions of a JSONL file."""
    pairs = []
    for number, line in enumerate(read_text(path, str(path)).splitlines(), 1):
        try:
            found = json.loads(line)
            pairs.append((str(found["prompt"]), str(found["completion"])))
        except (ValueError, TypeError, KeyError) as error:
            raise CouldNotRun(
                f"{path}, line {number}: must be a JSON object with prompt and completion"
            ) from error
    if not pairs:
        raise CouldNotRun(f"{path} must hold at least one line")
    return pairs
