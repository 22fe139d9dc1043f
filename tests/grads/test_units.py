"""Units of error: the rerun's width, its roundings, the rule, and what interrupts it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refimpl.grads as grads
import refimpl.grads.units as units
from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.source import MemorySource
from refimpl.grads import UNITS, Request, write_gradients
from refimpl.grads.rounded import round_bfloat16, rounded_by_chance
from refimpl.grads.steps import Steps
from refimpl.grads.units import (
    SPREAD,
    PermutedSource,
    Rerun,
    measured,
    rerun,
    roundoff,
    unit_of,
    units_of,
)
from refimpl.model import backward, forward
from refimpl.parameters import parameter_shapes

from grads.examples import RNG, TINY, TOKENS, read, stream
from grads.test_grpo import ARRAYS
from random_parameters import random_parameters
from support import FULL, ROOT

SMALL = replace(TINY, layers=2, mtp_depth=1)
FACTOR = 4  # units that a right implementation may err


def index_of(out: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((out / "index.json").read_text())
    return index


def test_a_permuted_width_is_the_same_function() -> None:
    """The permuted parameters are a model of the same loss, whose gradients are permuted: each axis
    of width is found, both halves of MTP's projection, and pieces are those of the whole."""
    params = random_parameters(TINY)
    order = np.random.default_rng(0).permutation(TINY.width)
    source = PermutedSource(MemorySource(params, TINY), order, "float64")
    again = {name: source.tensor(name) for name in params}
    assert any(not np.array_equal(again[name], x) for name, x in params.items())
    whole, saved = forward(params, TOKENS, TINY)
    permuted, permuted_saved = forward(again, TOKENS, TINY, routes=whole.routes)
    np.testing.assert_allclose(permuted.loss, whole.loss, rtol=1e-14)
    ours = PermutedSource(MemorySource(backward(saved) | biases(params), TINY), order, "float64")
    for name, x in backward(permuted_saved).items():
        wanted = ours.tensor(name)
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    for name, x in again.items():
        if not name.endswith("bias"):
            assert np.array_equal(source.piece(name, 1), x[1])
            assert np.array_equal(source.piece(name, np.array([[1, 0]])), x[[[1, 0]]])


def biases(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x for name, x in params.items() if name.endswith("bias")}


def test_rounding() -> None:
    """To nearest even in 8 bits of mantissa, in tuples too; integers stay, and the type."""
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 3e38], np.float32)
    y, (ids, nothing) = round_bfloat16((x, (np.array([257]), None)))
    assert y.tolist() == [
        1,
        1 + 2**-6,
        1,
        float(np.float32(3e38).view(np.uint32) >> 16 << 16 and y[3]),
    ]
    assert y.dtype == np.float32
    assert ids[0] == 257
    assert nothing is None
    source = MemorySource(random_parameters(TINY), TINY)
    order = np.arange(TINY.width)
    for name in parameter_shapes(TINY):
        for type, kept in (("float32", 2.0**-24), ("bfloat16", 2.0**-8)):
            x, wanted = PermutedSource(source, order, type).tensor(name), source.tensor(name)
            worst = np.max(np.abs(x - wanted) / np.abs(wanted))
            assert x.dtype == np.float32 or name.endswith("bias")
            assert worst == 0 if name.endswith("bias") else kept / 8 < worst <= kept


def test_the_rule() -> None:
    errors = np.array([2e-7, 5e-7, 3e-7])
    assert unit_of(errors, 1.0, "float32") == pytest.approx((5 + SPREAD * 3) * 1e-7)
    assert unit_of(errors, 100.0, "float32") == 100 * 2.0**-24
    assert unit_of(0 * errors, 0.0, "float64") == 0
    assert unit_of(errors, None, "float32") is None
    assert unit_of(np.array([1, np.nan]), 1.0, "float32") is None
    assert [roundoff(type) for type in UNITS] == [2.0**-53, 2.0**-24, 2.0**-8]


