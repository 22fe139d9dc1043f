"""Golden values for every op and for the model, by formulas of their own and torch's autograd, in
float64.

Nothing here shares code with ``refimpl.ops`` or ``refimpl.model.forward``: the equations are
written again from the papers, with loops over tokens, heads and experts where that is the plainest,
and every gradient is autograd's. So a mistake that our forward and backward have in common can't
pass. torch is needed to run this script alone:

    python tests/golden/make_golden.py [NAME ...] [--folder FOLDER]

It writes one safetensors file an op: those named, or all. A tensor is called CASE/PREFIX/NAME, with
the prefixes ``in`` (differentiable inputs), ``aux`` (integers, masks, constants), ``cot`` (random
cotangents), ``out`` and ``grad``. The metadata has one entry, ``golden``: JSON with the script,
torch's version and the scalar settings of each case. Inputs of the model are rounded to float16 and
stored so; everything else that is real is float64.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from refimpl.config import Conventions, ModelConfig, Yarn, preset
from refimpl.parameters import parameter_shapes

SCRIPT = "tests/golden/make_golden.py"
SMALLEST_GAP = (
    1e-6  # a choice decided by less could go the other way in another implementation's rounding
)


class Case:
    """One case of an op: its settings, its tensors, and, once finished, the gradients of random
    cotangents."""

    def __init__(self, name: str, *, storage: type = np.float64, **settings: Any) -> None:
        self.name, self.storage, self.settings = name, storage, settings
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.inputs: dict[str, Tensor] = {}
        self.tensors: dict[str, np.ndarray] = {}

    def input(
        self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0, values: Any = None
    ) -> Tensor:
        """A differentiable input, normal unless its values are given."""
        drawn = (
            mean + std * self.rng.standard_normal(shape)
            if values is None
            else np.asarray(values, np.float64)
        )
        self.tensors[f"in/{name}"] = drawn.astype(self.storage)
        self.inputs[name] = torch.tensor(
            self.tensors[f"in/{name}"].astype(np.float64), requires_grad=True
        )
        return self.inputs[name]

    def aux(self, name: str, values: Any) -> Tensor:
        """An input without gradient, stored in the type that it has."""
        array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        self.tensors[f"aux/{name}"] = array.copy()
        return torch.tensor(array)

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        return self.aux(name, self.rng.integers(low, high, shape))

    def finish(self, without_cotangent: Sequence[str] = (), **outputs: Any) -> Case:
        """Keep the outputs, draw a cotangent for each differentiable one, and add the gradients of
        the inputs."""
        total, differentiated = torch.zeros(()), False
        for name, value in outputs.items():
            y = value if isinstance(value, Tensor) else torch.tensor(value)
            self.tensors[f"out/{name}"] = y.detach().numpy().copy()
            if y.requires_grad and name not in without_cotangent:
                cotangent = self.rng.standard_normal(tuple(y.shape))
                self.tensors[f"cot/{name}"] = np.asarray(cotangent)
                total, differentiated = total + (torch.tensor(cotangent) * y).sum(), True
        if differentiated:
            leaves = list(self.inputs.values())
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            self.tensors |= {
                f"grad/{name}": g.numpy().copy() for name, g in zip(self.inputs, grads, strict=True)
            }
        for name, array in self.tensors.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{self.name}/{name} is not finite")
        return self


# -------------------------------------------------------------------------------------------------
# leaves


def linear(x: Tensor, w: Tensor) -> Tensor:
    """y_o = Σ_i w_oi x_i, as the sum that it is."""
    return (w * x.unsqueeze(-2)).sum(-1)


def linear_cases() -> Iterable[Case]:
    for name, lead in (("three_axes", (2, 3)), ("one_row", (1,)), ("four_axes", (2, 1, 3))):
        case = Case(f"linear/{name}")
        yield case.finish(y=linear(case.input("x", *lead, 5), case.input("w", 4, 5)))


def embedding(w: Tensor, ids: Tensor) -> Tensor:
    """The row of each id, as a product with one-hot vectors."""
    return torch.einsum("...w,wd->...d", F.one_hot(ids, w.shape[0]).to(w.dtype), w)


def embedding_cases() -> Iterable[Case]:
    case = Case("embedding/repeated")
    yield case.finish(
        y=embedding(case.input("w", 7, 5), case.aux("ids", [[3, 0, 3, 6], [3, 1, 6, 6]]))
    )
    case = Case("embedding/flat")
    yield case.finish(y=embedding(case.input("w", 4, 3), case.aux("ids", [2, 2, 2])))


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich (1910.07467) eq. 4, eps inside the root."""
    return (
        w * x / torch.sqrt(torch.einsum("...d,...d->...", x, x) / x.shape[-1] + eps).unsqueeze(-1)
    )


def rms_norm_cases() -> Iterable[Case]:
    for name, shape, eps in (
        ("large_eps", (2, 3, 5), 0.1),
        ("zero_eps", (3, 7), 0.0),
        ("width_one", (2, 2, 1), 0.3),
    ):
        case = Case(f"rms_norm/{name}", eps=eps)
        x, w = case.input("x", *shape, mean=0.4), case.input("w", shape[-1], std=0.6, mean=0.7)
        yield case.finish(y=rms_norm(x, w, eps))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer (2002.05202) eq. 5-6, by torch's own silu."""
    return F.silu(gate) * up


def swiglu_cases() -> Iterable[Case]:
    case = Case("swiglu/normal")
    yield case.finish(
        y=swiglu(case.input("gate", 2, 3, 5, std=2), case.input("up", 2, 3, 5, mean=0.5))
    )
    case = Case("swiglu/saturated")
    gate = case.input("gate", values=[[-745.0, -60.0, -9.0, 0.0], [1e-9, 9.0, 60.0, 710.0]])
    yield case.finish(y=swiglu(gate, case.input("up", 2, 4, mean=-0.5)))


def ffn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """W_down (silu(W_gate x) ∘ (W_up x))."""
    return linear(swiglu(linear(x, w_gate), linear(x, w_up)), w_down)


def ffn_cases() -> Iterable[Case]:
    for name, lead in (("three_axes", (2, 3)), ("two_axes", (4,))):
        case = Case(f"ffn/{name}")
        x = case.input("x", *lead, 5)
        weights = [
            case.input(w, *shape)
            for w, shape in (("w_gate", (7, 5)), ("w_up", (7, 5)), ("w_down", (5, 7)))
        ]
        yield case.finish(y=ffn(x, *weights))


# -------------------------------------------------------------------------------------------------
# RoPE


