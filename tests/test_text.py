"""The text that verification reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.text import load_text


def test_default_text_is_large() -> None:
    text = load_text()
    assert len(text.data) > 300_000
    assert b"The Python" in text.data


def test_short_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(63))
    with pytest.raises(CouldNotRun, match="at least 64 bytes, got 63"):
        load_text(path)
