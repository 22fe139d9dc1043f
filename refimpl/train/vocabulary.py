"""The tokenizer of a training run, beside its checkpoint: bytes and tags, or byte-level BPE trained
on the documents.

Both are written as tokenizer.json, the format of the package `tokenizers` that transformers reads,
and with them generation_config.json, whose eos_token_id ends generation. Bytes need no package
here: their tokenizer.json is recognised by what it holds. Source of the symbols that stand for
bytes: GPT-2's byte-level BPE (Radford et al. 2019).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ..checkpoint.config_json import read_object, stop_tokens
from ..errors import CouldNotRun
from ..files import read_json, read_text, write_json
from ..tokenizer import BROKEN, Bytes, HuggingFace, Tokenizer

__all__ = [
    "END",
    "TAGS",
    "Vocabulary",
    "make_vocabulary",
    "open_vocabulary",
    "tokenizer_json",
    "train_bpe",
    "write_vocabulary",
]

TAGS = ("<|end|>", "<think>", "</think>", "<answer>", "</answer>")  # the first ends a text
END = 256  # of bytes and tags
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}


class Vocabulary(NamedTuple):
    """A checkpoint's tokenizer, and what training must know of it."""

    tokenizer: Tokenizer
    size: int  # tokens are 0 … size − 1
    end: int  # the token that ends a text
    first: tuple[int, ...] = ()  # what the tokenizer puts before every text
    files: Mapping[str, str] = {}  # of the folder that it was opened from, for the next checkpoint

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_rest(self, text: str) -> list[int]:
        """The tokens of a text that follows another one: nothing is put before it."""
        tokens, n = self.tokenizer.encode(text), len(self.first)
        return tokens[n:] if n and tuple(tokens[:n]) == self.first else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without ``end``; a token that only the model has, whose vocabulary may be the
        larger, is shown as U+FFFD."""
        runs: list[list[int]] = [[]]
        for token in tokens:
            if token >= self.size:
                runs.append([])
            elif token != self.end:
                runs[-1].append(token)
        return BROKEN.join(map(self.tokenizer.decode, runs))


BYTES = Vocabulary(Bytes(TAGS), 256 + len(TAGS), END)


def tokenizer_json() -> dict[str, Any]:
    """The tokenizer.json of bytes and tags: byte-level BPE without merges. Byte b is token b."""
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {symbol: byte for byte, symbol in enumerate(byte_symbols())},
        "merges": [],
    }
    added = [
        {
            "id": END + i,
            "content": tag,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": END + i == END,  # special tokens are not decoded: the other tags are text
        }
        for i, tag in enumerate(TAGS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL | {"use_regex": False},
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"use_regex": False},
        "model": model,
    }


def byte_symbols() -> list[str]:
    """The character that stands for each byte: its own where that is printed and no space, the
    others the characters from 256 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in own}
    for byte in range(256):
        symbols.setdefault(byte, chr(256 + byte - sum(kept < byte for kept in own)))
    return [symbols[byte] for byte in range(256)]


def train_bpe(documents: Iterable[str], size: int) -> dict[str, Any]:
    """The tokenizer.json of byte-level BPE trained on ``documents``: 256 bytes, merges, and behind
    them the tags, together ``size`` tokens, or fewer where the text has no more to merge. Each
    digit is a token. The same documents give the same file.

    CouldNotRun without the package tokenizers; ValueError if ``size`` is too small.
    """
    if size < 256 + len(TAGS):
        raise ValueError(f"size must be at least {256 + len(TAGS)}, got {size}")
    try:
        import tokenizers
    except ImportError as error:
        raise CouldNotRun(
            "training a tokenizer needs the package tokenizers (pip install -e '.[text]')"
        ) from error
    split = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(TAGS), initial_alphabet=byte_symbols(), show_progress=False
    )
    made.train_from_iterator(documents, trainer)
    added = [tokenizers.AddedToken(tag, normalized=False, special=tag == TAGS[0]) for tag in TAGS]
    made.add_tokens(added)
    content: dict[str, Any] = json.loads(made.to_str())
    return content


def write_vocabulary(folder: Path, content: dict[str, Any] | None = None) -> None:
    """Put the tokenizer into a checkpoint's folder: tokenizer.json with ``content`` (by default
    bytes and tags), tokenizer_config.json, generation_config.json. OSError if that can't be."""
    content = tokenizer_json() if content is None else content
    (end,) = (token["id"] for token in content["added_tokens"] if token["content"] == TAGS[0])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TAGS[0],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": end})


def open_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a checkpoint, which `write_vocabulary` wrote or anybody else.

    CouldNotRun if there is no tokenizer.json or no eos_token_id, or if the tokenizer has more
    tokens than the model (vocab_size of config.json).
    """
    path = folder / "tokenizer.json"
    if os.path.isfile(path) and read_json(path) == tokenizer_json():
        found = BYTES._replace(files=_files(folder))
    else:
        tokenizer = HuggingFace(folder, "a checkpoint that has one")
        known = tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()
        size = 1 + max(known, default=-1)
        ends = stop_tokens(folder)
        if not ends or ends[0] >= size:
            raise CouldNotRun(
                f"{folder} has no eos_token_id that is a token: generation_config.json must name "
                "the token that ends a text"
            )
        first = tuple(tokenizer.first)
        found = Vocabulary(tokenizer, size, ends[0], first, _files(folder))
    config = folder / "config.json"
    has = read_object(config).get("vocab_size") if os.path.lexists(config) else None
    if isinstance(has, int) and has < found.size:
        raise CouldNotRun(f"{path} has {found.size} tokens, and the model of {config} only {has}")
    return found


def make_vocabulary(documents: Iterable[str] = (), size: int = 0) -> Vocabulary:
    """A new one: bytes and tags, or BPE of ``size`` tokens trained on ``documents``."""
    with TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), train_bpe(documents, size) if size else None)
        return open_vocabulary(Path(folder))


def _files(folder: Path) -> dict[str, str]:
    """The tokenizer's files in a folder, as they are."""
    paths = [folder / name for name in FILES]
    return {path.name: read_text(path, str(path)) for path in paths if os.path.lexists(path)}
