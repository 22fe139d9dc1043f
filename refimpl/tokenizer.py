"""Text to tokens and back: a checkpoint's tokenizer.json (extra ``text``), or bytes; and text that
streams unbroken."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .errors import CouldNotRun
from .files import read_bytes, read_json

__all__ = ["Bytes", "HuggingFace", "TextStream", "Tokenizer"]

MOST = 2**28  # bytes of tokenizer.json; DeepSeek's has 8e6
BROKEN = (
    "\N{REPLACEMENT CHARACTER}"  # what decoding puts where bytes make no character, or none yet
)


class Tokenizer(Protocol):
    """Whatever turns text into tokens and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class HuggingFace:
    """The tokenizer.json in a checkpoint's folder.

    Where tokenizer_config.json asks for it (add_bos_token), the first token is bos_token:
    DeepSeek's tokenizer.json does not put it there, transformers does on loading
    (swift-transformers#161). Special tokens are not decoded.

    ``instead``: what to give where there is no tokenizer, as the message of CouldNotRun says it.
    """

    def __init__(self, folder: Path, instead: str = "token ids") -> None:
        path = folder / "tokenizer.json"
        if not os.path.isfile(path):
            raise CouldNotRun(f"{folder} has no tokenizer.json: give {instead}")
        try:
            import tokenizers  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise CouldNotRun(
                f"text needs the package tokenizers (pip install -e '.[text]'); or give {instead}"
            ) from error
        self.path, text = path, read_bytes(path, str(path), MOST).decode(errors="replace")
        with refused(f"{path} is not a tokenizer"):
            self.tokenizer: Any = tokenizers.Tokenizer.from_str(text)
        self.first = self._first(folder / "tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        with refused(f"{self.path} can't encode the text"):
            tokens: list[int] = self.tokenizer.encode(text).ids
        return tokens if tokens[:1] == self.first[:1] else self.first + tokens

    def decode(self, tokens: Sequence[int]) -> str:
        with refused(f"{self.path} can't decode its tokens"):
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _first(self, path: Path) -> list[int]:
        """The tokens that every text begins with: bos_token, or none."""
        if not os.path.lexists(path):
            return []
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise CouldNotRun(f"{path}: the file must be a JSON object")
        if settings.get("add_bos_token") is not True:
            return []
        name = settings.get("bos_token")
        name = name.get("content") if isinstance(name, dict) else name
        token = self.tokenizer.token_to_id(name) if isinstance(name, str) else None
        if token is None:
            raise CouldNotRun(
                f"{path}: add_bos_token needs a bos_token of tokenizer.json, got {str(name)[:40]!r}"
            )
        return [token]


@contextmanager
def refused(what: str) -> Iterator[None]:
    """CouldNotRun for whatever the package raises: Exception itself, and a panic of Rust, which is
    none and which also writes lines of its own to standard error. Those are not shown."""
    try:
        shown = os.dup(2)
    except OSError:  # closed
        shown = None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise CouldNotRun(f"{what}: {' '.join(str(error).split())}") from error
    finally:
        os.close(nowhere)
        if shown is not None:
            os.dup2(shown, 2)
            os.close(shown)


class Bytes:
    """Bytes as tokens 0 … 255, and 256 + i for ``tags[i]``: a text that is one token wherever it
    stands (of two that begin at one place, the longer)."""

    def __init__(self, tags: Sequence[str] = ()) -> None:
        if "" in tags or len(set(tags)) < len(tags):
            raise ValueError(f"tags must be different and not empty, got {list(tags)}")
        longest_first = sorted(tags, key=len, reverse=True)
        never = "(?!)"
        self.tag = re.compile(f"({'|'.join(map(re.escape, longest_first)) or never})")
        self.ids = {tag: 256 + i for i, tag in enumerate(tags)}
        self.pieces = [bytes([byte]) for byte in range(256)] + [tag.encode() for tag in tags]

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in self.tag.split(text):
            tokens += [self.ids[piece]] if piece in self.ids else piece.encode()
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tags are shown; tokens beyond them, which a larger model may choose, are not."""
        known = (self.pieces[token] for token in tokens if token < len(self.pieces))
        return b"".join(known).decode(errors="replace")


class TextStream:
    """Text piece by piece as tokens come; a character that is spread over several tokens comes
    whole, with its last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.tokens = tokenizer, list[int]()
        self.start = self.read = (
            0  # tokens before ``read`` were shown; from ``start`` on they give context
        )

    def add(self, token: int) -> str:
        """What can be shown now that ``token`` came."""
        self.tokens.append(token)
        return (
            "" if self.tokenizer.decode(self.tokens[self.start :]).endswith(BROKEN) else self.rest()
        )

    def rest(self) -> str:
        """What was not shown, whole characters or not."""
        shown = self.tokenizer.decode(self.tokens[self.start : self.read])
        text = self.tokenizer.decode(self.tokens[self.start :])
        self.start, self.read = self.read, len(self.tokens)
        return text[len(shown) :]
