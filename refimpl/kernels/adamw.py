"""AdamW on kernels/adamw.cu: `refimpl.optimizer.AdamW`, one launch per tensor; parameters may be
bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np

from ..array import Array
from ..optimizer import AdamW, check_step
from .host import Kernels, cover, numbers
from .launch import Launch

__all__ = ["adamw"]

THREADS = 256


def adamw(launch: Launch) -> Callable[..., AdamW]:
    """The optimizer's class on ``launch``. Parameters, which it changes in place, must be
    contiguous."""
    kernels = Kernels(launch, "adamw")

    class FusedAdamW(AdamW):
        def update(
            self,
            params: MutableMapping[str, Array],
            grads: Mapping[str, Array],
            learning_rate: float,
        ) -> None:
            """One step on every tensor of ``grads``, in place; a bfloat16 parameter's gradient is
            float32."""
            check_step(params, grads, learning_rate, lambda name, p: numbers(**{name: p}).real)
            for name, g in grads.items():
                p = params[name]
                if not (p.flags.c_contiguous and g.flags.c_contiguous):
                    raise ValueError(
                        f"{name} and its gradient must be contiguous, got strided arrays"
                    )
            self.step += 1
            correct = [1 - beta**self.step for beta in (self.beta1, self.beta2)]
            for name, g in grads.items():
                p = params[name]
                n: Any = numbers(**{name: p})
                if name not in self.first:
                    self.first[name], self.second[name] = n.xp.zeros_like(g), n.xp.zeros_like(g)
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
                    cover(p.size, THREADS),
                    THREADS,
                    p,
                    self.first[name],
                    self.second[name],
                    g,
                    np.int64(p.size),
                    *map(n.scalar, settings),
                )

    return FusedAdamW
