"""Files and folders that appear whole or not at all; text and JSON, read.

A new file is written beside its place, under a random name, and renamed when it is whole: a reader
never sees half of it. Only a regular file is ever replaced.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CouldNotRun

__all__ = [
    "PARTIAL",
    "expect_folder",
    "expect_replaceable",
    "parse_json",
    "read_json",
    "read_text",
    "replacing",
    "replacing_folder",
    "write_json",
]

PARTIAL = ".partial"  # how the name of a file ends that is not whole yet


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
            file.close()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success there is none


def write_json(path: Path, content: Any, folder: Path | None = None) -> None:
    """Write JSON, whole or not at all; ``folder`` and errors are those of `replacing`."""
    text = json.dumps(content, indent=1) + "\n"
    with replacing(path, folder) as file:
        file.write(text.encode())


def read_json(path: Path, name: str | None = None) -> Any:
    """What a JSON file holds; CouldNotRun if it can't be read.

    Args:
        name: how errors call the file, by default its path.
    """
    return parse_json(_read(path, name or str(path)), name or str(path))


def read_text(path: Path, name: str) -> str:
    """The UTF-8 text that a file holds; CouldNotRun, which calls the file ``name``, if it can't be
    read."""
    try:
        return _read(path, name).decode()
    except UnicodeDecodeError as error:
        raise CouldNotRun(f"{name} must be UTF-8: {error.reason} at byte {error.start}") from error


def expect_folder(path: Path) -> None:
    """CouldNotRun unless there is a folder at ``path``."""
    if not path.is_dir():
        raise CouldNotRun(f"{path} {'is not a folder' if path.exists() else 'does not exist'}")


def parse_json(text: bytes, name: str) -> Any:
    """The value that UTF-8 JSON stands for; CouldNotRun if it stands for none, or if an object in
    it has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CouldNotRun(f"{name}: {json.dumps(key)[:200]} is given twice")
            found[key] = value
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CouldNotRun(f"{name} is not JSON: {error}") from error


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CouldNotRun(f"{name} can't be read: {error.strerror}") from error


def _beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
