"""Generation: absorbed decoding is the whole forward, a batch is its rows, and speculation changes
no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from refimpl.check.cases import model_variant
from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.checkpoint.lazy import LazyParameters
from refimpl.config import Conventions, ModelConfig, preset
from refimpl.generate import Chain, Decoder, Generation, Sampler, generate
from refimpl.kernels.columns import for_generation
from refimpl.model import forward, logits, mtp_input, mtp_module_forward
from refimpl.ops import IMPLEMENTATIONS, REFERENCE, Op, Ops
from refimpl.text import load_text

from golden.checkpoint_values import TRAINED
from random_parameters import random_parameters
from support import FULL

TINY = preset("tiny")
CONFIGS = {"tiny": TINY, "variant": replace(model_variant(TINY, TINY.conventions), yarn=TINY.yarn)}
PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3, 2, 1], [40, 41, 42], [250, 3, 3, 60, 61, 62]]
FEW = {"max_tokens": 12}


def whole(params: dict[str, np.ndarray], tokens: Sequence[int], config: ModelConfig) -> np.ndarray:
    """The logits [T, W] of one forward over all tokens, without a cache."""
    return logits(params, forward(params, np.array([tokens]), config, with_loss=False)[0].hidden)[0]


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.max(np.abs(got - wanted)) <= 1e-12 * np.max(np.abs(wanted)))


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, np.ndarray], ModelConfig]:
    checkpoint = Checkpoint.open(TRAINED, dtype="float64")
    return checkpoint.load(), checkpoint.config


# The cache


@pytest.mark.parametrize("prefill", ["reference", "absorbed", "flash"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_the_whole_forward(name: str, prefill: str) -> None:
    """At every position, whatever the pieces that the tokens are read in."""
    config = CONFIGS[name]
    assert config.active_yarn is not None
    params, tokens = (
        random_parameters(config, std=0.3),
        np.random.default_rng(1).integers(0, 256, (2, 40)),
    )
    wanted = logits(params, forward(params, tokens, config, with_loss=False)[0].hidden)
    for pieces in ([40], [7] + [1] * 33, [1] * 40, [3, 2, 5, 1, 9, 20]):
        decoder = Decoder(params, config, np.zeros(2, int), prefill=IMPLEMENTATIONS[prefill])
        for piece in pieces:
            part = slice(decoder.length, decoder.length + piece)
            assert close(decoder.logits(decoder.read(tokens[:, part])[0]), wanted[:, part])


@pytest.mark.parametrize("name", CONFIGS)
def test_size_of_the_cache(name: str) -> None:
    """C + R numbers a token and layer, and nothing else grows."""
    config = CONFIGS[name]
    decoder = Decoder(random_parameters(config, std=0.3), config, np.zeros(3, int))
    for length in (5, 1, 1):
        decoder.read(np.ones((3, length), int))
    assert list(decoder.caches) == list(range(config.layers))
    assert {cache.shape for cache in decoder.caches.values()} == {
        (3, 7, config.kv_latent + config.rope)
    }


def test_cut_forgets() -> None:
    """What was read and cut off leaves no trace, to the bit."""
    params, tokens = (
        random_parameters(TINY, std=0.3),
        np.random.default_rng(2).integers(0, 256, (1, 9)),
    )
    one, other = (Decoder(params, TINY, np.zeros(1, int)) for _ in range(2))
    for decoder in (one, other):
        decoder.read(tokens[:, :5])
    other.read(tokens[:, :3])
    other.cut(5)
    assert np.array_equal(one.read(tokens[:, 5:])[0], other.read(tokens[:, 5:])[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "fp8"])
def test_weights_that_are_read_when_used(stored: str, dtype: str, tmp_path: Path) -> None:
    """The logits of loaded weights, bit for bit with the reference: of the prompt, what follows,
    and drafts. Those of numba_cpu differ by rounding: in float64 by 1e-12, in float32 by no more
    than twice the reference's error and 4 units of the largest logit."""
    save_checkpoint(random_parameters(TINY, std=0.3), TINY, tmp_path / "checkpoint", dtype=stored)
    source = Checkpoint.open(tmp_path / "checkpoint", dtype=dtype)
    lazy = LazyParameters(source, source.config, matrices=True)
    tokens = np.random.default_rng(1).integers(0, 256, (2, 24))

    def read(params: Any, implementation: str) -> list[np.ndarray]:
        prefill, decode = for_generation(implementation)
        decoder = Decoder(params, source.config, np.array([3, 0]), prefill=prefill, decode=decode)
        pieces = [tokens[:, :20], tokens[:, 20:21], tokens[:, 21:]]
        return [decoder.logits(decoder.read(piece)[0]) for piece in pieces]

    wanted = read(source.load(), "reference")
    for x, y in zip(wanted, read(lazy, "reference"), strict=True):
        assert x.dtype == y.dtype == dtype
        assert np.array_equal(x, y, equal_nan=True)
    drafts = [
        generate(params, source.config, [PROMPTS[1]], speculate=2, **FEW)
        for params in (source.load(), lazy)
    ]
    assert drafts[0] == drafts[1]
    pytest.importorskip("numba")
    exact = Checkpoint.open(tmp_path / "checkpoint", dtype="float64").load()
    for x, y, z in zip(wanted, read(lazy, "numba_cpu"), read(exact, "reference"), strict=True):
        assert y.dtype == dtype
        error, reference = (np.nanmax(np.abs(found - z)) for found in (y, x))
        largest = np.nanmax(np.abs(z))
        bound = 2 * reference + 4 * np.finfo(np.float32).eps * largest
        assert error <= (1e-12 * largest if dtype == "float64" else bound)


