"""AdamW on kernels/adamw.cu: `refimpl.optimizer.AdamW`, one launch per tensor; parameters may be
bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from math import isfinite
from typing import Any

import numpy as np

from ..array import Array
from ..optimizer import AdamW
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
            if not (isfinite(learning_rate) and learning_rate >= 0):
                raise ValueError(
                    f"learning_rate must be a finite number of at least 0, got {learning_rate}"
                )
            for name, g in grads.items():
                p = params.get(name)
                if p is None or p.shape != g.shape or numbers(**{name: p}).real != g.dtype:
                    got = "no such parameter" if p is None else f"{p.dtype} {p.shape}"
                    raise ValueError(
                        f"{name} must be a parameter for a gradient of {g.dtype} {g.shape}, "
                        f"got {got}"
                    )
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
