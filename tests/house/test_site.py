"""The site's pages, without building it (`make docs` does): formulas that Markdown leaves alone,
and an API reference that no package is missing from."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from support import PACKAGE, ROOT

sys.path.append(str(ROOT / "docs" / "extensions"))
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


def test_dead_links_are_found(tmp_path: Path) -> None:
    """The check of the built site, on a site with one mistake of each kind."""
    (tmp_path / "other.html").write_text('<h1 id="there">There</h1>')
    links = '<a href="other.html#there">1</a><a href="#here">2</a><a href="https://a.b">3</a>'
    right = f'<p id="here">{links}</p><img src="other.html">'
    for wrong, told in (
        ('<a href="none.html">', "no page none.html"),
        ('<a href="other.html#gone">', "no anchor other.html#gone"),
        ('<script src="https://a.b/c.js">', "loads https://a.b/c.js"),
        ('<link rel="stylesheet" href="gone.css">', "no page gone.css"),
        ("<merror>", "1 formulas with errors"),
        ("", None),
    ):
        (tmp_path / "page.html").write_text(right + wrong)
        done = subprocess.run(
            [sys.executable, ROOT / "docs" / "check.py", tmp_path], capture_output=True, text=True
        )
        assert done.returncode == (1 if told else 0), done
        assert (f"page.html: {told}" in done.stdout) == bool(told)


def test_formulas() -> None:
    """Their MathML, their number and their width; needs the extra `docs`."""
    pytest.importorskip("ziamath")
    pytest.importorskip("sphinx")
    from mathematics import COLUMN, formula, width

    found = formula(r"\bar w = \sum_i \mathsf T_i \tag{log\_prob.5}", display=True)
    assert found.tag == "log_prob.5"
    assert "𝖳" in found.mathml
    assert formula("`a_b`") == formula("a_b")  # GitHub's form where underscores would be emphasis
    assert width(formula(r"x \qquad " * 40, display=True)) > COLUMN > width(found)
    for wrong in (r"\frac{1}", r"\nosuchcommand x", r"\begin{cases} a", "{a", "x^", r"a \\ b"):
        with pytest.raises(ValueError, match="not converted"):
            formula(wrong)
