"""Continued prompts: a batch is its rows, a group its prompt several times, what is recorded is
what the whole forward gives, and speculation changes no token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from refimpl.config import Conventions, ModelConfig
from refimpl.generate import Chain, Generation, generate
from refimpl.model import forward, logits
from refimpl.ops import REFERENCE, Op, Ops
from refimpl.text import load_text

import pretended_cupy
from generate.examples import CHAINS, CONFIGS, PROMPTS, TINY, trained_model, whole
from random_parameters import random_parameters
from support import FULL

FEW = {"max_tokens": 12}


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, np.ndarray], ModelConfig]:
    return trained_model()


# The batch


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


# Groups, and what is recorded


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"]
)
def test_a_group_is_its_prompt_several_times(trained: Any, options: dict[str, Any]) -> None:
    """The same tokens as of the prompts written out, in that order of rows, with each prompt read
    once."""
    read: list[tuple[int, ...]] = []

    def forward(x: np.ndarray, *weights: Any, **given: Any) -> Any:
        read.append(x.shape[:2])
        return REFERENCE.mla.forward(x, *weights, **given)

    table = REFERENCE | {"mla": Op(forward, REFERENCE.mla.backward)}
    prompts = [list(b"The "), list(b"An object"), list(b"x")]
    told: list[tuple[int, int, str]] = []
    found = generate(
        *trained,
        prompts,
        **FEW,
        stop=[32],
        seed=4,
        group=3,
        prefill=table,
        **options,
        on_token=lambda *event: told.append(event),
    )
    written = [prompt for prompt in prompts for _ in range(3)]
    assert found == generate(*trained, written, **FEW, stop=[32], seed=4, **options)
    assert set(read) == {(3, 9)}
    for row, one in enumerate(found):
        assert [token for place, token, _ in told if place == row] == one.tokens
    assert len({len(g.tokens) for g in found}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_recorded(name: str, temperature: float) -> None:
    """Log-probabilities and routes are those of one forward over all tokens, in rows of different
    lengths that finish one after another."""
    config = CONFIGS[name]
    params, stop = random_parameters(config, std=0.3), list(range(0, 256, 7))
    options: Any = {"max_tokens": 20, "stop": stop, "temperature": temperature, "top_p": 0.9}
    found = generate(params, config, PROMPTS, **options, seed=1, group=2, record=True)
    assert len({len(g.tokens) for g in found}) > (3 if temperature else 1)
    plain = generate(params, config, PROMPTS, **options, seed=1, group=2)
    assert [g._replace(log_probs=(), routes={}) for g in found] == plain
    for row, one in enumerate(found):
        tokens = [*PROMPTS[row // 2], *one.tokens]
        output, _ = forward(params, np.array([tokens[:-1]]), config, with_loss=False)
        z = logits(params, output.hidden)[0, len(PROMPTS[row // 2]) - 1 :] / (temperature or 1.0)
        log_probs = z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))
        wanted = log_probs[np.arange(len(one.tokens)), one.tokens]
        np.testing.assert_allclose(one.log_probs, wanted, rtol=0, atol=1e-12)
        assert list(one.routes) == list(output.routes)
        for layer, route in output.routes.items():
            assert one.routes[layer].dtype == np.int64
            assert np.array_equal(one.routes[layer], route.indices[0])


def test_finished_rows_leave() -> None:
    """At once: each step reads the rows that go on, and the group's prompt is one row."""
    config = replace(TINY, layers=1, dense_layers=1, mtp_depth=0)
    params, sizes = random_parameters(config, std=0.3), list[int]()

    def forward(x: np.ndarray, *weights: Any, **given: Any) -> Any:
        sizes.append(len(x))
        return REFERENCE.mla.forward(x, *weights, **given)

    table = REFERENCE | {"mla": Op(forward, REFERENCE.mla.backward)}
    options: Any = {"max_tokens": 40, "stop": range(0, 256, 20), "temperature": 1.0}
    found = generate(params, config, [[1, 2]], group=40, prefill=table, decode=table, **options)
    lengths = np.array([len(g.tokens) for g in found])
    assert sizes == [1, *(int(np.sum(lengths > step)) for step in range(1, max(lengths)))]
    assert len(set(sizes)) > 5


# Sampling


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
    left = config.max_positions - len(prompt)
    (both,) = generate(params, config, [prompt], max_tokens=left, speculate=speculate)
    assert both == full._replace(finish="length")
    (one,) = generate(params, config, [prompt], max_tokens=1, speculate=speculate)
    assert one == Generation(free.tokens[:1], "length", 0, 0, 0)


# Speculation


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


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_cupy(trained: Any, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and records on CuPy's arrays: the same tokens and routes, and the same
    log-probabilities but for rounding."""
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    params, config = trained
    there = {name: pretended_cupy.there(p) for name, p in params.items()}
    options: Any = {"max_tokens": 8, "temperature": 1.0, "top_p": top_p, "stop": [32]}
    options |= {"group": 2, "record": True}
    found = generate(there, config, PROMPTS, **options)
    for one, other in zip(found, generate(params, config, PROMPTS, **options), strict=True):
        assert one[:5] == other[:5]
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-11)
        for layer, routes in other.routes.items():
            assert np.array_equal(one.routes[layer], routes)


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
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"speculate": 1, "group": 2}, "speculate=1 cannot be combined with group or record"),
        ({"speculate": 1, "record": True}, "speculate=1 cannot be combined with group or record"),
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
