"""Jobs that need one another's results, each a chain of commands in processes of their own.

The files that the commands write say what is done, so a graph that was interrupted, or killed,
resumes. A job's next command is asked for when the one before has ended. A job's log is locked by
the process that writes it; if a process outlives its graph, the next graph waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CouldNotRun
from ..files import LOCKS, read_json, write_json

__all__ = ["Seconds", "last_line", "log_of", "run_graph"]

POLL = 0.05  # seconds
SAVE = 5.0  # seconds between two records of the time
TAIL = 4096  # bytes of a log that its last line is looked for in
STOP = signal.SIGINT if os.name == "posix" else signal.SIGTERM
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Next = Callable[[str], Sequence[str] | None]  # a job's next command, None when it is done


def run_graph(
    needs: Mapping[str, Collection[str]],
    next_command: Next,
    out: Path,
    *,
    workers: int,
    begins: Callable[[str], None] = lambda name: None,
    tell: Callable[[str], None] = lambda line: None,
    show: Callable[[list[str]], None] = lambda lines: None,
) -> None:
    """Run all jobs, each as soon as those that it needs are done, ``workers`` at a time.

    Args:
        needs: of each job, those whose results it reads, all of them keys; the order decides which
            of several begins first.
        out: the folder of the logs, OUT/<job>.log, and of seconds.json.
        begins: called with a job's name before its first process.
        tell: called with a line when a job begins or ends. show: with the state of all, often.

    CouldNotRun names the job that failed, its last line and its log. Then, and at Ctrl-C, the other
    processes are interrupted once, so that they save, and waited for; at a second Ctrl-C, killed.
    """
    done = {name for name in needs if next_command(name) is None}
    waiting = [name for name in needs if name not in done]
    if not waiting:
        return
    running: dict[str, Running] = {}
    with Seconds(out / "seconds.json") as seconds:
        try:
            while waiting or running:
                for name in [name for name in waiting if set(needs[name]) <= done]:
                    if len(running) < workers:
                        waiting.remove(name)
                        begins(name)
                        running[name] = Running(name, next_command, out, seconds, tell)
                        tell(f"{name}: begins")
                for name in [name for name, job in running.items() if job.over()]:
                    del running[name]
                    done.add(name)
                    tell(f"{name}: done in {seconds.jobs.get(name, 0.0):.0f} s")
                show(lines_of(running, len(done), len(needs), seconds))
                seconds.save(SAVE)
                time.sleep(POLL)
        finally:
            stop(list(running.values()))


class Running:
    """A job that has begun: the process of one of its commands at a time."""

    def __init__(
        self,
        name: str,
        next_command: Next,
        out: Path,
        seconds: Seconds,
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self.next_command = next_command
        self.log = log_of(out, name)
        self.seconds = seconds
        self.tell = tell
        self.process: subprocess.Popen[bytes] | None = None
        self.command: Sequence[str] | None = None
        self.begin = self.spent = time.monotonic()
        self.waits = False

    def over(self) -> bool:
        """Whether all commands are done; begins the next one. CouldNotRun if one failed."""
        self.spend()
        if self.process is not None:
            if (code := self.process.poll()) is None:
                return False
            self.process = None
            if code:
                raise CouldNotRun(
                    f"{self.name} failed with exit code {code}: {last_line(self.log)} (all of it: "
                    f"{self.log}); run the same command again to resume"
                )
        with self.log.open("ab") as log:
            if not locked(log):
                if not self.waits:
                    self.tell(f"{self.name}: waits for a process that still runs it")
                self.waits = True
                return False
            command = self.next_command(self.name)
            if command is not None and command == self.command:
                raise CouldNotRun(f"{self.name} ended without its result; see {self.log}")
            self.command = command
            if command is not None:
                # in a session of its own, so that a terminal's Ctrl-C reaches it through us alone
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | ONE_THREAD,
                    start_new_session=True,
                )
        return command is None

    def spend(self) -> None:
        """Count the time since the last call as the job's."""
        now = time.monotonic()
        self.seconds.add(self.name, now - self.spent)
        self.spent = now


def stop(jobs: Sequence[Running]) -> None:
    """Interrupt the processes and wait for them; at Ctrl-C kill them."""
    processes = [(job, job.process) for job in jobs if job.process is not None]
    for _, process in processes:
        process.send_signal(STOP)
    try:
        for _, process in processes:
            process.wait()
    except KeyboardInterrupt:
        for _, process in processes:
            process.kill()
            process.wait()
        raise
    finally:
        for job in jobs:
            job.spend()


class Seconds:
    """The time that each job took and all together, kept in a file over resumptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found: Any = read_json(path) if path.exists() else {"jobs": {}, "total": 0.0}
        try:
            self.jobs = {str(name): float(x) for name, x in found["jobs"].items()}
            self.before = float(found["total"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CouldNotRun(f"{path} must hold the seconds of jobs, and their total") from error
        self.begin = self.saved = time.monotonic()

    def __enter__(self) -> Seconds:
        self.begin = self.saved = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.save()

    @property
    def total(self) -> float:
        """Of the graph, whatever ran beside whatever."""
        return self.before + time.monotonic() - self.begin

    def add(self, name: str, seconds: float) -> None:
        self.jobs[name] = self.jobs.get(name, 0.0) + seconds

    def save(self, every: float = 0.0) -> None:
        """Write the file, if that was ``every`` seconds ago."""
        if (now := time.monotonic()) - self.saved >= every:
            self.saved = now
            write_json(self.path, {"jobs": self.jobs, "total": self.total})


def lines_of(running: Mapping[str, Running], done: int, every: int, seconds: Seconds) -> list[str]:
    """How far it is: a line in all, and one per running job with the last line of its log."""
    now = time.monotonic()
    return [f"{done} of {every} jobs done, {clock(seconds.total)}"] + [
        f"{name} {clock(now - job.begin) if job.process else 'waits'}: {last_line(job.log)}"
        for name, job in running.items()
    ]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def log_of(out: Path, name: str) -> Path:
    """The file with what a job printed."""
    return out / f"{name}.log"


def last_line(log: Path) -> str:
    """The last line of a log."""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "nothing printed yet"


def locked(file: BinaryIO) -> bool:
    """Lock an open file for as long as it, or a process that inherits it, is open; False if another
    process has locked it. Without flock (on Windows) nothing is locked."""
    if not LOCKS:
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
