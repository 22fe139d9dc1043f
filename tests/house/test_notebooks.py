"""The form of docs/notebooks: pages that Sphinx executes (`make notebooks`), with words for their
pictures, nothing of one machine, and links that lead somewhere."""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

import pytest

from support import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index")
HEADER = """---
file_format: mystnb
kernelspec:
  name: python3
  language: python
  display_name: Python 3
---

# """
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|tmp|root|usr|work|Users|opt)/|[A-Z]:\\\\")


class Cell(NamedTuple):
    head: str  # options
    code: str


def cells(page: str) -> list[Cell]:
    """The code cells: options stand between --- and ---, or in lines that begin with a colon."""
    found = []
    for body in re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```$", page, re.M | re.S):
        options = re.match(r"---\n.*?^---\n|(?::.*\n)*", body, re.M | re.S)
        head = options[0] if options else ""
        found.append(Cell(head, body.removeprefix(head)))
    return found


def prose(page: str) -> str:
    """Without what stands between fences."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)


def faults(page: str) -> list[str]:
    found = cells(page)
    wrong = []
    if not page.startswith(HEADER):
        wrong.append("no kernelspec, or no title behind it")
    if len(re.findall(r"^# ", prose(page), re.M)) != 1:
        wrong.append("not one title")
    if page.count("{code-cell}") != len(found):
        wrong.append("a code cell that is not ipython3, or not closed")
    wrong += [f"a path of one machine: {path}" for path in ABSOLUTE.findall(page)]
    for number, cell in enumerate(found):
        try:
            ast.parse(cell.code)
        except SyntaxError as error:
            wrong.append(f"cell {number}: {error}")
        if "plt.subplots" in cell.code and not re.search(r'alt: "\S+( \S+){5,}"', cell.head):
            wrong.append(f"cell {number}: a picture without an alt text")
    if not any("assert " in cell.code for cell in found):
        wrong.append("nothing asserted")
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str) -> None:
    assert not faults((FOLDER / f"{name}.md").read_text())


def test_index_has_each() -> None:
    """In its table with a link, and in the order of its toctree."""
    index = (FOLDER / "index.md").read_text()
    linked = re.findall(r"^\| \[.+?\]\((\w+)\.md\) \|", index, re.M)
    (tree,) = re.findall(r"```\{toctree\}\n:hidden:\n\n(.*?)```", index, re.S)
    assert linked == tree.split()
    assert sorted(linked) == NAMES


@pytest.mark.parametrize("name", ["index", *NAMES])
def test_links(name: str) -> None:
    page = prose((FOLDER / f"{name}.md").read_text())
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page):
        assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_these_tests_see_what_they_forbid() -> None:
    cell = "```{code-cell} ipython3\n%s\n```\n"
    page = HEADER + "Title\n\n" + cell % "assert True"
    assert faults(page) == []
    for more, wrong in (
        (cell % "x = (", "cell 1: "),
        (cell % "figure, axes = plt.subplots()", "cell 1: a picture without an alt text"),
        ("\n# Another\n", "not one title"),
        ("written to /home/me/x\n", "a path of one machine"),
        ("```{code-cell} python\n```\n", "a code cell that is not ipython3"),
    ):
        (found,) = faults(page + more)
        assert found.startswith(wrong)
    assert faults(page.replace("name: python3\n", "", 1)) == [
        "no kernelspec, or no title behind it"
    ]
    assert faults(page.replace("assert True", "1")) == ["nothing asserted"]
