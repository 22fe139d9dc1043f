"""The blocks of a tensor that a porter can think of: heads, nope and rotated rows, latent and
rotated key rows, key and value rows, experts, positions, rows of the vocabulary.

They come from the config and the tensor's name. A block is a run of indices along one axis, or
several runs; a mistake is told by the blocks that have it and those that have not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ..checkpoint.names import layer_of
from ..config import ModelConfig
from ..parameters import EMBEDDING, GATE, HEAD, MTP, attention_shapes, layer_name

__all__ = ["Cut", "cuts_of", "told"]

MOST_TOLD = 6  # blocks of a cut by number, before they are folded


class Cut(NamedTuple):
    """One way to cut an axis into blocks."""

    axis: int
    what: tuple[str, str]  # of blocks with numbers, as in head 3, heads 3, 4
    labels: tuple[str, ...]  # of blocks with names, as in "latent rows"; or empty
    block: np.ndarray  # [size]: which block an index of the axis is in
    blocks: int  # how many


def cuts_of(name: str, shape: tuple[int, ...], config: ModelConfig | None) -> list[Cut]:
    """The cuts of a tensor, those with names first."""
    if config is None:
        axes = [(axis, f"index of axis {axis}:", size) for axis, size in enumerate(shape)]
        return [_number(*axis, several=axis[1]) for axis in axes]
    prefix, _, rest = name.partition("/")
    of = _of_gradient(rest, config) if prefix == "grad" else _of_activation(rest, shape, config)
    return [cut for cut in of if cut.axis < len(shape) and len(cut.block) == shape[cut.axis]]


def told(cuts: list[Cut], wrong: list[np.ndarray]) -> str:
    """One line of the cuts in which some blocks are right and some wrong: "latent rows: ok, rotated
    key rows: wrong". "everywhere" if none is right; empty if there are no cuts."""
    said = []
    for cut, bad in zip(cuts, wrong, strict=True):
        blocks = np.zeros(cut.blocks, bool)
        np.logical_or.at(blocks, cut.block, bad)
        if blocks.all() or not blocks.any():
            continue
        if cut.labels:
            named = zip(cut.labels, blocks, strict=True)
            said.append(", ".join(f"{label}: {'wrong' if x else 'ok'}" for label, x in named))
        else:
            said.append(_numbers(cut, blocks))
    if not said and cuts:
        return "everywhere"
    return "; ".join(said)


def _numbers(cut: Cut, blocks: np.ndarray) -> str:
    """The numbered blocks that are wrong, and how many are not."""
    bad, good = np.flatnonzero(blocks), int((~blocks).sum())
    one, several = cut.what
    if len(bad) <= MOST_TOLD:
        shown = ", ".join(map(str, bad))
    elif len(bad) == bad[-1] - bad[0] + 1:
        shown = f"{bad[0]}…{bad[-1]}"
    elif good <= MOST_TOLD:
        return f"{several}: all wrong but {', '.join(map(str, np.flatnonzero(~blocks)))}"
    else:
        shown = f"{', '.join(map(str, bad[:MOST_TOLD]))}, … ({len(bad)} of {cut.blocks})"
    return f"{one if len(bad) == 1 else several} {shown}: wrong, the other {good} ok"


def _number(axis: int, what: str, size: int, width: int = 1, *, several: str = "") -> Cut:
    """``size`` blocks of ``width`` each."""
    return Cut(axis, (what, several or f"{what}s"), (), np.repeat(np.arange(size), width), size)


def _parts(axis: int, heads: int, parts: Mapping[str, int]) -> Cut:
    """The parts of each head, those of all heads together."""
    one = np.repeat(np.arange(len(parts)), list(parts.values()))
    return Cut(axis, ("", ""), tuple(parts), np.tile(one, heads), len(parts))


def _of_gradient(name: str, c: ModelConfig) -> list[Cut]:
    layer = layer_of(name)
    if layer is None:
        row, rows = "row of the vocabulary", "rows of the vocabulary"
        words = [_number(0, row, c.vocabulary, several=rows)]
        return words if name in (EMBEDDING, HEAD) else []
    part = name.removeprefix(layer_name(layer, ""))
    if part == GATE:
        return [_number(0, "row of expert", c.experts, several="rows of experts")]
    if part == MTP[-1]:
        order = ["columns that read the embedding", "columns that read the hidden state"]
        if c.conventions.mtp_order == "hidden_embedding":
            order.reverse()
        return [_parts(1, 1, dict.fromkeys(order, c.width))]
    return dict(zip(attention_shapes(c), _of_attention(c), strict=True)).get(part, [])


def _of_attention(c: ModelConfig) -> list[list[Cut]]:
    """The cuts of attention's weights, in the order of `attention_shapes`."""
    query = [
        _parts(0, c.heads, {"nope rows": c.nope, "rotated rows": c.rope}),
        _number(0, "head", c.heads, c.nope + c.rope),
    ]
    queries: list[list[Cut]] = [query] if c.q_latent is None else [[], [], query]
    pair = [
        _parts(0, c.heads, {"key rows": c.nope, "value rows": c.value}),
        _number(0, "head", c.heads, c.nope + c.value),
    ]
    latent = [_parts(0, 1, {"latent rows": c.kv_latent, "rotated key rows": c.rope})]
    outputs = [_number(1, "columns of head", c.heads, c.value, several="columns of heads")]
    return [*queries, latent, [], pair, outputs]


def _of_activation(name: str, shape: tuple[int, ...], c: ModelConfig) -> list[Cut]:
    """Of act/, cot/, out/ and aux/: sequences and positions, then what the last axes are."""
    part = name.rpartition(".")[2]
    attention: dict[str, Callable[[], list[Cut]]] = {
        "latent": lambda: [_parts(2, 1, {"latent": c.kv_latent, "rotated key": c.rope})],
        "q": lambda: [_parts(3, 1, {"nope part": c.nope, "rotated part": c.rope}), *heads(2)],
        "k": lambda: [_parts(3, 1, {"nope part": c.nope, "rotated part": c.rope}), *heads(2)],
        "v": lambda: heads(2),
        "probabilities": lambda: heads(1),
        "scores": lambda: [_number(2, "expert", c.experts)],
    }

    def heads(axis: int) -> list[Cut]:
        return [_number(axis, "head", c.heads)]

    cuts = attention[part]() if part in attention else []
    if part == "probabilities" and len(shape) == 4:
        places = [(0, "sequence"), (2, "query position"), (3, "key position")]
    elif name.startswith("load."):
        places = [(0, "expert")]
    else:
        places = [(0, "sequence"), (1, "position")]
    return cuts + [_number(axis, what, shape[axis]) for axis, what in places if axis < len(shape)]
