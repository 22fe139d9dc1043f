"""Peak memory of the ops that are written to save it, and of a model that recomputes its blocks,
measured with tracemalloc above their inputs; and of a process, as the system counts it."""

from __future__ import annotations

import gc
import re
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .config import ModelConfig
from .errors import CouldNotRun
from .model import backward, forward
from .ops import (
    flash_attention_backward,
    flash_attention_forward,
    head_cross_entropy_backward,
    head_cross_entropy_forward,
)
from .parameters import init_parameters

__all__ = [
    "AttentionMemory",
    "HeadMemory",
    "ModelMemory",
    "ProcessMemory",
    "attention_memory",
    "available_memory",
    "head_memory",
    "model_memory",
    "process_memory",
]


class AttentionMemory(NamedTuple):
    """Peak memory of flash attention, forward and backward, at one length."""

    length: int  # T
    peak: int  # bytes above q, k, v, do
    probabilities: int  # bytes of the [H, T, T] probabilities that are never made


class HeadMemory(NamedTuple):
    """Peak memory of output head and cross-entropy in one, at one length."""

    length: int  # T
    peak: int  # bytes above h, w and beyond the returned dh, dw
    logits: int  # bytes of the [T, W] logits that are never made


class ModelMemory(NamedTuple):
    """Peak memory and time of a model, with and without ``recompute``."""

    layers: int
    recompute: bool  # each block's forward in the backward
    peak: int  # bytes above the parameters and beyond the returned gradients
    inputs: int  # bytes of the blocks' inputs [B, T, D]
    seconds: float  # of the fastest round


class ProcessMemory(NamedTuple):
    """Peak memory of a process."""

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
    """The peak memory of flash attention, forward and backward, at each of the ``lengths``: causal,
    batch 1, float32; ``width`` of queries and keys, ``value`` of values, blocks of ``block``."""
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
    """The peak memory of output head and cross-entropy in one, forward and backward, float32, at
    each of the ``lengths``: ``width`` of the hidden states, ``vocabulary`` of logits."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(vocabulary, width)) / width**0.5).astype(np.float32)
    for t in lengths:
        h, targets = rng.normal(size=(t, width)).astype(np.float32), rng.integers(0, vocabulary, t)

        def work(h: np.ndarray = h, targets: np.ndarray = targets) -> object:
            loss, saved = head_cross_entropy_forward(h, w, targets=targets)
            return head_cross_entropy_backward(np.ones_like(loss), saved)

        yield HeadMemory(t, _peak(work) - h.nbytes - w.nbytes, t * vocabulary * 4)


def model_memory(layers: Sequence[int] = (2, 4, 8), *, rounds: int = 9) -> Iterator[ModelMemory]:
    """Peak memory and time, the best of ``rounds``, of a model's forward and backward at each
    number of ``layers``: 16 experts, 2 sequences of 256 tokens, width 128, float32; with everything
    saved, and with each block's forward made again in the backward."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, 256))
    for count in layers:
        config = ModelConfig(
            vocabulary=256,
            width=128,
            layers=count,
            dense_layers=1,
            heads=4,
            q_latent=64,
            kv_latent=32,
            nope=32,
            rope=16,
            value=32,
            dense_hidden=352,
            expert_hidden=64,
            experts=16,
            shared_experts=1,
            top_k=4,
            balance_weight=1e-4,
        )
        params = {n: p.astype(np.float32) for n, p in init_parameters(config, std=0.02).items()}
        inputs = count * tokens.size * config.width * 4
        kept, again = (partial(_gradients, params, tokens, config, flag) for flag in (False, True))
        gradients = sum(g.nbytes for g in kept().values())
        seconds = [(_seconds(kept), _seconds(again)) for _ in range(rounds)]  # in turns
        for recompute, work in ((False, kept), (True, again)):
            fastest = min(pair[recompute] for pair in seconds)
            yield ModelMemory(count, recompute, _peak(work) - gradients, inputs, fastest)


def _gradients(
    params: dict[str, np.ndarray], tokens: np.ndarray, config: ModelConfig, recompute: bool
) -> dict[str, np.ndarray]:
    _, saved = forward(params, tokens, config, recompute=recompute)
    return backward(saved)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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