# The batch


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name: str) -> None:
    """Each row of a padded batch has the logits that it has alone, in the prompt and behind it."""
    config = CONFIGS[name]
    params, pads = random_parameters(config, std=0.3), [9 - len(p) for p in PROMPTS]
    later = np.random.default_rng(3).integers(0, 256, (4, 5))
    tokens = np.concatenate(
        [[[0] * pad + p for pad, p in zip(pads, PROMPTS, strict=True)], later], axis=1
    )
    decoder = Decoder(params, config, np.array(pads))
    got = [decoder.logits(decoder.read(tokens[:, :9])[0])]
    got += [decoder.logits(decoder.read(tokens[:, t : t + 1])[0]) for t in range(9, 12)]
    decoder.keep(np.array([2, 0]))
    got.append(decoder.logits(decoder.read(tokens[[2, 0], 12:])[0])[[1, 1, 0, 0]])
    z = np.concatenate(got, axis=1)
    for row, pad in enumerate(pads):
        end = 14 if row in (0, 2) else 12
        assert close(z[row, pad:end], whole(params, tokens[row, pad:end], config))


def test_positions_begin_after_the_padding() -> None:
    """Attention sees only their differences, the context's end and MTP's first position see
    them."""
    decoder = Decoder({}, TINY, np.array([0, 2]))
    for past, wanted in ((0, [[0, 1, 2, 3], [0, 0, 0, 1]]), (4, [[4, 5, 6, 7], [2, 3, 4, 5]])):
        _, batch = decoder.run({}, np.ones((2, 4), int), past)
        assert batch.positions.tolist() == wanted
        assert batch.takes_part.tolist() == [[True] * (past + 4), [False] * 2 + [True] * (past + 2)]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"]
)
def test_a_batch_is_its_rows(trained: Any, options: dict[str, Any]) -> None:
    """Row b alone with seed + b gives the same tokens; some rows stop early, and the others go
    on."""
    prompts = [list(text) for text in (b"The ", b"x", b"An object of class", b"for i in")]
    batch = generate(*trained, prompts, **FEW, stop=[32], seed=11, **options)
    assert batch == [
        generate(*trained, [prompt], **FEW, stop=[32], seed=11 + row, **options)[0]
        for row, prompt in enumerate(prompts)
    ]
    assert len({len(g.tokens) for g in batch}) > 1


