"""The command line: ``refimpl verify``, ``grade``, ``memory`` and ``count``.

Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import __version__
from .check import Report, TensorResult
from .config import CONVENTIONS, PRESETS
from .errors import CouldNotRun
from .ops import Op
from .text import load_text
from .verify import MODELS, NAMES, Settings, Step, backward_from_file, plan, run, select

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)
WIDTH = 118  # of a table that goes to a file or a pipe

Examples = Annotated[int, typer.Option(help="Examples an op, each with its own shapes and inputs.")]
Seed = Annotated[int, typer.Option(help="Of the first example; the next ones count up.")]
TextFile = Annotated[Path | None, typer.Option(help="Text to take tokens from (bytes); default: CPython's own topics.")]
Digits = Annotated[int | None, typer.Option(help="Also prove every op to so many digits, in exact dual numbers.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


@app.command()
def verify(
    ops: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}; default: all.")] = None,
    examples: Examples = 5,
    model_examples: Annotated[int, typer.Option(help="Examples of each whole model.")] = 1,
    digits: Digits = None,
    text: TextFile = None,
    seed: Seed = 0,
    implementation: Annotated[str, typer.Option(help="reference, flash or absorbed.")] = "reference",
    backend: Annotated[str, typer.Option(help="numpy or cupy.")] = "numpy",
    dtype: Annotated[str, typer.Option(help="The type under test: float64, or float32 (no differences).")] = "float64",
    convention: Annotated[str, typer.Option(help=f"For the model: {', '.join(CONVENTIONS)}.")] = "official",
    json_file: Json = None,
) -> None:
    """Check every hand-derived gradient: each op, then the whole tiny model's loss, on real text."""
    settings = Settings(
        load_text(text), examples, model_examples, seed, implementation, backend, dtype, convention, digits
    )
    raise typer.Exit(_run(select(ops or []), settings, json_file))


@app.command()
def grade(
    op: Annotated[str, typer.Argument(help="The op whose backward you wrote.")],
    file: Annotated[Path, typer.Argument(help="Python file that defines <op>_backward(dy, saved).")],
    examples: Examples = 10,
    seed: Seed = 0,
    text: TextFile = None,
    digits: Digits = None,
) -> None:
    """Check your own backward of one op (the exercises of derivations/) against our forward."""
    yours = backward_from_file(op, file)
    raise typer.Exit(_run([op], Settings(load_text(text), examples, 1, seed, digits=digits), None, {op: yours}))


@app.command()
def memory() -> None:
    """Show the peak memory of flash attention, and of the fused output head and cross-entropy, against their bounds."""
    from .memory import attention_memory, head_memory

    console, holds = _console(), True
    console.print("flash attention, forward + backward, above the inputs (4 heads, widths 48/32, block 128, float32)")
    first = 0
    for a in attention_memory():
        first = first or a.peak
        share = a.peak / a.probabilities
        console.print(
            f"  T {a.length:>5}: {a.peak / 2**20:7.2f} MiB, {a.peak / first:5.2f} x T 1024, "
            f"{100 * share:6.2f} % of the probabilities' {a.probabilities / 2**20:.0f} MiB"
        )
        holds &= a.peak / first <= 4.6 and (a.length < 4096 or share <= 1 / 8)
    console.print("  bounds: 4.6 x from T 1024 to 4096; 12.5 % at T 4096")
    console.print("output head + cross-entropy, forward + backward, beyond h, W, dh, dW (vocabulary 129280, float32)")
    first = 0
    for h in head_memory():
        first = first or h.peak
        console.print(
            f"  T {h.length:>5}: {h.peak / 2**20:7.2f} MiB, {h.peak / first:5.2f} x T 1024, "
            f"{100 * h.peak / h.logits:6.2f} % of the logits' {h.logits / 2**20:.0f} MiB"
        )
        holds &= h.peak <= 0.1 * h.logits and h.peak <= 1.05 * first
    console.print("  bounds: 10 % of the logits; flat in T (within 5 %)")
    console.print("holds" if holds else "DOES NOT HOLD")
    raise typer.Exit(int(not holds))


