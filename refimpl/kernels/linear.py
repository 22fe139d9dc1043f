"""The linear map, as `refimpl.ops.linear`, and for bfloat16: a dense product, which is cuBLAS's on
a device."""

from __future__ import annotations

from ..array import Array, expect, last
from ..ops.linear import LinearSaved
from .host import numbers, product

__all__ = ["linear_backward", "linear_forward"]


def linear_forward(x: Array, w: Array) -> tuple[Array, LinearSaved]:
    """As `refimpl.ops.linear_forward`, in the type of ``x``."""
    numbers(x=x, w=w)
    expect("w", w, "(O, I)", (None, last(x, "x")))
    return product(x, w.T, x.dtype), LinearSaved(x, w)


def linear_backward(dy: Array, saved: LinearSaved) -> tuple[Array, Array]:
    """As `refimpl.ops.linear_backward`: dx in the type of x, dw in float32 or wider."""
    x, w = saved
    n = numbers(x=x, w=w, dy=dy)
    expect("dy", dy, "(…, O)", (*x.shape[:-1], w.shape[0]))
    rows = dy.reshape(-1, w.shape[0])
    return product(dy, w, x.dtype), product(rows.T, x.reshape(-1, w.shape[1]), n.real)
