"""AdamW against a scalar reimplementation, clipping, the gates' biases, and the published points of
V3's schedules."""

from __future__ import annotations

import math
import sys
import tracemalloc
from dataclasses import FrozenInstanceError, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.config import preset
from refimpl.optimizer import (
    BLOCK,
    V3_SCHEDULE,
    AdamW,
    Moments,
    clip_global_norm,
    update_gate_biases,
)
from refimpl.parameters import init_parameters, is_buffer

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
    moments = Moments()
    for grads in steps:
        moments = AdamW(**options).update(params, grads, moments, 0.01)
    constants = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1} | options
    for name, p in params.items():
        for at in np.ndindex(p.shape):
            wanted = scalar_adamw(
                start[name][at], [g[name][at] for g in steps], 0.01, *constants.values()
            )
            assert abs(p[at] - wanted) <= 1e-14 * abs(wanted)


def test_bfloat16_is_the_rounding_of_a_master() -> None:
    """100 steps of a hundredth of a unit each, which bfloat16 alone would not take: the master and
    its moments are what a float32 parameter has, to the bit; the parameter is its rounding."""
    start = np.array([1.0, -3.0]).astype(ml_dtypes.bfloat16)
    params, plain = {"w": start.copy()}, {"w": start.astype(np.float32)}
    moments = of_plain = Moments()
    grads = {"w": np.array([-1.0, 1.0], np.float32)}
    optimizer = AdamW(weight_decay=0.0)
    for _ in range(100):
        moments = optimizer.update(params, grads, moments, 2**-8 / 100)
        of_plain = optimizer.update(plain, grads, of_plain, 2**-8 / 100)
    np.testing.assert_array_equal(moments.master["w"], plain["w"])
    for ours, theirs in zip(moments[1:3], of_plain[1:3], strict=True):
        np.testing.assert_array_equal(ours["w"], theirs["w"])  # type: ignore[index]
    assert params["w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(moments.master["w"], [1 + 2**-8, -3 - 2**-8], atol=1e-5)
    np.testing.assert_array_equal(params["w"], plain["w"].astype(ml_dtypes.bfloat16))
    assert not of_plain.master
    with pytest.raises(ValueError, match=r"the gradient of w must be float32 \(2,\)"):
        optimizer.update(params, {"w": start}, moments, 0.1)


def test_first_step_is_the_sign() -> None:
    """Bias correction makes the first step lr · sign(g), whatever the gradient's size (ε apart)."""
    params = {"w": np.zeros(3)}
    AdamW(weight_decay=0.0).update(params, {"w": np.array([1e-3, -5.0, 200.0])}, Moments(), 0.1)
    np.testing.assert_allclose(params["w"], [-0.1, 0.1, -0.1], rtol=2e-5)


def test_decay_is_decoupled_and_chosen_by_name() -> None:
    params = {"w": np.ones(2), "norm.weight": np.ones(2)}
    optimizer = AdamW(weight_decay=0.5, decays=lambda name: "norm" not in name)
    optimizer.update(params, {n: np.zeros(2) for n in params}, Moments(), 0.1)
    np.testing.assert_allclose(params["w"], 0.95)  # no gradient: the decay alone
    np.testing.assert_array_equal(params["norm.weight"], 1)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """A gradient whose square overflows makes its parameter NaN, at once: a step of 0 would go
    unseen. One whose square underflows makes a step by epsilon, as the formula has it."""
    params = {"w": np.ones(3, np.float32)}
    grads = {"w": np.array([1e19, 2e19, 1e-30], np.float32)}
    AdamW(weight_decay=0.0, beta2=0.5).update(params, grads, Moments(), 0.25)
    np.testing.assert_array_equal(params["w"], np.array([0.75, np.nan, 1], np.float32))


def test_in_place_and_two_blocks_of_scratch() -> None:
    """Parameters and moments stay the same arrays, and after the first step nothing but two blocks
    of each type is allocated."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(300, 500)), "b": rng.normal(size=(200, 100)).astype(np.float32)}
    grads = {n: rng.normal(size=p.shape).astype(p.dtype) for n, p in params.items()}
    same = dict(params)
    optimizer, moments = AdamW(), Moments()
    moments = first = optimizer.update(params, grads, moments, 0.01)
    tracemalloc.start()
    for _ in range(3):
        moments = optimizer.update(params, grads, moments, 0.01)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * (8 * BLOCK + 4 * params["b"].size) + 10_000 < params["a"].nbytes
    assert all(params[n] is same[n] for n in params)
    assert all(moments.first[n] is first.first[n] for n in params)
    assert all(moments.second[n] is first.second[n] for n in params)
    assert params["b"].dtype == moments.first["b"].dtype == np.float32


def test_moments_are_given_and_returned() -> None:
    """Nothing else is remembered: one optimizer's two runs don't mix, a run goes on from moments
    that were copied, the start stays empty, and a tensor seen later starts from zeros."""
    rng = np.random.default_rng(0)
    grads = [{"w": rng.normal(size=3)} for _ in range(4)]
    optimizer = AdamW()
    whole, parts, other = ({"w": np.ones(3)} for _ in range(3))
    moments = saved = Moments()
    for g in grads:
        moments = optimizer.update(whole, g, moments, 0.01)
    for g in grads[:2]:
        saved = optimizer.update(parts, g, saved, 0.01)
    resumed = Moments(saved.step, *({n: x.copy() for n, x in of.items()} for of in saved[1:]))
    optimizer.update(other, grads[3], saved, 0.01)
    for g in grads[2:]:
        resumed = AdamW().update(parts, g, resumed, 0.01)
    np.testing.assert_array_equal(parts["w"], whole["w"])
    np.testing.assert_array_equal(resumed.second["w"], moments.second["w"])
    assert Moments() == (0, {}, {}, {})
    late = optimizer.update({"v": np.ones(2)}, {"v": np.full(2, 0.5)}, resumed, 0.01)
    assert (late.step, list(late.first), list(resumed.first)) == (5, ["w", "v"], ["w"])
    np.testing.assert_allclose(late.first["v"], 0.05)


def test_blocks_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, in whatever order the numbers lie, the bits are those of whole tensors."""
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(7, 9)).astype(np.float32)
    steps = [rng.normal(size=(7, 9)).astype(np.float32) for _ in range(3)]
    params = {"whole": whole.copy(), "blocks": whole.copy(), "strided": whole.T.copy().T}
    same = dict(params)
    for name, p in params.items():
        monkeypatch.setattr("refimpl.optimizer.BLOCK", 100 if name == "whole" else 5)
        moments = Moments()
        for g in steps:
            grads = {name: g if name == "whole" else g.T.copy().T}
            moments = AdamW().update({name: p}, grads, moments, 0.01)
    assert not np.array_equal(params["whole"], whole)
    np.testing.assert_array_equal(params["blocks"], params["whole"])
    np.testing.assert_array_equal(params["strided"], params["whole"])
    assert all(params[n] is same[n] for n in params)
    assert not params["strided"].flags.c_contiguous


