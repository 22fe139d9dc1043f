"""Arrays, token ids and routes from the user's files; CouldNotRun names the option and the file.
Type and shape of an array are looked at before its values are read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.tensor_file import one_line, read_tensor_file
from ..errors import CouldNotRun
from ..files import open_regular, parse_json, read_json, read_text
from ..grads import GRPO
from ..model import Route
from ..tokenizer import HuggingFace

__all__ = [
    "booleans",
    "integers",
    "numbers",
    "read_grpo",
    "read_routes",
    "text_tokens",
    "token_lists",
]

MOST_TOKENS = 2**24  # of a file: a hundred texts of the longest context


def integers(path: Path, option: str) -> np.ndarray:
    """[batch, time], int64; the file of a single row may hold it alone."""
    content = _one_row(_read(path, option))
    x = _array(content, path, option)
    _expect_few(option, path, x)
    if x.dtype.kind not in "iu" or x.ndim != 2 or x.size == 0:
        raise CouldNotRun(
            f"{option} {path} must hold integers [batch, time], got {x.dtype} {list(x.shape)}"
        )
    if isinstance(content, list) and any(type(number) is bool for row in content for number in row):
        raise CouldNotRun(
            f"{option} {path} must hold integers [batch, time], got true or false among them"
        )
    if x.max() > np.iinfo(np.int64).max:
        raise CouldNotRun(f"{option} {path} must hold integers that fit into int64, got {x.max()}")
    return x.astype(np.int64)


def booleans(path: Path, option: str, shape: tuple[int, ...]) -> np.ndarray:
    """[batch, time], bool; of the tokens' shape. The file of a single row may hold it alone."""
    x = _array(_one_row(_read(path, option)), path, option)
    if x.dtype.kind in "biu" and x.ndim == 2:
        _expect_shape(option, x, "(B, T)", shape)
    if x.dtype.kind not in "biu" or x.ndim != 2 or not np.isin(x, (0, 1)).all():
        raise CouldNotRun(
            f"{option} {path} must hold 0 and 1 [batch, time], got {x.dtype} {list(x.shape)}"
        )
    return x.astype(np.bool_)


def numbers(path: Path, option: str, shape: tuple[int, ...]) -> np.ndarray:
    """[batch, time, vocabulary], of the file's type."""
    x = _array(_read(path, option), path, option)
    if x.dtype.kind not in "fiu":
        raise CouldNotRun(
            f"{option} {path} must hold numbers [batch, time, vocabulary], got {x.dtype}"
        )
    _expect_shape(option, x, "(B, T, W)", shape)
    return np.array(x)


def token_lists(path: Path, option: str) -> list[list[int]]:
    """Lists of token ids, of any lengths; the file of a single one may hold it alone."""
    rows = _read(path, option)
    if isinstance(rows, np.ndarray):
        _expect_few(option, path, rows)
        rows = rows.tolist()
    rows = _one_row(rows)
    if not (
        isinstance(rows, list)
        and all(isinstance(row, list) and all(type(token) is int for token in row) for row in rows)
    ):
        raise CouldNotRun(f"{option} {path} must hold one list of integers, or several")
    return rows


def text_tokens(text: str, checkpoint: Path) -> np.ndarray:
    """Ids [1, T] by the checkpoint's tokenizer, of the text or of the file with that name."""
    if os.path.isfile(text):  # Path.is_file raises for a text longer than any name
        text = read_text(Path(text), f"--text {text}")
    tokenizer = HuggingFace(checkpoint, "token ids with --tokens FILE")
    return np.array([tokenizer.encode(text)], dtype=np.int64)


