"""The drafts of the MTP chain are those of the whole chain without caches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refimpl.config import Conventions
from refimpl.generate import Chain, Decoder
from refimpl.model import forward, logits, mtp_input, mtp_module_forward

from generate.examples import CHAINS, DEPTH3, close
from random_parameters import random_parameters


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
