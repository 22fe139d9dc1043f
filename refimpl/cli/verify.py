"""``refimpl verify`` and ``refimpl grade``."""

from __future__ import annotations

import platform
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..check import Report, TensorResult
from ..check.cases import CASES
from ..errors import CouldNotRun
from ..kernels.columns import ON_CPU
from ..ops import AnyOp
from ..port.functions import Result
from ..port.functions import check as check_functions
from ..port.places import equations_of
from ..port.table import TheirTable, table_from, table_of_file
from ..text import load_text
from ..verify import (
    KERNELS,
    MODEL_GRPO,
    MODELS,
    NAMES,
    Settings,
    Step,
    backward_of,
    module_from_file,
    plan,
    regimes_of,
    run,
    select,
)
from .app import CONVENTION, Json, app, check_writable, console, progress, replace_json

LONGEST = len("layers.0.self_attn.kv_a_proj_with_mqa")  # of the tensors' names, as they are shown

Examples = Annotated[
    int,
    typer.Option(
        help="Examples per op, each with its own shapes and inputs; more follow until the op has "
        "met every setting and edge that its cases name."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the first example; each next example adds 1.")]
TextFile = Annotated[
    Path | None,
    typer.Option(help="File to take tokens (bytes) from; by default Python's own help texts."),
]
Digits = Annotated[
    int | None,
    typer.Option(help="Also check every op in exact arithmetic of this many digits, 20…1000."),
]


@app.command()
def verify(
    ops: Annotated[
        list[str] | None, typer.Argument(help=f"Any of {', '.join(NAMES)}; by default all.")
    ] = None,
    examples: Examples = 5,
    model_examples: Annotated[int, typer.Option(help="Examples per whole model.")] = 1,
    digits: Digits = None,
    text: TextFile = None,
    seed: Seed = 0,
    implementation: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join((*ON_CPU, *KERNELS))}; or package.module:table for your own "
            "functions, a mapping from the op's name to (forward, backward)."
        ),
    ] = "reference",
    backend: Annotated[str, typer.Option(help="numpy, or cupy for a GPU.")] = "numpy",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type under test: float64, float32 (without finite differences), or bfloat16 "
            "(needs --implementation cuda)."
        ),
    ] = "float64",
    convention: Annotated[str, typer.Option(help=CONVENTION)] = "official",
    json_file: Json = None,
) -> None:
    """Check every hand-derived gradient, on real text.

    Each op is checked, then the loss of the whole tiny model. The table has a row per tensor, with
    the worst of its examples:

    \b
    difference: error against finite differences (bound 1e-8; the model's 1e-7)
    noise: mathematical error over the rounding noise of the same code (bound 1)
    sharpness: the smallest relative error that could have been seen
    digits: to how many digits it agrees with exact arithmetic (with --digits)

    In bfloat16, outputs have rows, too. sharpness is then the error allowed, and noise the error
    over it (bound 1). An op may have twice the error of the float32 reference plus a unit;
    composites and models may have four times that of the reference that rounds at the same places.

    With package.module:table your functions are checked instead of ours. They may be of any array
    library with DLPack: the table's entry "array" makes your array from NumPy's, as
    torch.from_dlpack does. The columns float64 and float32 then have the largest error in that
    type, in units of our own rounding errors (4 allowed). derivations/vectors.md has the rest.
    """
    if ":" in implementation:
        _expect_plain(digits=digits, backend=None if backend == "numpy" else backend)
        theirs = table_from(implementation)
        raise typer.Exit(_theirs(ops or [], theirs, text, examples, seed, json_file))
    settings = Settings(
        load_text(text),
        examples,
        model_examples,
        seed,
        implementation,
        backend,
        dtype,
        convention,
        digits,
    )
    raise typer.Exit(_run(select(ops or [], dtype), settings, json_file))


