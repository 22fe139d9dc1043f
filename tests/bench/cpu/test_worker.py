"""The protocol, the error, and the memory of a call."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from refimpl.bench.cpu import worker as workers
from refimpl.bench.cpu.rows import TOY_ROWS
from refimpl.bench.cpu.worker import Worker, error_of, serve

SWIGLU = {"problem": "swiglu", "sizes": asdict(TOY_ROWS["swiglu"].sizes)}


def test_protocol(tmp_path: Path) -> None:
    """A line for a line; what can't be done is an answer, and the next request is served."""
    requests = [
        {"do": "turn", "samples": 2, "calls": 1, "untimed": 0},
        {"do": "truth", **SWIGLU, "truth": str(tmp_path)},
        {"do": "prepare", **SWIGLU, "truth": str(tmp_path)},
        {"do": "peak"},
        {"do": "turn", "samples": 3, "calls": 2, "untimed": 1},
        {"do": "drop"},
        {"do": "peak"},
        {"do": "write", "bytes": 4000},
    ]
    out = io.StringIO()
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    serve(Worker("flash"), io.StringIO(lines), out)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    early, truth, ready, peak, turn, dropped, late, write = answers
    assert early == late == {"failed": "ValueError: a problem must be prepared first, got none"}
    assert truth == dropped == {}
    assert set(ready) == {"first", "error", "worst"}
    assert 0 < ready["error"] < 1e-6
    assert peak["seconds"] > 0
    assert len(turn["seconds"]) == 3
    assert min(turn["seconds"]) > 0
    assert write["seconds"] > 0


def test_calls_before_the_samples_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = [0.0], [5.0, *[1.0] * 12]
    monkeypatch.setattr(workers.time, "perf_counter", lambda: now[0])
    worker = Worker("reference")
    worker.work = workers.Work(lambda: now.append(now.pop() + taken.pop(0)), dict)
    assert worker.turn(3, 4, 1) == {"seconds": [1.0, 1.0, 1.0]}
    assert not taken


def test_it_answers_when_its_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose time counts up while they spin; they are not waited for without end."""
    now, spun = [0.0], [0.0]
    until = [0.0]

    def sleep(seconds: float) -> None:
        spun[0] += min(seconds, max(until[0] - now[0], 0.0))
        now[0] += seconds

    monkeypatch.setattr(workers.time, "sleep", sleep)
    monkeypatch.setattr(workers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(workers.time, "process_time", lambda: spun[0])
    for spins, waited in ((0.0, workers.LOOK), (0.11, 0.14), (100.0, workers.LONGEST)):
        now[0], until[0] = 0.0, spins
        workers.settle()
        assert now[0] == pytest.approx(waited)


def test_error(tmp_path: Path) -> None:
    exact = {"a": np.array([[1.0, -4.0]]), "b": np.zeros(3)}
    for name, x in exact.items():
        np.save(tmp_path / f"{name}.npy", x)
    found = {"a": np.float32([[1, -3.5]]), "b": np.float32([0, 0, 0.25])}
    assert error_of(found, tmp_path) == (0.25, "b")
    assert error_of(found | {"b": np.zeros(3)}, tmp_path) == (0.125, "a")
    error, worst = error_of(found | {"a": np.float32([[np.nan, -4]])}, tmp_path)
    assert (np.isnan(error), worst) == (True, "a")
    with pytest.raises(ValueError, match=r"b must have shape \(3,\), got \(2,\)"):
        error_of(found | {"b": np.zeros(2)}, tmp_path)
    with pytest.raises(KeyError):
        error_of({"a": found["a"]}, tmp_path)


PEAKS = """  # in a process of its own, as a worker is: tests before it leave gaps in the heap
import json
import numpy as np
from refimpl.bench.cpu.worker import peak_of
size = 2**24
before = np.ones(4 * size, np.uint8)
large = lambda: np.ones(size, np.uint8)[:1] + np.ones(2 * size, np.uint8)[:1]
small = lambda: [bytes(2000) for _ in range(size // 2000)]
print(json.dumps([[peak_of(call)[1] for call in (large, small)] for _ in range(2)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's /proc")
def test_peak() -> None:
    """What is freed within the call counts, what lies there before does not; and a second call does
    not find the first one's memory and seem to need none."""
    size = 2**24
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    large, small = np.array(json.loads(done.stdout)).T
    assert large.shape == (2,)
    assert np.all((3 * size <= large + 2**20) & (large <= 3 * size + 2**22))
    assert np.all((0.95 * size <= small) & (small <= 1.5 * size))
