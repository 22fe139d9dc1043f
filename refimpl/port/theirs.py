"""A port's tensors, read one at a time: safetensors or .npz, a file or a folder of them. Pickles
are refused: reading one can run anything.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib import format as npy

from ..checkpoint.tensor_file import DTYPES, StoredTensor, one_line, open_file
from ..errors import CouldNotRun
from ..files import open_regular

__all__ = ["Theirs", "Tensor", "open_theirs"]

KINDS = (".safetensors", ".npz")
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
SAVE = (
    "save safetensors instead, as in `from safetensors.torch import save_file; "
    "save_file({n: p.grad.contiguous() for n, p in model.named_parameters()}, "
    "'port.safetensors')`"
)
WRAPPERS = ("module.", "_orig_mod.")  # what torch's wrappers add to a name


class Tensor(Protocol):
    """One stored tensor. Nothing but its header is read before ``array`` is called."""

    @property
    def path(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def array(self) -> np.ndarray: ...


class SafeTensor(NamedTuple):
    """A tensor of a safetensors file, mapped."""

    stored: StoredTensor

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> str:
        known = DTYPES.get(self.stored.dtype)
        return self.stored.dtype if known is None else str(known)

    def array(self) -> np.ndarray:
        x: np.ndarray = self.stored.array()
        return x


class NpzTensor(NamedTuple):
    """A tensor of a .npz archive, unpacked when it is asked for."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: str

    def array(self) -> np.ndarray:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                x: np.ndarray = npy.read_array(file, allow_pickle=False)
        except Exception as error:  # a broken archive makes zipfile and NumPy raise nearly anything
            raise _broken(self.path, error) from error
        return x


class Theirs(NamedTuple):
    """All tensors of a port by their keys; where files share a key, each as ``file:key``."""

    path: Path
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, list[str]]  # a key that is there several times, and where


def open_theirs(path: Path | str) -> Theirs:
    """The tensors in a file or in the files of a folder; CouldNotRun if it holds none or can't be
    read."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        found = sorted(path.iterdir())
        files = [file for file in found if file.suffix in KINDS and not file.is_dir()]
        if not files:
            pickles = [file.name for file in found if file.suffix in PICKLES]
            told = f" ({one_line(pickles[0])} is a pickle: {SAVE})" if pickles else ""
            raise CouldNotRun(f"{path} holds no .safetensors and no .npz file{told}")
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        for key, tensor in _open(file).items():
            tensors |= {f"{file.name}:{key}": tensor, _bare(key): tensor}
            places.setdefault(_bare(key), []).append((file.name, key))
    if not places:
        raise CouldNotRun(f"{path} holds no tensor")
    shared = {bare: _told(held) for bare, held in places.items() if len(held) > 1}
    return Theirs(path, tensors, shared)


def _told(places: list[tuple[str, str]]) -> list[str]:
    """The files that have a key, with the key where it is not the same in all."""
    same = len({key for _, key in places}) == 1
    return [file if same else f"{file} as {one_line(key)}" for file, key in places]


def _bare(key: str) -> str:
    """A key without what torch's wrappers put into it."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _open(file: Path) -> dict[str, Tensor]:
    if file.suffix in PICKLES:
        raise CouldNotRun(f"{file} is a pickle, and reading one can run anything: {SAVE}")
    if file.suffix == ".npz":
        return _open_npz(file)
    if file.suffix not in KINDS:
        raise CouldNotRun(f"{file} must be a .safetensors or a .npz file, or a folder of them")
    return {key: SafeTensor(stored) for key, stored in open_file(file)[0].items()}


def _open_npz(file: Path) -> dict[str, Tensor]:
    """The headers of an archive; each member must be as long as its header says."""
    found: dict[str, Tensor] = {}
    try:
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise ValueError(f"{member.filename} must be an array")
                with archive.open(member) as stream:
                    shape, dtype = _header(stream)
                    start = stream.tell()
                if member.file_size != start + prod(shape) * dtype.itemsize:
                    raise ValueError(f"{member.filename} is not as long as its header says")
                key = member.filename.removesuffix(".npy")
                if key in found:
                    raise ValueError(f"{key} is given twice")
                found[key] = NpzTensor(file, member.filename, shape, str(dtype))
    except OSError as error:
        raise CouldNotRun(f"{file} can't be read: {error.strerror or error}") from error
    except Exception as error:  # as above
        raise _broken(file, error) from error
    return found


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a .npy file; ValueError if it holds Python objects."""
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which only a pickle can")
    return shape, dtype


def _broken(file: Path, error: Exception) -> CouldNotRun:
    return CouldNotRun(f"{file} is not a sound .npz file: {one_line(error)}")
