"""The folder of a result: files that appear whole, records of the steps that are done, and the
index."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..array import blocks
from ..checkpoint.tensor_file import Spec, TensorWriter, read_tensor_file, write_tensor_file
from ..errors import CouldNotRun
from .pieces import Sink, summed

__all__ = ["Folder", "Record", "Size", "held"]

OURS = (
    "index.json",
    "unfinished",
    "in.safetensors",
    "out.safetensors",
    "aux.safetensors",
    "logits.safetensors",
    "act-*.safetensors",
    "cot-*.safetensors",
    "grad-*.safetensors",
)
LOCKS = find_spec("fcntl") is not None
PIECE = 2**20  # elements whose size is taken at a time


class Size(NamedTuple):
    """How large one gradient is."""

    elements: int
    norm: float  # sqrt(Σ g²), in float64; no square of a finite g overflows
    largest: float  # max |g|: finite if and only if every g is


NOTHING = Size(0, 0.0, 0.0)


class Record:
    """What a step left: arrays, the files it made, their bytes, and the sizes of the gradients in
    them.

    CouldNotRun if the record is broken, or if a file is not as it was left.
    """

    def __init__(self, path: Path) -> None:
        self.arrays, metadata = read_tensor_file(path)
        notes = notes_of(path, metadata.get("notes", ""))
        if notes.keys() != {"files", "bytes", "gradients"}:
            raise CouldNotRun(f"{path} is not as this version writes it: start anew with --force")
        self.files: dict[str, dict[str, Any]] = notes["files"]
        self.sizes = {name: Size(*size) for name, size in notes["gradients"].items()}
        for file, count in notes["bytes"].items():
            left = path.parent.parent / file
            if not left.is_file() or left.stat().st_size != count:
                raise CouldNotRun(
                    f"{left} is gone or changed since its step was done: start anew with --force"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(self.arrays[name])


class Folder:
    """Where the steps of one request leave their files and records; only what is wanted is written.

    Args:
        identity: of the request; with ``force`` False, an unfinished run of another one is refused
            (CouldNotRun).
        gradients: names and shapes of those that are wanted.
        activations: names of those that are wanted.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, str],
        force: bool,
        *,
        gradients: Mapping[str, tuple[int, ...]],
        activations: Sequence[str],
        dtype: np.dtype[Any],
    ) -> None:
        prepare(path, identity, force)
        self.path, self.unfinished = path, path / "unfinished"
        self.gradients, self.activations, self.dtype = gradients, activations, dtype
        self.files: dict[str, dict[str, Any]] = {}  # of the step at work
        self.sizes: dict[str, Size] = {}
        self.records: dict[str, Record] = {}

    def do(self, step: str, run: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Run a step that has no record yet, whose arrays ``run`` gives; read its record."""
        path = self.unfinished / f"{step}.safetensors"
        if not path.exists():
            self.files, self.sizes = {}, {}
            arrays = run()
            made = {file: (self.path / file).stat().st_size for file in self.files}
            notes = {"files": self.files, "bytes": made, "gradients": self.sizes}
            write_tensor_file(path, self._temporary(path), arrays, {"notes": json.dumps(notes)})
        self.records[step] = Record(path)

    def finish(self, metadata: dict[str, Any]) -> None:
        """All is there: write the index, and remove the records."""
        for record in self.records.values():
            self.files |= record.files
        tensors = {
            name: entry for file in sorted(self.files) for name, entry in self.files[file].items()
        }
        replace_text(
            self.path / "index.json", {"metadata": metadata, "tensors": tensors}, self.unfinished
        )
        shutil.rmtree(self.unfinished)

    def writer(self, file: str, tensors: Mapping[str, Spec]) -> TensorWriter:
        self.files[file] = {
            name: {"dtype": str(spec.dtype), "shape": spec.shape, "file": file}
            for name, spec in tensors.items()
        }
        return TensorWriter(self.path / file, self._temporary(self.path / file), tensors)

    def write(self, file: str, arrays: Mapping[str, np.ndarray]) -> None:
        with self.writer(
            file, {name: Spec(x.shape, x.dtype) for name, x in arrays.items()}
        ) as writer:
            for name, x in arrays.items():
                writer.write(name, x)

    def write_activations(
        self, file: str, found: Mapping[str, np.ndarray], prefix: str = "act"
    ) -> None:
        chosen = {f"{prefix}/{name}": x for name, x in found.items() if name in self.activations}
        if chosen:
            self.write(f"{file}.safetensors", chosen)

    def write_gradient(self, file: str, name: str, parts: list[Any]) -> None:
        """A file of one gradient, the sum of ``parts``."""
        if name not in self.gradients:
            return
        shape, size = self.gradients[name], Size(0, 0.0, 0.0)
        with self.writer(
            f"{file}.safetensors", {f"grad/{name}": Spec(shape, self.dtype)}
        ) as writer:
            for start, block in summed(parts, shape[0]):
                writer.write(f"grad/{name}", block, start * (block.size // len(block)))
                size = measure(block, size)
        self.sizes[name] = size

    def of_layer(self, layer: int) -> tuple[str, ...]:
        """The gradients that are wanted of a layer."""
        return tuple(name for name in self.gradients if name.startswith(f"model.layers.{layer}."))

    @contextmanager
    def layer_file(self, layer: int) -> Iterator[Sink]:
        """A sink for the gradients of one layer."""
        specs = {
            f"grad/{name}": Spec(self.gradients[name], self.dtype) for name in self.of_layer(layer)
        }
        if not specs:
            yield Sink(lambda name, gradient: None)
            return
        with self.writer(f"grad-layer-{layer:05d}.safetensors", specs) as writer:

            def write(name: str, gradient: np.ndarray | None) -> None:
                if name not in self.gradients:
                    return
                if gradient is None:
                    writer.zero(f"grad/{name}")
                    self.sizes[name] = Size(
                        specs[f"grad/{name}"].bytes // self.dtype.itemsize, 0.0, 0.0
                    )
                else:
                    writer.write(f"grad/{name}", gradient)
                    self.sizes[name] = measure(gradient)

            yield Sink(write)

    def _temporary(self, path: Path) -> Path:
        return self.unfinished / f"{path.name}.partial"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; CouldNotRun if another one has it.

    The lock is the system's, on the folder itself: nothing is left of it when the process ends,
    however it does. There is none without flock (on Windows), nor where a file system has none for
    folders (NFS).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY) if LOCKS else None
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be written: {error.strerror}") from error
    if descriptor is None:
        yield
        return
    import fcntl

    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CouldNotRun(f"{folder} is in use by another run") from error
        yield
    finally:
        os.close(descriptor)


def prepare(folder: Path, identity: dict[str, str], force: bool) -> None:
    """See that the folder is empty, or that what is in it is this very request, unfinished; else
    empty it by force."""
    unfinished, state = folder / "unfinished", folder / "unfinished" / "request.json"
    try:
        found = sorted(path.name for path in folder.iterdir())
        strange = [
            name for name in found if not any(fnmatchcase(name, pattern) for pattern in OURS)
        ]
        if strange:
            raise CouldNotRun(
                f"{folder} holds other things ({strange[0]}): give a folder of its own"
            )
        if force:
            for path in (folder / "index.json", state):  # first what says that the rest can be used
                path.unlink(missing_ok=True)
            for name in found:
                shutil.rmtree(folder / name) if name == "unfinished" else (folder / name).unlink(
                    missing_ok=True
                )
        elif "index.json" in found:
            shutil.rmtree(
                unfinished, ignore_errors=True
            )  # of a run that was killed as it removed it
            raise CouldNotRun(
                f"{folder} holds a finished result: give another folder, or replace it with --force"
            )
        elif state.exists():
            before = notes_of(state, state.read_bytes())
            other = [key for key in identity | before if identity.get(key) != before.get(key)]
            if other:
                raise CouldNotRun(
                    f"{folder} holds an unfinished run of another request (other "
                    f"{', '.join(other)}): give another folder, or start anew with --force"
                )
            return
        elif set(found) - {"unfinished"}:
            raise CouldNotRun(
                f"{folder} holds parts of a result: give another folder, or replace them with "
                "--force"
            )
        unfinished.mkdir(exist_ok=True)
        replace_text(state, identity, unfinished)
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be written: {error.strerror}") from error


def notes_of(path: Path, text: str | bytes) -> dict[str, Any]:
    """The JSON object that ``path`` holds; CouldNotRun if it holds another thing."""
    try:
        notes = json.loads(text)
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise CouldNotRun(f"{path} is broken: start anew with --force")
    return notes


def replace_text(path: Path, content: Any, temporary: Path) -> None:
    partial_file = temporary / f"{path.name}.partial"
    partial_file.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial_file, path)


def measure(x: np.ndarray, before: Size = NOTHING) -> Size:
    """The size of ``x``, and of what was before."""
    elements, norm, largest = before
    flat = x.reshape(-1)
    for start, stop in blocks(flat.size, PIECE):
        piece = flat[start:stop].astype(np.float64)
        most = float(np.max(np.abs(piece)))
        largest = float(np.maximum(largest, most))
        if 0 < most < np.inf:
            piece /= most
            most *= math.sqrt(piece @ piece)
        norm = math.hypot(norm, most)
    return Size(elements + flat.size, norm, largest)
