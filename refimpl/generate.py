"""Generation: prefill, latent caches with absorbed decoding, sampling, and speculation with the MTP
modules.

The cache of a layer holds C + R numbers a token, [B, S, C + R]; the prompt is read in the naive
form of MLA, later tokens in the absorbed one. Prompts of different lengths are padded on the left,
and a mask and positions of their own keep each row what it would be alone. Drafts of the MTP chain
are read by the main model in one forward, and each token is chosen from the main model's logits as
without drafts: a draft saves a forward and changes no token (several tokens read at once add up in
another order, so logits that are equal but for rounding may change places). Sources: DeepSeek-V2
(2405.04434) section 2.1; DeepSeek-V3 (2412.19437) sections 2.2 and 5.4.3; Leviathan et al.
(2211.17192), whose rule for a draft that is certain (q = 1) is ours: accept it with probability p.
Letters: B batch, T new tokens, S these and the cached ones, D model, W vocabulary, C latent, R
rotated key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from .array import Array, library, namespace, take_rows
from .batch import Batch
from .config import ModelConfig
from .model import Run, block_forward, final_norm_forward, logits, mtp_input, mtp_module_forward
from .ops import IMPLEMENTATIONS, REFERENCE, Ops
from .parameters import EMBEDDING, check_parameters, mtp_layer

__all__ = ["Chain", "Decoder", "Generation", "Sampler", "check_request", "generate"]

OnToken = Callable[[int, int, str], None]
ABSORBED = IMPLEMENTATIONS["absorbed"]


class Generation(NamedTuple):
    """What came after one prompt."""

    tokens: list[int]  # the stop token, if one came, is the last
    finish: str  # stop: a stop token; length: max_tokens; context: config.context
    forwards: int  # of the main model after the prompt's, which gives the first token
    drafted: int  # tokens that the MTP modules proposed
    accepted: int  # of these, what the main model chose too


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

    def read(self, tokens: Array) -> tuple[Array, Array]:
        """The states [B, T, D] of ``tokens`` [B, T], which follow what was read: after the final
        norm, and before."""
        run, batch = self.run(self.caches, tokens, self.length)
        x, _ = run.ops.embedding.forward(self.params[EMBEDDING], ids=tokens)
        for layer in range(self.config.layers):
            x, saved = block_forward(run, layer, x, batch)
            self.caches[layer] = saved.attention.cache
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
        """Go on with these rows [≤ B] of the batch alone."""
        self.padding = library(rows).take(self.padding, rows, axis=0)
        self.caches = {layer: take_rows(cache, rows) for layer, cache in self.caches.items()}

    def logits(self, hidden: Array) -> Array:
        """[B, T, W] of normed states [B, T, D]."""
        return logits(self.params, hidden, self.decode)


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
        xp, config = namespace(state=state), self.decoder.config
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


class Sampler:
    """How tokens are chosen from logits: the largest at temperature 0, else drawn from the nucleus.

    p = softmax(logits / temperature) in float64, sorted downwards, equal ones by the lower id
    first. The nucleus is the shortest beginning whose sum is at least top_p (a sum of exactly top_p
    suffices; top_p = 1 keeps all). One uniform number a token picks from it, so a seed gives the
    same tokens whatever is in the batch and is drafted.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not (isfinite(temperature) and temperature >= 0):
            raise ValueError(
                f"temperature must be a finite number of at least 0, got {temperature}"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.temperature = temperature
        self.top_p = top_p
        self.random = np.random.default_rng(seed)

    def choose(self, logits: Array) -> int:
        """A token, from logits [W]; ValueError if one is not a number or all are −∞. +∞ is that
        token, or one of several."""
        z = to_numpy(logits)
        if np.isnan(z).any():
            raise ValueError("logits must be numbers, got NaN: did the model overflow?")
        if z.max() == -np.inf:
            raise ValueError("logits must not all be −∞: there is nothing to choose")
        if self.temperature == 0:
            return largest(logits)
        ids, mass = self.nucleus(logits)
        total = np.cumsum(mass)
        # random() is at most 1 − 2⁻⁵³, so the product rounds below the whole
        return int(ids[np.searchsorted(total, self.random.random() * total[-1], side="right")])

    def nucleus(self, logits: Array) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be drawn, most probable first, and their probabilities before the
        cut."""
        z = to_numpy(logits).astype(np.float64)
        if z.max() == np.inf:
            p = (z == np.inf).astype(np.float64)
        else:
            with np.errstate(over="ignore", under="ignore"):
                p = np.exp((z - z.max()) / self.temperature)
        p /= p.sum()
        ids = np.argsort(-p, kind="stable")
        mass = p[ids]
        if self.top_p < 1:
            count = int(np.searchsorted(np.cumsum(mass), self.top_p, side="left")) + 1
            ids, mass = ids[:count], mass[:count]
        return ids, mass


def generate(
    params: Mapping[str, Array],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    speculate: int = 0,
    prefill: Ops = REFERENCE,
    decode: Ops = ABSORBED,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue each prompt until a stop token, ``max_tokens``, or ``config.context`` tokens with
    the prompt.

    Args:
        prompts: token ids, of any lengths; one batch.
        temperature, top_p: as in `Sampler`. seed: of the first prompt; the next ones count up, so
            that row b alone with ``seed + b`` gives what it gives in the batch.
        speculate: so many tokens are drafted, one per MTP module, and by the last one those beyond
            the number of modules. The prompts are then read one at a time, since
            each accepts its own number of drafts.
        prefill, decode: tables of ops, for the prompt and for what follows.
        on_token: called as each token comes with its row, the token, and, if it was the last,
            ``Generation.finish``.

    ValueError names what is wrong with an argument.
    """
    check_request(
        config,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        speculate=speculate,
    )
    check_parameters(params, config)
    rows = [
        _Row(
            row,
            [int(t) for t in prompt],
            config.context,
            max_tokens,
            frozenset(stop),
            Sampler(temperature, top_p, seed + row),
            on_token,
        )
        for row, prompt in enumerate(prompts)
    ]
    if not speculate:
        _together(params, config, rows, prefill, decode)
    for row in rows if speculate else ():
        _speculating(params, config, row, speculate, prefill, decode)
    return [
        Generation(row.tokens[row.prompt :], row.finish, row.forwards, row.drafted, row.accepted)
        for row in rows
    ]


def check_request(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Sequence[int],
    speculate: int,
) -> None:
    """ValueError unless `generate` can do what it is asked to."""
    Sampler(temperature, top_p, seed)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if speculate > 0 and not config.mtp_depth:
        raise ValueError(f"speculate={speculate} needs an MTP module, and the model has none")
    if speculate < 0:
        raise ValueError(f"speculate must be at least 0, got {speculate}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for name, tokens in [
        ("stop", stop),
        *((f"prompt {row}", prompt) for row, prompt in enumerate(prompts)),
    ]:
        for token in tokens:
            if not (isinstance(token, (int, np.integer)) and 0 <= token < config.vocabulary):
                raise ValueError(
                    f"{name} must hold tokens in 0…{config.vocabulary - 1}, got {token}"
                )
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < config.context:
            raise ValueError(
                f"prompt {row} must hold at least 1 token and leave room for one in the context of "
                f"{config.context}, got {len(prompt)}"
            )


class _Row:
    """One prompt and what has come after it."""

    def __init__(
        self,
        index: int,
        tokens: list[int],
        context: int,
        most: int,
        stop: frozenset[int],
        sampler: Sampler,
        on_token: OnToken | None,
    ) -> None:
        self.index = index
        self.tokens = tokens
        self.stop = stop
        self.sampler = sampler
        self.on_token = on_token
        self.prompt = len(tokens)
        self.end = min(
            context, self.prompt + most
        )  # the most tokens there may be, the prompt's included
        self.full = "length" if self.end == self.prompt + most else "context"
        self.finish = ""
        self.forwards = 0
        self.drafted = 0
        self.accepted = 0

    def take(self, logits: Array) -> int:
        """Choose the next token, and see whether it is the last."""
        token = self.sampler.choose(logits)
        self.tokens.append(token)
        self.finish = (
            "stop" if token in self.stop else self.full if len(self.tokens) == self.end else ""
        )
        if self.on_token is not None:
            self.on_token(self.index, token, self.finish)
        return token


def _together(
    params: Mapping[str, Array], config: ModelConfig, rows: list[_Row], prefill: Ops, decode: Ops
) -> None:
    """All rows in one batch, a token each a step; a row that has finished leaves it."""
    embed = params[EMBEDDING]
    xp, longest = namespace(params=embed), max(row.prompt for row in rows)
    padding = [longest - row.prompt for row in rows]
    tokens = [[0] * pad + row.tokens for pad, row in zip(padding, rows, strict=True)]
    decoder = Decoder(
        params, config, xp.asarray(padding, device=embed.device), prefill=prefill, decode=decode
    )
    while True:
        hidden, _ = decoder.read(xp.asarray(tokens, device=embed.device))
        z = decoder.logits(hidden[:, -1:, :])
        for place, row in enumerate(rows):
            row.take(z[place, 0, :])
        going = [place for place, row in enumerate(rows) if not row.finish]
        if not going:
            return
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            decoder.keep(xp.asarray(going, device=embed.device))
        for row in rows:
            row.forwards += 1
        tokens = [row.tokens[-1:] for row in rows]


def _speculating(
    params: Mapping[str, Array],
    config: ModelConfig,
    row: _Row,
    count: int,
    prefill: Ops,
    decode: Ops,
) -> None:
    """One row: the chain drafts, one forward of the main model reads that, and what it would have
    chosen stays."""
    embed = params[EMBEDDING]
    xp = namespace(params=embed)
    decoder = Decoder(
        params, config, xp.asarray([0], device=embed.device), prefill=prefill, decode=decode
    )
    chain = Chain(decoder)
    hidden, raw = decoder.read(xp.asarray([row.tokens], device=embed.device))
    row.take(decoder.logits(hidden[:, -1:, :])[0, 0, :])
    while not row.finish:
        most = min(count, row.end - len(row.tokens) - 1)
        drafts, _ = chain.draft(mtp_input(config, hidden, raw), row.tokens, most)
        hidden, raw = decoder.read(xp.asarray([[row.tokens[-1], *drafts]], device=embed.device))
        row.forwards += 1
        row.drafted += len(drafts)
        z = decoder.logits(hidden)
        for place in range(len(drafts) + 1):
            token = row.take(z[0, place, :])
            right = place < len(drafts) and token == drafts[place]
            row.accepted += right
            if row.finish or not right:
                break
        hidden, raw = hidden[:, : place + 1, :], raw[:, : place + 1, :]
        decoder.cut(len(row.tokens) - 1)


def largest(logits: Array) -> int:
    """The token of the largest of the logits [W]; of equal ones the lowest."""
    return int(library(logits).argmax(logits))


def to_numpy(x: Array) -> np.ndarray:
    """A host copy of an array of any library."""
    return np.asarray(x.get() if hasattr(x, "get") else x)