@app.command()
def count(
    model: Annotated[str, typer.Argument(help=f"Of {', '.join(PRESETS)}; or a Hugging Face config.json.")] = "v3",
    length: Annotated[int, typer.Option(help="Tokens of a sequence, for the FLOPs.")] = 4096,
    json_file: Json = None,
) -> None:
    """Show how a model's parameters, KV cache, FLOPs and training cost come about, line by line."""
    from .count import count, load_config

    if json_file is not None:
        _check_writable(json_file)
    config, console = load_config(model), _console()
    sections = count(config, length=length)
    console.print(f"refimpl {__version__}: {model}", markup=False)
    free = max(min(console.width, WIDTH) - 35, 20)  # what figures leave to names and arithmetic
    for section in sections:
        table = Table(box=None, show_header=False, pad_edge=False, title=f"\n{section.title}", title_justify="left")
        table.title_style = "bold"
        table.add_column(width=free * 4 // 9)
        table.add_column(width=free - free * 4 // 9)
        table.add_column(width=22, justify="right", no_wrap=True)
        table.add_column(width=9, justify="right", no_wrap=True)
        for line in section.lines:
            table.add_row(line.name, line.arithmetic, line.text, line.short)
        console.print(table)
        for note in section.notes:
            console.print(note, markup=False, soft_wrap=False)
    if json_file is not None:
        tables = [{**asdict(section), "lines": [line._asdict() for line in section.lines]} for section in sections]
        _replace_json(json_file, {"model": model, "length": length, "config": asdict(config), "sections": tables})


def _run(names: list[str], settings: Settings, json_file: Path | None, replaced: dict[str, Op] | None = None) -> int:
    """Verify, show the table, write the file; the exit code."""
    settings.validate()
    if json_file is not None:
        _check_writable(json_file)
    todo = plan(names, settings)
    console, start = _console(), time.perf_counter()
    console.print(f"refimpl {__version__}, NumPy {np.__version__}, Python {platform.python_version()}")
    console.print(f"text: {settings.text.name}, {len(settings.text.data):,} bytes, sha256 {settings.text.sha256}")
    report, broken = Report([]), set[str]()
    for step in _progress(todo):
        if step.op in broken:
            continue
        try:
            report.merge(run(step, settings, replaced))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            report.faults.append(f"{step.op} raised {type(error).__name__} at {place}: {error}")
            broken.add(step.op)
    console.print(_table(report))
    for fault in report.faults:
        console.print(f"contract broken: {fault}", markup=False)
    bad = [t for t in report.tensors if t.verdict != "PASS"]
    for t in bad:
        more = f" (and {len(t.reasons) - 2} more like it)" if len(t.reasons) > 2 else ""
        console.print(f"{t.verdict} {t.op} {t.tensor}: {'; '.join(t.reasons[:2])}{more}", markup=False)
    for what, rows in (
        ("the ops", [t for t in report.tensors if t.op not in MODELS]),
        ("the model", [t for t in report.tensors if t.op in MODELS]),
    ):
        if rows:
            console.print(f"worst of {what}: {_worst(rows)}")
    seconds = time.perf_counter() - start
    verdict = (
        "every gradient holds"
        if report.ok
        else f"{len(bad)} gradients do not hold, {len(report.faults)} contracts are broken"
    )
    console.print(f"{len(report.tensors)} tensors, {len(todo)} examples, {seconds:.1f} s: {verdict}")
    if json_file is not None:
        _write_json(json_file, report, settings, seconds)
    return int(not report.ok)


def _table(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("op", no_wrap=True)
    table.add_column("tensor", no_wrap=True)
    table.add_column("shape", no_wrap=True)  # of the first example
    for title in ("difference", "noise", "sharpness", "digits"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    previous = ""
    for t in report.tensors:
        cells = [_number(t.difference), _number(t.noise), _number(t.sharpness)]
        cells.append("–" if t.digits is None else f"{t.digits:.0f}")
        verdict = t.verdict if t.verdict == "PASS" else f"[red]{t.verdict}[/red]"
        shape = "×".join(map(str, t.shape)) or "scalar"
        table.add_row(t.op if t.op != previous else "", _short(t), shape, *cells, verdict)
        previous = t.op
    return table


def _worst(rows: list[TensorResult]) -> str:
    """The largest of each column, and the fewest digits."""
    parts = []
    for title in ("difference", "noise", "sharpness"):
        found = [x for t in rows if (x := getattr(t, title)) is not None]
        parts += [f"{title} {_number(max(found))}"] if found else []
    digits = [t.digits for t in rows if t.digits is not None]
    return ", ".join(parts + ([f"digits {min(digits):.0f}"] if digits else []))


def _short(t: TensorResult) -> str:
    """The tensor's name without what every name of the model has."""
    return t.tensor.removesuffix(".weight").removeprefix("model.") if t.op in MODELS else t.tensor


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.1e}"


def _console() -> Console:
    """Wide enough for the table: a narrow terminal wraps its lines, since a number that is cut is a wrong number."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH) if sys.stdout.isatty() else WIDTH
    return console


def _progress(todo: list[Step]) -> Iterator[Step]:
    """The steps, with a progress bar on a terminal's standard error."""
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}")
    shown = sys.stderr.isatty()
    with Progress(*columns, description, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=len(todo))
        for step in todo:
            progress.update(task, description=step.op)
            yield step
            progress.advance(task)


def _check_writable(path: Path) -> None:
    """CouldNotRun, before any work is done, if a file can't be made there."""
    if path.is_dir() or not path.name or not os.access(path.parent, os.W_OK):
        raise CouldNotRun(f"--json {path} can't be written: not a file in a folder that can be written to")


def _write_json(path: Path, report: Report, settings: Settings, seconds: float) -> None:
    """Write what a run of checks found."""
    given = {key: value for key, value in asdict(settings).items() if key != "text"}
    content = {
        "ok": report.ok, "seconds": round(seconds, 1), "settings": given,
        "text": {"name": settings.text.name, "sha256": settings.text.sha256},
        "versions": {"refimpl": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "contract_faults": report.faults, "tensors": [asdict(t) for t in report.tensors],
    }  # fmt: skip
    _replace_json(path, content)


def _replace_json(path: Path, content: dict[str, Any]) -> None:
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


def main() -> None:
    """Run the command line; what could not run becomes one line and exit code 2."""
    try:
        app()
    except CouldNotRun as error:
        print(f"refimpl: {error}", file=sys.stderr)
        sys.exit(2)
