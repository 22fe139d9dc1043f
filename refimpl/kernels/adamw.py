"""AdamW on kernels/adamw.cu: `refimpl.optimizer.AdamW`, one launch per tensor, that of a bfloat16
parameter too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..array import Array
from ..optimizer import AdamW, Moments, check_contiguous, check_step
from .host import Kernels, cover, numbers
from .launch import Launch

__all__ = ["adamw"]

THREADS = 256  # of a block; each takes 16 bytes of every array


def adamw(launch: Launch) -> Callable[..., AdamW]:
    """The optimizer's class on ``launch``. Parameters and moments, which it changes in place, must
    be contiguous."""
    kernels = Kernels(launch, "adamw")

    class FusedAdamW(AdamW):
        def update(
            self,
            params: Mapping[str, Array],
            grads: Mapping[str, Array],
            moments: Moments,
            learning_rate: float,
        ) -> Moments:
            """One step on every tensor of ``grads``; a bfloat16 parameter's gradient, moments and
            master are float32."""
            check_step(
                params, grads, moments, learning_rate, lambda name, p: numbers(**{name: p}).real
            )
            check_contiguous(params, grads, moments)
            moments = moments.next(params, grads)
            correct = [1 - beta**moments.step for beta in (self.beta1, self.beta2)]
            for name, g in grads.items():
                p = params[name]
                n: Any = numbers(**{name: p})
                decay = self.weight_decay if self.decays(name) else 0.0
                settings = (
                    1 - self.beta1,
                    1 - self.beta2,
                    *correct,
                    self.epsilon,
                    decay,
                    learning_rate,
                )
                kernels(
                    "adamw_update",
                    n.storage,
                    cover(p.size, THREADS * 16 // n.real.itemsize),
                    THREADS,
                    p,
                    moments.first[name],
                    moments.second[name],
                    g,
                    np.int64(p.size),
                    *map(n.scalar, settings),
                    moments.master.get(name, p),
                )
            return moments

    return FusedAdamW
