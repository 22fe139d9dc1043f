"""What is computed: each problem's inputs, the same for every column, and the least of its
products.

Letters: B batch, S length, T = B·S tokens, D width, H heads, X = N + R query and key width, V value
width, A and C the latents of queries and of keys and values, I hidden width of a dense network, F
of an expert, E experts, K of them per token, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ...config import ModelConfig
from ...ops import rope_frequencies
from ...parameters import EMBEDDING, attention_shapes, init_parameters, is_stacked, parameter_shapes

__all__ = ["PROBLEMS", "Inputs", "Problem", "Sizes", "inputs_of"]

EPS = 1e-6
LEARNING_RATE = 1e-4
STD = 0.02  # of the step's initial parameters


@dataclass(frozen=True)
class Sizes:
    """d 512: the sizes of the larger training step. A problem reads those it knows."""

    batch: int = 2
    length: int = 512
    width: int = 512
    layers: int = 4
    heads: int = 8
    q_latent: int = 256
    kv_latent: int = 128
    nope: int = 64
    rope: int = 32
    value: int = 64
    hidden: int = 1408
    expert_hidden: int = 256
    experts: int = 32
    shared: int = 1  # shared experts
    top_k: int = 4
    vocabulary: int = 8192
    parameters: int = 2**24  # of one AdamW step
    routing: str = "balanced"  # or zipf, one-hot

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def config(self) -> ModelConfig:
        """Of the model. Without a balance loss, which other implementations do not have: it is
        computed, and weighs nothing."""
        return ModelConfig(
            vocabulary=self.vocabulary,
            width=self.width,
            layers=self.layers,
            dense_layers=1,
            heads=self.heads,
            q_latent=self.q_latent,
            kv_latent=self.kv_latent,
            nope=self.nope,
            rope=self.rope,
            value=self.value,
            dense_hidden=self.hidden,
            expert_hidden=self.expert_hidden,
            experts=self.experts,
            shared_experts=self.shared,
            top_k=self.top_k,
            balance_weight=0.0,
            max_positions=max(self.length, 1024),
        )


class Inputs(NamedTuple):
    """What a problem is called with."""

    arrays: Mapping[
        str, np.ndarray | None
    ]  # what gradients are asked for, in the order of arguments
    fixed: dict[str, Any]  # keyword arguments
    dy: Any = None  # the gradient of the result


class Draw:
    """Random numbers, in float32."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        drawn = self.rng.standard_normal(shape, dtype=np.float32)
        drawn *= np.float32(scale)
        return drawn

    def weight(self, *shape: int) -> np.ndarray:
        """A matrix [..., out, in] that keeps the size of what it multiplies."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def norm(self, width: int) -> np.ndarray:
        return np.float32(1) + self.normal(width, scale=0.1)

    def ids(self, below: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, below, shape)

    def routes(self, s: Sizes) -> np.ndarray:
        """The experts of each token [T, K], all different in a row: each expert the same number of
        rows, or numbers that fall as 1 / rank, or all rows with the same K experts."""
        if s.routing == "one-hot":
            return np.tile(np.arange(s.top_k), (s.tokens, 1))
        if s.routing == "zipf":
            noise = self.rng.gumbel(size=(s.tokens, s.experts))
            return np.argsort(np.log(1 + np.arange(s.experts)) - noise, axis=1)[:, : s.top_k]
        slots = np.arange(s.tokens * s.top_k).reshape(s.tokens, s.top_k) % s.experts
        return slots[self.rng.permutation(s.tokens)]


@dataclass(frozen=True)
class Problem:
    """One kind of work: forward and backward."""

    make: Callable[[Draw, Sizes], Inputs]
    shape: str  # of `Sizes`, by their names
    flops: Callable[[Sizes], int] = lambda s: 0  # the least of its products


def inputs_of(problem: str, sizes: Sizes, dtype: Any = np.float32) -> Inputs:
    """The same numbers, those of float32, in every type."""
    arrays, fixed, dy = PROBLEMS[problem].make(Draw(), sizes)
    return Inputs({name: _cast(x, dtype) for name, x in arrays.items()}, fixed, _cast(dy, dtype))


def _cast(x: Any, dtype: Any) -> Any:
    """An array, a pair of arrays, a number, or None."""
    if isinstance(x, tuple):
        return tuple(_cast(part, dtype) for part in x)
    return x.astype(dtype, copy=False) if isinstance(x, np.ndarray) else x


def rms_norm(d: Draw, s: Sizes) -> Inputs:
    x, dy = (d.normal(s.tokens, s.width) for _ in "xy")
    return Inputs({"x": x, "w": d.norm(s.width)}, {"eps": EPS}, dy)


def rope(d: Draw, s: Sizes) -> Inputs:
    x, dy = (d.normal(s.batch, s.length, s.heads, s.rope) for _ in "xy")
    return Inputs({"x": x}, angles(s), dy)


def angles(s: Sizes) -> dict[str, Any]:
    return {"positions": np.arange(s.length), "inv_freq": rope_frequencies(s.rope, 1e4)}


def swiglu(d: Draw, s: Sizes) -> Inputs:
    gate, up, dy = (d.normal(s.tokens, s.hidden) for _ in "guy")
    return Inputs({"gate": gate, "up": up}, {}, dy)


def linear(d: Draw, s: Sizes) -> Inputs:
    x = d.normal(s.tokens, s.width)
    return Inputs({"x": x, "w": d.weight(s.hidden, s.width)}, {}, d.normal(s.tokens, s.hidden))


def embedding(d: Draw, s: Sizes) -> Inputs:
    ids = d.ids(s.vocabulary, s.tokens)
    dy = d.normal(s.tokens, s.width)
    return Inputs({"w": d.normal(s.vocabulary, s.width)}, {"ids": ids}, dy)


def router(d: Draw, s: Sizes) -> Inputs:
    arrays = {"x": d.normal(s.tokens, s.width), "w": d.weight(s.experts, s.width)}
    return Inputs(arrays, {"top_k": s.top_k}, (d.normal(s.tokens, s.top_k), None))


def attention(d: Draw, s: Sizes) -> Inputs:
    wide = s.nope + s.rope
    q, k, v, dy = (d.normal(s.batch, s.length, s.heads, w) for w in (wide, wide, s.value, s.value))
    return Inputs({"q": q, "k": k, "v": v}, {"scale": wide**-0.5}, dy)


def mla(d: Draw, s: Sizes) -> Inputs:
    arrays = {
        "x": d.normal(s.batch, s.length, s.width),
        "cache": None,
        "w_q_a": d.weight(s.q_latent, s.width),
        "w_q_a_norm": d.norm(s.q_latent),
        "w_q_b": d.weight(s.heads * (s.nope + s.rope), s.q_latent),
        "w_kv_a": d.weight(s.kv_latent + s.rope, s.width),
        "w_kv_a_norm": d.norm(s.kv_latent),
        "w_kv_b": d.weight(s.heads * (s.nope + s.value), s.kv_latent),
        "w_o": d.weight(s.width, s.heads * s.value),
    }
    fixed = angles(s) | {"heads": s.heads, "scale": (s.nope + s.rope) ** -0.5, "eps": EPS}
    return Inputs(arrays, fixed, (d.normal(s.batch, s.length, s.width), None))


def block(d: Draw, s: Sizes) -> Inputs:
    """RMSNorm, then the SwiGLU network."""
    arrays = {
        "x": d.normal(s.tokens, s.width),
        "w_norm": d.norm(s.width),
        "w_gate": d.weight(s.hidden, s.width),
        "w_up": d.weight(s.hidden, s.width),
        "w_down": d.weight(s.width, s.hidden),
    }
    return Inputs(arrays, {"eps": EPS}, d.normal(s.tokens, s.width))


def moe(d: Draw, s: Sizes) -> Inputs:
    """Routed and shared experts; the routes are given."""
    weights = np.abs(d.normal(s.tokens, s.top_k)) + np.float32(0.1)
    f, shared = s.expert_hidden, s.expert_hidden * s.shared
    arrays = {
        "x": d.normal(s.tokens, s.width),
        "weights": weights / weights.sum(axis=1, keepdims=True),
        "w_gate": d.weight(s.experts, f, s.width),
        "w_up": d.weight(s.experts, f, s.width),
        "w_down": d.weight(s.experts, s.width, f),
        "w_shared_gate": d.weight(shared, s.width) if shared else None,
        "w_shared_up": d.weight(shared, s.width) if shared else None,
        "w_shared_down": d.weight(s.width, shared) if shared else None,
    }
    return Inputs(arrays, {"indices": d.routes(s)}, d.normal(s.tokens, s.width))


def cross_entropy(d: Draw, s: Sizes) -> Inputs:
    logits = d.normal(s.tokens, s.vocabulary, scale=2)
    return Inputs({"logits": logits}, {"targets": d.ids(s.vocabulary, s.tokens)}, 1.0)


def head_cross_entropy(d: Draw, s: Sizes) -> Inputs:
    arrays = {"h": d.normal(s.tokens, s.width), "w": d.weight(s.vocabulary, s.width)}
    return Inputs(arrays, {"targets": d.ids(s.vocabulary, s.tokens)}, 1.0)


def adamw(d: Draw, s: Sizes) -> Inputs:
    """One tensor; `dy` is its gradient. Small enough that a step is seen in it."""
    p, g = (d.normal(s.parameters, scale=0.01) for _ in "pg")
    return Inputs({"p": p}, {"learning_rate": LEARNING_RATE}, g)


def step(d: Draw, s: Sizes) -> Inputs:
    """Forward, backward, AdamW."""
    config = s.config()
    params = init_parameters(config, std=STD)
    tokens = d.ids(s.vocabulary, s.batch, s.length)
    fixed = {"config": config, "tokens": tokens, "learning_rate": LEARNING_RATE}
    return Inputs(params, fixed)


def attention_flops(s: Sizes) -> int:
    """Causal: half of q·k and p·v; in the backward q·k again, as nothing quadratic is kept, dv, dp,
    dq, dk."""
    return s.batch * s.heads * s.length**2 * (4 * (s.nope + s.rope) + 3 * s.value)


def mla_flops(s: Sizes) -> int:
    matrices = [prod(x) for x in attention_shapes(s.config()).values() if len(x) > 1]
    return 6 * s.tokens * sum(matrices) + attention_flops(s)


def moe_flops(s: Sizes) -> int:
    return 18 * s.tokens * (s.top_k + s.shared) * s.width * s.expert_hidden


def step_flops(s: Sizes) -> int:
    """Per token 6 for each weight that it meets, and attention."""
    met = 0
    for name, shape in parameter_shapes(s.config()).items():
        if len(shape) > 1 and name != EMBEDDING:
            met += prod(shape) * s.top_k // s.experts if is_stacked(name) else prod(shape)
    return 6 * s.tokens * met + s.layers * attention_flops(s)


PROBLEMS = {
    "rms_norm": Problem(rms_norm, "{tokens} × {width}"),
    "rope": Problem(rope, "{tokens} × {heads} × {rope}"),
    "swiglu": Problem(swiglu, "{tokens} × {hidden}"),
    "linear": Problem(
        linear, "{tokens} × {width} × {hidden}", lambda s: 6 * s.tokens * s.width * s.hidden
    ),
    "embedding": Problem(embedding, "{tokens} of {vocabulary} × {width}"),
    "router": Problem(
        router,
        "{tokens} × {width}, {top_k} of {experts}",
        lambda s: 6 * s.tokens * s.width * s.experts,
    ),
    "attention": Problem(
        attention, "{batch} × {length}, {heads} heads of {nope} + {rope}, {value}", attention_flops
    ),
    "mla": Problem(mla, "{batch} × {length} × {width}, {heads} heads", mla_flops),
    "block": Problem(
        block, "{tokens} × {width} × {hidden}", lambda s: 18 * s.tokens * s.width * s.hidden
    ),
    "moe": Problem(
        moe,
        "{tokens} × {width} × {expert_hidden}, {top_k} of {experts} + {shared}, {routing}",
        moe_flops,
    ),
    "cross_entropy": Problem(cross_entropy, "{tokens} × {vocabulary}"),
    "head_cross_entropy": Problem(
        head_cross_entropy,
        "{tokens} × {width} × {vocabulary}",
        lambda s: 6 * s.tokens * s.width * s.vocabulary,
    ),
    "adamw": Problem(adamw, "{parameters}"),
    "step": Problem(
        step,
        "{batch} × {length} × {width}, {layers} layers, {top_k} of {experts}, {vocabulary}",
        step_flops,
    ),
}
"""By name; those that are an op's are called by its name."""
