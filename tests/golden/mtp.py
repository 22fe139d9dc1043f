"""Multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from golden.case import Case
from golden.linear import linear
from golden.rms_norm import rms_norm


def mtp(
    hidden: Tensor,
    embedded: Tensor,
    w_hnorm: Tensor,
    w_enorm: Tensor,
    w_proj: Tensor,
    eps: float,
    order: str,
) -> Tensor:
    """DeepSeek-V3 eq. 21, as two half-width products; the order says which half of the columns is
    whose."""
    width = hidden.shape[-1]
    first, second = w_proj[:, :width], w_proj[:, width:]
    h, e = rms_norm(hidden, w_hnorm, eps), rms_norm(embedded, w_enorm, eps)
    if order == "hidden_embedding":
        return linear(h, first) + linear(e, second)
    return linear(e, first) + linear(h, second)


def mtp_pairs(
    tokens: Tensor, targets: Tensor, mask: Tensor, depth: int, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Module ``depth`` at position i reads token i + depth and predicts the one after that, within
    one document."""
    batch, length = tokens.shape
    read, predicted, counts = ([[0] * (length - depth) for _ in range(batch)] for _ in range(3))
    for b in range(batch):
        for i in range(length - depth):
            read[b][i] = int(tokens[b, i + depth])
            predicted[b][i] = int(targets[b, i + depth])
            joined = segments is None or int(segments[b, i]) == int(segments[b, i + depth])
            counts[b][i] = int(joined and bool(mask[b, i + depth]))
    return torch.tensor(read), torch.tensor(predicted), torch.tensor(counts).bool()


def cases() -> Iterable[Case]:
    for order in ("embedding_hidden", "hidden_embedding"):
        case = Case(f"mtp/{order}", eps=0.1, order=order)
        inputs = [case.input(name, 2, 3, 5) for name in ("hidden", "embedding")]
        norms = [case.input(name, 5, std=0.5, mean=0.8) for name in ("w_hnorm", "w_enorm")]
        yield case.finish(h=mtp(*inputs, *norms, case.input("w_proj", 5, 10), 0.1, order))
    for depth, packed in ((1, False), (1, True), (2, True)):
        case = Case(f"mtp/pairs_{depth}{'_packed' if packed else ''}", depth=depth)
        tokens, targets = (
            case.integers("tokens", 0, 50, 2, 7),
            case.integers("targets", 0, 50, 2, 7),
        )
        mask = case.aux("mask", case.rng.random((2, 7)) < 0.7)
        segments = (
            case.aux("segments", [[0, 0, 0, 1, 1, 1, 1], [3, 3, 5, 5, 5, 5, 3]]) if packed else None
        )
        read, predicted, counts = mtp_pairs(tokens, targets, mask, depth, segments)
        yield case.finish(tokens=read, targets=predicted, mask=counts)
