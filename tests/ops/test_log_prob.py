"""Log-probabilities from hidden states: the protocol, blocks, temperature, identities, and
errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.ops import log_prob_backward, log_prob_forward

from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 3
D = 4
W = 7
BLOCKS = pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 7), (6, 2), (256, 4096)])
MASK = np.array([[True, False, True], [True, True, False]])


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, D)), rng.normal(size=(W, D)), rng.integers(0, W, (B, T))


def cotangent() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(B, T))


def run(
    h: np.ndarray, w: np.ndarray, dy: np.ndarray, **kwargs: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, saved = log_prob_forward(h, w, **kwargs)
    return y, *log_prob_backward(dy, saved)


def assert_close(got: Any, wanted: Any) -> None:
    """Sums of at most W or B·T terms behind sums of D, all below ten: 50 eps of the largest
    entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=50 * EPS * max(np.max(np.abs(wanted)), 1))


def test_protocol() -> None:
    property_test("log_prob")


@BLOCKS
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_picks_from_the_log_softmax(block: tuple[int, int], temperature: float) -> None:
    """And its gradient is that of the formula, whatever the block: one, many, or a short last
    one."""
    (h, w, targets), dy = inputs(), cotangent()
    y, dh, dw = run(h, w, dy, targets=targets, temperature=temperature, block=block)
    z = h @ w.T / temperature
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    assert_close(y, np.log(np.take_along_axis(p, targets[..., None], axis=-1))[..., 0])
    dz = dy[..., None] * ((np.arange(W) == targets[..., None]) - p) / temperature
    assert_close(dh, dz @ w)
    assert_close(dw, np.einsum("btw,btd->wd", dz, h))


def test_temperature_divides_the_hidden_state() -> None:
    """A power of two divides without rounding: the same bits."""
    (h, w, targets), dy = inputs(), cotangent()
    y, dh, dw = run(h, w, dy, targets=targets, temperature=4.0)
    same, dsame, dw_same = run(h / 4, w, dy, targets=targets)
    for got, wanted in ((y, same), (dh, dsame / 4), (dw, dw_same)):
        np.testing.assert_array_equal(got, wanted)


def test_probabilities_of_all_targets_sum_to_one() -> None:
    h, w, _ = inputs()
    every = [log_prob_forward(h, w, targets=np.full((B, T), v), block=(2, 3))[0] for v in range(W)]
    assert_close(np.exp(every).sum(axis=0), np.ones((B, T)))


def test_identities() -> None:
    """One vector added to all rows of w shifts all logits alike, so Σ_v dw_v = 0; and the logits
    are bilinear."""
    (h, w, targets), dy = inputs(), cotangent()
    y, dh, dw = run(h, w, dy, targets=targets)
    moved = run(h, w + np.array([1.0, -2, 0.5, 3]), dy, targets=targets)
    assert_close(moved[0], y)
    assert_close(moved[2], dw)
    assert_close(dw.sum(axis=0), np.zeros(D))
    assert_close(np.sum(dh * h), np.sum(dw * w))


@BLOCKS
@pytest.mark.parametrize("ignored", [-100, W])
def test_masked_tokens(block: tuple[int, int], ignored: int) -> None:
    """Their value and gradient are exactly 0, whatever their targets; weights multiply."""
    (h, w, targets), dy = inputs(), cotangent()
    y, dh, dw = run(h, w, dy, targets=np.where(MASK, targets, ignored), mask=MASK, block=block)
    whole, whole_dh, _ = run(h, w, dy, targets=targets, block=block)
    np.testing.assert_array_equal(y, np.where(MASK, whole, 0))
    np.testing.assert_array_equal(dh, np.where(MASK[..., None], whole_dh, 0))
    assert_close(dw, run(h[MASK], w, dy[MASK], targets=targets[MASK])[2])
    doubled = run(h, w, dy, targets=np.where(MASK, targets, ignored), mask=2.0 * MASK, block=block)
    for got, wanted in zip(doubled, (2 * y, 2 * dh, 2 * dw), strict=True):
        np.testing.assert_array_equal(got, wanted)


