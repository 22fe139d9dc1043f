"""Multi-head latent attention on kernels/mla_numba_cpu.py; as `refimpl.ops.mla`, but that of the
table only ``attention`` is looked up.

A block of tokens goes through all projections, norms and rotations on one thread; then come
attention and the output's product. The backward is the mirror, with all weight gradients at its
end.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...array import Array, expect
from ...ops.choices import Layout
from ...ops.leaves import LEAVES, Leaves, expect_table
from ...ops.mla import MLAOutput, append, check_project, split_cache, value_width
from ...ops.rms_norm import check_rms_norm
from ...ops.rope import check_rope
from .compile import kernel
from .host import empty, expect_real, ready, rows_of, run_products
from .pool import blocks_of, in_turn, run_kernels
from .rope import angles

__all__ = ["MLASaved", "mla_backward", "mla_forward"]

ROWS = 256  # of one task


class Weights(NamedTuple):
    q_a: Array | None  # [A, D]
    q_a_norm: Array | None  # [A]
    q_b: Array  # [H (N+R), A]
    kv_a: Array  # [C+R, D]
    kv_a_norm: Array  # [C]
    kv_b: Array  # [H (N+V), C]
    o: Array  # [D, H V]


class Settings(NamedTuple):
    heads: int
    nope: int  # N
    latent: int  # C
    eps: float
    cos: Array  # [B·T or T, R/2]
    sin: Array
    interleaved: bool


class MLASaved(NamedTuple):
    """What `mla_forward` keeps for `mla_backward`. Without query compression the arrays of A
    numbers are empty."""

    x: Array  # [M, D]
    a: Array  # [M, A]: the query's latent, before its norm
    a_r: Array  # [M]: 1 / rms
    a_normed: Array  # [M, A]
    kv: Array  # [M, C+R]: the latent of keys and values and their rotated part, before either
    c_r: Array  # [M]
    latents: Array  # [B, S, C+R], those of the cache included
    attention: Any
    o: Array  # [M, H V]
    w: Weights
    settings: Settings
    past: int | None  # length of the given cache, None without
    ops: Leaves


def mla_forward(
    x: Array,
    cache: Array | None,
    w_q_a: Array | None,
    w_q_a_norm: Array | None,
    w_q_b: Array,
    w_kv_a: Array,
    w_kv_a_norm: Array,
    w_kv_b: Array,
    w_o: Array,
    *,
    heads: int,
    scale: float,
    eps: float,
    positions: Array,
    inv_freq: Array,
    layout: Layout = "interleaved",
    factor: float = 1.0,
    key_mask: Array | None = None,
    segments: Array | None = None,
    ops: Leaves = LEAVES,
) -> tuple[MLAOutput, MLASaved]:
    """As `refimpl.ops.mla_forward`, by kernels of Numba."""
    expect_table(ops, Leaves)
    w = Weights(w_q_a, w_q_a_norm, w_q_b, w_kv_a, w_kv_a_norm, w_kv_b, w_o)
    expect_real(x=x, cache=cache, **{f"w_{name}": part for name, part in w._asdict().items()})
    nope, c = check_project(x, *w[:5], heads)
    check_rms_norm(np.empty((1, c)), w_kv_a_norm, float(eps))
    w = Weights(*(None if part is None else ready(part) for part in w))
    (b, t, d), rope = x.shape, w_kv_a.shape[0] - c
    value = value_width(w_kv_b, w_o, heads, nope, c, d)
    check_rope(np.empty((b, t, 1, rope), x.dtype), positions, inv_freq, layout)
    cos, sin = angles(positions, inv_freq, factor, x.dtype)
    settings = Settings(heads, nope, c, float(eps), cos, sin, layout == "interleaved")
    rows, m = ready(rows_of(x)), b * t
    width = 0 if w_q_a is None else w_q_b.shape[1]
    a, a_r = empty((m, width), x), empty((m,), x)
    a_normed, kv_a = empty((m, width), x), empty((m, c + rope), x)
    latent, c_r = empty((b, t, c + rope), x), empty((m,), x)
    q = empty((b, t, heads, nope + rope), x)
    written = q.reshape(m, heads, -1), rows_of(latent), a, a_r, a_normed, kv_a, c_r
    project = [
        partial(
            kernel("mla", "project", x.dtype),
            *(array[i] for array in (*written, rows)),
            *project_weights(w),
            *(cos, sin, settings.eps, nope, i.start, settings.interleaved, w_q_a is not None),
        )
        for i in blocks_of(m, ROWS)
    ]
    if cache is not None:
        run_kernels(project)
    latents, past = append(cache, latent)
    latents = ready(latents)
    s = latents.shape[1]
    k = empty((b, s, heads, nope + rope), x)
    kv = empty((b, s, heads, nope + value), x)
    by_row = k.reshape(b * s, heads, -1), kv.reshape(b * s, heads, -1), rows_of(latents)
    expand = [
        partial(kernel("mla", "expand", x.dtype), *(array[i] for array in by_row), w.kv_b, nope)
        for i in blocks_of(b * s, ROWS)
    ]
    run_kernels(expand if cache is not None else in_turn(project, expand))
    o, attention_saved = ops.attention.forward(
        q, k, kv[..., nope:], scale=scale, key_mask=key_mask, segments=segments
    )
    y, o = empty(x.shape, x), o.reshape(m, -1)
    run_products((o, w_o.T, rows_of(y)))  # (mla.9)
    saved = MLASaved(
        rows, a, a_r, a_normed, kv_a, c_r, latents, attention_saved, o, w, settings, past, ops
    )
    return MLAOutput(y, latents), saved


def project_weights(w: Weights) -> tuple[Array, ...]:
    """Of the kernels' arguments; without query compression what is left out is empty."""
    none = np.empty((0, 0), w.q_b.dtype), np.empty(0, w.q_b.dtype)
    compressed = none if w.q_a is None or w.q_a_norm is None else (w.q_a, w.q_a_norm)
    return *compressed, w.q_b, w.kv_a, w.kv_a_norm


