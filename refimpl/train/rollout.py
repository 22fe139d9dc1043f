"""Groups of outputs sampled from a policy, as arrays for the GRPO loss.

Each prompt is read once and continued G times; `generate` itself records the log-probability of
every token that it drew, and the experts that every position chose. Letters: N outputs of all
groups, T positions, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..array import Array
from ..config import ModelConfig
from ..generate import Generation, generate
from .machine import Machine
from .policy import main_model
from .settings import expect_setting
from .vocabulary import Vocabulary

__all__ = ["Samples", "expect_room", "sample_groups"]


class Samples(NamedTuple):
    """Outputs behind their prompts; a row is padded on the right. A position counts where it
    predicts a token of the output."""

    tokens: np.ndarray  # [N, T]
    key_mask: np.ndarray  # [N, T] bool: no padding
    mask: np.ndarray  # [N, T] bool: predicts a token of the output
    log_prob: np.ndarray  # [N, T]: of that token, while sampling; 0 elsewhere
    routes: list[Mapping[int, np.ndarray]]  # of each output, as `Generation` has them
    texts: list[str]
    ended: list[bool]  # by the end token, not by max_tokens
    lengths: np.ndarray  # [N]: tokens of each output

    def take(self, rows: np.ndarray) -> Samples:
        """Some of the outputs."""
        return Samples(
            self.tokens[rows],
            self.key_mask[rows],
            self.mask[rows],
            self.log_prob[rows],
            [self.routes[row] for row in rows],
            [self.texts[row] for row in rows],
            [self.ended[row] for row in rows],
            self.lengths[rows],
        )


def sample_groups(
    params: Mapping[str, Array],
    config: ModelConfig,
    vocabulary: Vocabulary,
    machine: Machine,
    prompts: Sequence[str],
    *,
    group: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int,
    seed: int,
) -> Samples:
    """``group`` outputs of each prompt, those of a prompt together. MTP modules take no part.

    Log-probabilities are of the logits by ``temperature`` over the whole vocabulary, as `log_probs`
    gives them when learning; ``top_p`` only limits what is drawn. CouldNotRun if the context has no
    room.
    """
    params, config = main_model(params, config)
    encoded = [vocabulary.encode(prompt) for prompt in prompts]
    expect_room(config, encoded, max_tokens)
    found = generate(
        params,
        config,
        encoded,
        group=group,
        record=True,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=[vocabulary.end],
        prefill=machine.prefill,
        decode=machine.decode,
    )
    return as_arrays([p for p in encoded for _ in range(group)], found, vocabulary)


def expect_room(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """CouldNotRun unless so many tokens behind each prompt fit into the context."""
    longest = max(map(len, prompts))
    expect_setting(
        longest + max_tokens <= config.context,
        "max_tokens",
        f"leave room for a prompt of {longest} tokens in the context of {config.context}",
        max_tokens,
    )


def as_arrays(
    prompts: Sequence[Sequence[int]], found: Sequence[Generation], vocabulary: Vocabulary
) -> Samples:
    """Prompts and what followed each, padded to the longest; the last token, which nothing reads
    further, is kept as a target."""
    lengths = np.array([len(x.tokens) for x in found])
    before = np.array([len(prompt) for prompt in prompts])
    shape = (len(found), int((before + lengths).max()))
    tokens = np.full(shape, vocabulary.end)
    log_prob = np.zeros(shape)
    place = np.arange(shape[1])
    for row, (prompt, x) in enumerate(zip(prompts, found, strict=True)):
        end = len(prompt) + len(x.tokens)
        tokens[row, :end] = [*prompt, *x.tokens]
        log_prob[row, len(prompt) - 1 : end - 1] = x.log_probs
    start, stop = before[:, None], (before + lengths)[:, None]
    return Samples(
        tokens,
        place < stop,
        (place >= start - 1) & (place < stop - 1),
        log_prob,
        [x.routes for x in found],
        [vocabulary.decode(x.tokens) for x in found],
        [x.finish == "stop" for x in found],
        lengths,
    )
