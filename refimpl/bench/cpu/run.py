"""All rows: each problem given to every column, which then take turns."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from ... import __version__
from ..measure import summary
from ..run import Failed, commit_of_checkout
from .columns import COLUMNS, TRUTH, Column
from .driver import Ended, Refused, Team
from .load import BUSY, Load
from .results import Cell, CpuResults, Measured
from .rows import Row

__all__ = ["Turn", "cores_of", "header", "measure_row", "measure_rows", "pick", "plan"]

SAMPLE = 2e-3  # seconds that a sample lasts at least
TURN = 0.15  # seconds that a turn lasts about
MOST_SAMPLES, MOST_TURNS = 20, 20
ENOUGH = 3  # quiet turns, without those that were not
LONG = 0.2  # seconds of a call, beyond which `ENOUGH` turns will do
# seconds; of a shorter call, the first of a turn is not timed: the caches were others' and the
# cores slept, so it takes longer than those that follow
COLD = 0.2
# seconds of a call, beyond which a column is left out: of a row alone, and of a point on a curve,
# whose next points take longer still
PATIENCE, PATIENCE_ALONG = 5.0, 2.5
BETWEEN = 0.03  # seconds between turns, about: a worker answers when its threads sleep
PACKAGES = ("numpy", "numba", "torch", "transformers", "jax")

Move = Callable[[str, int, int], None]  # what is done now, how many are done, how many there are


class Plan(NamedTuple):
    """How a column's time of a row is spent."""

    turns: int
    samples: int  # in a turn
    calls: int  # in a sample
    untimed: int  # calls before the samples of a turn

    def request(self) -> dict[str, int]:
        """Of a worker, for one turn."""
        return {"samples": self.samples, "calls": self.calls, "untimed": self.untimed}


class Turn(NamedTuple):
    """One turn of a column: samples in seconds per call."""

    samples: list[float]
    busy: float | None  # the share of the cores' time that others took


def cores_of(threads: int | None) -> list[int]:
    """The first so many cores of those that this process may use; all by default."""
    count = os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(count)
    if threads is not None and not 1 <= threads <= len(allowed):
        raise ValueError(f"threads must lie in 1…{len(allowed)}, the cores at hand, got {threads}")
    return list(allowed)[:threads]


