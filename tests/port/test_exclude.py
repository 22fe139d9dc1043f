"""What a PASS names: the bugs that change nothing on these inputs, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.check.planted import PLANTED
from refimpl.errors import CouldNotRun
from refimpl.port.diagnose import bugs_of
from refimpl.port.exclude import MOST_PARTS, not_excluded, some_of_each
from refimpl.port.parts import parts_of
from refimpl.port.truth import Truth
from refimpl.port.vectors import SMALL

from port.examples import Example, edited
from port.test_recompute import part_of
from port.truths import case_truth, first_wrong, model_port
from support import FULL


@pytest.fixture(scope="module")
def truth(example: Example) -> Truth:
    return Truth.open(example.truth)


def test_a_whole_run(truth: Truth) -> None:
    """Only differences of positions matter; the gate is no softmax; nothing else hides in float32
    that a port with it would show."""
    parts = parts_of(truth)
    names = [name for part in parts for name in part.tensors]
    found = {bug.name for bug in not_excluded(truth, parts, names, "float32")}
    assert "position off by one, both ways" in found
    assert "softmax's gradient from zeroed probabilities" in found
    assert "gradient of k_pe from one head" not in found
    if not FULL:
        return
    coarse = {bug.name for bug in not_excluded(truth, parts, names, "bfloat16")}
    assert found < coarse
    every = dict.fromkeys(bug for part in parts for bug in bugs_of(truth, part))
    for bug in [bug for bug in every if bug.name in found]:
        assert first_wrong(truth, model_port(truth, bug, "float32", 1), "float32") is None, bug


def test_only_what_was_judged_counts(truth: Truth) -> None:
    part = part_of(truth, "layer 1, attention, backward")
    kv_b = [name for name in part.tensors if "kv_b" in name]
    few = {bug.name for bug in not_excluded(truth, [part], kv_b, "float32")}
    assert "k_pe not rotated back" in few
    all_of_it = {bug.name for bug in not_excluded(truth, [part], part.tensors, "float32")}
    assert "k_pe not rotated back" not in all_of_it


def test_a_case_of_an_op() -> None:
    truth = case_truth("mla", 3)
    names = [name for part in parts_of(truth) for name in part.tensors]
    found = {bug.name for bug in not_excluded(truth, parts_of(truth), names, "float32")}
    assert truth.kwargs["heads"] == 1
    assert "gradient of k_pe from one head" in found
    assert "gradient of k_pe halved" not in found


def test_many_layers_are_not_all_tried(truth: Truth) -> None:
    part = part_of(truth, "layer 1, attention, backward")
    layers = [part._replace(layer=n) for n in range(60)]
    tried = [x.layer for x in some_of_each(layers)]
    assert len(tried) == MOST_PARTS
    assert (tried[0], tried[-1]) == (0, 59)


def test_without_inputs_nothing_is_claimed(example: Example, tmp_path: object) -> None:
    def drop(index: dict) -> None:  # type: ignore[type-arg]
        for name in [n for n in index["tensors"] if n.startswith("act/")]:
            del index["tensors"][name]

    truth = Truth.open(edited(example.truth, tmp_path, drop))  # type: ignore[arg-type]
    with pytest.raises(CouldNotRun, match="has no act/"):
        not_excluded(truth, parts_of(truth), list(truth.entries), "float32")


def test_large_parts_are_not_tried(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed: of a model of real size it would take hours."""
    from refimpl.port import exclude

    monkeypatch.setattr(exclude, "MOST_BYTES", 1000)
    monkeypatch.setattr(exclude, "recompute", None)
    with pytest.raises(
        CouldNotRun, match=r"weights of embedding and head take 0.0 GiB in float64, and no bug"
    ):
        not_excluded(truth, parts_of(truth), list(truth.entries), "float32")


def test_shapes_that_differ_show() -> None:
    from refimpl.port.exclude import differs

    truth = case_truth("rms_norm", 1)
    right = truth.array("c/grad/w")
    assert differs(np.ones((2, *right.shape)), truth, "c/grad/w", "float32")
    assert not differs(right, truth, "c/grad/w", "float32")
    assert not differs(None, truth, "c/grad/w", "float32")


def excluded_by(op: str, dtype: str, *, valid: bool = True) -> tuple[set[str], set[str]]:
    """The bugs of an op's small vectors, hidden and shown; every number of theirs judged."""
    truth = Truth.open(SMALL)
    about = truth.metadata["cases"]
    parts = [
        x for x in parts_of(truth) if about[x.case]["op"] == op and about[x.case]["valid"] == valid
    ]
    names = [name for part in parts for name in part.tensors]
    every = {bug.name for part in parts for bug in bugs_of(truth, part)}
    hidden = {bug.name for bug in not_excluded(truth, parts, names, dtype)}
    return hidden, every - hidden


def test_functions_without_a_pair_are_told_by_the_vectors() -> None:
    hidden, shown = excluded_by("bias_update", "float32")
    assert not hidden
    assert {bug.name for bug in PLANTED if bug.op in ("bias_update", "expert_load")} == shown
    hidden, shown = excluded_by("bias_update", "bfloat16")
    assert hidden
    assert not shown


def test_a_case_that_ours_can_t_compute_excludes_nothing() -> None:
    """Golden values of GRPO have settings that our function does not: that raises, and is no bug's
    doing."""
    truth = Truth.open(SMALL)
    parts = [x for x in parts_of(truth) if x.case == "golden-grpo-advantages_trl"]
    names = [name for part in parts for name in part.tensors]
    assert parts
    hidden = not_excluded(truth, parts, names, "float64")
    assert {bug.name for bug in hidden} == {bug.name for bug in bugs_of(truth, parts[0])}


def test_what_is_wrong_on_purpose_excludes_nothing() -> None:
    hidden, shown = excluded_by("rms_norm", "float64", valid=False)
    assert hidden
    assert not shown
