"""A port's tensor beside the truth's: the largest error, cosine, ratio of norms, the worst place,
and which blocks are wrong. Both are read a piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .blocks import Cut

__all__ = ["FACTOR", "Difference", "Heat", "difference", "errors_along", "heat"]

FACTOR = 4  # units that a port may have: clean ones were seen to have at most 3.3
PIECE = 2**16  # numbers that are compared at a time: they fit into a core's cache
MOST_CELLS = 48  # of a heat map, along an axis


class Difference(NamedTuple):
    """How a port's tensor differs. What is NaN or infinite in the truth must be the same there."""

    error: float  # max |theirs − truth|; inf if one is finite and the other is not
    scale: float  # max |truth|, of what is finite
    cosine: float  # NaN where either is 0
    norm_ratio: float  # |theirs| / |truth|; NaN where the truth is 0
    worst: tuple[int, ...]
    theirs: float  # there
    truth: float
    unlike: int  # places where NaN or infinity are not the truth's

    @property
    def relative(self) -> float:
        """The error over the tensor's own scale."""
        if self.scale == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.scale

    def units(self, unit: float) -> float:
        """The error in units."""
        if unit == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / unit


def difference(theirs: np.ndarray, truth: np.ndarray, scale: float = math.nan) -> Difference:
    """How ``theirs`` differs from ``truth``, of any shape, the same; ``scale`` is max |truth| if it
    is known, which keeps the squares of large and small numbers in range."""
    size = scale if scale > 0 and math.isfinite(scale) else 1.0
    error, largest = -1.0, 0.0
    worst = unlike = 0
    own = other = both = 0.0  # Σ theirs², Σ truth², Σ theirs · truth
    for start, x, y in pieces(theirs, truth):
        wrong = errors(x, y)
        place = int(wrong.argmax())
        if wrong[place] > error:
            error, worst = float(wrong[place]), start + place
        if not np.isfinite(wrong[place]) or not np.isfinite(y).all():
            unlike += int(np.isinf(wrong).sum())
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = x[finite], y[finite]
        largest = max(largest, float(np.abs(y).max(initial=0.0)))
        u, v = x / size, y / size
        own, other = own + float((u * u).sum()), other + float((v * v).sum())
        both += float((u * v).sum())
    place_of = tuple(int(n) for n in np.unravel_index(worst, truth.shape)) if truth.size else ()
    product = math.sqrt(own) * math.sqrt(other)
    return Difference(
        max(error, 0.0),
        largest,
        both / product if product > 0 else math.nan,
        math.sqrt(own) / math.sqrt(other) if other > 0 else math.nan,
        place_of,
        float(theirs[place_of]) if truth.size else math.nan,
        float(truth[place_of]) if truth.size else math.nan,
        unlike,
    )


def errors(theirs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|theirs − truth|: 0 where both are the same infinity or NaN, inf where one is not finite and
    the other is another."""
    with np.errstate(all="ignore"):
        wrong = np.asarray(np.abs(theirs - truth))
    if np.isfinite(wrong).all():
        return wrong
    same = (theirs == truth) | (np.isnan(theirs) & np.isnan(truth))
    finite = np.isfinite(theirs) & np.isfinite(truth)
    return np.where(same, 0.0, np.where(finite, wrong, np.inf))


def pieces(theirs: np.ndarray, truth: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Where a piece begins, and both tensors' numbers there in float64."""
    flat_theirs, flat_truth = theirs.reshape(-1), truth.reshape(-1)
    for start in range(0, truth.size, PIECE):
        part = slice(start, start + PIECE)
        yield start, flat_theirs[part].astype(np.float64), flat_truth[part].astype(np.float64)


def errors_along(theirs: np.ndarray, truth: np.ndarray) -> list[np.ndarray]:
    """For each axis of ``theirs`` and ``truth``, of any shape, the largest error at each of its
    indices, [size]."""
    found = [np.zeros(size) for size in truth.shape]
    if not found:  # a scalar
        return []
    for start, x, y in pieces(theirs, truth):
        wrong = errors(x, y)
        stop = start + len(wrong)
        for axis, index in enumerate(np.unravel_index(np.arange(start, stop), truth.shape)):
            np.maximum.at(found[axis], index, wrong)
    return found


class Heat(NamedTuple):
    """The largest error of each cell of two axes, the others taken together."""

    cells: np.ndarray  # [rows, columns]
    axes: tuple[int, int]  # the second is −1 of a vector
    edges: tuple[np.ndarray, np.ndarray]  # where the cells begin, and the end


def heat(theirs: np.ndarray, truth: np.ndarray, cuts: list[Cut]) -> Heat:
    """The heat map of ``theirs`` beside ``truth``, of any shape: the axes are those of the first
    cuts, or the last two; cells end where blocks do."""
    named = list(dict.fromkeys(cut.axis for cut in cuts))
    spare = [axis for axis in reversed(range(truth.ndim)) if axis not in named]
    first, second = sorted([*named, *spare, -1, -1][:2]) if truth.ndim > 1 else (0, -1)
    first, second = (second, first) if first < 0 else (first, second)
    rows, columns = _edges(truth.shape, first, cuts), _edges(truth.shape, second, cuts)
    cells = np.zeros((len(rows) - 1, len(columns) - 1))
    for start, x, y in pieces(theirs, truth):
        wrong = errors(x, y)
        place = np.unravel_index(np.arange(start, start + len(wrong)), truth.shape)
        row = np.searchsorted(rows, place[first], side="right") - 1
        column = np.zeros_like(row)
        if second >= 0:
            column = np.searchsorted(columns, place[second], side="right") - 1
        np.maximum.at(cells, (row, column), wrong)
    return Heat(cells, (first, second), (rows, columns))


def _edges(shape: tuple[int, ...], axis: int, cuts: list[Cut]) -> np.ndarray:
    """Where the cells of an axis begin, and its end: at most MOST_CELLS cells, which end where
    blocks end if there are so few of them."""
    if axis < 0:
        return np.array([0, 1])
    size = shape[axis]
    starts = {0}
    for cut in cuts:
        if cut.axis == axis:
            more = starts | set((np.flatnonzero(np.diff(cut.block)) + 1).tolist())
            starts = more if len(more) <= MOST_CELLS else starts
    while 2 * len(starts) <= MOST_CELLS and len(starts) < size:
        edges = [*sorted(starts), size]
        halves = {(a + b) // 2 for a, b in pairwise(edges)}
        starts |= halves
    return np.array([*sorted(starts), size])
