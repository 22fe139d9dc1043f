"""``refimpl bench --cpu``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from ..bench.cpu.columns import Column, select_columns
from ..bench.cpu.driver import Ended, Refused, Team, bound_to
from ..bench.cpu.growth import Growth, growth_of
from ..bench.cpu.load import BUSY
from ..bench.cpu.plot import svg_of
from ..bench.cpu.profile import Line, profile
from ..bench.cpu.results import HEAD, CpuResults, doubts, lines_of
from ..bench.cpu.rows import GROUPS, Row, select_rows
from ..bench.cpu.run import cores_of, header, measure_rows
from ..bench.results import file_name
from ..bench.run import Failed
from ..bench.words import digits
from ..errors import CouldNotRun
from ..files import write_text
from ..kernels.columns import ON_CPU
from .app import check_writable, console, counted, progress, refused, replace_json

__all__ = ["measure_cpu", "profile_cpu"]

WIDTHS = 15, 33, 7, 8, 8, 7, 10  # of the table's columns


def measure_cpu(
    names: Sequence[str],
    only: Sequence[str],
    *,
    results: Path,
    threads: int | None,
    compiled: bool,
    toy: bool,
    torch: bool,
    commit: str | None,
    json_file: Path | None,
) -> int:
    """Measure, show each group as it is done, write the files; the exit code."""
    rows, columns = select_rows(names, toy), select_columns(only, compiled)
    columns = [x for x in columns if torch or "torch" not in x.packages]
    with refused():
        cores = cores_of(threads)
    kept = json_file is None and not names and not only and not toy
    if json_file is not None:
        check_writable(json_file)
    out = console()
    missing = {x.name: why for x in columns if (why := x.missing()) is not None}
    for name, why in missing.items():
        out.print(f"no {name}: {why}")
    columns = [x for x in columns if x.name not in missing]
    with Team(cores) as team:
        try:
            found = header(team, commit, look=0.1 if toy else 1.0)
        except (Refused, Ended) as error:
            raise CouldNotRun(f"no worker could be started: {error}") from error
        folder = results / "cpu"
        path = json_file or (folder / _file(found) if kept else None)
        if kept:
            folder.mkdir(parents=True, exist_ok=True)
        return Report(found, columns, path).run(team, rows)


STEPS = 9  # of a profile


def profile_cpu(
    names: Sequence[str], only: Sequence[str], *, threads: int | None, toy: bool
) -> None:
    """Show each op's share of a training step."""
    rows = select_rows(names or ["step-d128" if toy else "step-d512"], toy)
    columns = only or ["numba_cpu"]
    if strange := [row.name for row in rows if row.problem != "step"]:
        raise CouldNotRun(f"--profile takes rows of a training step, got {', '.join(strange)}")
    if strange := [column for column in columns if column not in ON_CPU]:
        raise CouldNotRun(
            f"--column must be one of {', '.join(ON_CPU)} with --profile, got {', '.join(strange)}"
        )
    with refused():
        cores = cores_of(threads)
    out = console()
    for row in rows:
        for column in columns:
            with bound_to(cores), use_threads(len(cores)):
                lines = profile(column, row.sizes, STEPS)
            total, floor = (
                sum(x) for x in zip(*((a.seconds, a.floor) for a in lines), strict=True)
            )
            table = Table(box=None, padding=(0, 2, 0, 0))
            for name in ("op", "calls", "ms", "of the step", "products, ms", "above them"):
                table.add_column(name, justify="left" if name == "op" else "right")
            for line in (*lines, Line("step", 1, total, floor)):
                above = (line.seconds - line.floor) / total
                table.add_row(
                    line.what,
                    str(line.calls),
                    f"{1e3 * line.seconds:.1f}",
                    f"{100 * line.seconds / total:.1f} %",
                    f"{1e3 * line.floor:.1f}" if line.floor else "–",
                    f"{100 * above:.1f} %" if line.floor else "–",
                )
            out.print(f"{row.name}: {row.shape}, {column}, {counted(len(cores), 'thread')}")
            out.print(table)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Inside, BLAS has so many, where threadpoolctl is installed."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(count, user_api="blas"):
        yield


