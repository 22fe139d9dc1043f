"""Kill one of several ranks with SIGKILL at random moments of a training, go on with another number
of ranks, and compare the end with that of one process that was never killed.

    python tests/parallel/kill_ranks.py --kills 10

Every other rank must end within ten seconds, and no state that was saved may be lost.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from train.kill import MODEL, write_text

SETTINGS = (
    *(MODEL, "tokens=2048", "batch=8", "length=16", "warmup_steps=2"),
    *("evaluate_every=1000", "save_every=2", "rows=3"),
)
GRIDS = ((), ("--ranks", "2"), ("--ranks", "2", "--expert-parallel", "2"))
WITHIN = 10.0  # seconds in which all ranks must end
TOLERANCE = 1e-9  # of parameters, of the largest value; seen: 1e-12


def command(folder: Path, run: str, grid: tuple[str, ...]) -> list[str]:
    line = ["-m", "refimpl", "train", "--out", str(folder / run), "--text"]
    line += [str(folder / "text.txt"), "--implementation", "reference", "--dtype", "float64"]
    line += [x for setting in SETTINGS for x in ("--set", setting)]
    resume = ["--resume"] if (folder / run / "settings.toml").exists() else []
    return [sys.executable, *line, *grid, *resume]


def running(path: Path) -> list[int]:
    """The processes whose command line names a path."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(path) in words:
            found.append(int(entry.name))
    return found


def last_state(run: Path) -> int:
    """The step of the state that a run would go on from."""
    if (run / "result.json").exists():
        return sys.maxsize
    names = (x.name.removeprefix("state-") for x in run.glob("state-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def killed(folder: Path, grid: tuple[str, ...], draw: random.Random) -> bool:
    """Start or resume the run, and kill one of its ranks; False if it ended before."""
    with subprocess.Popen(
        command(folder, "run", grid), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        ranks = re.findall(r"is process (\d+)", process.stderr.readline())
        time.sleep(draw.uniform(0, 1.2))
        before = last_state(folder / "run")
        if process.poll() is not None:
            return False
        rank = draw.randrange(len(ranks))
        with suppress(ProcessLookupError):
            os.kill(int(ranks[rank]), signal.SIGKILL)
        begin = time.monotonic()
        out, errors = process.communicate(timeout=WITHIN)
        if process.returncode == 0:
            return False  # the rank had ended already
        assert ranks[rank] in out or "another rank seems to have ended" in errors, out + errors
    while running(folder / "run"):
        assert time.monotonic() - begin < WITHIN, running(folder / "run")
        time.sleep(0.02)
    after = last_state(folder / "run")
    assert after >= before, f"state {before} is lost, {after} is there"
    print(
        f"{' '.join(grid)}: rank {rank} killed, all ended in {time.monotonic() - begin:.2f} s, "
        f"state {after}",
        flush=True,
    )
    return True


def finished(folder: Path, run: str, grid: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Run to the end: the parameters."""
    if last_state(folder / run) < sys.maxsize:
        line = command(folder, run, grid)
        done = subprocess.run(line, check=True, capture_output=True, timeout=120)
        assert done.stdout.count(b"the result is ") == 1  # of the first rank alone
    return load_file(folder / run / "checkpoint" / "model.safetensors")


def kill(kills: int, folder: Path) -> None:
    """AssertionError if ranks hang, a state is lost, or the end differs."""
    write_text(folder)
    wanted, draw = finished(folder, "whole", ()), random.Random("ranks")
    done = ended = 0
    while done < kills:
        if killed(folder, draw.choice(GRIDS[1:]), draw):
            done += 1
        else:
            check(finished(folder, "run", ()), wanted)
            ended += 1
            (folder / "run").rename(folder / f"run-{ended}")
    check(finished(folder, "run", GRIDS[kills % 3]), wanted)
    print(f"{kills} kills: nothing lost, the same end", flush=True)


def check(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        off = np.max(np.abs(found[name] - x)) / np.max(np.abs(x) + 1e-300)
        assert off <= TOLERANCE, f"{name}: {off}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    with tempfile.TemporaryDirectory() as place:
        kill(parser.parse_args().kills, Path(place))
