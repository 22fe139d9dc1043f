"""A truth folder of a tiny model with units, and ports of it: clean ones, and ones with a planted
mistake."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl.check.planted import PLANTED, plant
from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.checkpoint.source import MemorySource
from refimpl.config import ModelConfig, preset
from refimpl.grads import Request, gradient_shapes, write_gradients
from refimpl.grads.units import permute, width_axes
from refimpl.model import Route
from refimpl.ops import IMPLEMENTATIONS, Ops
from refimpl.parameters import parameter_shapes
from refimpl.port import verdict
from refimpl.port.diagnose import Diagnosis

from random_parameters import random_parameters

TINY = replace(preset("tiny"), mtp_depth=1, experts=4, groups=2, keep_groups=1, top_k=2)
TOKENS = np.random.default_rng(7).integers(0, TINY.vocabulary, (2, 9))
TYPES = ("float64", "float32", "bfloat16")
Arrays = dict[str, np.ndarray]


def parameters(config: ModelConfig = TINY) -> Arrays:
    """Random ones that every type holds."""
    found = random_parameters(config, seed=3)
    return {name: x.astype(ml_dtypes.bfloat16).astype(np.float64) for name, x in found.items()}


def run(
    out: Path, params: Arrays, config: ModelConfig, *, ops: Ops | None = None, **given: Any
) -> Arrays:
    """Everything that grads writes for it."""
    request = Request(
        TOKENS, mtp=config.mtp_depth > 0, balance_alpha=0.02, activations="*", **given
    )
    name = "planted"
    try:
        if ops is not None:
            IMPLEMENTATIONS[name] = ops
            request = replace(request, implementation=name)
        write_gradients(MemorySource(params, config), request, out)
    finally:
        IMPLEMENTATIONS.pop(name, None)
    return read(out)


def read(out: Path) -> Arrays:
    """Every tensor of a result by its name."""
    index = json.loads((out / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    names = {name: x.get("same_as", name) for name, x in index.items()}
    return {name: files[index[stored]["file"]][stored] for name, stored in names.items()}


def clean(tmp: Path, params: Arrays, dtype: str, seed: int, routes: Any) -> Arrays:
    """The reference in another type, the model width in another order."""
    order = np.random.default_rng(seed).permutation(TINY.width)
    back, axes = np.argsort(order), width_axes(parameter_shapes, TINY)
    moved = {name: permute(x, axes[name], order) for name, x in params.items()}
    cast = {name: x.astype(dtype) for name, x in moved.items()}
    found, axes = run(tmp, cast, TINY, routes=routes), width_axes(gradient_shapes, TINY)
    for name, x in found.items():
        prefix, _, rest = name.partition("/")
        if prefix == "grad":
            found[name] = permute(x, axes[rest], back)
        elif prefix in ("act", "cot") and not name.endswith(".scores"):
            found[name] = x[..., back]
    return found


def routes_of(arrays: Arrays) -> dict[int, Route]:
    return {
        int(name.rpartition(".")[2]): Route(x, arrays.get(name.replace("routes", "counted")))
        for name, x in arrays.items()
        if name.startswith("aux/routes.")
    }


def write_truth(folder: Path) -> Arrays:
    """A truth folder with units of every type, and its checkpoint beside it; its tensors."""
    save_checkpoint(parameters(), TINY, folder.parent / "checkpoint", dtype="float64")
    source = Checkpoint.open(folder.parent / "checkpoint", dtype="float64")
    source.config = replace(source.config, mtp_weight=TINY.mtp_weight)
    request = Request(TOKENS, mtp=True, balance_alpha=0.02, activations="*", units=TYPES)
    write_gradients(source, request, folder, origin=folder.parent / "checkpoint")
    return read(folder)


def planted(op: str, name: str) -> Ops:
    """The reference with a bug of the catalogue in it."""
    (bug,) = [bug for bug in PLANTED if (bug.op, bug.name) == (op, name)]
    pair = plant(bug)
    assert not isinstance(pair, types.ModuleType)
    return IMPLEMENTATIONS["reference"] | {op: pair}


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """As a port would: no inputs."""
    kept = {name: np.ascontiguousarray(x) for name, x in arrays.items() if name[:3] != "in/"}
    save_file(kept, path)
    return path


def edited(truth: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of a truth's folder, its index changed."""
    folder = tmp_path / "truth"
    shutil.copytree(truth, folder, dirs_exist_ok=True)
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def write_vectors(folder: Path) -> Arrays:
    """Conformance vectors of three cases, one of them wrong on purpose; their tensors."""
    rng, arrays = np.random.default_rng(1), {}
    for case in ("linear-1", "linear-2", "swiglu-1"):
        for name in ("in/x", "cot/y", "out/y", "grad/x", "grad/w"):
            arrays[f"{case}/{name}"] = rng.normal(size=(2, 3))
    folder.mkdir()
    arrays["golden-1/out/y"] = np.ones((2, 3))
    save_file(arrays, folder / "small.safetensors")
    tensors: dict[str, dict[str, Any]] = {}
    for name, x in arrays.items():
        told = {"dtype": "float64", "shape": [2, 3], "file": "small.safetensors"}
        tensors[name] = told | {"scale": float(np.abs(x).max())}
        if "/in/" not in name:
            tensors[name]["units"] = {"float64": 1e-15, "float32": 1e-7}
    del tensors["golden-1/out/y"]["units"]["float32"]
    cases = {
        case: {"op": case[:-2], "valid": case != "linear-2", "regimes": [], "settings": {}}
        for case in ("linear-1", "linear-2", "swiglu-1", "golden-1")
    }
    units = {"types": ["float64", "float32"], "reruns": 4, "seed": 0}
    metadata = {"format": 1, "kind": "vectors", "config": None, "cases": cases, "units": units}
    (folder / "index.json").write_text(json.dumps({"metadata": metadata, "tensors": tensors}))
    return arrays


class Example(NamedTuple):
    folder: Path
    truth: Path
    arrays: Arrays  # of the truth
    ports: dict[str, Arrays]  # clean ones, by type


@cache
def example_of(base: Path) -> Example:
    """A truth and a clean port of each type, made once in a folder of all tests."""
    folder = base / "example-of-a-port"
    folder.mkdir()
    arrays = write_truth(folder / "truth")
    ports = {
        dtype: clean(folder / dtype, parameters(), dtype, 17, routes_of(arrays))
        for dtype in ("float64", "float32")
    }
    return Example(folder, folder / "truth", arrays, ports)


def without_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts without planted bugs computed again, which takes seconds and has tests of its
    own."""
    monkeypatch.setattr(verdict, "diagnose", lambda *given: Diagnosis([], [], ""))
    monkeypatch.setattr(verdict, "not_excluded", lambda *given: [])
