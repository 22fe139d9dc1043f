"""The columns of the table: who computes a problem. Each is a process of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import CouldNotRun
from ...kernels import SOURCE
from .problems import PROBLEMS

__all__ = ["COLUMNS", "TRUTH", "Column", "select_columns"]

BENCHMARKS = SOURCE.parent / "benchmarks"  # in a checkout alone: the package names no torch
WITH_ATTENTION = ("attention", "mla", "step")
WITH_EXPERTS = ("moe", "step")
OF_FUNCTIONS = tuple(name for name in PROBLEMS if name not in WITH_EXPERTS)
OF_JAX = ("rms_norm", "rope", "swiglu", "linear", "block", "attention")
LOSSES = ("cross_entropy", "head_cross_entropy")


@dataclass(frozen=True)
class Column:
    """An implementation that is measured."""

    name: str
    problems: Sequence[str]  # that it computes
    file: str | None = None  # in benchmarks/; None: ours
    packages: tuple[str, ...] = ()  # that must be installed
    eager: bool = False  # one of the baselines that we are compared with
    compiles: bool = False  # the first call is not like the others

    def missing(self) -> str | None:
        """Why it can't be measured here; None if it can."""
        absent = [x for x in self.packages if importlib.util.find_spec(x) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        if self.file is not None and not (BENCHMARKS / self.file).is_file():
            return f"{self.file} is not there: run from a checkout"
        return None


def _torch(name: str, problems: Sequence[str], *more: str, compiles: bool = False) -> Column:
    packages = ("torch", *more)
    return Column(name, problems, "torch_cpu.py", packages, not compiles, compiles)


COLUMNS = {
    column.name: column
    for column in (
        Column("reference", tuple(PROBLEMS)),
        Column("flash", WITH_ATTENTION),
        Column("numba_cpu", tuple(PROBLEMS), None, ("numba", "threadpoolctl"), compiles=True),
        _torch("torch", OF_FUNCTIONS),
        _torch("hf-eager", WITH_EXPERTS, "transformers"),
        _torch("hf-grouped_mm", WITH_EXPERTS, "transformers"),
        _torch("hf-batched_mm", WITH_EXPERTS, "transformers"),
        _torch("torch-compile", OF_FUNCTIONS, compiles=True),
        _torch("hf-compile", WITH_EXPERTS, "transformers", compiles=True),
        Column("jax", (*OF_JAX, *LOSSES), "jax_cpu.py", ("jax",), compiles=True),
    )
}
"""torch: its own functions, SDPA with values padded to the keys' width; hf-…: transformers'
DeepseekV3 with each implementation of its experts; jax: jitted."""

TRUTH = "truth"
"""The worker that computes every row's exact answer, in float64; no column."""


def select_columns(names: Sequence[str], compiled: bool) -> list[Column]:
    """The columns by name; all of them if there are no names, those of torch.compile only if
    ``compiled``. CouldNotRun for a name that does not exist."""
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise CouldNotRun(f"unknown column {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
    if names:
        return [COLUMNS[name] for name in COLUMNS if name in names]
    return [x for x in COLUMNS.values() if compiled or not x.name.endswith("-compile")]
