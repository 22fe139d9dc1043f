"""Rotary position embedding, with YaRN's frequencies and softmax correction.

Pair i of a head is turned by the angle position · inv_freq[i]. Two layouts hold the same pairs:
``interleaved`` puts pair i at (2i, 2i+1), as DeepSeek's checkpoints do; ``halves`` puts it at (i, i
+ R/2). A rotation's inverse is its transpose, so the backward turns the other way. Sources: Su et
al., RoFormer (2104.09864) eq. 34; Peng et al., YaRN (2309.00071) sections 3.2 and 3.4; DeepSeek-V3
(2412.19437) section 4.3. Derivation: derivations/rope.md. Letters: B batch, T position, H heads, R
rotated width.
"""

from __future__ import annotations

from math import ceil, floor, isfinite, log, pi
from typing import Any, NamedTuple

from ..array import Array, cast, expect, expect_some, expect_that, is_wide, namespace
from .choices import Layout, expect_choice

__all__ = [
    "RoPESaved",
    "Yarn",
    "check_yarn",
    "rope_backward",
    "rope_forward",
    "rope_frequencies",
    "yarn_mscale",
    "yarn_softmax_factor",
]


SMALLEST = 2.0**-126  # normal number of float32


class Yarn(NamedTuple):
    """YaRN's settings, named as in the checkpoints' ``rope_scaling``."""

    factor: float = 40.0  # context extension, s in the paper
    original: int = 4096  # original_max_position_embeddings, L_0
    beta_fast: float = 32.0  # pairs that turn more often than this within L keep their frequency
    beta_slow: float = 1.0  # pairs that turn less often than this are slowed down by the factor
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class RoPESaved(NamedTuple):
    """What `rope_forward` keeps for `rope_backward`."""

    shape: tuple[int, ...]  # of x
    cos: Array  # [B or 1, T, 1, R/2], already times the factor
    sin: Array  # [B or 1, T, 1, R/2]
    layout: Layout


def check_yarn(yarn: Yarn) -> None:
    """ValueError unless each of YaRN's settings is a number that can be right: the factor and the
    betas are divided by, and both temperatures multiply softmax's scale squared, in float32 too."""
    for name in ("factor", "beta_fast", "beta_slow", "original"):
        value = getattr(yarn, name)
        expect_that(
            isfinite(value) and value >= SMALLEST,
            f"yarn.{name} must be a finite number above 0, got {value}",
        )
    for name in ("mscale", "mscale_all_dim"):
        value = getattr(yarn, name)
        temperature = yarn_mscale(yarn.factor, value) if isfinite(value) else value
        expect_that(
            SMALLEST**0.5 <= temperature <= SMALLEST**-0.5,
            f"yarn.{name} must make 0.1 {name} ln(factor) + 1 positive and its square fit "
            f"float32, got {value}",
        )


def rope_frequencies(width: int, theta: float, yarn: Yarn | None = None) -> Array:
    """Angles per position, inv_freq [R/2] in float64, for ``width`` R: theta^(−2i/R), slowed down
    by ``yarn`` (2309.00071 section 3.2).

    >>> rope_frequencies(4, 10_000.0).tolist()
    [1.0, 0.01]
    """
    import numpy as np

    expect_that(width >= 2 and width % 2 == 0, f"width must be even and positive, got {width}")
    expect_that(
        isfinite(theta) and theta > 0 and (yarn is None or theta != 1),
        f"theta must be a finite number above 0, and not 1 with YaRN, got {theta}",
    )
    if yarn is not None:
        check_yarn(yarn)
    pair = np.arange(width // 2, dtype=np.float64)
    frequency = theta ** (-2 * pair / width)  # (rope.1)
    if yarn is None:
        return frequency

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        return width * log(yarn.original / (2 * pi * times)) / (2 * log(theta))  # (rope.2)

    low = max(floor(pair_turning(yarn.beta_fast)), 0)
    high = min(ceil(pair_turning(yarn.beta_slow)), width - 1)
    ramp = np.clip((pair - low) / (high - low or 0.001), 0, 1)
    return frequency / yarn.factor * ramp + frequency * (1 - ramp)  # (rope.3)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, YaRN's attention temperature (its square root, on q and on k
    alike).

    >>> round(yarn_mscale(40.0, 1.0), 4)
    1.3689
    """
    return 0.1 * mscale * log(factor) + 1 if factor > 1 else 1.0  # (rope.4)


def yarn_softmax_factor(yarn: Yarn | None) -> float:
    """What YaRN multiplies the softmax scale with; 1.589 for mscale_all_dim = 0.707 and 1.874 for
    1, at factor 40."""
    return 1.0 if yarn is None else yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rope_forward(
    x: Array,
    *,
    positions: Array,
    inv_freq: Array,
    layout: Layout = "interleaved",
    factor: float = 1.0,
) -> tuple[Array, RoPESaved]:
    """Turn each pair of ``x`` [B, T, H, R] by its angle.

    Args:
        positions: [B, T] or [T], any integers; only differences matter to attention.
        inv_freq: [R/2], from `rope_frequencies`. Angles are computed in float64 (longdouble for
            longdouble x).
        layout: ``interleaved`` or ``halves``.
        factor: multiplies cos and sin; get_mscale(mscale) / get_mscale(mscale_all_dim), 1 in
            released models.
    """
    xp = namespace(x=x)
    check_rope(x, positions, inv_freq, layout)
    wide: Any = xp.longdouble if is_wide(x) else xp.float64
    turns = xp.astype(xp.reshape(positions, (-1, x.shape[1], 1, 1)), wide)
    angle = turns * xp.astype(xp.asarray(inv_freq, device=x.device), wide)
    cos, sin = cast(xp.cos(angle) * factor, x), cast(xp.sin(angle) * factor, x)
    return _rotate(x, cos, sin, layout), RoPESaved(x.shape, cos, sin, layout)


def rope_backward(dy: Array, saved: RoPESaved) -> Array:
    """Gradient dx from ``dy``, both [B, T, H, R]: the rotation by the negative angle."""
    expect("dy", dy, "(B, T, H, R)", tuple(saved.shape))
    return _rotate(dy, saved.cos, -saved.sin, saved.layout)  # (rope.6)


def check_rope(x: Array, positions: Array, inv_freq: Array, layout: Layout) -> None:
    """ValueError unless what `rope_forward` is given fits together."""
    expect_that(
        len(x.shape) == 4 and x.shape[-1] == 2 * inv_freq.shape[0],
        f"x must have shape (B, T, H, R) with R=2·len(inv_freq)={2 * inv_freq.shape[0]}, "
        f"got {x.shape}",
    )
    expect_some("x", x, "(B, T, H, R)")
    expect_that(
        positions.shape in ((x.shape[1],), tuple(x.shape[:2])),
        f"positions must have shape (T,) or (B, T) of x {tuple(x.shape[:2])}, got "
        f"{positions.shape}",
    )
    expect_choice("layout", layout, Layout)


def _rotate(x: Array, cos: Array, sin: Array, layout: Layout) -> Array:
    xp = namespace(x=x)
    half = x.shape[-1] // 2
    if layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x[..., :half], x[..., half:]
    turned = (a * cos - b * sin, a * sin + b * cos)  # (rope.5)
    if layout == "interleaved":
        return xp.reshape(xp.stack(turned, axis=-1), x.shape)
    return xp.concat(turned, axis=-1)
