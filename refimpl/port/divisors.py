"""By which counts a port divides the sums of a batch in parts: its gradients fitted by the parts'.

A truth with a split has every part's gradient of every term of the loss, undivided. The gradients
of a program that only divides wrongly are a sum of these with other factors. Least squares find the
factors, and the rules of `refimpl.grads.split` give them names. derivations/splits.md has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .compare import FACTOR
from .truth import Truth

__all__ = ["Division", "division", "hidden_rules"]

SAME = 1e-9  # of two columns' angle: they are one
LEAST_NUMBERS = 2  # of the gradients, for each factor that is fitted: fewer fit anything
MOST_TRIED = 2000  # combinations of rules, the nearest first
MOST_NUMBERS = 2**26  # of all the gradients that are fitted; the first so many
Gradient = Callable[[str], np.ndarray]


class Division(NamedTuple):
    """What a port's gradients are as sums over parts."""

    rules: dict[str, list[str]]  # by term, the rules that give its numbers, if they are not right
    factors: dict[str, list[float]]  # by term and part, over the right ones; of an unnamed rule

    def told(self) -> list[str]:
        """As lines of a report."""
        by_rule: dict[str, list[str]] = {}
        for term, rules in self.rules.items():
            by_rule.setdefault(" or ".join(rules), []).append(term)
        lines = [f"{', '.join(terms)}: {rule}" for rule, terms in by_rule.items()]
        for term, factors in self.factors.items():
            shown = ", ".join(f"{x:.4g}" for x in factors)
            lines.append(f"{term}: by no rule we know, the parts count {shown} times")
        return lines


def division(truth: Truth, names: Sequence[str], theirs: Gradient, dtype: str) -> Division | None:
    """How the gradients ``names`` (of parameters) of a port divide the sums over parts; None if
    they are the right ones, or no sum over parts at all.

    Args:
        theirs: a gradient by its name. dtype: what the port computes in.
    """
    split = truth.metadata.get("split")
    if not split:
        return None
    fit = _Fit(truth, split, list(_affordable(truth, names)), theirs, dtype)
    right = {term: factors["right"] for term, factors in split["rules"].items()}
    if not fit.columns or fit.explains(right):
        return None
    for chosen in fit.combinations():
        factors = {term: split["rules"][term][rule] for term, rule in chosen.items()}
        if fit.explains(factors):
            named = {
                term: [r for r, c in by.items() if fit.explains(factors | {term: c})]
                for term, by in split["rules"].items()
            }
            wrong = {term: rules for term, rules in named.items() if "right" not in rules}
            return Division(wrong, {}) if wrong else None
    found = fit.factors()
    if fit.numbers <= LEAST_NUMBERS * len(fit.columns) or not fit.explains(found):
        return None
    changed = {
        term: [c / r if r else c for c, r in zip(factors, right[term], strict=True)]
        for term, factors in found.items()
        if not np.allclose(factors, right[term], rtol=1e-3)
    }
    return Division({}, changed)


def hidden_rules(truth: Truth, names: Sequence[str], dtype: str) -> list[str]:
    """The wrong divisors that change none of the gradients ``names`` (of parameters) by more than
    a right port may differ, as ``splits: …``; none if there is no gradient."""
    split = truth.metadata.get("split")
    if not split or not names:
        return []
    fit, rules = _Fit(truth, split, list(_affordable(truth, names)), None, dtype), split["rules"]
    right = {term: by["right"] for term, by in rules.items()}
    return [
        f"splits: {term} by {rule}"
        for term, by in rules.items()
        for rule, factors in by.items()
        if rule != "right" and fit.explains(right | {term: factors})
    ]


def _affordable(truth: Truth, names: Sequence[str]) -> Iterator[str]:
    """Those with parts, as long as they are few numbers in all."""
    split, numbers = truth.metadata["split"], 0
    for name in names:
        parts = [
            truth.entries.get(f"split/{part}/{term}/{name}")
            for term in split["rules"]
            for part in range(len(split["shapes"]))
        ]
        whole = truth.entries.get(f"grad/{name}")
        if whole and all(part and part.shape == whole.shape for part in parts):
            numbers += prod(whole.shape)
            if numbers <= MOST_NUMBERS:
                yield name


