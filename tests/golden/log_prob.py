"""Log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Iterable

from golden.case import Case
from golden.cross_entropy import KEPT, TARGETS, WEIGHTS, token_log_probs
from golden.linear import linear


def cases() -> Iterable[Case]:
    """log π(target) at a temperature, times the mask."""
    settings = (
        ("cool", TARGETS, KEPT, 0.6),
        ("warm", TARGETS, WEIGHTS, 1.9),
        ("whole", [[3, 0, 3, 5]], None, 1.0),
    )
    for name, targets, mask, temperature in settings:
        case = Case(f"log_prob/{name}", temperature=temperature)
        h, w = case.input("h", len(targets), 4, 5), case.input("w", 7, 5, mean=0.2)
        y = token_log_probs(linear(h, w) / temperature, case.aux("targets", targets))
        yield case.finish(y=y if mask is None else y * case.aux("mask", mask))
