"""SwiGLU's gate in one pass for a CPU: y = gate σ(gate) up.

NumPy makes nine arrays of the forward and backward, each written to memory and read again. Here a
number is read once, all of its formula is done in registers, eight numbers at a time, and the
result is written: 3 numbers moved forward instead of 15. `network_backward` is the gate's backward
within a network: it makes the hidden state again for the gradient of w_down, so the forward need
not keep it, and multiplies by an expert's weight on the way.
"""

from __future__ import annotations

from .common_numba_cpu import In1, In2, Out1, Out2, sigmoid


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


def network_backward(
    dgate: Out2,
    dup: Out2,
    hidden: Out2,
    dweights: Out1,
    dhidden: In2,
    gate: In2,
    up: In2,
    weights: In1,
) -> None:
    """All [rows, F], of experts whose outputs are multiplied by ``weights`` [rows].

    ``dhidden`` is that of the output before the weight, so dweights = Σ hidden ∘ dhidden: the
    output itself is not needed. ``hidden`` comes out times the weight.
    """
    one = gate.dtype.type(1)
    for row in range(gate.shape[0]):
        weight = weights[row]
        total = one - one
        for i in range(gate.shape[1]):
            g, u = gate[row, i], up[row, i]
            dh = dhidden[row, i]
            s = sigmoid(g, one)
            h = g * s * u
            total += h * dh
            dh *= weight
            dgate[row, i] = dh * u * (s + g * s * (one - s))  # (swiglu.2)
            dup[row, i] = dh * g * s  # (swiglu.3)
            hidden[row, i] = h * weight
        dweights[row] = total
