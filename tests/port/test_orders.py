"""Sums in another order: the same function, other bits."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.port.orders import shuffled

RNG = np.random.default_rng(0)


def test_sums_run_in_another_order() -> None:
    x, w = RNG.normal(size=(4, 300)), RNG.normal(size=(300, 5))
    own = shuffled(1)
    a, b = own(x), own(w)
    xp = a.__array_namespace__()
    for mine, plain in (
        (xp.matmul(a, b), x @ w),
        (xp.sum(a, axis=1), x.sum(axis=1)),
        (xp.sum(a), x.sum()),
        (xp.mean(a, axis=1, keepdims=True), x.mean(axis=1, keepdims=True)),
    ):
        assert np.shape(mine) == np.shape(plain)
        assert not np.array_equal(mine, plain)
        assert np.allclose(mine, plain, rtol=1e-12, atol=1e-12)


def test_a_seed_is_an_order_and_none_is_numpys() -> None:
    x = RNG.normal(size=(3, 200)).astype(np.float32)

    def total(seed: int) -> np.ndarray:
        a = shuffled(seed)(x)
        return np.asarray(a.__array_namespace__().sum(a, axis=1))

    assert np.array_equal(total(3), total(3))
    assert not np.array_equal(total(3), total(4))
    assert type(shuffled(0)(x)) is np.ndarray
    assert np.array_equal(total(0), x.sum(axis=1))


@pytest.mark.parametrize("op", CASES)
def test_every_op_runs_on_them(op: str) -> None:
    """And gives the same to rounding, in its own type."""
    case, pair = CASES[op](RandomDraw(1)), pair_of(op)
    own = shuffled(5)
    floats = {
        n for n, x in case.kwargs.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"
    }
    given = {n: own(x) if n in floats else x for n, x in case.kwargs.items()}
    y, _ = pair.forward(*(None if x is None else own(x) for x in case.inputs), **given)
    wanted, _ = pair.forward(*case.inputs, **case.kwargs)
    members = zip(*(x if isinstance(x, tuple) else (x,) for x in (y, wanted)), strict=True)
    for mine, right in members:
        assert np.asarray(mine).dtype == np.asarray(right).dtype
        assert np.allclose(mine, right, rtol=1e-10, atol=1e-12)
