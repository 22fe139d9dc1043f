"""Log-probabilities from hidden states on kernels/cross_entropy_numba_cpu.py; as
`refimpl.ops.log_prob`; and what the training loss shares with them.

The logits of a chunk of tokens are whole at a time: as many as 4 blocks have, or those of block[0]
tokens. Their products and softmax are cut into tasks, and each gradient is one product per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, fill
from ...ops.cross_entropy import token_weights
from ...ops.log_prob import check_log_prob
from .compile import kernel
from .host import empty, expect_real, products, ready, rows_of
from .pool import blocks_of, run

__all__ = ["Chunk", "LogProbSaved", "counted_rows", "log_prob_backward", "log_prob_forward"]

AT_A_TIME = 8  # blocks
TOKENS = 256  # of one task
ENTRIES = 1024  # of the vocabulary, likewise: TOKENS × ENTRIES logits stay in the second cache


class LogProbSaved(NamedTuple):
    """What `log_prob_forward` keeps for `log_prob_backward`."""

    h: Array  # […, D]; 0 for tokens that are left out
    w: Array  # [W, D]
    lse: Array  # [M]
    targets: Array  # [M]
    mask: Array  # [M]
    temperature: float
    block: tuple[int, int]


class Chunk:
    """The logits of some of the tokens, and what is made of them. ``rows`` says which."""

    def __init__(self, rows: slice, h: Array, w: Array, temperature: float, columns: int) -> None:
        self.rows = rows
        self.h = h[rows]
        self.w = w
        self.temperature = temperature
        self.z = empty((self.h.shape[0], w.shape[0]), h)
        self.vocabulary = blocks_of(w.shape[0], min(columns, ENTRIES))
        self.tokens = blocks_of(self.h.shape[0], TOKENS)

    @classmethod
    def all(cls, h: Array, w: Array, temperature: float, block: tuple[int, int]) -> Iterator[Chunk]:
        """Those of all tokens [M, D], one after the other."""
        count = max(block[0], AT_A_TIME * block[0] * block[1] // w.shape[0])
        for rows in blocks_of(h.shape[0], count):
            yield cls(rows, h, w, temperature, block[1])

    def lse(self) -> Array:
        """Make the logits; log Σ e^z [m] of each token."""
        shape = len(self.vocabulary), self.h.shape[0]
        largest, total = empty(shape, self.z), empty(shape, self.z)
        run(
            [
                partial(self._block, i, j, largest[k], total[k])
                for k, j in enumerate(self.vocabulary)
                for i in self.tokens
            ]
        )
        highest = largest.max(axis=0)
        shift = np.where(highest > -np.inf, highest, 0)
        with np.errstate(divide="ignore"):  # all −∞
            return highest + np.log(np.sum(total * np.exp(largest - shift), axis=0))

    def _block(self, i: slice, j: slice, largest: Array, total: Array) -> None:
        self.logits(i, j)
        statistics = kernel("cross_entropy", "statistics", self.z.dtype)
        statistics(largest[i], total[i], self.z[i], j.start, j.stop)

    def logits(self, i: slice, j: slice) -> None:
        """Those of tokens i and entries j."""
        np.matmul(self.h[i], self.w[j].T, out=self.z[i, j])
        if self.temperature != 1:
            divide = kernel("cross_entropy", "divide", self.z.dtype)
            divide(self.z[i], j.start, j.stop, self.temperature)  # (log_prob.1)

    def gradient(self, by_token: tuple[Array, ...], dh: Array, dw: Array, *, again: bool) -> None:
        """The logits become weight (softmax − one-hot), times 1 / temperature: ``dh`` [m, D] is
        written, and ``dw`` [W, D], or for a later chunk added to. ``by_token``: lse, mask (of 0 the
        gradient is 0), weight and targets of all tokens. ``again``: make the logits again."""
        lse, counted, weight, targets = (array[self.rows] for array in by_token)
        weight = weight / self.z.dtype.type(self.temperature)
        own = lse, counted, weight, targets
        run(
            [
                partial(self._gradient, i, j, own, again)
                for j in self.vocabulary
                for i in self.tokens
            ]
        )
        tasks = products(self.z, self.w, dh)  # (log_prob.8)
        if self.rows.start == 0:
            tasks += products(self.z.T, self.h, dw)  # (log_prob.9)
        else:
            tasks += [partial(self._add, dw, j) for j in self.vocabulary]
        run(tasks)

    def _gradient(self, i: slice, j: slice, own: tuple[Array, ...], again: bool) -> None:
        if again:
            self.logits(i, j)
        gradient = kernel("cross_entropy", "gradient_in_place", self.z.dtype)
        gradient(self.z[i], *(array[i] for array in own), j.start, j.stop)

    def _add(self, dw: Array, j: slice) -> None:
        dw[j] += self.z[:, j].T @ self.h


def log_prob_forward(
    h: Array,
    w: Array,
    *,
    targets: Array,
    mask: Array | None = None,
    temperature: float = 1.0,
    block: tuple[int, int] = (256, 4096),
) -> tuple[Array, LogProbSaved]:
    """As `refimpl.ops.log_prob_forward`, by kernels of Numba."""
    expect_real(h=h, w=w)
    check_log_prob(h, w, targets, temperature, block)
    rows, targets, weight = counted_rows(h, targets, mask, 1.0, w)
    lse, chosen = empty(weight.shape, h), empty(weight.shape, h)
    for chunk in Chunk.all(rows, w, float(temperature), block):
        lse[chunk.rows] = chunk.lse()
        chosen[chunk.rows] = chunk.z[np.arange(chunk.z.shape[0]), targets[chunk.rows]]
    y = weight * (chosen - lse)  # (log_prob.5)
    saved = LogProbSaved(rows.reshape(h.shape), w, lse, targets, weight, float(temperature), block)
    return y.reshape(h.shape[:-1]), saved


def log_prob_backward(dy: Array, saved: LogProbSaved) -> tuple[Array, Array]:
    """As `refimpl.ops.log_prob_backward`, by kernels of Numba."""
    h, w, lse, targets, mask, temperature, block = saved
    expect_real(h=h, dy=dy)
    expect("dy", dy, "(…)", tuple(h.shape[:-1]))
    rows, weight = rows_of(h), -dy.reshape(-1) * mask
    dh, dw = empty(h.shape, h), empty(w.shape, h)
    out = rows_of(dh)
    for chunk in Chunk.all(rows, w, temperature, block):
        by_token = lse, mask, weight, targets
        chunk.gradient(by_token, out[chunk.rows], dw, again=True)
    return dh, dw


def counted_rows(
    h: Array, targets: Array, mask: Array | None, normaliser: float | None, w: Array
) -> tuple[Array, Array, Array]:
    """``h`` as [M, D], 0 where the mask is; targets [M]; mask / normaliser [M]. Arguments as
    `refimpl.ops.log_prob_forward`, ``w`` [W, D]."""
    targets, weight = token_weights(h, targets, mask, normaliser, w.shape[0])
    targets, weight = targets.reshape(-1), weight.reshape(-1)
    rows = ready(rows_of(h))
    if mask is not None:
        rows = fill((weight != 0)[:, None], rows, 0.0)  # absent, NaN included
    return rows, targets, weight
