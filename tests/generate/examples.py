"""What the tests of generation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from refimpl.check.cases import model_variant
from refimpl.checkpoint import Checkpoint
from refimpl.config import ModelConfig, preset
from refimpl.model import forward, logits

from golden.checkpoint_values import TRAINED

TINY = preset("tiny")
CONFIGS = {"tiny": TINY, "variant": replace(model_variant(TINY, TINY.conventions), yarn=TINY.yarn)}
PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3, 2, 1], [40, 41, 42], [250, 3, 3, 60, 61, 62]]
DEPTH3 = replace(TINY, mtp_depth=3)
CHAINS = {
    "official": {},
    "paper": {"mtp_order": "hidden_embedding"},
    "raw": {"mtp_hidden": "raw", "mtp_zero_first_embedding": True},
    "raw_first": {"mtp_hidden": "raw_first"},
    "normed_first": {"mtp_hidden": "normed_first"},
}


def whole(params: dict[str, np.ndarray], tokens: Sequence[int], config: ModelConfig) -> np.ndarray:
    """The logits [T, W] of one forward over all tokens, without a cache."""
    return logits(params, forward(params, np.array([tokens]), config, with_loss=False)[0].hidden)[0]


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.max(np.abs(got - wanted)) <= 1e-12 * np.max(np.abs(wanted)))


@cache
def trained_model() -> tuple[dict[str, np.ndarray], ModelConfig]:
    """The small model that was trained on text, in float64."""
    checkpoint = Checkpoint.open(TRAINED, dtype="float64")
    return checkpoint.load(), checkpoint.config
