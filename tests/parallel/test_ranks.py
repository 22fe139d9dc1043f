"""Several ranks give one process's gradients and steps: as threads, and as processes under MPI."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.parallel.grid import Grid
from refimpl.parallel.ranks import Ranks

from parallel.alike import Drawn, draw, grids, meet, off_gradients, off_steps
from parallel.threads import each, in_threads
from support import FULL

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py: pip install -e '.[parallel]'"
)
MPIEXEC = Path(sys.executable).parent / "mpiexec"


@settings(max_examples=200 if FULL else 30, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_gradients_in_threads(data: st.DataObject, ranks: int) -> None:
    case: Drawn = draw(data, ranks)
    assert each(in_threads(ranks, partial(off_gradients, case=case))) <= 1e-12  # seen: 9e-14


def test_threads_meet_as_processes_do() -> None:
    in_threads(4, meet)


def test_the_order_of_sums() -> None:
    """(parallel.6): (1 + 10¹⁶) − 10¹⁶ = 0 in float64, in any other order of the ranks 1."""

    def work(group: Any) -> Any:
        gradient = np.full(6, [1.0, 1e16, -1e16][group.rank])
        return Ranks(Grid(3), group).reduced({"w": gradient})["w"]

    assert np.array_equal(np.concatenate(in_threads(3, work)), np.zeros(6))


@pytest.mark.parametrize("grid", grids(4) if FULL else [grids(2)[0], grids(4)[5]], ids=str)
def test_steps_in_threads(grid: object) -> None:
    ranks = grid.ranks  # type: ignore[attr-defined]
    assert each(in_threads(ranks, partial(off_steps, grid=grid))) <= 1e-10


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "examples", "trained"), [(2, 60, 4), (4, 60, 3)] if FULL else [(2, 12, 1), (4, 8, 0)]
)
def test_under_mpi(ranks: int, examples: int, trained: int) -> None:
    """One launch runs all drawn splits."""
    command = [MPIEXEC, "-n", str(ranks), sys.executable, Path(__file__).with_name("alike.py")]
    done = subprocess.run(
        [*command, str(examples), str(trained)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["examples"] >= examples
    assert found["gradients"] <= 1e-12
    assert found["steps"] <= 1e-10
