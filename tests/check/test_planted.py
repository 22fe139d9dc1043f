"""The checker is checked: planted bugs are caught by the rules that should, clean code is not."""

from __future__ import annotations

import pytest

from refimpl.check import RULES
from refimpl.check.planted import PLANTED, Planted, plant

from kill_table import false_alarms, kill
from support import FULL


def name(bug: Planted) -> str:
    return f"{bug.op}: {bug.name}"


# On the model, differences take seven times what the other rules take together: one of its bugs has
# them in every run (below), all have them in make test-full and make bugs.
ON_MODELS = RULES if FULL else ("contract", "noise")


@pytest.mark.parametrize("bug", PLANTED, ids=name)
def test_caught(bug: Planted) -> None:
    """On the default examples of ``refimpl verify`` the checker catches a wrong backward and names
    its tensor; the golden values catch a mistake of both passes."""
    row = kill(bug, ON_MODELS)
    if bug.shared:
        assert "golden" in row.caught
    else:
        assert row.caught & {"contract", "differences", "noise", "sharpness"}
        assert row.tensors or bug.op == "model"


def test_every_rule_sees_a_wrong_model() -> None:
    bug = next(bug for bug in PLANTED if bug.name == "residual dropped in the backward")
    row = kill(bug)
    assert row.caught == {"differences", "noise", "golden"}
    assert row.tensors


@pytest.mark.parametrize(
    "shared", ["rope: halves for interleaved, both ways", "attention: scale squared, both ways"]
)
def test_self_consistency_is_blind_to_shared_mistakes(shared: str) -> None:
    """Which is why golden values exist: the checker alone lets these pass."""
    bug = next(bug for bug in PLANTED if bug.shared and name(bug) == shared)
    assert kill(bug).caught == {"golden"}


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


def test_text_must_stand_once() -> None:
    with pytest.raises(ValueError, match="stands 0 times"):
        plant(Planted("linear", "nothing", "any", (("no such text", ""),)))
