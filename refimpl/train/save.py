"""A run's folder: settings, metrics, saved states, the result. A state appears whole or not at all,
and going on from it gives the same bits.

    settings.toml       all settings, and what the run began from
    metrics.jsonl       a line per step or evaluation
    state-000100/       after step 100: checkpoint/ in Hugging Face's layout, moments and extra
                        tensors as safetensors, state.json
    checkpoint/         the result, in Hugging Face's layout; with result.json the run is finished
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, save_checkpoint
from ..checkpoint.tensor_file import read_tensor_file, write_tensor_file
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..files import file_digest, read_json, read_text, replacing_folder, write_json, write_text
from ..optimizer import Moments
from .machine import Machine
from .step import State

__all__ = ["RunFolder", "load_parameters", "model_digest"]

STATE = "state-"
PHASE = "phase-"  # earlier runs of the same stage, inside its folder
Extend = Callable[[Path], None]


class RunFolder:
    """The folder of one run; see the module."""

    def __init__(self, path: Path, machine: Machine, settings: str) -> None:
        self.path = path
        self.machine = machine
        self.settings = settings

    def open(self, *, resume: bool) -> None:
        """Make the folder, or find in it what is to be resumed; CouldNotRun if something else is
        there, or a run with other settings."""
        begun = self.path / "settings.toml"
        try:
            if not begun.exists():
                there = sorted(self.path.iterdir()) if self.path.exists() else []
                if any(not x.name.startswith(PHASE) for x in there):
                    raise CouldNotRun(
                        f"{self.path} is not empty and holds no run: nothing was changed"
                    )
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(begun, self.settings)
            elif not resume:
                raise CouldNotRun(
                    f"{self.path} holds a run already: go on with it by", remedy="resume"
                )
        except OSError as error:
            raise CouldNotRun(f"{self.path} can't be written: {error.strerror}") from error
        if read_text(begun, str(begun)) != self.settings:
            raise CouldNotRun(
                f"{begun} has other settings than this run: give them, or another folder"
            )

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    def states(self) -> list[Path]:
        """The saved states, the latest last."""
        return sorted(
            x for x in self.path.glob(f"{STATE}*") if x.name.removeprefix(STATE).isdigit()
        )

    def save(self, state: State, config: ModelConfig, name: str | None = None) -> Path:
        """Save a state beside the one before, which then goes."""
        target = self.path / (name or f"{STATE}{state.step:06d}")
        before = self.states()
        if target.exists():
            shutil.rmtree(target)
        metrics = self.path / "metrics.jsonl"
        with replacing_folder(target) as folder:
            params, fetched = self.machine.fetched(state.params), self.machine.fetched
            save_checkpoint(params, config, folder / "checkpoint", dtype=self.machine.dtype)
            write_tensor_file(
                folder / "moments.safetensors",
                {f"first/{key}": x for key, x in fetched(state.moments.first).items()}
                | {f"second/{key}": x for key, x in fetched(state.moments.second).items()},
            )
            write_tensor_file(folder / "extra.safetensors", fetched(state.extra))
            counts = {
                "step": state.step,
                "moments": state.moments.step,
                "tokens": state.tokens,
                "position": state.position,
                "metrics": metrics.stat().st_size if metrics.exists() else 0,
            }
            write_json(folder / "state.json", counts)
        if name is None:
            for old in before:
                if old != target:
                    shutil.rmtree(old)
        return target

    def latest(self, config: ModelConfig) -> State | None:
        """The latest state, with the metrics cut back to it; None if none was saved."""
        if not (found := self.states()):
            self._cut_metrics(0)
            return None
        folder = found[-1]
        counts = read_json(folder / "state.json")
        for name in ("step", "moments", "tokens", "position", "metrics"):
            if not isinstance(counts, dict) or type(counts.get(name)) is not int:
                raise CouldNotRun(f"{folder / 'state.json'} must hold {name} as an integer")
        params, _ = load_parameters(folder / "checkpoint", self.machine, config)
        moments = self._tensors(folder / "moments.safetensors")
        first, second = (
            {key.removeprefix(part): x for key, x in moments.items() if key.startswith(part)}
            for part in ("first/", "second/")
        )
        wrong = [
            key for key, x in first.items() if key not in second or x.shape != second[key].shape
        ]
        if wrong or len(first) != len(second):
            raise CouldNotRun(
                f"{folder / 'moments.safetensors'} must hold both moments of a tensor"
            )
        self._cut_metrics(counts["metrics"])
        return State(
            params,
            Moments(counts["moments"], first, second),
            counts["step"],
            counts["tokens"],
            counts["position"],
            self._tensors(folder / "extra.safetensors"),
        )

    def _tensors(self, path: Path) -> dict[str, Any]:
        """The tensors of a file in their own type, on the machine."""
        return {
            name: self.machine.place(np.array(x)) for name, x in read_tensor_file(path)[0].items()
        }

    def _cut_metrics(self, size: int) -> None:
        """Forget what was written after the state."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            if path.stat().st_size < size:
                raise CouldNotRun(f"{path} must have at least {size} bytes, as the state says")
            os.truncate(path, size)

    def write_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become texts."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, default=_plain) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

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
        if target.exists():  # of a run that was stopped between these lines
            shutil.rmtree(target)
        with replacing_folder(target) as folder:
            inside = folder / "weights"
            params = self.machine.fetched(state.params)
            save_checkpoint(params, config, inside, dtype=self.machine.dtype)
            for file in inside.iterdir():
                file.rename(folder / file.name)
            inside.rmdir()
            add(folder)
        write_text(self.path / "result.json", json.dumps(result, indent=1, default=_plain) + "\n")
        for old in self.states():
            shutil.rmtree(old)


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
        dtype=machine.dtype,
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


def _plain(x: Any) -> Any:
    """NumPy's numbers and arrays as JSON has them."""
    with contextlib.suppress(AttributeError):
        return x.tolist()
    return str(x)
