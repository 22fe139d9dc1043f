"""A batch in parts: micro-batches of its rows, and pieces of its sequences.

The truth about a batch is a sum over its counted tokens, divided once by how many there are. A part
knows neither: `whole_of` counts, `by_rows` and `by_positions` cut, `forward` of `refimpl.model`
takes a part and the counts, and the sums over all parts, of losses and gradients, are those of the
whole batch. Nothing is rescaled afterwards.

Pieces of a sequence read one another's keys. Here each runs in a thread of its own, and they
meet in an `Exchange`; between processes another exchange does the same. Derivation:
derivations/splits.md. Letters: B batch, T position, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from threading import Barrier
from typing import Any, NamedTuple, Protocol

import numpy as np

from .array import library
from .batch import Whole, make_batch
from .config import ModelConfig
from .model import ModelOutput, backward, forward
from .ops import REFERENCE, Op, Ops
from .ops.balance_loss import count_choices

__all__ = [
    "Exchange",
    "Part",
    "added",
    "by_positions",
    "by_rows",
    "counting_together",
    "counts",
    "exchanging",
    "filled",
    "run_parts",
    "whole_of",
]

Arrays = dict[str, Any]  # tokens and, if given, targets, mask, key_mask, segments, positions


class Part(NamedTuple):
    """What one part gives `forward`."""

    arrays: Arrays  # each [its rows, its positions and those that follow]
    follow: int  # how many positions follow
    begins: bool = True  # whether its rows begin here


def by_rows(arrays: Arrays, sizes: Sequence[int]) -> list[Part]:
    """The rows of a batch, its ``arrays`` [B, …] by name, in parts of these ``sizes``, 0 included;
    ValueError unless they add up to B."""
    rows = len(arrays["tokens"])
    if min(sizes, default=-1) < 0 or sum(sizes) != rows:
        raise ValueError(f"sizes must be at least 0 and add up to B={rows}, got {list(sizes)}")
    ends = np.cumsum(sizes)
    shape = arrays["tokens"].shape  # positions may be those of every row
    given = {name: np.broadcast_to(x, shape) for name, x in arrays.items()}
    return [
        Part({name: x[end - size : end] for name, x in given.items()}, 0)
        for size, end in zip(sizes, ends, strict=True)
    ]


def by_positions(arrays: Arrays, cuts: Sequence[int], config: ModelConfig) -> list[Part]:
    """The sequences of a batch, its ``arrays`` [B, T] by name, in pieces that end at ``cuts`` and
    at T, each with the tokens behind it that its targets and MTP modules need; ValueError unless 0
    ≤ cuts ≤ T in order.

    An output of GRPO must not be cut: its ratios and lengths are of the whole. Gather the pieces'
    log-probabilities instead.
    """
    length = arrays["tokens"].shape[1]
    ends = [0, *cuts, length]
    if ends != sorted(ends):
        raise ValueError(f"cuts must lie in 0…T={length}, in order, got {list(cuts)}")
    batch = make_batch(np.empty(0), **arrays, config=config)
    given = {**arrays, "targets": batch.targets, "mask": batch.mask, "positions": batch.positions}
    parts = []
    for start, stop in pairwise(ends):
        last = min(stop + config.mtp_depth, length) if stop > start else stop
        piece = {name: x[:, start:last] for name, x in given.items()}
        parts.append(Part(piece, last - stop, start == 0 and stop > 0))
    return parts


def filled(part: Part, depth: int) -> Part:
    """The part with padding behind it until an MTP module of ``depth`` has a position. A part
    without tokens is a position of padding: it takes its turn in every exchange, and adds zeros."""
    rows, length = part.arrays["tokens"].shape
    own = max(length - part.follow, 1)
    wanted = (max(rows, 1), max(length, own + part.follow, 1 + depth))
    if wanted == (rows, length):
        return part
    arrays = {"key_mask": np.ones((rows, length), bool), **part.arrays}
    for name, x in arrays.items():
        arrays[name] = np.zeros(wanted, x.dtype)
        arrays[name][:rows, :length] = x
    return Part(arrays, wanted[1] - own, part.begins and rows > 0)


def counts(part: Part, config: ModelConfig) -> Whole:
    """What a part adds to the counts of the whole batch."""
    full = filled(part, config.mtp_depth)
    batch = make_batch(np.empty(0), **full.arrays, config=config, follow=full.follow)
    rule, main = config.conventions.mtp_normaliser, float(batch.mask.sum())  # (splits.1)
    taking_part = batch.tokens.size if batch.takes_part is None else batch.takes_part.sum()

    def normaliser(depth: int) -> float:
        if rule == "valid":
            return float(batch.at(depth).mask.sum())
        return main if rule == "main" else float(taking_part)

    mtp = tuple(normaliser(depth) for depth in range(1, config.mtp_depth + 1))  # (splits.2)
    return Whole(main, mtp, float(len(part.arrays["tokens"]) if part.begins else 0))


def whole_of(parts: Sequence[Part], config: ModelConfig) -> Whole:
    """The counts of the batch that consists of ``parts``: the sums of theirs."""
    return added([counts(part, config) for part in parts])


def added(each: Sequence[Whole]) -> Whole:
    """The counts of all parts together."""
    mtp = tuple(sum(x) for x in zip(*(c.mtp for c in each), strict=True))
    return Whole(sum(c.targets or 0 for c in each), mtp, sum(c.sequences or 0 for c in each))


# Pieces of one sequence


class Exchange(Protocol):
    """How one piece of a sequence meets the others."""

    rank: int  # which piece this is

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank, once all have called this."""
        ...


