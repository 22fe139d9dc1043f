"""Gradients found by several ranks: the files that one process writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint.source import MemorySource
from refimpl.errors import CouldNotRun
from refimpl.grads import Request, check_shared, shared_gradients, write_gradients
from refimpl.parallel.grid import Grid
from refimpl.parallel.ranks import Ranks

from grads.examples import RNG, TINY, read
from parallel.threads import in_threads
from random_parameters import random_parameters

GRIDS = (Grid(2), Grid(1, 2, 2), Grid(2, 2, 4), Grid(3, 1, 3))


@pytest.mark.parametrize(("tied", "alpha"), [(False, 0.2), (True, 0.0)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_same_files(grid: Grid, tied: bool, alpha: float, tmp_path: Path) -> None:
    """Names, types, choices and loads the same, numbers to rounding; a rank has no sequence in
    some grids."""
    config = replace(TINY, tied=tied)
    source = MemorySource(random_parameters(config), config)
    request = Request(
        RNG.integers(0, config.vocabulary, (2, 9)),
        key_mask=np.arange(9) < np.array([[9], [6]]),
        mtp=True,
        balance_alpha=alpha,
    )
    alone = write_gradients(source, request, tmp_path / "alone")

    def work(group: Any) -> Any:
        ranks = Ranks(grid, group)
        if ranks.rank:
            return shared_gradients(source, request, ranks)
        found = lambda: shared_gradients(source, request, ranks)  # noqa: E731
        return write_gradients(source, request, tmp_path / "shared", shared=found)

    result = in_threads(grid.ranks, work)[0]
    wanted, found = read(tmp_path / "alone"), read(tmp_path / "shared")
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype
        if x.dtype != np.float64:
            assert np.array_equal(found[name], x), name
        else:
            off = np.max(np.abs(found[name] - x), initial=0)
            assert off <= 1e-12 * np.max(np.abs(x), initial=0), name  # seen: 2e-14
    assert result.gradients.keys() == alone.gradients.keys()
    assert abs(result.loss - alone.loss) <= 1e-14


@pytest.mark.parametrize(
    ("argument", "value"),
    [("units", ("float32",)), ("activations", "*"), ("split", "rows=1+1"), ("dlogits", 1.0)],
)
def test_what_one_process_alone_gives(argument: str, value: Any) -> None:
    request = replace(Request(np.zeros((2, 5), int)), **{argument: value})
    with pytest.raises(CouldNotRun) as error:
        check_shared(request)
    line = f"{argument} can't be had from several ranks: leave out ranks"
    assert str(error.value) == line
