"""Attention, a query at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from golden.case import Case


def sees(
    b: int, t: int, s: int, new: int, total: int, causal: bool, key_mask: Any, segments: Any
) -> bool:
    """Whether query t of sequence b (one of the last ``new`` of ``total`` positions) may look at
    position s."""
    own = total - new + t
    if causal and s > own:
        return False
    if key_mask is not None and not bool(key_mask[b, s]):
        return False
    return segments is None or int(segments[b, s]) == int(segments[b, own])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    key_mask: Any = None,
    segments: Any = None,
) -> Tensor:
    """Vaswani et al. (1706.03762) eq. 1, a query at a time over just the keys that it sees; 0 if
    there is none."""
    (batch, new, heads, _), total = q.shape, k.shape[1]
    k, v = (a.expand(batch, total, heads, a.shape[-1]) for a in (k, v))
    sequences = []
    for b in range(batch):
        queries = []
        for t in range(new):
            keys = [
                s for s in range(total) if sees(b, t, s, new, total, causal, key_mask, segments)
            ]
            if not keys:
                queries.append(v.new_zeros(heads, v.shape[-1]))
                continue
            p = torch.softmax(scale * torch.einsum("hx,shx->hs", q[b, t], k[b, keys]), -1)
            queries.append(torch.einsum("hs,shv->hv", p, v[b, keys]))
        sequences.append(torch.stack(queries))
    return torch.stack(sequences)


def cases() -> Iterable[Case]:
    # name, T, S, key heads, value heads, X, V, std, causal, key_mask, segments
    padding = [[True, True, True, True, False], [False, False, True, True, True]]
    documents = [[0, 0, 1, 1, 1], [4, 4, 4, 9, 9]]
    settings: tuple[tuple[Any, ...], ...] = (
        ("causal", 5, 5, 2, 2, 7, 4, 1.0, True, None, None),
        ("packed", 5, 5, 2, 2, 5, 4, 1.0, True, padding, documents),
        (
            "bidirectional",
            5,
            5,
            2,
            2,
            2,
            6,
            1.0,
            False,
            padding,
            [[0, 0, 1, 1, 2], [4, 4, 6, 9, 9]],
        ),
        ("decode", 2, 5, 2, 2, 5, 4, 1.0, True, padding, documents),
        ("decode_both_ways", 2, 5, 2, 2, 5, 4, 1.0, False, padding, None),
        ("shared_head", 4, 6, 1, 1, 5, 3, 1.0, True, None, None),
        ("shared_key", 3, 3, 1, 2, 5, 5, 1.0, True, None, [[0, 1, 0], [2, 2, 2]]),
        ("sharp", 4, 4, 2, 2, 5, 4, 5.0, True, None, None),
    )
    for (
        name,
        new,
        total,
        key_heads,
        value_heads,
        x,
        value,
        std,
        causal,
        key_mask,
        segments,
    ) in settings:
        case = Case(f"attention/{name}", scale=0.37, causal=causal)
        q = case.input("q", 2, new, 2, x, std=std)
        k = case.input("k", 2, total, key_heads, x, std=std, mean=0.2)
        v = case.input("v", 2, total, value_heads, value, mean=-0.3)
        masks = {"key_mask": key_mask, "segments": segments}
        given = {m: case.aux(m, values) for m, values in masks.items() if values is not None}
        yield case.finish(o=attention(q, k, v, 0.37, causal, **given))
