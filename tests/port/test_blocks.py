"""The blocks of every kind of tensor, and how they are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.config import ModelConfig, preset
from refimpl.grads import gradient_shapes
from refimpl.port.blocks import cuts_of, told

TINY = preset("tiny")  # H 3, N 5, R 4, V 6, A 10, C 7, D 20, E 8
ATTENTION = "grad/model.layers.1.self_attn."
B, T = 2, 9


def said(name: str, shape: tuple[int, ...], place: Any, config: ModelConfig = TINY) -> str:
    """What is told of a tensor that is wrong at ``place`` alone."""
    bad = np.zeros(shape, bool)
    bad[place] = True
    cuts = cuts_of(name, shape, config)
    others = [tuple(n for n in range(bad.ndim) if n != cut.axis) for cut in cuts]
    return told(cuts, [bad.any(axis=axes) for axes in others])


ALL = slice(None)


@pytest.mark.parametrize(
    ("name", "shape", "place", "line"),
    [
        (
            ATTENTION + "q_b_proj.weight",
            (27, 10),
            [n for n in range(27) if n % 9 >= 5],
            "nope rows: ok, rotated rows: wrong",
        ),
        (
            ATTENTION + "q_b_proj.weight",
            (27, 10),
            slice(9, 14),
            "nope rows: wrong, rotated rows: ok; head 1: wrong, the other 2 ok",
        ),
        (
            ATTENTION + "kv_a_proj_with_mqa.weight",
            (11, 20),
            (9, 3),
            "latent rows: ok, rotated key rows: wrong",
        ),
        (
            ATTENTION + "kv_b_proj.weight",
            (33, 7),
            [n for n in range(33) if n % 11 < 5],
            "key rows: wrong, value rows: ok",
        ),
        (
            ATTENTION + "kv_b_proj.weight",
            (33, 7),
            [*range(11), *range(22, 33)],
            "heads 0, 2: wrong, the other 1 ok",
        ),
        (
            ATTENTION + "o_proj.weight",
            (20, 18),
            (ALL, slice(6, 12)),
            "columns of head 1: wrong, the other 2 ok",
        ),
        (
            "grad/model.layers.1.mlp.gate.weight",
            (8, 20),
            [3, 5],
            "rows of experts 3, 5: wrong, the other 6 ok",
        ),
        (
            "grad/model.layers.3.eh_proj.weight",
            (20, 40),
            (ALL, slice(20, 40)),
            "columns that read the embedding: ok, columns that read the hidden state: wrong",
        ),
        ("grad/lm_head.weight", (256, 20), range(10, 20), "rows of the vocabulary 10…19: wrong"),
        ("grad/lm_head.weight", (256, 20), ALL, "everywhere"),
        ("grad/model.norm.weight", (20,), 3, ""),
        (
            "act/model.layers.1",
            (B, T, 20),
            (1, slice(4, 9)),
            "sequence 1: wrong, the other 1 ok; positions 4, 5, 6, 7, 8: wrong, the other 4 ok",
        ),
        (
            "cot/model.layers.1.self_attn.latent",
            (B, T, 11),
            (ALL, ALL, slice(7, 11)),
            "latent: ok, rotated key: wrong",
        ),
        (
            "act/model.layers.1.self_attn.q",
            (B, T, 3, 9),
            (ALL, ALL, 2, slice(5)),
            "nope part: wrong, rotated part: ok; head 2: wrong, the other 2 ok",
        ),
        (
            "act/model.layers.1.self_attn.probabilities",
            (B, 3, T, T),
            (ALL, ALL, ALL, 0),
            "key position 0: wrong, the other 8 ok",
        ),
        (
            "act/model.layers.1.mlp.gate.scores",
            (B, T, 8),
            (ALL, ALL, 7),
            "expert 7: wrong, the other 7 ok",
        ),
        ("aux/load.1", (8,), [0], "expert 0: wrong, the other 7 ok"),
        ("out/logits", (B, T, 256), (0, 0), "sequence 0: wrong, the other 1 ok; position 0"),
        ("out/loss", (), (), ""),
    ],
)
def test_one_block_wrong(name: str, shape: tuple[int, ...], place: Any, line: str) -> None:
    found = said(name, shape, place)
    assert found == line or (line and found.startswith(line)), found


def test_other_shapes_of_the_model() -> None:
    """Without compression of the queries; with the joined input the other way round."""
    config = replace(TINY, q_latent=None)
    name = ATTENTION + "q_proj.weight"
    assert said(name, (27, 20), slice(9), config) == "head 0: wrong, the other 2 ok"
    paper = replace(config.conventions, mtp_order="hidden_embedding")
    config = replace(config, conventions=paper)
    name = "grad/model.layers.3.eh_proj.weight"
    line = "columns that read the hidden state: ok, columns that read the embedding: wrong"
    assert said(name, (20, 40), (ALL, slice(20, 40)), config) == line


@pytest.mark.parametrize("name", ["tiny", "v2-lite"])
def test_cuts_fit_every_gradient(name: str) -> None:
    """No cut was left out because its size is another: attention has its own, and they add up."""
    config = replace(preset(name), layers=2, vocabulary=64, experts=8, groups=1, keep_groups=1)
    with_cuts = set()
    for tensor, shape in gradient_shapes(config).items():
        for cut in cuts_of(f"grad/{tensor}", shape, config):
            assert len(cut.block) == shape[cut.axis]
            assert set(cut.block) == set(range(cut.blocks))
            with_cuts.add(tensor.rpartition("layers.1.")[2])
    wanted = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    wanted |= {"q_b_proj"} if config.q_latent else {"q_proj"}
    assert {f"self_attn.{x}.weight" for x in wanted} <= with_cuts


def test_long_lists_are_short() -> None:
    many = [n for n in range(256) if n % 2]
    line = said("grad/lm_head.weight", (256, 20), many)
    assert (
        line == "rows of the vocabulary 1, 3, 5, 7, 9, 11, … (128 of 256): wrong, the other 128 ok"
    )
    line = said("grad/lm_head.weight", (256, 20), [n for n in range(256) if n not in (7, 9)])
    assert line == "rows of the vocabulary: all wrong but 7, 9"


def test_vectors_have_no_names() -> None:
    cuts = cuts_of("mla-1/grad/x", (2, 3), None)
    assert told(cuts, [np.array([True, True]), np.array([False, True, False])]) == (
        "index of axis 1: 1: wrong, the other 2 ok"
    )
