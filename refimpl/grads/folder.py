"""The folder of a result: files that appear whole, a record per finished step, and the index.

A record has the digests of its step's files, and is on the disk after them: what a record or the
index says is there, even if power was lost. A step whose record or files are not as they were
written is done again, and so are those after it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..array import blocks
from ..checkpoint.names import stored_names
from ..checkpoint.tensor_file import (
    Spec,
    TensorWriter,
    read_tensor_file,
    tensor_writer,
    write_tensor_file,
)
from ..errors import CouldNotRun
from ..files import PARTIAL, file_digest, parse_json, read_bytes, sync_folder, write_json
from ..model import Gradients
from ..parameters import layer_name
from .lazy import Rows, sum_in_blocks
from .request import digest

__all__ = ["FORMAT", "Folder", "LayerGradients", "Record", "Size", "Step", "read_record"]

Step = tuple[str] | tuple[str, int]
"""A step of the work: ("head",), or with its layer, ("forward", 3)."""

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
    "split-*.safetensors",
)
FORMAT = 1  # of index.json, that of conformance vectors too
MOST_INDEX = 2**28  # bytes; of DeepSeek-V3's gradients, 1.3e7
PIECE = 2**20  # elements measured at a time


class Size(NamedTuple):
    """The size of one tensor."""

    elements: int
    norm: float  # sqrt(Σ x²), in float64; no square of a finite x overflows
    largest: float  # max |x|: finite if and only if every x is


NOTHING = Size(0, 0.0, 0.0)


class Stored(NamedTuple):
    """A file as it was written."""

    bytes: int
    sha256: str


class Record(NamedTuple):
    """What a step left."""

    arrays: dict[str, np.ndarray]  # mapped, not read
    files: dict[str, dict[str, Any]]  # that it made, and what the index says of their tensors
    stored: dict[str, Stored]  # the same files as they were written
    sizes: dict[str, Size]  # of the gradients in them

    def array(self, name: str) -> Any:
        """The array of that name, read; None if the step did not leave it."""
        return np.array(self.arrays[name]) if name in self.arrays else None


def read_record(path: Path) -> Record:
    """The record at ``path``; CouldNotRun if it is broken, or if a file of its step is not as it
    was written."""
    arrays, metadata = read_tensor_file(path)
    notes = notes_of(path, metadata.get("notes", "").encode())
    if notes.keys() != {"files", "stored", "gradients", "arrays"}:
        raise CouldNotRun(f"{path} is not as this version writes it")
    if notes["arrays"] != digest(*arrays.values()):
        raise CouldNotRun(f"{path} is broken")
    stored = {file: Stored(*written) for file, written in notes["stored"].items()}
    if wrong := changed(path.parent.parent, stored):
        raise CouldNotRun(f"{wrong} is gone or changed since its step was done")
    sizes = {name: Size(*size) for name, size in notes["gradients"].items()}
    return Record(arrays, notes["files"], stored, sizes)


def changed(folder: Path, stored: Mapping[str, Stored], since: int = 0) -> Path | None:
    """The first file that is not as it was written; None if all are. Only sizes are compared for
    files last written before ``since`` (ns)."""
    for file, written in stored.items():
        path = folder / file
        if not path.is_file() or path.is_symlink():
            return path
        now = path.stat()
        if now.st_size != written.bytes:
            return path
        if now.st_mtime_ns >= since and file_digest(path) != written.sha256:
            return path
    return None


class MeasuringWriter:
    """A `TensorWriter` that keeps the size of each tensor in ``sizes``."""

    def __init__(self, writer: TensorWriter, sizes: dict[str, Size]) -> None:
        self.writer, self.sizes = writer, sizes
        self.tensors = writer.tensors

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        self.writer.write(name, values, start)
        self.sizes[name] = measure(values, self.sizes.get(name, NOTHING))

    def zero(self, name: str) -> None:
        self.writer.zero(name)
        self.sizes[name] = Size(prod(self.tensors[name].shape), 0.0, 0.0)


class LayerGradients(Gradients):
    """The gradients of one layer, written when they are added, if the request wants them; those of
    tensors that layers share are kept in ``sums``."""

    def __init__(self, layer: int, writer: MeasuringWriter | None) -> None:
        super().__init__({})
        self.begin, self.writer = layer_name(layer, ""), writer

    def add(self, name: str, gradient: Any) -> None:
        if not name.startswith(self.begin):
            super().add(name, gradient)
        elif gradient is not None:
            self.write(name, gradient)

    def write(self, name: str, gradient: np.ndarray | None) -> None:
        """Write a gradient of the layer; None stands for zeros."""
        tensor = f"grad/{name}"
        if self.writer is None or tensor not in self.writer.tensors:
            return
        if gradient is None:
            self.writer.zero(tensor)
        else:
            self.writer.write(tensor, gradient)


class Folder:
    """The files of one request, which its steps write, and the record that each step leaves.

    Args:
        fingerprint: of the request. An unfinished run of another one is refused (CouldNotRun)
            unless ``force``.
        gradients: names and shapes of those to write.
        activations: names of those to write.
        dtype: of the gradients.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: dict[str, str],
        force: bool,
        *,
        gradients: Mapping[str, tuple[int, ...]],
        activations: Sequence[str],
        dtype: np.dtype[Any],
    ) -> None:
        prepare(path, fingerprint, force)
        self.path, self.unfinished = path, path / "unfinished"
        self.gradients, self.activations = gradients, activations
        self.dtype = dtype
        for left in self.unfinished.glob(f"*{PARTIAL}"):  # of a run that was killed
            left.unlink()
        self.files: dict[str, dict[str, Any]] = {}  # of the step at work
        self.sizes: dict[str, Size] = {}
        self.records: dict[Step, Record] = {}
        self.resuming = True  # as long as the records of an earlier run are sound

    def do(self, step: Step, run: Callable[[Step], Mapping[str, np.ndarray]]) -> None:
        """Read the record of a step; if there is no sound one, ``run`` the step first, which gives
        the record's arrays. After a step that is done again, all others are."""
        path = self.unfinished / file_name(*step)
        if self.resuming and (record := sound_record(path)):
            self.records[step] = record
            return
        self.resuming = False
        self.files, self.sizes = {}, {}
        arrays = run(step)
        stored = self.stored()
        for name, entry in tensors_of(self.files).items():
            if name in self.sizes:
                largest = self.sizes[name].largest
                entry["scale"] = largest if math.isfinite(largest) else None
        sizes = {
            name.removeprefix("grad/"): size
            for name, size in self.sizes.items()
            if name.startswith("grad/")
        }
        notes = {
            "files": self.files,
            "stored": stored,
            "gradients": sizes,
            "arrays": digest(*arrays.values()),
        }
        write_tensor_file(path, arrays, {"notes": json.dumps(notes)})
        self.records[step] = Record(read_tensor_file(path)[0], self.files, stored, sizes)

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """What the index says of each tensor that the steps have written."""
        files = {name: entry for r in self.records.values() for name, entry in r.files.items()}
        return tensors_of({name: files[name] for name in sorted(files)})

    def finish(
        self, metadata: dict[str, Any], units: Mapping[str, Mapping[str, float | None]]
    ) -> None:
        """Write the index, with the ``units`` of each tensor by type, once all steps are done, and
        remove the records."""
        stored = {name: x for r in self.records.values() for name, x in r.stored.items()}
        tensors = self.tensors
        for name, unit in units.items():
            tensors[name] = tensors[name] | {"units": dict(unit)}
        files = {file: stored[file]._asdict() for file in sorted(stored)}
        index = {"metadata": metadata, "files": files, "tensors": tensors}
        write_json(self.path / "index.json", index, self.unfinished)
        shutil.rmtree(self.unfinished)

    def stored(self) -> dict[str, Stored]:
        """The files of the step at work as they were written."""
        paths = [self.path / file for file in self.files]
        return {path.name: Stored(path.stat().st_size, file_digest(path)) for path in paths}

    @contextmanager
    def writer(self, file: str, tensors: Mapping[str, Spec]) -> Iterator[MeasuringWriter]:
        """A file whose tensors are written a piece at a time."""
        self.files[file] = {
            name: {"dtype": str(spec.dtype), "shape": spec.shape, "file": file}
            for name, spec in tensors.items()
        }
        with tensor_writer(self.path / file, tensors, folder=self.unfinished) as writer:
            yield MeasuringWriter(writer, self.sizes)

    def write(self, file: str, arrays: Mapping[str, np.ndarray]) -> None:
        """A file of whole arrays."""
        specs = {name: Spec(x.shape, x.dtype) for name, x in arrays.items()}
        with self.writer(file, specs) as writer:
            for name, x in arrays.items():
                writer.write(name, x)

    def write_activations(
        self, kind: str, *place: str | int, found: Mapping[str, np.ndarray]
    ) -> None:
        """A file of those among ``found`` that are to be written, if any are; an array that is
        there twice is written once. ``kind``: act, or cot for the gradients of activations; with
        ``place`` the name of the file."""
        chosen = {f"{kind}/{name}": x for name, x in found.items() if name in self.activations}
        if not chosen:
            return
        file, once = file_name(kind, *place), dict[int, str]()
        first = {name: once.setdefault(id(x), name) for name, x in chosen.items()}
        self.write(file, {name: x for name, x in chosen.items() if first[name] == name})
        for name in chosen:
            if first[name] != name:
                self.files[file][name] = {"same_as": first[name]}

    def write_gradient(self, place: str, name: str, parts: Sequence[np.ndarray | Rows]) -> None:
        """A file of one gradient, the sum of ``parts``, if it is to be written."""
        if name not in self.gradients:
            return
        shape = self.gradients[name]
        specs = {f"grad/{name}": Spec(shape, self.dtype)}
        with self.writer(file_name("grad", place), specs) as writer:
            for start, block in sum_in_blocks(parts, shape[0]):
                writer.write(f"grad/{name}", block, start * (block.size // len(block)))

    def write_part(self, term: str, part: int, gradients: Mapping[str, np.ndarray]) -> None:
        """A file of a part's gradients of one term, of those that are to be written."""
        found = {
            f"split/{part}/{term}/{stored}": x if stored == name else x[expert]
            for name, x in gradients.items()
            for expert, stored in enumerate(stored_names(name, x.shape))
            if stored in self.gradients
        }
        self.write(file_name("split", term, part), found)

    @contextmanager
    def layer_gradients(self, layer: int) -> Iterator[LayerGradients]:
        """The file of a layer's gradients, to which a backward adds them."""
        specs = {
            f"grad/{name}": Spec(shape, self.dtype)
            for name, shape in self.gradients.items()
            if name.startswith(layer_name(layer, ""))
        }
        file = file_name("grad", "layer", layer)
        with self.writer(file, specs) if specs else nullcontext() as writer:
            yield LayerGradients(layer, writer)


def tensors_of(files: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The entries of all files in one, by tensor."""
    return {name: entry for tensors in files.values() for name, entry in tensors.items()}


def sound_record(path: Path) -> Record | None:
    """The record at ``path``, if it is there and nothing has changed since it was written."""
    try:
        return read_record(path)
    except (CouldNotRun, TypeError, ValueError, AttributeError):  # of notes in another form
        return None


def file_name(*parts: str | int) -> str:
    """The parts joined, a layer's number as five digits: ``forward-00003.safetensors``."""
    words = [part if isinstance(part, str) else f"{part:05d}" for part in parts]
    return f"{'-'.join(words)}.safetensors"


def prepare(folder: Path, fingerprint: dict[str, str], force: bool) -> None:
    """CouldNotRun unless the folder is empty or holds an unfinished run of the same request;
    ``force`` empties it."""
    unfinished, state = folder / "unfinished", folder / "unfinished" / "request.json"
    try:
        found = sorted(path.name for path in folder.iterdir())
        strange = [name for name in found if not ours(folder / name)]
        if strange:
            raise CouldNotRun(f"{folder} holds other things ({strange[0]}): give another folder")
        if force:
            for path in (folder / "index.json", state):  # first what says that the rest can be used
                path.unlink(missing_ok=True)
            for name in found:
                shutil.rmtree(folder / name) if name == "unfinished" else (folder / name).unlink(
                    missing_ok=True
                )
        elif "index.json" in found:
            index = folder / "index.json"  # written last: what is older need not be read again
            if wrong := changed(folder, stored_of(index), index.stat().st_mtime_ns):
                raise CouldNotRun(
                    f"{wrong} is not as index.json says: give another folder, or start again with",
                    remedy="force",
                )
            # of a run that was killed as it removed it
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CouldNotRun(
                f"{folder} holds a finished result: give another folder, or replace it with",
                remedy="force",
            )
        elif state.exists():
            before = notes_of(state, read_bytes(state, str(state)))
            other = [key for key in fingerprint | before if fingerprint.get(key) != before.get(key)]
            if other:
                raise CouldNotRun(
                    f"{folder} holds an unfinished run of another request (other "
                    f"{', '.join(other)}): give another folder, or start again with",
                    remedy="force",
                )
            return
        elif set(found) - {"unfinished"}:
            raise CouldNotRun(
                f"{folder} holds parts of a result: give another folder, or replace them with",
                remedy="force",
            )
        unfinished.mkdir(exist_ok=True)
        write_json(state, fingerprint)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be written: {error.strerror}") from error


def ours(path: Path) -> bool:
    """Whether a run of ours may have made this: one of our names, and neither a link nor a
    device."""
    if path.is_symlink() or not any(fnmatchcase(path.name, pattern) for pattern in OURS):
        return False
    return path.is_dir() if path.name == "unfinished" else path.is_file()


def stored_of(index: Path) -> dict[str, Stored]:
    """The files that an index names, as they were written; CouldNotRun if it is broken."""
    files = notes_of(index, read_bytes(index, str(index), MOST_INDEX)).get("files")
    try:
        return {file: Stored(**written) for file, written in files.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError) as error:
        raise CouldNotRun(f"{index} is broken: start again with", remedy="force") from error


def notes_of(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that ``path`` holds; CouldNotRun if it holds another thing."""
    try:
        notes = parse_json(text, str(path))
    except CouldNotRun:
        notes = None
    if not isinstance(notes, dict):
        raise CouldNotRun(f"{path} is broken: start again with", remedy="force")
    return notes


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
