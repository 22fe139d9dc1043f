"""Weights that are stored in bfloat16 and stay so, on kernels/linear_numba_cpu.py: the table for
generation, whose memory moves 2 bytes per weight and token.

Weights of other types, and FP8 with its scales, are widened whole for each product. Letters: I
input width, O output width; ``…`` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...array import Array, expect, expect_some, last
from ...ops import REFERENCE, AnyOp, Op, Ops
from .compile import kernel
from .host import expect_real, ready, rows_of
from .pool import Task, blocks_of, run, run_kernels

__all__ = ["stored_linear", "stored_table"]

FEW = 8  # rows: for more, a block of weights is widened and NumPy makes the product
ONE_TASK = 2**19  # weights that the kernel reads for one task: 1 MB, 50 µs
WIDENED = 2**18  # weights that are widened at a time: in float32 1 MB, what a core's cache holds


class StoredSaved(NamedTuple):
    x: Array  # […, I]
    w: Array  # [O, I]: as it was given


def stored_table(table: Ops) -> Ops:
    """``table`` for weights that make arrays of themselves (`refimpl.checkpoint.lazy`): its linear
    map by `stored_linear`, and what is made of linear maps as the reference makes it."""
    composites = {name: REFERENCE[name] for name in ("embedding", "ffn", "moe", "mla", "mtp")}
    return table | composites | {"linear": stored_linear(table.linear)}


def stored_linear(linear: AnyOp) -> AnyOp:
    """``linear``, which also takes a weight whose attribute ``bits`` [O, I] holds bfloat16 numbers
    as uint16; where that is None, or there is no such attribute, it is the array of the weight."""

    def forward(x: Array, w: Array) -> tuple[Array, StoredSaved]:
        bits = getattr(w, "bits", None)
        if bits is None:
            return linear.forward(x, np.asarray(w))[0], StoredSaved(x, w)
        expect_real(x=x)
        expect("w", w, "(O, I)", (None, last(x, "x")))
        expect_some("w", w, "(O, I)")
        rows = ready(rows_of(x))
        y = (_few if len(rows) <= FEW else _many)(rows, bits)
        return y.reshape(*x.shape[:-1], len(bits)), StoredSaved(x, w)

    def backward(dy: Array, saved: StoredSaved) -> Any:
        return linear.backward(dy, linear.forward(saved.x, np.asarray(saved.w))[1])

    return Op(forward, backward)


def _few(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    y, forward = np.empty((len(bits), len(x)), x.dtype), kernel("linear", "linear_forward", x.dtype)
    blocks = blocks_of(len(bits), max(1, ONE_TASK // bits.shape[1]))
    run_kernels([partial(forward, y[block], x, bits[block]) for block in blocks])
    return y.T


def _many(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    y, widen = np.empty((len(x), len(bits)), x.dtype), kernel("linear", "widen", x.dtype)

    def task(block: slice) -> Task:
        return partial(_product, y[:, block], x, bits[block], widen)

    run([task(block) for block in blocks_of(len(bits), max(1, WIDENED // bits.shape[1]))])
    return y


def _product(y: np.ndarray, x: np.ndarray, bits: np.ndarray, widen: Callable[..., None]) -> None:
    w = np.empty(bits.shape, x.dtype)
    widen(w, bits)
    np.matmul(x, w.T, out=y)  # (linear.1)
