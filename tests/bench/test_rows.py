"""Each row: its bytes and floors, its launches, its error against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.bench.measure import Recorder
from refimpl.bench.rows import ROWS, Maker, worst_error
from refimpl.bench.run import most_error, number_type

from bench.examples import SMALL, V3, DryLaunch, on_interpreter, results
from kernel_support import ON_DEVICE, InterpreterLaunch, make_launch

T, D, H, F, E, K, W = 4096, 7168, 128, 18432, 256, 8, 129280
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


class DryMaker(Maker):
    def normal(self, *shape: int, dtype: Any = None) -> Any:
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
    "AdamW step": 16 / 28,  # p, m and v are arrays that are read and written
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
    error = work.check()
    assert 0 <= error <= most_error(row.storage)
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
        assert work.check() == error


@on_interpreter
def test_errors_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong scale, and other experts than the reference's, are errors above the bound."""
    from refimpl.bench import rows

    recorder = Recorder(InterpreterLaunch())
    monkeypatch.setattr(rows, "EPS", 0.1)
    work = ROWS["RMSNorm forward"].make(Maker(recorder, np, SMALL, number_type("bfloat16"), 1))
    real = rows.REFERENCE["rms_norm"].forward
    wrong = rows.REFERENCE["rms_norm"]._replace(forward=lambda *x, eps: real(*x, eps=eps / 2))
    monkeypatch.setattr(rows, "REFERENCE", rows.REFERENCE | {"rms_norm": wrong})
    assert work.check() > most_error("bfloat16")
    gate = ROWS["gate top-k"].make(Maker(recorder, np, SMALL, number_type("float32"), 1))
    monkeypatch.setattr(rows, "select_experts", lambda scores, k, *_: np.argsort(scores)[:, :k])
    assert gate.check() == float("inf")


def test_worst_error() -> None:
    x = np.array([1.0, -4.0])
    assert worst_error((x, x), (x, x)) == 0
    assert worst_error((x, x + np.array([0, 0.5])), (x, x)) == 0.125
    assert worst_error((x.astype(ml_dtypes.bfloat16),), (x,)) == 0
    assert worst_error((0 * x + 0.5,), (0 * x,)) == 0.5
    assert worst_error((x[:1],), (x,)) == float("inf")
    assert np.isnan(worst_error((x, x * np.nan), (x, x)))
    with pytest.raises(ValueError, match="zip"):
        worst_error((x,), (x, x))


@pytest.mark.skipif(not ON_DEVICE, reason="shapes for a GPU: make gpu")
@pytest.mark.parametrize("name", ROWS)
def test_v3_shapes(name: str) -> None:
    """On the GPU: at V3's shapes, against the float64 reference on the GPU."""
    import cupy

    row = ROWS[name]
    work = row.make(Maker(make_launch(), cupy, V3, number_type(row.storage), 0))
    assert work.check() <= most_error(row.storage)
    del work
    cupy.get_default_memory_pool().free_all_blocks()
