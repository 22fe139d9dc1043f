"""SwiGLU's gate, element by element: y = silu(gate) ∘ up, with silu(g) = g σ(g).

Source: Shazeer, GLU Variants Improve Transformer (2002.05202) eq. 5–6. Derivation:
derivations/swiglu.md.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import Array, expect, namespace, sigmoid

__all__ = ["SwiGLUSaved", "swiglu_backward", "swiglu_forward"]


class SwiGLUSaved(NamedTuple):
    """What `swiglu_forward` keeps for `swiglu_backward`."""

    gate: Array  # […]: the sigmoid is recomputed from it
    up: Array  # […]


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, SwiGLUSaved]:
    """y = gate σ(gate) up for ``gate`` and ``up`` of one shape […]; returns y […]."""
    namespace(gate=gate, up=up)
    expect("up", up, "gate.shape", gate.shape)
    return gate * sigmoid(gate) * up, SwiGLUSaved(gate, up)  # (swiglu.1)


def swiglu_backward(dy: Array, saved: SwiGLUSaved) -> tuple[Array, Array]:
    """Gradients (dgate, dup), each […], from ``dy`` […]."""
    gate, up = saved
    expect("dy", dy, "gate.shape", tuple(gate.shape))
    s = sigmoid(gate)
    dgate = dy * up * (s + gate * s * (1 - s))  # (swiglu.2)
    dup = dy * gate * s  # (swiglu.3)
    return dgate, dup
