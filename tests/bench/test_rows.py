"""Each row: its bytes and floors, its launches, its error against the reference."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.bench.measure import Recorder
from refimpl.bench.rows import ROWS, SPREAD, Maker, error_of, most_error, number_type, worst_error

from bench.examples import SMALL, V3, DryLaunch, on_interpreter, results
from bench.planted import PLANTED, PlantedLaunch
from kernel_support import ON_DEVICE, InterpreterLaunch, PretendedLaunch, make_launch
from pretended_cupy import Pretended, here, there

T = 4096
D = 7168
H = 128
F = 18432
E = 256
K = 8
W = 129280
FLOORS = {  # (bytes, by hand, and the µs of the row at 3.0 TB/s and 798 TFLOP/s)
    "RMSNorm forward": (4 * T * D, 39), "RMSNorm backward": (6 * T * D, 59),
    "RoPE forward": (4 * T * H * 64, 45), "RoPE backward": (4 * T * H * 64, 45),
    "SwiGLU forward": (6 * T * F, 151), "SwiGLU backward": (10 * T * F, 252),
    "gate top-k": (4 * T * E, 1.4), "MoE permute": (2 * T * D + 2 * T * K * D, 176),
    "MoE combine": (2 * T * D + 2 * T * K * D, 176),
    "CE forward + backward in place": (4 * T * W, 706),
    "head + CE": (2 * D * (2 * T + 3 * W), 28.5e3),  # h, w and dh in two bytes, dw in four
    "GRPO from log-probabilities": (24 * 2**20, 8.4), "AdamW step": (28 * 2**28, 2505),
}  # fmt: skip


def test_bytes_and_floors() -> None:
    assert list(FLOORS) == list(ROWS)
    for name, (by_hand, microseconds) in FLOORS.items():
        counted = ROWS[name].bytes(V3)
        assert counted == by_hand, name
        (row,) = results(
            name=name, bytes=counted, flops=ROWS[name].flops(V3) if ROWS[name].flops else 0
        ).rows
        assert row.floor(3.0e12, 798e12) * 1e6 == pytest.approx(microseconds, rel=0.03), name
    assert ROWS["head + CE"].flops(V3) == 6 * T * D * W


TARGETS = {  # the share of the floor's rate that is asked for, by hand
    "RMSNorm forward": 39.1 / 45, "RMSNorm backward": 58.7 / 70,
    "RoPE forward": 44.7 / 50, "RoPE backward": 44.7 / 50,
    "SwiGLU forward": 151 / 165, "SwiGLU backward": 251.7 / 275,
    "gate top-k": 1.4 / 7, "MoE permute": 176 / 210, "MoE combine": 176 / 210,
    "CE forward + backward in place": 706 / 1150, "head + CE": 28.5 / 33,
    "AdamW step": 9.3 / 10.2,
}  # fmt: skip


def test_targets() -> None:
    assert set(ROWS) - set(TARGETS) == {"GRPO from log-probabilities"}
    for name, row in ROWS.items():
        asked = row.asked()
        assert asked == (pytest.approx(TARGETS[name], rel=0.01) if name in TARGETS else None), name


class DryMaker(Maker):
    def normal(self, *shape: int, dtype: Any = None, scale: float = 1) -> Any:
        return np.zeros(shape, self.storage if dtype is None else dtype)


# What the kernels' arguments hold, over the row's bytes: an array that is read and one that is
# written count once each.
ARGUMENTS = {
    "RMSNorm backward": 1.083,  # 256 partial sums of dw, written and read again
    "RoPE forward": 1.008, "RoPE backward": 1.008,  # cos and sin in float32
    "gate top-k": 2.098,  # the scores are written too, for the backward, and ids in int64
    "CE forward + backward in place": 1.5,  # the forward reads the logits first: 6TW
    # the gradient is one array that is written, read and written
    "GRPO from log-probabilities": 18 / 24,
    "AdamW step": 20 / 28,  # m and v are read and written; p is given twice, as its own master
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.flops])
def test_arguments_of_the_kernels_are_the_bytes(name: str) -> None:
    """At V3's shapes, without executing: what the launches touch is what the row counts, or it is
    said why not."""
    row, launch = ROWS[name], DryLaunch()
    sizes = replace(V3, tokens=64) if row.stem == "cross_entropy" else replace(V3, parameters=2**20)
    work = row.make(DryMaker(launch, np, sizes, number_type(row.storage), 0))
    launch.seen.clear()
    work.run()
    arrays = [x for arguments in launch.seen for x in arguments if isinstance(x, np.ndarray)]
    assert sum(x.nbytes for x in arrays) / row.bytes(sizes) == pytest.approx(
        ARGUMENTS.get(name, 1), rel=2e-3
    )


@on_interpreter
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_right_and_repeat(name: str) -> None:
    """Each row's work: within its bound of the float64 reference, and its recorded launches do the
    same again."""
    row, recorder = ROWS[name], Recorder(InterpreterLaunch())
    work = row.make(Maker(recorder, np, SMALL, number_type(row.storage), 1))
    errors = work.check()
    assert all(0 <= error <= 1 for error in errors.values()), f"{name}: {errors}"
    if work.reset:
        work.reset()
    again = recorder.record(work.run)
    if work.reset:
        work.reset()
    before = len(recorder.launch.reports)  # type: ignore[attr-defined]
    again()
    kernels = [kernel for kernel, _ in recorder.launch.reports]  # type: ignore[attr-defined]
    assert kernels[before:] == kernels[2 * before - len(kernels) : before]
    if name != "AdamW step":  # whose state goes on
        assert work.check() == errors, name


RESULTS = {  # what each row checks
    "RMSNorm forward": {"y", "dx", "dw"}, "RMSNorm backward": {"y", "dx", "dw"},
    "RoPE forward": {"y", "dx"}, "RoPE backward": {"y", "dx"},
    "SwiGLU forward": {"y", "dgate", "dup"}, "SwiGLU backward": {"y", "dgate", "dup"},
    "gate top-k": {"ids", "weights", "scores"}, "MoE permute": {"rows"}, "MoE combine": {"y"},
    "CE forward + backward in place": {"loss", "dlogits at the targets", "other dlogits"},
    "head + CE": {"loss", "dh", "dw"}, "AdamW step": {"p", "m", "v"},
    "GRPO from log-probabilities": {"clips", "loss", "dlog_prob"},
}  # fmt: skip


class PretendedMaker(Maker):
    """What is drawn lies on the pretended CuPy."""

    def normal(self, *shape: int, dtype: Any = None, scale: float = 1) -> Any:
        return there(super().normal(*shape, dtype=dtype, scale=scale))

    def integers(self, below: int, *shape: int) -> Any:
        return there(super().integers(below, *shape))

    def order(self, slots: int) -> Any:
        return there(np.argsort(here(self.rng.random(slots, dtype=np.float32))))


@on_interpreter
@pytest.mark.parametrize("name", ROWS)
def test_checks_do_nothing_that_cupy_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same errors as on NumPy's arrays, up to the order of the reference's sums."""
    monkeypatch.setitem(sys.modules, "cupy", cupy := Pretended("cupy"))
    row, storage = ROWS[name], number_type(ROWS[name].storage)
    on_cupy, on_numpy = (
        row.make(maker(launch, xp, SMALL, storage, 1))
        for maker, launch, xp in (
            (PretendedMaker, PretendedLaunch(), cupy),
            (Maker, InterpreterLaunch(), np),
        )
    )
    assert on_cupy.check() == pytest.approx(on_numpy.check(), abs=0.01), name


