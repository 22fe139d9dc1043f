"""The checker's own tests: what it accepts, what it refuses, and the parts it is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from refimpl.check import (
    Report,
    TensorResult,
    check,
    finite_difference,
    full_jacobian,
    has_longdouble,
)
from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.check.dual import Dual, digits_context, dual_array, tangents, values
from refimpl.check.rules import Pair, contract, exact_digits

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(5, 4))
Pass = Callable[..., Any]


def forward(x: Any, w: Any) -> tuple[Any, Any]:
    """A user's pair: y = exp(x) wᵀ."""
    e = np.exp(x)
    return e @ w.T, (e, w)


def backward(dy: Any, saved: Any) -> tuple[Any, Any]:
    e, w = saved
    return (dy @ w) * e, dy.reshape(-1, dy.shape[-1]).T @ e.reshape(-1, e.shape[-1])


def test_five_lines_for_a_user() -> None:
    """The promise of the package's docstring."""
    report = check(forward, backward, (X, W))
    assert report.ok
    assert [(t.tensor, t.shape) for t in report.tensors] == [("x", (2, 3, 4)), ("w", (5, 4))]
    assert all("PASS" in line for line in str(report).splitlines()[1:])


def test_digits() -> None:
    report = check(forward, backward, (X, W), digits=60)
    assert report.ok
    assert all(t.digits is not None and t.digits >= 59 for t in report.tensors)


def test_float32() -> None:
    """In float32 there are no differences, and the noise is that of float32."""
    report = check(forward, backward, (X, W), dtype=np.float32)
    assert report.ok
    assert all(
        t.difference is None and t.sharpness is not None and t.sharpness > 1e-9
        for t in report.tensors
    )


def test_functions_of_float64_alone() -> None:
    """A pair that only takes float64 can be checked by contract and differences."""

    def only64(x: np.ndarray, w: np.ndarray) -> tuple[Any, Any]:
        if x.dtype != np.float64:
            raise TypeError("float64 only")
        return forward(x, w)

    with pytest.raises(TypeError, match="float64 only"):
        check(only64, backward, (X, W))
    report = check(
        only64, backward, (X, W), rules=("contract", "differences"), contract_dtypes=(np.float64,)
    )
    assert report.ok
    assert all(t.noise is None for t in report.tensors)


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
    ("wrong", "tensor"),
    [
        (lambda dy, s: (-backward(dy, s)[0], backward(dy, s)[1]), "x"),
        (lambda dy, s: (backward(dy, s)[0], backward(dy, s)[1] * (1 + 1e-7)), "w"),
        (lambda dy, s: (backward(dy, s)[0], 0 * backward(dy, s)[1]), "w"),
        (lambda dy, s: (backward(dy, s)[0] * math.nan, backward(dy, s)[1]), "x"),
        (lambda dy, s: (backward(dy, s)[0] * math.inf, backward(dy, s)[1]), "x"),
    ],
    ids=["sign", "1e-7", "zero", "nan", "inf"],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_wrong_numbers_fail_and_are_named(wrong: Pass, tensor: str) -> None:
    report = check(forward, wrong, (X, W))
    assert not report.ok
    assert [t.tensor for t in report.tensors if t.verdict == "FAIL"] == [tensor]


def test_wrong_in_float64_alone_is_inconclusive() -> None:
    """An error that longdouble does not have buys its own tolerance; the bound on the sharpness
    refuses it."""

    def noisy(dy: Any, saved: Any) -> Any:
        dx, dw = backward(dy, saved)
        return dx * (1 + 1e-10 * (dx.dtype == np.float64)), dw

    report = check(forward, noisy, (X, W))
    assert [t.verdict for t in report.tensors] == ["INCONCLUSIVE", "PASS"]
    assert not report.ok
    assert report.tensors[0].difference is not None
    assert report.tensors[0].difference <= 1e-8  # differences alone would have let it pass


def test_exactly_zero_gradient_needs_zero_differences() -> None:
    """An input that does nothing has a zero gradient; a zero gradient of an input that does
    something fails."""

    def ignores(x: Any, w: Any) -> tuple[Any, Any]:
        return forward(x, w)[0], (x, w)

    def zero(dy: Any, saved: Any) -> Any:
        return 0 * saved[0], 0 * saved[1]

    assert not check(ignores, zero, (X, W)).ok
    assert check(lambda x: (0 * x, x), lambda dy, x: 0 * dy, (X,)).ok


