"""Every internal link of the built site leads to a page and an anchor that exist, nothing is loaded
from elsewhere, and no formula has an error: ``python docs/check.py build/docs/html``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["Page", "main"]

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "srcset")}
NAMED_ONLY = {"canonical", "index", "next", "prev", "search"}  # links that a browser does not load


class Page(HTMLParser):
    """The anchors, links and loaded files of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.errors = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[x] for x in ("id", "name") if x in given}
        self.errors += tag == "merror"
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        for name in ("src", "href", "srcset"):
            if (tag, name) in LOADED and name in given and given.get("rel") not in NAMED_ONLY:
                self.loaded.add(given[name])


def dead(root: Path, pages: dict[Path, Page]) -> list[str]:
    """What is wrong, a line each."""
    found = []
    for path, page in sorted(pages.items()):
        here = path.relative_to(root)
        if page.errors:
            found.append(f"{here}: {page.errors} formulas with errors")
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    found.append(f"{here}: loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{here}: no page {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors:
                    found.append(f"{here}: no anchor {link}")
    return found


def main(folder: str) -> int:
    root = Path(folder).resolve()
    pages = {path: Page(path) for path in root.rglob("*.html")}
    found = dead(root, pages)
    links = sum(len(page.links) for page in pages.values())
    print(*found, f"{len(pages)} pages, {links} links, {len(found)} of them dead", sep="\n")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
