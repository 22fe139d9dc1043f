"""Losses of held-out text: of a model, in all and by position, and of a bigram model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..array import Array
from ..config import ModelConfig
from ..generate.sampler import to_numpy
from ..model import forward
from ..parameters import head_name
from .machine import Machine
from .packing import Examples, Windows

__all__ = ["bigram_loss", "held_out_loss", "position_losses", "spread"]

MOST = 32_768  # tokens that a loss is measured on
AT_A_TIME = 4_096  # tokens of a forward


def held_out_loss(
    params: Mapping[str, Array], windows: Windows, config: ModelConfig, machine: Machine
) -> float:
    """The mean loss per token of the first windows, in nats, without MTP."""
    total, counted = _sums(params, _first(windows), config, machine)
    return float(total.sum() / max(counted.sum(), 1))


def position_losses(
    params: Mapping[str, Array], examples: Examples, config: ModelConfig, machine: Machine
) -> np.ndarray:
    """The mean loss at each position [T] of the rows, in nats, without MTP; 0 where none counts."""
    total, counted = _sums(params, examples, config, machine)
    return np.asarray(total / np.maximum(counted, 1))


def _first(windows: Windows) -> Examples:
    """As many windows as a loss is measured on."""
    return windows.take(np.arange(max(min(len(windows), MOST // windows.length), 1)))


def _sums(
    params: Mapping[str, Array], examples: Examples, config: ModelConfig, machine: Machine
) -> tuple[np.ndarray, np.ndarray]:
    """At each position [T] the losses of all rows together, and how many targets count."""
    rows, length = examples.tokens.shape
    size = max(AT_A_TIME // length, 1)
    total, counted = np.zeros(length), np.zeros(length)
    for start in range(0, rows, size):
        some = examples.rows(start, start + size)
        arrays: dict[str, Any] = {name: machine.place(x) for name, x in some.arrays().items()}
        targets, mask = arrays.pop("targets"), arrays.pop("mask", None)
        output, _ = forward(params, config=config, ops=machine.ops, with_loss=False, **arrays)
        found, _ = machine.ops.log_prob.forward(
            output.hidden, params[head_name(config)], targets=targets, mask=mask
        )
        total -= to_numpy(found).sum(axis=0, dtype=np.float64)
        counted += len(some.tokens) if some.mask is None else some.mask.sum(axis=0)
    return total, counted


def spread(stream: np.ndarray, length: int, count: int) -> Examples:
    """``count`` rows of ``length`` that begin evenly over a ``stream`` [tokens], overlapping: then
    each position is measured on nearly the same tokens."""
    last = len(stream) - length - 1
    if last < 0:
        raise ValueError(f"length must be at most {len(stream) - 1}, got {length}")
    starts = np.unique(np.linspace(0, last, count).astype(np.int64))
    places = starts[:, None] + np.arange(length)
    return Examples(stream[places], stream[places + 1])


def bigram_loss(train: Windows, test: Windows, vocabulary: int) -> float:
    """The loss per token of the bigram model of the training text, one added to each count, on the
    tokens that `held_out_loss` reads."""
    first = np.bincount(train.stream[:-1], minlength=vocabulary)
    pairs, counts = np.unique(train.stream[:-1] * vocabulary + train.stream[1:], return_counts=True)
    tokens, targets, mask, *_ = _first(test)
    wanted = tokens * vocabulary + targets
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    losses = -np.log((seen + 1) / (first[tokens] + vocabulary))
    return float(losses.mean() if mask is None else losses[mask].mean())
