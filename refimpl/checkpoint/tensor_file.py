"""A safetensors file written a piece at a time, and one read without loading it.

The layout: the header's length (8 bytes, little-endian), a JSON header with every tensor's dtype, shape and place, then
the values. Since all shapes are known ahead, the header goes first and values follow in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..errors import CouldNotRun

__all__ = ["Spec", "TensorWriter", "read_tensor_file", "write_tensor_file"]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("float64"), "F32": np.dtype("float32"), "I64": np.dtype("int64"), "I32": np.dtype("int32"),
    "BOOL": np.dtype("bool"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Write ``tensors`` to ``temporary``, which takes its place as ``path`` when all values are there.

    Used in ``with``: on an error nothing appears at ``path``. RuntimeError if values are missing at the end.
    """

    def __init__(
        self, path: Path, temporary: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.temporary, self.tensors = path, temporary, tensors
        self.missing = {name: spec.bytes for name, spec in tensors.items()}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self.place, end = {}, 0
        for name, spec in tensors.items():
            self.place[name], start, end = end, end, end + spec.bytes
            header[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = temporary.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(self.start + end)

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Put ``values`` at the tensor's flat element ``start``; ValueError if dtype or size do not fit."""
        spec = self.tensors[name]
        if values.dtype != spec.dtype or values.nbytes > self.missing[name]:
            raise ValueError(f"{name} must be {spec}, got {values.dtype} {values.shape} at {start}")
        self.file.seek(self.start + self.place[name] + start * spec.dtype.itemsize)
        self.file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self.missing[name] -= values.nbytes

    def zero(self, name: str) -> None:
        """All of a tensor is 0, which takes no writing."""
        self.missing[name] = 0

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        missing = [name for name, count in self.missing.items() if count]
        try:
            self.file.close()
            if error is None and missing:
                raise RuntimeError(f"{self.path.name} lacks values of {', '.join(missing[:5])}")
            if error is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


def write_tensor_file(
    path: Path, temporary: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write whole arrays at once."""
    with TensorWriter(path, temporary, {n: Spec(a.shape, a.dtype) for n, a in arrays.items()}, metadata) as writer:
        for name, values in arrays.items():
            writer.write(name, values)


def read_tensor_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors, mapped into memory and read when used, and the metadata; CouldNotRun if it is no such file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("it is cut short")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"])
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if dtype is None:
                continue  # not of the kinds that we write
            if end - start != prod(shape) * dtype.itemsize or start < 0 or 8 + length + end > size:
                raise ValueError(f"{name} does not fit its place")
            if end == start:
                tensors[name] = np.zeros(shape, dtype=dtype)
            else:
                tensors[name] = np.memmap(path, dtype, "r", 8 + length + start, shape)
        return tensors, metadata
    except OSError as error:
        raise CouldNotRun(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CouldNotRun(f"{path} is not a safetensors file: {error}") from error
