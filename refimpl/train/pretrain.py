"""Pre-training: next tokens of text, with MTP and the balance loss, on DeepSeek-V3's schedules
scaled down (2412.19437, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.config_json import config_dict
from ..config import ModelConfig, preset
from ..errors import CouldNotRun
from ..generate import generate
from ..optimizer import Moments
from .documents import documents, held_out
from .losses import bigram_loss, held_out_loss
from .machine import Machine
from .packing import Windows
from .run import Guard, Metrics
from .schedule import scaled
from .settings import expect_setting
from .stage import BaseSettings, BaseStage, expect_size, texts_digest, told_metrics
from .step import State, train_step
from .vocabulary import BYTES, Vocabulary, make_vocabulary

__all__ = ["Pretrain", "PretrainSettings", "new_config", "windows"]

NOT_CHANGED = ("vocabulary", "yarn", "conventions")  # of a preset, by settings
DRAFTED = 16  # windows in which the MTP modules draft


@dataclass(frozen=True)
class PretrainSettings(BaseSettings):
    """Settings of `refimpl train`."""

    learning_rate: float = 4e-3
    preset: str = "mini"
    model: Mapping[str, Any] = field(default_factory=dict)  # fields that differ from the preset's
    std: float = 0.06  # standard deviation of the initial weights
    text: str = ""  # a file or a folder; empty: the English text that CPython ships
    vocabulary: int = 0  # size of a BPE vocabulary trained on the text; 0: bytes
    masked: bool = False  # keep attention within a document
    tokens: int = 1_024_000  # in all
    length: int = 32  # tokens of a sequence
    batch: int = 64  # sequences per step, once it has grown to its full size
    warmup_steps: int = 20
    bias_speed: float = 1e-3  # γ of the gates' biases
    save_every: int = 200
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "batch", "warmup_steps"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        expect_setting(self.std > 0, "std", "be positive", self.std)
        expect_setting(self.bias_speed >= 0, "bias_speed", "be at least 0", self.bias_speed)
        expect_setting(self.length >= 2, "length", "be at least 2", self.length)
        least = BYTES.size
        expect_setting(
            self.vocabulary == 0 or self.vocabulary >= least,
            "vocabulary",
            f"be at least {least}, or 0 for bytes",
            self.vocabulary,
        )


class Pretrain(BaseStage):
    """The stage of pre-training."""

    name = "train"

    def __init__(self, settings: PretrainSettings, machine: Machine) -> None:
        texts = documents(Path(settings.text) if settings.text else None)
        self.inputs = {"text": texts_digest(texts)}
        train, test = held_out(texts)
        vocabulary = make_vocabulary(train, settings.vocabulary)
        config = new_config(
            settings.preset,
            settings.model,
            vocabulary=vocabulary.size,
            max_positions=settings.length,
        )
        super().__init__(settings, machine, config, vocabulary)
        self.settings = settings
        self.train, self.test = (
            windows(texts, vocabulary, settings.length, masked=settings.masked)
            for texts in (train, test)
        )
        expect_size("batch", settings.batch, settings.length)
        self.bigram = bigram_loss(self.train, self.test, vocabulary.size)
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
        """The loss of held-out text, a bigram model's, and the share of the MTP modules' drafts
        that the main model chooses too, greedily, in the second half of held-out windows."""
        loss = held_out_loss(state.params, self.test, self.config, self.machine)
        told = {"held_out": loss, "bigram": self.bigram}
        if not self.config.mtp_depth:
            return told
        half = self.settings.length // 2
        begun = self.test.take(np.arange(min(DRAFTED, len(self.test)))).tokens[:, :half]
        found = generate(
            state.params,
            self.config,
            begun.tolist(),
            max_tokens=half,
            speculate=self.config.mtp_depth,
            prefill=self.machine.prefill,
            decode=self.machine.decode,
        )
        drafted = sum(x.drafted for x in found)
        return told | {"accepted": sum(x.accepted for x in found) / max(drafted, 1)}

    def progress(self, state: State, evaluated: Metrics) -> float:
        return state.tokens / self.settings.tokens


TYPES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def new_config(name: str, model: Mapping[str, Any], **given: Any) -> ModelConfig:
    """The preset ``name`` without YaRN, with ``given``, and then the fields that ``model`` has;
    CouldNotRun if there is no such model."""
    try:
        base = replace(preset(name), **{"yarn": None} | given)
        names = [x.name for x in fields(base) if x.name not in NOT_CHANGED]
        for key, value in model.items():
            if key not in names:
                raise CouldNotRun(f"model has no setting {key}; there are {', '.join(names)}")
            old = getattr(base, key)
            kinds = (int, float) if type(old) is float else (int if old is None else type(old),)
            expect_setting(type(value) in kinds, f"model.{key}", f"be {TYPES[kinds[-1]]}", value)
        made = replace(base, **model)
    except ValueError as error:
        raise CouldNotRun(f"impossible model: {error}") from error
    least = base.max_positions
    config_dict(made, dtype="float32")  # CouldNotRun if no file could hold it
    context, depth = made.context, made.mtp_depth
    expect_setting(least <= context, "model", f"have a context of at least {least}", context)
    expect_setting(depth < least, "model.mtp_depth", f"be below {least}, the length", depth)
    return made


def windows(
    texts: Sequence[str], vocabulary: Vocabulary, length: int, *, masked: bool = False
) -> Windows:
    """Documents as windows of ``length``; CouldNotRun if they are too short."""
    encoded = [vocabulary.encode(text) for text in texts]
    count = sum(map(len, encoded)) + len(encoded)
    expect_setting(
        length < count, "length", f"be below {count}, the tokens of the text's smaller part", length
    )
    return Windows(encoded, length, end=vocabulary.end, masked=masked)
