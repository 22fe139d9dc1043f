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
from .pool import blocks_of, in_turn, run
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
    """What `mla_forward` keeps for `mla_backward`."""

    x: Array  # [M, D]
    a: Array  # [M, A]: the query's latent, before its norm
    a_r: Array  # [M]: 1 / rms
    a_normed: Array  # [M, A]; x without query compression
    c: Array  # [M, C]: the latent of keys and values, before its norm
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
    w = w._replace(kv_a_norm=ready(w_kv_a_norm))
    if w_q_a is not None:
        w = w._replace(q_a_norm=ready(w_q_a_norm))
    (b, t, d), rope = x.shape, w_kv_a.shape[0] - c
    value = value_width(w_kv_b, w_o, heads, nope, c, d)
    check_rope(np.empty((b, t, 1, rope), x.dtype), positions, inv_freq, layout)
    cos, sin = angles(positions, inv_freq, factor, x.dtype)
    settings = Settings(heads, nope, c, float(eps), cos, sin, layout == "interleaved")
    rows, m = ready(rows_of(x)), b * t
    query_latent = w_q_b.shape[1]
    a, a_normed = (empty((m, query_latent if w_q_a is not None else 0), x) for _ in range(2))
    c_raw, latent = empty((m, c), x), empty((b, t, c + rope), x)
    a_r, c_r = empty((m,), x), empty((m,), x)
    q = empty((b, t, heads, nope + rope), x)
    if w_q_a is None:
        a_normed = rows
    arrays = rows, a, a_r, a_normed, c_raw, c_r, rows_of(latent), q.reshape(m, heads, -1)
    project = [partial(_project, arrays, w, settings, i) for i in blocks_of(m, ROWS)]
    if cache is not None:
        run(project)
    latents, past = append(cache, latent)
    latents = ready(latents)
    s = latents.shape[1]
    k = empty((b, s, heads, nope + rope), x)
    kv = empty((b, s, heads, nope + value), x)
    by_row = rows_of(latents), kv.reshape(b * s, heads, -1), k.reshape(b * s, heads, -1)
    expand = [partial(_expand, *by_row, w_kv_b, nope, i) for i in blocks_of(b * s, ROWS)]
    run(expand if cache is not None else in_turn(project, expand))
    o, attention_saved = ops.attention.forward(
        q, k, kv[..., nope:], scale=scale, key_mask=key_mask, segments=segments
    )
    y, o = empty(x.shape, x), o.reshape(m, -1)
    run_products((o, w_o.T, rows_of(y)))  # (mla.9)
    saved = MLASaved(
        rows, a, a_r, a_normed, c_raw, c_r, latents, attention_saved, o, w, settings, past, ops
    )
    return MLAOutput(y, latents), saved


def _project(arrays: tuple[Array, ...], w: Weights, settings: Settings, i: slice) -> None:
    """Queries and latents of the tokens i, rotated."""
    x, a, a_r, a_normed, c, c_r, latent, q = (array[i] for array in arrays)
    norm, turn = kernel("rms_norm", "rms_norm_forward", x.dtype), kernel("rope", "turn", x.dtype)
    if w.q_a is not None:
        np.matmul(x, w.q_a.T, out=a)  # (mla.1)
        norm(a_normed, a_r, a, w.q_a_norm, settings.eps)
    np.matmul(a_normed, w.q_b.T, out=q.reshape(q.shape[0], -1))  # (mla.2)
    angle = settings.cos, settings.sin
    turn(q, *angle, settings.nope, i.start, settings.interleaved, 0)  # (mla.3)
    np.matmul(x, w.kv_a[: settings.latent].T, out=c)  # (mla.4)
    normed, rotated = np.empty_like(c), x @ w.kv_a[settings.latent :].T
    norm(normed, c_r, c, w.kv_a_norm, settings.eps)  # (mla.5)
    turn(rotated[:, None, :], *angle, 0, i.start, settings.interleaved, 0)  # (mla.6)
    latent[:, : settings.latent], latent[:, settings.latent :] = normed, rotated


