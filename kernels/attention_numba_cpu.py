"""Attention for a CPU, one head at a time, in memory linear in the sequence.

The reference keeps the scores of all heads, [B, H, T, S], and makes six such arrays on its way.
Here the queries of a block are the columns of panels (products_numba_cpu.py), and their scores stay
in the cache: scores [keys, queries] are keys by queries, outputs are valuesᵀ by probabilities, and
what one product makes is the next one's factor. Keys that the order of positions hides from a whole
block are not multiplied.

The forward takes a panel of queries and all its keys. The backward takes a block of keys, whose dk
and dv are done when all queries that see them were there, and adds to dq.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .common_numba_cpu import (
    Bools1,
    Ids1,
    In1,
    In2View,
    Int,
    Out1,
    Out2View,
    Real,
    exp,
    whole_vectors,
)
from .products_numba_cpu import (
    EXACT,
    empty_panels,
    empty_tiles,
    factor,
    multiply,
    multiply_tiles,
    pack,
    put_tiles,
    turned,
    unpack_rows,
    width_of,
)

KEYS = 512  # of a block of the backward
PAIR = 2  # panels of queries that the backward handles at a time
SOME = 64  # keys that are summed in their own type; such sums are added in float64
MANY = 4096  # keys per product of values, likewise


@njit(**EXACT)
def contiguous(x):
    """A copy of x [n, m] without gaps."""
    copy = np.empty(x.shape, x.dtype)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            copy[i, j] = x[i, j]
    return copy


@njit(**EXACT)
def pack_scaled(panel, x, scale):
    """A panel [K, WIDTH] whose columns are the rows of x [n, K] times ``scale``; zeros beyond."""
    pack(panel, x)
    times(panel.reshape(-1), scale)


@njit(**EXACT)
def times(x, scale):
    """x [n] times ``scale``, in its place."""
    for i in range(x.size):
        x[i] *= scale


@njit(**EXACT)
def hide(scores, first, limit, masked, key_mask, segments, segment):
    """−∞ in the scores [keys, WIDTH] of the keys from ``first`` on where a query (column) may not
    see a key: beyond its ``limit``, or if ``masked``, hidden by ``key_mask`` or of another segment
    than its ``segment``."""
    keys, begin = scores.shape[0], max(0, limit[0] + 1 - first)  # every query sees those before
    for i in range(begin, keys):
        row, key = scores[i], first + i
        for lane in range(row.size):
            if key > limit[lane]:
                row[lane] = -np.inf
    if masked:
        for i in range(keys):
            row, key = scores[i], first + i
            for lane in range(row.size):
                if not key_mask[key] or segments[key] != segment[lane]:
                    row[lane] = -np.inf


@njit(**EXACT)
def put_limits(limit, segment, first, rows, per_position, behind, keys, masked, segments):
    """For the query rows from ``first`` on: ``limit``, the last key that each may see, and its
    ``segment``. Lanes beyond the last of ``rows`` repeat it."""
    offset = keys - rows // per_position
    for lane in range(limit.size):
        position = min(first + lane, rows - 1) // per_position
        limit[lane] = behind + position
        segment[lane] = segments[offset + position] if masked and offset >= 0 else 0


@njit(**EXACT)
def soften(scores, shift, total):
    """Scores [keys, WIDTH] become e^(score − shift), whose sums are ``total``; ``shift`` is the
    largest, or 0 if that is not finite."""
    whole_vectors()
    shift[:] = -np.inf
    for key in range(scores.shape[0]):
        row = scores[key]
        for lane in range(row.size):
            shift[lane] = row[lane] if row[lane] > shift[lane] else shift[lane]
    for lane in range(shift.size):
        shift[lane] = shift[lane] if -np.inf < shift[lane] < np.inf else 0
    total[:] = 0
    part = np.empty(shift.size, shift.dtype)
    for begin in range(0, scores.shape[0], SOME):
        part[:] = 0
        for key in range(begin, min(begin + SOME, scores.shape[0])):
            row = scores[key]
            for lane in range(row.size):
                p = exp(row[lane] - shift[lane])
                row[lane] = p
                part[lane] += p  # (flash_attention.2)
        for lane in range(part.size):
            total[lane] += part[lane]


@njit(**EXACT)
def put_row_sums(row_sum, do, o):
    """row_sum [rows] = Σ_v do ∘ o."""
    for row in range(o.shape[0]):
        total = 0.0
        for i in range(o.shape[1]):
            total += do[row, i] * o[row, i]
        row_sum[row] = total  # (flash_attention.5)


@njit(**EXACT)
def put_gradients(scores, ds, lse, row_sum):
    """Scores [keys, WIDTH] become probabilities, and ``ds``, their gradients, those of scores."""
    whole_vectors()
    for key in range(scores.shape[0]):
        row, drow = scores[key], ds[key]
        for lane in range(row.size):
            p = exp(row[lane] - lse[lane])  # (flash_attention.6)
            row[lane] = p
            drow[lane] = p * (drow[lane] - row_sum[lane])  # (flash_attention.7)


@njit(**EXACT)
def blind(limit, masked, key_mask, segments, segment):
    """Whether a query with this limit and segment sees no key."""
    end = min(limit + 1, key_mask.size)
    if not masked:
        return end <= 0
    seen = 0
    for key in range(end):
        seen += key_mask[key] and segments[key] == segment
    return seen == 0


@njit(**EXACT)
def pack_columns(x, rows, scale):
    """Panels [P, rows, WIDTH] that have the columns of x [n, m] times ``scale``; zeros beyond."""
    width = width_of(x)
    panels = empty_panels(-(-x.shape[1] // width), rows, x)
    panels[:] = 0
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], width):
            part, out = x[row, start : start + width], panels[start // width, row]
            for i in range(part.size):
                out[i] = part[i] * scale
    return panels


@njit(**EXACT)
def unpack_columns(x, panels):
    """x [n, m] from panels that have its columns."""
    width = panels.shape[2]
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], width):
            out, part = x[row, start : start + width], panels[start // width, row]
            for i in range(out.size):
                out[i] = part[i]


def attention_forward(
    o: Out2View,
    lse: Out1,
    q: In2View,
    k: In2View,
    v: In2View,
    scale: Real,
    start: Int,
    stop: Int,
    per_position: Int,
    behind: Int,
    masked: Int,
    key_mask: Bools1,
    segments: Ids1,
) -> None:
    """Of one head, the rows start … stop of ``o`` [rows, V] and ``lse`` [rows], from ``q``
    [rows, X], ``k`` [S, X] and ``v`` [S, V].

    Row r is of position p = r // per_position and sees the keys up to behind + p; if ``masked``,
    only those that ``key_mask`` shows and that are of its position's segment (both [S]). X is the
    width of queries and keys, V of values, S the number of keys.
    """
    (keys, values), width = v.shape, width_of(q)
    query, out = empty_panels(1, q.shape[1], q), empty_panels(1, values, q)
    all_scores = empty_panels(1, keys, q)
    tiles = empty_tiles(values, keys, v)
    put_tiles(tiles, contiguous(v), 0, keys, 0, values)
    limit, segment = np.empty(width, np.int64), np.empty(width, np.int64)
    shift, total = np.empty(width, q.dtype), np.empty(width)
    value_sums = np.empty((values, width))
    for first in range(start, stop, width):
        count = min(width, stop - first)
        put_limits(limit, segment, first, q.shape[0], per_position, behind, keys, masked, segments)
        end = min(keys, limit[count - 1] + 1)
        scores = all_scores[0, :end]  # without gaps, as the compiler must see for vectors
        pack_scaled(query[0], q[first : first + count], scale)
        multiply(all_scores[:, :end], factor(k[:end]), query, False)
        hide(scores, 0, limit, masked, key_mask, segments, segment)
        soften(scores, shift, total)
        for lane in range(count):
            if blind(limit[lane], masked, key_mask, segments, segment[lane]):
                total[lane], lse[first + lane] = 1, 0
            elif total[lane] < np.inf:
                lse[first + lane] = shift[lane] + math.log(total[lane])  # (flash_attention.4)
            else:
                total[lane], lse[first + lane] = np.nan, np.nan
        value_sums[:] = 0
        for begin in range(0, end, MANY):
            block = slice(begin, min(begin + MANY, end))
            multiply_tiles(out, tiles[:, block], all_scores[:, block], False)  # (flash_attention.3)
            for i in range(values):
                for lane in range(width):
                    value_sums[i, lane] += out[0, i, lane]
        for i in range(values):
            for lane in range(width):
                out[0, i, lane] = value_sums[i, lane] / total[lane]
        unpack_rows(o[first : first + count], out)


def attention_backward(
    dq: Out2View,
    dk: Out2View,
    dv: Out2View,
    do: In2View,
    o: In2View,
    lse: In1,
    q: In2View,
    k: In2View,
    v: In2View,
    scale: Real,
    per_position: Int,
    behind: Int,
    masked: Int,
    key_mask: Bools1,
    segments: Ids1,
) -> None:
    """Writes ``dq``, ``dk`` and ``dv`` of one head: shapes as in the forward, gradients as their
    arrays."""
    (rows, x), (keys, values) = q.shape, v.shape
    width = width_of(q)
    panels = -(-rows // width)
    queries, do_panels = empty_panels(panels, x, q), empty_panels(panels, values, q)
    dq_panels = empty_panels(panels, x, q)
    dq_panels[:] = 0
    for panel in range(panels):
        pack_scaled(queries[panel], q[panel * width : (panel + 1) * width], scale)
        pack(do_panels[panel], do[panel * width : (panel + 1) * width])
    padded = panels * width
    limit, segment = np.empty(padded, np.int64), np.empty(padded, np.int64)
    put_limits(limit, segment, 0, rows, per_position, behind, keys, masked, segments)
    padded_lse, row_sum = np.zeros(padded, q.dtype), np.zeros(padded, q.dtype)
    for row in range(rows):
        padded_lse[row] = lse[row]
    put_row_sums(row_sum, do, o)
    query_columns, do_columns = (
        pack_columns(q, padded, scale),
        pack_columns(do, padded, q.dtype.type(1)),
    )
    both = empty_panels(2 * PAIR, KEYS, q).reshape(2, PAIR, KEYS, width)
    for begin in range(0, keys, KEYS):
        k_block, v_block = contiguous(k[begin : begin + KEYS]), contiguous(v[begin : begin + KEYS])
        block = k_block.shape[0]
        tiles = empty_tiles(x, block, k)
        put_tiles(tiles, k_block, 0, block, 0, x)
        dk_columns, dv_columns = (
            empty_panels(query_columns.shape[0], block, q),
            empty_panels(do_columns.shape[0], block, q),
        )
        dk_columns[:], dv_columns[:] = 0, 0
        for first in range(0, panels, PAIR):
            pair = slice(first, min(first + PAIR, panels))
            columns = slice(pair.start * width, pair.stop * width)
            end = min(block, limit[columns.stop - 1] + 1 - begin)
            if end <= 0:
                continue
            scores, ds = both[0, : pair.stop - first, :end], both[1, : pair.stop - first, :end]
            multiply(scores, factor(k_block[:end]), queries[pair], False)
            multiply(ds, factor(v_block[:end]), do_panels[pair], False)
            for panel in range(pair.stop - first):
                lanes = slice((first + panel) * width, (first + panel + 1) * width)
                s, d = both[0, panel, :end], both[1, panel, :end]
                hide(s, begin, limit[lanes], masked, key_mask, segments, segment[lanes])
                put_gradients(s, d, padded_lse[lanes], row_sum[lanes])
            multiply(dv_columns[:, :end], turned(scores), do_columns[:, columns], True)
            multiply(dk_columns[:, :end], turned(ds), query_columns[:, columns], True)
            multiply_tiles(dq_panels[pair], tiles, ds, True)  # (flash_attention.8)
        unpack_columns(dk[begin : begin + block], dk_columns)
        unpack_columns(dv[begin : begin + block], dv_columns)
    times(dq_panels.reshape(-1), scale)
    unpack_rows(dq, dq_panels)
