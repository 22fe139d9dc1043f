"""A pair of functions of another array library, called with NumPy arrays by way of DLPack.

The way in is the caller's, a function such as ``torch.from_dlpack``; the way out is
``numpy.from_dlpack``, or ``numpy.asarray`` for a library without it. What the functions raise
becomes a `TheirError`, one line that names their own file and line.
"""

from __future__ import annotations

import sysconfig
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import printable

__all__ = ["Called", "Foreign", "TheirError", "to_numpy"]

PACKAGE = str(Path(__file__).parents[1])
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


class TheirError(Exception):
    """What a caller's function did wrong, in one line.

    Args:
        kind: the beginning of the line that other errors of the same place share.
    """

    def __init__(self, line: str, kind: str = "") -> None:
        super().__init__(line)
        self.kind = kind


class Called(NamedTuple):
    """The outputs of a forward as NumPy arrays, and what a backward needs of it."""

    y: list[Any]  # members; None, and what is not an array, as they are
    is_tuple: bool
    saved: Any
    sent: dict[str, tuple[np.ndarray, np.ndarray]]  # memory that they were given, and what it held

    def changed(self) -> list[str]:
        """The arguments that were written to, as far as their arrays share memory with ours."""
        return [
            name
            for name, (now, before) in self.sent.items()
            if not np.array_equal(now, before, equal_nan=before.dtype.kind == "f")
        ]


class Foreign:
    """Their forward and backward.

    Args:
        array: their array from a NumPy array; None if they take NumPy's.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        array: Callable[[Any], Any] | None = None,
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.array = array

    def there(self, x: Any, name: str = "", sent: dict[str, Any] | None = None) -> Any:
        """A NumPy array as theirs, noted in ``sent``; anything else as it is."""
        if not isinstance(x, (np.ndarray, np.generic)):
            return x
        own = np.array(x)  # contiguous, and free to be written to, which DLPack asks for
        if sent is not None:
            sent[name] = (own, own.copy())
        if self.array is None:
            return own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a type that becomes another: `refuses` finds it
            return guarded("array", self.array, own)

    def refuses(self, dtype: str) -> str | None:
        """Why their arrays can't hold the type; None if they can."""
        try:
            back = to_numpy(self.there(np.ones(2, dtype=dtype)))
        except TheirError as error:
            return str(error)
        if back.dtype != np.dtype(dtype):
            return f"array() makes {back.dtype} of {dtype}"
        return None

    def call(self, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Called:
        """Their forward."""
        sent: dict[str, Any] = {}
        given = [self.there(x, name, sent) for name, x in inputs.items()]
        named = {name: self.there(x, name, sent) for name, x in kwargs.items()}
        result = guarded("forward", self.forward, *given, **named)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TheirError(f"forward must return (y, saved), got {type(result).__name__}")
        y, saved = result
        members = y if isinstance(y, (tuple, list)) else (y,)
        found = [self.back(m) for m in members]
        return Called(found, isinstance(y, (tuple, list)), saved, sent)

    def gradients(self, called: Called, cotangents: Mapping[str, np.ndarray]) -> list[Any]:
        """Their backward, from the cotangents of the floating-point outputs."""
        dy = [self.there(c, f"d{name}", called.sent) for name, c in cotangents.items()]
        found = guarded(
            "backward", self.backward, tuple(dy) if called.is_tuple else dy[0], called.saved
        )
        found = found if isinstance(found, (tuple, list)) else (found,)
        return [self.back(g) for g in found]

    @staticmethod
    def back(x: Any) -> Any:
        if x is None or isinstance(x, (str, dict)):
            return x
        return to_numpy(x)


def to_numpy(x: Any) -> np.ndarray:
    """A copy as a NumPy array of numbers; TheirError if that can't be."""
    found: np.ndarray | None = guarded("a result", _copied, x)
    if found is not None:
        return found
    kind = getattr(x, "dtype", "no dtype")
    raise TheirError(f"NumPy can't take a result of type {type(x).__name__} ({kind})")


def _copied(x: Any) -> np.ndarray | None:
    if hasattr(
        x, "detach"
    ):  # torch: one that records gradients, or is on a device, exports nothing
        x = x.detach().cpu()
    tries: list[Callable[[Any], Any]] = []
    if hasattr(x, "__dlpack__"):
        tries += [np.from_dlpack, lambda a: np.from_dlpack(a, device="cpu")]
    if hasattr(x, "get"):  # CuPy
        tries.append(lambda a: a.get())
    tries.append(np.asarray)
    for way in tries:
        try:
            found = np.array(way(x))
        except Exception:  # whatever a library raises: the next way is tried
            continue
        if found.dtype.kind in "biufc":
            return found
    return None


def guarded(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result; TheirError for whatever it raises, Ctrl-C excepted."""
    try:
        return function(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: code that is judged decides nothing
        kind = printable(f"{what} raised at {place(error, function)}: {type(error).__name__}")
        try:
            said = " ".join(str(error).split())
        except Exception:  # of theirs, too
            said = ""
        raise TheirError(printable(f"{kind}: {said}" if said else kind), kind) from error


def place(error: BaseException, function: Callable[..., Any]) -> str:
    """file:line of the deepest frame that is the caller's own: of the function's file, or of no
    library; the function's first line if no frame is."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if not f.filename.startswith(PACKAGE)]
    code = getattr(function, "__code__", None)
    own = [
        f
        for f in frames
        if (code is not None and f.filename == code.co_filename)
        or not f.filename.startswith((*LIBRARIES, "<"))
    ]
    if own or frames:
        frame = (own or frames)[-1]
        return f"{frame.filename}:{frame.lineno}"
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    return getattr(function, "__name__", type(function).__name__)
