"""The rules, each by itself: contract, finite differences, Jacobians, exact digits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from refimpl.check import check, finite_difference, full_jacobian, has_longdouble
from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.check.rules import Pair, contract, exact_digits

from check.examples import RNG, Pass, W, X, backward, forward

CALLS = [0]
BUFFERS: dict[Any, np.ndarray] = {}


def _mutates_saved(dy: Any, saved: Any) -> Any:
    grads = backward(dy, saved)
    saved[0][...] *= 2
    return grads


def _reuses_a_buffer(dy: Any, saved: Any) -> Any:
    dx, dw = backward(dy, saved)
    buffer = BUFFERS.setdefault(dx.dtype, np.empty_like(dx))
    buffer[...] = dx
    return buffer, dw


def _times_in_float32(factor: float, grads: Any) -> Any:
    return tuple(g * factor if g.dtype == np.float32 else g for g in grads)


def _is_random(dy: Any, saved: Any) -> Any:
    CALLS[0] += 1
    dx, dw = backward(dy, saved)
    return dx * (1 + CALLS[0] * np.finfo(dx.dtype).eps), dw


BROKEN: list[tuple[str, Pass, str]] = [
    ("too few", lambda dy, s: (backward(dy, s)[0],), "must return 2 gradients"),
    ("too many", lambda dy, s: (*backward(dy, s), None), "must return 2 gradients"),
    (
        "shape",
        lambda dy, s: (backward(dy, s)[0], backward(dy, s)[1].T),
        r"must be float64 \(5, 4\)",
    ),
    (
        "dtype",
        lambda dy, s: tuple(g.astype(np.float32) for g in backward(dy, s)),
        "must be float64",
    ),
    (
        "float64 from float32",
        lambda dy, s: tuple(g.astype(np.float64) for g in backward(dy, s)),
        "must be float32",
    ),
    (
        "none",
        lambda dy, s: (backward(dy, s)[0], None),
        "gradient 1 must be None exactly if the input is, got None",
    ),
    ("returns its input", lambda dy, s: (backward(dy, s)[0], s[1]), "shares memory with"),
    (
        "one array twice",
        lambda dy, s: (lambda g: (g, g[0]))(backward(dy, s)[0]),
        "shares memory with another gradient",
    ),
    ("random", _is_random, "differs between two calls"),
    ("saved", _mutates_saved, "saved was changed"),
    ("one buffer", _reuses_a_buffer, "is the same memory in two calls"),
    ("raises", lambda dy, s: dy + np.ones(7), "it raised ValueError"),
    (
        "float32 alone",
        lambda dy, s: tuple(g * (3 if g.dtype == np.float32 else 1) for g in backward(dy, s)),
        "in float32",
    ),
    (
        "nan in float32",
        lambda dy, s: tuple(g * (np.nan if g.itemsize == 4 else 1) for g in backward(dy, s)),
        "in float32",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_contract(wrong: Pass, message: str) -> None:
    faults = contract(Pair(forward, wrong), (X, W), [RNG.normal(size=(2, 3, 5))])
    assert any(re.search(message, fault) for fault in faults), faults


def test_contract_of_the_forward() -> None:
    """A forward that writes into its input, returns its input, changes an argument, or returns the
    wrong type."""

    def in_place(x: Any, w: Any) -> tuple[Any, Any]:
        np.exp(x, out=x)
        return x @ w.T, (x, w)

    faults = contract(Pair(in_place, backward), (X, W), [RNG.normal(size=(2, 3, 5))])
    assert any("it raised ValueError: output array is read-only" in fault for fault in faults)

    def returns_input(x: Any, w: Any) -> tuple[Any, Any]:
        return x, (x, w)

    faults = contract(
        Pair(returns_input, lambda dy, s: (1 * dy, 0 * s[1])), (X, W), [np.ones(X.shape)]
    )
    assert "output 0 shares memory with an input" in faults

    def clears(x: Any, w: Any, *, ids: Any) -> tuple[Any, Any]:
        y = forward(x, w)
        ids[:] = 0
        return y

    faults = contract(Pair(clears, backward, {"ids": np.arange(3)}), (X, W), [np.ones((2, 3, 5))])
    assert "an argument that is not differentiable was changed" in faults

    def widens(x: Any, w: Any) -> tuple[Any, Any]:
        y, saved = forward(x, w)
        return y.astype(np.float64), saved

    assert any(
        "output 0 must be float32" in f
        for f in contract(Pair(widens, backward), (X, W), [np.ones((2, 3, 5))])
    )


def test_contiguity() -> None:
    """A pair that reads memory in its own order gets another result from a view."""

    def raw(dy: Any, saved: Any) -> Any:
        dx, dw = backward(dy, saved)
        return dx * (1.0 if dy.flags.c_contiguous else 1.5), dw

    assert any("strided" in f for f in contract(Pair(forward, raw), (X, W), [np.ones((2, 3, 5))]))


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda h: np.sin(1 + h), math.cos(1)),
        (lambda h: np.exp(3 * h), 3),
        (lambda h: 1 / (2 + h), -0.25),
        (lambda h: h**3 + 5 * h, 5),
        (lambda h: 0 * h, 0),
        (lambda h: 1e6 * np.tanh(h - 0.3), 1e6 / math.cosh(0.3) ** 2),
    ],
)
def test_finite_difference(function: Callable[[float], Any], slope: float) -> None:
    (d,) = finite_difference(lambda h: [np.array([function(h)])])
    assert abs(d[0] - slope) <= 2e-11 * max(abs(slope), 1)


@pytest.mark.parametrize("op", CASES)
def test_full_jacobian(op: str) -> None:
    """At tiny sizes every entry of every Jacobian, by differences against the backward: an error is
    located."""
    case = CASES[op](RandomDraw(3))
    pair = Pair(*pair_of(op), case.kwargs)
    if case.replay is not None:
        pair = Pair(
            *pair_of(op),
            case.kwargs | dict(case.replay(pair.forward(*case.inputs, **case.kwargs)[0])),
        )
    for i, x in enumerate(case.inputs):
        if x is not None:
            by_differences, by_backward = full_jacobian(pair, case.inputs, i)
            assert by_differences.shape == by_backward.shape
            assert np.max(np.abs(by_differences - by_backward)) <= 1e-8 * np.max(
                np.abs(by_backward)
            )


def test_full_jacobian_locates_an_error() -> None:
    def wrong(dy: Any, saved: Any) -> Any:
        dx, dw = backward(dy, saved)
        dw[3, 2] *= 1.001
        return dx, dw

    a, b = full_jacobian(Pair(forward, wrong), (X, W), 1)
    assert set(np.nonzero(np.abs(a - b) > 1e-6)[1]) == {3 * 4 + 2}


def test_exact_digits_see_a_tiny_error() -> None:
    """An error of 1e-30 is far below what any floating-point check can see."""
    tiny = Decimal("1e-30")

    def wrong(dy: Any, saved: Any) -> Any:
        dx, dw = backward(dy, saved)
        return (dx * (1 + tiny) if dx.dtype == object else dx), dw

    directions = [RNG.normal(size=X.shape), RNG.normal(size=W.shape)]
    dx, dw = exact_digits(
        Pair(forward, wrong), (X, W), directions, [RNG.normal(size=(2, 3, 5))], 50
    )
    assert dx is not None
    assert dw is not None
    assert 28 <= dx <= 33
    assert dw >= 49
    assert check(forward, wrong, (X, W)).ok
    assert not check(forward, wrong, (X, W), digits=50).ok


def test_longdouble_is_wide_here() -> None:
    """The noise rule runs where longdouble is wider than float64; elsewhere the digits must be
    asked for."""
    assert has_longdouble() == (np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)
