"""SwiGLU's gate on kernels/swiglu_numba_cpu.py; as `refimpl.ops.swiglu`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from ...array import Array, expect
from .compile import kernel
from .host import empty, expect_real, ready, some_rows
from .pool import run_kernels

__all__ = ["SwiGLUSaved", "swiglu_backward", "swiglu_forward"]


class SwiGLUSaved(NamedTuple):
    """What `swiglu_forward` keeps for `swiglu_backward`."""

    gate: Array  # […]
    up: Array  # […]


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, SwiGLUSaved]:
    """As `refimpl.ops.swiglu_forward`, by kernels of Numba."""
    dtype = expect_real(gate=gate, up=up)
    expect("up", up, "gate.shape", gate.shape)
    y, forward = empty(gate.shape, gate), kernel("swiglu", "swiglu_forward", dtype)
    arrays = [x.reshape(-1) for x in (y, ready(gate), ready(up))]
    run_kernels([partial(forward, *(x[part] for x in arrays)) for part in some_rows(y.size)])
    return y, SwiGLUSaved(gate, up)


def swiglu_backward(dy: Array, saved: SwiGLUSaved) -> tuple[Array, Array]:
    """As `refimpl.ops.swiglu_backward`, by kernels of Numba."""
    gate, up = saved
    dtype = expect_real(gate=gate, dy=dy)
    expect("dy", dy, "gate.shape", tuple(gate.shape))
    backward = kernel("swiglu", "swiglu_backward", dtype)
    dgate, dup = empty(gate.shape, gate), empty(gate.shape, gate)
    arrays = [x.reshape(-1) for x in (dgate, dup, ready(dy), ready(gate), ready(up))]
    run_kernels([partial(backward, *(x[part] for x in arrays)) for part in some_rows(dy.size)])
    return dgate, dup
