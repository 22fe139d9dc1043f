"""Head and cross-entropy in one: the protocol, equality with the two ops, and the errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.ops import (
    LEAVES,
    Op,
    cross_entropy_backward,
    cross_entropy_forward,
    head_cross_entropy_backward,
    head_cross_entropy_forward,
    linear_backward,
    linear_forward,
    log_prob_backward,
    log_prob_forward,
)

from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 3
D = 4
W = 7
MASK = np.array([[True, False, True], [True, True, False]])


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, D)), rng.normal(size=(W, D)), rng.integers(0, W, (B, T))


def run(h: np.ndarray, w: np.ndarray, **kwargs: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    loss, saved = head_cross_entropy_forward(h, w, **kwargs)
    return loss, *head_cross_entropy_backward(np.float64(1.3), saved)


def assert_close(got: Any, wanted: Any) -> None:
    """Sums of at most W or B·T terms behind sums of D, all of the size of 1: 50 eps."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=50 * EPS)


def test_protocol() -> None:
    property_test("head_cross_entropy")


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (6, 7), (256, 4096)])
@pytest.mark.parametrize("mask", [None, MASK, 0.5 * MASK], ids=["whole", "masked", "weighted"])
@pytest.mark.parametrize("normaliser", [None, 3.7])
def test_equals_linear_and_cross_entropy(
    block: tuple[int, int], mask: np.ndarray | None, normaliser: float | None
) -> None:
    h, w, targets = inputs()
    targets = targets if mask is None else np.where(mask != 0, targets, -100)
    kwargs: dict[str, Any] = {"targets": targets, "mask": mask, "normaliser": normaliser}
    logits, linear_saved = linear_forward(h, w)
    loss, saved = cross_entropy_forward(logits, **kwargs)
    dh, dw = linear_backward(cross_entropy_backward(np.float64(1.3), saved), linear_saved)
    for got, wanted in zip(run(h, w, **kwargs, block=block), (loss, dh, dw), strict=True):
        assert_close(got, wanted)


def test_identities() -> None:
    """A vector added to all rows of w changes nothing; the logits are bilinear; masked tokens get
    exactly 0."""
    h, w, targets = inputs()
    loss, dh, dw = run(h, w, targets=targets, mask=MASK)
    assert_close(dw.sum(axis=0), np.zeros(D))
    assert_close(np.sum(h * dh), np.sum(w * dw))
    assert_close(run(h, w + np.array([1.0, -2, 0.5, 3]), targets=targets, mask=MASK)[0], loss)
    assert np.all(dh[~MASK] == 0)
    assert np.all(np.any(dh[MASK] != 0, axis=-1))


def test_all_masked() -> None:
    h, w, targets = inputs()
    loss, dh, dw = run(h, w, targets=np.full_like(targets, -100), mask=np.zeros((B, T), bool))
    assert loss == 0
    assert np.all(dh == 0)
    assert np.all(dw == 0)


def test_finds_log_prob_in_the_table() -> None:
    calls = []

    def forward(*arrays: np.ndarray, **kwargs: Any) -> tuple[np.ndarray, Any]:
        calls.append(kwargs["block"])
        return log_prob_forward(*arrays, **kwargs)

    def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray]:
        calls.append("backward")
        return log_prob_backward(dy, saved)

    h, w, targets = inputs()
    run(h, w, targets=targets, block=(2, 3), ops=LEAVES | {"log_prob": Op(forward, backward)})
    assert calls == [(2, 3), "backward"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"w": np.ones((W, D + 1))},
            ValueError,
            r"w must have shape \(W, D\)=\('any', 4\), got \(7, 5\)",
        ),
        (
            {"targets": np.zeros((B, T - 1), int)},
            ValueError,
            r"targets must have shape \(…\)=\(2, 3\), got \(2, 2\)",
        ),
        ({"targets": np.full((B, T), W)}, ValueError, "targets must lie in 0…6, got 7…7"),
        ({"targets": np.full((B, T), -100)}, ValueError, "targets must lie in 0…6, got -100…-100"),
        (
            {"mask": np.ones((B, 1), bool)},
            ValueError,
            r"mask must have shape \(…\)=\(2, 3\), got \(2, 1\)",
        ),
        ({"block": (0, 1)}, ValueError, r"block at least \(1, 1\), got 1.0, \(0, 1\)"),
        ({"h": np.ones((B, T, D), int)}, TypeError, "h must be float32 or wider"),
        ({"w": np.ones((W, D), np.float16)}, TypeError, "w must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    h, w, targets = inputs()
    with pytest.raises(error, match=message):
        head_cross_entropy_forward(**({"h": h, "w": w, "targets": targets} | change))


def test_targets_between_two_classes() -> None:
    h, w, _ = inputs()
    with pytest.raises((TypeError, ValueError, IndexError)):
        head_cross_entropy_forward(h, w, targets=np.full((B, T), 1.5))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """At both ends what cross_entropy says of the logits: −∞ is probability 0, a first block of it
    too; +∞, or −∞ alone, is NaN; what underflows is 0."""
    h = np.full((1, 1), 1e25, np.float32)
    cases = [
        ([-1e25, -1e25, 0.0], 1),
        ([1e25, 0.0, 0.0], 1),
        ([-1e25] * 3, 1),
        ([1e-30] * 3, 1e-50),
    ]
    for w, size in cases:
        head, rows = np.array(w, np.float32)[:, None], (h.astype(float) * size).astype(np.float32)
        given: Any = {"targets": np.array([2])}
        loss, saved = head_cross_entropy_forward(rows, head, **given, block=(1, 2))
        right, _ = cross_entropy_forward(rows @ head.T, **given)
        np.testing.assert_allclose(loss, right, rtol=1e-6)
        dh, dw = head_cross_entropy_backward(np.float32(1), saved)
        assert np.isnan(dh).any() == np.isnan(dw).any() == np.isnan(right)


@pytest.mark.parametrize("anything", [np.nan, np.inf, 1e200])
@np.errstate(all="ignore")
def test_what_stands_at_a_masked_token_does_not_count(anything: float) -> None:
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    targets, mask = np.array([1, -100, 2]), np.array([1.0, 0.0, 0.5])
    right, saved = head_cross_entropy_forward(h, w, targets=targets, mask=mask)
    wanted = head_cross_entropy_backward(1.0, saved)
    h[1] = anything
    loss, saved = head_cross_entropy_forward(h, w, targets=targets, mask=mask)
    assert loss == right
    for got, one in zip(head_cross_entropy_backward(1.0, saved), wanted, strict=True):
        np.testing.assert_array_equal(got, one)


def test_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="w must have at least 1 entry along each axis"):
        head_cross_entropy_forward(np.ones((2, 3)), np.ones((0, 3)), targets=np.zeros(2, int))
