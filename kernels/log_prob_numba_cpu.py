"""The output head for a CPU: logits of a block of tokens, their softmax and both gradients.

Tokens lie beside each other, in panels: so the logits of a token's whole vocabulary are a column,
and what is done to it is done to as many tokens as a vector has numbers. The reference has the
logits, the shifted ones, their exponentials and probabilities, each written to memory and read
again. Here a block of logits is made, and its softmax begun, while it is in the cache; the
gradient takes its place, and is a factor of two products as it lies.

Letters: m tokens, P panels of them, D numbers of a hidden state, W entries of the vocabulary.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .common_numba_cpu import (
    SAME,
    SOME,
    Ids2,
    In2,
    In3,
    Int,
    Out2,
    Out3,
    Real,
    exp_or_zero,
    whole_vectors,
)
from .products_numba_cpu import (
    SLAB,
    empty_panels,
    factor,
    multiply_far,
    multiply_slab,
    outer_products,
    pack,
    put_row,
    unpack_rows,
    width_of,
)


def put_hidden(panels: Out3, columns: Out3, h: In2, first: Int, last: Int) -> None:
    """The panels first … last of ``panels`` [P, D, WIDTH], of the tokens ``h`` [m, D], and of
    ``columns`` [⌈D / WIDTH⌉, m, WIDTH], panels of its columns, the rows of the same tokens."""
    width = width_of(panels)
    for panel in range(first, last):
        start = panel * width
        stop = min(start + width, h.shape[0])
        pack(panels[panel], h[start:stop])
        for row in range(start, stop):
            put_row(columns, row, h[row])


def logits(
    z: Out3, largest: Out2, total: Out2, h: In3, w: In2, first: Int, last: Int, temperature: Real
) -> None:
    """``z`` [P, W, WIDTH] of the entries first … last, from ``h`` [P, D, WIDTH] and ``w`` [W, D];
    their ``largest`` and their sum of exponentials, ``total`` [P, WIDTH]."""
    whole_vectors()
    multiply_far(z[:, first:last], factor(w[first:last]), h, False)
    for panel in range(z.shape[0]):
        if temperature != 1:
            for entry in range(first, last):
                row = z[panel, entry]
                for lane in range(row.size):
                    row[lane] /= temperature  # (log_prob.1)
        statistics(largest[panel], total[panel], z[panel, first:last])


@njit(**SAME)
def statistics(largest, total, z):
    """Of each column of z [n, WIDTH]."""
    whole_vectors()
    width = width_of(z)
    shift, part = np.empty(width, z.dtype), np.empty(width, z.dtype)
    sums = np.zeros(width)
    shift[:] = -np.inf
    for entry in range(z.shape[0]):
        row = z[entry]
        for lane in range(width):
            shift[lane] = row[lane] if row[lane] > shift[lane] else shift[lane]
    for lane in range(width):
        largest[lane] = shift[lane]
        shift[lane] = shift[lane] if shift[lane] > -np.inf else 0
    for begin in range(0, z.shape[0], SOME):
        part[:] = 0
        for entry in range(begin, min(begin + SOME, z.shape[0])):
            row = z[entry]
            for lane in range(width):
                part[lane] += exp_or_zero(row[lane] - shift[lane])
        for lane in range(width):
            sums[lane] += part[lane]
    for lane in range(width):
        total[lane] = sums[lane]  # (log_prob.2)


def gradient(z: Out3, lse: In2, weight: In2, targets: Ids2, first: Int, last: Int) -> None:
    """The logits of the entries first … last become weight (e^(z − lse) − one-hot(target)); of each
    token, [P, WIDTH], are ``lse``, ``weight`` and ``targets``."""
    whole_vectors()
    width = width_of(z)
    for panel in range(z.shape[0]):
        own, by = lse[panel], weight[panel]
        of_target = np.zeros(width, z.dtype)
        for lane in range(width):
            target = targets[panel, lane]
            if first <= target < last:
                of_target[lane] = exp_or_zero(z[panel, target, lane] - own[lane])
        for entry in range(first, last):
            row = z[panel, entry]
            for lane in range(width):
                row[lane] = by[lane] * exp_or_zero(row[lane] - own[lane])  # (log_prob.6)
        for lane in range(width):
            target = targets[panel, lane]
            if first <= target < last:
                z[panel, target, lane] = by[lane] * (of_target[lane] - 1)  # (log_prob.7)


def hidden_gradient(dh: Out2, dz: In3, w: In2, start: Int, stop: Int) -> None:
    """The columns start … stop of ``dh`` [m, D], dz w, of ``dz`` [P, W, WIDTH]."""
    panels = empty_panels(dz.shape[0], stop - start, dh)
    for i in range(0, stop - start, SLAB):
        multiply_slab(panels[:, i : i + SLAB], w, start + i, dz, False, w[:0])  # (log_prob.8)
    unpack_rows(dh[:, start:stop], panels)


def weight_gradient(dw: Out2, dz: In3, columns: Out3, first: Int, last: Int, add: Int) -> None:
    """The rows first … last of ``dw`` [W, D], dzᵀ h, are written, or added to if ``add``.
    ``columns`` is only read."""
    outer_products(dw[first:last], dz[:, first:last], columns, add != 0)  # (log_prob.9)
