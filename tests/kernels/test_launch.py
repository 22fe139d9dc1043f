"""`refimpl.kernels.launch`: the target of a device, and how a kernel is started there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels.compile import compile_kernel
from refimpl.kernels.launch import DeviceLaunch
from refimpl.text import load_text
from refimpl.verify import KERNELS, Settings

from kernel_support import ON_DEVICE


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ("80", "sm_80"),
        ("86", "sm_80"),
        ("89", "sm_80"),
        ("90", "sm_90a"),
        ("100", "sm_100"),
        ("103", "sm_100"),
        ("120", "sm_120"),
        ("121", "sm_120"),
    ],
)
def test_target_of_a_device(capability: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", _device(capability))
    assert DeviceLaunch().target == target
    assert DeviceLaunch().most_shared == 99 << 10  # as the device says


@pytest.mark.parametrize("capability", ["75", "110"])
def test_no_target_for_a_device(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", _device(capability))
    with pytest.raises(
        CouldNotRun, match=f"kernels are compiled for sm_80, .*, this GPU is sm_{capability}"
    ):
        DeviceLaunch()


def _device(capability: str) -> Any:
    """As much of CuPy as says what GPU there is."""
    runtime = SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError)
    attributes = {"MaxSharedMemoryPerBlockOptin": 99 << 10}
    device = SimpleNamespace(compute_capability=capability, attributes=attributes)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=lambda: device))


def test_a_kernel_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a file's kernels by its name, and started with what CuPy's RawKernel takes."""
    cupy = _device("90")
    loaded = list[str]()
    started = list[Any]()

    def raw_module(*, path: str) -> Any:
        assert type(path) is str
        return SimpleNamespace(get_function=lambda name: loaded.append(name) or start)

    def start(
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        *,
        shared_mem: int,
    ) -> None:
        started.append((grid, block, arguments, shared_mem))

    cupy.RawModule = raw_module
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    launch, module = DeviceLaunch(), compile_kernel("swiglu", "sm_90a", "float32")
    for kernel in ("swiglu_forward", "swiglu_forward", "swiglu_backward"):
        launch(module, kernel, (2,), (32,), [np.int64(1)], shared=16)
    assert loaded == ["swiglu_forward", "swiglu_backward"]
    assert started == [((2,), (32,), (1,), 16)] * 3
    with pytest.raises(TypeError, match="swiglu_forward runs on CuPy arrays, got a NumPy array"):
        launch(module, "swiglu_forward", (2,), (32,), [np.ones(1)])


@pytest.mark.skipif(ON_DEVICE, reason="there is a GPU")
def test_no_gpu_is_one_clear_line() -> None:
    with pytest.raises(CouldNotRun, match=r"^kernels need (a GPU|CuPy)[^\n]*$"):
        DeviceLaunch()
    for backend, message in (
        ("numpy", "^backend must be cupy for the implementation"),
        ("cupy", "needs (a GPU|CuPy)"),
    ):
        for implementation in KERNELS:
            with pytest.raises(CouldNotRun, match=message):
                Settings(load_text(None), implementation=implementation, backend=backend).validate()
