"""The work of each row of the benchmark: inputs, the call that is timed, and the check of its
results against the float64 reference.

Inputs are drawn so that a missing term of the answer shows: mean squares as small as RMSNorm's eps,
logits so far apart that their softmax is not negligible beside the target's 1, gradients not far
above AdamW's eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..array import Array, library
from ..kernels.adamw import adamw
from ..kernels.cross_entropy import cross_entropy_in_place
from ..kernels.flash_attention import flash_attention
from ..kernels.grpo import grpo
from ..kernels.host import place
from ..kernels.launch import Launch
from ..kernels.log_prob import log_prob
from ..kernels.mla_decode import mla_decode
from ..kernels.moe import combine, moe, permute, sort_slots
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope
from ..kernels.router import router
from ..kernels.swiglu import swiglu
from ..ops import IMPLEMENTATIONS, REFERENCE, AnyOp, select_experts
from ..optimizer import AdamW, Moments

__all__ = [
    "SPREAD",
    "Errors",
    "Maker",
    "Sizes",
    "Work",
    "adamw_work",
    "attention_errors",
    "attention_work",
    "combine_work",
    "cross_entropy_work",
    "decode_work",
    "error_of",
    "experts_work",
    "gate_work",
    "grpo_work",
    "head_work",
    "most_error",
    "number_type",
    "permute_work",
    "rms_norm_work",
    "rope_work",
    "swiglu_work",
    "worst_error",
]

EPS = 1e-6
LEARNING_RATE = 1e-3
CLIP = 0.8, 1.2  # GRPO's ratios, by default
SPREAD = 4  # standard deviation of the head's logits
# Allowed errors, in units of the type at a row's largest value: results rounded once, and sums
UNITS = {"bfloat16": 1, "float32": 64}
# Times as many where results are rounded in between: attention's weights before they are summed,
# experts' hidden numbers and their gradients
SEVERAL_UNITS = 2
CHECKED = 128 * 4096**2  # pairs of query and key that are compared: some heads of long sequences
TOGETHER = 64  # rows of attention's dq and dk whose largest value is one scale
BLOCK = 4096  # of the float64 attention: few calls, and no square of a long sequence
FLASH: AnyOp = IMPLEMENTATIONS["flash"].attention
Errors = dict[str, float]  # by the name of a result: its error over what is allowed; up to 1 holds


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V3's, at 4,096 tokens: as many as fit on a card beside their float64 reference."""

    tokens: int = 4096
    width: int = 7168
    heads: int = 128
    keys: int = 192  # width of a head's queries and keys
    values: int = 128
    rotated: int = 64
    latent: int = 512
    sequences: int = 128  # that are decoded together
    hidden: int = 18432
    experts: int = 256
    expert_hidden: int = 2048
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
    check: Callable[[], Errors]  # runs it, and compares each result with the float64 reference
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

    def normal(self, *shape: int, dtype: Any = None, scale: float = 1.0) -> Array:
        drawn = self.rng.standard_normal(shape, dtype=np.float32)
        drawn *= np.float32(scale)
        return drawn.astype(self.storage if dtype is None else dtype, copy=False)

    def integers(self, below: int, *shape: int) -> Array:
        return self.rng.integers(0, below, shape).astype(np.int64, copy=False)

    def order(self, slots: int) -> Array:
        """Slots in the order of experts drawn at random."""
        drawn = self.rng.random(slots, dtype=np.float32)
        return self.xp.argsort(drawn).astype(np.int64, copy=False)


