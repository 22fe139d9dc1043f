"""Where papers and implementations of DeepSeek-V3 and R1 disagree: 22 `TRAPS`, each with the number
it changes.

`refimpl conventions` prints them; `refimpl conventions --markdown` writes
derivations/conventions.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from textwrap import fill

from .trap import WHO, Trap
from .traps import READ, TRAPS

__all__ = ["TRAPS", "WHO", "Trap", "markdown", "numbers", "show"]


def show(value: float) -> str:
    """A number to six digits."""
    return "NaN" if isnan(value) else f"{value:.6g}"


def numbers(trap: Trap) -> Iterator[str]:
    """A line a measure: what it is, and the number of each choice."""
    for measure, choices in trap.measured.items():
        yield f"{measure}: " + "; ".join(
            f"{choice} = {show(value)}" for choice, value in choices.items()
        )


def markdown() -> str:
    """The page derivations/conventions.md."""
    lines = [HEAD.format(fill(READ, 118)), "| | trap | ours | default |", "|---|---|---|---|"]
    for number, trap in enumerate(TRAPS, 1):
        lines.append(
            f"| {number} | [{trap.title}](#{anchor(number, trap)}) | {trap.field} | "
            f"{trap.default} |"
        )
    for number, trap in enumerate(TRAPS, 1):
        lines += [
            "",
            f"## {number}. {trap.title}",
            "",
            trap.question,
            "",
            "| who | what |",
            "|---|---|",
        ]
        lines += [f"| {name} | {what} |" for name, what in trap.who.items()]
        if trap.absent:
            lines.append(f"| – | no such part, or not read: {', '.join(trap.absent)} |")
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


def anchor(number: int, trap: Trap) -> str:
    """GitHub's anchor of a trap's heading."""
    kept = "".join(c for c in f"{number}. {trap.title}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


HEAD = """# Conventions

Where papers and implementations of DeepSeek-V3 and R1 disagree, who does what, how to tell from
outside which choice another implementation made, and what it changes. `refimpl conventions >
derivations/conventions.md --markdown` writes this page, and computes its numbers: those of the
model are of the preset `tiny` with random parameters, in float64, on 40 bytes of text
([`refimpl/conventions/examples.py`](../refimpl/conventions/examples.py)).

**What to do with it.** Two implementations disagree: find the traps that touch the tensor where
they part, compare *from outside*, and set ours to theirs; if the gradients agree then, both are
right and a convention differed. `Conventions` and `ModelConfig` are the records of
[`refimpl/config.py`](../refimpl/config.py); three presets of the first exist: `official` (the
default: DeepSeek's code and weights, and the paper where those are silent), `paper`, `hf`. Projects
change; what is said of them holds for the versions that were read: {}.
"""
