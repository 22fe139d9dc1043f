"""Conformance vectors: the same bytes of inputs everywhere, right or wrong as they say, within
their units, and read with nothing but safetensors and the index."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl import ops
from refimpl.check.cases import pair_of
from refimpl.check.planted import FUNCTIONS, PLANTED
from refimpl.port.cases import FACTOR, OpCase, apart, difference, planted, run
from refimpl.port.vector_cases import OPS, SIZES, WRONG, cases_of
from refimpl.port.vectors import (
    MOST,
    NAMES,
    SMALL,
    as_text,
    digest_of,
    inputs_of,
    make,
    schema,
    stored,
    with_cotangents,
    write,
)

from golden.values import TOLERANCE
from support import FULL

INDEX: dict[str, Any] = json.loads((SMALL / "index.json").read_text())
CASES: dict[str, Any] = INDEX["metadata"]["cases"]
OURS = [name for name, case in CASES.items() if case["op"] in OPS and "golden" not in name]
# of all inputs of a size, the same on every platform; they change with the cases alone
DIGESTS = {
    "small": "6824748350664b1506e832485581534b27f19eee70a7ffe8350202eaa6e71903",
    "v3-shaped": "3873b980abd8d41c5161c808a03487771eefdad6673ab6e6c7de82c1798f361d",
}


@cache
def file(name: str) -> dict[str, np.ndarray]:
    return load_file(SMALL / name)


def tensors(case: str) -> dict[str, np.ndarray]:
    """A case's tensors as PREFIX/NAME, found by the index."""
    begin = f"{case}/"
    return {
        name.removeprefix(begin): file(entry["file"])[name]
        for name, entry in INDEX["tensors"].items()
        if name.startswith(begin)
    }


def unit(case: str, dtype: str) -> dict[str, float]:
    begin = f"{case}/"
    return {
        name.removeprefix(begin): entry["units"][dtype]
        for name, entry in INDEX["tensors"].items()
        if name.startswith(begin) and dtype in entry.get("units", {})
    }


def group(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(f"{prefix}/"): x.astype(np.float64) if x.dtype.kind == "f" else x
        for name, x in found.items()
        if name.startswith(f"{prefix}/")
    }


def read(name: str) -> tuple[OpCase, dict[str, np.ndarray]]:
    """A case to run, and what must come out."""
    found, case = tensors(name), CASES[name]
    forward = getattr(ops, f"{case['op']}_forward")
    inputs = group(found, "in")
    order = forward.__code__.co_varnames[: forward.__code__.co_argcount]
    arguments = {argument: inputs.get(argument) for argument in order}
    kwargs = case["settings"] | group(found, "aux")
    exact = {key: x for key, x in found.items() if key.startswith(("out/", "grad/"))}
    return OpCase(case["op"], arguments, kwargs, group(found, "cot")), exact


