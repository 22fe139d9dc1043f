"""Choices by name: each is checked where it is given, with one message."""

from __future__ import annotations

from typing import Literal, get_args

import pytest

from refimpl.ops import choices
from refimpl.ops.choices import Layout, expect_choice


def test_a_choice_passes() -> None:
    for name in get_args(Layout):
        expect_choice("layout", name, Layout)


@pytest.mark.parametrize("value", ["half", "", None, 1, ["halves"]])
def test_anything_else_is_an_error(value: object) -> None:
    with pytest.raises(ValueError, match="layout must be one of interleaved, halves, got "):
        expect_choice("layout", value, Layout)


def test_no_choice_is_known_twice() -> None:
    """Two Literals of the same names would be one that somebody wrote again."""
    literals = [x for x in vars(choices).values() if getattr(x, "__origin__", None) is Literal]
    assert len({frozenset(get_args(x)) for x in literals}) == len(literals) > 5
