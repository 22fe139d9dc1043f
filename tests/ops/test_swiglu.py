"""SwiGLU: the protocol, its identities, and its errors."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.ops import swiglu_backward, swiglu_forward

from support import property_test

EPS = np.finfo(np.float64).eps


def test_protocol() -> None:
    property_test("swiglu")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saturated_gates(dtype: type) -> None:
    """Far out silu is 0 or the identity, without overflow (pytest makes every warning an error)."""
    rows = [-1000, -200, 0, 200, 1000], [2, 3, 4, 5, 6], [1, 1, 7, 1, 10]
    gate, up, dy = (np.array([row], dtype=dtype) for row in rows)
    y, saved = swiglu_forward(gate, up)
    dgate, dup = swiglu_backward(dy, saved)
    wanted = [0, 0, 0, 1000, 6000], [0, 0, 14, 5, 60], [0, 0, 0, 200, 10000]
    for got, row in zip((y, dgate, dup), wanted, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got, [row], rtol=0, atol=1e-80
        )  # in float64 200 e^-200 is not quite 0


def test_linear_in_up() -> None:
    """dup · up = dy · y in every element: three roundings on each side, so 3 eps."""
    rng = np.random.default_rng(0)
    gate, up, dy = (scale * rng.normal(size=(3, 2, 50)) for scale in (5, 1, 1))
    y, saved = swiglu_forward(gate, up)
    _, dup = swiglu_backward(dy, saved)
    np.testing.assert_allclose(dup * up, dy * y, rtol=3 * EPS)


def test_symmetry() -> None:
    """silu(g) − silu(−g) = g, hence silu'(g) + silu'(−g) = 1."""
    g = np.linspace(-30, 30, 121)[None, :]
    one = np.ones_like(g)
    (plus, saved), (minus, saved_minus) = swiglu_forward(g, one), swiglu_forward(-g, one)
    slope = swiglu_backward(one, saved)[0] + swiglu_backward(one, saved_minus)[0]
    np.testing.assert_allclose(plus - minus, g, rtol=4 * EPS)
    assert np.all(
        np.abs(slope - 1) <= (2 + np.abs(g)) * EPS
    )  # 1 − s is off by eps/2, and multiplied by g


def test_minimum_of_silu() -> None:
    """silu' vanishes at −1.2784645…, where silu is 1 more than that: from s + g s (1 − s) = 0."""
    g = np.array([[-1.2784645427610738]])
    y, saved = swiglu_forward(g, np.ones((1, 1)))
    dgate, _ = swiglu_backward(np.ones((1, 1)), saved)
    np.testing.assert_allclose(y, g + 1, rtol=4 * EPS)
    assert abs(dgate[0, 0]) <= 2 * EPS


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (
            np.ones((2, 3)),
            np.ones((2, 4)),
            ValueError,
            r"up must have shape gate.shape=\(2, 3\), got \(2, 4\)",
        ),
        (
            np.ones((2, 3)),
            np.ones((2, 1)),
            ValueError,
            r"up must have shape gate.shape=\(2, 3\), got \(2, 1\)",
        ),
        (
            np.ones((2, 3)),
            np.ones(3),
            ValueError,
            r"up must have shape gate.shape=\(2, 3\), got \(3,\)",
        ),
        (np.ones((2, 3), dtype=int), np.ones((2, 3)), TypeError, "gate must be float32 or wider"),
        (
            np.ones((2, 3)),
            np.ones((2, 3), dtype=np.float16),
            TypeError,
            "up must be float32 or wider",
        ),
    ],
)
def test_errors(gate: np.ndarray, up: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu_forward(gate, up)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Up to the largest gates it is right; −∞ gives NaN. Below −87 the sigmoid has no normal number
    left in float32: the absolute error stays small, unless `up` is huge."""
    gate = np.array([3e38, -3e38, 1e-45, np.inf, -np.inf], np.float32)
    y, saved = swiglu_forward(gate, np.ones(5, np.float32))
    np.testing.assert_array_equal(y, np.array([3e38, 0, 0, np.inf, np.nan], np.float32))
    dgate, dup = swiglu_backward(np.ones(5, np.float32), saved)
    np.testing.assert_array_equal(dgate, np.array([1, 0, 0.5, np.nan, np.nan], np.float32))
    np.testing.assert_array_equal(dup, y)
    assert np.isinf(swiglu_forward(gate[:1], np.full(1, 2, np.float32))[0]).all()
    low, up = np.array([-100.0], np.float32), np.array([1e38], np.float32)
    wrong, right = (
        float(swiglu_forward(low.astype(t), up.astype(t))[0][0]) for t in (np.float32, np.float64)
    )
    assert 1e-3 < abs(wrong / right - 1) < 0.1
    assert abs(wrong - right) < 110 * 2.0**-149 * 1e38
