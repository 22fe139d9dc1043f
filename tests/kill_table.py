"""Which check catches which planted bug: ``make bugs`` prints the table, and test_planted.py
asserts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from refimpl.check import (
    FD_TOLERANCE,
    MODEL_FD_TOLERANCE,
    MODEL_VALIDITY,
    RULES,
    VALIDITY,
    Report,
    check,
)
from refimpl.check.cases import CASES, RandomDraw, model_case
from refimpl.check.planted import PLANTED, Planted, plant
from refimpl.config import ModelConfig, preset
from refimpl.ops import Op
from refimpl.text import load_text
from refimpl.verify import Settings, plan, run

from golden import values as golden_values

COLUMNS = ("contract", "differences", "noise", "sharpness", "golden")
EXAMPLES = 10  # of clean code, an op


@dataclass(frozen=True)
class Row:
    """What caught a bug: a fault of the contract, a rule of the checker, or a golden value."""

    bug: Planted
    caught: frozenset[str]
    tensors: tuple[str, ...]  # those whose gradients the checker calls wrong


def small_model() -> ModelConfig:
    """The tiny model with one dense and one MoE layer less, for speed; two MTP modules, so that
    their chain counts."""
    return replace(
        preset("tiny"), layers=1, dense_layers=0, vocabulary=31, width=9, q_latent=5, heads=2
    )


def kill(bug: Planted, rules: Sequence[str] = RULES) -> Row:
    """Run every check on the bug; of the checker's rules, on a bug of the model, these."""
    planted = plant(bug)
    if isinstance(planted, Op):
        settings = Settings(load_text())
        reports = [run(step, settings, {bug.op: planted}) for step in plan([bug.op], settings)]
        caught = symptoms(reports, FD_TOLERANCE, VALIDITY)
        file, way = golden_values.WAYS[bug.op]
        golden = way(planted)
    else:
        reports = [examine_model(planted, rules)]
        caught = symptoms(reports, MODEL_FD_TOLERANCE, MODEL_VALIDITY)
        file, golden = "model", golden_values.model(module=planted)
    wrong = {t.tensor: None for r in reports for t in r.tensors if t.verdict != "PASS"}
    if golden_differs(file, golden):
        caught |= {"golden"}
    return Row(bug, caught, tuple(wrong))


def examine_model(module: Any, rules: Sequence[str] = RULES) -> Report:
    """The checker's report on a small model whose forward and backward are those of ``module``."""
    case, names, pair = model_case(RandomDraw(0), config=small_model(), length=7, model=module)
    return check(
        *pair,
        case.inputs,
        replay=case.replay,
        op="model",
        names=names,
        difference_tolerance=MODEL_FD_TOLERANCE,
        validity=MODEL_VALIDITY,
        rules=rules,
    )


def symptoms(reports: list[Report], tolerance: float, validity: float) -> frozenset[str]:
    """The columns in which a report does not hold."""
    found = set()
    for report in reports:
        found |= {"contract"} if report.faults else set()
        for t in report.tensors:
            found |= (
                {"differences"}
                if t.difference is not None and not t.difference <= tolerance
                else set()
            )
            found |= {"noise"} if t.noise is not None and not t.noise <= 1 else set()
            found |= (
                {"sharpness"} if t.sharpness is not None and not t.sharpness <= validity else set()
            )
    return frozenset(found)


def golden_differs(file: str, run: golden_values.Run) -> bool:
    """Whether a golden case of the op is missed."""
    return any(
        not error <= golden_values.TOLERANCE
        for name, case in golden_values.load(file).items()
        for error in golden_values.compare(file, name, run(case)).values()
    )


def false_alarms() -> tuple[int, int]:
    """(clean examples that some rule calls wrong, clean examples)."""
    settings = Settings(load_text(), examples=EXAMPLES)
    reports = [run(step, settings) for step in plan(list(CASES), settings)]
    return sum(not report.ok for report in reports), len(reports)


def main() -> int:
    """Print the table; 1 if a bug survives or clean code is called wrong."""
    print(f"{'op':<20}{'planted bug':<48}{'shown by':<36}" + "".join(f"{c:>12}" for c in COLUMNS))
    rows = []
    for bug in PLANTED:
        row = kill(bug)
        rows.append(row)
        marks = "".join(f"{'caught' if column in row.caught else '.':>12}" for column in COLUMNS)
        print(f"{bug.op:<20}{bug.name:<48}{bug.exposed_by:<36}{marks}", flush=True)
    survivors = [row for row in rows if not row.caught]
    for column in COLUMNS:
        print(f"{column}: {sum(column in row.caught for row in rows)} of {len(rows)} caught")
    alarms, clean = false_alarms()
    print(f"{len(rows) - len(survivors)} of {len(rows)} planted bugs caught")
    print(f"false alarms: {alarms} of {clean} clean examples")
    return int(bool(survivors) or alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
