"""All that a GPU can prove of the kernels, from a plain checkout: ``python tests/gpu.py``, or ``make gpu``.

The tests of the kernels on the device, every gradient of ops and model with and without kernels, and compute-sanitizer
where there is one. Without a GPU it says so and exits 0; 1 if something does not hold, CuPy's absence too.
With --only-look nothing is run, and 3 stands for no GPU. Nothing needs to be installed but NumPy, CuPy, cuda-bindings,
ml_dtypes, safetensors, typer, rich, pytest and hypothesis.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("-m", "pytest", "-q", "-p", "no:benchmark")
SUITE = (*PYTEST, "tests/test_kernels.py", "tests/test_bench.py")
# One run of each kernel in two types; compiling, planting and the rest show nothing there
SANITIZED = (*PYTEST, "tests/test_kernels.py", "-k", "same_bits or permute or in_place or adamw")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
REFUSED = "Device not supported"  # what compute-sanitizer says on machines that hide the GPU from debuggers

Command = tuple[str, Sequence[str], dict[str, str]]  # what it shows, the command, what it adds to the environment


def gpus() -> list[str]:
    """As nvidia-smi lists them; none if there is no such command, or it finds none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU")] if done.returncode == 0 else []


def commands(python: str, sanitizer: str | None, columns: Sequence[str]) -> list[Command]:
    """What is run, in order; columns: the implementations that have kernels."""
    device = {"REFIMPL_GPU": "1"}
    verify = (python, "-m", "refimpl", "verify", "--backend", "cupy")
    found: list[Command] = [
        ("the kernels' tests on the device", (python, *SUITE), device),
        ("every gradient, ops and model, by CuPy alone", verify, {}),
    ]
    found += [
        (f"every gradient, ops and model, by {name}", (*verify, "--implementation", name), {}) for name in columns
    ]
    for tool in TOOLS if sanitizer else ():
        check = (sanitizer or "", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9")
        found.append((f"compute-sanitizer {tool}", (*check, python, *SANITIZED), device | {"REFIMPL_SANITIZER": "1"}))
    return found


def execute(command: Command) -> str:
    """Run it, show its output; ``holds``, ``DOES NOT HOLD``, or why it could not run."""
    what, arguments, environment = command
    print(f"== {what}: {' '.join(f'{k}={v}' for k, v in environment.items())} {' '.join(arguments)}", flush=True)
    added = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    refused = False
    with subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | added, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            refused |= REFUSED in line
    if process.returncode == 0:
        return "holds"
    return f"could not run: {REFUSED}" if refused and "sanitizer" in what else "DOES NOT HOLD"


def main(arguments: Sequence[str]) -> int:
    """The exit code; a summary last."""
    found = gpus()
    if not found:
        print("no GPU: nvidia-smi lists none; nothing was run")
        return 3 if "--only-look" in arguments else 0
    if "--only-look" in arguments:
        return 0
    print("\n".join(found))
    sys.path.insert(0, str(ROOT))
    from refimpl.kernels.table import COLUMNS

    sanitizer, verdicts = shutil.which("compute-sanitizer"), []
    for command in commands(sys.executable, sanitizer, tuple(COLUMNS)):
        start = time.perf_counter()
        verdicts.append((command[0], execute(command), time.perf_counter() - start))
    for what, verdict, seconds in verdicts:
        print(f"{verdict}: {what} ({seconds:.0f} s)")
    if sanitizer is None:
        print("not run: compute-sanitizer is not there")
    return int(any(verdict == "DOES NOT HOLD" for _, verdict, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
