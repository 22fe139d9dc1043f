"""Embedding: the protocol, its identities, and its errors."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.ops import embedding_backward, embedding_forward

from support import property_test


def test_protocol() -> None:
    property_test("embedding")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_repeated_ids_add_up_and_unused_rows_are_zero(dtype: type) -> None:
    w = np.arange(10.0).reshape(5, 2)
    ids = np.array([[3, 0, 3], [3, 4, 0]], dtype=dtype)
    y, saved = embedding_forward(w, ids=ids)
    dy = np.array([[[1.0, -1], [2, -2], [4, -4]], [[8, -8], [16, -16], [32, -32]]])
    np.testing.assert_array_equal(y, [[[6, 7], [0, 1], [6, 7]], [[6, 7], [8, 9], [0, 1]]])
    np.testing.assert_array_equal(
        embedding_backward(dy, saved), [[34, -34], [0, 0], [0, 0], [13, -13], [16, -16]]
    )


def test_adjoint_identity() -> None:
    """The lookup is linear in w, so ⟨dw, w⟩ = ⟨dy, y⟩; and every row of dy lands once. Whole
    numbers: exactly."""
    rng = np.random.default_rng(0)
    w, dy = (
        rng.integers(-9, 10, (7, 3)).astype(float),
        rng.integers(-9, 10, (2, 40, 3)).astype(float),
    )
    y, saved = embedding_forward(w, ids=rng.integers(0, 7, (2, 40)))
    dw = embedding_backward(dy, saved)
    assert np.sum(dw * w) == np.sum(dy * y) != 0
    np.testing.assert_array_equal(dw.sum(axis=0), dy.sum(axis=(0, 1)))


def test_gradient_is_reproducible_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    w = np.zeros((3, 2), np.float32)
    ids = rng.integers(0, 3, 1000)
    dy = rng.normal(size=(1000, 2)).astype(np.float32)
    first, second = (
        embedding_backward(dy.copy(), embedding_forward(w, ids=ids.copy())[1]) for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()


def test_no_ids() -> None:
    y, saved = embedding_forward(np.ones((3, 2)), ids=np.zeros((2, 0), dtype=int))
    assert y.shape == (2, 0, 2)
    np.testing.assert_array_equal(embedding_backward(y, saved), np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("w", "ids", "error", "message"),
    [
        (np.ones(3), [0], ValueError, r"w must have shape \(W, D\)=\('any', 'any'\), got \(3,\)"),
        (
            np.ones((3, 2)),
            [[0, -1]],
            ValueError,
            r"ids must lie in 0…2, got -1…0",
        ),  # would count from the end
        (np.ones((3, 2)), [[3, 1]], ValueError, r"ids must lie in 0…2, got 1…3"),
        (np.ones((3, 2)), [1.0], TypeError, "ids must be integers, got float64"),
        (np.ones((3, 2), dtype=int), [0], TypeError, "w must be float32 or wider"),
    ],
)
def test_errors(w: np.ndarray, ids: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embedding_forward(w, ids=np.array(ids))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Rows are copied bit by bit, whatever they hold; a sum of gradients beyond the type is ∞, and
    one below its normal numbers is exact."""
    w = np.array([[3e38, np.inf], [1e-45, np.nan]], np.float32)
    y, saved = embedding_forward(w, ids=np.array([1, 0, 0]))
    assert y.tobytes() == w[[1, 0, 0]].tobytes()
    dy = np.array([[1, 1], [3e38, 1e-45], [3e38, 1e-45]], np.float32)
    np.testing.assert_array_equal(
        embedding_backward(dy, saved), np.array([[np.inf, 3e-45], [1, 1]], np.float32)
    )
