"""`refimpl bench` without a GPU: rows and their bytes, statistics, files, the table; each row's
launches, executed under our interpreter. Nothing here measures a device."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from refimpl.bench import measure as measuring
from refimpl.bench.measure import Recorder, Times, copies, measure, repeats, summary
from refimpl.bench.results import (
    Measured,
    Results,
    file_name,
    line_of,
    read_results,
    render,
    shape_of,
)
from refimpl.bench.rows import ROWS, Maker, Sizes, worst_error
from refimpl.bench.run import (
    BASELINES,
    baselines,
    measure_row,
    most_error,
    number_type,
    select_rows,
)
from refimpl.cli import app
from refimpl.errors import CouldNotRun
from refimpl.kernels import SOURCE

from kernel_support import ON_DEVICE, InterpreterLaunch, make_launch

ROOT = Path(__file__).parents[1]
V3 = Sizes()
SMALL = Sizes(
    tokens=5, width=40, heads=2, rotated=8, hidden=24, experts=16, groups=4, keep_groups=2,
    top_k=3, vocabulary=50, outputs=3, length=6, parameters=37,
)  # fmt: skip
on_interpreter = pytest.mark.skipif(ON_DEVICE, reason="of the interpreter")

# ---- rows

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


class DryLaunch:
    """Launches nothing, so that V3's shapes cost no time; it keeps what it was told."""

    target = "sm_90"

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


def test_select_rows() -> None:
    assert select_rows([]) == list(ROWS.values())
    assert [row.name for row in select_rows(["AdamW step", "RoPE forward"])] == [
        "RoPE forward",
        "AdamW step",
    ]
    with pytest.raises(
        CouldNotRun, match=r"^unknown row softmax; there are RMSNorm forward, [^\n]*$"
    ):
        select_rows(["softmax"])


# ---- measuring


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


class FakeDevice:
    """A device on which a call takes 3 µs, and the very first graph twice that."""

    name, cache, xp = "Fake GPU (2)", 1000, np

    def __init__(self) -> None:
        self.launch, self.stream = Recorder(InterpreterLaunch()), nullcontext()
        self.calls, self.captured, self.freed = 0, list[int](), 0

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        self.captured.append(len(calls))
        return lambda: [call() for call in calls]

    def seconds(self, call: Callable[[], object]) -> float:
        before = self.calls
        call()
        return 3e-6 * max(self.calls - before, 1)

    def peak(self, call: Callable[[], object]) -> int:
        call()
        return 4096

    def free(self) -> None:
        self.freed += 1


def test_measure_repeats_calls_in_one_graph() -> None:
    device = FakeDevice()

    def call() -> None:
        device.calls += 1

    times = measure(device, [call, call], runs=20)
    assert device.captured == [2, 2 * 167]  # 167 · 6 µs is the first above 1 ms
    assert times.median == pytest.approx(3e-6)
    assert device.calls == 2 + 2 + 21 * 334


def test_measure_without_a_graph() -> None:
    device, order = FakeDevice(), list[str]()
    measure(
        device, [lambda: order.append("one"), lambda: order.append("two")], runs=20, graph=False
    )
    assert device.captured == []
    assert order[:4] == ["one", "two"] * 2
    assert len(order) == 2 * 2 + 21 * 2 * 334  # a call that is as short as this is repeated


def test_measure_resets_before_each_sample() -> None:
    device, order = FakeDevice(), list[str]()
    measure(device, [lambda: order.append("call")], runs=20, reset=lambda: order.append("reset"))
    assert device.captured == [1]
    assert (
        order == ["call"] * 2 + ["reset", "call"] * 20
        or order == ["call"] * 3 + ["reset", "call"] * 20
    )


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


class IdleDevice(FakeDevice):
    """Its graphs do nothing: what they would do is tested above."""

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        super().capture(calls)
        return lambda: None


class FakeTorch(types.ModuleType):
    VERSION = "0.0"

    class TorchDevice(IdleDevice):
        def baseline(
            self, name: str, arrays: Sequence[Any], compiled: bool
        ) -> Callable[[], object]:
            if compiled:
                raise RuntimeError("no compiler\nand more lines")
            return lambda: None


