"""The choices that have a name, and the one error for what is none of them."""

from __future__ import annotations

from typing import get_args

import pytest

from refimpl.config import Conventions
from refimpl.ops import choices
from refimpl.ops.choices import Layout, expect_choice


def test_expect_choice() -> None:
    for value in get_args(Layout):
        expect_choice("layout", value, Layout)
    for value in ("Halves", "", None, 1):
        with pytest.raises(ValueError, match="layout must be one of interleaved, halves, got"):
            expect_choice("layout", value, Layout)


def test_every_choice_is_between_at_least_two() -> None:
    named = [getattr(choices, name) for name in choices.__all__ if name != "expect_choice"]
    assert named
    assert all(len(set(get_args(choice))) == len(get_args(choice)) >= 2 for choice in named)


def test_defaults_of_the_conventions_are_choices() -> None:
    """What a record holds is what an op takes."""
    record = Conventions()
    expect_choice("rope_layout", record.rope_layout, choices.Layout)
    expect_choice("masked_groups", record.masked_groups, choices.MaskedGroups)
    expect_choice("softmax_ranking", record.softmax_ranking, choices.Ranking)
    expect_choice("mtp_order", record.mtp_order, choices.MTPOrder)
