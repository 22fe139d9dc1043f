"""The planted bug is named, alone or with those that agree to rounding; what is not in the
catalogue is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from refimpl.check.planted import PLANTED, Planted, plant
from refimpl.port.diagnose import bugs_of, diagnose
from refimpl.port.parts import parts_of
from refimpl.port.truth import Truth

from port.examples import Example, edited
from port.outside import OUTSIDE
from port.rates import of_outside, rates_of_cases, rates_of_model
from port.test_recompute import bug_of, part_of
from port.truths import TYPES, diagnosed, first_wrong, model_port, model_truth
from support import FULL

SEEDS = range(3) if FULL else range(1)  # of cases of each op
FEW = None if FULL else ("linear", "router", "moe", "grpo")  # ops whose cases are run


@pytest.fixture(scope="module")
def truth(example: Example) -> Truth:
    return Truth.open(example.truth)


@pytest.mark.parametrize(
    ("op", "name", "dtype", "part"),
    [
        ("rope", "backward turns the same way", "float32", "layer 3, attention, backward"),
        ("mla", "gradient of k_pe from one head", "float64", "layer 3, attention, backward"),
        ("moe", "dw of the shared experts times K", "bfloat16", "layer 3, network, backward"),
        ("router", "weights not normalised, both ways", "float32", "layer 1, gate, forward"),
        ("model", "λ missing in the backward", "float32", "layer 3, mtp, backward"),
        ("mtp", "concat swapped, both ways", "float32", "layer 3, attention, forward"),
        ("model", "embedding missing its second user", "float32", "embedding, backward"),
    ],
)
def test_a_port_with_a_bug(truth: Truth, op: str, name: str, dtype: str, part: str) -> None:
    """The first wrong part is where the bug first shows, and there it is named."""
    if not FULL and op in ("mla", "mtp", "router"):
        pytest.skip("make test-full")
    bug = bug_of(op, name)
    port = model_port(truth, bug, dtype, 5)
    wrong = first_wrong(truth, port, dtype)
    assert wrong is not None
    assert wrong.name == part
    found = diagnose(truth, wrong, {n: port[n] for n in wrong.tensors if n in port}, dtype)
    assert found.named == [bug]
    assert (found.note == "") == (dtype != "bfloat16")


def test_bugs_that_agree_are_named_together(truth: Truth) -> None:
    """Softmax's row sum, forgotten in plain or in flash attention, is one mistake from outside."""
    bug = bug_of("attention", "no row sum in the softmax's gradient")
    found = diagnosed(truth, model_port(truth, bug, "float32", 5), "float32")
    assert found is not None
    assert {x.op for x in found.named} == {"attention", "flash_attention"}


def test_right_numbers_are_no_bugs(truth: Truth) -> None:
    for dtype in ("float32", "bfloat16"):
        port = model_port(truth, None, dtype, 5)
        assert first_wrong(truth, port, dtype) is None
        part = part_of(truth, "layer 3, attention, backward")
        held = {name: port[name] for name in part.tensors}
        assert diagnose(truth, part, held, dtype).named == []


def test_those_that_test_the_checker_stay_out(truth: Truth) -> None:
    marked = [bug.name for bug in PLANTED if bug.of_checker]
    assert marked == ["no mean term, in float64 alone", "float32 cast inside"]
    assert not [b for p in parts_of(truth) for b in bugs_of(truth, p) if b.of_checker]


def test_ops_that_the_run_does_not_have_stay_out(truth: Truth) -> None:
    ops = {bug.op for part in parts_of(truth) for bug in bugs_of(truth, part)}
    assert "cross_entropy" in ops
    assert not {"grpo", "preference_loss", "bias_update"} & ops


def test_without_the_checkpoint_there_are_hints_alone(example: Example, tmp_path: Path) -> None:
    def moved(index: dict) -> None:  # type: ignore[type-arg]
        index["metadata"]["checkpoint"]["path"] = str(tmp_path / "gone")

    truth = Truth.open(edited(example.truth, tmp_path, moved))
    part = part_of(truth, "layer 1, network, backward")
    found = diagnose(truth, part, {n: -truth.array(n) for n in part.tensors}, "float32")
    assert found.named == []
    assert found.note.startswith("no planted bug was tried: ")
    assert any("sign" in hint for hint in found.hints)


def test_a_truth_that_is_not_this_code_s(example: Example, tmp_path: Path) -> None:
    """Computed again, a part must give the truth; else nothing is named."""
    folder = shutil.copytree(example.truth, tmp_path / "t")
    truth = Truth.open(folder)
    part = part_of(truth, "layer 2, network, forward")
    name = part.tensors[0]
    kept = truth.array
    truth.array = lambda n: kept(n) * 1.01 if n == name else kept(n)  # type: ignore[method-assign]
    found = diagnose(truth, part, {name: kept(name) * 2}, "float32")
    assert found.named == []
    assert "computed again, differs" in found.note


# How many are named: tests/kill_table.py --diagnosis prints the figures


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.98), ("bfloat16", 0.85)])
def test_cases_of_ops(dtype: str, least: float) -> None:
    if dtype == "bfloat16" and not FULL:
        pytest.skip("make test-full")
    rates = rates_of_cases(dtype, SEEDS, FEW)
    assert rates.named >= least * rates.shown, rates
    assert rates.shown >= (0.6 if FULL else 0.4) * rates.found.total()


@pytest.mark.skipif(not FULL, reason="make test-full")
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.98), ("bfloat16", 0.85)])
def test_the_tiny_model(tmp_path: Path, dtype: str, least: float) -> None:
    """Every bug in a whole port of a model that was drawn for this test."""
    rates = rates_of_model(model_truth(tmp_path, 11), dtype)
    assert rates.named >= least * rates.shown, rates
    assert rates.shown >= 0.7 * rates.found.total()


def test_outside_is_large_enough_and_runs() -> None:
    assert len(OUTSIDE) >= 30
    for bug in OUTSIDE:
        plant(bug)


@pytest.mark.parametrize("bug", OUTSIDE, ids=lambda bug: f"{bug.op}: {bug.name}")
def test_what_the_catalogue_does_not_have_is_not_named(truth: Truth, bug: Planted) -> None:
    if not FULL and bug not in OUTSIDE[::8]:
        pytest.skip("make test-full")
    told = of_outside(truth, bug)
    assert told is None or told.named == []


def test_no_false_alarm_of_whole_ports(truth: Truth) -> None:
    """Right ports in the three types; those of single ops are `refimpl power`'s."""
    for dtype in TYPES:
        for seed in range(10 if FULL else 1):
            assert first_wrong(truth, model_port(truth, None, dtype, 100 + seed), dtype) is None


def test_what_a_port_lacks_plays_no_part(truth: Truth) -> None:
    """One tensor of the part is enough to name a bug that shows there."""
    bug = bug_of("mla", "mean over heads for k_pe")
    part = part_of(truth, "layer 3, attention, backward")
    port = model_port(truth, bug, "float32", 5)
    name = next(n for n in part.tensors if "kv_a_proj" in n)
    assert diagnose(truth, part, {name: port[name]}, "float32").named == [bug]
    assert diagnose(truth, part, {}, "float32").named == []
