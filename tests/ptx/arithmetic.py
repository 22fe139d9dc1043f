"""Floating-point arithmetic of PTX on arrays: one rounding where PTX has one, approximations with their error.

A fused multiply-add in f32 is the exact product in float64 plus the addend, rounded to odd where the double rounding
could show, then to float32. In f64 it is the error-free transforms of Boldo and Melquiond ("Emulation of FMA and
correctly rounded sums", 2008), with rational numbers where those could overflow or underflow.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

Array = np.ndarray
TINY = 2.0**-126


def flush(x: Array) -> Array:
    """.ftz: float32 subnormals become zeros of their sign."""
    return np.where(np.abs(x) < np.float32(TINY), np.copysign(np.float32(0), x), x)


def saturate(x: Array) -> Array:
    """.sat: [0, 1], NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding lost (Knuth)."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a · b rounded, and what the rounding lost (Dekker, Veltkamp's split of 27 bits)."""
    p = a * b
    high = [(x * 134217729.0) - (x * 134217729.0 - x) for x in (a, b)]
    low = [a - high[0], b - high[1]]
    return p, low[0] * low[1] - (((p - high[0] * high[1]) - low[0] * high[1]) - high[0] * low[1])


def to_odd(s: Array, lost: Array) -> Array:
    """The float64 rounding-to-odd of s + lost, where s is that sum rounded to nearest."""
    bits = np.ascontiguousarray(s).view(np.int64)
    move = (lost != 0) & np.isfinite(s) & (bits & 1 == 0)
    return np.where(move, np.where((lost > 0) == (s > 0), bits + 1, bits - 1), bits).view(np.float64)


def fma32(a: Array, b: Array, c: Array, down: bool = False) -> Array:
    """a · b + c of float32 arrays, rounded once: to nearest, or down (.rm)."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    s = np.atleast_1d(product + addend)
    tie = s.view(np.int64) & 0x1FFFFFFF == 0x10000000
    if not down and not (tie | (np.abs(s) < TINY) & (s != 0)).any():
        return s.astype(np.float32)
    s = to_odd(*two_sum(product, addend))
    nearest = s.astype(np.float32)
    return np.where(down & (nearest > s), np.nextafter(nearest, np.float32(-np.inf)), nearest)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a · b + c of float64 arrays, rounded once."""
    a, b, c = np.broadcast_arrays(a, b, c)
    result = a * b + c
    hard = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)
    size = np.abs(a * b)
    easy = (size > 1e-200) & (size < 1e250) & (np.abs(c) < 1e250) & ((np.abs(c) > 1e-200) | (c == 0))
    easy &= (np.abs(a) < 1e200) & (np.abs(b) < 1e200) & hard
    high, low = two_product(a, b)
    t, lost = two_sum(c, low)
    v, rest = two_sum(high, t)
    result = np.where(easy, v + to_odd(*two_sum(lost, rest)), result)
    for i in np.flatnonzero(hard & ~easy):
        exact = Fraction(a.flat[i]) * Fraction(b.flat[i]) + Fraction(c.flat[i])
        try:
            result.flat[i] = float(exact) if exact else result.flat[i]
        except OverflowError:
            result.flat[i] = np.inf if exact > 0 else -np.inf
    return result


def to_bf16(x: Array) -> Array:
    """float32 to the bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    bits = bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
    return np.where(np.isnan(x), 0x7FFF, bits >> np.uint64(16)).astype(np.uint16)


def maximum(a: Array, b: Array) -> Array:
    """−0 < +0; a NaN yields to a number."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def noise(x: Array, seed: int) -> Array:
    """In [−1, 1], a fixed function of the bits of x and the seed: hardware errs the same way each time."""
    bits = np.ascontiguousarray(x.astype(np.float64)).view(np.uint64) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits.astype(np.float64) / 2.0**63 - 1


# Bounds of the approximations: PTX ISA, "Floating Point Instructions".


def exponential(x: Array, seed: int) -> Array:
    """ex2.approx.f32: within 2^−22 relative, the rounding to float32 included; powers of 2 are exact."""
    exact = np.exp2(x.astype(np.float64))
    bound = np.where(x == np.rint(x), 0, (2**-22 - 2**-24) * exact)
    return np.where(np.isfinite(exact), exact + bound * noise(x, seed), exact).astype(np.float32)


def reciprocal(x: Array, seed: int) -> Array:
    """rcp.approx.ftz.f64: about 20 bits, and a lower word of zero."""
    close = 1 / x * (1 + 2.0**-21 * noise(x, seed))
    return (close.view(np.uint64) & np.uint64(0xFFFFFFFF << 32)).view(np.float64)
