"""Text to tokens and back: no broken characters, a checkpoint's tokenizer, bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.tokenizer import Bytes, HuggingFace, TextStream

from support import byte_level

SAMPLE = "naïve 日本語 🎉 \N{REPLACEMENT CHARACTER} end"


def test_no_broken_characters() -> None:
    """A character's bytes come in several tokens: the pieces hold it whole, and no piece a part of
    it."""
    stream = TextStream(Bytes())
    pieces = [stream.add(byte) for byte in SAMPLE.encode()]
    assert "".join(pieces) + stream.rest() == SAMPLE
    assert (
        sum("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) == 1
    )  # the one that stands there
    assert pieces[:4] == ["n", "a", "", "ï"]
    for byte in "日".encode()[:2]:
        assert stream.add(byte) == ""
    assert (
        stream.rest() == "\N{REPLACEMENT CHARACTER}"
    )  # the end of the text, in the middle of a character
    assert stream.add(ord("a")) == "a"


def test_tokenizer(tmp_path: Path) -> None:
    byte_level(tmp_path)
    plain = HuggingFace(tmp_path)
    tokens = plain.encode(SAMPLE)
    assert len(tokens) == len(SAMPLE.encode())
    assert plain.decode(tokens) == SAMPLE
    settings: dict[str, Any] = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = HuggingFace(tmp_path)
    assert tokenizer.encode(SAMPLE) == [256, *tokens]
    assert tokenizer.encode("<s>" + SAMPLE) == [256, *tokens]
    assert tokenizer.decode([256, *tokens]) == SAMPLE
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) == SAMPLE
    assert pieces[:4] == ["n", "a", "", "ï"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert HuggingFace(tmp_path).encode(SAMPLE) == tokens


def test_tags_are_tokens() -> None:
    """Text around them is bytes; of two that begin at one place the longer is taken; what is no tag
    yet, or not quite, stays bytes."""
    tags = ("<a>", "<a>b", "</a>", "|")
    tokenizer = Bytes(tags)
    assert tokenizer.encode("<a>é</a>") == [256, *"é".encode(), 258]
    assert tokenizer.encode("<a>b<a><A>") == [257, 256, *b"<A>"]
    assert tokenizer.encode("||<a") == [259, 259, *b"<a"]
    text = SAMPLE + "|<a>" + SAMPLE + "<a>b</a>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([256, 97, 260, 999, 258]) == "<a>a</a>"
    assert Bytes().encode("<a>") == [*b"<a>"]
    assert Bytes().decode([97, 256, 98]) == "ab"
    with pytest.raises(ValueError, match="tags must be different and not empty"):
        Bytes(("x", "x"))


class Panic(BaseException):
    pass


@pytest.mark.parametrize("kind", [Exception, Panic])
@pytest.mark.parametrize("call", ["from_str", "encode", "decode"])
def test_whatever_the_package_raises(
    call: str,
    kind: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Exception itself, or a panic, which is none and writes to standard error before."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level(tmp_path)
    sound = HuggingFace(tmp_path)

    class Broken:
        def fail(self, *args: object, **given: object) -> object:
            os.write(2, b"thread '<unnamed>' panicked at src/lib.rs\n")
            raise kind("a\nb")

        from_str = encode = decode = fail

    def use() -> object:
        if call == "from_str":
            monkeypatch.setattr(tokenizers, "Tokenizer", Broken())
            return HuggingFace(tmp_path)
        sound.tokenizer = Broken()
        return sound.encode("x") if call == "encode" else sound.decode([1])

    with pytest.raises(CouldNotRun, match=r"tokenizer.json .*: a b$"):
        use()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@pytest.mark.parametrize("content", ["7", "[]", "{", '"x"'])
def test_settings_that_are_none(content: str, tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CouldNotRun, match=r"tokenizer_config.json(:| is not JSON)"):
        HuggingFace(tmp_path)
