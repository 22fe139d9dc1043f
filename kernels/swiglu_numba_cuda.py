"""SwiGLU's gate in Numba CUDA: what swiglu.cu does, on the same arguments, for reading.

Begin here: every element is computed alone, so threads need not know of each other. A thread takes
the element ``cuda.grid(1)``, its number in the grid, then one every ``cuda.gridsize(1)``, however
many threads were started. Derivation: derivations/swiglu.md.
"""

from .common_numba_cuda import CPointer, cuda, int64, make_sigmoid


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals, sigmoid = CPointer(real), make_sigmoid(real)

    def swiglu_forward(y: reals, gate: reals, up: reals, size: int64):
        """y = silu(gate) ∘ up."""
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            y[i] = gate[i] * sigmoid(gate[i]) * up[i]  # (swiglu.1)

    def swiglu_backward(dgate: reals, dup: reals, dy: reals, gate: reals, up: reals, size: int64):
        """dgate and dup from dy."""
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            g, s = gate[i], sigmoid(gate[i])
            dgate[i] = dy[i] * up[i] * (s + g * s * (real(1) - s))  # (swiglu.2)
            dup[i] = dy[i] * g * s  # (swiglu.3)

    return swiglu_forward, swiglu_backward