def number_type(storage: str) -> Any:
    """The dtype of a name."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if storage == "bfloat16" else storage)


def most_error(storage: str) -> float:
    """What `worst_error` may be for a result of this type; above it a row does not hold, however
    fast it is."""
    import ml_dtypes

    information: Any = ml_dtypes.finfo
    return UNITS[storage] * float(information(number_type(storage)).eps)


def worst_error(got: Array, wanted: Array) -> float:
    """The largest error of ``got`` in any row (of the last axis), over the largest value of that
    row of ``wanted``; both have any shape, the same.

    NaN where either has one, inf for another shape, and beyond any bound for anything but 0 in a
    row of zeros.
    """
    if tuple(got.shape) != tuple(wanted.shape):
        return float("inf")
    rows = wanted.reshape(-1, wanted.shape[-1] if wanted.shape else 1)
    difference = got.astype(np.float64).reshape(rows.shape)
    difference -= rows
    scale = _largest(rows)
    scale[scale == 0] = 1e-200
    return abs(float((_largest(difference) / scale).max()))


def _largest(rows: Array) -> Array:
    """The largest absolute value of each row, without an array of their size."""
    return library(rows).maximum(rows.max(axis=-1), -rows.min(axis=-1))


def error_of(got: Array, wanted: Array, storage: str | None = None) -> float:
    """`worst_error`, with arguments as `worst_error`, over `most_error` of the type of ``got``, or
    of ``storage``."""
    return worst_error(got, wanted) / most_error(storage or str(got.dtype))


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(np.float64) for x in arrays)


def rms_norm_work(maker: Maker, *, backward: bool) -> Work:
    """RMSNorm, forward or backward."""
    s, pair = maker.sizes, rms_norm(maker.launch)
    x = maker.normal(s.tokens, s.width, scale=EPS**0.5)
    w = maker.normal(s.width)
    dy = maker.normal(s.tokens, s.width)
    _, saved = pair.forward(x, w, eps=EPS)

    def check() -> Errors:
        y, (dx, dw) = pair.forward(x, w, eps=EPS)[0], pair.backward(dy, saved)
        exact, kept = REFERENCE["rms_norm"].forward(*_wide(x, w), eps=EPS)
        exact_dx, exact_dw = REFERENCE["rms_norm"].backward(*_wide(dy), kept)
        return {"y": error_of(y, exact), "dx": error_of(dx, exact_dx), "dw": error_of(dw, exact_dw)}

    if backward:
        return Work((x, w, dy), lambda: pair.backward(dy, saved), check)
    return Work((x, w), lambda: pair.forward(x, w, eps=EPS), check)


def rope_work(maker: Maker, *, backward: bool) -> Work:
    """RoPE, forward or backward."""
    s, pair = maker.sizes, rope(maker.launch)
    x, dy = (maker.normal(1, s.tokens, s.heads, s.rotated) for _ in range(2))
    positions = maker.xp.arange(s.tokens)
    inv_freq = maker.xp.asarray(10000.0 ** (-np.arange(0, s.rotated, 2) / s.rotated))
    settings = {"positions": positions, "inv_freq": inv_freq}
    _, saved = pair.forward(x, **settings)

    def check() -> Errors:
        y, dx = pair.forward(x, **settings)[0], pair.backward(dy, saved)
        exact, kept = REFERENCE["rope"].forward(*_wide(x), **settings)
        exact_dx = REFERENCE["rope"].backward(*_wide(dy), kept)
        return {"y": error_of(y, exact), "dx": error_of(dx, exact_dx)}

    run = (lambda: pair.backward(dy, saved)) if backward else (lambda: pair.forward(x, **settings))
    return Work((dy if backward else x, saved.cos, saved.sin), run, check)


def swiglu_work(maker: Maker, *, backward: bool) -> Work:
    """SwiGLU, forward or backward."""
    s, pair = maker.sizes, swiglu(maker.launch)
    gate, up, dy = (maker.normal(s.tokens, s.hidden) for _ in range(3))
    _, saved = pair.forward(gate, up)

    def check() -> Errors:
        y, (dgate, dup) = pair.forward(gate, up)[0], pair.backward(dy, saved)
        exact, kept = REFERENCE["swiglu"].forward(*_wide(gate, up))
        exact_dgate, exact_dup = REFERENCE["swiglu"].backward(*_wide(dy), kept)
        return {
            "y": error_of(y, exact),
            "dgate": error_of(dgate, exact_dgate),
            "dup": error_of(dup, exact_dup),
        }

    if backward:
        return Work((gate, up, dy), lambda: pair.backward(dy, saved), check)
    return Work((gate, up), lambda: pair.forward(gate, up), check)


def attention_work(maker: Maker, *, backward: bool) -> Work:
    """Causal, with as many heads of keys and values as of queries. Heads are independent: of long
    sequences a few are compared, spread over all."""
    s, pair = maker.sizes, flash_attention(maker.launch)
    q = maker.normal(1, s.tokens, s.heads, s.keys)
    k = maker.normal(1, s.tokens, s.heads, s.keys)
    v, do = (maker.normal(1, s.tokens, s.heads, s.values) for _ in range(2))
    scale = s.keys**-0.5
    _, saved = pair.forward(q, k, v, scale=scale)

    def check() -> Errors:
        o, saved = pair.forward(q, k, v, scale=scale)
        found = o, *pair.backward(do, saved)
        several = max(1, min(s.heads, CHECKED // s.tokens**2))
        errors = dict.fromkeys(("o", "dq", "dk", "dv"), 0.0)
        for h in np.linspace(0, s.heads - 1, several).astype(int).tolist():
            own = [x[:, :, h : h + 1] for x in (q, k, v, do, *found)]
            exact, kept = FLASH.forward(*_wide(*own[:3]), scale=scale, block=BLOCK)
            wanted = exact, *FLASH.backward(*_wide(own[3]), kept)
            for name, error in attention_errors(own[4:], wanted).items():
                errors[name] = float(np.maximum(errors[name], error))
        return errors

    if backward:
        return Work((q, k, v, do), lambda: pair.backward(do, saved), check)
    return Work((q, k, v), lambda: pair.forward(q, k, v, scale=scale), check)


def attention_errors(found: Sequence[Array], exact: Sequence[Array]) -> Errors:
    """Of o, dq, dk and dv [1, T, 1, width] of one head: o and dv row by row, dq and dk by the
    largest of so many neighbouring rows: of a query that sees one key nothing is left, and the
    first rows are larger than the last, the more so the longer the sequence."""
    errors = {}
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, exact, strict=True):
        together = 1 if name in ("o", "dv") else TOGETHER
        tokens, width = y.shape[1], y.shape[-1]
        shape = (1, -1) if tokens % together else (-1, together * width)
        errors[name] = error_of(x.reshape(shape), y.reshape(shape)) / SEVERAL_UNITS
    return errors


def decode_work(maker: Maker) -> Work:
    """A new token of each sequence attends to its latent cache of T tokens. All heads share one key
    per token, whose first numbers are the value."""
    s, pair = maker.sizes, mla_decode(maker.launch)
    q = maker.normal(s.sequences, 1, s.heads, s.latent + s.rotated)
    cache = maker.normal(s.sequences, s.tokens, 1, s.latent + s.rotated)
    scale = (s.latent + s.rotated) ** -0.5

    def run() -> Array:
        return pair.forward(q, cache, cache[..., : s.latent], scale=scale)[0]

    def check() -> Errors:
        o, worst = run(), 0.0
        for b in range(s.sequences):
            own_q, own = _wide(q[b : b + 1], cache[b : b + 1])
            exact, _ = REFERENCE.attention.forward(own_q, own, own[..., : s.latent], scale=scale)
            worst = float(np.maximum(worst, error_of(o[b : b + 1], exact) / SEVERAL_UNITS))
        return {"o": worst}

    return Work((q, cache), run, check)


def gate_work(maker: Maker) -> Work:
    """Logits come as they are: the product that makes them is with the identity, and not timed."""
    s = maker.sizes
    pair = router(maker.launch)
    xp = maker.xp
    logits, bias = maker.normal(s.tokens, s.experts), maker.normal(s.experts) / 10
    one = xp.eye(s.experts, dtype=logits.dtype)
    groups = {"groups": s.groups, "keep_groups": s.keep_groups}

    def run() -> Any:
        return pair.forward(logits, one, bias=bias, top_k=s.top_k, scale=2.5, **groups)[0]

    def check() -> Errors:
        found = run()
        ids = select_experts(found.scores + bias, s.top_k, s.groups, s.keep_groups, "top2", "-inf")
        same = bool((ids == found.indices).all())  # as the reference's on the same scores
        exact, _ = REFERENCE["router"].forward(
            *_wide(logits, one),
            bias=_wide(bias)[0],
            top_k=s.top_k,
            scale=2.5,
            routes=found.indices,
            **groups,
        )
        return {
            "ids": 0.0 if same else float("inf"),
            "weights": error_of(found.weights, exact.weights),
            "scores": error_of(found.scores, exact.scores),
        }

    return Work((logits, bias), run, check)


def permute_work(maker: Maker) -> Work:
    """Tokens copied into the experts' order."""
    s = maker.sizes
    x, order = maker.normal(s.tokens, s.width), maker.order(s.tokens * s.top_k)
    where = place(order)

    def run() -> Array:
        return permute(maker.launch, x, where, s.top_k)

    def check() -> Errors:
        return {"rows": error_of(run(), _wide(x[order // s.top_k])[0])}

    return Work((x, order), run, check)


def combine_work(maker: Maker) -> Work:
    """The experts' rows added up per token."""
    s = maker.sizes
    rows, where = maker.normal(s.tokens * s.top_k, s.width), place(maker.order(s.tokens * s.top_k))
    weights = abs(maker.normal(s.tokens, s.top_k, dtype=np.float32))

    def run() -> Array:
        return combine(maker.launch, rows, where, weights)

    def check() -> Errors:
        (wide,) = _wide(weights)
        exact = sum(
            wide[:, k : k + 1] * _wide(rows[where[k :: s.top_k]])[0] for k in range(s.top_k)
        )
        return {"y": error_of(run(), exact)}

    return Work((rows, where, weights), run, check)


def chosen_experts(maker: Maker, loads: str) -> Array:
    """Each token's experts [T, K]. ``loads``: "balanced", the same for every expert; "Zipf", expert
    e in proportion to 1 / (e + 1); "one hot", one expert for all. A token may have an expert twice:
    the op allows it."""
    s, xp = maker.sizes, maker.xp
    slots = s.tokens * s.top_k
    if loads == "balanced":
        found = xp.arange(slots) % s.experts
    elif loads == "Zipf":
        share = xp.cumsum(1 / (xp.arange(s.experts) + 1.0))
        found = xp.searchsorted(share / share[-1], maker.rng.random(slots, dtype=np.float32))
    else:
        found = xp.zeros(slots)
    return found.astype(np.int64).reshape(s.tokens, s.top_k)


def experts_work(maker: Maker, *, loads: str) -> Work:
    """The mixture of experts without the gate: y and all gradients. A baseline gets the slots in
    the experts' order, as our time has no sort in it either. y and dx are compared row by row, dw
    expert by expert; dweights are dot products that may vanish, so by the largest of all."""
    s, pair = maker.sizes, moe(maker.launch)
    x, dy = (maker.normal(s.tokens, s.width) for _ in range(2))
    weights = abs(maker.normal(s.tokens, s.top_k, dtype=np.float32))
    shapes = 2 * [(s.experts, s.expert_hidden, s.width)] + [(s.experts, s.width, s.expert_hidden)]
    w = [maker.normal(*shape, scale=shape[-1] ** -0.5) for shape in shapes]
    indices = chosen_experts(maker, loads)
    start, where = sort_slots(indices.reshape(-1), s.experts)

    def run() -> tuple[Array, ...]:
        y, saved = pair.forward(x, weights, *w, None, None, None, indices=indices)
        return y, *pair.backward(dy, saved)[:5]

    def check() -> Errors:
        names = "y", "dx", "dweights", "dw_gate", "dw_up", "dw_down"
        found = dict(zip(names, run(), strict=True))
        slot_of, bounds = place(where), start.tolist()
        out, drows = (maker.xp.zeros((where.shape[0], s.width), np.float64) for _ in range(2))
        worst = dict.fromkeys(names[3:], 0.0)
        storage = str(maker.storage)
        for e in range(s.experts):
            slots = slot_of[bounds[e] : bounds[e + 1]]
            token = slots // s.top_k
            out[slots], kept = REFERENCE.ffn.forward(*_wide(x[token], *(m[e] for m in w)))
            dout = weights.reshape(-1, 1)[slots].astype(np.float64) * dy[token]
            drows[slots], *dw = REFERENCE.ffn.backward(dout, kept)
            for name, exact in zip(worst, dw, strict=True):
                got = found[name][e].reshape(1, -1)
                error = error_of(got, exact.reshape(1, -1), storage) / SEVERAL_UNITS
                worst[name] = float(np.maximum(worst[name], error))
        by_token = s.tokens, s.top_k, s.width
        out, wide = out.reshape(by_token), _wide(weights, dy)
        exact_y = (wide[0][..., None] * out).sum(axis=1)
        exact_dx = drows.reshape(by_token).sum(axis=1)
        exact_dweights = (wide[1][:, None, :] * out).sum(axis=-1).reshape(1, -1)
        found["dweights"] = found["dweights"].reshape(1, -1)
        exact = exact_y, exact_dx, exact_dweights
        return {
            name: error_of(found[name], wanted, storage) / SEVERAL_UNITS
            for name, wanted in zip(names, exact, strict=False)
        } | worst

    return Work((x, weights, *w, place(where), where, start, dy), run, check)


def cross_entropy_work(maker: Maker) -> Work:
    """In place. The gradient would be an odd input of the next call (almost uniform), so the logits
    are put back from a copy.

    The gradient at the targets is compared apart: beside it the other elements are small, and these
    are compared on their own scale.
    """
    s = maker.sizes
    in_place = cross_entropy_in_place(maker.launch)
    logits, targets = maker.normal(s.tokens, s.vocabulary), maker.integers(s.vocabulary, s.tokens)
    drawn = logits.copy()

    def reset() -> None:
        logits[...] = drawn

    def run() -> tuple[Array, ...]:
        return in_place(logits, targets=targets)

    def check() -> Errors:
        reset()
        exact, kept = REFERENCE["cross_entropy"].forward(*_wide(logits), targets=targets)
        wanted = REFERENCE["cross_entropy"].backward(1.0, kept)
        del kept  # as large as the logits in float64
        loss, gradient = run()
        storage, (gradient,) = str(gradient.dtype), _wide(gradient)
        target = maker.xp.arange(s.tokens), targets
        errors = {
            "loss": error_of(loss, exact),
            "dlogits at the targets": error_of(
                gradient[target][:, None], wanted[target][:, None], storage
            ),
        }
        gradient[target] = wanted[target] = 0
        return errors | {"other dlogits": error_of(gradient, wanted, storage)}

    return Work((logits, targets), run, check, reset)


def head_work(maker: Maker) -> Work:
    """The mean loss and both gradients, from hidden states: products included, in blocks."""
    s = maker.sizes
    pair = log_prob(maker.launch)
    xp = maker.xp
    h, targets = maker.normal(s.tokens, s.width), maker.integers(s.vocabulary, s.tokens)
    w = maker.normal(s.vocabulary, s.width, scale=SPREAD * s.width**-0.5)
    dy = xp.full((s.tokens,), -1 / s.tokens, dtype=np.float32)

    def run() -> tuple[Array, ...]:
        log_p, saved = pair.forward(h, w, targets=targets)
        return -log_p.mean(), *pair.backward(dy, saved)

    def check() -> Errors:
        exact, kept = REFERENCE["log_prob"].forward(*_wide(h, w), targets=targets)
        exact_dh, exact_dw = REFERENCE["log_prob"].backward(*_wide(dy), kept)
        del kept  # the head in float64
        loss, dh, dw = run()
        storage = str(maker.storage)  # tensor cores truncate sums: their float32 is no float32
        return {
            "loss": error_of(loss, -exact.mean(), storage),
            "dh": error_of(dh, exact_dh, storage),
            "dw": error_of(dw, exact_dw, storage),
        }

    return Work((h, w, targets), run, check)


def grpo_work(maker: Maker) -> Work:
    """GRPO's loss, forward and backward in one."""
    s, pair = maker.sizes, grpo(maker.launch)
    log_prob = -abs(maker.normal(s.outputs, s.length))
    old, reference = (log_prob + maker.normal(s.outputs, s.length, scale=0.3) for _ in range(2))
    advantages = (
        maker.normal(s.outputs) + 0.5
    )  # around 0 the loss would be what is left of rounding
    mask = maker.xp.ones((s.outputs, s.length), dtype=bool)
    given = {
        "advantages": advantages,
        "mask": mask,
        "old_log_prob": old,
        "reference_log_prob": reference,
    }

    def check() -> Errors:
        output, saved = pair.forward(log_prob, **given)
        wide = {name: x if x.dtype == bool else x.astype(np.float64) for name, x in given.items()}
        free = REFERENCE["grpo"].forward(*_wide(log_prob), **wide)[0].unclipped
        ratio = maker.xp.exp(_wide(log_prob)[0] - wide["old_log_prob"])
        # a ratio on the very bound may round to a side, which the reference then takes too
        on_a_bound = (abs(ratio / CLIP[0] - 1) < 1e-5) | (abs(ratio / CLIP[1] - 1) < 1e-5)
        same = bool(((output.unclipped == free) | on_a_bound).all())
        replayed = {"unclipped": output.unclipped, "kept": output.kept}
        exact, kept = REFERENCE["grpo"].forward(*_wide(log_prob), **wide, **replayed)
        gradient = REFERENCE["grpo"].backward((1.0,), kept)
        return {
            "clips": 0.0 if same else float("inf"),
            "loss": error_of(output.loss, exact.loss),
            "dlog_prob": error_of(saved.dlog_prob, gradient),
        }

    return Work(
        (log_prob, old, reference, advantages), lambda: pair.forward(log_prob, **given), check
    )


def adamw_work(maker: Maker) -> Work:
    """Parameters of V3's initial size; gradients so small that epsilon is seen."""
    p = maker.normal(maker.sizes.parameters, scale=0.006)
    g = maker.normal(maker.sizes.parameters, scale=1e-6)
    optimizer = adamw(maker.launch)()

    def check() -> Errors:
        """Two steps with different gradients: after the first from zero no decay rate shows."""
        wide = p.astype(np.float64)
        ours = exact = Moments()
        for gradient in (g, -g / 2):
            given = {"p": gradient.astype(np.float64)}
            exact = AdamW().update({"p": wide}, given, exact, LEARNING_RATE)
            ours = optimizer.update({"p": p}, {"p": gradient}, ours, LEARNING_RATE)
        return {
            "p": error_of(p, wide),
            "m": error_of(ours.first["p"], exact.first["p"]),
            "v": error_of(ours.second["p"], exact.second["p"]),
        }

    moments = Moments()

    def call() -> None:
        nonlocal moments
        moments = optimizer.update({"p": p}, {"p": g}, moments, LEARNING_RATE)

    return Work((p, g), call, check)
