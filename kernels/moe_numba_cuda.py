"""What the mixture of experts does around its products, in Numba CUDA: moe.cu on the same
arguments, for reading.

Slot m K + k, token m's k-th choice, has row place[m K + k] in the experts' order. Derivation:
derivations/moe.md.
"""

from .common_numba_cuda import WARP, CPointer, cuda, int32, int64, warp_sum


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals, ids = CPointer(real), CPointer(int64)

    def moe_permute(rows: reals, x: reals, place: ids, top_k: int32, width: int32):
        """rows[place[m K + k]] = x[m] for all K choices of a token. Grid: x a token, y a part of
        its row, which is read once."""
        token = cuda.blockIdx.x
        for i in range(
            cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x,
            width,
            cuda.gridDim.y * cuda.blockDim.x,
        ):
            value = x[token * width + i]
            for k in range(top_k):
                rows[place[token * top_k + k] * width + i] = value  # (moe.2)

    def moe_combine(y: reals, rows: reals, place: ids, weights: reals, top_k: int32, width: int32):
        """y[m] = Σ_k weights[m, k] rows[place[m K + k]]. Grid: x a token, y a part of its row.

        Each element is one thread's sum, in the order of k: threads that added their rows to y
        would need atomics.
        """
        token = cuda.blockIdx.x
        for i in range(
            cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x,
            width,
            cuda.gridDim.y * cuda.blockDim.x,
        ):
            total = real(0)
            for k in range(top_k):
                slot = token * top_k + k
                total += weights[slot] * rows[place[slot] * width + i]  # (moe.4) (moe.5) (moe.11)
            y[token * width + i] = total

    def moe_combine_backward(
        drows: reals,
        dweights: reals,
        dy: reals,
        rows: reals,
        place: ids,
        weights: reals,
        top_k: int32,
        width: int32,
    ):
        """For slot m K + k and its row place[slot]: drows[row] = weights[slot] dy[m], and
        dweights[slot] = Σ_d dy[m, d] rows[row, d]. Grid: x a token, y a part of its choices, a
        warp each."""
        lane, k = (
            cuda.threadIdx.x % WARP,
            (cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x) // WARP,
        )
        if k >= top_k:  # whole warps leave: warp_sum needs all 32 threads
            return
        token = cuda.blockIdx.x
        slot = token * top_k + k
        row, weight = place[slot] * width, weights[slot]
        total = real(0)
        for i in range(lane, width, WARP):
            value = dy[token * width + i]
            drows[row + i] = weight * value  # (moe.8) (moe.9)
            total += value * rows[row + i]
        total = warp_sum(total)
        if lane == 0:
            dweights[slot] = total  # (moe.7)

    return moe_permute, moe_combine, moe_combine_backward
