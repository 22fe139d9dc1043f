"""Log-probabilities from hidden states on kernels/log_prob_numba_cpu.py; as
`refimpl.ops.log_prob`; and what the training loss shares with them.

The logits of a chunk of tokens are whole at a time, in panels: as many as 8 blocks have, or those
of block[0] tokens. What is done to them is cut into tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from ...array import Array, expect, fill
from ...ops.cross_entropy import token_weights
from ...ops.log_prob import check_log_prob
from .compile import kernel, panel_width
from .host import empty, expect_real, ready, rows_of
from .pool import Task, blocks_of, run_kernels

__all__ = ["Chunk", "LogProbSaved", "counted_rows", "log_prob_backward", "log_prob_forward"]

AT_A_TIME = 8  # blocks
TOKENS = 256  # of one task
ENTRIES = 1024  # of the vocabulary, likewise: TOKENS × ENTRIES logits stay in the second cache
MOST_TOKENS, NUMBERS = 512, 256  # of one task of dh: its part of w is turned for each


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
        self.rows, self.dtype = rows, h.dtype
        own = h[rows]
        self.count, width = len(own), panel_width(h.dtype)
        panels = -(-self.count // width)
        self.w = ready(w)
        self.temperature = temperature
        self.h = empty((panels, own.shape[1], width), h)
        self.columns = empty((-(-own.shape[1] // width), self.count, width), h)
        self.z = empty((panels, w.shape[0], width), h)
        self.vocabulary = blocks_of(w.shape[0], min(columns, ENTRIES))
        self.panels = blocks_of(panels, max(1, TOKENS // width))
        put = self._kernel("put_hidden")
        run_kernels([partial(put, self.h, self.columns, own, i.start, i.stop) for i in self.panels])

    @classmethod
    def all(cls, h: Array, w: Array, temperature: float, block: tuple[int, int]) -> Iterator[Chunk]:
        """Those of all tokens [M, D], one after the other."""
        count = max(block[0], AT_A_TIME * block[0] * block[1] // w.shape[0])
        for rows in blocks_of(h.shape[0], count):
            yield cls(rows, h, w, temperature, block[1])

    def lse(self) -> Array:
        """Make the logits; log Σ e^z [m] of each token."""
        panels, _, width = self.z.shape
        shape = len(self.vocabulary), panels, width
        largest, total = empty(shape, self.z), empty(shape, self.z)
        make = self._kernel("logits")
        run_kernels(
            [
                partial(
                    make,
                    *(self.z[i], largest[k, i], total[k, i]),
                    *(self.h[i], self.w, j.start, j.stop, self.temperature),
                )
                for k, j in enumerate(self.vocabulary)
                for i in self.panels
            ]
        )
        highest = largest.max(axis=0)
        shift = np.where(highest > -np.inf, highest, 0)
        with np.errstate(divide="ignore"):  # all −∞
            lse = highest + np.log(np.sum(total * np.exp(largest - shift), axis=0))
        return lse.reshape(-1)[: self.count]

    def of_targets(self, targets: Array) -> Array:
        """The logits [m] of the chunk's ``targets`` [m]."""
        token, width = np.arange(self.count), self.z.shape[2]
        return self.z[token // width, targets, token % width]

    def gradient(self, by_token: tuple[Array, ...], dh: Array, dw: Array) -> None:
        """The logits become weight (softmax − one-hot), times 1 / temperature: ``dh`` [m, D] is
        written, and ``dw`` [W, D], or for a later chunk added to. ``by_token``: lse, weight and
        targets of all tokens."""
        lse, weight, targets = (array[self.rows] for array in by_token)
        weight = weight / self.dtype.type(self.temperature)
        own = tuple(self._by_lane(array) for array in (lse, weight, targets))
        turn = self._kernel("gradient")
        run_kernels(
            [
                partial(turn, self.z[i], *(array[i] for array in own), j.start, j.stop)
                for j in self.vocabulary
                for i in self.panels
            ]
        )
        run_kernels(self._hidden_gradient(dh) + self._weight_gradient(dw))

    def _hidden_gradient(self, dh: Array) -> list[Task]:
        width, write = self.z.shape[2], self._kernel("hidden_gradient")
        return [
            partial(write, dh[i.start * width : i.stop * width], self.z[i], self.w, j.start, j.stop)
            for i in blocks_of(len(self.z), max(1, MOST_TOKENS // width))
            for j in blocks_of(dh.shape[1], NUMBERS)
        ]

    def _weight_gradient(self, dw: Array) -> list[Task]:
        write, add = self._kernel("weight_gradient"), int(self.rows.start > 0)
        return [
            partial(write, dw, self.z, self.columns, j.start, j.stop, add) for j in self.vocabulary
        ]

    def _by_lane(self, x: Array) -> Array:
        """x [m] as [P, WIDTH]; zeros beyond."""
        panels, _, width = self.z.shape
        found = np.zeros(panels * width, x.dtype)
        found[: self.count] = x
        return found.reshape(panels, width)

    def _kernel(self, name: str) -> Callable[..., None]:
        return kernel("log_prob", name, self.dtype)


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
        chosen[chunk.rows] = chunk.of_targets(targets[chunk.rows])
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
        chunk.lse()  # the logits again
        chunk.gradient((lse, weight, targets), out[chunk.rows], dw)
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
