"""How time and memory grow along a group's curve: fitted exponents, and ratios of its ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .results import Measured
from .rows import GROUPS

__all__ = ["Growth", "exponent", "growth_of"]

FEWEST = 3  # points of a fit


class Growth(NamedTuple):
    """A fitted exponent of time or memory along a curve."""

    column: str
    what: str
    value: float


def growth_of(group: str, rows: Sequence[Measured]) -> list[Growth]:
    """What a group's rows show, by column."""
    columns = list(dict.fromkeys(name for row in rows for name in row.columns))
    if group == "skew":
        return [x for column in columns for x in _skew(column, rows)]
    if not GROUPS[group].along:
        return []
    return [x for column in columns for x in _curve(group, column, rows)]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y ∝ x^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _curve(group: str, column: str, rows: Sequence[Measured]) -> list[Growth]:
    along, found = GROUPS[group].along, []
    points = [(row, row.columns[column]) for row in rows if column in row.columns]
    if group == "experts" and len(points) > 1:
        first, last = points[0][0], points[-1][0]
        net = [cell.times.median - (row.write or 0) for row, cell in points]
        if net[0] > 0:
            what = f"time, {first.x} → {last.x} experts, less that of writing their gradients"
            found.append(Growth(column, what, net[-1] / net[0]))
        return found
    if len(points) >= FEWEST:
        x, times = zip(*((row.x, cell.times.median) for row, cell in points), strict=True)
        found.append(Growth(column, f"time, exponent of {along}", exponent(x, times)))
    sizes = [(row.x, cell.peak) for row, cell in points if cell.peak]
    if len(sizes) >= FEWEST:
        x, peaks = zip(*sizes, strict=True)
        found.append(Growth(column, f"memory, exponent of {along}", exponent(x, peaks)))
    return found


def _skew(column: str, rows: Sequence[Measured]) -> list[Growth]:
    times = {row.name: row.columns[column].times.median for row in rows if column in row.columns}
    balanced = times.pop("skew-balanced", None)
    if balanced is None:
        return []
    return [
        Growth(column, f"time, {name.removeprefix('skew-')} ÷ balanced", seconds / balanced)
        for name, seconds in times.items()
    ]
