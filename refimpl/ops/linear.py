"""Linear map without bias, y = x Wᵀ: the only dense layer of DeepSeek-V3.

Weights are stored [out, in], as in the checkpoints. Derivation: derivations/linear.md.
Letters: I input width, O output width; ``…`` any leading dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import Array, expect, expect_some, last, namespace

__all__ = ["LinearSaved", "linear_backward", "linear_forward"]


class LinearSaved(NamedTuple):
    """What `linear_forward` keeps for `linear_backward`."""

    x: Array  # […, I]: dw is a product with it
    w: Array  # [O, I]: dx is a product with it


def linear_forward(x: Array, w: Array) -> tuple[Array, LinearSaved]:
    """y = x Wᵀ for ``x`` […, I] and ``w`` [O, I]; returns y […, O].

    ValueError if the widths differ.
    """
    xp = namespace(x=x, w=w)
    expect("w", w, "(O, I)", (None, last(x, "x")))
    expect_some("w", w, "(O, I)")
    return xp.matmul(x, xp.matrix_transpose(w)), LinearSaved(x, w)  # (linear.1)


def linear_backward(dy: Array, saved: LinearSaved) -> tuple[Array, Array]:
    """Gradients (dx […, I], dw [O, I]) from ``dy`` […, O]."""
    x, w = saved
    xp = namespace(dy=dy, x=x, w=w)
    expect("dy", dy, "(…, O)", (*x.shape[:-1], w.shape[0]))
    dx = xp.matmul(dy, w)  # (linear.2)
    dy_rows, x_rows = xp.reshape(dy, (-1, w.shape[0])), xp.reshape(x, (-1, w.shape[1]))
    dw = xp.matmul(xp.matrix_transpose(dy_rows), x_rows)  # (linear.3)
    return dx, dw
