"""The safetensors files of a folder: one, or several and their index."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import CouldNotRun
from ..files import expect_folder
from .config_json import read_object
from .tensor_file import StoredTensor, one_line, open_file

__all__ = ["INDEX", "SINGLE", "open_folder"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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
            f"{folder} holds pickles alone ({pickles[0]}): convert them to safetensors"
        )
    others = [name for name in found if name.endswith(".safetensors")]
    told = f" (it has {one_line(others[0])}{', …' if len(others) > 1 else ''})" if others else ""
    raise CouldNotRun(f"{folder} holds neither {SINGLE} nor {INDEX}{told}")


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
