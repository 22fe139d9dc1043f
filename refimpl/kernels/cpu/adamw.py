"""AdamW on kernels/adamw_numba_cpu.py: `refimpl.optimizer.AdamW`, all tensors in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ...array import Array
from ...optimizer import AdamW, Moments, check_contiguous, check_step
from .compile import kernel
from .host import expect_real, some_rows
from .pool import run_kernels

__all__ = ["FusedAdamW"]


class FusedAdamW(AdamW):
    """Parameters and moments, which it changes in place, and gradients must be contiguous NumPy
    arrays of float32 or float64."""

    def update(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        moments: Moments,
        learning_rate: float,
    ) -> Moments:
        check_step(params, grads, moments, learning_rate, lambda name, p: p.dtype)
        for name, g in grads.items():
            expect_real(**{name: g})
        check_contiguous(params, grads, moments)
        moments = moments.next(params, grads)
        correct = [1 - beta**moments.step for beta in (self.beta1, self.beta2)]
        less = 1 - self.beta1, 1 - self.beta2
        tasks = []
        for name, g in grads.items():
            decay = self.weight_decay if self.decays(name) else 0.0
            settings = *less, *correct, self.epsilon, decay, learning_rate
            update = kernel("adamw", "adamw_update", g.dtype)
            arrays = params[name], moments.first[name], moments.second[name], g
            flat = [x.reshape(-1) for x in arrays]
            parts = some_rows(g.size)
            tasks += [partial(update, *(x[i] for x in flat), *settings) for i in parts]
        run_kernels(tasks)
        return moments
