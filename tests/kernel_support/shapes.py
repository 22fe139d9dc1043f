"""Shapes for kernels: drawn around the sizes of warps and chunks, and V3's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.check.cases import CASES, Case, Draw
from refimpl.ops import Yarn, rope_frequencies
from refimpl.ops.attention import visible

from .launches import LARGE

# Shapes for kernels: sizes around warps and chunks of 16 bytes, and 1.
WIDTHS = (1, 2, 7, 8, 31, 32, 33, 64, 100, 264)


def _rms_norm(draw: Draw) -> Case:
    d = draw.choice(WIDTHS)
    x = draw.rng.normal(size=(draw.integer(1, 3), draw.integer(1, 2), d))
    return Case((x, draw.rng.normal(size=d)), {"eps": draw.choice([1e-6, 0.2])})


def _swiglu(draw: Draw) -> Case:
    shape = (draw.integer(1, 3), draw.choice(WIDTHS))
    return Case((4 * draw.rng.normal(size=shape), draw.rng.normal(size=shape)))


def _rope(draw: Draw) -> Case:
    case = CASES["rope"](draw)
    r = 2 * draw.choice([1, 3, 4, 8, 32])
    (x,) = case.inputs
    assert x is not None
    inv_freq = np.logspace(0, -3, r // 2)
    return Case((draw.rng.normal(size=(*x.shape[:-1], r)),), case.kwargs | {"inv_freq": inv_freq})


def _cross_entropy(draw: Draw) -> Case:
    case, w = CASES["cross_entropy"](draw), draw.choice([*WIDTHS[1:], 1030, 4106])
    (x,) = case.inputs
    assert x is not None
    targets = np.where(case.kwargs["targets"] < 0, -100, draw.rng.integers(0, w, x.shape[:-1]))
    return Case((3 * draw.rng.normal(size=(*x.shape[:-1], w)),), case.kwargs | {"targets": targets})


def _log_prob(draw: Draw) -> Case:
    w = draw.choice([2, 33, 100])
    d = draw.choice([1, 8, 33])
    b, t = (2, draw.integer(4, 7))
    mask = draw.choice(
        [None, draw.rng.random((b, t)) < 0.7, draw.rng.choice([0.0, 0.5, 1.5], (b, t))]
    )
    targets = draw.rng.integers(0, w, (b, t))
    inputs = draw.rng.normal(size=(b, t, d)), draw.rng.normal(size=(w, d)) / np.sqrt(d)
    kwargs = {
        "targets": targets if mask is None else np.where(mask != 0, targets, -100),
        "mask": mask,
    }
    kwargs |= {"temperature": draw.choice([0.6, 1.7]), "block": draw.choice([(2, w), (256, 4096)])}
    return Case(inputs, kwargs)


def _embedding(draw: Draw) -> Case:
    w, d = draw.integer(1, 6), draw.choice(WIDTHS)
    return Case(
        (draw.rng.normal(size=(w, d)),), {"ids": draw.rng.integers(0, w, (draw.integer(1, 3), 7))}
    )


def _router(draw: Draw) -> Case:
    case = CASES["router"](draw)
    if draw.choice([True, False]):  # V3's proportions, and more experts than lanes
        groups, size, d = (*draw.choice([(4, 8), (8, 8), (2, 33)]), draw.choice([4, 33]))
        w, x = draw.rng.normal(size=(groups * size, d)), draw.rng.normal(size=(2, 2, d))
        more = {
            "groups": groups,
            "keep_groups": max(1, groups // 2),
            "top_k": draw.choice([1, 4, 8]),
        }
        bias = draw.choice([None, 0.1 * draw.rng.normal(size=groups * size)])
        case = Case((x, w / np.sqrt(d)), case.kwargs | more | {"bias": bias}, replay=case.replay)
    return case


def _moe(draw: Draw) -> Case:
    d = draw.choice([1, 8, 33, 100])
    f = draw.integer(3, 6)
    experts = draw.integer(4, 7)
    tokens = draw.integer(4, 7)
    shared, k = (
        draw.choice([None, 5]),
        draw.choice([1, 2, experts - 1]),
    )  # up to 6: more than a thread loads ahead
    indices = (
        np.argsort(draw.rng.random((tokens, experts - 1)), axis=-1)[:, :k] + 1
    )  # expert 0 gets no token
    x, weights = draw.rng.normal(size=(tokens, d)), draw.rng.uniform(0.2, 1.5, (tokens, k))

    def weight(*shape: int) -> np.ndarray:
        return np.asarray(draw.rng.normal(size=shape) / np.sqrt(shape[-1]))

    routed = weight(experts, f, d), weight(experts, f, d), weight(experts, d, f)
    extra = (
        (None, None, None)
        if shared is None
        else (weight(shared, d), weight(shared, d), weight(d, shared))
    )
    return Case((x, weights, *routed, *extra), {"indices": indices})


def _attention(draw: Draw) -> Case:
    """Several tiles of `launches.SMALL`, ragged at the ends, and widths of two kernels."""
    b, h = draw.integer(1, 2), draw.choice([1, 2, 3])
    t, more = draw.choice([1, 20, 33, 40]), draw.choice([0, 0, 1, 9, 18])
    more = max(more, 20 - t)
    x, v = draw.choice([(9, 6), (16, 16), (16, 8), (24, 16)])
    causal = draw.choice([True, True, False])
    key_mask = draw.choice([None, draw.rng.random((b, t + more)) < 0.6])
    segments = draw.choice([None, np.sort(draw.rng.integers(-1, 3, (b, t + more)))])
    if segments is None and not causal and draw.choice([True, False]):
        t, more = t + 2 * more, -more  # more queries than keys
        key_mask = None if key_mask is None else key_mask[:, : t + more]
    s = t + more
    places = np.empty((b, t)), np.empty((b, s))
    seen = visible((0, t), (0, s), *places, causal, key_mask, segments)
    if seen.sum(axis=-1).max() < 2:  # of one key alone, the scores' gradient is 0, or rounding
        key_mask = segments = None
    key_heads, value_heads = draw.choice([(h, h), (1, 1), (1, h), (h, 1)])
    shapes = (b, t, h, x), (b, s, key_heads, x), (b, s, value_heads, v)
    kwargs = {"scale": draw.choice([0.3, 1.0]), "causal": causal}
    kwargs |= {"key_mask": key_mask, "segments": segments}
    return Case([draw.rng.normal(size=shape) for shape in shapes], kwargs)


SHAPES: dict[str, Callable[[Draw], Case]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "cross_entropy": _cross_entropy,
    "log_prob": _log_prob,
    "embedding": _embedding,
    "router": _router,
    "moe": _moe,
    "attention": _attention,
    "grpo": CASES["grpo"],
}


def _v3_router(draw: Draw) -> Case:
    x, w = draw.rng.normal(size=(ROWS, 128)), draw.rng.normal(size=(256, 128)) / np.sqrt(128)
    kwargs = {
        "top_k": 8,
        "groups": 8,
        "keep_groups": 4,
        "scale": 2.5,
        "bias": 0.01 * draw.rng.normal(size=256),
    }
    return Case((x, w), kwargs, replay=lambda y: {"routes": y.indices})


ROWS, FEW = (300, 50) if LARGE else (2, 2)


V3: dict[str, Callable[[Draw], Case]] = {  # V3's widths
    "rms_norm": lambda draw: Case(
        (draw.rng.normal(size=(ROWS, 7168)), draw.rng.uniform(0.5, 1.5, 7168)), {"eps": 1e-6}
    ),
    "swiglu": lambda draw: Case(
        (draw.rng.normal(size=(ROWS, 18432)), draw.rng.normal(size=(ROWS, 18432)))
    ),
    "rope": lambda draw: Case(
        (draw.rng.normal(size=(1, ROWS, 128, 64)),),
        {"positions": np.arange(ROWS) + 4000, "inv_freq": rope_frequencies(64, 1e4, Yarn())},
    ),
    "cross_entropy": lambda draw: Case(
        (2 * draw.rng.normal(size=(FEW, 129280)),), {"targets": draw.rng.integers(0, 129280, FEW)}
    ),
    "embedding": lambda draw: Case(
        (draw.rng.normal(size=(50, 7168)),), {"ids": draw.rng.integers(0, 40, FEW * 30)}
    ),
    "router": _v3_router,
}
