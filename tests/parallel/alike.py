"""Several ranks beside one process: the gradients of drawn batches, and twenty steps of training.

`test_ranks.py` runs it in threads, and under mpiexec as

    mpiexec -n 4 python tests/parallel/alike.py 20 1

(so many examples, and steps on so many grids) where the first rank prints what was found, as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.config import ModelConfig
from refimpl.errors import CouldNotRun
from refimpl.optimizer import AdamW, Moments
from refimpl.parallel.grid import Grid
from refimpl.parallel.ranks import Ranks
from refimpl.train.shared import own_state, whole_state
from refimpl.train.step import State, loss_gradients, train_step

from drawn_batches import SMALL, cut_rows, cuts, drawn
from random_parameters import random_parameters
from small_stage import MACHINE, far

Arrays = dict[str, Any]
LEAST = 1e-4


class Drawn(NamedTuple):
    """A batch, and how it is split over ranks."""

    config: ModelConfig
    arrays: Arrays
    grid: Grid
    rows: int  # of a part, at most
    sizes: list[int]  # sequences of each row of ranks
    cuts: list[int]  # of the sequences


def grids(ranks: int) -> list[Grid]:
    """Each kind of split alone, and together."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [Grid(ranks // c, c, e) for c in divisors for e in divisors]


def draw(data: st.DataObject, ranks: int) -> Drawn:
    """Uneven parts, ranks without tokens, padding, packed documents, MTP depth 0 to 2."""
    config, arrays, _ = drawn(data)
    grid = data.draw(st.sampled_from(grids(ranks)))
    rows, length = arrays["tokens"].shape
    sizes, ends = cut_rows(data, rows, grid.data), cuts(data, length, grid.context)
    return Drawn(config, arrays, grid, data.draw(st.integers(1, 3)), sizes, ends)


def off_gradients(world: Any, case: Drawn) -> float:
    """How far losses and gradients are from one process's, of the largest value; the same on all
    ranks.

    A gradient that is 0 but for rounding (as of queries whose keys all have the same value: 1e-18)
    has no size of its own: the least is `LEAST` of the largest gradient.
    """
    config, arrays, grid = case[:3]
    params = random_parameters(config)
    ranks = Ranks(grid, world)
    parts = grid.parts(ranks.rank, arrays, config, rows=case.rows, sizes=case.sizes, cuts=case.cuts)
    own = ranks.own_parameters(params, config)
    machine = replace(MACHINE, ranks=ranks)
    told, slices = loss_gradients(own, arrays, config, machine, parts=parts)
    found = ranks.whole_gradients(slices, own)

    def compare() -> float:
        wanted, gradients = loss_gradients(params, arrays, config, MACHINE)
        assert found is not None
        assert all(np.array_equal(told.loads[layer], x) for layer, x in wanted.loads.items())
        assert found.keys() == gradients.keys()
        sizes = {name: float(np.max(np.abs(x))) for name, x in gradients.items()}
        least = LEAST * max(sizes.values())
        off = [np.max(np.abs(found[n] - gradients[n])) / max(x, least) for n, x in sizes.items()]
        losses = [np.array([x.loss, x.main, *x.mtp, x.balance]) for x in (told, wanted)]
        return float(max(*off, np.max(np.abs(losses[0] - losses[1]))))

    return float(world.first(compare))


def off_steps(world: Any, grid: Grid) -> float:
    """How far parameters and moments are after twenty steps; every load, and so every route that
    counts, must be the same."""
    config = replace(SMALL, layers=3, mtp_depth=1)
    rng, optimizer = np.random.default_rng(0), AdamW()
    batches = [{"tokens": rng.integers(0, 31, (5, 9))} for _ in range(20)]
    ranks = Ranks(grid, world)

    def train(state: State, machine: Any) -> tuple[State, list[Any]]:
        loads = []
        for arrays in batches:
            state, told = train_step(
                state, arrays, config, machine, optimizer, learning_rate=1e-2, max_norm=0.5, rows=2
            )
            assert told.norm > 0.5  # the gradients are clipped
            loads.append(told.loads)
        return state, loads

    def start() -> State:
        return State(random_parameters(config), Moments())

    state, loads = train(own_state(start(), config, ranks), replace(MACHINE, ranks=ranks))
    found = whole_state(state, ranks)

    def compare() -> float:
        wanted, expected = train(start(), MACHINE)
        for a, b in zip(loads, expected, strict=True):
            assert all(np.array_equal(a[layer], b[layer]) for layer in b)
        moments = zip(found.moments[1:3], wanted.moments[1:3], strict=True)
        return max(far(found.params, wanted.params), *(far(dict(a), dict(b)) for a, b in moments))

    return float(world.first(compare))


def meet(world: Any) -> None:
    """What each rank gets of the others, also an error of the first with its arguments' names."""
    rank, size = world.rank, world.size
    assert world.gather(rank) == [*range(size)]
    assert world.collect(rank) == (None if rank else [*range(size)])
    assert world.swap([(rank, other) for other in range(size)]) == [(x, rank) for x in range(size)]
    assert world.rotate(rank) == (rank - 1) % size
    assert world.split(rank % 2).gather(rank) == [*range(rank % 2, size, 2)]
    assert world.first(lambda: rank) == 0

    def fail() -> None:
        raise CouldNotRun("is wrong", argument="out", remedy="resume")

    with pytest.raises(CouldNotRun) as error:
        world.first(fail)
    assert error.value.spelled({"out": "--out"}) == "--out is wrong resume"


def main(examples: int, trained: int) -> None:
    from refimpl.parallel.launch import join

    world, worst = join(None).world, [0.0]
    meet(world)

    @settings(
        max_examples=examples,
        derandomize=True,  # so that all ranks draw the same
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def gradients(data: st.DataObject) -> None:
        case = draw(data, world.size)
        off = off_gradients(world, case)
        assert off <= 1e-12, f"{case.grid}: {off}"
        worst.append(off)

    gradients()
    steps = [off_steps(world, grid) for grid in grids(world.size)[::-1][:trained]]
    if world.rank == 0:
        print(
            json.dumps(
                {
                    "gradients": max(worst),
                    "examples": len(worst) - 1,
                    "steps": max(steps, default=0.0),
                }
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
