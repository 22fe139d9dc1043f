"""Cross-entropy: the protocol, its identities and masks, and its errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from refimpl.ops import cross_entropy_backward, cross_entropy_forward

from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 3
W = 7
MASK = np.array([[True, False, True], [True, True, False]])


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(B, T, W)), rng.integers(0, W, (B, T))


def loss_and_gradient(
    logits: np.ndarray, dloss: float = 1.3, **kwargs: Any
) -> tuple[Any, np.ndarray]:
    loss, saved = cross_entropy_forward(logits, **kwargs)
    return loss, cross_entropy_backward(logits.dtype.type(dloss), saved)


def test_protocol() -> None:
    property_test("cross_entropy")


def test_value_by_hand() -> None:
    """Probabilities 1/6, 2/6, 3/6 and 1/3 each: the mean of ln 6 − ln 3 and ln 3; p − onehot over
    the two tokens."""
    logits = np.array([[[0.0, math.log(2), math.log(3)], [5.0, 5.0, 5.0]]])
    loss, d = loss_and_gradient(logits, dloss=12.0, targets=np.array([[2, 0]]))
    np.testing.assert_allclose(loss, (math.log(2) + math.log(3)) / 2, rtol=8 * EPS)
    np.testing.assert_allclose(d, [[[1, 2, -3], [-4, 2, 2]]], rtol=32 * EPS)


def test_gradient_sums_to_zero_over_the_vocabulary() -> None:
    logits, targets = inputs()
    _, d = loss_and_gradient(logits, targets=targets)
    assert np.max(np.abs(d.sum(axis=-1))) <= 2 * W * EPS
    assert np.max(np.abs(d)) > 0.1


def test_constant_added_to_a_row_changes_nothing() -> None:
    """A power of two on logits that are multiples of 1/8 adds without rounding: the same bits."""
    logits, targets = inputs()
    logits = np.round(8 * logits) / 8
    loss, d = loss_and_gradient(logits, targets=targets)
    moved_loss, moved = loss_and_gradient(
        logits + np.array([64.0, -1024, 4096])[:, None], targets=targets
    )
    assert moved_loss == loss
    np.testing.assert_array_equal(moved, d)


@pytest.mark.parametrize("ignored", [-100, -1, W, 2**40])
def test_masked_tokens(ignored: int) -> None:
    """Their targets may be anything; the loss is the mean of the others; their gradient is exactly
    0."""
    logits, targets = inputs()
    loss, d = loss_and_gradient(logits, targets=np.where(MASK, targets, ignored), mask=MASK)
    kept_loss, kept = loss_and_gradient(logits[MASK][None], targets=targets[MASK][None])
    np.testing.assert_allclose(loss, kept_loss, rtol=8 * EPS)
    np.testing.assert_allclose(d[MASK], kept[0], rtol=4 * EPS)
    assert np.all(d[~MASK] == 0)


def test_all_masked() -> None:
    logits, targets = inputs()
    loss, d = loss_and_gradient(
        logits, targets=np.full_like(targets, -100), mask=np.zeros((B, T), bool)
    )
    assert loss == 0
    assert np.all(d == 0)


def test_masked_token_may_be_impossible() -> None:
    """A logit of −∞ at a masked target is no NaN; at one that counts, the loss is infinite."""
    logits = np.array([[[0.0, -np.inf], [0.0, 0.0]]])
    loss, d = loss_and_gradient(logits, targets=np.array([[1, 0]]), mask=np.array([[False, True]]))
    np.testing.assert_allclose(loss, math.log(2), rtol=EPS)
    np.testing.assert_array_equal(d[0, 0], [0, 0])
    assert loss_and_gradient(logits, targets=np.array([[1, 0]]))[0] == np.inf


def test_weights_and_normaliser() -> None:
    """A mask of weights multiplies each token's loss; the normaliser is their sum unless given."""
    logits, targets = inputs()
    weights = np.array([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]])
    each = [
        loss_and_gradient(logits[b : b + 1, t : t + 1], targets=targets[b : b + 1, t : t + 1])
        for b, t in np.ndindex(B, T)
    ]
    total = sum(w * loss for w, (loss, _) in zip(weights.flat, each, strict=True))
    for normaliser, divisor in ((None, 3.75), (4.0, 4.0)):
        loss, d = loss_and_gradient(logits, targets=targets, mask=weights, normaliser=normaliser)
        np.testing.assert_allclose(loss, total / divisor, rtol=8 * EPS)
        wanted = (
            np.reshape([w * row for w, (_, row) in zip(weights.flat, each, strict=True)], (B, T, W))
            / divisor
        )
        np.testing.assert_allclose(d, wanted, rtol=8 * EPS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_logits(dtype: type) -> None:
    """A confident hit costs exactly nothing, a confident miss the distance; no overflow (warnings
    are errors)."""
    logits = np.array([[[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]]], dtype=dtype)
    loss, d = loss_and_gradient(logits, dloss=2.0, targets=np.array([[0, 1]]))
    assert loss == 1e4
    np.testing.assert_array_equal(d, [[[0, 0, 0], [1, -1, 0]]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"targets": np.zeros(T, int)},
            ValueError,
            r"targets must have shape \(…\)=\(2, 3\), got \(3,\)",
        ),
        (
            {"targets": np.zeros((B, 1), int)},
            ValueError,
            r"targets must have shape \(…\)=\(2, 3\), got \(2, 1\)",
        ),
        ({"targets": np.full((B, T), W)}, ValueError, "targets must lie in 0…6, got 7…7"),
        ({"targets": np.full((B, T), -100)}, ValueError, "targets must lie in 0…6, got -100…-100"),
        (
            {"targets": np.full((B, T), -1), "mask": MASK},
            ValueError,
            "targets must lie in 0…6, got -1…0",
        ),
        (
            {"normaliser": 0.0},
            ValueError,
            "normaliser, or the sum of a mask that is not all 0, must not be 0, got 0",
        ),
        (
            {"mask": np.array([[1.0, -1, 0]] * B)},
            ValueError,
            "the sum of a mask that is not all 0, must not be 0",
        ),
        (
            {"mask": np.ones((B, 1), bool)},
            ValueError,
            r"mask must have shape \(…\)=\(2, 3\), got \(2, 1\)",
        ),
        ({"targets": np.zeros((B, T))}, TypeError, "targets must be integers, got float64"),
        ({"logits": np.ones((B, T, W), int)}, TypeError, "logits must be float32 or wider"),
        ({"logits": np.ones((B, T, W), np.float16)}, TypeError, "logits must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    logits, targets = inputs()
    with pytest.raises(error, match=message):
        cross_entropy_forward(**({"logits": logits, "targets": targets} | change))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Logits up to the type's largest are right, and −∞ is probability 0; +∞, or −∞ alone, is NaN.
    A loss beyond the type is ∞. Below, differences that underflow are equal logits."""

    def run(logits: list[float], target: int) -> tuple[float, list[float]]:
        z = np.array([logits], np.float32)
        loss, saved = cross_entropy_forward(z, targets=np.array([target]))
        return float(loss), cross_entropy_backward(np.float32(1), saved)[0].tolist()

    inf = math.inf
    assert run([3e38, -3e38], 0) == (0, [0, 0])
    assert run([3e38, -3e38], 1) == (inf, [1, -1])
    assert run([-inf, 0.0], 1) == (0, [0, 0])
    for broken in ([inf, 0.0], [-inf, -inf]):
        loss, gradient = run(broken, 0)
        assert math.isnan(loss)
        assert np.isnan(gradient).any()
    assert run([1e-45, 0.0], 0) == (pytest.approx(math.log(2)), [-0.5, 0.5])


@pytest.mark.parametrize("anything", [np.nan, np.inf, -np.inf])
@np.errstate(all="ignore")
def test_what_stands_at_a_masked_token_does_not_count(anything: float) -> None:
    """In the loss and in every gradient, its own included."""
    logits, targets = np.random.default_rng(0).normal(size=(3, 4)), np.array([1, -100, 2])
    mask = np.array([True, False, True])
    right, saved = cross_entropy_forward(logits, targets=targets, mask=mask)
    right_d = cross_entropy_backward(1.0, saved)
    logits[1] = anything
    loss, saved = cross_entropy_forward(logits, targets=targets, mask=mask)
    assert loss == right
    np.testing.assert_array_equal(cross_entropy_backward(1.0, saved), right_d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normaliser": np.nan}, "normaliser must be finite, got nan"),
        ({"normaliser": np.inf}, "normaliser must be finite, got inf"),
        ({"mask": np.array([1.0, np.nan])}, "mask must be finite, got a sum of nan"),
        ({"mask": np.array([1.0, np.inf])}, "mask must be finite, got a sum of inf"),
    ],
)
def test_weights_that_cannot_be_right(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy_forward(np.zeros((2, 3)), targets=np.array([0, 1]), **change)


def test_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="logits must have a last axis of at least 1 entry"):
        cross_entropy_forward(np.zeros((2, 0)), targets=np.array([0, 1]))
