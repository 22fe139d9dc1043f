"""A table of somebody's functions: from ``package.module:table``, or from a Python file."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..check.cases import CASES
from ..errors import CouldNotRun

__all__ = ["TheirTable", "table_from", "table_of_file"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class TheirTable:
    """Somebody's functions by op, and their array from a NumPy array (None for NumPy's own)."""

    pairs: dict[str, tuple[Function, Function]]
    array: Function | None = None

    def select(self, names: Sequence[str]) -> list[str]:
        """The ops to check, in reading order: those named, by default all of the table."""
        unknown = [name for name in names if name not in CASES]
        if unknown:
            raise CouldNotRun(f"unknown op {', '.join(unknown)}; there are {', '.join(CASES)}")
        missing = [name for name in names if name not in self.pairs]
        if missing:
            raise CouldNotRun(f"the table lacks {', '.join(missing)}")
        return [op for op in CASES if op in (names or self.pairs)]


def table_from(place: str) -> TheirTable:
    """The table at ``package.module:table``, a mapping from op to (forward, backward), perhaps with
    an entry ``array``. Modules of the current folder are found.

    CouldNotRun, in one line, if it is missing or not such a mapping.
    """
    name, _, attribute = place.partition(":")
    if not (name and attribute):
        raise CouldNotRun(f"must be package.module:table, got {place}", argument="implementation")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise CouldNotRun(f"{name} can't be imported: {said}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CouldNotRun(f"{name} has no {attribute}")
        found = getattr(found, part)
    if not isinstance(found, Mapping):
        raise CouldNotRun(
            f"{place} must be a mapping from op to (forward, backward), got {type(found).__name__}"
        )
    entries = dict(found)
    array = entries.pop("array", None)
    if array is not None and not callable(array):
        raise CouldNotRun(f"{place}: array must be a function, got {type(array).__name__}")
    unknown = [str(op) for op in entries if op not in CASES]
    if unknown or not entries:
        said = f"unknown op {', '.join(unknown)}" if unknown else "no op in it"
        raise CouldNotRun(f"{place}: {said}; there are {', '.join(CASES)}")
    for op, pair in entries.items():
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(map(callable, pair))):
            raise CouldNotRun(f"{place}: {op} must be (forward, backward), got {pair!r:.60}")
    return TheirTable({op: (pair[0], pair[1]) for op, pair in entries.items()}, array)


def table_of_file(op: str, module: ModuleType, path: Path) -> TheirTable | None:
    """The table of a file's module that defines ``<op>_forward`` and ``<op>_backward``, perhaps
    with ``array``; None if it has no forward, for our own to be taken."""
    forward, backward = (getattr(module, f"{op}_{way}", None) for way in ("forward", "backward"))
    array = getattr(module, "array", None) if hasattr(module, "array") else None
    if callable(forward) and getattr(forward, "__module__", "") == module.__name__:
        if not callable(backward):
            raise CouldNotRun(f"{path} must define {op}_backward(dy, saved)")
        return TheirTable({op: (forward, backward)}, array if callable(array) else None)
    if callable(array) and getattr(array, "__module__", "") != "numpy":
        raise CouldNotRun(f"{path} must also define {op}_forward: our own saves NumPy's arrays")
    return None
