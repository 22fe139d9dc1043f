"""The MTP modules as drafters: what they propose behind the main model's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..array import Array, library
from ..model import mtp_module_forward
from ..parameters import mtp_layer
from .decoder import Decoder

__all__ = ["Chain"]


class Chain:
    """The MTP modules drafting behind a decoder of one row without padding, each with a latent
    cache of its own.

    Module k reads at position i the state of the depth before and token i + k. With tokens 0 … n
    known and the main model's states of positions 0 … n − 1, module k at position n − 1 predicts
    token n + k, from the drafts before it. A position whose token i + k was a draft is forgotten,
    and read again when that token is known.

    Drafts beyond the number of modules are the last one's, as in engines: it goes on from its own
    state and draft, at the next position.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.caches: dict[int, Array] = {}  # by layer [1, n − k + 1, C + R]
        self.held: dict[
            int, Array
        ] = {}  # by depth [1, 1, D]: a state it has yet to read, which will not come again

    def draft(
        self, state: Array, tokens: Sequence[int], count: int
    ) -> tuple[list[int], list[Array]]:
        """``count`` tokens after ``tokens`` (0 … n), and the logits [W] that each is the largest
        of.

        ``state`` [1, T, D] are the main model's states (normed or raw, by the convention) of the
        last T positions up to n − 1: those that came since the last call.
        """
        xp, config = library(state), self.decoder.config
        known = list(tokens)
        end = len(tokens) - 1
        found = []
        held = {}
        modules = min(count, config.mtp_depth)
        for depth in range(1, modules + 1):
            layer = mtp_layer(config, depth)
            if depth in self.held:
                state = xp.concat((self.held[depth], state), axis=1)
            start = end - state.shape[1]
            ids = xp.asarray([known[start + depth : end + depth]], device=state.device)
            run, batch = self.decoder.run(self.caches, ids, start)
            state, normed, module = mtp_module_forward(run, depth, state, batch)
            found.append(self.decoder.logits(normed[:, -1:, :])[0, 0, :])
            known.append(largest(found[-1]))
            sure = max(end - depth + 1, 0)  # positions whose token i + depth was no draft
            cache = module.block.attention.cache
            self.caches[layer] = cache[:, :sure, :]
            if sure:
                held[depth + 1] = state[:, sure - 1 - start : sure - start, :]
        self.held = held
        for place in range(end, end + count - modules):  # of the last module, once more
            ids = xp.asarray([known[-1:]], device=state.device)
            run, batch = self.decoder.run({layer: cache}, ids, place)
            state, normed, module = mtp_module_forward(run, depth, state[:, -1:, :], batch)
            cache = module.block.attention.cache
            found.append(self.decoder.logits(normed)[0, 0, :])
            known.append(largest(found[-1]))
        return known[end + 1 :], found


def largest(logits: Array) -> int:
    """The token of the largest of the logits [W]; of equal ones the lowest."""
    return int(library(logits).argmax(logits))
