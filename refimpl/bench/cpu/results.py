"""What one run found, as a file under benchmarks/results/cpu, and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..measure import Times
from ..words import amount, digits, seconds, time_of
from .columns import COLUMNS
from .load import BUSY
from .rows import ROWS, TOY_ROWS, Row

__all__ = ["HEAD", "Cell", "CpuResults", "Measured", "lines_of"]

SCHEMA = 1


@dataclass(frozen=True)
class Cell:
    """One column of one row."""

    times: Times  # of a call
    samples: int
    peak: int | None  # bytes that the process grew by during a call, results included
    error: float  # the largest of a gradient, over its largest number, against float64
    worst: str  # which gradient that is
    first: float  # seconds of the first call, compiling included


@dataclass(frozen=True)
class Measured:
    """One row."""

    name: str
    shape: str
    flops: int  # the least of its products
    x: int  # its place on the group's curve
    columns: dict[str, Cell]
    rate: float | None = None  # of the product, measured beside a row with products
    write: float | None = None  # seconds of writing as much as the experts' gradients take
    busy: float | None = None  # the share of the cores' time that others took meanwhile
    notes: tuple[str, ...] = ()

    @property
    def row(self) -> Row:
        return ROWS.get(self.name) or TOY_ROWS[self.name]

    @property
    def best(self) -> float | None:
        """Seconds of the fastest eager torch."""
        eager = [cell.times.median for name, cell in self.columns.items() if COLUMNS[name].eager]
        return min(eager, default=None)

    def ratio(self, column: str) -> float | None:
        """The column's time over that of the fastest eager torch."""
        return self.columns[column].times.median / self.best if self.best else None

    def share(self, column: str, rate: float) -> float | None:
        """How much of the product floor's rate it reaches; None for a row without products."""
        return self.flops / rate / self.columns[column].times.median if self.flops else None


@dataclass(frozen=True)
class CpuResults:
    """One run on one machine."""

    device: str  # the CPU's model
    threads: int
    cores: list[int]  # that every column is bound to
    date: str  # of the day, YYYY-MM-DD, UTC
    commit: str
    versions: dict[str, str]
    start_rate: float  # `rate` before the first row
    busy: float | None  # the share of the cores' time that others took before the first row
    rows: list[Measured] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Flop per second of NumPy's own float32 product, at so many threads: the fastest."""
        return max([self.start_rate, *(row.rate for row in self.rows if row.rate is not None)])

    def to_json(self) -> dict[str, Any]:
        """As it is written: the fields, and for the reader what follows from them."""
        content: dict[str, Any] = {"schema": SCHEMA, **asdict(self), "rate": self.rate}
        for row, written in zip(self.rows, content["rows"], strict=True):
            written |= {"group": row.row.group, "floor": row.flops / self.rate or None}
            for name, cell in written["columns"].items():
                cell |= {"ratio": row.ratio(name), "share": row.share(name, self.rate)}
        return content

    @property
    def group_names(self) -> list[str]:
        return list(dict.fromkeys(row.row.group for row in self.rows))

    def of_group(self, group: str) -> list[Measured]:
        return [row for row in self.rows if row.row.group == group]


# of the table
HEAD = ("column", "time (p10 … p90)", "÷ torch", "of floor", "memory", "error", "first call")


def lines_of(row: Measured, rate: float) -> list[Sequence[str]]:
    """The row's lines of the table, as HEAD has it, the fastest eager torch marked."""
    lines: list[Sequence[str]] = []
    for name, cell in row.columns.items():
        ratio, share = row.ratio(name), row.share(name, rate)
        mark = " *" if COLUMNS[name].eager and ratio == 1 else ""
        lines.append(
            (
                name + mark,
                time_of(cell.times),
                "–" if ratio is None else digits(ratio),
                "–" if share is None else f"{100 * share:.0f} %",
                "–" if cell.peak is None else amount(cell.peak),
                f"{cell.error:.1e}",
                seconds(cell.first) if COLUMNS[name].compiles else "",
            )
        )
    return lines


def doubts(results: CpuResults) -> list[str]:
    """The rows during which the machine was busy with something else."""
    return [row.name for row in results.rows if row.busy is not None and row.busy > BUSY]
