"""``refimpl power``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..check.planted import FUNCTIONS, PLANTED, Planted
from ..errors import CouldNotRun
from ..port.compare import FACTOR
from ..port.power import (
    COLUMNS,
    OURS,
    PEERS,
    SMALL,
    TYPES,
    Draws,
    Row,
    clean_runs,
    false_alarms,
    kill,
    peers_table,
)
from .app import Json, app, check_writable, console, counted, progress, replace_json

Extra = Callable[[Planted], bool]


@app.command()
def power(
    draws: Annotated[int, typer.Option(help="Cases per op for other people's rules.")] = 40,
    clean: Annotated[int, typer.Option(help="Right runs per op and type, for false alarms.")] = 9,
    json_file: Json = None,
) -> None:
    """Show which rule catches which planted bug.

    A planted bug is an edit of one op's code. The first table has a row per bug and a column per
    rule of the checker. A draw is an op's case with its own inputs. The second table has a row per
    rule of other people: the share of draws in which the rule sees the bug, and how many bugs it
    never sees; then both numbers with gradients times 0.001. The last lines say how often right
    code is called wrong.

    If forward and backward share a mistake, they agree, and only golden values catch it. In a clone
    of the repository `make bugs` adds their column, and `make power` also torch's gradcheck and
    JAX's check_grads.
    """
    for name, number in (("draws", draws), ("clean", clean)):
        if number < 1:
            raise CouldNotRun(f"must be at least 1, got {number}", argument=name)
    raise typer.Exit(show(draws, clean, json_file, {}))


def show(draws: int, clean: int, json_file: Path | None, extra: dict[str, Extra]) -> int:
    """Measure and print everything; ``extra``: more columns, by what says whether a bug is caught.
    0, or 1 if a bug survives that a column should catch, or right code is called wrong."""
    if json_file is not None:
        check_writable(json_file)
    out, start = console(), time.perf_counter()
    out.print(f"refimpl {__version__}")
    rows = bugs_by_rule(out, extra)
    survivors = [row for row in rows if not row.caught and ("golden" in extra or is_ours(row.bug))]
    out.print()
    with progress("drawing") as move:
        peers = peers_table(draws, move)
    lines = peer_lines(peers)
    for line in lines:
        out.print(line)
    never = [x.bug for x in peers if not x.shown]
    if never:
        out.print(
            f"not shown by any of {draws} draws: " + ", ".join(f"{b.op}: {b.name}" for b in never)
        )
    out.print()
    alarms, checked = false_alarms()
    out.print(f"false alarms of the checker: {alarms} of {checked} clean examples")
    worst = worst_of(clean)
    wrong = sum(units > FACTOR for _, _, units in worst)
    most = max(units for _, _, units in worst)
    out.print(
        f"false alarms of {FACTOR} units: {wrong} of {len(worst)} clean runs in "
        f"{', '.join(TYPES)}; the furthest has {most:.1f}"
    )
    caught = sum(bool(row.caught) for row in rows)
    seconds = time.perf_counter() - start
    out.print(f"{caught} of {counted(len(rows), 'planted bug')} caught, {seconds:.0f} s")
    if json_file is not None:
        replace_json(json_file, content(rows, peers, draws, (alarms, checked), worst))
    return int(bool(survivors) or alarms > 0 or wrong > 0)


def is_ours(bug: Planted) -> bool:
    """Whether the checker alone can see it."""
    return not bug.shared and bug.op not in FUNCTIONS


def bugs_by_rule(out: Console, extra: dict[str, Extra]) -> list[Row]:
    """The table, a row as soon as it is known."""
    columns = [*COLUMNS, *extra]
    head = "".join(f"{c:>12}" for c in columns)
    out.print(f"{'op':<20}{'planted bug':<58}{'shown by':<40}{head}")
    rows = []
    with progress("planting") as move:
        for number, bug in enumerate(PLANTED):
            move(f"{bug.op}: {bug.name}", number, len(PLANTED))
            row = kill(bug)
            row = row._replace(caught=row.caught | {n for n, sees in extra.items() if sees(bug)})
            rows.append(row)
            marks = "".join(f"{'caught' if c in row.caught else '.':>12}" for c in columns)
            out.print(f"{bug.op:<20}{bug.name:<58}{bug.exposed_by:<40}{marks}")
    for column in columns:
        out.print(f"{column}: {sum(column in r.caught for r in rows)} of {len(rows)} caught")
    return rows


def peer_lines(peers: list[Draws]) -> list[str]:
    """Other people's rules beside ours, on the same draws."""
    total = sum(x.draws for x in peers)
    lines = [
        f"{len(peers)} bugs that forward and backward do not share, {peers[0].draws} draws each",
        f"{'rule':<22}{'of the draws':>14}{'never':>8}{f'gradients × {SMALL:g}':>20}{'never':>8}",
    ]
    for rule in (OURS, *PEERS):
        shares = [sum(getattr(x, of)[rule] for x in peers) / total for of in ("seen", "seen_small")]
        never = [sum(not getattr(x, of)[rule] for x in peers) for of in ("seen", "seen_small")]
        lines.append(f"{rule:<22}{shares[0]:>14.0%}{never[0]:>8}{shares[1]:>20.0%}{never[1]:>8}")
    return lines


def worst_of(clean: int) -> list[tuple[str, str, float]]:
    """Clean runs, with a bar."""
    found: list[tuple[str, str, float]] = []
    with progress("clean runs") as move:
        for run in clean_runs(clean):
            found.append(run)
            move(run[0], len(found), 0)
    return found


def content(
    rows: list[Row],
    peers: list[Draws],
    draws: int,
    alarms: tuple[int, int],
    worst: list[tuple[str, str, float]],
) -> dict[str, Any]:
    """The results for --json."""
    bugs = [
        {
            "op": row.bug.op,
            "name": row.bug.name,
            "exposed_by": row.bug.exposed_by,
            "shared": row.bug.shared,
            "caught": sorted(row.caught),
            "tensors": list(row.tensors),
        }
        for row in rows
    ]
    seen = [
        {"op": x.bug.op, "name": x.bug.name, "seen": x.seen, "seen_small": x.seen_small}
        for x in peers
    ]
    return {
        "refimpl": __version__,
        "bugs": bugs,
        "draws": {"number": draws, "factor": SMALL, "bugs": seen},
        "false_alarms": {"checker": alarms[0], "of": alarms[1]},
        "clean_runs": [{"op": op, "type": dtype, "units": units} for op, dtype, units in worst],
    }
