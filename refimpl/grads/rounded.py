"""bfloat16 without an op that computes in it: every op rounds what it returns, forward and
backward; inside, and what it saves, is float32."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..ops import AnyOp, Op

__all__ = ["round_bfloat16", "rounded"]


def round_bfloat16(x: Any) -> Any:
    """The floating arrays in ``x``, a tuple or an array, rounded to bfloat16's values and stored as
    they were; all else as it is."""
    if isinstance(x, tuple):
        parts = [round_bfloat16(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, np.ndarray | np.floating) and x.dtype.kind == "f":
        return np.asarray(x).astype(ml_dtypes.bfloat16).astype(x.dtype)
    return x


def rounded(op: AnyOp) -> AnyOp:
    """``op``, whose outputs and gradients are rounded; what it saves is not."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        return round_bfloat16(y), saved

    def backward(dy: Any, saved: Any) -> Any:
        return round_bfloat16(op.backward(dy, saved))

    return Op(forward, backward)
