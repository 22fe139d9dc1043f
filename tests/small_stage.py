"""What the tests of the stages share: a small model that reads bytes and tags, in float64 by the
reference, and a checkpoint that begins with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.config import ModelConfig, preset
from refimpl.train.machine import open_machine
from refimpl.train.stage import Begin
from refimpl.train.vocabulary import make_vocabulary

from random_parameters import random_parameters

MACHINE = open_machine("numpy", "reference", "float64")
CONFIG = replace(preset("tiny"), vocabulary=261, layers=2, mtp_depth=1, max_positions=64, yarn=None)
COMMON = {"implementation": "reference", "dtype": "float64"}
MODEL = {
    name: getattr(CONFIG, name)
    for name in (
        "width",
        "heads",
        "q_latent",
        "kv_latent",
        "nope",
        "rope",
        "value",
        "dense_hidden",
        "expert_hidden",
        "experts",
        "top_k",
    )
}


def begin(config: ModelConfig = CONFIG, **changed: Any) -> Begin:
    """A checkpoint that was never written."""
    config = replace(config, **changed)
    return Begin(MACHINE.placed(random_parameters(config)), config, make_vocabulary())


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def far(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two sets of tensors, by the largest number of each tensor."""
    assert a.keys() == b.keys()
    return max(float(np.max(np.abs(a[n] - b[n])) / (np.max(np.abs(b[n])) or 1.0)) for n in a)
