"""GRPO and its family on kernels/grpo.cu; as `refimpl.ops.grpo` with every one of its settings, and
for bfloat16.

A bfloat16 ``log_prob`` has two digits, so ratios are coarse; the rest, old and reference
log-probabilities too, is float32 then, and the gradient is rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..array import Array, expect
from ..ops import AnyOp, Op
from ..ops.choices import Average, Empty, Estimator, Level, Ratio
from ..ops.grpo import GRPOOutput, check_settings, check_shapes, loss_cotangent, loss_divisor
from .host import Kernels, numbers, ready
from .launch import Launch

__all__ = ["GRPOSaved", "grpo"]

RATIO = {"token": 0, "sequence": 1, "sequence_mean": 2}
AVERAGE = {"sequence": 0, "token": 1, "constant": 2}
KL = {"k1": 0, "k2": 1, "k3": 2, "unbiased": 3}
THREADS = 256


class GRPOSaved(NamedTuple):
    """What the forward of `grpo` keeps for its backward."""

    dlog_prob: Array  # [N, T]: the loss's own gradient, in float32 for bfloat16
    dtype: Any  # of log_prob


def grpo(launch: Launch) -> AnyOp:
    """The op on ``launch``."""
    kernels = Kernels(launch, "grpo")

    def grpo_forward(
        log_prob: Array,
        *,
        advantages: Array,
        mask: Array,
        old_log_prob: Array | None = None,
        reference_log_prob: Array | None = None,
        clip: tuple[float, float] = (0.2, 0.2),
        dual_clip: float | None = None,
        ratio: Ratio = "token",
        average: Average = "sequence",
        length: int | None = None,
        empty: Empty = "counted",
        normaliser: float | None = None,
        kl_weight: float = 0.04,
        kl: Estimator = "k3",
        kl_level: Level = "token",
        kl_bounds: tuple[float, float] | None = None,
        off_policy: float | None = None,
        unclipped: Array | None = None,
        kept: Array | None = None,
    ) -> tuple[GRPOOutput, GRPOSaved]:
        n = numbers(log_prob=log_prob)
        check_shapes(log_prob, advantages, mask, unclipped, kept)
        check_settings(
            clip,
            dual_clip,
            ratio,
            average,
            length,
            empty,
            normaliser,
            kl_weight,
            kl,
            kl_level,
            kl_bounds,
            off_policy,
            reference_log_prob,
        )
        outputs, t = log_prob.shape
        log_prob = ready(log_prob)
        given = {
            "old_log_prob": old_log_prob,
            "reference_log_prob": reference_log_prob if kl_weight else None,
        }
        others = []
        for name, other in given.items():
            if other is not None:
                expect(name, other, "(N, T)", (outputs, t))
            others.append(ready(log_prob if other is None else other, n.real))
        # an output's length: in the kernel
        total = loss_divisor(mask, 1, average, length, empty, normaliser)
        replayed = unclipped is not None, kept is not None
        unclipped = _bytes(kernels, unclipped, (outputs, t), log_prob)
        kept = _bytes(kernels, kept, (outputs,), log_prob)
        part, loss = (
            kernels.empty((outputs,), n.real, log_prob),
            kernels.empty((1,), n.real, log_prob),
        )
        dlog_prob = kernels.empty((outputs, t), n.real, log_prob)
        infinite = float("inf")
        bounds = kl_bounds or (infinite, infinite)
        numbers_of_it = (
            total,
            1 - float(clip[0]),
            1 + float(clip[1]),
            infinite if dual_clip is None else dual_clip,
            kl_weight,
            *bounds,
            infinite if off_policy is None else off_policy,
        )
        kernels(
            "grpo_forward",
            n.storage,
            outputs,
            min(THREADS, 32 * -(-t // 32)) or 32,
            part,
            dlog_prob,
            unclipped,
            kept,
            log_prob,
            *others,
            ready(mask).view(np.uint8),
            ready(advantages, n.real),
            t,
            *map(int, replayed),
            RATIO[ratio],
            AVERAGE[average],
            KL[kl],
            RATIO[kl_level],
            *map(n.scalar, numbers_of_it),
        )
        kernels("grpo_loss", n.storage, 1, THREADS, loss, part, np.int64(outputs))
        output = GRPOOutput(loss.reshape(()), unclipped.view(bool), kept.view(bool))
        return output, GRPOSaved(dlog_prob, n.dtype)

    def grpo_backward(dy: Array | tuple[Array], saved: GRPOSaved) -> Array:
        dlog_prob, dtype = saved
        xp = numbers(log_prob=dlog_prob).xp
        dloss = xp.asarray(loss_cotangent(dy), dtype=dlog_prob.dtype)
        return (dloss * dlog_prob).astype(dtype, copy=False)

    return Op(grpo_forward, grpo_backward)


def _bytes(kernels: Kernels, choice: Array | None, shape: tuple[int, ...], like: Array) -> Array:
    """A choice to replay as bytes, or room for one."""
    return kernels.empty(shape, np.uint8, like) if choice is None else ready(choice).view(np.uint8)
