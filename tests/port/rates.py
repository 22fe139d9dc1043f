"""How many planted bugs are named: on cases of their op, in whole ports of a tiny model, and of
mistakes that the catalogue does not have. tests/port/test_diagnose.py holds the bounds;
``tests/kill_table.py --diagnosis`` prints the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from refimpl.check.planted import FUNCTIONS, PLANTED, Planted, plant
from refimpl.ops import Op
from refimpl.port.diagnose import Diagnosis, bugs_of
from refimpl.port.parts import parts_of
from refimpl.port.truth import Truth

from port.truths import case_port, case_truth, diagnosed, model_port

UNREDUCED = "gradient of w not summed over rows"  # its shape tells it before


class Rates(NamedTuple):
    """What became of planted bugs."""

    found: Counter[str]  # by outcome: alone, together, unknown, wrong, hidden
    missed: list[str]  # those that are unknown or wrong

    @property
    def shown(self) -> int:
        """How many change a number by more than rounding."""
        return self.found.total() - self.found["hidden"]

    @property
    def named(self) -> int:
        return self.found["alone"] + self.found["together"]

    def add(self, bug: Planted, told: Diagnosis | None) -> None:
        kind = outcome(bug, told)
        self.found[kind] += 1
        if kind in ("unknown", "wrong"):
            self.missed.append(f"{bug.op}: {bug.name}: {kind}")

    def __str__(self) -> str:
        found = self.found
        return (
            f"{found.total():>5} planted, {self.shown:>3} shown: {found['alone']:>3} named alone, "
            f"{found['together']:>3} with others that agree, {found['unknown']} not named, "
            f"{found['wrong']} wrongly named; {self.named / max(1, self.shown):.1%} named"
        )


def outcome(bug: Planted, told: Diagnosis | None) -> str:
    if told is None:
        return "hidden"
    if bug in told.named:
        return "alone" if len(told.named) == 1 else "together"
    return "wrong" if told.named else "unknown"


def reachable(bug: Planted) -> bool:
    """Whether a case of the op can have the bug, and its shapes do not tell it before."""
    of_case = bug.op not in FUNCTIONS and bug.op != "model"
    return of_case and bug.name != UNREDUCED and not bug.of_checker


def rates_of_cases(dtype: str, seeds: Iterable[int], ops: Collection[str] | None = None) -> Rates:
    """Bugs on drawn cases of their op, of ``ops`` alone if given."""
    rates, seeds = Rates(Counter(), []), list(seeds)
    for bug in filter(reachable, PLANTED):
        for seed in seeds if ops is None or bug.op in ops else ():
            truth = case_truth(bug.op, 2000 + seed)
            pair = plant(bug)
            assert isinstance(pair, Op)
            rates.add(bug, diagnosed(truth, case_port(truth, pair, dtype, 55), dtype))
    return rates


def rates_of_model(truth: Truth, dtype: str) -> Rates:
    """Every bug that the run has, in a whole port of it."""
    rates = Rates(Counter(), [])
    for bug in dict.fromkeys(bug for part in parts_of(truth) for bug in bugs_of(truth, part)):
        if bug.name != UNREDUCED:
            rates.add(bug, diagnosed(truth, model_port(truth, bug, dtype, 5), dtype))
    return rates


def of_outside(truth: Truth, bug: Planted, dtype: str = "float32") -> Diagnosis | None:
    """What is said of a mistake that the catalogue does not have: in a whole port, or, of the ops
    that the run does not have, in a case."""
    if bug.op in ("grpo", "preference_loss"):
        case, pair = case_truth(bug.op, 2000), plant(bug)
        assert isinstance(pair, Op)
        return diagnosed(case, case_port(case, pair, dtype, 55), dtype)
    return diagnosed(truth, model_port(truth, bug, dtype, 5), dtype)
