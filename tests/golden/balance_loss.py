"""The balance loss, a sequence at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from golden.case import Case
from golden.router import best


def balance_loss(
    scores: Tensor,
    alpha: float,
    top_k: int,
    counted: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """DeepSeek-V3 eq. 17-20 for each sequence (its tokens alone, not its padding), then the mean of
    the sequences."""
    batch, length, experts = scores.shape
    total = torch.zeros(())
    for b in range(batch):
        tokens = [t for t in range(length) if mask is None or bool(mask[b, t])]
        if not tokens:
            continue
        f, p = [0.0] * experts, torch.zeros(experts)
        for t in tokens:
            s = scores[b, t]
            for i in best(s.tolist(), top_k) if counted is None else counted[b, t].tolist():
                f[i] += experts / (top_k * len(tokens))
            p = p + s / s.sum() / len(tokens)
        total = total + alpha * sum(f[i] * p[i] for i in range(experts))
    return total / batch


def cases() -> Iterable[Case]:
    mask = [[True, True, True, False, False], [False, True, True, True, True], [False] * 5]
    for name, with_mask, with_counts in (
        ("plain", False, False),
        ("padded", True, False),
        ("counted", False, True),
        ("padded_counted", True, True),
    ):
        case = Case(f"balance_loss/{name}", alpha=0.31, top_k=2)
        scores = case.input("scores", values=1 / (1 + np.exp(-case.rng.standard_normal((3, 5, 7)))))
        given = {}
        if with_mask:
            given["mask"] = case.aux("mask", mask)
        if with_counts:
            routes = [
                [case.rng.permutation(5)[:2] for _ in range(5)] for _ in range(3)
            ]  # experts 5 and 6 are empty
            given["counted"] = case.aux("counted", routes)
        yield case.finish(loss=balance_loss(scores, 0.31, 2, **given))
    case = Case("balance_loss/softmax", alpha=0.31, top_k=3)
    values = case.rng.standard_normal((2, 4, 5))
    scores = case.input("scores", values=torch.softmax(torch.tensor(values), -1))
    yield case.finish(loss=balance_loss(scores, 0.31, 3))
