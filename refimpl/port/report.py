"""A verdict: the record, as text, and as JSON."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..check.planted import Planted
from ..checkpoint.names import fold, layer_of
from ..checkpoint.tensor_file import one_line
from ..parameters import EXPERTS, layer_name, module_name
from .compare import Difference, Heat
from .diagnose import Diagnosis
from .divisors import Division
from .places import place_of

__all__ = [
    "COLUMNS",
    "PartResult",
    "Status",
    "TensorResult",
    "Verdict",
    "beside",
    "by_op",
    "content",
    "diagnosed",
    "folded",
    "follows",
    "listed",
    "number",
    "place",
    "row",
    "text",
]

Status = Literal["ok", "wrong", "other", "unjudged", "missing", "unreadable"]  # of a tensor

MOST_ROWS = 20  # of the table of wrong tensors
MOST_LINES = 12  # of a list of names
MOST_BESIDE = 8  # names of one part in one line
FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class TensorResult:
    """One tensor of the truth, and the port's."""

    name: str
    part: str
    shape: tuple[int, ...]
    status: Status  # "other": routes that are not the truth's
    dtype: str = ""  # as the port stores it
    unit: float = math.nan
    units: float = math.nan  # the error in units
    difference: Difference | None = None
    blocks: str = ""  # of a wrong one: which are wrong and which are not
    what: str = ""  # what keeps it from being compared or judged


@dataclass(frozen=True)
class PartResult:
    """One part that was judged."""

    name: str
    tensors: tuple[TensorResult, ...]

    @property
    def wrong(self) -> list[TensorResult]:
        return [x for x in self.tensors if x.status == "wrong"]

    @property
    def first(self) -> TensorResult:
        """The first tensor that is wrong."""
        return self.wrong[0]

    def __str__(self) -> str:
        """The part, its first wrong tensor, and its blocks, in one line."""
        first = self.first
        blocks = f"; {first.blocks}" if first.blocks else ""
        return f"{self.name}: {first.name} {list(first.shape)}{blocks}"


@dataclass(frozen=True)
class Verdict:
    """What `compare_folders` found. ``str`` of it is the report, ``to_json`` what --json writes."""

    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    reason: str  # in one line
    theirs: Path
    truth: Path
    dtype: str
    only: str
    first_wrong: PartResult | None
    tensors: Mapping[str, TensorResult]  # all that were expected, in reading order
    extra: list[str]  # names of theirs that are nobody's
    notes: list[str]
    not_excluded: list[str] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    division: Division | None = None  # of the sums over the parts of a split
    heat: Heat | None = None  # of the first wrong tensor
    routes: Path | None = None  # the file whose routes the truth must be run with

    @property
    def ok(self) -> bool:
        return self.verdict == "PASS"

    def those(self, *statuses: Status) -> list[TensorResult]:
        return [x for x in self.tensors.values() if x.status in statuses]

    def __str__(self) -> str:
        return text(self)

    def to_json(self) -> dict[str, Any]:
        """The fields that refimpl/port/schemas/check.json describes."""
        return content(self)