def test_units_in_the_index(tmp_path: Path) -> None:
    """Every tensor that a rerun makes has its units, of the sizes that the types have; nothing else
    differs from a result without."""
    given: dict[str, Any] = {"mtp": True, "balance_alpha": 0.01, "activations": "*"}
    params = random_parameters(SMALL)  # bfloat16's numbers, so that the ops alone round
    params = {n: x if n.endswith("bias") else round_bfloat16(x) for n, x in params.items()}
    stream(params, SMALL, tmp_path / "plain", **given)
    stream(params, SMALL, tmp_path / "out", **given, units=UNITS, reruns=2)
    plain, index = index_of(tmp_path / "plain"), index_of(tmp_path / "out")
    assert index["metadata"] == plain["metadata"] | {
        "units": {"types": list(UNITS), "reruns": 2, "seed": 0}
    }
    assert plain["metadata"]["units"] is None
    assert index["files"] == plain["files"]
    told = {name: entry.pop("units", None) for name, entry in index["tensors"].items()}
    assert index["tensors"] == plain["tensors"]
    found, low = read(tmp_path / "out"), list[float]()
    for name, x in found.items():
        entry = index["tensors"][name]
        if name.startswith("in/") or x.dtype.kind != "f" or "same_as" in entry:
            assert told[name] is None
        elif entry["scale"]:
            relative = [told[name][type] / entry["scale"] / roundoff(type) for type in UNITS]
            # measured: 82, 77, 7.2
            bounds = zip(relative, (200, 200, 20), strict=True)
            assert all(1 <= x <= most for x, most in bounds), (name, relative)
            low.append(relative[2])
    assert np.median(low) > 2  # in bfloat16; 1 if no op rounded
    assert not (tmp_path / "out" / "unfinished").exists()


def test_units_of_other_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO's choices are replayed; a given gradient of the logits is rounded."""
    requests: list[Request] = []

    def noted(source: Any, request: Request, *rest: Any) -> Steps:
        requests.append(request)
        return Steps(source, request, *rest)

    monkeypatch.setattr(units, "Steps", noted)
    params = random_parameters(SMALL)
    for name, given in {
        "grpo": {"grpo": grads.GRPO.of(ARRAYS, {})},
        "dlogits": {"dlogits": RNG.normal(size=(*TOKENS.shape, SMALL.vocabulary))},
    }.items():
        out = tmp_path / name
        stream(params, SMALL, out, **given, units=("bfloat16",), reruns=1)
        entries = index_of(out)["tensors"]
        norm = entries["grad/model.norm.weight"]
        assert roundoff("bfloat16") <= norm["units"]["bfloat16"] / norm["scale"] < 0.1
    assert "units" in index_of(tmp_path / "grpo")["tensors"]["cot/log_prob"]
    found = read(tmp_path / "grpo")
    policy, dlogits = requests[0].grpo, requests[1].dlogits
    assert policy is not None
    assert dlogits is not None
    assert np.array_equal(policy.unclipped, found["aux/unclipped"])
    assert np.array_equal(policy.kept, found["aux/kept"])
    assert np.array_equal(dlogits, round_bfloat16(dlogits))
    for request in requests:
        assert np.array_equal(request.routes[1].indices, found["aux/routes.1"])


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """At every step of a rerun: the index is that of one run, and no rerun that is done is done
    again."""
    source = MemorySource(random_parameters(SMALL), SMALL)
    request = Request(TOKENS, units=("float32",), reruns=2)
    order: list[str] = []
    whole = partial(write_gradients, source, request)
    whole(tmp_path / "whole", progress=lambda step, done, total: order.append(f"{done} {step}"))
    first = next(n for n, step in enumerate(order) if "float32" in step)
    assert len(order) == 3 * first + 1
    for stopped in order[first::3]:

        def stop(step: str, done: int, total: int, stopped: str = stopped) -> None:
            if f"{done} {step}" == stopped:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path / "out", progress=stop)
    again: list[str] = []
    if (tmp_path / "out" / "unfinished").exists():
        whole(tmp_path / "out", progress=lambda step, done, total: again.append(step))
        assert not any("float32 1" in step for step in again)
    assert index_of(tmp_path / "out") == index_of(tmp_path / "whole")


