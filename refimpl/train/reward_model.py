"""A reward model: a head of one number on a fine-tuned model's last hidden state, trained by
`preference_loss` on pairs that a rule orders (pairs: DeepSeek-R1, 2501.12948, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..array import Array
from ..checkpoint.tensor_file import read_tensor_file, write_tensor_file
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..generate.sampler import to_numpy
from ..optimizer import Moments
from .draws import generator
from .evaluate import EVALUATION, MOST
from .machine import Machine
from .policy import main_model, preference_gradients, rewards
from .rewards import tidiness
from .run import Guard, Metrics
from .save import load_parameters
from .schedule import decayed
from .settings import expect_setting
from .sft import tokens_of
from .stage import BaseSettings, BaseStage, Begin, checkpoint_of, expect_kinds, expect_size
from .step import State, add_gradients, apply_gradients, part_size
from .tasks import Problem, draw, held_out
from .vocabulary import Vocabulary, open_vocabulary

__all__ = ["RewardModel", "RewardModelSettings", "RewardModelStage", "open_reward_model"]

HEAD = "reward_head.weight"
FILE = "reward_head.safetensors"
AT_A_TIME = 256  # rows of a forward that only rewards


@dataclass(frozen=True)
class RewardModelSettings(BaseSettings):
    """Settings of `refimpl reward-model`."""

    checkpoint: str = ""  # of the fine-tuned model
    kinds: tuple[str, ...] = ("add2",)
    steps: int = 60
    batch: int = 32  # pairs per step
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    weight_decay: float = 0.0
    problems: int = 512  # held-out pairs of each kind in an evaluation
    evaluate_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "warmup_steps", "problems"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        expect_setting(self.problems <= 10**5, "problems", "be at most 100,000", self.problems)
        expect_size("batch", self.batch, 2 * MOST)
        expect_kinds(self.kinds)


class Pairs(NamedTuple):
    """Rows [N, T] of tokens, padded on the right, and where they are no padding."""

    chosen: Array
    rejected: Array
    chosen_key_mask: Array
    rejected_key_mask: Array

    def take(self, start: int, stop: int) -> Pairs:
        return Pairs(*(x[start:stop] for x in self))


class RewardModelStage(BaseStage):
    """The pairs: of two right answers to a problem, the tidier one is chosen."""

    name = "reward-model"

    def __init__(self, settings: RewardModelSettings, machine: Machine, begin: Begin) -> None:
        params, config = main_model(begin.params, begin.config)
        super().__init__(settings, machine, config, begin.vocabulary)
        self.settings, self.params = settings, dict(params)
        try:
            drawn = [held_out(kind, settings.problems) for kind in settings.kinds]
        except ValueError as error:
            raise CouldNotRun(f"problems: {error}") from error
        self.held_out = [self.pairs(problems) for problems in drawn]

    def start(self) -> State:
        random = generator(self.settings.seed, "reward head").normal(size=(1, self.config.width))
        head = self.machine.place((random / self.config.width**0.5).astype(self.machine.real))
        return State(self.params, Moments(), extra={HEAD: head})

    def step(self, state: State, guard: Guard) -> tuple[State, Metrics]:
        settings = self.settings
        kind = settings.kinds[state.step % len(settings.kinds)]
        pairs = self.pairs(draw(kind, settings.seed, state.step, settings.batch))
        rate = decayed(
            state.step, settings.steps, settings.learning_rate, warmup=settings.warmup_steps
        )
        told, grads = self.gradients(state, pairs)
        guard(told["loss"])
        moments, norm = apply_gradients(
            {**state.params, **state.extra},
            grads,
            state.moments,
            self.optimizer,
            rate,
            settings.max_norm,
            loss=told["loss"],
        )
        state = state._replace(
            moments=moments,
            step=state.step + 1,
            tokens=state.tokens + int(pairs.chosen_key_mask.sum() + pairs.rejected_key_mask.sum()),
            position=state.position + settings.batch,
        )
        return state, told | {"norm": norm, "learning_rate": rate}

    def gradients(self, state: State, pairs: Pairs) -> tuple[Metrics, dict[str, Array]]:
        """The loss, the share of pairs that are ordered as the rule does, and every gradient,
        summed over parts of ``rows``, two to a pair."""
        count, length = pairs.chosen.shape
        size = max(part_size(self.settings.rows, length) // 2, 1)
        told, sums = {"loss": 0.0, "ordered": 0.0}, dict[str, Array]()
        for start in range(0, count, size):
            part = pairs.take(start, start + size)
            found, grads, dw = preference_gradients(
                state.params,
                self.config,
                part.chosen,
                part.rejected,
                state.extra[HEAD],
                chosen_key_mask=part.chosen_key_mask,
                rejected_key_mask=part.rejected_key_mask,
                normaliser=count,
                ops=self.machine.ops,
            )
            sums = add_gradients(sums, grads | {HEAD: dw})
            told["loss"] += float(found.loss)
            told["ordered"] += float(found.accuracy) * len(part.chosen) / count
        return told, sums

    def pairs(self, problems: list[Problem]) -> Pairs:
        """Two solutions of each problem behind its prompt, the tidier one chosen; tokens as GRPO
        samples them."""
        ordered = [
            (x.prompt, sorted((x.solution, x.untidy), key=tidiness, reverse=True)) for x in problems
        ]
        rows = [
            tokens_of(self.vocabulary, prompt, solutions[place])[0]
            for place in range(2)
            for prompt, solutions in ordered
        ]
        tokens, key_mask = map(self.machine.place, padded(rows, self.vocabulary.end))
        n = len(problems)
        return Pairs(tokens[:n], tokens[n:], key_mask[:n], key_mask[n:])

    def evaluate(self, state: State) -> Metrics:
        """The share of held-out pairs that it orders as the rule does, and the mean and spread of
        its rewards."""
        chosen, rejected = self.judged(state, self.held_out)
        return {"ordered": float(np.mean(chosen > rejected)), **spread(chosen, rejected)}

    def judged(self, state: State, every: Iterable[Pairs]) -> tuple[np.ndarray, np.ndarray]:
        """The raw rewards of all chosen and all rejected answers."""
        judge = RewardModel(state.params, self.config, state.extra[HEAD], self.machine)
        found = [
            (
                judge.raw(pairs.chosen, pairs.chosen_key_mask),
                judge.raw(pairs.rejected, pairs.rejected_key_mask),
            )
            for pairs in every
        ]
        chosen, rejected = map(np.concatenate, zip(*found, strict=True))
        return chosen, rejected

    def progress(self, state: State, evaluated: Metrics) -> float:
        return state.step / self.settings.steps

    def add_to_checkpoint(self, state: State, folder: Path) -> None:
        """With the unit of its rewards. That is of problems for training: it goes into the rewards
        of a later stage, which must know nothing of those held out."""
        super().add_to_checkpoint(state, folder)
        settings = self.settings
        drawn = (
            draw(kind, settings.seed, EVALUATION, settings.problems) for kind in settings.kinds
        )
        unit = spread(*self.judged(state, map(self.pairs, drawn)))
        numbers = {name: np.array([x]) for name, x in unit.items()}
        write_tensor_file(folder / FILE, self.machine.fetched(state.extra) | numbers)


class RewardModel(NamedTuple):
    """Rewards in units of their spread over pairs for training, around their mean."""

    params: Mapping[str, Array]
    config: ModelConfig
    head: Array  # [1, D]
    machine: Machine
    mean: float = 0.0
    spread: float = 1.0

    def rewards(self, tokens: np.ndarray, key_mask: np.ndarray) -> np.ndarray:
        """One [N] per row of ``tokens`` [N, T]."""
        place = self.machine.place
        return (self.raw(place(tokens), place(key_mask)) - self.mean) / self.spread

    def raw(self, tokens: Array, key_mask: Array) -> np.ndarray:
        """h wᵀ [N] as the head gives it."""
        found = []
        for start in range(0, len(tokens), AT_A_TIME):
            rows = slice(start, start + AT_A_TIME)
            some = rewards(
                self.params,
                self.config,
                tokens[rows],
                self.head,
                key_mask=key_mask[rows],
                ops=self.machine.ops,
            )
            found.append(to_numpy(some))
        return np.concatenate(found).astype(np.float64)


def open_reward_model(checkpoint: str, machine: Machine, vocabulary: Vocabulary) -> RewardModel:
    """The result of the stage; CouldNotRun if the checkpoint has no reward head, or reads other
    tokens than those of ``vocabulary``."""
    folder = checkpoint_of(Path(checkpoint))
    if not (folder / FILE).exists():
        raise CouldNotRun(
            f"{folder} is not a reward model: it has no {FILE}", argument="reward_model"
        )
    own = open_vocabulary(folder).files
    if own["tokenizer.json"] != vocabulary.files["tokenizer.json"]:
        raise CouldNotRun(f"{folder} has another tokenizer than the policy")
    params, config = load_parameters(folder, machine)
    tensors, _ = read_tensor_file(folder / FILE)
    numbers = [float(tensors[name][0]) for name in ("mean", "spread")]
    head = machine.place(np.array(tensors[HEAD]).astype(machine.real))
    return RewardModel(params, config, head, machine, *numbers)


def spread(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the rewards of both."""
    both = np.concatenate([chosen, rejected])
    return {"mean": float(both.mean()), "spread": float(both.std())}


def padded(rows: list[list[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens [N, T], padded on the right, and where they are no padding."""
    lengths = np.array([len(row) for row in rows])
    place = np.arange(int(lengths.max()))
    tokens = np.array([row + [fill] * (len(place) - len(row)) for row in rows])
    return tokens, place < lengths[:, None]
