"""The kernels of the embedding."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.check.cases import Case

from kernel_support import ALL, TABLE, compare, without_a_device
from kernel_support.planted import PLANTED, assert_seen, plant


@pytest.mark.parametrize(
    ("storage", "mean"),
    [("float32", 0.0), ("bfloat16", 1.0)]  # sums are float32 for both
    + ([("float32", 1.0), ("bfloat16", 0.0)] if ALL else []),
)
def test_a_token_that_stands_everywhere(storage: str, mean: float) -> None:
    """20,000 rows of one id, and some of others: a sum as good as the reference's pairs of pairs,
    also where all terms have one sign."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.concatenate([np.full(20_000, 3), rng.integers(0, 6, 300)]))
    compare(
        "embedding",
        TABLE["embedding"],
        Case((rng.normal(size=(6, 40)),), {"ids": ids}),
        storage,
        0,
        mean=mean,
    )


def test_nothing_to_do() -> None:
    """No ids: an empty result, no launch."""
    y, _ = TABLE["embedding"].forward(np.ones((3, 4)), ids=np.zeros((2, 0), int))
    assert y.shape == (2, 0, 4)


@without_a_device
@pytest.mark.parametrize("name", PLANTED["embedding"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("embedding", name, monkeypatch)
    assert_seen("embedding")
