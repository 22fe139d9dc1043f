"""Where papers and implementations of DeepSeek-V3 and R1 disagree: 37 `TRAPS`, each with the number
it changes. The one place that says who does what; configuration, ops and pages link here.

`refimpl conventions` prints them; `refimpl conventions --markdown` writes
derivations/conventions.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan

from .symptoms import SYMPTOMS, rows
from .trap import HOW, WHO, Statement, Trap
from .traps import TRAPS

__all__ = [
    "HOW",
    "SYMPTOMS",
    "TRAPS",
    "WHO",
    "Statement",
    "Trap",
    "find",
    "markdown",
    "numbers",
    "rows",
    "show",
]


def find(word: str) -> list[int]:
    """The numbers of the traps that a word, or a part of one, stands in; or that a symptom with it
    leads to."""
    named = {n for n, trap in enumerate(TRAPS, 1) if trap.is_about(word)}
    if named:
        return sorted(named)
    return sorted({n for s in SYMPTOMS if word.lower() in s.lower() for n in rows(s)})


def show(value: float) -> str:
    """A number to six digits."""
    return "NaN" if isnan(value) else f"{value:.6g}"


def numbers(trap: Trap) -> Iterator[str]:
    """A line per measure of a trap: what it is, and the number of each choice."""
    for measure, choices in trap.measured.items():
        yield f"{measure}: " + "; ".join(
            f"{choice} = {show(value)}" for choice, value in choices.items()
        )


def markdown() -> str:
    """The page derivations/conventions.md."""
    marks = [f"- *{how}*: {what}." for how, what in HOW.items()]
    lines = [HEAD.format("\n".join(marks)), "| | trap | ours | default |", "|---|---|---|---|"]
    for number, trap in enumerate(TRAPS, 1):
        lines.append(
            f"| {number} | [{trap.title}](#{anchor(number, trap)}) | {trap.field} | "
            f"{trap.default} |"
        )
    lines += ["", "## By symptom", "", "| what you see | look at, in this order |", "|---|---|"]
    lines += [
        f"| {symptom} | " + " · ".join(f"{link(number)}" for number in rows(symptom)) + " |"
        for symptom in SYMPTOMS
    ]
    for number, trap in enumerate(TRAPS, 1):
        lines += [
            "",
            f"## {number}. {trap.title}",
            "",
            trap.question,
            "",
            "| who | what | how we know |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {what.text} | {tested(what, name)} |" for name, what in trap.who.items()
        ]
        if trap.absent:
            lines.append(f"| – | no such part, or not read: {', '.join(trap.absent)} | |")
        lines += [
            "",
            f"- **Ours:** {trap.field}; default: {trap.default}.",
            f"- **From outside:** {trap.tell}",
        ]
        if trap.checkpoint:
            lines.append("- Shows on checkpoints in FP8 alone; the numbers are of one tile.")
        lines += [f"- **It changes** {line}." for line in numbers(trap)]
        lines.append(f"- **Test:** [`test_trap_{number:02}`](../tests/conventions/test_traps.py).")
    return "\n".join(lines) + "\n"


def tested(what: Statement, name: str) -> str:
    """How a statement is known, with a link to its test."""
    if not what.test:
        return what.source(name)
    return f"[{what.source(name)}](../{what.test.partition('::')[0]})"


def link(number: int) -> str:
    trap = TRAPS[number - 1]
    return f"[{trap.title}](#{anchor(number, trap)})"


def anchor(number: int, trap: Trap) -> str:
    """GitHub's anchor of a trap's heading."""
    kept = "".join(c for c in f"{number}. {trap.title}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


HEAD = """# Conventions

The traps: where papers and implementations of DeepSeek-V3 and R1 disagree, who does what, how to
tell from outside which choice another implementation made, and what it changes.
`refimpl conventions` writes this page (as Markdown, to a file) and computes its numbers: those of
the model are of the preset `tiny` with random parameters, in float64, on 40 bytes of text
([`refimpl/conventions/examples.py`](../refimpl/conventions/examples.py)).

**What to do with it.** Two implementations disagree: find the traps that touch the tensor where
they part, compare *from outside*, and set ours to theirs; if the gradients agree then, both are
right and a convention differed. [By symptom](#by-symptom) says where to begin; so does
`refimpl conventions rope` (any word) on the command line. `Conventions` and `ModelConfig` are the
records of [`refimpl/config.py`](../refimpl/config.py); three presets of the first exist: `official`
(the default: DeepSeek's code and weights, and the paper where those are silent), `paper`, `hf`.

**How we know.** This page is the one place that says who does what. Projects change: each statement
carries the version that it is about, and one of

{}

`make oracle` repeats the statements about transformers that name a test, `make peers` those about
TRL and verl, and about torchtitan and Megatron-LM where `REFIMPL_TORCHTITAN` and `REFIMPL_MEGATRON`
name checkouts of them. No code of theirs is copied.
"""
