"""``refimpl conventions``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..conventions import TRAPS, Trap, markdown, numbers
from ..errors import CouldNotRun
from .app import Json, app, check_writable, console, replace_json

AllNumbers = Annotated[
    list[int] | None, typer.Argument(help=f"Numbers in 1…{len(TRAPS)}; by default all.")
]


@app.command()
def conventions(
    traps: AllNumbers = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page derivations/conventions.md.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Show where papers and implementations disagree.

    For each place: who does what, the field of ours that decides it with its default, and the
    numbers that the choice changes.
    """
    chosen = traps or range(1, len(TRAPS) + 1)
    if wrong := [n for n in chosen if not 1 <= n <= len(TRAPS)]:
        raise CouldNotRun(f"trap must lie in 1 … {len(TRAPS)}, got {wrong[0]}")
    if as_markdown and traps:
        raise CouldNotRun("--markdown prints the whole page: it cannot be combined with numbers")
    if json_file is not None:
        check_writable(json_file)
    if as_markdown:
        print(markdown(), end="")
    else:
        out = console()
        for number in chosen:
            _show(out, number, TRAPS[number - 1])
    if json_file is not None:
        replace_json(json_file, {"traps": [_row(number, TRAPS[number - 1]) for number in chosen]})


def _show(out: Console, number: int, trap: Trap) -> None:
    title = Text.assemble((f"{number:>2}. {trap.title}", "bold"), f": {trap.question}")
    out.print(title, soft_wrap=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=18, no_wrap=True)
    table.add_column(max_width=out.width - 20)
    for name, what in trap.who.items():
        table.add_row(f"    {name}", what.replace("`", ""))
    if trap.absent:
        table.add_row("    –", "no such part, or not read: " + ", ".join(trap.absent))
    table.add_row("    ours", f"{trap.field.replace('`', '')}; default {trap.default}")
    if trap.checkpoint:
        table.add_row("", "(shows on checkpoints in FP8 alone; the numbers are of one tile)")
    for line in numbers(trap):
        table.add_row("    changes", line)
    out.print(table, "")


def _row(number: int, trap: Trap) -> dict[str, Any]:
    return {
        "number": number,
        "title": trap.title,
        "question": trap.question,
        "who": trap.who,
        "ours": trap.field,
        "default": trap.default,
        "needs_checkpoint": trap.checkpoint,
        "measured": trap.measured,
    }