def mscale(factor: float, m: float) -> float:
    """YaRN (2309.00071) eq. 22 with DeepSeek's m: 0.1 m ln(factor) + 1, and 1 if nothing is
    stretched."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def correction_range(width: int, theta: float, yarn: Yarn) -> tuple[int, int]:
    """The pairs between which YaRN's ramp lies: those turning beta_fast and beta_slow times in the
    original context."""

    def pair(turns: float) -> float:
        return width * math.log(yarn.original / (2 * math.pi * turns)) / (2 * math.log(theta))

    return max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), width - 1)


def frequencies(width: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """YaRN (2309.00071) eq. 17-20: each pair's own θ^(-2i/R), the slow ones divided by the
    factor."""
    result = []
    for i in range(width // 2):
        f = math.pow(theta, -2 * i / width)
        if yarn is not None:
            low, high = correction_range(width, theta, yarn)
            span = high - low if high != low else 0.001  # DeepSeek's guard against an empty range
            ramp = min(max((i - low) / span, 0.0), 1.0)
            f = f / yarn.factor * ramp + f * (1 - ramp)
        result.append(f)
    return torch.tensor(result, dtype=torch.float64)


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, layout: str, factor: float) -> Tensor:
    """RoFormer (2104.09864) eq. 12: a pair is a complex number, and is multiplied by factor · e^(i
    m θ)."""
    angle = positions.to(torch.float64).expand(x.shape[:2]).unsqueeze(-1) * inv_freq
    turn = torch.polar(torch.full_like(angle, factor), angle).unsqueeze(2)
    half = x.shape[-1] // 2
    if layout == "interleaved":
        z = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * turn
        return torch.view_as_real(z).flatten(-2)
    z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    return torch.cat([z.real, z.imag], -1)


TINY_YARN = Yarn(
    factor=4.0, original=16, beta_fast=4.0, beta_slow=1.0, mscale=0.9, mscale_all_dim=0.7
)


def rope_cases() -> Iterable[Case]:
    settings = (
        (
            "interleaved",
            [[4096, 4097, 90001], [7, 3, -12]],
            8,
            1e4,
            TINY_YARN._replace(original=512),
            1.13,
        ),
        ("halves", [[31, 30, 64], [5, 5, 2000]], 6, 100.0, TINY_YARN, 0.87),
        ("shared_positions", [11, 12, 14], 2, 50.0, None, 1.0),
        ("plain", [[3, 4, 5], [0, 9, 1]], 4, 5e4, None, 1.0),
        ("empty_range", [[3, 4, 5], [0, 9, 1]], 6, 100.0, Yarn(8.0, 4, 32.0, 1.0, 0.5, 1.5), 1.0),
        (
            "clamped_range",
            [[3, 4, 5], [0, 9, 1]],
            6,
            100.0,
            Yarn(8.0, 10**6, 15915.0, 1.0, 0.0, 0.8),
            1.0,
        ),
        ("v3", [[5], [70000]], 64, 1e4, Yarn(), 1.0),
        ("v2_lite", [[5], [70000]], 64, 1e4, Yarn(mscale=0.707, mscale_all_dim=0.707), 1.0),
    )
    for name, positions, width, theta, yarn, factor in settings:
        layout = "halves" if name in ("halves", "shared_positions") else "interleaved"
        case = Case(
            f"rope/{name}", width=width, theta=theta, yarn=yarn, layout=layout, factor=factor
        )
        outputs: dict[str, Any] = {}
        if yarn is not None:
            case.settings["range"] = correction_range(width, theta, yarn)
            outputs["mscale"] = mscale(yarn.factor, yarn.mscale)
        outputs["softmax_factor"] = mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else 1.0
        inv_freq = frequencies(width, theta, yarn)
        case.aux("inv_freq", inv_freq)
        at = case.aux("positions", positions)
        x = case.input("x", 2, at.shape[-1], 3 if width < 64 else 1, width)
        yield case.finish(y=rope(x, at, inv_freq, layout, factor), inv_freq=inv_freq, **outputs)


# -------------------------------------------------------------------------------------------------
# attention


def sees(
    b: int, t: int, s: int, new: int, total: int, causal: bool, key_mask: Any, segments: Any
) -> bool:
    """Whether query t of sequence b (one of the last ``new`` of ``total`` positions) may look at
    position s."""
    own = total - new + t
    if causal and s > own:
        return False
    if key_mask is not None and not bool(key_mask[b, s]):
        return False
    return segments is None or int(segments[b, s]) == int(segments[b, own])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    key_mask: Any = None,
    segments: Any = None,
) -> Tensor:
    """Vaswani et al. (1706.03762) eq. 1, a query at a time over just the keys that it sees; 0 if
    there is none."""
    (batch, new, heads, _), total = q.shape, k.shape[1]
    k, v = (a.expand(batch, total, heads, a.shape[-1]) for a in (k, v))
    sequences = []
    for b in range(batch):
        queries = []
        for t in range(new):
            keys = [
                s for s in range(total) if sees(b, t, s, new, total, causal, key_mask, segments)
            ]
            if not keys:
                queries.append(v.new_zeros(heads, v.shape[-1]))
                continue
            p = torch.softmax(scale * torch.einsum("hx,shx->hs", q[b, t], k[b, keys]), -1)
            queries.append(torch.einsum("hs,shv->hv", p, v[b, keys]))
        sequences.append(torch.stack(queries))
    return torch.stack(sequences)


def attention_cases() -> Iterable[Case]:
    # name, T, S, key heads, value heads, X, V, std, causal, key_mask, segments
    padding = [[True, True, True, True, False], [False, False, True, True, True]]
    documents = [[0, 0, 1, 1, 1], [4, 4, 4, 9, 9]]
    settings: tuple[tuple[Any, ...], ...] = (
        ("causal", 5, 5, 2, 2, 7, 4, 1.0, True, None, None),
        ("packed", 5, 5, 2, 2, 5, 4, 1.0, True, padding, documents),
        (
            "bidirectional",
            5,
            5,
            2,
            2,
            2,
            6,
            1.0,
            False,
            padding,
            [[0, 0, 1, 1, 2], [4, 4, 6, 9, 9]],
        ),
        ("decode", 2, 5, 2, 2, 5, 4, 1.0, True, padding, documents),
        ("decode_both_ways", 2, 5, 2, 2, 5, 4, 1.0, False, padding, None),
        ("shared_head", 4, 6, 1, 1, 5, 3, 1.0, True, None, None),
        ("shared_key", 3, 3, 1, 2, 5, 5, 1.0, True, None, [[0, 1, 0], [2, 2, 2]]),
        ("sharp", 4, 4, 2, 2, 5, 4, 5.0, True, None, None),
    )
    for (
        name,
        new,
        total,
        key_heads,
        value_heads,
        x,
        value,
        std,
        causal,
        key_mask,
        segments,
    ) in settings:
        case = Case(f"attention/{name}", scale=0.37, causal=causal)
        q = case.input("q", 2, new, 2, x, std=std)
        k = case.input("k", 2, total, key_heads, x, std=std, mean=0.2)
        v = case.input("v", 2, total, value_heads, value, mean=-0.3)
        masks = {"key_mask": key_mask, "segments": segments}
        given = {m: case.aux(m, values) for m, values in masks.items() if values is not None}
        yield case.finish(o=attention(q, k, v, 0.37, causal, **given))


# -------------------------------------------------------------------------------------------------
# MLA


def mla(
    x: Tensor,
    cache: Tensor | None,
    w: dict[str, Tensor],
    *,
    heads: int,
    scale: float,
    eps: float,
    positions: Tensor,
    inv_freq: Tensor,
    layout: str = "interleaved",
    factor: float = 1.0,
    key_mask: Any = None,
    segments: Any = None,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 (2412.19437) eq. 1-11, a head at a time, with the released code's norm on each
    latent.

    Rows of w_q_b belong to a head as [nope | rope], rows of w_kv_b as [key | value].
    """
    latent = w["w_kv_a_norm"].shape[0]
    rope_width = 2 * len(inv_freq)
    nope = w["w_q_b"].shape[0] // heads - rope_width
    value = w["w_o"].shape[1] // heads

    def turn(a: Tensor) -> Tensor:
        return rope(a.unsqueeze(2), positions, inv_freq, layout, factor).squeeze(2)

    c_q = rms_norm(linear(x, w["w_q_a"]), w["w_q_a_norm"], eps) if "w_q_a" in w else x
    joint = linear(x, w["w_kv_a"])
    new = torch.cat(
        [rms_norm(joint[..., :latent], w["w_kv_a_norm"], eps), turn(joint[..., latent:])], -1
    )
    full = new if cache is None else torch.cat([cache, new], 1)
    c_kv, k_rope = full[..., :latent], full[..., latent:]
    outputs = []
    for h in range(heads):
        q_rows = w["w_q_b"][h * (nope + rope_width) : (h + 1) * (nope + rope_width)]
        kv_rows = w["w_kv_b"][h * (nope + value) : (h + 1) * (nope + value)]
        q = torch.cat([linear(c_q, q_rows[:nope]), turn(linear(c_q, q_rows[nope:]))], -1)
        k = torch.cat([linear(c_kv, kv_rows[:nope]), k_rope], -1)
        v = linear(c_kv, kv_rows[nope:])
        o = attention(q[:, :, None], k[:, :, None], v[:, :, None], scale, True, key_mask, segments)
        outputs.append(o[:, :, 0])
    return linear(torch.cat(outputs, -1), w["w_o"]), full


def mla_cases() -> Iterable[Case]:
    # name, T, cached, A, V, layout, key_mask, segments, cotangent of y alone
    mask = [[True, True, True, True, False], [False, False, True, True, True]]
    settings: tuple[tuple[Any, ...], ...] = (
        ("compressed", 4, 0, 6, 2, "interleaved", None, None, False),
        ("packed", 5, 0, 6, 5, "interleaved", mask, [[0, 0, 1, 1, 1], [4, 4, 4, 9, 9]], False),
        ("cached", 2, 3, 6, 2, "interleaved", mask, [[7, 0, 0, 0, 0], [4, 4, 4, 4, 4]], False),
        ("uncompressed", 3, 0, None, 3, "halves", None, [[0, 0, 0], [1, 2, 2]], False),
        (
            "uncompressed_cached",
            2,
            2,
            None,
            4,
            "halves",
            [[False, True, True, True]] * 2,
            None,
            False,
        ),
        ("y_alone", 3, 1, 6, 2, "halves", None, None, True),
    )
    width, heads, latent, nope, rotated = 8, 2, 5, 3, 4
    for name, new, cached, q_latent, value, layout, key_mask, segments, y_alone in settings:
        constants = {"heads": heads, "scale": 0.53, "eps": 0.1, "layout": layout, "factor": 1.07}
        case = Case(f"mla/{name}", **constants)
        x = case.input("x", 2, new, width)
        cache = case.input("cache", 2, cached, latent + rotated) if cached else None
        w = {}
        if q_latent is not None:
            w["w_q_a"] = case.input("w_q_a", q_latent, width, std=0.5)
            w["w_q_a_norm"] = case.input("w_q_a_norm", q_latent, std=0.5, mean=0.8)
        w["w_q_b"] = case.input("w_q_b", heads * (nope + rotated), q_latent or width, std=0.5)
        w["w_kv_a"] = case.input("w_kv_a", latent + rotated, width, std=0.5)
        w["w_kv_a_norm"] = case.input("w_kv_a_norm", latent, std=0.5, mean=0.8)
        w["w_kv_b"] = case.input("w_kv_b", heads * (nope + value), latent, std=0.5)
        w["w_o"] = case.input("w_o", width, heads * value, std=0.5)
        starts = torch.tensor([[cached + 2], [cached + 37]])
        positions = case.aux("positions", starts + torch.arange(new))
        inv_freq = frequencies(rotated, 100.0, TINY_YARN)
        case.aux("inv_freq", inv_freq)
        masks = {"key_mask": key_mask, "segments": segments}
        given = {m: case.aux(m, values) for m, values in masks.items() if values is not None}
        y, grown = mla(x, cache, w, positions=positions, inv_freq=inv_freq, **constants, **given)
        yield case.finish(("cache",) if y_alone else (), y=y, cache=grown)


# -------------------------------------------------------------------------------------------------
# router


