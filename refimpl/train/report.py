"""A recipe's results as a page in Markdown: claims, pictures, accuracies, samples, settings,
times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import printable
from .claims import Claim
from .plots import SHOWN, Picture
from .settings import toml_value

__all__ = ["report"]

LONGEST = 72  # characters of a sample that are shown


def report(results: Mapping[str, Any], pictures: Sequence[Picture], folder: str = "") -> str:
    """The page.

    Args:
        pictures: those that were drawn. folder: where they stand, from the page.
    """
    parts = [
        *head(results),
        "## Claims",
        *claims([Claim(**x) for x in results["claims"]]),
        *shown(pictures, folder),
        *accuracies(results["jobs"]),
        *samples(results["jobs"]),
        "## Jobs",
        *jobs(results["jobs"]),
    ]
    return "\n\n".join(parts) + "\n"


def head(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    minutes, rest = divmod(round(results["seconds"]), 60)
    yield "# A recipe's report"
    if results["toy"]:
        yield "**At toy size: it shows that everything runs, and its numbers mean nothing.**"
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "processor")
    yield (
        f"{results['date']}, commit {results['commit']}; {machine['processor']}, {where}. All jobs "
        f"together took {minutes} min {rest} s."
    )


def claims(found: Sequence[Claim]) -> Iterator[str]:
    rows = [(x.name, x.numbers, x.bound, x.verdict) for x in found]
    yield table(("claim", "numbers", "bound", ""), rows)


def shown(pictures: Sequence[Picture], folder: str) -> Iterator[str]:
    for picture in pictures:
        place = f"{folder}/{picture.name}.svg" if folder else f"{picture.name}.svg"
        yield f"## {picture.title}"
        yield f"![{picture.title}]({place})"
        yield picture.says


def accuracies(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            SHOWN.get(name, name),
            kind,
            f"{how['greedy']['problems']:,}",
            *(
                f"{x['accuracy']:.3f} ({x['low']:.3f} … {x['high']:.3f})"
                for x in (how["greedy"], how["sampled"])
            ),
            f"{how['sampled']['format']:.3f}",
        )
        for name, job in found.items()
        for kind, how in job.get("held_out", {}).items()
    ]
    if rows:
        yield "## Accuracies"
        yield "Right answers to held-out problems, with 95 % intervals; the last column is sampled."
        yield table(("model", "problems", "number", "greedy", "sampled", "format"), rows)


def samples(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name in ("sft", "grpo-0"):
        both = found.get(name, {}).get("samples", {})
        if "last" in both:
            pairs = (both[when]["samples_sampled"] for when in ("first", "last"))
            for (prompt, before), (_, after) in zip(*pairs, strict=True):
                rows.append((SHOWN[name], *map(code, (prompt, before, after))))
    if rows:
        yield "## Samples"
        yield "Completions at temperature 1, before and after a stage."
        yield table(("stage", "prompt", "before", "after"), rows)


def jobs(found: Mapping[str, Any]) -> Iterator[str]:
    yield "Settings that differ from the stage's defaults; tokens are those that the loss counts."
    rows = [
        (
            name,
            job["stage"],
            ", ".join(job["inputs"].values()) or "–",
            ", ".join(f"{key} {toml_value(x)}" for key, x in job["settings"].items()) or "–",
            f"{job['steps']:,}",
            f"{job['tokens']:,}",
            f"{job['seconds']:.0f}",
        )
        for name, job in found.items()
    ]
    yield table(("job", "stage", "begins from", "settings", "steps", "tokens", "seconds"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[x.replace("|", "\\|") for x in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def code(text: str) -> str:
    """A sample, as code on one line."""
    one = printable(text).replace("`", "'")
    return f"`{one[:LONGEST]}{'…' * (len(one) > LONGEST)}`" if one else "(nothing)"