def mla_backward(dy: tuple[Array, Array | None], saved: MLASaved) -> tuple[Array | None, ...]:
    """As `refimpl.ops.mla_backward`, by kernels of Numba."""
    dout, dcache = dy
    w, settings = saved.w, saved.settings
    x, latents = saved.x, saved.latents
    expect_real(x=x, dy=dout, dcache=dcache)
    b, s, width = latents.shape
    t = x.shape[0] // b
    expect("dy", dout, "(B, T, D)", (b, t, x.shape[1]))
    given, do = ready(rows_of(dout)), empty(saved.o.shape, x)
    run_products((given, w.o, do))
    heads, rows = settings.heads, b * s
    dq, dk, dv = saved.ops.attention.backward(do.reshape(b, t, heads, -1), saved.attention)
    dkv, dlatents = empty((rows, heads, w.kv_b.shape[0] // heads), x), empty((b, s, width), x)
    of_keys = (ready(part).reshape(rows, heads, -1) for part in (dk, dv))
    by_row = dkv, rows_of(dlatents), *of_keys
    collapse = [
        partial(
            kernel("mla", "collapse", x.dtype),
            *(array[i] for array in by_row),
            w.kv_b,
            settings.nope,
        )
        for i in blocks_of(rows, ROWS)
    ]
    alone = saved.past is None and dcache is None
    if not alone:
        run_kernels(collapse)
    if dcache is not None:
        dlatents += dcache
    dcache, dlatent = split_cache(dlatents, saved.past)
    m, blocks = b * t, blocks_of(b * t, ROWS)
    dx, dq_turned = empty(x.shape, x), ready(dq).reshape(m, heads, -1)
    dq = np.empty_like(dq_turned)
    da, dkv_a = empty(saved.a.shape, x), empty(saved.kv.shape, x)
    split, c = da.shape[1], settings.latent
    norms = empty((len(blocks), split + c), x)  # of the norms' gradients, by block
    written = dx, dq, da, dkv_a
    read = dq_turned, rows_of(ready(dlatent)), saved.a, saved.a_r, saved.kv, saved.c_r
    project = [
        partial(
            kernel("mla", "project_backward", x.dtype),
            *(array[i] for array in written),
            *(part[:split], part[split:]),
            *(array[i] for array in read),
            *project_weights(w),
            *(settings.cos, settings.sin, settings.nope, i.start, settings.interleaved),
            w.q_a is not None,
        )
        for part, i in zip(norms, blocks, strict=True)
    ]
    run_kernels(in_turn(collapse, project) if alone else project)
    dnorms = norms.sum(axis=0)
    dw = Weights(*(None if part is None else empty(part.shape, x) for part in w))
    factors = [
        (dq.reshape(m, -1).T, x if w.q_a is None else saved.a_normed, dw.q_b),
        (dkv_a.T, x, dw.kv_a),
        (dkv.reshape(rows, -1).T, rows_of(latents)[:, :c], dw.kv_b),
        (given.T, saved.o, dw.o),
    ]
    if w.q_a is not None:
        factors.append((da.T, x, dw.q_a))
        dw = dw._replace(q_a_norm=dnorms[:split].copy())
    run_products(*factors)
    dw = dw._replace(kv_a_norm=dnorms[split:].copy())
    return dx.reshape(dout.shape), dcache, *dw
