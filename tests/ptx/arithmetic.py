"""Floating-point arithmetic of PTX on arrays: one rounding where PTX has one, approximations with their error.

A fused multiply-add in f32 is the exact product in float64 plus the addend, rounded to odd where the double rounding
could show, then to float32. In f64 it is the error-free transforms of Boldo and Melquiond ("Emulation of FMA and
correctly rounded sums", 2008), with rational numbers where those could overflow or underflow.
"""

from __future__ import annotations

from collections.abc import Callable
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


def directed(nearest: Array, exact: Array, mode: str) -> Array:
    """Turn a rounding to nearest into rz, rm or rp; `exact` compares like the exact value."""
    down = (nearest > exact) & ((mode == "rm") | ((mode == "rz") & (exact > 0)))
    up = (nearest < exact) & ((mode == "rp") | ((mode == "rz") & (exact < 0)))
    below = np.nextafter(nearest, nearest.dtype.type(-np.inf))
    return np.where(down, below, np.where(up, np.nextafter(nearest, nearest.dtype.type(np.inf)), nearest))


def narrow(x: Array, mode: str = "rn") -> Array:
    """float64 to float32."""
    nearest = x.astype(np.float32)
    return nearest if mode == "rn" else directed(nearest, x, mode)


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a · b + c of float32 arrays, rounded once."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    s = np.atleast_1d(product + addend)
    if mode == "rn":
        tie = s.view(np.int64) & 0x1FFFFFFF == 0x10000000
        if not (tie | (np.abs(s) < TINY) & (s != 0)).any():
            return s.astype(np.float32)
    s, lost = two_sum(product, addend)
    return narrow(to_odd(s, lost), mode)