def best(values: Sequence[float], k: int) -> list[int]:
    """The k largest, best first, of equals the lower index. ValueError if rounding could decide."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for first, second in pairwise(order[: k + 1]):
        gap = values[first] - values[second]
        if 0 < gap < SMALLEST_GAP:
            raise ValueError(f"a choice hangs on a difference of {gap}: take another seed")
    return order[:k]


def select(
    biased: Sequence[float],
    top_k: int,
    groups: int,
    keep_groups: int,
    group_score: str,
    masked_groups: str,
) -> list[int]:
    """One token's experts: DeepSeek-V3 eq. 14 with DeepSeek-V2 (2405.04434) section 2.2.2's limit
    on groups."""
    size = len(biased) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    taken = 2 if group_score == "top2" else 1
    kept = best(
        [sum(sorted((biased[i] for i in m), reverse=True)[:taken]) for m in members], keep_groups
    )
    hidden = -math.inf if masked_groups == "-inf" else 0.0
    return best([biased[i] if i // size in kept else hidden for i in range(len(biased))], top_k)


def router(
    x: Tensor,
    w: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    groups: int = 1,
    keep_groups: int = 1,
    group_score: str = "top2",
    score: str = "sigmoid",
    normalise: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    masked_groups: str = "-inf",
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3 eq. 13-16, or V2's softmax gate: (weights, unbiased scores, indices), a token at
    a time."""
    z = linear(x, w)
    scores = torch.sigmoid(z) if score == "sigmoid" else torch.softmax(z, -1)
    rows, flat_routes = (
        scores.flatten(0, -2),
        None if routes is None else routes.flatten(0, -2).tolist(),
    )
    weights, indices = [], []
    for m in range(len(rows)):
        if flat_routes is None:
            biased = (rows[m] if bias is None else rows[m] + bias).tolist()
            chosen = select(biased, top_k, groups, keep_groups, group_score, masked_groups)
        else:
            chosen = flat_routes[m]
        s = torch.stack([rows[m, i] for i in chosen])
        weights.append(scale * s / (s.sum() + epsilon) if normalise else scale * s)
        indices.append(chosen)
    lead = x.shape[:-1]
    return torch.stack(weights).unflatten(0, lead), scores, torch.tensor(indices).unflatten(0, lead)


def repeated(case: Case, batch: int, length: int, width: int) -> np.ndarray:
    """Random tokens, two of them alike."""
    x = case.rng.standard_normal((batch, length, width))
    x[0, -1] = x[1, 0] = x[0, 0]
    return x


def router_cases() -> Iterable[Case]:
    v3 = {"top_k": 3, "groups": 4, "keep_groups": 2, "scale": 2.5}
    v2 = {
        "groups": 3,
        "keep_groups": 2,
        "group_score": "max",
        "score": "softmax",
        "normalise": False,
    }
    settings: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("v3", 8, v3 | {"group_score": "top2", "score": "sigmoid", "normalise": True}),
        ("v3_zero", 8, v3 | {"masked_groups": "zero"}),
        ("v3_scores_alone", 8, v3),
        ("v2", 9, v2 | {"top_k": 4, "scale": 1.7}),
        ("softmax_normalised", 7, {"top_k": 2, "score": "softmax", "epsilon": 0.1, "scale": 0.6}),
        ("epsilon", 8, v3 | {"epsilon": 0.2}),
        ("one_choice", 5, {"top_k": 1, "normalise": True, "epsilon": 0.3}),
        ("ties", 8, v3),
        ("routes", 8, v3),
    )
    for name, experts, options in settings:
        case = Case(f"router/{name}", **options)
        x = case.input("x", values=repeated(case, 2, 5, 6))
        gate = case.rng.standard_normal((experts, 6)) * (0.3 if name == "v2" else 0.7)
        given: dict[str, Any] = {}
        if name == "ties":
            gate[[1, 2, 5, 6, 7]] = (
                0  # score 1/2 exactly, in groups of (one, two, one, two) such experts
            )
        w = case.input("w", values=gate)
        if name == "ties":
            given["bias"] = case.aux("bias", np.full(experts, -0.75))
        elif name != "v2" and name != "one_choice":
            # Almost every biased score is negative, and expert 4 is never chosen.
            bias = -0.9 + 0.3 * case.rng.standard_normal(experts)
            bias[4] = -30.0 if experts == 8 else -0.2
            given["bias"] = case.aux("bias", bias)
        if name == "routes":
            wild = [
                [case.rng.permutation(experts)[: options["top_k"]] for _ in range(5)]
                for _ in range(2)
            ]
            given["routes"] = case.aux("routes", wild)
        weights, scores, indices = router(x, w, **options, **given)
        if name == "v3":
            other = router(x, w, **options, **given, masked_groups="zero")[2]
            if (other == indices).all() or 4 in indices or len(indices.unique()) < 6:
                raise ValueError(
                    "zeros for -inf must change the choice, and all experts but 4 be in use"
                )
        if name == "v2":
            for mistake in ({"groups": 1, "keep_groups": 1}, {"group_score": "top2"}):
                if (router(x, w, **(options | mistake))[2] == indices).all():
                    raise ValueError(f"{mistake} must change the choice")
        left_out = {"v3_scores_alone": ("weights",), "epsilon": ("scores",)}.get(name, ())
        yield case.finish(left_out, weights=weights, scores=scores, indices=indices)
    yield from bias_update_cases()


def count(indices: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert."""
    load = torch.zeros(experts, dtype=torch.int64)
    for m, chosen in enumerate(indices.flatten(0, -2).tolist()):
        for i in chosen:
            load[i] += int(mask is None or bool(mask.flatten()[m]))
    return load


def bias_update_cases() -> Iterable[Case]:
    """DeepSeek-V3 section 2.1.2: gamma up below the mean load, down above it, and 0 at it."""
    choices = [[[0, 1], [0, 3], [0, 1], [4, 1]], [[3, 0], [1, 0], [1, 0], [1, 2]]]
    mask = [[True, True, True, True], [True, True, True, False]]
    for centre in (False, True):
        case = Case(
            f"router/bias_update{'_centred' if centre else ''}",
            gamma=0.013,
            centre=centre,
            experts=7,
        )
        bias = case.aux("bias", case.rng.standard_normal(7))
        load = count(case.aux("indices", choices), 7, case.aux("mask", mask))
        mean = load.sum().item() / 7
        step = torch.tensor(
            [0.013 * ((n < mean) - (n > mean)) for n in load.tolist()], dtype=torch.float64
        )
        yield case.finish(load=load, bias=bias + step - (step.sum() / 7 if centre else 0))
    case = Case("router/bias_update_at_mean", gamma=0.5, centre=False, experts=4)
    bias = case.aux("bias", case.rng.standard_normal(4))
    load = count(case.aux("indices", [[0, 1], [0, 2]]), 4)  # mean 1: two experts sit on it
    yield case.finish(load=load, bias=bias + torch.tensor([-0.5, 0.0, 0.0, 0.5]))


def balance_loss(
    scores: Tensor,
    alpha: float,
    top_k: int,
    counted: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """DeepSeek-V3 eq. 17-20 for each sequence (its tokens alone, not its padding), then the mean of
    the sequences."""
    batch, length, experts = scores.shape
    total = torch.zeros(())
    for b in range(batch):
        tokens = [t for t in range(length) if mask is None or bool(mask[b, t])]
        if not tokens:
            continue
        f, p = [0.0] * experts, torch.zeros(experts)
        for t in tokens:
            s = scores[b, t]
            for i in best(s.tolist(), top_k) if counted is None else counted[b, t].tolist():
                f[i] += experts / (top_k * len(tokens))
            p = p + s / s.sum() / len(tokens)
        total = total + alpha * sum(f[i] * p[i] for i in range(experts))
    return total / batch


def balance_loss_cases() -> Iterable[Case]:
    mask = [[True, True, True, False, False], [False, True, True, True, True], [False] * 5]
    for name, with_mask, with_counts in (
        ("plain", False, False),
        ("padded", True, False),
        ("counted", False, True),
        ("padded_counted", True, True),
    ):
        case = Case(f"balance_loss/{name}", alpha=0.31, top_k=2)
        scores = case.input("scores", values=1 / (1 + np.exp(-case.rng.standard_normal((3, 5, 7)))))
        given = {}
        if with_mask:
            given["mask"] = case.aux("mask", mask)
        if with_counts:
            routes = [
                [case.rng.permutation(5)[:2] for _ in range(5)] for _ in range(3)
            ]  # experts 5 and 6 are empty
            given["counted"] = case.aux("counted", routes)
        yield case.finish(loss=balance_loss(scores, 0.31, 2, **given))
    case = Case("balance_loss/softmax", alpha=0.31, top_k=3)
    values = case.rng.standard_normal((2, 4, 5))
    scores = case.input("scores", values=torch.softmax(torch.tensor(values), -1))
    yield case.finish(loss=balance_loss(scores, 0.31, 3))


def moe(x: Tensor, weights: Tensor, w: dict[str, Tensor], indices: Tensor) -> Tensor:
    """DeepSeek-V3 eq. 12: a token at a time, an expert at a time; the shared experts unscaled."""
    rows, gates, chosen = x.flatten(0, -2), weights.flatten(0, -2), indices.flatten(0, -2).tolist()
    outputs = []
    for m, experts in enumerate(chosen):
        y = torch.zeros_like(rows[m])
        for k, i in enumerate(experts):
            y = y + gates[m, k] * ffn(rows[m], w["w_gate"][i], w["w_up"][i], w["w_down"][i])
        if "w_shared_gate" in w:
            y = y + ffn(rows[m], w["w_shared_gate"], w["w_shared_up"], w["w_shared_down"])
        outputs.append(y)
    return torch.stack(outputs).unflatten(0, x.shape[:-1])


def moe_cases() -> Iterable[Case]:
    for name, shared, top_k in (("shared", 4, 2), ("routed_alone", 0, 3), ("one_choice", 4, 1)):
        case = Case(f"moe/{name}")
        x = case.input("x", values=repeated(case, 2, 4, 5))
        weights = case.input("weights", 2, 4, top_k, mean=0.5)
        experts, hidden = 6, 3
        w = {
            "w_gate": case.input("w_gate", experts, hidden, 5),
            "w_up": case.input("w_up", experts, hidden, 5),
            "w_down": case.input("w_down", experts, 5, hidden),
        }
        if shared:
            w["w_shared_gate"] = case.input("w_shared_gate", shared, 5)
            w["w_shared_up"] = case.input("w_shared_up", shared, 5)
            w["w_shared_down"] = case.input("w_shared_down", 5, shared)
        busy = np.array([0, 1, 3, 4, 5])  # expert 2 gets no token
        choices = np.array(
            [[case.rng.permutation(busy)[:top_k] for _ in range(4)] for _ in range(2)]
        )
        yield case.finish(y=moe(x, weights, w, case.aux("indices", choices)))


# -------------------------------------------------------------------------------------------------
# losses


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] of each token; 0 for a target of -100."""
    flat = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return -flat.unflatten(0, targets.shape)


def cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, normaliser: float | None = None
) -> Tensor:
    """The masked (weighted) sum of -log p over the normaliser, by default the sum of the mask (1 if
    that is 0)."""
    weight = torch.ones(targets.shape) if mask is None else mask.to(torch.float64)
    divisor = normaliser if normaliser is not None else float(weight.sum()) or 1.0
    return (
        -(weight * token_log_probs(logits, torch.where(weight == 0, -100, targets))).sum() / divisor
    )


