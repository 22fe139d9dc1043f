"""Absorbed decoding with caches is the whole forward, whatever the padding and the pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.checkpoint.lazy import LazyParameters
from refimpl.generate import Decoder, generate
from refimpl.kernels.columns import for_generation
from refimpl.model import forward, logits
from refimpl.ops import IMPLEMENTATIONS

from generate.examples import CONFIGS, PROMPTS, TINY, close, whole
from random_parameters import random_parameters


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
        generate(params, source.config, [PROMPTS[1]], speculate=2, max_tokens=12)
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