@app.command()
def grade(
    op: Annotated[str, typer.Argument(help="Name of the op whose backward you wrote.")],
    file: Annotated[
        Path, typer.Argument(help="Python file that defines <op>_backward(dy, saved).")
    ],
    examples: Examples = 10,
    seed: Seed = 0,
    text: TextFile = None,
    digits: Digits = None,
) -> None:
    """Check your own backward of one op.

    It is checked against our forward, as `refimpl verify` checks our backward. Every page of
    derivations/ ends with such an exercise. derivations/README.md explains the columns under How a
    gradient is checked. If a gradient fails, its row has the worst example and the line FAIL quotes
    the first; the output names its equation, and what the examples that fail have in common, such
    as a setting or padding. If the file also defines <op>_forward, both are compared with ours.
    They may be of any array library with DLPack: array in the file, as in array =
    torch.from_dlpack, makes that library's array from NumPy's.
    """
    if op not in CASES:
        raise CouldNotRun(f"unknown op {op}; there are {', '.join(CASES)}")
    module = module_from_file(file)
    table = table_of_file(op, module, file)
    if table is not None:
        _expect_plain(digits=digits)
        raise typer.Exit(_theirs([op], table, text, examples, seed, None))
    yours = backward_of(op, module, file)
    raise typer.Exit(
        _run([op], Settings(load_text(text), examples, 1, seed, digits=digits), None, {op: yours})
    )


def _expect_plain(**given: object) -> None:
    """CouldNotRun for what functions of another library can't take."""
    for argument, value in given.items():
        if value is not None:
            raise CouldNotRun("cannot be combined with your own functions", argument=argument)


def _theirs(
    names: list[str],
    table: TheirTable,
    text: Path | None,
    examples: int,
    seed: int,
    json_file: Path | None,
) -> int:
    """Check functions of another library, show the table, write the file; the exit code."""
    if json_file is not None:
        check_writable(json_file)
    data = load_text(text).data
    chosen = table.select(names)
    result = Result()
    with progress("verifying") as move:
        for i, op in enumerate(chosen):
            move(op, i, len(chosen))
            result.merge(
                check_functions(
                    op, *table.pairs[op], array=table.array, examples=examples, seed=seed, text=data
                )
            )
    out = console()
    out.print(str(result))
    for row in result.tensors:
        if row.verdict != "PASS" and row.tensor.startswith("grad/"):
            _show_equation(out, row.op, row.tensor.removeprefix("grad/"))
    if json_file is not None:
        replace_json(json_file, result.to_json())
    return int(not result.ok)


def _run(
    names: list[str],
    settings: Settings,
    json_file: Path | None,
    replaced: dict[str, AnyOp] | None = None,
) -> int:
    """Verify, show the table, write the file; the exit code."""
    settings.validate()
    if json_file is not None:
        check_writable(json_file)
    todo = plan(names, settings)
    out, start = console(), time.perf_counter()
    out.print(f"refimpl {__version__}, NumPy {np.__version__}, Python {platform.python_version()}")
    out.print(
        f"text: {settings.text.name}, {len(settings.text.data):,} bytes, sha256 "
        f"{settings.text.sha256}"
    )
    report, broken = Report([]), set[str]()
    failed: dict[tuple[str, str], set[Step]] = {}  # the examples, by op and tensor
    rows = _Rows(out, sys.stdout.isatty())
    with progress("verifying") as move:
        for i, step in enumerate(todo):
            move(step.op, i, len(todo))
            rows.begin(step.op, report)
            if step.op in broken:
                continue
            try:
                one = run(step, settings, replaced)
                report.merge(one)
                for t in (t for t in one.tensors if t.verdict != "PASS"):
                    failed.setdefault((t.op, t.tensor), set()).add(step)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit, too: code that is graded decides nothing
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                report.faults.append(f"{step.op} raised {type(error).__name__} at {place}: {error}")
                broken.add(step.op)
    rows.end(report)
    for fault in report.faults:
        out.print(f"contract broken: {fault}")
    bad = [t for t in report.tensors if t.verdict != "PASS"]
    for t in bad:
        steps = [step for step in todo if step.op == t.op and t.op in CASES and t.op not in broken]
        _show_failure(out, t, _where_it_fails(steps, failed[t.op, t.tensor], settings))
    unread = [t for t in report.tensors if t.op == MODEL_GRPO and _is_zero(t)]
    if unread:
        out.print(
            f"the {len(unread)} rows of 0.0 in {MODEL_GRPO} are its MTP module's: GRPO has no MTP "
            "loss, so their gradients must be exactly 0, and are"
        )
    for what, group in (
        ("the ops", [t for t in report.tensors if t.op not in MODELS]),
        ("the model", [t for t in report.tensors if t.op in MODELS]),
    ):
        if group:
            out.print(f"worst of {what}: {_worst(group)}")
    seconds = time.perf_counter() - start
    verdict = (
        "every gradient holds"
        if report.ok
        else f"{len(bad)} gradients do not hold, {len(report.faults)} contracts are broken"
    )
    out.print(f"{len(report.tensors)} tensors, {len(todo)} examples, {seconds:.1f} s: {verdict}")
    if json_file is not None:
        _write_json(json_file, report, settings, seconds)
    return int(not report.ok)


