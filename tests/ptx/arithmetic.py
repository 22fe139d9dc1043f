"""Floating-point arithmetic of PTX on arrays: one rounding where PTX has one, approximations with
their error."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numba
import numpy as np
from numba.extending import intrinsic

Array = np.ndarray
TINY = 2.0**-126


@intrinsic
def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """The processor's fused multiply-add, or the C library's."""
    return a(a, b, c), lambda context, builder, signature, arguments: builder.fma(*arguments)


@numba.vectorize(["f4(f4, f4, f4)", "f8(f8, f8, f8)"])
def fma(a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once, to nearest."""
    return _fused(a, b, c)


def fma_down(a: Array, b: Array, c: Array) -> Array:
    """a · b + c of float32 arrays, rounded once, downwards (.rm)."""
    nearest = fma(a, b, c)
    product = a.astype(np.float64) * b
    addend = c.astype(np.float64)
    result = nearest.astype(np.float64)
    # product is exact; so is the larger of the two minus what is near it, and the sign of the sum
    larger = np.abs(product) > np.abs(addend)
    high, low = np.where(larger, product, addend), np.where(larger, addend, product)
    return np.where((high - result) + low < 0, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def flush(x: Array) -> Array:
    """.ftz: float32 subnormals become zeros of their sign."""
    return np.where(np.abs(x) < np.float32(TINY), np.copysign(np.float32(0), x), x)


def saturate(x: Array) -> Array:
    """.sat: [0, 1], NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def to_bf16(x: Array) -> Array:
    """float32 to the bits of bf16, to nearest even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def maximum(a: Array, b: Array) -> Array:
    """Of floats, −0 < +0 and a NaN yields to a number."""
    return (
        np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))
        if a.dtype.kind == "f"
        else np.maximum(a, b)
    )


def minimum(a: Array, b: Array) -> Array:
    """As `maximum`."""
    return -maximum(-a, -b) if a.dtype.kind == "f" else np.minimum(a, b)


def noise(x: Array, seed: int) -> Array:
    """In [−1, 1], a fixed function of the bits of x and the seed: hardware errs the same way each
    time."""
    bits = np.ascontiguousarray(x.astype(np.float64)).view(np.uint64) ^ np.uint64(
        seed * 0x9E3779B97F4A7C15 % 2**64
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits.astype(np.float64) / 2.0**63 - 1


# Bounds of the approximations: PTX ISA, "Floating Point Instructions".


def exponential(x: Array, seed: int) -> Array:
    """ex2.approx.f32: within 2^−22 relative, the rounding to float32 included; powers of 2 are
    exact."""
    exact = np.exp2(x.astype(np.float64))
    bound = np.where(x == np.rint(x), 0, (2**-22 - 2**-24) * exact)
    return np.where(np.isfinite(exact), exact + bound * noise(x, seed), exact).astype(np.float32)


def reciprocal(x: Array, seed: int) -> Array:
    """rcp.approx.ftz.f64: about 20 bits, and a lower word of zero."""
    close = 1 / x * (1 + 2.0**-21 * noise(x, seed))
    return (close.view(np.uint64) & np.uint64(0xFFFFFFFF << 32)).view(np.float64)


def inverse(x: Array, seed: int) -> Array:
    """rcp.approx.f32: within a unit, taken as 2^−23 relative, the rounding to float32 included."""
    exact = 1 / x.astype(np.float64)
    bound = (2**-23 - 2**-24) * exact
    return np.where(np.isfinite(exact), exact + bound * noise(x, seed), exact).astype(np.float32)
