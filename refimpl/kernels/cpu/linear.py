"""Linear map on the column's pool of threads; as `refimpl.ops.linear`.

BLAS does each product on one thread, and the pool several at a time.
"""

from __future__ import annotations

from ...array import Array, expect, expect_some, last
from ...ops.linear import LinearSaved
from .host import empty, expect_real, rows_of, run_products

__all__ = ["linear_backward", "linear_forward"]


def linear_forward(x: Array, w: Array) -> tuple[Array, LinearSaved]:
    """As `refimpl.ops.linear_forward`, its products split over threads."""
    expect_real(x=x, w=w)
    expect("w", w, "(O, I)", (None, last(x, "x")))
    expect_some("w", w, "(O, I)")
    y = empty((*x.shape[:-1], w.shape[0]), x)
    run_products((rows_of(x), w.T, rows_of(y)))  # (linear.1)
    return y, LinearSaved(x, w)


def linear_backward(dy: Array, saved: LinearSaved) -> tuple[Array, Array]:
    """As `refimpl.ops.linear_backward`, its products split over threads."""
    x, w = saved
    expect_real(x=x, w=w, dy=dy)
    expect("dy", dy, "(…, O)", (*x.shape[:-1], w.shape[0]))
    dx, dw = empty(x.shape, x), empty(w.shape, x)
    given = rows_of(dy)
    # (linear.2), (linear.3)
    run_products((given, w, rows_of(dx)), (given.T, rows_of(x), dw))
    return dx, dw
