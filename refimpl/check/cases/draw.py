"""The draws that choose a case, the record of a case, and the random arrays in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = [
    "Case",
    "Draw",
    "RandomDraw",
    "activations",
    "flags",
    "norm_weight",
    "random_mask",
    "weight",
]


class Draw(Protocol):
    """Where a case takes its choices from."""

    rng: np.random.Generator

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, options: Sequence[Any]) -> Any: ...

    def tokens(self, shape: tuple[int, ...], vocabulary: int) -> np.ndarray: ...


class RandomDraw:
    """Choices from a seed; tokens from ``text`` (bytes), windows of it at random places, or random
    without text."""

    def __init__(self, seed: int, text: bytes | None = None) -> None:
        self.rng, self.text = np.random.default_rng(seed), text

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def tokens(self, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
        if self.text is None:
            return self.rng.integers(0, vocabulary, shape)
        rows, length = int(np.prod(shape[:-1])), shape[-1]
        starts = self.rng.integers(0, max(len(self.text) - length, 0) + 1, rows)
        data = np.frombuffer(self.text, dtype=np.uint8)
        windows = [np.resize(data[start : start + length], length) for start in starts]
        return np.stack(windows).reshape(shape).astype(np.int64) % vocabulary


@dataclass
class Case:
    """One set of inputs of an op."""

    inputs: tuple[np.ndarray | None, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    regimes: set[str] = field(default_factory=set)
    replay: Callable[[Any], Mapping[str, Any]] | None = None


def flags(**flags: Any) -> set[str]:
    """The regimes that hold."""
    return {name for name, on in flags.items() if on}


def activations(draw: Draw, b: int, t: int, d: int, scale: float = 1.0) -> np.ndarray:
    """Rows of a random embedding table for tokens of the text, with a little noise: [b, t, d]."""
    table = draw.rng.normal(size=(256, d))
    x: np.ndarray = scale * (
        table[draw.tokens((b, t), 256)] + 0.3 * draw.rng.normal(size=(b, t, d))
    )
    return x


def weight(draw: Draw, *shape: int) -> np.ndarray:
    """A matrix that keeps the size of what it multiplies, or several of them."""
    w: np.ndarray = draw.rng.normal(size=shape) / np.sqrt(shape[-1])
    return w


def norm_weight(draw: Draw, d: int) -> np.ndarray:
    """The weight of a norm, off its neutral value 1: of size 0.5 to 1.5, of either sign."""
    w: np.ndarray = draw.rng.uniform(0.5, 1.5, d) * draw.rng.choice([-1, 1], d)
    return w


def random_mask(draw: Draw, *shape: int) -> np.ndarray:
    """Some True, some False where there is room for both."""
    mask = draw.rng.random(shape) < 0.6
    mask.reshape(-1)[draw.rng.integers(mask.size)] = True
    if mask.size > 1:
        mask.reshape(-1)[(np.argmax(mask) + 1) % mask.size] = False
    return mask