@pytest.mark.parametrize(
    ("params", "grads", "lr", "message"),
    [
        ({}, {"w": np.ones(2)}, 0.1, "grads must name parameters, got w"),
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
    before = {n: p.copy() for n, p in params.items()}
    moments = Moments()
    with pytest.raises(ValueError, match=message):
        AdamW().update(params, grads, moments, lr)
    assert moments == (0, {}, {}, {})
    assert all(np.array_equal(params[n], before[n]) for n in params)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"v": np.ones(2)}, {}, "moments must have first and second, got only one of them for v"),
        (
            {"w": np.ones(3)},
            {"w": np.ones(2)},
            r"of w must be float64 \(2,\) .*, got float64 \(3,\)",
        ),
        (
            {"w": np.ones(2)},
            {"w": np.ones(2, np.float32)},
            r"of w must be float64 \(2,\) .*, got float32",
        ),
    ],
)
def test_moments_that_do_not_fit_change_nothing(first: Any, second: Any, message: str) -> None:
    params, grads = {"v": np.ones(2), "w": np.ones(2)}, {"v": np.ones(2), "w": np.ones(2)}
    first = {"v": np.ones(2)} | first
    second = ({"v": np.ones(2)} if second else {}) | second
    with pytest.raises(ValueError, match=message):
        AdamW().update(params, grads, Moments(1, first, second), 0.1)
    everything = (params["v"], params["w"], first["v"])
    assert all((x == 1).all() for x in everything)


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


def test_settings_are_frozen() -> None:
    optimizer = AdamW()
    assert optimizer == AdamW()
    with pytest.raises(FrozenInstanceError):
        optimizer.beta1 = 0.5  # type: ignore[misc]


def test_gate_biases() -> None:
    """Each gate's of the loads moves in place by the sign, MTP modules' too, others stay; centred
    where the convention says so; a model without gate biases is left alone."""
    config = preset("tiny")
    params = init_parameters(config, dtype="float64")
    biases = {n: p for n, p in params.items() if is_buffer(n)}
    others = {n: p.copy() for n, p in params.items() if n not in biases}
    assert len(biases) == 4
    load = np.array([0, 0, 0, 0, 0, 0, 3, 5])
    update_gate_biases(params, {1: load, 2: load, 3: load[::-1]}, 0.5, config)
    signs = [0.5] * 6 + [-0.5] * 2
    wanted = (signs, signs, signs[::-1], [0.0] * 8)
    assert [bias.tolist() for bias in biases.values()] == list(map(list, wanted))
    assert all(params[n] is bias for n, bias in biases.items())
    assert all(np.array_equal(params[n], p) for n, p in others.items())
    centred = replace(config, conventions=replace(config.conventions, bias_centre=True))
    update_gate_biases(params, {4: load}, 0.5, centred)
    assert [bias.tolist() for bias in biases.values()][3] == [0.25] * 6 + [-0.75] * 2
    without = replace(config, gate_bias=False)
    params = init_parameters(without)
    update_gate_biases(params, {1: load}, 0.5, without)
    assert params.keys() == others.keys()


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
