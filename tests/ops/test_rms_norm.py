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
