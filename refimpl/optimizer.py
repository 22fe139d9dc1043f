"""What follows a backward pass, in place: clipping by the global norm, AdamW, the gates' biases;
and DeepSeek-V3's schedules.

Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization (1711.05101) algorithm 2;
DeepSeek-V3 (2412.19437) section 4.2. V3 does not publish AdamW's eps, which tensors decay, or the
shape of its batch ramp: those are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, isfinite, pi, sqrt
from typing import Any, NamedTuple

import numpy as np

from .array import Array, blocks, library
from .config import ModelConfig
from .ops import bias_update
from .parameters import GATE_BIAS, layer_name

__all__ = [
    "V3_SCHEDULE",
    "AdamW",
    "Moments",
    "NarrowAdamW",
    "Schedule",
    "clip_global_norm",
    "update_gate_biases",
]

Tensors = Mapping[str, Array]
BLOCK = 32_768  # numbers of a tensor that a step updates at a time: what it touches stays in cache


class Moments(NamedTuple):
    """What AdamW remembers, by the names of the parameters; ``Moments()`` is the start.

    A bfloat16 parameter is the rounding of its ``master``, which the steps move: most are smaller
    than a unit of the parameter, and would be lost in it.
    """

    step: int = 0  # how many steps were taken
    first: Mapping[str, Array] = {}  # m, mean of the gradient
    second: Mapping[str, Array] = {}  # v, mean of its square
    master: Mapping[str, Array] = {}  # float32, of bfloat16 parameters alone

    def next(self, params: Tensors, grads: Tensors) -> Moments:
        """Those of the step to be taken: a tensor that is seen for the first time has zeros, and if
        it is bfloat16 itself as its master."""
        first, second, master = map(dict, self[1:])
        for name, g in grads.items():
            if name not in first:
                xp = library(g)
                first[name], second[name] = xp.zeros_like(g), xp.zeros_like(g)
            if name not in master and params[name].dtype != g.dtype:
                master[name] = params[name].astype(g.dtype)
        return Moments(self.step + 1, first, second, master)


def gradient_type(name: str, p: Array) -> Any:
    """The type of a parameter's gradient and moments: its own, but float32 for bfloat16."""
    return np.dtype("float32") if str(p.dtype) == "bfloat16" else p.dtype


