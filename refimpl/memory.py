"""Peak memory of what has memory as its point: two ops, measured with tracemalloc above their
inputs, and ``refimpl grads``, by what the operating system says of its process."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
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
    "GradsMemory",
    "HeadMemory",
    "attention_memory",
    "grads_memory",
    "head_memory",
]


class AttentionMemory(NamedTuple):
    length: int  # T
    peak: int  # bytes above q, k, v, do
    probabilities: int  # bytes of the [H, T, T] probabilities that are never made


class HeadMemory(NamedTuple):
    length: int  # T
    peak: int  # bytes above h, w and beyond the returned dh, dw
    logits: int  # bytes of the [T, W] logits that are never made


class GradsMemory(NamedTuple):
    peak: int  # bytes that no file backs (RssAnon), the interpreter's included
    seconds: float
    numbers: int  # of all gradients


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


def grads_memory(checkpoint: Path, out: Path, *options: str, tokens: int = 256) -> GradsMemory:
    """Run ``refimpl grads`` on so many random tokens in a process of its own, and watch it every 2
    ms (on Linux)."""
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    ids, report = out.with_name(f"{out.name}-tokens.json"), out.with_name(f"{out.name}-report.json")
    ids.write_text(
        json.dumps(np.random.default_rng(0).integers(0, vocabulary, (1, tokens)).tolist())
    )
    command = [
        sys.executable,
        "-m",
        "refimpl",
        "grads",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(out),
    ]
    command += ["--tokens", str(ids), "--json", str(report), *options]
    if not Path("/proc/self/status").exists():
        raise CouldNotRun(
            "the memory of a process can be watched on Linux alone (/proc/self/status)"
        )
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
            f"grads ended with exit code {process.returncode}: {errors.strip()[-500:]}"
        )
    numbers = sum(size["elements"] for size in json.loads(report.read_text())["gradients"].values())
    return GradsMemory(peak, time.perf_counter() - start, numbers)
