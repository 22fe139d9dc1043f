"""RMSNorm, DeepSeek-V3's only normalisation: y = w ∘ x / √(mean(x²) + eps), over the last axis.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (1910.07467) eq. 4, with eps inside
the root as in DeepSeek's inference code. Derivation: derivations/rms_norm.md. Letters: D width;
``…`` any leading dimensions.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from ..array import Array, expect, expect_that, finite, last, namespace

__all__ = ["RMSNormSaved", "rms_norm_backward", "rms_norm_forward"]


class RMSNormSaved(NamedTuple):
    """What `rms_norm_forward` keeps for `rms_norm_backward`."""

    x: Array  # […, D]: the normalised rows are recomputed from it, x r
    w: Array  # [D]
    r: Array  # […, 1]: 1 / rms, the only sum over D that forward and backward share


def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, RMSNormSaved]:
    """y = w ∘ x r with r = 1 / √(mean(x²) + eps), for ``x`` […, D] and ``w`` [D]; returns y […, D].

    Where Σ x² + eps overflows, y and all gradients of the row are NaN.
    """
    xp, eps = namespace(x=x, w=w), float(eps)
    check_rms_norm(x, w, eps)
    mean = xp.sum(x * x, axis=-1, keepdims=True) / x.shape[-1]
    r = 1 / xp.sqrt(finite(mean + eps))  # (rms_norm.1)
    return x * r * w, RMSNormSaved(x, w, r)  # (rms_norm.2)


def rms_norm_backward(dy: Array, saved: RMSNormSaved) -> tuple[Array, Array]:
    """Gradients (dx […, D], dw [D]) from ``dy`` […, D]."""
    x, w, r = saved
    xp = namespace(dy=dy, x=x)
    expect("dy", dy, "(…, D)", tuple(x.shape))
    n = x * r
    dn = dy * w  # (rms_norm.3)
    dx = r * (dn - n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1]))  # (rms_norm.4)
    dw = xp.sum(xp.reshape(dy * n, (-1, x.shape[-1])), axis=0)  # (rms_norm.5)
    return dx, dw


def check_rms_norm(x: Array, w: Array, eps: float) -> None:
    """ValueError unless what `rms_norm_forward` is given fits together."""
    expect("w", w, "(D,)", (last(x, "x"),))
    expect_that(isfinite(eps) and eps >= 0, f"eps must be a finite number of at least 0, got {eps}")
