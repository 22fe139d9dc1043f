"""What the kernels in Numba CUDA share: reductions in a fixed order, and the logistic function.

A block's threads run in warps of 32, which go on together. Numba knows a Python number as 64 bits
wide, and would do in float64 whatever meets one: so constants are written ``real(1)``, and the
kernels are made for one type ``real``.

No other file of device code names the package that compiles it, numba-cuda. Its successor,
numba-cuda-mlir, has the same names under ``numba_cuda_mlir``.
"""

import math

from numba import cuda
from numba.cuda.types import CPointer, float32, float64, int32, int64, uint8  # noqa: F401

WARP = 32  # threads
ALL_LANES = 0xFFFFFFFF  # one bit a thread of a warp: all take part


@cuda.jit(device=True, inline="always")
def warp_sum(x):
    """The sum over a warp, the same bits in all its threads. They read each other's registers,
    without memory: after a step with ``other`` = 16, each thread has the sum of 2, then of 4, … and
    of all 32."""
    other = WARP // 2
    while other > 0:
        x += cuda.shfl_xor_sync(ALL_LANES, x, other)
        other //= 2
    return x


@cuda.jit(device=True, inline="always")
def warp_max(x):
    """The largest of a warp, in all its threads."""
    other = WARP // 2
    while other > 0:
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, other))
        other //= 2
    return x


@cuda.jit(device=True, inline="always")
def block_sum(part, x):
    """The sum over a block of whole warps, the same bits in all its threads; all of them must call
    it.

    Warps can't read each other's registers, so their sums meet in ``part``: shared memory for 32
    numbers.
    """
    x = warp_sum(x)
    cuda.syncthreads()  # another warp may still read an earlier call's part
    if cuda.threadIdx.x % WARP == 0:
        part[cuda.threadIdx.x // WARP] = x
    cuda.syncthreads()  # no thread reads part before all warps have written theirs
    total = part[0]
    for warp in range(1, cuda.blockDim.x // WARP):
        total += part[warp]
    return total


@cuda.jit(device=True, inline="always")
def block_max(part, x):
    """The largest of a block; otherwise as `block_sum`."""
    x = warp_max(x)
    cuda.syncthreads()
    if cuda.threadIdx.x % WARP == 0:
        part[cuda.threadIdx.x // WARP] = x
    cuda.syncthreads()
    largest = part[0]
    for warp in range(1, cuda.blockDim.x // WARP):
        largest = max(largest, part[warp])
    return largest


@cuda.jit(device=True, inline="always")
def finite(x):
    """x where it is finite, else NaN: 1 / ∞ would make of an overflow a 0 that nobody can tell from
    a right one."""
    return x + (x - x)


def make_sigmoid(real):
    """1 / (1 + e^-x) for numbers of type ``real``, without overflow on either side."""

    @cuda.jit(device=True, inline="always")
    def sigmoid(x):
        z = math.exp(-abs(x))
        return (z if x < real(0) else real(1)) / (real(1) + z)

    return sigmoid