def test_replay_freezes_choices() -> None:
    """A function with a jump is checked on the branch that the first run took."""

    def jump(x: Any, *, up: Any = None) -> tuple[Any, Any]:
        up = np.round(5000 * x.real) % 2 == 0 if up is None else up
        return np.where(up, x + 1, x * x), (x, up)

    def jump_backward(dy: Any, saved: Any) -> Any:
        x, up = saved
        return np.where(up, dy, 2 * x * dy)

    assert check(jump, jump_backward, (X,), replay=lambda y: {"up": np.round(5000 * X) % 2 == 0}).ok
    assert not check(jump, jump_backward, (X,)).ok  # differences straddle the jumps


def test_none_inputs_and_several_outputs() -> None:
    def two(x: Any, extra: Any, w: Any) -> tuple[Any, Any]:
        return (x @ w.T, 2 * x, np.arange(3)), (x, w)

    def two_backward(dy: Any, saved: Any) -> Any:
        (da, db), (x, w) = dy, saved
        return da @ w + 2 * db, None, da.reshape(-1, 5).T @ x.reshape(-1, 4)

    report = check(two, two_backward, (X, None, W))
    assert report.ok
    assert [t.tensor for t in report.tensors] == ["x", "w"]


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (
            (X.astype(np.float32), W),
            {},
            TypeError,
            r"inputs\[0\] must be a float64 NumPy array or None, got float32",
        ),
        (([1.0], W), {}, TypeError, r"inputs\[0\] must be a float64 NumPy array"),
        (
            (X, W),
            {"dtype": np.float16},
            ValueError,
            "dtype must be float64 or float32, got float16",
        ),
        (
            (X, W),
            {"rules": ("differences", "hope")},
            ValueError,
            "rules must be of contract, differences, noise",
        ),
    ],
)
def test_bad_arguments(inputs: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check(forward, backward, inputs, **options)


def test_what_a_forward_must_return() -> None:
    with pytest.raises(TypeError, match=r"forward must return \(y, saved\), got ndarray"):
        check(lambda x: x * 2, lambda dy, s: dy, (X,))
    with pytest.raises(
        TypeError, match="y must be a floating-point array, or a tuple with at least one, got list"
    ):
        check(lambda x: ([x * 2], None), lambda dy, s: dy, (X,))


def test_a_forward_that_is_not_analytic_gets_a_hint() -> None:
    """abs is right by differences and has no complex derivative: not PASS, but the report says
    why."""
    report = check(
        lambda x: (np.abs(x), np.sign(np.real(x))),
        lambda dy, s: dy * s,
        (X,),
        contract_dtypes=(np.float64,),
    )
    assert not report.ok
    assert "differences agree: is the forward analytic" in report.tensors[0].reasons[0]
    signs = check(
        lambda x: (np.abs(x), np.sign(np.real(x))),
        lambda dy, s: dy * s,
        (X,),
        rules=("contract", "differences"),
    )
    assert signs.ok


def test_inputs_must_be_a_tuple() -> None:
    with pytest.raises(
        TypeError, match=r"inputs must be a tuple of arrays, got an array: write \(x,\)"
    ):
        check(forward, backward, X)  # type: ignore[arg-type]


def test_cotangents_are_no_inputs() -> None:
    """Inputs that a caller draws from the same seed are not drawn again as cotangents or
    directions."""
    x = np.random.default_rng(0).normal(size=(3, 4))
    report = check(lambda x: (2 * x, x), lambda dy, x: 2 * x, (x,), seed=0)
    assert not report.ok


def test_choices_made_and_replayed_must_agree() -> None:
    """A pair that only works when its choices are given is found out."""

    def best(x: Any, *, order: Any = None) -> tuple[Any, Any]:
        found = np.argsort(-np.real(x), axis=-1) if order is None else order
        kept = found if order is not None else found[..., ::-1]
        return (np.take_along_axis(x, found, axis=-1), found), (kept, x)

    def best_backward(dy: Any, saved: Any) -> Any:
        order, x = saved
        dx = 0 * x
        np.put_along_axis(dx, order, dy[0], axis=-1)
        return dx

    report = check(best, best_backward, (X,), replay=lambda y: {"order": y[1]})
    assert report.faults == [
        "pair: gradients differ between choices made and the same choices replayed"
    ]


def test_unlucky_cotangents_are_drawn_again() -> None:
    """A single number that a sum over rows nearly cancels needs another cotangent; an error in
    float64 alone does not get away with one."""
    x, w = np.random.default_rng(1).normal(size=(2, 3, 1)), np.array([0.7])

    def scale(x: Any, w: Any) -> tuple[Any, Any]:
        return x * w, (x, w)

    def sometimes(dy: Any, saved: Any) -> Any:
        x, w = saved
        wrong = 1e-9 if dy.dtype == np.float64 and dy.sum() < 0 else 0
        return dy * w, np.sum(dy * x, axis=(0, 1)) * (1 + wrong)

    verdicts = [
        check(scale, sometimes, (x, w), seed=seed, rules=("noise",)).ok for seed in range(20)
    ]
    assert 4 <= verdicts.count(False) <= 16  # wrong whenever the first cotangent shows it


def test_merge_keeps_the_worst() -> None:
    report = Report([TensorResult("op", "x", (1,), 1e-12, 1e-3, 1e-15, 50.0)])
    report.merge(
        Report(
            [TensorResult("op", "x", (2,), 1e-10, 1e-4, 1e-14, 45.0), TensorResult("op", "w", (2,))]
        )
    )
    x = report.tensors[0]
    assert (x.difference, x.noise, x.sharpness, x.digits, x.verdict) == (
        1e-10,
        1e-3,
        1e-14,
        45.0,
        "PASS",
    )
    assert report.ok
    assert len(report.tensors) == 2
    bad = TensorResult("op", "x", (1,), math.nan)
    bad.fault("INCONCLUSIVE", "blurred")
    report.merge(Report([bad], ["fault"]))
    assert math.isnan(report.tensors[0].difference or 0)
    assert report.tensors[0].verdict == "INCONCLUSIVE"
    assert not report.ok
    assert not Report([]).ok  # nothing checked is nothing shown


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


def test_dual_arithmetic() -> None:
    """Derivatives of the elementary operations, against closed forms, to 50 digits."""
    with digits_context(50):
        x = Dual(Decimal(3), Decimal(1))
        cases: list[tuple[Dual, Decimal, Decimal]] = [
            (x * x + 2 * x - 1, Decimal(14), Decimal(8)),
            (1 - x, Decimal(-2), Decimal(-1)),
            (1 / x, 1 / Decimal(3), -1 / Decimal(9)),
            (x / 2, Decimal("1.5"), Decimal("0.5")),
            (x.exp(), Decimal(3).exp(), Decimal(3).exp()),
            (x.log(), Decimal(3).ln(), 1 / Decimal(3)),
            (x.sqrt(), Decimal(3).sqrt(), 1 / (2 * Decimal(3).sqrt())),
            (-x, Decimal(-3), Decimal(-1)),
            (x + 0.5, Decimal("3.5"), Decimal(1)),
        ]
        for result, value, tangent in cases:
            assert abs(result.value - value) <= Decimal("1e-49") * abs(value)
            assert abs(result.tangent - tangent) <= Decimal("1e-49") * max(abs(tangent), 1)
    assert float(x) == 3.0
    assert repr(x) == "Dual(3, 1)"
    for operation in ("__add__", "__sub__", "__rsub__", "__mul__", "__truediv__", "__rtruediv__"):
        assert getattr(x, operation)("text") is NotImplemented


def test_dual_arrays() -> None:
    d = dual_array(np.array([1.0, 2.0]), np.array([1.0, -1.0]))
    y = (np.exp(d) * d).sum()
    assert abs(float(values(y)[0]) - (math.e + 2 * math.e**2)) <= 1e-14
    assert abs(float(tangents(y)[0]) - (2 * math.e - 3 * math.e**2)) <= 1e-13


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


def test_without_longdouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.check.checker.has_longdouble", lambda: False)
    assert {t.verdict for t in check(forward, backward, (X, W)).tensors} == {"INCONCLUSIVE"}
    assert check(forward, backward, (X, W), digits=50).ok