@on_interpreter
def test_a_row_from_end_to_end() -> None:
    """Every piece in its place, on a pretended device; what torch can't do is a note."""
    device = IdleDevice()
    found = measure_row(device, ROWS["RMSNorm forward"], FakeTorch("torch"), SMALL, 20)
    assert device.captured == [4, 4 * 334]  # 4 · 800 bytes are the first above 3 · 1000
    assert device.freed == 1
    assert (found.name, found.shape, found.storage, found.bytes) == (
        "RMSNorm forward",
        "5 × 40",
        "bfloat16",
        800,
    )
    assert found.eager is not None
    assert found.compiled is found.compiled_peak is None
    assert found.peak == found.eager_peak == 4096
    assert 0 < found.error <= most_error("bfloat16")
    assert found.notes == ("torch compiled: RuntimeError: no compiler",)
    alone = measure_row(device, ROWS["CE forward + backward in place"], None, SMALL, 20)
    assert alone.eager is alone.ratio is None
    assert alone.notes == ()


def test_baselines_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert baselines(tmp_path / "torch_baselines.py") == (
        None,
        "torch_baselines.py is not there: run from a checkout",
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert baselines() == (None, "torch is not installed")


def test_every_row_has_a_baseline() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")
    module, version = baselines()
    assert module is not None
    assert version == torch.__version__
    assert list(module.BASELINES) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_baselines_compute_the_same(name: str) -> None:
    """On the CPU, eager: a baseline that does less than we do would be no baseline."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")
    module, _ = baselines()
    assert module is not None
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module, "TOP_K", SMALL.top_k)
    monkey.setattr(module, "GROUPS", SMALL.groups)
    monkey.setattr(module, "KEEP_GROUPS", SMALL.keep_groups)
    row = ROWS[name]
    work = row.make(Maker(Recorder(InterpreterLaunch()), np, SMALL, np.dtype(np.float32), 1))
    tensors = [torch.from_numpy(np.ascontiguousarray(x).copy()) for x in work.inputs]
    found = module.BASELINES[name](module.eager, *tensors)()
    ours = work.run()
    if name == "AdamW step":
        return _adamw_baseline(module, torch, work)
    ours = {  # of all that we compute, what the baseline does
        "RMSNorm forward": lambda y: (y[0],),
        "RoPE forward": lambda y: (y[0],),
        "SwiGLU forward": lambda y: (y[0],),
        "gate top-k": lambda y: (y.weights, y.indices),
        "CE forward + backward in place": lambda y: (y[1],),
        "GRPO from log-probabilities": lambda y: (y[1].dlog_prob,),
        "head + CE": lambda y: y[1:],
    }.get(name, lambda y: y)(ours)
    found = found if isinstance(found, tuple) else (found,)
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert len(found) == len(ours)
    for theirs, x in zip(found, ours, strict=True):
        assert worst_error((theirs.numpy(),), (np.asarray(x, np.float64),)) <= 1e-5
    monkey.undo()


def _adamw_baseline(module: Any, torch: Any, work: Any) -> None:
    """The formula that is compiled is a third step of the optimizer that is fused, from zero
    moments."""
    p, g = (torch.from_numpy(x.astype(np.float64)) for x in work.inputs)
    m, v, q = torch.zeros_like(p), torch.zeros_like(p), p.clone()
    module.adamw(q, g, m, v)
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
    optimizer.state[p] = {"step": torch.tensor(2.0), "exp_avg": 0 * p, "exp_avg_sq": 0 * p}
    p.grad = g
    optimizer.step()
    assert torch.allclose(p, q, rtol=0, atol=1e-12)


# ---- CuPy's side, on a CuPy that is no more than its names


class Stub(types.ModuleType):
    """What `CupyDevice` asks of CuPy, done at once by NumPy; every event lies 1 ms after the one
    before."""

    __version__ = "14.2.0"

    def __init__(self) -> None:
        super().__init__("cupy")
        self.said, stub = list[str](), self

        class Stream:
            def __init__(self, non_blocking: bool) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: Any) -> None: ...
            def synchronize(self) -> None: ...
            def begin_capture(self) -> None:
                stub.said.append("begin")

            def end_capture(self) -> Any:
                stub.said.append("end")
                return types.SimpleNamespace(launch=lambda stream: stub.said.append("launch"))

        class Event:
            def record(self, stream: Stream) -> None: ...
            def synchronize(self) -> None: ...

        class MemoryPool:
            malloc = None

            def total_bytes(self) -> int:
                return 512

        runtime = types.SimpleNamespace(
            getDeviceProperties=lambda _: {"name": b"Stub GPU", "l2CacheSize": 1},
            runtimeGetVersion=lambda: 13000,
            driverGetVersion=lambda: 13010,
        )
        self.cuda = types.SimpleNamespace(
            Stream=Stream,
            Event=Event,
            MemoryPool=MemoryPool,
            runtime=runtime,
            using_allocator=lambda _: nullcontext(),
            Device=lambda: types.SimpleNamespace(id=0),
            get_elapsed_time=lambda before, after: 1.0,
        )

    def get_default_memory_pool(self) -> Any:
        return types.SimpleNamespace(free_all_blocks=lambda: self.said.append("free"))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    from refimpl.bench import device, run

    found = Stub()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(device, "DeviceLaunch", InterpreterLaunch)
    monkeypatch.setattr(device, "COPIED", 4096)
    monkeypatch.setattr(device, "SIDE", 8)
    monkeypatch.setattr(np, "matmul", lambda a, b, out=None: a)  # NumPy's writes no bfloat16
    monkeypatch.setattr(run, "Sizes", lambda: SMALL)
    return found


@on_interpreter
def test_command_writes_what_it_shows(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the file: header, a line a row, results that the table takes."""
    bench = sys.modules["refimpl.bench.run"]
    chosen = [ROWS["RMSNorm forward"], ROWS["CE forward + backward in place"]]
    monkeypatch.setattr(bench, "select_rows", lambda names: chosen)
    monkeypatch.setattr(bench, "baselines", lambda: (None, "torch is not installed"))
    done = CliRunner().invoke(
        app,
        ["bench", "--gpu", "--runs", "20", "--results", str(tmp_path / "new"), "--commit", "abc"],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    (found,) = read_results(tmp_path / "new")
    assert (found.device, found.commit, found.cache) == ("Stub GPU", "abc", 1)
    assert (
        found.versions.items()
        >= {"CUDA runtime": "13.0", "CUDA of the driver": "13.1", "CuPy": "14.2.0"}.items()
    )
    assert found.copy == pytest.approx(2 * 4096 / (1e-3 / 8))
    assert found.matrix == pytest.approx(2 * 8**3 / (1e-3 / 8))
    lines = done.output.splitlines()
    assert lines[0] == f"Stub GPU, driver {found.driver}, commit abc, {found.date}"
    assert lines[3] == "no baselines: torch is not installed"
    assert lines[4:6] == [line_of(row, found) for row in found.rows]
    assert lines[6].startswith("written: ")
    assert [row.name for row in found.rows] == [row.name for row in chosen]
    assert found.rows[0].ours == Times(1e-3, 1e-3, 1e-3)
    assert found.rows[0].peak == 512
    assert stub.said.count("begin") == stub.said.count("end") == 2
    assert (
        stub.said.count("launch") == 45
    )  # 20 samples each; 3 warm-ups, and 2 where one graph is enough


@on_interpreter
def test_command_on_a_wrong_kernel(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, the row named, nothing written where the table looks; one that fails is a line, and
    stops no other."""
    bench = sys.modules["refimpl.bench.run"]
    row = ROWS["AdamW step"]

    def inexact(maker: Maker) -> Any:
        return row.make(maker)._replace(check=lambda: 0.5)

    def large(maker: Maker) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(bench, "baselines", lambda: (None, ""))
    monkeypatch.setattr(bench, "select_rows", lambda names: [replace(row, make=inexact)])
    arguments = ["bench", "--gpu", "--runs", "20", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert "DOES NOT HOLD: AdamW step: its error is above the bound" in done.output
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(
        bench, "select_rows", lambda names: [replace(row, make=large), ROWS["RMSNorm forward"]]
    )
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, CouldNotRun)
    assert str(done.exception) == "not measured on Stub GPU: AdamW step"
    assert "COULD NOT RUN: AdamW step: MemoryError: no more\n" in done.output
    assert [row.name for row in read_results(tmp_path)[0].rows] == ["RMSNorm forward"]


@on_interpreter
def test_results_are_written_as_they_come(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped leaves the rows before it."""
    bench = sys.modules["refimpl.bench.run"]

    def stopped(maker: Maker) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "baselines", lambda: (None, ""))
    rows = [ROWS["RMSNorm forward"], replace(ROWS["AdamW step"], make=stopped)]
    monkeypatch.setattr(bench, "select_rows", lambda names: rows)
    CliRunner().invoke(app, ["bench", "--gpu", "--runs", "20", "--results", str(tmp_path)])
    assert [row.name for row in read_results(tmp_path)[0].rows] == ["RMSNorm forward"]


@on_interpreter
def test_a_broken_capture_says_why(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the call, not the one that CUDA then answers with when the capture is ended; and
    it is ended."""
    from refimpl.bench.device import CupyDevice

    def end() -> None:
        stub.said.append("end")
        raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    def wrong() -> None:
        raise KeyError("x")

    device = CupyDevice()
    monkeypatch.setattr(device.stream, "end_capture", end)
    with pytest.raises(KeyError):
        device.capture([wrong])
    assert stub.said == ["begin", "end"]


# ---- results and the table


def results(device: str = "Fake GPU (2)", date: str = "2026-11-30", **changed: Any) -> Results:
    given: dict[str, Any] = {
        "name": "RMSNorm forward",
        "shape": "4096 × 7168",
        "storage": "bfloat16",
        "bytes": 4 * T * D,
        "flops": 0,
        "ours": Times(50e-6, 49e-6, 52e-6),
        "peak": 58_736_640,
        "error": 2.5e-3,
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


def test_derived_numbers() -> None:
    (row,) = results().rows
    assert row.floor(3.0e12, 8e14) == pytest.approx(39.15e-6, rel=1e-4)
    assert row.share(3.0e12, 8e14) == pytest.approx(0.783, rel=1e-3)
    assert replace(row, flops=8 * 10**11).floor(3.0e12, 8e14) == 1e-3
    assert row.ratio == pytest.approx(1.25)  # against the faster of the two
    assert replace(row, compiled=None).ratio == pytest.approx(0.25)
    assert replace(row, compiled=None, eager=None).ratio is None


def test_json_round_trip(tmp_path: Path) -> None:
    """What is written is read back; what a hand changed is refused."""
    found = results()
    content = json.loads(json.dumps(found.to_json()))
    assert Results.from_json(content) == found
    assert content["rows"][0]["share"] == pytest.approx(0.783, rel=1e-3)
    for change in (
        lambda c: c["rows"][0].update(share=0.99),
        lambda c: c.update(schema=0),
        lambda c: c.pop("commit"),
        lambda c: c["rows"][0]["ours"].pop("low"),
        lambda c: c.update(more=1),
        lambda c: c.update(copy=0.0),
        lambda c: c["rows"][0].pop("notes"),
    ):
        wrong = json.loads(json.dumps(found.to_json()))
        change(wrong)
        with pytest.raises(ValueError, match="results must"):
            Results.from_json(wrong)
    with pytest.raises(ValueError, match="results must have the fields"):
        Results.from_json([])


def test_files(tmp_path: Path) -> None:
    """The latest of each device; a name or a content that is not ours is named."""
    assert (
        file_name("NVIDIA H100 80GB HBM3", "2026-11-30") == "nvidia-h100-80gb-hbm3-2026-11-30.json"
    )
    assert read_results(tmp_path) == []
    for found in (results(), results(date="2026-12-01", peak=1), results("Other")):
        (tmp_path / file_name(found.device, found.date)).write_text(json.dumps(found.to_json()))
    assert read_results(tmp_path) == [results(date="2026-12-01", peak=1), results("Other")]
    (tmp_path / "x.json").write_text(json.dumps(results().to_json()))
    with pytest.raises(ValueError, match=r"x.json: must be called fake-gpu-2-2026-11-30.json"):
        read_results(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CouldNotRun, match=r"x\.json is not JSON: "):
        read_results(tmp_path)


def test_table() -> None:
    nothing = render([])
    files, rows = nothing.split("\n\n")
    lines = [line for line in rows.splitlines() if line.startswith("| [")]
    assert len(lines) == len(ROWS)
    assert all("| not measured yet | – | – |" in line for line in lines)
    assert "| 4096 × 7168 | bfloat16 | 4TD = 117 MB |" in lines[0]
    assert {line.count("|") for line in rows.splitlines()} == {14}
    assert {line.count("|") for line in files.splitlines()} == {5}
    kernels = [
        *SOURCE.glob("*.cu"),
        *(path for path in SOURCE.glob("*_numba_cuda.py") if "common" not in path.name),
    ]
    assert sorted(re.findall(r"\]\((.*?)\)", files)) == sorted(path.name for path in kernels)
    assert (
        "| [rms_norm.cu](rms_norm.cu) | sm_80, sm_90, sm_90a, sm_100 | float64, float32, "
        "bfloat16 | not yet |" in files
    )
    assert (
        "| [moe_numba_cuda.py](moe_numba_cuda.py) | sm_80, sm_90, sm_90a, sm_100 | float64, "
        "float32 | no row |" in files
    )
    some = render([results(), results("Other", compiled=None, eager=None, eager_peak=None)])
    assert (
        "| Fake GPU (2) | 50.0 µs (49.0 µs … 52.0 µs) | 39.1 µs | 78 % | 200 µs (190 µs … 210 "
        "µs) | 40.0 µs (40.0 µs … 41.0 µs) | 1.25 | 58.7 MB / 1.00 GB / – | 2.5e-03 |"
    ) in some
    assert (
        "| Other | 50.0 µs (49.0 µs … 52.0 µs) | 39.1 µs | 78 % | – | – | – | 58.7 MB / – / – "
        "| 2.5e-03 |" in some
    )
    assert some.count("not measured yet") == len(ROWS) - 1
    on_both = "RMSNorm forward in bfloat16 on Fake GPU (2), RMSNorm forward in bfloat16 on Other"
    assert f"| float64, float32, bfloat16 | {on_both} |" in some
    assert (
        "Fake GPU (2): its own copy 3.00 TB/s, its bfloat16 product 800 TFLOP/s, driver "
        "580.1, CuPy 14.2" in some
    )
    assert "RMSNorm forward: a note." in some


def test_line() -> None:
    found = results(compiled=None)
    assert line_of(found.rows[0], found) == (
        "RMSNorm forward 4096 × 7168 bfloat16: 50.0 µs (49.0 µs … 52.0 µs), floor 39.1 µs "
        "(4TD), 78 % of it; torch 200 µs (190 µs … 210 µs); 0.25 x the best; memory 58.7 MB / "
        "1.00 GB / –; error 2.5e-03; a note"
    )


def test_shapes_in_words() -> None:
    shapes = {name: shape_of(row, V3) for name, row in ROWS.items()}
    assert shapes["gate top-k"] == "4096 × 256 / 8 / 4 / 8"
    assert shapes["CE forward + backward in place"] == "4096 × 129280"
    assert shapes["AdamW step"] == str(2**28)


# ---- the command


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refimpl", "bench", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_readme_has_the_table() -> None:
    """The section of kernels/README.md is what `refimpl bench --table` prints."""
    done = run("--table")
    assert done.returncode == 0, done.stderr
    text = (ROOT / "kernels" / "README.md").read_text()
    assert text.split("<!-- refimpl bench --table -->\n")[1].split("<!-- end -->")[0] == done.stdout
    assert done.stdout == render(read_results(ROOT / "benchmarks" / "results"))


@pytest.mark.skipif(ON_DEVICE, reason="there is a GPU")
def test_no_gpu_is_one_line() -> None:
    done = run("--gpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("refimpl: kernels need ")


def test_wrong_arguments() -> None:
    for arguments, message in (
        ((), "bench needs one of --gpu"),
        (("--gpu", "--table"), "bench needs one of"),
        (("--gpu", "--runs", "5"), "--runs must be at least 20, got 5"),
        (("--gpu", "softmax"), "unknown row softmax"),
        (("--gpu", "--json", "/nowhere/x.json"), "can't be written"),
    ):
        with pytest.raises(CouldNotRun, match=message):
            CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


def test_bad_results_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    done = run("--table", "--results", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "x.json: results must" in done.stderr


def test_baselines_lie_outside_the_package() -> None:
    assert BASELINES == ROOT / "benchmarks" / "torch_baselines.py"
    assert BASELINES.is_file()
