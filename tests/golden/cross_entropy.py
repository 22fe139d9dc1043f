"""Cross-entropy, and the settings that the other losses share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from golden.case import Case


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] of each token; 0 for a target of -100."""
    flat = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return -flat.unflatten(0, targets.shape)


def cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, normaliser: float | None = None
) -> Tensor:
    """The masked (weighted) sum of -log p over the normaliser, by default the sum of the mask (1 if
    that is 0)."""
    weight = torch.ones(targets.shape) if mask is None else mask.to(torch.float64)
    divisor = normaliser if normaliser is not None else float(weight.sum()) or 1.0
    return (
        -(weight * token_log_probs(logits, torch.where(weight == 0, -100, targets))).sum() / divisor
    )


TARGETS = [[3, 0, 3, -100], [3, -100, 6, 2]]
KEPT = [[True, True, True, False], [True, False, True, True]]
WEIGHTS = [[0.5, 2.0, 0.3, 0.0], [1.5, 0.0, 0.7, 1.0]]


def loss_settings() -> Iterable[tuple[str, Any, Any, float | None]]:
    """(name, targets, mask, normaliser) of the two losses' cases."""
    unmasked = [[3, 0, 3, 5], [3, 6, 6, 2]]
    yield "masked", TARGETS, KEPT, None
    yield "weighted", TARGETS, WEIGHTS, None
    yield "normalised", TARGETS, KEPT, 11.5
    yield "unmasked", unmasked, None, None
    yield "nothing_counts", [[-100] * 4] * 2, [[False] * 4] * 2, None


def cases() -> Iterable[Case]:
    for name, targets, mask, normaliser in loss_settings():
        case = Case(f"cross_entropy/{name}", normaliser=normaliser)
        given = {} if mask is None else {"mask": case.aux("mask", mask)}
        logits = case.input("logits", 2, 4, 7, std=3.0)
        loss = cross_entropy(logits, case.aux("targets", targets), normaliser=normaliser, **given)
        yield case.finish(loss=loss)