def test_greedy_takes_the_largest(trained: Any) -> None:
    params, config = trained
    (found,) = generate(params, config, [b"The v"], **FEW)
    tokens = [*b"The v", *found.tokens]
    assert found.tokens == np.argmax(whole(params, tokens, config), axis=-1)[4:-1].tolist()


def test_each_table_has_its_part() -> None:
    """``prefill`` reads the prompt, ``decode`` each token after it."""
    lengths: dict[str, list[int]] = {"prefill": [], "decode": []}

    def table(part: str) -> Ops:
        def forward(x: np.ndarray, *weights: Any, **given: Any) -> Any:
            lengths[part].append(x.shape[1])
            return REFERENCE.mla.forward(x, *weights, **given)

        return REFERENCE | {"mla": Op(forward, REFERENCE.mla.backward)}

    config = replace(TINY, layers=1, dense_layers=1, mtp_depth=0)
    tables = {part: table(part) for part in lengths}
    generate(random_parameters(config), config, [[1, 2, 3]], max_tokens=3, **tables)
    assert lengths == {"prefill": [3], "decode": [1, 1]}


# Sampling


def test_nucleus() -> None:
    """Most probable first, equal ones by id; the sum of exactly top_p suffices."""
    equal, uneven = np.zeros(4), np.log([0.1, 0.6, 0.3])
    assert Sampler(1, 0.5).nucleus(equal)[0].tolist() == [0, 1]
    many = np.random.default_rng(0).integers(0, 3, 1000).astype(float)  # ties far apart
    ids = Sampler(1, 1.0).nucleus(many)[0]
    assert ids.tolist() == sorted(range(1000), key=lambda token: (-many[token], token))
    assert Sampler(1, 0.5 + 1e-9).nucleus(equal)[0].tolist() == [0, 1, 2]
    assert Sampler(1, 1e-9).nucleus(equal)[0].tolist() == [0]
    assert Sampler(1, 1.0).nucleus(equal)[0].tolist() == [0, 1, 2, 3]
    ids, mass = Sampler(1, 0.7).nucleus(uneven)
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(mass, [0.6, 0.3], rtol=1e-15)
    np.testing.assert_allclose(
        Sampler(0.5).nucleus(uneven)[1], np.array([0.36, 0.09, 0.01]) / 0.46, rtol=1e-14
    )
    assert Sampler(1, 1.0).nucleus(np.log([0.1] * 10))[0].tolist() == list(
        range(10)
    )  # the sums end below 1


@pytest.mark.parametrize(("top_p", "wanted"), [(1.0, [0.1, 0.6, 0.3]), (0.7, [0, 2 / 3, 1 / 3])])
def test_law_of_the_sampler(top_p: float, wanted: list[float]) -> None:
    """Frequencies of 20,000 draws, within five standard deviations."""
    sampler, n = Sampler(1.0, top_p, seed=5), 20_000
    counts = np.bincount([sampler.choose(np.log([0.1, 0.6, 0.3])) for _ in range(n)], minlength=3)
    p = np.array(wanted)
    assert np.all(np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)))


def test_seeds_replay(trained: Any) -> None:
    first, again, other = (
        generate(*trained, [b"The ", b"The "], **FEW, temperature=1.0, seed=seed)
        for seed in (3, 3, 5)
    )
    assert first == again
    options: Any = FEW | {"temperature": 1.0}
    none, zero = (generate(*trained, [b"The "], **options, **seed) for seed in ({}, {"seed": 0}))
    assert none == zero
    assert len({tuple(g.tokens) for g in first + other}) == 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-300])
