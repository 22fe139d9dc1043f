"""Multi-head latent attention (MLA), naive form: keys and values are expanded from the latent, then
plain attention.

Keys and values of all heads come from one latent vector per token, and a small rotated key is
shared by all heads. The cache holds the normalised latent and the rotated key, C + R numbers per
token: 576 for V3. `mla_absorbed` computes the same without expanding it. Sources: DeepSeek-V3
(2412.19437) eq. 1–11 (our C is their d_c, A their d'_c, R their d_h^R); those equations leave out
the norms of the two latents, which section 4.2 mentions. Derivation: derivations/mla.md. Letters: B
batch, T query position, S key position, D model, H heads, N nope, R rope, V value width, A and C
the query and key-value latents. Without query compression ``w_q_a`` and ``w_q_a_norm`` are None,
and A is D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import Array, expect, expect_some, expect_that, last, namespace, sum_along
from .choices import Layout
from .leaves import LEAVES, Leaves, expect_table

__all__ = [
    "MLAOutput",
    "MLASaved",
    "ProjectSaved",
    "mla_backward",
    "mla_forward",
    "project",
    "project_backward",
    "value_width",
]


class MLAOutput(NamedTuple):
    """What `mla_forward` returns beside `MLASaved`."""

    y: Array  # [B, T, D]
    cache: Array  # [B, S, C + R]: the given cache and the new tokens' latents and rotated keys


class ProjectSaved(NamedTuple):
    """What `project` keeps for `project_backward`."""

    q_a: Any  # saved of the linear maps, norms and rotations, in the order of the forward
    q_a_norm: Any
    q_b: Any
    kv_a: Any
    kv_a_norm: Any
    q_pe: Any
    k_pe: Any
    nope: int  # N
    latent: int  # C
    ops: Leaves


class MLASaved(NamedTuple):
    """What `mla_forward` keeps for `mla_backward`."""

    project: ProjectSaved
    kv_b: Any
    attention: Any
    o: Any
    past: int | None  # length of the given cache, None without
    split: tuple[int, int]  # N, V


def project(
    x: Array,
    w_q_a: Array,
    w_q_a_norm: Array,
    w_q_b: Array,
    w_kv_a: Array,
    w_kv_a_norm: Array,
    *,
    heads: int,
    eps: float,
    ops: Leaves,
    **rope: Any,
) -> tuple[tuple[Array, Array], ProjectSaved]:
    """Queries [B, T, H, N + R] and latents [B, T, C + R], both rotated: what both forms of MLA
    begin with. Arguments as `mla_forward`'s."""
    xp = namespace(moved=True, x=x, w_q_b=w_q_b, w_kv_a=w_kv_a)
    expect_table(ops, Leaves)
    nope, latent = check_project(x, w_q_a, w_q_a_norm, w_q_b, w_kv_a, w_kv_a_norm, heads)
    b, t, _ = x.shape
    a = x
    q_a_saved = q_a_norm_saved = None
    if w_q_a is not None:
        a, q_a_saved = ops.linear.forward(x, w_q_a)  # (mla.1)
        a, q_a_norm_saved = ops.rms_norm.forward(a, w_q_a_norm, eps=eps)
    q, q_b_saved = ops.linear.forward(a, w_q_b)  # (mla.2)
    q = xp.reshape(q, (b, t, heads, -1))
    q_pe, q_pe_saved = ops.rope.forward(q[..., nope:], **rope)  # (mla.3)
    kv, kv_a_saved = ops.linear.forward(x, w_kv_a)  # (mla.4)
    c, kv_a_norm_saved = ops.rms_norm.forward(kv[..., :latent], w_kv_a_norm, eps=eps)  # (mla.5)
    k_pe, k_pe_saved = ops.rope.forward(kv[..., latent:][:, :, None, :], **rope)  # (mla.6)
    q = xp.concat((q[..., :nope], q_pe), axis=-1)
    saved = ProjectSaved(
        q_a=q_a_saved,
        q_a_norm=q_a_norm_saved,
        q_b=q_b_saved,
        kv_a=kv_a_saved,
        kv_a_norm=kv_a_norm_saved,
        q_pe=q_pe_saved,
        k_pe=k_pe_saved,
        nope=nope,
        latent=latent,
        ops=ops,
    )
    return (q, xp.concat((c, k_pe[:, :, 0, :]), axis=-1)), saved


