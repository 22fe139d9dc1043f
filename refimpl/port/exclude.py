"""What a PASS does not exclude."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..check.planted import Planted
from .parts import Part
from .truth import Truth

__all__ = ["not_excluded"]


def not_excluded(
    truth: Truth, parts: Sequence[Part], names_checked: Collection[str], dtype: str
) -> list[Planted]:
    return []