def test_the_index_fits_its_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(INDEX, schema())
    assert set(NAMES) <= {case["op"] for case in CASES.values()}
    for name, entry in INDEX["files"].items():
        data = (SMALL / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == tuple(entry.values()), name
    assert {path.name for path in SMALL.iterdir()} == {*INDEX["files"], "index.json"}
    assert sum(path.stat().st_size for path in SMALL.iterdir()) <= 1_500_000
    held = {key for name in INDEX["files"] for key in file(name)}
    assert held == set(INDEX["tensors"])
    for name, entry in INDEX["tensors"].items():
        x = file(entry["file"])[name]
        assert (x.dtype.name, list(x.shape)) == (entry["dtype"], entry["shape"])
    wrong = json.loads(json.dumps(INDEX))
    wrong["metadata"]["cases"]["mla-wrong-1"]["differs"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema())


@pytest.mark.parametrize("size", SIZES)
def test_inputs_are_the_same_bytes_everywhere(size: str) -> None:
    """Exact in bfloat16, and with the digests that are written here and in the index."""
    digests = []
    for op in OPS:
        for vector in cases_of(op, size):
            found = inputs_of(vector, with_cotangents(vector))
            for x in found.values():
                if x.dtype.kind == "f":
                    assert np.array_equal(x.astype(ml_dtypes.bfloat16).astype(x.dtype), x)
            digests.append(f"{vector.name} {digest_of(found)}\n")
            if size == "small":
                assert CASES[vector.name]["inputs_sha256"] == digest_of(found), vector.name
    assert hashlib.sha256("".join(digests).encode()).hexdigest() == DIGESTS[size]


def test_a_digest_sees_every_change() -> None:
    x = {"in/x": np.ones((2, 3), np.float32), "out/y": np.ones(1)}
    same = digest_of(x | {"out/y": np.zeros(1)})
    assert same == digest_of(x)
    for changed in (
        {"in/x": np.ones((3, 2), np.float32)},
        {"in/x": np.ones((2, 3))},
        {"in/z": x["in/x"]},
        {"in/x": np.nextafter(x["in/x"], 2)},
    ):
        assert digest_of(changed) != same


@pytest.mark.parametrize("name", OURS)
def test_a_right_port_passes_and_a_wrong_vector_does_not(name: str) -> None:
    """Ours, in each type, read from the files; choices are made, not replayed, where no choice is
    given."""
    case, exact = read(name)
    for dtype in ("float64", "float32", "bfloat16"):
        wrong = apart(run(case, dtype), exact, unit(name, dtype))
        assert sorted(wrong) == sorted(CASES[name]["differs"]), (name, dtype)
        other = {"attention": "flash_attention", "mla": "mla_absorbed"}.get(case.op)
        if other:
            plain = {key: x for key, x in case.kwargs.items() if key != "blind"}
            found = run(case._replace(kwargs=plain), dtype, pair_of(other))
            assert sorted(apart(found, exact, unit(name, dtype))) == sorted(wrong), (name, dtype)
    assert digest_of(tensors(name)) == CASES[name]["inputs_sha256"]
    assert CASES[name]["valid"] == (not CASES[name]["differs"])


IN_BFLOAT16 = {  # too small there
    "epsilon missing in the backward",
    "gradient beyond the KL's bounds",
    "unbiased KL without the ratio's gradient",
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_each_op_bug_is_excluded(dtype: str) -> None:
    """By a case of its op; but for the two of the checker itself, one of our own blocks, which no
    port has, and in bfloat16 three more."""
    known = {(x["op"], bug) for x in CASES.values() for bug in x["excludes"].get(dtype, [])}
    ours = {"flash_attention", "mla_absorbed", "model"}  # other ways to compute what has vectors
    of_case = dict.fromkeys(FUNCTIONS, "bias_update")  # its cases count loads, too
    missing = {(of_case.get(x.op, x.op), x.name) for x in PLANTED if x.op not in ours} - known
    allowed = {x.name for x in PLANTED if x.of_checker} | {"= for += over vocabulary blocks"}
    if dtype == "bfloat16":  # in which loads and biases have no units
        allowed |= IN_BFLOAT16 | {x.name for x in PLANTED if x.op in FUNCTIONS}
    assert {name for _, name in missing} == allowed


@pytest.mark.parametrize("op", WRONG)
def test_what_a_case_excludes(op: str) -> None:
    """A port with the bug is refused by the cases that say so, and by no other."""
    (bug,) = [x for x in PLANTED if (x.op, x.name) == (op, WRONG[op])]
    for name in OURS:
        if CASES[name]["op"] == op and CASES[name]["valid"]:
            case, exact = read(name)
            for dtype, excluded in CASES[name]["excludes"].items():
                wrong = apart(run(case, dtype, planted(bug)), exact, unit(name, dtype))
                assert bool(wrong) == (bug.name in excluded), (name, dtype)


@pytest.mark.parametrize("op", NAMES if FULL else ["rms_norm", "mla", "adamw", "bias_update"])
def test_regenerated(op: str) -> None:
    """The same inputs to the byte; outputs and gradients to a unit of float64, since exp and sin
    are not the same bits everywhere."""
    for made in make(op, "small"):
        kept = tensors(made.name)
        assert set(kept) == set(made.tensors)
        assert digest_of(made.tensors) == digest_of(kept) == CASES[made.name]["inputs_sha256"]
        known = unit(made.name, "float64")
        for name, x in made.tensors.items():
            assert difference(x, kept[name]) <= known.get(name, 0.0), name
        entry = json.loads(json.dumps(made.entry()))
        assert {**entry, "excludes": 0} == {**CASES[made.name], "excludes": 0}


def test_optimizer_vectors() -> None:
    """AdamW, clipping and the bias update as a port would compute them, written out here."""
    found, settings = tensors("adamw-1"), CASES["adamw-1"]["settings"]
    m, v, p = (dict.fromkeys("ab", 0.0) for _ in range(3))
    for k in "ab":
        p[k] = found[f"aux/param.{k}"].astype(np.float64)
    b1, b2 = settings["beta1"], settings["beta2"]
    for step, rate in enumerate(settings["learning_rates"]):
        for k in "ab":
            g = found[f"aux/grad.{step}.{k}"].astype(np.float64)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            move = m[k] / (1 - b1 ** (step + 1))
            move /= np.sqrt(v[k] / (1 - b2 ** (step + 1))) + settings["epsilon"]
            decay = settings["weight_decay"] if k in settings["decays"] else 0.0
            p[k] = p[k] - rate * (move + decay * p[k])
    known = unit("adamw-1", "float64")
    for k in "ab":
        for name, x in ((f"out/param.{k}", p), (f"out/m.{k}", m), (f"out/v.{k}", v)):
            assert difference(x[k], found[name]) <= FACTOR * known[name], name
    for number in (1, 2):
        name = f"clip_global_norm-{number}"
        found, settings = tensors(name), CASES[name]["settings"]
        grads = group(found, "aux")
        norm = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
        assert (norm > settings["max_norm"]) == (number == 1)
        assert abs(norm - found["out/norm"]) <= FACTOR * unit(name, "float64")["out/norm"]
        for key, g in grads.items():
            clipped = g * min(1.0, settings["max_norm"] / norm)
            key = f"out/{key}"
            assert difference(clipped, found[key]) <= FACTOR * unit(name, "float64")[key]
        name = f"bias_update-{number}"
        found, settings = tensors(name), CASES[name]["settings"]
        chosen = found["aux/indices"][found["aux/mask"]].reshape(-1)
        load = np.bincount(chosen, minlength=settings["experts"])
        assert np.array_equal(load, found["out/load"])
        change = settings["gamma"] * np.sign(load.mean() - load)
        change -= change.mean() if settings["centre"] else 0
        moved = found["aux/bias"] + change
        assert difference(moved, found["out/bias"]) <= FACTOR * unit(name, "float64")["out/bias"]


def test_golden_values_are_among_them() -> None:
    """With torch named as their source, and 4 units for the tolerance that ours keep."""
    golden = [name for name in CASES if name.startswith("golden-")]
    assert len(golden) >= 100
    assert all(CASES[name]["source"].startswith("torch ") for name in golden)
    entry = INDEX["tensors"]["golden-mla-compressed/grad/w_o"]
    assert abs(entry["units"]["float64"] * FACTOR / entry["scale"] / TOLERANCE - 1) < 1e-12


def test_written_whole(tmp_path: Path) -> None:
    """What the index says is there; nothing is left of what could not be finished."""
    index = write(tmp_path / "new", ["linear", "embedding"])
    assert json.loads((tmp_path / "new" / "index.json").read_text()) == json.loads(as_text(index))
    jsonschema.validate(index, schema())
    assert {case["op"] for case in index["metadata"]["cases"].values()} == {"linear", "embedding"}
    kept = (SMALL / "linear.safetensors").read_bytes()
    assert len((tmp_path / "new" / "linear.safetensors").read_bytes()) == len(kept)

    def stop(op: str, done: int, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped", ["linear"], told=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that is too large, or an input that float32 does not hold, is a fault of ours."""
    with pytest.raises(ValueError, match="must be exact in float32"):
        stored(np.array([0.1]))
    monkeypatch.setattr("refimpl.port.vectors.MOST", 100)
    with pytest.raises(RuntimeError, match="must have at most 100 bytes"):
        write(tmp_path / "v", ["linear"])
    assert MOST == 256 * 2**20
    assert not list(tmp_path.iterdir())
