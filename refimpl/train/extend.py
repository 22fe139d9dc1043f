"""Context extension by YaRN, in phases of growing length (DeepSeek-V3, 2412.19437, section 4.3:
4K to 32K, then to 128K). A phase is a run of its own; the model that it writes has the longer
context and YaRN's settings in its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import Yarn
from ..optimizer import Moments
from .documents import documents, held_out
from .losses import position_losses, spread
from .machine import Machine
from .pretrain import windows
from .run import Guard, Metrics
from .settings import expect_setting
from .stage import BaseSettings, BaseStage, Begin, expect_size, texts_digest, told_metrics
from .step import State, train_step

__all__ = ["Extend", "ExtendSettings"]


@dataclass(frozen=True)
class ExtendSettings(BaseSettings):
    """Settings of `refimpl extend`."""

    checkpoint: str = ""
    text: str = ""  # as in pre-training
    factors: tuple[int, ...] = (4, 16)  # new length over the original one, of each phase
    batches: tuple[int, ...] = (16, 4)  # sequences per step, of each phase
    steps: int = 60  # per phase
    learning_rate: float = 1e-3
    bias_speed: float = 1e-3  # γ of the gates' biases
    mtp_weight: float = 0.1  # λ
    beta_fast: float = 4.0  # YaRN's: at lengths below 100, 32 turns would keep no pair
    beta_slow: float = 1.0
    measured: int = 256  # held-out rows in an evaluation, of the last phase's length
    evaluate_every: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "measured"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("bias_speed", "mtp_weight"):
            expect_setting(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        rising = (
            list(self.factors) == sorted(set(self.factors)) and min(self.factors, default=0) > 1
        )
        expect_setting(rising, "factors", "be integers above 1 that rise", self.factors)
        expect_setting(
            len(self.batches) == len(self.factors) and min(self.batches) >= 1,
            "batches",
            "have an integer of at least 1 per factor",
            self.batches,
        )


class Extend(BaseStage):
    """One phase."""

    name = "extend"

    def __init__(
        self, settings: ExtendSettings, machine: Machine, begin: Begin, phase: int
    ) -> None:
        config, factor = begin.config, settings.factors[phase]
        before = config.yarn or Yarn(original=config.max_positions)
        original = before.original
        expect_setting(
            factor * original > config.max_positions,
            "factors",
            f"be above {config.max_positions / original:g}, by which the context is longer already",
            factor,
        )
        yarn = before._replace(
            factor=float(factor), beta_fast=settings.beta_fast, beta_slow=settings.beta_slow
        )
        config = replace(
            config, max_positions=factor * original, yarn=yarn, mtp_weight=settings.mtp_weight
        )
        super().__init__(settings, machine, config, begin.vocabulary)
        self.settings, self.begin = settings, begin
        self.size = settings.batches[phase]
        for size, each in zip(settings.batches, settings.factors, strict=True):
            expect_size("batches", size, each * original)
        texts = documents(Path(settings.text) if settings.text else None)
        self.inputs = {"text": texts_digest(texts)}
        train, test = held_out(texts)
        longest = max(settings.factors) * original
        self.train = windows(train, begin.vocabulary, config.max_positions)
        of_test = windows(test, begin.vocabulary, longest)
        self.test = spread(of_test.stream, longest, settings.measured)

    def start(self) -> State:
        return State(self.begin.params, Moments())

    def step(self, state: State, guard: Guard) -> tuple[State, Metrics]:
        examples = self.train.batch(state.position, self.size, self.settings.seed)
        state, told = train_step(
            state,
            examples.arrays(),
            self.config,
            self.machine,
            self.optimizer,
            learning_rate=self.settings.learning_rate,
            max_norm=self.settings.max_norm,
            gamma=self.settings.bias_speed,
            rows=self.settings.rows or None,
            expect=guard,
        )
        return state, told_metrics(told, self.settings.learning_rate, self.config)

    def evaluate(self, state: State) -> Metrics:
        """The loss by position up to the last phase's length, with this phase's YaRN and of the
        same weights without it; at step 0 of the first phase, the latter is the model before."""
        told: Metrics = {}
        for name, config in (("", self.config), ("_plain", replace(self.config, yarn=None))):
            losses = position_losses(state.params, self.test, config, self.machine)
            inside, beyond = self.inside_and_beyond(losses)
            told |= {f"inside{name}": inside, f"ratio{name}": beyond / inside}
            told |= {f"by_position{name}": losses.tolist()}
        return told

    def inside_and_beyond(self, losses: np.ndarray) -> tuple[float, float]:
        """The mean loss at the second half of the original positions, where a token has at least
        half of the original context before it, and at the positions beyond, up to this phase's
        length."""
        assert self.config.yarn is not None
        original, end = self.config.yarn.original, self.config.max_positions
        return float(losses[original // 2 : original].mean()), float(losses[original:end].mean())

    def progress(self, state: State, evaluated: Metrics) -> float:
        return state.step / self.settings.steps
