"""The verdict: clean ports pass, mistakes are found where they were made, and what can't be judged
does not pass."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refimpl.errors import CouldNotRun
from refimpl.port.parts import parts_of
from refimpl.port.recompute import recompute
from refimpl.port.report import Verdict
from refimpl.port.truth import Truth
from refimpl.port.vectors import SMALL
from refimpl.port.verdict import compare_folders, expected

from port.examples import (
    TINY,
    Arrays,
    Example,
    edited,
    parameters,
    planted,
    routes_of,
    run,
    save,
    write_vectors,
)

NORM = "grad/model.norm.weight"
O_PROJ = "grad/model.layers.1.self_attn.o_proj.weight"
TIE = "aux/routes.1"
pytestmark = pytest.mark.usefixtures("no_catalogue")


def judge(example: Example, tmp_path: Path, arrays: Arrays, **given: Any) -> Verdict:
    truth = given.pop("truth", example.truth)
    return compare_folders(save(tmp_path / "port.safetensors", arrays), truth, **given)


def only(arrays: Arrays, *beginnings: str) -> Arrays:
    return {name: x for name, x in arrays.items() if name.startswith(beginnings)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_clean_port_passes(example: Example, tmp_path: Path, dtype: str) -> None:
    verdict = judge(example, tmp_path, example.ports[dtype])
    assert (verdict.verdict, verdict.dtype, verdict.ok) == ("PASS", dtype, True), str(verdict)
    assert {x.status for x in verdict.tensors.values()} == {"ok"}
    assert list(verdict.tensors) == [name for _, name in expected(Truth.open(example.truth))]
    assert verdict.extra == verdict.notes == []
    assert max(x.units for x in verdict.tensors.values()) > 0.1


@pytest.mark.parametrize(
    ("op", "bug", "part", "tensor", "blocks"),
    [
        (
            "mla",
            "gradient of k_pe from one head",
            "layer 3, attention, backward",
            "self_attn.kv_a_proj_with_mqa.weight",
            "latent rows: ok, rotated key rows: wrong",
        ),
        (
            "attention",
            "no row sum in the softmax's gradient",
            "layer 3, attention, backward",
            "self_attn.kv_b_proj.weight",
            "key rows: wrong, value rows: ok",
        ),
        (
            "router",
            "routed scale missing",
            "layer 3, network, backward",
            "mlp.gate.weight",
            "everywhere",
        ),
        (
            "swiglu",
            "gate and up swapped",
            "layer 3, network, backward",
            "mlp.shared_experts.up_proj.weight",
            "",
        ),
        ("mtp", "halves swapped", "layer 3, mtp, backward", "enorm.weight", ""),
        (
            "rope",
            "halves for interleaved, both ways",
            "layer 0, attention, forward",
            "self_attn",
            "positions 1…8: wrong, the other 1 ok",
        ),
        ("head_cross_entropy", "sign", "layer 3, mtp, backward", "shared_head.norm.weight", ""),
    ],
)
def test_a_mistake_is_found_where_it_was_made(
    example: Example, tmp_path: Path, op: str, bug: str, part: str, tensor: str, blocks: str
) -> None:
    routes = routes_of(example.arrays)
    wrong = run(tmp_path / "run", parameters(), TINY, ops=planted(op, bug), routes=routes)
    verdict = judge(example, tmp_path, wrong)
    assert (verdict.verdict, verdict.ok) == ("FAIL", False)
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.name == part
    first = verdict.first_wrong.first
    assert first.name.endswith(tensor)
    assert blocks in first.blocks
    assert str(verdict.first_wrong).startswith(f"{part}: {first.name} {list(first.shape)}")
    assert verdict.diagnosis is not None
    assert verdict.heat is not None


def test_wrong_is_more_than_four_units(example: Example, tmp_path: Path) -> None:
    """One number off by a little less, then by a little more."""
    unit = Truth.open(example.truth).entries[O_PROJ].units["float32"]
    for units, word in ((3.99, "PASS"), (4.01, "FAIL"), (-4.01, "FAIL")):
        arrays = {name: x.copy() for name, x in example.arrays.items()}
        arrays[O_PROJ][3, 7] += units * unit
        verdict = judge(example, tmp_path, arrays, dtype="float32")
        assert verdict.verdict == word
        found = verdict.tensors[O_PROJ].difference
        assert found is not None
        assert found.worst == (3, 7)
        assert verdict.tensors[O_PROJ].units == pytest.approx(abs(units), rel=1e-6)


def test_what_is_not_finite_is_wrong(example: Example, tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        arrays = example.arrays | {NORM: np.where(np.arange(20) == 3, value, example.arrays[NORM])}
        verdict = judge(example, tmp_path, arrays)
        assert verdict.verdict == "FAIL"
        assert verdict.tensors[NORM].difference is not None
        assert verdict.tensors[NORM].difference.unlike == 1


# What is given


def test_gradients_alone_pass(example: Example, tmp_path: Path) -> None:
    gradients = only(example.ports["float32"], "grad/")
    verdict = judge(example, tmp_path, gradients)
    assert verdict.verdict == "PASS"
    assert {x.name for x in verdict.those("ok")} == gradients.keys()
    bare = {name.removeprefix("grad/"): x for name, x in gradients.items()}
    assert judge(example, tmp_path, bare).verdict == "PASS"


def test_the_forward_alone_passes(example: Example, tmp_path: Path) -> None:
    verdict = judge(example, tmp_path, only(example.ports["float32"], "act/", "out/loss"))
    assert verdict.verdict == "PASS"
    assert verdict.notes == ["no gradient is given: the backward isn't judged"]


def test_a_gradient_that_was_forgotten_does_not_pass(example: Example, tmp_path: Path) -> None:
    arrays = only(example.ports["float64"], "grad/")
    for name in [name for name in arrays if ".1.mlp.experts." in name]:
        del arrays[name]
    verdict = judge(example, tmp_path, arrays)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "missing: grad/model.layers.1.mlp.experts.0…3.down_proj.weight (4 tens" in verdict.reason
    attention = only(arrays, "grad/model.layers.1.self_attn.")
    assert judge(example, tmp_path, attention).verdict == "INCONCLUSIVE"
    for pattern in ("*.layers.1.self_attn.*", "grad/model.layers.1.self_attn.*"):
        chosen = judge(example, tmp_path, attention, only=pattern)
        assert chosen.verdict == "PASS"
        assert len(chosen.those("ok")) == 7


def test_only_selects_what_is_judged(example: Example, tmp_path: Path) -> None:
    arrays = example.arrays | {NORM: 2 * example.arrays[NORM], "grad/mine": np.zeros(2)}
    assert judge(example, tmp_path, arrays).verdict == "FAIL"
    verdict = judge(example, tmp_path, arrays, only="*.layers.*")
    assert verdict.verdict == "PASS"
    assert verdict.extra == ["grad/mine"]  # not those that were left out
    with pytest.raises(CouldNotRun, match=r"^only must match a name .* got \*mla\*$"):
        judge(example, tmp_path, arrays, only="*mla*")


def test_nothing_that_is_expected(example: Example, tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"must hold some of the 148 tensors .* it holds a, b"):
        judge(example, tmp_path, {"a": np.zeros(2), "b": np.zeros(2)})


def test_other_inputs(example: Example, tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    arrays = {name: np.ascontiguousarray(x) for name, x in example.arrays.items() if x.ndim}
    save_file(arrays, path)
    assert compare_folders(path, example.truth).verdict == "PASS"
    arrays["in/tokens"] = arrays["in/tokens"][:, ::-1].copy()
    save_file(arrays, path)
    with pytest.raises(CouldNotRun, match="was made from other inputs: in/tokens is not that of"):
        compare_folders(path, example.truth)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda x: {O_PROJ: x.T.copy()},
            r"must have shape \[20, 18\], got \[18, 20\]: it is trans",
        ),
        (lambda x: {O_PROJ: x[1:].copy()}, r"must have shape \[20, 18\], got \[19, 18\]"),
        (lambda x: {O_PROJ: x, O_PROJ[5:]: x}, f"given twice, as {O_PROJ} and {O_PROJ[5:]}"),
        (lambda x: {O_PROJ: x.astype(int)}, "must be floats, got int64"),
    ],
)
def test_what_cannot_be_compared_does_not_pass(
    example: Example, tmp_path: Path, change: Any, line: str
) -> None:
    arrays = example.arrays | change(example.arrays[O_PROJ])
    verdict = judge(example, tmp_path, arrays)
    assert verdict.verdict == "INCONCLUSIVE"
    assert re.search(line, verdict.reason)
    assert re.search(line, verdict.tensors[O_PROJ].what)


def test_two_files_with_one_tensor(example: Example, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    arrays = only(example.arrays, "grad/")
    save(tmp_path / "shards" / "a.safetensors", arrays)
    save(tmp_path / "shards" / "b.safetensors", {NORM: arrays[NORM]})
    verdict = compare_folders(tmp_path / "shards", example.truth)
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.tensors[NORM].what == "is in a.safetensors and in b.safetensors"


# The type


def test_the_type_is_the_coarsest_that_is_stored(example: Example, tmp_path: Path) -> None:
    arrays = dict(example.ports["float64"])
    arrays[NORM] = arrays[NORM].astype(np.float32)
    verdict = judge(example, tmp_path, arrays)
    assert (verdict.dtype, verdict.verdict) == ("float32", "PASS")
    assert verdict.notes == ["stored as float32, float64, judged as float32"]
    verdict = judge(example, tmp_path, arrays, dtype="float64")
    assert verdict.verdict == "FAIL"
    assert verdict.notes[1].startswith("each wrong tensor is within 4 units of float32: give that")


def test_types_that_cannot_be_judged(example: Example, tmp_path: Path) -> None:
    half = example.arrays | {NORM: example.arrays[NORM].astype(np.float16)}
    with pytest.raises(CouldNotRun, match=r"norm.weight must be float64, .*, got float16"):
        judge(example, tmp_path, half)
    with pytest.raises(CouldNotRun, match=r"norm.weight must be float64, .*, got float16"):
        judge(example, tmp_path, half, dtype="bfloat16")
    truth = edited(
        example.truth, tmp_path, lambda x: x["metadata"]["units"].update(types=["float64"])
    )
    with pytest.raises(CouldNotRun, match=r"has no units of float32 \(it has float64\): write it"):
        judge(example, tmp_path, example.ports["float32"], truth=truth)
    with pytest.raises(CouldNotRun, match=r"^dtype must be one of float64, float32, bfloat16"):
        judge(example, tmp_path, example.arrays, dtype="int8")


def test_a_unit_as_large_as_the_tensor(example: Example, tmp_path: Path) -> None:
    """Then a gradient of zeros would pass: it can't be judged. One that is wrong still is."""
    large = 0.26 * np.abs(example.arrays[NORM]).max()
    truth = edited(
        example.truth, tmp_path, lambda x: x["tensors"][NORM]["units"].update(float64=large)
    )
    verdict = judge(example, tmp_path, example.arrays, truth=truth)
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.reason == f"the rounding errors of float64 are as large as {NORM}"
    wrong = example.arrays | {NORM: -9 * example.arrays[NORM]}
    assert judge(example, tmp_path, wrong, truth=truth).verdict == "FAIL"


