"""SwiGLU's gate on kernels/swiglu.cu; as `refimpl.ops.swiglu`, and for bfloat16."""

from __future__ import annotations

import numpy as np

from ..array import Array, expect
from ..ops import AnyOp, Op
from ..ops.swiglu import SwiGLUSaved
from .host import Kernels, cover, numbers, ready
from .launch import Launch

__all__ = ["swiglu"]

THREADS = 256


def swiglu(launch: Launch) -> AnyOp:
    """The op on ``launch``."""
    kernels = Kernels(launch, "swiglu")

    def swiglu_forward(gate: Array, up: Array) -> tuple[Array, SwiGLUSaved]:
        n = numbers(gate=gate, up=up)
        expect("up", up, "gate.shape", gate.shape)
        gate, up = ready(gate), ready(up)
        y = kernels.empty(gate.shape, gate.dtype, gate)
        blocks = cover(gate.size, THREADS * n.vector)
        kernels("swiglu_forward", n.storage, blocks, THREADS, y, gate, up, np.int64(gate.size))
        return y, SwiGLUSaved(gate, up)

    def swiglu_backward(dy: Array, saved: SwiGLUSaved) -> tuple[Array, Array]:
        gate, up = saved
        n = numbers(gate=gate, dy=dy)
        expect("dy", dy, "gate.shape", tuple(gate.shape))
        dgate, dup = (kernels.empty(gate.shape, gate.dtype, gate) for _ in range(2))
        blocks = cover(gate.size, THREADS * n.vector)
        kernels(
            "swiglu_backward",
            n.storage,
            blocks,
            THREADS,
            dgate,
            dup,
            ready(dy),
            gate,
            up,
            np.int64(gate.size),
        )
        return dgate, dup

    return Op(swiglu_forward, swiglu_backward)