def test_types_that_can_not_be_measured() -> None:
    single = MemorySource(random_parameters(TINY, dtype=np.float32), TINY)
    for types, message in {
        ("float64",): "units of float64 need results of that type to compare with, got float32",
        ("float16",): "units must be among float64, float32, bfloat16, got float16",
        ("float32", "float32"): "units must name a type once",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            Request(TOKENS, units=types).check(single)
    Request(TOKENS, units=("float32", "bfloat16")).check(single)


PORTS = 25 if FULL else 2
TYPES = UNITS if FULL else ("float32",)


@pytest.mark.parametrize("name", ["trained", "tiny"] if FULL else ["tiny"])
def test_right_ports_stay_within_4_units(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reruns of other seeds. In the wide types a gradient that is wrong by a per cent would not."""
    source: Any = MemorySource(random_parameters(TINY), TINY)
    if name == "trained":
        source = Checkpoint.open(ROOT / "tests/golden/trained", dtype="float64")
    tokens = RNG.integers(0, source.config.vocabulary, (2, 16))
    worst: dict[str, float] = {}

    def beside(steps: Steps) -> Any:
        found = units_of(steps)
        for type in TYPES:
            unit = np.array([found[x][type] for x in measured(steps.folder)])
            for number in range(PORTS):
                port = Rerun(type, 1000 + number)
                errors = rerun(steps, port, 0, lambda *_: None, (port.name, number))["errors"]
                assert np.all((errors == 0) | (errors <= FACTOR * unit)), type
                ratio = np.max(errors[unit > 0] / unit[unit > 0])
                worst[type] = max(worst.get(type, 0), float(ratio))
        return found

    monkeypatch.setattr(grads, "units_of", beside)
    request = Request(tokens, mtp=True, balance_alpha=0.01, activations="*", units=TYPES)
    write_gradients(source, request, tmp_path / "out")
    print(name, PORTS, "right ports, worst errors in units:", worst)
    assert all(x > 0.1 for x in worst.values())
    for entry in index_of(tmp_path / "out")["tensors"].values():
        for type, unit in entry.get("units", {}).items():
            assert type == "bfloat16" or FACTOR * unit <= 0.01 * entry["scale"]


def test_rounding_by_chance() -> None:
    """To one of the two neighbours, by a chance that makes the mean right; the same again for the
    same seed, another for another. What bfloat16 holds, and what is not finite, stays."""
    x = np.full(40_000, 1 + 0.25 * 2**-7, np.float32)
    found = rounded_by_chance(x, 1)
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    assert abs((found > 1).mean() - 0.25) < 0.01  # four and a half standard deviations
    np.testing.assert_array_equal(rounded_by_chance(x, 1), found)
    assert (rounded_by_chance(x, 2) != found).any()
    kept = np.array([0.0, -1.5, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(rounded_by_chance((kept, 3), 1)[0], kept)
    assert (rounded_by_chance(-x, 1) <= -1).all()


def test_reruns_in_bfloat16_are_different_draws(tmp_path: Path) -> None:
    """Rounded to the nearest, six reruns had one error: right code that rounds elsewhere had up to
    12 units of it."""
    params = random_parameters(SMALL, seed=3)
    request = Request(TOKENS, units=("bfloat16",))
    found: list[np.ndarray] = []

    def keep(steps: Steps) -> dict[str, dict[str, float | None]]:
        every = [steps.records[x.name, x.number] for x in units.reruns_of(steps.request)]
        found.append(np.array([record.array("errors") for record in every]))
        return units_of(steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grads, "units_of", keep)
        write_gradients(MemorySource(params, SMALL), request, tmp_path / "t")
    (errors,) = [x for x in found if x.size]
    scattered = errors.max(0) > 1.05 * errors.min(0)
    assert scattered.mean() > 0.5, scattered.mean()  # 0.89; to the nearest, 0
