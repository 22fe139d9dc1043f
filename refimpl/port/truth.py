"""The truth that a port is held against: a folder that `refimpl grads` or `refimpl vectors` wrote.

index.json has every tensor with its file, shape, type, scale and units. Nothing else is read before
it is asked for. `refimpl.grads` says what the names mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.files import content_fingerprint
from ..checkpoint.tensor_file import StoredTensor, one_line, open_file
from ..config import Conventions, ModelConfig, Yarn
from ..errors import CouldNotRun
from ..files import expect_folder, parse_json, read_bytes
from ..grads.folder import FORMAT
from ..kernels.columns import COLUMNS, IN_FP8, ON_CPU

__all__ = ["KINDS", "Entry", "Truth", "config_from"]

KINDS = ("model", "vectors")  # of folders: of `refimpl grads`, of `refimpl vectors`
LOSSES = ("cross_entropy", "grpo", "dlogits")
MOST_INDEX = 2**28  # bytes; of DeepSeek-V3's gradients, 1.3e7
MOST_EXPERTS = 10**6  # of all layers; of DeepSeek-V3, 15,872


class Entry(NamedTuple):
    """A tensor as the index has it."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    stored_as: str  # its name in the file
    scale: float  # max |x|; NaN if the index does not say, or if x is not finite
    units: Mapping[
        str, float
    ]  # by type, inf where they are not finite; empty if none were measured


class Truth:
    """A folder of results.

    ``kind`` is model or vectors; ``config`` is that of the run (None for vectors); ``types`` are
    those that units were measured for; ``entries`` are the tensors, those included that are stored
    under another name.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], entries: dict[str, Entry]) -> None:
        self.folder, self.metadata = folder, metadata
        self.entries = entries
        self.kind: str = metadata["kind"]
        self.types = tuple(map(str, (metadata.get("units") or {}).get("types", ())))
        config = metadata.get("config")
        self.config = None if config is None else config_from(config)
        self._open: dict[str, dict[str, StoredTensor]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Truth:
        """The result in ``folder``; CouldNotRun if it is unfinished, broken, or of another
        format."""
        folder = Path(folder)
        expect_folder(folder)
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
            if metadata["kind"] not in KINDS:
                raise ValueError(f"kind must be one of {', '.join(KINDS)}")
            for name in ("units", "request", "checkpoint", "cases"):
                if not isinstance(metadata.get(name) or {}, dict):
                    raise TypeError(f"{name} must be an object")
            if (metadata["kind"] == "model") != (metadata.get("config") is not None):
                raise ValueError("a config belongs to kind model alone")
            _expect_told(metadata, tensors)
            truth = cls(folder, metadata, _entries(tensors))
            truth.expect_size()
            return truth
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = one_line(f"{type(error).__name__} {error}")
            raise CouldNotRun(f"{path} is broken: {why}") from error

    def expect_size(self) -> None:
        """ValueError for a config of more parts than could be walked through."""
        config = self.config
        if config is not None:
            experts = (config.layers + config.mtp_depth) * config.experts
            if experts > MOST_EXPERTS:
                raise ValueError(f"config has {experts:,} experts")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def array(self, name: str) -> np.ndarray:
        """A tensor, mapped from its file; CouldNotRun if the file is not as the index says."""
        if name not in self.entries:
            raise CouldNotRun(f"{self.folder} has no {one_line(name)}")
        entry = self.entries[name]
        if entry.file not in self._open:
            self._open[entry.file] = open_file(self.folder / entry.file)[0]
        stored = self._open[entry.file].get(entry.stored_as)
        array: Any = None if stored is None else stored.array()
        if array is None or (array.shape, str(array.dtype)) != (entry.shape, entry.dtype):
            raise CouldNotRun(
                f"{self.folder / entry.file} is not as index.json says: {one_line(name)}"
            )
        return np.asarray(array)

    def checkpoint(self, dtype: str = "float64") -> Checkpoint:
        """The checkpoint whose gradients these are; CouldNotRun if it is gone or another one."""
        told = self.metadata.get("checkpoint") or {}
        if self.config is None or "path" not in told:
            raise CouldNotRun(f"{self.folder} names no checkpoint")
        folder = Path(str(told["path"]))
        expect_folder(folder)
        if content_fingerprint(folder) != told.get("fingerprint"):
            raise CouldNotRun(f"{folder} is not the checkpoint that {self.folder} was made from")
        return Checkpoint.open(
            folder, dtype=dtype, conventions=self.config.conventions, mtp=self.config.mtp_depth > 0
        )


def _expect_told(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """KeyError, TypeError or ValueError if the metadata lacks what a check reads, or has it
    otherwise than we write it."""
    if metadata["kind"] == "vectors":
        for case, about in metadata["cases"].items():
            if not isinstance(about["op"], str) or not isinstance(about.get("settings", {}), dict):
                raise TypeError(f"{case} must have an op and settings")
            if not isinstance(about.get("differs", []), list):
                raise TypeError(f"what differs in {case} must be a list")
            for bugs in about.get("excludes", {}).values():
                if not isinstance(bugs, list):
                    raise TypeError(f"what {case} excludes must be lists")
        return
    if len(tensors["in/tokens"]["shape"]) != 2:
        raise ValueError("in/tokens must have two axes")
    if metadata["implementation"] not in (known := (*ON_CPU, IN_FP8, *COLUMNS)):
        raise ValueError(f"implementation must be one of {', '.join(known)}")
    if metadata["request"]["loss"] not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}")
    if not isinstance(metadata["request"].get("grpo") or {}, dict):
        raise TypeError("grpo must be an object")
    if split := metadata.get("split"):
        for term, rules in split["rules"].items():
            for rule in ("right", *rules):
                factors = np.array(rules[rule], float)
                if factors.shape != (len(split["shapes"]),) or not np.isfinite(factors).all():
                    raise ValueError(f"the factors of {term} must be a number for each part")
        if not split["rules"]:
            raise ValueError("split must have rules")


def _entries(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
    """The tensors of an index; KeyError, TypeError or ValueError if they are not as we write
    them."""
    same = {name: x["same_as"] for name, x in tensors.items() if "same_as" in x}
    entries = {name: _entry(name, x) for name, x in tensors.items() if name not in same}
    return entries | {name: entries[other] for name, other in same.items()}


def _entry(name: str, told: Mapping[str, Any]) -> Entry:
    shape, file = tuple(told["shape"]), told["file"]
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {name}")
    if not re.fullmatch(r"[\w.\-]+\.safetensors", file):
        raise ValueError(f"the file of {name}")
    units = {
        str(dtype): math.inf if unit is None else float(unit)
        for dtype, unit in told.get("units", {}).items()
    }
    if not all(unit >= 0 for unit in units.values()):
        raise ValueError(f"the units of {name}")
    scale = told.get("scale")
    known = math.nan if scale is None else float(scale)
    return Entry(shape, str(told["dtype"]), file, name, known, units)


def config_from(told: Mapping[str, Any]) -> ModelConfig:
    """The config that ``asdict`` told; ValueError or TypeError if it told something else."""
    known = {f.name for f in fields(ModelConfig)}
    parts = {name: value for name, value in told.items() if name in known}
    yarn, conventions = parts.get("yarn"), parts.get("conventions", {})
    if yarn is not None:  # a tuple with names, which JSON makes a list of
        parts["yarn"] = Yarn(**yarn) if isinstance(yarn, Mapping) else Yarn(*yarn)
    parts["conventions"] = Conventions(**conventions)
    return ModelConfig(**parts)
