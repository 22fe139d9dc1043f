"""The checker is checked: planted bugs are caught by the rules that should, clean code is not."""

from __future__ import annotations

import pytest

from refimpl.check import Report
from refimpl.check.planted import PLANTED, Planted, plant
from refimpl.ops import Op
from refimpl.text import load_text
from refimpl.verify import Settings, plan, run

from kill_table import false_alarms, kill


def name(bug: Planted) -> str:
    return f"{bug.op}: {bug.name}"


@pytest.mark.parametrize("bug", PLANTED, ids=name)
def test_caught(bug: Planted) -> None:
    """The checker catches a wrong backward, the golden values a mistake of both passes."""
    caught = kill(bug).caught
    if bug.shared:
        assert "golden" in caught
    else:
        assert caught & {"contract", "differences", "noise", "sharpness"}


def test_self_consistency_is_blind_to_shared_mistakes() -> None:
    """Which is why golden values exist: the checker alone lets these pass."""
    consistent = {name(bug) for bug in PLANTED if bug.shared and kill(bug).caught == {"golden"}}
    assert {
        "rope: halves for interleaved, both ways",
        "attention: scale squared, both ways",
    } <= consistent


def test_wrong_in_float64_alone() -> None:
    """The longdouble run is right: the noise rule sees no error, its bound on sharpness does."""
    bug = next(bug for bug in PLANTED if bug.name == "float32 cast inside")
    caught = kill(bug).caught
    assert "noise" not in caught
    assert "sharpness" in caught


def test_catalogue_is_large_enough() -> None:
    assert sum(not bug.shared for bug in PLANTED) >= 60
    assert sum(bug.shared for bug in PLANTED) >= 8
    assert len({name(bug) for bug in PLANTED}) == len(PLANTED)


def test_clean_code_is_not_accused() -> None:
    assert false_alarms()[0] == 0


@pytest.mark.parametrize("bug", [b for b in PLANTED if not b.shared and b.op != "model"], ids=name)
def test_verify_names_the_tensor(bug: Planted) -> None:
    """``refimpl verify``'s default examples catch every wrong backward and name its tensor."""
    pair = plant(bug)
    assert isinstance(pair, Op)
    report, settings = Report([]), Settings(load_text())
    for step in plan([bug.op], settings):
        report.merge(run(step, settings, {bug.op: pair}))
    assert not report.ok
    assert [t.tensor for t in report.tensors if t.verdict != "PASS"]


def test_text_must_stand_once() -> None:
    with pytest.raises(ValueError, match="stands 0 times"):
        plant(Planted("linear", "nothing", "any", (("no such text", ""),)))
