"""Ops that compute on a device and are given, and give, NumPy's arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..array import Array
from ..ops import LEAVES, REFERENCE, AnyOp, Op, Ops

__all__ = ["on_host", "placed"]

Place = Callable[[Any], Array]


def moved(x: Any, place: Place) -> Any:
    """NumPy's arrays, within dicts and tuples too, by ``place``."""
    if isinstance(x, (np.ndarray, np.generic)):
        return place(x)
    if isinstance(x, dict):
        return {key: moved(value, place) for key, value in x.items()}
    if isinstance(x, tuple):
        found = (moved(value, place) for value in x)
        return type(x)(*found) if hasattr(x, "_fields") else tuple(found)
    return x


def fetched(x: Any) -> Any:
    """Arrays of the device, within dicts and tuples too, as NumPy's."""
    if isinstance(x, dict):
        return {key: fetched(value) for key, value in x.items()}
    if isinstance(x, tuple):
        return type(x)(*map(fetched, x)) if hasattr(x, "_fields") else tuple(map(fetched, x))
    return x.get() if hasattr(x, "get") and hasattr(x, "dtype") else x


def placed(pair: AnyOp, place: Place) -> AnyOp:
    """The pair run on another device, to which ``place`` moves an array, from and to NumPy
    arrays. What it saves stays there."""

    def forward(*inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        y, saved = pair.forward(*(moved(x, place) for x in inputs), **moved(kwargs, place))
        return fetched(y), saved

    return Op(forward, lambda dy, saved: fetched(pair.backward(moved(dy, place), saved)))


class OnDevice:
    """What an op saved there; its fields are fetched when they are read."""

    def __init__(self, saved: Any) -> None:
        self.saved = saved

    def __getattr__(self, name: str) -> Any:
        return fetched(getattr(self.saved, name))

    def __iter__(self) -> Iterator[Any]:
        return iter(fetched(tuple(self.saved)))


def on_host(table: Ops, place: Place) -> Ops:
    """A table for NumPy's arrays: each leaf of ``table`` moves what it is given to the device and
    fetches what it gives, so memory there holds what a block's ops save, not a model."""

    def of(op: AnyOp) -> AnyOp:
        pair = placed(op, place)

        def forward(*inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
            y, saved = pair.forward(*inputs, **kwargs)
            return y, OnDevice(saved)

        def backward(dy: Any, saved: Any) -> Any:
            kept = saved.saved if isinstance(saved, OnDevice) else moved(saved, place)
            return pair.backward(dy, kept)

        return Op(forward, backward)

    return REFERENCE | {name: of(table[name]) for name in LEAVES}
