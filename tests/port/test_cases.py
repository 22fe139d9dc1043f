"""One case of an op at any type: the permutations are symmetries, right ports stay within the
units, and planted bugs are named by their numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.check.planted import FUNCTIONS, PLANTED
from refimpl.grads.rounded import round_bfloat16
from refimpl.port import cases
from refimpl.port.cases import (
    TYPES,
    OpCase,
    apart,
    bugs_of,
    difference,
    name_bugs,
    op_case,
    planted,
    rerun,
    rounded_to,
    run,
    truth,
    units,
)

from support import FULL

SEEDS = range(40 if FULL else 1)
OP_BUGS = [x for x in PLANTED if x.op not in ("model", *FUNCTIONS) and not x.of_checker]
if not FULL:
    OP_BUGS = OP_BUGS[::11]


def drawn(op: str, seed: int) -> OpCase:
    return op_case(op, CASES[op](RandomDraw(seed)), seed)


@pytest.mark.parametrize("op", CASES)
def test_another_order_changes_nothing_but_rounding(op: str) -> None:
    """Of the reference, whose inputs also move by a rounding."""
    for seed in SEEDS:
        case = drawn(op, seed)
        exact = truth(case)
        again = rerun(case, "float64", np.random.default_rng(seed))
        for name, x in exact.items():
            size = float(np.max(np.abs(x), initial=0)) if x.dtype.kind == "f" else 0.0
            assert difference(again[name], x) <= 1e-12 * max(size, 1), name


@pytest.mark.parametrize("op", CASES)
def test_right_ports_stay_within_the_units(op: str) -> None:
    """Ours, and where there is one another way to compute the same, whose own reruns count too, as
    they do before `check` calls a tensor wrong."""
    others = {"mla": "mla_absorbed", "mla_absorbed": "mla", "attention": "flash_attention"}
    for seed in SEEDS:
        case = drawn(op, 100 + seed)
        for dtype in TYPES:
            at = rounded_to(case, dtype)
            exact = truth(at)
            unit = units(at, dtype, exact)
            assert not apart(run(at, dtype), exact, unit), (seed, dtype)
            if op in others and dtype != "bfloat16":
                other = pair_of(others[op])
                own = units(at, dtype, exact, other)
                unit = {name: max(x, own[name]) for name, x in unit.items()}
                assert not apart(run(at, dtype, other), exact, unit), (seed, dtype)


def test_bfloat16_is_rounded_everywhere() -> None:
    """Inputs, every op inside and what comes out are bfloat16; the unit is about one rounding."""
    case = rounded_to(drawn("mla", 3), "bfloat16")
    found = run(case, "bfloat16")
    for x in (*case.inputs.values(), *found.values()):
        if x is not None:
            assert np.array_equal(round_bfloat16(x), x)
    exact = truth(case)
    worst = difference(found["out/y"], exact["out/y"]) / float(np.max(np.abs(exact["out/y"])))
    assert 2e-4 < worst < 5e-2


@pytest.mark.parametrize("bug", OP_BUGS, ids=lambda bug: f"{bug.op}: {bug.name}")
def test_a_bug_is_named_by_its_numbers(bug: cases.Planted) -> None:
    """In float32, wherever the inputs show it clearly, and nowhere else; from a rerun in another
    order, as a port would. Between one and three bounds its rounding errors may hide it."""
    for seed in SEEDS:
        case = rounded_to(drawn(bug.op, 500 + seed), "float32")
        exact = truth(case)
        theirs = run(case, "float32", planted(bug))
        unit = units(case, "float32", exact)
        shown = apart(theirs, exact, unit)
        clear = apart(theirs, exact, {name: 3 * x for name, x in unit.items()})
        named = name_bugs(case, theirs, "float32")
        assert bug in named or not clear, named
        assert shown or bug not in named, named


def test_the_mistake_of_a_part_is_named() -> None:
    """An MLA whose norm forgot its mean term."""
    case = drawn("mla", 2)
    norm = next(bug for bug in PLANTED if bug.name == "no mean term")
    (how,) = [how for bug, how in bugs_of(case) if bug == norm]
    named = name_bugs(case, run(case, "float64", **how), "float64")
    assert named == [norm]


def test_what_is_right_or_unknown_is_not_named() -> None:
    case = drawn("mla", 2)
    right = run(case, "float64")
    assert name_bugs(case, right, "float64") == []
    for factor in (1 + 1e-6, np.nan):
        wrong = right | {"grad/w_o": factor * right["grad/w_o"]}
        assert name_bugs(case, wrong, "float64") == []


def test_a_bug_is_matched_within_its_own_unit() -> None:
    """As many of them as a port may have, and no more."""
    case = rounded_to(drawn("mla", 3), "float32")
    bug = next(bug for bug in PLANTED if bug.name == "dx misses the query path")
    wrong = truth(case, planted(bug))
    own = units(case, "float32", wrong, planted(bug), rows=False)
    for away, named in ((0, [bug]), (3, [bug]), (6, [])):
        theirs = {name: x + away * own[name] for name, x in wrong.items()}
        assert name_bugs(case, theirs, "float32", among=[bug]) == named


def test_a_tensor_that_is_zero_has_a_unit() -> None:
    """The noise of terms that cancel in another order; anything more is wrong."""
    case = drawn("rms_norm", 0)
    case = OpCase("rms_norm", case.inputs, case.kwargs, {"y": 0 * case.cot["y"]})
    exact = truth(case)
    unit = units(case, "float64", exact)
    assert unit["grad/x"] == 2.0**-53 * float(np.max(np.abs(exact["out/y"])))
    noise = {"grad/x": np.full(exact["grad/x"].shape, unit["grad/x"])}
    assert not apart(noise, exact, unit)
    assert apart({"grad/x": 1e3 * noise["grad/x"]}, exact, unit) == ["grad/x"]
