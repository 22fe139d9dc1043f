"""A part computed again gives the truth's numbers: every tensor of every part, at every type."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.check.planted import PLANTED, Planted
from refimpl.checkpoint import Checkpoint
from refimpl.errors import CouldNotRun
from refimpl.grads import GRPO, Request, write_gradients
from refimpl.ops import grpo_forward
from refimpl.port import recompute as module
from refimpl.port.diagnose import diagnose
from refimpl.port.parts import Part, parts_of
from refimpl.port.recompute import recompute
from refimpl.port.truth import Truth
from refimpl.port.vectors import SMALL

from port.examples import TOKENS, Example, edited
from port.truths import TYPES, case_truth, largest, unit_of


def bug_of(op: str, name: str) -> Planted:
    return next(bug for bug in PLANTED if (bug.op, bug.name) == (op, name))


def part_of(truth: Truth, name: str) -> Part:
    return next(part for part in parts_of(truth) if part.name == name)


def furthest(truth: Truth, dtype: str, seed: int = 0) -> float:
    """The largest error in units over all tensors, each of which must be made."""
    worst = 0.0
    for part in parts_of(truth):
        found = recompute(truth, part, None, dtype, seed)
        assert {*part.tensors} <= {*found}, part.name
        for name in part.tensors:
            right = truth.array(name)
            assert found[name].shape == right.shape
            if right.dtype.kind == "f":
                unit = unit_of(truth, name, dtype)
                worst = max(worst, largest(found[name] - right) / (unit or 1.0))
            else:
                assert np.array_equal(found[name], right)
    return worst


@pytest.mark.parametrize("dtype", TYPES)
def test_every_part_gives_the_truth(example: Example, dtype: str) -> None:
    truth = Truth.open(example.truth)
    assert furthest(truth, dtype) <= (0.1 if dtype == "float64" else 4)
    assert furthest(truth, dtype, seed=1) <= 4


def test_a_truth_of_numba_cpu(example: Example, tmp_path: Path) -> None:
    """Its parts are computed again with the reference, whose sums can run in other orders."""

    def change(index: Any) -> None:
        index["metadata"]["implementation"] = "numba_cpu"

    truth = Truth.open(edited(example.truth, tmp_path, change))
    assert furthest(truth, "float64", seed=1) <= 4


def test_inside_attention(example: Example, tmp_path: Path) -> None:
    """Latent, q, k, v and probabilities, and their cotangents."""
    folder = example.folder / "checkpoint"
    source = Checkpoint.open(folder, dtype="float64")
    request = Request(TOKENS, activations="*self_attn.*", mtp=True)
    write_gradients(source, request, tmp_path / "inner", origin=folder)
    whole = Request(TOKENS, activations="*", mtp=True)
    write_gradients(source, whole, tmp_path / "whole", origin=folder)
    inner, truth = Truth.open(tmp_path / "inner"), Truth.open(tmp_path / "whole")
    for direction in ("forward", "backward"):
        part = part_of(inner, f"layer 1, attention, {direction}")
        inside = [name for name in part.tensors if name.rpartition(".")[2] in ("latent", "q", "k")]
        assert len(inside) == 3
        found = recompute(truth, part_of(truth, part.name), None)
        for name in inside:
            assert largest(found[name] - inner.array(name)) <= 1e-14


def test_grpo(example: Example, tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), example.folder / "checkpoint"
    mask = np.zeros(TOKENS.shape, bool)
    mask[:, 3:8] = True
    given = {n: rng.normal(-4, 0.3, TOKENS.shape) for n in ("old_log_prob", "reference_log_prob")}
    settings = {"temperature": 0.8, "clip": [0.2, 0.28], "kl_weight": 0.1}
    grpo = GRPO.of({"mask": mask, "advantages": np.array([0.7, -1.1]), **given}, settings)
    assert "clip" in grpo_forward.__kwdefaults__
    request = Request(TOKENS, grpo=grpo, activations="*", balance_alpha=0.1)
    write_gradients(
        Checkpoint.open(folder, dtype="float64"), request, tmp_path / "t", origin=folder
    )
    truth = Truth.open(tmp_path / "t")
    assert furthest(truth, "float64") <= 8  # of unit roundoffs: no units were measured
    part = part_of(truth, "head, backward")
    wrong = recompute(truth, part, bug_of("grpo", "advantage's sign"))["cot/log_prob"]
    assert largest(wrong - truth.array("cot/log_prob")) > 0.01


@pytest.mark.parametrize("op", ["mla", "router", "moe", "grpo", "attention", "preference_loss"])
def test_cases(op: str) -> None:
    truth = case_truth(op, 3)
    assert furthest(truth, "float64") == 0
    assert furthest(truth, "float32", seed=2) <= 4


def test_a_bug_is_planted_where_it_belongs(example: Example) -> None:
    """Of an op in the table, of the model in its module, of the cross-entropy in the head."""
    truth = Truth.open(example.truth)
    for op, name, part, tensor in (
        ("rope", "backward turns the same way", "layer 1, attention, backward", "kv_a_proj"),
        ("model", "residual dropped in the backward", "layer 1, network, backward", "cot/"),
        ("cross_entropy", "chosen logit only", "head, backward", "lm_head"),
        ("flash_attention", "row sum of p·dp forgotten", "layer 0, attention, backward", "q_b"),
        ("model", "λ missing in the backward", "layer 3, mtp, backward", "shared_head"),
    ):
        which = part_of(truth, part)
        found = recompute(truth, which, bug_of(op, name))
        right = recompute(truth, which, None)
        moved = [
            n for n in which.tensors if largest(found[n] - right[n]) > 1e-6 * largest(right[n])
        ]
        assert any(tensor in name for name in moved), (op, name, moved)


def test_without_a_part_of_the_run(example: Example) -> None:
    truth = Truth.open(example.truth)
    network = part_of(truth, "layer 2, network, backward")
    head = part_of(truth, "head, backward")
    for part, what, changed in (
        (network, "balance", "mlp.gate.weight"),
        (network, "shared", "post_attention_layernorm"),
        (head, "mtp", "lm_head"),
    ):
        found = recompute(truth, part, None, without=what)
        assert any(
            changed in name and largest(found[name] - truth.array(name)) > 1e-9
            for name in part.tensors
            if name in found
        )


def test_what_is_missing_is_named(example: Example, tmp_path: Path) -> None:
    def drop(index: dict) -> None:  # type: ignore[type-arg]
        del index["tensors"]["act/model.layers.0"]

    truth = Truth.open(edited(example.truth, tmp_path, drop))
    part = part_of(truth, "layer 1, gate, forward")
    with pytest.raises(CouldNotRun, match=r"has no act/model\.layers\.0: "):
        recompute(truth, part, None)


def test_without_the_checkpoint(example: Example, tmp_path: Path) -> None:
    shutil.copytree(example.folder / "checkpoint", tmp_path / "c")

    def moved(index: dict) -> None:  # type: ignore[type-arg]
        index["metadata"]["checkpoint"]["path"] = str(tmp_path / "nowhere")

    truth = Truth.open(edited(example.truth, tmp_path, moved))
    with pytest.raises(CouldNotRun, match="nowhere"):
        recompute(truth, part_of(truth, "layer 1, gate, forward"), None)


def test_a_block_that_is_too_large(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Truth.open(example.truth)
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(CouldNotRun, match="the weights of this part take"):
        recompute(truth, part_of(truth, "layer 1, gate, forward"), None)


def test_dlogits_are_not_in_a_truth(example: Example, tmp_path: Path) -> None:
    folder = example.folder / "checkpoint"
    source = Checkpoint.open(folder, dtype="float64")
    dlogits = np.random.default_rng(0).normal(size=(*TOKENS.shape, source.config.vocabulary))
    request = Request(TOKENS, dlogits=dlogits, activations="*")
    write_gradients(source, request, tmp_path / "t", origin=folder)
    truth = Truth.open(tmp_path / "t")
    with pytest.raises(CouldNotRun, match="does not hold the dlogits"):
        recompute(truth, part_of(truth, "head, backward"), None)
    assert furthest_of_block(truth) <= 8


def furthest_of_block(truth: Truth) -> float:
    part = part_of(truth, "layer 2, network, backward")
    found = recompute(truth, part, None)
    errors = {name: largest(found[name] - truth.array(name)) for name in part.tensors}
    return max(error / unit_of(truth, name, "float64") for name, error in errors.items())


def test_tied_head_without_mtp(example: Example) -> None:
    """`left_out` changes what it says and nothing else."""
    truth = Truth.open(example.truth)
    assert truth.config is not None
    assert module.left_out(truth.config, "") == truth.config
    assert module.left_out(truth.config, "shared") == replace(truth.config, shared_experts=0)


def test_a_case_that_lacks_an_input_can_t_be_computed(tmp_path: Path) -> None:
    def drop(index: dict) -> None:  # type: ignore[type-arg]
        del index["tensors"]["rms_norm-1/in/w"]

    truth = Truth.open(edited(SMALL, tmp_path, drop))
    part = next(part for part in parts_of(truth) if part.case == "rms_norm-1" and part.backward)
    with pytest.raises(CouldNotRun, match=r"rms_norm-1, backward of .* can't be computed again"):
        recompute(truth, part, None)
    numbers = {name: 2 * truth.array(name) for name in part.tensors}
    found = diagnose(truth, part, numbers, "float64")
    assert not found.named
    assert found.note.startswith("no planted bug was tried: ")
