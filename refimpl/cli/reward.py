"""``refimpl reward``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import CouldNotRun
from ..files import parse_json, read_bytes, write_text
from ..train.rewards import score
from .app import Json, app, check_writable, console, counted, replace_json

MOST = 2**30  # bytes
PARTS = {
    "accuracy": "one <answer>…</answer>, which holds exactly the answer",
    "format": "the completion is <think>…</think><answer>…</answer>",
    "both": "accuracy and format",
}


@app.command()
def reward(
    file: Annotated[
        Path,
        typer.Argument(
            help='File with one JSON object per line: {"completion": TEXT, "answer": TEXT}, and '
            '"ended": false if the completion was cut off; other keys are ignored.'
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the rewards to this file, one JSON object per line.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Score completions by the rules of training.

    accuracy: the completion has one <answer>…</answer>, which holds exactly the answer; spaces
    around it are ignored. format: the completion is <think>…</think><answer>…</answer>, each tag
    once and nothing around the blocks, and it was not cut off. Give completions without the prompt
    and without the token that ends them.
    """
    for path, option in ((out, "--out"), (json_file, "--json")):
        if path is not None:
            check_writable(path, option)
    rows = [_score(line, f"{file}, line {n}") for n, line in enumerate(_lines(file), 1)]
    means = {part: sum(row[part] for row in rows) / len(rows) for part in PARTS}
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("part")
    table.add_column("mean", justify="right")
    table.add_column("rule")
    for part, rule in PARTS.items():
        table.add_row(part, f"{means[part]:.4f}", rule)
    shown = console()
    shown.print(table)
    shown.print(counted(len(rows), "completion"))
    if out is not None:
        try:
            write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise CouldNotRun(f"--out {out} can't be written: {error.strerror}") from error
    if json_file is not None:
        replace_json(json_file, {"file": str(file), "completions": len(rows), "means": means})


def _lines(file: Path) -> list[bytes]:
    lines = read_bytes(file, str(file), MOST).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise CouldNotRun(f"{file} holds no completion")
    return lines


def _score(line: bytes, name: str) -> dict[str, float]:
    """The rewards of a line; CouldNotRun, which calls it ``name``, if it can't be scored."""
    given: Any = parse_json(line, name)
    if not isinstance(given, dict):
        raise CouldNotRun(f"{name} must be a JSON object")
    for key in ("completion", "answer"):
        if not isinstance(given.get(key), str):
            what = "is missing" if key not in given else "must be a text"
            raise CouldNotRun(f'{name}: "{key}" {what}')
    if not given["answer"]:
        raise CouldNotRun(f'{name}: "answer" must not be empty')
    if not isinstance(ended := given.get("ended", True), bool):
        raise CouldNotRun(f'{name}: "ended" must be true or false')
    parts = score(given["completion"], given["answer"], ended=ended)
    return parts | {"both": parts["accuracy"] * parts["format"]}
