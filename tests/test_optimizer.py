"""AdamW against a scalar reimplementation, clipping, and the published points of V3's schedules."""

from __future__ import annotations

import math
import sys
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.optimizer import V3_SCHEDULE, AdamW, clip_global_norm

import pretended_cupy


def scalar_adamw(
    p: float, gs: list[float], lr: float, b1: float, b2: float, eps: float, wd: float
) -> float:
    """The algorithm as printed, on one number."""
    m = v = 0.0
    for t, g in enumerate(gs, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - lr * ((m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps) + wd * p)
    return p


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.0}, {"beta1": 0.0, "beta2": 0.5, "epsilon": 0.3}]
)
def test_against_scalars(options: dict[str, float]) -> None:
    """Seven steps on two tensors, number by number."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    start = {n: p.copy() for n, p in params.items()}
    steps = [{n: rng.normal(size=p.shape) for n, p in params.items()} for _ in range(7)]
    optimizer = AdamW(**options)
    for grads in steps:
        optimizer.update(params, grads, 0.01)
    constants = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1} | options
    for name, p in params.items():
        for at in np.ndindex(p.shape):
            wanted = scalar_adamw(
                start[name][at], [g[name][at] for g in steps], 0.01, *constants.values()
            )
            assert abs(p[at] - wanted) <= 1e-14 * abs(wanted)


def test_first_step_is_the_sign() -> None:
    """Bias correction makes the first step lr · sign(g), whatever the gradient's size (ε apart)."""
    params = {"w": np.zeros(3)}
    AdamW(weight_decay=0.0).update(params, {"w": np.array([1e-3, -5.0, 200.0])}, 0.1)
    np.testing.assert_allclose(params["w"], [-0.1, 0.1, -0.1], rtol=2e-5)


def test_decay_is_decoupled_and_chosen_by_name() -> None:
    params = {"w": np.ones(2), "norm.weight": np.ones(2)}
    optimizer = AdamW(weight_decay=0.5, decays=lambda name: "norm" not in name)
    optimizer.update(params, {n: np.zeros(2) for n in params}, 0.1)
    np.testing.assert_allclose(params["w"], 0.95)  # no gradient: the decay alone
    np.testing.assert_array_equal(params["norm.weight"], 1)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """A gradient whose square overflows makes its parameter NaN, at once: a step of 0 would go
    unseen. One whose square underflows makes a step by epsilon, as the formula has it."""
    params = {"w": np.ones(3, np.float32)}
    grads = {"w": np.array([1e19, 2e19, 1e-30], np.float32)}
    AdamW(weight_decay=0.0, beta2=0.5).update(params, grads, 0.25)
    np.testing.assert_array_equal(params["w"], np.array([0.75, np.nan, 1], np.float32))


def test_in_place_and_allocation_free() -> None:
    """The arrays stay the same ones, and after the first step nothing of a tensor's size is
    allocated."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(300, 500)), "b": rng.normal(size=(200, 100)).astype(np.float32)}
    grads = {n: rng.normal(size=p.shape).astype(p.dtype) for n, p in params.items()}
    same = dict(params)
    optimizer = AdamW()
    optimizer.update(params, grads, 0.01)
    tracemalloc.start()
    for _ in range(3):
        optimizer.update(params, grads, 0.01)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000
    assert all(params[n] is same[n] for n in params)
    assert params["b"].dtype == optimizer.first["b"].dtype == np.float32


def test_blocks_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, in whatever order the numbers lie, the bits are those of whole tensors."""
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(7, 9)).astype(np.float32)
    steps = [rng.normal(size=(7, 9)).astype(np.float32) for _ in range(3)]
    params = {"whole": whole.copy(), "blocks": whole.copy(), "strided": whole.T.copy().T}
    same = dict(params)
    for name, p in params.items():
        monkeypatch.setattr("refimpl.optimizer.BLOCK", 100 if name == "whole" else 5)
        optimizer = AdamW()
        for g in steps:
            optimizer.update({name: p}, {name: g if name == "whole" else g.T.copy().T}, 0.01)
    assert not np.array_equal(params["whole"], whole)
    np.testing.assert_array_equal(params["blocks"], params["whole"])
    np.testing.assert_array_equal(params["strided"], params["whole"])
    assert all(params[n] is same[n] for n in params)
    assert not params["strided"].flags.c_contiguous


