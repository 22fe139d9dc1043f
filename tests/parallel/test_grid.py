"""Which rank has what: every sequence, position and expert once, and grids that can't be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import CouldNotRun
from refimpl.parallel.grid import Grid, make_grid

from drawn_batches import SMALL


@given(*(st.integers(*ends) for ends in ((1, 3), (1, 3), (1, 7), (2, 9), (1, 4))))
def test_every_token_once(data: int, context: int, batch: int, length: int, rows: int) -> None:
    """And as many parts for every rank, none of more than ``rows`` sequences."""
    grid, config = Grid(data, context), replace(SMALL, mtp_depth=1)
    tokens = np.arange(batch * length).reshape(batch, length)
    config = replace(config, vocabulary=batch * length)
    parts = [grid.parts(rank, {"tokens": tokens}, config, rows=rows) for rank in range(grid.ranks)]
    assert len({len(each) for each in parts}) == 1
    seen = []
    for rank, each in enumerate(parts):
        own = []
        for part in each:
            found = part.arrays["tokens"]
            assert len(found) <= rows
            own.append(found[:, : found.shape[1] - part.follow])
        where = grid.place(rank, batch, length)
        assert np.array_equal(np.concatenate(own), tokens[where])
        seen += [x for part in own for x in part.ravel()]
    assert sorted(seen) == list(range(batch * length))


def test_every_expert_once() -> None:
    """In each group of holders, unevenly; the replicas hold the same."""
    grid, config = Grid(data=6, expert=3), replace(SMALL, experts=8, groups=1, keep_groups=1)
    held = [range(8)[grid.experts(rank, config)] for rank in range(6)]
    assert [[*x] for x in held[:3]] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert held[3:] == held[:3]


@pytest.mark.parametrize(
    ("ranks", "given", "line"),
    [
        (4, {"context": 3}, "context_parallel must divide the 4 ranks, got 3"),
        (4, {"expert": 3}, "expert_parallel must divide the 4 ranks, got 3"),
        (4, {"data": 2}, "data_parallel must be 4, the 4 ranks over context_parallel=1, got 2"),
        (4, {"data": 4, "context": 2}, "data_parallel must be 2, the 4 ranks over context_paral"),
        (0, {}, "ranks must be at least 1, got 0"),
        (2, {"expert": 0}, "expert_parallel must be at least 1, got 0"),
    ],
)
def test_refused(ranks: int, given: dict[str, int], line: str) -> None:
    with pytest.raises(CouldNotRun) as error:
        make_grid(ranks, **given)
    assert str(error.value).startswith(line)


def test_what_is_left() -> None:
    assert make_grid(6, context=3, expert=2) == Grid(2, 3, 2)