def test_cold_is_greedy(trained: Any, temperature: float) -> None:
    assert generate(*trained, [b"It is"], **FEW, temperature=temperature) == generate(
        *trained, [b"It is"], **FEW
    )


def test_equal_logits_take_the_lowest() -> None:
    assert Sampler().choose(np.array([1.0, 3.0, 2.0, 3.0])) == 1


def test_nan_is_no_token() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
            Sampler(temperature).choose(np.array([0.0, np.nan]))


def test_infinite_logits() -> None:
    """+∞ is that token, or one of several alike; −∞ is none; all −∞ is an error."""
    inf = np.inf
    for temperature in (0.0, 1e-300, 1.0):
        for top_p in (1.0, 0.3):
            assert Sampler(temperature, top_p).choose(np.array([0.0, inf, -inf, 5.0])) == 1
            assert Sampler(temperature, top_p).choose(np.array([-inf, -inf, -1e30, -inf])) == 2
        with pytest.raises(ValueError, match="logits must not all be −∞"):
            Sampler(temperature).choose(np.full(3, -inf))
    sampler, n = Sampler(0.7), 20_000
    several = np.array([inf, 3.0, inf, -inf])
    counts = np.bincount([sampler.choose(several) for _ in range(n)], minlength=4)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert np.all(np.abs(counts[[0, 2]] - n / 2) <= 5 * np.sqrt(n / 4))


# Ends


@pytest.mark.parametrize("speculate", [0, 1, 2])
def test_ends(trained: Any, speculate: int) -> None:
    """A stop token is the last one; max_tokens and the context end a row; all is told to
    on_token."""
    params, config = trained
    prompt = list(b"The statement")
    (free,) = generate(params, config, [prompt], max_tokens=30, speculate=speculate)
    assert (free.finish, len(free.tokens)) == ("length", 30)
    for first in sorted(map(free.tokens.index, set(free.tokens))):
        told: list[tuple[int, int, str]] = []
        (stopped,) = generate(
            params,
            config,
            [prompt],
            max_tokens=30,
            stop=[free.tokens[first], 0],
            speculate=speculate,
            on_token=lambda *event, told=told: told.append(event),
        )
        assert (stopped.finish, stopped.tokens) == ("stop", free.tokens[: first + 1])
        assert told == [
            (0, token, "stop" if t == first else "") for t, token in enumerate(stopped.tokens)
        ]
    (full,) = generate(params, config, [prompt], max_tokens=1000, speculate=speculate)
    assert (full.finish, len(full.tokens)) == ("context", config.max_positions - len(prompt))
    assert full.tokens[:30] == free.tokens
    (one,) = generate(params, config, [prompt], max_tokens=1, speculate=speculate)
    assert one == Generation(free.tokens[:1], "length", 0, 0, 0)


# Speculation


DEPTH3 = replace(TINY, mtp_depth=3)
CHAINS = {
    "official": {},
    "paper": {"mtp_order": "hidden_embedding"},
    "raw": {"mtp_hidden": "raw", "mtp_zero_first_embedding": True},
    "raw_first": {"mtp_hidden": "raw_first"},
    "normed_first": {"mtp_hidden": "normed_first"},
}


@pytest.mark.parametrize("name", CHAINS)
def test_drafts_are_those_of_the_whole_chain(name: str) -> None:
    """Each module's logits with its cache are those of `forward` without one, however many tokens
    came at once."""
    config = replace(DEPTH3, conventions=Conventions(**CHAINS[name]))
    params, tokens = (
        random_parameters(config, std=0.3),
        np.random.default_rng(4).integers(0, 256, 40).tolist(),
    )
    decoder, seen = Decoder(params, config, np.zeros(1, int)), 0
    chain = Chain(decoder)
    for new in (1, 1, 4, 1, 2, 3, 1, 9, 1, 1):
        hidden, raw = decoder.read(np.array([tokens[seen : seen + new]]))
        seen += new
        state = hidden if config.conventions.mtp_hidden.startswith("normed") else raw
        drafts, found = chain.draft(state, tokens[: seen + 1], 3)
        _, saved = forward(params, np.array([tokens[: seen + 1] + drafts]), config)
        for depth, (draft, z) in enumerate(zip(drafts, found, strict=True), 1):
            normed = saved.mtp_heads[depth - 1].log_prob.h.reshape(-1, config.width)[seen - 1]
            assert close(z, logits(params, normed))
            assert draft == int(np.argmax(z))
            kept = chain.caches[config.layers + depth - 1]
            assert kept.shape == (1, max(seen - depth + 1, 0), config.kv_latent + config.rope)


