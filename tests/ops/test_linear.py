"""Linear: the protocol, its identities, and its errors."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest

from refimpl.ops import linear_backward, linear_forward

from support import property_test


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    """Small whole numbers as floats: their sums and products are exact, so identities hold to the
    last bit."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float64)


def test_protocol() -> None:
    property_test("linear")


def test_values_of_a_square_map() -> None:
    """With I = O a transposed W fits the shapes; the values tell."""
    w = np.array([[1.0, 2.0], [3.0, 4.0]])
    x = np.array([[[5.0, 7.0]]])
    dy = np.array([[[1.0, 10.0]]])
    y, saved = linear_forward(x, w)
    dx, dw = linear_backward(dy, saved)
    np.testing.assert_array_equal(y, [[[19, 43]]])
    np.testing.assert_array_equal(dx, [[[31, 42]]])
    np.testing.assert_array_equal(dw, [[5, 7], [50, 70]])


def test_adjoint_identity() -> None:
    """y is linear in x and in w, so ⟨dx, x⟩ = ⟨dw, w⟩ = ⟨dy, y⟩, exactly for whole numbers."""
    x = integers(2, 3, 5)
    w = integers(4, 5, seed=1)
    dy = integers(2, 3, 4, seed=2)
    y, saved = linear_forward(x, w)
    dx, dw = linear_backward(dy, saved)
    assert np.sum(dx * x) == np.sum(dw * w) == np.sum(dy * y) != 0


def test_weight_gradient_sums_over_all_rows() -> None:
    x = integers(2, 3, 5)
    w = integers(4, 5, seed=1)
    dy = integers(2, 3, 4, seed=2)
    _, dw = linear_backward(dy, linear_forward(x, w)[1])
    rows = sum(np.outer(dy[b, t], x[b, t]) for b in range(2) for t in range(3))
    np.testing.assert_array_equal(dw, rows)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 0, 5), (2, 1, 3, 5)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, w = integers(*shape), integers(4, 5, seed=1)
    dy = integers(*shape[:-1], 4, seed=2)
    y, saved = linear_forward(x, w)
    dx, dw = linear_backward(dy, saved)
    np.testing.assert_array_equal(y, np.einsum("...i,oi->...o", x, w))
    np.testing.assert_array_equal(dx, np.einsum("...o,oi->...i", dy, w))
    np.testing.assert_array_equal(dw, dy.reshape(-1, 4).T @ x.reshape(-1, 5))


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        (
            np.ones((2, 3)),
            np.ones((4, 2)),
            ValueError,
            r"w must have shape \(O, I\)=\('any', 3\), got \(4, 2\)",
        ),
        (
            np.ones((2, 3)),
            np.ones((3, 4)),
            ValueError,
            r"w must have shape \(O, I\)=\('any', 3\), got \(3, 4\)",
        ),
        (
            np.ones((2, 3)),
            np.ones(3),
            ValueError,
            r"w must have shape \(O, I\)=\('any', 3\), got \(3,\)",
        ),
        (np.ones((2, 3), dtype=int), np.ones((4, 3)), TypeError, "x must be float32 or wider"),
        (
            np.ones((2, 3)),
            np.ones((4, 3), dtype=np.float16),
            TypeError,
            "w must be float32 or wider",
        ),
        (
            np.ones((2, 3)),
            array_api_strict.ones((4, 3)),
            TypeError,
            "w must come from .*numpy.*, got .*array_api_strict",
        ),
        ([[1.0]], np.ones((1, 1)), TypeError, "x must be an array"),
    ],
)
def test_errors(x: object, w: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_forward(x, w)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Above, a sum beyond the type is ±∞; below, a product below it is 0, wrong by less than its
    smallest normal number."""
    w = np.ones((1, 2), np.float32)
    y, saved = linear_forward(np.array([[3e38, 3e38], [-3e38, -3e38]], np.float32), w)
    np.testing.assert_array_equal(y, [[np.inf], [-np.inf]])
    assert not np.isfinite(linear_backward(np.full((2, 1), 1e38, np.float32), saved)[1]).any()
    small = np.full((1, 2), 1e-30, np.float32)
    y, saved = linear_forward(small, small)
    assert np.abs(np.float64(y) - 2e-60).max() < np.finfo(np.float32).tiny
    dx, dw = linear_backward(small[:, :1], saved)
    assert max(np.abs(dx).max(), np.abs(dw).max()) < np.finfo(np.float32).tiny