def test_rotation_that_the_type_hides(example: Example, tmp_path: Path) -> None:
    """A factor of YaRN so near to 1 that 9 positions turn by less than float32 has."""

    def change(index: Any) -> None:
        index["metadata"]["config"]["yarn"][0] = 1 + 1e-9

    truth = edited(example.truth, tmp_path, change)
    verdict = judge(example, tmp_path, example.arrays, truth=truth, dtype="float32")
    assert verdict.verdict == "INCONCLUSIVE"
    assert "the rotation can't be judged without more tokens" in verdict.reason
    verdict = judge(example, tmp_path, example.arrays, truth=truth)
    assert verdict.verdict == "PASS"


# Routes


def test_the_order_of_experts_is_the_ports_own(example: Example, tmp_path: Path) -> None:
    back = {
        name: x[..., ::-1].copy()
        for name, x in only(example.arrays, "aux/routes", "aux/weights", "aux/counted").items()
    }
    assert judge(example, tmp_path, example.arrays | back).verdict == "PASS"
    alone = only(back, "aux/weights")
    assert judge(example, tmp_path, example.arrays | alone).verdict == "FAIL"


def other_routes(example: Example) -> np.ndarray:
    """The first token of layer 1 goes to experts of another group."""
    routes = example.arrays[TIE].copy()
    routes[0, 0] = [e for e in range(4) if e // 2 != routes[0, 0, 0] // 2]
    return routes


def test_other_experts(example: Example, tmp_path: Path) -> None:
    """Without the gate's biases, nothing says whether it was a tie."""
    changed = {TIE: other_routes(example)}
    behind = {O_PROJ: 2 * example.arrays[O_PROJ]}
    truth = edited(example.truth, tmp_path, lambda x: x["metadata"].update(checkpoint=None))
    verdict = judge(example, tmp_path, example.arrays | changed | behind, truth=truth)
    assert verdict.verdict == "INCONCLUSIVE"
    assert (
        "aux/routes.1 has other experts for 1 of 18 tokens, and tensors computed" in verdict.reason
    )
    assert verdict.routes == tmp_path / "port.safetensors"
    before = {"act/model.layers.0": 2 * example.arrays["act/model.layers.0"]}
    verdict = judge(example, tmp_path, example.arrays | changed | before, truth=truth)
    assert verdict.verdict == "FAIL"
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.name == "layer 0, network, forward"


def test_other_experts_that_are_not_selected(example: Example, tmp_path: Path) -> None:
    """A port's routes are looked at, whatever is selected."""
    truth = edited(example.truth, tmp_path, lambda x: x["metadata"].update(checkpoint=None))
    behind = {O_PROJ: 2 * example.arrays[O_PROJ], TIE: other_routes(example)}
    for changed in (truth, example.truth):  # without and with the biases of the gate
        given = {"truth": changed, "only": "grad/*"}
        verdict = judge(example, tmp_path, example.arrays | behind, **given)
        assert verdict.verdict == "INCONCLUSIVE"
        assert "aux/routes.1 has other experts for 1 of 18 tokens" in verdict.reason
        assert verdict.routes == tmp_path / "port.safetensors"
        assert judge(example, tmp_path, example.arrays, **given).verdict == "PASS"


def test_other_experts_that_no_rounding_explains(example: Example, tmp_path: Path) -> None:
    """With the gate's scores in the truth and its biases in the checkpoint, that is known."""
    verdict = judge(example, tmp_path, example.arrays | {TIE: other_routes(example)})
    assert verdict.verdict == "FAIL"
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.name == "layer 1, gate, forward"
    assert "which rounding of the scores can't explain for 1 of them" in str(verdict)
    twice = np.repeat(example.arrays[TIE][..., :1], 2, axis=-1)
    verdict = judge(example, tmp_path, example.arrays | {TIE: twice})
    assert (verdict.verdict, verdict.tensors[TIE].status) == ("FAIL", "wrong")
    verdict = judge(example, tmp_path, example.arrays | {TIE: example.arrays[TIE] > 1})
    assert verdict.reason == f"{TIE} must be integers, got bool"
    strange = example.arrays[TIE] + 4
    verdict = judge(example, tmp_path, example.arrays | {TIE: strange})
    assert (verdict.verdict, verdict.tensors[TIE].status) == ("FAIL", "wrong")


def test_routes_below_float32(example: Example, tmp_path: Path) -> None:
    """Behind the first choice wrong tensors say nothing without the port's routes; right ones
    do."""
    arrays = {
        name: x.astype(ml_dtypes.bfloat16) if x.dtype.kind == "f" else x
        for name, x in example.arrays.items()
    }
    without = {name: x for name, x in arrays.items() if not name.startswith("aux/")}
    wrong = {O_PROJ: (2 * example.arrays[O_PROJ]).astype(ml_dtypes.bfloat16)}
    most = "*"
    early = "act/model.layers.0.self_attn"
    first = {early: (2 * example.arrays[early]).astype(ml_dtypes.bfloat16)}
    for given, word in (
        (arrays, "PASS"),
        (without, "PASS"),
        (arrays | wrong, "FAIL"),
        (without | wrong, "INCONCLUSIVE"),
        (without | first, "FAIL"),
    ):
        verdict = judge(example, tmp_path, given, only=most)
        assert (verdict.dtype, verdict.verdict) == ("bfloat16", word), str(verdict)
        assert verdict.routes is None
    verdict = judge(example, tmp_path, without | wrong, only=most)
    assert "a tie within rounding may choose others: give aux/routes.L" in verdict.reason
    verdict = judge(example, tmp_path, without | wrong, only="*.layers.1.*")
    assert verdict.verdict == "INCONCLUSIVE"


def test_what_a_verdict_does_not_say(example: Example, tmp_path: Path) -> None:
    def change(index: Any) -> None:
        index["metadata"]["request"]["routes_given"] = True
        index["metadata"]["config"] |= {"top_k": 4, "groups": 1, "keep_groups": 1}

    truth = edited(example.truth, tmp_path, change)
    verdict = judge(example, tmp_path, example.arrays, truth=truth)
    assert [note.split(":")[0] for note in verdict.notes] == [
        "every token goes to every expert",
        "the truth was computed with given routes",
    ]


def test_padding_is_not_compared(example: Example, tmp_path: Path) -> None:
    """The activations and routes of a position that is padding; its gradients are."""
    real = np.ones((2, 9), bool)
    real[1, 7:] = False

    def change(index: Any) -> None:
        told = {"dtype": "bool", "shape": [2, 9], "file": "mask.safetensors"}
        index["tensors"]["in/key_mask"] = told

    truth = edited(example.truth, tmp_path, change)
    save_file({"in/key_mask": real}, truth / "mask.safetensors")

    def broken(name: str, place: Any) -> Arrays:
        x = example.arrays[name].copy()
        x[place] = 3 if x.dtype.kind == "i" else np.nan
        return example.arrays | {name: x}

    for name, place, word in (
        ("act/model.layers.1", (1, 7), "PASS"),
        ("act/model.layers.1", (1, 6), "FAIL"),
        ("act/model.layers.3", (1, 6), "PASS"),  # of an MTP module: it reads position 7
        ("act/model.layers.3", (1, 5), "FAIL"),
        ("act/model.layers.1.mlp.gate.scores", (1, 8), "PASS"),
        ("aux/routes.1", (1, 8), "PASS"),
        ("out/logits", (1, 8), "PASS"),
        ("cot/model.layers.1", (1, 8), "FAIL"),
    ):
        verdict = judge(example, tmp_path, broken(name, place), truth=truth)
        assert verdict.verdict == word, (name, place)


# Conformance vectors


def test_vectors(tmp_path: Path) -> None:
    """A right port gives what the valid cases say, and not what the one says that is wrong."""
    arrays = write_vectors(tmp_path / "truth")
    right = {name: x + ("linear-2/" in name) for name, x in arrays.items() if "/in/" not in name}
    example = Example(tmp_path, tmp_path / "truth", arrays, {})
    verdict = judge(example, tmp_path, right)
    assert verdict.verdict == "PASS", str(verdict)
    assert judge(example, tmp_path, arrays).verdict == "FAIL"  # it agrees with what is wrong
    bug = right | {"swiglu-1/grad/x": 2 * arrays["swiglu-1/grad/x"]}
    verdict = judge(example, tmp_path, bug)
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.name == "swiglu-1, backward"


def test_vectors_of_some_types(tmp_path: Path) -> None:
    """Golden values have units of float64 alone: a port in float32 passes without them."""
    arrays = write_vectors(tmp_path / "truth")
    example = Example(tmp_path, tmp_path / "truth", arrays, {})
    right = {name: x + ("linear-2/" in name) for name, x in arrays.items() if "/in/" not in name}
    wrong = right | {"golden-1/out/y": np.zeros((2, 3))}
    assert judge(example, tmp_path, wrong).verdict == "FAIL"
    verdict = judge(example, tmp_path, wrong, dtype="float32")
    assert verdict.verdict == "PASS"
    assert "golden-1/out/y" not in verdict.tensors
    assert verdict.extra == []


def test_vectors_of_some_ops(tmp_path: Path) -> None:
    """All cases of an op, or none of it."""
    arrays = write_vectors(tmp_path / "truth")
    example = Example(tmp_path, tmp_path / "truth", arrays, {})
    one = only(arrays, "swiglu-1/out", "swiglu-1/grad")
    assert judge(example, tmp_path, one).verdict == "PASS"
    verdict = judge(example, tmp_path, only(arrays, "linear-1/out", "linear-1/grad"))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "missing: linear-2/out/y" in verdict.reason
    (tmp_path / "map.toml").write_text('"a" = "b"')
    with pytest.raises(CouldNotRun, match=r"^layout names a model's tensors, but the truth has"):
        judge(example, tmp_path, one, layout=tmp_path / "map.toml")


def test_a_truth_that_loses_a_file(example: Example, tmp_path: Path) -> None:
    truth = shutil.copytree(example.truth, tmp_path / "truth")
    (truth / "grad-norm.safetensors").unlink()
    with pytest.raises(CouldNotRun, match=r"grad-norm.safetensors can't be read"):
        judge(example, tmp_path, example.arrays, truth=truth)


def right_numbers() -> Arrays:
    """What a right port has of the small vectors, without the golden values."""
    truth, found = Truth.open(SMALL), Arrays()
    for part in parts_of(truth):
        if not part.case.startswith("golden-"):
            known = {name: np.array(truth.array(name)) for name in part.tensors}
            if not truth.metadata["cases"][part.case]["valid"]:
                known |= {name: recompute(truth, part, None)[name] for name in known}
            found |= known
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_right_forward_alone_of_vectors(tmp_path: Path, dtype: str) -> None:
    """Some cases are wrong on purpose in their gradients alone: a right forward agrees with theirs,
    and is right."""
    arrays = {
        name: x.astype(dtype) if x.dtype.kind == "f" else x
        for name, x in right_numbers().items()
        if "/out/" in name
    }
    given: dict[str, Any] = {"only": "[!g]*/out/*"} if dtype == "float64" else {}
    verdict = compare_folders(save(tmp_path / "port.safetensors", arrays), SMALL, **given)
    assert verdict.ok, str(verdict)
    assert not any(x.status == "wrong" for x in verdict.tensors.values())


def test_who_agrees_with_what_is_wrong_on_purpose_has_that_bug(tmp_path: Path) -> None:
    arrays, wrong = right_numbers(), "rms_norm-wrong-1/grad/x"
    arrays[wrong] = Truth.open(SMALL).array(wrong)
    verdict = compare_folders(
        save(tmp_path / "port.safetensors", arrays), SMALL, only="rms_norm-wrong-1/*"
    )
    assert verdict.verdict == "FAIL"
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.first.name == wrong
    assert verdict.diagnosis is not None
    assert [bug.name for bug in verdict.diagnosis.named] == ["no mean term"]


def test_the_rest_of_a_case_that_is_wrong_on_purpose_is_judged(tmp_path: Path) -> None:
    arrays = right_numbers()
    arrays["rms_norm-wrong-1/out/y"] = arrays["rms_norm-wrong-1/out/y"] * 1.5
    verdict = compare_folders(
        save(tmp_path / "port.safetensors", arrays), SMALL, only="rms_norm-wrong-1/*"
    )
    assert [n for n, x in verdict.tensors.items() if x.status == "wrong"] == [
        "rms_norm-wrong-1/out/y"
    ]
