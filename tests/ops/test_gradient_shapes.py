"""Every backward refuses a gradient of another shape: a port's array from a file must not be
broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.check.rules import Pair

SCALAR_OPS = {"balance_loss", "cross_entropy", "head_cross_entropy", "grpo", "preference_loss"}
VECTOR_OPS = [op for op in CASES if op not in SCALAR_OPS]


def wrong_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same count of entries in other shapes, one entry that would broadcast, one row too
    many."""
    return [
        (1, *shape),
        (*shape[:-1], 1) if shape[-1] > 1 else (*shape, 2),
        (shape[0] + 1, *shape[1:]),
    ]


@pytest.mark.parametrize("op", VECTOR_OPS)
def test_refused(op: str) -> None:
    case = next(c for c in (CASES[op](RandomDraw(seed)) for seed in range(50)) if _is_plain(op, c))
    pair = Pair(*pair_of(op), case.kwargs)
    y, saved = pair.call(case.inputs)
    outputs = pair.outputs(case.inputs)
    for wrong in wrong_shapes(outputs[0].shape):
        dy = [np.ones(wrong), *outputs[1:]]
        with pytest.raises((ValueError, IndexError)):
            pair.backward(tuple(dy) if isinstance(y, tuple) else dy[0], saved)


def _is_plain(op: str, case: Any) -> bool:
    """Shapes in which the wrong ones are really other shapes."""
    first = Pair(*pair_of(op), case.kwargs).outputs(case.inputs)[0]
    return all(n > 1 for n in first.shape)
