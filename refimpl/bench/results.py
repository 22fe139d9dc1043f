"""What one run found, as a file under benchmarks/results, and the table of kernels/README.md made
from all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json
from ..kernels.compile import STEMS, STORAGE, TARGETS
from ..kernels.numba_cuda import NUMBA_STEMS, NUMBA_STORAGE
from .measure import Times
from .rows import ROWS, Row, floor_of
from .words import amount, digits, seconds, time_of
from .works import Errors, Sizes

__all__ = ["Measured", "Results", "file_name", "line_of", "read_results", "render", "shape_of"]

SCHEMA = 2
DERIVED_BY_RATES = ("floor", "share", "target", "reached")


@dataclass(frozen=True)
class Measured:
    """One row on one device. Times are seconds per call; a missing baseline is None, and `notes`
    say why."""

    name: str
    shape: str
    storage: str
    bytes: int  # the least that must move
    flops: int  # the least of dense products, 0 without
    asked: float | None  # the share of the floor's rate that the first target is, None without one
    ours: Times
    peak: int  # bytes taken beyond the inputs, results included
    errors: Errors  # of each result, against the float64 reference
    eager: Times | None = None
    eager_peak: int | None = None
    compiled: Times | None = None
    compiled_peak: int | None = None
    notes: tuple[str, ...] = ()

    def floor(self, copy: float, matrix: float) -> float:
        """Seconds of `floor_of`, on the card whose own rates these are."""
        return floor_of(self.bytes, self.flops, copy, matrix)

    def share(self, copy: float, matrix: float) -> float:
        """How much of that rate is reached, 1 being all."""
        return self.floor(copy, matrix) / self.ours.median

    def target(self, copy: float, matrix: float) -> float | None:
        """Seconds that are asked for on this card: the first target is a time on one card, and
        scales with the floor."""
        return None if self.asked is None else self.floor(copy, matrix) / self.asked

    def reached(self, copy: float, matrix: float) -> float | None:
        """How much of the target's rate is reached; 1 or more meets it."""
        target = self.target(copy, matrix)
        return None if target is None else target / self.ours.median

    @property
    def error(self) -> float:
        """The worst of the errors; up to 1 the row holds. NaN if one is."""
        return float(np.max(list(self.errors.values())))

    @property
    def wrong(self) -> str:
        """The results whose error is not within what is allowed, in words; empty if the row
        holds."""
        beyond = {name: x for name, x in self.errors.items() if not x <= 1}
        return ", ".join(f"{name} {x:.3g} times" for name, x in beyond.items())

    @property
    def ratio(self) -> float | None:
        """Our time over that of the faster baseline."""
        baselines = [t.median for t in (self.eager, self.compiled) if t is not None]
        return self.ours.median / min(baselines) if baselines else None


@dataclass(frozen=True)
class Results:
    """One run on one device."""

    device: str
    driver: str
    date: str  # of the day, YYYY-MM-DD, UTC
    commit: str
    versions: dict[str, str]
    cache: int  # bytes of the last-level cache
    copy: float  # bytes per second, read and written, of the card's own copy
    matrix: float  # flop per second of a bfloat16 matrix product
    rows: list[Measured] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As it is written: the fields, and for the reader what follows from them."""
        content = {"schema": SCHEMA, **asdict(self)}
        for row, written in zip(self.rows, content["rows"], strict=True):
            written["notes"] = list(row.notes)
            rates = self.copy, self.matrix
            written |= {name: getattr(row, name)(*rates) for name in DERIVED_BY_RATES}
            written |= {"ratio": row.ratio, "error": row.error}
        return content

    @classmethod
    def from_json(cls, content: Any) -> Results:
        """Of `to_json`; ValueError unless it is just that."""
        try:
            given = {key: value for key, value in content.items() if key != "schema"}
            rows = [_measured(row) for row in given.pop("rows")]
            results = cls(**given, rows=rows)
            _expect_typed(results)
            same = results.to_json() == content and type(content["schema"]) is int
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"results must have the fields that refimpl bench writes: {error}"
            ) from error
        if not same:
            raise ValueError(
                "results must be as refimpl bench wrote them: a derived number or the schema "
                "differs"
            )
        return results


def _measured(row: dict[str, Any]) -> Measured:
    derived = (*DERIVED_BY_RATES, "ratio", "error")
    given = {key: value for key, value in row.items() if key not in derived}
    for name in ("ours", "eager", "compiled"):
        given[name] = None if given[name] is None else Times(**given[name])
    return Measured(**given | {"notes": tuple(given["notes"])})


def _expect_typed(results: Results) -> None:
    """ValueError unless every field is of its type, and can be measured."""
    words = [results.device, results.driver, results.commit]
    words += [word for pair in results.versions.items() for word in pair]
    times = [t for m in results.rows for t in (m.ours, m.eager, m.compiled) if t is not None]
    for m in results.rows:
        words += [m.name, m.shape, m.storage, *m.notes]
    numbers = [results.copy, results.matrix, *(x for t in times for x in (t.median, t.low, t.high))]
    counts = [results.cache, *(x for m in results.rows for x in (m.bytes, m.flops, m.peak))]
    counts += [x for m in results.rows for x in (m.eager_peak, m.compiled_peak) if x is not None]
    errors = [x for m in results.rows for x in m.errors.values()]
    words += [name for m in results.rows for name in m.errors]
    wrong: list[object] = [x for x in words if not isinstance(x, str)]
    wrong += [x for x in numbers if type(x) not in (int, float) or not 0 < x < 1e300]
    wrong += [x for x in errors if type(x) not in (int, float) or not 0 <= x < 1e300]
    wrong += [x for x in counts if type(x) is not int or not 0 <= x < 2**63]
    wrong += [t for t in times if not t.low <= t.median <= t.high]
    wrong += [m.name for m in results.rows if m.name not in ROWS]
    if wrong:
        raise ValueError(f"a field can't be {str(wrong[0])[:40]!r}")
    date.fromisoformat(results.date)


def file_name(device: str, date: str) -> str:
    """``nvidia-h100-80gb-hbm3-2026-11-30.json``."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}.json"


