"""The generator of integers, against numbers from elsewhere, and what bfloat16 holds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refimpl.port.generator import dyadics, fnv1a, integers, splitmix64


def in_python(seed: int, count: int) -> list[int]:
    """SplitMix64 in Python's own integers, one after the other, as published."""
    mask, found = 2**64 - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_published_values() -> None:
    """SplitMix64 of seed 1234567 and FNV-1a of the empty word and of a."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(1234567, 3).tolist() == wanted == in_python(1234567, 3)
    assert fnv1a("") == 0xCBF29CE484222325
    assert fnv1a("a") == 0xAF63DC4C8601EC8C
    assert splitmix64(2**64 - 1, 9).tolist() == in_python(2**64 - 1, 9)


def test_range_and_types() -> None:
    k = integers("mla-1/in/x", (40, 50), -127, 127)
    assert (k.dtype, k.min(), k.max()) == (np.int64, -127, 127)
    assert abs(k.mean()) < 5
    wanted = [-127 + (z >> 33) % 255 for z in in_python(fnv1a("mla-1/in/x"), 3)]
    assert k.flat[:3].tolist() == wanted
    x = dyadics("mla-1/in/x", (40, 50), -127, 127, 6)
    assert np.array_equal(x, k / 64)
    assert np.array_equal(x.astype(ml_dtypes.bfloat16).astype(np.float64), x)
    with pytest.raises(ValueError, match=r"must lie in -256…256, got 0, 257"):
        dyadics("x", (1,), 0, 257, 0)