@pytest.mark.parametrize("name", CHAINS)
def test_the_last_module_goes_on(name: str) -> None:
    """Drafts beyond the modules: the last one reads its own states and drafts at the next
    positions, as without a cache."""
    config = replace(DEPTH3, mtp_depth=1, conventions=Conventions(**CHAINS[name]))
    params, tokens = (
        random_parameters(config, std=0.3),
        np.random.default_rng(4).integers(0, 256, 20).tolist(),
    )
    decoder, seen = Decoder(params, config, np.zeros(1, int)), 0
    chain, states = Chain(decoder), np.empty((1, 0, config.width))
    for new in (1, 4, 2, 9):
        hidden, raw = decoder.read(np.array([tokens[seen : seen + new]]))
        seen += new
        state = mtp_input(config, hidden, raw)
        states = np.concatenate((states, state), axis=1)
        drafts, found = chain.draft(state, tokens[: seen + 1], 4)
        known, whole = tokens[1 : seen + 1], states
        for draft, z in zip(drafts, found, strict=True):
            run, batch = decoder.run({}, np.array([known]), 0)
            after, normed, _ = mtp_module_forward(run, 1, whole, batch)
            assert close(z, logits(params, normed[0, -1]))
            assert draft == int(np.argmax(z))
            known, whole = [*known, draft], np.concatenate((whole, after[:, -1:]), axis=1)
        assert chain.caches[config.layers].shape[1] == seen


