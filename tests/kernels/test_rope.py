"""The kernels of RoPE."""

from __future__ import annotations

import re

import numpy as np
import pytest

from refimpl.check.cases import Case
from refimpl.kernels.compile import STORAGE, compile_kernel

from kernel_support import TABLE, TABLES, TYPES, compare, without_a_device
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_rope_where_heads_end(column: str, storage: str) -> None:
    """Heads that end in the first half of a thread's pairs, and in the second."""
    rng, pair = np.random.default_rng(0), TABLES[column]["rope"]
    for half in (3, 5, 7, 9, 13):
        for layout in ("interleaved", "halves"):
            kwargs = {
                "positions": np.arange(2),
                "inv_freq": np.logspace(0, -3, half),
                "layout": layout,
            }
            compare("rope", pair, Case((rng.normal(size=(1, 2, 2, 2 * half)),), kwargs), storage, 0)


def test_arguments_that_a_kernel_would_misread() -> None:
    x, one = np.ones((1, 2, 1, 4)), {"positions": np.arange(2), "inv_freq": np.ones(2)}
    _, saved = TABLE["rope"].forward(x, **one)
    with pytest.raises(
        TypeError, match="dy must be of the forward's x, whose arithmetic is float64, got float32"
    ):
        TABLE["rope"].backward(x.astype(np.float32), saved)


@without_a_device
def test_more_threads_than_32_bits_count() -> None:
    """Refused before anything is made: no array of this size exists here."""
    x = np.broadcast_to(np.float32(0), (1, 2**12, 2**20, 2))
    more = {"positions": np.arange(2**12), "inv_freq": np.ones(1)}
    message = "x must be turned by at most 4294967168 threads, got 4294967296"
    with pytest.raises(ValueError, match=message):
        TABLE["rope"].forward(x, **more)


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
def test_no_division_in_64_bits(storage: str) -> None:
    for target in ("sm_90", "sm_100"):
        code = compile_kernel("rope", target, storage).ptx
        assert not re.search(r"(div|rem)\.[su]64", code)
        assert re.search(r"div\.u32", code)


@without_a_device
@pytest.mark.parametrize("name", PLANTED["rope"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("rope", name, monkeypatch)
    assert_seen("rope", storage="bfloat16")


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["rope"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("rope", name, monkeypatch)
    assert_seen("rope", column="numba_cuda")
