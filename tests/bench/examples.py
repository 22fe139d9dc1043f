"""Small sizes, launches that only note what they are told, pretended devices, made-up results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from refimpl.bench.measure import Recorder, Times
from refimpl.bench.results import Measured, Results
from refimpl.bench.rows import ROWS

from bench.sizes import V3
from kernel_support import ON_DEVICE, InterpreterLaunch
from support import FULL

DISTINCT = list({repr(row.make): name for name, row in reversed(ROWS.items())}.values())[::-1]
"""Rows, of those that differ by their sizes alone the first."""

TESTED = [x for x in DISTINCT if FULL or not x.endswith(("Zipf", "one hot"))]
"""In `make test` experts with one kind of loads."""

on_interpreter = pytest.mark.skipif(ON_DEVICE, reason="of the interpreter")


class DryLaunch:
    """Launches nothing, so that V3's shapes cost no time; it keeps what it was told."""

    target, most_shared = "sm_90", 227 << 10

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(
        self, module: Any, kernel: str, grid: Any, block: Any, arguments: Any, *, shared: int = 0
    ) -> None:
        assert 0 < grid[0] < 2**31
        assert 0 < np.prod(block) <= 1024
        assert shared <= 48 * 1024
        self.seen.append(arguments)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        return np.zeros(shape, dtype)


class FakeDevice:
    """A device on which a call takes 3 µs, and the very first graph twice that."""

    name = "Fake GPU (2)"
    cache = 1000
    xp = np

    def __init__(self) -> None:
        self.launch, self.stream = Recorder(InterpreterLaunch()), nullcontext()
        self.calls = 0
        self.captured = list[int]()
        self.timed = list[float]()  # seconds of each call
        self.freed = 0

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        self.captured.append(len(calls))
        return lambda: [call() for call in calls]

    def seconds(self, call: Callable[[], object]) -> float:
        before = self.calls
        call()
        self.timed.append(3e-6 * max(self.calls - before, 1))
        return self.timed[-1]

    def peak(self, call: Callable[[], object]) -> int:
        call()
        return 4096

    def free(self) -> None:
        self.freed += 1


class IdleDevice(FakeDevice):
    """Its graphs do nothing, in the time of as many calls as they have for one of the first: what
    they would do is tested in test_measure.py."""

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        super().capture(calls)

        def graph() -> None:
            self.calls += len(calls) // self.captured[0]

        return graph


def results(device: str = "Fake GPU (2)", date: str = "2026-11-30", **changed: Any) -> Results:
    given: dict[str, Any] = {
        "name": "RMSNorm forward",
        "shape": "4096 × 7168",
        "storage": "bfloat16",
        "bytes": 4 * V3.tokens * V3.width,
        "flops": 0,
        "asked": 0.87,
        "ours": Times(50e-6, 49e-6, 52e-6),
        "peak": 58_736_640,
        "errors": {"y": 0.32, "dx": 0.25},
        "eager": Times(2e-4, 1.9e-4, 2.1e-4),
        "eager_peak": 10**9,
        "compiled": Times(4e-5, 4e-5, 4.1e-5),
        "compiled_peak": None,
        "notes": ("a note",),
    }
    rows = [Measured(**given | changed)]
    return Results(
        device, "580.1", date, "0123abc", {"CuPy": "14.2"}, 50 * 2**20, 3.0e12, 8e14, rows
    )
