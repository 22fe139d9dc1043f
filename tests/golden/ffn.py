"""The feed-forward network."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from golden.case import Case
from golden.linear import linear
from golden.swiglu import swiglu


def ffn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """W_down (silu(W_gate x) ∘ (W_up x))."""
    return linear(swiglu(linear(x, w_gate), linear(x, w_up)), w_down)


def cases() -> Iterable[Case]:
    for name, lead in (("three_axes", (2, 3)), ("two_axes", (4,))):
        case = Case(f"ffn/{name}")
        x = case.input("x", *lead, 5)
        weights = [
            case.input(w, *shape)
            for w, shape in (("w_gate", (7, 5)), ("w_up", (7, 5)), ("w_down", (5, 7)))
        ]
        yield case.finish(y=ffn(x, *weights))
