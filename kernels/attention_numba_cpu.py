"""Attention for a CPU, one head at a time, in memory linear in the sequence.

The reference keeps the scores of all heads, [B, H, T, S], and makes six such arrays on its way.
Here queries are the columns of panels (products_numba_cpu.py), and their scores with a block of
keys stay in the cache: scores [keys, queries] are keys by queries, outputs are valuesᵀ by
probabilities, and what one product makes is the next one's factor. Keys that the order of positions
hides from a whole panel are not multiplied.

Both directions take one block of keys after the other, with all panels of the task. In the forward
each panel has a running largest score, and sums that are brought along when it grows. In the
backward a block's dk and dv are done when all panels were there, which add to dq.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .common_numba_cpu import (
    CHECKED,
    SOME,
    Bools1,
    Ids1,
    In1,
    In2View,
    Int,
    Out1,
    Out2View,
    Real,
    exp_or_zero,
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
    put_row,
    put_tiles,
    turned,
    unpack_rows,
    width_of,
)

KEYS = 512  # of a block
SIDE = 4  # panels of queries at a time


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
    keys = scores.shape[0]
    for lane in range(limit.size):
        for i in range(max(0, limit[lane] + 1 - first), keys):
            scores[i, lane] = -np.inf
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
def soften(scores, largest, total, change):
    """Scores [keys, WIDTH] become e^(score − shift), where ``shift`` is the ``largest`` so far, or
    0 if that is not finite. ``change`` brings sums with the shift before to this one, as it does
    ``total``, to which theirs are added."""
    whole_vectors()
    width = width_of(scores)  # the compiler knows it
    shift, part = np.empty(width, scores.dtype), np.empty(width, scores.dtype)
    shift[:] = largest
    for key in range(scores.shape[0]):
        row = scores[key]
        for lane in range(width):
            shift[lane] = row[lane] if row[lane] > shift[lane] else shift[lane]
    for lane in range(width):
        new, old = shift[lane], largest[lane]
        shift[lane] = new if -np.inf < new < np.inf else 0
        before = old if old < np.inf else 0
        # of no key so far there is nothing to bring, however far
        change[lane] = exp_or_zero(before - shift[lane]) if before > -np.inf else 0
        total[lane] *= change[lane]
        largest[lane] = new
    for begin in range(0, scores.shape[0], SOME):
        part[:] = 0
        for key in range(begin, min(begin + SOME, scores.shape[0])):
            row = scores[key]
            for lane in range(width):
                p = exp_or_zero(row[lane] - shift[lane])
                row[lane] = p
                part[lane] += p  # (flash_attention.2)
        for lane in range(width):
            total[lane] += part[lane]


@njit(**EXACT)
def add_values(sums, change, values):
    """sums [V, WIDTH] times ``change`` [WIDTH], plus ``values`` [V, WIDTH]."""
    for i in range(sums.shape[0]):
        own, more = sums[i], values[i]
        for lane in range(width_of(values)):
            own[lane] = own[lane] * change[lane] + more[lane]


@njit(fastmath={"reassoc"}, boundscheck=CHECKED)
def put_row_sums(row_sum, do, o):
    """row_sum [rows] = Σ_v do ∘ o."""
    for row in range(o.shape[0]):
        total = 0.0
        a, b = do[row], o[row]
        for i in range(a.size):
            total += a[i] * b[i]
        row_sum[row] = total  # (flash_attention.5)


@njit(**EXACT)
def put_gradients(scores, ds, lse, row_sum):
    """Scores [keys, WIDTH] become probabilities, and ``ds``, their gradients, those of scores."""
    whole_vectors()
    for key in range(scores.shape[0]):
        row, drow = scores[key], ds[key]
        for lane in range(width_of(scores)):
            p = exp_or_zero(row[lane] - lse[lane])  # (flash_attention.6)
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
def columns_of(x, rows, scale):
    """Panels [P, rows, WIDTH] that have the columns of x [n, m] times ``scale``; zeros beyond."""
    panels = empty_panels(-(-x.shape[1] // width_of(x)), rows, x)
    for row in range(x.shape[0]):
        put_row(panels, row, x[row])
    panels[:, x.shape[0] :] = 0
    times(panels.reshape(-1), scale)
    return panels


@njit(**EXACT)
def unpack_columns(x, panels):
    """x [n, m] from panels that have its columns."""
    width = width_of(x)
    whole = x.shape[1] // width
    for row in range(x.shape[0]):
        for panel in range(whole):
            out, part = x[row, panel * width :], panels[panel, row]
            for i in range(width):
                out[i] = part[i]
        for i in range(whole * width, x.shape[1]):
            x[row, i] = panels[whole, row, i - whole * width]


@njit(**EXACT)
def multiply_seen(c, a, b, ends):
    """c [P, keys, WIDTH] = a [keys, K] by b [P, K, WIDTH], of panel i the first ends[i] keys;
    ``ends`` ascend. Keys that several panels see are multiplied by all of them at once."""
    start = 0
    for i in range(ends.size):
        if start < ends[i]:
            seen = slice(start, ends[i])
            multiply(c[i:, seen], factor(a[seen]), b[i:], False)
            start = ends[i]


@njit(**EXACT)
def multiply_tiles_seen(c, tiles, b, ends, add):
    """c [P, K, WIDTH] = wᵀ b of w [keys, K], in tiles, and b [P, keys, WIDTH], likewise; added to c
    if ``add``. A panel that sees no key is left alone."""
    start = 0
    for i in range(ends.size):
        if start < ends[i]:
            seen = b[i:, start : ends[i]]
            multiply_tiles(c[i:], tiles[:, start:], seen, add or start > 0)
            start = ends[i]


@njit(**EXACT)
def multiply_turned_seen(c, p, b, ends):
    """Adds to c [P, keys, WIDTH] each panel of p [n, keys, WIDTH], turned, by its rows of b
    [P, n WIDTH, WIDTH], likewise."""
    start = 0
    for i in range(ends.size):
        if start < ends[i]:
            seen = slice(start, ends[i])
            multiply(c[:, seen], turned(p[i:, seen]), b[:, i * width_of(p) :], True)
            start = ends[i]


@njit(**EXACT)
def put_ends(ends, limits, begin, block, width):
    """How many of the ``block`` keys from ``begin`` on some row of each panel sees; ``limits`` are
    those of its rows, and maybe of fewer in the last panel."""
    for i in range(ends.size):
        last = min((i + 1) * width, limits.size) - 1
        ends[i] = max(0, min(block, limits[last] + 1 - begin))


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
    panels, x = -(-(stop - start) // width), q.shape[1]
    queries, padded = empty_panels(panels, x, q), panels * width
    for panel in range(panels):
        first = start + panel * width
        pack_scaled(queries[panel], q[first : min(first + width, stop)], scale)
    limit, segment = np.empty(padded, np.int64), np.empty(padded, np.int64)
    put_limits(limit, segment, start, q.shape[0], per_position, behind, keys, masked, segments)
    largest, change = np.full(padded, -np.inf, q.dtype), np.empty((SIDE, width), q.dtype)
    total, sums = np.zeros(padded), np.zeros((panels, values, width))
    tiles, out = empty_tiles(values, KEYS, v), empty_panels(SIDE, values, q)
    all_scores, all_ends = empty_panels(SIDE, KEYS, q), np.empty(SIDE, np.int64)
    for begin in range(0, min(keys, limit[stop - start - 1] + 1), KEYS):
        k_block, v_block = contiguous(k[begin : begin + KEYS]), contiguous(v[begin : begin + KEYS])
        block = v_block.shape[0]
        put_tiles(tiles, v_block, 0, block, 0, values)
        for first in range(0, panels, SIDE):
            ends = all_ends[: min(SIDE, panels - first)]
            put_ends(ends, limit[first * width : stop - start], begin, block, width)
            some, scores = slice(first, first + ends.size), all_scores[: ends.size]
            multiply_seen(scores, k_block, queries[some], ends)
            for i in range(ends.size):
                if ends[i] > 0:
                    lanes = slice((first + i) * width, (first + i + 1) * width)
                    s = all_scores[i, : ends[i]]  # without gaps, as the compiler must see
                    hide(s, begin, limit[lanes], masked, key_mask, segments, segment[lanes])
                    soften(s, largest[lanes], total[lanes], change[i])
            multiply_tiles_seen(out[: ends.size], tiles, scores, ends, False)  # (flash_attention.3)
            for i in range(ends.size):
                if ends[i] > 0:
                    add_values(sums[first + i], change[i], out[i])
    for panel in range(panels):
        first = start + panel * width
        count = min(width, stop - first)
        for lane in range(count):
            place = panel * width + lane
            if blind(limit[place], masked, key_mask, segments, segment[place]):
                total[place], lse[first + lane] = 1, 0
            elif total[place] < np.inf:
                shift = largest[place] if -np.inf < largest[place] < np.inf else 0
                lse[first + lane] = shift + math.log(total[place])  # (flash_attention.4)
                total[place] = 1 / total[place]
            else:
                total[place], lse[first + lane] = np.nan, np.nan
        inverse = total[first - start :]
        for i in range(values):
            row, own = out[0, i], sums[panel, i]
            for lane in range(width):
                row[lane] = own[lane] * inverse[lane]
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
        columns_of(q, padded, scale),
        columns_of(do, padded, q.dtype.type(1)),
    )
    all_ends = np.empty(SIDE, np.int64)
    both = empty_panels(2 * SIDE, KEYS, q).reshape(2, SIDE, KEYS, width)
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
        for first in range(0, panels, SIDE):
            count = min(SIDE, panels - first)
            some, ends = slice(first, first + count), all_ends[:count]
            put_ends(ends, limit[first * width :], begin, block, width)
            multiply_seen(both[0, :count], k_block, queries[some], ends)
            multiply_seen(both[1, :count], v_block, do_panels[some], ends)
            for i in range(count):
                lanes = slice((first + i) * width, (first + i + 1) * width)
                s, d = both[0, i, : ends[i]], both[1, i, : ends[i]]
                hide(s, begin, limit[lanes], masked, key_mask, segments, segment[lanes])
                put_gradients(s, d, padded_lse[lanes], row_sum[lanes])
            # (flash_attention.8)
            multiply_tiles_seen(dq_panels[some], tiles, both[1, :count], ends, True)
            these = slice(first * width, (first + count) * width)
            multiply_turned_seen(dv_columns, both[0, :count], do_columns[:, these], ends)
            multiply_turned_seen(dk_columns, both[1, :count], query_columns[:, these], ends)
        unpack_columns(dk[begin : begin + block], dk_columns)
        unpack_columns(dv[begin : begin + block], dv_columns)
    times(dq_panels.reshape(-1), scale)
    unpack_rows(dq, dq_panels)
