"""The column's table: the reference with every op that has kernels for a CPU in its place."""

from __future__ import annotations

from ...ops import REFERENCE, Op, Ops
from .compile import numba
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["numba_cpu_table"]


def numba_cpu_table() -> Ops:
    """CouldNotRun without Numba or threadpoolctl."""
    numba()
    return REFERENCE | {"swiglu": Op(swiglu_forward, swiglu_backward)}