def check_step(
    params: Tensors,
    grads: Tensors,
    moments: Moments,
    learning_rate: float,
    type_of: Callable[[str, Array], Any] = gradient_type,
) -> None:
    """ValueError unless a step can be taken: each gradient of the shape of its parameter and of
    the type that ``type_of`` (name, parameter) says, its moments of the gradient's shape and
    type, the learning rate a finite number of at least 0."""
    if not (isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(
            f"learning_rate must be a finite number of at least 0, got {learning_rate}"
        )
    if moments.first.keys() != moments.second.keys():
        odd = sorted(moments.first.keys() ^ moments.second.keys())
        raise ValueError(
            f"moments must have first and second, got only one of them for {', '.join(odd)}"
        )
    for name, g in grads.items():
        p = params.get(name)
        if p is None:
            raise ValueError(f"grads must name parameters, got {name}")
        wanted = type_of(name, p)
        if p.shape != g.shape or wanted != g.dtype:
            raise ValueError(
                f"the gradient of {name} must be {wanted} {tuple(p.shape)} for a parameter of "
                f"{p.dtype}, got {g.dtype} {tuple(g.shape)}"
            )
        for held in moments[1:]:
            m = held.get(name, g)
            if m.shape != g.shape or m.dtype != g.dtype:
                raise ValueError(
                    f"the moments of {name} must be {g.dtype} {tuple(g.shape)} like its gradient, "
                    f"got {m.dtype} {tuple(m.shape)}"
                )


def check_contiguous(params: Tensors, grads: Tensors, moments: Moments) -> None:
    """ValueError if a tensor that a kernel is to read is strided."""
    for name, g in grads.items():
        held = (params[name], g, *(each.get(name, g) for each in moments[1:]))
        if not all(x.flags.c_contiguous for x in held):
            raise ValueError(
                f"{name}, its gradient and its moments must be contiguous, got strided arrays"
            )


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay and bias correction: the settings. What it remembers is
    given to `update` and returned.

    beta1, beta2, epsilon and weight_decay are V3's, but for its unpublished epsilon. decays: by a
    tensor's name, whether it decays; by default all do.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decays: Callable[[str], bool] = field(default=lambda name: True)

    def __post_init__(self) -> None:
        in_range = 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1
        if not (in_range and self.epsilon > 0 and self.weight_decay >= 0):
            raise ValueError(
                "beta1 and beta2 must lie in [0, 1), epsilon be positive and weight_decay at "
                f"least 0, got {self.beta1}, {self.beta2}, {self.epsilon} and {self.weight_decay}"
            )

    def update(
        self, params: Tensors, grads: Tensors, moments: Moments, learning_rate: float
    ) -> Moments:
        """One step on every tensor of ``grads``: the moments after it.

        The arrays of ``params`` and of ``moments`` are donated: they are updated in place, and the
        moments returned hold the same ones. So go on from these; a copy is yours to make. A block
        is updated after the other (on a device a whole tensor), and besides the moments of a tensor
        that is seen for the first time, two arrays of a block are allocated. (A parameter that is
        not contiguous is copied.)

        A bfloat16 parameter has a float32 gradient, and becomes the rounding of its master.

        ValueError if a gradient has no parameter, another shape or dtype than it or its moments, or
        the learning rate is no number ≥ 0; then nothing was changed.
        """
        check_step(params, grads, moments, learning_rate)
        moments = moments.next(params, grads)
        scratch: dict[Any, tuple[Array, Array]] = {}
        for name, g in grads.items():
            p, xp = moments.master.get(name, params[name]), library(g)
            block = min(p.size, BLOCK) if xp.__name__ == "numpy" else p.size
            if g.dtype not in scratch or scratch[g.dtype][0].size < block:
                scratch[g.dtype] = xp.empty(block, dtype=g.dtype), xp.empty(block, dtype=g.dtype)
            weight_decay = self.weight_decay if self.decays(name) else 0.0
            changed = (p, moments.first[name], moments.second[name])
            rows = [x.reshape(-1) for x in (*changed, g)]
            for start, stop in blocks(p.size, block or 1):
                parts = [row[start:stop] for row in rows]
                parts += [x[: stop - start] for x in scratch[g.dtype]]
                self._step(
                    *parts,
                    step=moments.step,
                    weight_decay=weight_decay,
                    learning_rate=learning_rate,
                )
            for x, row in zip(changed, rows, strict=False):
                if not x.flags.c_contiguous:  # then the row may be a copy
                    x[...] = row.reshape(x.shape)
            if p is not params[name]:
                params[name][...] = p.astype(params[name].dtype)
        return moments

    def _step(
        self,
        p: Array,
        m: Array,
        v: Array,
        g: Array,
        a: Array,
        b: Array,
        *,
        step: int,
        weight_decay: float,
        learning_rate: float,
    ) -> None:
        """The step of a block of one tensor, each array [block]; ``a`` and ``b`` are scratch."""
        xp = library(g)
        xp.subtract(g, m, out=a)  # m ← m + (1 − β1)(g − m)
        xp.multiply(a, 1 - self.beta1, out=a)
        xp.add(m, a, out=m)
        xp.multiply(g, g, out=a)  # v ← v + (1 − β2)(g² − v)
        xp.subtract(a, v, out=a)
        xp.multiply(a, 1 - self.beta2, out=a)
        xp.add(v, a, out=v)
        xp.subtract(v, v, out=b)  # 0, or NaN where g² overflows: m̂ / ∞ would be no step, unseen
        xp.add(v, b, out=v)
        root = sqrt(1 - self.beta2**step)  # m̂ / (√v̂ + ε) = m root / (1 − β1ᵗ) / (√v + ε root)
        xp.sqrt(v, out=a)
        xp.add(a, self.epsilon * root, out=a)
        xp.divide(m, a, out=b)
        xp.multiply(b, learning_rate * root / (1 - self.beta1**step), out=b)
        if weight_decay:  # p ← p − lr (m̂ / (√v̂ + ε) + λ p)
            xp.multiply(p, learning_rate * weight_decay, out=a)
            xp.add(b, a, out=b)
        xp.subtract(p, b, out=p)


class NarrowAdamW(AdamW):
    """AdamW whose moments are bfloat16 numbers between steps, as DeepSeek-V3 (section 3.3.2) keeps
    them; in the gradients' type, for NumPy's arrays."""

    def update(
        self, params: Tensors, grads: Tensors, moments: Moments, learning_rate: float
    ) -> Moments:
        import ml_dtypes

        moments = super().update(params, grads, moments, learning_rate)
        for held in (moments.first, moments.second):
            for name in grads:
                held[name][...] = held[name].astype(ml_dtypes.bfloat16)
        return moments


def clip_global_norm(
    grads: Tensors,
    max_norm: float,
    *,
    epsilon: float = 0.0,
    together: Callable[[float], float] = float,
) -> float:
    """Scale all gradients in place so that their common norm is at most ``max_norm``; returns the
    norm before.

    The factor is min(1, max_norm / (norm + epsilon)); torch takes epsilon = 1e-6. Where ``grads``
    are a part of all, ``together`` gives the sum of squares of all from that of these.
    Squares are summed in float64 where the gradients are; one number is copied from a device. A
    norm that is not finite changes nothing: the caller sees it in the result and skips the step.

    >>> import numpy as np
    >>> grads = {"a": np.array([3.0]), "b": np.array([4.0])}
    >>> clip_global_norm(grads, 1.0)
    5.0
    >>> grads["a"].round(6).tolist()
    [0.6]
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    total: Any = 0.0
    for g in grads.values():
        xp = library(g)
        total = total + xp.sum(xp.square(g, dtype=xp.float64))
    norm = sqrt(together(float(total)))
    if isfinite(norm) and norm + epsilon > max_norm:
        for g in grads.values():
            library(g).multiply(g, max_norm / (norm + epsilon), out=g)
    return norm


def update_gate_biases(
    params: Tensors, loads: Mapping[int, Array], gamma: float, config: ModelConfig
) -> None:
    """`bias_update` by ``gamma``, in place, on the gates whose ``loads`` [E] of the whole batch are
    given by layer, as `forward` tells them, MTP modules' too; nothing in a model without gate
    biases."""
    for layer, load in loads.items() if config.gate_bias else ():
        bias = params[layer_name(layer, GATE_BIAS)]
        bias[...] = bias_update(bias, load, gamma, centre=config.conventions.bias_centre)


@dataclass(frozen=True)
class Schedule:
    """How learning rate, batch size and two weights move with the tokens seen; the defaults are
    V3's (section 4.2)."""

    peak: float = 2.2e-4
    warmup_steps: int = 2000  # linear from 0
    constant_until: float = 10e12  # tokens
    decay_tokens: float = 4.3e12  # cosine from peak to low
    low: float = 2.2e-5
    low_tokens: float = 333e9  # then
    last: float = 7.3e-6  # for the remaining 167B
    first_batch: int = 3072  # sequences
    full_batch: int = 15360
    ramp_tokens: float = (
        469e9  # from the first to the full batch; linear in tokens is our reading of "gradually"
    )
    bias_until: float = 14.3e12  # tokens until which the gate's bias moves by bias_speed
    bias_speed: float = 1e-3
    mtp_until: float = 10e12
    mtp_weights: tuple[float, float] = (0.3, 0.1)  # λ before and after

    def learning_rate(self, step: int, tokens: float) -> float:
        """At the step (counted from 0: the first has lr peak / warmup_steps) with so many tokens
        seen before it."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if tokens < self.constant_until:
            return self.peak
        done = (tokens - self.constant_until) / self.decay_tokens
        if done < 1:
            return self.low + (self.peak - self.low) * (1 + cos(pi * done)) / 2
        return (
            self.low
            if tokens < self.constant_until + self.decay_tokens + self.low_tokens
            else self.last
        )

    def batch(self, tokens: float) -> int:
        """Sequences of the batch that starts after so many tokens."""
        share = min(tokens / self.ramp_tokens, 1.0)
        return round(self.first_batch + share * (self.full_batch - self.first_batch))

    def bias_update_speed(self, tokens: float) -> float:
        """γ of `bias_update`."""
        return self.bias_speed if tokens < self.bias_until else 0.0

    def mtp_weight(self, tokens: float) -> float:
        """λ of the MTP loss."""
        return self.mtp_weights[0] if tokens < self.mtp_until else self.mtp_weights[1]


V3_SCHEDULE = Schedule()  # of the report's section 4.2
