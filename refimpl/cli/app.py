"""What the commands share: the application, its common options, the console, and files that are
never half-written."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import CouldNotRun

HELP = "Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why."
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=HELP)
WIDTH = 118  # of a table that goes to a file or a pipe

Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


def console() -> Console:
    """Wide enough for the table: a narrow terminal wraps its lines, since a number that is cut is a
    wrong number."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH) if sys.stdout.isatty() else WIDTH
    return console


def counted(count: int, noun: str) -> str:
    """As in 1 prompt, 2 prompts, 1,000 prompts."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what is done now, how many are done, how many there are) that moves a bar on a
    terminal's standard error."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}")
    shown = sys.stderr.isatty()
    with Progress(
        *columns, description, console=Console(stderr=True), transient=True, disable=not shown
    ) as bar:
        task = bar.add_task("", total=None)

        def move(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        yield move


def check_writable(path: Path) -> None:
    """CouldNotRun, before any work is done, if a file can't be made there."""
    if path.is_dir() or not path.name or not os.access(path.parent, os.W_OK):
        raise CouldNotRun(
            f"--json {path} can't be written: not a file in a folder that can be written to"
        )


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """Write the results beside their final place, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CouldNotRun(f"--json {path} can't be written: {error.strerror}") from error


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
