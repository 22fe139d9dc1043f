"""Conformance vectors: inputs, cotangents, outputs and gradients of every op in files, for ports in
any language (``refimpl vectors``).

A folder of safetensors, one file per op, and index.json, which has a JSON Schema
(schemas/index.schema.json). Tensors are called CASE/PREFIX/NAME, as in ``mla-1/grad/w_o``, with the
prefixes in (differentiable inputs), aux (other arrays), cot, out and grad. in, aux and cot are
exact in bfloat16 and stored as float32, int64 or bool; out and grad are float64, computed in
longdouble where that is wider.

Each case says which planted bugs it excludes in each type: a port whose numbers at that type are
within 4 units everywhere does not have them. Some cases are wrong on purpose (``valid: false``):
they hold the numbers of a planted bug, and whoever compares with them must see a difference.

The small set is in the package, with the golden values that torch's autograd made from formulas of
its own (files golden-*.safetensors; ``source`` says so).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..check.cases import pair_of
from ..check.planted import FUNCTIONS, PLANTED, plant
from ..check.rules import Pair, has_longdouble
from ..checkpoint.tensor_file import read_tensor_file, write_tensor_file
from ..errors import CouldNotRun
from ..files import file_digest, replacing_folder, write_text
from ..grads.folder import FORMAT
from ..ops import bias_update, expert_load
from ..optimizer import AdamW, Moments, clip_global_norm
from .cases import (
    RERUNS,
    ROUNDOFF,
    TYPES,
    Arrays,
    OpCase,
    apart,
    is_real,
    members,
    planted,
    shows,
    truth,
    units,
)
from .generator import GENERATOR, dyadics, integers
from .vector_cases import OPS, SIZES, WRONG, Vector, cases_of

__all__ = [
    "NAMES",
    "SMALL",
    "Made",
    "digest_of",
    "inputs_of",
    "make",
    "names_of",
    "schema",
    "write",
]

OPTIMIZER = ("adamw", "clip_global_norm", "bias_update")
NAMES = (*OPS, *OPTIMIZER)  # whose vectors are written
MOST = 256 * 2**20  # bytes of a set
SMALL = Path(str(files(__package__))) / "small"  # the folder of the small set, in the package
GOLDEN_TOLERANCE = 1e-13  # of the largest value, which our own ops keep to golden values
ARRAYS = ("ops", "block", "routes", "unclipped", "kept")  # keyword arguments that are no setting


CONVENTIONS = {  # that no case's settings say
    "weights": "[out, in]; y = x wᵀ",
    "w_q_b": "rows by head: N without rotation, then R with",
    "w_kv_a": "rows: the latent's C, then R rotated keys that all heads share; so is the cache",
    "w_kv_b": "rows by head: N of the key, then V of the value",
    "w_o": "columns by head: V",
    "experts": "stacked: [E, F, D] and [E, D, F]",
    "mask": "True: counts, may be seen",
    "cotangents": "of each real output; gradients are those of Σ cot · out",
}


@dataclass
class Made:
    """A finished case."""

    name: str
    op: str
    regimes: Sequence[str]
    settings: Mapping[str, Any]
    tensors: Arrays  # PREFIX/NAME
    units: dict[str, dict[str, float]]  # of out/ and grad/: by type
    excludes: dict[str, list[str]]  # planted bugs by type
    note: str = ""
    bug: str | None = None  # whose numbers these are
    differs: list[str] = field(default_factory=list)  # the tensors that a right port has otherwise

    def entry(self) -> dict[str, Any]:
        """What index.json says of the case."""
        return {
            "op": self.op,
            "valid": self.bug is None,
            "bug": self.bug,
            "differs": self.differs,
            "regimes": list(self.regimes),
            "settings": dict(self.settings),
            "source": "refimpl",
            "note": self.note,
            "inputs_sha256": digest_of(self.tensors),
            "excludes": self.excludes,
        }


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a case's in/, aux/ and cot/: for each in the order of the names, the name, the
    type's name, the shape as decimal numbers with × between, each ended by a newline, and the
    values, little-endian."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(("in/", "aux/", "cot/")):
            x = np.ascontiguousarray(tensors[name])
            shape = "×".join(map(str, x.shape))
            found.update(f"{name}\n{x.dtype.name}\n{shape}\n".encode())
            found.update(x.astype(x.dtype.newbyteorder("<")).tobytes())
    return found.hexdigest()


def stored(x: np.ndarray) -> np.ndarray:
    """An input as it is stored: float32 for real numbers, which holds it exactly."""
    if not is_real(x):
        return x.astype(np.int64) if x.dtype.kind == "i" else x
    narrow = x.astype(np.float32)
    if not np.array_equal(narrow, x):
        raise ValueError("an input of a vector must be exact in float32")
    return narrow


def with_cotangents(vector: Vector) -> OpCase:
    """The vector's case with a cotangent for each real output, and its discrete choices as
    arguments."""
    case = vector.case({})
    y, _ = Pair(*pair_of(vector.op), case.kwargs).call(list(case.inputs.values()))
    outputs = members(vector.op, y)
    if vector.op == "router" and vector.replayed:
        vector.aux["routes"] = np.asarray(outputs["indices"])
    cot = {
        name: dyadics(f"{vector.name}/cot/{name}", np.shape(m), -127, 127, 6)
        for name, m in outputs.items()
        if is_real(m)
    }
    return vector.case(cot)


def inputs_of(vector: Vector, case: OpCase) -> Arrays:
    """All that a port is given, as it is stored."""
    groups: dict[str, Mapping[str, Any]] = {"in": case.inputs, "aux": vector.aux, "cot": case.cot}
    return {
        f"{prefix}/{name}": stored(x)
        for prefix, group in groups.items()
        for name, x in group.items()
        if x is not None
    }


def settings_of(vector: Vector) -> dict[str, Any]:
    """All arguments that are no arrays, defaults included."""
    defaults = {
        name: p.default
        for name, p in inspect.signature(pair_of(vector.op).forward).parameters.items()
        if p.kind == p.KEYWORD_ONLY and p.default is not p.empty and name not in ARRAYS
    }
    known = defaults | vector.settings
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in known.items()
        if name not in vector.aux
    }


def finished(vector: Vector, bug: str | None = None) -> Made:
    """The case with its outputs and gradients, units, and what it excludes; with ``bug``, the
    numbers of that planted bug."""
    case = with_cotangents(vector)
    exact = truth(case)
    unit = {t: units(case, t, exact) for t in TYPES}
    tensors = inputs_of(vector, case)
    numbers, differs = exact, []
    if bug is not None:
        (found,) = [x for x in PLANTED if (x.op, x.name) == (vector.op, bug)]
        numbers = truth(case, planted(found))
        differs = apart(numbers, exact, unit["float32"])
    for name, x in numbers.items():
        tensors[name] = x.astype(np.float64) if is_real(x) else stored(x)
    excludes = {t: [x.name for x in shows(case, t, exact, unit[t])] for t in TYPES}
    by_tensor = {name: {t: unit[t][name] for t in TYPES} for name, x in exact.items() if is_real(x)}
    return Made(
        f"{vector.op}-wrong-1" if bug else vector.name,
        vector.op,
        vector.regimes,
        settings_of(vector),
        tensors,
        by_tensor,
        {} if bug else excludes,
        note=f"{vector.name} with the planted bug {bug!r}" if bug else vector.note,
        bug=bug,
        differs=differs,
    )


def make(op: str, size: str) -> Iterator[Made]:
    """The op's cases."""
    if op in OPTIMIZER:
        yield from OF_OPTIMIZER[op](size)
        return
    for number, vector in enumerate(cases_of(op, size)):
        yield finished(vector)
        if size == "small" and not number and op in WRONG:
            yield finished(vector, WRONG[op])