def read_routes(path: Path) -> dict[int, Route]:
    """The choices of experts in a file of ours, or of another implementation in the same form."""
    file = path / "aux.safetensors" if path.is_dir() else path
    tensors, _ = read_tensor_file(file)
    found = {}
    for name, x in tensors.items():
        prefix, _, layer = name.rpartition(".")
        if prefix != "aux/routes":
            continue
        if not re.fullmatch("0|[1-9][0-9]{0,8}", layer):
            raise CouldNotRun(
                f"--routes {file} must hold aux/routes.L with a layer's number L, holds "
                f"{one_line(name)}"
            )
        counted = tensors.get(f"aux/counted.{layer}")
        for part, given in (("routes", x), ("counted", counted)):
            if given is not None and given.dtype not in (np.int64, np.int32):
                raise CouldNotRun(
                    f"--routes {file} must hold aux/{part}.{layer} as int64 or int32, got "
                    f"{given.dtype}"
                )
        found[int(layer)] = Route(np.array(x), None if counted is None else np.array(counted))
    if not found:
        raise CouldNotRun(f"--routes {file} must hold aux/routes.L as int64 or int32, holds none")
    return found


def read_grpo(path: Path) -> GRPO:
    """What GRPO's loss needs: arrays, and settings in the metadata."""
    tensors, metadata = read_tensor_file(path)
    needed, known = ("mask", "advantages"), ("old_log_prob", "reference_log_prob")
    for name in needed:
        if name not in tensors:
            raise CouldNotRun(f"--grpo {path} must hold mask and advantages, lacks {name}")
    if strange := [name for name in tensors if name not in (*needed, *known)]:
        raise CouldNotRun(
            f"--grpo {path} must hold {', '.join((*needed, *known))} alone, holds "
            f"{one_line(strange[0])}"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        _expect_few("--grpo", path, x)
        if name == "mask":
            if not np.isin(x, (0, 1)).all():
                raise CouldNotRun(f"--grpo {path} must hold 0 and 1 as mask, got other numbers")
            arrays[name] = x.astype(np.bool_)
        elif x.dtype.kind in "biu":
            raise CouldNotRun(f"--grpo {path} must hold floating {name}, got {x.dtype}")
        else:
            arrays[name] = x.astype(np.float64)
    settings = parse_json(metadata.get("settings", "{}").encode(), f"--grpo {path}: settings")
    if not isinstance(settings, dict):
        raise CouldNotRun(f"--grpo {path}: settings must be a JSON object")
    try:
        return GRPO.of(arrays, settings)
    except ValueError as error:
        raise CouldNotRun(f"--grpo {path}: settings: {error}") from error


def _expect_few(option: str, path: Path, x: np.ndarray) -> None:
    if x.size > MOST_TOKENS:
        raise CouldNotRun(
            f"{option} {path} must hold at most {MOST_TOKENS:,} tokens, got {x.size:,}"
        )


def _expect_shape(option: str, x: np.ndarray, letters: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise CouldNotRun(f"{option} must have shape {letters}={shape}, got {x.shape}")


def _one_row(content: Any) -> Any:
    """Rows: a list or an array of numbers becomes the only one."""
    if isinstance(content, np.ndarray):
        return content[None] if content.ndim == 1 else content
    if isinstance(content, list) and content and not any(isinstance(x, list) for x in content):
        return [content]
    return content


def _array(content: Any, path: Path, option: str) -> np.ndarray:
    """The content as an array; one that is mapped stays so."""
    if isinstance(content, np.ndarray):
        return content
    try:
        return np.array(content)
    except (ValueError, OverflowError) as error:
        raise CouldNotRun(f"{option} {path} is not an array: {error}") from error


def _read(path: Path, option: str) -> Any:
    """The array of a .npy file, mapped, or what a .json file holds."""
    if path.suffix not in (".npy", ".json"):
        raise CouldNotRun(f"{option} {path} must be a .npy or a .json file")
    if path.suffix == ".json":
        return read_json(path, f"{option} {path}")
    try:
        open_regular(path).close()
        x = np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError as error:
        raise CouldNotRun(f"{option} {path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # a broken header makes NumPy raise nearly anything
        why = str(error).replace("mmap length is greater than file size", "it is cut off")
        raise CouldNotRun(f"{option} {path} is not an array: {' '.join(why.split())}") from error
    if not isinstance(x, np.ndarray):  # an archive of arrays
        x.close()
        raise CouldNotRun(f"{option} {path} must hold one array")
    return x
