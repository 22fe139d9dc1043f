"""What the op tests share: hypothesis's draws for `refimpl.check.cases`, and the property test of
every op."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from refimpl.check import Report, check
from refimpl.check.cases import CASES, REGIMES, pair_of

FULL = os.environ.get("REFIMPL_TEST_FULL") == "1"
EXAMPLES = 500 if FULL else 100  # of each op's property test
NO_OPS = {"__init__", "choices", "leaves", "reference"}  # files of refimpl/ops/ that are no op
NOT_OPS = {
    "README",
    "checkpoints",
    "conventions",
    "porting",
}  # pages of derivations/ that derive no op
DIGITS = 50  # of the exact arithmetic; 40 must agree

settings.register_profile(
    "refimpl",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=EXAMPLES,
    phases=[phase for phase in Phase if FULL or phase is not Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("refimpl")


class HypothesisDraw:
    """Shapes and flags from hypothesis, which shrinks them; arrays from a drawn seed."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
        self.rng = np.random.default_rng(self.seed)

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.data.draw(st.integers(0, len(options) - 1))]

    def tokens(self, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
        return self.rng.integers(0, vocabulary, shape)


def property_test(op: str) -> Report:
    """Check the op on EXAMPLES drawn cases, every fourth to 50 digits; no failure and no regime
    missed.

    Returns the report of the worst that was seen.
    """
    forward, backward = pair_of(op)
    hit: set[str] = set()
    worst = Report([])
    count = 0

    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count
        draw = HypothesisDraw(data)
        case = CASES[op](draw)
        exact = DIGITS if draw.seed % 4 == 0 else None
        report = check(
            forward,
            backward,
            case.inputs,
            case.kwargs,
            op=op,
            replay=case.replay,
            seed=draw.seed,
            digits=exact,
        )
        assert report.ok, f"{case.kwargs}\n{report}"
        hit.update(case.regimes)
        worst.merge(report)
        count += 1

    run()
    assert count >= EXAMPLES
    assert REGIMES[op] <= hit, f"regimes never drawn: {REGIMES[op] - hit}"
    assert all(t.difference is not None and t.difference <= 1e-8 for t in worst.tensors)
    assert all(t.digits is not None and t.digits >= 40 for t in worst.tensors), str(worst)
    return worst
