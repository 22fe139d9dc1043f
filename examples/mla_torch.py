"""A port of MLA in torch, held against the truth: one layer's attention, forward and backward.

    refimpl grads --checkpoint CHECKPOINT --tokens tokens.json --out truth \
        --dtype float64 --activations '*' --units float64,float32
    python examples/mla_torch.py truth mine.safetensors
    refimpl check mine.safetensors --against truth --partial

The layer reads the truth's own activation, and its backward starts from the truth's own cotangent,
so a mistake elsewhere cannot show here. Replace `attention` by yours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from refimpl.ops import rope_frequencies, yarn_softmax_factor
from refimpl.port import Truth


def rms_norm(x, w, eps):
    return w * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x, turn):
    """Pairs (2i, 2i + 1) of x [B, T, heads, R], as complex numbers times ``turn`` [T, R/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None, :]).flatten(-2)


def attention(h, w, c):
    """MLA over the normed stream h [B, T, D]; w: the layer's weights, c: the config."""
    b, t, _ = h.shape
    inv_freq = torch.as_tensor(rope_frequencies(c.rope, c.theta, c.active_yarn), dtype=h.dtype)
    angle = torch.arange(t, dtype=h.dtype)[:, None] * inv_freq
    turn = torch.polar(torch.full_like(angle, c.rope_factor), angle)
    q = h
    if c.q_latent is not None:
        q = rms_norm(h @ w["q_a_proj"].T, w["q_a_layernorm"], c.latent_eps)
    q = (q @ w["q_b_proj" if c.q_latent is not None else "q_proj"].T).view(b, t, c.heads, -1)
    q_nope, q_pe = q.split((c.nope, c.rope), dim=-1)
    q = torch.cat((q_nope, rotate(q_pe, turn)), dim=-1)

    latent, k_pe = (h @ w["kv_a_proj_with_mqa"].T).split((c.kv_latent, c.rope), dim=-1)
    k_pe = rotate(k_pe[:, :, None, :], turn)  # one for all heads
    latent = rms_norm(latent, w["kv_a_layernorm"], c.latent_eps)
    kv = (latent @ w["kv_b_proj"].T).view(b, t, c.heads, -1)
    k_nope, v = kv.split((c.nope, c.value), dim=-1)
    k = torch.cat((k_nope, k_pe.expand(-1, -1, c.heads, -1)), dim=-1)

    scale = (c.nope + c.rope) ** -0.5 * yarn_softmax_factor(c.active_yarn)
    scores = scale * torch.einsum("bthx,bshx->bhts", q, k)
    scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
    p = torch.softmax(scores, dim=-1)
    o = torch.einsum("bhts,bshv->bthv", p, v)
    return o.flatten(2) @ w["o_proj"].T


def run(truth: Truth, layer: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What this port makes of one layer's attention, under the names of the truth."""
    name = f"model.layers.{layer}"
    below = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
    tensor = lambda key: torch.from_numpy(truth.array(key).copy()).to(dtype)
    checkpoint = truth.checkpoint()  # your own loader
    norm, *parts = (
        part
        for part in checkpoint.names
        if part.startswith((f"{name}.input_layernorm", f"{name}.self_attn."))
    )
    w = {part: torch.from_numpy(checkpoint.tensor(part)).to(dtype) for part in (norm, *parts)}
    for x in w.values():
        x.requires_grad_()
    short = {part.split(".")[-2]: w[part] for part in parts}

    x = tensor(f"act/{below}").requires_grad_()
    y = attention(rms_norm(x, w[norm], truth.config.norm_eps), short, truth.config)
    (x + y).backward(tensor(f"cot/{name}.after_attention"))
    mine = {f"act/{name}.self_attn": y, f"act/{name}.after_attention": x + y}
    mine[f"cot/{below}"] = x.grad
    mine |= {f"grad/{part}": p.grad for part, p in w.items()}
    return {key: value.detach() for key, value in mine.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    given = parser.parse_args()
    mine = run(Truth.open(given.truth), given.layer, getattr(torch, given.dtype))
    save_file(mine, given.out)
