"""Token embedding: row lookup; its backward adds up the rows of repeated tokens.

Derivation: derivations/embedding.md. Letters: W vocabulary, D model width; ``…`` any leading
dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import Array, expect, expect_ids, expect_some, namespace, scatter_add, take_rows

__all__ = ["EmbeddingSaved", "embedding_backward", "embedding_forward"]


class EmbeddingSaved(NamedTuple):
    """What `embedding_forward` keeps for `embedding_backward`."""

    ids: Array  # […] integers: where each row of dy belongs
    shape: tuple[int, ...]  # (W, D): that of dw


def embedding_forward(w: Array, *, ids: Array) -> tuple[Array, EmbeddingSaved]:
    """y = w[ids] for the table ``w`` [W, D] and integer ``ids`` […]; returns y […, D].

    ValueError if an id lies outside 0 … W − 1 (a negative id would silently count from the end).
    """
    xp = namespace(w=w)
    expect("w", w, "(W, D)", (None, None))
    expect_some("w", w, "(W, D)")
    ids = expect_ids("ids", ids, w.shape[0])
    y = xp.reshape(take_rows(w, xp.reshape(ids, (-1,))), (*ids.shape, w.shape[1]))  # (embedding.1)
    return y, EmbeddingSaved(ids, tuple(w.shape))


def embedding_backward(dy: Array, saved: EmbeddingSaved) -> Array:
    """Gradient dw [W, D] from ``dy`` […, D]."""
    xp = namespace(dy=dy)
    expect("dy", dy, "(…, D)", (*saved.ids.shape, saved.shape[1]))
    rows = xp.reshape(saved.ids, (-1,))
    return scatter_add(rows, xp.reshape(dy, (-1, dy.shape[-1])), saved.shape[0])  # (embedding.2)
