"""The kernels of SwiGLU."""

from __future__ import annotations

import pytest

from kernel_support import without_a_device
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba


@without_a_device
@pytest.mark.parametrize("name", PLANTED["swiglu"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("swiglu", name, monkeypatch)
    assert_seen("swiglu")


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["swiglu"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("swiglu", name, monkeypatch)
    assert_seen("swiglu", column="numba_cuda")
