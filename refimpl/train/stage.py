"""What all stages have in common: their settings, the optimizer, the vocabulary of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CouldNotRun
from ..files import file_digest, read_text, write_text
from ..optimizer import AdamW
from .evaluate import evaluation, expect_answers
from .machine import Machine, open_machine
from .run import Metrics
from .save import SETTINGS, RunFolder, is_finished, is_run, load_parameters, model_digest
from .settings import check_types, expect_setting, to_toml
from .shared import SharedFolder
from .step import State, Told, max_violation
from .tasks import KINDS
from .vocabulary import Vocabulary, open_vocabulary

__all__ = [
    "AnsweringStage",
    "BaseSettings",
    "BaseStage",
    "Begin",
    "begin_from",
    "checkpoint_of",
    "digest_line",
    "digest_of",
    "expect_kinds",
    "expect_size",
    "open_run",
    "recorded",
    "texts_digest",
    "told_metrics",
]

MOST_TOKENS = 2**20  # of a step


@dataclass(frozen=True)
class BaseSettings:
    """Settings of every stage that trains."""

    seed: int = 0
    backend: str = "numpy"  # or cupy
    implementation: str = "fastest"  # of the ops; fastest: numba_cpu if installed, on a GPU cuda
    dtype: str = "float32"  # or float64, or of the implementation cuda bfloat16
    fp8: str = ""  # choices of the implementation fp8, as in scale=ue8m0,bits=14
    learning_rate: float = 1e-3  # the highest
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_norm: float = 1.0  # of the gradients; a larger one is scaled down
    rows: int = 0  # rows per forward; 0: as many as have 32,768 tokens
    save_every: int = 100  # steps
    evaluate_every: int = 50  # steps
    jump: float = 3.0  # a loss this far above the median of the last ones stops the run

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("save_every", "evaluate_every"):
            expect_setting(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("seed", "rows", "learning_rate", "weight_decay"):
            expect_setting(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        for name in ("max_norm", "jump"):
            expect_setting(getattr(self, name) > 0, name, "be positive", getattr(self, name))
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            expect_setting(0 <= value < 1, name, "be at least 0 and below 1", value)

    def machine(self) -> Machine:
        return open_machine(self.backend, self.implementation, self.dtype, self.fp8)

    def optimizer(self, machine: Machine) -> AdamW:
        return machine.optimizer(beta1=self.beta1, beta2=self.beta2, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Begin:
    """The checkpoint that a stage begins with."""

    params: dict[str, Any]
    config: ModelConfig
    vocabulary: Vocabulary


class BaseStage:
    """A stage whose state is a model; subclasses have ``start``, ``step``, ``evaluate``,
    ``progress``."""

    name = ""

    def __init__(
        self, settings: BaseSettings, machine: Machine, config: ModelConfig, vocabulary: Vocabulary
    ) -> None:
        self.machine = machine
        self.config = config
        self.vocabulary = vocabulary
        self.save_every = settings.save_every
        self.evaluate_every = settings.evaluate_every
        self.jump = settings.jump
        self.optimizer = settings.optimizer(machine)

    def add_to_checkpoint(self, state: State, folder: Path) -> None:
        for name, text in self.vocabulary.files.items():
            write_text(folder / name, text)


class AnsweringStage(BaseStage):
    """A stage that is evaluated on problems of the training split; ``kinds``, ``seed``,
    ``problems`` and ``max_tokens`` of an answer are settings of these names."""

    def __init__(self, settings: Any, machine: Machine, begin: Begin) -> None:
        super().__init__(settings, machine, begin.config, begin.vocabulary)
        self.begin = begin
        self.asked: dict[str, Any] = {
            name: getattr(settings, name) for name in ("kinds", "seed", "problems", "max_tokens")
        }
        expect_answers(self.config, self.vocabulary, **self.asked)

    def evaluate(self, state: State) -> Metrics:
        """Accuracy and format."""
        return evaluation(state.params, self.config, self.vocabulary, self.machine, **self.asked)


def begin_from(checkpoint: str, machine: Machine, *, mtp: bool = True) -> Begin:
    """Open the checkpoint of an earlier stage: a folder, or the folder of a finished run."""
    expect_setting(bool(checkpoint), "checkpoint", "name the checkpoint to begin with", checkpoint)
    folder = checkpoint_of(Path(checkpoint))
    params, config = load_parameters(folder, machine, mtp=mtp)
    return Begin(params, config, open_vocabulary(folder))


def expect_kinds(kinds: tuple[str, ...]) -> None:
    """CouldNotRun unless these are kinds of problems, at least one."""
    wrong = [kind for kind in kinds if kind not in KINDS]
    expect_setting(bool(kinds) and not wrong, "kinds", f"be among {', '.join(KINDS)}", kinds)


def expect_size(name: str, count: int, length: int) -> None:
    """CouldNotRun unless a step of ``count`` times ``length`` tokens is of a size that memory can
    hold."""
    most = MOST_TOKENS // length
    wanted = f"be at most {most:,}, so that a step has at most {MOST_TOKENS:,} tokens"
    expect_setting(count <= most, name, wanted, count)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, that of a finished run, or that of a saved state;
    CouldNotRun if the run is not finished."""
    if is_run(path) and not is_finished(path):
        raise CouldNotRun(f"{path} holds an unfinished run: finish it first")
    inside = path / "checkpoint"
    return inside if (inside / "config.json").exists() else path


