"""Our model on a Hugging Face checkpoint, and the comparison with another implementation's values;
torch not needed.

An array agrees if its largest error is at most a bound times the largest value of the other: 1e-12
for logits and loss, 1e-11 for a gradient, where 1e-15 of the model's largest gradient will do, too
(a gradient may be rounding alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from refimpl.checkpoint import Checkpoint
from refimpl.config import CONVENTIONS, ModelConfig
from refimpl.model import backward, forward, logits

GOLDEN = Path(__file__).parent / "checkpoints"
LEFT = Path(__file__).parent / "left_padding"  # transformers' float32 on a batch padded in front
MODEL_TYPES = Path(__file__).parent / "model_types"  # Kimi-K2, GLM-4.7-Flash, fused experts
TRAINED = Path(__file__).parent / "trained"
LOGITS = 1e-12
GRADIENT = 1e-11
OF_LARGEST = 1e-15
SUMS = 8  # that a sketch keeps
SMALLEST_GAP = (
    1e-5  # a choice decided by less could go the other way in another implementation's rounding
)

Arrays = dict[str, np.ndarray]


class Values(NamedTuple):
    """What an implementation computed."""

    logits: np.ndarray  # [B, T, W]
    loss: float
    grads: Arrays  # under our names


def read_checkpoint(folder: Path) -> tuple[ModelConfig, Arrays]:
    """The configuration under the convention ``hf`` without MTP and balance loss, and the
    parameters in float64."""
    checkpoint = Checkpoint.open(folder, dtype="float64", conventions=CONVENTIONS["hf"], mtp=False)
    return replace(checkpoint.config, balance_weight=0.0), checkpoint.load()


def our_values(
    params: Mapping[str, np.ndarray], tokens: np.ndarray, config: ModelConfig, **inputs: Any
) -> Values:
    """Logits, loss and gradients of `refimpl.model`."""
    output, saved = forward(params, tokens, config, **inputs)
    return Values(logits(params, output.hidden), float(output.loss), backward(saved))


def sketch(x: np.ndarray) -> np.ndarray:
    """Eight weighted sums of ``x``: the values themselves where there are no more than eight."""
    flat = np.asarray(x, dtype=np.float64).ravel()
    if flat.size <= SUMS:
        return flat
    return np.cos(np.outer(np.arange(1, SUMS + 1), np.arange(flat.size))) @ flat


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest error over the largest value, NaN if either has one."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = float(np.max(np.abs(ours - theirs), initial=0.0))
    return error / (float(np.max(np.abs(theirs), initial=0.0)) or 1.0)


def errors(ours: Values, theirs: Values, at: np.ndarray | None = None) -> tuple[float, float, str]:
    """The worst relative error of logits (where ``at`` [B, T] is true) and loss; that of the
    gradients, and its name.

    A gradient that differs by at most 1e-15 of the model's largest counts as equal.
    """
    at = np.ones(ours.logits.shape[:2], bool) if at is None else at
    forward_error = max(
        relative_error(ours.logits[at], theirs.logits[at]), relative_error(ours.loss, theirs.loss)
    )
    assert ours.grads.keys() == theirs.grads.keys()
    floor = OF_LARGEST * max(float(np.max(np.abs(g), initial=0.0)) for g in theirs.grads.values())
    worst, where = 0.0, ""
    for name, gradient in theirs.grads.items():
        difference = float(np.max(np.abs(ours.grads[name] - gradient), initial=0.0))
        error = 0.0 if difference <= floor else relative_error(ours.grads[name], gradient)
        if not error <= worst:
            worst, where = error, name
    return forward_error, worst, where


def assert_agree(ours: Values, theirs: Values, at: np.ndarray | None = None) -> tuple[float, float]:
    """Assert the bounds; returns the two errors."""
    forward_error, gradient_error, name = errors(ours, theirs, at)
    assert forward_error <= LOGITS, f"logits or loss differ by {forward_error:.1e}"
    assert gradient_error <= GRADIENT, f"the gradient of {name} differs by {gradient_error:.1e}"
    return forward_error, gradient_error


def golden_values(folder: Path) -> tuple[Arrays, Values]:
    """Our model's inputs (tokens, key_mask), and what transformers computed from them."""
    stored = load_file(folder / "outputs.safetensors")
    inputs = {
        name.removeprefix("aux/"): array
        for name, array in stored.items()
        if name.startswith("aux/")
    }
    grads = {
        name.removeprefix("grad/"): array
        for name, array in stored.items()
        if name.startswith("grad/")
    }
    return inputs, Values(stored["out/logits"], float(stored["out/loss"]), grads)