TARGETS = [[3, 0, 3, -100], [3, -100, 6, 2]]
KEPT = [[True, True, True, False], [True, False, True, True]]
WEIGHTS = [[0.5, 2.0, 0.3, 0.0], [1.5, 0.0, 0.7, 1.0]]


def loss_settings() -> Iterable[tuple[str, Any, Any, float | None]]:
    """(name, targets, mask, normaliser) of the two losses' cases."""
    unmasked = [[3, 0, 3, 5], [3, 6, 6, 2]]
    yield "masked", TARGETS, KEPT, None
    yield "weighted", TARGETS, WEIGHTS, None
    yield "normalised", TARGETS, KEPT, 11.5
    yield "unmasked", unmasked, None, None
    yield "nothing_counts", [[-100] * 4] * 2, [[False] * 4] * 2, None


def cross_entropy_cases() -> Iterable[Case]:
    for name, targets, mask, normaliser in loss_settings():
        case = Case(f"cross_entropy/{name}", normaliser=normaliser)
        given = {} if mask is None else {"mask": case.aux("mask", mask)}
        logits = case.input("logits", 2, 4, 7, std=3.0)
        loss = cross_entropy(logits, case.aux("targets", targets), normaliser=normaliser, **given)
        yield case.finish(loss=loss)


def head_cross_entropy_cases() -> Iterable[Case]:
    for name, targets, mask, normaliser in loss_settings():
        case = Case(f"head_cross_entropy/{name}", normaliser=normaliser)
        given = {} if mask is None else {"mask": case.aux("mask", mask)}
        h, w = case.input("h", 2, 4, 5), case.input("w", 7, 5, mean=0.2)
        loss = cross_entropy(
            linear(h, w), case.aux("targets", targets), normaliser=normaliser, **given
        )
        yield case.finish(loss=loss)


def log_prob_cases() -> Iterable[Case]:
    """log π(target) at a temperature, times the mask."""
    settings = (
        ("cool", TARGETS, KEPT, 0.6),
        ("warm", TARGETS, WEIGHTS, 1.9),
        ("whole", [[3, 0, 3, 5]], None, 1.0),
    )
    for name, targets, mask, temperature in settings:
        case = Case(f"log_prob/{name}", temperature=temperature)
        h, w = case.input("h", len(targets), 4, 5), case.input("w", 7, 5, mean=0.2)
        y = token_log_probs(linear(h, w) / temperature, case.aux("targets", targets))
        yield case.finish(y=y if mask is None else y * case.aux("mask", mask))


def preference_loss(h_chosen: Tensor, h_rejected: Tensor, w: Tensor) -> Tensor:
    """Bradley and Terry: the mean of -ln P(the chosen answer wins), a pair at a time, by torch's
    own logsigmoid."""
    pairs = zip(h_chosen, h_rejected, strict=True)
    wins = [
        F.logsigmoid((linear(better, w) - linear(worse, w)).squeeze(-1)) for better, worse in pairs
    ]
    return -torch.stack(wins).mean()


def preference_loss_cases() -> Iterable[Case]:
    for name, pairs, width, std in (
        ("normal", 4, 5, 1.0),
        ("one_pair", 1, 3, 1.0),
        ("width_one", 3, 1, 2.0),
    ):
        case = Case(f"preference_loss/{name}")
        h = [case.input(which, pairs, width, std=std) for which in ("h_chosen", "h_rejected")]
        yield case.finish(loss=preference_loss(*h, case.input("w", 1, width, mean=0.3)))
    case = Case("preference_loss/saturated")  # margins of -900, -40, -1e-9, 0, 40 and 800
    chosen = case.input(
        "h_chosen",
        values=[[-450.0, 1.0], [-20.0, 0.5], [0.0, 2.0], [3.0, 1.0], [20.0, 0], [400.0, 1]],
    )
    rejected = case.input(
        "h_rejected",
        values=[[0.0, 1.0], [0.0, 0.5], [5e-10, 2], [3.0, 1.0], [0.0, 0.0], [0.0, 1.0]],
    )
    yield case.finish(loss=preference_loss(chosen, rejected, case.input("w", values=[[2.0, -1.5]])))
    case = Case("preference_loss/same_answers")
    same = case.rng.standard_normal((2, 3))
    h = [case.input(which, values=same) for which in ("h_chosen", "h_rejected")]
    yield case.finish(loss=preference_loss(*h, case.input("w", 1, 3)))


# -------------------------------------------------------------------------------------------------
# GRPO


class Batch(NamedTuple):
    """Outputs of a policy: what each of the three formulas of the GRPO loss reads. Padding holds
    any numbers."""

    log_prob: Tensor
    old: Tensor | None
    reference: Tensor | None
    advantages: Tensor
    mask: Tensor


class Flow(NamedTuple):
    """Choices of deepseekmath(): where the ratio has a gradient (never at padding or A = 0), which
    outputs count."""

    unclipped: Tensor
    kept: Tensor


def surrogate(rho: Tensor, a: float, low: float, high: float, top: float | None) -> Tensor:
    """PPO's pessimistic choice; for A < 0 not below top · A (Ye et al., 1912.09729)."""
    worse = torch.minimum(rho * a, torch.clamp(rho, low, high) * a)
    return worse if top is None or a >= 0 else torch.maximum(worse, torch.tensor(top * a))


