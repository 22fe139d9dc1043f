"""Parameters that are read when they are used, and not kept.

A `LazyTensor` is an array in all but memory: an op of NumPy that is given one makes an array of it
for as long as it needs one. The files are mapped, so what is read lies in the system's file cache
in its own type (bfloat16: 2 bytes per number), is dropped from it where memory is short, and comes
from the disk again when it is next used. Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..parameters import EMBEDDING, GATE, is_stacked, parameter_shapes
from .source import Source
from .tensor_file import DTYPES

__all__ = ["LazyParameters", "LazyTensor"]


class LazyTensor:
    """A parameter, or one expert of a stack, whose numbers are read when they are asked for:
    ``w[rows]`` along the first axis, ``w[expert]`` as another `LazyTensor`, the whole by
    ``np.asarray(w)``.

    To `refimpl.array` it is a NumPy array of the source's type.
    """

    device = "cpu"

    def __init__(
        self, source: Source, name: str, shape: tuple[int, ...], expert: int | None = None
    ) -> None:
        self.source, self.name = source, name
        self.whole, self.expert = shape, expert
        self.shape = shape if expert is None else shape[1:]
        self.ndim, self.size = len(self.shape), prod(self.shape)
        self.dtype = source.dtype

    def __array_namespace__(self, *, api_version: str | None = None) -> ModuleType:
        return np

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All numbers: the file's own, read-only, if it has them in the type that is wanted."""
        stored = self.stored()
        if stored is None or stored.dtype != self.dtype or not stored.flags.aligned:
            stored = self.source.piece(
                self.name, slice(None) if self.expert is None else self.expert
            )
        return np.array(stored, dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and len(index) == 2 and index[1] is Ellipsis:
            index = index[0]
        if self.expert is not None or isinstance(index, tuple):
            return np.asarray(self)[index]
        if isinstance(index, (int, np.integer)) and is_stacked(self.name):
            return LazyTensor(self.source, self.name, self.whole, int(index))
        return self.source.piece(self.name, index)

    def take(self, indices: Any, axis: int | None = None, **given: Any) -> np.ndarray:
        """As `numpy.take`, which calls it: along the first axis only these rows are read, each
        once."""
        if axis != 0 or self.expert is not None:
            return np.asarray(np.take(np.asarray(self), indices, axis=axis, **given))
        distinct, place = np.unique(indices, return_inverse=True)
        rows = self.source.piece(self.name, distinct)
        return np.asarray(rows[place.reshape(np.shape(indices))])

    def stored(self) -> np.ndarray | None:
        """The numbers in the type they are stored in, mapped; None where `numpy.asarray` alone
        makes them."""
        return self.source.stored(self.name, self.expert)

    @property
    def bits(self) -> np.ndarray | None:
        """bfloat16's 16 bits as uint16, mapped; None where the numbers are stored otherwise."""
        stored = self.stored()
        if stored is None or stored.dtype != DTYPES["BF16"] or not stored.flags.aligned:
            return None
        return np.asarray(stored.view(np.uint16))


class LazyParameters(Mapping[str, Any]):
    """A model's parameters, each read when it is asked for and not kept: the embedding table and
    the stacks of experts as a `LazyTensor`, the others as arrays.

    Args:
        matrices: so is every other matrix but the gates', which only `linear` and MLA multiply by.
    """

    def __init__(self, source: Source, config: ModelConfig, *, matrices: bool = False) -> None:
        self.source, self.shapes = source, parameter_shapes(config)
        self.matrices = matrices

    def __getitem__(self, name: str) -> Any:
        shape = self.shapes[name]
        matrix = self.matrices and len(shape) == 2 and not name.endswith(f".{GATE}")
        if name == EMBEDDING or is_stacked(name) or matrix:
            return LazyTensor(self.source, name, shape)
        return self.source.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
