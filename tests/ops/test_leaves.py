"""Tables of implementations: looked up by name, replaced by name, frozen."""

from __future__ import annotations

import pytest

from refimpl.ops import REFERENCE, Op, attention_backward, attention_forward
from refimpl.ops.leaves import LEAVES

MINE = Op(lambda *args, **kwargs: attention_forward(*args, **kwargs), attention_backward)


def test_replaced_by_name() -> None:
    table = REFERENCE | {"attention": MINE}
    assert table.attention is table["attention"] is MINE
    assert table.mla is REFERENCE.mla
    assert REFERENCE.attention.forward is attention_forward  # which stays as it was
    assert (table | {"attention": REFERENCE.attention}).attention == REFERENCE.attention
    assert list(table) == list(REFERENCE)
    assert len(table) == len(REFERENCE) == len(set(REFERENCE))


def test_leaves_are_part_of_the_reference() -> None:
    assert set(LEAVES) < set(REFERENCE)
    assert all(LEAVES[name] == REFERENCE[name] for name in LEAVES)


def test_shown_by_what_differs() -> None:
    """So that help() of an op shows a name and not two dozen functions."""
    assert repr(REFERENCE) == "REFERENCE"
    assert repr(REFERENCE | {"attention": MINE}) == "REFERENCE | {'attention': …}"


def test_errors() -> None:
    with pytest.raises(ValueError, match="'attentoin' must be one of linear, embedding, "):
        REFERENCE | {"attentoin": MINE}
    with pytest.raises(TypeError, match=r"attention must be an Op\(forward, backward\), got tuple"):
        REFERENCE | {"attention": (attention_forward, attention_backward)}  # type: ignore[dict-item]
    with pytest.raises(AttributeError, match="a table is frozen: write table"):
        REFERENCE.attention = MINE
    with pytest.raises(KeyError, match="label"):
        REFERENCE["label"]
