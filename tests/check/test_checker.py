"""What the checker accepts and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from refimpl.check import Report, TensorResult, check

from check.examples import Pass, W, X, backward, forward


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
            "rules must be among contract, differences, noise",
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


def test_without_longdouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.check.checker.has_longdouble", lambda: False)
    assert {t.verdict for t in check(forward, backward, (X, W)).tensors} == {"INCONCLUSIVE"}
    assert check(forward, backward, (X, W), digits=50).ok
