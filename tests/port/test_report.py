"""The report: short text, JSON by its schema."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from refimpl.check.planted import PLANTED
from refimpl.port.compare import Difference
from refimpl.port.diagnose import Diagnosis
from refimpl.port.report import TensorResult, Verdict, cosine, folded, number, row
from refimpl.port.verdict import compare_folders

from port.examples import TINY, Example, parameters, planted, routes_of, run, save
from support import PACKAGE

SCHEMA = json.loads((PACKAGE / "port" / "schemas" / "check.json").read_text())
VALID = jsonschema.Draft202012Validator(SCHEMA).is_valid
MOST_LINES = 40


pytestmark = pytest.mark.usefixtures("no_catalogue")


@pytest.fixture
def failed(
    no_catalogue: None, example: Example, tmp_path_factory: pytest.TempPathFactory
) -> Verdict:
    """A port with a mistake in MLA, without act/, and with a tensor more."""
    folder = tmp_path_factory.mktemp("failed")
    ops = planted("mla", "gradient of k_pe from one head")
    wrong = run(folder / "run", parameters(), TINY, ops=ops, routes=routes_of(example.arrays))
    wrong = {name: x for name, x in wrong.items() if not name.startswith("act/")}
    path = save(folder / "port.safetensors", wrong | {"grad/mine\x1b[31m": np.zeros(2)})
    return compare_folders(path, example.truth)


def test_the_verdict_is_first_and_the_rest_is_short(failed: Verdict) -> None:
    lines = str(failed).splitlines()
    assert lines[0].startswith("FAIL: 76 of ")
    first = "grad/model.layers.3.self_attn.kv_a_proj_with_mqa.weight"
    assert lines[1] == (
        f"first wrong part: layer 3, attention, backward: {first} [11, 20]; "
        "latent rows: ok, rotated key rows: wrong"
    )
    # a unit is rounding noise, measured: it depends on the order of sums of this processor's BLAS
    error = r"  error [12]\.[0-9]e\+13 units, 0\.108 of the largest number; worst at \[9, 1"
    assert re.match(error, lines[2])
    assert lines[3].startswith(
        "  wrong: self_attn.kv_a_proj_with_mqa.weight, input_layernorm.weight; ok: cot/self_attn, "
    )
    assert len(lines) < MOST_LINES
    assert any(re.fullmatch("and [0-9]+ more rows", x) for x in lines)
    text = str(failed)
    assert "not given: 17 of act/" in lines
    assert "only in the port:\n  grad/mine\\x1b[31m" in text
    assert all(line.isprintable() for line in lines)


def test_the_diagnosis_follows_the_first_wrong_part(failed: Verdict) -> None:
    found = Diagnosis(list(PLANTED[:2]), ["twice the truth"], "hints alone: no checkpoint")
    verdict = replace(failed, diagnosis=found)
    lines = str(verdict).splitlines()
    assert lines[4] == (
        "  these are the numbers of the planted bug linear: weight gradient over one batch row or "
        "embedding: = for += on repeated ids"
    )
    assert re.match(r"  refimpl/ops/linear.py:\d+ \(linear.3\) has xp.matmul", lines[5])
    assert lines[6].startswith("  refimpl/ops/embedding.py:")
    assert lines[7:9] == ["  hint: twice the truth", "  hints alone: no checkpoint"]
    content = verdict.to_json()
    assert VALID(content)
    assert content["diagnosis"]["bugs"][0]["place"]["tag"] == "(linear.3)"


def test_a_mistake_that_is_not_known_is_said_to_be(failed: Verdict) -> None:
    line = "  no planted bug gives these numbers, and no hint fits: the mistake is not known"
    assert line in str(replace(failed, diagnosis=Diagnosis([], [], ""))).splitlines()
    for found in (Diagnosis([], ["twice the truth"], ""), Diagnosis([], [], "no checkpoint"), None):
        assert line not in str(replace(failed, diagnosis=found)).splitlines()


def test_a_pass_says_what_it_does_not_exclude(example: Example, tmp_path: Path) -> None:
    path = save(tmp_path / "port.safetensors", example.ports["float32"])
    verdict = compare_folders(path, example.truth)
    bugs = ["rope: backward in the other layout", "mla: x", *(f"rope: {n}" for n in range(30))]
    text = str(replace(verdict, not_excluded=bugs))
    assert text.startswith("PASS: 148 tensors within 4 units of float32; the furthest, ")
    assert text.splitlines()[1:] == [
        "not excluded by these inputs and this type:",
        f"  rope: backward in the other layout; {'; '.join(map(str, range(30)))}",
        "  mla: x",
    ]


def test_what_is_missing(example: Example, tmp_path: Path) -> None:
    """Gradients by name, all else by kind; no gradient at all is a note."""
    some = {n: x for n, x in example.arrays.items() if n.startswith("grad/") and ".0." not in n}
    lines = str(compare_folders(save(tmp_path / "a.safetensors", some), example.truth)).splitlines()
    assert "no gradient of:" in lines
    assert "  grad/model.layers.0.mlp.down_proj.weight" in lines
    assert lines[-1].startswith("not given: 17 of act/, 12 of aux/, ")
    none = {"out/loss": example.arrays["out/loss"]}
    lines = str(compare_folders(save(tmp_path / "a.safetensors", none), example.truth)).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("not given: 17 of act/, ")


def test_json_is_as_its_schema_says(failed: Verdict, example: Example, tmp_path: Path) -> None:
    path = save(tmp_path / "port.safetensors", example.arrays)
    passed = compare_folders(path, example.truth)
    broken = example.arrays | {"grad/model.norm.weight": np.full(20, np.nan)}
    infinite = compare_folders(save(path, broken), example.truth)
    for verdict in (failed, passed, infinite, replace(failed, diagnosis=None)):
        content = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
        assert VALID(content)
        assert content["verdict"] == verdict.verdict
        assert list(content["tensors"]) == list(verdict.tensors)
    told = failed.to_json()["first_wrong"]
    assert told["part"] == "layer 3, attention, backward"
    assert told["blocks"] == "latent rows: ok, rotated key rows: wrong"
    x = failed.to_json()["tensors"][told["tensor"]]
    assert (x["status"], x["shape"], x["dtype"]) == ("wrong", [11, 20], "float64")
    assert x["units"] > 1e13
    assert infinite.to_json()["tensors"]["grad/model.norm.weight"]["error"] == "inf"


def test_the_schema_sees_what_it_forbids(failed: Verdict) -> None:
    content = failed.to_json()
    name = next(iter(content["tensors"]))
    for change in (
        {"verdict": "MAYBE"},
        {"format": 2},
        {"more": 1},
        {"extra": [1]},
        {"first_wrong": {"part": "x"}},
        {"tensors": {name: content["tensors"][name] | {"status": "right"}}},
        {"tensors": {name: content["tensors"][name] | {"shape": [-1]}}},
    ):
        assert not VALID(content | change), change
    for field in content:
        assert not VALID({k: v for k, v in content.items() if k != field})


def test_every_field_is_described() -> None:
    """In the schema, of every tensor's and of the whole."""
    fields = {**SCHEMA["properties"], **SCHEMA["$defs"]["tensor"]["properties"]}
    plain = {"format", "verdict", "theirs", "truth", "notes", "diagnosis", "part", "shape"}
    plain |= {"cosine", "worst", "blocks"}
    assert {name for name, x in fields.items() if "description" not in x} <= plain


