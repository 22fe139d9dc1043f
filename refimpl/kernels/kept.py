"""Compiled kernels on disk, an entry for each source and compiler, so that they can be built on one
machine and used on another, even if that has no compiler.

An entry is a folder, ``<name>-<hash>-<compilers>``: the hash is that of all that enters, the rest
names the releases of the compilers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import CouldNotRun
from ..files import PARTIAL, replacing_folder

__all__ = ["FILES", "Kept", "kept", "kernels_folder"]

FILES = ("kernel.ptx", "kernel.cubin", "log", "sha256")  # of one compiled kernel, in its folder
OTHERS_WRITE = 0o022  # the permission bits of group and others to write


class Kept(NamedTuple):
    """A compiled kernel, or file of kernels."""

    ptx: str
    log: str  # what ptxas says
    cubin: Path


def kernels_folder() -> Path:
    """Where compiled kernels are kept: ``$REFIMPL_KERNELS``, else ``refimpl/kernels`` in
    ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    if named := os.environ.get("REFIMPL_KERNELS"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "refimpl" / "kernels"


def kept(
    name: str,
    all_that_enters: object,
    compilers: Callable[[], str],
    make: Callable[[], tuple[bytes, bytes, bytes]],
) -> Kept:
    """The entry for ``all_that_enters`` and the compilers; if there is none, or its checksum no
    longer matches, it is written with what ``make`` gives: PTX, cubin and log.

    Args:
        compilers: gives their names and releases. Where it raises CouldNotRun, an entry made by
            other compilers is taken, the last by its name.

    CouldNotRun if there are neither compilers nor an entry, if the folder cannot be written, or if
    another user could have written to the entry.
    """
    base = kernels_folder()
    number = hashlib.sha256(repr(all_that_enters).encode()).hexdigest()[:32]
    try:
        folder = base / f"{name}-{number}-{compilers()}"
    except CouldNotRun:
        made_elsewhere = sorted(base.glob(f"{name}-{number}-*"), reverse=True)
        for folder in made_elsewhere:
            if folder.suffix != PARTIAL and (content := _read(folder)) is not None:
                return _entry(folder, content)
        raise
    content = _read(folder)
    if content is None:
        content = make()
        try:
            _write(folder, content)
        except OSError as error:
            raise CouldNotRun(
                f"compiled kernels are kept in {base}, which cannot be written "
                f"({error.strerror}): set REFIMPL_KERNELS or XDG_CACHE_HOME to a folder that can"
            ) from error
    return _entry(folder, content)


def _entry(folder: Path, content: tuple[bytes, bytes, bytes]) -> Kept:
    return Kept(content[0].decode(), content[2].decode(), folder / FILES[1])


def _read(folder: Path) -> tuple[bytes, bytes, bytes] | None:
    """What `_write` wrote; None if it is not there or not whole; CouldNotRun if another user could
    have written it."""
    try:
        _expect_own(folder)
        ptx, cubin, log, digest = ((folder / name).read_bytes() for name in FILES)
    except OSError:
        return None
    return (ptx, cubin, log) if digest == _digest(ptx, cubin, log) else None


def _expect_own(folder: Path) -> None:
    """CouldNotRun unless the entry, its files and the folder around it belong to this user or root,
    and nobody else may write to them: a GPU would execute what another user put there."""
    if os.name != "posix":
        return
    folder = folder.resolve()
    for path in (folder.parent, folder, *(folder / name for name in FILES)):
        status = path.stat()
        why = ""
        if status.st_uid not in (0, os.geteuid()):
            why = f"belongs to user {status.st_uid}: copy the kernels to a folder of your own"
        elif status.st_mode & OTHERS_WRITE:
            why = "can be written by other users: if you trust its content, chmod -R go-w"
        if why:
            raise CouldNotRun(f"kernels are not loaded from {path}, which {why}")


def _write(folder: Path, content: tuple[bytes, bytes, bytes]) -> None:
    """Whole or not at all, though two processes may do it at once. Others may not write, whatever
    the umask."""
    folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        with replacing_folder(folder) as fresh:
            for name, part in zip(FILES, (*content, _digest(*content)), strict=True):
                (fresh / name).write_bytes(part)
            for path in (fresh, *fresh.iterdir()):
                path.chmod(path.stat().st_mode & 0o777 & ~OTHERS_WRITE)
            if folder.exists() and _read(folder) is None:
                shutil.rmtree(folder)
    except OSError:
        if _read(folder) is None:  # else the other process was first
            raise


def _digest(*parts: bytes) -> bytes:
    return "".join(f"{hashlib.sha256(part).hexdigest()}\n" for part in parts).encode()
