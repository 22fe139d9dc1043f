"""The preference loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from golden.case import Case
from golden.linear import linear


def preference_loss(h_chosen: Tensor, h_rejected: Tensor, w: Tensor) -> Tensor:
    """Bradley and Terry: the mean of -ln P(the chosen answer wins), a pair at a time, by torch's
    own logsigmoid."""
    pairs = zip(h_chosen, h_rejected, strict=True)
    wins = [
        F.logsigmoid((linear(better, w) - linear(worse, w)).squeeze(-1)) for better, worse in pairs
    ]
    return -torch.stack(wins).mean()


def cases() -> Iterable[Case]:
    for name, pairs, width, std in (
        ("normal", 4, 5, 1.0),
        ("one_pair", 1, 3, 1.0),
        ("width_one", 3, 1, 2.0),
    ):
        case = Case(f"preference_loss/{name}")
        h = [case.input(which, pairs, width, std=std) for which in ("h_chosen", "h_rejected")]
        yield case.finish(loss=preference_loss(*h, case.input("w", 1, width, mean=0.3)))
    case = Case("preference_loss/saturated")  # margins of -900, -40, -1e-9, 0, 40 and 800
    chosen = case.input(
        "h_chosen",
        values=[[-450.0, 1.0], [-20.0, 0.5], [0.0, 2.0], [3.0, 1.0], [20.0, 0], [400.0, 1]],
    )
    rejected = case.input(
        "h_rejected",
        values=[[0.0, 1.0], [0.0, 0.5], [5e-10, 2], [3.0, 1.0], [0.0, 0.0], [0.0, 1.0]],
    )
    yield case.finish(loss=preference_loss(chosen, rejected, case.input("w", values=[[2.0, -1.5]])))
    case = Case("preference_loss/same_answers")
    same = case.rng.standard_normal((2, 3))
    h = [case.input(which, values=same) for which in ("h_chosen", "h_rejected")]
    yield case.finish(loss=preference_loss(*h, case.input("w", 1, 3)))