class _Fit:
    """Least squares over all gradients, each in its own units; without ``theirs``, of the right
    ones."""

    def __init__(
        self,
        truth: Truth,
        split: Mapping[str, Any],
        names: list[str],
        theirs: Gradient | None,
        dtype: str,
    ) -> None:
        self.truth, self.split = truth, split
        self.names = names
        self.theirs: Gradient = theirs or (lambda name: truth.array(f"grad/{name}"))
        self.dtype = dtype
        parts = range(len(split["shapes"]))
        self.all = [(term, part) for term in split["rules"] for part in parts]
        size, self.numbers = len(self.all), 0
        gram, target = np.zeros((size, size)), np.zeros(size)
        for name in names:
            scale = 1 / (
                self.unit(name) * np.sqrt(max(prod(truth.entries[f"grad/{name}"].shape), 1))
            )
            columns = self.columns_of(name) * scale
            self.numbers += columns.shape[1]
            gram += columns @ columns.T
            target += columns @ (np.asarray(self.theirs(name), np.float64).reshape(-1) * scale)
        self.gram, self.target = gram, target
        self.columns = self._independent()

    def unit(self, name: str) -> float:
        """The unit of a gradient, and never 0."""
        entry = self.truth.entries[f"grad/{name}"]
        return entry.units.get(self.dtype) or np.finfo(np.float64).tiny

    def columns_of(self, name: str) -> np.ndarray:
        """[terms · parts, elements]: the parts' gradients of one parameter."""
        arrays = [self.truth.array(f"split/{part}/{term}/{name}") for term, part in self.all]
        return np.stack([np.asarray(x, np.float64).reshape(-1) for x in arrays])

    def _independent(self) -> list[int]:
        """The columns that are not 0 and no other's multiple, the first of each kind."""
        kept: list[int] = []
        for i in range(len(self.all)):
            own = self.gram[i, i]
            if own > 0 and all(
                self.gram[i, j] ** 2 < (1 - SAME) * own * self.gram[j, j] for j in kept
            ):
                kept.append(i)
        return kept

    def factors(self) -> dict[str, list[float]]:
        """The factors that fit best; 0 for columns without a say."""
        found = np.zeros(len(self.all))
        scale = 1 / np.sqrt(np.diag(self.gram)[self.columns])
        inner = self.gram[np.ix_(self.columns, self.columns)] * scale * scale[:, None]
        found[self.columns] = scale * np.linalg.lstsq(inner, scale * self.target[self.columns])[0]
        by_term: dict[str, list[float]] = {term: [] for term in self.split["rules"]}
        for (term, _), x in zip(self.all, found, strict=True):
            by_term[term].append(float(x))
        return by_term

    def combinations(self) -> Iterator[dict[str, str]]:
        """A rule for each term, the nearest to the best fit first."""
        rules = self.split["rules"]
        fitted = self.factors()
        size = np.sqrt(np.diag(self.gram)).reshape(len(rules), -1)
        ranked = []
        for (term, by_name), weight in zip(rules.items(), size, strict=True):
            away = {
                rule: float(np.linalg.norm((np.array(c) - fitted[term]) * weight))
                for rule, c in by_name.items()
            }
            ranked.append(sorted(((x, rule) for rule, x in away.items())))
        every = sorted(product(*ranked), key=lambda chosen: sum(x for x, _ in chosen))
        for chosen in every[:MOST_TRIED]:
            yield {term: rule for term, (_, rule) in zip(rules, chosen, strict=True)}

    def explains(self, factors: Mapping[str, Sequence[float]]) -> bool:
        """Whether all gradients are the sums with these factors, within the port's rounding."""
        c = np.array([factors[term][part] for term, part in self.all])
        for name in self.names:
            wanted = c @ self.columns_of(name)
            entry = self.truth.entries[f"grad/{name}"]
            most = float(np.max(np.abs(wanted), initial=0.0))
            unit = self.unit(name) * max(1.0, most / entry.scale if entry.scale > 0 else 1.0)
            error = np.abs(np.asarray(self.theirs(name), np.float64).reshape(-1) - wanted)
            if not np.max(error, initial=0.0) <= FACTOR * unit:
                return False
        return True
