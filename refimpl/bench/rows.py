"""What is measured: each row's inputs, the call that is timed, the least bytes it must move, and
its exact answer.

Letters: T tokens, D width, H heads, I hidden width of a dense feed-forward, E experts, K of them a
token, R = T·K routed rows, W vocabulary. A row's bytes count each input read once and each output
written once, in the storage type of the row, without what is smaller by a factor of the width
(weights of a norm, one number per row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..array import Array
from ..kernels.adamw import adamw
from ..kernels.cross_entropy import cross_entropy, cross_entropy_in_place
from ..kernels.grpo import grpo
from ..kernels.host import place
from ..kernels.launch import Launch
from ..kernels.log_prob import log_prob
from ..kernels.moe import combine, permute
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope
from ..kernels.router import router
from ..kernels.swiglu import swiglu
from ..ops import REFERENCE, select_experts
from ..optimizer import AdamW

__all__ = ["ROWS", "Maker", "Row", "Sizes", "Work", "worst_error"]

EPS = 1e-6
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V3's, at 4,096 tokens, and as many numbers as fit beside their float64 reference."""

    tokens: int = 4096
    width: int = 7168
    heads: int = 128
    rotated: int = 64
    hidden: int = 18432
    experts: int = 256
    groups: int = 8
    keep_groups: int = 4
    top_k: int = 8
    vocabulary: int = 129280
    outputs: int = 1024  # of GRPO
    length: int = 1024  # of each output
    parameters: int = 2**28  # of one AdamW step


class Work(NamedTuple):
    """One set of inputs and what is done with it."""

    inputs: tuple[Array, ...]  # what a baseline starts from
    run: Callable[[], object]  # its kernels are what is timed; may be called again and again
    check: Callable[
        [], float
    ]  # runs it once, and returns `worst_error` against the float64 reference
    reset: Callable[[], object] | None = None  # puts the inputs back that ``run`` overwrites


class Maker:
    """Random inputs, by the namespace of NumPy or CuPy, for one launch."""

    def __init__(
        self, launch: Launch, xp: ModuleType, sizes: Sizes, storage: Any, seed: int
    ) -> None:
        self.launch = launch
        self.xp = xp
        self.sizes = sizes
        self.storage = storage
        self.rng = xp.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = None) -> Array:
        drawn = self.rng.standard_normal(shape, dtype=np.float32)
        return drawn.astype(self.storage if dtype is None else dtype, copy=False)

    def integers(self, below: int, *shape: int) -> Array:
        return self.rng.integers(0, below, shape).astype(np.int64, copy=False)

    def order(self, slots: int) -> Array:
        """Slots in the order of experts drawn at random."""
        drawn = self.rng.random(slots, dtype=np.float32)
        return self.xp.argsort(drawn).astype(np.int64, copy=False)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    stem: str  # of the file in kernels/
    shape: str  # of `Sizes`, by their names
    formula: str  # of the bytes or flops, in the letters above
    bytes: Callable[[Sizes], int]
    make: Callable[[Maker], Work]
    storage: str = "bfloat16"
    flops: Callable[[Sizes], int] | None = (
        None  # of a row with dense products, which is timed as it is called
    )


def worst_error(found: tuple[Array, ...], exact: tuple[Array, ...]) -> float:
    """The largest error of any array, over the largest value of that array; NaN where either has
    one and inf for another shape."""
    worst = 0.0
    for got, wanted in zip(found, exact, strict=True):
        if tuple(got.shape) != tuple(wanted.shape):
            return float("inf")
        difference = float(abs(got.astype(np.float64) - wanted).max())
        largest = float(abs(wanted).max())
        if np.isnan(difference) or np.isnan(largest):
            return float("nan")
        worst = max(worst, difference / largest if largest else difference)
    return worst


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(np.float64) for x in arrays)


