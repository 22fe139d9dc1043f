"""SwiGLU, by torch's own silu."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from golden.case import Case


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer (2002.05202) eq. 5-6, by torch's own silu."""
    return F.silu(gate) * up


def cases() -> Iterable[Case]:
    case = Case("swiglu/normal")
    yield case.finish(
        y=swiglu(case.input("gate", 2, 3, 5, std=2), case.input("up", 2, 3, 5, mean=0.5))
    )
    case = Case("swiglu/saturated")
    gate = case.input("gate", values=[[-745.0, -60.0, -9.0, 0.0], [1e-9, 9.0, 60.0, 710.0]])
    yield case.finish(y=swiglu(gate, case.input("up", 2, 4, mean=-0.5)))
