"""How time is spent, turns taken and chosen, on pretended workers."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest

from refimpl.bench.cpu import run
from refimpl.bench.cpu.columns import COLUMNS, TRUTH
from refimpl.bench.cpu.driver import Ended, Refused
from refimpl.bench.cpu.results import Measured
from refimpl.bench.cpu.rows import ROWS, TOY_ROWS
from refimpl.bench.cpu.run import Turn, cores_of, measure_rows, pick, plan
from refimpl.bench.run import Failed

COLUMN = {"reference": 2.0, "flash": 0.4, "torch": 1.0}  # seconds of a call


class FakeTeam:
    """Answers at once; keeps who was asked for what."""

    cores = (0,)
    first = 2.0

    def __init__(self, **failures: Exception) -> None:
        self.failures = failures  # by column_request
        self.asked: list[tuple[str, str]] = []

    def pids(self) -> list[int]:
        return []

    def ask(self, column: str, request: str, **given: Any) -> dict[str, Any]:
        self.asked.append((column, request))
        if f"{column}_{request}" in self.failures:
            raise self.failures[f"{column}_{request}"]
        if request == "prepare":
            return {"first": self.first, "error": 1e-7, "worst": "q"}
        if request == "peak":
            return {"peak": 10**6, "seconds": COLUMN.get(column, 1.0)}
        if request == "rate":
            return {"rate": 1e11}
        return (
            {"seconds": [COLUMN.get(column, 1.0)] * given["samples"]} if request == "turn" else {}
        )


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `Load` says, for good the last; nobody sleeps, and no call is long."""
    shares = [0.0]
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(run, "LONG", 100.0)
    monkeypatch.setattr(run.Load, "share", lambda self: shares.pop(0) if shares[1:] else shares[0])
    return shares


def measured(team: Any, name: str = "attention-512") -> list[Measured | Failed]:
    columns = [COLUMNS[x] for x in COLUMN]
    return list(measure_rows(team, [ROWS[name]], columns, lambda *_: None))


def test_plan() -> None:
    """Samples of 2 ms, turns of 0.15 s, as many as the budget has, but not too few or too many."""
    # 20 samples of 2 ms, and 30 ms between turns
    assert plan(1e-4, 0.75, 5) == (10, 20, 20, 1)
    assert plan(0.01, 100, 5) == (20, 15, 1, 1)
    assert plan(2.0, 20, 5) == (9, 1, 1, 0)
    assert plan(0.19, 0.5, 5) == (5, 1, 1, 1)
    assert plan(0.1, 2.4, 5) == (10, 1, 1, 1)  # the call that is not timed takes time too
    assert plan(2.0, 3, 5) == (3, 1, 1, 0)  # a long call
    assert plan(1e-3, 0.1, 2).samples * 2e-3 <= 0.05


def test_a_row(quiet: list[float]) -> None:
    """Everyone is prepared, turns alternate, all are dropped; slow columns have fewer turns, spread
    over the row."""
    team = FakeTeam()
    (found,) = measured(team)
    assert isinstance(found, Measured)
    assert team.asked[0] == (TRUTH, "truth")
    turns = [column for column, request in team.asked if request == "turn"]
    assert turns == [*COLUMN] * 5
    assert [x for x in team.asked if x[1] == "drop"] == [(x, "drop") for x in COLUMN]
    assert found.columns["flash"].times.median == 0.4
    assert found.columns["flash"].samples == 5
    assert (found.best, found.ratio("reference"), found.busy) == (1.0, 2.0, 0.0)
    assert (found.rate, found.write) == (1e11, None)


def test_slow_columns_have_fewer_turns(quiet: list[float]) -> None:
    """Spread over the row, so that drift hits all alike."""
    team = FakeTeam()
    measured(team, "attention-4096")  # 30 s: 10 for each
    turns = [column for column, request in team.asked if request == "turn"]
    assert {x: turns.count(x) for x in COLUMN} == {"reference": 5, "flash": 20, "torch": 9}
    places = [turns[:i].count("flash") for i, x in enumerate(turns) if x == "reference"]
    assert max(b - a for a, b in pairwise(places)) <= 4


