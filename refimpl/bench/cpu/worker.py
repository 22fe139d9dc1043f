"""A column's process: ``python -m refimpl.bench.cpu.worker COLUMN``.

It reads a request per line, as JSON, and answers each with a line, until its input ends:

    {"ready": 0.8}                              at once, on its own: the seconds of its imports
    {"do": "prepare", "problem": …, "sizes": …, "truth": FOLDER}
        → {"first": 1.2, "error": 3e-7, "worst": "dx"}       makes the inputs, calls it once
    {"do": "peak"} → {"peak": 8000000, "seconds": 0.01}      memory, and the time, of a call
    {"do": "turn", "samples": 5, "calls": 2, "untimed": 1} → {"seconds": [5 times, of a call]}
    {"do": "drop"} → {}                         forgets the problem
    {"do": "truth", "problem": …, "sizes": …, "truth": FOLDER} → {}     writes the exact answer
    {"do": "rate"} → {"rate": 2e11}             flop per second of a product
    {"do": "write", "bytes": …} → {"seconds": 0.03}          the time of writing fresh memory

What could not be done is answered with {"failed": why}. It answers when its threads sleep: those
of OpenBLAS spin for a tenth of a second after a product, and would take a core from the next.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ...errors import CouldNotRun
from ...kernels.cpu.memory import keep_freed, release
from .columns import BENCHMARKS, COLUMNS
from .ours import Gradients, Work, work_of
from .problems import Sizes, inputs_of

__all__ = ["Worker", "error_of", "main", "product_rate", "serve"]

SIDE = 2048  # of the product that `rate` times
TRIES = 5  # of `rate` and `write`
LOOK, LONGEST = 0.02, 1.0  # seconds: of a look whether threads sleep, and of all looks
Answer = dict[str, Any]


class Worker:
    """One method per request."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.work: Work | None = None
        file = COLUMNS[column].file if column in COLUMNS else None
        self.theirs: Any = None if file is None else load(BENCHMARKS / file)

    def prepare(self, problem: str, sizes: dict[str, Any], truth: str) -> Answer:
        self.drop()  # what a failure may have left
        made = Sizes(**sizes)
        if self.theirs is None:
            work = work_of(self.column, problem, made)
        else:
            work = self.theirs.work_of(self.column, problem, inputs_of(problem, made), made)
        before = time.perf_counter()
        found = work.gradients()
        first = time.perf_counter() - before
        error, worst = error_of(found, Path(truth))
        self.work = work
        return {"first": first, "error": error, "worst": worst}

    def peak(self) -> Answer:
        seconds, peak = peak_of(self._call)
        return {"peak": peak, "seconds": seconds}

    def turn(self, samples: int, calls: int, untimed: int) -> Answer:
        call, found = self._call, []
        for _ in range(untimed):
            call()
        for _ in range(samples):
            before = time.perf_counter()
            for _ in range(calls):
                call()
            found.append((time.perf_counter() - before) / calls)
        return {"seconds": found}

    def drop(self) -> Answer:
        self.work = None
        gc.collect()
        trim()
        return {}

    def truth(self, problem: str, sizes: dict[str, Any], truth: str) -> Answer:
        """In float64, by the ops that keep nothing quadratic."""
        found = work_of("flash", problem, Sizes(**sizes), np.float64).gradients()
        for name, gradient in found.items():
            np.save(Path(truth) / f"{name}.npy", gradient)
        return {}

    def rate(self) -> Answer:
        return {"rate": product_rate()}

    def write(self, bytes: int) -> Answer:
        return {"seconds": fastest(lambda: np.full(bytes // 4, 0.5, np.float32))}

    @property
    def _call(self) -> Callable[[], object]:
        if self.work is None:
            raise ValueError("a problem must be prepared first, got none")
        return self.work.call


def load(path: Path) -> Any:
    """The module of another library's side, by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CouldNotRun(f"{path} can't be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def error_of(found: Gradients, truth: Path) -> tuple[float, str]:
    """The largest error of a gradient, over its largest number, and which gradient that is."""
    errors = {}
    for path in sorted(truth.glob("*.npy")):
        exact, given = np.load(path, mmap_mode="r"), found[path.stem]
        if exact.shape != given.shape:
            raise ValueError(f"{path.stem} must have shape {exact.shape}, got {given.shape}")
        exact, given = exact.reshape(-1), given.reshape(-1)
        parts = [
            slice(i, i + 2**20) for i in range(0, exact.size, 2**20)
        ]  # nothing in float64 whole
        largest = max(float(np.max(np.abs(exact[part]))) for part in parts)
        wrong = [float(np.max(np.abs(given[part] - exact[part]))) for part in parts]
        errors[path.stem] = float(np.max(wrong)) / (largest or 1.0)  # NaN stays
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return errors[worst], worst


def product_rate() -> float:
    """Flop per second of NumPy's own product in float32."""
    a = np.ones((SIDE, SIDE), np.float32)
    return 2 * SIDE**3 / fastest(lambda: a @ a)


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, the first left out."""
    call()
    seconds = []
    for _ in range(TRIES):
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def trim() -> None:
    """Give back to the system what was freed, by our store and glibc's malloc, which torch uses."""
    release()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[[], object]) -> tuple[float, int | None]:
    """Seconds of the call, and by how many bytes the process's memory grew at most during it, its
    results included; None where Linux's /proc can't say."""
    gc.collect()
    trim()
    before, start = resident("VmRSS"), time.perf_counter()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    except OSError:
        before = None
    result = call()
    seconds = time.perf_counter() - start
    after = resident("VmHWM")
    del result
    return seconds, None if before is None or after is None else max(after - before, 0)


def resident(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer every line."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"failed": failure(error)}
        settle()
        print(json.dumps(answer), file=answers, flush=True)


def settle() -> None:
    """Wait until the threads of this process sleep, but not longer than `LONGEST`."""
    end = time.perf_counter() + LONGEST
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(LOOK)
        if time.process_time() - before < LOOK / 10:
            return


def failure(error: BaseException) -> str:
    """In one line."""
    what = (str(error) or "no message").splitlines()[0]
    return what if isinstance(error, CouldNotRun) else f"{type(error).__name__}: {what}"


def main(column: str) -> None:
    """Serve requests from standard input until it ends."""
    before = time.perf_counter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        worker = Worker(column)
    except Exception as error:
        print(json.dumps({"failed": failure(error)}), file=answers, flush=True)
        return
    if worker.theirs is None:
        keep_freed()  # as our commands do
    print(json.dumps({"ready": time.perf_counter() - before}), file=answers, flush=True)
    serve(worker, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1])
