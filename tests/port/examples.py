"""A truth folder of a tiny model with units, and ports of it: clean ones, and ones with a planted
mistake."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from refimpl.check.planted import PLANTED, plant
from refimpl.checkpoint.source import MemorySource
from refimpl.config import ModelConfig, preset
from refimpl.grads import Request, write_gradients
from refimpl.model import Route
from refimpl.ops import IMPLEMENTATIONS, Ops

from random_parameters import random_parameters

TINY = replace(preset("tiny"), mtp_depth=1, experts=4, groups=2, keep_groups=1, top_k=2)
TOKENS = np.random.default_rng(7).integers(0, TINY.vocabulary, (2, 9))
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
Arrays = dict[str, np.ndarray]


def parameters(config: ModelConfig = TINY) -> Arrays:
    """Random ones that every type holds."""
    found = random_parameters(config, seed=3)
    return {name: x.astype(ml_dtypes.bfloat16).astype(np.float64) for name, x in found.items()}


def permuted(arrays: Mapping[str, np.ndarray], order: np.ndarray) -> Arrays:
    """Parameters, or their gradients, with the model width in another order."""
    width, found = len(order), {}
    for name, x in arrays.items():
        if name.endswith("eh_proj.weight"):
            x = x[..., order, :][..., np.concatenate([order, order + width])]
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            x = x[..., order, :]
        elif x.shape[-1] == width and not name.endswith(("q_b_proj.weight", "kv_b_proj.weight")):
            x = x[..., order]
        found[name] = x
    return found


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
    index = json.loads((out / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    names = {name: x.get("same_as", name) for name, x in index.items()}
    return {name: files[index[stored]["file"]][stored] for name, stored in names.items()}


def clean(
    tmp: Path, params: Arrays, config: ModelConfig, dtype: str, seed: int, routes: Any
) -> Arrays:
    """The reference in another type, the model width in another order."""
    order = np.random.default_rng(seed).permutation(config.width)
    back = np.argsort(order)
    cast = {name: x.astype(dtype) for name, x in permuted(params, order).items()}
    found = run(tmp, cast, config, routes=routes)
    width = config.width
    return {
        name: permuted({name.removeprefix("grad/"): x}, back)[name.removeprefix("grad/")]
        if name.startswith("grad/")
        else (x[..., back] if _is_stream(name) and x.shape[-1] == width else x)
        for name, x in found.items()
    }


def _is_stream(name: str) -> bool:
    return name.startswith(("act/", "cot/")) and not name.endswith(".scores")


def routes_of(arrays: Arrays) -> dict[int, Route]:
    return {
        int(name.rpartition(".")[2]): Route(x, arrays.get(name.replace("routes", "counted")))
        for name, x in arrays.items()
        if name.startswith("aux/routes.")
    }


def write_truth(folder: Path, config: ModelConfig = TINY) -> Arrays:
    """A truth folder with units of float64 and float32; its tensors."""
    params = parameters(config)
    arrays = run(folder, params, config)
    path = folder / "index.json"
    index = json.loads(path.read_text())
    units: dict[str, dict[str, float]] = {name: {} for name in arrays}
    routes = routes_of(arrays)
    for dtype in ("float64", "float32"):
        reruns = [
            clean(folder.parent / f"{dtype}-{n}", params, config, dtype, n, routes)
            for n in range(4)
        ]
        for name, x in arrays.items():
            if x.dtype.kind == "f":
                least = ROUNDOFF[dtype] * np.abs(x).max()
                worst = max(np.abs(y[name] - x).max() for y in reruns)
                units[name][dtype] = float(max(worst, least))
    for name, x in arrays.items():
        if x.dtype.kind == "f":
            index["tensors"][name] |= {"units": units[name], "scale": float(np.abs(x).max())}
    index["metadata"] |= {
        "format": 1,
        "kind": "model",
        "config": asdict(_as_run(config)),
        "checkpoint": None,
        "request": {"mtp": config.mtp_depth > 0, "balance_alpha": 0.02, "routes_given": False},
        "units": {"types": ["float64", "float32"], "reruns": 4, "seed": 0},
    }
    path.write_text(json.dumps(index))
    return arrays


def _as_run(config: ModelConfig) -> ModelConfig:
    return replace(config, balance_weight=0.02)


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
    save_file(arrays, folder / "small.safetensors")
    tensors = {
        name: {
            "dtype": "float64",
            "shape": [2, 3],
            "file": "small.safetensors",
            "scale": float(np.abs(x).max()),
        }
        | ({"units": {"float64": 1e-15, "float32": 1e-7}} if "/in/" not in name else {})
        for name, x in arrays.items()
    }
    cases = {
        case: {"op": case[:-2], "valid": case != "linear-2", "regimes": [], "settings": {}}
        for case in ("linear-1", "linear-2", "swiglu-1")
    }
    units = {"types": ["float64", "float32"], "reruns": 4, "seed": 0}
    metadata = {"format": 1, "kind": "vectors", "config": None, "cases": cases, "units": units}
    (folder / "index.json").write_text(json.dumps({"metadata": metadata, "tensors": tensors}))
    return arrays
