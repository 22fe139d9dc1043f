"""MLA in its absorbed form, as `refimpl.ops.mla_absorbed`, and for bfloat16: the products of each
head, on a device cuBLAS's, sum in float32 or wider and round once."""

from __future__ import annotations

import numpy as np

from ..array import Array, library, namespace
from ..ops import LEAVES, Leaves, Op, mla_absorbed_backward
from ..ops.choices import Layout
from ..ops.mla import MLAOutput, append, project, value_width
from ..ops.mla_absorbed import MLAAbsorbedSaved
from .host import WIDE, cublas

__all__ = ["MLA_ABSORBED", "matmul_heads", "mla_absorbed_forward"]


def mla_absorbed_forward(
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
) -> tuple[MLAOutput, MLAAbsorbedSaved]:
    """As `refimpl.ops.mla_absorbed_forward`, argument for argument."""
    rope = {"positions": positions, "inv_freq": inv_freq, "layout": layout, "factor": factor}
    (q, latent), project_saved = project(
        x, w_q_a, w_q_a_norm, w_q_b, w_kv_a, w_kv_a_norm, heads=heads, eps=eps, ops=ops, **rope
    )
    latent, past = append(cache, latent)
    xp = namespace(moved=True, x=x, w_kv_b=w_kv_b)
    n, c = project_saved.nope, project_saved.latent
    v = value_width(w_kv_b, w_o, heads, n, c, x.shape[2])
    w = xp.reshape(w_kv_b, (heads, n + v, c))
    w_uk, w_uv = w[:, :n, :], w[:, n:, :]
    b, t, _ = x.shape
    rows = xp.reshape(q, (b * t, heads, -1))
    q_latent = xp.empty((b * t, heads, latent.shape[2]), dtype=q.dtype)
    matmul_heads(rows[..., :n], w_uk, q_latent[..., :c])  # (mla_absorbed.1)
    q_latent[..., c:] = rows[..., n:]
    k, values = latent[:, :, None, :], latent[..., :c][:, :, None, :]  # (mla_absorbed.2)
    u, attention_saved = ops.attention.forward(
        xp.reshape(q_latent, (b, t, heads, -1)),
        k,
        values,
        scale=scale,
        key_mask=key_mask,
        segments=segments,
    )
    o = xp.empty((b * t, heads, v), dtype=q.dtype)
    matmul_heads(xp.reshape(u, (b * t, heads, c)), w_uv.swapaxes(1, 2), o)  # (mla_absorbed.3)
    y, o_saved = ops.linear.forward(xp.reshape(o, (b, t, -1)), w_o)
    saved = MLAAbsorbedSaved(
        project_saved, q[..., :n], w_uk, w_uv, u, attention_saved, o_saved, past
    )
    return MLAOutput(y, latent), saved


MLA_ABSORBED = Op(mla_absorbed_forward, mla_absorbed_backward)
"""The pair. Its backward is the reference's, without bfloat16: decoding asks for no gradients."""


def matmul_heads(a: Array, b: Array, out: Array) -> None:
    """For each head h write ``a`` [M, H, K] times ``b`` [H, K, N] into ``out`` [M, H, N]:
    out[:, h] = a[:, h] @ b[h].

    All have one type. They may be slices, if the last axis of ``a`` and ``out`` and one of the last
    two of ``b`` are contiguous. Sums are float32 or wider, and rounded once. ValueError for other
    types, shapes or strides.
    """
    (m, heads, k), n = a.shape, b.shape[2]
    types = {str(x.dtype) for x in (a, b, out)}
    if len(types) > 1 or b.shape[:2] != (heads, k) or out.shape != (m, heads, n):
        raise ValueError(
            f"out must be of the type and product of a {a.dtype} {a.shape} and b {b.dtype} "
            f"{b.shape}, got {out.dtype} {out.shape}"
        )
    xp, real = library(a), np.dtype(WIDE[str(out.dtype)])
    if xp.__name__ != "cupy":
        wide = (x.astype(real, copy=False) for x in (a.swapaxes(0, 1), b))
        out[...] = xp.matmul(*wide).swapaxes(0, 1)
        return
    if 0 in (m, heads, n, k):
        out[...] = 0
        return
    # cuBLAS stores matrices by columns, so it sees the transposes of ours: outᵀ = bᵀ aᵀ
    a_place, b_place, out_place = (_places(x) for x in (a.swapaxes(0, 1), b, out.swapaxes(0, 1)))
    if a_place[0] or out_place[0]:
        raise ValueError("a and out must have contiguous rows")
    one, zero = np.ones((), real), np.zeros((), real)
    with cublas(xp) as (blas, handle, type_of, compute):
        of_type = type_of[str(out.dtype)]
        blas.gemmStridedBatchedEx(
            handle,
            b_place[0],
            a_place[0],
            n,
            m,
            k,
            one.ctypes.data,
            b.data.ptr,
            of_type,
            *b_place[1:],
            a.data.ptr,
            of_type,
            *a_place[1:],
            zero.ctypes.data,
            out.data.ptr,
            of_type,
            *out_place[1:],
            heads,
            compute[real.name],
            blas.CUBLAS_GEMM_DEFAULT,
        )


def _places(x: Array) -> tuple[int, int, int]:
    """For matrices [heads, rows, columns], what cuBLAS asks for: (0 or 1: transposed, elements from
    line to line, elements from matrix to matrix). A line is what is contiguous: a row, or else a
    column (1)."""
    head, row, column = (step // x.dtype.itemsize for step in x.strides)
    if column == 1 or x.shape[2] == 1 != row:
        return 0, max(row, x.shape[2]), head
    if row == 1:
        return 1, max(column, x.shape[1]), head
    raise ValueError(f"rows or columns must be contiguous, got strides {x.strides}")
