"""Floating-point arithmetic rounds once, and approximations err within their bound."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ptx import run
from ptx.arithmetic import fma, fma_down
from ptx.parse import DTYPES
from ptx.written import INF, NAN, kernel


def exact_round(value: Fraction, dtype: type, mode: str) -> float:
    """The number of dtype that `mode` chooses, by neighbours."""
    with np.errstate(all="ignore"):
        low = dtype(float(value))
        while Fraction(float(low)) > value:
            low = np.nextafter(low, dtype(-INF))
        high = np.nextafter(low, dtype(INF))
        while Fraction(float(high)) <= value:
            low, high = high, np.nextafter(high, dtype(INF))
    below, above = value - Fraction(float(low)), Fraction(float(high)) - value
    if below == 0 or mode == "rm":
        return low
    bits = low.view(f"u{low.itemsize}")
    return low if below < above or (below == above and bits & 1 == 0) else high


@pytest.mark.parametrize(
    ("dtype", "mode"), [(np.float32, "rn"), (np.float32, "rm"), (np.float64, "rn")]
)
def test_fused_multiply_add_rounds_once(dtype: type, mode: str) -> None:
    """Against rational arithmetic: random, cancelling, ties and almost ties, subnormal results."""
    rng = np.random.default_rng(3)
    digits = np.finfo(dtype).nmant
    small = 2.0 ** (np.finfo(dtype).minexp - 1)
    a, b, c = (rng.standard_normal(400).astype(dtype) for _ in range(3))
    c[:100] = -(a * b)[:100]
    a[100:200], b[100:200] = 1 + rng.integers(0, 8, 100) * 2.0**-digits, 1 + 2.0**-digits
    c[100:200] = rng.choice(
        [2.0 ** (-digits - 1), -(2.0 ** (-digits - 1)), 2.0 ** (digits + 1)], 100
    )
    c[200:300] = 1
    a[200:300], b[200:300] = (
        2.0 ** (-digits - 1),
        1 + rng.choice([0, 2.0**-digits, -(2.0**-digits)], 100),
    )
    a[300:] = a[300:] * small
    b[300:] = b[300:]
    c[300:] = c[300:] * small
    got = (fma_down if mode == "rm" else fma)(a, b, c)
    for x, y, z, g in zip(*(v.tolist() for v in (a, b, c)), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert g == exact_round(exact, dtype, mode), (x, y, z)


def test_fma_beyond_the_range() -> None:
    """Products that overflow or vanish, infinities, NaN and signed zeros."""
    big, a = 1e300, np.array([1e200, 1e200, INF, 0.0, -0.0, 5e-324, NAN])
    with np.errstate(all="ignore"):
        got = fma(
            a,
            np.array([1e200, 1e108, 2, INF, 1, 0.5, 1]),
            np.array([-big, -np.finfo(float).max, -1, 1, -0.0, 0, 1]),
        )
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(
            got, [INF, 1e308 - np.finfo(float).max, INF, NAN, -0.0, 0, NAN]
        )
    assert np.signbit(got[4])


@pytest.mark.parametrize(
    ("opcode", "function", "bound"),
    [
        ("ex2.approx.f32", np.exp2, 2**-22),
        ("rcp.approx.ftz.f64", np.reciprocal, 2**-19),
        ("rcp.approx.ftz.f32", np.reciprocal, 2**-23),
    ],
)
def test_approximations_err_within_their_bound(opcode: str, function: Any, bound: float) -> None:
    """Not exact, not beyond the bound, the same for the same bits, and different for another
    seed."""
    type = opcode.split(".")[-1]
    x = np.random.default_rng(5).uniform(0.01, 3, 512).astype(DTYPES[type])
    f, size = ("fd", 8) if type == "f64" else ("f", 4)
    body = f"""mul.wide.u32 %rd9, %r0, {size}; add.s64 %rd8, %rd9, %rd1; ld.global.{type} %{f}1, [%rd8];
    {opcode} %{f}2, %{f}1; add.s64 %rd8, %rd9, %rd2; st.global.{type} [%rd8], %{f}2;"""
    results = []
    for seed in (0, 0, 1):
        out = np.zeros_like(x)
        run(kernel(body, 2), "k", 1, 512, [x, out], seed=seed)
        results.append(out)
    exact = function(x.astype(np.float64))
    error = np.abs(results[0] - exact) / exact
    assert 0.25 * bound < error.max() <= bound
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()
