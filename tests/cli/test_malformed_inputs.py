"""Malformed inputs of every command, drawn: one line on standard error, exit code 2, and nothing
written but into --out, within bounds on time and memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.malformed import COMMANDS, draw, listing, sound_inputs
from support import FULL, ROOT, refimpl_here

CASES = 40  # per command
MOST_SECONDS = 30
MOST_BYTES = 10**9


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    sound_inputs(folder)
    return folder


@pytest.fixture
def memory_limit() -> Iterator[None]:
    """A gigabyte beyond what the process has; what is mapped from files does not count."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def expect_refused(what: object, code: int, errors: str) -> None:
    assert (code, errors.count("\n")) == (2, 1), f"{what}: {code} {errors}"
    assert errors.startswith("refimpl: "), what
    assert errors[:-1].isprintable(), what
    assert len(errors) < 3000, what


def test_there_are_enough() -> None:
    assert CASES * len(COMMANDS) >= 300


@pytest.mark.parametrize("command", COMMANDS)
def test_the_inputs_are_sound(command: str, sound: Path, tmp_path: Path) -> None:
    """Without damage the commands run: it is the damage that is refused."""
    shutil.copytree(sound, tmp_path / "case")
    for number, (arguments, _) in enumerate(COMMANDS[command]):
        given = arguments.replace("--out out", f"--out out{number}").split()
        done = refimpl_here(*given, cwd=tmp_path / "case")
        wanted = 2 if command == "memory" else 0  # it is asked for more layers than there are
        assert done.returncode == wanted, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits and devices are those of Linux")
@pytest.mark.parametrize("command", COMMANDS)
def test_malformed(command: str, sound: Path, tmp_path: Path, memory_limit: None) -> None:
    for seed in range(CASES):
        folder = tmp_path / str(seed)
        case = draw(random.Random(f"{command} {seed}"), command, sound, folder)
        before, start = listing(folder), time.perf_counter()
        done = refimpl_here(*case.arguments, cwd=folder)
        assert time.perf_counter() - start < MOST_SECONDS
        expect_refused((seed, case), done.returncode, done.stderr)
        assert listing(folder) == before, case
        shutil.rmtree(folder)


@pytest.mark.skipif(not FULL, reason="a process per case")
@pytest.mark.parametrize("command", COMMANDS)
def test_malformed_in_processes(command: str, sound: Path, tmp_path: Path) -> None:
    """The same as processes, and others, with bounds on each one's time and memory."""
    cases = []
    for seed in range(2 * CASES):
        folder = tmp_path / str(seed)
        case = draw(random.Random(f"{command} {seed}"), command, sound, folder)
        cases.append((folder, case, listing(folder)))
    (tmp_path / "told").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "cli.malformed", str(tmp_path / "told")],
        input="".join(
            json.dumps([str(folder), case.arguments]) + "\n" for folder, case, _ in cases
        ),
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr
    for (folder, case, before), line in zip(cases, lines, strict=True):
        code, errors, seconds, peak = json.loads(line)
        expect_refused(case, code, errors)
        assert seconds < MOST_SECONDS, case
        assert peak < MOST_BYTES, case
        assert listing(folder) == before, case