def _rms_norm(maker: Maker, *, backward: bool) -> Work:
    s, pair = maker.sizes, rms_norm(maker.launch)
    x = maker.normal(s.tokens, s.width)
    w = maker.normal(s.width)
    dy = maker.normal(s.tokens, s.width)
    _, saved = pair.forward(x, w, eps=EPS)

    def check() -> float:
        y, dx_dw = pair.forward(x, w, eps=EPS)[0], pair.backward(dy, saved)
        exact, kept = REFERENCE["rms_norm"].forward(*_wide(x, w), eps=EPS)
        return worst_error((y, *dx_dw), (exact, *REFERENCE["rms_norm"].backward(*_wide(dy), kept)))

    if backward:
        return Work((x, w, dy), lambda: pair.backward(dy, saved), check)
    return Work((x, w), lambda: pair.forward(x, w, eps=EPS), check)


def _rope(maker: Maker, *, backward: bool) -> Work:
    s, pair = maker.sizes, rope(maker.launch)
    x, dy = (maker.normal(1, s.tokens, s.heads, s.rotated) for _ in range(2))
    positions = maker.xp.arange(s.tokens)
    inv_freq = maker.xp.asarray(10000.0 ** (-np.arange(0, s.rotated, 2) / s.rotated))
    settings = {"positions": positions, "inv_freq": inv_freq}
    _, saved = pair.forward(x, **settings)

    def check() -> float:
        y, dx = pair.forward(x, **settings)[0], pair.backward(dy, saved)
        exact, kept = REFERENCE["rope"].forward(*_wide(x), **settings)
        return worst_error((y, dx), (exact, REFERENCE["rope"].backward(*_wide(dy), kept)))

    run = (lambda: pair.backward(dy, saved)) if backward else (lambda: pair.forward(x, **settings))
    return Work((dy if backward else x, saved.cos, saved.sin), run, check)


def _swiglu(maker: Maker, *, backward: bool) -> Work:
    s, pair = maker.sizes, swiglu(maker.launch)
    gate, up, dy = (maker.normal(s.tokens, s.hidden) for _ in range(3))
    _, saved = pair.forward(gate, up)

    def check() -> float:
        y, gradients = pair.forward(gate, up)[0], pair.backward(dy, saved)
        exact, kept = REFERENCE["swiglu"].forward(*_wide(gate, up))
        return worst_error(
            (y, *gradients), (exact, *REFERENCE["swiglu"].backward(*_wide(dy), kept))
        )

    if backward:
        return Work((gate, up, dy), lambda: pair.backward(dy, saved), check)
    return Work((gate, up), lambda: pair.forward(gate, up), check)


def _gate(maker: Maker) -> Work:
    """Logits come as they are: the product that makes them is with the identity, and not timed."""
    s = maker.sizes
    pair = router(maker.launch)
    xp = maker.xp
    logits, bias = maker.normal(s.tokens, s.experts), maker.normal(s.experts) / 10
    one = xp.eye(s.experts, dtype=logits.dtype)
    groups = {"groups": s.groups, "keep_groups": s.keep_groups}

    def run() -> Any:
        return pair.forward(logits, one, bias=bias, top_k=s.top_k, scale=2.5, **groups)[0]

    def check() -> float:
        found = run()
        ids = select_experts(found.scores + bias, s.top_k, s.groups, s.keep_groups, "top2", "-inf")
        if not bool((ids == found.indices).all()):
            return float("inf")  # other experts than the reference's on the same scores
        exact, _ = REFERENCE["router"].forward(
            *_wide(logits, one),
            bias=_wide(bias)[0],
            top_k=s.top_k,
            scale=2.5,
            routes=found.indices,
            **groups,
        )
        return worst_error((found.weights, found.scores), (exact.weights, exact.scores))

    return Work((logits, bias), run, check)


