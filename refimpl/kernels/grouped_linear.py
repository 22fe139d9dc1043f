"""The linear maps of all experts on kernels/grouped_linear.cu: one launch each for y, dx and dw,
for any number of experts. Only the device knows how many rows each of them has.

Letters: E experts, R rows of all of them, I inputs and O outputs of a map."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..array import Array, library
from .host import Kernels, cover, numbers
from .launch import Launch, NumbaLaunch

__all__ = [
    "TILINGS",
    "Groups",
    "Tiling",
    "Tilings",
    "grouped_forward",
    "grouped_input",
    "grouped_weight",
    "make_groups",
    "tiling_of",
]

NUMBA_THREADS = 128


class Tiling(NamedTuple):
    """Which part of the result a block computes, and how."""

    rows: int  # of the result, and its columns: a block's tile
    columns: int
    warp_rows: int  # a warp's part of the tile: multiples of 16
    warp_columns: int
    depth: int  # terms of the sum per stage: a multiple of 16
    stages: int  # in shared memory, each with a tile of both factors

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        return tuple((name.upper(), value) for name, value in self._asdict().items())

    @property
    def threads(self) -> int:
        return 32 * (self.rows // self.warp_rows) * (self.columns // self.warp_columns)

    def shared(self, storage: str) -> int:
        """Bytes of shared memory per block: enough for each of the three products."""
        size = {"float64": 8, "float32": 4, "bfloat16": 2}[storage]
        line = self.depth + 16 // size  # of a factor whose lines lie along the sum
        both = (self.rows + self.columns) * line
        across = self.depth * (self.rows + self.columns + 2 * (16 // size))
        mixed = self.rows * line + self.depth * (self.columns + 16 // size)
        return self.stages * size * max(both, across, mixed)


Tilings = dict[str, tuple[Tiling, Tiling]]
"""By storage type: the tiling for few rows per expert, where reading the weights takes the time,
and that for many."""

TILINGS: Tilings = {  # those that the sources are compiled with
    "bfloat16": (Tiling(16, 128, 16, 32, 32, 4), Tiling(128, 128, 64, 32, 32, 4)),
    "float32": (Tiling(16, 128, 16, 32, 16, 4), Tiling(128, 128, 64, 32, 16, 3)),
    "float64": (Tiling(16, 64, 16, 32, 16, 3), Tiling(64, 64, 32, 32, 16, 3)),
}
FEW = 32  # rows of the result: up to so many the first tiling is taken


def tiling_of(storage: str, rows: float, tilings: Tilings = TILINGS) -> Tiling:
    """The tiling for results of ``rows`` rows, on average over the experts."""
    few, many = tilings[storage]
    return few if rows <= FEW else many


class Groups(NamedTuple):
    """Where the rows of each expert lie, and which tiles they fill."""

    start: Array  # [E + 1] int64: the first row of each expert, and the end of the last
    first_tile: Array  # [E + 1] int64: the same, counted in tiles of rows
    most_tiles: int  # of rows, whatever the counts on the device
    tilings: Tilings  # of which `grouped_weight` chooses its own
    tiling: Tiling  # for y and dx, whose tiles are of an expert's rows


def make_groups(start: Array, rows: int, storage: str, tilings: Tilings = TILINGS) -> Groups:
    """The groups of ``rows`` rows in all, from the experts' ``start`` [E + 1] on the device."""
    xp, experts = library(start), start.shape[0] - 1
    tiling = tiling_of(storage, rows / experts, tilings)
    tiles = -((start[:-1] - start[1:]) // tiling.rows)
    first_tile = xp.concatenate((xp.zeros(1, dtype=np.int64), xp.cumsum(tiles)))
    most = rows // tiling.rows + min(experts, rows)  # each expert's last tile may be partial
    return Groups(start, first_tile, most, tilings, tiling)


def grouped_forward(launch: Launch, x: Array, w: Array, groups: Groups) -> Array:
    """y [R, O]: each row of ``x`` [R, I] by its expert's map in ``w`` [E, O, I]."""
    (experts, outputs, inputs), rows = w.shape, x.shape[0]
    y = launch.empty((rows, outputs), x.dtype, x)
    given = (y, x, w, groups.start, groups.first_tile, experts, inputs, outputs)
    _by_rows(launch, "grouped_linear_forward", groups, rows, outputs, *given)
    return y


def grouped_input(
    launch: Launch, dy: Array, w: Array, groups: Groups, more: tuple[Array, Array] | None = None
) -> Array:
    """dx [R, I] from ``dy`` [R, O] and ``w`` [E, O, I]. ``more``: (dy, w) of a second map of the
    same x; then dx is the sum of both, rounded once."""
    (experts, outputs, inputs), rows = w.shape, dy.shape[0]
    dx = launch.empty((rows, inputs), dy.dtype, dy)
    factors = dy, w, *(more or (dy, w))
    given = (*factors, groups.start, groups.first_tile, experts, inputs, outputs)
    pairs = 1 if more is None else 2
    _by_rows(launch, "grouped_linear_input", groups, rows, inputs, dx, *given, pairs)
    return dx


def grouped_weight(launch: Launch, dy: Array, x: Array, groups: Groups) -> Array:
    """dw [E, O, I] from ``dy`` [R, O] and ``x`` [R, I], in float32 or wider; 0 for an expert
    without rows."""
    n, kernels = numbers(dy=dy, x=x), Kernels(launch, "grouped_linear")
    outputs, inputs = dy.shape[1], x.shape[1]
    experts = groups.start.shape[0] - 1
    dw = launch.empty((experts, outputs, inputs), n.real, dy)
    tiling = tiling_of(n.storage, outputs, groups.tilings)
    given = (dw, dy, x, groups.start, inputs, outputs)
    if isinstance(launch, NumbaLaunch):
        kernels("grouped_linear_weight", n.storage, (experts * outputs, 1), NUMBA_THREADS, *given)
    else:
        tiles = cover(outputs, tiling.rows) * cover(inputs, tiling.columns)
        _tiled(kernels, "grouped_linear_weight", n.storage, (tiles, experts), tiling, *given)
    return dw


def _by_rows(
    launch: Launch, kernel: str, groups: Groups, rows: int, columns: int, *given: Any
) -> None:
    """Launch a kernel whose result is [rows, columns]: a block per tile of an expert's rows and of
    columns. In Numba CUDA blocks take one row each, a thread per column."""
    n, kernels = numbers(result=given[0], first=given[1]), Kernels(launch, "grouped_linear")
    if isinstance(launch, NumbaLaunch):
        kernels(kernel, n.storage, (rows, cover(columns, NUMBA_THREADS)), NUMBA_THREADS, *given)
        return
    grid = cover(columns, groups.tiling.columns), groups.most_tiles
    _tiled(kernels, kernel, n.storage, grid, groups.tiling, *given)


def _tiled(
    kernels: Kernels, kernel: str, storage: str, grid: tuple[int, int], tiling: Tiling, *given: Any
) -> None:
    shared = tiling.shared(storage)
    kernels(kernel, storage, grid, tiling.threads, *given, shared=shared, defines=tiling.defines)
