"""AdamW, clipping by the global norm, and DeepSeek-V3's schedules; everything in place.

Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization (1711.05101) algorithm 2;
DeepSeek-V3 (2412.19437) section 4.2. V3 does not publish AdamW's eps, which tensors decay, or the
shape of its batch ramp: those are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from math import cos, isfinite, pi, sqrt
from typing import Any

from .array import Array, blocks, library

__all__ = ["V3_SCHEDULE", "AdamW", "Schedule", "clip_global_norm"]

Tensors = Mapping[str, Array]
BLOCK = 32_768  # numbers of a tensor that a step updates at a time: what it touches stays in cache


def check_step(
    params: Tensors,
    grads: Tensors,
    learning_rate: float,
    gradient_type: Callable[[str, Array], Any],
) -> None:
    """ValueError unless a step can be taken: each gradient of the shape of its parameter and of
    the type that ``gradient_type`` (name, parameter) says, the learning rate a finite number of at
    least 0."""
    if not (isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(
            f"learning_rate must be a finite number of at least 0, got {learning_rate}"
        )
    for name, g in grads.items():
        p = params.get(name)
        if p is None:
            raise ValueError(f"{name} must be a parameter for its gradient, got no such parameter")
        wanted = gradient_type(name, p)
        if p.shape != g.shape or wanted != g.dtype:
            raise ValueError(
                f"the gradient of {name} must be {wanted} {tuple(p.shape)} for a parameter of "
                f"{p.dtype}, got {g.dtype} {tuple(g.shape)}"
            )


class AdamW:
    """Adam with decoupled weight decay and bias correction.

    ``update`` changes parameters in place, a block after the other (on a device a whole tensor),
    and allocates nothing after the first step: the moments and two scratch arrays of a block are
    kept. (A parameter that is not contiguous is copied.)

    Args:
        beta1, beta2, epsilon, weight_decay: 0.9, 0.95, 1e-8 and 0.1 (V3's, but for its unpublished
        epsilon). decays: by a tensor's name, whether it decays; by default all do.
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        decays: Callable[[str], bool] = lambda name: True,
    ) -> None:
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon > 0 and weight_decay >= 0):
            raise ValueError(
                "beta1 and beta2 must lie in [0, 1), epsilon be positive and weight_decay at "
                f"least 0, got {beta1}, {beta2}, {epsilon} and {weight_decay}"
            )
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon
        self.weight_decay = weight_decay
        self.decays = decays
        self.step = 0
        self.first: dict[str, Array] = {}  # m, mean of the gradient
        self.second: dict[str, Array] = {}  # v, mean of its square
        self._scratch: dict[Any, tuple[Array, Array]] = {}

    def update(
        self, params: MutableMapping[str, Array], grads: Tensors, learning_rate: float
    ) -> None:
        """One step on every tensor of ``grads``, in place.

        ValueError if a gradient has no parameter, another shape or dtype, or the learning rate is
        no number ≥ 0; then nothing was changed.
        """
        check_step(params, grads, learning_rate, lambda name, p: p.dtype)
        self.step += 1
        for name, g in grads.items():
            p, xp = params[name], library(g)
            if name not in self.first:
                self.first[name], self.second[name] = xp.zeros_like(g), xp.zeros_like(g)
            weight_decay = self.weight_decay if self.decays(name) else 0.0
            changed = (p, self.first[name], self.second[name])
            rows = [x.reshape(-1) for x in (*changed, g)]
            for start, stop in blocks(p.size, BLOCK if xp.__name__ == "numpy" else p.size or 1):
                parts = [row[start:stop] for row in rows]
                self._step(*parts, weight_decay=weight_decay, learning_rate=learning_rate)
            for x, row in zip(changed, rows, strict=False):
                if not x.flags.c_contiguous:  # then the row may be a copy
                    x[...] = row.reshape(x.shape)

    def _step(
        self, p: Array, m: Array, v: Array, g: Array, *, weight_decay: float, learning_rate: float
    ) -> None:
        """The step of a block of one tensor, each array [block]."""
        xp, (a, b) = library(g), self._buffers(g)
        xp.subtract(g, m, out=a)  # m ← m + (1 − β1)(g − m)
        xp.multiply(a, 1 - self.beta1, out=a)
        xp.add(m, a, out=m)
        xp.multiply(g, g, out=a)  # v ← v + (1 − β2)(g² − v)
        xp.subtract(a, v, out=a)
        xp.multiply(a, 1 - self.beta2, out=a)
        xp.add(v, a, out=v)
        xp.subtract(v, v, out=b)  # 0, or NaN where g² overflows: m̂ / ∞ would be no step, unseen
        xp.add(v, b, out=v)
        xp.divide(v, 1 - self.beta2**self.step, out=a)  # step = m̂ / (√v̂ + ε)
        xp.sqrt(a, out=a)
        xp.add(a, self.epsilon, out=a)
        xp.divide(m, 1 - self.beta1**self.step, out=b)
        xp.divide(b, a, out=b)
        if weight_decay:  # p ← p − lr (step + λ p)
            xp.multiply(p, weight_decay, out=a)
            xp.add(b, a, out=b)
        xp.multiply(b, learning_rate, out=b)
        xp.subtract(p, b, out=p)

    def _buffers(self, like: Array) -> tuple[Array, Array]:
        """Two scratch arrays shaped like ``like`` [block]."""
        xp, key = library(like), like.dtype
        if key not in self._scratch or self._scratch[key][0].size < like.size:
            self._scratch[key] = (xp.empty(like.size, dtype=key), xp.empty(like.size, dtype=key))
        a, b = self._scratch[key]
        return a[: like.size], b[: like.size]


def clip_global_norm(grads: Tensors, max_norm: float, *, epsilon: float = 0.0) -> float:
    """Scale all gradients in place so that their common norm is at most ``max_norm``; returns the
    norm before.

    The factor is min(1, max_norm / (norm + epsilon)); torch takes epsilon = 1e-6.
    Squares are summed in float64 where the gradients are; one number is copied from a device. A
    norm that is not finite changes nothing: the caller sees it in the result and skips the step.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    total: Any = 0.0
    for g in grads.values():
        xp = library(g)
        total = total + xp.sum(xp.square(g, dtype=xp.float64))
    norm = sqrt(float(total))
    if isfinite(norm) and norm + epsilon > max_norm:
        for g in grads.values():
            library(g).multiply(g, max_norm / (norm + epsilon), out=g)
    return norm


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


V3_SCHEDULE = Schedule()