def name_of(op: str, size: str, number: int = 1) -> str:
    return f"{op}-{'v3-' if size == 'v3-shaped' else ''}{number}"


def plain(
    name: str, op: str, settings: dict[str, Any], aux: Arrays, runs: Callable[[str], Arrays]
) -> Made:
    """A case of a function without gradient; ``runs`` computes its outputs at a type."""
    exact = runs("longdouble" if has_longdouble() else "float64")
    found: dict[str, dict[str, float]] = {}
    for dtype in ("float64", "float32"):
        results = runs(dtype)
        for key, x in exact.items():
            if is_real(x):
                away = float(np.max(np.abs(results[key] - x), initial=0))
                least = ROUNDOFF[dtype] * float(np.max(np.abs(x), initial=0))
                found.setdefault(key, {})[dtype] = max(away, least)
    tensors = {f"aux/{key}": stored(x) for key, x in aux.items()}
    tensors |= {key: x.astype(np.float64) if is_real(x) else x for key, x in exact.items()}
    return Made(name, op, (), settings, tensors, found, {})


def adamw(size: str) -> Iterator[Made]:
    """Three steps, the rate another at each; a decays, b does not."""
    name, d = name_of("adamw", size), 5 if size == "small" else 256
    shapes = {"a": (3, d), "b": (d,)}
    rates = (0.0625, 0.03125, 0.015625)
    aux = {
        f"param.{k}": dyadics(f"{name}/aux/param.{k}", s, -127, 127, 6) for k, s in shapes.items()
    }
    for step in range(len(rates)):
        for k, s in shapes.items():
            key = f"grad.{step}.{k}"
            aux[key] = dyadics(f"{name}/aux/{key}", s, -127, 127, 8)
    settings = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}

    def runs(dtype: str) -> Arrays:
        cast = {k: np.array(x, dtype=dtype) for k, x in aux.items()}
        params = {k: cast[f"param.{k}"] for k in shapes}
        adam, moments = AdamW(**settings, decays=lambda k: k == "a"), Moments()
        for step, rate in enumerate(rates):
            grads = {k: cast[f"grad.{step}.{k}"] for k in shapes}
            moments = adam.update(params, grads, moments, rate)
        found = {f"out/param.{k}": x for k, x in params.items()}
        found |= {f"out/m.{k}": x for k, x in moments.first.items()}
        return found | {f"out/v.{k}": x for k, x in moments.second.items()}

    told = settings | {"learning_rates": list(rates), "decays": ["a"]}
    yield plain(name, "adamw", told, aux, runs)


