"""Dual numbers over Python's decimals: exact derivatives to as many digits as you ask for, on any
platform.

A dual number a + b ε with ε² = 0 carries a value and its derivative in one direction. Arrays of
them (dtype object) go through the ops unchanged, since NumPy calls the elements' own operators and
their ``exp``, ``log``, ``log1p`` and ``sqrt``. The precision is that of the current decimal
context; `digits_context` sets it.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

__all__ = ["Dual", "digits_context", "dual_array", "tangents", "values"]

GUARD = 15  # digits computed beyond those asked for

ZERO = Decimal(0)


def digits_context(digits: int) -> Any:
    """A context manager in which duals are computed to ``digits`` digits and a few guard digits."""
    return decimal.localcontext(
        decimal.Context(prec=digits + GUARD, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
    )


class Dual:
    """value + tangent ε; ints and floats mix in as exact constants."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Decimal, tangent: Decimal = ZERO) -> None:
        self.value, self.tangent = value, tangent

    def __add__(self, other: Any) -> Any:
        o = _lift(other)
        return NotImplemented if o is None else Dual(self.value + o.value, self.tangent + o.tangent)

    def __sub__(self, other: Any) -> Any:
        o = _lift(other)
        return NotImplemented if o is None else Dual(self.value - o.value, self.tangent - o.tangent)

    def __rsub__(self, other: Any) -> Any:
        o = _lift(other)
        return NotImplemented if o is None else o - self

    def __mul__(self, other: Any) -> Any:
        o = _lift(other)
        if o is None:
            return NotImplemented
        if not self.tangent and not o.tangent:
            return Dual(self.value * o.value)
        return Dual(self.value * o.value, self.tangent * o.value + self.value * o.tangent)

    def __truediv__(self, other: Any) -> Any:
        o = _lift(other)
        if o is None:
            return NotImplemented
        quotient = self.value / o.value
        return Dual(quotient, (self.tangent - quotient * o.tangent) / o.value)

    def __rtruediv__(self, other: Any) -> Any:
        o = _lift(other)
        return NotImplemented if o is None else o / self

    __radd__, __rmul__ = __add__, __mul__

    def __pow__(self, exponent: Any) -> Any:
        if not isinstance(exponent, int):
            return NotImplemented
        power = self.value ** (exponent - 1)
        return Dual(power * self.value, exponent * power * self.tangent)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.tangent)

    def exp(self) -> Dual:
        e = self.value.exp()
        return Dual(e, e * self.tangent)

    def log(self) -> Dual:
        return Dual(self.value.ln(), self.tangent / self.value)

    def expm1(self) -> Dual:
        return self.exp() - 1  # type: ignore[no-any-return]

    def log1p(self) -> Dual:
        return (1 + self).log()  # type: ignore[no-any-return]

    def sqrt(self) -> Dual:
        root = self.value.sqrt()
        return Dual(root, self.tangent / (2 * root))

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        return f"Dual({self.value}, {self.tangent})"


def _lift(x: Any) -> Dual | None:
    if isinstance(x, Dual):
        return x
    return Dual(Decimal(x)) if isinstance(x, (int, float, Decimal)) else None


def dual_array(x: np.ndarray, direction: np.ndarray | None = None) -> np.ndarray:
    """Real ``x``, of any shape, as duals that move in ``direction``, of any shape that is that of
    ``x`` (None: they stand still)."""
    out = np.empty(x.shape, dtype=object)
    moves = np.zeros(x.shape) if direction is None else direction
    out.reshape(-1)[:] = [
        Dual(Decimal(float(a)), Decimal(float(v))) for a, v in zip(x.flat, moves.flat, strict=True)
    ]
    return out


def _parts(x: Any, part: Callable[[Dual], Decimal]) -> list[Decimal]:
    lifted = (_lift(element) for element in np.asarray(x, dtype=object).flat)
    return [part(element) for element in lifted if element is not None]


def values(x: Any) -> list[Decimal]:
    """The values of all duals in ``x``, an array or a single one."""
    return _parts(x, lambda d: d.value)


def tangents(x: Any) -> list[Decimal]:
    """The tangents of all duals in ``x``, an array or a single one."""
    return _parts(x, lambda d: d.tangent)
