"""The tokenizer of a run: bytes and tags as `tokenizers` and transformers read them; BPE."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.checkpoint.config_json import stop_tokens
from refimpl.errors import CouldNotRun
from refimpl.tokenizer import Bytes, HuggingFace
from refimpl.train.documents import documents
from refimpl.train.vocabulary import (
    END,
    TAGS,
    Vocabulary,
    open_vocabulary,
    tokenizer_json,
    train_bpe,
    write_vocabulary,
)

from support import byte_level

OURS = Bytes(TAGS)
PARTS = st.one_of(
    st.sampled_from([*TAGS, "<", "<think", "think>", "|>", " ", "\n", "12", "é"]), st.text()
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)


@pytest.fixture(scope="module")
def theirs() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json()))


@given(TEXTS)
def test_bytes_as_tokenizers_reads_them(theirs: Any, text: str) -> None:
    tokens = OURS.encode(text)
    assert theirs.encode(text).ids == tokens
    assert theirs.decode(tokens, skip_special_tokens=False) == OURS.decode(tokens) == text
    shown = Vocabulary(OURS, 261, END).decode(tokens)
    assert theirs.decode(tokens) == shown == text.replace("<|end|>", "")


@given(st.lists(st.integers(0, 260)))
def test_any_tokens_are_decoded_alike(theirs: Any, tokens: list[int]) -> None:
    """Broken characters included, and tags in the middle of one."""
    assert theirs.decode(tokens, skip_special_tokens=False) == OURS.decode(tokens)


def test_written_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are opened without the package, from what the file holds; generation stops at END."""
    write_vocabulary(tmp_path)
    assert stop_tokens(tmp_path) == [END] == [256]
    text = "85+63=<think>5+3=8 8+6=14</think><answer>148</answer><|end|>"
    through_package = HuggingFace(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    vocabulary = open_vocabulary(tmp_path)
    assert vocabulary[1:4] == (261, END, ())
    tokens = vocabulary.encode(text)
    assert tokens == [*b"85+63=", 257, *b"5+3=8 8+6=14", 258, 259, *b"148", 260, 256]
    assert tokens == through_package.encode(text) == vocabulary.encode_rest(text)
    assert vocabulary.decode(tokens) == through_package.decode(tokens) == text[: -len("<|end|>")]


def test_as_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_vocabulary(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    for text in ("1+2=<think>x</think>", " a é<|end|>", "<answer>3</answer>\n<|end|>"):
        tokens = OURS.encode(text)
        assert tokenizer(text)["input_ids"] == tokens
        assert tokenizer.decode(tokens) == text
        shown = tokenizer.decode(tokens, skip_special_tokens=True)
        assert shown == text.replace("<|end|>", "")
    assert (tokenizer.eos_token_id, len(tokenizer)) == (END, 261)


TEXT = [*documents()[:20], "2024 " * 300]


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    pytest.importorskip("tokenizers")
    return train_bpe(TEXT, 500)


def test_bpe(bpe: dict[str, Any], tmp_path: Path) -> None:
    """The same file again; digits one by one; the tags behind the rest, the first of them the end;
    shorter than bytes on its text, and any text survives."""
    assert bpe == train_bpe(TEXT, 500)
    known = bpe["model"]["vocab"]
    assert len(known) == 495
    assert not [token for token in known if len(token) > 1 and re.search(r"\d", token)]
    write_vocabulary(tmp_path, bpe)
    vocabulary = open_vocabulary(tmp_path)
    assert vocabulary[1:4] == (500, 495, ())
    assert stop_tokens(tmp_path) == [495]
    text = documents()[30]
    assert len(vocabulary.encode(text)) < 0.6 * len(text)
    assert len(vocabulary.encode("1234567")) == 7
    text += "naïve 日本語 🎉 \x00 <think>12</think> <answer>3</answer>"
    assert vocabulary.decode(vocabulary.encode(text + "<|end|>")) == text
    assert vocabulary.encode("<|end|><think></answer>") == [495, 496, 499]


def test_bpe_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="size must be at least 261, got 260"):
        train_bpe(["x"], 260)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CouldNotRun, match=r"needs the package tokenizers \(pip install"):
        train_bpe(["x"], 300)


def test_foreign(tmp_path: Path) -> None:
    """Another tokenizer: its end from generation_config.json or config.json, what it puts before a
    text put there once; what it lacks is one line."""
    with pytest.raises(CouldNotRun, match=r"has no tokenizer.json: give a checkpoint that has one"):
        open_vocabulary(tmp_path)
    byte_level(tmp_path)
    with pytest.raises(CouldNotRun, match="has no eos_token_id that is a token"):
        open_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 257}')
    with pytest.raises(CouldNotRun, match="has no eos_token_id that is a token"):
        open_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [256, 3], "vocab_size": 257}')
    settings = {"add_bos_token": True, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = open_vocabulary(tmp_path)
    assert vocabulary[1:4] == (257, 256, (256,))
    assert vocabulary.encode("ab") == [256, *vocabulary.encode_rest("ab")]
    assert vocabulary.encode_rest("<s>ab") == vocabulary.encode_rest("ab")
    (tmp_path / "config.json").write_text('{"eos_token_id": 256, "vocab_size": 256}')
    with pytest.raises(CouldNotRun, match=r"has 257 tokens, and the model of .* only 256"):
        open_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CouldNotRun, match=r"tokenizer.json is not JSON"):
        open_vocabulary(tmp_path)