def digest_of(given: str) -> str:
    """The digest of what a stage reads: a file, or a checkpoint."""
    path = checkpoint_of(Path(given))
    try:
        return model_digest(path) if path.is_dir() else file_digest(path)
    except OSError as error:
        raise CouldNotRun(f"{path} can't be read: {error.strerror}") from error


def digest_line(name: str, digest: str) -> str:
    """How settings.toml says what a run read."""
    return f"# {name}: {digest}"


def recorded(checkpoint: str, name: str) -> str | None:
    """The digest of what the run that wrote a checkpoint read by this name, as its settings.toml
    says; None if it is not in a run's folder, or the run read nothing of that name."""
    inside = checkpoint_of(Path(checkpoint))
    if not is_run(inside.parent):
        return None
    file, before = inside.parent / SETTINGS, digest_line(name, "")
    lines = read_text(file, str(file)).splitlines()
    return next((x.removeprefix(before) for x in lines if x.startswith(before)), None)


def texts_digest(texts: Sequence[str]) -> str:
    """The SHA-256 of documents, shortened: those that CPython ships differ by its version."""
    lengths = ",".join(str(len(text)) for text in texts)
    return hashlib.sha256("\n".join([lengths, *texts]).encode()).hexdigest()[:16]


def open_run(
    path: Path,
    machine: Machine,
    stage: str,
    settings: Any,
    inputs: Mapping[str, str] | None = None,
    *,
    resume: bool,
) -> RunFolder:
    """A run's folder, open, whose settings.toml holds ``settings`` and the digests of what the run
    reads, by name: another input is another run."""
    lines = [digest_line(name, digest) for name, digest in (inputs or {}).items()]
    text = "\n".join([*lines, to_toml({stage: settings})])
    folder = RunFolder(path, machine, text)
    if machine.ranks is not None:
        folder = SharedFolder(path, machine, text, machine.ranks)
    folder.open(resume=resume)
    return folder


def told_metrics(told: Told, learning_rate: float, config: ModelConfig) -> Metrics:
    """The metrics of a `train_step`."""
    main = {layer: load for layer, load in told.loads.items() if layer < config.layers}
    return {
        "loss": told.loss,
        "main": told.main,
        "mtp": told.mtp,
        "balance": told.balance,
        "norm": told.norm,
        "learning_rate": learning_rate,
        "violation": max((max_violation(x) for x in main.values()), default=0.0),
        "loads": {str(layer): load.tolist() for layer, load in told.loads.items()},
    }
