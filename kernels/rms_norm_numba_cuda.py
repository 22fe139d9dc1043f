"""RMSNorm in Numba CUDA: what rms_norm.cu does, on the same arguments, for reading.

A block takes a row. Its threads stride over the row together, so that neighbours read neighbouring
elements: a warp's 32 reads are then a few accesses to memory. Arrays are flat: element (row, i) is
``row * width + i``. Derivation: derivations/rms_norm.md.
"""

import math

from .common_numba_cuda import WARP, CPointer, block_sum, cuda, finite, int32, int64

LANES = 8  # threads that share a column of dw


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals = CPointer(real)

    def rms_norm_forward(y: reals, r: reals, x: reals, w: reals, width: int32, eps: real):
        """y = x r w and r = 1 / √(mean(x²) + eps). Grid: a block per row."""
        part = cuda.shared.array(WARP, real)
        row = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        threads = cuda.blockDim.x
        start = row * width
        squares = real(0)
        for i in range(thread, width, threads):
            squares += x[start + i] * x[start + i]
        mean = block_sum(part, squares) / real(width)
        rms = real(1) / math.sqrt(finite(mean + eps))  # (rms_norm.1)
        if thread == 0:  # all threads have the same number; one writes it
            r[row] = rms
        for i in range(thread, width, threads):
            y[start + i] = x[start + i] * rms * w[i]  # (rms_norm.2)

    def rms_norm_backward(
        dx: reals,
        part_dw: reals,
        dy: reals,
        x: reals,
        w: reals,
        r: reals,
        rows: int64,
        width: int32,
    ):
        """dx, and part_dw[block, width]: the sum of dy ∘ n over the block's rows. Grid: any number
        of blocks.

        dw is a sum over rows, which blocks share: each adds up its own rows, every gridDim-th, in
        its own row of part_dw, and `rms_norm_weight` adds the blocks. With atomics the order, and
        so the last bits, would change from run to run.
        """
        part = cuda.shared.array(WARP, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        own = cuda.blockIdx.x * width
        for i in range(thread, width, threads):
            part_dw[own + i] = real(0)
        for row in range(cuda.blockIdx.x, rows, cuda.gridDim.x):
            start, rms = row * width, r[row]
            products = real(0)
            for i in range(thread, width, threads):
                n = x[start + i] * rms
                part_dw[own + i] += (
                    dy[start + i] * n
                )  # (rms_norm.5) no barrier: this thread alone has column i
                products += dy[start + i] * w[i] * n
            mean = block_sum(part, products) / real(width)
            for i in range(thread, width, threads):
                dn = dy[start + i] * w[i]  # (rms_norm.3)
                dx[start + i] = rms * (dn - x[start + i] * rms * mean)  # (rms_norm.4)

    def rms_norm_weight(dw: reals, part_dw: reals, parts: int32, width: int32):
        """dw[i] = Σ_b part_dw[b, i]. Block (32, LANES): the lanes of a column share its parts, each
        adds every LANES-th, and lane 0 adds the lanes in order. Grid: a block for 32 columns."""
        part = cuda.shared.array((LANES, WARP), real)
        column, lane = cuda.threadIdx.x, cuda.threadIdx.y
        i = cuda.blockIdx.x * WARP + column
        total = real(0)
        if (
            i < width
        ):  # the last block may have threads beyond the end, but all must come to the barrier
            for b in range(lane, parts, LANES):
                total += part_dw[b * width + i]
        part[lane, column] = total
        cuda.syncthreads()  # lane 0 reads what the others wrote
        if lane == 0 and i < width:
            for other in range(1, LANES):
                total += part[other, column]
            dw[i] = total  # (rms_norm.5)

    return rms_norm_forward, rms_norm_backward, rms_norm_weight
