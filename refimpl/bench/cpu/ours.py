"""Our columns: a problem's forward and backward by a table of implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...errors import CouldNotRun
from ...kernels.columns import on_cpu
from ...kernels.cpu.adamw import FusedAdamW
from ...memory import available_memory
from ...model import backward, forward
from ...ops import AnyOp, Ops
from ...optimizer import AdamW, Moments
from .problems import Inputs, Sizes, inputs_of

__all__ = ["Gradients", "Work", "expect_memory", "optimizer_of", "work_of"]

COMPOSITE = ("mla", "moe", "head_cross_entropy")  # which find their own ops in the table
STEPS = 3  # of AdamW, that its result is compared after: the first alone is the gradient's sign
Gradients = dict[str, np.ndarray]  # by the names of the parameters


class Work(NamedTuple):
    """A problem, ready; both may be called again and again, ``gradients`` first."""

    call: Callable[[], object]  # what is timed
    gradients: Callable[[], Gradients]  # by the names of `Inputs.arrays`; of AdamW its parameters


def work_of(column: str, problem: str, sizes: Sizes, dtype: Any = np.float32) -> Work:
    """The problem by the implementation that the column is named after."""
    inputs, ops = inputs_of(problem, sizes, dtype), on_cpu(column)
    if problem == "attention" and column == "reference":
        quadratic = sizes.batch * sizes.heads * sizes.length**2 * np.dtype(dtype).itemsize
        expect_memory(4 * quadratic)  # so many arrays at a time
    if problem == "step":
        return _step(ops, inputs, optimizer_of(column))
    if problem == "adamw":
        return _adamw(inputs, optimizer_of(column))
    function = _block if problem == "block" else _op
    fixed = inputs.fixed | ({"ops": ops} if problem in COMPOSITE else {})

    def call() -> object:
        return function(ops, problem, inputs._replace(fixed=fixed))

    def gradients() -> Gradients:
        _, found = function(ops, problem, inputs._replace(fixed=fixed))
        found = found if isinstance(found, tuple) else (found,)
        named = zip(inputs.arrays, found, strict=True)
        return {name: gradient for name, gradient in named if gradient is not None}

    return Work(call, gradients)


def _op(ops: Ops, name: str, inputs: Inputs) -> tuple[Any, Any]:
    op: AnyOp = ops[name]
    y, saved = op.forward(*inputs.arrays.values(), **inputs.fixed)
    return y, op.backward(inputs.dy, saved)


def _block(ops: Ops, name: str, inputs: Inputs) -> tuple[Any, Any]:
    x, w_norm, *w = inputs.arrays.values()
    h, norm = ops.rms_norm.forward(x, w_norm, **inputs.fixed)
    y, ffn = ops.ffn.forward(h, *w, ops=ops)
    dh, *dw = ops.ffn.backward(inputs.dy, ffn)
    return y, (*ops.rms_norm.backward(dh, norm), *dw)


def _step(ops: Ops, inputs: Inputs, optimizer: AdamW) -> Work:
    config, tokens, learning_rate = inputs.fixed.values()
    params: Any = inputs.arrays
    moments = Moments()

    def call() -> Gradients:
        nonlocal moments
        _, saved = forward(params, tokens, config, ops=ops)
        grads = backward(saved)
        moments = optimizer.update(params, grads, moments, learning_rate)
        return grads

    return Work(call, call)


def _adamw(inputs: Inputs, optimizer: AdamW) -> Work:
    params: Any = inputs.arrays
    rate, g = inputs.fixed["learning_rate"], inputs.dy
    moments = Moments()

    def call() -> None:
        nonlocal moments
        moments = optimizer.update(params, {"p": g}, moments, rate)

    def gradients() -> Gradients:
        nonlocal moments
        for k in range(STEPS):
            moments = optimizer.update(params, {"p": np.roll(g, k)}, moments, rate)
        return {"p": params["p"].copy()}

    return Work(call, gradients)


def optimizer_of(column: str) -> AdamW:
    """The optimizer that a column's training step uses."""
    return FusedAdamW() if column == "numba_cpu" else AdamW()


def expect_memory(wanted: int) -> None:
    """CouldNotRun where so many bytes would take more than half of what is free: a machine that
    swaps measures its disk."""
    free = available_memory()
    if free is not None and wanted > free / 2:
        raise CouldNotRun(f"needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
