"""The feed-forward network of a dense block, of the shared experts and of every routed expert.

y = W_down (silu(W_gate x) ∘ (W_up x)); in checkpoints gate_proj (w1), up_proj (w3), down_proj (w2).
Derivation: derivations/ffn.md. Letters: D model, F hidden width; ``…`` any leading dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, expect, expect_some, last
from .leaves import LEAVES, Leaves, expect_table

__all__ = ["FFNSaved", "ffn_backward", "ffn_forward"]


class FFNSaved(NamedTuple):
    """What `ffn_forward` keeps for `ffn_backward`."""

    gate: Any  # saved of the three linear maps and of the gate between them
    up: Any
    swiglu: Any
    down: Any
    ops: Leaves


def ffn_forward(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, *, ops: Leaves = LEAVES
) -> tuple[Array, FFNSaved]:
    """y […, D] for ``x`` […, D], ``w_gate`` and ``w_up`` [F, D], ``w_down`` [D, F]."""
    expect_table(ops, Leaves)
    expect("w_gate", w_gate, "(F, D)", (None, last(x, "x")))
    expect_some("w_gate", w_gate, "(F, D)")
    expect("w_up", w_up, "(F, D)", tuple(w_gate.shape))
    expect("w_down", w_down, "(D, F)", (x.shape[-1], w_gate.shape[0]))
    gate, gate_saved = ops.linear.forward(x, w_gate)  # (ffn.1)
    up, up_saved = ops.linear.forward(x, w_up)
    hidden, swiglu_saved = ops.swiglu.forward(gate, up)  # (ffn.2)
    y, down_saved = ops.linear.forward(hidden, w_down)  # (ffn.3)
    return y, FFNSaved(gate_saved, up_saved, swiglu_saved, down_saved, ops)


def ffn_backward(dy: Array, saved: FFNSaved) -> tuple[Array, Array, Array, Array]:
    """Gradients (dx […, D], dw_gate [F, D], dw_up [F, D], dw_down [D, F]) from ``dy`` […, D]."""
    ops = saved.ops
    dhidden, dw_down = ops.linear.backward(dy, saved.down)  # (ffn.4)
    dgate, dup = ops.swiglu.backward(dhidden, saved.swiglu)  # (ffn.5)
    dx_gate, dw_gate = ops.linear.backward(dgate, saved.gate)
    dx_up, dw_up = ops.linear.backward(dup, saved.up)
    return dx_gate + dx_up, dw_gate, dw_up, dw_down  # (ffn.6)
