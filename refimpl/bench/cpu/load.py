"""How much of the cores' time somebody else takes, by Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["BUSY", "Load"]

BUSY = 0.1  # the share from which on a measurement is in doubt
IDLE = 3, 4  # of the fields of a core's line: idle, iowait
PROC = Path("/proc")


class Load:
    """From its making on: the time that the cores worked, less that of the processes ``own``."""

    def __init__(self, cores: Sequence[int], own: Callable[[], Sequence[int]]) -> None:
        self.cores = cores
        self.own = own
        self.start = self._now()

    def share(self) -> float | None:
        """Of the cores' time since then that others took; None where there is no /proc. Linux
        counts in hundredths of a second, so of a short time it may be off by a few of them, and
        below 0."""
        now = self._now()
        if now is None or self.start is None:
            return None
        (busy, whole), (busy_then, whole_then) = now, self.start
        return (busy - busy_then) / max(whole - whole_then, 1e-9)

    def _now(self) -> tuple[float, float] | None:
        """Seconds so far that others worked, and all seconds, of these cores."""
        try:
            lines = (PROC / "stat").read_text().splitlines()
            ours = sum(map(_seconds_of, [os.getpid(), *self.own()]))
        except OSError:
            return None
        ticks = {
            line.split()[0]: [int(x) for x in line.split()[1:9]]
            for line in lines
            if line[:3] == "cpu"
        }
        worked = sum(
            sum(ticks[f"cpu{core}"]) - sum(ticks[f"cpu{core}"][i] for i in IDLE)
            for core in self.cores
        )
        return worked / os.sysconf("SC_CLK_TCK") - ours, time.monotonic() * len(self.cores)


def _seconds_of(pid: int) -> float:
    """CPU time of a process, its threads included."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
