"""What a PASS does not exclude: the planted bugs of its parts that change no judged number by more
than a right port's rounding may."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import numpy as np

from ..check.cases import CASES
from ..check.planted import Planted
from ..errors import CouldNotRun
from ..parameters import block_shapes
from .compare import FACTOR
from .diagnose import bugs_of, largest, unit_of
from .parts import Part
from .recompute import BLOCK, recompute
from .truth import Truth

__all__ = ["not_excluded"]

MOST_BYTES = 2**28  # of a part's weights in float64: with more, a hundred bugs take hours
MOST_PARTS = 4  # of a kind and direction that a bug is tried on: the first, the last, and between


def not_excluded(
    truth: Truth, parts: Sequence[Part], names_checked: Collection[str], dtype: str
) -> list[Planted]:
    """The bugs of ``parts`` that would not have shown in the tensors ``names_checked``; each is
    tried on up to `MOST_PARTS` parts of a kind. CouldNotRun if a part of a model can't be computed
    again, or is too large to be computed with every bug."""
    judged, hidden = frozenset(names_checked), []
    chosen = some_of_each(parts)
    expect_small(truth, chosen)
    tried = [part for part in chosen if tells(truth, part)]
    for bug in dict.fromkeys(bug for part in chosen for bug in bugs_of(truth, part)):
        where = [part for part in tried if bug in bugs_of(truth, part)]
        if not any(shows(truth, group, bug, judged, dtype) for group in together(where)):
            hidden.append(bug)
    return hidden


def expect_small(truth: Truth, parts: Sequence[Part]) -> None:
    """CouldNotRun if the weights of a block, or the head, take more than `MOST_BYTES`."""
    if truth.config is None:
        return
    config, largest_head = truth.config, 8 * truth.config.vocabulary * truth.config.width
    sizes = {"embedding and head": largest_head}
    for layer in dict.fromkeys(part.layer for part in parts if part.layer is not None):
        numbers = sum(prod(shape) for shape in block_shapes(config, layer).values())
        sizes[f"layer {layer}"] = 8 * numbers
    name = max(sizes, key=lambda x: sizes[x])
    if sizes[name] > MOST_BYTES:
        raise CouldNotRun(
            f"the weights of {name} take {sizes[name] / 2**30:.1f} GiB in float64, and no bug "
            f"is tried beyond {MOST_BYTES / 2**30:.2g}: a smaller model of the same parts shows it"
        )


def together(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts that one computation gives: those of a block, and all above the blocks; the
    backward ones first, which give the others, too."""
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in sorted(parts, key=lambda part: not part.backward):
        of_block = part.kind in BLOCK
        alone = of_block or part.kind in ("embedding", "case")
        place = (of_block, part.layer, part.case) if alone else ("above",)
        groups.setdefault(place, []).append(part)
    return list(groups.values())


def some_of_each(parts: Sequence[Part]) -> list[Part]:
    """At most `MOST_PARTS` of each kind and direction, spread over the layers."""
    groups: dict[tuple[str, bool, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.kind, part.backward, part.case), []).append(part)
    found = []
    for group in groups.values():
        places = np.linspace(0, len(group) - 1, min(len(group), MOST_PARTS)).round()
        found += [group[int(place)] for place in places]
    return found


def shows(
    truth: Truth, parts: Sequence[Part], bug: Planted, judged: frozenset[str], dtype: str
) -> bool:
    """Whether the bug changes a judged tensor of these parts, which go together, by more than a
    right port may differ."""
    if plain(truth, parts[0]):
        case = truth.metadata["cases"][parts[0].case]
        whole = all(name in judged for name in parts[0].tensors)
        return whole and bug.name in case.get("excludes", {}).get(dtype, ())
    try:
        found = recompute(truth, parts[0], bug)
    except CouldNotRun:
        raise
    except Exception:  # of the bug's own: then no port has it and runs
        return True
    names = (name for part in parts for name in part.tensors if name in judged)
    return any(differs(found.get(name), truth, name, dtype) for name in names)


def tells(truth: Truth, part: Part) -> bool:
    """Whether a part can say that a bug is excluded: the right code gives its numbers. Of vectors
    not the cases that are wrong on purpose, nor those of others that ours can't compute."""
    if not part.case:
        recompute(truth, part, None)  # an error here is of no bug
        return True
    if not truth.metadata["cases"][part.case].get("valid", True):
        return False
    try:
        return plain(truth, part) or bool(recompute(truth, part, None))
    except CouldNotRun:
        return False


def plain(truth: Truth, part: Part) -> bool:
    """Whether a part is a case of a function without a pair, such as `bias_update`: it can't be
    computed again here, and the vectors say themselves what it excludes."""
    return bool(part.case) and truth.metadata["cases"][part.case]["op"] not in CASES


def differs(found: np.ndarray | None, truth: Truth, name: str, dtype: str) -> bool:
    if found is None:
        return False
    right = truth.array(name)
    if found.shape != right.shape:
        return True
    if right.dtype.kind != "f":
        return not np.array_equal(found, right)
    return not largest(found - right) <= FACTOR * unit_of(truth, name, dtype)
