"""The derivations: their sections, examples that run, exercises that can be graded, mathematics
that GitHub renders."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from refimpl.check.cases import CASES

from support import ROOT

PAGES = sorted(p for p in (ROOT / "derivations").glob("*.md") if p.stem in CASES)
SECTIONS = [
    "Setup",
    "Forward",
    "Differential",
    "Adjoint",
    "What we save",
    "Range of validity",
    "Checks",
    "Source map",
    "Example",
    "Exercise",
]
FIRST_PARTS = {"grpo": ["Part 1: plain GRPO"]}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_sections(page: Path) -> None:
    found = re.findall(r"^## (.+)$", page.read_text(), re.M)
    assert found == FIRST_PARTS.get(page.stem, []) + SECTIONS


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_runs(page: Path) -> None:
    """Each block of code, the one under "Example" and the others, stands alone and asserts
    something."""
    text = page.read_text()
    assert text.split("## Example")[1].split("## Exercise")[0].count("```python\n") == 1
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)):
        assert "assert " in code
        exec(compile(code, f"{page.name}, block {number}", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_exercise_has_its_command(page: Path) -> None:
    exercise = page.read_text().split("## Exercise")[1]
    assert f"refimpl grade {page.stem} mine.py" in exercise
    assert f"{page.stem}_backward(" in exercise


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_exercise_names_what_is_saved(page: Path) -> None:
    """Every field of the op's saved record stands in the exercise, so that it can be solved from
    the page."""
    op = import_module(f"refimpl.ops.{page.stem}")
    (record,) = [
        getattr(op, name)
        for name in op.__all__
        if name.lower() == page.stem.replace("_", "") + "saved"
    ]
    exercise = page.read_text().split("## Exercise")[1]
    missing = [name for name in record._fields if f"`{name}`" not in exercise]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_exercise_has_its_answer(page: Path) -> None:
    """Folded, with code that computes it, and with the functions that solve the graded part, each
    in a file that defines it."""
    exercise = page.read_text().split("## Exercise")[1]
    question, answer = exercise.split("<details><summary>Answer</summary>\n\n")
    assert "Then answer" in question
    assert answer.endswith("\n```\n\n</details>\n")
    first = answer.split("\n\n")[0]
    assert f"`{page.stem}_backward` in [{page.stem}.py](../refimpl/ops/{page.stem}.py)" in first
    linked = [(page.parent / file).read_text() for file in re.findall(r"\]\((.+?)\)", first)]
    for function in re.findall(r"`(\w+)`", first):
        assert any(f"\ndef {function}(" in file for file in linked), function


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_source_map_is_complete(page: Path) -> None:
    """Every tag of the page stands in its source map (as itself or within a range)."""
    text = page.read_text().replace(r"\_", "_")
    numbers = {int(n) for n in re.findall(rf"\\tag\{{{page.stem}\.(\d+)\}}", text)}
    table = text.split("## Source map")[1].split("## Example")[0]
    mapped = {int(n) for n in re.findall(rf"\({page.stem}\.(\d+)\)", table)}
    for first, last in re.findall(
        rf"\({page.stem}\.(\d+)\)\s*(?:–|…|-|to|through)\s*\({page.stem}\.(\d+)\)", table
    ):
        mapped |= set(range(int(first), int(last) + 1))
    assert numbers == mapped


ALL_PAGES = sorted((ROOT / "derivations").glob("*.md"))


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.stem)
def test_letters_of_the_dimension_key(page: Path) -> None:
    """A page whose tables of symbols give a letter of the key another meaning says so. (W is both a
    weight and the vocabulary, and the key says that; B and T are the key's wherever they stand.)"""
    key = re.findall(r"^\| ([A-Z]) \|", (ROOT / "derivations" / "README.md").read_text(), re.M)
    text = page.read_text()
    said = " ".join(p for p in text.split("\n\n") if "n this page" in " ".join(p.split()))
    for cell in re.findall(r"^\| (\$[^|]+) \| [`—]", text, re.M):
        for letter in re.findall(r"\$([A-Z])(?![a-z])", cell):
            assert letter in "BTW" or letter not in key or f"${letter}" in said, letter


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_mathematics_survives_markdown(page: Path) -> None:
    """Inline formulas have no backslash before punctuation, which Markdown would eat; fences and
    dollars are paired."""
    text = page.read_text()
    assert text.count("```") % 2 == 0
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    assert prose.count("$") % 2 == 0
    for inline in re.findall(r"\$([^$]+)\$", prose):
        assert not re.search(r"\\[^a-zA-Z]", inline), f"{page.name}: {inline}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.stem)
def test_no_formula_is_taken_for_emphasis(page: Path) -> None:
    """CommonMark takes _ between punctuation for emphasis, as in a formula's {E}_\\pi; within
    dollars it finds text alone."""
    for block in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        dollars = 0
        for part in block.children or []:
            dollars += part.content.count("$") if part.type == "text" else 0
            assert dollars % 2 == 0 or part.type in ("text", "softbreak"), (
                f"{page.name}: {block.content[:200]}"
            )


def test_glossary() -> None:
    """Each word once, in the order of the alphabet within its section, with a meaning."""
    page = (ROOT / "derivations" / "glossary.md").read_text()
    seen = []
    for section in page.split("\n## ")[1:]:
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.M)[1:]
        words = [word for word, _ in rows]
        assert words == sorted(words, key=str.lower)
        seen += words
    assert len(seen) == len(set(seen)) > 50
    said = {word.strip() for words in seen for word in words.split(",")}
    assert {"saved", "cotangent", "unit", "part", "route", "load"} <= said
