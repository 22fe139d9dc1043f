"""The rule for a kernel's errors, and inputs in all three types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl import stored
from refimpl.check.cases import Case, pair_of
from refimpl.ops import REFERENCE, Op
from refimpl.stored import DTYPES, RUNS, WIDE, results, rounded

__all__ = ["DTYPES", "HALF_UNIT", "LUCK", "WIDE", "compare", "results", "rounded"]

LUCK, HALF_UNIT = RUNS, 2.0**-24


def compare(
    op: str,
    pair: Op,
    case: Case,
    storage: str,
    seed: int,
    extra: Mapping[str, Any] | None = None,
    mean: float = 0,
    algorithm: Op | None = None,
) -> None:
    """The rule of `refimpl.stored` for one op; arguments as there."""
    algorithm = algorithm or stored.algorithm_of(op, storage)
    reference = REFERENCE[op] if op in REFERENCE else pair_of(op)
    try:
        told = stored.compare(
            pair, reference, case, storage, seed, extra=extra, mean=mean, algorithm=algorithm
        )
    except stored.OtherChoice as error:
        raise AssertionError(f"{op} {error}") from error
    for i, result in enumerate(told):
        assert result.fault is None, f"{op} result {i}: {result.fault}"
        assert result.got.dtype in (DTYPES[storage], WIDE[storage]), (
            f"{op} result {i}: {result.got.dtype}"
        )
        assert result.ratio <= 1, f"{op} result {i} of {storage}: {result}"
