"""Real text for verification: the English documentation that CPython ships, or a file."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

from .errors import CouldNotRun
from .files import read_bytes

__all__ = ["Text", "load_text", "load_topics"]

MOST = 2**28  # bytes


class Text(NamedTuple):
    """A text that verification reads."""

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def load_topics() -> list[str]:
    """The texts of `pydoc_data.topics`, sorted by their names; CouldNotRun where there are none."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CouldNotRun(
            f"must be a file, since this Python has no pydoc_data.topics ({error})", argument="text"
        ) from error
    return [topics[name] for name in sorted(topics)]


def load_text(path: Path | None = None) -> Text:
    """The bytes of ``path``, by default all of `pydoc_data.topics`, sorted (it differs by Python
    version).

    CouldNotRun if the file can't be read or is too short or too dull to cut windows from.
    """
    if path is None:
        version = sys.version_info
        name = f"pydoc_data.topics of CPython {version.major}.{version.minor}.{version.micro}"
        return Text(name, "\n\n".join(load_topics()).encode())
    try:
        data = read_bytes(path, str(path), MOST)
    except CouldNotRun as error:
        raise CouldNotRun(error.reason, argument="text") from error
    if len(data) < 64:
        raise CouldNotRun(f"{path} must hold at least 64 bytes, got {len(data)}", argument="text")
    if len(set(data)) < 16:
        raise CouldNotRun(
            f"{path} must hold at least 16 different bytes, got {len(set(data))}", argument="text"
        )
    return Text(str(path), data)
