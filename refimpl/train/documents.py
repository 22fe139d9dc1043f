"""The documents of pre-training: a file, a folder, or the English text that CPython ships; and
which of them are held out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import CouldNotRun
from ..files import read_bytes
from ..text import load_topics

__all__ = ["documents", "held_out"]

KINDS = (".txt", ".md", ".rst")
LEAST = 1024  # characters in all: from fewer nothing can be held out that tells anything
MOST = 2**28  # bytes in all
SHARE = 1 / 16
PARAGRAPH = 60  # characters: a shorter one, as a heading, may well be in texts that share nothing


def documents(path: Path | None = None) -> list[str]:
    """The documents at ``path``: a file is one, of a folder each file that ends in .txt, .md or
    .rst, whatever folder below it is in, sorted by path; what a name beginning with a dot hides is
    left out. By default each topic of `pydoc_data.topics` (they differ by Python version).

    CouldNotRun if there are none, if one can't be read or is not UTF-8, if all of them together are
    too short, or more than 2²⁸ bytes.
    """
    if path is None:
        return load_topics()
    if os.path.isdir(path):
        below = [file.relative_to(path) for file in path.rglob("*") if file.suffix in KINDS]
        shown = [name for name in below if not any(part.startswith(".") for part in name.parts)]
        files = [path / name for name in sorted(shown, key=lambda name: name.as_posix())]
        if not files:
            raise CouldNotRun(f"{path} holds no file {', '.join(KINDS)}", argument="text")
    else:
        files = [path]
    texts: list[str] = []
    left = MOST
    for file in files:
        try:
            data = read_bytes(file, str(file), left)
            texts.append(data.decode())
        except CouldNotRun as error:
            raise CouldNotRun(error.reason, argument="text") from error
        except UnicodeDecodeError as error:
            reason = f"{file} must be UTF-8: {error.reason} at byte {error.start}"
            raise CouldNotRun(reason, argument="text") from error
        left -= len(data)
    texts = [text for text in texts if text.strip()]
    if (found := sum(map(len, texts))) < LEAST:
        raise CouldNotRun(
            f"{path} must hold at least {LEAST:,} characters, got {found:,}", argument="text"
        )
    return texts


def held_out(documents: Sequence[str], share: float = SHARE) -> tuple[list[str], list[str]]:
    """(for training, held out): in the order of a hash of their texts, the same on every machine,
    documents are held out while they fit into ``share`` of all characters; where none fits, the
    shortest one.

    Documents that share a paragraph stand on one side, as if they were one: a chapter with its
    sections, a document that is there twice. If that joins all, or there is one only, their text is
    cut behind the last line that ends in the first 1 − ``share`` of it. ValueError unless
    0 < share < 1 and the text can be cut.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    texts = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    groups = _sharing(texts)
    if len(groups) < 2:
        return _cut("\n".join(texts), share)
    left = share * sum(map(len, texts))
    held: set[str] = set()
    for group in groups:
        if (size := sum(map(len, group))) <= left:
            held.update(group)
            left -= size
    held = held or set(min(groups, key=lambda group: sum(map(len, group))))
    return [text for text in documents if text not in held], [x for x in documents if x in held]


def _sharing(texts: Sequence[str]) -> list[list[str]]:
    """The texts in groups, in the order of each group's first: those that share a paragraph, with
    one another or with a third, are together."""
    first: dict[str, int] = {}  # the text where a paragraph came first
    earlier = list(range(len(texts)))  # a text of the same group; the first one's is itself

    def root(place: int) -> int:
        while earlier[place] != place:
            earlier[place] = earlier[earlier[place]]
            place = earlier[place]
        return place

    for place, text in enumerate(texts):
        for paragraph in _paragraphs(text):
            one, other = sorted((root(place), root(first.setdefault(paragraph, place))))
            earlier[other] = one
    groups: dict[int, list[str]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(root(place), []).append(text)
    return list(groups.values())


def _paragraphs(text: str) -> Iterator[str]:
    """What stands between blank lines, however its lines are broken and indented."""
    for part in re.split(r"\n\s*\n", text):
        if len(paragraph := " ".join(part.split())) >= PARAGRAPH:
            yield paragraph


def _cut(text: str, share: float) -> tuple[list[str], list[str]]:
    if len(text) < 2:
        raise ValueError(f"documents must hold at least 2 characters to be cut, got {len(text)}")
    near = min(max(int(len(text) * (1 - share)), 1), len(text) - 1)
    place = text.rfind("\n", near // 2, near) + 1 or near
    return [text[:place]], [text[place:]]
