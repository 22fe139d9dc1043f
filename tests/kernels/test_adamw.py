"""The kernel of AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.kernels.adamw import adamw
from refimpl.kernels.compile import STORAGE
from refimpl.optimizer import AdamW, Moments

from kernel_support import DTYPES, WIDE, make_launch, rounded, to_device, to_host, without_a_device
from kernel_support.planted import PLANTED, plant
from ptx import PTXError


@pytest.mark.parametrize("storage", STORAGE)
def test_adamw(storage: str) -> None:
    """Three steps as `refimpl.optimizer.AdamW` does them in float64, on one block and on several,
    with a last thread whose numbers end, and at a place that is no multiple of 16 bytes; bfloat16
    parameters have a master that does, and are its rounding."""
    rng, wide = np.random.default_rng(0), WIDE[storage]
    drawn = {
        "w": rounded(rng.normal(size=(41, 13)), storage),
        "norm": rounded(rng.normal(size=3), storage),
        "part": rounded(rng.normal(size=9), storage),
    }
    params = {name: to_device(p) for name, p in drawn.items()}
    params["part"] = params["part"][1:]
    drawn["part"] = drawn["part"][1:]
    reference = {name: p.astype(np.float64) for name, p in drawn.items()}
    options: dict[str, Any] = {"decays": lambda name: name == "w", "weight_decay": 0.2}
    optimizer = adamw(make_launch())(**options)
    ours = theirs = Moments()
    for _ in range(3):
        drawn = {name: rng.normal(size=p.shape).astype(wide) for name, p in params.items()}
        grads = {name: to_device(g) for name, g in drawn.items()}
        ours = optimizer.update(params, grads, ours, 0.01)
        exact = {name: g.astype(np.float64) for name, g in drawn.items()}
        theirs = AdamW(**options).update(reference, exact, theirs, 0.01)
    tolerance = 1e-14 if storage == "float64" else 1e-6
    assert set(ours.master) == (set(params) if storage == "bfloat16" else set())
    for name, p in params.items():
        master = to_host(ours.master.get(name, p))
        assert p.dtype == DTYPES[storage]
        assert master.dtype == wide
        np.testing.assert_array_equal(to_host(p), master.astype(p.dtype))
        error = np.abs(master.astype(np.float64) - reference[name])
        assert np.max(error) <= tolerance * np.max(np.abs(reference[name]))
        np.testing.assert_allclose(
            to_host(ours.first[name]),
            theirs.first[name],
            rtol=0,
            atol=1e-6 if wide != np.float64 else 1e-15,
        )
    before = to_host(params["w"]).copy()
    strided = to_device(np.ones((3, 2), dtype=wide))[:, 0]
    integers = grads | {"w": to_device(np.ones((41, 13), int))}
    of_strided = ours._replace(first={**ours.first, "norm": strided})
    of_other_shapes = Moments(1, {"w": strided}, {"w": strided})
    contiguous = "norm, its gradient and its moments must be contiguous"
    for given, moments, rate, message in (
        (integers, ours, 0.01, r"the gradient of w must be float\d+ \(41, 13\) .*, got int64"),
        (grads | {"norm": strided}, ours, 0.01, contiguous),
        (grads, of_strided, 0.01, contiguous),
        (grads, of_other_shapes, 0.01, r"the moments of w must be float\d+ \(41, 13\)"),
        (grads, ours, float("nan"), "learning_rate must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.update(params, given, moments, rate)
    assert np.array_equal(to_host(params["w"]), before)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_square_that_overflows(storage: str) -> None:
    """NaN for its parameter alone, as in the reference; 0.75 has 1 bit."""
    params = {"w": to_device(rounded(np.ones(2), storage))}
    grads = {"w": to_device(np.array([1.0, 1e20], np.float32))}
    adamw(make_launch())(weight_decay=0.0).update(params, grads, Moments(), 0.25)
    found = to_host(params["w"]).astype(np.float64)
    np.testing.assert_allclose(found, [0.75, np.nan], rtol=1e-6)


@without_a_device
@pytest.mark.parametrize("name", PLANTED["adamw"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("adamw", name, monkeypatch)
    with pytest.raises((AssertionError, PTXError)):
        test_adamw("bfloat16")
