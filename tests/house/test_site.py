"""The site's pages, without building it (`make docs` does): formulas that Markdown leaves alone,
and an API reference that no package is missing from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from support import PACKAGE, ROOT

PAGES = sorted(
    path
    for folder in (".", "derivations", "docs", "docs/notebooks", "examples", "kernels")
    for path in (ROOT / folder).glob("*.md")
)
MARKDOWN = MarkdownIt("commonmark").enable("table")
UNTOUCHED = ("text", "softbreak", "hardbreak")  # what may stand between a formula's two dollars


def eaten(text: str) -> list[str]:
    """Inline formulas, $…$, in which Markdown sees emphasis, a link or an escape."""
    found = []
    for block in MARKDOWN.parse(text):
        inside = ""
        for part in block.children or []:
            pieces = part.content.split("$") if part.type == "text" else [part.content]
            if inside and part.type not in UNTOUCHED:
                found.append(f"{inside}{part.markup}: {part.type}")
                break
            for i, piece in enumerate(pieces):
                if i:
                    inside = "" if inside else "$"
                if inside:
                    inside += piece
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_markdown_leaves_formulas_alone(page: Path) -> None:
    assert not eaten(page.read_text())


def test_this_test_sees_what_it_forbids() -> None:
    assert eaten(r"so $\mathbb{E}_\pi[k_1]$ and $\mathbb{E}_\pi[k_3]$")
    assert eaten("so $a *b$ and $c* d$")
    assert not eaten(r"so $\mathbb E_\pi[k_1]$ and $\mathbb E_\pi[k_3]$, *then* `$x_1$`")


def test_every_package_is_in_the_reference() -> None:
    """Every package, and every module beside them, stands behind an ``.. api::``."""
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    listed = {
        name for line in re.findall(r"^\.\. api:: (.+)$", pages, re.M) for name in line.split()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"]) - {"refimpl.kernels.src"}
    modules = {f"refimpl.{path.stem}" for path in PACKAGE.glob("[!_]*.py")}
    assert listed == packages | modules
