"""``refimpl conventions``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..conventions import SYMPTOMS, TRAPS, Trap, find, markdown, numbers, rows
from ..errors import CouldNotRun
from .app import Json, app, check_writable, console, replace_json

Chosen = Annotated[
    list[str] | None,
    typer.Argument(
        help=f"Numbers in 1…{len(TRAPS)}, or words such as rope or padding; by default all."
    ),
]


@app.command()
def conventions(
    traps: Chosen = None,
    symptoms: Annotated[
        bool, typer.Option("--symptoms", help="List symptoms, and the traps to look at.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page derivations/conventions.md.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Show where papers and implementations disagree.

    Such a place is called a trap. For each trap the command shows who does what and how we know,
    our field that decides it with its default, how to tell from outside which choice somebody made,
    and the numbers that change.
    """
    chosen = list(dict.fromkeys(n for word in traps for n in _numbers(word))) if traps else EVERY
    if as_markdown and (traps or symptoms):
        raise CouldNotRun(
            "--markdown prints the whole page: it cannot be combined with --symptoms or traps"
        )
    if symptoms and traps:
        raise CouldNotRun("--symptoms prints the whole index: it cannot be combined with traps")
    if json_file is not None:
        check_writable(json_file)
    if as_markdown:
        print(markdown(), end="")
    elif symptoms:
        _show_symptoms(console())
    else:
        out = console()
        for number in chosen:
            _show(out, number, TRAPS[number - 1])
    if json_file is not None:
        replace_json(json_file, {"traps": [_row(number, TRAPS[number - 1]) for number in chosen]})


EVERY = list(range(1, len(TRAPS) + 1))


def _numbers(word: str) -> list[int]:
    """The traps that a number or a word names; CouldNotRun if there is no such trap."""
    if word.isdecimal():
        if int(word) not in EVERY:
            raise CouldNotRun(f"trap must lie in 1 … {len(TRAPS)}, got {word}")
        return [int(word)]
    if not (found := find(word)):
        raise CouldNotRun(
            f"trap must be a number or a word in a trap, got {word!r}: see --symptoms"
        )
    return found


def _show_symptoms(out: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=44)
    table.add_column(max_width=out.width - 46)
    for symptom in SYMPTOMS:
        titles = [f"{n}. {TRAPS[n - 1].title}" for n in rows(symptom)]
        table.add_row(symptom, "; ".join(titles))
    out.print(table)


def _show(out: Console, number: int, trap: Trap) -> None:
    title = Text.assemble((f"{number:>2}. {trap.title}", "bold"), f": {trap.question}")
    out.print(title, soft_wrap=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=18, no_wrap=True)
    table.add_column(max_width=out.width - 20)
    for name, what in trap.who.items():
        table.add_row(f"    {name}", f"{what.text.replace('`', '')} ({what.source(name)})")
    if trap.absent:
        table.add_row("    –", "no such part, or not read: " + ", ".join(trap.absent))
    table.add_row("    ours", f"{trap.field.replace('`', '')}; default {trap.default}")
    table.add_row("    from outside", trap.tell.replace("`", ""))
    if trap.checkpoint:
        table.add_row("", "(shows only on checkpoints in FP8; the numbers are of one tile)")
    for line in numbers(trap):
        table.add_row("    changes", line)
    out.print(table, "")


def _row(number: int, trap: Trap) -> dict[str, Any]:
    return {
        "number": number,
        "title": trap.title,
        "question": trap.question,
        "who": {
            name: {"what": what.text, "how": what.how, "version": what.version(name)}
            | ({"test": what.test} if what.test else {})
            for name, what in trap.who.items()
        },
        "from_outside": trap.tell,
        "ours": trap.field,
        "default": trap.default,
        "needs_checkpoint": trap.checkpoint,
        "measured": trap.measured,
    }
