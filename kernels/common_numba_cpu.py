"""What the kernels for a CPU share: how their arguments are written down, and an exponential that
the compiler turns into vector instructions.

A kernel works on one block of rows or one head, on one thread; `refimpl.kernels.cpu.pool` gives
the blocks to threads. Products of few rows are made inside kernels (products_numba_cpu.py), the
others by NumPy between them. A kernel's annotations are the types of its arguments: ``In2`` is an
array [rows, columns] that it reads, ``Out2`` one that it writes, both without gaps, and ``Real`` a
number, each of the type that it is compiled for.
"""

from __future__ import annotations

import os
from math import exp as exp_of_libm
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic, overload


class Argument(NamedTuple):
    """The type of one argument: an array of so many dimensions, or (0) a number."""

    dims: int
    written: bool = False
    kind: str = "real"  # or a type that does not change: int64, boolean
    layout: str = "C"  # without gaps; "A" for any view


In1, In2, In3 = (Argument(dims) for dims in (1, 2, 3))
Out1, Out2, Out3, Out4 = (Argument(dims, written=True) for dims in (1, 2, 3, 4))
In2View, Out2View = Argument(2, layout="A"), Argument(2, written=True, layout="A")
Ids1, Ids2 = (Argument(dims, kind="int64") for dims in (1, 2))
OutIds1, OutIds2 = (Argument(dims, written=True, kind="int64") for dims in (1, 2))
Bools1, Bools2 = (Argument(dims, kind="boolean") for dims in (1, 2))
Real, Int = Argument(0), Argument(0, kind="int64")
Float64 = Argument(0, kind="float64")

# numbers that are summed in their own type, one after another and along vectors; such sums are
# added in float64
SOME, LANES = 64, 1024
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693145751953125)  # 15 bits of ln 2: n times it is exact for |n| < 2⁹
LN2_LOW = np.float32(1.42860677e-06)  # the rest
LOWEST, HIGHEST = np.float32(-105), np.float32(89)  # beyond, e^x is 0 or ∞ in float32
LOWEST_NORMAL = np.float32(-87.336)  # −126 ln 2
BIAS = 127  # of a float32's exponent, which is from bit 23 on
ROUND = np.float32(3 * 2**22 + BIAS - 1)  # a number added to it is rounded to a whole one
TWO = np.float32(2)
# twice (e^r − 1 − r) / r² for |r| ≤ ln 2 / 2, interpolated at 5 Chebyshev nodes
C0, C1, C2, C3, C4 = (
    np.float32(2 * c) for c in (0.5, 0.16666576, 0.041666556, 0.008363179, 0.0013926184)
)


CHECKED = os.environ.get("REFIMPL_BOUNDS_CHECKS") == "1"  # as in compile.py
# A function that is silent takes the options of its caller, but for the check of every index.
SAME = {"error_model": "numpy", "boundscheck": CHECKED}
EXACT = {"fastmath": False, "boundscheck": CHECKED}


@intrinsic
def _whole_vectors(typing):
    def code(context, builder, signature, arguments):
        # llvmlite's own `add` knows only attributes without a value
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), code


def whole_vectors():
    """In a compiled function whose loops are more than memory: where a processor has vectors of 512
    bits, they use them. By default LLVM takes half on most of these."""


if not config.DISABLE_JIT:
    whole_vectors = _whole_vectors


@njit(**EXACT)
def product(a, b):
    """a b, rounded, in compiled code. For terms that nearly cancel: a product written out may be
    multiplied in another order, since the kernels are compiled so that their sums may be."""
    return a * b


def exp(x):
    """e^x in compiled code. float64: the C library's. float32: 2ⁿ⁻¹ 2eʳ with n = round(x / ln 2),
    no branch, and an error of at most 1.2 units in the last place (of the smallest normal number
    below 2⁻¹²⁶: 1 subnormal); e^−∞ is 0, NaN stays NaN."""
    return exp_of_libm(x)


def exp_or_zero(x):
    """The same, but in float32 0 below 2⁻¹²⁵·⁵, for sums of which other terms are large: where a
    product is subnormal, below 2⁻¹²⁶, a processor waits for a hundred cycles."""
    return exp_of_libm(x)


@njit(fastmath={"contract"})  # a product and a sum may be one instruction, whose product is exact
def _exp_parts(x):
    """2eʳ, and a number whose last bits are n − 1 + BIAS."""
    # not reordered: x LOG2_E would come out of the additions, n ln 2 of the subtractions
    shifted = np.float32(x * LOG2_E + ROUND)
    n = shifted - ROUND
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = (((((C4 * r + C3) * r + C2) * r + C1) * r + C0) * r + TWO) * r + TWO
    return y, np.float32(shifted).view(np.int32)


@njit(**EXACT)
def _exp_float32(x):
    y, exponent = _exp_parts(min(max(x, LOWEST), HIGHEST))
    # 2ⁿ⁻¹ may be no float32: two factors are. Bits before the last are shifted out
    whole = np.int32(exponent + BIAS)
    half = np.int32(whole >> 1)
    first = np.int32(half << 23).view(np.float32)
    second = np.int32((whole - half) << 23).view(np.float32)
    return y * first * second


@njit(**EXACT)
def _exp_or_zero_float32(x):
    y, exponent = _exp_parts(min(max(x, LOWEST_NORMAL), HIGHEST))
    return y * np.int32(exponent << 23).view(np.float32)


@overload(exp, jit_options=EXACT)
def _exp_of(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: exp_of_libm(x)


@overload(exp_or_zero, jit_options=EXACT)
def _exp_or_zero_of(x):
    if x == types.float32:
        return lambda x: _exp_or_zero_float32(x)
    return lambda x: exp_of_libm(x)


@njit(**EXACT)
def sigmoid(x, one):
    """1 / (1 + e^−x) in compiled code, without overflow on either side; ``one`` of x's type."""
    z = exp(-abs(x))
    return (one if x >= 0 else z) / (one + z)


def largest_of(x):
    """The largest element of ``x`` [n] in compiled code; −∞ of none. NaN may be left out.

    Floats are compared as integers, in whose order they lie but for the sign: the compiler makes
    vector instructions of that, and not of a comparison that must know of NaN.
    """
    return max(x)


@overload(largest_of, jit_options=EXACT)
def _largest_of(x):
    integer, bits = (np.int32, 31) if x.dtype == types.float32 else (np.int64, 63)
    lowest = integer(np.iinfo(integer).min)
    mask = integer(np.iinfo(integer).max)

    def find(x):
        whole_vectors()
        best, whole = lowest, x.view(integer)
        for i in range(whole.size):
            # a negative number's bits count down. Numba's int32 >> int64 is an int64
            sign = integer(whole[i] >> bits)
            best = max(best, integer(whole[i] ^ integer(sign & mask)))
        sign = integer(best >> bits)
        best = integer(best ^ integer(sign & mask))
        return best.view(x.dtype.type) if x.size else x.dtype.type(-np.inf)

    return find
