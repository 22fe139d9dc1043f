"""All rows on one device, beside torch if that is there."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..errors import CouldNotRun
from ..kernels import SOURCE
from ..kernels.compile import nvrtc_version
from . import RUNS
from .measure import Times, copies, measure
from .results import Measured, Results, shape_of
from .rows import ROWS, Row
from .works import Maker, Sizes, number_type

__all__ = [
    "BASELINES",
    "Failed",
    "baselines",
    "header",
    "measure_row",
    "measure_rows",
    "select_rows",
]

BASELINES = (
    SOURCE.parent / "benchmarks" / "torch_baselines.py"
)  # in a checkout alone: the package names no torch


def select_rows(names: Sequence[str]) -> list[Row]:
    """The rows by name; all of them if there are no names. CouldNotRun for one that does not
    exist."""
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise CouldNotRun(f"unknown row {', '.join(unknown)}; there are {'; '.join(ROWS)}")
    return [row for row in ROWS.values() if row.name in names or not names]


def baselines(path: Path = BASELINES) -> tuple[ModuleType | None, str]:
    """The module of torch's side and its version, or None and why it is missing."""
    if not path.is_file():
        return None, f"{path.name} is not there: run from a checkout"
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CouldNotRun(f"{path} can't be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, str(module.VERSION)


def header(device: Any, torch_version: str | None, commit: str | None) -> Results:
    """A run without rows yet: what and where, and the ceilings, which are measured here."""
    versions = {
        "refimpl": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    try:
        versions["NVRTC"] = nvrtc_version()
    except CouldNotRun:  # the kernels came compiled: `refimpl kernels`
        versions["NVRTC"] = "none"
    versions |= device.versions() | ({"torch": torch_version} if torch_version else {})
    copy, matrix = device.ceilings()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Results(
        device.name,
        device.driver(),
        date,
        commit or commit_of_checkout(),
        versions,
        device.cache,
        copy,
        matrix,
    )


def commit_of_checkout(*folders: str) -> str:
    """Of the sources that run, marked if they were changed since, by default anywhere, else in
    these ``folders`` of the checkout; ``unknown`` where git can't say."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("describe", "--always", "--abbrev=12", "--exclude=*")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *(folders or "."))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


class Failed(NamedTuple):
    """A row that could not be measured."""

    name: str
    why: str  # one line


def measure_rows(
    device: Any,
    rows: Sequence[Row],
    torch: ModuleType | None,
    sizes: Sizes | None = None,
    runs: int = RUNS,
) -> Iterator[Measured | Failed]:
    """Each row, as soon as it is measured; one that fails stops no other."""
    for row in rows:
        found: Measured | Failed
        try:
            device.free()
            found = measure_row(device, row, torch, sizes or row.sizes, runs)
        except Exception as error:
            found = Failed(
                row.name, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            )
        yield found


def measure_row(
    device: Any, row: Row, torch: ModuleType | None, sizes: Sizes, runs: int
) -> Measured:
    """One row: its errors first, then our time and memory, then torch's on the same inputs.

    What torch can't do becomes a note; whatever our side can't do is an error.
    """
    notes: list[str] = []
    with device.stream:
        works = [
            row.make(Maker(device.launch, device.xp, sizes, number_type(row.storage), seed))
            for seed in range(copies(row.bytes(sizes), device.cache))
        ]
        errors = works[0].check()
        resets = [work.reset for work in works if work.reset]

        def reset() -> None:
            for each in resets:
                each()

        calls = [device.launch.record(work.run) if row.captured else work.run for work in works]
        ours = measure(device, calls, runs, reset if resets else None, graph=row.captured)
        calls.clear()  # and what they hold
        device.free()
        peak = device.peak(works[0].run)
        reset()
    device.free()
    found: dict[str, tuple[Times | None, int | None]] = {
        "eager": (None, None),
        "compiled": (None, None),
    }
    for how in found if torch is not None else ():
        if how == "compiled" and row.name in getattr(torch, "NOT_COMPILED", ()):
            continue
        try:
            found[how] = _baseline(
                torch, row, [work.inputs for work in works], how == "compiled", runs
            )
        except Exception as raised:  # torch's own failure must not lose our numbers
            notes.append(
                f"torch {how}: {type(raised).__name__}: "
                f"{(str(raised) or 'no message').splitlines()[0]}"
            )
    return Measured(
        row.name,
        shape_of(row, sizes),
        row.storage,
        row.bytes(sizes),
        row.flops(sizes) if row.flops else 0,
        row.asked(),
        ours,
        peak,
        errors,
        *found["eager"],
        *found["compiled"],
        tuple(notes),
    )


def _baseline(
    torch: ModuleType | None, row: Row, inputs: Sequence[tuple[Any, ...]], compiled: bool, runs: int
) -> tuple[Times, int]:
    side: Any = torch
    device = side.TorchDevice()
    calls: list[Callable[[], object]] = [
        device.baseline(row.name, arrays, compiled) for arrays in inputs
    ]
    found = measure(device, calls, runs, graph=row.captured), device.peak(calls[0])
    calls.clear()
    device.free()
    return found
