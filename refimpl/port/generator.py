"""Inputs that are the same bytes everywhere: integers from SplitMix64, divided by powers of two.

The seed is the 64-bit FNV-1a hash of the tensor's whole name, as in ``mla-1/in/x``; number i comes
from the i-th output of SplitMix64, counted from 0, in the order of the array's memory (the last
axis fastest):

    z = seed + (i + 1) · 0x9E3779B97F4A7C15                 (all modulo 2⁶⁴)
    z = (z xor (z >> 30)) · 0xBF58476D1CE4E5B9
    z = (z xor (z >> 27)) · 0x94D049BB133111EB
    z = z xor (z >> 31)
    k = low + (z >> 33) mod (high − low + 1)
    x = k / 2^shift

No floating-point arithmetic rounds here, and with |k| ≤ 256 bfloat16 holds x exactly. Constants:
Steele, Lea, Flood, Fast splittable pseudorandom number generators (OOPSLA 2014); Fowler, Noll, Vo,
FNV-1a.
"""

from __future__ import annotations

from math import prod

import numpy as np

__all__ = ["GENERATOR", "dyadics", "integers"]

# named in the index of vectors
GENERATOR = "SplitMix64 of FNV-1a(name), k / 2^shift; refimpl/port/generator.py"
MASK = 2**64 - 1


def fnv1a(text: str) -> int:
    """The 64-bit FNV-1a hash of UTF-8 text."""
    found = 0xCBF29CE484222325
    for byte in text.encode():
        found = ((found ^ byte) * 0x100000001B3) & MASK
    return found


def splitmix64(seed: int, count: int) -> np.ndarray:
    """The first ``count`` outputs, uint64."""
    steps = np.arange(1, count + 1, dtype=np.uint64)
    z = np.uint64(seed) + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def integers(name: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """int64 in low … high, both included."""
    drawn = splitmix64(fnv1a(name), prod(shape)) >> np.uint64(33)
    found = low + (drawn % np.uint64(high - low + 1)).astype(np.int64)
    return np.asarray(found).reshape(shape)


def dyadics(name: str, shape: tuple[int, ...], low: int, high: int, shift: int) -> np.ndarray:
    """float64 k / 2^shift with k in low … high; ValueError unless bfloat16 holds them."""
    if max(abs(low), abs(high)) > 256:
        raise ValueError(f"low and high must lie in -256…256, got {low}, {high}")
    return np.ldexp(integers(name, shape, low, high).astype(np.float64), -shift)
