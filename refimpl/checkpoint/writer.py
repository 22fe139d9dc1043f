"""Checkpoints written in Hugging Face's layout: whole or not at all, a tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import ModelConfig
from ..errors import CouldNotRun
from ..files import replacing_folder, write_text
from ..fp8 import narrow
from ..parameters import HEAD, is_buffer, misfits, parameter_shapes
from .config_json import BLOCK, config_dict
from .files import INDEX, SINGLE
from .fp8 import quantise, scale_shape
from .names import SCALE, copied_names, is_quantised, stored_tensors
from .tensor_file import DTYPES, Spec, tensor_writer

__all__ = ["save_checkpoint", "write_random"]

STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FP8 = {"fp8": "float32", "fp8_ue8m0": "ue8m0"}  # and how scales are chosen
CHUNK = 2**18  # numbers that are converted at a time, about
SHARD_BYTES = 5 * 10**9

Rows = Callable[
    [str, int | None, int, int], np.ndarray
]  # (our name, expert, first row, last row) -> [rows, …]


class Entry(NamedTuple):
    """A tensor to write."""

    name: str  # in the file
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    whole: tuple[int, ...]  # shape of the weight, where this is its scales; else shape again
    ours: str  # our parameter
    expert: int | None

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, DTYPES[self.dtype])


def save_checkpoint(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``params``, every tensor of `parameter_shapes`, into a new ``folder`` that transformers
    reads.

    Args:
        dtype: bfloat16, float16, float32 or float64; or fp8 (E4M3 in blocks of 128 × 128 for the
            projections that DeepSeek quantises, bfloat16 for the rest), or fp8_ue8m0 (the scales
            powers of two). Gate biases are float32 always. Rounding is to nearest even, once.
        shard_bytes: a file is closed before it would grow beyond this, unless one tensor alone
            does.

    The folder is written beside its place and renamed when it is whole. It must not exist yet, or
    be empty: nothing is overwritten. MTP layers get their copies of embedding and head, as in the
    released files. CouldNotRun for a finite number that the type can't hold, a bias or an FP8
    weight that is not finite, a config that config.json can't express. λ of MTP and the conventions
    are not in the file. ValueError for parameters that do not fit the config, or are of
    another type than float64, float32, float16 or bfloat16.
    """
    if wrong := misfits(params, config) or unreal(params):
        raise ValueError("params do not fit the config: " + "; ".join(wrong))

    def rows(name: str, expert: int | None, first: int, last: int) -> np.ndarray:
        return np.asarray(params[name] if expert is None else params[name][expert])[first:last]

    _write(rows, config, Path(folder), dtype, shard_bytes)


def unreal(params: Mapping[str, Any]) -> list[str]:
    """The tensors of a type that isn't stored: a conversion would drop imaginary parts, take True
    for 1, read strings, or round twice."""
    return [
        f"{name} must be one of {', '.join(STORED)}, got {x.dtype}"
        for name, x in params.items()
        if str(x.dtype).rpartition(".")[2] not in STORED
    ]


