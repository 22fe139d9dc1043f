"""RoPE with complex numbers, and YaRN's frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from refimpl.config import Yarn

from golden.case import Case


def mscale(factor: float, m: float) -> float:
    """YaRN (2309.00071) eq. 22 with DeepSeek's m: 0.1 m ln(factor) + 1, and 1 if nothing is
    stretched."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def correction_range(width: int, theta: float, yarn: Yarn) -> tuple[int, int]:
    """The pairs between which YaRN's ramp lies: those turning beta_fast and beta_slow times in the
    original context."""

    def pair(turns: float) -> float:
        return width * math.log(yarn.original / (2 * math.pi * turns)) / (2 * math.log(theta))

    return max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), width - 1)


def frequencies(width: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """YaRN (2309.00071) eq. 17-20: each pair's own θ^(-2i/R), the slow ones divided by the
    factor."""
    result = []
    for i in range(width // 2):
        f = math.pow(theta, -2 * i / width)
        if yarn is not None:
            low, high = correction_range(width, theta, yarn)
            span = high - low if high != low else 0.001  # DeepSeek's guard against an empty range
            ramp = min(max((i - low) / span, 0.0), 1.0)
            f = f / yarn.factor * ramp + f * (1 - ramp)
        result.append(f)
    return torch.tensor(result, dtype=torch.float64)


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, layout: str, factor: float) -> Tensor:
    """RoFormer (2104.09864) eq. 12: a pair is a complex number, and is multiplied by factor · e^(i
    m θ)."""
    angle = positions.to(torch.float64).expand(x.shape[:2]).unsqueeze(-1) * inv_freq
    turn = torch.polar(torch.full_like(angle, factor), angle).unsqueeze(2)
    half = x.shape[-1] // 2
    if layout == "interleaved":
        z = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * turn
        return torch.view_as_real(z).flatten(-2)
    z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    return torch.cat([z.real, z.imag], -1)


TINY_YARN = Yarn(
    factor=4.0, original=16, beta_fast=4.0, beta_slow=1.0, mscale=0.9, mscale_all_dim=0.7
)


def cases() -> Iterable[Case]:
    settings = (
        (
            "interleaved",
            [[4096, 4097, 90001], [7, 3, -12]],
            8,
            1e4,
            TINY_YARN._replace(original=512),
            1.13,
        ),
        ("halves", [[31, 30, 64], [5, 5, 2000]], 6, 100.0, TINY_YARN, 0.87),
        ("shared_positions", [11, 12, 14], 2, 50.0, None, 1.0),
        ("plain", [[3, 4, 5], [0, 9, 1]], 4, 5e4, None, 1.0),
        ("empty_range", [[3, 4, 5], [0, 9, 1]], 6, 100.0, Yarn(8.0, 4, 32.0, 1.0, 0.5, 1.5), 1.0),
        (
            "clamped_range",
            [[3, 4, 5], [0, 9, 1]],
            6,
            100.0,
            Yarn(8.0, 10**6, 15915.0, 1.0, 0.0, 0.8),
            1.0,
        ),
        ("v3", [[5], [70000]], 64, 1e4, Yarn(), 1.0),
        ("v2_lite", [[5], [70000]], 64, 1e4, Yarn(mscale=0.707, mscale_all_dim=0.707), 1.0),
    )
    for name, positions, width, theta, yarn, factor in settings:
        layout = "halves" if name in ("halves", "shared_positions") else "interleaved"
        case = Case(
            f"rope/{name}", width=width, theta=theta, yarn=yarn, layout=layout, factor=factor
        )
        outputs: dict[str, Any] = {}
        if yarn is not None:
            case.settings["range"] = correction_range(width, theta, yarn)
            outputs["mscale"] = mscale(yarn.factor, yarn.mscale)
        outputs["softmax_factor"] = mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else 1.0
        inv_freq = frequencies(width, theta, yarn)
        case.aux("inv_freq", inv_freq)
        at = case.aux("positions", positions)
        x = case.input("x", 2, at.shape[-1], 3 if width < 64 else 1, width)
        yield case.finish(y=rope(x, at, inv_freq, layout, factor), inv_freq=inv_freq, **outputs)
