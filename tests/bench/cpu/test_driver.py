"""Workers that die, hang or refuse; all are ended."""

from __future__ import annotations

import os
import sys

import pytest

from refimpl.bench.cpu import driver
from refimpl.bench.cpu.driver import Ended, Process, Refused, Team

READY = "import sys, time; print('{}', flush=True); "


def process(code: str) -> Process:
    return Process("x", [0], [sys.executable, "-c", READY + code])


def test_answers_come_line_by_line() -> None:
    code = "[print('{\"n\": 1}\\n{\"n\": ', 2, '}', sep='', flush=True) for _ in sys.stdin]"
    worker = process(code)
    try:
        assert worker.ask("one") == {"n": 1}
        assert worker.answer(10) == {"n": 2}
    finally:
        worker.end()
    assert worker.process.poll() is not None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process")
def test_workers_are_bound() -> None:
    """From their first line on, to the cores that were asked for; the caller is not."""
    before = os.sched_getaffinity(0)
    for core in sorted(before):
        code = "import os; print('{}', flush=True); print([*os.sched_getaffinity(0)], flush=True)"
        worker = Process("x", [core], [sys.executable, "-c", code])
        assert worker.process.stdout is not None
        assert (worker.rest or worker.process.stdout.readline()) == b"[%d]\n" % core
        worker.end()
    assert os.sched_getaffinity(0) == before


def test_a_refusal_is_no_end() -> None:
    worker = process('[print(\'{"failed": "too large"}\', flush=True) for _ in sys.stdin]')
    for _ in range(2):
        with pytest.raises(Refused, match=r"^too large$"):
            worker.ask("one")
    worker.end()


def test_a_worker_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are said, now and later; the others still answer, and all are ended."""
    codes = {
        "dies": "sys.stdin.readline(); sys.exit('no more memory')",
        "lives": "[print('{}', flush=True) for _ in sys.stdin]",
    }
    monkeypatch.setattr(driver, "Process", lambda column, cores: process(codes[column]))
    with Team([0]) as team:
        for _ in range(2):
            with pytest.raises(Ended, match=r"^its process ended with 1: no more memory$"):
                team.ask("dies", "one")
        assert team.ask("lives", "one") == {}
        (alive,) = team.processes.values()
        assert team.pids() == [alive.process.pid]
    assert alive.process.poll() is not None


def test_a_worker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = process("time.sleep(100)")
    monkeypatch.setattr(driver, "LIMIT", 0.2)
    with pytest.raises(Ended, match=r"^no answer in 0 s$"):
        worker.ask("one")
    assert worker.process.poll() is not None


def test_a_worker_that_can_not_start() -> None:
    """As where a library's import fails: one line."""
    with pytest.raises(Refused, match="ImportError: no"):
        Process("x", [0], [sys.executable, "-c", 'print(\'{"failed": "ImportError: no"}\')'])
    with pytest.raises(Ended, match="ended with 1: ModuleNotFoundError"):
        Process("x", [0], [sys.executable, "-c", "import a_package_that_is_not"])
