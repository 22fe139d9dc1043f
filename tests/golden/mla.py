"""Multi-head latent attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from golden.attention import attention
from golden.case import Case
from golden.linear import linear
from golden.rms_norm import rms_norm
from golden.rope import TINY_YARN, frequencies, rope


def mla(
    x: Tensor,
    cache: Tensor | None,
    w: dict[str, Tensor],
    *,
    heads: int,
    scale: float,
    eps: float,
    positions: Tensor,
    inv_freq: Tensor,
    layout: str = "interleaved",
    factor: float = 1.0,
    key_mask: Any = None,
    segments: Any = None,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 (2412.19437) eq. 1-11, a head at a time, with the released code's norm on each
    latent.

    Rows of w_q_b belong to a head as [nope | rope], rows of w_kv_b as [key | value].
    """
    latent = w["w_kv_a_norm"].shape[0]
    rope_width = 2 * len(inv_freq)
    nope = w["w_q_b"].shape[0] // heads - rope_width
    value = w["w_o"].shape[1] // heads

    def turn(a: Tensor) -> Tensor:
        return rope(a.unsqueeze(2), positions, inv_freq, layout, factor).squeeze(2)

    c_q = rms_norm(linear(x, w["w_q_a"]), w["w_q_a_norm"], eps) if "w_q_a" in w else x
    joint = linear(x, w["w_kv_a"])
    new = torch.cat(
        [rms_norm(joint[..., :latent], w["w_kv_a_norm"], eps), turn(joint[..., latent:])], -1
    )
    full = new if cache is None else torch.cat([cache, new], 1)
    c_kv, k_rope = full[..., :latent], full[..., latent:]
    outputs = []
    for h in range(heads):
        q_rows = w["w_q_b"][h * (nope + rope_width) : (h + 1) * (nope + rope_width)]
        kv_rows = w["w_kv_b"][h * (nope + value) : (h + 1) * (nope + value)]
        q = torch.cat([linear(c_q, q_rows[:nope]), turn(linear(c_q, q_rows[nope:]))], -1)
        k = torch.cat([linear(c_kv, kv_rows[:nope]), k_rope], -1)
        v = linear(c_kv, kv_rows[nope:])
        o = attention(q[:, :, None], k[:, :, None], v[:, :, None], scale, True, key_mask, segments)
        outputs.append(o[:, :, 0])
    return linear(torch.cat(outputs, -1), w["w_o"]), full


def cases() -> Iterable[Case]:
    # name, T, cached, A, V, layout, key_mask, segments, cotangent of y alone
    mask = [[True, True, True, True, False], [False, False, True, True, True]]
    settings: tuple[tuple[Any, ...], ...] = (
        ("compressed", 4, 0, 6, 2, "interleaved", None, None, False),
        ("packed", 5, 0, 6, 5, "interleaved", mask, [[0, 0, 1, 1, 1], [4, 4, 4, 9, 9]], False),
        ("cached", 2, 3, 6, 2, "interleaved", mask, [[7, 0, 0, 0, 0], [4, 4, 4, 4, 4]], False),
        ("uncompressed", 3, 0, None, 3, "halves", None, [[0, 0, 0], [1, 2, 2]], False),
        (
            "uncompressed_cached",
            2,
            2,
            None,
            4,
            "halves",
            [[False, True, True, True]] * 2,
            None,
            False,
        ),
        ("y_alone", 3, 1, 6, 2, "halves", None, None, True),
    )
    width, heads, latent, nope, rotated = 8, 2, 5, 3, 4
    for name, new, cached, q_latent, value, layout, key_mask, segments, y_alone in settings:
        constants = {"heads": heads, "scale": 0.53, "eps": 0.1, "layout": layout, "factor": 1.07}
        case = Case(f"mla/{name}", **constants)
        x = case.input("x", 2, new, width)
        cache = case.input("cache", 2, cached, latent + rotated) if cached else None
        w = {}
        if q_latent is not None:
            w["w_q_a"] = case.input("w_q_a", q_latent, width, std=0.5)
            w["w_q_a_norm"] = case.input("w_q_a_norm", q_latent, std=0.5, mean=0.8)
        w["w_q_b"] = case.input("w_q_b", heads * (nope + rotated), q_latent or width, std=0.5)
        w["w_kv_a"] = case.input("w_kv_a", latent + rotated, width, std=0.5)
        w["w_kv_a_norm"] = case.input("w_kv_a_norm", latent, std=0.5, mean=0.8)
        w["w_kv_b"] = case.input("w_kv_b", heads * (nope + value), latent, std=0.5)
        w["w_o"] = case.input("w_o", width, heads * value, std=0.5)
        starts = torch.tensor([[cached + 2], [cached + 37]])
        positions = case.aux("positions", starts + torch.arange(new))
        inv_freq = frequencies(rotated, 100.0, TINY_YARN)
        case.aux("inv_freq", inv_freq)
        masks = {"key_mask": key_mask, "segments": segments}
        given = {m: case.aux(m, values) for m, values in masks.items() if values is not None}
        y, grown = mla(x, cache, w, positions=positions, inv_freq=inv_freq, **constants, **given)
        yield case.finish(("cache",) if y_alone else (), y=y, cache=grown)