def header(team: Team, commit: str | None, look: float = 1.0) -> CpuResults:
    """A run without rows yet: what and where, how busy the machine is, by a look of so many
    seconds, and the rate of the products."""
    load = Load(team.cores, team.pids)
    time.sleep(look)
    busy = load.share()
    versions = {"refimpl": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    with suppress(ImportError):
        from threadpoolctl import threadpool_info

        for library in threadpool_info():
            if library["user_api"] == "blas":  # which kernels it has chosen decides its speed
                versions["BLAS"] = " ".join(
                    str(library.get(key) or "")
                    for key in ("internal_api", "version", "architecture")
                )
    return CpuResults(
        device=model_name(),
        threads=len(team.cores),
        cores=list(team.cores),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        commit=commit or commit_of_checkout(),
        versions=versions,
        start_rate=team.ask(TRUTH, "rate")["rate"],
        busy=busy,
    )


def model_name() -> str:
    """The CPU's."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


class TooSlow(Refused):
    """Its call takes too long."""


Slow = dict[tuple[str, str], str]  # by group and column: the row of that curve that took too long


def measure_rows(
    team: Team, rows: Sequence[Row], columns: Sequence[Column], move: Move
) -> Iterator[Measured | Failed]:
    """Each row as it is measured. One that can't be is a `Failed`, and the others still are. A
    column that took too long is left out of the rest of the curve."""
    slow: Slow = {}
    for done, row in enumerate(rows):
        try:
            yield measure_row(
                team,
                row,
                columns,
                lambda what, n=done: move(what, n, len(rows)),  # type: ignore[misc]
                slow,
            )
        except (Refused, Ended) as error:
            yield Failed(row.name, str(error))


def measure_row(
    team: Team, row: Row, columns: Sequence[Column], say: Callable[[str], None], slow: Slow
) -> Measured:
    """The row by every column that can do it; why another can't is a note."""
    problem = {"problem": row.problem, "sizes": asdict(row.sizes)}
    found, notes = dict[str, Mapping[str, float | str | None]](), []
    with tempfile.TemporaryDirectory(prefix="refimpl-bench-") as truth:
        say(f"{row.name}: float64")
        team.ask(TRUTH, "truth", **problem, truth=truth)
        for column in (x.name for x in columns if row.problem in x.problems):
            if (row.group, column) in slow:
                notes.append(f"{column}: left out, as of {slow[row.group, column]}")
                continue
            say(f"{row.name}: {column}")
            try:
                first = team.ask(column, "prepare", **problem, truth=truth)
                expect_quick(team, column, first["first"], PATIENCE_ALONG if row.x else PATIENCE)
                found[column] = {**first, **team.ask(column, "peak")}
            except (Refused, Ended) as error:
                notes.append(f"{column}: {error}")
                if isinstance(error, TooSlow) and row.x:
                    slow[row.group, column] = row.name
    say(f"{row.name}: turns")
    seconds = {column: float(x["seconds"]) for column, x in found.items()}  # type: ignore[arg-type]
    turns, failed = take_turns(team, seconds, row)
    ready = [column for column in found if column not in failed]
    picked = {column: pick(turns[column]) for column in ready}
    for column in ready:
        team.ask(column, "drop")
    flops = row.what.flops(row.sizes)
    rate = team.ask(TRUTH, "rate")["rate"] if flops else None
    write = team.ask(TRUTH, "write", bytes=row.written)["seconds"] if row.written else None
    shares = [turn.busy for chosen in picked.values() for turn in chosen if turn.busy is not None]
    return Measured(
        name=row.name,
        shape=row.shape,
        flops=flops,
        x=row.x,
        columns={column: cell_of(found[column], picked[column]) for column in ready},
        rate=rate,
        write=write,
        busy=max(sum(shares) / len(shares), 0.0) if shares else None,
        notes=(*notes, *(f"{column}: {why}" for column, why in failed.items())),
    )


def expect_quick(team: Team, column: str, seconds: float, patience: float) -> None:
    """Refused, and the problem dropped, if the first call took longer than ``patience`` seconds and
    did not compile."""
    if seconds > patience and not COLUMNS[column].compiles:
        team.ask(column, "drop")
        raise TooSlow(f"left out: a call took {seconds:.1f} s")


def cell_of(found: Mapping[str, object], turns: Sequence[Turn]) -> Cell:
    samples = [x for turn in turns for x in turn.samples]
    kept: dict[str, Any] = {name: found[name] for name in ("peak", "error", "worst", "first")}
    return Cell(times=summary(samples, least=1), samples=len(samples), **kept)


def take_turns(
    team: Team, seconds: Mapping[str, float], row: Row
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """The turns of each column, and why a column stopped. In every round each column has one, but
    slow ones, with fewer turns in all, are left out of some.

    While others take more than `BUSY` of the cores' time, up to twice as many rounds.
    """
    plans = {
        column: plan(one, row.budget / len(seconds), row.turns) for column, one in seconds.items()
    }
    rounds = max((x.turns for x in plans.values()), default=0)
    turns: dict[str, list[Turn]] = {column: [] for column in seconds}
    failed: dict[str, str] = {}
    for number in range(2 * rounds):
        for column, planned in plans.items():
            wanted = planned.turns
            comes = (number + 1) * wanted // rounds > number * wanted // rounds
            if column in failed or not comes or len(quiet(turns[column])) >= wanted:
                continue
            load = Load(team.cores, team.pids)
            try:
                given = team.ask(column, "turn", **planned.request())["seconds"]
            except (Refused, Ended) as error:
                failed[column] = str(error)
                continue
            turns[column].append(Turn(given, load.share()))
    return turns, failed


def plan(seconds: float, budget: float, fewest: int) -> Plan:
    """For a call that takes so many seconds."""
    if seconds >= LONG:
        fewest = min(fewest, ENOUGH)
    calls = ceil(SAMPLE / seconds)
    turn = min(TURN, budget / fewest)
    samples = min(max(int(turn / (calls * seconds)), 1), MOST_SAMPLES)
    untimed = int(seconds < COLD)
    turns = int(budget / ((untimed + samples * calls) * seconds + BETWEEN))
    return Plan(min(max(turns, fewest), MOST_TURNS), samples, calls, untimed)


def quiet(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.busy is None or turn.busy <= BUSY]


def pick(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Those that count: while the machine was quiet, if there are enough of them; else the less
    busy half."""
    found = quiet(turns)
    if len(found) >= ENOUGH:
        return found
    return sorted(turns, key=lambda turn: turn.busy or 0.0)[: max(ceil(len(turns) / 2), 1)]
