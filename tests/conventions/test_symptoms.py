"""The index by symptom: every trap can be found by one, and what it names exists."""

from __future__ import annotations

from refimpl.conventions import TRAPS
from refimpl.conventions.symptoms import SYMPTOMS, rows


def test_every_trap_has_a_symptom_and_every_symptom_its_traps() -> None:
    found = {number for symptom in SYMPTOMS for number in rows(symptom)}
    assert found == set(range(1, len(TRAPS) + 1))


def test_no_symptom_names_a_trap_twice() -> None:
    for symptom in SYMPTOMS:
        assert len(rows(symptom)) == len(set(rows(symptom))) >= 1


def test_right_at_position_0_and_wrong_later() -> None:
    first, *others = rows("Logits are right at position 0 and wrong later")
    assert TRAPS[first - 1].title == "RoPE's layout"
    assert {TRAPS[n - 1].title for n in others} >= {"YaRN's mscale", "When YaRN applies"}
