"""Windows and packed rows: every token predicted once, and nothing across documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.batch import make_batch
from refimpl.config import ModelConfig
from refimpl.splits import Part, run_parts, whole_of
from refimpl.train.packing import Examples, Windows, chosen, order, pack

from drawn_batches import SMALL as SMALL_MODEL
from random_parameters import random_parameters
from support import FULL

END = 30
SMALL = replace(
    SMALL_MODEL,
    mtp_depth=2,
    balance_weight=0.0,  # the balance loss counts a row as one sequence, packed or not
)
TOLERANCE = 1e-12  # of the largest value; seen: 3e-15


def documents_of(data: st.DataObject, longest: int = 9) -> list[list[int]]:
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=7))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    return [rng.integers(0, END, n).tolist() for n in lengths]


def at_depth(examples: Examples, depth: int, config: ModelConfig = SMALL) -> Any:
    return make_batch(np.empty(0), config=config, **examples.arrays()).at(depth)


@given(st.data(), st.booleans())
def test_windows_predict_each_token_once(data: st.DataObject, masked: bool) -> None:
    """Joined again, the windows are the stream; targets are its next tokens, those of other
    documents left out with the mask; MTP module k predicts tokens k further."""
    documents = documents_of(data)
    stream = [token for document in documents for token in (*document, END)]
    owner = [i for i, document in enumerate(documents) for _ in range(len(document) + 1)]
    length = data.draw(st.integers(1, len(stream) - 1))
    windows = Windows(documents, length, end=END, masked=masked)
    examples = windows.take(range(len(windows)))
    count = examples.tokens.size
    assert count == len(windows) * length > len(stream) - 1 - length
    assert examples.tokens.ravel().tolist() == stream[:count]
    assert examples.targets.ravel().tolist() == stream[1 : count + 1]
    assert examples.key_mask is None
    assert (examples.mask is None) == (examples.segments is None) == (not masked)
    if masked:
        inside = [owner[i] == owner[i + 1] for i in range(count)]
        assert examples.mask.ravel().tolist() == inside
        assert examples.segments.ravel().tolist() == owner[:count]
    for depth in range(1, min(3, length)):
        config = replace(SMALL, mtp_depth=depth)
        seen = at_depth(examples, depth, config)
        for row in range(len(windows)):
            for i in range(length - depth):
                at = row * length + i
                assert seen.tokens[row, i] == stream[at + depth]
                assert seen.targets[row, i] == stream[at + depth + 1]
                assert seen.mask[row, i] == (not masked or owner[at] == owner[at + depth + 1])


def test_windows_that_cannot_be() -> None:
    for length in (0, 6):
        with pytest.raises(ValueError, match=f"length must lie in 1 … 5, .* got {length}$"):
            Windows([[1, 2], [3, 4]], length, end=END)
    assert len(Windows([[1, 2], [3, 4]], 5, end=END)) == 1
    with pytest.raises(ValueError, match="length must lie in"):
        Windows([], 1, end=END)


def test_epochs_go_on_from_anywhere() -> None:
    """Each epoch takes every window once, in an order of its own; a batch that is asked for alone
    is the one that follows when all are asked for in a row."""
    windows = Windows([list(range(29))], 4, end=END)
    assert len(windows) == 7
    sequence = [chosen(position, 1, 7, 5).item() for position in range(30)]
    for epoch in range(4):
        assert sorted(sequence[7 * epoch : 7 * epoch + 7]) == list(range(7))
        assert sequence[7 * epoch : 7 * epoch + 7] == order(5, epoch, 7).tolist()
    assert order(5, 0, 7).tolist() != order(5, 1, 7).tolist() != order(6, 1, 7).tolist()
    for position, size in ((0, 5), (5, 5), (3, 20), (13, 2), (6, 0)):
        assert chosen(position, size, 7, 5).tolist() == sequence[position : position + size]
        wanted = windows.take(sequence[position : position + size])
        found = windows.batch(position, size, 5)
        for x, y in zip(found.arrays().values(), wanted.arrays().values(), strict=True):
            assert np.array_equal(x, y)


def test_arrays_are_read_only_where_they_are_shared() -> None:
    with pytest.raises(ValueError, match="read-only"):
        order(1, 0, 5)[0] = 3


@given(st.data())
def test_pack_loses_nothing(data: st.DataObject) -> None:
    """Every document stands once, whole, in the first row that had room; what counts is what was
    said to count, but for the first token."""
    documents = documents_of(data)
    counted = [
        data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in map(len, documents)
    ]
    examples = pack(zip(documents, counted, strict=True), 9)
    rows: list[list[int]] = []
    for number, document in enumerate(documents):
        free = (r for r in rows if sum(len(documents[i]) for i in r) + len(document) <= 9)
        row = next(free, None)
        if row is None:
            rows.append([number])
        else:
            row.append(number)
    assert examples.tokens.shape == (len(rows), 9)
    for row, numbers in enumerate(rows):
        start = 0
        for place, number in enumerate(numbers):
            n = len(documents[number])
            here = np.s_[row, start : start + n]
            assert examples.tokens[here].tolist() == documents[number]
            assert examples.segments[here].tolist() == [place] * n
            assert examples.key_mask[here].all()
            assert examples.targets[here][:-1].tolist() == documents[number][1:]
            assert examples.mask[here].tolist() == [*counted[number][1:], False]
            start += n
        assert not examples.key_mask[row, start:].any()
        assert not examples.mask[row, start:].any()
    part = examples.rows(0, 1)
    assert part.tokens.shape == (1, 9)
    assert examples.rows(1, len(rows)).tokens.shape == (len(rows) - 1, 9)


def test_pack_refuses() -> None:
    with pytest.raises(ValueError, match=r"length must be .* got 3 for document 1 with 4 tokens"):
        pack([([1, 2], [True] * 2), ([1, 2, 3, 4], [True] * 4)], 3)
    with pytest.raises(ValueError, match="for document 0 with 0 tokens"):
        pack([([], [])], 3)
    with pytest.raises(ValueError, match="counted as tokens, got 1 and 2 in document 0"):
        pack([([1, 2], [True])], 3)
    assert pack([], 3).tokens.shape == (0, 3)


@settings(max_examples=60 if FULL else 12)
@given(st.data())
def test_packed_is_the_sum_of_documents_alone(data: st.DataObject) -> None:
    """Losses, MTP's included, loads and every gradient, in float64: the rows with the document mask
    against each document in a forward of its own, divided by the same counts."""
    documents = documents_of(data)
    pairs = [
        (tokens, data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))))
        for tokens in documents
    ]
    params = random_parameters(SMALL)
    packed = pack(pairs, 9)
    parts = [Part(packed.arrays(), 0)]
    alone = []
    for tokens, counted in pairs:
        mask = np.array([[*counted[1:], False]])
        targets = np.array([[*tokens[1:], 0]])
        alone.append(Part({"tokens": np.array([tokens]), "targets": targets, "mask": mask}, 0))
    whole = whole_of(parts, SMALL)
    assert whole[:2] == whole_of(alone, SMALL)[:2]
    ((output, gradients),) = run_parts(params, parts, SMALL, whole=whole)
    each = run_parts(params, alone, SMALL, whole=whole)
    losses = {"main": output.main, **{f"mtp {i}": x for i, x in enumerate(output.mtp)}}
    sums: dict[str, Any] = {"main": sum(o.main for o, _ in each)}
    sums |= {f"mtp {i}": sum(o.mtp[i] for o, _ in each) for i in range(2)}
    losses |= {f"load {layer}": x for layer, x in output.loads.items()}
    sums |= {f"load {layer}": sum(o.loads[layer] for o, _ in each) for layer in output.loads}
    losses |= gradients
    sums |= {name: sum(g[name] for _, g in each) for name in gradients}
    for name, x in losses.items():
        error = np.max(np.abs(x - sums[name]))
        assert error <= TOLERANCE * np.max(np.abs(x)), f"{name} is off by {error}"
