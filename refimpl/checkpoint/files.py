"""The safetensors files of a folder: which tensors they hold, as memory maps that are read when they are touched."""

from __future__ import annotations

import json
import mmap
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..array import Array
from ..errors import CouldNotRun
from .config_json import read_json

__all__ = ["DTYPES", "INDEX", "SINGLE", "StoredTensor", "open_file", "open_folder"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
FOREIGN = {  # how files begin that are often found under this name
    b"version https://git-lfs": "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"PK\x03\x04": "a zip archive, as torch.save writes it, not safetensors: convert it",
    b"\x80": "a pickle, as torch.save writes it, not safetensors: convert it",
}


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    data: np.ndarray  # uint8, mapped

    def array(self) -> Array:
        """The values, mapped, in their stored type, which must be one of `DTYPES`; possibly unaligned."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name; CouldNotRun unless the whole file is sound."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            for beginning, what in FOREIGN.items():
                if start.startswith(beginning) and not _fits(start, size):
                    raise CouldNotRun(f"{path} is {what}")
            if size < 8:
                raise CouldNotRun(f"{path} is no safetensors file: it has {size} bytes")
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        if not _fits(start, size):
            raise CouldNotRun(f"{path} is cut off or no safetensors file: its header would end behind its {size} bytes")
        with safe_open(path, "np"):  # its checks: the header's form, offsets without gap or overlap, the file's length
            pass
    except OSError as error:
        raise CouldNotRun(f"{path} can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CouldNotRun(f"{path} is cut off or no safetensors file: {_one_line(error)}") from error
    end = 8 + int.from_bytes(start[:8], "little")
    tensors: dict[str, StoredTensor] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise CouldNotRun(f"{path} names a tensor or a field twice in its header")
        return dict(pairs)

    try:
        header = json.loads(bytes(data[8:end]), object_pairs_hook=unique)
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                tensors[name] = StoredTensor(
                    path, entry["dtype"], tuple(entry["shape"]), data[end + first : end + last]
                )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CouldNotRun(f"{path} is no safetensors file: {_one_line(error)}") from error
    return tensors


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint: one model.safetensors, or the files that model.safetensors.index.json names."""
    if not folder.is_dir():
        raise CouldNotRun(f"{folder} is no folder" if folder.exists() else f"{folder} does not exist")
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CouldNotRun(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date")
    if single.exists():
        return open_file(single)
    if index.exists():
        return _open_shards(folder, index)
    try:
        found = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be read: {error.strerror}") from error
    if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth"))]:
        raise CouldNotRun(f"{folder} holds pickles alone ({pickles[0]}): convert them to safetensors")
    others = [name for name in found if name.endswith(".safetensors")]
    told = f" (it has {_one_line(others[0])}{', …' if len(others) > 1 else ''})" if others else ""
    raise CouldNotRun(f"{folder} holds neither {SINGLE} nor {INDEX}{told}")


def _open_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CouldNotRun(f"{index}: weight_map must be an object of tensors and their files")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.\-]+\.safetensors", file):
            shown = json.dumps(file)[:80]
            raise CouldNotRun(f"{index}: weight_map must name .safetensors files in the same folder, got {shown}")
    if missing := [file for file in files if not (folder / file).exists()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CouldNotRun(f"{index} names files that are missing: {', '.join(missing[:3])}{more}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in open_file(folder / file).items():
            if name in tensors:
                raise CouldNotRun(f"{_one_line(name)} is both in {tensors[name].path} and in {folder / file}")
            if weight_map.get(name) != file:
                told = "not at all" if name not in weight_map else f"in {weight_map[name]}"
                raise CouldNotRun(f"{folder / file} holds {_one_line(name)}, which {INDEX} names {told}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise CouldNotRun(f"{index} names {_one_line(name)} in {file}, which does not hold it")
    return tensors


def _fits(start: bytes, size: int) -> bool:
    """Whether a file of that size that starts so can hold the header it announces."""
    return len(start) >= 8 and 8 + int.from_bytes(start[:8], "little") <= size


def _one_line(text: object) -> str:
    return ascii(str(text))[1:-1][:200]
