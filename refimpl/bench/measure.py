"""How a row is measured, on whatever `Device` answers: many calls in one graph, inputs that no
cache holds, warm clocks, a median.

The kernels of a call are recorded once and then repeated as they were launched, so that Python's
own time is not in the numbers. A baseline is captured into a graph in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Protocol

import numpy as np

from ..kernels.launch import ForwardedLaunch
from . import RUNS

__all__ = ["Device", "Recorder", "Times", "copies", "measure", "repeats", "summary", "warm_up"]

# seconds that one sample lasts at least: an event's resolution and the launch of a graph are lost
# in it
SAMPLE = 1e-3
# seconds of work before the first sample: a device that had nothing to do, as while torch compiles,
# has slowed its clocks
WARM = 0.2
MOST_CALLS = 2000  # in one graph
CACHES = 3  # times the cache that pass between two uses of the same input

Call = Callable[[], object]


class Device(Protocol):
    """What captures calls and times them; CuPy's streams (`refimpl.bench.device`), or torch's."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """One call that repeats all of them on the device."""

    def seconds(self, call: Call) -> float:
        """Between an event before the call and one after it."""

    def peak(self, call: Call) -> int:
        """The most bytes that were taken at a time for the call, beyond what there was before."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    low: float  # a tenth of the samples is faster
    high: float  # a tenth is slower


def summary(samples: Sequence[float], least: int = 20) -> Times:
    """Median and spread; ValueError for fewer than ``least`` samples, or one that is not a positive
    number."""
    if len(samples) < least:
        raise ValueError(f"samples must be at least {least}, got {len(samples)}")
    if not all(np.isfinite(x) and x > 0 for x in samples):
        raise ValueError(f"samples must be positive numbers, got {min(samples)} … {max(samples)}")
    low, median, high = (float(np.quantile(samples, q)) for q in (0.1, 0.5, 0.9))
    return Times(median, low, high)


def copies(bytes_of_a_call: int, cache: int) -> int:
    """How many sets of inputs to go round, so that `CACHES` times the cache's bytes pass before a
    set comes back."""
    return max(1, ceil(CACHES * cache / bytes_of_a_call))


def repeats(seconds: float, calls: int) -> int:
    """How often ``calls``, which take so long together, go into a sample for it to last
    `SAMPLE`."""
    return max(1, min(ceil(SAMPLE / seconds), MOST_CALLS // calls))


def measure(
    device: Device,
    calls: Sequence[Call],
    runs: int = RUNS,
    reset: Call | None = None,
    *,
    graph: bool = True,
) -> Times:
    """The time of one of ``calls``, which do the same on sets of inputs of their own, one after the
    other.

    ``reset`` is called before each sample, outside its events, and then a sample makes each call
    once: for work that overwrites its inputs with what would be no fair input of the next call.
    Without ``graph`` they are made as they are: for work of many milliseconds that can't be
    captured, as CuPy's products can't.
    """
    together = device.capture if graph else _in_turn
    once = together(calls)
    device.seconds(once)  # the first time is a warm-up
    number = 1 if reset else repeats(device.seconds(once), len(calls))
    all_of_them = once if number == 1 else together([*calls] * number)
    warm_up(device, all_of_them)
    samples = []
    for _ in range(runs):
        if reset:
            reset()
        samples.append(device.seconds(all_of_them) / (number * len(calls)))
    return summary(samples)


def warm_up(device: Device, call: Call) -> None:
    """Repeat the call until the device has worked for `WARM` seconds."""
    worked = 0.0
    while worked < WARM:
        worked += device.seconds(call)


def _in_turn(calls: Sequence[Call]) -> Call:
    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


class Recorder(ForwardedLaunch):
    """A launch that keeps what it launched, to be launched again without the host code around
    it."""

    # what is kept stays in memory, so only `record` keeps anything
    launched: list[Call] | None = None

    def __call__(self, *work: Any, **settings: Any) -> None:
        if self.launched is not None:
            self.launched.append(partial(self.launch, *work, **settings))
        super().__call__(*work, **settings)

    def record(self, call: Call) -> Call:
        """Make the call; a function that launches the kernels which that launched, on the same
        arrays."""
        launched: list[Call] = []
        self.launched = launched
        try:
            call()
        finally:
            self.launched = None
        if not launched:
            raise ValueError("call must launch at least one kernel, got none")
        return _in_turn(launched)
