"""JAX's column of `refimpl bench --cpu`: ops of fixed shapes, jitted, forward and backward. Not
part of the package.

Loaded by its path from refimpl/bench/cpu/worker.py.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from refimpl.bench.cpu.ours import Work
from refimpl.errors import CouldNotRun

VERSION = jax.__version__


def rms_norm(x: Any, w: Any, *, eps: float) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w


def rope(x: Any, *, positions: Any, inv_freq: Any) -> Any:
    """Interleaved pairs; x [B, T, H, R]."""
    turned = (positions[:, None] * inv_freq)[None, :, None, :]  # in float64
    cos, sin = np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(x.shape)


def swiglu(gate: Any, up: Any) -> Any:
    return jax.nn.silu(gate) * up


def linear(x: Any, w: Any) -> Any:
    return x @ w.T


def block(x: Any, w_norm: Any, w_gate: Any, w_up: Any, w_down: Any, *, eps: float) -> Any:
    h = rms_norm(x, w_norm, eps=eps)
    return linear(swiglu(linear(h, w_gate), linear(h, w_up)), w_down)


def attention(q: Any, k: Any, v: Any, *, scale: float) -> Any:
    """[B, T, H, …]; causal."""
    scores = scale * jnp.einsum("bthx,bshx->bhts", q, k)
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", p, v)


def cross_entropy(logits: Any, *, targets: Any) -> Any:
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, targets[:, None], axis=-1).mean()


def head_cross_entropy(h: Any, w: Any, *, targets: Any) -> Any:
    return cross_entropy(linear(h, w), targets=targets)


FUNCTIONS = {
    f.__name__: f
    for f in (rms_norm, rope, swiglu, linear, block, attention, cross_entropy, head_cross_entropy)
}


LONGEST = 2048  # positions of attention, which keeps all scores: 12 GB and 41 s at 8,192


def work_of(column: str, problem: str, inputs: Any, sizes: Any) -> Work:
    if problem == "attention" and sizes.length > LONGEST:
        raise CouldNotRun(f"keeps all scores: left out beyond {LONGEST:,} positions")
    arrays = [jnp.asarray(x) for x in inputs.arrays.values()]
    dy = jnp.asarray(inputs.dy, jnp.float32)

    @jax.jit
    def run(dy: Any, *given: Any) -> Any:
        y, pull = jax.vjp(lambda *x: FUNCTIONS[problem](*x, **inputs.fixed), *given)
        return y, pull(dy)

    def call() -> Any:
        return jax.block_until_ready(run(dy, *arrays))

    def gradients() -> dict[str, np.ndarray]:
        return {n: np.asarray(g) for n, g in zip(inputs.arrays, call()[1], strict=True)}

    return Work(call, gradients)
