"""Memory, measured: flash attention is linear in the sequence, the fused head never holds all
logits, and the streamed gradients do not grow with the layers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refimpl.cli.memory import check_memory, grads_memory
from refimpl.config import preset
from refimpl.memory import attention_memory, available_memory, head_memory, model_memory
from refimpl.ops import (
    attention_forward,
    cross_entropy_forward,
    flash_attention_forward,
    head_cross_entropy_forward,
)

from support import FULL


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what system, control group and the process's own limit leave; None where nothing
    says so."""
    status = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7000 kB\n",
        "/proc/self/status": "VmSize:\t 1000 kB\n",
        "/proc/self/limits": "Max address space         unlimited            unlimited  bytes\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 200000\n",
    }

    def read(path: Path) -> str:
        if str(path) not in status:
            raise FileNotFoundError(path)
        return status[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory() == 7_168_000
    status["/sys/fs/cgroup/memory.max"] = "6000000\n"
    assert available_memory() == 5_200_000
    status["/proc/self/limits"] = "Max address space         4024000              5000000  bytes\n"
    assert available_memory() == 3_000_000
    status["/proc/self/limits"] = "Max address space         1                    1        bytes\n"
    assert available_memory() == 0
    status.clear()
    assert available_memory() is None


def test_flash_attention_is_linear() -> None:
    """From T = 1024 to 4096 at most 4.6 times the memory, and at 4096 at most 1/8 of the
    probabilities' bytes."""
    small, _, large = attention_memory()
    assert large.length == 4 * small.length == 4096
    assert large.peak <= 4.6 * small.peak
    assert large.peak <= large.probabilities / 8


def test_fused_head_never_holds_the_logits() -> None:
    """At vocabulary 129,280 at most 10 % of the logits' bytes beyond inputs and gradients, whatever
    the length."""
    lengths = (1024, 8192) if FULL else (1024, 2048)
    small, large = head_memory(lengths)
    assert small.peak <= 0.1 * small.logits
    assert large.peak <= 1.05 * small.peak


def test_recomputed_blocks_keep_their_inputs_alone() -> None:
    """Each further layer takes at most twice its input, the routes included; with everything saved
    more than 30 times as much, so that the bound can fail."""
    few, few_again, many, many_again = model_memory((2, 4), rounds=1)
    inputs = many.inputs - few.inputs
    assert inputs == 2 * 512 * 128 * 4
    assert inputs <= many_again.peak - few_again.peak <= 2 * inputs
    assert many.peak - few.peak > 30 * inputs


def test_the_measure_sees_a_quadratic_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measure on the quadratic attention breaks both bounds: the test above can fail."""
    from refimpl.ops import attention_backward

    def quadratic(*args: np.ndarray, block: int, **kwargs: float) -> object:
        return attention_forward(*args, **kwargs)

    monkeypatch.setattr("refimpl.memory.flash_attention_forward", quadratic)
    monkeypatch.setattr("refimpl.memory.flash_attention_backward", attention_backward)
    small, large = attention_memory((256, 1024))
    assert large.peak > 8 * small.peak
    assert large.peak > large.probabilities


def test_the_measure_sees_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(h: np.ndarray, w: np.ndarray, *, targets: np.ndarray) -> object:
        return cross_entropy_forward(h @ w.T, targets=targets)

    monkeypatch.setattr("refimpl.memory.head_cross_entropy_forward", whole)
    monkeypatch.setattr("refimpl.memory.head_cross_entropy_backward", lambda dloss, saved: saved)
    (only,) = head_memory((256,))
    assert only.peak > only.logits


def test_same_numbers() -> None:
    """What is saved in memory is not paid for in the result."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 300, 2, 8))
    o, _ = attention_forward(q, k, v, scale=0.3)
    np.testing.assert_allclose(
        flash_attention_forward(q, k, v, scale=0.3)[0], o, rtol=0, atol=1e-14
    )
    h = rng.normal(size=(300, 8))
    w = rng.normal(size=(5000, 8))
    targets = rng.integers(0, 5000, 300)
    loss, _ = cross_entropy_forward(h @ w.T, targets=targets)
    assert abs(head_cross_entropy_forward(h, w, targets=targets)[0] - loss) <= 1e-13 * loss


@pytest.mark.skipif(not FULL, reason="16 s: make test-full")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured on Linux")
def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """8 layers need what 2 need, within 10 %, and a small part of what all gradients take."""
    from refimpl.checkpoint import write_random

    config = replace(
        preset("v2-lite"),
        vocabulary=500,
        width=1024,
        layers=8,
        heads=4,
        dense_hidden=2048,
        kv_latent=128,
        experts=8,
        expert_hidden=512,
        top_k=2,
    )
    write_random(config, tmp_path / "checkpoint")
    start = grads_memory(
        tmp_path / "checkpoint", tmp_path / "none", "--layers", "1", "--only", "lm_head.*", tokens=2
    )
    two = grads_memory(tmp_path / "checkpoint", tmp_path / "two", "--layers", "2", tokens=64)
    eight = grads_memory(tmp_path / "checkpoint", tmp_path / "eight", tokens=64)
    assert eight.numbers > 3 * two.numbers
    assert eight.peak <= 1.1 * two.peak
    assert eight.peak - start.peak < eight.numbers * 4 / 4
    checked = check_memory(tmp_path / "eight")
    assert checked.stored > eight.numbers * 4
    assert checked.peak < 0.1 * checked.stored
    assert checked.peak < start.peak + checked.largest
