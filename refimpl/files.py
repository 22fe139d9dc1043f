"""Files and folders that appear whole or not at all, even if power is lost; text and JSON, read.

A new file is written beside its place, under a random name, and renamed when it is whole and on the
disk: a reader never sees half of it. Only a regular file is ever replaced, and only a regular file
is read: a pipe or a device may never end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import CouldNotRun

__all__ = [
    "LARGEST_TEXT",
    "PARTIAL",
    "expect_folder",
    "expect_replaceable",
    "file_digest",
    "held",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_text",
    "replacing",
    "replacing_folder",
    "sync_folder",
    "write_json",
    "write_text",
]

PARTIAL = ".partial"  # how the name of a file ends that is not whole yet
LARGEST_TEXT = 25_000_000  # bytes of text or JSON that are read; the index of DeepSeek-V3 has 9e6
LOCKS = find_spec("fcntl") is not None
DEEPEST = 64  # lists and objects of JSON inside one another
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def expect_replaceable(path: Path) -> None:
    """OSError if something stands at ``path`` that is not a regular file: a folder, a device, a
    link."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write, which takes its place as ``path`` when the block ends without an error.

    Args:
        folder: where it stands until then, on the same file system; by default beside ``path``.

    OSError if that can't be. After any error, nothing is left and ``path`` is as it was.
    """
    expect_replaceable(path)
    temporary = _beside(path if folder is None else folder / path.name)
    with temporary.open("xb") as file:  # x: never one that is there, nor through a link
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes its place as ``path``, where there is nothing or an empty
    folder, when the block ends without an error.

    OSError if that can't be. After any error, nothing is left.
    """
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success there is none


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; CouldNotRun if another run holds it.

    The lock is the system's, on the folder itself, and ends with the process, even with one that is
    killed. Without flock (on Windows), and where a file system cannot lock folders (NFS), nothing
    is locked.
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


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk; where the system opens no folders (Windows), that is
    left to it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str, folder: Path | None = None) -> None:
    """Write UTF-8 text, whole or not at all; ``folder`` and errors are those of `replacing`."""
    with replacing(path, folder) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any, folder: Path | None = None) -> None:
    """Write JSON, whole or not at all; ``folder`` and errors are those of `replacing`."""
    write_text(path, json.dumps(content, indent=1) + "\n", folder)


def open_regular(path: Path) -> BufferedReader:
    """A regular file, to read; OSError if it can't be read or is another thing. Nothing waits, as
    opening a pipe would."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, as ``sha256sum`` prints it."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, name: str, most: int = LARGEST_TEXT) -> bytes:
    """The bytes of a regular file; CouldNotRun, which calls the file ``name``, if it can't be read
    or holds more than ``most``."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise CouldNotRun(f"{name} must hold at most {most:,} bytes, got {size:,}")
            return file.read()
    except OSError as error:
        raise CouldNotRun(f"{name} can't be read: {error.strerror}") from error


def read_json(path: Path, name: str | None = None) -> Any:
    """What a JSON file holds; CouldNotRun if it can't be read.

    Args:
        name: how errors call the file, by default its path.
    """
    return parse_json(read_bytes(path, name or str(path)), name or str(path))


def read_text(path: Path, name: str) -> str:
    """The UTF-8 text that a file holds; CouldNotRun, which calls the file ``name``, if it can't be
    read."""
    try:
        return read_bytes(path, name).decode()
    except UnicodeDecodeError as error:
        raise CouldNotRun(f"{name} must be UTF-8: {error.reason} at byte {error.start}") from error


def expect_folder(path: Path) -> None:
    """CouldNotRun unless there is a folder at ``path``."""
    if not os.path.isdir(path):  # Path.is_dir raises if the name is too long
        wrong = "is not a folder" if os.path.exists(path) else "does not exist"
        raise CouldNotRun(f"{path} {wrong}")


def parse_json(text: bytes, name: str) -> Any:
    """The value that UTF-8 JSON stands for; CouldNotRun if it stands for none, if an object in it
    has a key twice, or if it nests so deep that Python's recursion might not follow."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CouldNotRun(f"{name}: {json.dumps(key)[:200]} is given twice")
            found[key] = value
        return found

    if _depth(text) > DEEPEST:
        raise CouldNotRun(f"{name} is not JSON: it nests deeper than {DEEPEST}")
    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except ValueError as error:
        raise CouldNotRun(f"{name} is not JSON: {error}") from error


def _depth(text: bytes) -> int:
    """How deep the brackets of JSON nest; those inside strings do not count."""
    outside = re.sub(rb'"(?:[^"\\]|\\.)*+"', b"", text, flags=re.DOTALL)
    brackets = np.frombuffer(outside.translate(None, NO_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int32(1), np.int32(-1))
    return int(np.cumsum(steps).max(initial=0))


def _beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