def fma64(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a · b + c of float64 arrays, rounded once."""
    a, b, c = np.broadcast_arrays(a, b, c)
    result = a * b + c
    hard = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)
    size = np.abs(a * b)
    easy = (size > 1e-200) & (size < 1e250) & (np.abs(c) < 1e250) & ((np.abs(c) > 1e-200) | (c == 0))
    easy &= (np.abs(a) < 1e200) & (np.abs(b) < 1e200) & hard & (mode == "rn")
    high, low = two_product(a, b)
    t, lost = two_sum(c, low)
    v, rest = two_sum(high, t)
    result = np.where(easy, v + to_odd(*two_sum(lost, rest)), result)
    for i in np.flatnonzero(hard & ~easy):
        exact = Fraction(a.flat[i]) * Fraction(b.flat[i]) + Fraction(c.flat[i])
        result.flat[i] = round_fraction(exact, mode) if exact else result.flat[i]
    return result


def round_fraction(exact: Fraction, mode: str) -> float:
    try:
        nearest = float(exact)
    except OverflowError:
        nearest = np.inf if exact > 0 else -np.inf
    if mode == "rn":
        return nearest
    known = (
        Fraction(nearest) if np.isfinite(nearest) else (Fraction(2) ** 1025 if nearest > 0 else -(Fraction(2) ** 1025))
    )
    if known > exact and (mode == "rm" or (mode == "rz" and exact > 0)):
        return float(np.nextafter(nearest, -np.inf))
    if known < exact and (mode == "rp" or (mode == "rz" and exact < 0)):
        return float(np.nextafter(nearest, np.inf))
    return nearest


def from_half(bits: Array, type: str) -> Array:
    """f16 or bf16 bits to float32, exactly."""
    if type == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_half(x: Array, type: str, mode: str = "rn") -> Array:
    """float32 or float64 to f16 or bf16 bits, rounded once (rn or rz)."""
    if type == "f16":
        nearest = x.astype(np.float16)
        return (nearest if mode == "rn" else directed(nearest, x, mode)).view(np.uint16)
    if x.dtype == np.float64:
        nearest = x.astype(np.float32)
        x = to_odd32(nearest, x)
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    if mode == "rn":
        bits = bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
    return np.where(np.isnan(x), 0x7FFF, bits >> np.uint64(16)).astype(np.uint16)


def to_odd32(nearest: Array, x: Array) -> Array:
    bits = nearest.view(np.int32)
    move = (nearest != x) & np.isfinite(nearest) & (bits & 1 == 0)
    return (
        np.where(move, np.where((x > nearest) == (x > 0), bits + 1, bits - 1), bits).astype(np.int32).view(np.float32)
    )


def fma_half(a: Array, b: Array, c: Array, type: str) -> Array:
    """a · b + c on f16 or bf16 bits, rounded once."""
    product = from_half(a, type).astype(np.float64) * from_half(b, type)
    return to_half(to_odd(*two_sum(product, from_half(c, type).astype(np.float64))), type)


ROUND: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, dtype: type, mode: str, wide: bool) -> Array:
    """cvt from floating point: rounded, clamped; NaN is 0, or the top bit where a 64-bit type is involved."""
    limits = np.iinfo(dtype)
    whole = ROUND[mode](x.astype(np.float64))
    low, high = whole <= limits.min, whole >= float(limits.max)
    inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(dtype)
    nan = dtype(np.array(1 << (limits.bits - 1), np.uint64).astype(dtype)) if wide else dtype(0)
    return np.where(np.isnan(whole), nan, np.where(low, limits.min, np.where(high, limits.max, inside))).astype(dtype)


def extreme(a: Array, b: Array, largest: bool, nan: bool) -> Array:
    """min or max: −0 < +0; a NaN yields to a number, unless .NaN."""
    if a.dtype.kind != "f":
        return np.maximum(a, b) if largest else np.minimum(a, b)
    zero = a + b if largest else -(-a - b)
    chosen = np.fmax(a, b) if largest else np.fmin(a, b)
    chosen = np.where((a == 0) & (b == 0), zero, chosen)
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), chosen) if nan else chosen


def noise(x: Array, seed: int) -> Array:
    """In [−1, 1], a fixed function of the bits of x and the seed: hardware errs the same way each time."""
    bits = np.ascontiguousarray(x.astype(np.float64)).view(np.uint64) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits.astype(np.float64) / 2.0**63 - 1


# name: (function in float64, relative bound, absolute bound); the rounding to float32 is part of the bound.
# Bounds: PTX ISA, "Floating Point Instructions".
APPROXIMATE: dict[str, tuple[Callable, float, float]] = {
    "rcp": (lambda x: 1 / x, 2**-23, 0),
    "sqrt": (np.sqrt, 2**-23, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2**-22.9, 0),
    "ex2": (np.exp2, 2**-22, 0),
    "lg2": (np.log2, 2**-22.6, 2**-22.6),
    "sin": (np.sin, 0, 2**-20.5),
    "cos": (np.cos, 0, 2**-20.5),
    "tanh": (np.tanh, 2**-11, 0),
}


def approximate(name: str, x: Array, seed: int, ftz: bool) -> Array:
    """The function of float32 or float64 x, with a seeded error within the documented bound.

    In f64 the .ftz forms of rcp and rsqrt have about 20 bits and a lower word of zero. rsqrt without it is what CUDA's
    rsqrt(double), of 1 unit, compiles to.
    """
    function, relative, absolute = APPROXIMATE[name]
    exact = function(x.astype(np.float64))
    if x.dtype == np.float64:
        close = exact * (1 + (2.0**-21 if ftz else 2.0**-53) * noise(x, seed))
        return (close.view(np.uint64) & np.uint64(0xFFFFFFFF << 32)).view(np.float64) if ftz else close
    if name == "lg2":  # absolute in (1/2, 2), relative elsewhere
        near = (x > 0.5) & (x < 2)
        bound = np.where(near, absolute, relative * np.abs(exact)) - 2**-24 * np.abs(exact)
    else:
        bound = np.maximum(relative - 2**-24, 0) * np.abs(exact) + max(absolute - 2**-24, 0)
    if name == "tanh":
        bound = np.minimum(bound, 1 - np.abs(exact))  # never beyond ±1
    if name == "ex2":
        bound = np.where(x == np.rint(x), 0, bound)  # powers of 2 are exact: CUDA's tanh(double) counts on it
    special = ~np.isfinite(exact) | (exact == 0) | (np.abs(exact) == 1)
    return np.where(special, exact, exact + np.where(special, 0, bound) * noise(x, seed)).astype(np.float32)


def quotient(a: Array, b: Array, seed: int) -> Array:
    """div.approx and div.full: 2 units in the last place, modelled as 2^−23 relative before the rounding."""
    exact = a.astype(np.float64) / b
    return (exact * (1 + 2.0**-23 * noise(exact, seed))).astype(np.float32)