def text(verdict: Verdict) -> str:
    """The verdict, the first wrong part, the diagnosis, the table of wrong tensors, and the names
    of what was not given; never a line per tensor that is right."""
    lines = [f"{verdict.verdict}: {verdict.reason}"]
    part = verdict.first_wrong
    if part is not None:
        lines.append(f"first wrong part: {part}")
        told = (place(part.first), beside(part), *diagnosed(verdict))
        lines += [f"  {line}" for line in told if line]
    if rows := folded(verdict.those("wrong")):
        table = [HEADER, *map(row, rows[:MOST_ROWS])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", *("  ".join(map(str.ljust, x, widths)).rstrip() for x in table)]
        lines += [f"and {len(rows) - MOST_ROWS:,} more rows"] if len(rows) > MOST_ROWS else []
        lines += [f"({line})" for line in (follows(verdict),) if line]
    lines += listed("can't be judged", [(x.name, x.what) for x in verdict.those("unjudged")])
    lines += listed("can't be compared", [(x.name, x.what) for x in verdict.those("unreadable")])
    lines += listed("routes", [(x.name, x.what) for x in verdict.those("other")])
    lines += not_given(verdict)
    lines += listed("only in the port", [(one_line(name), "") for name in verdict.extra])
    lines += [f"note: {note}" for note in verdict.notes]
    if verdict.ok:
        lines += listed("not excluded by these inputs and this type", by_op(verdict.not_excluded))
    return "\n".join(lines)


HEADER = ("tensor", "units", "relative", "cosine", "norms", "where")
COLUMNS = (  # what the table's columns mean
    "units: the largest error, 4 allowed; relative: that error over the truth's largest number; "
    "norms: the port's norm over the truth's; where: the rows, heads or positions that are wrong"
)


def follows(verdict: Verdict) -> str:
    """Which rows of the table may be wrong for no reason of their own; empty if none may."""
    if verdict.first_wrong is None:
        return "these may follow from other choices of experts, and prove nothing alone"
    if len({x.part for x in verdict.those("wrong")}) > 1:
        return "parts after the first wrong one may be wrong because of it"
    return ""


def folded(wrong: Iterable[TensorResult]) -> list[TensorResult]:
    """The tensors, those of a layer's experts as one, which has the numbers of the worst."""
    groups: dict[str, list[TensorResult]] = {}
    for x in wrong:
        groups.setdefault(re.sub(rf"({re.escape(EXPERTS)}\.)\d+", r"\1", x.name), []).append(x)
    found = []
    for group in groups.values():
        (name,) = fold((x.name, "") for x in group)
        worst = max(group, key=lambda x: x.units if x.units == x.units else math.inf)
        found.append(replace(worst, name=name.strip()))
    return found


def row(x: TensorResult) -> tuple[str, ...]:
    """Of the table: error in units and relative to the tensor's own scale, cosine, |theirs| over
    |truth|, blocks."""
    if x.difference is None:
        return (x.name, number(x.units), "", "", "", x.what)
    found = x.difference
    told = (number(x.units), number(found.relative), cosine(found), number(found.norm_ratio))
    return (x.name, *told, x.blocks)


def place(x: TensorResult) -> str:
    """The worst place of a tensor, with both values."""
    if x.difference is None:
        return x.what
    found = x.difference
    text = (
        f"error {number(x.units)} units, {number(found.relative)} of the largest number; worst at "
        f"{list(found.worst)}: yours {found.theirs:.9g}, truth {found.truth:.9g}"
    )
    if found.unlike:
        text += f"; NaN or infinity in the port alone or in the truth alone: {found.unlike:,}"
    return text


def beside(part: PartResult) -> str:
    """Which tensors of a part are wrong and which are right, in one line."""
    said = []
    for status in ("wrong", "ok"):
        names = [(short(x.name), "") for x in part.tensors if x.status == status]
        lines = [line.strip() for line in fold(names)]
        more = [f"and {len(lines) - MOST_BESIDE} more"] if len(lines) > MOST_BESIDE else []
        if lines:
            said.append(f"{status}: {', '.join([*lines[:MOST_BESIDE], *more])}")
    return "; ".join(said)


def short(name: str) -> str:
    """The name of a tensor within its layer; a gradient's without its prefix."""
    prefix, _, rest = name.partition("/")
    layer = layer_of(f"{rest}.")
    if layer is not None:
        rest = rest.removeprefix(layer_name(layer, "")).removeprefix(module_name(layer))
    return one_line(rest if prefix == "grad" else f"{prefix}/{rest}")


def not_given(verdict: Verdict) -> list[str]:
    """The gradients that the port does not have, and of all else, how many tensors."""
    names = [x.name for x in verdict.those("missing")]
    kinds = Counter(name.split("/")[-2] for name in names)
    if kinds.get("grad") == sum("grad/" in name for name in verdict.tensors):
        lines = []  # a note says it
    else:
        lines = listed("no gradient of", [(name, "") for name in names if "grad/" in name])
    others = [f"{count} of {kind}/" for kind, count in kinds.items() if kind != "grad"]
    return lines + ([f"not given: {', '.join(others)}"] if others else [])


def diagnosed(verdict: Verdict) -> list[str]:
    """The lines of the diagnosis."""
    found = verdict.diagnosis
    if found is None:
        return []
    divided = [] if verdict.division is None else verdict.division.told()
    bugs = " or ".join(f"{bug.op}: {bug.name}" for bug in found.named)
    lines = [f"the parts of the batch are summed wrongly: {line}" for line in divided]
    lines += [f"these are the numbers of the planted bug {bugs}"] if bugs else []
    lines += [str(place_of(bug)) for bug in found.named]
    lines += [f"hint: {hint}" for hint in found.hints]
    if not lines and not found.note:
        return ["no planted bug gives these numbers, and no hint fits: the mistake is not known"]
    return lines + ([found.note] if found.note else [])


def listed(title: str, names: Iterable[tuple[str, str] | str]) -> list[str]:
    """A titled list: lines as they are, and the first of tensors, those that differ in their
    numbers alone on one line."""
    given = list(names)
    plain = [x for x in given if isinstance(x, str)]
    lines = fold(x for x in given if not isinstance(x, str))
    more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    shown = [*plain, *lines[:MOST_LINES], *more]
    return [f"{title}:", *(f"  {line.rstrip()}" for line in shown)] if shown else []


def by_op(bugs: Iterable[str]) -> list[str]:
    """A line per op of bugs told as ``op: name``."""
    found: dict[str, list[str]] = {}
    for bug in bugs:
        op, _, name = bug.partition(": ")
        found.setdefault(op, []).append(name)
    return [f"{op}: {'; '.join(names)}" for op, names in found.items()]


def number(x: float) -> str:
    """Short: 3.1, 5.3e+04, inf."""
    if not math.isfinite(x):
        return str(x)
    return f"{x:.1e}" if x and not 0.01 <= abs(x) < 1000 else f"{x:.3g}"


def cosine(found: Difference) -> str:
    """As 1 − cosine where that is small: 0.999999 and 0.9999999 say little."""
    angle = 1 - found.cosine
    return f"1 − {max(angle, 0.0):.0e}" if angle < 0.01 else f"{found.cosine:.3f}"


def given(x: float) -> float | str | None:
    """A number that JSON has; NaN stands for none."""
    if math.isnan(x):
        return None
    return x if math.isfinite(x) else str(x)


def content(verdict: Verdict) -> dict[str, Any]:
    """What schemas/check.json describes."""
    part, found = verdict.first_wrong, verdict.diagnosis
    return {
        "format": FORMAT,
        "refimpl": __version__,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "theirs": one_line(verdict.theirs),
        "truth": one_line(verdict.truth),
        "dtype": verdict.dtype,
        "only": verdict.only,
        "first_wrong": None
        if part is None
        else {
            "part": part.name,
            "tensor": part.first.name,
            "blocks": part.first.blocks,
            "told": str(part),
        },
        "diagnosis": None
        if found is None
        else {
            "bugs": [_bug(bug) for bug in found.named],
            "hints": list(found.hints),
            "note": found.note,
        },
        "division": None if verdict.division is None else verdict.division._asdict(),
        "tensors": {name: _tensor(x) for name, x in verdict.tensors.items()},
        "extra": [one_line(name) for name in verdict.extra],
        "notes": list(verdict.notes),
        "not_excluded": list(verdict.not_excluded),
        "routes": None if verdict.routes is None else one_line(verdict.routes),
    }


def _bug(bug: Planted) -> dict[str, Any]:
    place = place_of(bug)
    told = {"file": place.file, "line": place.line, "tag": place.tag or None}
    return {"op": bug.op, "name": bug.name, "place": told}


def _tensor(x: TensorResult) -> dict[str, Any]:
    found = x.difference
    told: dict[str, Any] = {"part": x.part, "status": x.status, "shape": list(x.shape)}
    told |= {"dtype": x.dtype or None, "unit": given(x.unit), "units": given(x.units)}
    if found is not None:
        told |= {
            "error": given(found.error),
            "relative": given(found.relative),
            "cosine": given(found.cosine),
            "norm_ratio": given(found.norm_ratio),
            "worst": {
                "index": list(found.worst),
                "theirs": given(found.theirs),
                "truth": given(found.truth),
            },
            "unlike": found.unlike,
        }
    return told | {"blocks": x.blocks, "what": x.what}
