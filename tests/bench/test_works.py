"""The work of each row: right by its own check, which sees what is planted."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.bench.measure import Recorder
from refimpl.bench.rows import ROWS
from refimpl.bench.works import (
    SPREAD,
    Maker,
    attention_errors,
    error_of,
    most_error,
    number_type,
    worst_error,
)
from refimpl.ops import REFERENCE
from refimpl.stored import rounded, tensor_core_attention

from bench.examples import DISTINCT, TESTED, on_interpreter
from bench.planted import PLANTED, PlantedLaunch
from bench.sizes import SMALL
from kernel_support import InterpreterLaunch, PretendedLaunch
from pretended_cupy import Pretended, here, there
from support import FULL


@on_interpreter
@pytest.mark.parametrize("name", TESTED)
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


EXPERTS = {"y", "dx", "dweights", "dw_gate", "dw_up", "dw_down"}
RESULTS = {  # what each row checks
    "RMSNorm forward": {"y", "dx", "dw"}, "RMSNorm backward": {"y", "dx", "dw"},
    "RoPE forward": {"y", "dx"}, "RoPE backward": {"y", "dx"},
    "SwiGLU forward": {"y", "dgate", "dup"}, "SwiGLU backward": {"y", "dgate", "dup"},
    "attention forward, 1k": {"o", "dq", "dk", "dv"},
    "attention backward, 1k": {"o", "dq", "dk", "dv"},
    "MLA decode, 16 heads, 1k": {"o"},
    "gate top-k": {"ids", "weights", "scores"}, "MoE permute": {"rows"}, "MoE combine": {"y"},
    **dict.fromkeys((x for x in DISTINCT if x.startswith("MoE layer")), EXPERTS),
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
@pytest.mark.parametrize("name", TESTED)
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


SLOW = ("MoE layer, 8 experts, balanced",)  # 7 s: make test-full


@on_interpreter
@pytest.mark.parametrize("name", [name for name in TESTED if FULL or name not in SLOW])
def test_planted_mistakes_show(name: str) -> None:
    """Each mistake is above what is allowed, and each result that a row checks is so in one of
    them; what is right stays below, before and after."""
    assert list(PLANTED) == DISTINCT
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


def test_last_rows_of_attention_are_seen() -> None:
    """Ten per cent more of the last 64 rows of one result, of a sequence of 2,048, beside whose
    first keys the last have almost no gradient; rounding as tensor cores do takes less than half of
    what is allowed."""
    rng, width = np.random.default_rng(0), 192
    q, k, v, do = (rounded(rng.normal(size=(1, 2048, 1, width)), "bfloat16") for _ in range(4))
    results = []
    for attention, dtype in (
        (REFERENCE.attention, np.float64),
        (tensor_core_attention(), np.float32),
    ):
        o, saved = attention.forward(*(x.astype(dtype) for x in (q, k, v)), scale=width**-0.5)
        results.append((o, *attention.backward(do.astype(dtype), saved)))
    exact, found = results[0], [rounded(np.asarray(x), "bfloat16") for x in results[1]]
    assert max(attention_errors(found, exact).values()) < 0.5
    for i, name in enumerate(("o", "dq", "dk", "dv")):
        wrong = [x.copy() for x in found]
        wrong[i][:, -64:] *= found[i].dtype.type(1.1)
        errors = attention_errors(wrong, exact)
        assert [x for x, error in errors.items() if error > 1] == [name]


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
