"""Which planted bug a part's numbers are those of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..check.planted import Planted
from .parts import Part
from .truth import Truth

__all__ = ["Diagnosis", "diagnose"]


class Diagnosis(NamedTuple):
    named: list[Planted]  # bugs that give these numbers
    hints: list[str]  # what needs no catalogue: a factor, a sign, a transpose
    note: str  # what could not be done, and why


def diagnose(truth: Truth, part: Part, theirs: Mapping[str, np.ndarray], dtype: str) -> Diagnosis:
    return Diagnosis([], [], "")
