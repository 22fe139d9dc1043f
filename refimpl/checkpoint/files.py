"""The safetensors files of a folder: one, or several and their index."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from ..errors import CouldNotRun
from ..files import LARGEST_TEXT, expect_folder, open_regular, read_bytes
from .config_json import read_object
from .tensor_file import StoredTensor, one_line, open_file

__all__ = ["INDEX", "SINGLE", "content_fingerprint", "open_folder"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLES, SAMPLE = 64, 4096  # pieces of a file that its fingerprint is made of, and bytes of each


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint: one model.safetensors, or the files that
    model.safetensors.index.json names."""
    expect_folder(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CouldNotRun(
            f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date"
        )
    if single.exists():
        return open_file(single)[0]
    if index.exists():
        return _open_shards(folder, index)
    try:
        found = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be read: {error.strerror}") from error
    if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth"))]:
        raise CouldNotRun(
            f"{folder} holds only pickles ({pickles[0]}): convert them to safetensors"
        )
    others = [name for name in found if name.endswith(".safetensors")]
    told = f" (it has {one_line(others[0])}{', …' if len(others) > 1 else ''})" if others else ""
    raise CouldNotRun(f"{folder} holds neither {SINGLE} nor {INDEX}{told}")


def content_fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's content, as far as that is cheap: config.json, and of each file of
    weights name, size, header and 64 pieces. A copy of the checkpoint has the
    same one; so does a checkpoint whose other bytes alone are changed."""
    files = [SINGLE]
    if not (folder / SINGLE).exists():
        files = sorted({*read_object(folder / INDEX)["weight_map"].values()})
    hashed = hashlib.sha256(read_bytes(folder / "config.json", str(folder / "config.json")))
    try:
        for name in files:
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                header = min(int.from_bytes(file.read(8), "little"), LARGEST_TEXT)
                hashed.update(f"\n{name} {size}\n".encode() + file.read(header))
                begin = file.tell()
                for place in sorted({(size - begin) * n // SAMPLES for n in range(SAMPLES)}):
                    file.seek(begin + place)
                    hashed.update(file.read(SAMPLE))
    except OSError as error:
        raise CouldNotRun(f"{folder / name} can't be read: {error.strerror or error}") from error
    return hashed.hexdigest()


def _open_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CouldNotRun(f"{index}: weight_map must be an object of tensors and their files")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.\-]+\.safetensors", file):
            shown = json.dumps(file)[:80]
            raise CouldNotRun(
                f"{index}: weight_map must name .safetensors files in the same folder, got {shown}"
            )
    if missing := [abbreviated(x) for x in files if not os.path.exists(folder / x)]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CouldNotRun(f"{index} names files that are missing: {', '.join(missing[:3])}{more}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in open_file(folder / file)[0].items():
            if name in tensors:
                raise CouldNotRun(
                    f"{one_line(name)} is both in {tensors[name].path} and in {folder / file}"
                )
            if weight_map.get(name) != file:
                told = "not at all" if name not in weight_map else f"in {weight_map[name]}"
                raise CouldNotRun(
                    f"{folder / file} holds {one_line(name)}, which {INDEX} names {told}"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise CouldNotRun(f"{index} names {one_line(name)} in {file}, which does not hold it")
    return tensors


def abbreviated(name: str) -> str:
    """A name of a file, which may be longer than any file's."""
    return name if len(name) <= 80 else f"{name[:77]}..."
