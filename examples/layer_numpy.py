"""A port of one whole layer in plain NumPy, backward by hand, held against the truth.

    refimpl grads --checkpoint CHECKPOINT --tokens tokens.json --out truth \
        --dtype float64 --activations '*' --units float64,float32
    python examples/layer_numpy.py truth mine.npz --layer 1
    refimpl check mine.npz --against truth --partial

Attention and the mixture of experts, line by line as in derivations/mla.md, attention.md, router.md
and moe.md. Each half reads the truth's own activation and starts from the truth's own cotangent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from refimpl.ops import rope_frequencies, yarn_softmax_factor
from refimpl.port import Truth

PARTS = ("gate_proj", "up_proj", "down_proj")


def norm(x, w, eps):
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return w * x * r, (x, w, r)


def norm_backward(dy, saved):
    x, w, r = saved
    n, dn = x * r, dy * w
    dx = r * (dn - n * np.mean(dn * n, axis=-1, keepdims=True))
    return dx, np.sum(dy * n, axis=tuple(range(dy.ndim - 1)))


def rotate(x, c, sign=1):
    """The pairs (2i, 2i + 1) of x [B, T, heads, R], turned by their position; back if sign = −1."""
    angle = np.arange(x.shape[1])[:, None] * rope_frequencies(c.rope, c.theta, c.active_yarn)
    angle = sign * angle.astype(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    turned = np.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1)
    return turned.reshape(x.shape) * c.rope_factor


def attention(x, w, c):
    split = lambda y: y.reshape(*x.shape[:2], c.heads, -1)
    a, a_saved = norm(x @ w["q_a_proj"].T, w["q_a_layernorm"], c.latent_eps)
    q = split(a @ w["q_b_proj"].T)
    q = np.concatenate((q[..., : c.nope], rotate(q[..., c.nope :], c)), axis=-1)
    kv = x @ w["kv_a_proj_with_mqa"].T  # the latent alone is normed
    latent, latent_saved = norm(kv[..., : c.kv_latent], w["kv_a_layernorm"], c.latent_eps)
    key = rotate(kv[..., None, c.kv_latent :], c)  # one for all heads
    k_v = split(latent @ w["kv_b_proj"].T)  # each head: [key | value]
    keys = np.broadcast_to(key, (*key.shape[:2], c.heads, c.rope))
    k = np.concatenate((k_v[..., : c.nope], keys), axis=-1)
    scale = (c.nope + c.rope) ** -0.5 * yarn_softmax_factor(c.active_yarn)
    s = scale * np.einsum("bthx,bshx->bhts", q, k)
    s = np.where(np.tri(x.shape[1], dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    o = np.einsum("bhts,bshv->bthv", p, k_v[..., c.nope :])
    saved = (x, w, a, a_saved, latent, latent_saved, q, k, k_v, scale, p, o)
    return o.reshape(*x.shape[:2], -1) @ w["o_proj"].T, saved


def attention_backward(dy, saved, c):
    x, w, a, a_saved, latent, latent_saved, q, k, k_v, scale, p, o = saved
    flat = lambda y: y.reshape(*x.shape[:2], -1)
    product = lambda d, read: np.einsum("bto,bti->oi", d, read)
    do = (dy @ w["o_proj"]).reshape(o.shape)
    dp = np.einsum("bthv,bshv->bhts", do, k_v[..., c.nope :])
    ds = scale * p * (dp - np.sum(dp * p, axis=-1, keepdims=True))
    dq, dk = np.einsum("bhts,bshx->bthx", ds, k), np.einsum("bhts,bthx->bshx", ds, q)
    dv = np.einsum("bhts,bthv->bshv", p, do)
    dk_v = np.concatenate((dk[..., : c.nope], dv), axis=-1)
    dlatent, dw_latent = norm_backward(flat(dk_v) @ w["kv_b_proj"], latent_saved)
    shared = np.sum(dk[..., c.nope :], axis=2, keepdims=True)  # over the heads that used the key
    dkv = np.concatenate((dlatent, flat(rotate(shared, c, -1))), axis=-1)
    dq = flat(np.concatenate((dq[..., : c.nope], rotate(dq[..., c.nope :], c, -1)), axis=-1))
    da, dw_a = norm_backward(dq @ w["q_b_proj"], a_saved)
    dw = {
        "o_proj": product(dy, flat(o)),
        "kv_b_proj": product(flat(dk_v), latent),
        "kv_a_layernorm": dw_latent,
        "kv_a_proj_with_mqa": product(dkv, x),
        "q_b_proj": product(dq, a),
        "q_a_layernorm": dw_a,
        "q_a_proj": product(da, x),
    }
    return da @ w["q_a_proj"] + dkv @ w["kv_a_proj_with_mqa"], dw


def ffn(x, gate, up, down):
    g, u = x @ gate.T, x @ up.T
    s = 1 / (1 + np.exp(-g))
    return (g * s * u) @ down.T, (x, gate, up, down, g, u, s)


def ffn_backward(dy, saved):
    x, gate, up, down, g, u, s = saved
    dh = dy @ down
    dg, du = dh * u * s * (1 + g * (1 - s)), dh * g * s
    return dg @ gate + du @ up, (dg.T @ x, du.T @ x, dy.T @ (g * s * u))


def moe(x, w, c):
    """Of tokens x [N, D]: the sum of their experts."""
    scores = 1 / (1 + np.exp(-(x @ w["gate"].T)))
    grouped = (scores + w["bias"]).reshape(len(x), c.groups, -1)  # chosen with the bias
    best = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    kept = np.argsort(-best, axis=-1, kind="stable")[:, : c.keep_groups]
    hidden = np.ones((len(x), c.groups), bool)
    np.put_along_axis(hidden, kept, False, axis=1)
    ranked = np.where(hidden[..., None], -np.inf, grouped).reshape(scores.shape)
    routes = np.argsort(-ranked, axis=-1, kind="stable")[:, : c.top_k]
    chosen = np.take_along_axis(scores, routes, axis=-1)  # weighed without the bias
    weights = c.routed_scale * chosen / chosen.sum(axis=-1, keepdims=True)
    y, shared = ffn(x, *(w[f"shared_experts.{part}"] for part in PARTS))
    experts = []
    for e in range(c.experts):
        token, slot = np.nonzero(routes == e)
        out, saved = ffn(x[token], *(w[f"experts.{part}"][e] for part in PARTS))
        y[token] += weights[token, slot, None] * out
        experts.append((token, slot, out, saved))
    return y, (x, w, scores, routes, weights, shared, experts)


def moe_backward(dy, saved, c):
    x, w, scores, routes, weights, shared, experts = saved
    dx, dshared = ffn_backward(dy, shared)
    dw = {f"shared_experts.{part}": d for part, d in zip(PARTS, dshared, strict=True)}
    dweights = np.zeros_like(weights)
    for e, (token, slot, out, kept) in enumerate(experts):
        dweights[token, slot] = np.sum(dy[token] * out, axis=-1)
        dx_e, dexpert = ffn_backward(weights[token, slot, None] * dy[token], kept)
        np.add.at(dx, token, dx_e)
        dw |= {f"experts.{e}.{part}": d for part, d in zip(PARTS, dexpert, strict=True)}
    chosen = np.take_along_axis(scores, routes, axis=-1)
    total = chosen.sum(axis=-1, keepdims=True)
    mean = np.sum(dweights * chosen, axis=-1, keepdims=True) / total
    dchosen = c.routed_scale * (dweights - mean) / total
    dscores = np.zeros_like(scores)
    np.put_along_axis(dscores, routes, dchosen, axis=-1)
    dlogits = dscores * scores * (1 - scores)
    return dx + dlogits @ w["gate"], dw | {"gate": dlogits.T @ x}, dscores


def run(truth: Truth, layer: int, dtype: str) -> dict[str, np.ndarray]:
    """What this port makes of one layer with experts, under the names of the truth."""
    c, name, below = truth.config, f"model.layers.{layer}", f"model.layers.{layer - 1}"
    checkpoint = truth.checkpoint(dtype)  # your own loader
    begin = f"{name}."
    parts = [part for part in checkpoint.names if part.startswith(begin)]
    w = {part.removeprefix(begin): checkpoint.tensor(part) for part in parts}
    w = {key.removesuffix(".weight"): x.astype(dtype) for key, x in w.items()}
    inner = lambda of: {k.removeprefix(of): x for k, x in w.items() if k.startswith(of)}
    experts = inner("mlp.") | {"bias": w["mlp.gate.e_score_correction_bias"]}
    given = lambda key: truth.array(key).astype(dtype)

    x = given(f"act/{below}")
    h, h_saved = norm(x, w["input_layernorm"], c.norm_eps)
    y, saved = attention(h, inner("self_attn."), c)
    mine = {f"act/{name}.self_attn": y, f"act/{name}.after_attention": x + y}
    dy = given(f"cot/{name}.after_attention")
    dh, dw = attention_backward(dy, saved, c)
    mine |= {f"grad/{name}.self_attn.{part}.weight": d for part, d in dw.items()}
    dx, mine[f"grad/{name}.input_layernorm.weight"] = norm_backward(dh, h_saved)
    mine[f"cot/{below}"] = dy + dx

    x = given(f"act/{name}.after_attention")
    h, h_saved = norm(x, w["post_attention_layernorm"], c.norm_eps)
    y, saved = moe(h.reshape(-1, c.width), experts, c)
    _, _, scores, routes, weights, *_ = saved
    rows = lambda z: z.reshape(*x.shape[:2], -1)
    mine[f"act/{name}.mlp.gate.scores"] = rows(scores)
    mine |= {f"aux/routes.{layer}": rows(routes), f"aux/weights.{layer}": rows(weights)}
    mine[f"act/{name}"] = x + rows(y)
    dy = given(f"cot/{name}")
    dh, dw, dscores = moe_backward(dy.reshape(-1, c.width), saved, c)
    mine |= {f"grad/{name}.mlp.{part}.weight": d for part, d in dw.items()}
    mine[f"cot/{name}.mlp.gate.scores"] = rows(dscores)
    dx, mine[f"grad/{name}.post_attention_layernorm.weight"] = norm_backward(rows(dh), h_saved)
    mine[f"cot/{name}.after_attention"] = dy + dx
    return mine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    given = parser.parse_args()
    np.savez(given.out, **run(Truth.open(given.truth), given.layer, given.dtype))
