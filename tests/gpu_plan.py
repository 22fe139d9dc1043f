"""What `tests/gpu.py` runs, in the order of value, and how long that should take: two lists of
stages, each of them one command, and their time on a device estimated from what they do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from refimpl.kernels.columns import NUMBA_CUDA
from refimpl.verify import CASES, KERNELS

# Warnings of versions that we don't pin are no failures; each test's name, so that a log shows
# where it stopped
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-p", "no:benchmark", "-W", "default")
WORKERS = 8  # of the tests, where pytest-xdist is there: most of their time is the CPU's
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NAMED = ("numba_cuda-ops", "cupy-ops", "numba_cuda-models", "cupy-models", *TOOLS[2:])
# CuPy's plain reductions (those made of CUB take seconds each to compile, and there are dozens),
# and its headers parsed once per process: a quarter of the time of each of its kernels
QUICK = {"CUPY_ACCELERATORS": "", "CUPY_NVRTC_USE_PCH": "1"}
DEVICE = {"REFIMPL_GPU": "1"}


class Counts(NamedTuple):
    """What a stage does, counted on the pretended device (`pretended_device.write_counts`), with
    all types and examples; seconds are by arithmetic and judgement. None was measured on a device.
    """

    processes: int = 1
    cuda: int = 0  # files in CUDA C compiled, one per type
    numba_cuda: int = 0  # kernels in Numba CUDA compiled, one per type
    cupy: int = 0  # CuPy's own kernels compiled: a function with one choice of types
    calls: int = 0  # launches, of CuPy's and of ours
    device: float = 0  # seconds of V3's shapes, by arithmetic at an H100's rates
    host: float = 0  # seconds of NumPy: references and drawn inputs


class Costs(NamedTuple):
    """Seconds of one of each."""

    processes: float = 6.0  # imports of CuPy, Numba and the tests, and the device's context
    cuda: float = 0.3  # 0.1 to 0.28 on a CPU machine with NVRTC 13.0
    numba_cuda: float = 0.5  # 0.1 to 0.9 there
    cupy: float = 0.5  # 0.4 to 0.55 there, with precompiled headers
    calls: float = 50e-6  # Python's and CuPy's part of a launch


class Stage(NamedTuple):
    name: str
    shows: str
    command: tuple[str, ...]
    environment: dict[str, str]  # what is added to ours
    limit: int  # seconds
    counts: Counts = Counts()
    workers: int = 1

    def estimate(self) -> float:
        """Seconds on a device. Workers share what they call and what NumPy does; each starts and
        loads alone, and what is compiled counts as if one waited for another."""
        each = zip(self.counts, Costs(), strict=False)
        processes, cuda, numba_cuda, cupy, calls = (count * cost for count, cost in each)
        shared = (calls + self.counts.host) / self.workers
        return processes + cuda + numba_cuda + cupy + shared + self.counts.device


# Counted in this order, each stage what those before it have not compiled yet; CuPy's compilations
# are twice what was counted, since it tells more apart than types.
SANITIZED = Counts(1, 0, 0, 0, 800, 0, 45)  # every access is watched: NumPy's time stands for that
COUNTS = {
    "probe": Counts(1, 1, 1, 6, 50),
    "shapes": Counts(1, 9, 0, 182, 700, 22),
    "bench": Counts(1, 0, 0, 4, 10_000, 95),
    "tests": Counts(1, 18, 28, 38, 24_000, 0, 60),
    "cuda-ops": Counts(1, 0, 0, 42, 330_000),
    "bfloat16": Counts(1, 4, 0, 30, 7_000, 0, 16),
    "numba_cuda-ops": Counts(1, 0, 0, 28, 330_000),
    "cupy-ops": Counts(1, 0, 0, 10, 292_000),
    "torch": Counts(1, 0, 0, 0, 10_000, 310),  # torch.compile's minutes
    "cuda-models": Counts(1, 0, 0, 0, 1_650_000),
    "numba_cuda-models": Counts(1, 0, 0, 0, 1_650_000),
    "cupy-models": Counts(1, 0, 0, 0, 1_641_000),
} | dict.fromkeys(TOOLS, SANITIZED)


def toolkit(environment: Mapping[str, str], places: Sequence[Path] | None = None) -> str | None:
    """The folder of a CUDA toolkit that has nvvm, where the environment does not say: Numba CUDA's
    compiler may lie there alone, and cuda.pathfinder looks only where it is told."""
    if environment.get("CUDA_PATH") or environment.get("CUDA_HOME"):
        return None
    if places is None:
        nvcc = shutil.which("nvcc", path=environment.get("PATH"))
        places = [Path(nvcc).resolve().parents[1]] if nvcc else []
        places += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"))[::-1]]
    return next((str(place) for place in places if any(place.glob("nvvm/lib*/libnvvm.so*"))), None)


class Plan(NamedTuple):
    """The lists of stages."""

    first: list[Stage]  # python tests/gpu.py
    more: list[Stage]  # python tests/gpu.py --more
    named: list[Stage]  # only if named


class Machine(NamedTuple):
    """What there is to run with."""

    python: str
    sanitizer: str | None = None
    workers: int = 1  # more than one with pytest-xdist
    pretend: bool = False  # one example each on tests/pretended_device.py

    def pytest(self, *arguments: str) -> tuple[str, ...]:
        plugin = ("-p", "pretended_device") if self.pretend else ()
        return (self.python, *PYTEST, *plugin, *arguments)

    def run(self, *program: str) -> tuple[str, ...]:
        pretended = ("-m", "pretended_device") if self.pretend else ()
        return (self.python, *pretended, *program)

    def environment(self) -> dict[str, str]:
        """Of every stage."""
        if self.pretend:
            return QUICK | {"REFIMPL_PRETEND": "1", "REFIMPL_TEST_FULL": "0"}
        home = toolkit(os.environ)
        return QUICK | ({"CUDA_HOME": home} if home else {})


def stages(machine: Machine, out: Path, commit: str | None = None) -> Plan:
    """What is run, in order. ``out``: folder of what stages write, each under its name."""
    plain = machine.environment()
    device = plain | DEVICE
    several = ("-n", str(machine.workers)) if machine.workers > 1 else ()

    def stage(name: str, shows: str, command: tuple[str, ...], limit: int, **more: int) -> Stage:
        added = device if "pytest" in command else plain
        if machine.pretend:
            limit *= 3  # no matter how many share the machine
        return Stage(name, shows, command, added, limit, COUNTS[name], **more)

    def bench(name: str, *options: str) -> tuple[str, ...]:
        options += (*(("--commit", commit) if commit else ()),)
        options += (*(("--runs", "20") if machine.pretend else ()),)
        command = "-m", "refimpl", "bench", "--gpu", "--results", str(out / name)
        return machine.run(*command, *options)

    probe = machine.run("tests/gpu_probe.py", str(out / "probe.json"))
    shapes = machine.pytest("tests/bench", "-k", "v3_shapes")
    tests = machine.pytest(*several, "tests/kernels")
    first = [
        stage("probe", "versions, and one launch of each kind", probe, 60),
        stage("shapes", "V3's shapes", shapes, 180),
        stage("bench", "the benchmark without torch", bench("bench", "--no-torch"), 200),
        stage("tests", "the kernels' tests", tests, 240, workers=machine.workers),
    ]
    found = {}
    for column in (*KERNELS, "cupy"):
        for what, of, limit in (("ops", CASES, 120), ("models", ["model"], 150)):
            shows = f"every gradient of the {what} by {column}"
            command = machine.run("-m", "refimpl", "verify", *verified(machine, column, of))
            found[f"{column}-{what}"] = stage(f"{column}-{what}", shows, command, limit)
    narrow = (*verified(machine, "cuda", ()), "--dtype", "bfloat16")
    narrow = machine.run("-m", "refimpl", "verify", *narrow)
    found["bfloat16"] = stage("bfloat16", "ops and models in bfloat16", narrow, 100)
    for tool in TOOLS if machine.sanitizer or machine.pretend else ():
        watch = (machine.sanitizer or "", "--tool", tool, "--error-exitcode", "9")
        command = (*(() if machine.pretend else watch), *machine.run("tests/gpu_kernels.py"))
        found[tool] = stage(tool, f"every kernel once under compute-sanitizer {tool}", command, 120)
    more = [stage("torch", "the benchmark beside torch", bench("torch"), 440)]
    names = ("memcheck", "racecheck", "cuda-models")
    more += [found[name] for name in names if name in found]
    named = [found[name] for name in NAMED if name in found]
    names = ("cuda-ops", "bfloat16")
    return Plan(first + [found[name] for name in names], more, named)


def verified(machine: Machine, column: str, of: Iterable[str]) -> tuple[str, ...]:
    """What ``refimpl verify`` is told: a column, or CuPy alone."""
    options = ("--backend", "cupy")
    if column in KERNELS:
        options += ("--implementation", column)
    if not machine.pretend:
        return (*options, *of)
    # float32 has no finite differences, so an example is a few calls
    fewer = [name for name in of if name in NUMBA_CUDA or name not in CASES]
    return (*options, "--dtype", "float32", "--examples", "1", *fewer)


def table(chosen: Sequence[Stage]) -> str:
    """The plan and its time on a device, a line per stage."""
    lines = ["estimated seconds on a device, from counts (tests/gpu_plan.py has what one costs):"]
    for stage in chosen:
        c = stage.counts
        lines.append(
            f"{stage.estimate():6.0f} (at most {stage.limit}) {stage.name}: {c.calls:,} launches, "
            f"{c.cuda} + {c.numba_cuda} + {c.cupy} compilations (CUDA C, Numba CUDA, CuPy)"
        )
    total = sum(stage.estimate() for stage in chosen)
    return "\n".join([*lines, f"{total:6.0f} in all, {total / 60:.1f} minutes\n"])
