"""Flash attention in Numba CUDA: what flash_attention.cu does, on the same arguments, for reading.

A block takes one query, or in `flash_attention_backward_keys` one key. It meets the other side some
at a time, as many as it has threads, in two steps: first **a thread takes a key** (or a query) and
makes its weight, which goes into shared memory; then **a thread takes a column** of the result and
adds up that column of all of them, times their weights. Each barrier stands between such steps: a
weight is read only when its thread has written it, and written anew only when all have read it. So
the probabilities are never held but for one block of them, and nobody adds to what another thread
adds to: no atomics, the same bits in every run.

The host gives a block at least as many threads as the widest row has columns, 256 at most. Arrays
are flat: q [B, T, H, X], k [B, S, 1 or H, X], v [B, S, 1 or H, V], o and do [B, T, H, V], lse and
row_sum [B, H, T]. key_mask and segments [B, S] are read if ``masked``. Query t stands at position
S − T + t. Derivation: derivations/flash_attention.md.
"""

import math

from .common_numba_cuda import (
    WARP,
    CPointer,
    block_max,
    block_sum,
    cuda,
    finite,
    int32,
    int64,
    uint8,
    warp_sum,
)

MOST = 256  # threads of a block, and so keys, queries or columns at a time
FEW = 8  # terms of a sum that are summed first


@cuda.jit(device=True, inline="always")
def row_at(batch, position, positions, head, heads):
    """Which row of an array [B, positions, heads, width] this is; 1 head serves all."""
    return (batch * positions + position) * heads + (head if heads > 1 else 0)


