"""A right pair, and its inputs, that the checker's tests break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(5, 4))
Pass = Callable[..., Any]


def forward(x: Any, w: Any) -> tuple[Any, Any]:
    """A user's pair: y = exp(x) wᵀ."""
    e = np.exp(x)
    return e @ w.T, (e, w)


def backward(dy: Any, saved: Any) -> tuple[Any, Any]:
    e, w = saved
    return (dy @ w) * e, dy.reshape(-1, dy.shape[-1]).T @ e.reshape(-1, e.shape[-1])
