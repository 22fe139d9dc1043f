"""A tiny model streamed into a folder, and what is read back from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from refimpl.checkpoint.source import MemorySource
from refimpl.config import ModelConfig, preset
from refimpl.grads import Request, Result, write_gradients

TINY = preset("tiny")
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, TINY.vocabulary, (2, 12))


def stream(
    params: dict[str, np.ndarray],
    config: ModelConfig,
    out: Path,
    tokens: Any = TOKENS,
    **given: Any,
) -> Result:
    return write_gradients(MemorySource(params, config), Request(tokens, **given), out)


def read(out: Path) -> dict[str, np.ndarray]:
    """Every tensor that the index names, from the file, of the shape and dtype that it names, by
    safetensors itself."""
    every = json.loads((out / "index.json").read_text())["tensors"]
    index = {name: entry for name, entry in every.items() if "same_as" not in entry}
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert {name: entry["file"] for name, entry in index.items()} == {
        n: f for f, x in files.items() for n in x
    }
    found = {name: files[entry["file"]][name] for name, entry in index.items()}
    assert all(
        [list(x.shape), str(x.dtype)] == [index[n]["shape"], index[n]["dtype"]]
        for n, x in found.items()
    )
    assert all(index[n]["scale"] == np.abs(x.astype(float)).max() for n, x in found.items())
    same = {name: entry["same_as"] for name, entry in every.items() if "same_as" in entry}
    return found | {name: found[other] for name, other in same.items()}
