"""Experts and rows come one at a time, and what they add up to is in order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint.source import MemorySource
from refimpl.grads import Request, write_gradients
from refimpl.grads.lazy import ROWS, Rows, sum_in_blocks

from grads.examples import RNG, TINY, TOKENS
from random_parameters import random_parameters


def test_no_stack_of_experts_is_read(tmp_path: Path) -> None:
    """Experts come one by one, of the embedding only the rows that occur, and in the backward each
    expert once."""
    config, params = replace(TINY, mtp_depth=0), random_parameters(replace(TINY, mtp_depth=0))
    asked: list[tuple[str, Any]] = []

    class Watched(MemorySource):
        def tensor(self, name: str) -> np.ndarray:
            asked.append((name, None))
            return super().tensor(name)

        def piece(self, name: str, index: Any) -> np.ndarray:
            asked.append((name, index))
            return super().piece(name, index)

    write_gradients(Watched(params, config), Request(TOKENS), tmp_path / "out")
    stacks = [(name, index) for name, index in asked if ".experts." in name]
    assert all(isinstance(index, int) for _, index in stacks)
    assert max(stacks.count(entry) for entry in stacks) == 2
    rows = [index for name, index in asked if name == "model.embed_tokens.weight"]
    assert len(rows) == 1
    assert np.array_equal(rows[0], np.unique(TOKENS))


def test_rows_are_summed_in_order() -> None:
    """Blocks of a sum of lookups and of whole tables are the rows of the whole sum."""
    ids, values = RNG.integers(0, 2 * ROWS + 3, 50), RNG.normal(size=(50, 4))
    table = RNG.normal(size=(2 * ROWS + 3, 4))
    whole = table.copy()
    np.add.at(whole, ids, values)
    found = np.concatenate(
        [block for _, block in sum_in_blocks([table, Rows(ids, values)], len(table))]
    )
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-14)
