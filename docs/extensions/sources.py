"""Links from pages to files of the repository lead to the files, rendered on pages of their own;
equations, in text and in code, lead to where they stand.

A page `source/<path>.html` is made for every file and folder that a page links to, and for every
module of the package, which the API reference links to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from mathematics import TAG
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

__all__ = ["address", "setup"]

CITED = re.compile(r"\(([a-z_0-9]+\.[0-9]+)\)")


def address(docname: str, path: str, line: int | None = None) -> str:
    """The relative address of a file's page, as seen from the page ``docname``."""
    return "../" * docname.count("/") + f"source/{path}.html" + (f"#L-{line}" if line else "")


def _tagged(docname: str, tag: str) -> str:
    return "../" * docname.count("/") + f"derivations/{tag.split('.')[0]}.html#eq-{tag}"


class Links(SphinxTransform):
    """Links to files that are not pages, and citations of equations."""

    default_priority = 200

    def apply(self, **options: Any) -> None:
        for link in list(self.document.findall(addnodes.download_reference)):
            self.lead_to_source(link)
        for link in list(self.document.findall(addnodes.pending_xref)):
            if link["reftype"] == "myst" and link["refdomain"] is None:  # to no page
                self.lead_to_source(link)
        for text in list(self.document.findall(nodes.Text)):
            if not isinstance(text.parent, nodes.reference | nodes.FixedTextElement):
                self.lead_to_equations(text)

    def lead_to_source(self, link: nodes.Element) -> None:
        root, docname = Path(self.env.srcdir), self.env.docname
        target = link["reftarget"].split("#")[0]
        path = (root / docname).parent.joinpath(target).resolve()
        if target and path.exists():  # else Sphinx says that it leads nowhere
            name = path.relative_to(root).as_posix()
            self.env.metadata[docname].setdefault("files", []).append(name)
            uri = address(docname, name)
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri))

    def lead_to_equations(self, text: nodes.Text) -> None:
        new: list[nodes.Node] = []
        for i, part in enumerate(CITED.split(text.astext())):  # every other one is a tag
            if i % 2 and f"derivations/{part.split('.')[0]}" in self.env.found_docs:
                uri = _tagged(self.env.docname, part)
                new.append(nodes.reference("", f"({part})", refuri=uri))
            elif part:
                new.append(nodes.Text(f"({part})" if i % 2 else part))
        if CITED.search(text.astext()):
            text.parent.replace(text, new)


def _code(app: Sphinx, path: Path, pagename: str, tags: set[str]) -> str:
    """A file as HTML, its lines with anchors L-1, L-2, …, its equations with links."""
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    code = highlight(path.read_text(), lexer, HtmlFormatter(lineanchors="L", wrapcode=True))
    return CITED.sub(
        lambda m: f'<a href="{_tagged(pagename, m[1])}">{m[0]}</a>' if m[1] in tags else m[0], code
    )


def _listing(path: Path, names: set[str], root: Path) -> str:
    rows = []
    for child in sorted(path.iterdir()):
        if child.relative_to(root).as_posix() in names:
            rows.append(
                f'<li><a href="{path.name}/{child.name}.html">{escape(child.name)}</a></li>'
            )
    return f"<ul>{''.join(rows)}</ul>"


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages of files and folders (event html-collect-pages)."""
    root = Path(app.srcdir)
    names = {name for data in app.env.metadata.values() for name in data.get("files", [])}
    names |= {x.relative_to(root).as_posix() for x in (root / "refimpl").rglob("*.py")}
    for name in list(names):
        if (root / name).is_dir():
            names |= {x.relative_to(root).as_posix() for x in (root / name).glob("*") if _text(x)}
    tags = set(tags_of(app.env))
    for name in sorted(names):
        path, page = root / name, f"source/{name}"
        body = _listing(path, names, root) if path.is_dir() else _code(app, path, page, tags)
        context = {"title": name, "body": f'<h1 class="file">{escape(name)}</h1>{body}'}
        yield page, context, "page.html"


def _text(path: Path) -> bool:
    return path.is_file() and path.suffix in (".py", ".cu", ".cuh", ".md", ".json", ".toml", ".c")


def tags_of(env: BuildEnvironment) -> Iterator[str]:
    """Every equation of the derivations."""
    for page in (Path(env.srcdir) / "derivations").glob("*.md"):
        for tag in TAG.findall(page.read_text()):
            yield tag.replace("\\_", "_")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(Links)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
