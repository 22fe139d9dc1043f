"""What the mixture of experts does around its products, in Numba CUDA: moe.cu on the same
arguments, for reading.

Row r of the experts' order belongs to slot order[r] = m K + k, token m's k-th choice; place is the
inverse of order. The backward of either is the other. Derivation: derivations/moe.md.
"""

from .common_numba_cuda import WARP, CPointer, cuda, int32, int64, warp_sum


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals, ids = CPointer(real), CPointer(int64)

    def moe_permute(
        rows: reals, x: reals, order: ids, scale: reals, top_k: int32, width: int32, scaled: int32
    ):
        """rows[r] = x[order[r] / K], or ``scale[order[r]]`` times that if scaled. Grid: x a row, y
        a part of it."""
        row = cuda.blockIdx.x
        slot = order[row]
        start, source = row * width, slot // top_k * width
        factor = scale[slot] if scaled else real(1)
        for i in range(
            cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x,
            width,
            cuda.gridDim.y * cuda.blockDim.x,
        ):
            rows[start + i] = factor * x[source + i]  # (moe.2) (moe.8) (moe.9)

    def moe_combine(
        y: reals,
        rows: reals,
        place: ids,
        weights: reals,
        top_k: int32,
        width: int32,
        weighted: int32,
    ):
        """y[m] = Σ_k weights[m, k] rows[place[m K + k]], weights 1 unless weighted. Grid: x a
        token, y a part of its row.

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
                weight = weights[slot] if weighted else real(1)
                total += weight * rows[place[slot] * width + i]  # (moe.4) (moe.5) (moe.11)
            y[token * width + i] = total

    def moe_weight_gradient(
        dweights: reals, dy: reals, rows: reals, place: ids, top_k: int32, width: int32
    ):
        """dweights[slot] = Σ_d dy[m, d] rows[place[slot], d]. Grid: x a token, y a part of its
        choices, a warp each."""
        lane, k = (
            cuda.threadIdx.x % WARP,
            (cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x) // WARP,
        )
        if k >= top_k:  # whole warps leave: warp_sum needs all 32 threads
            return
        token = cuda.blockIdx.x
        slot, total = token * top_k + k, real(0)
        for i in range(lane, width, WARP):
            total += dy[token * width + i] * rows[place[slot] * width + i]
        total = warp_sum(total)
        if lane == 0:
            dweights[slot] = total  # (moe.7)

    return moe_permute, moe_combine, moe_weight_gradient
