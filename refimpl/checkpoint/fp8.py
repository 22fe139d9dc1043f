"""FP8 weights: E4M3 numbers in blocks of 128 × 128, each block with one scale that multiplies.

A weight [out, in] has scales [⌈out/128⌉, ⌈in/128⌉] under its own name + ``_scale_inv``; blocks at
the edges are cut off. Scales are float32, or UE8M0: powers of two, in eight bits or in float32
(V3.1). Source: DeepSeek-V3 (2412.19437) section 3.3 and the released weights, whose "inverse" scale
is the one to multiply by.
"""

from __future__ import annotations

from math import ceil

import ml_dtypes
import numpy as np

from ..array import Array
from ..fp8 import DEFAULT, LARGEST, narrow, scales, spread

__all__ = ["dequantise", "quantise", "scale_shape"]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales of a weight of that shape [out, in]."""
    return ceil(shape[0] / block[0]), ceil(shape[1] / block[1])


def dequantise(
    weight: Array, scale: Array, block: tuple[int, int], rows: Array, out: Array
) -> None:
    """Write the ``rows`` of a weight into ``out`` [len(rows), in], float32 or float64, each number
    times its scale.

    ``weight`` [len(rows), in] holds these rows alone, ``scale`` [blocks of out, blocks of in] is
    whole, and ``rows`` are their numbers in the weight. The product is rounded once, to out's type:
    in float64 it is exact.
    """
    out[...] = weight
    factors = scale[rows // block[0]].astype(out.dtype)
    wide = min(block[1], out.shape[1])  # a block of config.json may be wider than any weight
    out *= np.repeat(factors, wide, axis=1)[:, : out.shape[1]]


def quantise(weight: Array, block: tuple[int, int], *, ue8m0: bool = False) -> tuple[Array, Array]:
    """E4M3 numbers of ``weight`` [out, in] and float32 scales: max(largest of the block, 1e-4) /
    448.

    With ``ue8m0`` the scale is the next power of two. Rounds to nearest even; every number must be
    finite.
    """
    scale = scales(weight, block, LARGEST, DEFAULT.floor, power_of_two=ue8m0)
    ratio = weight / spread(scale, block, weight.shape).astype(weight.dtype)
    ratio = np.clip(ratio, -LARGEST, LARGEST)
    return narrow(ratio, ml_dtypes.float8_e4m3fn), scale
