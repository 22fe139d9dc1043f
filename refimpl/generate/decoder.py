"""The main model reading tokens piece by piece, with latent caches.

The cache of a layer holds C + R numbers per token, [B, S, C + R]; the prompt is read in the naive
form of MLA, later tokens in the absorbed one. Prompts of different lengths are padded on the left,
and a mask and positions of their own keep each row what it would be alone. Source: DeepSeek-V2
(2405.04434) section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..array import Array, library, take_rows
from ..batch import Batch
from ..config import ModelConfig
from ..model import Run, block_forward, final_norm_forward, logits
from ..ops import IMPLEMENTATIONS, REFERENCE, Ops
from ..parameters import EMBEDDING

__all__ = ["ABSORBED", "Decoder"]

# the ops that decoding uses: attention reads the latents themselves
ABSORBED = IMPLEMENTATIONS["absorbed"]


class Decoder:
    """The main model reading a batch piece by piece; what it keeps is one latent cache a layer.

    Args:
        params, config: as in `forward`, any mapping.
        padding: [B] integers, how many of a row's first tokens are padding.
        prefill, decode: the tables of ops for the first read and the later ones.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        config: ModelConfig,
        padding: Array,
        *,
        prefill: Ops = REFERENCE,
        decode: Ops = ABSORBED,
    ) -> None:
        self.params = params
        self.config = config
        self.padding = padding
        self.prefill = prefill
        self.decode = decode
        self.length = 0  # S
        self.caches: dict[int, Array] = {}  # by layer [B, S, C + R]
        self.routes: dict[int, Array] = {}  # by MoE layer [B, T, K]: of what was read last

    def read(self, tokens: Array) -> tuple[Array, Array]:
        """The states [B, T, D] of ``tokens`` [B, T], which follow what was read: after the final
        norm, and before."""
        run, batch = self.run(self.caches, tokens, self.length)
        x, _ = run.ops.embedding.forward(self.params[EMBEDDING], ids=tokens)
        for layer in range(self.config.layers):
            x, saved = block_forward(run, layer, x, batch)
            self.caches[layer] = saved.attention.cache
            if saved.choices is not None:
                self.routes[layer] = saved.choices.route.indices
        self.length += tokens.shape[1]
        hidden, _ = final_norm_forward(run, x)
        return hidden, x

    def run(self, caches: dict[int, Array], tokens: Array, past: int) -> tuple[Run, Batch]:
        """What a block needs to read ``tokens`` [B, T] behind ``past`` cached positions."""
        xp, end = library(tokens), past + tokens.shape[1]
        every = xp.arange(end, device=tokens.device)[None, :]
        place = every - self.padding[:, None]  # negative: padding
        batch = Batch(tokens, None, None, xp.where(place < 0, 0, place)[:, past:], place >= 0, None)
        ops = self.decode if past else self.prefill
        return Run(self.params, self.config, ops, {}, False, caches), batch

    def cut(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        self.length = length
        self.caches = {layer: cache[:, :length, :] for layer, cache in self.caches.items()}

    def keep(self, rows: Array) -> None:
        """Go on with these rows of the batch, of which one may be there several times."""
        self.padding = library(rows).take(self.padding, rows, axis=0)
        self.caches = {layer: take_rows(cache, rows) for layer, cache in self.caches.items()}

    def logits(self, hidden: Array) -> Array:
        """[B, T, W] of normed states [B, T, D]."""
        return logits(self.params, hidden, self.decode)
