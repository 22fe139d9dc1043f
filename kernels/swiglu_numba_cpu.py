"""SwiGLU's gate in one pass for a CPU: y = gate σ(gate) up.

NumPy makes nine arrays of the forward and backward, each written to memory and read again. Here a
number is read once, all of its formula is done in registers, eight numbers at a time, and the
result is written: 3 numbers moved forward instead of 15. Within a network ffn_numba_cpu.py does it,
between the products.
"""

from __future__ import annotations

from .common_numba_cpu import In1, Out1, sigmoid


def swiglu_forward(y: Out1, gate: In1, up: In1) -> None:
    one = gate.dtype.type(1)
    for i in range(y.size):
        g = gate[i]
        y[i] = g * sigmoid(g, one) * up[i]  # (swiglu.1)


def swiglu_backward(dgate: Out1, dup: Out1, dy: In1, gate: In1, up: In1) -> None:
    one = gate.dtype.type(1)
    for i in range(dy.size):
        g = gate[i]
        s = sigmoid(g, one)
        dgate[i] = dy[i] * up[i] * (s + g * s * (one - s))  # (swiglu.2)
        dup[i] = dy[i] * g * s  # (swiglu.3)
