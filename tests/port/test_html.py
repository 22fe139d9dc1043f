"""The page: it stands alone, it is well formed, and what comes from a file is text in it."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from refimpl.check.planted import PLANTED
from refimpl.port.diagnose import Diagnosis
from refimpl.port.html import COLOURS, page
from refimpl.port.report import COLUMNS, Verdict
from refimpl.port.verdict import compare_folders

from port.examples import Example, save

NAME = "grad/model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
SINGLE = {"meta", "rect"}  # elements without an end


class Elements(HTMLParser):
    """Each element of a page, and whether they are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


pytestmark = pytest.mark.usefixtures("no_catalogue")


@pytest.fixture
def failed(
    no_catalogue: None, example: Example, tmp_path_factory: pytest.TempPathFactory
) -> Verdict:
    """Rotated key rows that are wrong, and a name that would be code."""
    x = example.arrays[NAME].copy()
    x[7:] *= 2
    folder = tmp_path_factory.mktemp("page")
    arrays = example.arrays | {NAME: x, "<script>alert(1)</script>": np.zeros(2)}
    return compare_folders(save(folder / "<b>.safetensors", arrays), example.truth)


def test_it_stands_alone(failed: Verdict) -> None:
    text = page(failed)
    elements = Elements(text)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "b"}
    assert not re.search(r"https?:|@import|url\(|javascript:", text)
    assert "prefers-color-scheme: dark" in text
    assert ("html", {"lang": "en"}) in elements.found
    assert "<script>alert(1)</script>" in "".join(elements.text)
    assert "&lt;b&gt;.safetensors" in text


def test_it_says_what_the_report_says(failed: Verdict) -> None:
    bug = Diagnosis([PLANTED[0]], ["a factor of <2>"], "")
    said = "".join(Elements(page(replace(failed, diagnosis=bug))).text)
    assert failed.first_wrong is not None
    for line in (
        "FAIL",
        failed.reason,
        str(failed.first_wrong),
        "latent rows: ok, rotated key rows: wrong",
        "these are the numbers of the planted bug linear: weight gradient over one batch row",
        "hint: a factor of <2>",
        f"wrong: {NAME.removeprefix('grad/model.layers.1.')}; ok: ",
        COLUMNS,
    ):
        assert line in said


def test_the_map_shows_where(failed: Verdict) -> None:
    """Rows 7 to 10 of 11 are coloured, the others pale; a legend says what the colours mean."""
    text = page(failed)
    cells = re.findall(r'<rect x="\d+" y="(\d+)"[^>]*?(class="zero"|fill="#\w+")>', text)
    rows = sorted({int(y) for y, _ in cells})
    assert len(rows) == 11
    for y, colour in cells:
        assert colour.startswith("fill") == (rows.index(int(y)) >= 7)
    assert all(colour in text for colour in COLOURS)
    assert "up to 3." in text or ": ok</text>" in text
    assert "the largest error</text>" in text


def test_pages_of_other_verdicts(example: Example, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", example.arrays)
    verdict = compare_folders(path, example.truth)
    said = page(verdict)
    Elements(said)
    assert '<h1 class="PASS">PASS</h1>' in said
    assert "<svg" not in said
    for name, x in (
        ("grad/model.norm.weight", np.full(20, np.nan)),
        ("out/loss", np.array(3.0)),
        ("aux/load.1", np.zeros(4, np.int64)),
        ("act/model.layers.1", np.zeros((2, 9, 20))),
    ):
        verdict = compare_folders(save(path, example.arrays | {name: x}), example.truth)
        assert verdict.verdict == "FAIL"
        Elements(page(verdict))
