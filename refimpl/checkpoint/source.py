"""What parameters are read from, a piece at a time: a checkpoint on disk, or arrays in memory
(`MemorySource`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..config import ModelConfig
from ..parameters import EMBEDDING

__all__ = ["MemorySource", "Source"]


class Source(Protocol):
    """Parameters under the names of `parameter_shapes` (a layer's experts stacked), as NumPy arrays
    of ``dtype``.

    Gate biases are float32 at least: they choose experts, and a rounded one chooses others.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def tensor(self, name: str) -> np.ndarray:
        """All of a tensor."""
        ...

    def piece(self, name: str, index: Any) -> np.ndarray:
        """``tensor[index]`` along the first axis, reading no more: an int (an expert), a slice, an
        integer array."""
        ...

    def stored(self, name: str, expert: int | None) -> np.ndarray | None:
        """A tensor, or that of one expert, in the type it is stored in, not copied; None where
        `tensor` and `piece` alone have its numbers."""
        ...


class MemorySource:
    """A flat dict of parameters as a `Source`."""

    def __init__(self, params: Mapping[str, np.ndarray], config: ModelConfig) -> None:
        self.params, self.config = params, config
        self.dtype = params[EMBEDDING].dtype

    def tensor(self, name: str) -> np.ndarray:
        return self.params[name]

    def piece(self, name: str, index: Any) -> np.ndarray:
        return np.asarray(self.params[name][index])

    def stored(self, name: str, expert: int | None) -> None:
        """There is no other than `piece`."""