def read_results(folder: Path) -> list[Results]:
    """The results in a folder, the latest per device; ValueError names a file that is not as
    `refimpl bench` wrote it, CouldNotRun one that is not JSON."""
    latest: dict[str, Results] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results = Results.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if path.name != file_name(results.device, results.date):
            raise ValueError(
                f"{path.name}: must be called {file_name(results.device, results.date)}"
            )
        if results.device not in latest or latest[results.device].date < results.date:
            latest[results.device] = results
    return [latest[device] for device in sorted(latest)]


def shape_of(row: Row, sizes: Sizes) -> str:
    """The row's shape in numbers: ``4096 × 7168``."""
    return re.sub(r"[a-z_]+", lambda name: str(getattr(sizes, name[0])), row.shape)


HEAD = (
    "kernel",
    "shape",
    "type",
    "at least",
    "device",
    "ours",
    "floor",
    "share",
    "target",
    "reached",
    "torch eager",
    "torch.compile",
    "ours ÷ best of torch",
    "memory, ours / eager / compiled",
    "error",
)


def render(all_results: Sequence[Results]) -> str:
    """The Markdown of kernels/README.md: a line for each row and device, and what was not
    measured."""
    lines = [*_coverage(all_results), "", _line(HEAD), "|" + "---|" * len(HEAD)]
    for row in ROWS.values():
        sizes = row.sizes
        link = f"[{row.name}]({row.stem}.cu)"
        least = (
            f"{digits(row.flops(sizes) / 1e12)} Tflop" if row.flops else amount(row.bytes(sizes))
        )
        begin = [link, shape_of(row, sizes), row.storage, f"{row.formula} = {least}"]
        found = _found(row, all_results)
        if not found:
            lines.append(_line([*begin, "not measured yet", *["–"] * (len(HEAD) - 5)]))
        for results, measured in found:
            lines.append(_line([*begin, results.device, *_cells(measured, results)]))
    for results in all_results:
        versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
        lines += [
            "",
            f"{results.device}: its own copy {results.copy / 1e12:.2f} TB/s, its bfloat16 "
            f"product {results.matrix / 1e12:.0f} TFLOP/s, driver {results.driver}, "
            f"{versions}; commit {results.commit}, {results.date}.",
        ]
        lines += [f"{m.name}: {note}." for m in results.rows for note in m.notes]
    return "\n".join(lines) + "\n"


def _coverage(all_results: Sequence[Results]) -> list[str]:
    """For each file: what it is compiled for, and which of its rows were measured on which
    device."""
    lines = [_line(("file", "targets", "types", "measured")), "|---|---|---|---|"]
    files: list[tuple[str, tuple[str, ...]]] = [(f"{stem}.cu", STORAGE) for stem in STEMS]
    files += [(f"{stem}_numba_cuda.py", NUMBA_STORAGE) for stem in NUMBA_STEMS]
    for file, types in files:
        rows = [row for row in ROWS.values() if f"{row.stem}.cu" == file]
        measured = [
            f"{m.name} in {m.storage} on {r.device}"
            for row in rows
            for r, m in _found(row, all_results)
        ]
        measured = measured or ["not yet" if rows else "no row"]
        lines.append(
            _line([f"[{file}]({file})", ", ".join(TARGETS), ", ".join(types), ", ".join(measured)])
        )
    return lines


def _found(row: Row, all_results: Sequence[Results]) -> list[tuple[Results, Measured]]:
    return [(results, m) for results in all_results for m in results.rows if m.name == row.name]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def line_of(m: Measured, run: Results) -> str:
    """One row on a terminal, what has no baseline left out."""
    ours, floor, share, target, reached, eager, compiled, ratio, memory, error = _cells(m, run)
    parts = [f"{ours}, floor {floor} ({ROWS[m.name].formula}), {share} of it"]
    parts += [f"target {target}, {reached} of it"] if m.asked else []
    parts += [f"torch {eager}"] if m.eager else []
    parts += [f"torch.compile {compiled}"] if m.compiled else []
    parts += [f"{ratio} x the best"] if m.ratio else []
    worst = max(m.errors, key=lambda name: (isnan(m.errors[name]), m.errors[name]))
    parts += [f"memory {memory}", f"error {error} of what is allowed ({worst})", *m.notes]
    return f"{m.name} {m.shape} {m.storage}: {'; '.join(parts)}"


def _cells(m: Measured, run: Results) -> list[str]:
    memory = " / ".join(
        "–" if x is None else amount(x) for x in (m.peak, m.eager_peak, m.compiled_peak)
    )
    rates = run.copy, run.matrix
    target, reached = m.target(*rates), m.reached(*rates)
    return [
        time_of(m.ours),
        seconds(m.floor(*rates)),
        f"{100 * m.share(*rates):.0f} %",
        "–" if target is None else seconds(target),
        "–" if reached is None else f"{100 * reached:.0f} %",
        time_of(m.eager),
        time_of(m.compiled),
        "–" if m.ratio is None else f"{m.ratio:.2f}",
        memory,
        f"{m.error:.2f}",
    ]