def deepseekmath(
    batch: Batch,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    top: float | None = None,
    ratio: str = "token",
    average: str = "sequence",
    length: int = 0,
    beta: float = 0.04,
    kl: str = "k3",
    kl_level: str = "token",
    kl_bounds: tuple[float, float] = (math.inf, math.inf),
    delta: float | None = None,
) -> tuple[Tensor, Flow]:
    """DeepSeekMath (2402.03300) eq. 3 and 4 with the sign of a loss: loops over outputs i and their
    tokens t.

    The other settings change a line each: the ratio of whole outputs (R1, 2501.12948 eq. 1; GSPO,
    2507.18071), the divisor (DAPO, 2503.14476; Dr. GRPO, 2503.20783), the estimator of the KL
    divergence (k1, k2, k3; V3.2, 2512.02556, for the unbiased one) and V3.2's mask of outputs that
    the policy has left (eq. 9).
    """
    n, width = batch.log_prob.shape
    rows = [[t for t in range(width) if bool(batch.mask[i, t])] for i in range(n)]
    tokens = sum(map(len, rows))
    unclipped, kept = torch.zeros(n, width, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    loss = (0 * batch.log_prob).sum()
    for i, row in enumerate(rows):
        if not row:
            continue
        a = float(batch.advantages[i])
        now = [batch.log_prob[i, t] for t in row]
        then = [p.detach() for p in now] if batch.old is None else [batch.old[i, t] for t in row]
        moved = [p - q for p, q in zip(now, then, strict=True)]
        if delta is not None and a < 0:
            kept[i] = -sum(float(m.detach()) for m in moved) / len(row) <= delta
        divisor = {"sequence": n * len(row), "token": tokens, "constant": n * length}[average]
        for k, t in enumerate(row):
            rho = {
                "token": moved[k],
                "sequence": sum(moved),
                "sequence_mean": sum(moved) / len(row),
            }[ratio].exp()
            term = surrogate(rho, a, 1 - clip[0], 1 + clip[1], top) if kept[i] else torch.zeros(())
            alone = rho.detach().requires_grad_()
            (slope,) = torch.autograd.grad(
                surrogate(alone, a, 1 - clip[0], 1 + clip[1], top), alone
            )
            unclipped[i, t] = slope != 0
            if beta:
                gaps = [batch.reference[i, s] - p for s, p in zip(row, now, strict=True)]
                u = gaps[k] if kl_level == "token" else sum(gaps)
                u = u.clamp(-kl_bounds[0], kl_bounds[0])
                k3 = (torch.exp(u) - u - 1).clamp(-kl_bounds[1], kl_bounds[1])
                term = term - beta * {"k1": -u, "k2": u**2 / 2, "k3": k3, "unbiased": rho * k3}[kl]
            loss = loss - term / divisor
    return loss, Flow(unclipped, kept)


def trl(
    batch: Batch,
    *,
    loss_type: str,
    beta: float,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    max_completion_length: int = 0,
    use_bias_correction_kl: bool = False,
    off_policy_mask_threshold: float | None = None,
) -> Tensor:
    """The loss of TRL's GRPOTrainer under its own names, on whole tensors.

    Its sequence level is GSPO's mean of log-ratios. delta bounds the ratio of the unclipped product
    alone. The mask of V3.2 falls on the policy's term before the divergence is added. In dapo the
    divisor counts the tokens of the whole batch, which here is all there is.
    """
    real = batch.mask.to(torch.float64)
    lengths = real.sum(1).clamp(min=1)
    now = torch.where(batch.mask, batch.log_prob, 0.0)
    then = now.detach() if batch.old is None else torch.where(batch.mask, batch.old, 0.0)
    a = batch.advantages[:, None]
    log_weight = now - then
    if importance_sampling_level == "sequence":
        log_weight = ((log_weight * real).sum(1) / lengths)[:, None]
    weight = log_weight.exp()
    bounded = weight.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    free = weight if delta is None else weight.clamp(max=delta)
    per_token = -torch.min(free * a, bounded * a)
    if off_policy_mask_threshold is not None:
        drift = ((then - now.detach()) * real).sum(1, keepdim=True) / lengths[:, None]
        per_token = per_token * ((a >= 0) | (drift <= off_policy_mask_threshold))
    if beta:
        gap = torch.where(batch.mask, batch.reference, 0.0) - now
        divergence = gap.exp() - gap - 1
        per_token = per_token + beta * (
            divergence * weight if use_bias_correction_kl else divergence
        )
    per_token = per_token * real
    if loss_type == "grpo":
        return (per_token.sum(1) / lengths).mean()
    if loss_type == "dr_grpo":
        return per_token.sum() / (len(real) * max_completion_length)
    return per_token.sum() / {"bnpo": real.sum().clamp(min=1), "dapo": real.sum()}[loss_type]


def verl(
    batch: Batch,
    *,
    loss_agg_mode: str,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    kl_loss_coef: float = 0.0,
    clamped: bool = False,
) -> Tensor:
    """verl's compute_policy_loss, plus its low_var_kl times a coefficient, each aggregated by
    itself.

    It writes costs, so the pessimistic choice is a maximum; the dual clip bounds the cost of a
    negative advantage. ``clamped``: its bounds of ±20 on log-ratios and ±10 on the estimator. Left
    out: the 1e-8 in its divisors.
    """
    real = batch.mask.to(torch.float64)
    now, then = (torch.where(batch.mask, p, 0.0) for p in (batch.log_prob, batch.old))
    a = batch.advantages[:, None].expand_as(now)

    def bound(x: Tensor, at: float) -> Tensor:
        return x.clamp(-at, at) if clamped else x

    def aggregate(costs: Tensor) -> Tensor:
        sums = (costs * real).sum(-1)
        if loss_agg_mode == "token-mean":
            return sums.sum() / real.sum()
        if loss_agg_mode == "seq-mean-token-mean":
            sums = torch.where(batch.mask.any(-1), sums / real.sum(-1).clamp(min=1), 0.0)
        return sums.mean()

    rho = torch.exp(bound(now - then, 20.0))
    cost = torch.maximum(-a * rho, -a * torch.clamp(rho, 1 - clip_ratio_low, 1 + clip_ratio_high))
    cost = torch.where(a < 0, torch.minimum(cost, -a * clip_ratio_c), cost)
    loss = aggregate(cost)
    if kl_loss_coef:
        gap = bound(torch.where(batch.mask, batch.reference, 0.0) - now, 20.0)
        loss = loss + kl_loss_coef * aggregate(bound(torch.expm1(gap) - gap, 10.0))
    return loss


ADVANTAGES = np.array([0.9, 0.5, -0.8, -0.45, 1.3, -1.1, -0.2, 0.0])  # two groups of four
TOKENS = np.array(
    [[1, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]]
)
REGIONS = (0, 1, 0, 1, 2, 2, 1, 2)  # below, within, above; each with either sign of the advantage


def rollouts(
    case: Case,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    top: float | None = None,
    level: str = "token",
    old: bool = True,
    reference: float = 0.5,
    advantages: Any = ADVANTAGES,
    mask: Any = TOKENS,
) -> Batch:
    """Log-probabilities whose ratios, at the level, fall on both sides of every bound, and absurd
    ones at padding.

    ``reference``: the spread of its log-ratio, 0 for no reference.
    """
    mask = np.asarray(mask, bool)
    n, width = mask.shape
    rng, spread = case.rng, math.log1p(clip[1])
    targets = [1.7 * math.log1p(-clip[0]) if clip[0] < 1 else -1.2, 0.3 * spread, 1.6 * spread]
    if top is not None:
        targets.append(1.3 * math.log(top))
    moved = np.zeros((n, width))
    for i in range(n):
        row = np.flatnonzero(mask[i])
        if level == "token":
            for t in row:
                moved[i, t] = targets[(i + t) % len(targets)] * (1 + 0.2 * rng.random())
        elif row.size:
            target = targets[3 if top is not None and i == 5 else REGIONS[i % len(REGIONS)]]
            noise = rng.standard_normal(row.size) * abs(target)
            count = row.size if level == "sequence" else 1
            moved[i, row] = noise - noise.mean() + target / count
    now = -0.1 - 2 * rng.random((n, width))
    now = np.where(mask, now, 77.0 + rng.random((n, width)))
    log_prob = case.input("log_prob", values=now)
    given = {}
    if old:
        given["old"] = case.aux(
            "old_log_prob", np.where(mask, now - moved, 1e3 * rng.standard_normal((n, width)))
        )
    if reference:
        gap = reference * rng.standard_normal((n, width))
        far = -1e3 * rng.random((n, width))
        given["reference"] = case.aux("reference_log_prob", np.where(mask, now + gap, far))
    return Batch(
        log_prob,
        given.get("old"),
        given.get("reference"),
        case.aux("advantages", np.asarray(advantages, np.float64)),
        case.aux("mask", mask),
    )


def finish_grpo(
    case: Case, batch: Batch, loss: Tensor | None, beta: float = 0.0, **settings: Any
) -> Case:
    """Finish with a source's loss, once the loops over outputs and tokens give the same value and
    gradient."""
    looped, flow = deepseekmath(batch, beta=beta, **settings)
    if loss is None:
        loss = looped
    pair = [
        (x, torch.autograd.grad(x, batch.log_prob, retain_graph=True)[0]) for x in (loss, looped)
    ]
    for ours, theirs in zip(*pair, strict=True):
        if float((ours - theirs).detach().abs().max()) > 1e-14 * max(
            1.0, float(theirs.detach().abs().max())
        ):
            raise ValueError(f"{case.name}: two formulas differ, {ours} and {theirs}")
    return case.finish(loss=loss, unclipped=flow.unclipped, kept=flow.kept)


def regimes(batch: Batch, clip: tuple[float, float], level: str) -> set[tuple[bool, int]]:
    """The pairs of (A > 0, ratio below, within or above its bounds) that occur, A = 0 left out."""
    found = set()
    for i in range(len(batch.mask)):
        row = [t for t in range(batch.mask.shape[1]) if bool(batch.mask[i, t])]
        moved = [float(batch.log_prob[i, t].detach() - batch.old[i, t]) for t in row]
        if level != "token" and row:
            moved = [sum(moved) / (len(row) if level == "sequence_mean" else 1)]
        for z in moved:
            gaps = [abs(math.exp(z) - bound) for bound in (1 - clip[0], 1 + clip[1])]
            if min(gaps) < SMALLEST_GAP:
                raise ValueError(f"a ratio {math.exp(z)} is too near to a bound")
            if batch.advantages[i] != 0:
                where = int(math.exp(z) > 1 - clip[0]) + int(math.exp(z) > 1 + clip[1])
                found.add((bool(batch.advantages[i] > 0), where))
    return found


def grpo_case(
    name: str, ours: dict[str, Any], source: str, theirs: dict[str, Any], **values: Any
) -> Case:
    """One case: ``ours`` are grpo's settings, ``theirs`` the source's own, ``values`` what
    rollouts() is told."""
    case = Case(f"grpo/{name}", source=source, **ours)
    looped = values.pop("looped")
    clip, level = looped.get("clip", (0.2, 0.2)), looped.get("ratio", "token")
    batch = rollouts(case, clip=clip, top=looped.get("top"), level=level, **values)
    if (
        batch.old is not None
        and batch.mask.sum() > 1
        and clip[0] < 1
        and regimes(batch, clip, level) != SIX
    ):
        raise ValueError(f"{case.name} lacks a regime")
    loss = (
        {"trl": trl, "verl": verl}[source](batch, **theirs) if source in ("trl", "verl") else None
    )
    return finish_grpo(case, batch, loss, **looped)


SIX = {(positive, where) for positive in (False, True) for where in range(3)}


def grpo_cases() -> Iterable[Case]:
    yield from group_advantage_cases()
    # name, our settings, whose formula, its settings, the loops' settings, and what the values are
    # like
    high, gspo = (0.2, 0.28), (3e-4, 4e-4)
    no_kl: dict[str, Any] = {"reference": 0.0}
    narrow: dict[str, Any] = {
        "beta": 0.0,
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "importance_sampling_level": "sequence",
    }
    settings: tuple[
        tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any], dict[str, Any]], ...
    ] = (
        # every preset
        ("deepseekmath", {"preset": "deepseekmath"}, "deepseekmath", {}, {"beta": 0.04}, {}),
        (
            "r1_print",
            {"preset": "r1_print"},
            "deepseekmath",
            {},
            {"ratio": "sequence", "kl_level": "sequence", "beta": 0.04},
            {},
        ),
        (
            "dapo",
            {"preset": "dapo"},
            "trl",
            {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
            {"clip": high, "average": "token"},
            no_kl,
        ),
        (
            "dr_grpo",
            {"preset": "dr_grpo", "length": 7},
            "trl",
            {"loss_type": "dr_grpo", "beta": 0.0, "max_completion_length": 7},
            {"average": "constant", "length": 7},
            no_kl,
        ),
        (
            "gspo",
            {"preset": "gspo"},
            "trl",
            {"loss_type": "grpo"} | narrow,
            {"ratio": "sequence_mean", "clip": gspo},
            no_kl,
        ),
        (
            "v3.2",
            {"preset": "v3.2", "off_policy": 0.03},
            "trl",
            {
                "loss_type": "grpo",
                "beta": 0.04,
                "use_bias_correction_kl": True,
                "off_policy_mask_threshold": 0.03,
            },
            {"beta": 0.04, "kl": "unbiased", "delta": 0.03},
            {},
        ),
        # DeepSeek's on-policy update, and R1's ε = 10 (a lower bound under 0 is no bound)
        ("on_policy", {}, "deepseekmath", {}, {"beta": 0.04}, {"old": False}),
        (
            "on_policy_sequence",
            {"ratio": "sequence", "kl_weight": 0.0},
            "deepseekmath",
            {},
            {"ratio": "sequence"},
            {"old": False, "advantages": [1.2, -0.7], "mask": [[1, 1, 1], [1, 0, 1]]} | no_kl,
        ),
        (
            "r1_clip",
            {"clip": (1.0, 10.0), "kl_weight": 0.001},
            "deepseekmath",
            {},
            {"clip": (1.0, 10.0), "beta": 0.001},
            {},
        ),
        # TRL
        (
            "trl_bnpo",
            {"average": "token", "kl_weight": 0.3},
            "trl",
            {"loss_type": "bnpo", "beta": 0.3},
            {"average": "token", "beta": 0.3},
            {},
        ),
        (
            "trl_delta",
            {"clip": high, "dual_clip": 1.9, "kl_weight": 0.0, "ratio": "sequence_mean"},
            "trl",
            {
                "loss_type": "grpo",
                "beta": 0.0,
                "epsilon_high": 0.28,
                "delta": 1.9,
                "importance_sampling_level": "sequence",
            },
            {"clip": high, "top": 1.9, "ratio": "sequence_mean"},
            no_kl,
        ),
        (
            "trl_unbiased",
            {"ratio": "sequence_mean", "average": "token", "kl": "unbiased", "kl_weight": 0.5},
            "trl",
            {
                "loss_type": "dapo",
                "beta": 0.5,
                "use_bias_correction_kl": True,
                "importance_sampling_level": "sequence",
            },
            {"ratio": "sequence_mean", "average": "token", "kl": "unbiased", "beta": 0.5},
            {},
        ),
        (
            "trl_on_policy",
            {"kl": "unbiased", "average": "constant", "length": 5},
            "trl",
            {
                "loss_type": "dr_grpo",
                "beta": 0.04,
                "use_bias_correction_kl": True,
                "max_completion_length": 5,
            },
            {"beta": 0.04, "kl": "unbiased", "average": "constant", "length": 5},
            {"old": False},
        ),
        # verl
        (
            "verl_token_mean",
            {"average": "token", "dual_clip": 3.0, "clip": high, "kl_weight": 0.07},
            "verl",
            {"loss_agg_mode": "token-mean", "clip_ratio_high": 0.28, "kl_loss_coef": 0.07},
            {"average": "token", "top": 3.0, "clip": high, "beta": 0.07},
            {},
        ),
        (
            "verl_token_sum",
            {"average": "constant", "length": 1, "dual_clip": 1.5, "kl_weight": 0.0},
            "verl",
            {"loss_agg_mode": "seq-mean-token-sum", "clip_ratio_c": 1.5},
            {"average": "constant", "length": 1, "top": 1.5},
            no_kl,
        ),
        (
            "verl_in_range",
            {"dual_clip": 3.0, "kl_weight": 0.2},
            "verl",
            {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_coef": 0.2, "clamped": True},
            {"top": 3.0, "beta": 0.2},
            {},
        ),
        (
            "verl_out_of_range",
            {"dual_clip": 3.0, "kl_weight": 0.2},
            "verl",
            {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_coef": 0.2},
            {"top": 3.0, "beta": 0.2},
            {"reference": 6.0},
        ),
        (
            "verl_clamped",
            {"dual_clip": 3.0, "kl_weight": 0.2, "kl_bounds": (20.0, 10.0)},
            "verl",
            {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_coef": 0.2, "clamped": True},
            {"top": 3.0, "beta": 0.2, "kl_bounds": (20.0, 10.0)},
            {"reference": 12.0},
        ),
        # combinations without a counterpart: the loops alone
        *(
            (
                f"{kl}_{level}",
                {"kl": kl, "kl_level": level, "kl_weight": 0.3, "average": average},
                "loops",
                {},
                {"kl": kl, "kl_level": level, "beta": 0.3, "average": average},
                {"advantages": ADVANTAGES[1:5], "mask": TOKENS[1:5]},
            )
            for kl, level, average in (
                ("k1", "token", "sequence"),
                ("k1", "sequence", "token"),
                ("k2", "token", "token"),
                ("k2", "sequence", "sequence"),
                ("k3", "sequence", "token"),
            )
        ),
        *(
            (
                f"unbiased_sequence_{ratio}",
                {"kl": "unbiased", "kl_level": "sequence", "kl_weight": 0.3, "ratio": ratio},
                "loops",
                {},
                {"kl": "unbiased", "kl_level": "sequence", "beta": 0.3, "ratio": ratio},
                {},
            )
            for ratio in ("token", "sequence")
        ),
        (
            "sequence_dual_clip",
            {
                "ratio": "sequence",
                "average": "token",
                "dual_clip": 2.5,
                "clip": (0.3, 0.1),
                "kl_weight": 0.0,
                "off_policy": 0.05,
            },
            "loops",
            {},
            {
                "ratio": "sequence",
                "average": "token",
                "top": 2.5,
                "clip": (0.3, 0.1),
                "delta": 0.05,
            },
            no_kl,
        ),
        # the edges
        (
            "constant_reward",
            {},
            "deepseekmath",
            {},
            {"beta": 0.04},
            {"advantages": np.zeros(3), "mask": [[1, 1], [1, 0], [0, 0]], "old": False},
        ),
        (
            "constant_reward_no_kl",
            {"kl_weight": 0.0},
            "deepseekmath",
            {},
            {},
            {
                "advantages": np.zeros(3),
                "mask": [[1, 1], [1, 0], [0, 0]],
                "old": False,
                "reference": 0.0,
            },
        ),
        (
            "no_tokens",
            {"average": "token"},
            "loops",
            {},
            {"beta": 0.04, "average": "token"},
            {"advantages": [1.0, -1.0], "mask": np.zeros((2, 2)), "old": False},
        ),
        (
            "one_token",
            {},
            "deepseekmath",
            {},
            {"beta": 0.04},
            {"advantages": [-0.7], "mask": [[1]]},
        ),
    )
    for name, ours, source, theirs, looped, values in settings:
        yield grpo_case(name, ours, source, theirs, looped=looped, **values)

    # ratios of exactly 1, which is a bound: within it, so that the whole gradient flows
    for name, clip in (
        ("on_both_bounds", (0.0, 0.0)),
        ("on_lower_bound", (0.0, 0.3)),
        ("on_upper_bound", (0.3, 0.0)),
    ):
        case = Case(f"grpo/{name}", source="trl", clip=clip, kl_weight=0.0)
        now = case.input("log_prob", values=-case.rng.random((2, 4)) - 0.1)
        moved = np.array([[0.0, 0.0, 0.2, -0.2], [0.0, 0.2, 0.0, -0.2]])
        old = case.aux("old_log_prob", case.tensors["in/log_prob"] - moved)
        a, mask = case.aux("advantages", [0.6, -0.9]), case.aux("mask", np.ones((2, 4), bool))
        batch = Batch(now, old, None, a, mask)
        loss = trl(batch, loss_type="grpo", beta=0.0, epsilon=clip[0], epsilon_high=clip[1])
        yield finish_grpo(case, batch, loss, clip=clip)


def advantages_one_by_one(
    rewards: Tensor, ddof: int | None, epsilon: float, alone: float
) -> Tensor:
    """A = (R - mean) / (std + epsilon) of a question's outputs; exactly 0 if all rewards are the
    same."""
    result = []
    for group in rewards.tolist():
        mean = math.fsum(group) / len(group)
        if len(group) == 1:
            result.append(alone * group[0])
            continue
        for r in group:
            deviation = 1.0
            if ddof is not None:
                variance = math.fsum((x - mean) ** 2 for x in group) / (len(group) - ddof)
                deviation = math.sqrt(variance) + epsilon
            result.append(0.0 if len(set(group)) == 1 else (r - mean) / deviation)
    return torch.tensor(result)


def advantages_by_torch(rewards: Tensor, epsilon: float) -> Tensor:
    """What TRL, verl and OpenRLHF do, each with its own epsilon: torch's mean and its std of ddof
    1."""
    by_group = rewards - rewards.mean(1, keepdim=True)
    return (by_group / (rewards.std(1, keepdim=True) + epsilon)).flatten()


def advantages_by_verl(rewards: Tensor) -> Tensor:
    """verl takes a mean of 0 and a deviation of 1 for a group of one."""
    return torch.stack([r / (torch.ones(()) + 1e-6) for r in rewards.flatten()])


def group_advantage_cases() -> Iterable[Case]:
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.5, 2.25, -1.0, 0.125], [3.0, 3.0, 3.0, 3.0]]
    for name, epsilon in (("trl", 1e-4), ("verl", 1e-6), ("openrlhf", 1e-9)):
        case = Case(f"grpo/advantages_{name}", scale=True, ddof=1, epsilon=epsilon, alone=0.0)
        yield case.finish(advantages=advantages_by_torch(case.aux("rewards", rewards), epsilon))
    for name, values, ddof, epsilon, alone in (
        ("ddof_0", rewards, 0, 0.0, 0.0),
        ("ddof_1", rewards, 1, 0.0, 0.0),
        ("centred", rewards, None, 0.0, 0.0),
        ("pair", [[1.0, 0.0]], 1, 0.0, 0.0),
        ("alone", [[0.7], [-2.0]], 1, 1e-4, 0.0),
        ("alone_1", [[0.7], [-2.0]], 1, 0.0, 1.0),
        ("alone_ddof_0", [[0.7], [-2.0]], 0, 0.0, 0.0),
        # sums that round: their mean is no member
        ("same", [[0.1] * 3, [-0.7] * 3, [1e9 / 3] * 3], 1, 0.0, 0.0),
        ("same_ddof_0", [[0.1] * 3, [-0.7] * 3, [1e9 / 3] * 3], 0, 1e-4, 0.0),
        ("same_centred", [[0.1] * 3, [-0.7] * 3, [1e9 / 3] * 3], None, 0.0, 0.0),
        ("nearly_same", [[1.0, 1.0, 1.0 + 2.0**-20], [0.0, 0.0, 1e-8]], 1, 0.0, 0.0),
        ("tiny", [[1e-200, 3e-200, 0.0]], 1, 1e-6, 0.0),
    ):  # fmt: skip
        scale = {"scale": ddof is not None, "ddof": 1 if ddof is None else ddof}
        case = Case(f"grpo/advantages_{name}", **scale, epsilon=epsilon, alone=alone)
        yield case.finish(
            advantages=advantages_one_by_one(case.aux("rewards", values), ddof, epsilon, alone)
        )
    case = Case(
        "grpo/advantages_alone_verl", scale=True, ddof=1, epsilon=1e-6, alone=1 / (1 + 1e-6)
    )
    yield case.finish(advantages=advantages_by_verl(case.aux("rewards", [[0.7], [-2.0]])))


# -------------------------------------------------------------------------------------------------
# MTP


def mtp(
    hidden: Tensor,
    embedded: Tensor,
    w_hnorm: Tensor,
    w_enorm: Tensor,
    w_proj: Tensor,
    eps: float,
    order: str,
) -> Tensor:
    """DeepSeek-V3 eq. 21, as two half-width products; the order says which half of the columns is
    whose."""
    width = hidden.shape[-1]
    first, second = w_proj[:, :width], w_proj[:, width:]
    h, e = rms_norm(hidden, w_hnorm, eps), rms_norm(embedded, w_enorm, eps)
    if order == "hidden_embedding":
        return linear(h, first) + linear(e, second)
    return linear(e, first) + linear(h, second)


def mtp_pairs(
    tokens: Tensor, targets: Tensor, mask: Tensor, depth: int, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Module ``depth`` at position i reads token i + depth and predicts the one after that, within
    one document."""
    batch, length = tokens.shape
    read, predicted, counts = ([[0] * (length - depth) for _ in range(batch)] for _ in range(3))
    for b in range(batch):
        for i in range(length - depth):
            read[b][i] = int(tokens[b, i + depth])
            predicted[b][i] = int(targets[b, i + depth])
            joined = segments is None or int(segments[b, i]) == int(segments[b, i + depth])
            counts[b][i] = int(joined and bool(mask[b, i + depth]))
    return torch.tensor(read), torch.tensor(predicted), torch.tensor(counts).bool()


def mtp_cases() -> Iterable[Case]:
    for order in ("embedding_hidden", "hidden_embedding"):
        case = Case(f"mtp/{order}", eps=0.1, order=order)
        inputs = [case.input(name, 2, 3, 5) for name in ("hidden", "embedding")]
        norms = [case.input(name, 5, std=0.5, mean=0.8) for name in ("w_hnorm", "w_enorm")]
        yield case.finish(h=mtp(*inputs, *norms, case.input("w_proj", 5, 10), 0.1, order))
    for depth, packed in ((1, False), (1, True), (2, True)):
        case = Case(f"mtp/pairs_{depth}{'_packed' if packed else ''}", depth=depth)
        tokens, targets = (
            case.integers("tokens", 0, 50, 2, 7),
            case.integers("targets", 0, 50, 2, 7),
        )
        mask = case.aux("mask", case.rng.random((2, 7)) < 0.7)
        segments = (
            case.aux("segments", [[0, 0, 0, 1, 1, 1, 1], [3, 3, 5, 5, 5, 5, 3]]) if packed else None
        )
        read, predicted, counts = mtp_pairs(tokens, targets, mask, depth, segments)
        yield case.finish(tokens=read, targets=predicted, mask=counts)


# -------------------------------------------------------------------------------------------------
# model


def takes_part(key_mask: Tensor | None, segments: Tensor | None, depth: int) -> Tensor | None:
    """Module ``depth`` leaves out a position if it or the token it reads is padding or of another
    document."""
    given = key_mask if key_mask is not None else segments
    if given is None:
        return None
    batch, length = given.shape
    part = torch.zeros(batch, length - depth, dtype=torch.bool)
    for b in range(batch):
        for i in range(length - depth):
            real = key_mask is None or (bool(key_mask[b, i]) and bool(key_mask[b, i + depth]))
            part[b, i] = real and (
                segments is None or int(segments[b, i]) == int(segments[b, i + depth])
            )
    return part


class Model:
    """DeepSeek-V3 (2412.19437) section 2 over a dict of parameters: hidden states, every loss,
    routes and loads."""

    def __init__(self, w: dict[str, Tensor], config: ModelConfig) -> None:
        self.w, self.config, self.conventions = w, config, config.conventions
        yarn = config.yarn
        if (
            self.conventions.yarn_when != "always"
            and yarn is not None
            and config.max_positions <= yarn.original
        ):
            yarn = None
        self.inv_freq = frequencies(config.rope, config.theta, yarn)
        self.scale = (config.nope + config.rope) ** -0.5
        self.factor = 1.0
        if yarn is not None:
            self.scale *= mscale(yarn.factor, yarn.mscale_all_dim) ** 2
            self.factor = mscale(yarn.factor, yarn.mscale) / mscale(
                yarn.factor, yarn.mscale_all_dim
            )
        self.balance: dict[int, Tensor] = {}
        self.indices: dict[int, Tensor] = {}
        self.loads: dict[int, Tensor] = {}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.w[name], self.config.norm_eps)

    def experts(self, layer: int, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Section 2.1.2: gate, experts, and the layer's balance loss on the side."""
        c, w, at = self.config, self.w, f"model.layers.{layer}.mlp."
        weights, scores, indices = router(
            x,
            w[at + "gate.weight"],
            top_k=c.top_k,
            bias=w.get(at + "gate.e_score_correction_bias"),
            groups=c.groups,
            keep_groups=c.keep_groups,
            group_score=c.group_score,
            score=c.gate,
            normalise=c.normalise_weights,
            scale=c.routed_scale,
            epsilon=self.conventions.gate_epsilon,
            masked_groups=self.conventions.masked_groups,
        )
        counted = indices if self.conventions.balance_counts == "routed" else None
        self.balance[layer] = balance_loss(scores, c.balance_weight, c.top_k, counted, key_mask)
        self.indices[layer], self.loads[layer] = indices, count(indices, c.experts, key_mask)
        names = {f"w_{part}": f"experts.{part}_proj.weight" for part in ("gate", "up", "down")}
        if c.shared_experts:
            names |= {
                f"w_shared_{part}": f"shared_experts.{part}_proj.weight"
                for part in ("gate", "up", "down")
            }
        return moe(x, weights, {name: w[at + key] for name, key in names.items()}, indices)

    def block(
        self, layer: int, x: Tensor, positions: Tensor, key_mask: Any, segments: Any
    ) -> Tensor:
        c, at = self.config, f"model.layers.{layer}."
        names = {
            "w_q_a": "q_a_proj",
            "w_q_a_norm": "q_a_layernorm",
            "w_q_b": "q_b_proj" if c.q_latent is not None else "q_proj",
            "w_kv_a": "kv_a_proj_with_mqa",
            "w_kv_a_norm": "kv_a_layernorm",
            "w_kv_b": "kv_b_proj",
            "w_o": "o_proj",
        }
        if c.q_latent is None:
            del names["w_q_a"], names["w_q_a_norm"]
        y, _ = mla(
            self.norm(x, at + "input_layernorm.weight"),
            None,
            {name: self.w[f"{at}self_attn.{key}.weight"] for name, key in names.items()},
            heads=c.heads,
            scale=self.scale,
            eps=c.norm_eps if self.conventions.latent_eps == "config" else 1e-6,
            positions=positions,
            inv_freq=self.inv_freq,
            layout=self.conventions.rope_layout,
            factor=self.factor,
            key_mask=key_mask,
            segments=segments,
        )
        x = x + y
        z = self.norm(x, at + "post_attention_layernorm.weight")
        if layer < c.dense_layers:
            return x + ffn(
                z, *(self.w[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            )
        return x + self.experts(layer, z, key_mask)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        mask: Tensor,
        key_mask: Any = None,
        segments: Any = None,
    ) -> dict[str, Tensor]:
        c, table, head = self.config, self.w["model.embed_tokens.weight"], self.w["lm_head.weight"]
        x = embedding(table, tokens)
        for layer in range(c.layers):
            x = self.block(layer, x, positions, key_mask, segments)
        hidden = self.norm(x, "model.norm.weight")
        logits = linear(hidden, head)
        main = cross_entropy(logits, targets, mask)

        state = hidden if self.conventions.mtp_hidden == "normed" else x
        depth_losses = []
        for depth in range(1, c.mtp_depth + 1):
            layer, length = c.layers + depth - 1, tokens.shape[1] - depth
            at = f"model.layers.{layer}."
            read, predicted, counts = mtp_pairs(tokens, targets, mask, depth, segments)
            embedded = embedding(table, read)
            if self.conventions.mtp_zero_first_embedding:
                embedded = torch.where(positions[:, :length, None] == 0, 0.0, embedded)
            norms = (
                self.w[at + "hnorm.weight"],
                self.w[at + "enorm.weight"],
                self.w[at + "eh_proj.weight"],
            )
            joined = mtp(
                state[:, :length], embedded, *norms, c.norm_eps, self.conventions.mtp_order
            )
            keys = takes_part(key_mask, segments, depth)
            documents = None if segments is None else segments[:, :length]
            if keys is not None:
                counts = counts & keys
            raw = self.block(layer, joined, positions[:, :length], keys, documents)
            normed = self.norm(raw, at + "shared_head.norm.weight")
            real = tokens.numel() if key_mask is None else int(key_mask.sum())
            divisor = {"positions": real, "valid": int(counts.sum()), "main": int(mask.sum())}
            normaliser = float(divisor[self.conventions.mtp_normaliser])
            depth_losses.append(cross_entropy(linear(normed, head), predicted, counts, normaliser))
            state = raw if self.conventions.mtp_hidden == "raw" else normed
        loss = main + sum(self.balance.values())
        if depth_losses:
            loss = loss + c.mtp_weight / c.mtp_depth * sum(depth_losses)
        outputs = {"loss": loss, "main": main, "hidden": hidden, "logits": logits}
        outputs |= {f"mtp.{k}": value for k, value in enumerate(depth_losses, 1)}
        outputs |= {f"balance.{layer}": value for layer, value in self.balance.items()}
        outputs |= {f"indices.{layer}": value for layer, value in self.indices.items()}
        return outputs | {f"load.{layer}": value for layer, value in self.loads.items()}


def model_parameters(case: Case, config: ModelConfig) -> dict[str, Tensor]:
    """Normal weights; norms, and biases that make most biased scores negative, off their neutral
    values."""
    w = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("e_score_correction_bias"):
            bias = (-0.65 + 0.15 * case.rng.standard_normal(shape)).astype(np.float16)
            w[name] = case.aux(name, bias).to(torch.float64)
        else:
            mean, std = (0.8, 0.3) if len(shape) == 1 else (0.0, 0.15)
            w[name] = case.input(name, *shape, std=std, mean=mean)
    return w


def following(
    tokens: Tensor, key_mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Default targets and mask: the next token, if it exists, both are no padding, and both are of
    one document."""
    batch, length = tokens.shape
    targets, mask = torch.zeros_like(tokens), torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length - 1):
            targets[b, t] = tokens[b, t + 1]
            real = key_mask is None or bool(key_mask[b, t] & key_mask[b, t + 1])
            mask[b, t] = real and (segments is None or bool(segments[b, t] == segments[b, t + 1]))
    return targets, mask


SMALL = dict(  # noqa: C408 (reads as the arguments it becomes)
    vocabulary=13, width=8, layers=2, dense_layers=1, heads=2, q_latent=9, kv_latent=7, nope=3,
    rope=4, value=5, dense_hidden=11, expert_hidden=3, experts=6, groups=3, keep_groups=2,
    shared_experts=2,
)  # fmt: skip


def model_cases() -> Iterable[Case]:
    tiny = preset("tiny")
    small = replace(tiny, **SMALL)
    v2 = replace(
        small,
        q_latent=None,
        gate="softmax",
        group_score="max",
        gate_bias=False,
        normalise_weights=False,
        mtp_depth=0,
        max_positions=16,
        balance_weight=0.7,
    )
    other = Conventions(
        mtp_order="hidden_embedding",
        mtp_hidden="raw",
        mtp_normaliser="valid",
        balance_counts="routed",
        rope_layout="halves",
        latent_eps="class_default",
        yarn_when="always",
        gate_epsilon=0.2,
    )
    third = Conventions(mtp_normaliser="main", mtp_zero_first_embedding=True, masked_groups="zero")
    one_layer = replace(small, layers=1, dense_layers=0, mtp_depth=1, shared_experts=0)
    # name, config, what the forward is given, outputs with a cotangent
    settings: tuple[tuple[str, ModelConfig, str, tuple[str, ...]], ...] = (
        ("tiny", replace(tiny, vocabulary=23, width=12, expert_hidden=3), "", ("loss",)),
        ("packed", small, "key_mask segments positions", ("loss",)),
        ("v2", v2, "", ("loss",)),
        (
            "conventions",
            replace(small, conventions=other, max_positions=16, balance_weight=0.4),
            "targets",
            ("loss",),
        ),
        (
            "all_cotangents",
            replace(one_layer, conventions=third),
            "targets mask positions",
            ("loss", "logits", "hidden"),
        ),
        ("logits_alone", replace(one_layer, mtp_depth=0), "key_mask offset", ("logits",)),
        (
            "left_padded",
            replace(one_layer, conventions=Conventions(mtp_normaliser="valid")),
            "left",
            ("loss",),
        ),
    )
    for name, config, given, cotangents in settings:
        gives = given.split()
        case = Case(f"model/{name}", storage=np.float16, config=asdict(config))
        w = model_parameters(case, config)
        length = 9
        values = case.rng.integers(0, config.vocabulary, (2, length))
        values[0, 5] = values[1, 2] = values[0, 1]
        tokens = case.aux("tokens", values)
        key_mask = segments = None
        positions = torch.arange(length).expand(2, length)
        if "key_mask" in gives:
            key_mask = case.aux("key_mask", [[True] * 6 + [False] * 3, [True] * 8 + [False]])
        if "left" in gives:
            key_mask = case.aux("key_mask", [[True] * 9, [False] * 2 + [True] * 7])
        if "segments" in gives:
            segments = case.aux("segments", [[0] * 3 + [1] * 6, [5] * 5 + [2] * 4])
        if "positions" in gives:
            positions = case.aux(
                "positions", [[0, 1, 2, 0, 1, 2, 3, 4, 5], [40, 41, 42, 43, 44, 7, 8, 9, 10]]
            )
        if "offset" in gives:
            positions = case.aux("positions", np.arange(length) + 11).expand(2, length)
        targets, mask = following(tokens, key_mask, segments)
        if (
            "targets" in gives
        ):  # the token after the last one is known, so every position has a target
            after = case.rng.integers(0, config.vocabulary, (2, 1))
            targets = case.aux("targets", np.concatenate([values[:, 1:], after], 1))
            mask = torch.ones_like(targets, dtype=torch.bool)
        if "mask" in gives:
            mask = case.aux("mask", case.rng.random((2, length)) < 0.6)
        outputs = Model(w, config)(tokens, positions, targets, mask, key_mask, segments)
        yield case.finish([key for key in outputs if key not in cotangents], **outputs)


# -------------------------------------------------------------------------------------------------
# optimizer


def optimizer_cases() -> Iterable[Case]:
    """torch.optim.AdamW over six steps of clipped gradients, the learning rate changing at each."""
    settings = (
        ("v3", 0.9, 0.95, 1e-8, 0.1, 1.0),
        ("no_decay", 0.8, 0.99, 1e-3, 0.0, 3.0),
        ("loose", 0.9, 0.95, 1e-8, 0.5, 1e3),
    )
    for name, beta1, beta2, epsilon, weight_decay, max_norm in settings:
        case = Case(
            f"optimizer/{name}",
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            max_norm=max_norm,
        )
        shapes, rates = {"a": (3, 4), "b": (5,)}, case.aux("rates", case.rng.uniform(1e-3, 1e-1, 6))
        params = {
            n: torch.nn.Parameter(case.aux(f"start.{n}", case.rng.standard_normal(s)))
            for n, s in shapes.items()
        }
        adam = torch.optim.AdamW(
            params.values(), betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay
        )
        norms = []
        for step, rate in enumerate(rates):
            for n, p in params.items():
                p.grad = case.aux(f"grad{step}.{n}", case.rng.standard_normal(shapes[n]))
            norms.append(torch.nn.utils.clip_grad_norm_(params.values(), max_norm))
            adam.param_groups[0]["lr"] = float(rate)
            adam.step()
        yield case.finish(
            norms=torch.stack(norms).detach(), **{n: p.detach() for n, p in params.items()}
        )


FILES: dict[str, Callable[[], Iterable[Case]]] = {
    "linear": linear_cases,
    "embedding": embedding_cases,
    "rms_norm": rms_norm_cases,
    "swiglu": swiglu_cases,
    "ffn": ffn_cases,
    "rope": rope_cases,
    "attention": attention_cases,
    "mla": mla_cases,
    "router": router_cases,
    "balance_loss": balance_loss_cases,
    "moe": moe_cases,
    "cross_entropy": cross_entropy_cases,
    "head_cross_entropy": head_cross_entropy_cases,
    "log_prob": log_prob_cases,
    "preference_loss": preference_loss_cases,
    "grpo": grpo_cases,
    "mtp": mtp_cases,
    "model": model_cases,
    "optimizer": optimizer_cases,
}


def write(stem: str, cases: Iterable[Case], folder: Path) -> None:
    """One safetensors file. Its metadata has a single key, so that the same values give the same
    bytes."""
    tensors, settings = {}, {}
    for case in cases:
        label = case.name.removeprefix(f"{stem}/")
        settings[label] = case.settings
        tensors |= {f"{label}/{name}": array for name, array in case.tensors.items()}
    golden = {"script": SCRIPT, "torch": torch.__version__.split("+")[0], "cases": settings}
    (folder / f"{stem}.safetensors").write_bytes(
        save(tensors, metadata={"golden": json.dumps(golden)})
    )


def main(names: Sequence[str], folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for stem in names or FILES:
        write(stem, FILES[stem](), folder)
        print(f"{stem}: {(folder / f'{stem}.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write golden values.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="files to write, by default all")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(FILES)):
        parser.error(f"NAME must be one of {', '.join(FILES)}, got {', '.join(unknown)}")
    main(given.names, given.folder)
