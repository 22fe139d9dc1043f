"""Adverse inputs for every op: odd dims, values off neutral, and the corners where wrong backwards
like to hide.

`CASES[op](draw)` makes one `Case`. Shapes, flags and a seed are drawn from a `Draw`: hypothesis's
in the tests, a plain random generator in ``refimpl verify``; there, tokens come from real text.
Each case names the regimes it hit, and `REGIMES[op]` lists those that a run must hit in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from .. import model as reference_model
from .. import ops
from ..array import namespace
from ..config import CONVENTIONS, Conventions, ModelConfig, preset
from ..model import Route
from ..ops import AnyOp, Op, Ops, Yarn, rope_frequencies
from ..ops.attention import visible
from ..parameters import is_buffer, parameter_shapes

__all__ = [
    "CASES",
    "REGIMES",
    "Case",
    "Draw",
    "RandomDraw",
    "model_case",
    "model_grpo_case",
    "model_variant",
    "pair_of",
]


class Draw(Protocol):
    """Where a case takes its choices from."""

    rng: np.random.Generator

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, options: Sequence[Any]) -> Any: ...

    def tokens(self, shape: tuple[int, ...], vocabulary: int) -> np.ndarray: ...


class RandomDraw:
    """Choices from a seed; tokens from ``text`` (bytes), windows of it at random places, or random
    without text."""

    def __init__(self, seed: int, text: bytes | None = None) -> None:
        self.rng, self.text = np.random.default_rng(seed), text

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def tokens(self, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
        if self.text is None:
            return self.rng.integers(0, vocabulary, shape)
        rows, length = int(np.prod(shape[:-1])), shape[-1]
        starts = self.rng.integers(0, max(len(self.text) - length, 0) + 1, rows)
        data = np.frombuffer(self.text, dtype=np.uint8)
        windows = [np.resize(data[start : start + length], length) for start in starts]
        return np.stack(windows).reshape(shape).astype(np.int64) % vocabulary


@dataclass
class Case:
    """One set of inputs of an op."""

    inputs: tuple[np.ndarray | None, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    regimes: set[str] = field(default_factory=set)
    replay: Callable[[Any], Mapping[str, Any]] | None = None


def pair_of(op: str, table: Ops | None = None) -> AnyOp:
    """The op's forward and backward: from the table of an implementation, else by name from
    `refimpl.ops`."""
    if table is not None and op in table:
        return table[op]
    return Op(getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward"))


def _flags(**flags: Any) -> set[str]:
    return {name for name, on in flags.items() if on}


def _activations(draw: Draw, b: int, t: int, d: int, scale: float = 1.0) -> np.ndarray:
    """Rows of a random embedding table for tokens of the text, with a little noise: [b, t, d]."""
    table = draw.rng.normal(size=(256, d))
    x: np.ndarray = scale * (
        table[draw.tokens((b, t), 256)] + 0.3 * draw.rng.normal(size=(b, t, d))
    )
    return x


def _weight(draw: Draw, *shape: int) -> np.ndarray:
    w: np.ndarray = draw.rng.normal(size=shape) / np.sqrt(shape[-1])
    return w


def _norm_weight(draw: Draw, d: int) -> np.ndarray:
    w: np.ndarray = draw.rng.uniform(0.5, 1.5, d) * draw.rng.choice([-1, 1], d)
    return w


def _mask(draw: Draw, *shape: int) -> np.ndarray:
    """Some True, some False where there is room for both."""
    mask = draw.rng.random(shape) < 0.6
    mask.reshape(-1)[draw.rng.integers(mask.size)] = True
    if mask.size > 1:
        mask.reshape(-1)[(np.argmax(mask) + 1) % mask.size] = False
    return mask


def linear(draw: Draw) -> Case:
    b, t, i, o = draw.integer(1, 3), draw.integer(1, 4), draw.integer(1, 7), draw.integer(1, 6)
    return Case(
        (_activations(draw, b, t, i), _weight(draw, o, i)),
        {},
        _flags(narrow=i == 1 or o == 1, wide=i > 1 and o > 1),
    )


def embedding(draw: Draw) -> Case:
    w, d = draw.integer(3, 9), draw.integer(1, 5)
    ids = draw.tokens((draw.integer(1, 3), draw.integer(2, 6)), w)
    repeated = len(set(ids.flat)) < ids.size
    return Case(
        (draw.rng.normal(size=(w, d)),),
        {"ids": ids},
        _flags(repeated=repeated, unused=len(set(ids.flat)) < w),
    )


def rms_norm(draw: Draw) -> Case:
    b, t, d, scale = (
        draw.integer(1, 3),
        draw.integer(1, 4),
        draw.integer(1, 9),
        draw.choice([0.3, 1.0, 3.0]),
    )
    x = _activations(draw, b, t, d, scale)
    eps = draw.choice(
        [0.05, 0.2, 0.7, 1e-6 if d > 1 else 0.05]
    )  # at D = 1 a small eps leaves no gradient
    regimes = _flags(one=d == 1, many=d > 1, small_eps=eps < 1e-3, one_row=b == 1)
    return Case((x, _norm_weight(draw, d)), {"eps": eps}, regimes)


def swiglu(draw: Draw) -> Case:
    b, t, d, scale = (
        draw.integer(1, 3),
        draw.integer(1, 4),
        draw.integer(1, 7),
        draw.choice([0.5, 2.0, 8.0]),
    )
    gate, up = _activations(draw, b, t, d, scale), _activations(draw, b, t, d)
    return Case(
        (gate, up),
        {},
        _flags(negative=(gate < 0).any(), positive=(gate > 0).any(), saturated=scale > 2),
    )


def ffn(draw: Draw) -> Case:
    b, t, d, f = draw.integer(1, 3), draw.integer(1, 4), draw.integer(1, 6), draw.integer(1, 7)
    return Case(
        (
            _activations(draw, b, t, d),
            _weight(draw, f, d),
            _weight(draw, f, d),
            _weight(draw, d, f),
        ),
        {},
        _flags(narrow=d == 1 or f == 1, wide=d > 1 and f > 1),
    )


def _rope(draw: Draw, b: int, t: int, r: int) -> dict[str, Any]:
    yarn = draw.choice([None, Yarn(4.0, 16, 4.0, 1.0), Yarn(10.0, 64, 8.0, 2.0)])
    start = draw.rng.integers(-30, 50, (b, 1))
    return {
        "positions": draw.choice(
            [np.arange(t) + 3, start + np.arange(t), draw.rng.integers(-90, 90, (b, t))]
        ),
        "inv_freq": rope_frequencies(r, draw.choice([30.0, 1e4]), yarn),
        "layout": draw.choice(["interleaved", "halves"]),
        "factor": draw.choice([0.8, 1.25]),
    }


def rope(draw: Draw) -> Case:
    b, t, h, r = draw.integer(1, 3), draw.integer(1, 4), draw.integer(1, 3), 2 * draw.integer(1, 4)
    kwargs = _rope(draw, b, t, r)
    regimes = {kwargs["layout"]} | _flags(
        by_row=kwargs["positions"].ndim == 2, shared=kwargs["positions"].ndim == 1
    )
    return Case((draw.rng.normal(size=(b, t, h, r)),), kwargs, regimes)


def _masks(draw: Draw, b: int, t: int, s: int, causal: bool) -> tuple[dict[str, Any], set[str]]:
    """Key padding and document masks such that two queries see two keys or more: else little
    depends on q or k."""
    q, k = np.zeros((b, t, 1, 1)), np.zeros((b, s, 1, 1))
    key_mask = draw.choice([None, _mask(draw, b, s)])
    segments = draw.choice([None, np.sort(draw.rng.integers(0, 3, (b, s)), axis=1)])
    seen = visible((0, t), (0, s), q, k, causal, key_mask, segments)
    if (np.broadcast_to(seen, (b, 1, t, s)).sum(axis=-1) >= 2).sum() < 2:
        key_mask = segments = None
        seen = visible((0, t), (0, s), q, k, causal, None, None)
    masks = {"key_mask": key_mask, "segments": segments}
    blind = (seen.sum(axis=-1) == 0).any()
    return masks, _flags(
        padding=key_mask is not None,
        documents=segments is not None,
        sees_nothing=blind,
        unmasked=blind == 0,
    )


def attention(draw: Draw) -> Case:
    b, t, h = draw.integer(2, 3), draw.integer(1, 5), draw.integer(1, 3)
    s, x = t + draw.integer(0 if t > 1 else 1, 3), draw.integer(1, 6)
    v = draw.choice([x, draw.integer(1, 5)])
    k_heads, v_heads, causal = draw.choice([1, h]), draw.choice([1, h]), draw.choice([True, False])
    masks, regimes = _masks(draw, b, t, s, causal)
    regimes |= _flags(
        causal=causal,
        full=not causal,
        cached=t < s,
        square=t == s,
        decode=t == 1,
        shared_key=k_heads < h,
        shared_value=v_heads < h,
        own_heads=k_heads == h,
        value_width_differs=v != x,
        one_width=v == x,
    )
    q, k = draw.rng.normal(size=(b, t, h, x)), draw.rng.normal(size=(b, s, k_heads, x))
    value = draw.rng.normal(size=(b, s, v_heads, v))
    return Case(
        (q, k, value), {"scale": draw.choice([0.3, 0.6]), "causal": causal, **masks}, regimes
    )


def flash_attention(draw: Draw) -> Case:
    case, block = attention(draw), draw.choice([1, 2, 3, 128])
    case.kwargs["block"] = block
    case.regimes |= _flags(one_block=block == 128, blocks=block < case.inputs[1].shape[1])  # type: ignore[union-attr]
    return case


def mla(draw: Draw) -> Case:
    b, t, past, d, h = (
        draw.integer(2, 3),
        draw.integer(1, 4),
        draw.integer(0, 3),
        draw.integer(2, 7),
        draw.integer(1, 3),
    )
    past = max(past, 2 - t)
    n, r, v, c, a = (
        draw.integer(1, 4),
        2 * draw.integer(1, 2),
        draw.integer(1, 4),
        draw.integer(2, 5),
        draw.integer(2, 5),
    )
    compressed = draw.choice([True, False])
    x, cache = _activations(draw, b, t, d), draw.rng.normal(size=(b, past, c + r)) if past else None
    masks, regimes = _masks(draw, b, t, t + past, True)
    inputs = (
        x,
        cache,
        _weight(draw, a, d) if compressed else None,
        _norm_weight(draw, a) if compressed else None,
        _weight(draw, h * (n + r), a if compressed else d),
        _weight(draw, c + r, d),
        _norm_weight(draw, c),
        _weight(draw, h * (n + v), c),
        _weight(draw, d, h * v),
    )
    kwargs = {
        "heads": h,
        "scale": draw.choice([0.3, 0.6]),
        "eps": draw.choice([0.1, 0.5]),
        **_rope(draw, b, t, r),
    }
    regimes |= _flags(
        compressed=compressed,
        uncompressed=not compressed,
        cached=past,
        prefill=not past,
        decode=t == 1,
        value_is_nope=v == n,
        value_differs=v != n,
        many_heads=h > 1,
    )
    return Case(inputs, kwargs | masks, regimes)


def router(draw: Draw) -> Case:
    b, t, d, groups = (
        draw.integer(1, 3),
        draw.integer(1, 4),
        draw.integer(2, 6),
        draw.choice([1, 2, 4]),
    )
    experts = groups * draw.integer(2, 4)
    keep = draw.integer(1, groups)
    top_k = draw.integer(1, min(4, experts // groups * keep))
    bias = draw.choice([None, draw.rng.normal(size=experts), -draw.rng.uniform(0.5, 1.5, experts)])
    score, normalise = draw.choice(["sigmoid", "softmax"]), draw.choice([True, False])
    kwargs = {
        "top_k": top_k,
        "bias": bias,
        "groups": groups,
        "keep_groups": keep,
        "score": score,
        "normalise": normalise,
        "group_score": draw.choice(["top2", "max"]),
        "scale": draw.choice([0.7, 2.5]),
        "epsilon": draw.choice([0.0, 1e-20, 0.1]),
        "masked_groups": draw.choice(["-inf", "zero"]),
    }
    regimes = {score} | _flags(
        grouped=keep < groups,
        ungrouped=keep == groups,
        biased=bias is not None,
        unbiased=bias is None,
        negative_bias=bias is not None and (bias < 0).all(),
        normalised=normalise and top_k > 1,
        raw=not normalise,
        epsilon=normalise and kwargs["epsilon"] > 1e-3,
        one_choice=top_k == 1,
    )
    inputs = (_activations(draw, b, t, d), _weight(draw, experts, d))
    return Case(inputs, kwargs, regimes, lambda y: {"routes": y.indices})


def balance_loss(draw: Draw) -> Case:
    b, t, e = draw.integer(1, 3), draw.integer(1, 5), draw.integer(3, 7)
    k = draw.integer(2, e - 1)
    scores = draw.rng.uniform(0.05, 0.95, (b, t, e))
    given = draw.choice([True, False])
    counted = np.argsort(draw.rng.random((b, t, e)) if given else -scores, axis=-1, kind="stable")[
        ..., :k
    ]
    mask = draw.choice([None, _mask(draw, b, t)])
    one_hot = (counted[..., None] == np.arange(e)).sum(axis=2) * (
        1 if mask is None else mask[..., None]
    )
    if (
        np.ptp(one_hot.sum(axis=1), axis=-1).max() == 0
    ):  # all counts equal: the gradient is exactly 0
        counted = np.broadcast_to(counted[:, :1], counted.shape)
    empty = mask is not None and not mask.any(axis=1).all()
    regimes = _flags(
        masked=mask is not None,
        whole=mask is None,
        empty_sequence=empty,
        routed=given,
        best=not given,
    )
    kwargs = {"alpha": draw.choice([0.02, 0.7]), "top_k": k, "counted": counted, "mask": mask}
    return Case((scores,), kwargs, regimes)


def moe(draw: Draw) -> Case:
    b, t, d, f, e = (
        draw.integer(1, 3),
        draw.integer(1, 4),
        draw.integer(1, 5),
        draw.integer(1, 5),
        draw.integer(3, 6),
    )
    k, shared = draw.integer(1, e - 1), draw.choice([0, draw.integer(1, 6)])
    empty = draw.integer(0, e - 1)  # at least this expert gets no token
    used = np.array([i for i in range(e) if i != empty])
    indices = used[np.argsort(draw.rng.random((b, t, e - 1)), axis=-1)[..., :k]]
    weights = draw.rng.uniform(0.2, 1.5, (b, t, k))
    routed = (_weight(draw, e, f, d), _weight(draw, e, f, d), _weight(draw, e, d, f))
    extra = (
        (_weight(draw, shared, d), _weight(draw, shared, d), _weight(draw, d, shared))
        if shared
        else (None,) * 3
    )
    hit = len(set(indices.flat)) == e - 1
    regimes = _flags(
        all_but_one_hit=hit,
        some_empty=not hit,
        shared=shared,
        only_routed=not shared,
        one_token=b * t == 1,
        one_choice=k == 1,
    )
    return Case(
        (_activations(draw, b, t, d), weights, *routed, *extra), {"indices": indices}, regimes
    )


def _targets(draw: Draw, b: int, t: int, vocabulary: int) -> tuple[dict[str, Any], set[str]]:
    targets, kind = draw.tokens((b, t), vocabulary), draw.choice(["whole", "masked", "weighted"])
    mask = None if kind == "whole" else _mask(draw, b, t)
    if kind == "weighted" and mask is not None:
        mask = mask * draw.rng.uniform(0.3, 2.0, mask.shape)
    if mask is not None:
        targets = np.where(mask != 0, targets, -100)
    regimes = {kind}
    return {"targets": targets, "mask": mask}, regimes


def cross_entropy(draw: Draw) -> Case:
    b, t, w = draw.integer(2, 3), draw.integer(1, 4), draw.integer(2, 9)
    kwargs, regimes = _targets(draw, b, t, w)
    kwargs["normaliser"] = draw.choice([None, 3.7])
    regimes |= _flags(
        own_mean=kwargs["normaliser"] is None, given_normaliser=kwargs["normaliser"] is not None
    )
    return Case((draw.rng.normal(size=(b, t, w)) * draw.choice([0.5, 2.0]),), kwargs, regimes)


def log_prob(draw: Draw) -> Case:
    b, t, w, d = draw.integer(2, 3), draw.integer(1, 4), draw.integer(2, 9), draw.integer(1, 5)
    kwargs, regimes = _targets(draw, b, t, w)
    kwargs |= {
        "temperature": draw.choice([0.6, 1.7]),
        "block": draw.choice([(1, 1), (2, 3), (256, 4096)]),
    }
    regimes |= _flags(one_block=kwargs["block"][0] > t * b, blocks=kwargs["block"][1] < w)
    return Case((_activations(draw, b, t, d, 0.5), _weight(draw, w, d)), kwargs, regimes)


def head_cross_entropy(draw: Draw) -> Case:
    b, t, w, d = draw.integer(2, 3), draw.integer(1, 4), draw.integer(2, 9), draw.integer(1, 5)
    kwargs, regimes = _targets(draw, b, t, w)
    kwargs |= {"normaliser": draw.choice([None, 3.7]), "block": draw.choice([(2, 3), (256, 4096)])}
    regimes |= _flags(one_block=kwargs["block"][0] > t * b, blocks=kwargs["block"][1] < w)
    return Case((_activations(draw, b, t, d, 0.5), _weight(draw, w, d)), kwargs, regimes)


def mtp(draw: Draw) -> Case:
    b, t, d, order = (
        draw.integer(1, 3),
        draw.integer(1, 4),
        draw.integer(2, 6),
        draw.choice(["embedding_hidden", "hidden_embedding"]),
    )
    inputs = (
        draw.rng.normal(size=(b, t, d)),
        _activations(draw, b, t, d),
        _norm_weight(draw, d),
        _norm_weight(draw, d),
        _weight(draw, d, 2 * d),
    )
    return Case(inputs, {"eps": draw.choice([0.1, 0.5]), "order": order}, {order})


def grpo(draw: Draw) -> Case:
    n, t, ratio = (
        draw.integer(2, 4),
        draw.integer(1, 5),
        draw.choice(["token", "sequence", "sequence_mean"]),
    )
    mask = np.arange(t) < draw.rng.integers(
        0 if draw.choice([True, False, False]) else 1, t + 1, (n, 1)
    )
    mask[0] = True
    size = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    advantages = draw.rng.choice([-1, 1], n) * draw.rng.uniform(0.3, 2.5, n)
    advantages[draw.integer(0, n - 1)] *= draw.choice([0.0, 1.0, 1.0])
    places = np.array([[0.45, 0.7], [0.85, 1.15], [1.35, 1.9], [2.2, 2.6]])[
        draw.rng.integers(0, 4, (n, t))
    ]
    log_ratio = np.log(draw.rng.uniform(places[..., 0], places[..., 1]))
    if ratio != "token":  # one ratio an output, unevenly spread over its tokens
        share = draw.rng.uniform(0.5, 1.5, (n, t)) * mask
        share = (
            share
            / np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
            * (size if ratio == "sequence_mean" else 1)
        )
        log_ratio = log_ratio[:, :1] * share
    log_prob = -draw.rng.uniform(0.1, 3.0, (n, t))
    old, reference = log_prob - log_ratio, log_prob - 0.5 * draw.rng.normal(size=(n, t))
    old[~mask] = reference[~mask] = np.nan  # what stands at padding never counts
    kl_weight, average = (
        draw.choice([0.0, 0.04, 0.7]),
        draw.choice(["sequence", "token", "constant"]),
    )
    kl = draw.choice(["k1", "k2", "k3", "unbiased"]) if kl_weight else "k3"
    off_policy, dual_clip = draw.choice([None, 0.03]), draw.choice([None, 2.0])
    kl_level, kl_bounds = draw.choice(["token", "sequence"]), None
    if kl in ("k3", "unbiased") and kl_level == "token" and draw.choice([True, False]):
        kl_bounds = draw.choice([(0.75, 10.0), (20.0, 0.18)])  # far from every |u| and k3(u)
        far = np.where(draw.rng.choice([True, False], (n, t)), [[1.0]], [[0.1]]) + draw.rng.uniform(
            0, 0.4, (n, t)
        )
        reference = np.where(mask, log_prob + far * draw.rng.choice([-1, 1], (n, t)), np.nan)
    kwargs = {
        "advantages": advantages,
        "mask": mask,
        "old_log_prob": old,
        "clip": draw.choice([(0.2, 0.2), (0.2, 0.28)]),
        "reference_log_prob": reference if kl_weight else None,
        "dual_clip": dual_clip,
        "ratio": ratio,
        "average": average,
        "length": 7 if average == "constant" else None,
        "kl_weight": kl_weight,
        "kl": kl,
        "kl_level": kl_level,
        "kl_bounds": kl_bounds,
        "off_policy": off_policy,
    }
    z = np.where(mask, log_ratio, 0)
    rho = np.exp(
        z
        if ratio == "token"
        else z.sum(axis=1, keepdims=True) / (size if ratio == "sequence_mean" else 1)
    )
    region = np.where(rho < 0.8, "below", np.where(rho > 1 + kwargs["clip"][1], "above", "inside"))
    signs = np.where(advantages > 0, "up", np.where(advantages < 0, "down", "zero"))[:, None]
    regimes = {f"{s}_{r}" for s, r, m in np.broadcast(signs, region, mask) if m and s != "zero"}
    drift, live = np.where(mask, -log_ratio, 0).sum(axis=1) / size[:, 0], mask & (rho >= 0.8)
    regimes |= {
        f"ratio_{ratio}",
        f"average_{average}",
        f"kl_{kl}" if kl_weight else "no_kl",
    } | _flags(
        zero_advantage=(advantages == 0).any(),
        padded=not mask.all(),
        empty=not mask.any(axis=1).all(),
        dropped=off_policy is not None
        and (((advantages < 0) & (drift > off_policy))[:, None] & live).any(),
        dual_clipped=dual_clip is not None
        and ((advantages[:, None] < 0) & (rho > 2.0) & mask).any(),
        kl_of_outputs=bool(kl_weight) and kl_level == "sequence",
        far_reference=bool(kl_weight) and kl_bounds is not None and kl_bounds[0] < 1,
        large_kl=bool(kl_weight) and kl_bounds is not None and kl_bounds[1] < 1,
    )
    return Case((log_prob,), kwargs, regimes, lambda y: {"unclipped": y.unclipped, "kept": y.kept})


def preference_loss(draw: Draw) -> Case:
    n, d, scale = draw.integer(2, 4), draw.integer(1, 5), draw.choice([0.5, 2.0])
    chosen, rejected, w = (
        draw.rng.normal(size=(n, d)),
        draw.rng.normal(size=(n, d)),
        scale * _weight(draw, 1, d),
    )
    wrong = ((chosen - rejected) @ w.T < 0).any()
    return Case(
        (chosen, rejected, w), {}, _flags(wrong_order=wrong, right_order=not wrong, narrow=d == 1)
    )


CASES: dict[str, Callable[[Draw], Case]] = {
    "linear": linear,
    "embedding": embedding,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "ffn": ffn,
    "rope": rope,
    "attention": attention,
    "flash_attention": flash_attention,
    "mla": mla,
    "mla_absorbed": mla,
    "router": router,
    "balance_loss": balance_loss,
    "moe": moe,
    "cross_entropy": cross_entropy,
    "log_prob": log_prob,
    "head_cross_entropy": head_cross_entropy,
    "mtp": mtp,
    "grpo": grpo,
    "preference_loss": preference_loss,
}

_ATTENTION = {
    "padding",
    "documents",
    "sees_nothing",
    "unmasked",
    "causal",
    "full",
    "cached",
    "square",
    "decode",
    "shared_key",
    "shared_value",
    "own_heads",
    "value_width_differs",
    "one_width",
}
_MLA = {
    "padding",
    "documents",
    "unmasked",
    "compressed",
    "uncompressed",
    "cached",
    "prefill",
    "decode",
    "value_is_nope",
    "value_differs",
    "many_heads",
}
REGIMES: dict[str, set[str]] = {
    "linear": {"narrow", "wide"},
    "embedding": {"repeated", "unused"},
    "rms_norm": {"one", "many", "small_eps", "one_row"},
    "swiglu": {"negative", "positive", "saturated"},
    "ffn": {"narrow", "wide"},
    "rope": {"interleaved", "halves", "by_row", "shared"},
    "attention": _ATTENTION,
    "flash_attention": _ATTENTION | {"one_block", "blocks"},
    "mla": _MLA,
    "mla_absorbed": _MLA,
    "router": {
        "sigmoid",
        "softmax",
        "grouped",
        "ungrouped",
        "biased",
        "unbiased",
        "negative_bias",
        "normalised",
        "raw",
        "epsilon",
        "one_choice",
    },
    "balance_loss": {"masked", "whole", "empty_sequence", "routed", "best"},
    "moe": {"all_but_one_hit", "some_empty", "shared", "only_routed", "one_token", "one_choice"},
    "cross_entropy": {"masked", "whole", "weighted", "own_mean", "given_normaliser"},
    "log_prob": {"masked", "whole", "weighted", "one_block", "blocks"},
    "head_cross_entropy": {"masked", "whole", "weighted", "one_block", "blocks"},
    "mtp": {"embedding_hidden", "hidden_embedding"},
    "preference_loss": {"wrong_order", "right_order", "narrow"},
    "grpo": {
        "up_inside",
        "up_above",
        "up_below",
        "down_inside",
        "down_above",
        "down_below",
        "zero_advantage",
        "padded",
        "empty",
        "dropped",
        "dual_clipped",
        "ratio_token",
        "ratio_sequence",
        "ratio_sequence_mean",
        "average_sequence",
        "average_token",
        "average_constant",
        "kl_k1",
        "kl_k2",
        "kl_k3",
        "kl_unbiased",
        "no_kl",
        "kl_of_outputs",
        "far_reference",
        "large_kl",
    },
}


def _parameters(
    draw: Draw, config: ModelConfig
) -> tuple[dict[str, np.ndarray], list[str], Callable[[Sequence[Any]], dict[str, Any]]]:
    """All parameters, normal with std 0.15, norms and gate biases off neutral; the names of those
    that get a gradient; and what makes the model's dict of values for those, with the buffers
    beside them."""
    params = {
        name: draw.rng.normal(size=shape) * 0.15
        if not name.endswith("norm.weight")
        else _norm_weight(draw, shape[0])
        for name, shape in parameter_shapes(config).items()
    }
    names = [name for name in params if not is_buffer(name)]

    def given(values: Sequence[Any]) -> dict[str, Any]:
        place = namespace(values=values[0]).asarray
        buffers = {name: place(x) for name, x in params.items() if is_buffer(name)}
        return dict(zip(names, values, strict=True)) | buffers

    return params, names, given


def model_grpo_case(
    draw: Draw, *, config: ModelConfig, table: Ops, length: int = 9
) -> tuple[Case, list[str], AnyOp]:
    """GRPO through the whole model as one op: hidden states, log-probabilities in blocks, the loss;
    routes replayed.

    The model runs without its own loss, so the MTP module takes no part and its gradients are
    exactly 0. Four outputs, of two questions with rewards that differ, padding, off-policy ratios
    and a reference, V3.2's KL.
    """
    config = replace(config, mtp_depth=1)
    params, names, given = _parameters(draw, config)
    tokens, row = draw.tokens((4, length), config.vocabulary), np.arange(length - 1)
    mask = (row >= 3) & (row < np.array([[length - 1], [length - 2], [length - 3], [length - 1]]))
    advantages = ops.group_advantages(draw.rng.normal(size=(2, 2)) + np.array([[0.5, -0.5]]))
    shift, away = (draw.rng.normal(size=mask.shape) for _ in range(2))

    def log_probs(
        values: Sequence[Any], routes: Any, table: Ops = table
    ) -> tuple[Any, Any, Any, Any]:
        named, place = given(values), namespace(values=values[0]).asarray
        output, saved = reference_model.forward(
            named, place(tokens), config, routes=routes, ops=table, with_loss=False
        )
        head, targets = named["lm_head.weight"], place(tokens[:, 1:])
        y, lp = table["log_prob"].forward(
            output.hidden[:, :-1, :], head, targets=targets, temperature=0.8, block=(5, 60)
        )
        return y, lp, output, saved

    def forward(*values: Any, **choices: Any) -> tuple[Any, Any]:
        y, lp, output, saved = log_probs(values, choices.pop("routes", None))
        place = namespace(values=values[0]).asarray
        loss, grpo_saved = table["grpo"].forward(
            y,
            advantages=place(advantages),
            mask=place(mask),
            old_log_prob=place(old),
            kl="unbiased",
            kl_weight=0.3,
            reference_log_prob=place(reference),
            clip=(0.2, 0.28),
            off_policy=0.3,
            **{name: place(choice) for name, choice in choices.items()},
        )
        return (loss.loss, loss.unclipped, loss.kept, output.routes), (grpo_saved, lp, saved)

    def backward(dy: Any, kept: Any) -> tuple[Any, ...]:
        grpo_saved, lp, saved = kept
        dh, dw_head = table["log_prob"].backward(table["grpo"].backward(dy, grpo_saved), lp)
        last = namespace(dh=dh).concat(
            (dh, 0 * dh[:, :1, :]), axis=1
        )  # the last position predicts nothing
        grads = reference_model.backward(saved, dhidden=last)
        grads["lm_head.weight"] = grads["lm_head.weight"] + dw_head
        return tuple(grads.values())

    inputs = tuple(params[name] for name in names)
    now = log_probs(inputs, None, ops.REFERENCE)[0]
    old, reference = now - 0.3 * shift, now - 0.5 * away

    def replay(y: Any) -> dict[str, Any]:
        return {"unclipped": y[1], "kept": y[2], "routes": y[3]}

    return Case(inputs, replay=replay), names, Op(forward, backward)


def model_variant(
    config: ModelConfig, conventions: Conventions, mtp_hidden: Any = "raw"
) -> ModelConfig:
    """The config with everything the other way round: V2's gate, no query compression, no shared
    experts, a tied head, raw MTP."""
    conventions = replace(conventions, mtp_hidden=mtp_hidden, mtp_zero_first_embedding=True)
    return replace(
        config,
        q_latent=None,
        gate="softmax",
        group_score="max",
        gate_bias=False,
        normalise_weights=False,
        shared_experts=0,
        dense_layers=0,
        layers=2,
        yarn=None,
        tied=True,
        conventions=conventions,
    )


def model_case(
    draw: Draw,
    *,
    config: ModelConfig | None = None,
    convention: str = "official",
    table: Ops = ops.REFERENCE,
    length: int = 12,
    model: Any = reference_model,
    masked: bool = False,
) -> tuple[Case, list[str], AnyOp]:
    """The whole model as one op: (case, the parameters' names, the pair), routes replayed.

    Its outputs are the loss, the hidden states and the logits, so cotangents come in by all three
    ways: together, or (``masked``) the loss's from its own backward with the default dloss = 1.
    Parameters are normal with std 0.15, norms and gate biases off neutral: at std 0.006 half the
    tensors' differences drown in rounding. ``masked`` pads the first row on the left and packs two
    documents into the second. ``model`` is the module with forward and backward (a planted bug puts
    its own there).
    """
    config = config or replace(preset("tiny"), conventions=CONVENTIONS[convention])
    params, names, given = _parameters(draw, config)
    tokens, options = draw.tokens((2, length), config.vocabulary), {}
    if masked:
        start, cut = 2, length // 2
        row = np.arange(length)
        options = {
            "key_mask": np.stack([row >= start, row >= 0]),
            "segments": np.stack([0 * row, (row >= cut).astype(int)]),
            "positions": np.stack([row - start, row - cut * (row >= cut)]),
        }

    def model_forward(*values: Any, routes: dict[int, Route] | None = None) -> tuple[Any, Any]:
        named, place = given(values), namespace(values=values[0]).asarray
        placed = {name: place(x) for name, x in options.items()}
        output, saved = model.forward(
            named, place(tokens), config, routes=routes, ops=table, **placed
        )
        return (
            output.loss,
            output.hidden,
            model.logits(named, output.hidden, table),
            output.routes,
        ), saved

    def model_backward(dy: tuple[Any, Any, Any], saved: Any) -> tuple[Any, ...]:
        if not masked:
            return tuple(model.backward(saved, dloss=dy[0], dhidden=dy[1], dlogits=dy[2]).values())
        of_loss, of_others = (
            model.backward(saved),
            model.backward(saved, dhidden=dy[1], dlogits=dy[2]),
        )
        return tuple(dy[0] * of_loss[name] + of_others[name] for name in of_loss)

    case = Case(tuple(params[name] for name in names), replay=lambda y: {"routes": y[3]})
    return case, names, Op(model_forward, model_backward)