def _file(found: CpuResults) -> str:
    return file_name(f"{found.device} {found.threads} threads", found.date)


class Report:
    """Shows and writes rows as they come."""

    def __init__(self, found: CpuResults, columns: Sequence[Column], path: Path | None) -> None:
        self.found = found
        self.columns = columns
        self.path = path
        self.out = console()
        self.shown = set[str]()

    def run(self, team: Team, rows: Sequence[Row]) -> int:
        """Measure all rows; if interrupted, the rows measured so far are still shown."""
        found, failed = self.found, []
        threads, cores = counted(found.threads, "thread"), ", ".join(map(str, found.cores))
        self.out.print(
            f"{found.device}, {threads} on cores {cores}, commit {found.commit}, {found.date}"
        )
        self.out.print(", ".join(f"{name} {v}" for name, v in found.versions.items()))
        if found.busy is not None and found.busy > BUSY:
            self.out.print(
                f"WARNING: other processes take {100 * found.busy:.0f} % of these cores' time"
            )
        try:
            with progress("bench") as move:
                for measured in measure_rows(team, rows, self.columns, move):
                    if isinstance(measured, Failed):
                        failed.append(measured.name)
                        self.out.print(f"COULD NOT RUN: {measured.name}: {measured.why}")
                    else:
                        found.rows.append(measured)
                        self.write()
                    self.show([row.group for row in rows[len(found.rows) + len(failed) :]])
        finally:
            self.show([])
            self.end()
        if failed:
            raise CouldNotRun(f"not measured: {', '.join(failed)}")
        return 0

    def write(self) -> None:
        if self.path is not None:
            replace_json(self.path, self.found.to_json(), "--json or --results")

    def show(self, still: Sequence[str]) -> None:
        """The complete groups: those of which ``still`` has no row."""
        for group in self.found.group_names:
            if group not in still and group not in self.shown:
                self.show_group(group)
                self.shown.add(group)  # one that is interrupted is shown again

    def show_group(self, group: str) -> None:
        rows = self.found.of_group(group)
        self.out.print(GROUPS[group].title)
        for row in rows:
            self.out.print(f"\n{row.name}: {row.shape}")
            table = Table(box=None, padding=(0, 2, 0, 0), show_header=row is rows[0])
            for name, width in zip(HEAD, WIDTHS, strict=True):
                table.add_column(name, width=width)
            for line in lines_of(row, self.found.rate):
                table.add_row(*line)
            self.out.print(table)
            for note in row.notes:
                self.out.print(note)
        self.out.print()
        for what, columns in by_figure(growth_of(group, rows)).items():
            self.out.print(f"{what}: {', '.join(f'{name} {digits(x)}' for name, x in columns)}")
        self.out.print()
        if self.path is not None and GROUPS[group].along and len(rows) > 1:
            picture = self.path.with_name(f"{self.path.stem}-{group}.svg")
            subtitle = (
                f"{self.found.device}, {counted(self.found.threads, 'thread')}, {self.found.date}"
            )
            write_text(picture, svg_of(group, rows, subtitle))

    def end(self) -> None:
        """Once all is shown."""
        if self.found.rows:
            self.out.print(
                "÷ torch: over the time of the fastest eager torch, marked *; of floor: the time "
                f"of the row's products alone at NumPy's {self.found.rate / 1e9:.0f} GFLOP/s, over "
                "its time"
            )
        if doubtful := doubts(self.found):
            self.out.print(f"WARNING: the machine was busy during {', '.join(doubtful)}")
        if self.path is not None and self.found.rows:
            self.out.print(f"written: {self.path}")


def by_figure(found: Sequence[Growth]) -> dict[str, list[tuple[str, float]]]:
    """Each column's number, by what it is."""
    figures: dict[str, list[tuple[str, float]]] = {}
    for column, what, value in found:
        figures.setdefault(what, []).append((column, value))
    return figures