def _show_failure(out: Console, t: TensorResult, where: str) -> None:
    """Why a tensor fails, in which examples, and where its gradient is derived."""
    more = f" (and {len(t.reasons) - 2} more like it)" if len(t.reasons) > 2 else ""
    out.print(f"{t.verdict} {t.op} {t.tensor}: {'; '.join(t.reasons[:2])}{more}")
    if where:
        out.print(where)
    _show_equation(out, t.op, t.tensor)


def _where_it_fails(steps: list[Step], failed: set[Step], settings: Settings) -> str:
    """In how many of an op's examples a tensor fails, and the rarest regime that they share; empty
    without steps."""
    if not steps:
        return ""
    said = f"it fails in {len(failed)} of {len(steps)} examples"
    regimes = {step: regimes_of(step, settings) for step in steps}
    passed = [regimes[step] for step in steps if step not in failed]
    shared = set.intersection(*(regimes[step] for step in failed))
    count = {name: sum(name in x for x in passed) for name in sorted(shared)}
    rarest = min(count.values(), default=len(passed))
    if rarest == len(passed):  # every example that passes has it, too
        return said
    names = " and ".join(name for name in count if count[name] == rarest)
    return f"{said}; these have {names}, as have {rarest} of the {len(passed)} that pass"


def _show_equation(out: Console, op: str, argument: str) -> None:
    """Where the gradient of an op's argument is derived, if it is one."""
    tags = equations_of(op).get(argument, []) if op in CASES else []
    if tags:
        page = tags[0].strip("()").partition(".")[0]
        out.print(f"d{argument}: see {' and '.join(tags)} in derivations/{page}.md")


class _Rows:
    """The table's rows. A file or a pipe gets those of an op as soon as its examples are done;
    on a terminal, where the bar of progress moves, they come together."""

    def __init__(self, out: Console, together: bool) -> None:
        self.out = out
        self.together = together
        self.op = ""  # whose examples are run
        self.shown = 0  # rows

    def begin(self, op: str, report: Report) -> None:
        """The examples of ``op`` come next; those of the op before are done."""
        if op != self.op and self.op and not self.together:
            self.end(report)
        self.op = op

    def end(self, report: Report) -> None:
        """Show the rows that are not shown yet."""
        rows = report.tensors[self.shown :]
        if rows or not self.shown:
            self.out.print(_table(rows, header=not self.shown))
        self.shown = len(report.tensors)


def _table(rows: list[TensorResult], *, header: bool) -> Table:
    """The rows under one another, as wide as those of every other op."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=header)
    table.add_column("op", no_wrap=True, min_width=max(map(len, NAMES)))
    table.add_column("tensor", no_wrap=True, min_width=LONGEST)
    table.add_column("shape", no_wrap=True, min_width=7)  # of the first example
    for title in ("difference", "noise", "sharpness", "digits"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    table.add_column("verdict", no_wrap=True, min_width=len("verdict"))
    previous = ""
    for t in rows:
        cells = [_number(t.difference), _number(t.noise), _number(t.sharpness)]
        cells.append("–" if t.digits is None else f"{t.digits:.0f}")
        verdict = Text(t.verdict, "" if t.verdict == "PASS" else "red")
        shape = "×".join(map(str, t.shape)) or "scalar"
        table.add_row(t.op if t.op != previous else "", _short(t), shape, *cells, verdict)
        previous = t.op
    return table


def _is_zero(t: TensorResult) -> bool:
    """Whether every number of the row is 0, which only a gradient that is 0 all over gives."""
    return t.verdict == "PASS" and {t.difference, t.noise, t.sharpness} <= {0.0, None}


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


def _write_json(path: Path, report: Report, settings: Settings, seconds: float) -> None:
    """Write what a run of checks found."""
    given = {key: value for key, value in asdict(settings).items() if key != "text"}
    content = {
        "ok": report.ok,
        "seconds": round(seconds, 1),
        "settings": given,
        "text": {"name": settings.text.name, "sha256": settings.text.sha256},
        "versions": {
            "refimpl": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "contract_faults": report.faults,
        "tensors": [asdict(t) for t in report.tensors],
    }
    replace_json(path, content)
