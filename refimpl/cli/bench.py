"""``refimpl bench``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..bench import RUNS
from ..errors import CouldNotRun
from .app import Json, app, check_writable, console, replace_json

RESULTS = Path("benchmarks/results")


@app.command()
def bench(
    rows: Annotated[
        list[str] | None,
        typer.Argument(
            help="Rows of the table by name, in quotes if it has spaces; with --cpu also groups of "
            "rows; by default all."
        ),
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Measure the kernels on this machine's GPU.")
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Measure ops and training steps on this machine's CPU.")
    ] = False,
    table: Annotated[
        bool,
        typer.Option("--table", help="Print the tables of kernels/README.md, from all results."),
    ] = False,
    results: Annotated[
        Path, typer.Option(help="Folder of the results, a file per device and day.")
    ] = RESULTS,
    runs: Annotated[
        int, typer.Option(help="With --gpu: measurements per time, at least 20.")
    ] = RUNS,
    threads: Annotated[
        int | None,
        typer.Option(help="With --cpu: cores of every column; by default all it may use."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With --cpu: measure torch.compile too (slow).")
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(help="With --cpu: measure only this column; may be given several times."),
    ] = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="With --cpu: tiny shapes, to try the command.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(help="With --cpu: show where the time of a training step goes, op by op."),
    ] = False,
    torch: Annotated[bool, typer.Option(help="Measure torch too, if it is installed.")] = True,
    commit: Annotated[
        str | None, typer.Option(help="Commit of this checkout, where git is missing.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure speed and memory, or show results.

    With --gpu it measures for each row

    \b
    time: median and range
    floor: the least time for the row's bytes or products at this card's
      own speed, and the share of it that is reached
    target: the time that we aim for, scaled by this card's speed, and the
      share of it that is reached
    torch: its times, if it is installed
    memory: taken beyond the inputs
    error: against float64, over the error allowed, so at most 1

    With --cpu it measures for each row and column

    \b
    time: of forward and backward, the median and the 10th and 90th percentile
    ÷ torch: that time over the time of the fastest eager torch
    of floor: the time of the row's products alone, at NumPy's own rate, over
      that time
    memory: of a call, results included
    error: the largest of a gradient against float64, over its largest number
    first call: its time, if code is compiled

    The columns are processes bound to the same cores, which take turns:

    \b
    reference, flash, numba_cpu: ours
    torch: its functions, eager; SDPA with values padded to the keys' width;
      its fused AdamW
    hf-…: transformers' DeepseekV3, with each implementation of its experts
    torch-compile, hf-compile: the same compiled, with --compile
    jax: jitted, where shapes are fixed

    With --cpu --profile it shows for each op of our training step (step-d512 and numba_cpu, unless
    rows and --column say otherwise) its own time, the time of its products alone, and the
    difference.

    A run of all rows is kept as <results>/<device>-<date>.json (of a CPU in <results>/cpu, with
    its curves as SVG). A run of some rows is kept only with --json. The file grows row by row, with
    the rows whose results are right. If a row can't be measured, the others still are.
    """
    if gpu + cpu + table != 1:
        raise CouldNotRun(
            "bench needs one of --gpu or --cpu, to measure, or --table, to show results"
        )
    if table:
        if json_file is not None:
            raise CouldNotRun("--json writes measurements: it cannot be combined with --table")
        print(_table(results), end="")
        return
    if profile and not cpu:
        raise CouldNotRun("--profile needs --cpu")
    if profile:
        from .bench_cpu import profile_cpu

        profile_cpu(rows or [], column or [], threads=threads, toy=toy)
        return
    if cpu:
        from .bench_cpu import measure_cpu

        code = measure_cpu(
            rows or [],
            column or [],
            results=results,
            threads=threads,
            compiled=compiled,
            toy=toy,
            torch=torch,
            commit=commit,
            json_file=json_file,
        )
        raise typer.Exit(code)
    raise typer.Exit(_measure(rows or [], results, runs, torch, commit, json_file))


def _table(folder: Path) -> str:
    from ..bench.results import read_results, render

    try:
        return render(read_results(folder))
    except ValueError as error:
        raise CouldNotRun(f"--results {folder}: {error}") from error


def _measure(
    names: list[str],
    folder: Path,
    runs: int,
    beside_torch: bool,
    commit: str | None,
    json_file: Path | None,
) -> int:
    """Measure, show each row as it comes, write the file; the exit code."""
    from ..bench.results import file_name, line_of
    from ..bench.run import Failed, baselines, header, measure_rows, select_rows

    chosen = select_rows(names)
    if runs < 20:
        raise CouldNotRun(f"--runs must be at least 20, got {runs}")
    if json_file is not None:
        check_writable(json_file)
    from ..bench.device import CupyDevice

    device = CupyDevice()
    if not names and json_file is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CouldNotRun(f"--results {folder} can't be made: {error.strerror}") from error
        check_writable(folder / "results.json", "--results")
    torch, version = baselines() if beside_torch else (None, "--no-torch")
    out = console()
    found = header(device, version if torch else None, commit)
    out.print(f"{found.device}, driver {found.driver}, commit {found.commit}, {found.date}")
    out.print(", ".join(f"{name} {v}" for name, v in found.versions.items()))
    out.print(
        f"its own copy {found.copy / 1e12:.2f} TB/s, bfloat16 product "
        f"{found.matrix / 1e12:.0f} TFLOP/s"
    )
    if torch is None:
        out.print(f"no baselines: {version}")
    path = json_file or (None if names else folder / file_name(found.device, found.date))
    wrong, failed = [], []
    for measured in measure_rows(device, chosen, torch, runs=runs):
        if isinstance(measured, Failed):
            failed.append(measured.name)
            out.print(f"COULD NOT RUN: {measured.name}: {measured.why}")
            continue
        out.print(line_of(measured, found))
        if measured.wrong:
            wrong.append(measured.name)
            out.print(
                f"DOES NOT HOLD: {measured.name}: the error allowed is exceeded: {measured.wrong}"
            )
            continue
        found = replace(found, rows=[*found.rows, measured])
        if path is not None:
            replace_json(path, found.to_json(), "--results" if json_file is None else "--json")
    if path is not None and found.rows:
        out.print(f"written: {path}")
    if failed and not wrong:
        raise CouldNotRun(f"not measured on {found.device}: {', '.join(failed)}")
    return int(bool(wrong))
