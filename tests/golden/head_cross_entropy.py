"""The output head and cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable

from golden.case import Case
from golden.cross_entropy import cross_entropy, loss_settings
from golden.linear import linear


def cases() -> Iterable[Case]:
    for name, targets, mask, normaliser in loss_settings():
        case = Case(f"head_cross_entropy/{name}", normaliser=normaliser)
        given = {} if mask is None else {"mask": case.aux("mask", mask)}
        h, w = case.input("h", 2, 4, 5), case.input("w", 7, 5, mean=0.2)
        loss = cross_entropy(
            linear(h, w), case.aux("targets", targets), normaliser=normaliser, **given
        )
        yield case.finish(loss=loss)
