"""Losses of held-out text: beside `forward`'s own, and a bigram model counted by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import log

import numpy as np
import pytest

from refimpl.model import forward
from refimpl.train import losses
from refimpl.train.losses import bigram_loss, held_out_loss, position_losses, spread
from refimpl.train.packing import Windows

from small_stage import CONFIG, MACHINE, begin

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 8, n).tolist() for n in (30, 7, 12, 41, 3)]


@pytest.mark.parametrize("masked", [False, True])
def test_loss_of_windows(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the tokens that count, as `forward` has it, however many are read at a time; of
    the document mask some positions count less often."""
    params = begin().params
    windows = Windows(DOCUMENTS, 6, end=9, masked=masked)
    examples = windows.take(np.arange(len(windows)))
    wanted = float(forward(params, config=CONFIG, **examples.arrays())[0].main)
    assert abs(held_out_loss(params, windows, CONFIG, MACHINE) - wanted) <= 1e-13 * wanted
    by_position = position_losses(params, examples, CONFIG, MACHINE)
    monkeypatch.setattr(losses, "AT_A_TIME", 30)
    found = position_losses(params, examples, CONFIG, MACHINE)
    assert np.max(np.abs(found - by_position)) <= 1e-13
    if masked:
        assert examples.mask is not None
        counts = examples.mask.sum(axis=0)
        assert len(set(counts)) > 1
        assert abs(by_position.mean() - wanted) > 1e-6  # another mean
        assert abs(np.average(by_position, weights=counts) - wanted) <= 1e-13 * wanted
    else:
        assert abs(by_position.mean() - wanted) <= 1e-13 * wanted


def test_only_the_first_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most MOST tokens, in whole windows; and one window at least."""
    params, windows = begin().params, Windows(DOCUMENTS, 6, end=9)
    for most, count in ((25, 4), (5, 1)):
        monkeypatch.setattr(losses, "MOST", most)
        examples = windows.take(np.arange(count))
        wanted = float(forward(params, config=CONFIG, **examples.arrays())[0].main)
        assert abs(held_out_loss(params, windows, CONFIG, MACHINE) - wanted) <= 1e-13 * wanted
        assert bigram_loss(windows, windows, 10) == pytest.approx(by_hand(windows, count))


def by_hand(test: Windows, count: int, train: Windows | None = None) -> float:
    stream = (train or test).stream.tolist()
    pairs = Counter(pairwise(stream))
    singles = Counter(stream[:-1])
    found = []
    for row in range(count):
        for place in range(row * test.length, (row + 1) * test.length):
            a, b = test.stream[place : place + 2].tolist()
            if not test.masked or test.documents[place] == test.documents[place + 1]:
                found.append(-log((pairs[a, b] + 1) / (singles[a] + 10)))
    return sum(found) / len(found)


@pytest.mark.parametrize("masked", [False, True])
def test_bigram(masked: bool) -> None:
    """By hand, pairs and tokens that the training text does not have included."""
    train = Windows([RNG.integers(0, 5, 60).tolist()], 7, end=9, masked=masked)
    test = Windows(DOCUMENTS, 6, end=9, masked=masked)
    found = bigram_loss(train, test, 10)
    assert abs(found - by_hand(test, len(test), train)) <= 1e-13 * found
    assert found > bigram_loss(test, test, 10)


def test_spread() -> None:
    """Rows from the first to the last place that has one, each with its targets."""
    stream = np.arange(20)
    rows = spread(stream, 5, 4)
    assert rows.tokens.tolist() == [[x + i for i in range(5)] for x in (0, 4, 9, 14)]
    assert np.array_equal(rows.targets, rows.tokens + 1)
    assert len(spread(stream, 19, 4).tokens) == 1
    with pytest.raises(ValueError, match="length must be at most 19, got 20"):
        spread(stream, 20, 1)
