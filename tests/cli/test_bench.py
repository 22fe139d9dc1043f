"""``refimpl bench`` without a GPU: the table, files, one line for what could not run."""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from refimpl.bench import RUNS
from refimpl.bench.measure import Times
from refimpl.bench.results import line_of, read_results, render
from refimpl.bench.rows import ROWS
from refimpl.bench.works import Maker
from refimpl.cli import app
from refimpl.errors import CouldNotRun

from bench.examples import on_interpreter
from bench.sizes import SMALL
from kernel_support import ON_DEVICE, InterpreterLaunch
from support import ROOT, refimpl_here

NORM, ADAMW = (replace(ROWS[name], sizes=SMALL) for name in ("RMSNorm forward", "AdamW step"))


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
            get_elapsed_time=self.elapsed,
        )

    def elapsed(self, before: Any, after: Any) -> float:
        self.said.append("elapsed")
        return 1.0

    def get_default_memory_pool(self) -> Any:
        return types.SimpleNamespace(free_all_blocks=lambda: self.said.append("free"))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    from refimpl.bench import device

    found = Stub()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(device, "DeviceLaunch", InterpreterLaunch)
    monkeypatch.setattr(device, "COPIED", 4096)
    monkeypatch.setattr(device, "SIDE", 8)
    monkeypatch.setattr(np, "matmul", lambda a, b, out=None: a)  # NumPy's writes no bfloat16
    return found


@on_interpreter
def test_command_writes_what_it_shows(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the file: header, a line a row, results that the table takes."""
    bench = sys.modules["refimpl.bench.run"]
    chosen = [NORM, replace(ROWS["CE forward + backward in place"], sizes=SMALL)]
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
    # 20 samples each, 200 of 1 ms each to warm up, 2 to count by, 1 where nothing is to count
    assert stub.said.count("launch") == 2 * (20 + 200) + 2 + 1


@on_interpreter
def test_command_on_a_wrong_kernel(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, the row named, nothing written where the table looks; one that fails is a line, and
    stops no other."""
    bench = sys.modules["refimpl.bench.run"]
    row = ADAMW

    def inexact(maker: Maker) -> Any:
        return row.make(maker)._replace(check=lambda: {"p": 0.5, "m": 2.5})

    def large(maker: Maker) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(bench, "baselines", lambda: (None, ""))
    monkeypatch.setattr(bench, "select_rows", lambda names: [replace(row, make=inexact)])
    arguments = ["bench", "--gpu", "--runs", "20", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert "DOES NOT HOLD: AdamW step: the error allowed is exceeded: m 2.5 times\n" in done.output
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(bench, "select_rows", lambda names: [replace(row, make=large), NORM])
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
    rows = [NORM, replace(ADAMW, make=stopped)]
    monkeypatch.setattr(bench, "select_rows", lambda names: rows)
    CliRunner().invoke(app, ["bench", "--gpu", "--runs", "20", "--results", str(tmp_path)])
    assert [row.name for row in read_results(tmp_path)[0].rows] == ["RMSNorm forward"]


@on_interpreter
def test_ceilings_are_of_warm_clocks(stub: Stub) -> None:
    """200 times eight copies of 1 ms together before the samples, and as many products: what a
    row's share and target are of must not be too low."""
    from refimpl.bench.device import CupyDevice

    CupyDevice().ceilings()
    assert stub.said == ["elapsed"] * 2 * (200 + RUNS)


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


def test_readme_has_the_table() -> None:
    """The section of kernels/README.md is what `refimpl bench --table` prints."""
    done = refimpl_here("bench", "--table")
    assert done.returncode == 0, done.stderr
    text = (ROOT / "kernels" / "README.md").read_text()
    assert text.split("<!-- refimpl bench --table -->\n")[1].split("<!-- end -->")[0] == done.stdout
    assert done.stdout == render(read_results(ROOT / "benchmarks" / "results"))


@pytest.mark.skipif(ON_DEVICE, reason="there is a GPU")
def test_no_gpu_is_one_line() -> None:
    done = refimpl_here("bench", "--gpu")
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
    done = refimpl_here("bench", "--table", "--results", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "x.json: results must" in done.stderr
