"""Losses of text that a model was not trained on: in all, by position, and a bigram's to beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..array import Array
from ..config import ModelConfig
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
    count = max(min(len(windows), MOST // windows.length), 1)
    examples = windows.take(np.arange(count))
    return float(position_losses(params, examples, config, machine).mean())


def position_losses(
    params: Mapping[str, Array], examples: Examples, config: ModelConfig, machine: Machine
) -> np.ndarray:
    """The mean loss at each position [T] of the rows, in nats, without MTP."""
    rows, length = examples.tokens.shape
    size = max(AT_A_TIME // length, 1)
    total, counted = np.zeros(length), np.zeros(length)
    for start in range(0, rows, size):
        some = examples.rows(start, start + size)
        arrays = {name: machine.place(x) for name, x in some.arrays().items()}
        targets, mask = arrays.pop("targets"), arrays.pop("mask", None)
        output, _ = forward(params, config=config, ops=machine.ops, with_loss=False, **arrays)
        found, _ = machine.ops.log_prob.forward(
            output.hidden, params[head_name(config)], targets=targets, mask=mask
        )
        total -= machine.fetched({"found": found})["found"].sum(axis=0, dtype=np.float64)
        counted += len(some.tokens) if some.mask is None else some.mask.sum(axis=0)
    return total / np.maximum(counted, 1)


def spread(stream: np.ndarray, length: int, count: int) -> Examples:
    """``count`` rows of ``length`` that begin evenly over a stream of tokens, overlapping: then
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
    counts = np.ones((vocabulary, vocabulary))
    np.add.at(counts, (train.stream[:-1], train.stream[1:]), 1)
    p = counts / counts.sum(axis=1, keepdims=True)
    end = min(len(test), MOST // test.length) * test.length
    return float(-np.log(p[test.stream[:end], test.stream[1 : end + 1]]).mean())
