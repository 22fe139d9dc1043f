"""RMSNorm: the protocol, its identities, and its errors."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.ops import rms_norm_backward, rms_norm_forward

from support import property_test

RNG = np.random.default_rng(0)


def test_protocol() -> None:
    property_test("rms_norm")


def test_gradient_is_orthogonal_to_input_without_eps() -> None:
    """At eps = 0 stretching x changes nothing, so ⟨x, dx⟩ = 0 in every row."""
    x, w = RNG.normal(size=(2, 3, 7)), RNG.normal(size=7)
    _, saved = rms_norm_forward(x, w, eps=0.0)
    dx, _ = rms_norm_backward(RNG.normal(size=x.shape), saved)
    assert np.max(np.abs(np.sum(x * dx, axis=-1))) <= 1e-14
    assert np.max(np.abs(dx)) > 0.1


def test_output_has_unit_mean_square() -> None:
    x = 100 * RNG.normal(size=(2, 3, 7))
    y, _ = rms_norm_forward(x, np.ones(7), eps=1e-6)
    np.testing.assert_allclose(np.mean(y * y, axis=-1), 1, rtol=1e-9)


def test_zero_row() -> None:
    """A row of zeros stays zero, and its gradient is that of a linear map with slope w/√eps."""
    x, w = np.zeros((1, 4)), np.array([1.0, -2.0, 3.0, 4.0])
    y, saved = rms_norm_forward(x, w, eps=0.25)
    dx, dw = rms_norm_backward(np.ones((1, 4)), saved)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(dx, [2 * w])
    np.testing.assert_array_equal(dw, np.zeros(4))


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        (np.ones((2, 3)), np.ones(2), ValueError, r"w must have shape \(D,\)=\(3,\), got \(2,\)"),
        (np.ones((2, 3), dtype=int), np.ones(3), TypeError, "x must be float32 or wider"),
        (np.ones((2, 3), dtype=np.float16), np.ones(3), TypeError, "x must be float32 or wider"),
        ([[1.0]], np.ones(1), TypeError, "x must be an array"),
    ],
)
def test_errors(x: object, w: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm_forward(x, w, eps=1e-6)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Where Σ x² overflows the row is NaN, never a clean 0, and no other row with it; up to there,
    and down to the smallest numbers if eps is not 0, float32 is right."""
    x, w = np.array([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]]), np.array([0.5, 1.0, 2.0])
    for scale, overflows in ((1e18, False), (1e19, True), (1e-30, False), (1e-44, False)):
        scaled = (x * [[1], [scale]]).astype(np.float32)
        y, saved = rms_norm_forward(scaled, w.astype(np.float32), eps=1e-6)
        dx, dw = rms_norm_backward(np.ones((2, 3), np.float32), saved)
        right, saved = rms_norm_forward(scaled.astype(np.float64), w, eps=1e-6)
        right_dx, right_dw = rms_norm_backward(np.ones((2, 3)), saved)
        np.testing.assert_allclose(y[0], right[0], rtol=1e-6)
        np.testing.assert_allclose(dx[0], right_dx[0], rtol=1e-5, atol=1e-7)
        if overflows:
            assert np.isnan(y[1]).all()
            assert np.isnan(dx[1]).all()
            assert np.isnan(dw).all()
        else:
            np.testing.assert_allclose(y[1], right[1], rtol=1e-6, atol=2e-44)
            np.testing.assert_allclose(dx[1], right_dx[1], rtol=1e-5, atol=1e-24)
            np.testing.assert_allclose(dw, right_dw, rtol=1e-6, atol=1e-6)
    huge, _ = rms_norm_forward(x.astype(np.float32), w.astype(np.float32), eps=1e299)
    assert np.isnan(huge).all()
    right, _ = rms_norm_forward(x, w, eps=1e299)
    np.testing.assert_allclose(right, x * w * 1e299**-0.5, rtol=1e-15)
    assert np.isnan(rms_norm_forward(1e154 * x, w, eps=1e-6)[0]).all()  # of float64
    bare, _ = rms_norm_forward((1e-30 * x).astype(np.float32), w.astype(np.float32), eps=0)
    assert np.isinf(bare).all()  # x² is 0


@pytest.mark.parametrize("eps", [-1.0, np.inf, np.nan])
def test_eps_that_cannot_be_right(eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps must be a finite number of at least 0, got {eps}"):
        rms_norm_forward(np.ones((1, 2)), np.ones(2), eps=eps)


def test_no_width() -> None:
    with pytest.raises(ValueError, match=r"x must have a last axis of at least 1 entry, got shape"):
        rms_norm_forward(np.ones((2, 0)), np.ones(0), eps=1e-6)
