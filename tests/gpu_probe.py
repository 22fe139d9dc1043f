"""What a GPU machine has, in a few seconds: versions, and one launch of each kind, whose result is
compared.

``python tests/gpu_probe.py FILE`` writes them to FILE as JSON too; exit 1 if a kind fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.bench.run import commit_of_checkout
from refimpl.kernels.columns import COLUMNS
from refimpl.kernels.compile import nvrtc_version
from refimpl.kernels.host import matmul
from refimpl.kernels.launch import DeviceLaunch
from refimpl.ops import REFERENCE

PACKAGES = ("numpy", "cuda-bindings", "cuda-pathfinder", "numba", "numba-cuda", "torch", "triton")
BFLOAT16 = ml_dtypes.bfloat16
PRODUCTS = {
    "float64": (np.float64, np.float64),
    "float32": (np.float32, np.float32),
    "bfloat16": (BFLOAT16, BFLOAT16),
    "bfloat16, written in float32": (BFLOAT16, np.float32),
}


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def library(name: str) -> str:
    """The end of the path where a library of CUDA's was found."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return "/".join(Path(load_nvidia_dynamic_lib(name).abs_path).parts[-3:])


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0].strip()


def cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def versions() -> dict[str, Callable[[], str]]:
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    found: dict[str, Callable[[], str]] = {
        "device": lambda: properties["name"].decode(),
        "capability": lambda: str(cupy.cuda.Device().compute_capability),
        "kernels' target": lambda: DeviceLaunch().target,
        "driver": driver,
        "CUDA of the driver": lambda: cuda(runtime.driverGetVersion()),
        "CUDA runtime": lambda: cuda(runtime.runtimeGetVersion()),
        "commit": commit_of_checkout,
        "Python": platform.python_version,
        "cupy": lambda: str(cupy.__version__),
        "NVRTC": nvrtc_version,
    }
    found |= {package: lambda package=package: installed(package) for package in PACKAGES}
    return found | {
        name: lambda name=name: library(name) for name in ("nvrtc", "nvvm", "nvJitLink")
    }


def near(found: Any, wanted: np.ndarray, tolerance: float) -> str:
    """The error in words; ValueError if it is larger."""
    error = float(np.max(np.abs(found.get().astype(np.float64) - wanted)))
    if not error <= tolerance:
        raise ValueError(f"error {error:.1e}, more than {tolerance:.1e}")
    return f"error {error:.1e}"


def swiglu(column: str) -> str:
    """A kernel of ours, in float32."""
    import cupy

    gate, up = np.linspace(-3, 3, 600).reshape(2, 2, 150)
    arrays = [cupy.asarray(x.astype(np.float32)) for x in (gate, up)]
    found, _ = COLUMNS[column](DeviceLaunch())["swiglu"].forward(*arrays)
    return near(found, REFERENCE["swiglu"].forward(gate, up)[0], 1e-5)


def ufunc() -> str:
    """Two kernels that CuPy compiles: element by element, and a sum."""
    import cupy

    x = np.linspace(-3, 3, 300)
    return near(cupy.exp(cupy.asarray(x)).sum(), np.exp(x).sum(), 1e-9)


def product(name: str) -> str:
    """A dense product, as the kernels' host side asks cuBLAS for it."""
    import cupy

    given, result = PRODUCTS[name]
    a, b = (np.random.default_rng(0).integers(-3, 4, (2, 64, 64))).astype(np.float64)
    out = cupy.empty((64, 64), dtype=result)
    matmul(cupy.asarray(a.astype(given)), cupy.asarray(b.astype(given)), out)
    return near(out, a @ b, 1.0 if result is BFLOAT16 else 1e-4)  # whole numbers up to 576


def launches() -> dict[str, Callable[[], str]]:
    """One of each kind."""
    kinds: dict[str, Callable[[], str]] = {
        "a kernel in CUDA C": lambda: swiglu("cuda"),
        "a kernel in Numba CUDA": lambda: swiglu("numba_cuda"),
        "a CuPy ufunc": ufunc,
    }
    return kinds | {f"a product in {name}": lambda name=name: product(name) for name in PRODUCTS}


def answers(
    questions: Mapping[str, Callable[[], str]], otherwise: str
) -> tuple[dict[str, str], list[str]]:
    """(each answer, also printed, ``otherwise`` and why where there is none; where that is)."""
    found, failed = dict[str, str](), list[str]()
    for name, ask in questions.items():
        start = time.monotonic()
        try:
            found[name] = ask()
        except Exception as error:
            lines = str(error).splitlines() or ["no message"]
            found[name] = f"{otherwise}: {type(error).__name__}: {lines[0]}"
            failed.append(name)
        print(f"{name}: {found[name]} ({time.monotonic() - start:.1f} s)", flush=True)
    return found, failed


def main() -> int:
    about, _ = answers(versions(), "unknown")
    kinds, failed = answers(launches(), "FAILS")
    if len(sys.argv) > 1:
        content = {"versions": about, "launches": kinds}
        Path(sys.argv[1]).write_text(json.dumps(content, indent=1) + "\n")
    print(f"fails: {', '.join(failed)}" if failed else "one launch of each kind holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
