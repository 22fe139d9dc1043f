"""The verdict on a port: each of its tensors beside the truth's, in reading order.

A tensor is right if its largest error is at most FACTOR units of the port's type: a unit is what
the reference itself errs by when it is run in that type. The verdict is

    PASS          every tensor that was judged is right
    FAIL          a tensor is wrong, and nothing before it explains that away
    INCONCLUSIVE  no tensor is wrong by a fault that is surely the port's, but some can't be judged

A port need not give everything. Of act/, cot/, out/ and aux/ it gives what it has. If it gives
gradients, it gives all of them: one that was forgotten must not pass. A pattern selects those of a
port that has no others, and ``partial`` asks for what is given alone. Of conformance vectors it
gives all cases of an op, or none.

Experts are chosen by comparing scores, and a tie within rounding is decided either way. So behind
the first layer where a port chose other experts than the truth, wrong tensors say nothing. Below
float32 the same holds behind the first choice if the port does not give its routes. A choice that
no rounding explains is wrong; whether one does is known if the truth holds the gate's scores.

At tokens that are padding, activations and routes are not compared.

If the truth is in FP8, a port FAILs too if its blocks compute a mistake of FP8, or another choice
than the truth's, whatever the units hide (`recipes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..check.planted import PLANTED
from ..checkpoint.names import fold, layer_of
from ..checkpoint.tensor_file import one_line
from ..errors import CouldNotRun
from ..grads.request import SCORES, UNITS
from ..grads.units import roundoff
from ..ops import rope_frequencies
from ..parameters import GATE_BIAS, depth_of, layer_name
from .blocks import cuts_of, told
from .choices import explained
from .compare import FACTOR, difference, errors_along, heat
from .diagnose import Diagnosis, diagnose
from .divisors import Division, division, hidden_rules
from .exclude import not_excluded
from .hints import hints_of
from .names import Found, Layout, find, known_layout, read_layout
from .parts import Part, parts_of
from .recipes import Judged, judge
from .report import PartResult, Status, TensorResult, Verdict
from .theirs import Theirs, open_theirs
from .truth import Truth

__all__ = ["TYPES", "compare_folders", "expected"]

TYPES = UNITS  # from the finest
AGREES = "is wrong on purpose, and agrees"
IN_FP8 = (
    "in FP8 the mistakes of the ops themselves are not tried, since its units hide many: hold the "
    "port in float32 against a truth in float32 first"
)
MOST_SHOWN = 5  # names of theirs, where none is ours


def compare_folders(
    theirs: Path | str,
    truth: Path | str | Truth,
    *,
    layout: Path | str | None = None,
    only: str = "*",
    dtype: str | None = None,
    partial: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Verdict:
    """Judge the tensors in ``theirs`` (safetensors or .npz, a file or a folder) by the result in
    the folder ``truth``.

    Args:
        layout: a TOML file of names; names.py has its form.
        only: a pattern of the names to judge, with or without their prefix.
        dtype: float64, float32 or bfloat16, what the port computes in; by default the coarsest type
            in which it stores a tensor.
        partial: judge what is given; by default a gradient that is missing beside others is
            INCONCLUSIVE.

    CouldNotRun if that can't be done.
    """
    opened = truth if isinstance(truth, Truth) else Truth.open(truth)
    port = open_theirs(theirs)
    names = None if layout is None else read_layout(Path(layout))
    if names is not None and opened.config is None:
        raise CouldNotRun("names a model's tensors, but the truth has vectors", argument="layout")
    return _Judge(opened, port, names, only, dtype, partial, progress).verdict()


def expected(truth: Truth, only: str = "*") -> list[tuple[Part, str]]:
    """The tensors that a port may give, with their parts, in reading order; CouldNotRun if ``only``
    matches none. Those of vectors that have no units, such as golden values, are for other
    tests."""
    found = [
        (part, name)
        for part in parts_of(truth)
        for name in part.tensors
        if truth.kind == "model"
        or _is_exact(truth.entries[name].dtype)
        or truth.entries[name].units
    ]
    chosen = [(part, name) for part, name in found if _matches(name, only)]
    if not chosen:
        raise CouldNotRun(
            f"must match a name of the truth, such as {found[0][1] if found else 'none'}, got "
            f"{one_line(only)}",
            argument="only",
        )
    return chosen


def _matches(name: str, only: str) -> bool:
    return fnmatchcase(name, only) or fnmatchcase(name.partition("/")[2], only)


class _Located(NamedTuple):
    """A tensor of the truth, and where the port has it."""

    part: Part
    name: str
    found: Found | None
    what: str  # what keeps it from being compared


class _Choice(NamedTuple):
    """A choice of experts behind which wrong tensors say nothing."""

    routes: TensorResult
    first: str  # tensor that is judged and depends on it
    differs: bool  # else it is not known


class _Judge:
    """One comparison."""

    def __init__(
        self,
        truth: Truth,
        theirs: Theirs,
        layout: Layout | None,
        only: str,
        dtype: str | None,
        partial: bool,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.truth, self.theirs = truth, theirs
        self.only, self.progress = only, progress
        self.partial = partial
        self.known, self.given = known_layout(), layout
        self.used: set[str] = set()
        self.located = [self._locate(part, name) for part, name in expected(truth, only)]
        if not any(x.found for x in self.located):
            self._refuse_nothing()
        stored = self._type()
        self.dtype = stored if dtype is None else dtype
        if self.dtype not in TYPES:
            raise CouldNotRun(f"must be one of {', '.join(TYPES)}, got {dtype}", argument="dtype")
        if self.dtype not in truth.types:
            had = ", ".join(truth.types) or "none"
            raise CouldNotRun(
                f"{truth.folder} has no units of {self.dtype} (it has {had}): write it again with "
                f"units of {self.dtype}"
            )
        self._leave_out_other_types()
        self._expect_inputs()
        self.orders: dict[str, np.ndarray] = {}  # by layer: the truth's experts among theirs

    # What there is

    def _locate(self, part: Part, name: str) -> _Located:
        places = self._find(name)
        self.used |= {key for place in places for key in place.keys}
        if not places:
            return _Located(part, name, None, "")
        found, keys = places[0], [key for place in places for key in place.keys]
        shared = [key for key in found.keys if key in self.theirs.shared]
        if shared:
            files = self.theirs.shared[shared[0]]
            return _Located(part, name, found, f"is in {files[0]} and in {files[1]}")
        if len(places) > 1:
            return _Located(part, name, found, f"is given twice, as {keys[0]} and {keys[-1]}")
        if what := self._misfit(name, found):
            self.truth.array(name)  # the truth itself is as its index says
        return _Located(part, name, found, what)

    def _find(self, name: str) -> list[Found]:
        return find(name, self.theirs, self.truth.config, self.known, self.given)

    def _misfit(self, name: str, found: Found) -> str:
        """What is wrong with the form of a tensor; empty if nothing is."""
        entry = self.truth.entries[name]
        try:
            shape = found.shape
        except ValueError as error:
            return one_line(error)
        if shape != entry.shape and not prod(shape) == prod(entry.shape) == 1:
            turned = len(shape) > 1 and (*shape[:-2], shape[-1], shape[-2]) == entry.shape
            more = ": it is transposed" if turned else ""
            return f"must have shape {list(entry.shape)}, got {list(shape)}{more}"
        whole = entry.dtype.startswith(("int", "uint"))
        if _is_exact(entry.dtype) != _is_exact(found.dtype) or (whole and found.dtype == "bool"):
            return (
                f"must be {'integers' if _is_exact(entry.dtype) else 'floats'}, got {found.dtype}"
            )
        return ""

    def _refuse_nothing(self) -> None:
        keys = sorted(key for key in self.theirs.tensors if ":" not in key)
        shown = ", ".join(one_line(key) for key in keys[:MOST_SHOWN])
        more = f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else ""
        raise CouldNotRun(
            f"{self.theirs.path} must hold some of the {len(self.located):,} tensors that are "
            f"expected, such as {self.located[0].name}; it holds {shown}{more}"
        )

    def _type(self) -> str:
        """The coarsest type in which the port stores a tensor."""
        stored = {x.found.dtype: x for x in self.located if x.found}
        floats = [dtype for dtype in stored if not _is_exact(dtype)]
        for dtype in floats:
            if dtype not in TYPES:
                raise CouldNotRun(
                    f"{self.theirs.path}: {stored[dtype].name} must be {', '.join(TYPES)}, got "
                    f"{one_line(dtype)}"
                )
        return max(floats, key=TYPES.index) if floats else TYPES[0]

    def _leave_out_other_types(self) -> None:
        """Vectors may have units of some types alone, as golden values of float64; then nobody
        need give such a case's integers in others, nor those of a case that has nothing else."""
        if self.truth.kind == "vectors":
            entries = self.truth.entries
            typed = {x.part.case for x in self.located if self.dtype in entries[x.name].units}
            self.located = [
                x
                for x in self.located
                if self.dtype in entries[x.name].units
                or (
                    _is_exact(entries[x.name].dtype)
                    and (x.found is not None or x.part.case in typed)
                )
            ]

    def _expect_inputs(self) -> None:
        """CouldNotRun if the port gives inputs, and they are not the truth's."""
        for name, entry in self.truth.entries.items():
            if "in" not in name.split("/")[:-1] or name not in self.theirs.tensors:
                continue
            self.used.add(name)
            given = self.theirs.tensors[name]
            same = given.shape == entry.shape
            if not same or not np.array_equal(given.array(), self.truth.array(name)):
                raise CouldNotRun(
                    f"{self.theirs.path} was made from other inputs: {one_line(name)} is not that "
                    f"of {self.truth.folder}"
                )

    # The judgement

    def verdict(self) -> Verdict:
        results: dict[str, TensorResult] = {}
        for number, place in enumerate(self.located):
            self.progress(place.part.name, number, len(self.located))
            results[place.name] = self._judge(place)
        self.progress("done", len(self.located), len(self.located))
        results = self._without_what_is_no_fault(results)
        in_fp8 = judge(self.truth, self._floats(results), self.progress)
        if in_fp8 is not None and in_fp8.first:
            return self._fails_in_fp8(results, in_fp8)
        order, wrong = list(results), [n for n, x in results.items() if x.status == "wrong"]
        choice, made = self._where_experts_may_differ(results), self._verdict_of(results)
        if wrong and (choice is None or order.index(wrong[0]) < order.index(choice.first)):
            made = replace(made, verdict="FAIL", reason=self._count(wrong, results))
            return self._with_first_wrong(made, wrong[0], in_fp8)
        if reasons := self._reasons(results, choice if wrong else None):
            path = None
            if wrong and choice is not None and choice.differs:
                path = self._find(choice.routes.name)[0].path
            return replace(made, verdict="INCONCLUSIVE", reason="; ".join(reasons), routes=path)
        if in_fp8 is not None:
            hidden = [f"fp8: {name}" for name in in_fp8.not_excluded]
            notes = [*made.notes, IN_FP8, *([in_fp8.note] if in_fp8.note else [])]
            return replace(made, not_excluded=hidden, notes=notes)
        judged = [x for x in self.located if results[x.name].status == "ok"]
        parts = list(dict.fromkeys(x.part for x in judged))
        try:
            bugs = not_excluded(self.truth, parts, [x.name for x in judged], self.dtype)
        except CouldNotRun as error:
            note = f"it is not known which mistakes would not show here: {error}"
            bugs, made = [], replace(made, notes=[*made.notes, note])
        named = [f"{bug.op}: {bug.name}" for bug in bugs]
        kinds = (x.name.partition("/") for x in judged)
        gradients = [name for kind, _, name in kinds if kind == "grad"]
        hidden = hidden_rules(self.truth, gradients, self.dtype)
        return replace(made, not_excluded=[*named, *hidden])

    def _floats(self, results: Mapping[str, TensorResult]) -> Callable[[str], np.ndarray | None]:
        """The port's tensor by the truth's name; None where it can't be read."""
        readable = {
            x.name: x.found
            for x in self.located
            if x.found is not None and results[x.name].status != "unreadable"
        }

        def theirs(name: str) -> np.ndarray | None:
            if name not in readable:
                return None
            return readable[name].array().reshape(self.truth.entries[name].shape)

        return theirs

    def _fails_in_fp8(self, results: dict[str, TensorResult], found: Judged) -> Verdict:
        """FAIL for a mistake of FP8 or another choice; its first tensor is wrong, however few units
        it is off."""
        wrong = [name for name, x in results.items() if x.status == "wrong"]
        first = replace(results[found.first], status="wrong")
        results = results | {found.first: first}
        what = "the blocks compute " + (
            f"FP8's mistake: {found.named[0].name}"
            if found.named
            else f"another choice than the truth's: {found.recipe}"
        )
        made = replace(self._verdict_of(results), verdict="FAIL")
        reason = f"{what}; {self._count(wrong, results)}"
        return self._with_first_wrong(replace(made, reason=reason), found.first, found)

    def _verdict_of(self, results: Mapping[str, TensorResult]) -> Verdict:
        """The verdict if nothing is wrong and all was judged."""
        judged = [x for x in results.values() if x.status == "ok"]
        many = "" if len(judged) == 1 else "s"
        reason = f"{len(judged):,} tensor{many} within {FACTOR} units of {self.dtype}"
        measured = [x for x in judged if np.isfinite(x.units)]
        if measured:
            most = max(measured, key=lambda x: x.units)
            reason += f"; the furthest, {most.name}, has {most.units:.2g}"
        return Verdict(
            "PASS",
            reason,
            self.theirs.path,
            self.truth.folder,
            self.dtype,
            self.only,
            None,
            results,
            self._extra(),
            self._notes(results),
        )

    def _judge(self, place: _Located) -> TensorResult:
        name, entry = place.name, self.truth.entries[place.name]
        made = TensorResult(name, place.part.name, entry.shape, "missing")
        if place.found is None:
            return made
        made = replace(made, dtype=one_line(place.found.dtype), what=place.what)
        if place.what:
            return replace(made, status="unreadable")
        truth = self.truth.array(name)
        theirs = self._unpadded(name, place.found.array().reshape(truth.shape), truth)
        if _is_exact(entry.dtype):
            return self._judge_exact(made, theirs, truth)
        unit = entry.units.get(self.dtype, np.inf)
        if (order := self.orders.get(name)) is not None:
            theirs = np.take_along_axis(theirs, order, axis=-1)
        found = difference(theirs, truth, entry.scale)
        made = replace(made, unit=unit, units=found.units(unit), difference=found)
        if not made.units <= FACTOR:
            cuts = cuts_of(name, entry.shape, self.truth.config)
            along = errors_along(theirs, truth)
            bad = [~(along[cut.axis] <= FACTOR * unit) for cut in cuts]
            return replace(made, status="wrong", blocks=told(cuts, bad))
        if unit > 0 and not FACTOR * unit < found.scale:
            what = f"has a unit of {unit:.1e}, and numbers of at most {found.scale:.1e}"
            return replace(made, status="unjudged", what=what)
        return replace(made, status="ok")

    def _judge_exact(
        self, made: TensorResult, theirs: np.ndarray, truth: np.ndarray
    ) -> TensorResult:
        """Routes and loads. The order of a token's experts is the port's own: its weights are put
        into the truth's."""
        kind, _, layer = made.name.rpartition(".")
        choices = kind in ("aux/routes", "aux/counted")
        if choices:
            ours, other = np.argsort(truth, axis=-1), np.argsort(theirs, axis=-1)
            same = np.take_along_axis(truth, ours, -1) == np.take_along_axis(theirs, other, -1)
            tokens = same.all(axis=-1)
            if tokens.all():
                back = np.argsort(ours, axis=-1)
                self.orders[f"aux/weights.{layer}"] = np.take_along_axis(other, back, axis=-1)
                return replace(made, status="ok", units=0.0)
            what = f"other experts for {int((~tokens).sum()):,} of {tokens.size:,} tokens"
            if kind == "aux/routes" and (sure := self._wrong_choices(layer, theirs)):
                what += f", which rounding of the scores can't explain for {sure:,} of them"
                return replace(made, status="wrong", units=np.inf, what=what)
            return replace(made, status="other", what=what)
        wrong = theirs != truth
        if not wrong.any():
            return replace(made, status="ok", units=0.0)
        what = f"{int(wrong.sum()):,} of {wrong.size:,} numbers differ"
        return replace(made, status="wrong", units=np.inf, what=what)

    def _wrong_choices(self, layer: str, routes: np.ndarray) -> int:
        """How many tokens' experts no rounding explains, as far as the truth can tell."""
        config = self.truth.config
        scores = f"act/{layer_name(layer, SCORES)}"
        if config is None:
            return 0
        told = np.sort(routes, axis=-1)
        none = (told[..., :1] < 0) | (told[..., -1:] >= config.experts)
        if (bad := np.concatenate([none, told[..., 1:] == told[..., :-1]], axis=-1)).any():
            return int(bad.any(axis=-1).sum())  # no expert, or one twice
        if scores not in self.truth:
            return 0
        unit = self.truth.entries[scores].units.get(self.dtype, np.inf)
        ranked = np.asarray(self.truth.array(scores), np.float64)
        if config.gate_bias:
            try:
                ranked = ranked + self.truth.checkpoint().tensor(layer_name(layer, GATE_BIAS))
            except CouldNotRun:
                return 0
        return int((~explained(ranked, routes, FACTOR * unit, config)).sum())

    def _unpadded(self, name: str, theirs: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """A port's activations and routes, the truth's in the place of what is padding."""
        prefix, _, rest = name.partition("/")
        whole = prefix in ("act", "aux") or name == "out/logits"
        if not whole or "in/key_mask" not in self.truth or self.truth.config is None:
            return theirs
        real = self.truth.array("in/key_mask").astype(bool)
        layer = layer_of(f"{rest}.") if prefix == "act" else _last_number(rest)
        depth = 0 if layer is None else depth_of(self.truth.config, layer)
        real = real[:, : real.shape[1] - depth] & real[:, depth:]
        axis = 2 if rest.endswith(".probabilities") else 1
        if truth.ndim <= axis or (truth.shape[0], truth.shape[axis]) != real.shape:
            return theirs
        shape = [1] * truth.ndim
        shape[0], shape[axis] = real.shape
        return np.where(real.reshape(shape), theirs, truth)

    def _without_what_is_no_fault(
        self, results: dict[str, TensorResult]
    ) -> dict[str, TensorResult]:
        """The results with the tensors turned over that are wrong on purpose: a right port differs
        from them. The others of their cases are right."""
        cases = self.truth.metadata.get("cases", {})
        for case in (name for name, about in cases.items() if not about.get("valid", True)):
            mine = {name: x for name, x in results.items() if name.startswith(f"{case}/")}
            differs = cases[case].get("differs", [name.partition("/")[2] for name in mine])
            telling = {
                name: x
                for name, x in mine.items()
                if x.status in ("ok", "wrong") and name.partition("/")[2] in differs
            }
            status: Status = "ok" if any(x.status == "wrong" for x in telling.values()) else "wrong"
            what = AGREES if status == "wrong" else ""
            results |= {
                name: replace(x, status=status, what=what, blocks="", units=np.nan)
                for name, x in telling.items()
            }
        return results

    def _where_experts_may_differ(self, results: Mapping[str, TensorResult]) -> _Choice | None:
        """The first choice of experts that is not the truth's, or that is not known and may differ
        by rounding; also where routes are not among what is judged."""
        every = [(part, name) for part in parts_of(self.truth) for name in part.tensors]
        for place, (part, name) in enumerate(every):
            if not name.startswith("aux/routes."):
                continue
            x = results[name] if name in results else self._judge(self._locate(part, name))
            differs = x.status == "other" or (x.status == "wrong" and name not in results)
            unknown = x.status in ("missing", "unreadable") and self.dtype == TYPES[-1]
            if differs or unknown:
                behind = {name for _, name in every[place:]}
                first = next((name for name in results if name in behind), None)
                return None if first is None else _Choice(x, first, differs)
        return None

    def _reasons(self, results: Mapping[str, TensorResult], choice: _Choice | None) -> list[str]:
        """Why nothing can be concluded, each in one line."""
        reasons = []
        other = [x for x in results.values() if x.status == "other"]
        if choice is not None and choice.differs:
            told = f"{choice.routes.name} has {choice.routes.what}"
            reasons.append(f"{told}, and tensors computed from them differ")
        elif choice is not None:
            reasons.append(
                f"tensors after the choice of experts differ, and in {self.dtype} a tie within "
                "rounding may choose others: give aux/routes.L"
            )
        elif other:
            reasons.append(f"{other[0].name} has {other[0].what}")
        bad = [(x.name, x.what) for x in results.values() if x.status == "unreadable"]
        reasons += fold(bad)[:3]
        unjudged = [(x.name, "") for x in results.values() if x.status == "unjudged"]
        if unjudged:
            lines = fold(unjudged)
            more = f" and {len(lines) - 1} more such" if len(lines) > 1 else ""
            reasons.append(
                f"the rounding errors of {self.dtype} are as large as {lines[0].strip()}{more}"
            )
        if missing := self._missing(results):
            lines = fold([(name, "") for name in missing])
            more = f" and {len(lines) - 1} more such" if len(lines) > 1 else ""
            reasons.append(f"missing: {lines[0].strip()}{more}")
        if not any(x.status == "ok" for x in results.values()) and not reasons:
            reasons.append("nothing could be judged")
        if "attention" in {x.part.kind for x in self.located if x.found} and self._rotation_hides():
            reasons.append(
                f"at the positions given, YaRN turns by less than {self.dtype} resolves: the "
                "rotation can't be judged without more tokens"
            )
        return reasons

    def _missing(self, results: Mapping[str, TensorResult]) -> list[str]:
        """What a port that gives this much should give, too."""
        missing = [name for name, x in results.items() if x.status == "missing"]
        if self.partial:
            return []
        if self.truth.kind == "vectors":
            cases = self.truth.metadata["cases"]
            groups = {
                (cases[x.part.case]["op"], x.part.backward): True for x in self.located if x.found
            }
            place = {x.name: (cases[x.part.case]["op"], x.part.backward) for x in self.located}
            return [name for name in missing if place[name] in groups]
        gradients = any(x.found and x.name.startswith("grad/") for x in self.located)
        return [name for name in missing if gradients and name.startswith("grad/")]

    def _rotation_hides(self) -> bool:
        """Whether YaRN changes every angle at the truth's positions by less than the port's type
        can show."""
        config = self.truth.config
        if config is None or config.active_yarn is None or "in/tokens" not in self.truth:
            return False
        last = self.truth.entries["in/tokens"].shape[-1] - 1
        if "in/positions" in self.truth:
            last = int(self.truth.array("in/positions").max())
        turned = rope_frequencies(config.rope, config.theta, config.active_yarn)
        plain = rope_frequencies(config.rope, config.theta, None)
        return bool(last * np.abs(turned - plain).max() <= FACTOR * roundoff(self.dtype))

    # What is told beside it

    def _count(self, wrong: Iterable[str], results: Mapping[str, TensorResult]) -> str:
        number = len(list(wrong))
        given = sum(x.status in ("ok", "wrong") for x in results.values())
        are = "is" if number == 1 else "are"
        return f"{number:,} of {given:,} tensors {are} more than {FACTOR} units of {self.dtype} off"

    def _with_first_wrong(self, made: Verdict, first: str, in_fp8: Judged | None) -> Verdict:
        part = next(x.part for x in self.located if x.name == first)
        mine = [x for x in self.located if x.part == part and made.tensors[x.name].dtype]
        readable = [x for x in mine if made.tensors[x.name].status != "unreadable"]
        arrays = {
            x.name: x.found.array().reshape(self.truth.entries[x.name].shape)
            for x in readable
            if x.found
        }
        truth, entry = self.truth.array(first), self.truth.entries[first]
        cuts = cuts_of(first, entry.shape, self.truth.config)
        shown = None
        if truth.ndim and not _is_exact(entry.dtype):
            shown = heat(arrays[first], truth, cuts)
        named = PartResult(part.name, tuple(made.tensors[x.name] for x in mine))
        try:
            agrees = made.tensors[first].what == AGREES
            diagnosis = self._diagnosis(part, arrays, agrees, in_fp8)
        except CouldNotRun as error:
            diagnosis = Diagnosis([], [], f"no planted bug was tried: {error}")
        found = self._division(made.tensors)
        return replace(made, first_wrong=named, diagnosis=diagnosis, division=found, heat=shown)

    def _diagnosis(
        self, part: Part, arrays: Mapping[str, np.ndarray], agrees: bool, in_fp8: Judged | None
    ) -> Diagnosis:
        if in_fp8 is None:
            named = self._on_purpose(part) if agrees else None
            return named or diagnose(self.truth, part, arrays, self.dtype)
        if in_fp8.first:
            choice = [f"the truth with the choice {in_fp8.recipe}"] if in_fp8.recipe else []
            return Diagnosis(in_fp8.named, choice, "")
        hints = hints_of(self.truth, part, arrays, self.dtype)
        return Diagnosis([], hints, in_fp8.note or IN_FP8)

    def _on_purpose(self, part: Part) -> Diagnosis | None:
        """The bug whose numbers a case is made of, if its name is known."""
        case = self.truth.metadata["cases"][part.case]
        named = [bug for bug in PLANTED if (bug.op, bug.name) == (case["op"], case.get("bug"))]
        return Diagnosis(named, [], "") if named else None

    def _division(self, results: Mapping[str, TensorResult]) -> Division | None:
        """By which counts the port divides the sums of a batch in parts, if the truth has them."""
        given = {
            x.name.removeprefix("grad/"): x.found
            for x in self.located
            if x.found and x.name.startswith("grad/") and results[x.name].status in ("ok", "wrong")
        }
        return division(
            self.truth, list(given), lambda name: np.asarray(given[name].array()), self.dtype
        )

    def _extra(self) -> list[str]:
        """Names of theirs that no tensor of the truth has, whatever is selected."""
        bare = {key for key in self.theirs.tensors if ":" not in key}
        left = bare - self.used
        if self.only != "*" and left:
            for name in (name for part in parts_of(self.truth) for name in part.tensors):
                left -= {key for place in self._find(name) for key in place.keys}
        left -= self.truth.entries.keys()
        return sorted(left)

    def _notes(self, results: Mapping[str, TensorResult]) -> list[str]:
        """What a reader of the verdict should know."""
        config, notes = self.truth.config, []
        stored = {x.dtype for x in results.values() if x.dtype and not _is_exact(x.dtype)}
        if len(stored) > 1:
            types = ", ".join(sorted(stored))
            notes.append(f"stored as {types}, judged as {self.dtype}")
        if coarser := self._coarser(results):
            notes.append(
                f"each wrong tensor is within {FACTOR} units of {coarser}: give that type if you "
                "compute in it"
            )
        if config is not None and config.top_k >= config.experts:
            notes.append("every token goes to every expert: the choice of experts isn't judged")
        if (self.truth.metadata.get("request") or {}).get("routes_given"):
            notes.append(
                "the truth was computed with given routes: the choice of experts isn't judged"
            )
        gradients = [x for x in results.values() if "grad" in x.name.split("/")[:-1]]
        if gradients and all(x.status == "missing" for x in gradients):
            notes.append("no gradient is given: the backward isn't judged")
        return notes

    def _coarser(self, results: Mapping[str, TensorResult]) -> str:
        """A coarser type by whose units nothing would be wrong; empty without such a type."""
        wrong = [x for x in results.values() if x.status == "wrong"]
        for dtype in TYPES[TYPES.index(self.dtype) + 1 :]:
            units = {x.name: self.truth.entries[x.name].units.get(dtype, 0.0) for x in wrong}
            if wrong and all(
                x.difference is not None and x.difference.units(units[x.name]) <= FACTOR
                for x in wrong
            ):
                return dtype
        return ""


def _last_number(name: str) -> int | None:
    """The layer of aux/routes.3."""
    number = name.rpartition(".")[2]
    return int(number) if number.isdecimal() else None


def _is_exact(dtype: str) -> bool:
    """Whether a type is of integers or truth values."""
    return dtype.startswith(("int", "uint", "bool"))