@BLOCKS
@pytest.mark.parametrize("order", [1, -1])
def test_huge_logits(block: tuple[int, int], order: int) -> None:
    """Rising or falling to ±1e4 over the vocabulary: each block rebases the sum; no overflow
    (warnings are errors)."""
    w = 1e4 * np.linspace(-1, 1, W)[::order, None]
    targets = np.array([[0, W - 1]])
    y, dh, dw = run(np.ones((1, 2, 1)), w, np.ones((1, 2)), targets=targets, block=block)
    np.testing.assert_array_equal(y, [[-2e4, 0][::order]])
    np.testing.assert_array_equal(dh, [[[-2e4], [0]][::order]])
    np.testing.assert_array_equal(dw[1:-1], np.zeros((W - 2, 1)))
    np.testing.assert_array_equal(dw[[0, -1], 0] * order, [1, -1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"w": np.ones((W, D + 1))},
            ValueError,
            r"w must have shape \(W, D\)=\('any', 4\), got \(7, 5\)",
        ),
        (
            {"targets": np.zeros(T, int)},
            ValueError,
            r"targets must have shape \(…\)=\(2, 3\), got \(3,\)",
        ),
        ({"targets": np.full((B, T), W)}, ValueError, "targets must lie in 0…6, got 7…7"),
        ({"targets": np.full((B, T), -1)}, ValueError, "targets must lie in 0…6, got -1…-1"),
        (
            {"mask": np.ones(T, bool)},
            ValueError,
            r"mask must have shape \(…\)=\(2, 3\), got \(3,\)",
        ),
        (
            {"temperature": 0.0},
            ValueError,
            r"temperature must be positive and finite and block at least \(1, 1\), got 0.0",
        ),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive .* got nan"),
        ({"block": (0, 5)}, ValueError, r"block at least \(1, 1\), got 1.0, \(0, 5\)"),
        ({"block": (5, 0)}, ValueError, r"block at least \(1, 1\), got 1.0, \(5, 0\)"),
        ({"h": np.ones((B, T, D), int)}, TypeError, "h must be float32 or wider"),
        ({"w": np.ones((W, D), np.float16)}, TypeError, "w must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    h, w, targets = inputs()
    with pytest.raises(error, match=message):
        log_prob_forward(**({"h": h, "w": w, "targets": targets, "temperature": 1.0} | change))


def test_targets_between_two_classes() -> None:
    h, w, _ = inputs()
    with pytest.raises((TypeError, ValueError, IndexError)):
        log_prob_forward(h, w, targets=np.full((B, T), 1.5))


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (8, 8)])
@np.errstate(all="ignore")
def test_range_of_validity(block: tuple[int, int]) -> None:
    """Logits of −∞ are probability 0, a whole first block of them too; +∞, or −∞ alone, is NaN, as
    in cross_entropy. Logits that underflow are 0."""

    def run(w: list[float], size: float = 1e25) -> tuple[float, np.ndarray, np.ndarray]:
        h, head = np.full((1, 1), size, np.float32), np.array(w, np.float32)[:, None]
        y, saved = log_prob_forward(h, head, targets=np.array([len(w) - 1]), block=block)
        dh, dw = log_prob_backward(np.ones(1, np.float32), saved)
        return float(y[0]), dh, dw

    y, dh, dw = run([-1e25, -1e25, 0.0, 0.0])
    assert y == pytest.approx(np.log(0.5))
    np.testing.assert_array_equal(dw[:2], 0)
    assert np.isfinite(dh).all()
    for broken in ([1e25, 0.0, 0.0], [0.0, 0.0, 1e25], [-1e25] * 3):
        y, dh, dw = run(broken)
        assert np.isnan(y)
        assert np.isnan(dh).all()
        assert np.isnan(dw).any()
    assert run([1e-30, -1e-30], 1e-30)[0] == pytest.approx(np.log(0.5))


@pytest.mark.parametrize("anything", [np.nan, np.inf, 1e200])
@np.errstate(all="ignore")
def test_what_stands_at_a_masked_token_does_not_count(anything: float) -> None:
    """In the result and in every gradient: dw sums over tokens, and 0 · NaN would be NaN."""
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    targets, mask = np.array([1, -100, 2]), np.array([1.0, 0.0, 0.5])
    right, saved = log_prob_forward(h, w, targets=targets, mask=mask)
    right_dh, right_dw = log_prob_backward(np.ones(3), saved)
    h[1] = anything
    y, saved = log_prob_forward(h, w, targets=targets, mask=mask)
    dh, dw = log_prob_backward(np.ones(3), saved)
    np.testing.assert_array_equal(y, right)
    np.testing.assert_array_equal(dh, right_dh)
    np.testing.assert_array_equal(dw, right_dw)


@pytest.mark.parametrize(("h", "w"), [((2, 3), (0, 3)), ((2, 0), (4, 0)), ((), (4, 1))])
def test_no_width_or_vocabulary(h: tuple[int, ...], w: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have a(t least 1| last axis of at least 1) entry"):
        log_prob_forward(np.ones(h), np.ones(w), targets=np.zeros(h[:-1], int))


@pytest.mark.parametrize("temperature", [np.inf, np.nan, -1.0])
def test_temperature_that_cannot_be_right(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        log_prob_forward(
            np.ones((1, 2)), np.ones((3, 2)), targets=np.zeros(1, int), temperature=temperature
        )
