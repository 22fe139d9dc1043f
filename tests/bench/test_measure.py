"""Statistics, repetitions, graphs and records of launches, on a pretended device."""

from __future__ import annotations

from functools import partial

import pytest

from refimpl.bench import measure as measuring
from refimpl.bench.measure import Recorder, Times, copies, measure, repeats, summary
from refimpl.bench.rows import ROWS

from bench.examples import DryLaunch, FakeDevice
from bench.sizes import V3


def test_summary() -> None:
    samples = [float(x) for x in range(1, 22)]
    assert summary(samples) == Times(median=11, low=3, high=19)
    assert summary(samples[::-1]) == summary(samples)
    with pytest.raises(ValueError, match="samples must be at least 20, got 19"):
        summary(samples[:19])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="samples must be positive numbers"):
            summary([*samples, bad])


def test_copies_pass_the_cache() -> None:
    assert copies(10**9, 50 * 10**6) == 1
    assert copies(117_440_512, 50 * 2**20) == 2  # RMSNorm forward on 50 MiB
    assert copies(ROWS["gate top-k"].bytes(V3), 50 * 2**20) == 38
    for size in (1, 10, 49, 50, 51, 149, 150, 151):
        assert copies(size, 50) * size >= measuring.CACHES * 50


def test_repeats_fill_a_sample() -> None:
    assert repeats(2e-3, 1) == 1
    assert repeats(1e-4, 1) == 10
    assert repeats(3e-4, 2) == 4
    assert repeats(1e-9, 4) * 4 == measuring.MOST_CALLS


def test_measure_repeats_calls_in_one_graph() -> None:
    device = FakeDevice()

    def call() -> None:
        device.calls += 1

    times = measure(device, [call, call], runs=20)
    assert device.captured == [2, 2 * 167]  # 167 · 6 µs is the first above 1 ms
    assert times.median == pytest.approx(3e-6)
    warm = 200  # samples of 1.002 ms until 200 ms have passed
    assert device.calls == 2 + 2 + (warm + 20) * 334
    assert sum(device.timed[:-20]) >= measuring.WARM


def test_measure_without_a_graph() -> None:
    device, order = FakeDevice(), list[str]()

    def call(name: str) -> None:
        device.calls += 1
        order.append(name)

    measure(device, [partial(call, "one"), partial(call, "two")], runs=20, graph=False)
    assert device.captured == []
    assert order[:4] == ["one", "two"] * 2
    # a call that is as short as this is repeated
    assert len(order) == 2 * 2 + (200 + 20) * 2 * 167


def test_measure_resets_before_each_sample() -> None:
    device, order = FakeDevice(), list[str]()

    def call() -> None:
        device.calls += 334
        order.append("call")

    measure(device, [call], runs=20, reset=lambda: order.append("reset"))
    assert device.captured == [1]
    assert sum(device.timed[:-20]) >= measuring.WARM
    assert order == ["call"] * (len(order) - 40) + ["reset", "call"] * 20


def test_recorder_keeps_nothing_outside_record() -> None:
    recorder = Recorder(DryLaunch())
    recorder(None, "kernel", (1,), (32,), [])  # type: ignore[arg-type]
    assert recorder.launched is None
    with pytest.raises(ValueError, match="call must launch at least one kernel, got none"):
        recorder.record(lambda: None)

    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        recorder.record(fails)
    assert recorder.launched is None