@cuda.jit(device=True, inline="always")
def sees(key_mask, segments, batch, position, s, keys, causal, masked):
    """Whether the query at ``position`` sees key s."""
    shown = not causal or s <= position
    if masked:
        key, own = batch * keys + s, batch * keys + max(position, 0)
        shown = shown and key_mask[key] != 0 and segments[key] == segments[own]
    return shown


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals, flags = CPointer(real), CPointer(uint8)
    ids = CPointer(int64)

    @cuda.jit(device=True, inline="always")
    def dot(a, a_row, b, b_row, width):
        """Σ_i a[a_row, i] b[b_row, i], by one thread. Its neighbours read other rows, so that a
        warp's read covers many lines of memory: plain, not fast. A few terms are summed first: the
        long sum is rounded less often."""
        total = real(0)
        for first in range(0, width, FEW):
            few = real(0)
            for i in range(first, min(first + FEW, width)):
                few += a[a_row * width + i] * b[b_row * width + i]
            total += few
        return total

    def flash_attention_forward(
        o: reals,
        lse: reals,
        q: reals,
        k: reals,
        v: reals,
        key_mask: flags,
        segments: ids,
        queries: int32,
        keys: int32,
        heads: int32,
        key_heads: int32,
        value_heads: int32,
        key_width: int32,
        value_width: int32,
        scale: real,
        causal: int32,
        masked: int32,
    ):
        """o = softmax(scale q kᵀ + mask) v, and lse, the log of the softmax's denominator. Grid: a
        block a query of a head, in lse's order.

        The softmax is online: after some keys, ``total`` and ``numerator`` are sums of
        e^(score − largest) for the largest score so far; when a larger one comes, both shrink by
        ``decay``. A thread has the total of its own keys, and the numerator of its own column.
        """
        part = cuda.shared.array(WARP, real)
        weight = cuda.shared.array(MOST, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        row = cuda.blockIdx.x  # (batch · H + h) · T + t
        t, h = row % queries, row // queries % heads
        batch = row // queries // heads
        position = t + keys - queries
        own = row_at(batch, t, queries, h, heads)
        end = min(position + 1, keys) if causal else keys  # behind it, no key is seen
        largest, seen = -real(math.inf), real(0)
        total, numerator = real(0), real(0)
        for first in range(0, end, threads):
            s = first + thread  # this thread's key
            score = -real(math.inf)
            if s < end and sees(key_mask, segments, batch, position, s, keys, causal, masked):
                key = row_at(batch, s, keys, h, key_heads)
                score = scale * dot(q, own, k, key, key_width)
                seen = real(1)
            larger = max(largest, block_max(part, score))
            # from −∞, or from ∞, nothing can be taken away: such scores give 0, or ∞ and then NaN
            shift = larger if larger - larger == real(0) else real(0)
            decay = math.exp(largest - shift)  # (flash_attention.1)
            # block_max had barriers: all threads are done with the weights of earlier keys
            weight[thread] = math.exp(score - shift)
            total = total * decay + weight[thread]  # (flash_attention.2)
            cuda.syncthreads()  # below, each thread reads what all others wrote
            numerator *= decay
            if thread < value_width:
                for j in range(min(threads, end - first)):
                    value = row_at(batch, first + j, keys, h, value_heads)
                    numerator += weight[j] * v[value * value_width + thread]  # (flash_attention.3)
            largest = larger
        total = block_sum(part, total)
        if block_max(part, seen) > real(0):
            total = finite(total)  # NaN where scores overflowed
        else:
            largest, total = real(0), real(1)  # a query that sees nothing: o = 0
        if thread < value_width:
            o[own * value_width + thread] = numerator / total
        if thread == 0:
            lse[row] = largest + math.log(total)  # (flash_attention.4)

    def flash_attention_row_sum(
        row_sum: reals,
        dout: reals,
        o: reals,
        rows: int64,
        queries: int32,
        heads: int32,
        value_width: int32,
    ):
        """row_sum = Σ_v do ∘ o of each of the B·T·H rows. Grid: a warp per row, so no barrier is
        needed: a warp's threads go on together."""
        row = cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
        if row < rows:
            total = real(0)
            for i in range(cuda.threadIdx.x % WARP, value_width, WARP):
                total += dout[row * value_width + i] * o[row * value_width + i]
            total = warp_sum(total)  # (flash_attention.5)
            h, position = row % heads, row // heads
            if cuda.threadIdx.x % WARP == 0:
                t, batch = position % queries, position // queries
                row_sum[(batch * heads + h) * queries + t] = total

    def flash_attention_backward_keys(
        dk: reals,
        dv: reals,
        dout: reals,
        q: reals,
        k: reals,
        v: reals,
        lse: reals,
        row_sum: reals,
        key_mask: flags,
        segments: ids,
        queries: int32,
        keys: int32,
        heads: int32,
        key_heads: int32,
        value_heads: int32,
        key_width: int32,
        value_width: int32,
        scale: real,
        causal: int32,
        masked: int32,
    ):
        """dk and dv. Grid: a block per key, of each head; or, if the queries' heads share keys or
        values, a block per key, which takes the heads in turn: their sum is one gradient."""
        weight, slope = cuda.shared.array(MOST, real), cuda.shared.array(MOST, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        s, part = cuda.blockIdx.x % keys, cuda.blockIdx.x // keys
        alone = key_heads == heads and value_heads == heads
        together = 1 if alone else heads  # heads of this block
        batch, head = part * together // heads, part * together % heads
        offset = keys - queries
        begin = max(s - offset, 0) if causal else 0  # earlier queries stand before this key
        dk_sum, dv_sum = real(0), real(0)  # of this thread's column
        for h in range(head, head + together):
            key = row_at(batch, s, keys, h, key_heads)
            value = row_at(batch, s, keys, h, value_heads)
            for first in range(begin, queries, threads):
                t = first + thread  # this thread's query
                p, ds = real(0), real(0)
                if t < queries and sees(
                    key_mask, segments, batch, t + offset, s, keys, causal, masked
                ):
                    own = row_at(batch, t, queries, h, heads)
                    at = (batch * heads + h) * queries + t
                    score = scale * dot(q, own, k, key, key_width)
                    p = math.exp(score - lse[at])  # (flash_attention.6)
                    dp = dot(dout, own, v, value, value_width)
                    ds = scale * p * (dp - row_sum[at])  # (flash_attention.7)
                weight[thread], slope[thread] = p, ds
                cuda.syncthreads()  # below, each thread reads what all others wrote
                for j in range(min(threads, queries - first)):
                    own = row_at(batch, first + j, queries, h, heads)
                    if thread < key_width:
                        dk_sum += slope[j] * q[own * key_width + thread]  # (flash_attention.8)
                    if thread < value_width:
                        dv_sum += weight[j] * dout[own * value_width + thread]
                cuda.syncthreads()  # above, for the next queries, all is written anew
            last = h == heads - 1
            if key_heads == heads or last:
                if thread < key_width:
                    dk[key * key_width + thread] = dk_sum
                dk_sum = real(0)
            if value_heads == heads or last:
                if thread < value_width:
                    dv[value * value_width + thread] = dv_sum
                dv_sum = real(0)

    def flash_attention_backward_queries(
        dq: reals,
        dout: reals,
        q: reals,
        k: reals,
        v: reals,
        lse: reals,
        row_sum: reals,
        key_mask: flags,
        segments: ids,
        queries: int32,
        keys: int32,
        heads: int32,
        key_heads: int32,
        value_heads: int32,
        key_width: int32,
        value_width: int32,
        scale: real,
        causal: int32,
        masked: int32,
    ):
        """dq. Grid: a block per query of a head, in lse's order."""
        slope = cuda.shared.array(MOST, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        row = cuda.blockIdx.x  # (batch · H + h) · T + t
        t, h = row % queries, row // queries % heads
        batch = row // queries // heads
        position = t + keys - queries
        own = row_at(batch, t, queries, h, heads)
        end = min(position + 1, keys) if causal else keys
        dq_sum = real(0)  # of this thread's column
        for first in range(0, end, threads):
            s = first + thread  # this thread's key
            ds = real(0)
            if s < end and sees(key_mask, segments, batch, position, s, keys, causal, masked):
                score = scale * dot(q, own, k, row_at(batch, s, keys, h, key_heads), key_width)
                p = math.exp(score - lse[row])  # (flash_attention.6)
                value = row_at(batch, s, keys, h, value_heads)
                dp = dot(dout, own, v, value, value_width)
                ds = scale * p * (dp - row_sum[row])  # (flash_attention.7)
            slope[thread] = ds
            cuda.syncthreads()  # below, each thread reads what all others wrote
            if thread < key_width:
                for j in range(min(threads, end - first)):
                    key = row_at(batch, first + j, keys, h, key_heads)
                    dq_sum += slope[j] * k[key * key_width + thread]  # (flash_attention.8)
            cuda.syncthreads()  # above, for the next keys, all is written anew
        if thread < key_width:
            dq[own * key_width + thread] = dq_sum

    return (
        flash_attention_forward,
        flash_attention_row_sum,
        flash_attention_backward_keys,
        flash_attention_backward_queries,
    )