@on_interpreter
@pytest.mark.parametrize("name", ROWS)
def test_planted_mistakes_show(name: str) -> None:
    """Each mistake is above what is allowed, and each result that a row checks is so in one of
    them; what is right stays below, before and after."""
    assert list(PLANTED) == list(ROWS)
    row, launch = ROWS[name], PlantedLaunch(InterpreterLaunch())
    # of the seeds from 0 the first with which clips and groups of all kinds occur
    work = row.make(Maker(launch, np, SMALL, number_type(row.storage), 0))
    right, seen = work.check(), set[str]()
    for mistake, launch.mistake in PLANTED[name].items():
        wrong = {result for result, error in work.check().items() if not error <= 1}
        assert wrong, f"{name}: nothing saw {mistake!r}"
        seen |= wrong
    assert set(right) == RESULTS[name]
    assert seen == RESULTS[name], f"{name}: no mistake shows in {RESULTS[name] - seen}"
    launch.mistake = None
    for errors in (right, work.check()):
        assert max(errors.values()) <= 1, f"{name}: {errors}"


def test_softmax_is_no_trifle_in_the_gradient_of_the_head() -> None:
    """What it adds to dh is more than ten times what is allowed; with logits of standard deviation
    1 it is half of that here, and about what is allowed at V3's size."""
    rng, (words, width) = np.random.default_rng(0), (4096, 1024)
    h = rng.standard_normal(width)
    w = rng.standard_normal((words, width)) * SPREAD * width**-0.5
    p = np.exp(w @ h)
    softmax = p @ w / p.sum()
    assert worst_error(-w[7], softmax - w[7]) >= 10 * most_error("bfloat16")


def test_worst_error() -> None:
    x = np.array([[1.0, -4.0], [0.5, 0.25]])
    assert worst_error(x, x) == 0
    assert worst_error(x + np.array([[0, 0.5], [0, 0]]), x) == 0.125
    assert worst_error(x + np.array([[0, 0], [0, 0.125]]), x) == 0.25  # of its own row
    assert worst_error(x.astype(ml_dtypes.bfloat16), x) == 0
    assert worst_error(x[0] + np.array([0, 0.5]), x[0]) == 0.125  # without rows: one
    assert worst_error(np.float32(1.5), np.float64(-2)) == 1.75
    assert worst_error(0 * x, 0 * x) == 0
    assert worst_error(0 * x + 1e-30, 0 * x) > 1e100  # a row of zeros allows nothing else
    assert worst_error(x[:1], x) == float("inf")
    assert np.isnan(worst_error(x * np.nan, x))
    assert np.isnan(worst_error(x, x * np.nan))


def test_error_of_is_by_type() -> None:
    """One unit of bfloat16, 64 of float32, or those of another type that is named."""
    x = np.ones(3, np.float32)
    assert most_error("bfloat16") == 2.0**-7
    assert most_error("float32") == 2.0**-17
    assert error_of(x, x.astype(np.float64) - 2.0**-8) == pytest.approx(2**9, rel=0.01)
    assert error_of(x, x - 2.0**-8, "bfloat16") == pytest.approx(0.5, rel=0.01)
    assert error_of(x.astype(ml_dtypes.bfloat16), x - 2.0**-8) == pytest.approx(0.5, rel=0.01)


@pytest.mark.skipif(not ON_DEVICE, reason="shapes for a GPU: make gpu")
@pytest.mark.parametrize("name", ROWS)
def test_v3_shapes(name: str) -> None:
    """On the GPU: at V3's shapes, against the float64 reference on the GPU."""
    import cupy

    row = ROWS[name]
    work = row.make(Maker(make_launch(), cupy, V3, number_type(row.storage), 0))
    errors = work.check()
    assert all(error <= 1 for error in errors.values()), f"{name}: {errors}"
    del work
    cupy.get_default_memory_pool().free_all_blocks()