class ThreadExchange:
    """An exchange between the threads of one process, which share ``slots`` and ``barrier``."""

    def __init__(self, rank: int, slots: list[Any], barrier: Barrier) -> None:
        self.rank, self.slots = rank, slots
        self.barrier = barrier

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


def exchanging(ops: Ops, exchange: Exchange, *, balance: bool = True) -> Ops:
    """The table for one piece: by ``exchange``, attention sees the keys of earlier pieces and,
    unless ``balance`` is false, the balance loss counts whole sequences."""
    rank, table = exchange.rank, ops

    def attention_forward(q: Any, k: Any, v: Any, **settings: Any) -> tuple[Any, Any]:
        names = ("key_mask", "segments")
        pieces = exchange.gather((k, v, [settings.get(name) for name in names]))[: rank + 1]
        lengths = [k.shape[1] for k, _, _ in pieces]
        masks = zip(*(masks for *_, masks in pieces), strict=True)
        for name, found in zip(names, masks, strict=True):
            if any(x is not None for x in found):
                default = [np.ones(k.shape[:2], bool) for k, _, _ in pieces]
                given = [d if x is None else x for x, d in zip(found, default, strict=True)]
                settings[name] = np.concatenate(given, axis=1)
        keys, values = (np.concatenate([p[i] for p in pieces], axis=1) for i in (0, 1))
        o, saved = table.attention.forward(q, keys, values, **settings)
        return o, (saved, np.cumsum(lengths)[:-1])

    def attention_backward(do: Any, saved: Any) -> tuple[Any, Any, Any]:
        inner, cuts = saved
        dq, dk, dv = table.attention.backward(do, inner)
        pieces = [np.split(x, cuts, axis=1) for x in (dk, dv)]
        later = exchange.gather(pieces)[rank:]
        dk, dv = (sum(piece[i][rank] for piece in later) for i in (0, 1))  # (splits.5)
        return dq, dk, dv

    ops = ops | {"attention": Op(attention_forward, attention_backward)}
    return counting_together(ops, exchange) if balance else ops


def counting_together(ops: Ops, exchange: Exchange) -> Ops:
    """The table for one piece, whose balance loss counts whole sequences."""
    inner = ops.balance_loss

    def forward(scores: Any, *, counted: Any, mask: Any, **settings: Any) -> Any:
        xp = library(scores)
        shape, device = (*scores.shape[:2], 1), scores.device
        valid = xp.ones(shape, dtype=xp.bool, device=device) if mask is None else mask[:, :, None]
        each = exchange.gather(count_choices(counted, scores.shape[-1], valid))
        settings["cut"] = tuple(sum(x) for x in zip(*each, strict=True))  # (splits.3)
        return inner.forward(scores, counted=counted, mask=mask, **settings)

    return ops | {"balance_loss": Op(forward, inner.backward)}


def run_parts(
    params: Mapping[str, Any],
    parts: Sequence[Part],
    config: ModelConfig,
    *,
    whole: Whole | list[Whole] | None = None,
    pieces: bool = False,
    ops: Ops = REFERENCE,
    exchange_balance: bool = True,
) -> list[tuple[ModelOutput, dict[str, Any]]]:
    """Output and gradients of every part, whose sums are those of the whole batch.

    Args:
        whole: counts of the whole batch, by default those of ``parts``; a list has what each part
            divides by.
        pieces: whether the parts are pieces of the same sequences, which run side by side.
        exchange_balance: whether pieces count their choices of experts together.
    """
    whole = whole_of(parts, config) if whole is None else whole
    wholes = whole if isinstance(whole, list) else [whole] * len(parts)

    def run(part: Part, whole: Whole, ops: Ops) -> tuple[ModelOutput, dict[str, Any]]:
        part = filled(part, config.mtp_depth)
        output, saved = forward(
            params, config=config, whole=whole, follow=part.follow, ops=ops, **part.arrays
        )
        return output, backward(saved)

    def run_piece(part: Part, whole: Whole, exchange: Exchange) -> Any:
        return run(part, whole, exchanging(ops, exchange, balance=exchange_balance))

    pairs = list(zip(parts, wholes, strict=True))
    if not pieces:
        return [run(part, whole, ops) for part, whole in pairs]
    return side_by_side([partial(run_piece, part, whole) for part, whole in pairs])


def side_by_side(work: Sequence[Callable[[Exchange], Any]]) -> list[Any]:
    """Do each in a thread of its own, with exchanges between them; the first error is raised."""
    barrier, slots = Barrier(len(work)), [None] * len(work)

    def do(rank: int) -> Any:
        try:
            return work[rank](ThreadExchange(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(do, rank) for rank in range(len(work))]
    errors = [e for e in (f.exception() for f in futures) if e is not None]
    broken = [e for e in errors if type(e).__name__ != "BrokenBarrierError"]
    if errors:
        raise (broken or errors)[0]
    return [future.result() for future in futures]