def write_random(
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    std: float = 0.006,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint of ``config``'s shapes, made up chunk by chunk: normal with ``std``,
    around 1 for norms.

    Memory does not depend on the model. Other arguments and errors are those of `save_checkpoint`.
    """
    shapes = parameter_shapes(config)
    number = {name: n for n, name in enumerate(shapes)}

    def rows(name: str, expert: int | None, first: int, last: int) -> np.ndarray:
        inner = shapes[name][1 if expert is None else 2 :]
        rng = np.random.default_rng((seed, number[name], 0 if expert is None else expert, first))
        x = std * rng.standard_normal((last - first, *inner), np.float32)
        return x + np.float32("norm.weight" in name)

    _write(rows, config, Path(folder), dtype, shard_bytes)


def _write(rows: Rows, config: ModelConfig, folder: Path, dtype: str, shard_bytes: int) -> None:
    """All files, into a folder beside ``folder``, which then takes its name."""
    if dtype not in STORED and dtype not in FP8:
        raise CouldNotRun(f"dtype must be one of {', '.join([*STORED, *FP8])}, got {dtype}")
    if shard_bytes < 1:
        raise CouldNotRun(f"shard_bytes must be at least 1, got {shard_bytes}")
    content = config_dict(
        config, dtype="bfloat16" if dtype in FP8 else dtype, scales=FP8.get(dtype)
    )
    place = Path(os.path.abspath(folder))
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise CouldNotRun(f"{folder} exists and is not an empty folder: nothing is overwritten")
        with replacing_folder(place) as beside:
            _write_files(rows, config, beside, dtype, shard_bytes)
            text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
            write_text(beside / "config.json", text)
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be written: {error.strerror or error}") from error


def _write_files(
    rows: Rows, config: ModelConfig, folder: Path, dtype: str, shard_bytes: int
) -> None:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in _entries(config, dtype):
        tensors = [entry, _scales(entry)] if entry.dtype == "F8_E4M3" else [entry]
        size = sum(tensor.spec.bytes for tensor in tensors)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += tensors
        filled += size
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.sort(key=lambda entry: -entry.spec.dtype.itemsize)  # so every tensor is aligned
        _write_file(folder / file, shard, rows, ue8m0=dtype == "fp8_ue8m0")
        weight_map |= {entry.name: file for entry in shard}
        total += sum(entry.spec.bytes for entry in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _entries(config: ModelConfig, dtype: str) -> Iterator[Entry]:
    """Every tensor of the files but the scales, in the order of the forward; a layer's copies
    follow the layer."""
    names = stored_tensors(config)
    plain = "BF16" if dtype in FP8 else STORED[dtype]
    names |= {copy: names[ours] for copy, ours in copied_names(config).items() if copy != HEAD}
    for name, (ours, expert, shape) in names.items():
        stored = (
            "F32"
            if is_buffer(ours)
            else "F8_E4M3"
            if dtype in FP8 and is_quantised(name)
            else plain
        )
        yield Entry(name, stored, shape, shape, ours, expert)


def _scales(entry: Entry) -> Entry:
    """The scales of an FP8 weight."""
    return entry._replace(
        name=entry.name + SCALE, dtype="F32", shape=scale_shape(entry.shape, BLOCK)
    )


def _write_file(path: Path, entries: list[Entry], rows: Rows, *, ue8m0: bool) -> None:
    """One safetensors file; an FP8 weight is quantised twice, once for its scales and once for its
    numbers."""
    specs = {entry.name: entry.spec for entry in entries}
    with tensor_writer(path, specs, {"format": "pt"}) as writer:
        for entry in entries:
            start = 0
            for chunk in _chunks(entry, rows, ue8m0=ue8m0):
                writer.write(entry.name, chunk, start)
                start += chunk.size


def _chunks(entry: Entry, rows: Rows, *, ue8m0: bool) -> Iterator[np.ndarray]:
    """The tensor's numbers in their stored type: some rows at a time, whole blocks of an FP8
    weight."""
    scales = entry.name.endswith(SCALE)
    fp8 = scales or entry.dtype == "F8_E4M3"
    step = max(1, CHUNK // prod(entry.whole[1:]) // BLOCK[0]) * BLOCK[0]
    for first in range(0, entry.whole[0], step):
        x = rows(entry.ours, entry.expert, first, min(first + step, entry.whole[0]))
        if x.dtype not in (np.float32, np.float64):
            x = x.astype(np.float32)
        if (fp8 or is_buffer(entry.ours)) and not np.isfinite(x).all():
            raise CouldNotRun(f"{entry.ours} must be finite to be saved, got NaN or infinity")
        if fp8:
            yield quantise(x, BLOCK, ue8m0=ue8m0)[int(scales)]
            continue
        stored = narrow(x, entry.spec.dtype)
        if (lost := np.isfinite(x) & ~np.isfinite(stored)).any():
            raise CouldNotRun(
                f"{entry.ours} has numbers that {entry.dtype} can't hold: "
                f"{np.abs(x[lost]).max():.4g}"
            )
        yield stored
