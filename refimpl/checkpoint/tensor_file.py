"""One safetensors file: written a piece at a time, and opened without being loaded.

The layout: the header's length (8 bytes, little-endian), a JSON header with every tensor's dtype,
shape and place, then the values. Since all shapes are known ahead, the header goes first and values
follow in any order.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..array import Array
from ..errors import CouldNotRun
from ..files import LARGEST_TEXT, open_regular, parse_json, replacing

__all__ = [
    "DTYPES",
    "Spec",
    "StoredTensor",
    "TensorWriter",
    "one_line",
    "open_file",
    "read_tensor_file",
    "tensor_writer",
    "write_tensor_file",
]

DTYPES: dict[str, np.dtype[Any]] = {  # NumPy's type by the name that safetensors has for it
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FOREIGN = {  # how files begin that are often found under this name
    b"version https://git-lfs": (
        "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`"
    ),
    b"PK\x03\x04": "a zip archive, as torch.save writes it, not safetensors: convert it",
    b"\x80": "a pickle, as torch.save writes it, not safetensors: convert it",
}


class Spec(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """The file that `tensor_writer` writes: the header at once, the values piece by piece."""

    def __init__(
        self, file: BinaryIO, tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None
    ) -> None:
        self.file, self.tensors = file, tensors
        self.missing = {name: spec.bytes for name, spec in tensors.items()}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self.place, end = {}, 0
        for name, spec in tensors.items():
            self.place[name] = end
            start = end
            end = end + spec.bytes
            header[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(self.start + end)

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Put ``values`` at the tensor's flat element ``start``; ValueError if dtype or size do not
        fit."""
        spec = self.tensors[name]
        if values.dtype != spec.dtype or values.nbytes > self.missing[name]:
            raise ValueError(f"{name} must be {spec}, got {values.dtype} {values.shape} at {start}")
        self.file.seek(self.start + self.place[name] + start * spec.dtype.itemsize)
        self.file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self.missing[name] -= values.nbytes

    def zero(self, name: str) -> None:
        """All of a tensor is 0, which takes no writing."""
        self.missing[name] = 0


@contextmanager
def tensor_writer(
    path: Path,
    tensors: Mapping[str, Spec],
    metadata: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[TensorWriter]:
    """A new safetensors file, which appears at ``path`` when the block ends and all values are
    there; RuntimeError if some are missing. ``folder``: as in `replacing`."""
    with replacing(path, folder) as file:
        writer = TensorWriter(file, tensors, metadata)
        yield writer
        if missing := [name for name, count in writer.missing.items() if count]:
            raise RuntimeError(f"{path.name} lacks values of {', '.join(missing[:5])}")


def write_tensor_file(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write whole arrays at once."""
    specs = {name: Spec(x.shape, x.dtype) for name, x in arrays.items()}
    with tensor_writer(path, specs, metadata) as writer:
        for name, values in arrays.items():
            writer.write(name, values)


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    data: np.ndarray  # [bytes] uint8, mapped

    def array(self) -> Array:
        """The values, mapped, in their stored type, which must be one of `DTYPES`; possibly
        unaligned."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)


def open_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor of a safetensors file, by name, and its metadata; CouldNotRun unless the whole
    file is sound."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            for beginning, what in FOREIGN.items():
                if start.startswith(beginning) and not _fits(start, size):
                    raise CouldNotRun(f"{path} is {what}")
            if size < 8:
                raise CouldNotRun(f"{path} is not a safetensors file: it has {size} bytes")
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        if not _fits(start, size):
            raise CouldNotRun(
                f"{path} is cut off or not a safetensors file: its header would end behind its "
                f"{size} bytes"
            )
        header_size = int.from_bytes(start[:8], "little")
        if header_size > LARGEST_TEXT:
            raise CouldNotRun(
                f"{path}'s header must have at most {LARGEST_TEXT:,} bytes, got {header_size:,}"
            )
        with safe_open(
            path, "np"
        ):  # its checks: the header's form, offsets without gap or overlap, the file's length
            pass
    except OSError as error:
        raise CouldNotRun(f"{path} can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CouldNotRun(
            f"{path} is cut off or not a safetensors file: {one_line(error)}"
        ) from error
    end = 8 + header_size
    header = parse_json(bytes(data[8:end]), f"{path}'s header")
    tensors: dict[str, StoredTensor] = {}
    try:
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = StoredTensor(
                path, entry["dtype"], tuple(entry["shape"]), data[end + first : end + last]
            )
    except (ValueError, KeyError, TypeError) as error:
        raise CouldNotRun(f"{path} is not a safetensors file: {one_line(error)}") from error
    return tensors, metadata


def read_tensor_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors whose types are in `DTYPES`, mapped and read when they are touched, and the
    metadata."""
    tensors, metadata = open_file(path)
    return {name: x.array() for name, x in tensors.items() if x.dtype in DTYPES}, metadata


def _fits(start: bytes, size: int) -> bool:
    """Whether a file of that size that starts so can hold the header it announces."""
    return len(start) >= 8 and 8 + int.from_bytes(start[:8], "little") <= size


def one_line(text: object) -> str:
    """Text from a file as it may stand in a message: escaped, at most 200 characters."""
    return ascii(str(text))[1:-1][:200]
