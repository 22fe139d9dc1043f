"""What each rank of `test_ranks.py` runs, under mpiexec: drawn models, batches and splits, whose
gradients must be those of one process; and twenty steps of training. The first rank prints what
was found, as JSON.

    mpiexec -n 4 python tests/parallel/equal.py 20
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from drawn_batches import cut_rows, cuts, drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.parallel.grid import Grid
from refimpl.parallel.launch import join
from refimpl.parallel.ranks import Ranks
from refimpl.train.step import loss_gradients

from random_parameters import random_parameters
from small_stage import MACHINE, far

WORST = {"gradients": 0.0, "losses": 0.0, "steps": 0.0, "examples": 0}


def grids(ranks: int) -> list[Grid]:
    """Each split alone, and in pairs."""
    found = []
    for context in (c for c in range(1, ranks + 1) if ranks % c == 0):
        found += [Grid(ranks // context, context, e) for e in range(1, ranks + 1) if ranks % e == 0]
    return found


def alike(ranks: Ranks, data: st.DataObject) -> None:
    """The gradients of one drawn batch on every kind of grid."""
    config, arrays, _ = drawn(data)
    params = random_parameters(config)
    wanted_told, wanted = loss_gradients(params, arrays, config, MACHINE)
    grid = data.draw(st.sampled_from(grids(ranks.world.size)))
    rows, length = arrays["tokens"].shape
    sizes = cut_rows(data, rows, grid.data)
    ends = cuts(data, length, grid.context)
    ours = Ranks(grid, ranks.world)
    machine = replace(MACHINE, ranks=ours)
    parts = grid.parts(
        ours.rank, arrays, config, rows=data.draw(st.integers(1, 3)), sizes=sizes, cuts=ends
    )
    own = ours.own_parameters(params, config)
    told, slices = loss_gradients(own, arrays, config, machine, parts=parts)
    found = ours.whole_gradients(slices, own)

    def compare() -> tuple[float, float]:
        assert found is not None
        losses = [[x.loss, x.main, *x.mtp, x.balance] for x in (told, wanted_told)]
        off = max(
            abs(a - b) / max(abs(b), 1e-300) for a, b in zip(*losses, strict=True) if a != b or b
        )
        assert all(np.array_equal(told.loads[i], x) for i, x in wanted_told.loads.items())
        return far(found, wanted), off

    gradients, losses = ours.world.first(compare)
    assert gradients <= 1e-12, f"{grid}, {sizes}, {ends}: {gradients}"
    assert losses <= 1e-12, f"{grid}, {sizes}, {ends}: {losses}"
    WORST["gradients"] = max(WORST["gradients"], gradients)
    WORST["losses"] = max(WORST["losses"], losses)
    WORST["examples"] += 1


if __name__ == "__main__":
    ranks = join(None)

    @settings(
        max_examples=int(sys.argv[1]),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        alike(ranks, data)

    examples()
    if ranks.rank == 0:
        print(json.dumps(WORST))
