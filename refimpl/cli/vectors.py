"""``refimpl vectors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..port.vector_cases import SIZES
from ..port.vectors import NAMES, size_of, write
from .app import app, console, counted, progress


@app.command()
def vectors(
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    op: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(NAMES)}; may be given several times; by default all."
        ),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(SIZES)}: small, odd shapes, or V3's head widths with at most "
            "4 heads, 8 experts, 512 for the vocabulary and 256 for every other width."
        ),
    ] = "small",
) -> None:
    """Write conformance vectors: inputs, outputs, gradients.

    There are vectors of every op, for ports in any language. The folder has one safetensors file
    per op, and index.json, which has a JSON Schema. A tensor's name is CASE/PREFIX/NAME, with the
    prefixes

    \b
    in: differentiable inputs
    aux: other arrays: ids, masks, positions, routes
    cot: the cotangent of each output
    out: outputs
    grad: gradients

    Inputs are integers over powers of two, exact in bfloat16 and the same bytes everywhere. For
    each type, index.json has the unit of rounding error of each tensor (a port may err by 4) and
    the planted bugs that a case excludes: right numbers show that a port does not have them. Cases
    with valid: false are wrong on purpose. `refimpl check YOURS --against OUT` compares.
    derivations/vectors.md has the rest.
    """
    with progress("writing") as move:
        index = write(out, op or [], size, move)
    cases = index["metadata"]["cases"].values()
    wrong = sum(not case["valid"] for case in cases)
    console().print(
        f"{out}: {counted(len(cases), 'case')} ({wrong} wrong on purpose), "
        f"{counted(len(index['tensors']), 'tensor')}, {size_of(index):,} bytes"
    )
