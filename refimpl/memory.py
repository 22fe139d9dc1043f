"""Peak memory of the ops that are written to save it, measured with tracemalloc above their inputs;
and of a process, as the operating system counts it."""

from __future__ import annotations

import gc
import re
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import CouldNotRun
from .ops import (
    flash_attention_backward,
    flash_attention_forward,
    head_cross_entropy_backward,
    head_cross_entropy_forward,
)

__all__ = [
    "AttentionMemory",
    "HeadMemory",
    "ProcessMemory",
    "attention_memory",
    "available_memory",
    "head_memory",
    "process_memory",
]


class AttentionMemory(NamedTuple):
    length: int  # T
    peak: int  # bytes above q, k, v, do
    probabilities: int  # bytes of the [H, T, T] probabilities that are never made


class HeadMemory(NamedTuple):
    length: int  # T
    peak: int  # bytes above h, w and beyond the returned dh, dw
    logits: int  # bytes of the [T, W] logits that are never made


class ProcessMemory(NamedTuple):
    peak: int  # bytes that no file backs (RssAnon), the interpreter's included
    seconds: float


def _peak(work: Callable[[], object]) -> int:
    """Peak bytes allocated while ``work`` runs, its result included."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def attention_memory(
    lengths: Sequence[int] = (1024, 2048, 4096),
    *,
    heads: int = 4,
    width: int = 48,
    value: int = 32,
    block: int = 128,
) -> Iterator[AttentionMemory]:
    """Flash attention forward and backward, causal, batch 1, float32."""
    rng = np.random.default_rng(0)
    for t in lengths:
        q, k, v, do = (
            rng.normal(size=(1, t, heads, w)).astype(np.float32)
            for w in (width, width, value, value)
        )

        def work(
            q: np.ndarray = q, k: np.ndarray = k, v: np.ndarray = v, do: np.ndarray = do
        ) -> object:
            o, saved = flash_attention_forward(q, k, v, scale=width**-0.5, block=block)
            return o, flash_attention_backward(do, saved)

        yield AttentionMemory(t, _peak(work), heads * t * t * 4)


def head_memory(
    lengths: Sequence[int] = (1024, 2048, 4096, 8192), *, vocabulary: int = 129_280, width: int = 32
) -> Iterator[HeadMemory]:
    """Output head and cross-entropy in one, forward and backward, float32."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(vocabulary, width)) / width**0.5).astype(np.float32)
    for t in lengths:
        h, targets = rng.normal(size=(t, width)).astype(np.float32), rng.integers(0, vocabulary, t)

        def work(h: np.ndarray = h, targets: np.ndarray = targets) -> object:
            loss, saved = head_cross_entropy_forward(h, w, targets=targets)
            return head_cross_entropy_backward(np.ones_like(loss), saved)

        yield HeadMemory(t, _peak(work) - h.nbytes - w.nbytes, t * vocabulary * 4)


def available_memory() -> int | None:
    """How many bytes this process can still fill without swapping: the least of what the system has
    at hand, its control group allows, and its own limit; None where nothing says so (off Linux)."""
    found = []
    meminfo = _numbers(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB")
    found += [1024 * kilobytes for kilobytes in meminfo]
    group = Path("/sys/fs/cgroup")
    most, used = (_numbers(group / f"memory.{name}", r"^(\d+)$") for name in ("max", "current"))
    cached = _numbers(group / "memory.stat", r"(?m)^inactive_file (\d+)$") or [0]
    if most and used:
        found.append(most[0] - used[0] + cached[0])
    held = _numbers(Path("/proc/self/status"), r"VmSize:\s+(\d+) kB")
    limit = _numbers(Path("/proc/self/limits"), r"Max address space\s+(\d+)")
    if held and limit:
        found.append(limit[0] - 1024 * held[0])
    return max(min(found), 0) if found else None


def _numbers(path: Path, pattern: str) -> list[int]:
    """The number in a file of the system; none where there is no such file or it says "max"."""
    try:
        found = re.search(pattern, path.read_text())
    except OSError:
        return []
    return [int(found[1])] if found else []


def process_memory(command: Sequence[str]) -> ProcessMemory:
    """Run a command in a process of its own, and watch its memory every 2 ms (on Linux).

    CouldNotRun if the command fails, or on another system.
    """
    if not Path("/proc/self/status").exists():
        raise CouldNotRun("a process's memory can only be watched on Linux (/proc/self/status)")
    peak, start = 0, time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024) if found else peak
        time.sleep(0.002)
    _, errors = process.communicate()
    if process.returncode:
        raise CouldNotRun(
            f"the process ended with exit code {process.returncode}: {errors.strip()[-500:]}"
        )
    return ProcessMemory(peak, time.perf_counter() - start)
