"""The fit finds how a port divides its sums over parts, and names the rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint.source import MemorySource
from refimpl.config import Conventions, preset
from refimpl.grads import Request, write_gradients
from refimpl.port.divisors import Division, division, hidden_rules
from refimpl.port.truth import Truth

from drawn_batches import SMALL
from random_parameters import random_parameters

CONFIG = replace(
    SMALL,
    mtp_depth=1,
    balance_weight=preset("tiny").balance_weight,
    conventions=Conventions(mtp_normaliser="valid"),
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 31, (5, 8))
KEY_MASK = np.arange(8) < np.array([[8], [3], [7], [6], [4]])
TYPES = ("float32",)


@pytest.fixture(scope="module", params=["rows=1+3+1,ranks=2", "positions=3"])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    out = tmp_path_factory.mktemp("split") / "truth"
    given = Request(
        TOKENS, key_mask=KEY_MASK, mtp=True, balance_alpha=0.3, split=request.param, units=TYPES
    )
    write_gradients(MemorySource(random_parameters(CONFIG), CONFIG), given, out)
    return Truth.open(out)


def names_of(truth: Truth) -> list[str]:
    return [name.removeprefix("grad/") for name in truth.entries if name.startswith("grad/")]


def port(truth: Truth, **rules: str | list[float]) -> dict[str, np.ndarray]:
    """The gradients in float32 of a program with these rules, or factors over the right ones, by
    term; an error of half a unit in each."""
    split, made = truth.metadata["split"], {}
    noise = np.random.default_rng(1)
    for name in names_of(truth):
        total: Any = 0.0
        for term, by_rule in split["rules"].items():
            rule = rules.get(term.replace(".", "_"), "right")
            right = by_rule["right"]
            factors = by_rule[rule] if isinstance(rule, str) else np.multiply(rule, right)
            for part, c in enumerate(factors):
                total = total + c * truth.array(f"split/{part}/{term}/{name}")
        unit = truth.entries[f"grad/{name}"].units["float32"]
        made[name] = (total + unit * noise.uniform(-0.5, 0.5, total.shape)).astype(np.float32)
    return made


def found(truth: Truth, gradients: dict[str, np.ndarray]) -> Division | None:
    return division(truth, list(gradients), gradients.__getitem__, "float32")


def test_right_division(truth: Truth) -> None:
    assert found(truth, port(truth)) is None


def test_every_rule_of_every_term(truth: Truth) -> None:
    """One wrong rule at a time; those that give the right factors here are told as hidden."""
    for term, by_rule in truth.metadata["split"]["rules"].items():
        for rule, factors in by_rule.items():
            if rule == "right":
                continue
            told = found(truth, port(truth, **{term.replace(".", "_"): rule}))
            if np.allclose(factors, by_rule["right"], rtol=1e-9):
                assert told is None
                continue
            assert told is not None, (term, rule)
            if (
                term == "balance_of_part"
            ):  # added to the right one: no rule does that, a factor says it
                continue
            assert rule in told.rules[term]
            assert set(told.rules) == {term}


def test_several_at_once(truth: Truth) -> None:
    """What a usual loop does to all terms; a part's statistics in place of the sequence's."""
    means = "the sum of the parts' means (× micro-batches)"
    told = found(truth, port(truth, main=means, mtp_1=means))
    assert told is not None
    assert set(told.rules) == {"main", "mtp.1"}
    assert all(means in rules for rules in told.rules.values())
    assert any(line.startswith("main, mtp.1: ") for line in told.told())
    alone = "the statistics of each part alone"
    told = found(truth, port(truth, balance="left out", balance_of_part=alone))
    assert told is not None
    assert told.rules["balance"] == ["left out"]
    assert told.rules["balance_of_part"] == ["the statistics of each part alone"]


def test_an_unknown_rule(truth: Truth) -> None:
    """Twice the MTP loss of one part: no rule of ours, but the factors say it."""
    parts = len(truth.metadata["split"]["shapes"])
    told = found(truth, port(truth, mtp_1=[2.0, *[1.0] * (parts - 1)]))
    assert told is not None
    assert told.factors["mtp.1"] == pytest.approx([2.0, *[1.0] * (parts - 1)], rel=1e-3)
    assert "mtp.1: by no rule we know, the parts count 2, 1" in told.told()[0]


def test_another_mistake_is_none_of_these(truth: Truth) -> None:
    """A wrong gradient in one tensor is no sum of the parts' gradients."""
    gradients = port(truth)
    name = next(name for name in gradients if name.endswith("kv_a_proj_with_mqa.weight"))
    gradients[name] = gradients[name] * 1.01
    assert found(truth, gradients) is None


def test_equal_counts_hide(tmp_path: Path) -> None:
    """With as many targets in each part, the mean of means is right, and said to be hidden."""
    given = Request(TOKENS[:4], split="rows=2+2", units=TYPES)
    params = random_parameters(CONFIG)
    config = replace(CONFIG, mtp_depth=0)
    params = {name: x for name, x in params.items() if not name.startswith("model.layers.2.")}
    write_gradients(MemorySource(params, config), given, tmp_path / "truth")
    truth = Truth.open(tmp_path / "truth")
    told = found(truth, port(truth, main="divided by the ranks twice"))
    assert told is not None
    assert told.rules == {"main": ["divided by the ranks twice"]}
    assert hidden_rules(truth, names_of(truth), "float32") == [
        "splits: main by the mean of the parts' means"
    ]


@pytest.fixture(scope="module")
def with_an_empty_part(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    out = tmp_path_factory.mktemp("split") / "truth"
    given = Request(
        TOKENS[:4], mtp=True, balance_alpha=0.3, split="rows=2+0+2,ranks=2", units=TYPES
    )
    write_gradients(MemorySource(random_parameters(CONFIG), CONFIG), given, out)
    return Truth.open(out)


def test_terms_without_a_say_are_not_accused(truth: Truth) -> None:
    """An MTP module's own weights say nothing of the main loss."""
    made = port(truth, mtp_1="divided by the ranks twice")
    own = {n: x for n, x in made.items() if n.startswith("model.layers.2.shared_head.")}
    told = found(truth, own)
    assert told is not None
    assert told.rules.keys() == {"mtp.1"}


def test_rules_that_differ_in_an_empty_part_alone_are_one(with_an_empty_part: Truth) -> None:
    truth = with_an_empty_part
    never, summed = ("divided by the ranks never", "the sum of the parts' means (× micro-batches)")
    for rule in (never, summed):
        told = found(truth, port(truth, main=rule))
        assert told is not None
        assert told.rules == {"main": [summed, never]}
    weighted = "each part's mean, weighted by its main count"
    assert found(truth, port(truth, mtp_1=weighted)) is None
    hidden = hidden_rules(truth, names_of(truth), "float32")
    assert hidden == [f"splits: {term} by {weighted}" for term in ("mtp.1", "balance")]


def test_what_was_not_judged_hides_all_of_a_term(with_an_empty_part: Truth) -> None:
    hidden = hidden_rules(with_an_empty_part, ["model.layers.2.shared_head.norm.weight"], "float32")
    assert "splits: main by left out" in hidden
    assert "splits: mtp.1 by left out" not in hidden
    assert hidden_rules(with_an_empty_part, [], "float32") == []


def test_few_numbers_fit_anything(truth: Truth) -> None:
    name = "model.norm.weight"
    drawn = np.random.default_rng(2).normal(size=truth.entries[f"grad/{name}"].shape)
    assert found(truth, {name: drawn}) is None
