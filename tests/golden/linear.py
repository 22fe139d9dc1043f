"""The linear map, as the sum that it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from golden.case import Case


def linear(x: Tensor, w: Tensor) -> Tensor:
    """y_o = Σ_i w_oi x_i, as the sum that it is."""
    return (w * x.unsqueeze(-2)).sum(-1)


def cases() -> Iterable[Case]:
    for name, lead in (("three_axes", (2, 3)), ("one_row", (1,)), ("four_axes", (2, 1, 3))):
        case = Case(f"linear/{name}")
        yield case.finish(y=linear(case.input("x", *lead, 5), case.input("w", 4, 5)))
