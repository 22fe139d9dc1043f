"""CuPy's side of a measurement: what the card is, its two ceilings, graphs, events, and memory
taken."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..kernels.launch import DeviceLaunch
from . import RUNS
from .measure import Call, Recorder, summary, warm_up

__all__ = ["CupyDevice"]

COPIED = 2**30  # bytes of the array that is copied
SIDE = 8192  # of the square matrices


class CupyDevice:
    """The current device, and a stream of its own; CouldNotRun without one.

    Where torch is to be measured too, CuPy's allocator gives its memory back before torch asks for
    it.
    """

    def __init__(self) -> None:
        self.launch = Recorder(
            DeviceLaunch()
        )  # raises CouldNotRun where there is no CuPy or no GPU
        import cupy

        self.xp: Any = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        number = cupy.cuda.Device().id
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = properties["name"].decode()
        self.cache = int(properties["l2CacheSize"])

    def versions(self) -> dict[str, str]:
        """Of what decides the speed."""
        runtime = self.xp.cuda.runtime
        cuda = {
            "CUDA runtime": runtime.runtimeGetVersion(),
            "CUDA of the driver": runtime.driverGetVersion(),
        }
        found = {
            name: f"{version // 1000}.{version % 1000 // 10}" for name, version in cuda.items()
        }
        return found | {"CuPy": self.xp.__version__}

    def driver(self) -> str:
        """Its version, as nvidia-smi says it."""
        number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = [
            "nvidia-smi",
            "--query-gpu=driver_version",
            "--format=csv,noheader",
            f"--id={number}",
        ]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def ceilings(self) -> tuple[float, float]:
        """(bytes per second, read and written, of a large copy; flop per second of a large bfloat16
        product)."""
        import ml_dtypes

        xp = self.xp
        with self.stream:
            rng = xp.random.default_rng(0)
            source = rng.random(
                COPIED // 4, dtype="float32"
            )  # zeros would be copied and multiplied faster
            target = xp.empty_like(source)
            a, b = (
                rng.standard_normal((SIDE, SIDE), dtype="float32").astype(ml_dtypes.bfloat16)
                for _ in range(2)
            )
            c = xp.matmul(a, b)  # the first call makes cuBLAS's handle and workspace
        self.stream.synchronize()
        copy = self._median(lambda: xp.copyto(target, source))
        product = self._median(lambda: xp.matmul(a, b, out=c))
        return 2 * source.nbytes / copy, 2 * SIDE**3 / product

    def _median(self, call: Call) -> float:
        """Of a call that takes so long that graphs make no difference (and cuBLAS may refuse to be
        captured)."""
        several = 8

        def all_of_them() -> None:
            for _ in range(several):
                call()

        warm_up(self, all_of_them)
        return summary([self.seconds(all_of_them) / several for _ in range(RUNS)]).median

    def capture(self, calls: Sequence[Call]) -> Call:
        """A graph of them on our stream. Memory that they take must be in the pool already: call
        each once before."""
        with self.stream:
            self.stream.begin_capture()
            try:
                for call in calls:
                    call()
            except BaseException:
                with suppress(
                    Exception
                ):  # what broke the capture is to be seen, not that it is broken
                    self.stream.end_capture()
                raise
            graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream)

    def seconds(self, call: Call) -> float:
        with self.stream:
            before, after = self.xp.cuda.Event(), self.xp.cuda.Event()
            before.record(self.stream)
            call()
            after.record(self.stream)
            after.synchronize()
        milliseconds: float = self.xp.cuda.get_elapsed_time(before, after)
        return milliseconds / 1e3

    def peak(self, call: Call) -> int:
        """What a pool of its own had to reserve for the call: its rounding (512 bytes an array) is
        counted."""
        pool = self.xp.cuda.MemoryPool()
        with self.stream, self.xp.cuda.using_allocator(pool.malloc):
            call()
            self.stream.synchronize()
            return int(pool.total_bytes())

    def free(self) -> None:
        """Give memory that nothing uses back to the device."""
        self.stream.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()
