"""The truth that a port is held against: a folder that `refimpl grads` or `refimpl vectors` wrote.

index.json has every tensor with its file, shape, type, scale and units. Nothing else is read before
it is asked for. `refimpl.grads` says what the names mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.tensor_file import read_tensor_file
from ..config import Conventions, ModelConfig, Yarn
from ..errors import CouldNotRun
from ..files import parse_json, read_bytes

__all__ = ["FORMAT", "Entry", "Truth"]

FORMAT = 1  # of index.json
MOST_INDEX = 2**28  # bytes; of DeepSeek-V3's gradients, 1.3e7


class Entry(NamedTuple):
    """A tensor as the index has it."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    scale: float  # max |x|
    units: Mapping[str, float]  # by type; empty if none were measured


class Truth:
    """A folder of results.

    ``kind`` is model or vectors; ``config`` is that of the run (None for vectors); ``entries`` are
    the tensors, those included that are stored under another name.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], entries: dict[str, Entry]) -> None:
        self.folder, self.metadata = folder, metadata
        self.entries = entries
        self.kind: str = metadata["kind"]
        config = metadata.get("config")
        self.config = None if config is None else config_from(config)
        self._stored_as: dict[str, str] = {}
        self._open: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Truth:
        """The result in ``folder``; CouldNotRun if it is unfinished, broken, or of another
        format."""
        folder = Path(folder)
        path = folder / "index.json"
        if (folder / "unfinished").exists() and not path.exists():
            raise CouldNotRun(f"{folder} is unfinished: run the command that writes it again")
        index = parse_json(read_bytes(path, str(path), MOST_INDEX), str(path))
        try:
            metadata, tensors = index["metadata"], index["tensors"]
            if metadata.get("format") != FORMAT:
                raise CouldNotRun(
                    f"{path} must have format {FORMAT}, got {metadata.get('format')}: write it "
                    "again with this version"
                )
            same = {name: x["same_as"] for name, x in tensors.items() if "same_as" in x}
            entries = {
                name: Entry(
                    tuple(x["shape"]),
                    x["dtype"],
                    x["file"],
                    float(x.get("scale", np.nan)),
                    x.get("units", {}),
                )
                for name, x in tensors.items()
                if name not in same
            }
            entries |= {name: entries[other] for name, other in same.items()}
            truth = cls(folder, metadata, entries)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CouldNotRun(f"{path} is broken: {type(error).__name__} {error}") from error
        truth._stored_as = same
        return truth

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def array(self, name: str) -> np.ndarray:
        """A tensor, mapped from its file; CouldNotRun if the file is not as the index says."""
        file = self.entries[name].file
        if file not in self._open:
            self._open[file] = read_tensor_file(self.folder / file)[0]
        stored = self._open[file].get(self._stored_as.get(name, name))
        if stored is None or stored.shape != self.entries[name].shape:
            raise CouldNotRun(f"{self.folder / file} is not as index.json says: {name}")
        return stored

    def checkpoint(self, dtype: str = "float64") -> Checkpoint:
        """The checkpoint whose gradients these are; CouldNotRun if it is gone or another one."""
        told = self.metadata.get("checkpoint") or {}
        if self.config is None or "path" not in told:
            raise CouldNotRun(f"{self.folder} names no checkpoint")
        checkpoint = Checkpoint.open(
            told["path"],
            dtype=dtype,
            conventions=self.config.conventions,
            mtp=self.config.mtp_depth > 0,
        )
        return checkpoint


def config_from(told: Mapping[str, Any]) -> ModelConfig:
    """The config that ``asdict`` told; ValueError or TypeError if it is none."""
    known = {f.name for f in fields(ModelConfig)}
    parts = {name: value for name, value in told.items() if name in known}
    yarn, conventions = parts.get("yarn"), parts.get("conventions", {})
    parts["yarn"] = None if yarn is None else Yarn(**yarn)
    parts["conventions"] = Conventions(**conventions)
    return ModelConfig(**parts)
