"""Feed-forward network: the protocol, its identities, and its errors."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.ops import (
    LEAVES,
    Op,
    ffn_backward,
    ffn_forward,
    linear_backward,
    linear_forward,
    swiglu_backward,
    swiglu_forward,
)

from support import property_test

EPS = np.finfo(np.float64).eps


def inputs(d: int = 5, f: int = 7) -> tuple[np.ndarray, ...]:
    """x, w_gate, w_up, w_down and a cotangent."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape) for shape in ((2, 3, d), (f, d), (f, d), (d, f), (2, 3, d)))


def test_protocol() -> None:
    property_test("ffn")


def test_formula() -> None:
    x, w_gate, w_up, w_down, _ = inputs()
    gate, up = x @ w_gate.T, x @ w_up.T
    expected = (gate / (1 + np.exp(-gate)) * up) @ w_down.T
    y, _ = ffn_forward(x, w_gate, w_up, w_down)
    np.testing.assert_allclose(
        y, expected, rtol=0, atol=20 * EPS * np.abs(expected).max()
    )  # sums of D, F < 10 terms


def test_is_made_of_its_pieces() -> None:
    """The same calls by hand give the same bits; D = F, where a transpose would fit the shapes."""
    x, w_gate, w_up, w_down, dy = inputs(5, 5)
    y, saved = ffn_forward(x, w_gate, w_up, w_down)
    (gate, gate_saved), (up, up_saved) = linear_forward(x, w_gate), linear_forward(x, w_up)
    hidden, hidden_saved = swiglu_forward(gate, up)
    by_hand, down_saved = linear_forward(hidden, w_down)
    dhidden, dw_down = linear_backward(dy, down_saved)
    dgate, dup = swiglu_backward(dhidden, hidden_saved)
    (dx_gate, dw_gate), (dx_up, dw_up) = (
        linear_backward(dgate, gate_saved),
        linear_backward(dup, up_saved),
    )
    np.testing.assert_array_equal(y, by_hand)
    for got, wanted in zip(
        ffn_backward(dy, saved), (dx_gate + dx_up, dw_gate, dw_up, dw_down), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_identities() -> None:
    """y is linear in w_down and in w_up; x enters through w_gate x and w_up x alone."""
    x, w_gate, w_up, w_down, dy = inputs()
    y, saved = ffn_forward(x, w_gate, w_up, w_down)
    dx, dw_gate, dw_up, dw_down = ffn_backward(dy, saved)
    bound = 100 * EPS * np.sum(np.abs(dy * y))  # sums of up to 35 terms, behind sums of up to 7
    assert abs(np.sum(dw_down * w_down) - np.sum(dy * y)) <= bound
    assert abs(np.sum(dw_up * w_up) - np.sum(dy * y)) <= bound
    assert abs(np.sum(dx * x) - np.sum(dw_gate * w_gate) - np.sum(dw_up * w_up)) <= bound


def test_finds_its_ops_in_the_table() -> None:
    calls = []

    def forward(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, object]:
        calls.append("forward")
        return linear_forward(x, w)

    def backward(dy: np.ndarray, saved: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append("backward")
        return linear_backward(dy, saved)

    *arrays, dy = inputs()
    _, saved = ffn_forward(*arrays, ops=LEAVES | {"linear": Op(forward, backward)})
    ffn_backward(dy, saved)
    assert calls == 3 * ["forward"] + 3 * ["backward"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {1: np.ones((7, 4))},
            ValueError,
            r"w_gate must have shape \(F, D\)=\('any', 5\), got \(7, 4\)",
        ),
        ({2: np.ones((7, 6))}, ValueError, r"w_up must have shape \(F, D\)=\(7, 5\), got \(7, 6\)"),
        ({2: np.ones((1, 5))}, ValueError, r"w_up must have shape \(F, D\)=\(7, 5\), got \(1, 5\)"),
        (
            {3: np.ones((5, 6))},
            ValueError,
            r"w_down must have shape \(D, F\)=\(5, 7\), got \(5, 6\)",
        ),
        ({0: np.ones((2, 3, 5), dtype=int)}, TypeError, "x must be float32 or wider"),
    ],
)
def test_errors(change: dict[int, np.ndarray], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ffn_forward(*[change.get(i, x) for i, x in enumerate(inputs()[:4])])


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """An overflow in any of the four products stays visible in y and in the gradients made of it;
    underflow errs by less than float32's smallest normal number."""
    w, w_down = np.ones((3, 2), np.float32), np.ones((2, 3), np.float32)
    x = np.ones((1, 2), np.float32)
    for scale in (1e25, 3e38):
        y, saved = ffn_forward(scale * x, w, w, w_down)
        assert not np.isfinite(y).any()
        assert not np.isfinite(ffn_backward(x, saved)[3]).any()  # dw_down, a product with hidden
    _, saved = ffn_forward(np.float32(1e25) * x, w, w, w_down)
    dx = ffn_backward(x, saved)[0]  # made without hidden: right
    np.testing.assert_allclose(dx, np.full((1, 2), 3 * 2 * 4e25), rtol=1e-6)
    y, saved = ffn_forward(np.float32(1e-30) * x, w, w, w_down)
    assert np.abs(y).max() < np.finfo(np.float32).tiny  # 6e-60
    np.testing.assert_allclose(ffn_backward(x, saved)[0], np.full((1, 2), 1.2e-29), rtol=1e-6)
