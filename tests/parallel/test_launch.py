"""Several processes under mpiexec: what ends them, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.parallel import launch

from parallel.kill_ranks import kill
from parallel.test_ranks import MPIEXEC, needs_mpi
from support import FULL

RANKS = """
import sys, time
from refimpl.parallel.launch import join
ranks = join(timeout={timeout})
if ranks.rank == 1:
    {fault}
ranks.world.gather(0)
"""


TRAIN = """
import sys
from refimpl import cli

def run_stage(*given, ranks, **how):
    if ranks.rank == 1:
        raise KeyboardInterrupt
    ranks.world.gather(0)

cli.train.run_stage = run_stage
sys.argv = ["refimpl", "train", "--out", "nowhere"]
cli.main()
"""


def launched(fault: str, timeout: float = 60.0) -> tuple[int, str, float]:
    """Exit code, standard error, and seconds of two ranks, of which the second has a fault."""
    return run_ranks(RANKS.format(fault=fault, timeout=timeout))


def run_ranks(code: str) -> tuple[int, str, float]:
    """The same of two ranks that run this code."""
    begin = time.monotonic()
    done = subprocess.run(
        [MPIEXEC, "-n", "2", sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr, time.monotonic() - begin


@needs_mpi
def test_an_error_ends_all() -> None:
    """Under plain MPI the first rank would wait for ever."""
    code, said, _ = launched("raise ValueError('no such thing')")
    assert code == 1
    assert "refimpl: 2 ranks: 0 is process " in said
    assert "refimpl: rank 1 (process " in said
    assert "): ValueError: no such thing" in said


@needs_mpi
def test_a_rank_that_hangs() -> None:
    code, said, seconds = launched("time.sleep(50)", timeout=0.5)
    assert code == 2
    assert "refimpl: rank 0 (process " in said
    assert "has waited 0.5 s to gather; another rank hangs, or needs a longer timeout" in said
    assert seconds < 20


@needs_mpi
def test_a_rank_that_hangs_and_nobody_who_reads() -> None:
    """The line can't be printed, and all end."""
    code = RANKS.format(fault="time.sleep(50)", timeout=0.5).replace(
        "ranks.world", "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 2); ranks.world"
    )
    assert run_ranks(code)[0] == 2


@needs_mpi
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_rank_that_never_joins(interrupted: bool) -> None:
    """It ends before MPI has begun, which mpiexec does not mind, and the other waits inside MPI."""
    timeout = 50 if interrupted else 1
    python = (sys.executable, "-c")
    first = (*python, f"from refimpl.parallel.launch import join; join(timeout={timeout})")
    command = [MPIEXEC, "-n", "1", *first, ":", "-n", "1", *python, "exit(1)"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            if interrupted:
                time.sleep(1)
                process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode
    assert interrupted or "in import_mpi" in said


@needs_mpi
def test_an_interrupt_ends_all() -> None:
    """Ctrl-C reaches one rank while the other waits for it inside MPI, where it hears nothing."""
    code, said, _ = run_ranks(TRAIN)
    assert code == 130
    assert "): interrupted\n" in said
    assert "Traceback" not in said


@needs_mpi
def test_mpiexec_without_mpi4py() -> None:
    """A line, and no traceback."""
    code, said, _ = run_ranks("import sys; sys.modules['mpi4py'] = None" + TRAIN)
    assert code == 2
    assert "refimpl: rank 0 (process " in said
    assert "): several ranks need MPI: pip install -e '.[parallel]' (" in said
    assert "Traceback" not in said


@needs_mpi
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks", "3"], "--ranks must be 2, the number that mpiexec started, got 3"),
        (["--set", "batch=0"], "batch must be at least 1, got 0"),
    ],
)
def test_one_line_for_all(arguments: list[str], line: str, tmp_path: Path) -> None:
    """Where every rank has the same error, the first tells it."""
    command = [sys.executable, "-m", "refimpl", "train", "--out", str(tmp_path / "run"), *arguments]
    done = subprocess.run([MPIEXEC, "-n", "2", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert [x for x in done.stderr.splitlines() if x.startswith("refimpl: rank")] == [
        x for x in done.stderr.splitlines() if line in x
    ]
    assert done.stderr.count(line) == 1
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_the_mpiexec_of_another_mpi() -> None:
    """Each process would take itself for the only one: they would all write to one folder."""
    told = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    code = "from refimpl.parallel.launch import join; join()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | told)
    line = "CouldNotRun: mpiexec started 2 processes, and mpi4py's MPI sees 1: it must be the mpi"
    assert done.returncode
    assert line in done.stderr


@needs_mpi
@pytest.mark.skipif(not FULL, reason="36 s: make test-full")
def test_kills(tmp_path: Path) -> None:
    """SIGKILL of a rank: the others end, nothing is lost, and one process goes on."""
    kill(10, tmp_path)


def test_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(CouldNotRun, match=r"^several ranks need MPI: pip install -e "):
        launch.import_mpi()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CouldNotRun, match=r"^several ranks need MPI: pip install -e "):
        launch.start(2, [])


def test_the_command_line_becomes_mpiexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a share of the processors for each rank, unless the user has said how many."""
    begun: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: begun.append(command))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(launch, "import_mpi_there", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")
    for name in ("OMP", "OPENBLAS", "NUMBA"):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch.start(4, ["train", "--ranks", "4"])
    assert begun[0][1:] == ["-n", "4", "/usr/bin/python", "-m", "refimpl", "train", "--ranks", "4"]
    assert [os.environ[f"{x}_NUM_THREADS"] for x in ("OMP", "OPENBLAS", "NUMBA")] == ["3", "2", "2"]
