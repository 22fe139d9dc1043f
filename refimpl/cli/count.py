"""``refimpl count``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import __version__
from ..checkpoint import load_config
from ..config import PRESETS
from ..count import count
from ..count_parallel import PLAN, SEQUENCES, count_parallel, read_plan
from ..errors import CouldNotRun
from .app import WIDTH, Json, app, check_writable, console, replace_json


@app.command("count")
def count_command(
    model: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(PRESETS)}; or the path of a config.json or of its folder."
        ),
    ] = "v3",
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 4096,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help=f"Count memory and bytes sent per rank of a training step instead: {PLAN}.",
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(help=f"With --parallel: sequences per step; by default V3's {SEQUENCES:,}."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Count a model's parameters, KV cache, FLOPs and cost.

    Each line has four columns: the quantity, the arithmetic, the exact number with its unit, and
    the same number rounded.

    PLAN has the numbers of ranks:

    \b
    data: ranks that have different sequences
    context: ranks that have different pieces of each sequence
    expert: ranks that hold all experts of a layer between them, a divisor of
      data × context
    pipeline: ranks that have different layers

    For v3, the table also shows DeepSeek-V3's own plan.
    """
    if sequences is not None and parallel is None:
        raise CouldNotRun("needs --parallel", argument="sequences")
    plan = None if parallel is None else read_plan(parallel)
    if json_file is not None:
        check_writable(json_file)
    config, out = load_config(model), console()
    given: dict[str, Any] = {"model": model, "length": length}
    if plan is None:
        sections = count(config, length=length)
    else:
        many = SEQUENCES if sequences is None else sequences
        sections = count_parallel(config, plan, sequences=many, length=length)
        given |= {"parallel": plan._asdict(), "sequences": many}
    out.print(f"refimpl {__version__}: {model}")
    free = max(min(out.width, WIDTH) - 35, 20)  # what figures leave to names and arithmetic
    for section in sections:
        table = Table(
            box=None,
            show_header=False,
            pad_edge=False,
            title=f"\n{section.title}",
            title_justify="left",
        )
        table.title_style = "bold"
        table.add_column(width=free * 4 // 9)
        table.add_column(width=free - free * 4 // 9)
        table.add_column(width=22, justify="right", no_wrap=True)
        table.add_column(width=9, justify="right", no_wrap=True)
        for line in section.lines:
            table.add_row(line.name, line.arithmetic, line.text, line.short)
        out.print(table)
        for note in section.notes:
            out.print(note, soft_wrap=False)
    if json_file is not None:
        tables = [
            {**asdict(section), "lines": [line._asdict() for line in section.lines]}
            for section in sections
        ]
        replace_json(json_file, given | {"config": asdict(config), "sections": tables})