def test_a_column_that_fails_is_a_note(quiet: list[float]) -> None:
    """Wherever it does; the others go on."""
    team = FakeTeam(flash_prepare=Refused("too large"), torch_turn=Ended("it died"))
    (found,) = measured(team)
    assert isinstance(found, Measured)
    assert list(found.columns) == ["reference"]
    assert found.notes == ("flash: too large", "torch: it died")
    assert [x for x in team.asked if x[0] == "torch"][-1] == ("torch", "turn")


def test_a_column_that_takes_too_long(quiet: list[float]) -> None:
    """Unless its first call compiled."""
    team = FakeTeam()
    team.first = 6.0
    (found,) = measured(team)
    assert isinstance(found, Measured)
    assert found.columns == {}
    assert found.notes[0] == "reference: left out: a call took 6.0 s"
    assert ("reference", "drop") in team.asked
    (found,) = measure_rows(team, [ROWS["block"]], [COLUMNS["torch-compile"]], lambda *_: None)
    assert isinstance(found, Measured)
    assert list(found.columns) == ["torch-compile"]


def test_the_rest_of_a_curve_is_not_tried(quiet: list[float]) -> None:
    """By a column that took too long; another curve is. A row alone may take longer."""
    team = FakeTeam()
    team.first = 3.0
    rows = [ROWS[name] for name in ("attention-512", "attention-1024", "head-8192", "block")]
    found = list(measure_rows(team, rows, [COLUMNS["flash"], COLUMNS["torch"]], lambda *_: None))
    notes = [row.notes[-1:] for row in found if isinstance(row, Measured)]
    late = "torch: left out: a call took 3.0 s"
    assert notes == [(late,), ("torch: left out, as of attention-512",), (late,), ()]
    assert team.asked.count(("torch", "prepare")) == 3


def test_a_row_without_its_truth(quiet: list[float]) -> None:
    team = FakeTeam(truth_truth=Ended("it died"))
    assert measured(team) == [Failed("attention-512", "it died")]


def test_busy_turns_are_made_again(quiet: list[float]) -> None:
    """And left out, where there are enough others."""
    quiet[:] = [0.5] * 6 + [0.0]  # two rounds
    team = FakeTeam()
    (found,) = measured(team)
    assert isinstance(found, Measured)
    turns = [column for column, request in team.asked if request == "turn"]
    assert {x: turns.count(x) for x in COLUMN} == {"reference": 7, "flash": 7, "torch": 7}
    assert found.columns["flash"].samples == 5
    assert found.busy == 0


def test_a_machine_that_stays_busy(quiet: list[float]) -> None:
    """Twice as many turns, the less busy half of them, and the row says so."""
    quiet[:] = [0.4]
    (found,) = measured(FakeTeam())
    assert isinstance(found, Measured)
    assert found.busy == pytest.approx(0.4)
    assert found.columns["torch"].samples == 5


def test_pick() -> None:
    turns = [Turn([float(i)], busy) for i, busy in enumerate((0.3, 0.05, 0.2, 0.0, 0.1))]
    assert pick(turns) == [turns[1], turns[3], turns[4]]
    assert pick(turns[:4]) == [turns[3], turns[1]]
    assert pick([Turn([1.0], None)]) == [Turn([1.0], None)]


def test_cores() -> None:
    everything = sorted(os.sched_getaffinity(0))
    assert cores_of(None) == everything
    assert cores_of(1) == everything[:1]
    for wrong in (0, len(everything) + 1):
        with pytest.raises(ValueError, match=rf"threads must lie in 1…{len(everything)}"):
            cores_of(wrong)


def test_toys_are_short() -> None:
    """The budget alone: 0.1 s for all columns together."""
    assert sum(row.budget for row in TOY_ROWS.values()) < 3
