"""Parameters read when they are used: the numbers of the whole ones, no more read than is needed,
and nothing copied that need not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.array import library, namespace, take_rows
from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.checkpoint.lazy import LazyParameters, LazyTensor
from refimpl.checkpoint.names import is_quantised
from refimpl.checkpoint.source import MemorySource
from refimpl.config import ModelConfig
from refimpl.parameters import EMBEDDING, is_stacked, parameter_shapes

from checkpoint.examples import TINY, WIDE, random_parameters

STORED = ("float64", "float32", "float16", "bfloat16", "fp8")


def lazy(source: Any, config: ModelConfig) -> dict[str, LazyTensor]:
    """Every `LazyTensor` of a model, and each stack's expert 1."""
    params = LazyParameters(source, config, matrices=True)
    found = {name: x for name, x in params.items() if isinstance(x, LazyTensor)}
    return found | {f"{name}[1]": x[1] for name, x in found.items() if is_stacked(name)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stored", STORED)
def test_the_numbers(stored: str, dtype: str, tmp_path: Path) -> None:
    """By every way to ask for them, those that a loaded checkpoint has, bit for bit."""
    save_checkpoint(random_parameters(WIDE), WIDE, tmp_path / "checkpoint", dtype=stored)
    source = Checkpoint.open(tmp_path / "checkpoint", dtype=dtype)
    whole = source.load()
    whole |= {f"{name}[1]": x[1] for name, x in whole.items() if is_stacked(name)}
    for name, w in lazy(source, WIDE).items():
        wanted = whole[name]
        assert (w.shape, w.dtype, w.ndim, w.size) == (
            wanted.shape,
            wanted.dtype,
            wanted.ndim,
            wanted.size,
        )
        assert library(w) is namespace(w=w) is np
        rows = np.array([[3, 1], [1, 0]])
        for got, expected in (
            (np.asarray(w), wanted),
            (np.asarray(w, np.float64), wanted.astype(np.float64)),
            (np.asarray(w[1]), wanted[1]),
            (np.asarray(w[1, ...]), wanted[1]),
            (w[1:3], wanted[1:3]),
            (w[:, 1:2], wanted[:, 1:2]),
            (take_rows(w, rows), wanted[rows]),
            (np.take(w, [1, 0], axis=-1), wanted[..., [1, 0]]),
            (np.matrix_transpose(w), np.matrix_transpose(wanted)),
            (np.reshape(w, -1), wanted.reshape(-1)),
        ):
            assert got.dtype == expected.dtype, name
            assert got.tobytes() == np.ascontiguousarray(expected).tobytes(), name
        bits = w.bits
        in_bits = stored == "bfloat16" or (stored == "fp8" and not is_quantised(w.name))
        assert (bits is not None) == (in_bits and w.ndim == 2), name
        if bits is not None:
            assert not bits.flags.writeable
            assert np.array_equal(bits.view(ml_dtypes.bfloat16), wanted.astype(ml_dtypes.bfloat16))


def test_nothing_is_copied(tmp_path: Path) -> None:
    """In the file's own type an array is the mapped file, which nobody can write to."""
    save_checkpoint(random_parameters(WIDE), WIDE, tmp_path / "checkpoint", dtype="float32")
    for w in lazy(Checkpoint.open(tmp_path / "checkpoint"), WIDE).values():
        if w.ndim == 2:
            x = np.asarray(w)
            assert x.base is not None
            assert not x.flags.writeable
            assert np.shares_memory(x, np.asarray(w))
            assert np.array(w).flags.writeable


def test_what_is_read() -> None:
    """Nothing when a tensor is asked for or an expert chosen; then that expert alone, and of the
    embedding each row once."""
    config = replace(TINY, mtp_depth=0)
    asked: list[tuple[str, Any]] = []

    class Watched(MemorySource):
        def tensor(self, name: str) -> np.ndarray:
            asked.append((name, None))
            return super().tensor(name)

        def piece(self, name: str, index: Any) -> np.ndarray:
            asked.append((name, index))
            return super().piece(name, index)

    params = LazyParameters(Watched(random_parameters(config), config), config, matrices=True)
    assert list(params) == list(parameter_shapes(config))
    assert len(params) == len(parameter_shapes(config))
    assert "nothing" not in params
    tensors = {name: params[name] for name in params}
    lazily = {name for name, x in tensors.items() if isinstance(x, LazyTensor)}
    assert {name for name, _ in asked} == params.keys() - lazily
    gates = {name for name in params if name.endswith(".mlp.gate.weight")}
    assert lazily == {name for name in params.keys() - gates if len(params.shapes[name]) > 1}
    asked.clear()
    stack = next(name for name in lazily if is_stacked(name))
    expert = tensors[stack][2, ...]
    assert asked == []
    np.asarray(expert)
    assert asked == [(stack, 2)]
    take_rows(tensors[EMBEDDING], np.array([7, 3, 7]))
    name, rows = asked[1]
    assert name == EMBEDDING
    assert list(rows) == [3, 7]
    few = LazyParameters(Watched(random_parameters(config), config), config)
    lazily = {name for name in few if isinstance(few[name], LazyTensor)}
    assert lazily == {EMBEDDING, *filter(is_stacked, few)}
