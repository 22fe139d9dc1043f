"""The preference loss: the protocol, its identities and its errors."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.ops import preference_loss_backward, preference_loss_forward

from support import property_test


def test_protocol() -> None:
    property_test("preference_loss")


def test_no_preference_costs_ln_2() -> None:
    """Equal answers: loss ln 2, and a gradient of half a step each way."""
    h, w = np.ones((2, 3)), np.array([[1.0, 2.0, 3.0]])
    loss, saved = preference_loss_forward(h, h, w)
    assert abs(loss - np.log(2)) <= 1e-15
    chosen, rejected, dw = preference_loss_backward(1.0, saved)
    np.testing.assert_allclose(chosen, np.broadcast_to(-w / 4, (2, 3)), rtol=1e-15)
    np.testing.assert_array_equal(rejected, -chosen)
    assert not np.any(dw)


@pytest.mark.parametrize(("margin", "loss", "slope"), [(1000.0, 0.0, 0.0), (-1000.0, 1000.0, -1.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_margins(margin: float, loss: float, slope: float, dtype: type) -> None:
    """Sure and right costs nothing; sure and wrong costs the margin; neither overflows."""
    one, zero = np.ones((1, 1), dtype), np.zeros((1, 1), dtype)
    found, saved = preference_loss_forward(margin * one, zero, one)
    assert found == loss
    assert preference_loss_backward(1.0, saved)[0] == slope


def test_small_losses_keep_their_digits() -> None:
    """ln(1 + e^-40) is e^-40, not 0."""
    found, _ = preference_loss_forward(np.array([[40.0]]), np.array([[0.0]]), np.array([[1.0]]))
    assert abs(found / np.exp(-40) - 1) <= 1e-15


def test_a_shift_of_both_changes_nothing() -> None:
    """Rewards count by their difference alone, so a bias of the head would cancel; the gradients
    sum to zero."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 3))
    b = rng.normal(size=(4, 3))
    w = rng.normal(size=(1, 3))
    loss, saved = preference_loss_forward(a, b, w)
    shifted, _ = preference_loss_forward(a + 1, b + 1, w)
    assert abs(loss - shifted) <= 1e-14
    chosen, rejected, _ = preference_loss_backward(0.7, saved)
    assert not np.any(chosen + rejected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (1, 3), (1, 3)), r"h_rejected must have shape \(N, D\)=\(2, 3\), got \(1, 3\)"),
        (((2, 3), (2, 3), (3,)), r"w must have shape \(1, D\)=\(1, 3\), got \(3,\)"),
        (((3,), (3,), (1, 3)), r"h_chosen must have shape \(N, D\)"),
        (((0, 3), (0, 3), (1, 3)), "h_chosen must have at least 1 entry along each axis"),
    ],
)
def test_errors(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss_forward(*map(np.ones, shapes))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Margins up to the type's largest are right; one that overflows is NaN, where +∞ would be a
    clean loss of 0. Below, margins that underflow are 0: ln 2."""

    def run(margin: float, w: float = 1.0) -> tuple[float, list[np.ndarray]]:
        h = np.array([[margin]], np.float32)
        loss, saved = preference_loss_forward(h, 0 * h, np.array([[w]], np.float32))
        return float(loss), list(preference_loss_backward(np.float32(1), saved))

    assert run(3e38)[0] == 0
    assert run(-3e38)[0] == np.float32(3e38)
    for size in (1e25, -1e25):
        loss, gradients = run(size, 1e25)
        assert np.isnan(loss)
        assert all(np.isnan(g).all() for g in gradients)
    loss, gradients = run(1e-30, 1e-30)
    assert loss == pytest.approx(np.log(2))
    np.testing.assert_allclose(gradients[0], [[-0.5e-30]], rtol=1e-6)
