"""Schedules: V3's published points keep their shares, and the cosine of fine-tuning its ends."""

from __future__ import annotations

from math import cos, pi

import pytest

from refimpl.optimizer import V3_SCHEDULE
from refimpl.train.schedule import V3_TOKENS, decayed, scaled

TOKENS = 1_480_000  # a ten-millionth of V3's 14.8T
SCALED = scaled(TOKENS, peak=4e-3, batch=60, warmup_steps=20, bias_speed=5e-3)


def test_itself() -> None:
    """Scaled to V3's own tokens, peak, batch and warm-up it is V3's schedule, every field."""
    assert scaled(int(V3_TOKENS), peak=2.2e-4, batch=15360, warmup_steps=2000) == V3_SCHEDULE


@pytest.mark.parametrize(
    ("tokens", "rate"),  # V3's, in T, and its rate as a share of the peak
    [
        (0.0, 1.0),
        (9.99, 1.0),
        (10.0, 1.0),
        (10.0 + 4.3 / 2, 0.1 + 0.9 / 2),  # half of the cosine between 2.2e-4 and 2.2e-5
        (10.0 + 4.3 / 4, 0.1 + 0.9 * (1 + cos(pi / 4)) / 2),
        (14.3001, 0.1),
        (14.6329, 0.1),
        (14.6331, 7.3 / 220),
        (14.8, 7.3 / 220),
    ],
)
def test_learning_rate(tokens: float, rate: float) -> None:
    """Section 4.2: constant for 10T tokens, a cosine over 4.3T, 333B and 167B at two low rates."""
    assert SCALED.learning_rate(10**6, tokens * 1e5) == pytest.approx(4e-3 * rate, rel=1e-9)
    assert V3_SCHEDULE.learning_rate(10**6, tokens * 1e12) == pytest.approx(2.2e-4 * rate, rel=1e-9)


def test_warm_up() -> None:
    rates = [SCALED.learning_rate(step, 0) for step in range(21)]
    assert rates == pytest.approx([4e-3 * min((step + 1) / 20, 1) for step in range(21)])


def test_batch() -> None:
    """From 3072 / 15360, a fifth, to all of it over 469B tokens."""
    ends = [SCALED.batch(x) for x in (0, 46_900 / 2, 46_899.99, 46_900, TOKENS)]
    assert ends == [12, 36, 60, 60, 60]
    assert scaled(TOKENS, peak=1.0, batch=1, warmup_steps=1).batch(0) == 1


def test_weights() -> None:
    """λ falls from 0.3 to 0.1 at 10T; γ is zero for the last 500B."""
    assert [SCALED.mtp_weight(x) for x in (0, 999_999, 1_000_001)] == [0.3, 0.3, 0.1]
    assert [SCALED.bias_update_speed(x) for x in (0, 1_429_999, 1_430_001)] == [5e-3, 5e-3, 0]


def test_decayed() -> None:
    """Up over the warm-up, from the peak on a cosine to ``end`` of it at the last step."""
    rates = [decayed(step, 13, 2.0, warmup=2) for step in range(13)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[12] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert decayed(20, 13, 2.0, warmup=2) == pytest.approx(0.2)  # beyond the last: as the last
    assert decayed(0, 5, 2.0, warmup=0, end=0.0) == 2.0
    assert decayed(4, 5, 2.0, warmup=0, end=0.0) == 0.0
    assert [decayed(step, 2, 2.0, warmup=4) for step in range(2)] == [0.5, 1.0]  # no more steps
    assert decayed(2, 3, 2.0, warmup=2) == pytest.approx(0.2)  # one step is left: it is the last
