"""The batch, or a part of one: tokens and targets, what counts and who sees whom, as each depth
meets them.

Letters: B batch, T position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .array import Array, expect, expect_ids, expect_mask, expect_that, library, namespace
from .config import ModelConfig
from .ops import mtp_pairs

__all__ = ["Batch", "Whole", "make_batch"]


class Whole(NamedTuple):
    """Of the whole batch, what the sums of a part are divided by; None: by the part's own."""

    targets: float | None = None  # that count in the main loss
    mtp: tuple[float, ...] = ()  # the normaliser of each MTP module's loss
    sequences: float | None = None  # of the balance loss
    cut: Mapping[int, tuple[Array, Array]] = {}  # by layer, of sequences that lie in several parts


class Batch(NamedTuple):
    """What a depth reads and predicts, each [B, its positions]: the main model is depth 0, MTP
    module k depth k.

    With caches, ``takes_part`` is [B, S]: the cached positions, then these.
    """

    tokens: Array  # [B, T], T the depth's positions; so are the next
    targets: Array  # [B, T]
    mask: Array  # [B, T]: which targets count
    positions: Array  # [B, T] or [T], for RoPE
    # [B, T]: False for padding and, in MTP, where two documents would be joined
    takes_part: Array | None
    segments: Array | None  # [B, T]
    mtp_normaliser: str = "valid"  # the convention
    whole: Whole = Whole()  # its targets: those of this depth
    further: Batch | None = None  # with the tokens that follow the part

    def at(self, depth: int) -> Batch:
        """The batch as MTP module ``depth`` meets it."""
        given = self.further or self
        pairs = mtp_pairs(
            given.tokens, given.targets, given.mask, depth, given.segments, given.takes_part
        )
        own = min(self.tokens.shape[1], given.tokens.shape[1] - depth)
        arrays = (*pairs[:3], given.positions, pairs[3], given.segments)
        whole = self.whole._replace(targets=self._normaliser(depth))
        return Batch._make((*_first(arrays, own), self.mtp_normaliser, whole, None))

    def _normaliser(self, depth: int) -> float | None:
        """What the sum of an MTP loss is divided by; None: by the module's own targets."""
        if self.whole.mtp:
            return self.whole.mtp[depth - 1]
        if self.mtp_normaliser == "positions":
            return (
                float(self.tokens.size) if self.takes_part is None else count_true(self.takes_part)
            )
        return count_true(self.mask) if self.mtp_normaliser == "main" else None


def _first(arrays: Iterable[Array | None], positions: int) -> list[Any]:
    return [None if x is None else x[:, :positions] for x in arrays]


def make_batch(
    like: Array,
    tokens: Array,
    config: ModelConfig,
    *,
    targets: Array | None = None,
    mask: Array | None = None,
    key_mask: Array | None = None,
    segments: Array | None = None,
    positions: Array | None = None,
    whole: Whole | None = None,
    follow: int = 0,
    with_loss: bool = True,
) -> Batch:
    """The main model's batch, with the defaults that `forward` promises, on the device of ``like``,
    a parameter of any shape. The other arrays are as `refimpl.model.forward` takes them."""
    xp, device = namespace(moved=True, params=like), like.device
    expect("tokens", tokens, "(B, T)", (None, None))
    b, t = tokens.shape
    expect_that(
        config.index_topk is None or t <= config.index_topk,
        f"tokens must have shape (B, T) with T at most index_topk={config.index_topk}: beyond, "
        f"the model's indexer, left out here, chooses keys, got {tokens.shape}",
    )
    expect_that(0 <= follow < t, f"follow must lie in 0…T−1={t - 1}, got {follow}")
    expect_that(
        t > (config.mtp_depth if with_loss else 0),
        f"tokens must have shape (B, T) with T > mtp_depth={config.mtp_depth}, got {tokens.shape}",
    )
    tokens = expect_ids("tokens", tokens, config.vocabulary)
    for name, given in (("targets", targets), ("segments", segments)):
        if given is not None:
            expect(name, given, "(B, T)", (b, t))
    for name, given in (("mask", mask), ("key_mask", key_mask)):
        if given is not None:
            expect_mask(name, given, "(B, T)", (b, t))
    real_token = xp.ones((b, t), dtype=xp.bool, device=device) if key_mask is None else key_mask
    counts = real_token
    if targets is None:
        predicts = real_token[:, :-1]
        if config.conventions.target_after_padding:
            predicts = xp.ones((b, t - 1), dtype=xp.bool, device=device)
        follows = real_token[:, 1:]
        if segments is not None:
            follows = follows & (segments[:, 1:] == segments[:, :-1])
        nothing = xp.zeros((b, 1), dtype=xp.bool, device=device)
        counts = xp.concat((predicts & follows, nothing), axis=1)
        targets = xp.concat((tokens[:, 1:], tokens[:, -1:]), axis=1)
        if mask is not None:
            expect_countable(mask, counts)
    if positions is None:
        positions = xp.arange(t, device=device)
        if key_mask is not None and config.conventions.blind_query == "mean":
            positions = from_first_token(key_mask)
    elif positions.shape != (t,):
        expect("positions", positions, "(B, T) or (T,)", (b, t))
    mask = counts if mask is None else mask
    positions = xp.broadcast_to(positions, (b, t))
    arrays = (tokens, targets, mask, positions, key_mask, segments)
    batch = Batch(*arrays, config.conventions.mtp_normaliser, whole or Whole())
    return Batch._make((*_first(arrays, t - follow), *batch[6:8], batch if follow else None))


def from_first_token(key_mask: Array) -> Array:
    """Positions [B, T] that count from the first token behind the padding in front of a row, which
    has position 0 throughout."""
    xp = library(key_mask)
    first = xp.argmax(xp.astype(key_mask, xp.int32), axis=1)[:, None]
    place = xp.arange(key_mask.shape[1], device=key_mask.device)[None, :] - first
    return xp.where(place < 0, 0, place)


def expect_countable(mask: Array, counts: Array) -> None:
    """ValueError unless ``mask`` [B, T] is False wherever ``counts`` is."""
    xp = library(mask)
    wrong = xp.reshape(mask & ~counts, (-1,))
    if xp.any(wrong):
        row, position = divmod(int(xp.argmax(xp.astype(wrong, xp.int32))), mask.shape[1])
        raise ValueError(
            "mask must be False where no target can count (behind the last token, at padding, at "
            f"the end of a document), got True in row {row}, position {position}"
        )


def count_true(mask: Array) -> float | None:
    """How many are True; None if none is, since a sum over none is 0 whatever divides it."""
    return float(library(mask).count_nonzero(mask)) or None