def test_numbers_are_short() -> None:
    values = (0.0, 3.14159, 123.456, 0.00123, 5.3e13, math.inf, math.nan)
    assert [number(x) for x in values] == ["0", "3.14", "123", "1.2e-03", "5.3e+13", "inf", "nan"]


def test_a_row_of_the_table() -> None:
    found = Difference(0.5, 2.0, 1 - 3e-6, 1.01, (1, 2), 1.5, 1.0, 0)
    x = TensorResult("grad/x", "part", (2, 3), "wrong", "float32", 1e-3, 500.0, found, "head 1")
    assert row(x) == ("grad/x", "500", "0.25", "1 − 3e-06", "1.01", "head 1")
    assert cosine(found._replace(cosine=-0.4)) == "-0.400"
    assert cosine(found._replace(cosine=1 + 1e-16)) == "1 − 0e+00"
    assert row(replace(x, difference=None, what="3 of 8"))[1:] == ("500", "", "", "", "3 of 8")


def test_experts_share_a_row(failed: Verdict) -> None:
    """That of the worst; any other tensor has its own."""
    wrong = failed.those("wrong")
    rows = {x.name: x for x in folded(wrong)}
    assert len(rows) < len(wrong)
    units = [x.units for x in wrong if ".1.mlp.experts." in x.name and "up_proj" in x.name]
    assert len(units) == 2  # the others have no tokens
    names = [name for name in rows if ".1.mlp.experts." in name and "up_proj" in name]
    assert len(names) == 1
    assert names[0].endswith(".up_proj.weight (2 tensors)")
    assert rows[names[0]].units == max(units)
    assert {x.name for x in wrong if ".experts." not in x.name} <= rows.keys()
    lines = str(failed).splitlines()
    assert "(parts after the first wrong one may be wrong because of it)" in lines