@pytest.mark.parametrize(
    ("params", "grads", "lr", "message"),
    [
        (
            {},
            {"w": np.ones(2)},
            0.1,
            "w must be a parameter for its gradient, got no such parameter",
        ),
        (
            {"w": np.ones(3)},
            {"w": np.ones(2)},
            0.1,
            r"of w must be float64 \(3,\) .*, got float64 \(2,\)",
        ),
        (
            {"w": np.ones(2, np.float32)},
            {"w": np.ones(2)},
            0.1,
            "of w must be float32 .*, got float64",
        ),
        (
            {"w": np.ones(2)},
            {"w": np.ones(2)},
            math.nan,
            "learning_rate must be a finite number .* got nan",
        ),
        ({"w": np.ones(2)}, {"w": np.ones(2)}, -1.0, "learning_rate must be"),
    ],
)
def test_errors_change_nothing(params: Any, grads: Any, lr: float, message: str) -> None:
    optimizer = AdamW()
    before = {n: p.copy() for n, p in params.items()}
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, grads, lr)
    assert optimizer.step == 0
    assert all(np.array_equal(params[n], before[n]) for n in params)


@pytest.mark.parametrize(
    "options",
    [
        {"beta1": 1.0},
        {"beta1": -0.1},
        {"beta2": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_bad_settings(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="beta1 and beta2 must lie in"):
        AdamW(**options)


def test_clip() -> None:
    """Above the bound all gradients shrink by one factor; below, not a bit changes."""
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert clip_global_norm(grads, 10.0) == 5.0
    assert grads["a"].tolist() == [3.0, 0.0]
    assert clip_global_norm(grads, 1.0) == 5.0
    np.testing.assert_allclose(
        np.concatenate([g.ravel() for g in grads.values()]), [0.6, 0.0, 0.8], rtol=1e-15
    )
    many = {"w": np.full(10_000, 1e-3, dtype=np.float32)}
    assert abs(clip_global_norm(many, 1.0) - 0.1) <= 1e-8  # summed in float64


def test_clip_copies_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CuPy: however many tensors there are, and with the same result."""
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    monkeypatch.setattr(pretended_cupy, "COPIES", copies := list[str]())
    grads = {name: pretended_cupy.there(np.full(4, 0.5)) for name in "abcd"}
    assert clip_global_norm(grads, 1.0) == 2.0
    assert copies == ["float"]
    assert [float(g[0]) for g in grads.values()] == [0.25] * 4


def test_clip_leaves_what_is_not_finite() -> None:
    grads = {"a": np.array([math.nan, 1.0]), "b": np.ones(2)}
    assert math.isnan(clip_global_norm(grads, 0.1))
    assert grads["b"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        clip_global_norm(grads, 0)


def test_v3_learning_rate() -> None:
    """The published points: 2.2e-4 after 2K steps to 10T tokens, 2.2e-5 at 14.3T, 7.3e-6 for the
    last 167B of 14.8T."""
    lr = V3_SCHEDULE.learning_rate
    assert lr(0, 0) == 2.2e-4 / 2000
    assert lr(999, 1e9) == 1.1e-4
    assert lr(2000, 1e11) == lr(10**6, 9.99e12) == 2.2e-4
    assert lr(10**6, 12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert lr(10**6, 14.3e12 - 1) == pytest.approx(2.2e-5)
    assert lr(10**6, 14.3e12) == lr(10**6, 14.632e12) == 2.2e-5
    assert lr(10**6, 14.634e12) == 7.3e-6
    assert (
        V3_SCHEDULE.constant_until + V3_SCHEDULE.decay_tokens + V3_SCHEDULE.low_tokens + 167e9
        == pytest.approx(14.8e12)
    )


def test_v3_batch_bias_and_mtp() -> None:
    assert [V3_SCHEDULE.batch(t) for t in (0, 234.5e9, 469e9, 1e12)] == [3072, 9216, 15360, 15360]
    assert [V3_SCHEDULE.bias_update_speed(t) for t in (0, 14.2e12, 14.3e12)] == [1e-3, 1e-3, 0.0]
    assert [V3_SCHEDULE.mtp_weight(t) for t in (0, 10e12 - 1, 10e12)] == [0.3, 0.3, 0.1]
    assert replace(V3_SCHEDULE, peak=1.0).learning_rate(5000, 0) == 1.0
