"""Prompts continued: the batch together, or each with the drafts of its MTP chain.

Drafts are read by the main model in one forward, and each token is chosen from the main model's
logits as without drafts: a draft saves a forward and changes no token (several tokens read at once
add up in another order, so logits that are equal but for rounding may change places). Sources:
DeepSeek-V3 (2412.19437) sections 2.2 and 5.4.3; Leviathan et al. (2211.17192), whose rule for a
draft that is certain (q = 1) is ours: accept it with probability p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..array import Array, library, take_rows
from ..config import ModelConfig
from ..model import mtp_input
from ..ops import REFERENCE, Ops
from ..parameters import EMBEDDING, check_parameters
from .chain import Chain
from .decoder import ABSORBED, Decoder
from .sampler import Sampler, to_numpy

__all__ = ["Generation", "check_request", "generate"]

OnToken = Callable[[int, int, str], None]


class Generation(NamedTuple):
    """What came after one prompt."""

    tokens: list[int]  # the stop token, if one came, is the last
    finish: str  # stop: a stop token; length: max_tokens; context: config.context
    forwards: int  # of the main model after the prompt's, which gives the first token
    drafted: int  # tokens that the MTP modules proposed
    accepted: int  # of these, what the main model chose too
    log_probs: Sequence[float] = ()  # with record: of each token
    routes: Mapping[int, np.ndarray] = {}  # with record: by MoE layer [prompt + tokens − 1, K]


class _Limits:
    """When a row is finished."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[int], max_tokens: int, context: int
    ) -> None:
        left = context - np.array([len(prompt) for prompt in prompts])
        self.stop = np.array([*stop], np.int64)
        self.room = np.minimum(left, max_tokens)  # [B]: the most tokens that may come
        self.full = np.where(left < max_tokens, "context", "length")

    def finish(self, rows: np.ndarray, count: int, tokens: np.ndarray) -> np.ndarray:
        """`Generation.finish` of each of these rows, or "" if more tokens may come behind its
        ``count``, of which ``tokens`` are the last."""
        full = np.where(self.room[rows] == count, self.full[rows], "")
        return np.where(np.isin(tokens, self.stop), "stop", full)


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
    group: int = 1,
    record: bool = False,
    prefill: Ops = REFERENCE,
    decode: Ops = ABSORBED,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue each prompt until a stop token, ``max_tokens``, or ``config.context`` tokens with
    the prompt.

    Args:
        prompts: token ids, of any lengths; one batch.
        temperature, top_p: as in `Sampler`. seed: of the first row; the next ones count up, so
            that row b alone with ``seed + b`` gives what it gives in the batch.
        speculate: so many tokens are drafted, one per MTP module, and by the last one those beyond
            the number of modules. The prompts are then read one at a time, since
            each accepts its own number of drafts.
        group: how many times each prompt is continued. It is read once; row ``prompt · group + g``
            is its continuation g.
        record: keep ``Generation.log_probs``, of the logits by ``temperature`` over the whole
            vocabulary, before top_p (at temperature 0: of temperature 1), and
            ``Generation.routes``, the routed experts of every position that was read: the prompt
            and the new tokens but the last.
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
        group=group,
        record=record,
    )
    check_parameters(params, config)
    given = [[int(token) for token in prompt] for prompt in prompts for _ in range(group)]
    limits = _Limits(given, stop, max_tokens, config.context)
    if not speculate:
        sampler = Sampler(temperature, top_p, seed, len(given))
        longest = max(map(len, given))
        padding = _on_device(params, [longest - len(prompt) for prompt in given[::group]])
        decoder = Decoder(params, config, padding, prefill=prefill, decode=decode)
        return _together(decoder, given, group, limits, sampler, record, on_token)
    found = []
    for row, prompt in enumerate(given):
        decoder = Decoder(params, config, _on_device(params, [0]), prefill=prefill, decode=decode)
        sampler = Sampler(temperature, top_p, seed + row)
        found.append(_speculating(decoder, row, prompt, speculate, limits, sampler, on_token))
    return found


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
    group: int = 1,
    record: bool = False,
) -> None:
    """ValueError unless `generate` can do what it is asked to."""
    Sampler(temperature, top_p, seed)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if speculate > 0 and not config.mtp_depth:
        raise ValueError(f"speculate={speculate} needs an MTP module, and the model has none")
    if speculate < 0:
        raise ValueError(f"speculate must be at least 0, got {speculate}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    if speculate and (group > 1 or record):
        raise ValueError(
            f"speculate={speculate} cannot be combined with group or record: drafts are for rows "
            "one at a time"
        )
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


def _on_device(params: Mapping[str, Array], numbers: Sequence[Any] | np.ndarray) -> Array:
    """Integers in the library and on the device of the parameters."""
    like = params[EMBEDDING]
    return library(like).asarray(numbers, device=like.device)


def _together(
    decoder: Decoder,
    prompts: list[list[int]],
    group: int,
    limits: _Limits,
    sampler: Sampler,
    record: bool,
    on_token: OnToken | None,
) -> list[Generation]:
    """All rows in one batch, a token each a step; a row that has finished leaves it. The first of
    each ``group`` prompts is read for all."""
    params, longest = decoder.params, max(map(len, prompts))
    rows = np.arange(len(prompts))  # that go on: the decoder's batch
    steps = _Steps(prompts, limits)
    read = [[0] * (longest - len(prompt)) + prompt for prompt in prompts[::group]]
    hidden, _ = decoder.read(_on_device(params, read))
    if record:
        steps.read(rows, decoder.routes, rows // group)
    if group > 1:
        first = _on_device(params, rows // group)
        decoder.keep(first)
        hidden = take_rows(hidden[:, -1:, :], first)
    while True:
        z = decoder.logits(hidden[:, -1:, :])[:, 0, :]
        tokens, log_probs = sampler.choose(z, rows, log_probs=record)
        finish = steps.add(rows, tokens, log_probs)
        if on_token is not None:
            for event in zip(rows.tolist(), tokens.tolist(), finish.tolist(), strict=True):
                on_token(*event)
        going = np.flatnonzero(finish == "")
        if not len(going):
            return steps.generations()
        if len(going) < len(rows):  # at once: any wait costs more than the copies of the caches
            decoder.keep(_on_device(params, going))
        rows = rows[going]
        hidden, _ = decoder.read(_on_device(params, tokens[going, None]))
        if record:
            steps.read(rows, decoder.routes)


class _Steps:
    """What came of each row, step by step."""

    def __init__(self, prompts: list[list[int]], limits: _Limits) -> None:
        self.prompts = prompts
        self.limits = limits
        self.finish = np.full(len(prompts), "", "<U7")
        self.chosen: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self.reads: list[tuple[np.ndarray, np.ndarray, dict[int, Array]]] = []

    def add(self, rows: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray | None) -> np.ndarray:
        """One more token for each of these rows; returns `_Limits.finish`."""
        self.chosen.append((rows, tokens, log_probs))
        finish = self.limits.finish(rows, len(self.chosen), tokens)
        self.finish[rows] = finish
        return finish

    def read(
        self, rows: np.ndarray, routes: dict[int, Array], place: np.ndarray | None = None
    ) -> None:
        """The routes [B, T, K] of what these rows have read; ``place`` of each in B."""
        self.reads.append((rows, np.arange(len(rows)) if place is None else place, dict(routes)))

    def generations(self) -> list[Generation]:
        """In the order of the rows."""
        shape = len(self.prompts), len(self.chosen)
        tokens, log_probs = np.zeros(shape, np.int64), np.zeros(shape)
        count = np.zeros(shape[0], np.int64)
        for step, (rows, chosen, told) in enumerate(self.chosen):
            tokens[rows, step] = chosen
            count[rows] = step + 1
            if told is not None:
                log_probs[rows, step] = told
        longest, routes = max(map(len, self.prompts)), self.routes()
        found = []
        for row, prompt in enumerate(self.prompts):
            n = int(count[row])
            found.append(
                Generation(
                    tokens[row, :n].tolist(),
                    str(self.finish[row]),
                    forwards=n - 1,
                    drafted=0,
                    accepted=0,
                    log_probs=log_probs[row, :n].tolist() if self.reads else (),
                    routes={
                        layer: indices[row, longest - len(prompt) : longest + n - 1]
                        for layer, indices in routes.items()
                    },
                )
            )
        return found

    def routes(self) -> dict[int, np.ndarray]:
        """By layer [B, S, K], padding in front; rows that have finished: 0."""
        found: dict[int, list[np.ndarray]] = {}
        for rows, place, routes in self.reads:
            for layer, indices in routes.items():
                piece = np.zeros((len(self.prompts), *indices.shape[1:]), np.int64)
                piece[rows] = to_numpy(indices)[place]
                found.setdefault(layer, []).append(piece)
        return {layer: np.concatenate(pieces, axis=1) for layer, pieces in found.items()}


def _speculating(
    decoder: Decoder,
    row: int,
    prompt: list[int],
    count: int,
    limits: _Limits,
    sampler: Sampler,
    on_token: OnToken | None,
) -> Generation:
    """One row: the chain drafts, one forward of the main model reads that, and what it would have
    chosen stays."""
    params, config = decoder.params, decoder.config
    chain, tokens = Chain(decoder), list(prompt)
    end = len(prompt) + int(limits.room[row])
    forwards = drafted = accepted = 0

    def take(logits: Array) -> tuple[int, str]:
        """The next token from logits [1, W], and `Generation.finish` if it is the last."""
        chosen = sampler.choose(logits).tokens
        tokens.append(int(chosen[0]))
        finish = str(limits.finish(np.array([row]), len(tokens) - len(prompt), chosen)[0])
        if on_token is not None:
            on_token(row, tokens[-1], finish)
        return tokens[-1], finish

    hidden, raw = decoder.read(_on_device(params, [tokens]))
    _, finish = take(decoder.logits(hidden[:, -1:, :])[:, 0, :])
    while not finish:
        most = min(count, end - len(tokens) - 1)
        drafts, _ = chain.draft(mtp_input(config, hidden, raw), tokens, most)
        hidden, raw = decoder.read(_on_device(params, [[tokens[-1], *drafts]]))
        forwards += 1
        drafted += len(drafts)
        z = decoder.logits(hidden)
        for place in range(len(drafts) + 1):
            token, finish = take(z[:, place, :])
            right = place < len(drafts) and token == drafts[place]
            accepted += right
            if finish or not right:
                break
        hidden, raw = hidden[:, : place + 1, :], raw[:, : place + 1, :]
        decoder.cut(len(tokens) - 1)
    return Generation(tokens[len(prompt) :], finish, forwards, drafted, accepted)
