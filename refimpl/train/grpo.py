"""Reinforcement with rule-based rewards: GRPO on verifiable problems (DeepSeekMath, 2402.03300;
DeepSeek-R1, 2501.12948, sections 2.2 and 2.3), and R1's last stage, which adds a reward model.

A step draws problems, samples a group of answers to each, and rewards them by rule. It then follows
the gradient of the GRPO loss, in one or several minibatches; ratios are to the policy that sampled.
MTP modules take no part. The gates' biases stay, since moving them would change routes between
sampling and learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..array import Array
from ..errors import CouldNotRun
from ..generate.sampler import to_numpy
from ..grads.grpo import SETTINGS
from ..model import Route
from ..ops import GRPO_PRESETS, group_advantages, grpo_forward
from ..optimizer import Moments
from .draws import generator, seed_of_rows
from .evaluate import MOST
from .machine import Machine
from .policy import grpo_gradients, grpo_normaliser, log_probs, main_model, replay
from .reward_model import RewardModel, open_reward_model
from .rewards import overlong, score
from .rollout import Samples, sample_groups
from .run import Guard, Metrics
from .schedule import decayed
from .settings import expect_setting
from .stage import AnsweringStage, BaseSettings, Begin, expect_kinds, expect_size
from .step import State, add_gradients, apply_gradients, copied, part_size
from .tasks import Problem, draw

__all__ = ["GRPO", "GRPOSettings"]

REFERENCE = "reference/"  # before the names of the reference model's tensors


@dataclass(frozen=True)
class GRPOSettings(BaseSettings):
    """Settings of `refimpl grpo`."""

    checkpoint: str = ""
    kinds: tuple[str, ...] = ("add2",)  # of problems, in turn, one per step
    steps: int = 250
    questions: int = 64  # per step
    group: int = 4  # answers per question
    minibatches: int = 1  # updates per step
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = MOST  # of an answer
    learning_rate: float = 2e-4
    warmup_steps: int = 10
    end: float = 0.1  # the last learning rate, as a share of the highest
    weight_decay: float = 0.0
    accuracy: float = 1.0  # weight of this part of the reward
    format: float = 0.2  # the same
    model: float = 0.0  # weight of the reward model; 0: its reward is only recorded
    reward_model: str = ""  # checkpoint of a reward model
    overlong: str = "kept"  # or penalty (DAPO's), or filter (leave out outputs that were cut off)
    permuted: bool = False  # a control: permute rewards within each group
    variant: str = "deepseekmath"  # a name in `GRPO_PRESETS`
    kl_weight: float = 0.0  # β
    loss: Mapping[str, Any] = field(default_factory=dict)  # more settings of `grpo_forward`
    scale: bool = True  # divide advantages by the group's standard deviation; not in dr_grpo
    replay_routes: bool = False  # learn with the experts chosen while sampling
    reference_every: int = 0  # steps after which the policy replaces the reference; 0: never
    problems: int = 512  # in an evaluation, from the training split

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "questions", "minibatches", "max_tokens", "problems"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        expect_setting(self.problems <= 10**5, "problems", "be at most 100,000", self.problems)
        for name in ("warmup_steps", "reference_every"):
            expect_setting(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        expect_setting(0 <= self.end <= 1, "end", "lie in 0…1", self.end)
        expect_setting(self.group >= 2, "group", "be at least 2", self.group)
        expect_setting(self.temperature > 0, "temperature", "be positive", self.temperature)
        expect_setting(0 < self.top_p <= 1, "top_p", "lie in (0, 1]", self.top_p)
        judged = bool(self.reward_model) or self.model == 0
        expect_setting(judged, "model", "be 0 without a reward_model", self.model)
        names = ", ".join(GRPO_PRESETS)
        expect_setting(self.variant in GRPO_PRESETS, "variant", f"be one of {names}", self.variant)
        kept = ("kept", "penalty", "filter")
        expect_setting(
            self.overlong in kept, "overlong", f"be one of {', '.join(kept)}", self.overlong
        )
        outputs = self.questions * self.group
        expect_setting(
            outputs % self.minibatches == 0,
            "minibatches",
            f"divide questions × group = {outputs}",
            self.minibatches,
        )
        expect_size("questions", self.questions, self.group * self.max_tokens)
        expect_kinds(self.kinds)
        self.try_loss()

    @property
    def loss_settings(self) -> dict[str, Any]:
        """All settings of `grpo_forward`; of a constant length that of the longest output."""
        given = {name: tuple(x) if isinstance(x, list) else x for name, x in self.loss.items()}
        found = GRPO_PRESETS[self.variant] | {"kl_weight": self.kl_weight} | given
        return {"length": self.max_tokens} | found if found.get("average") == "constant" else found

    def try_loss(self) -> None:
        """CouldNotRun if `grpo_forward` does not take these settings, or they are not settings."""
        for name in self.loss:
            if name not in SETTINGS:
                raise CouldNotRun(f"loss has no setting {name}; there are {', '.join(SETTINGS)}")
        one = np.zeros((1, 1))
        arrays: dict[str, Any] = {"old_log_prob": one, "reference_log_prob": one}
        arrays |= {"unclipped": None, "kept": None}
        try:
            grpo_forward(
                one,
                advantages=one[0],
                mask=one == 0,
                normaliser=1.0,
                **arrays,
                **self.loss_settings,
            )
        except (TypeError, ValueError) as error:
            raise CouldNotRun(f"impossible loss: {error}") from error


class Batch(NamedTuple):
    """Outputs with what the loss takes as constants."""

    samples: Samples
    advantages: np.ndarray  # [N]
    old: np.ndarray | None  # [N, T]: log-probabilities of the policy that sampled, if not of this
    reference: np.ndarray  # [N, T]

    def take(self, rows: np.ndarray) -> Batch:
        """Some of the outputs."""
        old = None if self.old is None else self.old[rows]
        return Batch(self.samples.take(rows), self.advantages[rows], old, self.reference[rows])


class GRPO(AnsweringStage):
    """The stage of reinforcement learning."""

    name = "grpo"

    def __init__(self, settings: GRPOSettings, machine: Machine, begin: Begin) -> None:
        super().__init__(settings, machine, begin)
        self.settings = settings
        self.judge: RewardModel | None = None
        if settings.reward_model:
            self.judge = open_reward_model(settings.reward_model, machine, begin.vocabulary)

    def start(self) -> State:
        return State(self.begin.params, Moments(), extra=self.reference_of(self.begin.params))

    def reference_of(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """A copy of the main model, which updates in place do not reach."""
        main, _ = main_model(params, self.config)
        return {f"{REFERENCE}{name}": x.copy() for name, x in main.items()}

    def step(self, state: State, guard: Guard) -> tuple[State, Metrics]:
        settings, step = self.settings, state.step
        kind = settings.kinds[step % len(settings.kinds)]
        problems = draw(kind, settings.seed, step, settings.questions)
        samples = self.sample(state, problems)
        parts = self.rewards(samples, problems)
        advantages = self.advantages(parts["reward"], step)
        batch = Batch(samples, advantages, *self.constants(state, samples))
        order = generator(settings.seed, "minibatches", step).permutation(len(advantages))
        rate = decayed(
            step,
            settings.steps,
            settings.learning_rate,
            warmup=settings.warmup_steps,
            end=settings.end,
        )
        told: list[Metrics] = []
        if settings.minibatches > 1:  # a later one may not be taken: then all stays as it was
            state = copied(state)
        for rows in np.split(order, settings.minibatches):
            found, grads = self.gradients(state, batch.take(np.sort(rows)))
            told.append(found)
            if len(told) == settings.minibatches:
                guard(float(np.mean([x["loss"] for x in told])))
            moments, found["norm"] = apply_gradients(
                state.params,
                grads,
                state.moments,
                self.optimizer,
                rate,
                settings.max_norm,
                loss=found["loss"],
            )
            state = state._replace(moments=moments)
        state = state._replace(
            step=step + 1,
            tokens=state.tokens + int(samples.mask.sum()),
            position=state.position + settings.questions,
        )
        if settings.reference_every and state.step % settings.reference_every == 0:
            state = state._replace(extra=self.reference_of(state.params))
        return state, averaged(told) | {
            **{name: float(np.mean(x)) for name, x in parts.items()},
            "length": float(samples.lengths.mean()),
            "learning_rate": rate,
        }

    def sample(self, state: State, problems: list[Problem]) -> Samples:
        settings = self.settings
        return sample_groups(
            state.params,
            self.config,
            self.vocabulary,
            self.machine,
            [problem.prompt for problem in problems],
            group=settings.group,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            seed=seed_of_rows(settings.seed, "outputs", state.step),
        )

    def rewards(self, samples: Samples, problems: list[Problem]) -> dict[str, np.ndarray]:
        """The rewards' parts [N], and their weighted sum, ``reward``."""
        settings = self.settings
        answers = [problem.answer for problem in problems for _ in range(settings.group)]
        scores = [
            score(text, answer, ended=ended)
            for text, answer, ended in zip(samples.texts, answers, samples.ended, strict=True)
        ]
        parts = {name: np.array([x[name] for x in scores]) for name in ("accuracy", "format")}
        if self.judge is not None:
            parts["model"] = self.judge.rewards(samples.tokens, samples.key_mask)
        total = sum(getattr(settings, name) * x for name, x in parts.items())
        if settings.overlong == "penalty":
            parts["overlong"] = np.array(
                [
                    overlong(int(n), settings.max_tokens, max(settings.max_tokens // 4, 1))
                    for n in samples.lengths
                ]
            )
            total = total + parts["overlong"]
        return parts | {"reward": np.asarray(total)}

    def advantages(self, rewards: np.ndarray, step: int) -> np.ndarray:
        settings = self.settings
        grouped = rewards.reshape(settings.questions, settings.group)
        if settings.permuted:
            grouped = generator(settings.seed, "permuted", step).permuted(grouped, axis=1)
        scale = settings.scale and settings.variant != "dr_grpo"
        return np.asarray(group_advantages(grouped, scale=scale))

    def constants(self, state: State, samples: Samples) -> tuple[np.ndarray | None, np.ndarray]:
        """The log-probabilities [N, T] of the policy that sampled (None if there is one update,
        which computes them itself), and of the reference, which goes its own ways."""
        old = None
        if self.settings.minibatches > 1:
            old = self.log_probs(state.params, samples, replayed=True)
        reference = {name.removeprefix(REFERENCE): x for name, x in state.extra.items()}
        return old, self.log_probs(reference, samples, replayed=False)

    def log_probs(
        self, params: Mapping[str, Array], samples: Samples, *, replayed: bool
    ) -> np.ndarray:
        """[N, T], by the choices of experts while sampling if these are ``replayed``."""
        found = []
        for rows in self.parts(samples.mask):
            some = samples.take(rows)
            log_prob, _ = log_probs(
                params,
                self.config,
                self.machine.place(some.tokens),
                key_mask=self.machine.place(some.key_mask),
                temperature=self.settings.temperature,
                routes=self.routes(some) if replayed else None,
                ops=self.machine.ops,
            )
            found.append(to_numpy(log_prob))
        return np.concatenate(found)

    def parts(self, mask: np.ndarray) -> list[np.ndarray]:
        """The rows of ``mask`` [N, T] by number, as many at a time as a forward reads."""
        count, length = mask.shape
        size = part_size(self.settings.rows, length)
        return [np.arange(count)[start : start + size] for start in range(0, count, size)]

    def routes(self, samples: Samples) -> dict[int, Route] | None:
        """The choices of experts while sampling, if they are to be replayed."""
        if not self.settings.replay_routes:
            return None
        return replay(samples.routes, self.machine.place(samples.key_mask))

    def gradients(self, state: State, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """Of a minibatch the loss, sums over tokens and outputs, how far log-probabilities while
        sampling are from those of training, and every gradient, added up over parts of
        ``rows``."""
        settings, place = self.settings, self.machine.place
        mask = batch.samples.mask
        if settings.overlong == "filter":
            mask = mask & np.array(batch.samples.ended)[:, None]
        normaliser = grpo_normaliser(mask, settings.loss_settings)
        sums = dict[str, Array]()
        names = ("loss", "tokens", "clipped", "kl", "kept", "outputs", "entropy", "sampled", "off")
        told = dict.fromkeys(names, 0.0)
        for rows in self.parts(mask):
            samples, advantages, old, reference = batch.take(rows)
            found, grads = grpo_gradients(
                state.params,
                self.config,
                place(samples.tokens),
                key_mask=place(samples.key_mask),
                mask=place(mask[rows]),
                advantages=place(advantages.astype(self.machine.real)),
                old_log_prob=None if old is None else place(old),
                reference_log_prob=place(reference),
                settings=settings.loss_settings,
                normaliser=normaliser,
                temperature=settings.temperature,
                routes=self.routes(samples),
                ops=self.machine.ops,
            )
            sums = add_gradients(sums, grads)
            tokens, outputs = float(found.tokens), float(len(rows))
            shares = {"loss": 1.0, "clipped": tokens, "kl": tokens, "kept": outputs}
            for name, share in shares.items():
                told[name] += share * float(getattr(found, name))
            told["tokens"] += tokens
            told["outputs"] += outputs
            counted = samples.mask
            old = to_numpy(found.log_prob) if old is None else old
            off = np.abs(samples.log_prob - old)[counted].max()
            told["off"] = max(told["off"], float(off))
            told["entropy"] -= float(old[counted].sum(dtype=np.float64))
            told["sampled"] += float(counted.sum())
        return told, sums

    def progress(self, state: State, evaluated: Metrics) -> float:
        return state.step / self.settings.steps


def averaged(told: list[Metrics]) -> Metrics:
    """Of a step's minibatches: means over these, over their tokens, over their outputs. Entropy and
    the largest difference are of the policy that sampled."""
    total = {name: sum(x[name] for x in told) for name in told[0]}
    tokens = max(total["tokens"], 1.0)
    return {
        "loss": total["loss"] / len(told),
        "norm": total["norm"] / len(told),
        "clipped": total["clipped"] / tokens,
        "kl": total["kl"] / tokens,
        "kept": total["kept"] / total["outputs"],
        "entropy": total["entropy"] / total["sampled"],
        "sampling_difference": max(x["off"] for x in told),
    }