def _expand(latents: Array, kv: Array, k: Array, w_kv_b: Array, nope: int, i: slice) -> None:
    """Keys and values of all heads."""
    latent = latents[i]
    np.matmul(latent[:, : w_kv_b.shape[1]], w_kv_b.T, out=kv[i].reshape(latent.shape[0], -1))
    kernel("mla", "put_keys", k.dtype)(k[i], kv[i], latent, nope)  # (mla.7)


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
    collapse = [partial(_collapse, by_row, w, settings, i) for i in blocks_of(rows, ROWS)]
    alone = saved.past is None and dcache is None
    if not alone:
        run(collapse)
    if dcache is not None:
        dlatents += dcache
    dcache, dlatent = split_cache(dlatents, saved.past)
    m, blocks = b * t, blocks_of(b * t, ROWS)
    dx, dq_turned = empty(x.shape, x), ready(dq).reshape(m, heads, -1)
    dq = np.empty_like(dq_turned)
    da, dc = empty(saved.a.shape, x), empty(saved.c.shape, x)
    rotated = empty((m, width - settings.latent), x)
    parts = empty((len(blocks), da.shape[1] + dc.shape[1]), x)  # of the norms' gradients
    arrays = dx, dq, dq_turned, da, dc, rotated, rows_of(ready(dlatent))
    project = [
        partial(_project_backward, arrays, part, saved, i)
        for part, i in zip(parts, blocks, strict=True)
    ]
    run(in_turn(collapse, project) if alone else project)
    norms = parts.sum(axis=0)
    dw = Weights(*(None if part is None else empty(part.shape, x) for part in w))
    latent = settings.latent
    factors = [
        (dq.reshape(m, -1).T, saved.a_normed, dw.q_b),
        (dc.T, x, dw.kv_a[:latent]),
        (rotated.T, x, dw.kv_a[latent:]),
        (dkv.reshape(rows, -1).T, rows_of(latents)[:, :latent], dw.kv_b),
        (given.T, saved.o, dw.o),
    ]
    if w.q_a is not None:
        factors.append((da.T, x, dw.q_a))
        dw = dw._replace(q_a_norm=norms[: da.shape[1]].copy())
    run_products(*factors)
    dw = dw._replace(kv_a_norm=norms[da.shape[1] :].copy())
    return dx.reshape(dout.shape), dcache, *dw


def _collapse(arrays: tuple[Array, ...], w: Weights, settings: Settings, i: slice) -> None:
    """The gradient of the latents i from those of their keys and values."""
    dkv, dlatent, dk, dv = (array[i] for array in arrays)
    kernel("mla", "take_keys", dk.dtype)(dkv, dlatent, dk, dv, settings.nope)
    dlatent[:, : settings.latent] = dkv.reshape(dkv.shape[0], -1) @ w.kv_b


def _project_backward(arrays: tuple[Array, ...], dnorms: Array, saved: MLASaved, i: slice) -> None:
    """dx of the tokens i; dq, da, dc and ``rotated`` become the gradients of the four products."""
    w, settings = saved.w, saved.settings
    dx, dq, dq_turned, da, dc, rotated, dlatent = (array[i] for array in arrays)
    norm = kernel("rms_norm", "rms_norm_backward", dx.dtype)
    turn, angle = kernel("rope", "turn", dx.dtype), (settings.cos, settings.sin)
    latent, split = settings.latent, da.shape[1]
    dnormed = dlatent[:, :latent].copy()
    norm(dc, dnorms[split:], dnormed, saved.c[i], w.kv_a_norm, saved.c_r[i])
    rotated[...] = dlatent[:, latent:]
    turn(rotated[:, None, :], *angle, 0, i.start, settings.interleaved, 1)
    np.matmul(dc, w.kv_a[:latent], out=dx)
    dx += rotated @ w.kv_a[latent:]
    dq[...] = dq_turned
    turn(dq, *angle, settings.nope, i.start, settings.interleaved, 1)
    da_normed = dq.reshape(dq.shape[0], -1) @ w.q_b
    if w.q_a is None:
        dx += da_normed
    else:
        norm(da, dnorms[:split], da_normed, saved.a[i], w.q_a_norm, saved.a_r[i])
        dx += da @ w.q_a  # (mla.12)
