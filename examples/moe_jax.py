"""A port of the mixture of experts in JAX, held against the truth: one layer's network.

    refimpl grads --checkpoint CHECKPOINT --tokens tokens.json --out truth \
        --dtype float64 --activations '*' --units float64,float32
    python examples/moe_jax.py truth mine.npz --layer 1
    refimpl check mine.npz --against truth --partial

The layer reads the truth's own activation, its choice of experts included, and its backward starts
from the truth's own cotangent. Replace `moe` by yours. Every expert runs on every token here, which
is simple and slow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from refimpl.port import Truth

PARTS = ("gate_proj", "up_proj", "down_proj")


def rms_norm(x, w, eps):
    return w * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


def swiglu(x, gate, up, down):
    g = x @ gate.T
    return (g * jax.nn.sigmoid(g) * (x @ up.T)) @ down.T


def moe(h, w, routes, c):
    """The experts' sum [N, D] of tokens h [N, D] that go to ``routes`` [N, K]; and the scores."""
    logits = h @ w["gate"].T
    scores = jax.nn.sigmoid(logits) if c.gate == "sigmoid" else jax.nn.softmax(logits)
    chosen = jnp.take_along_axis(scores, routes, axis=-1)
    normalise, scale = c.weight_rule
    total = chosen.sum(-1, keepdims=True) + c.conventions.gate_epsilon if normalise else 1
    weights = scale * chosen / total
    experts = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(h, *(w[part] for part in PARTS))
    mine = jnp.take_along_axis(experts.transpose(1, 0, 2), routes[..., None], axis=1)
    y = (weights[..., None] * mine).sum(1)
    if c.shared_experts:
        y = y + swiglu(h, *(w[f"shared_{part}"] for part in PARTS))
    return y, (scores, weights)


def run(truth: Truth, layer: int, dtype: str) -> dict[str, np.ndarray]:
    """What this port makes of one layer's network, under the names of the truth."""
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    c, name = truth.config, f"model.layers.{layer}"
    checkpoint = truth.checkpoint()  # your own loader
    long = {"norm": "post_attention_layernorm", "gate": "mlp.gate"}
    for part in PARTS:
        long |= {part: f"mlp.experts.{part}", f"shared_{part}": f"mlp.shared_experts.{part}"}
    long = {key: f"{name}.{part}.weight" for key, part in long.items()}
    w = {key: jnp.asarray(checkpoint.tensor(part), dtype) for key, part in long.items()}
    x = jnp.asarray(truth.array(f"act/{name}.after_attention"), dtype)
    routes = jnp.asarray(truth.array(f"aux/routes.{layer}")).reshape(-1, c.top_k)

    def network(w, x):
        flat = x.reshape(-1, c.width)
        y, seen = moe(rms_norm(flat, w["norm"], c.norm_eps), w, routes, c)
        return x + y.reshape(x.shape), seen

    y, back, (scores, weights) = jax.vjp(network, w, x, has_aux=True)
    dw, dx = back(jnp.asarray(truth.array(f"cot/{name}"), dtype))
    rows = x.shape[:2]
    mine = {
        f"act/{name}.mlp.gate.scores": scores.reshape(*rows, -1),
        f"aux/routes.{layer}": routes.reshape(*rows, -1),
        f"aux/weights.{layer}": weights.reshape(*rows, -1),
        f"act/{name}": y,
        f"cot/{name}.after_attention": dx,
    }
    for key, gradient in dw.items():
        if key in PARTS:  # the stack [E, …], expert by expert
            for e, one in enumerate(gradient):
                mine[f"grad/{name}.mlp.experts.{e}.{key}.weight"] = one
        else:
            mine[f"grad/{long[key]}"] = gradient
    return {key: np.asarray(value) for key, value in mine.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    given = parser.parse_args()
    np.savez(given.out, **run(Truth.open(given.truth), given.layer, given.dtype))
