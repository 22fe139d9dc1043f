"""Samples: what is a target, and the log-probabilities that learning finds again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.generate import Generation
from refimpl.train.policy import log_probs
from refimpl.train.rollout import Samples, as_arrays, sample_groups
from refimpl.train.vocabulary import END, make_vocabulary

from small_stage import CONFIG, MACHINE, begin

PROMPTS = ["1+1=", "20+3="]


def samples(temperature: float = 0.7, top_p: float = 0.9) -> Samples:
    start = begin()
    return sample_groups(
        start.params,
        CONFIG,
        start.vocabulary,
        MACHINE,
        PROMPTS,
        group=3,
        temperature=temperature,
        top_p=top_p,
        max_tokens=5,
        seed=4,
    )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.6, 0.5)])
def test_log_probabilities(temperature: float, top_p: float) -> None:
    """Those of sampling are those of the training pass, whatever was cut off by top_p."""
    found = samples(temperature, top_p)
    again, _ = log_probs(
        begin().params, CONFIG, found.tokens, key_mask=found.key_mask, temperature=temperature
    )
    assert np.max(np.abs(found.log_prob - again)[found.mask]) <= 1e-12
    assert np.all(found.log_prob[found.mask] < 0)
    assert np.all(found.log_prob[~found.mask] == 0)


def test_groups() -> None:
    """A prompt's rows stand together; only what follows it counts, the last token too."""
    found, vocabulary = samples(), make_vocabulary()
    for row in range(6):
        prompt = vocabulary.encode(PROMPTS[row // 3])
        n = int(found.lengths[row])
        assert found.tokens[row, : len(prompt)].tolist() == prompt
        assert np.flatnonzero(found.mask[row]).tolist() == [len(prompt) - 1 + i for i in range(n)]
        assert np.flatnonzero(found.key_mask[row]).tolist() == list(range(len(prompt) + n))
        targets = found.tokens[row, 1:][found.mask[row, :-1]].tolist()
        assert vocabulary.decode(targets) == found.texts[row]
        assert all(len(x) == len(prompt) + n - 1 for x in found.routes[row].values())
    assert len({tuple(row) for row in found.tokens[:3].tolist()}) == 3


def test_ends() -> None:
    """The end token is a target, and not part of the text; what max_tokens cut off has none."""
    given = [
        Generation([65, END], "stop", 1, 0, 0, (-1.0, -2.0)),
        Generation([66, 67, 68], "length", 2, 0, 0, (-3.0, -4.0, -5.0)),
    ]
    found = as_arrays([[1, 2, 3], [4]], given, make_vocabulary())
    assert found.tokens.tolist() == [[1, 2, 3, 65, END], [4, 66, 67, 68, END]]
    assert found.log_prob.tolist() == [[0, 0, -1, -2, 0], [-3, -4, -5, 0, 0]]
    assert np.array_equal(found.mask, found.log_prob < 0)
    assert found.key_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert (found.texts, found.ended) == (["A", "BCD"], [True, False])
    assert found.lengths.tolist() == [2, 3]
    some = found.take(np.array([1]))
    assert (some.tokens.tolist(), some.texts, some.ended) == ([[4, 66, 67, 68, END]], ["BCD"], [0])
    assert (some.log_prob.tolist(), some.lengths.tolist()) == ([[-3, -4, -5, 0, 0]], [3])


def test_tokens_that_the_tokenizer_lacks() -> None:
    """A model with a larger vocabulary may say them: they are no text that could be right."""
    given = [Generation([65, 261, 66, END], "stop", 3, 0, 0, (-1.0,) * 4)]
    assert as_arrays([[1]], given, make_vocabulary()).texts == ["A\N{REPLACEMENT CHARACTER}B"]


def test_context_too_short() -> None:
    start = begin()
    short = replace(CONFIG, max_positions=9)
    with pytest.raises(CouldNotRun, match="max_tokens must leave room for a prompt of 5 tokens in"):
        sample_groups(
            start.params,
            short,
            start.vocabulary,
            MACHINE,
            PROMPTS,
            group=1,
            temperature=1.0,
            top_p=1.0,
            max_tokens=5,
            seed=0,
        )
