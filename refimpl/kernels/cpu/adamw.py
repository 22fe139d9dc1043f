"""AdamW on kernels/adamw_numba_cpu.py: `refimpl.optimizer.AdamW`, all tensors in one pass."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial

import numpy as np

from ...array import Array
from ...optimizer import AdamW, check_step
from .compile import kernel
from .host import expect_real, some_rows
from .pool import run

__all__ = ["FusedAdamW"]


class FusedAdamW(AdamW):
    """Parameters, which it changes in place, and gradients must be contiguous NumPy arrays of
    float32 or float64."""

    def update(
        self, params: MutableMapping[str, Array], grads: Mapping[str, Array], learning_rate: float
    ) -> None:
        check_step(params, grads, learning_rate, lambda name, p: p.dtype)
        for name, g in grads.items():
            expect_real(**{name: g})
            if not (params[name].flags.c_contiguous and g.flags.c_contiguous):
                raise ValueError(f"{name} and its gradient must be contiguous, got strided arrays")
        self.step += 1
        correct = [1 - beta**self.step for beta in (self.beta1, self.beta2)]
        less = 1 - self.beta1, 1 - self.beta2
        tasks = []
        for name, g in grads.items():
            if name not in self.first:
                self.first[name], self.second[name] = np.zeros_like(g), np.zeros_like(g)
            decay = self.weight_decay if self.decays(name) else 0.0
            settings = *less, *correct, self.epsilon, decay, learning_rate
            update = kernel("adamw", "adamw_update", g.dtype)
            arrays = params[name], self.first[name], self.second[name], g
            flat = [x.reshape(-1) for x in arrays]
            parts = some_rows(g.size)
            tasks += [partial(update, *(x[i] for x in flat), *settings) for i in parts]
        run(tasks)