def clipping(size: str) -> Iterator[Made]:
    """By the norm of all gradients together: one case clips, the other does not."""
    for number, most in enumerate((0.5, 1024.0), 1):
        name, d = name_of("clip_global_norm", size, number), 5 if size == "small" else 256
        shapes = {"a": (3, d), "b": (d,)}
        aux = {k: dyadics(f"{name}/aux/grad.{k}", s, -127, 127, 8) for k, s in shapes.items()}

        def runs(dtype: str, aux: Arrays = aux, most: float = most) -> Arrays:
            storage = "float64" if dtype == "longdouble" else dtype
            grads = {k: np.array(x, dtype=storage) for k, x in aux.items()}
            norm = clip_global_norm(grads, most)
            results = {f"out/grad.{k}": g for k, g in grads.items()}
            return {"out/norm": np.asarray(norm)} | results

        given = {f"grad.{k}": x for k, x in aux.items()}
        told = {"max_norm": most, "epsilon": 0.0}
        yield plain(name, "clip_global_norm", told, given, runs)


def bias_updates(size: str) -> Iterator[Made]:
    """The load counted from the routes, tokens of padding left out, and the gate's next bias."""
    for number, centre in enumerate((False, True), 1):
        name, experts = name_of("bias_update", size, number), 8
        first = integers(f"{name}/aux/indices", (2, 6, 1), 0, experts - 1)
        aux = {
            "indices": (first + np.array([0, 3])) % experts,
            "mask": np.array([[True] * 5 + [False], [False] + [True] * 5]),
            "bias": dyadics(f"{name}/aux/bias", (experts,), -127, 127, 8),
        }

        def runs(
            dtype: str, aux: Arrays = aux, centre: bool = centre, changed: Mapping[str, Any] = {}
        ) -> Arrays:
            ours: dict[str, Any] = {"expert_load": expert_load, "bias_update": bias_update}
            ours |= changed
            load = ours["expert_load"](aux["indices"], aux["bias"].size, aux["mask"])
            bias = aux["bias"].astype(dtype)
            moved = ours["bias_update"](bias, load, 2.0**-10, centre=centre)
            return {"out/load": load, "out/bias": np.asarray(moved)}

        told = {"experts": experts, "gamma": 2.0**-10, "centre": centre}
        made = plain(name, "bias_update", told, aux, runs)
        shown: list[str] = []
        for bug in (x for x in PLANTED if x.op in FUNCTIONS):
            wrong = runs("float64", changed={bug.op: getattr(plant(bug), bug.op)})
            unit = {key: 2 * x["float32"] for key, x in made.units.items()}
            if apart(wrong, runs("float64"), unit):
                shown.append(bug.name)
        yield replace(made, excludes={"float64": shown, "float32": shown})


OF_OPTIMIZER = {"adamw": adamw, "clip_global_norm": clipping, "bias_update": bias_updates}


