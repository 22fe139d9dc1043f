"""Pre-training: next tokens of text, with MTP and the balance loss, on DeepSeek-V3's schedules
scaled down (2412.19437, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..generate import generate
from ..optimizer import Moments
from .documents import documents, held_out
from .losses import held_out_loss
from .machine import Machine
from .packing import Windows
from .run import Guard, Metrics
from .schedule import scaled
from .settings import expect_setting
from .stage import BaseSettings, BaseStage, model_config, texts_digest, told_metrics
from .step import State, train_step
from .vocabulary import make_vocabulary

__all__ = ["Pretrain", "PretrainSettings"]

DRAFTED = 16  # windows in which the MTP modules draft


@dataclass(frozen=True)
class PretrainSettings(BaseSettings):
    learning_rate: float = 4e-3
    preset: str = "mini"
    model: Mapping[str, Any] = field(default_factory=dict)  # fields that differ from the preset's
    std: float = 0.06  # of the initial weights
    text: str = ""  # a file or a folder; empty: the English text that CPython ships
    vocabulary: int = 0  # tokens of a BPE trained on the text; 0: bytes
    masked: bool = False  # attention stays within a document
    tokens: int = 1_024_000  # in all
    length: int = 32
    batch: int = 64  # sequences, after the ramp
    warmup_steps: int = 20
    bias_speed: float = 1e-3  # γ of the gates' biases
    save_every: int = 200
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "length", "batch", "warmup_steps"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))

    def config(self, vocabulary: int) -> ModelConfig:
        """The model at its pre-training length, without YaRN."""
        return model_config(
            self.preset, self.model, vocabulary=vocabulary, max_positions=self.length, yarn=None
        )


class Pretrain(BaseStage):
    name = "train"

    def __init__(self, settings: PretrainSettings, machine: Machine) -> None:
        texts = documents(Path(settings.text) if settings.text else None)
        self.inputs = {"text": texts_digest(texts)}
        train, test = held_out(texts)
        vocabulary = make_vocabulary(train, settings.vocabulary)
        super().__init__(settings, machine, settings.config(vocabulary.size), vocabulary)
        self.settings = settings
        self.train, self.test = (
            Windows(
                [vocabulary.encode(text) for text in texts],
                settings.length,
                masked=settings.masked,
                end=vocabulary.end,
            )
            for texts in (train, test)
        )
        self.schedule = scaled(
            settings.tokens,
            peak=settings.learning_rate,
            batch=settings.batch,
            warmup_steps=settings.warmup_steps,
            bias_speed=settings.bias_speed,
        )

    def start(self) -> State:
        return State(
            self.machine.parameters(self.config, seed=self.settings.seed, std=self.settings.std),
            Moments(),
        )

    def step(self, state: State, guard: Guard) -> tuple[State, Metrics]:
        size = self.schedule.batch(state.tokens)
        rate = self.schedule.learning_rate(state.step, state.tokens)
        examples = self.train.batch(state.position, size, self.settings.seed)
        state, told = train_step(
            state,
            examples.arrays(),
            replace(self.config, mtp_weight=self.schedule.mtp_weight(state.tokens)),
            self.machine,
            self.optimizer,
            learning_rate=rate,
            max_norm=self.settings.max_norm,
            gamma=self.schedule.bias_update_speed(state.tokens),
            rows=self.settings.rows or None,
            expect=guard,
        )
        return state, told_metrics(told, rate, self.config)

    def evaluate(self, state: State) -> Metrics:
        """The loss of held-out text, and the share of the MTP modules' drafts that the main model
        chooses too, greedily, in the second half of held-out windows."""
        loss = held_out_loss(state.params, self.test, self.config, self.machine)
        if not self.config.mtp_depth:
            return {"held_out": loss}
        half = self.settings.length // 2
        windows = self.test.take(np.arange(min(DRAFTED, len(self.test)))).tokens
        found = generate(
            state.params,
            self.config,
            windows[:, : max(half, 1)].tolist(),
            max_tokens=max(half, 1),
            speculate=self.config.mtp_depth,
            prefill=self.machine.prefill,
            decode=self.machine.decode,
        )
        drafted = sum(x.drafted for x in found)
        return {"held_out": loss, "accepted": sum(x.accepted for x in found) / max(drafted, 1)}

    def progress(self, state: State, evaluated: Metrics) -> float:
        return state.tokens / self.settings.tokens
