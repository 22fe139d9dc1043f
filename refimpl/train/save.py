"""A run's folder: settings, metrics, saved states, the result. A state appears whole or not at all,
and going on from it gives the same bits.

    settings.toml       all settings, and what the run began from
    metrics.jsonl       a line per step or evaluation
    state-000100/       after step 100: checkpoint/ in Hugging Face's layout, moments and extra
                        tensors as safetensors, state.json
    stopped-000100/     the same, before a step that was not taken: to look into
    checkpoint/         the result, in Hugging Face's layout; with result.json the run is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, save_checkpoint
from ..checkpoint.tensor_file import read_tensor_file, write_tensor_file
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..files import (
    PARTIAL,
    file_digest,
    parse_json,
    read_json,
    read_text,
    replacing_folder,
    write_json,
    write_text,
)
from ..optimizer import Moments
from .machine import Machine
from .step import State

__all__ = [
    "PHASE",
    "SETTINGS",
    "RunFolder",
    "expect_place",
    "is_finished",
    "is_run",
    "load_parameters",
    "model_digest",
]

FORMAT = 1  # of state.json, and of what it stands for
COUNTS = ("format", "step", "moments", "tokens", "position", "metrics")  # integers of state.json
HELD = ("first/", "second/", "master/")  # in moments.safetensors, in the order of `Moments`
SETTINGS = "settings.toml"  # the file of a run's settings
RESULT = "result.json"
METRICS = "metrics.jsonl"
STATE = "state-"
PHASE = "phase-"  # earlier runs of the same stage, inside its folder
Extend = Callable[[Path], None]


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / SETTINGS).exists()


def is_finished(path: Path) -> bool:
    """Whether the run in a folder has ended."""
    return (path / RESULT).exists()


def expect_place(path: Path, *, resume: bool) -> None:
    """CouldNotRun unless a run can begin in the folder, which is new or empty, or it holds a run
    that is not finished and is to go on. Nothing is written."""
    try:
        there = [x.name for x in path.iterdir()] if path.exists() else []
    except OSError as error:
        raise CouldNotRun(f"{path} can't be used: {error.strerror}") from error
    if is_finished(path):
        raise CouldNotRun(f"{path} holds a finished run: nothing was changed")
    begun = is_run(path) or any(name.startswith(PHASE) for name in there)
    if begun and not resume:
        raise CouldNotRun(f"{path} holds a run already: resume it with", remedy="resume")
    if not begun and any(not name.endswith(PARTIAL) for name in there):
        raise CouldNotRun(f"{path} is not empty and holds no run: nothing was changed")


class RunFolder:
    """The folder of one run; see the module. Of two processes only one may use it (`held`)."""

    def __init__(self, path: Path, machine: Machine, settings: str) -> None:
        self.path = path
        self.machine = machine
        self.settings = settings

    def open(self, *, resume: bool) -> None:
        """Make the folder, or find in it what is to be resumed, and remove what an interrupted
        process left half-written; CouldNotRun as `expect_place`, or if the run there has other
        settings."""
        if not self.finished:
            expect_place(self.path, resume=resume)
        with self._writing():
            if not is_run(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self.path / SETTINGS, self.settings)
            begun = self.path / SETTINGS
            there, given = (x.splitlines() for x in (read_text(begun, str(begun)), self.settings))
            if there != given:
                ours = next((x for x in given if x not in there), "fewer")
                raise CouldNotRun(
                    f"{begun} has other settings than this run ({ours}): give the same, or another "
                    "folder"
                )
            for rest in self.path.glob(f"*{PARTIAL}"):
                remove(rest)

    def agreed(self, happened: bool) -> bool:
        """Whether something happened to a process that works in the folder."""
        return happened

    @property
    def finished(self) -> bool:
        return is_finished(self.path)

    def states(self) -> list[Path]:
        """The saved states, the latest last."""
        found = (x for x in self.path.glob(f"{STATE}*") if x.name.removeprefix(STATE).isdigit())
        return sorted(found, key=lambda x: int(x.name.removeprefix(STATE)))

    def save(
        self,
        state: State,
        config: ModelConfig,
        name: str | None = None,
        add: Extend = lambda folder: None,
    ) -> Path:
        """Save a state beside the one before, which then goes; or, for ``name``, beside all.
        ``add`` puts more into its checkpoint."""
        target = self.path / (name or f"{STATE}{state.step:06d}")
        before = [] if name else [x for x in self.states() if x != target]
        with self._writing():
            if name or not target.exists():  # else the same: a run has one state after a step
                self._save(state, config, target, add)
            for old in before:
                remove(old)
        return target

    def _save(self, state: State, config: ModelConfig, target: Path, add: Extend) -> None:
        with replacing_folder(target) as folder:
            self._write(state, config, folder)
            add(folder / "checkpoint")
            files = {
                x.relative_to(folder).as_posix(): file_digest(x)
                for x in sorted(folder.rglob("*"))
                if x.is_file()
            }
            counts = {
                "format": FORMAT,
                "step": state.step,
                "moments": state.moments.step,
                "tokens": state.tokens,
                "position": state.position,
                "metrics": self._sync_metrics(),
                "files": files,
            }
            write_json(folder / "state.json", counts)
            remove(target)

    def _write(self, state: State, config: ModelConfig, folder: Path) -> None:
        """All tensors of a state."""
        fetched, moments = self.machine.fetched, state.moments
        save_checkpoint(
            fetched(state.params), config, folder / "checkpoint", dtype=self.machine.dtype
        )
        held = zip(HELD, moments[1:], strict=True)
        every = {f"{part}{name}": x for part, of in held for name, x in of.items()}
        write_tensor_file(folder / "moments.safetensors", fetched(every))
        write_tensor_file(folder / "extra.safetensors", fetched(state.extra))

    def latest(self, config: ModelConfig) -> State | None:
        """The latest state, with the metrics cut back to it; None if none was saved. CouldNotRun if
        it is not as it was saved."""
        if not (found := self.states()):
            self._cut_metrics(0)
            return None
        folder = found[-1]
        counts = self._counts(folder)
        params, _ = load_parameters(folder / "checkpoint", self.machine, config)
        moments = self._tensors(folder / "moments.safetensors")
        held = (
            {name.removeprefix(part): x for name, x in moments.items() if name.startswith(part)}
            for part in HELD
        )
        extra = self._tensors(folder / "extra.safetensors")
        self._cut_metrics(counts["metrics"])
        return State(
            params,
            Moments(counts["moments"], *held),
            counts["step"],
            counts["tokens"],
            counts["position"],
            extra,
        )

    def _counts(self, folder: Path) -> dict[str, Any]:
        """What state.json says, if the files beside it are those that were saved."""
        told = read_json(folder / "state.json")
        told = told if isinstance(told, dict) else {}
        if type(told.get("format")) is int and told["format"] != FORMAT:
            raise CouldNotRun(
                f"{folder} was saved by another version of refimpl: its format is "
                f"{told['format']}, not {FORMAT}"
            )
        files = told.get("files")
        if not (isinstance(files, dict) and all(type(told.get(x)) is int for x in COUNTS)):
            raise CouldNotRun(f"{folder / 'state.json'} must hold {', '.join(COUNTS)} and files")
        for name, digest in files.items():
            if not (folder / name).is_file() or file_digest(folder / name) != digest:
                raise CouldNotRun(
                    f"{folder / name} is not as it was saved: remove {folder} to resume from the "
                    "state before it, or from the beginning"
                )
        return told

    def _tensors(self, path: Path) -> dict[str, Any]:
        """The tensors of a file in their own type, on the machine."""
        return {
            name: self.machine.place(np.array(x)) for name, x in read_tensor_file(path)[0].items()
        }

    def write_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become texts."""
        with self._writing(), (self.path / METRICS).open("a") as file:
            file.write(json.dumps(plain(line)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far; CouldNotRun if one is no JSON."""
        path = self.path / METRICS
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [parse_json(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]

    def _sync_metrics(self) -> int:
        """The metrics are on the disk; how many bytes they have."""
        path = self.path / METRICS
        if not path.exists():
            return 0
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path.stat().st_size

    def _cut_metrics(self, size: int) -> None:
        """Forget what was written after the state."""
        path = self.path / METRICS
        if (path.stat().st_size if path.exists() else 0) < size:
            raise CouldNotRun(f"{path} must have at least {size} bytes, as the state says")
        if path.exists():
            with self._writing():
                os.truncate(path, size)

    def finish(
        self,
        state: State,
        config: ModelConfig,
        result: Mapping[str, Any],
        add: Extend = lambda folder: None,
    ) -> None:
        """The result: its checkpoint, with what ``add`` puts beside the weights, then result.json;
        then the saved states go."""
        target = self.path / "checkpoint"
        with self._writing():
            with replacing_folder(target) as folder:
                params = self.machine.fetched(state.params)
                save_checkpoint(params, config, folder, dtype=self.machine.dtype)
                add(folder)
                remove(target)  # of a process that was stopped before result.json
            self._sync_metrics()
            write_json(self.path / RESULT, plain(result))
            for old in self.states():
                remove(old)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """CouldNotRun for an error of the disk, with what to do."""
        try:
            yield
        except (OSError, CouldNotRun) as error:
            cause = error.__cause__ if isinstance(error, CouldNotRun) else error
            if not isinstance(cause, OSError):
                raise
            kept = f"{self.states()[-1].name} is kept" if self.states() else "no state is saved yet"
            raise CouldNotRun(
                f"{self.path} can't be written: {cause.strerror}; {kept}: remove the "
                "cause, and resume with",
                remedy="resume",
            ) from error


def remove(path: Path) -> None:
    """A file, or a folder with all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_parameters(
    folder: Path, machine: Machine, config: ModelConfig | None = None, *, mtp: bool = True
) -> tuple[dict[str, Any], ModelConfig]:
    """The parameters of a checkpoint on the machine, and its config.

    Args:
        config: what the checkpoint must fit; its λ and conventions, which no file has, are kept.
        mtp: False leaves the MTP modules out.
    """
    source = Checkpoint.open(
        folder,
        dtype=machine.real,
        conventions=None if config is None else config.conventions,
        mtp=mtp,
    )
    found = source.config
    if config is not None:
        found = replace(found, mtp_weight=config.mtp_weight)
        if found != config:
            raise CouldNotRun(f"{folder} holds a model of other shapes than this run's")
    return machine.placed({name: source.tensor(name) for name in source.names}), found


def model_digest(folder: Path) -> str:
    """The SHA-256 of a checkpoint's weights and configuration, shortened."""
    digests = [
        file_digest(x) for x in sorted(folder.iterdir()) if x.suffix in (".json", ".safetensors")
    ]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def plain(x: Any) -> Any:
    """As JSON has it: NumPy's numbers and arrays as lists and numbers, those that are not finite as
    texts."""
    if isinstance(x, Mapping):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if hasattr(x, "tolist"):
        return plain(x.tolist())
    return str(x) if isinstance(x, float) and not isfinite(x) else x
