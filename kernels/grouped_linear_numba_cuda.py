"""The linear maps of all experts in one launch, in Numba CUDA: grouped_linear.cu on the same
arguments, for reading.

Rows lie in the experts' order, those of expert e from start[e] up to start[e + 1]. A thread makes a
number of the result, and adds its terms in order; ``first_tile`` is of the tiles that the other
file's blocks make. Derivation: derivations/moe.md.
"""

from .common_numba_cuda import CPointer, cuda, int32, int64


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals, ids = CPointer(real), CPointer(int64)

    @cuda.jit(device=True, inline="always")
    def expert_of(row, start):
        expert = 0
        while start[expert + 1] <= row:
            expert += 1
        return expert

    def grouped_linear_forward(
        y: reals,
        x: reals,
        w: reals,
        start: ids,
        first_tile: ids,
        experts: int32,
        inputs: int32,
        outputs: int32,
    ):
        """y[r] = w[e] x[r] for the expert e of each row. Grid: x a row, y a part of its outputs."""
        row = cuda.blockIdx.x
        if row < start[0] or row >= start[experts]:
            return
        n = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if n >= outputs:
            return
        line = (expert_of(row, start) * outputs + n) * inputs
        total = real(0)
        for k in range(inputs):
            total += x[row * inputs + k] * w[line + k]
        y[row * outputs + n] = total  # (moe.3)

    def grouped_linear_input(
        dx: reals,
        dy: reals,
        w: reals,
        more_dy: reals,
        more_w: reals,
        start: ids,
        first_tile: ids,
        experts: int32,
        inputs: int32,
        outputs: int32,
        pairs: int32,
    ):
        """dx[r] = dy[r] w[e], and more_dy[r] more_w[e] besides if there are 2 pairs. Grid: x a row,
        y a part of its inputs."""
        row = cuda.blockIdx.x
        if row < start[0] or row >= start[experts]:
            return
        k = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if k >= inputs:
            return
        own = expert_of(row, start) * outputs * inputs + k
        total = real(0)
        for n in range(outputs):
            total += dy[row * outputs + n] * w[own + n * inputs]
        if pairs == 2:
            for n in range(outputs):
                total += more_dy[row * outputs + n] * more_w[own + n * inputs]
        dx[row * inputs + k] = total  # (moe.10)

    def grouped_linear_weight(
        dw: reals, dy: reals, x: reals, start: ids, inputs: int32, outputs: int32
    ):
        """dw[e] = Σ_r dy[r] x[r]ᵀ over the rows of expert e, 0 without rows. Grid: x a row of dw,
        of all experts."""
        line = cuda.blockIdx.x
        expert, n = line // outputs, line % outputs
        for k in range(cuda.threadIdx.x, inputs, cuda.blockDim.x):
            total = real(0)
            for row in range(start[expert], start[expert + 1]):
                total += dy[row * outputs + n] * x[row * inputs + k]
            dw[line * inputs + k] = total  # (moe.10)

    return grouped_linear_forward, grouped_linear_input, grouped_linear_weight