def _permute(maker: Maker) -> Work:
    s = maker.sizes
    x, order = maker.normal(s.tokens, s.width), maker.order(s.tokens * s.top_k)

    def run() -> tuple[Array, ...]:
        return (permute(maker.launch, x, order, s.top_k),)

    return Work((x, order), run, lambda: worst_error(run(), _wide(x[order // s.top_k])))


def _combine(maker: Maker) -> Work:
    s = maker.sizes
    rows, where = maker.normal(s.tokens * s.top_k, s.width), place(maker.order(s.tokens * s.top_k))
    weights = abs(maker.normal(s.tokens, s.top_k, dtype=np.float32))

    def run() -> tuple[Array, ...]:
        return (combine(maker.launch, rows, where, s.top_k, weights),)

    def check() -> float:
        (wide,) = _wide(weights)
        exact = sum(
            wide[:, k : k + 1] * _wide(rows[where[k :: s.top_k]])[0] for k in range(s.top_k)
        )
        return worst_error(run(), (exact,))

    return Work((rows, where, weights), run, check)


def _cross_entropy(maker: Maker) -> Work:
    """In place. The gradient would be a strange input of the next call (almost uniform), so there
    is a copy."""
    s = maker.sizes
    pair = cross_entropy(maker.launch)
    backward = cross_entropy_in_place(maker.launch)
    logits, targets = maker.normal(s.tokens, s.vocabulary), maker.integers(s.vocabulary, s.tokens)
    drawn = logits.copy()

    def reset() -> None:
        logits[...] = drawn

    def run() -> tuple[Array, ...]:
        loss, saved = pair.forward(logits, targets=targets)
        return loss, backward(1.0, saved)

    def check() -> float:
        reset()
        exact, kept = REFERENCE["cross_entropy"].forward(*_wide(logits), targets=targets)
        wanted = REFERENCE["cross_entropy"].backward(1.0, kept)
        del kept  # as large as the logits in float64
        return worst_error(run(), (exact, wanted))

    return Work((logits, targets), run, check, reset)


def _head(maker: Maker) -> Work:
    """The mean loss and both gradients, from hidden states: products included, in blocks."""
    s = maker.sizes
    pair = log_prob(maker.launch)
    xp = maker.xp
    h, targets = maker.normal(s.tokens, s.width), maker.integers(s.vocabulary, s.tokens)
    w = (maker.normal(s.vocabulary, s.width, dtype=np.float32) / np.float32(s.width**0.5)).astype(
        maker.storage
    )
    dy = xp.full((s.tokens,), -1 / s.tokens, dtype=np.float32)

    def run() -> tuple[Array, ...]:
        log_p, saved = pair.forward(h, w, targets=targets)
        return -log_p.mean(), *pair.backward(dy, saved)

    def check() -> float:
        exact, kept = REFERENCE["log_prob"].forward(*_wide(h, w), targets=targets)
        gradients = REFERENCE["log_prob"].backward(*_wide(dy), kept)
        del kept  # the head in float64
        return worst_error(run(), (-exact.mean(), *gradients))

    return Work((h, w, targets), run, check)


def _grpo(maker: Maker) -> Work:
    s, pair = maker.sizes, grpo(maker.launch)
    log_prob = -abs(maker.normal(s.outputs, s.length))
    old, reference = (log_prob + maker.normal(s.outputs, s.length) / 10 for _ in range(2))
    advantages = maker.normal(s.outputs)
    mask = maker.xp.ones((s.outputs, s.length), dtype=bool)
    given = {
        "advantages": advantages,
        "mask": mask,
        "old_log_prob": old,
        "reference_log_prob": reference,
    }

    def check() -> float:
        output, saved = pair.forward(log_prob, **given)
        wide = {name: x if x.dtype == bool else x.astype(np.float64) for name, x in given.items()}
        same = {
            "unclipped": output.unclipped,
            "kept": output.kept,
        }  # a ratio on the very bound may round to a side
        exact, kept = REFERENCE["grpo"].forward(*_wide(log_prob), **wide, **same)
        gradient = REFERENCE["grpo"].backward((1.0,), kept)
        return worst_error((output.loss, saved.dlog_prob), (exact.loss, gradient))

    return Work(
        (log_prob, old, reference, advantages), lambda: pair.forward(log_prob, **given), check
    )


def _adamw(maker: Maker) -> Work:
    p, g = (maker.normal(maker.sizes.parameters) for _ in range(2))
    optimizer = adamw(maker.launch)()

    def check() -> float:
        exact = {"p": p.astype(np.float64)}
        AdamW().update(exact, {"p": g.astype(np.float64)}, LEARNING_RATE)
        adamw(maker.launch)().update({"p": p}, {"p": g}, LEARNING_RATE)
        return worst_error((p,), (exact["p"],))

    return Work((p, g), lambda: optimizer.update({"p": p}, {"p": g}, LEARNING_RATE), check)


def _of(make: Callable[..., Work], *, backward: bool) -> Callable[[Maker], Work]:
    return lambda maker: make(maker, backward=backward)


ROWS = {
    row.name: row
    for row in (
        Row(
            "RMSNorm forward",
            "rms_norm",
            "tokens × width",
            "4TD",
            lambda s: 4 * s.tokens * s.width,
            _of(_rms_norm, backward=False),
        ),
        Row(
            "RMSNorm backward",
            "rms_norm",
            "tokens × width",
            "6TD",
            lambda s: 6 * s.tokens * s.width,
            _of(_rms_norm, backward=True),
        ),
        Row(
            "RoPE forward",
            "rope",
            "tokens × heads × rotated",
            "4TH·64",
            lambda s: 4 * s.tokens * s.heads * s.rotated,
            _of(_rope, backward=False),
        ),
        Row(
            "RoPE backward",
            "rope",
            "tokens × heads × rotated",
            "4TH·64",
            lambda s: 4 * s.tokens * s.heads * s.rotated,
            _of(_rope, backward=True),
        ),
        Row(
            "SwiGLU forward",
            "swiglu",
            "tokens × hidden",
            "6TI",
            lambda s: 6 * s.tokens * s.hidden,
            _of(_swiglu, backward=False),
        ),
        Row(
            "SwiGLU backward",
            "swiglu",
            "tokens × hidden",
            "10TI",
            lambda s: 10 * s.tokens * s.hidden,
            _of(_swiglu, backward=True),
        ),
        Row(
            "gate top-k",
            "router",
            "tokens × experts / top_k / keep_groups / groups",
            "4TE",
            lambda s: 4 * s.tokens * s.experts,
            _gate,
            "float32",
        ),
        Row(
            "MoE permute",
            "moe",
            "tokens × top_k × width",
            "2TD + 2RD",
            lambda s: 2 * s.tokens * s.width * (1 + s.top_k),
            _permute,
        ),
        Row(
            "MoE combine",
            "moe",
            "tokens × top_k × width",
            "2TD + 2RD",
            lambda s: 2 * s.tokens * s.width * (1 + s.top_k),
            _combine,
        ),
        Row(
            "CE forward + backward in place",
            "cross_entropy",
            "tokens × vocabulary",
            "4TW",
            lambda s: 4 * s.tokens * s.vocabulary,
            _cross_entropy,
        ),
        Row(
            "head + CE",
            "cross_entropy",
            "tokens × width × vocabulary",
            "6TDW",
            lambda s: (4 * s.tokens + 6 * s.vocabulary) * s.width,
            _head,
            flops=lambda s: 6 * s.tokens * s.width * s.vocabulary,
        ),
        Row(
            "GRPO from log-probabilities",
            "grpo",
            "outputs × length",
            "24 B a token",
            lambda s: 24 * s.outputs * s.length,
            _grpo,
            "float32",
        ),
        Row(
            "AdamW step",
            "adamw",
            "parameters",
            "28 B a parameter",
            lambda s: 28 * s.parameters,
            _adamw,
            "float32",
        ),
    )
}
"""By name, in the order of the table."""
