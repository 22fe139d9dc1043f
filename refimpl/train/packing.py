"""Rows of tokens for training: windows of a stream of documents, and documents packed into rows.

Every row has explicit targets, so a token that begins a row is predicted in the row before. With
the document mask, attention stays within a document and no target lies in another one; MTP modules
then leave out the positions whose later token lies in another one (`mtp_pairs`). Without it
documents follow one another, and a row is one text. Letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .draws import generator

__all__ = ["Examples", "Windows", "chosen", "order", "pack"]


class Examples(NamedTuple):
    """Rows of a batch, each array [B, T] or None: what `forward` takes of that name."""

    tokens: Any  # int64
    targets: Any = None  # int64
    mask: Any = None  # bool, which targets count
    key_mask: Any = None  # bool, False for padding
    segments: Any = None  # int64, the document of each position

    def arrays(self) -> dict[str, Any]:
        """Keyword arguments of `forward`, those that are None left out."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def rows(self, start: int, stop: int) -> Examples:
        return Examples(*(None if x is None else x[start:stop] for x in self))


class Windows:
    """Windows of ``length`` positions of the documents joined, each ended by the token ``end``.

    Window i has the stream's tokens i·T … (i + 1)·T − 1, and as targets the tokens that follow:
    each token of the stream is a target once, but for the first and the fewer than T at the end
    that fill no window.

    Args:
        documents: tokens of each.
        masked: with the document mask. A document's ``end`` belongs to it; what follows it is
            no target.

    ValueError if the stream fills no window.
    """

    def __init__(
        self, documents: Iterable[Sequence[int]], length: int, *, end: int, masked: bool = False
    ) -> None:
        ended = [np.asarray([*document, end], np.int64) for document in documents]
        self.stream = np.concatenate([np.empty(0, np.int64), *ended])
        self.documents = np.repeat(np.arange(len(ended)), [len(tokens) for tokens in ended])
        self.length = length
        self.masked = masked
        if not 1 <= length < len(self.stream):
            raise ValueError(
                f"length must lie in 1 … {len(self.stream) - 1}, the tokens of the text less one, "
                f"got {length}"
            )

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def take(self, windows: Any) -> Examples:
        """The windows of these numbers [B]."""
        positions = np.asarray(windows, np.int64)[:, None] * self.length + np.arange(self.length)
        tokens, targets = self.stream[positions], self.stream[positions + 1]
        if not self.masked:
            return Examples(tokens, targets)
        segments = self.documents[positions]
        return Examples(tokens, targets, segments == self.documents[positions + 1], None, segments)

    def batch(self, position: int, size: int, seed: int) -> Examples:
        """The ``size`` windows from ``position`` on in the endless sequence of shuffled epochs."""
        return self.take(chosen(position, size, len(self), seed))


def chosen(position: int, size: int, count: int, seed: int) -> Any:
    """Which of ``count`` examples stand at ``position`` … position + size − 1 of the endless
    sequence of epochs, each an `order` of its own: [size] integers, from the arguments alone."""
    epochs, places = np.divmod(np.arange(position, position + size), count)
    found = [order(seed, int(epoch), count)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate([np.empty(0, np.int64), *found])


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> Any:
    """The permutation [count] of an epoch, read-only."""
    permutation = generator(seed, "order", epoch).permutation(count)
    permutation.flags.writeable = False
    return permutation


def pack(pairs: Iterable[tuple[Sequence[int], Sequence[bool]]], length: int) -> Examples:
    """Documents in as many rows of ``length`` as it takes, with the document mask: each, in the
    given order, goes into the first row that has room.

    Args:
        pairs: a document's tokens, and which of them count as targets (the first never does).

    Behind the last document of a row comes padding: token 0, segment −1, key_mask False.
    ValueError for a document that is empty or longer than ``length``, or has another number of
    counted tokens than of tokens.
    """
    room = np.empty(0, np.int64)  # left in each row
    rows: list[list[tuple[Sequence[int], Sequence[bool]]]] = []
    for number, (tokens, counted) in enumerate(pairs):
        if not 1 <= len(tokens) <= length:
            raise ValueError(
                f"length must be at least 1 and at least that of every document, got {length} for "
                f"document {number} with {len(tokens)} tokens"
            )
        if len(counted) != len(tokens):
            raise ValueError(
                f"pairs must hold as many counted as tokens, got {len(counted)} and {len(tokens)} "
                f"in document {number}"
            )
        fits = room >= len(tokens)
        if not fits.any():
            room, fits = np.append(room, length), np.append(fits, True)
            rows.append([])
        row = int(np.argmax(fits))
        room[row] -= len(tokens)
        rows[row].append((tokens, counted))
    return _filled(rows, length)


def _filled(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[bool]]]], length: int
) -> Examples:
    """The arrays of rows of documents."""
    shape = (len(rows), length)
    tokens, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask, segments = np.zeros(shape, bool), np.full(shape, -1)
    for row, documents in enumerate(rows):
        start = 0
        for number, (document, counted) in enumerate(documents):
            stop = start + len(document)
            tokens[row, start:stop] = document
            targets[row, start : stop - 1] = document[1:]
            mask[row, start : stop - 1] = counted[1:]
            segments[row, start:stop] = number
            start = stop
    return Examples(tokens, targets, mask, segments >= 0, segments)
