"""All that a GPU can prove of the kernels, from a plain checkout: ``python tests/gpu.py``, or
``make gpu``.

Stages, each with a time limit: the kernels' tests on the device, V3's shapes, every gradient of ops
and model with and without kernels, compute-sanitizer where there is one, and the benchmark. What a
stage prints goes to ``<out>/<stage>.log`` as it comes, the verdicts so far to ``<out>/summary``; a
stage that fails, or is stopped, stops no other. Arguments: names of stages (all by default), --out
FOLDER (build/gpu), --minutes M in all (25), --commit C for the benchmark.

Without a GPU it says so and exits 0; 1 if something does not hold or was stopped, CuPy's absence
too. With --only-look nothing is run, and 3 stands for no GPU. Nothing needs to be installed but
NumPy, CuPy, cuda-bindings, numba-cuda, ml_dtypes, safetensors, typer, rich, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Warnings of versions that we don't pin are no failures; each test's name, so that a log shows
# where it stopped
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-p", "no:benchmark", "-W", "default")
PROCESSES = 8  # of the tests, where pytest-xdist is there: most of their time is the CPU's
# One run of each kernel in two types; compiling, planting and the rest show nothing there
SANITIZED = ("tests/kernels", "-k", "same_bits or permute or in_place or adamw")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# what compute-sanitizer says on machines that hide the GPU from debuggers
REFUSED = "Device not supported"
MINUTES = 25.0
BAD = ("DOES NOT HOLD", "STOPPED", "NOT RUN")


class Stage(NamedTuple):
    name: str  # of its log
    shows: str
    command: tuple[str, ...]
    environment: dict[str, str]  # what is added to ours
    limit: int  # seconds


def gpus() -> list[str]:
    """As nvidia-smi lists them; none if there is no such command, or it finds none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return (
        [line for line in done.stdout.splitlines() if line.startswith("GPU")]
        if done.returncode == 0
        else []
    )


def stages(
    python: str, sanitizer: str | None, out: Path, commit: str | None = None, *, xdist: bool = False
) -> list[Stage]:
    """What is run, in order."""
    sys.path.insert(0, str(ROOT))
    from refimpl.verify import (
        CASES,
        KERNELS,
        MODELS,
    )  # here, since to look for a GPU takes no NumPy

    # CuPy's plain reductions: those made of CUB take seconds each to compile, and there are dozens
    quick, pytest = {"CUPY_ACCELERATORS": ""}, (python, *PYTEST)
    device = quick | {"REFIMPL_GPU": "1"}
    several = ("-n", str(PROCESSES)) if xdist else ()
    verify, names = (
        (python, "-m", "refimpl", "verify", "--backend", "cupy"),
        {"ops": CASES, "models": MODELS},
    )
    bench = (
        python,
        "-m",
        "refimpl",
        "bench",
        "--gpu",
        "--results",
        str(out),
        *(("--commit", commit) if commit else ()),
    )
    found = [
        Stage(
            "tests",
            "the kernels' tests on the device",
            (*pytest, *several, "tests/kernels"),
            device,
            480,
        ),
        Stage("shapes", "V3's shapes, and torch's side", (*pytest, "tests/bench"), device, 240),
        Stage("bench", "the benchmark", bench, {}, 540),
    ]
    for what, of in names.items():
        for column in ("cupy", *KERNELS):
            command = (*verify, *(("--implementation", column) if column in KERNELS else ()), *of)
            found.append(
                Stage(
                    f"{column}-{what}",
                    f"every gradient of the {what} by {column}",
                    command,
                    quick,
                    300,
                )
            )
    for tool in TOOLS if sanitizer else ():
        check = (
            sanitizer or "",
            "--tool",
            tool,
            "--target-processes",
            "all",
            "--error-exitcode",
            "9",
        )
        added = device | {"REFIMPL_SANITIZER": "1"}
        found.append(
            Stage(tool, f"compute-sanitizer {tool}", (*check, *pytest, *SANITIZED), added, 240)
        )
    return found


def execute(stage: Stage, log: Path, seconds: float) -> str:
    """Run it for so long at most, show and keep its output; ``holds``, one of `BAD`, or why it
    could not run."""
    told = " ".join([*(f"{k}={v}" for k, v in stage.environment.items()), *stage.command])
    print(f"== {stage.shows}, at most {seconds:.0f} s: {told}", flush=True)
    added = {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    } | stage.environment
    refused, stopped = False, threading.Event()
    with (
        log.open("w") as kept,
        subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=os.environ | added,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        ) as process,
    ):

        def stop() -> None:
            stopped.set()
            with suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGKILL
                )  # a group of its own: pytest's workers and torch's compilers too

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                print(line, end="", file=kept, flush=True)
                refused |= REFUSED in line
            process.wait()
        except BaseException:
            stop()
            raise
        finally:
            timer.cancel()
    if stopped.is_set():
        return "STOPPED"
    if process.returncode == 0:
        return "holds"
    return (
        f"could not run: {REFUSED}" if refused and "sanitizer" in stage.shows else "DOES NOT HOLD"
    )


def main(arguments: Sequence[str]) -> int:
    """The exit code; a summary last."""
    parser = argparse.ArgumentParser(description="All that a GPU can prove of the kernels.")
    parser.add_argument("stages", nargs="*", help="default: all")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs and results"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all")
    parser.add_argument("--commit", help="of this checkout, where git can't say")
    parser.add_argument("--only-look", action="store_true")
    chosen = parser.parse_args(arguments)
    found = gpus()
    if not found:
        print("no GPU: nvidia-smi lists none; nothing was run")
        return 3 if chosen.only_look else 0
    if chosen.only_look:
        return 0
    print("\n".join(found))
    out, sanitizer = chosen.out.resolve(), shutil.which("compute-sanitizer")
    xdist = importlib.util.find_spec("xdist") is not None
    todo = stages(sys.executable, sanitizer, out, chosen.commit, xdist=xdist)
    if unknown := set(chosen.stages) - {stage.name for stage in todo}:
        parser.error(
            f"no stage {', '.join(sorted(unknown))}; there are "
            f"{', '.join(stage.name for stage in todo)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    end, verdicts = time.monotonic() + 60 * chosen.minutes, list[tuple[str, str]]()
    for stage in todo:
        if chosen.stages and stage.name not in chosen.stages:
            continue
        start = time.monotonic()
        seconds = min(stage.limit, end - start)
        verdict = execute(stage, out / f"{stage.name}.log", seconds) if seconds > 10 else "NOT RUN"
        verdicts.append(
            (
                verdict,
                f"{verdict}: {stage.name}, {stage.shows} ({time.monotonic() - start:.0f} s)\n",
            )
        )
        (out / "summary").write_text("".join(line for _, line in verdicts))
    print("".join(line for _, line in verdicts), end="")
    if sanitizer is None:
        print("not run: compute-sanitizer is not there")
    print(f"logs: {out}")
    return int(any(verdict in BAD for verdict, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