def project_backward(dq: Array, dlatent: Array, saved: ProjectSaved) -> tuple[Array | None, ...]:
    """Gradients (dx, dw_q_a, dw_q_a_norm, dw_q_b, dw_kv_a, dw_kv_a_norm) of `project`, from ``dq``
    [B, T, H, N + R] and ``dlatent`` [B, T, C + R]."""
    xp, ops = namespace(moved=True, dq=dq, dlatent=dlatent), saved.ops
    n, c = saved.nope, saved.latent
    dk_pe = ops.rope.backward(dlatent[..., c:][:, :, None, :], saved.k_pe)[:, :, 0, :]
    dc, dw_kv_a_norm = ops.rms_norm.backward(dlatent[..., :c], saved.kv_a_norm)  # (mla.15)
    # (mla.16)
    dx_kv, dw_kv_a = ops.linear.backward(xp.concat((dc, dk_pe), axis=-1), saved.kv_a)
    dq_pe = ops.rope.backward(dq[..., n:], saved.q_pe)
    dq = xp.reshape(xp.concat((dq[..., :n], dq_pe), axis=-1), (*dq.shape[:2], -1))
    dx_q, dw_q_b = ops.linear.backward(dq, saved.q_b)  # (mla.17)
    dw_q_a = dw_q_a_norm = None
    if saved.q_a is not None:
        da, dw_q_a_norm = ops.rms_norm.backward(dx_q, saved.q_a_norm)  # (mla.18)
        dx_q, dw_q_a = ops.linear.backward(da, saved.q_a)  # (mla.19)
    return dx_q + dx_kv, dw_q_a, dw_q_a_norm, dw_q_b, dw_kv_a, dw_kv_a_norm  # (mla.12)


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
    """MLA over ``x`` [B, T, D], which follows the tokens of ``cache`` [B, S − T, C + R] (None: T =
    S).

    Args:
        w_q_a, w_q_a_norm: [A, D], [A]; w_q_b: [H (N+R), A]; w_kv_a: [C+R, D]; w_kv_a_norm: [C];
        w_kv_b: [H (N+V), C]; w_o: [D, H V]. Per head the outputs are [nope | rope] and [k_nope |
            v].
        heads, scale: H, and the factor of q·k, (N+R)^−½ times `yarn_softmax_factor`.
        eps: of the two latent norms.
        positions, inv_freq, layout, factor: of the new tokens, as in `rope_forward`.
        key_mask, segments: [B, S], as in `attention_forward`.

    Returns MLAOutput(y [B, T, D], cache [B, S, C + R]).
    """
    rope = {"positions": positions, "inv_freq": inv_freq, "layout": layout, "factor": factor}
    (q, latent), project_saved = project(
        x, w_q_a, w_q_a_norm, w_q_b, w_kv_a, w_kv_a_norm, heads=heads, eps=eps, ops=ops, **rope
    )
    latent, past = append(cache, latent)
    xp = namespace(moved=True, x=x)
    b, s, _ = latent.shape
    n, c = project_saved.nope, project_saved.latent
    v = value_width(w_kv_b, w_o, heads, n, c, x.shape[2])
    kv, kv_b_saved = ops.linear.forward(latent[..., :c], w_kv_b)  # (mla.7)
    kv = xp.reshape(kv, (b, s, heads, n + v))
    k_pe = xp.broadcast_to(latent[..., c:][:, :, None, :], (b, s, heads, latent.shape[-1] - c))
    k = xp.concat((kv[..., :n], k_pe), axis=-1)  # (mla.8)
    o, attention_saved = ops.attention.forward(
        q, k, kv[..., n:], scale=scale, key_mask=key_mask, segments=segments
    )
    y, o_saved = ops.linear.forward(xp.reshape(o, (*x.shape[:2], -1)), w_o)  # (mla.9)
    saved = MLASaved(project_saved, kv_b_saved, attention_saved, o_saved, past, (n, v))
    return MLAOutput(y, latent), saved


