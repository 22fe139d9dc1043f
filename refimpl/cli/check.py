"""``refimpl check``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.names import fold
from ..errors import CouldNotRun
from ..files import write_text
from ..port.html import page
from ..port.report import Verdict
from ..port.truth import Truth
from ..port.verdict import TYPES, compare_folders, expected
from .app import Json, app, check_writable, console, counted, expect_choice, progress, replace_json


@app.command()
def check(
    theirs: Annotated[
        Path | None,
        typer.Argument(
            help="Your tensors: .safetensors or .npz, a file or a folder of them.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="The truth: a folder that `refimpl grads` or `refimpl vectors` wrote."),
    ] = None,
    layout: Annotated[
        Path | None,
        typer.Option("--map", help="TOML file with your names and layouts, if they are not known."),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Judge the tensors whose names match, as in *.self_attn.*.")
    ] = "*",
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Type that you compute in, one of {', '.join(TYPES)}; by default the coarsest "
            "type in which a tensor is stored."
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--list", help="Print the expected names and shapes, and exit.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write the report to this file, as a page.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Judge the given tensors; gradients may be missing.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Judge a port: the first wrong part, and the mistake.

    THEIRS holds the tensors that your code computed: gradients under their parameters' names, or
    tensors with the prefixes grad/, act/, cot/, out/ and aux/ under the names of the truth. The
    names of Hugging Face (fused experts, too), ours (stacked experts) and DeepSeek's own are known;
    give others with --map.

    A unit is how far the reference itself errs in your type, measured for each tensor. The verdict
    is

    \b
    PASS: every tensor is within 4 units; the planted bugs that these inputs
      and this type would not show are listed as not excluded
    FAIL: the first wrong part is named, and the planted bug that gives its
      numbers, if there is such a bug
    INCONCLUSIVE: something can't be judged, and a line says what would help

    A planted bug is one of this tool's catalogue of mistakes. Give all gradients, or select those
    that you have with --only, or judge the given ones with --partial. You may leave out all other
    tensors.

    The table of wrong tensors has the columns

    \b
    units: the largest error; 4 are allowed
    relative: that error over the truth's largest number
    cosine: of the angle between your tensor and the truth's
    norms: your norm over the truth's
    where: which rows, heads or positions are wrong

    Exit code 0: PASS; 1: FAIL or INCONCLUSIVE; 2: it could not run.
    """
    if against is None:
        raise CouldNotRun("give the truth with --against FOLDER, as `refimpl grads` writes it")
    truth = Truth.open(against)
    if names:
        _list(truth, only)
        return
    if theirs is None:
        raise CouldNotRun("give the file or folder with your tensors, or --list")
    if dtype is not None:
        expect_choice("dtype", dtype, TYPES)
    for path, option in ((json_file, "--json"), (html, "--html")):
        if path is not None:
            check_writable(path, option)
    if not truth.types:
        raise CouldNotRun(
            f"{against} has no units: add --units {','.join(TYPES)} to the command that wrote it, "
            "with --force"
        )
    with progress("tensors") as move:
        verdict = compare_folders(
            theirs, truth, layout=layout, only=only, dtype=dtype, partial=partial, progress=move
        )
    console().print(str(verdict))
    if verdict.routes is not None:
        command = _again(truth, verdict)
        console().print(
            "compute the truth with your routes, with all files of its first run (--mask and "
            f"others), and check against that:\n  {command}"
        )
    if json_file is not None:
        replace_json(json_file, verdict.to_json())
    if html is not None:
        try:
            write_text(html, page(verdict))
        except OSError as error:
            raise CouldNotRun(f"--html {html} can't be written: {error.strerror}") from error
    raise typer.Exit(int(not verdict.ok))


def _list(truth: Truth, only: str) -> None:
    """A line per tensor; those that differ in their numbers alone share one."""
    chosen = expected(truth, only)
    described = []
    for _, name in chosen:
        entry = truth.entries[name]
        exact = "" if entry.dtype.startswith("float") else f" {entry.dtype}"
        described.append((name, f"{list(entry.shape)}{exact}"))
    for line in fold(described):
        console().print(line)
    console().print(
        f"{counted(len(chosen), 'tensor')}; a gradient may also have its parameter's name without "
        "a prefix; all tensors but gradients are optional"
    )


def _again(truth: Truth, verdict: Verdict) -> str:
    """The command that runs the truth with the port's routes."""
    checkpoint = (truth.metadata.get("checkpoint") or {}).get("path", "CHECKPOINT")
    request: dict[str, Any] = truth.metadata.get("request") or {}
    words = ["refimpl", "grads", "--checkpoint", checkpoint, "--tokens", "TOKENS"]
    words += ["--mtp"] if request.get("mtp") else []
    for name in ("mtp_weight", "balance_alpha", "layers", "only", "activations", "convention"):
        if request.get(name) not in (None, 0.0) and (name, request[name]) != ("only", "*"):
            words += [f"--{name.replace('_', '-')}", str(request[name])]
    given = {"--grpo": request.get("loss") == "grpo", "--dlogits": request.get("loss") == "dlogits"}
    for name in ("key_mask", "segments", "positions"):
        given[f"--{name.replace('_', '-')}"] = f"in/{name}" in truth
    for option in (option for option, was in given.items() if was):
        words += [option, option.strip("-").upper()]
    if split := truth.metadata.get("split"):
        words += ["--split", str(split.get("spec"))]
    words += ["--dtype", str(truth.metadata.get("dtype", "float64"))]
    words += ["--units", ",".join(truth.types), "--routes", str(verdict.routes), "--out", "NEW"]
    return shlex.join(words)
