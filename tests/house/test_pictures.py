"""The pictures of the pages are what derivations/pictures.py draws; their words fit and stand
apart; a page shows each, with words for who does not see it."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from support import ROOT

PAGES = ROOT / "derivations"
SVG = "{http://www.w3.org/2000/svg}"
LETTER = 0.56  # width of an average letter by its height, in DejaVu Sans, wider than most
NAMES = ["flash_attention", "grpo_clip", "grpo_kl", "mla", "moe", "mtp", "parallel", "rope"]


@cache
def script() -> Any:
    spec = importlib.util.spec_from_file_location("pictures", PAGES / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def drawn(name: str) -> str:
    return str(script().PICTURES[f"{name}.svg"]().svg())


class Words:
    """The box that a text fills, about."""

    def __init__(self, mark: ElementTree.Element) -> None:
        self.text = mark.text or ""
        size, x = (float(mark.attrib[name]) for name in ("font-size", "x"))
        self.bottom = float(mark.attrib["y"])
        self.top = self.bottom - 0.75 * size
        width = LETTER * size * len(self.text)
        self.left = (
            x - {"start": 0.0, "middle": width / 2, "end": width}[mark.attrib["text-anchor"]]
        )
        self.right = self.left + width

    def meets(self, other: Words) -> bool:
        return (
            min(self.right, other.right) - max(self.left, other.left) > 4
            and min(self.bottom, other.bottom) - max(self.top, other.top) > 0
        )


def faults(svg: str) -> list[str]:
    """Words that leave the card, and pairs that overlap."""
    root = ElementTree.fromstring(svg)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    words = [Words(mark) for mark in root.iter(f"{SVG}text")]
    outside = [
        f"{x.text} leaves the card"
        for x in words
        if min(x.left, x.top) < 4 or x.right > width - 4 or x.bottom > height - 4
    ]
    return outside + [f"{a.text} meets {b.text}" for a, b in combinations(words, 2) if a.meets(b)]


def test_no_other_pictures() -> None:
    assert sorted(script().PICTURES) == [f"{name}.svg" for name in NAMES]
    assert {x.stem for x in PAGES.glob("*.svg")} == {"model", *NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_committed_as_drawn(name: str) -> None:
    assert (PAGES / f"{name}.svg").read_text() == drawn(name), "make pictures draws it anew"


@pytest.mark.parametrize("name", NAMES)
def test_words_fit(name: str) -> None:
    assert not faults(drawn(name))


@pytest.mark.parametrize("name", NAMES)
def test_said_in_words(name: str) -> None:
    """A title and a description in the file; an alt text in the one page that shows it."""
    root = ElementTree.fromstring(drawn(name))
    for tag, least in (("title", 3), ("desc", 25)):
        assert len((root.findtext(f"{SVG}{tag}") or "").split()) >= least
    shown = [
        alt
        for page in PAGES.glob("*.md")
        for alt in re.findall(rf"!\[([^]]*)\]\({name}\.svg\)", page.read_text())
    ]
    assert len(shown) == 1
    assert len(shown[0].split()) >= 5


def test_these_tests_see_what_they_forbid() -> None:
    picture = script().Picture(200, 100, "a", "b")
    picture.text(10, 50, "far too long for so small a card")
    picture.text(10, 80, "short")
    assert faults(picture.svg()) == ["far too long for so small a card leaves the card"]
    picture.text(30, 84, "on it")
    assert faults(picture.svg())[1:] == ["short meets on it"]
