"""``refimpl count``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from .. import __version__
from ..checkpoint import load_config
from ..config import PRESETS
from ..count import count
from .app import WIDTH, Json, app, check_writable, console, replace_json


@app.command("count")
def count_command(
    model: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(PRESETS)}; or the path of a config.json or of its folder."
        ),
    ] = "v3",
    length: Annotated[int, typer.Option(help="Tokens per sequence, for the FLOPs.")] = 4096,
    json_file: Json = None,
) -> None:
    """Count a model's parameters, KV cache, FLOPs and cost.

    Each line has four columns: what is counted, the arithmetic, the exact number with its unit, and
    the same number rounded.
    """
    if json_file is not None:
        check_writable(json_file)
    config, out = load_config(model), console()
    sections = count(config, length=length)
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
        replace_json(
            json_file,
            {"model": model, "length": length, "config": asdict(config), "sections": tables},
        )