def schema() -> dict[str, Any]:
    """The JSON Schema of index.json."""
    text = (files(__package__) / "schemas" / "index.schema.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def names_of(ops: Sequence[str]) -> list[str]:
    """The ops to write, in reading order: those named, by default all."""
    unknown = [op for op in ops if op not in NAMES]
    if unknown:
        raise CouldNotRun(f"unknown op {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return [op for op in NAMES if op in (ops or NAMES)]


def write(
    folder: Path,
    ops: Sequence[str] = (),
    size: str = "small",
    told: Callable[[str, int, int], None] = lambda op, done, count: None,
) -> dict[str, Any]:
    """Write vectors into a new or empty folder, whole or not at all; returns the index.

    Args:
        ops: of `NAMES`, by default all. size: of `SIZES`; all of the small set has the golden
            values, too.
        told: is called as the work proceeds, with the op and how many are done.
    """
    chosen = names_of(ops)
    if size not in SIZES:
        raise CouldNotRun(f"must be one of {', '.join(SIZES)}, got {size}", argument="size")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CouldNotRun(f"{folder} exists already: give another folder")
    try:
        with replacing_folder(folder) as inside:
            index = fill(inside, chosen, size, told)
            if size == "small" and not ops:
                add_golden(inside, index)
            index["files"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                for path in sorted(inside.glob("*.safetensors"))
            }
            write_text(inside / "index.json", as_text(index))
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be written: {error.strerror}") from error
    return index


def fill(
    folder: Path, ops: Sequence[str], size: str, told: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Write a file per op; returns the index without its files."""
    cases: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    total = 0
    for number, op in enumerate(ops):
        told(op, number, len(ops))
        file, held = f"{op}.safetensors", {}
        for made in make(op, size):
            cases[made.name] = made.entry()
            for name, x in made.tensors.items():
                full = f"{made.name}/{name}"
                held[full] = x
                tensors[full] = tensor_entry(x, file, made.units.get(name))
        total += sum(x.nbytes for x in held.values())
        if total > MOST:
            raise RuntimeError(f"a set must have at most {MOST:,} bytes, got {total:,}")
        write_tensor_file(folder / file, {name: held[name] for name in sorted(held)})
    metadata = {
        "format": FORMAT,
        "kind": "vectors",
        "size": size,
        "refimpl": __version__,
        "numpy": np.__version__,
        "generator": GENERATOR,
        "conventions": CONVENTIONS,
        "truth": "longdouble" if has_longdouble() else "float64",
        "dtype": "float64",
        "implementation": "reference",
        "config": None,
        "checkpoint": None,
        "request": None,
        "units": {"types": list(TYPES), "reruns": RERUNS, "seed": 0},
        "cases": cases,
    }
    return {"metadata": metadata, "files": {}, "tensors": tensors}


def tensor_entry(x: np.ndarray, file: str, unit: Mapping[str, float] | None) -> dict[str, Any]:
    """What index.json says of a tensor."""
    entry: dict[str, Any] = {"dtype": x.dtype.name, "shape": list(x.shape), "file": file}
    if unit is not None:
        entry["units"] = dict(unit)
        entry["scale"] = float(np.max(np.abs(x), initial=0))
    return entry


def add_golden(folder: Path, index: dict[str, Any]) -> None:
    """Copy the files of golden values, and enter their cases into the index."""
    for path in sorted(SMALL.glob("golden-*.safetensors")):
        shutil.copyfile(path, folder / path.name)
        found, notes = read_tensor_file(path)
        golden = json.loads(notes["golden"])
        op = path.stem.removeprefix("golden-")
        arrays: dict[str, Arrays] = {}
        for full, x in found.items():
            case, _, name = full.partition("/")
            arrays.setdefault(case, {})[name] = x
            unit = None
            if name.startswith(("out/", "grad/")) and is_real(x):
                size = float(np.max(np.abs(x), initial=0))
                unit = {"float64": GOLDEN_TOLERANCE / 4 * size}
            index["tensors"][full] = tensor_entry(x, path.name, unit)
        for label, settings in golden["cases"].items():
            name = f"golden-{op}-{label}"
            index["metadata"]["cases"][name] = {
                "op": op,
                "valid": True,
                "bug": None,
                "differs": [],
                "regimes": [],
                "settings": settings,
                "source": f"torch {golden['torch']}, {golden['script']}",
                "note": "torch's autograd in float64; 4 units are 1e-13 of the largest value",
                "inputs_sha256": digest_of(arrays[name]),
                "excludes": {},
            }


def as_text(index: Mapping[str, Any]) -> str:
    """The index as JSON, a line per case, file and tensor."""

    def lines(entries: Mapping[str, Any]) -> str:
        parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()]
        return "{\n" + ",\n".join(parts) + "\n}"

    metadata = dict(index["metadata"])
    cases = metadata.pop("cases")
    head = json.dumps(metadata, indent=1).removesuffix("\n}") + f',\n "cases": {lines(cases)}\n}}'
    rest = [f'"{key}": {lines(index[key])}' for key in ("files", "tensors")]
    return "{\n" + ",\n".join([f'"metadata": {head}', *rest]) + "\n}\n"


def size_of(index: Mapping[str, Any]) -> int:
    """The bytes of all files but the index."""
    return sum(entry["bytes"] for entry in index["files"].values())
