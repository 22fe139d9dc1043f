"""Kernels compiled from CUDA C: the right ones are clean, the mistakes planted in them are caught."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ptx import PTXError, run
from ptx.planted import BUGS, CASES, WRONG, Case


def compiled(source: str, target: str = "sm_90") -> str:
    """CUDA C to PTX by NVRTC."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the bindings, or the library behind them
        pytest.skip(f"NVRTC comes with the extra kernels ({str(error).splitlines()[0]})")
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"planted.cu", 0, [], [])
    options = [f"--gpu-architecture={target}".replace("sm_", "compute_").encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(
        bytearray(size + 1)
    )  # NVRTC writes into it: b" " * 1 would be the object that all share
    nvrtc.nvrtcGetProgramLog(program, log)
    assert int(status) == 0, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytes(bytearray(size + 1))
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text[:size].decode()


def result(case: Case, ptx: str, fresh: bool = True, **options: Any) -> np.ndarray:
    dtype = case.x.dtype
    y = (
        np.zeros(case.size, dtype)
        if "atomicAdd(y" in case.source
        else np.full(case.size, -1).astype(dtype)
    )
    unwritten = [y] if fresh and "atomicAdd(y" not in case.source else []
    run(
        ptx,
        "k",
        case.grid,
        case.block,
        [case.x, y, np.int32(len(case.x))],
        uninitialised=unwritten,
        limit=20_000,
        **options,
    )
    return y


@pytest.mark.parametrize("name", CASES)
def test_right_kernels_are_clean(name: str) -> None:
    case = CASES[name]
    for target in ("sm_80", "sm_90", "sm_100"):
        ptx = compiled(case.source, target)
        for seed in range(3):
            np.testing.assert_allclose(
                result(case, ptx, seed=seed), case.wanted(case.x), rtol=2e-5, atol=2e-5
            )


@pytest.mark.parametrize("bug", BUGS)
def test_planted_mistakes_are_caught(bug: str) -> None:
    name, right, wrong, message = BUGS[bug]
    case = CASES[name]
    assert case.source.count(right) >= 1
    before, _, after = (
        case.source.rpartition(right)
        if bug == "write not awaited"
        else case.source.partition(right)
    )
    ptx = compiled(before + wrong + after)
    if message is WRONG:
        assert not np.allclose(result(case, ptx), case.wanted(case.x), rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(PTXError, match=message) as caught:
        result(case, ptx, fresh="__ldg" not in wrong)
    assert re.search(
        r"k, line \d+: `.*;`: block \(\d, 0, 0\), thread \(\d+, 0, 0\): ", str(caught.value)
    )


@pytest.mark.parametrize(
    "bug", ["read while others write", "write not awaited", "stage overwritten early"]
)
def test_a_missing_barrier_shows_in_results(bug: str) -> None:
    """Even without looking for races: warps go at unequal speed, in an order that the seed
    draws."""
    name, right, wrong, _ = BUGS[bug]
    before, _, after = CASES[name].source.rpartition(right)
    ptx, wanted = compiled(before + wrong + after), CASES[name].wanted(CASES[name].x)
    seen = []
    for seed in range(6):
        try:
            seen.append(
                np.allclose(result(CASES[name], ptx, seed=seed, races=False), wanted, atol=1e-4)
            )
        except PTXError:  # the bytes are there, but in flight
            seen.append(False)
    assert not all(seen)
