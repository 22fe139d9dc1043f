"""Dual numbers over decimals: derivatives to 50 digits."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np

from refimpl.check.dual import Dual, digits_context, dual_array, tangents, values


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
