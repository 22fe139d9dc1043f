"""The cases of the conformance vectors: shapes, settings and inputs, all from integers.

Two sizes. ``small`` has odd shapes and every regime that matters; ``v3-shaped`` has V3's head
widths (N 128, R 64, V 128) with at most 4 heads, 8 experts, and 256 for every other width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ops import GRPO_PRESETS
from .cases import OpCase
from .generator import dyadics, integers

__all__ = ["OPS", "SIZES", "WRONG", "Vector", "cases_of"]

SIZES = ("small", "v3-shaped")  # of the cases

WRONG = {  # an op's first case once more, with the numbers of a planted bug: a check must refuse it
    "rms_norm": "no mean term",
    "mla": "gradient of k_pe from one head",
    "router": "normaliser taken as a constant",
    "moe": "slots in dispatch order",
    "cross_entropy": "masked targets leak",
    "grpo": "advantage's sign",
    "mtp": "halves swapped",
}


@dataclass
class Vector:
    """One case: the op's inputs and other arguments; cotangents follow once outputs are known."""

    name: str
    op: str
    regimes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # other arguments that are no arrays
    inputs: dict[str, np.ndarray | None] = field(default_factory=dict)
    aux: dict[str, np.ndarray] = field(default_factory=dict)
    note: str = ""
    replayed: bool = True  # discrete choices are arguments, too

    def real(
        self, name: str, *shape: int, low: int = -127, high: int = 127, shift: int = 6
    ) -> np.ndarray:
        """An input of about ±2."""
        self.inputs[name] = x = dyadics(f"{self.name}/in/{name}", shape, low, high, shift)
        return x

    def weight(self, name: str, *shape: int) -> None:
        """A matrix that about keeps the size of what it multiplies: 73 / 2^shift is the spread."""
        self.real(name, *shape, shift=6 + (shape[-1].bit_length() + 1) // 2)

    def norm(self, name: str, width: int) -> None:
        """The weight of a norm: positive, off 1."""
        self.real(name, width, low=40, high=120)

    def number(self, name: str, *shape: int, low: int, high: int, shift: int = 0) -> np.ndarray:
        """A real argument without gradient."""
        self.aux[name] = x = dyadics(f"{self.name}/aux/{name}", shape, low, high, shift)
        return x

    def ids(self, name: str, *shape: int, below: int) -> np.ndarray:
        self.aux[name] = x = integers(f"{self.name}/aux/{name}", shape, 0, below - 1)
        return x

    def positions(self, *shape: int, start: int = 3) -> None:
        """Positions in order, another start for each row."""
        rows = start + 17 * np.arange(shape[0])[:, None] if len(shape) == 2 else start
        self.aux["positions"] = rows + np.arange(shape[-1])

    def frequencies(self, width: int) -> None:
        """Rotation frequencies from 1 down, about V3's spread: 2^(−i/2), a power of two or 181/256
        of one."""
        pair = np.arange(width // 2)
        odd = np.where(pair % 2, 181, 256).astype(np.float64)
        self.aux["inv_freq"] = np.ldexp(odd, -8 - pair // 2)

    def mask(self, name: str, rows: list[str]) -> np.ndarray:
        """A mask written as rows of 1 and 0."""
        self.aux[name] = x = np.array([[c == "1" for c in row] for row in rows])
        return x

    def case(self, cot: dict[str, np.ndarray]) -> OpCase:
        return OpCase(self.op, self.inputs, self.settings | self.aux, cot)


Maker = Callable[[str, Callable[..., Vector]], Iterator[Vector]]


def linear(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    b, t, i, o = (2, 3, 5, 4) if size == "small" else (1, 8, 256, 192)
    v = new("wide")
    v.real("x", b, t, i)
    v.weight("w", o, i)
    yield v


def embedding(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    w, d, t = (7, 5, 6) if size == "small" else (64, 256, 16)
    v = new("repeated", "unused")
    v.real("w", w, d)
    ids = v.ids("ids", 2, t, below=w - 1)
    ids[:, -1] = ids[:, 0]
    yield v


def rms_norm(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    d = 7 if size == "small" else 256
    for eps, regime in ((0.125, "many"), (2.0**-20, "small_eps")):
        v = new(regime, eps=eps)
        v.real("x", 2, 3, d)
        v.norm("w", d)
        yield v


def swiglu(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    f = 7 if size == "small" else 256
    for shift, regime in ((6, "negative"), (3, "saturated")):
        v = new(regime, "positive")
        v.real("gate", 2, 3, f, shift=shift)
        v.real("up", 2, 3, f)
        yield v


def ffn(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    d, f = (5, 7) if size == "small" else (256, 192)
    v = new("wide")
    v.real("x", 2, 3, d)
    v.weight("w_gate", f, d)
    v.weight("w_up", f, d)
    v.weight("w_down", d, f)
    yield v


def rope(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    h, r = (3, 6) if size == "small" else (4, 64)
    for layout, factor, shape in (("interleaved", 0.875, (2, 4)), ("halves", 1.25, (4,))):
        v = new(layout, "by_row" if len(shape) == 2 else "shared", layout=layout, factor=factor)
        v.real("x", 2, 4, h, r)
        v.positions(*shape)
        v.frequencies(r)
        yield v


def attention(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    t, h, x, v_width = (5, 2, 6, 4) if size == "small" else (12, 4, 192, 128)
    v = new("causal", "own_heads", "square", "value_width_differs", scale=0.3125, causal=True)
    v.real("q", 2, t, h, x)
    v.real("k", 2, t, h, x)
    v.real("v", 2, t, h, v_width)
    yield v
    v = new(
        "causal",
        "cached",
        "shared_key",
        "shared_value",
        "padding",
        "documents",
        scale=0.4375,
        causal=True,
    )
    v.real("q", 2, 3, h, x)
    v.real("k", 2, 5, 1, x)
    v.real("v", 2, 5, 1, v_width)
    v.mask("key_mask", ["11110", "01111"])
    v.aux["segments"] = np.array([[0, 0, 0, 0, 0], [4, 4, 4, 9, 9]])
    yield v
    if size == "small":
        v = new("full", "own_heads", "square", scale=0.5, causal=False)
        v.real("q", 2, 3, 3, 5)
        v.real("k", 2, 3, 3, 5)
        v.real("v", 2, 3, 3, 5)
        yield v


def mla(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    """Compressed queries without a cache; uncompressed ones with a cache, padding and documents."""
    small = size == "small"
    h, n, r, width = (2, 3, 4, 5) if small else (4, 128, 64, 128)
    d, a, c = (9, 6, 5) if small else (256, 192, 256)
    for q_latent, past, layout, factor in ((a, 0, "interleaved", 1.0), (None, 2, "halves", 1.25)):
        t = 4 if small else 10
        regimes = ("prefill", "compressed") if q_latent else ("cached", "uncompressed", "padding")
        v = new(
            *regimes,
            "many_heads",
            heads=h,
            scale=0.40625 if small else 0.134765625,
            eps=0.125 if small else 2.0**-20,
            layout=layout,
            factor=factor,
        )
        v.real("x", 2, t, d)
        v.inputs |= {"cache": None, "w_q_a": None, "w_q_a_norm": None}
        if past:
            v.real("cache", 2, past, c + r)
        if q_latent:
            v.weight("w_q_a", q_latent, d)
            v.norm("w_q_a_norm", q_latent)
        v.weight("w_q_b", h * (n + r), q_latent or d)
        v.weight("w_kv_a", c + r, d)
        v.norm("w_kv_a_norm", c)
        v.weight("w_kv_b", h * (n + width), c)
        v.weight("w_o", d, h * width)
        v.positions(2, t, start=past + 2)
        v.frequencies(r)
        if past:
            v.mask("key_mask", ["1" * (past + t), "0" + "1" * (past + t - 1)])
            v.aux["segments"] = np.array([[1] * (past + t), [1] * past + [1] * 2 + [2] * (t - 2)])
        yield v


def router(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    """V3's gate, with the routes given and without, and V2's."""
    d, t = (5, 4) if size == "small" else (256, 12)
    for replayed in (True, False):
        v = new(
            "sigmoid",
            "grouped",
            "biased",
            "normalised",
            "epsilon",
            top_k=3,
            groups=4,
            keep_groups=2,
            group_score="top2",
            score="sigmoid",
            normalise=True,
            scale=2.5,
            epsilon=0.0625,
            masked_groups="-inf",
            ranking="scores",
        )
        v.replayed = replayed
        v.note = "" if replayed else "the gate chooses by itself, no choice within rounding"
        v.real("x", 2, t, d)
        v.weight("w", 8, d)
        v.number("bias", 8, low=-60, high=60, shift=8)
        yield v
    v = new(
        "softmax",
        "grouped",
        "unbiased",
        "raw",
        top_k=2,
        groups=2,
        keep_groups=1,
        group_score="max",
        score="softmax",
        normalise=False,
        scale=0.75,
        epsilon=0.0,
        masked_groups="zero",
        ranking="scores",
    )
    v.real("x", 2, t, d)
    v.weight("w", 6, d)
    yield v


def balance_loss(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    e, t = (5, 4) if size == "small" else (8, 16)
    v = new("routed", "masked", alpha=0.6875, top_k=2)
    v.real("scores", 2, t, e, low=5, high=123, shift=7)
    first = v.ids("counted", 2, t, 1, below=e)
    v.aux["counted"] = np.concatenate([first, (first + 2) % e], axis=-1)
    v.mask("mask", ["1" * (t - 1) + "0", "0" + "1" * (t - 1)])
    yield v


def moe(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    """The last expert but one has no token; without shared experts in the second case."""
    d, f, e, k, t = (5, 3, 4, 2, 4) if size == "small" else (256, 128, 8, 4, 10)
    for shared in (4 if size == "small" else 256, None):
        v = new("shared" if shared else "only_routed", "some_empty")
        v.real("x", 2, t, d)
        v.real("weights", 2, t, k, low=20, high=90)
        v.weight("w_gate", e, f, d)
        v.weight("w_up", e, f, d)
        v.weight("w_down", e, d, f)
        names = ("w_shared_gate", "w_shared_up", "w_shared_down")
        v.inputs |= dict.fromkeys(names)
        if shared:
            v.weight("w_shared_gate", shared, d)
            v.weight("w_shared_up", shared, d)
            v.weight("w_shared_down", d, shared)
        used = np.array([i for i in range(e) if i != e - 2])
        start = v.ids("indices", 2, t, 1, below=e - 1)
        v.aux["indices"] = used[(start + np.arange(k)) % (e - 1)]
        yield v


def targets(v: Vector, t: int, w: int, *, weighted: bool) -> None:
    """Targets, −100 where they don't count, with a mask or weights."""
    ids = v.ids("targets", 2, t, below=w)
    mask = v.mask("mask", ["1" * (t - 1) + "0", "0" + "1" * (t - 1)])
    v.aux["targets"] = np.where(mask, ids, -100)
    if weighted:
        v.aux["mask"] = mask * dyadics(f"{v.name}/aux/mask", mask.shape, 20, 120, 6)


def cross_entropy(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    t, w = (4, 9) if size == "small" else (8, 256)
    for normaliser, weighted in ((None, False), (3.75, True)):
        v = new("weighted" if weighted else "masked", normaliser=normaliser)
        v.real("logits", 2, t, w)
        targets(v, t, w, weighted=weighted)
        yield v


def log_prob(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    t, w, d = (4, 9, 5) if size == "small" else (8, 512, 256)
    v = new("masked", temperature=0.75)
    v.real("h", 2, t, d)
    v.weight("w", w, d)
    targets(v, t, w, weighted=False)
    yield v


def head_cross_entropy(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    t, w, d = (4, 9, 5) if size == "small" else (8, 512, 256)
    v = new("weighted", "given_normaliser", normaliser=3.75)
    v.real("h", 2, t, d)
    v.weight("w", w, d)
    targets(v, t, w, weighted=True)
    yield v


def mtp(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    d = 5 if size == "small" else 256
    for order in ("embedding_hidden", "hidden_embedding")[: 2 if size == "small" else 1]:
        v = new(order, eps=0.125, order=order)
        v.real("hidden", 2, 3, d)
        v.real("embedding", 2, 3, d)
        v.norm("w_hnorm", d)
        v.norm("w_enorm", d)
        v.weight("w_proj", d, 2 * d)
        yield v


# ln ρ in 64ths, far from every bound: 0.8, 1.2, 1.28; of whole outputs, small enough to stay inside
LOG_RATIOS = np.array([-46, -6, 5, 30, 56])
SMALL_LOG_RATIOS = np.array([-1, 0, 0, 1, 0])
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    # name: preset, and settings beside it; 33 / 128 lies between two 64ths
    "deepseekmath": ("deepseekmath", {}),
    "dapo": ("dapo", {}),
    "gspo": ("gspo", {}),
    "v3.2": ("v3.2", {"off_policy": 0.0625, "kl_weight": 0.25}),
    "r1_print": ("r1_print", {"kl_weight": 0.125}),
    "kl_bounds": ("deepseekmath", {"kl_bounds": (33 / 128, 10.0), "kl_weight": 0.25}),
}


def grpo(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    """The family: each sign of the advantage on each side of the clip, padding, a dropped
    output."""
    t = 5 if size == "small" else 16
    for name, (preset, more) in FAMILY.items():
        v = new(name, "padded", **GRPO_PRESETS[preset] | more)
        v.replayed = False
        log_prob = v.real("log_prob", 4, t, low=-180, high=-8)
        v.aux["advantages"] = np.array([1.25, -0.75, 0.5, -1.5])
        v.mask("mask", ["1" * t, "1" * (t - 2) + "00", "1" * t, "1" * (t - 1) + "0"])
        ratios = SMALL_LOG_RATIOS if preset == "r1_print" else LOG_RATIOS
        log_ratio = ratios[v.ids("old_log_prob", 4, t, below=len(ratios))]
        if name == "v3.2":
            log_ratio[1] = -6  # far from the old policy, and unclipped: dropped
        v.aux["old_log_prob"] = log_prob - log_ratio / 64
        if v.settings.get("kl_weight", 1):
            away = dyadics(f"{v.name}/aux/reference_log_prob", (4, t), -40, 40, 6)
            v.aux["reference_log_prob"] = log_prob + away
        yield v


def preference_loss(size: str, new: Callable[..., Vector]) -> Iterator[Vector]:
    d = 5 if size == "small" else 256
    v = new("wrong_order", "right_order")
    v.real("h_chosen", 4, d)
    v.real("h_rejected", 4, d)
    v.weight("w", 1, d)
    yield v


OPS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        linear,
        embedding,
        rms_norm,
        swiglu,
        ffn,
        rope,
        attention,
        mla,
        router,
        balance_loss,
        moe,
        cross_entropy,
        log_prob,
        head_cross_entropy,
        mtp,
        grpo,
        preference_loss,
    )
}  # in reading order


def cases_of(op: str, size: str) -> Iterator[Vector]:
    """The cases of an op: mla-1, mla-2, … ; v3-shaped ones are called mla-v3-1."""
    made: list[Vector] = []

    def new(*regimes: str, **settings: Any) -> Vector:
        name = f"{op}-{'v3-' if size == 'v3-shaped' else ''}{len(made) + 1}"
        made.append(Vector(name, op, regimes, settings))
        return made[-1]

    yield from OPS[op](size, new)
