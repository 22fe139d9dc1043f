"""Documents and those held out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.text import load_text
from refimpl.train.documents import documents, held_out

LONG = "A line of text.\n" * 100


def test_by_default_each_topic() -> None:
    found = documents()
    assert len(found) > 50
    assert "\n\n".join(found).encode() == load_text().data


def test_file_and_folder(tmp_path: Path) -> None:
    """A file is a document; of a folder, each text below it, sorted; other files, hidden ones and
    blank ones are left out."""
    for name in ("b.txt", "a/z.md", "a/b.rst", "c.py", ".d.txt", ".git/e.txt", "B.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n{LONG}")
    (tmp_path / "blank.txt").write_text(" \n")
    assert documents(tmp_path / "b.txt") == [f"b.txt\n{LONG}"]
    names = [text.partition("\n")[0] for text in documents(tmp_path)]
    assert names == ["B.txt", "a/b.rst", "a/z.md", "b.txt"]


def test_documents_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.txt").write_bytes(LONG.encode() + b"\xff")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    for path, line in (
        (tmp_path / "bad.txt", f"bad.txt must be UTF-8: invalid start byte at byte {len(LONG)}"),
        (tmp_path, "bad.txt must be UTF-8"),
        (tmp_path / "short.txt", "short.txt must hold at least 1,024 characters, got 5"),
        (tmp_path / "empty", r"empty holds no file .txt, .md, .rst"),
        (tmp_path / "none", "none can't be read: No such file"),
    ):
        with pytest.raises(CouldNotRun, match=f"^text .*{line}"):
            documents(path)
    (tmp_path / "bad.txt").write_text(LONG)
    monkeypatch.setattr("refimpl.train.documents.MOST", 1603)
    with pytest.raises(CouldNotRun, match=r"short.txt must hold at most 3 bytes, got 5"):
        documents(tmp_path)


def test_held_out_by_hash() -> None:
    """Nothing is lost and nothing on both sides; the share of the characters is kept; order changes
    nothing. Pinned, since it must be the same everywhere."""
    texts = [f"document {i} " + i % 7 * "x" for i in range(4000)]
    training, held = held_out([*texts, *texts[:100]])
    assert len(training) + len(held) == 4100
    assert set(training) | set(held) == set(texts)
    assert not set(training) & set(held)
    share = sum(map(len, set(held))) / sum(map(len, texts))
    assert 0.99 / 16 < share <= 1 / 16
    assert set(held_out(texts[::-1])[1]) == set(held)
    assert 200 < len(set(held)) < 300  # long ones, too
    digest = hashlib.sha256("\n".join(sorted(set(held))).encode()).hexdigest()
    assert digest[:16] == "6fb518c62a8934b8"


def test_documents_that_share_a_paragraph_stand_on_one_side() -> None:
    """A chapter and its sections, however broken into lines; a heading alone joins nothing."""
    paragraphs = [
        f"paragraph {i}, which says a thing, and is as long as a line or two" for i in range(9)
    ]
    chapter = "\n\n".join(paragraphs[:6])
    sections = ["Title\n\n" + paragraphs[1].replace(", ", ",\n   "), "Title\n\n" + paragraphs[4]]
    others = ["Title\n\n" + x for x in paragraphs[6:]]
    for share in (0.2, 0.5, 0.8):
        sides = held_out([chapter, *sections, *others], share)
        assert [{chapter, *sections} & set(side) for side in sides].count(set()) == 1
    assert all(set(others) & set(side) for side in held_out([chapter, *sections, *others], 0.2))
    training, held = held_out([chapter, *sections])  # all are joined
    assert len(training) == len(held) == 1
    assert len(training[0] + held[0]) == sum(map(len, (chapter, *sections))) + 2


def test_held_out_topics_are_not_trained_on() -> None:
    """Of all pieces of 60 characters of the held-out topics, 44 % were in a topic for training when
    each stood for itself."""
    training, held = (
        {text[i : i + 60] for text in side for i in range(len(text) - 59)}
        for side in held_out(documents())
    )
    assert len(held) > 20_000
    assert len(held & training) < 0.03 * len(held)


def test_held_out_of_few() -> None:
    """At least one, never all, and the longer one for training."""
    short, long = "short", "long" * 9
    for texts in ([short, long], [long, short]):
        for share in (0.01, 0.5):
            assert held_out(texts, share) == ([long], [short])
    for count in (3, 5):
        training, held = held_out([f"text {i}" for i in range(count)], 0.99)
        assert len(held) == count - 1
        assert len(training) == 1


def test_held_out_of_one() -> None:
    """A single text is cut behind a line near 15/16, and somewhere if there is no line."""
    training, held = held_out([LONG])
    assert training[0] + held[0] == LONG
    assert training[0].endswith("\n")
    assert 1500 - 16 <= len(training[0]) <= 1500
    assert held_out([LONG, LONG]) == (training, held)
    assert held_out(["x\n" + 158 * "y"]) == (["x\n" + 148 * "y"], [10 * "y"])
    assert held_out(["xy"]) == (["x"], ["y"])
    for texts, share in (([], 0.5), (["x"], 0.5), ([LONG], 0.0), ([LONG], 1.0)):
        with pytest.raises(ValueError, match=r"documents must hold at least 2|share must lie"):
            held_out(texts, share)
