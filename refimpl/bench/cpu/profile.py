"""Where the time of a training step goes: each op's own time, beside that of its bare products."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from ...kernels.columns import on_cpu
from ...model import backward, forward
from ...ops import Op, Ops
from ...optimizer import Moments
from .ours import optimizer_of
from .problems import PROBLEMS, Sizes, attention_flops, inputs_of
from .worker import product_rate

__all__ = ["Line", "profile"]

WARM = 3  # steps before those that count


class Line(NamedTuple):
    """One op, or what is none, per step."""

    what: str
    calls: int
    seconds: float  # its own: what it calls of the table is left out
    floor: float  # seconds of its products at the rate of NumPy's own


def profile(column: str, sizes: Sizes, steps: int) -> list[Line]:
    """Forward, backward and AdamW, the medians of so many steps, the longest first."""
    inputs, table = inputs_of("step", sizes), on_cpu(column)
    config, tokens, learning_rate = inputs.fixed.values()
    params: Any = inputs.arrays
    optimizer, moments = optimizer_of(column), Moments()
    clock = Clock()
    ops = clock.watch(table)
    found: list[dict[str, float]] = []
    calls: dict[str, int] = {}
    for step in range(WARM + steps):
        clock.own.clear()
        clock.calls.clear()
        start = time.perf_counter()
        _, saved = forward(params, tokens, config, ops=ops)
        grads = backward(saved)
        clock.own["rest of the model"] = time.perf_counter() - start - sum(clock.own.values())
        start = time.perf_counter()
        moments = optimizer.update(params, grads, moments, learning_rate)
        clock.own["AdamW"] = time.perf_counter() - start
        del saved, grads
        if step >= WARM:
            found.append(dict(clock.own))
            calls = dict(clock.calls)
    floors = floors_of(sizes, product_rate(), fused=column == "numba_cpu")
    lines = [
        Line(what, calls.get(what, 1), median(x[what] for x in found), floors.get(what, 0.0))
        for what in found[0]
    ]
    return sorted(lines, key=lambda line: -line.seconds)


class Clock:
    """Watches the ops of a table."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.inner = [0.0]  # of the calls that are open, seconds within other watched calls

    def watch(self, table: Ops) -> Ops:
        return table | {
            name: Op(self._watched(name, op.forward, 1), self._watched(name, op.backward, 0))
            for name, op in table.items()
        }

    def _watched(self, name: str, function: Callable[..., Any], counts: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = time.perf_counter()
            found = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            self.own[name] = self.own.get(name, 0.0) + seconds - self.inner.pop()
            self.calls[name] = self.calls.get(name, 0) + counts
            self.inner[-1] += seconds
            return found

        return call


def floors_of(sizes: Sizes, rate: float, *, fused: bool) -> dict[str, float]:
    """Seconds of the products in a step by op; a column that is not ``fused`` makes them in
    ``linear``, where they can't be told apart."""
    if not fused:
        return {}
    moe = sizes.layers - sizes.config().dense_layers
    attention = attention_flops(sizes)
    flops = {
        "mla": sizes.layers * (PROBLEMS["mla"].flops(sizes) - attention),
        "attention": sizes.layers * attention,
        "ffn": sizes.config().dense_layers * PROBLEMS["block"].flops(sizes),
        "moe": moe * PROBLEMS["moe"].flops(sizes),
        "router": moe * PROBLEMS["router"].flops(sizes),
        "head_cross_entropy": PROBLEMS["head_cross_entropy"].flops(sizes),
    }
    return {name: n / rate for name, n in flops.items()}
