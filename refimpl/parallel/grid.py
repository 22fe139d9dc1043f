"""Which rank does what: the sequences, the positions and the experts that are its own.

Ranks stand in a grid of ``data`` rows and ``context`` columns: a row of ranks has the same
sequences, and each of its columns the same piece of their positions. Across that grid, each
``expert`` ranks in a row hold all experts between them. A tensor that is no expert's is held by
all ranks, an expert by ranks / expert of them, the replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..config import ModelConfig
from ..errors import CouldNotRun
from ..splits import Part, by_positions, by_rows

__all__ = ["Grid", "even", "make_grid", "share"]


class Grid(NamedTuple):
    """How many ranks each kind of split has; `make_grid` checks them."""

    data: int = 1
    context: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.context

    def row(self, rank: int) -> int:
        """Of the grid's rows, which have different sequences."""
        return rank // self.context

    def piece(self, rank: int) -> int:
        """Of the pieces of a sequence, in order."""
        return rank % self.context

    def holder(self, rank: int) -> int:
        """Of the shares of all experts."""
        return rank % self.expert

    def experts(self, rank: int, config: ModelConfig) -> slice:
        """The experts that a rank holds."""
        return share(config.experts, self.expert, self.holder(rank))

    def parts(
        self,
        rank: int,
        arrays: Mapping[str, Any],
        config: ModelConfig,
        *,
        rows: int,
        sizes: Sequence[int] | None = None,
        cuts: Sequence[int] | None = None,
    ) -> list[Part]:
        """The parts of a batch that a rank computes, one after the other: as many for every rank,
        since ranks meet inside a forward; some have no tokens.

        Args:
            arrays: of `forward`, of the whole batch.
            rows: how many sequences a part has at most.
            sizes: sequences of each row of ranks, ``cuts``: where sequences are cut; by default
                even.
        """
        batch, length = arrays["tokens"].shape
        ends = even(batch, self.data)
        sizes = [b - a for a, b in pairwise(ends)] if sizes is None else sizes
        cuts = even(length, self.context)[1:-1] if cuts is None else cuts
        count = max(-(-max(sizes) // rows), 1)
        each = [[min(max(size - i * rows, 0), rows) for i in range(count)] for size in sizes]
        parts = by_rows(dict(arrays), [size for group in each for size in group])
        own = parts[self.row(rank) * count :][:count]
        if self.context == 1:
            return own
        return [by_positions(part.arrays, cuts, config)[self.piece(rank)] for part in own]

    def place(self, rank: int, rows: int, length: int) -> tuple[slice, slice]:
        """Which rows and positions of a batch a rank's parts are, if they are even."""
        own_rows = share(rows, self.data, self.row(rank))
        return own_rows, share(length, self.context, self.piece(rank))


def even(count: int, parts: int) -> list[int]:
    """Where each of the nearly equal parts of ``count`` things begins, and the end of the last."""
    return [count * i // parts for i in range(parts + 1)]


def share(count: int, parts: int, part: int) -> slice:
    """One of those parts."""
    ends = even(count, parts)
    return slice(ends[part], ends[part + 1])


def make_grid(ranks: int, *, data: int | None = None, context: int = 1, expert: int = 1) -> Grid:
    """The grid of so many ranks; ``data`` is by default what the context leaves.

    CouldNotRun, naming the argument, unless data · context = ranks and ``expert`` divides ranks.
    """
    over = {"context_parallel": context, "expert_parallel": expert}
    for name, size in {"ranks": ranks, "data_parallel": data, **over}.items():
        if size is not None and size < 1:
            raise CouldNotRun(f"must be at least 1, got {size}", argument=name)
    for name, size in over.items():
        if ranks % size:
            raise CouldNotRun(f"must divide the {ranks} ranks, got {size}", argument=name)
    data = ranks // context if data is None else data
    if data * context != ranks:
        raise CouldNotRun(
            f"must be {ranks // context}, the {ranks} ranks over context_parallel={context}, got "
            f"{data}",
            argument="data_parallel",
        )
    return Grid(data, context, expert)
