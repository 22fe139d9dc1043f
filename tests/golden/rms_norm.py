"""RMSNorm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from golden.case import Case


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich (1910.07467) eq. 4, eps inside the root."""
    return (
        w * x / torch.sqrt(torch.einsum("...d,...d->...", x, x) / x.shape[-1] + eps).unsqueeze(-1)
    )


def cases() -> Iterable[Case]:
    for name, shape, eps in (
        ("large_eps", (2, 3, 5), 0.1),
        ("zero_eps", (3, 7), 0.0),
        ("width_one", (2, 2, 1), 0.3),
    ):
        case = Case(f"rms_norm/{name}", eps=eps)
        x, w = case.input("x", *shape, mean=0.4), case.input("w", shape[-1], std=0.6, mean=0.7)
        yield case.finish(y=rms_norm(x, w, eps))
