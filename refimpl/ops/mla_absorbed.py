"""Multi-head latent attention, absorbed form: the heads attend to the latent itself, which is never
expanded.

q·k = q·(W_UK c) = (W_UKᵀ q)·c, so the key projection moves to the query, and the value projection
behind the weighted sum. Attention then has one shared key, the cache row of C + R numbers, and one
shared value, its first C: decoding reads 576 numbers per token instead of 128 heads of keys and
values. Same arguments and results as `mla_forward`. Source: DeepSeek-V2 (2405.04434) section 2.1.2
(absorption is named there; its adjoint is derived here). Derivation: derivations/mla_absorbed.md.
Letters as in mla.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, einsum, namespace
from .choices import Layout
from .leaves import LEAVES, Leaves
from .mla import (
    MLAOutput,
    ProjectSaved,
    append,
    project,
    project_backward,
    split_cache,
    value_width,
)

__all__ = ["MLAAbsorbedSaved", "mla_absorbed_backward", "mla_absorbed_forward"]


class MLAAbsorbedSaved(NamedTuple):
    """What `mla_absorbed_forward` keeps for `mla_absorbed_backward`."""

    project: ProjectSaved
    q_nope: Array  # [B, T, H, N]: dW_UK is a product with it
    w_uk: Array  # [H, N, C], a view of w_kv_b
    w_uv: Array  # [H, V, C], a view of w_kv_b
    u: Array  # [B, T, H, C]: probabilities times latents; dW_UV is a product with it
    attention: Any
    o: Any
    past: int | None  # length of the given cache


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
    """As `refimpl.ops.mla_forward`, argument for argument, without expanding the cache to keys and
    values."""
    rope = {"positions": positions, "inv_freq": inv_freq, "layout": layout, "factor": factor}
    (q, latent), project_saved = project(
        x, w_q_a, w_q_a_norm, w_q_b, w_kv_a, w_kv_a_norm, heads=heads, eps=eps, ops=ops, **rope
    )
    latent, past = append(cache, latent)
    xp = namespace(x=x, w_kv_b=w_kv_b)
    n, c = project_saved.nope, project_saved.latent
    v = value_width(w_kv_b, w_o, heads, n, c, x.shape[2])
    w = xp.reshape(w_kv_b, (heads, n + v, c))
    w_uk, w_uv = w[:, :n, :], w[:, n:, :]
    q_nope = q[..., :n]
    q_latent = xp.concat(
        (einsum("bthn,hnc->bthc", q_nope, w_uk), q[..., n:]),  # (mla_absorbed.1)
        axis=-1,
    )
    k, values = latent[:, :, None, :], latent[..., :c][:, :, None, :]  # (mla_absorbed.2)
    u, attention_saved = ops.attention.forward(
        q_latent, k, values, scale=scale, key_mask=key_mask, segments=segments
    )
    o = einsum("bthc,hvc->bthv", u, w_uv)  # (mla_absorbed.3)
    y, o_saved = ops.linear.forward(xp.reshape(o, (*x.shape[:2], -1)), w_o)
    saved = MLAAbsorbedSaved(project_saved, q_nope, w_uk, w_uv, u, attention_saved, o_saved, past)
    return MLAOutput(y, latent), saved


def mla_absorbed_backward(
    dy: tuple[Array, Array | None], saved: MLAAbsorbedSaved
) -> tuple[Array | None, ...]:
    """Gradients of all nine positional arguments, None for those that were None, from (dy, dcache
    or None)."""
    dout, dcache = dy
    xp, ops = namespace(dy=dout), saved.project.ops
    heads, v, c = saved.w_uv.shape
    do, dw_o = ops.linear.backward(dout, saved.o)  # (mla.13)
    do = xp.reshape(do, (*do.shape[:2], heads, v))
    du = einsum("bthv,hvc->bthc", do, saved.w_uv)  # (mla_absorbed.4)
    dw_uv = einsum("bthv,bthc->hvc", do, saved.u)  # (mla_absorbed.5)
    dq_latent, dk, dvalues = ops.attention.backward(du, saved.attention)
    dk, dvalues = dk[:, :, 0, :], dvalues[:, :, 0, :]
    dlatent = xp.concat((dk[..., :c] + dvalues, dk[..., c:]), axis=-1)  # (mla_absorbed.6)
    if dcache is not None:
        dlatent = dlatent + dcache
    dq_nope = einsum("bthc,hnc->bthn", dq_latent[..., :c], saved.w_uk)  # (mla_absorbed.7)
    dw_uk = einsum("bthn,bthc->hnc", saved.q_nope, dq_latent[..., :c])  # (mla_absorbed.8)
    # (mla_absorbed.5), (mla_absorbed.8)
    dw_kv_b = xp.reshape(xp.concat((dw_uk, dw_uv), axis=1), (-1, c))
    dq = xp.concat((dq_nope, dq_latent[..., c:]), axis=-1)
    dcache, dlatent = split_cache(dlatent, saved.past)  # (mla_absorbed.6)
    dx, *dw_project = project_backward(dq, dlatent, saved.project)  # (mla.12)
    return dx, dcache, *dw_project, dw_kv_b, dw_o
