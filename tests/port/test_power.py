"""The table of bugs and rules, other people's rules on the same draws, and right code."""

from __future__ import annotations

import numpy as np

from refimpl.check import RULES
from refimpl.check.planted import PLANTED
from refimpl.port.compare import FACTOR
from refimpl.port.power import (
    OURS,
    PEERS,
    TYPES,
    agrees,
    calc_diff,
    clean_runs,
    cosine,
    drawn,
    draws_of,
    kill,
    units,
)

from port.test_recompute import bug_of
from support import FULL


def test_a_bug_by_rule() -> None:
    row = kill(bug_of("rms_norm", "dy for dy·w"))
    assert row.caught == {"differences", "noise"}
    assert "x" in row.tensors
    assert kill(bug_of("rope", "halves for interleaved, both ways")).caught == set()
    assert kill(bug_of("bias_update", "bias moved by shares")).caught == set()


def test_a_bug_of_the_model() -> None:
    assert "noise" in kill(bug_of("model", "router path missing"), RULES[2:]).caught


def test_other_people_s_rules() -> None:
    """A pure factor escapes the cosine, a small one calc_diff; an absolute tolerance escapes small
    numbers; ours none of them."""
    y = np.random.default_rng(0).normal(size=50)
    assert cosine(2 * y, y)
    assert not calc_diff(2 * y, y)
    assert calc_diff(1.04 * y, y)
    for rule in (cosine, calc_diff, *PEERS.values()):
        assert rule(y, y)
        assert rule(0 * y, 0 * y)
        assert not rule(-y, y)
    right, wrong = {"grad 0": y}, {"grad 0": 1.04 * y}
    for scale, wanted in ((1.0, False), (1e-3, True)):
        assert agrees("allclose 1e-2", wrong, right, {}, scale) == wanted
        assert not agrees(OURS, wrong, right, {"grad 0": 1e-7}, scale)
    assert not agrees(OURS, {"grad 0": y[:3]}, right, {"grad 0": 1e9}, 1.0)
    assert not agrees("cosine ≥ 0.999", {}, right, {}, 1.0)


def test_draws_are_the_ceiling() -> None:
    """No rule sees a bug in more draws than it shows in, but for numbers within rounding."""
    bugs = [bug for bug in PLANTED if bug.op == "attention" and not bug.shared]
    for row in draws_of("attention", bugs, 10 if FULL else 4):
        assert all(row.seen[rule] <= row.shown for rule in PEERS), row
        assert row.seen_small[OURS] == row.shown
        assert row.seen_small["allclose 1e-2"] <= row.seen["allclose 1e-2"]
        assert row.shown or row.bug.name == "one head's gradient for a shared key"


def test_units_grow_with_the_type() -> None:
    draw = drawn("mla", 1)
    by_type = [units("mla", draw, dtype)["grad 0"] for dtype in TYPES]
    assert 100 * by_type[0] < by_type[1]
    assert 100 * by_type[1] < by_type[2]


def test_right_code_is_right() -> None:
    found = list(clean_runs(9 if FULL else 1))
    assert len(found) >= (500 if FULL else 57)
    assert max(error for _, _, error in found) <= FACTOR
    assert {dtype for _, dtype, _ in found} == {*TYPES}
