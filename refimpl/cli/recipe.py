"""``refimpl recipe``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import CouldNotRun, printable
from ..files import held, write_text
from ..train.claims import Claim
from ..train.graph import run_graph
from ..train.machine import open_machine
from ..train.plots import draw
from ..train.recipe import JOBS, PROBLEMS, Job, Recipe, Task, chosen, toy
from ..train.report import report
from ..train.results import gather, record_commit, write_results
from ..train.settings import toml_value
from .app import app, console

Option = typer.Option


@app.command("recipe")
def recipe_command(
    out: Annotated[
        Path | None,
        Option(help="Folder of jobs and results. If interrupted, run the same command again."),
    ] = None,
    small: Annotated[
        bool, Option("--toy", help="Tiny jobs that take seconds, to see that everything runs.")
    ] = False,
    workers: Annotated[int, Option(help="Number of jobs at a time, each with one thread.")] = 2,
    problems: Annotated[
        int, Option(help="Most held-out problems per kind in an evaluation.")
    ] = PROBLEMS,
    backend: Annotated[str | None, Option(help="numpy, or cupy for a GPU.")] = None,
    implementation: Annotated[
        str | None, Option(help="Implementation of the ops; default: the fastest installed.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Type: float32, float64, or on a GPU bfloat16.")
    ] = None,
    only: Annotated[
        list[str] | None,
        Option(help="Run this job and the jobs that it needs; may be given several times."),
    ] = None,
    list_: Annotated[bool, Option("--list", help="Show the jobs and exit.")] = False,
) -> None:
    """Run the whole recipe, from text to a student.

    It runs every stage and its controls, writes results.json, report.md and pictures, and shows
    which claims hold.
    """
    jobs = chosen(toy(JOBS) if small else JOBS, only or [])
    if list_:
        console().print(table_of(jobs))
        return
    if out is None:
        raise CouldNotRun("must name the folder of the jobs", argument="out")
    for name, value in (("workers", workers), ("problems", problems)):
        if value < 1:
            raise CouldNotRun(f"must be at least 1, got {value}", argument=name)
    options = {"backend": backend, "implementation": implementation, "dtype": dtype}
    common = {name: x for name, x in options.items() if x is not None}
    open_machine(**common)  # fails here rather than in every job
    recipe = Recipe(out, jobs, problems, common)
    with held(out):
        run_jobs(recipe, workers)
        claims = write_all(recipe, workers, small)
    console().print(verdicts(claims))
    if small:
        console().print("toy size: this shows that everything runs; the numbers mean nothing")
    elif any(claim.holds is False for claim in claims):
        raise typer.Exit(1)


def command_line(task: Task | None) -> list[str] | None:
    """What runs a task in a process of its own."""
    if task is None:
        return None
    line = [sys.executable, "-m", "refimpl", task.command]
    for name, value in task.options.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            line += [option] if each is True else [option, str(each)]
    return line


def run_jobs(recipe: Recipe, workers: int) -> None:
    """At Ctrl-C a line says how to resume."""
    try:
        with live() as (tell, show):
            run_graph(
                recipe.needs,
                lambda name: command_line(recipe.next_task(name)),
                recipe.out,
                workers=workers,
                begins=partial(record_commit, recipe.out),
                tell=tell,
                show=show,
            )
    except KeyboardInterrupt:
        typer.echo("stopped: run the same command again to resume", err=True)
        raise


def write_all(recipe: Recipe, workers: int, small: bool) -> list[Claim]:
    """The results, the pictures where matplotlib is, the report; the claims."""
    results = gather(recipe, workers=workers, toy=small)
    write_results(recipe.out / "results.json", results)
    try:
        pictures = draw(results, recipe.out / "pictures")
    except CouldNotRun as error:
        typer.echo(str(error), err=True)
        pictures = []
    write_text(recipe.out / "report.md", report(results, pictures, "pictures"))
    console().print(f"{recipe.out / 'results.json'}, {recipe.out / 'report.md'}")
    return [Claim(**x) for x in results["claims"]]


@contextmanager
def live() -> Iterator[tuple[Callable[[str], None], Callable[[list[str]], None]]]:
    """How a line is told, and how the state of all is shown: on a terminal's standard error lines
    that move, elsewhere nothing."""
    if not sys.stderr.isatty():
        yield (lambda line: print(line, file=sys.stderr, flush=True)), (lambda lines: None)
        return
    terminal = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with Live(console=terminal, refresh_per_second=5, transient=True) as moving:

        def show(lines: list[str]) -> None:
            text = Text("\n".join(map(printable, lines)), no_wrap=True, overflow="ellipsis")
            moving.update(text)

        yield (lambda line: terminal.print(printable(line))), show


def verdicts(claims: Sequence[Claim]) -> Table:
    table = Table("claim", "numbers", "bound", "", box=None)
    for claim in claims:
        table.add_row(claim.name, claim.numbers, claim.bound, claim.verdict)
    return table


def table_of(jobs: Sequence[Job]) -> Table:
    table = Table("job", "stage", "begins from", "settings", box=None)
    for job in jobs:
        settings = ", ".join(f"{name} {toml_value(x)}" for name, x in job.settings.items())
        table.add_row(job.name, job.stage, ", ".join(job.inputs.values()), settings)
    return table
