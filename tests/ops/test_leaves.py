"""Tables of implementations: frozen, with fields for people and names for loops."""

from __future__ import annotations

import inspect

import pytest

from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.ops import (
    IMPLEMENTATIONS,
    LEAVES,
    NETWORKS,
    REFERENCE,
    Leaves,
    Networks,
    Op,
    Ops,
    mla_forward,
    rms_norm_forward,
)
from refimpl.ops.leaves import expect_table

MINE = Op(lambda x, w, *, eps: (x, None), lambda dy, saved: (dy, None))


def test_field_and_name_are_one() -> None:
    assert REFERENCE.rms_norm is REFERENCE["rms_norm"]
    assert REFERENCE.rms_norm.forward is rms_norm_forward
    assert all(REFERENCE[name] is getattr(REFERENCE, name) for name in REFERENCE)
    assert list(LEAVES) == list(REFERENCE)[: len(LEAVES)]
    assert len(LEAVES) < len(NETWORKS) == len(LEAVES) + 1 < len(REFERENCE)
    assert "mla" in REFERENCE
    assert "mla" not in LEAVES
    assert "label" not in REFERENCE


def test_some_replaced() -> None:
    """A new table; the old one is as it was."""
    table = REFERENCE | {"rms_norm": MINE}
    assert table.rms_norm is table["rms_norm"] is MINE
    assert REFERENCE.rms_norm.forward is rms_norm_forward
    again = table | {"linear": MINE}
    assert again.rms_norm is again.linear is MINE
    assert again.mla is REFERENCE.mla
    assert (LEAVES | {"linear": MINE}).linear is MINE
    assert REFERENCE | table == table


def test_frozen() -> None:
    with pytest.raises(AttributeError, match=r"a table is frozen: write table \| \{'mla': …\}"):
        REFERENCE.mla = MINE  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "op", "error", "message"),
    [
        ("attn", MINE, ValueError, "'attn' must be one of linear, embedding, .*, mtp"),
        ("mla", None, TypeError, r"mla must be an Op\(forward, backward\), got NoneType"),
        ("label", MINE, ValueError, "'label' must be one of linear"),
    ],
)
def test_errors(name: str, op: Op, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        REFERENCE | {name: op}
    with pytest.raises(KeyError):
        REFERENCE["attn"]


def test_help_shows_the_name_of_a_table() -> None:
    """And not the functions in it, a screen of them."""
    assert repr(REFERENCE) == "REFERENCE"
    assert repr(LEAVES) == "LEAVES"
    assert repr(IMPLEMENTATIONS["absorbed"]) == "REFERENCE | {'mla': …}"
    wanted = "ops: 'Leaves' = LEAVES) -> 'tuple[MLAOutput, MLASaved]'"
    assert str(inspect.signature(mla_forward)).endswith(wanted)


@pytest.mark.parametrize(
    ("table", "wanted", "got"),
    [
        ({"linear": REFERENCE.linear}, "LEAVES", "dict"),
        (LEAVES, "NETWORKS", "LEAVES"),
        (NETWORKS | {"ffn": REFERENCE.ffn}, "REFERENCE", "NETWORKS"),
    ],
)
def test_a_table_that_lacks_ops(table: object, wanted: str, got: str) -> None:
    kind = {"LEAVES": Leaves, "NETWORKS": Networks, "REFERENCE": Ops}[wanted]
    expect_table(REFERENCE, kind)
    with pytest.raises(TypeError, match=rf"ops must be {wanted} or a larger table, .*, got {got}"):
        expect_table(table, kind)


def test_composite_ops_ask_for_a_table() -> None:
    for op in ("ffn", "mla", "mla_absorbed", "moe", "head_cross_entropy", "mtp"):
        case = CASES[op](RandomDraw(0))
        with pytest.raises(TypeError, match=r"ops must be (LEAVES|NETWORKS) or a larger table"):
            pair_of(op).forward(*case.inputs, **case.kwargs, ops={})
