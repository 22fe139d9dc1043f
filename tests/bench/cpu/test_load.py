"""Who else works, by a pretended /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refimpl.bench.cpu import load
from refimpl.bench.cpu.load import Load

TICK = os.sysconf("SC_CLK_TCK")


def pretend(proc: Path, busy: float, own: float) -> None:
    """Core 1 has worked so many seconds, of which our two processes had so many."""
    worked = int(busy * TICK)
    cores = f"cpu0 {10**6} 0 0 0 0 0 0 0 0 0\ncpu1 {worked - 7} 1 1 99 9 2 2 1 5 5\n"
    (proc / "stat").write_text(f"cpu  1 2 3 4 5 6 7 8 9 10\n{cores}intr 1 2\n")
    for pid, part in ((os.getpid(), 0.25), (7, 0.75)):
        (proc / str(pid)).mkdir(exist_ok=True)
        half = int(own * part * TICK) // 2
        (proc / str(pid) / "stat").write_text(
            f"{pid} (a) b) S 1 1 1 0 0 0 0 0 0 0 {half} {half} 0 0"
        )


def test_others_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(load, "PROC", tmp_path)
    monkeypatch.setattr(load.time, "monotonic", lambda: now[0])
    pretend(tmp_path, 50, 40)
    found = Load([1], lambda: [7])
    now[0] = 110.0
    pretend(tmp_path, 57, 44)
    assert found.share() == pytest.approx(0.3)  # 7 s of 10, of which 4 were ours


def test_nothing_is_known_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PROC", tmp_path)
    assert Load([0], list).share() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="of Linux's /proc")
def test_proc_is_read() -> None:
    assert Load([min(os.sched_getaffinity(0))], lambda: [os.getppid()]).share() is not None