@pytest.mark.parametrize("name", CHAINS)
def test_what_generate_drafts(name: str, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each round, after as many accepted drafts as there were, the chain gets the right states
    of the main model."""
    params, config = trained[0], replace(trained[1], conventions=Conventions(**CHAINS[name]))
    rounds: list[tuple[list[int], list[int]]] = []

    def spy(chain: Chain, state: np.ndarray, tokens: Sequence[int], count: int) -> Any:
        result = original(chain, state, tokens, count)
        rounds.append((list(tokens), result[0]))
        return result

    original = Chain.draft
    monkeypatch.setattr(Chain, "draft", spy)
    found = generate(params, config, windows(8), max_tokens=14, temperature=0.7, speculate=2)
    assert len(rounds) == sum(g.forwards for g in found) > 15
    assert sum(g.accepted for g in found) > 5
    for tokens, drafts in rounds:  # what follows a position does not change it
        _, saved = forward(params, np.array([tokens + drafts + [0, 0]]), config)
        for draft, head in zip(drafts, saved.mtp_heads, strict=False):
            normed = head.log_prob.h.reshape(-1, config.width)[len(tokens) - 2]
            assert draft == int(np.argmax(logits(params, normed)))


def windows(count: int) -> list[bytes]:
    """Pieces of real text, 4 to 24 bytes each."""
    data, rng = load_text().data, np.random.default_rng(7)
    return [
        data[start : start + rng.integers(4, 25)]
        for start in rng.integers(0, len(data) - 50, count)
    ]


@pytest.mark.parametrize("speculate", [1, 2, 5])
def test_speculation_is_plain_greedy(trained: Any, speculate: int) -> None:
    """The same tokens (if not, the two best logits differ by rounding), with a useful number of
    drafts accepted."""
    params, config = trained
    prompts = windows(200 if FULL else 40)
    plain = generate(params, config, prompts, max_tokens=16)
    found = generate(params, config, prompts, max_tokens=16, speculate=speculate)
    for prompt, a, b in zip(prompts, plain, found, strict=True):
        if a.tokens != b.tokens:
            same = next(
                t for t, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y
            )
            z = whole(params, [*prompt, *a.tokens[:same]], config)[-1]
            gap = float(z[a.tokens[same]] - z[b.tokens[same]])
            print(f"{prompt!r}: token {same} differs, the two best logits by {gap:.1e}")
            assert abs(gap) <= 1e-12 * np.max(np.abs(z))
    drafted, accepted = sum(g.drafted for g in found), sum(g.accepted for g in found)
    assert 0.2 < accepted / drafted < 0.9
    tokens, forwards = sum(len(g.tokens) - 1 for g in found), sum(g.forwards for g in found)
    assert (
        tokens == forwards + accepted
    )  # each forward gives one token, and one more for each accepted draft
    assert drafted <= speculate * forwards
    assert {g.forwards for g in plain} == {15}


@pytest.mark.parametrize("speculate", [1, 2, 5])
def test_speculation_keeps_samples(trained: Any, speculate: int) -> None:
    """A seed gives the same tokens with drafts as without, so their law is the same."""
    params, config = trained
    options = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "stop": [10], "seed": 2}
    prompts = windows(60 if FULL else 12)
    plain = generate(params, config, prompts, **options)
    found = generate(params, config, prompts, **options, speculate=speculate)
    assert [(g.tokens, g.finish) for g in found] == [(g.tokens, g.finish) for g in plain]
    assert 0.1 < sum(g.accepted for g in found) / sum(g.drafted for g in found) < 0.9


def test_untrained_modules_change_nothing() -> None:
    """Random weights draft nonsense, which is refused."""
    params = random_parameters(TINY, std=0.3)
    plain, found = (generate(params, TINY, PROMPTS, max_tokens=20, speculate=n) for n in (0, 2))
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    assert sum(g.accepted for g in found) < 0.1 * sum(g.drafted for g in found)


@pytest.mark.parametrize("speculate", [0, 2])
def test_array_api_strict(trained: Any, speculate: int) -> None:
    params, config = trained
    there = {name: strict.asarray(p) for name, p in params.items()}
    options = {
        "max_tokens": 8,
        "speculate": speculate,
        "temperature": 1.0,
        "top_p": 0.9,
        "stop": [32],
    }
    assert generate(there, config, PROMPTS, **options) == generate(
        params, config, PROMPTS, **options
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be a finite number of at least 0, got -0.5"),
        (
            {"temperature": float("nan")},
            "temperature must be a finite number of at least 0, got nan",
        ),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": float("nan")}, r"top_p must lie in \(0, 1\], got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"speculate": -1}, "speculate must be at least 0, got -1"),
        ({"stop": [256]}, "stop must hold tokens in 0…255, got 256"),
        ({"prompts": []}, "prompts must hold at least one prompt, got none"),
        (
            {"prompts": [[1], []]},
            "prompt 1 must hold at least 1 token and leave room for one .* of 64, got 0",
        ),
        (
            {"prompts": [[1] * 64]},
            "prompt 0 must hold at least 1 token and leave room for one .* of 64, got 64",
        ),
        ({"prompts": [[-1]]}, "prompt 0 must hold tokens in 0…255, got -1"),
        ({"prompts": [[1.5]]}, "prompt 0 must hold tokens in 0…255, got 1.5"),
        ({"params": {}}, "params do not fit the config: model.embed_tokens.weight is missing"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given = {"params": random_parameters(TINY, std=0.3), "config": TINY, "prompts": [[1]]} | change
    with pytest.raises(ValueError, match=message):
        generate(**given)
