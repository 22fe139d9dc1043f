"""``refimpl eval``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..train.evaluate import MOST, measured
from ..train.machine import open_machine
from ..train.stage import begin_from
from ..train.tasks import KINDS, held_out
from .app import Json, app, check_writable, console, expect_choice, refused, replace_json


@app.command("eval")
def eval_command(
    checkpoint: Annotated[
        str, typer.Option(help="Folder of a checkpoint, or of a finished run of training.")
    ],
    kind: Annotated[
        list[str] | None, typer.Option(help="Kind of problems; may be given several times.")
    ] = None,
    problems: Annotated[
        int, typer.Option(min=0, help="Number of held-out problems of each kind; 0: all.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = MOST,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled answers.")] = 0,
    backend: Annotated[str, typer.Option(help="numpy, or cupy for a GPU.")] = "numpy",
    implementation: Annotated[
        str, typer.Option(help="Implementation of the ops; fastest: the fastest installed.")
    ] = "fastest",
    dtype: Annotated[
        str, typer.Option(help="Type: float32, float64, or on a GPU bfloat16.")
    ] = "float32",
    json_file: Json = None,
) -> None:
    """Count right answers to held-out problems.

    The table has a row per kind and way of answering: greedy always takes the most probable token,
    sampled draws one answer per problem at temperature 1. Its columns:

    \b
    right: share of right answers, with its 95 % interval
    format: share of answers in the right format
    tokens: mean number of tokens per answer
    """
    if json_file is not None:
        check_writable(json_file)
    kinds = tuple(dict.fromkeys(kind or ["add2"]))
    for name in kinds:
        expect_choice("kind", name, KINDS)
    with refused({"count": "--problems"}):
        given = {name: held_out(name, problems or None) for name in kinds}
    machine = open_machine(backend, implementation, dtype)
    begin = begin_from(checkpoint, machine, mtp=False)
    table = Table("problems", "answers", "right", "95 % interval", "format", "tokens", box=None)
    results = {}
    for name in kinds:
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            found = measured(
                begin.params,
                begin.config,
                begin.vocabulary,
                machine,
                given[name],
                temperature=temperature,
                max_tokens=max_tokens,
                seed=seed,
            )
            table.add_row(
                f"{found.problems:,} {name}",
                how,
                f"{found.accuracy:.3f}",
                f"{found.low:.3f}…{found.high:.3f}",
                f"{found.format:.3f}",
                f"{found.tokens:.1f}",
            )
            results[f"{name} {how}"] = found._asdict()
    console().print(table)
    if json_file is not None:
        replace_json(json_file, {"checkpoint": checkpoint, "seed": seed, "results": results})
