"""Small models and batches, drawn: for the tests of splits, within a process and over several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.config import Conventions, ModelConfig, preset

SMALL = replace(
    preset("tiny"),
    vocabulary=31,
    width=9,
    q_latent=5,
    heads=2,
    layers=2,
    dense_layers=1,
    balance_weight=0.3,
)


def drawn(data: st.DataObject) -> tuple[ModelConfig, dict[str, Any], np.random.Generator]:
    """A config and a batch, with padding and packed documents in some."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    choose = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    conventions = Conventions(
        mtp_normaliser=choose("positions", "valid", "main"),
        mtp_hidden=choose("normed", "raw", "raw_first", "normed_first"),
        balance_counts=choose("unbiased", "routed"),
        mtp_zero_first_embedding=choose(True, False),
        target_after_padding=choose(True, False),
    )
    config = replace(SMALL, mtp_depth=choose(0, 1, 2), conventions=conventions)
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 8))
    arrays: dict[str, Any] = {"tokens": rng.integers(0, 31, (rows, length))}
    if choose(True, False):
        real = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
        arrays["key_mask"] = real if choose(True, False) else real[:, ::-1]
    if choose(True, False):
        arrays["segments"] = np.sort(rng.integers(0, 3, (rows, length)), axis=1)
    if choose(True, False):
        arrays["targets"] = rng.integers(0, 31, (rows, length))
        arrays["mask"] = rng.random((rows, length)) < 0.7
    return config, arrays, rng


def cuts(data: st.DataObject, length: int, parts: int | None = None) -> list[int]:
    """Where so many parts of 0 … length end but the last; None: of one to four parts."""
    sizes = {"max_size": 3} if parts is None else {"min_size": parts - 1, "max_size": parts - 1}
    return sorted(data.draw(st.lists(st.integers(0, length), **sizes)))


def cut_rows(data: st.DataObject, rows: int, parts: int | None = None) -> list[int]:
    """The sizes of those parts; some may be empty."""
    ends = cuts(data, rows, parts)
    return [b - a for a, b in zip([0, *ends], [*ends, rows], strict=True)]