def value_width(w_kv_b: Array, w_o: Array, heads: int, n: int, c: int, d: int) -> int:
    """V, the width of a head's values, by ``w_o`` [D, H V]; ValueError unless that and ``w_kv_b``
    [H (N+V), C] fit."""
    v = last(w_o, "w_o") // heads
    expect("w_kv_b", w_kv_b, "(H·(N+V), C)", (heads * (n + v), c))
    expect("w_o", w_o, "(D, H·V)", (d, heads * v))
    return v


def mla_backward(dy: tuple[Array, Array | None], saved: MLASaved) -> tuple[Array | None, ...]:
    """Gradients of all nine positional arguments, None for those that were None, from (dy, dcache
    or None)."""
    dout, dcache = dy
    xp, ops = namespace(moved=True, dy=dout), saved.project.ops
    n, v = saved.split
    do, dw_o = ops.linear.backward(dout, saved.o)  # (mla.13)
    dq, dk, dv = ops.attention.backward(xp.reshape(do, (*do.shape[:2], -1, v)), saved.attention)
    dkv = xp.concat((dk[..., :n], dv), axis=-1)  # (mla.10)
    # (mla.14)
    dc, dw_kv_b = ops.linear.backward(xp.reshape(dkv, (*dkv.shape[:2], -1)), saved.kv_b)
    dlatent = xp.concat((dc, sum_along(dk[..., n:], axis=2)), axis=-1)  # (mla.11)
    if dcache is not None:
        dlatent = dlatent + dcache
    dcache, dlatent = split_cache(dlatent, saved.past)  # (mla.11)
    dx, *dw_project = project_backward(dq, dlatent, saved.project)  # (mla.12)
    return dx, dcache, *dw_project, dw_kv_b, dw_o


def check_project(
    x: Array,
    w_q_a: Array | None,
    w_q_a_norm: Array | None,
    w_q_b: Array,
    w_kv_a: Array,
    w_kv_a_norm: Array,
    heads: int,
) -> tuple[int, int]:
    """(N, C); ValueError unless what `project` is given fits together."""
    expect("x", x, "(B, T, D)", (None, None, None))
    expect_some("x", x, "(B, T, D)")
    expect_that(
        (w_q_a is None) == (w_q_a_norm is None),
        "w_q_a and w_q_a_norm must both be given, or (without query compression) both be None",
    )
    a = d = x.shape[2]
    latent = last(w_kv_a_norm, "w_kv_a_norm")
    if w_q_a is not None:
        expect("w_q_a", w_q_a, "(A, D)", (None, d))
        expect("w_q_a_norm", w_q_a_norm, "(A,)", tuple(w_q_a.shape[:1]))
        a = w_q_a.shape[0]
    expect("w_q_b", w_q_b, "(H·(N+R), A)", (None, a))
    expect("w_kv_a", w_kv_a, "(C+R, D)", (None, d))
    nope = w_q_b.shape[0] // max(heads, 1) - (w_kv_a.shape[0] - latent)
    fits = heads >= 1 and w_q_b.shape[0] % max(heads, 1) == 0 and w_kv_a.shape[0] > latent
    expect_that(
        fits and nope >= 1,
        f"w_q_b must have shape (H·(N+R), A) and w_kv_a (C+R, D) with H={heads}, "
        f"C={latent}, all at least 1, got {tuple(w_q_b.shape)} and {tuple(w_kv_a.shape)}",
    )
    return nope, latent


def append(cache: Array | None, latent: Array) -> tuple[Array, int | None]:
    """The cache with the new latents behind it, and the length it had before (None: there was
    none)."""
    if cache is None:
        return latent, None
    expect("cache", cache, "(B, S−T, C+R)", (latent.shape[0], None, latent.shape[2]))
    return namespace(moved=True, cache=cache, x=latent).concat(
        (cache, latent), axis=1
    ), cache.shape[1]


def split_cache(dlatent: Array, past: int | None) -> tuple[Array | None, Array]:
    """The adjoint of `append`: the gradient of the given cache, and that of the new latents."""
    return (None, dlatent) if past is None else (dlatent[:, :past, :], dlatent[:, past:, :])
