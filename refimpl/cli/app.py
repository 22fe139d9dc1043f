"""What the commands share: the application, its errors, common options, the console, and the file
of --json."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from .. import __version__
from ..config import CONVENTIONS
from ..errors import CouldNotRun, printable
from ..files import expect_replaceable, write_json

GROUPS: dict[str, tuple[str, list[str]]] = {  # the commands by use, with an example of each group
    "Check a gradient": ("grade swiglu mine.py", ["verify", "grade", "power"]),
    "Check a port": (
        "check mine.safetensors --against truth",
        ["grads", "check", "vectors", "conventions"],
    ),
    "Use a checkpoint": ("generate --checkpoint DIR --prompt 2+3=", ["generate", "count"]),
    "Train": (
        "recipe --toy --out runs",
        [
            *("train", "extend", "sft", "grpo", "reward-model", "distil"),
            *("reward", "eval", "recipe"),
        ],
    ),
    "Kernels and speed": ("bench --table", ["kernels", "bench", "memory"]),
}
ORDER = [command for _, commands in GROUPS.values() for command in commands]
FIRST = """\
refimpl verify                    check every gradient of this package, on real text
refimpl grade swiglu mine.py      check a backward of yours: the exercises in derivations/
refimpl --help                    all commands by use: a port, a checkpoint, training, kernels"""
WIDTH = 118  # of a table that goes to a file or a pipe

CONVENTION = f"One of {', '.join(CONVENTIONS)}: whom to follow where implementations disagree."
Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]

# typer does not export the class of all errors of usage
UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)


class OutputClosed(Exception):
    """The program that read the output has stopped, as in ``refimpl verify | head``."""


class Commands(TyperGroup):
    """The commands. If one could not run, the line names its options as the user types them; the
    rest of the package knows only the arguments' names."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A section per group, with its example."""
        width = max(map(len, ORDER))
        for title, (example, commands) in GROUPS.items():
            helps = [self.commands[name].get_short_help_str(80) for name in commands]
            with formatter.section(f"{title} (refimpl {example})"):
                formatter.write_dl(
                    [(f"{c:{width}}", x) for c, x in zip(commands, helps, strict=True)]
                )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if error.filename is not None:
                raise
            raise OutputClosed from error  # typer would make an exit code 1 of it
        except KeyboardInterrupt as error:
            raise typer.Abort from error  # newer typers would make an exit code of it
        except CouldNotRun as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            given = command.params if command is not None else []
            options = {x.name: x.opts[0] for x in given if x.name and x.opts[0].startswith("--")}
            raise CouldNotRun(error.spelled(options)) from error


app = typer.Typer(cls=Commands, rich_markup_mode=None)


def usage_line(error: Any) -> str:
    """One line for a `UsageError`: the fault, and where to read on."""
    what = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "refimpl"
    return printable(f"{what[:1].lower()}{what[1:]}; see {command} --help")


@app.callback(invoke_without_command=True)
def refimpl(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Check, differentiate, run and measure DeepSeek-V3/R1 in NumPy, without autograd.

    Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why; 70: a
    fault of ours, and one line asks for a report.
    """
    if version:
        print(f"refimpl {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(FIRST)


class PlainConsole(Console):
    """Standard output. Text is shown as it is: no markup, no emoji, and characters that a terminal
    would take as a command are escaped."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def print(self, *objects: Any, **given: Any) -> None:
        shown = [
            "\n".join(map(printable, x.split("\n"))) if isinstance(x, str) else x for x in objects
        ]
        super().print(*shown, **given)

    def on_broken_pipe(self) -> None:
        raise OutputClosed


def console() -> Console:
    """Wide enough for the table: a narrow terminal wraps its lines, because a number that is cut is
    a wrong number."""
    console = PlainConsole()
    console.width = max(console.width, WIDTH) if sys.stdout.isatty() else WIDTH
    return console


def counted(count: int, noun: str) -> str:
    """As in 1 prompt, 2 prompts, 1,000 prompts."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


@contextmanager
def refused(said: Mapping[str, str] | None = None) -> Iterator[None]:
    """CouldNotRun for a ValueError or TypeError whose message begins with the wrong argument, as in
    ``seed must be at least 0``.

    Args:
        said: for arguments that are not options, the beginning of the line instead.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        argument, _, wrong = str(error).partition(" ")
        if said and argument in said:
            raise CouldNotRun(f"{said[argument]} {wrong}") from error
        raise CouldNotRun(wrong, argument=argument) from error


def expect_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """CouldNotRun unless the value is one of the choices."""
    if value not in choices:
        raise CouldNotRun(f"must be one of {', '.join(choices)}, got {value}", argument=argument)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function that moves a bar on a terminal's standard error; it takes the current step, the
    number of steps done, and the number of all."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}")
    shown = sys.stderr.isatty()
    with Progress(
        *columns,
        description,
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe goes there
    ) as bar:
        task = bar.add_task("", total=None)

        def move(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        yield move


def check_writable(path: Path, option: str = "--json") -> None:
    """CouldNotRun, before any work is done, if no file can be written there."""
    try:
        expect_replaceable(path)
    except OSError as error:
        raise CouldNotRun(f"{option} {path} can't be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise CouldNotRun(
            f"{option} {path} can't be written: its folder is missing or not writable"
        )


def replace_json(path: Path, content: dict[str, Any], option: str = "--json") -> None:
    """Write the results, whole or not at all."""
    try:
        write_json(path, _finite(content))
    except OSError as error:
        raise CouldNotRun(f"{option} {path} can't be written: {error.strerror}") from error


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
